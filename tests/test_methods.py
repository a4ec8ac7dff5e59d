"""Each method against an independent reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from references import cut, renumber
from references import divprune as slow_divprune
from references import evit as slow_evit
from references import tome as slow_tome
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist

from tokred.reducers import Tokens, atc, divprune, evit, random, tome

shapes = st.tuples(st.integers(1, 3), st.integers(2, 40), st.integers(1, 8), st.integers(0, 2**31))


def features(batch: int, num: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num, dim, generator=generator, dtype=torch.float64)


@given(shapes, st.integers(0, 5), st.floats(0, 1))
@settings(deadline=None)  # numba compiles at the first call
def test_tome_equals_the_slow_loop(
    shape: tuple[int, int, int, int], before: int, share: float
) -> None:
    batch, num, dim, seed = shape
    assume(dim > 1)  # in one dimension every cosine is 1 or -1, and ties are up to rounding
    metric = features(batch, num, dim, seed)
    merges = round(share * (num // 2))
    ours = tome.match(metric, merges, before)
    assert ours.tolist() == [slow_tome(sample.numpy(), merges, before) for sample in metric]


def test_tome_gives_ties_to_the_lowest_index() -> None:
    same = torch.ones(1, 8, 4)
    assert tome.match(same, 2).tolist() == slow_groups([(0, 1), (2, 1)], 8)
    assert tome.match(same, 2, before=1).tolist() == slow_groups([(1, 0), (3, 0)], 8)


def slow_groups(edges: list[tuple[int, int]], num: int) -> list[list[int]]:
    labels = list(range(num))
    for a, b in edges:
        labels[a] = b
    return [renumber(labels)]


def test_tome_matching_in_parts_is_the_same() -> None:
    a, b = torch.randn(2, 33, 5), torch.randn(2, 17, 5)
    whole, parts = tome.best(a, b), tome.best(a, b, elements=100)
    torch.testing.assert_close(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("merges", [-1, 9])
def test_tome_says_why_it_cannot_remove_more_than_half(merges: int) -> None:
    with pytest.raises(ValueError, match=rf"between 0 and 8 of 16 tokens at a time, not {merges}"):
        tome.match(torch.randn(1, 16, 8), merges)


@settings(max_examples=60, deadline=None)  # numba compiles at the first call
@given(shapes, st.sampled_from(atc.LINKAGES), st.floats(0, 1))
def test_atc_equals_scipy_cut_at_k(
    shape: tuple[int, int, int, int], linkage: str, share: float
) -> None:
    batch, num, dim, seed = shape
    assume(dim > 2)
    x = features(batch, num, dim, seed)
    keep = 1 + round(share * (num - 1))
    ours = atc.cluster(x, keep, linkage).tolist()
    for sample, labels in zip(x.numpy(), ours, strict=True):
        merges = hierarchy.linkage(pdist(sample, "cosine"), linkage)
        assume(np.diff(merges[:, 2]).min(initial=1) > 1e-6)  # no heights that float32 cannot tell
        assert labels == cut(merges, keep)


@pytest.mark.parametrize("linkage", atc.LINKAGES)
@pytest.mark.parametrize("num_clusters", range(1, 13))
def test_atc_gives_exactly_k_clusters_of_duplicates(linkage: str, num_clusters: int) -> None:
    x = torch.randn(1, 3, 6).repeat(2, 4, 1)  # three tokens, four times each
    labels = atc.cluster(x, num_clusters, linkage)
    assert labels.max(1).values.tolist() == [num_clusters - 1] * 2
    if num_clusters <= 3:  # equal tokens are merged before others
        assert all(len(set(row[token::3])) == 1 for row in labels.tolist() for token in range(3))


@pytest.mark.parametrize("linkage", atc.LINKAGES)
def test_atc_merges_the_earliest_of_equal_tokens(linkage: str) -> None:
    labels = atc.cluster(torch.ones(1, 6, 4), 4, linkage)
    assert labels.tolist() == [[0, 0, 0, 1, 2, 3]]


def test_atc_does_not_depend_on_the_length_of_a_feature() -> None:
    x = torch.randn(2, 20, 6)
    scaled = x * torch.rand(2, 20, 1).exp2()
    assert torch.equal(atc.cluster(x, 7), atc.cluster(scaled, 7))


@pytest.mark.parametrize("num_clusters", [0, 6])
def test_atc_names_the_possible_numbers(num_clusters: int) -> None:
    message = rf"num_clusters must be in \[1, 5\] for 5 tokens, not {num_clusters}"
    with pytest.raises(ValueError, match=message):
        atc.cluster(torch.randn(1, 5, 3), num_clusters)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"linkage": "ward"}, "linkage must be one of single, complete, average, not 'ward'"),
        (
            {"backend": "cuda"},
            "backend must be one of auto, numba, scipy, torch, triton, not 'cuda'",
        ),
    ],
)
def test_atc_names_the_possible_options(option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        atc.cluster(torch.randn(1, 5, 3), 2, **option)
    with pytest.raises(ValueError, match=message):
        atc.ATC(**option)


def test_random_differs_by_layer_and_seed_and_uses_every_cluster() -> None:
    first, again = random.partition(50, 20, 0), random.partition(50, 20, 0)
    assert torch.equal(first, again)
    assert not torch.equal(first, random.partition(50, 20, 1))
    assert sorted(set(first.tolist())) == list(range(20))


@given(
    st.tuples(st.integers(1, 3), st.integers(2, 20), st.integers(0, 99)),
    st.floats(0, 1),
    st.booleans(),
)
@settings(deadline=None)
def test_evit_equals_the_slow_loop(
    shape: tuple[int, int, int], share: float, published: bool
) -> None:
    batch, num, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, num, 5, generator=generator)
    attention = torch.rand(batch, 3, num, generator=generator)
    keep = 1 + round(share * (num - 2))
    tokens = Tokens(x=x, size=torch.ones(batch, num), class_attention=attention)
    ours = evit.EViT(published)(tokens, keep)
    down = ours.down(x, tokens.size)
    for b in range(batch):
        labels, out = slow_evit(
            x[b].numpy(), attention[b].double().mean(0).numpy(), keep, published
        )
        assert ours.labels()[b].tolist() == labels
        torch.testing.assert_close(down[b].double(), torch.tensor(out), rtol=1e-5, atol=1e-6)
    # What is copied up merges into the same again, also where shares do not add up to 1.
    again = ours.down(ours.up(down), tokens.size)
    torch.testing.assert_close(again, down, rtol=1e-5, atol=1e-6)


@given(shapes, st.floats(0, 1))
@settings(deadline=None)
def test_divprune_equals_the_slow_loop(shape: tuple[int, int, int, int], share: float) -> None:
    batch, num, dim, seed = shape
    assume(dim > 1)  # in one dimension every cosine is 1 or -1, and ties are up to rounding
    x = features(batch, num, dim, seed)
    keep = 1 + round(share * (num - 1))
    ours = divprune.select(x, keep)
    assert ours.tolist() == [slow_divprune(sample.numpy(), keep) for sample in x]


def test_divprune_takes_one_of_each_kind_before_a_second_of_any() -> None:
    kinds = torch.eye(4).repeat(3, 1)[None]  # four kinds, three times each
    assert divprune.select(kinds, 4).tolist() == [[0, 1, 2, 3]]
    assert divprune.select(kinds, 6).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_divprune_begins_with_the_token_that_nothing_resembles() -> None:
    angle = torch.tensor([0.0, 0.1, 0.2, 2.0, 0.3])
    circle = torch.stack([angle.cos(), angle.sin()], -1)[None]
    assert divprune.select(circle, 1).tolist() == [[3]]
    assert divprune.select(circle, 2).tolist() == [[0, 3]]
    assert divprune.select(circle, 3).tolist() == [[0, 3, 4]]


def test_divprune_does_not_depend_on_the_length_of_a_token_or_on_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(5, 20, 6)
    scaled = x * torch.randint(-3, 4, (5, 20, 1)).float().exp2()
    whole = divprune.select(x, 7)
    assert torch.equal(whole, divprune.select(scaled, 7))
    monkeypatch.setattr(divprune, "_AT_ONCE", 800)
    assert torch.equal(whole, divprune.select(x, 7))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_divprune_takes_every_token_once_whatever_is_in_it(bad: float) -> None:
    x = torch.randn(2, 9, 5)
    x[:, 3] = bad
    x[1, 5, 2] = bad
    for num in (1, 4, 8, 9):
        for row in divprune.select(x, num).tolist():
            assert row == sorted(set(row)) and len(row) == num


@pytest.mark.parametrize("num", [0, 6])
def test_divprune_names_the_possible_numbers(num: int) -> None:
    with pytest.raises(ValueError, match=rf"num must be in \[1, 5\] for 5 tokens, not {num}"):
        divprune.select(torch.randn(1, 5, 3), num)
