"""Small Swin Transformers of all libraries: what the tests of windows are run on.

Two stages, the second of four blocks, on 10x9 tokens for images of 40x36: two windows of 6x6 down
and two across, none but the first of them full. (No file of `SMALL`: what tests/test_hosts.py asks
for is made for methods that leave any number of tokens.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from timm.models import swin_transformer as timm_v1
from timm.models import swin_transformer_v2 as timm_v2
from torch import Tensor, nn
from torchvision.models import swin_transformer as vision
from transformers.models.maskformer import modeling_maskformer_swin as maskformer
from transformers.models.maskformer.configuration_maskformer_swin import MaskFormerSwinConfig
from transformers.models.swin import modeling_swin as swin
from transformers.models.swinv2 import modeling_swinv2 as swin_v2

from tokred.host import find_host

IMAGE = (40, 36)
GRID, WINDOW, FEW, REDUCED = (10, 9), (6, 6), (4, 4), (7, 6)

DIM = 32
SIZE = {"patch_size": 2, "embed_dim": 16, "depths": (1, 4), "num_heads": (1, 2), "window_size": 6}


@dataclass(frozen=True)
class Swin:
    """How to make one, and what is special about it.

    Attributes:
        build: makes the model, in evaluation mode.
        small: makes one of its blocks for windows of `FEW`, given whether it shifts them.
        rolls_first: whether feature maps are shifted before they are padded, rather than after.
        run: calls a block on the tokens of a map of a size.
        answer: takes the final features out of the outputs.
    """

    build: Callable[[], nn.Module]
    small: Callable[[nn.Module, bool], nn.Module]
    rolls_first: bool = False
    run: Callable[[nn.Module, Tensor, tuple[int, int]], Tensor] = lambda block, x, grid: block(x)
    answer: Callable[[Any], Tensor] = lambda outputs: outputs


def strong(model: nn.Module) -> nn.Module:
    """Weights under which attention, its biases and its masks matter; in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias_table" in name or "mlp.0.weight" in name:  # tables, and what makes them
                parameter.normal_(std=1.0)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.2)
            elif parameter.ndim == 1 and name.endswith("weight"):  # norms, some of them 0
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def stage_of(model: nn.Module) -> list[Any]:
    """The blocks of the stage that is reduced."""
    host, tower = find_host(model)
    return list(host.blocks(tower))


def images(batch: int = 2, size: tuple[int, int] = IMAGE) -> Tensor:
    return torch.randn(batch, 3, *size)


def resized(table: Tensor) -> Tensor:
    """A table of biases for windows of 6x6, for windows of 4x4."""
    image = table.T.reshape(1, -1, 11, 11)
    small = F.interpolate(image, size=(7, 7), mode="bilinear", align_corners=False)
    return small.reshape(-1, 49).T


def loaded(small: nn.Module, block: nn.Module) -> nn.Module:
    """`small` with the weights of `block`, its tables of biases resized. What depends on the size
    of windows alone is its own."""
    weights = {
        name: resized(value) if name.endswith("bias_table") else value
        for name, value in block.state_dict().items()
        if not name.endswith(("relative_position_index", "relative_coords_table"))
    }
    missing = small.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all("relative" in name for name in missing.missing_keys)
    return small.eval()


def make_timm(cls: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: strong(cls(img_size=IMAGE, num_classes=5, **SIZE, **options))


def small_timm(cls: Any, **options: Any) -> Callable[[nn.Module, bool], nn.Module]:
    def small(block: nn.Module, shifted: bool) -> nn.Module:
        made = cls(
            DIM,
            input_resolution=REDUCED,
            num_heads=2,
            window_size=FEW,
            shift_size=(2, 2) if shifted else 0,
            always_partition=True,
            dynamic_mask=True,
            **options,
        )
        return loaded(made, block)

    return small


def make_vision(block: Any, merging: Any) -> Callable[[], nn.Module]:
    return lambda: strong(
        vision.SwinTransformer(
            [2, 2], 16, [1, 4], [1, 2], [6, 6], num_classes=5, block=block, downsample_layer=merging
        )
    )


def small_vision(cls: Any) -> Callable[[nn.Module, bool], nn.Module]:
    def small(block: nn.Module, shifted: bool) -> nn.Module:
        shift = [2, 2] if shifted else [0, 0]
        return loaded(cls(DIM, 2, window_size=[4, 4], shift_size=shift), block)

    return small


def make_hf(cls: Any, config: Any, **options: Any) -> Callable[[], nn.Module]:
    size = {**SIZE, "depths": [1, 4], "num_heads": [1, 2]}
    return lambda: strong(cls(config(image_size=IMAGE, **size, **options)))


def small_hf(cls: Any, config: Any) -> Callable[[nn.Module, bool], nn.Module]:
    def small(block: nn.Module, shifted: bool) -> nn.Module:
        chosen = config(window_size=4, attn_implementation="sdpa")
        return loaded(cls(chosen, DIM, REDUCED, 2, shift_size=2 if shifted else 0), block)

    return small


def run_hf(block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    y: Tensor = block(x, grid)[0]
    return y


def run_partitioned(block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    y: Tensor = block(x, grid, True)[0]
    return y


def features(outputs: Any) -> Tensor:
    maps = getattr(outputs, "feature_maps", None)
    found: Tensor = outputs.last_hidden_state if maps is None else maps[-1]
    return found


SWIN: dict[str, Swin] = {
    "timm": Swin(
        make_timm(timm_v1.SwinTransformer, strict_img_size=False),
        small_timm(timm_v1.SwinTransformerBlock),
        rolls_first=True,
    ),
    "timm-static": Swin(
        make_timm(timm_v1.SwinTransformer),
        small_timm(timm_v1.SwinTransformerBlock),
        rolls_first=True,
    ),
    "timm-v2": Swin(
        make_timm(timm_v2.SwinTransformerV2, strict_img_size=False),
        small_timm(timm_v2.SwinTransformerV2Block),
        rolls_first=True,
    ),
    "torchvision": Swin(
        make_vision(vision.SwinTransformerBlock, vision.PatchMerging),
        small_vision(vision.SwinTransformerBlock),
    ),
    "torchvision-v2": Swin(
        make_vision(vision.SwinTransformerBlockV2, vision.PatchMergingV2),
        small_vision(vision.SwinTransformerBlockV2),
    ),
    "transformers": Swin(
        make_hf(transformers.SwinModel, transformers.SwinConfig),
        small_hf(swin.SwinLayer, transformers.SwinConfig),
        run=run_hf,
        answer=features,
    ),
    "transformers-backbone": Swin(
        make_hf(
            transformers.SwinBackbone, transformers.SwinConfig, out_features=["stage1", "stage2"]
        ),
        small_hf(swin.SwinLayer, transformers.SwinConfig),
        run=run_partitioned,
        answer=features,
    ),
    "transformers-v2": Swin(
        make_hf(transformers.Swinv2Model, transformers.Swinv2Config),
        small_hf(swin_v2.Swinv2Layer, transformers.Swinv2Config),
        run=run_hf,
        answer=features,
    ),
    "transformers-maskformer": Swin(
        make_hf(
            maskformer.MaskFormerSwinBackbone,
            MaskFormerSwinConfig,
            out_features=["stage1", "stage2"],
        ),
        small_hf(maskformer.MaskFormerSwinLayer, MaskFormerSwinConfig),
        run=run_hf,
        answer=features,
    ),
}
