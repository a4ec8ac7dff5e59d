"""Results are values, which print themselves as text. How else they are drawn says `tokred.show`.

A module of `tokred.show` registers a function for each kind of drawing of a type of results:

    @draws(Profile, "html")
    def fragment(profile: Profile) -> str: ...

So nothing that measures imports anything that draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

Kind: TypeAlias = Literal["html", "plot"]
"""A piece of HTML, for notebooks; or a figure of Matplotlib."""

_FUNCTIONS: dict[tuple[type, Kind], Callable[..., Any]] = {}
F = TypeVar("F", bound=Callable[..., Any])


class Result:
    """What a measurement returns. Notebooks show the HTML that is registered for its type, or, if
    none is, the text."""

    def _repr_html_(self) -> str | None:
        function = _function(self, "html")
        return None if function is None else function(self)


def draws(result: type, kind: Kind) -> Callable[[F], F]:
    """Registers the function that draws results of this type: `function(result, ...)`."""

    def add(function: F) -> F:
        _FUNCTIONS[result, kind] = function
        return function

    return add


def drawn(result: object, kind: Kind, *arguments: Any) -> Any:
    """What the registered function makes of a result.

    Raises:
        TypeError: no function is registered for its type.
    """
    function = _function(result, kind)
    if function is None:
        raise TypeError(f"no {kind} is registered for {type(result).__name__}: import tokred.show")
    return function(result, *arguments)


def _function(result: object, kind: Kind) -> Callable[..., Any] | None:
    known = (_FUNCTIONS.get((kin, kind)) for kin in type(result).__mro__)
    return next((function for function in known if function is not None), None)
