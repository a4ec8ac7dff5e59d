"""ViT-Adapter on a timm VisionTransformer (`tokred.models.vit_adapter`): the transformer's own
blocks, with the full grid at every injector and extractor.

The file counts as timm's, because the adapter is not there before timm is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from tokred.engine.run import Layout, Reduction
from tokred.host.host import Host

from .timm_vit import HOST as VIT


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    found = VIT.layout(model.vit, None)
    if image_size is None:
        return found
    return replace(found, grid=(image_size[0] // 16, image_size[1] // 16))


def interact(
    reduction: Reduction, original: Callable[..., Any], model: Any, x: Tensor, *args: Any
) -> Any:
    """Full grids at the end of every group, where the extractor and the next injector look."""
    layers, groups = len(model.vit.blocks), len(model.injectors)
    size = layers // groups
    reduction.set_tapped(frozenset(range(size - 1, layers, size)))
    try:
        return original(model, x, *args)
    finally:
        reduction.set_tapped(frozenset())


HOST: Host = replace(
    VIT,
    models=("tokred.models.vit_adapter.ViTAdapter",),
    blocks=lambda model: VIT.blocks(model.vit),
    layout=layout,
    passes=lambda model: (),
    methods={"interact": interact},
    refuse=lambda model, signals: VIT.refuse(model.vit, signals),
    summary="ViT-Adapter, and Mask R-CNN on it",
)
