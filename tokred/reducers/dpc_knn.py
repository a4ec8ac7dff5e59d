"""Clustering by density peaks, with densities from the nearest neighbours.

Du et al., "Study on density peaks clustering based on k-nearest neighbors and principal component
analysis", Knowledge-Based Systems 99, 2016, as Zeng et al. cluster tokens with it in "Not All
Tokens Are Equal: Human-centric Visual Analysis via Token Clustering Transformer" (TCFormer), CVPR
2022, https://arxiv.org/abs/2204.08680, section 3.2, and as Haurum et al., "Which Tokens to Use?",
ICCVW 2023, https://arxiv.org/abs/2308.04657, put it into ViTs. Distances are divided by the square
root of their dimension, as in the published code (not so in the paper's equation 1), and the
densest token is as far from denser ones as any two tokens of the image are from each other (there,
too). Differs from that code in that no noise is added to the densities: ties go to the lower
index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokred.maps import Clusters, in_order_of_first_member, ranked, take
from tokred.reducers import Tokens, register


@register("dpc_knn")
@dataclass(frozen=True)
class DPCKNN:
    """Takes dense tokens far from denser ones as centres; the others join the nearest centre.

    Stands before the block and compares the tokens themselves.

    Args:
        k: over how many nearest neighbours a density is taken, the token itself among them.
        weighted: whether a cluster becomes the mean of its members counted as often as the tokens
            they stand for, or their plain mean.
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
        if self.weighted:
            return clusters
        members = clusters.total(torch.ones_like(tokens.size))
        return Clusters(clusters.index, keep, share=1 / members.gather(1, clusters.index))


def cluster(
    x: Float[Tensor, "batch tokens dim"], num_clusters: int, k: int = 5
) -> Int[Tensor, "batch tokens"]:
    """Clusters every sample around its density peaks; returns the cluster of every token.

    Clusters are numbered in the order of their first tokens. Ties go to the lower index.

    Args:
        x: what tokens are compared by, in any floating-point dtype; see `squared_distances`.
        num_clusters: in [1, tokens].
        k: at least 1; all tokens are neighbours if there are fewer.

    Raises:
        ValueError: `num_clusters` or `k` is out of range.
    """
    _check_k(k)
    check_number(num_clusters, x.shape[1])
    labels = [_cluster(part, num_clusters, k) for part in x.split(samples_at_once(x.shape[1]))]
    return torch.cat(labels)


def _cluster(
    x: Float[Tensor, "batch tokens dim"], num_clusters: int, k: int
) -> Int[Tensor, "batch tokens"]:
    # Squares and logarithms decide the same as distances and densities, and cost less.
    squared = squared_distances(x)

    # Equation 1, density = exp(-spread). The density itself is never formed: beyond a spread of
    # 745 it is 0 even in float64, and all such tokens would be equally dense.
    nearest = squared.topk(min(k, x.shape[1]), largest=False).values
    spread = nearest.mean(-1) / x.shape[2]

    # Equation 2: how far the next denser token is; for the densest, the longest distance there is.
    denser = spread[:, None, :] < spread[:, :, None]
    longest = squared.flatten(1).amax(1)[:, None, None]
    separation = squared.where(denser, longest).amin(-1).sqrt()

    # The centres are the tokens with the highest density * separation, here its logarithm.
    score = separation.log() - spread
    order = ranked(score)
    centres = order[:, :num_clusters].sort(-1).values
    return in_order_of_first_member(join_nearest(squared, centres))


def squared_distances(x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens tokens"]:
    """The squared Euclidean distances of all pairs of tokens in a sample, float64.

    Tokens are rounded, by at most 3e-8 of the distance between the first token and the one that is
    furthest from it (or to float32, if that is coarser); nothing is rounded after that. So the
    result is symmetric, equal tokens have distance 0 and are equally far from any other, and the
    order of summation, that is, the device and the rest of the batch, makes no difference. Float32
    differences, squared and added up, are no more exact than this and take much longer, because no
    matrix product can form them.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    # Distances are the same from any origin; what all tokens have in common costs digits.
    x = x - x[:, :1]
    # To vectors of integers, 2^25 long at most (the scale is a power of two). By Cauchy and Schwarz
    # the partial sums of their inner products stay within about 2^50, and squared distances within
    # 2^52: float64 holds such integers exactly.
    length = torch.linalg.vector_norm(x, dim=-1).amax(1)[:, None, None]
    scale = torch.exp2(25 - length.clamp_min(1e-30).log2().ceil())
    whole = (x * scale).round_().double()
    product = whole @ whole.transpose(1, 2)
    half = product.diagonal(dim1=1, dim2=2) / 2
    # In place: on the CPU, fresh memory costs more than the arithmetic here.
    halved = (half[:, :, None] + half[:, None, :]).sub_(product)
    return halved.mul_(2 / scale.double().square())


def join_nearest(
    distance: Float[Tensor, "batch tokens tokens"], centres: Int[Tensor, "batch clusters"]
) -> Int[Tensor, "batch tokens"]:
    """For every token, which of the centres is nearest: the first of equals. A centre joins itself,
    even if another is its equal, so that no cluster is empty.

    Args:
        distance: symmetric; or any that rises with it, such as the square.
        centres: which tokens are centres, all different.
    """
    label = take(distance, centres).argmin(1)
    own = torch.arange(centres.shape[1], device=centres.device).expand_as(centres)
    return label.scatter(1, centres, own)


def samples_at_once(num: int, elements: int = 2**24) -> int:
    """How many samples of `num` tokens to work on together, so that a matrix of all their
    distances has at most `elements` (but one sample at least)."""
    return max(1, elements // num**2)


def check_number(num_clusters: int, num: int) -> None:
    """Raises a ValueError unless `num` tokens can form so many clusters."""
    if not 1 <= num_clusters <= num:
        raise ValueError(f"num_clusters must be in [1, {num}] for {num} tokens, not {num_clusters}")


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1 (the token itself is a neighbour), not {k}")
