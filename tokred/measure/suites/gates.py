"""The suite `gates`: SViT, whose images have different numbers of tokens, against the dense model.

Four sides take turns: the dense model; SViT as it runs, with the tokens of all images laid end to
end (`tokred.kernels.varlen`); SViT with images padded to the one that keeps most tokens; and the
free limit, which cuts every image off to the mean number. The images are the bundled cluttered
digits, enlarged, because some of them have more to see than others. Gates are random, and
calibrated to their targets on these images (`tokred.calibrate`). Weights are random, too: speed
depends on neither.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.data import zoo
from tokred.host import find_host
from tokred.measure.calibration import calibrate
from tokred.measure.conditions import device_name, versions_of
from tokred.measure.limit import counts_of, limits_of
from tokred.measure.race import measure, sides
from tokred.measure.slicing import take_off
from tokred.measure.tracing import Trace, inspect
from tokred.optional import require
from tokred.patching import apply, remove
from tokred.reducers.svit import SViT

MODELS = ("deit_small_patch16_224",)
BATCHES = (8, 32)
DENSE, OURS, PADDED, LIMIT = "dense", "end to end", "padded", "free limit"


def run(
    models: Sequence[str] = MODELS,
    batches: Sequence[int] = BATCHES,
    *,
    keep_rate: float = 0.7,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 20,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures all four sides, group by group. The results are for `markdown` and JSON.

    Args:
        models: timm names.
        batches: images per batch.
        keep_rate: the share of tokens that gates keep at each of three stages; 0.7 in the paper.
        device: "cpu" or "cuda".
        dtype: of the models.
        rounds: measured rounds of each group.
        on_round: called after every round with (rounds done, rounds in all), group by group.
    """
    timm = require("timm", "timm")
    groups = []
    for name in models:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        size = model.patch_embed.img_size
        model.to(device, dtype)
        for batch in batches:
            images = pictures(batch, size).to(device, dtype)
            groups.append({"model": name, **_group(model, images, keep_rate, rounds, on_round)})
    where = torch.device(device)
    return {
        "groups": groups,
        "device": device_name(where),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _group(
    model: nn.Module,
    images: Tensor,
    keep_rate: float,
    rounds: int,
    on_round: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    host, tower = find_host(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that gates are random
        reduction = apply(model, SViT(), keep_rate)
    assert reduction.gates is not None
    for gate in reduction.gates.values():
        nn.init.normal_(gate.fc2.weight, std=0.5)
    calibrate(model, images)
    trace = inspect(model, images)
    assert isinstance(trace, Trace)
    stages = trace.stages
    remove(model)
    grid = host.layout(tower, None).grid
    counts = counts_of(model, host, images, reduction, grid)
    limits = limits_of(model, host, images, reduction, counts)
    arms = {
        DENSE: None,
        OURS: reduction,
        PADDED: replace(reduction, padded=True),
        LIMIT: limits.free,
    }
    measured = measure(sides(model, host, arms, compile=False), images, rounds, 3, on_round)
    take_off(model)
    return {
        "batch": len(images),
        "tokens": grid[0] * grid[1],
        "counts": counts,
        "fewest": [min(stage.counts) for stage in stages],
        "most": [max(stage.counts) for stage in stages],
        "seconds": {name: arm.seconds for name, arm in measured.items()},
        "spread": {name: arm.spread for name, arm in measured.items()},
        "versions": versions_of(model),
    }


def pictures(batch: int, size: tuple[int, int]) -> Tensor:
    """Bundled images, enlarged to `size` pixels, with three equal channels."""
    held_out = zoo.held_out(zoo.DEFAULT).images[:batch]
    images = F.interpolate(zoo.normalise(held_out), size, mode="bilinear")
    return images.repeat(-(-batch // len(images)), 3, 1, 1)[:batch]


def markdown(results: dict[str, Any]) -> str:
    """A table of the speed-up of each side over the dense model."""
    lines = [
        "| model | batch | SViT | padded | free limit | of it | over padded | tokens in the gated "
        "layers, fewest, mean, most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in results["groups"]:
        took = {name: statistics.median(seconds) for name, seconds in group["seconds"].items()}
        faster = {name: took[DENSE] / seconds for name, seconds in took.items()}
        gated = [count for count in group["counts"] if count < group["tokens"]]
        ranges = (min(group["fewest"]), sum(gated) / max(1, len(gated)), max(group["most"]))
        cells = [
            group["model"],
            str(group["batch"]),
            *(f"{faster[name]:.2f}" for name in (OURS, PADDED, LIMIT)),
            f"{faster[OURS] / faster[LIMIT]:.2f}",
            f"{faster[OURS] / faster[PADDED]:.2f}",
            f"{ranges[0]}, {ranges[1]:.0f}, {ranges[2]}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"\n{results['device']}, {results['dtype']}, {results['threads']} threads, "
        f"{len(results['groups'][0]['seconds'][DENSE])} rounds in turns, medians."
    )
    return "\n".join(lines)
