"""Sequences of tokens, from the full grid to the reduced tokens and back."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokred.engine.layout import Layout
from tokred.engine.state import Reduced, State, unrolled
from tokred.graphs import is_native
from tokred.maps import Clusters, Kept, TokenMap, take


def between(
    layout: Layout, x: Float[Tensor, "batch tokens dim"], patch_tokens: Tensor
) -> Float[Tensor, "batch new dim"]:
    """The sequence with other patch tokens between its prefix and suffix tokens."""
    if not layout.suffix:
        return torch.cat([x[:, : layout.prefix], patch_tokens], 1)
    return torch.cat([x[:, : layout.prefix], patch_tokens, x[:, -layout.suffix :]], 1)


def fewer(
    layout: Layout,
    x: Float[Tensor, "batch tokens dim"],
    token_map: TokenMap,
    size: Float[Tensor, "batch fine"],
) -> tuple[
    Float[Tensor, "batch new dim"],
    Float[Tensor, "batch coarse"] | None,
    Float[Tensor, "batch 1 1 new"] | None,
]:
    """The sequence that a map leaves. And, where one kernel gives all of it, how many original
    tokens each of its patch tokens stands for, and the logarithms of that, 0 for its other tokens,
    as attention takes them.

    Args:
        layout: how the sequence is laid out.
        x: the sequence.
        token_map: how its patch tokens become fewer.
        size: how many original tokens each of them stands for.
    """
    if type(token_map) is Clusters and not token_map.ragged and is_native(x):
        merged: tuple[Tensor, Tensor, Tensor] = _kernels().merge(
            x, token_map.index, token_map.num_coarse, size, token_map.share, layout.prefix
        )
        return merged
    if type(token_map) is Kept:
        return chosen(layout, x, token_map.index), None, None
    return between(layout, x, token_map.down(layout.patch_tokens(x), size)), None, None


@cache  # in every pass, finding it takes longer than looking it up
def _kernels() -> ModuleType:
    """Kernels for the CPU, imported when they are used: numba takes long to import."""
    from tokred.kernels import merging_numba

    return merging_numba


def chosen(
    layout: Layout,
    x: Float[Tensor, "batch tokens dim"],
    index: Int[Tensor, "batch chosen"],
) -> Float[Tensor, "batch new dim"]:
    """The sequence with the patch tokens at `index` in place of all of them, each as often as it is
    named there."""
    if is_native(x):
        picked: Tensor = _kernels().pick(x, index, x.shape[1] - layout.others, layout.prefix)
        return picked
    # The other tokens are copied along, which spares a second copy of everything to put the parts
    # together.
    around = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    parts = [around[:, : layout.prefix], index + layout.prefix]
    if layout.suffix:
        parts.append(around[:, -layout.suffix :])
    return take(x, torch.cat(parts, 1))


def ones(layout: Layout, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch patches"]:
    """The sizes of patch tokens of which each stands for itself, at least float32."""
    patch_tokens = x.shape[1] - layout.others
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_ones(x.shape[0], patch_tokens, dtype=dtype)


def expand(
    layout: Layout, x: Float[Tensor, "batch tokens dim"], state: State
) -> Float[Tensor, "batch full dim"]:
    """The full grid from reduced tokens: copies for merged ones, the last value for dropped
    ones."""
    return up(layout, x, unrolled(state.trail))


def descend(
    layout: Layout, x: Float[Tensor, "batch full dim"], state: State
) -> tuple[Float[Tensor, "batch tokens dim"], State]:
    """Reduced tokens from the full grid that `expand` has made, and their state.

    Merged tokens are copies of each other on the full grid, so that their mean is what they were.
    Where that is not so, they were set aside, and go on unless somebody has changed the full grid.
    In the state, dropped tokens are what they are on this full grid: somebody may have changed it.
    """
    if state.aside is not None:
        return state.aside, state.but(expanded=False, aside=None)
    tokens = layout.patch_tokens(x)
    trail: Reduced | None = None
    for reduced in unrolled(state.trail):
        size = ones(layout, x) if reduced.size is None else reduced.size
        stale = None if reduced.stale is None else tokens
        trail = reduced.but(stale=stale, former=trail)
        tokens = reduced.map.down(tokens, size)
    return between(layout, x, tokens), state.but(expanded=False, aside=None, trail=trail)


def up(
    layout: Layout, x: Float[Tensor, "batch coarse dim"], undone: list[Reduced]
) -> Float[Tensor, "batch fine dim"]:
    """Undoes reductions, given first to last. Runs of merges are undone by one copy."""
    clusters: Clusters | None = None
    for reduced in reversed(undone):
        if type(reduced.map) is Clusters:
            clusters = reduced.map.then(clusters) if clusters else reduced.map
            continue
        if clusters:
            x, clusters = chosen(layout, x, clusters.index), None
        x = between(layout, x, reduced.map.up(layout.patch_tokens(x), reduced.stale))
    return chosen(layout, x, clusters.index) if clusters else x
