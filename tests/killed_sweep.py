"""A small sweep that is killed again and again, as a program.

    python tests/killed_sweep.py OUT KILLS SEED

It loads everything once; every other run is a process of its own that is forked from it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.data import zoo
from tokred.measure import fid

SWEEP = fid.Sweep(("tome",), (0.5,), ("1", "2", "3"), images=6, steps=1)


class Rows(nn.Module):
    """Features of images that are quick to have: the mean of some rows of pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 3))[:, ::8] / 255


def run(pipe: Any, out: Path) -> None:
    """The whole sweep, or what is left of it."""
    fid.generate(pipe, SWEEP, out, batch=4)
    reference = fid.digit_reference(out / "reference", 1)
    scores = fid.score(SWEEP, out, reference, Rows())
    fid.report(SWEEP, out, scores)


def started(pipe: Any, out: Path) -> int:
    """Starts a run in another process, and returns its number."""
    process = os.fork()
    if process == 0:
        try:
            run(pipe, out)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return process


def finished(pipe: Any, out: Path) -> float:
    """Runs to the end, and returns how many seconds that took."""
    since = time.perf_counter()
    _, status = os.waitpid(started(pipe, out), 0)
    assert status == 0, f"the run ended with {status}"
    return time.perf_counter() - since


def figures(out: Path) -> list[dict[str, Any]]:
    """All figures but times."""
    rows = json.loads((out / "fid.json").read_text())["rows"]
    timed = ("images_per_second", "timed_images", "processes", "device")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def images(out: Path) -> dict[str, bytes]:
    """All images."""
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in out.glob("*-seed*/*")}


def main(out: Path, kills: int, seed: int) -> None:
    """Kills so many runs at random, lets the last one end, and compares it with one that was never
    stopped."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipe = zoo.diffusion()
    pipe.set_progress_bar_config(disable=True)
    run(pipe, out / "whole")  # here, so that everything is loaded
    seconds = finished(pipe, out / "again")
    assert figures(out / "again") == figures(out / "whole")
    moments = random.Random(seed)
    killed = 0
    while killed < kills:
        process = started(pipe, out / "parts")
        time.sleep(moments.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert status in (0, signal.SIGKILL), f"the run ended with {status}"
        killed += status == signal.SIGKILL
        if status == 0:  # it was faster than we were
            shutil.rmtree(out / "parts")
    finished(pipe, out / "parts")
    assert figures(out / "parts") == figures(out / "whole")
    assert images(out / "parts") == images(out / "whole")
    assert not [*(out / "parts").glob("*-seed*/*.part")]
    print("the same")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
