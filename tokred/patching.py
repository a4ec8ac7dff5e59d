"""`tokred.apply` and `tokred.remove`: put fewer tokens into a model, and take it back.

A patch is a callable object in the `forward` of a block's own instance, and forward hooks on the
submodules whose output a method wants to see. Class, weights and state dict stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tokred.host import Host, UnsupportedModelError, find_host
from tokred.reducers import Reducer, make, proportional, varies
from tokred.run import Reduction
from tokred.schedule import Schedule, Stages, check_keep_rate, plan


def apply(
    model: nn.Module,
    method: str | Reducer = "tome",
    keep_rate: float | Schedule = 0.7,
    *,
    schedule: Schedule | None = None,
    host: Host | None = None,
    proportional_attention: bool | None = None,
    full_grid: bool = True,
    attention: str = "host",
) -> Reduction:
    """Makes `model` merge or drop tokens from its next forward pass on, in place.

    Weights, class and state dict of the model stay as they are. Applying again replaces the
    former reduction; `tokred.remove` takes it away. If anything is wrong, nothing is changed.

    >>> model = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
    >>> tokred.apply(model, "atc", keep_rate=0.5)

    Args:
        model: a model of a supported family (see `tokred.hosts`).
        method: a short name (see `tokred.methods`), or a reducer such as
            `tokred.ATC(linkage="complete")`.
        keep_rate: the share of patch tokens kept at each of three stages, a quarter, a half and
            three quarters of the way, in (0, 1]; or a schedule.
        schedule: the same as a schedule given for `keep_rate`.
        host: how to patch the model; found from its class if not given.
        proportional_attention: whether a token that stands for s tokens counts s times in
            attention (ToMe, equation 1); as the method's paper has it, if not given. Models
            pretrained with masks (MAE) and not fine-tuned are better without.
        full_grid: whether features come out on the full grid again, in the host's own order, with
            copies for merged tokens and the last value for dropped ones. If not, they come out
            reduced (where images end with different numbers of tokens, with zeros at the end).
            Class scores are the same.
        attention: "host" leaves attention as the host computes it. "fastest" may compute it the
            host's other way (fused or not) where that is faster, which rounds differently: on
            CPUs in bfloat16.

    Returns:
        The reduction, which now hangs on the model.

    Raises:
        ValueError: an option is out of range, or no method has that name.
        TypeError: an option is of the wrong type.
        UnsupportedModelError: the model, or one of its blocks, is not one we know.
    """
    reducer = make(method)
    chosen = _schedule(keep_rate, schedule)
    if attention not in ("host", "fastest"):
        raise ValueError(f"attention must be 'host' or 'fastest', not {attention!r}")
    model = unwrap(model)
    host = host or find_host(model)
    host.check(model, _signals(reducer))
    layout = host.layout(model, None)
    tokens = layout.grid[0] * layout.grid[1]
    counts = plan(chosen, tokens, layout.layers)
    if min(counts) == tokens:
        warnings.warn(f"{chosen} keeps all {tokens} tokens: nothing is reduced", stacklevel=2)
    if proportional_attention is None:
        proportional_attention = proportional(reducer)
    reduction = Reduction(reducer, chosen, layout, proportional_attention, full_grid, attention)
    hang(model, host, reduction)
    return reduction


def remove(model: nn.Module) -> None:
    """Takes the reduction away; the model is again as it was. Does nothing if there is none."""
    for module in unwrap(model).modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Patched | PatchedMethod):
                delattr(module, name)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, Tap | Carry):
                del module._forward_hooks[key]


@contextmanager
def applied(
    model: nn.Module,
    method: str | Reducer = "tome",
    keep_rate: float | Schedule = 0.7,
    **options: Any,
) -> Iterator[Reduction]:
    """`apply` for the length of a `with` block; what was there before is put back at its end.

    >>> with tokred.applied(model, "tome", keep_rate=0.5):
    ...     fewer = model(images)
    """
    former = reduction_of(model)
    reduction = apply(model, method, keep_rate, **options)
    try:
        yield reduction
    finally:
        remove(model)
        if former is not None:
            hang(unwrap(model), options.get("host") or find_host(unwrap(model)), former)


def reduction_of(model: nn.Module) -> Reduction | None:
    """The reduction that is applied to the model, if there is one."""
    for module in unwrap(model).modules():
        patched = vars(module).get("forward")
        if isinstance(patched, Patched):
            return patched.reduction
    return None


def hang(model: nn.Module, host: Host, reduction: Reduction) -> None:
    """Hangs a checked reduction on the model, in place of what hung there."""
    remove(model)
    for layer, block in enumerate(host.blocks(model)):
        for signal in sorted(_signals(reduction.reducer)):
            tap = Tap(reduction, signal, host.reads.get(signal), block)
            host.taps[signal](block).register_forward_hook(tap)
        explicit = host.explicit(block) if reduction.attention == "fastest" else None
        patched = Patched(block, host.forward, reduction, layer, host.scale(block), explicit)
        vars(block)["forward"] = patched
    for module in host.passes(model):
        module.register_forward_hook(Carry(reduction))
    for name, call in host.methods.items():
        original = getattr(type(model), name)
        vars(model)[name] = PatchedMethod(model, original, call, reduction)


def unwrap(model: nn.Module) -> nn.Module:
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

    block: nn.Module
    call: Callable[..., Tensor]
    reduction: Reduction
    layer: int
    scale: float
    explicit: nn.Module | None = None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(type(self.block).forward, self.block)  # for inspect.signature

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() and varies(self.reduction.reducer):
            return cast(Tensor, _eagerly(self, x, *args, **kwargs))
        step = self.reduction.enter(self.layer, self.scale, x, self.explicit)
        return step.close(self.call(self.block, step, step.open(x), *args, **kwargs))


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


@dataclass(eq=False)
class Carry:
    """A forward hook that carries the state across a module that treats tokens one by one."""

    reduction: Reduction

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.compiler.is_compiling() and varies(self.reduction.reducer):
            _eagerly(self, module, args, output)
        else:
            self.reduction.pass_on(args[0], output)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eagerly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Leaves the graph that is being compiled: how many tokens there will be is not known yet."""
    return call(*args, **kwargs)


def _signals(reducer: Reducer) -> frozenset[str]:
    """What must be read off a block for the signals that a method needs."""
    attention = {"key", "query"}
    read = {
        "key": {"key"},
        "value": {"value"},
        "class_attention": attention,
        "attention_received": attention,
    }
    unknown = reducer.needs - read.keys()
    if unknown:
        raise UnsupportedModelError(f"{reducer} needs {sorted(unknown)}; known are {sorted(read)}")
    return frozenset().union(*(read[signal] for signal in reducer.needs))


def _schedule(keep_rate: float | Schedule, schedule: Schedule | None) -> Schedule:
    if schedule is not None:
        if not callable(schedule):
            raise TypeError(f"schedule must be one of tokred's schedules, not {schedule!r}")
        return schedule
    if callable(keep_rate):
        return keep_rate
    check_keep_rate(keep_rate)
    return Stages(keep_rate)
