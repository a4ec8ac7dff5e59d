"""`tokred bench`: one model and one method, or a whole suite (see `tokred.cli.suites`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tokred
from tokred.cli import releases, suites
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


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    text = "measured speed: dense, reduced and the free limit, interleaved"
    made = command(commands, "bench", run, text)
    add_model_options(made, model_needed=False)
    add_speed_options(made, rounds=20)
    made.add_argument("--compile", action="store_true", help="measure under torch.compile")
    add = made.add_argument_group("suites: many models and methods at once").add_argument
    add("--suite", choices=(*suites.SUITES, "release"))
    add("--models", nargs="+", metavar="NAME[:PIXELS]", help="only these models")
    add("--batches", nargs="+", type=int)
    add("--methods", nargs="+", metavar="METHOD", help="default: all")
    add("--keep-rates", nargs="+", type=float)
    add("--tokens", nargs="+", type=int, help="how many, in the suite clustering")
    add("--seconds", type=float, default=120, help="limit for each model and batch (default: 120)")
    add(
        "--against", metavar="VERSION_OR_FOLDER",
        help="in the suite release: a version, which pip installs for the time, or where one lies",
    )  # fmt: skip
    add("--of", metavar="VERSION_OR_FOLDER", help="the release that is timed (default: this one)")
    add("--record", action="store_true", help="write docs/benchmarks/history.json: suite release")
    add("--out", type=Path, help="folder for the JSON and Markdown files (default: none)")


def run(options: argparse.Namespace) -> None:
    """Measures, and prints what came of it."""
    if options.suite == "release":
        releases.run(options)
        return
    if options.suite:
        suites.run(options)
        return
    if options.model is None:
        raise ValueError("name a model, such as deit_small_patch16_224, or a --suite")
    model, images = model_and_noise(options)
    with bar(options.rounds, "measuring") as laps:
        result = tokred.bench(
            model,
            images,
            reducer_of(options),
            keep_rate_of(options),
            rounds=options.rounds,
            compile=options.compile,
            on_round=lambda done, of: laps.update(),
        )
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    print(result)
    with tokred.applied(model, reducer_of(options), keep_rate_of(options)):
        print(f"  {tokred.flops(model, images)}")
