"""All that the result of a training depends on, besides model, method and data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """All that the result of a training depends on, besides model, method and data.

    Args:
        epochs: how often every sample is seen.
        batch: samples of a step, of all processes together. Samples that do not fill a batch at the
            end of an epoch are left out.
        lr: learning rate of the model after warm-up. From there it falls to zero as a cosine.
        gate_lr: the same for the gates.
        weight_decay: of AdamW. Parameters with one axis, and those that the model names in
            `no_weight_decay()`, have none.
        warmup: the share of all steps in which learning rates rise.
        clip: the largest norm of the gradient; None: any.
        accumulate: into how many parts a batch is divided if it does not fit into memory; they are
            computed one after the other. The dynamic rate loss then averages over a part.
        precision: "no", "bf16" or "fp16", as accelerate calls them.
        frozen: train the gates alone. The model stays the same to the bit, and has no dropout.
        rate: weight of `rate_loss`, lambda of SViT.
        per_image: see `rate_loss`.
        kl: weight of `kl_loss`.
        distill: weight of `token_loss`.
        label_smoothing, ignore_index: see `cross_entropy`.
        calibrate: at the end of the training, gates that decide how many tokens they keep are set
            to their targets on so many samples, all at once (`tokred.calibrate`); 0: they are left
            as they are. In training such gates decide at random, and may keep another share of
            tokens than later, when the larger of two logits decides.
        seed: where everything random starts.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int = 30
    batch: int = 64
    lr: float = 1e-5
    gate_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float | None = 1.0
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    frozen: bool = False
    rate: float = 4.0
    per_image: bool = False
    kl: float = 0.0
    distill: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    calibrate: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "gate_lr", "weight_decay", "rate", "kl", "distill", "calibrate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, or None, not {self.clip}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be 'no', 'bf16' or 'fp16', not {self.precision!r}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate must divide the batch, {self.batch}; {self.accumulate} does not"
            )

    @property
    def teaches(self) -> bool:
        """Whether a loss needs the dense model."""
        return self.kl > 0 or self.distill > 0


recipes: dict[str, Recipe] = {
    "svit": Recipe(rate=4.0),
    "dynamicvit": Recipe(rate=2.0, per_image=True, kl=0.5, distill=0.5),
}
"""Recipes with the weights of losses that the papers give, by method."""
