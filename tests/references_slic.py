"""Token clustering and reconstruction in slow, obvious Python and float64: token by token.

Written from the paper's equations, with none of the library's code. Only tests import it.
"""

from __future__ import annotations

import math

import numpy as np


def pool(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Adaptive average pooling of [H, W, C]: cell i of h is the mean of the rows from
    floor(i H / h) to ceil((i + 1) H / h)."""
    height, width, dim = x.shape
    centres = np.zeros((*grid, dim))
    for i in range(grid[0]):
        rows = slice(math.floor(i * height / grid[0]), math.ceil((i + 1) * height / grid[0]))
        for j in range(grid[1]):
            columns = slice(math.floor(j * width / grid[1]), math.ceil((j + 1) * width / grid[1]))
            centres[i, j] = x[rows, columns].reshape(-1, dim).mean(0)
    return centres


def candidates(
    place: tuple[int, int], fine: tuple[int, int], grid: tuple[int, int], neighbourhood: int
) -> list[tuple[int, int]]:
    """The cells around the one that a token falls into, those outside of the grid left out."""
    i, j = (n * few // many for n, few, many in zip(place, grid, fine, strict=True))
    around = range(-(neighbourhood // 2), neighbourhood // 2 + 1)
    cells = [(i + di, j + dj) for di in around for dj in around]
    return [(a, b) for a, b in cells if 0 <= a < grid[0] and 0 <= b < grid[1]]


def assignment(
    x: np.ndarray, centres: np.ndarray, neighbourhood: int, tau: float
) -> dict[tuple[int, int], dict[tuple[int, int], float]]:
    """Equation 2: the part of every token that goes into each of its candidates."""
    fine, grid = x.shape[:2], centres.shape[:2]
    parts = {}
    for place in np.ndindex(*fine):
        cells = candidates(place, fine, grid, neighbourhood)
        distance = np.array([((x[place] - centres[cell]) ** 2).sum() for cell in cells])
        weight = np.exp(-(distance - distance.min()) / tau)
        parts[place] = dict(zip(cells, weight / weight.sum(), strict=True))
    return parts


def means(
    x: np.ndarray,
    size: np.ndarray,
    parts: dict[tuple[int, int], dict[tuple[int, int], float]],
    grid: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Equation 3 with its denominator, and the denominator; a token of size s counts s times."""
    summed, total = np.zeros((*grid, x.shape[2])), np.zeros(grid)
    for place, weights in parts.items():
        for cell, weight in weights.items():
            summed[cell] += weight * size[place] * x[place]
            total[cell] += weight * size[place]
    return summed / total[..., None], total


def cluster(
    x: np.ndarray, grid: tuple[int, int], neighbourhood: int, iterations: int, tau: float
) -> np.ndarray:
    """All centres of an image [H, W, C], row by row."""
    centres = pool(x, grid)
    for _ in range(iterations):
        parts = assignment(x, centres, neighbourhood, tau)
        centres, _ = means(x, np.ones(x.shape[:2]), parts, grid)
    return centres.reshape(-1, x.shape[2])


def reconstruct(
    before: np.ndarray, centres_before: np.ndarray, centres_after: np.ndarray, k: int, tau: float
) -> np.ndarray:
    """Equation 4, with weights that add up to 1."""
    tokens = []
    for token in before:
        distance = ((token - centres_before) ** 2).sum(1)
        nearest = sorted(range(len(distance)), key=lambda m: distance[m])[:k]
        weight = np.exp(-(distance[nearest] - distance[nearest[0]]) / tau)
        tokens.append((weight / weight.sum()) @ centres_after[nearest])
    return np.stack(tokens)
