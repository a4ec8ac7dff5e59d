"""DPC-kNN, k-medoids, PiToMe and mutual pairs, each against an independent reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import references_clustering as slow
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from references import merge, renumber

from tokred.maps import Clusters
from tokred.reducers import Tokens, atc, dpc_knn, kmedoids, mutual, pitome, tome

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 24), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**31)
)


def features(
    shape: tuple[int, int, int, int], steps: int = 2**12, clustered: bool = False
) -> torch.Tensor:
    """Normal noise, with or without clusters, in multiples of 1 / steps: then squared distances
    are exact in the library and in the reference, and both see the same ties."""
    batch, num, dim, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, num, dim, generator=generator, dtype=torch.float64)
    if clustered:
        centres = 4 * torch.randn(batch, 3, dim, generator=generator, dtype=torch.float64)
        x = x / 4 + centres[:, torch.randint(3, (num,), generator=generator)]
    return (x * steps).round() / steps


def images(num: int = 60, dim: int = 48, batch: int = 2) -> torch.Tensor:
    """Tokens as networks have them: a large common part, and channels of very unequal size."""
    return 20 * torch.randn(dim) + torch.randn(batch, num, dim) * torch.randn(dim).exp()


CLUSTERINGS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "dpc_knn": dpc_knn.cluster,
    "kmedoids": lambda x, keep: kmedoids.cluster(x, x.float().square().mean(-1), keep)[0],
    "pitome": lambda x, keep: pitome.PiToMe()(Tokens(x, ones(x), key=x[:, None]), keep).index,
    "mutual": lambda x, keep: mutual.match(x, ones(x), keep),
}
every_clustering = pytest.mark.parametrize("name", CLUSTERINGS)


def ones(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[:2])


@every_clustering
@pytest.mark.parametrize("keep", [1, 2, 7, 59])
def test_samples_are_clustered_apart(name: str, keep: int) -> None:
    x = torch.cat([images(), 1e3 * images(), images() / 1e3])
    together = CLUSTERINGS[name](x, keep)
    assert together.tolist() == [CLUSTERINGS[name](one[None], keep)[0].tolist() for one in x]


@every_clustering
@pytest.mark.parametrize("keep", [1, 2, 5, 11, 12])
def test_duplicates_give_exactly_k_clusters(name: str, keep: int) -> None:
    x = torch.randn(2, 3, 16).repeat(1, 4, 1)  # three tokens, four times each
    for labels in CLUSTERINGS[name](x, keep).tolist():
        assert renumber(labels) == labels
        assert max(labels) == keep - 1


@every_clustering
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_clustered_in_float32(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 40, 16).to(dtype)
    ours = CLUSTERINGS[name](x, 15)
    assert torch.equal(ours, CLUSTERINGS[name](x.float(), 15))


@every_clustering
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_still_gives_k_clusters(name: str, bad: float) -> None:
    x = torch.randn(2, 12, 8)
    x[0, 3, 2] = bad
    labels = CLUSTERINGS[name](x, 5)
    assert labels.max(1).values.tolist() == [4, 4]
    assert torch.equal(labels[1:], CLUSTERINGS[name](x[1:], 5))


@pytest.mark.parametrize("name", ["dpc_knn", "kmedoids", "mutual"])
@pytest.mark.parametrize("keep", [0, 13])
def test_the_possible_numbers_are_named(name: str, keep: int) -> None:
    message = rf"num_clusters must be in \[1, 12\] for 12 tokens, not {keep}"
    with pytest.raises(ValueError, match=message):
        CLUSTERINGS[name](torch.randn(1, 12, 4), keep)


@pytest.mark.parametrize("name", ["dpc_knn", "kmedoids"])
def test_clustering_a_large_batch_in_parts_is_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [dpc_knn.samples_at_once(n, elements=900) for n in (10, 30, 31)] == [9, 1, 1]
    x = images(num=20, batch=5)
    whole = CLUSTERINGS[name](x, 6)
    for module in (dpc_knn, kmedoids):
        monkeypatch.setattr(module, "samples_at_once", lambda num: 2)
    assert torch.equal(CLUSTERINGS[name](x, 6), whole)


@pytest.mark.parametrize("rows", [1, 7, 40, 99])
@pytest.mark.parametrize("rounded", [False, True])
def test_many_tokens_cluster_row_by_row_as_they_do_at_once(rows: int, rounded: bool) -> None:
    x = images(num=40, batch=3)
    x = x.round() if rounded else x  # with ties
    for k, keep in ((1, 1), (5, 10), (9, 40)):
        by_rows = dpc_knn._peaks(x, keep, k, rows).labels
        assert torch.equal(by_rows, dpc_knn.cluster(x, keep, k))
        mask = torch.ones(3, 40, dtype=torch.bool)
        assert torch.equal(dpc_knn._peaks(x, keep, k, rows, mask).labels, by_rows)


@pytest.mark.slow
def test_thousands_of_tokens_cluster_row_by_row() -> None:
    x = torch.randn(1, 4100, 2)
    labels = dpc_knn.cluster(x, 30)
    assert torch.equal(labels, dpc_knn._peaks(x, 30, 5, rows=4100).labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_squared_distances_are_those_of_float64_differences(dtype: torch.dtype) -> None:
    x = (images(num=80, dim=96) + 1000).to(dtype)
    x[:, 40] = x[:, 7]
    x[:, 41] = x[:, 7] * (1 + 2**-7)  # close to another: where cancellation would show
    ours = dpc_knn.squared_distances(x)
    exact = (x.double()[:, :, None] - x.double()[:, None]).square().sum(-1)
    # Each coordinate of a difference is rounded by at most 2^-24 of the longest token.
    longest = (x.double() - x[:, :1].double()).norm(dim=-1).max()
    error = (ours.sqrt() - exact.sqrt()).abs().max()
    assert error <= 96**0.5 * longest / 2**24
    assert torch.equal(ours, ours.mT)
    assert torch.equal(ours[:, 40], ours[:, 7])
    order = torch.randperm(80)  # sums in another order
    again = dpc_knn.squared_distances(
        torch.cat([x[:, :1], x[:, order]], 1)[..., torch.randperm(96)]
    )
    assert torch.equal(again[:, 1:, 1:], ours[:, order][:, :, order])


@given(shapes, st.integers(1, 8), st.floats(0, 1), st.sampled_from([2, 2**12]), st.booleans())
def test_dpc_knn_equals_the_slow_loop(
    shape: tuple[int, int, int, int], k: int, share: float, steps: int, clustered: bool
) -> None:
    x = features(shape, steps, clustered)  # steps of a half: full of duplicates and ties
    keep = 1 + round(share * (shape[1] - 1))
    ours = dpc_knn.cluster(x, keep, k)
    assert ours.tolist() == [slow.dpc_knn(sample.numpy(), keep, k) for sample in x]
    assert torch.equal(dpc_knn.cluster(x.float(), keep, k), ours)


@pytest.mark.parametrize("keep", [1, 12, 30, 59])
def test_dpc_knn_equals_the_slow_loop_on_large_tokens(keep: int) -> None:
    x = images()
    ours = dpc_knn.cluster(x, keep)
    assert ours.tolist() == [slow.dpc_knn(sample.double().numpy(), keep) for sample in x]


def test_dpc_knn_tells_densities_apart_that_float64_cannot() -> None:
    """A density is exp(-spread), and 0 beyond a spread of 745. Scaling by 1000 changes which of
    density and separation matters more, but not who the densest token is."""
    x = torch.cat(
        [torch.randn(1, 9, 16) + 8, torch.randn(1, 9, 16) / 2, torch.randn(1, 9, 16) - 8], 1
    )
    spread = torch.cdist(x, x)[0].square().topk(5, largest=False).values.mean(-1)
    densest = [int(n) for n in spread.argsort()[:3]]
    labels = dpc_knn.cluster(1e3 * x, 3)[0].tolist()
    assert len({labels[n] for n in densest}) == 3


def test_dpc_knn_gives_ties_to_the_lowest_index() -> None:
    same = torch.ones(1, 6, 4)
    assert dpc_knn.cluster(same, 4).tolist() == [[0, 1, 2, 3, 0, 0]]


@given(shapes, st.integers(1, 8), st.floats(0, 1), st.sampled_from([2, 2**12]))
def test_dpc_knn_with_a_mask_is_dpc_knn_without_those_tokens(
    shape: tuple[int, int, int, int], k: int, share: float, steps: int
) -> None:
    x = features(shape, steps)
    generator = torch.Generator().manual_seed(shape[3])
    mask = torch.rand(x.shape[:2], generator=generator) < 0.6
    mask[:, -1] = True
    keep = 1 + round(share * (int(mask.sum(1).min()) - 1))
    odd = torch.where(mask[..., None], x, torch.tensor([torch.nan, 1e30, 0.0])[shape[3] % 3])
    found = dpc_knn.peaks(odd, keep, k, mask)
    assert torch.equal(dpc_knn.cluster(odd, keep, k, mask), found.labels)
    for rows in (1, 3):
        by_rows = dpc_knn._peaks(odd, keep, k, rows, mask)
        assert torch.equal(by_rows.labels, found.labels)
    for b, there in enumerate(mask):
        alone = dpc_knn.peaks(x[b : b + 1, there], keep, k)
        assert torch.equal(found.labels[b, there], alone.labels[0])
        assert torch.equal(found.centres[b], there.nonzero()[:, 0][alone.centres[0]])
        assert torch.equal(found.log_score[b, there], alone.log_score[0])
        assert (found.log_score[b, ~there] == -torch.inf).all()
        assert (found.labels[b, ~there] == found.labels[b, there][0]).all()


def test_dpc_knn_tells_its_centres_and_scores() -> None:
    x = features((3, 24, 4, 0), clustered=True)
    found = dpc_knn.peaks(x, 7)
    for b, sample in enumerate(x.numpy()):
        labels, centres, score = slow.density_peaks(sample, 7)
        assert (found.labels[b].tolist(), found.centres[b].tolist()) == (labels, centres)
        np.testing.assert_allclose(found.log_score[b].exp().numpy(), score, rtol=1e-9)
    assert torch.equal(found.labels.gather(1, found.centres), torch.arange(7).expand(3, 7))


def test_dpc_knn_says_what_a_mask_cannot_be() -> None:
    x, mask = torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
    mask[1, :4] = False
    with pytest.raises(ValueError, match="num_clusters must be at most 2, not 3: in one sample"):
        dpc_knn.cluster(x, 3, mask=mask)
    for bad in (mask[:, :5], mask.float()):
        with pytest.raises(ValueError, match=r"mask must be bool, \[2, 6\], not"):
            dpc_knn.cluster(x, 2, mask=bad)
    assert dpc_knn.peaks(x[:0], 2).centres.shape == (0, 2)


METHODS = {"dpc_knn": dpc_knn.DPCKNN, "atc": atc.ATC, "tome": tome.ToMe}


@pytest.mark.parametrize("name", METHODS)
def test_means_are_weighted_or_plain(name: str) -> None:
    x, key = torch.randn(2, 20, 6).double(), torch.randn(2, 2, 20, 3)
    tokens = Tokens(x, torch.randint(1, 5, (2, 20)).float(), key=key)
    make = METHODS[name]
    weighted, plain = make()(tokens, 10), make(weighted=False)(tokens, 10)
    assert torch.equal(weighted.labels(), plain.labels())
    for small, counted in ((weighted, tokens.size), (plain, torch.ones(2, 20))):
        down, total = small.down(tokens.x, tokens.size), small.total(tokens.size)
        for b in range(2):
            x, size, labels = (
                tokens.x[b].numpy(),
                tokens.size[b].numpy(),
                small.labels()[b].tolist(),
            )
            expected = torch.from_numpy(merge(x, counted[b].numpy(), labels)[0])
            torch.testing.assert_close(down[b], expected, rtol=1e-6, atol=1e-6)
            assert total[b].tolist() == merge(x, size, labels)[1].tolist()
        torch.testing.assert_close(small.down(small.up(down), tokens.size), down)


def test_plain_means_of_several_rounds_and_of_padded_images() -> None:
    """With equal sizes, plain and weighted are the same, in rounds, too; and padding counts for
    nothing."""
    x, key = torch.randn(2, 20, 6).double(), torch.randn(2, 2, 20, 3)
    equal = Tokens(x, torch.ones(2, 20), key=key)
    for options in ({}, {"threshold": 0.3}):
        weighted = tome.ToMe(**options)(equal, 3)
        plain = tome.ToMe(weighted=False, **options)(Tokens(x, 2 * equal.size, key=key), 3)
        assert torch.equal(weighted.labels(), plain.labels())
        ours, expected = plain.down(x, equal.size), weighted.down(x, equal.size)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    size = (torch.arange(20) < 15).float().expand(2, -1)
    ragged = tome.ToMe(threshold=-1, weighted=False)(Tokens(x, size, key=key), 3)
    whole = tome.ToMe(threshold=-1, weighted=False)(
        Tokens(x[:, :15], size[:, :15], key=key[:, :, :15]), 3
    )
    torch.testing.assert_close(
        ragged.down(x, size)[:, :3], whole.down(x[:, :15], size[:, :15])[:, :3]
    )


def test_dpc_knn_needs_a_neighbour() -> None:
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1 .*, not {bad}"):
            dpc_knn.DPCKNN(k=bad)
        with pytest.raises(ValueError, match=f"k must be at least 1 .*, not {bad}"):
            dpc_knn.cluster(torch.randn(1, 5, 3), 2, k=bad)


@given(shapes, st.integers(0, 4), st.floats(0, 1), st.booleans(), st.booleans())
def test_kmedoids_equals_the_slow_loop(
    shape: tuple[int, int, int, int],
    iterations: int,
    share: float,
    published: bool,
    clustered: bool,
) -> None:
    x = features(shape, clustered=clustered)
    weight = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(shape[3]))
    keep = 1 + round(share * (shape[1] - 1))
    labels, medoids = kmedoids.cluster(x, weight, keep, iterations, published)
    for b in range(len(x)):
        sample, its_weight = x[b].numpy(), weight[b].double().numpy()
        expected = slow.kmedoids(sample, its_weight, keep, iterations, published)
        assert (labels[b].tolist(), medoids[b].tolist()) == expected


@pytest.mark.parametrize("published", [False, True])
def test_kmedoids_equals_the_slow_loop_on_large_tokens(published: bool) -> None:
    x, weight = images(), torch.rand(2, 60)
    for keep in (1, 12, 30, 59):
        labels, medoids = kmedoids.cluster(x, weight, keep, published=published)
        for b in range(2):
            sample, its_weight = x[b].double().numpy(), weight[b].double().numpy()
            expected = slow.kmedoids(sample, its_weight, keep, published=published)
            assert (labels[b].tolist(), medoids[b].tolist()) == expected


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=16),
    st.floats(0, 1),
    st.integers(0, 3),
    st.booleans(),
)
@example([(5, 1), (7, 3), (2, 3), (5, 2), (6, 0)], 0.5, 2, False)  # medoids that overtake another
def test_kmedoids_equals_the_slow_loop_where_everything_is_tied(
    tokens: list[tuple[int, int]], share: float, iterations: int, published: bool
) -> None:
    """On a line of integers, all sums are exact."""
    x, weight = torch.tensor(tokens, dtype=torch.float64).T
    keep = 1 + round(share * (len(tokens) - 1))
    labels, medoids = kmedoids.cluster(x[None, :, None], weight[None], keep, iterations, published)
    expected = slow.kmedoids(x[:, None].numpy(), weight.numpy(), keep, iterations, published)
    assert (labels[0].tolist(), medoids[0].tolist()) == expected


def test_kmedoids_gives_ties_to_the_lowest_index() -> None:
    labels, medoids = kmedoids.cluster(torch.ones(1, 6, 4), torch.ones(1, 6), 4)
    assert labels.tolist() == [[0, 1, 2, 3, 0, 0]]
    assert medoids.tolist() == [[0, 1, 2, 3]]


def test_kmedoids_moves_towards_tokens_with_much_attention() -> None:
    """On a line, the medoid is the weighted median; the published rule prefers the unimportant."""
    x = torch.tensor([[[0.0], [1.0], [2.0], [3.0], [4.0]]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0, 9.0]])
    assert kmedoids.cluster(x, weight, 1)[1].tolist() == [[4]]
    assert kmedoids.cluster(x, weight, 1, published=True)[1].tolist() == [[2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kmedoids_keeps_the_medoids_themselves(dtype: torch.dtype) -> None:
    x = torch.randn(2, 20, 8).to(dtype)
    tokens = Tokens(
        x, size=torch.randint(1, 4, (2, 20)).float(), attention_received=torch.rand(2, 20)
    )
    small = kmedoids.KMedoids()(tokens, 6)
    assert tokens.attention_received is not None
    labels, medoids = kmedoids.cluster(x, tokens.attention_received, 6)
    assert torch.equal(small.labels(), labels)
    assert torch.equal(labels.gather(1, medoids), torch.arange(6).expand(2, 6))
    down = small.down(x, tokens.size)
    assert torch.equal(down, torch.stack([x[b, medoids[b]] for b in range(2)]))
    assert torch.equal(small.total(tokens.size), Clusters(labels, 6).total(tokens.size))
    assert torch.equal(small.down(small.up(down), tokens.size), down)


def test_kmedoids_says_that_the_first_block_has_nothing_before_it() -> None:
    tokens = Tokens(torch.randn(1, 6, 4), torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"nothing before it: .* Stages\(keep_rate, layers=\(1,"):
        kmedoids.KMedoids()(tokens, 3)


def test_kmedoids_names_the_possible_iterations() -> None:
    with pytest.raises(ValueError, match="iterations must be at least 0, not -1"):
        kmedoids.KMedoids(iterations=-1)


@given(shapes, st.floats(0, 0.9), st.floats(0.1, 2), st.floats(0, 1), st.booleans())
def test_pitome_equals_the_slow_loop(
    shape: tuple[int, int, int, int], margin: float, alpha: float, share: float, clustered: bool
) -> None:
    _, num, dim, _ = shape
    assume(dim > 1)  # in one dimension every cosine is 1 or -1, and ties are up to rounding
    metric = features(shape, clustered=clustered)
    merges = round(share * (num // 2))
    ours = pitome.match(metric, merges, margin, alpha)
    assert ours.tolist() == [
        slow.pitome(sample.numpy(), merges, margin, alpha) for sample in metric
    ]


@pytest.mark.parametrize("directions", [[2, 0, 1, 1, 0, 2, 2, 3], [1, 1, 2, 0, 0, 0, 0, 3]])
@pytest.mark.parametrize("merges", range(5))
def test_pitome_gives_ties_to_the_lowest_index(merges: int, directions: list[int]) -> None:
    metric = torch.eye(4)[directions]  # cosines 0 and 1, without rounding
    ours = pitome.match(metric[None], merges, margin=0.0)
    assert ours.tolist() == [slow.pitome(metric.double().numpy(), merges, 0.0)]


def test_pitome_protects_the_tokens_that_stand_alone() -> None:
    crowd = torch.tensor([1.0, 0, 0, 0]) + 0.1 * torch.randn(12, 4)
    alone = torch.eye(4)[1:]
    labels = pitome.match(torch.cat([alone, crowd])[None], 6, margin=0.5)[0].tolist()
    assert labels[:3] == [0, 1, 2]
    assert all(label > 2 for label in labels[3:])


def test_pitome_lowers_its_margin_layer_by_layer() -> None:
    key = torch.randn(2, 3, 16, 4)
    for layer in range(4):
        tokens = Tokens(torch.randn(2, 16, 12), torch.ones(2, 16), key=key, layer=layer, layers=4)
        expected = pitome.match(key.mean(1), 5, margin=0.9 - 0.225 * layer)
        assert torch.equal(pitome.PiToMe()(tokens, 11).index, expected)
        fixed = pitome.match(key.mean(1), 5, margin=-0.5)
        assert torch.equal(pitome.PiToMe(margin=-0.5)(tokens, 11).index, fixed)


def test_pitome_removes_more_than_half_in_rounds() -> None:
    key, size = torch.randn(20, 2, 10, 4).double(), torch.randint(1, 9, (20, 10)).float()
    ours = pitome.PiToMe()(Tokens(torch.randn(20, 10, 8), size, key=key), 2).index.tolist()
    for b in range(20):
        metric, sizes, labels = key[b].mean(0).numpy(), size[b].numpy(), list(range(10))
        for merges in (5, 2, 1):  # 10 -> 5 -> 3 -> 2
            once = slow.pitome(metric, merges, 0.9)
            metric, sizes = merge(metric, sizes, once)
            labels = [once[label] for label in labels]
        assert ours[b] == labels


def test_pitome_energies_in_parts_are_the_same() -> None:
    unit = torch.nn.functional.normalize(torch.randn(2, 33, 5), dim=-1)
    torch.testing.assert_close(
        pitome.energy(unit, 0.3), pitome.energy(unit, 0.3, elements=500), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("merges", [-1, 9])
def test_pitome_says_why_it_cannot_remove_more_than_half(merges: int) -> None:
    with pytest.raises(ValueError, match=rf"between 0 and 8 of 16 tokens at a time, not {merges}"):
        pitome.match(torch.randn(1, 16, 8), merges, 0.5)


@given(shapes, st.floats(0, 1), st.booleans())
def test_mutual_equals_the_slow_loop(
    shape: tuple[int, int, int, int], share: float, clustered: bool
) -> None:
    batch, num, dim, seed = shape
    assume(dim > 1)
    metric = features(shape, clustered=clustered)
    size = torch.randint(1, 5, (batch, num), generator=torch.Generator().manual_seed(seed)).float()
    keep = 1 + round(share * (num - 1))
    ours = mutual.match(metric, size, keep).tolist()
    for b in range(batch):
        assert ours[b] == slow.mutual(metric[b].numpy(), size[b].double().numpy(), keep)


def test_mutual_merges_the_earliest_of_equal_tokens() -> None:
    assert mutual.match(torch.ones(1, 6, 4), torch.ones(1, 6), 4).tolist() == [[0, 0, 0, 1, 2, 3]]


def test_mutual_gives_ties_to_the_pair_that_begins_first() -> None:
    metric = torch.eye(2)[[0, 1, 1, 0]][None]
    assert mutual.match(metric, torch.ones(1, 4), 3).tolist() == [[0, 1, 2, 0]]


def test_mutual_merges_pairs_and_no_chains_in_one_round() -> None:
    """Tokens on a circle, at 0, 10, 25, 70 and 84 degrees: the second is nearest to the third,
    but would rather have the first."""
    angle = torch.tensor([0.0, 10, 25, 70, 84]).deg2rad()
    metric = torch.stack([angle.cos(), angle.sin()], -1)[None]
    assert mutual.match(metric, torch.ones(1, 5), 4).tolist() == [[0, 0, 1, 2, 3]]
    assert mutual.match(metric, torch.ones(1, 5), 3).tolist() == [[0, 0, 1, 2, 2]]
    assert mutual.match(metric, torch.ones(1, 5), 2).tolist() == [[0, 0, 0, 1, 1]]


def test_mutual_counts_a_merged_token_by_its_size() -> None:
    """The first two merge to a token at 18 or at 2 degrees, by their sizes; that decides whether
    the token at 65 degrees is next or the one at -45."""
    angle = torch.tensor([0.0, 20, 65, -45]).deg2rad()
    metric = torch.stack([angle.cos(), angle.sin()], -1)[None]
    towards = {(1.0, 9.0): [[0, 0, 0, 1]], (9.0, 1.0): [[0, 0, 1, 0]]}
    for (first, second), expected in towards.items():
        size = torch.tensor([[first, second, 1.0, 1.0]])
        assert mutual.match(metric, size, 2).tolist() == expected


@pytest.mark.parametrize(
    ("batch", "num", "dim", "k"),
    [(3, 49, 16, 5), (2, 7, 3, 2), (9, 196, 8, 5), (1, 3, 4, 5), (2, 64, 4, 8)],
)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "large"])
def test_density_peaks_by_numba_are_those_by_tensors(
    batch: int, num: int, dim: int, k: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    x = torch.randn(batch, num, dim)
    if kind == "ties":
        x = x.round()
    elif kind == "equal":
        x = x[:, :1].expand_as(x)
    elif kind == "large":
        x = x * 1e6 + 1e8
    counts = sorted({1, 2, num // 4 + 1, num})
    ours = [dpc_knn.cluster(x, count, k) for count in counts]
    monkeypatch.setattr(dpc_knn, "installed", lambda library: False)
    for count, labels in zip(counts, ours, strict=True):
        assert torch.equal(labels, dpc_knn.cluster(x, count, k))
