"""Clustering on the grid and reconstruction, against slow loops over the paper's equations."""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from decimal import Decimal

import numpy as np
import pytest
import references_slic as slow
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import tokred
import tokred.grids
from tokred.reducers import Tokens, slic
from tokred.reducers.slic import SLIC, Bilinear, Nearest


@st.composite
def grids(draw: st.DrawFn, most: int = 12) -> tuple[tuple[int, int], tuple[int, int]]:
    """A grid of tokens and one of clusters."""
    fine = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    return fine, (draw(st.integers(1, fine[0])), draw(st.integers(1, fine[1])))


options = st.tuples(
    st.sampled_from([1, 3, 5, 7]), st.integers(0, 4), st.sampled_from([0.05, 1.0, 50.0])
)
seeds = st.integers(0, 2**31)


def maps(
    batch: int, fine: tuple[int, int], dim: int, seed: int, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Feature maps whose neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, dim, 3, 3, generator=generator, dtype=torch.float64)
    smooth = F.interpolate(coarse, fine, mode="bilinear").permute(0, 2, 3, 1)
    noise = torch.randn(smooth.shape, generator=generator, dtype=torch.float64)
    return (smooth + 0.5 * noise).to(dtype)


def tokens_of(x: torch.Tensor, size: torch.Tensor | None = None) -> Tokens:
    flat = x.flatten(1, 2)
    ones = torch.ones(flat.shape[:2])
    return Tokens(flat, ones if size is None else size, grid=(x.shape[1], x.shape[2]))


# The functions


@settings(deadline=None, max_examples=60)
@given(grids(), options, seeds)
def test_clustering_equals_the_slow_loops(
    sides: tuple[tuple[int, int], tuple[int, int]], option: tuple[int, int, float], seed: int
) -> None:
    fine, grid = sides
    x = maps(2, fine, 3, seed)
    ours = slic.cluster(x, grid, *option)
    for image, centres in zip(x.numpy(), ours.numpy(), strict=True):
        np.testing.assert_allclose(centres, slow.cluster(image, grid, *option), atol=1e-9)


@pytest.mark.parametrize(
    ("fine", "grid", "neighbourhood"),
    [
        ((4, 4), (2, 2), 5),
        ((64, 64), (45, 45), 5),
        ((64, 48), (20, 48), 3),
        ((22, 64), (16, 23), 7),
        ((12, 12), (8, 8), 11),
    ],
)
def test_large_maps_in_float32_too(
    fine: tuple[int, int], grid: tuple[int, int], neighbourhood: int
) -> None:
    x = maps(1, fine, 8, 0, torch.float32)
    ours = slic.cluster(x, grid, neighbourhood, 3, 2.0)[0].double().numpy()
    np.testing.assert_allclose(ours, slow.cluster(x[0].double().numpy(), grid, neighbourhood, 3, 2),
                               atol=1e-5)  # fmt: skip


def test_how_the_grid_is_cut_into_tiles_makes_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = maps(2, (13, 17), 4, 0)
    at_first = slic.cluster(x, (9, 10))
    for side in ((1, 1), (2, 3), (4, 4), (9, 7), (9, 10)):
        monkeypatch.setattr(tokred.grids, "_best_side", lambda *_, side=side: side)
        torch.testing.assert_close(slic.cluster(x, (9, 10)), at_first)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 15)),
    st.sampled_from([0.05, 1.0, 50.0]),
    seeds,
)
def test_reconstruction_equals_the_slow_loop(
    shape: tuple[int, int, int], tau: float, seed: int
) -> None:
    num, clusters, k = shape
    generator = torch.Generator().manual_seed(seed)
    before, centres, after = (
        torch.randn(2, n, d, generator=generator, dtype=torch.float64)
        for n, d in ((num, 4), (clusters, 4), (clusters, 6))
    )
    ours = slic.reconstruct(before, centres, after, k, tau)
    for b in range(2):
        expected = slow.reconstruct(before[b].numpy(), centres[b].numpy(), after[b].numpy(), k, tau)
        np.testing.assert_allclose(ours[b].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_a_reconstruction_add_up_to_one(dtype: torch.dtype) -> None:
    before, centres = torch.randn(2, 50, 8).to(dtype), torch.randn(2, 20, 8).to(dtype)
    index, weight = slic.nearest(before, centres, k=7)
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 50, dtype=weight.dtype))
    assert (weight.diff(dim=-1) <= 0).all()  # the nearest first
    assert all(len(set(row)) == 7 for row in index.flatten(0, 1).tolist())


