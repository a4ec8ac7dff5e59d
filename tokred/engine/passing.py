"""How the state of tokens gets from block to block, during one forward pass.

The state rides on the activation that leaves a block. If the activation is lost before the next
block (it was moved, detached, or computed with), the last state of the thread is taken, provided
that it fits. In compiled code nothing can ride on an activation; there the last state counts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tokred.engine.attention import visible
from tokred.engine.reduction import Reduction
from tokred.engine.sequence import ones
from tokred.engine.state import State


def start(
    reduction: Reduction, x: Float[Tensor, "batch tokens dim"], mask: Tensor | None = None
) -> State:
    """The state of tokens that nothing has been done to.

    Args:
        reduction: what is applied.
        x: the tokens.
        mask: the attention mask that the first block was given. Tokens that no query may see are
            padding, and are never merged with others.

    Raises:
        ValueError: images are padded, and the method needs images that are not.
    """
    layout = reduction.layout
    tokens = x.shape[1] - layout.others
    grid = reduction.grid_of(tokens)
    if mask is None or torch.compiler.is_compiling():
        return State(ahead=reduction.ahead(tokens, grid), full=tokens, grid=grid)
    valid = visible(mask, x.shape[0])[:, layout.prefix : x.shape[1] - layout.suffix]
    if bool(valid.all()):
        return State(ahead=reduction.ahead(tokens, grid), full=tokens, grid=grid)
    if reduction.reconstruction is not None or reduction.gates is not None:
        raise ValueError(
            f"{reduction.reconstruction or reduction.reducer} needs images that are not padded: "
            "give them one by one"
        )
    lengths = tuple(valid.sum(1).tolist())
    ahead = reduction.ahead(tokens, None, lengths)
    return State(ahead=ahead, full=tokens, size=valid.to(ones(layout, x)), each=lengths)


def entering(reduction: Reduction, x: Float[Tensor, "batch tokens dim"], layer: int) -> State:
    """The state of the tokens that enter a block which is not the first."""
    state = carried(reduction, x, layer) or _from_outside(reduction, x, layer)
    if not torch.compiler.is_compiling():
        # For recomputation, if the host has changed the activation that the state rode on.
        reduction.memory.ride(x, state)
    return state


def carry(reduction: Reduction, x: Tensor, state: State) -> None:
    """Lets a state ride on an activation."""
    memory = reduction.memory
    if torch.compiler.is_compiling():
        memory.compiled.state = state
        if state.aside is not None:
            memory.compiled.shown = x
    else:
        memory.ride(x, state)


def remember(reduction: Reduction, state: State) -> None:
    """Keeps the state for the next block, in case its activation loses it, or the next block is
    compiled and this one is not."""
    if not torch.compiler.is_compiling():
        reduction.memory.thread.state = state
        reduction.memory.compiled.state = state


def carried(reduction: Reduction, x: Tensor, layer: int | None = None) -> State | None:
    """The state of an activation. If the activation has lost it, the last state of this thread,
    provided that it fits.

    Args:
        reduction: what is applied.
        x: the activation.
        layer: the block that it enters; None behind the last one.

    Raises:
        RuntimeError: tokens were added or taken away between two blocks.
    """
    memory = reduction.memory
    if torch.compiler.is_compiling():
        last = memory.compiled.state
        if last is None or last.aside is None or memory.compiled.shown is x:
            return last
        return last.but(expanded=True, aside=None)
    left = 0 if layer is None else reduction.layout.layers - layer
    state = memory.ridden(x)
    if state is None:
        # Of this thread; or of the block before, if that one is compiled.
        for last in (memory.thread.state, memory.compiled.state):
            if last is not None and last.left == left:
                # What was set aside is no longer what x says.
                state = last if last.aside is None else last.but(expanded=True, aside=None)
                break
    if state is not None and x.shape[1] != state.tokens + reduction.layout.others:
        raise RuntimeError(
            f"a patched block got {x.shape[1]} tokens, but the one before it has put out "
            f"{state.tokens + reduction.layout.others}. Tokens cannot be added or taken away "
            "between blocks while a reduction is applied; tokred.remove(model) takes it out. "
            "(A pass that was broken off is forgotten when the first block runs again.)"
        )
    if state is not None and layer is not None and state.left != left:
        return _in_front_of(reduction, state, layer)
    return state


def pass_on(reduction: Reduction, x: Tensor, y: Tensor) -> None:
    """Lets the state of `x` ride on `y` too: the same tokens after a norm, or in another form."""
    memory = reduction.memory
    if torch.compiler.is_compiling():
        if memory.compiled.shown is x:
            memory.compiled.shown = y
        return
    state = memory.ridden(x)
    if state is not None:
        memory.ride(y, state)


def forget(reduction: Reduction) -> None:
    """Drops the last state of this thread: the pass is over."""
    memory = reduction.memory
    if not torch.compiler.is_compiling():
        memory.thread.state = None
        memory.thread.grid = None
    memory.compiled.forget()


def _from_outside(reduction: Reduction, x: Float[Tensor, "batch tokens dim"], layer: int) -> State:
    """The state of tokens that come from outside into a later block: only a full grid can be told
    from tokens whose sizes were lost."""
    full = reduction.layout.others + reduction.layout.patches
    if x.shape[1] != full:
        raise RuntimeError(
            f"block {layer} got {x.shape[1]} tokens of which nothing is known; only a full "
            f"grid ({full} with prefix tokens) can enter in the middle. Under reentrant "
            "gradient checkpointing, use use_reentrant=False"
        )
    return _in_front_of(reduction, start(reduction, x), layer)


def _in_front_of(reduction: Reduction, state: State, layer: int) -> State:
    """The state in front of `layer`, if blocks before it were left out."""
    ahead, left = state.ahead, reduction.layout.layers - layer
    while ahead is not None and ahead.left > left:
        ahead = ahead.rest
    return state.but(ahead=ahead)
