"""Maps between many tokens and few: what every reduction method returns.

A map has two directions, named for what happens to the number of tokens:

    down   [batch, fine, dim]   -> [batch, coarse, dim]
    up     [batch, coarse, dim] -> [batch, fine, dim]

Maps know nothing of models, layers or methods. Prefix tokens (class, distillation, register
tokens) are kept out of them; see `tokred.engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.torch_version import TorchVersion

from tokred.graphs import in_a_graph, recorded

# Code that torch 2.6 generates for CPUs stores rows where it should add them (index_add and
# scatter_add alike). 2.15 does not; which version was the first is not known.
_ADDS_WRONGLY = TorchVersion(torch.__version__) < "2.15"


@runtime_checkable
class TokenMap(Protocol):
    """The two directions, and what became of every token.

    Attributes:
        merges: whether coarse tokens stand for several fine ones. If so, `total` adds sizes up
            and `up` needs no stale tokens; if not, sizes stay and `up` needs them.
        num_coarse: how many tokens there are after `down`. Where samples differ, the most that
            any of them has: the others are padded at the end, and padding has size 0.
        ragged: whether samples differ in their number of tokens.
    """

    merges: ClassVar[bool]

    @property
    def num_coarse(self) -> int: ...

    @property
    def ragged(self) -> bool: ...

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        """Few tokens from many. `size` is how many original tokens each fine one stands for."""
        ...

    def up(
        self, y: Float[Tensor, "batch coarse dim"], stale: Float[Tensor, "batch fine dim"] | None
    ) -> Float[Tensor, "batch fine dim"]:
        """Many tokens from few. `stale` is what the fine tokens were before `down`."""
        ...

    def total(self, size: Float[Tensor, "batch fine"]) -> Float[Tensor, "batch coarse"]:
        """How many original tokens each coarse token stands for; 0 for padding."""
        ...

    def labels(self) -> Int[Tensor, "batch fine"]:
        """The coarse token that each fine token went into; -1 for a token that was dropped."""
        ...

    def representatives(self) -> Int[Tensor, "batch coarse"]:
        """For each coarse token, the fine token whose place it takes: its first member. (For
        padding, any token.)"""
        ...


@dataclass(frozen=True)
class Clusters:
    """Merging: every fine token joins exactly one coarse token.

    Attributes:
        index: `index[b, n]` is the coarse token that fine token `n` of sample `b` joins. Every
            coarse token has at least one member, unless the map is ragged. Padding joins any.
        share: the part of each fine token that goes into its coarse one; those of a coarse token
            add up to 1. If not given, every member counts as often as the tokens it stands for.
        ragged: whether some samples have fewer coarse tokens: those from the first without a
            member on are padding.
    """

    merges: ClassVar[bool] = True

    index: Int[Tensor, "batch fine"]
    num_coarse: int
    share: Float[Tensor, "batch fine"] | None = None
    ragged: bool = False

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        """The mean of the members, each counted by its share.

        Sums are float32 even where x is float16 or bfloat16: a large cluster would otherwise
        lose its smaller members to rounding.
        """
        share = self.share
        if share is None:
            share = size / self.total(size).gather(1, self.index)
        if x.device.type == "cpu" and not x.requires_grad and not recorded(x):
            return self._sum_in_bags(x, share)
        if _ADDS_WRONGLY and x.device.type == "cpu" and in_a_graph(x):
            return self._sum_by_product(x, share)
        weighted = x * share[..., None].to(torch.promote_types(x.dtype, torch.float32))
        out = weighted.new_zeros(x.shape[0] * self.num_coarse, x.shape[2])
        rows = _rows(self.index, self.num_coarse)
        # Whole rows at once: about twice as fast as an expanded scatter_add.
        out = out.index_add_(0, rows, weighted.flatten(0, 1))
        return out.view(x.shape[0], self.num_coarse, x.shape[2]).to(x.dtype)

    def _sum_in_bags(
        self, x: Float[Tensor, "batch fine dim"], share: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        """The same sums on the CPU, up to 2.5 times as fast in float32 and up to 20 times as fast
        in bfloat16."""
        batch, fine, _ = x.shape
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        by_group = self.index.argsort(dim=1, stable=True)
        rows = _rows(self.index, self.num_coarse)
        members = rows.bincount(minlength=batch * self.num_coarse)
        sums = F.embedding_bag(
            _rows(by_group, fine),
            wide.flatten(0, 1),
            members.cumsum(0) - members,
            mode="sum",
            per_sample_weights=share.gather(1, by_group).flatten().to(wide.dtype),
        )
        return sums.view(batch, self.num_coarse, x.shape[2]).to(x.dtype)

    def _sum_by_product(
        self, x: Float[Tensor, "batch fine dim"], share: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        """The same sums as a matrix product, without additions in place."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        coarse = torch.arange(self.num_coarse, device=x.device)
        member = self.index[:, None, :] == coarse[:, None]
        return ((member * share[:, None, :]).to(wide.dtype) @ wide).to(x.dtype)

    def up(
        self,
        y: Float[Tensor, "batch coarse dim"],
        stale: Float[Tensor, "batch fine dim"] | None = None,
    ) -> Float[Tensor, "batch fine dim"]:
        """Every member gets a copy of its coarse token."""
        return take(y, self.index)

    def total(self, size: Float[Tensor, "batch fine"]) -> Float[Tensor, "batch coarse"]:
        out = size.new_zeros(size.shape[0], self.num_coarse)
        return out.scatter_add_(1, self.index, size)

    def labels(self) -> Int[Tensor, "batch fine"]:
        return self.index

    def representatives(self) -> Int[Tensor, "batch coarse"]:
        last = self.index.shape[1] - 1
        first = self.index.new_full((self.index.shape[0], self.num_coarse), last)
        position = torch.arange(last + 1, device=self.index.device).expand_as(self.index)
        return first.scatter_reduce(1, self.index, position, "amin")

    def alike(self, size: Float[Tensor, "batch fine"]) -> Clusters:
        """The same clusters, in whose means all members count alike, however many tokens they stand
        for. `size` tells which of them are padding (0), and count for nothing."""
        there = (size > 0).to(size.dtype)
        share = there / self.total(there).clamp(min=1).gather(1, self.index)
        return Clusters(self.index, self.num_coarse, share, self.ragged)

    def then(self, other: Clusters) -> Clusters:
        """This map, and then `other`, as one map (without shares)."""
        index = other.index.gather(1, self.index)
        return Clusters(index, other.num_coarse, ragged=other.ragged)


