"""Tracers that are older than torch.export: at keep rate 1 all work as without tokred; below, what
they give is right, or a sentence says why not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import small
from test_patching import traces
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import tokred

pytestmark = pytest.mark.filterwarnings("ignore")  # torch calls some of these tracers old

HOSTS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    # How it is made, its last block, and a method that is not right unless its head knows of it.
    "timm": (lambda: small("vit"), "blocks.3", "tome"),
    "timm, pooled": (lambda: small("mae, average pooling"), "blocks.3", "topk"),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(64, 16, 4, 2, 32, 64).eval(),
        "encoder.ln",
        "tome",
    ),
    "windows": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1, 2, 1)
        ).eval(),
        "layers.3",
        "slic",
    ),
}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, str, str]]:
    build, last, method = HOSTS[request.param]
    yield build(), last, method


def by_trace(model: nn.Module, x: Tensor) -> Any:
    # With gradients, and compared with a second trace, which torch's own module of attention does
    # not stand.
    steady = not any(isinstance(part, nn.MultiheadAttention) for part in model.modules())
    return torch.jit.trace(model, (x,), check_trace=steady)


def by_script(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.script(model)


def by_fx(model: nn.Module, x: Tensor) -> Any:
    return copy.deepcopy(torch.fx.symbolic_trace(model))


def by_fx_and_script(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.script(torch.fx.symbolic_trace(model))


def by_vmap(model: nn.Module, x: Tensor) -> Any:
    return torch.func.vmap(lambda image: model(image[None])[0])


def left(model: nn.Module) -> list[Any]:
    """What hangs on a model, without what torch's tracers leave there."""
    return [
        (name, kind, [mine for mine in names if not mine.startswith("_tensor_constant")], hooks)
        for name, kind, names, hooks in traces(model)
    ]


TRACERS = {
    "trace": by_trace,
    "script": by_script,
    "fx": by_fx,
    "both": by_fx_and_script,
    "vmap": by_vmap,
}
SENTENCE = r"^torch\.(fx|jit\.script|func\.vmap) cannot .*tokens"


@pytest.mark.parametrize("tracer", TRACERS)
def test_where_nothing_is_reduced_all_work(host: tuple[nn.Module, str, str], tracer: str) -> None:
    model, _, method = host
    x = torch.randn(2, 3, 64, 64)
    expected = TRACERS[tracer](model, x)(x)
    before = left(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokred.apply(model, method, keep_rate=1)
    torch.testing.assert_close(TRACERS[tracer](model, x)(x), expected)
    assert tokred.patching.reduction_of(model) is not None
    tokred.remove(model)
    assert left(model) == before


@pytest.mark.parametrize("tracer", TRACERS)
def test_below_that_they_are_right_or_refused(
    host: tuple[nn.Module, str, str], tracer: str
) -> None:
    model, _, method = host
    tokred.apply(model, method, keep_rate=0.5)
    x, other = torch.randn(2, 2, 3, 64, 64)
    try:
        traced = TRACERS[tracer](model, x)
        found = traced(other)
    except RuntimeError as error:
        assert tracer != "trace"
        with pytest.raises(RuntimeError, match=SENTENCE):
            raise error from None
        return
    torch.testing.assert_close(found, model(other))


@pytest.mark.parametrize("keep_rate", [1, 0.5])
def test_features_of_a_graph_are_those_of_the_model(keep_rate: float) -> None:
    build, last, method = HOSTS["torchvision"]
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokred.apply(model, method, keep_rate=keep_rate)
    x = torch.randn(2, 3, 64, 64)
    seen: list[Tensor] = []
    model.get_submodule(last).register_forward_hook(lambda module, args, y: seen.append(y))
    model(x)
    features = create_feature_extractor(model, [last])(x)[last]
    torch.testing.assert_close(features, seen[0])
    assert features.shape[1] == 17


def test_a_scripted_model_is_part_of_nothing_else() -> None:
    """Not even where the patched model is inside of another one."""
    model = small("vit")
    with pytest.warns(UserWarning, match="nothing is reduced"):
        tokred.apply(model, "tome", keep_rate=1)
    parameters = list(model.parameters())
    scripted = torch.jit.script(model)
    for mine, theirs in zip(parameters, scripted.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    tokred.apply(model, "tome", keep_rate=0.5)
    with pytest.raises(RuntimeError, match=SENTENCE):
        torch.jit.script(nn.Sequential(model, nn.Flatten()))
    with pytest.raises(RuntimeError, match=SENTENCE):
        torch.jit.script(model.blocks)
    assert copy.deepcopy(model).blocks[0].__prepare_scriptable__.module is not model.blocks[0]
