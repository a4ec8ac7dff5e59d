"""Losses are what their equations say; training goes on where it stopped, and leaves what it should
leave; many processes train as one does."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from training_run import STEPS_PER_EPOCH, Digits, curve, recipe, reduced, run, small_vit

import tokred
from tokred import training
from tokred.data import processes, zoo
from tokred.models.segmenter import LinearDecoder, Segmenter
from tokred.patching import reduction_of
from tokred.training import Noise, Recipe, checkpoints, fit, losses, optimiser
from tokred.training.losses import cross_entropy, kl_loss, rate_loss, token_loss

pytest.importorskip("accelerate")

METHODS = ["none", "tome", "svit", "dynamicvit"]


@pytest.fixture(autouse=True)
def _plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gates_learn" not in request.node.name:  # drawing takes longer than most trainings
        monkeypatch.setattr(checkpoints, "plot", lambda out: None)


# Losses


def test_the_rate_loss_is_the_hand_computed_one() -> None:
    decisions = {
        3: torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]]),  # .75 and .25 kept, .5 together
        7: torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]),  # .25 and 0, .125 together
    }
    targets = {3: 0.7, 7: 0.49}
    dynamic = (0.2**2 + 0.365**2) / 2
    fixed = (0.05**2 + 0.45**2 + 0.24**2 + 0.49**2) / 4
    assert float(rate_loss(decisions, targets)) == pytest.approx(dynamic, rel=1e-6)
    assert float(rate_loss(decisions, targets, per_image=True)) == pytest.approx(fixed, rel=1e-6)
    # Two images that make up for each other cost nothing where only their mean counts.
    mixed = {0: torch.tensor([[1.0, 1], [0, 0]])}
    assert float(rate_loss(mixed, {0: 0.5})) == 0
    assert float(rate_loss(mixed, {0: 0.5}, per_image=True)) == 0.25


@pytest.mark.parametrize("per_image", [False, True])
def test_the_rate_loss_is_that_of_a_slow_loop(per_image: bool) -> None:
    targets = {2: 0.7, 5: 0.4, 6: 0.3}
    decisions = {layer: torch.rand(3, 5, dtype=torch.float64) for layer in targets}
    total = 0.0
    for layer, target in targets.items():
        mask = decisions[layer].numpy()
        shares = [sum(row) / len(row) for row in mask]
        shares = shares if per_image else [sum(shares) / len(shares)]
        total += sum((share - target) ** 2 for share in shares) / len(shares)
    expected = total / len(targets)
    assert float(rate_loss(decisions, targets, per_image)) == pytest.approx(expected, rel=1e-5)


def test_the_distances_from_the_teacher_are_those_of_slow_loops() -> None:
    random = np.random.default_rng(0)
    ours, theirs = random.normal(size=(2, 3, 4)) * 3
    student, teacher = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (ours, theirs))
    expected = 0.0
    for y, other in zip(student, teacher, strict=True):
        expected += sum(p * math.log(p / q) for p, q in zip(y, other, strict=True)) / len(student)
    found = kl_loss(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(kl_loss(torch.from_numpy(ours), torch.from_numpy(ours + 2))) == pytest.approx(0)

    t, dense = random.normal(size=(2, 2, 5, 4))
    kept = np.array([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    expected = (
        sum(((t[b, i] - dense[b, i]) ** 2).mean() for b in range(2) for i in range(5) if kept[b, i])
        / 3
    )
    given = [torch.from_numpy(x) for x in (t, dense, kept)]
    assert float(token_loss(*given)) == pytest.approx(expected, rel=1e-5)
    assert float(token_loss(given[0], given[1], 0 * given[2])) == 0  # nothing left to compare


def test_gradients_of_losses_go_where_they_should() -> None:
    mask = torch.full((2, 4), 0.5, requires_grad=True)
    rate_loss({0: mask}, {0: 0.25}).backward()  # d/dm of (m - t)^2, over 8 tokens
    assert_close(mask.grad, torch.full((2, 4), 2 * 0.25 / 8))
    student, mask = torch.randn(2, 4, 3, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    token_loss(student, torch.randn(2, 4, 3), mask).backward()
    assert student.grad is not None and mask.grad is None


def test_cross_entropy_takes_images_pixels_and_outputs_with_logits() -> None:
    scores, labels = torch.randn(4, 3), torch.tensor([0, 2, -100, 1])
    expected = nn.functional.cross_entropy(scores, labels, label_smoothing=0.1)
    assert_close(cross_entropy(scores, labels, 0.1), expected)
    assert_close(cross_entropy({"logits": scores}, labels, 0.1), expected)
    assert_close(cross_entropy(scores, labels[:, None].eq(torch.arange(3)).float()).ndim, 0)
    pixels, classes = torch.randn(2, 3, 4, 6), torch.randint(3, (2, 4, 6))
    classes[:, 0] = 255
    assert_close(
        cross_entropy(pixels, classes, ignore_index=255),
        nn.functional.cross_entropy(pixels, classes, ignore_index=255),
    )
    larger = nn.functional.interpolate(pixels, size=(8, 12), mode="bilinear")
    classes = torch.randint(3, (2, 8, 12))
    assert_close(cross_entropy(pixels, classes), nn.functional.cross_entropy(larger, classes))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: rate_loss({}, {3: 0.7}), "there are no decisions"),
        (lambda: rate_loss({2: torch.ones(1, 1)}, {3: 0.7}), "of the layers [2], targets of [3]"),
        (lambda: kl_loss(torch.ones(1, 2), torch.ones(1, 3)), "must have one shape"),
        (lambda: token_loss(*[torch.ones(1, 5, 2)] * 2, torch.ones(1, 4)), "must be as many"),
        (lambda: cross_entropy(torch.ones(1, 3), torch.tensor([3])), "labels must be 0 to 2"),
        (lambda: cross_entropy(torch.ones(1, 3), torch.tensor([-1])), "there is -1"),
        (lambda: cross_entropy(torch.ones(1, 3), torch.ones(1, 2, 2).long()), "do not fit"),
        (lambda: cross_entropy((1, 2), torch.ones(1).long()), "without logits"),
    ],
)
def test_losses_refuse_what_makes_no_sense(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        wrong()
    assert message in str(error.value)


def test_many_processes_have_the_losses_and_gradients_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes, one after the other; what travels between them is known beforehand."""
    mask, weights = torch.rand(4, 5), torch.rand(5)
    values, counted = torch.rand(4, 5), (torch.rand(4, 5) > 0.6).float()

    def loss(rows: slice, w: Tensor) -> Tensor:
        rate = rate_loss({0: mask[rows] * w}, {0: 0.3})
        return rate + losses.weighted_mean(values[rows] * w, counted[rows])

    whole = weights.clone().requires_grad_()
    loss(slice(0, 4), whole).backward()
    halves = [slice(0, 2), slice(2, 4)]
    grads, terms = [], []
    monkeypatch.setattr(processes, "_distributed", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    for mine, other in (halves, halves[::-1]):
        arriving = iter([(mask[other] * weights).mean(), counted[other].sum()])
        monkeypatch.setattr(processes.dist, "all_reduce", lambda x, a=arriving: x.add_(next(a)))
        w = weights.clone().requires_grad_()
        term = loss(mine, w)
        term.backward()
        grads.append(w.grad)
        terms.append(term.detach())
    assert_close(sum(grads) / 2, whole.grad)
    monkeypatch.setattr(processes, "_distributed", lambda: False)
    assert_close(sum(terms) / 2, loss(slice(0, 4), weights))


# The loop


@pytest.mark.parametrize("method", METHODS)
def test_training_that_was_broken_off_goes_on_as_if_it_had_not_been(
    method: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": method, "dropout": 0.1, "every": 2, "validate": Digits(9)}

    def stop(step: int, row: object) -> None:
        if step == 5:  # one step after the last checkpoint, in the middle of the second epoch
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", **options, on_step=stop)
    assert len(curve(tmp_path / "parts")) == 5
    rest = run(tmp_path / "parts", **options, seed=7)  # other gates, which the checkpoint replaces
    assert (whole.resumed, rest.resumed) == (0, 4) and whole.steps == 2 * STEPS_PER_EPOCH
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert (whole.accuracy, whole.tokens) == (rest.accuracy, rest.tokens)
    for name in ("model", "gates"):
        first, second = (tmp_path / at / f"{name}.safetensors" for at in ("whole", "parts"))
        assert first.exists() == second.exists() == (name == "model" or "vit" in method)
        if first.exists():
            pairs = load_file(first), load_file(second)
            assert all(torch.equal(pairs[0][key], pairs[1][key]) for key in pairs[0])
    texts = [(tmp_path / at / "validation.csv").read_text() for at in ("whole", "parts")]
    assert texts[0] == texts[1] and texts[0].count("\n") == 3


def test_training_that_is_over_has_nothing_left_to_do(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    before = curve(tmp_path)
    again = run(tmp_path, epochs=1)
    assert again.resumed == again.steps == STEPS_PER_EPOCH and curve(tmp_path) == before
    assert run(tmp_path, epochs=1, fresh=True).resumed == 0


@pytest.mark.parametrize("method", ["tome", "atc"])
def test_fine_tuning_with_merged_tokens_lowers_the_loss(method: str, tmp_path: Path) -> None:
    model, data = small_vit(), Digits(32)
    tokred.apply(model, method, keep_rate=0.5)
    keys = model.state_dict().keys()
    with torch.no_grad():
        before = model(data.images)
    trained = fit(model, data, recipe(epochs=20, batch=16, lr=3e-3), tmp_path, bar=False)
    rows = curve(tmp_path)
    assert trained.last["loss"] < rows[0]["loss"] - 0.3
    assert not model.training and data.epochs == list(range(20))
    tokred.remove(model)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == keys == model.state_dict().keys()
    assert not torch.equal(before, model(data.images))


@pytest.mark.parametrize("method", ["svit", "dynamicvit"])
def test_a_frozen_model_stays_as_it_is_to_the_bit(method: str, tmp_path: Path) -> None:
    model = reduced(method, dropout=0.5)
    model.head.bias.requires_grad_(False)
    reduction = reduction_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates = {name: value.clone() for name, value in reduction.gates.state_dict().items()}
    fit(model, Digits(), recipe(method, frozen=True), tmp_path / "a", bar=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    moved = [not torch.equal(v, gates[n]) for n, v in reduction.gates.state_dict().items()]
    assert any(moved) and not (tmp_path / "a" / "model.safetensors").exists()
    # What was asked of parameters, modes and noise before is so again.
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert not any(m.training for m in model.modules()) and reduction.noise is None
    # Checkpoints hold what was trained alone; and without dropout the curve is another.
    weights = torch.load(training.latest(tmp_path / "a"), weights_only=True)["weights"]
    assert weights.keys() == gates.keys()
    run(tmp_path / "b", method, frozen=True)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_gates_learn_to_keep_what_they_should(tmp_path: Path) -> None:
    model = reduced("svit")
    for gate in reduction_of(model).gates.values():
        nn.init.constant_(gate.fc2.bias, 0.0)  # a half each, at first
    options = recipe("svit", frozen=True, epochs=12, gate_lr=2e-2, rate=20.0)
    fitted = fit(model, Digits(), options, tmp_path, validate=Digits(), bar=False)
    targets = reduction_of(model).targets
    first, last = curve(tmp_path)[0], fitted.last
    for layer, target in targets.items():
        assert abs(last[f"kept_{layer}"] - target) < 0.06 or (
            abs(last[f"kept_{layer}"] - target) < abs(first[f"kept_{layer}"] - target)
        )
    assert last["rate"] < first["rate"] / 4
    assert fitted.tokens is not None and 10 < fitted.tokens < 49
    panels = Image.open(tmp_path / "curve.png")
    assert panels.width > 1500


def test_a_tcformer_trains_from_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.build_tcformer()
    fit(model, Digits(), recipe("none", epochs=5, lr=2e-3), tmp_path, bar=False)
    losses = [row["loss"] for row in curve(tmp_path)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_somebody_elses_accelerator_stays_what_it_is(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    theirs = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    run(tmp_path, "none", epochs=1)
    assert theirs.mixed_precision == "bf16"
    assert accelerate.Accelerator(cpu=True, mixed_precision="bf16").state is not None
    accelerate.state.AcceleratorState._reset_state()


@pytest.mark.parametrize("samples", [0, 26])
def test_in_the_end_gates_keep_their_targets(samples: int, tmp_path: Path) -> None:
    model, data = reduced("svit"), Digits()
    for gate in reduction_of(model).gates.values():
        nn.init.constant_(gate.fc2.bias, 0.0)
        gate.fc2.bias.data[0] = 2.0  # likely all kept, by lot and otherwise
    recipe_of = recipe("svit", frozen=True, epochs=1, gate_lr=1e-4, calibrate=samples)
    fit(model, data, recipe_of, tmp_path, bar=False)
    targets = reduction_of(model).targets
    trace = tokred.inspect(model.eval(), data.images)
    missed = [
        abs(sum(stage.counts) / len(data) / 49 - targets[stage.layer]) for stage in trace.stages
    ]
    assert max(missed) < 0.05 if samples else min(missed) > 0.2


@pytest.mark.parametrize("method", ["svit", "tome"])
def test_half_precision_trains(method: str, tmp_path: Path) -> None:
    fitted = run(tmp_path / "half", method, precision="bf16")
    exact = run(tmp_path / "whole", method)  # another precision in the same process
    assert fitted.last["loss"] != exact.last["loss"]
    assert fitted.last["loss"] == pytest.approx(exact.last["loss"], rel=0.1)


def test_accumulated_parts_are_one_batch(tmp_path: Path) -> None:
    run(tmp_path / "one", "tome")
    run(tmp_path / "two", "tome", accumulate=2)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "none", "tome", epochs=1)
    run(tmp_path / "two", "tome", epochs=1, workers=2)
    assert curve(tmp_path / "none") == curve(tmp_path / "two")


def test_training_leaves_the_global_random_stream_alone(tmp_path: Path) -> None:
    model = reduced("tome")
    before = torch.get_rng_state()
    fit(model, Digits(), recipe(epochs=1), tmp_path, bar=False)
    assert torch.equal(before, torch.get_rng_state())


class Named:
    """The same samples, as transformers has them."""

    def __init__(self) -> None:
        self.digits = Digits()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.digits[index]
        return {"pixel_values": image, "labels": label}


def test_batches_may_be_mappings_and_outputs_may_have_logits(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        image_size=56, patch_size=8, num_channels=1, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=64, num_labels=10,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    tokred.apply(model, "tome", keep_rate=0.5)
    fitted = fit(model, Named(), recipe(epochs=1), tmp_path, validate=Named(), bar=False)
    assert fitted.accuracy is not None and fitted.tokens == pytest.approx((49 + 24 + 12 + 6) / 4)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


class Scenes:
    """Digits as pixels to tell from paper; some are not to be counted."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Digits(8).images[index]
        labels = (image[0] > 0).long()
        labels[:4] = 255
        return image, labels


def test_pixels_are_trained_too_with_a_loss_of_ones_own(tmp_path: Path) -> None:
    encoder = small_vit(classes=0)
    model = Segmenter(encoder, LinearDecoder(32, 2))
    tokred.apply(model, "tome", keep_rate=0.5)
    pixels = recipe(epochs=2, batch=4, ignore_index=255)
    fitted = fit(model, Scenes(), pixels, tmp_path / "a", validate=Scenes(), bar=False)
    assert fitted.accuracy is not None and fitted.accuracy > 0.3
    tokred.remove(model)

    def task(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().mean()

    fitted = fit(model, Scenes(), pixels, tmp_path / "b", task=task, bar=False)
    assert fitted.last["loss"] < curve(tmp_path / "b")[0]["loss"]


@pytest.mark.parametrize("method", ["svit", "dynamicvit", "ats", "topk"])
def test_tokens_are_counted_layer_by_layer(method: str) -> None:
    model, images = reduced(method), Digits(5).images
    reduction = reduction_of(model)
    with torch.no_grad(), reduction.recording() as records:
        model(images)
    used = training.usage(records, reduction.layout, 5)
    through = tokred.inspect(model, images).usage()  # of every cell, in how many layers it was
    assert used.shape == (4, 5)
    assert_close(used.sum(0), through.sum((1, 2)).float())
    assert method != "svit" or len(used[2].unique()) > 1  # images differ


def test_noise_is_that_of_the_sample_whoever_draws_it() -> None:
    noise = Noise(seed=3, batch=6)
    drawn = []
    for row, rows in ((0, 6), (0, 3), (3, 3)):
        noise.place(5, row, rows)
        drawn.append(noise(2, torch.zeros(rows, 4, 2)))
    assert torch.equal(drawn[0], torch.cat(drawn[1:]))
    noise.place(6, 0, 6)
    assert not torch.equal(drawn[0], noise(2, torch.zeros(6, 4, 2)))
    assert not torch.equal(drawn[0], noise(3, torch.zeros(6, 4, 2)))
    many = Noise(0, 20_000)
    many.place(0, 0, 20_000)
    found = many(0, torch.zeros(20_000, 1, 2, dtype=torch.float64))
    assert found.dtype == torch.float64 and found.isfinite().all()
    assert float(found.mean()) == pytest.approx(0.5772, abs=0.03)  # Euler's constant
    assert float(found.var()) == pytest.approx(math.pi**2 / 6, rel=0.05)


def test_learning_rates_rise_in_a_line_and_fall_as_a_cosine(tmp_path: Path) -> None:
    run(tmp_path, "none", epochs=4, warmup=0.25, lr=1e-3)
    rates = [row["lr"] for row in curve(tmp_path)]
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    falling = [0.5 * (1 + math.cos(math.pi * step / 9)) for step in range(9)]
    assert [rate * 1e3 for rate in rates[3:]] == pytest.approx(falling)


def test_biases_and_what_the_model_names_are_not_decayed() -> None:
    groups = optimiser.groups(training.Trained(small_vit(), None), recipe(weight_decay=0.1))
    spared = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    decayed = [p for group in groups if group["weight_decay"] == 0.1 for p in group["params"]]
    assert all(p.ndim > 1 for p in decayed) and len(decayed) == 4 * 4 + 2
    assert {p.ndim for p in spared} == {1, 3}  # the class token and the position embedding, too


# What goes wrong


def fails(message: str, *args: Any, **options: Any) -> None:
    with pytest.raises((ValueError, RuntimeError)) as error:
        fit(*args, **options, bar=False)
    assert message in str(error.value), str(error.value)


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path) -> None:
    tome, out = reduced("tome"), tmp_path / "out"
    fails("frozen trains gates alone, and there are none", tome, Digits(), recipe(frozen=True), out)
    fails("distill compares tokens that gates", tome, Digits(), recipe(distill=1.0), out)
    fails("data is empty", tome, [], recipe(), out)
    fails("data holds 4 samples, fewer than a batch of 8", tome, Digits(4), recipe(), out)
    fails("every must be at least 1", tome, Digits(), recipe(), out, every=0)
    tome.requires_grad_(False)
    fails("nothing is to be trained", tome, Digits(), recipe(), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"rate": math.nan}, "rate must be at least 0"),
        ({"warmup": 1.0}, "warmup must be in [0, 1)"),
        ({"clip": 0.0}, "clip must be above 0, or None"),
        ({"precision": "fp8"}, "precision must be 'no', 'bf16' or 'fp16'"),
        ({"batch": 8, "accumulate": 3}, "accumulate must divide the batch, 8; 3 does not"),
    ],
)
def test_recipes_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Recipe(**changes)
    assert message in str(error.value)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "tome", epochs=1)
    log = (tmp_path / "log.csv").read_bytes()
    fails("lr was 0.001, and is 0.01;", reduced("tome"), Digits(),
          recipe(epochs=1, lr=1e-2, seed=4), tmp_path)  # fmt: skip
    fails("seed was 0, and is 4", reduced("tome"), Digits(), recipe(epochs=1, seed=4), tmp_path)
    fails("samples was 26, and is 25", reduced("tome"), Digits(25), recipe(epochs=1), tmp_path)
    fails("method was 'ToMe(", reduced("none"), Digits(), recipe(epochs=1), tmp_path)
    assert (tmp_path / "log.csv").read_bytes() == log


def test_a_training_that_version_0_7_began_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "svit", "frozen": True, "epochs": 1}
    run(tmp_path, **options)
    file = tmp_path / "recipe.json"
    pinned = json.loads(file.read_text())
    # What it wrote: names, shapes and the first 64 values of all weights.
    digest = hashlib.sha256()
    for name, value in reduced("svit").state_dict().items():
        digest.update(
            f"{name} {tuple(value.shape)}".encode() + value.flatten()[:64].numpy().tobytes()
        )
    file.write_text(json.dumps({**pinned, "weights": digest.hexdigest()[:16]}))
    assert run(tmp_path, **options).resumed == STEPS_PER_EPOCH
    assert json.loads(file.read_text()) == pinned
    file.write_text(json.dumps({**pinned, "weights": "0123456789abcdef"}))
    other = reduced("svit")
    changes = recipe("svit", frozen=True, epochs=1)
    fails("weights was '0123456789abcdef', and is '3:", other, Digits(), changes, tmp_path)
    file.write_text(json.dumps(pinned))
    other.pos_embed.data[0, -1, -1] += 1e-6
    fails("weights was '3:", other, Digits(), changes, tmp_path)


def test_broken_files_of_a_training_are_passed_over_or_named(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "tome", "every": 2}
    run(tmp_path / "whole", **options)
    out = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", out)
    older, last = sorted((out / "checkpoint").iterdir())
    assert (older.stem, last.stem) == ("step-00000004", "step-00000006")
    last.write_bytes(last.read_bytes()[:-200])
    (out / "log.csv.1.part").write_text("left by a process that was killed")
    with (out / "log.csv").open("a") as log:
        log.write("7,1,0.0")  # cut off
    assert len(training.read_table(out / "log.csv")) == 6
    with pytest.warns(UserWarning, match=r"step-00000006\.pt is broken: the steps since"):
        assert run(out, **options).resumed == 4
    assert curve(out) == curve(tmp_path / "whole")
    weights = [load_file(at / "model.safetensors") for at in (out, tmp_path / "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not [*out.rglob("*.part")]
    log_text = (out / "log.csv").read_text()
    (out / "log.csv").write_text(log_text.replace("\n2,", "\n2x,"))
    with pytest.raises(ValueError, match=r"line 3 of .*log\.csv is broken"):
        run(out, **options)
    (out / "log.csv").write_text(log_text)
    pinned = (out / "recipe.json").read_text()
    (out / "recipe.json").write_text(pinned[:50])
    with pytest.raises(ValueError, match=r"recipe\.json is broken .* Put a copy of it back"):
        run(out, **options)
    (out / "recipe.json").write_text(pinned)
    for file in (out / "checkpoint").iterdir():
        file.write_bytes(b"")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"all checkpoints in .* broken"),
    ):
        run(out, **options)
    assert run(out, **options, fresh=True).resumed == 0


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    model = small_vit(classes=5)
    fails("labels must be 0 to 4, as the model has 5 classes", model, Digits(), recipe(), tmp_path)


class Broken(Digits):
    """From the second epoch on, images are not finite."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return (image if self.epochs == [0] else image * math.nan), label


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    model = reduced("tome")
    fails("the loss of step 4 is not finite (loss nan", model, Broken(), recipe(), tmp_path)
    assert len(curve(tmp_path)) == 3
    assert training.latest(tmp_path) == tmp_path / "checkpoint" / "step-00000003.pt"
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.warns(UserWarning, match="not all is as it was: data: the samples"):
        assert run(tmp_path, "tome").resumed == 3  # with what is right, it goes on


# Processes


def program(out: Path, processes: int = 1, **options: Any) -> subprocess.CompletedProcess[str]:
    file = str(Path(__file__).with_name("training_run.py"))
    # On machines without a GPU, too, that is how accelerate starts several processes.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    how = launch if processes > 1 else []
    return subprocess.run(
        [sys.executable, *how, file, str(out), json.dumps(options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("tome", {}),
        ("tome", {"accumulate": 2, "precision": "bf16"}),
        ("svit", {}),
        ("svit", {"frozen": True}),
        ("dynamicvit", {}),
    ],
)
def test_two_processes_have_the_curve_of_one(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    for number in (1, 2):
        done = program(tmp_path / str(number), number, method=method, **changes)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = curve(tmp_path / "1"), curve(tmp_path / "2")
    assert len(one) == len(two) == 2 * STEPS_PER_EPOCH
    tolerance = 2e-2 if "precision" in changes else 1e-3
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=1e-6)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(tmp_path: Path) -> None:
    whole = program(tmp_path / "whole", method="tome", every=1)
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = program(tmp_path / "parts", 2, method="tome", every=1, kill_at=4)
    assert killed.returncode != 0 and len(curve(tmp_path / "parts")) == 4
    assert program(tmp_path / "parts", method="tome", every=1).returncode == 0
    for row, other in zip(curve(tmp_path / "whole"), curve(tmp_path / "parts"), strict=True):
        assert row == pytest.approx(other, rel=1e-3)


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_to_the_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "tome", "dropout": 0.1, "every": 2}
    assert program(tmp_path / "whole", **options).returncode == 0
    assert program(tmp_path / "parts", **options, kill_at=5).returncode == -signal.SIGKILL
    assert program(tmp_path / "parts", **options).returncode == 0
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    done = program(tmp_path, 2, method="tome", batch=7)
    assert "a batch of 7 in 1 part cannot be divided by 2 processes" in done.stderr
