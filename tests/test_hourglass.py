"""Few tokens in the middle, all of them before and behind, and what the full grid is made of."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import references_slic as slow_slic
import timm
import torch
from conftest import images_for, small
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tokred
from tokred import SLIC, Bilinear, Hourglass, Nearest
from tokred.maps import Clusters, Weighted

METHODS = ["tome", "atc", "dpc_knn", "evit", "topk", "slic"]
Build = Callable[[str], nn.Module]


def lengths_of(model: nn.Module, images: Tensor) -> list[int]:
    """Tokens that enter the attention of each block."""
    seen: list[int] = []
    handles = [
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@given(st.integers(1, 400), st.integers(1, 32), st.floats(0.01, 1), st.data())
def test_the_schedule_is_full_few_full(
    tokens: int, layers: int, rate: float, data: st.DataObject
) -> None:
    down = data.draw(st.integers(0, layers - 1))
    up = data.draw(st.integers(down + 1, layers))
    counts = Hourglass(rate, down=down, up=up)(tokens, layers)
    assert len(counts) == layers
    assert all(count == tokens for count in counts[:down] + counts[up:])
    few = set(counts[down:up])
    assert len(few) == 1
    assert tokens * rate - 1 < max(few.pop(), 1) + 1e-6 <= max(tokens * rate, 1) + 1e-3


def test_a_grid_in_place_of_a_rate() -> None:
    assert Hourglass(grid=(3, 5), down=1, up=3)(36, 4) == [36, 15, 15, 36]
    assert Hourglass(0.5)(100, 12) == [100] * 4 + [50] * 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "one of keep_rate and grid"),
        ({"keep_rate": 0.5, "grid": (2, 2)}, ValueError, "one of keep_rate and grid"),
        ({"keep_rate": 1.5}, ValueError, r"keep_rate must be in \(0, 1\]"),
        ({"keep_rate": "half"}, TypeError, "keep_rate must be a number"),
        ({"grid": (2, 0)}, ValueError, "grid must be two positive integers"),
        ({"grid": (2, 2, 2)}, ValueError, "grid must be two positive integers"),
        ({"keep_rate": 0.5, "down": -1}, ValueError, "down must be an integer of at least 0"),
        ({"keep_rate": 0.5, "down": 3, "up": 3}, ValueError, "up must be an integer above down"),
    ],
)
def test_what_an_hourglass_cannot_be(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Hourglass(**options)  # type: ignore[arg-type]


def test_an_hourglass_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit a model of 4 layers"):
        Hourglass(0.5, down=2, up=5)(16, 4)
    with pytest.raises(ValueError, match="at most 16 cells"):
        Hourglass(grid=(5, 5))(16, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reconstruction", [None, "copy", "nearest"])
def test_layers_in_the_middle_see_few_tokens(method: str, reconstruction: str | None) -> None:
    model = small("dinov2, registers")
    images = images_for(model)
    prefix, full = model.num_prefix_tokens, 25
    with torch.no_grad():
        dense = model.forward_features(images)
    tokred.apply(
        model, method, schedule=Hourglass(grid=(3, 3), down=1, up=3), reconstruction=reconstruction
    )
    # Methods between attention and MLP let the attention of their own layer see all.
    first = full if method in ("tome", "atc", "evit", "topk") else 9
    assert lengths_of(model, images) == [n + prefix for n in (full, first, 9, full)]
    with torch.no_grad():
        features = model.forward_features(images)
        again = model.forward_features(images)
    assert features.shape == dense.shape and features.isfinite().all()
    assert torch.equal(features, again)
    assert not torch.allclose(features, dense, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_middle_is_undone_as_the_reconstruction_says(method: str) -> None:
    """Behind the last block that sees few tokens: each token is the weighted mean of those that
    resembled it when they became few."""
    model = small("vit")
    images = images_for(model)
    nearest = Nearest(k=3, tau=20.0)
    tokred.apply(
        model, method, schedule=Hourglass(grid=(3, 3), down=1, up=3), reconstruction=nearest
    )
    few: list[Tensor] = []
    full: list[Tensor] = []
    model.blocks[2].register_forward_hook(lambda _m, _a, out: few.append(out))
    model.blocks[3].norm1.register_forward_pre_hook(lambda _m, args: full.append(args[0]))
    with torch.no_grad():
        trace = tokred.inspect(model, images)
    token_map = trace.stages[0].map
    assert isinstance(token_map, Weighted)
    torch.testing.assert_close(token_map.weight.sum(-1), torch.ones(2, 16))
    for b in range(2):
        for n in range(16):
            parts = zip(token_map.index[b, n], token_map.weight[b, n], strict=True)
            expected = sum(w * few[0][b, 1 + i] for i, w in parts)
            torch.testing.assert_close(full[0][b, 1 + n], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full[0][:, 0], few[0][:, 0])


@pytest.mark.parametrize("copies", ["nearest", "assigned"])
def test_copies_of_soft_clusters_are_of_the_nearest_centre_or_of_the_last_round(
    copies: str,
) -> None:
    model = small("vit")
    images = images_for(model)
    slic = SLIC(iterations=1, tau=50.0, copies=copies)
    tokred.apply(model, slic, Hourglass(grid=(3, 3), down=1, up=3), reconstruction="copy")
    seen: dict[str, Tensor] = {}
    for name, block in {"before": model.blocks[0], "few": model.blocks[2]}.items():
        block.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out[:, 1:]}))
    model.blocks[3].norm1.register_forward_pre_hook(
        lambda _m, args: seen.update(full=args[0][:, 1:])
    )
    with torch.no_grad():
        labels = tokred.inspect(model, images).stages[0].map.labels()
    nearest = []
    for tokens in seen["before"]:
        centres = slow_slic.cluster(tokens.view(4, 4, -1).double().numpy(), (3, 3), 5, 1, 50.0)
        distance = (tokens[:, None].double() - torch.from_numpy(centres)).square().sum(-1)
        nearest.append(distance.argmin(1))
    assert not torch.equal(torch.stack(nearest), labels)  # or this test could not fail
    wanted = torch.stack(nearest) if copies == "nearest" else labels
    copied = torch.stack([few[index] for few, index in zip(seen["few"], wanted, strict=True)])
    assert torch.equal(seen["full"], copied)


def test_which_copies_there_are_is_named() -> None:
    with pytest.raises(ValueError, match="copies must be 'nearest' or 'assigned', not 'first'"):
        SLIC(copies="first")
    assert tokred.reducers.traits(SLIC(iterations=0)).copying is None  # pooling has cells


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "mae, average pooling", "siglip, attention pooling"])
def test_keeping_everything_is_the_dense_model(name: str, method: str) -> None:
    model = small(name)
    images = images_for(model)
    with torch.no_grad():
        dense = model(images)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tokred.apply(model, method, schedule=Hourglass(1.0), reconstruction="nearest")
        assert torch.equal(model(images), dense)


@pytest.mark.parametrize("method", ["slic", "topk", "tome"])
def test_tapped_layers_hand_out_the_full_grid_and_change_nothing(method: str) -> None:
    """Seeing the full grid in between does not change what comes after, though tokens made of
    several others cannot be had back from it."""
    model = small("deit3, LayerScale")
    images = images_for(model)
    tokred.apply(model, method, schedule=Hourglass(0.5, down=1), reconstruction="nearest")
    with torch.no_grad():
        final, taken = model.forward_intermediates(images, output_fmt="NLC", indices=[1, 2])
        assert all(one.shape[1] == 16 and one.isfinite().all() for one in taken)
        torch.testing.assert_close(final, model.forward_features(images), rtol=1e-5, atol=1e-5)


def test_a_full_grid_that_was_changed_is_merged_anew() -> None:
    """As the injectors of a ViT-Adapter do."""
    model = small("vit")
    images = images_for(model)
    reduction = tokred.apply(model, SLIC(tau=5.0), schedule=Hourglass(0.5, down=1))
    reduction.set_tapped(frozenset({1}))
    seen: list[Tensor] = []
    model.blocks[2].norm1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        for layer, block in enumerate(model.blocks):
            x = block(x)
            if layer == 1:
                x = changed = x + torch.randn_like(x)
    (record,) = [stage.map for stage in tokred.inspect(model, images).stages]
    assert x.shape[1] == 17 and seen[0].shape[1] < 17
    merged = record.down(changed[:, 1:], torch.ones(2, 16))
    torch.testing.assert_close(seen[0][:, 1:], merged)


@torch.no_grad()
def test_what_was_dropped_changes_with_the_full_grid() -> None:
    """What an injector of a ViT-Adapter adds is not lost on tokens that are dropped just then."""
    model = small("vit")
    images = images_for(model)
    reduction = tokred.apply(model, "topk", schedule=Hourglass(0.5, down=1))
    reduction.set_tapped(frozenset({1}))
    x = model._pos_embed(model.patch_embed(images))
    for layer, block in enumerate(model.blocks):
        x = block(x)
        if layer == 1:
            x = changed = x + torch.randn_like(x)
    dropped = tokred.inspect(model, images).stages[0].labels.flatten(1) < 0
    assert dropped.sum(1).tolist() == [8, 8]
    assert torch.equal(x[:, 1:][dropped], changed[:, 1:][dropped])
    assert not torch.isclose(x[:, 1:][~dropped], changed[:, 1:][~dropped]).all()


@pytest.mark.parametrize("method", ["slic", "atc", "topk"])
def test_an_hourglass_compiles_in_one_graph(method: str) -> None:
    model = small("vit")
    images = images_for(model)
    tokred.apply(model, method, schedule=Hourglass(0.5, down=1, up=3), reconstruction="nearest")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(images), expected)
        _, taken = model.forward_intermediates(images, output_fmt="NLC", indices=[1])
        both = torch.compile(
            lambda x: model.forward_intermediates(x, output_fmt="NLC", indices=[1]),
            fullgraph=True,
            backend="eager",
        )(images)
        torch.testing.assert_close(both[1][0], taken[0])
        torch.testing.assert_close(both[0], model.forward_features(images))


def test_copies_and_pickles_go_on(plain: nn.Module, images: Tensor) -> None:
    tokred.apply(plain, "slic", 0.5)
    with torch.no_grad():
        expected = plain(images)
        assert torch.equal(copy.deepcopy(plain)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(plain))(images), expected)


def test_the_grid_is_that_of_the_images() -> None:
    """2x8 patches are as many as 4x4: only the convolution that makes them knows."""
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=4, img_size=64, dynamic_img_size=True
    ).eval()
    tokred.apply(model, SLIC(grid=(2, 2)), schedule=Hourglass(grid=(2, 2), down=1))
    seen = []
    with torch.no_grad():
        for size in ((32, 128), (128, 32), (64, 64)):
            trace = tokred.inspect(model, torch.randn(1, 3, *size))
            seen.append(trace.stages[0].map.labels()[0].tolist())
    assert len({tuple(labels) for labels in seen}) == 3
    assert all(max(labels) == 3 for labels in seen)


@pytest.mark.parametrize("chosen", ["nearest", "bilinear", "copy", Nearest(2, 5.0), Bilinear()])
def test_reconstructions_by_name_and_by_value(
    chosen: object, plain: nn.Module, images: Tensor
) -> None:
    reduction = tokred.apply(plain, "slic", 0.5, reconstruction=chosen)  # type: ignore[arg-type]
    assert isinstance(reduction.reconstruction, Nearest | Bilinear)
    assert (reduction.reconstruction == Nearest(k=1)) == (chosen == "copy")
    merging = tokred.apply(plain, "tome", 0.5, reconstruction=chosen)  # type: ignore[arg-type]
    assert (merging.reconstruction is None) == (chosen == "copy")
    tokred.apply(plain, "slic", 0.5, reconstruction=chosen)  # type: ignore[arg-type]
    with torch.no_grad():
        assert plain.forward_features(images).shape == (2, 17, 192)


def test_what_reconstruction_cannot_be(plain: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"reconstruction must be one of .*bilinear.*not 'linear'"):
        tokred.apply(plain, "tome", reconstruction="linear")
    with pytest.raises(TypeError, match=r"a value such as tokred.Nearest\(\)"):
        tokred.apply(plain, "tome", reconstruction=Nearest)
    with pytest.raises(ValueError, match="reconstruction must be 'copy'"):
        tokred.apply(plain, "ats", reconstruction="nearest")
    assert not tokred.patching.reduction_of(plain)
    tokred.apply(plain, "tome", 0.5, reconstruction="bilinear")
    with pytest.raises(ValueError, match="grid"):
        plain(images)


def test_weighted_goes_down_as_its_map_and_up_as_it_says() -> None:
    clusters = Clusters(torch.tensor([[0, 0, 1], [0, 1, 1]]), 2)
    weight = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    both = Weighted(clusters, torch.tensor([[[0, 1], [1, 0], [0, 1]]]), weight[None])
    x, size = torch.randn(2, 3, 4), torch.ones(2, 3)
    y = both.down(x, size)
    assert torch.equal(y, clusters.down(x, size))
    up = both.up(y)
    torch.testing.assert_close(up[:, 0], 0.25 * y[:, 0] + 0.75 * y[:, 1])
    torch.testing.assert_close(up[:, 1], y[:, 1])
    half = both.up(y.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), up, rtol=2e-2, atol=2e-2)


def test_presets_are_the_papers_tables() -> None:
    assert len(tokred.presets) == 11
    preset = tokred.presets["segmenter-ade20k"]
    counts = preset.schedule(40 * 40, 24)
    assert counts == [1600] * 10 + [784] * 14
    for name, one in tokred.presets.items():
        swin = one.model.startswith("Swin")
        layers = 18 if swin else 32 if "H/14" in one.model else 12 if "ViT-B" in one.model else 24
        counts = one.schedule(one.grid[0] * one.grid[1], layers)
        rows, columns = one.reducer.grid
        assert counts[-1] == rows * columns == one.reducer.fit(1, one.grid), name


def test_a_preset_brings_its_own_schedule() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=480, embed_dim=32, num_heads=2, depth=24
    ).eval()
    preset = tokred.presets["segmenter-pascal-context"]
    with pytest.raises(ValueError, match="a preset has a schedule of its own"):
        tokred.apply(model, preset, keep_rate=0.5)
    tokred.apply(model, preset)
    assert lengths_of(model, torch.randn(1, 3, 480, 480)) == [901] * 14 + [226] * 10
