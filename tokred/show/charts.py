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
"""The parts of a block, by the names that `tokred.measure.profile` has for them, in words."""
PART_COLOURS = ("#4477aa", "#e8636f", "#a8891c", "#2a9d8f", "#9b6bd0")
COLOURS = ("#4477aa", "#d9692a", "#2a9d8f", "#b8458a", "#a8891c", "#e8636f", "#3f9a4a", "#8a6fd1")
"""All have a contrast of at least 3 to white and to near-black. Neighbours in the list differ in
lightness, or in a hue that people who are colour-blind can tell, too. Besides, every series has its
own shape."""

_WIDE = 560  # units of a drawing; on a phone, 0.64 pixels each
_LARGE = 19  # size of its letters there, in units
_LETTER = 0.56 * _LARGE  # how wide one of them is


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot.

    Attributes:
        x, y: its coordinates.
        title: shown when the pointer is on it.
        label: written beside it, if there is room.
    """

    x: float
    y: float
    title: str
    label: str = ""


@dataclass(frozen=True)
class _Frame:
    """The frame of a scatter plot, which knows where a point is drawn.

    Attributes:
        across, up: the ticks of the axes.
        upside_down: whether the vertical axis falls.
        left, right, top, bottom: the edges of the frame, in units of the drawing.
    """

    across: Sequence[float]
    up: Sequence[float]
    upside_down: bool
    left: int
    right: int = _WIDE - 20
    top: int = 28
    bottom: int = 330

    def at(self, point: Point) -> tuple[float, float]:
        """Where a point is drawn."""
        x = (point.x - self.across[0]) / (self.across[-1] - self.across[0])
        y = (point.y - self.up[0]) / (self.up[-1] - self.up[0])
        y = y if self.upside_down else 1 - y
        return self.left + x * (self.right - self.left), self.top + y * (self.bottom - self.top)

    def path(self, points: Sequence[Point]) -> str:
        """Points as SVG has them in lines."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))


def scatter(
    series: Mapping[str, Sequence[Point]],
    line: Sequence[Point],
    cross: Point,
    horizontal: str,
    vertical: str,
    upside_down: bool = False,
) -> str:
    """Series of points, each with a colour and a shape of its own, and a legend. Points that are
    not finite are not drawn; a sentence says how many there are.

    Args:
        series: the points of each series; a thin line joins them in this order.
        line: points that a strong broken line joins.
        cross: a point that belongs to no series.
        horizontal, vertical: the titles of the axes.
        upside_down: whether the vertical axis falls.
    """
    every = [cross, *(point for all_of in series.values() for point in all_of)]
    points = [point for point in every if _finite(point)]
    gone = len(every) - len(points)
    lost = paragraph(f"Not drawn, because they are no numbers: {gone}", "small") if gone else ""
    if not points:
        return lost
    series = {name: list(filter(_finite, members)) for name, members in series.items()}
    line = list(filter(_finite, line))
    up = _ticks([point.y for point in points])
    frame = _Frame(_ticks([point.x for point in points]), up, upside_down, _margin(up))
    parts = [
        *_axes(frame, horizontal, vertical),
        *_lines(frame, series, line),
        *_marks(frame, series, cross),
        *_labels(
            [(*frame.at(point), point.label) for point in points],
            (frame.left, frame.top, frame.right, frame.bottom),
            [*map(frame.at, line)],
        ),
    ]
    name = f"{vertical} over {horizontal}"
    return _drawing(name, frame.bottom + 54, parts) + _key(series, len(line) > 1) + lost


def _axes(frame: _Frame, horizontal: str, vertical: str) -> list[str]:
    """The ticks of a scatter plot, and the titles of its axes."""
    parts = []
    for tick, told in zip(frame.across, _told(frame.across), strict=True):
        x, _ = frame.at(Point(tick, frame.up[0], ""))
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" '
                     f'y2="{frame.bottom}"/>')  # fmt: skip
        parts.append(_text(x, frame.bottom + 22, told, "middle"))
    for tick, told in zip(frame.up, _told(frame.up), strict=True):
        _, y = frame.at(Point(frame.across[0], tick, ""))
        parts.append(f'<line class="axis" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/>')  # fmt: skip
        parts.append(_beside(frame.left, y, told))
    middle = (frame.left + frame.right) / 2
    parts.append(_text(middle, frame.bottom + 47, horizontal, "middle"))
    parts.append(_upwards((frame.top + frame.bottom) / 2, vertical))
    return parts


