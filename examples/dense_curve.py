"""mIoU of the bundled segmenter against the tokens in its middle, for methods and baselines.

    python examples/dense_curve.py --out docs/dense-curve.png

All run in the same hourglass: four of twelve blocks with all 28x28 tokens, the others with few.
Prints the table, and draws it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tokred
from tokred.data import zoo
from tokred.models.segmenter import mean_iou
from tokred.optional import require
from tokred.reducers import Reconstruction, Reducer

NAME = "digits_scenes"
SETTINGS: dict[str, tuple[str | Reducer, str | Reconstruction]] = {
    "slic": ("slic", "nearest"),
    "pooling, nearest": (tokred.SLIC(iterations=0), "nearest"),
    "slic, bilinear": ("slic", "bilinear"),
    "pooling, bilinear": (tokred.SLIC(iterations=0), "bilinear"),
    "atc": ("atc", "copy"),
    "atc, nearest": ("atc", "nearest"),
    "dpc_knn": ("dpc_knn", "copy"),
    "tome": ("tome", "copy"),
    "tome, nearest": ("tome", "nearest"),
    "topk": ("topk", "copy"),
    "topk, nearest": ("topk", "nearest"),
    "random": ("random", "copy"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.12])
    parser.add_argument("--down", type=int, default=4, help="blocks that run with all tokens")
    parser.add_argument("--images", type=int, help="not all of the held-out scenes")
    parser.add_argument("--out", type=Path, help="picture to write")
    options = parser.parse_args()
    held_out = zoo.held_out(NAME)
    images = zoo.normalise(held_out.images[: options.images])
    labels = held_out.labels[: options.images]
    model = zoo.load(NAME)
    dense = miou(model, images, labels)
    head = " | ".join(f"{rate:g}" for rate in options.keep_rates)
    print(f"{NAME}, {len(images)} held-out scenes; mIoU of the dense model: {dense:.2%}\n")
    print(f"| tokens kept | {head} |\n|---|{'---|' * len(options.keep_rates)}")
    lines: dict[str, list[float]] = {}
    bar = tqdm(total=len(SETTINGS) * len(options.keep_rates), leave=False)
    for name, (method, reconstruction) in SETTINGS.items():
        for rate in options.keep_rates:
            schedule = tokred.Hourglass(rate, down=options.down)
            with tokred.applied(model, method, schedule, reconstruction=reconstruction):
                lines.setdefault(name, []).append(miou(model, images, labels))
            bar.update()
        cells = " | ".join(f"{value * 100:.1f}" for value in lines[name])
        bar.write(f"| {name} | {cells} |")
    if options.out:
        draw(options.keep_rates, lines, dense, options.out)


@torch.no_grad()
def miou(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Over all pixels of all scenes and 11 classes."""
    predicted = torch.cat([model(some).argmax(1) for some in images.split(8)])
    return mean_iou(predicted, labels, zoo.SCENE_CLASSES)


def draw(rates: list[float], lines: dict[str, list[float]], dense: float, out: Path) -> None:
    figure = require("matplotlib.figure", "plots").Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(dense * 100, color="grey", linestyle=":", label="dense")
    percents = [rate * 100 for rate in rates]
    colours = require("matplotlib", "plots").colormaps["tab20"].colors
    for (name, values), colour in zip(lines.items(), colours, strict=False):
        shown = [value * 100 for value in values]
        style = "--" if "," in name else "-"
        axes.plot(percents, shown, style, color=colour, marker="o", label=name)
    axes.set_xlabel("tokens kept in the middle, %")
    axes.set_ylabel("mIoU, %")
    figure.legend(loc="outside right upper")
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main()
