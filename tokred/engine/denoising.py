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

from tokred.engine.memory import Memory
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
    in one thread or in compiled code.

    Attributes:
        now: where in the sampling the call is, from 0 (noise) to 1 (image).
        off: whether the call runs on all tokens.
        step: how many calls of this sampling came before it.
        maps: matchings that are shared or kept, by what they are for.
        blocks: by path, the map of each block that runs, and the shape of its tokens.
        grids: by path of an owner of blocks, rows and columns of its tokens.
        records: where `Denoising.recording` collects.
    """

    now: float | None = None
    off: bool | None = None
    step: int | None = None
    maps: dict[Any, TokenMap] | None = None
    blocks: dict[str, tuple[TokenMap | None, tuple[int, ...]]] | None = None
    grids: dict[str, tuple[int, int]] | None = None
    records: list[Merged] | None = None

    def forget(self) -> None:
        """Forgets the call: it is over, in compiled code."""
        self.now = self.off = self.step = self.maps = self.blocks = self.grids = None


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

    def begin(self, progress: Callable[[], float]) -> None:
        """A call of the model begins.

        Args:
            progress: where in the sampling it is, 0 to 1. Only called if that matters: it waits for
                the device.

        Raises:
            RuntimeError: matchings are to be kept from call to call, and the code is compiled.
        """
        state, around = self.memory.here, self.around
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
            fresh = state.now is None or now < state.now
            state.now = now
        state.off = off
        state.step = 0 if fresh or state.step is None else state.step + 1
        if state.step % around.every == 0:
            state.maps = {}

    def end(self) -> None:
        """The call ends: what only lives as long is let go."""
        if torch.compiler.is_compiling():
            self.memory.compiled.forget()
        elif self.around.every == 1:
            self.memory.thread.maps = None

    def enter(self, place: Place, x: Float[Tensor, "batch tokens dim"]) -> None:
        """A block begins: its tokens are matched, or get a matching that is there."""
        state = self.memory.here
        token_map = None if state.off else self._map(place, x, state)
        if state.blocks is None:
            state.blocks = {}
        state.blocks[place.path] = token_map, tuple(x.shape[:2])

    def leave(self, place: Place) -> None:
        """The block ends."""
        blocks = self.memory.here.blocks
        if blocks is not None:
            blocks.pop(place.path, None)

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
        self.memory.thread.records = records
        try:
            yield records
        finally:
            self.memory.thread.records = None

    def _map(
        self, place: Place, x: Float[Tensor, "batch tokens dim"], state: Sampling
    ) -> TokenMap | None:
        """The map of a block's tokens: one that is there, or a new one."""
        # Where the block runs once more, for gradients, everything else may have gone on.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
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
        which = (place.level if self.around.shared else place.path, len(x), grid, x.device)
        token_map = state.maps.get(which)
        shared = token_map is not None
        if token_map is None:
            token_map = self._match(x, grid, keep)
            if self.around.shared or self.around.every > 1:
                state.maps[which] = token_map
        if again:
            self.memory.ride(x, token_map)
        if not torch.compiler.is_compiling() and state.records is not None:
            merged = Merged(place.path, place.level, grid, keep, shared, token_map)
            state.records.append(merged)
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
        if self.reduction.traits.keys_only:
            return own(hidden_states, **{**kwargs, "encoder_hidden_states": few})
        return token_map.up(own(few, *args, **kwargs), None)


def limit(reduction: Denoising) -> Denoising:
    """What a reduction is measured against: the same numbers of tokens for nothing."""
    cut = Truncate(keys_only=reduction.traits.keys_only)
    return Denoising(cut, reduction.around, reduction.places, reduction.total)
