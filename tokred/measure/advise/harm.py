"""How much reductions disturb a model: how far its answers are from the dense model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokred.measure.advise.schedules import levels_of, straight
from tokred.measure.fidelity import Fidelity
from tokred.measure.progress import Progress
from tokred.measure.settings import Setting
from tokred.measure.work import Work
from tokred.schedule import Exactly

RUINED = 1e6
"""The disturbance of a model whose answers are not numbers any more."""
SHARES = (0.85, 0.65, 0.45, 0.3, 0.15)
"""The shares of tokens that are tried at a single layer."""
SOUNDED = 6
"""How many layers they are tried at."""


def harm(close: Fidelity) -> float:
    """One number for how much a model is disturbed: the divergence from the dense model's answers;
    the error of depths, or the distance of features, if there are no answers to compare."""
    harm = 1 - close.cosine
    if close.divergence is not None:
        harm = close.divergence
    elif close.depth_error is not None:
        harm = close.depth_error
    return min(harm, RUINED) if math.isfinite(harm) else RUINED


def screened(work: Work, settings: Sequence[Setting], few: int, progress: Progress) -> list[int]:
    """The positions of settings in order of how much they disturb the model, the least first.

    Args:
        work: measures settings on the model and the images.
        settings: to try.
        few: on how many batches.
        progress: shows what is being done.
    """
    progress.expect(len(settings))
    harms = []
    for setting in settings:
        progress.now(setting.name)
        harms.append(harm(work.difference(setting, few)))
        progress.step()
    return sorted(range(len(settings)), key=harms.__getitem__)


def sensitivity(work: Work, method: Setting, few: int, progress: Progress) -> Any:
    """How much it disturbs the model to go on with a number of tokens from a layer on: [layers,
    levels] (see `levels_of`). Some layers and levels are measured, the others interpolated."""
    layers = work.layout.layers
    steps = min(SOUNDED, layers) - 1
    tried = sorted({round(i * (layers - 1) / max(1, steps)) for i in range(steps + 1)})
    progress.expect(len(tried) * len(SHARES))
    rows = [_roots(work, method, layer, few, progress) for layer in tried]
    every = np.arange(layers)
    columns = np.stack(rows).T
    roots = np.stack([np.interp(every, tried, column) for column in columns], axis=1)
    return roots**2


def _roots(work: Work, method: Setting, layer: int, few: int, progress: Progress) -> Any:
    """The square root of the disturbance at one layer, for every level of tokens."""
    tokens = work.tokens
    known = [(1.0, 0.0)]
    for share in SHARES:
        progress.now(f"{method.method}, {share:.0%} of the tokens from layer {layer} on")
        counts = straight(tokens, work.layout.layers, layer, max(1, round(tokens * share)))
        setting = Setting(method.method, method.reducer, Exactly(counts))
        known.append((share, harm(work.difference(setting, few))))
        progress.step()
    known.append((0.0, 2 * known[-1][1]))  # no tokens at all: a guess, which is rarely asked for
    # Fewer tokens disturb more; where it was measured otherwise, that is noise.
    harms = np.maximum.accumulate([max(0.0, each) for _, each in known])
    # A divergence grows with the square of the disturbance.
    roots = np.sqrt(harms)[::-1]
    shares = [share for share, _ in reversed(known)]
    return np.interp([level / tokens for level in levels_of(tokens)], shares, roots)
