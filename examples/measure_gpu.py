"""Everything of tokred that needs a CUDA device, measured and checked in at most ten minutes.

    pip install "tokred[timm,diffusers,cpu]" scikit-learn tomesd
    python examples/measure_gpu.py gpu.json
    python examples/measure_gpu.py --small

prints one JSON, and writes it to the path, if one is given. Its first line says what the machine
is; then there is a line for each part, with its results and the seconds that it took. Every part
runs in a process of its own and has a budget of seconds. A part that fails, or takes too long, says
why in its line; what it had found by then is kept, and the others go on. (scikit-learn and tomesd
are only compared with, and left out if they are missing.)

With --small, all parts run on the CPU with tiny models and sizes, Triton in its interpreter, and
nothing is compiled: so that the script can be tried without a device. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokred
from tokred.engine import without_mask
from tokred.host import find_host
from tokred.measure import race
from tokred.measure.suites import clustering, diffusion, gates, vit
from tokred.reducers import atc

Found: TypeAlias = Iterator[tuple[str, Any]]
"""What a part finds, one result after another: its name, and what becomes JSON."""

SECONDS = 590
"""All parts together."""


@dataclass(frozen=True)
class Sizes:
    """What is measured, on a device or small.

    Attributes:
        device, dtype: where, and of models.
        models: timm's names and image sizes, for eager models.
        compiled: the same for compiled ones.
        large: the same for memory, and for attention with and without a mask.
        batches: images per batch.
        rounds: measured rounds of models.
        seconds: after which no further round of a group begins.
        tokens: for clustering.
        hard: numbers of tokens on which kernels are checked.
        attention: numbers of sequences (heads of all images), and of tokens.
        unets: configurations of UNets.
        pixels: image sizes of UNets.
    """

    device: str
    dtype: torch.dtype
    models: tuple[tuple[str, int], ...]
    compiled: tuple[tuple[str, int], ...]
    large: tuple[tuple[str, int], ...]
    batches: tuple[int, ...]
    rounds: int
    seconds: float
    tokens: tuple[int, ...]
    hard: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]
    unets: Mapping[str, Mapping[str, Any]]
    pixels: tuple[int, ...]

    @property
    def small(self) -> bool:
        """Whether it is only tried."""
        return self.device == "cpu"


FULL = Sizes(
    device="cuda",
    dtype=torch.bfloat16,
    models=(("deit_small_patch16_224", 224), ("deit_base_patch16_224", 224)),
    compiled=(("deit_small_patch16_224", 224),),
    large=(("vit_small_patch14_dinov2", 224), ("vit_small_patch14_dinov2", 518)),
    batches=(64, 8, 1),
    rounds=40,
    seconds=8,
    tokens=(196, 576, 1024, 4096),
    hard=(197, 577, 256, 17, 2, 1),
    attention=tuple(itertools.product((6, 48, 384), (50, 99, 197, 257, 577, 1025, 2049, 4097))),
    unets={"sd-1.5": diffusion.CONFIGS["sd-1.5"]},
    pixels=(512, 768, 1024),
)
TINY_UNET = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
SMALL = Sizes(
    device="cpu",
    dtype=torch.float32,
    models=(("test_vit", 160),),
    compiled=(("test_vit", 160),),
    large=(("test_vit", 160),),
    batches=(2,),
    rounds=3,
    seconds=1,
    tokens=(64,),
    hard=(3, 1),
    attention=((4, 17),),
    unets={"sd-1.5": TINY_UNET},
    pixels=(128,),
)


# The parts


def kernels(sizes: Sizes) -> Found:
    """Triton's clustering on hard inputs: the same labels as numba's and torch's, bit for bit."""
    from tokred.kernels import agglomerative_torch, agglomerative_triton

    def by_torch(distance: Tensor, keep: int, linkage: str) -> Tensor:
        return agglomerative_torch.cluster(distance.cpu(), keep, linkage)

    references: dict[str, Callable[..., Tensor]] = {"torch": by_torch}
    with suppress(ModuleNotFoundError):
        from tokred.kernels import agglomerative_numba

        references["numba"] = agglomerative_numba.cluster
    solved, differ = 0, []
    for tokens in sizes.hard:
        for kind, distance in hard(tokens).items():
            there = distance.to(sizes.device)
            for keep, linkage in itertools.product(counts(tokens), atc.LINKAGES):
                ours = agglomerative_triton.cluster(there, keep, linkage).cpu()
                for name, cluster in references.items():
                    if name == "torch" and tokens > 64 and "numba" in references:
                        continue  # equal tokens take it as many rounds as there are tokens
                    if not torch.equal(ours, cluster(distance.clone(), keep, linkage)):
                        differ.append(f"{kind}: {tokens} to {keep}, {linkage}, from {name}")
                solved += 1
        yield "against", sorted(references)
        yield "problems", solved
        yield "differ", differ


