"""What can be exported, method by method, is what the table in docs/composition.md says."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import images_for, small
from torch import Tensor, nn

import tokred
from tokred.maps import ranked

try:
    from test_diffusers import sd_inputs, unet
except ModuleNotFoundError:  # the oldest versions are tried without diffusers
    pytest.skip("diffusers is not installed", allow_module_level=True)
from tokred.reducers import make, tome2d

COMPOSITION = Path(__file__).parent.parent / "docs" / "composition.md"
COLUMNS = ("one graph", "export", "dynamic batch", "ONNX")
TINY: dict[str, Any] = {
    "block_out_channels": (16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VARIANTS = {"ToMe(threshold=0.9)": tokred.ToMe(0.9), "SViT(fixed=True)": tokred.SViT(fixed=True)}
SLOW = pytest.mark.slow
TRANSFORMER, DENOISER = "vision transformers", "denoisers"


def table() -> dict[tuple[str, str], dict[str, bool]]:
    """The rows of the table: by model and method, what works."""
    text = COMPOSITION.read_text()
    found: dict[tuple[str, str], dict[str, bool]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 6 and cells[0] in (TRANSFORMER, DENOISER):
            assert set(cells[2:]) <= {"yes", "no"}, line
            works = dict(zip(COLUMNS, (cell == "yes" for cell in cells[2:]), strict=True))
            found[cells[0], cells[1].strip("`")] = works
    return found


ROWS = table()


def rows(column: str, works: bool, *fast: tuple[str, str]) -> list[Any]:
    """The rows in which a column says so; all are slow but those named."""
    return [
        pytest.param(*row, id=f"{row[0]}-{row[1]}", marks=() if row in fast else SLOW)
        for row, said in ROWS.items()
        if said[column] == works
    ]


def patched(where: str, method: str) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A model with the method in it, which gives a tensor; two images, and three."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gates are random
        if where == DENOISER:
            model = unet(**TINY)
            tokred.apply(model, method, 0.5)
            two, three = (tuple(sd_inputs(n).values()) for n in (2, 3))
            return Sample(model), two, three
        model = small("vit")
        tokred.apply(model, VARIANTS.get(method, method), keep_rate=0.5)
        return model, (images_for(model, 2),), (images_for(model, 3),)


class Sample(nn.Module):
    """A denoiser that gives a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        return self.model(sample, timestep, states).sample


def batch_of(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The dynamic shapes in which the batch is a symbol. (diffusers' UNets are of up to 63.)"""
    batch = torch.export.Dim("batch", min=2, max=63)
    return tuple({0: batch} if value.ndim > 0 else None for value in inputs)


def written(model: nn.Module, inputs: tuple[Tensor, ...], file: Path, **options: Any) -> Any:
    """The model in onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.no_grad():
        torch.onnx.export(model, inputs, str(file), dynamo=True, verbose=False, **options)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        names = [given.name for given in session.get_inputs()]
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run


def test_the_table_has_a_row_for_every_method() -> None:
    assert {method for where, method in ROWS if where == TRANSFORMER} == {
        *tokred.methods(),
        *VARIANTS,
    }
    model = unet(**TINY)
    expected = set()
    for method in (*tokred.methods(), "todo"):
        try:
            tokred.apply(model, method, 0.5)
        except (tokred.UnsupportedModelError, ValueError):
            continue
        expected.add(method)
    assert {method for where, method in ROWS if where == DENOISER} == expected


@pytest.mark.parametrize(("where", "method"), rows("one graph", True))
def test_compiles_into_one_graph(where: str, method: str) -> None:
    torch._dynamo.reset()
    model, inputs, _ = patched(where, method)
    with torch.no_grad():
        expected = model(*inputs)
        found = torch.compile(model, backend="eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("where", "method"), rows("one graph", False, (TRANSFORMER, "ats")))
def test_leaves_the_graph(where: str, method: str) -> None:
    torch._dynamo.reset()
    model, inputs, _ = patched(where, method)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(*inputs)


@pytest.mark.parametrize(("where", "method"), rows("dynamic batch", True, (TRANSFORMER, "pitome")))
def test_exports(where: str, method: str) -> None:
    assert ROWS[where, method]["export"]
    model, two, three = patched(where, method)
    with torch.no_grad():
        program = torch.export.export(model, two, dynamic_shapes=batch_of(two))
        for inputs in (two, three):
            torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.parametrize(("where", "method"), rows("export", False, (TRANSFORMER, "ats")))
def test_what_decides_by_the_images_is_refused_by_name(where: str, method: str) -> None:
    assert not ROWS[where, method]["dynamic batch"] and not ROWS[where, method]["ONNX"]
    model, inputs, _ = patched(where, method)
    name = str(VARIANTS.get(method) or make(method)).split("(")[0]
    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"^{name}\(.*table under Export"):
        torch.export.export(model, inputs)


@pytest.mark.parametrize(("where", "method"), rows("ONNX", True, (TRANSFORMER, "dpc_knn")))
def test_onnxruntime_computes_the_same(where: str, method: str, tmp_path: Path) -> None:
    model, two, three = patched(where, method)
    file = tmp_path / "model.onnx"
    run = written(model, two, file, dynamic_shapes=batch_of(two))
    with torch.no_grad():
        for inputs in (two, three):
            expected = model(*inputs)
            torch.testing.assert_close(run(*inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("where", "method"), rows("ONNX", False, (TRANSFORMER, "mutual"), (TRANSFORMER, "ats"))
)
def test_onnx_is_refused_by_name(where: str, method: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, inputs, _ = patched(where, method)
    name = re.escape(str(VARIANTS.get(method) or make(method)).split("(")[0])
    with torch.no_grad(), pytest.raises(Exception, match=f"(?i){name}.*table under Export"):
        torch.onnx.export(model, inputs, str(tmp_path / "model.onnx"), dynamo=True, verbose=False)


def test_a_decision_by_the_time_step_is_refused() -> None:
    model = unet(**TINY)
    tokred.apply(model, "tome", tokred.Around(0.5, during=(0.0, 0.5)))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^during=.*leave `during` out"):
        torch.export.export(Sample(model), tuple(sd_inputs(2).values()))


def test_gates_in_training_are_refused() -> None:
    model = small("vit").train()
    tokred.apply(model, tokred.SViT(fixed=True), keep_rate=0.5)
    with pytest.raises(RuntimeError, match=r"SViT.* keeps its decisions for the loss in training"):
        torch.export.export(model, (torch.randn(2, 3, 64, 64),))


class Chosen(nn.Module):
    """What is decided by comparing, as a model."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x)


@pytest.mark.parametrize(
    "choose",
    [
        lambda x: ranked(x[..., 0]),
        pytest.param(lambda x: tome2d.match(x, (4, 4), 8), id="tome2d"),
        pytest.param(lambda x: tokred.reducers.divprune.select(x, 8), id="divprune", marks=SLOW),
        pytest.param(lambda x: tokred.reducers.dpc_knn.cluster(x, 6), id="dpc_knn", marks=SLOW),
    ],
)
def test_equals_are_decided_alike_in_onnx(
    choose: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    """By whole numbers, most of them several times: ONNX has no stable sort."""
    x = torch.randint(0, 3, (2, 16, 3)).float()
    found = written(Chosen(choose), (x,), tmp_path / "chosen.onnx")(x)
    assert torch.equal(found, choose(x))
