"""Compares the images of a sweep with a reference, and with those drawn without reduction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import nn

from tokred.measure.fid.distances import frechet_distance, kernel_distance
from tokred.measure.fid.features import Measured, measure, size_of
from tokred.measure.fid.files import drawn
from tokred.measure.fid.reference import pictures_in
from tokred.measure.fid.sweep import DENSE, Setting, Sweep
from tokred.measure.fid.times import speeds_in
from tokred.optional import require


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
    files = {setting: drawn(sweep, out, setting) for setting in settings}
    pictures = pictures_in(reference, per_folder)
    size = size_of(files[settings[0]][0])
    named, dim = type(features).__name__, 0
    total = len(pictures) + len(settings) * sweep.images
    done = 0

    def extracted(paths: Sequence[Path], beside: Sequence[Path] | None, name: str) -> Measured:
        nonlocal done

        def advance(images: int) -> None:
            if on_images is not None:
                on_images(done + images, total)

        found = measure(paths, beside, size, features, out / "features" / f"{name}.npz", advance)
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
    dense: dict[int, Measured] = {}
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
