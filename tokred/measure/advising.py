"""`tokred.advise`: the method, the layers and the numbers of tokens for a budget.

1. The dense model answers the calibration images; every method is tried at one keep rate, on some
   of them, to see which disturb the model least.
2. What a block costs as a function of its tokens, and what a method adds to it, is measured on this
   machine (`tokred.profile`) and fitted by parabolas.
3. Of the methods that disturb least, it is measured how much a reduction at one layer alone
   disturbs the model, for several layers and shares: the mean divergence from the dense model's
   answers. A schedule is taken to disturb as much as its steps together: a step from n to k tokens
   at layer l as much as k tokens from there on more than n tokens from there on.
4. Dynamic programming over layers and numbers of tokens finds the schedules that should disturb
   least, for every time they may take. The one for the budget is compared with the uniform keep
   rate, and the better of them improved by small changes, each of them tried.
5. Those that should meet the budget, and uniform keep rates of the best methods that should, are
   measured: on all of the images, and their time in turns with the dense model's. What misses the
   budget is tried again, with fewer tokens. The best one is the advice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import torch

from tokred.data import samples as sampling
from tokred.data.samples import Transform
from tokred.host import Host, UnsupportedModelError, module_of
from tokred.measure.cost import put_back
from tokred.measure.evaluating import Setting, Shown, Work, settings_of
from tokred.measure.evaluation import Evaluation, Row
from tokred.measure.fidelity import Fidelity
from tokred.measure.profiling import profile
from tokred.patching import remove, uncompiled
from tokred.patching.presets import Preset
from tokred.reducers import Reducer
from tokred.reducers.truncate import Truncate
from tokred.schedule import Exactly

METHODS = (
    "tome", "atc", "atc:complete", "dpc_knn", "kmedoids", "pitome", "mutual",
    "evit", "topk", "slic",
)  # fmt: skip
"""The methods that are tried if none are named: all that need no training and keep as many tokens
of every image."""
FINALISTS, UNIFORM = 3, 4
"""How many methods schedules are searched for, and how many are tried at uniform keep rates."""
POLISHING = 16
"""How many changes of a schedule are tried."""
RACING = 8
"""How many candidates are measured in turns with each other."""
TRIES, CLOSE = 3, 0.03
"""How often predictions are corrected, and how much faster than asked a setting is to be."""
SHARES = (0.85, 0.65, 0.45, 0.3, 0.15)
"""Of the tokens, to which they are reduced at one layer to see what that does."""
SOUNDED = 6
"""Layers at which that is done."""
LEVELS = 40
"""Numbers of tokens that the search may choose from."""
MARGINS = (1.0, 1.03, 1.08)
"""How many times as fast as asked settings are to be, at first and if none of them was, measured
for longer, as fast as asked."""
RUINED = 1e6
"""How much a model is disturbed whose answers are no numbers any more."""
WORTH = 1.03
"""A speed-up below which nothing is gained: within the noise of the measurement."""


Stations: TypeAlias = tuple[tuple[int, int], ...]
"""Where a schedule falls: layers, and the tokens that are left behind them."""


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

    def _repr_html_(self) -> str:
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


def advise(
    model: Any,
    data: Any,
    *,
    speedup: float | None = None,
    max_drop: float | None = None,
    methods: Iterable[str | Reducer | Preset] | Mapping[str, Reducer | Preset] = METHODS,
    images: int = 256,
    batch: int | None = None,
    labelled: bool = True,
    task: str | None = None,
    transform: Transform | None = None,
    seconds: float = 2.0,
    workers: int = 0,
    host: Host | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Advice:
    """Finds method, layers and numbers of tokens for a budget, by trying them on some images.

    >>> advice = tokred.advise(model, "flowers/val", speedup=1.5)
    >>> print(advice)  # what it gains and costs, and the line of code
    >>> eval(advice.code)

    Args:
        model: as for `tokred.evaluate`; left as it was.
        data: as for `tokred.evaluate`: labelled if possible.
        speedup: how many times as fast as the dense model it has to be; what loses least is
            advised.
        max_drop: how many points of the leading metric it may lose (without labels, of agreement
            with the dense model); what is fastest is advised.
        methods: as for `tokred.evaluate`.
        images: how many are used, drawn evenly at random, always the same.
        batch, labelled, task, transform, workers, host, name, progress: as for `tokred.evaluate`.
        seconds: how long each candidate's speed is measured.

    Raises:
        ValueError: not one of `speedup` and `max_drop` is given, or one that cannot be; otherwise
            as `tokred.evaluate`.
        UnsupportedModelError: the model is not one we know, or it takes none of the methods.
    """
    if (speedup is None) == (max_drop is None):
        raise ValueError(f"give one of speedup and max_drop, not {speedup} and {max_drop}")
    if speedup is not None and speedup <= 1:
        raise ValueError(f"speedup must be above 1, the dense model's own, not {speedup}")
    if max_drop is not None and max_drop < 0:
        raise ValueError(f"max_drop must be at least 0 points, not {max_drop}")
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    wanted = settings_of(methods, (0.5,))
    model = uncompiled(module_of(model))
    with put_back(model, host):
        remove(model)
        samples = sampling.of(data, model, transform, None, labelled)
        samples = sampling.drawn(samples, min(images, len(samples)))
        work = Work(model, samples, host, task, batch, images, seconds, workers)
        if work.several.number > 1:
            raise ValueError("advise runs in one process: start it without accelerate launch")
        with Shown(0, progress) as shown:
            work.told = shown.far
            search = _Search(work, wanted, shown, name or type(model).__name__)
            return search.faster(speedup) if speedup is not None else search.closest(max_drop or 0)


class _Search:
    """What all steps of the search have in common."""

    def __init__(self, work: Work, methods: list[Setting], shown: Shown, name: str) -> None:
        self.work, self.shown, self.name = work, shown, name
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
        shown.expect(1)
        shown.now("dense")
        self.dense = work.row(None)
        shown.step()
        self.candidates: dict[str, Candidate] = {}

    # --- what it costs ----------------------------------------------------------------------------

    @cached_property
    def ceiling(self) -> dict[float, float]:
        """The speed-up of cutting tokens off at no cost behind a quarter, a half and three quarters
        of the layers, by keep rate."""
        arms: dict[str, Any] = {"dense": None}
        rates = (0.9, 0.6, 0.3, 0.1)
        cut = Setting("limit", Truncate(), 0.5)
        # Where blocks attend in windows, tokens are cut off as the method would have them.
        reducer = cut.reducer if self.work.why_not(cut) is None else self.methods[0].reducer
        for rate in rates:
            reduction = self.work.applied(Setting("limit", reducer, rate))
            remove(self.work.model)
            arms[str(rate)] = self.work.free_limit(reduction)
        taken = self.work.pace(arms, self.work.inputs, self.work.seconds)
        dense = taken.pop("dense")
        return {float(rate): dense.seconds / pace.seconds for rate, pace in taken.items()}

    @cached_property
    def costs(self) -> dict[str, Costs]:
        """What blocks and methods cost, by method; methods that cannot be profiled are left out."""
        work, tokens, layers = self.work, self.work.tokens, self.work.layout.layers
        # Falling in every block, so that one pass tells of as many numbers of tokens.
        falling = [max(1, round(tokens * 0.25 ** ((i + 1) / layers))) for i in range(layers)]
        for i, (before, after) in enumerate(itertools.pairwise([tokens, *falling])):
            falling[i] = max(after, before - before // 2)
        profiles = {}
        self.shown.expect(len(self.methods))
        for setting in self.methods:
            self.shown.now(f"what {setting.method} costs")
            if isinstance(setting.reducer, Preset) or hasattr(setting.reducer, "schedule"):
                self.shown.step()
                continue
            # Of what cannot be profiled, uniform keep rates are measured all the same.
            with contextlib.suppress(ValueError, UnsupportedModelError, RuntimeError):
                profiles[setting.method] = profile(
                    work.model, work.inputs, setting.reducer, schedule=Exactly(tuple(falling)),
                    host=work.host, rounds=3, warmup=1,
                )  # fmt: skip
            self.shown.step()
        points = [
            (times.before, times.limit) for one in profiles.values() for times in one.layers
        ] + [(tokens, times.dense) for one in profiles.values() for times in one.layers]
        if not points:
            return {}
        block = _parabola(points)
        found = {}
        for method, one in profiles.items():
            added = _parabola([(times.before, times.added) for times in one.layers])
            found[method] = Costs(block, added, one.dense.median, one.place == "between")
        return found

    def predicted(self, setting: Setting) -> float:
        """The speed-up that a setting should have."""
        costs = self.costs.get(setting.method)
        reduction = self.work.applied(setting)
        counts = self.work.counts(reduction)
        remove(self.work.model)
        if costs is None:
            # Not profiled: as much as its tokens say, to begin with.
            costs = next(iter(self.costs.values()), None)
            if costs is None:
                return self.work.tokens * len(counts) / sum(counts)
            return costs.dense / costs.time((self.work.tokens, *counts), False)
        return costs.dense / costs.time((self.work.tokens, *counts))

    # --- what it does to the answers --------------------------------------------------------------

    def harm(self, close: Fidelity) -> float:
        """How much a reduction disturbs the model: the divergence, or what else can be told."""
        harm = 1 - close.cosine
        if close.divergence is not None:
            harm = close.divergence
        elif close.depth_error is not None:
            harm = close.depth_error
        return min(harm, RUINED) if math.isfinite(harm) else RUINED

    def screened(self, uniform: Sequence[Setting], few: int) -> list[Setting]:
        """Settings by how little they disturb the model on a few batches, the least first."""
        self.shown.expect(len(uniform))
        harms = []
        for setting in uniform:
            self.shown.now(setting.name)
            harms.append(self.harm(self.work.difference(setting, few)))
            self.shown.step()
        return [setting for _, setting in sorted(zip(harms, uniform, strict=True), key=_first)]

    def sensitivity(self, method: Setting, few: int) -> Any:
        """How much it disturbs the model to go on with so many tokens from a layer on: [layers,
        levels], NaN where it was not tried, filled in between."""
        tokens, layers = self.work.tokens, self.work.layout.layers
        steps = min(SOUNDED, layers) - 1
        tried = sorted({round(i * (layers - 1) / max(1, steps)) for i in range(steps + 1)})
        levels = self.levels
        self.shown.expect(len(tried) * len(SHARES))
        table = np.zeros((len(tried), len(levels)))
        for row, layer in enumerate(tried):
            known = [(1.0, 0.0)]
            for share in SHARES:
                self.shown.now(f"{method.method}, {share:.0%} of the tokens from layer {layer} on")
                counts = self._straight(layer, max(1, round(tokens * share)))
                setting = Setting(method.method, method.reducer, Exactly(counts))
                known.append((share, self.harm(self.work.difference(setting, few))))
                self.shown.step()
            known.append((0.0, 2 * known[-1][1]))  # of none at all: guessed, and rarely asked for
            # What takes away more disturbs more; what says otherwise is noise.
            harms = np.maximum.accumulate([max(0.0, harm) for _, harm in known])
            # A divergence grows with the square of what disturbs.
            roots = np.sqrt(harms)[::-1]
            shares = [share for share, _ in reversed(known)]
            table[row] = np.interp([n / tokens for n in levels], shares, roots)
        every = np.arange(layers)
        roots = np.stack([np.interp(every, tried, column) for column in table.T], axis=1)
        return roots**2

    def _straight(self, layer: int, few: int) -> tuple[int, ...]:
        """All tokens before a layer, and few from it on, halved in several layers if need be."""
        counts, now = [], self.work.tokens
        for each in range(self.work.layout.layers):
            if each >= layer:
                now = max(few, now - now // 2)
            counts.append(now)
        return tuple(counts)

    @cached_property
    def levels(self) -> list[int]:
        """The numbers of tokens that the search chooses from, falling."""
        tokens = self.work.tokens
        least = max(1, tokens // 16)
        steps = [tokens * (least / tokens) ** (i / (LEVELS - 1)) for i in range(LEVELS)]
        return sorted({round(step) for step in steps}, reverse=True)

    def schedules(self, method: Setting, harms: Any) -> list[tuple[float, tuple[int, ...]]]:
        """The schedules that disturb least, with the speed-ups that they should have, the slowest
        first."""
        costs, levels = self.costs[method.method], self.levels
        found: dict[tuple[int, ...], float] = {}
        # If nothing disturbs the model, any price finds the fastest.
        there = harms[harms > 0] if (harms > 0).any() else np.ones(1)
        least, most = there.min() / costs.dense / 100, there.max() / costs.dense * 100
        for price in np.geomspace(least, most, 60):
            counts = cheapest(levels, harms, costs, float(price))
            found[counts] = costs.dense / costs.time((levels[0], *counts))
        return sorted((speed, counts) for counts, speed in found.items())

    # --- candidates -------------------------------------------------------------------------------

    def judge(self, setting: Setting, searched: bool) -> Candidate:
        """A candidate, tried on all of the images, once."""
        known = self.candidates.get(setting.name)
        if known is not None:
            return known
        self.shown.expect(1)
        self.shown.now(f"{setting.method} on all images")
        dense = self.dense.speed
        row = self.work.row(setting, {"dense": dense, "reduced": dense})
        self.candidates[setting.name] = Candidate(setting, searched, row)
        self.shown.step()
        return self.candidates[setting.name]

    def table(self) -> Evaluation:
        """The dense model, and all that was measured in full."""
        rows = [
            dataclasses.replace(c.row, method=f"{c.row.method}, searched") if c.searched else c.row
            for c in self.candidates.values()
            if c.raced
        ]
        return self.work.table(self.name, [self.dense, *rows], self.refused)

    def drop(self, candidate: Candidate) -> float:
        """By how much it is worse than the dense model in the leading metric."""
        return self.table().drop(candidate.row)

    def uniform(self, method: Setting, speed: float) -> Setting:
        """A method at the keep rate that should be so many times as fast."""
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
        except ValueError:  # fewer tokens than the method can make
            return math.inf

    def meeting(self, speed: float, families: Sequence[Family]) -> dict[int, Setting]:
        """Of each family the slowest setting that is measured to be so many times as fast, if it
        can be had in a few tries, else the fastest that was tried; all of them timed in turns.
        Predictions are corrected by what was measured."""
        tried: list[dict[str, tuple[Setting, list[float]]]] = [{} for _ in families]
        for _ in range(TRIES):
            now: dict[int, Setting] = {}
            for number, family in enumerate(families):
                wrong = statistics.median(family.wrong) if family.wrong else 1.0
                # Within reason: a busy machine says all sorts of things.
                asked = speed * (1 + CLOSE / 2) * min(1.4, max(0.7, wrong))
                setting = family.propose(asked)
                if setting is not None:
                    now[number] = setting
            arms: dict[str, Any] = {"dense": None}
            for number, setting in now.items():
                arms[str(number)] = self.work.applied(setting)
                remove(self.work.model)
            self.shown.expect(1)
            self.shown.now(f"{len(now)} settings, in turns")
            seconds = self.work.seconds * len(arms) / 2
            taken = self.work.pace(arms, self.work.inputs, seconds, patience=1)
            self.shown.step()
            for number, setting in now.items():
                ratio = taken["dense"].seconds / taken[str(number)].seconds
                families[number].wrong.append(self.predicted(setting) / ratio)
                tried[number].setdefault(setting.name, (setting, []))[1].append(ratio)
        found = {}
        for number, settings in enumerate(tried):
            gains = [(statistics.median(ratios), one) for one, ratios in settings.values()]
            fast = [pair for pair in gains if pair[0] >= speed]
            if gains:
                found[number] = (min(fast, key=_first) if fast else max(gains, key=_first))[1]
        return found

    def families(self, chosen: Sequence[Setting], speed: float, few: int) -> list[Family]:
        """The methods that disturb least: at uniform keep rates, and the first of them with
        schedules that are searched for at such a speed, and scaled to others."""
        found = [Family(False, partial(self.uniform, method)) for method in chosen[:UNIFORM]]
        for method in [m for m in chosen if m.method in self.costs][:FINALISTS]:
            seeds = self.seeds(method, speed, few)
            if seeds:  # else it should never be so fast
                best = self.polished(method, seeds, few)
                found.append(Family(True, partial(self._scaled, method, best)))
        return found

    def seeds(self, method: Setting, speed: float, few: int) -> list[Stations]:
        """Where to begin: the schedule that should disturb least, and the uniform keep rate."""
        levels, costs = self.levels, self.costs[method.method]
        schedules = self.schedules(method, self.sensitivity(method, few))
        searched = next((counts for gain, counts in schedules if gain >= speed), schedules[-1][1])
        reduction = self.work.applied(self.uniform(method, speed))
        remove(self.work.model)
        found = []
        for counts in (searched, self.work.counts(reduction)):
            before = (levels[0], *counts)
            stations = tuple(
                (layer, after)
                for layer, (now, after) in enumerate(itertools.pairwise(before))
                if after < now
            )
            if not stations:
                continue
            fitted = scaled(stations, costs, levels[0], len(counts), speed)
            if fitted is not None and fitted not in found:
                found.append(fitted)
        return found

    def polished(self, method: Setting, seeds: list[Stations], few: int) -> Stations:
        """The seed that disturbs least, improved as long as that is to be had in a few tries: a
        reduction one layer earlier or later, or a little more of it; the others make up for it, so
        that the time stays the same."""
        tokens, layers, costs = self.work.tokens, self.work.layout.layers, self.costs[method.method]

        def harm(stations: Stations) -> float:
            counts = unrolled(stations, tokens, layers)
            setting = Setting(method.method, method.reducer, Exactly(counts))
            return self.harm(self.work.difference(setting, few))

        self.shown.expect(len(seeds) + POLISHING)
        self.shown.now(f"{method.method}, at its best")
        known = {}
        for seed in seeds:
            known[seed] = harm(seed)
            self.shown.step()
        best = min(known, key=known.__getitem__)
        speed = costs.dense / costs.time((tokens, *unrolled(best, tokens, layers)))
        waiting = neighbours(best, tokens, layers)
        for _ in range(POLISHING):
            moved = None
            while waiting and (moved is None or moved in known):
                moved = scaled(waiting.pop(0), costs, tokens, layers, speed)
            if moved is not None and moved not in known:
                known[moved] = harm(moved)
                if known[moved] < known[best]:
                    best, waiting = moved, neighbours(moved, tokens, layers)
            self.shown.step()
        return best

    def _scaled(self, method: Setting, stations: Stations, speed: float) -> Setting | None:
        tokens, layers = self.work.tokens, self.work.layout.layers
        fitted = scaled(stations, self.costs[method.method], tokens, layers, speed)
        if fitted is None:
            return None
        counts = unrolled(fitted, tokens, layers)
        return Setting(method.method, method.reducer, Exactly(counts))

    def _ordered(self, speed: float, few: int) -> list[Setting]:
        """The methods, that which disturbs least at such a speed first."""
        # What could not be profiled has to be timed, or the comparison is not fair.
        unknown = [method for method in self.methods if method.method not in self.costs]
        timed: dict[int, Setting] = {}
        if unknown:
            timed = self.meeting(speed, [Family(False, partial(self.uniform, m)) for m in unknown])
        met = {setting.method: setting for setting in timed.values()}
        uniform = [met.get(m.method) or self.uniform(m, speed) for m in self.methods]
        order = self.screened(uniform, few)
        return [next(m for m in self.methods if m.method == s.method) for s in order]

    # --- the two questions ------------------------------------------------------------------------

    def faster(self, speedup: float) -> Advice:
        """What loses least among what is so many times as fast."""
        wanted = f"{speedup:g} times as fast"
        nothing = f"{wanted} is not to be had"
        if max(self.ceiling.values()) < speedup:
            return self._nothing(wanted, nothing, self._limits(speedup))
        few = max(1, len(self.work.compared) // 2)
        order = self._ordered(speedup * 1.02, few)
        families = self.families(order, speedup * 1.02, few)
        for margin in MARGINS:
            for number, setting in self.meeting(speedup * margin, families).items():
                self.judge(setting, families[number].searched)
            # All of them in turns with each other, and for longer; so one race decides.
            self.race(list(self.candidates.values()), 2)
            raced = [c for c in self.candidates.values() if c.raced]
            good = [c for c in raced if c.row.speed_up >= speedup]
            if good:
                break
        if not good:
            nearest = max(self.candidates.values(), key=lambda c: c.row.speed_up, default=None)
            told = self._limits(speedup)
            if nearest is not None:
                told += (f"The fastest that was measured is {self._told(nearest)}.",)
            return self._nothing(wanted, nothing, told)
        # Of those that lose as little, the fastest.
        good.sort(key=lambda c: (round(self.drop(c), 6), -c.row.speed_up))
        return self._advice(wanted, good)

    def closest(self, max_drop: float) -> Advice:
        """What is fastest among what loses at most so much."""
        wanted = f"at most {max_drop:g} points of {self.table().leading} lost"
        nothing = f"nothing that is measurably faster loses as little as {max_drop:g} points of "
        nothing += self.table().leading
        most = max(self.ceiling.values())
        if most < WORTH:
            return self._nothing(wanted, nothing, self._limits(WORTH))
        few = max(1, len(self.work.compared) // 2)
        middle = 1 + (most - 1) / 2
        for family in self.families(self._ordered(middle, few), middle, few):
            self._fastest(max_drop, most, family)
        self.race([c for c in self.candidates.values() if self.drop(c) <= max_drop])
        raced = [c for c in self.candidates.values() if c.raced]
        good = [c for c in raced if self.drop(c) <= max_drop and c.row.speed_up >= WORTH]
        if not good:
            told = self._limits()
            if self.candidates:
                self.race([min(self.candidates.values(), key=self.drop)])
                least = min((c for c in self.candidates.values() if c.raced), key=self.drop)
                told += (f"The least is lost by {self._told(least)}.",)
            return self._nothing(wanted, nothing, told)
        good.sort(key=lambda c: (-c.row.speed_up, self.drop(c)))
        return self._advice(wanted, good)

    def _fastest(self, max_drop: float, most: float, family: Family) -> None:
        """Tries settings of a family at ever nearer speeds, to find where the drop passes what is
        allowed."""
        low, high = 1.0, most
        for _ in range(5):
            speed = (low + high) / 2
            setting = family.propose(speed)
            if setting is None:
                high = speed
                continue
            lost = self.drop(self.judge(setting, family.searched))
            low, high = (speed, high) if lost <= max_drop else (low, speed)

    def race(self, candidates: Sequence[Candidate], times: float = 1) -> None:
        """Measures the speeds of candidates (of many, those that should be fastest), all in turns
        with each other, so many times as long as usual."""
        racing = sorted(candidates, key=lambda c: -self.predicted(c.setting))[:RACING]
        if not racing:
            return
        arms: dict[str, Any] = {"dense": None}
        for number, candidate in enumerate(racing):
            reduction = self.work.applied(candidate.setting)
            remove(self.work.model)
            arms[f"{number}"] = reduction
            arms[f"limit {number}"] = self.work.free_limit(reduction)
        self.shown.expect(1)
        self.shown.now(f"the last {len(racing)}, in turns")
        speeds = self.work.race(arms, times * self.work.seconds * len(arms))
        self.shown.step()
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
        if self.shown.bar is not None:
            self.shown.bar.write(str(self.table()))

    # --- words ------------------------------------------------------------------------------------

    def _limits(self, speedup: float | None = None) -> tuple[str, ...]:
        """What cutting tokens off at no cost would gain, and why that is not as much as asked."""
        work, most = self.work, max(self.ceiling.values())
        where = f"batch {len(work.inputs) if isinstance(work.inputs, torch.Tensor) else work.batch}"
        where += f" on {work.device.type}"
        told = [
            "Tokens cut off at no cost, which no method can beat, are worth here ("
            + where
            + "): "
            + ", ".join(f"{gain:.2f}x at keep rate {r:g}" for r, gain in self.ceiling.items())
            + "."
        ]
        if speedup is None:
            return tuple(told)
        floor = [rate for rate, gain in self.ceiling.items() if gain >= speedup]
        if floor:
            told.append(f"So {speedup:g}x cannot be had above a keep rate of {max(floor):g}.")
        elif most < 1.1:
            told.append(
                "The time goes into starting operators rather than into tokens: try a larger batch "
                "or image, or torch.compile."
            )
        else:
            told.append(f"{speedup:g}x is out of reach, whatever the method.")
        return tuple(told)

    def _told(self, candidate: Candidate) -> str:
        return (
            f"{candidate.setting.name}, {self.drop(candidate):.2f} points of "
            f"{self.table().leading} lost at {candidate.row.speed_up:.2f}x"
        )

    def _nothing(self, wanted: str, what: str, why: tuple[str, ...]) -> Advice:
        return Advice(wanted, None, (f"Nothing helps: {what}.", *why), self.table())

    def _advice(self, wanted: str, good: Sequence[Candidate]) -> Advice:
        """The first of what does it, the best first, and what is to be said about it."""
        best, *others = good
        table, row = self.table(), best.row
        score, dense = table.score(row), table.score(table.dense)
        unit = table.unit
        # How many answers have changed bounds how far the drop may be from that on other images.
        told = [
            f"{wanted[0].upper()}{wanted[1:]}: {best.setting.method}, "
            f"{'a schedule found for this model' if best.searched else 'one keep rate'}.",
            f"Measured on {row.images} images: {table.leading} {score:.2f}{unit} (dense "
            f"{dense:.2f}{unit}, {score - dense:+.2f}); {row.speed_up:.2f}x as fast "
            f"(±{100 * row.speed.error:.0f} %) at batch {table.batch} ({row.latency_speed_up:.2f}x "
            f"for one image alone), free limit {row.free_limit:.2f}x.",
        ]
        if row.agreement is not None and table.unit == "%":
            # Two standard errors of the share of answers that change; if none did, the rule of 3.
            changed, many = 1 - row.agreement / 100, max(1, row.compared)
            error = 100 * max(2 * math.sqrt(changed / many), 3 / many)
            told.append(
                f"{row.agreement:.1f} % of the answers are the dense model's; on other images of "
                f"this kind, the change should be within {error:.1f} points of that."
            )
        rival = next((c for c in others if not c.searched), None)
        if best.searched and rival is not None:
            told.append(
                f"The best uniform keep rate that does it: {rival.setting.name}, "
                f"{table.score(rival.row):.2f}{unit} at {rival.row.speed_up:.2f}x."
            )
        patched = dataclasses.replace(
            row, method=f"{row.method}, searched" if best.searched else row.method
        )
        return Advice(wanted, patched, tuple(told), table, best.setting)


@dataclass(frozen=True)
class Costs:
    """What a method costs, by what was measured.

    Attributes:
        block: seconds of a block as a parabola of its tokens.
        added: seconds that the method adds to a block, of the tokens that enter it.
        dense: seconds of the dense model.
        between: whether attention still sees the tokens that enter.
    """

    block: tuple[float, float, float]
    added: tuple[float, float, float]
    dense: float
    between: bool

    def step(self, before: Any, after: Any, added: bool = True) -> Any:
        """Seconds of one block that is entered by so many tokens and left by so many; arrays or
        numbers."""
        block = _at(self.block, after)
        if self.between:
            block = (block + _at(self.block, before)) / 2
        return block + np.where(after < before, _at(self.added, before), 0.0) * added

    def time(self, counts: Sequence[int], added: bool = True) -> float:
        """Seconds of the model, with these tokens before the first layer and after each."""
        steps = [float(self.step(a, b, added)) for a, b in itertools.pairwise(counts)]
        full = float(_at(self.block, counts[0])) * len(steps)
        return max(1e-9, self.dense - full + sum(steps))


def cheapest(levels: Sequence[int], harms: Any, costs: Costs, price: float) -> tuple[int, ...]:
    """The numbers of tokens after each layer for which harm + price * time is least.

    Args:
        levels: numbers of tokens to choose from, falling, all of them first.
        harms: what it does to go on with so many from a layer on: [layers, levels].
        costs: what time it takes.
        price: of a second.
    """
    layers, many = harms.shape
    n = np.array(levels)
    before, after = n[:, None], n[None, :]
    time = costs.step(before, after)  # [from, to]
    # None grows, and none loses more than half at once, which is all that pairs can.
    allowed = (after <= before) & (after >= before - before // 2)
    best = np.full(many, np.inf)
    best[0] = 0.0
    came = np.zeros((layers, many), dtype=int)
    for layer in range(layers):
        harm = np.maximum(0, harms[layer][None, :] - harms[layer][:, None])
        total = np.where(allowed, best[:, None] + harm + price * time, np.inf)
        came[layer] = total.argmin(0)
        best = total.min(0)
    at = int(best.argmin())
    counts = []
    for layer in reversed(range(layers)):
        counts.append(int(n[at]))
        at = int(came[layer, at])
    return tuple(reversed(counts))


def _parabola(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The parabola through (tokens, seconds) that lies nearest, none of its parts below zero: a
    start, so much for each token, and so much for each pair."""
    from scipy.optimize import nnls  # whoever asks for no advice need not wait for it

    tokens = np.array([p[0] for p in points], dtype=float)
    seconds = np.array([p[1] for p in points], dtype=float)
    scale = tokens.max()
    columns = np.stack([np.ones_like(tokens), tokens / scale, (tokens / scale) ** 2], 1)
    # In proportion: a small block counts as much as a large one.
    weight = 1 / np.maximum(seconds, seconds.max() * 1e-3)
    a, b, c = nnls(columns * weight[:, None], seconds * weight)[0]
    return float(a), float(b / scale), float(c / scale**2)


