"""ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA and ViViT of transformers."""

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
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}


def images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def twins(model: nn.Module) -> dict[str, Tensor]:
    for name, parameter in model.named_parameters():
        if name.endswith("position_embeddings"):
            nn.init.zeros_(parameter)
    return {"pixel_values": two_pictures((64, 64), (16, 16))}


def make(cls: Any, config: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: visible(cls(config(**SIZE, **options)))


def make_video(cls: Any) -> Callable[[], nn.Module]:
    size = {name: value for name, value in SIZE.items() if name != "patch_size"}
    config = transformers.VivitConfig(
        **size, num_frames=4, tubelet_size=[2, 16, 16], num_labels=5, initializer_range=0.1
    )
    return lambda: visible(cls(config))


def small(cls: Any, config: Any, **options: Any) -> Small:
    return Small(make(cls, config, **options), images, twins, hidden_states)


def unmasked(batch: int) -> dict[str, Tensor]:
    """ViT-MAE shuffles by the noise that it is given."""
    return {**images(batch), "noise": torch.rand(batch, 16)}


def unmasked_twins(model: nn.Module) -> dict[str, Tensor]:
    nn.init.zeros_(model.embeddings.position_embeddings)
    return {**twins(model), "noise": torch.rand(2, 16)}


def video(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 4, 3, 64, 64)}


def video_twins(model: nn.Module) -> dict[str, Tensor]:
    frame = twins(model)["pixel_values"]
    return {"pixel_values": frame[:, None].expand(-1, 4, -1, -1, -1)}


SMALL = {
    "vit": small(transformers.ViTModel, transformers.ViTConfig),
    "vit, classifier": small(
        transformers.ViTForImageClassification, transformers.ViTConfig, num_labels=5
    ),
    "deit, distilled": small(
        transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig, num_labels=5
    ),
    "vit-msn": small(
        transformers.ViTMSNForImageClassification, transformers.ViTMSNConfig, num_labels=5
    ),
    "ijepa": small(transformers.IJepaModel, transformers.IJepaConfig),
    "ijepa, averaging": small(
        transformers.IJepaForImageClassification, transformers.IJepaConfig, num_labels=5
    ),
    "vivit": Small(
        make_video(transformers.VivitForVideoClassification), video, video_twins, hidden_states
    ),
    "vit-mae": Small(
        make(transformers.ViTMAEModel, transformers.ViTMAEConfig, mask_ratio=0.0),
        unmasked,
        unmasked_twins,
        hidden_states,
    ),
}
