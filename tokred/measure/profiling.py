"""`tokred.profile`: where the time of a pass goes, layer by layer, beside the dense model.

    profile = tokred.profile(model, images, "tome", keep_rate=0.5)
    print(profile)  # a table of layers, and where merging costs more than it saves
    profile.plot()

The clock is read at the borders of every block, and inside of the reduced ones around what the
method adds. For that a stand-in of the reduction hangs on the model: the same numbers, by the same
code, with a clock around its methods. Nothing of it is there in a pass that is not profiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokred.data.inputs import Inputs, device_of, pixels
from tokred.engine.reduction import Reduction
from tokred.engine.state import State
from tokred.engine.step import Step
from tokred.engine.windows import InWindows
from tokred.host import Denoiser, Host, UnsupportedModelError, find_host, module_of
from tokred.maps import TokenMap
from tokred.measure.cost import (
    Arm,
    check_method,
    counts_of,
    device_name,
    free_limit_of,
    measure,
    put_back,
    through,
    versions_of,
)
from tokred.optional import require
from tokred.patching import apply, hang, host_of, reduction_of, remove, uncompiled
from tokred.patching.presets import Preset
from tokred.reducers import Reconstruction, Reducer, Tokens, place
from tokred.schedule import Schedule
from tokred.show import markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("matching", "merging", "back", "bias")
"""What a reduction adds to a block."""
_TITLES = ("block", "matching", "merging", "way back", "bias", "dense", "limit")
_SHOWN = 5  # losses that are told at once; deep models may have many
_LETTERS = {"rest": "#", "matching": "m", "merging": "+", "back": "<", "bias": "b"}


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one block for the whole batch, medians over the rounds.

    Attributes:
        layer: the block, from 0.
        before: patch tokens that enter it, and
        after: that leave it. Of a method that stands around blocks: those that go through it, on
            average; behind it there are all of them again.
        rest: attention, MLP and all else that the block does anyway.
        matching: the method's decision, and reading what it decides by.
        merging: making few tokens of many, and adding up what they stand for.
        back: making many tokens of few again: where the schedule rises, and where features are
            handed out on the full grid.
        bias: what attention is given for the tokens that are left: masks, and the logarithm of
            sizes where attention is proportional. (That attention may be slower with it shows in
            `rest`.)
        dense: the same block of the dense model.
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
        """What the reduction adds to the block: matching, merging, the way back and the bias."""
        return self.matching + self.merging + self.back + self.bias

    @property
    def block(self) -> float:
        """The whole block."""
        return self.rest + self.added


@dataclass(frozen=True)
class Profile:
    """Where the time of a pass goes, layer by layer.

    Attributes:
        model: class of the model.
        method: the method and its options.
        place: where it stands: "between" attention and MLP, "before" the block or "around" it.
        proportional_attention: whether sizes are added to attention.
        tokens: patch tokens that enter the first layer.
        layers: the times of each.
        behind: seconds of making the full grid again behind the last block, for pooling.
        batch, image_size, device, dtype, threads, versions: what it was measured on.
        dense, reduced, limit: the whole model, not profiled, in the same rounds.
        profiled: the reduced model while it was profiled.
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

    @property
    def counts(self) -> tuple[int, ...]:
        """Patch tokens after each layer."""
        return tuple(times.after for times in self.layers)

    @property
    def speed_up(self) -> float:
        """Of the whole model over the dense one."""
        return self.dense.median / self.reduced.median

    @property
    def free_limit(self) -> float:
        """The speed-up of cutting tokens off at no cost."""
        return self.dense.median / self.limit.median

    @property
    def overhead(self) -> float:
        """By which part profiling itself has slowed the reduced model down."""
        return self.profiled.median / self.reduced.median - 1

    def total(self, part: str) -> float:
        """Seconds of one part in all layers: "rest", "matching", "merging", "back", "bias",
        "added", "block", "dense" or "limit"."""
        return float(sum(getattr(times, part) for times in self.layers))

    def saved(self, part: str = "block") -> dict[int, float]:
        """What each reduction saves, over all layers from its own on; by its layer.

        What a layer saves over the dense model's is divided among the reductions that are in force
        there (not undone by a rise), by how many tokens each has taken away; in its own layer one
        that stands between attention and MLP counts half. Its own matching and merging are not
        taken off; biases and ways back are.

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
        """The reductions that cost more than they save, in sentences."""
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
        """What whoever wanted more speed should be told of the whole, in sentences."""
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
                "trust what is said of single layers; more rounds help."
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
        if len(losses) > _SHOWN + 1:
            more = f"{len(losses) - _SHOWN} more layers cost more than they save, see losses()"
            losses = [*losses[:_SHOWN], more]
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
        """What it was measured on, and what measuring has cost, in words."""
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
        """A bar for each layer, of what it spends its time on, and one beside it of the dense
        model.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
        """
        figures = require("matplotlib.figure", "plots")
        figure: Figure = figures.Figure(figsize=(9, 4), layout="constrained")
        axes = figure.add_subplot()
        at = [times.layer for times in self.layers]
        left, right = ([n + shift for n in at] for shift in (-0.21, 0.21))
        axes.bar(left, [1e3 * t.dense for t in self.layers], 0.38, color="#b5b5b5", label="dense")
        base = [0.0] * len(at)
        for (name, label), colour in zip(markup.PARTS.items(), markup.PART_COLOURS, strict=True):
            heights = [1e3 * getattr(times, name) for times in self.layers]
            if any(heights):
                axes.bar(right, heights, 0.38, bottom=base, color=colour, label=label)
            base = [low + high for low, high in zip(base, heights, strict=True)]
        limits = [1e3 * times.limit for times in self.layers]
        axes.plot(right, limits, "_k", markersize=11, label="free limit")
        axes.set_xticks(at)
        axes.set_xlabel("layer")
        axes.set_ylabel("ms per batch")
        axes.set_title(f"{self.method}: {self.speed_up:.2f}x as fast as dense", fontsize=10)
        axes.legend(fontsize=8)
        return figure

    def _repr_html_(self) -> str:
        return fragment(self)


def fragment(profile: Profile, style: bool = True) -> str:
    """A profile as HTML, to stand in a notebook or in a page: the bars, the table and the
    sentences.

    Args:
        profile: what `tokred.profile` has returned.
        style: whether to bring the style along; a page has it once.
    """
    head = ["layer", "tokens", "block", *list(markup.PARTS.values())[1:], "dense", "free limit"]
    names = ("block", *PARTS, "dense", "limit")

    def cells(seconds: Iterable[float]) -> list[str]:
        return [f"{1e3 * each:.2f}" if each else "" for each in seconds]

    rows = []
    for times in profile.layers:
        changed = times.after != times.before
        tokens = f"{times.before} → {times.after}" if changed else f"{times.before}"
        rows.append([str(times.layer), tokens, *cells(getattr(times, name) for name in names)])
    rows.append(["all", "", *cells(map(profile.total, names))])
    warnings, losses = profile.warnings(), profile.losses()
    summary = (
        f"{profile.model}, {profile.method}: {profile.speed_up:.2f}x as fast as dense (free limit "
        f"{profile.free_limit:.2f}x)"
    )
    bars = [
        (str(t.layer), t.dense, [getattr(t, name) for name in markup.PARTS], t.limit)
        for t in profile.layers
    ]
    return "".join(
        [
            '<div class="tokred">',
            markup.STYLE if style else "",
            markup.paragraph(summary),
            markup.bars(bars),
            markup.table(head, rows, caption="Milliseconds per batch"),
            markup.listed([*warnings, *losses], len(warnings) + _SHOWN),
            markup.paragraph(profile.conditions, "small"),
            "</div>",
        ]
    )


def profile(
    model: nn.Module,
    images: Inputs,
    method: str | Reducer | Preset | None = None,
    keep_rate: float | Schedule | None = None,
    *,
    schedule: Schedule | None = None,
    host: Host | None = None,
    rounds: int = 10,
    warmup: int = 2,
    on_round: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measures what each block of the reduced model spends its time on, beside the dense model and
    the free limit.

    Every round runs the batch through all three, once with the clock read at the borders of blocks
    and parts, and once without, in shuffled order. On CUDA the borders are events on the current
    stream, and nothing waits for them: time in which the device waits for Python counts for the
    part in which it passes. Reading the clock takes time itself, and so does every border on a
    device: `Profile.overhead` says how much, against the model that is not profiled. The model is
    left as it was.

    Args:
        model: a supported model in evaluation mode, with or without a reduction; not a denoiser.
            Of a model that `torch.compile` has wrapped, what is inside is profiled, not compiled.
        images: one batch, on the model's device and in its dtype.
        method: what to profile; the reduction that is applied, if not given.
        keep_rate: as for `tokred.apply`; with `method` only.
        schedule: as for `tokred.apply`; with `method` only.
        host: as for `tokred.apply`.
        rounds: measured runs of each.
        warmup: runs of each before, which are not measured.
        on_round: called after every round with (rounds done, rounds in all), for progress bars.

    Raises:
        ValueError: there is nothing to profile: no method given and none applied, or no images;
            a keep rate or a schedule is given without a method; or the model is in training mode.
        TypeError: the images are neither a tensor nor a mapping.
        UnsupportedModelError: the model is a denoiser, or not known at all.
        RuntimeError: parts of the model were compiled in place, or some block is not called as a
            module.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup 0, not {rounds} and {warmup}")
    check_method(method, keep_rate, schedule)
    if not isinstance(images, Tensor | Mapping):
        raise TypeError(
            "images must be one batch, a tensor or a mapping with one, not a "
            f"{type(images).__name__}"
        )
    if len(pixels(images)) == 0:
        raise ValueError("images must hold one image at least, not 0")
    model = uncompiled(module_of(model))
    patch = host_of(model, host)
    if isinstance(patch, Denoiser):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a denoiser, around whose modules tokens are merged one by "
            "one: there are no layers to profile; tokred.bench measures it as a whole"
        )
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise RuntimeError(
                f"{name or type(model).__name__} was compiled in place, and the clock cannot be "
                "read inside of compiled code: profile the model as it was before that"
            )
    clock = clock_for(device_of(images))
    handles: list[Any] = []
    with put_back(model, host):
        if method is not None:
            apply(model, method, keep_rate, schedule=schedule, host=host)
        reduction = reduction_of(model)
        if reduction is None:
            raise ValueError("method must be given: no reduction is applied to the model")
        height, width = pixels(images).shape[-2:]
        found, tower = find_host(model, host)
        blocks = found.blocks(tower)
        grid = found.layout(tower, (height, width)).grid
        counts = counts_of(model, found, images, reduction, grid)
        around = place(reduction.reducer) == "around"
        if around:
            after = through(model, found, images, reduction, grid[0] * grid[1])
        else:
            after = list(counts)
        limit = free_limit_of(model, found, images, reduction, counts)

        def become(hung: Reduction | None, profiled: str | None) -> None:
            for handle in handles:
                handle.remove()
            handles.clear()
            if hung is None:
                remove(model)
            else:
                hang(model, found, hung)
            if profiled is not None:
                clock.begin(profiled)
                for layer, block in enumerate(blocks):
                    handles.extend(_hooks(block, layer, clock))

        arms = {"dense": None, "reduced": reduction, "limit": limit}
        clocked = {"dense": None, "reduced": timed(reduction, clock), "limit": limit}
        sides: dict[str, tuple[nn.Module, Callable[[], None]]] = {}
        for name in arms:
            sides[name] = (model, lambda hung=arms[name]: become(hung, None))  # type: ignore[misc]
            sides[f"profiled {name}"] = (
                model,
                lambda hung=clocked[name], name=name: become(hung, name),  # type: ignore[misc]
            )
        try:
            measured = measure(sides, images, rounds, warmup, on_round)
        finally:
            for handle in handles:
                handle.remove()
    spent = {name: Spent(clock.spent(name)[warmup:]) for name in arms}
    for layer in range(len(blocks)):
        if any((layer, "rest") not in one for one in spent["reduced"].passes):
            raise RuntimeError(
                f"block {layer} was not seen to run: it is called otherwise than as a module, past "
                "its hooks; tokred.bench measures the model as a whole"
            )
    return Profile(
        model=type(model).__name__,
        method=str(reduction.reducer),
        place=place(reduction.reducer),
        proportional_attention=reduction.proportional_attention,
        tokens=grid[0] * grid[1],
        layers=_layers(spent, grid[0] * grid[1], after, around),
        behind=spent["reduced"].median(None, "back"),
        batch=len(pixels(images)),
        image_size=(height, width),
        device=device_name(pixels(images).device),
        dtype=str(pixels(images).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions=versions_of(model),
        dense=measured["dense"],
        reduced=measured["reduced"],
        limit=measured["limit"],
        profiled=measured["profiled reduced"],
    )


def _layers(
    spent: dict[str, Spent], tokens: int, after: Sequence[int], around: bool
) -> tuple[LayerTimes, ...]:
    numbers = range(len(after))
    # Where blocks are gated, the free limit has the most tokens first.
    rank = sorted(numbers, key=lambda layer: -after[layer]) if around else list(numbers)
    layers, now = [], tokens
    for layer in numbers:
        before = tokens if around else max(now, after[layer])
        layers.append(
            LayerTimes(
                layer,
                before,
                after[layer],
                **{part: spent["reduced"].median(layer, part) for part in ("rest", *PARTS)},
                dense=spent["dense"].median(layer, "rest"),
                limit=spent["limit"].median(rank.index(layer), "rest"),
            )
        )
        now = after[layer]
    return tuple(layers)


def _divide(amount: float, among: dict[int, float], into: dict[int, float]) -> None:
    """Divides an amount in proportion, and adds the shares to what is there."""
    for key, weight in among.items():
        into[key] += amount * weight / sum(among.values())


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


# The clock


@dataclass(frozen=True)
class Spent:
    """Seconds by (layer, part), of every pass; what is outside of all blocks has layer None."""

    passes: list[dict[tuple[int | None, str], float]]

    def median(self, layer: int | None, part: str) -> float:
        """Over the passes."""
        return float(statistics.median(one.get((layer, part), 0.0) for one in self.passes))


@dataclass
class Clock:
    """Cuts passes into pieces, each of which is one part of one block.

    Parts may nest: the time of an inner one is not that of the outer one.

    Attributes:
        stamp: reads the clock.
        between: seconds from one reading to another, once the pass is over.
        passes: by side, the readings of each pass, with what begins there; None where nothing
            that is asked for does.
    """

    stamp: Callable[[], Any]
    between: Callable[[Any, Any], float]
    passes: dict[str, list[list[tuple[Any, tuple[int | None, str] | None]]]] = field(
        default_factory=dict
    )
    _layer: int | None = None
    _open: list[str] = field(default_factory=list)

    def begin(self, side: str) -> None:
        """A pass of a side begins."""
        self.passes.setdefault(side, []).append([])
        self._now = self.passes[side][-1]
        self._layer = None
        self._open = []

    def enter(self, layer: int) -> None:
        """A block begins."""
        self._layer, self._open = layer, ["rest"]
        self._mark()

    def leave(self) -> None:
        """A block ends."""
        self._layer, self._open = None, []
        self._mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside is this part of the block that is running."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def become(self, name: str) -> None:
        """From here on the part that is running is another."""
        self._open[-1] = name
        self._mark()

    def was(self, name: str) -> None:
        """What has run since the last border was another part than it was said to be."""
        stamp, _ = self._now[-1]
        self._now[-1] = stamp, (self._layer, name)

    def _mark(self) -> None:
        begins = (self._layer, self._open[-1]) if self._open else None
        self._now.append((self.stamp(), begins))

    def spent(self, side: str) -> list[dict[tuple[int | None, str], float]]:
        """Seconds of each part of each pass."""
        found = []
        for marks in self.passes[side]:
            spent: dict[tuple[int | None, str], float] = {}
            for (start, what), (end, _) in itertools.pairwise(marks):
                if what is not None:
                    spent[what] = spent.get(what, 0.0) + self.between(start, end)
            found.append(spent)
        return found


def clock_for(device: torch.device) -> Clock:
    """The clock of a device: events on the stream on CUDA, the processor's elsewhere."""
    if device.type != "cuda":
        return Clock(time.perf_counter, lambda start, end: end - start)

    def stamp() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return Clock(stamp, lambda start, end: float(start.elapsed_time(end)) / 1e3)


def _hooks(block: nn.Module, layer: int, clock: Clock) -> tuple[Any, Any]:
    """Reads the clock when a block begins, and when it ends."""
    return (
        block.register_forward_pre_hook(lambda module, args: clock.enter(layer)),
        block.register_forward_hook(lambda module, args, output: clock.leave()),
    )


# The stand-ins


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
