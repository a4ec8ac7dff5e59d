"""timm's DeepSeek vision transformers: the encoder with each kind of pooling, and a classifier."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from families import Small, two_pictures, visible
from families.timm_vit import strong

SIZE = {"embed_dim": 32, "num_heads": 2, "depth": 4, "out_features": 24}
AVERAGED = dict.fromkeys(("topk",), "averaged on their grid")


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 56, 70)


def twins(model: nn.Module) -> Tensor:
    inside = getattr(model, "encoder", model)
    inside.rope.bands.zero_()  # no rotation: positions are blank
    return two_pictures((56, 70), (14, 14))


def features(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The features behind every block, [batch, sequence, dim]."""
    taken: list[Tensor] = model.forward_intermediates(
        inputs, output_fmt="NLC", intermediates_only=True
    )
    return taken


def small(name: str, refuses: dict[str, str] | None = None, **options: object) -> Small:
    def build() -> nn.Module:
        sizes = {"img_size": (56, 70), **SIZE, **options}
        return strong(visible(timm.create_model(name, **sizes)))

    return Small(build, images, twins, features, refuses=refuses)


SMALL = {
    "projector": small("deepseek_vit_412m_enc"),
    "features": small("deepseek_vit_412m_enc", global_pool=""),
    "average": small("deepseek_vit_412m_enc", AVERAGED, global_pool="avg"),
    "classifier": small("deepseek_vit_412m", AVERAGED, num_classes=5),
}
