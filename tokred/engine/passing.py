"""How the state of tokens gets from block to block, during one forward pass.

The state rides on the activation that leaves a block. Compiled code cannot see that; there, the
last state of the thread is taken, if it is the state of this very activation.

Where the activation is another one (it was moved, detached, or computed with between two blocks),
its images are compared with those of the last one. If they are the same, the last state is theirs;
if they are some of them, or in another order, so is the state. Else it is an error.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tokred.engine.attention import visible
from tokred.engine.following import images_of, same_images
from tokred.engine.leaving import outside_of_the_graph
from tokred.engine.reduction import Reduction
from tokred.engine.sequence import ones
from tokred.engine.state import State
from tokred.graphs import compiling, in_a_graph


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
        RuntimeError: there are tokens that are neither patches nor tokens of the layout.
    """
    layout = reduction.layout
    tokens = x.shape[1] - layout.others
    _check_extra(reduction, tokens)
    grid = reduction.grid_of(tokens)
    if mask is None or in_a_graph(x):
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


def _check_extra(reduction: Reduction, tokens: int) -> None:
    """Raises where a model has put more tokens between its own and the patches of its images.

    Raises:
        RuntimeError: it has.
    """
    layout, grid = reduction.layout, reduction.memory.here.grid
    if grid is None:
        return  # patches come from elsewhere
    patches = grid[0] * grid[1]
    # Fewer are patches that were left out (masked autoencoders, patch dropout).
    if tokens > patches or (layout.declared and tokens < patches):
        raise RuntimeError(
            f"block 0 got {tokens + layout.others} tokens, but images of {grid[0]}x{grid[1]} "
            f"patches and {layout.others} other tokens have {patches + layout.others}. Tokens that "
            "this model adds (prompt tuning) must be declared, so that they are not taken for "
            f"patches: tokred.apply(..., prefix={layout.prefix + tokens - patches}), if they stand "
            "in front of the patches"
        )


def entering(reduction: Reduction, x: Float[Tensor, "batch tokens dim"], layer: int) -> State:
    """The state of the tokens that enter a block which is not the first."""
    state = carried(reduction, x, layer)
    if state is None:
        state = _run_again(reduction, x, layer) or _from_outside(reduction, x, layer)
    if not compiling() and torch.is_grad_enabled():
        # For recomputation, if the host has changed the activation that the state rode on.
        reduction.memory.ride(x, state)
    return state


def carry(reduction: Reduction, x: Tensor, state: State) -> None:
    """Lets a state ride on an activation. Between two blocks, and in compiled code, it is the last
    one of this thread, too."""
    memory, following = reduction.memory, compiling()
    if not following:
        memory.ride(x, state)
    if following or state.ahead is not None:
        here = memory.here
        here.state, here.last = state, x


def remember(reduction: Reduction, state: State) -> None:
    """Keeps the state of what leaves the last block for whatever the model makes of that, which it
    does image by image: it is to be asked for once more in this pass."""
    reduction.memory.here.state = state
    reduction.memory.here.last = None


def carried(reduction: Reduction, x: Tensor, layer: int | None = None) -> State | None:
    """The state of an activation; None if nothing is known of it.

    Args:
        reduction: what is applied.
        x: the activation.
        layer: the block that it enters; None behind the last one.

    Raises:
        RuntimeError: tokens or images were added, taken away or changed beyond recognition between
            two blocks.
    """
    memory = reduction.memory
    here = memory.here
    if compiling():
        if here.state is None or here.last is x or here.last is None:
            return here.state
        # Images cannot be compared in a graph.
        why = "something between two blocks changes the tokens, whose images must be compared"
        return outside_of_the_graph(why, _followed, reduction, x, here.state)
    left = 0 if layer is None else reduction.layout.layers - layer
    state = here.state if here.last is x else memory.ridden(x)
    if state is None and here.state is not None and here.state.left == left:
        # Nothing rides on what leaves compiled code.
        known = here.last is x or here.last is None
        state = here.state if known else _followed(reduction, x, here.state)
    if state is not None:
        _check_tokens(reduction, x, state)
    if state is not None and layer is not None and state.left != left:
        return _in_front_of(reduction, state, layer)
    return state


