"""`tokred.evaluate`: the table says what a loop by hand would."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images_for, small
from PIL import Image
from test_dense import DENSE
from torch import Tensor, nn

import tokred
from tokred.cli.main import main
from tokred.data import samples, zoo
from tokred.data.classes import class_numbers
from tokred.measure.counting import peak_memory
from tokred.measure.evaluation import Evaluation, Row, Speed
from tokred.measure.fidelity import Decisions
from tokred.measure.metrics import TASKS, Scores, task_of
from tokred.measure.race import Arm, beside
from tokred.measure.settings import METHODS, settings_of
from tokred.measure.work import Work

pytest.importorskip("torchmetrics")

Evaluate = Callable[..., Evaluation]


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """`tokred.evaluate`, as fast as can be, with a cache of its own."""

    def call(*args: Any, **options: Any) -> Evaluation:
        usual = {"seconds": 0.01, "cache": tmp_path / "cache", "progress": False}
        return tokred.evaluate(*args, **{**usual, **options})

    return call


@pytest.fixture(scope="module")
def digits_48() -> tuple[Tensor, Tensor]:
    held_out = zoo.held_out()
    return zoo.normalise(held_out.images[:48]), held_out.labels[:48]


def pairs(images: Tensor, labels: Tensor) -> list[tuple[Tensor, int]]:
    return list(zip(images, labels.tolist(), strict=True))


def test_the_table_is_what_a_loop_by_hand_says(
    evaluate: Evaluate, digits_48: tuple[Tensor, Tensor]
) -> None:
    images, labels = digits_48
    model = zoo.load()
    table = evaluate(model, pairs(images, labels), ["tome"], [0.5, 0.25], batch=20, compared=20)
    assert [row.name for row in table.rows] == ["dense", "tome 0.5", "tome 0.25"]
    assert (table.task, table.leading, table.unit) == ("classification", "top1", "%")
    assert table.rows[2].counts == (196,) * 3 + (49,) * 3 + (12,) * 3 + (3,) * 3

    with torch.no_grad():
        dense = model(images)
        tokred.apply(model, "tome", 0.25)
        ours = model(images)
        counted = tokred.flops(model, images[:1])
        tokred.remove(model)
    row = table.rows[2]
    for scores, told in ((dense, table.dense), (ours, row)):
        order = scores.argsort(1, descending=True).numpy()
        right = order == labels.numpy()[:, None]
        assert told.metrics["top1"] == pytest.approx(100 * right[:, :1].any(1).mean())
        assert told.metrics["top5"] == pytest.approx(100 * right[:, :5].any(1).mean())
        assert told.images == 48
    assert row.compared == 20  # the first of the batches; the next one begins behind the middle
    p, q = (x[:20].double().softmax(1).numpy() for x in (dense, ours))
    assert row.kl == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-4)
    assert row.agreement == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).mean())
    assert row.cosine is not None and 0 < row.cosine < 1
    assert table.drop(row) == pytest.approx(table.dense.metrics["top1"] - row.metrics["top1"])
    assert (table.dense.agreement, table.dense.kl) == (100, pytest.approx(0, abs=1e-6))

    assert row.speed.mult_adds == counted.reduced and row.dense.mult_adds == counted.dense
    assert row.limit is not None and row.limit.mult_adds < counted.reduced * 1.01
    assert row.speed_up == row.speed.images_per_second / row.dense.images_per_second
    assert table.dense.speed_up == table.dense.free_limit == 1


def test_batches_that_are_compared_are_spread_over_the_data(evaluate: Evaluate) -> None:
    model = small("vit")
    images = torch.randn(24, 3, 64, 64)
    table = evaluate(model, images, ["topk"], [0.5], batch=4, compared=8)
    chosen = torch.cat([images[0:4], images[12:16]])  # the first batch, and that in the middle
    tokred.apply(model, "topk", 0.5)
    assert table.rows[1].cosine == pytest.approx(tokred.fidelity(model, chosen).cosine, abs=1e-6)


def test_a_segmenter_is_scored_by_overlap(evaluate: Evaluate) -> None:
    held_out = zoo.held_out("digits_scenes")
    data = zoo.HeldOut(held_out.images[:5], held_out.labels[:5], held_out.digits, held_out.classes)
    model = zoo.load("digits_scenes")
    table = evaluate(model, data, {"mine": tokred.SLIC()}, [0.5], batch=3)
    with torch.no_grad(), tokred.applied(model, "slic", 0.5):
        # In the same batches, as sums round differently in others.
        found = torch.cat([model(x).argmax(1) for x in zoo.normalise(data.images).split(3)])
    confusion = np.zeros((11, 11))
    for one, true in zip(found.flatten().tolist(), data.labels.flatten().tolist(), strict=True):
        confusion[true, one] += 1
    both = np.diag(confusion)
    either = confusion.sum(0) + confusion.sum(1) - both
    row = table.rows[1]
    assert row.metrics["mIoU"] == pytest.approx(100 * (both / either)[either > 0].mean(), abs=1e-3)
    assert row.metrics["pixels"] == pytest.approx(100 * both.sum() / confusion.sum(), abs=1e-3)
    assert (row.method, table.leading) == ("mine", "mIoU")
    assert row.limit is not None  # the head wants the full grid, and the limit gives it


def test_without_labels_it_is_compared_with_itself(evaluate: Evaluate) -> None:
    model = small("vit")
    table = evaluate(model, images_for(model, 6), ["atc"], [1.0, 0.5])
    assert (table.task, table.leading, table.dense.metrics) == ("unlabelled", "agreement", {})
    whole, half = table.settings
    assert (whole.agreement, whole.cosine) == (100, pytest.approx(1)) and half.cosine < 1
    model.reset_classifier(0)  # features alone
    table = evaluate(model, images_for(model, 6), ["atc"], [0.5])
    assert table.leading == "agreement"  # of the largest feature: timm's head is the identity


def test_depth_is_scored_as_depth() -> None:
    truth = torch.rand(2, 8, 10) * 5 + 1
    truth[0, :2] = 0  # unknown
    depth = truth * torch.linspace(0.8, 1.4, 10)
    decided = Decisions(None, depth)
    scores = Scores(task_of(list(truth), decided), decided, torch.device("cpu"))
    scores.add(decided, list(truth))
    d, t = (x[truth > 0].double().numpy() for x in (depth, truth))
    assert scores.result() == pytest.approx(
        {
            "abs_rel": np.mean(np.abs(d - t) / t),
            "rmse": np.sqrt(np.mean((d - t) ** 2)),
            "delta1": 100 * np.mean(np.maximum(d / t, t / d) < 1.25),
        },
        rel=1e-5,
    )


def test_relative_depth_is_fitted_first() -> None:
    truth = torch.rand(2, 8, 10) * 5 + 1
    inverse = 3 / truth - 0.2  # of other scale and shift in every model
    decided = Decisions(None, inverse)
    scores = Scores(TASKS["relative depth"], decided, torch.device("cpu"))
    scores.add(decided, list(truth))
    assert scores.result()["abs_rel"] == pytest.approx(0, abs=1e-4)


def test_several_classes_of_one_image_are_scored_by_precision() -> None:
    targets = (torch.rand(40, 3) < 0.4).long()
    logits = torch.randn(40, 3) + targets
    decided = Decisions(logits.argmax(1), None, logits)
    task = task_of(list(targets), decided)
    scores = Scores(task, decided, torch.device("cpu"))
    scores.add(decided, list(targets))
    precisions = []
    for c in range(3):
        right = targets[logits[:, c].argsort(descending=True), c].numpy()
        at = np.cumsum(right) / np.arange(1, 41)
        precisions.append(at[right == 1].mean())
    assert scores.result()["mAP"] == pytest.approx(100 * np.mean(precisions), rel=1e-5)


def test_labels_that_the_model_cannot_give_are_refused(evaluate: Evaluate) -> None:
    model = small("vit")
    images = images_for(model, 4)
    with pytest.raises(ValueError, match="from 0 to 9, as the model has 10 classes"):
        evaluate(model, pairs(images, torch.tensor([0, 1, 2, 10])), ["tome"], [0.5])
    with pytest.raises(ValueError, match="mean segmentation, and the model answers scores of"):
        evaluate(model, list(zip(images, torch.zeros(4, 8, 8).long(), strict=True)))
    with pytest.raises(ValueError, match="task must be one of classification"):
        evaluate(model, images, task="clasification")
    with pytest.raises(ValueError, match="has no labels for depth"):
        evaluate(model, images, task="depth")
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        evaluate(small("vit").train(), images)
    with pytest.raises(ValueError, match="at least one setting"):
        evaluate(model, images, [])
    with pytest.raises(ValueError, match="unknown method 'tomee'"):
        evaluate(model, images, ["tomee"])


def test_what_cannot_be_is_in_the_table_with_the_reason(evaluate: Evaluate) -> None:
    model = small("vit")
    other = tokred.Exactly((16, 8))  # of a model with two layers
    table = evaluate(model, images_for(model, 2), ["tome", "svit"], [0.5, other])
    assert [row.method for row in table.settings] == ["tome"]
    assert table.refused.keys() == {f"tome {other}", "svit"}  # once, not for every keep rate
    assert "the model has 4 layers" in table.refused[f"tome {other}"]
    assert "refused: svit: its gates are not trained" in str(table)


def test_relative_depths_of_a_model_that_reads_layers_in_between(evaluate: Evaluate) -> None:
    torch.manual_seed(0)
    small = DENSE["depth anything"]
    model, images = small.build().eval(), small.inputs(2)["pixel_values"]
    with torch.no_grad():
        depths = 1 / (0.5 + model(pixel_values=images).predicted_depth / 3)
    data = list(zip(images, depths, strict=True))
    table = evaluate(model, data, ["tome"], [0.5], schedule=tokred.Hourglass)
    assert table.task == "relative depth" and not table.higher_is_better
    assert table.dense.metrics["abs_rel"] == pytest.approx(0, abs=1e-4)  # but for scale and shift
    (row,) = table.settings
    assert table.drop(row) > 1e-3
    assert row.limit is not None and row.limit.mult_adds is not None
    assert row.speed.mult_adds is not None
    assert row.limit.mult_adds < row.speed.mult_adds


def test_more_images_than_memory_holds_and_processes_that_read_them(
    folder: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("vit")
    options = {"transform": to_tensor, "labelled": False, "batch": 2}
    whole = evaluate(model, folder, ["tome"], [0.5], **options)
    monkeypatch.setattr(
        "tokred.measure.batches.HELD", 2 * 3 * 64 * 64 * 4 + 1
    )  # one batch of three
    read: list[list[int]] = []
    batch = samples.Samples.batch

    def reading(self: samples.Samples, numbers: Any) -> Any:
        read.append(list(numbers))
        return batch(self, numbers)

    monkeypatch.setattr(samples.Samples, "batch", reading)
    few = evaluate(model, folder, ["tome"], [0.5], fresh=True, **options)
    assert [len(n) for n in read[:1]] == [2]  # what speeds are measured on
    assert read[-5:] == [[0, 1], [2, 3], [4, 5], [2, 3], [4, 5]]  # the first stays in memory
    with_others = evaluate(model, folder, ["tome"], [0.5], fresh=True, workers=2, **options)
    for table in (few, with_others):
        for ours, theirs in zip(table.rows, whole.rows, strict=True):
            assert (ours.images, ours.cosine, ours.kl) == (6, theirs.cosine, theirs.kl)
    with pytest.raises(ValueError, match="workers must be at least 0"):
        evaluate(model, folder, ["tome"], [0.5], workers=-1, **options)


def test_the_model_is_left_as_it_was(evaluate: Evaluate) -> None:
    model = small("vit")
    images = images_for(model, 3)
    dense = model(images)
    evaluate(model, images, ["atc"], [0.5])
    torch.testing.assert_close(model(images), dense, rtol=0, atol=0)
    reduction = tokred.apply(model, "tome", 0.5)
    reduced = model(images)
    with pytest.raises(RuntimeError, match="enough"):
        evaluate(model, images, ["atc"], [0.5], on_row=_enough)
    assert tokred.patching.reduction_of(model) is reduction
    torch.testing.assert_close(model(images), reduced, rtol=0, atol=0)


def _enough(table: Evaluation) -> None:
    raise RuntimeError("enough")


def test_what_was_interrupted_goes_on(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("vit")
    data = pairs(images_for(model, 6), torch.arange(6))
    measured: list[Any] = []
    row = Work.row

    def counting(work: Any, setting: Any, *args: Any) -> Row:
        measured.append(setting and setting.name)
        if measured.count("atc 0.5") == 1 and measured[-1] == "atc 0.5":
            raise KeyboardInterrupt
        return row(work, setting, *args)

    monkeypatch.setattr(Work, "row", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, ["tome", "atc"], [0.5])
    table = evaluate(model, data, ["tome", "atc"], [0.5])
    assert measured == [None, "tome 0.5", "atc 0.5", "atc 0.5"]
    assert evaluate(model, data, ["tome", "atc"], [0.5]) == table
    assert len(measured) == 4
    # Another model, other data and other options are other settings.
    with torch.no_grad():
        model.head.bias[0] += 1
    evaluate(model, data, ["tome"], [0.5])
    evaluate(model, data[:-1], ["tome"], [0.5])
    evaluate(model, data[:-1], [tokred.ToMe(threshold=0.5)], [0.5])
    evaluate(model, data[:-1], ["tome"], [0.5], fresh=True)
    assert measured[4:] == [None, "tome 0.5"] * 2 + ["tome:threshold=0.5 0.5", None, "tome 0.5"]


def test_a_row_that_was_cut_off_is_measured_again(evaluate: Evaluate, tmp_path: Path) -> None:
    model = small("vit")
    images = images_for(model, 2)
    evaluate(model, images, ["tome"], [0.5])
    files = sorted((tmp_path / "cache" / "evaluate").glob("*.json"))
    assert len(files) == 2
    for file in files:
        file.write_text(file.read_text()[:100])
    with pytest.warns(UserWarning, match="json is broken: its setting is measured again") as told:
        assert len(evaluate(model, images, ["tome"], [0.5]).rows) == 2
    assert len(told) == 2


def test_the_code_applies_the_setting(evaluate: Evaluate) -> None:
    model = small("vit")
    settings = settings_of(
        [
            "atc:single",
            tokred.ATC(linkage="complete"),
            tokred.presets["segmenter-ade20k"],
            tokred.SViT(zoo.gates()),
        ],
        [0.5, tokred.Stages(0.5, layers=(1,)), tokred.Exactly((16, 8, 8, 4))],
    )
    assert [s.method for s in settings] == (
        ["atc:single"] * 3 + ["atc:linkage=complete"] * 3 + ["segmenter-ade20k"]
        + [f"svit:gates={zoo.gates()}"]
    )  # fmt: skip
    for setting in settings[:6]:
        made = eval(setting.code, {"tokred": tokred, "model": model})
        assert made.reducer == setting.reducer, setting.code
        told = tokred.apply(model, setting.reducer, setting.schedule)
        assert made.schedule == told.schedule
    assert settings[6].code == 'tokred.apply(model, tokred.presets["segmenter-ade20k"])'


# --- the values -----------------------------------------------------------------------------------


def table_of(*points: tuple[str, float, float, float]) -> Evaluation:
    """A table with these methods, keep rates, accuracies and speed-ups, of real rows."""
    model = small("vit")
    made = tokred.evaluate(
        model, pairs(images_for(model, 2), torch.arange(2)), ["tome"], [0.5], seconds=0.01,
        cache=False, progress=False,
    )  # fmt: skip
    dense, row = made.rows
    rows = [dataclasses.replace(dense, metrics={"top1": 90.0})]
    for method, rate, score, speed in points:
        dense_speed = row.dense.images_per_second
        rows.append(
            dataclasses.replace(
                row,
                method=method,
                keep_rate=rate,
                metrics={"top1": score},
                speed=dataclasses.replace(row.speed, images_per_second=speed * dense_speed),
            )
        )
    return dataclasses.replace(made, rows=tuple(rows))


def test_the_front_and_the_best() -> None:
    table = table_of(("a", 0.7, 89.0, 1.2), ("a", 0.5, 85.0, 1.6), ("b", 0.7, 88.0, 1.1),
                     ("b", 0.5, 86.0, 1.5), ("c", 0.9, 90.5, 0.9))  # fmt: skip
    assert [row.name for row in table.front()] == ["c 0.9", "dense", "a 0.7", "b 0.5", "a 0.5"]
    assert table.best(max_drop=1).name == "a 0.7"
    broken = dataclasses.replace(table.rows[1], method="x", metrics={"top1": float("nan")})
    broken = dataclasses.replace(
        broken, speed=dataclasses.replace(broken.speed, images_per_second=1e9)
    )
    assert dataclasses.replace(table, rows=(*table.rows, broken)).front() == table.front()
    assert table.best(max_drop=4.5).name == "b 0.5"
    assert table.best(min_speed_up=1.3).name == "b 0.5"
    assert table.best(max_drop=5, min_speed_up=1.3).name == "a 0.5"
    with pytest.raises(LookupError, match=r"nearest is c 0\.9, -0\.50 worse at 0\.90x"):
        table.best(max_drop=0.5)
    with pytest.raises(LookupError, match=r"is 2 times as fast; nearest is a 0\.5"):
        table.best(min_speed_up=2)
    with pytest.raises(ValueError, match="give max_drop"):
        table.best()


def test_it_can_be_shown_and_stored() -> None:
    table = table_of(("a", 0.7, 89.0, 1.2), ("b", 0.5, 86.0, 1.5))
    stored = json.loads(json.dumps(table.as_dict()))
    assert Evaluation.from_dict(stored) == table
    frame = table.to_pandas()
    assert list(frame.method) == ["dense", "a", "b"] and list(frame.front) == [True] * 3
    assert frame["drop"].tolist() == pytest.approx([0, 1, 4])
    assert frame.speed_up.tolist() == pytest.approx([1, 1.2, 1.5])
    (axes,) = table.plot().axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["b"] == [[pytest.approx(1.5), 86.0]] and drawn["dense"] == [[1, 90.0]]
    lines = str(table).splitlines()
    assert lines[3].startswith("a") and "89.00" in lines[3] and "1.20x" in lines[3]
    assert "<table" in table._repr_html_()


def timed(row: Row, dense: float, speed_up: float, error: float = 0.0) -> Row:
    """A row whose dense model makes so many images per second, one after the other as well, and
    whose free limit is 2.5."""

    def at(rate: float) -> Speed:
        return Speed(rate, 1 / rate, None, None, error)

    return dataclasses.replace(
        row, dense=at(dense), speed=at(dense * speed_up), limit=at(dense * 2.5)
    )


def test_rows_can_be_compared_though_the_machine_was_slower_in_some() -> None:
    made = table_of(("a", 0.7, 89.0, 1.25), ("b", 0.5, 86.0, 2.0))
    dense, a, b = made.rows

    def table(*rows: Row) -> Evaluation:
        return dataclasses.replace(made, rows=rows)

    first = dataclasses.replace(timed(dense, 100, 1), limit=None)
    quiet = table(first, timed(a, 100, 1.25), timed(b, 100, 2.0, 0.03))
    assert quiet.warnings() == []
    busy = table(first, timed(a, 100, 1.25), timed(b, 50, 2.0))
    for told in (quiet, busy):  # as much faster, in turns with a dense model that was as slow
        assert [told.images_per_second(row) for row in told.rows] == pytest.approx([100, 125, 200])
        assert [told.latency(row) for row in told.rows] == pytest.approx([0.01, 0.008, 0.005])
        assert list(told.to_pandas().images_per_second) == pytest.approx([100, 125, 200])
    (sentence,) = busy.warnings()
    assert "busy" in sentence and "from 20 to 40 ms per batch" in sentence
    assert sentence in str(busy) and sentence in repr(busy) and sentence in busy._repr_html_()
    (sentence,) = table(first, timed(b, 100, 2.0, 0.2)).warnings()
    assert "unsure by up to 20 %" in sentence
    # Where even the free limit gains nothing, that is said; but a high keep rate gains little
    # anywhere.
    still = dataclasses.replace(timed(a, 100, 1.0), limit=first.speed)
    (sentence,) = table(first, still).warnings()
    assert "gain next to nothing" in sentence
    assert table(first, dataclasses.replace(still, counts=(a.tokens - 1,))).warnings() == []


def test_speed_is_measured_until_it_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("vit")
    samples_of = samples.of(torch.randn(2, 3, 64, 64), model)
    work = Work(model, samples_of, None, None, None, 8, 1.0)
    assert work.batches.size == 32  # of a small model
    monkeypatch.setattr("tokred.measure.work.count", lambda *_: 4.6e9)  # that of a DeiT-S
    assert Work(model, samples_of, None, None, None, 8, 1.0).batches.size == 4
    calls: list[tuple[int, float]] = []
    rounds = [[1.0, 2.0, 3.0, 2.0], [2.0] * 30]

    def measure(sides: Any, inputs: Any, most: int, warmup: int, limit: float) -> dict[str, Arm]:
        calls.append((warmup, limit))
        taken = rounds[len(calls) - 1]
        # In every round the machine is as slow for both, but for what `taken` says.
        return {"dense": Arm(tuple(4.0 * x for x in range(1, len(taken) + 1)), None),
                "tried": Arm(tuple(x * y for x, y in enumerate(taken, 1)), None)}  # fmt: skip

    monkeypatch.setattr("tokred.measure.race.measure", measure)
    pace = work.pace({"dense": None, "tried": None}, work.inputs, 0.5)
    assert calls == [(1, 0.5), (0, 0.5)]
    ratios = np.array(rounds[0] + rounds[1]) / 4
    assert pace["tried"].seconds / pace["dense"].seconds == pytest.approx(np.median(ratios))
    assert pace["dense"].error == 0 and pace["tried"].error == 0
    calls.clear()
    once = work.pace({"dense": None, "tried": None}, work.inputs, 0.5, patience=1)
    assert calls == [(1, 0.5)]
    # The error of the median of a normal sample, from its quartiles.
    low, high = 1.25 / 4, 2.75 / 4
    assert once["tried"].error == pytest.approx(1.253 * (high - low) / 1.349 / 2 / 0.5)
    sample = np.random.default_rng(0).normal(1.0, 0.1, (2000, 25))
    errors = [beside([1.0] * 25, list(row)).error for row in sample]
    assert np.mean(errors) == pytest.approx(np.median(sample, 1).std(), rel=0.1)


# --- data -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with three pictures each, that differ."""
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            noise = np.random.default_rng(len(name) + i).integers(0, 255, (40, 48, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def to_tensor(picture: Image.Image) -> Tensor:
    array = np.asarray(picture.resize((64, 64)))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


def same(a: samples.Samples, b: samples.Samples, labelled: bool = True) -> None:
    assert len(a) == len(b)
    for i in range(len(a)):
        torch.testing.assert_close(a[i][0], b[i][0])
        assert (a[i][1] == b[i][1]) if labelled else a[i][1] is None


def test_data_of_every_kind_is_the_same(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    torchvision = pytest.importorskip("torchvision.datasets")
    files = sorted(folder.rglob("*.png"))
    labels = [0, 0, 0, 1, 1, 1]
    read = samples.of(folder, None, to_tensor)
    assert [int(read[i][1]) for i in range(6)] == labels
    pictures = [Image.open(file).convert("RGB") for file in files]
    same(samples.of(list(zip(pictures, labels, strict=True)), None, to_tensor), read)
    dataset = torchvision.ImageFolder(str(folder))
    same(samples.of(dataset, None, to_tensor), read)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    same(samples.of(loader, None, to_tensor), read)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [str(file) for file in files], "label": labels}
    hub = datasets.Dataset.from_dict(rows, features=features)
    same(samples.of(hub, None, to_tensor), read)
    same(samples.of(datasets.DatasetDict({"test": hub}), None, to_tensor), read)
    for unlabelled in (files, pictures, [to_tensor(p) for p in pictures],
                       torch.stack([to_tensor(p) for p in pictures])):  # fmt: skip
        same(samples.of(unlabelled, None, to_tensor), read, labelled=False)
    same(samples.of(folder, None, to_tensor, labelled=False), read, labelled=False)
    stacked, targets = read.batch([0, 5])[0]
    assert isinstance(stacked, Tensor) and stacked.shape == (2, 3, 64, 64)
    assert targets is not None and [int(t) for t in targets] == [0, 1]
    few = samples.of(folder, None, to_tensor, limit=2)
    assert [int(few[i][1]) for i in range(2)] == [0, 1] and few.name == f"2 of {folder}"
    prints = {x.fingerprint() for x in (read, few, samples.of(pictures, None, to_tensor))}
    assert len(prints) == 3


def test_a_folder_with_maps_of_classes_or_depths(tmp_path: Path) -> None:
    for kind in ("seg", "dep"):
        (tmp_path / kind / "images").mkdir(parents=True)
        Image.new("RGB", (8, 6), "red").save(tmp_path / kind / "images" / "a.png")
    classes = np.arange(48, dtype=np.uint8).reshape(6, 8)
    (tmp_path / "seg" / "labels").mkdir()
    Image.fromarray(classes).save(tmp_path / "seg" / "labels" / "a.png")
    (tmp_path / "dep" / "depth").mkdir()
    np.save(tmp_path / "dep" / "depth" / "a.npy", classes / 10)
    target = samples.of(tmp_path / "seg", None, to_tensor)[0][1]
    assert target is not None and target.tolist() == classes.tolist()
    depth = samples.of(tmp_path / "dep", None, to_tensor)[0][1]
    assert depth is not None and depth.is_floating_point() and depth[0, 1] == pytest.approx(0.1)
    Image.new("RGB", (8, 6)).save(tmp_path / "seg" / "images" / "b.png")
    with pytest.raises(ValueError, match="nothing of its name"):
        samples.of(tmp_path / "seg", None, to_tensor)


def test_classes_are_found_by_number_by_name_or_by_order() -> None:
    named = nn.Module()
    named.config = type("Config", (), {"label2id": {"Dog": 1, "Cat": 0}, "num_labels": 2})()  # type: ignore[assignment]
    assert class_numbers(["cat", "dog"], named, "folders") == [0, 1]
    assert class_numbers(["dog"], named, "folders") == [1]
    of_ten = small("vit")
    assert class_numbers(["7", "10"], of_ten, "folders") == [7, 10]
    assert class_numbers([f"class {i}" for i in range(10)], of_ten, "f") == list(range(10))
    with pytest.raises(ValueError, match=r"are 2 classes .*, and the model has 10"):
        class_numbers(["cat", "dog"], of_ten, "folders")


def test_data_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        samples.of(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must hold pictures"):
        samples.of(tmp_path)
    with pytest.raises(TypeError, match="data must be a folder, a dataset"):
        samples.of(7)
    with pytest.raises(ValueError, match="float tensor"):
        samples.of(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="does not say how it wants its pictures"):
        samples.of([Image.new("RGB", (8, 8))], nn.Linear(2, 2))[0]


def test_pictures_are_prepared_as_timm_and_transformers_say(tmp_path: Path) -> None:
    import timm
    import transformers

    picture = Image.effect_noise((300, 200), 80).convert("RGB")
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    config = timm.data.resolve_data_config({}, model=model)
    expected = timm.data.create_transform(**config)(picture)
    torch.testing.assert_close(samples.of([picture], model)[0][0], expected)

    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                    intermediate_size=32, image_size=48, patch_size=16)  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 48, "width": 48})
    processor.save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    for prepared in (samples.of([picture], loaded), samples.of([picture], loaded, processor)):
        expected = processor(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(prepared[0][0]["pixel_values"], expected)


# --- cost, the command line, several processes ----------------------------------------------------


def test_memory_is_that_of_the_tensors_that_live_together() -> None:
    x = torch.randn(8, 16)

    def model(x: Tensor) -> Tensor:
        wide = x.repeat(1, 4)  # 2 kB, while
        del x
        wider = torch.cat([wide, wide])  # 4 kB come
        del wide
        return wider[:, :1] * 2  # and then 64 bytes

    assert peak_memory(model, x) == 8 * 16 * 4 * (4 + 8)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, plot, csv = (tmp_path / name for name in ("r.html", "p.png", "t.csv"))
    arguments = ["evaluate", "digits", "--keep-rates", "0.5", "--limit", "8", "--seconds", "0.01",
                 "--cache", str(tmp_path)]  # fmt: skip
    files = ["--html", str(page), "--plot", str(plot), "--csv", str(csv)]
    assert main([*arguments, *files]) == 0
    told = capsys.readouterr()
    assert "digits on 8 of " in told.out and f"wrote {page}" in told.err
    assert page.read_text().count("data:image/png") >= 1  # what became of tokens
    assert plot.stat().st_size > 1000
    assert len(csv.read_text().splitlines()) == 2 + len(METHODS)
    assert main([*arguments, "--methods", "tome", "svit", "--json"]) == 0
    told_as_json = json.loads(capsys.readouterr().out)
    assert told_as_json["rows"][1]["method"] == "tome" and "svit" in told_as_json["refused"]
    assert main(["evaluate", "vit_tiny_patch16_224"]) == 1
    assert "give --data" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_killed_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tokred", "evaluate", "digits", "--methods", "tome", "atc",
        "--limit", "64", "--seconds", "0.5", "--json", "--cache", str(tmp_path),
    ]  # fmt: skip

    def finished() -> dict[str, int]:
        return {f.name: f.stat().st_mtime_ns for f in (tmp_path / "evaluate").glob("*.json")}

    with subprocess.Popen(command, stdout=subprocess.PIPE) as killed:
        while len(finished()) < 3 and killed.poll() is None:
            time.sleep(0.02)
        killed.kill()
    before = finished()
    assert 3 <= len(before) < 9 and killed.returncode == -signal.SIGKILL
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = finished()
    assert len(after) == 9 and before.items() <= after.items()  # not measured again
    assert len(json.loads(told)["rows"]) == 9


@pytest.mark.slow
def test_two_processes_give_the_same_table(tmp_path: Path) -> None:
    command = [
        "-m", "tokred", "evaluate", "digits_cluttered", "--methods", "tome", "atc", "--keep-rates",
        "0.5", "--limit", "90", "--seconds", "0.05", "--batch", "8", "--json",
    ]  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    rows = []
    for number, start in enumerate(([], launch)):
        told = subprocess.run(
            [sys.executable, *start, *command, "--cache", str(tmp_path / str(number))],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        found = Evaluation.from_dict(json.loads(told[told.index("{") :]))
        rows.append(
            [(r.metrics, r.agreement, r.kl, r.cosine, r.images, r.compared) for r in found.rows]
        )
    assert rows[0] == rows[1]
