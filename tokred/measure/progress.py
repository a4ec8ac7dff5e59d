"""What somebody sees while settings are measured."""

from __future__ import annotations

import sys
import time
from typing import Any

from tokred.measure.evaluation import Evaluation
from tokred.optional import require


class Progress:
    """A progress bar, and the table as it grows: in a notebook the whole table, drawn again after
    every row; elsewhere line by line.

    Args:
        many: how many steps there are.
        visible: whether anything is shown.
    """

    def __init__(self, many: int, visible: bool) -> None:
        self._bar: Any = None
        self._notebook: Any = None
        self._drawn: Any = None
        self._lines = 0
        self._what, self._told = "", time.monotonic()
        if visible:
            self._bar = require("tqdm.auto", "evaluate").tqdm(
                total=many, desc="measuring", leave=False, file=sys.stderr
            )
            if _in_notebook():
                self._notebook = require("IPython.display", "evaluate")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def expect(self, many: int) -> None:
        """Adds steps to the number that is expected."""
        if self._bar is not None:
            self._bar.total += many
            self._bar.refresh()

    def now(self, what: str) -> None:
        """Says what is being done."""
        self._what = what
        if self._bar is not None:
            self._bar.set_postfix_str(what)

    def detail(self, how: str) -> None:
        """Says how far that is; shown at most once a second."""
        if self._bar is not None and time.monotonic() - self._told >= 1:
            self._told = time.monotonic()
            self._bar.set_postfix_str(f"{self._what}, {how}")

    def step(self) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, text: str) -> None:
        """Prints a text above the bar."""
        if self._bar is not None:
            self._bar.write(text)

    def row(self, table: Evaluation) -> None:
        """A step is done, and the table has one more row."""
        if self._bar is None:
            return
        if self._notebook is not None:
            if self._drawn is None:
                self._drawn = self._notebook.display(table, display_id=True)
            else:
                self._drawn.update(table)
        else:
            lines = table.lines()
            for line in lines if self._lines == 0 else lines[-1:]:
                self._bar.write(line, file=sys.stderr)
        self._lines += 1
        self.step()


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")
