"""Mutual pairs: merging tokens that are each other's nearest.

Reciprocal nearest neighbours, a classic of hierarchical clustering (Murtagh, "A survey of recent
advances in hierarchical clustering algorithms", The Computer Journal 26(4), 1983), with the cosine
of the keys for similarity and the merged tokens' mean key for the next round. No token is forced
to merge with a token that is closer to a third one, as in bipartite matching.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tokred.maps import Clusters, deciding, in_order_of_first_member, ranked, refuse_onnx
from tokred.reducers.dpc_knn import samples_at_once
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register
from tokred.reducers.tome import mean_over_heads

_AT_ONCE = 2**20
"""How many pairs of tokens are compared at once on the CPU, so that they fit into the cache."""

_ROWS = 256
"""Of how many tokens the nearest are looked for at once."""


@register("mutual")
@dataclass(frozen=True)
class Mutual:
    """Merges the most similar pairs of tokens that are each other's nearest.

    Tokens are compared by the cosine of their keys, averaged over heads. If there are fewer such
    pairs than tokens that must go, the merged tokens are matched again, as often as needed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"key"})
    bibtex: ClassVar[str] = ""

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        assert tokens.key is not None
        return Clusters(match(mean_over_heads(tokens.key), tokens.size, keep), keep)


def match(
    metric: Float[Tensor, "batch tokens dim"],
    size: Float[Tensor, "batch tokens"],
    num_clusters: int,
) -> Int[Tensor, "batch tokens"]:
    """Merges mutual pairs until `num_clusters` groups are left; returns the group of every token.

    In each round, mutual pairs merge, the most similar first, until there are none left or enough
    tokens have gone. A merged token is the mean of the two, weighted by size, in the place of the
    first.
    Groups are numbered in the order of their first tokens. Ties go to the lower index.

    Args:
        metric: what tokens are compared by; need not be normalised. A row of zeros is as far
            from every token as an orthogonal one.
        size: how much each token counts in a mean, above 0.
        num_clusters: in [1, tokens].

    Raises:
        ValueError: `num_clusters` is out of range.
    """
    num = metric.shape[1]
    if not 1 <= num_clusters <= num:
        raise ValueError(f"num_clusters must be in [1, {num}] for {num} tokens, not {num_clusters}")
    labels: Tensor = _match(metric, size, num_clusters)
    return labels


# A custom operator: the number of rounds depends on the tokens, so no graph can hold them.
@torch.library.custom_op(
    "tokred::mutual_pairs",
    mutates_args=(),
    schema="(Tensor metric, Tensor size, int num_clusters) -> Tensor",
)
def _match(metric: Tensor, size: Tensor, num_clusters: int) -> Tensor:
    batch, num, _ = metric.shape
    mean = metric.detach().to(torch.promote_types(metric.dtype, torch.float32))
    size = size.detach().to(mean.dtype)
    label = torch.arange(num, device=metric.device).repeat(batch, 1)
    # Samples need different numbers of rounds: those that have fewer groups left are padded.
    groups = label.new_full((batch,), num)
    most = num if batch > 0 else num_clusters
    while most > num_clusters:
        # The similarities of all samples at once would be more memory than the blocks take.
        at_once = samples_at_once(mean.shape[1], _AT_ONCE if mean.device.type == "cpu" else 2**24)
        parts = zip(mean.split(at_once), groups.split(at_once), strict=True)
        pairs = torch.cat([_merge_once(some, their, num_clusters) for some, their in parts])
        label = pairs.gather(1, label)
        groups = pairs.masked_fill(_padding(pairs, groups), -1).amax(1) + 1
        most = int(groups.max())
        once = Clusters(pairs, mean.shape[1])
        # The mean of padding is 0 / 0, which is never used.
        mean, size = once.down(mean, size)[:, :most], once.total(size)[:, :most]
    return label


@_match.register_fake
def _(metric: Tensor, size: Tensor, num_clusters: int) -> Tensor:
    refuse_onnx("mutual")  # here, where it is asked in whatever way the model is exported
    return metric.new_empty(metric.shape[:2], dtype=torch.int64)


def _merge_once(
    mean: Float[Tensor, "batch slots dim"], groups: Int[Tensor, " batch"], num_clusters: int
) -> Int[Tensor, "batch slots"]:
    """One round: the new group of every group.

    Args:
        mean: what groups are compared by.
        groups: the number of groups in each sample; entries after those are padding, and stay.
        num_clusters: the number of groups to be left at the end.
    """
    padding = _padding(mean[..., 0], groups)
    # NaN becomes 0: it is no more similar to anything than anything else, and so no number of
    # rounds would be enough.
    unit = F.normalize(mean, dim=-1).nan_to_num_()
    similarity = deciding(unit @ unit.transpose(1, 2))
    # A matrix product is not always symmetric to the last bit. Once it is made symmetric, there is
    # always a mutual pair: the two most similar tokens (of equals, the first). Some rows at a time:
    # one matrix of this size is enough.
    best = []
    for start in range(0, mean.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        some = torch.maximum(similarity[:, rows], similarity[:, :, rows].transpose(1, 2))
        some.diagonal(start, 1, 2).fill_(-torch.inf)
        some.masked_fill_(padding[:, None, :] | padding[:, rows, None], -torch.inf)
        best.append(some.max(-1))
    highest = torch.cat([one.values for one in best], 1)
    nearest = torch.cat([one.indices for one in best], 1)

    # The first token of every mutual pair, and the rank of the pair among all pairs.
    position = torch.arange(mean.shape[1], device=mean.device).expand_as(nearest)
    mutual = nearest.gather(1, nearest) == position
    first = mutual & (position < nearest)
    order = ranked(highest.masked_fill(~first, -torch.inf))
    place = torch.empty_like(order).scatter(1, order, position)

    stays = first & (place < groups[:, None] - num_clusters)
    joins = mutual & stays.gather(1, nearest)
    return in_order_of_first_member(nearest.where(joins, position))


def _padding(
    slots: Shaped[Tensor, "batch slots"], groups: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch slots"]:
    """Which slots are padding: those after the groups of a sample."""
    return torch.arange(slots.shape[1], device=slots.device) >= groups[:, None]
