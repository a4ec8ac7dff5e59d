"""What version 0.7.1 wrote is read, and means what it meant (made by tests/recorded_files.py).

A file that other code may refuse, such as a cache, is used with the same figures or not at all.
"""

from __future__ import annotations

import copy
import json
import lzma
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recorded_files
import torch
from recorded import one_thread, some, surroundings, tolerance
from recorded_files import MODELS, SWEEP, answered, evaluated, fitted, pipeline, to_train, vit
from safetensors.torch import load_file
from torch import Tensor, nn

import tokred
from tokred import fid, training
from tokred.reducers import traits

FOLDER = Path(__file__).parent / "recorded" / "artifacts-0.7.1"
ABOUT: dict[str, Any] = json.loads((FOLDER / "about.json").read_text())
HERE = surroundings()
SAME = all(ABOUT[key] == value for key, value in HERE.items())

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def needs(library: str) -> None:
    """Skips with other versions of a library whose objects were written."""
    was, here = ABOUT["libraries"][library], HERE["libraries"][library]
    if was != here:
        pytest.skip(f"written with {library} {was}, and this is {here}")


def near(found: Tensor, written: Tensor, name: str = "") -> None:
    soft = name in ("nearest", "windows")
    rtol, atol = tolerance("slic" if soft else name, written)
    torch.testing.assert_close(found, written, rtol=rtol, atol=atol)


def loaded(name: str) -> dict[str, Any]:
    needs(MODELS[name][0])
    with lzma.open(FOLDER / "models" / f"{name}.pt.xz") as file:
        kept: dict[str, Any] = torch.load(file, weights_only=False)
    return kept


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    needs("timm")
    with lzma.open(FOLDER / "results.pickle.xz") as file:
        kept: dict[str, Any] = pickle.load(file)
    return kept


def copied(name: str, to: Path) -> Path:
    """Nothing is changed in place."""
    return Path(shutil.copytree(FOLDER / name, to / name))


