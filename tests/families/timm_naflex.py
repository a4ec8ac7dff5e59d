"""NaFlexVit of timm, on plain images; tests/test_timm_naflex.py has padded batches."""

from __future__ import annotations

from typing import Any

from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn

from families import Small, if_it_exists, two_pictures, visible
from families.timm_eva import features, images, strong, turn_nothing

SIZE: dict[str, Any] = {
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "pos_embed_grid_size": (4, 4),
}


def twins(model: nn.Module) -> Tensor:
    for name, parameter in model.embeds.named_parameters():
        if name.startswith("pos_embed"):
            nn.init.zeros_(parameter)
    if getattr(model, "rope", None) is not None:  # older versions have none
        turn_nothing(model.rope)
    return two_pictures((64, 64), (16, 16))


@if_it_exists
def make(**options: Any) -> nn.Module:
    return strong(visible(NaFlexVit(NaFlexVitCfg(**{**SIZE, **options}), num_classes=5)))


def small(**options: Any) -> Small:
    return Small(lambda: make(**options), images, twins, features)


SMALL = {
    "averaging": small(reg_tokens=2, init_values=1e-5, global_pool="avg"),
    "map": small(pos_embed="factorized"),
    "map, with prefix": small(reg_tokens=1, pool_include_prefix=True, qk_norm=True),
    "class token": small(class_token=True, global_pool="token", pre_norm=True),
    "axial": small(
        class_token=True, rope_type="axial", pos_embed="none", swiglu_mlp=True, global_pool="avg"
    ),
    "mixed": small(class_token=True, rope_type="mixed", attn_type="eva", init_values=1e-5),
    "dinov3": small(
        class_token=True,
        reg_tokens=4,
        rope_type="dinov3",
        rope_rotate_half=True,
        global_pool="avgmax",
    ),
    "gated": small(
        class_token=True, attn_gated=True, attn_type="rope", num_kv_heads=1, qkv_fused=False
    ),
}
