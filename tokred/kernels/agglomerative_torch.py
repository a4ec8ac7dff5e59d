"""Exact agglomerative clustering of a batch of distance matrices, in plain PyTorch.

Single, complete and average linkage are reducible: a merge never brings the new cluster nearer
to a third one than its parts were. So all pairs of clusters that are each other's nearest may
merge in the same round, and the dendrogram is that of one merge at a time (Murtagh, "A survey of
recent advances in hierarchical clustering algorithms", The Computer Journal 26, 1983, section 3).
Single linkage forms chains, which take many such rounds; it is read off the minimum spanning
tree instead, grown in at most log2(tokens) rounds (Boruvka 1926; Gower and Ross, "Minimum spanning
trees and single linkage cluster analysis", Applied Statistics 18, 1969).

Ties are decided by a total order, so that every backend returns the same partition. A cluster is
named by its smallest token; of equally near pairs of clusters that with the smaller first name
comes first, then that with the smaller second name. For single linkage the same holds of pairs of
tokens. The merges that are made are the least in that order.

Synchronisation with a CUDA device: none for single linkage; for the others, whose number of rounds
depends on what is clustered, once in four rounds for the whole batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokred.maps import in_order_of_first_member, take

# An edge between two tokens is one integer that sorts as (distance, smaller token, larger token):
# the bits of a float32 that is not negative are in the order of its values.
TOKEN_BITS = 16
MAX_TOKENS = 2**TOKEN_BITS
NO_EDGE = 2**63 - 1


def cluster(
    distance: Float[Tensor, "batch tokens tokens"], num_clusters: int, linkage: str
) -> Int[Tensor, "batch tokens"]:
    """Merges the closest clusters of every sample until `num_clusters` are left.

    Args:
        distance: float32, not negative and not NaN. Only what is above the diagonal is looked at.
            Average linkage is exact where all values are multiples of 2^-24 up to 2, as 1 - cosine
            is: sums of these are exact in float64.
        num_clusters: in [1, tokens].
        linkage: "single", "complete" or "average".

    Returns:
        The cluster of every token, int64, numbered in the order of their first tokens.

    Raises:
        ValueError: more than 65536 tokens.
    """
    batch, tokens, _ = distance.shape
    if tokens > MAX_TOKENS:
        raise ValueError(f"at most {MAX_TOKENS} tokens can be clustered, not {tokens}")
    merges = tokens - num_clusters
    if merges == 0 or batch == 0:
        return torch.arange(tokens, device=distance.device).repeat(batch, 1)
    if linkage == "single":
        edges = _spanning_tree(distance, merges)
        return components(edges, edges.kthvalue(merges, dim=1).values)
    height, into = _dendrogram(distance, merges, linkage)
    return cut(height, into, merges)


# Complete and average linkage: rounds of reciprocal nearest neighbours


def cut(
    height: Float[Tensor, "batch tokens"], into: Int[Tensor, "batch tokens"], merges: int
) -> Int[Tensor, "batch tokens"]:
    """The clusters that the `merges` least merges of a dendrogram leave, in order.

    Args:
        height: at which distance the cluster named by a token was absorbed; infinite for a token
            that still names a cluster.
        into: the smaller token that names the cluster it was absorbed by.
        merges: the number of merges to make; at least that many heights must be finite.
    """
    token = torch.arange(height.shape[1], device=height.device).expand_as(into)
    least = _ascending(height, into)[:, :merges]
    parent = token.scatter(1, least, into.gather(1, least))
    root = _roots(parent)
    return ((root == token).cumsum(1) - 1).gather(1, root)


def _dendrogram(
    distance: Float[Tensor, "batch tokens tokens"], merges: int, linkage: str
) -> tuple[Float[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Height and parent of every absorbed token, as `cut` takes them.

    The `merges` least merges are certain to be there. There may be others, which need not be right.

    Every cluster has a slot, which is its row and column in the matrix of distances; slots are in
    the order of the clusters' names. The last slot stays empty, infinitely far from all others:
    what is to be written nowhere is written there.
    """
    batch, tokens, _ = distance.shape
    average = linkage == "average"
    # Of two clusters, average linkage keeps the sum of all distances between their members. Such
    # sums are exact, so that the order in which they are added up changes nothing.
    dtype = torch.float64 if average else torch.float32
    linked = _symmetric(distance, dtype)
    size = linked.new_ones(batch, tokens + 1)
    name = torch.arange(tokens + 1, device=distance.device).repeat(batch, 1)
    height = linked.new_full((batch, tokens + 1), math.inf)
    into = torch.full_like(name, tokens)

    rounds_per_look = _rounds_per_look(distance.device)
    for done in range(1, merges + 1):  # every round makes one merge at least
        far, nearest = (_mean(linked, size) if average else linked).min(-1)
        slot = torch.arange(far.shape[1], device=far.device)
        partner_name = name.gather(1, nearest)

        # Two clusters merge if each is the other's nearest. The one in the later slot, which has
        # the larger name, is absorbed.
        reciprocal = (nearest.gather(1, nearest) == slot) & (far < math.inf)
        absorbed = reciprocal & (nearest < slot)
        token = torch.where(absorbed, name, tokens)
        height.scatter_(1, token, far)
        into.scatter_(1, token, partner_name)

        # Once `merges` merges are made, a cluster whose nearest one is further away than the last
        # of these merges has no part in the result, because merging never brings clusters nearer
        # to one another. It is left out from here on.
        bound_height, bound_into, bound_token = _last(height[:, :tokens], into[:, :tokens], merges)
        first, second = torch.minimum(name, partner_name), torch.maximum(name, partner_name)
        earlier = (first < bound_into) | ((first == bound_into) & (second < bound_token))
        matters = (far < bound_height) | ((far == bound_height) & (far < math.inf) & earlier)
        stays = matters & ~absorbed

        room = far.shape[1] - 1
        if done % rounds_per_look == 0:
            room = int(stays.sum(1).max())
            if room < 2:
                break
        slots = _packed(stays, room)
        merged = reciprocal.gather(1, slots)
        partner = torch.where(merged, nearest.gather(1, slots), slots)
        linked = _join(linked, slots, partner, merged, average)
        linked = _join(linked.transpose(1, 2), slots, partner, merged, average)
        linked.diagonal(dim1=1, dim2=2).fill_(math.inf)
        size = size.gather(1, slots) + size.gather(1, partner) * merged
        name = name.gather(1, slots)
    return height[:, :tokens], into[:, :tokens]


