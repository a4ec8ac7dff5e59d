"""`tokred fidelity`."""

from __future__ import annotations

import argparse
import sys
from typing import TypeAlias

import tokred
from tokred import reducers
from tokred.cli.shared import (
    Commands,
    add_image_options,
    add_model_options,
    bar,
    command,
    keep_rate_of,
    model_and_images,
    reducer_of,
    with_gates,
)
from tokred.reducers import Reducer

Setting: TypeAlias = tuple[str, Reducer | tokred.Preset, float | None]
"""A name, a method, and a keep rate (None: its own)."""


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    text = "how close the reduced model stays to the dense one, on images"
    made = command(commands, "fidelity", run, text)
    add_model_options(made)
    add_image_options(made)
    add = made.add_argument
    add("--methods", nargs="+", metavar="METHOD", help="in place of --method")
    add("--keep-rates", nargs="+", type=float, help="in place of --keep-rate")
    add("--preset", choices=sorted(tokred.presets), help="in place of method and keep rate")
    add(
        "--hourglass", action="store_true",
        help="few tokens from a third of the layers on, with every method (slic always does this)",
    )  # fmt: skip
    add(
        "--reconstruction", choices=("copy", "nearest", "bilinear"),
        help="what the full grid is made of (default: what the method says)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Tries every setting, and prints a row for each."""
    model, images, _ = model_and_images(options)
    settings = _settings(options)
    print(f"{options.model}, {len(images)} images: the reduced model against the dense one")
    print(
        f"{'method':26s}{'keep':>6s}{'cosine':>9s}{'same decision':>15s}{'depth error':>13s}"
        "  tokens"
    )
    batches = images.split(8)
    with bar(len(settings), "settings") as rows:
        for name, method, rate in settings:
            hourglass = options.hourglass and not options.preset
            schedule = tokred.Hourglass(rate) if hourglass else rate
            reduction = tokred.apply(model, method, schedule, reconstruction=options.reconstruction)
            found = tokred.fidelity(model, batches)
            tokred.remove(model)
            counts = reduction.counts(reduction.layout.patches, reduction.layout.grid)
            same = "" if found.agreement is None else f"{found.agreement:.2%}"
            depth = "" if found.depth_error is None else f"{found.depth_error:.2%}"
            rows.write(
                f"{name:26s}{'' if rate is None else rate:>6}{found.cosine:9.4f}{same:>15s}"
                f"{depth:>13s}  {' '.join(map(str, dict.fromkeys(counts)))}",
                file=sys.stdout,
            )
            rows.update()


def _settings(options: argparse.Namespace) -> list[Setting]:
    """What was asked for: a preset, or all methods at all keep rates."""
    if options.preset:
        return [(options.preset, tokred.presets[options.preset], None)]
    named = options.methods or [options.method]
    if options.option and len(named) > 1:
        raise ValueError("--option goes with one method: use --method")
    methods = {name: with_gates(reducers.parse(name), options) for name in named}
    if options.option or not options.methods:
        methods = {options.method: reducer_of(options)}
    rates = options.keep_rates or [keep_rate_of(options)]
    return [(name, method, rate) for rate in rates for name, method in methods.items()]
