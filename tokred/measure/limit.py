"""The free limit: the same model with its tokens cut off, to the same numbers at the same layers.

That takes no decision and no merging, so no method can be faster with this model and batch on this
machine.
"""

from __future__ import annotations

import torch
from torch import nn

from tokred.data.inputs import Inputs, call, pixels
from tokred.engine.denoising import Denoising
from tokred.engine.denoising import limit as limit_of_denoiser
from tokred.engine.reduction import Reduction
from tokred.engine.windows import InWindows, limit
from tokred.host import Denoiser, Host, Stage
from tokred.patching import hang, remove
from tokred.reducers.truncate import Truncate
from tokred.schedule import Exactly


def free_limit_of(
    model: nn.Module,
    host: Host | Stage | Denoiser,
    images: Inputs,
    reduction: Reduction | Denoising,
    counts: tuple[int, ...],
) -> Reduction | Denoising:
    """A reduction that cuts the model's tokens off to the same numbers, at no cost.

    If the head of the model needs the full grid (as those of dense models do), the full grid is
    made for it; otherwise not even that is done.

    Args:
        model: without any reduction.
        host: how the model is patched.
        images: what the model takes; the first image is tried.
        reduction: the reduction that is to be compared.
        counts: its patch tokens after each layer, see `counts_of`.
    """
    if isinstance(reduction, Denoising):
        return limit_of_denoiser(reduction)
    if isinstance(reduction.reducer, InWindows):
        return limit(reduction)
    cut = cut_off(reduction, counts)
    hang(model, host, cut)
    try:
        with torch.no_grad():
            call(model, first_of(images))
    except Exception:  # heads complain in many ways about fewer tokens than they expect
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
    """A reduction that cuts tokens off to these numbers, at the same place in the blocks."""
    cut = Truncate("between" if reduction.traits.place == "between" else "before")
    # Whoever reads features from layers in between gets full grids, also without `full_grid`.
    return Reduction(
        cut,
        Exactly(counts),
        reduction.layout,
        full_grid=False,
        tapped_by=reduction.tapped_by,
        hand_out=reduction.hand_out,
    )


def counts_of(
    model: nn.Module,
    host: Host | Stage,
    images: Inputs,
    reduction: Reduction,
    grid: tuple[int, int],
) -> tuple[int, ...]:
    """Patch tokens after each layer, as far as the cost of a pass depends on them.

    If all images keep the same number, these are the numbers of the schedule. Otherwise the batch
    is run: images are padded to the one that keeps most tokens, so its numbers count. If the method
    gates blocks, the mean over the images counts, in falling order, which costs the same.
    """
    tokens = grid[0] * grid[1]
    if not reduction.traits.varies:
        return reduction.counts(tokens, grid)
    if reduction.traits.place == "around":
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
    model: nn.Module, host: Host | Stage, images: Inputs, reduction: Reduction, tokens: int
) -> list[int]:
    """How many patch tokens go through each block, if the method gates blocks: the mean over the
    images, and at least 1."""
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
