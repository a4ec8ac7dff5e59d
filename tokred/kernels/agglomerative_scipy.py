"""Agglomerative clustering with SciPy's dendrograms, one sample at a time, on the CPU.

The reference for the other backends, and the default without numba. SciPy computes the whole
dendrogram, and decides between equal heights in its own way: where distances are tied, clusters
may differ from those of the other backends.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cluster(
    distance: Float[Tensor, "batch tokens tokens"], num_clusters: int, linkage: str
) -> Int[Tensor, "batch tokens"]:
    """Cuts SciPy's dendrogram of every sample at `num_clusters`.

    Exactly that many clusters, also where heights are tied: there, the merges that absorb the
    earlier tokens are made first.

    Args:
        distance: float32 on the CPU, in [0, 2], without NaN. Only what is above the diagonal is
            read.
        num_clusters: in [1, tokens].
        linkage: "single", "complete" or "average".

    Returns:
        The cluster of every token, int64; clusters are numbered in the order of their first tokens.
    """
    labels = [_cluster_one(sample, num_clusters, linkage) for sample in distance.detach()]
    return torch.tensor(labels, dtype=torch.int64).view(distance.shape[:2])


def _cluster_one(
    distance: Float[Tensor, "tokens tokens"], num_clusters: int, linkage: str
) -> list[int]:
    # SciPy is slow to import, and not needed by other methods.
    from scipy.cluster import hierarchy

    num = len(distance)
    if num == 1:
        return [0]
    row, column = torch.triu_indices(num, num, offset=1)
    merges = hierarchy.linkage(distance[row, column].double().numpy(), linkage)

    # Name every cluster by its first token. Then each token but the first is absorbed once, by
    # an earlier one (`into`), at some height; the lowest of these merges are the ones to make.
    first = list(range(num))
    into, height = [0] * num, [0.0] * num
    pairs = merges[:, :2].astype(int).tolist()
    for (left, right), at in zip(pairs, merges[:, 2].tolist(), strict=True):
        stays, absorbed = sorted((first[left], first[right]))
        first.append(stays)
        into[absorbed], height[absorbed] = stays, at
    order = sorted(range(1, num), key=height.__getitem__)  # stable: ties by token
    merged = set(order[: num - num_clusters])

    labels: list[int] = []
    clusters = 0
    for token in range(num):
        if token in merged:
            labels.append(labels[into[token]])
        else:
            labels.append(clusters)
            clusters += 1
    return labels
