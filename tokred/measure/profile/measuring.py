"""`tokred.profile`: runs a batch, and reads a clock where blocks and their parts begin and end.

Hooks read the clock where each block begins and ends. Within reduced blocks, the clock observes the
reduction (`tokred.engine.observing`), which tells it where the parts begin and end that the method
adds. In a pass that is not profiled there are neither hooks nor an observer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokred.data.inputs import Inputs, device_of, pixels
from tokred.engine.reduction import Reduction
from tokred.host import Denoiser, Host, Stage, UnsupportedModelError, find_host, module_of
from tokred.measure.limit import put_on, through
from tokred.measure.profile.clock import Clock, Spent, _hooks, clock_for
from tokred.measure.profile.values import PARTS, LayerTimes, Profile
from tokred.measure.race import Arm, Side, measure
from tokred.measure.subject import Subject, check_method, check_rounds, subject
from tokred.patching import host_of, uncompiled
from tokred.patching.presets import Preset
from tokred.reducers import Reducer
from tokred.schedule import Schedule


def profile(
    model: nn.Module,
    images: Inputs,
    method: str | Reducer | Preset | None = None,
    keep_rate: float | Schedule | None = None,
    *,
    schedule: Schedule | None = None,
    host: Host | None = None,
    rounds: int = 10,
    warmup: int = 2,
    on_round: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measures what each block of the reduced model spends its time on, beside the dense model and
    the free limit.

    Every round runs the batch through all three, with the clock and without it, in shuffled order.
    On CUDA the clock is read by events on the current stream, and nothing waits for them: the time
    in which the device waits for Python belongs to the part in which it passes. Reading the clock
    takes time, too: `Profile.overhead` says how much slower the profiled model is than the same
    model without the clock. The model is left as it was.

    Args:
        model: a supported model in evaluation mode, with or without a reduction; not a denoiser.
            If `torch.compile` has wrapped it, the model inside is profiled, not compiled.
        images: one batch, on the model's device and in its dtype.
        method: what to profile; the reduction that is applied, if not given.
        keep_rate: as for `tokred.apply`; with `method` only.
        schedule: as for `tokred.apply`; with `method` only.
        host: as for `tokred.apply`.
        rounds: measured runs of each.
        warmup: runs of each before, which are not measured.
        on_round: called after every round with (rounds done, rounds in all), for progress bars.

    Raises:
        ValueError: no method is given and none is applied; there are no images; a keep rate or a
            schedule is given without a method; or the model is in training mode.
        TypeError: the images are neither a tensor nor a mapping.
        UnsupportedModelError: the model is a denoiser, or none that we know.
        RuntimeError: parts of the model were compiled in place, or some block is not called as a
            module.
    """
    # Longer than 60 lines by its documented arguments.
    check_rounds(rounds, warmup)
    check_method(method, keep_rate, schedule)
    _check_images(images)
    model = uncompiled(module_of(model))
    _check_model(model, host)
    clock = clock_for(device_of(images))
    with subject(model, images, method, keep_rate, schedule, host) as what:
        assert isinstance(what.host, Host | Stage) and isinstance(what.reduction, Reduction)
        after: Sequence[int] = what.counts
        around = what.reduction.traits.place == "around"
        if around:
            after = through(model, what.host, images, what.reduction, what.tokens)
        blocks = what.host.blocks(find_host(model, host)[1])
        measured = _measured(what, blocks, images, clock, rounds, warmup, on_round)
    spent = {name: Spent(clock.spent(name)[warmup:]) for name in ("dense", "reduced", "limit")}
    _check_seen(spent["reduced"], len(blocks))
    return Profile(
        model=type(model).__name__,
        method=str(what.reduction.reducer),
        place=what.reduction.traits.place,
        proportional_attention=what.reduction.proportional_attention,
        tokens=what.tokens,
        layers=_layers(spent, what.tokens, after, around),
        behind=spent["reduced"].median(None, "back"),
        dense=measured["dense"],
        reduced=measured["reduced"],
        limit=measured["limit"],
        why_seamed=what.limits.why_seamed,
        profiled=measured["profiled reduced"],
        **what.conditions,
    )


def _check_images(images: Any) -> None:
    """Refuses what is not one batch of images."""
    if not isinstance(images, Tensor | Mapping):
        raise TypeError(
            "images must be one batch, a tensor or a mapping with one, not a "
            f"{type(images).__name__}"
        )
    if len(pixels(images)) == 0:
        raise ValueError("images must hold one image at least, not 0")


def _check_model(model: nn.Module, host: Host | None) -> None:
    """Refuses models in which the clock could not be read."""
    if isinstance(host_of(model, host), Denoiser):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a denoiser: tokens are merged around single modules, so "
            "there are no layers to profile; tokred.bench measures it as a whole"
        )
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise RuntimeError(
                f"{name or type(model).__name__} was compiled in place, and the clock cannot be "
                "read inside of compiled code: profile a model that is not compiled"
            )


def _check_seen(reduced: Spent, blocks: int) -> None:
    """Refuses models with blocks whose hooks were not called."""
    for layer in range(blocks):
        if any((layer, "rest") not in one for one in reduced.passes):
            raise RuntimeError(
                f"block {layer} was not seen to run: the model does not call it as a module, so "
                "its hooks are not called either; tokred.bench measures the model as a whole"
            )


def _measured(
    what: Subject,
    blocks: Sequence[nn.Module],
    images: Inputs,
    clock: Clock,
    rounds: int,
    warmup: int,
    on_round: Callable[[int, int], None] | None,
) -> dict[str, Arm]:
    """Runs the dense model, the reduced one and the free limit in turns, each of them with the
    clock ("profiled ...") and without it."""
    model, handles = what.model, list[Any]()

    def unclocked() -> None:
        for handle in handles:
            handle.remove()
        handles.clear()

    def become(reduction: Any, profiled: str = "") -> None:
        unclocked()
        put_on(model, what.host, reduction)
        if profiled:
            clock.begin(profiled)
            for layer, block in enumerate(blocks):
                handles.extend(_hooks(block, layer, clock))

    assert isinstance(what.reduction, Reduction)
    arms = {"dense": None, "reduced": what.reduction, "limit": what.limits.free}
    clocked = {**arms, "reduced": replace(what.reduction, observer=clock)}
    sides: dict[str, Side] = {}
    for name in arms:
        sides[name] = (model, partial(become, arms[name]))
        sides[f"profiled {name}"] = (model, partial(become, clocked[name], name))
    try:
        return measure(sides, images, rounds, warmup, on_round)
    finally:
        unclocked()


def _layers(
    spent: dict[str, Spent], tokens: int, after: Sequence[int], around: bool
) -> tuple[LayerTimes, ...]:
    numbers = range(len(after))
    # Where blocks are gated, the free limit has the most tokens first.
    rank = sorted(numbers, key=lambda layer: -after[layer]) if around else list(numbers)
    layers, now = [], tokens
    for layer in numbers:
        before = tokens if around else max(now, after[layer])
        layers.append(
            LayerTimes(
                layer,
                before,
                after[layer],
                **{part: spent["reduced"].median(layer, part) for part in ("rest", *PARTS)},
                dense=spent["dense"].median(layer, "rest"),
                limit=spent["limit"].median(rank.index(layer), "rest"),
            )
        )
        now = after[layer]
    return tuple(layers)
