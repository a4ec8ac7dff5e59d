"""Proportional attention by functions that take no mask, as flash attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import transformers_vit, visible
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import tokred

CALLS: list[tuple[int, ...]] = []


def maskless(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As strict as flash attention is: one head size for all, a multiple of 8, and no mask but one
    that says which tokens are there."""
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        attention_mask = attention_mask[:, None, None].bool()
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    CALLS.append(tuple(value.shape))
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register("flash_attention_of_the_tests", maskless)
AttentionMaskInterface.register("flash_attention_of_the_tests", flash_attention_mask)


def model_with(implementation: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**transformers_vit.SIZE)
    model = visible(transformers.ViTModel(config)).to(dtype)
    # (set_attn_implementation would look for a kernel of that name to download.)
    model.config._attn_implementation = implementation
    return model


@torch.no_grad()
def tokens(model: nn.Module, images: Tensor) -> Tensor:
    return model(images.to(next(model.parameters()).dtype)).last_hidden_state


def test_the_answer_is_that_of_the_mask_form() -> None:
    images = torch.randn(3, 3, 64, 64)
    found = {}
    for implementation in ("sdpa", "eager", "flash_attention_of_the_tests"):
        model = model_with(implementation)
        tokred.apply(model, "atc", tokred.Exactly((9, 6, 3, 3)))
        CALLS.clear()
        found[implementation] = tokens(model, images)
        if implementation.startswith("flash"):
            # Plain attention until tokens were merged, then one head of 8 channels more.
            assert [shape[-1] for shape in CALLS] == [16, 24, 24, 24]
            tokred.apply(model, "atc", tokred.Exactly((9, 6, 3, 3)), proportional_attention=False)
            assert not torch.allclose(tokens(model, images), found["sdpa"], atol=1e-3)
    torch.testing.assert_close(found["flash_attention_of_the_tests"], found["sdpa"])
    torch.testing.assert_close(found["eager"], found["sdpa"])


def test_in_bfloat16_the_error_is_at_most_twice_that_of_the_mask_form() -> None:
    """One attention, keys that stand for up to 64 tokens, against float64."""
    model = model_with("flash_attention_of_the_tests", torch.bfloat16)
    attention = model.layers[0].attention
    from tokred.patches import _transformers as common

    errors = {"mask": 0.0, "weighed": 0.0}
    for seed in range(20):
        torch.manual_seed(seed)
        query, key, value = torch.randn(3, 2, 4, 50, 16)
        size = 2.0 ** torch.randint(0, 7, (2, 1, 1, 50))
        exact = F.scaled_dot_product_attention(
            *(x.bfloat16().double() for x in (query, key, value)), attn_mask=size.double().log()
        )
        low = [x.bfloat16() for x in (query, key, value)]
        masked = F.scaled_dot_product_attention(*low, attn_mask=size.log().bfloat16())
        twin = nn.Module()
        twin.config = common.SetUp(attention.config, attention)
        output, _ = common.weighed(twin, *low, size.log().bfloat16())
        errors["mask"] += float((masked - exact).abs().mean())
        errors["weighed"] += float((output.transpose(1, 2) - exact).abs().mean())
    assert errors["weighed"] <= 2 * errors["mask"]


@pytest.mark.parametrize("method", ["atc", "tome", "topk", "ats"])
def test_tokens_that_are_masked_out_are_never_merged_with_others(method: str) -> None:
    """What they show changes nothing in the others; and both forms agree."""
    images, there = torch.randn(2, 3, 64, 64), torch.ones(2, 17, dtype=torch.long)
    there[1, 13:] = 0  # the last row of patches
    others = images.clone()
    others[1, :, 48:] = torch.randn(3, 16, 64)
    found = []
    for implementation in ("sdpa", "flash_attention_of_the_tests"):
        model = model_with(implementation)
        tokred.apply(model, method, keep_rate=0.5)
        with torch.no_grad():
            first = model(images, attention_mask=there).last_hidden_state
            second = model(others, attention_mask=there).last_hidden_state
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1, :13], second[1, :13])
        found.append(first)
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1, :13], found[1][1, :13])


def test_flex_attention_is_refused_with_the_way_out() -> None:
    model = model_with("sdpa")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(tokred.UnsupportedModelError, match=r"set_attn_implementation\('sdpa'\)"):
        tokred.apply(model)


def test_a_change_of_implementation_after_apply_is_followed() -> None:
    images = torch.randn(2, 3, 64, 64)
    model = model_with("sdpa")
    tokred.apply(model, "tome", keep_rate=0.5)
    expected = tokens(model, images)
    model.config._attn_implementation = "flash_attention_of_the_tests"
    CALLS.clear()
    torch.testing.assert_close(tokens(model, images), expected)
    assert CALLS
