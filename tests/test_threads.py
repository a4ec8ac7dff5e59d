"""Several threads use one patched model: eager, compiled as a whole and block by block, or in
parts. Every answer is the one that the model gives alone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import small
from test_hosts import SMALL, answered
from torch import Tensor, nn

import tokred
from tokred.maps import Clusters

WAYS = ("eager", "whole", "blocks", "every other block")
FEW, MANY = 40, 1000
"""Forward passes of each cell, over all threads: in every run, and in the slow one."""


@pytest.fixture(autouse=True)
def _forgets_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prepare(model: nn.Module, blocks: list[nn.Module], way: str) -> None:
    """Compiles a model in one of the ways. (The backend runs graphs as they are: what is told
    apart here happens before and behind it.)"""
    if way == "whole":
        model.compile(backend="eager")
    elif way != "eager":
        for block in blocks[:: 2 if way == "every other block" else 1]:
            block.compile(backend="eager")


def stress(call: Callable[[int], Tensor], inputs: int, passes: int, threads: int = 4) -> None:
    """Calls something from several threads at a time, which must give what it gives alone.

    Args:
        call: called with the number of an input.
        inputs: how many inputs there are.
        passes: how many calls, over all threads.
        threads: how many threads.
    """
    # Alone first: compiled code is made once (torch 2.6 cannot make it in several threads).
    for _ in range(2):
        expected = [call(n) for n in range(inputs)]
    failures: list[str] = []
    barrier = threading.Barrier(threads)

    def serve(thread: int) -> None:
        barrier.wait()
        for n in range(passes // threads):
            which = (thread + n) % inputs
            try:
                with torch.no_grad():
                    error = float((call(which) - expected[which]).abs().max())
                if not error < 1e-4:
                    failures.append(f"input {which} is off by {error}")
            except Exception as error:
                failures.append(repr(error)[:200])

    running = [threading.Thread(target=serve, args=(thread,)) for thread in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures, f"{len(failures)} of {passes}: {sorted(set(failures))[:5]}"


def vit(method: str, way: str, passes: int) -> None:
    model = small("vit")
    tokred.apply(model, method, 0.5)
    # Of several sizes, so that threads differ in more than in their values.
    inputs = [torch.randn(1 + n % 2, 3, 64, 64) for n in range(4)]
    prepare(model, list(model.blocks), way)
    stress(lambda n: model(inputs[n]), len(inputs), passes)


@pytest.mark.parametrize(
    ("method", "way"),
    [("tome", "blocks"), ("tome", "whole"), ("topk", "eager"), ("ats", "every other block")],
)
@torch.no_grad()
def test_any_number_of_threads(method: str, way: str) -> None:
    vit(method, way, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", tokred.methods())
@pytest.mark.filterwarnings("ignore:the gates of:UserWarning")
@torch.no_grad()
def test_any_number_of_threads_and_all_methods(method: str, way: str) -> None:
    try:
        tokred.apply(small("vit"), method, 0.5)
    except tokred.UnsupportedModelError as error:
        pytest.skip(str(error))
    vit(method, way, MANY)


FAMILIES = sorted({name.split("-")[0]: name for name in SMALL}.values())


def family(name: str, way: str, passes: int) -> None:
    from tokred.host import Stage, find_host

    made = SMALL[name]
    model = made.build()
    host, tower = find_host(model)
    tokred.apply(model, "slic" if isinstance(host, Stage) else "tome", 0.5)
    inputs = [made.inputs(1 + n % 2) for n in range(3)]
    prepare(tower if way == "whole" else model, list(host.blocks(tower)), way)
    stress(lambda n: answered(made, model, inputs[n]), len(inputs), passes)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_any_number_of_threads_and_every_family(name: str, way: str) -> None:
    family(name, way, MANY)


# Denoisers

AROUND = {
    "plain": tokred.Around(),
    "shared": tokred.Around(shared=True),
    "part of the sampling": tokred.Around(during=(0, 0.5)),
    "mlp too": tokred.Around(modules=("attention", "mlp")),
    "every other step": tokred.Around(shared=True, every=2),
}


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    return made.eval().requires_grad_(False)


def compiled(model: Any, way: str) -> None:
    if way == "whole":
        model.compile(backend="eager")
    elif way == "parts":
        for part in (*model.down_blocks, *model.up_blocks):
            part.compile(backend="eager")
    elif way == "repeated blocks":
        model.compile_repeated_blocks(backend="eager")


def few_of(*chosen: tuple[str, str]) -> list[Any]:
    """All ways of all values, of which some are tried in every run."""
    cells = itertools.product(AROUND, ("whole", "parts", "repeated blocks"))
    return [pytest.param(*cell, marks=() if cell in chosen else pytest.mark.slow) for cell in cells]


@pytest.mark.parametrize(
    ("around", "way"),
    few_of(("shared", "parts"), ("part of the sampling", "parts"), ("plain", "repeated blocks")),
)
def test_parts_of_a_denoiser_compiled(around: str, way: str) -> None:
    """What is shared, and when tokens are merged, is the same in compiled parts as without."""
    if (around, way) == ("every other step", "whole"):
        pytest.skip("matchings cannot be kept from call to call of one graph: an error")
    latents = [torch.randn(1, 4, 16, 16) for _ in range(4)]
    text = torch.randn(1, 7, 16)
    answers = []
    for how in ("eager", way):
        model = unet()
        tokred.apply(model, "tome", AROUND[around])
        compiled(model, how)
        steps = zip((900, 600, 400, 100), latents, strict=True)
        answers.append([model(x, step, text).sample for step, x in steps])
    dense = unet()(latents[0], 900, text).sample
    for expected, found in zip(*answers, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(answers[0][0], dense, atol=1e-4)


@pytest.mark.parametrize(
    "way",
    [
        "eager",
        "parts",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("whole", "repeated blocks")),
    ],
)
def test_threads_share_a_denoiser(way: str) -> None:
    model = unet()
    tokred.apply(model, "tome", tokred.Around(shared=True))
    compiled(model, way)
    latents = [torch.randn(1, 4, 16, 16) for _ in range(4)]
    text = torch.randn(1, 7, 16)

    def call(n: int) -> Tensor:
        found: Tensor = model(latents[n], 500, text).sample
        return found

    with torch.no_grad():
        stress(call, len(latents), FEW)


def test_what_a_thread_does_is_not_what_another_compiles() -> None:
    """`torch.compiler.is_compiling()` is true of all threads while one of them compiles. Code that
    asked it took another way then, on which padding that is NaN reached tokens that are there."""
    x, size = torch.randn(2, 6, 4), torch.ones(2, 6)
    x[1, 4:] = torch.nan
    clusters = Clusters(torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]), 3)
    expected = clusters.down(x, size)
    assert expected[1, :2].isfinite().all()
    begun, goes_on = threading.Event(), threading.Event()

    def backend(graph: Any, inputs: Any) -> Any:
        begun.set()
        goes_on.wait(60)
        return graph

    def compile_something() -> None:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))

    thread = threading.Thread(target=compile_something)
    thread.start()
    try:
        assert begun.wait(60)
        found = clusters.down(x, size)
        model = small("vit")
        tokred.apply(model, "ats", 0.5)
        with torch.no_grad():
            answer = model(torch.zeros(1, 3, 64, 64))
    finally:
        goes_on.set()
        thread.join()
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert answer.isfinite().all()
