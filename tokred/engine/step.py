"""One run of one patched block: the seam between the engine and a host."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokred.engine import gated, passing
from tokred.engine.attention import added, explicit_is_faster, mean_attention, queries_by_keys
from tokred.engine.observing import Record
from tokred.engine.pooling import check_training, needed_for_pooling, needs_to_know
from tokred.engine.reduction import Reduction
from tokred.engine.sequence import descend, expand, fewer, ones, up
from tokred.engine.state import Reduced, State, quickly, unrolled
from tokred.engine.without_mask import knowing_sizes
from tokred.graphs import compiling, tracing
from tokred.kernels.varlen import NotPerImageError
from tokred.maps import TokenMap, Weighted, ranked, side_by_side, take
from tokred.reducers.protocol import Tokens, check_map


@dataclass
class Step:
    """One run of one patched block. What a patch may call: `bias`, `rows_and_columns`, `rows`,
    `rotary`, `attend`, `see`, `wants`, `grid_of`, `window`, `reduce`.

    Attributes:
        reduction: what is applied.
        layer: the block, from 0.
        scale: what attention multiplies its logits by; None for one by the square root of the
            width of a head.
        state: what the tokens stand for, now.
        explicit: the block's attention, computed the host's other way; None if it has none.
        gate: of a learned method, its module for this block.
        masked: whether a learned method hides tokens rather than drops them, for training.
        signals: what was read off the block so far, by name.
        mask: what was added to the logits of attention.
        rotate: how attention rotates queries and keys before it compares them.
        flat: whether the tokens of all images are laid end to end, as one sequence.
        entered: in the masked form, the tokens that entered the block, and the mask.
    """

    reduction: Reduction
    layer: int
    scale: float | None
    state: State
    explicit: nn.Module | None = None
    gate: nn.Module | None = None
    masked: bool = False
    signals: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    flat: bool = False
    entered: tuple[Tensor, Tensor] | None = None

    # What a patch may call

    @property
    def untouched(self) -> bool:
        """Whether all tokens are there and may be seen, so that the host's own mask will do."""
        return self.state.trail is None and self.entered is None

    @property
    def wants_signals(self) -> bool:
        """Whether something is read off this block: the method stands in it and is going to
        reduce, or before the next block, and is going to reduce there."""
        found, ahead = self.reduction.traits, self.state.ahead
        if not found.needs or ahead is None:
            return False
        if found.place == "before":
            return ahead.rest is not None and self.state.falls(ahead.rest)
        return self.state.falls(ahead)

    def wants(self, signal: str) -> bool:
        """Whether the method needs this signal ("key", "query", "value") of this block."""
        needs = self.reduction.traits.needs
        wanted = signal in needs
        if signal in ("key", "query"):
            wanted = wanted or bool(needs & {"class_attention", "attention_received"})
        return wanted and self.wants_signals

    def see(self, **signals: Tensor) -> None:
        """For attention that is restated: shows the "key", "query" or "value" that it computes,
        [batch, heads, tokens, head_dim]."""
        if self.wants_signals:
            self.signals.update(signals)

    def bias(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """What to add to the logits of attention: the host's own mask, for the tokens that are
        left; and, where attention is proportional, the logarithm of how many tokens each key
        stands for (ToMe, equation 1). None if there is neither.

        Args:
            x: the tokens; what is returned has their dtype.
            mask: the host's mask or bias of the full sequence, bool (True: may be seen) or added
                to the logits: [batch or 1, heads or 1, tokens or 1, tokens], or without the batch;
                or [batch, tokens] that says which tokens are there.

        Raises:
            ValueError: the mask is of another kind.
        """
        if self.flat:
            if mask is not None:
                raise NotPerImageError
            return None
        if self.untouched:
            return self._bias(x, mask)
        with self.reduction.part("bias"):
            return knowing_sizes(self.reduction, self.state, self._bias(x, mask), mask)

    def rows_and_columns(self, mask: Tensor) -> Tensor:
        """A mask over the full sequence, re-indexed for the tokens that are left; itself as long
        as all are.

        Raises:
            ValueError: it is no mask over the full sequence.
        """
        layout, state = self.reduction.layout, self.state
        if mask.ndim == 3:
            mask = mask[None]
        full = state.full + layout.others
        if mask.ndim != 4 or mask.shape[3] != full or mask.shape[2] not in (1, full):
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} cannot be used while tokens are reduced: "
                f"[batch, heads, {full} or 1, {full}] is expected, for the full grid of "
                f"{state.full} patches and {layout.others} other tokens"
            )
        at = self._sequence()
        if at is None:
            return mask
        mask = mask.expand(at.shape[0], -1, -1, -1)
        mask = mask.gather(3, at[:, None, None].expand(-1, *mask.shape[1:3], -1))
        if mask.shape[2] == full:
            mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return mask

    def rows(
        self, table: Float[Tensor, "*lead positions dim"]
    ) -> Float[Tensor, "*lead tokens dim"] | Float[Tensor, "batch heads tokens dim"]:
        """A table with a row for every position (rotary embeddings), for the tokens that are left;
        itself as long as all are.

        A merged token takes the place of its first member.

        Args:
            table: [positions, dim], [heads, positions, dim] or [batch, heads, positions, dim], of
                the patch tokens or of the whole sequence.

        Returns:
            [batch, 1 or heads, tokens, dim], of the patch tokens or the whole sequence.

        Raises:
            ValueError: the table is neither for the patch tokens nor for the whole sequence.
        """
        if self.state.trail is None:
            return self._rows(table)
        with self.reduction.part("bias"):
            return self._rows(table)

    def rotary(
        self, rotated: Callable[..., Tensor], *tables: Float[Tensor, "*lead positions dim"]
    ) -> tuple[Tensor, ...]:
        """Rotary tables for the tokens that are left (see `rows`). A method that looks at attention
        gets queries and keys rotated by them.

        Args:
            rotated: `rotated(heads, *tables)`: how attention rotates queries or keys, [batch,
                heads, tokens, head_dim].
            tables: what it rotates by.
        """
        left = tuple(self.rows(table) for table in tables)
        if self.wants_signals:
            self.rotate = lambda heads: rotated(heads, *left)
        return left

    def attend(
        self, attention: nn.Module, x: Float[Tensor, "batch tokens dim"], heads: int
    ) -> nn.Module:
        """The attention to call on `x`: the host's, or the same one computed the other way."""
        if self.explicit is not None and not self.flat and explicit_is_faster(x, heads):
            return self.explicit
        return attention

    def grid_of(self, x: Float[Tensor, "batch tokens dim"]) -> tuple[int, int]:
        """Rows and columns of the tokens of this block, reduced or on the full grid."""
        grids = [self.state.grid, *(reduced.grid for reduced in unrolled(self.state.trail))]
        return next(grid for grid in grids if grid and grid[0] * grid[1] == x.shape[1])

    @property
    def window(self) -> tuple[int, int] | None:
        """Rows and columns of the windows in which this block is to attend; None for its own."""
        return None if self.state.trail is None else self.reduction.windows

    def reduce(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch kept dim"]:
        """Between attention and MLP: as many tokens as the schedule asks for at this layer, if
        that is where the method stands."""
        if self.reduction.traits.place == "between":
            return self._change(x)
        self._receive()
        return x

    # What a stand-in for the block calls

    def hand_out(self) -> None:
        """Says that what this block puts out is going to be seen, on the full grid."""
        ahead = self.state.ahead
        assert ahead is not None
        shown = type(ahead)(ahead.keep, True, ahead.left, ahead.rest, ahead.each)
        self.state = self.state.but(ahead=shown)

    @property
    def last(self) -> bool:
        """Whether this block is the last one."""
        return self.state.ahead is not None and self.state.ahead.rest is None

    def open(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch kept dim"]:
        """Before the block: reduced tokens again, if they were expanded for somebody to see; more,
        if the schedule has them rise; and fewer still, if that is where the method stands."""
        state = self.state
        assert state.ahead is not None
        rises = state.trail is not None and state.ahead.keep > state.trail.asked
        whole = rises and state.ahead.keep == state.full  # it goes on as it is
        if state.expanded and state.trail is not None and not whole:
            with self.reduction.part("back"):
                x, self.state = descend(self.reduction.layout, x, state)
        if rises:
            with self.reduction.part("back"):
                x = self._rise(x, state.ahead.keep)
        if self.masked:
            return gated.hide(self, x)
        return self._change(x) if self.reduction.traits.place == "before" else x

    def pass_by(self, output: Any) -> Any:
        """After a block in which there was nothing to do, see `passing_by`: what it returns."""
        reduction, state = self.reduction, self.state
        assert state.ahead is not None
        here, x = reduction.memory.here, output[0] if isinstance(output, tuple) else output
        here.step, here.state, here.last = None, state.but(ahead=state.ahead.rest), x
        reduction.memory.ride(x, here.state)
        return output

    def close(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch out dim"]:
        """After the block: the full grid, if somebody is going to see it."""
        if self.entered is not None:
            x = gated.unhide(self, x)
        reduction, state = self.reduction, self.state
        ahead = state.ahead
        assert ahead is not None
        if ahead.rest is not None and not ahead.tapped:  # nobody is going to see it
            reduction.memory.here.step = None
            passing.carry(reduction, x, state.but(ahead=ahead.rest))
            return x
        last = ahead.rest is None
        averaged = last and reduction.averages and self._pools_what_is_left()
        averaged = averaged and not (ahead.tapped and reduction.trims)
        full = ahead.tapped or (last and (reduction.full_grid or reduction.averages))
        if full and not averaged:
            aside = None if last or state.exact else x
            if not state.expanded and state.trail is not None:
                with self.reduction.part("back"):
                    x = expand(reduction.layout, x, state)
            state = state.but(expanded=True, aside=aside)
        elif last and state.ragged:
            assert state.size is not None
            x = x.masked_fill(self.around(state.size == 0, False)[..., None], 0)
        reduction.memory.here.step = None  # what was read off its submodules is let go
        state = state.but(ahead=ahead.rest)
        if not last:
            passing.carry(reduction, x, state)
            return x
        passing.forget(reduction)
        if reduction.observer is not None:
            reduction.observer.ends()
        if needs_to_know(reduction) or needed_for_pooling(state):
            passing.carry(reduction, x, state.without_stale())
            if reduction.trims and state.expanded:
                # The model is going to average it, whatever it passes on the way.
                passing.remember(reduction, state.without_stale())
        return x

    def _pools_what_is_left(self) -> bool:
        """Whether the model, which averages what leaves this block, must get the tokens that are
        left rather than the full grid: some were dropped.

        Raises:
            ValueError: it would average tokens that should not be there.
        """
        reduction, state = self.reduction, self.state
        check_training(reduction, state)
        if state.prunes and state.ragged:
            raise ValueError(
                f"{reduction.reducer} keeps different numbers of tokens in different images, and "
                "this model averages its tokens without a mask: use a method that merges, or "
                "images one by one"
            )
        return state.prunes

    # The work

    def around(
        self, x: Float[Tensor, "batch patches"], value: float | bool
    ) -> Float[Tensor, "batch tokens"]:
        """Numbers of the patch tokens, and one for all others."""
        layout = self.reduction.layout
        return F.pad(x, (layout.prefix, layout.suffix), value=value)

    def tokens(
        self, x: Float[Tensor, "batch tokens dim"], size: Float[Tensor, "batch tokens"]
    ) -> Tokens:
        """What the method may look at, of patch tokens."""
        needs, layout, read = self.reduction.traits.needs, self.reduction.layout, self.signals
        wanted = {"key", "value"} & needs
        if "class_attention" in needs:
            wanted |= {"key", "query"}
        self._check_read(wanted)
        attention = None
        if "class_attention" in needs:
            rows = slice(0, 1) if layout.class_token else slice(None)
            attention = layout.patch_tokens(self._attention(rows), 2)
        key, value = read.get("key"), read.get("value")
        if key is not None:
            key = layout.patch_tokens(_cut_off(key), 2) if "key" in needs else None
        return quickly(
            Tokens,
            x=x,
            size=size,
            key=key,
            value=None if value is None else layout.patch_tokens(_cut_off(value), 2),
            class_attention=attention,
            attention_received=self.state.received,
            grid=self.state.grid,
            layer=self.layer,
            layers=layout.layers,
            before=layout.prefix,
            gate=self.gate,
            kept=self.state.kept,
        )

    def go_down(
        self,
        token_map: TokenMap,
        asked: int,
        tokens: Float[Tensor, "batch fine dim"],
        size: Float[Tensor, "batch fine"],
        grid: tuple[int, int] | None,
        total: Float[Tensor, "batch coarse"] | None = None,
        log: Float[Tensor, "batch 1 1 coarse_and_others"] | None = None,
    ) -> None:
        """Makes the state that of the tokens which a map leaves.

        Args:
            token_map: how tokens became fewer.
            asked: how many the schedule asked for.
            tokens: the patch tokens before.
            size: how many original tokens each of them stood for.
            grid: rows and columns of the tokens that are left, if they stand on a grid.
            total: how many original tokens each of them stands for, if that is known already.
            log: the logarithms of that, 0 for the other tokens of the sequence, as a bias.
        """
        state = self.state
        reduced = quickly(
            Reduced,
            map=token_map,
            asked=asked,
            size=state.size,
            bias=state.bias,
            index=state.index,
            grid=state.grid,
            stale=None if token_map.merges else tokens,
            former=state.trail,
            each=state.each,
        )
        new, bias, index, each = None, None, None, state.each
        if each is not None and state.ahead is not None and state.ahead.each is not None:
            each = tuple(map(min, each, state.ahead.each))
        if token_map.merges or token_map.ragged or state.size is not None:
            new = token_map.total(size) if total is None else total
            if log is not None and self.reduction.proportional_attention:
                bias = log
            else:
                bias = self._bias_of(new, token_map.ragged)
            if bias is not None and self.reduction.attention != "fastest":
                bias = bias.to(tokens.dtype)  # once, rather than in every block
        if self.reduction.layout.by_position:
            index = token_map.representatives()
            if state.index is not None:
                index = state.index.gather(1, index)
        self.state = state.but(
            trail=reduced,
            size=new,
            bias=bias,
            index=index,
            grid=grid,
            each=each,
            expanded=False,
            received=None,
            aside=None,
        )

    def _change(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch kept dim"]:
        """Reduces the tokens, if the schedule asks for fewer than before."""
        reduction, state = self.reduction, self.state
        assert state.ahead is not None
        if self.gate is None and (reduction.gates is not None or not state.falls(state.ahead)):
            return x
        exact = not reduction.traits.varies and state.each is None
        with self.reduction.part("merging"):
            return self._reduce(x, state.ahead.keep, exact)

    def _reduce(
        self, x: Float[Tensor, "batch tokens dim"], keep: int, exact: bool
    ) -> Float[Tensor, "batch kept dim"]:
        reduction, state, layout = self.reduction, self.state, self.reduction.layout
        tokens = layout.patch_tokens(x)
        size = ones(layout, x) if state.size is None else state.size
        with self.reduction.part("matching"):
            view = self.tokens(tokens, size)
        with _without_autocast(x):
            with self.reduction.part("matching"):
                if state.each is None:
                    token_map = self._chosen(view, keep)
                else:
                    token_map = self._apart(view, state.each)
            if exact and token_map.num_coarse != keep:
                raise ValueError(
                    f"{reduction.reducer} returned {token_map.num_coarse} tokens of {len(size[0])} "
                    f"at layer {self.layer}, but was asked for {keep}"
                )
            x, total, log = fewer(layout, x, token_map, size)
            coarse_grid = getattr(token_map, "grid", None)
            if reduction.reconstruction is not None:
                # Chosen by what tokens are now: later there is nothing to compare them by.
                with self.reduction.part("back"):
                    few = layout.patch_tokens(x)
                    index, weight = reduction.reconstruction(tokens, few, state.grid, coarse_grid)
                token_map = Weighted(token_map, index, weight)
        self.signals.clear()  # so that the keys need not live on through the MLP
        del view
        reduction.record(Record(self.layer, size.shape[1], token_map.num_coarse, token_map))
        self.go_down(token_map, keep, tokens, size, coarse_grid, total, log)
        return x

    def _chosen(self, view: Tokens, keep: int) -> TokenMap:
        """The map that the method makes of tokens, held to what the method says of itself."""
        reducer, said = self.reduction.reducer, self.reduction.traits
        token_map = reducer(view, keep)
        if said.drops == token_map.merges or (token_map.ragged and not said.varies):
            check_map(reducer, token_map)  # which raises
        return token_map

    def _apart(self, view: Tokens, before: tuple[int, ...]) -> TokenMap:
        """The map of a batch whose images were padded to the same length: every image is reduced
        as if it came alone, and padding is left out.

        Args:
            view: the tokens.
            before: how many were asked for of each image so far.
        """
        assert self.state.ahead is not None and self.state.ahead.each is not None
        valid = view.size > 0
        there = valid.sum(1).tolist()
        order = ranked(valid.int())  # padding last
        alike: dict[tuple[int, int | None], list[int]] = {}
        for sample, asked in enumerate(self.state.ahead.each):
            fewer = asked if asked < before[sample] else None
            alike.setdefault((there[sample], fewer), []).append(sample)
        parts: list[tuple[Tensor, Tensor, TokenMap | None]] = []
        for (now, keep), samples in alike.items():
            rows = torch.tensor(samples, device=order.device)
            columns = order[rows, :now]
            part = None if keep is None else self._chosen(view.part(rows, columns), keep)
            parts.append((rows, columns, part))
        return side_by_side(parts, view.size)

    def _rise(self, x: Float[Tensor, "batch tokens dim"], to: int) -> Float[Tensor, "batch to dim"]:
        """Undoes reductions, back to as many tokens as there were before them."""
        state = self.state
        trail = state.trail
        undone: list[Reduced] = []
        size, bias, index, grid = state.size, state.bias, state.index, state.grid
        each = state.each
        while trail is not None and trail.asked < to:
            undone.insert(0, trail)
            size, bias, index, grid = trail.size, trail.bias, trail.index, trail.grid
            each = trail.each
            trail = trail.former
        self.reduction.record(Record(self.layer, state.few, to, None, len(undone)))
        if not state.expanded:  # else it is the full grid already
            x = up(self.reduction.layout, x, undone)
        self.state = state.but(
            trail=trail,
            size=size,
            bias=bias,
            index=index,
            grid=grid,
            each=each,
            expanded=False,
            received=None,
            aside=None,
        )
        return x

    def _bias(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        given = mask
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise ValueError(f"a mask that is a {type(mask).__name__} cannot be re-indexed")
            mask = queries_by_keys(mask, x.shape[0])
            if mask.ndim == 2:
                mask = (mask != 0)[:, None, None]
            mask = self.rows_and_columns(mask)
        if self.state.bias is not None:
            # In the dtype of x: with float64 queries and a float32 mask, torch's fused attention
            # on the CPU is silently wrong.
            mask = added(self.state.bias.to(x.dtype), mask)
        self.mask = mask
        return given if self.untouched else mask

    def _bias_of(
        self, size: Float[Tensor, "batch tokens"], ragged: bool
    ) -> Float[Tensor, "batch 1 1 tokens_and_others"] | None:
        if self.reduction.proportional_attention:
            bias = size.log()  # -inf for padding
        elif ragged or self.state.ragged:
            bias = torch.zeros_like(size).masked_fill(size == 0, -torch.inf)
        else:
            return None
        return self.around(bias, 0.0)[:, None, None, :]

    def _rows(self, table: Tensor) -> Tensor:
        layout, state = self.reduction.layout, self.state
        positions = table.shape[-2]
        if positions == state.full:
            at = state.positions()
        elif positions == state.full + layout.others:
            at = self._sequence()
        else:
            raise ValueError(
                f"a table of {positions} positions fits neither {state.full} patch tokens nor the "
                f"sequence of {state.full + layout.others}"
            )
        if at is None:
            return table
        if table.ndim == 2:
            return take(table.expand(at.shape[0], *table.shape), at)[:, None]
        table = table.expand(at.shape[0], *table.shape[-3:])
        index = at[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
        return table.gather(2, index)

    def _sequence(self) -> Int[Tensor, "batch tokens_and_others"] | None:
        """Where each token of the sequence stood; None if all stand in their places."""
        layout, state = self.reduction.layout, self.state
        index = state.positions()
        if index is None:
            return None
        around = torch.arange(state.full + layout.others, device=index.device)
        around = around.expand(index.shape[0], -1)
        front, back = around[:, : layout.prefix], around[:, layout.prefix + state.full :]
        return torch.cat([front, index + layout.prefix, back], 1)

    def _check_read(self, signals: AbstractSet[str]) -> None:
        """Raises unless these signals were read off the block."""
        # (torch.compile of older versions cannot subtract the keys of a dictionary from a set.)
        missing = [signal for signal in signals if signal not in self.signals]
        if missing:
            raise RuntimeError(
                f"block {self.layer}: {sorted(missing)} could not be read. A submodule of its "
                "attention was replaced or is left out since tokred.apply; call tokred.apply again"
            )

    def _attention(self, rows: slice) -> Float[Tensor, "batch heads tokens"]:
        """The attention that every key gets from the queries at `rows`."""
        query, key = self.signals["query"].detach(), self.signals["key"].detach()
        if self.rotate is not None:
            query, key = self.rotate(query), self.rotate(key)
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, rows]
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return mean_attention(query[:, :, rows], key, scale, mask, self._asking(rows))

    def _asking(self, rows: slice) -> Float[Tensor, "batch rows"] | None:
        """Which of the queries at `rows` are tokens (1), and which padding (0), that asks for
        nothing; None if all are tokens."""
        state = self.state
        if state.size is None or (state.each is None and not state.ragged):
            return None
        return self.around((state.size > 0).float(), 1.0)[:, rows]

    def _receive(self) -> None:
        """Keeps how much attention tokens got in this block, if the method stands before the next
        one and needs it."""
        if "attention_received" not in self.reduction.traits.needs or not self.wants_signals:
            return
        self._check_read({"key", "query"})
        with self.reduction.part("matching"):
            asking = self._asking(slice(None))
            num = self.signals["query"].shape[2]
            queries = num if asking is None else asking.sum(1, keepdim=True)
            paid = self._attention(slice(None)).sum(1)
            received = self.reduction.layout.patch_tokens(paid) * queries
            self.signals.clear()
            self.state = self.state.but(received=received)


def _cut_off(signal: Tensor) -> Tensor:
    """Without gradients."""
    # (A trace that depends on gradients would not be what `torch.jit.trace` finds when it checks.)
    return signal.detach() if signal.requires_grad or tracing() else signal


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, which would compare tokens in half precision."""
    kind = x.device.type
    if not compiling() and not torch.is_autocast_enabled(kind):
        return nullcontext()  # the other one takes as long as merging
    return torch.autocast(kind, enabled=False)


def passing_by(
    reduction: Reduction, x: Any, layer: int, scale: float | None, explicit: nn.Module | None
) -> Step | None:
    """A patched block begins in which there is nothing to do but to tell attention of sizes. None
    if there may be more to do, or more to find out: then it begins by `enter`.

    A model has many such blocks, and at small batches Python's time counts. So this asks as little
    as can be: whether these are the very tokens that the block before has put out in this thread,
    without gradients, and whether the plan has nothing for this block.
    """
    here = reduction.memory.here
    state = here.state
    if state is None or here.last is not x or reduction.observer is not None:
        return None
    ahead = state.ahead
    if (
        ahead is None
        or ahead.rest is None
        or ahead.tapped
        or ahead.left != reduction.layout.layers - layer
        or ahead.keep != state.asked
        or state.expanded
        or state.each is not None
        or reduction.gates is not None
        or torch.is_grad_enabled()
    ):
        return None
    if reduction.traits.place == "before" and ahead.rest.keep != ahead.keep:
        return None  # signals are read here for the next block
    step = Step(reduction, layer, scale, state, explicit)
    here.step = step
    return step


def enter(
    reduction: Reduction,
    x: Float[Tensor, "batch tokens dim"],
    layer: int,
    *,
    first: bool,
    scale: float | None = None,
    mask: Tensor | None = None,
    explicit: nn.Module | None = None,
    training: bool = False,
) -> Step:
    """A patched block begins. The first block starts a pass, whoever called it.

    Args:
        reduction: what is applied.
        x: the tokens that enter the block.
        layer: the block, from 0.
        first: whether it is the first one.
        scale: what its attention multiplies logits by.
        mask: the attention mask that the first block was given.
        explicit: its attention, computed the host's other way.
        training: whether the block is in training mode.
    """
    if first:
        state = passing.start(reduction, x, mask)
        if reduction.gates is not None and not compiling():
            reduction.memory.here.decisions = {}
        if reduction.observer is not None:
            reduction.observer.begins()
    else:
        state = passing.entering(reduction, x, layer)
    learns = reduction.gates is not None
    step = Step(
        reduction,
        layer,
        scale,
        state,
        explicit,
        gate=reduction.gate(layer, x.device) if learns else None,
        masked=training and learns,
    )
    reduction.memory.here.step = step
    return step