def _at(parabola: tuple[float, float, float], tokens: Any) -> Any:
    start, each, pair = parabola
    return start + each * tokens + pair * np.square(tokens, dtype=float)


def unrolled(stations: Stations, tokens: int, layers: int) -> tuple[int, ...]:
    """The numbers of tokens after each layer."""
    counts, now, left = [], tokens, dict(stations)
    for layer in range(layers):
        now = left.get(layer, now)
        counts.append(now)
    return tuple(counts)


def scaled(
    stations: Stations, costs: Costs, tokens: int, layers: int, speed: float
) -> Stations | None:
    """The same reductions, all more or less of them by the same factor, so that the model should be
    so many times as fast; None if there is no such factor."""

    def at(factor: float) -> Stations:
        kept, before = [], tokens
        for layer, count in stations:
            after = max(1, min(before, round(factor * count)))
            if after < before:
                kept.append((layer, after))
            before = after
        return tuple(kept)

    def gain(factor: float) -> float:
        return costs.dense / costs.time((tokens, *unrolled(at(factor), tokens, layers)))

    low, high = 1e-3, tokens / min(count for _, count in stations)
    if gain(low) < speed:
        return None
    for _ in range(24):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gain(middle) >= speed else (low, middle)
    return at(low)


def neighbours(stations: Stations, tokens: int, layers: int) -> list[Stations]:
    """The same reductions with one of them a layer earlier or later, or a little stronger or
    weaker."""
    found = []
    for i, (layer, count) in enumerate(stations):
        taken = {other for other, _ in stations}
        for step in (-1, 1):
            if 0 <= layer + step < layers and layer + step not in taken:
                found.append((*stations[:i], (layer + step, count), *stations[i + 1 :]))
        before = stations[i - 1][1] if i else tokens
        after = stations[i + 1][1] if i + 1 < len(stations) else 0
        for factor in (0.88, 1.12):
            changed = round(count * factor)
            if after < changed < before:
                found.append((*stations[:i], (layer, changed), *stations[i + 1 :]))
    return found


def _first(pair: tuple[float, Setting]) -> float:
    return pair[0]
