"""BEiT and Data2Vec-Vision of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from families import Small, hidden_states, two_pictures, visible

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
    "initializer_range": 0.1,
    "num_labels": 5,
}


def images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def twins(model: nn.Module) -> dict[str, Tensor]:
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embeddings", "relative_position_bias_table")):
            nn.init.zeros_(parameter)
    return {"pixel_values": two_pictures((64, 64), (16, 16))}


def make(cls: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: visible(cls(transformers.BeitConfig(**{**SIZE, **options})))


def small(cls: Any, **options: Any) -> Small:
    return Small(make(cls, **options), images, twins, hidden_states)


def data2vec(cls: Any, **options: Any) -> Small:
    def build() -> nn.Module:
        return visible(cls(transformers.Data2VecVisionConfig(**{**SIZE, **options})))

    return Small(build, images, twins, hidden_states, counted="intermediate")


def maps(outputs: Any) -> Tensor:
    return torch.cat([feature_map.flatten(2) for feature_map in outputs.feature_maps], 1)


SMALL = {
    "beit": small(
        transformers.BeitModel, use_absolute_position_embeddings=True, use_mean_pooling=False
    ),
    "beit, bias in every layer": small(
        transformers.BeitForImageClassification, use_relative_position_bias=True
    ),
    "beit, shared bias": small(
        transformers.BeitForImageClassification,
        use_shared_relative_position_bias=True,
        use_mean_pooling=False,
    ),
    # Both biases, and no layer scale.
    "beit, masked": small(
        transformers.BeitForMaskedImageModeling,
        use_relative_position_bias=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.0,
        vocab_size=7,
    ),
    "beit, segmentation": small(
        transformers.BeitForSemanticSegmentation,
        use_relative_position_bias=True,
        out_indices=[1, 2, 3, 4],
    ),
    "beit, backbone": Small(
        make(
            transformers.BeitBackbone,
            use_relative_position_bias=True,
            out_features=["stage2", "stage4"],
        ),
        images,
        twins,
        hidden_states,
        answer=maps,
    ),
    "data2vec": data2vec(
        transformers.Data2VecVisionModel,
        use_absolute_position_embeddings=True,
        use_mean_pooling=False,
    ),
    "data2vec, bias in every layer": data2vec(
        transformers.Data2VecVisionForImageClassification, use_relative_position_bias=True
    ),
    "data2vec, shared bias": data2vec(
        transformers.Data2VecVisionForImageClassification,
        use_shared_relative_position_bias=True,
        use_mean_pooling=False,
        layer_scale_init_value=0.0,
    ),
    "data2vec, both, eager": data2vec(
        transformers.Data2VecVisionForImageClassification,
        use_relative_position_bias=True,
        use_shared_relative_position_bias=True,
        attn_implementation="eager",
    ),
    "data2vec, segmentation": data2vec(
        transformers.Data2VecVisionForSemanticSegmentation,
        use_relative_position_bias=True,
        use_shared_relative_position_bias=True,
        out_indices=[1, 2, 3, 4],
    ),
}
