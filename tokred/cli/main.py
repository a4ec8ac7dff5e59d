"""The command line: `tokred demo`, `list`, `evaluate`, `advise`, `bench`, `profile`, `fidelity`,
`fid`, `train`, `inspect`, `show`, `cite`.

The demo runs on a bundled checkpoint and bundled images; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred import reducers, training
from tokred.data import (
    inputs,
    pictures,
    samples,
    zoo,  # fmt: skip
)
from tokred.engine.denoising import MODULES
from tokred.host import host
from tokred.measure import advising, evaluating, fid, metrics, tracing
from tokred.measure.suites import clustering, dense, diffusion, gates, vit
from tokred.optional import require
from tokred.reducers import Reducer
from tokred.reducers.truncate import Truncate
from tokred.show import drawing, report

KEEP_RATES = (0.9, 0.7, 0.5, 0.25)
GATES_KEEP = 0.7
"""What the bundled gates of SViT are trained for."""
BATCH = 40
"""Images per batch in the demo."""
HEAD = ("method", "keep", "tokens after", "accuracy", "change", "M mult-adds", "fewer", "images/s",
        "speed-up", "of limit")  # fmt: skip
WIDTHS = (13, 6, 14, 10, 8, 13, 7, 10, 10, 10)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors that a user can cure are one line."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError) as error:
        print(f"tokred: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokred", description=tokred.__doc__)
    parser.add_argument("--version", action="version", version=f"tokred {tokred.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    demo = command("demo", _demo, "what every method costs and gains on the bundled checkpoint")
    demo.add_argument("--out", type=Path, default=Path("tokred-demo.png"), help="picture to write")
    demo.add_argument("--limit", type=int, help="use only so many of the held-out images")
    command("list", _list, "the methods and the models they work on")
    for name, run, text in (
        ("bench", _bench, "measured speed: dense, reduced and the free limit, interleaved"),
        ("profile", _profile, "what every layer spends its time on, and where merging loses"),
        ("fidelity", _fidelity, "how close the reduced model stays to the dense one, on images"),
        ("inspect", _inspect, "how many tokens stay after each layer, and how they were merged"),
        ("show", _show, "a picture of images and their tokens"),
    ):
        made = command(name, run, text)
        made.add_argument(
            "model",
            metavar="MODEL",
            nargs="?" if name == "bench" else None,
            help="a bundled one, such as 'digits', or any timm name",
        )
        made.add_argument("--method", default="tome", help="see `tokred list` (default: tome)")
        made.add_argument(
            "--option", action="append", default=[], metavar="NAME=VALUE",
            help="an option of the method, such as linkage=complete",
        )  # fmt: skip
        made.add_argument(
            "--keep-rate", type=float, help="in (0, 1] (default: 0.5; of gates, what they learned)"
        )
        made.add_argument(
            "--gates", type=Path, help="file of a learned method (default: the bundled one, if any)"
        )
        made.add_argument("--pretrained", action="store_true", help="fetch timm's weights")
        made.add_argument("--device", default="cpu")
        made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        made.add_argument("--image-size", type=int, help="in pixels, if not the model's own")
        if name in ("bench", "profile"):
            made.add_argument("--batch", type=int, default=8)
            made.add_argument("--rounds", type=int, default=20 if name == "bench" else 10)
            made.add_argument("--json", action="store_true", help="print everything as JSON")
        if name == "profile":
            made.add_argument("--html", type=Path, metavar="FILE", help="write a page, too")
        elif name == "bench":
            made.add_argument("--compile", action="store_true", help="under torch.compile")
            many = made.add_argument_group("suites: many models and methods at once")
            many.add_argument(
                "--suite",
                choices=("vit", "clustering", "dense", "diffusion", "gates", "tcformer"),
            )
            many.add_argument("--models", nargs="+", metavar="NAME[:PIXELS]", help="not all of it")
            many.add_argument("--batches", nargs="+", type=int)
            many.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
            many.add_argument("--keep-rates", nargs="+", type=float)
            many.add_argument("--tokens", nargs="+", type=int, help="of the suite clustering")
            many.add_argument(
                "--seconds", type=float, default=120, help="for each model and batch (default: 120)"
            )
            many.add_argument(
                "--out", type=Path, help="folder for the JSON and Markdown files (default: none)"
            )
        else:
            made.add_argument("--image", type=Path, action="append", help="a picture; repeatable")
            made.add_argument(
                "--images", type=int, default=4, help="of the bundled images, how many"
            )
        if name == "fidelity":
            made.add_argument("--methods", nargs="+", metavar="METHOD", help="in place of --method")
            made.add_argument("--keep-rates", nargs="+", type=float, help="in place of --keep-rate")
            made.add_argument(
                "--preset", choices=sorted(tokred.presets), help="in place of method and keep rate"
            )
            made.add_argument(
                "--hourglass", action="store_true",
                help="few tokens from a third of the way on, for every method (slic always does)",
            )  # fmt: skip
            made.add_argument(
                "--reconstruction", choices=("copy", "nearest", "bilinear"),
                help="what the full grid is made of (default: as the method has it)",
            )  # fmt: skip
        if name == "show":
            made.add_argument("--out", type=Path, default=Path("tokens.png"))
            made.add_argument(
                "--what", choices=("tokens", "usage", "layers"), default="tokens",
                help="tokens after every reduction; how many layers used each patch; or a plot of "
                "how many patches each layer used, and which of them came back",
            )  # fmt: skip
    evaluated = command(
        "evaluate", _evaluate, "what methods and keep rates gain and cost on your images: a table"
    )
    dense = f"{' '.join(evaluating.METHODS)}; of dense models {' '.join(evaluating.DENSE_METHODS)}"
    _add_evaluation_options(evaluated, dense)
    evaluated.add_argument(
        "--keep-rates", nargs="+", type=float, default=list(evaluating.KEEP_RATES),
        help=f"in (0, 1] (default: {' '.join(f'{rate:g}' for rate in evaluating.KEEP_RATES)})",
    )  # fmt: skip
    evaluated.add_argument(
        "--hourglass", action="store_true",
        help="few tokens from a third of the way on, for every method (slic always does)",
    )  # fmt: skip
    evaluated.add_argument("--limit", type=int, help="look at only so many images, spread evenly")
    evaluated.add_argument("--plot", type=Path, metavar="FILE", help="write the plot, too")
    evaluated.add_argument("--csv", type=Path, metavar="FILE", help="write the table, too")
    evaluated.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="for what is finished (default: the user's)"
    )
    evaluated.add_argument("--fresh", action="store_true", help="measure everything again")
    advised = command("advise", _advise, "the method, layers and numbers of tokens for a budget")
    _add_evaluation_options(advised, " ".join(advising.METHODS))
    budget = advised.add_mutually_exclusive_group(required=True)
    budget.add_argument("--speedup", type=float, help="how many times as fast it has to be")
    budget.add_argument(
        "--max-drop", type=float, metavar="POINTS",
        help="how much accuracy it may lose (without labels: agreement with the dense model)",
    )  # fmt: skip
    advised.add_argument("--images", type=int, default=256, help="to try on (default: 256)")
    swept = command("fid", _fid, "images of a diffusion pipeline by method and keep rate: FID, KID")
    _add_fid_options(swept)
    trained = command("train", _train, "fine-tune a model that runs on fewer tokens, and its gates")
    _add_train_options(trained)
    cited = command("cite", _cite, "the BibTeX entry of a method")
    cited.add_argument("method")
    return parser


def _add_evaluation_options(made: argparse.ArgumentParser, reducers_tried: str) -> None:
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
        f"(default: {reducers_tried})",
    )  # fmt: skip
    add("--unlabelled", action="store_true", help="compare with the dense model alone")
    add("--task", choices=tuple(metrics.TASKS), help="if the labels do not say it")
    add(
        "--batch", type=int, help="images per batch (default: 32, fewer for large models; CUDA: 64)"
    )
    add("--seconds", type=float, default=2.0, help="how long each speed is measured (default: 2)")
    add("--workers", type=int, default=0, help="processes that read images (default: this one)")
    add("--random-weights", action="store_true", help="do not fetch timm's weights")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--html", type=Path, metavar="FILE", help="write a page with all of it, too")
    add("--json", action="store_true", help="print everything as JSON")


def _add_fid_options(swept: argparse.ArgumentParser) -> None:
    add = swept.add_argument
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
    add(
        "--modules", nargs="+", default=["attention"], choices=MODULES,
        help="around which tokens are merged (default: attention)",
    )  # fmt: skip
    add("--levels", nargs="+", type=int, help="resolutions (default: the finest that attends)")
    add("--shared", action="store_true", help="one matching for all blocks of a level")
    add("--every", type=int, default=1, metavar="STEPS", help="how long a matching is kept")
    add(
        "--during", nargs=2, type=float, default=[0.0, 1.0], metavar=("BEGIN", "END"),
        help="the part of the sampling, 0 (noise) to 1 (image), in which tokens are merged",
    )  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0], help="every setting for each (default: 0)")
    add(
        "--prompts", metavar="FILE|PRESET",
        help="a file with a prompt on each line, or a preset, which also sets images, steps, "
        f"guidance, size and reference, if not given: {', '.join(fid.presets)}",
    )  # fmt: skip
    add("--images", type=int, help="of each setting and seed (default: the preset's, or 500)")
    add("--steps", type=int, help="default: the preset's, or the pipeline's")
    add("--guidance", type=float, help="default: the preset's, or the pipeline's")
    add("--size", type=int, help="height and width (default: the preset's, or the pipeline's)")
    add("--reference", type=Path, help="a folder of pictures (digits_diffusion comes with some)")
    add(
        "--reference-per-folder", dest="per_folder", type=int, metavar="NUMBER",
        help="take so many of each of its folders (default: the preset's, or 0, all)",
    )  # fmt: skip
    add(
        "--features", choices=("inception", "digits"),
        help="what images are compared in (default: inception; for digits_diffusion: digits)",
    )  # fmt: skip
    add("--weights", type=Path, help="the file with the weights of inception")
    add("--out", type=Path, default=Path("tokred-fid"), help="folder for all of it")
    add("--batch", type=int, default=8, help="images per call (default: 8)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--device", choices=("cpu",), help="default: what accelerate finds")


def _add_train_options(trained: argparse.ArgumentParser) -> None:
    add = trained.add_argument
    standard = training.Recipe()
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
    add("--validate", type=Path, metavar="FOLDER", help="if not 'val' of the data")
    add("--out", type=Path, required=True, help="folder for all that comes of it")
    add("--keep-rate", type=float, help="in (0, 1] (default: 0.7)")
    add("--pretrained", action="store_true", help="fetch timm's weights")
    add(
        "--weights", type=Path, metavar="FILE", help="of the model, as an earlier training wrote it"
    )
    add("--frozen", action="store_true", help="train gates alone; the model stays as it is")
    add("--per-image", action="store_true", help="every image keeps the same share of tokens")
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
        add(f"--{name}", type=kind, default=default, help=f"{text} (default: {default:g})")
    for name, text in (
        ("rate", "the share of tokens that gates keep"),
        ("kl", "the distance from the dense model's classes"),
        ("distill", "the distance from the dense model's tokens"),
    ):
        add(f"--{name}", type=float, help=f"weight of {text} (default: the method's)")
    add("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    add(
        "--augment", choices=("crop", "none"),
        help="random crops and flips (default: crop; for bundled models none)",
    )  # fmt: skip
    add("--workers", type=int, default=4, help="processes that read pictures (default: 4)")
    add(
        "--every", type=int, default=500, metavar="STEPS", help="between checkpoints (default: 500)"
    )
    add("--fresh", action="store_true", help="start anew, though there is a checkpoint")


def _list(options: argparse.Namespace) -> None:
    print("methods")
    for name in reducers.names():
        print(f"  {name:12s}{_first_clause(reducers.make(name))}")
    print("hosts")
    for name in host.patch_names():
        library, extra = host.library_of(name), name.split("_")[0]
        try:
            __import__(library)
            print(f"  {name:22s}{host.hosts()[name].summary}")
        except ModuleNotFoundError:
            print(f'  {name:22s}(needs {library}: pip install "tokred[{extra}]")')


def _cite(options: argparse.Namespace) -> None:
    print(tokred.cite(options.method))


def _bench(options: argparse.Namespace) -> None:
    if options.suite:
        _bench_suite(options)
        return
    if options.model is None:
        raise ValueError("name a model, such as deit_small_patch16_224, or a --suite")
    model, images, _ = _model_and_images(options, options.batch)
    with _bar(options.rounds, "measuring") as bar:
        result = tokred.bench(
            model,
            images,
            _reducer(options),
            _keep_rate(options),
            rounds=options.rounds,
            compile=options.compile,
            on_round=lambda done, of: bar.update(),
        )
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    print(result)
    with tokred.applied(model, _reducer(options), _keep_rate(options)):
        print(f"  {tokred.flops(model, images)}")


def _profile(options: argparse.Namespace) -> None:
    model, images, _ = _model_and_images(options, options.batch)
    with _bar(options.rounds, "measuring") as bar:
        result = tokred.profile(
            model,
            images,
            _reducer(options),
            _keep_rate(options),
            rounds=options.rounds,
            on_round=lambda done, of: bar.update(),
        )
    if options.html:
        report.write(options.html, None, profile=result, title=f"Profile of {options.model}")
    print(json.dumps(result.as_dict(), indent=2) if options.json else result)


def _evaluate(options: argparse.Namespace) -> None:
    model, data, transform = _model_and_data(options)
    methods = {name: _named(name, options) for name in options.methods or ()} or None
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
    state = evaluating.Processes()
    if state.main:
        print(json.dumps(result.as_dict(), indent=2) if options.json else result)
        if options.csv:
            result.to_pandas().to_csv(options.csv, index=False)
        if options.plot:
            result.plot().savefig(options.plot, dpi=110)
        if options.html:
            tried = methods or list(dict.fromkeys(row.method for row in result.settings))
            settings = evaluating.settings_of(tried, options.keep_rates, schedule)
            of_note = [*result.front(), *result.within(0.5)][-1:]
            named = next((s for r in of_note for s in settings if s.code == r.code), None)
            _write_report(options.html, result, _Shown(model, data, transform, named))
        _tell_written(options.csv, options.plot, options.html)
    if state.state is not None:
        state.state.destroy_process_group()


def _advise(options: argparse.Namespace) -> None:
    model, data, transform = _model_and_data(options)
    methods = {name: _named(name, options) for name in options.methods or ()} or None
    found = tokred.advise(
        model,
        data,
        speedup=options.speedup,
        max_drop=options.max_drop,
        methods=methods or advising.METHODS,
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
        shown = _Shown(model, data, transform, found.setting)
        _write_report(options.html, found.evaluation, shown, found)
    _tell_written(options.html)


def _model_and_data(options: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
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


def _named(name: str, options: argparse.Namespace) -> Reducer | tokred.Preset:
    method = evaluating.method_of(name)
    if isinstance(method, tokred.Preset):
        return method
    try:
        return _with_gates(method, options)
    except ValueError:  # there are none for this model, and the table is going to say so
        return method


@dataclass(frozen=True)
class _Shown:
    """The setting that a page shows more of, and what it is shown on."""

    model: nn.Module
    data: Any
    transform: Any
    setting: evaluating.Setting | None


def _write_report(
    path: Path, evaluation: tokred.Evaluation, shown: _Shown, advice: Any = None
) -> None:
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


def _tell_written(*files: Path | None) -> None:
    for file in files:
        if file is not None:
            print(f"wrote {file}", file=sys.stderr)


def _bench_suite(options: argparse.Namespace) -> None:
    with _bar(0, "rounds") as bar:

        def lap(number: int, of: int) -> None:
            bar.total, bar.n = of, number
            bar.refresh()

        if options.suite == "clustering":
            results = clustering.run(
                options.tokens or clustering.TOKENS,
                device=options.device,
                rounds=options.rounds,
                on_round=lap,
            )
            text = clustering.markdown(results)
        elif options.suite == "dense":
            results = dense.run(
                device=options.device,
                dtype=getattr(torch, options.dtype),
                rounds=options.rounds,
                on_round=lap,
            )
            text = dense.markdown(results)
        elif options.suite == "diffusion":
            results = diffusion.run(
                options.models or tuple(diffusion.CONFIGS),
                (options.image_size or 512,),
                keep_rate=options.keep_rate or 0.5,
                device=options.device,
                dtype=getattr(torch, options.dtype),
                rounds=options.rounds,
                compile=options.compile,
                on_round=lap,
            )
            text = diffusion.markdown(results)
        elif options.suite == "gates":
            results = gates.run(
                options.models or gates.MODELS,
                options.batches or gates.BATCHES,
                device=options.device,
                dtype=getattr(torch, options.dtype),
                rounds=options.rounds,
                on_round=lap,
            )
            text = gates.markdown(results)
        elif options.suite == "tcformer":
            # Which registers models with timm, and so is not imported before it is needed.
            suite = import_module("tokred.measure.suites.tcformer")
            results = suite.run(
                (options.image_size,) if options.image_size else suite.SIZES,
                batch=(options.batches or (1,))[0],
                rounds=options.rounds,
                memory=None if options.image_size else suite.MEMORY,
                device=options.device,
                dtype=getattr(torch, options.dtype),
                on_round=lap,
            )
            text = suite.markdown(results)
        else:
            results = _run_vit(options, bar, lap)
            text = vit.markdown(results)
    whole = json.dumps(results, indent=1)
    print(whole if options.json else text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        device = "cuda" if options.device.startswith("cuda") else "cpu"
        stem = f"{options.suite}-{device}-{results['dtype']}"
        stem += "-compiled" if options.compile else ""
        for suffix, content in (("json", whole), ("md", text)):
            path = options.out / f"{stem}.{suffix}"
            path.write_text(content)
            print(f"wrote {path}", file=sys.stderr)


def _run_vit(
    options: argparse.Namespace, bar: Any, lap: Callable[[int, int], None]
) -> dict[str, Any]:
    models = [
        (name, int(pixels or 224))
        for name, _, pixels in (given.partition(":") for given in options.models or ())
    ]

    def done(group: vit.Group) -> None:
        what = f"{group.model}, {group.image_size} px, batch {group.batch}"
        bar.write(f"{what}: {group.skipped or f'{group.rounds} rounds'}", file=sys.stderr)

    return vit.run(
        models or vit.MODELS,
        options.batches or vit.BATCHES,
        options.methods
        or [name for name in reducers.names() if not reducers.learned(reducers.make(name))],
        options.keep_rates or vit.KEEP_RATES,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        compile=options.compile,
        rounds=options.rounds,
        seconds=options.seconds,
        on_group=done,
        on_round=lap,
    )


def _fidelity(options: argparse.Namespace) -> None:
    model, images, _ = _model_and_images(options, options.images)
    rates = options.keep_rates or [_keep_rate(options)]
    settings: list[tuple[str, Reducer | tokred.Preset, Any]] = []
    if options.preset:
        settings = [(options.preset, tokred.presets[options.preset], None)]
    else:
        named = options.methods or [options.method]
        if options.option and len(named) > 1:
            raise ValueError("--option goes with one method: use --method")
        methods = {name: _with_gates(reducers.parse(name), options) for name in named}
        if options.option or not options.methods:
            methods = {options.method: _reducer(options)}
        for rate in rates:
            schedule = tokred.Hourglass(rate) if options.hourglass else rate
            settings += [(name, method, schedule) for name, method in methods.items()]
    batches = images.split(8)
    print(f"{options.model}, {len(images)} images: the reduced model against the dense one")
    print(
        f"{'method':26s}{'keep':>6s}{'cosine':>9s}{'same decision':>15s}{'depth error':>13s}"
        "  tokens"
    )
    with _bar(len(settings), "settings") as bar:
        for name, method, schedule in settings:
            reduction = tokred.apply(model, method, schedule, reconstruction=options.reconstruction)
            found = tokred.fidelity(model, batches)
            tokred.remove(model)
            counts = reduction.counts(reduction.layout.patches, reduction.layout.grid)
            keep = getattr(schedule, "keep_rate", schedule)
            same = "" if found.agreement is None else f"{found.agreement:.2%}"
            depth = "" if found.depth_error is None else f"{found.depth_error:.2%}"
            bar.write(
                f"{name:26s}{'' if keep is None else keep:>6}{found.cosine:9.4f}{same:>15s}"
                f"{depth:>13s}  {' '.join(map(str, dict.fromkeys(counts)))}",
                file=sys.stdout,
            )
            bar.update()


def _inspect(options: argparse.Namespace) -> None:
    model, images, _ = _model_and_images(options, options.images)
    if tracing.tcformer_in(model) is None:  # whose tokens become few by themselves
        tokred.apply(model, _reducer(options), _keep_rate(options))
    print(tokred.inspect(model, images))


def _show(options: argparse.Namespace) -> None:
    model, images, pictures = _model_and_images(options, options.images)
    if tracing.tcformer_in(model) is None:
        tokred.apply(model, _reducer(options), _keep_rate(options))
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


def _fid(options: argparse.Namespace) -> None:
    bundled = options.pipeline == "digits_diffusion"
    named = options.prompts or ("digits" if bundled else None)
    if named is None:
        raise ValueError(f"give --prompts: a file, or one of {', '.join(fid.presets)}")
    if named in fid.presets:
        preset = fid.presets[named]
    else:
        lines = Path(named).read_text().splitlines()
        preset = fid.Preset(lambda: tuple(line for line in lines if line.strip()), images=500)

    def given(name: str) -> Any:
        value = getattr(options, name)
        return getattr(preset, name) if value is None else value

    sweep = fid.Sweep(
        tuple(options.methods), tuple(options.keep_rates), preset.prompts(), given("images"),
        tuple(options.seeds), given("steps"), given("guidance"), given("size"),
        tokred.Around(
            modules=tuple(options.modules),
            levels=None if options.levels is None else tuple(options.levels),
            shared=options.shared,
            every=options.every,
            during=tuple(options.during),
        ),
    )  # fmt: skip
    reference = options.reference
    per_folder = given("per_folder") or None
    if reference is not None:
        fid.pictures_in(reference, per_folder)  # whether they are there, before hours go by
    elif not bundled:
        raise ValueError("give --reference: a folder of real pictures to compare with")
    in_digits = (options.features or ("digits" if bundled else "inception")) == "digits"
    features = fid.DigitFeatures() if in_digits else fid.inception(options.weights)

    state = fid.process_state(cpu=options.device == "cpu")
    dtype = getattr(torch, options.dtype)
    if bundled:
        pipe = zoo.diffusion()
        if dtype != torch.float32:
            pipe.to(dtype)
    else:
        diffusion = require("diffusers", "diffusers").DiffusionPipeline
        pipe = diffusion.from_pretrained(options.pipeline, torch_dtype=dtype)
    pipe.to(state.device)
    pipe.set_progress_bar_config(disable=True)

    with _bar(0, "drawing", disable=not state.is_main_process) as bar:

        def lap(batch: fid.Batch, left: int) -> None:
            bar.total = bar.n + len(batch.numbers) + left
            bar.set_postfix_str(batch.setting.name, refresh=False)
            bar.update(len(batch.numbers))

        fid.generate(
            pipe, sweep, options.out, model=options.pipeline, batch=options.batch, on_batch=lap
        )
    if state.is_main_process:
        reference = reference or fid.digit_reference(options.out / "reference")
        with _bar(0, "comparing") as bar:

            def looked(done: int, of: int) -> None:
                bar.total, bar.n = of, done
                bar.refresh()

            features.eval().to(state.device)
            scores = fid.score(
                sweep, options.out, reference, features, per_folder=per_folder, on_images=looked
            )
        files = fid.report(sweep, options.out, scores)
        print(fid.markdown(scores))
        print(f"wrote {', '.join(map(str, files))}", file=sys.stderr)
    state.destroy_process_group()


def _train(options: argparse.Namespace) -> None:
    method = None if options.method == "none" else reducers.parse(options.method)
    usual = training.recipes.get(options.method.partition(":")[0], training.Recipe())
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(usual)
        if getattr(options, field.name, None) is not None
    }
    # A method that keeps a fixed number of tokens is best trained to.
    fixed = usual.per_image or bool(getattr(method, "fixed", False))
    recipe = dataclasses.replace(usual, **{**given, "per_image": options.per_image or fixed})

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
        print("note: random weights; --pretrained fetches timm's", file=sys.stderr)
    if options.weights is not None:
        try:
            require("safetensors.torch", "train").load_model(model, options.weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{options.weights} does not fit {options.model}: {reason}") from error
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
        (options.out / "classes.json").write_text(json.dumps(data.classes, indent=1))
        print(f"{options.method} on {options.model}, {recipe.epochs} epochs, {fitted.steps} steps")
        if fitted.resumed:
            print(f"went on from step {fitted.resumed}")
        print(f"loss {fitted.last['loss']:.4g}")
        if fitted.accuracy is not None:
            tokens = "" if method is None else f", {fitted.tokens:.1f} tokens in the mean layer"
            print(f"accuracy {fitted.accuracy:.2%} on {len(held_out or ())} pictures{tokens}")
        print(f"wrote {options.out}", file=sys.stderr)
    state.destroy_process_group()


def _demo(options: argparse.Namespace) -> None:
    require("matplotlib", "plots")
    begin = time.perf_counter()
    held_out = zoo.held_out()
    batches = [
        (zoo.normalise(images), labels)
        for images, labels in zip(
            held_out.images[: options.limit].split(BATCH),
            held_out.labels[: options.limit].split(BATCH),
            strict=True,
        )
    ]
    model = zoo.load()
    # Methods for dense prediction have a schedule of their own, and no place in this table.
    methods = {name: reducers.make(name) for name in reducers.names()}
    methods = {
        name: one
        for name, one in methods.items()
        if not hasattr(one, "schedule") and not reducers.learned(one)
    }
    methods["atc complete"] = tokred.ATC(linkage="complete")
    methods["dynamicvit"] = tokred.DynamicViT(zoo.gates(method="dynamicvit"))
    trained = {"svit": tokred.SViT(zoo.gates())}  # for one keep rate
    num = sum(len(labels) for _, labels in batches)
    print(
        f"{zoo.DEFAULT}: a ViT of 12 blocks and width 64, on {num} held-out images of 56x56 "
        f"pixels (196 patch tokens)\nspeed: batches of {BATCH}, float32, "
        f"{torch.get_num_threads()} threads; dense and reduced models take turns, and their "
        "medians are compared\n"
        "limit: the speed-up of cutting off as many tokens at no cost, which no method can beat\n"
    )
    points: dict[str, list[tuple[float, float]]] = {}
    laps_of_all = (len(methods) + 1) * len(KEEP_RATES) + len(trained)
    with _bar(laps_of_all * len(batches), "demo") as bar, torch.no_grad():

        def row(*cells: str) -> None:
            first, *rest = (cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))
            bar.write(first.strip().ljust(WIDTHS[0]) + "".join(rest), file=sys.stdout)

        row(*HEAD)
        for rate in KEEP_RATES:
            racing = {**methods, **(trained if rate == GATES_KEEP else {})}
            laps = _race(model, {"limit": Truncate(), **racing}, rate, batches, bar)
            dense = laps["dense"]
            if rate == KEEP_RATES[0]:
                macs = tokred.flops(model, batches[0][0][:1]).dense / 1e6
                row("dense", "", "196", f"{dense.accuracy:.1%}", "", f"{macs:.1f}", "",
                    f"{dense.speed:.0f}", "", "")  # fmt: skip
            for name, reducer in sorted(racing.items()):
                lap = laps[name]
                with tokred.applied(model, reducer, rate):
                    counted = tokred.flops(model, batches[0][0][:1])
                speed_up = lap.speed / dense.speed
                row(
                    name,
                    f"{rate}",
                    _more_or_less(reducer) + " ".join(map(str, lap.stages)),
                    f"{lap.accuracy:.1%}",
                    f"{(lap.accuracy - dense.accuracy) * 100:+.1f}",
                    f"{counted.reduced / 1e6:.1f}",
                    f"{counted.ratio:.2f}x",
                    f"{lap.speed:.0f}",
                    f"{speed_up:.2f}x",
                    f"{lap.speed / laps['limit'].speed:.2f}",
                )
                points.setdefault(name, []).append((speed_up, lap.accuracy * 100))
    _draw_demo(model, held_out.images[:3], points, dense.accuracy * 100, options.out)
    print(f"\nwrote {options.out}; {time.perf_counter() - begin:.0f} s in all")


def _more_or_less(reducer: Reducer) -> str:
    """What to write before the numbers of tokens that a schedule asks for."""
    if not reducers.varies(reducer):
        return ""
    return "~ " if reducers.learned(reducer) else "<= "


@dataclass(frozen=True)
class _Lap:
    """One method at one keep rate of the demo: accuracy, images per second (median), and how many
    tokens stay after each stage (at most, where that differs by image)."""

    accuracy: float
    speed: float
    stages: tuple[int, ...]


def _race(
    model: nn.Module,
    methods: dict[str, Reducer],
    keep_rate: float,
    batches: list[tuple[Tensor, Tensor]],
    bar: Any,
) -> dict[str, _Lap]:
    """The dense model and all methods, taking turns batch by batch."""
    right = dict.fromkeys(["dense", *methods], 0)
    speeds: dict[str, list[float]] = {name: [] for name in right}
    for number, (images, labels) in enumerate(batches):
        for name in right:
            if name == "dense":
                tokred.remove(model)
            else:
                around = reducers.place(methods[name]) == "around"
                tokred.apply(model, methods[name], keep_rate, full_grid=around)
                bar.update()
            if number == 0:
                model(images[:2])  # what is compiled at its first call is not timed
            answers, speed = _timed(model, images)
            right[name] += int((answers == labels).sum())
            if len(images) == BATCH or len(batches) == 1:
                speeds[name].append(speed)
    tokred.remove(model)
    counts = tokred.Stages(keep_rate)(196, 12)
    stages = tuple(sorted(set(counts), reverse=True)[1:])
    num = sum(len(labels) for _, labels in batches)
    return {
        name: _Lap(right[name] / num, statistics.median(speeds[name]), stages) for name in right
    }


def _timed(model: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """The answers, and images per second."""
    begin = time.perf_counter()
    answers = model(images).argmax(1)
    return answers, len(images) / (time.perf_counter() - begin)


def _draw_demo(
    model: nn.Module,
    images: Tensor,
    points: dict[str, list[tuple[float, float]]],
    dense: float,
    out: Path,
) -> None:
    plots = require("matplotlib.figure", "plots")
    sheets = []
    for method in ("tome", "atc", "topk"):
        with tokred.applied(model, method, 0.5):
            trace = tokred.inspect(model, zoo.normalise(images))
        sheets.append((method, drawing.stack(tokred.visualise(trace, images))))
    figure = plots.Figure(figsize=(15, 12), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    drawing.plot_trade_off(figure.add_subplot(grid[0, 0]), points, dense)
    for place, (method, sheet) in zip((grid[0, 1], grid[1, 0], grid[1, 1]), sheets, strict=True):
        axes = figure.add_subplot(place)
        axes.imshow(sheet, interpolation="lanczos")
        axes.set_title(f"{method}, keep rate 0.5: tokens after each stage")
        axes.axis("off")
    figure.savefig(out, dpi=110)


def _model_and_images(
    options: argparse.Namespace, num: int
) -> tuple[nn.Module, Tensor, Sequence[Any]]:
    """The model, what it takes, and the same as pictures for people."""
    dtype = getattr(torch, options.dtype)
    pictures: Sequence[Any]
    given = getattr(options, "image", None)
    if options.model in zoo.names():
        if given or options.image_size or options.pretrained:
            raise ValueError(
                f"{options.model} comes with its own images and weights: drop --image, "
                "--image-size and --pretrained"
            )
        model = zoo.load(options.model)
        drawn = zoo.held_out(options.model).images[:num]
        pictures, images = list(drawn), zoo.normalise(drawn)
    else:
        timm = require("timm", "timm")
        import_module("tokred.models.tcformer")  # which gives timm their names
        size = {"img_size": options.image_size} if options.image_size else {}
        try:
            model = timm.create_model(options.model, pretrained=options.pretrained, **size).eval()
        except RuntimeError as error:
            raise ValueError(
                f"{error}; `timm.list_models()` has the names, and 'digits' is bundled"
            ) from error
        config = timm.data.resolve_data_config({}, model=model)
        channels, height, width = config["input_size"]
        if options.image_size:
            height = width = options.image_size
        if given:
            pil = require("PIL.Image", "plots")
            config["input_size"], config["crop_pct"] = (channels, height, width), 1.0
            transform = timm.data.create_transform(**config)
            originals = [pil.open(path).convert("RGB") for path in given]
            images = torch.stack([transform(picture) for picture in originals])
            pictures = list(images)
        elif options.run in (_bench, _profile):
            images = torch.randn(num, channels, height, width)
            pictures = list(images)
        else:
            raise ValueError(f"give pictures with --image FILE: {options.model} comes with none")
        if not options.pretrained and options.run not in (_bench, _profile):
            print("note: random weights; --pretrained fetches timm's", file=sys.stderr)
    return model.to(options.device, dtype), images.to(options.device, dtype), pictures


def _reducer(options: argparse.Namespace) -> Reducer:
    """The method with the options that were given on the command line."""
    changes = ",".join(options.option)
    colon = "," if ":" in options.method else ":"
    made = reducers.parse(f"{options.method}{colon}{changes}" if changes else options.method)
    if options.gates and not reducers.learned(made):
        raise ValueError(f"--gates is for methods that learn, which {made} does not")
    return _with_gates(made, options)


def _with_gates(made: Reducer, options: argparse.Namespace) -> Reducer:
    """A method that learns, with the gates that were given, or the bundled ones."""
    if not reducers.learned(made):
        return made
    gates = getattr(options, "gates", None) or getattr(made, "gates", None)
    if gates is None and options.model in zoo.names():
        gates = zoo.gates(options.model, made.learned)
    filled: Reducer = replace(made, gates=gates)  # type: ignore[type-var]
    return filled


def _keep_rate(options: argparse.Namespace) -> float | None:
    """What was given; if nothing, 0.5, but of gates what they were trained for."""
    if options.keep_rate is not None:
        return float(options.keep_rate)
    return None if getattr(_reducer(options), "gates", None) else 0.5


def _first_clause(reducer: Reducer) -> str:
    return (type(reducer).__doc__ or "").strip().split("\n")[0]


def _bar(total: int, text: str, disable: bool = False) -> Any:
    tqdm = require("tqdm", "plots")
    return tqdm.tqdm(total=total, desc=text, leave=False, disable=disable)
