"""What only torchvision's Swin Transformers can do: windows that are not square."""

from __future__ import annotations

import pytest
import torch
from families._swin import SWIN, images, stage_of, strong
from torchvision.models import swin_transformer as vision

import tokred
from tokred.schedule import Hourglass

KINDS = {
    "torchvision": (vision.SwinTransformerBlock, vision.PatchMerging),
    "torchvision-v2": (vision.SwinTransformerBlockV2, vision.PatchMergingV2),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_windows_need_not_be_square(kind: str) -> None:
    block, merging = KINDS[kind]
    model = strong(
        vision.SwinTransformer(
            [2, 2], 16, [1, 4], [1, 2], [4, 6], num_classes=5, block=block, downsample_layer=merging
        )
    )
    reduction = tokred.apply(model, "slic", Hourglass(grid=(3, 4), down=0))
    assert reduction.layout.grid == (4, 6)
    seen = []
    for part in stage_of(model):
        part.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1:3]))
    x = images()  # 10x9 tokens: two and a half windows down, one and a half across
    answer = model(x)
    assert seen == [(8, 6)] * 4
    assert answer.isfinite().all()
    # The host's own block, built for such windows.
    few: list[torch.Tensor] = []
    second = stage_of(model)[1].attn
    second.register_forward_hook(lambda _, args, y: few.extend((args[0], y)))
    model(x)
    small = type(second)(32, [3, 4], [1, 2], 2)
    weights = {
        name: value
        for name, value in second.state_dict().items()
        if not name.startswith("relative")
    }
    if kind == "torchvision":
        table = second.relative_position_bias_table.T.reshape(1, 2, 7, 11)
        table = torch.nn.functional.interpolate(table, size=(5, 7), mode="bilinear")
        weights["relative_position_bias_table"] = table.reshape(2, 35).T
    missing = small.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"relative_position_index", "relative_coords_table"}
    torch.testing.assert_close(few[1], small.eval()(few[0]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_window_is_not_shifted() -> None:
    """Where the padded map is one window, torchvision leaves the shift out; so do its smaller
    windows."""
    model = SWIN["torchvision"].build()
    tokred.apply(model, "slic", Hourglass(grid=(4, 4), down=0))
    few: list[torch.Tensor] = []
    block = stage_of(model)[1]
    block.register_forward_hook(lambda _, args, y: few.extend((args[0], y)))
    model(images(1, (24, 20)))  # 6x5 tokens
    assert few[0].shape[1:3] == (4, 4)
    unshifted = SWIN["torchvision"].small(block, False)
    torch.testing.assert_close(few[1], unshifted(few[0]), rtol=1e-4, atol=1e-5)
