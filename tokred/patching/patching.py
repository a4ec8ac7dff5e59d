"""`tokred.apply` and `tokred.remove`: put fewer tokens into a model, and take it back.

A patch is a callable object in the `forward` of a block's own instance, and forward hooks on the
submodules whose output a method wants to see. Class, weights and state dict stay as they are.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred import gates as weights
from tokred.engine.run import Reduction, State, Step, check_gates, needed_for_pooling
from tokred.engine.windows import in_windows, too_small, why_not
from tokred.host.host import (
    Denoiser,
    Host,
    UnsupportedModelError,
    find_denoiser,
    find_host,
    innermost,
    innermost_slot,
    module_of,
    submodule,
)
from tokred.patching.denoising import (
    HOOKS,
    Around,
    AroundModule,
    Denoising,
    hook_on,
    plan_for,
    stand_ins,
)
from tokred.patching.presets import Preset
from tokred.reducers import (
    Learned,
    Reconstruction,
    Reducer,
    learned,
    make,
    place,
    proportional,
    prunes,
    varies,
)
from tokred.reducers.slic import Bilinear, Nearest
from tokred.schedule import Hourglass, Schedule, Shares, Stages, check_keep_rate


def apply(
    model: Any,
    method: str | Reducer | Preset = "tome",
    keep_rate: float | Schedule | Around | None = None,
    *,
    schedule: Schedule | None = None,
    reconstruction: str | Reconstruction | None = None,
    stage: int | None = None,
    host: Host | None = None,
    proportional_attention: bool | None = None,
    full_grid: bool = True,
    attention: str = "host",
) -> Any:
    """Makes `model` merge or drop tokens from its next forward pass on, in place.

    Weights, class and state dict of the model stay as they are. Applying again replaces the
    former reduction; `tokred.remove` takes it away. If anything is wrong, nothing is changed.

    >>> model = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
    >>> tokred.apply(model, "atc", keep_rate=0.5)

    Args:
        model: a model of a supported family (see `tokred.hosts`), or one that has such a vision
            tower somewhere inside; the rest of it is left alone. Or a pipeline of transformers,
            whose model is meant. Or a denoiser of diffusers, or a pipeline whose denoiser is meant;
            of the options, only `method` and `keep_rate` have a meaning there.
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
        attention: "host" leaves attention as the host computes it. "fastest" may compute it the
            host's other way (fused or not) where that is faster, which rounds differently: on
            CPUs in bfloat16.

    Returns:
        The reduction, which now hangs on the model: a `Reduction`, of a denoiser a `Denoising`.

    Raises:
        ValueError: an option is out of range, or no method has that name.
        TypeError: an option is of the wrong type.
        UnsupportedModelError: the model, or one of its blocks, is not one we know.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("tokred.apply cannot be compiled: call it outside torch.compile's code")
    model = module_of(model)
    denoiser = find_denoiser(uncompiled(model)) if host is None else None
    if denoiser is not None and not isinstance(method, Preset):
        options = {
            "schedule": schedule,
            "reconstruction": reconstruction,
            "stage": stage,
            "proportional_attention": proportional_attention,
            "full_grid": None if full_grid else full_grid,
            "attention": None if attention == "host" else attention,
        }
        denoising = plan_for(uncompiled(model), denoiser, method, keep_rate, options)
        hang(model, denoiser, denoising)
        return denoising
    host, reduction = reduction_for(
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
    )
    patches = reduction.layout.patches
    if min(reduction.counts(patches, reduction.layout.grid)) == patches:
        warnings.warn(
            f"{reduction.schedule} keeps all {patches} tokens: nothing is reduced", stacklevel=2
        )
    if host.stages is not None:
        reduction = in_windows(reduction, reduction.layout.grid)
    hang(model, host, reduction)
    return reduction


