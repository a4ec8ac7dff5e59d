"""The free limit is a slice in the host's own forward: it gives what the same cuts in patched
blocks give, runs on as many tokens, has nothing of the engine in it, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from test_dense import DENSE
from test_hosts import FIRST, SMALL, SOME
from torch import Tensor, nn

import tokred
from tokred.data.inputs import call, pixels
from tokred.engine.denoising import Denoising
from tokred.engine.reduction import Reduction
from tokred.host import find_host, innermost
from tokred.measure.limit import Limits, counts_of, first_of, limits_of, put_on
from tokred.measure.slicing import ModuleSlices, Slices, take_off
from tokred.patching import host_of, reduction_of

try:
    from test_diffusers import CASES as DENOISERS
except ModuleNotFoundError:  # the oldest versions are tried without diffusers
    DENOISERS = {}

RISES = tokred.Hourglass(0.5, down=2)
NOT_SLICED = {
    # Its head averages the full grid, in which what was cut off counts.
    "transformers_beit-data2vec-bias-in-every-layer",
}
PADDED = {"transformers_clip-siglip2", "transformers_clip-siglip2-averaging"}
"""Their images say nothing of their grid, so that no limit is known."""


def reduced(model: nn.Module, method: Any, rate: Any) -> Any:
    """The reduction, which is not left on the model."""
    reduction = tokred.apply(model, method, rate)
    tokred.remove(model)
    return reduction


def limits(model: nn.Module, inputs: Any, method: Any, rate: Any) -> Limits:
    reduction = reduced(model, method, rate)
    if isinstance(reduction, Denoising):
        return limits_of(model, host_of(model), inputs, reduction, ())
    host, tower = find_host(model)
    height, width = pixels(inputs).shape[-2:]
    counts = counts_of(model, host, inputs, reduction, host.layout(tower, (height, width)).grid)
    return limits_of(model, host, inputs, reduction, counts)


def leaves(output: Any) -> list[Tensor]:
    found = torch.utils._pytree.tree_leaves(output)
    return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def traces(model: nn.Module) -> list[str]:
    """What is not the model's own: what stands in for forwards, or hooks."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name in ("forward", "_tokred")
        if name in vars(module)
    ]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method, rate", [("tome", 0.5), ("slic", RISES)], ids=["falls", "rises"])
def test_a_slice_gives_what_the_same_cuts_in_patched_blocks_give(
    name: str, method: str, rate: Any
) -> None:
    if name in PADDED:
        pytest.skip("its images say nothing of their grid")
    torch.manual_seed(0)
    model, inputs = SMALL[name].build(), SMALL[name].inputs(2)
    with torch.no_grad():
        dense = leaves(call(model, inputs))
        found = limits(model, inputs, method, rate)
        assert traces(model) == []
        if name in NOT_SLICED:
            assert found.free is found.seamed
            assert "another answer" in found.why_seamed
            return
        assert isinstance(found.free, Slices) and not found.why_seamed
        host = host_of(model)
        answers = []
        for side in (found.seamed, found.free):
            put_on(model, host, side)
            # Twice: nothing of a pass is left for the next one.
            call(model, first_of(inputs))
            answers.append(leaves(call(model, inputs)))
        assert reduction_of(model) is None, "nothing of the engine hangs on the model"
        take_off(model)
        torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)
        assert traces(model) == []
        again = leaves(call(model, inputs))
        assert all(map(torch.equal, again, dense)), "the model is exactly as it was"
        pairs = zip(again, answers[1], strict=True)
        changed = [a.shape != b.shape or not torch.equal(a, b) for a, b in pairs]
        assert any(changed), "something was cut off"


@pytest.mark.parametrize("name", ["depth anything", "transformers_maskless-dpt-segmentation"])
def test_heads_that_need_the_full_grid_get_the_slices_back(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = DENSE[name].build().eval(), DENSE[name].inputs(2)
    found = limits(model, inputs, "tome", 0.5)
    assert isinstance(found.free, Slices) and found.free.shown


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("method", ["tome", "todo"])
def test_modules_of_denoisers_run_on_a_slice(name: str, method: str) -> None:
    torch.manual_seed(0)
    model, inputs = DENOISERS[name].build().eval(), DENOISERS[name].inputs(2)
    found = limits(model, inputs, method, 0.5)
    assert isinstance(found.free, ModuleSlices) and found.free.modules
    answers = []
    with torch.no_grad():
        for side in (found.seamed, found.free):
            put_on(model, host_of(model), side)
            answers.append(leaves(call(model, inputs)))
    take_off(model)
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)
    assert traces(model) == []


def test_only_blocks_that_cut_are_stood_in_for_and_see_as_few_tokens() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
    images = torch.randn(1, 3, 224, 224)
    found = limits(model, images, "topk", tokred.Exactly((196, 98, 98, 49)))
    put_on(model, host_of(model), found.free)
    assert [innermost(block) is None for block in model.blocks] == [True, False, True, False]
    attention, mlp = [], []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: attention.append(args[0].shape[1]))
        block.mlp.register_forward_pre_hook(lambda _, args: mlp.append(args[0].shape[1]))
    assert model.forward_features(images).shape[1] == 50
    assert (attention, mlp) == ([197, 197, 99, 99], [197, 99, 99, 50])


def test_methods_before_the_block_are_measured_against_a_slice_before_it() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
    images = torch.randn(1, 3, 224, 224)
    method = next(
        name
        for name in tokred.reducers.names()
        if tokred.reducers.traits(tokred.reducers.make(name)).place == "before"
        and tokred.reducers.traits(tokred.reducers.make(name)).learned is None
    )
    found = limits(model, images, method, tokred.Exactly((196, 98, 98, 49)))
    assert isinstance(found.free, Slices) and found.free.place == "before"
    put_on(model, host_of(model), found.free)
    seen: list[int] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(images)
    assert seen == [197, found.free.counts[1] + 1, found.free.counts[2] + 1, 50]


def test_a_slice_that_gives_another_answer_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
    monkeypatch.setattr("tokred.measure.slicing.Cut.sliced", lambda cut, x: x[:, -cut.after - 1 :])
    found = limits(model, torch.randn(1, 3, 224, 224), "tome", 0.5)
    assert isinstance(found.free, Reduction) and found.free is found.seamed
    assert found.why_seamed == "a slice in the model's own forward gives another answer"
    assert found.arms == {"limit": found.seamed}


def test_what_is_wrapped_around_a_block_is_left_alone() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
    block = model.blocks[2]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    found = Slices(find_host(model)[0].layout(model, None), 196, (196, 98, 49, 24))
    with pytest.raises(ValueError, match="something is wrapped around its blocks"):
        found.put_on(model, host_of(model))  # type: ignore[arg-type]
    assert traces(model) == ["blocks.2.forward"]


def test_one_model_of_every_family_is_tried() -> None:
    assert set(FIRST.values()) <= set(SMALL) and not NOT_SLICED - set(SMALL)
