"""Bipartite soft matching (ToMe) on the CPU, compiled by numba: from the keys of attention to the
group of every token, all rounds in one call.

With tensors, one matching takes some forty operators on small tensors. At batch 1 they take several
times as long as the products. Cosines are float32 sums in the order of the channels, so that an
image gets the same ones alone and in any batch, on any number of threads. Where products are large,
libraries are faster at them: there `tokred.reducers.tome` makes them, and only asks `strongest`.
numba must be installed to import this module.
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

# The number of multiply-adds on which a thread works longer than another takes to wake.
_PRODUCTS_PER_THREAD = 2**19


def match(
    key: Float[Tensor, "batch heads tokens head_dim"],
    keep: int,
    before: int = 0,
    size: Float[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Matches and merges until `keep` tokens are left, at most half of them at a time. Tokens are
    compared by the cosine of their keys, summed over heads.

    Args:
        key: float32 or bfloat16 on the CPU; head_dim contiguous.
        keep: how many tokens shall be left, in [1, tokens].
        before: how many tokens stand in front, see `tokred.reducers.tome.match`.
        size: how many original tokens each token stands for, float32; 1 if not given. Only used if
            it takes more than one round.

    Returns:
        The group of every token, int64; groups are numbered in the order of their first tokens.
    """
    batch, heads, num, dim = key.shape
    labels = torch.empty(batch, num, dtype=torch.int64)
    counts = None if size is None else size.float().contiguous()
    arguments = (
        *(key.data_ptr(), key.stride(0), key.stride(1), key.stride(2), key.element_size() == 4),
        *(batch, heads, num, dim),
        0 if counts is None else counts.data_ptr(),
        *(keep, before % 2, labels.data_ptr()),
    )
    threads = threads_for(min(batch, batch * num * num * dim // 4 // _PRODUCTS_PER_THREAD))
    if threads == 1:
        _match_share(0, 1, *arguments)
    else:
        with running(threads):
            _match_shares(threads, *arguments)
    return labels


def strongest(
    similarity: Float[Tensor, "batch a"],
    partner: Int[Tensor, "batch a"],
    merges: int,
    even: int,
    num: int,
) -> Int[Tensor, "batch tokens"]:
    """The group of every token, if the `merges` strongest proposals are made. Ties go to the lower
    index. Groups are numbered in the order of their first tokens.

    Args:
        similarity: of the proposal of each token of set A, float32.
        partner: the token of set B that it is made to, counted in B.
        merges: how many tokens to remove, in [0, a].
        even: where the first token of A stands, 0 or 1; B begins with the other one.
        num: how many tokens there are.
    """
    labels = np.empty((len(similarity), num), np.int64)
    _strongest(similarity.numpy(), partner.numpy(), merges, even, labels)
    return torch.from_numpy(labels)


@compiled_parallel
def _match_shares(
    shares: int,
    key: int,
    to_sample: int,
    to_head: int,
    to_token: int,
    single: bool,
    batch: int,
    heads: int,
    whole: int,
    dim: int,
    size: int,
    keep: int,
    even: int,
    labels: int,
) -> None:
    for share in numba.prange(shares):
        _match_share(
            share,
            shares,
            key,
            to_sample,
            to_head,
            to_token,
            single,
            batch,
            heads,
            whole,
            dim,
            size,
            keep,
            even,
            labels,
        )


@compiled
def _match_share(
    share: int,
    shares: int,
    key: int,
    to_sample: int,
    to_head: int,
    to_token: int,
    single: bool,
    batch: int,
    heads: int,
    whole: int,
    dim: int,
    size: int,
    keep: int,
    even: int,
    labels: int,
) -> None:
    """The samples `share`, `share + shares`, ... Tensors are given by their addresses; `single`
    tells float32 from bfloat16."""
    extent = (batch - 1) * to_sample + (heads - 1) * to_head + (whole - 1) * to_token + dim
    values, halves = float32(key, extent if single else 0), int16(key, 0 if single else extent)
    sizes, groups = float32(size, 0 if size == 0 else batch * whole), int64(labels, batch * whole)
    metric, counts = np.empty((whole, dim), np.float32), np.ones(whole, np.float32)
    half, channels = (whole + 1) // 2, (dim + 3) // 4 * 4
    # Whole vectors of sixteen: what is left of one would take as long as several.
    source = np.zeros((half, channels), np.float32)
    target = np.zeros((channels, (half + 15) // 16 * 16), np.float32)
    rank, partner = np.empty(half, np.int32), np.empty(half, np.int64)
    once, parts = np.empty(whole, np.int64), np.empty(16, np.float32)
    for sample in range(share, batch, shares):
        label, num = groups[sample * whole : (sample + 1) * whole], whole
        here = sample * to_sample
        if single:
            _sum_heads(values, here, heads, to_head, to_token, metric)
        else:
            _sum_wide_heads(halves, here, heads, to_head, to_token, metric)
        for n in range(whole):
            counts[n] = sizes[sample * whole + n] if size != 0 else np.float32(1)
            label[n] = n
        while num > keep:
            merges = min(num - keep, num // 2)
            odd = 1 - even
            of_a, of_b = (num + odd) // 2, (num + even) // 2
            for n in range(num):
                inverse = 1 / max(_length(metric[n], parts), np.float32(1e-12))
                if n % 2 == even:
                    for c in range(dim):
                        source[n // 2, c] = metric[n, c] * inverse
                else:
                    for c in range(dim):
                        target[c, n // 2] = metric[n, c] * inverse
            _propose(source, target, of_a, of_b, rank, partner)
            _group(rank, partner, merges, even, once[:num])
            if num - merges > keep:
                _means(metric, counts, once[:num], num - merges)
            for n in range(whole):
                label[n] = once[label[n]]
            num -= merges


@compiled
def _sum_heads(
    key: Floats, here: int, heads: int, to_head: int, to_token: int, metric: Floats
) -> None:
    """The sum of the heads of every token. (Their mean has the same cosines.)"""
    dim = metric.shape[1]
    for n in range(metric.shape[0]):
        total = metric[n]
        for c in range(dim):
            total[c] = 0
        for head in range(heads):
            start = here + n * to_token + head * to_head
            own = key[start : start + dim]
            for c in range(dim):
                total[c] += own[c]


@compiled
def _sum_wide_heads(
    key: Integers, here: int, heads: int, to_head: int, to_token: int, metric: Floats
) -> None:
    """The same of bfloat16."""
    dim = metric.shape[1]
    bits = np.empty(dim, np.int32)
    values = bits.view(np.float32)
    for n in range(metric.shape[0]):
        total = metric[n]
        for c in range(dim):
            total[c] = 0
        for head in range(heads):
            start = here + n * to_token + head * to_head
            own = key[start : start + dim]
            for c in range(dim):
                bits[c] = np.int32(own[c]) << np.int32(16)
            for c in range(dim):
                total[c] += values[c]


@compiled_fused
def _length(row: Floats, parts: Floats) -> float:
    """The square root of the sum of squares, in sixteen parts that are added up at the end."""
    for c in range(16):
        parts[c] = 0
    whole = row.shape[0] // 16 * 16
    for start in range(0, whole, 16):
        for c in range(16):
            parts[c] += row[start + c] * row[start + c]
    for c in range(whole, row.shape[0]):
        parts[0] += row[c] * row[c]
    total = np.float32(0)
    for c in range(16):
        total += parts[c]
    return np.sqrt(total)


@compiled
def _propose(
    source: Floats, target: Floats, of_a: int, of_b: int, rank: Integers, partner: Integers
) -> None:
    """For every token of A, its most similar token of B, the first of equals; and its similarity,
    as an integer that ranks like it."""
    columns = (of_b + 15) // 16 * 16
    products = np.empty(2 * columns, np.float32)
    bits = products.view(np.int32)
    nowhere = np.int32(of_b)
    for start in range(0, of_a, 2):
        # Behind the last row of an odd number, it is done again.
        _two_rows(source[start], source[min(start + 1, of_a - 1)], target, products, columns)
        for row in range(min(2, of_a - start)):
            own = bits[row * columns : row * columns + of_b]
            most = np.int32(-0x80000000)
            for j in range(of_b):
                own[j] = _ranked(own[j])
            for j in range(of_b):
                most = max(most, own[j])
            found = nowhere
            for j in range(of_b):
                found = min(found, np.int32(j) if own[j] == most else nowhere)
            rank[start + row], partner[start + row] = most, found


@compiled_fused
def _two_rows(one: Floats, other: Floats, target: Floats, products: Floats, columns: int) -> None:
    """Two rows of products: sums of multiples of the rows of `target`, four of those at a time
    (there is a multiple of four).

    In one array each, with unsigned indices, which need not be tried for negative ones: for more
    arrays, compilers do not vectorise.
    """
    flat = target.reshape(target.size)
    wide, width = np.uint64(columns), np.uint64(target.shape[1])
    for j in range(products.shape[0]):
        products[j] = 0
    for k in range(0, one.shape[0], 4):
        a = np.uint64(k) * width
        b, c, d = a + width, a + width + width, a + width + width + width
        r, s, t, u = one[k], one[k + 1], one[k + 2], one[k + 3]
        v, w, x, y = other[k], other[k + 1], other[k + 2], other[k + 3]
        for j in range(np.uint64(0), wide):
            first, second, third, fourth = flat[a + j], flat[b + j], flat[c + j], flat[d + j]
            total = products[j] + r * first + s * second
            products[j] = total + t * third + u * fourth
            total = products[wide + j] + v * first + w * second
            products[wide + j] = total + x * third + y * fourth


@compiled
def _ranked(bits: int) -> int:
    """The bits of a float32 as an integer that ranks as it does; -0 as 0, and NaN somewhere."""
    turned = np.int32(bits ^ np.int32(np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))
    return np.int32(0) if turned == -1 else turned


@compiled
def _group(rank: Integers, partner: Integers, merges: int, even: int, label: Integers) -> None:
    """The groups that the `merges` strongest proposals make, numbered by their first tokens."""
    odd, of_a = 1 - even, (label.shape[0] + 1 - even) // 2
    last = _nth(rank, of_a, merges)
    above = 0
    for i in range(of_a):
        above += rank[i] > last
    ties = merges - above
    for n in range(label.shape[0]):
        label[n] = -1
    # First every token's token of B, as -2 - that; then their numbers.
    groups = 0
    number = np.full(label.shape[0], -1, np.int64)
    for n in range(label.shape[0]):
        root = n
        if n % 2 == even:
            i = n // 2
            merged = rank[i] > last
            if rank[i] == last and ties > 0:
                ties -= 1
                merged = True
            if merged:
                root = 2 * partner[i] + odd
        if number[root] < 0:
            number[root] = groups
            groups += 1
        label[n] = number[root]


@compiled
def _nth(rank: Integers, num: int, wanted: int) -> int:
    """The rank of the last of the `wanted` highest, by halving an interval of integers: no sort."""
    low, high = np.int64(-0x80000000), np.int64(0x7FFFFFFF)
    if wanted == 0:
        return high
    while low < high:  # the largest limit that at least `wanted` ranks reach
        middle = low + (high - low + 1) // 2
        limit, count = np.int32(middle), np.int32(0)
        for i in range(num):
            count += np.int32(rank[i] >= limit)
        if count >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@compiled
def _means(metric: Floats, counts: Floats, label: Integers, groups: int) -> None:
    """What tokens are compared by, and how many each stands for, once they are merged. In place: a
    group has no larger number than its first token."""
    num, dim = label.shape[0], metric.shape[1]
    sums, totals = np.zeros((groups, dim), np.float32), np.zeros(groups, np.float32)
    for n in range(num):
        totals[label[n]] += counts[n]
    for n in range(num):
        weight, total = counts[n] / totals[label[n]], sums[label[n]]
        for c in range(dim):
            total[c] += weight * metric[n, c]
    metric[:groups] = sums
    counts[:groups] = totals


@compiled
def _strongest(
    similarity: Floats, partner: Integers, merges: int, even: int, labels: Integers
) -> None:
    of_a = similarity.shape[1]
    rank = np.empty(of_a, np.int32)
    for sample in range(labels.shape[0]):
        bits = similarity[sample].view(np.int32)
        for i in range(of_a):
            rank[i] = _ranked(bits[i])
        _group(rank, partner[sample], merges, even, labels[sample])
