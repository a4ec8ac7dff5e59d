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
from torch import Tensor, nn

import tokred
from tokred.data.inputs import call

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


@dataclass(frozen=True)
class Way:
    """How a model is run: what is called in its place, and in how many threads at once."""

    made: Callable[[nn.Module], Callable[..., Any]]
    threads: int = 1


WAYS = {"eager": Way(lambda model: model), "eager, four threads": Way(lambda model: model, 4)}


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
    if way.threads == 1:
        together, *alone = map(run, every)
    else:
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


def told_apart(host: Host, methods: Iterable[str], keep: Iterable[float], way: Way) -> int:
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
        except ValueError as error:
            if "pools without a mask" not in str(error):  # where images keep different numbers
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


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HOSTS)
def test_images_are_told_apart_by_every_method_on_every_host(name: str, way: str) -> None:
    assert told_apart(HOSTS[name], HOSTS[name].methods, KEEP, WAYS[way])
