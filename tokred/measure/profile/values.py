"""The values of a profile: the times of every block, and what follows from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokred.measure.race import Arm
from tokred.measure.results import Result, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PARTS = ("matching", "merging", "back", "bias")
"""What a reduction adds to a block."""
_TITLES = ("block", "matching", "merging", "way back", "bias", "dense", "limit")
SHOWN = 5
"""So many losses are told at once; deep models may have many."""
_LETTERS = {"rest": "#", "matching": "m", "merging": "+", "back": "<", "bias": "b"}


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one block for the whole batch: medians over the rounds.

    Attributes:
        layer: the number of the block, from 0.
        before: patch tokens that enter the block.
        after: patch tokens that leave it. If the method stands around blocks: the mean number that
            goes through the block, behind which all tokens are there again.
        rest: attention, MLP and everything else that the block does without a method, too.
        matching: the method's decision, including its signals (keys, attention) and, where blocks
            attend in windows, cutting the feature map into them.
        merging: making few tokens out of many, and adding up their sizes.
        back: making many tokens out of few: where the schedule rises, and where the model hands out
            features on the full grid.
        bias: making what attention is given for the remaining tokens: masks, and the logarithm of
            sizes if attention is proportional. (If attention is slower because of it, that shows in
            `rest`.)
        dense: the same block in the dense model.
        limit: the same block in the free limit, with tokens cut off to the same numbers.
    """

    layer: int
    before: int
    after: int
    rest: float
    matching: float
    merging: float
    back: float
    bias: float
    dense: float
    limit: float

    @property
    def added(self) -> float:
        """What the reduction adds to the block: matching, merging, way back and bias."""
        return self.matching + self.merging + self.back + self.bias

    @property
    def block(self) -> float:
        """The whole block."""
        return self.rest + self.added


