"""What a reduction method is: what it is shown, what it must be able to do, what it may say.

The engine asks `traits` what a method can do, and nothing else; so does everything that patches,
measures or lists methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, Protocol, TypeGuard, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokred.gates import Gates
from tokred.maps import TokenMap
from tokred.schedule import Schedule, Stages

Place = Literal["between", "before", "around"]
"""Where a method stands in a block, see `Traits`."""

Filling = Literal["border", "zeros"]
"""What windows that a feature map does not fill are filled up with, see `Traits`."""

SIGNALS = frozenset({"key", "value", "class_attention", "attention_received", "grid"})
"""What a method may list in `needs`."""


@dataclass(frozen=True)
class Tokens:
    """What a method may look at, at one place in the network.

    Only the tokens that may be reduced are here: `before` says how many prefix tokens stand in
    front of them. A signal is None unless the method lists it in `needs`.

    Attributes:
        x: the tokens themselves, in the model's dtype.
        size: how many original tokens each one stands for, at least float32. 0 marks padding: only
            methods that leave some samples with fewer tokens than others (`varies`) meet it,
            always at the end.
        key: the keys as attention compares them (after any key normalisation), without gradient.
        value: the values, without gradient.
        class_attention: how much attention each token gets from the class token in each head,
            after softmax, at least float32; higher = more important. In a model without a class
            token, the mean attention it gets from all tokens.
        attention_received: how much attention each token got in the block before, the sum over
            heads and queries, at least float32. None in front of the first block.
        grid: rows and columns of the tokens, where they stand row by row on a grid; None where
            they do not.
        layer: the layer we are in, from 0.
        layers: how many there are.
        before: the number of prefix tokens in front.
        gate: of a learned method, its module for this layer.
        kept: of a method that remembers, 1 for the tokens that it has kept so far, 0 for others.
            None if all are kept.
    """

    x: Float[Tensor, "batch tokens dim"]
    size: Float[Tensor, "batch tokens"]
    key: Float[Tensor, "batch heads tokens head_dim"] | None = None
    value: Float[Tensor, "batch heads tokens head_dim"] | None = None
    class_attention: Float[Tensor, "batch heads tokens"] | None = None
    attention_received: Float[Tensor, "batch tokens"] | None = None
    grid: tuple[int, int] | None = None
    layer: int = 0
    layers: int = 1
    before: int = 0
    gate: nn.Module | None = None
    kept: Float[Tensor, "batch tokens"] | None = None

    def part(self, rows: Int[Tensor, " rows"], columns: Int[Tensor, "rows chosen"]) -> Tokens:
        """Some tokens of some samples.

        Args:
            rows: the samples.
            columns: the tokens of each of them. (They stand on no grid any more.)
        """
        at = rows[:, None]

        def heads(signal: Tensor | None) -> Tensor | None:
            return None if signal is None else signal.transpose(1, 2)[at, columns].transpose(1, 2)

        return Tokens(
            x=self.x[at, columns],
            size=self.size[at, columns],
            key=heads(self.key),
            value=heads(self.value),
            class_attention=heads(self.class_attention),
            attention_received=(
                None if self.attention_received is None else self.attention_received[at, columns]
            ),
            layer=self.layer,
            layers=self.layers,
            before=self.before,
            gate=self.gate,
            kept=None if self.kept is None else self.kept[at, columns],
        )


@runtime_checkable
class Reducer(Protocol):
    """A method with its options filled in: a frozen dataclass that can be called.

    Attributes:
        needs: the signals of `Tokens` that it wants, some of `SIGNALS`.
        bibtex: the paper to cite; empty if there is none.

    It must have these two. What else it may say of itself, as a class variable or as a property,
    are the fields of `Traits`, which has the default of each. `traits` reads them.
    """

    needs: ClassVar[frozenset[str]]
    bibtex: ClassVar[str]

    def __call__(self, tokens: Tokens, keep: int) -> TokenMap:
        """Chooses how the tokens become exactly `keep` tokens, 1 <= keep < tokens. (A method that
        `varies`: about as many as that; the method says what `keep` means to it.)"""
        ...


@runtime_checkable
class Learned(Reducer, Protocol):
    """A method with weights of its own, which decides token by token.

    Attributes:
        gates: a file of weights, the modules themselves, or None: random ones, to be trained.
        learned: the name under which files of its weights are known.
        remembers: whether a token that one gate left out stays out.
    """

    learned: ClassVar[str]

    @property
    def gates(self) -> Gates | None: ...

    @property
    def remembers(self) -> bool: ...

    def layers(self, shares: Sequence[float]) -> list[int]:
        """The layers that have a gate, given the share of tokens that is to leave each layer."""
        ...

    def gate(self, width: int, odds: float) -> nn.Module:
        """A random gate for tokens of this width; at first it should keep about `odds` tokens for
        each that it leaves out."""
        ...

    def score(self, tokens: Tokens) -> Float[Tensor, "batch tokens 2"]:
        """The log-probabilities of keeping each token, and of leaving it out."""
        ...


@runtime_checkable
class Reconstruction(Protocol):
    """What the tokens of the full grid are made of, where they are not copies of merged ones."""

    def __call__(
        self,
        before: Float[Tensor, "batch fine dim"],
        coarse: Float[Tensor, "batch coarse dim"],
        grid: tuple[int, int] | None,
        coarse_grid: tuple[int, int] | None,
    ) -> tuple[Int[Tensor, "batch_or_1 fine nearest"], Float[Tensor, "batch_or_1 fine nearest"]]:
        """Chooses, at the time when tokens are reduced, what each will be made of later.

        Args:
            before: the tokens before they were reduced.
            coarse: the reduced tokens.
            grid: rows and columns of `before`; None if they are on no grid.
            coarse_grid: the same of `coarse`.

        Returns:
            The reduced tokens that each token is made of, and their weights, which add up to 1.
        """
        ...


@dataclass(frozen=True)
class Traits:
    """What a method says of itself: the answers of `traits`.

    A method gives an answer by a class variable, a property or a method of the same name; where it
    has none, the default holds. (`open_grid` and `variants` say what they are read from.)

    Attributes:
        needs: the signals of `Tokens` that it wants, some of `SIGNALS`. Must be given.
        bibtex: the paper to cite. Default: empty, there is none.
        place: where it stands: "between" attention and MLP (the default), "before" the block, or
            "around" the block, behind which all tokens are there again.
        varies: whether samples may end with different numbers of tokens. `keep` is then a bound or
            an average, not a promise. Default: False.
        prunes: whether tokens are dropped for good, rather than merged. Must agree with
            `TokenMap.merges` of the maps that it returns, see `check_map`. Models that average
            their tokens refuse such methods. Default: False.
        proportional: whether its paper lets a token that stands for s tokens count s times as a
            key in attention. Default: True.
        learned: the name under which files of its weights are known, if it has weights (see
            `Learned`). Default: None.
        remembers: of a learned method, whether a token that one gate left out stays out. Default:
            False.
        gates: of a learned method, where its weights come from. Default: None, random ones.
        reconstruction: what the full grid is made of. Default: None, copies.
        copying: what makes the full grid of copies, where the maps' own `up` is not what does.
            Default: None, it is.
        filling: where blocks attend in windows, what the windows at the edges of a feature map that
            are not full are filled up with before they are reduced: copies of the "border" (the
            default), or "zeros".
        schedule: what a bare keep rate means. Default: `Stages`.
        fit: `fit(keep, grid)`, the number of tokens nearest to `keep` that it can make of a grid.
            Default: None, any number.
        keys_only: in denoisers, whether it only makes the keys and values of self-attention fewer.
            Then it may leave tokens out and drops none. Default: False.
        least: in denoisers, the lowest keep rate that it can reach on every grid. Default: 0.
        on: `on(device)`, the same method with those options filled in that depend on the device.
            Default: None, there are none.
        open_grid: whether it has an option `grid`, rows and columns of what it leaves, that is
            None; then a schedule that has a grid fills it in.
        variants: further settings that deserve a trial of their own, written as for `parse` behind
            the colon: "complete" for "atc:complete". Default: none.
        baseline: whether it is there to be compared with, and nobody would choose it. Default:
            False.
        limit: whether it is no method but a limit that methods are measured against, whose answers
            mean nothing. It may drop tokens in any model. Default: False.
    """

    needs: frozenset[str]
    bibtex: str = ""
    place: Place = "between"
    varies: bool = False
    prunes: bool = False
    proportional: bool = True
    learned: str | None = None
    remembers: bool = False
    gates: Gates | None = None
    reconstruction: Reconstruction | None = None
    copying: Reconstruction | None = None
    filling: Filling = "border"
    schedule: Callable[[float], Schedule] = Stages
    fit: Callable[[int, tuple[int, int]], int] | None = None
    keys_only: bool = False
    least: float = 0.0
    on: Callable[[torch.device], Reducer] | None = None
    open_grid: bool = False
    variants: tuple[str, ...] = ()
    baseline: bool = False
    limit: bool = False

    @property
    def own_schedule(self) -> bool:
        """Whether it says itself what a bare keep rate means."""
        return self.schedule is not Stages

    @property
    def drops(self) -> bool | None:
        """Whether its maps drop tokens (`TokenMap.merges` is False) or merge them; None if they may
        do either."""
        if self.limit or self.keys_only:
            return None
        return self.prunes or self.place == "around"


def traits(reducer: Reducer) -> Traits:
    """What a method can do, with the defaults filled in for what it does not say.

    Raises:
        ValueError: what the method says makes no sense; the message names it.
    """
    found = Traits(
        needs=reducer.needs,
        bibtex=getattr(reducer, "bibtex", ""),
        place=getattr(reducer, "place", "between"),
        varies=getattr(reducer, "varies", False),
        prunes=getattr(reducer, "prunes", False),
        proportional=getattr(reducer, "proportional", True),
        learned=getattr(reducer, "learned", None),
        remembers=getattr(reducer, "remembers", False),
        gates=getattr(reducer, "gates", None),
        reconstruction=getattr(reducer, "reconstruction", None),
        copying=getattr(reducer, "copying", None),
        filling=getattr(reducer, "filling", "border"),
        schedule=getattr(reducer, "schedule", Stages),
        fit=getattr(reducer, "fit", None),
        keys_only=getattr(reducer, "keys_only", False),
        least=getattr(reducer, "least", 0.0),
        on=getattr(reducer, "on", None),
        open_grid=getattr(reducer, "grid", ()) is None,
        variants=getattr(reducer, "variants", ()),
        baseline=getattr(reducer, "baseline", False),
        limit=getattr(reducer, "limit", False),
    )
    _check(reducer, found)
    return found


_BOOLEAN = ("varies", "prunes", "proportional", "remembers", "keys_only", "baseline", "limit")
_CALLABLE = ("schedule", "fit", "on", "reconstruction", "copying")
_OF_LEARNED = ("gates", "remembers", "layers", "gate", "score")


# Here, because torch.compile of older versions cannot follow `get_args`.
_PLACES, _FILLINGS = get_args(Place), get_args(Filling)


def _check(reducer: Reducer, found: Traits) -> None:
    name = type(reducer).__name__
    if not isinstance(found.needs, frozenset) or not found.needs <= SIGNALS:
        raise ValueError(
            f"{name}.needs must be a frozenset of some of {sorted(SIGNALS)}, not {found.needs!r}"
        )
    if found.place not in _PLACES:
        raise ValueError(f"{name}.place must be one of {', '.join(_PLACES)}, not {found.place!r}")
    if found.filling not in _FILLINGS:
        raise ValueError(
            f"{name}.filling must be one of {', '.join(_FILLINGS)}, not {found.filling!r}"
        )
    for trait in _BOOLEAN:
        if not isinstance(getattr(found, trait), bool):
            raise ValueError(f"{name}.{trait} must be True or False, not {getattr(found, trait)!r}")
    for trait in _CALLABLE:
        said = getattr(found, trait)
        if said is not None and not callable(said):
            raise ValueError(f"{name}.{trait} must be something that can be called, not {said!r}")
    if not 0 <= found.least <= 1:
        raise ValueError(f"{name}.least must be a keep rate in [0, 1], not {found.least!r}")
    if found.learned is not None:
        missing = [part for part in _OF_LEARNED if not hasattr(reducer, part)]
        if missing:
            raise ValueError(
                f"{name}.learned is {found.learned!r}, but a method that learns needs "
                f"{', '.join(missing)}, too"
            )


def check_map(reducer: Reducer, token_map: TokenMap) -> None:
    """Raises unless a map does what its method says.

    Args:
        reducer: the method.
        token_map: what the method itself returned, not what was made of that (`Weighted`, or
            several maps side by side).

    Raises:
        ValueError: the map drops tokens of a method that says nothing of it, or merges those of a
            method that says it drops them, or it is ragged and the method does not say so. The
            message names the line that is missing in the class, or wrong.
    """
    found = traits(reducer)
    name, kind = type(reducer).__name__, type(token_map).__name__
    if found.drops is not None and found.drops != (not token_map.merges):
        if found.prunes:
            raise ValueError(
                f"{name} says that it prunes, but returned {kind}, which merges tokens: take "
                "`prunes` out of the class, or return a map that drops tokens, such as Kept"
            )
        if found.place == "around":
            raise ValueError(
                f'{name} says place = "around", but returned {kind}, which merges tokens: there, a '
                "token stays what it is unless it is chosen; return Kept"
            )
        raise ValueError(
            f"{name} returned {kind}, which drops tokens, but does not say that it does: add the "
            "line `prunes: ClassVar[bool] = True` to the class, so that models which average their "
            "tokens refuse it"
        )
    if token_map.ragged and not found.varies:
        raise ValueError(
            f"{name} returned {kind} with different numbers of tokens in different samples, but "
            "does not say that it does: add the line `varies: ClassVar[bool] = True` to the class"
        )


ADDED: Mapping[str, bool] = MappingProxyType({"added": True})
"""Metadata of an option that a method got later, see `brief`."""


def brief(reducer: Reducer) -> str:
    """How a method is written, without the options that it got later (`ADDED`), as long as they
    have their defaults. What a method is called stands in files of former versions."""
    told = [
        f"{one.name}={getattr(reducer, one.name)!r}"
        for one in dataclasses.fields(reducer)  # type: ignore[arg-type]
        if one.repr
        and not (one.metadata.get("added") and getattr(reducer, one.name) == one.default)
    ]
    return f"{type(reducer).__qualname__}({', '.join(told)})"


# For one question alone.


def place(reducer: Reducer) -> Place:
    """Where a method stands, see `Traits`."""
    return traits(reducer).place


def varies(reducer: Reducer) -> bool:
    """Whether samples may end with different numbers of tokens, see `Traits`."""
    return traits(reducer).varies


def learned(reducer: Reducer) -> TypeGuard[Learned]:
    """Whether a method has weights of its own."""
    return traits(reducer).learned is not None


def prunes(reducer: Reducer) -> bool:
    """Whether tokens are dropped, rather than merged, see `Traits`."""
    return traits(reducer).prunes


def proportional(reducer: Reducer) -> bool:
    """Whether a token that stands for s tokens counts s times in attention, see `Traits`."""
    return traits(reducer).proportional
