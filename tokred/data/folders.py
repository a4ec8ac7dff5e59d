"""Folders of pictures: without targets, with a folder for each class, or with maps beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokred.data import reading
from tokred.data.classes import class_numbers, wants
from tokred.data.fingerprint import stamp_of_files
from tokred.data.parts import DEPTHS, MASKS, Source


def read_folder(path: Path, model: nn.Module | None, labelled: bool) -> Source:
    """The pictures in a folder, with targets if `labelled` and there are any.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no pictures, a picture has no map or no class, or it is not clear
            which class of the model a folder is.
    """
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file: give its folder, or a list of files")
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path} (a Hugging Face dataset is hf:NAME, a bundled model's "
            "images are tokred.zoo.held_out())"
        )
    held_out = None if (path / "images").is_dir() else _held_out_of(path)
    folder = held_out or path
    found: Any
    if (folder / "images").is_dir():
        found = _with_maps(folder, model, labelled)
    elif labelled and reading.folders(folder):
        # A class of which no picture was held out is a class all the same.
        train = folder.parent / "train"
        there = reading.folders(train) if held_out is not None and train.is_dir() else []
        found = _with_classes(folder, there, model)
    else:
        found = Files(reading.some_pictures(folder))
    return Source(found, str(folder), lambda i: found[i][0])


def _with_maps(folder: Path, model: nn.Module | None, labelled: bool) -> Files | _Maps:
    """Pictures in `images`, with the maps of the same names in a folder beside it."""
    images = folder / "images"
    names = (*DEPTHS, *MASKS) if wants(model) == "depth" else (*MASKS, *DEPTHS)
    beside = next((folder / name for name in names if (folder / name).is_dir()), None)
    files = reading.some_pictures(_held_out_of(images) or images)
    if beside is None or not labelled:
        return Files(files)
    by_stem = {
        file.relative_to(beside).with_suffix(""): file
        for file in reading.shown(beside)
        if file.suffix.lower() in reading.SUFFIXES | {".npy"}
    }
    missing = [f for f in files if f.relative_to(images).with_suffix("") not in by_stem]
    if missing:
        raise ValueError(
            f"{missing[0]} has nothing of its name in {beside} (labelled=False, --unlabelled, does "
            "without)"
        )
    targets = tuple(by_stem[f.relative_to(images).with_suffix("")] for f in files)
    return _Maps(files, targets, beside.name in DEPTHS)


def _with_classes(folder: Path, trained: list[str], model: nn.Module | None) -> _Labelled:
    """Pictures in a folder for each class.

    Args:
        folder: the folder that holds those of the classes.
        trained: the classes of the training pictures, if they are known; they count if they
            include all that are here.
        model: the model whose classes are meant.
    """
    folders = reading.folders(folder)
    beside_them = [file for file in folder.iterdir() if reading.is_picture(file)]
    if beside_them:
        raise ValueError(
            f"{beside_them[0]} is beside folders, and so in no class: move it, or give "
            "labelled=False (--unlabelled) to compare with the dense model alone"
        )
    classes = trained if set(folders) <= set(trained) else folders
    numbers = class_numbers(classes, model, f"the folders of {folder}")
    known = dict(zip(classes, numbers, strict=True))
    labels = [(f, known[name]) for name in folders for f in reading.pictures_in(folder / name)]
    if not labels:
        raise ValueError(
            f"{folder} must hold a folder of pictures for each class, and those that it has are "
            "empty"
        )
    return _Labelled(tuple(f for f, _ in labels), tuple(number for _, number in labels))


def _held_out_of(path: Path) -> Path | None:
    """The folder of the held-out pictures, or else of the training pictures, if `path` has a folder
    for each split; None if it has none."""
    there = set(reading.folders(path))
    held_out = next((name for name in reading.HELD_OUT if name in there), None)
    if held_out is not None and there & {"train", "training"}:
        return path / held_out
    if there and there <= {"train", *reading.HELD_OUT}:  # no classes have such names
        return path / (held_out or "train")
    if there == {"training", "validation"}:
        return path / "validation"
    return None


@dataclass(frozen=True)
class Files:
    """Pictures without targets."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        return reading.picture(self.files[index]), None

    def identity(self, numbers: Sequence[int]) -> str:
        """See `tokred.data.fingerprint.identity_of`."""
        return stamp_of_files([self.files[i] for i in numbers])


@dataclass(frozen=True)
class _Labelled:
    """Pictures, with the class of each."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return reading.picture(self.files[index]), self.labels[index]

    def identity(self, numbers: Sequence[int]) -> str:
        files = stamp_of_files([self.files[i] for i in numbers])
        return f"{files} {[self.labels[i] for i in numbers]}"


@dataclass(frozen=True)
class _Maps:
    """Pictures, with the class or the depth of every pixel."""

    files: tuple[Path, ...]
    targets: tuple[Path, ...]
    depth: bool

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        target = self.targets[index]
        try:
            pixels = reading.map_file(target, self.depth)
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{target}: {error}") from error
        picture = reading.picture(self.files[index])
        if pixels.ndim != 2 or not _alike(picture.size, (pixels.shape[1], pixels.shape[0])):
            raise ValueError(
                f"{target} must be as wide for its height as {self.files[index]}, which is "
                f"{picture.size[0]} x {picture.size[1]} pixels, and is of {tuple(pixels.shape)}"
            )
        return picture, pixels

    def identity(self, numbers: Sequence[int]) -> str:
        both = (stamp_of_files([of[i] for i in numbers]) for of in (self.files, self.targets))
        return f"{' '.join(both)} {self.depth}"


def _alike(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two rectangles have the same shape, but for the rounding of whole pixels."""
    (width, height), (w, h) = size, other
    return abs(width * h - height * w) <= max(width, height, w, h)
