"""What `tokred train` trains: labelled pictures, from folders or Hugging Face datasets, and a model
with what its pictures have to be like.

    train, held_out = pictures.read("flowers")  # or "hf:beans"
    model, preparation = pictures.load("deit_small_patch16_224", len(train.classes))
    data = pictures.Prepared(train, preparation.train, preparation.name)

Training from Python needs none of this: `tokred.training.fit` takes any samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from tokred.data import reading, zoo
from tokred.data.hugging_face import load_dataset
from tokred.data.reading import HELD_OUT
from tokred.data.transforms import Augmented, Digits, Processed
from tokred.optional import require

__all__ = [
    "HELD_OUT",
    "Augmented",
    "Digits",
    "Folder",
    "Pictures",
    "Preparation",
    "Prepared",
    "Processed",
    "Split",
    "folder",
    "load",
    "open_model",
    "read",
]

_ON_HUB = ("hf-hub:", "hf_hub:", "local-dir:")
"""What timm takes for a checkpoint, whatever stands behind it."""


@runtime_checkable
class Pictures(Protocol):
    """Pictures as Pillow has them, in colour, and the number of the class of each."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class Folder:
    """Files in a folder for each class.

    Attributes:
        files: with the number of the class of each.
        classes: the names of the folders.
    """

    files: tuple[tuple[Path, int], ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.files[index]
        return reading.picture(path), label


@dataclass(frozen=True)
class Split:
    """A split of a Hugging Face dataset.

    Attributes:
        rows: the split.
        image, label: the names of its columns.
        classes: the names of the classes.
    """

    rows: Any
    image: str
    label: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.rows[index]
        return reading.coloured(row[self.image]), int(row[self.label])


def read(where: str) -> tuple[Pictures, Pictures | None]:
    """Pictures to train on, and those to validate on, if there are any.

    Args:
        where: a folder with a folder for each class in it, or with such folders as `train` and
            `val`; or, after "hf:", a Hugging Face dataset: its name on the hub, with a
            configuration after another colon if need be, or a folder that `save_to_disk` has
            written.

    Raises:
        ValueError: there are no pictures, or classes to validate on that are not trained on.
        FileNotFoundError: there is no such folder.
        ModuleNotFoundError: `datasets` is not installed.
    """
    if where.startswith("hf:"):
        return _read_dataset(where.removeprefix("hf:"))
    path = Path(where)
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path} (a Hugging Face dataset is hf:NAME on the command line)"
        )
    if not (path / "train").is_dir():
        return folder(path), None
    train = folder(path / "train")
    held_out = next((path / name for name in HELD_OUT if (path / name).is_dir()), None)
    return train, None if held_out is None else folder(held_out, train.classes)


def folder(path: Path, classes: Sequence[str] | None = None) -> Folder:
    """The pictures in a folder, whose folders are their classes. Hidden ones are passed over.

    Args:
        path: the folder.
        classes: which folder is which class; by name if not given.

    Raises:
        ValueError: there are none, or of other classes.
    """
    names = reading.folders(path)
    known = tuple(names if classes is None else classes)
    strangers = [name for name in names if name not in known]
    if strangers:
        raise ValueError(
            f"{path} has the class {strangers[0]!r}, which is not among those that are trained on"
        )
    numbers = {name: number for number, name in enumerate(known)}
    files = [(file, numbers[name]) for name in names for file in reading.pictures_in(path / name)]
    if not files:
        raise ValueError(f"{path} must hold a folder of pictures for each class, and has none")
    return Folder(tuple(files), known)


def _read_dataset(name: str) -> tuple[Pictures, Pictures | None]:
    datasets = require("datasets", "train")
    found = load_dataset(name, "train")
    splits = dict(found) if hasattr(found, "keys") else {"train": found}
    train = splits.get("train")
    if train is None:
        raise ValueError(f"{name} has no split 'train'; it has {', '.join(splits)}")
    columns = train.features
    images = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"{name} must have a column of images and one of class labels; it has "
            f"{', '.join(f'{column} ({type(kind).__name__})' for column, kind in columns.items())}"
        )
    classes = tuple(columns[labels[0]].names)
    held_out = next((splits[split] for split in HELD_OUT if split in splits), None)
    made = [
        None if split is None else Split(split, images[0], labels[0], classes)
        for split in (train, held_out)
    ]
    assert made[0] is not None
    return made[0], made[1]


@dataclass(frozen=True)
class Prepared:
    """Pictures as a model takes them: (inputs, label), where inputs are by name if it has one.

    Attributes:
        pictures: what there is.
        transform: from a picture to a tensor [channels, height, width].
        name: what the model calls its images; None if it takes them without a name.
    """

    pictures: Pictures
    transform: Callable[[Any], Tensor]
    name: str | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture, label = self.pictures[index]
        x = self.transform(picture)
        return (x if self.name is None else {self.name: x}), label


