"""Whether kernels that numba compiles may do the work of tensor operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokred.graphs import in_a_graph
from tokred.optional import installed


def is_native(x: Tensor) -> bool:
    """Whether a kernel for the CPU may read the memory of a tensor and give an answer that no
    operator has computed: it is float32 or bfloat16 on the CPU, numba is installed, and nobody
    follows the operators (gradients, graphs, traces, transforms, modes that count them)."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.stride(-1) == 1
        and x.numel() > 0
        and not x.requires_grad
        and not in_a_graph(x)
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and installed("numba")
    )
