"""The loop over all steps of a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from tokred.data.processes import on_cpu
from tokred.optional import require
from tokred.patching import reduction_of, uncompiled
from tokred.training import checkpoints
from tokred.training.batches import TrainingSamples
from tokred.training.noise import Noise, noisy
from tokred.training.optimiser import factor_at, groups
from tokred.training.recipe import Recipe
from tokred.training.steps import Run
from tokred.training.tables import read_table, table
from tokred.training.trained import Trained, prepared, teacher_of


@dataclass(frozen=True)
class Fitted:
    """The result of a training.

    Attributes:
        steps: steps of the whole training.
        resumed: the step from which it went on; 0 if it began anew.
        last: the last row of `log.csv`.
        accuracy: the share of right answers in the last validation; None if there was none.
        tokens: the mean number of patch tokens in a layer, in the last validation; None if there
            was none, or nothing is reduced.
    """

    steps: int
    resumed: int
    last: dict[str, float]
    accuracy: float | None
    tokens: float | None


def fit(
    model: nn.Module,
    data: TrainingSamples,
    recipe: Recipe,
    out: Path,
    *,
    reduction: Any = None,
    validate: TrainingSamples | None = None,
    task: Callable[[Any, Any], Tensor] | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    workers: int = 0,
    every: int = 500,
    fresh: bool = False,
    bar: bool = True,
    on_step: Callable[[int, Mapping[str, float | int]], None] | None = None,
) -> Fitted:
    """Trains a model in place, with the reduction that is applied to it, if any.

    Under `accelerate launch` all processes call it, each on its device. If `out` holds a
    checkpoint, training goes on from there, if it is of the same training; a warning says if data
    or versions of libraries have changed. If it was over, nothing is trained, and the result is
    read from the files.

    Writes `log.csv` (a row for each step), `validation.csv` (a row for each epoch), `checkpoint/`
    and `recipe.json`. At the end it writes `gates.safetensors` if there are gates,
    `model.safetensors` with the model's keys unless gates alone were trained, and `curve.png` if
    Matplotlib is installed.

    Args:
        model: the model, with a reduction applied or without.
        data: samples to train on, by number. If it has `set_epoch`, that is called before every
            epoch. Random changes to samples may draw from the global random streams (of `random`,
            NumPy and PyTorch), which are seeded for each sample.
        recipe: learning rates, weights of losses, and all else that the result depends on.
        out: the folder, made if need be; all processes must see it.
        reduction: the reduction that is applied to the model; found on it if not given.
        validate: samples on which the model's answers are compared with labels after each epoch.
        task: `task(outputs, targets)`, the loss of the model's outputs, as a mean over the batch;
            `cross_entropy` if not given.
        collate: makes a batch of samples: (inputs, targets), where inputs are a tensor or a mapping
            of what the model takes by name; or such a mapping with "labels" in it, which the model
            is not given.
        workers: how many processes fetch samples, for each process that trains.
        every: steps between two checkpoints; there is one after each epoch, too.
        fresh: start anew, even if there is a checkpoint.
        bar: whether the main process shows its progress.
        on_step: called after each step with its number, from 1, and its row of the log.

    Raises:
        ValueError: the recipe needs gates, and there are none; there are fewer samples than a
            batch; the batch cannot be divided by the processes; labels are out of range; or `out`
            holds a checkpoint of another training, or broken ones alone.
        RuntimeError: the loss was not finite; the last checkpoint is still there.
        ModuleNotFoundError: accelerate or tqdm is not installed.
    """
    # More than 60 lines, because most of them say what the arguments are.
    model = uncompiled(model)
    reduction = reduction_of(model) if reduction is None else reduction
    _check(recipe, reduction, len(data), every)
    with ExitStack() as stack:
        accelerator = stack.enter_context(_accelerator(recipe))
        share = _share(recipe, accelerator.num_processes)
        pinned = checkpoints.pins(model, reduction, recipe, data, task, collate)
        state = None if fresh else checkpoints.last_state(out)
        if state is not None:
            checkpoints.compare(out, pinned, model)
        accelerator.wait_for_everyone()  # nobody writes before all have read

        teacher = teacher_of(model, reduction, recipe) if recipe.teaches else None
        trained = stack.enter_context(prepared(model, reduction, recipe))
        optimizer = torch.optim.AdamW(groups(trained, recipe))
        wrapped, optimizer = accelerator.prepare(trained, optimizer)
        if teacher is not None:
            teacher.to(accelerator.device)
        noise = _noise(stack, trained, recipe, accelerator.device)
        parts = trained, wrapped, teacher, optimizer, noise
        run = Run(recipe, accelerator, *parts, task, collate, share, workers)
        first = 0 if state is None else checkpoints.load(state, run)
        main = accelerator.is_main_process
        log, checks = (
            stack.enter_context(table(out / name, first, main))
            for name in ("log.csv", "validation.csv")
        )
        if main:
            checkpoints.begin(out, pinned, first)
        per_epoch = len(data) // recipe.batch
        loop = _Loop(run, data, validate, out, every, on_step, first, per_epoch, log, checks)
        loop.go(stack.enter_context(_progress(loop.total, first, bar and main)))
        accelerator.wait_for_everyone()
        if main:
            checkpoints.finish(out, model, reduction, recipe)
        accelerator.wait_for_everyone()
    rows, checked = read_table(out / "log.csv"), read_table(out / "validation.csv")
    last = checked[-1] if checked else {}
    return Fitted(loop.total, first, rows[-1], last.get("accuracy"), last.get("tokens"))


@dataclass(frozen=True)
class _Loop:
    """All steps of a training, and what is written after each.

    Attributes:
        run: how one step is made.
        data, validate, out, every, on_step: see `fit`.
        first: how many steps were made before.
        per_epoch: steps of an epoch.
        log, checks: add a row to the tables of steps and of validations.
    """

    run: Run
    data: TrainingSamples
    validate: TrainingSamples | None
    out: Path
    every: int
    on_step: Callable[[int, Mapping[str, float | int]], None] | None
    first: int
    per_epoch: int
    log: Callable[[Mapping[str, float | int]], None]
    checks: Callable[[Mapping[str, float | int]], None]

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.run.recipe.epochs * self.per_epoch

    def go(self, bar: Any) -> None:
        """Makes all steps that are left, and shows them on a progress bar."""
        for epoch in range(self.first // self.per_epoch, self.run.recipe.epochs):
            self.run.wrapped.train()
            begin = epoch * self.per_epoch
            batches = self.run.batches(self.data, epoch, max(self.first - begin, 0), self.per_epoch)
            for step in range(max(self.first, begin), begin + self.per_epoch):
                row = self._step(step, epoch, batches)
                self.log(row)
                kept = [value for name, value in row.items() if name.startswith("kept_")]
                shown = f", keeps {sum(kept) / len(kept):.0%}" if kept else ""
                bar.set_postfix_str(f"loss {row['loss']:.4g}{shown}", refresh=False)
                bar.update()
                self._after(step, epoch)
                if self.on_step is not None:
                    self.on_step(step + 1, row)

    def _step(self, step: int, epoch: int, batches: Iterator[Any]) -> dict[str, float | int]:
        """Makes one step, counted from 0, and returns its row of the log."""
        run, recipe = self.run, self.run.recipe
        since = time.perf_counter()
        factor = factor_at(step, self.total, recipe.warmup)
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        terms = run.step(step, batches)
        images = recipe.batch / (time.perf_counter() - since)
        return {
            "step": step + 1,
            "epoch": epoch + 1,
            "lr": factor * (recipe.gate_lr if recipe.frozen else recipe.lr),
            **terms,
            "images_per_second": images,
        }

    def _after(self, step: int, epoch: int) -> None:
        """Calibrates, validates and writes a checkpoint, if it is time after this step."""
        run, accelerator = self.run, self.run.accelerator
        ends = (step + 1) % self.per_epoch == 0
        if step + 1 == self.total:
            run.calibrate(self.data)
        if ends and self.validate is not None:
            self.checks({"step": step + 1, "epoch": epoch + 1, **run.validate(self.validate)})
        if ends or (step + 1) % self.every == 0:
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                checkpoints.save(self.out, step + 1, run)


def _check(recipe: Recipe, reduction: Any, samples: int, every: int) -> None:
    """Raises where a recipe cannot be followed.

    Raises:
        ValueError: it needs gates, and there are none; or there is less than one batch of samples,
            or less than one step between checkpoints.
    """
    gates = getattr(reduction, "gates", None)
    if recipe.frozen and gates is None:
        raise ValueError(
            "frozen trains gates alone, and there are none: apply a method that learns (svit, "
            "dynamicvit), or train the model"
        )
    if recipe.distill and gates is None:
        raise ValueError("distill compares tokens that gates have kept, and there are no gates")
    if samples < recipe.batch:
        raise ValueError(
            f"data holds {samples} samples, fewer than a batch of {recipe.batch}"
            if samples
            else "data is empty"
        )
    if every < 1:
        raise ValueError(f"every must be at least 1 step, not {every}")


def _share(recipe: Recipe, processes: int) -> int:
    """How many samples of each part of a batch each process has.

    Raises:
        ValueError: they cannot be divided evenly.
    """
    share, left = divmod(recipe.batch // recipe.accumulate, processes)
    if left:
        raise ValueError(
            f"a batch of {recipe.batch} in {recipe.accumulate} part"
            f"{'s'[: recipe.accumulate > 1]} cannot be divided by {processes} processes"
        )
    return share


def _noise(stack: ExitStack, trained: Trained, recipe: Recipe, device: torch.device) -> Noise:
    """The noise of the gates. It is in place, and the global random streams of PyTorch are kept,
    until the stack is closed."""
    noise = Noise(recipe.seed, recipe.batch)
    if trained.gates is not None:
        stack.enter_context(noisy(trained.reduction, noise))
    stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
    return noise


def _progress(total: int, first: int, shown: bool) -> Any:
    """A progress bar over all steps."""
    tqdm = require("tqdm", "train").tqdm
    return tqdm(total=total, initial=first, desc="training", unit="step", disable=not shown)


@contextmanager
def _accelerator(recipe: Recipe) -> Iterator[Any]:
    """accelerate's `Accelerator`, for the length of a training."""
    accelerate = require("accelerate", "train")
    state = require("accelerate.state", "train").AcceleratorState
    # There is only one state in a process, and somebody may have one with another precision.
    former = dict(state._shared_state)
    state._reset_state()
    # Some models have parameters that classification does not reach. A frozen model has none.
    wrapping = accelerate.DistributedDataParallelKwargs(find_unused_parameters=not recipe.frozen)
    try:
        yield accelerate.Accelerator(
            cpu=on_cpu(), mixed_precision=recipe.precision, kwargs_handlers=[wrapping]
        )
    finally:
        state._reset_state()
        state._shared_state.update(former)
