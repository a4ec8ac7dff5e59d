"""Exact agglomerative clustering of a batch of distance matrices, as Triton kernels for CUDA.

The algorithms, and how ties are decided, are those of `tokred.kernels.agglomerative_torch`, and
the results are the same bit for bit. Nothing waits for the device, and what is launched depends on
shapes alone, so a CUDA graph can capture it.

**Complete and average linkage.** A round merges all pairs of clusters that are each other's
nearest. Every cluster has a slot, which is its row and column in the matrix of distances. There are
two copies of the matrix: a round reads one, and writes the smaller matrix of the clusters that are
left into the other. On the way it finds each cluster's nearest one, for the next round. Where
matrices are small, one program does all rounds of a sample. Where they are large, each of the first
rounds is two launches over the whole device; one program per sample does the rounds that are left,
on what is a small matrix by then.

What a sample has for each slot:
    far, nearest    the distance to the nearest other cluster, and the slot of that
    name, size      the smallest token of the cluster, and how many tokens it has
    slots           the slot that it had in the round before
    partner         the slot of the cluster that it absorbed in this round; its own, if none
for each token:
    height, into    the distance at which the cluster of this name was absorbed (infinite if it was
                    not), and the name of the cluster that absorbed it
and one number:
    bound           a height at which enough merges were made: what lies above it is left out
    count           how many clusters are left, 0 when the result is known
    turn            how many rounds were made: it says which copy of the matrix is read

**Single linkage** grows the minimum spanning tree: in every round, each component is joined with
the nearest other one. What a sample has for each token:
    far, nearest    the distance to the nearest token of another component, and that token
    component       the name of its component, which is one of its tokens
    parent          the component that its component is joined to
    least           of a token that names a component, the shortest edge that leaves it
    edges           an edge of the tree that was found for this token, `NO_EDGE` if none was
and one number:
    grows           1 as long as edges are missing

**Who may read what.** A program never reads what another program of the same launch writes. Inside
a program, threads exchange values through memory: one barrier stands between writing and reading,
and another one before the same place is written again.
"""

# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call"
# (A kernel's parameters are pointers, which Triton has no types for.)

from __future__ import annotations

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from tokred.kernels import agglomerative_torch
from tokred.maps import in_order_of_first_member

TOKEN_BITS = tl.constexpr(agglomerative_torch.TOKEN_BITS)
TOKEN_MASK = tl.constexpr(agglomerative_torch.MAX_TOKENS - 1)
NO_EDGE = tl.constexpr(agglomerative_torch.NO_EDGE)

# Up to this many tokens, one program does all rounds of a sample.
_SMALL = 256


def cluster(
    distance: Float[Tensor, "batch tokens tokens"], num_clusters: int, linkage: str
) -> Int[Tensor, "batch tokens"]:
    """Merges the closest clusters of every sample until `num_clusters` are left.

    Args:
        distance: float32, on a CUDA device, not negative and not NaN. Only what is above the
            diagonal is looked at. Average linkage is exact where all values are multiples of 2^-24
            up to 2, as 1 - cosine is: sums of these are exact in float64.
        num_clusters: in [1, tokens].
        linkage: "single", "complete" or "average".

    Returns:
        The cluster of every token, int64, numbered in the order of their first tokens.

    Raises:
        ValueError: more than 32768 tokens.
    """
    batch, tokens, _ = distance.shape
    if tokens > 2**15:  # offsets within a matrix are int32
        raise ValueError(f"at most {2**15} tokens can be clustered with Triton, not {tokens}")
    merges = tokens - num_clusters
    if merges == 0 or batch == 0:
        return torch.arange(tokens, device=distance.device).repeat(batch, 1)
    with torch.cuda.device_of(distance):
        if linkage == "single":
            edges = _spanning_tree(distance.contiguous(), merges)
            return _components(edges, edges.kthvalue(merges, dim=1).values)
        height, into = _dendrogram(distance.contiguous(), merges, linkage == "average")
        return agglomerative_torch.cut(height, into.long(), merges)


def _wide_rounds(tokens: int) -> int:
    """How many rounds are spread over the whole device.

    A round leaves about two thirds of the clusters. After three or four rounds, most clusters that
    cannot change the result any more are left out as well. A round too many costs two launches that
    do nothing; a round too few leaves more to the one program that does the rest.
    """
    if tokens <= _SMALL:
        return 0
    return 6 if tokens <= 1024 else 10


