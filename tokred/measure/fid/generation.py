"""Draws the images of a sweep, each process its share of them."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tokred.measure.fid.files import file_of, save
from tokred.measure.fid.pins import pin, pins
from tokred.measure.fid.sweep import DENSE, SEEDS, Setting, Sweep
from tokred.optional import require
from tokred.patching.denoising import NAMED
from tokred.patching.patching import applied
from tokred.reducers import parse

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Images that are drawn in one call of the pipeline: numbers within a setting."""

    setting: Setting
    numbers: tuple[int, ...]


def generate(
    pipe: Any,
    sweep: Sweep,
    out: Path,
    *,
    model: str = "",
    batch: int = 8,
    on_batch: Callable[[Batch, int], None] | None = None,
) -> None:
    """Draws what is not on disk yet: this process's share of it, then waits for the others.

    Images are `out/<setting>/<number>.png`. `out/sweep.json` holds what they depend on; methods,
    keep rates, seeds and images may be added later. How long batches took is in `out/times`.

    An image depends on its prompt and its seed. Which others it is drawn with changes the rounding
    alone; so that not even this depends on the number of processes, they share whole batches, which
    are the same for any number. (Where rounding decides between two tokens to merge, another
    `batch` may change an image visibly.)

    Args:
        pipe: called as diffusers' pipelines are, with lists of prompts and of generators, one for
            each image; nothing may be reduced in it.
        sweep: what is drawn.
        out: the folder, which is made if need be; all processes must see it.
        model: what the pipeline is called in `sweep.json`.
        batch: images per call.
        on_batch: called after each with it and with how many images this process has still to draw;
            before the first, with an empty batch.

    Raises:
        ValueError: the folder holds images of another model, or of other prompts, steps, guidance,
            size, dtype or versions; or the pipeline is reduced already.
        ModuleNotFoundError: accelerate is not installed.
    """
    state = process_state()
    pinned = pins(pipe, sweep, model)
    for method in sweep.methods:
        with _reduced(pipe, sweep, Setting(method, min(sweep.keep_rates, default=1), 0)):
            pass  # refused now, rather than after hours

    def begin() -> tuple[list[Batch], str]:
        pin(out, pinned)
        return plan(sweep, out, batch), f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"

    # One process looks at the disk: others would look at other times.
    batches, run = _by_main_process(state, begin)
    mine = share(batches, state.process_index, state.num_processes)
    times = out / "times" / f"{run}-{state.process_index}.jsonl"
    draw(pipe, sweep, out, mine, times=times, on_batch=on_batch)
    state.wait_for_everyone()


def process_state(cpu: bool = False) -> Any:
    """accelerate's `PartialState`: which of how many processes this is, and its device.

    Args:
        cpu: use no other device.

    Raises:
        ModuleNotFoundError: accelerate is not installed.
    """
    cpu = cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    # Without being told, accelerate takes each of several processes on CPUs for the only one.
    cpu = cpu or not torch.accelerator.is_available()
    # The fastest process may have to wait for the slowest as long as that takes.
    return require("accelerate", "fid").PartialState(cpu, timeout=datetime.timedelta(days=14))


def plan(sweep: Sweep, out: Path, batch: int) -> list[Batch]:
    """The batches that are missing on disk. Their bounds are the same however many there are.

    Raises:
        ValueError: a batch of less than one image.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    batches = []
    for setting in sweep.settings():
        there = {file.name for file in (out / setting.name).glob("*.png")}
        for start in range(0, sweep.images, batch):
            numbers = range(start, min(start + batch, sweep.images))
            missing = tuple(number for number in numbers if file_of(number) not in there)
            if missing:
                batches.append(Batch(setting, missing))
    return batches


def share(batches: Sequence[Batch], process: int, processes: int) -> list[Batch]:
    """Those of one process, 0 to `processes` - 1: every so manieth, so that each draws some of
    every setting."""
    return list(batches[process::processes])


def draw(
    pipe: Any,
    sweep: Sweep,
    out: Path,
    batches: Sequence[Batch],
    *,
    times: Path,
    on_batch: Callable[[Batch, int], None] | None = None,
) -> None:
    """Draws batches, writes their images, and adds a line to `times` for each."""
    left = sum(len(batch.numbers) for batch in batches)
    given: dict[str, Any] = {
        "num_inference_steps": sweep.steps,
        "guidance_scale": sweep.guidance,
        "height": sweep.size,
        "width": sweep.size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    device = str(getattr(pipe, "device", "cpu"))
    if on_batch is not None and batches:
        on_batch(Batch(batches[0].setting, ()), left)
    for setting, together in itertools.groupby(batches, key=lambda batch: batch.setting):
        (out / setting.name).mkdir(parents=True, exist_ok=True)
        with _reduced(pipe, sweep, setting):
            for batch in together:
                begin = time.perf_counter()
                images = pipe(
                    [sweep.prompt(number) for number in batch.numbers],
                    # Noise from the CPU is the same on every device.
                    generator=[generator(setting.seed, number) for number in batch.numbers],
                    output_type="pil",
                    **given,
                ).images
                seconds = time.perf_counter() - begin
                for number, image in zip(batch.numbers, images, strict=True):
                    save(image, out / setting.name / file_of(number))
                took = {"setting": setting.name, "images": len(batch.numbers), "seconds": seconds}
                times.parent.mkdir(exist_ok=True)
                with times.open("a") as file:
                    file.write(json.dumps({**took, "device": device}) + "\n")
                left -= len(batch.numbers)
                if on_batch is not None:
                    on_batch(batch, left)


def generator(seed: int, number: int) -> torch.Generator:
    """Where the noise of an image comes from, in every setting the same."""
    return torch.Generator().manual_seed(seed * SEEDS + number)


def _reduced(pipe: Any, sweep: Sweep, setting: Setting) -> AbstractContextManager[Any]:
    if setting.method == DENSE or setting.keep_rate == 1:
        return nullcontext()
    around = replace(sweep.around, keep_rate=setting.keep_rate)
    return applied(pipe, parse(setting.method, NAMED), around)


def _by_main_process(state: Any, work: Callable[[], T]) -> T:
    """What the main process makes of `work`, in every process; its error, too, so that nobody
    waits for a process that is gone."""
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [work()]
        except (ValueError, OSError) as error:
            outcome = [error]
    require("accelerate.utils", "fid").broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: T = outcome[0]
    return result
