"""What a model costs, counted and measured, beside the dense model and the free limit.

The free limit is the same model with its tokens cut off to the same numbers at the same layers,
which needs no decision and no merging: no method can be faster on that machine, model and batch.
Efficiency is a method's speed-up as a share of the free limit's.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import math
import platform
import random
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tokred.data.inputs import Inputs, call, device_of, pixels
from tokred.engine.denoising import Around, Denoising
from tokred.engine.denoising import limit as limit_of_denoiser
from tokred.engine.reduction import Reduction
from tokred.engine.windows import InWindows, limit
from tokred.host import Denoiser, Host, find_host, module_of
from tokred.patching import apply, hang, host_of, reduction_of, remove, uncompiled
from tokred.patching.presets import Preset
from tokred.reducers import Reducer, place, varies
from tokred.reducers.truncate import Truncate
from tokred.schedule import Exactly, Schedule


@dataclass(frozen=True)
class Flops:
    """Multiply-adds per image: of matrix products, convolutions and attention, those of the
    method included; nothing else is counted (no norms, softmax, sorting or clustering).

    Attributes:
        dense: without the reduction.
        reduced: with it.
    """

    dense: float
    reduced: float

    @property
    def ratio(self) -> float:
        """How many times fewer."""
        return self.dense / self.reduced

    def as_dict(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        dense, reduced = self.dense / 1e9, self.reduced / 1e9
        return f"{self.ratio:.2f}x fewer multiply-adds: {reduced:.3f} of {dense:.3f} G per image"


@dataclass(frozen=True)
class Arm:
    """One side of a benchmark.

    Attributes:
        seconds: of every measured run of the batch, in the order they were run.
        peak_memory: bytes allocated at most during a run; None on the CPU.
    """

    seconds: tuple[float, ...]
    peak_memory: int | None

    @property
    def median(self) -> float:
        """Seconds per batch."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Bench:
    """Measured speed: the dense model, the reduced one, and the free limit, interleaved.

    Attributes:
        model: class of the model.
        method: the method and its options.
        tokens: patch tokens that enter the first layer.
        counts: patch tokens after each layer. Of a denoiser, those that enter the modules of each
            block that is reduced.
        device, dtype, threads, compiled, versions: what it was measured on.
        dense, reduced, limit: the three arms.
    """

    model: str
    method: str
    tokens: int
    counts: tuple[int, ...]
    batch: int
    image_size: tuple[int, int]
    device: str
    dtype: str
    threads: int
    compiled: bool
    versions: dict[str, str]
    dense: Arm
    reduced: Arm
    limit: Arm

    @property
    def speed_up(self) -> float:
        return self.dense.median / self.reduced.median

    @property
    def free_limit(self) -> float:
        """The speed-up of cutting tokens off at no cost."""
        return self.dense.median / self.limit.median

    @property
    def efficiency(self) -> float:
        """The speed-up as a share of the free limit."""
        return self.speed_up / self.free_limit

    def warnings(self) -> list[str]:
        """What whoever wanted more speed should be told, in sentences."""
        if self.speed_up >= 1:
            return []
        if self.free_limit < 1.05:
            why = "even tokens cut off at no cost would gain next to nothing here"
        else:
            why = "deciding which tokens go costs more than the fewer tokens save"
        return [f"SLOWER than the dense model: {why}. Try a larger batch or a lower keep rate."]

    def as_dict(self) -> dict[str, Any]:
        ratios = {name: getattr(self, name) for name in ("speed_up", "free_limit", "efficiency")}
        return {**ratios, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"{self.speed_up:.2f}x as fast as dense; free limit {self.free_limit:.2f}x; "
            f"efficiency {self.efficiency:.2f}",
            *self.warnings(),
            f"{self.model}, {self.method}: {self.tokens} -> {', '.join(map(str, self.counts))}",
        ]
        for name in ("dense", "reduced", "limit"):
            arm: Arm = getattr(self, name)
            memory = f", {arm.peak_memory / 2**20:.0f} MiB" if arm.peak_memory is not None else ""
            lines.append(
                f"  {name:8s}{self.batch / arm.median:10.1f} images/s  "
                f"{arm.median * 1e3:9.2f} ms per batch  +-{arm.spread:.1%}{memory}"
            )
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines.append(
            f"  batch {self.batch} of {self.image_size[0]}x{self.image_size[1]}, {self.dtype}, "
            f"{'compiled' if self.compiled else 'eager'}, {len(self.dense.seconds)} rounds, "
            f"{self.device}, {self.threads} threads, {versions}"
        )
        return "\n".join(lines)


