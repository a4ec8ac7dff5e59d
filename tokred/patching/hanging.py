"""Puts a planned reduction on a model, and takes it off.

A patch is a callable object in the `forward` of a block's own instance, and forward hooks on the
submodules whose output a method wants to see. Class, weights and state dict stay as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from tokred.engine.denoising import AroundModule, Denoising
from tokred.engine.observing import Observer
from tokred.engine.reduction import Reduction
from tokred.host import (
    Denoiser,
    Host,
    Stage,
    WindowedHost,
    blocks_of,
    find_denoiser,
    find_host,
    forward_of,
    innermost,
    innermost_slot,
    module_of,
    tap_of,
    unwrapped,
)
from tokred.patching.denoisers import HOOKS as DENOISING_HOOKS
from tokred.patching.denoisers import hook_on, stand_ins
from tokred.patching.planning import signals_of
from tokred.patching.stand_ins import (
    HOOKS,
    MARK,
    Carry,
    Grid,
    HandedOut,
    Patched,
    PatchedAttention,
    PatchedInWindows,
    PatchedMethod,
    Pool,
    StandIn,
    Tower,
    Trim,
    hung_on,
)
from tokred.patching.tracers import Scripted


def hang(
    model: nn.Module,
    host: Host | WindowedHost | Stage | Denoiser,
    reduction: Reduction | Denoising,
) -> None:
    """Hangs a checked reduction on the model, in place of what hung there."""
    if isinstance(host, Denoiser):
        assert isinstance(reduction, Denoising)
        model = uncompiled(model)
        replaced = stand_ins(model, host, reduction)
        remove(model)
        for module, stand_in in replaced:
            _set_innermost(module, stand_in)
            vars(module)[Scripted.NAME] = Scripted(module, reduction, without)
        hook_on(model, host, reduction)
        return
    assert isinstance(reduction, Reduction)
    found, tower = find_host(model, host)
    # All that can fail comes before the first change.
    made = stand_ins_for(found, tower, reduction)
    family = found.family
    attentions = []
    if family.attention is not None and family.attend is not None:
        for block in blocks_of(found, tower):
            attentions.append(PatchedAttention(family.attention(block), family.attend, reduction))
    hooks = _hooks(model, found, tower, reduction)

    remove(model)
    reading = reduction.reading
    for patched in made:
        if isinstance(patched, Patched) and patched.layer in reading:
            patched.tap()
        _set_innermost(patched.block, patched)
    for attention in attentions:
        _set_innermost(attention.attention, attention)
    for register, hook, options in hooks:
        register(hook, **options)
    # `torch.jit.script` asks every module, outermost first; parts of this model may be in another
    # one (a graph of torch.fx), so each that something hangs on must answer.
    hung = [register.__self__ for register, _, _ in hooks]  # type: ignore[attr-defined]
    for module in (model, tower, *(patched.block for patched in made), *hung):
        vars(module)[Scripted.NAME] = Scripted(module, reduction, without)
    for name, call in family.methods.items():
        original = getattr(type(tower), name, None)
        if original is not None:  # not every version has every method
            method = PatchedMethod(tower, original, call, reduction)
            vars(tower)[name] = method
            _mark(tower, name, method)
    wrapped = any(block is not unwrapped(block) for block in found.blocks(tower))
    reduction.end = Tower(tower, reduction, found, wrapped)
    if reduction.observer is not None:
        reduction.observer.hung()


def stand_ins_for(host: Host | Stage, tower: nn.Module, reduction: Reduction) -> list[StandIn]:
    """What stands in for the forwards of a tower's blocks."""
    made: list[StandIn] = []
    for layer, block in enumerate(blocks_of(host, tower)):
        common: dict[str, Any] = {
            "block": block,
            "call": forward_of(host, block),
            "reduction": reduction,
            "layer": layer,
            "first": layer == 0,
            "checkpoint": host.family.checkpoint,
            "always_full": host.family.always_full(block),
        }
        if isinstance(host, Stage):
            grid, channels_first = host.family.grid, host.family.channels_first
            made.append(PatchedInWindows(**common, grid=grid, channels_first=channels_first))
            continue
        made.append(
            Patched(
                **common,
                scale=None if host.scale is None else host.scale(block),
                explicit=host.explicit(block) if reduction.attention == "fastest" else None,
                taps=_taps(host, block, reduction),
                mask=_mask_of(common["call"]),
                pads=host.pads,
            )
        )
    return made


def _taps(host: Host, block: nn.Module, reduction: Reduction) -> tuple[Any, ...]:
    """For every signal that is read off a block: its name, the path of a submodule, and how it is
    made of that submodule's output."""
    return tuple(
        (signal, str(tap_of(host, block, signal)), host.reads.get(signal))
        for signal in sorted(signals_of(reduction.traits) - host.shows)
    )


