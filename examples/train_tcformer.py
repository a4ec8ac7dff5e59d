"""Trains the bundled TCFormer again, from nothing, in a quarter of an hour on one core.

    pip install "tokred[timm]" scikit-learn tqdm
    python examples/train_tcformer.py

writes digits_tcformer.safetensors (the weights, float16). Every random number follows from
`--seed`. Then it measures, as `--evaluate FILE` does for weights that are there: accuracy, with the
clustering that it was trained with and with others in its place; and how many tokens there are for
the pixels of the digit, of the fragments around it and of the empty ground.

The recipe is that of `train_digits.py`: AdamW, one cycle, batches of 32; every epoch draws the
1,400 digits anew, in other places and among other fragments. The last weights are kept: nothing is
selected on the held-out digits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_digits import accuracy, halved, split, train

from tokred.data import zoo
from tokred.models.tcformer import (
    DPCKNN,
    GLOBAL,
    LOCAL,
    Bipartite,
    Clustering,
    KMeans,
    TCFormer,
)

NAME = "digits_tcformer"
CLUSTERINGS: Mapping[str, tuple[Clustering, tuple[int, ...]]] = {
    "DPC-kNN": (DPCKNN(), GLOBAL),
    "local DPC-kNN": (DPCKNN(), LOCAL),
    "K-means": (KMeans(), GLOBAL),
    "bipartite matching": (Bipartite(), GLOBAL),
    "in the order of the grid": (lambda x, num: _runs(x, num), GLOBAL),
}
"""What tokens are clustered by, and into how many parts the image is cut for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder to write to")
    parser.add_argument("--epochs", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="measure, train nothing")
    options = parser.parse_args()
    model = zoo.build_tcformer()
    assert isinstance(model, TCFormer)
    if options.evaluate:
        weights = load_file(options.evaluate)
    else:
        weights = trained(options.epochs, options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        save_file(weights, options.out / f"{NAME}.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    report(model.eval())


def trained(epochs: int, seed: int) -> dict[str, Tensor]:
    """The weights after so many epochs, float16."""
    digits, labels = split()[0]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = zoo.build_tcformer()
    begin = time.perf_counter()
    draw = partial(zoo.draw, digits, generator, NAME)
    train(model, draw, labels, epochs, generator, 2e-3, lambda p: p.ndim > 1)
    minutes = (time.perf_counter() - begin) / 60
    print(f"{minutes:.1f} minutes, {epochs} epochs, seed {seed}")
    return halved(model)


def report(model: TCFormer) -> None:
    """Prints what the card and docs/tcformer.md say."""
    held_out = zoo.held_out(NAME)
    drawings = [held_out.images]
    generator = torch.Generator().manual_seed(1)
    drawings += [zoo.draw(held_out.digits, generator, NAME) for _ in range(9)]
    print("| clustering | held-out images | ten drawings of them |\n|---|---|---|")
    for name, (clustering, parts) in CLUSTERINGS.items():
        model.clustering, model.parts = clustering, parts
        scores = [accuracy(model, images, held_out.classes) for images in drawings]
        print(f"| {name} | {scores[0]:.2%} | {sum(scores) / len(scores):.2%} |")
    print("\n| tokens | clustering | digit | fragments | ground | digit against ground |")
    print("|---|---|---|---|---|---|")
    for name, (clustering, parts) in CLUSTERINGS.items():
        model.clustering, model.parts = clustering, parts
        for tokens, (digit, fragments, ground) in tokens_per_pixel(model).items():
            print(
                f"| {tokens} | {name} | {1e3 * digit:.1f} | {1e3 * fragments:.1f} | "
                f"{1e3 * ground:.1f} | {digit / ground:.2f} |"
            )
    model.clustering, model.parts = DPCKNN(), GLOBAL


@torch.no_grad()
def tokens_per_pixel(model: TCFormer) -> dict[int, tuple[float, float, float]]:
    """For every stage that clusters, by its number of tokens: how many there are for a pixel with
    ink of the digit, of fragments of others, and of the empty ground. A token of n pixels counts
    1/n on each of them."""
    digits = zoo.held_out(NAME).digits
    images = zoo.draw(digits, torch.Generator().manual_seed(2), NAME)
    alone = zoo.draw(digits, torch.Generator().manual_seed(2), NAME, fragments=0)
    digit = alone[:, 0] > 64
    fragment = (images[:, 0] > 64) & ~digit
    where = (digit, fragment, ~(digit | fragment))
    found = {}
    for stage in model.stages(zoo.normalise(images))[1:]:
        index = stage.layout.cells.index
        members = torch.zeros(len(index), stage.layout.num_tokens)
        members = members.scatter_add(1, index, torch.ones_like(index, dtype=torch.float32))
        per_cell = members.reciprocal().gather(1, index).unflatten(1, stage.layout.grid)
        pixels = per_cell.repeat_interleave(4, 1).repeat_interleave(4, 2) / 16
        one, two, three = (float(pixels[mask].mean()) for mask in where)
        found[stage.layout.num_tokens] = (one, two, three)
    return found


def _runs(x: Tensor, num: int) -> Tensor:
    """Neighbours in a row: what takes no notice of the image."""
    place = torch.arange(x.shape[1], device=x.device) * num // x.shape[1]
    return place.expand(len(x), -1)


if __name__ == "__main__":
    main()
