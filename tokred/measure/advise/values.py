"""What `tokred.advise` returns, and what it tries on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokred.measure.evaluation import Evaluation, Row
from tokred.measure.settings import Setting


@dataclass(frozen=True, repr=False)
class Advice:
    """What `tokred.advise` has found.

    Attributes:
        wanted: the budget, in words.
        choice: the row that is advised; None if nothing helps.
        sentences: what there is to say, and why.
        evaluation: everything that was measured in full, the dense model first.
        setting: method and schedule of the choice.
    """

    wanted: str
    choice: Row | None
    sentences: tuple[str, ...]
    evaluation: Evaluation
    setting: Setting | None = None

    @property
    def code(self) -> str:
        """The line to paste; empty if nothing helps."""
        return self.choice.code if self.choice else ""

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "wanted": self.wanted,
            "choice": self.choice and dataclasses.asdict(self.choice),
            "sentences": list(self.sentences),
            "evaluation": self.evaluation.as_dict(),
            "code": self.code,
        }

    def __str__(self) -> str:
        return "\n".join([*self.sentences, *([f"\n    {self.code}"] if self.code else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str | None:
        return self.evaluation._repr_html_()


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried on all of the images.

    Attributes:
        setting: what it is.
        searched: whether its schedule was searched for, rather than a uniform keep rate.
        row: what came of it. (Its speeds are the dense model's until it has been raced.)
        raced: whether its speed was measured beside that of the others.
    """

    setting: Setting
    searched: bool
    row: Row
    raced: bool = False


@dataclass(frozen=True)
class Family:
    """Settings of which one should be as fast as is asked for: a method at uniform keep rates, or
    with the schedules that were found for it.

    Attributes:
        searched: whether schedules were searched for.
        propose: from a speed-up to the setting that should have it; None if there is none.
        wrong: how many times too fast each of its settings was predicted to be.
    """

    searched: bool
    propose: Callable[[float], Setting | None]
    wrong: list[float] = field(default_factory=list)
