"""How a profile is drawn: in a notebook, in a page, and with Matplotlib."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokred.measure.profile.values import PARTS, SHOWN, Profile
from tokred.measure.race import books_told
from tokred.measure.results import draws
from tokred.optional import require
from tokred.show.charts import PART_COLOURS, bars
from tokred.show.charts import PARTS as NAMED_PARTS
from tokred.show.markup import STYLE, listed, paragraph, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@draws(Profile, "html")
def fragment(profile: Profile, style: bool = True) -> str:
    """A profile as HTML, for a notebook or a page: bars, table and sentences.

    Args:
        profile: what `tokred.profile` has returned.
        style: whether to include the style sheet, which a page has once.
    """
    head = ["layer", "tokens", "block", *list(NAMED_PARTS.values())[1:], "dense", "free limit"]
    names = ("block", *PARTS, "dense", "limit")

    def cells(seconds: Iterable[float]) -> list[str]:
        return [f"{1e3 * each:.2f}" if each else "" for each in seconds]

    rows = []
    for times in profile.layers:
        changed = times.after != times.before
        tokens = f"{times.before} → {times.after}" if changed else f"{times.before}"
        rows.append([str(times.layer), tokens, *cells(getattr(times, name) for name in names)])
    rows.append(["all", "", *cells(map(profile.total, names))])
    warnings, losses = profile.warnings(), profile.losses()
    summary = (
        f"{profile.model}, {profile.method}: {profile.speed_up:.2f}x as fast as dense (free limit "
        f"{profile.free_limit:.2f}x; of limit {profile.efficiency:.2f}, "
        f"{books_told(profile.bookkeeping, profile.why_seamed)})"
    )
    blocks = [
        (str(t.layer), t.dense, [getattr(t, name) for name in NAMED_PARTS], t.limit)
        for t in profile.layers
    ]
    return "".join(
        [
            '<div class="tokred">',
            STYLE if style else "",
            paragraph(summary),
            bars(blocks),
            table(head, rows, caption="Milliseconds per batch"),
            listed([*warnings, *losses], len(warnings) + SHOWN),
            paragraph(profile.conditions, "small"),
            "</div>",
        ]
    )


@draws(Profile, "plot")
def figure(profile: Profile) -> Figure:
    """A profile as a figure of Matplotlib, see `Profile.plot`."""
    figures = require("matplotlib.figure", "plots")
    figure: Figure = figures.Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    at = [times.layer for times in profile.layers]
    left, right = ([n + shift for n in at] for shift in (-0.21, 0.21))
    axes.bar(left, [1e3 * t.dense for t in profile.layers], 0.38, color="#b5b5b5", label="dense")
    base = [0.0] * len(at)
    for (name, label), colour in zip(NAMED_PARTS.items(), PART_COLOURS, strict=True):
        heights = [1e3 * getattr(times, name) for times in profile.layers]
        if any(heights):
            axes.bar(right, heights, 0.38, bottom=base, color=colour, label=label)
        base = [low + high for low, high in zip(base, heights, strict=True)]
    limits = [1e3 * times.limit for times in profile.layers]
    axes.plot(right, limits, "_k", markersize=11, label="free limit")
    axes.set_xticks(at)
    axes.set_xlabel("layer")
    axes.set_ylabel("ms per batch")
    axes.set_title(f"{profile.method}: {profile.speed_up:.2f}x as fast as dense", fontsize=10)
    axes.legend(fontsize=8)
    return figure
