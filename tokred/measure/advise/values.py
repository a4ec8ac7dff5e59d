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
        choice: the row that is advised; None if no setting meets the budget.
        sentences: what to say about it, and why.
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
        """The line to paste; empty if no setting meets the budget."""
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
        setting: the setting.
        searched: whether its schedule was searched for, rather than being a uniform keep rate.
        row: what was measured. (Its speeds are those of the dense model until it has been raced.)
        raced: whether its speed was measured in turns with that of other candidates.
    """

    setting: Setting
    searched: bool
    row: Row
    raced: bool = False


@dataclass(frozen=True)
class SettingFamily:
    """Settings from which one is chosen by its speed-up: a method at uniform keep rates, or with
    the schedules that were found for it.

    Attributes:
        searched: whether schedules were searched for.
        propose: the setting that should have a given speed-up; None if there is none.
        wrong: for every setting that was timed, the predicted speed-up divided by the measured one.
    """

    searched: bool
    propose: Callable[[float], Setting | None]
    wrong: list[float] = field(default_factory=list)