def _warps(block: int) -> int:
    """How many warps share a vector of `block` elements."""
    return min(16, max(4, block // 128))


def _dendrogram(
    distance: Float[Tensor, "batch tokens tokens"], merges: int, average: bool
) -> tuple[Float[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Height and parent of every absorbed token. The `merges` least merges are certain; there may
    be others, which need not be right."""
    batch, tokens, _ = distance.shape
    dtype = torch.float64 if average else torch.float32
    linked = distance.new_empty(2, batch, tokens, tokens, dtype=dtype)
    far = distance.new_empty(batch, tokens, dtype=dtype)
    size = torch.ones_like(far)
    height = torch.full_like(far, math.inf)
    bound = far.new_full((batch,), math.inf)
    name = torch.arange(tokens, device=distance.device, dtype=torch.int32).repeat(batch, 1)
    into = torch.full_like(name, tokens)
    nearest, slots, partner = (torch.empty_like(name) for _ in range(3))
    count = torch.full_like(bound, tokens, dtype=torch.int32)
    turn = torch.zeros_like(count)

    clusters = far, nearest, slots, partner, name, size, height, into, bound, count, turn
    block = triton.next_power_of_2(tokens)
    tiles = (triton.cdiv(tokens, 16), batch)
    _start_kernel[tiles](distance, linked, far, nearest, tokens, rows=16, columns=64)
    for _ in range(_wide_rounds(tokens)):
        _pairs_kernel[(batch,)](*clusters, tokens, merges, block=block, num_warps=_warps(block))
        _join_kernel[tiles](
            linked, far, nearest, slots, partner, size, count, turn,
            linked.stride(0), tokens, average=average, rows=16, columns=64,
        )  # fmt: skip
    _rounds_kernel[(batch,)](
        linked, *clusters, linked.stride(0), tokens, merges,
        average=average, block=block, rows=16, columns=64, num_warps=max(8, _warps(block)),
    )  # fmt: skip
    return height, into


def _spanning_tree(
    distance: Float[Tensor, "batch tokens tokens"], merges: int
) -> Int[Tensor, "batch tokens"]:
    """Edges of the minimum spanning tree, one integer each. The `merges` least are certain to be
    among them."""
    batch, tokens, _ = distance.shape
    symmetric, far = torch.empty_like(distance), distance.new_empty(batch, tokens)
    component = torch.arange(tokens, device=distance.device, dtype=torch.int32).repeat(batch, 1)
    nearest, parent = torch.empty_like(component), torch.empty_like(component)
    edges = torch.full_like(component, agglomerative_torch.NO_EDGE, dtype=torch.int64)
    least = torch.empty_like(edges)
    grows = torch.ones(batch, device=distance.device, dtype=torch.int32)

    tree = far, nearest, component, parent, least, edges, grows
    block = triton.next_power_of_2(tokens)
    tiles = (triton.cdiv(tokens, 16), batch)
    _start_kernel[tiles](distance, symmetric, far, nearest, tokens, rows=16, columns=64)
    # Every round halves the number of components, at least.
    rounds = (tokens - 1).bit_length()
    if tokens <= _SMALL:
        _tree_kernel[(batch,)](
            symmetric, *tree, tokens, merges,
            jumps=rounds, block=block, rows=16, columns=64, num_warps=8,
        )  # fmt: skip
        return edges
    for _ in range(rounds):
        _hook_kernel[(batch,)](
            *tree, tokens, merges, jumps=rounds, block=block, num_warps=_warps(block)
        )
        _leave_kernel[tiles](symmetric, far, nearest, component, grows, tokens, rows=16, columns=64)
    return edges


def _components(
    edges: Int[Tensor, "batch tokens"], longest: Int[Tensor, " batch"]
) -> Int[Tensor, "batch tokens"]:
    """The clusters that a forest's edges up to `longest` connect, in order."""
    batch, tokens = edges.shape
    component = torch.arange(tokens, device=edges.device, dtype=torch.int32).repeat(batch, 1)
    block = triton.next_power_of_2(tokens)
    _forest_kernel[(batch,)](
        edges, longest, component, torch.empty_like(component), torch.empty_like(edges), tokens,
        jumps=(tokens - 1).bit_length(), block=block, num_warps=_warps(block),
    )  # fmt: skip
    return in_order_of_first_member(component.long())


# All linkages


@triton.jit
@no_type_check
def _start_kernel(
    distance, symmetric, far, nearest, tokens, rows: tl.constexpr, columns: tl.constexpr
):
    """Mirrors the upper triangle, and finds the nearest neighbour of every token.

    A program has `rows` rows of one sample.
    """
    sample = tl.program_id(1).to(tl.int64)
    distance += sample * tokens * tokens
    symmetric += sample * tokens * tokens
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    best = tl.full([rows], float("inf"), symmetric.dtype.element_ty)
    where = tl.zeros([rows], tl.int32)
    for start in range(0, tokens, columns):
        column = start + tl.arange(0, columns)
        inside = (row < tokens)[:, None] & (column < tokens)[None, :]
        other = inside & (row[:, None] != column[None, :])
        low = tl.minimum(row[:, None], column[None, :])
        high = tl.maximum(row[:, None], column[None, :])
        value = tl.load(distance + low * tokens + high, mask=other, other=float("inf"))
        # Adding 0 turns -0 into 0. Distances are compared by their bits later, and those of -0
        # are another number.
        value = (value + 0.0).to(symmetric.dtype.element_ty)
        tl.store(symmetric + row[:, None] * tokens + column[None, :], value, mask=inside)
        best, where = _nearer(value, start, best, where)
    tl.store(far + sample * tokens + row, best, mask=row < tokens)
    tl.store(nearest + sample * tokens + row, where, mask=row < tokens)


@triton.jit
@no_type_check
def _nearer(value, start, best, where):
    """The least of each row so far and the column it is in, the first of equals."""
    least, column = tl.min(value, axis=1, return_indices=True)
    where = tl.where(least < best, column + start, where)
    return tl.minimum(least, best), where


# Complete and average linkage


@triton.jit
@no_type_check
def _rounds_kernel(
    linked, far, nearest, slots, partner, name, size, height, into, bound, count, turn,
    apart, tokens, merges,
    average: tl.constexpr, block: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """All rounds that a sample still needs. A program has one sample."""
    sample = tl.program_id(0).to(tl.int64)
    at = sample * tokens
    left = tl.load(count + sample)
    round_number = tl.load(turn + sample)
    while left > 0:
        left = _pairs(
            far + at, nearest + at, slots + at, partner + at, name + at, size + at, height + at,
            into + at, bound + sample, left, tokens, merges, block,
        )  # fmt: skip
        round_number += 1
        source, target = _copies(linked, sample, apart, tokens, round_number)
        for start in range(0, left, rows):
            _join(
                source, target, far + at, nearest + at, slots + at, partner + at, size + at,
                left, tokens, start, average, rows, columns,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit
@no_type_check
def _pairs_kernel(
    far, nearest, slots, partner, name, size, height, into, bound, count, turn,
    tokens, merges, block: tl.constexpr,
):  # fmt: skip
    """The first half of a round. A program has one sample."""
    sample = tl.program_id(0).to(tl.int64)
    at = sample * tokens
    left = tl.load(count + sample)
    if left > 0:
        left = _pairs(
            far + at, nearest + at, slots + at, partner + at, name + at, size + at, height + at,
            into + at, bound + sample, left, tokens, merges, block,
        )  # fmt: skip
        tl.store(count + sample, left)
        tl.store(turn + sample, tl.load(turn + sample) + 1)


@triton.jit
@no_type_check
def _join_kernel(
    linked, far, nearest, slots, partner, size, count, turn, apart, tokens,
    average: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """The second half of a round. A program has `rows` rows of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    at = sample * tokens
    start = tl.program_id(0) * rows
    left = tl.load(count + sample)
    if start < left:
        source, target = _copies(linked, sample, apart, tokens, tl.load(turn + sample))
        _join(
            source, target, far + at, nearest + at, slots + at, partner + at, size + at,
            left, tokens, start, average, rows, columns,
        )  # fmt: skip


@triton.jit
@no_type_check
def _copies(linked, sample, apart, tokens, round_number):
    """The matrix that a round reads, and the one that it writes, `apart` elements away."""
    linked += sample * tokens * tokens
    odd = (round_number % 2).to(tl.int64)
    return linked + (1 - odd) * apart, linked + odd * apart


# In one piece, although long: one pass over a sample's slots, whose values all live in registers.
@triton.jit
@no_type_check
def _pairs(
    far, nearest, slots, partner, name, size, height, into, bound, left, tokens, merges,
    block: tl.constexpr,
):  # fmt: skip
    """Merges all reciprocal nearest neighbours of a sample, and numbers the clusters that are left.

    Returns the number of clusters that are left; 0 when the `merges` lowest merges are known.
    """
    slot = tl.arange(0, block)
    here = slot < left
    distance = tl.load(far + slot, mask=here, other=float("inf"))
    near = tl.load(nearest + slot, mask=here, other=0)
    own = tl.load(name + slot, mask=here, other=0)
    other = tl.load(name + near, mask=here, other=0)
    own_size = tl.load(size + slot, mask=here, other=1)
    other_size = tl.load(size + near, mask=here, other=1)

    # Merges come in ascending order of (height, name, name). The least pair of the clusters that
    # are left comes before all that may still follow. So if `merges` were made before it, the
    # result is known.
    least = tl.min(distance, axis=0)
    lowest = tl.min(tl.where(here & (distance == least), slot, block), axis=0)
    first = tl.load(name + lowest)
    second = tl.load(name + tl.load(nearest + lowest))
    made = tl.load(height + slot, mask=slot < tokens, other=float("inf"))
    made_into = tl.load(into + slot, mask=slot < tokens, other=0)
    named_before = (made_into < first) | ((made_into == first) & (slot < second))
    before = (made < least) | ((made == least) & (made < float("inf")) & named_before)
    known = tl.sum(before.to(tl.int32), axis=0)

    stay = left * 0
    if known < merges:
        # Two clusters merge if each is the other's nearest. The one in the later slot, which has
        # the larger name, is absorbed.
        back = tl.load(nearest + near, mask=here, other=-1)
        reciprocal = here & (back == slot) & (distance < float("inf"))
        absorbed = reciprocal & (near < slot)
        tl.debug_barrier()
        tl.store(height + own, distance, mask=absorbed)
        tl.store(into + own, other, mask=absorbed)
        tl.debug_barrier()

        # Once `merges` merges were made up to some height, a cluster whose nearest one is further
        # away than that has no part in the result, and is left out. Any such height is right, and
        # a low one leaves more out: a few halvings find one that is low enough.
        made = tl.load(height + slot, mask=slot < tokens, other=float("inf"))
        high = tl.load(bound)
        if tl.sum((made < float("inf")).to(tl.int32), axis=0) >= merges:
            high = tl.minimum(high, tl.max(tl.where(made < float("inf"), made, 0.0), axis=0))
            low = high * 0.0
            for _ in range(8):
                middle = (low + high) * 0.5
                enough = tl.sum((made <= middle).to(tl.int32), axis=0) >= merges
                low = tl.where(enough, low, middle)
                high = tl.where(enough, middle, high)
        stays = here & (absorbed == 0) & (distance < float("inf")) & (distance <= high)

        place = tl.cumsum(stays.to(tl.int32), axis=0) - 1
        stay = tl.sum(stays.to(tl.int32), axis=0)
        tl.debug_barrier()  # all threads have read the bound, the names and the sizes
        tl.store(bound, high)
        tl.store(slots + place, slot, mask=stays)
        tl.store(partner + place, tl.where(reciprocal, near, slot), mask=stays)
        tl.store(name + place, own, mask=stays)
        tl.store(size + place, own_size + tl.where(reciprocal, other_size, 0), mask=stays)
        if stay < 2:
            stay = left * 0
    tl.debug_barrier()
    return stay


@triton.jit
@no_type_check
def _join(
    source, target, far, nearest, slots, partner, size, left, tokens, start,
    average: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """`rows` rows of the smaller matrix, from `start` on, and their nearest neighbours.

    Average linkage keeps the sums of all distances between the members of two clusters. They are
    exact, so it does not matter in which order they are added up; one division makes a mean.
    """
    row = start + tl.arange(0, rows)
    row_here = row < left
    row_slot = tl.load(slots + row, mask=row_here, other=0)
    row_partner = tl.load(partner + row, mask=row_here, other=0)
    row_size = tl.load(size + row, mask=row_here, other=1)
    best = tl.full([rows], float("inf"), source.dtype.element_ty)
    where = tl.zeros([rows], tl.int32)
    for column_start in range(0, left, columns):
        column = column_start + tl.arange(0, columns)
        column_here = column < left
        column_slot = tl.load(slots + column, mask=column_here, other=0)
        column_partner = tl.load(partner + column, mask=column_here, other=0)
        inside = row_here[:, None] & column_here[None, :]
        row_merged = inside & (row_partner != row_slot)[:, None]
        column_merged = inside & (column_partner != column_slot)[None, :]
        # Each of the two clusters has one part or two, so that there are up to four distances.
        # Those that do not exist are read as 0, which changes neither a sum nor a maximum.
        one, two = row_slot[:, None] * tokens, row_partner[:, None] * tokens
        three, four = column_slot[None, :], column_partner[None, :]
        value = tl.load(source + one + three, mask=inside, other=0.0)
        right = tl.load(source + one + four, mask=column_merged, other=0.0)
        below = tl.load(source + two + three, mask=row_merged, other=0.0)
        across = tl.load(source + two + four, mask=row_merged & column_merged, other=0.0)
        if average:
            value = (value + right) + (below + across)
        else:
            value = tl.maximum(tl.maximum(value, right), tl.maximum(below, across))
        value = tl.where(inside & (row[:, None] != column[None, :]), value, float("inf"))
        tl.store(target + row[:, None] * tokens + column[None, :], value, mask=inside)
        if average:
            column_size = tl.load(size + column, mask=column_here, other=1)
            value = value / (row_size[:, None] * column_size[None, :])
        best, where = _nearer(value, column_start, best, where)
    tl.store(far + row, best, mask=row_here)
    tl.store(nearest + row, where, mask=row_here)


# Single linkage


@triton.jit
@no_type_check
def _tree_kernel(
    symmetric, far, nearest, component, parent, least, edges, grows, tokens, merges,
    jumps: tl.constexpr, block: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """All rounds of a sample. A program has one sample."""
    sample = tl.program_id(0).to(tl.int64)
    at = sample * tokens
    more = tl.load(grows + sample)
    while more > 0:
        more = _grow(
            far + at, nearest + at, component + at, parent + at, least + at, edges + at,
            tokens, merges, jumps, block,
        )  # fmt: skip
        for start in range(0, more * tokens, rows):
            _leave(
                symmetric + at * tokens, far + at, nearest + at, component + at,
                tokens, start, rows, columns,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit
@no_type_check
def _hook_kernel(
    far, nearest, component, parent, least, edges, grows, tokens, merges,
    jumps: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The first half of a round. A program has one sample."""
    sample = tl.program_id(0).to(tl.int64)
    at = sample * tokens
    if tl.load(grows + sample) > 0:
        more = _grow(
            far + at, nearest + at, component + at, parent + at, least + at, edges + at,
            tokens, merges, jumps, block,
        )  # fmt: skip
        tl.store(grows + sample, more)


@triton.jit
@no_type_check
def _leave_kernel(
    symmetric, far, nearest, component, grows, tokens, rows: tl.constexpr, columns: tl.constexpr
):
    """The second half of a round. A program has `rows` rows of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    at = sample * tokens
    if tl.load(grows + sample) > 0:
        _leave(
            symmetric + at * tokens, far + at, nearest + at, component + at,
            tokens, tl.program_id(0) * rows, rows, columns,
        )  # fmt: skip


@triton.jit
@no_type_check
def _forest_kernel(
    edges, longest, component, parent, least, tokens, jumps: tl.constexpr, block: tl.constexpr
):
    """Connects what the edges up to `longest` connect. A program has one sample."""
    sample = tl.program_id(0).to(tl.int64)
    at = sample * tokens
    last = tl.load(longest + sample)
    more = tokens
    while more > 0:
        more = _connect(
            edges + at, last, component + at, parent + at, least + at, tokens, jumps, block
        )


@triton.jit
@no_type_check
def _grow(
    far, nearest, component, parent, least, edges, tokens, merges,
    jumps: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Joins every component of a sample with the nearest one, and notes the edges.

    Returns 1, or 0 when the `merges` least edges are known.
    """
    token = tl.arange(0, block)
    here = token < tokens
    distance = tl.load(far + token, mask=here, other=float("inf"))
    near = tl.load(nearest + token, mask=here, other=0)
    inside = tl.load(component + token, mask=here, other=0)
    # An edge is one integer, which sorts as (distance, smaller token, larger token). Of equally
    # near tokens `near` is the first, which makes the least edge, whichever end is the smaller.
    bits = distance.to(tl.int32, bitcast=True).to(tl.int64)
    low, high = tl.minimum(token, near).to(tl.int64), tl.maximum(token, near).to(tl.int64)
    edge = (bits << (2 * TOKEN_BITS)) | (low << TOKEN_BITS) | high
    tl.store(least + token, tl.full([block], NO_EDGE, tl.int64), mask=here)
    tl.debug_barrier()
    leaves = here & (distance < float("inf"))
    tl.atomic_min(least + inside, edge, mask=leaves, sem="relaxed")
    tl.debug_barrier()
    chosen = tl.load(least + token, mask=here, other=NO_EDGE)

    # Edges that are found later are longer than the shortest of those found now. So if `merges` of
    # the tree's edges are shorter than that one, the result is known.
    made = tl.load(edges + token, mask=here, other=NO_EDGE)
    known = tl.sum((made < tl.min(chosen, axis=0)).to(tl.int32), axis=0)
    more = (known < merges).to(tl.int32)
    if more > 0:
        absorbed = _hook(chosen, component, parent, tokens, jumps, block)
        tl.store(edges + token, chosen, mask=absorbed)
    tl.debug_barrier()
    return more


@triton.jit
@no_type_check
def _connect(
    edges, last, component, parent, least, tokens, jumps: tl.constexpr, block: tl.constexpr
):
    """Joins components as `_grow` does, but with the edges up to `last` to choose from.

    Returns how many of them led from one component to another.
    """
    token = tl.arange(0, block)
    here = token < tokens
    edge = tl.load(edges + token, mask=here, other=NO_EDGE)
    kept = here & (edge <= last)
    one, other = _ends(edge)
    from_one = tl.load(component + one, mask=kept, other=0)
    from_other = tl.load(component + other, mask=kept, other=0)
    connects = kept & (from_one != from_other)
    more = tl.sum(connects.to(tl.int32), axis=0)
    if more > 0:
        tl.store(least + token, tl.full([block], NO_EDGE, tl.int64), mask=here)
        tl.debug_barrier()
        tl.atomic_min(least + from_one, edge, mask=connects, sem="relaxed")
        tl.atomic_min(least + from_other, edge, mask=connects, sem="relaxed")
        tl.debug_barrier()
        chosen = tl.load(least + token, mask=here, other=NO_EDGE)
        _hook(chosen, component, parent, tokens, jumps, block)
    tl.debug_barrier()
    return more


@triton.jit
@no_type_check
def _hook(chosen, component, parent, tokens, jumps: tl.constexpr, block: tl.constexpr):
    """Joins every component with the one at the other end of the edge that it chose.

    Renews `component`. Returns which components have another name now.
    """
    token = tl.arange(0, block)
    here = token < tokens
    chooses = here & (chosen < NO_EDGE)
    one, other = _ends(chosen)
    across = tl.load(component + one, mask=chooses, other=0)
    across += tl.load(component + other, mask=chooses, other=0) - token
    above = tl.where(chooses, across, token)
    tl.store(parent + token, above, mask=here)
    tl.debug_barrier()
    # Whoever follows the chosen edges comes to two components that chose the same edge, and point
    # at each other. The smaller of the two becomes the root.
    back = tl.load(parent + above, mask=here, other=0)
    above = tl.where((back == token) & (token < above), token, above)
    absorbed = here & (above != token)
    tl.debug_barrier()
    tl.store(parent + token, above, mask=here)
    for _ in range(jumps):
        tl.debug_barrier()
        above = tl.load(parent + above, mask=here, other=0)
        tl.debug_barrier()
        tl.store(parent + token, above, mask=here)
    inside = tl.load(component + token, mask=here, other=0)
    tl.debug_barrier()
    tl.store(component + token, tl.load(parent + inside, mask=here, other=0), mask=here)
    tl.debug_barrier()
    return absorbed


@triton.jit
@no_type_check
def _ends(edge):
    """The two tokens of an edge; not tokens at all for `NO_EDGE`."""
    one = ((edge >> TOKEN_BITS) & TOKEN_MASK).to(tl.int32)
    return one, (edge & TOKEN_MASK).to(tl.int32)


@triton.jit
@no_type_check
def _leave(
    symmetric, far, nearest, component, tokens, start, rows: tl.constexpr, columns: tl.constexpr
):
    """The nearest neighbours outside their own component of `rows` tokens, from `start` on."""
    row = start + tl.arange(0, rows)
    row_here = row < tokens
    row_component = tl.load(component + row, mask=row_here, other=0)
    best = tl.full([rows], float("inf"), tl.float32)
    where = tl.zeros([rows], tl.int32)
    for column_start in range(0, tokens, columns):
        column = column_start + tl.arange(0, columns)
        column_here = column < tokens
        column_component = tl.load(component + column, mask=column_here, other=0)
        outside = row_component[:, None] != column_component[None, :]
        outside = outside & row_here[:, None] & column_here[None, :]
        value = tl.load(
            symmetric + row[:, None] * tokens + column[None, :], mask=outside, other=float("inf")
        )
        best, where = _nearer(value, column_start, best, where)
    tl.store(far + row, best, mask=row_here)
    tl.store(nearest + row, where, mask=row_here)