def _hooks(
    model: nn.Module, host: Host | Stage, tower: nn.Module, reduction: Reduction
) -> list[tuple[Callable[..., Any], Any, dict[str, Any]]]:
    """The hooks of modules that are no blocks: how each is registered, the hook, and options."""
    found: list[tuple[Callable[..., Any], Any, dict[str, Any]]] = []
    if isinstance(host, Host):
        for module in host.passes(tower):
            found.append((module.register_forward_hook, Carry(reduction), {}))
        for module in host.pools(tower):
            found.append((module.register_forward_pre_hook, Pool(reduction), {}))
        if reduction.trims and reduction.traits.prunes:
            found.append((tower.register_forward_hook, Trim(reduction), {}))
        patches = _convolution(model, blocks_of(host, tower)[0])
        if patches is not None:
            found.append((patches.register_forward_hook, Grid(reduction), {}))
    if host.family.handed_out is not None:
        hook = HandedOut(reduction, host.family.handed_out)
        found.append((tower.register_forward_pre_hook, hook, {"with_kwargs": True}))
    return found


def remove(model: Any) -> None:
    """Takes the reduction away; the model is again as it was. Does nothing if there is none.

    What was wrapped around a patched method since then stays, and calls the model's own method
    again.
    """
    observers: dict[int, Observer] = {}  # of all blocks, each once
    for module in module_of(model).modules():
        patched = _take_off(module)
        if isinstance(patched, StandIn) and patched.reduction.observer is not None:
            observers[id(patched.reduction.observer)] = patched.reduction.observer
    for observer in observers.values():
        observer.taken_away()


def _take_off(module: nn.Module) -> Any:
    """Takes what hangs on one module off; returns what was put in place of its forward."""
    patched = innermost(module)
    if isinstance(patched, StandIn | PatchedAttention | AroundModule):
        _set_innermost(module, None)
    for name, value in list(vars(module).items()):
        if isinstance(value, PatchedMethod | Scripted):
            del vars(module)[name]
    for stand_in in vars(module).pop(MARK, {}).values():
        stand_in.off = True
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hung in list(hooks.items()):
            if isinstance(hung, (*HOOKS, *DENOISING_HOOKS)):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return patched


def without(model: nn.Module) -> nn.Module:
    """A copy of a patched model on which nothing of ours hangs, with the same parameters and
    buffers.

    Raises:
        RuntimeError: hooks of diffusers hang around what is ours. A copy would share them.
    """
    twins: dict[int, nn.Module] = {}
    for module in model.modules():
        if innermost_slot(module)[0] is not vars(module):
            raise RuntimeError("take the hooks of diffusers off the model first")
        twin = twins[id(module)] = copy.copy(module)
        for name in ("_modules", *_HOOKS):
            vars(twin)[name] = vars(module)[name].copy()
        vars(twin).pop(MARK, None)  # what stands in for the model's own goes on
    for twin in twins.values():
        for name, part in twin._modules.items():
            twin._modules[name] = None if part is None else twins[id(part)]
        _take_off(twin)
    return twins[id(model)]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def reduction_of(model: Any) -> Any:
    """The reduction that is applied to the model, if there is one."""
    for module in module_of(model).modules():
        patched = innermost(module)
        if patched is not None and not isinstance(patched, StandIn | AroundModule):
            patched = hung_on(module).get("forward")  # behind what was wrapped around it
        if isinstance(patched, StandIn | AroundModule):
            return patched.reduction
    return None


def host_of(model: nn.Module, host: Host | WindowedHost | None = None) -> Host | Stage | Denoiser:
    """The patch for a model; the one that is given, if it is for the model.

    Raises:
        UnsupportedModelError: there is none.
    """
    denoiser = find_denoiser(uncompiled(model)) if host is None else None
    return denoiser or find_host(model, host)[0]


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` or DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


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
        _mark(module, "forward", stand_in)
    elif where is vars(module) and name == "forward":
        where.pop(name, None)
    else:
        where[name] = MethodType(type(module).forward, module)


def _mark(module: nn.Module, name: str, stand_in: Any) -> None:
    """Keeps what stands in for a method of a module where nothing that is wrapped around it later
    hides it."""
    vars(module).setdefault(MARK, {})[name] = stand_in


def _mask_of(forward: Callable[..., Any]) -> tuple[str, int] | None:
    """The name of the mask that a block is given, and which argument behind the tokens it is."""
    names = list(inspect.signature(forward).parameters)[3:]
    for name in ("attn_mask", "attention_mask"):
        if name in names:
            return name, names.index(name)
    return None
