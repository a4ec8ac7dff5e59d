"""Charts as SVG: points against speed-up, and the bars of a profile.

Text is in the colour of the page's own text, the background stays transparent, and the colours of
series are neither dark nor light: so a chart can be read on a light page and on a dark one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tokred.show.markup import escape, paragraph

PARTS = {
    "rest": "block",
    "matching": "matching",
    "merging": "merging",
    "back": "way back",
    "bias": "bias",
}
"""What a block spends its time on, by the names of `tokred.profiling`, in words."""
PART_COLOURS = ("#4477aa", "#e8636f", "#a8891c", "#2a9d8f", "#9b6bd0")
COLOURS = ("#4477aa", "#d9692a", "#2a9d8f", "#b8458a", "#a8891c", "#e8636f", "#3f9a4a", "#8a6fd1")
"""All have a contrast of 3 and more to white and to near-black; neighbours in the list differ in
lightness or in a hue that all eyes can tell. Shapes tell series apart besides."""

_WIDE = 560  # units of a drawing; on a phone, 0.64 pixels each
_LARGE = 19  # size of its letters there, in units
_LETTER = 0.56 * _LARGE  # how wide one of them is


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot.

    Attributes:
        x, y: where it is.
        title: what is shown when the pointer is on it.
        label: what is written beside it, if there is room.
    """

    x: float
    y: float
    title: str
    label: str = ""


def scatter(
    series: Mapping[str, Sequence[Point]],
    line: Sequence[Point],
    cross: Point,
    horizontal: str,
    vertical: str,
    upside_down: bool = False,
) -> str:
    """Series of points, each with a colour and a shape of its own, and a legend. Points that are
    nowhere (NaN, infinite) are not drawn, and it is said how many those are.

    Args:
        series: the points of each series; in this order they are joined by a thin line.
        line: points that are joined by a strong line.
        cross: a point that belongs to no series.
        horizontal, vertical: what the axes are.
        upside_down: whether the vertical axis falls.
    """
    every = [cross, *(point for all_of in series.values() for point in all_of)]
    points = [point for point in every if _somewhere(point)]
    gone = len(every) - len(points)
    lost = paragraph(f"Not drawn, because they are no numbers: {gone}", "small") if gone else ""
    if not points:
        return lost
    series = {name: list(filter(_somewhere, members)) for name, members in series.items()}
    line = list(filter(_somewhere, line))
    across = _ticks([point.x for point in points])
    up = _ticks([point.y for point in points])
    left, right, top, bottom, height = _margin(up), 20, 28, 54, 384

    def at(point: Point) -> tuple[float, float]:
        x = (point.x - across[0]) / (across[-1] - across[0])
        y = (point.y - up[0]) / (up[-1] - up[0])
        y = y if upside_down else 1 - y
        return left + x * (_WIDE - left - right), top + y * (height - top - bottom)

    parts = []
    for tick, told in zip(across, _told(across), strict=True):
        x, _ = at(Point(tick, up[0], ""))
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" '
                     f'y2="{height - bottom}"/>')  # fmt: skip
        parts.append(_text(x, height - bottom + 22, told, "middle"))
    for tick, told in zip(up, _told(up), strict=True):
        _, y = at(Point(across[0], tick, ""))
        parts.append(f'<line class="axis" x1="{left}" x2="{_WIDE - right}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/>')  # fmt: skip
        parts.append(_beside(left, y, told))
    parts.append(_text((left + _WIDE - right) / 2, height - 7, horizontal, "middle"))
    parts.append(_upwards((top + height - bottom) / 2, vertical))
    for (_, members), (colour, _) in zip(series.items(), _looks(), strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, members))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" '
                     'stroke-opacity=".6"/>')  # fmt: skip
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, line))
    parts.append(
        f'<polyline class="front" points="{path}" fill="none" stroke="currentColor" '
        'stroke-width="1.8" stroke-opacity=".75" stroke-dasharray="6 4"/>'
    )
    for (_, members), (colour, shape) in zip(series.items(), _looks(), strict=False):
        for member in members:
            x, y = at(member)
            parts.append(
                f'<g><title>{escape(member.title)}</title><path transform="translate({x:.1f} '
                f'{y:.1f})" d="{shape}" fill="{colour}"/></g>'
            )
    if _somewhere(cross):
        x, y = at(cross)
        parts.append(
            f'<g><title>{escape(cross.title)}</title><path transform="translate({x:.1f} {y:.1f})" '
            f'd="{_CROSS}" fill="none" stroke="currentColor" stroke-width="2.6"/></g>'
        )
    box = (left, top, _WIDE - right, height - bottom)
    parts.extend(_labels([(*at(point), point.label) for point in points], box, [*map(at, line)]))
    legend = [("dense model", f'<path transform="translate(7 7)" d="{_CROSS}" fill="none" '
               'stroke="currentColor" stroke-width="2.2"/>')]  # fmt: skip
    if len(line) > 1:
        dashes = (
            '<path d="M0 7H14" stroke="currentColor" stroke-width="1.8" stroke-dasharray="5 3"/>'
        )
        legend.append(("no setting is both faster and better", dashes))
    legend += [
        (name, f'<path transform="translate(7 7)" d="{shape}" fill="{colour}"/>')
        for name, (colour, shape) in zip(series, _looks(), strict=False)
    ]
    name = f"{vertical} over {horizontal}"
    return _drawing(name, height, parts) + _legend(legend) + lost


