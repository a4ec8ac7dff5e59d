"""Losses: for wrong answers, for keeping another share of tokens than wanted, and for answers and
tokens that differ from those of the dense model.

SViT: Liu et al., "Revisiting Token Pruning for Object Detection and Instance Segmentation", WACV
2024, https://arxiv.org/abs/2306.07050, equations 2 and 3. DynamicViT: Rao et al., "DynamicViT:
Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021,
https://arxiv.org/abs/2106.02034, section 3.3.

If there are several processes, each calls these functions with its share of a batch, and gradients
are averaged afterwards (as DistributedDataParallel does). Squares of means, and means over things
of which processes have different numbers, are taken over all processes. So many processes train as
one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tokred.data.processes import num_processes, summed

processes = num_processes
"""The name of version 0.7."""


def rate_loss(
    decisions: Mapping[int, Float[Tensor, "batch tokens"]],
    targets: Mapping[int, float],
    per_image: bool = False,
) -> Float[Tensor, ""]:
    """The squared difference between the share of tokens that gates keep and the share wanted.

    SViT, equation 2 (dynamic): the mean over gated layers of (mean over batch and tokens of M - t)
    squared, so that an image may keep more if another keeps fewer. SViT, equation 3 (fixed), and
    the ratio loss of DynamicViT: the mean over layers and images of (mean over tokens of M - t)
    squared.

    Args:
        decisions: for every gated layer, 1 for a token that is kept and 0 for others, as in
            `Reduction.decisions`.
        targets: for every gated layer, the share of tokens wanted, as in `Reduction.targets`.
        per_image: whether every image should keep that share; else all images together should.

    Raises:
        ValueError: there are no decisions, or decisions and targets are for different layers.
    """
    if not decisions:
        raise ValueError(
            "there are no decisions: they are those of the last pass in training mode, of a model "
            "with gates"
        )
    if decisions.keys() != targets.keys():
        raise ValueError(
            f"decisions are of the layers {sorted(decisions)}, targets of {sorted(targets)}"
        )
    terms = []
    for layer, mask in decisions.items():
        share = mask.float().mean(1)
        if not per_image:
            share = over_processes(share.mean())
        terms.append((share - targets[layer]).square().mean())
    return torch.stack(terms).mean()


def kl_loss(
    student: Float[Tensor, "batch classes ..."],
    teacher: Float[Tensor, "batch classes ..."],
) -> Float[Tensor, ""]:
    """KL(y || y'): how far the class probabilities y of the model are from those of the dense
    model, y', in the direction of the paper (DynamicViT, L_KL). Mean over images, and over pixels.

    Args:
        student: scores of the model.
        teacher: scores of the dense model.

    Raises:
        ValueError: shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"scores of student and teacher must have one shape, not {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    # In half precision the sum over many classes would be inexact.
    ours, theirs = student.float().log_softmax(1), teacher.float().log_softmax(1)
    return (ours.exp() * (ours - theirs)).sum(1).mean()


def token_loss(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    kept: Float[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """How far the tokens that are kept to the end are from those of the dense model (DynamicViT,
    L_distill): sum of D (t - t')^2 / sum of D, where squares are means over channels.

    D gets no gradient. If it had one, gates could lower this loss by pruning tokens that differ.

    Args:
        student: patch tokens behind the last block.
        teacher: patch tokens behind the last block of the dense model.
        kept: D of the last gate, 1 for a token that is kept and 0 for others.

    Raises:
        ValueError: shapes differ.
    """
    if not student.shape == teacher.shape == (*kept.shape, student.shape[-1]):
        raise ValueError(
            f"tokens of student and teacher, {tuple(student.shape)} and {tuple(teacher.shape)}, "
            f"must be as many as there are decisions, {tuple(kept.shape)}"
        )
    apart = (student.float() - teacher.float()).square().mean(-1)
    return weighted_mean(apart, kept.detach().float())


def cross_entropy(
    outputs: Any,
    targets: Int[Tensor, "batch ..."] | Float[Tensor, "batch classes"],
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Cross entropy of images or of pixels. Scores of pixels are resized to the labels, if need be.

    Args:
        outputs: scores [batch, classes] or [batch, classes, height, width], or an object that has
            them as `logits`.
        targets: labels, or the probability of each class.
        label_smoothing: how much of each label is spread over all classes.
        ignore_index: the label of images or pixels that do not count.

    Raises:
        ValueError: labels are out of range, or there are no scores that fit them.
    """
    scores = scores_of(outputs)
    if targets.is_floating_point():
        return F.cross_entropy(scores.float(), targets, label_smoothing=label_smoothing)
    if scores.ndim != targets.ndim + 1:
        raise ValueError(
            f"scores of the shape {tuple(scores.shape)} do not fit labels of the shape "
            f"{tuple(targets.shape)}"
        )
    if targets.ndim == 3 and scores.shape[2:] != targets.shape[1:]:
        scores = F.interpolate(
            scores.float(), size=targets.shape[1:], mode="bilinear", align_corners=False
        )
    if not scores.is_cuda:  # on CUDA this would wait for the device, and `fit` has checked before
        check_labels(targets, scores.shape[1], ignore_index)
    each = F.cross_entropy(
        scores.float(),
        targets.long(),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction="none",
    )
    return weighted_mean(each, (targets != ignore_index).float())


def check_labels(targets: Tensor, classes: int, ignore_index: int = -100) -> None:
    """Refuses labels for which the model has no class.

    Raises:
        ValueError: there are such labels.
    """
    used = targets[targets != ignore_index]
    if used.numel() == 0:
        return
    low, high = int(used.min()), int(used.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"labels must be 0 to {classes - 1}, as the model has {classes} classes; there is "
            f"{wrong}. (What does not count has the label ignore_index, {ignore_index}.)"
        )


def scores_of(outputs: Any) -> Tensor:
    """The scores in the outputs of a model: the outputs themselves, or their `logits`.

    Raises:
        ValueError: there are none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else None
    found = getattr(outputs, "logits", None) if found is None else found
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model gives a {type(outputs).__qualname__} without logits: give a loss of your "
            "own, `task=`"
        )
    return found


def over_processes(mean: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean of a value over all processes.

    Its gradient is that of this process's own value. Processes average their gradients later, which
    gives the gradient of the mean; so no gradient has to be sent here.
    """
    if num_processes() == 1:
        return mean
    return mean + (summed(mean.detach()) / num_processes() - mean.detach())


def weighted_mean(values: Tensor, weights: Tensor) -> Float[Tensor, ""]:
    """sum of w v / sum of w. The sum of w is averaged over processes, so that the mean of their
    results is the weighted mean of all values."""
    total = summed(weights.detach().sum()) / num_processes()
    # If all weights are zero, the result is zero, and not a division by zero.
    return (values * weights).sum() / torch.where(total > 0, total, 1)