def reduction_for(
    model: nn.Module,
    method: str | Reducer | Preset = "tome",
    keep_rate: float | Schedule | Around | None = None,
    *,
    schedule: Schedule | None = None,
    reconstruction: str | Reconstruction | None = None,
    stage: int | None = None,
    host: Host | None = None,
    proportional_attention: bool | None = None,
    full_grid: bool = True,
    attention: str = "host",
) -> tuple[Host, Reduction]:
    """What `apply` hangs on a model that is no denoiser, and by which host: everything checked,
    nothing changed. See there for arguments and errors."""
    if isinstance(keep_rate, Around):
        raise TypeError(
            f"keep_rate must be a number or a schedule for {type(model).__qualname__}, not "
            f"{keep_rate!r}, which is for denoisers"
        )
    if isinstance(method, Preset):
        if keep_rate is not None or schedule is not None:
            raise ValueError(
                "a preset has a schedule of its own: give no keep_rate and no schedule"
            )
        schedule = method.schedule
        method = method.reducer
    reducer = make(method)
    gated = None
    if learned(reducer) and isinstance(reducer.gates, str | Path):
        gated = weights.read(reducer.gates)
        if keep_rate is None and schedule is None:
            schedule = Shares(gated[1]["shares"])
    chosen = _schedule(reducer, keep_rate, schedule)
    if isinstance(chosen, Hourglass) and chosen.grid and getattr(reducer, "grid", ()) is None:
        reducer = replace(reducer, grid=chosen.grid)  # type: ignore[type-var]
    rebuilt = _reconstruction(reducer, reconstruction)
    if not full_grid and place(reducer) == "around":
        raise ValueError(
            f"full_grid must be True for {reducer}: there are all tokens again behind every block"
        )
    if attention not in ("host", "fastest"):
        raise ValueError(f"attention must be 'host' or 'fastest', not {attention!r}")
    host, tower = find_host(model, host)
    host = host.at(tower, stage)
    if host.stages is not None:
        reason = why_not(reducer, proportional_attention, full_grid)
        if reason:
            raise UnsupportedModelError(f"{type(model).__qualname__}: {reason}")
    host.check(tower, signals_of(reducer))
    if prunes(reducer) and rebuilt is None:
        reason = host.merges_only(model, tower)
        if reason:
            raise UnsupportedModelError(f"{type(model).__qualname__}: {reason}")
    layout = host.layout(tower, None)
    if proportional_attention is None:
        proportional_attention = proportional(reducer)
    reduction = Reduction(
        reducer,
        chosen,
        layout,
        proportional_attention,
        full_grid,
        attention,
        host.tapped,
        host.averages(model, tower),
        rebuilt,
    )
    if learned(reducer):
        reduction.gates = _gates(model, host, tower, reducer, reduction, gated)
    return host, reduction


def remove(model: Any) -> None:
    """Takes the reduction away; the model is again as it was. Does nothing if there is none."""
    for module in module_of(model).modules():
        patched = innermost(module)
        if isinstance(patched, Patched | PatchedAttention | AroundModule):
            _set_innermost(module, None)
            attributes = getattr(patched.reduction, "attributes", None)
            if attributes is not None:
                attributes.take_away()
        for name, value in list(vars(module).items()):
            if isinstance(value, PatchedMethod):
                delattr(module, name)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hung in list(hooks.items()):
                if isinstance(hung, (Tap, Carry, Pool, Grid, HandedOut, *HOOKS)):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


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
    model = module_of(model)
    former, host = reduction_of(model), host_of(model, options.get("host"))
    reduction = apply(model, method, keep_rate, **options)
    try:
        yield reduction
    finally:
        remove(model)
        if former is not None:
            hang(model, host, former)


def host_of(model: nn.Module, host: Host | None = None) -> Host | Denoiser:
    """The patch for a model; the one that is given, if it is for the model.

    Raises:
        UnsupportedModelError: there is none.
    """
    denoiser = find_denoiser(uncompiled(model)) if host is None else None
    return denoiser or find_host(model, host)[0]


def reduction_of(model: Any) -> Any:
    """The reduction that is applied to the model, if there is one."""
    for module in module_of(model).modules():
        patched = innermost(module)
        if isinstance(patched, Patched | AroundModule):
            return patched.reduction
    return None


