"""timm's VisionTransformer, with its kinds of blocks, heads and prefix tokens."""

from __future__ import annotations

import timm
import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from families import Small, two_pictures, visible

SIZE = {"embed_dim": 32, "num_heads": 2, "depth": 4, "num_classes": 5}


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64)


def twins(model: nn.Module) -> Tensor:
    if model.pos_embed is not None:
        nn.init.zeros_(model.pos_embed)
    pool = getattr(model.attn_pool, "pos_embed", None)
    if pool is not None:
        nn.init.zeros_(pool)
    return two_pictures((64, 64), (16, 16))


def features(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The features behind every block, [batch, sequence, dim]."""
    prefix = model.num_prefix_tokens > 0
    taken = model.forward_intermediates(
        inputs, output_fmt="NLC", return_prefix_tokens=prefix, intermediates_only=True
    )
    return [torch.cat([one[1], one[0]], 1) for one in taken] if prefix else taken


def strong(model: nn.Module) -> nn.Module:
    """Weights as strong as trained ones: with those that timm starts from, attention is even and
    nothing depends on it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def small(
    name: str,
    refuses: dict[str, str] | None = None,
    counts_class: bool = True,
    counted: str = "mlp",
    **options: object,
) -> Small:
    def build() -> nn.Module:
        sizes = {"img_size": 64, "patch_size": 16, **SIZE}
        return strong(visible(timm.create_model(name, **{**sizes, **options})))

    return Small(
        build,
        images,
        twins,
        features,
        counted,
        behind=counted != "mlp",
        refuses=refuses,
        counts_class=counts_class,
    )


SMALL = {
    "deit": small("deit_tiny_patch16_224"),
    "deit3": small("deit3_small_patch16_224"),
    "dinov2, registers": small("vit_small_patch14_reg4_dinov2"),
    "siglip, attention pooling": small("vit_base_patch16_siglip_224"),
    "average pooling": small("vit_tiny_patch16_224", global_pool="avg"),
    "QK-norm": small("vit_tiny_patch16_224", qk_norm=True),
    "parallel": small(
        "vit_tiny_patch16_224",
        counted="in_proj",
        block_fn=vision_transformer.ParallelScalingBlock,
        qk_norm=True,
    ),
    "norm behind": small("vit_tiny_patch16_224", block_fn=vision_transformer.ResPostBlock),
}

if hasattr(vision_transformer, "DiffAttention"):  # since timm 1.0.23
    SMALL["differential attention"] = small(
        "vit_tiny_patch16_224",
        dict.fromkeys(("topk", "evit"), "attention that DiffAttention pays"),
        attn_layer="diff",
    )
