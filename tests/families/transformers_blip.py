"""The vision towers of BLIP, BLIP-2 and InstructBLIP."""

from __future__ import annotations

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
    "initializer_range": 0.02,
}


def images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def twins(model: nn.Module) -> dict[str, Tensor]:
    nn.init.zeros_(model.embeddings.position_embedding)
    return {"pixel_values": two_pictures((64, 64), (16, 16))}


def small(cls: Any, config: Any) -> Small:
    return Small(lambda: visible(cls(config(**SIZE))), images, twins, hidden_states)


SMALL = {
    "blip": small(transformers.BlipVisionModel, transformers.BlipVisionConfig),
    "blip2": small(transformers.Blip2VisionModel, transformers.Blip2VisionConfig),
    "instructblip": small(
        transformers.InstructBlipVisionModel, transformers.InstructBlipVisionConfig
    ),
    "instructblipvideo": small(
        transformers.InstructBlipVideoVisionModel, transformers.InstructBlipVideoVisionConfig
    ),
}