def hang(model: nn.Module, host: Host | Denoiser, reduction: Reduction | Denoising) -> None:
    """Hangs a checked reduction on the model, in place of what hung there."""
    if isinstance(host, Denoiser):
        assert isinstance(reduction, Denoising)
        model = uncompiled(model)
        replaced = stand_ins(model, reduction)
        remove(model)
        for module, stand_in in replaced:
            _set_innermost(module, stand_in)
        hook_on(model, host, reduction)
        return
    assert isinstance(reduction, Reduction)
    _, tower = find_host(model, host)
    signals = sorted(signals_of(reduction.reducer) - host.shows)
    # All that can fail comes before the first change.
    made = []
    for layer, block in enumerate(host.blocks(tower)):
        forward = host.forward_of(block)
        taps = [(name, str(host.tap_of(block, name)), host.reads.get(name)) for name in signals]
        patched = Patched(
            block,
            forward,
            reduction,
            layer,
            layer == 0,
            host.scale(block),
            host.explicit(block) if reduction.attention == "fastest" else None,
            tuple(taps),
            host.checkpoint,
            _mask_of(forward),
            host.pads,
            host.grid,
            host.channels_first,
        )
        attention = None
        if host.attention is not None and host.attend is not None:
            attention = PatchedAttention(host.attention(block), host.attend, reduction)
        made.append((patched, attention))
    passes, pools = host.passes(tower), host.pools(tower)
    patches = None
    wants_grid = "grid" in reduction.reducer.needs or reduction.reconstruction is not None
    if wants_grid and host.grid is None:
        patches = _convolution(model, made[0][0].block)

    remove(model)
    for patched, attention in made:
        patched.tap()
        _set_innermost(patched.block, patched)
        if attention is not None:
            _set_innermost(attention.attention, attention)
    for module in passes:
        module.register_forward_hook(Carry(reduction))
    for module in pools:
        module.register_forward_pre_hook(Pool(reduction))
    if patches is not None:
        patches.register_forward_hook(Grid(reduction))
    if host.handed_out is not None:
        hook = HandedOut(reduction, host.handed_out)
        tower.register_forward_pre_hook(hook, with_kwargs=True)
    for name, call in host.methods.items():
        original = getattr(type(tower), name, None)
        if original is not None:  # not every version has every method
            vars(tower)[name] = PatchedMethod(tower, original, call, reduction)
    if reduction.attributes is not None:
        reduction.attributes.hang()


def _convolution(model: nn.Module, first: nn.Module) -> nn.Module | None:
    """The convolution that makes patches: the last one in front of the first block (which need not
    be part of the tower). None where patches are made otherwise."""
    found = None
    for module in model.modules():
        if module is first:
            return found
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            found = module
    return None


def _set_innermost(module: nn.Module, stand_in: Any) -> None:
    """Puts something in place of a module's own forward, inside of what wraps it; None puts its
    own back."""
    where, name = innermost_slot(module)
    if stand_in is not None:
        where[name] = stand_in
    elif where is vars(module) and name == "forward":
        where.pop(name, None)
    else:
        where[name] = MethodType(type(module).forward, module)


