"""Tokens cut off by a slice in the host's own forward: what the free limit is made of.

Nothing of the engine takes part: no state, no step, no hooks. Blocks that do not cut run the host's
own forward, untouched. A block that cuts runs its restated forward (of `patches/`) with a `Cut` in
place of the engine's `Step`: one slice, where a reader would write it by hand. Where blocks are
given something by position (rotary tables, relative position biases), later blocks slice that, too.
Where somebody looks at the full grid, the slices that were cut off are laid back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.engine.layout import Layout
from tokred.host import Denoiser, Host, blocks_of, find_host, forward_of, innermost_slot
from tokred.patching import remove


class NoSliceError(ValueError):
    """A model's own forward cannot be given a slice."""


@dataclass(frozen=True)
class Slices:
    """Where the tokens of a model are cut off, and to how many.

    Attributes:
        layout: how the model lays out its tokens.
        tokens: patch tokens that enter the first layer.
        counts: patch tokens after each layer.
        place: "between" attention and MLP, or "before" the block.
        shown: layers that put out the full grid, for somebody who looks at it.
        tables: whether blocks are given something by position, which has to be sliced as well.
    """

    layout: Layout
    tokens: int
    counts: tuple[int, ...]
    place: str = "between"
    shown: frozenset[int] = frozenset()
    tables: bool = False

    def put_on(self, model: nn.Module, host: Host) -> None:
        """Puts the slices into a model, in place of whatever of ours hangs on it.

        Raises:
            NoSliceError: something is wrapped around a block.
        """
        take_off(model)
        found, tower = find_host(model, host)
        assert isinstance(found, Host)
        aside, made = list[Tensor](), list[Sliced]()
        before = self.tokens
        for layer, (block, after) in enumerate(
            zip(blocks_of(found, tower), self.counts, strict=True)
        ):
            entry = self.place == "before" and after < before
            cut = Cut(
                self.layout.prefix,
                self.layout.suffix,
                self.tokens,
                before=after if entry else max(before, after),
                after=after,
                aside=aside if self._laid_back else None,
                starts=before == self.tokens,
            )
            placed = self.tables and (cut.before < self.tokens or after < self.tokens)
            sliced = Sliced(
                block,
                forward_of(found, block),
                cut,
                own=not (cut.falls or placed),
                entry=entry,
                narrowed=before if layer - 1 in self.shown and before < self.tokens else None,
                raised=after > before,
                shown=layer in self.shown and after < self.tokens,
            )
            if sliced.needed:
                made.append(sliced)
            if placed and not cut.untouched and found.attention and found.attend:
                made.append(Sliced(found.attention(block), found.attend, cut, own=False))
            before = after
        hang_slices(made)

    @property
    def _laid_back(self) -> bool:
        """Whether slices that were cut off are needed again."""
        rises = any(after > before for before, after in pairwise(self.counts))
        return rises or bool(self.shown)


@dataclass(frozen=True)
class ModuleSlices:
    """Which modules of a denoiser run on a slice of their tokens. What they put out is padded with
    zeros, which costs as little as anything that has its size.

    Attributes:
        modules: paths of modules, with the number of tokens that each gets, and whether it is an
            attention.
        keys_only: whether only keys and values are made of a slice.
    """

    modules: tuple[tuple[str, int, bool], ...]
    keys_only: bool

    def put_on(self, model: nn.Module, host: Denoiser) -> None:
        """Puts the slices into a model, in place of whatever of ours hangs on it.

        Raises:
            NoSliceError: something is wrapped around a module.
        """
        take_off(model)
        hang_slices(
            [
                SlicedModule(
                    model.get_submodule(path), few, host.beside if attends else None, self.keys_only
                )
                for path, few, attends in self.modules
            ]
        )


def take_off(model: nn.Module) -> None:
    """Takes off whatever of ours hangs on a model: slices, or a reduction."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Sliced | SlicedModule):
            del vars(module)["forward"]
    remove(model)


def hang_slices(made: Sequence[Sliced | SlicedModule]) -> None:
    """Puts all stand-ins in place of forwards, or none.

    Raises:
        NoSliceError: something is wrapped around a module.
    """
    for one in made:
        where, name = innermost_slot(one.module)
        if where is not vars(one.module) or name != "forward" or name in where:
            raise NoSliceError("something is wrapped around its blocks")
    for one in made:
        vars(one.module)["forward"] = one


@dataclass
class Cut:
    """Stands in for the engine's `Step` in a restated forward: the same tokens, sliced.

    Attributes:
        prefix, suffix: tokens in front of and behind the patch tokens.
        full: patch tokens of the full grid.
        before: patch tokens that attention sees.
        after: patch tokens that leave the block.
        aside: the slices that were cut off so far, if they are needed again.
        starts: whether nothing can have been cut off before this block.
        mask: what was added to the logits of attention; some forwards set it.
    """

    prefix: int
    suffix: int
    full: int
    before: int
    after: int
    aside: list[Tensor] | None = None
    starts: bool = False
    mask: Tensor | None = None

    wants_signals = False
    window = None

    @property
    def falls(self) -> bool:
        """Whether tokens are cut off between attention and MLP."""
        return self.after < self.before

    @property
    def untouched(self) -> bool:
        """Whether attention sees the full grid."""
        return self.before == self.full

    def wants(self, signal: str) -> bool:
        return False

    def see(self, **signals: Tensor) -> None:
        pass

    def attend(self, attention: nn.Module, x: Tensor, heads: int) -> nn.Module:
        return attention

    def bias(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The host's own mask, sliced."""
        return mask if mask is None or self.untouched else self.rows_and_columns(mask)

    def rows_and_columns(self, mask: Tensor) -> Tensor:
        if mask.ndim > 2 and mask.shape[-2] > 1:
            mask = self.leading(mask, -2, self.before)
        return self.leading(mask, -1, self.before)

    def rows(self, table: Tensor) -> Tensor:
        if table.shape[-2] == self.full:
            return table.narrow(-2, 0, self.before)
        return self.leading(table, -2, self.before)

    def rotary(self, rotated: Callable[..., Tensor], *tables: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.rows(table) for table in tables)

    def reduce(self, x: Tensor) -> Tensor:
        """The slice."""
        if not self.falls:
            return x
        return self.sliced(x)

    def sliced(self, x: Tensor) -> Tensor:
        """The first tokens; those behind them are set aside, if they are needed again."""
        if self.aside is not None:
            if self.starts:  # what is left is of the last pass
                self.aside.clear()
            end = x.shape[1] - self.suffix
            self.aside.append(x[:, self.prefix + self.after : end])
        if self.suffix == 0:
            return x[:, : self.prefix + self.after]
        return self.leading(x, 1, self.after)

    def leading(self, x: Tensor, dim: int, patches: int) -> Tensor:
        """The first patch tokens of a sequence along `dim`, and the tokens around them."""
        front = x.narrow(dim, 0, self.prefix + patches)
        if self.suffix == 0:
            return front
        return torch.cat([front, x.narrow(dim, x.shape[dim] - self.suffix, self.suffix)], dim)


