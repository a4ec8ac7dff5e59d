"""Token merging by bipartite soft matching.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, https://arxiv.org/abs/2210.09461,
section 3. Every second token proposes its most similar neighbour among the others; the most
similar proposals merge. Differs from the published code in that all prefix tokens are left alone
(there: the first one or two), and in that more than half of the tokens can go, in rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokred.graphs import in_a_graph, is_native
from tokred.maps import Clusters, deciding, in_order_of_first_member, ranked
from tokred.reducers.protocol import ADDED, Tokens, brief
from tokred.reducers.registry import register

_MOST_PRODUCTS = 2**23
"""Multiply-adds of one matching in one image; where more are needed, the matrix product of a
library is faster than ours."""


@register("tome")
@dataclass(frozen=True)
class ToMe:
    """Merges the most similar pairs of tokens, between two halves of the sequence.

    Tokens are compared by the cosine of their keys, averaged over heads (table 1a). One matching
    removes half of the tokens at most; if more must go, the merged tokens are matched again.

    Args:
        threshold: if given, only pairs at least this similar merge, in [-1, 1]. Then an image
            keeps at least as many tokens as the schedule says, and more if its tokens are less
            alike. Other images of the batch make no difference. Runs eagerly: the number of tokens
            depends on the image.
        weighted: whether the mean of a group weighs its members by the number of original tokens
            that they stand for, or all alike.
    """

    threshold: float | None = None
    weighted: bool = field(default=True, metadata=ADDED)

    needs: ClassVar[frozenset[str]] = frozenset({"key"})
    bibtex: ClassVar[str] = """@inproceedings{bolya2023tome,
  title     = {Token Merging: Your {ViT} But Faster},
  author    = {Bolya, Daniel and Fu, Cheng-Yang and Dai, Xiaoliang and Zhang, Peizhao and
               Feichtenhofer, Christoph and Hoffman, Judy},
  booktitle = {International Conference on Learning Representations},
  year      = {2023}
}"""

    __repr__ = brief

    def __post_init__(self) -> None:
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(
                f"threshold must be a cosine similarity in [-1, 1], not {self.threshold!r}"
            )

    @property
    def varies(self) -> bool:
        """Whether images end with different numbers of tokens."""
        return self.threshold is not None

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        counted = tokens.size if self.weighted else (tokens.size > 0).to(tokens.size.dtype)
        clusters = self._groups(tokens, counted, keep)
        return clusters if self.weighted else clusters.alike(tokens.size)

    def _groups(self, tokens: Tokens, size: Float[Tensor, "batch tokens"], keep: int) -> Clusters:
        """Who merges, where each token counts as `size` says."""
        assert tokens.key is not None
        if self.threshold is None and _at_once(tokens.key):
            return Clusters(_kernels().match(tokens.key, keep, tokens.before, size), keep)
        metric = mean_over_heads(tokens.key)
        if self.threshold is not None:
            return _while_similar(metric, size, keep, tokens.before, self.threshold)
        clusters = once = _halve_at_most(metric, keep, tokens.before)
        while clusters.num_coarse > keep:
            metric, size = once.down(metric, size), once.total(size)
            once = _halve_at_most(metric, keep, tokens.before)
            clusters = clusters.then(once)
        return clusters


@cache  # in every pass, finding it takes longer than looking it up
def _kernels() -> ModuleType:
    """Kernels for the CPU, imported when they are used: numba takes long to import."""
    from tokred.kernels import matching_numba

    return matching_numba


def _at_once(key: Float[Tensor, "batch heads tokens head_dim"]) -> bool:
    """Whether one kernel does the whole matching: where it can, and the products are few."""
    _, _, num, dim = key.shape
    return num > 1 and num * num * dim // 4 <= _MOST_PRODUCTS and is_native(key)


def match(
    metric: Float[Tensor, "batch tokens dim"], merges: int, before: int = 0
) -> Int[Tensor, "batch tokens"]:
    """Merges the `merges` strongest proposals; returns the group of every token.

    Groups are numbered in the order of their first tokens. Ties go to the lower index.

    Args:
        metric: what tokens are compared by; need not be normalised. A row of zeros is as far
            from every token as an orthogonal one.
        merges: how many tokens to remove, in [0, tokens // 2].
        before: how many prefix tokens stand in front; sets A and B alternate from the first of
            those on.

    Raises:
        ValueError: `merges` is out of range.
    """
    num = metric.shape[1]
    if not 0 <= merges <= num // 2:
        raise ValueError(
            f"ToMe removes between 0 and {num // 2} of {num} tokens at a time, not "
            f"{merges}: at most half of them can find a partner"
        )
    position = torch.arange(num, device=metric.device)
    if merges == 0:
        return position.repeat(metric.shape[0], 1)

    # Step 1: even positions of the sequence are set A, odd ones set B.
    even, odd = before % 2, 1 - before % 2
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    a, b = unit[:, even::2], unit[:, odd::2]

    # Steps 2 and 3: every token of A draws an edge to its most similar token of B; the `merges`
    # strongest edges are kept. `max` takes the first of equals, and so does a stable sort.
    similarity, partner = best(a, b)
    if is_native(similarity):
        label: Tensor = _kernels().strongest(similarity, partner, merges, even, num)
        return label
    strongest = ranked(similarity)[:, :merges]

    # Steps 4 and 5: what is joined by an edge becomes one group, named by its token of B.
    label = position.repeat(metric.shape[0], 1)
    joined = odd + 2 * partner.gather(1, strongest)
    return in_order_of_first_member(label.scatter(1, even + 2 * strongest, joined))


def match_similar(
    metric: Float[Tensor, "batch tokens dim"],
    valid: Bool[Tensor, "batch tokens"],
    most: Int[Tensor, " batch"],
    threshold: float,
    before: int = 0,
) -> Clusters:
    """Merges the strongest proposals whose similarity is at least `threshold`. Their number differs
    between samples, so the map is ragged.

    Args:
        metric: what tokens are compared by; need not be normalised.
        valid: False for padding, at the end of a sample, which takes no part.
        most: the largest number of tokens that each sample may lose.
        threshold: the least cosine similarity of a pair.
        before: how many prefix tokens stand in front; see `match`.
    """
    batch, num = valid.shape
    label = torch.arange(num, device=metric.device).repeat(batch, 1)
    if num > 1:
        even, odd = before % 2, 1 - before % 2
        unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
        similarity, partner = best(unit[:, even::2], unit[:, odd::2], valid[:, odd::2])
        similarity = similarity.masked_fill(~valid[:, even::2], -torch.inf)
        strongest, order = similarity.sort(dim=-1, descending=True, stable=True)
        merges = strongest >= threshold
        merges &= torch.arange(order.shape[1], device=order.device) < most[:, None]
        joined = torch.where(merges, odd + 2 * partner.gather(1, order), even + 2 * order)
        label = label.scatter(1, even + 2 * order, joined)
    # Padding joins the first token. It has size 0, so it does not change it.
    label = in_order_of_first_member(torch.where(valid, label, label[:, :1]))
    groups = int(label.max()) + 1 if batch > 0 else num
    return Clusters(label, groups, ragged=True)


def _while_similar(
    metric: Float[Tensor, "batch tokens dim"],
    size: Float[Tensor, "batch tokens"],
    keep: int,
    before: int,
    threshold: float,
) -> Clusters:
    labels = torch.arange(size.shape[1], device=size.device).repeat(size.shape[0], 1)
    clusters = Clusters(labels, size.shape[1], ragged=True)
    while True:
        most = ((size > 0).sum(1) - keep).clamp(min=0)
        once = match_similar(metric, size > 0, most, threshold, before)
        clusters = clusters.then(once)
        merged = once.total(size)
        if bool(((size > 0).sum(1) == (merged > 0).sum(1)).all()):
            return clusters
        metric, size = once.down(metric, size), merged


def _halve_at_most(metric: Float[Tensor, "batch tokens dim"], keep: int, before: int) -> Clusters:
    num = metric.shape[1]
    merges = min(num - keep, num // 2)
    return Clusters(match(metric, merges, before), num - merges)


def mean_over_heads(
    key: Float[Tensor, "batch heads tokens head_dim"],
) -> Float[Tensor, "batch tokens head_dim"]:
    """What ToMe and ATC compare tokens by, at least float32 (float16 sums can overflow)."""
    return key.mean(1, dtype=torch.promote_types(key.dtype, torch.float32))


def best(
    a: Float[Tensor, "batch a dim"],
    b: Float[Tensor, "batch b dim"],
    valid: Bool[Tensor, "batch b"] | None = None,
    elements: int | None = None,
) -> tuple[Float[Tensor, "batch a"], Int[Tensor, "batch a"]]:
    """For every row of a, its highest inner product with a (valid) row of b, in float32, and the
    index of that row.

    Only the maxima are needed, so at most about `elements` products are held at once. On the CPU,
    the default is what fits into the cache.
    """
    rows = a.shape[1]
    if elements is None:
        elements = 2**20 if a.device.type == "cpu" else 2**26
    if not in_a_graph(a):  # there the batch may be a symbol, not a number
        rows = max(1, elements // max(1, a.shape[0] * b.shape[1]))
    invalid = None if valid is None else ~valid[:, None]
    parts = []
    for part in a.split(rows, dim=1):
        similarity = deciding(part @ b.transpose(1, 2))
        if invalid is not None:
            similarity.masked_fill_(invalid, -torch.inf)
        parts.append(similarity.max(-1))
    if len(parts) == 1:
        return parts[0].values, parts[0].indices
    return torch.cat([p.values for p in parts], 1), torch.cat([p.indices for p in parts], 1)
