"""`tokred train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokred
from tokred import reducers, training
from tokred.cli.shared import Commands, command, note_random_weights
from tokred.data import pictures, zoo
from tokred.data.writing import write_text
from tokred.optional import require
from tokred.reducers import Reducer


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    text = "fine-tune a model that runs on fewer tokens, and its gates"
    made = command(commands, "train", run, text)
    add = made.add_argument
    add(
        "method", metavar="METHOD",
        help="with options after a colon, such as atc:single; 'none' for the dense model",
    )  # fmt: skip
    add(
        "--model", required=True, metavar="NAME",
        help="a bundled one, any timm name, or what transformers loads: a folder or a name",
    )  # fmt: skip
    add(
        "--data", required=True, metavar="FOLDER|hf:NAME",
        help="a folder with a folder of pictures for each class, perhaps in 'train' and 'val'; or "
        "a Hugging Face dataset",
    )  # fmt: skip
    add(
        "--validate",
        type=Path,
        metavar="FOLDER",
        help="pictures to validate on (default: 'val' of the data)",
    )
    add("--out", type=Path, required=True, help="folder for all results")
    add("--keep-rate", type=float, help="in (0, 1] (default: 0.7)")
    add("--pretrained", action="store_true", help="fetch timm's weights")
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="weights of the model, written by an earlier training",
    )
    add("--frozen", action="store_true", help="train only the gates; the model stays as it is")
    add("--per-image", action="store_true", help="every image keeps the same share of tokens")
    _add_recipe_options(made)
    add("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    add(
        "--augment", choices=("crop", "none"),
        help="random crops and flips (default: crop; for bundled models none)",
    )  # fmt: skip
    add("--workers", type=int, default=4, help="processes that read pictures (default: 4)")
    add(
        "--every",
        type=int,
        default=500,
        metavar="STEPS",
        help="how many between two checkpoints (default: 500)",
    )
    add(
        "--fresh",
        action="store_true",
        help="start from the beginning, even if there is a checkpoint",
    )


def _add_recipe_options(made: argparse.ArgumentParser) -> None:
    """The numbers of `tokred.training.Recipe`."""
    standard = training.Recipe()
    numbers: tuple[tuple[str, type, str], ...] = (
        ("epochs", int, "passes over the data"),
        ("batch", int, "images per step, of all processes together"),
        ("accumulate", int, "into how many parts a batch is divided where memory is short"),
        ("lr", float, "largest learning rate of the model"),
        ("gate-lr", float, "largest learning rate of gates"),
        ("weight-decay", float, "of AdamW"),
        ("warmup", float, "share of the steps in which learning rates rise"),
        ("label-smoothing", float, "how much of each label is spread over all classes"),
        ("seed", int, "where everything random starts"),
    )
    for name, kind, text in numbers:
        default = getattr(standard, name.replace("-", "_"))
        help = f"{text} (default: {default:g})"
        made.add_argument(f"--{name}", type=kind, default=default, help=help)
    for name, text in (
        ("rate", "the share of tokens that gates keep"),
        ("kl", "the distance from the dense model's classes"),
        ("distill", "the distance from the dense model's tokens"),
    ):
        help = f"weight of {text} (default: the method's)"
        made.add_argument(f"--{name}", type=float, help=help)


def run(options: argparse.Namespace) -> None:
    """Trains; the main process prints what came of it."""
    method = None if options.method == "none" else reducers.parse(options.method)
    recipe = _recipe(options, method)
    data, held_out = pictures.read(options.data)
    if options.validate is not None:
        held_out = pictures.folder(options.validate, data.classes)
    torch.manual_seed(recipe.seed)  # a new head, and gates
    model, prepared = pictures.load(
        options.model,
        len(data.classes),
        pretrained=options.pretrained,
        frozen=recipe.frozen,
        augment=options.augment,
    )
    timms = options.model not in zoo.names() and prepared.name is None
    if timms and not options.pretrained and options.weights is None:
        note_random_weights()
    if options.weights is not None:
        _load(model, options)
    model.train()  # in which random gates are as they should be
    if method is not None:
        tokred.apply(model, method, options.keep_rate)
    elif options.keep_rate is not None:
        raise ValueError("the dense model keeps all tokens: give a method, or no --keep-rate")
    fitted = training.fit(
        model,
        pictures.Prepared(data, prepared.train, prepared.name),
        recipe,
        options.out,
        validate=held_out and pictures.Prepared(held_out, prepared.evaluate, prepared.name),
        workers=options.workers,
        every=options.every,
        fresh=options.fresh,
    )
    state = require("accelerate", "train").PartialState()
    if state.is_main_process:
        write_text(options.out / "classes.json", json.dumps(data.classes, indent=1))
        _tell(options, recipe, fitted, len(held_out or ()))
    state.destroy_process_group()


def _recipe(options: argparse.Namespace, method: Reducer | None) -> training.Recipe:
    """The method's own recipe, with the numbers that were given."""
    usual = training.recipes.get(options.method.partition(":")[0], training.Recipe())
    given: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(usual)
        if getattr(options, field.name, None) is not None
    }
    about = None if method is None else reducers.traits(method)
    # Gates that keep a fixed number of tokens are best trained to.
    fixed = about is not None and about.learned is not None and not about.varies
    per_image = options.per_image or usual.per_image or fixed
    return dataclasses.replace(usual, **{**given, "per_image": per_image})


def _load(model: nn.Module, options: argparse.Namespace) -> None:
    """Puts the weights of an earlier training in."""
    try:
        require("safetensors.torch", "train").load_model(model, options.weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{options.weights} does not fit {options.model}: {reason}") from error


def _tell(
    options: argparse.Namespace, recipe: training.Recipe, fitted: training.Fitted, held_out: int
) -> None:
    """Prints what came of it, in lines."""
    print(f"{options.method} on {options.model}, {recipe.epochs} epochs, {fitted.steps} steps")
    if fitted.resumed:
        print(f"went on from step {fitted.resumed}")
    print(f"loss {fitted.last['loss']:.4g}")
    if fitted.accuracy is not None:
        dense = options.method == "none"
        tokens = "" if dense else f", {fitted.tokens:.1f} tokens in the mean layer"
        print(f"accuracy {fitted.accuracy:.2%} on {held_out} pictures{tokens}")
    print(f"wrote {options.out}", file=sys.stderr)
