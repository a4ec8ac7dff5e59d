"""Whatever somebody has, as a sequence of samples: folders, datasets, loaders, lists, tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate, default_convert

from tokred.data.folders import Files, read_folder
from tokred.data.hugging_face import load_dataset, read_dataset
from tokred.data.parts import Source, is_picture, parted
from tokred.data.zoo import HeldOut, normalise

_KINDS = "data must be a folder, a dataset with a length and numbers, or a list of images, not "


def source_of(data: Any, model: nn.Module | None, labelled: bool) -> Source:
    """Where samples come from.

    Args:
        data: see `tokred.data.samples`.
        model: the model whose classes are meant.
        labelled: whether to look for targets.

    Raises:
        ValueError: there are no images, or it is not clear which classes of the model are meant.
        TypeError: `data` is of no kind that is known.
        FileNotFoundError: there is no such folder.
        ModuleNotFoundError: a library is missing.
    """
    if isinstance(data, HeldOut):
        images = data.images
        return Source(_HeldOut(data), f"{len(images)} held-out images", images.__getitem__)
    if isinstance(data, str | Path):
        if str(data).startswith("hf:"):
            dataset = load_dataset(str(data)[3:], "evaluate")
            return read_dataset(dataset, model, labelled, str(data))
        return read_folder(Path(data), model, labelled)
    if isinstance(data, Tensor):
        if data.ndim != 4 or not data.is_floating_point():
            raise ValueError(
                "images must be a float tensor [batch, channels, height, width], as the model "
                f"takes them, not {data.dtype} of {tuple(data.shape)}"
            )
        return Source(_Unlabelled(data), f"{len(data)} images", data.__getitem__)
    if isinstance(data, DataLoader):
        usual = data.collate_fn in (default_collate, default_convert)
        if not usual and hasattr(data.dataset, "__len__"):
            # Its collate function may be what makes tensors of pictures.
            return _samples(_Collated(data.dataset, data.collate_fn))
        return source_of(data.dataset, model, labelled)
    if type(data).__module__.split(".")[0] == "datasets":
        return read_dataset(data, model, labelled, "the dataset")
    if isinstance(data, Mapping) and any(isinstance(x, Tensor) for x in data.values()):
        return _samples(_Columns(data))
    return _sequence(data)


def _sequence(data: Any) -> Source:
    """A list or dataset, by the kind of its first sample."""
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(
            f"{_KINDS}{type(data).__name__}; of what can only be gone through, give a list of some"
        )
    if not len(data):
        raise ValueError("data must hold at least one image, and is empty")
    try:
        first = data[0]
    except (KeyError, TypeError, NotImplementedError) as error:
        raise TypeError(f"{_KINDS}{type(data).__name__}, which has no number 0") from error
    if isinstance(first, str | Path):
        files = Files(tuple(Path(path) for path in data))
        return Source(files, f"{len(data)} pictures", lambda i: files[i][0])
    if isinstance(first, Tensor | np.ndarray) or is_picture(first):
        return Source(_Unlabelled(data), f"{len(data)} images", lambda i: data[i])
    if isinstance(first, Mapping | tuple | list):
        return _samples(data)
    raise TypeError(
        "samples must be pictures, paths, tensors, arrays, (image, label) or mappings, not "
        f"{type(first).__name__}"
    )


def _samples(items: Any) -> Source:
    """Samples that `parted` can take apart."""
    return Source(items, f"{len(items)} samples", lambda i: parted(items[i])[0])


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
    """The samples of a loader, each collated alone."""

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
    """The held-out images of a bundled model."""

    held_out: HeldOut

    def __len__(self) -> int:
        return len(self.held_out.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return normalise(self.held_out.images[index]), self.held_out.labels[index]


@dataclass(frozen=True)
class _Unlabelled:
    """Images without targets."""

    images: Any

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        return self.images[index], None
