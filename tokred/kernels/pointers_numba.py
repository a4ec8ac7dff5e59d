"""The memory of tensors in functions that numba compiles, by its address.

A tensor becomes an argument within a tenth of a microsecond as a number; as an array of NumPy it
takes ten times as long, and three times that where it is bfloat16, which NumPy does not have. A
small kernel has ten of them. Whoever calls keeps the tensors alive, and reads and writes within
them. numba must be installed to import this module.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from tokred.kernels.compiling import compiled


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


@compiled
def float32(address: int, size: int) -> NDArray[np.float32]:
    """So many float32 from an address on."""
    return numba.carray(_pointer(address), (size,), np.float32)


@compiled
def int64(address: int, size: int) -> NDArray[np.int64]:
    """So many int64 from an address on."""
    return numba.carray(_pointer(address), (size,), np.int64)


@compiled
def int16(address: int, size: int) -> NDArray[np.int16]:
    """So many int16 from an address on: bfloat16 is the upper half of a float32."""
    return numba.carray(_pointer(address), (size,), np.int16)
