"""`tokred train`: fine-tunes a model that runs on fewer tokens, and trains gates that choose them.

    model = timm.create_model("deit_small_patch16_224", pretrained=True)
    tokred.apply(model, "svit", keep_rate=0.7)
    training.fit(model, data, training.recipes["svit"], Path("trained"), validate=held_out)

The losses are those of SViT and of DynamicViT (`rate_loss`, `kl_loss`, `token_loss`). The same loop
fine-tunes a model in which tokens are merged, and trains one from nothing.

Everything random is a function of the seed and of where in the training it happens: the order of
the samples of (seed, epoch), what is done to a sample of (seed, epoch, sample), noise in gates of
(seed, step, layer, place in the batch). So training that was stopped goes on as if it had not been,
and any number of processes trains on the same batches with the same noise. (Dropout inside of the
model is of (seed, step, process): its masks differ with the number of processes.)

Needs `pip install "tokred[train]"`.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from tokred.data.inputs import call
from tokred.engine.layout import Layout
from tokred.engine.observing import Record
from tokred.host import find_host
from tokred.measure.calibration import calibrate
from tokred.optional import require
from tokred.patching import reduction_of, remove, uncompiled
from tokred.reducers import varies
from tokred.training.losses import (
    check_labels,
    cross_entropy,
    kl_loss,
    over_processes,
    rate_loss,
    scores_of,
    token_loss,
    weighted_mean,
)

__all__ = [
    "Fitted",
    "Recipe",
    "Samples",
    "cross_entropy",
    "fit",
    "kl_loss",
    "over_processes",
    "plot",
    "rate_loss",
    "recipes",
    "token_loss",
    "weighted_mean",
]

KEPT_CHECKPOINTS = 2
"""How many there are at a time."""

CURVE = "curve.png"


@dataclass(frozen=True)
class Recipe:
    """All that a result depends on, besides model, method and data.

    Args:
        epochs: how often every sample is seen.
        batch: samples of a step, of all processes together. What is left of an epoch is left out.
        lr: of the model, after warm-up; it then falls to nothing as a cosine, step by step.
        gate_lr: the same of the gates.
        weight_decay: of AdamW; parameters with one axis, and those that the model names in
            `no_weight_decay()`, have none.
        warmup: the share of all steps in which learning rates rise.
        clip: the largest norm of the gradient; None for any.
        accumulate: into so many parts a batch is divided, one after the other, where it does not
            fit into memory. The dynamic rate loss then averages over a part.
        precision: "no", "bf16" or "fp16", as accelerate has it.
        frozen: train the gates alone. The model stays as it is to the bit, and has no dropout.
        rate: weight of `rate_loss`, lambda of SViT.
        per_image: see `rate_loss`.
        kl: weight of `kl_loss`.
        distill: weight of `token_loss`.
        label_smoothing, ignore_index: see `cross_entropy`.
        calibrate: the number of samples on which gates that decide by themselves are set to their
            targets when training is over (`tokred.calibrate`), all at once; 0 leaves them. What
            gates keep by lot while they train need not be what they keep when the better of two
            logits decides.
        seed: where everything random starts.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int = 30
    batch: int = 64
    lr: float = 1e-5
    gate_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float | None = 1.0
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    frozen: bool = False
    rate: float = 4.0
    per_image: bool = False
    kl: float = 0.0
    distill: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    calibrate: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "gate_lr", "weight_decay", "rate", "kl", "distill", "calibrate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, or None, not {self.clip}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be 'no', 'bf16' or 'fp16', not {self.precision!r}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate must divide the batch, {self.batch}; {self.accumulate} does not"
            )

    @property
    def teaches(self) -> bool:
        """Whether there is a dense teacher."""
        return self.kl > 0 or self.distill > 0


recipes: dict[str, Recipe] = {
    "svit": Recipe(rate=4.0),
    "dynamicvit": Recipe(rate=2.0, per_image=True, kl=0.5, distill=0.5),
}
"""What the papers weigh losses with."""


