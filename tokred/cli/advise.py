"""`tokred advise`."""

from __future__ import annotations

import argparse
import json

import tokred
from tokred.cli import trial
from tokred.cli.shared import Commands, command
from tokred.measure.advise import advising


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    text = "the method, layers and numbers of tokens for a budget"
    made = command(commands, "advise", run, text)
    trial.add_options(made, " ".join(advising.METHODS))
    budget = made.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--speedup", type=float, help="how many times as fast the model has to become"
    )
    budget.add_argument(
        "--max-drop", type=float, metavar="POINTS",
        help="how much accuracy the model may lose "
        "(without labels: agreement with the dense model)",
    )  # fmt: skip
    made.add_argument(
        "--images", type=int, default=256, help="how many to try settings on (default: 256)"
    )


def run(options: argparse.Namespace) -> None:
    """Looks for a setting, prints it and writes the page."""
    model, data, transform = trial.model_and_data(options)
    found = tokred.advise(
        model,
        data,
        speedup=options.speedup,
        max_drop=options.max_drop,
        methods=trial.methods_of(options),
        images=options.images,
        batch=options.batch,
        labelled=not options.unlabelled,
        task=options.task,
        transform=transform,
        seconds=options.seconds,
        workers=options.workers,
        name=options.model,
        progress=not options.json,
    )
    print(json.dumps(found.as_dict(), indent=2) if options.json else found)
    if options.html:
        shown = trial.Shown(model, data, transform, found.setting)
        trial.write_page(options.html, found.evaluation, shown, found)
    trial.tell_written(options.html)