def _mask_of(forward: Callable[..., Any]) -> tuple[str, int] | None:
    """The name of the mask that a block is given, and which argument behind the tokens it is."""
    names = list(inspect.signature(forward).parameters)[3:]
    for name in ("attn_mask", "attention_mask"):
        if name in names:
            return name, names.index(name)
    return None


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` or DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


# Objects rather than closures, so that a copied or pickled model takes its own along.


@dataclass(eq=False)
class Patched:
    """Stands in for `block.forward`."""

    is_tokred: ClassVar[bool] = True
    __name__: ClassVar[str] = "forward"

    block: nn.Module
    call: Callable[..., Any]
    reduction: Reduction
    layer: int
    first: bool
    scale: float
    explicit: nn.Module | None
    taps: tuple[tuple[str, str, Callable[[Any, Tensor], Tensor] | None], ...]
    checkpoint: Callable[[Any], Callable[..., Any] | None] | None
    mask: tuple[str, int] | None
    pads: bool
    grid: Callable[..., tuple[int, int]] | None = None
    channels_first: bool = False

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(type(self.block).forward, self.block)  # for inspect.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and self._varies(args, kwargs):
            return _eagerly(self, *args, **kwargs)
        if self.checkpoint is not None:
            through = self.checkpoint(self.block)
            if through is not None:
                again = partial(self.run, **kwargs)
                if self.grid is not None and not self.first and args:
                    again = partial(self._knowing, self.reduction.riding(args[0]), kwargs)
                return through(again, *args)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block with fewer tokens, whatever it is called through."""
        if not args:  # given by name
            args = (kwargs.pop(next(iter(inspect.signature(self).parameters))),)
        x, *others = args
        if self.grid is not None:
            return self._on_a_map(x, others, kwargs)
        mask = self._given_mask(others, kwargs) if self.first else None
        training = self.block.training
        step = self.reduction.enter(
            self.layer, self.first, self.scale, x, mask, self.explicit, training
        )
        if self.taps and not torch.compiler.is_compiling() and step.wants_signals:
            self.tap()
        few = step.open(x)
        if step.masked or place(self.reduction.reducer) != "around":
            y = self.call(self.block, step, few, *others, **kwargs)
        else:
            given = (*others, *kwargs.values())
            y = step.gated(
                lambda x: self.call(self.block, step, x, *others, **kwargs),
                few,
                alone=not any(isinstance(value, Tensor) for value in given),
            )
        if isinstance(y, tuple):
            return (step.close(y[0]), *y[1:])
        return step.close(y)

    def _knowing(self, state: State | None, kwargs: dict[str, Any], x: Tensor, *others: Any) -> Any:
        """`run`, if `x` may be a copy: where a whole stage is checkpointed, and its blocks once
        more, recomputation has no other. (Only where it is right for any kind of checkpointing:
        no gradient flows through the state.)"""
        if state is not None and not torch.compiler.is_compiling():
            self.reduction.carry(x, state)
        return self.run(x, *others, **kwargs)

    def _on_a_map(self, x: Tensor, others: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The same where tokens are those of a feature map, whose grid only the block itself
        knows."""
        assert self.grid is not None
        if self.first:
            grid = self.grid(self.block, x, *others, **kwargs)
            self.reduction.set_grid(grid)
            if not torch.compiler.is_compiling() and too_small(self.reduction, grid):
                warnings.warn(
                    f"a feature map of {grid[0]}x{grid[1]} tokens is too small for its windows to "
                    "be reduced: nothing is reduced",
                    stacklevel=2,
                )
        tokens = self._tokens_of(x)
        self.reduction.pass_on(x, tokens)
        step = self.reduction.enter(self.layer, self.first, self.scale, tokens)
        self.reduction.pass_on(tokens, x)
        tokens = step.open(tokens)
        y = self.call(self.block, step, self._map_of(tokens, step, x), *others, **kwargs)
        rest = None
        if isinstance(y, tuple):
            y, *rest = y
        tokens = step.close(self._tokens_of(y))
        y = self._map_of(tokens, step, x)
        if y is not tokens:
            self.reduction.pass_on(tokens, y)
        return y if rest is None else (y, *rest)

    def _tokens_of(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] of a feature map in the host's form."""
        if self.channels_first:
            return x.flatten(2).transpose(1, 2)
        return x.flatten(1, -2)

    def _map_of(self, tokens: Tensor, step: Step, like: Tensor) -> Tensor:
        """The feature map, in the host's form, of [batch, tokens, dim]."""
        if like.ndim == 3:
            return tokens
        cells: Tensor = tokens.unflatten(1, step.grid_of(tokens))
        return cells.movedim(-1, 1) if self.channels_first else cells

    def tap(self) -> None:
        """Reads signals where they are now: a submodule may have been replaced since last time,
        by an adapter around it for example."""
        for signal, path, read in self.taps:
            module = submodule(self.block, path)
            if module is None:
                continue
            there = [hook for hook in module._forward_hooks.values() if _reads(hook, signal)]
            if any(hook.reduction is self.reduction for hook in there):
                continue
            for part in module.modules():
                for key, hung in list(part._forward_hooks.items()):
                    if _reads(hung, signal):
                        del part._forward_hooks[key]
            module.register_forward_hook(Tap(self.reduction, signal, read, self.block))

    def _varies(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether how many tokens there will be depends on the images."""
        if varies(self.reduction.reducer):
            return True
        if self.reduction.gates is not None and self.block.training:
            return True  # decisions are kept for the loss
        return self.pads and self._given_mask(args[1:], kwargs) is not None

    def _given_mask(self, others: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        if self.mask is None:
            return None
        name, at = self.mask
        mask: Tensor | None = others[at] if at < len(others) else kwargs.get(name)
        return mask


@dataclass(eq=False)
class PatchedAttention:
    """Stands in for the forward of a block's attention, while the block runs."""

    is_tokred: ClassVar[bool] = True
    __name__: ClassVar[str] = "forward"

    attention: nn.Module
    call: Callable[..., Any]
    reduction: Reduction

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(type(self.attention).forward, self.attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.reduction.running
        if step is None:
            return type(self.attention).forward(self.attention, *args, **kwargs)
        return self.call(self.attention, step, *args, **kwargs)


@dataclass(eq=False)
class PatchedMethod:
    """Stands in for another method of the model."""

    model: nn.Module
    original: Callable[..., Any]
    call: Callable[..., Any]
    reduction: Reduction

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(self.original, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and varies(self.reduction.reducer):
            return _eagerly(self, *args, **kwargs)
        return self.call(self.reduction, self.original, self.model, *args, **kwargs)


@dataclass(eq=False)
class Tap:
    """A forward hook that shows a submodule's output to the running block."""

    reduction: Reduction
    signal: str
    read: Callable[[Any, Tensor], Tensor] | None
    block: nn.Module

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        value = output if self.read is None else self.read(self.block, output)
        self.reduction.see(self.signal, value)


def _reads(hook: Any, signal: str) -> TypeGuard[Tap]:
    return isinstance(hook, Tap) and hook.signal == signal


@dataclass(eq=False)
class Carry:
    """A forward hook that carries the state across a module that treats tokens one by one."""

    reduction: Reduction

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.compiler.is_compiling() and varies(self.reduction.reducer):
            _eagerly(self, module, args, output)
        else:
            self.reduction.pass_on(args[0], output)


@dataclass(eq=False)
class Grid:
    """A forward hook that tells on which grid the patches of the images stand. Of videos, the
    frames are stacked."""

    reduction: Reduction

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        *frames, rows, columns = output.shape[2:]
        self.reduction.set_grid((math.prod(frames) * rows, columns))


@dataclass(eq=False)
class HandedOut:
    """A forward pre-hook of the model that tells which layers a call of it hands out."""

    reduction: Reduction
    layers: Callable[[Any, Any, Any], frozenset[int]]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.reduction.set_tapped(self.layers(module, args, kwargs))


@dataclass(eq=False)
class Pool:
    """A forward pre-hook of a module that pools features: shows it merged tokens as often as the
    tokens they stand for, and no dropped ones."""

    reduction: Reduction

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        state = self.reduction.carried(x)
        if state is None:
            return None
        self.reduction.check_pooling(state)
        if not needed_for_pooling(state):
            return None
        if not state.prunes:
            return (self.reduction.expand(x, state), *args[1:])
        fewer = self.reduction.compress(x, state)
        if len(args) > 1 and isinstance(args[1], Tensor):  # says which tokens are there
            there = torch.ones(fewer.shape[:2], dtype=torch.bool, device=x.device)
            if state.size is not None:
                layout = self.reduction.layout
                there = F.pad(state.size > 0, (layout.prefix, layout.suffix), value=True)
            return (fewer, there.to(args[1].dtype), *args[2:])
        if state.size is not None and bool((state.size == 0).any()):
            raise ValueError(
                f"{self.reduction.reducer} keeps different numbers of tokens in different images, "
                f"and {type(module).__name__} pools without a mask: use a method that merges, or "
                "images one by one"
            )
        return (fewer, *args[1:])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eagerly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Leaves the graph that is being compiled: how many tokens there will be is not known yet."""
    return call(*args, **kwargs)


def signals_of(reducer: Reducer) -> frozenset[str]:
    """What must be read off a block for the signals that a method needs."""
    attention = {"key", "query"}
    read = {
        "key": {"key"},
        "value": {"value"},
        "class_attention": attention,
        "attention_received": attention,
    }
    unknown = reducer.needs - read.keys() - {"grid"}
    if unknown:
        raise UnsupportedModelError(f"{reducer} needs {sorted(unknown)}; known are {sorted(read)}")
    return frozenset().union(*(read.get(signal, ()) for signal in reducer.needs))


def _gates(
    model: nn.Module,
    host: Host,
    tower: nn.Module,
    reducer: Learned,
    reduction: Reduction,
    read: tuple[dict[str, Tensor], dict[str, Any]] | None,
) -> nn.ModuleDict | None:
    """The modules of a learned method: those given, those read, or random ones.

    Raises:
        ValueError: they do not fit.
    """
    where = str(reducer.gates)
    if read is not None:
        check_gates(reducer, read[1], reduction.layout.layers, where)
    shares = reduction.shares
    layers = reducer.layers(shares)
    if not layers:
        return None
    block = host.blocks(tower)[0]
    width = weights.width_of(block)
    if width is None:
        raise UnsupportedModelError(
            f"{type(model).__qualname__}: blocks have no linear layer that tells the width of "
            "their tokens"
        )
    gates = nn.ModuleDict()
    for layer in layers:
        share = shares[layer]
        if reducer.remembers:
            share = share / min(1.0, *shares[:layer])
        gates[str(layer)] = reducer.gate(width, share / max(1 - share, 1e-3))
    gates.to(next(block.parameters()).device)
    gates.train(tower.training)
    if read is not None:
        tensors, about = read
        if about["width"] != width:
            raise ValueError(
                f"gates: {where} is for tokens of width {about['width']}; those of "
                f"{type(tower).__qualname__} have {width}"
            )
        if varies(reducer) and any(
            abs(a - b) > 1e-3 for a, b in zip(about["shares"], shares, strict=True)
        ):
            raise ValueError(
                f"gates: {where} was trained for another keep rate, and its gates decide by "
                "themselves how many tokens stay: leave keep_rate and schedule out, or use "
                f"{type(reducer).__name__}(gates, fixed=True), which keeps as many as it is told"
            )
        own = {name: value for name, value in tensors.items() if name.split(".")[0] in gates}
        weights.fill(gates, own if not varies(reducer) else tensors, where)
    elif isinstance(reducer.gates, nn.ModuleDict):
        weights.fill(gates, reducer.gates.state_dict(), "gates")
        gates = reducer.gates
    elif not tower.training:
        warnings.warn(
            f"the gates of {reducer} are random, and so is what it leaves out: train them "
            "(`tokred train`), or give gates=, a file of trained ones",
            stacklevel=4,
        )
    return gates


def _schedule(
    reducer: Reducer, keep_rate: float | Schedule | None, schedule: Schedule | None
) -> Schedule:
    if schedule is not None:
        if not callable(schedule):
            raise TypeError(f"schedule must be one of tokred's schedules, not {schedule!r}")
        return schedule
    if callable(keep_rate):
        return keep_rate
    rate = 0.7 if keep_rate is None else keep_rate
    check_keep_rate(rate)
    own: Callable[[float], Schedule] = getattr(reducer, "schedule", Stages)
    return own(rate)


def _reconstruction(reducer: Reducer, chosen: str | Reconstruction | None) -> Reconstruction | None:
    if chosen is None:
        chosen = getattr(reducer, "reconstruction", None)
    named: dict[str, Callable[[], Reconstruction | None]] = {
        "copy": lambda: None,
        "nearest": Nearest,
        "bilinear": Bilinear,
    }
    if isinstance(chosen, str):
        if chosen not in named:
            raise ValueError(f"reconstruction must be one of {sorted(named)}, not {chosen!r}")
        chosen = named[chosen]()
    if chosen is not None and (isinstance(chosen, type) or not callable(chosen)):
        raise TypeError(
            f"reconstruction must be one of {sorted(named)} or a value such as tokred.Nearest(), "
            f"not {chosen!r}"
        )
    if chosen is not None and varies(reducer):
        raise ValueError(
            f"{reducer} keeps different numbers of tokens in different images: reconstruction "
            "must be 'copy'"
        )
    return chosen
