"""What a sweep draws: methods, keep rates, prompts and seeds; and presets of such values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tokred.engine.denoising import Around
from tokred.optional import require
from tokred.patching.denoisers import NAMED
from tokred.reducers import parse

DENSE = "dense"
"""The name, among the methods, of the pipeline without reduction."""
KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SEEDS = 1_000_000
"""Image i of seed s is drawn from a generator with seed s * SEEDS + i."""


@dataclass(frozen=True)
class SweepSetting:
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
    """All settings of which images are drawn, and what they have in common.

    Args:
        methods: as on the command line: "tome", "atc:single" (`tokred.reducers.parse`), with the
            meaning that these names have for denoisers.
        keep_rates: in (0, 1]. At 1 nothing is reduced. Such images are drawn once for all methods,
            even if 1 is not among the keep rates, because the others are compared with them.
        prompts: image i shows prompt i; after the last prompt, the first follows again.
        images: how many images each setting has.
        seeds: every setting is drawn with each of them.
        steps, guidance, size: arguments of the pipeline: `num_inference_steps`, `guidance_scale`,
            and `height` and `width`. None: the pipeline's own values.
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

    def settings(self) -> list[SweepSetting]:
        """All settings: first without reduction, then by method and keep rate."""
        rates = [rate for rate in dict.fromkeys(self.keep_rates) if rate != 1]
        pairs = [(DENSE, 1.0), *itertools.product(self.methods, rates)]
        return [SweepSetting(*pair, seed) for pair in pairs for seed in dict.fromkeys(self.seeds)]

    def prompt(self, number: int) -> str:
        """The prompt of image `number`."""
        return self.prompts[number % len(self.prompts)]


@dataclass(frozen=True)
class SweepPreset:
    """Values of a sweep that go together.

    Attributes:
        prompts: makes the prompts.
        images, steps, guidance, size: as in `Sweep`.
        per_folder: how many images to take from each folder of the reference; None: all.
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


presets: dict[str, SweepPreset] = {
    "digits": SweepPreset(digit_prompts, images=500),
    "imagenet": SweepPreset(
        imagenet_prompts, images=2000, steps=50, guidance=7.5, size=512, per_folder=5
    ),
}
