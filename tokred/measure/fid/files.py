"""Names of the images, and files that are written whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokred.measure.fid.sweep import Setting, Sweep


def fingerprint(module: nn.Module) -> str:
    """Tells weights apart: the shapes of all, and some values of each that can be read."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta:
            digest.update(value.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def file_of(number: int) -> str:
    """The name of the file of image `number`."""
    return f"{number:06d}.png"


def drawn(sweep: Sweep, out: Path, setting: Setting) -> list[Path]:
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
    """Writes an image under another name first: a file that is there is whole."""
    part = path.with_suffix(".part")
    image.save(part, format="PNG")
    part.replace(path)


def write(path: Path, text: str) -> None:
    """Writes text in the same way."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
