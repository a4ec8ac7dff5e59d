"""The images of an evaluation: batch by batch, shared among processes, on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokred.data.digest import digest_of
from tokred.data.fingerprint import identity_of
from tokred.data.inputs import Inputs
from tokred.data.processes import Processes
from tokred.data.samples import Samples, sent

HELD = 2**30
"""Bytes of images that are kept in memory, and of the dense model's answers to them."""

Group: TypeAlias = tuple[Inputs, list[Tensor] | None]
"""Images of one shape, stacked as a model takes them, and their labels if they have any."""


class Batches:
    """Images in batches, which are the same however many processes share them.

    The first batches of each process stay in memory, as many as there is room for.

    Attributes:
        samples: the images, and perhaps labels.
        size: images per batch.
        device, dtype: where images are sent to, and as what.
        processes: that share the batches.
        on_progress: called with a sentence about how far a pass over the images is.
    """

    def __init__(
        self,
        samples: Samples,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        processes: Processes,
    ) -> None:
        self.samples, self.size, self.processes = samples, size, processes
        self.on_progress: Callable[[str], None] = lambda _: None
        self.device, self.dtype, self._workers = device, dtype, workers
        self._held: dict[int, Any] = {}
        self._room = HELD

    def __len__(self) -> int:
        """How many batches all processes have together."""
        return -(-len(self.samples) // self.size)

    def first(self) -> Group:
        """The first batch; of images of several shapes, those of the first shape in it."""
        inputs, targets = self.samples.batch(range(min(self.size, len(self.samples))))[0]
        return sent(inputs, self.device, self.dtype), targets

    def spread(self, images: int, answers: int) -> list[int]:
        """The numbers of a few batches, spread evenly, because folders list class by class.

        Args:
            images: how many images they should hold together.
            answers: bytes that the model's answers to one batch take; all have to fit into `HELD`.
        """
        few = min(-(-images // self.size), max(1, HELD // max(1, answers)), len(self))
        return [i * len(self) // few for i in range(few)]

    def fingerprint(self) -> str:
        """The fingerprint of the images, see `tokred.data.fingerprint`. All processes must call it:
        unless images are files, each reads its share, of which the first stays in memory."""
        known = self.processes.by_main(lambda: identity_of(self.samples.items))
        if known is not None:
            return known
        mine = [(number, digest_of(groups)) for number, groups in self._read(range(len(self)))]
        return digest_of(sorted(self.processes.gathered(mine)))

    def of(self, numbers: Sequence[int] | None = None) -> Iterator[tuple[int, list[Group]]]:
        """This process's share of the batches.

        Args:
            numbers: of the batches that all processes share; all of them, if not given.
        """
        for number, groups in self._read(range(len(self)) if numbers is None else numbers):
            yield number, [(sent(x, self.device, self.dtype), labels) for x, labels in groups]

    def _read(self, every: Sequence[int]) -> Iterator[tuple[int, list[Group]]]:
        """This process's share of the batches, as they are read."""
        size, many = self.size, len(self.samples)
        mine = [n for n in every if n % self.processes.number == self.processes.index]
        wanted = [range(n * size, min(many, (n + 1) * size)) for n in mine if n not in self._held]
        fresh = self.samples.batches(wanted, self._workers)
        for done, number in enumerate(mine):
            far = done * size * self.processes.number
            self.on_progress(f"{far} of {min(many, len(every) * size)} images")
            groups = self._held.get(number) or next(fresh)
            if number not in self._held:
                self._room -= sum(_bytes(inputs) for inputs, _ in groups)
                if self._room >= 0:
                    self._held[number] = groups
            yield number, groups


def _bytes(inputs: Inputs) -> int:
    parts = [inputs] if isinstance(inputs, Tensor) else inputs.values()
    return sum(x.numel() * x.element_size() for x in parts if isinstance(x, Tensor))
