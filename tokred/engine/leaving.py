"""Work that cannot be part of a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Out = TypeVar("Out")


def outside_of_the_graph(call: Callable[..., Out], *args: object, **kwargs: object) -> Out:
    """Calls something in code that is being compiled, but leaves the graph for it: how many tokens
    there will be depends on the images, and is not known yet."""
    # Made when it is needed: it imports the compiler.
    found: Out = torch.compiler.disable(_called)(call, *args, **kwargs)
    return found


def _called(call: Callable[..., Out], *args: object, **kwargs: object) -> Out:
    return call(*args, **kwargs)
