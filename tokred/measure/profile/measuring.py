"""`tokred.profile`: one model, one batch, and a clock that is read at the borders of every part.

The clock is read at the borders of every block, and inside of the reduced ones around what the
method adds. For that a stand-in of the reduction hangs on the model: the same numbers, by the same
code, with a clock around its methods. Nothing of it is there in a pass that is not profiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokred.data.inputs import Inputs, device_of, pixels
from tokred.engine.run import Reduction
from tokred.host.host import Denoiser, Host, UnsupportedModelError, find_host, module_of
from tokred.measure.conditions import device_name, versions_of
from tokred.measure.limit import counts_of, free_limit_of, through
from tokred.measure.profile.clock import Spent, _hooks, clock_for
from tokred.measure.profile.stand_ins import timed
from tokred.measure.profile.values import PARTS, LayerTimes, Profile
from tokred.measure.race import measure
from tokred.measure.subject import check_method, put_back
from tokred.patching.patching import apply, hang, host_of, reduction_of, remove, uncompiled
from tokred.patching.presets import Preset
from tokred.reducers import Reducer, place
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

    Every round runs the batch through all three, once with the clock read at the borders of blocks
    and parts, and once without, in shuffled order. On CUDA the borders are events on the current
    stream, and nothing waits for them: time in which the device waits for Python counts for the
    part in which it passes. Reading the clock takes time itself, and so does every border on a
    device: `Profile.overhead` says how much, against the model that is not profiled. The model is
    left as it was.

    Args:
        model: a supported model in evaluation mode, with or without a reduction; not a denoiser.
            Of a model that `torch.compile` has wrapped, what is inside is profiled, not compiled.
        images: one batch, on the model's device and in its dtype.
        method: what to profile; the reduction that is applied, if not given.
        keep_rate: as for `tokred.apply`; with `method` only.
        schedule: as for `tokred.apply`; with `method` only.
        host: as for `tokred.apply`.
        rounds: measured runs of each.
        warmup: runs of each before, which are not measured.
        on_round: called after every round with (rounds done, rounds in all), for progress bars.

    Raises:
        ValueError: there is nothing to profile: no method given and none applied, or no images;
            a keep rate or a schedule is given without a method; or the model is in training mode.
        TypeError: the images are neither a tensor nor a mapping.
        UnsupportedModelError: the model is a denoiser, or not known at all.
        RuntimeError: parts of the model were compiled in place, or some block is not called as a
            module.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup 0, not {rounds} and {warmup}")
    check_method(method, keep_rate, schedule)
    if not isinstance(images, Tensor | Mapping):
        raise TypeError(
            "images must be one batch, a tensor or a mapping with one, not a "
            f"{type(images).__name__}"
        )
    if len(pixels(images)) == 0:
        raise ValueError("images must hold one image at least, not 0")
    model = uncompiled(module_of(model))
    patch = host_of(model, host)
    if isinstance(patch, Denoiser):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a denoiser, around whose modules tokens are merged one by "
            "one: there are no layers to profile; tokred.bench measures it as a whole"
        )
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise RuntimeError(
                f"{name or type(model).__name__} was compiled in place, and the clock cannot be "
                "read inside of compiled code: profile the model as it was before that"
            )
    clock = clock_for(device_of(images))
    handles: list[Any] = []
    with put_back(model, host):
        if method is not None:
            apply(model, method, keep_rate, schedule=schedule, host=host)
        reduction = reduction_of(model)
        if reduction is None:
            raise ValueError("method must be given: no reduction is applied to the model")
        height, width = pixels(images).shape[-2:]
        found, tower = find_host(model, host)
        blocks = found.blocks(tower)
        grid = found.layout(tower, (height, width)).grid
        counts = counts_of(model, found, images, reduction, grid)
        around = place(reduction.reducer) == "around"
        if around:
            after = through(model, found, images, reduction, grid[0] * grid[1])
        else:
            after = list(counts)
        limit = free_limit_of(model, found, images, reduction, counts)

        def become(hung: Reduction | None, profiled: str | None) -> None:
            for handle in handles:
                handle.remove()
            handles.clear()
            if hung is None:
                remove(model)
            else:
                hang(model, found, hung)
            if profiled is not None:
                clock.begin(profiled)
                for layer, block in enumerate(blocks):
                    handles.extend(_hooks(block, layer, clock))

        arms = {"dense": None, "reduced": reduction, "limit": limit}
        clocked = {"dense": None, "reduced": timed(reduction, clock), "limit": limit}
        sides: dict[str, tuple[nn.Module, Callable[[], None]]] = {}
        for name in arms:
            sides[name] = (model, lambda hung=arms[name]: become(hung, None))  # type: ignore[misc]
            sides[f"profiled {name}"] = (
                model,
                lambda hung=clocked[name], name=name: become(hung, name),  # type: ignore[misc]
            )
        try:
            measured = measure(sides, images, rounds, warmup, on_round)
        finally:
            for handle in handles:
                handle.remove()
    spent = {name: Spent(clock.spent(name)[warmup:]) for name in arms}
    for layer in range(len(blocks)):
        if any((layer, "rest") not in one for one in spent["reduced"].passes):
            raise RuntimeError(
                f"block {layer} was not seen to run: it is called otherwise than as a module, past "
                "its hooks; tokred.bench measures the model as a whole"
            )
    return Profile(
        model=type(model).__name__,
        method=str(reduction.reducer),
        place=place(reduction.reducer),
        proportional_attention=reduction.proportional_attention,
        tokens=grid[0] * grid[1],
        layers=_layers(spent, grid[0] * grid[1], after, around),
        behind=spent["reduced"].median(None, "back"),
        batch=len(pixels(images)),
        image_size=(height, width),
        device=device_name(pixels(images).device),
        dtype=str(pixels(images).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions=versions_of(model),
        dense=measured["dense"],
        reduced=measured["reduced"],
        limit=measured["limit"],
        profiled=measured["profiled reduced"],
    )


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
