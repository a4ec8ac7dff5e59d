"""This process among those that `accelerate launch` has started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch

from tokred.optional import require


class Processes:
    """This process among those that `accelerate launch` has started; the only one, if none."""

    def __init__(self) -> None:
        self.state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ):
            cpu = not torch.accelerator.is_available()
            # One process measures speeds while the others wait.
            day = datetime.timedelta(days=1)
            self.state = require("accelerate", "evaluate").PartialState(cpu, timeout=day)

    @property
    def index(self) -> int:
        return int(self.state.process_index) if self.state else 0

    @property
    def number(self) -> int:
        return int(self.state.num_processes) if self.state else 1

    @property
    def main(self) -> bool:
        return self.index == 0

    def told(self, value: Any) -> Any:
        """What the main process says."""
        if self.number == 1:
            return value
        box = [value if self.main else None]
        require("accelerate.utils", "evaluate").broadcast_object_list(box)
        return box[0]

    def by_main(self, work: Callable[[], Any]) -> Any:
        """What the main process makes, while the others wait. Its errors are everybody's."""
        if self.number == 1:
            return work()
        outcome: tuple[bool, Any] | None = None
        if self.main:
            try:
                outcome = True, work()
            except Exception as error:
                outcome = False, error
        fine, made = self.told(outcome)
        if not fine:
            raise made
        return made

    def gathered(self, values: list[Any]) -> list[Any]:
        """Those of all processes."""
        if self.number == 1:
            return values
        found: list[Any] = require("accelerate.utils", "evaluate").gather_object(values)
        return found
