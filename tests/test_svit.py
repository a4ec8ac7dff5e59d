"""SViT and DynamicViT: gates, their masked and gathered forms, and their files."""

from __future__ import annotations

import argparse
import copy
import io
import json
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from conftest import Digits, images_for, small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_hosts import SMALL, answered
from test_patching import outputs, traces
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tokred
from tokred import DynamicViT, Exactly, Shares, SViT
from tokred.data import zoo
from tokred.engine import Reduction
from tokred.gates import gumbel, log_mask, straight_through
from tokred.host import find_host
from tokred.kernels import varlen
from tokred.models.segmenter import mean_iou
from tokred.patching import reduction_of
from tokred.reducers import Tokens
from tokred.reducers.dynamicvit import Predictor
from tokred.reducers.svit import Gate

pytestmark = pytest.mark.filterwarnings("ignore:the gates of")

QUARTERS = Shares((1, 0.75, 0.5, 0.25))


class Given(nn.Module):
    """A gate that says what it was told to."""

    def __init__(self, chosen: Tensor) -> None:
        super().__init__()
        self.log_odds = nn.Parameter(torch.where(chosen, 3.0, -3.0))

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        return torch.stack([self.log_odds, torch.zeros_like(self.log_odds)], -1).log_softmax(-1)


def vit(heads: int, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 4}
    shape |= {"embed_dim": 8 * heads, "num_heads": heads, "init_values": 0.5, **options}
    model: nn.Module = timm.models.vision_transformer.VisionTransformer(**shape)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).eval()


def decided(model: nn.Module, reducer: Any, schedule: Any, chosen: dict[int, Tensor]) -> Reduction:
    """Applied, with gates that choose just these tokens."""
    reduction = tokred.apply(model, reducer, schedule)
    for layer, mask in chosen.items():
        reduction.gates[str(layer)] = Given(mask)
    return reduction


def lively_gates(reduction: Reduction) -> None:
    """Random gates that differ from token to token and keep about half of them."""
    for gate in reduction.gates.values():
        for module in gate.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.0)
                nn.init.zeros_(module.bias)


@torch.no_grad()
def masked(model: nn.Module, reduction: Reduction, call: Any) -> Any:
    """The training form, without noise, and without dropout or batch statistics."""
    reduction.noise = lambda layer, logits: torch.zeros_like(logits)
    host, tower = find_host(model)
    blocks = host.blocks(tower)
    for block in blocks:
        block.training = True  # of the block alone
    try:
        return call()
    finally:
        for block in blocks:
            block.training = False
        reduction.noise = None


# The two forms


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 8), st.sampled_from([torch.float64, torch.float32]),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
@torch.no_grad()
def test_masked_gathered_and_padded_forms_agree(
    heads: int, batch: int, dtype: torch.dtype, class_token: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    pool = {} if class_token else {"class_token": False, "global_pool": "avg"}
    model = vit(heads, dtype, **pool)
    images = torch.randn(batch, 3, 32, 32, dtype=dtype)
    chosen = {layer: torch.rand(batch, 16) < torch.rand(batch, 1) for layer in (1, 2, 3)}
    chosen[2][0] = True  # an image that keeps everything
    chosen[3][-1] = False  # and one that keeps nothing
    reduction = decided(model, SViT(), QUARTERS, chosen)
    few = model.forward_features(images)
    assert not reduction.unfused
    many = masked(model, reduction, lambda: model.forward_features(images))
    assert all(torch.equal(reduction.decisions[layer] > 0, chosen[layer]) for layer in chosen)
    reduction.padded = True
    padded = model.forward_features(images)
    tolerance = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-5}
    torch.testing.assert_close(few, many, **tolerance)
    torch.testing.assert_close(few, padded, **tolerance)


@torch.no_grad()
def test_the_gathered_form_is_the_slow_loop() -> None:
    """Image by image, with the tokens that stay and no others, by the block's own modules."""
    model = vit(3, torch.float64)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    chosen = {layer: torch.rand(3, 16) < 0.6 for layer in (1, 2, 3)}
    expected = []
    for b, image in enumerate(images):
        x = model._pos_embed(model.patch_embed(image[None]))
        for layer, block in enumerate(model.blocks):
            active = [0, *(1 + n for n in range(16) if layer == 0 or chosen[layer][b, n])]
            x[:, active] = block(x[:, active])
        expected.append(model.norm(x))
    decided(model, SViT(), QUARTERS, chosen)
    torch.testing.assert_close(model.forward_features(images), torch.cat(expected))


