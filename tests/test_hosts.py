"""What a patch promises of every model that it accepts, on small models of the real classes."""

from __future__ import annotations

import copy
import io
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Small, _swin
from test_patching import traces
from torch import Tensor, nn
from transformers import PreTrainedModel

import tokred
from tokred import reducers
from tokred.data.inputs import call
from tokred.host import find_host, submodule
from tokred.measure import contract

try:
    from test_diffusers import CASES as DENOISERS
except ModuleNotFoundError:  # the oldest versions are tried without diffusers
    DENOISERS = {}

FAMILIES = sorted(file.stem for file in (Path(__file__).parent / "families").glob("[a-z]*.py"))
SMALL: dict[str, Small] = {
    f"{family}-{name}".replace(", ", "-").replace(" ", "-"): one
    for family in FAMILIES
    for name, one in import_module(f"families.{family}").SMALL.items()
}

METHODS = ["tome", "atc", "topk", "evit"]

# What takes seconds is tried on one model of every family, and on all of them with `-m slow`.
FIRST = {
    family: next(name for name in SMALL if name.startswith(f"{family}-")) for family in FAMILIES
}
SOME = [
    name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in SMALL
]


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> Small:
    torch.manual_seed(0)
    return SMALL[request.param]


@pytest.fixture(params=SOME)
def some(request: pytest.FixtureRequest) -> Small:
    torch.manual_seed(0)
    return SMALL[request.param]


def every_method(small: Small) -> list[str]:
    return [method for method in METHODS if method not in (small.refuses or {})]


@torch.no_grad()
def answered(small: Small, model: nn.Module, inputs: Any) -> Tensor:
    torch.manual_seed(1)
    return small.answer(call(model, inputs))


