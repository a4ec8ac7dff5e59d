"""Scores against labels, by task, through torchmetrics.

What the task is, the labels say: one number for each image is a class; a vector of zeros and ones,
classes of which there may be several; a map of whole numbers, the class of every pixel; a map of
fractions, its depth.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tokred.data.reading import IGNORED
from tokred.measure.fidelity import Decisions
from tokred.optional import require


@dataclass(frozen=True)
class Task:
    """What a model is asked, and how its answers are scored.

    Attributes:
        name: of the task.
        metrics: the names of the scores, the leading one first, with whether more is better.
        unit: of the leading score: "%" or "".
    """

    name: str
    metrics: Mapping[str, bool]
    unit: str = "%"

    @property
    def leading(self) -> str:
        """The score that settings are compared by."""
        return next(iter(self.metrics))


_DEPTH = MappingProxyType({"abs_rel": False, "rmse": False, "delta1": True})
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("classification", MappingProxyType({"top1": True, "top5": True})),
        Task("multilabel", MappingProxyType({"mAP": True})),
        Task("segmentation", MappingProxyType({"mIoU": True, "pixels": True})),
        Task("depth", _DEPTH, ""),
        Task("relative depth", _DEPTH, ""),
    )
}
"""Top-1 and top-5 accuracy; mean average precision over classes that some image has; mean
intersection over union, over classes that are there or are said to be, and share of the pixels;
mean |d - t| / t, root mean square error, and the share of pixels with max(d / t, t / d) < 1.25,
over pixels whose depth is known (above 0, finite). Shares are in percent. "Relative depth" is that
of models which give inverse depths up to scale and shift: those of each image are fitted to the
labels first, and end at twice the largest depth of the image."""


def task_of(targets: Sequence[Tensor], decided: Decisions, model: Any = None) -> Task:
    """The task that these labels belong to.

    Args:
        targets: of a batch.
        decided: what the model said to it.
        model: the model, if it may say that its depths are inverse.

    Raises:
        ValueError: the model's answers do not go with such labels.
    """
    target = targets[0]
    name = _meant(target)
    if name is None:
        raise ValueError(
            "labels must be a class, a vector of zeros and ones, or a map [height, width], not "
            f"{target.dtype} of {tuple(target.shape)}"
        )
    if name == "segmentation" and decided.depth is not None:
        raise ValueError(
            f"labels of whole numbers ({target.dtype}) mean segmentation, and the model answers "
            f"{_in_words(decided)}: give depths as fractions, in the model's unit"
        )
    if not _fits(name, decided):
        raise ValueError(
            f"labels of {tuple(target.shape)} ({target.dtype}) mean {name}, and the model answers "
            f"{_in_words(decided)}: give labelled=False to compare with the dense model alone"
        )
    if name == "depth":
        if getattr(getattr(model, "config", None), "depth_estimation_type", None) == "relative":
            return TASKS["relative depth"]
        _check_unit(targets, decided)
    return TASKS[name]


def _meant(target: Tensor) -> str | None:
    """The task that such a label belongs to; None if there is none."""
    if target.ndim == 0 and not target.is_floating_point():
        return "classification"
    if target.ndim == 1:
        return "multilabel"
    if target.ndim == 2:
        return "depth" if target.is_floating_point() else "segmentation"
    return None


def _fits(name: str, decided: Decisions) -> bool:
    """Whether a model with such answers has this task."""
    if name in ("depth", "relative depth"):
        return decided.depth is not None
    dimensions = 4 if name == "segmentation" else 2
    return decided.scores is not None and decided.scores.ndim == dimensions


def _check_unit(targets: Sequence[Tensor], decided: Decisions) -> None:
    """Refuses millimetres where the model says metres: the scores would mean nothing."""
    assert decided.depth is not None
    true = torch.cat([target[_known(target)].flatten() for target in targets])
    said = decided.depth.float()
    said = said[said > 0]
    if not len(true) or not len(said):
        return
    usual, ours = float(true.median()), float(said.median())
    if not 1 / 50 < usual / ours < 50:
        raise ValueError(
            f"the median depth of labels is {usual:.3g}, and the model says {ours:.3g}: give "
            "depths in the model's unit; if it gives inverse depths up to scale and shift, "
            'task="relative depth"; task="depth" takes them as they are'
        )


def _known(target: Tensor) -> Tensor:
    """The pixels whose depth is known."""
    return (target > 0) & target.isfinite()


def _in_words(decided: Decisions) -> str:
    if decided.depth is not None:
        return f"depths of {tuple(decided.depth.shape)}"
    if decided.scores is not None:
        return f"scores of {tuple(decided.scores.shape)}"
    return "neither classes nor depths"


class Scores:
    """Runs up the scores of a task, batch by batch; over several processes, of all of them.

    Args:
        task: the task.
        decided: what the model said to some batch: how many classes it knows.
        device: where batches come from.

    Raises:
        ValueError: the model's answers do not go with the task.
    """

    def __init__(self, task: Task, decided: Decisions, device: torch.device) -> None:
        metrics = require("torchmetrics", "evaluate")
        if not _fits(task.name, decided):
            raise ValueError(
                f"task must go with what the model answers, {_in_words(decided)}, and is "
                f"{task.name!r}"
            )
        self.task = task
        self.classes = 0
        self.ignored: int | None = None
        made: dict[str, Any]
        if task.name in ("depth", "relative depth"):
            made = {
                "abs_rel": metrics.MeanAbsolutePercentageError(),
                "rmse": metrics.MeanSquaredError(squared=False),
                "delta1": metrics.MeanMetric(),
            }
        else:
            assert decided.scores is not None
            classes = self.classes = decided.scores.shape[1]
            if classes < 2:
                raise ValueError(
                    f"{task.name} needs scores of at least 2 classes, and the model gives "
                    "one: give labelled=False to compare with the dense model alone"
                )
            if task.name == "classification":
                accuracy = metrics.classification.MulticlassAccuracy
                made = {"top1": accuracy(classes, average="micro")}
                if classes > 5:
                    made["top5"] = accuracy(classes, top_k=5, average="micro")
            elif task.name == "multilabel":
                precision = metrics.classification.MultilabelAveragePrecision
                made = {"mAP": precision(classes, average="none")}
            else:
                overlap = metrics.classification.MulticlassJaccardIndex
                accuracy = metrics.classification.MulticlassAccuracy
                ignored = self.ignored = IGNORED if classes <= IGNORED else None
                made = {
                    "mIoU": overlap(classes, average="macro", ignore_index=ignored),
                    "pixels": accuracy(classes, average="micro", ignore_index=ignored),
                }
        # In double, so that the sums of many pixels are exact enough in any order.
        self.metrics = {
            name: metric.to(device).set_dtype(torch.float64) for name, metric in made.items()
        }
        if task.name == "multilabel":
            # It gathers lists; a process without images must have an empty one of the right shape.
            nothing = torch.zeros(0, self.classes, dtype=torch.float64, device=device)
            self._update(nothing, nothing.long())

    def add(self, decided: Decisions, targets: Sequence[Tensor]) -> None:
        """Counts the answers to one batch.

        Raises:
            ValueError: a label is of a class that the model does not know, or of another task.
        """
        name = self.task.name.removeprefix("relative ")
        wrong = next((target for target in targets if _meant(target) != name), None)
        if wrong is not None:
            raise ValueError(
                f"labels of {self.task.name} must not be {wrong.dtype} of {tuple(wrong.shape)}"
            )
        if name == "depth":
            assert decided.depth is not None
            for depth, target in zip(decided.depth, targets, strict=True):
                self._add_depth(depth, target.to(depth.device))
            return
        scores = decided.scores
        assert scores is not None
        if self.task.name == "segmentation":
            for one, target in zip(scores.float(), targets, strict=True):
                self._check(target if self.ignored is None else target[target != self.ignored])
                if one.shape[1:] != target.shape:
                    size = (int(target.shape[0]), int(target.shape[1]))
                    one = F.interpolate(one[None], size, mode="bilinear")[0]
                self._update(one.argmax(0)[None], target.to(one.device)[None].long())
            return
        stacked = torch.stack(list(targets)).to(scores.device)
        if self.task.name == "classification":
            self._check(stacked)
            self._update(scores.float(), stacked.long())
        else:
            if stacked.shape[1] != scores.shape[1]:
                raise ValueError(
                    f"labels must be vectors of {scores.shape[1]} zeros and ones, as the model has "
                    f"classes, not of {stacked.shape[1]}"
                )
            if not ((stacked == 0) | (stacked == 1)).all():
                raise ValueError(
                    f"labels of several classes must be 0 or 1, not from {float(stacked.min()):g} "
                    f"to {float(stacked.max()):g}"
                )
            # Precision asks for their order alone. A sigmoid makes large ones equal.
            x = scores.double().clamp(-1e12, 1e12)
            self._update((x / (1 + x.abs()) + 1) / 2, stacked.long())

    def result(self) -> dict[str, float]:
        """The scores, by name. All processes have to ask for them."""
        found = {}
        for name, metric in self.metrics.items():
            with warnings.catch_warnings():
                # Classes that no image has are left out below.
                warnings.filterwarnings("ignore", message="No positive samples")
                computed: Tensor = metric.compute()
            if name == "mAP":  # of a class that no image has, it is given as 0
                computed = computed[computed > 0].mean()
            x = float(computed) * (1 if name in ("abs_rel", "rmse") else 100)
            # The last digits depend on the order of sums, and that on the number of processes.
            found[name] = float(f"{x:.10g}")
        return found

    def _update(self, scores: Tensor, targets: Tensor) -> None:
        for metric in self.metrics.values():
            metric.update(scores, targets)

    def _check(self, labels: Tensor) -> None:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(
                f"labels must be from 0 to {self.classes - 1}, as the model has {self.classes} "
                f"classes, not from {int(labels.min())} to {int(labels.max())}"
            )

    def _add_depth(
        self, depth: Float[Tensor, "height width"], target: Float[Tensor, "rows columns"]
    ) -> None:
        if depth.shape != target.shape:
            size = (int(target.shape[0]), int(target.shape[1]))
            depth = F.interpolate(depth[None, None].float(), size, mode="bilinear")[0, 0]
        there = _known(target)
        if not there.any():
            return
        found, true = depth[there].double(), target[there].double()
        if self.task.name == "relative depth":
            found = _fitted(found, true)
        self.metrics["abs_rel"].update(found, true)
        self.metrics["rmse"].update(found, true)
        worse = torch.maximum(found / true, true / found.clamp(min=1e-6))
        self.metrics["delta1"].update((worse < 1.25).double())


def _fitted(inverse: Float[Tensor, " pixels"], true: Float[Tensor, " pixels"]) -> Tensor:
    """Depths of inverse ones up to scale and shift, by least squares between inverse depths."""
    # In closed form, about the means: whatever scale and shift, and where all are the same.
    wanted = 1 / true
    x, y = inverse - inverse.mean(), wanted - wanted.mean()
    spread = (x * x).sum()
    scale = torch.where(spread > 0, (x * y).sum() / spread, 0)
    depth: Tensor = 1 / (scale * x + wanted.mean()).clamp(min=1 / (2 * true.max()))
    return depth
