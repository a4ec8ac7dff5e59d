"""The loop over all steps of a training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from tokred.optional import require
from tokred.patching.patching import reduction_of, uncompiled
from tokred.training import checkpoints
from tokred.training.batches import Samples
from tokred.training.noise import Noise, noisy
from tokred.training.optimiser import factor_at, groups
from tokred.training.recipe import Recipe
from tokred.training.steps import Run
from tokred.training.tables import read_table, table
from tokred.training.trained import prepared, teacher_of


@dataclass(frozen=True)
class Fitted:
    """What came of it.

    Attributes:
        steps: of the whole training.
        resumed: the step that it went on from, 0 if it began anew.
        last: the last row of `log.csv`.
        accuracy: of the validation after the last epoch; None without any.
        tokens: the mean number of patch tokens in a layer, of that validation.
    """

    steps: int
    resumed: int
    last: dict[str, float]
    accuracy: float | None
    tokens: float | None


def fit(
    model: nn.Module,
    data: Samples,
    recipe: Recipe,
    out: Path,
    *,
    reduction: Any = None,
    validate: Samples | None = None,
    task: Callable[[Any, Any], Tensor] | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    workers: int = 0,
    every: int = 500,
    fresh: bool = False,
    bar: bool = True,
    on_step: Callable[[int, Mapping[str, float | int]], None] | None = None,
) -> Fitted:
    """Trains a model in place, with whatever reduction is applied to it.

    Under `accelerate launch` all processes call it, each on its device. If `out` holds a checkpoint
    it goes on from there; if training was over, it says so from the files.

    Writes `log.csv` (a row for each step), `validation.csv` (a row for each epoch), `checkpoint/`,
    `recipe.json`; at the end `curve.png` if Matplotlib is there, `gates.safetensors` if there are
    gates, and unless they were all that was trained, `model.safetensors`, with the model's keys.

    Args:
        model: with a reduction applied, or none.
        data: samples to train on, by number. If it has `set_epoch`, that is called before every
            epoch. Random changes to samples may draw from the global random streams (of `random`,
            NumPy and PyTorch), which are seeded for each sample.
        recipe: how.
        out: the folder, made if need be; all processes must see it.
        reduction: what is applied to the model; found on it if not given.
        validate: samples whose labels are compared with what the model says after each epoch.
        task: `task(outputs, targets)`, the loss of what the model gives, as a mean over the batch;
            `cross_entropy` if not given.
        collate: makes a batch of samples: (inputs, targets), with inputs a tensor or a mapping of
            what the model takes by name; or such a mapping with "labels", which the model is not
            given.
        workers: processes that fetch samples, of each process that trains.
        every: steps between two checkpoints; there is one after each epoch, too.
        fresh: start anew, though there is a checkpoint.
        bar: whether the main process shows its progress.
        on_step: called after each step with its number, from 1, and its row of the log.

    Raises:
        ValueError: gates are to be trained alone, or losses need them, and there are none; samples
            are fewer than a batch; the batch cannot be divided by the processes; labels are out
            of range; or `out` holds a checkpoint of another training.
        RuntimeError: the loss was not finite; the last checkpoint is still there.
        ModuleNotFoundError: accelerate or tqdm is not installed.
    """
    model = uncompiled(model)
    reduction = reduction_of(model) if reduction is None else reduction
    gates = getattr(reduction, "gates", None)
    if recipe.frozen and gates is None:
        raise ValueError(
            "frozen trains gates alone, and there are none: apply a method that learns (svit, "
            "dynamicvit), or train the model"
        )
    if recipe.distill and gates is None:
        raise ValueError("distill compares tokens that gates have kept, and there are no gates")
    per_epoch = len(data) // recipe.batch
    if per_epoch == 0:
        raise ValueError(
            f"data holds {len(data)} samples, fewer than a batch of {recipe.batch}"
            if len(data)
            else "data is empty"
        )
    if every < 1:
        raise ValueError(f"every must be at least 1 step, not {every}")
    with ExitStack() as stack:
        accelerator = stack.enter_context(_accelerator(recipe, find_unused=not recipe.frozen))
        share, left = divmod(recipe.batch // recipe.accumulate, accelerator.num_processes)
        if left:
            raise ValueError(
                f"a batch of {recipe.batch} in {recipe.accumulate} part"
                f"{'s'[: recipe.accumulate > 1]} cannot be divided by "
                f"{accelerator.num_processes} processes"
            )
        pinned = checkpoints.pins(model, reduction, recipe, len(data))
        checkpoint = None if fresh else checkpoints.latest(out)
        if checkpoint is not None:
            checkpoints.compare(out, pinned)
        accelerator.wait_for_everyone()  # nobody writes before all have read

        teacher = teacher_of(model, reduction, recipe) if recipe.teaches else None
        trained = stack.enter_context(prepared(model, reduction, recipe))
        optimizer = torch.optim.AdamW(groups(trained, recipe))
        wrapped, optimizer = accelerator.prepare(trained, optimizer)
        if teacher is not None:
            teacher.to(accelerator.device)
        noise = Noise(recipe.seed, recipe.batch)
        if gates is not None:
            stack.enter_context(noisy(reduction, noise))
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))

        first = (
            0
            if checkpoint is None
            else checkpoints.load(checkpoint, trained, optimizer, accelerator)
        )
        total = recipe.epochs * per_epoch
        log = stack.enter_context(table(out / "log.csv", first, accelerator.is_main_process))
        checks = stack.enter_context(
            table(out / "validation.csv", first, accelerator.is_main_process)
        )
        if accelerator.is_main_process:
            checkpoints.begin(out, pinned, first)
        tqdm = require("tqdm", "train").tqdm
        progress = stack.enter_context(
            tqdm(
                total=total,
                initial=first,
                desc="training",
                unit="step",
                disable=not (bar and accelerator.is_main_process),
            )
        )
        run = Run(
            recipe, accelerator, wrapped, trained, teacher, task, collate, noise, share, workers
        )
        for epoch in range(first // per_epoch, recipe.epochs):
            wrapped.train()
            begin = epoch * per_epoch
            batches = run.batches(data, epoch, max(first - begin, 0), per_epoch)
            for step in range(max(first, begin), begin + per_epoch):
                since = time.perf_counter()
                factor = factor_at(step, total, recipe.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                terms = run.step(step, batches, optimizer)
                images = recipe.batch / (time.perf_counter() - since)
                row = {
                    "step": step + 1,
                    "epoch": epoch + 1,
                    "lr": factor * (recipe.gate_lr if recipe.frozen else recipe.lr),
                    **terms,
                    "images_per_second": images,
                }
                log(row)
                kept = [value for name, value in terms.items() if name.startswith("kept_")]
                shown = f", keeps {sum(kept) / len(kept):.0%}" if kept else ""
                progress.set_postfix_str(f"loss {terms['loss']:.4g}{shown}", refresh=False)
                progress.update()
                ends = step + 1 == begin + per_epoch
                if step + 1 == total:
                    run.calibrate(data)
                if ends and validate is not None:
                    found = run.validate(validate)
                    checks({"step": step + 1, "epoch": epoch + 1, **found})
                if ends or (step + 1) % every == 0:
                    accelerator.wait_for_everyone()
                    if accelerator.is_main_process:
                        checkpoints.save(out, step + 1, trained, optimizer, accelerator)
                if on_step is not None:
                    on_step(step + 1, row)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoints.finish(out, model, reduction, recipe)
        accelerator.wait_for_everyone()
    rows, checked = read_table(out / "log.csv"), read_table(out / "validation.csv")
    last = checked[-1] if checked else {}
    return Fitted(total, first, rows[-1], last.get("accuracy"), last.get("tokens"))


@contextmanager
def _accelerator(recipe: Recipe, find_unused: bool) -> Iterator[Any]:
    accelerate = require("accelerate", "train")
    state = require("accelerate.state", "train").AcceleratorState
    cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    # Without being told, accelerate takes each of several processes on CPUs for the only one.
    cpu = cpu or not torch.accelerator.is_available()
    # Somebody else may have one with another precision, of which there is only one in a process.
    former = dict(state._shared_state)
    state._reset_state()
    # Some models have parameters that classification does not reach.
    wrapping = accelerate.DistributedDataParallelKwargs(find_unused_parameters=find_unused)
    try:
        yield accelerate.Accelerator(
            cpu=cpu, mixed_precision=recipe.precision, kwargs_handlers=[wrapping]
        )
    finally:
        state._reset_state()
        state._shared_state.update(former)
