"""Cosine distances of the tokens of an image on the CPU, as integers, compiled by numba.

A distance is 1 - cosine, rounded to float32 and cut to [0, 2], in multiples of 2^-24: so it is an
integer, exactly, and sums of distances are exact. Only half of the products are computed; the
matrix gets both halves. What a distance is depends on its two tokens alone, not on their places,
other images, or the number of threads. numba must be installed to import this module.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tokred.kernels.compiling import compiled_lean, compiled_parallel, running, threads_for
from tokred.kernels.scratch import scratch
from tokred.kernels.vectors_numba import COLUMNS, PANEL, ROWS, UNITS, products

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

FAR = 2**30
"""Further than any distance, and than any sum of `FEW` of them: what a token is from itself. With
such a sum added, it is still an int32."""

FEW = 31

_TWO = np.int32(2 * UNITS)


def rows_for(num: int) -> int:
    """How many rows the matrix of distances needs."""
    return -(-num // PANEL) * PANEL


def stride_for(num: int) -> int:
    """How many numbers a row needs. A multiple of 64 fits in; and it is an odd number of cache
    lines, so that a column is spread over the whole cache."""
    return -(-num // 64) * 64 + 16


def distances(
    features: Float[Tensor, "batch tokens dim"],
) -> Float[Tensor, "batch tokens tokens"]:
    """1 - cos of all pairs of tokens, float32: the distances that `arrange` and `fill` give, for
    other kernels. Those on the diagonal are 0.

    Args:
        features: float32 on the CPU, contiguous.
    """
    batch, num, dim = features.shape
    out = np.empty((batch, num, num), dtype=np.float32)
    threads = threads_for(batch)
    rows, stride = rows_for(num), stride_for(num)
    near = scratch("near", (threads, rows, stride), np.int32)
    panels = scratch("panels", (threads, rows * dim), np.float32)
    floats = scratch("floats", (threads, stride), np.float64)
    least = scratch("least", (threads, stride), np.int32)
    arguments = (features.numpy(), panels, floats, least, near, out)
    if threads == 1:
        _distances_share(0, 1, *arguments)
    else:
        with running(threads):
            _distances_shares(threads, *arguments)
    return torch.from_numpy(out)


@compiled_lean
def _distances_share(
    share: int,
    shares: int,
    features: Floats,
    panels: Floats,
    floats: Floats,
    least: Integers,
    near: Integers,
    out: Floats,
) -> None:
    """The distances of the samples `share`, `share + shares`, ..."""
    num = features.shape[1]
    for sample in range(share, features.shape[0], shares):
        arrange(features[sample], panels[share], floats[share], least[share], 0, 1)
        fill(features.shape[2], panels[share], least[share], near[share], 0, 1)
        for r in range(num):
            for c in range(num):
                out[sample, r, c] = np.float32(near[share, r, c]) * np.float32(1 / UNITS)
            out[sample, r, r] = 0


@compiled_parallel
def _distances_shares(
    shares: int,
    features: Floats,
    panels: Floats,
    floats: Floats,
    least: Integers,
    near: Integers,
    out: Floats,
) -> None:
    for share in numba.prange(shares):
        _distances_share(share, shares, features, panels, floats, least, near, out)


@compiled_lean
def arrange(
    features: Floats,
    panels: Floats,
    length: Floats,
    least: Integers,
    share: int,
    shares: int,
) -> None:
    """Tokens of length 1, in the order in which `products` reads them.

    Lengths are float64, in which no square of a float32 overflows or vanishes.

    Args:
        features: of one sample, [tokens, dim], float32.
        panels: is filled: [panels * dim * PANEL].
        length: workspace of one number per token, float64.
        least: is filled: what the distances of a token are at least. 2 for one that has NaN or
            infinity, and `FAR` for what only fills the last panel.
        share: which of the shares of this work to do.
        shares: how many there are.
    """
    num, dim = features.shape
    for panel in range(share, (num + PANEL - 1) // PANEL, shares):
        first = panel * PANEL
        start = first * dim
        # Four tokens at a time, because every sum waits for its last addition.
        for t in range(first, first + PANEL, 4):
            last = num - 1
            a, b, c, d = min(t, last), min(t + 1, last), min(t + 2, last), min(t + 3, last)
            sum_a = sum_b = sum_c = sum_d = 0.0
            for k in range(dim):
                one, two, three, four = (
                    features[a, k],
                    features[b, k],
                    features[c, k],
                    features[d, k],
                )
                place = start + k * PANEL + t - first
                panels[place], panels[place + 1] = one, two
                panels[place + 2], panels[place + 3] = three, four
                sum_a += np.float64(one) * np.float64(one)
                sum_b += np.float64(two) * np.float64(two)
                sum_c += np.float64(three) * np.float64(three)
                sum_d += np.float64(four) * np.float64(four)
            length[t], length[t + 1], length[t + 2], length[t + 3] = sum_a, sum_b, sum_c, sum_d
        for t in range(first, first + PANEL):
            finite = length[t] < np.inf
            least[t] = (0 if finite else _TWO) if t < num else FAR
            # By this, tokens are multiplied; 0 is for those that become zeros.
            usable = t < num and finite and length[t] > 0
            length[t] = 1 / np.sqrt(length[t]) if usable else 0
        for k in range(dim):
            _scale(panels[start + k * PANEL :], length[first:])


@compiled_lean
def _scale(row: Floats, factor: Floats) -> None:
    for t in range(PANEL):
        unit = np.float32(row[t] * factor[t])
        row[t] = unit if factor[t] > 0 else np.float32(0)  # NaN times 0 would not be 0


@compiled_lean
def fill(
    dim: int, panels: Floats, least: Integers, near: Integers, share: int, shares: int
) -> None:
    """The distances of all pairs, from what `arrange` gives.

    Args:
        dim: how many features a token has.
        panels: see `arrange`.
        least: see `arrange`.
        near: is filled: [`rows_for` tokens, `stride_for` tokens], int32.
        share: which of the shares of this work to do.
        shares: how many there are.
    """
    rows, stride = near.shape
    for top in range(share * PANEL, rows, shares * PANEL):
        for left in range(top, rows, PANEL):
            for r in range(0, PANEL, ROWS):
                for c in range(0, PANEL, COLUMNS):
                    one, other = top * dim + r, left * dim + c
                    products(panels, one, other, dim, least, near, top + r, left + c, stride)
        for r in range(top, top + PANEL):
            near[r, r] = FAR
