"""Maps against loops, on shapes that hypothesis chooses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import merge, renumber

from tokred.maps import Clusters, Kept, in_order_of_first_member, side_by_side


@st.composite
def partitions(draw: st.DrawFn) -> list[list[int]]:
    """Labels of a few samples, with as many groups in each, numbered in any order."""
    tokens = draw(st.integers(1, 12))
    groups = draw(st.integers(1, tokens))
    samples = []
    for _ in range(draw(st.integers(1, 3))):
        rest = draw(st.lists(st.integers(0, groups - 1), min_size=tokens - groups,
                             max_size=tokens - groups))  # fmt: skip
        samples.append(draw(st.permutations([*range(groups), *rest])))
    return samples


@given(partitions())
def test_groups_are_numbered_by_their_first_members(samples: list[list[int]]) -> None:
    ours = in_order_of_first_member(torch.tensor(samples))
    assert ours.tolist() == [renumber(labels) for labels in samples]


@given(partitions(), st.integers(0, 2**31))
def test_merging_is_the_size_weighted_mean(samples: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([renumber(sample) for sample in samples])
    x = torch.randn(*labels.shape, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, labels.shape, generator=generator).float()
    clusters = Clusters(labels, int(labels.max()) + 1)
    down, total = clusters.down(x, size), clusters.total(size)
    for b, sample in enumerate(labels.tolist()):
        tokens, sizes = merge(x[b].numpy(), size[b].numpy(), sample)
        torch.testing.assert_close(down[b], torch.tensor(tokens))
        torch.testing.assert_close(total[b], torch.tensor(sizes, dtype=torch.float32))
    up = clusters.up(down)
    for b, sample in enumerate(labels.tolist()):
        assert torch.equal(up[b], down[b][sample])


def test_a_token_alone_stays_as_it_was_to_the_bit() -> None:
    x, size = torch.randn(1, 3, 8), torch.tensor([[3.0, 1.0, 7.0]])
    labels = torch.tensor([[0, 1, 0]])
    assert torch.equal(Clusters(labels, 2).down(x, size)[:, 1], x[:, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_small_members_are_not_lost_in_half_precision(dtype: torch.dtype) -> None:
    x = torch.rand(1, 4096, 3).to(dtype)
    everything = Clusters(torch.zeros(1, 4096, dtype=torch.int64), 1)
    mean = everything.down(x, torch.ones(1, 4096))[0, 0]
    assert torch.equal(mean, x[0].double().mean(0).to(dtype))


@given(st.data())
def test_pruning_renews_what_is_kept_and_leaves_the_rest(data: st.DataObject) -> None:
    fine = data.draw(st.integers(1, 10))
    keep = data.draw(st.integers(1, fine))
    rows = [sorted(data.draw(st.permutations(range(fine)))[:keep]) for _ in range(2)]
    kept = Kept(torch.tensor(rows), fine)
    x, size = torch.randn(2, fine, 4), torch.ones(2, fine)
    up = kept.up(kept.down(x, size) + 1, x)
    labels = kept.labels()
    for b, row in enumerate(rows):
        for token in range(fine):
            renewed = token in row
            torch.testing.assert_close(up[b, token], x[b, token] + renewed)
            assert labels[b, token] == (row.index(token) if renewed else -1)


def test_two_merges_in_a_row_are_one_map() -> None:
    first = Clusters(torch.tensor([[0, 1, 0, 2, 1, 2]]), 3)
    second = Clusters(torch.tensor([[0, 1, 0]]), 2)
    both = first.then(second)
    y = torch.randn(1, 2, 3)
    assert torch.equal(both.up(y), first.up(second.up(y)))
    x, size = torch.randn(1, 6, 3), torch.ones(1, 6)
    torch.testing.assert_close(
        both.down(x, size), second.down(first.down(x, size), first.total(size))
    )


def test_gradients_of_merging_are_those_of_the_mean() -> None:
    labels = torch.tensor([[0, 1, 0, 1, 1]])
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    size = torch.tensor([[1.0, 2.0, 3.0, 1.0, 1.0]])
    assert torch.autograd.gradcheck(lambda x: Clusters(labels, 2).down(x, size), x)
    assert np.isfinite(x.detach().numpy()).all()


@given(partitions(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_both_ways_to_add_up_agree(samples: list[list[int]], seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([renumber(sample) for sample in samples])
    x = torch.randn(*labels.shape, 5, generator=generator).to(dtype)
    size = torch.randint(1, 9, labels.shape, generator=generator).float()
    # More coarse tokens than have members, as in ragged maps.
    clusters = Clusters(labels, labels.shape[1] + 2, share=size / 3)
    in_bags, in_place = clusters.down(x, size), clusters.down(x.requires_grad_(), size)
    assert in_place.requires_grad and in_bags.dtype == dtype
    torch.testing.assert_close(in_bags, in_place.detach())


def test_maps_of_samples_side_by_side_are_what_each_is_alone() -> None:
    """Of a padded batch: padding goes nowhere, and what stays as it is stays."""
    size = torch.tensor([[1.0, 0, 1, 2, 0], [1, 1, 1, 1, 1], [3, 1, 0, 0, 0]])
    x = torch.randn(3, 5, 4)
    clusters = Clusters(torch.tensor([[0, 1, 0]]), 2)
    pairs = Clusters(torch.tensor([[0, 0, 1, 1, 2]]), 3)
    parts = [
        (torch.tensor([0]), torch.tensor([[0, 2, 3]]), clusters),
        (torch.tensor([1]), torch.tensor([[0, 1, 2, 3, 4]]), pairs),
        (torch.tensor([2]), torch.tensor([[0, 1]]), None),
    ]
    both = side_by_side(parts, size)
    down, total = both.down(x, size), both.total(size)
    assert total.tolist() == [[3, 1, 0], [2, 2, 1], [3, 1, 0]]
    alone = clusters.down(x[:1, [0, 2, 3]], size[:1, [0, 2, 3]])
    torch.testing.assert_close(down[0, :2], alone[0])
    torch.testing.assert_close(down[2, :2], x[2, :2])

    two = Kept(torch.tensor([[0, 2], [1, 2]]), 3)
    chosen = [
        (torch.tensor([0, 1]), torch.tensor([[0, 2, 3], [0, 1, 2]]), two),
        (torch.tensor([2]), torch.tensor([[1]]), None),
    ]
    labels = side_by_side(chosen, size).labels()
    assert labels.tolist() == [[0, -1, -1, 1, -1], [-1, 0, 1, -1, -1], [-1, 0, -1, -1, -1]]
    mixed = [parts[0], (*parts[1][:2], Kept(torch.tensor([[0]]), 5))]
    with pytest.raises(TypeError, match=r"or by Kept alone, not \['Clusters', 'Kept'\]"):
        side_by_side(mixed, size)
