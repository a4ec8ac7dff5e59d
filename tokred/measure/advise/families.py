"""Settings for a speed-up: methods at uniform keep rates, and with schedules that are searched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from tokred.measure.advise.costs import Costs
from tokred.measure.advise.harm import harm, sensitivity
from tokred.measure.advise.schedules import (
    Stations,
    best_schedules,
    levels_of,
    neighbours,
    scaled,
    stations_of,
    unrolled,
)
from tokred.measure.advise.values import SettingFamily
from tokred.measure.progress import Progress
from tokred.measure.settings import Setting
from tokred.measure.work import Work
from tokred.schedule import Exactly

FINALISTS, UNIFORM = 3, 4
"""For how many methods schedules are searched, and how many are tried at uniform keep rates."""
POLISHING = 16
"""How many changes of a schedule are tried."""


class Proposals:
    """Proposes settings, by what blocks and methods cost and by how much they disturb the model.

    Args:
        work: measures settings on the model and the images.
        costs: by method; methods that could not be profiled are missing.
        progress: shows what is being done.
    """

    def __init__(self, work: Work, costs: Mapping[str, Costs], progress: Progress) -> None:
        self.work, self.costs, self.progress = work, costs, progress
        self.tokens, self.layers = work.tokens, work.layout.layers

    def predicted(self, setting: Setting) -> float:
        """The speed-up that a setting should have."""
        costs = self.costs.get(setting.method)
        counts = self.work.counts(self.work.reduction(setting))
        if costs is not None:
            return costs.speed_up((self.tokens, *counts))
        # The method was not profiled: to begin with, only its numbers of tokens count.
        other = next(iter(self.costs.values()), None)
        if other is None:
            return self.tokens * len(counts) / sum(counts)
        return other.speed_up((self.tokens, *counts), False)

    def uniform(self, method: Setting, speed: float) -> Setting:
        """A method at the uniform keep rate that should have this speed-up."""
        low, high = 0.02, 1.0
        for _ in range(8):
            rate = (low + high) / 2
            if self._predicted_at(method, rate) < speed:
                high = rate
            else:
                low = rate
        return Setting(method.method, method.reducer, round(low, 3))

    def _predicted_at(self, method: Setting, rate: float) -> float:
        try:
            return self.predicted(Setting(method.method, method.reducer, round(rate, 3)))
        except ValueError:  # the method cannot make so few tokens
            return math.inf

    def families(self, chosen: Sequence[Setting], speed: float, few: int) -> list[SettingFamily]:
        """The families that are measured.

        Args:
            chosen: the methods, the one that disturbs least first.
            speed: the speed-up for which schedules are searched. They are scaled to others.
            few: on how many batches disturbance is measured.
        """
        found = [SettingFamily(False, partial(self.uniform, method)) for method in chosen[:UNIFORM]]
        for method in [m for m in chosen if m.method in self.costs][:FINALISTS]:
            seeds = self._seeds(method, speed, few)
            if seeds:  # otherwise no schedule of the method should have this speed-up
                best = self._polished(method, seeds, few)
                found.append(SettingFamily(True, partial(self._scaled, method, best)))
        return found

    def _seeds(self, method: Setting, speed: float, few: int) -> list[Stations]:
        """The schedules to begin with: the one that should disturb least, and the uniform keep
        rate."""
        costs = self.costs[method.method]
        harms = sensitivity(self.work, method, few, self.progress)
        schedules = best_schedules(levels_of(self.tokens), harms, costs)
        searched = next((counts for gain, counts in schedules if gain >= speed), schedules[-1][1])
        uniform = self.work.counts(self.work.reduction(self.uniform(method, speed)))
        found: list[Stations] = []
        for counts in (searched, uniform):
            stations = stations_of(self.tokens, counts)
            if not stations:
                continue
            fitted = scaled(stations, costs, self.tokens, self.layers, speed)
            if fitted is not None and fitted not in found:
                found.append(fitted)
        return found

    def _polished(self, method: Setting, seeds: list[Stations], few: int) -> Stations:
        """The seed that disturbs least, improved by small changes: a reduction moves by one layer,
        or becomes a little stronger or weaker. After a change all reductions are scaled, so that
        the predicted time stays the same."""
        tokens, layers, costs = self.tokens, self.layers, self.costs[method.method]

        def disturbs(stations: Stations) -> float:
            counts = unrolled(stations, tokens, layers)
            setting = Setting(method.method, method.reducer, Exactly(counts))
            return harm(self.work.difference(setting, few))

        self.progress.expect(len(seeds) + POLISHING)
        self.progress.now(f"improving a schedule of {method.method}")
        known = {}
        for seed in seeds:
            known[seed] = disturbs(seed)
            self.progress.step()
        best = min(known, key=known.__getitem__)
        speed = costs.speed_up((tokens, *unrolled(best, tokens, layers)))
        waiting = neighbours(best, tokens, layers)
        for _ in range(POLISHING):
            moved = None
            while waiting and (moved is None or moved in known):
                moved = scaled(waiting.pop(0), costs, tokens, layers, speed)
            if moved is not None and moved not in known:
                known[moved] = disturbs(moved)
                if known[moved] < known[best]:
                    best, waiting = moved, neighbours(moved, tokens, layers)
            self.progress.step()
        return best

    def _scaled(self, method: Setting, stations: Stations, speed: float) -> Setting | None:
        costs = self.costs[method.method]
        fitted = scaled(stations, costs, self.tokens, self.layers, speed)
        if fitted is None:
            return None
        counts = unrolled(fitted, self.tokens, self.layers)
        return Setting(method.method, method.reducer, Exactly(counts))