@dataclass(frozen=True)
class Kept:
    """Pruning: some fine tokens go on, the others stay behind.

    Attributes:
        index: `index[b, m]` is the fine token that coarse token `m` of sample `b` is; rising.
        counts: the number of tokens that each sample keeps, if samples differ: that many entries at
            the start of its row of `index` are kept, the others are padding. (Best, the first of
            them again, see `kept_where`.)
    """

    merges: ClassVar[bool] = False

    index: Int[Tensor, "batch coarse"]
    num_fine: int
    counts: Int[Tensor, " batch"] | None = None

    @property
    def num_coarse(self) -> int:
        return self.index.shape[1]

    @property
    def ragged(self) -> bool:
        return self.counts is not None

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        return take(x, self.index)

    def up(
        self, y: Float[Tensor, "batch coarse dim"], stale: Float[Tensor, "batch fine dim"] | None
    ) -> Float[Tensor, "batch fine dim"]:
        """Kept tokens are renewed; the others stay what they were when they were dropped."""
        if stale is None:
            raise ValueError("stale is needed: the tokens that were dropped are not in y")
        if self.num_coarse == 0:
            return stale
        if self.counts is not None:
            labels = self.labels()
            return torch.where(labels[..., None] >= 0, take(y, labels.clamp(min=0)), stale)
        rows = _rows(self.index, self.num_fine)
        return stale.flatten(0, 1).index_copy(0, rows, y.flatten(0, 1)).view_as(stale)

    def total(self, size: Float[Tensor, "batch fine"]) -> Float[Tensor, "batch coarse"]:
        total = size.gather(1, self.index)
        return total if self.counts is None else total * self._meant()

    def labels(self) -> Int[Tensor, "batch fine"]:
        # One more column, which padding is written to.
        none = self.index.new_full((self.index.shape[0], self.num_fine + 1), -1)
        number = torch.arange(self.num_coarse, device=self.index.device)
        index = self.index
        if self.counts is not None:
            index = torch.where(self._meant(), index, self.num_fine)
        return none.scatter(1, index, number.expand_as(index))[:, :-1]

    def representatives(self) -> Int[Tensor, "batch coarse"]:
        return self.index

    def _meant(self) -> Bool[Tensor, "batch coarse"]:
        assert self.counts is not None
        return torch.arange(self.num_coarse, device=self.index.device) < self.counts[:, None]


