"""Trains the bundled segmenter again, in half an hour on two cores.

    pip install "tokred[timm]" scikit-learn tqdm
    python examples/train_segmenter.py

writes digits_scenes.safetensors (the weights, float16) and digits_scenes_held_out.npz (80 scenes of
the 397 digits that no training step has seen, and those digits). Every random number follows from
`--seed`.

The recipe: what makes patches see their neighbours from the start. Position embeddings start as 2-D
sines and cosines, and queries and keys start alike, so that tokens look at what is near and like
them (after Trockman & Kolter, "Mimetic Initialization of Self-Attention Layers", ICML 2023). First
come crops of 56x56 pixels, an eighth of the cost of a scene, with the position embeddings of the
place they are cut from (AdamW at a constant rate); then whole scenes (AdamW, one cycle). Scenes are
drawn anew all the time. The last weights are kept: nothing is selected on the held-out digits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm
from train_digits import halved, split

from tokred.data import zoo
from tokred.models.segmenter import Segmenter, mean_iou

HELD_OUT_SCENES = 80
PATCH = 4
CROP = 14
"""Tokens along each side of a crop."""


def main() -> None:
    options = parsed(__doc__, crops=750, scenes=260, seed=0)
    seen, unseen = split()
    model = zoo.build_scenes()
    so_far = options.out / "digits_scenes_so_far.safetensors"
    begin = time.perf_counter()
    if options.resume:
        model.load_state_dict(load_file(so_far))
    else:
        start(model.encoder)
        train_on_crops(model, draws(*seen, options.seed), options.crops, options.seed, so_far)
    train_on_scenes(model, draws(*seen, options.seed + 1), options.scenes)
    minutes = (time.perf_counter() - begin) / 60

    weights = halved(model)
    generator = torch.Generator().manual_seed(options.seed + 2)
    drawn = [zoo.draw_scenes(*unseen, HELD_OUT_SCENES, generator) for _ in range(5)]
    scores = [score(model, images, targets) for images, targets in drawn]
    save_file(weights, options.out / "digits_scenes.safetensors")
    images, targets = drawn[0]
    np.savez_compressed(
        options.out / "digits_scenes_held_out.npz",
        images=images.numpy(),
        labels=targets.to(torch.uint8).numpy(),
        digits=unseen[0].numpy(),
        classes=unseen[1].to(torch.uint8).numpy(),
    )
    steps = f"{options.crops} + {options.scenes} steps"
    print(f"{minutes:.1f} minutes, {steps}, seed {options.seed}")
    print(f"held-out mIoU: {scores[0]:.2%}; over five drawings {sum(scores) / 5:.2%}")


def parsed(description: str, crops: int, scenes: int, seed: int) -> argparse.Namespace:
    """The options of the command, with these default values. Makes the folder and sets the seed."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder to write to")
    parser.add_argument("--crops", type=int, default=crops, help="steps on 32 crops each")
    parser.add_argument("--scenes", type=int, default=scenes, help="steps on 8 whole scenes each")
    parser.add_argument("--resume", action="store_true", help="go on after the steps on crops")
    parser.add_argument("--seed", type=int, default=seed)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    return options


@torch.no_grad()
def start(encoder: Any) -> None:
    """Positions as sines and cosines; queries and keys alike; convolutions at their full scale."""
    embedding = encoder.pos_embed
    sines = build_sincos2d_pos_embed(
        list(encoder.patch_embed.grid_size), embedding.shape[2], interleave_sin_cos=False
    )
    embedding.zero_()
    embedding[0, 1:] = sines
    for block in encoder.blocks:
        weight = block.attn.qkv.weight
        dim = weight.shape[1]
        alike = torch.randn(dim, dim) * 0.5 / dim**0.5
        weight[:dim] = alike
        weight[dim : 2 * dim] = alike
    for layer in encoder.patch_embed.backbone:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    nn.init.normal_(encoder.patch_embed.proj.weight, std=0.1)


def draws(digits: Tensor, classes: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Scenes and their targets, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        images, targets = zoo.draw_scenes(digits, classes, 64, generator)
        yield from zip(zoo.normalise(images), targets, strict=True)


def batch(drawn: Iterator[tuple[Tensor, Tensor]], num: int) -> tuple[Tensor, Tensor]:
    images, targets = zip(*islice(drawn, num), strict=True)
    return torch.stack(images), torch.stack(targets)


def train_on_crops(
    model: Segmenter, drawn: Iterator[tuple[Tensor, Tensor]], steps: int, seed: int, so_far: Path
) -> None:
    generator = torch.Generator().manual_seed(seed)
    on_crops = zoo.build_scenes(CROP * PATCH)
    optimiser = adam(model)
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, total_iters=100)
    with tqdm(total=steps, unit="step", mininterval=10) as bar:
        for step in range(steps):
            if step % 4 == 0:  # each scene is cropped at four places
                images, targets = batch(drawn, 32)
            logits, target = crop(model, on_crops, images, targets, generator)
            descend(model, optimiser, warm, logits, target, bar)
            if step % 50 == 49:
                save_file(model.state_dict(), so_far)


def train_on_scenes(model: Segmenter, drawn: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    optimiser = adam(model)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=1e-3, total_steps=steps, pct_start=0.1
    )
    with tqdm(total=steps, unit="step", mininterval=10) as bar:
        for _ in range(steps):
            images, targets = batch(drawn, 8)
            descend(model, optimiser, cycle, model(images), targets, bar)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
    )


def descend(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    rate: torch.optim.lr_scheduler.LRScheduler,
    logits: Tensor,
    target: Tensor,
    bar: Any,
) -> None:
    loss = F.cross_entropy(logits, target)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    rate.step()
    bar.update()
    if bar.n % 50 == 0:
        reached = mean_iou(logits.argmax(1), target, zoo.SCENE_CLASSES)
        bar.set_postfix_str(f"loss {loss.item():.3f}, mIoU of this batch {reached:.1%}")


def crop(
    model: Segmenter,
    on_crops: Segmenter,
    images: Tensor,
    targets: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Logits and target of one window of all images, with the position embeddings of that window.

    `on_crops` is `model` for the smaller size, whose own weights are not used.
    """
    embedding: Tensor = model.encoder.pos_embed
    height, width = model.encoder.patch_embed.grid_size
    top = int(torch.randint(height - CROP + 1, (), generator=generator))
    left = int(torch.randint(width - CROP + 1, (), generator=generator))
    on_grid = embedding[:, 1:].unflatten(1, (height, width))
    window = on_grid[:, top : top + CROP, left : left + CROP].flatten(1, 2)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    weights["encoder.pos_embed"] = torch.cat([embedding[:, :1], window], 1)
    rows = slice(top * PATCH, (top + CROP) * PATCH)
    columns = slice(left * PATCH, (left + CROP) * PATCH)
    logits: Tensor = functional_call(on_crops, weights, (images[:, :, rows, columns],))
    return logits, targets[:, rows, columns]


@torch.no_grad()
def score(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    chunks = zoo.normalise(images).split(16)
    return mean_iou(torch.cat([model(chunk).argmax(1) for chunk in chunks]), targets, 11)


if __name__ == "__main__":
    main()
