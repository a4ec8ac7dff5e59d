"""How long it took to draw images: a file for each run and process, a line for each batch."""

from __future__ import annotations

import itertools
import json
import statistics
import warnings
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
        for line in _lines(file):
            runs.setdefault((line["setting"], run), {}).setdefault(process, []).append(line)
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


def _lines(file: Path) -> list[dict[str, Any]]:
    """What the lines of a file say. If a process was killed while it wrote the last one, that does
    not count.

    Raises:
        ValueError: another line is broken.
    """
    lines = file.read_text().split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            took = json.loads(line) if line else None
            if took is not None:
                took = {name: took[name] for name in ("setting", "images", "seconds", "device")}
                found.append(took)
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(
                    f"line {number} of {file} is broken ({error}): delete the line or the file; "
                    "the times in it then do not count"
                ) from error
            warnings.warn(
                f"the last line of {file} is cut off: the time of one batch does not count",
                stacklevel=3,
            )
    return found
