"""Samples to train on, their order, and the parts of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import Dataset

from tokred.training.seeds import seed_of, seeded


@runtime_checkable
class TrainingSamples(Protocol):
    """Samples to train on, by number. Each is (inputs, targets), or a dict of what the model takes
    with "labels" in it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def order(samples: int, seed: int, epoch: int) -> list[int]:
    """The numbers of all samples in the order of an epoch, which is counted from 0."""
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    found: list[int] = torch.randperm(samples, generator=generator).tolist()
    return found


class Seeded(Dataset[Any]):
    """Samples. While one is made, the global random streams are seeded by (seed, epoch, number of
    the sample), in whatever process that happens."""

    def __init__(self, data: TrainingSamples, seed: int, epoch: int) -> None:
        self.data, self.seed, self.epoch = data, seed, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        with seeded(seed_of(self.seed, "sample", self.epoch, index)):
            return self.data[index]


def split(batch: Any) -> tuple[Any, Any]:
    """A batch as (inputs, targets).

    Raises:
        ValueError: it is neither a pair nor a mapping with "labels".
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"a batch that is a mapping must have 'labels'; it has {[*batch]}")
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        "a batch must be (inputs, targets), or a mapping with 'labels', not a "
        f"{type(batch).__qualname__}: give `collate=`"
    )
