"""BEiT and Data2Vec-Vision of transformers: relative position biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import visible
from families.transformers_beit import SIZE

import tokred

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def beit(**options: Any) -> Any:
    torch.manual_seed(0)
    return visible(transformers.BeitModel(transformers.BeitConfig(**{**SIZE, **options})))


def data2vec(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Data2VecVisionConfig(**{**SIZE, **options})
    return visible(transformers.Data2VecVisionModel(config, add_pooling_layer=True))


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_attention_gets_the_biases_of_the_tokens_that_are_left(shared: bool) -> None:
    model = beit(
        use_relative_position_bias=not shared,
        use_shared_relative_position_bias=shared,
        attn_implementation="eager",
    )
    bias = model.shared_position_bias if shared else model.layers[1].relative_position_bias
    full = bias((4, 4))[0]
    reduction = tokred.apply(model, "topk", schedule=tokred.Exactly((7, 7, 7, 7)))
    seen: list[torch.Tensor] = []
    model.layers[1].attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with reduction.recording() as records:
        model(IMAGES)
    for mask, kept in zip(seen[0], records[0].map.representatives() + 1, strict=True):
        at = torch.cat([torch.zeros(1, dtype=torch.long), kept])
        assert torch.equal(mask, full[:, at][:, :, at])


@torch.no_grad()
@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("build", [beit, data2vec])
@pytest.mark.parametrize("method", ["tome", "topk"])
@pytest.mark.filterwarnings("ignore:.*nothing is reduced")
def test_biases_fit_images_of_other_sizes(build: Any, interpolate: bool, method: str) -> None:
    model = build(use_relative_position_bias=True, use_shared_relative_position_bias=True)
    dense = model(WIDE, interpolate_pos_encoding=interpolate)
    tokred.apply(model, method, keep_rate=1.0)
    kept = model(WIDE, interpolate_pos_encoding=interpolate)
    assert torch.equal(kept.pooler_output, dense.pooler_output)
    tokred.apply(model, method, keep_rate=0.5)
    reduced = model(WIDE, interpolate_pos_encoding=interpolate)
    assert reduced.last_hidden_state.shape == dense.last_hidden_state.shape
    assert not torch.allclose(reduced.pooler_output, dense.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("build", [beit, data2vec])
def test_dropped_tokens_are_not_averaged(build: Any) -> None:
    model = build(use_relative_position_bias=True, use_mean_pooling=True)
    tokred.apply(model, "topk", keep_rate=0.5, full_grid=False)
    outputs = model(IMAGES)
    few = outputs.last_hidden_state[:, 1:]
    assert few.shape[1] == 2
    torch.testing.assert_close(outputs.pooler_output, model.pooler.layernorm(few.mean(1)))
    tokred.apply(model, "topk", keep_rate=0.5)
    full = model(IMAGES)
    assert full.last_hidden_state.shape[1] == 17
    torch.testing.assert_close(full.pooler_output, outputs.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_ways_of_data2vec_give_the_same(implementation: str) -> None:
    """That there are two, and that each is restated: keeping everything changes no bit."""
    options = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
    model = data2vec(**options, attn_implementation=implementation)
    attention = model.encoder.layer[0].attention.attention
    assert ("Sdpa" in type(attention).__name__) == (implementation == "sdpa")
    dense = model(IMAGES)
    with tokred.applied(model, "tome", schedule=tokred.Exactly((16, 16, 16, 15))):
        # The last reduction follows the last attention.
        kept = model(IMAGES, output_hidden_states=True).hidden_states
    full = model(IMAGES, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(kept[:-1], full[:-1], strict=True))
    other = data2vec(
        **options, attn_implementation="sdpa" if implementation == "eager" else "eager"
    )
    other.load_state_dict(model.state_dict())
    answers = []
    for each in (model, other):
        tokred.apply(each, "tome", keep_rate=0.5)
        answers.append(each(IMAGES).pooler_output)
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers[0], dense.pooler_output)


@torch.no_grad()
def test_depth_estimation_keeps_its_shape() -> None:
    backbone = transformers.BeitConfig(
        **SIZE,
        use_relative_position_bias=True,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        add_fpn=False,
    )
    config = transformers.ZoeDepthConfig(
        backbone_config=backbone,
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        bottleneck_features=8,
        num_relative_features=8,
        backbone_hidden_size=32,
    )
    torch.manual_seed(0)
    model = visible(transformers.ZoeDepthForDepthEstimation(config))
    dense = model(IMAGES).predicted_depth
    tokred.apply(model, "atc", keep_rate=0.5)
    reduced = model(IMAGES).predicted_depth
    assert reduced.shape == dense.shape and not torch.equal(reduced, dense)
