"""The segmenter: a class for every pixel, whatever is merged inside its encoder."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import HybridEmbed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tokred
from tokred.models.segmenter import LinearDecoder, MaskTransformer, Segmenter, mean_iou


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return VisionTransformer(**(size | {"num_classes": 5} | options)).eval()


def small(decoder: str = "linear", **options: object) -> Segmenter:
    encoder = vit(**options)
    made: dict[str, nn.Module] = {
        "linear": LinearDecoder(32, 7),
        "mask": MaskTransformer(32, 7, width=24, heads=3),
    }
    return Segmenter(encoder, made[decoder]).eval()


every_decoder = pytest.mark.parametrize("decoder", ["linear", "mask"])


def slow_mean_iou(predicted: np.ndarray, target: np.ndarray, num_classes: int) -> float:
    ious = []
    for cls in range(num_classes):
        intersection = union = 0
        for p, t in zip(predicted.ravel(), target.ravel(), strict=True):
            intersection += p == cls and t == cls
            union += p == cls or t == cls
        if union:
            ious.append(intersection / union)
    return sum(ious) / len(ious)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.integers(0, 2**31),
)
def test_mean_iou_is_what_a_loop_over_pixels_finds(
    num_classes: int, shape: tuple[int, int, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    predicted, target = random.integers(num_classes, size=(2, *shape))
    found = mean_iou(torch.from_numpy(predicted), torch.from_numpy(target), num_classes)
    assert found == pytest.approx(slow_mean_iou(predicted, target, num_classes), abs=1e-12)


def test_mean_iou_by_hand() -> None:
    target = torch.tensor([[[0, 0], [1, 1]]])
    # Background 1 of 2, class 1 2 of 3; class 2 is nowhere, and left out.
    predicted = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.uint8)
    assert mean_iou(predicted, target, 3) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_mean_iou_refuses_what_it_cannot_compare() -> None:
    ones = torch.ones(1, 2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"one shape, not \(1, 2, 2\) and \(2, 2\)"):
        mean_iou(ones, ones[0], 3)
    with pytest.raises(ValueError, match="target must hold classes 0 to 2, not 255"):
        mean_iou(ones, 255 * ones, 3)
    with pytest.raises(ValueError, match="predicted must hold classes 0 to 2, not -1"):
        mean_iou(-ones, ones, 3)
    with pytest.raises(ValueError, match="no pixels"):
        mean_iou(ones[:0], ones[:0], 3)


def slow_bilinear(scores: np.ndarray, patch: int) -> np.ndarray:
    """Values between patch centres; beyond the outermost ones, theirs."""
    height, width = scores.shape
    out = np.empty((height * patch, width * patch))
    for i in range(height * patch):
        for j in range(width * patch):
            y = min(max((i + 0.5) / patch - 0.5, 0), height - 1)
            x = min(max((j + 0.5) / patch - 0.5, 0), width - 1)
            top, left = int(y), int(x)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            above = (1 - dx) * scores[top, left] + dx * scores[top, right]
            under = (1 - dx) * scores[below, left] + dx * scores[below, right]
            out[i, j] = (1 - dy) * above + dy * under
    return out


@every_decoder
def test_pixels_lie_between_the_scores_of_patches(decoder: str) -> None:
    model, images = small(decoder, dynamic_img_size=True), torch.randn(2, 3, 24, 16)
    with torch.no_grad():
        logits = model(images)
        scores = model.decoder(model.encoder.forward_features(images)[:, 1:])
    for sample, cls in ((0, 0), (1, 6)):
        patches = scores[sample, :, cls].double().numpy().reshape(6, 4)
        np.testing.assert_allclose(logits[sample, cls], slow_bilinear(patches, 4), atol=1e-5)


@every_decoder
@pytest.mark.parametrize("size", [(32, 32), (48, 20)])
def test_images_of_other_sizes_and_shapes(decoder: str, size: tuple[int, int]) -> None:
    model = small(decoder, dynamic_img_size=True, reg_tokens=2)
    assert model(torch.randn(1, 3, *size)).shape == (1, 7, *size)


def test_an_encoder_that_pads_gives_the_pixels_of_the_image() -> None:
    torch.manual_seed(1)
    model = small(dynamic_img_size=True, dynamic_img_pad=True)
    images = torch.randn(1, 3, 30, 25)
    padded = F.pad(images, (0, 3, 0, 2))
    torch.testing.assert_close(model(images), model(padded)[:, :, :30, :25])


def test_an_encoder_may_begin_with_convolutions() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    embed = partial(HybridEmbed, backbone=stem)
    model = small(dynamic_img_size=True, patch_size=2, embed_layer=embed)  # 2 of 4 pixels each
    assert model.encoder.patch_embed.grid_size == (4, 4)
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 7, 32, 48)


def test_of_a_swin_the_last_stage_is_decoded() -> None:
    torch.manual_seed(3)
    encoder = SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4
    )
    model, images = Segmenter(encoder, LinearDecoder(32, 7)).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits, last = model(images), encoder.forward_features(images)
        scores = model.decoder.head(last)
    assert last.shape == (2, 8, 8, 32) and logits.shape == (2, 7, 32, 32)
    patches = scores[1, :, :, 5].double().numpy()
    np.testing.assert_allclose(logits[1, 5], slow_bilinear(patches, 4), atol=1e-5)


def slow_masks(decoder: MaskTransformer, tokens: Tensor) -> np.ndarray:
    """Section 3.2 for one image, pixel by pixel, behind the blocks."""
    with torch.no_grad():
        x = torch.cat([decoder.project(tokens), decoder.classes], 1)
        for block in decoder.blocks:
            x = block(x)
        x = decoder.norm(x)[0].double().numpy()
    patch = decoder.patch_projection.weight.detach().double().numpy()
    cls = decoder.class_projection.weight.detach().double().numpy()
    num = tokens.shape[1]
    masks = np.zeros((num, len(x) - num))
    for i in range(num):
        z = patch @ x[i]
        for k in range(len(x) - num):
            c = cls @ x[num + k]
            masks[i, k] = z @ c / np.linalg.norm(z) / np.linalg.norm(c)
        masks[i] = (masks[i] - masks[i].mean()) / np.sqrt(masks[i].var() + 1e-5)
    return masks


def test_masks_are_products_of_patches_and_class_embeddings() -> None:
    torch.manual_seed(2)
    decoder = MaskTransformer(16, 5, depth=1, heads=2).eval()
    nn.init.normal_(decoder.classes)
    tokens = torch.randn(1, 12, 16)
    found = decoder(tokens)[0].detach().double().numpy()
    np.testing.assert_allclose(found, slow_masks(decoder, tokens), atol=2e-5)


@every_decoder
def test_a_step_of_training_reaches_every_weight(decoder: str) -> None:
    model = small(decoder, num_classes=0).train()
    logits = model(torch.randn(2, 3, 32, 32))
    F.cross_entropy(logits, torch.randint(7, (2, 32, 32))).backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None]
    assert untouched == []


@every_decoder
@pytest.mark.parametrize("method", ["tome", "atc", "dpc_knn", "topk", "evit"])
def test_the_encoder_is_reduced_and_every_pixel_answered(decoder: str, method: str) -> None:
    model, images = small(decoder), torch.randn(2, 3, 32, 32)
    dense = model(images)
    counts: list[int] = []
    for block in model.encoder.blocks:
        block.mlp.register_forward_hook(lambda _, args, out: counts.append(out.shape[1] - 1))
    tokred.apply(model, method, schedule=tokred.Exactly((64, 40, 32, 32)))
    logits = model(images)
    assert logits.shape == dense.shape and bool(logits.isfinite().all())
    assert counts == [64, 40, 32, 32]
    assert not torch.equal(logits, dense)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
    tokred.remove(model)
    torch.testing.assert_close(model(images), dense, rtol=0, atol=0)


@every_decoder
def test_equal_patches_are_merged_for_nothing(decoder: str) -> None:
    """Without position embeddings, patches of one look cannot be told apart: merging them, with
    proportional attention, changes no pixel."""
    model = small(decoder, pos_embed="none")
    looks = torch.randn(4, 3, 4, 4)
    which = torch.arange(64).view(8, 8) // 2 % 4  # ToMe pairs even tokens with odd ones
    image = looks[which].permute(2, 0, 3, 1, 4).reshape(1, 3, 32, 32)
    dense = model(image)
    with tokred.applied(model, "tome", schedule=tokred.Exactly((64, 32, 32, 32))):
        torch.testing.assert_close(model(image), dense, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_a_segmenter_is_refused() -> None:
    convolutional = timm.create_model("resnet10t")
    with pytest.raises(TypeError, match="a timm VisionTransformer or SwinTransformer, not ResNet"):
        Segmenter(convolutional, LinearDecoder(32, 7))
    with pytest.raises(ValueError, match="heads must divide the decoder's width, 24; 5 does not"):
        MaskTransformer(32, 7, width=24, heads=5)
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        MaskTransformer(32, 7, depth=0)