def flops(
    model: nn.Module,
    images: Inputs,
    host: Host | None = None,
) -> Flops:
    """Counts multiply-adds per image, with and without the reduction that is applied.

    Args:
        model: a model to which a reduction is applied; without one, both numbers are the same.
        images: what the model takes.
        host: the host it was applied with, if one was given to `tokred.apply`.
    """
    model = uncompiled(module_of(model))
    reduction = reduction_of(model)
    reduced = count(model, images)
    if reduction is None:
        return Flops(reduced, reduced)
    with put_back(model, host):
        remove(model)
        dense = count(model, images)
    return Flops(dense, reduced)


def bench(
    model: nn.Module,
    images: Inputs,
    method: str | Reducer | Preset | None = None,
    keep_rate: float | Schedule | Around | None = None,
    *,
    schedule: Schedule | None = None,
    host: Host | None = None,
    rounds: int = 20,
    warmup: int = 3,
    compile: bool = False,
    on_round: Callable[[int, int], None] | None = None,
) -> Bench:
    """Measures the model dense, reduced, and cut off (the free limit), in one run.

    Every round runs the batch once through each, in shuffled order; medians are compared. All
    three call the model's own attention, fused where the host fuses it; only a model that was
    patched with `attention="fastest"` is reduced with that. The model is left as it was.

    Args:
        model: a supported model, with or without a reduction, or a diffusers pipeline.
        images: one batch, on the model's device and in its dtype. (Of a denoiser: latents, time
            step and what else it takes, by name.)
        method: what to measure; the reduction that is applied, if not given.
        keep_rate: as for `tokred.apply`; with `method` only.
        schedule: as for `tokred.apply`; with `method` only.
        host: as for `tokred.apply`.
        rounds: measured runs of each.
        warmup: runs of each before, which are not measured.
        compile: measure copies of the model under `torch.compile`, one per side.
        on_round: called after every round with (rounds done, rounds in all), for progress bars.

    Raises:
        ValueError: there is nothing to measure: no method given and none applied; a keep rate or a
            schedule is given without a method; or the model is in training mode.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup 0, not {rounds} and {warmup}")
    check_method(method, keep_rate, schedule)
    model = uncompiled(module_of(model))
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
    patch = host_of(model, host)
    with put_back(model, host):
        if method is not None:
            apply(model, method, keep_rate, schedule=schedule, host=host)
        reduction = reduction_of(model)
        if reduction is None:
            raise ValueError("method must be given: no reduction is applied to the model")
        height, width = pixels(images).shape[-2:]
        if isinstance(reduction, Denoising):
            tokens, counts = _entering(model, images, reduction)
        else:
            found, tower = find_host(model, host)
            grid = found.layout(tower, (height, width)).grid
            tokens, counts = grid[0] * grid[1], counts_of(model, found, images, reduction, grid)
        arms = {
            "dense": None,
            "reduced": reduction,
            "limit": free_limit_of(model, patch, images, reduction, counts),
        }
        measured = measure(sides(model, patch, arms, compile), images, rounds, warmup, on_round)
    return Bench(
        model=type(model).__name__,
        method=str(reduction.reducer),
        tokens=tokens,
        counts=counts,
        batch=len(pixels(images)),
        image_size=(height, width),
        device=device_name(pixels(images).device),
        dtype=str(pixels(images).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        compiled=compile,
        versions=versions_of(model),
        **measured,
    )


def check_method(method: Any, keep_rate: Any, schedule: Any) -> None:
    """What is measured without a method is the reduction that is applied, as it is.

    Raises:
        ValueError: a keep rate or a schedule is given without a method.
    """
    if method is None and (keep_rate is not None or schedule is not None):
        raise ValueError(
            f"method must be given with keep_rate={keep_rate} and schedule={schedule}: the "
            "reduction that is applied has its own"
        )


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


def _entering(
    model: nn.Module, images: Inputs, reduction: Denoising
) -> tuple[int, tuple[int, ...]]:
    """Tokens of the first block of a denoiser that is reduced, and of all as they are reduced."""
    with torch.no_grad(), reduction.recording() as records:
        call(model, images)
    before = [math.prod(record.grid) for record in records]
    return before[0] if before else 0, tuple(record.after for record in records)


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


def sides(
    model: nn.Module,
    host: Host | Denoiser,
    arms: Mapping[str, Reduction | Denoising | None],
    compile: bool,
) -> dict[str, tuple[nn.Module, Callable[[], None]]]:
    """For every arm (None: the dense model), the model to call and what to do just before: one
    model whose patch is changed, or a compiled copy for each arm."""

    def become(target: nn.Module, reduction: Reduction | Denoising | None) -> None:
        if reduction is None:
            remove(target)
        else:
            hang(target, host, reduction)

    sides: dict[str, tuple[nn.Module, Callable[[], None]]] = {}
    for name, reduction in arms.items():
        if compile:
            twin = copy.deepcopy(model)
            become(twin, reduction)
            sides[name] = (torch.compile(twin), lambda: None)  # type: ignore[assignment]
        else:
            sides[name] = (model, lambda reduction=reduction: become(model, reduction))  # type: ignore[misc]
    return sides


def measure(
    sides: Mapping[str, tuple[Callable[..., Any], Callable[[], None]]],
    images: Inputs,
    rounds: int,
    warmup: int,
    on_round: Callable[[int, int], None] | None = None,
    limit: float = float("inf"),
) -> dict[str, Arm]:
    """Runs the batch once through every side in each round, in shuffled order.

    Args:
        sides: what `sides` has made.
        images: one batch.
        rounds: measured rounds.
        warmup: rounds before that are not measured.
        on_round: called after every round with (rounds done, rounds in all).
        limit: seconds after which no further round begins, but for three that are always run.
    """
    names = list(sides)
    start = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, int | None] = dict.fromkeys(names)
    device = device_of(images)
    cuda = device.type == "cuda"
    for number in range(-warmup, rounds):
        if number >= 3 and time.perf_counter() - start > limit:
            break
        # Shuffled, because a side may gain or lose by which one came before it.
        for name in random.Random(number).sample(names, len(names)):
            target, prepare = sides[name]
            prepare()
            if cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            begin = time.perf_counter()
            with torch.no_grad():
                call(target, images)
            if cuda:
                torch.cuda.synchronize(device)
            took = time.perf_counter() - begin
            if number >= 0:
                seconds[name].append(took)
                if cuda:
                    peak = torch.cuda.max_memory_allocated(device)
                    memory[name] = max(memory[name] or 0, peak)
        if on_round and number >= 0:
            on_round(number + 1, rounds)
    return {name: Arm(tuple(seconds[name]), memory[name]) for name in names}


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operators have made, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):  # what was there before is nobody's allocation
            if isinstance(x, torch.Tensor):
                self._known.add(x.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self._known:
                storage = x.untyped_storage()
                self._known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_memory(model: Callable[..., Any], images: Inputs) -> int:
    """Bytes that tensors take at most during a pass without gradients, beyond what was there
    before: on CUDA what the allocator says, elsewhere the tensors that operators return (not what
    they hold for themselves while they run)."""
    device = device_of(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad():
            call(model, images)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with torch.no_grad(), _Allocations() as allocations:
        call(model, images)
    return int(allocations.most)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# Older versions of torch's counter do not know the CPU's fused attention.
_FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def count(model: nn.Module, images: Inputs) -> float:
    """Multiply-adds per image of one pass, as `Flops` has them."""
    with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter, torch.no_grad():
        call(model, images)
    return float(counter.get_total_flops()) / 2 / len(pixels(images))


@contextmanager
def put_back(model: nn.Module, host: Host | None) -> Iterator[None]:
    """Whatever happens inside, the model ends with the reduction that it began with."""
    former = reduction_of(model)
    try:
        yield
    finally:
        remove(model)
        if former is not None:
            hang(model, host_of(model, host), former)


def versions_of(model: nn.Module) -> dict[str, str]:
    """The versions of what a measurement depends on."""
    library = type(model).__module__.split(".")[0]
    versions = {"torch": str(torch.__version__)}
    if hasattr(sys.modules.get(library), "__version__"):
        versions[library] = sys.modules[library].__version__
    for name in ("numba", "triton"):  # whether or not a method has already asked for them
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def device_name(device: torch.device) -> str:
    """What it is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    return f"{device.type} {name} {torch.backends.cpu.get_cpu_capability()}"
