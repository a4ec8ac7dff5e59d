"""The search for the setting that is advised."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from tokred.data.inputs import pixels
from tokred.host import UnsupportedModelError
from tokred.measure.advise import words
from tokred.measure.advise.costs import Costs, free_speed_ups, measured
from tokred.measure.advise.families import Proposals
from tokred.measure.advise.harm import screened
from tokred.measure.advise.values import Advice, Candidate, SettingFamily
from tokred.measure.evaluation import Evaluation, Row
from tokred.measure.payoff import WORTH, Payoff, checked, enlarged, estimate
from tokred.measure.progress import Progress
from tokred.measure.settings import Setting
from tokred.measure.work import Work

RACING = 8
"""How many candidates are measured in turns with each other."""
MORE = 8
"""If fewer images at a time are too few for a speed-up, the free limit of so many is told."""
TRIES, CLOSE = 3, 0.03
"""How often predictions are corrected, and by how much proposals should exceed the speed-up."""
MARGINS = (1.0, 1.03, 1.08)
"""What the asked speed-up is multiplied by: at first, and when no setting turned out as fast as was
asked."""


class Search:
    """The steps of the search, and what is known so far.

    Args:
        work: measures settings on the model and the images.
        methods: each at some keep rate. Those that the model does not take are left out.
        progress: shows what is being done.
        name: of the model.

    Raises:
        UnsupportedModelError: the model takes none of the methods.
    """

    def __init__(self, work: Work, methods: list[Setting], progress: Progress, name: str) -> None:
        self.work, self.progress, self.name = work, progress, name
        self.refused: dict[str, str] = {}
        self.methods: list[Setting] = []
        for setting in methods:
            reason = work.why_not(setting)
            if reason is None:
                self.methods.append(setting)
            else:
                self.refused[setting.method] = reason
        if not self.methods:
            raise UnsupportedModelError(
                f"{name} takes none of the methods: "
                + "; ".join(f"{method}: {why}" for method, why in self.refused.items())
            )
        progress.expect(1)
        progress.now("dense")
        self.dense = work.row(None)
        progress.step()
        self.candidates: dict[str, Candidate] = {}

    @cached_property
    def free(self) -> dict[float, float]:
        """The speed-ups of the free limit, by keep rate."""
        return free_speed_ups(self.work, self.methods[0].reducer)

    @cached_property
    def costs(self) -> dict[str, Costs]:
        """The costs by method; methods that cannot be profiled are missing."""
        return measured(self.work, self.methods, self.progress)

    @cached_property
    def proposals(self) -> Proposals:
        """Proposes settings."""
        return Proposals(self.work, self.costs, self.progress)

    @property
    def few(self) -> int:
        """On how many batches disturbance is measured: half of those that are compared."""
        return max(1, len(self.work.answers.compared) // 2)

    # --- the two questions ------------------------------------------------------------------------

    def faster(self, speed_up: float) -> Advice:
        """The setting that loses least among those with this speed-up."""
        wanted = f"{speed_up:g} times as fast"
        nothing = f"no setting reaches a {speed_up:g}x speed-up"
        if max(self.free.values()) < speed_up:
            told = words.limits(self.work, self.free, speed_up)
            return self._nothing(wanted, nothing, (*told, *self._free_limit_of_more()))
        order = self._ordered(speed_up * 1.02)
        families = self.proposals.families(order, speed_up * 1.02, self.few)
        good: list[Candidate] = []
        for margin in MARGINS:
            for number, setting in self.meeting(speed_up * margin, families).items():
                self.judge(setting, families[number].searched)
            # All in turns with each other, and for longer: so one race decides.
            self.race(list(self.candidates.values()), 2)
            good = [c for c in self._raced() if c.row.speed_up >= speed_up]
            if good:
                break
        if not good:
            told = words.limits(self.work, self.free, speed_up)
            nearest = max(self.candidates.values(), key=lambda c: c.row.speed_up, default=None)
            if nearest is not None:
                measured = words.measured(self.table(), nearest)
                told += (f"The fastest setting that was measured: {measured}.",)
                told += (str(self._payoff(nearest, speed_up)),)
            return self._nothing(wanted, nothing, told)
        # Among those that lose the same, the fastest comes first.
        good.sort(key=lambda c: (round(self.drop(c), 6), -c.row.speed_up))
        return self._advice(wanted, good)

    def closest(self, max_drop: float) -> Advice:
        """The fastest setting among those that lose at most this much."""
        leading = self.table().leading
        wanted = f"at most {max_drop:g} points of {leading} lost"
        nothing = f"no measurably faster setting loses at most {max_drop:g} points of {leading}"
        most = max(self.free.values())
        if most < WORTH:
            told = words.limits(self.work, self.free, WORTH)
            return self._nothing(wanted, nothing, (*told, *self._free_limit_of_more()))
        middle = 1 + (most - 1) / 2
        for family in self.proposals.families(self._ordered(middle), middle, self.few):
            self._approach(max_drop, most, family)
        self.race([c for c in self.candidates.values() if self.drop(c) <= max_drop])
        good = [c for c in self._raced() if self.drop(c) <= max_drop and c.row.speed_up >= WORTH]
        if not good:
            told = words.limits(self.work, self.free)
            if self.candidates:
                self.race([min(self.candidates.values(), key=self.drop)])
                least = min(self._raced(), key=self.drop)
                told += (f"The setting that loses least: {words.measured(self.table(), least)}.",)
                if self.drop(least) <= max_drop:
                    told += (str(self._payoff(least, WORTH)),)
            return self._nothing(wanted, nothing, told)
        good.sort(key=lambda c: (-c.row.speed_up, self.drop(c)))
        return self._advice(wanted, good)

    # --- the steps --------------------------------------------------------------------------------

    def _ordered(self, speed_up: float) -> list[Setting]:
        """The methods, the one that disturbs least at this speed-up first."""
        # What could not be profiled has to be timed, or the comparison is not fair.
        unknown = [method for method in self.methods if method.method not in self.costs]
        uniform = self.proposals.uniform
        timed: dict[int, Setting] = {}
        if unknown:
            timed = self.meeting(
                speed_up, [SettingFamily(False, partial(uniform, m)) for m in unknown]
            )
        met = {setting.method: setting for setting in timed.values()}
        settings = [met.get(m.method) or uniform(m, speed_up) for m in self.methods]
        order = screened(self.work, settings, self.few, self.progress)
        return [self.methods[position] for position in order]

    def meeting(self, speed_up: float, families: Sequence[SettingFamily]) -> dict[int, Setting]:
        """One setting of each family, by the family's number: the slowest one that was measured to
        have the speed-up, or else the fastest one. A few are tried, in turns with those of the
        other families, and predictions are corrected by what was measured."""
        tried: list[dict[str, tuple[Setting, list[float]]]] = [{} for _ in families]
        for _ in range(TRIES):
            now: dict[int, Setting] = {}
            for number, family in enumerate(families):
                wrong = statistics.median(family.wrong) if family.wrong else 1.0
                # Within bounds, because measurements on a busy machine may be far off.
                asked = speed_up * (1 + CLOSE / 2) * min(1.4, max(0.7, wrong))
                setting = family.propose(asked)
                if setting is not None:
                    now[number] = setting
            for number, ratio in self._timed(now).items():
                setting = now[number]
                families[number].wrong.append(self.proposals.predicted(setting) / ratio)
                tried[number].setdefault(setting.name, (setting, []))[1].append(ratio)
        return {
            number: _slowest(settings, speed_up)
            for number, settings in enumerate(tried)
            if settings
        }

    def _timed(self, settings: dict[int, Setting]) -> dict[int, float]:
        """The measured speed-ups of settings, all in turns with the dense model."""
        arms: dict[str, Any] = {"dense": None}
        for number, setting in settings.items():
            arms[str(number)] = self.work.reduction(setting)
        self.progress.expect(1)
        self.progress.now(f"{len(settings)} settings, in turns")
        seconds = self.work.seconds * len(arms) / 2
        taken = self.work.pace(arms, self.work.inputs, seconds, patience=1)
        self.progress.step()
        dense = taken["dense"].seconds
        return {number: dense / taken[str(number)].seconds for number in settings}

    def judge(self, setting: Setting, searched: bool) -> Candidate:
        """A candidate, tried on all of the images; each setting only once."""
        known = self.candidates.get(setting.name)
        if known is not None:
            return known
        self.progress.expect(1)
        self.progress.now(f"{setting.method} on all images")
        dense = self.dense.speed
        row = self.work.row(setting, {"dense": dense, "reduced": dense})
        self.candidates[setting.name] = Candidate(setting, searched, row)
        self.progress.step()
        return self.candidates[setting.name]

    def _approach(self, max_drop: float, most: float, family: SettingFamily) -> None:
        """Tries settings of a family at ever closer speed-ups, up to `most`, to find where the drop
        exceeds what is allowed."""
        low, high = 1.0, most
        for _ in range(5):
            speed_up = (low + high) / 2
            setting = family.propose(speed_up)
            if setting is None:
                high = speed_up
                continue
            lost = self.drop(self.judge(setting, family.searched))
            low, high = (speed_up, high) if lost <= max_drop else (low, speed_up)

    def race(self, candidates: Sequence[Candidate], times: float = 1) -> None:
        """Measures the speeds of candidates in turns with each other: of the few that should be
        fastest, if there are many.

        Args:
            candidates: to measure.
            times: how many times as long as usual.
        """
        racing = sorted(candidates, key=lambda c: -self.proposals.predicted(c.setting))[:RACING]
        if not racing:
            return
        arms: dict[str, Any] = {"dense": None}
        for number, candidate in enumerate(racing):
            reduction = self.work.reduction(candidate.setting)
            arms[f"{number}"] = reduction
            arms[f"limit {number}"] = self.work.free_limit(reduction)
        self.progress.expect(1)
        self.progress.now(f"the last {len(racing)}, in turns")
        speeds = self.work.speeds(arms, times * self.work.seconds * len(arms))
        self.progress.step()
        for number, candidate in enumerate(racing):
            row = dataclasses.replace(
                candidate.row,
                speed=speeds[f"{number}"],
                dense=speeds["dense"],
                limit=speeds[f"limit {number}"],
            )
            self.candidates[candidate.setting.name] = dataclasses.replace(
                candidate, row=row, raced=True
            )
        self.progress.write(str(self.table()))

    def _payoff(self, candidate: Candidate, speed_up: float) -> Payoff:
        """From how many images on a candidate should have a speed-up that it did not have. So many
        are measured, too."""
        row, work = candidate.row, self.work
        batch = len(pixels(work.inputs))
        assert row.limit is not None
        dense, reduced, limit = (
            batch / speed.images_per_second for speed in (row.dense, row.speed, row.limit)
        )

        def timed(many: int) -> tuple[float, float]:
            arms = {"dense": None, "reduced": work.reduction(candidate.setting)}
            taken = work.pace(arms, enlarged(work.inputs, many), work.seconds, patience=1)
            return taken["dense"].seconds, taken["reduced"].seconds

        found = estimate(batch, work.tokens, dense, reduced, limit, speed_up)
        return checked(found, batch, dense, reduced, timed)

    def _free_limit_of_more(self) -> tuple[str, ...]:
        """What the free limit is with more images, where there are only a few of them at a time."""
        batch = len(pixels(self.work.inputs))
        if batch >= MORE:
            return ()
        more = free_speed_ups(self.work, self.methods[0].reducer, MORE)
        rate = min(more)
        return (
            f"With {MORE} images at a time, the free limit is {more[rate]:.2f}x at keep rate "
            f"{rate:g} (measured).",
        )

    # --- what is known ----------------------------------------------------------------------------

    def table(self) -> Evaluation:
        """The dense model, and all candidates whose speed was measured."""
        rows = [_named(candidate) for candidate in self._raced()]
        return self.work.table(self.name, [self.dense, *rows], self.refused)

    def drop(self, candidate: Candidate) -> float:
        """By how much a candidate is worse than the dense model in the leading metric."""
        return self.table().drop(candidate.row)

    def _raced(self) -> list[Candidate]:
        return [c for c in self.candidates.values() if c.raced]

    def _nothing(self, wanted: str, what: str, why: tuple[str, ...]) -> Advice:
        return Advice(wanted, None, (f"Nothing helps: {what}.", *why), self.table())

    def _advice(self, wanted: str, good: Sequence[Candidate]) -> Advice:
        """The advice, given the candidates that meet the budget, the best one first."""
        table, best = self.table(), good[0]
        told = words.advised(table, wanted, good)
        return Advice(wanted, _named(best), told, table, best.setting)


def _named(candidate: Candidate) -> Row:
    """The row of a candidate, which says whether its schedule was searched for."""
    row = candidate.row
    return dataclasses.replace(row, method=f"{row.method}, searched") if candidate.searched else row


def _slowest(tried: dict[str, tuple[Setting, list[float]]], speed_up: float) -> Setting:
    """The slowest setting that has the speed-up, or else the fastest."""
    gains = [(statistics.median(ratios), setting) for setting, ratios in tried.values()]
    fast = [pair for pair in gains if pair[0] >= speed_up]
    chosen = min(fast, key=lambda pair: pair[0]) if fast else max(gains, key=lambda pair: pair[0])
    return chosen[1]