def pass_on(reduction: Reduction, x: Tensor, y: Tensor) -> None:
    """Lets the state of `x` ride on `y` too: the same tokens after a norm, or in another form."""
    here = reduction.memory.here
    if here.last is x:
        here.last = y
    if compiling():
        return
    state = reduction.memory.ridden(x)
    if state is not None:
        reduction.memory.ride(y, state)


def forget(reduction: Reduction) -> None:
    """Drops the last state of this thread: the pass is over."""
    here = reduction.memory.here
    here.state = here.last = here.grid = None


def _check_tokens(reduction: Reduction, x: Tensor, state: State) -> None:
    """Raises unless an activation has as many tokens as the one that its state is of."""
    expected = state.tokens + reduction.layout.others
    if x.shape[1] != expected:
        raise RuntimeError(
            f"a patched block got {x.shape[1]} tokens, but the one before it has put out "
            f"{expected}. Tokens cannot be added or taken away between blocks while a reduction "
            "is applied; tokred.remove(model) takes it out. (A pass that was broken off is "
            "forgotten when the first block runs again.)"
        )


def _followed(reduction: Reduction, x: Tensor, state: State) -> State:
    """The last state of this thread, for an activation that was made of the last one between two
    blocks.

    Raises:
        RuntimeError: its images cannot be told to be those of the last one.
    """
    _check_tokens(reduction, x, state)
    if not state.by_image:
        return state
    last = reduction.memory.here.last
    assert last is not None
    images = same_images(last, x)
    if images is None:
        raise RuntimeError(
            f"between two patched blocks, {len(last)} images became {len(x)}, and which ones "
            "cannot be told: images may be left out or put into another order there, or their "
            "tokens may be changed, but not both at a time. tokred.remove(model) takes the "
            "reduction out"
        )
    if images.tolist() != list(range(len(last))):
        try:
            state = images_of(state, images, len(last))
        except TypeError as error:
            raise RuntimeError(
                "images were left out or put into another order between two patched blocks, which "
                f"cannot be followed: {error}"
            ) from error
    # What was set aside is no longer what x says.
    return state if state.aside is None else state.but(expanded=True, aside=None)


def _run_again(reduction: Reduction, x: Tensor, layer: int) -> State | None:
    """The state of an activation that reentrant gradient checkpointing runs a block on once more:
    it is detached from the first one, with whose memory it shares its values.

    Raises:
        RuntimeError: gradients would flow through the state. It is that of a pass without any.
    """
    if compiling() or not (torch.is_grad_enabled() and x.is_leaf and x.requires_grad):
        return None
    left = reduction.layout.layers - layer
    # Both are alive, so that the memory cannot be that of another activation by now.
    for first, state in reduction.memory.riding():
        if state.left != left or not _same_memory(first, x):
            continue
        if not state.constant:
            raise RuntimeError(
                f"{reduction.reducer} cannot be trained under reentrant gradient checkpointing, "
                "which cuts the gradients of what goes from one block to the next beside the "
                "tokens: use use_reentrant=False"
            )
        return state
    return None


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return (
        x.data_ptr() == y.data_ptr()
        and x.shape == y.shape
        and x.stride() == y.stride()
        and x.dtype == y.dtype
        and x.device == y.device
    )


def _from_outside(reduction: Reduction, x: Float[Tensor, "batch tokens dim"], layer: int) -> State:
    """The state of tokens that come from outside into a later block: only a full grid can be told
    from tokens whose sizes were lost."""
    full = reduction.layout.others + reduction.layout.patches
    if x.shape[1] != full and not reduction.keeps_all:
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
