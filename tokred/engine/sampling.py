"""Where in a sampling a call of a denoiser is.

A denoiser is only told a time step, and what that is depends on the scheduler: whole numbers below
1,000, the logarithm of a noise level, a noise level itself. So a time step says something only
beside others: all those of the scheduler, where a pipeline is given, or else those of the first and
of the last step, which the user says or which are known of the model. A time step that does not fit
is an error: it would be read as another part of the sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

WHAT_TO_GIVE = (
    "say at which time steps a sampling begins and ends: tokred.Around(..., times=(first, last))"
)

CALLS = 64
"""So many calls of one step are told apart: calls at the same time step forever are no sampling."""

# bfloat16 rounds to 8 bits.
_ROUNDING = 2**-8


@dataclass(frozen=True)
class Times:
    """The time steps of a sampling, where they are not known one by one.

    Attributes:
        first: the time step of the first step: all is noise.
        last: the time step of the last step.
        whole: whether all of them are whole numbers.
    """

    first: float
    last: float
    whole: bool = False

    def progress(self, now: float) -> float:
        """Where in the sampling a time step is, from 0 (first step) to 1 (last step).

        Raises:
            ValueError: it is none of this sampling.
        """
        if self.whole and now % 1 != 0:
            raise ValueError(
                f"the time step {now:g} is not a whole number, as it is expected to be where only "
                "the model is known. Apply tokred to the pipeline, whose scheduler has the time "
                f"steps, or {WHAT_TO_GIVE}"
            )
        slack = 0 if self.whole else _ROUNDING * max(abs(self.first), abs(self.last))
        if not min(self.first, self.last) - slack <= now <= max(self.first, self.last) + slack:
            raise ValueError(
                f"the time step {now:g} is not between {self.first:g} (the first step) and "
                f"{self.last:g} (the last). Apply tokred to the pipeline, whose scheduler has the "
                f"time steps, or {WHAT_TO_GIVE}"
            )
        share = (now - self.first) / (self.last - self.first)
        return min(max(share, 0.0), 1.0)


THOUSAND = Times(1000.0, 0.0, whole=True)
"""What most models are called with."""


@dataclass(frozen=True)
class Call:
    """Which call of which step of a sampling a denoiser runs.

    A step is as long as the time step is the same. It has several calls where prompts are run one
    after the other, or where the scheduler takes a time step twice.

    Attributes:
        now: the time step.
        timesteps: those that the scheduler is set to, if it is known.
        step: how many steps of the sampling came before this one.
        number: how many calls of this step came before this one; at most `CALLS`.
        later: whether time steps become larger from step to step; None in the first step.
    """

    now: float
    timesteps: Any = None
    step: int = 0
    number: int = 0
    later: bool | None = None

    @property
    def uncounted(self) -> bool:
        """Whether its number is that of other calls of the step, too."""
        return self.number == CALLS

    def then(self, now: float, timesteps: Any) -> Call:
        """The call behind this one. Another sampling begins where the scheduler has been set anew,
        or time turns back."""
        later = now > self.now
        turned = now != self.now and self.later is not None and self.later != later
        if turned or timesteps is not self.timesteps:
            return Call(now, timesteps)
        if now == self.now:
            return replace(self, number=min(self.number + 1, CALLS))
        return Call(now, timesteps, self.step + 1, later=later)


def progress_by(scheduler: Any, now: float) -> float:
    """Where a time step is among those that a scheduler of diffusers has been set to, from 0 (the
    first) to 1 (the last). Each counts the same, however far it is from the next; time steps that
    are taken twice count once.

    Raises:
        ValueError: it is none of them, or there are none.
    """
    timesteps = scheduler.timesteps
    every = [] if timesteps is None else torch.as_tensor(timesteps).flatten().tolist()
    steps = list(dict.fromkeys(every))
    name = type(scheduler).__qualname__
    if not steps:
        raise ValueError(f"{name} has no time steps: call its set_timesteps, or {WHAT_TO_GIVE}")
    nearest = min(range(len(steps)), key=lambda n: abs(steps[n] - now))
    slack = _ROUNDING * abs(now) + 1e-6 * (max(steps) - min(steps))
    if not abs(steps[nearest] - now) <= slack:
        raise ValueError(
            f"the time step {now:g} is none of the {len(steps)} of {name}, which go from "
            f"{steps[0]:g} to {steps[-1]:g}. If the pipeline has another scheduler by now, apply "
            f"tokred to it again; in a loop of your own, {WHAT_TO_GIVE}"
        )
    return nearest / max(len(steps) - 1, 1)


def time_of(timestep: Any) -> float:
    """The time step that all images of a batch are at. Waits for the device.

    Raises:
        ValueError: there is none, or images are at different ones.
    """
    if timestep is None:
        raise ValueError("timestep must be given: `during` and `every` of tokred.Around go by it")
    steps = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [timestep]
    if not steps or any(step != steps[0] for step in steps[1:]):
        raise ValueError(
            "timestep must be the same for all images of a batch, as `during` and `every` of "
            f"tokred.Around are for all of them, not {steps}"
        )
    return float(steps[0])


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def alike(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    """Whether tensors are the same, bit by bit. Waits for the device."""
    return len(these) == len(those) and all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)
        for a, b in zip(these, those, strict=True)
    )
