"""Images of whatever kind somebody has, as a model takes them, with what is true of them.

    samples = tokred.samples.of("flowers/val", model)
    for inputs, targets in samples.batch(range(32)):  # one, if all are of one size
        ...

Taken are: a folder of pictures, or of folders of them, one for each class, or with `images` and
`labels` (or `depth`) in it; a Hugging Face dataset; a dataset or loader of torch or timm; a list of
pictures, paths, arrays or tensors, alone, with labels or by name; a tensor; a batch by name; what
`tokred.zoo.held_out` gives. They are prepared as the model's library says that this model wants it.

Hidden files and folders are passed over, pictures are turned as their EXIF data say, those of 16
bits are brought to 8, and all are in colour. Arrays of bytes are pictures; tensors, and arrays of
fractions, are what the model takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tokred.data import pictures, reading
from tokred.data.inputs import Inputs
from tokred.data.zoo import HeldOut, normalise
from tokred.host import module_of
from tokred.measure.metrics import IGNORED
from tokred.optional import require

MASKS = ("labels", "masks", "annotations", "segmentations")
"""What a folder beside `images` is called that holds the class of every pixel."""
DEPTHS = ("depth", "depths")
"""The same, for depths: `.npy`, or pictures in 16 or 32 bits, in the model's unit."""
_IMAGES = ("image", "img", "images", "pixel_values")
"""What columns and keys are called that hold images."""
_LABELS = ("labels", "label")
_MAPS = ("annotation", "mask", "segmentation", "depth_map", *MASKS[1:], *DEPTHS)
"""What those are called that hold what is true of them: of the whole, and of every pixel."""

Sample = tuple[Any, Tensor | None]
"""What the model takes for one image, without a batch, and what is true of it."""
Batch = list[tuple[Inputs, list[Tensor] | None]]
"""What the model takes for several images, with what is true of each; several such where images
differ in size."""
Transform = Callable[[Any], Any]
"""From a picture to a tensor [C, H, W]: a function, or an image processor of transformers."""


@dataclass(frozen=True)
class Samples:
    """Images as a model takes them.

    Attributes:
        items: from a number to a sample; it has a length.
        name: what they are, in words.
        input_name: what the model calls its images; None if it takes them without a name.
        picture: from a number to the image as people look at it; None if it cannot be had.
    """

    items: Any
    name: str
    input_name: str | None = None
    picture: Callable[[int], Any] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.items[index]
        return sample

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The samples of these numbers: one batch, or, where images differ in size, several."""
        groups: dict[Any, list[Sample]] = {}
        for number in numbers:
            sample = self[number]
            groups.setdefault(_shape(sample[0]), []).append(sample)
        return [_stacked(group) for group in groups.values()]

    def batches(self, wanted: Sequence[Sequence[int]], workers: int = 0) -> Iterator[Batch]:
        """The samples of these numbers, batch after batch, as `batch` gives them.

        Args:
            wanted: the numbers of each batch.
            workers: processes that read and prepare them; 0: this one.
        """
        if workers == 0 or not wanted:
            yield from map(self.batch, wanted)
            return
        yield from DataLoader(
            _Batches(self, wanted), batch_size=None, num_workers=workers, collate_fn=_as_it_is
        )

    def fingerprint(self, looked_at: int = 16) -> str:
        """Tells these samples from others: by their number, by all labels and sizes of files that
        can be had without looking at images, and by a few of them, bit by bit."""
        digest = hashlib.sha256(f"{len(self)} {_stamp(self.items)}".encode())
        many = min(looked_at, len(self))
        for i in range(many):
            inputs, target = self[i * (len(self) - 1) // max(1, many - 1)]
            parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
            for part in [*parts, target]:
                if isinstance(part, Tensor):
                    digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
                    flat = part.detach().cpu().contiguous().reshape(-1)
                    digest.update(flat.view(torch.uint8).numpy().data)
                else:
                    digest.update(repr(part).encode())
        return digest.hexdigest()[:16]


def of(
    data: Any,
    model: nn.Module | None = None,
    transform: Transform | None = None,
    limit: int | None = None,
    labelled: bool = True,
) -> Samples:
    """Whatever somebody has, as `Samples` of what `model` takes.

    Args:
        data: see the head of this file.
        model: the model they are for: how it wants its images, what it calls them, and what its
            classes are called.
        transform: how images are prepared, if not as the model's library says. Tensors are
            taken as they are.
        limit: take only so many, spread evenly.
        labelled: whether to look for labels.

    Raises:
        ValueError: there are no images, or it cannot be told how to prepare them, or what classes
            are meant. What is wrong with a single image is told when it is taken.
        TypeError: it is none of these.
        FileNotFoundError: there is no such folder.
        ModuleNotFoundError: a library is missing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, not {limit}")
    if isinstance(data, Samples):
        found = data
    else:
        items, name, picture = _read(data, model, labelled)
        prepare = _Prepare(items, model, transform, labelled)
        found = Samples(prepare, name, _input_name(model), picture)
    if not len(found):
        raise ValueError(f"there are no images in {found.name}")
    if limit is not None and limit < len(found):
        found = _spread(found, limit)
    return found


