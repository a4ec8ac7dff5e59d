"""ViT-Adapter: its attention against a loop, its pyramid, and fewer tokens inside."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokred
from tokred.models.vit_adapter import (
    DeformableAttention,
    ViTAdapter,
    attend,
    centres,
    mask_rcnn,
)

METHODS = ["tome", "atc", "dpc_knn", "topk", "evit"]


def small_vit(**options: Any) -> nn.Module:
    sizes = {"img_size": 64, "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    chosen = {**sizes, "dynamic_img_size": True, **options}
    return timm.create_model("vit_tiny_patch16_224", **chosen)


def small_adapter(interactions: int = 4, **options: Any) -> ViTAdapter:
    """With weights as strong as trained ones, and a gamma that is not 0."""
    adapter = ViTAdapter(small_vit(**options), interactions, heads=2, stem_width=8)
    with torch.no_grad():
        for parameter in adapter.vit.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
        for injector in adapter.injectors:
            injector.gamma.uniform_(0.2, 0.6)
    return adapter.eval()


@torch.no_grad()
def pyramid(adapter: ViTAdapter, images: Tensor) -> list[Tensor]:
    return list(adapter(images))


# Multi-scale deformable attention.


def attend_slowly(
    value: np.ndarray, grids: list[tuple[int, int]], locations: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Deformable DETR, equation 3, a pixel at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    for b, q, m, level, k in np.ndindex(batch, queries, heads, levels, points):
        h, w = grids[level]
        start = sum(rows * columns for rows, columns in grids[:level])
        x = locations[b, q, m, level, k, 0] * w - 0.5  # pixels are squares around whole numbers
        y = locations[b, q, m, level, k, 1] * h - 0.5
        for row in range(h):
            for column in range(w):
                near = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                pixel = value[b, start + row * w + column, m]
                out[b, q, m] += weights[b, q, m, level, k] * near * pixel
    return out.reshape(batch, queries, -1)


GRIDS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**31))
def test_deformable_attention_is_the_loop(
    grids: list[tuple[int, int]], heads: int, points: int, batch: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    value = draw.normal(size=(batch, sum(h * w for h, w in grids), heads, 2))
    locations = draw.uniform(-0.5, 1.5, size=(batch, 3, heads, len(grids), points, 2))
    weights = draw.uniform(size=locations.shape[:-1])
    ours = attend(torch.tensor(value), grids, torch.tensor(locations), torch.tensor(weights))
    slow = attend_slowly(value, grids, locations, weights)
    torch.testing.assert_close(ours, torch.tensor(slow))


def test_the_module_looks_around_its_own_place_in_pixels() -> None:
    grids, at = [(4, 6), (2, 3)], centres([(2, 3)], torch.device("cpu"))
    module = DeformableAttention(8, 2, heads=2, points=3, value_ratio=0.5).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    query, value = torch.randn(2, 6, 8).double(), torch.randn(2, 30, 8).double()

    def linear(layer: nn.Linear, x: Tensor) -> np.ndarray:
        return x.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    offsets = linear(module.offsets, query).reshape(2, 6, 2, 2, 3, 2)
    locations = np.empty_like(offsets)
    for level, (h, w) in enumerate(grids):
        pixel = np.array([1 / w, 1 / h])
        locations[:, :, :, level] = at.numpy()[:, None, None] + offsets[:, :, :, level] * pixel
    shares = np.exp(linear(module.weights, query).reshape(2, 6, 2, 6))
    weights = (shares / shares.sum(-1, keepdims=True)).reshape(2, 6, 2, 2, 3)
    values = linear(module.value, value).reshape(2, 30, 2, 2)
    found = attend_slowly(values, grids, locations, weights)
    expected = linear(module.out, torch.tensor(found))
    torch.testing.assert_close(module(query, at, value, grids), torch.tensor(expected))


def test_heads_begin_with_a_direction_each() -> None:
    module = DeformableAttention(16, 1, heads=8, points=2)
    module.reset()
    offsets = module.offsets(torch.randn(1, 1, 16)).detach().view(8, 2, 2).round(decimals=4)
    neighbours = {(x, y) for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)} - {(0.0, 0.0)}
    assert {tuple(first) for first in (offsets[:, 0] + 0.0).tolist()} == neighbours
    torch.testing.assert_close(offsets[:, 1], 2 * offsets[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_of_large_maps_are_met_in_half_precision(dtype: torch.dtype) -> None:
    """In bfloat16 itself, places in a row of 200 pixels are rounded to whole pixels and more."""
    module = DeformableAttention(4, 1, heads=1, points=1).to(dtype)
    module.reset()
    nn.init.zeros_(module.offsets.bias)
    for layer in (module.value, module.out):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    value = torch.randn(1, 200, 4).to(dtype)
    at = centres([(1, 200)], torch.device("cpu"))
    found = module(torch.randn(1, 200, 4).to(dtype), at, value, [(1, 200)])
    torch.testing.assert_close(found, value)


def test_centres_are_in_the_middle_of_pixels() -> None:
    places = centres([(2, 2), (1, 4)], torch.device("cpu")).tolist()
    assert places[:4] == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert places[4:] == [[0.125, 0.5], [0.375, 0.5], [0.625, 0.5], [0.875, 0.5]]


# The dense model.


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 32)])
@pytest.mark.parametrize("interactions", [1, 2, 4])
def test_the_pyramid_has_strides_of_4_to_32(size: tuple[int, int], interactions: int) -> None:
    adapter = small_adapter(interactions).double()
    images = torch.randn(2, 3, *size).double()
    maps = pyramid(adapter, images)
    for one, stride in zip(maps, (4, 8, 16, 32), strict=True):
        assert one.shape == (2, 32, size[0] // stride, size[1] // stride)
        assert one.isfinite().all()
    alone = pyramid(adapter, images[1:])
    for one, both in zip(alone, maps, strict=True):
        torch.testing.assert_close(one, both[1:])


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@pytest.mark.parametrize(
    "options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}]
)
@torch.no_grad()
def test_with_gamma_0_the_transformer_runs_as_it_was(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    """Position embeddings, prefix tokens and the order of blocks are timm's."""
    vit = small_vit(**options).eval()
    images = torch.randn(2, 3, *size)
    expected = vit.forward_intermediates(images, 1, output_fmt="NLC", intermediates_only=True)[0]
    adapter = ViTAdapter(vit, 2, heads=2, stem_width=8).eval()
    seen: list[Tensor] = []
    adapter.extractors[-1].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    adapter(images)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("patch", [8, 14])
