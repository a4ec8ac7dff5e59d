"""The random noise with which gates decide while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokred.training.seeds import seed_of


@dataclass
class Noise:
    """Gumbel noise for gates. It is drawn for the whole batch, so that a sample has the same noise
    with any number of processes; and on the CPU, so that it is the same on every device.

    Args:
        seed: of the training.
        batch: samples of a whole batch.
        step, row, rows: see `place`.
    """

    seed: int
    batch: int
    step: int = 0
    row: int = 0
    rows: int = 0

    def place(self, step: int, row: int, rows: int) -> None:
        """Says which samples come next: `rows` of them, from `row` of the batch of a step."""
        self.step, self.row, self.rows = step, row, rows

    def __call__(
        self, layer: int, logits: Float[Tensor, "rows tokens 2"]
    ) -> Float[Tensor, "rows tokens 2"]:
        """The noise of these samples in a layer, in the dtype of the logits.

        Raises:
            ValueError: there are more or fewer rows of logits than samples.
        """
        if logits.shape[0] != self.rows:
            raise ValueError(
                f"the model makes {logits.shape[0]} rows of tokens of {self.rows} samples: noise "
                "would depend on the number of processes"
            )
        generator = torch.Generator().manual_seed(seed_of(self.seed, "gate", self.step, layer))
        drawn = torch.empty(self.batch, *logits.shape[1:]).exponential_(generator=generator)
        mine = drawn[self.row : self.row + self.rows].to(logits.device)
        return -mine.clamp_min(torch.finfo(mine.dtype).tiny).log().to(logits.dtype)


@contextmanager
def noisy(reduction: Any, noise: Noise) -> Iterator[None]:
    """Has the gates of a reduction use this noise for the length of a block."""
    former, reduction.noise = reduction.noise, noise
    try:
        yield
    finally:
        reduction.noise = former
