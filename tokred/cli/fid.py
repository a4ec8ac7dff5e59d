"""`tokred fid`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokred
from tokred.cli.shared import DTYPES, Commands, bar, command
from tokred.data import zoo
from tokred.engine.denoising import MODULES
from tokred.measure import fid
from tokred.optional import require

BUNDLED = "digits_diffusion"
"""The pipeline that comes with prompts, features and a reference."""


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    text = "images of a diffusion pipeline by method and keep rate: FID, KID"
    made = command(commands, "fid", run, text)
    add = made.add_argument
    add(
        "pipeline", metavar="PIPELINE",
        help="'digits_diffusion', which is bundled, or what diffusers loads: a folder or a name",
    )  # fmt: skip
    add(
        "--methods", nargs="*", default=["tome"], metavar="METHOD",
        help="with options after a colon, such as atc:single (default: tome)",
    )  # fmt: skip
    add(
        "--keep-rates", nargs="+", type=float, default=list(fid.KEEP_RATES),
        help=f"in (0, 1] (default: {' '.join(f'{rate:g}' for rate in fid.KEEP_RATES)})",
    )  # fmt: skip
    _add_reduction_options(made)
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        help="draw every setting with each of them (default: 0)",
    )
    add(
        "--prompts", metavar="FILE|PRESET",
        help="a file with a prompt on each line, or a preset, which also sets those of images, "
        f"steps, guidance, size and reference that are not given: {', '.join(fid.presets)}",
    )  # fmt: skip
    add("--images", type=int, help="of each setting and seed (default: the preset's, or 500)")
    add("--steps", type=int, help="default: the preset's, or the pipeline's")
    add("--guidance", type=float, help="default: the preset's, or the pipeline's")
    add("--size", type=int, help="height and width (default: the preset's, or the pipeline's)")
    _add_score_options(made)
    add("--out", type=Path, default=Path("tokred-fid"), help="folder for all results")
    add("--batch", type=int, default=8, help="images per call (default: 8)")
    add("--dtype", default="float32", choices=DTYPES)
    add("--device", choices=("cpu",), help="default: what accelerate finds")


def _add_reduction_options(made: argparse.ArgumentParser) -> None:
    """Where and when tokens are merged."""
    add = made.add_argument
    add(
        "--modules", nargs="+", default=["attention"], choices=MODULES,
        help="around which tokens are merged (default: attention)",
    )  # fmt: skip
    add(
        "--levels",
        nargs="+",
        type=int,
        help="resolutions, 0 is that of the latents (default: the finest that has attention)",
    )
    add("--shared", action="store_true", help="one matching for all blocks of a level")
    add(
        "--every",
        type=int,
        default=1,
        metavar="STEPS",
        help="for how many steps a matching is kept",
    )
    add(
        "--during", nargs=2, type=float, default=[0.0, 1.0], metavar=("BEGIN", "END"),
        help="the part of the sampling, 0 (noise) to 1 (image), in which tokens are merged",
    )  # fmt: skip


def _add_score_options(made: argparse.ArgumentParser) -> None:
    """What images are compared with, and in what."""
    add = made.add_argument
    add("--reference", type=Path, help="a folder of pictures (digits_diffusion comes with some)")
    add(
        "--reference-per-folder", dest="per_folder", type=int, metavar="NUMBER",
        help="how many pictures of each of its folders to take (default: the preset's, or 0, all)",
    )  # fmt: skip
    add(
        "--features", choices=("inception", "digits"),
        help="the features that images are compared by "
        "(default: inception; for digits_diffusion: digits)",
    )  # fmt: skip
    add("--weights", type=Path, help="the file with the weights of inception")


def run(options: argparse.Namespace) -> None:
    """Draws all images; the main process compares them, prints the table and writes the files."""
    preset = _preset(options)
    sweep = _sweep(options, preset)
    per_folder = (preset.per_folder if options.per_folder is None else options.per_folder) or None
    if options.reference is not None:
        # Whether they are there is to be known before hours go by.
        fid.pictures_in(options.reference, per_folder)
    elif options.pipeline != BUNDLED:
        raise ValueError("give --reference: a folder of real pictures to compare with")
    features = _features(options)
    state = fid.process_state(cpu=options.device == "cpu")
    pipe = _pipeline(options).to(state.device)
    pipe.set_progress_bar_config(disable=True)
    with bar(0, "drawing", disable=not state.is_main_process) as images:

        def lap(batch: fid.Batch, left: int) -> None:
            images.total = images.n + len(batch.numbers) + left
            images.set_postfix_str(batch.setting.name, refresh=False)
            images.update(len(batch.numbers))

        fid.generate(
            pipe, sweep, options.out, model=options.pipeline, batch=options.batch, on_batch=lap
        )
    if state.is_main_process:
        _compare(options, sweep, per_folder, features.eval().to(state.device))
    state.destroy_process_group()


def _preset(options: argparse.Namespace) -> fid.Preset:
    """What the prompts set: a preset, or a file, which sets nothing else."""
    named = options.prompts or ("digits" if options.pipeline == BUNDLED else None)
    if named is None:
        raise ValueError(f"give --prompts: a file, or one of {', '.join(fid.presets)}")
    if named in fid.presets:
        return fid.presets[named]
    lines = Path(named).read_text().splitlines()
    return fid.Preset(lambda: tuple(line for line in lines if line.strip()), images=500)


def _sweep(options: argparse.Namespace, preset: fid.Preset) -> fid.Sweep:
    """What is drawn: as the options say, else as the preset does."""

    def given(name: str) -> Any:
        value = getattr(options, name)
        return getattr(preset, name) if value is None else value

    around = tokred.Around(
        modules=tuple(options.modules),
        levels=None if options.levels is None else tuple(options.levels),
        shared=options.shared,
        every=options.every,
        during=tuple(options.during),
    )
    return fid.Sweep(
        tuple(options.methods), tuple(options.keep_rates), preset.prompts(), given("images"),
        tuple(options.seeds), given("steps"), given("guidance"), given("size"), around,
    )  # fmt: skip


def _features(options: argparse.Namespace) -> nn.Module:
    """What images are compared in."""
    usual = "digits" if options.pipeline == BUNDLED else "inception"
    if (options.features or usual) == "digits":
        return fid.DigitFeatures()
    return fid.inception(options.weights)


def _pipeline(options: argparse.Namespace) -> Any:
    dtype = getattr(torch, options.dtype)
    if options.pipeline != BUNDLED:
        diffusion = require("diffusers", "diffusers").DiffusionPipeline
        return diffusion.from_pretrained(options.pipeline, torch_dtype=dtype)
    pipe = zoo.diffusion()
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def _compare(
    options: argparse.Namespace, sweep: fid.Sweep, per_folder: int | None, features: nn.Module
) -> None:
    """Compares the images with the reference, prints the table and writes the files."""
    reference = options.reference or fid.digit_reference(options.out / "reference")
    with bar(0, "comparing") as images:

        def looked(done: int, of: int) -> None:
            images.total, images.n = of, done
            images.refresh()

        scores = fid.score(
            sweep, options.out, reference, features, per_folder=per_folder, on_images=looked
        )
    files = fid.report(sweep, options.out, scores)
    print(fid.markdown(scores))
    print(f"wrote {', '.join(map(str, files))}", file=sys.stderr)
