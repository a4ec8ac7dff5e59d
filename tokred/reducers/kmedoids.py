"""K-medoids, weighted by how much attention tokens got.

Marin et al., "Token Pooling in Vision Transformers", 2021, https://arxiv.org/abs/2110.03860, pool
tokens by weighted k-medoids; Haurum et al., "Which Tokens to Use? Investigating Token Reduction in
Vision Transformers", ICCVW 2023, https://arxiv.org/abs/2308.04657, compare that with other
methods. The weights are the column sums of the attention of the block before. Differs from Haurum's
code in that a cluster's new medoid is the member with the least weighted sum of distances to its
members, which is what defines a medoid (there: the least product of its own weight and the sum of
its distances to all tokens, which favours tokens that nobody attends to; `published=True` does
that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokred.graphs import recorded
from tokred.maps import Clusters, deciding, in_order_of_first_member, ranked
from tokred.reducers.dpc_knn import (
    check_number,
    join_nearest,
    samples_at_once,
    squared_distances,
)
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register

_AT_ONCE = 2**18
"""How many pairs of tokens are compared at once on the CPU, so that they fit into the cache."""


@register("kmedoids")
@dataclass(frozen=True)
class KMedoids:
    """Keeps the tokens in the middle of clusters, where tokens with much attention weigh more.

    Stands before the block and compares the tokens themselves. A cluster becomes its medoid, one
    of its tokens, which then stands for all of them.

    Args:
        iterations: how often tokens join medoids and clusters choose new medoids.
        published: see `cluster`.
    """

    iterations: int = 3
    published: bool = False

    place: ClassVar[str] = "before"
    proportional: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"attention_received"})
    bibtex: ClassVar[str] = """@article{marin2021pooling,
  title   = {Token Pooling in Vision Transformers},
  author  = {Marin, Dmitrii and Chang, Jen-Hao Rick and Ranjan, Anurag and Prabhu, Anish and
             Rastegari, Mohammad and Tuzel, Oncel},
  journal = {arXiv preprint arXiv:2110.03860},
  year    = {2021}
}"""

    def __post_init__(self) -> None:
        _check_iterations(self.iterations)

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        weight = tokens.attention_received
        if weight is None:
            raise ValueError(
                "K-Medoids weighs tokens by the attention they got in the block before, and the "
                f"first block (this is layer {tokens.layer}) has nothing before it: reduce from "
                "layer 1 on, as Stages(keep_rate, layers=(1, 2, 3)) does"
            )
        weight = deciding(weight)
        labels, medoids = cluster(tokens.x, weight, keep, self.iterations, self.published)
        return Clusters(labels, keep, share=torch.zeros_like(tokens.size).scatter(1, medoids, 1.0))


def cluster(
    x: Float[Tensor, "batch tokens dim"],
    weight: Float[Tensor, "batch tokens"],
    num_clusters: int,
    iterations: int = 3,
    published: bool = False,
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch clusters"]]:
    """Clusters every sample around some of its tokens; returns the cluster of every token, and
    the medoid of every cluster.

    The tokens with the highest weights are the first medoids. `iterations` times, every token
    joins its nearest medoid, and every cluster chooses the member with the least weighted sum of
    distances to all members. Finally every token joins its nearest medoid. Clusters are numbered
    in the order of their first tokens. Ties go to the lower index.

    Args:
        x: what tokens are compared by, in any floating-point dtype; see
            `tokred.reducers.dpc_knn.squared_distances`.
        weight: how much each token counts, at least 0.
        num_clusters: in [1, tokens].
        iterations: at least 0.
        published: choose the member for which its own weight times the sum of its distances to
            all tokens of the sample is least.

    Raises:
        ValueError: `num_clusters` or `iterations` is out of range.
    """
    num = x.shape[1]
    check_number(num_clusters, num)
    _check_iterations(iterations)
    at_once = samples_at_once(num)
    if x.device.type == "cpu" and not recorded(x):  # what fits into the cache
        at_once = min(at_once, max(1, _AT_ONCE // num**2))
    parts = [
        _cluster(some, their_weight, num_clusters, iterations, published)
        for some, their_weight in zip(x.split(at_once), weight.split(at_once), strict=True)
    ]
    return torch.cat([labels for labels, _ in parts]), torch.cat([medoids for _, medoids in parts])


def _cluster(
    x: Float[Tensor, "batch tokens dim"],
    weight: Float[Tensor, "batch tokens"],
    num_clusters: int,
    iterations: int,
    published: bool,
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch clusters"]]:
    distance = squared_distances(x).sqrt_()
    heaviest = ranked(weight)[:, :num_clusters]
    medoids = heaviest.sort(-1).values
    everywhere = weight * distance.sum(-1)
    for _ in range(iterations):
        label = join_nearest(distance, medoids)
        cost = everywhere if published else _sum_in_cluster(distance, weight, label)
        medoids = _cheapest(cost, label, num_clusters).sort(-1).values

    label = join_nearest(distance, medoids)
    in_order = in_order_of_first_member(label)
    return in_order, torch.empty_like(medoids).scatter(1, in_order.gather(1, medoids), medoids)


def _sum_in_cluster(
    distance: Float[Tensor, "batch tokens tokens"],
    weight: Float[Tensor, "batch tokens"],
    label: Int[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """For each token, the sum of the distances to the members of its cluster, by their weights."""
    batch, num = label.shape
    rows = num if recorded(distance) else max(1, _AT_ONCE // max(1, batch * num))
    sums = []
    for some, own in zip(distance.split(rows, 1), label.split(rows, 1), strict=True):
        together = own[:, :, None] == label[:, None, :]
        sums.append((some * weight[:, None, :]).where(together, 0).sum(-1))
    return torch.cat(sums, 1)


def _cheapest(
    cost: Float[Tensor, "batch tokens"], label: Int[Tensor, "batch tokens"], num_clusters: int
) -> Int[Tensor, "batch clusters"]:
    """The member of each cluster with the least cost; of equals, the first."""
    batch, num = cost.shape
    least = cost.new_full((batch, num_clusters), torch.inf).scatter_reduce(1, label, cost, "amin")
    # Not `cost == least`: where a cost is NaN, no member would be left.
    dearer = cost > least.gather(1, label)
    position = torch.arange(num, device=cost.device).masked_fill(dearer, num)
    first = label.new_full((batch, num_clusters), num)
    return first.scatter_reduce(1, label, position, "amin")


def _check_iterations(iterations: int) -> None:
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, not {iterations}")
