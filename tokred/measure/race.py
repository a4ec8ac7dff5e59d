"""Interleaved timing: whatever is compared takes turns, so that a change in the machine's speed
meets all of it alike."""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokred.data.inputs import Inputs, call, device_of
from tokred.engine.run import Reduction
from tokred.host.host import Denoiser, Host
from tokred.patching.denoising import Denoising
from tokred.patching.patching import hang, remove

SURE, PATIENCE = 0.03, 3
"""The standard error of a speed-up that is good enough, and how many times as long as asked it is
measured to get there."""


@dataclass(frozen=True)
class Arm:
    """One side of a benchmark.

    Attributes:
        seconds: of every measured run of the batch, in the order they were run.
        peak_memory: bytes allocated at most during a run; None on the CPU.
    """

    seconds: tuple[float, ...]
    peak_memory: int | None

    @property
    def median(self) -> float:
        """Seconds per batch."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def sides(
    model: nn.Module,
    host: Host | Denoiser,
    arms: Mapping[str, Reduction | Denoising | None],
    compile: bool,
) -> dict[str, tuple[nn.Module, Callable[[], None]]]:
    """For every arm (None: the dense model), the model to call and what to do just before: one
    model whose patch is changed, or a compiled copy for each arm."""

    def become(target: nn.Module, reduction: Reduction | Denoising | None) -> None:
        if reduction is None:
            remove(target)
        else:
            hang(target, host, reduction)

    sides: dict[str, tuple[nn.Module, Callable[[], None]]] = {}
    for name, reduction in arms.items():
        if compile:
            twin = copy.deepcopy(model)
            become(twin, reduction)
            sides[name] = (torch.compile(twin), lambda: None)  # type: ignore[assignment]
        else:
            sides[name] = (model, lambda reduction=reduction: become(model, reduction))  # type: ignore[misc]
    return sides


def measure(
    sides: Mapping[str, tuple[Callable[..., Any], Callable[[], None]]],
    images: Inputs,
    rounds: int,
    warmup: int,
    on_round: Callable[[int, int], None] | None = None,
    limit: float = float("inf"),
) -> dict[str, Arm]:
    """Runs the batch once through every side in each round, in shuffled order.

    Args:
        sides: what `sides` has made.
        images: one batch.
        rounds: measured rounds.
        warmup: rounds before that are not measured.
        on_round: called after every round with (rounds done, rounds in all).
        limit: seconds after which no further round begins, but for three that are always run.
    """
    names = list(sides)
    start = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, int | None] = dict.fromkeys(names)
    device = device_of(images)
    cuda = device.type == "cuda"
    for number in range(-warmup, rounds):
        if number >= 3 and time.perf_counter() - start > limit:
            break
        # Shuffled, because a side may gain or lose by which one came before it.
        for name in random.Random(number).sample(names, len(names)):
            target, prepare = sides[name]
            prepare()
            if cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            begin = time.perf_counter()
            with torch.no_grad():
                call(target, images)
            if cuda:
                torch.cuda.synchronize(device)
            took = time.perf_counter() - begin
            if number >= 0:
                seconds[name].append(took)
                if cuda:
                    peak = torch.cuda.max_memory_allocated(device)
                    memory[name] = max(memory[name] or 0, peak)
        if on_round and number >= 0:
            on_round(number + 1, rounds)
    return {name: Arm(tuple(seconds[name]), memory[name]) for name in names}


@dataclass(frozen=True)
class Pace:
    """How fast a side is.

    Attributes:
        seconds: for a batch.
        error: standard error of its ratio to the dense model, as a share of it.
    """

    seconds: float
    error: float = 0.0


def _beside(dense: Sequence[float], arm: Sequence[float]) -> Pace:
    """What the dense model took in a round is set against what the other side took in the same
    round, so that a machine which is busy now and then slows down both; of these ratios the median
    counts."""
    ratios = [a / b for a, b in zip(arm, dense, strict=True)]
    middle = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    # Of a normal distribution, the quartiles are 1.349 standard deviations apart, and the median
    # of n values has a standard error of 1.253 of them, by the square root of n.
    error = 1.253 / 1.349 * (high - low) / math.sqrt(len(ratios)) / middle
    return Pace(statistics.median(dense) * middle, error)
