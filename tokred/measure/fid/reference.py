"""The real pictures that images are compared with."""

from __future__ import annotations

from pathlib import Path

import torch

from tokred.data import reading, zoo
from tokred.measure.fid.files import file_of, is_whole, save
from tokred.optional import require


def digit_reference(folder: Path, drawings: int = 4) -> Path:
    """Makes a reference for the images of the bundled pipeline: draws the held-out digits as the
    pipeline has learned them.

    Args:
        folder: where the pictures are written; made if need be. Those that are there, and are
            not broken, stay.
        drawings: how often every digit is drawn.

    Returns:
        The folder.
    """
    held_out = zoo.held_out("digits")
    noise = torch.Generator().manual_seed(0)
    images = torch.cat(
        [zoo.draw(held_out.digits, noise, "digits", 32) for _ in range(drawings)]
    ).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    pil = require("PIL.Image", "plots")
    for number, image in enumerate(images):
        file = folder / file_of(number)
        if not (file.exists() and is_whole(file)):
            save(pil.fromarray(image[0]), file)
    return folder


def reference_pictures(folder: Path, per_folder: int | None = None) -> list[Path]:
    """The pictures in a folder and in all folders below it, by name; hidden ones are passed over.

    Args:
        folder: where to look.
        per_folder: how many to take of each of the folders in it; None: all.

    Raises:
        ValueError: there are fewer than two, or fewer than `per_folder` in one of the folders.
    """
    found = reading.pictures_in(folder)
    if per_folder is not None:
        by_folder: dict[Path, list[Path]] = {}
        for path in found:
            by_folder.setdefault(path.parent, []).append(path)
        poor = [parent for parent, there in by_folder.items() if len(there) < per_folder]
        if folder in by_folder or poor:
            raise ValueError(
                f"{folder} must hold folders, each with at least {per_folder} pictures"
                + (f"; {poor[0]} does not" if poor else ", and no pictures beside them")
            )
        found = [path for there in by_folder.values() for path in there[:per_folder]]
    if len(found) < 2:
        raise ValueError(f"the reference {folder} holds {len(found)} pictures, and must hold two")
    return found