def _mean(
    linked: Float[Tensor, "batch slots slots"], size: Float[Tensor, "batch slots"]
) -> Float[Tensor, "batch slots slots"]:
    """Mean distances from their sums: one division, so that equal means are equal numbers."""
    pairs = size[:, :, None] * size[:, None, :]
    return torch.div(linked, pairs, out=pairs)


def _join(
    linked: Float[Tensor, "batch rows columns"],
    slots: Int[Tensor, "batch coarse"],
    partner: Int[Tensor, "batch coarse"],
    merged: Bool[Tensor, "batch coarse"],
    average: bool,
) -> Float[Tensor, "batch coarse columns"]:
    """The rows at `slots`, each joined with its partner's where there is one."""
    rows, others = take(linked, slots), take(linked, partner)
    if average:
        return rows.add_(others.masked_fill_(~merged[..., None], 0))
    return torch.maximum(rows, others, out=rows)


def _ascending(
    height: Float[Tensor, "batch tokens"], into: Int[Tensor, "batch tokens"]
) -> Int[Tensor, "batch tokens"]:
    """The absorbed tokens, ordered by (height, name of the cluster that absorbs, token)."""
    by_name = into.argsort(dim=1, stable=True)
    return by_name.gather(1, height.gather(1, by_name).argsort(dim=1, stable=True))


def _last(
    height: Float[Tensor, "batch tokens"], into: Int[Tensor, "batch tokens"], merges: int
) -> tuple[Float[Tensor, "batch 1"], Int[Tensor, "batch 1"], Int[Tensor, "batch 1"]]:
    """Height and both names of the last of the `merges` least merges; infinite if too few."""
    token = _ascending(height, into)[:, merges - 1 : merges]
    return height.gather(1, token), into.gather(1, token), token


# Single linkage: the minimum spanning tree


def components(
    edges: Int[Tensor, "batch tokens"], longest: Int[Tensor, " batch"]
) -> Int[Tensor, "batch tokens"]:
    """The clusters that a forest's edges up to `longest` connect, in order.

    Args:
        edges: one integer each, see `TOKEN_BITS`; `NO_EDGE` where there is none.
        longest: in every sample, the last edge that connects.
    """
    tokens = edges.shape[1]
    component = torch.arange(tokens, device=edges.device).repeat(edges.shape[0], 1)
    one, other = _ends(edges, tokens)
    # The same rounds as those in which the tree has grown, but with few edges to choose from.
    for _ in range((tokens - 1).bit_length()):
        ends = component.gather(1, one), component.gather(1, other)
        connects = (edges <= longest[:, None]) & (ends[0] != ends[1])
        leaving = torch.where(connects, edges, NO_EDGE)
        least = torch.full_like(edges, NO_EDGE)
        for end in ends:
            least.scatter_reduce_(1, end, leaving, "amin")
        component = _hook(least, component).gather(1, component)
    return in_order_of_first_member(component)


