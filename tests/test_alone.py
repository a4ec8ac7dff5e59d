"""Each image of a batch gets what it gets alone, whatever the others are: not even one of NaN takes
others with it."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import _swin
from recorded import keeping
from test_hosts import FIRST, SMALL
from test_tcformer import GLOBAL, LOCAL
from test_tcformer import small as tcformer
from torch import Tensor, nn

import tokred
from tokred.data.inputs import call
from tokred.host import find_denoiser, find_host
from tokred.reducers import Reducer

try:
    from test_diffusers import CASES as DENOISERS
except ModuleNotFoundError:  # the oldest versions are tried without diffusers
    DENOISERS = {}

BATCH, BROKEN, BLANK, AGAIN = 8, 2, 4, 6
"""Of eight images, the one that is NaN, the one that is all one colour, and the one that is the
same as the first."""

KEEP = (0.9, 0.7, 0.5, 0.25)
KINDS = ("tome", "kmedoids", "evit", "divprune", "ats", "svit", "slic", "todo")
"""One method of each kind: every host is tried with these, and with all methods by `-m slow`."""


REFUSED = ("without a mask", "would shift", "grid is None")


@dataclass(frozen=True)
class Way:
    """How a model is run: what is called in its place, and in how many threads at once."""

    made: Callable[[nn.Module], Callable[..., Any]]
    threads: int = 1


def whole(model: nn.Module) -> Callable[..., Any]:
    """The model, compiled. (The backend runs its graphs as they are: numbers are the same.)"""
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def by_block(model: nn.Module) -> nn.Module:
    """The model, whose blocks are compiled one by one."""
    torch._dynamo.reset()
    for block in blocks_of(model):
        block.compile(backend="eager")
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    denoiser = find_denoiser(model)
    if denoiser is not None:
        return [model.get_submodule(place.path) for place in denoiser.places(model)]
    host, tower = find_host(model)
    return list(host.blocks(tower))


EAGER = {"eager": Way(lambda model: model), "eager, four threads": Way(lambda model: model, 4)}
COMPILED = {
    "compiled": Way(whole),
    "compiled, four threads": Way(whole, 4),
    "compiled by block": Way(by_block),
    "compiled by block, four threads": Way(by_block, 4),
}
WAYS = EAGER | COMPILED


@dataclass(frozen=True)
class Host:
    """A small model, and how it is run.

    Attributes:
        build: makes it, in evaluation mode.
        inputs: makes inputs for a batch.
        answer: takes what is compared out of the outputs.
        methods: those that it is tried with.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    answer: Callable[[Any], Tensor]
    methods: tuple[str, ...] = tuple(tokred.methods())


def denoised(outputs: Any) -> Tensor:
    found: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs.sample
    return found


HOSTS = {
    **{
        family: Host(SMALL[name].build, SMALL[name].inputs, SMALL[name].answer)
        for family, name in FIRST.items()
    },
    **{
        f"windows-{name}": Host(one.build, _swin.images, one.answer, ("slic",))
        for name, one in _swin.SWIN.items()
    },
    **{
        f"denoiser-{name}": Host(one.build, one.inputs, denoised, ("tome", "atc", "todo", "mutual"))
        for name, one in DENOISERS.items()
    },
}


