"""torchvision's VisionTransformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from families import Small, two_pictures, visible


def make(**options: Any) -> Callable[[], nn.Module]:
    return lambda: visible(
        VisionTransformer(
            image_size=64,
            patch_size=16,
            num_layers=4,
            hidden_dim=32,
            mlp_dim=64,
            num_classes=5,
            **options,
        )
    )


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64)


def twins(model: VisionTransformer) -> Tensor:
    nn.init.zeros_(model.encoder.pos_embedding)
    return two_pictures((64, 64), (16, 16))


SMALL = {
    # With an even number of heads, attention that has no mask runs in a kernel of its own.
    "vit": Small(make(num_heads=2), images, twins),
    "vit, odd heads": Small(make(num_heads=1, representation_size=16), images, twins),
    # Equal patches cannot be had: convolutions look across their borders.
    "vit, convolutional stem": Small(
        make(
            num_heads=2,
            conv_stem_configs=[ConvStemConfig(8, 3, 2) for _ in range(4)],
            attention_dropout=0.1,
        ),
        images,
    ),
}
