"""ViT-Adapter on a timm VisionTransformer (`tokred.models.vit_adapter`): the transformer's own
blocks, with the full grid at every injector and extractor.

The file counts as timm's, because the adapter is not there before timm is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from tokred.engine import Layout, Reduction
from tokred.host import Host

from . import _timm as common
from ._timm_vit import BLOCKS


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    found = common.layout_of(model.vit, None, model.vit.has_class_token)
    if image_size is None:
        return found
    return replace(found, grid=(image_size[0] // 16, image_size[1] // 16))


def interact(
    reduction: Reduction, original: Callable[..., Any], model: Any, x: Tensor, *args: Any
) -> Any:
    """Full grids at the end of every group, where the extractor and the next injector look."""
    layers, groups = len(model.vit.blocks), len(model.injectors)
    size = layers // groups
    tapped = frozenset(range(size - 1, layers, size))
    return reduction.handing_out(tapped, original, model, x, *args)


HOST = Host(
    models=("tokred.models.vit_adapter.ViTAdapter",),
    blocks=lambda model: list(model.vit.blocks),
    layout=layout,
    methods={"interact": interact},
    refuse=lambda model, signals: common.refuse(model.vit, signals),
    summary="ViT-Adapter, and Mask R-CNN on it",
    **BLOCKS,
)