def bars(layers: Sequence[tuple[str, float, Sequence[float], float]]) -> str:
    """For each layer a bar of the dense model, in grey, and one stacked of the `PARTS`; and where
    the free limit is.

    Args:
        layers: name, seconds of the dense model, seconds of every part, seconds of the free limit.
    """
    longest = max(max(dense, sum(stack), limit) for _, dense, stack, limit in layers)
    ticks = _ticks([0.0, 1e3 * longest])
    left, right, top, bottom, height = _margin(ticks), 6, 10, 50, 264
    unit = (height - top - bottom) / ticks[-1] * 1e3
    floor = height - bottom
    step = (_WIDE - left - right) / len(layers)
    parts = []
    for tick, told in zip(ticks, _told(ticks), strict=True):
        y = floor - tick / 1e3 * unit
        parts.append(f'<line class="axis" x1="{left}" x2="{_WIDE - right}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/>')  # fmt: skip
        parts.append(_beside(left, y, told))
    every = -(-len(layers) // 14)  # names must not overlap on a phone
    for number, (name, dense, stack, limit) in enumerate(layers):
        x, width = left + (number + 0.1) * step, 0.36 * step
        parts.append(_bar(x, floor, width, dense * unit, "#8f8f8f", f"layer {name}, dense", dense))
        x += width + 0.04 * step
        y = floor
        for (part, colour), seconds in zip(
            zip(PARTS.values(), PART_COLOURS, strict=True), stack, strict=True
        ):
            if seconds > 0:
                told = f"layer {name}, {part}"
                parts.append(_bar(x, y, width, seconds * unit, colour, told, seconds))
                y -= seconds * unit
        y = floor - limit * unit
        parts.append(f'<line x1="{x - 2:.1f}" x2="{x + width + 2:.1f}" y1="{y:.1f}" '
                     f'y2="{y:.1f}" stroke="currentColor" stroke-width="2"/>')  # fmt: skip
        if number % every == 0:
            parts.append(_text(left + (number + 0.48) * step, floor + 19, name, "middle"))
    parts.append(_text((left + _WIDE - right) / 2, height - 7, "layer", "middle"))
    parts.append(_upwards((top + floor) / 2, "ms per batch"))
    used = [any(stack[part] > 0 for _, _, stack, _ in layers) for part in range(len(PARTS))]
    square = '<rect x="1" y="1" width="12" height="12" fill="{}"/>'
    legend = [("dense model", square.format("#8f8f8f"))]
    legend += [
        (part, square.format(colour))
        for part, colour, there in zip(PARTS.values(), PART_COLOURS, used, strict=True)
        if there
    ]
    legend.append(
        ("free limit", '<path d="M0 7H14" stroke="currentColor" stroke-width="2" fill="none"/>')
    )
    return _drawing("milliseconds of every layer", height, parts) + _legend(legend)


_SHAPES = (
    "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z",  # circle
    "M-4.6 -4.6H4.6V4.6H-4.6Z",  # square
    "M0 -6L5.6 4.4H-5.6Z",  # triangle
    "M0 -6.4L6.4 0L0 6.4L-6.4 0Z",  # diamond
    "M0 6L5.6 -4.4H-5.6Z",  # triangle on its tip
    "M-2 -6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",  # plus
    "M0 -6.6L1.7 -2.2L6.3 -2L2.7 .9L3.9 5.3L0 2.8L-3.9 5.3L-2.7 .9L-6.3 -2L-1.7 -2.2Z",  # star
    "M-5.5 -2.5L0 -6L5.5 -2.5V2.5L0 6L-5.5 2.5Z",  # hexagon
    "M-6 -3H6V3H-6Z",  # bar
)
_CROSS = "M-5.5 -5.5L5.5 5.5M-5.5 5.5L5.5 -5.5"


def _looks() -> Iterator[tuple[str, str]]:
    """A colour and a shape for each series. As 8 and 9 have no common divisor, 72 are unlike."""
    number = 0
    while True:
        yield COLOURS[number % len(COLOURS)], _SHAPES[number % len(_SHAPES)]
        number += 1


def _ticks(values: Sequence[float], about: int = 6) -> list[float]:
    """Round numbers at equal distances, about so many, from below the least value to above the
    greatest."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    rough = span / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    return [round(number * step, 10) for number in range(first, last + 1)]


def _somewhere(point: Point) -> bool:
    return math.isfinite(point.x) and math.isfinite(point.y)


def _told(ticks: Sequence[float]) -> list[str]:
    """Numbers in words, all with as many digits behind the point as the longest needs."""
    told = [f"{tick:g}" for tick in ticks]
    if any("e" in each for each in told):
        return told
    digits = max(len(each.partition(".")[2]) for each in told)
    return [f"{tick:.{digits}f}" for tick in ticks]


def _margin(ticks: Sequence[float]) -> int:
    """Room to the left of an axis, for the numbers beside it and what it is called."""
    return math.ceil(36 + _LETTER * max(map(len, _told(ticks))))


def _beside(left: float, y: float, told: str) -> str:
    """A number beside the vertical axis, as far from it as a point on the axis is wide."""
    return f'<text x="{left - 10}" y="{y:.1f}" dy=".35em" text-anchor="end">{told}</text>'


def _upwards(y: float, text: str) -> str:
    """What the vertical axis is."""
    return (
        f'<text transform="translate(15 {y:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(text)}</text>"
    )


def _labels(
    points: Sequence[tuple[float, float, str]],
    box: tuple[float, float, float, float],
    line: Sequence[tuple[float, float]],
) -> list[str]:
    """Labels beside their points, where they touch neither each other nor other points nor the
    line, nor leave the box; those without room are left out."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    for (x, y), (to_x, to_y) in itertools.pairwise(line):
        pieces = 1 + int(math.hypot(to_x - x, to_y - y) / 8)
        for piece in range(1, pieces):
            on_x, on_y = (a + (b - a) * piece / pieces for a, b in ((x, to_x), (y, to_y)))
            taken.append((on_x - 2, on_y - 2, on_x + 2, on_y + 2))
    parts = []
    for x, y, label in points:
        wide, high = _LETTER * len(label), float(_LARGE)
        places = (
            (x + 9, y - high / 2, "start"), (x - 9 - wide, y - high / 2, "end"),
            (x - wide / 2, y - 10 - high, "middle"), (x - wide / 2, y + 9, "middle"),
            (x + 6, y - 7 - high, "start"), (x - 6 - wide, y + 7, "end"),
            (x + 6, y + 7, "start"), (x - 6 - wide, y - 7 - high, "end"),
        )  # fmt: skip
        for low, above, anchor in places if label else ():
            area = (low, above, low + wide, above + high)
            inside = area[0] >= box[0] and area[1] >= box[1] - 24 and area[2] <= box[2] + 8
            if inside and area[3] <= box[3] and not any(_touch(area, other) for other in taken):
                taken.append(area)
                place = {"start": low, "middle": low + wide / 2, "end": low + wide}[anchor]
                parts.append(_text(place, above + 0.76 * high, label, anchor))
                break
    return parts


def _touch(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bar(
    x: float, bottom: float, width: float, height: float, colour: str, told: str, seconds: float
) -> str:
    return (
        f"<g><title>{escape(told)}: {1e3 * seconds:.3f} ms</title>"
        f'<rect x="{x:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour}"/></g>'
    )


def _drawing(name: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDE} {height}" role="img" aria-label="{escape(name)}">'
        f"{''.join(parts)}</svg>"
    )


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>{escape(name)}</li>'
        for name, mark in entries
    )
    return f'<ul class="legend">{items}</ul>'
