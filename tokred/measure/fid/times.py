"""How long it took to draw images: a file for each run and process, a line for each batch."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from tokred.measure.fid.sweep import SweepSetting


def add_time(file: Path, setting: SweepSetting, images: int, seconds: float, pipe: Any) -> None:
    """Adds a line to a file: how many images of a setting were drawn in so many seconds, and on
    which device."""
    file.parent.mkdir(exist_ok=True)
    device = str(getattr(pipe, "device", "cpu"))
    line = {"setting": setting.name, "images": images, "seconds": seconds, "device": device}
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")


def speeds_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The speed of each setting, as the last four fields of `Score`, from the files in a folder.

    If several runs have drawn images of a setting, the run that drew the most of them counts.
    """
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
