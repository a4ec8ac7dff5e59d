"""What a model costs, counted and measured, beside the dense model and the free limit.

The free limit is the speed of the same model when tokens are simply cut off, to the same numbers at
the same layers, by a slice in the model's own forward. That takes no decision, no merging and no
bookkeeping, so no method can be faster with this model and batch on this machine. Efficiency is a
method's speed-up divided by that of the free limit. What our bookkeeping costs is seen beside it:
the same cuts, in patched blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokred.data.inputs import Inputs
from tokred.engine.denoising import Around
from tokred.engine.reduction import Reduction
from tokred.host import Host, module_of
from tokred.measure.counting import count
from tokred.measure.limit import Entrant
from tokred.measure.payoff import WORTH, Payoff, checked, enlarged, estimate
from tokred.measure.race import Arm, measure, sides
from tokred.measure.subject import Subject, check_method, check_rounds, put_back, subject
from tokred.patching import reduction_of, remove, uncompiled
from tokred.patching.presets import Preset
from tokred.reducers import Reducer
from tokred.schedule import Schedule

SECONDS = 10.0
"""How long it is measured at most from where on a reduction pays, beyond three rounds."""


@dataclass(frozen=True)
class Flops:
    """Multiply-adds per image: those of matrix products, convolutions and attention, including the
    method's own. Nothing else is counted (no norms, softmax, sorting or clustering).

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
class Bench:
    """Measured speed: the dense model, the reduced one, and the free limits, interleaved.

    Attributes:
        model: class of the model.
        method: the method and its options.
        tokens: patch tokens that enter the first layer.
        counts: patch tokens after each layer; in a denoiser, the tokens that enter the modules of
            each reduced block.
        device, dtype, threads, compiled, versions: what it was measured on.
        dense, reduced, limit: the arms. The limit is the seamless one, if there is one: a slice in
            the model's own forward.
        seamed: the same cuts in patched blocks; None if that is `limit` already.
        why_seamed: why there is no seamless limit; empty if there is one.
        payoff: if nothing is gained, but could be: from how many images or tokens on it pays.
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
    seamed: Arm | None = None
    why_seamed: str = ""
    payoff: Payoff | None = None

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

    @property
    def bookkeeping(self) -> float | None:
        """What patched blocks cost without any method, as a share of the free limit's time; None
        where no limit runs without them."""
        return None if self.seamed is None else self.seamed.median / self.limit.median - 1

    def warnings(self) -> list[str]:
        """Warnings for readers of the speeds, in sentences; none if the model is faster."""
        if self.speed_up >= WORTH:
            return []
        head = "Next to nothing is gained" if self.speed_up >= 1 else "SLOWER than the dense model"
        if self.free_limit < 1.05:
            why = "even tokens cut off at no cost would gain next to nothing here"
            return [f"{head}: {why}. Try a larger batch or a lower keep rate."]
        saved = f"than the fewer tokens save ({_ms(self.dense.median - self.limit.median)})"
        above = self.reduced.median - self.limit.median
        if self.seamed is None:
            costs = f"deciding which tokens go costs more ({_ms(above)}, with our bookkeeping)"
        else:
            books = max(0.0, self.seamed.median - self.limit.median)
            costs = (
                f"deciding which tokens go costs more ({_ms(above)}, with {_ms(books)} of our "
                "bookkeeping)"
            )
        told = [f"{head}: {costs} {saved}. Try a larger batch or a lower keep rate."]
        return told if self.payoff is None else [*told, str(self.payoff)]

    def as_dict(self) -> dict[str, Any]:
        names = ("speed_up", "free_limit", "efficiency", "bookkeeping")
        ratios = {name: getattr(self, name) for name in names}
        return {**ratios, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"{self.speed_up:.2f}x as fast as dense; free limit {self.free_limit:.2f}x; "
            f"of limit {self.efficiency:.2f}, {self._bookkeeping_told}",
            *self.warnings(),
            f"{self.model}, {self.method}: {self.tokens} -> {', '.join(map(str, self.counts))}",
        ]
        for name in ("dense", "reduced", "limit", "seamed"):
            arm: Arm | None = getattr(self, name)
            if arm is None:
                continue
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

    @property
    def _bookkeeping_told(self) -> str:
        if self.bookkeeping is None:
            return f"which holds our bookkeeping, too: {self.why_seamed}"
        return f"of it bookkeeping {self.bookkeeping:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


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
    """Measures the speed of the dense model, of the reduced model and of the free limit, in turns.

    Every round runs the batch once through each of them, in shuffled order; their medians are
    compared. All of them call the model's own attention, fused if the model fuses it. (A model that
    was patched with `attention="fastest"` keeps that.) If nothing is gained, although fewer tokens
    would save time, it is estimated from how many images on it pays, and so many are measured, too
    (the same ones again and again). The model is left as it was.

    Args:
        model: a supported model, with or without a reduction, or a diffusers pipeline.
        images: one batch, on the model's device and in its dtype. (For a denoiser: latents, time
            step and what else it takes, by name.)
        method: what to measure; the reduction that is applied, if not given.
        keep_rate: as for `tokred.apply`; with `method` only.
        schedule: as for `tokred.apply`; with `method` only.
        host: as for `tokred.apply`.
        rounds: measured runs of each.
        warmup: runs of each before, which are not measured.
        compile: measure compiled copies of the model (`torch.compile`), one for each side.
        on_round: called after every round with (rounds done, rounds in all), for progress bars.

    Raises:
        ValueError: no method is given and none is applied; a keep rate or a schedule is given
            without a method; or the model is in training mode.
    """
    check_rounds(rounds, warmup)
    check_method(method, keep_rate, schedule)
    model = uncompiled(module_of(model))
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
    with subject(model, images, method, keep_rate, schedule, host) as what:
        arms: dict[str, Entrant] = {"dense": None, "reduced": what.reduction, **what.limits.arms}
        racing = sides(model, what.host, arms, compile)
        measured = measure(racing, images, rounds, warmup, on_round)
        pays = _payoff(what, measured, images, rounds, compile)
    return Bench(
        model=type(model).__name__,
        method=str(what.reduction.reducer),
        tokens=what.tokens,
        counts=what.counts,
        compiled=compile,
        **what.conditions,
        dense=measured["dense"],
        reduced=measured["reduced"],
        limit=measured["limit"],
        seamed=measured.get("seamed"),
        why_seamed=what.limits.why_seamed,
        payoff=pays,
    )


def _payoff(
    what: Subject, measured: Mapping[str, Arm], images: Inputs, rounds: int, compile: bool
) -> Payoff | None:
    """From where on a reduction pays that does not pay here; None if it does, or if fewer tokens
    would save nothing."""
    dense, reduced, limit = (measured[name].median for name in ("dense", "reduced", "limit"))
    if dense / reduced >= WORTH or dense / limit < 1.05:
        return None
    batch = what.conditions["batch"]
    found = estimate(batch, what.tokens, dense, reduced, limit)
    if compile or not isinstance(what.reduction, Reduction):
        return found  # a check would compile again; inputs of denoisers are more than images

    def timed(many: int) -> tuple[float, float]:
        arms: dict[str, Entrant] = {"dense": None, "reduced": what.reduction}
        racing = sides(what.model, what.host, arms, compile=False)
        arm = measure(racing, enlarged(images, many), min(rounds, 10), 1, limit=SECONDS)
        return arm["dense"].median, arm["reduced"].median

    return checked(found, batch, dense, reduced, timed)
