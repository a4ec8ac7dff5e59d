"""Interleaved timing: the models or functions that are compared take turns.

So a change in the machine's speed affects all of them alike.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

from tokred.data.inputs import Inputs, call, device_of
from tokred.host import Denoiser, Host, Stage
from tokred.measure.limit import Entrant, put_on

SURE, PATIENCE = 0.03, 3
"""Measuring stops early when the standard error of every speed-up is at most `SURE`, and at the
latest after `PATIENCE` times the seconds that were asked for."""

Side: TypeAlias = tuple[Callable[..., Any], Callable[[], None]]
"""The model to call, and what to do just before."""
T = TypeVar("T")


def in_turns(
    names: Iterable[str],
    turn: Callable[[str, int], T],
    rounds: int,
    warmup: int = 0,
    on_round: Callable[[int, int], None] | None = None,
    limit: float = float("inf"),
) -> dict[str, list[T]]:
    """Gives every side one turn in each round, in shuffled order.

    Args:
        names: of the sides.
        turn: runs one side: `turn(name, number)`. The number of the round counts from 0; while
            warming up it is negative.
        rounds: measured rounds.
        warmup: rounds before that are not measured.
        on_round: called after every measured round with (rounds done, rounds in all).
        limit: seconds after which no further round begins; three rounds are run in any case.

    Returns:
        What the turns of each side have returned in the measured rounds, in their order.
    """
    names = list(names)
    start = time.perf_counter()
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        if number >= 3 and time.perf_counter() - start > limit:
            break
        # Shuffled, because a side may gain or lose by which one came before it.
        for name in random.Random(number).sample(names, len(names)):
            result = turn(name, number)
            if number >= 0:
                found[name].append(result)
        if on_round and number >= 0:
            on_round(number + 1, rounds)
    return found


def now(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Reads the clock; on CUDA, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def seconds_of(
    work: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """How long a piece of work takes on a device."""
    begin = now(device, clock)
    work()
    return now(device, clock) - begin


def seconds_in_turns(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds of each piece of work in every round, after one round that warms up."""

    def turn(name: str, number: int) -> float:
        return seconds_of(works[name], device, clock)

    return in_turns(works, turn, rounds, warmup=1)


@dataclass(frozen=True)
class Arm:
    """One side of a benchmark.

    Attributes:
        seconds: of every measured run of the batch, in the order of the rounds.
        peak_memory: the most bytes that were allocated during a run; None on the CPU.
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
    host: Host | Stage | Denoiser,
    arms: Mapping[str, Entrant],
    compile: bool,
) -> dict[str, Side]:
    """A side for every reduction and limit (None: the dense model): one model in which they are
    exchanged before each call, or, if compiled, a copy of the model for each."""
    sides: dict[str, Side] = {}
    for name, reduction in arms.items():
        if compile:
            twin = copy.deepcopy(model)
            put_on(twin, host, reduction)
            sides[name] = (torch.compile(twin), lambda: None)
        else:
            sides[name] = (model, partial(put_on, model, host, reduction))
    return sides


def measure(
    sides: Mapping[str, Side],
    images: Inputs,
    rounds: int,
    warmup: int,
    on_round: Callable[[int, int], None] | None = None,
    limit: float = float("inf"),
) -> dict[str, Arm]:
    """Runs the batch once through every side in each round, without gradients.

    Args:
        sides: the models to call, see `sides`.
        images: one batch.
        rounds: measured rounds.
        warmup: rounds before that are not measured.
        on_round: called after every round with (rounds done, rounds in all).
        limit: seconds after which no further round begins; three rounds are run in any case.
    """
    memory: dict[str, int | None] = dict.fromkeys(sides)
    device = device_of(images)

    def turn(name: str, number: int) -> float:
        target, prepare = sides[name]
        prepare()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            took = seconds_of(lambda: call(target, images), device)
        if device.type == "cuda" and number >= 0:
            memory[name] = max(memory[name] or 0, torch.cuda.max_memory_allocated(device))
        return took

    taken = in_turns(sides, turn, rounds, warmup, on_round, limit)
    return {name: Arm(tuple(seconds), memory[name]) for name, seconds in taken.items()}


@dataclass(frozen=True)
class Pace:
    """How fast a side is.

    Attributes:
        seconds: per batch.
        error: standard error of its ratio to the dense model, as a share of that ratio.
    """

    seconds: float
    error: float = 0.0


def paces(
    sides: Mapping[str, Side], images: Inputs, seconds: float, patience: int = PATIENCE
) -> dict[str, Pace]:
    """How long the sides take for a batch, measured until the speed-ups are known well.

    Args:
        sides: the models to call, see `sides`; the dense model is called "dense".
        images: one batch.
        seconds: how long to measure at first.
        patience: how often that is done at most, while a speed-up is still unsure (see `SURE`).
    """
    rounds: dict[str, tuple[float, ...]] = dict.fromkeys(sides, ())
    for again in range(patience):
        taken = measure(sides, images, 1000, 0 if again else 1, limit=seconds)
        rounds = {name: rounds[name] + taken[name].seconds for name in sides}
        found = {name: beside(rounds["dense"], rounds[name]) for name in sides}
        if max(pace.error for pace in found.values()) <= SURE:
            break
    return found


def beside(dense: Sequence[float], arm: Sequence[float]) -> Pace:
    """The pace of a side, from its seconds and those of the dense model in the same rounds.

    In every round the two are divided, and the median of these ratios counts: other work on the
    machine slows down both of them.
    """
    ratios = [a / b for a, b in zip(arm, dense, strict=True)]
    middle = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    # In a normal distribution the quartiles are 1.349 standard deviations apart, and the median of
    # n values has a standard error of 1.253 standard deviations, divided by the square root of n.
    error = 1.253 / 1.349 * (high - low) / math.sqrt(len(ratios)) / middle
    return Pace(statistics.median(dense) * middle, error)
