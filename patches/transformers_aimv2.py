"""The vision towers of AIMv2 and Ovis2 in transformers.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _transformers as common


def forward(
    layer: Any, step: Step, hidden_states: Tensor, attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`transformers.models.aimv2.modeling_aimv2.Aimv2EncoderLayer.forward` (transformers 5.9 to
    5.23), with the seam; Ovis2 has the same."""
    mask = step.bias(hidden_states, attention_mask)
    attention, _ = layer.attention(
        hidden_states=layer.rms_norm1(hidden_states), attention_mask=mask, **kwargs
    )
    hidden_states = hidden_states + attention
    hidden_states = step.reduce(hidden_states)
    return hidden_states + layer.ffn(layer.rms_norm2(hidden_states))


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    return Layout(
        prefix=0,
        layers=len(model.encoder.layers),
        grid=common.grid(model.config, image_size),
        class_token=False,
    )


def heads(layer: Any, output: Tensor) -> Tensor:
    return common.heads(layer.attention, output)


def _head(model: Any) -> list[nn.Module]:
    """What pools the tokens by attention."""
    return [model.head] if isinstance(getattr(model, "head", None), nn.Module) else []


HOST = Host(
    models=(
        "transformers.models.aimv2.modeling_aimv2.Aimv2VisionModel",
        "transformers.models.ovis2.modeling_ovis2.Ovis2VisionTransformer",
    ),
    forwards={
        "transformers.models.aimv2.modeling_aimv2.Aimv2EncoderLayer": forward,
        "transformers.models.ovis2.modeling_ovis2.Ovis2VisionEncoderLayer": forward,
    },
    blocks=lambda model: list(model.encoder.layers),
    layout=layout,
    scale=lambda layer: float(layer.attention.scale),
    taps={
        "key": "attention.k_proj",
        "query": "attention.q_proj",
        "value": "attention.v_proj",
    },
    reads={"key": heads, "query": heads, "value": heads},
    attention=lambda layer: layer.attention,
    attend=common.attend,
    tapped=common.tapped,
    checkpoint=common.checkpoint,
    passes=lambda model: [model.rms_norm],
    pools=_head,
    refuse=common.refuse,
    summary="AIMv2, Ovis2",
)
