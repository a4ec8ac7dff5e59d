"""Compares the images of a sweep with a reference, and with those drawn without reduction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from tokred.data import reading
from tokred.data.code import version_of
from tokred.data.digest import NoFingerprintError, told
from tokred.data.fingerprint import fingerprint
from tokred.measure.conditions import switches, versions_of
from tokred.measure.fid.distances import frechet_distance, kernel_distance
from tokred.measure.fid.features import Measured, measure
from tokred.measure.fid.files import drawn
from tokred.measure.fid.reference import reference_pictures
from tokred.measure.fid.sweep import DENSE, Sweep, SweepSetting
from tokred.measure.fid.times import speeds_in
from tokred.optional import require


@dataclass(frozen=True)
class Score:
    """How the images of one setting compare with the reference and with those without reduction.

    Attributes:
        method, keep_rate, seed: the setting.
        images: how many images were compared.
        fid: the Frechet distance between their features and those of the reference.
        kid, kid_std: the kernel distance, mean and standard deviation over subsets.
        pixel_distance: the root mean square of the difference from the image without reduction,
            pixels from 0 to 1; mean over images.
        feature_distance: the Euclidean distance between the features of both; mean over images.
        images_per_second: the speed of all processes together, by the median batch of each, in the
            run that drew the most of these images. None if nothing was timed.
        timed_images, processes, device: how many images that run drew, with how many processes, on
            which kind of device.
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
class SweepScores:
    """The scores of all settings of a sweep.

    Attributes:
        rows: one for each setting.
        reference: where the reference is, and how many images it has.
        features: the name of the network that extracts features, and how many features there are.
        kid_subset: images in each subset for the kernel distance.
        pixels: for each setting, the `pixel_distance` of every image.
        moved: for each setting, the `feature_distance` of every image.
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
) -> SweepScores:
    """Compares the images of every setting with a reference, and with those without reduction.

    Only files count, and they are read in a fixed order: figures do not depend on how many
    processes drew the images. Features are kept in `out/features`, and extracted again if files or
    the network have changed, or what was kept is broken.

    Args:
        sweep: what was drawn.
        out: the folder that `generate` was given.
        reference: a folder of pictures; those in folders below it count, too. Pictures of another
            size than the images are cut about the centre to the same aspect ratio, and resized.
        features: a network from images [batch, 3, height, width], uint8, to features [batch, dim],
            such as `DigitFeatures()` or `inception(weights)`.
        per_folder: how many pictures to take from every folder in the reference; None: all.
        on_images: called with (images done, images in all) while features are extracted.

    Raises:
        ValueError: images or references are missing or broken.
        ModuleNotFoundError: torchmetrics is not installed.
    """
    require("torchmetrics.image.fid", "fid")
    settings = sweep.settings()
    files = {setting: drawn(sweep, out, setting) for setting in settings}
    pictures = reference_pictures(reference, per_folder)
    fewest = min(sweep.images, len(pictures))
    known_as = _known_as(features)
    extraction = _Extraction(
        features,
        _size_of(files[settings[0]][0]),
        None if known_as is None else out / "features",
        known_as,
        len(pictures) + len(settings) * sweep.images,
        on_images,
    )
    theirs = extraction.of(pictures, None, "reference", _REPLACE).features
    dim = theirs.shape[1]
    if fewest <= dim:
        warnings.warn(
            f"{fewest} images for {dim} features: the Frechet distance of so few is far too large, "
            "and comparable only with others of as many",
            stacklevel=2,
        )
    rows, pixels, moved = _compared(sweep, out, files, extraction, theirs, _subset(fewest))
    return SweepScores(
        rows,
        (str(reference), len(pictures)),
        (type(features).__name__, dim),
        _subset(fewest),
        pixels,
        moved,
    )


_GENERATE = "generate again, which draws broken images anew"
_REPLACE = "replace it, or take it out of the reference"

_Distances = tuple[Float[np.ndarray, " images"], ...]


def _compared(
    sweep: Sweep,
    out: Path,
    files: Mapping[SweepSetting, Sequence[Path]],
    extraction: _Extraction,
    theirs: Float[np.ndarray, "images dim"],
    subset: int,
) -> tuple[tuple[Score, ...], _Distances, _Distances]:
    """The scores of all settings, and for each setting the distances of its images from those
    without reduction, in pixels and in features.

    Args:
        sweep, out: see `score`.
        files: the images of each setting.
        extraction: extracts their features.
        theirs: the features of the reference.
        subset: images in each subset for the kernel distance.
    """
    speeds = speeds_in(out / "times")
    dense: dict[int, Measured] = {}
    rows, pixels, moved = [], [], []
    for setting in sweep.settings():  # those without reduction come first
        beside = files[SweepSetting(DENSE, 1.0, setting.seed)]
        ours = extraction.of(files[setting], beside, setting.name, _GENERATE)
        if setting.method == DENSE:
            dense[setting.seed] = ours
        if ours.blank:
            warnings.warn(
                f"{setting.name}: {ours.blank} of {sweep.images} images have a single colour, as "
                "if a safety checker had blacked them out, or numbers had overflowed",
                stacklevel=3,
            )
        away = np.linalg.norm(ours.features - dense[setting.seed].features, axis=1)
        speed = speeds.get(setting.name, {})
        rows.append(_row(setting, ours, theirs, float(away.mean()), subset, speed))
        pixels.append(ours.pixels)
        moved.append(away)
    return tuple(rows), tuple(pixels), tuple(moved)


@dataclass
class _Extraction:
    """Extracts the features of one folder after the other.

    Attributes:
        extractor: the network.
        size: width and height of images.
        cache: the folder in which features are kept; None: they are not.
        known_as: tells the network from others.
        total: how many images there are in all folders.
        on_images: see `score`.
        done: how many images were looked at.
    """

    extractor: nn.Module
    size: tuple[int, int]
    cache: Path | None
    known_as: object
    total: int
    on_images: Callable[[int, int], None] | None
    done: int = 0

    def of(
        self, paths: Sequence[Path], beside: Sequence[Path] | None, name: str, cure: str
    ) -> Measured:
        """The features of the images of one folder, kept under a name. `cure` is what to do with
        an image that is broken."""
        cache = None if self.cache is None else self.cache / f"{name}.npz"
        rest = cache, self.known_as, cure, self._tell
        found = measure(paths, beside, self.size, self.extractor, *rest)
        self.done += len(paths)
        self._tell(0)
        return found

    def _tell(self, images: int) -> None:
        if self.on_images is not None:
            self.on_images(self.done + images, self.total)


def _known_as(network: nn.Module) -> object:
    """What tells a network from others, with the versions and switches that its features depend
    on; None if it cannot be told, which a warning says."""
    try:
        device = next((str(p.device) for p in network.parameters()), "cpu")
        versions = [version_of("PIL"), told(network)[1], versions_of(network)]
        return [fingerprint(network), device, switches(), versions]
    except NoFingerprintError as error:
        warnings.warn(f"features are not kept for another time: {error}", stacklevel=3)
        return None


def _size_of(image: Path) -> tuple[int, int]:
    try:
        width, height = reading.opened(image).size
    except ValueError as error:
        raise ValueError(f"{error}: {_GENERATE}") from error
    return width, height


def _subset(images: int) -> int:
    """How many of so many images are in each subset for the kernel distance: 1,000, or a half of
    them, so that subsets differ."""
    return 1000 if images >= 1000 else max(2, images // 2)


def _row(
    setting: SweepSetting,
    ours: Measured,
    theirs: Float[np.ndarray, "images dim"],
    feature_distance: float,
    subset: int,
    speed: Mapping[str, Any],
) -> Score:
    """The scores of one setting.

    Args:
        setting: the setting.
        ours: what its images are like.
        theirs: the features of the reference.
        feature_distance: see `Score`.
        subset: images in each subset for the kernel distance.
        speed: the last fields of `Score`, if drawing was timed.
    """
    kid, kid_std = kernel_distance(ours.features, theirs, subset)
    return Score(
        **asdict(setting),
        images=len(ours.features),
        fid=frechet_distance(ours.features, theirs),
        kid=kid,
        kid_std=kid_std,
        pixel_distance=float(ours.pixels.mean()),
        feature_distance=feature_distance,
        **speed,
    )
