"""How tokens are clustered: by density peaks, and by what can replace them in a trained model.

A clustering is any function that takes tokens [batch, tokens, dim] and a number of clusters, and
returns the cluster of every token; no cluster is empty. Zeng et al., "TCFormer: Visual Recognition
via Token Clustering Transformer", TPAMI 2024, https://arxiv.org/abs/2407.11321, compare these
(table IX) and cluster in parts of the image (Local CTM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from tokred.maps import Clusters, deciding, in_order_of_first_member, ranked, take
from tokred.models.tcformer.tokens import Grid
from tokred.reducers import dpc_knn, tome
from tokred.reducers.dpc_knn import check_number


class Clustering(Protocol):
    """`clustering(x, num)`: a label in [0, num) for every token [batch, tokens, dim]; each label
    occurs. No gradient is needed."""

    def __call__(self, x: Tensor, num: int, /) -> Tensor: ...


@dataclass(frozen=True)
class DPCKNN:
    """Density peaks from the k nearest neighbours (section 3.2), with which TCFormers are trained.

    Args:
        k: the number of nearest neighbours for a density, the token itself included.
    """

    k: int = 5

    def __call__(self, x: Tensor, num: int, /) -> Tensor:
        return dpc_knn.cluster(x, num, self.k)


@dataclass(frozen=True)
class KMeans:
    """Lloyd's algorithm, started from evenly spaced tokens. Clusters that are empty at the end take
    the tokens that are farthest from their own centres.

    Args:
        iterations: how often tokens join centres and centres become means.
    """

    iterations: int = 5

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, not {self.iterations}")

    def __call__(self, x: Tensor, num: int, /) -> Tensor:
        batch, tokens = x.shape[:2]
        check_number(num, tokens)
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        x = x - x.mean(1, keepdim=True)  # a common offset would cost digits
        first = torch.arange(num, device=x.device) * tokens // num
        centres = x[:, first]
        label = _nearest(x, centres)[0]
        for _ in range(self.iterations):
            sums = torch.zeros_like(centres).scatter_add_(1, label[..., None].expand_as(x), x)
            members = x.new_zeros(batch, num).scatter_add_(1, label, x.new_ones(batch, tokens))
            means = sums / members.clamp(min=1)[..., None]
            centres = means.where(members[..., None] > 0, centres)
            label = _nearest(x, centres)[0]
        label, distance = _nearest(x, centres)
        return in_order_of_first_member(_fill(label, distance, num))


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of every token, the first of equals, and the squared distance."""
    half = (centres * centres).sum(-1) / 2
    best, label = deciding(x @ centres.transpose(1, 2) - half[:, None]).max(-1)
    return label, deciding((x * x).sum(-1)) - 2 * best


def _fill(label: Tensor, distance: Tensor, num: int) -> Tensor:
    """Gives every empty cluster one of the tokens that are farthest from their centres. At least
    one token of every other cluster stays."""
    batch, tokens = label.shape
    position = torch.arange(tokens, device=label.device).expand_as(label)
    first = torch.full((batch, num), tokens, device=label.device)
    first = first.scatter_reduce(1, label, position, "amin")
    empty = first == tokens
    stays = first.gather(1, label) == position
    # The farthest tokens first, those that stay last.
    farthest = ranked(distance.masked_fill(stays, -torch.inf))[:, :num]
    # The n-th empty cluster takes the n-th of them.
    number = empty.cumsum(1) - 1
    order = torch.arange(num, device=label.device).expand(batch, num)
    taker = torch.full((batch, num + 1), -1, device=label.device)
    taker = taker.scatter(1, torch.where(empty, number, num), order)[:, :num]
    now = label.gather(1, farthest)
    return label.scatter(1, farthest, torch.where(taker >= 0, taker, now))


