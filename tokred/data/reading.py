"""Pictures and maps in files and folders: the one place where they are found and decoded.

Hidden files and folders are passed over: those whose names begin with a dot (`._a.jpg`, which macOS
writes, is no picture) or with two underscores (`__MACOSX`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokred.optional import require

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
"""Endings of the names of pictures, in small letters."""
HELD_OUT = ("val", "validation", "valid", "test")
"""Names of folders and splits of held-out pictures; the first that is there is taken."""
IGNORED = 255
"""The class of pixels that do not count, if the model has no such class."""


def folders(path: Path) -> list[str]:
    """The names of the folders in a folder, without hidden ones, sorted."""
    return sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and not _hidden(entry.name)
    )


def shown(folder: Path) -> list[Path]:
    """The files in a folder and in all folders below it, without hidden ones, sorted."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(map(_hidden, file.relative_to(folder).parts))
    )


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def is_picture(file: Path) -> bool:
    """Whether a path is a file with the name of a picture, and not hidden."""
    return file.is_file() and file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder and in all folders below it, without hidden ones, sorted."""
    return [file for file in shown(folder) if file.suffix.lower() in SUFFIXES]


def some_pictures(folder: Path) -> tuple[Path, ...]:
    """The pictures in a folder, as `pictures_in` finds them.

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
    """A picture as it is stored, read completely.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, or a broken one.
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
        ValueError: the file is no picture, a broken one, or does not say which number is white.
    """
    upright = require("PIL.ImageOps", "evaluate").exif_transpose(opened(path))
    try:
        return coloured(upright)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def coloured(picture: Any) -> Any:
    """A picture of any mode in red, green and blue.

    Raises:
        ValueError: the mode does not say which number is white.
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


def map_file(path: Path, depth: bool) -> Tensor:
    """The class or the depth of every pixel, from an `.npy` file or a picture.

    Args:
        path: the file.
        depth: whether it holds depths (the result is float32) or classes (int64).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or has several channels.
    """
    if path.suffix.lower() == ".npy":
        pixels = torch.from_numpy(np.load(path, allow_pickle=False)).squeeze()
        return pixels.float() if depth else pixels.long()
    return depth_map(opened(path)) if depth else class_map(opened(path))


def class_map(picture: Any) -> Int[Tensor, "height width"]:
    """The class of every pixel, from a picture with one channel or a palette.

    Raises:
        ValueError: the picture has several channels.
    """
    return torch.from_numpy(_channel(picture).astype(np.int64))


def depth_map(picture: Any) -> Float[Tensor, "height width"]:
    """The depth of every pixel, from a picture with one channel, in its unit.

    Raises:
        ValueError: the picture has several channels.
    """
    return torch.from_numpy(_channel(picture).astype(np.float32))


def _channel(picture: Any) -> Any:
    pixels = np.asarray(picture)
    if pixels.ndim != 2:
        raise ValueError(
            f"a map of classes or depths must have one channel, not {pixels.shape[-1]} (mode "
            f"{picture.mode})"
        )
    return pixels
