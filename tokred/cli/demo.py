"""`tokred demo`: every method on a bundled checkpoint and bundled images. Nothing is downloaded."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import tokred
from tokred import reducers
from tokred.cli.shared import Commands, bar, command
from tokred.data import zoo
from tokred.measure.limit import limits_of
from tokred.measure.race import in_turns, seconds_of, sides
from tokred.measure.slicing import take_off
from tokred.optional import require
from tokred.patching import host_of
from tokred.reducers import Reducer
from tokred.reducers.truncate import Truncate
from tokred.show import drawing

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images as the model takes them, and their labels."""

KEEP_RATES = (0.9, 0.7, 0.5, 0.25)
GATES_KEEP = 0.7
"""What those bundled gates are trained for that decide themselves how many tokens stay."""
BATCH = 40
"""Images per batch."""
HEAD = ("method", "keep", "tokens after", "accuracy", "change", "M mult-adds", "fewer", "images/s",
        "speed-up", "of limit")  # fmt: skip
WIDTHS = (13, 6, 14, 10, 8, 13, 7, 10, 10, 10)


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    text = "what every method costs and gains on the bundled checkpoint"
    made = command(commands, "demo", run, text)
    made.add_argument(
        "--out", type=Path, default=Path("tokred-demo.png"), help="the picture to write"
    )
    made.add_argument("--limit", type=int, help="use only this many of the held-out images")


def run(options: argparse.Namespace) -> None:
    """Prints the table, and writes the picture."""
    require("matplotlib", "plots")
    begin = time.perf_counter()
    held_out = zoo.held_out()
    batches = [
        (zoo.normalise(images), labels)
        for images, labels in zip(
            held_out.images[: options.limit].split(BATCH),
            held_out.labels[: options.limit].split(BATCH),
            strict=True,
        )
    ]
    model = zoo.load()
    num = sum(len(labels) for _, labels in batches)
    print(
        f"{zoo.DEFAULT}: a ViT of 12 blocks and width 64, on {num} held-out images of 56x56 "
        f"pixels (196 patch tokens)\nspeed: batches of {BATCH}, float32, "
        f"{torch.get_num_threads()} threads; dense and reduced models take turns, and their "
        "medians are compared\n"
        "limit: the speed-up of cutting off as many tokens at no cost, which no method can beat\n"
    )
    points: dict[str, list[tuple[float, float]]] = {}
    with bar(len(KEEP_RATES) * len(batches), "demo") as rounds, torch.no_grad():
        rounds.write(_line(HEAD), file=sys.stdout)
        for rate in KEEP_RATES:
            methods = _methods(rate)
            laps = _race(model, {"limit": Truncate(), **methods}, rate, batches, rounds)
            dense = laps["dense"]
            if rate == KEEP_RATES[0]:
                rounds.write(_dense_line(model, dense, batches[0][0][:1]), file=sys.stdout)
            for name, reducer in sorted(methods.items()):
                with tokred.applied(model, reducer, rate):
                    counted = tokred.flops(model, batches[0][0][:1])
                cells = _cells(name, reducer, rate, laps, counted)
                rounds.write(_line(cells), file=sys.stdout)
                speed_up = laps[name].speed / dense.speed
                points.setdefault(name, []).append((speed_up, laps[name].accuracy * 100))
    _draw(model, held_out.images[:3], points, dense.accuracy * 100, options.out)
    print(f"\nwrote {options.out}; {time.perf_counter() - begin:.0f} s in all")


def _methods(keep_rate: float) -> dict[str, Reducer]:
    """Every method that has a place in the table, at this keep rate."""
    methods: dict[str, Reducer] = {}
    for name in reducers.names():
        made = reducers.make(name)
        about = reducers.traits(made)
        if about.own_schedule:  # for dense prediction
            continue
        if about.learned is None:
            methods[name] = made
            for variant in about.variants:
                methods[f"{name} {variant}"] = reducers.parse(f"{name}:{variant}")
        elif keep_rate == GATES_KEEP or not about.varies:
            with contextlib.suppress(ValueError):  # there are no bundled gates
                gates = zoo.gates(method=about.learned)
                methods[name] = replace(made, gates=gates)  # type: ignore[type-var]
    return methods


# The race


@dataclass(frozen=True)
class _Lap:
    """One method at one keep rate: accuracy, images per second (median), and how many tokens stay
    after each stage (at most, where that differs by image)."""

    accuracy: float
    speed: float
    stages: tuple[int, ...]