@dataclass(frozen=True)
class _Batches(Dataset[Batch]):
    """A dataset of torch whose samples are batches."""

    samples: Samples
    wanted: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> Batch:
        return self.samples.batch(self.wanted[index])


def _as_it_is(batch: Batch) -> Batch:
    return batch


def drawn(samples: Samples, many: int, seed: int = 0) -> Samples:
    """So many of them, drawn by lot, in an order that is drawn, too."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return _only(samples, order[:many].tolist())


def _spread(samples: Samples, limit: int) -> Samples:
    # Spread, because folders come class by class.
    return _only(samples, [i * len(samples) // limit for i in range(limit)])


def _only(samples: Samples, chosen: list[int]) -> Samples:
    look = samples.picture
    return Samples(
        _Chosen(samples.items, chosen),
        samples.name if len(chosen) == len(samples) else f"{len(chosen)} of {samples.name}",
        samples.input_name,
        None if look is None else lambda i: look(chosen[i]),
    )


@dataclass(frozen=True)
class _Chosen:
    items: Any
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.items[self.numbers[index]]
        return sample

    def stamp(self) -> str:
        return f"{self.numbers} {_stamp(self.items)}"


def _stamp(items: Any) -> str:
    """What tells items from others, and costs little; empty if there is nothing."""
    told = getattr(items, "stamp", None)
    if told is not None:
        return str(told())
    if isinstance(items, list | tuple):
        return str([_plain(_parted(sample)[1]) for sample in items])
    targets = getattr(items, "targets", None)  # as torchvision's datasets have them
    return "" if targets is None else str(_plain(targets))


def _plain(target: Any) -> Any:
    """Numbers and names that are the same in the next process, too; None for all else."""
    if isinstance(target, Tensor):
        target = target.detach().cpu().numpy()
    if isinstance(target, np.ndarray):  # maps are large
        small = target.ndim < 2
        return target.tolist() if small else hashlib.sha256(target.tobytes()).hexdigest()
    if isinstance(target, list | tuple):
        return [_plain(one) for one in target]
    return target if isinstance(target, int | float | str) else None


def _stamp_of(files: Sequence[Path]) -> str:
    return str([(file.name, file.stat().st_size) for file in files])


# --- reading --------------------------------------------------------------------------------------


def _read(
    data: Any, model: nn.Module | None, labelled: bool
) -> tuple[Any, str, Callable[[int], Any] | None]:
    """A sequence of (image, target), what it is called, and how to look at its images."""
    if isinstance(data, HeldOut):
        return _HeldOut(data), f"{len(data.images)} held-out images", data.images.__getitem__
    if isinstance(data, str | Path):
        if str(data).startswith("hf:"):
            return _hugging_face(_load_dataset(str(data)[3:]), model, labelled, str(data))
        return _folder(Path(data), model, labelled)
    if isinstance(data, Tensor):
        if data.ndim != 4 or not data.is_floating_point():
            raise ValueError(
                "images must be a float tensor [batch, channels, height, width], as the model "
                f"takes them, not {data.dtype} of {tuple(data.shape)}"
            )
        return _Unlabelled(data), f"{len(data)} images", data.__getitem__
    if isinstance(data, torch.utils.data.DataLoader):
        usual = data.collate_fn in (
            torch.utils.data.default_collate,
            torch.utils.data.default_convert,
        )
        if not usual and hasattr(data.dataset, "__len__"):
            # It may be what makes tensors of pictures.
            loaded = _Collated(data.dataset, data.collate_fn)
            return loaded, f"{len(loaded)} samples", lambda i: _parted(loaded[i])[0]
        return _read(data.dataset, model, labelled)
    if type(data).__module__.split(".")[0] == "datasets":
        return _hugging_face(data, model, labelled, "the dataset")
    if isinstance(data, Mapping) and any(isinstance(x, Tensor) for x in data.values()):
        columns = _Columns(data)
        return columns, f"{len(columns)} samples", lambda i: _parted(columns[i])[0]
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(
            "data must be a folder, a dataset with a length and numbers, or a list of images, not "
            f"{type(data).__name__}; of what can only be gone through, give a list of some"
        )
    if not len(data):
        raise ValueError("data must hold at least one image, and is empty")
    try:
        first = data[0]
    except (KeyError, TypeError, NotImplementedError) as error:
        raise TypeError(
            "data must be a folder, a dataset with a length and numbers, or a list of images, not "
            f"{type(data).__name__}, which has no number 0"
        ) from error
    if isinstance(first, str | Path):
        files = _Files(tuple(Path(path) for path in data))
        return files, f"{len(data)} pictures", lambda i: files[i][0]
    if isinstance(first, Tensor | np.ndarray) or _is_picture(first):
        return _Unlabelled(data), f"{len(data)} images", lambda i: data[i]
    if isinstance(first, Mapping | tuple | list):
        return data, f"{len(data)} samples", lambda i: _parted(data[i])[0]
    raise TypeError(
        "samples must be pictures, paths, tensors, arrays, (image, label) or mappings, not "
        f"{type(first).__name__}"
    )


def _folder(
    path: Path, model: nn.Module | None, labelled: bool
) -> tuple[Any, str, Callable[[int], Any]]:
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file: give its folder, or a list of files")
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path} (a Hugging Face dataset is hf:NAME, a bundled model's "
            "images are tokred.zoo.held_out())"
        )
    images = path / "images"
    found: Any
    if images.is_dir():
        names = (*DEPTHS, *MASKS) if _wants(model) == "depth" else (*MASKS, *DEPTHS)
        beside = next((path / n for n in names if (path / n).is_dir()), None)
        files = reading.some_pictures(_held_out_of(images) or images)
        if beside is None or not labelled:
            found = _Files(files)
        else:
            by_stem = {
                file.relative_to(beside).with_suffix(""): file
                for file in reading.shown(beside)
                if file.suffix.lower() in reading.SUFFIXES | {".npy"}
            }
            missing = [f for f in files if f.relative_to(images).with_suffix("") not in by_stem]
            if missing:
                raise ValueError(
                    f"{missing[0]} has nothing of its name in {beside} (labelled=False, "
                    "--unlabelled, does without)"
                )
            targets = tuple(by_stem[f.relative_to(images).with_suffix("")] for f in files)
            found = _Maps(files, targets, beside.name in DEPTHS)
        return found, str(path), lambda i: found[i][0]
    held_out = _held_out_of(path)
    if held_out is not None:
        path = held_out
        if (path / "images").is_dir():
            return _folder(path, model, labelled)
    folders = reading.folders(path)
    if labelled and folders:
        beside_them = [file for file in path.iterdir() if reading.is_picture(file)]
        if beside_them:
            raise ValueError(
                f"{beside_them[0]} is beside folders, and so in no class: move it, or give "
                "labelled=False (--unlabelled) to compare with the dense model alone"
            )
        # A class of which no picture was held out is a class all the same.
        train = path.parent / "train"
        there = reading.folders(train) if held_out is not None and train.is_dir() else []
        classes = there if set(folders) <= set(there) else folders
        numbers = class_numbers(classes, model, f"the folders of {path}")
        known = dict(zip(classes, numbers, strict=True))
        labels = [(f, known[name]) for name in folders for f in reading.pictures_in(path / name)]
        if not labels:
            raise ValueError(
                f"{path} must hold a folder of pictures for each class, and those that it has are "
                "empty"
            )
        found = _Labelled(tuple(f for f, _ in labels), tuple(number for _, number in labels))
    else:
        found = _Files(reading.some_pictures(path))
    return found, str(path), lambda i: found[i][0]


def _held_out_of(path: Path) -> Path | None:
    """What is to be looked at of a folder with a folder for each split; None if it is no such."""
    there = set(reading.folders(path))
    held_out = next((name for name in pictures.HELD_OUT if name in there), None)
    if held_out is not None and there & {"train", "training"}:
        return path / held_out
    if there and there <= {"train", *pictures.HELD_OUT}:  # no classes are called so
        return path / (held_out or "train")
    if there == {"training", "validation"}:
        return path / "validation"
    return None


def _wants(model: nn.Module | None) -> str | None:
    """Whether a model's class says that it answers with "depth" or "segmentation"."""
    name = type(model).__name__
    if "Depth" in name:
        return "depth"
    return "segmentation" if "Segment" in name else None