@torch.no_grad()
@pytest.mark.parametrize("everything", [True, False])
def test_a_whole_batch_may_keep_everything_or_nothing(everything: bool) -> None:
    model = vit(2, class_token=False, global_pool="avg")
    images = torch.randn(2, 3, 32, 32)
    dense = model.forward_features(images)
    first = model.norm(model.blocks[0](model._pos_embed(model.patch_embed(images))))
    chosen = {layer: torch.full((2, 16), everything) for layer in (1, 2, 3)}
    reduction = decided(model, SViT(), QUARTERS, chosen)
    for reduction.padded in (False, True):
        torch.testing.assert_close(model.forward_features(images), dense if everything else first)


@pytest.mark.parametrize("name", SMALL)
def test_every_host_can_be_gated(name: str) -> None:
    """A batch gives what its images give alone, and what the masked form gives."""
    torch.manual_seed(0)
    one = SMALL[name]
    model, inputs = one.build(), one.inputs(3)
    dense = answered(one, model, inputs)
    reduction = tokred.apply(model, "svit", 0.5)
    lively_gates(reduction)
    few = answered(one, model, inputs)
    assert few.shape == dense.shape and few.isfinite().all() and not torch.equal(few, dense)
    many = masked(model, reduction, lambda: answered(one, model, inputs))
    torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-4)
    tokred.remove(model)
    assert torch.equal(answered(one, model, inputs), dense)


@torch.no_grad()
def test_attention_that_is_not_fused_runs_padded() -> None:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=48,
        image_size=32, patch_size=8, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    images = torch.randn(3, 3, 32, 32)
    chosen = {layer: torch.rand(3, 16) < 0.5 for layer in (1, 2, 3)}
    reduction = decided(model, SViT(), QUARTERS, chosen)
    eager = model(images).last_hidden_state
    assert reduction.unfused == {1, 2, 3}
    model.set_attn_implementation("sdpa")
    reduction = decided(model, SViT(), QUARTERS, chosen)
    torch.testing.assert_close(model(images).last_hidden_state, eager)
    assert not reduction.unfused


@torch.no_grad()
def test_a_mask_of_the_users_is_obeyed() -> None:
    model = vit(2)
    images = torch.randn(2, 3, 32, 32)
    chosen = {layer: torch.rand(2, 16) < 0.5 for layer in (1, 2, 3)}
    decided(model, SViT(), QUARTERS, chosen)
    free = model.forward_features(images)
    mask = torch.zeros(17, 17).masked_fill(torch.rand(17, 17) < 0.3, -1.0)
    own = model.forward_features(images, attn_mask=mask)
    assert not torch.allclose(own, free)
    alone = [
        decided(model, SViT(), QUARTERS, {k: v[b : b + 1] for k, v in chosen.items()})
        and model.forward_features(images[b : b + 1], attn_mask=mask)
        for b in range(2)
    ]
    torch.testing.assert_close(own, torch.cat(alone))


# Attention image by image


