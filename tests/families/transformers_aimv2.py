"""AIMv2 and the tower of Ovis2."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionModel

from families import Small, hidden_states, two_pictures, visible
from families.transformers_maskless import lively

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
        if name.endswith("position_embedding.weight"):
            nn.init.zeros_(parameter)
    return {"pixel_values": two_pictures((64, 64), (16, 16))}


def aimv2(**options: Any) -> nn.Module:
    return lively(transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**SIZE, **options)))


def ovis2() -> nn.Module:
    return visible(Ovis2VisionModel(Ovis2VisionConfig(**SIZE, vocab_size=25)))


SMALL = {
    "aimv2": Small(aimv2, images, twins, hidden_states, "ffn"),
    "aimv2, headless": Small(lambda: aimv2(use_head=False), images, twins, hidden_states, "ffn"),
    # Its positions are computed: equal patches cannot be had.
    "aimv2, native": Small(lambda: aimv2(is_native=True), images, None, hidden_states, "ffn"),
    # The host's own last hidden states are what leaves the tower, behind its norm.
    "ovis2": Small(ovis2, images, twins, counted="ffn"),
}
