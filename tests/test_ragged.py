"""Methods after which images have different numbers of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Digits, images_for, small
from references import ats as slow_ats
from test_patching import outputs
from torch import nn

import tokred
from tokred import ATS, Exactly, ToMe
from tokred.engine.attention import mean_attention
from tokred.maps import Clusters, Kept, kept_where
from tokred.reducers import Reducer, Tokens, ats, tome

METHODS = [ATS(), ToMe(threshold=0.6), ToMe(threshold=-1.0), ToMe(threshold=1.0)]
HOSTS = ["vit", "distilled", "mae, average pooling", "no class token", "siglip, attention pooling",
         "dinov2, registers", "registers, average pooling"]  # fmt: skip


def varied(model: nn.Module, batch: int = 5) -> torch.Tensor:
    """Images that have more and less to see in them."""
    images = images_for(model, batch)
    for number, image in enumerate(images):
        image[:, : number * image.shape[1] // (batch + 1)] *= 0.1
    return images


@pytest.mark.parametrize("reducer", METHODS, ids=str)
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("proportional", [False, True])
def test_a_batch_gives_for_every_image_what_it_gives_alone(
    name: str, reducer: Reducer, proportional: bool
) -> None:
    model = small(name)
    images = varied(model)
    full = model.patch_embed.num_patches
    tokred.apply(
        model,
        reducer,
        Exactly((full, full - 3, 8, 5)),
        proportional_attention=proportional,
    )
    alone = [outputs(model, image[None]) for image in images]
    torch.testing.assert_close(outputs(model, images), torch.cat(alone), rtol=1e-4, atol=1e-5)
    features = model.forward_features(images)
    assert features.shape[1] == full + model.num_prefix_tokens
    one = [model.forward_features(image[None]) for image in images]
    torch.testing.assert_close(features, torch.cat(one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reducer", METHODS, ids=str)
def test_a_batch_may_be_empty(reducer: Reducer) -> None:
    model = small("vit")
    images = varied(model)
    tokred.apply(model, reducer, 0.5)
    assert outputs(model, images[:0]).shape == (0, *outputs(model, images).shape[1:])


@pytest.mark.parametrize("reducer", [ATS(), ToMe(threshold=0.98)], ids=str)
def test_images_do_differ_and_the_trace_says_so(reducer: Reducer, digits: Digits) -> None:
    model, images, _ = digits()
    images = images[:8]
    tokred.apply(model, reducer, 0.25)
    trace = tokred.inspect(model, images)
    assert len({count for stage in trace.stages for count in stage.counts}) > 2
    assert "images have" in str(trace)
    for stage in trace.stages:
        assert stage.after == max(stage.counts)
        seen = [len(set(labels.flatten().tolist()) - {-1}) for labels in stage.labels]
        assert seen == list(stage.counts)


def test_every_stage_runs_however_few_tokens_are_left(digits: Digits) -> None:
    """Also where no image has more than the stage asks for: sampling drops tokens nevertheless."""
    model, images, _ = digits()
    tokred.apply(model, "ats", 0.7)
    for batch in (images[:8], images[:1]):
        trace = tokred.inspect(model, batch)
        asked = tokred.Stages(0.7)(196, 12)
        assert [stage.layer for stage in trace.stages] == [3, 6, 9]
        before, after = trace.stages[0].counts, trace.stages[1].counts
        assert max(before) <= asked[6], "else this tries nothing"
        assert all(b < a for a, b in zip(before, after, strict=True))


def test_reduced_features_end_with_zeros(digits: Digits) -> None:
    model, images, _ = digits()
    images = images[:8]
    tokred.apply(model, "ats", 0.5, full_grid=False)
    counts = tokred.inspect(model, images).stages[-1].counts
    assert len(set(counts)) > 1
    model.norm = nn.Identity()
    for row, count in zip(model.forward_features(images), counts, strict=True):
        assert (row[1 + count :] == 0).all()
        assert (row[: 1 + count] != 0).any(1).all()


def test_intermediate_features_are_full_grids() -> None:
    model = small("vit")
    images = varied(model)
    tokred.apply(model, "ats", Exactly((16, 10, 10, 6)))
    final, features = model.forward_intermediates(images)
    assert [f.shape[-2:] for f in features] == [(4, 4)] * 4
    torch.testing.assert_close(final, model.forward_features(images))


@pytest.mark.parametrize("reducer", [ATS(), ToMe(threshold=0.5)], ids=str)
def test_counts_can_rise_again(reducer: Reducer) -> None:
    model = small("vit")
    images = varied(model)
    tokred.apply(model, reducer, Exactly((12, 6, 12, 16)), full_grid=False)
    assert model.forward_features(images).shape[1] == 17
    alone = torch.cat([model.forward_features(image[None]) for image in images])
    torch.testing.assert_close(model.forward_features(images), alone, rtol=1e-4, atol=1e-4)


def test_bench_cuts_off_to_what_came_of_it() -> None:
    model = small("vit")
    images = varied(model)
    bench = tokred.bench(model, images, "ats", 0.5, rounds=1, warmup=0)
    tokred.apply(model, "ats", 0.5)
    stages = {stage.layer: stage.after for stage in tokred.inspect(model, images).stages}
    assert all(bench.counts[layer] == after for layer, after in stages.items())


@pytest.mark.parametrize("num", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_ats_samples_the_nearest_entries(num: int, peaked: bool, published: bool) -> None:
    significance = torch.rand(20, 30, dtype=torch.float64)
    if peaked:
        significance = significance**12
        significance[:, ::3] = 0
    drawn = ats.sample(significance, num, published)
    for row, ours in zip(significance.numpy(), drawn.tolist(), strict=True):
        assert [n for n, chosen in enumerate(ours) if chosen] == slow_ats(row, num, published)
    assert (drawn.sum(1) <= num).all()


def test_ats_published_is_heard_by_the_method() -> None:
    """Of three points at 1/6, 3/6 and 5/6, the published ones are 1/8, 3/8 and 5/8."""
    attention = torch.full((1, 1, 6), 1 / 6)
    tokens = Tokens(torch.randn(1, 6, 4), torch.ones(1, 6), value=torch.ones(1, 1, 6, 4),
                    class_attention=attention)  # fmt: skip
    assert ats.ATS()(tokens, 3).index.tolist() == [[0, 2, 4]]
    assert ats.ATS(published=True)(tokens, 3).index.tolist() == [[0, 1, 3]]


def test_ats_draws_the_first_token_where_none_matters() -> None:
    assert ats.sample(torch.zeros(1, 4), 3).tolist() == [[True, False, False, False]]


def test_ats_reads_the_class_tokens_attention_and_the_values() -> None:
    model = small("vit")
    images = images_for(model)
    seen = []

    class Spy(ATS):
        def __call__(self, tokens, keep):  # type: ignore[no-untyped-def]
            seen.append(tokens)
            return super().__call__(tokens, keep)

    tokred.apply(model, Spy(), Exactly((16, 9, 9, 9)))
    inputs = []
    model.blocks[1].norm1.register_forward_hook(lambda _, args, out: inputs.append(out))
    outputs(model, images)
    attn = model.blocks[1].attn
    q, k, v = attn.qkv(inputs[0]).view(2, 17, 3, 3, 64).permute(2, 0, 3, 1, 4)
    attention = (q[:, :, :1] @ k.transpose(2, 3) * attn.scale).softmax(-1)[:, :, 0, 1:]
    torch.testing.assert_close(seen[0].value, v[:, :, 1:])
    torch.testing.assert_close(seen[0].class_attention, attention)


def test_padding_gets_no_attention() -> None:
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 6, 4)
    bias = torch.tensor([0.0, 0, 0, 0, -torch.inf, -torch.inf]).view(1, 1, 1, 6)
    padded = mean_attention(query, key, 0.5, bias)
    assert (padded[..., 4:] == 0).all()
    torch.testing.assert_close(padded[..., :4], mean_attention(query, key[:, :, :4], 0.5))


def slow_similar(unit: np.ndarray, most: int, threshold: float, before: int) -> list[int]:
    a = [n for n in range(len(unit)) if (n + before) % 2 == 0]
    b = [n for n in range(len(unit)) if (n + before) % 2 == 1]
    edges = []
    for i in a:
        j = max(b, key=lambda j: (unit[i] @ unit[j], -j))
        if unit[i] @ unit[j] >= threshold:
            edges.append((-(unit[i] @ unit[j]), i, j))
    joins = {i: j for _, i, j in sorted(edges)[:most]}
    return [joins.get(n, n) for n in range(len(unit))]


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 1.0])
def test_a_threshold_merges_the_pairs_above_it(before: int, threshold: float) -> None:
    from references import renumber

    metric = torch.randn(6, 12, 3)
    counts = torch.tensor([12, 11, 9, 6, 3, 2])
    valid = torch.arange(12) < counts[:, None]
    most = torch.tensor([4, 6, 1, 0, 6, 1])
    clusters = tome.match_similar(metric, valid, most, threshold, before)
    for row, keys, count, limit in zip(
        clusters.index, metric, counts.tolist(), most.tolist(), strict=True
    ):
        unit = torch.nn.functional.normalize(keys[:count].double(), dim=-1).numpy()
        assert row[:count].tolist() == renumber(slow_similar(unit, limit, threshold, before))
        assert (row[count:] == row[0]).all()


def test_a_threshold_is_a_cosine() -> None:
    with pytest.raises(ValueError, match=r"threshold must be a cosine similarity in \[-1, 1\]"):
        ToMe(threshold=1.5)


def test_ragged_maps_go_down_and_up() -> None:
    x = torch.arange(8.0).view(2, 4, 1)
    size = torch.tensor([[1.0, 1, 2, 1], [1, 1, 1, 0]])
    kept = Kept(torch.tensor([[0, 2, 3], [1, 0, 2]]), 4, torch.tensor([3, 1]))
    assert kept.total(size).tolist() == [[1, 2, 1], [1, 0, 0]]
    assert kept.labels().tolist() == [[0, -1, 1, 2], [-1, 0, -1, -1]]
    assert kept.up(10 * kept.down(x, size), x).flatten(1).tolist() == [
        [0, 1, 20, 30],
        [4, 50, 6, 7],
    ]
    clusters = Clusters(torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0]]), 3, ragged=True)
    assert clusters.total(size).tolist() == [[2, 2, 1], [3, 0, 0]]
    assert clusters.down(x, size).flatten(1).tolist() == [[0.5, 2, 3], [5, 0, 0]]


def test_padding_is_the_first_token_that_is_kept() -> None:
    """A token that is dropped alone, but stays in a batch as padding, might overflow there."""
    chosen = torch.tensor([[False, True, True, False, True], [False, False, False, True, False]])
    kept = kept_where(chosen)
    assert kept.index.tolist() == [[1, 2, 4], [3, 3, 3]]
    assert kept.counts is not None and kept.counts.tolist() == [3, 1]
    assert kept.labels().tolist() == [[-1, 0, 1, -1, 2], [-1, -1, -1, 0, -1]]
    assert kept_where(chosen & False).index.shape == (2, 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "no class token"])
def test_padding_becomes_what_the_first_token_becomes(name: str) -> None:
    model = small(name)
    images = varied(model)
    reduction = tokred.apply(model, "ats", Exactly((16, 15, 15, 15)))
    seen = []
    model.blocks[3].mlp.register_forward_hook(lambda _, args, out: seen.append(out))
    with reduction.recording() as records:
        model.forward_features(images)
    counts = records[-1].map.counts.tolist()
    assert len(set(counts)) > 1
    for row, count in zip(seen[0][:, model.num_prefix_tokens :], counts, strict=True):
        torch.testing.assert_close(row[count:], row[:1].expand_as(row[count:]))
