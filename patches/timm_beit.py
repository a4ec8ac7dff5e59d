"""timm's Beit: BEiT and BEiT v2, with relative position biases.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3). A merged
token has the relative positions of its first member.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, Beit, Block
from torch import Tensor

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _timm as common
from ._timm import forward_head


def forward(
    block: Block, step: Step, x: Tensor, shared_rel_pos_bias: Tensor | None = None
) -> Tensor:
    """`timm.models.beit.Block.forward` (timm 1.0.16 to 1.0.31), with the seam."""
    y = block.attn(block.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
    x = x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)
    x = step.reduce(x)
    y = block.mlp(block.norm2(x))
    return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)


def attend(
    attention: Attention, step: Step, x: Tensor, shared_rel_pos_bias: Tensor | None = None
) -> Tensor:
    """`timm.models.beit.Attention.forward` (timm 1.0.16 to 1.0.31), which takes no mask."""
    batch, tokens, dim = x.shape
    if attention.q_bias is None:
        qkv = attention.qkv(x)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        if attention.qkv_bias_separate:
            qkv = attention.qkv(x)
            qkv += bias
        else:
            qkv = F.linear(x, weight=attention.qkv.weight, bias=bias)
    qkv = qkv.reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    step.see(query=query, key=key, value=value)

    own: Tensor | None = None
    shared = shared_rel_pos_bias
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()
    both = shared if own is None else own if shared is None else own + shared
    if step.attend(attention, x, attention.num_heads).fused_attn:
        mask = step.bias(x, both)
        if both is not None and both.ndim == 3 and step.untouched:
            mask = both  # as it is: without a batch dimension, torch takes another kernel
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=attention.attn_drop.p if attention.training else 0.0,
        )
    else:
        logits = (query * attention.scale) @ key.transpose(-2, -1)
        for table in (own, shared):  # one after the other, which rounds differently
            if table is not None:
                logits = logits + step.rows_and_columns(table)
        sizes = step.bias(x)
        if sizes is not None:
            logits = logits + sizes
        if step.wants_signals:
            step.bias(x, both)  # what was added in all
        y = attention.attn_drop(logits.softmax(dim=-1)) @ value
    y = y.transpose(1, 2).reshape(batch, tokens, dim)
    return attention.proj_drop(attention.proj(y))


def layout(model: Beit, image_size: tuple[int, int] | None) -> Layout:
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    biased = model.rel_pos_bias is not None or any(one is not None for one in tables)
    return common.layout_of(model, image_size, class_token=True, by_position=biased)


HOST = Host(
    models=("timm.models.beit.Beit",),
    forwards={"timm.models.beit.Block": forward},
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
        "forward_head": forward_head,
        "set_input_size": common.set_input_size,
        "prune_intermediate_layers": common.prune_intermediate_layers,
    },
    summary="BEiT, BEiT v2",
)
