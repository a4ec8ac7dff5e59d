"""The suite `tcformer`: TCFormerV2-Small against TCFormer.

They differ in one thing: TCFormerV2 clusters tokens within parts of the image. Both have the same
weights (random ones, which speed does not depend on) and take turns. The calls for clustering,
merging and conversion between tokens and maps are timed inside of the forward pass. On the CPU with
one thread, the time of that thread counts, so other work on the machine does not. Memory is
measured in a process of its own for each model, weights and libraries included.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokred.measure.conditions import device_name
from tokred.measure.cost import flops
from tokred.measure.race import in_turns, now
from tokred.models.tcformer import backbone

MODELS = ("tcformer", "tcformerv2_small")
SIZES = (224, 384, 512)
MEMORY = 1024
"""Pixels of the image for which memory is measured, of TCFormerV2-Small."""

PARTS_OF_A_PASS = {
    "clustering": ("cluster_in_parts", "parts_of"),
    "merging": ("merge", "merged"),
    "conversion": ("to_map", "from_map", "resized", "raster"),
}
"""The functions that are timed, by what they do."""


def run(
    sizes: Sequence[int] = SIZES,
    *,
    models: Sequence[str] = MODELS,
    batch: int = 1,
    rounds: int = 5,
    memory: int | None = MEMORY,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_round: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measures the models in turns, size by size. The results are for `markdown` and JSON.

    Args:
        sizes: heights and widths of the images, in pixels.
        models: names in `tokred.models.tcformer`; all are compared with the first.
        batch: images per batch.
        rounds: measured rounds of each model and size.
        memory: the image size for which memory is measured; None: it is not measured.
        device: "cpu" or "cuda".
        dtype: of the models.
        on_round: called after every round with (rounds done, rounds in all), size by size.
        options: of the models, such as `depths`.
    """
    first = backbone.TCFormer(**{**backbone.VARIANTS[models[0]], **options}).eval()
    made = {name: copy.deepcopy(first).to(device, dtype) for name in models}
    for name, model in made.items():
        model.parts = backbone.VARIANTS[name]["parts"]
    measured = []
    for size in sizes:
        images = torch.randn(batch, 3, size, size).to(device, dtype)
        measured += _raced(made, images, rounds, on_round)
    return {
        "models": measured,
        "memory": None if memory is None else peak_memory(models[-1], memory, device, dtype),
        "memory_size": memory,
        "batch": batch,
        "rounds": rounds,
        "device": device_name(torch.device(device)),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _raced(
    models: Mapping[str, nn.Module],
    images: Tensor,
    rounds: int,
    on_round: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """What each model takes for these images, in turns."""

    def turn(name: str, number: int) -> dict[str, float]:
        return inside(models[name], images)

    taken = in_turns(models, turn, rounds, 1, on_round)
    return [
        {
            "name": name,
            "size": images.shape[-1],
            "macs": flops(model, images[:1]).dense,
            "seconds": {
                part: [took[part] for took in taken[name]] for part in ("all", *PARTS_OF_A_PASS)
            },
        }
        for name, model in models.items()
    ]


def inside(model: nn.Module, images: Tensor) -> dict[str, float]:
    """The seconds of a pass ("all"), and of the parts that are named in `PARTS_OF_A_PASS`."""
    seconds = dict.fromkeys(PARTS_OF_A_PASS, 0.0)
    with torch.no_grad(), _timed(seconds, images.device):
        begin = _now(images.device)
        model(images)
        took = _now(images.device) - begin
    return {"all": took, **seconds}


@contextmanager
def _timed(seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """In the `with` block, adds the seconds of each call to those of its part."""
    module: Any = backbone
    plain = {call: getattr(module, call) for calls in PARTS_OF_A_PASS.values() for call in calls}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = _now(device)
            out = function(*args, **kwargs)
            seconds[name] += _now(device) - begin
            return out

        return wrapped

    try:
        for name, calls in PARTS_OF_A_PASS.items():
            for call in calls:
                setattr(module, call, timed(name, plain[call]))
        yield
    finally:
        for call, function in plain.items():
            setattr(module, call, function)


def _now(device: torch.device) -> float:
    # With one thread its own time counts, whatever else the machine does.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return now(device, time.thread_time if alone else time.perf_counter)


_PROGRAM = """
import sys, torch
from tokred.models.tcformer import backbone
name, size, device, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3], getattr(torch, sys.argv[4])
torch.set_num_threads(int(sys.argv[5]))
model = getattr(backbone, name)().eval().to(device, dtype)
with torch.no_grad():
    model(torch.randn(1, 3, size, size).to(device, dtype))
if device == "cpu":
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
else:
    print(torch.cuda.max_memory_allocated(device))
"""


def peak_memory(name: str, size: int, device: str, dtype: torch.dtype) -> int:
    """The most bytes of memory that a process takes which runs a model once on one image; on
    another device than the CPU, the most that torch allocates there.

    Raises:
        RuntimeError: the process has failed.
    """
    told = [name, str(size), device, str(dtype).removeprefix("torch.")]
    command = [sys.executable, "-c", _PROGRAM, *told, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise RuntimeError(f"{name} at {size} pixels failed: {why}")
    return int(done.stdout.split()[-1])


def markdown(results: dict[str, Any]) -> str:
    """A table of all models and sizes."""
    lines = [
        "| model | pixels | mult-adds, G | ms | against the first | clustering | merging "
        "| conversion |",
        "|---|---|---|---|---|---|---|---|",
    ]
    firsts: dict[int, float] = {}
    for row in results["models"]:
        median = {part: statistics.median(took) for part, took in row["seconds"].items()}
        took = median["all"]
        first = firsts.setdefault(row["size"], took)
        shares = [f"{median[part] / took:.1%}" for part in PARTS_OF_A_PASS]
        cells = [
            *(row["name"], str(row["size"]), f"{row['macs'] / 1e9:.2f}", f"{took * 1e3:.0f}"),
            *(f"{first / took:.2f}", *shares),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"\nBatch {results['batch']}, {results['dtype']}, {results['device']}, "
        f"{results['threads']} threads, medians of {results['rounds']} rounds."
    )
    if results["memory"] is not None:
        name = results["models"][-1]["name"]
        lines.append(
            f"\nOne image of {results['memory_size']} pixels takes {name} "
            f"{results['memory'] / 2**30:.2f} GiB at most."
        )
    return "\n".join(lines)