def _lines(
    frame: _Frame, series: Mapping[str, Sequence[Point]], line: Sequence[Point]
) -> list[str]:
    """The thin lines of the series, and the strong one."""
    parts = [
        f'<polyline points="{frame.path(members)}" fill="none" stroke="{colour}" '
        'stroke-opacity=".6"/>'
        for members, (colour, _) in zip(series.values(), _looks(), strict=False)
    ]
    parts.append(
        f'<polyline class="front" points="{frame.path(line)}" fill="none" stroke="currentColor" '
        'stroke-width="1.8" stroke-opacity=".75" stroke-dasharray="6 4"/>'
    )
    return parts


def _marks(frame: _Frame, series: Mapping[str, Sequence[Point]], cross: Point) -> list[str]:
    """The points of the series, and the cross."""
    parts = []
    for members, (colour, shape) in zip(series.values(), _looks(), strict=False):
        for member in members:
            x, y = frame.at(member)
            parts.append(
                f'<g><title>{escape(member.title)}</title><path transform="translate({x:.1f} '
                f'{y:.1f})" d="{shape}" fill="{colour}"/></g>'
            )
    if _finite(cross):
        x, y = frame.at(cross)
        parts.append(
            f'<g><title>{escape(cross.title)}</title><path transform="translate({x:.1f} {y:.1f})" '
            f'd="{_CROSS}" fill="none" stroke="currentColor" stroke-width="2.6"/></g>'
        )
    return parts


def _key(series: Mapping[str, Sequence[Point]], front: bool) -> str:
    """The legend of a scatter plot; `front` says whether there is a strong line."""
    legend = [("dense model", f'<path transform="translate(7 7)" d="{_CROSS}" fill="none" '
               'stroke="currentColor" stroke-width="2.2"/>')]  # fmt: skip
    if front:
        dashes = (
            '<path d="M0 7H14" stroke="currentColor" stroke-width="1.8" stroke-dasharray="5 3"/>'
        )
        legend.append(("no setting is both faster and better", dashes))
    legend += [
        (name, f'<path transform="translate(7 7)" d="{shape}" fill="{colour}"/>')
        for name, (colour, shape) in zip(series, _looks(), strict=False)
    ]
    return _legend(legend)


def bars(layers: Sequence[tuple[str, float, Sequence[float], float]]) -> str:
    """For each layer a grey bar of the dense model, a bar in which the `PARTS` are stacked, and a
    mark for the free limit.

    Args:
        layers: for each layer its name, the seconds of the dense model, the seconds of every part,
            and the seconds of the free limit.
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
    """A colour and a shape for each series: 72 pairs, as 8 and 9 have no common divisor."""
    number = 0
    while True:
        yield COLOURS[number % len(COLOURS)], _SHAPES[number % len(_SHAPES)]
        number += 1


def _ticks(values: Sequence[float], about: int = 6) -> list[float]:
    """About this many round numbers at equal distances, from at most the least value to at least
    the greatest."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    rough = span / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    return [round(number * step, 10) for number in range(first, last + 1)]


def _finite(point: Point) -> bool:
    return math.isfinite(point.x) and math.isfinite(point.y)


def _told(ticks: Sequence[float]) -> list[str]:
    """Numbers as text, all with the same number of decimals."""
    told = [f"{tick:g}" for tick in ticks]
    if any("e" in each for each in told):
        return told
    digits = max(len(each.partition(".")[2]) for each in told)
    return [f"{tick:.{digits}f}" for tick in ticks]


def _margin(ticks: Sequence[float]) -> int:
    """The room to the left of a vertical axis, for its numbers and its title."""
    return math.ceil(36 + _LETTER * max(map(len, _told(ticks))))


def _beside(left: float, y: float, told: str) -> str:
    """A number to the left of the vertical axis, clear of the points on the axis."""
    return f'<text x="{left - 10}" y="{y:.1f}" dy=".35em" text-anchor="end">{told}</text>'


def _upwards(y: float, text: str) -> str:
    """The title of the vertical axis."""
    return (
        f'<text transform="translate(15 {y:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(text)}</text>"
    )


def _labels(
    points: Sequence[tuple[float, float, str]],
    box: tuple[float, float, float, float],
    line: Sequence[tuple[float, float]],
) -> list[str]:
    """Labels beside their points. They must stay in the box, and touch neither each other nor
    points nor the line; labels without room are left out."""
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
