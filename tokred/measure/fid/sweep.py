"""What is drawn: methods, keep rates, prompts and seeds, and values of them that go together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tokred.optional import require
from tokred.patching.denoising import NAMED, Around
from tokred.reducers import parse

DENSE = "dense"
"""What the pipeline without reduction is called among the methods."""
KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SEEDS = 1_000_000
"""Image i of seed s is drawn from a generator with seed s * SEEDS + i."""


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
