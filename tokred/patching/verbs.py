"""`tokred.apply`, `tokred.remove` and `tokred.applied`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokred.engine.denoising import Around
from tokred.engine.windows import in_windows
from tokred.graphs import compiling
from tokred.host import (
    Host,
    Stage,
    WindowedHost,
    find_denoiser,
    find_host,
    module_of,
    scheduler_of,
)
from tokred.patching.denoisers import plan_for
from tokred.patching.gain import NoGainWarning, none_around, why_none
from tokred.patching.hanging import hang, host_of, reduction_of, remove, uncompiled
from tokred.patching.planning import reduction_for
from tokred.patching.presets import Preset
from tokred.reducers.protocol import Reconstruction, Reducer
from tokred.schedule import Schedule


# Longer than a page because of what it says of its arguments.
def apply(
    model: Any,
    method: str | Reducer | Preset = "tome",
    keep_rate: float | Schedule | Around | None = None,
    *,
    schedule: Schedule | None = None,
    reconstruction: str | Reconstruction | None = None,
    stage: int | None = None,
    host: Host | WindowedHost | None = None,
    proportional_attention: bool | None = None,
    full_grid: bool = True,
    attention: str = "host",
    prefix: int | None = None,
    hand_out: Sequence[int] = (),
) -> Any:
    """Makes `model` merge or drop tokens from its next forward pass on, in place.

    Weights, class and state dict of the model stay as they are. Applying again replaces the
    former reduction; `tokred.remove` takes it away. If anything is wrong, nothing is changed.

    >>> model = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
    >>> tokred.apply(model, "atc", keep_rate=0.5)

    Args:
        model: a model of a supported family (see `tokred.hosts`), or one that has such a vision
            tower somewhere inside; the rest of it is left alone. Or a pipeline of transformers,
            whose model is meant. Or a denoiser of diffusers, or a pipeline whose denoiser is meant
            (and whose scheduler then tells where in a sampling a call is); of the options, only
            `method` and `keep_rate` have a meaning there.
        method: a short name (see `tokred.methods`), a reducer such as
            `tokred.ATC(linkage="complete")`, or a preset (see `tokred.presets`), which brings its
            own schedule.
        keep_rate: the share of patch tokens kept, in (0, 1], 0.7 if not given: at each of three
            stages, a quarter, a half and three quarters of the way; by methods for dense
            prediction, from a third of the way on. Or a schedule. Of a denoiser, 0.5 if not given,
            around self-attention; or `tokred.Around`.
        schedule: the same as a schedule given for `keep_rate`.
        reconstruction: what the full grid is made of, where it is handed out: "copy" (each token
            that of its cluster, or its last value), "nearest" (a mean of the reduced tokens that
            resembled it), "bilinear" (of methods that keep a grid), or such a value
            (`tokred.Nearest(k=20, tau=50.0)`). As the method has it, if not given.
        stage: of a model whose blocks attend in windows (Swin), the stage to reduce, from 0; the
            one with most blocks, if not given. Layers of a schedule are blocks of this stage, and
            its tokens those of one window: `Hourglass(grid=(8, 8), down=6)`.
        host: how to patch the model; found from its class if not given.
        proportional_attention: whether a token that stands for s tokens counts s times in
            attention (ToMe, equation 1); as the method's paper has it, if not given. Models
            pretrained with masks (MAE) and not fine-tuned are better without.
        full_grid: whether features come out on the full grid again, in the host's own order, with
            copies for merged tokens and the last value for dropped ones. If not, they come out
            reduced (where images end with different numbers of tokens, with zeros at the end).
            Class scores are the same; with "nearest" and "bilinear" reconstruction, where a head
            pools tokens, nearly so: they are made again behind the last norm, not in front of it.
            (A model that averages merged tokens in its own forward gets the full grid all the
            same, for the sake of its answer.)
        attention: "host" leaves attention as the host computes it. "fastest" may compute it
            another way where that is faster, which rounds differently. On CPUs in bfloat16, that
            is the host's other way (fused or not). On CUDA, it is fused attention without a mask:
            the sizes of merged tokens go in with the values, which lets flash kernels run. Which
            form is faster is measured when a shape is first seen, and takes some milliseconds
            then; compiled models keep the mask.
        prefix: how many tokens stand in front of the patch tokens, in a subclass of a supported
            model that adds some (prompt tuning): its class, register and prompt tokens together.
            They are never merged or dropped. As many as the model's own class has, if not given.
        hand_out: layers that put out the full grid in every pass, from 0 (or from -1, the last
            one, backwards): for hooks on blocks, and for code that calls them one by one and looks
            at what they put out. The next block goes on with fewer tokens. (Layers that a model
            hands out by itself need not be named.)

    Returns:
        The reduction, which now hangs on the model: a `Reduction`, of a denoiser a `Denoising`.

    Raises:
        ValueError: an option is out of range, or no method has that name.
        TypeError: an option is of the wrong type.
        UnsupportedModelError: the model, or one of its blocks, is not one we know.

    Warns:
        NoGainWarning: by the size of the model's own images, choosing tokens takes longer than
            fewer tokens save. (Of models that attend in windows, nothing is said.)
    """
    if compiling():
        raise RuntimeError("tokred.apply cannot be compiled: call it outside torch.compile's code")
    scheduler, model = scheduler_of(model), module_of(model)
    denoiser = find_denoiser(uncompiled(model)) if host is None else None
    if denoiser is not None and not isinstance(method, Preset):
        options = {
            "schedule": schedule,
            "reconstruction": reconstruction,
            "stage": stage,
            "proportional_attention": proportional_attention,
            "full_grid": None if full_grid else full_grid,
            "attention": None if attention == "host" else attention,
            "prefix": prefix,
            "hand_out": tuple(hand_out) or None,
        }
        denoising = plan_for(uncompiled(model), denoiser, method, keep_rate, options, scheduler)
        around, inside = denoising.around, uncompiled(model)
        poor = none_around(inside, denoising.places, denoising.reducer, around)
        if poor is not None and around.keep_rate < 1:
            warnings.warn(poor, NoGainWarning, stacklevel=2)
        hang(model, denoiser, denoising)
        return denoising
    found, reduction = reduction_for(
        model,
        method,
        keep_rate,
        schedule=schedule,
        reconstruction=reconstruction,
        stage=stage,
        host=host,
        proportional_attention=proportional_attention,
        full_grid=full_grid,
        attention=attention,
        prefix=prefix,
        hand_out=hand_out,
    )
    patches = reduction.layout.patches
    if min(reduction.counts(patches, reduction.layout.grid)) == patches:
        warnings.warn(
            f"{reduction.schedule} keeps all {patches} tokens: nothing is reduced", stacklevel=2
        )
    elif isinstance(found, Host):
        poor = why_none(reduction, found.blocks(find_host(model, host)[1])[0])
        if poor is not None:
            warnings.warn(poor, NoGainWarning, stacklevel=2)
    if isinstance(found, Stage):
        reduction = in_windows(reduction, reduction.layout.grid)
    hang(model, found, reduction)
    return reduction


@contextmanager
def applied(
    model: Any,
    method: str | Reducer | Preset = "tome",
    keep_rate: float | Schedule | Around | None = None,
    **options: Any,
) -> Iterator[Any]:
    """`apply` for the length of a `with` block; what was there before is put back at its end.

    >>> with tokred.applied(model, "tome", keep_rate=0.5):
    ...     fewer = model(images)
    """
    former, host = reduction_of(model), host_of(module_of(model), options.get("host"))
    reduction = apply(model, method, keep_rate, **options)
    model = module_of(model)
    try:
        yield reduction
    finally:
        remove(model)
        if former is not None:
            hang(model, host, former)
