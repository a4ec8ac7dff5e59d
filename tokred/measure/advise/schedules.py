"""Schedules as a search sees them: the cheapest ones, and small changes of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from tokred.measure.advise.costs import Costs

Stations: TypeAlias = tuple[tuple[int, int], ...]
"""Where a schedule falls: layers, and the tokens that are left behind them."""


def cheapest(levels: Sequence[int], harms: Any, costs: Costs, price: float) -> tuple[int, ...]:
    """The numbers of tokens after each layer for which harm + price * time is least.

    Args:
        levels: numbers of tokens to choose from, falling, all of them first.
        harms: what it does to go on with so many from a layer on: [layers, levels].
        costs: what time it takes.
        price: of a second.
    """
    layers, many = harms.shape
    n = np.array(levels)
    before, after = n[:, None], n[None, :]
    time = costs.step(before, after)  # [from, to]
    # None grows, and none loses more than half at once, which is all that pairs can.
    allowed = (after <= before) & (after >= before - before // 2)
    best = np.full(many, np.inf)
    best[0] = 0.0
    came = np.zeros((layers, many), dtype=int)
    for layer in range(layers):
        harm = np.maximum(0, harms[layer][None, :] - harms[layer][:, None])
        total = np.where(allowed, best[:, None] + harm + price * time, np.inf)
        came[layer] = total.argmin(0)
        best = total.min(0)
    at = int(best.argmin())
    counts = []
    for layer in reversed(range(layers)):
        counts.append(int(n[at]))
        at = int(came[layer, at])
    return tuple(reversed(counts))


def unrolled(stations: Stations, tokens: int, layers: int) -> tuple[int, ...]:
    """The numbers of tokens after each layer."""
    counts, now, left = [], tokens, dict(stations)
    for layer in range(layers):
        now = left.get(layer, now)
        counts.append(now)
    return tuple(counts)


def scaled(
    stations: Stations, costs: Costs, tokens: int, layers: int, speed: float
) -> Stations | None:
    """The same reductions, all more or less of them by the same factor, so that the model should be
    so many times as fast; None if there is no such factor."""

    def at(factor: float) -> Stations:
        kept, before = [], tokens
        for layer, count in stations:
            after = max(1, min(before, round(factor * count)))
            if after < before:
                kept.append((layer, after))
            before = after
        return tuple(kept)

    def gain(factor: float) -> float:
        return costs.dense / costs.time((tokens, *unrolled(at(factor), tokens, layers)))

    low, high = 1e-3, tokens / min(count for _, count in stations)
    if gain(low) < speed:
        return None
    for _ in range(24):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gain(middle) >= speed else (low, middle)
    return at(low)


def neighbours(stations: Stations, tokens: int, layers: int) -> list[Stations]:
    """The same reductions with one of them a layer earlier or later, or a little stronger or
    weaker."""
    found = []
    for i, (layer, count) in enumerate(stations):
        taken = {other for other, _ in stations}
        for step in (-1, 1):
            if 0 <= layer + step < layers and layer + step not in taken:
                found.append((*stations[:i], (layer + step, count), *stations[i + 1 :]))
        before = stations[i - 1][1] if i else tokens
        after = stations[i + 1][1] if i + 1 < len(stations) else 0
        for factor in (0.88, 1.12):
            changed = round(count * factor)
            if after < changed < before:
                found.append((*stations[:i], (layer, changed), *stations[i + 1 :]))
    return found
