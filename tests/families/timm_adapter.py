"""ViT-Adapter on a small ViT of timm."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from families import Small, two_pictures, visible
from families.timm_vit import SIZE, images, strong
from tokred.models.vit_adapter import ViTAdapter


def twins(model: nn.Module) -> Tensor:
    """Equal patches stay equal if all are injected the same: what lies at the middle of each, in
    maps that are the same everywhere."""
    if model.vit.pos_embed is not None:
        nn.init.zeros_(model.vit.pos_embed)
    with torch.no_grad():
        for injector in model.injectors:
            attention = injector.attention
            for part in (attention.offsets, attention.weights):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
            # At the coarsest map, points of the outermost patches are beyond the edge.
            attention.weights.bias.view(attention.shape)[:, 2] = -100.0
            nn.init.zeros_(attention.value.weight)
    return two_pictures((64, 64), (16, 16))


def small(interactions: int = 4, name: str = "vit_tiny_patch16_224", **options: object) -> Small:
    def build() -> nn.Module:
        size = {"img_size": 64, "patch_size": 16, "dynamic_img_size": True, **SIZE}
        vit = timm.create_model(name, **{**size, **options})
        return strong(visible(ViTAdapter(vit, interactions, heads=2, stem_width=8)))

    return Small(
        build, images, twins, answer=lambda maps: torch.cat([m.flatten(1) for m in maps], 1)
    )


SMALL = {
    "a block between interactions": small(),
    "two blocks between interactions, registers": small(2, "vit_wee_patch16_reg1_gap_256"),
    "no class token": small(class_token=False, global_pool="avg"),
}