@dataclass(frozen=True)
class Profile(Result):
    """Where the time of a pass goes, layer by layer.

    Attributes:
        model: class of the model.
        method: the method and its options.
        place: where the method stands: "between" attention and MLP, "before" the block or "around"
            it.
        proportional_attention: whether sizes are added to attention.
        tokens: patch tokens that enter the first layer.
        layers: the times of each block.
        behind: seconds that making the full grid takes behind the last block, for pooling.
        batch, image_size, device, dtype, threads, versions: what it was measured on.
        dense, reduced, limit: the whole model without the clock, in the same rounds.
        profiled: the reduced model with the clock.
        why_seamed: why the limit runs in patched blocks, see `Bench`; empty if it does not.
    """

    model: str
    method: str
    place: str
    proportional_attention: bool
    tokens: int
    layers: tuple[LayerTimes, ...]
    behind: float
    batch: int
    image_size: tuple[int, int]
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    dense: Arm
    reduced: Arm
    limit: Arm
    profiled: Arm
    why_seamed: str = ""

    @property
    def counts(self) -> tuple[int, ...]:
        """Patch tokens after each layer."""
        return tuple(times.after for times in self.layers)

    @property
    def speed_up(self) -> float:
        """The speed-up of the whole model over the dense one."""
        return self.dense.median / self.reduced.median

    @property
    def free_limit(self) -> float:
        """The speed-up of cutting tokens off at no cost."""
        return self.dense.median / self.limit.median

    @property
    def overhead(self) -> float:
        """How much longer the reduced model takes with the clock, as a share."""
        return self.profiled.median / self.reduced.median - 1

    def total(self, part: str) -> float:
        """Seconds of one part in all layers: "rest", "matching", "merging", "back", "bias",
        "added", "block", "dense" or "limit"."""
        return float(sum(getattr(times, part) for times in self.layers))

    def saved(self, part: str = "block") -> dict[int, float]:
        """The seconds that each reduction saves in all layers from its own on, by its layer.

        A layer saves the time of the same layer in the dense model minus its own. This is divided
        among the reductions that hold there (those that no rise has undone), in proportion to the
        number of tokens that each has taken away. In its own layer, a reduction that stands between
        attention and MLP counts half. Bias and way back are subtracted, matching and merging are
        not.

        Args:
            part: "block" for what was saved, "limit" for what the free limit saves.
        """
        saved = {times.layer: 0.0 for times in self.layers if times.after < times.before}
        force: dict[int, float] = {}
        tokens = self.tokens
        for times in self.layers:
            undone: dict[int, float] = {}
            while force and tokens < times.before and self.place != "around":
                layer, gone = force.popitem()
                undone[layer] = gone
                tokens += round(gone)
            own = times.before - times.after
            here = dict(force)
            if own > 0:
                here[times.layer] = own / 2 if self.place == "between" else own
            if part == "limit":
                _divide(times.dense - times.limit, here, saved)
            else:
                _divide(times.dense - times.rest - times.bias, here, saved)
                _divide(-times.back, undone or here, saved)
            if own > 0 and self.place != "around":
                force[times.layer] = own
            tokens = times.after
        return saved

    def losses(self) -> list[str]:
        """A sentence for each reduction that costs more than it saves."""
        saved, free = self.saved(), self.saved("limit")
        told = []
        for times in self.layers:
            cost = times.matching + times.merging
            if times.layer not in saved or cost <= saved[times.layer]:
                continue
            gain = saved[times.layer]
            behind = "it" if self.place == "around" else "all layers from it on"
            what = (
                f"{behind} save{'s' * (behind == 'it')} {_ms(gain)} by it"
                if gain > 0
                else f"{behind} save{'s' * (behind == 'it')} nothing by it"
            )
            if free[times.layer] <= 0:
                cure = (
                    "tokens cut off at no cost would save nothing either: no reduction pays here, "
                    "unless with a larger batch or image"
                )
            elif cost > free[times.layer]:
                cure = (
                    f"tokens cut off at no cost would save {_ms(free[times.layer])}: take away "
                    "more tokens here or none, or use a cheaper method"
                )
            else:
                cure = (
                    f"tokens cut off at no cost would save {_ms(free[times.layer])}, the rest is "
                    "lost to what attention is given and to the way back: take away more tokens "
                    "here, or none"
                )
            told.append(
                f"layer {times.layer}, {times.before} -> {times.after} tokens: matching and "
                f"merging cost {_ms(cost)} and {what}; {cure}"
            )
        return told

    def warnings(self) -> list[str]:
        """Warnings for readers of the times, in sentences."""
        told = []
        if self.speed_up < 1:
            if self.free_limit < 1.05:
                why = "even tokens cut off at no cost would gain next to nothing here"
            else:
                why = f"what the method adds takes {_ms(self.total('added') + self.behind)}"
            told.append(f"SLOWER than the dense model: {why}.")
        spread = max(self.dense.spread, self.reduced.spread)
        if spread > 0.15:
            told.append(
                f"Rounds differ by +-{spread:.0%}: something else runs on this machine. Do not "
                "trust the times of single layers; more rounds help."
            )
            return told
        reduced = [times for times in self.layers if times.bias > 0]
        rest, free = (sum(getattr(t, name) for t in reduced) for name in ("rest", "limit"))
        if self.proportional_attention and rest > 1.1 * free > 0:
            told.append(
                f"Behind the first reduction, blocks without what the method adds take "
                f"{rest / free:.2f} times as long as with tokens cut off: attention may be slower "
                "with the bias of sizes. proportional_attention=False does without, at some cost "
                "in accuracy."
            )
        if self.overhead > 0.2:
            told.append(
                f"Profiling has slowed the model down by {self.overhead:.0%}: blocks are short, "
                "and reading the clock counts. Look at shares rather than at times."
            )
        return told

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        layers = [
            {**dataclasses.asdict(times), "block": times.block, "added": times.added}
            for times in self.layers
        ]
        ratios = {name: getattr(self, name) for name in ("speed_up", "free_limit", "overhead")}
        told = {"losses": self.losses(), "warnings": self.warnings()}
        return {**ratios, **dataclasses.asdict(self), "layers": layers, **told}

    def __str__(self) -> str:
        losses = self.losses()
        if len(losses) > SHOWN + 1:
            more = f"{len(losses) - SHOWN} more layers cost more than they save, see losses()"
            losses = [*losses[:SHOWN], more]
        lines = [
            f"{self.speed_up:.2f}x as fast as dense; free limit {self.free_limit:.2f}x; "
            f"blocks take {_ms(self.total('block'))} per batch (dense {_ms(self.total('dense'))}), "
            f"the whole model {_ms(self.reduced.median)} (dense {_ms(self.dense.median)})",
            *self.warnings(),
            *losses,
            f"{self.model}, {self.method}",
            f"layer  {'tokens':>10s}{''.join(f'{title:>10s}' for title in _TITLES)}  ms",
        ]
        for times in self.layers:
            tokens = f"{times.before}"
            if times.after != times.before:
                tokens += f" -> {times.after}"
            times_told = "".join(
                f"{1e3 * getattr(times, name):10.3f}"
                for name in ("block", *PARTS, "dense", "limit")
            )
            lines.append(f"{times.layer:5d}{tokens:>12s}{times_told}  {self._bar(times)}".rstrip())
        totals = "".join(
            f"{1e3 * self.total(name):10.3f}" for name in ("block", *PARTS, "dense", "limit")
        )
        lines.append(f"  all{'':12s}{totals}")
        if self.behind > 0:
            lines.append(f"  behind the last block, the full grid for pooling: {_ms(self.behind)}")
        lines.append("  # block  m matching  + merging  < way back  b bias  | dense")
        lines.append(f"  {self.conditions}")
        return "\n".join(lines)

    @property
    def conditions(self) -> str:
        """What the profile was measured on, and how much slower the clock makes the model."""
        cost = f"{self.overhead:.1%}" if self.overhead > 0 else "nothing that could be measured"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"batch {self.batch} of {self.image_size[0]}x{self.image_size[1]}, {self.dtype}, "
            f"{len(self.reduced.seconds)} rounds, {self.device}, {self.threads} threads, {versions}"
            f"; profiling itself adds {cost}"
        )

    def _bar(self, times: LayerTimes, width: int = 30) -> str:
        longest = max(max(each.block, each.dense) for each in self.layers)
        bar, end = "", 0.0
        for name, letter in _LETTERS.items():
            end += getattr(times, name)
            bar += letter * (round(width * end / longest) - len(bar))
        dense = round(width * times.dense / longest)
        return f"{bar[:dense]:{dense}s}|{bar[dense:]}"

    def plot(self) -> Figure:
        """A bar for each layer that shows what it spends its time on, beside a bar of the dense
        model.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
        """
        figure: Figure = drawn(self, "plot")
        return figure


def _divide(amount: float, among: dict[int, float], into: dict[int, float]) -> None:
    """Divides an amount in proportion to weights, and adds each share to the value of its key."""
    for key, weight in among.items():
        into[key] += amount * weight / sum(among.values())


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
