"""Whether code runs as it is, or becomes a graph.

`torch.compiler.is_compiling()` is no answer: it is true of all threads while one of them compiles.
Another way to the same numbers, which is meant for graphs, need not give the same bits, nor spare
what is padding. (Its word on exporting is true of all threads, too, while one of them exports.)
"""

from __future__ import annotations

import torch
from torch import Tensor

compiling = torch.compiler.is_dynamo_compiling
"""Whether `torch.compile` is following this code. Nothing can ride on an activation there."""


def exporting() -> bool:
    """Whether code is being exported (torch.export, ONNX), rather than compiled to run here."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    # torch 2.6 has no word for it; but its exporter is no part of the compiler, by default.
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def in_a_graph(x: Tensor) -> bool:
    """Whether what is done to a tensor becomes a graph, of `torch.compile` or of `torch.export`, so
    that nothing may depend on its values."""
    if compiling():
        return True
    # Exporting runs this code as it is, on tensors without values.
    return torch.compiler.is_compiling() and _without_values(x)


def recorded(x: Tensor) -> bool:
    """Whether operators are written down for later, rather than run here and now: then nothing may
    depend on how many images there happen to be."""
    return in_a_graph(x) or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _without_values(x: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(x, FakeTensor | FunctionalTensor)