@pytest.mark.parametrize("lengths", [[5, 1, 7], [3], [2, 2]])
@pytest.mark.parametrize("way", [varlen.attend, partial(varlen._padded, dropout_p=0.0, scale=None)])
def test_attention_stays_within_an_image(lengths: list[int], way: Any) -> None:
    total = sum(lengths)
    q, k, v = (torch.randn(1, 3, total, 4, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    ours = way(q, k, v, lengths)
    group = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    same = group[:, None] == group
    logits = (q @ k.transpose(2, 3) / 2).masked_fill(~same, -torch.inf)
    slow = logits.softmax(-1) @ v
    torch.testing.assert_close(ours, slow)
    ours_grad = torch.autograd.grad(ours.square().sum(), [q, k, v])
    slow_grad = torch.autograd.grad(slow.square().sum(), [q, k, v])
    torch.testing.assert_close(ours_grad, slow_grad)


# Training


def test_a_pruned_key_counts_for_nothing_and_has_its_gradient() -> None:
    logits, value = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64, requires_grad=True)
    pruned = mask == 0

    def gradients(logits: Tensor) -> tuple[Tensor, Tensor]:
        ours = (logits + log_mask(mask)).softmax(-1) @ value
        weight = logits.exp() * mask
        exact = weight / weight.sum(1, keepdim=True) @ value
        torch.testing.assert_close(ours, exact, rtol=1e-14, atol=1e-14)
        wanted = torch.autograd.grad(exact.square().sum(), mask)[0]
        return torch.autograd.grad(ours.square().sum(), mask)[0], wanted

    ours, wanted = gradients(logits - 3 * pruned)
    torch.testing.assert_close(ours, wanted)
    assert (wanted[pruned] != 0).all()
    # Keys that queries like far better than those that are kept may not drown everything else.
    ours, wanted = gradients(logits + 30 * pruned)
    loudest = wanted[~pruned].abs().max()
    assert (wanted[pruned].abs() > 1e6 * loudest).all()
    torch.testing.assert_close(ours[~pruned], wanted[~pruned])
    torch.testing.assert_close(ours[pruned], wanted[pruned].sign() * loudest)


def test_straight_through_is_hard_with_the_gradient_of_a_softmax() -> None:
    logits = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    noise = gumbel(logits)
    hard = straight_through(logits, noise, temperature=0.7)
    assert torch.equal(hard, ((logits + noise)[..., 0] > (logits + noise)[..., 1]).double())
    soft = ((logits + noise) / 0.7).softmax(-1)[..., 0]
    ours = torch.autograd.grad((hard * torch.arange(5)).sum(), logits)
    torch.testing.assert_close(ours, torch.autograd.grad((soft * torch.arange(5)).sum(), logits))


def test_gumbel_noise_is_that() -> None:
    noise = gumbel(torch.empty(200_000), torch.Generator().manual_seed(0))
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - torch.pi**2 / 6) < 0.02
    # Samples are chosen as often as their probabilities say.
    logits = torch.tensor([0.7, 0.3]).log().expand(100_000, 1, 2)
    assert abs(straight_through(logits, gumbel(logits)).mean() - 0.7) < 0.01


@pytest.mark.parametrize("method", ["svit", "dynamicvit"])
def test_gradients_reach_every_gate(method: str) -> None:
    model = vit(2).train()
    reduction = tokred.apply(model, method, Shares((1, 0.75, 0.5, 0.25)))
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert list(reduction.decisions) == [1, 2, 3]
    for layer, mask in reduction.decisions.items():
        assert mask.shape == (4, 16) and set(mask.unique().tolist()) <= {0.0, 1.0}
        grads = [parameter.grad for parameter in reduction.gates[str(layer)].parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        assert any(grad.abs().sum() > 0 for grad in grads if grad is not None)
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


def test_random_gates_begin_near_their_targets() -> None:
    model = vit(4).train()
    reduction = tokred.apply(model, "svit", Shares((1, 0.9, 0.5, 0.3)))
    assert reduction.targets == {1: 0.9, 2: 0.5, 3: 0.3}
    model(torch.randn(64, 3, 32, 32))
    for layer, target in reduction.targets.items():
        assert abs(float(reduction.decisions[layer].detach().mean()) - target) < 0.15


def test_the_targets_of_stages_are_their_powers() -> None:
    model = small("deit")
    targets = tokred.apply(model, "svit", tokred.Stages(0.7, layers=(1, 2, 3))).targets
    assert targets == pytest.approx({1: 0.7, 2: 0.49, 3: 0.343})


def test_checkpointed_training_has_the_same_gradients() -> None:
    images = torch.randn(3, 3, 32, 32)
    model = vit(2).train()
    reduction = tokred.apply(model, "svit", QUARTERS)

    def gradients() -> list[Tensor]:
        torch.manual_seed(5)
        loss = model(images).square().sum()
        loss = loss + sum(mask.mean() for mask in reduction.decisions.values())
        parameters = [*model.parameters(), *reduction.gates.parameters()]
        return list(torch.autograd.grad(loss, parameters))

    plain = gradients()
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(), plain)


def test_what_remembers_leaves_out_for_good() -> None:
    model = vit(2)
    images = torch.randn(3, 3, 32, 32)
    chosen = {layer: torch.rand(3, 16) < 0.6 for layer in (1, 2, 3)}
    product = {1: chosen[1], 2: chosen[1] & chosen[2], 3: chosen[1] & chosen[2] & chosen[3]}
    decided(model, SViT(), QUARTERS, product)
    expected = outputs(model, images)
    reduction = decided(model, SViT(reactivate=False), QUARTERS, chosen)
    torch.testing.assert_close(outputs(model, images), expected)
    many = masked(model, reduction, lambda: outputs(model, images))
    torch.testing.assert_close(many, expected)
    assert all(torch.equal(reduction.decisions[k] > 0, product[k]) for k in chosen)


