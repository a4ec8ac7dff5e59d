"""What kernels that numba compiles have in common. It must be installed to import this module."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numba
import torch
from numba.core.options import DefaultOptions

F = TypeVar("F", bound=Callable[..., object])

# A forked process does not have numba's threads (with OpenMP, asking for them ends the process).
# Some kinds of numba's threads must not be used from two places at once.
_PROCESS = os.getpid()
_ONE_AT_A_TIME = threading.Lock()


def compiled(function: F) -> F:
    """Compiles at the first call, and keeps the machine code for other processes. (Until its file
    changes. If only what it calls in other files has changed, `__pycache__` must be deleted.)

    Division by zero is as in NumPy: checks for it would prevent loops from being vectorised.
    """
    return _compile(function, error_model="numpy")


def compiled_fused(function: F) -> F:
    """Like `compiled`; products and sums may be rounded once rather than twice, where the processor
    has an instruction for both. What is computed of equal numbers is equal still."""
    return _compile(function, error_model="numpy", fastmath={"contract"})


def compiled_lean(function: F) -> F:
    """Like `compiled`, for functions that allocate nothing. Rows of arrays, as views, are not
    counted there, which took a third of the time of functions with many of them."""
    options = {"_nrt": False} if hasattr(DefaultOptions, "_nrt") else {}
    return _compile(function, error_model="numpy", **options)


def compiled_sums(function: F) -> F:
    """Like `compiled`, but numbers may be added up in an order that the compiler likes, so that
    sums are vectorised. It is the same order at every call."""
    return _compile(function, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def compiled_parallel(function: F) -> F:
    """Like `compiled`; every iteration of a `prange` loop may run on a thread of its own."""
    return _compile(function, parallel=True)


def threads_for(shares: int) -> int:
    """The number of threads for work that can be split into `shares`: at most those of PyTorch."""
    threads = max(1, min(shares, torch.get_num_threads()))
    if os.getpid() != _PROCESS:
        return 1
    return min(threads, _available()) if threads > 1 else 1


@contextmanager
def running(threads: int) -> Iterator[None]:
    """While it is entered, parallel kernels run on this number of threads, and no other Python
    thread runs one."""
    with _ONE_AT_A_TIME:
        before = numba.get_num_threads()  # of this Python thread alone
        numba.set_num_threads(threads)
        try:
            yield
        finally:
            numba.set_num_threads(before)


def _available() -> int:
    """The number of threads that numba may use. Asking for the first time starts them. With OpenMP,
    that also changes the number that PyTorch uses, which is restored."""
    before = torch.get_num_threads()
    available: int = numba.get_num_threads()
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
    return available


def _compile(function: F, **options: Any) -> F:
    # Unwrapped, because checks of shapes may have been wrapped around it.
    plain = inspect.unwrap(function)
    try:
        return cast(F, numba.njit(cache=True, nogil=True, **options)(plain))
    except RuntimeError:  # neither the installation nor the user's cache folder can be written to
        return cast(F, numba.njit(nogil=True, **options)(plain))
