"""The script that measures on a CUDA device, without one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("timm")

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "measure_gpu.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("measure_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_gpu"] = module
    spec.loader.exec_module(module)
    return module


def ran(path: Path, *parts: str) -> dict[str, Any]:
    """What the script finds on the CPU, where it has to find something in every part."""
    asked = [sys.executable, str(SCRIPT), str(path), "--small"]
    asked += ["--parts", *parts] if parts else []
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.read_text() == done.stdout
    first = json.loads(done.stdout.splitlines()[0].rstrip(",") + "}")
    assert first["machine"].keys() >= {"device", "driver", "torch", "triton"}
    results: dict[str, Any] = json.loads(done.stdout)
    for name, found in results.items():
        if name != "machine":
            assert "error" not in found, f"{name}: {found['error']}"
            assert found["seconds"] > 0 and found["results"], name
            assert f"{name} ..." in done.stderr
    return results


def test_some_parts(tmp_path: Path) -> None:
    results = ran(tmp_path / "gpu.json", "attention", "fastest", "compiled")
    assert list(results) == ["machine", "attention", "fastest", "compiled"]
    (found,) = results["attention"]["results"].values()
    assert found["seconds"].keys() == found["errors"].keys() == {"mask", "without"}
    assert max(found["errors"].values()) < 1e-6
    (cells,) = (one["groups"][0]["cells"] for one in results["compiled"]["results"].values())
    assert {cell["method"] for cell in cells} == {"tome", "atc", "topk"}


@pytest.mark.slow
def test_all_parts(tmp_path: Path, script: Any) -> None:
    pytest.importorskip("diffusers")
    results = ran(tmp_path / "gpu.json")
    assert list(results) == ["machine", *script.PARTS]
    if results["machine"]["triton"]:
        assert results["kernels"]["results"]["problems"] > 50
        assert results["kernels"]["results"]["differ"] == []


def test_kernels_are_checked_on_hard_inputs(script: Any) -> None:
    assert script.counts(17) == [1, 8, 16, 17] and script.counts(1) == [1]
    for tokens in (1, 2, 7):
        for kind, distance in script.hard(tokens).items():
            assert distance.shape[1:] == (tokens, tokens), kind
            assert distance.isfinite().all() and (distance >= 0).all(), kind


def failing(sizes: Any) -> Any:
    yield "first", 1
    raise ValueError("this is why\nand more")


def hanging(sizes: Any) -> Any:
    yield "first", 1
    time.sleep(60)


def dying(sizes: Any) -> Any:
    yield "first", 1
    sys.exit(3)


@pytest.mark.parametrize(
    "work, why",
    [
        (failing, "ValueError: this is why\nand more"),
        (hanging, "it took more than its 2 seconds"),
        (dying, "its process ended with 3"),
    ],
)
def test_a_part_that_fails_says_why_and_keeps_what_it_found(
    work: Any, why: str, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.PARTS, "eager", (work, 2))
    found = script.part("eager", script.SMALL, 2.0)
    assert found["results"] == {"first": 1}
    assert found["error"] == why
    assert found["seconds"] < 10


def test_without_a_device_it_asks_for_the_small_run() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--small" in done.stderr