@dataclass(frozen=True)
class Bipartite:
    """Bipartite soft matching, as in ToMe, in rounds. Each round merges at most half of the tokens
    and forms their means."""

    def __call__(self, x: Tensor, num: int, /) -> Tensor:
        check_number(num, x.shape[1])
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        size = torch.ones_like(x[..., 0])
        index = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        clusters = Clusters(index, x.shape[1])
        while clusters.num_coarse > num:
            merges = min(clusters.num_coarse - num, clusters.num_coarse // 2)
            once = Clusters(tome.match(x, merges), clusters.num_coarse - merges)
            x, size = once.down(x, size), once.total(size)
            clusters = clusters.then(once)
        return clusters.index


@dataclass(frozen=True)
class Parts:
    """Tokens that are clustered part by part.

    Attributes:
        sizes: the number of tokens of each part.
        keeps: the number of clusters that each part becomes.
        order: the tokens, part by part; None if they are in that order already.
    """

    sizes: tuple[int, ...]
    keeps: tuple[int, ...]
    order: Int[Tensor, " tokens"] | None = None

    @property
    def keep(self) -> int:
        return sum(self.keeps)


def kept(num: int) -> int:
    """The number of tokens that a CTM leaves of `num`: a quarter, rounded up."""
    return max(-(-num // 4), 1)


def parts_of(grid: Grid, sides: Sequence[int], device: torch.device) -> list[Parts]:
    """The parts of every CTM (Local CTM). The grid is cut into sides x sides parts, tokens are only
    merged within a part, and parts join into larger ones for the next CTM.

    A grid that cannot be divided evenly is cut into parts that differ by a row or a column; each
    keeps a quarter of its own tokens. If the grid is so small that a part has no cell, the part is
    left out.

    Args:
        grid: rows and columns of the cells.
        sides: for every CTM, the number of parts along each side.
        device: where the order of the cells is wanted.

    Raises:
        ValueError: a CTM has less than one part, or its parts do not join to those of the next.
    """
    check_sides(sides)
    height, width = grid
    most = sides[0]
    # Sorted by the coarsest cut first, so that parts that will join are next to each other.
    places = sorted(
        ((r, c) for r in range(most) for c in range(most)),
        key=lambda place: [
            (place[0] * side // most, place[1] * side // most) for side in reversed(sides)
        ],
    )
    number = torch.arange(height * width, device=device).view(height, width)
    cut = {
        (r, c): number[
            r * height // most : (r + 1) * height // most,
            c * width // most : (c + 1) * width // most,
        ].flatten()
        for r, c in places
    }
    places = [place for place in places if cut[place].numel()]
    order = torch.cat([cut[place] for place in places]) if most > 1 else None
    counts = [(place, cut[place].numel()) for place in places]
    plan = []
    for level, side in enumerate(sides):
        joined = [
            (place, sum(count for _, count in group))
            for place, group in groupby(
                ((_coarser(place, most, side), count) for place, count in counts),
                key=lambda pair: pair[0],
            )
        ]
        sizes = tuple(count for _, count in joined)
        keeps = tuple(map(kept, sizes))
        plan.append(Parts(sizes, keeps, order if level == 0 else None))
        counts = [(place, keep) for (place, _), keep in zip(joined, keeps, strict=True)]
        most = side
    return plan


def _coarser(place: tuple[int, int], fine: int, coarse: int) -> tuple[int, int]:
    return place[0] * coarse // fine, place[1] * coarse // fine


def check_sides(sides: Sequence[int]) -> None:
    """Raises a ValueError unless parts of every CTM consist of whole parts of the CTM before."""
    fine = [sides[0], *sides[:-1]]
    if any(s < 1 for s in sides) or any(f % s for f, s in zip(fine, sides, strict=True)):
        raise ValueError(
            "parts must be at least 1 along each side, and a divisor of those of the CTM before, "
            f"as (4, 2, 1) are, not {tuple(sides)}"
        )


def cluster_in_parts(x: Tensor, parts: Parts, clustering: Clustering) -> Tensor:
    """A label in [0, parts.keep) for every token [batch, tokens, dim]: those of the first part come
    first. Parts of one size are clustered together, as samples of a batch."""
    if len(parts.sizes) == 1:
        return clustering(x, parts.keeps[0])
    batch, _, dim = x.shape
    x = x.detach()
    if parts.order is not None:
        x = take(x, parts.order.expand(batch, -1))
    pieces = x.split(parts.sizes, 1)
    starts = [sum(parts.keeps[:n]) for n in range(len(parts.keeps))]
    found: list[Tensor] = [x] * len(pieces)
    for size in sorted(set(parts.sizes)):
        alike = [n for n, one in enumerate(parts.sizes) if one == size]
        if len(alike) == len(pieces):
            stacked = x.view(batch * len(alike), size, dim)
        else:
            stacked = torch.stack([pieces[n] for n in alike], 1).flatten(0, 1)
        labels = clustering(stacked, kept(size)).view(batch, len(alike), size)
        for place, n in enumerate(alike):
            found[n] = labels[:, place] + starts[n]
    labels = torch.cat(found, 1)
    if parts.order is None:
        return labels
    return torch.empty_like(labels).scatter(1, parts.order.expand(batch, -1), labels)
