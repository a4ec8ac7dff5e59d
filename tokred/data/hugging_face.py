"""Hugging Face datasets, as sequences of (image, target)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokred.data import reading
from tokred.data.classes import class_numbers, num_classes, wants
from tokred.data.parts import IMAGES, LABELS, MAPS, WITHOUT, Source, is_picture, parted
from tokred.optional import require


def load_dataset(name: str, extra: str) -> Any:
    """A dataset, or all of its splits.

    Args:
        name: its name on the hub, with a configuration after a colon if need be, or a folder that
            `save_to_disk` has written.
        extra: the extra of tokred that brings the library `datasets`, for the message if it is
            missing.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
    """
    datasets = require("datasets", extra)
    if Path(name).is_dir() and any(Path(name).glob("dataset*.json")):
        return datasets.load_from_disk(name)
    name, _, configuration = name.partition(":")
    return datasets.load_dataset(name, configuration or None)


def read_dataset(found: Any, model: nn.Module | None, labelled: bool, name: str) -> Source:
    """The images of a dataset, with targets if `labelled` and it has any.

    Args:
        found: a split, or several by name, of which the held-out one is taken.
        model: the model whose classes are meant.
        labelled: whether to look for targets.
        name: what the dataset is called.

    Raises:
        TypeError: the dataset is streamed.
        ValueError: there are no images, or it is not clear which classes of the model are meant.
        ModuleNotFoundError: `datasets` is not installed.
    """
    if hasattr(found, "keys"):  # several splits
        split = next((split for split in reading.HELD_OUT if split in found), next(iter(found)))
        found, name = found[split], f"{name}, {split}"
    if not hasattr(found, "__len__"):
        raise TypeError(
            f"{name} is streamed, and so has no length: give some of its rows, as in "
            "list(dataset.take(256))"
        )
    if not len(found):
        raise ValueError(f"there are no images in {name}")
    kind = require("datasets", "evaluate").Image
    images = [column for column, feature in found.features.items() if isinstance(feature, kind)]
    prepared = found.format["type"] == "custom"
    if prepared or (not images and "pixel_values" in found.features):
        tensors = found if prepared else found.with_format("torch")
        return Source(tensors, name, lambda i: parted(tensors[i])[0])
    if not images:
        raise ValueError(f"{name} has no column of images; it has {', '.join(found.features)}")
    rows = _rows(found, images, model, labelled, name)
    return Source(rows, name, lambda i: rows[i][0])


def _rows(
    found: Any, images: list[str], model: nn.Module | None, labelled: bool, name: str
) -> _Rows:
    """Chooses the columns of image and target.

    Args:
        found: a split.
        images: its columns of pictures, some of which may be maps.
        model, labelled, name: as in `read_dataset`.
    """
    likely = [n for n in IMAGES if n in images] or [n for n in images if n not in MAPS]
    image = (likely or images)[0]
    maps = [n for n in images if n != image]
    depths = [n for n in maps if "depth" in n.lower()]
    maps.sort(key=lambda n: (n in depths) != (wants(model) == "depth"))
    label, numbers = None, None
    if labelled and not (maps and wants(model)):
        label, numbers = _class_column(found, model, name)
    if labelled and label is None and maps:
        label = maps[0]
    # Pictures as Pillow has them, whatever form rows would have.
    plain = found.with_format(None)
    return _Rows(plain, image, label, numbers, num_classes(model), label in depths)


def _class_column(
    found: Any, model: nn.Module | None, name: str
) -> tuple[str | None, list[int] | None]:
    """The column of classes, and if they have names, the number of each in the model."""
    datasets = require("datasets", "evaluate")
    kinds = {n: getattr(kind, "feature", kind) for n, kind in found.features.items()}
    classes = [n for n, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    classes.sort(key=lambda n: n not in LABELS)
    refusals = []
    for column in classes:
        try:
            where = f"the labels of {name}"
            return column, class_numbers(kinds[column].names, model, where)
        except ValueError as error:  # another column may have the classes of this model
            refusals.append(error)
    if refusals:
        raise refusals[0]
    for column in LABELS:
        if isinstance(kinds.get(column), datasets.Value):
            return column, None
    return None, None


@dataclass(frozen=True)
class _Rows:
    """A split of a Hugging Face dataset, as (image, target).

    Attributes:
        rows: the split.
        image, label: the names of its columns; no label: samples have no targets.
        numbers: for each class of the dataset, its number in the model; None: labels are numbers
            of the model's classes already.
        classes: how many classes the model has, if it says so.
        depth: whether maps hold depths.
    """

    rows: Any
    image: str
    label: str | None
    numbers: list[int] | None
    classes: int | None
    depth: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.rows[index]
        label = None if self.label is None else row[self.label]
        if self.label is not None and label is None:
            raise ValueError(f"row {index} has no {self.label}: {WITHOUT}")
        if isinstance(label, list):
            label = self._several(label, index)
        elif isinstance(label, str):
            raise ValueError(
                f"row {index} has the {self.label} {label!r}, which must be a number: make it one "
                f'with dataset.class_encode_column("{self.label}")'
            )
        elif isinstance(label, int) and self.numbers:
            label = self._number(label, index)
        elif is_picture(label):
            label = reading.depth_map(label) if self.depth else reading.class_map(label)
        return reading.coloured(row[self.image]), label

    def _number(self, label: int, index: int) -> int:
        assert self.numbers is not None
        if not 0 <= label < len(self.numbers):  # -1, in test splits whose labels are secret
            raise ValueError(f"row {index} has the {self.label} {label}, which is none: {WITHOUT}")
        return self.numbers[label]

    def _several(self, label: list[Any], index: int) -> Any:
        """A list of classes as zeros and ones, one for each class."""
        if any(isinstance(one, list) for one in label):
            return label
        if self.numbers:
            label = [self._number(number, index) for number in label]
        elif len(label) == (self.classes or len(label)) and {*label} <= {0, 1}:
            return label
        count = self.classes or len(self.numbers or ())
        wrong = [number for number in label if not 0 <= number < count or number != int(number)]
        if wrong:
            raise ValueError(
                f"row {index} has {wrong[0]} among its {self.label}: they must be zeros and ones, "
                f"one for each of {count} classes, or numbers of classes"
            )
        several = torch.zeros(count, dtype=torch.long)
        several[[int(number) for number in label]] = 1
        return several
