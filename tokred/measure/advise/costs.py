"""How long blocks and methods take on this machine, as functions of the number of tokens."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokred.host import UnsupportedModelError
from tokred.measure.payoff import enlarged
from tokred.measure.profile.measuring import profile
from tokred.measure.profile.values import Profile
from tokred.measure.progress import Progress
from tokred.measure.settings import Setting
from tokred.measure.work import Work
from tokred.patching.presets import Preset
from tokred.reducers import Reducer
from tokred.reducers.protocol import traits
from tokred.reducers.truncate import Truncate
from tokred.schedule import Exactly


@dataclass(frozen=True)
class Costs:
    """How long a model with a method takes, as fitted to measurements.

    Attributes:
        block: the seconds of a block, a parabola of its tokens.
        added: the seconds that the method adds to a block, a parabola of the tokens that enter it.
        dense: the seconds of the dense model.
        between: whether the method stands between attention and MLP, so that attention still sees
            the tokens that enter.
    """

    block: tuple[float, float, float]
    added: tuple[float, float, float]
    dense: float
    between: bool

    def step(self, before: Any, after: Any, added: bool = True) -> Any:
        """The seconds of one block.

        Args:
            before: tokens that enter the block, a number or an array.
            after: tokens that leave it, a number or an array.
            added: whether to count what the method adds.
        """
        block = _at(self.block, after)
        if self.between:
            block = (block + _at(self.block, before)) / 2
        return block + np.where(after < before, _at(self.added, before), 0.0) * added

    def time(self, counts: Sequence[int], added: bool = True) -> float:
        """The seconds of the model, given its tokens before the first layer and after each."""
        steps = [float(self.step(a, b, added)) for a, b in itertools.pairwise(counts)]
        full = float(_at(self.block, counts[0])) * len(steps)
        return max(1e-9, self.dense - full + sum(steps))

    def speed_up(self, counts: Sequence[int], added: bool = True) -> float:
        """The speed-up over the dense model, given its tokens before the first layer and after
        each."""
        return self.dense / self.time(counts, added)


def measured(work: Work, methods: Sequence[Setting], progress: Progress) -> dict[str, Costs]:
    """The costs by method. Methods that cannot be profiled are left out."""
    profiles: dict[str, Profile] = {}
    falling = _falling(work.tokens, work.layout.layers)
    progress.expect(len(methods))
    for setting in methods:
        progress.now(f"what {setting.method} costs")
        if isinstance(setting.reducer, Preset) or traits(setting.reducer).own_schedule:
            progress.step()
            continue
        # If a method cannot be profiled, its uniform keep rates are measured all the same.
        with contextlib.suppress(ValueError, UnsupportedModelError, RuntimeError):
            profiles[setting.method] = profile(
                work.model, work.inputs, setting.reducer, schedule=Exactly(falling),
                host=work.host, rounds=3, warmup=1,
            )  # fmt: skip
        progress.step()
    layers = [times for one in profiles.values() for times in one.layers]
    if not layers:
        return {}
    points = [(t.before, t.limit) for t in layers] + [(work.tokens, t.dense) for t in layers]
    block = parabola(points)
    found = {}
    for method, one in profiles.items():
        added = parabola([(times.before, times.added) for times in one.layers])
        found[method] = Costs(block, added, one.dense.median, one.place == "between")
    return found


def _falling(tokens: int, layers: int) -> tuple[int, ...]:
    """Counts that fall in every block, so that one pass tells the times of many numbers of tokens;
    the last block has a quarter."""
    falling = [max(1, round(tokens * 0.25 ** ((i + 1) / layers))) for i in range(layers)]
    for i, (before, after) in enumerate(itertools.pairwise([tokens, *falling])):
        falling[i] = max(after, before - before // 2)
    return tuple(falling)


def free_speed_ups(
    work: Work, method: Reducer | Preset, batch: int | None = None
) -> dict[float, float]:
    """The speed-ups of the free limit, by keep rate.

    Args:
        work: measures settings on the model and the images.
        method: decides how tokens are cut off where blocks attend in windows.
        batch: so many images at a time; those on which speed is measured, if not given.
    """
    arms: dict[str, Any] = {"dense": None}
    cut = Setting("limit", Truncate(), 0.5)
    reducer = cut.reducer if work.why_not(cut) is None else method
    for rate in (0.9, 0.6, 0.3, 0.1):
        arms[str(rate)] = work.free_limit(work.reduction(Setting("limit", reducer, rate)))
    inputs = work.inputs if batch is None else enlarged(work.inputs, batch)
    taken = work.pace(arms, inputs, work.seconds)
    dense = taken.pop("dense")
    return {float(rate): dense.seconds / pace.seconds for rate, pace in taken.items()}


def parabola(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Fits a parabola to (tokens, seconds) that has no negative coefficient: a constant, a cost for
    each token, and a cost for each pair of tokens."""
    from scipy.optimize import nnls  # imported here, because only advice needs it

    tokens = np.array([p[0] for p in points], dtype=float)
    seconds = np.array([p[1] for p in points], dtype=float)
    scale = tokens.max()
    columns = np.stack([np.ones_like(tokens), tokens / scale, (tokens / scale) ** 2], 1)
    # Relative errors are minimised: a small block counts as much as a large one.
    weight = 1 / np.maximum(seconds, seconds.max() * 1e-3)
    a, b, c = nnls(columns * weight[:, None], seconds * weight)[0]
    return float(a), float(b / scale), float(c / scale**2)


def _at(parabola: tuple[float, float, float], tokens: Any) -> Any:
    start, each, pair = parabola
    return start + each * tokens + pair * np.square(tokens, dtype=float)
