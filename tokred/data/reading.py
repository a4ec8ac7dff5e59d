"""Pictures and maps of pixels, in files and folders: which there are, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokred.optional import require

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
"""What the names of pictures end with."""


def folders(path: Path) -> list[str]:
    """The names of the folders in it, but for hidden ones (`.ipynb_checkpoints`)."""
    return sorted(
        entry.name
        for entry in path.iterdir()
        if entry.is_dir() and not entry.name.startswith((".", "__"))
    )


def shown(folder: Path) -> list[Path]:
    """The files under it, without hidden ones: `._a.jpg`, which macOS writes, is no picture."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    )


def is_picture(file: Path) -> bool:
    """Whether it is one, by its name, and not hidden."""
    return file.is_file() and file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures under it, without hidden ones."""
    return [file for file in shown(folder) if file.suffix.lower() in SUFFIXES]


def some_pictures(folder: Path) -> tuple[Path, ...]:
    """The same.

    Raises:
        ValueError: there are none.
    """
    files = tuple(pictures_in(folder))
    if not files:
        raise ValueError(
            f"{folder} must hold pictures ({', '.join(sorted(SUFFIXES))}), and has none"
        )
    return files


def opened(path: Path) -> Any:
    """A picture as it is stored, all of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or a broken one.
    """
    image = require("PIL.Image", "evaluate")
    try:
        with image.open(path) as found:
            found.load()
            return found
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def picture(path: Path) -> Any:
    """A picture in colour, the right way up: cameras store how they were held.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, a broken one, or it cannot be told which number is white.
    """
    upright = require("PIL.ImageOps", "evaluate").exif_transpose(opened(path))
    try:
        return coloured(upright)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def coloured(picture: Any) -> Any:
    """A picture of any mode in red, green and blue.

    Raises:
        ValueError: it cannot be told which number is white.
    """
    if picture.mode.startswith("I;16"):  # Pillow would make everything above 255 white
        grey = np.rint(np.asarray(picture) / 257).astype(np.uint8)
        picture = require("PIL.Image", "evaluate").fromarray(grey)
    elif picture.mode == "F" or (picture.mode == "I" and picture.getextrema()[1] > 255):
        raise ValueError(
            f"pictures must have 8 or 16 bits per channel, and mode {picture.mode} does not say "
            "which number is white"
        )
    return picture.convert("RGB")


def class_map(picture: Any) -> Int[Tensor, "height width"]:
    """The class of every pixel, [height, width], of a picture with one channel or a palette.

    Raises:
        ValueError: it has several channels.
    """
    return torch.from_numpy(_channel(picture).astype(np.int64))


def depth_map(picture: Any) -> Float[Tensor, "height width"]:
    """The depth of every pixel, of a picture with one channel, in its unit."""
    return torch.from_numpy(_channel(picture).astype(np.float32))


def _channel(picture: Any) -> Any:
    pixels = np.asarray(picture)
    if pixels.ndim != 2:
        raise ValueError(
            f"a map of classes or depths must have one channel, not {pixels.shape[-1]} (mode "
            f"{picture.mode})"
        )
    return pixels
