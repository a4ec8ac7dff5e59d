"""Work that cannot be part of a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tokred.graphs import exporting

Out = TypeVar("Out")


def outside_of_the_graph(
    why: str, call: Callable[..., Out], *args: object, **kwargs: object
) -> Out:
    """Calls something in code that is being compiled, but leaves the graph for it: what it does
    depends on the images, which are not known yet.

    Args:
        why: a clause that names what makes it so, for the message below.
        call: what to call.
        args, kwargs: with what.

    Raises:
        RuntimeError: the model is being exported. An exported graph cannot be left.
    """
    if exporting():
        raise RuntimeError(
            f"{why}, and an exported graph holds fixed numbers of tokens: the table under Export "
            "in docs/composition.md says which methods can be exported"
        )
    # Made when it is needed: it imports the compiler.
    found: Out = torch.compiler.disable(_called)(call, *args, **kwargs)
    return found


def _called(call: Callable[..., Out], *args: object, **kwargs: object) -> Out:
    return call(*args, **kwargs)
