"""The clock of a profile: it cuts passes into parts of blocks."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tokred.engine.observing import Observer


@dataclass(frozen=True)
class Spent:
    """Seconds by (layer, part), for every pass. Outside of all blocks, the layer is None."""

    passes: list[dict[tuple[int | None, str], float]]

    def median(self, layer: int | None, part: str) -> float:
        """The median over the passes; 0 in passes without such a part."""
        return float(statistics.median(one.get((layer, part), 0.0) for one in self.passes))


@dataclass
class Clock(Observer):
    """Cuts passes into parts of blocks. It is told of blocks by their hooks, and of what a method
    adds by the reduction that it observes.

    Parts may nest. The time of an inner part does not count for the outer one.

    Attributes:
        stamp: reads the clock.
        between: the seconds from one reading to another; called when the pass is over.
        passes: for every side the readings of each pass, and for each reading the (layer, part)
            that begins there, or None if no part does.
    """

    stamp: Callable[[], Any]
    between: Callable[[Any, Any], float]
    passes: dict[str, list[list[tuple[Any, tuple[int | None, str] | None]]]] = field(
        default_factory=dict
    )
    _layer: int | None = None
    _open: list[str] = field(default_factory=list)

    def begin(self, side: str) -> None:
        """A pass of a side begins."""
        self.passes.setdefault(side, []).append([])
        self._now = self.passes[side][-1]
        self._layer = None
        self._open = []

    def enter(self, layer: int) -> None:
        """A block begins."""
        self._layer, self._open = layer, ["rest"]
        self._mark()

    def leave(self) -> None:
        """A block ends."""
        self._layer, self._open = None, []
        self._mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside of the `with` block, a part of the running block is timed."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        begins = (self._layer, self._open[-1]) if self._open else None
        self._now.append((self.stamp(), begins))

    def spent(self, side: str) -> list[dict[tuple[int | None, str], float]]:
        """The seconds of each part in each pass of a side."""
        found = []
        for marks in self.passes[side]:
            spent: dict[tuple[int | None, str], float] = {}
            for (start, what), (end, _) in itertools.pairwise(marks):
                if what is not None:
                    spent[what] = spent.get(what, 0.0) + self.between(start, end)
            found.append(spent)
        return found


def clock_for(device: torch.device) -> Clock:
    """A clock for a device: events on the current stream on CUDA, the processor's elsewhere."""
    if device.type != "cuda":
        return Clock(time.perf_counter, lambda start, end: end - start)

    def stamp() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return Clock(stamp, lambda start, end: float(start.elapsed_time(end)) / 1e3)


def _hooks(block: nn.Module, layer: int, clock: Clock) -> tuple[Any, Any]:
    """Hooks that read the clock when a block begins and when it ends."""
    return (
        block.register_forward_pre_hook(lambda module, args: clock.enter(layer)),
        block.register_forward_hook(lambda module, args, output: clock.leave()),
    )
