"""CLIP, SigLIP and the towers of transformers that are built like theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionTransformer

from families import Small, hidden_states, two_pictures, visible

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "projection_dim": 16,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def blank(model: nn.Module) -> None:
    """Takes all positions out."""
    for name, parameter in model.named_parameters():
        if name.endswith("position_embedding.weight"):
            nn.init.zeros_(parameter)


def twins(model: nn.Module) -> dict[str, Tensor]:
    blank(model)
    return {"pixel_values": two_pictures((64, 64), (16, 16))}


def make(cls: Any, config: Any) -> Callable[[], nn.Module]:
    return lambda: visible(cls(config))


def tower(cls: Any, config: Any, **options: Any) -> Small:
    return Small(make(cls, config(**{**SIZE, **options})), images, twins, hidden_states)


def embedded(outputs: Any) -> Tensor:
    return outputs.image_embeds


# SigLIP 2 is given patches; tests/test_transformers_clip.py does so with padding.


def patched(batch: int) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(batch, 16, 3 * 16 * 16),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.tensor([[4, 4]] * batch),
    }


def patched_twins(model: nn.Module) -> dict[str, Any]:
    blank(model)
    inputs = patched(2)
    pictures = inputs["pixel_values"][:, :2]
    first = (torch.arange(16) % 4 < 1)[:, None]
    return {**inputs, "pixel_values": torch.where(first, pictures[:, :1], pictures[:, 1:])}


SIGLIP2 = {name: value for name, value in SIZE.items() if name != "image_size"}
SIGLIP2["num_patches"] = 16


# Models of images and words.


def captioned(batch: int) -> dict[str, Tensor]:
    words = torch.tensor([[2, 7, 8, 1], [2, 9, 5, 1]])
    return {**images(batch), "input_ids": words[torch.arange(batch) % 2]}


def captioned_twins(model: nn.Module) -> dict[str, Tensor]:
    return {**captioned(2), **twins(model)}


def matched(outputs: Any) -> Tensor:
    return outputs.logits_per_image


def dual(config: Any, **options: Any) -> Any:
    return config(text_config=TEXT, vision_config={**SIZE, "projection_dim": 16}, **options)


SMALL = {
    "clip": tower(transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
    "clip, projected": Small(
        make(transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig(**SIZE)),
        images,
        twins,
        hidden_states,
        answer=embedded,
    ),
    "clip, averaging": Small(
        make(
            transformers.CLIPForImageClassification,
            dual(transformers.CLIPConfig, projection_dim=16, num_labels=5),
        ),
        images,
        twins,
        hidden_states,
    ),
    "clip, dual": Small(
        make(transformers.CLIPModel, dual(transformers.CLIPConfig, projection_dim=16)),
        captioned,
        captioned_twins,
        answer=matched,
    ),
    "siglip": tower(transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
    "siglip, headless": tower(
        transformers.SiglipVisionModel, transformers.SiglipVisionConfig, vision_use_head=False
    ),
    "siglip, averaging": Small(
        make(
            transformers.SiglipForImageClassification,
            transformers.SiglipConfig(text_config=TEXT, vision_config=SIZE, num_labels=5),
        ),
        images,
        twins,
        hidden_states,
    ),
    "siglip2": Small(
        make(transformers.Siglip2VisionModel, transformers.Siglip2VisionConfig(**SIGLIP2)),
        patched,
        patched_twins,
        hidden_states,
    ),
    "siglip2, averaging": Small(
        make(
            transformers.Siglip2ForImageClassification,
            transformers.Siglip2Config(text_config=TEXT, vision_config=SIGLIP2, num_labels=5),
        ),
        patched,
        patched_twins,
        hidden_states,
        refuses={"topk": "use a method that merges"},
    ),
    "metaclip2": tower(transformers.MetaClip2VisionModel, transformers.MetaClip2VisionConfig),
    "altclip": tower(transformers.AltCLIPVisionModel, transformers.AltCLIPVisionConfig),
    "chinese clip": tower(
        transformers.ChineseCLIPVisionModel, transformers.ChineseCLIPVisionConfig
    ),
    "clipseg": tower(transformers.CLIPSegVisionModel, transformers.CLIPSegVisionConfig),
    "owlvit": tower(transformers.OwlViTVisionModel, transformers.OwlViTVisionConfig),
    "owlv2": Small(
        make(
            transformers.Owlv2ForObjectDetection, dual(transformers.Owlv2Config, projection_dim=32)
        ),
        captioned,
        captioned_twins,
    ),
    "git": tower(transformers.GitVisionModel, transformers.GitVisionConfig),
    "idefics2": tower(
        Idefics2VisionTransformer,
        transformers.models.idefics2.configuration_idefics2.Idefics2VisionConfig,
    ),
    "idefics3": tower(
        transformers.Idefics3VisionTransformer,
        transformers.models.idefics3.configuration_idefics3.Idefics3VisionConfig,
    ),
    "smolvlm": tower(
        transformers.SmolVLMVisionTransformer,
        transformers.models.smolvlm.configuration_smolvlm.SmolVLMVisionConfig,
    ),
    "janus": Small(
        make(
            transformers.JanusVisionModel,
            transformers.models.janus.configuration_janus.JanusVisionConfig(**SIZE, mlp_ratio=2.0),
        ),
        images,
        twins,
        hidden_states,
        # The host's pooled output is its first patch, which Janus itself does not use.
        refuses={"topk": "takes its first patch"},
        answer=lambda outputs: outputs.last_hidden_state,
    ),
    "kosmos2": tower(
        Kosmos2VisionTransformer,
        transformers.models.kosmos2.configuration_kosmos2.Kosmos2VisionConfig,
    ),
}
