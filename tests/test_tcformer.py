"""TCFormer: tokens, clusterings, stages, necks and heads, against loops and published counts."""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import tokred
from tokred.maps import Clusters
from tokred.models.tcformer import (
    DPCKNN,
    GLOBAL,
    LOCAL,
    MTA,
    VARIANTS,
    Bipartite,
    HeatmapHead,
    ImageTokens,
    IterativeHead,
    KMeans,
    LikelihoodHead,
    PoseEstimator,
    Pyramid,
    SegmentationHead,
    TCFormer,
    backbone,
    draw_heatmaps,
    load_released,
    read_heatmaps,
    tokens,
)
from tokred.models.tcformer.clusterings import cluster_in_parts, parts_of
from tokred.models.tcformer.detection import mask_rcnn, retina_net
from tokred.models.tcformer.tokens import Layout
from tokred.reducers.dpc_knn import cluster as dpc_knn
from tokred.reducers.tome import match

Grid = tuple[int, int]

SMALL: dict[str, Any] = {
    "depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32), "heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2), "num_classes": 5,
}  # fmt: skip


def small(**options: Any) -> TCFormer:
    """A narrow TCFormer whose weights are as strong as trained ones."""
    torch.manual_seed(0)
    model = TCFormer(**{**SMALL, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "score" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


def random_layout(batch: int, grid: Grid, size: Grid, num: int, seed: int = 0) -> Layout:
    """Tokens of random clusters of cells, another for every sample, merged by random scores."""
    draw = torch.Generator().manual_seed(seed)
    cells = grid[0] * grid[1]
    labels = torch.stack([
        torch.cat([torch.arange(num), torch.randint(num, (cells - num,), generator=draw)])[
            torch.randperm(cells, generator=draw)
        ]
        for _ in range(batch)
    ])  # fmt: skip
    layout = tokens.raster(batch, grid, torch.device("cpu"))
    score = torch.randn(batch, cells, generator=draw, dtype=torch.float64)
    _, clusters = tokens.merge(torch.zeros(batch, cells, 1), score, labels, num)
    return tokens.merged(layout, clusters, size)


# Tokens and maps.


def slow_pixels(grid: Grid, size: Grid) -> list[tuple[int, int]]:
    ratio = [np.float32(s) / np.float32(g) for s, g in zip(size, grid, strict=True)]
    return [
        (int(np.floor(np.float32(i) * ratio[0])), int(np.floor(np.float32(j) * ratio[1])))
        for i in range(grid[0])
        for j in range(grid[1])
    ]


def slow_map(x: np.ndarray, layout: Layout) -> np.ndarray:
    batch, _, dim = x.shape
    index = layout.cells.index.numpy()
    out = np.zeros((batch, dim, *layout.size))
    for b in range(batch):
        under = np.zeros(layout.size)
        for cell, (i, j) in enumerate(slow_pixels(layout.grid, layout.size)):
            out[b, :, i, j] += x[b, index[b, cell]]
            under[i, j] += 1
        out[b] /= under
    return out


def slow_tokens(pixels: np.ndarray, layout: Layout) -> np.ndarray:
    batch, dim = pixels.shape[:2]
    index = layout.cells.index.numpy()
    out = np.zeros((batch, layout.num_tokens, dim))
    for b in range(batch):
        members = np.zeros(layout.num_tokens)
        for cell, (i, j) in enumerate(slow_pixels(layout.grid, layout.size)):
            out[b, index[b, cell]] += pixels[b, :, i, j]
            members[index[b, cell]] += 1
        out[b] /= members[:, None]
    return out


def slow_interpolate(x: np.ndarray, source: Layout, target: Layout) -> np.ndarray:
    """Cell by cell, weighted by what each makes up of its token in the target."""
    assert target.cells.share is not None
    out = np.zeros((len(x), target.num_tokens, x.shape[2]))
    weight = np.zeros((len(x), target.num_tokens, 1))
    for b, cell in np.ndindex(*target.cells.index.shape):
        share = float(target.cells.share[b, cell])
        t, s = target.cells.index[b, cell], source.cells.index[b, cell]
        out[b, t] += share * x[b, s]
        weight[b, t] += share
    return out / weight


SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=40, deadline=None)
@given(SIDES, st.integers(1, 3), st.integers(0, 99), st.floats(0, 1))
def test_tokens_to_maps_and_back_are_the_loops(
    grid: Grid, batch: int, seed: int, share: float
) -> None:
    num = 1 + int(share * (grid[0] * grid[1] - 1))
    size = (-(-grid[0] // 2), -(-grid[1] // 2))
    layout = random_layout(batch, grid, size, num, seed)
    x = torch.randn(batch, num, 3, dtype=torch.float64)
    pixels = tokens.to_map(x, layout)
    np.testing.assert_allclose(pixels, slow_map(x.numpy(), layout), atol=1e-12)
    back = tokens.from_map(pixels, layout)
    np.testing.assert_allclose(back, slow_tokens(pixels.numpy(), layout), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(SIDES, st.integers(0, 99), st.integers(1, 81), st.integers(1, 81))
def test_tokens_of_one_stage_as_those_of_another_are_the_loop(
    grid: Grid, seed: int, first: int, second: int
) -> None:
    cells = grid[0] * grid[1]
    a = random_layout(2, grid, (1, 1), min(first, cells), seed)
    b = random_layout(2, grid, (1, 1), min(second, cells), seed + 1)
    x = torch.randn(2, a.num_tokens, 3, dtype=torch.float64)
    found = tokens.interpolate(x, a, b)
    np.testing.assert_allclose(found, slow_interpolate(x.numpy(), a, b), atol=1e-12)
    down = b.cells.down(a.cells.up(x), torch.ones(2, cells))  # what it is in words
    torch.testing.assert_close(found, down)


def test_a_raster_is_its_own_map() -> None:
    layout = tokens.raster(2, (3, 5), torch.device("cpu"))
    x = torch.randn(2, 15, 4)
    pixels = tokens.to_map(x, layout)
    assert torch.equal(pixels, x.transpose(1, 2).unflatten(2, (3, 5)))
    assert torch.equal(tokens.from_map(pixels, layout), x)
    smaller = tokens.resized(layout, (2, 3))
    np.testing.assert_allclose(
        tokens.to_map(x, smaller), slow_map(x.numpy(), smaller), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"size \(2, 3\), not \(3, 5\)"):
        tokens.from_map(pixels, smaller)


@pytest.mark.parametrize("cells", range(1, 300, 7))
def test_pixels_are_those_of_interpolation_to_the_nearest(cells: int) -> None:
    for pixels in (1, cells // 3 or 1, -(-cells // 2), cells, 2 * cells, 2 * cells + 1):
        found = tokens.pixel_of_cell((cells, 1), (pixels, 1), torch.device("cpu"))
        numbers = torch.arange(pixels, dtype=torch.float32)[None, None]
        nearest = F.interpolate(numbers, cells, mode="nearest")[0, 0]
        assert found.tolist() == nearest.long().tolist()


def test_a_merged_token_is_the_mean_of_its_members_weighted_by_their_scores() -> None:
    torch.manual_seed(1)
    x, score = torch.randn(2, 12, 3).double(), 5 * torch.randn(2, 12).double()
    labels = torch.stack([torch.arange(12) % 5, torch.arange(12) // 3 % 5])
    labels[1, 0] = 4
    out, clusters = tokens.merge(x, score, labels, 5)
    for b in range(2):
        for cluster in range(5):
            members = labels[b] == cluster
            weight = score[b, members].exp()
            expected = (x[b, members] * weight[:, None]).sum(0) / weight.sum()
            torch.testing.assert_close(out[b, cluster], expected)
    assert torch.equal(clusters.index, labels)
    high = tokens.merge(x, score + 1e4, labels, 5)[0]  # which exp alone would not survive
    torch.testing.assert_close(high, out)


def test_shares_multiply_from_stage_to_stage() -> None:
    model, images = small(parts=GLOBAL), torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        stages = model.stages(images)
    for fine, coarse in pairwise(stages):
        cells = coarse.layout.cells
        assert cells.share is not None
        sums = torch.zeros(2, cells.num_coarse).scatter_add(1, cells.index, cells.share)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        for b in range(2):  # a token is never divided among several
            pairs = {*zip(fine.layout.cells.index[b].tolist(), cells.index[b].tolist(),
                          strict=True)}  # fmt: skip
            assert len(pairs) == fine.layout.num_tokens


def test_gradients_of_maps_merges_and_interpolation() -> None:
    layout = random_layout(2, (3, 5), (2, 3), 4)
    labels = torch.tensor([[0, 1, 1, 0], [2, 0, 1, 1]])

    def through(x: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        pixels = tokens.to_map(x, layout)
        back = tokens.from_map(pixels**2, layout)
        merged, clusters = tokens.merge(back, score, labels, 3)
        coarse = tokens.merged(layout, clusters, (1, 2))
        few = tokens.interpolate(x, layout, coarse)
        return pixels, merged, few, tokens.interpolate(few * few, coarse, layout)

    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    score = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, (x, score))


@pytest.mark.parametrize("neck", ["mta", "mta_pool", "cr_mta"])
def test_gradients_of_whole_models(neck: str) -> None:
    pyramid = Pyramid(small(parts=LOCAL), neck, 8, heads=2).double().eval()
    images = torch.randn(2, 3, 20, 28, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        first, *_ = pyramid(images)
        weight = torch.randn_like(first)

    def loss(images: Tensor, scale: Tensor) -> Tensor:
        ctm = pyramid.backbone.ctm2
        score = {"backbone.ctm2.score.weight": ctm.score.weight.detach() * scale}
        maps = torch.func.functional_call(pyramid, score, (images,))
        return (maps[0] * weight).sum() + sum(one.square().sum() for one in maps[1:])

    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (images, scale), fast_mode=True, atol=1e-4)


# Clustering.


def test_parts_of_a_grid_that_divides() -> None:
    first, second, third = parts_of((56, 56), LOCAL, torch.device("cpu"))
    assert first.sizes == (196,) * 16 and first.keeps == (49,) * 16
    assert second.sizes == (196,) * 4 and second.keeps == (49,) * 4
    assert third.sizes == (196,) and third.keeps == (49,)
    assert second.order is None and third.order is None
    assert first.order is not None
    rows, columns = first.order // 56, first.order % 56
    for part in range(16):
        inside = slice(196 * part, 196 * (part + 1))
        assert (
            len({*(rows[inside] // 14).tolist()}) == len({*(columns[inside] // 14).tolist()}) == 1
        )
    for part in range(4):  # four parts that join stand together
        inside = slice(784 * part, 784 * (part + 1))
        assert (
            len({*(rows[inside] // 28).tolist()}) == len({*(columns[inside] // 28).tolist()}) == 1
        )


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)), st.sampled_from([GLOBAL, LOCAL, (6, 3, 3)])
)
def test_parts_of_any_grid(grid: Grid, sides: tuple[int, ...]) -> None:
    plan = parts_of(grid, sides, torch.device("cpu"))
    assert sum(plan[0].sizes) == grid[0] * grid[1]
    if plan[0].order is not None:
        assert sorted(plan[0].order.tolist()) == list(range(grid[0] * grid[1]))
    for side, parts in zip(sides, plan, strict=True):
        assert min(parts.sizes) >= 1 and len(parts.sizes) <= side**2
        assert parts.keeps == tuple(max(-(-size // 4), 1) for size in parts.sizes)
    for parts, coarser in pairwise(plan):
        assert parts.keep == sum(coarser.sizes)


def test_parts_that_do_not_join_are_refused() -> None:
    for sides in ((4, 3, 1), (1, 2, 1), (0, 0, 0)):
        with pytest.raises(ValueError, match="a divisor of those of the CTM before"):
            small(parts=sides)
    with pytest.raises(ValueError, match="three numbers"):
        small(parts=(2, 1))


def slow_in_parts(x: Tensor, grid: Grid, side: int) -> Tensor:
    """Each part of a grid clustered alone; labels count on from part to part."""
    height, width = grid
    number = torch.arange(height * width).view(height, width)
    labels = torch.full((height * width,), -1)
    quarters = [(r, c) for r in range(side) for c in range(side)]
    if side == 4:  # those of each half first
        quarters.sort(key=lambda place: (place[0] // 2, place[1] // 2))
    next_label = 0
    for r, c in quarters:
        part = number[
            r * height // side : (r + 1) * height // side,
            c * width // side : (c + 1) * width // side,
        ].flatten()
        if len(part):
            keep = -(-len(part) // 4)
            labels[part] = dpc_knn(x[None, part], keep)[0] + next_label
            next_label += keep
    return labels


@pytest.mark.parametrize("grid", [(16, 16), (9, 12), (7, 10), (3, 5), (2, 1)])
@pytest.mark.parametrize("side", [2, 4])
def test_clusters_of_parts_are_those_of_each_part_alone(grid: Grid, side: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(3, grid[0] * grid[1], 6)
    parts = parts_of(grid, (side, side // 2, 1), torch.device("cpu"))[0]
    labels = cluster_in_parts(x, parts, DPCKNN())
    assert labels.max() + 1 == parts.keep
    for b in range(3):
        assert torch.equal(labels[b], slow_in_parts(x[b], grid, side))


def test_local_and_global_clustering_agree_where_there_is_one_part() -> None:
    x = torch.randn(2, 35, 6)
    parts = parts_of((5, 7), GLOBAL, torch.device("cpu"))[0]
    assert torch.equal(cluster_in_parts(x, parts, DPCKNN()), dpc_knn(x, 9))
    images = torch.randn(2, 3, 4, 4)  # a single cell
    torch.testing.assert_close(small(parts=LOCAL)(images), small(parts=GLOBAL)(images))


CLUSTERINGS = [DPCKNN(), KMeans(), KMeans(0), Bipartite()]


@pytest.mark.parametrize("clustering", CLUSTERINGS, ids=str)
@pytest.mark.parametrize(("num", "keep"), [(1, 1), (2, 1), (7, 2), (30, 30), (64, 16), (65, 17)])
def test_every_cluster_has_a_token(clustering: Any, num: int, keep: int) -> None:
    for x in (torch.randn(3, num, 4), torch.zeros(3, num, 4), torch.randn(3, num, 1).sign()):
        labels = clustering(x, keep)
        assert labels.shape == (3, num)
        for row in labels:
            assert row.unique().tolist() == list(range(keep))
        assert torch.equal(labels[:1], clustering(x[:1], keep))  # samples do not mix


@pytest.mark.parametrize("clustering", CLUSTERINGS[:2], ids=str)
def test_groups_that_lie_apart_are_found(clustering: Any) -> None:
    torch.manual_seed(3)
    group = torch.arange(32) % 4
    x = 10 * torch.eye(8)[group] + 0.01 * torch.randn(1, 32, 8)
    labels = clustering(x, 4)[0]
    assert torch.equal(labels, group)


def test_bipartite_clusters_are_matched_in_rounds() -> None:
    x = torch.randn(2, 20, 4)
    assert torch.equal(Bipartite()(x, 13), match(x, 7))
    once = Clusters(match(x, 10), 10)
    means, sizes = once.down(x, torch.ones(2, 20)), once.total(torch.ones(2, 20))
    again = once.then(Clusters(match(means, 4), 6))
    assert torch.equal(Bipartite()(x, 6), again.index) and bool((sizes >= 1).all())


def test_k_means_ends_where_no_token_would_rather_be_elsewhere() -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    labels = KMeans(100)(x, 6)
    for b in range(2):
        means = torch.stack([x[b, labels[b] == n].mean(0) for n in range(6)])
        nearest = (x[b, :, None] - means).norm(dim=-1).argmin(1)
        assert torch.equal(nearest, labels[b])
    with pytest.raises(ValueError, match="at least 0"):
        KMeans(-1)


# The model.

PUBLISHED = {
    "tcformer_light": (14_231_659, 3.84), "tcformer": (25_594_731, 5.83),
    "tcformer_large": (62_818_923, 12.15), "tcformerv2_tiny": (14_231_659, 2.50),
    "tcformerv2_small": (25_594_731, 4.49), "tcformerv2_base": (62_818_923, 10.81),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        model = getattr(backbone, name)()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name][0]


@pytest.mark.parametrize(
    ("neck", "number"), [("mta", 8_173_568), ("mta_pool", 2_666_240), ("cr_mta", 2_666_240)]
)
def test_parameters_of_necks_are_as_many_as_published(neck: str, number: int) -> None:
    assert sum(p.numel() for p in MTA(neck=neck).parameters()) == number


def multiply_adds(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """As the published numbers are: products, convolutions and attention (the distances of
    clustering among them); a multiply-add for every channel of every cell that tokens and maps are
    converted through; and five for every number that is normalised."""
    extra = [0]
    plain = tokens.total

    def counted(x: Tensor, which: tokens.Bags, weight: Tensor | None = None) -> Tensor:
        extra[0] += len(which.index) * x.shape[1]
        return plain(x, which, weight)

    monkeypatch.setattr(tokens, "total", counted)

    def seen(module: nn.Module, _: Any, out: Tensor) -> None:
        if isinstance(module, nn.LayerNorm):
            extra[0] += 5 * out.numel()
        elif isinstance(module, backbone.TokenConv) and module.groups > 1:
            extra[0] += out.numel()  # the linear layer of each channel

    for module in model.modules():
        module.register_forward_hook(seen)

    def fused(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # Older versions of the counter do not know fused attention on the CPU.
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused}
    with FlopCounterMode(display=False, custom_mapping=known) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() / 2 + extra[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "light" not in name else ())
        for name in VARIANTS
    ],
)
def test_multiply_adds_are_as_many_as_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = getattr(backbone, name)().eval()
    found = multiply_adds(model, torch.randn(1, 3, 224, 224), monkeypatch) / 1e9
    assert found == pytest.approx(PUBLISHED[name][1], rel=0.01)


@pytest.mark.parametrize("parts", [GLOBAL, LOCAL])
@pytest.mark.parametrize("size", [(4, 4), (16, 20), (32, 32), (33, 47), (64, 48), (100, 36)])
def test_images_of_any_size(parts: tuple[int, ...], size: Grid) -> None:
    model = small(parts=parts)
    with torch.no_grad():
        stages = model.stages(torch.randn(2, 3, *size))
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    for n, (stage, width) in enumerate(zip(stages, SMALL["widths"], strict=True)):
        assert stage.map().shape == (2, width, rows, columns)
        assert stage.x.shape == (2, stage.layout.num_tokens, width)
        assert bool(stage.x.isfinite().all())
        if n and parts == GLOBAL:
            assert stage.layout.num_tokens == max(-(-stages[n - 1].layout.num_tokens // 4), 1)
        rows, columns = -(-rows // 2), -(-columns // 2)
    for neck in ("mta", "mta_pool", "cr_mta"):
        maps = Pyramid(model, neck, 16)(torch.randn(2, 3, *size))
        assert [one.shape[2:] for one in maps] == [stage.layout.size for stage in stages]


@pytest.mark.parametrize("parts", [GLOBAL, LOCAL])
def test_treats_samples_apart(parts: tuple[int, ...]) -> None:
    model, images = small(parts=parts), torch.randn(3, 3, 44, 36)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(one[None]) for one in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_attention_adds_scores_to_the_logits() -> None:
    """Equation 4, head by head."""
    torch.manual_seed(5)
    layout = random_layout(2, (4, 6), (2, 3), 10)
    attention = backbone.Attention(8, 2, 1, "conv").double()
    x, memory = torch.randn(2, 3, 8).double(), torch.randn(2, 10, 8).double()
    score = torch.randn(2, 10).double()
    found = attention(x, memory, layout, score)
    query, (key, value) = attention.q(x), attention.kv(memory).chunk(2, -1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        logits = query[..., head] @ key[..., head].mT / 2 + score[:, None]
        heads.append(logits.softmax(-1) @ value[..., head])
    torch.testing.assert_close(found, attention.proj(torch.cat(heads, -1)))


def test_scores_are_averaged_where_keys_are_reduced() -> None:
    layout = random_layout(2, (8, 12), (4, 6), 20)
    attention = backbone.Attention(8, 2, 2, "conv").double()
    memory, score = torch.randn(2, 20, 8).double(), torch.randn(2, 20).double()
    few, bias = attention.reduced(memory, layout, score, None)
    pixels = slow_map(memory.numpy(), layout)
    scores = slow_map(score[..., None].numpy(), layout)
    expected = scores.reshape(2, 2, 2, 3, 2).mean((2, 4)).reshape(2, 6)
    np.testing.assert_allclose(bias, expected, atol=1e-12)
    reduced = attention.norm(attention.sr(torch.tensor(pixels)).flatten(2).mT)
    torch.testing.assert_close(few, reduced)


def test_the_first_block_of_a_stage_sees_the_tokens_before_merging() -> None:
    model = small(parts=GLOBAL)
    seen: list[tuple[int, int]] = []
    for n in (2, 3, 4):
        for block in getattr(model, f"block{n}"):
            block.attn.register_forward_pre_hook(
                lambda _, args: seen.append((args[0].shape[1], args[1].shape[1]))
            )
    model(torch.randn(1, 3, 64, 64))
    assert seen == [(64, 256), (16, 64), (16, 16), (4, 16)]


def test_the_neck_adds_copies_of_coarser_tokens() -> None:
    torch.manual_seed(6)
    model = small(parts=LOCAL)
    neck = MTA(SMALL["widths"], 8, "cr_mta", heads=2).eval()
    for block in neck.merge_blocks:  # nothing but what is added
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.mlp.fc2.weight)
    with torch.no_grad():
        stages = model.stages(torch.randn(2, 3, 40, 52))
        levels = neck(stages)
        lateral = [
            one["conv"](stage.x.mT[..., None])[..., 0].mT
            for one, stage in zip(neck.lateral_convs, stages, strict=True)
        ]
    expected = lateral[3]
    for n in (2, 1, 0):
        up = stages[n + 1].layout.cells.index.gather(1, stages[n].layout.cells.representatives())
        expected = lateral[n] + torch.stack([x[i] for x, i in zip(expected, up, strict=True)])
        torch.testing.assert_close(levels[n].x, expected)


def test_cr_mta_looks_at_the_clusters_of_the_last_stage() -> None:
    model = small(parts=LOCAL)
    with torch.no_grad():
        first, *_, last = model.stages(torch.randn(2, 3, 48, 48))
    attention = backbone.Attention(8, 2, 8, "clusters")
    few, _ = attention.reduced(first.x, first.layout, None, last.layout)
    expected = slow_interpolate(first.x.double().numpy(), first.layout, last.layout)
    assert few.shape == (2, last.layout.num_tokens, 8)
    np.testing.assert_allclose(few, expected, rtol=1e-4, atol=1e-5)


def test_another_clustering_may_take_its_place() -> None:
    model, images = small(parts=LOCAL), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        for clustering in CLUSTERINGS:
            model.clustering, model.parts = clustering, GLOBAL
            assert model.forward_features(images).shape == (2, 4, 32)
            assert not torch.equal(model(images), before)
        model.clustering, model.parts = DPCKNN(), LOCAL
        assert torch.equal(model(images), before)
        called: list[tuple[int, int]] = []
        model.clustering = lambda x, num: called.append((x.shape[1], num)) or dpc_knn(x, num)  # type: ignore[func-returns-value]
        model(images)
    assert called == [(16, 4), (16, 4), (16, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("neck", ["mta", "mta_pool", "cr_mta"])
def test_half_precision(dtype: torch.dtype, neck: str) -> None:
    model, images = small(parts=LOCAL), torch.randn(2, 3, 48, 64)
    pyramid = Pyramid(copy.deepcopy(model), neck, 16).eval()
    with torch.no_grad():
        logits = copy.deepcopy(model).to(dtype)(images.to(dtype))
        maps = pyramid.to(dtype)(images.to(dtype))
        full = model(images)
    assert logits.dtype == dtype and all(one.dtype == dtype for one in maps)
    assert all(bool(one.isfinite().all()) for one in (*maps, logits))
    assert F.cosine_similarity(logits.float(), full).min() > 0.9  # tokens may cluster otherwise


def test_autocast() -> None:
    model, images = small(), torch.randn(2, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(images).logsumexp(1).sum()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_step_of_training_reaches_every_weight() -> None:
    for neck in ("mta", "mta_pool", "cr_mta"):
        pyramid = Pyramid(small(parts=LOCAL), neck, 16).train()
        sum(one.square().sum() for one in pyramid(torch.randn(2, 3, 64, 64))).backward()
        untouched = [
            name for name, p in pyramid.named_parameters()
            if p.grad is None or not bool(p.grad.abs().sum() > 0)
        ]  # fmt: skip
        # Softmax does not see what is added to all keys.
        assert [name for name in untouched if not name.endswith("score.bias")] == []


def test_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(7)
    pyramid, images = Pyramid(small(), "cr_mta", 16), torch.randn(2, 3, 40, 40)

    def gradients(enable: bool) -> list[Tensor]:
        pyramid.set_grad_checkpointing(enable)
        pyramid.zero_grad()
        sum(one.square().mean() for one in pyramid(images)).backward()
        return [p.grad.clone() for p in pyramid.parameters() if p.grad is not None]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again)


def test_drop_path_leaves_branches_out_in_training_alone() -> None:
    drop = backbone.DropPath(0.5)
    x = torch.ones(1000, 2, 3)
    out = drop(x)
    assert {*out.unique().tolist()} == {0.0, 2.0} and 0.4 < (out > 0).float().mean() < 0.6
    assert (out == out[:, :1, :1]).all()
    assert torch.equal(drop.eval()(x), x)
    rates = [m.rate for m in small(drop_path_rate=0.4).modules() if hasattr(m, "rate")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
        backbone.DropPath(1.0)


def test_equal_runs_are_equal_to_the_bit() -> None:
    model, images = small().train(), torch.randn(2, 3, 64, 64)

    def run() -> list[Tensor]:
        model.zero_grad()
        model(images).logsumexp(1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [GLOBAL, LOCAL])
def test_compiles_in_one_graph(parts: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    for model in (small(parts=parts), Pyramid(small(parts=parts), "cr_mta", 16).eval()):
        images = torch.randn(2, 3, 64, 48)
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        with torch.no_grad():
            expected, found = model(images), compiled(images)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="depths must be four positive numbers"):
        TCFormer(depths=(1, 2, 3))
    with pytest.raises(ValueError, match="heads must divide the width, 8"):
        small(heads=(3, 2, 3, 4))
    with pytest.raises(ValueError, match="global_pool must be"):
        small(global_pool="max")
    with pytest.raises(ValueError, match="neck must be one of mta, mta_pool, cr_mta"):
        MTA(neck="fpn")
    with pytest.raises(ValueError, match="sr_ratios must be 3"):
        MTA(sr_ratios=(8, 4))
    with pytest.raises(TypeError, match="backbone must be a TCFormer"):
        Pyramid(nn.Identity())  # type: ignore[arg-type]


# timm.


@pytest.mark.parametrize("name", VARIANTS)
def test_timm_makes_them(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, drop_path_rate=0.1)
    assert type(model) is TCFormer and model.parts == VARIANTS[name]["parts"]
    assert model.head.out_features == 7 and len(model.block3) == VARIANTS[name]["depths"][2]
    assert model.default_cfg["input_size"] == (3, 224, 224)


def test_timm_features() -> None:
    images = torch.randn(2, 3, 64, 96)
    features = timm.create_model("tcformerv2_tiny", features_only=True)
    assert [tuple(one.shape) for one in features(images)] == [
        (2, 64, 16, 24), (2, 128, 8, 12), (2, 320, 4, 6), (2, 512, 2, 3)
    ]  # fmt: skip
    assert features.feature_info.channels() == [64, 128, 320, 512]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    some = timm.create_model("tcformerv2_tiny", features_only=True, out_indices=(0, 2))
    assert [one.shape[1] for one in some(images)] == [64, 320]
    assert not any(name.startswith("model.block4") for name, _ in some.named_parameters())
    neck = timm.create_model("tcformerv2_tiny", features_only=True, neck="cr_mta")
    assert [one.shape[1] for one in neck(images)] == neck.feature_info.channels() == [256] * 4


def test_they_are_there_without_timm() -> None:
    program = (
        "import sys\nsys.modules['timm'] = None\nimport torch\n"
        "from tokred.models.tcformer import Pyramid, tcformer_light\n"
        "print(len(Pyramid(tcformer_light(), 'cr_mta')(torch.zeros(1, 3, 32, 32))))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("4\n", 0), run.stderr


def test_what_timm_asks_of_its_models() -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    last, maps = model.forward_intermediates(images, indices=[-1, 0])
    torch.testing.assert_close(last, features)
    assert [one.shape[1] for one in maps] == [32, 8]
    for wrong, message in (({"indices": 5}, "4 stages, not 5"), ({"indices": [4]}, r"not \[4\]"),
                           ({"output_fmt": "NLC"}, "NCHW")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(images, **wrong)
    assert model.get_classifier() is model.head
    model.reset_classifier(3, "")
    assert model(images).shape == (2, 1, 3)
    model.reset_classifier(0)
    assert model(images).shape == (2, 1, 32)
    from timm.optim import create_optimizer_v2

    groups = create_optimizer_v2(small(), "adamw", layer_decay=0.8, weight_decay=0.05).param_groups
    scale = {p: group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len([*small().parameters()])


# Published checkpoints.


def released_shapes(depths: tuple[int, ...], num_classes: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published file, written out."""
    widths, sr_ratios, ratios = (64, 128, 320, 512), (8, 4, 2, 1), (8, 8, 4, 4)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed1.proj.weight": (64, 3, 7, 7), "patch_embed1.proj.bias": (64,),
        "patch_embed1.norm.weight": (64,), "patch_embed1.norm.bias": (64,),
    }  # fmt: skip
    for n, (depth, c, sr, ratio) in enumerate(zip(depths, widths, sr_ratios, ratios, strict=True)):
        for j in range(depth):
            block = f"block{n + 1}.{j}"
            shapes |= block_shapes(block, c, sr, ratio * c, "dwconv.dwconv" if n == 0 else "dwconv")
        shapes |= {f"norm{n + 1}.{part}": (c,) for part in ("weight", "bias")}
        if n:
            before, ctm = widths[n - 1], f"ctm{n}"
            shapes |= {
                f"{ctm}.conv.weight": (c, before, 3, 3), f"{ctm}.conv.bias": (c,),
                f"{ctm}.conv.skip.weight": (c, before, 1), f"{ctm}.norm.weight": (c,),
                f"{ctm}.norm.bias": (c,), f"{ctm}.score.weight": (1, c), f"{ctm}.score.bias": (1,),
            }  # fmt: skip
    return shapes | {"head.weight": (num_classes, 512), "head.bias": (num_classes,)}


def block_shapes(block: str, c: int, sr: int, hidden: int, dw: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{block}.attn.q.weight": (c, c), f"{block}.attn.q.bias": (c,),
        f"{block}.attn.kv.weight": (2 * c, c), f"{block}.attn.kv.bias": (2 * c,),
        f"{block}.attn.proj.weight": (c, c), f"{block}.attn.proj.bias": (c,),
        f"{block}.mlp.fc1.weight": (hidden, c), f"{block}.mlp.fc1.bias": (hidden,),
        f"{block}.mlp.{dw}.weight": (hidden, 1, 3, 3), f"{block}.mlp.{dw}.bias": (hidden,),
        f"{block}.mlp.fc2.weight": (c, hidden), f"{block}.mlp.fc2.bias": (c,),
    }  # fmt: skip
    if dw == "dwconv":
        shapes[f"{block}.mlp.dwconv.skip.weight"] = (hidden, 1, 1)
    for norm in ("norm1", "norm2", *(["attn.norm"] if sr > 1 else [])):
        shapes |= {f"{block}.{norm}.weight": (c,), f"{block}.{norm}.bias": (c,)}
    if sr > 1:
        shapes |= {f"{block}.attn.sr.weight": (c, c, sr, sr), f"{block}.attn.sr.bias": (c,)}
    return shapes


def neck_shapes(strided: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for n, width in enumerate((64, 128, 320, 512)):
        shapes[f"neck.lateral_convs.{n}.conv.weight"] = (256, width, 1, 1)
        shapes[f"neck.lateral_convs.{n}.conv.bias"] = (256,)
    for n, sr in enumerate((8, 4, 2)):
        shapes |= block_shapes(f"neck.merge_blocks.{n}", 256, sr if strided else 1, 1024, "dwconv")
    return shapes


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    torch.manual_seed(8)
    return {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("key", ["model", "state_dict", None, "safetensors"])
def test_a_published_classifier_loads_and_is_the_same_again(
    key: str | None, tmp_path: Path
) -> None:
    weights = drawn(released_shapes((2, 2, 2, 2), 1000))
    if key == "safetensors":
        path = tmp_path / "light.safetensors"
        save_file(weights, path)
    else:
        path = tmp_path / "light.pth"
        beside = {"epoch": 3, "args": argparse.Namespace(model="tcformer_light", lr=1e-3)}
        named = {f"module.{name}": value for name, value in weights.items()}
        torch.save({key: named, **beside} if key else weights, path)
    model = load_released(path)
    assert type(model) is TCFormer and model.parts == GLOBAL and not model.training
    assert model.state_dict().keys() == weights.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert {
        name: tuple(value.shape) for name, value in backbone.tcformer_light().state_dict().items()
    } == {name: tuple(value.shape) for name, value in weights.items()}
    assert [block.attn.heads for block in model.block3] == [5, 5]


NECKS = [("mta", {}), ("mta_pool", {"neck": "mta_pool"}),
         ("cr_mta", {"neck": "cr_mta", "parts": LOCAL})]  # fmt: skip


@pytest.mark.parametrize(("neck", "said"), NECKS)
def test_a_published_pose_estimator_loads(neck: str, said: dict[str, Any], tmp_path: Path) -> None:
    inside = {name: shape for name, shape in released_shapes((2, 2, 2, 2), 9).items()
              if not name.startswith("head.")}  # fmt: skip
    shapes = {f"backbone.{name}": shape for name, shape in inside.items()}
    shapes |= neck_shapes(neck == "mta")
    weights = drawn(shapes)
    torch.save({"state_dict": weights, "meta": {"epoch": 210}}, tmp_path / "pose.pth")
    pyramid = load_released(tmp_path / "pose.pth", **said)
    assert type(pyramid) is Pyramid and pyramid.state_dict().keys() == weights.keys()
    twin = Pyramid(TCFormer((2, 2, 2, 2), parts=said.get("parts", GLOBAL)), neck).eval()
    twin.load_state_dict(weights)
    picture = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        assert all(map(torch.equal, pyramid(picture), twin(picture)))
    alone = load_released(tmp_path / "pose.pth", copy.deepcopy(pyramid))
    assert torch.equal(alone.neck.lateral_convs[0]["conv"].weight,
                       weights["neck.lateral_convs.0.conv.weight"])  # fmt: skip
    head = {"keypoint_head.final_layer.weight": (133, 256, 1, 1),
            "keypoint_head.final_layer.bias": (133,)}  # fmt: skip
    torch.save({"state_dict": weights | drawn(head)}, tmp_path / "whole.pth")
    pose = load_released(tmp_path / "whole.pth", **said)
    assert isinstance(pose, PoseEstimator)
    with torch.no_grad():
        assert pose(picture).shape == (1, 133, 16, 12)


def test_what_no_weight_tells_is_asked_for(tmp_path: Path) -> None:
    """The averaging neck and that of TCFormerV2 have the same weights, by name and shape."""
    pyramid = Pyramid(backbone.tcformerv2_tiny(), "cr_mta")
    path = tmp_path / "pyramid.pth"
    torch.save(pyramid.state_dict(), path)
    with pytest.raises(ValueError, match=r'neck must be given: .*"mta_pool" .* neck="cr_mta"'):
        load_released(path)
    with pytest.raises(ValueError, match=r"parts must be given .* parts=LOCAL .* parts=GLOBAL"):
        load_released(path, neck="cr_mta")
    loaded = load_released(path, neck="cr_mta", parts=LOCAL)
    assert loaded.backbone.parts == LOCAL
    with pytest.raises(ValueError, match="neck must be one of mta, mta_pool, cr_mta, not 'fpn'"):
        load_released(path, neck="fpn")
    with pytest.raises(ValueError, match=r"missing: neck\.merge_blocks\.0\.attn\.norm\.bias"):
        load_released(path, neck="mta")
    with pytest.raises(ValueError, match="must not be given with a model"):
        load_released(path, pyramid, neck="cr_mta")
    alone = tmp_path / "backbone.pth"
    torch.save(pyramid.backbone.state_dict(), alone)
    with pytest.raises(ValueError, match=r"neck must not be given: .* has no weights of one"):
        load_released(alone, neck="mta")


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    weights = drawn(released_shapes((2, 2, 2, 2), 10))
    del weights["ctm2.score.bias"]
    weights["ctm2.scores.bias"] = torch.zeros(1)
    weights["norm4.weight"] = torch.zeros(5)
    torch.save(weights, tmp_path / "wrong.pth")
    with pytest.raises(ValueError) as caught:
        load_released(tmp_path / "wrong.pth")
    for line in ("3 places", "missing: ctm2.score.bias", "left: ctm2.scores.bias",
                 "shape: norm4.weight is (5,), not (512,)"):  # fmt: skip
        assert line in str(caught.value)
    torch.save({"model": {"fc.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no TCFormer.*begins with fc\.weight"):
        load_released(tmp_path / "other.pth")


class Unsafe:
    def __reduce__(self) -> Any:
        return (print, ("must not run",))


def test_nothing_but_weights_is_unpickled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {}, "hook": Unsafe()}, tmp_path / "unsafe.pth")
    with pytest.raises(ValueError, match="holds more than weights"):
        load_released(tmp_path / "unsafe.pth")
    assert "must not run" not in capsys.readouterr().out
    torch.save({"model": {}}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        load_released(tmp_path / "empty.pth")


# Heads.


def test_heatmaps_are_read_as_they_were_drawn() -> None:
    at = torch.tensor([[[10.0, 33.0], [50.2, 7.9], [40.0, 20.0]]])
    heatmaps = draw_heatmaps(at, (16, 20))
    assert heatmaps.shape == (1, 3, 16, 20)
    found, height = read_heatmaps(heatmaps)
    assert (found - at).abs().max() <= 1.5  # a pixel of a heatmap is 4 of the image
    assert (height > 0.8).all()
    corner = draw_heatmaps(torch.tensor([[[1.5, 1.5]]]), (4, 4))
    torch.testing.assert_close(read_heatmaps(corner)[0], torch.tensor([[[1.5, 1.5]]]))


def test_a_pose_estimator_learns() -> None:
    torch.manual_seed(9)
    images, at = torch.zeros(8, 3, 32, 32), torch.randint(6, 26, (8, 1, 2)).float()
    for image, (x, y) in zip(images, at[:, 0].int().tolist(), strict=True):
        image[:, y - 3 : y + 4, x - 3 : x + 4] = 1
    model = PoseEstimator(TCFormer(**SMALL), 1, "cr_mta", 16)
    target = draw_heatmaps(at, (8, 8), sigma=1.0)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(images), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


def test_the_flow_is_a_density() -> None:
    head = LikelihoodHead(8, 2)
    for parameter in head.flow.parameters():
        nn.init.normal_(parameter, std=0.2)
    side = torch.linspace(-16, 16, 401)
    points = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)
    with torch.no_grad():
        mass = head.flow(points).exp().sum() * (side[1] - side[0]) ** 2
    assert mass == pytest.approx(1, abs=0.02)


def test_residual_log_likelihood_finds_where_keypoints_are() -> None:
    torch.manual_seed(10)
    head = LikelihoodHead(4, 2)
    tokens_in = torch.randn(64, 3, 4)
    target = (
        0.5 + 0.1 * tokens_in.mean(1)[:, :, None].repeat(1, 1, 1)[:, :2] + torch.zeros(64, 2, 2)
    )
    optimiser = torch.optim.Adam(head.parameters(), 1e-2)
    first = None
    for _ in range(200):
        found = head(tokens_in)
        loss = head.loss(found, target)
        first = loss.item() if first is None else first
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < first - 2
    assert (head(tokens_in).at - target).abs().mean() < 0.02
    found = head(tokens_in)
    assert found.score.shape == (64, 2) and 0 <= found.score.min() <= found.score.max() <= 1
    half = torch.tensor([1.0, 0.0]).expand(64, 2)
    moved = target + torch.tensor([[0.0], [9.0]])
    torch.testing.assert_close(head.loss(found, target, half), head.loss(found, moved, half))


def test_parameters_are_corrected_again_and_again() -> None:
    head = IterativeHead(4, torch.tensor([1.0, 2.0, 3.0]), iterations=3, hidden=8).eval()
    nn.init.normal_(head.correct[-1].weight)
    x = torch.randn(2, 5, 4)
    guess = torch.tensor([1.0, 2.0, 3.0]).expand(2, 3)
    for _ in range(3):
        guess = guess + head.correct(torch.cat([x.mean(1), guess], 1))
    torch.testing.assert_close(head(x), guess)
    assert "start" in head.state_dict() and IterativeHead(4, 7)(x).shape == (2, 7)
    with pytest.raises(ValueError, match="at least 1"):
        IterativeHead(4, 7, iterations=0)


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_every_pixel_gets_a_class(size: Grid) -> None:
    pyramid = Pyramid(small(), "mta_pool", 16).eval()
    head = SegmentationHead(16, 7, channels=8)
    maps = pyramid(torch.randn(2, 3, *size))
    assert head(maps, size).shape == (2, 7, *size)
    assert nn.Sequential(pyramid, head)(torch.randn(1, 3, 32, 32)).shape == (1, 7, 32, 32)
    sum(one.sum() for one in head(maps, size).unbind()).backward()
    assert all(p.grad is not None for p in (*head.parameters(), *pyramid.neck.parameters()))


def test_heatmaps_are_of_the_finest_map() -> None:
    maps = [torch.randn(2, 16, 8, 6), torch.randn(2, 16, 4, 3)]
    head = HeatmapHead(16, 3)
    torch.testing.assert_close(head(maps), head.final_layer(maps[0]))


@pytest.mark.parametrize("make", [mask_rcnn, retina_net])
def test_torchvision_detects_with_it(make: Any) -> None:
    torch.manual_seed(11)
    pyramid = Pyramid(small(parts=LOCAL), "cr_mta", 16)
    sizes = {"min_size": 64, "max_size": 96}
    detector = make(pyramid, 3, **sizes)
    names = list(detector.backbone(torch.randn(1, 3, 64, 64)))
    assert names == (
        ["0", "1", "2", "3", "pool"] if make is mask_rcnn else ["1", "2", "3", "p6", "p7"]
    )
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 72).byte()}
    losses = detector.train()([torch.rand(3, 64, 72)], [target])
    sum(losses.values()).backward()
    assert all(bool(torch.isfinite(one)) for one in losses.values())
    assert pyramid.backbone.patch_embed1.proj.weight.grad is not None
    with torch.no_grad():
        found = detector.eval()([torch.rand(3, 60, 50), torch.rand(3, 64, 64)])
    assert len(found) == 2 and "boxes" in found[0]
    with pytest.raises(TypeError, match="pyramid must be a Pyramid"):
        make(nn.Identity(), 3)


# Looking at it.


def test_inspect_tells_of_the_stages() -> None:
    model, images = Pyramid(small(parts=LOCAL), "cr_mta", 16), torch.randn(2, 3, 64, 48)
    trace = tokred.inspect(model, images)
    assert trace.grid == (16, 12) and trace.layers == 5
    assert [(one.layer, one.before, one.after) for one in trace.stages] == [
        (1, 192, 48), (2, 48, 12), (4, 12, 3)
    ]  # fmt: skip
    stages = model.backbone.eval().stages(images)
    for told, stage in zip(trace.stages, stages[1:], strict=True):
        assert torch.equal(told.labels.flatten(1), stage.layout.cells.index)
    assert "4x4 2x2 1x1 parts" in str(trace) and "192 -> 48" in str(trace)
    strips = tokred.visualise(trace, images, cell=4)
    assert len(strips) == 2 and strips[0].width > 4 * 12 * 4


def test_tokens_are_values() -> None:
    stage = small().stages(torch.randn(1, 3, 32, 32))[1]
    assert isinstance(stage, ImageTokens)
    with pytest.raises(AttributeError):
        stage.x = torch.zeros(1)  # type: ignore[misc]
