"""Clustering by density peaks, with densities from the nearest neighbours.

Du et al., "Study on density peaks clustering based on k-nearest neighbors and principal component
analysis", Knowledge-Based Systems 99, 2016, as Zeng et al. cluster tokens with it in "Not All
Tokens Are Equal: Human-centric Visual Analysis via Token Clustering Transformer" (TCFormer), CVPR
2022, https://arxiv.org/abs/2204.08680, section 3.2, and as Haurum et al., "Which Tokens to Use?",
ICCVW 2023, https://arxiv.org/abs/2308.04657, put it into ViTs. Distances are divided by the square
root of their dimension, as in the published code (but not in the paper's equation 1). The densest
token has no denser one; its distance to one is set to the longest distance in the image, as in the
published code. Differs from that code in that no noise is added to the densities: ties go to the
lower index; and in that means weigh tokens by what they stand for (`weighted`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokred.graphs import in_a_graph
from tokred.maps import Clusters, deciding, in_order_of_first_member, ranked, take
from tokred.optional import installed
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register

_IN_CACHE = 2**18
"""How many distances are worked on at once on the CPU."""


@register("dpc_knn")
@dataclass(frozen=True)
class DPCKNN:
    """Takes dense tokens far from denser ones as centres; the others join the nearest centre.

    Stands before the block and compares the tokens themselves.

    Args:
        k: the number of nearest neighbours for a density, the token itself included.
        weighted: whether the mean of a cluster weighs its members by the number of original tokens
            that they stand for, or all alike, as Haurum et al. do. Features are closer to those of
            the dense model if it does (docs/dense.md has figures).
    """

    k: int = 5
    weighted: bool = True

    place: ClassVar[str] = "before"
    proportional: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    bibtex: ClassVar[str] = """@inproceedings{zeng2022tcformer,
  title     = {Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering
               Transformer},
  author    = {Zeng, Wang and Jin, Sheng and Liu, Wentao and Qian, Chen and Luo, Ping and
               Ouyang, Wanli and Wang, Xiaogang},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}"""

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        clusters = Clusters(cluster(tokens.x, keep, self.k), keep)
        return clusters if self.weighted else clusters.alike(tokens.size)


class Peaks(NamedTuple):
    """What `peaks` finds.

    Attributes:
        labels: the cluster of every token, numbered in the order of their first tokens.
        centres: the token in the middle of each cluster, in the order of the clusters.
        log_score: the logarithm of the density of each token times its distance to a denser one;
            the tokens with the highest are centres. -inf for tokens that are not there.
    """

    labels: Int[Tensor, "batch tokens"]
    centres: Int[Tensor, "batch clusters"]
    log_score: Float[Tensor, "batch tokens"]


def cluster(
    x: Float[Tensor, "batch tokens dim"],
    num_clusters: int,
    k: int = 5,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Clusters every sample around its density peaks; returns the cluster of every token.

    Clusters are numbered in the order of their first tokens. Ties go to the lower index.

    Args:
        x: what tokens are compared by, in any floating-point dtype; see `squared_distances`.
        num_clusters: in [1, tokens].
        k: at least 1; all tokens are neighbours if there are fewer.
        mask: True for tokens that are there. The others make no difference to these: they are
            nobody's neighbours and no centres, and join the cluster of the first token that is
            there. (The mask is looked at on the host, so that a device must be waited for.)

    Raises:
        ValueError: `num_clusters` or `k` is out of range, or fewer tokens of a sample are there
            than clusters are asked for.
    """
    return _in_parts(x, num_clusters, k, mask).labels


