"""The files of the images of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokred.data.writing import whole
from tokred.measure.fid.sweep import Sweep, SweepSetting


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


def save(image: Any, path: Path) -> None:
    """Writes an image as PNG, whole or not at all."""
    with whole(path) as part:
        image.save(part, format="PNG")
