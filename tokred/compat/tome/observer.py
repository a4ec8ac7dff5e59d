"""What goes with the reduction of a model that `tome.patch` has patched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tokred.engine.memory import Memory
from tokred.engine.observing import Observer, Record
from tokred.graphs import compiling


@dataclass
class Passes:
    """What the passes of one thread did to their tokens.

    Attributes:
        running: what the pass that is running has done so far; None if there is none.
        last: what the last pass did; None if there was none yet, or if it was broken off.
    """

    running: list[Record] | None = None
    last: list[Record] | None = None


@dataclass(eq=False)
class OnModel(Observer):
    """Hangs attributes on a model as long as a reduction does, and keeps what the last pass did.

    The model's own attributes of the same names come back when these are taken away.

    Attributes:
        model: on which the attributes hang.
        values: the attributes by name, as they were set last. While they hang, those of the model
            count.
        behind: the model's own attributes of these names, while ours hang; None while they do not.
        unseen: whether the last pass was one of compiled code, which keeps no record.
        passes: what passes did, by thread. (A copy of the model begins without.)
    """

    model: nn.Module = field(repr=False)
    values: dict[str, Any]
    behind: dict[str, Any] | None = None
    unseen: bool = field(default=False, repr=False)
    passes: Memory[Passes, None] = field(repr=False, default_factory=lambda: Memory(Passes))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In files of version 0.7 it has attributes alone.
        self.__dict__.update({"unseen": False, "passes": Memory(Passes), **state})

    # Attributes

    def get(self, name: str) -> Any:
        """What an attribute is now."""
        return getattr(self.model, name, self.values[name])

    def hung(self) -> None:
        own = vars(self.model)
        self.behind = {name: own[name] for name in self.values if name in own}
        for name, value in self.values.items():
            setattr(self.model, name, value)

    def taken_away(self) -> None:
        if self.behind is None:
            return
        own = vars(self.model)
        for name in self.values:
            if name in own:
                self.values[name] = own.pop(name)
        own.update(self.behind)
        self.behind = None

    # Passes

    def begins(self) -> None:
        self.unseen = compiling()
        if not self.unseen:
            self.passes.here.last, self.passes.here.running = None, []

    def ends(self) -> None:
        if compiling() or self.passes.here.running is None:
            return
        # Once only: blocks may run again, one by one, for gradients.
        self.passes.here.last, self.passes.here.running = self.passes.here.running, None

    def records(self, record: Record) -> None:
        if self.passes.here.running is not None:
            self.passes.here.running.append(record)

    def last_pass(self) -> list[Record] | None:
        """What the last pass of this thread did to its tokens; None if none came to its end yet.

        Raises:
            RuntimeError: the last pass was one of compiled code.
        """
        if self.unseen:
            raise RuntimeError(
                "the last pass was one of compiled code, which keeps no record of what became of "
                "tokens: run the model itself, not what torch.compile has made of it"
            )
        return self.passes.here.last
