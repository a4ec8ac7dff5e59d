"""Methods by name: `register` gives a method one, `make` and `parse` find it again."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any, TypeVar

from tokred.reducers.protocol import Reducer

METHODS: dict[str, Callable[[], Reducer]] = {}
"""All methods that have a name. Written to by `register` alone."""

R = TypeVar("R", bound=Callable[[], Reducer])


def register(name: str) -> Callable[[R], R]:
    """Gives a method the short name that `tokred.apply` and the command line accept.

    Raises:
        ValueError: another method has that name.
    """

    def add(method: R) -> R:
        there = METHODS.get(name)
        # The same class once more is a notebook cell that was run again.
        if there is not None and _where(there) != _where(method):
            raise ValueError(f"method {name!r} is registered already, by {_where(there)}")
        METHODS[name] = method
        return method

    return add


def names() -> list[str]:
    """The short names of all methods, sorted."""
    return sorted(METHODS)


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
        known = {**METHODS, **also}
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


def discover() -> None:
    """Imports every file of this folder, so that the methods in it get their names."""
    folder = Path(__file__).parent
    for module in iter_modules([str(folder)]):
        import_module(f"{__package__}.{module.name}")


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _where(method: object) -> str:
    return f"{method.__module__}.{getattr(method, '__qualname__', method)}"