def counts(tokens: int) -> list[int]:
    """Numbers of clusters: one, all, and some in between."""
    return sorted({1, max(1, tokens // 2), max(1, tokens - 1), tokens})


def hard(tokens: int) -> dict[str, Tensor]:
    """Distances [batch, tokens, tokens] that kernels may stumble over, by what is hard in them."""
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, 16, generator=draw)
    again = torch.randint(max(1, tokens // 4), (tokens,), generator=draw)
    zeros, broken = x.clone(), x.clone()
    zeros[:, ::2] = 0
    broken[0, 0, 0], broken[1, tokens // 2], broken[2] = torch.inf, torch.nan, torch.nan
    few_values = torch.randint(1, 5, (2, tokens, tokens), generator=draw) / 4
    found = {
        "random": x,
        "equal tokens": x[:, again],
        "zeros": zeros,
        "not finite": broken,
        "all alike, batch 1": torch.ones(1, tokens, 16),
    }
    distances = {kind: atc.cosine_distance(features) for kind, features in found.items()}
    return {**distances, "ties everywhere": few_values}


def attention(sizes: Sizes) -> Found:
    """Fused attention with token sizes as a mask, and without: seconds of a call, and the mean
    error of both against float64. And which one `attention="fastest"` takes."""
    device = torch.device(sizes.device)
    for sequences, tokens in sizes.attention:
        case = without_mask.Case(device, sizes.dtype, False, sequences, tokens, 64, 64)
        took = without_mask.seconds_of_both(case)
        drawn = torch.randn(3, 1, sequences, tokens, 64, device=device).to(sizes.dtype)
        query, key, value = drawn.unbind()
        bias = torch.randint(1, 9, (1, 1, 1, tokens), device=device).log()
        taken = without_mask.is_faster(query, key, value)
        found = {"seconds": took, "errors": errors(query, key, value, bias), "taken": taken}
        yield f"{sequences} x {tokens}", found


def errors(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> dict[str, float]:
    """The mean error of both forms, on the first heads."""
    query, key, value = (x[:, :2] for x in (query, key, value))

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=64**-0.5)

    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), bias.double()
    )
    forms = {
        "mask": F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype)),
        "without": without_mask.attention_without_mask(plain, query, key, value, bias),
    }
    return {name: float((form.double() - exact).abs().mean()) for name, form in forms.items()}


def fastest(sizes: Sizes) -> Found:
    """Whole models with `attention="fastest"` and the host's own, in turns."""
    for name, pixels in sizes.large:
        model, images = made(name, pixels, sizes, sizes.batches[0])
        own = reductions(model, ("tome", "atc"))
        other = {f"{method}, fastest": replace(r, attention="fastest") for method, r in own.items()}
        arms = raced(model, images, {**own, **other}, sizes)
        yield f"{name}, {pixels}", {arm: found.median for arm, found in arms.items()}
        del model


def waits(sizes: Sizes) -> Found:
    """Which methods wait for the device in a forward pass, and which passes a CUDA graph holds."""
    if sizes.small:
        yield "skipped", "needs a CUDA device"
        return
    name, pixels = sizes.models[0]
    model, images = made(name, pixels, sizes, 8)
    for method in tokred.methods():
        with torch.no_grad():
            tokred.apply(model, method, keep_rate=0.5)
            expected = model(images)  # kernels are compiled
            try:
                torch.cuda.set_sync_debug_mode("error")
                model(images)
                waited = ""
            except RuntimeError as error:
                waited = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            captured = "not tried: it waits" if waited else in_a_graph(model, images, expected)
        yield method, {"waits": waited, "in a graph": captured}


def in_a_graph(model: nn.Module, images: Tensor, expected: Tensor) -> str:
    """What comes of capturing a forward pass: "same answer", or what is wrong."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            answer = model(images)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    graph.replay()
    torch.cuda.synchronize()
    close = torch.allclose(answer.float(), expected.float(), rtol=0.05, atol=0.05)
    return "same answer" if close else "another answer"


def eager(sizes: Sizes) -> Found:
    """The suite `vit`."""
    yield from groups(sizes, sizes.models, compile=False)


def compiled(sizes: Sizes) -> Found:
    """The suite `vit` with every side compiled."""
    # So small, the calls are made as they are.
    stance = torch.compiler.set_stance("force_eager") if sizes.small else nullcontext()
    with stance:
        yield from groups(sizes, sizes.compiled, compile=True)


def groups(sizes: Sizes, models: Sequence[tuple[str, int]], compile: bool) -> Found:
    """The suite `vit`, one group after another."""
    for model, batch in itertools.product(models, sizes.batches):
        torch.compiler.reset()
        yield (
            f"{model[0]}, batch {batch}",
            vit.run(
                (model,),
                (batch,),
                ("tome", "atc", "topk"),
                (0.5,),
                device=sizes.device,
                dtype=sizes.dtype,
                compile=compile,
                rounds=sizes.rounds,
                seconds=sizes.seconds,
            ),
        )


def clusters(sizes: Sizes) -> Found:
    """The suite `clustering`: every backend, also in a CUDA graph."""
    for tokens in sizes.tokens:
        yield f"{tokens} tokens", clustering.run((tokens,), device=sizes.device, rounds=4)


def unets(sizes: Sizes) -> Found:
    """The suite `diffusion`: a block and UNets, by image size."""
    for pixels in sizes.pixels:
        yield (
            f"{pixels} pixels",
            diffusion.run(
                tuple(sizes.unets),
                (pixels,),
                configs=sizes.unets,
                side=pixels // 8,
                device=sizes.device,
                dtype=sizes.dtype,
                rounds=min(7, sizes.rounds),
            ),
        )


def varlen(sizes: Sizes) -> Found:
    """The suite `gates`: images with different numbers of tokens, end to end and padded."""
    for batch in sizes.batches:
        yield (
            f"batch {batch}",
            gates.run(
                (sizes.models[0][0],),
                (batch,),
                device=sizes.device,
                dtype=sizes.dtype,
                rounds=sizes.rounds,
            ),
        )


def memory(sizes: Sizes) -> Found:
    """The most bytes that torch has allocated in a forward pass: dense, and every method."""
    for name, pixels in sizes.large:
        model, images = made(name, pixels, sizes, 8)
        arms = raced(model, images, reductions(model, tokred.methods()), sizes, rounds=3)
        yield f"{name}, {pixels}", {arm: found.peak_memory for arm, found in arms.items()}
        del model


PARTS: dict[str, tuple[Callable[[Sizes], Found], int]] = {
    "kernels": (kernels, 90),
    "attention": (attention, 40),
    "waits": (waits, 30),
    "eager": (eager, 100),
    "clustering": (clusters, 80),
    "diffusion": (unets, 100),
    "gates": (varlen, 30),
    "memory": (memory, 40),
    "fastest": (fastest, 40),
    "compiled": (compiled, 150),
}
"""What is measured, and in how many seconds at most. Compiling comes last: what is left of the ten
minutes may not be enough for it."""


# What several parts need


def made(name: str, pixels: int, sizes: Sizes, batch: int) -> tuple[nn.Module, Tensor]:
    """A model of timm with random weights, and noise."""
    model = import_module("timm").create_model(name, img_size=pixels).eval()
    model.to(sizes.device, sizes.dtype)
    return model, torch.randn(batch, 3, pixels, pixels).to(sizes.device, sizes.dtype)


def reductions(model: nn.Module, methods: Sequence[str]) -> dict[str, Any]:
    """Methods as they would be applied to a model, which is left as it was."""
    found = {}
    for method in methods:
        found[method] = tokred.apply(model, method, keep_rate=0.5)
        tokred.remove(model)
    return found


def raced(
    model: nn.Module, images: Tensor, arms: Mapping[str, Any], sizes: Sizes, rounds: int = 0
) -> dict[str, race.Arm]:
    """The dense model and these reductions, in turns."""
    entered = race.sides(model, find_host(model)[0], {"dense": None, **arms}, compile=False)
    return race.measure(entered, images, rounds or sizes.rounds, 2, limit=sizes.seconds)


# Running them


def machine(sizes: Sizes) -> dict[str, Any]:
    """What is measured on."""
    versions = {name: installed(name) for name in ("torch", "triton", "timm", "diffusers", "numba")}
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "driver": None,
        **versions,
        "tokred": tokred.__version__,
        "python": platform.python_version(),
    }
    if not sizes.small:
        properties = torch.cuda.get_device_properties(0)
        found["device"], found["memory"] = properties.name, properties.total_memory
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
        found["driver"] = driver()
    return found


def installed(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of the device's driver, as its own tool says it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else None


def work(name: str, sizes: Sizes, results: Connection) -> None:
    """Runs a part, in a process of its own: sends every result, and why it failed, if it did."""
    warnings.simplefilter("ignore")  # gates are random here, and some methods gain nothing
    try:
        for key, value in PARTS[name][0](sizes):
            results.send((key, value))
    except Exception as error:
        results.send(("error", traceback.format_exception_only(error)[-1].strip()))
    results.close()


def part(name: str, sizes: Sizes, limit: float) -> dict[str, Any]:
    """What a part has found, "seconds" and, if it has failed, "error"."""
    # A process that has used CUDA cannot be forked. Triton reads whether it is to interpret when it
    # is imported, which may have happened here. Otherwise a fork spares imports.
    fresh = not sizes.small or name == "kernels"
    context: Any = multiprocessing.get_context("spawn" if fresh else "fork")
    start = time.perf_counter()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, sizes, theirs), daemon=False)
    process.start()
    theirs.close()
    found: dict[str, Any] = {"results": {}}
    while True:
        if not ours.poll(max(0.0, limit - (time.perf_counter() - start))):
            found["error"] = f"it took more than its {limit:.0f} seconds"
            process.kill()
            break
        try:
            key, value = ours.recv()
        except EOFError:
            break
        if key == "error":
            found["error"] = value
        else:
            found["results"][key] = value
    process.join()
    if process.exitcode and "error" not in found:
        found["error"] = f"its process ended with {process.exitcode}"
    return {"seconds": round(time.perf_counter() - start, 2), **found}


def lines(results: Mapping[str, Any]) -> str:
    """JSON with a line for each of its entries."""
    inside = ",\n".join(f"{json.dumps(key)}: {json.dumps(x)}" for key, x in results.items())
    return f"{{{inside}}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, nargs="?", help="where to write the JSON")
    parser.add_argument("--small", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    options = parser.parse_args()
    sizes = SMALL if options.small else FULL
    if not sizes.small and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --small tries everything on the CPU")
    if sizes.small:
        os.environ["TRITON_INTERPRET"] = "1"
        for name in ("timm", "diffusers"):  # once, rather than in every part
            with suppress(ModuleNotFoundError):
                import_module(name)
    start = time.perf_counter()
    results: dict[str, Any] = {"machine": machine(sizes)}
    for number, name in enumerate(options.parts, 1):
        left = SECONDS - (time.perf_counter() - start)
        print(f"{number} of {len(options.parts)}: {name} ...", end=" ", file=sys.stderr, flush=True)
        results[name] = part(name, sizes, max(1.0, min(PARTS[name][1], left)))
        said = results[name].get("error", "done")
        print(f"{results[name]['seconds']:.1f} s, {said}", file=sys.stderr, flush=True)
        if options.path:  # what is known so far, in case this run is cut off
            options.path.write_text(lines(results))
    print(lines(results), end="")


if __name__ == "__main__":
    main()
