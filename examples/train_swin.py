"""Trains the bundled Swin again, from the bundled segmenter, in minutes on two cores.

    pip install "tokred[timm]" scikit-learn tqdm
    python examples/train_swin.py

writes digits_swin.safetensors (the weights, float16). Every random number follows from `--seed`.
The scenes that are held out are those of `digits_scenes`.

The recipe: convolutions, ten blocks and decoder start as those of `digits_scenes`. A Swin has no
position embeddings: its relative position biases start as distances, with a slope for each head
(as in Press, Smith & Lewis, "Train Short, Test Long", ICLR 2022, in two dimensions). First come
crops of 56x56 pixels, which are one window, then whole scenes, as in train_segmenter.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from train_digits import halved, split
from train_segmenter import CROP, PATCH, adam, batch, descend, draws, parsed, score, train_on_scenes

from tokred.data import zoo
from tokred.models.segmenter import Segmenter


def main() -> None:
    options = parsed(__doc__, crops=50, scenes=150, seed=10)
    seen, unseen = split()

    model = zoo.build_swin()
    so_far = options.out / "digits_swin_so_far.safetensors"
    begin = time.perf_counter()
    if options.resume:
        model.load_state_dict(load_file(so_far))
    else:
        start(model, zoo.load("digits_scenes"))
        train_on_crops(model, draws(*seen, options.seed), options.crops, options.seed, so_far)
    train_on_scenes(model, draws(*seen, options.seed + 1), options.scenes)
    minutes = (time.perf_counter() - begin) / 60

    weights = halved(model)
    generator = torch.Generator().manual_seed(options.seed + 2)
    held_out = zoo.held_out("digits_scenes")
    drawn = [(held_out.images, held_out.labels)]
    drawn += [zoo.draw_scenes(*unseen, len(held_out.images), generator) for _ in range(4)]
    scores = [score(model, images, targets) for images, targets in drawn]
    save_file(weights, options.out / "digits_swin.safetensors")
    steps = f"{options.crops} + {options.scenes} steps"
    print(f"{minutes:.1f} minutes, {steps}, seed {options.seed}")
    print(f"held-out mIoU: {scores[0]:.2%}; over five drawings {sum(scores) / 5:.2%}")


@torch.no_grad()
def start(model: Segmenter, scenes: Any) -> None:
    """What a Swin has in common with a ViT, as it is there; biases as distances."""
    weights = scenes.encoder.state_dict()
    del weights["pos_embed"], weights["cls_token"]
    stage = model.encoder.layers[0]
    known = {
        name.replace("blocks.", "layers.0.blocks.", 1): value
        for name, value in weights.items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < len(stage.blocks)
    }
    unknown = model.encoder.load_state_dict(known, strict=False)
    assert all("relative_position_bias" in name for name in unknown.missing_keys)
    assert not unknown.unexpected_keys
    model.decoder.load_state_dict(scenes.decoder.state_dict())
    for block in stage.blocks:
        table = block.attn.relative_position_bias_table
        height, width = block.attn.window_size
        down = torch.arange(1 - height, height)[:, None]
        across = torch.arange(1 - width, width)
        distance = (down**2 + across**2).float().sqrt().flatten()
        slopes = 0.5 ** torch.arange(1, table.shape[1] + 1)
        table.copy_(-distance[:, None] * slopes)


def train_on_crops(
    model: Segmenter, drawn: Iterator[tuple[Tensor, Tensor]], steps: int, seed: int, so_far: Path
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimiser = adam(model)
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, total_iters=30)
    most = zoo.SCENE_SIZE // PATCH - CROP
    with tqdm(total=steps, unit="step", mininterval=10) as bar:
        for step in range(steps):
            if step % 4 == 0:  # each scene is cropped at four places
                images, targets = batch(drawn, 32)
            top, left = (PATCH * torch.randint(most + 1, (2,), generator=generator)).tolist()
            window = (..., slice(top, top + CROP * PATCH), slice(left, left + CROP * PATCH))
            descend(model, optimiser, warm, model(images[window]), targets[window], bar)
            if step % 50 == 49:
                save_file(model.state_dict(), so_far)


if __name__ == "__main__":
    main()
