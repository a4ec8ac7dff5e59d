"""Whether code runs as it is, or becomes a graph.

`torch.compiler.is_compiling()` is no answer: it is true of all threads while one of them compiles.
Another way to the same numbers, which is meant for graphs, need not give the same bits, nor spare
what is padding. (Its word on exporting is true of all threads, too, while one of them exports.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokred.optional import installed

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


def tracing() -> bool:
    """Whether `torch.jit.trace` writes down what is done. Then even the shapes of tensors are
    tensors, and two passes must do the same."""
    return torch._C._get_tracing_state() is not None


def recorded(x: Tensor) -> bool:
    """Whether operators are written down for later, rather than run here and now: then nothing may
    depend on how many images there happen to be."""
    # A trace that depends on gradients would not be what `torch.jit.trace` finds when it checks.
    return in_a_graph(x) or tracing()


def is_plain(x: Tensor) -> bool:
    """Whether nobody follows what is done to a tensor, so that something else than operators may
    read its memory: no gradients, no graph, no trace, no transform, no mode that counts."""
    return (
        type(x) is Tensor
        and not x.requires_grad
        and not in_a_graph(x)
        and not tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
    )


def is_native(x: Tensor) -> bool:
    """Whether a kernel that numba compiles may do the work of operators on a tensor: numba is
    installed, the tensor is float32 or bfloat16 on the CPU, its rows are contiguous, and nobody
    follows the operators."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and is_plain(x)
        and x.stride(-1) == 1
        and x.numel() > 0
        and installed("numba")
    )


def _without_values(x: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(x, FakeTensor | FunctionalTensor)