def test_what_is_dropped_is_what_would_never_come_back() -> None:
    """Except that the model works on fewer tokens from then on, the two are the same."""
    model, images = vit(2), torch.randn(3, 3, 32, 32)
    reduction = tokred.apply(model, SViT(reactivate=False), QUARTERS)
    lively_gates(reduction)
    expected = outputs(model, images)
    left = [stage.counts for stage in tokred.inspect(model, images).stages]
    dropping = SViT(reduction.gates, reactivate=False, preserve=False)
    reduction = tokred.apply(model, dropping, QUARTERS)
    torch.testing.assert_close(outputs(model, images), expected)
    assert [stage.counts for stage in tokred.inspect(model, images).stages] == left
    many = masked(model, reduction, lambda: outputs(model, images))
    torch.testing.assert_close(many, expected)


@torch.no_grad()
def test_what_is_preserved_is_pooled_and_what_is_dropped_is_not() -> None:
    model = vit(2, class_token=False, global_pool="avg", fc_norm=False)
    images = torch.randn(2, 3, 32, 32)
    reduction = tokred.apply(model, SViT(reactivate=False), Shares((1, 0.9, 0.9, 0.9)))
    lively_gates(reduction)
    tokred.calibrate(model, images)
    features = model.forward_features(images)
    torch.testing.assert_close(model(images), model.head(features.mean(1)))
    left = tokred.inspect(model, images).stages[-1].labels.flatten(1) >= 0
    assert left.any(1).all() and not left.all(1).any()
    dropping = SViT(reduction.gates, reactivate=False, preserve=False)
    tokred.apply(model, dropping, Shares((1, 0.9, 0.9, 0.9)))
    mean = torch.stack([row[there].mean(0) for row, there in zip(features, left, strict=True)])
    torch.testing.assert_close(model(images), model.head(mean))


def test_what_drops_cannot_be_trained_where_tokens_are_pooled() -> None:
    for name in ("mae, average pooling", "siglip, attention pooling"):
        model = small(name).train()
        tokred.apply(model, "dynamicvit", 0.5)
        with pytest.raises(ValueError, match="cannot be trained on a model that pools"):
            model(images_for(model))
        tokred.apply(model, "svit", 0.5)
        model(images_for(model))


# A fixed number


