"""How a reduction is planned for a denoiser, and hung on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokred.engine.denoising import Around, AroundModule, Denoising, Place
from tokred.host import Denoiser, UnsupportedModelError, hosts
from tokred.reducers.protocol import Reducer, traits
from tokred.reducers.registry import make as named
from tokred.reducers.todo import ToDo
from tokred.reducers.tome2d import ToMe2d
from tokred.schedule import Schedule

NAMED: Mapping[str, Callable[[], Reducer]] = {"tome": ToMe2d, "todo": ToDo}
"""What names mean here that mean something else in other models, or nothing."""


def plan_for(
    model: nn.Module,
    host: Denoiser,
    method: str | Reducer,
    keep_rate: float | Schedule | Around | None,
    options: Mapping[str, Any],
    scheduler: Any = None,
) -> Denoising:
    """What `tokred.apply` hangs on a denoiser: everything checked, nothing changed. The scheduler
    is that of the pipeline, if one was given.

    Raises:
        ValueError: an option is out of range, or has no meaning here.
        TypeError: an option is of the wrong type.
        UnsupportedModelError: the method cannot be used, or no module is there to be reduced.
    """
    cls = type(model).__qualname__
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} must be left out for {cls}, not {value!r}: see tokred.Around")
    reducer = NAMED[method]() if isinstance(method, str) and method in NAMED else named(method)
    if callable(keep_rate):
        raise TypeError(
            f"keep_rate must be a number or tokred.Around(...) for {cls}, not {keep_rate!r}: its "
            "blocks have no schedule by layers"
        )
    rate = 0.5 if keep_rate is None else keep_rate
    around = rate if isinstance(rate, Around) else Around(rate)
    _check_method(cls, reducer, around)
    places = host.places(model)
    able = [p for p in places if any(module in p.modules for module in around.modules)]
    if not able:
        raise UnsupportedModelError(
            f"{cls} has no block with {' or '.join(around.modules)}, so that nothing would change"
        )
    levels = sorted({place.level for place in able})
    chosen = around.levels or (levels[0],)
    if not set(chosen) <= set(levels):
        raise ValueError(
            f"levels must be some of {levels}, where {cls} has {' or '.join(around.modules)}, "
            f"not {chosen}"
        )
    if around.keep_rate == 1:
        warnings.warn("keep_rate=1 keeps all tokens: nothing is reduced", stacklevel=4)
    taken = tuple(place for place in able if place.level in chosen)
    if traits(reducer).keys_only:
        for place in taken:
            path = f"{place.path}.{place.modules['attention']}"
            why = host.keys(model.get_submodule(path))
            if why is not None:
                raise UnsupportedModelError(f"{cls}: {path}: {why}")
    return Denoising(reducer, around, taken, len(places), host.times(model), scheduler)


def _check_method(cls: str, reducer: Reducer, around: Around) -> None:
    said = traits(reducer)
    if said.varies or said.prunes or said.needs - {"key", "grid"}:
        raise UnsupportedModelError(
            f"{cls}: {reducer} cannot be used around single modules, where merging methods that "
            "compare tokens can: 'tome', 'todo', 'atc', 'dpc_knn', 'mutual', 'pitome'"
        )
    if said.keys_only and around.modules != ("attention",):
        raise ValueError(
            f"modules must be ('attention',) for {reducer}, which has fewer keys and values, not "
            f"{around.modules}"
        )
    if around.keep_rate < said.least:
        raise ValueError(
            f"keep_rate must be at least {said.least:g} for {reducer}, as one token in "
            f"{round(1 / said.least)} is a destination and stays, not {around.keep_rate:g}; larger "
            "cells have a lower limit"
        )


# Objects rather than closures, so that a copied or pickled model takes its own along.


@dataclass(eq=False)
class Begins:
    """A forward pre-hook of the model."""

    reduction: Denoising
    host: Denoiser

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not hasattr(self.host, "timestep"):  # version 0.8 knew less of hosts
            known = (found for found in hosts().values() if isinstance(found, Denoiser))
            self.host = next(found for found in known if {*found.models} & {*self.host.models})

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.reduction.begin(
            lambda: self.host.timestep(module, args, kwargs),
            lambda: self.host.prompt(module, args, kwargs),
        )


@dataclass(eq=False)
class Ends:
    """A forward hook of the model."""

    reduction: Denoising

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.reduction.end()


@dataclass(eq=False)
class OnGrid:
    """A forward pre-hook of a module that lays its feature map out as tokens."""

    reduction: Denoising
    host: Denoiser
    owner: str

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.reduction.set_grid(self.owner, self.host.grid(module, args, kwargs))


@dataclass(eq=False)
class Enters:
    """A forward pre-hook of a block."""

    reduction: Denoising
    place: Place

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.reduction.enter(self.place, args[0] if args else kwargs["hidden_states"])


@dataclass(eq=False)
class Leaves:
    """A forward hook of a block."""

    reduction: Denoising
    place: Place

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.reduction.leave(self.place)


HOOKS = (Begins, Ends, OnGrid, Enters, Leaves)


def stand_ins(
    model: nn.Module, host: Denoiser, reduction: Denoising
) -> list[tuple[nn.Module, AroundModule]]:
    """The modules whose forward is to be replaced, and by what."""
    found = []
    for place in reduction.places:
        for name in reduction.around.modules:
            if name in place.modules:
                module = model.get_submodule(f"{place.path}.{place.modules[name]}")
                own = type(module).forward
                stand_in = AroundModule(
                    module, reduction, place, name, own, beside=host.beside, keys=host.keys
                )
                found.append((module, stand_in))
    return found


def hook_on(model: nn.Module, host: Denoiser, reduction: Denoising) -> None:
    """Registers all hooks."""
    model.register_forward_pre_hook(Begins(reduction, host), with_kwargs=True)
    model.register_forward_hook(Ends(reduction))
    for owner in dict.fromkeys(place.owner for place in reduction.places):
        shown = OnGrid(reduction, host, owner)
        model.get_submodule(owner).register_forward_pre_hook(shown, with_kwargs=True)
    for place in reduction.places:
        block = model.get_submodule(place.path)
        block.register_forward_pre_hook(Enters(reduction, place), with_kwargs=True)
        block.register_forward_hook(Leaves(reduction, place))
