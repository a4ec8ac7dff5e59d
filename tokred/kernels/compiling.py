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

F = TypeVar("F", bound=Callable[..., object])

# numba's threads are not there in a process that was forked off (with OpenMP, asking for them ends
# the process), and not every kind of them may be called from two places at once.
_PROCESS = os.getpid()
_ONE_AT_A_TIME = threading.Lock()


def compiled(function: F) -> F:
    """Compiles at the first call, and keeps the machine code for other processes.

    Division by zero is as in NumPy: looking for it would keep loops from being vectorised.
    """
    return _compile(function, error_model="numpy")


def compiled_parallel(function: F) -> F:
    """As `compiled`; every turn of a `prange` loop may run on a thread of its own."""
    return _compile(function, parallel=True)


def threads_for(shares: int) -> int:
    """How many threads to share work among, that is worth so many: at most those of PyTorch."""
    threads = max(1, min(shares, torch.get_num_threads()))
    if os.getpid() != _PROCESS:
        return 1
    return min(threads, _available()) if threads > 1 else 1


@contextmanager
def running(threads: int) -> Iterator[None]:
    """While it is entered, parallel kernels run on so many threads, and no others run."""
    with _ONE_AT_A_TIME:
        before = numba.get_num_threads()  # of this Python thread alone
        numba.set_num_threads(threads)
        try:
            yield
        finally:
            numba.set_num_threads(before)


def _available() -> int:
    """The threads that numba may use. Asking for the first time starts them; with OpenMP, that
    also changes how many PyTorch uses, which is put right again."""
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
