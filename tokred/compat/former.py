"""Names of former versions whose work is done otherwise now, for code that still imports them."""

from __future__ import annotations

from torch import Tensor

from tokred.compat.tome.observer import OnModel
from tokred.engine.layout import Layout
from tokred.engine.step import Step
from tokred.reducers.protocol import Reducer, traits

Attributes = OnModel
"""Of `tokred.run`: what hung attributes on models that `tokred.compat.tome` has patched."""


def patches(layout: Layout, x: Tensor, dim: int = 1) -> Tensor:
    """Of `tokred.run`: `layout.patch_tokens(x, dim)`."""
    return layout.patch_tokens(x, dim)


def few_of(step: Step) -> tuple[int, int] | None:
    """Of `tokred.windows`: `step.window`."""
    return step.window


def keys_only(reducer: Reducer) -> bool:
    """Of `tokred.denoising`: `traits(reducer).keys_only`."""
    return traits(reducer).keys_only
