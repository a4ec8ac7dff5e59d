"""The suite `dense`: models with their published presets; token clustering and reconstruction
against plain implementations.

The functions `tokred.reducers.slic.cluster` and `reconstruct` are timed at the sizes of a ViT-L in
three segmentation models (Liang et al., "Expediting Large-Scale Vision Transformer for Dense
Prediction without Fine-tuning", NeurIPS 2022, table 8). The plain clustering computes all pairs of
tokens and centres, and masks those that are not neighbours. The plain reconstruction computes all
distances, takes the smallest, and gathers a weighted sum. All contestants take turns.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.measure.cost import bench, flops
from tokred.measure.race import seconds_in_turns
from tokred.optional import require
from tokred.patching import applied
from tokred.patching.presets import presets
from tokred.reducers import slic

MODELS = (
    ("vit_large_patch16_224", (640, 640), "segmenter-ade20k"),
    ("swin_large_patch4_window12_384", (480, 640), "mask2former-coco-panoptic"),
)
"""timm names, heights and widths of images in pixels, presets."""

DIM = 1024
SIZES = ((40, 28), (48, 32), (30, 15))
"""Rows (and columns) of the tokens and of the clusters."""

OURS, ALL_PAIRS, PLAIN = "slic", "all pairs, masked", "distances, top k, gather"
NEIGHBOURHOOD, ITERATIONS, TAU, K = 5, 5, 50.0, 20


def run(
    models: Sequence[tuple[str, tuple[int, int], str]] = MODELS,
    sizes: Sequence[tuple[int, int]] = SIZES,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 5,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures models with their presets on one image: dense, reduced and cut off, in turns. Then
    measures the kernels, on the CPU in float32. The results are for `markdown` and JSON.

    Weights are random, which speed does not depend on.

    Args:
        models: timm names, heights and widths of images in pixels, and presets.
        sizes: of the kernels: rows (and columns) of the tokens and of the clusters.
        device: "cpu" or "cuda", of the models.
        dtype: of the models.
        rounds: measured rounds of each.
        on_round: called after every round with (rounds done, rounds in all), model by model.
    """
    timm = require("timm", "timm")
    measured = []
    for name, image_size, preset in models:
        model = timm.create_model(name, img_size=image_size).eval().to(device, dtype)
        image = torch.randn(1, 3, *image_size).to(device, dtype)
        with torch.no_grad(), applied(model, presets[preset]):
            counted = flops(model, image)
        result = bench(model, image, presets[preset], rounds=rounds, warmup=1, on_round=on_round)
        measured.append(
            {
                "name": name,
                "preset": preset,
                "dense_macs": counted.dense,
                "reduced_macs": counted.reduced,
                "speed_up": result.speed_up,
                "free_limit": result.free_limit,
                "efficiency": result.efficiency,
                **result.as_dict(),
            }
        )
        del model
    return {
        "models": measured,
        "kernels": kernels(rounds, sizes),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def markdown(results: dict[str, Any]) -> str:
    """Two tables: models, and kernels."""
    lines = [
        "| model | preset | mult-adds, G | by these | speed-up | free limit | of limit | "
        "of it bookkeeping |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["models"]:
        dense, reduced = row["dense_macs"] / 1e9, row["reduced_macs"] / 1e9
        pixels = "x".join(map(str, row["image_size"]))
        cells = [
            f"{row['name']}, {pixels}",
            row["preset"],
            f"{dense:.1f} -> {reduced:.1f}",
            *(f"{dense / reduced:.2f}", f"{row['speed_up']:.2f}"),
            *(f"{row['free_limit']:.2f}", f"{row['efficiency']:.2f}"),
            "not known" if row["bookkeeping"] is None else f"{row['bookkeeping']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| kernel | tokens | clusters | ms | plain, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["kernels"]:
        ours, theirs = (statistics.median(seconds) * 1e3 for seconds in row["seconds"].values())
        tokens, clusters = ("x".join(map(str, row[of])) for of in ("tokens", "clusters"))
        lines.append(
            f"| {row['kernel']} | {tokens} | {clusters} | {ours:.1f} | {theirs:.1f} | "
            f"{theirs / ours:.1f} |"
        )
    for model in results["models"]:
        grid = presets[model["preset"]].grid
        took = [
            statistics.median(row["seconds"][OURS])
            for row in results["kernels"]
            if row["tokens"] == grid and math.prod(row["clusters"]) == min(model["counts"])
        ]
        if took:
            share = sum(took) / statistics.median(model["dense"]["seconds"])
            lines.append(f"\nBoth kernels together: {share:.1%} of the dense {model['name']}.")
    lines.append(f"\n{results['dtype']} (kernels: float32), {results['threads']} threads.")
    return "\n".join(lines)


def kernels(
    rounds: int = 9,
    sizes: Sequence[tuple[int, int]] = SIZES,
    dim: int = DIM,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Measures both functions on the CPU, in float32, for one image.

    Args:
        rounds: measured rounds of each function and size.
        sizes: rows (and columns) of the tokens and of the clusters.
        dim: of the tokens.
        clock: which clock is read; on a busy machine, take `time.thread_time` and one thread.

    Returns:
        For each function and size: its name, the sizes, and for every contestant the seconds of
        each round.
    """
    rows = []
    with torch.no_grad():
        for side, few in sizes:
            x = _smooth(side, dim, torch.Generator().manual_seed(0))
            for kernel, contestants in _contestants(x, few).items():
                seconds = seconds_in_turns(contestants, x.device, rounds, clock)
                sides = {"tokens": (side, side), "clusters": (few, few), "dim": dim}
                rows.append({"kernel": kernel, **sides, "seconds": seconds})
    return rows


def _contestants(x: Tensor, few: int) -> dict[str, dict[str, Callable[[], Tensor]]]:
    z = x.flatten(1, 2)
    near = _near(x.shape[1], few)
    centres = slic.cluster(x, (few, few), NEIGHBOURHOOD, ITERATIONS, TAU)
    after = centres.roll(1, dims=2)
    return {
        "cluster": {
            OURS: lambda: slic.cluster(x, (few, few), NEIGHBOURHOOD, ITERATIONS, TAU),
            ALL_PAIRS: lambda: all_pairs(x, (few, few), near, ITERATIONS, TAU),
        },
        "reconstruct": {
            OURS: lambda: slic.reconstruct(z, centres, after, K, TAU),
            PLAIN: lambda: plain(z, centres, after, K, TAU),
        },
    }


def all_pairs(
    x: Tensor, grid: tuple[int, int], near: Tensor, iterations: int, tau: float
) -> Tensor:
    """Clustering with all distances, of which only those in `near` count. It is as fast as that can
    be: |z|^2 cancels and is left out, and the mask is made once."""
    z = x.flatten(1, 2)
    s = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)
    mask = torch.zeros(near.shape).masked_fill(~near, -torch.inf)
    for _ in range(iterations):
        length = s.square().sum(-1)[:, None, :] / tau
        q = torch.baddbmm(mask - length, z, s.transpose(1, 2), alpha=2 / tau).softmax(-1)
        s = torch.bmm(q.transpose(1, 2), z) / q.sum(1).clamp(min=1e-16)[:, :, None]
    return s


def plain(before: Tensor, centres: Tensor, after: Tensor, k: int, tau: float) -> Tensor:
    """Reconstruction, written as in the paper."""
    closest = (-torch.cdist(before, centres).square() / tau).topk(k, dim=-1)
    sample = torch.arange(before.shape[0])[:, None, None]
    return (closest.values.softmax(-1)[..., None] * after[sample, closest.indices]).sum(2)


def _near(side: int, few: int) -> Tensor:
    """Which centres are candidates for each token."""
    home = torch.arange(side) * few // side
    near = (home[:, None] - torch.arange(few)).abs() <= NEIGHBOURHOOD // 2
    return (near[:, None, :, None] & near[None, :, None, :]).view(side**2, few**2)


def _smooth(side: int, dim: int, generator: torch.Generator) -> Tensor:
    """A smooth feature map with a little noise."""
    coarse = torch.randn(1, dim, side // 5, side // 5, generator=generator)
    fine = F.interpolate(coarse, (side, side), mode="bilinear").permute(0, 2, 3, 1)
    return fine + 0.3 * torch.randn(fine.shape, generator=generator)
