"""The suite `vit`: models, methods and keep rates, measured against each other in one run.

A group is one model at one image size and batch. In it the dense model, every method at every keep
rate and the free limits take turns: the seamless ones, which are slices in the model's own forward,
and the seamed ones, which are the same cuts in patched blocks. The result is one versioned
dictionary, which `markdown` turns into tables.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tokred.engine.reduction import Reduction
from tokred.host import find_host
from tokred.measure.conditions import device_name, versions_of
from tokred.measure.limit import Limits, counts_of, limits_of
from tokred.measure.race import Arm, measure, seconds_of, sides
from tokred.measure.slicing import take_off
from tokred.optional import require
from tokred.reducers import make
from tokred.reducers.protocol import traits
from tokred.schedule import Stages

FORMAT = 2
"""Version of the dictionary's layout. In version 1 the free limit was the seamed one."""

MODELS = (
    ("deit_tiny_patch16_224", 224),
    ("deit_small_patch16_224", 224),
    ("deit_base_patch16_224", 224),
    ("deit_tiny_patch16_224", 384),
    ("deit_small_patch16_224", 384),
    ("deit_base_patch16_224", 384),
    ("vit_large_patch16_224", 224),
)
"""Models and image sizes in pixels; patches are 16 pixels wide."""

BATCHES = (1, 8, 32)
KEEP_RATES = (0.9, 0.7, 0.5, 0.25)


@dataclass(frozen=True)
class Cell:
    """One method at one keep rate, in one group.

    Attributes:
        method: its name.
        keep_rate: as for `tokred.apply`.
        counts: patch tokens after each layer.
        speed_up: the speed-up over the dense model.
        free_limit: the speed-up of cutting off as many tokens at no cost, by a slice in the model's
            own forward.
        efficiency: the speed-up divided by that of the free limit.
        bookkeeping: what patched blocks cost without any method, as a share of the free limit's
            time; None where that is not known, because the free limit runs in them, too.
        why_seamed: why it does; empty if it does not.
        milliseconds: median per batch.
        spread: half the distance between the quartiles, as a share of the median.
        peak_memory: as a share of the dense model's; None on the CPU.
    """

    method: str
    keep_rate: float
    counts: tuple[int, ...]
    speed_up: float
    free_limit: float
    efficiency: float
    bookkeeping: float | None
    why_seamed: str
    milliseconds: float
    spread: float
    peak_memory: float | None


@dataclass(frozen=True)
class Group:
    """One model at one image size and batch, and all that was measured in turns with it.

    Attributes:
        milliseconds: of the dense model, median per batch.
        rounds: measured runs of each side.
        skipped: why nothing was measured; empty if it was.
    """

    model: str
    image_size: int
    batch: int
    milliseconds: float
    spread: float
    rounds: int
    cells: tuple[Cell, ...]
    skipped: str = ""


def run(
    models: Iterable[tuple[str, int]] = MODELS,
    batches: Sequence[int] = BATCHES,
    methods: Sequence[str] = ("tome", "atc"),
    keep_rates: Sequence[float] = KEEP_RATES,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    rounds: int = 15,
    seconds: float = 120,
    on_group: Callable[[Group], None] | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures all groups. The results are for `markdown` and JSON.

    Weights are random, which speed does not depend on. The images are noise: methods that keep a
    different number of tokens of each image may keep other numbers of real pictures.

    Args:
        models: timm names with image sizes in pixels.
        batches: images per batch.
        methods: names of methods.
        keep_rates: as for `tokred.apply`.
        device: "cpu" or "cuda".
        dtype: of model and images.
        compile: compile every side (`torch.compile`); methods that keep different numbers of tokens
            are left out.
        rounds: measured rounds of each group, at most.
        seconds: after which no further round of a group begins; three rounds are run in any case.
            A group is skipped if three rounds would take more than three times these seconds.
        on_group: called with every finished group.
        on_round: called after every round with (rounds done, rounds in all).
    """
    timm = require("timm", "timm")
    groups, versions = [], {}
    for name, image_size in models:
        model = timm.create_model(name, img_size=image_size).eval().to(device, dtype)
        for batch in batches:
            images = torch.randn(batch, 3, image_size, image_size).to(device, dtype)
            entries = _entries(model, images, methods, keep_rates, compile)
            group = _measured(name, model, images, entries, compile, rounds, seconds, on_round)
            groups.append(group)
            if on_group:
                on_group(group)
        versions = versions_of(model)
    return {
        "format": FORMAT,
        "suite": "vit",
        "device": device_name(torch.device(device)),
        "machine": platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "compiled": compile,
        "python": platform.python_version(),
        "versions": versions,
        "groups": [asdict(group) for group in groups],
    }


def markdown(results: dict[str, Any]) -> str:
    """A table for every group: speed-up, and in brackets the efficiency."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Suite {results['suite']}: {results['device']}, {results['dtype']}"
        + (", compiled" if results["compiled"] else ""),
        "",
        f"{results['threads']} threads, Python {results['python']}, {versions}. Speed-up over the "
        "dense model, and in brackets the share of the free limit (tokens cut off to the same "
        f"counts, at no cost{_slice(results)}) that it reaches. Medians of interleaved rounds; all "
        "sides call the host's own attention. **Bold: slower than the dense model.**",
    ]
    for group in results["groups"]:
        lines += ["", f"## {group['model']}, {group['image_size']} px, batch {group['batch']}", ""]
        if group["skipped"]:
            lines.append(f"Not measured: {group['skipped']}.")
            continue
        rates = sorted({cell["keep_rate"] for cell in group["cells"]}, reverse=True)
        found = {(cell["method"], cell["keep_rate"]): cell for cell in group["cells"]}
        lines.append("| keep rate | " + " | ".join(str(rate) for rate in rates) + " |")
        lines.append("|---" * (len(rates) + 1) + "|")
        first = next(iter(found))[0]
        limits = [f"{found[first, rate]['free_limit']:.2f}" for rate in rates]
        lines.append("| free limit | " + " | ".join(limits) + " |")
        if results["format"] > 1:
            books = [_share(found[first, rate]["bookkeeping"]) for rate in rates]
            lines.append("| of it bookkeeping | " + " | ".join(books) + " |")
        for method in dict.fromkeys(cell["method"] for cell in group["cells"]):
            told = [_told(found.get((method, rate))) for rate in rates]
            lines.append(f"| {method} | " + " | ".join(told) + " |")
        lines.append("")
        lines.append(
            f"Dense: {group['milliseconds']:.1f} ms per batch, {group['rounds']} rounds, spread "
            f"{group['spread']:.1%}."
        )
        for why in sorted({cell.get("why_seamed", "") for cell in group["cells"]} - {""}):
            lines += ["", f"A free limit runs in patched blocks, too: {why}."]
    return "\n".join(lines) + "\n"


