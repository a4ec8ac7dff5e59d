"""One step of a training, and what is measured between epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokred.data.inputs import call
from tokred.data.processes import num_processes, summed
from tokred.engine.layout import Layout
from tokred.engine.observing import Record
from tokred.measure.calibration import calibrate
from tokred.optional import require
from tokred.reducers import varies
from tokred.training.batches import Seeded, TrainingSamples, order, split
from tokred.training.losses import (
    check_labels,
    cross_entropy,
    kl_loss,
    rate_loss,
    scores_of,
    token_loss,
)
from tokred.training.noise import Noise
from tokred.training.recipe import Recipe
from tokred.training.seeds import seed_of
from tokred.training.trained import Teacher, Trained


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step.

    Attributes:
        recipe, task, collate, workers: see `fit`.
        accelerator: of accelerate.
        trained, wrapped: the model with its gates; the same as accelerate wraps it.
        teacher: the dense model, if the recipe has it teach.
        optimizer: as accelerate wraps it.
        noise: of the gates.
        share: how many samples of each part of a batch this process has.
    """

    recipe: Recipe
    accelerator: Any
    trained: Trained
    wrapped: nn.Module
    teacher: Teacher | None
    optimizer: Any
    noise: Noise
    task: Callable[[Any, Any], Tensor] | None
    collate: Callable[[list[Any]], Any]
    share: int
    workers: int

    def batches(
        self, data: TrainingSamples, epoch: int, first: int, per_epoch: int
    ) -> Iterator[Any]:
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

    def _loader(self, data: TrainingSamples, epoch: int, parts: list[list[int]]) -> Any:
        """Loads batches of samples with these numbers."""
        return DataLoader(
            Seeded(data, self.recipe.seed, epoch),
            batch_sampler=parts,
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            # It draws seeds for its workers, which must not come from the global random stream.
            generator=torch.Generator().manual_seed(0),
        )

    def _row(self, part: int) -> int:
        """Where, in the whole batch, this process's samples of a part begin."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        return int((part * processes + process) * self.share)

    def step(self, step: int, batches: Iterator[Any]) -> dict[str, float]:
        """Makes one step of the optimizer. Returns the terms of the loss, the shares of tokens that
        gates have kept and the norm of the gradient, as means over all processes.

        Raises:
            RuntimeError: the loss or its gradient is not finite; weights are as they were.
        """
        recipe, accelerator = self.recipe, self.accelerator
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for part in range(recipe.accumulate):
            batch = next(batches)
            rows = self._row(part)
            self.noise.place(step, rows, self.share)
            torch.manual_seed(seed_of(recipe.seed, "step", step, part, accelerator.process_index))
            last = part == recipe.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                terms = self.losses(batch)
                accelerator.backward(terms["loss"] / recipe.accumulate)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / recipe.accumulate
        # Called even if nothing is clipped, because it returns the norm.
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.clip or math.inf)
        every = summed(torch.stack(list(sums.values()))) / num_processes()
        values = torch.cat([every, norm.detach().float()[None].to(every.device)]).tolist()
        found = dict(zip([*sums, "grad_norm"], values, strict=True))
        # In float16 a gradient may overflow now and then; accelerate skips such a step.
        finite = math.isfinite(found["grad_norm"]) or recipe.precision == "fp16"
        if not (math.isfinite(found["loss"]) and finite):
            what = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            raise RuntimeError(
                f"the loss of step {step + 1} is not finite ({what}): lower lr or gate_lr, or "
                "raise the precision. The last checkpoint is as it was"
            )
        self.optimizer.step()
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

    def calibrate(self, data: TrainingSamples) -> None:
        """Calibrates gates that decide how many tokens they keep, see `Recipe`. Every process does
        so, on the same samples."""
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

    def validate(self, data: TrainingSamples) -> dict[str, float]:
        """The share of labels that the model predicts ("accuracy"), and with a reduction the mean
        number of patch tokens in a layer ("tokens"), over the samples of all processes. The model
        is in evaluation mode, in which tokens are left out and not only masked."""
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
            sums = summed(sums.float().to(accelerator.device))  # not every device has float64
        correct, labels, tokens, samples = sums.tolist()
        used = {} if reduction is None else {"tokens": tokens / max(samples, 1)}
        return {"accuracy": correct / max(labels, 1), **used}


def usage(records: Sequence[Record], layout: Layout, batch: int) -> Float[Tensor, "layers batch"]:
    """How many patch tokens each image has in each layer.

    Args:
        records: what was recorded in one pass.
        layout: of the model.
        batch: images of that pass.
    """
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
            if not record.around:  # around a layer: behind it there are all tokens again
                now = here
        by_layer[layer] = here
    return torch.stack(list(by_layer.values()))
