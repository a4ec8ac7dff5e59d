"""The vision tower of InternVL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from families import Small, hidden_states, two_pictures, visible


def images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def twins(model: nn.Module) -> dict[str, Tensor]:
    nn.init.zeros_(model.embeddings.position_embeddings)
    return {"pixel_values": two_pictures((64, 64), (16, 16))}


def make(**options: Any) -> Callable[[], nn.Module]:
    config = transformers.InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        use_absolute_position_embeddings=True,
        **options,
    )
    return lambda: visible(transformers.InternVLVisionModel(config))


SMALL = {
    "internvl": Small(make(), images, twins, hidden_states),
    "internvl, norms": Small(
        make(use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=False),
        images,
        twins,
        hidden_states,
    ),
}
