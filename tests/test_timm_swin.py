"""What only timm's Swin Transformers can do: feature extractors, clipped windows, presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families._swin import FEW, SWIN, WINDOW, images, stage_of, strong
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

import tokred
from tokred.data import zoo
from tokred.engine import windows
from tokred.reducers.slic import SLIC
from tokred.schedule import Hourglass

NAMES = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]
SIZE = {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 4, 1)}
MIDDLE = Hourglass(grid=(5, 5), down=1, up=3)


def made(name: str, **options: Any) -> nn.Module:
    return strong(timm.create_model(name, **SIZE, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_feature_extractors_hand_out_full_maps(name: str) -> None:
    model = made(name, features_only=True)
    x = torch.randn(1, 3, *model.default_cfg["input_size"][1:])
    dense = model(x)
    reduction = tokred.apply(model, "slic", MIDDLE)
    few = model(x)
    assert [y.shape for y in few] == [y.shape for y in dense]
    # The third stage is the long one; what lies before it is as it was.
    assert [torch.equal(a, b) for a, b in zip(few, dense, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert reduction.layout.layers == 4
    tokred.remove(model)
    assert all(torch.equal(a, b) for a, b in zip(model(x), dense, strict=True))


@torch.no_grad()
def test_intermediate_features_are_full_maps() -> None:
    model, x = SWIN["timm"].build(), images()
    dense = model.forward_intermediates(x, intermediates_only=True)
    tokred.apply(model, "slic", Hourglass(grid=FEW, down=1))
    few = model.forward_intermediates(x, intermediates_only=True)
    assert [y.shape for y in few] == [y.shape for y in dense]
    assert torch.equal(few[0], dense[0]) and not torch.equal(few[1], dense[1])
    assert model.forward_features(x).shape == (2, 10, 9, 32)


def test_other_models_and_other_feature_extractors_are_not_ours() -> None:
    for name, options in [
        ("resnet10t", {"features_only": True}),
        ("swinv2_cr_tiny_ns_224", {"embed_dim": 8, "num_heads": (1, 1, 2, 2)}),
    ]:
        with pytest.raises(tokred.UnsupportedModelError, match="no patch for timm"):
            tokred.apply(timm.create_model(name, **options), "slic", 0.5)


@torch.no_grad()
def test_the_input_size_cannot_be_set_meanwhile() -> None:
    model = SWIN["timm-static"].build()
    tokred.apply(model, "slic", MIDDLE)
    with pytest.raises(RuntimeError, match=r"call tokred\.remove\(model\) first"):
        model.set_input_size(img_size=(48, 48))
    tokred.remove(model)
    model.set_input_size(img_size=(48, 48), window_size=6)
    tokred.apply(model, "slic", Hourglass(grid=FEW))
    assert model(images(1, (48, 48))).shape == (1, 5)


@torch.no_grad()
@pytest.mark.parametrize("cls", [SwinTransformer, SwinTransformerV2])
def test_a_map_no_larger_than_a_window_is_one_window_without_shift(cls: Any) -> None:
    """timm clips windows to the map: here to 6x5, which are reduced to 4x3."""
    options = {"img_size": (24, 20), "patch_size": 2, "window_size": 8, "num_classes": 5}
    model = strong(cls(**options, embed_dim=16, depths=(1, 4), num_heads=(1, 2)))
    x = images(2, (24, 20))
    dense = model(x)
    reduction = tokred.apply(model, "slic", Hourglass(grid=(4, 3), down=0))
    assert reduction.layout.grid == (6, 5)
    seen: list[Any] = []
    for block in stage_of(model):
        block.attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0].shape[1], kwargs["mask"])),
            with_kwargs=True,
        )
    assert model(x).shape == dense.shape
    assert seen == [(12, None)] * 4


@torch.no_grad()
def test_fused_attention_is_the_same() -> None:
    model, x = SWIN["timm"].build(), images()
    tokred.apply(model, "slic", Hourglass(grid=FEW, down=1))
    explicit = model(x)
    for block in stage_of(model):
        block.attn.fused_attn = not block.attn.fused_attn
    torch.testing.assert_close(model(x), explicit, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_biases_of_a_pretrained_window_are_those_of_the_same_part_of_the_image() -> None:
    """Weights of windows of 4x4, used in windows of 6x6, which are reduced to 3x3: neighbours are
    5/2 of the host's tokens apart, in units of a window of 4."""
    size = {"dim": 16, "input_resolution": (12, 12), "num_heads": 2}
    block = strong(SwinTransformerV2Block(**size, window_size=6, pretrained_window_size=4))
    attention = block.attn
    few = windows.coordinates((6, 6), (3, 3), (4, 4), attention.relative_coords_table)
    own = attention.relative_coords_table
    # The corners of both are the same, and so is the middle.
    for at, there in ((0, 0), (2, 5), (4, 10)):
        torch.testing.assert_close(few[0, at, at], own[0, there, there])
    # A module that was built for windows of 3x3, and for as much of the image.
    small = SwinTransformerV2Block(**size, window_size=3, pretrained_window_size=2.2)
    torch.testing.assert_close(few, small.attn.relative_coords_table)


