"""A small training, for tests of `tokred.training`: called by them, or run as a program of its own.

accelerate launch --multi_gpu --num_processes 2 tests/training_run.py OUT '{"epochs": 2}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tokred
from tokred import training
from tokred.data import zoo
from tokred.training import Fitted, Recipe

STEPS_PER_EPOCH = 3


class Digits:
    """A few of the bundled images, with noise that differs by epoch and sample."""

    def __init__(self, num: int = 26) -> None:
        held_out = zoo.held_out("digits")
        self.images, self.labels = zoo.normalise(held_out.images[:num]), held_out.labels[:num]
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + 0.1 * torch.randn(1, 56, 56), int(self.labels[index])

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def small_vit(dropout: float = 0.0, classes: int = 10) -> Any:
    """Four blocks on a 7x7 grid; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = VisionTransformer(
            img_size=56, patch_size=8, in_chans=1, num_classes=classes, embed_dim=32, depth=4,
            num_heads=2, proj_drop_rate=dropout,
        )  # fmt: skip
        # With positions that start at random it stays at chance for longer than a test may take.
        sines = build_sincos2d_pos_embed([7, 7], 32, interleave_sin_cos=False)
        nn.init.zeros_(model.pos_embed)
        model.pos_embed.data[0, 1:] = sines
    return model.eval()


def reduced(method: str, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    model = small_vit(dropout)
    if method != "none":
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that gates are random
            tokred.apply(model, method, keep_rate=0.7)
    return model


def recipe(method: str = "none", **changes: Any) -> Recipe:
    start = training.recipes.get(method, Recipe())
    return replace(start, **{"epochs": 2, "batch": 8, "lr": 1e-3, **changes})


def run(
    out: Path, method: str = "tome", dropout: float = 0.0, seed: int = 0, **changes: Any
) -> Fitted:
    """`seed` is that of the gates alone."""
    of_fit = {"validate", "every", "fresh", "on_step", "workers"}
    options = {name: changes.pop(name) for name in of_fit & changes.keys()}
    return training.fit(
        reduced(method, dropout, seed),
        Digits(),
        recipe(method, **changes),
        out,
        bar=False,
        **options,
    )


def curve(out: Path) -> list[dict[str, float]]:
    """The log, but for how fast it went."""
    rows = training.read_table(out / "log.csv")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    kill_at = options.pop("kill_at", None)

    def die(step: int, row: object) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    run(Path(sys.argv[1]), on_step=die, **options)
