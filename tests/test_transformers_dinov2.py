"""The DINO ViTs of transformers: rotary positions, the attention that is read, and dense models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import transformers
from families import visible
from families.transformers_dinov2 import ROTARY, SIZE, make
from torch import Tensor, nn

import tokred
from tokred.reducers import Tokens
from tokred.reducers.topk import TopK

REGISTERS = {**ROTARY, "num_register_tokens": 2}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def given(module: nn.Module) -> list[dict[str, Any]]:
    """What a module is going to be given by name."""
    seen: list[dict[str, Any]] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_every_token_is_rotated_by_its_own_position(method: str) -> None:
    torch.manual_seed(0)
    model = make(transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig, **REGISTERS)()
    tables = model.rope_embeddings(IMAGES)
    reduction = tokred.apply(model, method, schedule=tokred.Exactly((9, 9, 5, 5)))
    seen = [given(layer.attention) for layer in model.model.layer]
    with reduction.recording() as records:
        model(IMAGES)
    first, second = (record.map.representatives() for record in records)
    for layer, index in [(1, first), (2, first), (3, first.gather(1, second))]:
        for got, table in zip(seen[layer][0]["position_embeddings"], tables, strict=True):
            assert torch.equal(got, table[index][:, None])
    assert seen[0][0]["position_embeddings"][0].shape == tables[0].shape


@dataclass(frozen=True)
class Watching(TopK):
    """Top-K that keeps the attention that it is shown."""

    seen: list[Tensor] = field(default_factory=list, compare=False)
    needs: ClassVar[frozenset[str]] = frozenset({"class_attention"})

    def __call__(self, tokens: Tokens, keep: int) -> Any:
        assert tokens.class_attention is not None
        self.seen.append(tokens.class_attention)
        return super().__call__(tokens, keep)


@torch.no_grad()
@pytest.mark.parametrize("family", ["DINOv3ViT", "Sapiens2"])
def test_class_attention_is_what_the_model_pays(family: str) -> None:
    """Behind rotation, norms by head, and keys that queries share."""
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip("this version of transformers does not have it")
    options: dict[str, Any] = dict(REGISTERS, num_attention_heads=4)
    if family == "Sapiens2":
        options |= {"num_key_value_heads_per_layer": [4, 2, 2, 4], "use_qk_norm": True}
    config = getattr(transformers, f"{family}Config")(**options, attn_implementation="eager")
    torch.manual_seed(0)
    model = visible(getattr(transformers, f"{family}Model")(config))
    method = Watching()
    tokred.apply(model, method, schedule=tokred.Exactly((12, 8, 5, 5)))
    attentions = model(IMAGES, output_attentions=True).attentions
    assert len(method.seen) == 3
    for seen, attention in zip(method.seen, attentions, strict=False):
        torch.testing.assert_close(seen, attention[:, :, 0, 3:], rtol=1e-4, atol=1e-6)


def dinov2_backbone(reshape: bool) -> transformers.Dinov2Config:
    return transformers.Dinov2Config(
        **SIZE,
        mlp_ratio=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=reshape,
        apply_layernorm=True,
    )


def depth_anything() -> nn.Module:
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=dinov2_backbone(reshape=False),
            patch_size=16,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )
    )


def dpt() -> nn.Module:
    return transformers.DPTForDepthEstimation(
        transformers.DPTConfig(
            backbone_config=dinov2_backbone(reshape=False),
            is_hybrid=False,
            patch_size=16,
            neck_hidden_sizes=[8, 8, 16, 16],
            reassemble_factors=[4, 2, 1, 0.5],
            fusion_hidden_size=8,
        )
    )


def upernet() -> nn.Module:
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=dinov2_backbone(reshape=True),
            hidden_size=8,
            use_auxiliary_head=False,
            num_labels=5,
        )
    )


@torch.no_grad()
@pytest.mark.parametrize("method", ["atc", "topk"])
@pytest.mark.parametrize("build", [depth_anything, dpt, upernet])
def test_depth_and_segmentation_keep_their_shape(build: Any, method: str) -> None:
    torch.manual_seed(0)
    model = build().eval()
    dense = model(IMAGES)[0]
    tokred.apply(model, method, keep_rate=0.5)
    reduced = model(IMAGES)[0]
    assert reduced.shape == dense.shape and reduced.isfinite().all()
    assert not torch.equal(reduced, dense)
    tokred.remove(model)
    assert torch.equal(model(IMAGES)[0], dense)


@torch.no_grad()
def test_other_image_sizes_give_feature_maps_of_theirs() -> None:
    config = transformers.DINOv3ViTConfig(**REGISTERS, out_features=["stage2", "stage4"])
    torch.manual_seed(0)
    model = transformers.AutoBackbone.from_config(config).eval()
    tokred.apply(model, "tome", keep_rate=0.5)
    maps = model(torch.randn(2, 3, 96, 48)).feature_maps
    assert [feature_map.shape for feature_map in maps] == [(2, 32, 6, 3)] * 2


@pytest.mark.parametrize("family", ["Eomt", "EomtDinov3"])
def test_queries_that_join_in_the_middle_are_not_supported(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**ROTARY, num_queries=3, num_blocks=2)
    model = getattr(transformers, f"{family}ForUniversalSegmentation")(config)
    with pytest.raises(tokred.UnsupportedModelError, match="no patch for"):
        tokred.apply(model, "tome")


@pytest.mark.skipif(not hasattr(transformers, "RadioConfig"), reason="newer transformers")
def test_images_packed_into_one_sequence_are_refused() -> None:
    config = transformers.RadioConfig(**SIZE, max_img_size=128)
    model = transformers.RadioModel(config).eval()
    tokred.apply(model, "tome")
    patches, grids = torch.randn(12, 3 * 16 * 16), torch.tensor([[2, 3], [3, 2]])
    with pytest.raises(ValueError, match="packed into one sequence cannot be reduced"):
        model(patches, image_grid_hw=grids)