@runtime_checkable
class Samples(Protocol):
    """What is trained on: (inputs, targets), or a dict with "labels" among what the model takes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


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
        pinned = _pins(model, reduction, recipe, len(data))
        checkpoint = None if fresh else latest(out)
        if checkpoint is not None:
            _compare(out, pinned)
        accelerator.wait_for_everyone()  # nobody writes before all have read

        teacher = _teacher(model, reduction, recipe) if recipe.teaches else None
        trained = stack.enter_context(_trained(model, reduction, recipe))
        optimizer = torch.optim.AdamW(_groups(trained, recipe))
        wrapped, optimizer = accelerator.prepare(trained, optimizer)
        if teacher is not None:
            teacher.to(accelerator.device)
        noise = Noise(recipe.seed, recipe.batch)
        if gates is not None:
            stack.enter_context(_noise(reduction, noise))
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))

        first = 0 if checkpoint is None else _load(checkpoint, trained, optimizer, accelerator)
        total = recipe.epochs * per_epoch
        log = stack.enter_context(_table(out / "log.csv", first, accelerator.is_main_process))
        checks = stack.enter_context(
            _table(out / "validation.csv", first, accelerator.is_main_process)
        )
        if accelerator.is_main_process:
            _begin(out, pinned, first)
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
        run = _Run(
            recipe, accelerator, wrapped, trained, teacher, task, collate, noise, share, workers
        )
        for epoch in range(first // per_epoch, recipe.epochs):
            wrapped.train()
            begin = epoch * per_epoch
            batches = run.batches(data, epoch, max(first - begin, 0), per_epoch)
            for step in range(max(first, begin), begin + per_epoch):
                since = time.perf_counter()
                factor = _factor(step, total, recipe.warmup)
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
                        _save(out, step + 1, trained, optimizer, accelerator)
                if on_step is not None:
                    on_step(step + 1, row)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _finish(out, model, reduction, recipe)
        accelerator.wait_for_everyone()
    rows, checked = read_table(out / "log.csv"), read_table(out / "validation.csv")
    last = checked[-1] if checked else {}
    return Fitted(total, first, rows[-1], last.get("accuracy"), last.get("tokens"))


# A step


@dataclass(frozen=True)
class _Run:
    """What stays the same from step to step."""

    recipe: Recipe
    accelerator: Any
    wrapped: nn.Module
    trained: Trained
    teacher: Teacher | None
    task: Callable[[Any, Any], Tensor] | None
    collate: Callable[[list[Any]], Any]
    noise: Noise
    share: int
    workers: int

    def batches(self, data: Samples, epoch: int, first: int, per_epoch: int) -> Iterator[Any]:
        """This process's share of each part of each batch of an epoch, from step `first` on."""
        recipe = self.recipe
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        numbers = order(len(data), recipe.seed, epoch)
        parts = []
        for step in range(first, per_epoch):
            for part in range(recipe.accumulate):
                begin = step * recipe.batch + self._row(part)
                parts.append(numbers[begin : begin + self.share])
        return iter(self._loader(data, epoch, parts))

    def _loader(self, data: Samples, epoch: int, parts: list[list[int]]) -> Any:
        return DataLoader(
            Seeded(data, self.recipe.seed, epoch),
            batch_sampler=parts,
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            # Seeds of workers, which samples do not use, must not come from the global stream.
            generator=torch.Generator().manual_seed(0),
        )

    def _row(self, part: int) -> int:
        """The place in the whole batch of the first sample of this process in a part."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        return int((part * processes + process) * self.share)

    def step(self, step: int, batches: Iterator[Any], optimizer: Any) -> dict[str, float]:
        """One step of the optimiser; returns its terms, as means over all processes.

        Raises:
            RuntimeError: the loss or its gradient is not finite; weights are as they were.
        """
        recipe, accelerator = self.recipe, self.accelerator
        optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for part in range(recipe.accumulate):
            batch = next(batches)
            rows = self._row(part)
            self.noise.place(step, rows, self.share)
            torch.manual_seed(_seed(recipe.seed, "step", step, part, accelerator.process_index))
            last = part == recipe.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                terms = self.losses(batch)
                accelerator.backward(terms["loss"] / recipe.accumulate)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / recipe.accumulate
        # Always, for the sake of the norm.
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.clip or math.inf)
        every = torch.stack(list(sums.values()))
        if accelerator.num_processes > 1:
            dist.all_reduce(every)
            every = every / accelerator.num_processes
        values = torch.cat([every, norm.detach().float()[None].to(every.device)]).tolist()
        found = dict(zip([*sums, "grad_norm"], values, strict=True))
        # In float16 gradients overflow now and then, and accelerate leaves such a step out.
        finite = math.isfinite(found["grad_norm"]) or recipe.precision == "fp16"
        if not (math.isfinite(found["loss"]) and finite):
            what = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            raise RuntimeError(
                f"the loss of step {step + 1} is not finite ({what}): lower lr or gate_lr, or "
                "raise the precision. The last checkpoint is as it was"
            )
        optimizer.step()
        return found

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The terms of the loss of this process's share of a batch, and the share of tokens that
        each gate has kept."""
        recipe, reduction = self.recipe, self.trained.reduction
        inputs, targets = split(batch)
        on_host = targets
        send = require("accelerate.utils", "train").send_to_device
        inputs, targets = (
            send(given, self.accelerator.device, non_blocking=True) for given in (inputs, targets)
        )
        outputs, decisions, tokens = self.wrapped(inputs)
        if self.task is not None:
            terms = {"task": self.task(outputs, targets)}
        else:
            if not on_host.is_floating_point():
                check_labels(on_host, scores_of(outputs).shape[1], recipe.ignore_index)
            found = cross_entropy(outputs, targets, recipe.label_smoothing, recipe.ignore_index)
            terms = {"task": found}
        loss = terms["task"]
        if decisions:
            terms["rate"] = rate_loss(decisions, reduction.targets, recipe.per_image)
            loss = loss + recipe.rate * terms["rate"]
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                taught, theirs = self.teacher(inputs)
            if recipe.kl:
                terms["kl"] = kl_loss(scores_of(outputs), scores_of(taught))
                loss = loss + recipe.kl * terms["kl"]
            if recipe.distill:
                assert tokens is not None and theirs is not None
                terms["distill"] = token_loss(tokens, theirs, decisions[max(decisions)])
                loss = loss + recipe.distill * terms["distill"]
        kept = {f"kept_{layer}": mask.detach().float().mean() for layer, mask in decisions.items()}
        return {"loss": loss, **terms, **kept}

    def calibrate(self, data: Samples) -> None:
        """Sets gates that decide by themselves to their targets, see `Recipe`: in every process, on
        the same samples."""
        gates, reduction = self.trained.gates, self.trained.reduction
        number = min(self.recipe.calibrate, len(data))
        if gates is None or number == 0 or not varies(reduction.reducer):
            return
        chosen = order(len(data), self.recipe.seed, -1)[:number]
        (batch,) = self._loader(data, -1, [chosen])
        send = require("accelerate.utils", "train").send_to_device
        self.wrapped.eval()
        with self.accelerator.autocast():
            calibrate(self.trained.model, send(split(batch)[0], self.accelerator.device))
        self.wrapped.train()

    def validate(self, data: Samples) -> dict[str, float]:
        """The share of labels that the model tells right ("accuracy"), and with a reduction the
        mean number of patch tokens in a layer ("tokens"), over all samples and processes. In
        evaluation mode: tokens are really left out."""
        recipe, accelerator, reduction = self.recipe, self.accelerator, self.trained.reduction
        mine = list(range(accelerator.process_index, len(data), accelerator.num_processes))
        parts = [mine[at : at + self.share] for at in range(0, len(mine), self.share)]
        sums = torch.zeros(4, dtype=torch.float64)
        self.wrapped.eval()
        send = require("accelerate.utils", "train").send_to_device
        for batch in self._loader(data, -1, parts):
            inputs, targets = (send(given, accelerator.device) for given in split(batch))
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(accelerator.autocast())
                records: list[Record] = []
                if reduction is not None:
                    records = stack.enter_context(reduction.recording())
                scores = scores_of(call(self.trained.model, inputs))
            if targets.is_floating_point():
                targets = targets.argmax(1)
            if targets.ndim == 3 and scores.shape[2:] != targets.shape[1:]:
                scores = nn.functional.interpolate(
                    scores, size=targets.shape[1:], mode="bilinear", align_corners=False
                )
            valid = targets != recipe.ignore_index
            right = (scores.argmax(1) == targets) & valid
            tokens = 0.0
            if reduction is not None:
                tokens = float(usage(records, reduction.layout, len(targets)).mean(0).sum())
            sums += torch.tensor(
                [float(right.sum()), float(valid.sum()), tokens, len(targets)], dtype=torch.float64
            )
        self.wrapped.train()
        if accelerator.num_processes > 1:
            sums = sums.float().to(accelerator.device)  # not every device has float64
            dist.all_reduce(sums)
        correct, labels, tokens, samples = sums.tolist()
        used = {} if reduction is None else {"tokens": tokens / max(samples, 1)}
        return {"accuracy": correct / max(labels, 1), **used}