def class_numbers(names: Sequence[str], model: nn.Module | None, where: str) -> list[int]:
    """Which of the model's classes each of these names is.

    Names may be numbers, the model's own names (transformers' `id2label`; of "tench, Tinca tinca"
    each, if no other class has it), or, if there are as many as the model has classes, anything:
    then they are counted in order.

    Raises:
        ValueError: it cannot be told.
    """
    known = _labels(model)
    found = [known.get(_spelled(name)) for name in names]
    if found and None not in found:
        return [number for number in found if number is not None]
    if all(name.isdecimal() for name in names):
        return [int(name) for name in names]
    wordnet = _wordnet(names, model)
    if wordnet is not None:
        return wordnet
    count = _num_classes(model)
    some = [name for name, number in zip(names, found, strict=True) if number is not None]
    if some:
        stranger = next(name for name in names if _spelled(name) not in known)
        raise ValueError(
            f"{where} are called partly as the model's classes ({some[0]!r}) and partly not "
            f"({stranger!r}): name all of them by the model's labels or numbers"
        )
    if count is None or count == len(names):
        return list(range(len(names)))
    raise ValueError(
        f"{where} are {len(names)} classes ({', '.join(names[:3])}, ...), and the model has "
        f"{count}, of other names: name them by the model's numbers or labels, or give "
        "labelled=False (--unlabelled) to compare with the dense model alone"
    )


