"""Scores and closeness to the dense model, against loops over images, pixels and classes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tokred
from tokred.data.inputs import device_of, pixels
from tokred.measure.fidelity import Decisions, Difference, Outputs, compare
from tokred.measure.metrics import TASKS, Scores, task_of

pytest.importorskip("torchmetrics")

CPU = torch.device("cpu")


def scored(name: str, decided: Decisions, targets: list[Tensor]) -> dict[str, float]:
    scores = Scores(TASKS[name], decided, CPU)
    scores.add(decided, targets)
    return scores.result()


def saying(scores: Tensor) -> Decisions:
    return Decisions(scores.argmax(1), None, scores)


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_images_are_counted_one_by_one(dtype: torch.dtype) -> None:
    logits = torch.randperm(23 * 8).view(23, 8).to(dtype)  # no two alike
    targets = list(torch.randint(8, (23,)))
    decided = saying(logits)
    scores = Scores(task_of(targets, decided), decided, CPU)
    for start in range(0, 23, 5):  # 23 is no multiple of 5
        scores.add(saying(logits[start : start + 5]), targets[start : start + 5])
    top1 = top5 = 0
    for row, target in zip(logits.tolist(), targets, strict=True):
        order = sorted(range(8), key=lambda c: -row[c])
        top1 += order[0] == int(target)
        top5 += int(target) in order[:5]
    assert scores.result() == pytest.approx({"top1": 100 * top1 / 23, "top5": 100 * top5 / 23})


def average_precision(scores: list[float], truth: list[int]) -> float:
    """The mean, over images that have the class, of the precision down to them."""
    precisions = []
    for score, true in zip(scores, truth, strict=True):
        if true:
            down_to = [t for s, t in zip(scores, truth, strict=True) if s >= score]
            precisions.append(sum(down_to) / len(down_to))
    return sum(precisions) / len(precisions)


@pytest.mark.parametrize("scale", [1, 40])  # at 40, most sigmoids are 1 in single precision
def test_classes_that_no_image_has_do_not_lower_the_mean(scale: float) -> None:
    targets = (torch.rand(30, 5) < 0.4).long()
    targets[:, 2] = 0
    logits = (torch.randn(30, 5) + targets + 1) * scale
    found = scored("multilabel", saying(logits), list(targets))
    each = [average_precision(logits[:, c].tolist(), targets[:, c].tolist()) for c in (0, 1, 3, 4)]
    assert found["mAP"] == pytest.approx(100 * np.mean(each), rel=1e-6)


def test_pixels_are_counted_one_by_one() -> None:
    classes, sizes = 6, [(7, 9), (8, 8), (5, 11)]
    logits = torch.randn(3, classes, 4, 5)
    targets = [torch.randint(3, size) for size in sizes]  # classes 3 to 5 are never there,
    logits[:, 5] = -9  # and 5 is never said to be
    targets[0][2:4] = 255
    targets[2][:] = 255  # nothing is known of one of them
    found = scored("segmentation", saying(logits), targets)
    confusion = np.zeros((classes, classes), int)
    for one, target in zip(logits, targets, strict=True):
        large = torch.nn.functional.interpolate(one[None], target.shape, mode="bilinear")[0]
        for i in range(target.shape[0]):
            for j in range(target.shape[1]):
                if target[i, j] != 255:
                    confusion[target[i, j], large[:, i, j].argmax()] += 1
    overlaps = []
    for c in range(classes):
        either = confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]
        if either:
            overlaps.append(confusion[c, c] / either)
    assert len(overlaps) == 5
    assert found["mIoU"] == pytest.approx(100 * np.mean(overlaps), rel=1e-5)
    assert found["pixels"] == pytest.approx(100 * np.trace(confusion) / confusion.sum())


def test_class_255_counts_where_there_is_one() -> None:
    target = torch.full((4, 4), 255)
    target[0] = 7
    logits = torch.zeros(1, 300, 4, 4)
    logits[:, 7] = 1
    found = scored("segmentation", saying(logits), [target])
    assert found["pixels"] == pytest.approx(25)


# --- depths ---------------------------------------------------------------------------------------


def depths_by_hand(found: Any, true: Any) -> dict[str, float]:
    relative, squares, near = [], [], []
    for d, t in zip(found, true, strict=True):
        relative.append(abs(d - t) / t)
        squares.append((d - t) ** 2)
        near.append(d > 0 and max(d / t, t / d) < 1.25)
    return {
        "abs_rel": float(np.mean(relative)),
        "rmse": math.sqrt(np.mean(squares)),
        "delta1": 100 * float(np.mean(near)),
    }


def test_pixels_of_unknown_depth_do_not_count() -> None:
    truth = torch.rand(3, 6, 7) * 5 + 1
    depth = truth * torch.linspace(-0.1, 1.6, 7)
    known = torch.ones_like(truth, dtype=torch.bool)
    for row, nothing in enumerate((0.0, -1.0, math.nan, math.inf)):
        truth[:2, row] = nothing
        known[:2, row] = False
    truth[2] = 0  # of one image nothing is known
    known[2] = False
    found = scored("depth", Decisions(None, depth), list(truth))
    expected = depths_by_hand(depth[known].double().numpy(), truth[known].double().numpy())
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6, -3.0])
@pytest.mark.parametrize("shift", [-0.4, 0.0, 1e3])
def test_relative_depth_is_that_of_any_scale_and_shift(scale: float, shift: float) -> None:
    truth = torch.rand(2, 8, 10).double() * 5 + 1
    noisy = 1 / truth + 0.05 * torch.randn(2, 8, 10).double()
    found = scored("relative depth", Decisions(None, scale * (noisy + shift)), list(truth))
    fitted = []
    for x, t in zip(noisy.numpy(), truth.numpy(), strict=True):
        slope, constant = np.polyfit(x.flatten(), 1 / t.flatten(), 1)
        inverse = slope * x.flatten() + constant
        fitted.append(1 / np.maximum(inverse, 1 / (2 * t.max())))
    expected = depths_by_hand(np.concatenate(fitted), truth.flatten().tolist())
    assert found == pytest.approx(expected, rel=1e-4)


def test_relative_depth_of_a_flat_or_unknown_image() -> None:
    truth = torch.rand(2, 4, 5) + 1
    truth[1] = 0
    found = scored("relative depth", Decisions(None, torch.full((2, 4, 5), 3.0)), list(truth))
    everywhere = np.full(20, 1 / (1 / truth[0].double()).mean())
    expected = depths_by_hand(everywhere, truth[0].double().flatten().tolist())
    assert found == pytest.approx(expected, rel=1e-6)


def test_depths_in_another_unit_are_refused() -> None:
    metres = torch.rand(1, 4, 5) * 5 + 1
    decided = Decisions(None, metres)
    with pytest.raises(ValueError, match="in the model's unit"):
        task_of([metres[0] * 1000], decided)
    with pytest.raises(ValueError, match="give depths as fractions"):
        task_of([(metres[0] * 1000).long()], decided)
    assert task_of([metres[0] * 2], decided).name == "depth"
    relative = SimpleNamespace(config=SimpleNamespace(depth_estimation_type="relative"))
    assert task_of([metres[0] * 1000], decided, relative).name == "relative depth"


# --- what does not go together --------------------------------------------------------------------


def test_a_task_that_does_not_go_with_labels_or_model_is_refused() -> None:
    decided = saying(torch.randn(2, 4))
    with pytest.raises(ValueError, match="task must fit what the model answers, scores of"):
        Scores(TASKS["depth"], decided, CPU)
    with pytest.raises(ValueError, match=r"labels of multilabel must not be torch\.int64 of"):
        scored("multilabel", decided, [torch.tensor(1), torch.tensor(2)])
    with pytest.raises(ValueError, match=r"must be 0 or 1, not from 0 to 0\.5"):
        scored("multilabel", decided, list(torch.tensor([[0, 0.5, 0, 0], [0, 0, 0, 0]])))
    with pytest.raises(ValueError, match="scores of at least 2 classes"):
        Scores(TASKS["classification"], saying(torch.randn(2, 1)), CPU)


# --- closeness to the dense model -----------------------------------------------------------------


def seen(scores: Tensor | None = None, depth: Tensor | None = None) -> Outputs:
    given = scores if scores is not None else depth
    assert given is not None
    chosen = None if scores is None else scores.argmax(-1)
    features = torch.ones(len(given), 2, 3)
    return Outputs(len(given), features, Decisions(chosen, depth, scores))


def test_classes_that_are_ruled_out_have_no_divergence() -> None:
    dense = torch.tensor([[1.0, 2.0, -math.inf], [0.0, -math.inf, -math.inf]]).half()
    ours = torch.tensor([[2.0, 2.0, -math.inf], [1.0, -1.0, -math.inf]]).half()
    expected = 0.0
    for b, a in zip(dense.double().tolist(), ours.double().tolist(), strict=True):
        p, q = ([math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in (b, a))
        expected += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x)
    assert compare(seen(ours), seen(dense)).divergence == pytest.approx(expected, rel=1e-5)
    # What the dense model thinks possible and ours does not is infinitely far.
    assert compare(seen(dense), seen(ours)).divergence == math.inf
    assert math.isfinite(compare(seen(dense), seen(dense), multilabel=True).divergence)


def test_nothing_is_closer_than_the_same() -> None:
    dense = torch.randn(500, 30)
    ours = dense + 1e-7 * torch.randn(500, 30)
    each = [compare(seen(a[None]), seen(b[None])) for a, b in zip(ours, dense, strict=True)]
    assert min(found.divergence for found in each) >= 0


def test_scores_that_are_no_numbers_agree_with_nothing() -> None:
    scores = torch.randn(4, 3)
    scores[1] = math.nan
    found = compare(seen(scores), seen(scores))
    assert (found.same, found.chosen) == (3, 4)


def test_small_depths_in_half_precision_have_a_finite_error() -> None:
    dense = torch.tensor([[[1e-6, 2.0], [0.0, 3.0]]]).half()
    ours = torch.tensor([[[1.0, 2.5], [1.0, 3.0]]]).half()
    found: Difference = compare(seen(depth=ours), seen(depth=dense))
    tiny = float(dense[0, 0, 0])
    assert found.depths == 3
    assert found.error == pytest.approx((1 - tiny) / tiny + 0.25)


def test_large_features_in_half_precision_have_a_cosine() -> None:
    a, b = torch.randn(2, 3, 5, 64) * 2e4
    a, b = (x.clamp(-6e4, 6e4).half() for x in (a, b))
    nothing = Decisions(None, None)
    found = compare(Outputs(3, a, nothing), Outputs(3, b, nothing))
    x, y = (z.double().numpy() for z in (a, b))
    each = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert found.cosine == pytest.approx(each.sum())


def test_batches_with_labels_are_refused(plain: Any, images: Tensor) -> None:
    tokred.apply(plain, "tome", 0.5)
    with pytest.raises(TypeError, match="without labels, not tuple"):
        tokred.fidelity(plain, [(images, torch.tensor([0, 1]))])  # type: ignore[list-item]


def test_images_are_found_among_inputs() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert pixels({"pixel_values": None, "other": x}) is x
    with pytest.raises(ValueError, match="no images among the inputs"):
        pixels({"text": [1]})
    with pytest.raises(ValueError, match="no tensor among the inputs"):
        device_of({"text": [1]})


# --- several processes ----------------------------------------------------------------------------

_SHARES = """
import datetime, json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from tokred.measure.fidelity import Decisions
from tokred.measure.metrics import TASKS, Scores
world, rank = int(sys.argv[1]), int(sys.argv[2])
if world > 1:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
torch.manual_seed(0)
told = {}
logits, depth = torch.randn(20, 6), torch.rand(20, 5, 5) + 0.5
truth = {
    "classification": torch.randint(6, (20,)),
    "multilabel": (torch.rand(20, 6) < 0.4).long(),
    "depth": torch.rand(20, 5, 5) + 0.5,
}
for name, targets in truth.items():
    def decided(chosen):
        if name == "depth":
            return Decisions(None, depth[chosen])
        return Decisions(None, None, logits[chosen])
    scores = Scores(TASKS[name], decided(slice(0, 2)), torch.device("cpu"))
    for number in range(2 if name == "multilabel" else 10):  # fewer batches than processes
        if number % world == rank:
            chosen = slice(2 * number, 2 * number + 2)
            scores.add(decided(chosen), list(targets[chosen]))
    told[name] = scores.result()
if rank == 0:
    print(json.dumps(told))
"""


@pytest.mark.slow
def test_scores_do_not_depend_on_the_number_of_processes(tmp_path: Any) -> None:
    told = []
    for world in (1, 3):
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", _SHARES, str(world), str(rank), str(tmp_path / "meet")],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        outputs = [run.communicate(timeout=180)[0] for run in runs]
        assert [run.returncode for run in runs] == [0] * world
        told.append(outputs[0])
    assert told[0] and told[0] == told[1]
