"""Token sizes that go in with the values instead of as a mask (`attention="fastest"` on CUDA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import transformers_vit, visible
from test_hosts import FIRST, SMALL
from torch import Tensor

import tokred
from tokred.data.inputs import call
from tokred.engine import attention_without_mask, without_mask
from tokred.engine.without_mask import case_of, is_faster, sizes_as_mask


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the values whenever attention takes the form without a mask, which it does
    wherever it may: on this device, too, and whether it is faster or not."""
    seen: list[tuple[int, ...]] = []
    form = without_mask.attention_without_mask

    def watched(attend: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        seen.append(tuple(value.shape))
        return form(attend, query, key, value, bias)

    monkeypatch.setattr(without_mask, "attention_without_mask", watched)
    monkeypatch.setattr(without_mask, "_offered", lambda bias: True)
    monkeypatch.setattr(without_mask, "is_faster", lambda *x: True)
    yield seen


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and value.shape[-1] % 8 == 0
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def problem(
    dtype: torch.dtype, width: int, value_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and token sizes up to 64."""
    query, key = torch.randn(2, 2, 4, 50, width, dtype=dtype)
    value = torch.randn(2, 4, 50, value_width, dtype=dtype)
    return query, key, value, 2.0 ** torch.randint(0, 7, (2, 1, 1, 50))


@pytest.mark.parametrize("widths", [(16, 16), (12, 12), (7, 7), (16, 24), (32, 8)])
def test_is_exact_and_so_are_its_gradients(widths: tuple[int, int]) -> None:
    query, key, value, sizes = problem(torch.float64, *widths)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    scale, bias = widths[0] ** -0.5, sizes.double().log()
    # By hand: softmax with key j counted s_j times.
    counted = (query @ key.mT * scale).exp() * sizes.double()
    expected = counted / counted.sum(-1, keepdim=True) @ value
    ours = attention_without_mask(lambda *x: plain(*x, scale), query, key, value, bias)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    ours, expected = (
        torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (ours, expected)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_no_more_than_a_mask_does(dtype: torch.dtype) -> None:
    errors = {"mask": 0.0, "without": 0.0}
    for _ in range(10):
        *heads, sizes = problem(dtype, 16, 16)
        exact = F.scaled_dot_product_attention(*(x.double() for x in heads), sizes.double().log())
        masked = F.scaled_dot_product_attention(*heads, sizes.log().to(dtype))
        ours = attention_without_mask(lambda *x: plain(*x, 0.25), *heads, sizes.log())
        assert ours.dtype == dtype
        errors["mask"] += float((masked.double() - exact).abs().mean())
        errors["without"] += float((ours.double() - exact).abs().mean())
    assert errors["without"] <= 1.2 * errors["mask"]


def test_float16_does_not_overflow() -> None:
    query, key, value, _ = problem(torch.float16, 16, 16)
    value, sizes = value * 100, torch.ones(2, 1, 1, 50)
    sizes[..., :3] = 4000.0  # 100 times 4000 is more than float16 can hold
    ours = attention_without_mask(lambda *x: plain(*x, 0.25), query, key, value, sizes.log())
    exact = F.scaled_dot_product_attention(
        *(x.double() for x in (query, key, value)), sizes.double().log()
    )
    torch.testing.assert_close(ours.double(), exact, rtol=0.01, atol=0.5)


# Their masks hold relative positions, too; BLIP never calls fused attention.
NEVER = {"timm_beit", "timm_relpos", "transformers_blip"}


@pytest.mark.parametrize("family", sorted(FIRST))
def test_every_family_takes_it_and_gives_the_same_answer_and_gradients(
    family: str, calls: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    small = SMALL[FIRST[family]]
    model = small.build()
    inputs = small.inputs(2)
    found = {}
    for attention in ("host", "fastest"):
        tokred.apply(model, "tome", keep_rate=0.5, attention=attention)
        torch.manual_seed(1)
        answer = small.answer(call(model, inputs))
        learned = [x for x in model.parameters() if x.requires_grad]
        gradients = torch.autograd.grad(answer.pow(2).sum(), learned, allow_unused=True)
        found[attention] = [answer, *(x for x in gradients if x is not None)]
        if attention == "host":
            assert not calls
    assert bool(calls) == (family not in NEVER)
    for ours, theirs in zip(found["fastest"], found["host"], strict=True):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1.0, scale))


def vit(dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**transformers_vit.SIZE, **options})
    return visible(transformers.ViTModel(config)).to(dtype)


def answered(model: torch.nn.Module, **inputs: Tensor) -> Tensor:
    torch.manual_seed(1)
    output: Tensor = model(**inputs).last_hidden_state
    return output


@torch.no_grad()
def test_is_exact_in_a_whole_model_in_float64(calls: list[tuple[int, ...]]) -> None:
    model, images = vit(torch.float64), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    found = []
    for attention in ("host", "fastest"):
        tokred.apply(model, "atc", tokred.Exactly((9, 6, 3, 3)), attention=attention)
        found.append(answered(model, pixel_values=images))
    assert [shape[2] for shape in calls] == [10, 7, 4]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_mask_stays_where_it_says_more_than_sizes(calls: list[tuple[int, ...]]) -> None:
    images, there = torch.randn(2, 3, 64, 64), torch.ones(2, 17, dtype=torch.long)
    model = vit()
    tokred.apply(model, "tome", keep_rate=0.5, attention="fastest")
    padded = there.clone()
    padded[1, 13:] = 0
    answered(model, pixel_values=images, attention_mask=padded)
    assert not calls
    tokred.apply(model, "tome", keep_rate=0.5, attention="fastest", proportional_attention=False)
    answered(model, pixel_values=images)
    tokred.apply(model, "topk", keep_rate=0.5, attention="fastest")
    answered(model, pixel_values=images)
    assert not calls


def test_dropout_of_attention_keeps_the_mask(calls: list[tuple[int, ...]]) -> None:
    model, images = vit(attention_probs_dropout_prob=0.3).train(), torch.randn(2, 3, 64, 64)
    found = []
    for attention in ("host", "fastest"):
        tokred.apply(model, "tome", keep_rate=0.5, attention=attention)
        found.append(answered(model, pixel_values=images))
    assert not calls and torch.equal(*found)


@torch.no_grad()
def test_compiled_code_keeps_the_mask(calls: list[tuple[int, ...]]) -> None:
    torch._dynamo.reset()
    model, images = vit(), torch.randn(2, 3, 64, 64)
    tokred.apply(model, "tome", keep_rate=0.5, attention="fastest")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = answered(compiled, pixel_values=images)
    assert not calls
    torch.testing.assert_close(found, answered(model, pixel_values=images))
    assert calls


@torch.no_grad()
def test_is_off_unless_it_is_asked_for_and_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> bool:
        raise AssertionError

    monkeypatch.setattr(without_mask, "is_faster", never)
    model, images = vit(), torch.randn(2, 3, 64, 64)
    tokred.apply(model, "tome", keep_rate=0.5, attention="fastest")
    answered(model, pixel_values=images)
    monkeypatch.setattr(without_mask, "_offered", lambda bias: True)
    tokred.apply(model, "tome", keep_rate=0.5)
    answered(model, pixel_values=images)


def test_is_an_ordinary_mask_to_everything_else(calls: list[tuple[int, ...]]) -> None:
    *heads, sizes = problem(torch.float32, 16, 16)
    bias = sizes.log()
    mask = sizes_as_mask(bias.clone(), bias)
    turned = torch.arange(49, -1, -1)
    for changed, same in (
        (mask + 0, bias + 0),
        (mask[:, :, :, turned], bias[:, :, :, turned]),
        (mask.flip(0), bias.flip(0)),
        (mask.masked_fill(sizes == 1, -torch.inf), bias.masked_fill(sizes == 1, -torch.inf)),
    ):
        assert type(changed) is Tensor and torch.equal(changed, same)
        output = F.scaled_dot_product_attention(*heads, attn_mask=changed)
        assert torch.equal(output, F.scaled_dot_product_attention(*heads, attn_mask=same))
    # It is one still in another shape, and not where some keys or images are left out.
    few = [x[:, :, :40] for x in heads]
    F.scaled_dot_product_attention(*few, attn_mask=mask[..., :40])
    F.scaled_dot_product_attention(*(x[:1] for x in heads), attn_mask=mask[:1])
    F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=False, dropout_p=0.5)
    assert not calls
    for shaped in (mask, mask.expand(-1, 4, 50, -1), mask[:, 0, 0].view(2, 1, 1, 50), mask[..., :]):
        expected = F.scaled_dot_product_attention(*heads, attn_mask=bias)
        output = F.scaled_dot_product_attention(*heads, attn_mask=shaped)
        assert type(output) is Tensor
        torch.testing.assert_close(output, expected)
    assert len(calls) == 4


def test_is_measured_once_for_attention_of_about_the_same_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(without_mask, "_FASTER", {})
    measured: list[without_mask.Case] = []
    took = {"mask": 1.0, "without": 0.9}

    def seconds(case: without_mask.Case) -> dict[str, float]:
        measured.append(case)
        return took

    monkeypatch.setattr(without_mask, "seconds_of_both", seconds)
    heads = [torch.zeros(3, 4, 70, 16)] * 3
    assert is_faster(*heads)
    took["without"] = 0.97  # no clear gain
    assert is_faster(*heads) and is_faster(*[torch.zeros(4, 4, 128, 16)] * 3)
    assert len(measured) == 1 and measured[0] == case_of(*heads)
    assert not is_faster(*[torch.zeros(3, 4, 129, 16)] * 3)
    assert not is_faster(*[torch.zeros(3, 4, 70, 16, requires_grad=True)] * 3)
    assert [case.gradients for case in measured] == [False, False, True]


@pytest.mark.parametrize("learns", [False, True])
def test_measuring_draws_no_random_numbers(learns: bool) -> None:
    case = case_of(*[torch.zeros(1, 2, 9, 8, requires_grad=learns)] * 3)
    state = torch.get_rng_state()
    took = without_mask.seconds_of_both(case, rounds=1, calls=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert took.keys() == {"mask", "without"} and min(took.values()) > 0
