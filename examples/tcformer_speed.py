"""Draws how the time of TCFormers grows with the resolution of images.

    tokred bench --suite tcformer --out docs/benchmarks
    python examples/tcformer_speed.py

The first measures, the second reads what it has written, and needs Matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=Path("docs/benchmarks/tcformer-cpu-float32.json")
    )
    parser.add_argument("--out", type=Path, default=Path("docs/tcformer-speed.png"))
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["models"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    whole, share = figure.subplots(1, 2)
    for name, marker in zip(dict.fromkeys(row["name"] for row in rows), "os", strict=False):
        mine = [row for row in rows if row["name"] == name]
        pixels = [row["size"] for row in mine]
        seconds = [statistics.median(row["seconds"]["all"]) for row in mine]
        clustering = [
            100
            * sum(statistics.median(row["seconds"][part]) for part in ("clustering", "merging"))
            / statistics.median(row["seconds"]["all"])
            for row in mine
        ]
        whole.plot(pixels, seconds, marker=marker, label=name)
        share.plot(pixels, clustering, marker=marker, label=name)
    whole.set_yscale("log")
    whole.set_ylabel("seconds per image")
    share.set_ylabel("clustering and merging, % of that")
    share.set_ylim(0, 100)
    for axes in (whole, share):
        axes.set_xlabel("pixels, height and width")
        axes.set_xticks(sorted({row["size"] for row in rows}))
        axes.grid(alpha=0.25)
    whole.legend()
    figure.savefig(options.out, dpi=100)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