@torch.no_grad()
def test_presets_of_swin_count_the_blocks_of_the_third_stage() -> None:
    model = SwinTransformer(
        img_size=192,
        patch_size=4,
        window_size=12,
        embed_dim=8,
        depths=(1, 1, 18, 1),
        num_heads=(1, 1, 1, 1),
        num_classes=3,
        strict_img_size=False,
    ).eval()
    reduction = tokred.apply(model, tokred.presets["mask2former-coco-panoptic"])
    assert reduction.counts(144, (12, 12)) == (144,) * 6 + (64,) * 12
    seen: list[tuple[int, ...]] = []
    for block in model.layers[2].blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    model(images(1, (192, 256)))  # 12x16 tokens: a full window, and one of four columns
    assert seen == [(1, 12 * 16)] * 6 + [(1, 8 * (8 + 3))] * 12


@torch.no_grad()
def test_the_mask_of_the_smaller_windows_is_nearer_to_the_dense_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published mask is that of the former shift, and no mask lets opposite borders mix. On a
    trained model, both are worse."""
    if not (Path(zoo.__file__).parent / "zoo" / "digits_swin.safetensors").exists():
        pytest.skip("the zoo has no digits_swin yet")
    model = zoo.load("digits_swin")
    x = zoo.normalise(zoo.held_out("digits_swin").images[:24])
    own = SwinTransformerBlock.get_attn_mask
    last: list[Tensor] = []
    stage_of(model)[-1].register_forward_hook(lambda _, args, y: last.append(y))
    model(x)
    dense = last.pop()

    def old_shift(block: Any, x: Tensor) -> Tensor | None:
        return own(windows.Seen(block, shift_size=(7, 7)), x) if any(block.shift_size) else None

    def error() -> float:
        with tokred.applied(model, SLIC(tau=5.0), Hourglass(grid=(9, 9))):
            model(x)
        return float(1 - nn.functional.cosine_similarity(last.pop(), dense, dim=-1).mean())

    right = error()
    for wrong in (old_shift, lambda block, x: None):
        monkeypatch.setattr(SwinTransformerBlock, "get_attn_mask", wrong)
        assert right < error()


def test_the_small_models_have_the_windows_that_are_said() -> None:
    for name in ("timm", "timm-static", "timm-v2"):
        blocks = stage_of(SWIN[name].build())
        assert [block.window_size for block in blocks] == [WINDOW] * 4
        assert [any(block.shift_size) for block in blocks] == [False, True, False, True]


def test_a_feature_map_that_is_too_small_is_told() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=16,
        depths=(1, 1, 4, 1), num_heads=(1, 1, 1, 1), strict_img_size=False,
    ).eval()  # fmt: skip
    tokred.apply(model, tokred.SLIC(tau=5.0), tokred.Hourglass(grid=(5, 5), down=1))
    with pytest.warns(UserWarning, match="2x2 tokens is too small"), torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
