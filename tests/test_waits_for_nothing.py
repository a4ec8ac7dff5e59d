"""On CUDA, a forward pass waits for nothing: nobody looks at what the device has computed, and
nothing is copied to it.

No GPU is needed. Tensors without values, on a device that need not exist, are sent through the
models: looking at a value is an error then, and so is an operation on two devices.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families._swin import FEW, SWIN
from families._swin import images as feature_maps
from test_hosts import FIRST, SMALL
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import tokred
from tokred.data.inputs import call
from tokred.kernels import agglomerative_torch
from tokred.reducers import atc
from tokred.schedule import Hourglass

try:
    from test_diffusers import CASES as DENOISERS
except ModuleNotFoundError:  # the oldest versions are tried without diffusers
    DENOISERS = {}

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent


class Watch(TorchDispatchMode):
    """Notes who brings tensors of two devices together, and looks into our own operators, which
    are opaque to tensors without values."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "tokred":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        # A single number may come from the host: it goes along when a kernel is launched.
        found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 0]
        found += [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if len({x.device.type for x in found}) > 1:
            where = next(frame for frame in reversed(traceback.extract_stack()) if _acts(frame))
            if any(str(ROOT / room) in where.filename for room in ("tokred", "patches")):
                self.copies.append(f"{func} in {where.filename}:{where.lineno}")
        return result


def _acts(frame: traceback.FrameSummary) -> bool:
    """Whether a line of somebody's code is neither torch's nor this file's. (Hosts may copy what
    they like, and do so without us, too.)"""
    return frame.filename != __file__ and TORCH not in Path(frame.filename).parents


class NoKernel:
    """Stands in for a kernel of Triton: it is launched, and nothing happens."""

    def __getitem__(self, tiles: Any) -> Callable[..., None]:
        assert all(isinstance(size, int) for size in tiles)
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not atc._installed("triton"):
        monkeypatch.setattr(atc, "choose", lambda device, backend="auto": "torch")
        return
    from tokred.kernels import agglomerative_triton

    for name in vars(agglomerative_triton).copy():
        if name.endswith("_kernel"):
            monkeypatch.setattr(agglomerative_triton, name, NoKernel())
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())


def on_cuda(module: nn.Module) -> nn.Module:
    """The same module on CUDA, without values. In `FakeTensorMode`."""
    for part in module.modules():
        for name, x in part._parameters.items():
            if x is not None:
                part._parameters[name] = nn.Parameter(there(x), requires_grad=False)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = there(x)
    return module


def there(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def copies_in(model: nn.Module, inputs: Any, *gates: nn.ModuleDict | None) -> list[str]:
    """What is copied to or from the device in a forward pass.

    Raises:
        DataDependentOutputException: somebody looks at a value.
    """
    watch = Watch()
    with FakeTensorMode(), torch.no_grad():
        for module in (model, *gates):
            if module is not None:
                on_cuda(module)
        inputs = tree_map(there, inputs)
        with watch:
            answer = call(model, inputs)
    found = [x for x in tree_leaves(answer) if isinstance(x, Tensor)]
    assert found and all(x.device.type == "cuda" for x in found)
    return watch.copies


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return SMALL[FIRST["timm_vit"]].build()


# How many tokens these keep depends on the images, and `mutual` needs as many rounds as they do.
LOOKING = {"ats", "mutual", "svit"}
# Drawn on the CPU, so that it is the same on every device.
COPYING = {"random"}


@pytest.mark.parametrize("method", tokred.methods())
def test_a_method_waits_for_nothing(method: str, vit: nn.Module) -> None:
    model, images = copy.deepcopy(vit), torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random gates, and no gain on so small a model
        reduction = tokred.apply(model, method, keep_rate=0.5)
    if method in LOOKING:
        with pytest.raises(DataDependentOutputException):
            copies_in(model, images, reduction.gates)
        return
    assert bool(copies_in(model, images, reduction.gates)) == (method in COPYING)


@pytest.mark.parametrize("family", sorted(FIRST))
def test_a_family_waits_for_nothing(family: str) -> None:
    small = SMALL[FIRST[family]]
    model, inputs = small.build(), small.inputs(2)
    tokred.apply(model, "tome", keep_rate=0.5)
    if family == "timm_adapter":  # it changes tokens between blocks, where images are compared
        with pytest.raises(DataDependentOutputException):
            copies_in(model, inputs)
        return
    assert not copies_in(model, inputs)


@pytest.mark.parametrize("name", sorted(SWIN))
def test_windows_wait_for_nothing(name: str) -> None:
    model, maps = SWIN[name].build(), feature_maps()
    tokred.apply(model, "slic", Hourglass(grid=FEW, down=1))
    with torch.no_grad():
        call(model, maps)  # tables that depend on shapes alone are made once
    assert not copies_in(model, maps)


@pytest.mark.skipif(not DENOISERS, reason="needs diffusers")
@pytest.mark.parametrize("method", ["tome", "atc", "todo"])
@pytest.mark.parametrize("name", sorted(DENOISERS))
def test_a_denoiser_waits_for_nothing(name: str, method: str) -> None:
    case = DENOISERS[name]
    model, inputs = case.build(), case.inputs(2)
    tokred.apply(model, method, keep_rate=0.5)
    assert not copies_in(model, inputs)


@pytest.mark.parametrize("linkage", atc.LINKAGES)
def test_clustering_in_torch_looks_once_in_some_rounds(linkage: str) -> None:
    with FakeTensorMode():
        distance = torch.rand(2, 40, 40, device="cuda")
        if linkage == "single":
            agglomerative_torch.cluster(distance, 20, linkage)
            return
        with pytest.raises(DataDependentOutputException):
            agglomerative_torch.cluster(distance, 20, linkage)
        # In three rounds nobody looks.
        agglomerative_torch.cluster(distance, 37, linkage)