def _labels(model: nn.Module | None) -> dict[str, int]:
    """The model's names of its classes, in small letters, with their numbers."""
    config = getattr(model, "config", None)
    # transformers leaves label2id empty where only id2label was given.
    labels = {int(k): str(v) for k, v in (getattr(config, "id2label", None) or {}).items()}
    labels = labels or {
        int(v): str(k) for k, v in (getattr(config, "label2id", None) or {}).items()
    }
    known = {_spelled(name): number for number, name in labels.items()}
    parts = [
        (_spelled(part), number) for number, name in labels.items() for part in name.split(",")
    ]
    owners: dict[str, set[int]] = {}
    for part, number in parts:
        owners.setdefault(part, set()).add(number)
    single = {part: number for part, number in parts if len(owners[part]) == 1}
    return single | known


def _spelled(name: str) -> str:
    """A name as it is compared with others: folders have `_` for spaces."""
    return name.strip().lower().replace("_", " ")


def _wordnet(names: Sequence[str], model: nn.Module | None) -> list[int] | None:
    """The numbers of ImageNet's classes, if folders are called as in ImageNet."""
    looks_so = all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in names)
    if not looks_so or _num_classes(model) != 1000:
        return None
    known = list(require("timm.data", "timm").ImageNetInfo().label_names())
    return [known.index(name) for name in names] if set(names) <= set(known) else None


