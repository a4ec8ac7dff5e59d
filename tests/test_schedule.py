"""Schedules give the papers' numbers, and refuse what they cannot mean."""

from __future__ import annotations

import doctest
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokred import schedule
from tokred.schedule import Constant, Exactly, Linear, Stages, plan


def test_the_examples_in_the_documentation_hold() -> None:
    result = doctest.testmod(schedule)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    ("rate", "left"),
    [(0.5, (98, 49, 24)), (0.25, (49, 12, 3)), (0.7, (137, 96, 67)), (0.9, (176, 158, 142))],
)
def test_stages_keep_exact_powers_of_the_first_count(rate: float, left: tuple[int, ...]) -> None:
    a, b, c = left
    assert Stages(rate)(196, 12) == [196] * 3 + [a] * 3 + [b] * 3 + [c] * 3


def test_a_decimal_rate_is_meant_exactly() -> None:
    assert Stages(0.7)(100, 4) == [100, 70, 49, 34]  # 100 * 0.7**2 is 48.99... in floats


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 6, 12, 24, 32, 40])
def test_stages_exist_at_any_depth(layers: int) -> None:
    counts = Stages(0.5)(196, layers)
    assert len(counts) == layers
    assert counts[-1] == 24
    assert counts == sorted(counts, reverse=True)


def test_stages_can_be_placed() -> None:
    assert Stages(0.5, layers=(0, 2))(16, 4) == [8, 8, 4, 4]


def test_linear_removes_what_equation_5_says() -> None:
    counts = [196, *Linear(16)(196, 12)]
    removed = [a - b for a, b in pairwise(counts)]
    assert removed == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]


def test_linear_without_inflection_is_constant_and_can_rise() -> None:
    assert Linear(5, inflection=0)(196, 12) == Constant(5)(196, 12)
    assert Linear(4, inflection=1)(100, 5) == [100, 98, 94, 88, 80]


@given(st.integers(1, 600), st.integers(1, 40), st.integers(0, 200))
def test_some_token_always_stays(tokens: int, layers: int, merges: int) -> None:
    for chosen in (Constant(merges), Linear(merges), Stages(0.25)):
        assert min(plan(chosen, tokens, layers)) >= 1


def test_exactly_is_taken_at_its_word() -> None:
    assert plan(Exactly([9, 4, 4, 9]), 9, 4) == (9, 4, 4, 9)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ((9, 4), "2 numbers, but the model has 4 layers"),
        ((9, 4, 0, 0), "asks for 0 tokens after layer 2; possible are 1 to 9"),
        ((10, 4, 4, 4), "asks for 10 tokens after layer 0"),
        ((9, 4, 5, 5), r"can only rise back to an earlier number, one of \[9, 4\]"),
    ],
)
def test_impossible_counts_are_refused(counts: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan(Exactly(counts), 9, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Stages(0), ValueError, r"keep_rate must be in \(0, 1\]"),
        (lambda: Stages(float("nan")), ValueError, "not nan"),
        (lambda: Stages("0.5"), TypeError, "a number"),  # type: ignore[arg-type]
        (lambda: Stages(0.5, layers=()), ValueError, "layers must be rising"),
        (lambda: Stages(0.5, layers=(3, 1)), ValueError, "layers must be rising"),
        (lambda: Stages(0.5, layers=(12,))(196, 12), ValueError, r"layers must be in \[0, 11\]"),
        (lambda: Constant(-1), ValueError, "at least 0"),
        (lambda: Constant(1.5), TypeError, "whole number"),  # type: ignore[arg-type]
        (lambda: Linear(4, inflection=2), ValueError, r"inflection must be in \[-1, 1\]"),
    ],
)
def test_bad_options_are_named(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]
