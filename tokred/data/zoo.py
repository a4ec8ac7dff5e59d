"""Bundled checkpoints and images: trained weights and real handwriting, without a download.

All are trained on the handwritten digits of the UCI repository (Alpaydin & Kaynak, "Optical
Recognition of Handwritten Digits", 1998, CC BY 4.0), drawn larger:

    digits            a digit on an empty ground     timm `VisionTransformer`, 14x14 tokens
    digits_cluttered  among fragments of others      the same; the default
    digits_tcformer   the same images                `TCFormer`, 14x14 cells
    digits_scenes     3 to 6 digits on a texture,    `Segmenter` on a timm `VisionTransformer`,
                      a class for every pixel        28x28 tokens
    digits_swin       the same scenes                `Segmenter` on a timm `SwinTransformer`,
                                                     28x28 tokens, in windows of 14x14

`digits` and `digits_cluttered` have patch 4, width 64, 12 blocks and 4 heads: 196 patch tokens and
a class token, the geometry of DeiT at 224. `load` gives these models; `diffusion` gives one that
draws digits:

    digits_diffusion  a digit on an empty ground     `DigitPipeline` around a diffusers
                                                     `UNet2DConditionModel`, 32x32 tokens

Weights and model cards are in the folder `bundled`. The programs `train_digits.py`,
`train_segmenter.py`, `train_swin.py`, `train_tcformer.py` and `train_diffusion.py` in `examples/`
train them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from tokred.models.segmenter import LinearDecoder, Segmenter
from tokred.optional import require

if TYPE_CHECKING:
    from tokred.models.digit_diffusion import DigitPipeline

_FOLDER = Path(__file__).with_name("bundled")

IMAGE_SIZE = 56
"""Height and width of a drawn image, in pixels."""

SCENE_SIZE = 112
"""Height and width of a drawn scene, in pixels."""

SCENE_CLASSES = 11
"""Classes of a scene's pixels: 0 is background, 1 to 10 are the digits 0 to 9."""

DEFAULT = "digits_cluttered"
"""The checkpoint that functions use if none is named."""


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


_STYLES = {
    "digits": _Style(0, 0.6, 0.9),
    "digits_cluttered": _Style(4, 0.5, 0.7),
}
_STYLES["digits_tcformer"] = _STYLES["digits_cluttered"]

# Checkpoints that share the held-out images of another.
_HELD_OUT = {"digits_tcformer": "digits_cluttered"}


@dataclass(frozen=True)
class HeldOut:
    """Images on which a checkpoint was not trained.

    Attributes:
        images: drawings of held-out digits, 0 (paper) to 255 (ink).
        labels: the digit on each image, 0 to 9; for scenes, the class of every pixel, 0 to 10.
        digits: the held-out digits, 8x8 pixels, 0 to 16, from which more images can be drawn.
        classes: the class of each of `digits`, 0 to 9.
    """

    images: UInt8[Tensor, "images 1 height width"]
    labels: Int[Tensor, " images"] | Int[Tensor, "images height width"]
    digits: UInt8[Tensor, "digits 8 8"]
    classes: Int[Tensor, " digits"]


def names() -> list[str]:
    """The names of the bundled checkpoints, sorted."""
    return sorted(_BUILD)


def build_digits() -> nn.Module:
    """The architecture of `digits` and `digits_cluttered`, with random weights. Needs timm."""
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


def build_scenes(image_size: int = SCENE_SIZE) -> Segmenter:
    """The architecture of `digits_scenes`, with random weights. Needs timm.

    Its tokens come from five small convolutions instead of one large one, as in Xiao et al., "Early
    Convolutions Help Transformers See Better" (NeurIPS 2021). With a large one, the model does not
    learn to tell digits apart from the few scenes that it sees in minutes of training.

    Args:
        image_size: the size for which there are position embeddings. Images of any other size that
            4 divides are possible; embeddings are resampled for them.
    """
    timm_vit = require("timm.models.vision_transformer", "timm")
    encoder: nn.Module = timm_vit.VisionTransformer(
        img_size=image_size,
        patch_size=1,  # of the map that the convolutions make, a quarter of the image
        in_chans=1,
        num_classes=0,
        embed_dim=64,
        depth=12,
        num_heads=4,
        dynamic_img_size=True,
        embed_layer=_convolutions,
    )
    return Segmenter(encoder, LinearDecoder(64, SCENE_CLASSES))


