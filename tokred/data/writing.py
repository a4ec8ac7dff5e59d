"""Files that are there whole or not at all, whenever a process is stopped; and what to say of those
that are broken all the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"
"""What the names of files end in that are being written."""


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Gives another path to write to, which becomes `file` when the block ends.

    The other path ends in `.part`, and is another one in every process. If the block raises, `file`
    stays as it was.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}{PART}")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with whole(file) as part:
        part.write_text(text, encoding="utf-8")


def read_mapping(file: Path, alone: str) -> dict[str, Any]:
    """What a JSON file says that cannot be made again.

    Args:
        file: the file; it holds a mapping.
        alone: what only this file says, and what to do without it, for the message.

    Raises:
        ValueError: it is broken.
    """
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no mapping")
    except ValueError as error:
        raise ValueError(f"{file} is broken ({error}), and it alone says {alone}") from error
    return found


def clear_parts(folder: Path) -> None:
    """Removes what processes that were killed have left in a folder. Nobody else may be writing
    there."""
    for part in folder.glob(f"*{PART}"):
        part.unlink(missing_ok=True)
