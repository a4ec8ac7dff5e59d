"""BEiT and Data2Vec-Vision of transformers: relative position biases, by layer or shared.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokred.engine import Layout, Step
from tokred.host import Host, is_a

from . import _transformers as common


def forward(
    layer: Any, step: Step, hidden_states: Tensor, attention_mask: Tensor | None = None,
    interpolate_pos_encoding: bool = False, resolution: tuple[int, int] | None = None,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`transformers.models.beit.modeling_beit.BeitLayer.forward` (transformers 5.9 to 5.23), with
    the seam."""
    if layer.relative_position_bias is not None:
        bias = full_bias(layer, layer.patch_size, interpolate_pos_encoding, resolution)
        attention_mask = bias if attention_mask is None else bias + attention_mask
    mask = step.bias(hidden_states, attention_mask)
    attention, _ = layer.attention(
        layer.layernorm_before(hidden_states), attention_mask=mask, **kwargs
    )
    # Without layer scale, lambda_1 and lambda_2 are the number one.
    attention = layer.lambda_1 * layer.dropout(attention)
    hidden_states = layer.drop_path(attention) + hidden_states
    hidden_states = step.reduce(hidden_states)
    mlp = layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(hidden_states)))
    return layer.drop_path(mlp) + hidden_states


def forward_data2vec(
    layer: Any, step: Step, hidden_states: Tensor, output_attentions: bool = False,
    relative_position_bias: Tensor | None = None, interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """`transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionLayer.forward`
    (transformers 5.9 to 5.23), with the seam."""
    attention, *others = layer.attention(
        layer.layernorm_before(hidden_states),
        output_attentions=output_attentions,
        relative_position_bias=relative_position_bias,
        interpolate_pos_encoding=interpolate_pos_encoding,
        resolution=resolution,
    )
    if layer.lambda_1 is not None:
        attention = layer.lambda_1 * attention
    hidden_states = layer.drop_path(attention) + hidden_states
    hidden_states = step.reduce(hidden_states)
    mlp = layer.output(layer.intermediate(layer.layernorm_after(hidden_states)))
    if layer.lambda_2 is not None:
        mlp = layer.lambda_2 * mlp
    return (layer.drop_path(mlp) + hidden_states, *others)


def attend(attention: Any, step: Step, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    if is_a(attention, _DATA2VEC):
        return attend_data2vec(attention, step, *args, **kwargs)
    return attend_beit(attention, step, *args, **kwargs)


def attend_beit(
    attention: Any, step: Step, hidden_states: Tensor, attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`transformers.models.beit.modeling_beit.BeitAttention.forward` (transformers 5.9 to 5.23);
    the mask is that of the tokens that are left."""
    query = by_heads(attention.q_proj(hidden_states), attention.head_dim)
    key = by_heads(attention.k_proj(hidden_states), attention.head_dim)
    value = by_heads(attention.v_proj(hidden_states), attention.head_dim)
    step.see(key=key, query=query, value=value)
    eager = sys.modules[_BEIT].eager_attention_forward
    implementation = attention.config._attn_implementation
    context, weights = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)(
        attention,
        query,
        key,
        value,
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **kwargs,
    )
    return attention.o_proj(context.flatten(2).contiguous()), weights


def attend_data2vec(
    attention: Any, step: Step, hidden_states: Tensor, output_attentions: bool = False,
    relative_position_bias: Tensor | None = None, interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """`transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionSelfAttention.forward`
    and `Data2VecVisionSdpaSelfAttention.forward` (transformers 5.9 to 5.23)."""
    size = attention.attention_head_size
    query = by_heads(attention.query(hidden_states), size)
    key = by_heads(attention.key(hidden_states), size)
    value = by_heads(attention.value(hidden_states), size)
    step.see(key=key, query=query, value=value)
    own = shared = None
    if attention.has_relative_position_bias:
        patch_size = attention.config.patch_size
        own = full_bias(attention, patch_size, interpolate_pos_encoding, resolution)
    own = step.bias(hidden_states, own)
    if relative_position_bias is not None:
        shared = step.rows_and_columns(relative_position_bias)
        step.mask = shared if own is None else own + shared
    if is_a(attention, (_DATA2VEC_SDPA,)):
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=step.mask,
            dropout_p=attention.config.attention_probs_dropout_prob if attention.training else 0.0,
            scale=1 / math.sqrt(size),
        )
        return context.transpose(1, 2).flatten(2), None
    scores = query @ key.transpose(-1, -2) / math.sqrt(size)
    # One after the other, as the host does: it rounds differently than their sum.
    for bias in (own, shared):
        if bias is not None:
            scores = scores + bias
    weights = attention.dropout(scores.softmax(-1))
    context = (weights @ value).transpose(1, 2).flatten(2)
    return (context, weights) if output_attentions else (context,)


def full_bias(
    module: Any,
    patch_size: int,
    interpolate_pos_encoding: bool,
    resolution: tuple[int, int] | None,
) -> Tensor:
    """The relative position bias of the full grid, [1, heads, tokens, tokens]."""
    assert resolution is not None
    rows, columns = resolution[0] // patch_size, resolution[1] // patch_size
    bias: Tensor = module.relative_position_bias(
        (rows, columns), interpolate_pos_encoding, dim_size=rows * columns + 1
    )
    return bias


def by_heads(output: Tensor, head_dim: int) -> Tensor:
    """[batch, tokens, dim] of a projection, by heads."""
    return output.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def blocks(model: Any) -> list[nn.Module]:
    return list(model.layers if hasattr(model, "layers") else model.encoder.layer)


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    config = model.config
    return Layout(
        prefix=1,
        layers=len(blocks(model)),
        grid=common.grid(config, image_size),
        class_token=True,
        by_position=config.use_relative_position_bias or config.use_shared_relative_position_bias,
    )


def attention_of(layer: Any) -> nn.Module:
    inside: nn.Module = getattr(layer.attention, "attention", layer.attention)
    return inside


def scale(layer: Any) -> float:
    attention: Any = attention_of(layer)
    if is_a(attention, _DATA2VEC):
        return 1 / math.sqrt(attention.attention_head_size)
    return float(attention.scaling)


def is_seen(layer: Any) -> bool:
    """Whether the encoder sees what leaves a layer. Data2Vec's may hand it out, and says so to
    nobody; and it makes the shared bias for as many tokens as it sees."""
    return is_a(layer, (_DATA2VEC_LAYER,))


def pools(model: Any) -> list[nn.Module]:
    """The pooler, if it averages the patch tokens rather than take the class token."""
    return [model.pooler] if model.pooler is not None and model.config.use_mean_pooling else []


_BEIT = "transformers.models.beit.modeling_beit"
_DATA2VEC_LAYER = "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionLayer"
_DATA2VEC_SDPA = (
    "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionSdpaSelfAttention"
)
_DATA2VEC = (
    "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionSelfAttention",
    _DATA2VEC_SDPA,
)

HOST = Host(
    models=(
        "transformers.models.beit.modeling_beit.BeitModel",
        "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionModel",
    ),
    forwards={
        "transformers.models.beit.modeling_beit.BeitLayer": forward,
        _DATA2VEC_LAYER: forward_data2vec,
    },
    blocks=blocks,
    layout=layout,
    scale=scale,
    attention=attention_of,
    attend=attend,
    shows=frozenset({"key", "query", "value"}),
    always_full=is_seen,
    passes=lambda model: [model.layernorm],
    pools=pools,
    tapped=common.tapped,
    checkpoint=common.checkpoint,
    summary="BEiT, Data2Vec-Vision",
)
