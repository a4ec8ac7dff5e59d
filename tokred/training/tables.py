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
    values = read_table(file)  # rows are kept as they were written
    kept = [x for x, row in zip(_rows(file), values, strict=True) if row["step"] <= first]
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
    """The rows of `log.csv` or `validation.csv`; none if there is no such file.

    Raises:
        ValueError: a row is broken.
    """
    found = []
    for number, row in enumerate(_rows(file), 2):
        try:
            found.append({name: float(value) for name, value in row.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {file} is broken ({error}): delete it, or train anew (--fresh)"
            ) from error
    return found


def _rows(file: Path) -> list[dict[str, str]]:
    """All rows but a last one that was cut off because its process was killed."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    return list(csv.DictReader(lines))
