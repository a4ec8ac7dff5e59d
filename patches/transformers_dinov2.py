"""The DINO ViTs of transformers, and what is built like them: DINOv2 (with registers), DINOv3,
TIPSv2, RADIO, Sapiens2.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _transformers as common


def forward(
    layer: Any, step: Step, hidden_states: Tensor, attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`transformers.models.dinov2.modeling_dinov2.Dinov2Layer.forward` (transformers 5.9 to 5.23),
    with the seam; so do the layers of DINOv2 with registers, TIPSv2 and RADIO."""
    if kwargs.get("cu_seqlens") is not None:
        raise ValueError(
            "several images that are packed into one sequence cannot be reduced: give RADIO images "
            "of one size, or one image at a time"
        )
    if takes_no_mask(layer):
        attention = layer.attention(layer.norm1(hidden_states), **kwargs)
    else:
        mask = step.bias(hidden_states, attention_mask)
        attention, _ = layer.attention(layer.norm1(hidden_states), attention_mask=mask, **kwargs)
    hidden_states = layer.drop_path(layer.layer_scale1(attention)) + hidden_states
    hidden_states = step.reduce(hidden_states)
    mlp = layer.mlp(layer.norm2(hidden_states))
    return layer.drop_path(layer.layer_scale2(mlp)) + hidden_states


def takes_no_mask(layer: Any) -> bool:
    """Whether attention is laid out as in transformers before 5.18, inside of another module and
    without a mask."""
    return hasattr(layer.attention, "attention")


def attention_of(layer: Any) -> Any:
    return layer.attention.attention if takes_no_mask(layer) else layer.attention


def attend(attention: Any, step: Step, *args: Any, **kwargs: Any) -> Any:
    if hasattr(attention, "query"):
        return common.attend_without_mask(attention, step, *args, **kwargs)
    return common.attend(attention, step, *args, **kwargs)


def rotary_forward(
    layer: Any, step: Step, hidden_states: Tensor, attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer.forward` (transformers 5.9
    to 5.23), with the seam; so does the layer of Sapiens2."""
    assert position_embeddings is not None
    cos, sin = step.rotary(rotated, *position_embeddings)
    mask = step.bias(hidden_states, attention_mask)
    attention, _ = layer.attention(
        layer.norm1(hidden_states),
        attention_mask=mask,
        position_embeddings=(cos, sin),
        **kwargs,
    )
    hidden_states = layer.drop_path(layer.layer_scale1(attention)) + hidden_states
    hidden_states = step.reduce(hidden_states)
    mlp = layer.mlp(layer.norm2(hidden_states))
    return layer.drop_path(layer.layer_scale2(mlp)) + hidden_states


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys as attention compares them: rotated, but for the tokens in front."""
    front, patches = x.split((x.shape[2] - cos.shape[-2], cos.shape[-2]), dim=2)
    first, second = patches.chunk(2, -1)
    return torch.cat([front, patches * cos + torch.cat([-second, first], -1) * sin], 2)


def layout(encoder: Any, image_size: tuple[int, int] | None) -> Layout:
    config = encoder.config
    if config.model_type == "radio":
        prefix, class_token = config.num_summary_tokens, config.num_cls_tokens > 0
    else:
        prefix, class_token = 1 + getattr(config, "num_register_tokens", 0), True
    return Layout(
        prefix=prefix,
        layers=len(encoder.layer),
        grid=common.grid(config, image_size),
        class_token=class_token,
        by_position=config.model_type in ("dinov3_vit", "sapiens2"),
    )


def query(layer: Any, output: Tensor) -> Tensor:
    return _normed(layer, "q_norm", output)


def key(layer: Any, output: Tensor) -> Tensor:
    return _for_every_query(layer, _normed(layer, "k_norm", output))


def value(layer: Any, output: Tensor) -> Tensor:
    return _for_every_query(layer, _normed(layer, "no norm", output))


def _normed(layer: Any, norm: str, output: Tensor) -> Tensor:
    if takes_no_mask(layer):
        return common.heads_of(layer.attention.attention, output)
    found = getattr(layer.attention, norm, None)
    by_head = common.heads(layer.attention, output)
    return by_head if found is None else found(by_head)


def _for_every_query(layer: Any, x: Tensor) -> Tensor:
    """As many heads as the queries have: in Sapiens2 several share one."""
    groups = getattr(layer.attention, "num_key_value_groups", 1)
    return x if groups == 1 else x.repeat_interleave(groups, 1)


# These average the patch tokens outside of the tower.
_AVERAGES = (
    "transformers.models.dinov2.modeling_dinov2.Dinov2ForImageClassification",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersForImageClassification",
)

HOST = Host(
    # The encoders, which models and backbones have in common.
    models=(
        "transformers.models.dinov2.modeling_dinov2.Dinov2Encoder",
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
        ".Dinov2WithRegistersEncoder",
        "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTEncoder",
        "transformers.models.tipsv2.modeling_tipsv2.Tipsv2VisionEncoder",
        "transformers.models.radio.modeling_radio.RadioEncoder",
        "transformers.models.sapiens2.modeling_sapiens2.Sapiens2Encoder",
    ),
    forwards={
        "transformers.models.dinov2.modeling_dinov2.Dinov2Layer": forward,
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
        ".Dinov2WithRegistersLayer": forward,
        "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": rotary_forward,
        "transformers.models.tipsv2.modeling_tipsv2.Tipsv2VisionLayer": forward,
        "transformers.models.radio.modeling_radio.RadioLayer": forward,
        "transformers.models.sapiens2.modeling_sapiens2.Sapiens2Layer": rotary_forward,
    },
    blocks=lambda encoder: list(encoder.layer),
    layout=layout,
    scale=lambda layer: float(attention_of(layer).scaling),
    taps={
        "key": ("attention.k_proj", "attention.attention.key"),
        "query": ("attention.q_proj", "attention.attention.query"),
        "value": ("attention.v_proj", "attention.attention.value"),
    },
    reads={"key": key, "query": query, "value": value},
    attention=attention_of,
    attend=attend,
    tapped=common.tapped,
    checkpoint=common.checkpoint,
    averages_output=lambda root, encoder: common.contains(root, _AVERAGES),
    refuse=common.refuse,
    summary="DINOv2 (with registers), DINOv3, TIPSv2, RADIO, Sapiens2",
)
