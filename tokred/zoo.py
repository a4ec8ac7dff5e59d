"""Bundled checkpoints and images: real weights, real pictures, nothing downloaded.

Each is a timm `VisionTransformer` (patch 4, width 64, 12 blocks, 4 heads) trained on the
handwritten digits of the UCI repository (Alpaydin & Kaynak, "Optical Recognition of Handwritten
Digits", 1998, CC BY 4.0), drawn at 56x56: 14x14 = 196 patch tokens and a class token, the geometry
of DeiT at 224. In `digits` every image holds one digit; in `digits_cluttered`, the default, there
are fragments of other digits around it. The model cards are beside the weights, in `zoo/`, and
`examples/train_digits.py` trains both again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from tokred.optional import require

_FOLDER = Path(__file__).with_name("zoo")

IMAGE_SIZE = 56
"""Height and width of a drawn image, in pixels."""

DEFAULT = "digits_cluttered"
"""The checkpoint that is meant where none is named."""


@dataclass(frozen=True)
class _Style:
    """How the images of a checkpoint are drawn.

    Attributes:
        fragments: pieces of other digits around each digit.
        smallest, largest: size of the digit, as a share of the side of the image.
    """

    fragments: int
    smallest: float
    largest: float


_STYLES = {"digits": _Style(0, 0.6, 0.9), "digits_cluttered": _Style(4, 0.5, 0.7)}


@dataclass(frozen=True)
class HeldOut:
    """Images that a checkpoint has not been trained on.

    Attributes:
        images: the held-out digits, drawn once, 0 (paper) to 255 (ink).
        labels: the digit on each image, 0 to 9.
        digits: the digits themselves, 8x8 pixels, 0 to 16, for drawing them anew.
    """

    images: UInt8[Tensor, "images 1 56 56"]
    labels: Int[Tensor, " images"]
    digits: UInt8[Tensor, "images 8 8"]


def names() -> list[str]:
    """The names of the bundled checkpoints, sorted."""
    return sorted(_STYLES)


def build_digits() -> nn.Module:
    """The architecture of the checkpoints, with random weights. Needs timm."""
    timm_vit = require("timm.models.vision_transformer", "timm")
    model: nn.Module = timm_vit.VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=12,
        num_heads=4,
    )
    return model


def load(name: str = DEFAULT) -> nn.Module:
    """A bundled checkpoint in evaluation mode, float32, on the CPU.

    Raises:
        ValueError: there is no checkpoint of that name.
        ModuleNotFoundError: timm or safetensors is not installed (`pip install "tokred[timm]"`).
    """
    _style(name)
    safetensors = require("safetensors.torch", "timm")
    weights = safetensors.load_file(_FOLDER / f"{name}.safetensors")
    model = build_digits()
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    return model.eval()


def held_out(name: str = DEFAULT) -> HeldOut:
    """The held-out images of a bundled checkpoint.

    Raises:
        ValueError: there is no checkpoint of that name.
        ModuleNotFoundError: safetensors is not installed (`pip install "tokred[timm]"`).
    """
    _style(name)
    safetensors = require("safetensors.torch", "timm")
    stored = safetensors.load_file(_FOLDER / f"{name}_held_out.safetensors")
    return HeldOut(stored["images"], stored["labels"].long(), stored["digits"])


def normalise(
    images: UInt8[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """What the checkpoints take: ink 1, paper -1, float32."""
    return images.float() / 127.5 - 1


def draw(
    digits: UInt8[Tensor, "digits 8 8"], generator: torch.Generator, name: str = DEFAULT
) -> UInt8[Tensor, "digits 1 56 56"]:
    """Draws every digit once, with a random size, place and slant, as a checkpoint knows them.

    Args:
        digits: 8x8 pixels each, 0 (paper) to 16 (ink).
        generator: where the randomness comes from; a CPU generator.
        name: the checkpoint, which decides how large digits are and how cluttered the image is.

    Raises:
        ValueError: there is no checkpoint of that name.
    """
    style, num = _style(name), len(digits)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    ink = digits.float()[:, None] / 16
    size = uniform(style.smallest, style.largest, num)  # of the side of the image
    centre = uniform(-1, 1, num, 2) * (1 - size)[:, None] * 0.8
    picture = _paste(ink, size, uniform(-0.35, 0.35, num), centre)

    column = torch.arange(8)
    for _ in range(style.fragments):
        # A window of 3x3 pixels of another digit, off the digit that is to be read.
        other = ink[torch.randint(num, (num,), generator=generator)]
        corner = torch.randint(1, 5, (num, 2), generator=generator)
        inside = (column >= corner[..., None]) & (column < corner[..., None] + 3)
        piece = other * (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
        angle = uniform(0, 2 * math.pi, num)
        away = (size * uniform(1.0, 1.7, num))[:, None]
        place = centre + away * torch.stack([angle.cos(), angle.sin()], 1)
        # What would leave the image comes back on the opposite side.
        place = (place + 1).remainder(2) - 1
        pasted = _paste(piece, uniform(0.4, 0.65, num), uniform(-math.pi, math.pi, num), place)
        clear = (place - centre).norm(dim=1) > 0.9 * size
        picture = torch.maximum(picture, pasted * clear[:, None, None, None])
    contrast = uniform(0.7, 1, num)[:, None, None, None]
    return (picture * contrast * 255).round().clamp(0, 255).to(torch.uint8)


def _paste(
    ink: Float[Tensor, "digits 1 8 8"],
    size: Float[Tensor, " digits"],
    slant: Float[Tensor, " digits"],
    centre: Float[Tensor, "digits 2"],
) -> Float[Tensor, "digits 1 56 56"]:
    """Each digit on an empty image; `size` as a share of its side, `slant` in radians, `centre`
    (x, y) in [-1, 1]."""
    cos, sin = slant.cos() / size, slant.sin() / size
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    affine = torch.cat([turn, -turn @ centre[..., None]], 2)
    grid = F.affine_grid(affine, [len(ink), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)


def _style(name: str) -> _Style:
    if name not in _STYLES:
        raise ValueError(f"unknown checkpoint {name!r}; bundled checkpoints: {', '.join(names())}")
    return _STYLES[name]
