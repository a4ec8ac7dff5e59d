"""The vision tower of InternVL in transformers.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _transformers as common


def forward(layer: Any, step: Step, hidden_states: Tensor) -> Tensor:
    """`transformers.models.internvl.modeling_internvl.InternVLVisionLayer.forward` (transformers
    5.9 to 5.23), with the seam."""
    attention, _ = layer.attention(
        layer.layernorm_before(hidden_states), attention_mask=step.bias(hidden_states)
    )
    hidden_states = layer.lambda_1 * attention + hidden_states
    hidden_states = step.reduce(hidden_states)
    output = layer.dropout(layer.mlp(layer.layernorm_after(hidden_states)))
    if layer.lambda_2 is not None:
        output = layer.lambda_2 * output
    return output + hidden_states


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    return Layout(
        prefix=1,
        layers=len(model.encoder.layer),
        grid=common.grid(model.config, image_size),
        class_token=True,
    )


def heads(layer: Any, output: Tensor) -> Tensor:
    return common.heads(layer.attention, output)


HOST = Host(
    models=("transformers.models.internvl.modeling_internvl.InternVLVisionModel",),
    forwards={"transformers.models.internvl.modeling_internvl.InternVLVisionLayer": forward},
    blocks=lambda model: list(model.encoder.layer),
    layout=layout,
    scale=lambda layer: float(layer.attention.scale),
    # Normed, before they are split into heads.
    taps={"key": "attention.k_norm", "query": "attention.q_norm", "value": "attention.v_proj"},
    reads={"key": heads, "query": heads, "value": heads},
    attention=lambda layer: layer.attention,
    attend=common.attend,
    tapped=common.tapped,
    checkpoint=common.checkpoint,
    refuse=common.refuse,
    summary="InternVL",
)
