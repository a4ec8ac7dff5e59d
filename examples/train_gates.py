"""Trains the gates of a bundled model again: SViT's, or DynamicViT's predictors. The model stays.

    pip install "tokred[timm,train,plots]" scikit-learn
    python examples/train_gates.py digits_cluttered svit
    python examples/train_gates.py digits_cluttered dynamicvit
    python examples/train_gates.py digits_scenes svit

write NAME_METHOD.safetensors. Training data are drawn anew in every epoch, of the 1,400 digits that
the model was trained on. Stop it whenever you like: the same command goes on where it was. Under
`accelerate launch` it runs on several processes. `--per-image` and `--no-reactivation` are the
other cells of the SViT paper's table 3; `examples/measure_gates.py` measures what came of it.
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from train_digits import split

import tokred
from tokred import training
from tokred.data import zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=["digits_cluttered", "digits", "digits_scenes"])
    parser.add_argument("method", choices=["svit", "dynamicvit"])
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder to write to")
    parser.add_argument("--keep-rate", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, help="default: 5; of scenes 2")
    parser.add_argument("--per-image", action="store_true", help="a fixed rate, as in equation 3")
    parser.add_argument("--no-reactivation", action="store_true")
    parser.add_argument(
        "--calibrate", type=int, default=256, help="samples; 0: as training left it"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    scenes = options.model == "digits_scenes"
    model = zoo.load(options.model).train()
    method = tokred.DynamicViT() if options.method == "dynamicvit" else tokred.SViT()
    if options.no_reactivation:
        method = tokred.SViT(reactivate=False)
    torch.manual_seed(options.seed)
    tokred.apply(model, method, options.keep_rate)
    recipe = replace(
        training.recipes[options.method],
        epochs=options.epochs or (2 if scenes else 5),
        batch=8 if scenes else 32,
        gate_lr=2e-3,
        frozen=True,
        calibrate=options.calibrate,
        seed=options.seed,
    )
    if options.per_image:
        recipe = replace(recipe, per_image=True)
    name = f"{options.model}_{options.method}"
    name += "_per_image" * options.per_image + "_once" * options.no_reactivation
    folder = options.out / name
    samples = Scenes(options.seed) if scenes else Drawn(options.model, options.seed)
    held_out = zoo.held_out(options.model)
    seen = list(zip(zoo.normalise(held_out.images), held_out.labels, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = training.fit(model, samples, recipe, folder, validate=None if scenes else seen)
    shutil.copy(folder / "gates.safetensors", options.out / f"{name}.safetensors")
    print(f"{fitted.steps} steps; wrote {options.out / name}.safetensors")


@dataclass
class Drawn:
    """The training digits, drawn in other places and among other fragments in every epoch."""

    name: str
    seed: int
    images: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.digits, self.labels = split()[0]

    def set_epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        self.images = zoo.normalise(zoo.draw(self.digits, generator, self.name))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@dataclass
class Scenes:
    """Scenes of the training digits, others in every epoch."""

    seed: int
    number: int = 800
    images: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.digits, self.classes = split()[0]

    def set_epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        images, self.labels = zoo.draw_scenes(self.digits, self.classes, self.number, generator)
        self.images = zoo.normalise(images)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index].long()


if __name__ == "__main__":
    main()