@dataclass(eq=False)
class Sliced:
    """Stands in for the forward of a block that cuts, or of its attention.

    Attributes:
        module: the block, or its attention.
        call: its restated forward.
        cut: what it is given in place of a step.
        own: whether the host's own forward is called instead.
        entry: whether tokens are cut off at the entry.
        narrowed: how many patch tokens go on, if the block before has put out the full grid.
        raised: whether slices are laid back at the entry, until there are as many as are to leave.
        shown: whether all slices are laid back at the end.
    """

    module: nn.Module
    call: Callable[..., Any]
    cut: Cut
    own: bool
    entry: bool = False
    narrowed: int | None = None
    raised: bool = False
    shown: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        own = type(self.module).forward
        self.name = list(inspect.signature(own).parameters)[1]

    @property
    def needed(self) -> bool:
        """Whether the host's own forward alone would not do."""
        return not self.own or self.entry or self.narrowed is not None or self.raised or self.shown

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            x, *others = args
        else:
            x, others = kwargs.pop(self.name), []
        if self.narrowed is not None:
            x = self._narrow(x, self.narrowed)
        if self.raised:
            x = self._raise(x)
        if self.entry:
            x = self.cut.sliced(x)
        if self.own:
            y = type(self.module).forward(self.module, x, *others, **kwargs)
        else:
            y = self.call(self.module, self.cut, x, *others, **kwargs)
        if not self.shown:
            return y
        if isinstance(y, tuple):
            return (self._show(y[0]), *y[1:])
        return self._show(y)

    def _narrow(self, x: Tensor, patches: int) -> Tensor:
        """The first tokens of the full grid, which somebody may have changed: so what was cut off
        is taken from it, too."""
        aside, end = self.cut.aside, self.cut.prefix + patches
        assert aside is not None
        for number, part in reversed(list(enumerate(aside))):
            aside[number] = x[:, end : end + part.shape[1]]
            end += part.shape[1]
        return self.cut.leading(x, 1, patches)

    def _raise(self, x: Tensor) -> Tensor:
        """Lays slices back, the last one first, until there are as many tokens as are to leave."""
        parts, cut = list[Tensor](), self.cut
        assert cut.aside is not None
        tokens = x.shape[1] - cut.prefix - cut.suffix
        while tokens < cut.after:
            parts.append(cut.aside.pop())
            tokens += parts[-1].shape[1]
        return self._laid_back(x, parts)

    def _show(self, x: Tensor) -> Tensor:
        assert self.cut.aside is not None
        return self._laid_back(x, self.cut.aside[::-1])

    def _laid_back(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        end = x.shape[1] - self.cut.suffix
        return torch.cat([x[:, :end], *parts, x[:, end:]], 1)


@dataclass(eq=False)
class SlicedModule:
    """Stands in for the forward of a module of a denoiser.

    Attributes:
        module: the module.
        few: how many tokens it gets.
        beside: of an attention: makes what it is called with beside its tokens, see `Denoiser`.
        keys_only: whether only keys and values are made of few tokens.
    """

    module: nn.Module
    few: int
    beside: Callable[..., dict[str, Any]] | None
    keys_only: bool

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward, x = type(self.module).forward, hidden_states
        if self.keys_only:
            kwargs["encoder_hidden_states"] = self._sliced(x)
            return forward(self.module, x, **kwargs)
        if self.beside is not None:
            kwargs.update(zip(("encoder_hidden_states", "attention_mask"), args, strict=False))
            args, kwargs = (), self.beside(self.module, x, kwargs, self._sliced)
        out = forward(self.module, self._sliced(x), *args, **kwargs)
        return F.pad(out, (0, 0, 0, x.shape[1] - self.few))

    def _sliced(self, x: Tensor) -> Tensor:
        return x[:, : self.few]
