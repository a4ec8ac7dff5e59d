"""timm's VisionTransformerRelPos: ViTs with relative position biases instead of embeddings.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3). A merged
token has the relative positions of its first member.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _timm as common


def forward(
    block: RelPosBlock, step: Step, x: Tensor, shared_rel_pos: Tensor | None = None
) -> Tensor:
    """`timm.models.vision_transformer_relpos.RelPosBlock.forward` (timm 1.0.16 to 1.0.31), with
    the seam."""
    y = block.attn(block.norm1(x), shared_rel_pos=shared_rel_pos)
    x = x + block.drop_path1(block.ls1(y))
    x = step.reduce(x)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def forward_post_norm(
    block: ResPostRelPosBlock, step: Step, x: Tensor, shared_rel_pos: Tensor | None = None
) -> Tensor:
    """`timm.models.vision_transformer_relpos.ResPostRelPosBlock.forward` (timm 1.0.16 to 1.0.31),
    with the seam."""
    x = x + block.drop_path1(block.norm1(block.attn(x, shared_rel_pos=shared_rel_pos)))
    x = step.reduce(x)
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def attend(
    attention: RelPosAttention, step: Step, x: Tensor, shared_rel_pos: Tensor | None = None
) -> Tensor:
    """`timm.models.vision_transformer_relpos.RelPosAttention.forward` (timm 1.0.16 to 1.0.31),
    which takes no mask."""
    batch, tokens, dim = x.shape
    qkv = attention.qkv(x)
    qkv = qkv.reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    step.see(query=query, key=key, value=value)

    # A bias of its own comes instead of the shared one.
    bias = shared_rel_pos if attention.rel_pos is None else attention.rel_pos.get_bias()
    mask = step.bias(x, bias)
    if step.attend(attention, x, attention.num_heads).fused_attn:
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=attention.attn_drop.p if attention.training else 0.0,
        )
    else:
        logits = (query * attention.scale) @ key.transpose(-2, -1)
        logits = logits if mask is None else logits + mask
        y = attention.attn_drop(logits.softmax(dim=-1)) @ value
    y = y.transpose(1, 2).reshape(batch, tokens, dim)
    return attention.proj_drop(attention.proj(y))


def layout(model: VisionTransformerRelPos, image_size: tuple[int, int] | None) -> Layout:
    return common.layout_of(model, image_size, model.cls_token is not None, by_position=True)


HOST = Host(
    models=("timm.models.vision_transformer_relpos.VisionTransformerRelPos",),
    forwards={
        "timm.models.vision_transformer_relpos.RelPosBlock": forward,
        "timm.models.vision_transformer_relpos.ResPostRelPosBlock": forward_post_norm,
    },
    blocks=common.blocks,
    layout=layout,
    scale=common.scale,
    attention=lambda block: block.attn,
    attend=attend,
    shows=frozenset({"key", "query", "value"}),
    explicit=common.explicit,
    passes=common.norm,
    methods={
        "forward_intermediates": common.forward_intermediates,
        "forward_head": common.forward_head,
        "set_input_size": common.set_input_size,
        "prune_intermediate_layers": common.prune_intermediate_layers,
    },
    summary="ViTs with relative position biases",
)
