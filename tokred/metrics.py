"""Scores against labels, by task, through torchmetrics.

What the task is, the labels say: one number for each image is a class; a vector of zeros and ones,
classes of which there may be several; a map of whole numbers, the class of every pixel; a map of
fractions, its depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tokred.fidelity import Decisions
from tokred.optional import require

IGNORED = 255
"""The class of pixels that count for nothing."""


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
"""Top-1 and top-5 accuracy; mean average precision over classes; mean intersection over union and
share of the pixels; mean |d - t| / t, root mean square error, and the share of pixels with
max(d / t, t / d) < 1.25. Shares are in percent. "Relative depth" is that of models which give
inverse depths up to scale and shift: those of each image are fitted to the labels first."""


def task_of(targets: Sequence[Tensor], decided: Decisions) -> Task:
    """The task that these labels belong to.

    Args:
        targets: of a batch.
        decided: what the model said to it.

    Raises:
        ValueError: the model's answers do not go with such labels.
    """
    target = targets[0]
    if target.ndim == 0 and not target.is_floating_point():
        name, fits = "classification", decided.scores is not None and decided.scores.ndim == 2
    elif target.ndim == 1:
        name, fits = "multilabel", decided.scores is not None and decided.scores.ndim == 2
    elif target.ndim == 2 and not target.is_floating_point():
        name, fits = "segmentation", decided.scores is not None and decided.scores.ndim == 4
    elif target.ndim == 2:
        name, fits = "depth", decided.depth is not None
    else:
        raise ValueError(
            "labels must be a class, a vector of zeros and ones, or a map [height, width], not "
            f"{target.dtype} of {tuple(target.shape)}"
        )
    if not fits:
        raise ValueError(
            f"labels of {tuple(target.shape)} ({target.dtype}) mean {name}, and the model answers "
            f"{_in_words(decided)}: give labelled=False to compare with the dense model alone"
        )
    return TASKS[name]


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
    """

    def __init__(self, task: Task, decided: Decisions, device: torch.device) -> None:
        metrics = require("torchmetrics", "evaluate")
        self.task = task
        self.classes = 0
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
            if task.name == "classification":
                accuracy = metrics.classification.MulticlassAccuracy
                made = {"top1": accuracy(classes, average="micro")}
                if classes > 5:
                    made["top5"] = accuracy(classes, top_k=5, average="micro")
            elif task.name == "multilabel":
                precision = metrics.classification.MultilabelAveragePrecision
                made = {"mAP": precision(classes, average="macro")}
            else:
                overlap = metrics.classification.MulticlassJaccardIndex
                accuracy = metrics.classification.MulticlassAccuracy
                made = {
                    "mIoU": overlap(classes, average="macro", ignore_index=IGNORED),
                    "pixels": accuracy(classes, average="micro", ignore_index=IGNORED),
                }
        self.metrics = {name: metric.to(device) for name, metric in made.items()}

    def add(self, decided: Decisions, targets: Sequence[Tensor]) -> None:
        """Counts the answers to one batch.

        Raises:
            ValueError: a label is of a class that the model does not know.
        """
        if decided.depth is not None:
            for depth, target in zip(decided.depth, targets, strict=True):
                self._add_depth(depth, target.to(depth.device))
            return
        scores = decided.scores
        assert scores is not None
        if self.task.name == "segmentation":
            for one, target in zip(scores.float(), targets, strict=True):
                self._check(target[target != IGNORED])
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
            self._update(scores.float().sigmoid(), stacked.long())

    def result(self) -> dict[str, float]:
        """The scores, by name. All processes have to ask for them."""
        percent = {name for name in self.metrics if name not in ("abs_rel", "rmse")}
        found = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        return {name: x * 100 if name in percent else x for name, x in found.items()}

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
        there = target > 0
        found, true = depth[there].double(), target[there].double()
        if self.task.name == "relative depth":
            found = _fitted(found, true)
        self.metrics["abs_rel"].update(found, true)
        self.metrics["rmse"].update(found, true)
        worse = torch.maximum(found / true, true / found.clamp(min=1e-6))
        self.metrics["delta1"].update((worse < 1.25).double())


def _fitted(inverse: Float[Tensor, " pixels"], true: Float[Tensor, " pixels"]) -> Tensor:
    """Depths of inverse ones up to scale and shift, by least squares between inverse depths."""
    columns = torch.stack([inverse, torch.ones_like(inverse)], 1)
    scale, shift = torch.linalg.lstsq(columns, 1 / true[:, None]).solution.flatten()
    depth: Tensor = 1 / (scale * inverse + shift).clamp(min=1 / (2 * true.max()))
    return depth
