"""Plots as SVG inside of the page, so that their colours follow the theme of the page.

Text and axes take the page's own colours. Series have the classes `series-0` to `series-9`, whose
colours `static/site.css` sets for light and dark themes. Each has a shape, too, so that nobody has
to tell them apart by colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

SERIES = 10
"""The number of series that can be told apart."""

_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",  # disc
    "M-3.6 -3.6H3.6V3.6H-3.6Z",  # square
    "M0 -4.6L4.4 3.4H-4.4Z",  # triangle
    "M0 -5L5 0L0 5L-5 0Z",  # diamond
    "M0 4.6L4.4 -3.4H-4.4Z",  # triangle on its tip
)
_WIDTH = 440  # as narrow as a phone, on which text would otherwise become small
_LEFT, _RIGHT, _TOP = 36, 16, 14


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    up: str,
    ceiling: tuple[str, Sequence[tuple[float, float]]],
) -> str:
    """Lines with a mark at each point, and a legend below.

    Args:
        series: points of each line, by name.
        across, up: the titles of the axes.
        ceiling: name and points of a dashed line that is none of the series.
    """
    everything = [point for points in (*series.values(), ceiling[1]) for point in points]
    top = _TOP + 14
    bottom = top + 240
    x_ticks = sorted({x for x, _ in everything})
    y_ticks = _ticks(min(1.0, *(y for _, y in everything)), max(y for _, y in everything))

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - x_ticks[0]) / ((x_ticks[-1] - x_ticks[0]) or 1)
        height = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        wide = _WIDTH - _LEFT - _RIGHT - 24
        return _LEFT + 12 + share * wide, bottom - height * (bottom - top)

    body = []
    for y in y_ticks:
        at = place(x_ticks[0], y)[1]
        body.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        body.append(_text(_LEFT - 8, at + 4, f"{y:g}", "end"))
    for x in x_ticks:
        body.append(_text(place(x, 1)[0], bottom + 20, f"{x:g}", "middle"))
    body.append(_text((_LEFT + _WIDTH) / 2, bottom + 42, across, "middle"))
    body.append(_text(4, 12, up, "start"))
    body.append(f'<path class="ceiling" d="{_path(place(*p) for p in ceiling[1])}"/>')
    for number, (name, points) in enumerate(series.items()):
        kind = f"series-{number % SERIES}"
        body.append(f'<path class="line {kind}" d="{_path(place(*p) for p in points)}"/>')
        for x, y in points:
            body.append(_mark(*place(x, y), number, f"{name}, {across} {x:g}: {y:.2f}"))
    names = [ceiling[0], *series]
    columns, row = 4 if max(map(len, names)) < 9 else 3, 22
    legend = bottom + 66
    for number, name in enumerate(names):
        x = 16 + (number % columns) * (_WIDTH - 16) / columns
        y = legend + number // columns * row
        if number:
            body.append(_mark(x + 6, y, number - 1))
        else:
            body.append(f'<path class="ceiling" d="M{x - 8} {y}H{x + 14}"/>')
        body.append(_text(x + 20, y + 4, name, "start"))
    height = legend + (len(names) - 1) // columns * row + 20
    return _svg(height, body, f"{up} against {across}: {', '.join(names)}")


def rows(
    values: Mapping[str, Sequence[tuple[str, float]]], across: str, line: float, low: float
) -> str:
    """A row for each name, with a mark for each of its values, and a line to compare values with.

    Args:
        values: for each name, pairs of a kind and a value.
        across: the title of the axis.
        line: the value at which the line stands.
        low: where the axis begins, unless a value is lower.
    """
    kinds = list(dict.fromkeys(kind for pairs in values.values() for kind, _ in pairs))
    found = [value for pairs in values.values() for _, value in pairs]
    ticks = _ticks(min(low, *found), max(line, *found))
    left, row = 16 + 7.4 * max(map(len, values)), 24
    bottom = _TOP + row * len(values) + 6

    def place(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_WIDTH - _RIGHT - 8 - left)

    body = []
    for tick in ticks:
        body.append(f'<path class="grid" d="M{place(tick):.1f} {_TOP}V{bottom}"/>')
        body.append(_text(place(tick), bottom + 18, f"{tick:g}", "middle"))
    body.append(f'<path class="ceiling" d="M{place(line):.1f} {_TOP}V{bottom}"/>')
    body.append(_text((left + _WIDTH) / 2, bottom + 40, across, "middle"))
    for number, (name, pairs) in enumerate(values.items()):
        y = _TOP + row * (number + 0.5) + 3
        body.append(_text(left - 10, y + 4, name, "end"))
        for kind, value in pairs:
            title = f"{name}, {kind}: {value:.2f}"
            body.append(_mark(place(value), y, kinds.index(kind), title))
    height = bottom + 52
    if len(kinds) > 1:
        for number, kind in enumerate(kinds):
            x = 16 + number * (_WIDTH - 16) / len(kinds)
            body.append(_mark(x + 6, height + 12, number))
            body.append(_text(x + 18, height + 16, kind, "start"))
        height += 28
    return _svg(height, body, f"{across} of {', '.join(values)}")


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers, the first at most `low`, the last at least `high`."""
    span = max(high - low, 1e-6)
    step = next(
        base * 10**power
        for power in range(-6, 9)
        for base in (1, 2, 5)
        if span / (base * 10**power) <= 7
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _mark(x: float, y: float, number: int, title: str = "") -> str:
    shape = _SHAPES[number % len(_SHAPES)]
    told = f"<title>{escape(title)}</title>" if title else ""
    kind = f"mark series-{number % SERIES}"
    return f'<path class="{kind}" transform="translate({x:.1f} {y:.1f})" d="{shape}">{told}</path>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, body: Sequence[str], told: str) -> str:
    return (
        f'<figure class="plot"><svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(told, quote=True)}">{"".join(body)}</svg></figure>'
    )
