"""The features of a network in which images are compared, kept on disk."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tokred.data import reading, zoo
from tokred.data.digest import content_of, digest_of
from tokred.data.writing import whole
from tokred.optional import require

_PER_BATCH = 32
"""Images whose features are extracted at a time; a constant, so that rounding errors are, too."""


class DigitFeatures(nn.Module):
    """The features by which the bundled checkpoint `digits` recognises digits. Needs timm."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = zoo.load("digits")

    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 64"]:
        """The features of images that are uint8, 0 to 255; the mean of their channels counts."""
        grey = images.float().mean(1, keepdim=True) / 127.5 - 1
        side = (zoo.IMAGE_SIZE, zoo.IMAGE_SIZE)
        larger = F.interpolate(grey, side, mode="bilinear", antialias=True)
        features: Tensor = self.model.forward_head(
            self.model.forward_features(larger), pre_logits=True
        )
        return features


def inception(weights: Path | None) -> nn.Module:
    """The Inception network after which FID is named, by torchmetrics and torch-fidelity.

    Args:
        weights: the file of its weights (`pt_inception-2015-12-05-6726825d.pth` in the releases of
            pytorch-fid, `weights-inception-2015-12-05-6726825d.pth` in those of
            torch-fidelity).

    Raises:
        ValueError: no file is given. (Nothing is downloaded.)
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: torchmetrics or torch-fidelity is not installed.
    """
    if weights is None:
        raise ValueError(
            "features of Inception need its weights: fetch weights-inception-2015-12-05-6726825d"
            ".pth from the releases of torch-fidelity, and give it with --weights PATH"
        )
    require("torch_fidelity", "fid")
    torch.load(weights, weights_only=True)  # refuses files that would run code; the next does not
    network: nn.Module = require("torchmetrics.image.fid", "fid").NoTrainInceptionV3(
        "inception-v3-compat", ["2048"], str(weights)
    )
    return network


@dataclass(frozen=True)
class Measured:
    """What was found out about the images of one folder.

    Attributes:
        features: of every image, float64.
        pixels: how far every image is from the one beside it; 0 if there is none.
        blank: how many images have a single colour.
    """

    features: Float[np.ndarray, "images dim"]
    pixels: Float[np.ndarray, " images"]
    blank: int


def measure(
    paths: Sequence[Path],
    beside: Sequence[Path] | None,
    size: tuple[int, int],
    extractor: nn.Module,
    cache: Path | None,
    known_as: object,
    cure: str,
    on_images: Callable[[int], None],
) -> Measured:
    """Extracts the features of images, or reads them from the last time.

    Args:
        paths: the images.
        beside: for every image, another one that it is compared with pixel by pixel.
        size: width and height to which images are brought.
        extractor: the network.
        cache: the file in which the result is kept; None: it is not. It is used again if files,
            size and network are the same.
        known_as: tells the network from others, in types of JSON.
        cure: what to do with an image that is broken.
        on_images: called with the number of images that are done.

    Raises:
        ValueError: an image is broken.
    """
    contents = None if cache is None else [content_of(x) for x in [*paths, *(beside or ())]]
    key = digest_of(known_as, size, contents, _PER_BATCH)
    kept = None if cache is None else _kept(cache, key)
    if kept is not None:
        return kept
    features, pixels, blank = [], [], 0
    device = next((p.device for p in extractor.parameters()), torch.device("cpu"))
    for start in range(0, len(paths), _PER_BATCH):
        part = slice(start, start + _PER_BATCH)
        images = _read_or_say(paths[part], size, cure)
        with torch.no_grad():
            features.append(extractor(images.to(device)).double().cpu())
        others = images if beside is None else _read_or_say(beside[part], size, cure)
        apart = (images.double() - others.double()).flatten(1) / 255
        pixels.append(apart.square().mean(1).sqrt())
        flat = images.flatten(2)
        blank += int((flat.amax(2) == flat.amin(2)).all(1).sum())
        on_images(min(start + _PER_BATCH, len(paths)))
    found = Measured(torch.cat(features).numpy(), torch.cat(pixels).numpy(), blank)
    if cache is None:
        return found
    cache.parent.mkdir(exist_ok=True)
    with whole(cache) as partial, partial.open("wb") as file:
        np.savez(file, key=key, features=found.features, pixels=found.pixels, blank=blank)
    return found


def _kept(cache: Path, key: str) -> Measured | None:
    """What a file holds, if it is of this key."""
    if not cache.exists():
        return None
    try:
        with np.load(cache, allow_pickle=False) as kept:
            if str(kept["key"]) != key:
                return None
            return Measured(kept["features"], kept["pixels"], int(kept["blank"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        warnings.warn(f"{cache} is broken: its features are extracted again", stacklevel=2)
        return None


def _read_or_say(paths: Sequence[Path], size: tuple[int, int], cure: str) -> Tensor:
    """As `_read`; if a picture is broken, the error says what to do."""
    try:
        return _read(paths, size)
    except ValueError as error:
        raise ValueError(f"{error}: {cure}") from error


def _read(paths: Sequence[Path], size: tuple[int, int]) -> UInt8[Tensor, "images 3 height width"]:
    """Pictures in one size: others are cut to its aspect ratio and resized, with antialiasing."""
    pil, ops = require("PIL.Image", "plots"), require("PIL.ImageOps", "plots")
    images = []
    for path in paths:
        image = reading.picture(path)
        if image.size != size:
            image = ops.fit(image, size, pil.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(images)
