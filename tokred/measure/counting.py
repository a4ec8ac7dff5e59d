"""What a pass needs, counted: multiply-adds, and the memory that tensors take at most."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokred.data.inputs import Inputs, call, device_of, pixels


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return, for as long as each of them lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):  # these were there before
            if isinstance(x, torch.Tensor):
                self._known.add(x.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self._known:
                storage = x.untyped_storage()
                self._known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_memory(model: Callable[..., Any], images: Inputs) -> int:
    """The most bytes that tensors take during a pass without gradients, not counting what was there
    before. On CUDA the allocator tells it. Elsewhere the tensors that operators return are counted,
    but not the memory that an operator uses internally."""
    device = device_of(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad():
            call(model, images)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with torch.no_grad(), _Allocations() as allocations:
        call(model, images)
    return int(allocations.most)


def count(model: nn.Module, images: Inputs) -> float:
    """Multiply-adds per image in one pass, counted as in `Flops`."""
    # Imported when it is needed: it imports Triton.
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def product(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return int(2 * a[0] * a[1] * b[1])

    # Older versions of torch's counter do not know the CPU's fused attention, and none knows
    # products of integers, by which tokens are matched.
    unknown = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._int_mm: product,
    }
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter, torch.no_grad():
        call(model, images)
    return float(counter.get_total_flops()) / 2 / len(pixels(images))
