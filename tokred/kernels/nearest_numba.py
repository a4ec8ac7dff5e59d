"""The most similar of some tokens for every other token, on the CPU: exact, without all products in
float32.

A product of 8-bit integers gives all cosines roughly. Processors that have instructions for it
compute it several times as fast as one in float32, and without rounding, so that neither threads
nor the batch make a difference. How much rounding has taken away from each token is known, and so
(by Cauchy and Schwarz) how far each rough cosine may be off. Most destinations cannot be the most
similar one; the cosines of those that can, two or three of a thousand, are computed in float32.

Tokens of one image have much in common. What is rounded is what is left of a token when the mean of
the destinations is subtracted: cosines of a source with all destinations change by the same number.

numba must be installed to import this module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tokred.kernels.compiling import (
    compiled,
    compiled_parallel,
    compiled_sums,
    running,
    threads_for,
)
from tokred.kernels.scratch import scratch

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

# Tokens are rounded to whole numbers in [-127, 127].
_LARGEST = np.float32(127)

# So many products are made at a time: they stay in the cache.
_PRODUCTS = 2**20

# Destinations that are looked through together; their number is rounded up to a multiple of it.
_TOGETHER = 64

# Added to bounds, which are in [-4, 4], so that all are positive: numbers that are not negative
# rank as the integers of the same bits, and maxima of integers are vectorised, those of floats are
# not (because of NaN).
_ABOVE_ZERO = np.float32(8)

# The norm below which a token counts as zeros, as in torch.nn.functional.normalize.
_TINY = np.float32(1e-12)

# The number of sources on which a thread works about as long as it takes to wake another thread.
_SOURCES_PER_THREAD = 64


@cache
def fast() -> bool:
    """Whether the processor has instructions for products of 8-bit integers. (Those that do not may
    also cut sums off.)"""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return known is not None and known() and hasattr(torch, "_int_mm")


def most_similar(
    x: Float[Tensor, "batch tokens dim"],
    sources: Int[Tensor, " sources"],
    destinations: Int[Tensor, " destinations"],
) -> tuple[Float[Tensor, "batch sources"], Int[Tensor, "batch sources"]]:
    """For every source, its highest cosine with a destination, in float32, and the number of that
    destination among `destinations`. Of equals it is the first.

    Args:
        x: float32, float16 or bfloat16, on the CPU.
        sources: indices of tokens.
        destinations: indices of tokens.
    """
    x = x.detach().contiguous()
    if x.dtype == torch.float16:
        x = x.float()
    tokens = x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
    batch, _, dim = tokens.shape
    of, to = sources.numpy(), destinations.numpy()
    padded = -(-len(to) // _TOGETHER) * _TOGETHER
    unit = scratch("unit", (batch, len(to), dim), np.float32)
    mean = scratch("mean", (batch, dim), np.float32)
    rounded_of = scratch("rounded_of", (batch, len(of), dim), np.int8)
    rounded_to = scratch("rounded_to", (batch, padded, dim), np.int8)
    about_of = scratch("about_of", (batch, len(of), 3), np.float32)
    about_to = scratch("about_to", (batch, 4, padded), np.float32)
    _in_shares(batch, _round_destinations, tokens, to, unit, mean, rounded_to, about_to)
    shares = batch * len(of) // _SOURCES_PER_THREAD
    _in_shares(shares, _round_sources, tokens, of, mean, rounded_of, about_of)

    similarity = np.empty((batch, len(of)), np.float32)
    partner = np.empty((batch, len(of)), np.int64)
    rows = max(_SOURCES_PER_THREAD, _PRODUCTS // padded)
    products = scratch("products", (min(rows, len(of)), padded), np.int32)
    # Sums of roundings, and of what the sums of a cosine in float32 may be off.
    slack = 4e-6 + 3e-8 * dim
    for image in range(batch):
        transposed = torch.from_numpy(rounded_to[image]).t()
        for start in range(0, len(of), rows):
            some = slice(start, start + rows)
            part = torch.from_numpy(rounded_of[image, some])
            torch._int_mm(part, transposed, out=torch.from_numpy(products[: len(part)]))
            _in_shares(
                len(part) // _SOURCES_PER_THREAD, _choose,
                tokens[image], of[some], unit[image], about_of[image, some], about_to[image],
                products, slack, similarity[image, some], partner[image, some],
            )  # fmt: skip
    return torch.from_numpy(similarity), torch.from_numpy(partner)


def _in_shares(most: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs `work(share, shares, *arguments)` for every share, on up to `most` threads."""
    threads = threads_for(most)
    if threads == 1:
        work(0, 1, *arguments)
    else:
        with running(threads):
            _PARALLEL[work](threads, *arguments)