def changed(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Inputs, of which all tensors that are of a batch are changed."""
    if isinstance(inputs, dict):
        return {name: changed(one, change) for name, one in inputs.items()}
    of_a_batch = isinstance(inputs, Tensor) and inputs.shape[:1] == (BATCH,)
    return change(inputs) if of_a_batch else inputs


def unlike(x: Tensor) -> Tensor:
    """The images of a batch, unlike each other."""
    x = x.double() if x.is_floating_point() else x.clone()
    if x.is_floating_point():
        x[BROKEN] = math.nan
        x[BLANK] = 0.5
    x[AGAIN] = x[0]
    return x


def made(host: Host) -> tuple[nn.Module, Any]:
    """The model and a batch, in float64."""
    torch.manual_seed(0)
    return host.build().double(), changed(host.inputs(BATCH), unlike)


def compared(host: Host, model: nn.Module, inputs: Any, way: Way) -> tuple[Tensor, Tensor]:
    """What a batch gives, and what its images give alone."""
    called = way.made(model)

    @torch.no_grad()
    def run(some: Any) -> Tensor:
        return host.answer(call(called, some))

    every = [inputs, *(changed(inputs, lambda x, n=n: x[n : n + 1]) for n in range(BATCH))]
    together, *alone = map(run, every)
    if way.threads > 1:  # again, now that all is compiled: torch 2.6 cannot compile in threads
        with ThreadPoolExecutor(way.threads) as pool:
            together, *alone = pool.map(run, every)
    return together, torch.cat(alone)


def off(together: Tensor, alone: Tensor) -> list[str]:
    """The images that differ, by more than 1e-9 of the largest number there is."""
    scale = max(1.0, float(alone.nan_to_num(0, 0, 0).abs().max()))
    found = []
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        by = float((one - other).abs().max()) / scale
        if number != BROKEN and not by <= 1e-9:
            found.append(f"image {number} is off by {by:.1e}")
    return found


def told_apart(
    host: Host, methods: Iterable[str | Reducer], keep: Iterable[float], way: Way
) -> int:
    """Tries methods on a host, and says how many there were."""
    model, inputs = made(host)
    dense, alone = compared(host, model, inputs, way)
    assert not off(dense, alone), "the dense model itself does not tell the images apart"
    lost = ~dense[BROKEN].isfinite()
    assert lost.any()
    wrong, tried = [], 0
    for method, rate in itertools.product(methods, keep):
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                keeping(method, rate)(model)
            together, alone = compared(host, model, inputs, way)
        except tokred.UnsupportedModelError:
            continue
        except ValueError as error:  # what is refused of one image is refused of eight
            if not any(said in str(error) for said in REFUSED):
                raise
            continue
        finally:
            tokred.remove(model)
        found = off(together, alone)
        for which, answer in (("in the batch", together[BROKEN]), ("alone", alone[BROKEN])):
            if (answer.isfinite() & lost).any():
                found.append(f"the NaN of an image has vanished {which}")
        wrong += [f"{method} at {rate}: {what}" for what in found]
        tried += 1
    assert not wrong, "\n".join(wrong)
    return tried


def test_all_methods_tell_images_apart() -> None:
    assert told_apart(HOSTS["timm_vit"], tokred.methods(), KEEP, WAYS["eager"]) >= 50


@pytest.mark.parametrize(
    "name",
    [name for name in HOSTS if name in FIRST or name in ("windows-timm", "denoiser-sd15")],
)
def test_images_are_told_apart_on_every_host(name: str) -> None:
    methods = [method for method in HOSTS[name].methods if method in KINDS]
    assert told_apart(HOSTS[name], methods, (0.5,), WAYS["eager"])


@pytest.mark.parametrize("way", ["compiled", "compiled by block, four threads"])
def test_images_are_told_apart_in_compiled_code(way: str) -> None:
    assert told_apart(HOSTS["timm_vit"], ("tome", "ats", "topk"), (0.5,), WAYS[way]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("way", EAGER)
@pytest.mark.parametrize("name", HOSTS)
def test_images_are_told_apart_by_every_method_on_every_host(name: str, way: str) -> None:
    assert told_apart(HOSTS[name], HOSTS[name].methods, KEEP, WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("name", HOSTS)
def test_images_are_told_apart_in_compiled_code_of_every_host(name: str, way: str) -> None:
    """By all methods on one host, by one of each kind on the others: compiling takes long."""
    methods = [m for m in HOSTS[name].methods if name == "timm_vit" or m in KINDS]
    assert told_apart(HOSTS[name], methods, (0.5,), WAYS[way])


POOLING = ("timm_vit-siglip-attention-pooling", "openclip_vit-averaging")
# The first compares each image with every text of the batch; the softmax of the second is float32.
OTHERWISE = ("transformers_clip-clip-dual", "transformers_clip-git")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in POOLING else pytest.mark.slow)
     for n in SMALL if n not in (*FIRST.values(), *OTHERWISE)],
)  # fmt: skip
def test_images_are_told_apart_by_every_kind_of_head(name: str) -> None:
    one = SMALL[name]
    host = Host(one.build, one.inputs, one.answer)
    methods = [kind for kind in KINDS if kind in host.methods and name not in POOLING]
    told_apart(host, methods or ["ats"], (0.25,), WAYS["eager"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm_vit", "timm_deepseek"])
@pytest.mark.parametrize("reducer", [
    tokred.ToMe(threshold=0.3), tokred.ToMe(threshold=0.9), tokred.ATC("complete"),
    tokred.ATC("single"), tokred.ATC(backend="torch"), tokred.ATC(backend="scipy"),
    tokred.EViT(published=True), tokred.KMedoids(published=True),
    tokred.DPCKNN(k=3, weighted=False), tokred.SViT(fixed=True), tokred.SViT(reactivate=False),
    tokred.SViT(reactivate=False, preserve=False), tokred.SLIC(iterations=0), tokred.SLIC(tau=3.0),
], ids=str)  # fmt: skip
def test_images_are_told_apart_whatever_the_options(name: str, reducer: Reducer) -> None:
    assert told_apart(HOSTS[name], [reducer], KEEP, WAYS["eager"])


@pytest.mark.parametrize("parts", [GLOBAL, LOCAL])
def test_a_tcformer_tells_images_apart(parts: tuple[int, ...]) -> None:
    model = tcformer(parts=parts).double()
    inputs = unlike(torch.randn(BATCH, 3, 64, 64))
    host = Host(lambda: model, lambda batch: inputs[:batch], lambda logits: logits)
    together, alone = compared(host, model, inputs, WAYS["eager"])
    assert not off(together, alone)
    assert not together[BROKEN].isfinite().any()
