"""open_clip's VisionTransformer, alone and in its CLIP and CoCa models."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from families import Small, two_pictures, visible

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def tower(**options: Any) -> nn.Module:
    return visible(
        VisionTransformer(
            image_size=64,
            patch_size=16,
            width=32,
            layers=4,
            heads=2,
            mlp_ratio=2,
            output_dim=32,
            **options,
        )
    )


def custom() -> nn.Module:
    model = tower(
        qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
    )
    # open_clip's own gradient checkpointing hands these blocks more than they take.
    model.set_grad_checkpointing = None
    return model


def vision(**options: Any) -> dict[str, Any]:
    return {
        "image_size": 64,
        "patch_size": 16,
        "width": 32,
        "layers": 4,
        "head_width": 16,
        **options,
    }


def clip() -> nn.Module:
    return visible(open_clip.CLIP(16, vision(ls_init_value=0.1), TEXT))


def coca() -> nn.Module:
    pool = vision(
        attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4, output_tokens=True
    )
    decoder = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = open_clip.CoCa(32, decoder, text, pool)
    nn.init.normal_(model.text_decoder.text_projection, std=0.2)  # left uninitialized
    return visible(model)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64)


def pairs(batch: int) -> dict[str, Tensor]:
    return {"image": images(batch), "text": torch.randint(1, 49, (batch, 8))}


def twins(model: nn.Module) -> Tensor:
    nn.init.zeros_(getattr(model, "visual", model).positional_embedding)
    return two_pictures((64, 64), (16, 16))


def twin_pairs(model: nn.Module) -> dict[str, Tensor]:
    return {**pairs(2), "image": twins(model)}


def features(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What `forward_intermediates` gives, put together again."""
    image = inputs if isinstance(inputs, Tensor) else inputs["image"]
    out = getattr(model, "visual", model).forward_intermediates(
        image, output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    parts = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
    return [torch.cat(part, 1) for part in parts]


def caption(outputs: Any) -> Tensor:
    """The image's own embedding, and the words that were predicted from its tokens."""
    words: Tensor = outputs["logits"]
    return torch.cat([outputs["image_features"], words.flatten(1)], 1)


def plain(**options: Any) -> Small:
    return Small(lambda: tower(**options), images, twins, features)


SMALL = {
    "clip": Small(clip, pairs, twin_pairs, features),
    "coca": Small(coca, pairs, twin_pairs, features, answer=caption),
    "tower": plain(),
    "averaging": plain(pool_type="avg"),
    "averaging, norm after": plain(pool_type="avg", final_ln_after_pool=True, no_ln_pre=True),
    "pooling by attention": plain(
        attentional_pool="parallel", attn_pooler_heads=2, attn_pooler_queries=4
    ),
    "custom blocks": Small(custom, images, twins, features),
}
