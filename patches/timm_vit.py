"""timm's VisionTransformer: ViT, DeiT, AugReg, MAE, CLIP, SigLIP, DINOv2 (with registers).

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from tokred.engine import Layout
from tokred.host import Host

from . import _timm as common

# Models that were pickled with version 0.7 look for these here.
from ._timm import (
    forward_intermediates,
    pool,
    prune_intermediate_layers,
    set_input_size,
)
from ._timm_vit import (  # noqa: F401
    BLOCKS,
    forward,
    forward_parallel,
    forward_post_norm,
    normed,
    value,
)


def layout(model: VisionTransformer, image_size: tuple[int, int] | None) -> Layout:
    return common.layout_of(model, image_size, model.has_class_token)


def refuse(model: VisionTransformer, signals: frozenset[str]) -> str | None:
    if not hasattr(model, "norm"):
        return "it has no norm behind its blocks, and pools tokens by itself"
    return common.refuse(model, signals)


HOST = Host(
    models=("timm.models.vision_transformer.VisionTransformer",),
    blocks=common.blocks,
    layout=layout,
    passes=common.norm,
    methods={
        "forward_intermediates": forward_intermediates,
        "pool": pool,
        "set_input_size": set_input_size,
        "prune_intermediate_layers": prune_intermediate_layers,
    },
    refuse=refuse,
    summary="ViT, DeiT (I, III, distilled), AugReg, MAE, CLIP, SigLIP, DINOv2 (with registers)",
    **BLOCKS,
)
