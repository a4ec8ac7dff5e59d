"""`tokred.advise`: the search finds what brute force does, the advice holds what it promises."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import images_for, small
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.cli.main import main
from tokred.data import samples, zoo
from tokred.measure.advise import advising, search
from tokred.measure.advise.costs import Costs, parabola
from tokred.measure.advise.schedules import cheapest, neighbours, scaled, unrolled
from tokred.measure.evaluation import Row
from tokred.measure.race import Pace
from tokred.measure.slicing import Slices
from tokred.measure.work import Work

pytest.importorskip("torchmetrics")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4, unique=True),
    st.integers(1, 4),
    st.booleans(),
    st.floats(0, 5),
    st.integers(0, 2**16),
)
def test_the_search_finds_what_trying_everything_finds(
    few: list[int], layers: int, between: bool, price: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    levels = [31, *sorted(few, reverse=True)]
    harms = np.maximum.accumulate(random.random((layers, len(levels))), axis=1)
    harms[:, 0] = 0
    costs = Costs((0.1, 0.02, 0.001), tuple(random.random(3) / 10), 9.0, between)

    def total(counts: tuple[int, ...]) -> float:
        before, harm, time = 31, 0.0, 0.0
        for layer, after in enumerate(counts):
            rise = harms[layer, levels.index(after)] - harms[layer, levels.index(before)]
            harm += max(0.0, rise)
            block = [0.1 + 0.02 * n + 0.001 * n * n for n in (before, after)]
            time += sum(block) / 2 if between else block[1]
            if after < before:
                a, b, c = costs.added
                time += a + b * before + c * before**2
            before = after
        return harm + price * time

    everything = [
        counts
        for counts in itertools.product(levels, repeat=layers)
        if all(b <= a and b >= a - a // 2 for a, b in itertools.pairwise((31, *counts)))
    ]
    found = cheapest(levels, harms, costs, price)
    assert found in everything
    assert total(found) == pytest.approx(min(map(total, everything)))


def test_time_is_that_of_blocks_and_of_what_is_added() -> None:
    costs = Costs((1.0, 0.1, 0.0), (0.5, 0.0, 0.0), 100.0, between=False)
    # Of three blocks of 2 s each, one stays, two take 1.5 s, and one reduction 0.5 s.
    assert costs.time((10, 10, 5, 5)) == pytest.approx(100 - 3 * 2 + 2 + 1.5 + 1.5 + 0.5)
    halfway = Costs((1.0, 0.1, 0.0), (0.5, 0.0, 0.0), 100.0, between=True)
    assert halfway.time((10, 10, 5, 5)) == pytest.approx(100 - 6 + 2 + 1.75 + 1.5 + 0.5)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.integers(0, 7), st.integers(5, 95), min_size=1, max_size=4),
    st.floats(1.02, 1.8),
)
def test_schedules_are_scaled_to_a_speed_and_moved_a_little(
    drawn: dict[int, int], speed: float
) -> None:
    falling = sorted(set(drawn.values()), reverse=True)
    stations = tuple(zip(sorted(drawn)[: len(falling)], falling, strict=False))
    costs = Costs((0.0, 0.01, 0.0), (0.05, 0.0, 0.0), 8.0, between=False)
    fitted = scaled(stations, costs, 100, 8, speed)
    if fitted is not None:
        counts = (100, *unrolled(fitted, 100, 8))
        assert 8.0 / costs.time(counts) >= speed
        assert all(a >= b for a, b in itertools.pairwise(counts))
        assert {layer for layer, _ in fitted} <= {layer for layer, _ in stations}
    for moved in neighbours(stations, 100, 8):
        assert len(moved) == len(stations) and moved != stations
        assert sum(a != b for a, b in zip(moved, stations, strict=True)) == 1
        counts = (100, *unrolled(moved, 100, 8))
        assert all(a >= b for a, b in itertools.pairwise(counts))


def test_a_parabola_is_found_again_and_nothing_below_zero() -> None:
    tokens = np.array([10, 50, 100, 196])
    exact = [(n, 1e-3 + 2e-5 * n + 3e-8 * n * n) for n in tokens]
    assert parabola(exact) == pytest.approx((1e-3, 2e-5, 3e-8), rel=1e-6)
    falling = [(n, 1 - n / 400) for n in tokens]
    assert min(parabola(falling)) >= 0


def test_arguments_are_checked() -> None:
    model, images = small("vit"), torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match="one of speedup and max_drop"):
        tokred.advise(model, images)
    with pytest.raises(ValueError, match="one of speedup and max_drop"):
        tokred.advise(model, images, speedup=2, max_drop=1)
    with pytest.raises(ValueError, match="speedup must be above 1"):
        tokred.advise(model, images, speedup=1)
    with pytest.raises(ValueError, match="max_drop must be at least 0"):
        tokred.advise(model, images, max_drop=-1)
    with pytest.raises(tokred.UnsupportedModelError, match="takes none of the methods: svit: its"):
        tokred.advise(model, images, speedup=2, methods=["svit"], progress=False)


def quick(*args: Any, **options: Any) -> tokred.Advice:
    usual = {"images": 8, "seconds": 0.01, "batch": 4, "progress": False}
    return tokred.advise(*args, **{**usual, **options})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what a token costs in every layer, and what a layer costs without any: so that no test
    depends on how busy the machine is."""

    def set_clock(each: float, layer: float = 1.0) -> None:
        def pace(work: Work, arms: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, Pace]:
            counts = {
                name: side.counts if isinstance(side, Slices) else work.counts(side)
                for name, side in arms.items()
            }
            return {name: Pace(sum(layer + each * n for n in counts[name])) for name in arms}

        monkeypatch.setattr(Work, "pace", pace)

    return set_clock


