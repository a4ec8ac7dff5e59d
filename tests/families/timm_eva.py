"""EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT and Sapiens2 of timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from families import Small, if_it_exists, two_pictures, visible

SIZE: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64)


def features(model: nn.Module, inputs: Any) -> list[Tensor]:
    prefix = model.num_prefix_tokens
    options = {"output_fmt": "NLC", "intermediates_only": True}
    taken = model.forward_intermediates(inputs, return_prefix_tokens=prefix > 0, **options)
    return [torch.cat([one[1], one[0]], 1) for one in taken] if prefix else taken


@torch.no_grad()
def turn_nothing(rope: nn.Module) -> None:
    """Makes rotations by nothing: the sine of all angles 0, the cosine 1."""
    for name, tensor in [*rope.named_buffers(), *rope.named_parameters()]:
        if name in ("bands", "inv_freq", "freqs"):
            tensor.zero_()
        elif name == "periods":
            tensor.fill_(torch.inf)
        elif name in ("pos_embed", "pos_embed_cached"):
            sine, cosine = tensor.chunk(2, -1)
            sine.zero_(), cosine.fill_(1)


def twins(model: nn.Module) -> Tensor:
    if model.pos_embed is not None:
        nn.init.zeros_(model.pos_embed)
    if model.rope is not None:
        turn_nothing(model.rope)
    return two_pictures((64, 64), (16, 16))


@torch.no_grad()
def strong(model: nn.Module) -> nn.Module:
    """Draws weights large enough for attention to tell tokens apart, which timm's are not yet."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=2 * module.in_features**-0.5)
    return model


@if_it_exists
def make(**options: Any) -> nn.Module:
    return strong(visible(Eva(**{**SIZE, **options})))


def small(**options: Any) -> Small:
    return Small(lambda: make(**options), images, twins, features)


ROPE: dict[str, Any] = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}

SMALL = {
    "eva": small(),
    "eva02": small(
        use_rot_pos_emb=True,
        ref_feat_shape=(8, 8),
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
    ),
    "eva02, class token": small(
        use_rot_pos_emb=True, swiglu_mlp=True, init_values=1e-5, global_pool="token"
    ),
    "post-norm": small(use_rot_pos_emb=True, use_post_norm=True),
    "dinov3": small(
        **ROPE,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=4,
        init_values=1e-5,
        use_fc_norm=False,
        dynamic_img_size=True,
    ),
    "perception encoder": small(
        use_rot_pos_emb=True,
        rope_grid_indexing="xy",
        rope_grid_offset=1.0,
        attn_type="rope",
        use_pre_transformer_norm=True,
        init_values=0.1,
        global_pool="map",
    ),
    "perception encoder, no class token": small(
        use_rot_pos_emb=True, attn_type="rope", class_token=False
    ),
    "rope-vit, axial": small(**ROPE, attn_type="rope", rope_rotate_half=True),
    "rope-vit, mixed": small(**ROPE, attn_type="rope", rope_type="mixed", init_values=1e-5),
    "sapiens2": small(
        **ROPE,
        attn_type="rope",
        rope_type="dinov3",
        num_heads=4,
        num_kv_heads=(4, 2, 1, 2),
        qkv_fused=False,
        qk_norm=True,
        num_reg_tokens=2,
        attn_only_layer_scale=True,
        init_values=1e-5,
        global_pool="token",
    ),
}