def _spanning_tree(
    distance: Float[Tensor, "batch tokens tokens"], merges: int
) -> Int[Tensor, "batch tokens"]:
    """The edges of the minimum spanning tree: tokens - 1 of them, and `NO_EDGE` in the last place.

    The `merges` least edges are certain to be there. Where looking at a number costs nothing (on
    the CPU), tokens that none of these edges can reach any more are left out of later rounds.
    """
    batch, tokens, _ = distance.shape
    far = _symmetric(distance, torch.float32)
    everywhere = torch.arange(tokens, device=distance.device).repeat(batch, 1)
    component, name = everywhere, torch.arange(tokens + 1, device=distance.device).repeat(batch, 1)
    edges = torch.full_like(everywhere, NO_EDGE)
    for _ in range((tokens - 1).bit_length()):  # every round halves the number of components
        # For each token the least edge to another component, then the least of each component.
        # Of equally near tokens the first makes the least edge, whichever end is the smaller.
        best, nearest = far.min(-1)
        leaving = _edge(best, name, name.gather(1, nearest))
        least = torch.full((batch, tokens + 1), NO_EDGE, device=distance.device)
        inside = F.pad(component, (0, 1), value=tokens).gather(1, name)
        least = least.scatter_reduce(1, inside, leaving, "amin")[:, :tokens]
        root = _hook(least, component)
        edges = torch.where((root != everywhere) & (least < NO_EDGE), least, edges)
        component = root.gather(1, component)

        if _rounds_per_look(distance.device) == 1:
            bound = edges.kthvalue(merges, dim=1, keepdim=True).values
            stays = leaving < bound
            room = int(stays.sum(1).max())
            if room < 2:
                break
            slots = _packed(stays, room)
            name = name.gather(1, slots)
            far = take(take(far, slots).transpose(1, 2), slots)
        inside = F.pad(component, (0, 1), value=tokens).gather(1, name)
        far.masked_fill_(inside[:, :, None] == inside[:, None, :], math.inf)
    return edges


def _hook(
    least: Int[Tensor, "batch tokens"], component: Int[Tensor, "batch tokens"]
) -> Int[Tensor, "batch tokens"]:
    """Joins every component with the one at the other end of its least edge.

    Args:
        least: for a token that names a component, its least edge that leaves it; `NO_EDGE` else.
        component: the name of every token's component.

    Returns:
        The new name of every component (that of one of those that it has come from).
    """
    token = torch.arange(least.shape[1], device=least.device).expand_as(least)
    one, other = _ends(least, least.shape[1])
    across = component.gather(1, one) + component.gather(1, other) - token
    parent = torch.where(least < NO_EDGE, across, token)
    # Whoever follows the chosen edges comes to two components that chose the same edge, and point
    # at each other. The smaller of the two becomes the root.
    both = parent.gather(1, parent) == token
    return _roots(torch.where(both & (token < parent), token, parent))


def _edge(
    far: Float[Tensor, "batch slots"],
    one: Int[Tensor, "batch slots"],
    other: Int[Tensor, "batch slots"],
) -> Int[Tensor, "batch slots"]:
    """An edge as one integer; `NO_EDGE` if it is infinitely long."""
    ends = (torch.minimum(one, other) << TOKEN_BITS) | torch.maximum(one, other)
    edge = (far.view(torch.int32).to(torch.int64) << (2 * TOKEN_BITS)) | ends
    return torch.where(far < math.inf, edge, NO_EDGE)


def _ends(
    edges: Int[Tensor, "batch edges"], tokens: int
) -> tuple[Int[Tensor, "batch edges"], Int[Tensor, "batch edges"]]:
    """The two tokens of an edge; any two tokens for `NO_EDGE`."""
    one, other = (edges >> TOKEN_BITS) & (MAX_TOKENS - 1), edges & (MAX_TOKENS - 1)
    return one.clamp(max=tokens - 1), other.clamp(max=tokens - 1)


# Both


def _rounds_per_look(device: torch.device) -> int:
    """How many rounds run between two looks at how many clusters are left.

    A look lets later rounds work on less, but makes the host wait for the device.
    """
    return 1 if device.type == "cpu" else 4


def _symmetric(
    distance: Float[Tensor, "batch tokens tokens"], dtype: torch.dtype
) -> Float[Tensor, "batch slots slots"]:
    """A copy whose lower triangle mirrors the upper one, and one slot more; infinite diagonal."""
    batch, tokens, _ = distance.shape
    out = distance.new_full((batch, tokens + 1, tokens + 1), math.inf, dtype=dtype)
    upper = distance.triu(1)
    # Adding the zeros of the other triangle also makes 0 of -0, whose bits would not sort.
    torch.add(upper, upper.transpose(1, 2), out=out[:, :tokens, :tokens])
    out.diagonal(dim1=1, dim2=2).fill_(math.inf)
    return out


def _packed(stays: Bool[Tensor, "batch slots"], room: int) -> Int[Tensor, "batch coarse"]:
    """The slots that stay, in order, in `room` places; the unused slot fills the rest and one."""
    batch, slots = stays.shape
    place = torch.where(stays, stays.cumsum(1) - 1, slots)
    packed = torch.full((batch, slots + 1), slots - 1, device=stays.device)
    slot = torch.arange(slots, device=stays.device).expand_as(place)
    return packed.scatter_(1, place, slot)[:, : room + 1]


def _roots(parent: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Where one comes to by following parents to the end."""
    for _ in range((parent.shape[1] - 1).bit_length()):
        parent = parent.gather(1, parent)
    return parent