def test_patches_of_other_sizes_have_a_stride_of_16_too(patch: int) -> None:
    adapter = small_adapter(patch_size=patch, img_size=4 * patch)
    seen: list[Tensor] = []
    adapter.injectors[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    maps = pyramid(adapter, torch.randn(1, 3, 64, 96))
    assert seen[0].shape[1] == 4 * 6
    assert [tuple(one.shape[2:]) for one in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(
    ("width", "heads", "ratio", "millions"),
    [(192, 3, 1.0, 2.5), (384, 6, 1.0, 5.8), (768, 12, 0.5, 14.0), (1024, 16, 0.5, 23.7)],
)
def test_it_is_about_as_large_as_published(
    width: int, heads: int, ratio: float, millions: float
) -> None:
    with torch.device("meta"):
        vit = small_vit(embed_dim=width, num_heads=heads)
        adapter = ViTAdapter(vit, value_ratio=ratio)
    mine = {id(parameter) for parameter in vit.parameters()}
    count = sum(p.numel() for p in adapter.parameters() if id(p) not in mine)
    assert count / 1e6 == pytest.approx(millions, rel=0.03)


def test_what_it_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        ViTAdapter(small_vit(dynamic_img_size=False))
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        ViTAdapter(small_vit(patch_drop_rate=0.5))
    with pytest.raises(TypeError, match="vit must be a VisionTransformer of timm, not Linear"):
        ViTAdapter(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="divisor of the number of blocks, 4, not 3"):
        ViTAdapter(small_vit(), 3)
    with pytest.raises(ValueError, match=r"divisor of the width of the values, 16 .*, not 6"):
        ViTAdapter(small_vit(), value_ratio=0.5)
    with pytest.raises(ValueError, match="extra_extractors must be at least 0, not -1"):
        ViTAdapter(small_vit(), extra_extractors=-1, heads=2)
    with pytest.raises(ValueError, match="multiples of 32, not 64 and 80"):
        small_adapter()(torch.zeros(1, 3, 64, 80))


def test_weights_can_be_saved_and_loaded() -> None:
    adapter, images = small_adapter(), torch.randn(1, 3, 64, 64)
    dense, keys = pyramid(adapter, images), list(adapter.state_dict())
    other = ViTAdapter(small_vit(), heads=2, stem_width=8).eval()
    tokred.apply(adapter, "tome", keep_rate=0.5)
    assert list(adapter.state_dict()) == keys
    other.load_state_dict(adapter.state_dict())
    assert all(map(torch.equal, pyramid(other, images), dense))


# Fewer tokens.


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_changes_nothing(method: str) -> None:
    adapter, images = small_adapter(), torch.randn(2, 3, 64, 96)
    dense = pyramid(adapter, images)
    with pytest.warns(UserWarning, match="nothing is reduced"):
        tokred.apply(adapter, method, keep_rate=1.0)
    assert all(map(torch.equal, pyramid(adapter, images), dense))
    tokred.apply(adapter, method, keep_rate=0.5)
    assert not any(map(torch.equal, pyramid(adapter, images), dense))
    tokred.remove(adapter)
    assert all(map(torch.equal, pyramid(adapter, images), dense))


@pytest.mark.parametrize("method", [*METHODS, "slic"])
@pytest.mark.parametrize("interactions", [2, 4])
@torch.no_grad()
def test_blocks_see_few_tokens_and_the_adapter_all(method: str, interactions: int) -> None:
    adapter = small_adapter(interactions, img_size=(96, 64))
    images = torch.randn(2, 3, 96, 64)
    dense = adapter(images)
    # Six are a grid, too: 3x2 of 6x4.
    tokred.apply(adapter, method, tokred.Exactly((24, 6, 6, 6)))
    inside: list[int] = []
    outside: list[int] = []
    for block in adapter.vit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: inside.append(args[0].shape[1] - 1))
    for part in adapter.injectors:
        part.register_forward_pre_hook(lambda _, args: outside.append(args[0].shape[1]))
    for part in adapter.extractors:
        part.register_forward_pre_hook(lambda _, args: outside.append(args[2].shape[1]))
    first, again = adapter(images), adapter(images)
    assert inside == [24, 6, 6, 6] * 2
    assert outside == [24] * (2 * (2 * interactions + 2))
    for one, two, before in zip(first, again, dense, strict=True):
        assert one.shape == before.shape and one.isfinite().all()
        assert torch.equal(one, two)
        assert not torch.allclose(one, before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_methods_that_need_a_grid_get_that_of_the_images() -> None:
    adapter = small_adapter()  # made for 4x4
    tokred.apply(adapter, "slic", keep_rate=0.25)
    inside: list[int] = []
    for block in adapter.vit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: inside.append(args[0].shape[1] - 1))
    for size, few in (((96, 64), 3 * 2), ((64, 128), 2 * 4), ((64, 64), 2 * 2)):
        inside.clear()
        assert all(one.isfinite().all() for one in adapter(torch.randn(1, 3, *size)))
        assert inside == [4 * few, few, few, few]


@torch.no_grad()
def test_tokens_are_merged_again_as_they_were_merged_before() -> None:
    """What goes on behind an injector is the mean of what it has put out."""
    adapter, images = small_adapter(2), torch.randn(2, 3, 64, 64)
    reduction = tokred.apply(adapter, "tome", tokred.Exactly((16, 9, 9, 9)))
    given: list[Tensor] = []
    injected: list[Tensor] = []
    entered: list[Tensor] = []
    adapter.injectors[1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    adapter.injectors[1].register_forward_hook(lambda _, args, output: injected.append(output))
    adapter.vit.blocks[2].norm1.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with reduction.recording() as records:
        adapter(images)
    (record,) = records
    expected = record.map.down(injected[0], torch.ones(2, 16))
    torch.testing.assert_close(entered[0][:, 1:], expected)
    for sample, labels in zip(given[0], record.map.labels(), strict=True):
        firsts = [labels.tolist().index(label) for label in labels.tolist()]
        assert torch.equal(sample, sample[firsts]), "copies, where their members stood"
    assert not torch.allclose(injected[0], given[0])


def test_gradient_checkpointing_computes_the_same() -> None:
    adapter, images = small_adapter(2), torch.randn(2, 3, 64, 64)
    tokred.apply(adapter, "tome", keep_rate=0.5)

    def gradients() -> list[Tensor]:
        adapter.zero_grad()
        sum(one.square().mean() for one in adapter(images)).backward()
        return [p.grad.clone() for p in adapter.parameters() if p.grad is not None]

    expected = gradients()
    adapter.set_grad_checkpointing()
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)


# Mask R-CNN.

FEW: dict[str, Any] = {
    "min_size": 64, "max_size": 96, "rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 10,
    "rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 10, "box_detections_per_img": 5,
    "box_score_thresh": 0.0, "box_batch_size_per_image": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    return mask_rcnn(small_adapter(), num_classes=3, out_channels=16, **FEW)


def fresh(detector: nn.Module) -> nn.Module:
    return copy.deepcopy(detector)


@pytest.mark.parametrize("method", [None, "tome", "topk"])
@torch.no_grad()
def test_mask_rcnn_finds_boxes_and_masks(detector: nn.Module, method: str | None) -> None:
    model = fresh(detector).eval()
    if method is not None:
        tokred.apply(model, method, keep_rate=0.5)
    images = [torch.rand(3, 64, 64), torch.rand(3, 60, 90)]
    for image, found in zip(images, model(images), strict=True):
        height, width = image.shape[1:]
        assert found["boxes"].shape == (len(found["labels"]), 4) and len(found["labels"]) > 0
        assert found["masks"].shape == (len(found["labels"]), 1, height, width)
        assert all(one.isfinite().all() for one in found.values())
        assert (found["boxes"][:, 2] <= width).all() and (found["boxes"][:, 3] <= height).all()


@pytest.mark.parametrize("method", [None, "tome"])
def test_mask_rcnn_can_be_trained(detector: nn.Module, method: str | None) -> None:
    model = fresh(detector).train()
    adapter = model.backbone.adapter
    nn.init.zeros_(adapter.injectors[1].gamma)  # as it begins
    if method is not None:
        tokred.apply(model, method, keep_rate=0.5)
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 10:50, 8:40] = 1
    target = {
        "boxes": torch.tensor([[8.0, 10.0, 40.0, 50.0]]),
        "labels": torch.tensor([1]),
        "masks": mask,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = model([torch.rand(3, 64, 64) for _ in range(2)], [target, target])
    assert set(losses) >= {"loss_mask", "loss_box_reg", "loss_objectness"}
    loss = sum(losses.values())
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    for name, parameter in adapter.named_parameters():
        if not name.startswith(("vit.norm.", "vit.head.")):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for injector in adapter.injectors:
        assert injector.gamma.grad.abs().max() > 0
    assert adapter.injectors[1].gamma.abs().max() > 0


def test_the_reduction_is_found_inside_of_a_detector(detector: nn.Module) -> None:
    model = fresh(detector)
    tokred.apply(model, "tome", keep_rate=0.5)
    patched = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert patched == [f"backbone.adapter.vit.blocks.{layer}" for layer in range(4)]
    tokred.remove(model)
    assert not any({"forward", "interact"} & vars(module).keys() for module in model.modules())


def test_mask_rcnn_wants_an_adapter() -> None:
    with pytest.raises(TypeError, match="ViTAdapter"):
        mask_rcnn(small_vit(), 2)