def build_swin() -> Segmenter:
    """The architecture of `digits_swin`, with random weights. Needs timm.

    The convolutions of `digits_scenes`, and one stage of ten blocks on 28x28 tokens, in 2x2 windows
    of 14x14 that are shifted in every second block.
    """
    timm_swin = require("timm.models.swin_transformer", "timm")
    encoder: nn.Module = timm_swin.SwinTransformer(
        img_size=SCENE_SIZE,
        patch_size=1,
        in_chans=1,
        num_classes=0,
        embed_dim=64,
        depths=(10,),
        num_heads=(4,),
        window_size=14,
        strict_img_size=False,
        drop_path_rate=0.0,
        embed_layer=_convolutions,
    )
    return Segmenter(encoder, LinearDecoder(64, SCENE_CLASSES))


def _convolutions(norm_layer: object = None, **options: Any) -> nn.Module:
    """timm's patch embedding by a small convolutional net, without a norm behind it."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 2), (16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GELU()]
    embed: nn.Module = require("timm.layers", "timm").HybridEmbed(nn.Sequential(*layers), **options)
    return embed


def build_tcformer() -> nn.Module:
    """The architecture of `digits_tcformer`, with random weights: 14x14 cells become 49, 13 and 4
    tokens."""
    from tokred.models.tcformer.backbone import TCFormer  # only here: it knows timm's registry

    return TCFormer(
        (1, 1, 2, 1),
        in_chans=1,
        num_classes=10,
        widths=(32, 64, 96, 128),
        heads=(1, 2, 3, 4),
        mlp_ratios=(4, 4, 4, 4),
        sr_ratios=(2, 1, 1, 1),
    )


_BUILD: dict[str, Callable[[], nn.Module]] = {
    "digits": build_digits,
    "digits_cluttered": build_digits,
    "digits_scenes": build_scenes,
    "digits_swin": build_swin,
    "digits_tcformer": build_tcformer,
}


def load(name: str = DEFAULT) -> nn.Module:
    """A bundled checkpoint in evaluation mode, float32, on the CPU.

    Raises:
        ValueError: there is no checkpoint of that name.
        ModuleNotFoundError: timm or safetensors is not installed (`pip install "tokred[timm]"`).
    """
    _check(name)
    safetensors = require("safetensors.torch", "timm")
    weights = safetensors.load_file(_FOLDER / f"{name}.safetensors")
    model = _BUILD[name]()
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    return model.eval()


def gates(name: str = DEFAULT, method: str = "svit") -> Path:
    """The file of trained gates for a bundled checkpoint: `tokred.SViT(zoo.gates())`.

    Args:
        name: the checkpoint.
        method: "svit" or "dynamicvit".

    Raises:
        ValueError: there are none for it.
    """
    _check(name)
    file = _FOLDER / f"{name}_{method}.safetensors"
    if not file.is_file():
        there = sorted(f.stem for m in ("svit", "dynamicvit") for f in _FOLDER.glob(f"*_{m}.s*"))
        raise ValueError(f"there are no gates for {name!r} and {method!r}; bundled are {there}")
    return file


def diffusion() -> DigitPipeline:
    """The bundled pipeline that draws digits, in evaluation mode, float32, on the CPU.

        images = zoo.diffusion()(["7", "a handwritten 3"]).images

    Raises:
        ModuleNotFoundError: diffusers is not installed (`pip install "tokred[diffusers]"`).
    """
    from tokred.models import digit_diffusion  # which imports diffusers

    return digit_diffusion.load(_FOLDER / "digits_diffusion.safetensors")


def held_out(name: str = DEFAULT) -> HeldOut:
    """The held-out images of a bundled checkpoint.

    Raises:
        ValueError: there is no checkpoint of that name.
        ModuleNotFoundError: safetensors is not installed (`pip install "tokred[timm]"`).
    """
    _check(name)
    if name not in _STYLES:
        with np.load(_FOLDER / "digits_scenes_held_out.npz", allow_pickle=False) as scenes:
            images, labels, digits, classes = (
                torch.from_numpy(scenes[key]) for key in ("images", "labels", "digits", "classes")
            )
        return HeldOut(images, labels.long(), digits, classes.long())
    safetensors = require("safetensors.torch", "timm")
    stored = safetensors.load_file(_FOLDER / f"{_HELD_OUT.get(name, name)}_held_out.safetensors")
    labels = stored["labels"].long()
    return HeldOut(stored["images"], labels, stored["digits"], labels)


def normalise(
    images: UInt8[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """Images as the checkpoints take them: ink 1, paper -1, float32."""
    return images.float() / 127.5 - 1


def draw(
    digits: UInt8[Tensor, "digits 8 8"],
    generator: torch.Generator,
    name: str = DEFAULT,
    side: int = IMAGE_SIZE,
    fragments: int | None = None,
) -> UInt8[Tensor, "digits 1 side side"]:
    """Draws every digit once, with random size, place and slant, as in a checkpoint's training.

    Args:
        digits: 8x8 pixels each, 0 (paper) to 16 (ink).
        generator: where the randomness comes from; a CPU generator.
        name: the checkpoint. It decides how large digits are and how cluttered the image is.
        side: height and width of the images, in pixels.
        fragments: how many pieces of other digits are drawn around each; as in the checkpoint's
            training if not given. With 0 and the same generator, the same digits stand alone.

    Raises:
        ValueError: there is no checkpoint of that name, or it takes scenes (`draw_scenes`).
    """
    _check(name)
    if name not in _STYLES:
        raise ValueError(f"{name} knows no single digits: zoo.draw_scenes draws for it")
    style, num = _STYLES[name], len(digits)
    uniform = partial(_uniform, generator)

    ink = digits.float()[:, None] / 16
    size = uniform(style.smallest, style.largest, num)  # of the side of the image
    centre = uniform(-1, 1, num, 2) * (1 - size)[:, None] * 0.8
    picture = _paste(ink, size, uniform(-0.35, 0.35, num), centre, side)

    column = torch.arange(8)
    for _ in range(style.fragments if fragments is None else fragments):
        # A window of 3x3 pixels of another digit, outside of the digit that is to be recognised.
        other = ink[torch.randint(num, (num,), generator=generator)]
        corner = torch.randint(1, 5, (num, 2), generator=generator)
        inside = (column >= corner[..., None]) & (column < corner[..., None] + 3)
        piece = other * (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
        angle = uniform(0, 2 * math.pi, num)
        away = (size * uniform(1.0, 1.7, num))[:, None]
        place = centre + away * torch.stack([angle.cos(), angle.sin()], 1)
        # What would leave the image comes back on the opposite side.
        place = (place + 1).remainder(2) - 1
        sizes, turns = uniform(0.4, 0.65, num), uniform(-math.pi, math.pi, num)
        pasted = _paste(piece, sizes, turns, place, side)
        clear = (place - centre).norm(dim=1) > 0.9 * size
        picture = torch.maximum(picture, pasted * clear[:, None, None, None])
    contrast = uniform(0.7, 1, num)[:, None, None, None]
    return (picture * contrast * 255).round().clamp(0, 255).to(torch.uint8)


def draw_scenes(
    digits: UInt8[Tensor, "digits 8 8"],
    classes: Int[Tensor, " digits"],
    num: int,
    generator: torch.Generator,
) -> tuple[UInt8[Tensor, "num 1 112 112"], Int[Tensor, "num 112 112"]]:
    """Draws scenes as in the training of `digits_scenes` and `digits_swin`.

    Three to six digits, no two of one class, stand on a texture, with random sizes, places, slants
    and contrasts; where they overlap, the later hides the earlier.

    Args:
        digits: 8x8 pixels each, 0 (paper) to 16 (ink).
        classes: the class of each, 0 to 9; each class must be there.
        num: how many scenes.
        generator: where the randomness comes from; a CPU generator.

    Returns:
        The scenes, and the class of each of their pixels: 0 for the background, 1 + the class of
        the digit for a pixel of a digit (whose ink is at least a third of the darkest ink).

    Raises:
        ValueError: a class is missing.
    """
    uniform = partial(_uniform, generator)
    count = classes.bincount(minlength=10)
    if len(count) != 10 or not bool(count.all()):
        raise ValueError(f"classes must hold each of 0 to 9 and no other, not {count.tolist()}")
    first = count.cumsum(0) - count
    by_class = classes.argsort(stable=True)
    ink = digits.float()[:, None] / 16
    scene = torch.arange(num)

    most = 6
    shown = torch.randint(3, most + 1, (num,), generator=generator)
    order = torch.rand(num, 10, generator=generator).argsort(1)
    size = uniform(0.25, 0.38, num, most)  # of the side of the scene
    picture = _textures(num, generator)
    target = torch.zeros(num, SCENE_SIZE, SCENE_SIZE, dtype=torch.long)
    centre = torch.zeros(num, most, 2)
    for turn in range(most):
        # Of thirty random places, the one that is farthest from the digits before.
        places = uniform(-1, 1, num, 30, 2) * (1 - 0.9 * size[:, turn, None, None])
        apart = (places[:, :, None] - centre[:, None, :turn]).abs().amax(3)
        gaps = apart - size[:, None, :turn] - size[:, turn, None, None]
        best = gaps.amin(2).argmax(1) if turn else torch.zeros_like(shown)
        centre[:, turn] = places[scene, best]

        digit = order[:, turn]
        pick = first[digit] + (uniform(0, 1, num) * count[digit]).long()
        slant = uniform(-0.35, 0.35, num)
        pasted = _paste(ink[by_class[pick]], size[:, turn], slant, centre[:, turn], SCENE_SIZE)
        pasted = pasted * (turn < shown)[:, None, None, None]
        contrast = uniform(0.75, 1, num)[:, None, None, None]
        picture = picture + pasted * (contrast - picture)
        target = torch.where(pasted[:, 0] >= 1 / 3, digit[:, None, None] + 1, target)
    return (picture * 255).round().clamp(0, 255).to(torch.uint8), target


def _textures(num: int, generator: torch.Generator) -> Float[Tensor, "num 1 112 112"]:
    """Clouds of three sizes and a wave, each of random strength; 0 to at most 0.45."""
    uniform = partial(_uniform, generator)
    size = (SCENE_SIZE, SCENE_SIZE)
    share = uniform(0.05, 1, num, 4, 1, 1)
    share = share / share.sum(1, keepdim=True)
    across = torch.linspace(-1, 1, SCENE_SIZE)
    angle, waves = uniform(0, math.pi, num, 1, 1), uniform(2, 14, num, 1, 1)
    along = angle.cos() * across + angle.sin() * across[:, None]
    wave = 0.5 + 0.5 * torch.sin(math.pi * waves * along + uniform(0, 2 * math.pi, num, 1, 1))
    texture = share[:, 0] * wave
    for layer, cells in enumerate((5, 14, 40), start=1):
        cloud = F.interpolate(uniform(0, 1, num, 1, cells, cells), size, mode="bilinear")
        texture = texture + share[:, layer] * cloud[:, 0]
    return (uniform(0.15, 0.45, num, 1, 1) * texture)[:, None]


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _paste(
    ink: Float[Tensor, "digits 1 8 8"],
    size: Float[Tensor, " digits"],
    slant: Float[Tensor, " digits"],
    centre: Float[Tensor, "digits 2"],
    side: int,
) -> Float[Tensor, "digits 1 side side"]:
    """Draws each digit on an empty image of `side` pixels. `size` is a share of the side,
    `slant` is in radians, `centre` is (x, y) in [-1, 1]."""
    cos, sin = slant.cos() / size, slant.sin() / size
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    affine = torch.cat([turn, -turn @ centre[..., None]], 2)
    grid = F.affine_grid(affine, [len(ink), 1, side, side], align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)


def _check(name: str) -> None:
    if name not in _BUILD:
        raise ValueError(f"unknown checkpoint {name!r}; bundled checkpoints: {', '.join(names())}")