def _race(
    model: nn.Module,
    methods: dict[str, Reducer],
    keep_rate: float,
    batches: list[Batch],
    rounds: Any,
) -> dict[str, _Lap]:
    """The dense model and all methods, taking turns batch by batch."""
    arms: dict[str, Any] = {"dense": None}
    for name, reducer in methods.items():
        around = reducers.traits(reducer).place == "around"
        arms[name] = tokred.apply(model, reducer, keep_rate, full_grid=around)
    tokred.remove(model)
    counts = tokred.Stages(keep_rate)(196, 12)
    host, image = host_of(model), batches[0][0][:1]
    arms["limit"] = limits_of(model, host, image, arms["limit"], tuple(counts)).free
    made = sides(model, host, arms, compile=False)
    right = dict.fromkeys(made, 0)

    def turn(name: str, number: int) -> float:
        target, become = made[name]
        become()
        if number < 0:  # what is compiled at its first call is not timed
            target(batches[0][0][:2])
            return 0.0
        images, labels = batches[number]
        answers: list[Tensor] = []
        took = seconds_of(lambda: answers.append(target(images).argmax(1)), images.device)
        right[name] += int((answers[0] == labels).sum())
        return took

    def on_round(done: int, of: int) -> None:
        rounds.update()

    taken = in_turns(made, turn, len(batches), warmup=1, on_round=on_round)
    take_off(model)
    stages = tuple(sorted(set(counts), reverse=True)[1:])
    sizes = [len(labels) for _, labels in batches]
    laps = {}
    for name, seconds in taken.items():
        # The last batch may be smaller, and slower by image.
        speeds = [size / took for size, took in zip(sizes, seconds, strict=True)
                  if size == sizes[0]]  # fmt: skip
        laps[name] = _Lap(right[name] / sum(sizes), statistics.median(speeds), stages)
    return laps


# The table and the picture


def _line(cells: Sequence[str]) -> str:
    first, *rest = (cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return first.strip().ljust(WIDTHS[0]) + "".join(rest)


def _dense_line(model: nn.Module, dense: _Lap, image: Tensor) -> str:
    macs = tokred.flops(model, image).dense / 1e6
    return _line(("dense", "", "196", f"{dense.accuracy:.1%}", "", f"{macs:.1f}", "",
                  f"{dense.speed:.0f}", "", ""))  # fmt: skip


def _cells(
    name: str, reducer: Reducer, keep_rate: float, laps: dict[str, _Lap], counted: tokred.Flops
) -> tuple[str, ...]:
    """A row of the table."""
    lap, dense = laps[name], laps["dense"]
    return (
        name,
        f"{keep_rate}",
        _more_or_less(reducer) + " ".join(map(str, lap.stages)),
        f"{lap.accuracy:.1%}",
        f"{(lap.accuracy - dense.accuracy) * 100:+.1f}",
        f"{counted.reduced / 1e6:.1f}",
        f"{counted.ratio:.2f}x",
        f"{lap.speed:.0f}",
        f"{lap.speed / dense.speed:.2f}x",
        f"{lap.speed / laps['limit'].speed:.2f}",
    )


def _more_or_less(reducer: Reducer) -> str:
    """What to write before the numbers of tokens that a schedule asks for."""
    about = reducers.traits(reducer)
    if not about.varies:
        return ""
    return "<= " if about.learned is None else "~ "


def _draw(
    model: nn.Module,
    images: Tensor,
    points: dict[str, list[tuple[float, float]]],
    dense: float,
    out: Path,
) -> None:
    """Speed against accuracy (`points`; `dense` is the dense model's), and the tokens of three
    methods."""
    plots = require("matplotlib.figure", "plots")
    sheets = []
    for method in ("tome", "atc", "topk"):
        with tokred.applied(model, method, 0.5):
            trace = tokred.inspect(model, zoo.normalise(images))
        sheets.append((method, drawing.stack(tokred.visualise(trace, images))))
    figure = plots.Figure(figsize=(15, 12), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    drawing.plot_trade_off(figure.add_subplot(grid[0, 0]), points, dense)
    for place, (method, sheet) in zip((grid[0, 1], grid[1, 0], grid[1, 1]), sheets, strict=True):
        axes = figure.add_subplot(place)
        axes.imshow(sheet, interpolation="lanczos")
        axes.set_title(f"{method}, keep rate 0.5: tokens after each stage")
        axes.axis("off")
    figure.savefig(out, dpi=110)
