"""The suite `release`: eight fixed cells, timed against another release, and one row per release.

Two versions cannot be imported into one process, so each has its own, with the same model and the
same images. They take turns, in shuffled order, and only one of them works at a time. A turn times
the dense model and the reduced one; a third turn, in this process, the free limit. What a release
has reached stays in a history, to which `with_row` adds.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tokred.data.writing import read_mapping
from tokred.measure.cost import bench
from tokred.measure.race import beside, in_turns
from tokred.measure.suites.worker import Worker
from tokred.optional import require
from tokred.reducers.registry import make

FORMAT = 1
"""Version of the layout of the history."""


@dataclass(frozen=True)
class Cell:
    """What is timed.

    Attributes:
        model: its name in timm.
        batch: images per batch.
        dtype: of model and images.
        method: its name.
        keep_rate: as for `tokred.apply`.
        image_size: in pixels.
    """

    model: str
    batch: int
    dtype: str
    method: str
    keep_rate: float = 0.5
    image_size: int = 224

    def __str__(self) -> str:
        model = self.model.partition("_patch")[0]
        short = {"float32": "fp32", "bfloat16": "bf16"}.get(self.dtype, self.dtype)
        return f"{model} b{self.batch} {short} {self.method} {self.keep_rate:g}"


CELLS = (
    Cell("deit_tiny_patch16_224", 1, "float32", "tome"),
    Cell("deit_tiny_patch16_224", 1, "float32", "atc"),
    Cell("deit_small_patch16_224", 1, "float32", "tome"),
    Cell("deit_small_patch16_224", 1, "float32", "tome", 0.9),
    Cell("deit_small_patch16_224", 8, "float32", "tome"),
    Cell("deit_small_patch16_224", 8, "float32", "atc"),
    Cell("deit_small_patch16_224", 8, "float32", "topk"),
    Cell("deit_small_patch16_224", 8, "bfloat16", "tome"),
)
"""They stay the same from release to release, so that rows can be compared."""

TURN = 0.1
"""Seconds that each model is timed for in a turn, about."""

HERE = Path(__file__).parents[3]
"""The folder in which this `tokred` lies."""


def run(
    against: Path,
    cells: Sequence[Cell] = CELLS,
    *,
    measured: Path = HERE,
    rounds: int = 20,
    seconds: float = 120,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Times one release against another, on the CPU. Returns the row of the history.

    Args:
        against: the folder in which the `tokred` of the other release lies, see `release_in`.
        cells: what is timed.
        measured: the folder of the release that the row is for; this one, if not given. The free
            limit is always that of this version.
        rounds: turns of each in every cell, at least 2.
        seconds: after which no further round of a cell begins; three rounds are run in any case.
        on_round: called after every round with (rounds done, rounds in all).

    Raises:
        ValueError: there are fewer than 2 rounds.
        RuntimeError: a release cannot do what a cell asks for.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, to tell a standard error, not {rounds}")
    found = []
    with Worker(measured) as now, Worker(against) as before:
        versions = now.ask("version"), before.ask("version")
        for number, cell in enumerate(cells):

            def lap(done: int, of: int, number: int = number) -> None:
                if on_round:
                    on_round(number * of + done, len(cells) * of)

            found.append(_cell(cell, now, before, rounds, seconds, lap))
    return {
        "version": versions[0],
        "against": versions[1],
        "date": date.today().isoformat(),
        "machine": machine(),
        "cells": found,
    }


def _cell(
    cell: Cell,
    now: Worker,
    before: Worker,
    rounds: int,
    seconds: float,
    on_round: Callable[[int, int], None],
) -> dict[str, Any]:
    """One cell of a row.

    The speed-up is the dense model's time by that of the reduced one, in the process of the
    release. It is divided by that of the free limit, in this process, to give the efficiency.
    "ratio" is how many times as fast as the other release it is: the median over the rounds, with
    its standard error.
    """
    workers = {"now": now, "before": before}
    answers = []
    for worker in workers.values():
        worker.ask(
            "make", name=cell.model, options={"img_size": cell.image_size}, batch=cell.batch,
            dtype=cell.dtype, threads=torch.get_num_threads(),
        )  # fmt: skip
        worker.ask("apply", method=cell.method, keep_rate=cell.keep_rate)
        answers.append(torch.tensor(worker.ask("answer")))
    passes = max(1, min(10, math.ceil(TURN / statistics.median(now.ask("seconds", passes=3)))))
    limit = _limit(cell, passes)

    def turn(name: str, number: int) -> tuple[float, float]:
        """The seconds of the dense model, and of the reduced one or the limit."""
        if name == "limit":
            return limit()
        dense = workers[name].ask("seconds", passes=passes, dense=True)
        reduced = workers[name].ask("seconds", passes=passes)
        return statistics.median(dense), statistics.median(reduced)

    taken = in_turns((*workers, "limit"), turn, rounds, 1, on_round, seconds)
    speed_up, free_limit = (
        statistics.median(dense / other for dense, other in taken[name])
        for name in ("now", "limit")
    )
    of_each = [[reduced for _, reduced in taken[name]] for name in workers]
    pace = beside(*of_each)
    return {
        "cell": str(cell),
        "milliseconds": 1000 * statistics.median(of_each[0]),
        "speed_up": speed_up,
        "free_limit": free_limit,
        "efficiency": speed_up / free_limit,
        "ratio": pace.seconds / statistics.median(of_each[0]),
        "error": pace.error,
        "difference": float((answers[0] - answers[1]).abs().max()),
        "rounds": len(taken["now"]),
    }


def _limit(cell: Cell, passes: int) -> Callable[[], tuple[float, float]]:
    """Times the dense model and the free limit of a cell, whenever it is called."""
    dtype = getattr(torch, cell.dtype)
    timm = require("timm", "timm")
    model = timm.create_model(cell.model, img_size=cell.image_size).eval().to(dtype=dtype)
    images = torch.randn(cell.batch, 3, cell.image_size, cell.image_size).to(dtype)

    def measure() -> tuple[float, float]:
        found = bench(model, images, make(cell.method), cell.keep_rate, rounds=passes, warmup=1)
        return found.dense.median, found.limit.median

    return measure


@contextmanager
def release_in(where: str) -> Iterator[Path]:
    """The folder in which another release lies.

    Args:
        where: such a folder (a source tree, or one that `pip install --target` has filled), or a
            version, which is installed in a folder for as long as the `with` block runs.

    Raises:
        ValueError: it is neither, or pip cannot install that version.
    """
    folder = Path(where)
    if (folder / "tokred" / "__init__.py").exists():
        yield folder
        return
    if folder.exists() or not re.fullmatch(r"\d+(\.\w+)+", where):
        raise ValueError(
            f"against must be a version such as 0.9.0, or a folder with a package `tokred` in it, "
            f"not {where!r}"
        )
    with tempfile.TemporaryDirectory() as target:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
        done = subprocess.run([*pip, f"tokred=={where}"], capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(
                f"pip cannot install tokred {where}: {why}; give a folder in which it lies"
            )
        yield Path(target)


def machine() -> str:
    """The machine and its torch, in words."""
    at_hand = getattr(os, "sched_getaffinity", None)
    cores = len(at_hand(0)) if at_hand else os.cpu_count()
    told = torch.backends.cpu.get_cpu_capability()
    units = {"AVX512": "AVX-512", "DEFAULT": "no vector units"}.get(told, told)
    flags = Path("/proc/cpuinfo")
    if flags.exists() and " amx_tile" in flags.read_text():
        units += " and AMX"
    version = ".".join(str(torch.__version__).split(".")[:2])
    return f"{cores} cores, {units}, torch {version}"


def history(file: Path) -> list[dict[str, Any]]:
    """The rows of all releases; none where there is no file.

    Raises:
        ValueError: the file is broken, or of another format.
    """
    if not file.exists():
        return []
    found = read_mapping(file, "how fast former releases were; take it from the repository again")
    if found.get("format") != FORMAT:
        raise ValueError(f"{file} has format {found.get('format')}; this version reads {FORMAT}")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def with_row(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with one more, in the order of their versions. It takes the place of one for the
    same version."""
    others = [other for other in rows if other["version"] != row["version"]]
    return sorted([*others, row], key=lambda row: [*map(int, re.findall(r"\d+", row["version"]))])


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The file of a history."""
    return json.dumps({"format": FORMAT, "rows": list(rows)}, indent=1) + "\n"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table with a row for every release, the newest at the end, and what they were timed on."""
    cells = list(dict.fromkeys(cell["cell"] for row in rows for cell in row["cells"]))
    lines = [
        "Speed-up over the dense model, in brackets the share of the free limit, and behind it how "
        "many times as fast as the release before.",
        "",
        f"| version | {' | '.join(cells)} |",
        "|---" * (len(cells) + 1) + "|",
    ]
    for row in rows:
        found = {cell["cell"]: cell for cell in row["cells"]}
        told = [_told(found.get(cell)) for cell in cells]
        lines.append(f"| {row['version']} | {' | '.join(told)} |")
    lines.append("")
    for row in rows:
        errors = [cell["error"] for cell in row["cells"]]
        differences = [cell["difference"] for cell in row["cells"]]
        lines.append(
            f"- {row['version']}, {row['date']}: against {row['against']} on {row['machine']}; "
            f"standard errors of the last figures up to {max(errors):.1%}, logits differ by up to "
            f"{max(differences):.2g}"
        )
    return "\n".join(lines) + "\n"


def _told(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    return f"{cell['speed_up']:.2f} ({cell['efficiency']:.2f}) x{cell['ratio']:.2f}"