def split(batch: Any) -> tuple[Any, Any]:
    """A batch as (inputs, targets).

    Raises:
        ValueError: it has another form.
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"a batch that is a mapping must have 'labels'; it has {[*batch]}")
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        "a batch must be (inputs, targets), or a mapping with 'labels', not a "
        f"{type(batch).__qualname__}: give `collate=`"
    )


def usage(records: Sequence[Record], layout: Layout, batch: int) -> Float[Tensor, "layers batch"]:
    """How many patch tokens each image has in each layer, from what was recorded in one pass."""
    full = records[0].before if records else layout.patches
    now = torch.full((batch,), float(full))
    by_layer = {}
    for layer in range(layout.layers):
        here = now
        for record in (record for record in records if record.layer == layer):
            if record.map is None:
                here = now = torch.full((batch,), float(record.after))
                continue
            labels = record.map.labels()
            here = (labels.max(1).values + 1).float().cpu().expand(batch)
            if not record.around:  # else there are all tokens again behind it
                now = here
        by_layer[layer] = here
    return torch.stack(list(by_layer.values()))


# What is trained


class Trained(nn.Module):
    """A model and its gates as one module, so that what wraps it (DistributedDataParallel) sees the
    parameters of both, and all that losses are made of comes out of its forward."""

    def __init__(
        self,
        model: nn.Module,
        reduction: Any,
        frozen: bool = False,
        blocks: Sequence[nn.Module] = (),
        last: LastTokens | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.gates: nn.Module | None = getattr(reduction, "gates", None)
        self.reduction = reduction
        self.frozen = frozen
        self.last = last
        self._blocks = tuple(blocks)  # of the model; a tuple does not register them again

    def forward(self, inputs: Any) -> tuple[Any, dict[int, Tensor], Tensor | None]:
        """What the model gives, what its gates have decided, and the patch tokens that have left
        its last block, if somebody wants them."""
        outputs = call(self.model, inputs)
        decisions = {} if self.gates is None else dict(self.reduction.decisions)
        return outputs, decisions, None if self.last is None else self.last.taken()

    def train(self, mode: bool = True) -> Trained:
        """In training, a frozen model is in evaluation mode (no dropout, no new statistics) but for
        the blocks themselves, which go by theirs whether tokens are masked or left out."""
        super().train(mode)
        if mode and self.frozen:
            self.model.eval()
            for block in self._blocks:
                block.training = True
        return self


@contextmanager
def _trained(model: nn.Module, reduction: Any, recipe: Recipe) -> Iterator[Trained]:
    """The model made ready; afterwards all but its weights is as it was."""
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    gates = getattr(reduction, "gates", None)
    of_gates = gates.training if gates is not None else False
    blocks: Sequence[nn.Module] = ()
    last = None
    try:
        if recipe.frozen:
            model.requires_grad_(False)
            host, tower = find_host(model)
            blocks = host.at(tower, host.applied_to(tower)).blocks(tower)
        if recipe.distill:
            last = LastTokens(model, reduction.layout)
        yield Trained(model, reduction, recipe.frozen, blocks, last)
    finally:
        if last is not None:
            last.handle.remove()
        for name, p in model.named_parameters():
            p.requires_grad_(wanted[name])
            p.grad = None
        for module, mode in modes.items():
            module.training = mode
        if gates is not None:
            gates.train(of_gates)
            for p in gates.parameters():
                p.grad = None


class LastTokens:
    """Sees the patch tokens that leave the last block of a model."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        host, tower = find_host(model)
        self.layout = layout
        self.seen: list[Tensor] = []
        self.handle = host.blocks(tower)[-1].register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen = [output[0] if isinstance(output, tuple) else output]

    def taken(self) -> Float[Tensor, "batch tokens dim"]:
        """Those of the last pass.

        Raises:
            ValueError: they are no sequence of tokens.
        """
        (x,), self.seen = self.seen, []
        if x.ndim != 3:
            raise ValueError(
                f"distill compares tokens [batch, tokens, dim]; blocks of this model put out "
                f"{x.ndim} axes: set distill to 0"
            )
        return x[:, self.layout.prefix : x.shape[1] - self.layout.suffix]


