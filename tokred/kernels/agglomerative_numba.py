"""Exact agglomerative clustering on the CPU, compiled by numba: one sample per thread.

Complete and average linkage follow the generic algorithm of Müllner, "Modern hierarchical,
agglomerative clustering algorithms", 2011, https://arxiv.org/abs/1109.2378, section 3.1: every row
remembers its nearest neighbour, or, once that one has merged, a lower bound of its distance. Five
things are done differently, to be fast when only the first merges are wanted:

- It stops when as many clusters are left as asked for.
- Merges are recorded, and a row is brought up to date when it is read next. Writing a column at
  every merge would touch as many cache lines as there are rows and take most of the time; but most
  rows are read only once or twice, and some never.
- A row also remembers a lower bound of its second-nearest distance. If its nearest neighbour
  merges into a cluster that is nearer than that, the row need not be searched again.
- Sums of distances need twice the memory of distances. They are written over the two rows that they
  are the sums of, so that no more memory is needed.
- Average linkage keeps float64 sums of the distances, which are exact, and compares
  sum / (size * size), which is rounded once: the result does not depend on the order of merges.

Single linkage is Prim's minimum spanning tree without its longest edges (section 3.2 there).

Loops are written so that compilers can vectorise them. Distances are not negative, so they can be
compared as integers of the same bits: minima of integers are vectorised, those of floats are not
(because of NaN). numba must be installed to import this module.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tokred.kernels.compiling import compiled, compiled_parallel, running, threads_for
from tokred.kernels.scratch import scratch

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

_CODE = {"single": 0, "complete": 1, "average": 2}

# Positive infinity, as integers of the same bits.
_INFINITE_32 = np.int32(0x7F800000)
_INFINITE_64 = np.int64(0x7FF0000000000000)

# The number of distances on which a thread works about as long as it takes to wake another thread.
_DISTANCES_PER_THREAD = 2**15


def cluster(
    distance: Float[Tensor, "batch tokens tokens"],
    num_clusters: int,
    linkage: str,
    overwrite: bool = False,
) -> Int[Tensor, "batch tokens"]:
    """Merges the closest clusters of every sample until `num_clusters` are left.

    The next merge is always the one with the least (height, first token of one cluster, first token
    of the other); with single linkage, the one with the least (distance, token, later token).
    Samples are divided among at most `torch.get_num_threads()` threads.

    Args:
        distance: float32 on the CPU, in [0, 2], without NaN. Only what is above the diagonal is
            read.
        num_clusters: in [1, tokens].
        linkage: "single", "complete" or "average".
        overwrite: whether the distances may be overwritten. If so, and if they are in a
            `workspace`, they are not copied.

    Returns:
        The cluster of every token, int64; clusters are numbered in the order of their first tokens.
    """
    distance = distance.detach()
    batch, num, _ = distance.shape
    stride = _stride(num)
    in_place = overwrite and distance.stride() == (num * stride, stride, 1)
    if in_place:
        whole = distance.as_strided((batch, num, stride), distance.stride())
    else:
        whole = distance.contiguous()
    samples = whole.numpy()
    labels = np.empty((batch, num), dtype=np.int64)

    worth = batch * num * num // _DISTANCES_PER_THREAD
    threads = threads_for(min(batch, worth))
    near = samples if in_place else scratch("near", (threads, num, stride), np.float32)
    floats = scratch("floats", (threads, 6, stride), np.float64)
    integers = scratch("integers", (threads, 8, stride), np.int32)
    arguments = (num_clusters, _CODE[linkage], in_place, samples, near, floats, integers, labels)
    if threads == 1:
        _cluster_share(0, 1, *arguments)
    else:
        with running(threads):
            _cluster_shares(threads, *arguments)
    return torch.from_numpy(labels)


def workspace(batch: int, num: int) -> Float[Tensor, "batch tokens tokens"]:
    """Memory for distances, float32, on which `cluster` can work without a copy.

    A thread gets the same memory whenever it asks.
    """
    # A copy of few distances stays in a core's own cache, and contiguous products are faster.
    stride = _stride(num) if num >= 512 else num
    return torch.from_numpy(scratch("distance", (batch, num, stride), np.float32))[:, :, :num]


def _stride(num: int) -> int:
    """An odd number of cache lines, so that a column is spread over the whole cache."""
    lines = (num + 15) // 16
    return 16 * (lines + 1 - lines % 2)


@compiled
def _cluster_share(
    share: int,
    shares: int,
    num_clusters: int,
    linkage: int,
    in_place: bool,
    distance: Floats,
    near: Floats,
    floats: Floats,
    integers: Integers,
    labels: Integers,
) -> None:
    """Clusters the samples `share`, `share + shares`, ... in a workspace of its own."""
    for sample in range(share, distance.shape[0], shares):
        if in_place:
            own = near[sample]
            _reflect(own)
        else:
            own = near[share]
            _mirror(distance[sample], own)
        if linkage == 0:
            _cut_spanning_tree(own, num_clusters, integers[share], labels[sample])
        else:
            _merge_closest(
                own, num_clusters, linkage == 2, floats[share], integers[share], labels[sample]
            )


@compiled_parallel
def _cluster_shares(
    shares: int,
    num_clusters: int,
    linkage: int,
    in_place: bool,
    distance: Floats,
    near: Floats,
    floats: Floats,
    integers: Integers,
    labels: Integers,
) -> None:
    """Clusters all samples, every share on a thread of its own."""
    for share in numba.prange(shares):
        _cluster_share(
            share, shares, num_clusters, linkage, in_place, distance, near, floats, integers, labels
        )


# In one piece, although long: every part reads and writes most of the arrays that are named at the
# beginning, and as functions with ten and more arguments they would hide what changes what.
@compiled
def _merge_closest(
    near: Floats,
    num_clusters: int,
    average: bool,
    floats: Floats,
    integers: Integers,
    labels: Integers,
) -> None:
    """Complete and average linkage for one sample: fills `labels` [tokens].

    A cluster is named by its first token. Its row holds, for the cluster of every column, the sum
    (average linkage) or the maximum (complete linkage) of the distances to it; infinity for itself
    and for clusters that were absorbed. The row of a single token is its row of `near`. A row of
    sums needs float64, twice the memory, and takes the rows of two tokens of its cluster: the first
    half is stored in the row of the cluster's first token, the second half in the row of the token
    that was absorbed first.

    Args:
        near: the distances [tokens, stride], float32, those of tokens to themselves infinite; is
            written to.
        floats: workspace [6, stride], float64.
        integers: workspace [8, stride], of which six rows are used, int32.
    """
    num = near.shape[0]
    wide = near.view(np.float64)
    # For each cluster: the distance to the nearest cluster, to the second-nearest, the number of
    # its tokens, and its distance to the cluster that was read last. If `nearest[k]` is -1,
    # `height[k]` is only a lower bound; `second[k]` always is.
    height, second, size, current = floats[0], floats[1], floats[2], floats[3]
    row, other = floats[4], floats[5]
    height_bits, second_bits = height.view(np.int64), second.view(np.int64)
    current_bits = current.view(np.int64)
    nearest, parent, partner, seen = integers[0], integers[1], integers[2], integers[3]
    # The merges so far, of which row k has `seen[k]`.
    into, absorbed = integers[4], integers[5]

    for k in range(num):
        bits = near[k].view(np.int32)
        least = _least_32(bits, num)
        nearest[k] = _find(bits, num, least)
        height[k] = near[k, nearest[k]]
        bits[nearest[k]] = _INFINITE_32
        second_bits_k = _least_32(bits, num)
        bits[nearest[k]] = second_bits_k
        second[k] = near[k, nearest[k]]
        bits[nearest[k]] = least
        parent[k] = k
        partner[k] = -1
        seen[k] = 0
        size[k] = 1

    merges = 0
    least_height = _least_64(height_bits, num)
    while merges < num - num_clusters:
        # The first row of the least height; its nearest neighbour, if known, comes after it.
        i = _find(height_bits, num, least_height)
        j = nearest[i]
        _load(row, near, wide, i, partner[i], num)
        _catch_up(row, into, absorbed, seen[i], merges, average)
        if j >= 0:
            _load(other, near, wide, j, partner[j], num)
            _catch_up(other, into, absorbed, seen[j], merges, average)
            _unite(row, other, num, average)
            into[merges], absorbed[merges] = i, j
            merges += 1
            size[i] += size[j]
            parent[j] = i
            if partner[i] < 0:
                partner[i] = j
        if partner[i] >= 0:
            _store(row, wide, i, partner[i], num)
            seen[i] = merges

        if average:
            _divide(row, size, size[i], current, num)
        else:
            _copy(row, current, num)
        if j >= 0:
            height[j] = np.inf
            nearest[j] = -2
            _redirect(nearest, height_bits, second_bits, current_bits, i, j, num)
        least = _least_64(current_bits, num)
        nearest[i] = _find(current_bits, num, least)
        height_bits[i] = least
        current_bits[nearest[i]] = _INFINITE_64
        second_bits[i] = _least_64(current_bits, num)
        least_height = _least_64(height_bits, num)

    clusters = 0
    for k in range(num):
        if parent[k] == k:
            labels[k] = clusters
            clusters += 1
        else:
            labels[k] = labels[parent[k]]


@compiled
def _cut_spanning_tree(
    near: Floats, num_clusters: int, integers: Integers, labels: Integers
) -> None:
    """Single linkage for one sample: fills `labels` [tokens].

    Args:
        near: the distances [tokens, stride], float32, those of tokens to themselves infinite.
        integers: workspace [8, stride], int32.
    """
    num = near.shape[0]
    # Of every token: whether it is outside of the tree, the bits of its distance to the nearest
    # token of the tree, and which that is (the earliest of equals).
    outside, edge, source = integers[0], integers[1], integers[2]
    # In the order in which they join the tree: the tokens, and the bits of their edges.
    joined, length = integers[3], integers[4]
    kept, component, number = integers[5], integers[6], integers[7]

    for k in range(num):
        outside[k] = 1
        edge[k] = _INFINITE_32
        source[k] = 0
    newest = 0
    outside[0] = 0
    for step in range(num - 1):
        _approach(near[newest].view(np.int32), outside, edge, source, newest, num)
        least = _least_32(edge, num)
        newest = _find(edge, num, least)
        if _count(edge, num, least) > 1:
            low, high = min(source[newest], newest), max(source[newest], newest)
            for k in range(newest + 1, num):
                if edge[k] == least:
                    lower, higher = min(source[k], k), max(source[k], k)
                    if lower < low or (lower == low and higher < high):
                        low, high, newest = lower, higher, k
        joined[step], length[step] = newest, least
        outside[newest] = 0
        edge[newest] = _INFINITE_32

    _keep_shortest(num, num - num_clusters, joined, length, source, kept)
    component[0] = 0
    for step in range(num - 1):
        token = joined[step]
        component[token] = component[source[token]] if kept[step] else token
    clusters = 0
    for k in range(num):
        number[k] = -1
    for k in range(num):
        if number[component[k]] < 0:
            number[component[k]] = clusters
            clusters += 1
        labels[k] = number[component[k]]


@compiled
def _approach(
    row: Integers, outside: Integers, edge: Integers, source: Integers, newest: int, num: int
) -> None:
    """Corrects the edges to the tree, which `newest` has joined. Distances are given by bits."""
    token = np.int32(newest)
    for c in range(num):
        distance = row[c] if outside[c] == 1 else _INFINITE_32
        closer = (distance < edge[c]) | ((distance == edge[c]) & (token < source[c]))
        # A token of the tree has an infinite edge for ever; its source must stay what it is.
        source[c] = token if closer & (outside[c] == 1) else source[c]
        edge[c] = min(distance, edge[c])


@compiled
def _keep_shortest(
    num: int,
    wanted: int,
    joined: Integers,
    length: Integers,
    source: Integers,
    kept: Integers,
) -> None:
    """Marks the `wanted` least edges of the tree, by (length, token, later token).

    No sort is needed: the length of the last one is found by halving an interval of integers, and
    so is the last pair of tokens among the edges of that length.
    """
    edges = num - 1
    low, high = np.int64(0), np.int64(_INFINITE_32)
    while low < high:
        middle = (low + high) // 2
        if _count_to(length, edges, np.int32(middle)) >= wanted:
            high = middle
        else:
            low = middle + 1
    longest = low
    shorter = 0
    for step in range(edges):
        shorter += length[step] < longest

    low, high = np.int64(-1), np.int64(num) * num
    while low < high:
        middle = (low + high) // 2
        count = 0
        for step in range(edges):
            count += length[step] == longest and _pair(joined, source, step, num) <= middle
        if shorter + count >= wanted:
            high = middle
        else:
            low = middle + 1
    for step in range(edges):
        last = length[step] == longest and _pair(joined, source, step, num) <= low
        kept[step] = length[step] < longest or last


@compiled
def _pair(joined: Integers, source: Integers, step: int, num: int) -> int:
    """Orders the edges of one length: by their lower token, then by the other one."""
    one, other = np.int64(joined[step]), np.int64(source[joined[step]])
    return min(one, other) * num + max(one, other)


@compiled
def _mirror(distance: Floats, near: Floats) -> None:
    """Copies what is above the diagonal to both sides of it; the diagonal becomes infinite.

    In tiles, whose cache lines are still there when the next of their columns is written; with
    unsigned indices, which need not be tried for negative ones.
    """
    num, one, tile = np.uint64(distance.shape[0]), np.uint64(1), np.uint64(32)
    zero = np.float32(0)
    for top in range(np.uint64(0), num, tile):
        bottom = min(top + tile, num)
        for r in range(top, bottom):
            near[r, r] = np.inf
            for c in range(r + one, num):
                near[r, c] = distance[r, c] + zero  # -0 becomes 0
        for left in range(top, num, tile):
            right = min(left + tile, num)
            for r in range(top, bottom):
                for c in range(max(left, r + one), right):
                    near[c, r] = distance[r, c] + zero


@compiled
def _reflect(near: Floats) -> None:
    """The same in place, for distances none of which is -0."""
    num, one, tile = np.uint64(near.shape[0]), np.uint64(1), np.uint64(32)
    for top in range(np.uint64(0), num, tile):
        bottom = min(top + tile, num)
        for left in range(top, num, tile):
            right = min(left + tile, num)
            for r in range(top, bottom):
                for c in range(max(left, r + one), right):
                    near[c, r] = near[r, c]
        for r in range(top, bottom):
            near[r, r] = np.inf


@compiled
def _least_32(bits: Integers, num: int) -> int:
    """The least of the first `num` int32."""
    least = _INFINITE_32
    for c in range(num):
        least = min(least, bits[c])
    return least


@compiled
def _least_64(bits: Integers, num: int) -> int:
    """The least of the first `num` int64."""
    least = _INFINITE_64
    for c in range(num):
        least = min(least, bits[c])
    return least


@compiled
def _find(bits: Integers, num: int, wanted: int) -> int:
    """Where `wanted` stands first. A search that stops there would not be vectorised."""
    nowhere = np.int32(num)
    first = nowhere
    for c in range(num):
        first = min(first, np.int32(c) if bits[c] == wanted else nowhere)
    return first


@compiled
def _count(bits: Integers, num: int, wanted: int) -> int:
    """How often `wanted` occurs."""
    count = np.int32(0)
    for c in range(num):
        count += np.int32(bits[c] == wanted)
    return count


@compiled
def _count_to(bits: Integers, num: int, limit: int) -> int:
    """How many are no greater than `limit`."""
    count = np.int32(0)
    for c in range(num):
        count += np.int32(bits[c] <= limit)
    return count


@compiled
def _copy(source: Floats, target: Floats, num: int) -> None:
    for c in range(num):
        target[c] = source[c]


@compiled
def _load(row: Floats, near: Floats, wide: Floats, first: int, partner: int, num: int) -> None:
    """Reads the row of the cluster of `first`; `partner` is -1 if that is a single token."""
    if partner < 0:
        _copy(near[first], row, num)
    else:
        half = min(num, wide.shape[1])
        _copy(wide[first], row, half)
        _copy(wide[partner], row[half:], num - half)


@compiled
def _store(row: Floats, wide: Floats, first: int, partner: int, num: int) -> None:
    half = min(num, wide.shape[1])
    _copy(row, wide[first], half)
    _copy(row[half:], wide[partner], num - half)


@compiled
def _catch_up(
    row: Floats, into: Integers, absorbed: Integers, start: int, stop: int, average: bool
) -> None:
    """Makes in one row the merges from `start` to `stop`."""
    for merge in range(start, stop):
        i, j = into[merge], absorbed[merge]
        row[i] = row[i] + row[j] if average else max(row[i], row[j])
        row[j] = np.inf


@compiled
def _unite(row: Floats, other: Floats, num: int, average: bool) -> None:
    """`row` becomes the row of both clusters. Infinite in either is infinite in both."""
    if average:
        for c in range(num):
            row[c] += other[c]
    else:
        for c in range(num):
            row[c] = other[c] if other[c] > row[c] else row[c]


@compiled
def _divide(row: Floats, size: Floats, own_size: float, mean: Floats, num: int) -> None:
    """From sums to means; the product of two sizes is exact, so that this rounds once."""
    for c in range(num):
        mean[c] = row[c] / (own_size * size[c])


@compiled
def _redirect(
    nearest: Integers,
    height: Integers,
    second: Integers,
    current: Integers,
    i: int,
    j: int,
    num: int,
) -> None:
    """Corrects the rows whose nearest neighbour was `i` or `j`, now that they are one.

    The others are right still: the linkages are reducible, so that what two clusters become is
    no nearer than the nearer one of them was. Distances are given by their bits.
    """
    for k in range(num):
        hit = (nearest[k] == i) | (nearest[k] == j)
        distance, bound = current[k], second[k]
        nearer = np.int32(i) if distance < bound else np.int32(-1)
        nearest[k] = nearer if hit else nearest[k]
        height[k] = min(distance, bound) if hit else height[k]
