"""The clustering methods in slow, obvious Python and float64: one image, one token at a time.

Written from the papers' equations, with none of the library's code. Only tests import it.
"""

from __future__ import annotations

import math

import numpy as np
from references import renumber


def dpc_knn(x: np.ndarray, num_clusters: int, k: int = 5) -> list[int]:
    """The clusters of `density_peaks`."""
    return density_peaks(x, num_clusters, k)[0]


def density_peaks(
    x: np.ndarray, num_clusters: int, k: int = 5
) -> tuple[list[int], list[int], list[float]]:
    """Density peaks (TCFormer, section 3.2); distances over the root of the dimension. The cluster
    of every token, the centre of every cluster, and the score of every token."""
    num, dim = x.shape
    distance = distances(x) / math.sqrt(dim)
    density = []
    for i in range(num):
        nearest = sorted(float(((x[i] - x[j]) ** 2).sum() / dim) for j in range(num))[:k]
        density.append(math.exp(-sum(nearest) / len(nearest)))
    score = []
    for i in range(num):
        to_denser = [distance[i, j] for j in range(num) if density[j] > density[i]]
        score.append(density[i] * min(to_denser, default=distance.max()))
    centres = sorted(sorted(range(num), key=lambda i: (-score[i], i))[:num_clusters])
    joined = join(distance, centres)
    return renumber(joined), list(dict.fromkeys(joined)), score


def kmedoids(
    x: np.ndarray,
    weight: np.ndarray,
    num_clusters: int,
    iterations: int = 3,
    published: bool = False,
) -> tuple[list[int], list[int]]:
    """Weighted k-medoids: the medoid of every token's cluster, and of every cluster, renumbered."""
    num = len(x)
    distance = distances(x)
    medoids = sorted(sorted(range(num), key=lambda i: (-weight[i], i))[:num_clusters])
    for _ in range(iterations):
        joined = join(distance, medoids)
        chosen = []
        for medoid in medoids:
            members = [i for i in range(num) if joined[i] == medoid]
            among = range(num) if published else members

            def cost(i: int, among: list[int] | range = among) -> tuple[float, int]:
                if published:
                    return weight[i] * sum(distance[i, j] for j in among), i
                return sum(weight[j] * distance[i, j] for j in among), i

            chosen.append(min(members, key=cost))
        medoids = sorted(chosen)
    joined = join(distance, medoids)
    return renumber(joined), list(dict.fromkeys(joined))


def pitome(metric: np.ndarray, merges: int, margin: float, alpha: float = 1.0) -> list[int]:
    """Groups after one matching of the tokens with the highest energy (PiToMe, section 3.2)."""
    num = len(metric)
    cosine = cosines(metric)

    def similar(x: float) -> float:
        return x if x >= margin else alpha * (math.exp(x - margin) - 1)

    energy = [sum(similar(cosine[i, j]) for j in range(num)) / num for i in range(num)]
    candidates = sorted(range(num), key=lambda i: (-energy[i], i))[: 2 * merges]
    a, b = candidates[::2], candidates[1::2]
    labels = list(range(num))
    for i in a:
        labels[i] = min(b, key=lambda j: (-cosine[i, j], j))
    return renumber(labels)


def mutual(metric: np.ndarray, size: np.ndarray, num_clusters: int) -> list[int]:
    """Groups after rounds in which the most similar mutual pairs merge."""
    groups = [[token] for token in range(len(metric))]
    while len(groups) > num_clusters:
        mean = np.stack([np.average(metric[g], axis=0, weights=size[g]) for g in groups])
        cosine = cosines(mean)
        nearest = [
            max((j for j in range(len(groups)) if j != i), key=lambda j: (cosine[i, j], -j))
            for i in range(len(groups))
        ]
        pairs = [(i, j) for i, j in enumerate(nearest) if i < j and nearest[j] == i]
        pairs.sort(key=lambda pair: (-cosine[pair], pair))
        pairs = pairs[: len(groups) - num_clusters]
        absorbed = {j for _, j in pairs}
        for i, j in pairs:
            groups[i] = groups[i] + groups[j]
        groups = [group for i, group in enumerate(groups) if i not in absorbed]
    labels = [0] * len(metric)
    for number, group in enumerate(groups):
        for token in group:
            labels[token] = number
    return renumber(labels)


def distances(x: np.ndarray) -> np.ndarray:
    """Euclidean, from differences."""
    return np.array([[math.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])


def cosines(x: np.ndarray) -> np.ndarray:
    """Of all pairs of rows, 0 for a row of zeros; the same for (i, j) as for (j, i)."""
    length = np.sqrt((x**2).sum(1))
    unit = x / np.where(length == 0, 1, length)[:, None]
    return np.array([[(a * b).sum() for b in unit] for a in unit])


def join(distance: np.ndarray, centres: list[int]) -> list[int]:
    """The nearest centre of every token, the first of equals; a centre joins itself."""
    return [
        i if i in centres else min(centres, key=lambda c: (distance[i, c], c))
        for i in range(len(distance))
    ]