@dataclass(frozen=True)
class Preparation:
    """What becomes of pictures before a model sees them.

    Attributes:
        train: with random changes, from the global random streams.
        evaluate: without.
        name: see `Prepared`.
    """

    train: Callable[[Any], Tensor]
    evaluate: Callable[[Any], Tensor]
    name: str | None = None


def load(
    name: str,
    classes: int,
    *,
    pretrained: bool = False,
    frozen: bool = False,
    augment: Literal["crop", "none"] | None = None,
) -> tuple[nn.Module, Preparation]:
    """A classifier, and how its pictures are prepared. Where it has another number of classes, its
    head is replaced by a random one.

    Args:
        name: a bundled checkpoint, a timm name, or what transformers loads: a folder or a name.
        classes: how many it is to tell apart.
        pretrained: whether to fetch timm's weights; others come with theirs.
        frozen: whether it is not going to be trained: then it must have the right head already.
        augment: "crop": random crops and flips, as models for ImageNet are trained; "none". If not
            given, "crop", but for bundled checkpoints, because a digit is not its mirror image.

    Raises:
        ValueError: there is no such model, it classifies no images, or it is frozen and its head
            does not fit.
        ModuleNotFoundError: a library is missing.
    """
    if name in zoo.names():
        if zoo.held_out(name).labels.ndim != 1:
            raise ValueError(f"{name} gives a class to every pixel: train it with tokred.training")
        model: Any = zoo.load(name)
        if classes != model.num_classes:
            _refuse_frozen(name, model.num_classes, classes, frozen)
            model.reset_classifier(classes)
        evaluate: Callable[[Any], Tensor] = Digits(zoo.IMAGE_SIZE)
        if augment != "crop":
            return model, Preparation(evaluate, evaluate)
        return model, Preparation(Augmented((zoo.IMAGE_SIZE,) * 2, evaluate), evaluate)
    timm = require("timm", "timm")
    if name.startswith(_ON_HUB) or timm.is_model(name):
        model = timm.create_model(name, pretrained=pretrained)
        if classes != model.num_classes:
            _refuse_frozen(name, model.num_classes, classes, frozen)
            model.reset_classifier(classes)
        config = timm.data.resolve_data_config({}, model=model)
        evaluate = timm.data.create_transform(**config)
        size = tuple(config["input_size"][1:])
        whole = timm.data.create_transform(**{**config, "crop_pct": 1.0})
        train = evaluate if augment == "none" else Augmented(size, whole)
        return model, Preparation(train, evaluate)
    return _from_transformers(name, classes, frozen, augment)


def _from_transformers(
    name: str, classes: int, frozen: bool, augment: str | None
) -> tuple[nn.Module, Preparation]:
    transformers = require("transformers", "transformers")
    own = _config(name).num_labels
    if classes != own:
        _refuse_frozen(name, own, classes, frozen)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        name, num_labels=classes, ignore_mismatched_sizes=True
    )
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    evaluate = Processed(processor)
    # Whatever ways there are to say which size images get, this one is always right.
    size = tuple(evaluate(require("PIL.Image", "train").new("RGB", (64, 48))).shape[1:])
    train = evaluate if augment == "none" else Augmented(size, Processed(processor, resize=False))
    return model, Preparation(train, evaluate, str(model.main_input_name))


def _config(name: str) -> Any:
    try:
        return require("transformers", "transformers").AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no model is called {name!r}: it is not bundled ({', '.join(zoo.names())}), timm has "
            f"none of that name, nor has transformers ({str(error).splitlines()[0]})"
        ) from error


def _refuse_frozen(name: str, own: int, classes: int, frozen: bool) -> None:
    if frozen:
        raise ValueError(
            f"{name} tells {own} classes apart, and the data has {classes}: frozen, its new head "
            "would stay random. Fine-tune it first (`tokred train none`), and give the weights"
        )


def open_model(name: str, pretrained: bool = True) -> nn.Module:
    """A model as it is, in evaluation mode, whatever it does.

    >>> model = pictures.open_model("deit_small_patch16_224")

    Args:
        name: a bundled checkpoint, a timm name, or what transformers loads: a folder or a name,
            which becomes an object of the class that it was saved from.
        pretrained: whether to fetch timm's weights; others come with theirs.

    Raises:
        ValueError: there is no such model.
        ModuleNotFoundError: a library is missing.
    """
    if name in zoo.names():
        return zoo.load(name)
    timm = require("timm", "timm")
    if name.startswith(_ON_HUB) or timm.is_model(name):
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
        return model.eval()
    transformers = require("transformers", "transformers")
    config = _config(name)
    saved_from = (config.architectures or [""])[0]
    kind = getattr(transformers, saved_from, transformers.AutoModel)
    model = kind.from_pretrained(name)
    return model.eval()
