"""Models that estimate something for every pixel: depth, classes, poses, boxes. Built from (small)
configurations of their own classes, with the full grid at every output that their heads read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from families import Small
from families.transformers_maskless import lively
from test_hosts import SMALL, answered, counts, keep_all
from torch import Tensor, nn

import tokred
from tokred import SLIC, Hourglass

DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 112,
    "patch_size": 14,
    "out_indices": [1, 2, 3, 4],
    "reshape_hidden_states": False,
}
BEIT = {
    "model_type": "beit",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 128,
    "use_relative_position_bias": True,
    "reshape_hidden_states": False,
    "out_indices": [1, 2, 3, 4],
}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}


def images(*size: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {"pixel_values": torch.randn(batch, 3, *size)}


def depth(make: Callable[[], nn.Module], *size: int, counted: str = "mlp") -> Small:
    def build() -> nn.Module:
        return lively(make())

    return Small(
        build, images(*size), counted=counted, answer=lambda outputs: outputs.predicted_depth
    )


def depth_anything(cls: Any, config: Any) -> Callable[[], nn.Module]:
    return lambda: cls(
        config(backbone_config=DINOV2, reassemble_hidden_size=32, head_hidden_size=8, **NECK)
    )


def zoedepth() -> nn.Module:
    config = transformers.ZoeDepthConfig(
        backbone_config=BEIT, bottleneck_features=16, bin_embedding_dim=16,
        num_relative_features=8, num_attractors=[4, 2, 1, 1], **NECK,
    )  # fmt: skip
    return transformers.ZoeDepthForDepthEstimation(config)


def hybrid() -> nn.Module:
    config = transformers.DPTConfig(
        is_hybrid=True,
        backbone_config={
            "model_type": "bit", "global_padding": "same", "layer_type": "bottleneck",
            "depths": [1, 1, 1], "hidden_sizes": [8, 16, 32], "embedding_size": 8,
            "out_features": ["stage1", "stage2", "stage3"], "embedding_dynamic_padding": True,
            "num_groups": 4,
        },
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        image_size=128, patch_size=16, backbone_featmap_shape=[1, 32, 8, 8],
        backbone_out_indices=[0, 1, 2, 3], neck_ignore_stages=[0, 1],
        neck_hidden_sizes=[8, 16, 16, 16], fusion_hidden_size=16,
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config)


DENSE: dict[str, Small] = {
    "depth anything": depth(
        depth_anything(
            transformers.DepthAnythingForDepthEstimation, transformers.DepthAnythingConfig
        ),
        112, 84,
    ),
    "prompt depth anything": depth(
        depth_anything(
            transformers.PromptDepthAnythingForDepthEstimation,
            transformers.PromptDepthAnythingConfig,
        ),
        112, 112,
    ),
    "zoedepth": depth(zoedepth, 128, 128),
    "dpt, hybrid": depth(hybrid, 128, 128, counted="intermediate"),
    **{
        name: SMALL[name]
        for name in (
            "transformers_maskless-dpt-depth",
            "transformers_maskless-dpt-segmentation",
            "transformers_maskless-vitpose",
            "transformers_maskless-yolos-detector",
            "transformers_maskless-yolos-positions-between",
            "transformers_beit-beit-segmentation",
            "transformers_beit-data2vec-segmentation",
            "transformers_dinov2-dinov2-backbone",
            "transformers_dinov2-dinov2-registers-backbone",
            "transformers_dinov2-dinov3-gated-backbone",
            "timm_vit-dinov2-registers",
            "timm_eva-eva02" if "timm_eva-eva02" in SMALL else next(
                name for name in SMALL if name.startswith("timm_eva")
            ),
        )
    },
}  # fmt: skip
METHODS = ["slic", "tome", "atc", "topk", "dpc_knn"]


@pytest.fixture(params=DENSE)
def dense(request: pytest.FixtureRequest) -> Small:
    torch.manual_seed(0)
    return DENSE[request.param]


def test_keeping_everything_changes_no_bit(dense: Small) -> None:
    model, inputs = dense.build(), dense.inputs(2)
    expected = answered(dense, model, inputs)
    for method in METHODS:
        keep_all(model, method)
        assert torch.equal(answered(dense, model, inputs), expected), method
    tokred.remove(model)
    assert torch.equal(answered(dense, model, inputs), expected)


@pytest.mark.parametrize("method", METHODS)
def test_an_hourglass_keeps_every_output_in_shape(dense: Small, method: str) -> None:
    model, inputs = dense.build(), dense.inputs(2)
    expected = answered(dense, model, inputs)
    full = counts(dense, model, inputs)
    reducer = SLIC(tau=5.0, k=4) if method == "slic" else method
    reduction = tokred.apply(
        model, reducer, schedule=Hourglass(0.5, down=1, up=3), reconstruction="nearest"
    )
    few = counts(dense, model, inputs)
    assert few[0] == full[0] and few[-1] == full[-1]
    assert all(
        reduction.layout.others < after < before
        for after, before in zip(few[1:3], full[1:3], strict=True)
    )
    after = answered(dense, model, inputs)
    assert after.shape == expected.shape and after.isfinite().all()
    assert torch.equal(answered(dense, model, inputs), after)
    assert not torch.allclose(after, expected, rtol=1e-6, atol=1e-7)
    tokred.remove(model)
    assert torch.equal(answered(dense, model, inputs), expected)


def test_one_by_one_is_as_in_a_batch(dense: Small) -> None:
    model, inputs = dense.build(), dense.inputs(2)
    tokred.apply(model, SLIC(tau=5.0, k=4), schedule=Hourglass(0.5, down=1))
    both = answered(dense, model, inputs)
    if isinstance(inputs, Tensor):
        alone = [answered(dense, model, image[None]) for image in inputs]
    else:
        alone = [
            answered(dense, model, {name: value[i : i + 1] for name, value in inputs.items()})
            for i in range(2)
        ]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_the_grid_of_an_hourglass_is_the_one_that_is_made() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=4).eval()
    x = torch.randn(1, 3, 96, 96)
    for grid in ((4, 5), (5, 4), (3, 3)):
        reduction = tokred.apply(model, "slic", Hourglass(grid=grid, down=1))
        assert reduction.reducer == SLIC(grid=grid)
        assert tokred.inspect(model, x).stages[0].after == grid[0] * grid[1]
