"""A reduction that does the same, and reads a clock at its borders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokred.engine.run import Reduction, State, Step
from tokred.engine.windows import InWindows
from tokred.maps import TokenMap
from tokred.measure.profile.clock import Clock
from tokred.reducers import Reconstruction, Reducer, Tokens


def timed(reduction: Reduction, clock: Clock) -> Timed:
    """A reduction that does the same, and reads the clock at its borders."""
    values = {
        each.name: getattr(reduction, each.name)
        for each in dataclasses.fields(Reduction)
        if not each.name.startswith("_")
    }
    reducer, rebuilt = reduction.reducer, reduction.reconstruction
    if isinstance(reducer, InWindows):
        inside: Any = TimedCall(reducer.reducer, clock)
        values["reducer"] = dataclasses.replace(reducer, reducer=inside)
    else:
        values["reducer"] = TimedCall(reducer, clock)
    if rebuilt is not None:
        values["reconstruction"] = TimedCall(rebuilt, clock, "back")
    return Timed(**values, clock=clock)


@dataclass(frozen=True)
class TimedCall:
    """A method, or a reconstruction, with a clock around its call; what it says of itself shows
    through."""

    inner: Reducer | Reconstruction
    clock: Clock
    part: str = "matching"

    def __str__(self) -> str:
        return str(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any) -> Any:
        with self.clock.part(self.part):
            return self.inner(*args)


@dataclass(eq=False, kw_only=True)
class Timed(Reduction):
    """A reduction whose steps are timed.

    Attributes:
        clock: that is read.
    """

    clock: Clock

    def enter(self, *args: Any, **kwargs: Any) -> TimedStep:
        step = super().enter(*args, **kwargs)
        values = {each.name: getattr(step, each.name) for each in dataclasses.fields(Step)}
        made = TimedStep(**values, clock=self.clock)
        self._put("step", made)
        return made

    def expand(self, x: Tensor, state: State) -> Tensor:
        if state.expanded or state.trail is None:
            return x
        with self.clock.part("back"):
            return super().expand(x, state)

    def descend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if not state.expanded or state.trail is None:
            return super().descend(x, state)
        with self.clock.part("back"):
            return super().descend(x, state)


@dataclass(kw_only=True)
class TimedStep(Step):
    """A step whose parts are timed.

    Attributes:
        clock: that is read.
    """

    clock: Clock

    def bias(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        if self.untouched:
            return super().bias(x, mask)
        with self.clock.part("bias"):
            return super().bias(x, mask)

    def rows(self, table: Tensor) -> Tensor:
        if self.state.trail is None:
            return super().rows(table)
        with self.clock.part("bias"):
            return super().rows(table)

    def gated(self, run: Callable[[Tensor], Any], x: Tensor, alone: bool = True) -> Any:
        def block(few: Tensor) -> Any:
            with self.clock.part("rest"):
                y = run(few)
            self.clock.become("back")
            return y

        with self.clock.part("merging"):
            return super().gated(block, x, alone)

    def _tokens(self, x: Tensor, size: Tensor) -> Tokens:
        with self.clock.part("matching"):
            return super()._tokens(x, size)

    def _receive(self) -> None:
        if "attention_received" not in self.reduction.reducer.needs:
            return super()._receive()
        with self.clock.part("matching"):
            return super()._receive()

    def _apart(self, view: Tokens, lengths: tuple[int, ...]) -> TokenMap:
        with self.clock.part("matching"):
            return super()._apart(view, lengths)

    def _change(self, x: Tensor) -> Tensor:
        with self.clock.part("merging"):
            fewer = super()._change(x)
            if fewer is x:  # nothing to do in this layer
                self.clock.was("rest")
            return fewer

    def _rise(self, x: Tensor, to: int) -> Tensor:
        with self.clock.part("back"):
            return super()._rise(x, to)
