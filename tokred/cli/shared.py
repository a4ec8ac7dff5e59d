"""What several commands share: options, what they ask for, and progress bars."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tokred import reducers
from tokred.data import zoo
from tokred.optional import require
from tokred.reducers import Reducer

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Placed = TypeVar("Placed", nn.Module, Tensor)
DTYPES = ("float32", "bfloat16", "float16")


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """The parser of a new command; `run` is what the command does."""
    made = commands.add_parser(name, help=text, description=text)
    made.set_defaults(run=run)
    return made


def add_model_options(made: argparse.ArgumentParser, model_needed: bool = True) -> None:
    """Which model, and which method with which options."""
    add = made.add_argument
    add(
        "model", metavar="MODEL", nargs=None if model_needed else "?",
        help="a bundled one, such as 'digits', or any timm name",
    )  # fmt: skip
    add("--method", default="tome", help="see `tokred list` (default: tome)")
    add(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="an option of the method, such as linkage=complete",
    )  # fmt: skip
    add("--keep-rate", type=float, help="in (0, 1] (default: 0.5; of trained gates, their own)")
    add("--gates", type=Path, help="file of a learned method (default: the bundled one, if any)")
    add("--pretrained", action="store_true", help="fetch timm's weights")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=DTYPES)
    add("--image-size", type=int, help="in pixels, if not the model's own")


def add_speed_options(made: argparse.ArgumentParser, rounds: int) -> None:
    """How speed is measured, and how it is told."""
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--json", action="store_true", help="print everything as JSON")


def add_image_options(made: argparse.ArgumentParser) -> None:
    """Which pictures."""
    made.add_argument("--image", type=Path, action="append", help="a picture; repeatable")
    made.add_argument("--images", type=int, default=4, help="how many of the bundled images")


def model_and_noise(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model, and a batch to measure time with: noise; of a bundled model, its own images."""
    if options.model in zoo.names():
        model, images, _ = _bundled(options, options.batch)
    else:
        model, config = _from_timm(options)
        images = torch.randn(options.batch, *config["input_size"])
    return _placed(model, options), _placed(images, options)


def model_and_images(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Sequence[Any]]:
    """The model, what it takes, and the same as pictures for people."""
    pictures: Sequence[Any]
    if options.model in zoo.names():
        model, images, pictures = _bundled(options, options.images)
    else:
        model, config = _from_timm(options)
        if not options.image:
            raise ValueError(f"give pictures with --image FILE: {options.model} comes with none")
        images = _opened(options.image, config)
        pictures = list(images)
        if not options.pretrained:
            note_random_weights()
    return _placed(model, options), _placed(images, options), pictures


def _bundled(options: argparse.Namespace, num: int) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A bundled model, some of its held-out images as it takes them, and as pictures."""
    if getattr(options, "image", None) or options.image_size or options.pretrained:
        raise ValueError(
            f"{options.model} comes with its own images and weights: drop --image, "
            "--image-size and --pretrained"
        )
    drawn = zoo.held_out(options.model).images[:num]
    return zoo.load(options.model), zoo.normalise(drawn), list(drawn)


def _from_timm(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """A model of timm, and how its images are prepared."""
    timm = require("timm", "timm")
    import tokred.models.tcformer  # noqa: F401  # gives timm the names of TCFormers

    size = {"img_size": options.image_size} if options.image_size else {}
    try:
        model = timm.create_model(options.model, pretrained=options.pretrained, **size).eval()
    except RuntimeError as error:
        raise ValueError(
            f"{error}; `timm.list_models()` has the names, and 'digits' is bundled"
        ) from error
    config = timm.data.resolve_data_config({}, model=model)
    if options.image_size:
        channels = config["input_size"][0]
        config["input_size"] = (channels, options.image_size, options.image_size)
    return model, config


def _opened(paths: Sequence[Path], config: dict[str, Any]) -> Tensor:
    """Pictures from files, whole, as a model of timm takes them."""
    pil = require("PIL.Image", "plots")
    transform = require("timm", "timm").data.create_transform(**{**config, "crop_pct": 1.0})
    originals = [pil.open(path).convert("RGB") for path in paths]
    return torch.stack([transform(picture) for picture in originals])


def _placed(what: Placed, options: argparse.Namespace) -> Placed:
    """A model or images, on the device and in the dtype that were asked for."""
    return what.to(options.device, getattr(torch, options.dtype))


def note_random_weights() -> None:
    """Says so, where nothing else would."""
    print("note: random weights; --pretrained fetches timm's", file=sys.stderr)


def reducer_of(options: argparse.Namespace) -> Reducer:
    """The method with the options that were given on the command line."""
    changes = ",".join(options.option)
    colon = "," if ":" in options.method else ":"
    made = reducers.parse(f"{options.method}{colon}{changes}" if changes else options.method)
    if options.gates and not reducers.learned(made):
        raise ValueError(f"--gates is for methods that learn, which {made} does not")
    return with_gates(made, options)


def with_gates(made: Reducer, options: argparse.Namespace) -> Reducer:
    """A method that learns, with the gates that were given, or the bundled ones."""
    if not reducers.learned(made):
        return made
    gates = getattr(options, "gates", None) or made.gates
    if gates is None and options.model in zoo.names():
        gates = zoo.gates(options.model, made.learned)
    filled: Reducer = replace(made, gates=gates)  # type: ignore[type-var]
    return filled


def keep_rate_of(options: argparse.Namespace) -> float | None:
    """What was given; if nothing, 0.5, but of gates what they were trained for."""
    if options.keep_rate is not None:
        return float(options.keep_rate)
    return None if reducers.traits(reducer_of(options)).gates else 0.5


def bar(total: int, text: str, disable: bool = False) -> Any:
    """A progress bar, which is gone when it ends."""
    return require("tqdm", "plots").tqdm(total=total, desc=text, leave=False, disable=disable)