@compiled
def _round_destinations(
    share: int,
    shares: int,
    tokens: Any,
    to: Integers,
    unit: Floats,
    mean: Floats,
    rounded: Integers,
    about: Floats,
) -> None:
    """For the images `share`, `share + shares`, ...: the destinations at length 1, their mean, and
    what is left of them, rounded.

    `about` has, for every destination, what `_round` returns, and the cosine with the mean.
    """
    few, dim = len(to), tokens.shape[2]
    left = np.empty(dim, np.float32)
    for image in range(share, len(tokens), shares):
        mean[image] = 0
        for j in range(few):
            _normalise(tokens[image, to[j]], unit[image, j])
            for c in range(dim):
                mean[image, c] += unit[image, j, c]
        for c in range(dim):
            mean[image, c] /= np.float32(few)
        for j in range(few):
            for c in range(dim):
                left[c] = unit[image, j, c] - mean[image, c]
            about[image, 0, j], about[image, 1, j], about[image, 2, j] = _round(
                left, rounded[image, j]
            )
            about[image, 3, j] = _dot(unit[image, j], mean[image]) + _ABOVE_ZERO
        # No destinations, and so less similar than any.
        about[image, :, few:] = 0
        rounded[image, few:] = 0


@compiled
def _round_sources(
    share: int,
    shares: int,
    tokens: Any,
    of: Integers,
    mean: Floats,
    rounded: Integers,
    about: Floats,
) -> None:
    """What is left of the sources `share`, `share + shares`, ... of every image, rounded. `about`
    has for each what `_round` returns."""
    left = np.empty(tokens.shape[2], np.float32)
    for image in range(len(tokens)):
        for i in range(share, len(of), shares):
            _normalise(tokens[image, of[i]], left)
            for c in range(len(left)):
                left[c] -= mean[image, c]
            about[image, i, 0], about[image, i, 1], about[image, i, 2] = _round(
                left, rounded[image, i]
            )


@compiled
def _choose(
    share: int,
    shares: int,
    tokens: Any,
    of: Integers,
    unit: Floats,
    about_of: Floats,
    about_to: Floats,
    products: Integers,
    slack: float,
    similarity: Floats,
    partner: Integers,
) -> None:
    """For the sources `share`, `share + shares`, ... of an image: the most similar destination."""
    few, padded = len(unit), products.shape[1]
    token = np.empty(tokens.shape[1], np.float32)
    # The lowest and the highest that each cosine may be.
    low, high = np.empty(padded, np.float32), np.empty(padded, np.float32)
    low_bits, high_bits = low.view(np.int32), high.view(np.int32)
    for i in range(share, len(of), shares):
        _bound(products[i], about_of[i], about_to, np.float32(slack), low, high)
        least = _highest(low_bits)
        _normalise(tokens[of[i]], token)
        best, at = np.float32(-np.inf), 0
        for start in range(0, few, _TOGETHER):
            if _any_from(least, high_bits[start : start + _TOGETHER]):
                for j in range(start, min(start + _TOGETHER, few)):
                    if high_bits[j] >= least:
                        cosine = _dot(token, unit[j])
                        if cosine > best:
                            best, at = cosine, j
        similarity[i] = best
        partner[i] = at