def peaks(
    x: Float[Tensor, "batch tokens dim"],
    num_clusters: int,
    k: int = 5,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Peaks:
    """`cluster`, with the centres of the clusters and the score of every token. Arguments and
    errors are those of `cluster`."""
    found = _in_parts(x, num_clusters, k, mask)
    number = found.labels.gather(1, found.centres)
    centres = torch.empty_like(found.centres).scatter(1, number, found.centres)
    return Peaks(found.labels, centres, found.log_score - math.log(x.shape[2]) / 2)


def _in_parts(
    x: Float[Tensor, "batch tokens dim"],
    num_clusters: int,
    k: int,
    mask: Bool[Tensor, "batch tokens"] | None,
) -> Peaks:
    """The peaks of a batch, some samples at a time; centres in the order of their tokens."""
    _check_k(k)
    check_number(num_clusters, x.shape[1])
    if mask is not None:
        _check_mask(mask, x, num_clusters)
    num = x.shape[1]
    # As many samples at a time as fit into memory; on the CPU, into the cache.
    at_once, rows = samples_at_once(num), num
    if x.device.type == "cpu" and not in_a_graph(x):
        at_once = min(at_once, max(1, _IN_CACHE // num**2))
    if num**2 > 2**24:
        rows = 2 ** (20 if x.device.type == "cpu" else 24) // num + 1
    some = x.split(at_once)
    masks = [None] * len(some) if mask is None else mask.split(at_once)
    parts = [
        _peaks(part, num_clusters, k, rows, there) for part, there in zip(some, masks, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return Peaks(*(torch.cat(of_parts) for of_parts in zip(*parts, strict=True)))


def _peaks(
    x: Float[Tensor, "batch tokens dim"],
    num_clusters: int,
    k: int,
    rows: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Peaks:
    """`rows` is the number of tokens of a sample whose distances to all others are held at a time.
    If it is less than all tokens, distances are computed again for each step."""
    if mask is not None:
        # They become copies of the first token that is there, so that no rounding depends on them.
        first = take(x, mask.int().argmax(1, keepdim=True))
        x = torch.where(mask[..., None], x, first)
    whole, half, unit = _whole_numbers(x)
    num, dim = x.shape[1:]
    every = (whole, half)
    neighbours = min(k, num)
    if rows >= num and mask is None and _by_numba(whole, neighbours):
        from tokred.kernels import density_numba

        halved = _halved(every, every)
        unit = unit[:, 0]
        spread, separation = density_numba.spread_and_separation(
            halved, unit[:, 0], neighbours, dim
        )
        score = _scores(spread, separation, unit)
        centres = _best(score, num_clusters)
        return Peaks(in_order_of_first_member(join_nearest(halved, centres)), centres, score)
    parts = list(zip(whole.split(rows, 1), half.split(rows, 1), strict=True))

    # Equation 1, density = exp(-spread). The density itself is never formed: beyond a spread of
    # 745 it is 0 even in float64, and all such tokens would be equally dense. (Half squares and
    # logarithms decide the same as distances and densities, and cost less.)
    spreads, longest = [], torch.zeros_like(half[:, 0])
    counted = neighbours if mask is None else mask.sum(1, keepdim=True).clamp(max=neighbours)
    for number, part in enumerate(parts):
        halved = _halved(part, every)
        longest = torch.maximum(longest, halved.flatten(1).amax(1))
        # The nearest neighbour is the token itself, at distance 0: no need to search for it.
        if mask is None:
            others = _smallest_others(halved, number * rows, neighbours - 1).sum(-1)
        else:
            there = halved.masked_fill(~mask[:, None], torch.inf)
            least = _smallest_others(there, number * rows, neighbours - 1)
            others = least.masked_fill(least == torch.inf, 0).sum(-1)
        spreads.append(others / counted * unit[:, 0] / dim)
    if mask is not None:  # as if infinitely far from all others: denser than nobody
        hidden = (~mask).split(rows, 1)
        spreads = [
            own.masked_fill(out, torch.inf) for own, out in zip(spreads, hidden, strict=True)
        ]
    spread = torch.cat(spreads, 1)

    # Equation 2: how far the next denser token is; for the densest, the longest distance there is.
    nearest = []
    for part, own in zip(parts, spreads, strict=True):
        if len(parts) > 1:
            halved = _halved(part, every)
        denser = spread[:, None, :] < own[:, :, None]
        nearest.append(halved.where(denser, torch.inf).amin(-1))
    separation = torch.minimum(torch.cat(nearest, 1), longest[:, None])

    # The centres are the tokens with the highest density * separation, here its logarithm.
    score = _scores(spread, separation, unit[:, 0])
    if mask is None:
        centres = _best(score, num_clusters)
    else:
        # Of tokens that are there, some may have a score of -inf, too: those that equal others.
        lowest = torch.finfo(score.dtype).min
        centres = _best(score.clamp_min(lowest).masked_fill(~mask, -torch.inf), num_clusters)
    if len(parts) == 1:
        label = join_nearest(halved, centres)
    else:
        chosen = (take(whole, centres), half.gather(1, centres))
        label = torch.cat([_first_least(_halved(part, chosen), -1) for part in parts], 1)
        label = _own(label, centres)
    if mask is not None:
        of_first = label.gather(1, mask.int().argmax(1, keepdim=True))
        label = torch.where(mask, label, of_first)
    return Peaks(in_order_of_first_member(label), centres, score)


def _scores(
    spread: Float[Tensor, "batch tokens"],
    separation: Float[Tensor, "batch tokens"],
    unit: Float[Tensor, "batch 1"],
) -> Float[Tensor, "batch tokens"]:
    """The logarithm of density * separation, of distances that are not divided by anything."""
    return (separation * unit).sqrt().log() - spread


def _best(score: Float[Tensor, "batch tokens"], num: int) -> Int[Tensor, "batch num"]:
    """The tokens with the highest scores, in their order."""
    return ranked(score)[:, :num].sort(-1).values


def _by_numba(x: Tensor, k: int) -> bool:
    """Whether the numba kernel, which is for few neighbours, is available and can be used here."""
    return _as_bits(x) and 1 < k <= 8 and not x.requires_grad and installed("numba")


def squared_distances(x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens tokens"]:
    """The squared Euclidean distances of all pairs of tokens in a sample, float64.

    Tokens are rounded first, to float32 and by at most 3e-8 of the distance between the first token
    and the token farthest from it. After that, nothing is rounded. So the
    result is symmetric; equal tokens have distance 0 and are equally far from any other token; and
    the order of summation, which depends on the device and the batch, makes no difference.
    Differences in float32, squared and summed, are no more exact, and take much longer, because
    they cannot be computed as a matrix product.
    """
    whole, half, unit = _whole_numbers(x)
    return _halved((whole, half), (whole, half)).mul_(unit)


def _whole_numbers(
    x: Float[Tensor, "batch tokens dim"],
) -> tuple[
    Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens"], Float[Tensor, "batch 1 1"]
]:
    """The tokens as vectors of whole numbers, in some unit; half of their squared lengths; and
    twice the square of the unit."""
    x = deciding(x.detach())
    # Distances do not depend on the origin; but what all tokens have in common costs digits.
    x = x - x[:, :1]
    # To vectors of integers, 2^25 long at most (the scale is a power of two). By Cauchy and Schwarz
    # the partial sums of their inner products stay within about 2^50, and squared distances within
    # 2^52: float64 holds such integers exactly.
    length = torch.linalg.vector_norm(x, dim=-1).amax(1)[:, None, None]
    scale = torch.exp2(25 - length.clamp_min(1e-30).log2().ceil())
    whole = (x * scale).round_().double()
    return whole, whole.square().sum(-1) / 2, 2 / scale.double().square()


def _halved(
    some: tuple[Float[Tensor, "batch some dim"], Float[Tensor, "batch some"]],
    others: tuple[Float[Tensor, "batch others dim"], Float[Tensor, "batch others"]],
) -> Float[Tensor, "batch some others"]:
    """Half of the squared distances between two sets of tokens, see `_whole_numbers`."""
    # In place: on the CPU, new memory costs more than the arithmetic. (Not by `baddbmm_`, which
    # torch's counter of multiply-adds does not know.)
    halved = some[1][:, :, None] + others[1][:, None, :]
    torch.baddbmm(halved, some[0], others[0].transpose(1, 2), alpha=-1, out=halved)
    return halved


def _smallest_others(
    x: Float[Tensor, "batch some others"], first: int, k: int
) -> Float[Tensor, "batch some k"]:
    """`_smallest` of all but the entry of the token itself, whose place in a row is that of the
    row, counted from `first` on."""
    if in_a_graph(x):  # what changes a part in place cannot become ONNX
        other = torch.arange(x.shape[2], device=x.device)
        itself = other == other[first : first + x.shape[1], None]
        return _smallest(x.masked_fill(itself, torch.inf), k)
    itself = x.diagonal(first, 1, 2).fill_(torch.inf)
    found = _smallest(x, k)
    itself.fill_(0)
    return found


def _smallest(x: Float[Tensor, "batch some others"], k: int) -> Float[Tensor, "batch some k"]:
    """The k smallest of every row, rising, of numbers that are not negative."""
    if not _as_bits(x) or not 1 <= k <= 8:
        return x.topk(k, largest=False).values
    # One minimum after the other takes half the time of topk, which copies every row. Numbers that
    # are not negative have the same order as integers of the same bits, whose minima are faster.
    bits = x.view(torch.int64)
    found = []
    for _ in range(k):
        least = bits.min(-1, keepdim=True)
        found.append(least)
        bits.scatter_(-1, least.indices, torch.iinfo(torch.int64).max)
    for least in found:
        bits.scatter_(-1, least.indices, least.values)
    return torch.cat([least.values for least in found], -1).view(x.dtype)


def _as_bits(x: Tensor) -> bool:
    """Whether numbers that are not negative may be compared as integers of the same bits."""
    here = x.device.type == "cpu" and not in_a_graph(x)
    return here and x.dtype == torch.float64


def join_nearest(
    distance: Float[Tensor, "batch tokens tokens"], centres: Int[Tensor, "batch clusters"]
) -> Int[Tensor, "batch tokens"]:
    """For every token, the number of the nearest centre; of equals, the first. A centre joins
    itself, even if another centre equals it, so that no cluster is empty.

    Args:
        distance: symmetric, not negative. Anything that rises with the distance will do, such as
            its square.
        centres: which tokens are centres, all different.
    """
    return _own(_first_nearest(distance, centres), centres)


def _own(
    label: Int[Tensor, "batch tokens"], centres: Int[Tensor, "batch clusters"]
) -> Int[Tensor, "batch tokens"]:
    """Gives every centre its own label."""
    own = torch.arange(centres.shape[1], device=centres.device).expand_as(centres)
    return label.scatter(1, centres, own)


def _first_nearest(
    distance: Float[Tensor, "batch tokens tokens"], centres: Int[Tensor, "batch clusters"]
) -> Int[Tensor, "batch tokens"]:
    """For every token, the number of the nearest centre; of equals, the first."""
    if not _as_bits(distance):
        return take(distance, centres).argmin(1)
    # As integers, as in `_first_least`. The rows of all centres at once could be half
    # as much memory again as the distances, and would not fit into the cache.
    bits = distance.view(torch.int64)
    at_once = max(1, 2**17 // max(1, distance.shape[0] * distance.shape[2]))
    found = [take(bits, some).min(1) for some in centres.split(at_once, 1)]
    if len(found) == 1:
        return found[0].indices
    part = torch.stack([least.values for least in found], 1).min(1).indices[:, None]
    inside = torch.stack([least.indices for least in found], 1).gather(1, part)
    return (part * at_once + inside)[:, 0]


def _first_least(x: Float[Tensor, "batch a b"], dim: int) -> Int[Tensor, "batch kept"]:
    """The index of the smallest of numbers that are not negative; of equals, the first."""
    # As integers of the same bits, see `_smallest`.
    return x.view(torch.int64).min(dim).indices if _as_bits(x) else x.argmin(dim)


def samples_at_once(num: int, elements: int = 2**24) -> int:
    """How many samples of `num` tokens to work on together, so that all their distances are at most
    `elements` numbers; at least one sample."""
    return max(1, elements // num**2)


def check_number(num_clusters: int, num: int) -> None:
    """Raises a ValueError unless `num` tokens can form so many clusters."""
    if not 1 <= num_clusters <= num:
        raise ValueError(f"num_clusters must be in [1, {num}] for {num} tokens, not {num_clusters}")


def _check_mask(
    mask: Bool[Tensor, "batch tokens"], x: Float[Tensor, "batch tokens dim"], num_clusters: int
) -> None:
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"mask must be bool, {list(x.shape[:2])}, not {mask.dtype}, {list(mask.shape)}"
        )
    fewest = int(mask.sum(1).min()) if len(mask) > 0 else num_clusters
    if fewest < num_clusters:
        raise ValueError(
            f"num_clusters must be at most {fewest}, not {num_clusters}: in one sample, mask says "
            f"that no more than {fewest} tokens are there"
        )


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1 (the token itself is a neighbour), not {k}")
