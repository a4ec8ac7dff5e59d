"""How long drawing took, as `draw` has written it down."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any


def speeds_in(folder: Path) -> dict[str, dict[str, Any]]:
    """For each setting, the last four fields of `Score`, from what `draw` has written down."""
    runs: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        run, _, process = file.stem.rpartition("-")
        for line in file.read_text().splitlines():
            took = json.loads(line)
            runs.setdefault((took["setting"], run), {}).setdefault(process, []).append(took)
    speeds: dict[str, dict[str, Any]] = {}
    for (setting, _), by_process in runs.items():
        took = list(itertools.chain(*by_process.values()))
        images = sum(batch["images"] for batch in took)
        if images >= speeds.get(setting, {}).get("timed_images", 0):
            speeds[setting] = {
                "images_per_second": sum(
                    statistics.median(batch["images"] / batch["seconds"] for batch in batches)
                    for batches in by_process.values()
                ),
                "timed_images": images,
                "processes": len(by_process),
                "device": took[0]["device"].split(":")[0],
            }
    return speeds
