"""The processes among which work is shared, if `accelerate launch` has started several."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokred.optional import require

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=14)
"""The fastest process may have to wait for the slowest as long as this."""


class Processes:
    """This process among all that share the work; the only one, if nothing else is known.

    Args:
        state: `PartialState` of accelerate; None: there is one process.
    """

    def __init__(self, state: Any = None) -> None:
        self.state = state

    @property
    def index(self) -> int:
        """The number of this process, from 0."""
        return int(self.state.process_index) if self.state else 0

    @property
    def number(self) -> int:
        """How many processes there are."""
        return int(self.state.num_processes) if self.state else 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.index == 0

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.number > 1:
            self.state.wait_for_everyone()

    def told(self, value: T) -> T:
        """The main process's value, in every process."""
        if self.number == 1:
            return value
        box = [value if self.main else None]
        _gathering().broadcast_object_list(box)
        return box[0]  # type: ignore[return-value]

    def by_main(self, work: Callable[[], T]) -> T:
        """Has the main process do some work while the others wait, and returns its result in every
        process. An error of it is raised in every process, so that nobody waits for a process that
        is gone."""
        if self.number == 1:
            return work()
        outcome: Any = None
        if self.main:
            try:
                outcome = True, work()
            except Exception as error:
                outcome = False, error
        fine, result = self.told(outcome)
        if not fine:
            raise result
        found: T = result
        return found

    def gathered(self, values: list[T]) -> list[T]:
        """The values of all processes, in every process."""
        if self.number == 1:
            return values
        found: list[T] = _gathering().gather_object(values)
        return found


def launched(extra: str) -> Processes:
    """The processes that were started together. If this one is alone, accelerate is not needed.

    Args:
        extra: the extra of tokred that brings accelerate, for the message if it is missing.

    Raises:
        ModuleNotFoundError: there are several processes, and accelerate is not installed.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not _distributed()
    return Processes(None if alone else process_state(extra=extra))


def process_state(cpu: bool = False, extra: str = "fid") -> Any:
    """accelerate's `PartialState`: which of how many processes this is, and its device.

    Args:
        cpu: use no other device.
        extra: the extra of tokred that brings accelerate, for the message if it is missing.

    Raises:
        ModuleNotFoundError: accelerate is not installed.
    """
    return require("accelerate", extra).PartialState(on_cpu(cpu), timeout=PATIENCE)


def on_cpu(wanted: bool = False) -> bool:
    """Whether accelerate must be told to use the CPU: if it is wanted, by an argument or by
    accelerate's environment variable, or if there is no other device. Without being told,
    accelerate takes each of several processes on CPUs for the only one."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    return wanted or forced or not torch.accelerator.is_available()


def num_processes() -> int:
    """How many processes PyTorch knows of."""
    return dist.get_world_size() if _distributed() else 1


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes. It has no gradient."""
    if num_processes() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gathering() -> Any:
    return require("accelerate.utils", "fid")
