"""The promises of tokred.measure.contract: wrong patches break them, and right ones do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import timm_vit
from families.timm_vit import images
from torch import Tensor, nn
from wrong_patches import NAIVE, WRONG, Wrong

import tokred
from tokred.host import find_host
from tokred.measure import contract
from tokred.measure.contract import Broken
from tokred.patching import reduction_of

BY_NAME = [pytest.param(wrong, id=name.replace(" ", "-")) for name, wrong in WRONG.items()]


def build(wrong: Wrong) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return wrong.small.build(), wrong.small.inputs(2)


def plain() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return timm_vit.SMALL["deit"].build(), images(2)


@pytest.mark.parametrize("wrong", BY_NAME)
def test_a_wrong_patch_breaks_just_the_promises_that_it_should(wrong: Wrong) -> None:
    model, inputs = build(wrong)
    broken = contract.check(model, inputs, wrong.host)
    found, told = {one.promise for one in broken}, "\n".join(map(str, broken))
    if wrong.raises is None:
        assert found == wrong.breaks, told
    else:  # which the model says whatever promise is tried
        assert found >= wrong.breaks and all(wrong.raises in one.seen for one in broken), told
    if wrong.right is not NAIVE:  # tests/test_hosts.py says that the right patch breaks none
        assert find_host(model)[0] is wrong.right


def test_every_promise_is_broken_by_some_patch() -> None:
    broken = frozenset().union(*(wrong.breaks for wrong in WRONG.values()))
    # The rest are equal tokens, which have a test of their own.
    assert broken == contract.PROMISES.keys() - {"equal tokens"}


def test_merging_equal_tokens_without_their_sizes_is_noticed() -> None:
    model, _ = plain()
    equal = timm_vit.twins(model)
    right = contract.check(model, images(2), equal=equal, promises=["equal tokens"])
    assert right == []
    host = WRONG["leaves out the sizes"].host
    (broken,) = contract.check(model, images(2), host, equal=equal, promises=["equal tokens"])
    assert broken.promise == "equal tokens" and "off by" in broken.seen


def test_a_patch_that_raises_breaks_a_promise_and_says_how() -> None:
    def forward(block: Any, step: Any, x: Tensor, attn_mask: Any = None, is_causal: Any = False):
        if not step.untouched:
            raise ArithmeticError("too few\nof them")
        return WRONG["leaves out a norm"].right.forwards["timm.models.vision_transformer.Block"](
            block, step, x, attn_mask, is_causal
        )

    right = WRONG["leaves out a norm"].right
    host = replace(right, forwards=dict.fromkeys(right.forwards, forward))
    model, inputs = plain()
    broken = contract.check(model, inputs, host, promises=["keep_rate=1", "merging"])
    assert broken == [Broken("merging", "ArithmeticError: too few of them", "no exception")]
    assert str(broken[0]) == "merging: ArithmeticError: too few of them; expected: no exception"


def test_what_the_patch_refuses_is_not_broken_but_untried() -> None:
    right = WRONG["leaves out a norm"].right
    host = replace(right, refuse=lambda model, signals: "no keys" if "key" in signals else None)
    model, inputs = plain()
    verdicts = {one.promise: one for one in contract.examine(model, inputs, host)}
    assert not any(one.broken for one in verdicts.values())
    assert "no keys" in str(verdicts["keys"].untried)
    assert "no keys" in str(verdicts["attention received"].untried)
    assert verdicts["merging"].untried is None


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = plain()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    contract.check(model, inputs, WRONG["leaves out a norm"].host)
    assert reduction_of(model) is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_checked_is_refused() -> None:
    model, inputs = plain()
    with pytest.raises(ValueError, match=r"must be some of keep_rate=1, token counts, .*'kind'"):
        contract.check(model, inputs, promises=["kind"])
    with pytest.raises(tokred.UnsupportedModelError, match="no patch for"):
        contract.check(nn.Linear(2, 2).eval(), torch.randn(2, 2))
    model.train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        contract.check(model, inputs)
    model.eval()
    tokred.apply(model, "tome", 0.5)
    with pytest.raises(ValueError, match="has a reduction already"):
        contract.check(model, inputs)
    assert reduction_of(model) is not None


def test_lively_weights_show_what_initial_ones_hide() -> None:
    import timm

    wrong = WRONG["leaves out LayerScale"]
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", init_values=1.0, img_size=64, depth=2, embed_dim=32, num_heads=2
    ).eval()
    assert not contract.check(model, images(2), wrong.host, promises=["keep_rate=1"])
    assert contract.check(contract.lively(model), images(2), wrong.host, promises=["keep_rate=1"])
