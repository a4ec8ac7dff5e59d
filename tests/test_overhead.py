"""The suite `overhead` tells bookkeeping from a method's own operations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import tokred
from tokred.cli.main import main
from tokred.engine.reduction import Reduction
from tokred.host import Host, find_host, innermost
from tokred.measure.limit import Limits
from tokred.measure.race import Arm
from tokred.measure.slicing import hang_slices, take_off
from tokred.measure.suites import overhead
from tokred.reducers import make
from tokred.reducers.protocol import traits

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
    return model


@pytest.mark.parametrize("method", ["tome", "atc", "topk", "evit", "random"])
def test_a_method_without_the_engine_gives_the_same_answer(vit: nn.Module, method: str) -> None:
    host, tower = find_host(vit)
    assert isinstance(host, Host)
    schedule, reducer = tokred.Exactly((16, 8, 8, 3)), make(method)
    layout = host.layout(tower, None)
    reduction = Reduction(reducer, schedule, layout, traits(reducer).proportional)
    hung = overhead.bare(vit, host, IMAGES, reduction)
    with torch.no_grad():
        dense = vit(IMAGES)
        tokred.apply(vit, method, schedule, full_grid=False)
        expected = vit(IMAGES)
        tokred.remove(vit)
        hang_slices(hung)
        for _ in range(2):  # nothing is left of the first pass
            torch.testing.assert_close(vit(IMAGES), expected, rtol=1e-5, atol=1e-5)
        # No engine: the first block, in which all tokens stay, is the host's own.
        assert innermost(vit.blocks[0]) is None
        take_off(vit)
        assert torch.equal(vit(IMAGES), dense)


def test_every_difference_is_that_of_two_sides(vit: nn.Module) -> None:
    host, tower = find_host(vit)
    layout = host.layout(tower, None)
    reduction = Reduction(make("tome"), tokred.Exactly((16, 8, 8, 4)), layout)
    milliseconds = {
        overhead.DENSE: 10.0,
        overhead.ALL: 10.4,
        overhead.FREE: 6.0,
        overhead.SEAMED: 6.5,
        "tome": 8.0,
        "bare tome": 7.0,
    }
    # A machine that gets slower slows all sides of a round.
    measured = {
        side: Arm(tuple((ms + slower) / 1e3 for slower in (0, 1, 2, 30)), None)
        for side, ms in milliseconds.items()
    }
    limits = Limits(None, None)  # type: ignore[arg-type]
    group = overhead._told_apart("vit", IMAGES, layout, limits, {"tome": reduction}, measured)
    assert group.block.microseconds == pytest.approx(100)  # in each of four blocks
    assert group.limit.microseconds == pytest.approx(500)
    (cost,) = group.methods
    assert (cost.reductions, cost.counts) == (2, (16, 8, 8, 4))
    assert cost.above.microseconds == pytest.approx(2000)
    assert cost.operations.microseconds == pytest.approx(1000)
    assert cost.bookkeeping.microseconds == pytest.approx(1000)
    assert cost.reduction.microseconds == pytest.approx((1000 - 4 * 100) / 2)
    assert cost.reduction.error == pytest.approx(0, abs=1e-6)


def test_the_suite_writes_both_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["bench", "--suite", "overhead", "--models", "test_vit", "--methods", "tome",
                 "--rounds", "3", "--out", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    results = json.loads((tmp_path / "overhead-cpu-float32.json").read_text())
    (group,) = results["groups"]
    assert (group["batch"], group["rounds"], group["why_seamed"]) == (1, 3, "")
    assert set(group["milliseconds"]) == {
        "dense", "keeps all", "seamed limit", "free limit", "tome", "bare tome"
    }  # fmt: skip
    assert results["format"] == overhead.FORMAT
    text = capsys.readouterr().out
    assert text.rstrip() == (tmp_path / "overhead-cpu-float32.md").read_text().rstrip()
    assert "a reduction, over its operations, µs" in text and "| test_vit | tome |" in text


@pytest.mark.parametrize("method", ["ats", "svit"])
def test_methods_that_cannot_run_bare_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=f"without the engine, not '{method}'"):
        overhead.run(("test_vit",), (method,))
