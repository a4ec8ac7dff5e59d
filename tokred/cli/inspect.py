"""`tokred inspect`."""

from __future__ import annotations

import argparse

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


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    text = "how many tokens stay after each layer, and how they were merged"
    made = command(commands, "inspect", run, text)
    add_model_options(made)
    add_image_options(made)


def run(options: argparse.Namespace) -> None:
    """Runs the images through the model, and prints what became of their tokens."""
    model, images, _ = model_and_images(options)
    if tracing.tcformer_in(model) is None:  # whose tokens become few by themselves
        tokred.apply(model, reducer_of(options), keep_rate_of(options))
    print(tokred.inspect(model, images))
