"""What `tokred.bench` and `tokred.profile` measure: a model, a reduction, and its free limit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokred.data.inputs import Inputs, call, pixels
from tokred.engine.denoising import Denoising
from tokred.engine.reduction import Reduction
from tokred.host import Denoiser, Host, Stage, find_host
from tokred.measure.conditions import device_name, versions_of
from tokred.measure.limit import Limits, counts_of, limits_of, put_on
from tokred.patching import apply, host_of, reduction_of


@dataclass(frozen=True)
class Subject:
    """A model, and the reductions that are measured in it.

    Attributes:
        model: in which nothing is compiled.
        host: how the model is patched.
        reduction: the method in the model.
        limits: its free limits.
        tokens: patch tokens that enter the first layer.
        counts: patch tokens after each layer; in a denoiser, the tokens that enter the modules of
            each reduced block.
        conditions: what it is measured on: "batch", "image_size", "device", "dtype", "threads" and
            "versions".
    """

    model: nn.Module
    host: Host | Stage | Denoiser
    reduction: Reduction | Denoising
    limits: Limits
    tokens: int
    counts: tuple[int, ...]
    conditions: dict[str, Any]


def check_rounds(rounds: int, warmup: int) -> None:
    """Refuses numbers of rounds with which nothing would be measured.

    Raises:
        ValueError: there are no rounds, or fewer than none to warm up.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup 0, not {rounds} and {warmup}")


def check_method(method: Any, keep_rate: Any, schedule: Any) -> None:
    """Refuses a keep rate or a schedule without a method: the reduction that is applied to the
    model is measured as it is.

    Raises:
        ValueError: a keep rate or a schedule is given without a method.
    """
    if method is None and (keep_rate is not None or schedule is not None):
        raise ValueError(
            f"method must be given with keep_rate={keep_rate} and schedule={schedule}: the "
            "reduction that is applied has its own"
        )


@contextmanager
def subject(
    model: nn.Module, images: Inputs, method: Any, keep_rate: Any, schedule: Any, host: Host | None
) -> Iterator[Subject]:
    """Puts a method into the model for the length of a `with` block, and finds its free limit.
    Behind the block, the model is as it was before.

    Args:
        model: a supported model, in which nothing is compiled.
        images: one batch.
        method: as for `tokred.apply`; the reduction that is applied, if not given.
        keep_rate: as for `tokred.apply`.
        schedule: as for `tokred.apply`.
        host: as for `tokred.apply`.

    Raises:
        ValueError: no method is given, and no reduction is applied to the model.
    """
    patch = host_of(model, host)
    with put_back(model, host):
        if method is not None:
            apply(model, method, keep_rate, schedule=schedule, host=host)
        reduction = reduction_of(model)
        if reduction is None:
            raise ValueError("method must be given: no reduction is applied to the model")
        if isinstance(reduction, Denoising):
            tokens, counts = _entering(model, images, reduction)
        else:
            found, tower = find_host(model, host)
            height, width = pixels(images).shape[-2:]
            grid = found.layout(tower, (height, width)).grid
            tokens, counts = math.prod(grid), counts_of(model, found, images, reduction, grid)
        limits = limits_of(model, patch, images, reduction, counts)
        where = conditions(model, images)
        yield Subject(model, patch, reduction, limits, tokens, counts, where)


def conditions(model: nn.Module, images: Inputs) -> dict[str, Any]:
    """What a measurement depends on besides the method, see `Subject`."""
    batch = pixels(images)
    height, width = batch.shape[-2:]
    return {
        "batch": len(batch),
        "image_size": (height, width),
        "device": device_name(batch.device),
        "dtype": str(batch.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions_of(model),
    }


@contextmanager
def put_back(model: nn.Module, host: Host | None) -> Iterator[None]:
    """Whatever happens in the `with` block, the model ends with the reduction that it had before
    it."""
    former = reduction_of(model)
    try:
        yield
    finally:
        put_on(model, host_of(model, host), former)


def _entering(
    model: nn.Module, images: Inputs, reduction: Denoising
) -> tuple[int, tuple[int, ...]]:
    """In a denoiser: the tokens of the first block that is reduced, and how many of its tokens
    enter the modules of each such block."""
    with torch.no_grad(), reduction.recording() as records:
        call(model, images)
    before = [math.prod(record.grid) for record in records]
    return before[0] if before else 0, tuple(record.after for record in records)
