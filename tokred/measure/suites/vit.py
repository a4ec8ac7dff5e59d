"""The suite `vit`: models, methods and keep rates, measured against each other in one run.

A group is one model at one image size and batch: the dense model, every method at every keep
rate, and the free limits, interleaved round by round. The result is one versioned dictionary,
which `markdown` turns into tables.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tokred.engine.reduction import Reduction
from tokred.host import find_host
from tokred.measure.cost import Arm, counts_of, cut_off, device_name, measure, sides, versions_of
from tokred.optional import require
from tokred.reducers import Reducer, make, place, proportional, varies
from tokred.schedule import Stages

FORMAT = 1
"""Version of the dictionary's layout."""

MODELS = (
    ("deit_tiny_patch16_224", 224),
    ("deit_small_patch16_224", 224),
    ("deit_base_patch16_224", 224),
    ("deit_tiny_patch16_224", 384),
    ("deit_small_patch16_224", 384),
    ("deit_base_patch16_224", 384),
    ("vit_large_patch16_224", 224),
)
"""Models and image sizes of the suite `vit`; patches are 16 pixels wide."""

BATCHES = (1, 8, 32)
KEEP_RATES = (0.9, 0.7, 0.5, 0.25)


@dataclass(frozen=True)
class Cell:
    """One method at one keep rate, in one group.

    Attributes:
        method: its name.
        keep_rate: as for `tokred.apply`.
        counts: patch tokens after each layer.
        speed_up: over the dense model.
        free_limit: the speed-up of cutting as many tokens off at no cost.
        efficiency: the first as a share of the second.
        milliseconds: median per batch.
        spread: half the distance between the quartiles, as a share of the median.
        peak_memory: bytes, as a share of the dense model's; None on the CPU.
    """

    method: str
    keep_rate: float
    counts: tuple[int, ...]
    speed_up: float
    free_limit: float
    efficiency: float
    milliseconds: float
    spread: float
    peak_memory: float | None


@dataclass(frozen=True)
class Group:
    """One model at one image size and batch, and all that was measured against it.

    Attributes:
        milliseconds: of the dense model, median per batch.
        rounds: how often each side was run.
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
    """Measures all of it; returns what `markdown` and JSON take.

    Weights are random, which speed does not depend on; the images are noise, on which methods
    that leave some images with fewer tokens than others may behave otherwise than on pictures.

    Args:
        models: timm names with image sizes in pixels.
        batches: images per batch.
        methods: names of methods.
        keep_rates: as for `tokred.apply`.
        device: "cpu" or "cuda".
        dtype: of model and images.
        compile: put every side under `torch.compile` (those that can be).
        rounds: measured rounds of each group, at most.
        seconds: after which no further round of a group begins, but for three that are always
            run. A group that would need more than three times that for them is skipped.
        on_group: called with every group that is done.
        on_round: called after every round with (rounds done, rounds in all).
    """
    timm = require("timm", "timm")
    groups, versions = [], {}
    for name, image_size in models:
        model = timm.create_model(name, img_size=image_size).eval().to(device, dtype)
        for batch in batches:
            images = torch.randn(batch, 3, image_size, image_size).to(device, dtype)
            arms = _arms(model, images, methods, keep_rates, compile)
            dense_seconds = _once(model, images)
            need = 4 * dense_seconds * len(arms)
            if need > 3 * seconds:
                why = f"three rounds would take about {need:.0f} s"
                group = Group(name, image_size, batch, dense_seconds * 1e3, 0.0, 0, (), why)
            else:
                reductions = {arm: reduction for arm, (reduction, _) in arms.items()}
                made = sides(model, find_host(model)[0], reductions, compile)
                measured = measure(made, images, rounds, 1, on_round, seconds)
                group = _group(name, image_size, batch, measured, arms)
            groups.append(group)
            if on_group:
                on_group(group)
        versions = versions_of(model)  # now that backends have been imported
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
        "counts, at no cost) that it reaches. Medians of interleaved rounds; all sides call the "
        "host's own attention. **Bold: slower than the dense model.**",
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
        for method in dict.fromkeys(cell["method"] for cell in group["cells"]):
            told = [_told(found.get((method, rate))) for rate in rates]
            lines.append(f"| {method} | " + " | ".join(told) + " |")
        lines.append("")
        lines.append(
            f"Dense: {group['milliseconds']:.1f} ms per batch, {group['rounds']} rounds, spread "
            f"{group['spread']:.1%}."
        )
    return "\n".join(lines) + "\n"


def _told(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    speed = f"{cell['speed_up']:.2f} ({cell['efficiency']:.2f})"
    return f"**{speed}**" if cell["speed_up"] < 1 else speed


def _arms(
    model: nn.Module,
    images: torch.Tensor,
    methods: Sequence[str],
    keep_rates: Sequence[float],
    compile: bool,
) -> dict[str, tuple[Reduction | None, str]]:
    """Every side by name: its reduction, and the name of its free limit."""
    host, tower = find_host(model)
    layout = host.layout(tower, None)
    arms: dict[str, tuple[Reduction | None, str]] = {"dense": (None, "")}
    for rate in keep_rates:
        for method in methods:
            reducer: Reducer = make(method)
            if compile and varies(reducer):
                continue
            reduction = Reduction(reducer, Stages(rate), layout, proportional(reducer))
            counts = counts_of(model, host, images, reduction, layout.grid)
            limit = f"limit {place(reducer)} {counts}"
            cut = cut_off(reduction, counts)
            arms.setdefault(limit, (cut, ""))
            arms[f"{method} {rate}"] = (reduction, limit)
    return arms


def _once(model: nn.Module, images: torch.Tensor) -> float:
    """Seconds that the dense model takes, roughly."""
    with torch.no_grad():
        model(images[:1])
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        begin = time.perf_counter()
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
    return time.perf_counter() - begin


def _group(
    name: str,
    image_size: int,
    batch: int,
    measured: dict[str, Arm],
    arms: dict[str, tuple[Reduction | None, str]],
) -> Group:
    dense, cells = measured["dense"], []
    for arm, (reduction, limit) in arms.items():
        if not limit:
            continue
        assert reduction is not None
        method, rate = arm.rsplit(" ", 1)
        memory = measured[arm].peak_memory
        cells.append(
            Cell(
                method=method,
                keep_rate=float(rate),
                counts=tuple(arms[limit][0].schedule(0, 0)),  # type: ignore[union-attr]
                speed_up=dense.median / measured[arm].median,
                free_limit=dense.median / measured[limit].median,
                efficiency=measured[limit].median / measured[arm].median,
                milliseconds=measured[arm].median * 1e3,
                spread=measured[arm].spread,
                peak_memory=memory / dense.peak_memory if memory and dense.peak_memory else None,
            )
        )
    spread = dense.spread
    return Group(
        name, image_size, batch, dense.median * 1e3, spread, len(dense.seconds), tuple(cells)
    )
