"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3). A merged
token has the rotary position of its first member.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _timm as common


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
    class_token, rotary = model.cls_token is not None, model.rope is not None
    return common.layout_of(model, image_size, class_token, by_position=rotary)


HOST = Host(
    models=("timm.models.eva.Eva",),
    forwards={
        "timm.models.eva.EvaBlock": common.forward_eva,
        "timm.models.eva.EvaBlockPostNorm": forward_post_norm,
    },
    blocks=common.blocks,
    layout=layout,
    taps={"key": "attn.k_norm", "query": "attn.q_norm"},
    reads={"key": common.key},
    shows=frozenset({"value"}),
    explicit=common.explicit,
    scale=common.scale,
    passes=common.norm,
    methods={
        "forward_intermediates": common.forward_intermediates,
        "pool": common.pool,
        "set_input_size": common.set_input_size,
        "prune_intermediate_layers": common.prune_intermediate_layers,
    },
    refuse=common.refuse,
    summary="EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT",
)
