"""The UNets of Stable Diffusion 1.x, 2.x and XL in diffusers, also for inpainting and video, and
ControlNets of the same blocks.

Tokens are merged around modules of every `BasicTransformerBlock` that sees the tokens of an image,
as in Bolya & Hoffman, "Token Merging for Fast Stable Diffusion" (section 4). Blocks whose tokens
are the frames of a video (motion modules, temporal layers) are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokred.host import THOUSAND, Denoiser, Place, Times, is_a

from ._diffusers import BLOCK, beside, keys, modules_of, prompt, timestep
from ._diffusers import progress as progress  # models that were pickled by version 0.7 name it here


def places(model: Any) -> list[Place]:
    """All blocks, in the order of the model's parts: down, middle, up."""
    return [
        Place(f"{path}.transformer_blocks.{number}", path, level, modules_of(block))
        for part, level in parts(model)
        for path, owner in _inside(model, part)
        if is_a(owner, OWNERS)
        for number, block in enumerate(owner.transformer_blocks)
        if is_a(block, (BLOCK,))
    ]


def parts(model: Any) -> list[tuple[str, int]]:
    """The parts of a UNet (of a ControlNet, its first half), and how often the grid of the latents
    was halved before them."""
    down = len(model.down_blocks)
    found = [(f"down_blocks.{number}", number) for number in range(down)]
    if getattr(model, "mid_block", None) is not None:
        found.append(("mid_block", down - 1))
    up = range(len(getattr(model, "up_blocks", ())))
    return found + [(f"up_blocks.{number}", down - 1 - number) for number in up]


def _inside(model: Any, part: str) -> list[tuple[str, Any]]:
    return list(model.get_submodule(part).named_modules(prefix=part))


def grid(owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a feature map, [batch, channels, rows, columns]."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    rows, columns = x.shape[-2:]
    if getattr(owner, "is_input_patches", False):
        return rows // owner.patch_size, columns // owner.patch_size
    return rows, columns


def times(model: Any) -> Times:
    """Stable Video Diffusion is called with a fourth of the logarithm of the noise level, which
    goes from 700 to 0.002 (Karras et al., "Elucidating the Design Space of Diffusion-Based
    Generative Models", NeurIPS 2022, https://arxiv.org/abs/2206.00364). The others are called with
    whole numbers below 1,000."""
    if is_a(model, (_VIDEO,)):
        return Times(math.log(700) / 4, math.log(0.002) / 4)
    return THOUSAND


_VIDEO = "diffusers.models.unets.unet_spatio_temporal_condition.UNetSpatioTemporalConditionModel"

OWNERS = (
    "diffusers.models.transformers.transformer_2d.Transformer2DModel",
    "diffusers.models.transformers.transformer_temporal.TransformerSpatioTemporalModel",
)

HOST = Denoiser(
    models=(
        "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
        "diffusers.models.unets.unet_3d_condition.UNet3DConditionModel",
        "diffusers.models.unets.unet_i2vgen_xl.I2VGenXLUNet",
        "diffusers.models.unets.unet_motion_model.UNetMotionModel",
        _VIDEO,
        "diffusers.models.controlnets.controlnet.ControlNetModel",
        "diffusers.models.controlnets.controlnet_union.ControlNetUnionModel",
    ),
    places=places,
    grid=grid,
    timestep=timestep,
    prompt=prompt,
    beside=beside,
    keys=keys,
    times=times,
    summary="UNets of Stable Diffusion 1.x, 2.x, XL, of AnimateDiff and SVD, and ControlNets",
)
