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

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokred.engine.memory import Memory
from tokred.engine.sampling import THOUSAND, Call, Times, alike, progress_by, time_of
from tokred.graphs import compiling, exporting
from tokred.maps import TokenMap, wide
from tokred.reducers.protocol import Reducer, Tokens, Traits, check_map, traits
from tokred.reducers.truncate import Truncate
from tokred.schedule import check_keep_rate, ratio_of

MODULES = ("attention", "cross_attention", "mlp")
"""The kinds of modules of a block that tokens can be merged around."""


@dataclass(frozen=True)
class Place:
    """A block of a denoiser.

    Attributes:
        path: where it is in the model.
        owner: path of the module that lays its feature map out as the block's tokens.
        level: how often the grid of the latents (or of the patches) was halved before it.
        modules: path, in the block, of its "attention" (to itself), "cross_attention" and "mlp",
            as far as it has them: each is given its tokens first, as [batch, tokens, dim].
    """

    path: str
    owner: str
    level: int
    modules: Mapping[str, str]


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
        every: a matching is kept for so many steps of the sampling: as long as the time step is the
            same, it is the same step. Where a step calls the model several times (for several
            prompts, say), each of these calls keeps its own.
        during: the part of the sampling in which tokens are merged, from 0 (the first step: noise)
            to 1 (the last: image). Of a pipeline, the steps of its scheduler are counted; where
            only the model is known, its time step tells.
        times: the time steps of the first and of the last step, if it is to be told by them. Of a
            model alone, if not given, what it is usually called with: whole numbers from 1,000 to
            0.
    """

    keep_rate: float = 0.5
    modules: tuple[str, ...] = ("attention",)
    levels: tuple[int, ...] | None = None
    shared: bool = False
    every: int = 1
    during: tuple[float, float] = (0.0, 1.0)
    times: tuple[float, float] | None = None
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
        if self.times is not None and (
            len(self.times) != 2
            or not all(math.isfinite(time) for time in self.times)
            or self.times[0] == self.times[1]
        ):
            raise ValueError(
                "times must be the time steps of the first and of the last step of a sampling, not "
                f"{self.times!r}"
            )
        object.__setattr__(self, "_ratio", ratio_of(self.keep_rate))

    def keep(self, tokens: int) -> int:
        """How many of so many tokens enter a module: those that are not merged, of which there are
        floor(tokens * (1 - keep_rate))."""
        over, under = self._ratio
        return tokens - tokens * (under - over) // under


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


@dataclass
class Sampling:
    """What is known of the running call of a denoiser, and of those before it in the same sampling,
    in one thread.

    Attributes:
        off: whether the call runs on all tokens.
        call: which call of which step of the sampling it is, where matchings are kept for several
            steps.
        prompts: there, by the number of a call in its step, its prompt.
        maps: matchings that are shared or kept, by what they are for.
        blocks: by path, the map of each block that runs, and the shape of its tokens.
        unused: by path, what `Denoising.recording` is to collect as soon as a module of the block
            runs on fewer tokens.
        grids: by path of an owner of blocks, rows and columns of its tokens.
        records: where `Denoising.recording` collects.
    """

    off: bool | None = None
    call: Call | None = None
    prompts: dict[int, tuple[Tensor, ...]] | None = None
    maps: dict[Any, TokenMap] | None = None
    blocks: dict[str, tuple[TokenMap | None, tuple[int, ...]]] | None = None
    unused: dict[str, Merged] | None = None
    grids: dict[str, tuple[int, int]] | None = None
    records: list[Merged] | None = None


@dataclass(eq=False)
class Denoising:
    """A method that has been put into a denoiser: what stays the same between calls.

    Attributes:
        reducer: the method.
        around: where and when.
        places: the blocks whose modules run on fewer tokens.
        total: how many blocks the model has, these included.
        times: the time steps that the model is usually called with.
        scheduler: that of the pipeline, if one was given: it knows the time steps.
    """

    reducer: Reducer
    around: Around
    places: tuple[Place, ...]
    total: int
    times: Times = THOUSAND
    scheduler: Any = field(default=None, repr=False)
    traits: Traits = field(init=False, repr=False)
    memory: Memory[Sampling, TokenMap] = field(
        init=False, repr=False, default_factory=lambda: Memory(Sampling)
    )

    def __post_init__(self) -> None:
        self.traits = traits(self.reducer)

    def __str__(self) -> str:
        levels = ", ".join(
            f"{number} blocks at level {level}"
            for level, number in sorted(Counter(place.level for place in self.places).items())
        )
        return (
            f"{self.reducer} around {', '.join(self.around.modules)}, keep rate "
            f"{self.around.keep_rate:g}: {levels}, of {self.total} blocks"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.setdefault("memory", Memory(Sampling))  # version 0.7 has left it out
        self.traits = traits(self.reducer)

    def begin(self, timestep: Callable[[], Any], prompt: Callable[[], Sequence[Tensor]]) -> None:
        """A call of the model begins.

        Args:
            timestep: the time step that it is called with. Only called if that matters: looking at
                it waits for the device.
            prompt: what else it is called with that stays the same in all steps of a sampling. Only
                called if that matters.

        Raises:
            RuntimeError: matchings are to be kept from call to call, and the code is compiled.
            ValueError: the time step is none of the sampling.
        """
        state, around = self.memory.here, self.around
        if around.every > 1 and (compiling() or exporting()):
            raise RuntimeError(
                "every > 1 keeps matchings from call to call, which compiled code cannot: use "
                "every=1"
            )
        if around.during != (0.0, 1.0) and exporting():
            raise RuntimeError(
                f"during={around.during} decides by the time step whether tokens are merged, and "
                "an exported graph always does the same: leave `during` out"
            )
        state.off = False
        timed = around.during != (0.0, 1.0)
        now = time_of(timestep()) if timed or around.every > 1 else 0.0
        if timed:
            state.off = not around.during[0] <= self._progress(now) <= around.during[1]
        if around.every > 1:
            self._count(state, now, tuple(prompt()))
        else:
            state.maps = {}

    def _progress(self, now: float) -> float:
        """Where in the sampling a time step is, from 0 (the first step) to 1 (the last)."""
        if self.around.times is not None:
            return Times(*self.around.times).progress(now)
        if self.scheduler is not None:
            return progress_by(self.scheduler, now)
        return self.times.progress(now)

    def _count(self, state: Sampling, now: float, prompt: tuple[Tensor, ...]) -> None:
        """Says which call of which step this is. What was kept for other steps, or for this call
        with another prompt, is let go."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        call = Call(now, timesteps) if state.call is None else state.call.then(now, timesteps)
        state.call = call
        if call.number == 0 and call.step % self.around.every == 0:
            state.maps, state.prompts = {}, {}
        maps, prompts = state.maps or {}, state.prompts or {}
        if call.uncounted or not alike(prompts.get(call.number, ()), prompt):
            maps = {which: kept for which, kept in maps.items() if which[0] != call.number}
            # Copies, as somebody may write over the tensors.
            prompts[call.number] = tuple(tensor.detach().clone() for tensor in prompt)
        state.maps, state.prompts = maps, prompts

    def end(self) -> None:
        """The call ends: what only lives as long is let go."""
        if self.around.every == 1:
            self.memory.here.maps = None

    def enter(self, place: Place, x: Float[Tensor, "batch tokens dim"]) -> None:
        """A block begins: its tokens are matched, or get a matching that is there."""
        state = self.memory.here
        token_map = None if state.off else self._map(place, x, state)
        if state.blocks is None:
            state.blocks = {}
        state.blocks[place.path] = token_map, tuple(x.shape[:2])

    def leave(self, place: Place) -> None:
        """The block ends."""
        state = self.memory.here
        for known in (state.blocks, state.unused):
            if known is not None:
                known.pop(place.path, None)

    def here(self, place: Place, x: Float[Tensor, "batch tokens dim"]) -> TokenMap | None:
        """The map of the block that runs, for what enters one of its modules; None if it runs on
        all tokens.

        Raises:
            RuntimeError: the module is given other tokens than the block.
        """
        blocks = self.memory.here.blocks
        if blocks is None or place.path not in blocks:
            return None
        token_map, shape = blocks[place.path]
        if token_map is not None and tuple(x.shape[:2]) != shape:
            raise RuntimeError(
                f"{place.path}: a module is given {x.shape[0]} x {x.shape[1]} tokens, the block "
                f"{shape[0]} x {shape[1]}. Chunked feed-forward layers cannot be merged around: "
                "leave 'mlp' out of modules, or switch chunking off"
            )
        return token_map

    def used(self, place: Place) -> None:
        """A module of the block has run on fewer tokens."""
        if not compiling():
            state = self.memory.here
            if state.records is not None and state.unused is not None:
                merged = state.unused.pop(place.path, None)
                if merged is not None:
                    state.records.append(merged)

    def set_grid(self, owner: str, grid: tuple[int, int]) -> None:
        """Says on which grid the tokens of the blocks of a module stand."""
        state = self.memory.here
        if state.grids is None:
            state.grids = {}
        state.grids[owner] = grid

    @contextmanager
    def recording(self) -> Iterator[list[Merged]]:
        """Collects what happens in every block of this thread, until the end of the block."""
        records: list[Merged] = []
        self.memory.here.records = records
        try:
            yield records
        finally:
            self.memory.here.records = None

    def _map(
        self, place: Place, x: Float[Tensor, "batch tokens dim"], state: Sampling
    ) -> TokenMap | None:
        """The map of a block's tokens: one that is there, or a new one."""
        # Where the block runs once more, for gradients, everything else may have gone on.
        again = torch.is_grad_enabled() and not compiling()
        ridden = self.memory.ridden(x) if again else None
        if ridden is not None:
            return ridden
        num = x.shape[1]
        keep = self.around.keep(num)
        if keep >= num:
            return None
        grid = None if state.grids is None else state.grids.get(place.owner)
        if grid is None or grid[0] * grid[1] != num:
            raise RuntimeError(
                f"{place.path} got {num} tokens, which are not those of the grid {grid}"
            )
        if self.traits.fit is not None:
            keep = int(self.traits.fit(keep, grid))
        if keep >= num:
            return None
        if state.maps is None:
            state.maps = {}
        call = None if state.call is None else state.call.number
        blocks = place.level if self.around.shared else place.path
        # Of one call, all have the same batch, which may be a symbol in a graph.
        batch = len(x) if self.around.every > 1 else None
        which = (call, blocks, batch, grid, x.device)
        token_map = state.maps.get(which)
        shared = token_map is not None
        if token_map is None:
            token_map = self._match(x, grid, keep)
            if self.around.shared or self.around.every > 1:
                state.maps[which] = token_map
        if again:
            self.memory.ride(x, token_map)
        if not compiling() and state.records is not None:
            if state.unused is None:
                state.unused = {}
            merged = Merged(place.path, place.level, grid, keep, shared, token_map)
            state.unused[place.path] = merged
        return token_map

    def _match(
        self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int], keep: int
    ) -> TokenMap:
        metric = x.detach()
        view = Tokens(
            x=metric,
            size=_ones(metric),
            key=metric[:, None] if "key" in self.traits.needs else None,
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
        if self.traits.drops == token_map.merges:
            check_map(self.reducer, token_map)  # which raises
        return token_map


def _ones(x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens"]:
    return wide(x[:0]).new_ones(x.shape[:2])


# What is hung on the model. Objects rather than closures, so that a copied or pickled model takes
# its own along.


@dataclass(eq=False)
class AroundModule:
    """Stands in for the forward of a module of a block.

    Attributes:
        own: that forward, of the module's class. (diffusers allows classes of attention "in graph",
            and so they may not be looked into by code that is being compiled.)
        off: whether it was taken away, but is still called, by something that was wrapped around
            it later.
        beside: `beside(attention, x, kwargs, down)`: what attention is called with beside its
            tokens, where `down` makes few of [batch, tokens, dim]; see `tokred.host.Denoiser`.
        keys: `keys(attention)`: why it cannot be given other tokens for its keys and values.
    """

    is_tokred: ClassVar[bool] = True
    __name__: ClassVar[str] = "forward"

    module: nn.Module
    reduction: Denoising
    place: Place
    name: str
    own: Callable[..., Any]
    off: bool = False
    # None in models that were pickled by version 0.8.
    beside: Callable[..., dict[str, Any]] | None = None
    keys: Callable[[Any], str | None] | None = None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(self.own, self.module)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = partial(self.own, self.module)
        token_map = None if self.off else self.reduction.here(self.place, hidden_states)
        if token_map is None:
            return own(hidden_states, *args, **kwargs)
        size = _ones(hidden_states)
        if self.name != "mlp":
            kwargs.update(zip(("encoder_hidden_states", "attention_mask"), args, strict=False))
            args = ()
            self._check(kwargs)
            if self.beside is not None and not self.reduction.traits.keys_only:
                down = partial(token_map.down, size=size)
                kwargs = self.beside(self.module, hidden_states, kwargs, down)
        few = token_map.down(hidden_states, size)
        if self.reduction.traits.keys_only:
            out = own(hidden_states, **{**kwargs, "encoder_hidden_states": few})
        else:
            out = token_map.up(own(few, *args, **kwargs), None)
        self.reduction.used(self.place)
        return out

    def _check(self, kwargs: Mapping[str, Any]) -> None:
        """Raises if attention is called with something that goes by all tokens.

        Raises:
            ValueError: says what.
        """
        path = f"{self.place.path}.{self.place.modules[self.name]}"
        mask = kwargs.get("attention_mask")
        # The mask of cross-attention has one row for all tokens, as far as it is about the text.
        if mask is not None and (
            self.name == "attention" or (mask.ndim > 2 and mask.shape[-2] != 1)
        ):
            raise ValueError(
                f"{path}: a mask of all tokens cannot be used while some are merged: leave "
                f"{self.name!r} out of modules"
            )
        if self.reduction.traits.keys_only:
            if kwargs.get("encoder_hidden_states") is not None:
                raise ValueError(
                    f"{path}: {self.reduction.reducer} makes keys and values of few of the block's "
                    "tokens, but attention is called with others to make them of"
                )
            why = None if self.keys is None else self.keys(self.module)
            if why is not None:
                raise ValueError(f"{path}: {why}")


def limit(reduction: Denoising) -> Denoising:
    """What a reduction is measured against: the same numbers of tokens for nothing."""
    cut = Truncate(keys_only=reduction.traits.keys_only)
    return replace(reduction, reducer=cut)
