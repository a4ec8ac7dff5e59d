"""Schedules as numbers of tokens: the cheapest ones, and small changes of one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from tokred.measure.advise.costs import Costs

LEVELS = 40
"""How many numbers of tokens the search chooses from."""

Stations: TypeAlias = tuple[tuple[int, int], ...]
"""The reductions of a schedule: layers, and the tokens that are left behind each of them."""


def levels_of(tokens: int) -> list[int]:
    """The numbers of tokens that the search chooses from, falling from all to a sixteenth."""
    least = max(1, tokens // 16)
    steps = [tokens * (least / tokens) ** (i / (LEVELS - 1)) for i in range(LEVELS)]
    return sorted({round(step) for step in steps}, reverse=True)


def best_schedules(
    levels: Sequence[int], harms: Any, costs: Costs
) -> list[tuple[float, tuple[int, ...]]]:
    """The schedules that disturb least for their time, with their predicted speed-ups, the slowest
    first. For the arguments see `cheapest`."""
    found: dict[tuple[int, ...], float] = {}
    # If nothing disturbs the model, any price finds the fastest schedule.
    there = harms[harms > 0] if (harms > 0).any() else np.ones(1)
    least, most = there.min() / costs.dense / 100, there.max() / costs.dense * 100
    for price in np.geomspace(least, most, 60):
        counts = cheapest(levels, harms, costs, float(price))
        found[counts] = costs.speed_up((levels[0], *counts))
    return sorted((speed, counts) for counts, speed in found.items())


def cheapest(levels: Sequence[int], harms: Any, costs: Costs, price: float) -> tuple[int, ...]:
    """The schedule for which disturbance + price * seconds is least: tokens after each layer.

    Args:
        levels: numbers of tokens to choose from, falling; the first is that of all tokens.
        harms: how much it disturbs the model to go on with a level from a layer on: [layers,
            levels].
        costs: the seconds of blocks.
        price: of a second.
    """
    layers, many = harms.shape
    n = np.array(levels)
    before, after = n[:, None], n[None, :]
    time = costs.step(before, after)  # [from, to]
    # Tokens never become more, and at most half of them go at once: no more can be paired.
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


def stations_of(tokens: int, counts: Sequence[int]) -> Stations:
    """The reductions of a schedule, given its tokens after each layer."""
    steps = enumerate(itertools.pairwise((tokens, *counts)))
    return tuple((layer, after) for layer, (before, after) in steps if after < before)


def unrolled(stations: Stations, tokens: int, layers: int) -> tuple[int, ...]:
    """The tokens after each layer."""
    counts, now, left = [], tokens, dict(stations)
    for layer in range(layers):
        now = left.get(layer, now)
        counts.append(now)
    return tuple(counts)


def straight(tokens: int, layers: int, layer: int, few: int) -> tuple[int, ...]:
    """The schedule with all tokens before a layer, and few tokens from it on. If these are less
    than half, they are reached in several layers."""
    counts, now = [], tokens
    for each in range(layers):
        if each >= layer:
            now = max(few, now - now // 2)
        counts.append(now)
    return tuple(counts)


def scaled(
    stations: Stations, costs: Costs, tokens: int, layers: int, speed: float
) -> Stations | None:
    """The same reductions, with all numbers of tokens multiplied by the one factor that should give
    the model this speed-up; None if there is no such factor."""

    def at(factor: float) -> Stations:
        kept, before = [], tokens
        for layer, count in stations:
            after = max(1, min(before, round(factor * count)))
            if after < before:
                kept.append((layer, after))
            before = after
        return tuple(kept)

    def gain(factor: float) -> float:
        return costs.speed_up((tokens, *unrolled(at(factor), tokens, layers)))

    low, high = 1e-3, tokens / min(count for _, count in stations)
    if gain(low) < speed:
        return None
    for _ in range(24):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gain(middle) >= speed else (low, middle)
    return at(low)


def neighbours(stations: Stations, tokens: int, layers: int) -> list[Stations]:
    """The same reductions, with one of them a layer earlier or later, or a little stronger or
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
