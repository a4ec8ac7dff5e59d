"""The tables of a training, `log.csv` and `validation.csv`, which grow row by row."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tokred.data.writing import whole


@contextmanager
def table(
    file: Path, first: int, writes: bool
) -> Iterator[Callable[[Mapping[str, float | int]], None]]:
    """Opens a table, and gives a function that adds a row to it.

    Args:
        file: the table. Rows of steps after `first` are removed.
        first: the step from which training goes on.
        writes: whether this process writes; else the function does nothing.
    """
    if not writes:
        yield lambda row: None
        return
    kept = [row for row in _rows(file) if int(row["step"]) <= first]
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as part, part.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerows([list(kept[0])] if kept else [])
        writer.writerows(list(row.values()) for row in kept)
    with file.open("a", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")

        def add(row: Mapping[str, float | int]) -> None:
            if opened.tell() == 0:
                writer.writerow(row)
            writer.writerow(row.values())
            opened.flush()

        yield add
    if file.stat().st_size == 0:
        file.unlink()


def read_table(file: Path) -> list[dict[str, float]]:
    """The rows of `log.csv` or `validation.csv`; none if there is no such file."""
    return [{name: float(value) for name, value in row.items()} for row in _rows(file)]


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    # If a process was killed while it wrote, the last row may be incomplete.
    return [row for row in rows if None not in row.values()]
