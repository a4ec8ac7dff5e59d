"""What `tokred evaluate` and `tokred advise` share: both try methods on images of the user's own,
and write a page about it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

import tokred
from tokred.cli.shared import DTYPES, with_gates
from tokred.data import inputs, pictures, samples, zoo
from tokred.measure import metrics, settings
from tokred.reducers import Reducer
from tokred.show import report

Methods: TypeAlias = dict[str, Reducer | tokred.Preset]


def add_options(made: argparse.ArgumentParser, usual: str) -> None:
    """The model, the images and how they are looked at; `usual` are the methods that are tried if
    none are named."""
    add = made.add_argument
    add(
        "model", metavar="MODEL",
        help="a bundled one, such as 'digits', any timm name, or what transformers loads",
    )  # fmt: skip
    add(
        "--data", metavar="FOLDER|hf:NAME",
        help="a folder of pictures, or of folders of them, one for each class, or with 'images' "
        "and 'labels' or 'depth' in it; a Hugging Face dataset (bundled models come with some)",
    )  # fmt: skip
    add(
        "--methods", nargs="+", metavar="METHOD",
        help="with options after a colon, such as atc:single, or presets "
        f"(default: {usual})",
    )  # fmt: skip
    add(
        "--unlabelled", action="store_true", help="ignore labels; compare with the dense model only"
    )
    add("--task", choices=tuple(metrics.TASKS), help="needed if the labels do not tell it")
    add(
        "--batch", type=int, help="images per batch (default: 32, fewer for large models; CUDA: 64)"
    )
    add("--seconds", type=float, default=2.0, help="how long each speed is measured (default: 2)")
    add("--workers", type=int, default=0, help="processes that read images (default: this one)")
    add("--random-weights", action="store_true", help="do not fetch timm's weights")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=DTYPES)
    add("--html", type=Path, metavar="FILE", help="also write all of it on a page")
    add("--json", action="store_true", help="print everything as JSON")


def model_and_data(options: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """The model, the images, and how they are prepared, if the model does not say so itself."""
    bundled = options.model in zoo.names()
    if options.data is None and not bundled:
        raise ValueError(f"give --data: {options.model} comes with no images")
    model = pictures.open_model(options.model, not options.random_weights)
    device = options.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    model = model.to(device, getattr(torch, options.dtype))
    if options.data is None:
        return model, zoo.held_out(options.model), None
    transform = pictures.Digits(zoo.held_out(options.model).images.shape[-1]) if bundled else None
    return model, options.data, transform


def methods_of(options: argparse.Namespace) -> Methods | None:
    """The methods and presets that were named; None if none were."""
    return {name: _method(name, options) for name in options.methods or ()} or None


def _method(name: str, options: argparse.Namespace) -> Reducer | tokred.Preset:
    method: Reducer | tokred.Preset = settings.method_of(name)
    if isinstance(method, tokred.Preset):
        return method
    try:
        return with_gates(method, options)
    except ValueError:  # there are none for this model, and the table is going to say so
        return method


@dataclass(frozen=True)
class Shown:
    """The setting that a page shows more of, and what it is shown on."""

    model: nn.Module
    data: Any
    transform: Any
    setting: settings.Setting | None


def write_page(path: Path, evaluation: tokred.Evaluation, shown: Shown, advice: Any = None) -> None:
    """The page, with the profile and the token maps of one setting, if there is one."""
    profile, strips = None, []
    if shown.setting is not None:
        model, name = shown.model, shown.setting.name
        few = samples.of(shown.data, model, shown.transform, evaluation.batch, labelled=False)
        parameter = next(model.parameters())

        def batch(many: int) -> inputs.Inputs:
            stacked = few.batch(range(min(many, len(few))))[0][0]
            return samples.sent(stacked, parameter.device, parameter.dtype)

        with tokred.applied(model, shown.setting.reducer, shown.setting.schedule):
            with contextlib.suppress(ValueError, RuntimeError):  # not every model has one
                profile = tokred.profile(model, batch(evaluation.batch))
            trace = tokred.inspect(model, batch(3))
            if isinstance(trace, tokred.Trace) and trace.stages:
                # As the model saw them: the whole picture may have been cut.
                drawn = tokred.visualise(trace, inputs.pixels(batch(3)))
                strips = [(f"{name}, image {i}", strip) for i, strip in enumerate(drawn, 1)]
    report.write(path, evaluation, profile=profile, pictures=strips, advice=advice)


def tell_written(*files: Path | None) -> None:
    """Says which files there are now."""
    for file in files:
        if file is not None:
            print(f"wrote {file}", file=sys.stderr)
