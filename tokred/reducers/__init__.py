"""Reduction methods, one file each. A new file here is a new method; nothing else changes.

`protocol` says what a method is, `registry` knows all methods by name.
"""

from tokred.reducers.protocol import (
    SIGNALS,
    Learned,
    Place,
    Reconstruction,
    Reducer,
    Tokens,
    Traits,
    check_map,
    learned,
    place,
    proportional,
    prunes,
    traits,
    varies,
)
from tokred.reducers.registry import METHODS as _METHODS
from tokred.reducers.registry import discover, make, names, parse, register

__all__ = [
    "SIGNALS",
    "_METHODS",
    "Learned",
    "Place",
    "Reconstruction",
    "Reducer",
    "Tokens",
    "Traits",
    "check_map",
    "learned",
    "make",
    "names",
    "parse",
    "place",
    "proportional",
    "prunes",
    "register",
    "traits",
    "varies",
]

discover()
