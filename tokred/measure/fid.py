"""`tokred fid`: what a diffusion pipeline's images lose as fewer tokens are kept.

A sweep draws the same images (prompts and seeds) for every method and keep rate, and without any
reduction; then it compares each set with a reference folder, by the Frechet distance (Heusel et
al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017, https://arxiv.org/abs/1706.08500)
and the kernel distance (Binkowski et al., "Demystifying MMD GANs", ICLR 2018,
https://arxiv.org/abs/1801.01401), and each image with the one drawn without reduction.

    sweep = fid.Sweep(("tome", "atc:single"), (0.7, 0.5), prompts, images=500)
    fid.generate(pipe, sweep, out)
    fid.report(sweep, out, fid.score(sweep, out, reference, fid.DigitFeatures()))

Everything is on disk: a sweep that was stopped goes on where it was, by calling it again. Under
`accelerate launch` every process draws its share of the batches; scores are computed by one process
from the files alone. Needs `pip install "tokred[fid]"`.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import itertools
import json
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tokred.data import zoo
from tokred.engine.denoising import NAMED, Around
from tokred.host import module_of
from tokred.optional import require
from tokred.patching import applied, reduction_of
from tokred.reducers import parse

T = TypeVar("T")

DENSE = "dense"
"""What the pipeline without reduction is called among the methods."""

KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)

SEEDS = 1_000_000
"""Image i of seed s is drawn from a generator with seed s * SEEDS + i."""

KID_SUBSETS = 100
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_PER_BATCH = 32
"""Images whose features are extracted at a time; always as many, so that figures are the same."""


@dataclass(frozen=True)
class Setting:
    """A method at a keep rate, with the seed that its images start from."""

    method: str
    keep_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder, such as "atc-single-keep0.5-seed0"."""
        keep = "" if self.method == DENSE else f"-keep{self.keep_rate:g}"
        return f"{re.sub('[^A-Za-z0-9_.]+', '-', self.method).strip('-')}{keep}-seed{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """What is drawn.

    Args:
        methods: as on the command line: "tome", "atc:single" (`tokred.reducers.parse`), by what
            their names mean for denoisers.
        keep_rates: in (0, 1]. At 1 nothing is reduced: those images are drawn once for all methods,
            also if 1 is not among the keep rates, since the others are compared with them.
        prompts: image i shows prompt i, counted from the first again after the last.
        images: of each setting.
        seeds: every setting is drawn for each of them.
        steps, guidance, size: what the pipeline is called with as `num_inference_steps`,
            `guidance_scale`, and `height` and `width`; its own values if not given.
        around: where and when tokens are merged, at the keep rate of each setting.

    Raises:
        ValueError: a method or an option is unknown, or another value is out of range.
    """

    methods: tuple[str, ...]
    keep_rates: tuple[float, ...]
    prompts: tuple[str, ...]
    images: int
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    around: Around = field(default_factory=Around)

    def __post_init__(self) -> None:
        for method in self.methods:
            parse(method, NAMED)
        for rate in self.keep_rates:
            if not 0 < rate <= 1:
                raise ValueError(f"keep rates must be in (0, 1], the share of tokens, not {rate}")
        if not self.prompts:
            raise ValueError("prompts must hold at least one")
        if not 2 <= self.images <= SEEDS:
            raise ValueError(f"images must be 2 to {SEEDS:,} of each setting, not {self.images}")
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"seeds must be one or more, from 0 on, not {self.seeds}")
        names = [setting.name for setting in self.settings()]
        if len(set(names)) < len(names):
            raise ValueError(f"two settings have the same name: {', '.join(names)}")

    def settings(self) -> list[Setting]:
        """All that is drawn, first without reduction; then by method and keep rate."""
        rates = [rate for rate in dict.fromkeys(self.keep_rates) if rate != 1]
        pairs = [(DENSE, 1.0), *itertools.product(self.methods, rates)]
        return [Setting(*pair, seed) for pair in pairs for seed in dict.fromkeys(self.seeds)]

    def prompt(self, number: int) -> str:
        """What image `number` shows."""
        return self.prompts[number % len(self.prompts)]


@dataclass(frozen=True)
class Preset:
    """Values of a sweep that go together.

    Attributes:
        prompts: makes the prompts.
        per_folder: images of the reference, of every folder in it; all if None.
    """

    prompts: Callable[[], tuple[str, ...]]
    images: int
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    per_folder: int | None = None


def imagenet_prompts() -> tuple[str, ...]:
    """A photo of each of the 1,000 classes of ImageNet, by their names in torchvision."""
    models = require("torchvision.models", "torchvision")
    categories = models.ResNet50_Weights.DEFAULT.meta["categories"]
    return tuple(f"a photo of a {name}" for name in categories)


def digit_prompts() -> tuple[str, ...]:
    """The ten digits."""
    return tuple("0123456789")


presets: dict[str, Preset] = {
    "digits": Preset(digit_prompts, images=500),
    "imagenet": Preset(
        imagenet_prompts, images=2000, steps=50, guidance=7.5, size=512, per_folder=5
    ),
}


# Drawing


@dataclass(frozen=True)
class Batch:
    """Images that are drawn in one call of the pipeline: numbers within a setting."""

    setting: Setting
    numbers: tuple[int, ...]


def generate(
    pipe: Any,
    sweep: Sweep,
    out: Path,
    *,
    model: str = "",
    batch: int = 8,
    on_batch: Callable[[Batch, int], None] | None = None,
) -> None:
    """Draws what is not on disk yet: this process's share of it, then waits for the others.

    Images are `out/<setting>/<number>.png`. `out/sweep.json` holds what they depend on; methods,
    keep rates, seeds and images may be added later. How long batches took is in `out/times`.

    An image depends on its prompt and its seed. Which others it is drawn with changes the rounding
    alone; so that not even this depends on the number of processes, they share whole batches, which
    are the same for any number. (Where rounding decides between two tokens to merge, another
    `batch` may change an image visibly.)

    Args:
        pipe: called as diffusers' pipelines are, with lists of prompts and of generators, one for
            each image; nothing may be reduced in it.
        sweep: what is drawn.
        out: the folder, which is made if need be; all processes must see it.
        model: what the pipeline is called in `sweep.json`.
        batch: images per call.
        on_batch: called after each with it and with how many images this process has still to draw;
            before the first, with an empty batch.

    Raises:
        ValueError: the folder holds images of another model, or of other prompts, steps, guidance,
            size, dtype or versions; or the pipeline is reduced already.
        ModuleNotFoundError: accelerate is not installed.
    """
    state = process_state()
    pinned = pins(pipe, sweep, model)
    for method in sweep.methods:
        with _reduced(pipe, sweep, Setting(method, min(sweep.keep_rates, default=1), 0)):
            pass  # refused now, rather than after hours

    def begin() -> tuple[list[Batch], str]:
        pin(out, pinned)
        return plan(sweep, out, batch), f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"

    # One process looks at the disk: others would look at other times.
    batches, run = _by_main_process(state, begin)
    mine = share(batches, state.process_index, state.num_processes)
    times = out / "times" / f"{run}-{state.process_index}.jsonl"
    draw(pipe, sweep, out, mine, times=times, on_batch=on_batch)
    state.wait_for_everyone()


def process_state(cpu: bool = False) -> Any:
    """accelerate's `PartialState`: which of how many processes this is, and its device.

    Args:
        cpu: use no other device.

    Raises:
        ModuleNotFoundError: accelerate is not installed.
    """
    cpu = cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    # Without being told, accelerate takes each of several processes on CPUs for the only one.
    cpu = cpu or not torch.accelerator.is_available()
    # The fastest process may have to wait for the slowest as long as that takes.
    return require("accelerate", "fid").PartialState(cpu, timeout=datetime.timedelta(days=14))


def pins(pipe: Any, sweep: Sweep, model: str = "") -> dict[str, Any]:
    """What images depend on, besides method, keep rate, seed and number; as JSON has it.

    Raises:
        ValueError: the pipeline is reduced already.
    """
    denoiser = module_of(pipe)
    if isinstance(denoiser, nn.Module) and reduction_of(denoiser) is not None:
        raise ValueError("the pipeline is reduced already: call tokred.remove(pipe) first")
    parts = getattr(pipe, "components", {"denoiser": denoiser})
    scheduler = getattr(pipe, "scheduler", None)
    config = {
        key: value
        for key, value in dict(getattr(scheduler, "config", {})).items()
        if not key.startswith("_")
    }
    found = {
        "model": model,
        "pipeline": type(pipe).__name__,
        "weights": {
            name: fingerprint(part) for name, part in parts.items() if isinstance(part, nn.Module)
        },
        "scheduler": {"class": type(scheduler).__name__, **config},
        "dtype": str(getattr(denoiser, "dtype", None)).removeprefix("torch."),
        "prompts": sweep.prompts,
        "steps": sweep.steps,
        "guidance": sweep.guidance,
        "size": sweep.size,
        "around": {  # but for what is the default
            key: value
            for key, value in asdict(sweep.around).items()
            if key not in ("keep_rate", "_ratio") and value != getattr(Around(), key)
        },
        "versions": {
            "tokred": sys.modules["tokred"].__version__,
            **{name: _version(name) for name in ("torch", "diffusers")},
        },
    }
    as_read: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return as_read


def pin(out: Path, pinned: Mapping[str, Any]) -> None:
    """Writes `out/sweep.json`, or compares it with what is there.

    Raises:
        ValueError: something differs.
    """
    file = out / "sweep.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(pinned, indent=1))
        return
    before, now = (dict(_leaves(tree)) for tree in (json.loads(file.read_text()), pinned))
    differences = [
        f"{key} was {_short(before.get(key))}, and is {_short(now.get(key))}"
        for key in [*before, *(key for key in now if key not in before)]
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise ValueError(
            f"{out} holds images of another sweep: {'; '.join(differences)}. Give another folder, "
            "or the values from before"
        )


def plan(sweep: Sweep, out: Path, batch: int) -> list[Batch]:
    """The batches that are missing on disk. Their bounds are the same however many there are.

    Raises:
        ValueError: a batch of less than one image.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    batches = []
    for setting in sweep.settings():
        there = {file.name for file in (out / setting.name).glob("*.png")}
        for start in range(0, sweep.images, batch):
            numbers = range(start, min(start + batch, sweep.images))
            missing = tuple(number for number in numbers if _file(number) not in there)
            if missing:
                batches.append(Batch(setting, missing))
    return batches


