"""How close a reduced model stays to the dense one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Digits, images_for, small
from families.transformers_maskless import SMALL
from torch import Tensor

import tokred
from tokred.data import zoo
from tokred.measure.fidelity import decisions


def test_it_is_what_a_loop_over_tokens_and_images_says(digits: Digits) -> None:
    model, images, _ = digits()
    images = images[:24]
    with torch.no_grad():
        dense, answers = _both(model, images)
        tokred.apply(model, "tome", 0.25)
        ours, decided = _both(model, images)
    cosines = [
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for image_a, image_b in zip(ours.double().numpy(), dense.double().numpy(), strict=True)
        for a, b in zip(image_a[1:], image_b[1:], strict=True)
    ]
    found = tokred.fidelity(model, images.split(10))
    assert found.images == 24
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    same = np.mean(answers.argmax(1).numpy() == decided.argmax(1).numpy())
    assert found.agreement == pytest.approx(same)
    assert found.agreement < 1 and found.depth_error is None
    assert "over 24 images" in str(found) and found.as_dict()["images"] == 24
    assert tokred.patching.reduction_of(model) is not None


def _both(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    kept: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda _m, _a, out: kept.append(out))
    answer = model(images)
    handle.remove()
    return kept[0], answer


def test_depth_is_compared_as_depth() -> None:
    small_depth = SMALL["dpt, depth"]
    model = small_depth.build()
    inputs = small_depth.inputs(2)
    with torch.no_grad():
        dense = model(**inputs).predicted_depth
        tokred.apply(model, "tome", 0.25)
        reduced = model(**inputs).predicted_depth
    there = dense > 0
    expected = ((reduced - dense).abs()[there] / dense[there]).mean()
    found = tokred.fidelity(model, inputs)
    assert found.depth_error == pytest.approx(float(expected), rel=1e-4)
    assert found.agreement is None


def test_pixels_and_queries_have_classes() -> None:
    scores = torch.randn(2, 5, 4, 6)
    assert torch.equal(decisions(scores).chosen, scores.argmax(1))
    output = transformers.modeling_outputs.SemanticSegmenterOutput(logits=scores)
    assert torch.equal(decisions(output).chosen, scores.argmax(1))
    queries = transformers.models.yolos.modeling_yolos.YolosObjectDetectionOutput(
        logits=torch.randn(2, 7, 3)
    )
    assert decisions(queries).chosen.shape == (2, 7)
    both = transformers.models.mask2former.modeling_mask2former
    mask2former = both.Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=torch.randn(2, 7, 4), masks_queries_logits=torch.randn(2, 7, 8, 9)
    )
    chosen = decisions(mask2former).chosen
    assert chosen.shape == (2, 8, 9) and chosen.max() < 3


@torch.no_grad()
def test_maps_of_channels_first_are_compared_token_by_token() -> None:
    config = transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=4,
        pretrain_image_size=32, window_size=4, window_block_indices=[0, 2],
    )  # fmt: skip
    model = transformers.VitDetModel(config).eval()
    x = torch.randn(2, 3, 32, 32)
    dense = model(x).last_hidden_state
    tokred.apply(model, "slic", 0.5)
    few = model(x).last_hidden_state
    expected = torch.nn.functional.cosine_similarity(few.double(), dense.double(), dim=1).mean()
    found = tokred.fidelity(model, x)
    assert found.cosine == pytest.approx(float(expected)) and found.cosine < 0.999


@pytest.mark.parametrize("name", ["digits_scenes", "digits_swin"])
def test_clustering_is_closer_than_pooling_and_interpolation(name: str) -> None:
    """At the same number of tokens, on trained models (tables 4 and 5 of Liang et al.)."""
    model, images = zoo.load(name), zoo.normalise(zoo.held_out(name).images[:8])
    schedule = tokred.Hourglass(0.5, down=4)
    found = []
    for method, reconstruction in (("slic", None), (tokred.SLIC(iterations=0), "bilinear")):
        with tokred.applied(model, method, schedule, reconstruction=reconstruction):
            found.append(tokred.fidelity(model, images))
    ours, baseline = found
    assert 1 - ours.cosine < 0.5 * (1 - baseline.cosine)
    assert ours.agreement is not None and baseline.agreement is not None
    assert 1 - ours.agreement < 0.5 * (1 - baseline.agreement)


def test_there_must_be_something_to_compare() -> None:
    model = small("vit")
    images = images_for(model)
    with pytest.raises(ValueError, match="no reduction is applied"):
        tokred.fidelity(model, images)
    tokred.apply(model, "tome", full_grid=False)
    with pytest.raises(ValueError, match="full_grid=True"):
        tokred.fidelity(model, images)
    tokred.apply(model, "tome")
    with pytest.raises(ValueError, match="at least one image"):
        tokred.fidelity(model, [])