def _num_classes(model: nn.Module | None) -> int | None:
    for owner in (model, getattr(model, "config", None)):
        for name in ("num_classes", "num_labels"):
            count = getattr(owner, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return None


def _load_dataset(name: str) -> Any:
    datasets = require("datasets", "evaluate")
    if Path(name).is_dir() and any(Path(name).glob("dataset*.json")):
        found = datasets.load_from_disk(name)
    else:
        name, _, configuration = name.partition(":")
        found = datasets.load_dataset(name, configuration or None)
    return found


def _hugging_face(
    found: Any, model: nn.Module | None, labelled: bool, name: str
) -> tuple[Any, str, Callable[[int], Any]]:
    datasets = require("datasets", "evaluate")
    if hasattr(found, "keys"):  # several splits
        split = next((split for split in pictures.HELD_OUT if split in found), next(iter(found)))
        found, name = found[split], f"{name}, {split}"
    if not hasattr(found, "__len__"):
        raise TypeError(
            f"{name} is streamed, and so has no length: give some of its rows, as in "
            "list(dataset.take(256))"
        )
    if not len(found):
        raise ValueError(f"there are no images in {name}")
    columns = found.features
    images = [n for n, kind in columns.items() if isinstance(kind, datasets.Image)]
    if found.format["type"] == "custom" or (not images and "pixel_values" in columns):
        # It is prepared already.
        rows = found if found.format["type"] == "custom" else found.with_format("torch")
        return rows, name, lambda i: _parted(rows[i])[0]
    if not images:
        raise ValueError(f"{name} has no column of images; it has {', '.join(columns)}")
    likely = [n for n in _IMAGES if n in images] or [n for n in images if n not in _MAPS]
    image = (likely or images)[0]
    maps = [n for n in images if n != image]
    depths = [n for n in maps if "depth" in n.lower()]
    maps.sort(key=lambda n: (n in depths) != (_wants(model) == "depth"))
    label, numbers = None, None
    if labelled and not (maps and _wants(model)):
        label, numbers = _class_column(found, model, name)
    if labelled and label is None and maps:
        label = maps[0]
    # Pictures as Pillow has them, whatever form rows would have.
    rows = found.with_format(None)
    split = _Rows(rows, image, label, numbers, _num_classes(model), label in depths)
    return split, name, lambda i: split[i][0]


def _class_column(
    found: Any, model: nn.Module | None, name: str
) -> tuple[str | None, list[int] | None]:
    """The column of classes, and which of the model's each of them is, if they have names."""
    datasets = require("datasets", "evaluate")
    kinds = {n: getattr(kind, "feature", kind) for n, kind in found.features.items()}
    classes = [n for n, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    classes.sort(key=lambda n: n not in _LABELS)
    refusals = []
    for column in classes:
        try:
            where = f"the labels of {name}"
            return column, class_numbers(kinds[column].names, model, where)
        except ValueError as error:  # another column may have the classes of this model
            refusals.append(error)
    if refusals:
        raise refusals[0]
    for column in _LABELS:
        if isinstance(kinds.get(column), datasets.Value):
            return column, None
    return None, None


@dataclass(frozen=True)
class _Rows:
    """A split of a Hugging Face dataset."""

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
            raise ValueError(f"row {index} has no {self.label}: {_WITHOUT}")
        if isinstance(label, list):
            label = self._several(label, index)
        elif isinstance(label, str):
            raise ValueError(
                f"row {index} has the {self.label} {label!r}, which must be a number: make it one "
                f'with dataset.class_encode_column("{self.label}")'
            )
        elif isinstance(label, int) and self.numbers:
            label = self._number(label, index)
        elif _is_picture(label):
            label = reading.depth_map(label) if self.depth else reading.class_map(label)
        return reading.coloured(row[self.image]), label

    def _number(self, label: int, index: int) -> int:
        assert self.numbers is not None
        if not 0 <= label < len(self.numbers):  # -1, in test splits whose labels are secret
            raise ValueError(f"row {index} has the {self.label} {label}, which is none: {_WITHOUT}")
        return self.numbers[label]

    def _several(self, label: list[Any], index: int) -> Any:
        """Zeros and ones, of a list of classes."""
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

    def stamp(self) -> str:
        if self.label is None or type(self.rows.features[self.label]).__name__ == "Image":
            return ""
        return str(list(self.rows[self.label]))


_WITHOUT = "give labelled=False (--unlabelled) to compare with the dense model alone"


@dataclass(frozen=True)
class _Columns:
    """A batch by name, as processors of transformers give it."""

    columns: Mapping[str, Any]

    def __len__(self) -> int:
        return len(next(x for x in self.columns.values() if isinstance(x, Tensor)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


@dataclass(frozen=True)
class _Collated:
    """What a loader makes of each sample alone."""

    samples: Any
    collate: Callable[[list[Any]], Any]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        batch = self.collate([self.samples[index]])
        if isinstance(batch, Mapping):
            return {name: column[0] for name, column in batch.items()}
        if isinstance(batch, tuple | list):
            return tuple(column[0] for column in batch)
        return (batch[0],)


@dataclass(frozen=True)
class _HeldOut:
    held_out: HeldOut

    def __len__(self) -> int:
        return len(self.held_out.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return normalise(self.held_out.images[index]), self.held_out.labels[index]

    def stamp(self) -> str:
        return hashlib.sha256(self.held_out.labels.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class _Unlabelled:
    images: Any

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        return self.images[index], None


@dataclass(frozen=True)
class _Files:
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        return reading.picture(self.files[index]), None

    def stamp(self) -> str:
        return _stamp_of(self.files)


@dataclass(frozen=True)
class _Labelled:
    """Pictures, with the class of each."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return reading.picture(self.files[index]), self.labels[index]

    def stamp(self) -> str:
        return f"{_stamp_of(self.files)} {self.labels}"


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
            if target.suffix.lower() == ".npy":
                pixels = torch.from_numpy(np.load(target, allow_pickle=False)).squeeze()
                pixels = pixels.float() if self.depth else pixels.long()
            else:
                pixels = (reading.depth_map if self.depth else reading.class_map)(
                    reading.opened(target)
                )
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{target}: {error}") from error
        picture = reading.picture(self.files[index])
        if pixels.ndim != 2 or not _alike(picture.size, (pixels.shape[1], pixels.shape[0])):
            raise ValueError(
                f"{target} must be as wide for its height as {self.files[index]}, which is "
                f"{picture.size[0]} x {picture.size[1]} pixels, and is of {tuple(pixels.shape)}"
            )
        return picture, pixels

    def stamp(self) -> str:
        return f"{_stamp_of(self.files)} {_stamp_of(self.targets)}"


def _alike(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two rectangles have the same shape, but for the rounding of whole pixels."""
    (width, height), (w, h) = size, other
    return abs(width * h - height * w) <= max(width, height, w, h)


def _is_picture(x: Any) -> bool:
    return type(x).__module__.split(".")[0] == "PIL"


def _parted(sample: Any) -> tuple[Any, Any]:
    """An image, or a mapping of all that a model takes with it, and what is true of it."""
    if not isinstance(sample, Mapping):
        if not isinstance(sample, tuple | list):
            return sample, None
        return sample[0], sample[1] if len(sample) > 1 else None
    inputs = dict(sample)
    labels = [inputs.pop(name) for name in _LABELS if name in inputs]
    raw = [name for name, x in inputs.items() if _is_picture(x)]
    if raw:  # a row, of which the rest is nothing that a model takes
        named = [name for name in _IMAGES if name in raw]
        image = (named or [name for name in raw if name not in _MAPS] or raw)[0]
        labels += [inputs[name] for name in _MAPS if name in inputs and name != image]
        return inputs[image], labels[0] if labels else None
    target = labels[0] if labels else None
    return (next(iter(inputs.values())) if len(inputs) == 1 else inputs), target


# --- preparing ------------------------------------------------------------------------------------


@dataclass
class _Prepare:
    """Samples as the model takes them."""

    items: Any
    model: nn.Module | None
    transform: Transform | None
    labelled: bool
    _own: Transform | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        image, given = _parted(self.items[index])
        target = _target(given if self.labelled else None)
        classless = getattr(self.model, "num_classes", None) == 0
        if classless and target is not None and target.ndim == 0:
            raise ValueError(f"the model has no classes (num_classes=0) for labels: {_WITHOUT}")
        if isinstance(image, Mapping):
            return _one(image), target
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            image = torch.from_numpy(image.copy())
        if isinstance(image, Tensor):
            if not image.is_floating_point():
                raise ValueError(
                    "images that are tensors must be of fractions, as the model takes them, not "
                    f"{image.dtype} of {tuple(image.shape)}: give pictures instead"
                )
            if image.ndim == 4 and len(image) == 1:  # a batch of one, as processors give it
                image = image[0]
        else:
            image = self._prepared(image)
            if target is not None and target.ndim == 2:
                target = self._as_processed(target)
        name = _input_name(self.model)
        return (image if name is None else {name: image}), target

    def _prepared(self, picture: Any) -> Tensor:
        if isinstance(picture, str | Path):
            picture = reading.picture(Path(picture))
        elif isinstance(picture, np.ndarray):
            picture = require("PIL.Image", "evaluate").fromarray(picture)
        if self._own is None:
            given = self.transform
            self._own = own_transform(self.model) if given is None else given
            self._own = getattr(self._own, "image_processor", self._own)  # of a whole processor
            if hasattr(self._own, "preprocess"):  # an image processor
                self._own = pictures.Processed(self._own)
        if _is_picture(picture) and (
            self.transform is None or isinstance(self._own, pictures.Processed)
        ):
            picture = reading.coloured(picture)
        prepared: Tensor = self._own(picture)
        if not isinstance(prepared, Tensor) or prepared.ndim != 3:
            raise ValueError(
                "transform must make a tensor [channels, height, width] of a picture, not "
                f"{tuple(prepared.shape) if isinstance(prepared, Tensor) else type(prepared)}"
            )
        return prepared

    def _as_processed(self, target: Tensor) -> Tensor:
        """A map as the processor of its picture has maps."""
        processor = getattr(self._own, "processor", None)
        if getattr(processor, "do_center_crop", False):
            raise ValueError(
                f"{type(processor).__name__} crops pictures, and maps of labels are of the whole: "
                "give as transform a processor with do_center_crop=False"
            )
        if getattr(processor, "do_reduce_labels", False) and not target.is_floating_point():
            # 0 counts for nothing, and the first class is 1, as in ADE20K.
            target = torch.where((target == 0) | (target == IGNORED), IGNORED, target - 1)
        return target

    def stamp(self) -> str:
        return _stamp(self.items)


def own_transform(model: Any) -> Transform:
    """How the model's library says that this model wants its pictures: timm's data configuration,
    or the image processor that transformers keeps beside the checkpoint.

    Raises:
        ValueError: it says nothing.
    """
    model = module_of(model)
    config = getattr(model, "pretrained_cfg", None)
    if config:
        data = require("timm.data", "timm")
        settings = data.resolve_data_config({}, model=model)
        # timm tells the size of the checkpoint, not that which the model was made for.
        embed = getattr(model, "patch_embed", None)
        size = getattr(embed, "img_size", None)
        if isinstance(size, tuple) and getattr(embed, "strict_img_size", False):
            settings["input_size"] = (settings["input_size"][0], *size)
        transform: Transform = data.create_transform(**settings)
        return transform
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name:
        processor = require("transformers", "transformers").AutoImageProcessor
        try:
            return pictures.Processed(processor.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name} has no image processor ({str(error).splitlines()[0]}): give transform="
            ) from error
    raise ValueError(
        f"{type(model).__name__} does not say how it wants its pictures: give transform=, a "
        "function from a picture to a tensor [channels, height, width] or an image processor, or "
        "give tensors"
    )


def _one(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Inputs without a batch, of those that processors give for one image, with one."""
    tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
    alone = all(x.ndim and len(x) == 1 for x in tensors) and any(x.ndim >= 4 for x in tensors)
    if not alone:
        return inputs
    return {name: x[0] if isinstance(x, Tensor) else x for name, x in inputs.items()}


def _input_name(model: Any) -> str | None:
    name = getattr(model, "main_input_name", None)
    # Of models that take text, too, it is the name of that.
    return {"input_ids": "pixel_values"}.get(name, name) if isinstance(name, str) else None


def _target(target: Any) -> Tensor | None:
    if target is None:
        return None
    if _is_picture(target):
        return reading.depth_map(target) if target.mode == "F" else reading.class_map(target)
    if not isinstance(target, Tensor):
        try:
            # A copy of arrays, which may be read-only.
            target = torch.as_tensor(np.array(target) if hasattr(target, "shape") else target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                "labels must be numbers or maps of them, not "
                f"{type(target).__name__} ({str(target)[:60]}): {_WITHOUT}"
            ) from error
    if target.ndim == 3 and len(target) == 1:  # a map, as transforms leave it
        target = target[0]
    kept: Tensor = target if target.is_floating_point() else target.long()
    return kept


def sent(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """A batch on a device, its fractions in a dtype."""

    def send(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else None)

    if isinstance(inputs, Mapping):
        return {name: send(x) for name, x in inputs.items()}
    moved: Tensor = send(inputs)
    return moved


def _shape(inputs: Any) -> Any:
    parts = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return tuple(tuple(part.shape) if isinstance(part, Tensor) else None for part in parts)


def _stacked(group: list[Sample]) -> tuple[Inputs, list[Tensor] | None]:
    first = group[0][0]
    targets = [target for _, target in group if target is not None]
    if targets and len(targets) < len(group):
        raise ValueError(f"some samples have labels and others have none: {_WITHOUT}")
    inputs: Any
    if isinstance(first, Mapping):
        inputs = {
            name: torch.stack([torch.as_tensor(sample[0][name]) for sample in group])
            for name in first
        }
    else:
        inputs = torch.stack([sample[0] for sample in group])
    return inputs, targets or None
