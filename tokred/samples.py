"""Images of whatever kind somebody has, as a model takes them, with what is true of them.

    samples = tokred.samples.of("flowers/val", model)
    for inputs, targets in samples.batches(32):
        ...

Taken are: a folder of pictures, or of folders of them, one for each class, or with `images` and
`labels` (or `depth`) in it; a Hugging Face dataset; a dataset or loader of torch or timm; a list of
pictures, paths or tensors; a tensor; what `tokred.zoo.held_out` gives. They are prepared as the
model's library says that this model wants it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokred import pictures
from tokred.host import module_of
from tokred.inputs import Inputs
from tokred.optional import require
from tokred.zoo import HeldOut, normalise

MASKS = ("labels", "masks", "annotations", "segmentations")
"""What a folder beside `images` is called that holds the class of every pixel."""
DEPTHS = ("depth", "depths")
"""The same, for depths: `.npy`, or pictures in 16 bits."""

Sample = tuple[Any, Tensor | None]
"""What the model takes for one image, without a batch, and what is true of it."""
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

    def batch(self, numbers: Sequence[int]) -> list[tuple[Inputs, list[Tensor] | None]]:
        """The samples of these numbers: one batch, or, where images differ in size, several."""
        groups: dict[Any, list[Sample]] = {}
        for number in numbers:
            sample = self[number]
            groups.setdefault(_shape(sample[0]), []).append(sample)
        return [_stacked(group) for group in groups.values()]

    def fingerprint(self, looked_at: int = 16) -> str:
        """Tells these samples from others: by their number, and by a few of them, bit by bit."""
        digest = hashlib.sha256(str(len(self)).encode())
        many = min(looked_at, len(self))
        for i in range(many):
            inputs, target = self[i * (len(self) - 1) // max(1, many - 1)]
            parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
            for part in [*parts, target]:
                if isinstance(part, Tensor):
                    digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
                    digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
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
            are meant.
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
        return _read(data.dataset, model, labelled)
    if type(data).__module__.split(".")[0] == "datasets":
        return _hugging_face(data, model, labelled, "the dataset")
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(
            "data must be a folder, a dataset with a length and numbers, or a list of images, not "
            f"{type(data).__name__}"
        )
    if not len(data):
        raise ValueError("data must hold at least one image, and is empty")
    first = data[0]
    if isinstance(first, str | Path):
        files = _Files(tuple(Path(path) for path in data))
        return files, f"{len(data)} pictures", lambda i: files[i][0]
    if isinstance(first, Tensor) or _is_picture(first):
        return _Unlabelled(data), f"{len(data)} images", lambda i: data[i]
    if isinstance(first, Mapping | tuple | list):
        return data, f"{len(data)} samples", lambda i: _first(data[i])
    raise TypeError(
        "samples must be pictures, paths, tensors, (image, label) or mappings, not "
        f"{type(first).__name__}"
    )


def _folder(
    path: Path, model: nn.Module | None, labelled: bool
) -> tuple[Any, str, Callable[[int], Any]]:
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path} (a Hugging Face dataset is hf:NAME, a bundled model's "
            "images are tokred.zoo.held_out())"
        )
    images = path / "images"
    found: Any
    if images.is_dir():
        beside = next((path / n for n in (*MASKS, *DEPTHS) if (path / n).is_dir()), None)
        files = _pictures_under(images)
        if beside is None or not labelled:
            found = _Files(files)
        else:
            by_stem = {file.relative_to(beside).with_suffix(""): file for file in _all(beside)}
            missing = [f for f in files if f.relative_to(images).with_suffix("") not in by_stem]
            if missing:
                raise ValueError(f"{missing[0]} has nothing of its name in {beside}")
            targets = tuple(by_stem[f.relative_to(images).with_suffix("")] for f in files)
            found = _Maps(files, targets, beside.name in DEPTHS)
        return found, str(path), lambda i: found[i][0]
    # As `tokred train` has it: validation beside training, or classes alone.
    held_out = next((path / n for n in pictures.HELD_OUT if (path / n).is_dir()), None)
    if held_out is not None and (path / "train").is_dir():
        return _folder(held_out, model, labelled)
    if labelled and any(entry.is_dir() for entry in path.iterdir()):
        classes = pictures.folder(path)
        numbers = class_numbers(classes.classes, model, f"the folders of {path}")
        found = _Renumbered(classes, numbers)
    else:
        found = _Files(_pictures_under(path))
    return found, str(path), lambda i: found[i][0]


def _all(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _pictures_under(folder: Path) -> tuple[Path, ...]:
    files = tuple(file for file in _all(folder) if file.suffix.lower() in pictures.SUFFIXES)
    if not files:
        raise ValueError(f"{folder} must hold pictures, and has none")
    return files


def class_numbers(names: Sequence[str], model: nn.Module | None, where: str) -> list[int]:
    """Which of the model's classes each of these names is.

    Names may be numbers, the model's own names (transformers' `label2id`), or, if there are as
    many as the model has classes, anything: then they are counted in order.

    Raises:
        ValueError: it cannot be told.
    """
    config = getattr(model, "config", None)
    known = {str(k).lower(): int(v) for k, v in (getattr(config, "label2id", None) or {}).items()}
    if known and all(name.lower() in known for name in names):
        return [known[name.lower()] for name in names]
    if all(name.isdecimal() for name in names):
        return [int(name) for name in names]
    wordnet = _wordnet(names, model)
    if wordnet is not None:
        return wordnet
    count = _num_classes(model)
    if count is None or count == len(names):
        return list(range(len(names)))
    raise ValueError(
        f"{where} are {len(names)} classes ({', '.join(names[:3])}, ...), and the model has "
        f"{count}, of other names: name them by the model's numbers or labels, or give "
        "labelled=False (--unlabelled) to compare with the dense model alone"
    )


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
    if Path(name).is_dir():
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
    columns = found.features
    images = [n for n, kind in columns.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise ValueError(f"{name} has no column of images; it has {', '.join(columns)}")
    label, numbers = None, None
    for column, kind in columns.items() if labelled else ():
        one = getattr(kind, "feature", kind)  # a list of classes, where there may be several
        if isinstance(one, datasets.ClassLabel):
            label, numbers = column, class_numbers(one.names, model, f"the labels of {name}")
            break
        if column != images[0] and isinstance(kind, datasets.Image):
            label = column
    split = _Rows(found, images[0], label, numbers, _num_classes(model))
    return split, name, lambda i: split[i][0]


@dataclass(frozen=True)
class _Rows:
    """A split of a Hugging Face dataset."""

    rows: Any
    image: str
    label: str | None
    numbers: list[int] | None
    classes: int | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.rows[index]
        label = None if self.label is None else row[self.label]
        if isinstance(label, list) and self.numbers:
            several = torch.zeros(self.classes or len(self.numbers))
            several[[self.numbers[number] for number in label]] = 1
            label = several
        elif isinstance(label, int) and self.numbers:
            label = self.numbers[label]
        elif _is_picture(label):
            label = _class_map(label)
        return row[self.image].convert("RGB"), label


@dataclass(frozen=True)
class _HeldOut:
    held_out: HeldOut

    def __len__(self) -> int:
        return len(self.held_out.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return normalise(self.held_out.images[index]), self.held_out.labels[index]


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
        return _open(self.files[index]).convert("RGB"), None


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
        if target.suffix == ".npy":
            pixels = torch.from_numpy(np.load(target, allow_pickle=False))
            pixels = pixels.float() if self.depth else pixels.long()
        else:
            pixels = _class_map(_open(target))
            pixels = pixels.float() if self.depth else pixels
        return _open(self.files[index]).convert("RGB"), pixels


@dataclass(frozen=True)
class _Renumbered:
    """Pictures by class, with the numbers that the model has for the classes."""

    pictures: pictures.Folder
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture, label = self.pictures[index]
        return picture, self.numbers[label]


def _open(path: Path) -> Any:
    return require("PIL.Image", "evaluate").open(path)


def _class_map(picture: Any) -> Tensor:
    """The class of every pixel, of a picture with one channel or a palette."""
    pixels = np.asarray(picture)
    if pixels.ndim != 2:
        raise ValueError(
            f"a map of classes must have one channel, not {pixels.shape[-1]} (mode {picture.mode})"
        )
    return torch.from_numpy(pixels.astype(np.int64))


def _is_picture(x: Any) -> bool:
    return type(x).__module__.split(".")[0] == "PIL"


def _first(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return next(iter(sample.values()))
    return sample[0]


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
        sample = self.items[index]
        target: Any = None
        if isinstance(sample, Mapping):
            inputs = dict(sample)
            target = next((inputs.pop(n) for n in ("labels", "label") if n in inputs), None)
            image: Any = inputs if len(inputs) > 1 else next(iter(inputs.values()))
            if len(inputs) > 1:
                return inputs, _target(target if self.labelled else None)
        else:
            image, target = (sample[0], sample[1]) if len(sample) > 1 else (sample[0], None)
        if not isinstance(image, Tensor):
            image = self._prepared(image)
        name = _input_name(self.model)
        prepared = image if name is None else {name: image}
        return prepared, _target(target if self.labelled else None)

    def _prepared(self, picture: Any) -> Tensor:
        if self._own is None:
            given = self.transform
            self._own = own_transform(self.model) if given is None else given
            if hasattr(self._own, "preprocess"):  # an image processor
                self._own = pictures.Processed(self._own)
        prepared: Tensor = self._own(picture)
        if not isinstance(prepared, Tensor) or prepared.ndim != 3:
            raise ValueError(
                "transform must make a tensor [channels, height, width] of a picture, not "
                f"{tuple(prepared.shape) if isinstance(prepared, Tensor) else type(prepared)}"
            )
        return prepared


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
        transform: Transform = data.create_transform(**data.resolve_data_config({}, model=model))
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


def _input_name(model: Any) -> str | None:
    name = getattr(model, "main_input_name", None)
    return name if isinstance(name, str) else None


def _target(target: Any) -> Tensor | None:
    if target is None or isinstance(target, Tensor):
        return target
    return torch.as_tensor(target)


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
    first, target = group[0]
    inputs: Any
    if isinstance(first, Mapping):
        inputs = {
            name: torch.stack([torch.as_tensor(sample[0][name]) for sample in group])
            for name in first
        }
    else:
        inputs = torch.stack([sample[0] for sample in group])
    return inputs, None if target is None else [t for _, t in group if t is not None]
