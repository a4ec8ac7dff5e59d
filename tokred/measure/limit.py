"""The free limit: the same model with its tokens cut off, to the same numbers at the same layers.

That takes no decision and no merging, so no method can be faster with this model and batch on this
machine. There are two of them. The *seamless* limit is a slice in the host's own forward
(`tokred.measure.slicing`): what is left of a method that costs nothing, in an engine that costs
nothing. The *seamed* limit cuts tokens off as a method of ours, in patched blocks. The time between
the two is our bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokred.data.inputs import Inputs, call, pixels
from tokred.engine.denoising import Denoising
from tokred.engine.denoising import limit as limit_of_denoiser
from tokred.engine.reduction import Reduction
from tokred.engine.windows import InWindows, limit
from tokred.host import Denoiser, Host, Stage, find_host
from tokred.measure.slicing import ModuleSlices, NoSliceError, Slices, take_off
from tokred.patching import hang, remove
from tokred.reducers.truncate import Truncate
from tokred.schedule import Exactly

Entrant: TypeAlias = Reduction | Denoising | Slices | ModuleSlices | None
"""What a model becomes in a race: reduced, sliced, or dense (None)."""


@dataclass(frozen=True)
class Limits:
    """What a reduction is measured against.

    Attributes:
        free: the free limit: the seamless one, if there is one.
        seamed: the same cuts in patched blocks.
        why_seamed: why there is no seamless limit, in words; empty if there is one.
    """

    free: Slices | ModuleSlices | Reduction | Denoising
    seamed: Reduction | Denoising
    why_seamed: str = ""

    @property
    def arms(self) -> dict[str, Entrant]:
        """The sides that they are in a race: "limit" and, where that is another one, "seamed"."""
        return (
            {"limit": self.free} if self.why_seamed else {"limit": self.free, "seamed": self.seamed}
        )


def put_on(
    model: nn.Module,
    host: Host | Stage | Denoiser,
    side: Entrant,
) -> None:
    """Makes a model one side of a race, in place of whatever it was before: reduced, or sliced, or
    dense (None)."""
    take_off(model)
    if isinstance(side, Slices):
        assert isinstance(host, Host)
        side.put_on(model, host)
    elif isinstance(side, ModuleSlices):
        assert isinstance(host, Denoiser)
        side.put_on(model, host)
    elif side is not None:
        hang(model, host, side)


def limits_of(
    model: nn.Module,
    host: Host | Stage | Denoiser,
    images: Inputs,
    reduction: Reduction | Denoising,
    counts: tuple[int, ...],
) -> Limits:
    """The free limit of a reduction, without the engine where that can be, and with it.

    The seamless limit is believed if it gives the same answer as the seamed one to the first image.

    Args:
        model: without any reduction.
        host: how the model is patched.
        images: what the model takes; the first image is tried.
        reduction: the reduction that is to be compared.
        counts: its patch tokens after each layer, see `counts_of`.
    """
    seamed = free_limit_of(model, host, images, reduction, counts)
    if isinstance(reduction, Denoising) or isinstance(seamed, Denoising):
        assert isinstance(seamed, Denoising) and isinstance(host, Denoiser)
        return _limits_of_denoiser(model, host, images, seamed)
    if not isinstance(host, Host) or isinstance(reduction.reducer, InWindows):
        return Limits(seamed, seamed, "blocks attend in windows")
    first = first_of(images)
    with _seen(model, host, seamed) as blocks:
        expected = _answer(model, first)
    if len(blocks) < len(counts):
        return Limits(seamed, seamed, "not all of its blocks are called as modules")
    layout = reduction.layout
    tokens = blocks[0][0] - layout.others
    shown = frozenset(
        layer
        for layer, (_, left) in blocks.items()
        if left == tokens + layout.others > counts[layer] + layout.others
    )
    slices = Slices(layout, tokens, counts, _place(reduction), shown)
    why = ""
    # Masks that a model is called with have to be sliced, too, and only a trial tells of them.
    for tables in (True,) if layout.by_position else (False, True):
        made = replace(slices, tables=tables)
        why = _why_not(model, host, first, made, expected)
        if not why:
            return Limits(made, seamed)
    return Limits(seamed, seamed, why)


def free_limit_of(
    model: nn.Module,
    host: Host | Stage | Denoiser,
    images: Inputs,
    reduction: Reduction | Denoising,
    counts: tuple[int, ...],
) -> Reduction | Denoising:
    """The seamed limit: a reduction that cuts the model's tokens off to the same numbers.

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


def _limits_of_denoiser(
    model: nn.Module, host: Denoiser, images: Inputs, seamed: Denoising
) -> Limits:
    put_on(model, host, seamed)
    try:
        with seamed.recording() as records:
            expected = _answer(model, images)
    finally:
        take_off(model)
    few = {record.path: record.after for record in records}
    modules = tuple(
        (f"{place.path}.{place.modules[name]}", few[place.path], name != "mlp")
        for place in seamed.places
        for name in seamed.around.modules
        if name in place.modules and place.path in few
    )
    slices = ModuleSlices(modules, seamed.traits.keys_only)
    why = _why_not(model, host, images, slices, expected)
    return Limits(seamed if why else slices, seamed, why)


@contextmanager
def _seen(model: nn.Module, host: Host, seamed: Reduction) -> Iterator[dict[int, tuple[int, int]]]:
    """Puts the seamed limit on a model, and sees how many tokens enter and leave each block."""
    found: dict[int, tuple[int, int]] = {}

    def saw(layer: int, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        left = output[0] if isinstance(output, tuple) else output
        found[layer] = (given.shape[1], left.shape[1])

    put_on(model, host, seamed)
    blocks = host.blocks(find_host(model, host)[1])
    handles = [
        block.register_forward_hook(partial(saw, layer), with_kwargs=True)
        for layer, block in enumerate(blocks)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        take_off(model)


def _answer(model: nn.Module, images: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in tree_leaves(call(model, images)) if isinstance(x, Tensor)]


def _why_not(
    model: nn.Module,
    host: Host | Denoiser,
    images: Inputs,
    slices: Slices | ModuleSlices,
    expected: list[Tensor],
) -> str:
    """Why slices in the host's own forward are no limit; empty if they are."""
    try:
        put_on(model, host, slices)
        found = _answer(model, images)
    except NoSliceError as error:
        return str(error)
    except Exception as error:  # forwards complain in many ways about fewer tokens
        return f"the model's own forward fails with fewer tokens ({type(error).__name__})"
    finally:
        take_off(model)
    if [x.shape for x in found] != [x.shape for x in expected]:
        return "a slice in the model's own forward gives an answer of another shape"
    if not all(map(_close, found, expected)):
        return "a slice in the model's own forward gives another answer"
    return ""


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two answers are the same but for rounding: other kernels may be taken."""
    if not expected.is_floating_point() or expected.numel() == 0:
        return True
    bound = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    found, expected = found.double(), expected.double()
    largest = float(expected.nan_to_num().abs().max())
    return torch.allclose(found, expected, rtol=bound, atol=bound * largest, equal_nan=True)


def _place(reduction: Reduction) -> str:
    """Where tokens are cut off: as the method, or before a block that it gates."""
    return "between" if reduction.traits.place == "between" else "before"


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
    cut = Truncate(_place(reduction))
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
