"""What only timm's vision transformers can do: masks, changes of the model after `apply`, heads."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import Small, timm_beit, timm_relpos, timm_vit
from torch import Tensor, nn

import tokred
from tokred.host import find_host

SMALL: dict[str, Small] = {
    "vit": timm_vit.SMALL["average pooling"],
    "beit": timm_beit.SMALL["beit"],
    "beit, shared": timm_beit.SMALL["shared biases"],
    "relpos": timm_relpos.SMALL["mlp"],
}


@pytest.fixture(params=SMALL, ids=lambda name: name.replace(", ", "-"))
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return SMALL[request.param].build()


@pytest.fixture
def images() -> Tensor:
    return timm_vit.images(2)


@torch.no_grad()
def test_a_new_input_size_is_followed(model: nn.Module, images: Tensor) -> None:
    if not hasattr(model, "set_input_size"):
        pytest.skip("this version of timm cannot change the input size")
    reduction = tokred.apply(model, "tome", keep_rate=0.5)
    model(images)
    model.set_input_size(img_size=(96, 64))
    assert reduction.layout.grid == (6, 4)
    tall = torch.randn(2, 3, 96, 64)
    after = model(tall)
    assert tokred.inspect(model, tall).grid == (6, 4)
    tokred.remove(model)
    dense = model(tall)
    tokred.apply(model, "tome", keep_rate=0.5)
    assert torch.equal(model(tall), after)
    assert not torch.equal(dense, after)


@torch.no_grad()
def test_a_new_head_pools_what_is_left(model: nn.Module, images: Tensor) -> None:
    for pool in ("avg", "token", ""):
        if pool == "token" and model.cls_token is None:
            continue
        for method in ("tome", "topk"):
            tokred.apply(model, method, keep_rate=0.5)
            model.reset_classifier(3, pool)
            after = model(images)
            features = model.forward_features(images)
            assert torch.equal(after, model.forward_head(features))
            if pool == "":  # nothing is pooled: the full grid
                assert after.shape == (2, features.shape[1], 3)
            few = tokred.apply(model, method, keep_rate=0.5, full_grid=False)
            reduced = model.forward_features(images)
            assert reduced.shape[1] == 2 + few.layout.prefix  # of 16 patches, 2 are left
            if pool:
                torch.testing.assert_close(model(images), after)
            else:
                assert model(images).shape[1] == reduced.shape[1]
            if pool == "avg" and method == "topk":
                left = reduced[:, few.layout.prefix :].mean(1)
                torch.testing.assert_close(model.head(model.fc_norm(left)), after)
            tokred.remove(model)


def test_blocks_cannot_be_cut_off_while_reduced(model: nn.Module, images: Tensor) -> None:
    tokred.apply(model, "tome", keep_rate=0.5)
    with pytest.raises(RuntimeError, match=r"call tokred\.remove\(model\) first"):
        model.prune_intermediate_layers([1])
    assert len(model.blocks) == 4
    tokred.remove(model)
    model.prune_intermediate_layers([1])
    assert len(model.blocks) == 2


@torch.no_grad()
def test_attention_may_be_computed_the_other_way(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(model, "set_input_size"):
        pytest.skip("this version of timm cannot change the input size")
    model.set_input_size(img_size=128)
    model.bfloat16()
    images = torch.randn(2, 3, 128, 128, dtype=torch.bfloat16)
    fused: list[int] = []
    call = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda query, *args, **kwargs: fused.append(query.shape[2]) or call(query, *args, **kwargs),
    )
    early = tokred.Exactly((50, 30, 30, 30))
    tokred.apply(model, "tome", early)
    host = model(images)
    assert len(fused) == 4
    fused.clear()
    tokred.apply(model, "tome", early, attention="fastest")
    fastest = model(images)
    assert len(fused) == 2 and max(fused) < 40
    torch.testing.assert_close(fastest, host, rtol=0.1, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_biases_are_those_of_the_tokens_left(model: nn.Module, fused: bool) -> None:
    """A block that got few tokens computes what timm's own block computes of these tokens, given
    the rows and columns of its biases that belong to where they stood."""
    if not hasattr(find_host(model)[0].blocks(model)[0].attn, "rel_pos") and not hasattr(
        model, "rel_pos_bias"
    ):
        pytest.skip("has no biases")
    for block in model.blocks:
        block.attn.fused_attn = fused
    block = model.blocks[2]
    schedule = tokred.Exactly((16, 7, 7, 7))
    for method in ("topk", "tome"):
        reduction = tokred.apply(model, method, schedule, proportional_attention=False)
        seen = watched(model, block.attn, reduction)
        prefix, x, positions = reduction.layout.prefix, seen["x"], seen["state"].positions()
        assert positions.shape == (2, 7)
        full = torch.zeros(2, 16 + prefix, x.shape[2])
        hidden = torch.full((2, 16 + prefix), -torch.inf)
        at = torch.cat([torch.arange(prefix).expand(2, -1), positions + prefix], 1)
        for sample in range(2):  # in their places, and nothing else to be seen
            full[sample, at[sample]] = x[sample]
            hidden[sample, at[sample]] = 0
        tokred.remove(model)
        own = biases(model, block) + hidden[:, None, None]
        wanted = attention_of(block.attn, full, own)
        got = torch.stack([wanted[sample, at[sample]] for sample in range(2)])
        torch.testing.assert_close(seen["y"], got, rtol=1e-4, atol=1e-5)


def watched(model: nn.Module, attention: nn.Module, reduction: tokred.Reduction) -> dict[str, Any]:
    """What a block's attention was given and put out, and what was known of the tokens then."""
    seen: dict[str, Any] = {}

    def before(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, x=args[0], state=reduction.running.state)

    def behind(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen["y"] = output

    handles = [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.register_forward_hook(behind),
    ]
    model(timm_vit.images(2))
    for handle in handles:
        handle.remove()
    return seen


def biases(model: nn.Module, block: nn.Module) -> Tensor:
    """What is added to the logits of a dense block, [1, heads, sequence, sequence]."""
    if hasattr(block.attn, "rel_pos"):
        return block.attn.rel_pos.get_bias()
    if model.rel_pos_bias is not None:
        return model.rel_pos_bias()[None]
    return block.attn._get_rel_pos_bias()


def attention_of(attention: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """timm's own attention with this bias instead of its own."""
    name = next(iter(inspect.signature(attention.forward).parameters.keys() - {"x"}))
    own = {key: getattr(attention, key, None) for key in TABLES}
    for key in TABLES:
        if own[key] is not None:
            setattr(attention, key, None)
    y = attention(x, **{name: bias})
    for key, value in own.items():
        if value is not None:
            setattr(attention, key, value)
    return y


TABLES = ("rel_pos", "relative_position_bias_table")


@torch.no_grad()
def test_a_mask_goes_along_with_the_tokens_that_are_left(images: Tensor) -> None:
    torch.manual_seed(0)
    model = timm_vit.SMALL["deit"].build()
    mask = torch.randn(2, 1, 17, 17)
    dense = model(images, attn_mask=mask)
    reduction = tokred.apply(model, "topk", tokred.Exactly((16, 7, 7, 7)))
    given: dict[str, Any] = {}

    def before(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        given.update(kwargs, at=reduction.running.state.positions())

    handle = model.blocks[2].attn.register_forward_pre_hook(before, with_kwargs=True)
    model(images, attn_mask=mask)
    handle.remove()
    for sample, at in enumerate(given["at"]):
        rows = torch.cat([torch.zeros(1, dtype=torch.long), at + 1])
        assert torch.equal(given["attn_mask"][sample, 0], mask[sample, 0][rows][:, rows])
    with pytest.warns(UserWarning, match="nothing is reduced"):
        tokred.apply(model, "tome", keep_rate=1.0)
    assert torch.equal(model(images, attn_mask=mask), dense)


@torch.no_grad()
def test_what_a_mask_hides_is_never_merged(images: Tensor) -> None:
    torch.manual_seed(0)
    model = timm_vit.SMALL["deit"].build()
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    mask[0, ..., -5:] = False
    tokred.apply(model, "tome", keep_rate=0.5)
    hidden = model(images, attn_mask=mask)
    garbage = images.clone()
    garbage[0, :, 48:, 0:] = 100.0  # the last row of patches, four of the five
    torch.testing.assert_close(model(garbage, attn_mask=mask), hidden)
