"""Draws the images of a sweep, each process its share of them."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tokred.data.processes import Processes, process_state
from tokred.measure.fid.files import discard_broken, file_of, save
from tokred.measure.fid.pins import pin, pins
from tokred.measure.fid.sweep import DENSE, SEEDS, Sweep, SweepSetting
from tokred.measure.fid.times import add_time
from tokred.patching import applied
from tokred.patching.denoisers import NAMED
from tokred.reducers import parse


@dataclass(frozen=True)
class SweepBatch:
    """The images of one call of the pipeline that are not on disk yet.

    Attributes:
        setting: what they belong to.
        numbers: their numbers within the setting.
        whole: the numbers of all images of the batch, if some are on disk already. They are all
            drawn, so that an image does not depend on where the sweep was stopped.
    """

    setting: SweepSetting
    numbers: tuple[int, ...]
    whole: tuple[int, ...] = field(default=(), compare=False)

    @property
    def together(self) -> tuple[int, ...]:
        """The numbers of the images that one call of the pipeline draws."""
        return self.whole or self.numbers


def generate(
    pipe: Any,
    sweep: Sweep,
    out: Path,
    *,
    model: str = "",
    batch: int = 8,
    on_batch: Callable[[SweepBatch, int], None] | None = None,
) -> None:
    """Draws this process's share of the images that are not on disk yet, or are broken, then waits
    for the other processes.

    Images are `out/<setting>/<number>.png`. `out/sweep.json` holds what they depend on; methods,
    keep rates, seeds and images may be added later. `out/times` holds how long batches took.

    An image depends on its prompt and its seed. Which others are in its batch changes its rounding
    errors and nothing else. Processes share whole batches, which are the same for any number of
    processes, so that images do not depend on that number either. (Where rounding decides which of
    two tokens is merged, another `batch` may change an image visibly.)

    Args:
        pipe: called as diffusers' pipelines are, with lists of prompts and of generators, one for
            each image; nothing may be reduced in it.
        sweep: what is drawn.
        out: the folder, which is made if need be; all processes must see it.
        model: what the pipeline is called in `sweep.json`.
        batch: images per call.
        on_batch: called after each batch, with it and with the number of images that this process
            still has to draw; and before the first batch, with an empty one.

    Raises:
        ValueError: the folder holds images of another model, or of other prompts, steps, guidance,
            size, dtype or versions; `sweep.json` is broken or missing; or the pipeline is reduced
            already.
        ModuleNotFoundError: accelerate is not installed.
    """
    several = Processes(process_state())
    pinned = several.by_main(lambda: pins(pipe, sweep, model))
    for method in sweep.methods:
        with _reduced(pipe, sweep, SweepSetting(method, min(sweep.keep_rates, default=1), 0)):
            pass  # what is refused is refused now, and not after hours

    def begin() -> tuple[list[SweepBatch], str]:
        pin(out, pinned)
        discard_broken(sweep, out)
        return plan(sweep, out, batch), f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"

    # Only one process looks at the disk: others would look a little later, and find other images.
    batches, run = several.by_main(begin)
    mine = share(batches, several.index, several.number)
    times = out / "times" / f"{run}-{several.index}.jsonl"
    draw(pipe, sweep, out, mine, times=times, on_batch=on_batch)
    several.wait()


def plan(sweep: Sweep, out: Path, batch: int) -> list[SweepBatch]:
    """The batches that are missing on disk, in whole or in part. Where one batch ends and the next
    begins does not depend on what is there.

    Raises:
        ValueError: `batch` is less than one image.
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
                batches.append(SweepBatch(setting, missing, tuple(numbers)))
    return batches


def share(batches: Sequence[SweepBatch], process: int, processes: int) -> list[SweepBatch]:
    """The batches of one process, from 0 to `processes` - 1. It takes one batch in every
    `processes`, so that each process draws some images of every setting."""
    return list(batches[process::processes])


def draw(
    pipe: Any,
    sweep: Sweep,
    out: Path,
    batches: Sequence[SweepBatch],
    *,
    times: Path,
    on_batch: Callable[[SweepBatch, int], None] | None = None,
) -> None:
    """Draws batches, writes their images, and adds a line to the file `times` for each batch."""
    left = sum(len(batch.numbers) for batch in batches)
    if on_batch is not None and batches:
        on_batch(SweepBatch(batches[0].setting, ()), left)
    for setting, together in itertools.groupby(batches, key=lambda batch: batch.setting):
        (out / setting.name).mkdir(parents=True, exist_ok=True)
        with _reduced(pipe, sweep, setting):
            for batch in together:
                begin = time.perf_counter()
                images = _images(pipe, sweep, batch)
                seconds = time.perf_counter() - begin
                for number, image in zip(batch.together, images, strict=True):
                    if number in batch.numbers:
                        save(image, out / setting.name / file_of(number))
                add_time(times, setting, len(batch.together), seconds, pipe)
                left -= len(batch.numbers)
                if on_batch is not None:
                    on_batch(batch, left)


def _images(pipe: Any, sweep: Sweep, batch: SweepBatch) -> list[Any]:
    """Draws one batch."""
    given: dict[str, Any] = {
        "num_inference_steps": sweep.steps,
        "guidance_scale": sweep.guidance,
        "height": sweep.size,
        "width": sweep.size,
    }
    images: list[Any] = pipe(
        [sweep.prompt(number) for number in batch.together],
        # Noise from the CPU is the same on every device.
        generator=[generator(batch.setting.seed, number) for number in batch.together],
        output_type="pil",
        **{name: value for name, value in given.items() if value is not None},
    ).images
    return images


def generator(seed: int, number: int) -> torch.Generator:
    """The source of the noise of an image: the same in every setting."""
    return torch.Generator().manual_seed(seed * SEEDS + number)


def _reduced(pipe: Any, sweep: Sweep, setting: SweepSetting) -> AbstractContextManager[Any]:
    """Applies a setting to the pipeline for the length of a block."""
    if setting.method == DENSE or setting.keep_rate == 1:
        return nullcontext()
    around = replace(sweep.around, keep_rate=setting.keep_rate)
    return applied(pipe, parse(setting.method, NAMED), around)
