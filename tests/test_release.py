"""Releases side by side, their history, and what a pass takes in memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import METHODS_FOR_ALL
from torch import Tensor, nn

import tokred
from tokred import reducers
from tokred.cli import releases
from tokred.cli.main import main
from tokred.measure.suites import memory, release
from tokred.measure.suites.worker import RESET, Runner, Worker

HERE = Path(tokred.__file__).parents[1]
TINY = release.Cell("vit_tiny_patch16_224", 1, "float32", "tome", 0.5, image_size=64)
FAKE = """
__version__ = "{version}"
print("libraries may print")
def apply(model, method, keep_rate):
    assert (method, keep_rate) == ("tome", 0.5)
    model.register_forward_hook(lambda module, inputs, out: out + {more})
"""


def fake(folder: Path, version: str, more: int) -> Path:
    """A folder with another tokred, under which every answer is greater by a number."""
    (folder / "tokred").mkdir(parents=True)
    (folder / "tokred" / "__init__.py").write_text(FAKE.format(version=version, more=more))
    return folder


@pytest.fixture
def former(tmp_path: Path) -> Path:
    return fake(tmp_path / "former", "0.1.0", 1)


def test_a_release_is_timed_against_another_one(former: Path, tmp_path: Path) -> None:
    laps: list[tuple[int, int]] = []
    row = release.run(
        former,
        [TINY],
        measured=fake(tmp_path / "later", "0.2.0", 3),
        rounds=2,
        on_round=lambda done, of: laps.append((done, of)),
    )
    assert (row["version"], row["against"]) == ("0.2.0", "0.1.0")
    (cell,) = row["cells"]
    assert cell["difference"] == pytest.approx(2, abs=1e-5)
    assert cell["efficiency"] == pytest.approx(cell["speed_up"] / cell["free_limit"])
    assert all(math.isfinite(cell[name]) for name in ("ratio", "error"))
    assert cell["rounds"] == 2 and laps == [(1, 2), (2, 2)]


@pytest.mark.slow
def test_a_release_answers_as_its_copy_does() -> None:
    row = release.run(HERE, [TINY], rounds=2)
    assert row["version"] == row["against"] and row["cells"][0]["difference"] == 0


def test_a_process_tells_what_went_wrong(former: Path) -> None:
    with Worker(former) as worker:
        with pytest.raises(RuntimeError, match=r"AttributeError.*no_request"):
            worker.ask("no_request")
        assert worker.ask("version") == "0.1.0"  # it goes on
    (former / "tokred" / "__init__.py").write_text("import os; os._exit(1)")
    with Worker(former) as worker, pytest.raises(RuntimeError, match="has ended: no last words"):
        worker.ask("version")


def test_another_release_is_a_folder_or_what_pip_installs(
    former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with release.release_in(str(former)) as folder:
        assert folder == former
    for wrong in (str(former / "tokred"), "latest", "no/such/folder"):
        with (
            pytest.raises(ValueError, match=r"against must be a version .* or a folder"),
            release.release_in(wrong),
        ):
            pass

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "install"]
        if command[-1] != "tokred==0.8.0":
            return subprocess.CompletedProcess(command, 1, "", "first line\nno such version\n")
        (Path(command[command.index("--target") + 1]) / "tokred").mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(release.subprocess, "run", pip)
    with release.release_in("0.8.0") as folder:
        assert (folder / "tokred").is_dir()
    assert not folder.exists()
    with (
        pytest.raises(ValueError, match=r"cannot install tokred 0\.0\.1: no such version; give"),
        release.release_in("0.0.1"),
    ):
        pass


def row_of(version: str, speed_up: float = 1.5) -> dict[str, Any]:
    cell = {"cell": str(TINY), "speed_up": speed_up, "efficiency": 0.9, "ratio": 1.0}
    return {
        "version": version, "against": "0.1.0", "date": "2026-01-31", "machine": "1 core",
        "cells": [{**cell, "error": 0.01, "difference": 0.0}],
    }  # fmt: skip


def test_a_history_has_one_row_for_every_version(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for version, speed_up in (("0.10.0", 1.1), ("0.9.0", 1.2), ("0.9.0", 1.3)):
        rows = release.with_row(rows, row_of(version, speed_up))
    assert [row["version"] for row in rows] == ["0.9.0", "0.10.0"]
    assert rows[0]["cells"][0]["speed_up"] == 1.3
    file = tmp_path / "history.json"
    assert release.history(file) == []
    file.write_text(release.as_text(rows))
    assert release.history(file) == rows
    file.write_text(json.dumps({"format": 0, "rows": rows}))
    with pytest.raises(ValueError, match="has format 0; this version reads 1"):
        release.history(file)


def test_the_history_is_written_where_asked_and_only_then(
    former: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "run", lambda *_, **__: row_of("9.9.9"))
    monkeypatch.chdir(former)
    arguments = ["bench", "--suite", "release"]
    assert main(arguments) == 1 and "needs --against" in capsys.readouterr().err
    arguments += ["--against", str(former)]
    assert main([*arguments, "--record"]) == 1 and "no folder docs" in capsys.readouterr().err
    releases.FOLDER.mkdir(parents=True)
    file = releases.FOLDER / "history.json"
    file.write_text(release.as_text([row_of("9.9.10"), row_of("0.2.0")]))
    assert main(arguments) == 0
    assert "| 9.9.9 | 1.50 (0.90) x1.00 |" in capsys.readouterr().out
    assert len(release.history(file)) == 2
    assert main([*arguments, "--record"]) == 0
    assert [row["version"] for row in release.history(file)] == ["0.2.0", "9.9.9", "9.9.10"]
    assert main([*arguments, "--out", "other"]) == 0
    assert [row["version"] for row in release.history(Path("other/history.json"))] == ["9.9.9"]


def test_the_cells_stay_the_same_from_release_to_release() -> None:
    fixed = [
        "deit_tiny b1 fp32 tome 0.5",
        "deit_tiny b1 fp32 atc 0.5",
        "deit_small b1 fp32 tome 0.5",
        "deit_small b1 fp32 tome 0.9",
        "deit_small b8 fp32 tome 0.5",
        "deit_small b8 fp32 atc 0.5",
        "deit_small b8 fp32 topk 0.5",
        "deit_small b8 bf16 tome 0.5",
    ]
    assert [str(cell) for cell in release.CELLS] == fixed
    rows = release.history(Path(__file__).parent.parent / "docs" / "benchmarks" / "history.json")
    for row in rows:
        assert [cell["cell"] for cell in row["cells"]] == fixed


BLOCK = 2**26
"""Bytes: so large that malloc hands every such block back at once."""


class Holds(nn.Module):
    """Holds two blocks at once, and then another one alone."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.new_ones(BLOCK // 4), x.new_ones(BLOCK // 4)
        total = first.sum() + second.sum()
        del first, second
        return total + x.new_ones(BLOCK // 4).sum()


def runner() -> Runner:
    made = Runner.__new__(Runner)
    made.torch, made.model, made.images = torch, Holds(), torch.zeros(1)
    return made


def test_the_allocator_tells_its_peak() -> None:
    assert runner().allocated() == pytest.approx(2 * BLOCK, abs=2**10)


@pytest.mark.skipif(not RESET.exists(), reason="only Linux tells")
def test_the_process_tells_its_peak() -> None:
    # In a process of its own, as the suite does: what other tests hold and let go counts, too.
    program = "from test_release import runner; print(runner().resident(passes=2))"
    told = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(told.stdout) == pytest.approx(2 * BLOCK, abs=2**23)


@pytest.fixture(scope="module")
def large() -> tuple[Runner, int]:
    """1,369 tokens, for which matrices of tokens by tokens weigh, and what they take unreduced."""
    made = runner()
    made.dense = made.model = timm.create_model(
        "vit_small_patch16_224", img_size=518, patch_size=14, depth=4
    ).eval()
    made.images = torch.randn(1, 3, 518, 518)
    return made, made.allocated()


@pytest.mark.filterwarnings("ignore:the gates of")  # they are random
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in METHODS_FOR_ALL else pytest.mark.slow)
        for name in reducers.names()
    ],
)
def test_no_method_takes_more_memory_than_the_dense_model(
    large: tuple[Runner, int], method: str
) -> None:
    made, dense = large
    made.tokred = tokred
    made.apply(method, 0.5)
    # As the suite has it. (Sizes of tokens are held through the MLP; kmedoids takes 1.3 % more.)
    assert made.allocated() <= dense + 2**19


@pytest.mark.slow  # three processes
def test_the_suite_of_memory_tells_what_methods_add(capsys: pytest.CaptureFixture[str]) -> None:
    small = (("vit_tiny_patch16_224", {"img_size": 64, "depth": 4}),)
    results = memory.run(["topk", "no_method"], small, [2])
    dense, topk = results["cells"]
    assert (dense["method"], topk["method"]) == ("dense", "topk")
    assert 0 < topk["allocator"] <= 1.01 * dense["allocator"]
    (note,) = results["notes"]
    assert note.startswith("no_method was not measured") and "unknown method" in note
    text = memory.markdown(results)
    assert "## vit_tiny_patch16_224, img_size 64, depth 4, batch 2" in text
    assert f"| dense | {dense['process'] / 2**20:.1f} (+0.0) |" in text or sys.platform != "linux"