@dataclass(frozen=True)
class Weighted:
    """Reconstruction: `down` is that of another map, `up` makes each token of several coarse ones.

    Attributes:
        coarse: the other map.
        index: the coarse tokens that each fine token is made of, for each sample or one for all.
        weight: their weights; those of a fine token add up to 1.
    """

    merges: ClassVar[bool] = True

    coarse: TokenMap
    index: Int[Tensor, "batch_or_1 fine nearest"]
    weight: Float[Tensor, "batch_or_1 fine nearest"]

    @property
    def num_coarse(self) -> int:
        return self.coarse.num_coarse

    @property
    def ragged(self) -> bool:
        return self.coarse.ragged

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        return self.coarse.down(x, size)

    def up(
        self,
        y: Float[Tensor, "batch coarse dim"],
        stale: Float[Tensor, "batch fine dim"] | None = None,
    ) -> Float[Tensor, "batch fine dim"]:
        return blend(y, self.index, self.weight)

    def total(self, size: Float[Tensor, "batch fine"]) -> Float[Tensor, "batch coarse"]:
        return self.coarse.total(size)

    def labels(self) -> Int[Tensor, "batch fine"]:
        return self.coarse.labels()

    def representatives(self) -> Int[Tensor, "batch coarse"]:
        return self.coarse.representatives()


def side_by_side(
    parts: Sequence[tuple[Int[Tensor, " _rows"], Int[Tensor, "_rows _tokens"], TokenMap | None]],
    size: Float[Tensor, "batch fine"],
) -> TokenMap:
    """One map for a batch, from maps for parts of it.

    Args:
        parts: groups of samples with the same number of tokens. Of each group: the samples; the
            tokens of each sample that are no padding, in rising order; and the map of those tokens,
            None if they stay as they are.
        size: how many original tokens each fine one stands for; 0 for padding.

    Raises:
        TypeError: the maps are neither all `Clusters` nor all `Kept`.
    """
    maps = [part for _, _, part in parts if part is not None]
    if all(isinstance(part, Kept) for part in maps):
        return _kept_side_by_side(parts, size)
    if not all(isinstance(part, Clusters) for part in maps):
        kinds = sorted({type(part).__name__ for part in maps})
        raise TypeError(f"padded images can be mapped by Clusters or by Kept alone, not {kinds}")
    index = torch.zeros_like(size, dtype=torch.long)
    share = torch.zeros_like(size)
    num_coarse = 0
    for rows, columns, part in parts:
        mine = size[rows[:, None], columns]
        if part is None:
            part = Clusters(_counted(columns), columns.shape[1])
        assert isinstance(part, Clusters)
        parted = part.share
        if parted is None:
            parted = mine / part.total(mine).gather(1, part.index)
        index[rows[:, None], columns] = part.index
        share[rows[:, None], columns] = parted.to(share.dtype)
        num_coarse = max(num_coarse, part.num_coarse)
    return Clusters(index, num_coarse, share, ragged=True)


def _kept_side_by_side(
    parts: Sequence[tuple[Int[Tensor, " _rows"], Int[Tensor, "_rows _tokens"], TokenMap | None]],
    size: Float[Tensor, "batch fine"],
) -> Kept:
    batch, num_fine = size.shape
    most = max(part.num_coarse if part else columns.shape[1] for _, columns, part in parts)
    index = torch.zeros(batch, most, dtype=torch.long, device=size.device)
    counts = torch.zeros(batch, dtype=torch.long, device=size.device)
    for rows, columns, part in parts:
        chosen = columns if part is None else columns.gather(1, part.representatives())
        if chosen.shape[1]:
            index[rows] = chosen[:, :1]
        index[rows, : chosen.shape[1]] = chosen
        own = part.counts if isinstance(part, Kept) else None
        counts[rows] = chosen.shape[1] if own is None else own
    return Kept(index, num_fine, counts)


