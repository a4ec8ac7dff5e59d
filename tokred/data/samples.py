"""Images of whatever kind somebody has, with their targets, as a model takes them.

    samples = tokred.samples.of("flowers/val", model)
    for inputs, targets in samples.batch(range(32)):  # one, if all are of one size
        ...

These kinds are known:

    a folder of pictures             or of a folder for each class, or with the folders `images` and
                                     `labels` (or `depth`) in it
    a Hugging Face dataset           or "hf:NAME"
    a dataset or loader              of torch or timm
    a list                           of pictures, paths, arrays or tensors: alone, as
                                     (image, target), or as mappings
    a tensor, a mapping of tensors   a batch as the model takes it
    `tokred.zoo.held_out()`          the held-out images of a bundled model

A target is what is known about an image: the number of its class, zeros and ones for several
classes, or the class or the depth of every pixel. Pictures are prepared as the model's library says
for this model.

Hidden files and folders are passed over. Pictures are turned as their EXIF data say, brought from
16 bits to 8, and converted to colour. Arrays of bytes are pictures. Tensors, and arrays of
fractions, are taken as the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tokred.data.fingerprint import identity_of, samples_fingerprint
from tokred.data.inputs import Inputs
from tokred.data.parts import WITHOUT
from tokred.data.preparing import Prepare, Sample, input_name
from tokred.data.sources import source_of
from tokred.data.transforms import Transform

__all__ = ["Batch", "Sample", "Samples", "Transform", "drawn", "of", "sent"]

Batch = list[tuple[Inputs, list[Tensor] | None]]
"""(inputs, targets) for several images; where images differ in size, one pair for each size."""


@dataclass(frozen=True)
class Samples:
    """Images as a model takes them.

    Attributes:
        items: a sequence of samples, each (input, target); see `Sample`.
        name: what they are, in words.
        input_name: what the model calls its images; None if it takes them without a name.
        picture: from a number to the image as people look at it; None if there is none.
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

    def fingerprint(self) -> str:
        """A text that tells these samples from others, see `tokred.data.fingerprint`."""
        return samples_fingerprint(self)


def of(
    data: Any,
    model: nn.Module | None = None,
    transform: Transform | None = None,
    limit: int | None = None,
    labelled: bool = True,
) -> Samples:
    """Whatever somebody has, as `Samples` of what `model` takes.

    Args:
        data: of one of the kinds that are listed at the head of this file.
        model: the model that takes them. It says how its images are prepared, what it calls them,
            and what its classes are called.
        transform: how pictures are prepared, if not as the model's library says. Tensors are
            taken as they are.
        limit: take only so many, spread evenly.
        labelled: whether to look for targets.

    Raises:
        ValueError: there are no images, or it is not clear how to prepare them or which classes are
            meant. An error in a single image is raised when that image is taken.
        TypeError: `data` is of no kind that is known.
        FileNotFoundError: there is no such folder.
        ModuleNotFoundError: a library is missing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, not {limit}")
    if isinstance(data, Samples):
        found = data
    else:
        source = source_of(data, model, labelled)
        prepare = Prepare(source.items, model, transform, labelled)
        found = Samples(prepare, source.name, input_name(model), source.picture)
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
    """So many of the samples, chosen at random, in random order."""
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
    """Some of the items, by their numbers."""

    items: Any
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.items[self.numbers[index]]
        return sample

    def identity(self, numbers: Sequence[int]) -> str | None:
        """See `tokred.data.fingerprint.identity_of`."""
        return identity_of(self.items, [self.numbers[i] for i in numbers])


def sent(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """A batch moved to a device; tensors of fractions are converted to `dtype`."""

    def send(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else None)

    if isinstance(inputs, Mapping):
        return {name: send(x) for name, x in inputs.items()}
    moved: Tensor = send(inputs)
    return moved


def _shape(inputs: Any) -> Any:
    """The shapes of all tensors of one sample."""
    parts = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return tuple(tuple(part.shape) if isinstance(part, Tensor) else None for part in parts)


def _stacked(group: list[Sample]) -> tuple[Inputs, list[Tensor] | None]:
    """Samples of one size as (inputs, targets)."""
    first = group[0][0]
    targets = [target for _, target in group if target is not None]
    if targets and len(targets) < len(group):
        raise ValueError(f"some samples have labels and others have none: {WITHOUT}")
    inputs: Any
    if isinstance(first, Mapping):
        inputs = {
            name: torch.stack([torch.as_tensor(sample[0][name]) for sample in group])
            for name in first
        }
    else:
        inputs = torch.stack([sample[0] for sample in group])
    return inputs, targets or None
