"""`tokred profile`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tokred
from tokred.cli.shared import (
    Commands,
    add_model_options,
    add_speed_options,
    bar,
    command,
    keep_rate_of,
    model_and_noise,
    reducer_of,
)
from tokred.show import report


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    text = "what every layer spends its time on, and where merging costs more than it saves"
    made = command(commands, "profile", run, text)
    add_model_options(made)
    add_speed_options(made, rounds=10)
    made.add_argument("--html", type=Path, metavar="FILE", help="also write a page")


def run(options: argparse.Namespace) -> None:
    """Measures, prints every layer, and writes the page."""
    model, images = model_and_noise(options)
    with bar(options.rounds, "measuring") as laps:
        result = tokred.profile(
            model,
            images,
            reducer_of(options),
            keep_rate_of(options),
            rounds=options.rounds,
            on_round=lambda done, of: laps.update(),
        )
    if options.html:
        report.write(options.html, None, profile=result, title=f"Profile of {options.model}")
    print(json.dumps(result.as_dict(), indent=2) if options.json else result)
