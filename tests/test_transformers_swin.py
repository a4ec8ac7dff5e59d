"""What is built on Swin in transformers: classifiers, backbones, segmentation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families._swin import FEW, GRID, SIZE, SWIN, WINDOW, images, stage_of, strong
from torch import Tensor, nn

import tokred
from tokred.schedule import Hourglass

SWIN_OF_FOUR = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1, 4, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
MIDDLE = Hourglass(grid=(3, 3), down=1, up=3)


def upernet() -> nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=transformers.SwinConfig(**SWIN_OF_FOUR),
        hidden_size=16,
        num_labels=3,
        use_auxiliary_head=False,
        pool_scales=[1, 2],
    )
    return transformers.UperNetForSemanticSegmentation(config)


def mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN_OF_FOUR),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        encoder_feedforward_dim=32,
        num_queries=5,
        num_labels=3,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def maskformer() -> nn.Module:
    decoder = transformers.DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
    )
    config = transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN_OF_FOUR),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


DENSE: dict[str, Callable[[], nn.Module]] = {
    "upernet": upernet,
    "mask2former": mask2former,
    "maskformer": maskformer,
}


def masks(outputs: Any) -> Tensor:
    found = getattr(outputs, "masks_queries_logits", None)
    answer: Tensor = outputs.logits if found is None else found
    return answer


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE)
def test_segmentation_goes_on_with_fewer_tokens(name: str) -> None:
    model, x = strong(DENSE[name]()), images(2, (60, 52))
    dense = masks(model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tokred.apply(model, "slic", Hourglass(grid=(4, 4)))
    assert torch.equal(masks(model(x)), dense)
    tokred.apply(model, "slic", MIDDLE)
    counts: list[int] = []
    for layer in stage_of(model):
        layer.layernorm_after.register_forward_pre_hook(
            lambda _, args: counts.append(args[0].shape[1])
        )
    few = masks(model(x))
    # 60x52 pixels are 30x26, and in the third stage 8x7 tokens: two windows by two, the second one
    # across without its last column.
    assert counts == [56, 36, 36, 56]
    assert few.shape == dense.shape and few.isfinite().all()
    assert torch.equal(masks(model(x)), few) and not torch.allclose(few, dense, rtol=1e-3)
    tokred.remove(model)
    assert torch.equal(masks(model(x)), dense)


CLASSIFIERS = {
    "swin": (transformers.SwinForImageClassification, transformers.SwinConfig),
    "swinv2": (transformers.Swinv2ForImageClassification, transformers.Swinv2Config),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_and_their_hidden_states(name: str) -> None:
    cls, config = CLASSIFIERS[name]
    size = {**SIZE, "depths": [1, 4, 1], "num_heads": [1, 2, 2], "image_size": 48}
    model = strong(cls(config(**size, num_labels=5)))
    x = images(2, (48, 48))
    dense = model(x, output_hidden_states=True)
    tokred.apply(model, "slic", Hourglass(grid=FEW, down=1))
    few = model(x, output_hidden_states=True)
    assert few.logits.shape == (2, 5) and not torch.equal(few.logits, dense.logits)
    for kind in ("hidden_states", "reshaped_hidden_states"):
        got, wanted = few[kind], dense[kind]
        assert [y.shape for y in got] == [y.shape for y in wanted]
        assert torch.equal(got[0], wanted[0]) and not torch.equal(got[2], wanted[2])


@torch.no_grad()
def test_a_map_no_larger_than_a_window_is_not_shifted_and_the_layer_stays_as_it_was() -> None:
    """transformers turns the shift of such layers off, and leaves it off; few tokens do without it
    and touch nothing."""
    host = SWIN["transformers"]
    model = host.build()
    tokred.apply(model, "slic", Hourglass(grid=FEW, down=0))
    few: list[Tensor] = []
    layer = stage_of(model)[1]
    layer.register_forward_hook(lambda _, args, y: few.extend((args[0], y[0])))
    model(images(1, (24, 36)))  # 6x9 tokens
    assert (layer.window_size, layer.shift_size) == (6, 3)
    small = host.small(layer, False)
    torch.testing.assert_close(few[1], small(few[0], (4, 6), True)[0], rtol=1e-4, atol=1e-5)
    # A backbone partitions and shifts all the same.
    host = SWIN["transformers-backbone"]
    model = host.build()
    tokred.apply(model, "slic", Hourglass(grid=FEW, down=0))
    few.clear()
    layer = stage_of(model)[1]
    layer.register_forward_hook(lambda _, args, y: few.extend((args[0], y[0])))
    model(images(1, (24, 36)))
    small = host.small(layer, True)
    torch.testing.assert_close(few[1], small(few[0], (4, 6), True)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_may_be_computed_either_way() -> None:
    model, x = SWIN["transformers"].build(), images()
    tokred.apply(model, "slic", Hourglass(grid=FEW, down=1))
    model.set_attn_implementation("sdpa")
    fused = model(x).last_hidden_state
    model.set_attn_implementation("eager")
    outputs = model(x, output_attentions=True)
    torch.testing.assert_close(outputs.last_hidden_state, fused, rtol=1e-4, atol=1e-4)
    assert outputs.attentions[1].shape[-1] == 16  # of the last block, in windows of 4x4


def test_the_small_models_have_the_windows_that_are_said() -> None:
    for name in ("transformers", "transformers-v2", "transformers-maskformer"):
        layers = stage_of(SWIN[name].build())
        assert [layer.window_size for layer in layers] == [WINDOW[0]] * 4
        assert [layer.shift_size for layer in layers] == [0, 3, 0, 3]
        assert tuple(-(-side // 2 // 2) for side in (40, 36)) == (10, 9) == GRID