@pytest.mark.parametrize("fine", [(6, 6), (5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_as_many_clusters_as_tokens_the_input_comes_back(
    fine: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(2, *fine, 8, dtype=dtype)
    centres = slic.cluster(x, fine, tau=1e-3)
    torch.testing.assert_close(centres, x.flatten(1, 2))
    again = slic.reconstruct(x.flatten(1, 2), centres, centres, tau=1e-3)
    torch.testing.assert_close(again, x.flatten(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_loses_more_than_its_rounding(
    dtype: torch.dtype,
) -> None:
    x = (100 * maps(2, (10, 12), 64, 0)).to(dtype)  # squares add up to far more than 65504
    for tau in (1.0, 1e4):
        ours = slic.cluster(x, (7, 8), tau=tau)
        exact = slic.cluster(x.double(), (7, 8), tau=tau)
        assert ours.dtype == dtype and ours.isfinite().all()
        # Rounding at the end, and float32's inexact weights.
        torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-2)
        again = slic.reconstruct(x.flatten(1, 2), ours, ours, tau=tau)
        exact = slic.reconstruct(x.flatten(1, 2).double(), ours.double(), ours.double(), tau=tau)
        assert again.dtype == dtype
        torch.testing.assert_close(again.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-2)


def test_what_all_tokens_have_in_common_costs_no_digits() -> None:
    """A few channels of trained models have enormous values in all tokens."""
    x = maps(1, (12, 12), 16, 0)
    x[..., 3] += 4096
    x = x.float()
    torch.testing.assert_close(
        slic.cluster(x, (8, 8), tau=1.0).double(), slic.cluster(x.double(), (8, 8), tau=1.0),
        rtol=1e-6, atol=1e-5,
    )  # fmt: skip
    centres = slic.cluster(x, (8, 8), tau=1.0)
    after = torch.randn(1, 64, 16)
    torch.testing.assert_close(
        slic.reconstruct(x.flatten(1, 2), centres, after, tau=1.0).double(),
        slic.reconstruct(x.flatten(1, 2).double(), centres.double(), after.double(), tau=1.0),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cluster_that_no_token_would_choose_is_still_a_mean(dtype: torch.dtype) -> None:
    """Its weights are far below the smallest number of any dtype, but equation 3 divides them by
    their sum. Against arithmetic that knows such numbers."""
    row = [0.0, 3.0, 30.0, 33.0]
    ours = slic.cluster(torch.tensor(row, dtype=dtype).view(1, 1, 4, 1), (1, 3), 5, 1, 0.05)
    start = [1.5, 16.5, 31.5]  # the one in the middle is 13.5 from the nearest token
    parts = []
    for z in row:
        weight = [(-((Decimal(z) - Decimal(s)) ** 2) / Decimal("0.05")).exp() for s in start]
        parts.append([w / sum(weight) for w in weight])
    assert float(max(part[1] for part in parts)) < 1e-300
    for m, centre in enumerate(ours.flatten().tolist()):
        total = sum(part[m] for part in parts)
        mean = sum(part[m] * Decimal(z) for part, z in zip(parts, row, strict=True)) / total
        assert centre == pytest.approx(float(mean), rel=1e-4)


def test_samples_are_apart_and_windows_too_however_many_are_done_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = maps(5, (20, 20), 8, 0)
    together = slic.cluster(x, (14, 14))
    assert torch.equal(slic.cluster(x, (14, 14)), together)
    for b, alone in enumerate(x[:, None]):
        torch.testing.assert_close(together[b], slic.cluster(alone, (14, 14))[0])
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(slic.cluster(x[order], (14, 14)), together[order])
    monkeypatch.setattr(tokred.grids, "_at_once", lambda *_: 2)
    torch.testing.assert_close(slic.cluster(x, (14, 14)), together)


def test_autocast_makes_no_difference() -> None:
    x = maps(1, (8, 8), 16, 0, torch.float32)
    centres = slic.cluster(x, (5, 5))
    again = slic.reconstruct(x.flatten(1, 2), centres, centres)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(slic.cluster(x, (5, 5)), centres)
        assert torch.equal(slic.reconstruct(x.flatten(1, 2), centres, centres), again)
        superpixels = SLIC((5, 5), tau=50.0)(tokens_of(x), 25)
        torch.testing.assert_close(superpixels.down(x.flatten(1, 2), torch.ones(1, 64)), centres)


def test_gradients_are_those_of_the_function() -> None:
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: slic.cluster(x, (2, 3), 3, 2, 1.0), x)
    after = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)

    def again(x: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return slic.reconstruct(x.flatten(1, 2), slic.cluster(x, (2, 3)), after, 3, 1.0)

    assert torch.autograd.gradcheck(again, (x, after))


def test_both_functions_compile_in_one_graph_and_once() -> None:
    torch._dynamo.reset()

    def run(x: torch.Tensor) -> torch.Tensor:
        centres = slic.cluster(x, (5, 4))
        return slic.reconstruct(x.flatten(1, 2), centres, 2 * centres)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for _ in range(2):
        x = torch.randn(2, 8, 6, 5)
        torch.testing.assert_close(compiled(x), run(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"grid": (9, 8)},
            r"grid must be between 1 x 1 and the 8 x 6 of the tokens .* not \(9, 8\)",
        ),
        ({"grid": (25, 1)}, r"8 x 6 of the tokens .*up to 3 times.* not \(25, 1\)"),
        ({"grid": (4, 0)}, r"8 x 6 of the tokens .* not \(4, 0\)"),
        ({"neighbourhood": 4}, "neighbourhood must be odd, at least 1, .* not 4"),
        ({"neighbourhood": -1}, "at least 1, .* not -1"),
        ({"iterations": -1}, "iterations must be at least 0, not -1"),
        ({"tau": 0.0}, "tau must be above 0, not 0.0"),
        ({"tau": math.nan}, "tau must be above 0, not nan"),
    ],
)
def test_bad_arguments_are_named(option: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slic.cluster(torch.randn(1, 8, 6, 2), **{"grid": (4, 4), **option})  # type: ignore[arg-type]
    if "grid" not in option:
        with pytest.raises(ValueError, match=message):
            SLIC(**option)  # type: ignore[arg-type]


def test_bad_arguments_of_a_reconstruction_are_named() -> None:
    z = torch.randn(1, 6, 2)
    for make in (lambda **o: slic.nearest(z, z, **o), Nearest, SLIC):
        with pytest.raises(ValueError, match="k must be at least 1 cluster, not 0"):
            make(k=0)
        with pytest.raises(ValueError, match=r"tau must be above 0, not -1\.0"):
            make(tau=-1.0)
    with pytest.raises(ValueError, match=r"grid must be rows and columns, .* not \(3, 0\)"):
        SLIC((3, 0))


# The method


@settings(deadline=None, max_examples=40)
@given(grids(9), options, seeds)
def test_the_map_is_the_last_assignment(
    sides: tuple[tuple[int, int], tuple[int, int]], option: tuple[int, int, float], seed: int
) -> None:
    fine, grid = sides
    neighbourhood, iterations, tau = option
    x, other = maps(2, fine, 3, seed), maps(2, fine, 5, seed + 1)
    size = torch.randint(1, 5, x.shape[:3], generator=torch.Generator().manual_seed(seed)).float()
    num, tokens = grid[0] * grid[1], tokens_of(x, size.flatten(1))
    method = SLIC(grid, neighbourhood, max(1, iterations), tau)
    small = method(tokens, num)
    assert (small.num_coarse, small.grid, small.merges, small.ragged) == (num, grid, True, False)

    ones = torch.ones_like(tokens.size)
    centres = slic.cluster(x, grid, neighbourhood, max(1, iterations), tau)
    torch.testing.assert_close(small.down(tokens.x, ones), centres)
    down, total = small.down(other.flatten(1, 2), tokens.size), small.total(tokens.size)
    middle, labels = small.representatives(), small.labels()
    for b, image in enumerate(x.numpy()):
        before = slow.cluster(image, grid, neighbourhood, max(1, iterations) - 1, tau)
        parts = slow.assignment(image, before.reshape(*grid, -1), neighbourhood, tau)
        expected, sums = slow.means(other[b].numpy(), size[b].double().numpy(), parts, grid)
        np.testing.assert_allclose(down[b].numpy().reshape(expected.shape), expected, atol=1e-9)
        np.testing.assert_allclose(total[b].numpy(), sums.ravel(), rtol=1e-5, atol=1e-30)
        for place, weights in parts.items():
            i, j = divmod(int(labels[b, place[0] * fine[1] + place[1]]), grid[1])
            assert weights[i, j] == pytest.approx(max(weights.values()))
        for m, token in enumerate(middle[b].tolist()):
            (own,) = slow.candidates(divmod(token, fine[1]), fine, grid, 1)
            assert own == divmod(m, grid[1])
    few = torch.randn(2, num, 3)
    assert torch.equal(small.up(few)[1], few[1, labels[1]])


@settings(deadline=None, max_examples=30)
@given(grids(9), seeds)
def test_without_iterations_it_is_average_pooling(
    sides: tuple[tuple[int, int], tuple[int, int]], seed: int
) -> None:
    fine, grid = sides
    x = maps(2, fine, 3, seed)
    size = torch.randint(1, 5, x.shape[:3], generator=torch.Generator().manual_seed(seed)).float()
    tokens = tokens_of(x, size.flatten(1))
    small = SLIC(grid, iterations=0)(tokens, grid[0] * grid[1])
    down, ones = small.down(tokens.x, tokens.size), torch.ones_like(tokens.size)
    torch.testing.assert_close(small.down(tokens.x, ones), slic.cluster(x, grid, iterations=0))
    for b in range(2):
        image, sizes = x[b].numpy(), size[b].double().numpy()[..., None]
        expected = slow.pool(image * sizes, grid) / slow.pool(sizes, grid)
        np.testing.assert_allclose(down[b].numpy().reshape(expected.shape), expected, atol=1e-6)
    torch.testing.assert_close(small.total(tokens.size).sum(1), tokens.size.sum(1))
    whole = [many % few == 0 for many, few in zip(fine, grid, strict=True)]
    if all(whole):  # then a cell is all that is pooled into it
        labels = small.labels()
        members = torch.zeros_like(small.total(ones)).scatter_add_(1, labels, tokens.size)
        torch.testing.assert_close(small.total(tokens.size), members)
    own = small.labels().gather(1, small.representatives())
    assert own.tolist() == [list(range(grid[0] * grid[1]))] * 2


def test_gradients_flow_through_the_way_down_alone() -> None:
    x = torch.randn(1, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    small = SLIC((2, 3), neighbourhood=3)(tokens_of(x), 6)
    assert not small.log_parts.requires_grad
    size = torch.ones(1, 20, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: small.down(x.flatten(1, 2), size), x)


@pytest.mark.parametrize("iterations", [0, 5])
def test_the_map_is_a_value(iterations: int) -> None:
    x = torch.randn(2, 6, 6, 4)
    tokens = tokens_of(x)
    small = SLIC(iterations=iterations)(tokens, 16)
    for copy in (deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(copy.down(tokens.x, tokens.size), small.down(tokens.x, tokens.size))


@pytest.mark.parametrize(
    ("grid", "keep", "expected"),
    [
        ((40, 40), 784, (28, 28)),
        ((40, 40), 800, (28, 28)),  # 28 x 29 is nearer, but not square
        ((48, 48), 1024, (32, 32)),
        ((30, 30), 225, (15, 15)),
        ((12, 12), 144, (12, 12)),
        ((20, 40), 200, (10, 20)),
        ((40, 20), 200, (20, 10)),
        ((22, 76), 836, (16, 54)),
        ((3, 50), 8, (1, 8)),
        ((7, 7), 1, (1, 1)),
    ],
)
def test_a_number_of_tokens_becomes_the_nearest_grid_of_the_same_aspect(
    grid: tuple[int, int], keep: int, expected: tuple[int, int]
) -> None:
    assert slic.nearest_grid(keep, grid) == expected
    assert SLIC().fit(keep, grid) == expected[0] * expected[1]
    assert SLIC((3, 2)).fit(keep, grid) == 6


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.floats(0, 1))
def test_the_nearest_grid_has_the_aspect_and_fits_again(
    grid: tuple[int, int], share: float
) -> None:
    keep = max(1, round(share * grid[0] * grid[1]))
    rows, columns = slic.nearest_grid(keep, grid)
    assert 1 <= rows <= grid[0] and 1 <= columns <= grid[1]
    off = min(abs(columns - rows * grid[1] / grid[0]), abs(rows - columns * grid[0] / grid[1]))
    assert off <= 0.5 or min(rows, columns) == 1
    assert SLIC().fit(rows * columns, grid) == rows * columns


def test_a_number_that_makes_no_grid_is_refused_with_the_nearest_that_does() -> None:
    tokens = tokens_of(torch.randn(1, 8, 8, 2))
    with pytest.raises(ValueError, match=r"not 20; nearest .* 8 x 8 tokens, is 4 x 4 = 16$"):
        SLIC()(tokens, 20)
    with pytest.raises(ValueError, match=r"is 3 x 5 = 15, which was asked for as `grid`"):
        SLIC((3, 5))(tokens, 16)
    with pytest.raises(ValueError, match="between 1 x 1 and the 8 x 8 of the tokens"):
        SLIC((9, 8))(tokens, 72)
    with pytest.raises(ValueError, match="grid is None"):
        SLIC()(Tokens(tokens.x, tokens.size), 16)


# What the full grid is made of


@given(grids(), seeds)
def test_bilinear_equals_that_of_images(
    sides: tuple[tuple[int, int], tuple[int, int]], seed: int
) -> None:
    fine, grid = sides
    y = torch.randn(2, *grid, 3, generator=torch.Generator().manual_seed(seed))
    before = torch.randn(2, fine[0] * fine[1], 3)
    index, weight = Bilinear()(before, y.flatten(1, 2), fine, grid)
    torch.testing.assert_close(weight.sum(-1), torch.ones(1, before.shape[1]))
    ours = torch.einsum("nk,bnkc->bnc", weight[0], y.flatten(1, 2)[:, index[0]])
    expected = F.interpolate(y.permute(0, 3, 1, 2), fine, mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, expected.flatten(1, 2), rtol=1e-4, atol=1e-5)


def test_bilinear_needs_two_grids() -> None:
    x = torch.randn(1, 9, 2)
    with pytest.raises(ValueError, match=r"^grid is None, but .* the tokens stand on none"):
        Bilinear()(x, x[:, :4], None, (2, 2))
    with pytest.raises(ValueError, match=r"^coarse_grid is None, but .* the clusters stand on"):
        Bilinear()(x, x[:, :4], (3, 3), None)


def test_nearest_is_the_function_without_gradients() -> None:
    before, coarse = torch.randn(2, 9, 3, requires_grad=True), torch.randn(2, 4, 3)
    index, weight = Nearest(k=3, tau=2.0)(before, coarse, (3, 3), (2, 2))
    assert not weight.requires_grad
    expected = slic.nearest(before, coarse, 3, 2.0)
    assert torch.equal(index, expected[0]) and torch.equal(weight, expected[1])


def test_the_method_brings_its_reconstruction_and_schedule() -> None:
    method = SLIC(tau=3.0, k=7)
    assert method.reconstruction == Nearest(7, 3.0)
    assert method.schedule(0.25) == tokred.Hourglass(0.25)


# The temperature that is found


@settings(deadline=None, max_examples=25)
@given(grids(8), st.sampled_from([1, 3, 5]), st.integers(1, 3), seeds)
def test_the_temperature_is_found_in_each_image(
    sides: tuple[tuple[int, int], tuple[int, int]], neighbourhood: int, iterations: int, seed: int
) -> None:
    fine, grid = sides
    x = maps(2, fine, 3, seed) * torch.tensor([1.0, 30.0])[:, None, None, None]
    centres = slic.cluster(x, grid, neighbourhood, iterations, None)
    after = torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64)
    back = slic.reconstruct(x.flatten(1, 2), centres, after, 4, None)
    for b, image in enumerate(x.numpy()):
        pooled = slow.pool(image, grid)
        apart = [
            ((image[i, j] - pooled[i * grid[0] // fine[0], j * grid[1] // fine[1]]) ** 2).sum()
            for i, j in np.ndindex(*fine)
        ]
        least = 1e-5 * ((image - image.mean((0, 1))) ** 2).sum(-1).mean()
        tau = max(np.mean(apart) / 4, least, 1e-300)
        expected = slow.cluster(image, grid, neighbourhood, iterations, tau)
        np.testing.assert_allclose(centres[b], expected, rtol=1e-6, atol=1e-8)
        # The rest from its own centres: where tau is tiny, the nearest one hangs by a bit.
        known, tokens = centres[b].numpy(), image.reshape(-1, 3)
        distance = ((tokens[:, None] - known) ** 2).sum(-1)
        least = 1e-5 * ((tokens - known.mean(0)) ** 2).sum(-1).mean()
        tau = max(distance.min(1).mean() / 4, least, 1e-300)
        expected = slow.reconstruct(tokens, known, after[b].numpy(), 4, tau)
        np.testing.assert_allclose(back[b], expected, rtol=1e-6, atol=1e-6)


def test_the_temperature_found_goes_with_the_scale_of_the_features() -> None:
    x = maps(2, (12, 12), 8, 0)
    token_map, larger = SLIC((8, 8))(tokens_of(x), 64), SLIC((8, 8))(tokens_of(1000 * x), 64)
    torch.testing.assert_close(larger.log_parts, token_map.log_parts)
    index, weight = Nearest()(x.flatten(1, 2), x.flatten(1, 2)[:, ::3])
    more = Nearest()(1000 * x.flatten(1, 2), 1000 * x.flatten(1, 2)[:, ::3])
    assert torch.equal(more[0], index)
    torch.testing.assert_close(more[1], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blank_image_has_a_temperature_too(dtype: torch.dtype) -> None:
    x = torch.full((1, 6, 6, 4), 3.0, dtype=dtype)
    centres = slic.cluster(x, (3, 3), tau=None)
    assert torch.equal(centres, torch.full((1, 9, 4), 3.0, dtype=dtype))
    back = slic.reconstruct(x.flatten(1, 2), centres, centres, tau=None)
    torch.testing.assert_close(back, x.flatten(1, 2))


def test_with_as_many_clusters_as_tokens_no_temperature_need_be_given() -> None:
    x = maps(2, (6, 7), 16, 1, torch.float32)
    centres = slic.cluster(x, (6, 7), tau=None)
    back = slic.reconstruct(x.flatten(1, 2), centres, centres, tau=None)
    torch.testing.assert_close(back, x.flatten(1, 2), rtol=1e-4, atol=1e-4)
