"""What is seen while settings are measured."""

from __future__ import annotations

import sys
import time
from typing import Any

from tokred.measure.evaluation import Evaluation
from tokred.optional import require


class Shown:
    """A bar, and the table as it grows: in a notebook one that is drawn anew, else line by line."""

    def __init__(self, many: int, wanted: bool) -> None:
        self.bar: Any = None
        self._handle: Any = None
        self._lines = 0
        self._what, self._told = "", time.monotonic()
        if wanted:
            self.bar = require("tqdm.auto", "evaluate").tqdm(
                total=many, desc="measuring", leave=False, file=sys.stderr
            )
            if _in_notebook():
                self._handle = require("IPython.display", "evaluate")

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def expect(self, many: int) -> None:
        if self.bar is not None:
            self.bar.total += many
            self.bar.refresh()

    def now(self, what: str) -> None:
        self._what = what
        if self.bar is not None:
            self.bar.set_postfix_str(what)

    def far(self, how: str) -> None:
        """How far it is with that, told once a second."""
        if self.bar is not None and time.monotonic() - self._told >= 1:
            self._told = time.monotonic()
            self.bar.set_postfix_str(f"{self._what}, {how}")

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def row(self, table: Evaluation) -> None:
        if self.bar is None:
            return
        if self._handle is not None:
            if self._lines == 0:
                self._shown = self._handle.display(table, display_id=True)
            else:
                self._shown.update(table)
        else:
            lines = table.lines()
            for line in lines if self._lines == 0 else lines[-1:]:
                self.bar.write(line, file=sys.stderr)
        self._lines += 1
        self.step()


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")
