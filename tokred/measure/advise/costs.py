"""What blocks and methods cost on this machine, as functions of the number of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Costs:
    """What a method costs, by what was measured.

    Attributes:
        block: seconds of a block as a parabola of its tokens.
        added: seconds that the method adds to a block, of the tokens that enter it.
        dense: seconds of the dense model.
        between: whether attention still sees the tokens that enter.
    """

    block: tuple[float, float, float]
    added: tuple[float, float, float]
    dense: float
    between: bool

    def step(self, before: Any, after: Any, added: bool = True) -> Any:
        """Seconds of one block that is entered by so many tokens and left by so many; arrays or
        numbers."""
        block = _at(self.block, after)
        if self.between:
            block = (block + _at(self.block, before)) / 2
        return block + np.where(after < before, _at(self.added, before), 0.0) * added

    def time(self, counts: Sequence[int], added: bool = True) -> float:
        """Seconds of the model, with these tokens before the first layer and after each."""
        steps = [float(self.step(a, b, added)) for a, b in itertools.pairwise(counts)]
        full = float(_at(self.block, counts[0])) * len(steps)
        return max(1e-9, self.dense - full + sum(steps))


def _parabola(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The parabola through (tokens, seconds) that lies nearest, none of its parts below zero: a
    start, so much for each token, and so much for each pair."""
    from scipy.optimize import nnls  # whoever asks for no advice need not wait for it

    tokens = np.array([p[0] for p in points], dtype=float)
    seconds = np.array([p[1] for p in points], dtype=float)
    scale = tokens.max()
    columns = np.stack([np.ones_like(tokens), tokens / scale, (tokens / scale) ** 2], 1)
    # In proportion: a small block counts as much as a large one.
    weight = 1 / np.maximum(seconds, seconds.max() * 1e-3)
    a, b, c = nnls(columns * weight[:, None], seconds * weight)[0]
    return float(a), float(b / scale), float(c / scale**2)


def _at(parabola: tuple[float, float, float], tokens: Any) -> Any:
    start, each, pair = parabola
    return start + each * tokens + pair * np.square(tokens, dtype=float)
