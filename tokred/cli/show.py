"""`tokred show`."""

from __future__ import annotations

import argparse
from pathlib import Path

import tokred
from tokred.cli.shared import (
    Commands,
    add_image_options,
    add_model_options,
    command,
    keep_rate_of,
    model_and_images,
    reducer_of,
)
from tokred.measure import tracing
from tokred.optional import require
from tokred.show import drawing


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    made = command(commands, "show", run, "a picture of images and their tokens")
    add_model_options(made)
    add_image_options(made)
    made.add_argument("--out", type=Path, default=Path("tokens.png"))
    made.add_argument(
        "--what", choices=("tokens", "usage", "layers"), default="tokens",
        help="tokens after every reduction; how many layers used each patch; or a plot of "
        "how many patches each layer used, and which of them came back",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Runs the images through the model, and draws what became of their tokens."""
    model, images, pictures = model_and_images(options)
    if tracing.tcformer_in(model) is None:  # whose tokens become few by themselves
        tokred.apply(model, reducer_of(options), keep_rate_of(options))
    trace = tokred.inspect(model, images)
    # The cells of TCFormers are many and small.
    cell = max(2, min(16, 448 // max(trace.grid))) if isinstance(trace, tokred.Trace) else 16
    if options.what == "tokens":
        drawing.stack(tokred.visualise(trace, pictures, cell)).save(options.out)
    elif isinstance(trace, tokred.Trace) and options.what == "usage":
        drawing.stack(drawing.heat(trace, pictures, cell)).save(options.out)
    elif isinstance(trace, tokred.Trace):
        figure = require("matplotlib.figure", "plots").Figure(figsize=(7, 4), layout="constrained")
        drawing.plot_usage(figure.add_subplot(), trace)
        figure.savefig(options.out, dpi=110)
    print(f"wrote {options.out}")
