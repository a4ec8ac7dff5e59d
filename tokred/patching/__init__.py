"""`tokred.apply` and `tokred.remove`: put fewer tokens into a model, and take it back."""

from tokred.patching.hanging import hang, host_of, reduction_of, remove, uncompiled
from tokred.patching.planning import reduction_for, signals_of
from tokred.patching.stand_ins import (
    Carry,
    Grid,
    HandedOut,
    Patched,
    PatchedAttention,
    PatchedInWindows,
    PatchedMethod,
    Pool,
    Tap,
)
from tokred.patching.verbs import applied, apply

__all__ = [
    "Carry",
    "Grid",
    "HandedOut",
    "Patched",
    "PatchedAttention",
    "PatchedInWindows",
    "PatchedMethod",
    "Pool",
    "Tap",
    "applied",
    "apply",
    "hang",
    "host_of",
    "reduction_for",
    "reduction_of",
    "remove",
    "signals_of",
    "uncompiled",
]
