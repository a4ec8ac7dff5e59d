"""The suite `clustering`: agglomerative token clustering by backend, beside SciPy and scikit-learn.

The function `tokred.reducers.atc.cluster` is timed, from features to labels, distances included.
SciPy and scikit-learn do the same in a loop over the images. All contestants take turns. A turn
makes as many calls as 20 ms need, and its result is their mean. On CUDA, times are those of events,
and backends are also timed in a captured graph: capturing fails if anything waits for the device,
so a time there proves that nothing does.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.measure.conditions import device_name
from tokred.measure.race import in_turns
from tokred.reducers import atc

FORMAT = 1
"""Version of the dictionary's layout."""

DIM = 64
"""Features per token, as the keys of one head have in most ViTs."""

TOKENS = (196, 576, 1369, 4096)
CPU_BATCHES = (1, 8)
CUDA_BATCH = {196: 256, 576: 64, 1369: 64, 4096: 2}
_TURN = 0.02
"""Seconds that every turn takes at least; it makes as many calls as that needs."""

SCIPY, SKLEARN = "SciPy, a loop", "scikit-learn, a loop"
Timer = Callable[[], float]


def run(
    tokens: Sequence[int] = TOKENS,
    *,
    device: str = "cpu",
    linkage: str = "average",
    keep_rate: float = 0.5,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    rounds: int = 9,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures all contestants. The results are for `markdown` and JSON.

    Args:
        tokens: numbers of tokens per image.
        device: "cpu" or "cuda".
        linkage: as for `tokred.reducers.atc.cluster`.
        keep_rate: how many clusters are made, as a share of the tokens.
        backends: which are measured; all that run on the device, if not given.
        batches: numbers of images; if not given, `CPU_BATCHES`, or as many as a GPU needs.
        rounds: measured rounds of each size and kind of data.
        on_round: called after every round with (rounds done, rounds in all).
    """
    kind = torch.device(device).type
    results: list[dict[str, Any]] = []
    notes: list[str] = []
    sizes = [
        (num, batch)
        for num in tokens
        for batch in batches or (CPU_BATCHES if kind == "cpu" else (CUDA_BATCH.get(num, 8),))
    ]
    for num, batch in sizes:
        for data, draw in DRAW.items():
            x = draw(batch, num, torch.Generator().manual_seed(0)).contiguous()
            keep = max(1, int(num * keep_rate))
            timers, trouble = _contestants(x, keep, linkage, device, backends)
            notes += [f"{num} tokens: {line}" for line in trouble]
            lap = (
                None
                if on_round is None
                else partial(_lap, on_round, len(results), len(sizes) * len(DRAW))
            )
            seconds = _raced(timers, rounds, lap)
            results.append({"tokens": num, "batch": batch, "data": data, "seconds": seconds})
    return {
        "format": FORMAT,
        "suite": "clustering",
        "device": device_name(torch.device(device)),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "dim": DIM,
        "linkage": linkage,
        "keep_rate": keep_rate,
        "versions": _versions(),
        "results": results,
        "notes": sorted(set(notes)),
    }


def _lap(on_round: Callable[[int, int], None], former: int, sizes: int, done: int, of: int) -> None:
    """Tells how many rounds are done of those of all sizes."""
    on_round(former * of + done, sizes * of)


def _raced(
    timers: dict[str, Timer], rounds: int, on_round: Callable[[int, int], None] | None
) -> dict[str, list[float]]:
    """The mean seconds of a call in every turn of each contestant."""
    calls: dict[str, int] = {}

    def turn(name: str, number: int) -> float:
        timer = timers[name]
        if number < 0:
            timer()  # which compiles what there is to compile
            calls[name] = max(1, math.ceil(_TURN / timer()))
            return 0.0
        passed = [timer() for _ in range(calls[name])]
        return sum(passed) / len(passed)

    return in_turns(timers, turn, rounds, 1, on_round)


def markdown(results: dict[str, Any]) -> str:
    """A line for every contestant at every size: how many times as fast as the loops it is."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Suite clustering: {results['device']}",
        "",
        f"{results['linkage']} linkage, keep rate {results['keep_rate']}, {results['dim']} "
        f"features in {results['dtype']}, {results['threads']} threads, {versions}. From features "
        "to labels; times faster than a loop over the images, and medians of interleaved rounds.",
        "",
        "| tokens | batch | data | what | than scikit-learn | than SciPy | ms per image | spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results["results"]:
        quartiles = {
            name: torch.tensor(passed).quantile(torch.tensor([0.25, 0.5, 0.75]))
            * 1000
            / result["batch"]
            for name, passed in result["seconds"].items()
        }
        for name, (low, median, high) in quartiles.items():
            ratios = " | ".join(
                f"{float(quartiles[loop][1] / median):.2g}" if loop in quartiles else ""
                for loop in (SKLEARN, SCIPY)
            )
            lines.append(
                f"| {result['tokens']} | {result['batch']} | {result['data']} | {name} | {ratios} "
                f"| {median:.3g} | {low:.3g} to {high:.3g} |"
            )
    lines += ["", *results["notes"]] if results["notes"] else []
    return "\n".join(lines) + "\n"


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in ("scipy", "sklearn", "numba", "triton"):
        if find_spec(name):
            found[name] = str(import_module(name).__version__)
    return found


def _contestants(
    x: Tensor, keep: int, linkage: str, device: str, backends: Sequence[str] | None
) -> tuple[dict[str, Timer], list[str]]:
    """The contestants by name: each is a function that runs once and returns the seconds it took.
    And sentences about what could not be done."""
    images, trouble = x.double().numpy(), []
    timers: dict[str, Timer] = {}
    if find_spec("sklearn"):
        learn = import_module("sklearn.cluster")
        one = learn.AgglomerativeClustering(keep, metric="cosine", linkage=linkage)
        timers[SKLEARN] = _on_host(lambda: [one.fit(image) for image in images])
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import pdist

    def by_scipy() -> object:
        trees = (hierarchy.linkage(pdist(image, "cosine"), linkage) for image in images)
        return [hierarchy.fcluster(tree, keep, "maxclust") for tree in trees]

    timers[SCIPY] = _on_host(by_scipy)
    cuda = torch.device(device).type == "cuda"
    if cuda:
        fitting: tuple[str, ...] = ("torch", "triton")
    elif x.shape[1] <= 576:
        fitting = ("numba", "scipy", "torch")
    else:  # torch's rounds take seconds there, and are not what "auto" picks on a CPU
        fitting = ("numba", "scipy")
    x = x.to(device)
    for backend in backends or fitting:

        def ours(backend: str = backend) -> object:
            return atc.cluster(x, keep, linkage, backend)

        if not cuda:
            timers[backend] = _on_host(ours)
            continue
        timers[backend] = _on_cuda(ours)
        try:
            timers[f"{backend}, in a graph"] = _on_cuda(_captured(ours).replay)
        except RuntimeError as error:
            trouble.append(f"{backend} cannot be captured: {str(error).splitlines()[0]}")
    return timers, trouble


def _on_host(work: Callable[[], object]) -> Timer:
    def timer() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return timer


def _on_cuda(work: Callable[[], object]) -> Timer:
    def timer() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return timer


def _captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work as a graph, after three calls in a side stream, in which kernels are compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


# Data: features [batch, tokens, DIM] of images


def _smooth(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Coarse noise, enlarged, so that neighbours in the image are similar."""
    side = round(tokens**0.5)
    coarse = torch.randn(batch, DIM, max(2, side // 4), max(2, side // 4), generator=generator)
    fine = F.interpolate(coarse, (side, -(-tokens // side)), mode="bicubic")
    fine = fine.flatten(2)[:, :, :tokens].transpose(1, 2)
    return fine + 0.1 * torch.randn(batch, tokens, DIM, generator=generator)


def _clustered(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Clouds of about 16 tokens each."""
    centre = torch.randn(batch, max(1, tokens // 16), DIM, generator=generator)
    cloud = torch.randint(centre.shape[1], (batch, tokens, 1), generator=generator)
    noise = torch.randn(batch, tokens, DIM, generator=generator)
    return centre.gather(1, cloud.expand(-1, -1, DIM)) + 0.3 * noise


def _hubs(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """A few tokens are nearest to very many others, which takes the most rounds of merging."""
    hub = torch.randn(batch, 2, DIM, generator=generator)
    near = torch.randint(2, (batch, tokens, 1), generator=generator)
    noise = torch.randn(batch, tokens, DIM, generator=generator)
    return hub.gather(1, near.expand(-1, -1, DIM)) + torch.logspace(-2, 0, tokens)[:, None] * noise


DRAW = {"smooth": _smooth, "clustered": _clustered, "hub-ridden": _hubs}
