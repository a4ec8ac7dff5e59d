"""Densities and separations of density-peak clustering on the CPU, compiled by numba: one sample
per thread, its distances in the cache.

Results are those of `tokred.reducers.dpc_knn` with tensors, to the bit. Densities take one pass
over the distances, and separations another; with tensors, every neighbour takes a pass. numba must
be installed to import this module.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tokred.kernels.compiling import compiled, compiled_parallel, running, threads_for

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

MOST_NEIGHBOURS = 8
"""For more, the smallest distances are better looked for otherwise."""

# The number of distances on which a thread works about as long as it takes to wake another thread.
_DISTANCES_PER_THREAD = 2**15

_LARGEST = np.iinfo(np.int64).max


def spread_and_separation(
    halved: Float[Tensor, "batch tokens tokens"], unit: Float[Tensor, " batch"], k: int, dim: int
) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch tokens"]]:
    """The two numbers by which centres are chosen: spread and separation of every token.

    Args:
        halved: half of the squared distances, in units that differ by sample; float64, contiguous,
            on the CPU, not negative, the diagonal 0.
        unit: what they are multiplied by to be squared distances.
        k: how many of the smallest count, the token itself among them, at most `MOST_NEIGHBOURS`
            and at most as many as there are tokens.
        dim: what squared distances are divided by.

    Returns:
        The mean of the k smallest squared distances of every token, divided by `dim`; and half of
        the squared distance, in the same units as `halved`, to the nearest token of a smaller mean,
        or of the sample's largest one, if there is none.
    """
    batch, num, _ = halved.shape
    distances = halved.numpy()
    factor = unit.numpy()
    spread, separation = np.empty((2, batch, num))
    threads = threads_for(min(batch, batch * num * num // _DISTANCES_PER_THREAD))
    arguments = (distances, factor, k, dim, spread, separation)
    if threads == 1:
        _share(0, 1, *arguments)
    else:
        with running(threads):
            _shares(threads, *arguments)
    return torch.from_numpy(spread), torch.from_numpy(separation)


@compiled_parallel
def _shares(
    shares: int,
    distances: Floats,
    factor: Floats,
    k: int,
    dim: int,
    spread: Floats,
    separation: Floats,
) -> None:
    for share in numba.prange(shares):
        _share(share, shares, distances, factor, k, dim, spread, separation)


@compiled
def _share(
    share: int,
    shares: int,
    distances: Floats,
    factor: Floats,
    k: int,
    dim: int,
    spread: Floats,
    separation: Floats,
) -> None:
    """The samples `share`, `share + shares`, ..."""
    num = distances.shape[1]
    smallest = np.empty(k, dtype=np.int64)
    for sample in range(share, distances.shape[0], shares):
        # Numbers that are not negative rank as the integers of the same bits.
        bits = distances[sample].view(np.int64)
        longest = np.int64(0)
        for token in range(num):
            longest = max(longest, _smallest_of(bits[token], token, smallest))
            total = 0.0
            for value in smallest.view(np.float64):
                total += value
            spread[sample, token] = total / k * factor[sample] / dim
        for token in range(num):
            nearest = _nearest_below(bits[token], spread[sample], spread[sample, token])
            separation[sample].view(np.int64)[token] = min(nearest, longest)


@compiled
def _smallest_of(bits: Integers, own: int, smallest: Integers) -> int:
    """Fills `smallest` with the least of a row, rising, the token itself (0) first; returns the
    largest of the row."""
    k = len(smallest)
    smallest[:] = _LARGEST
    smallest[0] = 0
    last = smallest[k - 1]
    longest = np.int64(0)
    for other in range(len(bits)):
        value = bits[other]
        longest = max(longest, value)
        if value < last and other != own:
            place = k - 1
            while place > 1 and smallest[place - 1] > value:  # NaN may be less than 0
                smallest[place] = smallest[place - 1]
                place -= 1
            smallest[place] = value
            last = smallest[k - 1]
    return longest


@compiled
def _nearest_below(bits: Integers, spread: Floats, own: float) -> int:
    """The least of a row among the tokens of smaller spread; the largest integer if there is
    none."""
    nearest = np.int64(_LARGEST)
    for other in range(len(bits)):
        nearest = min(nearest, bits[other] if spread[other] < own else _LARGEST)
    return nearest
