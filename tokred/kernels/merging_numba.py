"""Merging tokens, and copying them back, on the CPU, compiled by numba: one pass over the tokens.

With tensors, merging takes some twenty operators, each of which writes all tokens or an index for
each of them; at small batches these cost more than the merging. Here the sequence that a block goes
on with is written once: prefix tokens, means of merged tokens, suffix tokens. Sums are float32 also
where tokens are bfloat16, and every sum has the order of its tokens. So an image gets the same bits
alone and in any batch, on any number of threads. numba must be installed to import this module.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tokred.kernels.compiling import (
    compiled,
    compiled_fused,
    compiled_parallel,
    running,
    threads_for,
)

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

# The number of values on which a thread works about as long as it takes to wake another thread.
_VALUES_PER_THREAD = 2**17


def merge(
    x: Float[Tensor, "batch tokens dim"],
    index: Int[Tensor, "batch fine"],
    num_coarse: int,
    size: Float[Tensor, "batch fine"] | None = None,
    share: Float[Tensor, "batch fine"] | None = None,
    prefix: int = 0,
) -> tuple[
    Float[Tensor, "batch fewer dim"],
    Float[Tensor, "batch coarse"],
    Float[Tensor, "batch fewer"],
]:
    """The sequence with merged tokens in place of its patch tokens; how many original tokens each
    of these stands for; and the logarithms of that, 0 for all other tokens.

    Args:
        x: float32 or bfloat16 on the CPU, dim contiguous: `prefix` tokens that stay, the patch
            tokens, and perhaps others that stay.
        index: the coarse token that each patch token joins, in [0, num_coarse). Each has a member.
        num_coarse: how many coarse tokens there are.
        size: how many original tokens each patch token stands for, float32; 1 if not given.
        share: the part of each patch token that goes into its coarse one, float32; its share of the
            size if not given.
        prefix: how many tokens stand before the patch tokens.
    """
    batch, tokens, dim = x.shape
    fine = index.shape[1]
    fewer = tokens - fine + num_coarse
    out = x.new_empty(batch, fewer, dim)
    total = torch.empty(batch, num_coarse)
    log = torch.empty(batch, fewer)
    none = torch.empty(0, 0)
    arguments = (
        _flat(x),
        (x.stride(0), x.stride(1)),
        index.contiguous().numpy(),
        (none if size is None else size.float().contiguous()).numpy(),
        (none if share is None else share.float().contiguous()).numpy(),
        prefix,
        _bits(out),
        total.numpy(),
        log.numpy(),
    )
    threads = _threads(batch, out.numel() + x.numel())
    if threads == 1:
        _merge_share(0, 1, *arguments)
    else:
        with running(threads):
            _merge_shares(threads, *arguments)
    return out, total, log


def pick(
    x: Float[Tensor, "batch tokens dim"],
    index: Int[Tensor, "batch chosen"],
    patches: int,
    prefix: int = 0,
) -> Float[Tensor, "batch new dim"]:
    """The sequence with the patch tokens at `index` in place of all of them: copies, and any number
    of each.

    Args:
        x: of 2 or 4 bytes, on the CPU, dim contiguous.
        index: in [0, patches).
        patches: how many patch tokens there are.
        prefix: how many tokens stand before them.
    """
    batch, tokens, dim = x.shape
    out = x.new_empty(batch, tokens - patches + index.shape[1], dim)
    arguments = (
        _flat(x),
        (x.stride(0), x.stride(1)),
        index.contiguous().numpy(),
        tokens - patches,
        prefix,
        _bits(out),
    )
    threads = _threads(batch, out.numel())
    if threads == 1:
        _pick_share(0, 1, *arguments)
    else:
        with running(threads):
            _pick_shares(threads, *arguments)
    return out


def _bits(x: Tensor) -> Integers:
    """The same memory as integers: NumPy has no bfloat16."""
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16).numpy()


def _flat(x: Tensor) -> Integers:
    """The memory from the first entry to the last, of which rows can be told to be contiguous."""
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return _bits(x.as_strided((extent,), (1,)))


def _threads(batch: int, values: int) -> int:
    return threads_for(min(batch, values // _VALUES_PER_THREAD))


@compiled_parallel
def _merge_shares(
    shares: int,
    x: Integers,
    steps: tuple[int, int],
    index: Integers,
    size: Floats,
    share_of: Floats,
    prefix: int,
    out: Integers,
    total: Floats,
    log: Floats,
) -> None:
    for share in numba.prange(shares):
        _merge_share(share, shares, x, steps, index, size, share_of, prefix, out, total, log)


@compiled
def _merge_share(
    share: int,
    shares: int,
    x: Integers,
    steps: tuple[int, int],
    index: Integers,
    size: Floats,
    share_of: Floats,
    prefix: int,
    out: Integers,
    total: Floats,
    log: Floats,
) -> None:
    """The samples `share`, `share + shares`, ..."""
    fine, coarse, dim = index.shape[1], total.shape[1], out.shape[2]
    sized, shared = size.size > 0, share_of.size > 0
    start = np.empty(coarse + 1, np.int64)
    member = np.empty(fine, np.int64)
    sums, row_bits = np.empty(dim, np.float32), np.empty(dim, np.int32)
    for sample in range(share, index.shape[0], shares):
        _group(index[sample], start, member)
        here = sample * steps[0]
        patches = here + prefix * steps[1]
        for row in range(prefix):
            _copy(x, here + row * steps[1], out[sample, row])
            log[sample, row] = 0
        for row in range(prefix + coarse, out.shape[1]):
            _copy(x, here + (row - coarse + fine) * steps[1], out[sample, row])
            log[sample, row] = 0
        for k in range(coarse):
            first, end = start[k], start[k + 1]
            whole = np.float32(0)
            for at in range(first, end):
                whole += size[sample, member[at]] if sized else np.float32(1)
            total[sample, k] = whole
            log[sample, prefix + k] = np.float32(0) if whole == 1 else np.log(whole)
            target = out[sample, prefix + k]
            if end - first == 1 and not shared:
                _copy(x, patches + member[first] * steps[1], target)
                continue
            for at in range(first, end):
                n = member[at]
                if shared:
                    weight = share_of[sample, n]
                else:
                    weight = (size[sample, n] if sized else np.float32(1)) / whole
                token = patches + n * steps[1]
                _add(x[token : token + dim], weight, sums, row_bits, at > first)
            _round(sums, target)


@compiled
def _group(index: Integers, start: Integers, member: Integers) -> None:
    """The tokens by what they join, in rising order: those of `k` from `start[k]` on."""
    coarse = start.shape[0] - 1
    for k in range(coarse + 1):
        start[k] = 0
    for n in range(index.shape[0]):
        start[index[n] + 1] += 1
    for k in range(coarse):
        start[k + 1] += start[k]
    # Filled from the front; behind it, every start is that of the next one.
    for n in range(index.shape[0]):
        k = index[n]
        member[start[k]] = n
        start[k] += 1
    for k in range(coarse, 0, -1):
        start[k] = start[k - 1]
    start[0] = 0


@compiled_parallel
def _pick_shares(
    shares: int,
    x: Integers,
    steps: tuple[int, int],
    index: Integers,
    others: int,
    prefix: int,
    out: Integers,
) -> None:
    for share in numba.prange(shares):
        _pick_share(share, shares, x, steps, index, others, prefix, out)


@compiled
def _pick_share(
    share: int,
    shares: int,
    x: Integers,
    steps: tuple[int, int],
    index: Integers,
    others: int,
    prefix: int,
    out: Integers,
) -> None:
    """The samples `share`, `share + shares`, ..."""
    chosen, behind = index.shape[1], steps[0] // steps[1] - others + prefix
    for sample in range(share, index.shape[0], shares):
        first = sample * steps[0]
        for row in range(out.shape[1]):
            source = row
            if prefix <= row < prefix + chosen:
                source = prefix + index[sample, row - prefix]
            elif row >= prefix:
                source = behind + row - prefix - chosen
            _copy(x, first + source * steps[1], out[sample, row])


@compiled
def _copy(x: Integers, start: int, target: Integers) -> None:
    source = x[start : start + target.shape[0]]
    for c in range(target.shape[0]):
        target[c] = source[c]


@compiled_fused
def _add(source: Integers, weight: float, sums: Floats, row: Integers, more: bool) -> None:
    """Adds a weighted token to `sums`, or begins with it."""
    shift = np.int32(0 if source.itemsize == 4 else 16)
    for c in range(row.shape[0]):
        row[c] = np.int32(source[c]) << shift
    values = row.view(np.float32)
    if more:
        for c in range(row.shape[0]):
            sums[c] += weight * values[c]
    else:
        for c in range(row.shape[0]):
            sums[c] = weight * values[c]


@compiled
def _round(sums: Floats, target: Integers) -> None:
    """Writes `sums` in the form of the tokens: as they are, or as the nearest bfloat16 (of two that
    are as near, the even one)."""
    bits = sums.view(np.int32)
    if target.itemsize == 4:
        for c in range(bits.shape[0]):
            target[c] = bits[c]
    else:
        for c in range(bits.shape[0]):
            there = bits[c]
            near = (there + 0x7FFF + ((there >> 16) & 1)) >> 16
            target[c] = 0x7FC0 if (there & 0x7FFFFFFF) > 0x7F800000 else near