def share(batches: Sequence[Batch], process: int, processes: int) -> list[Batch]:
    """Those of one process, 0 to `processes` - 1: every so manieth, so that each draws some of
    every setting."""
    return list(batches[process::processes])


def draw(
    pipe: Any,
    sweep: Sweep,
    out: Path,
    batches: Sequence[Batch],
    *,
    times: Path,
    on_batch: Callable[[Batch, int], None] | None = None,
) -> None:
    """Draws batches, writes their images, and adds a line to `times` for each."""
    left = sum(len(batch.numbers) for batch in batches)
    given: dict[str, Any] = {
        "num_inference_steps": sweep.steps,
        "guidance_scale": sweep.guidance,
        "height": sweep.size,
        "width": sweep.size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    device = str(getattr(pipe, "device", "cpu"))
    if on_batch is not None and batches:
        on_batch(Batch(batches[0].setting, ()), left)
    for setting, together in itertools.groupby(batches, key=lambda batch: batch.setting):
        (out / setting.name).mkdir(parents=True, exist_ok=True)
        with _reduced(pipe, sweep, setting):
            for batch in together:
                begin = time.perf_counter()
                images = pipe(
                    [sweep.prompt(number) for number in batch.numbers],
                    # Noise from the CPU is the same on every device.
                    generator=[generator(setting.seed, number) for number in batch.numbers],
                    output_type="pil",
                    **given,
                ).images
                seconds = time.perf_counter() - begin
                for number, image in zip(batch.numbers, images, strict=True):
                    _save(image, out / setting.name / _file(number))
                took = {"setting": setting.name, "images": len(batch.numbers), "seconds": seconds}
                times.parent.mkdir(exist_ok=True)
                with times.open("a") as file:
                    file.write(json.dumps({**took, "device": device}) + "\n")
                left -= len(batch.numbers)
                if on_batch is not None:
                    on_batch(batch, left)


def generator(seed: int, number: int) -> torch.Generator:
    """Where the noise of an image comes from, in every setting the same."""
    return torch.Generator().manual_seed(seed * SEEDS + number)


def _reduced(pipe: Any, sweep: Sweep, setting: Setting) -> AbstractContextManager[Any]:
    if setting.method == DENSE or setting.keep_rate == 1:
        return nullcontext()
    around = replace(sweep.around, keep_rate=setting.keep_rate)
    return applied(pipe, parse(setting.method, NAMED), around)


def _by_main_process(state: Any, work: Callable[[], T]) -> T:
    """What the main process makes of `work`, in every process; its error, too, so that nobody
    waits for a process that is gone."""
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [work()]
        except (ValueError, OSError) as error:
            outcome = [error]
    require("accelerate.utils", "fid").broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: T = outcome[0]
    return result


# Scores


@dataclass(frozen=True)
class Score:
    """What became of the images of one setting.

    Attributes:
        method, keep_rate, seed: the setting.
        images: how many were compared.
        fid: the Frechet distance between their features and those of the reference.
        kid, kid_std: the kernel distance, mean and standard deviation over subsets.
        pixel_distance: the root mean square of the difference from the image without reduction,
            pixels from 0 to 1; mean over images.
        feature_distance: the Euclidean distance between the features of both; mean over images.
        images_per_second: of all processes together, by the median batch of each; of the one run
            that drew the most of them. None if nothing was timed.
        timed_images, processes, device: how many images that is from, drawn by how many processes,
            on which kind of device.
    """

    method: str
    keep_rate: float
    seed: int
    images: int
    fid: float
    kid: float
    kid_std: float
    pixel_distance: float
    feature_distance: float
    images_per_second: float | None = None
    timed_images: int = 0
    processes: int = 0
    device: str = ""


@dataclass(frozen=True)
class Scores:
    """All that `score` found.

    Attributes:
        rows: one for each setting.
        reference: where the reference is, and how many images it has.
        features: what images are compared in, and how many features there are.
        kid_subset: images in each subset that the kernel distance is taken over.
        pixels: for each setting, the `pixel_distance` of every image.
        moved: the same, the `feature_distance`.
    """

    rows: tuple[Score, ...]
    reference: tuple[str, int]
    features: tuple[str, int]
    kid_subset: int
    pixels: tuple[Float[np.ndarray, " images"], ...]
    moved: tuple[Float[np.ndarray, " images"], ...]


def score(
    sweep: Sweep,
    out: Path,
    reference: Path,
    features: nn.Module,
    *,
    per_folder: int | None = None,
    on_images: Callable[[int, int], None] | None = None,
) -> Scores:
    """Compares the images of every setting with a reference, and with those without reduction.

    Reads files alone, and in a fixed order: whoever drew them, figures are the same. Features are
    kept in `out/features`, and extracted again if files or the extractor have changed.

    Args:
        sweep: what was drawn.
        out: where `generate` has put it.
        reference: a folder of pictures, with those in its folders. Those of another size are cut to
            the aspect of the images that were drawn, about the centre, and resized.
        features: from images [batch, 3, height, width], uint8, to features [batch, dim]: such as
            `DigitFeatures()` or `inception(weights)`.
        per_folder: of every folder in the reference, only so many pictures, by name; all if None.
        on_images: called with (images done, images in all) as features are extracted.

    Raises:
        ValueError: images or references are missing.
        ModuleNotFoundError: torchmetrics is not installed.
    """
    require("torchmetrics.image.fid", "fid")
    settings = sweep.settings()
    files = {setting: _drawn(sweep, out, setting) for setting in settings}
    pictures = pictures_in(reference, per_folder)
    size = _size(files[settings[0]][0])
    named, dim = type(features).__name__, 0
    total = len(pictures) + len(settings) * sweep.images
    done = 0

    def extracted(paths: Sequence[Path], beside: Sequence[Path] | None, name: str) -> _Measured:
        nonlocal done

        def advance(images: int) -> None:
            if on_images is not None:
                on_images(done + images, total)

        found = _measure(paths, beside, size, features, out / "features" / f"{name}.npz", advance)
        done += len(paths)
        advance(0)
        return found

    theirs = extracted(pictures, None, "reference").features
    dim = theirs.shape[1]
    if min(sweep.images, len(pictures)) <= dim:
        warnings.warn(
            f"{min(sweep.images, len(pictures))} images for {dim} features: the Frechet distance "
            "of so few is far too large, and comparable only with others of as many",
            stacklevel=2,
        )
    subset = min(1000, sweep.images, len(pictures))
    if subset < 1000:  # so that subsets differ
        subset = max(2, subset // 2)
    speeds = speeds_in(out / "times")
    dense: dict[int, _Measured] = {}
    rows, pixels, moved = [], [], []
    for setting in settings:
        beside = files[Setting(DENSE, 1.0, setting.seed)]
        ours = extracted(files[setting], beside, setting.name)
        if setting.method == DENSE:
            dense[setting.seed] = ours
        if ours.blank:
            warnings.warn(
                f"{setting.name}: {ours.blank} of {sweep.images} images have a single colour, as "
                "if a safety checker had blacked them out, or numbers had overflowed",
                stacklevel=2,
            )
        away = np.linalg.norm(ours.features - dense[setting.seed].features, axis=1)
        kid, kid_std = kernel_distance(ours.features, theirs, subset)
        rows.append(
            Score(
                **asdict(setting),
                images=sweep.images,
                fid=frechet_distance(ours.features, theirs),
                kid=kid,
                kid_std=kid_std,
                pixel_distance=float(ours.pixels.mean()),
                feature_distance=float(away.mean()),
                **speeds.get(setting.name, {}),
            )
        )
        pixels.append(ours.pixels)
        moved.append(away)
    return Scores(
        tuple(rows), (str(reference), len(pictures)), (named, dim), subset,
        tuple(pixels), tuple(moved),
    )  # fmt: skip


def frechet_distance(
    ours: Float[np.ndarray, "some dim"], theirs: Float[np.ndarray, "others dim"]
) -> float:
    """Between Gaussians of the same means and covariances:
    `|m - n|^2 + tr(A + B - 2 (AB)^1/2)`.

    By torchmetrics' `FrechetInceptionDistance`, in float64.
    """
    torchmetrics = require("torchmetrics.image.fid", "fid")
    # Only the main process computes scores: it must not wait for the others.
    metric = torchmetrics.FrechetInceptionDistance(_Given(ours.shape[1]), sync_on_compute=False)
    metric.update(torch.from_numpy(theirs).double(), real=True)
    metric.update(torch.from_numpy(ours).double(), real=False)
    return float(metric.compute())


def kernel_distance(
    ours: Float[np.ndarray, "some dim"], theirs: Float[np.ndarray, "others dim"], subset: int
) -> tuple[float, float]:
    """The squared maximum mean discrepancy with the kernel (x.y / dim + 1)^3, unbiased; mean and
    standard deviation over 100 subsets of `subset` images, always the same.

    By torchmetrics' `KernelInceptionDistance`, in float64.
    """
    torchmetrics = require("torchmetrics.image.kid", "fid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept in memory
        metric = torchmetrics.KernelInceptionDistance(
            _Given(ours.shape[1]), KID_SUBSETS, subset, sync_on_compute=False
        )
    metric.update(torch.from_numpy(theirs).double(), real=True)
    metric.update(torch.from_numpy(ours).double(), real=False)
    before = torch.get_rng_state()  # which it draws the subsets from
    try:
        torch.default_generator.manual_seed(0)
        mean, std = metric.compute()
    finally:
        torch.set_rng_state(before)
    return float(mean), float(std)


class _Given(nn.Module):
    """Features that are there already, in place of images."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        return features


class DigitFeatures(nn.Module):
    """What the bundled checkpoint `digits` reads digits by. Needs timm."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = zoo.load("digits")

    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 64"]:
        """Of grey images, or the mean of their channels."""
        grey = images.float().mean(1, keepdim=True) / 127.5 - 1
        side = (zoo.IMAGE_SIZE, zoo.IMAGE_SIZE)
        larger = F.interpolate(grey, side, mode="bilinear", antialias=True)
        features: Tensor = self.model.forward_head(
            self.model.forward_features(larger), pre_logits=True
        )
        return features


def inception(weights: Path | None) -> nn.Module:
    """The Inception network that FID is named for, by torchmetrics and torch-fidelity.

    Args:
        weights: its file (`pt_inception-2015-12-05-6726825d.pth` in the releases of pytorch-fid,
            `weights-inception-2015-12-05-6726825d.pth` in those of torch-fidelity).

    Raises:
        ValueError: no file is given: nothing is downloaded.
        FileNotFoundError: it is not there.
        ModuleNotFoundError: torchmetrics or torch-fidelity is not installed.
    """
    if weights is None:
        raise ValueError(
            "features of Inception need its weights: fetch weights-inception-2015-12-05-6726825d"
            ".pth from the releases of torch-fidelity, and give it with --weights PATH"
        )
    require("torch_fidelity", "fid")
    torch.load(weights, weights_only=True)  # refuses files that would run code; the next does not
    network: nn.Module = require("torchmetrics.image.fid", "fid").NoTrainInceptionV3(
        "inception-v3-compat", ["2048"], str(weights)
    )
    return network


def digit_reference(folder: Path, drawings: int = 4) -> Path:
    """Draws the held-out digits of the bundled checkpoint so many times each, as the bundled
    pipeline knows them: the reference for its images. Returns the folder."""
    held_out = zoo.held_out("digits")
    noise = torch.Generator().manual_seed(0)
    images = torch.cat(
        [zoo.draw(held_out.digits, noise, "digits", 32) for _ in range(drawings)]
    ).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    pil = require("PIL.Image", "plots")
    for number, image in enumerate(images):
        if not (folder / _file(number)).exists():
            _save(pil.fromarray(image[0]), folder / _file(number))
    return folder


def pictures_in(folder: Path, per_folder: int | None = None) -> list[Path]:
    """The pictures in a folder and those below it, by name.

    Args:
        folder: where to look.
        per_folder: take only so many of each of the folders in it; all if None.

    Raises:
        ValueError: there are fewer than two, or fewer than `per_folder` in one of the folders.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if per_folder is not None:
        by_folder: dict[Path, list[Path]] = {}
        for path in found:
            by_folder.setdefault(path.parent, []).append(path)
        poor = [parent for parent, there in by_folder.items() if len(there) < per_folder]
        if folder in by_folder or poor:
            raise ValueError(
                f"{folder} must hold folders, each with at least {per_folder} pictures"
                + (f"; {poor[0]} does not" if poor else ", and no pictures beside them")
            )
        found = [path for there in by_folder.values() for path in there[:per_folder]]
    if len(found) < 2:
        raise ValueError(f"the reference {folder} holds {len(found)} pictures, and must hold two")
    return found


def speeds_in(folder: Path) -> dict[str, dict[str, Any]]:
    """For each setting, the last four fields of `Score`, from what `draw` has written down."""
    runs: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        run, _, process = file.stem.rpartition("-")
        for line in file.read_text().splitlines():
            took = json.loads(line)
            runs.setdefault((took["setting"], run), {}).setdefault(process, []).append(took)
    speeds: dict[str, dict[str, Any]] = {}
    for (setting, _), by_process in runs.items():
        took = list(itertools.chain(*by_process.values()))
        images = sum(batch["images"] for batch in took)
        if images >= speeds.get(setting, {}).get("timed_images", 0):
            speeds[setting] = {
                "images_per_second": sum(
                    statistics.median(batch["images"] / batch["seconds"] for batch in batches)
                    for batches in by_process.values()
                ),
                "timed_images": images,
                "processes": len(by_process),
                "device": took[0]["device"].split(":")[0],
            }
    return speeds


@dataclass(frozen=True)
class _Measured:
    """Of the images of one folder: features, float64; how far each is from the one beside it (0 if
    there is none); and how many have a single colour."""

    features: Float[np.ndarray, "images dim"]
    pixels: Float[np.ndarray, " images"]
    blank: int


def _measure(
    paths: Sequence[Path],
    beside: Sequence[Path] | None,
    size: tuple[int, int],
    extractor: nn.Module,
    cache: Path,
    on_images: Callable[[int], None],
) -> _Measured:
    """Looks at images, or at what is kept of the last look at the same files."""
    stats = [
        (str(path), stat.st_size, stat.st_mtime_ns)
        for path in [*paths, *(beside or ())]
        for stat in (path.stat(),)
    ]
    key = hashlib.sha256(repr((fingerprint(extractor), size, stats)).encode()).hexdigest()
    if cache.exists():
        with np.load(cache, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                return _Measured(kept["features"], kept["pixels"], int(kept["blank"]))
    features, pixels, blank = [], [], 0
    device = next((p.device for p in extractor.parameters()), torch.device("cpu"))
    for start in range(0, len(paths), _PER_BATCH):
        part = slice(start, start + _PER_BATCH)
        images = _read(paths[part], size)
        with torch.no_grad():
            features.append(extractor(images.to(device)).double().cpu())
        others = images if beside is None else _read(beside[part], size)
        apart = (images.double() - others.double()).flatten(1) / 255
        pixels.append(apart.square().mean(1).sqrt())
        flat = images.flatten(2)
        blank += int((flat.amax(2) == flat.amin(2)).all(1).sum())
        on_images(min(start + _PER_BATCH, len(paths)))
    found = _Measured(torch.cat(features).numpy(), torch.cat(pixels).numpy(), blank)
    cache.parent.mkdir(exist_ok=True)
    with cache.with_suffix(".part").open("wb") as file:
        np.savez(file, key=key, features=found.features, pixels=found.pixels, blank=blank)
    cache.with_suffix(".part").replace(cache)
    return found


def _read(paths: Sequence[Path], size: tuple[int, int]) -> UInt8[Tensor, "images 3 height width"]:
    """Pictures, of another size cut to the aspect and resized, with antialiasing."""
    pil, ops = require("PIL.Image", "plots"), require("PIL.ImageOps", "plots")
    images = []
    for path in paths:
        with pil.open(path) as opened:
            image = opened.convert("RGB")
        if image.size != size:
            image = ops.fit(image, size, pil.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(images)


def _size(path: Path) -> tuple[int, int]:
    with require("PIL.Image", "plots").open(path) as image:
        width, height = image.size
    return width, height


def _drawn(sweep: Sweep, out: Path, setting: Setting) -> list[Path]:
    files = [out / setting.name / _file(number) for number in range(sweep.images)]
    missing = sum(not file.exists() for file in files)
    if missing:
        raise ValueError(
            f"{out / setting.name} lacks {missing} of {sweep.images} images: generate them first"
        )
    return files


# Report


def report(sweep: Sweep, out: Path, scores: Scores) -> list[Path]:
    """Writes what was found, and returns the files: a table as CSV and, with what it was measured
    with, as JSON; the distances of every image; a plot; and a contact sheet.

    Raises:
        ModuleNotFoundError: Matplotlib or Pillow is not installed.
    """
    names = ("fid.csv", "fid.json", "distances.csv", "fid.png", "contact.png")
    table, whole, distances, plot, sheet = (out / name for name in names)
    with table.open("w", newline="") as file:
        rows = csv.DictWriter(file, [column.name for column in fields(Score)], lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(row) for row in scores.rows)
    with distances.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", "number", "prompt", "pixel_distance", "feature_distance"])
        for setting, pixels, moved in zip(
            sweep.settings(), scores.pixels, scores.moved, strict=True
        ):
            for number, pair in enumerate(zip(pixels.tolist(), moved.tolist(), strict=True)):
                writer.writerow([setting.name, number, sweep.prompt(number), *pair])
    found = {
        "sweep": json.loads((out / "sweep.json").read_text()),
        "reference": dict(zip(("folder", "images"), scores.reference, strict=True)),
        "features": dict(zip(("extractor", "dim"), scores.features, strict=True)),
        "kid": {"subsets": KID_SUBSETS, "subset": scores.kid_subset},
        "rows": [asdict(row) for row in scores.rows],
    }
    whole.write_text(json.dumps(found, indent=1))
    _plot(scores, plot)
    contact_sheet(sweep, out).save(sheet)
    return [table, whole, distances, plot, sheet]


def markdown(scores: Scores) -> str:
    """The table, and under it what it was measured with."""
    lines = [
        "| method | keep | seed | FID | KID x 1000 | from dense: pixels | features | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in scores.rows:
        speed = "" if row.images_per_second is None else f"{row.images_per_second:.3g}"
        cells = [
            *(row.method, f"{row.keep_rate:g}", str(row.seed), f"{row.fid:.3f}"),
            f"{row.kid * 1e3:.3f} ± {row.kid_std * 1e3:.3f}",
            *(f"{row.pixel_distance:.4f}", f"{row.feature_distance:.3f}", speed),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    folder, images = scores.reference
    timed = {(row.processes, row.device) for row in scores.rows if row.images_per_second}
    by = "; ".join(f"{count} process{'es'[: 2 * (count > 1)]} on {on}" for count, on in timed)
    lines += [
        "",
        f"{scores.rows[0].images} images each, {images} in the reference {folder}; "
        f"{scores.features[1]} features of {scores.features[0]}; KID over {KID_SUBSETS} subsets of "
        f"{scores.kid_subset}. Images/s: drawn by {by or 'nobody'}, median batch, without writing.",
    ]
    return "\n".join(lines)


def contact_sheet(sweep: Sweep, out: Path, columns: int = 10, cell: int = 96) -> Any:
    """A picture: a row for each setting of the first seed, a column for each of the first prompts.

    Args:
        sweep: what was drawn.
        out: where.
        columns: how many prompts, at most.
        cell: height and width of an image in it; small ones are enlarged without smoothing.
    """
    pil, pens, fonts = (
        require(f"PIL.{name}", "plots") for name in ("Image", "ImageDraw", "ImageFont")
    )
    settings = [setting for setting in sweep.settings() if setting.seed == sweep.seeds[0]]
    numbers = range(min(columns, len(sweep.prompts), sweep.images))
    gap, font = 4, fonts.load_default(13)
    labels = [
        setting.method if setting.method == DENSE else f"{setting.method} {setting.keep_rate:g}"
        for setting in settings
    ]
    left = int(max(font.getlength(label) for label in labels)) + 3 * gap
    top = 24
    width = left + len(numbers) * (cell + gap)
    sheet = pil.new("RGB", (width, top + len(settings) * (cell + gap)), "white")
    pen = pens.Draw(sheet)
    for column in numbers:
        text = sweep.prompt(column)
        while len(text) > 1 and font.getlength(text) > cell:
            text = text[:-2].rstrip() + "…"
        pen.text((left + column * (cell + gap), gap), text, fill="black", font=font)
    for row, (setting, label) in enumerate(zip(settings, labels, strict=True)):
        y = top + row * (cell + gap)
        pen.text((gap, y + cell // 2 - 8), label, fill="black", font=font)
        for column in numbers:
            with pil.open(out / setting.name / _file(column)) as opened:
                image = opened.convert("RGB")
            smooth = pil.Resampling.LANCZOS if image.width > cell else pil.Resampling.NEAREST
            image = image.resize((cell, cell), smooth)
            sheet.paste(image, (left + column * (cell + gap), y))
    return sheet


def _plot(scores: Scores, file: Path) -> None:
    """FID, and the distance from the images without reduction, over the keep rate: a line per
    method, mean over seeds and their range."""
    figure = require("matplotlib.figure", "plots").Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    named = scores.features[0]
    _lines(left, scores, "fid", f"FID, {named}")
    _lines(right, scores, "feature_distance", f"from the dense image, {named}")
    left.legend()
    figure.savefig(file, dpi=110)


def _lines(axes: Any, scores: Scores, column: str, label: str) -> None:
    dense = statistics.mean(getattr(row, column) for row in scores.rows if row.method == DENSE)
    by_method: dict[str, dict[float, list[float]]] = {}
    for row in scores.rows:
        if row.method != DENSE:
            by_rate = by_method.setdefault(row.method, {1.0: [dense]})
            by_rate.setdefault(row.keep_rate, []).append(getattr(row, column))
    markers = itertools.cycle("osD^vPX*")
    for (method, by_rate), marker in zip(by_method.items(), markers, strict=False):
        rates = sorted(by_rate)
        means = [statistics.mean(by_rate[rate]) for rate in rates]
        (line,) = axes.plot(rates, means, marker=marker, label=method)
        if any(len(found) > 1 for found in by_rate.values()):
            low, high = ([end(by_rate[rate]) for rate in rates] for end in (min, max))
            axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(dense, color="grey", linewidth=1, linestyle=":", label=DENSE)
    axes.invert_xaxis()
    axes.set_xlabel("keep rate")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)


# Files


def fingerprint(module: nn.Module) -> str:
    """Tells weights apart: the shapes of all, and some values of each that can be read."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta:
            digest.update(value.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _file(number: int) -> str:
    return f"{number:06d}.png"


def _save(image: Any, path: Path) -> None:
    """Under another name first: a file that is there is whole."""
    part = path.with_suffix(".part")
    image.save(part, format="PNG")
    part.replace(path)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _leaves(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
