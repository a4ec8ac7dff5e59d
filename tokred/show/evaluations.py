"""How an evaluation is drawn: as a table and a chart in a page, and with Matplotlib."""

from __future__ import annotations

import datetime
import math
from typing import Any

from tokred.measure.evaluation import Evaluation, Row
from tokred.measure.results import draws
from tokred.optional import require
from tokred.show.charts import Point, scatter
from tokred.show.drawing import plot_front
from tokred.show.markup import STYLE, listed, paragraph
from tokred.show.markup import table as html_table


@draws(Evaluation, "html")
def table(evaluation: Evaluation) -> str:
    """The table and the plot as a piece of HTML, for notebooks."""
    summary = f"{evaluation.model} on {evaluation.data}, {evaluation.task}"
    refused = [f"refused: {name}: {reason}" for name, reason in evaluation.refused.items()]
    return "".join(
        [
            f'<div class="tokred">{STYLE}',
            paragraph(summary),
            plot(evaluation) if evaluation.settings else "",
            settings_table(evaluation),
            listed([*evaluation.warnings(), *refused]),
            paragraph("; ".join(conditions(evaluation, dated=False)), "small"),
            "</div>",
        ]
    )


def plot(evaluation: Evaluation) -> str:
    """The leading metric against the measured speed-up, as SVG."""
    front = evaluation.front()
    points: dict[int, Point] = {}
    for row, name in zip(evaluation.rows, _names(evaluation), strict=True):
        score = f"{number(evaluation.score(row))}{evaluation.unit}"
        title = f"{name}: {evaluation.leading} {score}, {row.speed_up:.2f}x as fast"
        label = name if row in front else ""
        points[id(row)] = Point(row.speed_up, evaluation.score(row), title, label)
    methods = dict.fromkeys(row.method for row in evaluation.settings)
    cross = points[id(evaluation.dense)]
    unit = f", {evaluation.unit}" if evaluation.unit else ""
    falls = "" if evaluation.higher_is_better else " (less is better)"
    return scatter(
        {
            method: [points[id(row)] for row in evaluation.settings if row.method == method]
            for method in methods
        },
        [points[id(row)] for row in front],
        Point(cross.x, cross.y, cross.title, "dense"),
        "speed-up over the dense model, measured",
        f"{evaluation.leading}{unit}{falls}",
        upside_down=not evaluation.higher_is_better,
    )


def settings_table(evaluation: Evaluation) -> str:
    """The table of all settings; those of the front stand out."""
    head, rows = columns(evaluation)
    front = evaluation.front()
    marked = {number for number, row in enumerate(evaluation.rows) if row in front}
    caption = "Bold: no other setting is both faster and better."
    return html_table(head, rows, caption, marked)


def columns(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """The titles of the table, and the cells of every row. Empty columns are left out."""
    others = [name for name in evaluation.dense.metrics if name != evaluation.leading]
    titles = [
        "setting", "keep rate", evaluation.leading, "change", "speed-up", "±", "of free limit",
        *others, "agreement, %", "KL", "cosine", "depth error, %", "images/s", "latency, ms",
        "its speed-up", "G multiply-adds", "memory, MiB", "tokens", "code",
    ]  # fmt: skip
    rows = []
    for row, name in zip(evaluation.rows, _names(evaluation), strict=True):
        speed = row.speed
        dense = row is evaluation.dense
        share = "" if dense else f"{100 * row.speed_up / row.free_limit:.0f}%"
        rows.append(
            [
                name,
                _or_nothing(row.keep_rate, "g"),
                number(evaluation.score(row)),
                "" if dense else change(evaluation, row),
                f"{row.speed_up:.2f}x",
                "" if dense else f"{100 * speed.error:.0f}%",
                share,
                *(number(row.metrics[name]) if name in row.metrics else "" for name in others),
                _or_nothing(row.agreement, ".2f"),
                _or_nothing(row.kl, ".4f"),
                _or_nothing(row.cosine, ".4f"),
                _or_nothing(row.depth_error, ".2f"),
                f"{evaluation.images_per_second(row):.1f}",
                f"{1e3 * evaluation.latency(row):.2f}",
                f"{row.latency_speed_up:.2f}x",
                "" if speed.mult_adds is None else f"{speed.mult_adds / 1e9:.3f}",
                "" if speed.peak_memory is None else f"{speed.peak_memory / 2**20:.1f}",
                " → ".join(map(str, _changes(row))),
                row.code,
            ]
        )
    # The leading metric has a column already.
    twice = {"agreement": "agreement, %", "cosine": "cosine", "depth_error": "depth error, %"}
    there = [
        number
        for number, title in enumerate(titles)
        if any(cells[number] for cells in rows) and title != twice.get(evaluation.leading)
    ]
    return [titles[n] for n in there], [[cells[n] for n in there] for cells in rows]


def _names(evaluation: Evaluation) -> list[str]:
    """The name of each row. Rows with the same name (schedules have no keep rate) are numbered."""
    names = [row.name for row in evaluation.rows]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: at + 1].count(name)})"
        for at, name in enumerate(names)
    ]


def _changes(row: Row) -> list[int]:
    """Patch tokens that enter the model, and those after every layer that changes their number."""
    told = [row.tokens]
    for count in row.counts:
        if count != told[-1]:
            told.append(count)
    return told


def conditions(evaluation: Evaluation, dated: bool = True) -> list[str]:
    """Phrases that tell what it was measured on, with today's date if `dated`."""
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    told = [
        f"{evaluation.device}, {evaluation.dtype}, {evaluation.threads} threads",
        f"batch {evaluation.batch} (latency: one image)",
        f"{evaluation.dense.compared} images compared with the dense model",
        versions,
    ]
    return [*told, f"written {datetime.date.today().isoformat()}"] if dated else told


def number(value: float) -> str:
    """A number with 2 decimals; a small one with 4."""
    return f"{value:.{2 if abs(value) >= 1 or value == 0 else 4}f}"


def change(evaluation: Evaluation, row: Row) -> str:
    """The change of the leading metric, with its sign: 2 decimals for percentages, otherwise 4."""
    points = evaluation.score(row) - evaluation.score(evaluation.dense)
    return f"{points:+.{2 if evaluation.unit == '%' else 4}f}" if math.isfinite(points) else "nan"


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@draws(Evaluation, "plot")
def figure(evaluation: Evaluation, axes: Any = None) -> Any:
    """The leading metric against the measured speed-up, see `Evaluation.plot`."""
    if axes is None:
        made = require("matplotlib.figure", "plots").Figure((7, 4.5), layout="constrained")
        axes = made.add_subplot()
    points: dict[str, list[tuple[float, float]]] = {}
    for row in evaluation.settings:
        points.setdefault(row.method, []).append((row.speed_up, evaluation.score(row)))
    plot_front(
        axes,
        points,
        evaluation.score(evaluation.dense),
        [(row.speed_up, evaluation.score(row)) for row in evaluation.front()],
        f"{evaluation.leading}{', %' if evaluation.unit == '%' else ''}",
    )
    axes.set_title(f"{evaluation.model}, {evaluation.dense.images} images")
    return axes.figure