@torch.no_grad()
def test_a_fixed_number_takes_the_best() -> None:
    model = vit(2)
    images = torch.randn(3, 3, 32, 32)
    reduction = tokred.apply(model, SViT(fixed=True), QUARTERS)
    lively_gates(reduction)
    trace = tokred.inspect(model, images)
    assert [stage.counts for stage in trace.stages] == [(12,) * 3, (8,) * 3, (4,) * 3]
    x = model.blocks[0](model._pos_embed(model.patch_embed(images)))[:, 1:]
    scores = reduction.gates["1"](x)
    odds = scores[..., 0] - scores[..., 1]
    for row, labels in zip(odds, trace.stages[0].labels.flatten(1), strict=True):
        best = np.argsort(-row.numpy(), kind="stable")[:12]
        assert sorted(best) == (labels >= 0).nonzero()[:, 0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("reducer", [SViT(fixed=True), DynamicViT()], ids=str)
def test_fixed_numbers_compile_as_one_graph(reducer: Any) -> None:
    model = vit(2)
    images = torch.randn(2, 3, 32, 32)
    reduction = tokred.apply(model, reducer, QUARTERS)
    lively_gates(reduction)
    eager = outputs(model, images)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(outputs(compiled, images), eager)
    assert backend.frame_count == 1


def test_varying_numbers_run_in_a_compiled_model() -> None:
    model = vit(2)
    images = torch.randn(2, 3, 32, 32)
    reduction = tokred.apply(model, "svit", QUARTERS)
    lively_gates(reduction)
    eager = outputs(model, images)
    torch.testing.assert_close(outputs(torch.compile(model, backend="eager"), images), eager)


# DynamicViT


def test_the_predictor_equals_a_slow_loop() -> None:
    predictor = Predictor(8).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    there = torch.tensor([[1.0, 1, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.float64)
    ours = predictor(x, there).exp()
    norm, fc, _ = predictor.local
    for b in range(2):
        said = [F.gelu(fc(norm(token))) for token in x[b]]
        total = sum((said[n][4:] for n in range(5) if there[b, n]), torch.zeros(4).double())
        every = total / there[b].sum()
        for n in range(5):
            z = torch.cat([said[n][:4], every])
            z = predictor.fc3(F.gelu(predictor.fc2(F.gelu(predictor.fc1(z)))))
            torch.testing.assert_close(ours[b, n], z.softmax(-1))


@torch.no_grad()
def test_dynamicvit_drops_what_its_predictors_say() -> None:
    model = vit(2)
    images = torch.randn(3, 3, 32, 32)
    # Of 16 tokens 12, of these 8, of these 4 stay; more odds for those further on.
    chosen = {}
    for layer, keep in ((1, 12), (2, 8), (3, 4)):
        chosen[layer] = (torch.arange(16) >= 16 - keep).expand(3, 16)
    reduction = decided(model, DynamicViT(), QUARTERS, chosen)
    many = masked(model, reduction, lambda: outputs(model, images))
    for layer, keep in ((1, 16), (2, 12), (3, 8)):  # predictors see those that are left
        reduction.gates[str(layer)] = Given(chosen[layer][:, 16 - keep :])
    torch.testing.assert_close(outputs(model, images), many)
    counts = [stage.counts for stage in tokred.inspect(model, images).stages]
    assert counts == [(12,) * 3, (8,) * 3, (4,) * 3]


def test_predictors_stand_where_the_number_falls() -> None:
    model = vit(2, depth=12)
    reduction = tokred.apply(model, "dynamicvit", 0.7)
    assert list(reduction.gates) == ["3", "6", "9"]
    assert list(tokred.apply(model, "svit", 0.7).gates) == [str(n) for n in range(3, 12)]


# What gates are to a model


def test_gates_are_no_part_of_the_model() -> None:
    model = small("vit")
    keys, was = list(model.state_dict()), traces(model)
    reduction = tokred.apply(model, "svit", 0.5)
    assert list(model.state_dict()) == keys
    assert reduction.state_dict().keys() == reduction.gates.state_dict().keys()
    tokred.remove(model)
    assert traces(model) == was


def test_gates_are_copied_and_pickled_with_the_model() -> None:
    model, images = vit(2), torch.randn(2, 3, 32, 32)
    lively_gates(tokred.apply(model, "svit", QUARTERS))
    expected = outputs(model, images)
    twin = copy.deepcopy(model)
    assert reduction_of(twin).gates is not reduction_of(model).gates
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for other in (twin, again):
        torch.testing.assert_close(outputs(other, images), expected, rtol=0, atol=0)


def test_gates_are_saved_and_read_again(tmp_path: Path) -> None:
    model, images = vit(2), torch.randn(2, 3, 32, 32)
    for method, reducer in (("svit", SViT), ("dynamicvit", DynamicViT)):
        reduction = tokred.apply(model, method, tokred.Stages(0.6, layers=(1, 3)))
        lively_gates(reduction)
        expected = outputs(model, images)
        file = tmp_path / f"{method}.safetensors"
        reduction.save(file)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = tokred.apply(model, reducer(gates=file))
        assert again.targets == pytest.approx(reduction.targets)
        assert torch.equal(outputs(model, images), expected)
        fresh = tokred.apply(model, method, tokred.Stages(0.6, layers=(1, 3)))
        fresh.load(str(file))
        assert torch.equal(outputs(model, images), expected)
        given = tokred.apply(model, reducer(gates=fresh.gates), tokred.Stages(0.6, layers=(1, 3)))
        assert given.gates is fresh.gates
        assert torch.equal(outputs(model, images), expected)


def written(path: Path, **changes: Any) -> Path:
    """A file of gates for a model of 4 layers and width 16, changed."""
    gates = nn.ModuleDict({str(layer): Gate(changes.pop("dim", 16)) for layer in (1, 2, 3)})
    tensors = gates.state_dict()
    about = {"method": "svit", "shares": json.dumps([1, 0.75, 0.5, 0.25]), "width": "16"}
    tensors |= changes.pop("tensors", {})
    about |= changes
    save_file(tensors, path, metadata={k: v for k, v in about.items() if v})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": "192"}, "is for tokens of width 192; those of VisionTransformer have 16"),
        ({"dim": 32}, r"1.fc1.bias has the shape \(8,\), but this model needs \(4,\)"),
        ({"shares": json.dumps([1, 0.5])}, "is for a model of 2 layers; this one has 4"),
        ({"shares": json.dumps([1, 1, 0.5, 0.25])}, r"for the layers \[1, 2, 3\], but \[2, 3\]"),
        ({"method": "dynamicvit"}, "is of 'dynamicvit', not of SViT"),
        ({"method": ""}, "does not say what it is for"),
        (
            {"tensors": {"2.norm.weight": torch.full((16,), float("nan"))}},
            "2.norm.weight has values that are not finite",
        ),
        ({"tensors": {"2.other": torch.ones(1)}}, "2.other"),
    ],
    ids=["width", "shape", "depth", "layers", "method", "nothing", "NaN", "name"],
)
def test_bad_gates_are_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = vit(2)
    tokred.apply(model, "tome", 0.5)
    before = reduction_of(model)
    file = written(tmp_path / "gates.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        tokred.apply(model, SViT(gates=file))
    assert reduction_of(model) is before


def test_missing_and_broken_files_are_errors(tmp_path: Path) -> None:
    model = vit(2)
    was = traces(model)
    with pytest.raises(FileNotFoundError, match="gates must be a file of weights: there is none"):
        tokred.apply(model, SViT(gates=tmp_path / "none.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        tokred.apply(model, SViT(gates=str(broken)))
    assert traces(model) == was
    file = written(tmp_path / "gates.safetensors")
    with pytest.raises(ValueError, match="was trained for another keep rate"):
        tokred.apply(model, SViT(gates=file), Shares((1, 0.5, 0.5, 0.2)))
    fixed = tokred.apply(model, SViT(gates=file, fixed=True), Shares((1, 0.5, 0.5, 0.2)))
    assert [fixed.counts(16, (4, 4))] == [(16, 8, 8, 3)]


def released_like(
    numbers: Sequence[int], dim: int = 16, names: Sequence[str] = ("ln", "mlp.0", "mlp.2")
) -> tuple[dict[str, Tensor], nn.ModuleDict]:
    """A checkpoint with gates by number, and other weights; and the gates of a model of 4 layers
    that are the same."""
    torch.manual_seed(5)
    gates = nn.ModuleDict({str(layer): Gate(dim) for layer in (1, 2, 3)})
    tensors = {"blocks.0.norm1.weight": torch.ones(dim)}
    for number, gate in zip(numbers, gates.values(), strict=True):
        for own, theirs in zip(("norm", "fc1", "fc2"), names, strict=True):
            for part in ("weight", "bias"):
                value = gate.get_parameter(f"{own}.{part}")
                nn.init.normal_(value)
                tensors[f"selective_modules.{number}.{theirs}.{part}"] = value.detach()
    return tensors, gates


@pytest.mark.parametrize("numbers", [(0, 1, 2), (1, 2, 3)])
@pytest.mark.parametrize("form", ["state dict", "pth", "whole model", "safetensors"])
def test_released_gates_are_read_by_their_names(
    numbers: tuple[int, ...], form: str, tmp_path: Path
) -> None:
    tensors, gates = released_like(numbers)
    model, images = vit(2), torch.randn(2, 3, 32, 32)
    schedule = Shares((1, 0.75, 0.5, 0.25))
    tokred.apply(model, SViT(gates=gates), schedule)
    expected = outputs(model, images)
    source: Any = tensors
    if form == "safetensors":
        source = tmp_path / "svit.safetensors"
        save_file(tensors, source)
    elif form != "state dict":
        source = tmp_path / "svit.pth"
        prefix = "module.backbone." if form == "whole model" else ""
        content = {prefix + name: value for name, value in tensors.items()}
        torch.save({"model": content, "epoch": 5, "args": argparse.Namespace(lr=1e-5)}, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reduction = tokred.apply(model, SViT(gates=source), schedule)
    assert reduction.gates is not None and list(reduction.gates) == ["1", "2", "3"]
    assert torch.equal(outputs(model, images), expected)
    reduction.save(tmp_path / "own.safetensors")
    tokred.apply(model, SViT(gates=tmp_path / "own.safetensors"))
    assert torch.equal(outputs(model, images), expected)


def test_released_gates_are_read_strictly(tmp_path: Path) -> None:
    tensors, _ = released_like((0, 1, 2))
    model, schedule = vit(2), Shares((1, 0.75, 0.5, 0.25))
    for more, message in (
        (
            {"selective_modules.1.mlp.4.weight": torch.ones(2, 2)},
            r"selective_modules\.1 is no Layer",
        ),
        ({"selective_modules.temperature": torch.ones(1)}, "temperature is no weight of a gate"),
        ({"selective_modules.2.mlp.0.weight": torch.ones(5, 16)}, r"\[5, 16\]"),
        ({"selective_modules.0.ln.bias": torch.full((16,), torch.nan)}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            SViT(gates=tensors | more)
    missing = {name: value for name, value in tensors.items() if not name.endswith("1.mlp.2.bias")}
    with pytest.raises(ValueError, match="is no LayerNorm of C"):
        SViT(gates=missing)
    with pytest.raises(ValueError, match=r"must hold weights named selective_modules"):
        SViT(gates={"head.weight": torch.ones(2)})
    # Gates for other layers, or another width.
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2\], but \[2, 3\]"):
        tokred.apply(model, SViT(gates=tensors), Shares((1, 1, 0.5, 0.25)))
    wide, _ = released_like((0, 1, 2), dim=32)
    with pytest.raises(ValueError, match=r"has the shape \(32,\), but this model needs \(16,\)"):
        tokred.apply(model, SViT(gates=wide), schedule)
    file = tmp_path / "svit.pth"
    torch.save({"state_dict": {"head.weight": torch.ones(2)}}, file)
    with pytest.raises(ValueError, match="does not say what it is for"):
        tokred.apply(model, SViT(gates=file), schedule)
    torch.save(tensors, file)
    with pytest.raises(ValueError, match="does not say what it is for"):
        tokred.apply(model, DynamicViT(gates=file), schedule)
    file.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        tokred.apply(model, SViT(gates=file), schedule)
    for odd in (5, [1]):  # taken for no gates at all, up to now
        for method in (SViT, DynamicViT):
            with pytest.raises(TypeError, match="gates must be a file, or modules by layer"):
                tokred.apply(model, method(gates=odd), schedule)


def test_random_gates_are_warned_of() -> None:
    model = vit(2)
    with pytest.warns(UserWarning, match="are random, and so is what it leaves out"):
        tokred.apply(model, "svit", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokred.apply(model.train(), "svit", 0.5)


def test_only_what_is_learned_is_saved(tmp_path: Path) -> None:
    reduction = tokred.apply(vit(2), "tome", 0.5)
    assert reduction.gates is None and reduction.state_dict() == {} and not reduction.targets
    with pytest.raises(ValueError, match="it learns nothing"):
        reduction.save(tmp_path / "gates.safetensors")


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="reactivate must be False where preserve is"):
        SViT(preserve=False)
    with pytest.raises(ValueError, match="full_grid must be True for SViT"):
        tokred.apply(vit(2), "svit", 0.5, full_grid=False)


# What is told of it


@torch.no_grad()
def test_the_trace_tells_usage_and_what_came_back() -> None:
    model = vit(2)
    images = torch.randn(3, 3, 32, 32)
    chosen = {layer: torch.rand(3, 16) < 0.5 for layer in (1, 2, 3)}
    decided(model, SViT(), QUARTERS, chosen)
    trace = tokred.inspect(model, images)
    assert [stage.counts for stage in trace.stages] == [
        tuple(chosen[layer].sum(1).tolist()) for layer in (1, 2, 3)
    ]
    used = 1 + sum(mask.int() for mask in chosen.values())
    assert torch.equal(trace.usage().flatten(1), used)
    back = trace.reactivated()
    assert back[1] == 0
    for layer in (2, 3):
        again = (chosen[layer] & ~chosen[layer - 1]).sum() / chosen[layer].sum()
        assert back[layer] == pytest.approx(float(again))
    counts = chosen[2].sum(1)
    told = f"{round(float(counts.float().mean()))} .*of 16; images have {counts.min()} to"
    assert re.search(told, str(trace).split("\n")[4])


@torch.no_grad()
def test_usage_of_methods_that_drop_and_of_those_that_come_back() -> None:
    model, images = vit(2), torch.randn(2, 3, 32, 32)
    tokred.apply(model, "topk", Exactly((16, 8, 8, 4)))
    usage = tokred.inspect(model, images).usage()
    assert sorted(usage[0].flatten().tolist()) == [1] * 8 + [3] * 4 + [4] * 4
    tokred.apply(model, "topk", Exactly((16, 8, 16, 8)))
    assert tokred.inspect(model, images).reactivated()[3] == 0


@torch.no_grad()
@pytest.mark.parametrize("reactivate", [True, False])
def test_calibrated_gates_keep_their_share(reactivate: bool) -> None:
    model, images = vit(2), torch.randn(8, 3, 32, 32)
    reduction = tokred.apply(model, SViT(reactivate=reactivate), QUARTERS)
    lively_gates(reduction)
    raised = tokred.calibrate(model, images)
    assert raised.keys() == reduction.targets.keys()
    for stage in tokred.inspect(model, images).stages:
        assert sum(stage.counts) == round(reduction.targets[stage.layer] * 16 * 8)
    assert all(abs(more) < 1e-6 for more in tokred.calibrate(model, images).values())


def test_only_gates_that_decide_by_themselves_are_calibrated() -> None:
    model, images = vit(2), torch.randn(2, 3, 32, 32)
    tokred.apply(model, "svit", QUARTERS)
    with pytest.raises(ValueError, match="must be in eval mode"):
        tokred.calibrate(model.train(), images)
    tokred.apply(model, "tome", 0.5)
    with pytest.raises(ValueError, match="has no gates to calibrate"):
        tokred.calibrate(model, images)


@torch.no_grad()
def test_the_free_limit_has_the_mean_counts() -> None:
    model, images = vit(2), torch.randn(4, 3, 32, 32)
    tokred.apply(model, "svit", QUARTERS)
    chosen = {layer: torch.rand(4, 16) < share for layer, share in ((1, 0.3), (2, 0.7), (3, 0.2))}
    decided(model, SViT(), QUARTERS, chosen)
    bench = tokred.bench(model, images, rounds=1, warmup=0)
    means = [max(1, round(float(mask.sum(1).float().mean()))) for mask in chosen.values()]
    assert bench.counts == (16, *sorted(means, reverse=True))


def test_a_gate_decides_in_its_own_dtype() -> None:
    gate = Gate(16)
    x = torch.randn(2, 5, 16)
    assert gate(x.bfloat16()).dtype == torch.float32
    tokens = Tokens(x=x, size=torch.ones(2, 5), gate=gate)
    scores = gate(x)
    assert torch.equal(SViT()(tokens, 1).labels() >= 0, scores[..., 0] > scores[..., 1])


# The bundled gates


@pytest.mark.slow
@torch.no_grad()
def test_bundled_gates_beat_random_ones_and_top_k(digits: Digits) -> None:
    model, images, labels = digits()
    images, labels = images[:200], labels[:200]

    def right() -> float:
        return float((model(images).argmax(1) == labels).float().mean())

    dense = right()
    reduction = tokred.apply(model, SViT(zoo.gates()))
    trained, stages = right(), tokred.inspect(model, images).stages
    means = {stage.layer: sum(stage.counts) / len(images) for stage in stages}
    for layer, target in reduction.targets.items():
        assert abs(means[layer] / 196 - target) < 0.06
    assert abs(sum(means.values()) / 9 / 196 - sum(reduction.targets.values()) / 9) < 0.03
    assert len({count for stage in stages for count in stage.counts}) > 30

    lively_gates(tokred.apply(model, "svit", 0.7))
    tokred.calibrate(model, images)
    by_lot = right()
    counts = [196] * 3 + sorted((round(mean) for mean in means.values()), reverse=True)
    tokred.apply(model, "topk", Exactly(tuple(counts)))
    top_k = right()
    assert dense - 0.03 < trained and trained > top_k + 0.02 and trained > by_lot + 0.02


@torch.no_grad()
def test_bundled_predictors_beat_top_k(digits: Digits) -> None:
    model, images, labels = digits()
    reached = {}
    for method in (DynamicViT(zoo.gates(method="dynamicvit")), "topk"):
        tokred.apply(model, method, 0.7)
        reached[str(method)] = float((model(images[:200]).argmax(1) == labels[:200]).float().mean())
    assert reached["DynamicViT()"] > reached["topk"] + 0.02


@torch.no_grad()
def test_bundled_gates_of_scenes_keep_the_segmenter_whole() -> None:
    name = "digits_scenes"
    model, held_out = zoo.load(name), zoo.held_out(name)
    images, labels = zoo.normalise(held_out.images[:12]), held_out.labels[:12]
    reached = {}
    for method in (None, SViT(zoo.gates(name)), "topk"):
        tokred.remove(model)
        if method is not None:
            tokred.apply(model, method, tokred.Stages(0.7))
        scores = model(images)
        assert scores.shape[2:] == labels.shape[1:]
        reached[str(method).split("(")[0]] = mean_iou(scores.argmax(1), labels, zoo.SCENE_CLASSES)
    assert reached["None"] - 0.03 < reached["SViT"] and reached["SViT"] > reached["topk"] + 0.02


def test_what_is_not_bundled_is_named() -> None:
    with pytest.raises(ValueError, match="there are no gates for 'digits' and 'svit'; bundled are"):
        zoo.gates("digits")
