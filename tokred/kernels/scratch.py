"""Temporary memory for kernels on the CPU.

The operating system clears new memory when it is first written to, a page at a time. For the
distances of a few images this can take longer than the clustering itself. So the memory is kept
from call to call.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_MOST = 2**28
"""Bytes of one array; where more are asked for, they are not kept."""

_VIEWS = 256
"""How many arrays over that memory are kept: making one takes longer than to look it up."""

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array with arbitrary content; the same memory at every call with that name.

    It is the calling thread's own, starts at a cache line, and may be written to until the next one
    of that name is asked for. As much is kept as the largest one took, but larger ones than 256 MiB
    are fresh; `release` gives it back.
    """
    views = vars(_kept).setdefault("views", {})
    found: NDArray[Any] | None = views.get((name, shape, dtype))
    if found is not None:
        return found
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    memory = vars(_kept).get(name)
    if memory is None or len(memory) < wanted + 64:
        memory = np.empty(wanted + 64, dtype=np.uint8)
        if wanted <= _MOST:
            setattr(_kept, name, memory)
            for key in [key for key in views if key[0] == name]:
                del views[key]  # of less memory, which would stay with them
    start = -memory.ctypes.data % 64
    view: NDArray[Any] = memory[start : start + wanted].view(dtype).reshape(shape)
    if wanted <= _MOST:
        if len(views) >= _VIEWS:
            views.clear()
        views[name, shape, dtype] = view
    return view


def release() -> None:
    """Gives back what `scratch` has kept for the calling thread."""
    vars(_kept).clear()
