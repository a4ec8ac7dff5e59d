"""What `tokred train` needs: labelled pictures from a folder or a Hugging Face dataset, and a model
with the transforms of its pictures.

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
    """Labelled pictures: each is an image of Pillow, in colour, and the number of its class."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class Folder:
    """Pictures in a folder for each class.

    Attributes:
        files: the pictures, each with the number of its class.
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
        where: a folder that holds a folder for each class, or a folder for each split (`train` and
            `val`) that holds such folders. Or "hf:" and the name of a Hugging Face dataset on the
            hub, with a configuration after another colon if need be. Or "hf:" and a folder that
            `save_to_disk` has written.

    Raises:
        ValueError: there are no pictures, or there are held-out pictures of classes that are not
            trained.
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
    """The pictures in a folder that holds a folder for each class. Hidden ones are passed over.

    Args:
        path: the folder.
        classes: the names of the folders in the order of classes; sorted by name if not given.

    Raises:
        ValueError: there are no pictures, or a folder is none of `classes`.
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
    """Labelled pictures as a model takes them: (inputs, label).

    Attributes:
        pictures: the labelled pictures.
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
    """The transforms of a model's pictures.

    Attributes:
        train: for training, with random changes, which draw from the global random streams.
        evaluate: for validation, without random changes.
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
    """A classifier, and the transforms of its pictures. If it has another number of classes than
    wanted, its head is replaced by a random one.

    Args:
        name: a bundled checkpoint, a timm name, or what transformers loads: a folder or a name.
        classes: how many classes it is to have.
        pretrained: whether to fetch timm's weights; other models come with their weights.
        frozen: whether it will stay as it is: then it must have the right head already.
        augment: "crop" for random crops and flips, as models for ImageNet are trained, or "none".
            If not given, "none" for bundled checkpoints, because the mirror image of a digit is no
            digit, and "crop" for others.

    Raises:
        ValueError: there is no such model, it does not classify images, or it is frozen and its
            head does not fit.
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
    # Processors have several ways to say which size images get; a look at the result is reliable.
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
    """A model as it was saved, in evaluation mode, of whatever kind it is.

    >>> model = pictures.open_model("deit_small_patch16_224")

    Args:
        name: a bundled checkpoint, a timm name, or what transformers loads: a folder or a name. A
            model of transformers has the class from which it was saved.
        pretrained: whether to fetch timm's weights; other models come with their weights.

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