def test_a_model_that_nothing_helps_gets_told_so(clock: Callable[[float], None]) -> None:
    # As where the time goes into starting operators.
    clock(1e-4)
    model = small("vit")
    for budget in ({"speedup": 1.2}, {"max_drop": 50.0}):
        advice = quick(model, images_for(model, 4), batch=1, methods=["tome", "atc"], **budget)
        assert advice.choice is None and advice.code == ""
        told = str(advice)
        assert "Nothing helps" in told and "cut off at no cost" in told
        assert "batch 1 on cpu" in told and "starting operators rather than into tokens" in told
        assert json.dumps(advice.as_dict())


def test_nothing_is_advised_that_loses_more_than_is_allowed(clock: Callable[[float], None]) -> None:
    clock(1.0)
    model, images = small("vit"), torch.randn(8, 3, 64, 64)
    with torch.no_grad():  # every change of the features changes the answer
        model.head.weight.mul_(1e4)
    advice = quick(model, images, methods=["random"], max_drop=0.0)
    told = str(advice)
    if advice.choice is None:
        assert "loses at most 0 points of agreement" in told and "lost at" in told
    else:
        assert advice.evaluation.drop(advice.choice) == 0
    advice = quick(model, images, methods=["random"], max_drop=100.0)
    assert advice.choice is not None and advice.choice.speed_up > 1.2
    assert "At most 100 points of agreement lost: random" in str(advice)


@pytest.mark.parametrize("broken", [False, True])
def test_a_model_that_nothing_disturbs_or_everything(
    clock: Callable[[float], None], broken: bool
) -> None:
    clock(1.0)
    model, images = small("vit"), torch.randn(8, 3, 64, 64)
    with torch.no_grad():  # all images have the same answer, or none that is a number
        model.head.weight.mul_(float("nan") if broken else 0)
    advice = quick(model, images, methods=["tome", "topk"], speedup=1.3)
    assert advice.choice is not None and advice.choice.speed_up >= 1.3
    assert advice.choice.agreement == (0 if broken else 100)


def test_windows_are_advised_on_as_well(clock: Callable[[float], None]) -> None:
    clock(1.0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=112, embed_dim=24, depths=(1, 1, 3, 1),
        num_heads=(1, 1, 2, 2), num_classes=10,
    ).eval()  # fmt: skip
    images = torch.randn(4, 3, 112, 112)
    advice = quick(model, images, methods=["slic", "tome"], speedup=1.2)
    assert "tome" in advice.evaluation.refused
    assert advice.setting is None or advice.setting.method == "slic"
    assert advice.evaluation.rows[1:] or "Nothing helps" in str(advice)


