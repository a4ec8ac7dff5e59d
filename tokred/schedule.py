"""How many tokens stay after each layer.

A schedule is called with the number of patch tokens and of layers, and returns one number per
layer: the tokens that leave it. A fall is a reduction at that layer; a rise back to an earlier
number undoes the reductions since, before the layer runs. Prefix tokens are not counted. Layers
count from 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """Anything that turns (tokens, layers) into one number of tokens per layer."""

    def __call__(self, tokens: int, layers: int) -> Sequence[int]:
        """The number of tokens that leave each of `layers` layers, of `tokens` that enter."""
        ...


@dataclass(frozen=True)
class Stages:
    """Keeps a share of the tokens at a few layers: stage s leaves floor(tokens * keep_rate^(s+1)).

    The protocol of Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision
    Transformers", ICCVW 2023, https://arxiv.org/abs/2308.04657, section 4.

    >>> Stages(0.5)(tokens=196, layers=12)
    [196, 196, 196, 98, 98, 98, 49, 49, 49, 24, 24, 24]

    Args:
        keep_rate: the share of tokens kept at each stage, in (0, 1].
        layers: where the stages are; a quarter, a half and three quarters of the way if not given.
    """

    keep_rate: float
    layers: tuple[int, ...] | None = None
    _ratio: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        if self.layers is not None and not _rising(self.layers):
            raise ValueError(f"layers must be rising integers from 0 on, not {self.layers!r}")
        object.__setattr__(self, "_ratio", ratio_of(self.keep_rate))

    def __call__(self, tokens: int, layers: int) -> list[int]:
        at = self.layers or tuple(layers * quarter // 4 for quarter in (1, 2, 3))
        if at[-1] >= layers:
            raise ValueError(f"layers must be in [0, {layers - 1}] for {layers} layers, not {at}")
        passed = [sum(stage <= layer for stage in at) for layer in range(layers)]
        over, under = self._ratio
        return [max(1, tokens * over**stages // under**stages) for stages in passed]


@dataclass(frozen=True)
class Shares:
    """The share of the tokens that is to leave each layer, in (0, 1]: floor(tokens * share).

    >>> Shares((1, 0.7, 0.7, 0.49))(tokens=196, layers=4)
    [196, 137, 137, 96]
    """

    shares: tuple[float, ...]
    _ratios: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        for share in self.shares:
            if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
                raise ValueError(f"shares must be numbers in (0, 1], not {share!r}")
        object.__setattr__(self, "_ratios", tuple(map(ratio_of, self.shares)))

    def __call__(self, tokens: int, layers: int) -> list[int]:
        return [max(1, tokens * over // under) for over, under in self._ratios]


@dataclass(frozen=True)
class Constant:
    """Removes the same number of tokens in every layer, at most half of what is left.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3, where the limit of
    one half comes from; Haurum et al., "Agglomerative Token Clustering", ECCV 2024, equation 4.

    >>> Constant(13)(tokens=196, layers=4)
    [183, 170, 157, 144]
    """

    merges: int

    def __post_init__(self) -> None:
        _check_merges(self.merges)

    def __call__(self, tokens: int, layers: int) -> list[int]:
        return removing([self.merges] * layers, tokens)


@dataclass(frozen=True)
class Linear:
    """Removes fewer tokens in every layer than in the one before (or more), along a straight line.

    Layer l of L removes floor(low + l * (high - low) / (L - 1)) tokens, at most half of what is
    left, with low = floor(merges * (1 - inflection)) and high = 2 * merges - low. The default is
    equation 5 of Haurum et al., "Agglomerative Token Clustering", ECCV 2024: floor(2t - 2tl/(L-1)).

    >>> [196] + Linear(16)(tokens=196, layers=12)
    [196, 164, 135, 109, 86, 66, 49, 35, 24, 16, 11, 9, 9]

    Args:
        merges: tokens removed per layer, on average before rounding down.
        inflection: -1 falls from 2 * merges to 0, 0 is constant, 1 rises from 0 to 2 * merges.
    """

    merges: int
    inflection: float = -1.0
    _ratio: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_merges(self.merges)
        if not -1 <= self.inflection <= 1:
            raise ValueError(f"inflection must be in [-1, 1], not {self.inflection!r}")
        object.__setattr__(self, "_ratio", ratio_of(self.inflection))

    def __call__(self, tokens: int, layers: int) -> list[int]:
        return removing(self.removed(layers), tokens)

    def removed(self, layers: int) -> list[int]:
        """How many tokens each layer is to remove, before the limit of one half."""
        over, under = self._ratio
        low = self.merges * (under - over) // under
        rise = 2 * (self.merges - low)
        steps = max(layers - 1, 1)
        return [low + i * rise // steps for i in range(layers)]


@dataclass(frozen=True)
class Hourglass:
    """Runs some layers in the middle with few tokens, and the layers before and after with all.

    Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without
    Fine-tuning", NeurIPS 2022, https://arxiv.org/abs/2210.01035, section 3: the first alpha layers
    and the last gamma run on the full grid, the beta layers between them on few tokens.

    >>> Hourglass(0.25, down=1, up=3)(tokens=196, layers=4)
    [196, 49, 49, 196]

    Args:
        keep_rate: the share of tokens kept, in (0, 1].
        grid: rows and columns of the tokens kept, in place of `keep_rate`.
        down: the number of layers that run before tokens are reduced (alpha); a third of all layers
            if not given.
        up: the first layer that runs on all tokens again (alpha + beta). If not given, there is
            none: the grid is made full again after the last layer.
    """

    keep_rate: float | None = None
    grid: tuple[int, int] | None = None
    down: int | None = None
    up: int | None = None
    _ratio: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.keep_rate is None) == (self.grid is None):
            raise ValueError(
                "one of keep_rate and grid must be given, not "
                f"keep_rate={self.keep_rate!r} and grid={self.grid!r}"
            )
        if self.keep_rate is not None:
            check_keep_rate(self.keep_rate)
        elif self.grid is None or len(self.grid) != 2 or not all(_positive(n) for n in self.grid):
            raise ValueError(f"grid must be two positive integers, not {self.grid!r}")
        down, up = self.down or 0, self.up
        if not isinstance(down, int) or down < 0:
            raise ValueError(f"down must be an integer of at least 0, not {self.down!r}")
        if up is not None and (not isinstance(up, int) or up <= down):
            raise ValueError(f"up must be an integer above down = {down}, not {up!r}")
        object.__setattr__(self, "_ratio", ratio_of(self.keep_rate or 1.0))

    def __call__(self, tokens: int, layers: int) -> list[int]:
        down = layers // 3 if self.down is None else self.down
        up = layers if self.up is None else self.up
        if not down < up <= layers:
            raise ValueError(
                f"{self}: down = {down} and up = {up} do not fit a model of {layers} layers, where "
                f"0 <= down < up <= {layers}"
            )
        over, under = self._ratio
        few = max(1, tokens * over // under)
        if self.grid is not None:
            few = self.grid[0] * self.grid[1]
            if few > tokens:
                raise ValueError(f"grid must have at most {tokens} cells here, not {self.grid}")
        return [few if down <= layer < up else tokens for layer in range(layers)]


@dataclass(frozen=True)
class Exactly:
    """The number of tokens after each layer, as a list.

    >>> Exactly((196, 98, 98, 49))(tokens=196, layers=4)
    [196, 98, 98, 49]
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(self.counts))

    def __call__(self, tokens: int, layers: int) -> list[int]:
        return list(self.counts)


