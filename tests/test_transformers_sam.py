"""SAM, what else is built of SAM's vision encoder, and ViTDet: that what they hand out is the full
map. (What happens in their windows is tried in test_windows.py.)"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import timm
import torch
import transformers
from families import _swin, if_it_exists
from torch import Tensor, nn

import tokred
from tokred.schedule import Hourglass

# 8x8 tokens in windows of 4x4, which become 3x3; layers 1 and 3 attend to all of them.
SIZE = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "window_size": 4,
}
SAM = {**SIZE, "global_attn_indexes": [1, 3], "mlp_dim": 64, "output_channels": 16}
PP = {"post_conv_in_channels": 16, "post_conv_mid_channels": 8, "post_conv_out_channels": 8}
MIDDLE = Hourglass(grid=(3, 3), down=1, up=3)
KEEP_ALL = Hourglass(grid=(4, 4))

# The module of each encoder, its class, and its configuration.
ENCODERS = {
    "sam": ("SamVisionEncoder", "SamVisionConfig"),
    "sam_hq": ("SamHQVisionEncoder", "SamHQVisionConfig"),
    "got_ocr2": ("GotOcr2VisionEncoder", "GotOcr2VisionConfig"),
    "deepseek_ocr2": ("DeepseekOcr2SamVisionEncoder", "DeepseekOcr2SamVisionConfig"),
    "unlimited_ocr": ("UnlimitedOcrSamVisionEncoder", "UnlimitedOcrSamVisionConfig"),
    "slanext": ("SLANeXtVisionEncoder", "SLANeXtVisionConfig"),
    "pp_formulanet": ("PPFormulaNetVisionModel", "PPFormulaNetVisionConfig"),
}


def strong(model: nn.Module) -> nn.Module:
    """Weights under which images matter, too."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            nn.init.normal_(parameter, std=0.5 if "pos" in name else 0.2)
    return _swin.strong(model)


