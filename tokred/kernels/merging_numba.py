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
from tokred.kernels.pointers_numba import float32, int16, int64

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
    Float[Tensor, "batch 1 1 fewer"],
]:
    """The sequence with merged tokens in place of its patch tokens; how many original tokens each
    of these stands for; and the logarithms of that, 0 for all other tokens, as attention takes it.

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
    log = torch.empty(batch, 1, 1, fewer)
    # Named, so that they live as long as the kernel reads them.
    index, size, share = index.contiguous(), _numbers(size), _numbers(share)
    arguments = (
        *(x.data_ptr(), x.stride(0), x.stride(1), x.element_size() == 4),
        *(batch, fine, num_coarse, fewer, dim, prefix),
        index.data_ptr(),
        0 if size is None else size.data_ptr(),
        0 if share is None else share.data_ptr(),
        *(out.data_ptr(), total.data_ptr(), log.data_ptr()),
    )
    threads = _threads(batch, batch * (tokens + fewer) * dim)
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
    chosen = index.shape[1]
    out = x.new_empty(batch, tokens - patches + chosen, dim)
    index = index.contiguous()
    arguments = (
        *(x.data_ptr(), x.stride(0), x.stride(1), x.element_size() == 4),
        *(batch, tokens, patches, chosen, dim, prefix),
        *(index.data_ptr(), out.data_ptr()),
    )
    threads = _threads(batch, batch * out.shape[1] * dim)
    if threads == 1:
        _pick_share(0, 1, *arguments)
    else:
        with running(threads):
            _pick_shares(threads, *arguments)
    return out


def _numbers(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _threads(batch: int, values: int) -> int:
    return threads_for(min(batch, values // _VALUES_PER_THREAD))


@compiled_parallel
def _merge_shares(
    shares: int,
    x: int,
    to_sample: int,
    to_token: int,
    single: bool,
    batch: int,
    fine: int,
    coarse: int,
    fewer: int,
    dim: int,
    prefix: int,
    index: int,
    size: int,
    share_of: int,
    out: int,
    total: int,
    log: int,
) -> None:
    for share in numba.prange(shares):
        _merge_share(
            share,
            shares,
            x,
            to_sample,
            to_token,
            single,
            batch,
            fine,
            coarse,
            fewer,
            dim,
            prefix,
            index,
            size,
            share_of,
            out,
            total,
            log,
        )


@compiled
def _merge_share(
    share: int,
    shares: int,
    x: int,
    to_sample: int,
    to_token: int,
    single: bool,
    batch: int,
    fine: int,
    coarse: int,
    fewer: int,
    dim: int,
    prefix: int,
    index: int,
    size: int,
    share_of: int,
    out: int,
    total: int,
    log: int,
) -> None:
    """The samples `share`, `share + shares`, ... Tensors are given by their addresses; `single`
    tells float32 from bfloat16."""
    halves = 2 if single else 1
    extent = (batch - 1) * to_sample + (fewer - coarse + fine - 1) * to_token + dim
    source, values = int16(x, halves * extent), float32(x, extent if single else 0)
    target = int16(out, halves * batch * fewer * dim)
    joins = int64(index, batch * fine)
    totals, logs = float32(total, batch * coarse), float32(log, batch * fewer)
    sizes = float32(size, 0 if size == 0 else batch * fine)
    parts = float32(share_of, 0 if share_of == 0 else batch * fine)
    start, member = np.empty(coarse + 1, np.int64), np.empty(fine, np.int64)
    sums, row_bits = np.empty(dim, np.float32), np.empty(dim, np.int32)
    row = halves * dim
    for sample in range(share, batch, shares):
        _group(joins[sample * fine : (sample + 1) * fine], start, member)
        here, there, of_fine = sample * to_sample, sample * fewer, sample * fine
        patches = here + prefix * to_token
        for n in range(fewer):
            if n < prefix or n >= prefix + coarse:
                token = here + (n if n < prefix else n - coarse + fine) * to_token
                _copy(source, halves * token, target, row * (there + n), row)
                logs[there + n] = 0
        for k in range(coarse):
            first, end = start[k], start[k + 1]
            whole = np.float32(0)
            for at in range(first, end):
                whole += sizes[of_fine + member[at]] if size != 0 else np.float32(1)
            totals[sample * coarse + k] = whole
            n = there + prefix + k
            logs[n] = np.float32(0) if whole == 1 else np.log(whole)
            if end - first == 1 and share_of == 0:
                token = patches + member[first] * to_token
                _copy(source, halves * token, target, row * n, row)
                continue
            for at in range(first, end):
                if share_of != 0:
                    weight = parts[of_fine + member[at]]
                else:
                    own = sizes[of_fine + member[at]] if size != 0 else np.float32(1)
                    weight = own / whole
                token = patches + member[at] * to_token
                if single:
                    _add(values[token : token + dim], weight, sums, at > first)
                else:
                    _widen(source[token : token + dim], row_bits)
                    _add(row_bits.view(np.float32), weight, sums, at > first)
            if single:
                _copy(sums.view(np.int16), 0, target, row * n, row)
            else:
                _round(sums, target[row * n : row * (n + 1)])


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
    x: int,
    to_sample: int,
    to_token: int,
    single: bool,
    batch: int,
    tokens: int,
    patches: int,
    chosen: int,
    dim: int,
    prefix: int,
    index: int,
    out: int,
) -> None:
    for share in numba.prange(shares):
        _pick_share(
            share,
            shares,
            x,
            to_sample,
            to_token,
            single,
            batch,
            tokens,
            patches,
            chosen,
            dim,
            prefix,
            index,
            out,
        )


@compiled
def _pick_share(
    share: int,
    shares: int,
    x: int,
    to_sample: int,
    to_token: int,
    single: bool,
    batch: int,
    tokens: int,
    patches: int,
    chosen: int,
    dim: int,
    prefix: int,
    index: int,
    out: int,
) -> None:
    """The samples `share`, `share + shares`, ... Tensors are given by their addresses; `single`
    tells 4 bytes from 2."""
    halves, new = 2 if single else 1, tokens - patches + chosen
    source = int16(x, halves * ((batch - 1) * to_sample + (tokens - 1) * to_token + dim))
    target, wanted = int16(out, halves * batch * new * dim), int64(index, batch * chosen)
    row = halves * dim
    for sample in range(share, batch, shares):
        here = sample * to_sample
        for n in range(new):
            token = n
            if prefix <= n < prefix + chosen:
                token = prefix + wanted[sample * chosen + n - prefix]
            elif n >= prefix:
                token = n - chosen + patches
            at = halves * (here + token * to_token)
            _copy(source, at, target, row * (sample * new + n), row)


@compiled
def _copy(source: Integers, start: int, target: Integers, begin: int, num: int) -> None:
    old, new = source[start : start + num], target[begin : begin + num]
    for c in range(num):
        new[c] = old[c]


@compiled_fused
def _add(values: Floats, weight: float, sums: Floats, more: bool) -> None:
    """Adds a weighted token to `sums`, or begins with it."""
    if more:
        for c in range(sums.shape[0]):
            sums[c] += weight * values[c]
    else:
        for c in range(sums.shape[0]):
            sums[c] = weight * values[c]


@compiled
def _widen(halves: Integers, bits: Integers) -> None:
    """The bits of float32 numbers that are bfloat16."""
    for c in range(bits.shape[0]):
        bits[c] = np.int32(halves[c]) << np.int32(16)


@compiled
def _round(sums: Floats, target: Integers) -> None:
    """Writes `sums` as the nearest bfloat16; of two that are as near, the even one."""
    bits = sums.view(np.int32)
    for c in range(bits.shape[0]):
        there = bits[c]
        near = (there + 0x7FFF + ((there >> 16) & 1)) >> 16
        target[c] = 0x7FC0 if (there & 0x7FFFFFFF) > 0x7F800000 else near