@compiled
def _bound(
    products: Integers,
    source: Floats,
    about: Floats,
    slack: float,
    low: Floats,
    high: Floats,
) -> None:
    """Between what its cosines with all destinations are, less its cosine with their mean, and plus
    `_ABOVE_ZERO`."""
    step, norm, lost = source
    norm += lost  # of the rounded source, at most
    for j in range(len(products)):
        near = np.float32(products[j]) * (step * about[0, j]) + about[3, j]
        off = lost * about[1, j] + norm * about[2, j] + slack
        low[j] = near - off
        high[j] = near + off


@compiled_sums
def _round(token: Floats, rounded: Integers) -> Any:
    """Rounds a token to whole numbers of some step. Returns the step, the norm of the token, and
    the norm of what rounding has taken away."""
    largest = np.float32(0)
    for c in range(len(token)):
        largest = max(largest, abs(token[c]))
    step = largest / _LARGEST
    if not 0 < step < np.inf:
        rounded[:] = 0
        return np.float32(0), np.float32(0), np.float32(0)
    per_step = _LARGEST / largest
    norm, lost = np.float32(0), np.float32(0)
    for c in range(len(token)):
        number = np.rint(token[c] * per_step)
        rounded[c] = np.int8(number)
        difference = token[c] - number * step
        norm += token[c] * token[c]
        lost += difference * difference
    return step, np.sqrt(norm), np.sqrt(lost)


@compiled
def _normalise(token: Any, out: Floats) -> None:
    """A token at length 1, in float32. bfloat16 comes as integers of the same bits."""
    if token.itemsize == 2:
        bits = out.view(np.int32)
        for c in range(len(token)):
            bits[c] = np.int32(token[c]) << 16
    else:
        for c in range(len(token)):
            out[c] = token[c]
    factor = np.float32(1) / max(np.sqrt(_dot(out, out)), _TINY)
    for c in range(len(token)):
        out[c] *= factor


@compiled_sums
def _dot(a: Floats, b: Floats) -> Any:
    total = np.float32(0)
    for c in range(len(a)):
        total += a[c] * b[c]
    return total


@compiled
def _highest(bits: Integers) -> Any:
    highest = bits[0]
    for j in range(len(bits)):
        highest = max(highest, bits[j])
    return highest


@compiled
def _any_from(least: int, bits: Integers) -> bool:
    found = 0
    for j in range(len(bits)):
        found += bits[j] >= least
    return found > 0


@compiled_parallel
def _round_all_destinations(
    shares: int,
    tokens: Any,
    to: Integers,
    unit: Floats,
    mean: Floats,
    rounded: Integers,
    about: Floats,
) -> None:
    for share in numba.prange(shares):
        _round_destinations(share, shares, tokens, to, unit, mean, rounded, about)


@compiled_parallel
def _round_all_sources(
    shares: int,
    tokens: Any,
    of: Integers,
    mean: Floats,
    rounded: Integers,
    about: Floats,
) -> None:
    for share in numba.prange(shares):
        _round_sources(share, shares, tokens, of, mean, rounded, about)


@compiled_parallel
def _choose_for_all(
    shares: int,
    tokens: Any,
    of: Integers,
    unit: Floats,
    about_of: Floats,
    about_to: Floats,
    products: Integers,
    slack: float,
    similarity: Floats,
    partner: Integers,
) -> None:
    for share in numba.prange(shares):
        _choose(
            share, shares, tokens, of, unit, about_of, about_to, products, slack, similarity,
            partner,
        )  # fmt: skip


_PARALLEL: dict[Callable[..., None], Callable[..., None]] = {
    _round_destinations: _round_all_destinations,
    _round_sources: _round_all_sources,
    _choose: _choose_for_all,
}
"""All shares of a work, each on a thread of its own."""
