"""The suite `tcformer`: TCFormerV2-Small against TCFormer, which differ only in whether tokens are
clustered within parts of the image, at rising resolutions.

Both have the same weights (random ones, which speed does not depend on) and take turns. What
clustering, merging and the conversions between tokens and maps take of a forward pass is timed
inside of it, from the calls that the model makes. With one thread on the CPU, all times are that
thread's own, so that others may be busy on the machine. The most memory that a process
ever had is that of a fresh process for each model, weights and libraries included.
"""

from __future__ import annotations

import copy
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokred.measure.conditions import device_name
from tokred.measure.cost import flops
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
    """Measures the models in turns, size by size. Returns what `markdown` and JSON take.

    Args:
        sizes: heights and widths of the images, in pixels.
        models: names of `tokred.models.tcformer`, of which the second is compared with the first.
        batch: images at once.
        rounds: measured rounds of each model and size.
        memory: the size for which memory is measured; None for not at all.
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
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in made}
        for number in range(-1, rounds):  # the first warms up
            # Shuffled, because a model may gain or lose by which one came before it.
            for name in random.Random(number).sample(list(made), len(made)):
                took = inside(made[name], images)
                if number >= 0:
                    seconds[name].append(took)
            if on_round and number >= 0:
                on_round(number + 1, rounds)
        for name, model in made.items():
            measured.append(
                {
                    "name": name,
                    "size": size,
                    "macs": flops(model, images[:1]).dense,
                    "seconds": {
                        part: [took[part] for took in seconds[name]]
                        for part in ("all", *PARTS_OF_A_PASS)
                    },
                }
            )
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


def inside(model: nn.Module, images: Tensor) -> dict[str, float]:
    """The seconds of a pass ("all"), and of those of its parts that `PARTS_OF_A_PASS` names."""
    seconds = dict.fromkeys(PARTS_OF_A_PASS, 0.0)
    with torch.no_grad(), _timed(seconds, images.device):
        begin = _now(images.device)
        model(images)
        took = _now(images.device) - begin
    return {"all": took, **seconds}


@contextmanager
def _timed(seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """Adds up what calls take, by what they do, while it lasts."""
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
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time()  # whatever else the machine does
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
    """Bytes that a process has at most which runs a model once on one image: of memory on the CPU,
    or what torch allocates on another device.

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