def test_an_impossible_budget_is_told_with_what_is_possible() -> None:
    held_out = zoo.held_out()
    data = zoo.HeldOut(held_out.images[:8], held_out.labels[:8], held_out.digits, held_out.classes)
    advice = quick(zoo.load(), data, speedup=60)
    assert advice.choice is None
    assert "Nothing helps: no setting reaches a 60x speed-up." in str(advice)
    assert "at keep rate 0.1" in str(advice) and "A 60x speed-up is out of reach" in str(advice)


def test_the_advice_can_be_pasted(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(1.0)
    known = Costs((1.0, 1.0, 0.0), (0.0, 0.0, 0.0), 4 * 101.0, between=False)
    costs = property(lambda search: {m.method: known for m in search.methods})
    monkeypatch.setattr(search.Search, "costs", costs)
    model = timm.create_model("vit_tiny_patch16_224", img_size=160, depth=4).eval()
    images = images_for(model, 8)
    dense = model(images[:1])
    advice = quick(model, images, speedup=1.2, methods=["tome", "topk"])
    torch.testing.assert_close(model(images[:1]), dense, rtol=0, atol=0)
    assert advice.choice is not None and advice.setting is not None
    assert 1.2 <= advice.choice.speed_up < 1.6  # measured, not predicted
    assert advice.code in str(advice) and "Measured on 8 images" in str(advice)
    reduction = eval(advice.code, {"tokred": tokred, "model": model})
    assert reduction.counts(100, (10, 10)) == advice.choice.counts
    rows = advice.evaluation.settings
    assert any(row.code == advice.code for row in rows)
    good = [row for row in rows if row.speed_up >= 1.2]
    assert advice.evaluation.drop(advice.choice) == min(map(advice.evaluation.drop, good))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "digits", "--speedup", "50", "--images", "4", "--seconds", "0.01"]) == 0
    assert "Nothing helps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["advise", "digits"])
    assert "--speedup --max-drop" in capsys.readouterr().err


@pytest.fixture(scope="module")
def uniform() -> tokred.Evaluation:
    """What uniform keep rates of all methods do to the bundled classifier, on all of its images."""
    rates = [0.45 + 0.05 * i for i in range(10)]
    methods = [method for method in advising.METHODS if method != "slic"]
    return tokred.evaluate(
        zoo.load(), zoo.held_out(), methods, rates, seconds=0.5, cache=False, progress=False
    )


def raced(advice: tokred.Advice, rivals: Sequence[Row]) -> tuple[float, dict[str, float]]:
    """The speed-ups of the advice and of its rivals, all in turns with each other."""
    model, data = zoo.load(), samples.of(zoo.held_out(), zoo.load())
    work = Work(model, data, None, None, None, 8, 2.0)
    arms: dict[str, Any] = {"dense": None}
    for name, code in [("", advice.code), *((row.name, row.code) for row in rivals)]:
        arms[name] = eval(code, {"tokred": tokred, "model": model})
        tokred.remove(model)
    paces = work.pace(arms, work.inputs, 1.0 * len(arms))
    gains = {name: paces["dense"].seconds / pace.seconds for name, pace in paces.items()}
    return gains.pop(""), gains


@pytest.mark.slow
def test_no_uniform_keep_rate_is_better_and_as_fast_as_was_asked(
    uniform: tokred.Evaluation,
) -> None:
    advice = tokred.advise(zoo.load(), zoo.held_out(), speedup=1.5, images=397, progress=False)
    assert advice.choice is not None and advice.choice.speed_up >= 1.5
    lost = advice.evaluation.drop(advice.choice)
    better = [row for row in uniform.settings if uniform.drop(row) < lost - 1e-6]
    ours, gains = raced(advice, [row for row in better if row.speed_up > 1.3])
    assert ours >= 1.5 * 0.95  # on a machine on which other things are going on
    assert not [name for name, gain in gains.items() if gain >= min(ours, 1.5)]


@pytest.mark.slow
def test_no_uniform_keep_rate_is_faster_and_loses_as_little_as_was_asked(
    uniform: tokred.Evaluation,
) -> None:
    advice = tokred.advise(zoo.load(), zoo.held_out(), max_drop=0.5, images=397, progress=False)
    assert advice.choice is not None
    assert advice.evaluation.drop(advice.choice) <= 0.5
    good = [row for row in uniform.settings if uniform.drop(row) <= 0.5]
    ours, gains = raced(advice, sorted(good, key=lambda row: -row.speed_up)[:8])
    assert not [name for name, gain in gains.items() if gain > 1.03 * ours]
