"""Denoisers of diffusion models: fewer tokens for single modules, and all of them again behind.

Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023,
https://arxiv.org/abs/2303.17604, section 4: what enters a module is merged, what leaves it is
copied back, and the residual connection is at full length. So no block depends on another's tokens,
and there is no schedule by layers, but one value, `Around`, that says where and when.

A block of the host is shown to us before it runs (a hook), which is when its tokens are matched;
its modules are called by its own forward, and merge and copy back by a stand-in for theirs. Nothing
of the block is restated.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokred.host.host import Denoiser, Place, UnsupportedModelError
from tokred.maps import TokenMap
from tokred.reducers import Reducer, Tokens, prunes, varies
from tokred.reducers import make as named
from tokred.reducers.todo import ToDo
from tokred.reducers.tome2d import ToMe2d
from tokred.reducers.truncate import Truncate
from tokred.schedule import Schedule, check_keep_rate, ratio_of


@dataclass(frozen=True)
class Around:
    """Where and when a denoiser runs on fewer tokens: what is a schedule in other models.

    >>> tokred.apply(pipe, "tome", tokred.Around(0.5, modules=("attention", "mlp"), shared=True))

    Args:
        keep_rate: the share of tokens that enters a module, in (0, 1].
        modules: around which: "attention" (self-attention), "cross_attention" (its queries), "mlp".
        levels: at which resolutions: 0 is that of the latents (or the patches), 1 half of it, and
            so on. The finest that has such a module, if not given.
        shared: whether the blocks of a level share one matching, that of the first.
        every: a matching is kept for so many steps of the sampling.
        during: the part of the sampling in which tokens are merged, from 0 (noise) to 1 (image), by
            the time step.
    """

    keep_rate: float = 0.5
    modules: tuple[str, ...] = ("attention",)
    levels: tuple[int, ...] | None = None
    shared: bool = False
    every: int = 1
    during: tuple[float, float] = (0.0, 1.0)
    _ratio: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        unknown = set(self.modules) - set(MODULES)
        if not self.modules or unknown or isinstance(self.modules, str):
            raise ValueError(f"modules must be some of {MODULES}, not {self.modules!r}")
        if self.levels is not None and (
            not self.levels or not all(isinstance(n, int) and n >= 0 for n in self.levels)
        ):
            raise ValueError(f"levels must be integers from 0 on, not {self.levels!r}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be at least 1 step, not {self.every!r}")
        begin, end = self.during
        if not 0 <= begin < end <= 1:
            raise ValueError(f"during must be 0 <= begin < end <= 1, not {self.during!r}")
        object.__setattr__(self, "_ratio", ratio_of(self.keep_rate))

    def keep(self, tokens: int) -> int:
        """How many of so many tokens enter a module: those that are not merged, of which there are
        floor(tokens * (1 - keep_rate))."""
        over, under = self._ratio
        return tokens - tokens * (under - over) // under


MODULES = ("attention", "cross_attention", "mlp")
NAMED: Mapping[str, Callable[[], Reducer]] = {"tome": ToMe2d, "todo": ToDo}
"""What names mean here that mean something else in other models, or nothing."""


@dataclass(frozen=True)
class Merged:
    """What `tokred.inspect` tells of one block.

    Attributes:
        path: where the block is in the model.
        level: its resolution.
        grid: rows and columns of its tokens.
        after: how many of them enter its modules.
        shared: whether the matching was that of a block before it, or of a step before.
        map: how they became few.
    """

    path: str
    level: int
    grid: tuple[int, int]
    after: int
    shared: bool
    map: TokenMap


@dataclass(frozen=True)
class DenoiserTrace:
    """What happened to the tokens of a denoiser during one call.

    Attributes:
        method: the method and its options.
        modules: around which modules.
        blocks: the blocks that ran on fewer tokens, in order.
        total: how many blocks there are, these included.
    """

    method: str
    modules: tuple[str, ...]
    blocks: tuple[Merged, ...]
    total: int

    def __str__(self) -> str:
        lines = [
            f"{self.method} around {', '.join(self.modules)}, in {len(self.blocks)} of "
            f"{self.total} blocks"
        ]
        for block in self.blocks:
            before = block.grid[0] * block.grid[1]
            lines.append(
                f"  level {block.level}, {block.grid[0]}x{block.grid[1]}: {before} -> "
                f"{block.after}{', shared' if block.shared else ''}  {block.path}"
            )
        return "\n".join(lines)


@dataclass(eq=False)
class Denoising:
    """A method that has been put into a denoiser: what stays the same between calls.

    Attributes:
        reducer: the method.
        around: where and when.
        places: the blocks whose modules run on fewer tokens.
        total: how many blocks the model has, these included.
    """

    reducer: Reducer
    around: Around
    places: tuple[Place, ...]
    total: int
    # Runtime state: by activation (for recomputation), and by thread. Code that is being compiled
    # can see neither, and has a plain dictionary instead.
    _riding: Any = field(default_factory=WeakTensorKeyDictionary, repr=False)
    _local: Any = field(default_factory=threading.local, repr=False)
    _traced: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        levels = ", ".join(
            f"{number} blocks at level {level}"
            for level, number in sorted(Counter(place.level for place in self.places).items())
        )
        return (
            f"{self.reducer} around {', '.join(self.around.modules)}, keep rate "
            f"{self.around.keep_rate:g}: {levels}, of {self.total} blocks"
        )

    def __getstate__(self) -> dict[str, Any]:
        runtime = {"_riding", "_local", "_traced"}
        return {name: value for name, value in vars(self).items() if name not in runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._riding, self._local, self._traced = WeakTensorKeyDictionary(), threading.local(), {}

    def begin(self, progress: Callable[[], float]) -> None:
        """A call of the model begins.

        Args:
            progress: where in the sampling it is, 0 to 1. Only called if that matters: it waits for
                the device.
        """
        state, around = self._state(), self.around
        off, fresh = False, True
        if around.every > 1 and torch.compiler.is_compiling():
            raise RuntimeError(
                "every > 1 keeps matchings from call to call, which compiled code cannot: use "
                "every=1"
            )
        if around.during != (0.0, 1.0) or around.every > 1:
            now = progress()
            off = not around.during[0] <= now <= around.during[1]
            # Time only runs backwards where another sampling begins.
            fresh = now < state.get("now", 2.0)
            state["now"] = now
        state["off"] = off
        state["step"] = 0 if fresh else state["step"] + 1
        if state["step"] % around.every == 0:
            state["maps"] = {}

    def end(self) -> None:
        """The call ends: what only lives as long is let go."""
        state = self._state()
        if torch.compiler.is_compiling():
            state.clear()
        elif self.around.every == 1:
            state.pop("maps", None)

    def enter(self, place: Place, x: Float[Tensor, "batch tokens dim"]) -> None:
        """A block begins: its tokens are matched, or get a matching that is there."""
        state = self._state()
        token_map: TokenMap | None = None
        if not state.get("off", False):
            token_map = self._map(place, x, state)
        state[place.path] = token_map, tuple(x.shape[:2])

    def leave(self, place: Place) -> None:
        """The block ends."""
        self._state().pop(place.path, None)

    def here(self, place: Place, x: Float[Tensor, "batch tokens dim"]) -> TokenMap | None:
        """The map of the block that runs, for what enters one of its modules; None if it runs on
        all tokens.

        Raises:
            RuntimeError: the module is given other tokens than the block.
        """
        token_map, shape = self._state().get(place.path, (None, None))
        if token_map is not None and tuple(x.shape[:2]) != shape:
            raise RuntimeError(
                f"{place.path}: a module is given {x.shape[0]} x {x.shape[1]} tokens, the block "
                f"{shape[0]} x {shape[1]}. Chunked feed-forward layers cannot be merged around: "
                "leave 'mlp' out of modules, or switch chunking off"
            )
        found: TokenMap | None = token_map
        return found

    def set_grid(self, owner: str, grid: tuple[int, int]) -> None:
        """Says on which grid the tokens of the blocks of a module stand."""
        self._state()[owner, "grid"] = grid

    @contextmanager
    def recording(self) -> Iterator[list[Merged]]:
        """Collects what happens in every block of this thread, until the end of the block."""
        records: list[Merged] = []
        self._local.records = records
        try:
            yield records
        finally:
            self._local.records = None

    def _map(
        self, place: Place, x: Float[Tensor, "batch tokens dim"], state: dict[Any, Any]
    ) -> TokenMap | None:
        compiling = torch.compiler.is_compiling()
        # Where the block runs once more, for gradients, everything else may have gone on.
        if not compiling and torch.is_grad_enabled():
            ridden: TokenMap | None = self._riding.get(x)
            if ridden is not None:
                return ridden
        num = x.shape[1]
        if self.around.keep(num) >= num:
            return None
        grid: tuple[int, int] | None = state.get((place.owner, "grid"))
        if grid is None or grid[0] * grid[1] != num:
            raise RuntimeError(
                f"{place.path} got {num} tokens, which are not those of the grid {grid}"
            )
        fit = getattr(self.reducer, "fit", None)
        keep = self.around.keep(num)
        if fit is not None:
            keep = int(fit(keep, grid))
        if keep >= num:
            return None
        maps: dict[Any, TokenMap] = state.setdefault("maps", {})
        which = (place.level if self.around.shared else place.path, len(x), grid, x.device)
        token_map = maps.get(which)
        shared = token_map is not None
        if token_map is None:
            token_map = self._match(x, grid, keep)
            if self.around.shared or self.around.every > 1:
                maps[which] = token_map
        if not compiling:
            if torch.is_grad_enabled():
                self._riding[x] = token_map
            records = getattr(self._local, "records", None)
            if records is not None:
                records.append(Merged(place.path, place.level, grid, keep, shared, token_map))
        return token_map

    def _match(
        self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int], keep: int
    ) -> TokenMap:
        metric = x.detach()
        view = Tokens(
            x=metric,
            size=_ones(metric),
            key=metric[:, None] if "key" in self.reducer.needs else None,
            grid=grid,
        )
        # Autocast would compare tokens in half precision.
        with torch.autocast(x.device.type, enabled=False):
            token_map = self.reducer(view, keep)
        if token_map.num_coarse != keep:
            raise ValueError(
                f"{self.reducer} returned {token_map.num_coarse} tokens of {x.shape[1]}, but was "
                f"asked for {keep}"
            )
        return token_map

    def _state(self) -> dict[Any, Any]:
        if torch.compiler.is_compiling():
            return self._traced
        found: dict[Any, Any] | None = getattr(self._local, "state", None)
        if found is None:
            found = self._local.state = {}
        return found


def keys_only(reducer: Reducer) -> bool:
    """Whether only keys and values of self-attention become fewer."""
    return bool(getattr(reducer, "keys_only", False))


def _ones(x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens"]:
    return torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)


def plan_for(
    model: nn.Module,
    host: Denoiser,
    method: str | Reducer,
    keep_rate: float | Schedule | Around | None,
    options: Mapping[str, Any],
) -> Denoising:
    """What `tokred.apply` hangs on a denoiser: everything checked, nothing changed.

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
    return Denoising(reducer, around, taken, len(places))


