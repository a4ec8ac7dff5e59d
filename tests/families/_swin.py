"""Small Swin Transformers of all libraries, and SAM's vision transformers, whose windows are not
shifted: what the tests of windows are run on.

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
from timm.models import vision_transformer_sam as timm_sam
from torch import Tensor, nn
from torchvision.models import swin_transformer as vision
from transformers.models.maskformer import modeling_maskformer_swin as maskformer
from transformers.models.maskformer.configuration_maskformer_swin import MaskFormerSwinConfig
from transformers.models.swin import modeling_swin as swin
from transformers.models.swinv2 import modeling_swinv2 as swin_v2
from transformers.models.vitdet import modeling_vitdet as vitdet

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
        shifts: whether every second block shifts its windows; if not, it has none, and attends to
            the whole map.
        channels_first: whether maps are [batch, dim, rows, columns].
        inside: the part of a model that runs all blocks, and hands out what leaves them only if it
            is asked to.
    """

    build: Callable[[], nn.Module]
    small: Callable[[nn.Module, bool], nn.Module]
    rolls_first: bool = False
    run: Callable[[nn.Module, Tensor, tuple[int, int]], Tensor] = lambda block, x, grid: block(x)
    answer: Callable[[Any], Tensor] = lambda outputs: outputs
    shifts: bool = True
    channels_first: bool = False
    inside: Callable[[nn.Module], nn.Module] = lambda model: model

    def tokens(self, maps: Tensor) -> Tensor:
        """[batch, tokens, dim] of what a block is given or puts out."""
        return maps.flatten(2).transpose(1, 2) if self.channels_first else maps.flatten(1, -2)

    def like(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Tokens in the form of `maps`."""
        if self.channels_first:
            return tokens.transpose(1, 2).reshape(-1, *maps.shape[1:])
        return tokens.reshape(-1, *maps.shape[1:])


def strong(model: nn.Module) -> nn.Module:
    """Weights under which attention, its biases and its masks matter; in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias_table" in name or "mlp.0.weight" in name:  # tables, and what makes them
                parameter.normal_(std=1.0)
            elif "rel_pos" in name:  # these meet queries
                parameter.normal_(std=0.4)
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


def resized_side(table: Tensor) -> Tensor:
    """A table of positions along one side of windows of 6x6, for windows of 4x4."""
    return F.interpolate(table.T[None], size=7, mode="linear", align_corners=False)[0].T


def loaded(small: nn.Module, block: nn.Module) -> nn.Module:
    """`small` with the weights of `block`, its tables of biases resized. What depends on the size
    of windows alone is its own."""
    windows = getattr(small, "window_size", 1) != 0  # else it attends to the whole map
    weights = {
        name: resized(value)
        if name.endswith("bias_table")
        else resized_side(value)
        if "rel_pos" in name and windows
        else value
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


SAM_SIZE = {
    "image_size": IMAGE,
    "patch_size": 4,
    "hidden_size": DIM,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "window_size": 6,
}


def make_vitdet(cls: Any, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = transformers.VitDetConfig(
            **SAM_SIZE, pretrain_image_size=40, window_block_indices=[0, 2],
            use_relative_position_embeddings=True, **options,
        )  # fmt: skip
        return strong(cls(config))

    return make


def small_vitdet(block: nn.Module, whole: bool) -> nn.Module:
    config = transformers.VitDetConfig(**SAM_SIZE, use_relative_position_embeddings=True)
    made = vitdet.VitDetLayer(config, window_size=0 if whole else 4)
    return loaded(made, block)


def make_timm_sam() -> nn.Module:
    model = timm_sam.VisionTransformerSAM(
        img_size=IMAGE, patch_size=4, num_classes=5, embed_dim=DIM, depth=4, num_heads=2,
        window_size=6, use_rel_pos=True, global_attn_indexes=(1, 3), neck_chans=16,
    )  # fmt: skip
    return strong(model)


def small_timm_sam(block: nn.Module, whole: bool) -> nn.Module:
    made = timm_sam.Block(DIM, 2, use_rel_pos=True, window_size=0 if whole else 4, input_size=GRID)
    return loaded(made, block)


def run_plain(block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    y = block(x)
    return y[0] if isinstance(y, tuple) else y


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
        inside=lambda model: model.model,  # the backbone always asks
        run=run_hf,
        answer=features,
    ),
    "timm-sam": Swin(make_timm_sam, small_timm_sam, shifts=False),
    "transformers-vitdet": Swin(
        make_vitdet(transformers.VitDetModel),
        small_vitdet,
        run=run_plain,
        answer=features,
        shifts=False,
        channels_first=True,
    ),
    "transformers-vitdet-backbone": Swin(
        make_vitdet(transformers.VitDetBackbone, out_features=["stage4"]),
        small_vitdet,
        run=run_plain,
        answer=features,
        shifts=False,
        channels_first=True,
    ),
}
