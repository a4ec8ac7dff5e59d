"""BEiT of timm."""

from __future__ import annotations

import timm
from torch import Tensor, nn

from families import Small, two_pictures, visible
from families.timm_vit import SIZE, features, images, strong


def twins(model: nn.Module) -> Tensor:
    for name, parameter in model.named_parameters():
        if name.endswith(("pos_embed", "relative_position_bias_table")):
            nn.init.zeros_(parameter)
    return two_pictures((64, 64), (16, 16))


def small(name: str = "beit_base_patch16_224", fused: bool = True, **options: object) -> Small:
    def build() -> nn.Module:
        model = timm.create_model(name, img_size=64, **SIZE, **options)
        for block in model.blocks:
            block.attn.fused_attn = fused
        return strong(visible(model))

    return Small(build, images, twins, features)


PLAIN = {"init_values": None, "qkv_bias": False, "use_rel_pos_bias": False, "use_abs_pos_emb": True}

SMALL = {
    "beit": small(),
    "beit, not fused": small(fused=False),
    "beit v2, class token": small("beitv2_base_patch16_224", global_pool="token"),
    "shared biases": small(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "both biases, not fused": small(fused=False, use_shared_rel_pos_bias=True),
    "no biases": small(**PLAIN),
}
