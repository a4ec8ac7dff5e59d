"""A plot of how a training went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokred.data.writing import whole
from tokred.optional import require
from tokred.training.tables import read_table

CURVE = "curve.png"
"""The name of the file."""


def plot(out: Path) -> Path:
    """Draws `curve.png` from the tables in a folder, during a training or afterwards: over the
    steps, the losses, the share of tokens that gates keep, and the accuracy in validation.

    Returns:
        The file.

    Raises:
        ValueError: there is no log yet.
        ModuleNotFoundError: Matplotlib is not installed.
    """
    rows, checks = read_table(out / "log.csv"), read_table(out / "validation.csv")
    if not rows:
        raise ValueError(f"there is no log in {out}")
    kept = [name for name in rows[0] if name.startswith("kept_")]
    number = 1 + bool(kept) + bool(checks)
    figure = require("matplotlib.figure", "plots").Figure((5.5 * number, 4.5), layout="constrained")
    losses, *others = figure.subplots(1, number, squeeze=False)[0]
    steps = [row["step"] for row in rows]
    for name in ("loss", "task", "rate", "kl", "distill"):
        if name in rows[0]:
            losses.plot(steps, smooth([row[name] for row in rows]), label=name)
    losses.set_ylabel("loss, running mean")
    losses.legend()
    if kept:
        shares = others.pop(0)
        for name in kept:
            label = f"layer {name.removeprefix('kept_')}"
            shares.plot(steps, smooth([100 * row[name] for row in rows]), label=label)
        shares.set_ylabel("tokens kept, running mean, %")
        shares.set_ylim(0, 100)
        shares.legend(ncols=3, fontsize="small")
    if checks:
        (right,) = others
        right.plot(
            [row["step"] for row in checks], [100 * row["accuracy"] for row in checks], marker="o"
        )
        right.set_ylabel("validation accuracy, %")
    for panel in figure.axes:
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    with whole(out / CURVE) as part:
        figure.savefig(part, dpi=110, format="png")
    return out / CURVE


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential running mean over about a fiftieth of all values, without bias at the
    beginning."""
    keep = 1 - 1 / max(len(values) / 50, 1)
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(total / weight)
    return found