PURE = (Stages, Shares, Constant, Linear, Hourglass, Exactly)
"""Schedules of which it is known that they always ask for the same."""


def plan(schedule: Schedule, tokens: int, layers: int) -> tuple[int, ...]:
    """What the schedule asks for, checked.

    There must be one whole number per layer, from 1 to `tokens`; and where it rises, it must rise
    to a number that was there before.

    Raises:
        ValueError: the schedule asks for something else.
    """
    counts = tuple(int(count) for count in schedule(tokens, layers))
    if len(counts) != layers:
        raise ValueError(
            f"{schedule} gives {len(counts)} numbers, but the model has {layers} layers"
        )
    before = [tokens]
    for layer, count in enumerate(counts):
        if not 1 <= count <= tokens:
            raise ValueError(
                f"{schedule} asks for {count} tokens after layer {layer}; "
                f"possible are 1 to {tokens}"
            )
        if count > before[-1] and count not in before:
            raise ValueError(
                f"{schedule} rises to {count} tokens after layer {layer}; it can only rise back "
                f"to an earlier number, one of {sorted(set(before), reverse=True)}"
            )
        while before[-1] < count:
            before.pop()
        before.append(count)
    return counts


def shares(schedule: Schedule, tokens: int, layers: int) -> tuple[float, ...]:
    """The share of the tokens that leaves each layer; the exact share where the schedule has one,
    otherwise that of the whole number of tokens."""
    if isinstance(schedule, Shares):
        plan(schedule, tokens, layers)
        return tuple(map(float, schedule.shares))
    if isinstance(schedule, Stages):
        many = 10**9
        return tuple(round(count / many, 6) for count in plan(schedule, many, layers))
    return tuple(count / tokens for count in plan(schedule, tokens, layers))


def check_keep_rate(keep_rate: object) -> None:
    """Raises unless it is a number in (0, 1]."""
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, Real):
        raise TypeError(
            f"keep_rate must be a number in (0, 1] or a schedule, not {keep_rate!r} "
            f"({type(keep_rate).__name__})"
        )
    if not 0 < float(keep_rate) <= 1:
        raise ValueError(
            f"keep_rate must be in (0, 1], the share of tokens kept, not {keep_rate!r}"
        )


def ratio_of(decimal: float) -> tuple[int, int]:
    """A decimal number as the fraction that its digits say: as a float, 100 * 0.7**2 is a little
    below 49. Two integers, because older versions of torch.compile cannot follow a Fraction."""
    return Fraction(str(decimal)).as_integer_ratio()


def removing(removed: Sequence[int], tokens: int) -> list[int]:
    """The number of tokens that leave each layer, if each layer removes the given number, but at
    most half of what is left."""
    left = []
    for merges in removed:
        tokens -= min(merges, tokens // 2)
        left.append(tokens)
    return left


def _check_merges(merges: object) -> None:
    if isinstance(merges, bool) or not isinstance(merges, int):
        raise TypeError(f"merges must be a whole number of tokens per layer, not {merges!r}")
    if merges < 0:
        raise ValueError(f"merges must be at least 0 tokens per layer, not {merges}")


def _positive(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _rising(layers: Sequence[int]) -> bool:
    return (
        len(layers) > 0
        and all(isinstance(layer, int) for layer in layers)
        and layers[0] >= 0
        and all(a < b for a, b in itertools.pairwise(layers))
    )
