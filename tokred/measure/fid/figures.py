"""The scores of a sweep for people to look at: tables, a plot and a contact sheet."""

from __future__ import annotations

import csv
import itertools
import json
import statistics
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tokred.data import reading
from tokred.data.writing import whole, write_text
from tokred.measure.fid.distances import KID_SUBSETS
from tokred.measure.fid.files import file_of
from tokred.measure.fid.pins import read
from tokred.measure.fid.scores import Score, SweepScores
from tokred.measure.fid.sweep import DENSE, Sweep
from tokred.optional import require


def report(sweep: Sweep, out: Path, scores: SweepScores) -> list[Path]:
    """Writes the scores of a sweep, and returns the files: the table as CSV; the table as JSON,
    with the conditions of the measurement; the distances of every image; a plot; and a contact
    sheet.

    Raises:
        ModuleNotFoundError: Matplotlib or Pillow is not installed.
    """
    names = ("fid.csv", "fid.json", "distances.csv", "fid.png", "contact.png")
    table, everything, distances, plot, sheet = (out / name for name in names)
    with whole(table) as part, part.open("w", newline="") as file:
        rows = csv.DictWriter(file, [column.name for column in fields(Score)], lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(row) for row in scores.rows)
    with whole(distances) as part, part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", "number", "prompt", "pixel_distance", "feature_distance"])
        for setting, pixels, moved in zip(
            sweep.settings(), scores.pixels, scores.moved, strict=True
        ):
            for number, pair in enumerate(zip(pixels.tolist(), moved.tolist(), strict=True)):
                writer.writerow([setting.name, number, sweep.prompt(number), *pair])
    found = {
        "sweep": read(out),
        "reference": dict(zip(("folder", "images"), scores.reference, strict=True)),
        "features": dict(zip(("extractor", "dim"), scores.features, strict=True)),
        "kid": {"subsets": KID_SUBSETS, "subset": scores.kid_subset},
        "rows": [asdict(row) for row in scores.rows],
    }
    write_text(everything, json.dumps(found, indent=1))
    _plot(scores, plot)
    with whole(sheet) as part:
        contact_sheet(sweep, out).save(part, format="PNG")
    return [table, everything, distances, plot, sheet]


def markdown(scores: SweepScores) -> str:
    """The table, and under it the conditions of the measurement."""
    lines = [
        "| method | keep | seed | FID | KID x 1000 | from dense: pixels | features | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in scores.rows:
        speed = "" if row.images_per_second is None else f"{row.images_per_second:.3g}"
        cells = [
            *(row.method, f"{row.keep_rate:g}", str(row.seed), f"{row.fid:.3f}"),
            f"{row.kid * 1e3:.3f} ± {row.kid_std * 1e3:.3f}",
            *(f"{row.pixel_distance:.4f}", f"{row.feature_distance:.3f}", speed),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    folder, images = scores.reference
    timed = {(row.processes, row.device) for row in scores.rows if row.images_per_second}
    by = "; ".join(f"{count} process{'es'[: 2 * (count > 1)]} on {on}" for count, on in timed)
    lines += [
        "",
        f"{scores.rows[0].images} images each, {images} in the reference {folder}; "
        f"{scores.features[1]} features of {scores.features[0]}; KID over {KID_SUBSETS} subsets of "
        f"{scores.kid_subset}. Images/s: drawn by {by or 'nobody'}, median batch, without writing.",
    ]
    return "\n".join(lines)


def contact_sheet(sweep: Sweep, out: Path, columns: int = 10, cell: int = 96) -> Any:
    """A picture: a row for each setting of the first seed, a column for each of the first prompts.

    Args:
        sweep: what was drawn.
        out: the folder of the images.
        columns: how many prompts, at most.
        cell: height and width of an image in it; small ones are enlarged without smoothing.
    """
    pil, pens, fonts = (
        require(f"PIL.{name}", "plots") for name in ("Image", "ImageDraw", "ImageFont")
    )
    settings = [setting for setting in sweep.settings() if setting.seed == sweep.seeds[0]]
    numbers = range(min(columns, len(sweep.prompts), sweep.images))
    gap, font = 4, fonts.load_default(13)
    labels = [
        setting.method if setting.method == DENSE else f"{setting.method} {setting.keep_rate:g}"
        for setting in settings
    ]
    left = int(max(font.getlength(label) for label in labels)) + 3 * gap
    top = 24
    width = left + len(numbers) * (cell + gap)
    sheet = pil.new("RGB", (width, top + len(settings) * (cell + gap)), "white")
    pen = pens.Draw(sheet)
    for column in numbers:
        text = sweep.prompt(column)
        while len(text) > 1 and font.getlength(text) > cell:
            text = text[:-2].rstrip() + "…"
        pen.text((left + column * (cell + gap), gap), text, fill="black", font=font)
    for row, (setting, label) in enumerate(zip(settings, labels, strict=True)):
        y = top + row * (cell + gap)
        pen.text((gap, y + cell // 2 - 8), label, fill="black", font=font)
        for column in numbers:
            image = reading.picture(out / setting.name / file_of(column))
            smooth = pil.Resampling.LANCZOS if image.width > cell else pil.Resampling.NEAREST
            image = image.resize((cell, cell), smooth)
            sheet.paste(image, (left + column * (cell + gap), y))
    return sheet


def _plot(scores: SweepScores, file: Path) -> None:
    """Draws FID, and the distance from the images without reduction, over the keep rate."""
    figure = require("matplotlib.figure", "plots").Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    named = scores.features[0]
    _lines(left, scores, "fid", f"FID, {named}")
    _lines(right, scores, "feature_distance", f"from the dense image, {named}")
    left.legend()
    with whole(file) as part:
        figure.savefig(part, dpi=110, format="png")


def _lines(axes: Any, scores: SweepScores, column: str, label: str) -> None:
    """A line for each method: the mean over seeds, and as an area their range."""
    dense = statistics.mean(getattr(row, column) for row in scores.rows if row.method == DENSE)
    by_method: dict[str, dict[float, list[float]]] = {}
    for row in scores.rows:
        if row.method != DENSE:
            by_rate = by_method.setdefault(row.method, {1.0: [dense]})
            by_rate.setdefault(row.keep_rate, []).append(getattr(row, column))
    markers = itertools.cycle("osD^vPX*")
    for (method, by_rate), marker in zip(by_method.items(), markers, strict=False):
        rates = sorted(by_rate)
        means = [statistics.mean(by_rate[rate]) for rate in rates]
        (line,) = axes.plot(rates, means, marker=marker, label=method)
        if any(len(found) > 1 for found in by_rate.values()):
            low, high = ([end(by_rate[rate]) for rate in rates] for end in (min, max))
            axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(dense, color="grey", linewidth=1, linestyle=":", label=DENSE)
    axes.invert_xaxis()
    axes.set_xlabel("keep rate")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
