"""`tokred evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tokred
from tokred.cli import trial
from tokred.cli.shared import Commands, command
from tokred.data.processes import launched
from tokred.measure import settings


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    text = "what methods and keep rates gain and cost on your images: a table"
    made = command(commands, "evaluate", run, text)
    of_dense = " ".join(settings.DENSE_METHODS)
    trial.add_options(made, f"{' '.join(settings.METHODS)}; of dense models {of_dense}")
    add = made.add_argument
    add(
        "--keep-rates", nargs="+", type=float, default=list(settings.KEEP_RATES),
        help=f"in (0, 1] (default: {' '.join(f'{rate:g}' for rate in settings.KEEP_RATES)})",
    )  # fmt: skip
    add(
        "--hourglass", action="store_true",
        help="few tokens from a third of the layers on, with every method (slic always does this)",
    )  # fmt: skip
    add("--limit", type=int, help="use only this many images, evenly spaced")
    add("--plot", type=Path, metavar="FILE", help="also write the plot")
    add("--csv", type=Path, metavar="FILE", help="also write the table")
    add(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="where finished settings are kept (default: the user's cache)",
    )
    add("--fresh", action="store_true", help="measure everything again")


def run(options: argparse.Namespace) -> None:
    """Evaluates; the main process prints the table and writes the files."""
    model, data, transform = trial.model_and_data(options)
    methods = trial.methods_of(options)
    schedule = tokred.Hourglass if options.hourglass else None
    result = tokred.evaluate(
        model,
        data,
        methods,
        options.keep_rates,
        schedule=schedule,
        task=options.task,
        labelled=not options.unlabelled,
        transform=transform,
        batch=options.batch,
        limit=options.limit,
        seconds=options.seconds,
        workers=options.workers,
        name=options.model,
        cache=options.cache or True,
        fresh=options.fresh,
        # Lines are printed as they come, so that the table grows on the terminal.
        progress=not options.json,
    )
    state = launched("evaluate")
    if state.main:
        print(json.dumps(result.as_dict(), indent=2) if options.json else result)
        if options.csv:
            result.to_pandas().to_csv(options.csv, index=False)
        if options.plot:
            result.plot().savefig(options.plot, dpi=110)
        if options.html:
            tried = methods or list(dict.fromkeys(row.method for row in result.settings))
            these = settings.settings_of(tried, options.keep_rates, schedule)
            of_note = [*result.front(), *result.within(0.5)][-1:]
            named = next((s for r in of_note for s in these if s.code == r.code), None)
            shown = trial.Shown(model, data, transform, named)
            trial.write_page(options.html, result, shown)
        trial.tell_written(options.csv, options.plot, options.html)
    if state.state is not None:
        state.state.destroy_process_group()
