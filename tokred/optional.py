"""Libraries that only some parts need, imported when they are."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any


def require(module: str, extra: str) -> Any:
    """Imports a module of a library that comes with one of tokred's extras.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.split(".")[0]
        raise ModuleNotFoundError(
            f'this needs {library}: run `pip install "tokred[{extra}]"`'
        ) from error


@cache  # looking takes longer than clustering a few tokens
def installed(library: str) -> bool:
    """Whether a library is there to be imported."""
    return find_spec(library) is not None
