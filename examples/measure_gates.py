"""What trained gates are worth, on held-out images: against the dense model, random gates that keep
as many tokens, Top-K with the same mean number of tokens, and what else is trained.

    pip install "tokred[timm,train,plots]"
    python examples/measure_gates.py --pictures docs
    python examples/measure_gates.py --study trained

The first prints the tables of the bundled gates, and draws where tokens are used; the second adds
the other cells of the SViT paper's table 3, from the folder that `examples/train_gates.py` has
written (svit alone, with --no-reactivation, with --per-image, and with both; with --calibrate 0, to
see what training alone comes to).
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tokred
from tokred.data import zoo
from tokred.models.segmenter import mean_iou
from tokred.optional import require
from tokred.patching import reduction_of
from tokred.show import drawing
from tokred.training import usage

CLASSIFIER, SEGMENTER = "digits_cluttered", "digits_scenes"
LAYERS = 12
STUDY = {
    "dynamic, reactivation": ("", tokred.SViT()),
    "dynamic, none": ("_once", tokred.SViT(reactivate=False)),
    "fixed, reactivation": ("_per_image", tokred.SViT()),
    "fixed, none": ("_per_image_once", tokred.SViT(reactivate=False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--drawings", type=int, default=5, help="of the 397 held-out digits")
    parser.add_argument("--seeds", type=int, default=3, help="of random gates")
    parser.add_argument("--study", type=Path, help="folder with the gates of the study")
    parser.add_argument("--pictures", type=Path, help="folder to draw into")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.study:
        study(options.study, options.drawings)
        return
    classifier(options.drawings, options.seeds)
    segmenter(options.seeds)
    if options.pictures:
        pictures(options.pictures)


def classifier(drawings: int, seeds: int) -> None:
    """A row for each way to run the classifier."""
    model = zoo.load(CLASSIFIER)
    images, labels = drawn(drawings)
    rows = [("dense", scored(model, images, labels))]
    tokred.apply(model, tokred.SViT(zoo.gates(CLASSIFIER)))
    rows.append(("svit, trained", scored(model, images, labels)))
    counts = means(model, images)
    for seed in range(seeds):
        random_gates(model, seed, images[:397])
        rows.append((f"svit, random gates {seed}", scored(model, images, labels)))
    tokred.apply(model, "topk", tokred.Exactly(tuple(sorted(counts, reverse=True))))
    rows.append(("topk, as many tokens", scored(model, images, labels)))
    tokred.apply(model, tokred.DynamicViT(zoo.gates(CLASSIFIER, "dynamicvit")))
    rows.append(("dynamicvit, trained", scored(model, images, labels)))
    for method in ("topk", "atc", "tome"):
        tokred.apply(model, method, 0.7)
        rows.append((f"{method}, keep rate .7", scored(model, images, labels)))
    print(f"{CLASSIFIER}, {len(images)} drawings of held-out digits\n")
    table(rows, "accuracy")


def segmenter(seeds: int) -> None:
    """The same of scenes: mean IoU."""
    model, held_out = zoo.load(SEGMENTER), zoo.held_out(SEGMENTER)
    images, labels = zoo.normalise(held_out.images), held_out.labels
    rows = [("dense", scored(model, images, labels))]
    tokred.apply(model, tokred.SViT(zoo.gates(SEGMENTER)))
    rows.append(("svit, trained", scored(model, images, labels)))
    counts = means(model, images)
    for seed in range(seeds):
        random_gates(model, seed, images)
        rows.append((f"svit, random gates {seed}", scored(model, images, labels)))
    tokred.apply(model, "topk", tokred.Exactly(tuple(sorted(counts, reverse=True))))
    rows.append(("topk, as many tokens", scored(model, images, labels)))
    for method in ("atc", "slic"):
        tokred.apply(model, method, tokred.Stages(0.7))
        rows.append((f"{method}, keep rate .7", scored(model, images, labels)))
    print(f"\n{SEGMENTER}, {len(images)} held-out scenes\n")
    table(rows, "mIoU")


def study(folder: Path, drawings: int) -> None:
    """Table 3 of the paper: dynamic or fixed rate, with reactivation or without."""
    images, labels = drawn(drawings)
    rows = []
    for name, (suffix, method) in STUDY.items():
        model = zoo.load(CLASSIFIER)
        file = folder / f"{CLASSIFIER}_svit{suffix}.safetensors"
        tokred.apply(model, tokred.SViT(file, reactivate=method.reactivate))
        rows.append((name, scored(model, images, labels)))
        tokred.calibrate(model, images[: len(images) // drawings])
        rows.append((f"{name}, calibrated", scored(model, images, labels)))
    print(f"{CLASSIFIER}, {len(images)} drawings of held-out digits\n")
    table(rows, "accuracy")


@dataclass(frozen=True)
class Scores:
    """What one way to run a model came to.

    Attributes:
        value: accuracy, or of scenes mean IoU.
        used: the share of the patch tokens that the layers of each stage work on: the second,
            third and last quarter.
        spread: by how much that differs between images at most.
        ratio: how many times fewer multiply-adds there are.
    """

    value: float
    used: list[float]
    spread: float
    ratio: float


def table(rows: list[tuple[str, Scores]], score: str) -> None:
    print(f"| | {score} | tokens used, stage by stage | images differ by up to | mult-adds |")
    print("|---|---|---|---|---|")
    for name, found in rows:
        stages = ", ".join(f"{share:.1%}" for share in found.used)
        times = f"{found.ratio:.2f}x fewer" if found.ratio > 1 else ""
        print(f"| {name} | {found.value:.1%} | {stages} | {found.spread:.1%} | {times} |")


def drawn(number: int) -> tuple[Tensor, Tensor]:
    """The held-out images, and further drawings of their digits."""
    held_out = zoo.held_out(CLASSIFIER)
    generator = torch.Generator().manual_seed(1)
    more = [zoo.draw(held_out.digits, generator, CLASSIFIER) for _ in range(number - 1)]
    return zoo.normalise(torch.cat([held_out.images, *more])), held_out.labels.repeat(number)


@torch.no_grad()
def scored(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    answers, shares = [], []
    for chunk in tqdm(images.split(100 if labels.ndim == 1 else 10), leave=False):
        answer, share = ran(model, chunk)
        answers.append(answer)
        shares.append(share)
    answer, share = torch.cat(answers), torch.cat(shares)
    value = float((answer == labels).float().mean())
    if labels.ndim > 1:
        value = mean_iou(answer, labels, zoo.SCENE_CLASSES)
    layers = share.shape[1]
    stages = [share[:, layers * n // 4 : layers * (n + 1) // 4].mean(1) for n in (1, 2, 3)]
    spread = max(float(stage.max() - stage.min()) for stage in stages)
    means = [float(stage.mean()) for stage in stages]
    return Scores(value, means, spread, tokred.flops(model, images[:20]).ratio)


def traced(model: nn.Module, images: Tensor) -> tokred.Trace:
    trace = tokred.inspect(model, images)
    assert isinstance(trace, tokred.Trace)
    return trace


def ran(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the model says, and the share of the patch tokens that each layer works on, [images,
    layers]."""
    reduction = reduction_of(model)
    if reduction is None:
        return model(images).argmax(1), torch.ones(len(images), LAYERS)
    with reduction.recording() as records:
        answer = model(images).argmax(1)
    tokens = usage(records, reduction.layout, len(images))
    return answer, tokens.T / reduction.layout.patches


