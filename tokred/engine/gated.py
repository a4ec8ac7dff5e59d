"""Blocks of learned methods: every gate leaves out tokens, and behind the block all are there.

The *gathered form* runs a block on the tokens that its gate chooses. The *masked form*, for
training, runs it on all tokens, hides those that the gate leaves out from attention, and puts back
what they were (SViT, section 4.1), so that gradients reach the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokred import gates as weights
from tokred.engine.observing import Record
from tokred.engine.sequence import between, ones, up
from tokred.engine.state import State, unrolled
from tokred.graphs import compiling
from tokred.kernels.varlen import NotPerImageError, PerImage
from tokred.maps import Kept, kept_where
from tokred.reducers.protocol import learned

if TYPE_CHECKING:
    from tokred.engine.step import Step


def hide(step: Step, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
    """Before a block in the masked form: all tokens stay, and those that the gate leaves out
    cannot be seen."""
    reduction, state = step.reduction, step.state
    reducer, mask = reduction.reducer, state.kept
    assert learned(reducer)
    if step.gate is not None:
        with step.reduction.part("matching"):
            view = step.tokens(reduction.layout.patch_tokens(x), ones(reduction.layout, x))
        with torch.autocast(x.device.type, enabled=False):
            logits = reducer.score(view)
            noise = (reduction.noise or _drawn)(step.layer, logits)
            mask = weights.straight_through(logits, noise)
            if state.kept is not None:
                mask = mask * state.kept
        if not compiling():  # for the loss
            decisions = reduction.memory.here.decisions
            assert decisions is not None
            decisions[step.layer] = mask
    if mask is None:
        return x
    step.entered = x, mask
    bias = step.around(weights.log_mask(mask), 0.0)[:, None, None, :]
    step.state = _all_there(state, bias, mask if reducer.remembers else None)
    return x


def unhide(step: Step, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
    """Behind a block in the masked form: x <- M Block(x) + (1 - M) x (SViT, section 4.1), through
    which gradients reach the gate, too."""
    assert step.entered is not None
    before, mask = step.entered
    through = step.around(mask, 1.0)[..., None].to(x.dtype)
    step.entered = None
    step.state = _all_there(step.state, None, step.state.kept)
    return through * x + (1 - through) * before


def gather(
    step: Step,
    run: Callable[[Float[Tensor, "batch some dim"]], Any],
    x: Float[Tensor, "batch tokens dim"],
    alone: bool = True,
) -> Any:
    """Runs a block on the tokens that its gate chooses; the others stay what they are. What the
    block returns besides the tokens is left alone.

    The tokens of all images are laid end to end where attention can be computed image by image
    (see `PerImage`); else images are padded to the one with the most tokens.

    Args:
        step: the block's run.
        run: the block, from its tokens on.
        x: all tokens.
        alone: whether tokens are all that the block is given, and nothing for each image.
    """
    reduction, state = step.reduction, step.state
    if step.gate is None and state.kept is None:
        return run(x)
    with step.reduction.part("merging"):
        size = ones(reduction.layout, x)
        token_map = _chosen(step, x, size)
        assert learned(reduction.reducer)
        kept = (token_map.labels() >= 0).to(size) if reduction.reducer.remembers else None
        num = size.shape[1]
        if step.gate is not None:
            record = Record(step.layer, num, token_map.num_coarse, token_map, around=True)
            reduction.record(record)

        def block(few: Tensor) -> Any:
            with step.reduction.part("rest"):
                return run(few)

        if token_map.counts is None and token_map.num_coarse == num:
            y = block(x)
        else:
            y = _end_to_end(step, block, x, token_map) if alone else None
            if y is None:
                y = _padded(step, block, x, token_map, size)
    step.state = _all_there(step.state, None, kept)
    return y


def _chosen(step: Step, x: Tensor, size: Float[Tensor, "batch patches"]) -> Kept:
    """The tokens that the gate of this block chooses, or that gates before it have left."""
    reduction, state = step.reduction, step.state
    if step.gate is None:
        assert state.kept is not None
        return kept_where(state.kept > 0)
    assert state.ahead is not None
    with torch.autocast(x.device.type, enabled=False), step.reduction.part("matching"):
        view = step.tokens(reduction.layout.patch_tokens(x), size)
        chosen = reduction.reducer(view, state.ahead.keep)
    assert isinstance(chosen, Kept)
    return chosen


def _end_to_end(step: Step, run: Callable[[Tensor], Any], x: Tensor, token_map: Kept) -> Any:
    """`gather` on the chosen tokens of all images as one sequence; None if that cannot be."""
    reduction = step.reduction
    if token_map.counts is None or reduction.layout.by_position or reduction.padded:
        return None
    if step.layer in reduction.unfused:
        return None
    active = step.around((token_map.labels() >= 0).to(x.dtype), 1.0) > 0
    lengths = active.sum(1).tolist()
    if sum(lengths) == 0:
        return x
    rows = active.flatten().nonzero()[:, 0]
    one_by_one = PerImage(lengths)
    step.flat = True
    try:
        with one_by_one:
            y = run(x.flatten(0, 1).index_select(0, rows)[None])
    except NotPerImageError:
        return None
    finally:
        step.flat = False
    if one_by_one.calls == 0:
        reduction.unfused.add(step.layer)
        return None

    def back(few: Tensor) -> Tensor:
        with step.reduction.part("back"):
            return x.flatten(0, 1).index_copy(0, rows, few[0].to(x.dtype)).view_as(x)

    return (back(y[0]), *y[1:]) if isinstance(y, tuple) else back(y)


def _padded(
    step: Step,
    run: Callable[[Tensor], Any],
    x: Tensor,
    token_map: Kept,
    size: Float[Tensor, "batch patches"],
) -> Any:
    """`gather` on the chosen tokens of every image, padded."""
    layout = step.reduction.layout
    if token_map.num_coarse + layout.others == 0:
        return x
    tokens = layout.patch_tokens(x)
    few = between(layout, x, token_map.down(tokens, size))
    step.go_down(token_map, token_map.num_coarse, tokens, size, None)
    undone = unrolled(step.state.trail)
    y = run(few)
    with step.reduction.part("back"):
        if isinstance(y, tuple):
            return (up(layout, y[0], undone), *y[1:])
        return up(layout, y, undone)


def _all_there(state: State, bias: Tensor | None, kept: Tensor | None) -> State:
    """The same tokens, none of them gone, with another bias of attention."""
    return state.but(
        trail=None,
        size=None,
        bias=bias,
        expanded=False,
        received=None,
        index=None,
        aside=None,
        kept=kept,
    )


def _drawn(layer: int, logits: Float[Tensor, "batch tokens 2"]) -> Float[Tensor, "batch tokens 2"]:
    return weights.gumbel(logits)