def encoder(name: str) -> nn.Module:
    try:
        modeling = import_module(f"transformers.models.{name}.modeling_{name}")
        configuration = import_module(f"transformers.models.{name}.configuration_{name}")
    except ModuleNotFoundError:
        pytest.skip("not in this version of transformers")
    cls, config = ENCODERS[name]
    size = {**SAM, **(PP if name == "pp_formulanet" else {})}
    return strong(getattr(modeling, cls)(getattr(configuration, config)(**size)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def keep_all(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tokred.apply(model, "slic", KEEP_ALL)


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_hands_out_full_maps(name: str, x: Tensor) -> None:
    model = encoder(name)
    dense = model(x, output_hidden_states=True)
    keep_all(model)
    assert torch.equal(model(x).last_hidden_state, dense.last_hidden_state)
    tokred.apply(model, "slic", MIDDLE)
    assert [stage.after for stage in tokred.inspect(model, x).stages] == [36]
    few = model(x)[0]
    assert few.shape == dense[0].shape and few.isfinite().all()
    assert torch.equal(model(x)[0], few) and not torch.allclose(few, dense[0], rtol=1e-3)
    handed = model(x, output_hidden_states=True)
    assert torch.equal(handed[0], few), "the few tokens go on as if nobody had looked"
    shapes = [tuple(y.shape) for y in handed.hidden_states]
    assert shapes == [tuple(y.shape) for y in dense.hidden_states]
    assert torch.equal(handed.hidden_states[1], dense.hidden_states[1])
    tokred.remove(model)
    assert torch.equal(model(x)[0], dense[0])


@torch.no_grad()
def test_the_decoder_of_sam_hq_reads_full_maps(x: Tensor) -> None:
    model = encoder("sam_hq")
    dense = model(x).intermediate_embeddings
    assert len(dense) == 2
    tokred.apply(model, "slic", MIDDLE)
    few = model(x).intermediate_embeddings
    assert [y.shape for y in few] == [y.shape for y in dense]
    assert not torch.allclose(few[0], dense[0], rtol=1e-3)


@torch.no_grad()
def test_sam_segments_with_fewer_tokens(x: Tensor) -> None:
    config = transformers.SamConfig(
        vision_config={**SAM, "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    model = strong(transformers.SamModel(config))
    points = {"input_points": torch.tensor([[[[5.0, 9.0]]], [[[20.0, 11.0]]]])}
    dense = model(x, **points).pred_masks
    keep_all(model)
    assert torch.equal(model(x, **points).pred_masks, dense)
    tokred.apply(model, "slic", MIDDLE)
    few = model(x, **points).pred_masks
    assert few.shape == dense.shape and few.isfinite().all() and not torch.equal(few, dense)
    tokred.remove(model)
    assert torch.equal(model(x, **points).pred_masks, dense)


def vitdet(cls: Any, **options: Any) -> nn.Module:
    config = transformers.VitDetConfig(
        **SIZE, pretrain_image_size=32, window_block_indices=[0, 2],
        use_relative_position_embeddings=True, **options,
    )  # fmt: skip
    return strong(cls(config))


@torch.no_grad()
def test_backbones_hand_out_the_maps_they_were_built_for(x: Tensor) -> None:
    model = vitdet(transformers.VitDetBackbone, out_features=["stage2", "stage3"])
    dense = model(x).feature_maps
    tokred.apply(model, "slic", MIDDLE)
    expanded: list[int] = []
    for layer, block in enumerate(model.encoder.layer):
        block.register_forward_hook(
            lambda _, args, y, layer=layer: y[0].shape[2] == 8 and expanded.append(layer)
        )
    few = model(x).feature_maps
    assert expanded == [0, 1, 2, 3], "but for layers 1 and 2, no more than the schedule has them"
    assert [y.shape for y in few] == [y.shape for y in dense]
    assert not torch.allclose(few[0], dense[0], rtol=1e-3)
    everything = model(x, output_hidden_states=True)
    assert torch.equal(everything.feature_maps[1], few[1])
    assert {tuple(y.shape) for y in everything.hidden_states} == {(2, 32, 8, 8)}


@torch.no_grad()
def test_nothing_is_made_full_that_nobody_asks_for(x: Tensor) -> None:
    model = vitdet(transformers.VitDetModel)
    tokred.apply(model, "slic", MIDDLE)
    sides: list[int] = []
    for block in model.encoder.layer:
        block.register_forward_hook(lambda _, args, y: sides.append(y[0].shape[2]))
    last = model(x).last_hidden_state
    assert sides == [8, 6, 6, 8]
    everything = model(x, output_hidden_states=True)
    assert sides[4:] == [8, 8, 8, 8]
    assert torch.equal(everything.last_hidden_state, last)
    model(x)
    assert sides[8:] == [8, 6, 6, 8]


def test_vitmatte_is_a_host() -> None:
    config = transformers.VitMatteConfig(
        backbone_config=transformers.VitDetConfig(
            **{**SIZE, "patch_size": 16, "image_size": 64, "window_size": 2}, num_channels=4,
            pretrain_image_size=64, window_block_indices=[0, 2], out_features=["stage4"],
        ),
        hidden_size=32, fusion_hidden_sizes=[16, 8, 8, 8], convstream_hidden_sizes=[8, 8, 8],
    )  # fmt: skip
    model = strong(transformers.VitMatteForImageMatting(config))
    x = torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        dense = model(x).alphas
        tokred.apply(model, "slic", Hourglass(grid=(1, 1), down=1))
        few = model(x).alphas
    assert few.shape == dense.shape and not torch.equal(few, dense)


def test_layers_that_convolve_are_refused() -> None:
    model = vitdet(transformers.VitDetBackbone, residual_block_indices=[1])
    with pytest.raises(tokred.UnsupportedModelError, match="layer 1 convolves over the feature"):
        tokred.apply(model, "slic")


def test_methods_without_a_grid_are_refused() -> None:
    model = encoder("sam")
    with pytest.raises(tokred.UnsupportedModelError, match=r"is on no grid.*use 'slic'"):
        tokred.apply(model, "tome")


@torch.no_grad()
@pytest.mark.parametrize("make", [transformers.VitDetModel, None])
def test_models_without_windows_are_one_window(make: Callable[..., Any] | None, x: Tensor) -> None:
    if make is None:
        model = strong(
            if_it_exists(timm.create_model)(
                "samvit_base_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=4,
                num_heads=2, window_size=0, num_classes=3,
            )
        )  # fmt: skip
    else:
        config = transformers.VitDetConfig(**{**SIZE, "window_size": 0}, pretrain_image_size=32)
        model = strong(make(config))
    tokred.apply(model, "slic", Hourglass(grid=(5, 6), down=1))
    (stage,) = tokred.inspect(model, x).stages
    assert (stage.before, stage.after) == (64, 30)


@torch.no_grad()
def test_timm_hands_out_full_maps(x: Tensor) -> None:
    options: dict[str, Any] = {
        "img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2,
        "window_size": 4, "global_attn_indexes": (1, 3),
    }  # fmt: skip
    name = "samvit_base_patch16_224"
    model = strong(timm.create_model(name, features_only=True, out_indices=(1, 2), **options))
    dense = model(x)
    keep_all(model)
    assert all(torch.equal(a, b) for a, b in zip(model(x), dense, strict=True))
    tokred.apply(model, "slic", MIDDLE)
    few = model(x)
    assert [y.shape for y in few] == [y.shape for y in dense]
    assert not torch.allclose(few[0], dense[0], rtol=1e-3)
    turning = timm.create_model(name, use_rel_pos=False, use_rope=True, **options)
    with pytest.raises(tokred.UnsupportedModelError, match="rotary positions of block 0"):
        tokred.apply(turning, "slic")
