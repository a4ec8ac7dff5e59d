"""Costs are counted as a person would count them, and measured on what they name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import timm
import torch
from test_dense import DENSE
from torch import nn

import tokred
from tokred.measure import cost
from tokred.measure.cost import free_limit_of
from tokred.patching import hang, host_of, reduction_of
from tokred.reducers.truncate import Truncate


def by_hand(model: nn.Module, counts: list[int], tokens: int) -> float:
    """Multiply-adds of a plain timm ViT, layer by layer, for one image."""
    dim, prefix = model.embed_dim, model.num_prefix_tokens
    patch = model.patch_embed.proj
    total = tokens * patch.weight.numel()
    before = tokens + prefix
    for after in counts:
        total += before * 4 * dim * dim + 2 * before * before * dim  # attention
        before = after + prefix
        total += before * 8 * dim * dim  # MLP
    return float(total + dim * model.num_classes)


@pytest.fixture
def deit() -> nn.Module:
    model: nn.Module = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
    return model


def test_multiply_adds_are_those_of_the_layers(deit: nn.Module) -> None:
    images = torch.randn(2, 3, 224, 224)
    assert tokred.flops(deit, images).dense == by_hand(deit, [196] * 4, 196)
    tokred.apply(deit, "random", keep_rate=0.5)  # which decides without a product
    counted = tokred.flops(deit, images)
    assert counted.reduced == by_hand(deit, [196, 98, 49, 24], 196)
    assert counted.dense == by_hand(deit, [196] * 4, 196)
    assert counted.ratio == counted.dense / counted.reduced
    assert reduction_of(deit) is not None, "counting leaves the reduction where it was"


def test_the_methods_own_products_are_counted(deit: nn.Module) -> None:
    images = torch.randn(1, 3, 224, 224)
    tokred.apply(deit, "tome", tokred.Exactly((196, 98, 98, 98)))
    matching = 98 * 98 * 64  # half of the tokens against the other half, 64 channels per head
    assert tokred.flops(deit, images).reduced == by_hand(deit, [196, 98, 98, 98], 196) + matching


def test_bench_measures_three_sides_and_leaves_the_model_alone(deit: nn.Module) -> None:
    images = torch.randn(2, 3, 224, 224)
    former = tokred.apply(deit, "topk", keep_rate=0.9)
    rounds = []
    result = tokred.bench(
        deit, images, "tome", keep_rate=0.25, rounds=3, warmup=1,
        on_round=lambda done, of: rounds.append((done, of)),
    )  # fmt: skip
    assert reduction_of(deit) is former
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    for arm in (result.dense, result.reduced, result.limit):
        assert len(arm.seconds) == 3 and min(arm.seconds) > 0 and arm.peak_memory is None
    assert result.efficiency == pytest.approx(result.speed_up / result.free_limit)
    assert result.counts == (196, 49, 12, 3)
    assert (result.batch, result.image_size, result.dtype) == (2, (224, 224), "float32")
    assert {"torch", "timm"} <= result.versions.keys()
    assert "free limit" in str(result).split("\n")[0]
    assert json.loads(json.dumps(result.as_dict()))["speed_up"] == result.speed_up


def test_the_applied_reduction_is_what_is_measured(deit: nn.Module) -> None:
    tokred.apply(deit, tokred.ATC(linkage="single"), keep_rate=0.5)
    result = tokred.bench(deit, torch.randn(1, 3, 224, 224), rounds=1, warmup=0)
    assert result.method == "ATC(linkage='single', backend='auto')"


def test_the_free_limit_runs_on_as_many_tokens(deit: nn.Module) -> None:
    seen = []
    for block in deit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    tokred.apply(deit, Truncate(), keep_rate=0.5, full_grid=False)
    features = deit.forward_features(torch.randn(1, 3, 224, 224))
    assert seen == [197, 99, 50, 25]
    assert features.shape[1] == 25


def test_spread_and_median_are_of_the_runs() -> None:
    arm = cost.Arm((1.0, 2.0, 3.0, 4.0, 100.0), None)
    assert arm.median == 3
    assert arm.spread == pytest.approx((52 - 1.5) / 2 / 3)
    assert dataclasses.astuple(arm)[1] is None


@pytest.mark.parametrize("options", [{"rounds": 0}, {"warmup": -1}])
def test_bad_rounds_are_named(deit: nn.Module, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1 and warmup 0"):
        tokred.bench(deit, torch.randn(1, 3, 224, 224), "tome", **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_bench_compiles_when_asked(deit: nn.Module) -> None:
    images = torch.randn(1, 3, 224, 224)
    result = tokred.bench(deit, images, "tome", rounds=2, warmup=2, compile=True)
    assert result.compiled and "compiled" in str(result)


def test_what_is_measured_is_said(deit: nn.Module) -> None:
    images = torch.randn(1, 3, 224, 224)
    tokred.apply(deit, "tome", 0.5)
    with pytest.raises(ValueError, match=r"method must be given with keep_rate=0\.3"):
        tokred.bench(deit, images, keep_rate=0.3)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        tokred.bench(deit.train(), images)


@pytest.mark.parametrize("method", ["slic", "tome"])
@pytest.mark.parametrize("name", ["depth anything", "transformers_maskless-dpt-segmentation"])
def test_the_free_limit_gives_necks_and_heads_their_grids(name: str, method: str) -> None:
    torch.manual_seed(0)
    model, inputs = DENSE[name].build().eval(), DENSE[name].inputs(2)
    answer = DENSE[name].answer
    with torch.no_grad():
        dense = answer(model(**inputs)).shape
        bench = tokred.bench(model, inputs, method, tokred.Hourglass(0.5, down=2), rounds=1)
        reduction = tokred.apply(model, method, tokred.Hourglass(0.5, down=2))
        host = host_of(model, None)
        tokred.remove(model)
        cut = free_limit_of(model, host, inputs, reduction, bench.counts)
        hang(model, host, cut)
        assert answer(model(**inputs)).shape == dense
