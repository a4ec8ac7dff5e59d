"""Trains a bundled checkpoint again, from nothing, in under half an hour on two cores.

    pip install "tokred[timm]" scikit-learn tqdm
    python examples/train_digits.py digits_cluttered
    python examples/train_digits.py digits --epochs 36

write NAME.safetensors (the weights, float16) and NAME_held_out.safetensors (397 digits that no
training step has seen, and their drawings). Every random number follows from `--seed`.

The recipe: position embeddings start as 2-D sines and cosines (with timm's random start the model
stays at chance for many epochs); AdamW, one cycle, batches of 32; every epoch draws the digits
anew, in other places and among other fragments. The last weights are kept: nothing is selected
on the held-out digits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from tqdm import tqdm

from tokred.data import zoo

TRAINING = 1400
"""Digits to train on; the other 397 are held out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["digits", "digits_cluttered"])
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder to write to")
    parser.add_argument("--epochs", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)

    (digits, labels), (unseen, answers) = split(generator)
    held_out = zoo.draw(unseen, generator, options.name)

    model = zoo.build_digits()
    start_from_sines(model)
    begin = time.perf_counter()
    draw = partial(zoo.draw, digits, generator, options.name)
    train(model, draw, labels, options.epochs, generator, 1e-3, lambda p: p.ndim == 2)
    minutes = (time.perf_counter() - begin) / 60

    weights = halved(model)
    again = [zoo.draw(unseen, generator, options.name) for _ in range(9)]
    scores = [accuracy(model, images, answers) for images in [held_out, *again]]
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.out / f"{options.name}.safetensors")
    save_file(
        {
            "images": held_out,
            "labels": answers.to(torch.uint8),
            "digits": unseen.contiguous(),
        },
        options.out / f"{options.name}_held_out.safetensors",
    )
    print(f"{minutes:.1f} minutes, {options.epochs} epochs, seed {options.seed}")
    print(f"held-out accuracy: {scores[0]:.2%}; over ten drawings {sum(scores) / 10:.2%}")


def split(
    generator: torch.Generator | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits and their classes: those to train on, and those held out.

    Args:
        generator: what shuffles them. If not given, they are split as for all bundled checkpoints.
    """
    source = load_digits()
    generator = generator or torch.Generator().manual_seed(0)
    order = torch.randperm(len(source.images), generator=generator)
    digits = torch.from_numpy(source.images).to(torch.uint8)[order]
    classes = torch.from_numpy(source.target)[order]
    return (digits[:TRAINING], classes[:TRAINING]), (digits[TRAINING:], classes[TRAINING:])


def halved(model: nn.Module) -> dict[str, Tensor]:
    """The weights in float16. The model goes on with these, in evaluation mode."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    model.eval()
    return weights


def start_from_sines(model: nn.Module) -> None:
    """Position embeddings of the patches as 2-D sines and cosines; of the class token, zero."""
    embedding: Tensor = model.pos_embed  # type: ignore[assignment]
    height, width = model.patch_embed.grid_size  # type: ignore[union-attr,misc]
    sines = build_sincos2d_pos_embed([height, width], embedding.shape[2], interleave_sin_cos=False)
    with torch.no_grad():
        embedding.zero_()
        embedding[0, 1:] = sines


def train(
    model: nn.Module,
    draw: Callable[[], Tensor],
    labels: Tensor,
    epochs: int,
    generator: torch.Generator,
    rate: float,
    decays: Callable[[Tensor], bool],
) -> None:
    """Trains a classifier of digits, with AdamW in one cycle.

    Args:
        model: the classifier.
        draw: draws all digits anew.
        labels: their classes.
        epochs: how often that is done.
        generator: what shuffles the digits.
        rate: the highest learning rate.
        decays: whether a parameter has weight decay.
    """
    batch = 32
    steps = len(labels) // batch
    decayed = [p for p in model.parameters() if decays(p)]
    others = [p for p in model.parameters() if not decays(p)]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=rate, total_steps=epochs * steps, pct_start=0.2
    )
    model.train()
    with tqdm(total=epochs * steps, unit="step", mininterval=5) as bar:
        for epoch in range(epochs):
            images = draw()
            order = torch.randperm(len(labels), generator=generator)
            right = 0
            for chosen in order[: steps * batch].split(batch):
                logits = model(zoo.normalise(images[chosen]))
                loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                cycle.step()
                right += int((logits.argmax(1) == labels[chosen]).sum())
                bar.update()
            share = right / (steps * batch)
            bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss.item():.2f}, right {share:.1%}")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    logits = torch.cat([model(zoo.normalise(chunk)) for chunk in images.split(128)])
    return float((logits.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
