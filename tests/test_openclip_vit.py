"""Of open_clip's towers alone: how dropped tokens stay out of pooling, and its timm towers."""

from __future__ import annotations

import open_clip
import pytest
import torch
from families.openclip_vit import SMALL, TEXT, tower

import tokred
from tokred.host import find_host
from tokred.patches import openclip_vit, timm_vit


@pytest.mark.parametrize("name", ["averaging", "averaging, norm after", "pooling by attention"])
@torch.no_grad()
def test_dropped_tokens_are_not_pooled(name: str) -> None:
    """What is pooled depends on the kept tokens alone: as if they had left the tower reduced."""
    model = SMALL[name].build()
    images = SMALL[name].inputs(2)
    tokred.apply(model, "topk", keep_rate=0.5)
    kept: list[torch.Tensor] = []
    model.ln_post.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    pooled = model(images)
    tokred.apply(model, "topk", keep_rate=0.5, full_grid=False)
    torch.testing.assert_close(model(images), pooled)
    if name == "averaging":
        assert [len(x[0]) for x in kept] == [1 + 2, 1 + 2]


@torch.no_grad()
def test_images_that_keep_different_numbers_are_pooled_one_by_one() -> None:
    for name in ("averaging", "pooling by attention"):
        model = SMALL[name].build()
        images = SMALL[name].inputs(4)
        images[2] = torch.nan  # of such an image, one token is kept
        tokred.apply(model, "ats", keep_rate=0.5)
        assert len(set(tokred.inspect(model, images).stages[-1].counts)) > 1
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(together, alone, equal_nan=True)


@torch.no_grad()
def test_tokens_beside_the_pooled_ones_are_a_full_grid() -> None:
    model = tower(pool_type="avg", output_tokens=True)
    images = torch.randn(2, 3, 64, 64)
    for method in ("tome", "topk"):
        tokred.apply(model, method, keep_rate=0.5)
        pooled, tokens = model(images)
        assert tokens.shape == (2, 16, 32)
        tokred.apply(model, method, keep_rate=0.5, full_grid=False)
        again, few = model(images)
        assert few.shape == (2, 2, 32)
        torch.testing.assert_close(again, pooled)


def test_the_text_tower_is_left_alone() -> None:
    model = SMALL["clip"].build()
    host, found = find_host(model)
    assert host is openclip_vit.HOST and found is model.visual


@torch.no_grad()
def test_towers_of_timm_are_patched_as_such() -> None:
    vision = {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
    }
    model = open_clip.CLIP(16, vision, TEXT).eval()
    model.visual.trunk.set_input_size((64, 64))
    images = torch.randn(2, 3, 64, 64)
    host, _ = find_host(model)
    assert host is timm_vit.HOST
    dense = model.encode_image(images)
    tokred.apply(model, "tome", keep_rate=0.5)
    assert not torch.allclose(model.encode_image(images), dense)


@torch.no_grad()
def test_features_of_the_layers_asked_for_are_full_grids() -> None:
    model = SMALL["clip"].build()
    tokred.apply(model, "tome", keep_rate=0.5)
    out = model.forward_intermediates(torch.randn(2, 3, 64, 64), image_indices=[1, -1])
    assert [tuple(x.shape) for x in out["image_intermediates"]] == [(2, 32, 4, 4)] * 2


@torch.no_grad()
def test_keys_of_custom_blocks_are_normed() -> None:
    model = SMALL["custom blocks"].build()
    keys: list[torch.Tensor] = []
    attention = model.transformer.resblocks[1].attn
    attention.ln_k.register_forward_hook(lambda _, args, output: keys.append(output))
    tokred.apply(model, "tome", keep_rate=0.5)
    model(SMALL["custom blocks"].inputs(2))
    ours, theirs = keys
    torch.testing.assert_close(ours, theirs)