def keep_all(model: nn.Module, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tokred.apply(model, method, keep_rate=1.0)


def counts(small: Small, model: nn.Module, inputs: Any) -> list[int]:
    host, tower = find_host(model)
    seen: list[int] = []
    handles = [
        submodule(block, small.counted).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].shape[1])
        )
        for block in host.blocks(tower)
    ]
    answered(small, model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_keeping_everything_changes_no_bit(small: Small) -> None:
    model = small.build()
    inputs = small.inputs(2)
    dense = answered(small, model, inputs)
    with torch.no_grad():
        features = small.features(model, inputs) if small.features else []
    for method in every_method(small):
        keep_all(model, method)
        assert torch.equal(answered(small, model, inputs), dense), method
        if small.features:
            with torch.no_grad():
                kept = small.features(model, inputs)
            assert all(torch.equal(a, b) for a, b in zip(kept, features, strict=True)), method


def test_exactly_the_asked_number_stays(small: Small) -> None:
    model, inputs = small.build(), small.inputs(2)
    dense = answered(small, model, inputs)
    full = counts(small, model, inputs)
    for method in every_method(small):
        reduction = tokred.apply(model, method, keep_rate=0.5)
        layout = reduction.layout
        patches = full[0] - layout.others
        asked = tokred.Stages(0.5)(patches, layout.layers)
        if small.behind:
            asked = [patches, *asked[:-1]]
        assert counts(small, model, inputs) == [count + layout.others for count in asked], method
        after = answered(small, model, inputs)
        assert after.shape == dense.shape and after.isfinite().all()
        assert not torch.allclose(after, dense, rtol=1e-5, atol=1e-6)


def test_removing_leaves_no_trace(small: Small) -> None:
    model, inputs = small.build(), small.inputs(2)
    dense = answered(small, model, inputs)
    if small.features:
        small.features(model, inputs)  # hooks of the library's own are installed at the first time
    was, keys = traces(model), list(model.state_dict())
    for method in every_method(small):
        tokred.apply(model, method, keep_rate=0.5)
        answered(small, model, inputs)
        assert [type(module) for module in model.modules()] == [entry[1] for entry in was]
        assert list(model.state_dict()) == keys
        tokred.remove(model)
        assert traces(model) == was, method
        assert torch.equal(answered(small, model, inputs), dense), method


def test_merging_equal_tokens_is_exact(small: Small) -> None:
    if small.twins is None:
        pytest.skip("equal patches cannot be had")
    model = small.build()
    inputs = small.twins(model)
    dense = answered(small, model, inputs)
    layers = find_host(model)[0].layout(find_host(model)[1], None).layers
    few = tokred.Exactly((9, 5, 5) + (2,) * (layers - 3))
    tokred.apply(model, tokred.ATC(), few)
    scale = max(1.0, float(dense.abs().max()))
    merged = answered(small, model, inputs)
    torch.testing.assert_close(merged / scale, dense / scale, rtol=0, atol=1e-5)
    if small.counts_class:
        tokred.apply(model, tokred.ATC(), few, proportional_attention=False)
        assert (answered(small, model, inputs) - dense).abs().max() / scale > 1e-4


@torch.no_grad()
def test_intermediate_features_are_full_grids_in_order(small: Small) -> None:
    if small.features is None:
        pytest.skip("hands out nothing between its blocks")
    model, inputs = small.build(), small.inputs(2)
    dense = small.features(model, inputs)
    for method in every_method(small):
        reduction = tokred.apply(model, method, keep_rate=0.5)
        taken = small.features(model, inputs)
        layout = reduction.layout
        end = dense[0].shape[1] - layout.suffix
        asked = tokred.Stages(0.5)(end - layout.prefix, layout.layers)
        with reduction.recording() as records:
            small.features(model, inputs)
        labels = None
        for layer, (got, want) in enumerate(zip(taken, dense, strict=True)):
            record = [record for record in records if record.layer == layer]
            if record:
                onward = record[0].map.labels()
                if labels is not None:
                    onward = torch.where(labels >= 0, onward.gather(1, labels.clamp(min=0)), -1)
                labels = onward
            assert got.shape == want.shape, (method, layer)
            if labels is None:
                assert torch.equal(got, want)
                continue
            for sample, label in zip(got[:, layout.prefix : end], labels, strict=True):
                values = sample[label >= 0]
                groups = label[label >= 0]
                for group in groups.unique():  # merged tokens are copies, where they belong
                    member = values[groups == group]
                    assert torch.equal(member, member[:1].expand_as(member)), (method, layer)
                assert len(values.unique(dim=0)) == asked[layer], (method, layer)


@torch.no_grad()
def test_tapping_does_not_change_the_answer(small: Small) -> None:
    if small.features is None:
        pytest.skip("hands out nothing between its blocks")
    model, inputs = small.build(), small.inputs(2)
    for method in every_method(small):
        tokred.apply(model, method, keep_rate=0.5)
        plain = answered(small, model, inputs)
        small.features(model, inputs)
        assert torch.equal(answered(small, model, inputs), plain)
        if isinstance(model, PreTrainedModel):  # both in one call
            outputs = call(model, {**inputs, "output_hidden_states": True})
            torch.testing.assert_close(small.answer(outputs), plain)


AVERAGING = [
    "transformers_clip-clip-averaging",
    "transformers_clip-siglip-averaging",
    "transformers_dinov2-dinov2-classifier",
    "transformers_dinov2-dinov2-registers-classifier",
    "transformers_maskless-videomae-averaging",
    "transformers_vit-ijepa-averaging",
]


@torch.no_grad()
@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("full_grid", [True, False])
def test_models_that_average_leave_dropped_tokens_out_of_that_alone(
    name: str, full_grid: bool
) -> None:
    """All hidden states are full grids, and scores are those of a pass where nobody sees them."""
    torch.manual_seed(0)
    model, inputs = SMALL[name].build(), SMALL[name].inputs(3)
    asking = {**inputs, "output_hidden_states": True}
    dense = model(**asking)
    for method in ("topk", "divprune", "random", "tome", "slic"):
        reduction = tokred.apply(model, method, 0.5, full_grid=full_grid)
        scores = model(**inputs).logits
        assert not torch.allclose(scores, dense.logits, atol=1e-4)
        seen = model(**asking)
        assert reduction.averages
        assert [one.shape for one in seen.hidden_states] == [
            one.shape for one in dense.hidden_states
        ], method
        torch.testing.assert_close(seen.logits, scores)
        assert torch.equal(model(**inputs).logits, scores)
        as_tuple = model(**asking, return_dict=False)
        torch.testing.assert_close(as_tuple[0], scores)
        for image in range(3):
            one = {key: value[image : image + 1] for key, value in asking.items() if key in inputs}
            alone = model(**one, output_hidden_states=True)
            torch.testing.assert_close(alone.logits, scores[image : image + 1])
            torch.testing.assert_close(
                alone.hidden_states[-1], seen.hidden_states[-1][image : image + 1]
            )
    tokred.remove(model)
    assert torch.equal(model(**inputs).logits, dense.logits)


def test_what_is_refused_says_why(small: Small) -> None:
    model = small.build()
    was = traces(model)
    for method, reason in (small.refuses or {}).items():
        with pytest.raises(tokred.UnsupportedModelError, match=reason):
            tokred.apply(model, method, keep_rate=0.5)
        assert traces(model) == was


def test_copies_and_saved_models_stand_on_their_own(some: Small) -> None:
    model, inputs = some.build(), some.inputs(2)
    dense = answered(some, model, inputs)
    tokred.apply(model, "tome", keep_rate=0.5)
    reduced = answered(some, model, inputs)
    twin = copy.deepcopy(model)
    tokred.remove(model)
    assert torch.equal(answered(some, twin, inputs), reduced)
    assert torch.equal(answered(some, model, inputs), dense)
    # A fresh one: what transformers hooks on at the first run cannot be pickled.
    torch.manual_seed(0)
    model = some.build()
    tokred.apply(model, "tome", keep_rate=0.5)
    file = io.BytesIO()
    try:
        torch.save(some.build(), io.BytesIO())
    except Exception:
        pytest.skip("the dense model cannot be pickled either")
    torch.save(model, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    model.load_state_dict(twin.state_dict())
    back.load_state_dict(twin.state_dict())
    assert torch.equal(answered(some, back, inputs), answered(some, model, inputs))


# Compiling takes ten seconds: in every run one model of these, of all families with `-m slow`.
COMPILED = ("timm_vit", "timm_eva", "timm_relpos", "transformers_vit", "transformers_clip",
            "transformers_dinov2", "torchvision_vit")  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [f if f in COMPILED else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_compiles_in_one_graph_without_recompiling(family: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    some = SMALL[FIRST[family]]
    model, inputs = some.build(), some.inputs(2)
    try:
        call(torch.compile(model, fullgraph=True, backend="eager"), inputs)
    except Exception as error:
        pytest.skip(f"the dense model does not compile in one graph: {type(error).__name__}")
    torch._dynamo.reset()
    tokred.apply(model, "tome", keep_rate=0.5)
    expected = answered(some, model, inputs)
    if find_host(model)[0].pads:
        # Where a mask is given, the compiler cannot know what is padding, and the graph is left.
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(answered(some, compiled, inputs), expected)
        torch._dynamo.reset()
        return
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(answered(some, compiled, inputs), expected)
    answered(some, compiled, some.inputs(2))
    assert counter.frame_count == 1


def test_gradient_checkpointing_gives_the_same_gradients(some: Small) -> None:
    model, inputs = some.build(), some.inputs(2)
    enable = getattr(model, "gradient_checkpointing_enable", None) or getattr(
        model, "set_grad_checkpointing", None
    )
    if enable is None:
        pytest.skip("the model has no gradient checkpointing")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tokred.apply(model, "tome", keep_rate=0.5)
    model.train()
    runs: list[int] = []
    block = find_host(model)[0].blocks(find_host(model)[1])[1]
    submodule(block, some.counted).register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(2)
        some.answer(call(model, inputs)).square().mean().backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    expected = gradients()
    assert len(runs) == 1
    try:
        enable()
    except ValueError as error:
        pytest.skip(str(error))
    again = gradients()
    assert len(runs) == 3, "once more in the backward pass"
    for a, b in zip(again, expected, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def test_every_supported_method_of_the_library_runs(some: Small) -> None:
    """Methods outside METHODS too: either refused with a reason, or finite."""
    model, inputs = some.build(), some.inputs(2)
    for method in reducers.names():
        try:
            tokred.apply(model, method, keep_rate=0.5)
        except tokred.UnsupportedModelError:
            continue
        try:
            assert answered(some, model, inputs).isfinite().all(), method
        except ValueError as error:
            known = (
                "different numbers of tokens in different images|neighbours on a grid|not padded"
            )
            assert re.search(known, str(error))


# The contract that anybody can try a patch on: tests/test_contract.py shows what it notices. What
# has tests of its own above is left out here, and half precision is slow on CPUs.
CONTRACT = [
    name
    for name in contract.PROMISES
    if name not in ("keep_rate=1", "token counts", "half precision", "equal tokens", "removal")
]
# Why a promise need not be tried on a model.
UNTRIED = (
    "take no mask|takes no mask|masks are refused|says nothing of whole images|mixes tokens between"
    "|2 attentions between its|handed out reduced"  # differential attention; maps
)


def examined(name: str, promises: list[str]) -> list[contract.Verdict]:
    torch.manual_seed(0)
    small = SMALL[name]
    model, inputs = small.build(), small.inputs(2)
    # What CoCa says of images is not told by shapes.
    scores = small.answer if name.startswith("openclip") else None
    return contract.examine(model, inputs, scores=scores, promises=promises)


def broken(verdicts: list[contract.Verdict]) -> str:
    return "\n".join(str(one) for verdict in verdicts for one in verdict.broken)


@pytest.mark.parametrize("name", SMALL)
def test_the_contract_is_kept(name: str) -> None:
    verdicts = examined(name, CONTRACT)
    assert not broken(verdicts), broken(verdicts)
    reasons = "|".join([UNTRIED, *(SMALL[name].refuses or {}).values()])
    for verdict in verdicts:
        assert verdict.untried is None or re.search(reasons, verdict.untried), verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_all_of_the_contract_is_kept(name: str) -> None:
    left = [one for one in contract.PROMISES if one not in CONTRACT]
    assert not broken(examined(name, left))


@pytest.mark.parametrize("name", _swin.SWIN)
def test_the_contract_is_kept_by_models_in_windows(name: str) -> None:
    model, images = _swin.SWIN[name].build(), _swin.images(2)
    inputs = {"pixel_values": images} if name.startswith("transformers") else images
    verdicts = contract.examine(model, inputs)
    assert not broken(verdicts), broken(verdicts)
    tried = {verdict.promise for verdict in verdicts if verdict.untried is None}
    assert tried == {"keep_rate=1", "outputs", "half precision", "removal"}


@pytest.mark.parametrize("name", DENOISERS)
def test_the_contract_is_kept_by_denoisers(name: str) -> None:
    verdicts = contract.examine(DENOISERS[name].build(), DENOISERS[name].inputs(2))
    assert not broken(verdicts), broken(verdicts)
    tried = {verdict.promise for verdict in verdicts if verdict.untried is None}
    assert tried == {"keep_rate=1", "outputs", "half precision", "removal"}
