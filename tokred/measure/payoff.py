"""From how many images or tokens on a reduction pays, where it does not pay yet.

What a method and our bookkeeping cost is nearly the same for one image as for a few, because it is
the time of starting operators and of Python. What fewer tokens save grows with the images. So if
both are measured at one batch, one can estimate where they are equal. An estimate it is: it is
checked by measuring that batch, too, and corrected if it was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tokred.data.inputs import Inputs, pixels

WORTH = 1.03
"""A speed-up below this counts as none: it is within the noise of the measurement."""
LARGEST = 64
"""The largest batch that is measured to check an estimate."""


@dataclass(frozen=True)
class Payoff:
    """From where on a reduction should have a speed-up, which it did not have when it was measured.

    Attributes:
        speed_up: which.
        images: so many at a time, by estimate; None if more images should not help.
        tokens: or so many patch tokens per image, by estimate; None likewise.
        measured: images at a time, and the speed-up that was measured with so many, to check the
            estimate; None if that was not done.
    """

    speed_up: float
    images: int | None
    tokens: int | None
    measured: tuple[int, float] | None = None

    def __str__(self) -> str:
        what = "to pay" if self.speed_up <= WORTH else f"to be {self.speed_up:g}x as fast"
        told = ""
        if self.measured is not None:
            many, gain = self.measured
            told = f" Measured with {many} images at a time: {gain:.2f}x."
        if self.images is None:
            return f"More images at a time should not help it {what}.{told}"
        tokens = "" if self.tokens is None else f", or about {self.tokens} patch tokens per image"
        return f"By estimate it takes {self.images} images at a time {what}{tokens}.{told}"


def estimate(
    batch: int, tokens: int, dense: float, reduced: float, limit: float, speed_up: float = 1.0
) -> Payoff:
    """Where a reduction should have a speed-up, from what was measured at one batch: what it costs
    above the free limit is taken to stay the same, and everything else to grow with the batch.

    Args:
        batch: images at a time.
        tokens: patch tokens per image.
        dense: seconds per batch of the dense model.
        reduced: of the reduced one.
        limit: of the free limit.
        speed_up: which is wanted.
    """
    above, room = reduced - limit, dense / speed_up - limit
    if room <= 0:
        return Payoff(speed_up, None, None)
    times = max(1.0, above / room)
    return Payoff(speed_up, math.ceil(batch * times), math.ceil(tokens * times))


def checked(
    payoff: Payoff,
    batch: int,
    dense: float,
    reduced: float,
    timed: Callable[[int], tuple[float, float]],
) -> Payoff:
    """The same estimate, checked by measuring so many images, and corrected by what was measured.

    Args:
        payoff: the estimate.
        batch: the images that it was made from.
        dense: seconds of the dense model for so many.
        reduced: of the reduced model.
        timed: measures both for so many images, in the same order.
    """
    if payoff.images is None:
        return payoff
    many = min(LARGEST, max(payoff.images, batch + 1))
    if many <= batch:
        return payoff
    slow, fast = timed(many)
    found = replace(payoff, measured=(many, slow / fast))
    if slow / fast >= payoff.speed_up and many == payoff.images:
        return found
    # Both grow with the images: a line through what they lack at the two batches.
    lacks = reduced - dense / payoff.speed_up
    lacked = fast - slow / payoff.speed_up
    fewer = (lacks - lacked) / (many - batch)
    if fewer <= 0:
        return replace(found, images=None, tokens=None)
    images = math.ceil(many + lacked / fewer) if lacked > 0 else many
    assert payoff.tokens is not None
    return replace(found, images=images, tokens=round(payoff.tokens * images / payoff.images))


def enlarged(images: Inputs, many: int) -> Inputs:
    """A batch of so many images: those of another one, again and again."""
    there = len(pixels(images))
    at = torch.arange(many) % there
    if isinstance(images, torch.Tensor):
        return images[at.to(images.device)]
    return {
        name: x[at.to(x.device)]
        if isinstance(x, torch.Tensor) and x.ndim and len(x) == there
        else x
        for name, x in images.items()
    }
