"""The vision towers of BLIP, BLIP-2 and InstructBLIP of transformers: attention without a mask.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _transformers as common


def forward(layer: Any, step: Step, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """`transformers.models.blip.modeling_blip.BlipEncoderLayer.forward` (transformers 5.9 to
    5.23), with the seam; the other layers of this file have the same."""
    attention, _ = layer.self_attn(hidden_states=layer.layer_norm1(hidden_states), **kwargs)
    hidden_states = attention + hidden_states
    hidden_states = step.reduce(hidden_states)
    return layer.mlp(layer.layer_norm2(hidden_states)) + hidden_states


def attend(attention: Any, step: Step, hidden_states: Tensor, **kwargs: Any) -> Any:
    """`transformers.models.blip.modeling_blip.BlipAttention.forward` and the one of BLIP-2
    (transformers 5.9 to 5.23), which differ in how attention is computed, with a bias."""
    qkv = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    step.see(query=query, key=key, value=value)
    bias = step.bias(hidden_states)
    if isinstance(getattr(attention, "dropout", None), nn.Module):
        logits = (query @ key.transpose(-1, -2)) * attention.scale
        paid = attention.dropout((logits if bias is None else logits + bias).softmax(-1))
        output = (paid @ value).permute(0, 2, 1, 3)
        return attention.projection(output.reshape(hidden_states.shape)), paid
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    module, compute = common.function_for(attention, bias, eager)
    output, paid = compute(
        module,
        query,
        key,
        value,
        attention_mask=bias,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scale,
        **kwargs,
    )
    return attention.projection(output.reshape(hidden_states.shape).contiguous()), paid


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    return Layout(
        prefix=1,
        layers=len(model.encoder.layers),
        grid=common.grid(model.config, image_size),
        class_token=True,
    )


HOST = Host(
    models=(
        "transformers.models.blip.modeling_blip.BlipVisionModel",
        "transformers.models.blip_2.modeling_blip_2.Blip2VisionModel",
        "transformers.models.instructblip.modeling_instructblip.InstructBlipVisionModel",
        "transformers.models.instructblipvideo.modeling_instructblipvideo"
        ".InstructBlipVideoVisionModel",
    ),
    forwards={
        "transformers.models.blip.modeling_blip.BlipEncoderLayer": forward,
        "transformers.models.blip_2.modeling_blip_2.Blip2EncoderLayer": forward,
        "transformers.models.instructblip.modeling_instructblip.InstructBlipEncoderLayer": forward,
        "transformers.models.instructblipvideo.modeling_instructblipvideo"
        ".InstructBlipVideoEncoderLayer": forward,
    },
    blocks=lambda model: list(model.encoder.layers),
    layout=layout,
    scale=lambda layer: float(layer.self_attn.scale),
    attention=lambda layer: layer.self_attn,
    attend=attend,
    shows=frozenset({"key", "query", "value"}),
    tapped=common.tapped,
    checkpoint=common.checkpoint,
    refuse=common.refuse,
    summary="BLIP, BLIP-2, InstructBLIP",
)
