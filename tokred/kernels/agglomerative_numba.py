"""Exact agglomerative clustering on the CPU, compiled by numba.

Complete and average linkage follow the generic algorithm of Müllner, "Modern hierarchical,
agglomerative clustering algorithms", 2011, https://arxiv.org/abs/1109.2378, section 3.1: every
cluster remembers its nearest neighbour, or, once that one has merged, a lower bound of its
distance; the cluster of the least height merges, or, if its neighbour is not known, is searched.
These things are done differently, to be fast when only the first merges are wanted:

- It stops when as many clusters are left as asked for.
- Distances are integers, multiples of 2^-24, and so are their sums: int32, and int64 for clusters
  of more than 31 tokens. Average linkage compares sum / (size * size), which is rounded once: the
  result does not depend on the order of merges.
- A merge touches no row or column of distances. It notes which rows will have to be added, and
  gives the new cluster a lower bound of its height: the mean of the second-least distances of the
  two. Rows are added when that comes up, which for most clusters is never.
- Columns are never added: the row of a cluster holds its distance to every token. A search first
  finds the nearest among single tokens. A larger cluster is no nearer than the nearest of its
  tokens, so that only clusters with a token nearer than what was found are looked at.
- A cluster also remembers a lower bound of its second-nearest distance. If its nearest neighbour
  merges into a cluster that is nearer than that, which takes a few distances to tell, it need not
  be searched again.
- The least height is kept of every 64 clusters.

Single linkage is Prim's minimum spanning tree without its longest edges (section 3.2 there).

Images are divided among threads, each of which computes the distances of an image and clusters it
while they are in its cache. Where there are fewer images than threads, threads share the distances
and the first search of an image. Loops are written so that compilers can vectorise them, or are in
`tokred.kernels.vectors_numba`. numba must be installed to import this module.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tokred.kernels.compiling import compiled_lean, compiled_parallel, running, threads_for
from tokred.kernels.cosine_numba import FAR, FEW, arrange, fill, rows_for, stride_for
from tokred.kernels.scratch import scratch
from tokred.kernels.vectors_numba import UNITS, among, least_three, lowest, up_to

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

_CODE = {"single": 0, "complete": 1, "average": 2}

_FAR, _FAR_64 = np.int32(FAR), np.int64(2**60)
_INFINITE_64 = np.int64(0x7FF0000000000000)  # positive infinity, as an integer of the same bits

# Bounds are made of rounded numbers, and are made less by more than these can be wrong.
_SAFELY = 1 - 2.0**-48

# How many distances of a merged cluster are added up to spare another one a search.
_FEW_ADDED = 16

# The number of distances on which a thread works about as long as it takes to wake another thread.
_DISTANCES_PER_THREAD = 2**15

# The kinds of tokens: a cluster of its own, a member of a larger cluster, none (padding).
_SINGLE, _MEMBER, _NONE = np.int32(0), np.int32(1), np.int32(2)

# What is known of every cluster, by its first token: rows of the workspace `integers`.
_NEAREST = 0  # its nearest cluster; -1: not known, -2: was absorbed
_NAME = 1  # of every token: the first token of its cluster
_AFTER, _LAST = 2, 3  # its members, as a chain: the next one of every token (-1: none), and the end
_NEXT_PART, _LAST_PART = 4, 5  # what it is made of: clusters whose rows are still to be added
_PARTS, _SIZE = 6, 7  # how many parts it is made of, how many members it has
_WIDE = 8  # its row of `wide`, or -1: its row is in `near`
_KIND = 9  # of every token, see above
_ASKED = 10  # the search that looked at it last
_LARGER, _PLACE = 11, 12  # a list of the clusters that have several members, and where it is there
_BLANK = 13  # zeros
_ROWS = 14
# And rows of the workspace `floats`: a lower bound of its least distance to any cluster (the
# distance itself, if the nearest is known), a lower bound of the second-least one if the nearest is
# known, and, of every 64 clusters, the least height.
_HEIGHT, _SECOND, _LEAST_OF_64 = 0, 1, 2


def cluster(
    distance: Float[Tensor, "batch tokens tokens"], num_clusters: int, linkage: str
) -> Int[Tensor, "batch tokens"]:
    """Merges the closest clusters of every sample until `num_clusters` are left.

    The next merge is always the one with the least (height, first token of one cluster, first token
    of the other); with single linkage, the one with the least (distance, token, later token).
    Samples are divided among at most `torch.get_num_threads()` threads.

    Args:
        distance: float32 on the CPU, multiples of 2^-24 in [0, 2]. Only what is above the diagonal
            is read.
        num_clusters: in [1, tokens].
        linkage: "single", "complete" or "average".

    Returns:
        The cluster of every token, int64; clusters are numbered in the order of their first tokens.
    """
    known = distance.detach().contiguous().numpy()
    nothing = np.empty((known.shape[0], known.shape[1], 0), dtype=np.float32)
    return _run(nothing, known, num_clusters, linkage)


def cluster_features(
    features: Float[Tensor, "batch tokens dim"], num_clusters: int, linkage: str
) -> Int[Tensor, "batch tokens"]:
    """The same for features, on their cosine distances; see `tokred.reducers.atc.cluster`.

    Args:
        features: float32 on the CPU; need not be normalised.
        num_clusters: in [1, tokens].
        linkage: "single", "complete" or "average".
    """
    known = features.detach().contiguous().numpy()
    return _run(known, _NO_DISTANCES, num_clusters, linkage)


_NO_DISTANCES = np.empty((0, 0, 0), dtype=np.float32)


def _run(features: Floats, distance: Floats, num_clusters: int, linkage: str) -> Tensor:
    """Clusters features, or, if there are any, distances."""
    batch, num, dim = features.shape
    labels = np.empty((batch, num), dtype=np.int64)
    shares = max(1, batch * num * num // _DISTANCES_PER_THREAD)
    threads = threads_for(min(batch, shares) if len(distance) else shares)
    slots = min(threads, max(1, batch))
    rows, stride = rows_for(num), stride_for(num)
    work = (
        scratch("panels", (slots, rows * dim), np.float32),
        scratch("near", (slots, rows, stride), np.int32),
        scratch("wide", (slots, num // FEW + 1, stride), np.int64),
        scratch("floats", (slots, 3, stride), np.float64),
        scratch("sums", (slots, stride), np.int64),
        scratch("integers", (slots, _ROWS, stride), np.int32),
    )
    options = (num_clusters, _CODE[linkage])
    if threads == 1:
        _cluster_share(0, 1, *options, features, distance, *work, labels)
        return torch.from_numpy(labels)
    # As many images as there are threads at a time, and then the rest together.
    whole = batch // threads * threads if batch >= threads else 0
    with running(threads):
        if whole:
            _cluster_shares(threads, *options, features[:whole], distance, *work, labels)
        if whole < batch and len(distance):
            _cluster_share(
                0, 1, *options, features[whole:], distance[whole:], *work, labels[whole:]
            )
        elif whole < batch:
            _cluster_together(threads, *options, features[whole:], *work, labels[whole:])
    return torch.from_numpy(labels)


@compiled_lean
def _cluster_share(
    share: int,
    shares: int,
    num_clusters: int,
    linkage: int,
    features: Floats,
    distance: Floats,
    panels: Floats,
    near: Integers,
    wide: Integers,
    floats: Floats,
    sums: Integers,
    integers: Integers,
    labels: Integers,
) -> None:
    """Clusters the samples `share`, `share + shares`, ... in a workspace of its own."""
    own = near[share]
    for sample in range(share, features.shape[0], shares):
        if len(distance) > 0:
            _mirror(distance[sample], own)
        else:
            least = integers[share, 0]
            arrange(features[sample], panels[share], floats[share, 0], least, 0, 1)
            fill(features.shape[2], panels[share], least, own, 0, 1)
        if linkage > 0:
            _find_nearest(own, floats[share], sums[share], integers[share], features.shape[1], 0, 1)
        _cut(
            own,
            wide[share],
            num_clusters,
            linkage,
            floats[share],
            sums[share],
            integers[share],
            labels[sample],
        )


@compiled_parallel
def _cluster_shares(
    shares: int,
    num_clusters: int,
    linkage: int,
    features: Floats,
    distance: Floats,
    panels: Floats,
    near: Integers,
    wide: Integers,
    floats: Floats,
    sums: Integers,
    integers: Integers,
    labels: Integers,
) -> None:
    """Clusters all samples, every share on a thread of its own."""
    for share in numba.prange(shares):
        _cluster_share(
            share,
            shares,
            num_clusters,
            linkage,
            features,
            distance,
            panels,
            near,
            wide,
            floats,
            sums,
            integers,
            labels,
        )


@compiled_parallel
def _cluster_together(
    shares: int,
    num_clusters: int,
    linkage: int,
    features: Floats,
    panels: Floats,
    near: Integers,
    wide: Integers,
    floats: Floats,
    sums: Integers,
    integers: Integers,
    labels: Integers,
) -> None:
    """Clusters fewer samples than there are threads: all work on one sample's distances at a time,
    then every sample is clustered on a thread of its own."""
    batch, num, dim = features.shape
    for sample in range(batch):
        for share in numba.prange(shares):
            arrange(
                features[sample],
                panels[sample],
                floats[sample, 0],
                integers[sample, 0],
                share,
                shares,
            )
        for share in numba.prange(shares):
            fill(dim, panels[sample], integers[sample, 0], near[sample], share, shares)
        if linkage > 0:
            for share in numba.prange(shares):
                _find_nearest(
                    near[sample], floats[sample], sums[sample], integers[sample], num, share, shares
                )
    for sample in numba.prange(batch):
        _cut(
            near[sample],
            wide[sample],
            num_clusters,
            linkage,
            floats[sample],
            sums[sample],
            integers[sample],
            labels[sample],
        )


@compiled_lean
def _mirror(distance: Floats, near: Integers) -> None:
    """What is above the diagonal, as integers, to both sides of it; the diagonal becomes far.

    In tiles, whose cache lines are still there when the next of their columns is written; with
    unsigned indices, which need not be tried for negative ones.
    """
    num, one, tile = np.uint64(distance.shape[0]), np.uint64(1), np.uint64(32)
    units = np.float32(UNITS)
    for top in range(np.uint64(0), num, tile):
        bottom = min(top + tile, num)
        for r in range(top, bottom):
            near[r, r] = _FAR
            for c in range(r + one, num):
                near[r, c] = np.int32(distance[r, c] * units)
        for left in range(top, num, tile):
            right = min(left + tile, num)
            for r in range(top, bottom):
                for c in range(max(left, r + one), right):
                    near[c, r] = near[r, c]


@compiled_lean
def _cut(
    near: Integers,
    wide: Integers,
    num_clusters: int,
    linkage: int,
    floats: Floats,
    sums: Integers,
    integers: Integers,
    labels: Integers,
) -> None:
    """Clusters one sample, of which `near` is complete, and the nearest have been found."""
    if linkage == 0:
        _cut_spanning_tree(near, num_clusters, integers, labels)
    else:
        _merge_closest(near, wide, num_clusters, linkage == 2, floats, sums, integers, labels)


# Complete and average linkage


@compiled_lean
def _find_nearest(
    near: Integers,
    floats: Floats,
    sums: Integers,
    integers: Integers,
    num: int,
    share: int,
    shares: int,
) -> None:
    """For some of the tokens: what is known of single tokens, and the nearest two of each."""
    stride = near.shape[1]
    padded = stride // 64 * 64
    first, end = share * num // shares, (share + 1) * num // shares
    integers[_KIND, :] = _SINGLE  # every thread writes the same
    integers[_KIND, num:] = _NONE
    for k in range(first, end):
        row = near[k]
        one, two, _ = least_three(row, integers[_KIND], _FAR, padded)
        integers[_NEAREST, k] = _first_up_to(row, integers[_KIND], _SINGLE, one, num)
        sums[k] = one
        floats[_HEIGHT, k] = one
        floats[_SECOND, k] = two if two < _FAR else np.inf


@compiled_lean
def _merge_closest(
    near: Integers,
    wide: Integers,
    num_clusters: int,
    average: bool,
    floats: Floats,
    sums: Integers,
    integers: Integers,
    labels: Integers,
) -> None:
    """Complete and average linkage for one sample: fills `labels` [tokens].

    A cluster is named by its first token. Its row holds the sum (average linkage) or the maximum
    (complete linkage) of its members' distances to every token; those to itself are `FAR` or more.

    Args:
        near: the distances [tokens and more, stride], int32; is written to. What is beyond `tokens`
            may be anything.
        wide: workspace [tokens // FEW + 1, stride] int64, for sums over more than `FEW` tokens.
        num_clusters: how many are left in the end.
        average: whether the linkage is average, not complete.
        floats: workspace [3, stride], float64, of which `_find_nearest` has filled two rows.
        sums: of every token, its distance to the nearest one; later the sum, or the maximum, of the
            distances between a cluster and its nearest one [stride], int64.
        integers: workspace [_ROWS, stride], int32, of which `_find_nearest` has filled two rows.
        labels: is filled.
    """
    num = len(labels)
    _begin(num, floats, integers)
    bits, least_bits = floats[_HEIGHT].view(np.int64), floats[_LEAST_OF_64].view(np.int64)
    nearest, name, blank = integers[_NEAREST], integers[_NAME], integers[_BLANK]
    blocks = (num + 63) // 64
    merges, searches, larger, wide_rows = 0, 0, 0, 0
    while merges < num - num_clusters:
        # The first cluster of the least height; its nearest one, if known, comes after it.
        height = _least_64(least_bits, 0, blocks)
        block = _first_up_to(least_bits, blank, 0, height, blocks)
        i = 64 * block + lowest(up_to(bits, blank, 0, 64 * block, height))
        j = nearest[i]
        if j >= 0:
            larger = _unite(i, j, larger, average, near, wide, floats, sums, integers)
            merges += 1
            continue
        wide_rows = _add_parts(i, wide_rows, average, near, wide, integers)
        searches += 1
        if integers[_WIDE, i] >= 0:
            row = wide[integers[_WIDE, i]]
            found = _search(row, _FAR_64, i, searches, larger, average, num, near, wide, integers)
        else:
            row_32 = near[i]
            found = _search(row_32, _FAR, i, searches, larger, average, num, near, wide, integers)
        nearest[i], floats[_HEIGHT, i], floats[_SECOND, i], sums[i] = found
        least_bits[block] = _least_64(bits, 64 * block, 64 * block + 64)

    clusters = 0
    for k in range(num):
        if name[k] == k:
            labels[k] = clusters
            clusters += 1
        else:
            labels[k] = labels[name[k]]


@compiled_lean
def _begin(num: int, floats: Floats, integers: Integers) -> None:
    """Every token is a cluster, of which `_find_nearest` has found the nearest."""
    for k in range(num):
        integers[_NAME, k] = integers[_LAST, k] = integers[_LAST_PART, k] = k
        integers[_AFTER, k] = integers[_NEXT_PART, k] = integers[_WIDE, k] = -1
        integers[_PARTS, k] = integers[_SIZE, k] = 1
        integers[_ASKED, k] = 0
    integers[_BLANK, :] = 0
    integers[_NEAREST, num:] = -2
    floats[_HEIGHT, num:] = np.inf
    floats[_LEAST_OF_64, :] = np.inf
    bits = floats[_HEIGHT].view(np.int64)
    for block in range((num + 63) // 64):
        least = _least_64(bits, 64 * block, 64 * block + 64)
        floats[_LEAST_OF_64].view(np.int64)[block] = least


@compiled_lean
def _add_parts(
    i: int, wide_rows: int, average: bool, near: Integers, wide: Integers, integers: Integers
) -> int:
    """Makes the row of a cluster from those of its parts; returns how many wide rows are in use."""
    next_part, after, place = integers[_NEXT_PART], integers[_AFTER], integers[_WIDE]
    part = next_part[i]
    if part < 0:
        return wide_rows
    if not average:
        while part >= 0:
            _join_greater(near[i], near[part])
            part = next_part[part]
    elif integers[_SIZE, i] <= FEW:
        while part >= 0:
            _join_sum(near[i], near[part])
            part = next_part[part]
    else:
        new = part  # the first of its members to which it has distances
        taken = -1  # the part whose wide row it takes over
        if place[i] < 0:
            new = taken = i
            while part >= 0 and place[part] < 0:
                part = next_part[part]
            if part >= 0:
                taken, place[i] = part, place[part]
                _join_sum(wide[place[i]], near[i])
            else:
                place[i] = wide_rows
                wide_rows += 1
                _copy(near[i], wide[place[i]])
            part = next_part[i]
        row = wide[place[i]]
        while part >= 0:
            if part == taken:
                pass
            elif place[part] >= 0:
                _join_sum(row, wide[place[part]])
            else:
                _join_sum(row, near[part])
            part = next_part[part]
        while new >= 0:
            row[new] = _FAR_64
            new = after[new]
    next_part[i] = -1
    integers[_LAST_PART, i] = i
    integers[_PARTS, i] = 1
    return wide_rows


# In one piece, although long: the three ways to come to the next cluster share what was found.
@compiled_lean
def _search(
    row: Integers,
    far: int,
    i: int,
    search: int,
    larger: int,
    average: bool,
    num: int,
    near: Integers,
    wide: Integers,
    integers: Integers,
) -> tuple[int, float, float, int]:
    """The cluster nearest to `i` (the first of equally near ones), its distance, a lower bound of
    the second-least distance, and the sum or the maximum that belongs to the first."""
    kind, name, asked = integers[_KIND], integers[_NAME], integers[_ASKED]
    sizes, listed = integers[_SIZE], integers[_LARGER]
    own = float(sizes[i]) if average else 1.0
    one, two, other = least_three(row, kind, far, near.shape[1] // 64 * 64)
    nearest, total = np.int32(-1), np.int64(one)
    height = one / own if one < far else np.inf
    second = two / own if two < far else np.inf
    if one < far:
        nearest = np.int32(_first_up_to(row, kind, _SINGLE, one, num))
    limit = min(two, row.dtype.type(far - 1))
    if other > limit:
        return nearest, height, second, total

    # Larger clusters, some token of which is no further than the limit. First the one with the
    # nearest token, which often brings the limit down.
    block, at = -1, 0
    bits = np.uint64(0)
    every = larger <= 4
    c = name[_first_up_to(row, kind, _MEMBER, other, num)]
    while True:
        if asked[c] != search and c != i:
            asked[c] = search
            size = own * sizes[c] if average else 1.0
            most = np.int64(min(second * size, 2.0**60)) + 1
            found = _total(row, i, c, most, average, near, wide, integers)
            distance = found / size
            if distance < height or (distance == height and c < nearest):
                second, height, nearest, total = height, distance, np.int32(c), found
            elif distance < second:
                second = distance
            if second * own + 1 < limit:
                limit = row.dtype.type(second * own + 1)
        if every:
            if at == larger:
                break
            c = listed[at]
            at += 1
            continue
        while bits == 0 and 64 * (block + 1) < num:
            block += 1
            bits = up_to(row, kind, _MEMBER, 64 * block, limit)
        if bits == 0:
            break
        c = name[64 * block + lowest(bits)]
        bits &= bits - np.uint64(1)
    return nearest, height, second, total


@compiled_lean
def _total(
    row: Integers,
    i: int,
    c: int,
    most: int,
    average: bool,
    near: Integers,
    wide: Integers,
    integers: Integers,
) -> int:
    """The sum (average linkage) or the maximum (complete linkage) of the distances between two
    clusters, of which `row` is the first's; or any number above `most`, if it is above that."""
    after, next_part, place = integers[_AFTER], integers[_NEXT_PART], integers[_WIDE]
    total = np.int64(0)
    if integers[_PARTS, c] * integers[_SIZE, i] * 4 < integers[_SIZE, c]:
        # Rather from the rows of the other cluster, at the members of this one.
        part = c
        while part >= 0 and total <= most:
            token = i
            while token >= 0:
                if place[part] >= 0:
                    distance = np.int64(wide[place[part], token])
                else:
                    distance = np.int64(near[part, token])
                total = total + distance if average else max(total, distance)
                token = after[token]
            part = next_part[part]
        return total
    token = c
    while token >= 0 and total <= most:
        total = total + row[token] if average else max(total, np.int64(row[token]))
        token = after[token]
    return total


@compiled_lean
def _unite(
    i: int,
    j: int,
    larger: int,
    average: bool,
    near: Integers,
    wide: Integers,
    floats: Floats,
    sums: Integers,
    integers: Integers,
) -> int:
    """Cluster `j` is absorbed by its nearest, `i`. Returns how many clusters have several members.

    No row is read or written. What `i` becomes is as far from any other as the mean of the two is,
    or as the further one: at least as far as the mean, or the greater, of their second-least
    distances.
    """
    kind, place, listed = integers[_KIND], integers[_PLACE], integers[_LARGER]
    after, last, sizes = integers[_AFTER], integers[_LAST], integers[_SIZE]
    height, second, nearest = floats[_HEIGHT], floats[_SECOND], integers[_NEAREST]
    size_i, size_j, end_i = sizes[i], sizes[j], last[i]
    bound_i, bound_j = second[i], second[j] if nearest[j] == i else height[j]
    if average:
        bound = (size_i * bound_i + size_j * bound_j) / (size_i + size_j) * _SAFELY
    else:
        bound = max(bound_i, bound_j)
    height[i], height[j] = max(bound, height[i]), np.inf
    nearest[i], nearest[j] = -1, -2

    if kind[i] == _SINGLE and kind[j] == _SINGLE:
        listed[larger], place[i] = i, larger
        larger += 1
    elif kind[i] == _SINGLE:
        listed[place[j]], place[i] = i, place[j]
    elif kind[j] == _MEMBER:
        larger -= 1
        listed[place[j]], place[listed[larger]] = listed[larger], place[j]
    kind[i] = kind[j] = _MEMBER
    token = j
    while token >= 0:
        integers[_NAME, token] = i
        token = after[token]
    after[end_i], last[i] = j, last[j]
    integers[_NEXT_PART, integers[_LAST_PART, i]] = j
    integers[_LAST_PART, i] = integers[_LAST_PART, j]
    integers[_PARTS, i] += integers[_PARTS, j]
    sizes[i] = size_i + size_j
    _redirect(i, j, size_i, size_j, end_i, average, near, wide, floats, sums, integers)
    return larger


@compiled_lean
def _redirect(
    i: int,
    j: int,
    size_i: int,
    size_j: int,
    end_i: int,
    average: bool,
    near: Integers,
    wide: Integers,
    floats: Floats,
    sums: Integers,
    integers: Integers,
) -> None:
    """Corrects the clusters whose nearest was `i` or `j`, now that they are one.

    The others are right still: the linkages are reducible, so that what two clusters become is
    no nearer than the nearer one of them was. The chain of members of `i` ended at `end_i`.
    """
    height, second, nearest = floats[_HEIGHT], floats[_SECOND], integers[_NEAREST]
    bits, least_bits = height.view(np.int64), floats[_LEAST_OF_64].view(np.int64)
    after = integers[_AFTER]
    size = float(size_i + size_j)
    for start in range(0, near.shape[1] - 63, 64):
        hits = among(nearest, start, i, j)
        if hits == 0 and i // 64 != start // 64 and j // 64 != start // 64:
            continue
        while hits != 0:
            k = start + lowest(hits)
            hits &= hits - np.uint64(1)
            was_i = nearest[k] == i
            added, count = (j, size_j) if was_i else (i, size_i)
            if count <= _FEW_ADDED:
                # What is known of the nearest, and what is added to it.
                if not was_i:
                    after[end_i] = -1
                if integers[_WIDE, k] >= 0:
                    more = _chained(wide[integers[_WIDE, k]], added, average, after)
                else:
                    more = _chained(near[k], added, average, after)
                after[end_i] = j
                if average:
                    sums[k] += more
                    distance = sums[k] / (integers[_SIZE, k] * size)
                else:
                    sums[k] = max(sums[k], more)
                    distance = float(sums[k])
                closer = distance < second[k]
            else:
                # It is at least as far as the mean, or the greater, of two known bounds.
                distance, closer = second[k], False
                if average and second[k] < np.inf:
                    rest = second[k] - height[k]
                    distance = (height[k] + rest * (count / size)) * _SAFELY
                    distance = max(distance, height[k])
            height[k] = min(distance, second[k])
            nearest[k] = i if closer else -1
        least_bits[start // 64] = _least_64(bits, start, start + 64)


@compiled_lean
def _chained(row: Integers, first: int, average: bool, after: Integers) -> int:
    """The sum, or the maximum, of a row at the tokens of a chain."""
    total, token = np.int64(0), first
    while token >= 0:
        total = total + row[token] if average else max(total, np.int64(row[token]))
        token = after[token]
    return total


@compiled_lean
def _copy(source: Integers, target: Integers) -> None:
    for c in range(len(target)):
        target[c] = source[c]


@compiled_lean
def _join_sum(row: Integers, other: Integers) -> None:
    for c in range(len(row)):
        row[c] += other[c]


@compiled_lean
def _join_greater(row: Integers, other: Integers) -> None:
    for c in range(len(row)):
        row[c] = max(row[c], other[c])


@compiled_lean
def _first_up_to(row: Integers, kind: Integers, which: int, limit: int, num: int) -> int:
    """The first of the numbers of a kind that is no greater than `limit`; there must be one."""
    for start in range(0, num, 64):
        bits = up_to(row, kind, which, start, limit)
        if bits != 0:
            return start + lowest(bits)
    return 0


@compiled_lean
def _least_64(bits: Integers, start: int, stop: int) -> int:
    """The least of some int64."""
    least = _INFINITE_64
    for c in range(start, stop):
        least = min(least, bits[c])
    return least


# Single linkage


@compiled_lean
def _cut_spanning_tree(
    near: Integers, num_clusters: int, integers: Integers, labels: Integers
) -> None:
    """Single linkage for one sample: fills `labels` [tokens].

    Args:
        near: the distances [tokens and more, stride], int32.
        num_clusters: how many are left in the end.
        integers: workspace [8 and more, stride], int32.
        labels: is filled.
    """
    num = len(labels)
    # Of every token: whether it is outside of the tree, its distance to the nearest token of the
    # tree, and which that is (the earliest of equals).
    outside, edge, source = integers[0], integers[1], integers[2]
    # In the order in which they join the tree: the tokens, and the lengths of their edges.
    joined, length = integers[3], integers[4]
    kept, component, number = integers[5], integers[6], integers[7]

    for k in range(num):
        outside[k] = 1
        edge[k] = _FAR
        source[k] = 0
    newest = 0
    outside[0] = 0
    for step in range(num - 1):
        _approach(near[newest], outside, edge, source, newest, num)
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
        edge[newest] = _FAR

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


@compiled_lean
def _approach(
    row: Integers, outside: Integers, edge: Integers, source: Integers, newest: int, num: int
) -> None:
    """Corrects the edges to the tree, which `newest` has joined."""
    token = np.int32(newest)
    for c in range(num):
        distance = row[c] if outside[c] == 1 else _FAR
        closer = (distance < edge[c]) | ((distance == edge[c]) & (token < source[c]))
        # A token of the tree has a far edge for ever; its source must stay what it is.
        source[c] = token if closer & (outside[c] == 1) else source[c]
        edge[c] = min(distance, edge[c])


@compiled_lean
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
    low, high = np.int64(0), np.int64(_FAR)
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


@compiled_lean
def _pair(joined: Integers, source: Integers, step: int, num: int) -> int:
    """Orders the edges of one length: by their lower token, then by the other one."""
    one, other = np.int64(joined[step]), np.int64(source[joined[step]])
    return min(one, other) * num + max(one, other)


@compiled_lean
def _least_32(bits: Integers, num: int) -> int:
    """The least of the first `num` int32."""
    least = _FAR
    for c in range(num):
        least = min(least, bits[c])
    return least


@compiled_lean
def _find(bits: Integers, num: int, wanted: int) -> int:
    """Where `wanted` stands first. A search that stops there would not be vectorised."""
    nowhere = np.int32(num)
    first = nowhere
    for c in range(num):
        first = min(first, np.int32(c) if bits[c] == wanted else nowhere)
    return first


@compiled_lean
def _count(bits: Integers, num: int, wanted: int) -> int:
    """How often `wanted` occurs."""
    count = np.int32(0)
    for c in range(num):
        count += np.int32(bits[c] == wanted)
    return count


@compiled_lean
def _count_to(bits: Integers, num: int, limit: int) -> int:
    """How many are no greater than `limit`."""
    count = np.int32(0)
    for c in range(num):
        count += np.int32(bits[c] <= limit)
    return count
