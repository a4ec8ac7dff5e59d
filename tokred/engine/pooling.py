"""The one rule of how a head pools tokens.

Merged tokens count as often as the tokens that they stand for: the full grid of copies gives just
that. Dropped tokens and padding do not count at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokred.engine.passing import carried, forget
from tokred.engine.reduction import Reduction
from tokred.engine.sequence import descend, expand
from tokred.engine.state import State, unrolled

Out = TypeVar("Out")


def pooled(
    reduction: Reduction,
    x: Float[Tensor, "batch tokens dim"],
    call: Callable[[Tensor], Out],
    patches: bool = True,
    positions: bool = False,
) -> Out:
    """Calls a head on features as it may see them. Where images keep different numbers of tokens,
    it is called on each image alone, because it cannot be told of padding.

    Args:
        reduction: what is applied.
        x: the features that the model hands to the head.
        call: the head; returns a tensor, or a tuple of tensors, [batch, ...].
        patches: whether it pools patch tokens, rather than takes a prefix token.
        positions: whether it has something for each position of the full grid (position
            embeddings), so that no token may be missing.

    Raises:
        ValueError: the head would see tokens that should not be there, or dropped tokens shift its
            positions.
        RuntimeError: nothing is known of the features, and something would have to be.
    """
    found = poolable(reduction, x, positions) if patches else None
    forget(reduction)
    if found is None:
        return call(x)
    seen, there = found
    if there is None or bool(there.all()):
        return call(seen)
    layout = reduction.layout
    counts = (layout.prefix + there.sum(1)).tolist()
    return _joined([call(y[:, :n]) for y, n in zip(seen.split(1), counts, strict=True)])


def pooled_with_mask(
    reduction: Reduction,
    x: Float[Tensor, "batch tokens dim"],
    call: Callable[[Tensor, Tensor | None], Out],
    mask: Bool[Tensor, "batch patches"] | None,
    patches: bool = True,
) -> Out:
    """`pooled`, for a head that can be told which patch tokens are there.

    Args:
        reduction, x, patches: as of `pooled`.
        call: the head, of the features and the mask (True: is there; None if all are).
        mask: the mask that the model gives for these features.
    """
    found = poolable(reduction, x) if patches else None
    forget(reduction)
    return call(x, mask) if found is None else call(*found)


def poolable(
    reduction: Reduction, x: Float[Tensor, "batch tokens dim"], positions: bool = False
) -> tuple[Float[Tensor, "batch seen dim"], Bool[Tensor, "batch patches"] | None] | None:
    """Features as a head that pools patch tokens may see them, and which of the patch tokens are
    there: False for padding, which stands behind the tokens of its image; None if all are.

    For arguments and errors see `pooled`.

    Returns:
        Both; None if the head may see the features as they are.
    """
    state = carried(reduction, x)
    if state is None:
        check_known(reduction)
        return None
    check_training(reduction, state)
    if positions and state.prunes:
        raise ValueError(
            "this model's attention pooling has position embeddings, which would shift when "
            "tokens are dropped: use a method that merges, such as 'tome'"
        )
    if not needed_for_pooling(state):
        return None
    if not state.prunes:
        if not state.expanded:
            with reduction.part("back"):
                x = expand(reduction.layout, x, state)
        # Padding that the images came with is on the full grid, too.
        size = unrolled(state.trail)[0].size
    else:
        if state.expanded:
            with reduction.part("back"):
                x, state = descend(reduction.layout, x, state)
        size = state.size
    return x, None if size is None else size > 0


def needs_to_know(reduction: Reduction) -> bool:
    """Whether features of the model may be such that a pooled head must know what their tokens
    stand for."""
    return reduction.traits.prunes or not reduction.full_grid


def check_known(reduction: Reduction) -> None:
    """Raises where nothing is known of the features that are to be pooled, if their tokens may
    count differently.

    Raises:
        RuntimeError: they may.
    """
    if needs_to_know(reduction):
        raise RuntimeError(
            f"a head that pools patch tokens was given features of which nothing is known, and "
            f"{reduction.reducer} leaves features whose tokens do not all count alike. Give it the "
            "features that the model has handed out, and no copy of them (clone, cast, save); or "
            "call the whole model. If they are those of the model without tokred, "
            "tokred.remove(model) comes first"
        )


def check_training(reduction: Reduction, state: State) -> None:
    """Raises where a head is about to pool tokens that are there for the sake of training alone.

    Raises:
        ValueError: it is.
    """
    if drops_in_training(reduction, state):
        raise ValueError(
            f"{reduction.reducer} cannot be trained on a model that pools its patch tokens, which "
            "would see those that are to be dropped: use SViT(), which keeps them"
        )


def drops_in_training(reduction: Reduction, state: State) -> bool:
    """Whether some tokens of the full grid are there for the sake of training alone."""
    return state.kept is not None and reduction.traits.prunes


def needed_for_pooling(state: State) -> bool:
    """Whether a pooled head must know what the tokens stand for: some were dropped, or they are
    still reduced."""
    return state.trail is not None and (state.prunes or not state.expanded)


def tokens_there(
    reduction: Reduction, x: Float[Tensor, "batch tokens dim"]
) -> Bool[Tensor, "batch patches"] | None:
    """Which patch tokens of features that are handed out reduced are there, rather than padding;
    None if the features are those of the full grid.

    Raises:
        RuntimeError: nothing is known of the features, and something would have to be.
    """
    state = carried(reduction, x)
    if state is None:
        check_known(reduction)
        return None
    if state.trail is None or state.expanded:
        return None
    if state.size is not None:
        return state.size > 0
    few = x.shape[1] - reduction.layout.others
    return torch.ones(x.shape[0], few, dtype=torch.bool, device=x.device)


def _joined(parts: list[Out]) -> Out:
    """What a head has returned for single images, as for a batch."""
    if isinstance(parts[0], tuple):
        return type(parts[0])(_joined(list(part)) for part in zip(*parts, strict=True))
    return torch.cat(parts)  # type: ignore[arg-type, return-value]
