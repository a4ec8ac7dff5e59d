"""Where nothing is gained, it is said from how many images on something should be, and measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch

import tokred
from tokred.measure import cost
from tokred.measure.advise.words import one_alone
from tokred.measure.evaluation import Row, Speed
from tokred.measure.payoff import Payoff, checked, enlarged, estimate
from tokred.measure.race import Arm


def seconds(images: int, fixed: float) -> tuple[float, float, float]:
    """Dense, reduced, free limit: starting operators takes 10, an image 4 or 2."""
    return 10 + 4 * images, 10 + 2 * images + fixed, 10 + 2 * images


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fixed, images", [(7.0, 4), (8.0, 4), (8.1, 5), (200.0, 100)])
def test_an_estimate_is_where_savings_meet_costs(batch: int, fixed: float, images: int) -> None:
    found = estimate(batch, 196, *seconds(batch, fixed))
    assert found.images == images
    dense, reduced, _ = seconds(images, fixed)
    assert reduced <= dense
    dense, reduced, _ = seconds(images - 1, fixed)
    assert reduced > dense
    assert found.tokens == pytest.approx(196 * fixed / (2 * batch), abs=1)
    assert f"By estimate it takes {images} images at a time to pay" in str(found)


def test_an_estimate_that_holds_stays() -> None:
    dense, reduced, limit = seconds(1, 7.0)
    asked = []

    def timed(many: int) -> tuple[float, float]:
        asked.append(many)
        return seconds(many, 7.0)[:2]

    found = checked(estimate(1, 196, dense, reduced, limit), 1, dense, reduced, timed)
    assert (found.images, found.measured, asked) == (4, (4, 26 / 25), [4])
    assert "Measured with 4 images at a time: 1.04x." in str(found)


def test_an_estimate_that_was_wrong_is_corrected() -> None:
    # What a method costs grows with the images, too: by one for each.
    dense, reduced, limit = seconds(1, 7.0)
    found = checked(
        *(estimate(1, 196, dense, reduced, limit), 1, dense, reduced),
        lambda many: (seconds(many, 7.0)[0], seconds(many, 7.0)[1] + many - 1),
    )
    assert found.measured == (4, 26 / 28)
    assert found.images == 6  # 10 + 4 n = 16 + 3 n
    assert found.tokens == round(estimate(1, 196, dense, reduced, limit).tokens * 6 / 4)  # type: ignore[operator]


def test_where_more_images_do_not_help_that_is_said() -> None:
    dense, reduced, limit = seconds(1, 7.0)
    found = checked(
        *(estimate(1, 196, dense, reduced, limit), 1, dense, reduced),
        lambda many: (seconds(many, 0.0)[0], 2 * seconds(many, 0.0)[0]),
    )
    assert (found.images, found.measured) == (None, (4, 0.5))
    assert str(found) == (
        "More images at a time should not help it to pay. Measured with 4 images at a time: 0.50x."
    )


def test_a_speed_up_may_need_more_images_or_be_out_of_reach() -> None:
    found = estimate(1, 196, *seconds(8, 7.0), speed_up=1.4)
    assert found.images == 2 and "to be 1.4x as fast" in str(found)
    assert estimate(1, 196, *seconds(8, 7.0), speed_up=2.0) == Payoff(2.0, None, None)


def test_a_batch_is_enlarged_by_the_same_images() -> None:
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(enlarged(images, 5), images[[0, 1, 0, 1, 0]])
    found = enlarged({"pixel_values": images, "flag": True, "grid": torch.ones(3)}, 3)
    assert torch.equal(found["pixel_values"], images[[0, 1, 0]])  # type: ignore[call-overload]
    assert found["grid"].shape == (3,)  # type: ignore[call-overload]


@pytest.mark.parametrize("fixed, told", [(9.0, "5 images at a time"), (0.5, "")])
def test_bench_says_how_many_images_it_takes(
    monkeypatch: pytest.MonkeyPatch, fixed: float, told: str
) -> None:
    def measure(sides: Any, images: torch.Tensor, *_: Any, **__: Any) -> dict[str, Arm]:
        dense, reduced, limit = seconds(len(images), fixed)
        taken = {"dense": dense, "reduced": reduced, "limit": limit, "seamed": limit + 1}
        return {name: Arm((taken[name], taken[name]), None) for name in sides}

    monkeypatch.setattr(cost, "measure", measure)
    model = timm.create_model("test_vit").eval()
    found = tokred.bench(model, torch.randn(1, 3, 160, 160), "tome", 0.5, rounds=2)
    assert found.bookkeeping == pytest.approx(1 / 12)
    if not told:
        assert found.payoff is None and found.warnings() == []
        return
    slower, pays = found.warnings()
    assert "SLOWER than the dense model: deciding which tokens go costs more (9000.00 ms" in slower
    assert "with 1000.00 ms of our bookkeeping) than the fewer tokens save (2000.00 ms)" in slower
    assert told in pays and "Measured with 5 images at a time: 1.03x." in pays
    assert found.as_dict()["payoff"]["images"] == 5


def test_where_only_patched_blocks_are_a_limit_bench_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tokred.measure.limit._why_not", lambda *_: "reasons of our own")
    model = timm.create_model("test_vit").eval()
    found = tokred.bench(model, torch.randn(1, 3, 160, 160), "tome", 0.5, rounds=1, warmup=0)
    assert (found.seamed, found.bookkeeping) == (None, None)
    assert "which holds our bookkeeping, too: reasons of our own" in str(found).split("\n")[0]
    assert found.as_dict()["why_seamed"] == "reasons of our own"


def test_advice_says_what_one_image_alone_gains() -> None:
    def speed(latency: float) -> Speed:
        return Speed(
            images_per_second=1.0, latency=latency, mult_adds=1.0, peak_memory=None, error=0.0
        )

    dense, reduced, limit = seconds(1, 7.0)
    known = {
        "dense": speed(dense), "speed": speed(reduced), "limit": speed(limit), "tokens": 196,
    }  # fmt: skip
    rest = {field.name: None for field in dataclasses.fields(Row) if field.name not in known}
    row = Row(**{**rest, **known})  # type: ignore[arg-type]
    told = "One image alone gains nothing. By estimate it takes 4 images at a time to pay"
    assert one_alone(row).startswith(told)
    assert one_alone(dataclasses.replace(row, speed=speed(limit))) == ""