@torch.no_grad()
def means(model: nn.Module, images: Tensor) -> list[int]:
    """The mean number of tokens that each layer works on."""
    shares = torch.cat([ran(model, chunk)[1] for chunk in images.split(100)]).mean(0)
    patches = reduction_of(model).layout.patches
    return [max(1, round(float(share) * patches)) for share in shares]


def random_gates(model: nn.Module, seed: int, images: Tensor) -> None:
    """Random gates that keep their targets of these images' tokens."""
    torch.manual_seed(seed)
    reduction = tokred.apply(model, "svit", 0.7)
    for gate in reduction.gates.values():
        nn.init.normal_(gate.fc1.weight, std=0.5)
        nn.init.normal_(gate.fc2.weight, std=0.5)
    tokred.calibrate(model, images[:100])


def pictures(folder: Path) -> None:
    """Where tokens are used, as in the paper's figures 1, 5 and 9."""
    figure = require("matplotlib.figure", "plots").Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    strips = []
    for name, place in zip((CLASSIFIER, SEGMENTER), axes, strict=True):
        model, images = zoo.load(name), zoo.held_out(name).images[:40]
        tokred.apply(model, tokred.SViT(zoo.gates(name)))
        trace = traced(model, zoo.normalise(images))
        drawing.plot_usage(place, trace)
        place.set_title(name)
        strips += drawing.heat(trace, list(images), cell=8)[:2]
    figure.savefig(folder / "gates-layers.png", dpi=90)
    drawing.stack(strips).save(folder / "gates-usage.png")
    print(f"\nwrote {folder / 'gates-layers.png'} and {folder / 'gates-usage.png'}")


if __name__ == "__main__":
    main()
