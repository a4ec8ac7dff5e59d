"""The suite `memory`: how much memory a pass takes at most, with every method and without any.

Every method runs in a process of its own, and its peak is measured twice. The *process* is what the
system counts: everything, also what libraries take for themselves. At first, that is over what is
there when the dense model has run; so code that is loaded late counts, and what a method keeps for
its next pass. *Again* is over what is there after that. The *allocator* is what torch has handed
out to tensors.

Memory that was freed goes back to the system at once here (`AT_ONCE`). As glibc is used otherwise,
it keeps freed memory in pieces. Which of them fit again depends on all that went before, and varies
from run to run by as much as a pass takes: where tokens become fewer, by whatever method, most do
not fit.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokred.measure.conditions import device_name
from tokred.measure.suites.worker import Worker

FORMAT = 1
"""Version of the dictionary's layout."""

MODELS: tuple[tuple[str, dict[str, int]], ...] = (
    ("deit_small_patch16_224", {"img_size": 224}),
    ("deit_small_patch16_224", {"img_size": 518, "patch_size": 14}),
)
"""timm names, and options of the models: 196 and 1,369 tokens."""

BATCHES = (1, 8)
DENSE = "dense"
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""What glibc is told: blocks of 128 KiB or more come from the system, and go back to it."""

_SMALL = ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4})
"""The model that a method runs on first, so that what it needs is loaded."""


def run(
    methods: Sequence[str],
    models: Sequence[tuple[str, dict[str, int]]] = MODELS,
    batches: Sequence[int] = BATCHES,
    *,
    keep_rate: float = 0.5,
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures all methods, on the CPU. The results are for `markdown` and JSON.

    Args:
        methods: names of methods. (Those that learn have random gates.)
        models: timm names, and options of the models.
        batches: images per batch.
        keep_rate: as for `tokred.apply`.
        dtype: of the models.
        folder: in which the `tokred` lies that is measured; this one, if not given.
        on_round: called after every process with (processes done, processes in all).
    """
    number = str(dtype).removeprefix("torch.")
    where = Path(__file__).parents[3] if folder is None else folder
    cells, notes = [], []
    todo = [
        (name, options, batch, method)
        for name, options in models
        for batch in batches
        for method in (DENSE, *methods)
    ]
    for done, (name, options, batch, method) in enumerate(todo):
        cell = {"model": name, "options": options, "batch": batch, "method": method}
        try:
            cells.append({**cell, **_measured(where, cell, number, keep_rate)})
        except RuntimeError as error:
            notes.append(f"{method} was not measured on {name}, batch {batch}: {error}")
        if on_round:
            on_round(done + 1, len(todo))
    return {
        "format": FORMAT,
        "suite": "memory",
        "device": device_name(torch.device("cpu")),
        "machine": platform.machine(),
        "dtype": number,
        "threads": torch.get_num_threads(),
        "keep_rate": keep_rate,
        "versions": {"torch": str(torch.__version__)},
        "cells": cells,
        "notes": notes,
    }


def _measured(folder: Path, cell: dict[str, Any], dtype: str, keep_rate: float) -> dict[str, Any]:
    """The peaks of one method, in bytes."""
    threads = torch.get_num_threads()
    with Worker(folder, AT_ONCE) as worker:

        def apply() -> None:
            if cell["method"] != DENSE:
                worker.ask("apply", method=cell["method"], keep_rate=keep_rate)

        small, options = _SMALL
        worker.ask("make", name=small, options=options, batch=2, dtype=dtype, threads=threads)
        apply()
        worker.ask("seconds", passes=1)
        made = {"name": cell["model"], "options": cell["options"], "batch": cell["batch"]}
        worker.ask("make", **made, dtype=dtype, threads=threads)
        worker.ask("seconds", passes=1)
        apply()
        process, again = (worker.ask("resident", passes=2) for _ in range(2))
        return {"process": process, "again": again, "allocator": worker.ask("allocated")}


def markdown(results: dict[str, Any]) -> str:
    """A table for every model and batch: MiB, and in brackets over the dense model."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Suite {results['suite']}: {results['device']}, {results['dtype']}",
        "",
        f"Keep rate {results['keep_rate']}, {results['threads']} threads, {versions}. The most MiB "
        "that passes take, and in brackets how many more than with the dense model. **Bold: more "
        "by over 1 % and half a MiB.** *process*: what the system counts, over what was there "
        "before the method ran; *again*: over what was there after it had run; *allocator*: what "
        "torch hands out to tensors.",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        options = ", ".join(f"{name} {value}" for name, value in cell["options"].items())
        groups.setdefault(f"{cell['model']}, {options}, batch {cell['batch']}", []).append(cell)
    for title, cells in groups.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| method | process | again | allocator |",
            "|---|---|---|---|",
        ]
        dense = next(cell for cell in cells if cell["method"] == DENSE)
        for cell in cells:
            told = [_told(cell[by], dense[by]) for by in ("process", "again", "allocator")]
            lines.append(f"| {cell['method']} | {' | '.join(told)} |")
    lines += ["", *results["notes"]] if results["notes"] else []
    return "\n".join(lines) + "\n"


def _told(taken: int | None, dense: int | None) -> str:
    if taken is None or dense is None:
        return "not told"
    told = f"{taken / 2**20:.1f} ({(taken - dense) / 2**20:+.1f})"
    return f"**{told}**" if taken > 1.01 * dense + 2**19 else told
