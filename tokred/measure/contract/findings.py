"""What is found out about a promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Broken:
    """A promise that a patch does not keep.

    Attributes:
        promise: its name in `PROMISES`.
        seen: what was seen.
        expected: what should have been seen.
    """

    promise: str
    seen: str
    expected: str

    def __str__(self) -> str:
        return f"{self.promise}: {self.seen}; expected: {self.expected}"


@dataclass(frozen=True)
class Verdict:
    """What was found out about one promise.

    Attributes:
        promise: its name in `PROMISES`.
        broken: in which ways it is not kept; empty if it is, or could not be tried.
        untried: why it could not be tried; None if it was.
    """

    promise: str
    broken: tuple[Broken, ...] = ()
    untried: str | None = None


Findings = Iterator[tuple[str, str]]
"""What was seen and what was expected, for everything that is not as promised."""


class UntriedError(Exception):
    """A promise cannot be tried on a model; the message says why."""


def said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
