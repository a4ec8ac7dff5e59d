"""VisionTransformerRelPos of timm."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from families import Small, two_pictures, visible
from families.timm_vit import SIZE, features, images, strong


def twins(model: nn.Module) -> Tensor:
    """Biases are 0, or the same everywhere where a class token has none."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name and not name.endswith(("fc1.weight", "fc1.bias")):
                parameter.zero_()
    return two_pictures((64, 64), (16, 16))


def small(name: str, fused: bool = True, **options: object) -> Small:
    def build() -> nn.Module:
        model = timm.create_model(name, img_size=64, **SIZE, **options)
        for block in model.blocks:
            block.attn.fused_attn = fused
        return strong(visible(model))

    return Small(build, images, twins, features)


SMALL = {
    "mlp": small("vit_relpos_small_patch16_224"),
    "mlp, not fused": small("vit_relpos_small_patch16_224", fused=False),
    "bias, class token": small(
        "vit_relpos_base_patch16_224", rel_pos_type="bias", class_token=True, global_pool="token"
    ),
    "shared": small("vit_srelpos_small_patch16_224"),
    "class token": small("vit_relpos_base_patch16_cls_224"),
    "norm behind": small("vit_relpos_base_patch16_rpn_224"),
    "norm behind, shared": small("vit_relpos_base_patch16_rpn_224", shared_rel_pos=True),
}