def _check_method(cls: str, reducer: Reducer, around: Around) -> None:
    if varies(reducer) or prunes(reducer) or reducer.needs - {"key", "grid"}:
        raise UnsupportedModelError(
            f"{cls}: {reducer} cannot be used around single modules, where merging methods that "
            "compare tokens can: 'tome', 'todo', 'atc', 'dpc_knn', 'mutual', 'pitome'"
        )
    if keys_only(reducer) and around.modules != ("attention",):
        raise ValueError(
            f"modules must be ('attention',) for {reducer}, which has fewer keys and values, not "
            f"{around.modules}"
        )
    least = getattr(reducer, "least", 0.0)
    if around.keep_rate < least:
        raise ValueError(
            f"keep_rate must be at least {least:g} for {reducer}, as one token in "
            f"{round(1 / least)} is a destination and stays, not {around.keep_rate:g}; larger "
            "cells have a lower limit"
        )


# What is hung on the model. Objects rather than closures, so that a copied or pickled model takes
# its own along.


@dataclass(eq=False)
class AroundModule:
    """Stands in for the forward of a module of a block.

    Attributes:
        own: that forward, of the module's class. (diffusers allows classes of attention "in graph",
            and so they may not be looked into by code that is being compiled.)
    """

    is_tokred: ClassVar[bool] = True
    __name__: ClassVar[str] = "forward"

    module: nn.Module
    reduction: Denoising
    place: Place
    name: str
    own: Callable[..., Any]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(self.own, self.module)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = partial(self.own, self.module)
        token_map = self.reduction.here(self.place, hidden_states)
        if token_map is None:
            return own(hidden_states, *args, **kwargs)
        if self.name == "attention":
            # encoder_hidden_states comes first, and is None: tokens attend to each other.
            kwargs.update(zip(("encoder_hidden_states", "attention_mask"), args, strict=False))
            args = ()
            if kwargs.get("attention_mask") is not None:
                raise ValueError(
                    f"{self.place.path}: a mask of all tokens cannot be used while some are merged"
                )
        few = token_map.down(hidden_states, _ones(hidden_states))
        if keys_only(self.reduction.reducer):
            return own(hidden_states, **{**kwargs, "encoder_hidden_states": few})
        return token_map.up(own(few, *args, **kwargs), None)


@dataclass(eq=False)
class Begins:
    """A forward pre-hook of the model."""

    reduction: Denoising
    host: Denoiser

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.reduction.begin(lambda: self.host.progress(module, args, kwargs))


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


def stand_ins(model: nn.Module, reduction: Denoising) -> list[tuple[nn.Module, AroundModule]]:
    """The modules whose forward is to be replaced, and by what."""
    return [
        (module, AroundModule(module, reduction, place, name, type(module).forward))
        for place in reduction.places
        for name in reduction.around.modules
        if name in place.modules
        for module in [model.get_submodule(f"{place.path}.{place.modules[name]}")]
    ]


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


def limit(reduction: Denoising) -> Denoising:
    """What a reduction is measured against: the same numbers of tokens for nothing."""
    cut = Truncate(keys_only=keys_only(reduction.reducer))
    return Denoising(cut, reduction.around, reduction.places, reduction.total)
