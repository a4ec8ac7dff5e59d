"""The files of the images of a sweep."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tokred.data.writing import clear_parts, whole
from tokred.measure.fid.sweep import Sweep, SweepSetting
from tokred.optional import require


def file_of(number: int) -> str:
    """The name of the file of image `number`."""
    return f"{number:06d}.png"


def drawn(sweep: Sweep, out: Path, setting: SweepSetting) -> list[Path]:
    """The files of all images of a setting.

    Raises:
        ValueError: some are missing.
    """
    files = [out / setting.name / file_of(number) for number in range(sweep.images)]
    missing = sum(not file.exists() for file in files)
    if missing:
        raise ValueError(
            f"{out / setting.name} lacks {missing} of {sweep.images} images: generate them first"
        )
    return files


def discard_broken(sweep: Sweep, out: Path) -> None:
    """Removes images that are broken (by a full disk, say), so that they are drawn again; and what
    processes that were killed have left."""
    for setting in sweep.settings():
        folder = out / setting.name
        clear_parts(folder)
        for number in range(sweep.images):
            file = folder / file_of(number)
            if file.exists() and not is_whole(file):
                warnings.warn(f"{file} is broken: it is drawn again", stacklevel=2)
                file.unlink()


def is_whole(file: Path) -> bool:
    """Whether a PNG file is as it was written: by the checksums in it."""
    pil = require("PIL.Image", "plots")
    try:
        with pil.open(file, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, EOFError):
        return False
    return True


def save(image: Any, path: Path) -> None:
    """Writes an image as PNG, whole or not at all."""
    with whole(path) as part:
        image.save(part, format="PNG")