def kept_where(chosen: Bool[Tensor, "batch tokens"]) -> Kept:
    """Keeps the tokens that are chosen, in their order; samples may differ in how many that are.

    Padding is the first of them again, so that it becomes what that one becomes: a token of another
    kind might overflow on the way, and a sample be NaN in a batch that is not alone.
    """
    counts = chosen.sum(1)
    most = int(counts.max()) if len(counts) > 0 else 0
    order = ranked(chosen.int())[:, :most]
    meant = torch.arange(most, device=chosen.device) < counts[:, None]
    return Kept(torch.where(meant, order, order[:, :1]), chosen.shape[1], counts)


def _counted(like: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same in at least float32: squares of float16 overflow, and its long sums are inexact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def deciding(score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Numbers by which something is decided, in float32: float64 has digits in which equal tokens
    differ, because sums are rounded, and not in a batch as they are alone. Without these digits
    they are equal, and the lower index wins."""
    return score.to(torch.float32)


def in_order_of_first_member(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """The same partition, its groups numbered from 0 in the order of their first tokens.

    Args:
        labels: any labels in [0, tokens), with gaps or without.
    """
    position = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = torch.full_like(labels, labels.shape[1])
    first = first.scatter_reduce(1, labels, position, "amin").gather(1, labels)
    number = (first == position).cumsum(1) - 1
    return number.gather(1, first)


def ranked(score: Shaped[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """The tokens of every sample by falling score; of equals the one with the lower index first."""
    if torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort. But this becomes TopK there, which is stable ("the element with
        # the lower index will appear first").
        return score.argsort(dim=-1, descending=True)
    return score.argsort(dim=-1, descending=True, stable=True)


def refuse_onnx(name: str) -> None:
    """Raises where a model is being written as ONNX. For methods that take as many turns as the
    images need, by an operator of ours that ONNX has nothing like.

    Args:
        name: the method.

    Raises:
        RuntimeError: it is.
    """
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"{name} takes as many turns as the images need, by an operator that ONNX does not "
            "have: the table under Export in docs/composition.md says which methods can become ONNX"
        )


def take(
    x: Shaped[Tensor, "batch tokens dim"], index: Int[Tensor, "batch chosen"]
) -> Shaped[Tensor, "batch chosen dim"]:
    """The tokens at `index`, sample by sample; copies whole rows, which `gather` does not."""
    rows = _rows(index, x.shape[1])
    return x.flatten(0, 1).index_select(0, rows).view(x.shape[0], index.shape[1], x.shape[2])


def blend(
    y: Float[Tensor, "batch coarse dim"],
    index: Int[Tensor, "batch_or_1 fine nearest"],
    weight: Float[Tensor, "batch_or_1 fine nearest"],
) -> Float[Tensor, "batch fine dim"]:
    """Weighted sums of the tokens at `index`, computed in float32 at least."""
    batch, (fine, nearest) = y.shape[0], index.shape[1:]
    rows = _rows(index.expand(batch, -1, -1).flatten(1), y.shape[1])
    wide = y.flatten(0, 1).to(torch.promote_types(y.dtype, torch.float32))
    weight = weight.expand(batch, -1, -1).reshape(-1, nearest).to(wide.dtype)
    out = F.embedding_bag(rows.view(-1, nearest), wide, mode="sum", per_sample_weights=weight)
    return out.view(batch, fine, y.shape[2]).to(y.dtype)


def _rows(index: Int[Tensor, "batch tokens"], num: int) -> Int[Tensor, " rows"]:
    """The positions of the tokens at `index` when samples of `num` tokens are laid end to end."""
    offset = torch.arange(index.shape[0], device=index.device)[:, None] * num
    return (index + offset).flatten()
