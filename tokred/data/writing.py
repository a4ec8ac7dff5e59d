"""Files that are there whole or not at all, whenever a process is stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Gives another path to write to, which becomes `file` when the block ends.

    The other path ends in `.part`. If the block raises, `file` stays as it was.
    """
    part = file.with_suffix(".part")
    yield part
    part.replace(file)


def write_text(file: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with whole(file) as part:
        part.write_text(text)
