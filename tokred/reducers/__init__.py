"""Reduction methods, one file each. A new file here is a new method; nothing else changes."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeGuard, TypeVar, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from tokred.gates import Gates
from tokred.maps import TokenMap


@dataclass(frozen=True)
class Tokens:
    """What a method may look at, at one place in the network.

    Only the tokens that may be reduced are here: `before` says how many prefix tokens stand in
    front of them. A signal is None unless the method lists it in `needs`.

    Attributes:
        x: the tokens themselves, in the model's dtype.
        size: how many original tokens each one stands for, float32. 0 marks padding: only methods
            that leave some samples with fewer tokens than others (`varies`) meet it, always at
            the end.
        key: the keys as attention compares them (after any key normalisation), without gradient.
        value: the values, without gradient.
        class_attention: how much attention each token gets from the class token in each head,
            after softmax, float32; higher = more important. In a model without a class token, the
            mean attention it gets from all tokens.
        attention_received: how much attention each token got in the block before, the sum over
            heads and queries, float32. None in front of the first block.
        grid: rows and columns of the tokens, where they stand row by row on a grid; None where
            they do not.
        layer: the layer we are in, from 0.
        layers: how many there are.
        before: the prefix tokens in front.
        gate: of a learned method, its module for this layer.
        kept: of a method that remembers, 1 for the tokens that it has kept so far, 0 for others.
            None if all.
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
        """The same of some samples, and of some of their tokens."""
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
        needs: the signals of `Tokens` that it wants: "key", "value", "class_attention",
            "attention_received", "grid".
        bibtex: the paper to cite; empty if there is none.

    A class may say more (see `place`, `varies`, `prunes` and `proportional` here):

    - `place`: "between" attention and MLP, which is where most methods stand, "before" the block,
      or "around" it: then there are all tokens again behind it.
    - `varies`: whether samples may end with different numbers of tokens. `keep` is then a bound,
      not a promise.
    - `prunes`: whether tokens are dropped, rather than merged; no if not said.
    - `proportional`: whether its paper lets a token that stands for s tokens count s times in
      attention; yes if not said.
    - `reconstruction`: what the full grid is made of (see `Reconstruction`); of copies if not said.
    - `schedule(keep_rate)`: what a bare keep rate means; `Stages` if not said.
    - `fit(keep, grid)`: the number of tokens nearest to `keep` that it can make of a grid; any if
      not said.
    - `learned`: the name of what it learns, if it does: see `Learned`.
    """

    needs: ClassVar[frozenset[str]]
    bibtex: ClassVar[str]

    def __call__(self, tokens: Tokens, keep: int) -> TokenMap:
        """Chooses how the tokens become exactly `keep` tokens, 1 <= keep < tokens. (Where
        `varies`: about as many as that, as the method says.)"""
        ...


@runtime_checkable
class Learned(Reducer, Protocol):
    """A method with weights of its own, which decides token by token.

    Attributes:
        gates: a file of weights, the modules themselves, or None: random ones, to be trained.
        learned: the name under which files of its weights are known.
        remembers: whether what one gate left out stays out.
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
        """The logarithms of how probable it is to keep a token, and to leave it out."""
        ...


@runtime_checkable
class Reconstruction(Protocol):
    """What the full grid is made of, where merged tokens are not just copied."""

    def __call__(
        self,
        before: Float[Tensor, "batch fine dim"],
        coarse: Float[Tensor, "batch coarse dim"],
        grid: tuple[int, int] | None,
        coarse_grid: tuple[int, int] | None,
    ) -> tuple[Int[Tensor, "batch_or_1 fine nearest"], Float[Tensor, "batch_or_1 fine nearest"]]:
        """Chooses it when tokens are reduced.

        Args:
            before: the tokens before they were reduced.
            coarse: the reduced tokens.
            grid: rows and columns of `before`; None if they are on no grid.
            coarse_grid: the same of `coarse`.

        Returns:
            The reduced tokens that each token is made of, and how much of each, which adds up
            to 1.
        """
        ...