class Teacher:
    """The model as it was, with all of its tokens."""

    def __init__(self, model: nn.Module, last: LastTokens | None) -> None:
        self.model, self.last = model, last

    def to(self, device: torch.device) -> None:
        """Moves it."""
        self.model.to(device)

    def __call__(self, inputs: Any) -> tuple[Any, Tensor | None]:
        outputs = call(self.model, inputs)
        return outputs, None if self.last is None else self.last.taken()


def _teacher(model: nn.Module, reduction: Any, recipe: Recipe) -> Teacher:
    dense = copy.deepcopy(model)
    remove(dense)
    dense.eval().requires_grad_(False)
    return Teacher(dense, LastTokens(dense, reduction.layout) if recipe.distill else None)


def _groups(trained: Trained, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay."""
    spared: Any = getattr(trained.model, "no_weight_decay", set)()
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for part, lr in ((trained.model, recipe.lr), (trained.gates, recipe.gate_lr)):
        for name, p in [] if part is None else part.named_parameters():
            if p.requires_grad:
                decayed = p.ndim > 1 and not (part is trained.model and name in spared)
                key = (lr, recipe.weight_decay if decayed else 0.0)
                found.setdefault(key, []).append(p)
    if not found:
        raise ValueError("nothing is to be trained: no parameter of the model requires a gradient")
    return [
        {"params": params, "lr": lr, "peak": lr, "weight_decay": decay}
        for (lr, decay), params in found.items()
    ]


def _factor(step: int, total: int, warmup: float) -> float:
    """What the learning rate is multiplied with at a step, from 0: a line up, a cosine down."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))


# Randomness


def _seed(*where: object) -> int:
    """A number that differs for every place in the training."""
    digest = hashlib.blake2b(repr(where).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def order(samples: int, seed: int, epoch: int) -> list[int]:
    """The numbers of all samples as an epoch, from 0, goes through them."""
    generator = torch.Generator().manual_seed(_seed(seed, "order", epoch))
    found: list[int] = torch.randperm(samples, generator=generator).tolist()
    return found


@dataclass
class Noise:
    """Gumbel noise for gates: drawn for the whole batch, so that each sample has the same however
    many processes there are, and on the CPU, so that it is the same on every device."""

    seed: int
    batch: int
    step: int = 0
    row: int = 0
    rows: int = 0

    def place(self, step: int, row: int, rows: int) -> None:
        """Says which rows of which batch come next."""
        self.step, self.row, self.rows = step, row, rows

    def __call__(
        self, layer: int, logits: Float[Tensor, "rows tokens 2"]
    ) -> Float[Tensor, "rows tokens 2"]:
        """The noise of the rows that are running."""
        if logits.shape[0] != self.rows:
            raise ValueError(
                f"the model makes {logits.shape[0]} rows of tokens of {self.rows} samples: noise "
                "would depend on the number of processes"
            )
        generator = torch.Generator().manual_seed(_seed(self.seed, "gate", self.step, layer))
        drawn = torch.empty(self.batch, *logits.shape[1:]).exponential_(generator=generator)
        mine = drawn[self.row : self.row + self.rows].to(logits.device)
        return -mine.clamp_min(torch.finfo(mine.dtype).tiny).log().to(logits.dtype)


@contextmanager
def _noise(reduction: Any, noise: Noise) -> Iterator[None]:
    former, reduction.noise = reduction.noise, noise
    try:
        yield
    finally:
        reduction.noise = former


class Seeded(Dataset[Any]):
    """Samples, each of which finds the global random streams seeded by (seed, epoch, its number),
    whoever fetches it."""

    def __init__(self, data: Samples, seed: int, epoch: int) -> None:
        self.data, self.seed, self.epoch = data, seed, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        with seeded(_seed(self.seed, "sample", self.epoch, index)):
            return self.data[index]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random streams of the CPU, seeded for the length of a block."""
    # Transforms of images draw from all three, and most cannot be given a generator.
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


# Processes and files


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


def _pins(model: nn.Module, reduction: Any, recipe: Recipe, samples: int) -> dict[str, Any]:
    """What a training that goes on has to have in common with its beginning, as JSON has it."""
    found: dict[str, Any] = {
        "recipe": asdict(recipe),
        "model": type(model).__qualname__,
        "method": "none" if reduction is None else str(reduction),
        "samples": samples,
    }
    if recipe.frozen or recipe.teaches:  # weights that no checkpoint holds
        found["weights"] = _fingerprint(model)
    as_read: dict[str, Any] = json.loads(json.dumps(found))
    return as_read


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _compare(out: Path, pinned: Mapping[str, Any]) -> None:
    """Raises where a checkpoint is of another training.

    Raises:
        ValueError: naming what differs.
    """
    file = out / "recipe.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    differences = []
    for name, now in pinned.items():
        was = before.get(name)
        if name == "recipe" and isinstance(was, dict):
            fields = [*now, *(field for field in was if field not in now)]
            differences += [
                f"{field} was {was.get(field)!r}, and is {now.get(field)!r}"
                for field in fields
                if was.get(field) != now.get(field)
            ]
        elif was != now:
            differences.append(f"{name} was {was!r}, and is {now!r}")
    if differences:
        raise ValueError(
            f"{out} holds a checkpoint of another training: {'; '.join(differences)}. Give another "
            "folder, the values from before, or fresh (--fresh), which starts anew"
        )


def latest(out: Path) -> Path | None:
    """The last checkpoint in a folder; None if there is none."""
    return max((out / "checkpoint").glob("step-*.pt"), default=None)


def _begin(out: Path, pinned: Mapping[str, Any], first: int) -> None:
    """Takes away what is of a later step than the one that is gone on from, or of none."""
    folder = out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("step-*"):
        if file.suffix == ".part" or int(file.stem.removeprefix("step-")) > first:
            file.unlink()
    _write(out / "recipe.json", json.dumps(pinned, indent=1))


def _save(out: Path, step: int, trained: Trained, optimizer: Any, accelerator: Any) -> None:
    """Writes a checkpoint, under another name first: one that is there is whole.

    Not by `Accelerator.save_state`: of several processes that writes the names of
    DistributedDataParallel, with which no other number of processes could go on.
    """
    state = {
        "step": step,
        "weights": _kept(trained).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }
    file = out / "checkpoint" / f"step-{step:08d}.pt"
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)
    for old in sorted(file.parent.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
        old.unlink()


def _load(file: Path, trained: Trained, optimizer: Any, accelerator: Any) -> int:
    """Reads a checkpoint, and returns how many steps it has behind it."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    _kept(trained).load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _kept(trained: Trained) -> nn.Module:
    """What a checkpoint holds: a frozen model would be the same in all of them."""
    if trained.frozen:
        assert trained.gates is not None
        return trained.gates
    return trained


def _finish(out: Path, model: nn.Module, reduction: Any, recipe: Recipe) -> None:
    if getattr(reduction, "gates", None) is not None:
        part = out / "gates.part"
        reduction.save(part)
        part.replace(out / "gates.safetensors")
    if not recipe.frozen:
        part = out / "model.part"
        require("safetensors.torch", "train").save_model(model, str(part))
        part.replace(out / "model.safetensors")
    try:
        require("matplotlib", "plots")
    except ModuleNotFoundError:
        return
    plot(out)


@contextmanager
def _table(
    file: Path, first: int, writes: bool
) -> Iterator[Callable[[Mapping[str, float | int]], None]]:
    """Adds rows to a CSV file, in which those after step `first` are taken out before."""
    if not writes:
        yield lambda row: None
        return
    kept = [row for row in _rows(file) if int(row["step"]) <= first]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerows([list(kept[0])] if kept else [])
        writer.writerows(list(row.values()) for row in kept)
    part.replace(file)
    with file.open("a", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")

        def add(row: Mapping[str, float | int]) -> None:
            if opened.tell() == 0:
                writer.writerow(row)
            writer.writerow(row.values())
            opened.flush()

        yield add
    if file.stat().st_size == 0:
        file.unlink()


def read_table(file: Path) -> list[dict[str, float]]:
    """The rows of `log.csv` or `validation.csv`; none if it is not there."""
    return [{name: float(value) for name, value in row.items()} for row in _rows(file)]


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    # Of a process that was killed while it wrote, the last row may be in part.
    return [row for row in rows if None not in row.values()]


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def plot(out: Path) -> Path:
    """Draws `curve.png` from the tables in a folder, while training runs or afterwards: losses, the
    share of tokens that gates keep, and what validation found, over the steps.

    Raises:
        ValueError: nothing was logged.
        ModuleNotFoundError: Matplotlib is not installed.
    """
    rows, checks = read_table(out / "log.csv"), read_table(out / "validation.csv")
    if not rows:
        raise ValueError(f"there is no log in {out}")
    kept = [name for name in rows[0] if name.startswith("kept_")]
    number = 1 + bool(kept) + bool(checks)
    figure = require("matplotlib.figure", "plots").Figure((5.5 * number, 4.5), layout="constrained")
    losses, *others = figure.subplots(1, number, squeeze=False)[0]
    steps = [row["step"] for row in rows]
    for name in ("loss", "task", "rate", "kl", "distill"):
        if name in rows[0]:
            losses.plot(steps, smooth([row[name] for row in rows]), label=name)
    losses.set_ylabel("loss, running mean")
    losses.legend()
    if kept:
        shares = others.pop(0)
        for name in kept:
            label = f"layer {name.removeprefix('kept_')}"
            shares.plot(steps, smooth([100 * row[name] for row in rows]), label=label)
        shares.set_ylabel("tokens kept, running mean, %")
        shares.set_ylim(0, 100)
        shares.legend(ncols=3, fontsize="small")
    if checks:
        (right,) = others
        right.plot(
            [row["step"] for row in checks], [100 * row["accuracy"] for row in checks], marker="o"
        )
        right.set_ylabel("validation accuracy, %")
    for panel in figure.axes:
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    part = (out / CURVE).with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(out / CURVE)
    return out / CURVE


def smooth(values: Sequence[float]) -> list[float]:
    """A running mean over a fiftieth of all values, exponential, unbiased at the beginning."""
    keep = 1 - 1 / max(len(values) / 50, 1)
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(total / weight)
    return found