def _slice(results: dict[str, Any]) -> str:
    """What the free limit is; in version 1 it was another one."""
    if results["format"] == 1:
        return ""
    return (
        ", by a slice in the model's own forward; below it what patched blocks cost without any "
        "method, as a share of its time"
    )


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f}"


def _told(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    speed = f"{cell['speed_up']:.2f} ({cell['efficiency']:.2f})"
    return f"**{speed}**" if cell["speed_up"] < 1 else speed


@dataclass(frozen=True)
class Entry:
    """One method at one keep rate, before it is measured.

    Attributes:
        reduction: what is measured.
        counts: patch tokens after each layer.
        limits: what it is measured against.
        limit: the name of the side that is its free limit.
        seamed: the name of the side that is its seamed limit; the same if that is the free limit.
    """

    method: str
    keep_rate: float
    reduction: Reduction
    counts: tuple[int, ...]
    limits: Limits
    limit: str
    seamed: str

    @property
    def arms(self) -> dict[str, Any]:
        """Its sides by name."""
        limits = {self.seamed: self.limits.seamed, self.limit: self.limits.free}
        return {**limits, f"{self.method} {self.keep_rate}": self.reduction}


def _entries(
    model: nn.Module,
    images: torch.Tensor,
    methods: Sequence[str],
    keep_rates: Sequence[float],
    compile: bool,
) -> list[Entry]:
    host, tower = find_host(model)
    layout = host.layout(tower, None)
    known: dict[str, Limits] = {}
    entries = []
    for rate in keep_rates:
        for method in methods:
            reducer = make(method)
            said = traits(reducer)
            if compile and said.varies:
                continue
            reduction = Reduction(reducer, Stages(rate), layout, said.proportional)
            counts = counts_of(model, host, images, reduction, layout.grid)
            name = f"limit {said.place} {counts}"
            if name not in known:
                known[name] = limits_of(model, host, images, reduction, counts)
            seamed = name if known[name].why_seamed else f"seamed {name}"
            entries.append(Entry(method, rate, reduction, counts, known[name], name, seamed))
    return entries


def _once(model: nn.Module, images: torch.Tensor) -> float:
    """The seconds of one pass of the dense model, a rough estimate."""
    with torch.no_grad():
        model(images[:1])
        return seconds_of(lambda: model(images), images.device)


def _measured(
    name: str,
    model: nn.Module,
    images: torch.Tensor,
    entries: Sequence[Entry],
    compile: bool,
    rounds: int,
    seconds: float,
    on_round: Callable[[int, int], None] | None,
) -> Group:
    """One group; nothing is measured in it if that would take too long."""
    batch, image_size = len(images), images.shape[-1]
    once = _once(model, images)
    arms: dict[str, Any] = {"dense": None}
    for entry in entries:
        arms |= entry.arms
    need = 4 * once * len(arms)
    if need > 3 * seconds:
        why = f"three rounds would take about {need:.0f} s"
        return Group(name, image_size, batch, once * 1e3, 0.0, 0, (), why)
    racing = sides(model, find_host(model)[0], arms, compile)
    measured = measure(racing, images, rounds, 1, on_round, seconds)
    take_off(model)
    dense = measured["dense"]
    cells = tuple(_cell(entry, measured) for entry in entries)
    return Group(
        name, image_size, batch, dense.median * 1e3, dense.spread, len(dense.seconds), cells
    )


def _cell(entry: Entry, measured: dict[str, Arm]) -> Cell:
    dense, limit, seamed = (measured[name] for name in ("dense", entry.limit, entry.seamed))
    arm = measured[f"{entry.method} {entry.keep_rate}"]
    memory = arm.peak_memory
    return Cell(
        method=entry.method,
        keep_rate=entry.keep_rate,
        counts=entry.counts,
        speed_up=dense.median / arm.median,
        free_limit=dense.median / limit.median,
        efficiency=limit.median / arm.median,
        bookkeeping=None if limit is seamed else seamed.median / limit.median - 1,
        why_seamed=entry.limits.why_seamed,
        milliseconds=arm.median * 1e3,
        spread=arm.spread,
        peak_memory=memory / dense.peak_memory if memory and dense.peak_memory else None,
    )