def place(reducer: Reducer) -> str:
    """Where a method stands: "between" attention and MLP, "before" the block or "around" it."""
    return str(getattr(reducer, "place", "between"))


def varies(reducer: Reducer) -> bool:
    """Whether samples may end with different numbers of tokens."""
    return bool(getattr(reducer, "varies", False))


def learned(reducer: Reducer) -> TypeGuard[Learned]:
    """Whether a method has weights of its own."""
    return getattr(reducer, "learned", None) is not None


def prunes(reducer: Reducer) -> bool:
    """Whether tokens are dropped, rather than merged."""
    return bool(getattr(reducer, "prunes", False))


def proportional(reducer: Reducer) -> bool:
    """Whether a token that stands for s tokens counts s times in attention."""
    return bool(getattr(reducer, "proportional", True))


_METHODS: dict[str, Callable[[], Reducer]] = {}
R = TypeVar("R", bound=Callable[[], Reducer])


def register(name: str) -> Callable[[R], R]:
    """Gives a method the short name that `tokred.apply` and the command line accept.

    Raises:
        ValueError: another method has that name.
    """

    def add(method: R) -> R:
        there = _METHODS.get(name)
        # The same class once more is a notebook cell that was run again.
        if there is not None and _where(there) != _where(method):
            raise ValueError(f"method {name!r} is registered already, by {_where(there)}")
        _METHODS[name] = method
        return method

    return add


def names() -> list[str]:
    """The short names of all methods, sorted."""
    return sorted(_METHODS)


def make(
    method: str | Reducer, also: Mapping[str, Callable[[], Reducer]] = MappingProxyType({})
) -> Reducer:
    """A short name becomes the method with its default options; a reducer stays itself.

    Args:
        method: the name, or the reducer.
        also: further names, or other meanings of the same.

    Raises:
        ValueError: no method has that name.
        TypeError: neither a name nor a reducer.
    """
    if isinstance(method, str):
        known = {**_METHODS, **also}
        if method not in known:
            close = difflib.get_close_matches(method, sorted(known), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"unknown method {method!r}{hint}; known methods: {', '.join(sorted(known))}"
            )
        return known[method]()
    if isinstance(method, type) or not callable(method) or not hasattr(method, "needs"):
        raise TypeError(
            f"method must be a name or a reducer such as tokred.ToMe(), not {method!r}; "
            f"known names: {', '.join(names())}"
        )
    return method


def parse(text: str, also: Mapping[str, Callable[[], Reducer]] = MappingProxyType({})) -> Reducer:
    """A method as it is written on the command line: "tome", "atc:single", "tome:threshold=0.9".

    What follows the colon are options, as in a call: in the order of the fields, or by name. Words
    need no quotes.

    Args:
        text: the method.
        also: further names, or other meanings of the same (see `make`).

    Raises:
        ValueError: no method has that name, it has no such option, or the option no such value.
    """
    name, colon, options = text.partition(":")
    reducer: Any = make(name, also)
    known = [field.name for field in dataclasses.fields(reducer)] if colon else []
    try:
        call = ast.parse(f"_({options})", mode="eval").body
        assert isinstance(call, ast.Call)
        given = dict(zip(known, map(_value, call.args), strict=False))
        named = {str(option.arg): _value(option.value) for option in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{options!r} are no options: write {name}:VALUE or {name}:NAME=VALUE, with commas in "
            "between"
        ) from error
    for unknown in (option for option in named if option not in known):
        raise ValueError(f"{name} has no option {unknown!r}; it has {known or 'none'}")
    if len(call.args) > len(known) or given.keys() & named.keys():
        raise ValueError(f"{options!r} are too many options: {name} has {known or 'none'}")
    changed: Reducer = dataclasses.replace(reducer, **given, **named)
    return changed


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _where(method: object) -> str:
    return f"{method.__module__}.{getattr(method, '__qualname__', method)}"


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
