"""Compares outputs of any structure: tensors, mappings, lists and tuples of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Leaves = list[tuple[str, Tensor]]
"""The tensors of an output, with their paths in it ("hidden_states.3")."""


def leaves(output: Any, path: str = "") -> Leaves:
    """All tensors of floating point in an output."""
    if isinstance(output, Tensor):
        return [(path, output)] if output.is_floating_point() else []
    return [one for name, part in _parts(output) for one in leaves(part, _joined(path, name))]


def structure(output: Any, path: str = "") -> dict[str, str]:
    """What an output is made of: for every path the type; for tensors the dtype and the shape."""
    if isinstance(output, Tensor):
        return {path: f"{output.dtype} {list(output.shape)}"}
    found = {path: type(output).__name__}
    for name, part in _parts(output):
        found |= structure(part, _joined(path, name))
    return found


def _parts(output: Any) -> list[tuple[str, Any]]:
    if isinstance(output, Mapping):
        return [(str(name), part) for name, part in output.items()]
    if isinstance(output, list | tuple):
        return [(str(number), part) for number, part in enumerate(output)]
    return []


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def apart(found: Tensor, wanted: Tensor, times: float = 1.0) -> str | None:
    """How two tensors differ; None if they differ by no more than rounding explains.

    Args:
        found: what was computed.
        wanted: what it is compared with.
        times: how many times the usual rounding is let pass: 1e-4 of the largest number in
            float32, in coarser dtypes more.
    """
    if found.shape != wanted.shape:
        return f"shape {list(found.shape)} instead of {list(wanted.shape)}"
    if not wanted.numel():
        return None
    coarsest = max(torch.finfo(x.dtype).eps for x in (found, wanted))
    share = min(times * 1e-4 * coarsest / torch.finfo(torch.float32).eps, 0.1)
    one, other = (x.double().nan_to_num(0, 0, 0) for x in (found, wanted))
    most, largest = float((one - other).abs().max()), float(other.abs().max())
    if most <= share * largest:
        return None
    return f"off by {most:.1e}, where the largest is {largest:.1e}"


def same(found: Leaves, wanted: Leaves) -> bool:
    """Whether two outputs are equal to the last bit."""
    return len(found) == len(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for (_, a), (_, b) in zip(found, wanted, strict=True)
    )
