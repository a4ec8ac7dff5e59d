"""DINOv2 (with registers), DINOv3, TIPSv2, RADIO and Sapiens2 of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from families import Small, hidden_states, two_pictures, visible

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "initializer_range": 0.1,
}
ROTARY = {**SIZE, "intermediate_size": 64}


def images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def blank_positions(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("position_embeddings", "position_embedding", "inv_freq")):
            nn.init.zeros_(tensor)  # of frequencies: every cosine is one


def twins(model: nn.Module) -> dict[str, Tensor]:
    blank_positions(model)
    return {"pixel_values": two_pictures((64, 64), (16, 16))}


def make(cls: Any, config: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: visible(cls(config(**options)))


def small(cls: Any, config: Any, **options: Any) -> Small:
    return Small(make(cls, config, **options), images, twins, hidden_states)


def maps(outputs: Any) -> Tensor:
    return torch.cat([feature_map.flatten(2) for feature_map in outputs.feature_maps], 1)


def backbone(cls: Any, config: Any, **options: Any) -> Small:
    build = make(cls, config, **options, out_features=["stage2", "stage4"])
    return Small(build, images, twins, hidden_states, answer=maps)


def radio() -> nn.Module:
    config = transformers.RadioConfig(**SIZE, max_img_size=128, num_cls_tokens=2, num_registers=3)
    return visible(transformers.RadioModel(config))


SMALL = {
    "dinov2": small(transformers.Dinov2Model, transformers.Dinov2Config, **SIZE, mlp_ratio=2),
    "dinov2, gated": small(
        transformers.Dinov2Model, transformers.Dinov2Config, **SIZE, use_swiglu_ffn=True
    ),
    "dinov2, classifier": small(
        transformers.Dinov2ForImageClassification,
        transformers.Dinov2Config,
        **SIZE,
        mlp_ratio=2,
        num_labels=5,
    ),
    "dinov2, backbone": backbone(
        transformers.Dinov2Backbone, transformers.Dinov2Config, **SIZE, mlp_ratio=2
    ),
    "dinov2, registers": small(
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        **SIZE,
        mlp_ratio=2,
        num_register_tokens=3,
    ),
    "dinov2, registers, classifier": small(
        transformers.Dinov2WithRegistersForImageClassification,
        transformers.Dinov2WithRegistersConfig,
        **SIZE,
        mlp_ratio=2,
        num_register_tokens=3,
        num_labels=5,
    ),
    "dinov2, registers, backbone": backbone(
        transformers.Dinov2WithRegistersBackbone,
        transformers.Dinov2WithRegistersConfig,
        **SIZE,
        mlp_ratio=2,
        num_register_tokens=3,
    ),
    "dinov3": small(
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig,
        **ROTARY,
        num_register_tokens=3,
    ),
    "dinov3, gated, backbone": backbone(
        transformers.DINOv3ViTBackbone,
        transformers.DINOv3ViTConfig,
        **ROTARY,
        num_register_tokens=3,
        use_gated_mlp=True,
    ),
}

# Newer than the oldest version that is supported.
if hasattr(transformers, "Tipsv2VisionModel"):
    SMALL |= {
        "tipsv2": small(
            transformers.Tipsv2VisionModel, transformers.Tipsv2VisionConfig, **SIZE, mlp_ratio=2
        ),
        "tipsv2, backbone": backbone(
            transformers.Tipsv2VisionBackbone, transformers.Tipsv2VisionConfig, **SIZE, mlp_ratio=2
        ),
    }
if hasattr(transformers, "RadioModel"):
    SMALL |= {
        "radio": Small(
            radio, images, twins, hidden_states, answer=lambda outputs: outputs.last_hidden_state
        ),
    }
if hasattr(transformers, "Sapiens2Model"):
    SMALL |= {
        # Two queries share a key, and both are normed by head.
        "sapiens2": small(
            transformers.Sapiens2Model,
            transformers.Sapiens2Config,
            **{**ROTARY, "num_attention_heads": 4},
            num_register_tokens=2,
            num_key_value_heads_per_layer=[4, 2, 2, 4],
            use_qk_norm=True,
            use_gated_mlp=True,
        ),
        "sapiens2, backbone": backbone(
            transformers.Sapiens2Backbone,
            transformers.Sapiens2Config,
            **ROTARY,
            num_register_tokens=2,
        ),
    }
