"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3). A merged
token has the rotary position of its first member.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokred.engine.run import Layout, Step
from tokred.host.host import Host

from . import _timm as common
from .timm_vit import (
    explicit,
    forward_intermediates,
    pool,
    prune_intermediate_layers,
    set_input_size,
)


def forward_post_norm(
    block: Any,
    step: Step,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`timm.models.eva.EvaBlockPostNorm.forward` (timm 1.0.16 to 1.0.31), with the seam."""
    mask = common.bias(step, x, attn_mask, is_causal)
    y = common.rotary(block.attn, step, x, rope, mask)
    x = x + block.drop_path1(block.norm1(y))
    x = step.reduce(x)
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    grid = model.patch_embed.grid_size
    if image_size is not None:
        grid = model.patch_embed.dynamic_feat_size(image_size)
    return Layout(
        prefix=model.num_prefix_tokens,
        layers=len(model.blocks),
        grid=(int(grid[0]), int(grid[1])),
        class_token=model.cls_token is not None,
        by_position=model.rope is not None,
    )


def _passes(model: Any) -> list[nn.Module]:
    return [model.norm]


HOST = Host(
    models=("timm.models.eva.Eva",),
    forwards={
        "timm.models.eva.EvaBlock": common.forward_eva,
        "timm.models.eva.EvaBlockPostNorm": forward_post_norm,
    },
    blocks=lambda model: list(model.blocks),
    layout=layout,
    taps={"key": "attn.k_norm", "query": "attn.q_norm"},
    reads={"key": common.key},
    shows=frozenset({"value"}),
    explicit=explicit,
    scale=lambda block: float(block.attn.scale),
    passes=_passes,
    methods={
        "forward_intermediates": forward_intermediates,
        "pool": pool,
        "set_input_size": set_input_size,
        "prune_intermediate_layers": prune_intermediate_layers,
    },
    refuse=common.refuse,
    summary="EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT",
)
