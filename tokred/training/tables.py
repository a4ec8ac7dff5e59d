"""Tables of a training, `log.csv` and `validation.csv`, to which a row is added after each step."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def table(
    file: Path, first: int, writes: bool
) -> Iterator[Callable[[Mapping[str, float | int]], None]]:
    """Adds rows to a CSV file, in which those after step `first` are taken out before."""
    if not writes:
        yield lambda row: None
        return
    kept = [row for row in _rows(file) if int(row["step"]) <= first]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerows([list(kept[0])] if kept else [])
        writer.writerows(list(row.values()) for row in kept)
    part.replace(file)
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
    """The rows of `log.csv` or `validation.csv`; none if it is not there."""
    return [{name: float(value) for name, value in row.items()} for row in _rows(file)]


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    # Of a process that was killed while it wrote, the last row may be in part.
    return [row for row in rows if None not in row.values()]