# Models


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_answers_as_it_did(name: str) -> None:
    kept = loaded(name)
    model, inputs = kept["model"], kept["inputs"]
    assert not torch.equal(kept["reduced"], kept["dense"])
    found = answered(model, inputs)
    near(found, kept["reduced"], name)
    assert torch.equal(answered(copy.deepcopy(model), inputs), found)
    # Methods that merge add up in one kernel since version 0.10, which rounds otherwise.
    merges = traits(tokred.patching.reduction_of(model).reducer).drops is False
    tokred.remove(model)
    dense = answered(model, inputs)
    near(dense, kept["dense"])
    assert not any("forward" in vars(module) for module in model.modules())
    if SAME and not merges and torch.equal(dense, kept["dense"]):
        assert torch.equal(found, kept["reduced"])


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_can_be_saved_and_patched_again(name: str, tmp_path: Path) -> None:
    kept = loaded(name)
    model, inputs = kept["model"], kept["inputs"]
    torch.save(model, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    near(answered(again, inputs), kept["reduced"], name)
    MODELS[name][1][2](model)
    near(answered(model, inputs), kept["reduced"], name)
    other = "slic" if name == "windows" else "atc"
    tokred.apply(model, other, 0.25)
    assert not torch.allclose(answered(model, inputs), kept["reduced"])
    tokred.remove(model)
    near(answered(model, inputs), kept["dense"])


@pytest.mark.parametrize("library", recorded_files.LIBRARIES)
def test_saved_models_of_every_family_answer_as_they_did(library: str) -> None:
    needs(library)
    with lzma.open(FOLDER / "families" / f"{library}.pt.xz") as file:
        whole = torch.load(file, weights_only=False)
    assert whole
    for name, kept in whole.items():
        found = some(answered(kept["model"], kept["inputs"]))
        assert not torch.allclose(kept["reduced"], kept["dense"])
        near(found, kept["reduced"], "windows" if name.startswith("windows") else "")
        tokred.remove(kept["model"])
        near(some(answered(kept["model"], kept["inputs"])), kept["dense"])


def test_attributes_of_compatibility_go_on() -> None:
    kept = loaded("compat-tome")
    model, inputs = kept["model"], kept["inputs"]
    assert model.r == 4
    model.r = 0
    near(answered(model, inputs), kept["dense"])
    model.r = 4
    near(answered(model, inputs), kept["reduced"])
    tokred.remove(model)
    assert not hasattr(model, "r")


def test_gates_are_loaded() -> None:
    kept = loaded("svit")
    model, inputs = kept["model"], kept["inputs"]
    for gates in (FOLDER / "gates.safetensors", str(FOLDER / "gates.safetensors")):
        tokred.apply(model, tokred.SViT(gates=gates), keep_rate=0.5)
        near(answered(model, inputs), kept["reduced"])
    reduction = tokred.apply(model, "svit", keep_rate=0.5)
    reduction.load(FOLDER / "gates.safetensors")
    near(answered(model, inputs), kept["reduced"])


# Results


def labels(trace: Any) -> list[Tensor]:
    stages = trace.blocks if hasattr(trace, "blocks") else trace.stages
    return [stage.map.labels() for stage in stages]


def afters(trace: Any) -> list[int]:
    stages = trace.blocks if hasattr(trace, "blocks") else trace.stages
    return [stage.after for stage in stages]


@pytest.mark.parametrize("name", ["tome", "atc", "topk", "svit", "nearest", "windows", "unet"])
def test_pickled_traces_and_reductions_are_those_of_today(
    name: str, results: dict[str, Any]
) -> None:
    kept = loaded(name)
    trace = tokred.inspect(kept["model"], kept["inputs"])
    was = results["traces"][name]
    assert type(was) is type(trace) and afters(was) == afters(trace)
    assert str(was) == str(trace)
    assert [one.shape for one in labels(was)] == [one.shape for one in labels(trace)]
    if SAME and torch.equal(answered(kept["model"], kept["inputs"]), kept["reduced"]):
        assert all(map(torch.equal, labels(was), labels(trace)))
    reduction = results["reductions"][name]
    assert isinstance(reduction, tokred.Denoising if name == "unet" else tokred.Reduction)
    fresh = MODELS[name][1][2](kept["model"])
    assert str(reduction) == str(fresh)
    if name != "unet":
        side = 6 if name == "windows" else 4
        assert reduction.reducer == fresh.reducer and reduction.schedule == fresh.schedule
        assert reduction.counts(side**2, (side, side)) == results["counts"][name]
        assert results["flops"][name] == tokred.flops(kept["model"], kept["inputs"])
    assert copy.deepcopy(reduction).reducer == reduction.reducer


def test_tables_are_read_from_json_and_pickles() -> None:
    stored = json.loads((FOLDER / "evaluation.json").read_text())
    with (FOLDER / "evaluation.pickle").open("rb") as file:
        table = pickle.load(file)
    assert isinstance(table, tokred.Evaluation) and table == tokred.Evaluation.from_dict(stored)
    assert json.loads(json.dumps(table.as_dict())) == stored
    assert "top1" in str(table)


# Folders


def test_the_cache_of_evaluate_gives_the_same_figures(tmp_path: Path) -> None:
    needs("timm")
    cache = copied("cache", tmp_path)
    files = sorted(cache.rglob("*.json"))
    table = evaluated(cache)
    was = tokred.Evaluation.from_dict(json.loads((FOLDER / "evaluation.json").read_text()))
    assert len(table.rows) == len(was.rows) == len(files)
    for row, then in zip(table.rows, was.rows, strict=True):
        assert (row.method, row.keep_rate, row.counts) == (then.method, then.keep_rate, then.counts)
        for name in ("agreement", "kl", "cosine"):
            assert getattr(row, name) == pytest.approx(getattr(then, name), rel=1e-3, abs=1e-3)
        assert row.metrics == pytest.approx(then.metrics)
    if sorted(cache.rglob("*.json")) == files:  # nothing was measured, speeds neither
        assert table.rows == was.rows


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.png")}


def test_a_sweep_goes_on_or_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    out = copied("sweep", tmp_path)
    before = contents(out)
    assert len(before) == 3 * 3
    try:
        fid.generate(pipeline(), SWEEP, out, model="digits_diffusion", batch=2)
    except ValueError as error:
        # The version is one of the things that images depend on.
        assert "holds images of another sweep: " in str(error)
        assert not SAME or tokred.__version__ != "0.7.1", error
    assert contents(out) == before


def test_a_sweep_is_scored_as_it_was(tmp_path: Path) -> None:
    needs("timm")
    out = copied("sweep", tmp_path)
    found = fid.score(SWEEP, out, FOLDER / "reference", fid.DigitFeatures())
    then = json.loads((out / "fid.json").read_text())["rows"]
    for row, was in zip(found.rows, then, strict=True):
        for name, value in was.items():
            now = getattr(row, name)
            assert now == (pytest.approx(value, rel=1e-3) if type(value) is float else value), name


def starting(method: str) -> nn.Module:
    weights = load_file(FOLDER / "training" / method / "start.safetensors")
    model = to_train(method, weights)
    gates = getattr(tokred.apply(model, method, keep_rate=0.7), "gates", None)
    if gates is not None:  # others, which those of the checkpoint replace
        for parameter in gates.parameters():
            nn.init.normal_(parameter)
    return model


def curve(out: Path) -> list[dict[str, float]]:
    rows = training.read_table(out / "log.csv")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


@pytest.mark.parametrize("method", ["tome", "svit"])
def test_a_training_that_was_broken_off_goes_on(method: str, tmp_path: Path) -> None:
    needs("timm")
    whole, out = (
        FOLDER / "training" / method / "whole",
        copied(f"training/{method}/parts", tmp_path),
    )
    done = fitted(starting(method), method, out)
    assert (done.resumed, done.steps) == (4, 6)
    found, was = curve(out), curve(whole)
    assert len(found) == len(was) == 6
    for row, then in zip(found, was, strict=True):
        assert row == pytest.approx(then, rel=1e-3, abs=1e-5)
    name = "gates.safetensors" if method == "svit" else "model.safetensors"
    weights, then = load_file(out / name), load_file(whole / name)
    assert weights.keys() == then.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, then[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["tome", "svit"])
def test_a_training_that_is_over_has_nothing_left_to_do(method: str, tmp_path: Path) -> None:
    needs("timm")
    out = copied(f"training/{method}/whole", tmp_path)
    log = (out / "log.csv").read_text()
    done = fitted(starting(method), method, out)
    assert done.resumed == done.steps == 6
    assert (out / "log.csv").read_text() == log


def test_the_files_are_of_the_version_they_are_named_after() -> None:
    assert ABOUT["version"] == "0.7.1"
    written = {file.name.removesuffix(".pt.xz") for file in (FOLDER / "models").iterdir()}
    assert written == set(recorded_files.MODELS)
    assert isinstance(vit(), nn.Module)
