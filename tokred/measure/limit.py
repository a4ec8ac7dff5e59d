"""The free limit: a model whose tokens are cut off to the same numbers at the same layers.

That needs no decision and no merging, so no method can be faster on that machine, model and batch.
"""

from __future__ import annotations

import torch
from torch import nn

from tokred.data.inputs import Inputs, call, pixels
from tokred.engine.run import Reduction
from tokred.engine.windows import InWindows, limit
from tokred.host.host import Denoiser, Host
from tokred.patching.denoising import Denoising
from tokred.patching.denoising import limit as limit_of_denoiser
from tokred.patching.patching import hang, remove
from tokred.reducers import place, varies
from tokred.reducers.truncate import Truncate
from tokred.schedule import Exactly


def free_limit_of(
    model: nn.Module,
    host: Host | Denoiser,
    images: Inputs,
    reduction: Reduction | Denoising,
    counts: tuple[int, ...],
) -> Reduction | Denoising:
    """A reduction of the model to the same numbers of tokens, for nothing. Where what stands on the
    last block has to have the full grid (dense models), it gets that; else not even that is paid
    for."""
    if isinstance(reduction, Denoising):
        return limit_of_denoiser(reduction)
    if isinstance(reduction.reducer, InWindows):
        return limit(reduction)
    cut = cut_off(reduction, counts)
    hang(model, host, cut)
    try:
        with torch.no_grad():
            call(model, first_of(images))
    except Exception:  # whatever a head says to fewer tokens than it knows
        cut.full_grid = True
    finally:
        remove(model)
    return cut


def first_of(images: Inputs) -> Inputs:
    """The first image of a batch, as a batch."""
    many = len(pixels(images))
    if isinstance(images, torch.Tensor):
        return images[:1]
    return {
        name: x[:1] if isinstance(x, torch.Tensor) and x.ndim and len(x) == many else x
        for name, x in images.items()
    }


def cut_off(reduction: Reduction, counts: tuple[int, ...]) -> Reduction:
    """A reduction to these numbers of tokens that costs nothing, where this one stands."""
    cut = Truncate("between" if place(reduction.reducer) == "between" else "before")
    # What reads features from layers in between gets its grids, whatever the last block gives.
    return Reduction(
        cut, Exactly(counts), reduction.layout, full_grid=False, tapped_by=reduction.tapped_by
    )


def counts_of(
    model: nn.Module, host: Host, images: Inputs, reduction: Reduction, grid: tuple[int, int]
) -> tuple[int, ...]:
    """Patch tokens after each layer: what the schedule asks for, or, of a method whose images
    vary, what came of it: of the image that has the most, where others are padded to that; of one
    that gates blocks, on average (the layers with most tokens first: the cost is the same)."""
    tokens = grid[0] * grid[1]
    if not varies(reduction.reducer):
        return reduction.counts(tokens, grid)
    if place(reduction.reducer) == "around":
        return tuple(sorted(through(model, host, images, reduction, tokens), reverse=True))
    hang(model, host, reduction)
    with torch.no_grad(), reduction.recording() as records:
        call(model, images)
    remove(model)
    left = {record.layer: record.after for record in records}
    counts = []
    for layer in range(reduction.layout.layers):
        tokens = left.get(layer, tokens)
        counts.append(tokens)
    return tuple(counts)


def through(
    model: nn.Module, host: Host, images: Inputs, reduction: Reduction, tokens: int
) -> list[int]:
    """How many of the patch tokens go through each block, on average, of a method that gates
    blocks. (At least 1.)"""
    hang(model, host, reduction)
    with torch.no_grad(), reduction.recording() as records:
        call(model, images)
    remove(model)
    mean = {
        record.layer: max(1, round(float((record.map.labels() >= 0).sum(1).float().mean())))
        for record in records
        if record.map is not None
    }
    return [mean.get(layer, tokens) for layer in range(reduction.layout.layers)]
