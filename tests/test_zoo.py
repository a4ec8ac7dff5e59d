"""The bundled checkpoints are real: they read digits they have not seen, and reducing their tokens
costs what the methods are known to cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tokred
from tokred.data import zoo
from tokred.models.segmenter import mean_iou
from tokred.reducers import learned, make

CLASSIFIERS = ["digits", "digits_cluttered"]
SEGMENTERS = ["digits_scenes", "digits_swin"]
NATIVE = ["digits_tcformer"]
every_reader = pytest.mark.parametrize("name", CLASSIFIERS + NATIVE)
every_classifier = pytest.mark.parametrize("name", CLASSIFIERS)
every_segmenter = pytest.mark.parametrize("name", SEGMENTERS)


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    answers = torch.cat([model(part).argmax(1) for part in images.split(40)])
    return float((answers == labels).float().mean())


def said(name: str, what: str) -> float:
    """A percentage on a model card."""
    card = (Path(zoo.__file__).parent / "bundled" / f"{name}.md").read_text()
    found = re.search(rf"{what}: ([\d.]+) %", card)
    assert found is not None
    return float(found[1])


def test_names_all_that_is_tested_here() -> None:
    assert zoo.names() == sorted(CLASSIFIERS + SEGMENTERS + NATIVE)


@every_reader
def test_reads_as_many_held_out_digits_as_its_card_says(name: str) -> None:
    held_out = zoo.held_out(name)
    assert held_out.images.shape == (397, 1, 56, 56) and held_out.images.dtype == torch.uint8
    measured = accuracy(zoo.load(name), zoo.normalise(held_out.images), held_out.labels)
    # One image may fall differently in other sums.
    assert measured * 100 == pytest.approx(said(name, "Held-out accuracy"), abs=0.26)


@every_reader
def test_reads_other_drawings_of_them_as_well(name: str) -> None:
    held_out = zoo.held_out(name)
    drawn = zoo.draw(held_out.digits, torch.Generator().manual_seed(5), name)
    least = {"digits": 0.95, "digits_cluttered": 0.90, "digits_tcformer": 0.93}[name]
    assert accuracy(zoo.load(name), zoo.normalise(drawn), held_out.labels) >= least


@pytest.mark.parametrize(
    "name", ["digits_cluttered", pytest.param("digits", marks=pytest.mark.slow)]
)
def test_every_method_beats_random_merging_by_far(name: str) -> None:
    held_out = zoo.held_out(name)
    images, model = zoo.normalise(held_out.images), zoo.load(name)
    reached = {}
    # The temperature of slic is a squared distance between features: 50 is for wide models.
    methods = {name: name for name in tokred.methods() if not learned(make(name))}
    methods |= {"slic": tokred.SLIC(tau=5.0)}
    for method, reducer in methods.items():
        with tokred.applied(model, reducer, keep_rate=0.5):
            reached[method] = accuracy(model, images, held_out.labels)
    baseline = reached.pop("random")
    assert min(reached.values()) > baseline + 0.05, (reached, baseline)


@torch.no_grad()
def test_the_tokens_of_the_tcformer_are_where_the_digit_is() -> None:
    model, digits = zoo.load("digits_tcformer"), zoo.held_out("digits_tcformer").digits[:100]
    images, alone = (
        zoo.draw(digits, torch.Generator().manual_seed(3), "digits_tcformer", fragments=fragments)
        for fragments in (None, 0)
    )
    ink = torch.nn.functional.avg_pool2d(alone.float(), 4)[:, 0] / 255  # of each cell
    empty = torch.nn.functional.avg_pool2d(images.float(), 4)[:, 0] == 0
    for stage, least in zip(model.stages(zoo.normalise(images))[1:], (1.8, 2.5, 2.0), strict=True):
        index, ones = stage.layout.cells.index, torch.ones(100, 196)
        cells = torch.zeros(100, stage.layout.num_tokens).scatter_add(1, index, ones)
        tokens = cells.reciprocal().gather(1, index).view(100, 14, 14)  # per cell
        assert (tokens * ink).sum() / ink.sum() > least * tokens[empty].mean()


def test_drawings_without_fragments_are_of_the_same_digits() -> None:
    digits = zoo.held_out().digits[:20]
    whole, alone = (
        zoo.draw(digits, torch.Generator().manual_seed(0), fragments=number).float()
        for number in (None, 0)
    )
    strokes = alone > 128
    assert 0.03 < strokes.float().mean() < 0.3 and (whole[strokes] > 64).all()


def test_drawings_follow_from_the_generator() -> None:
    digits = zoo.held_out().digits[:20]
    first, again, other = (
        zoo.draw(digits, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawings_are_the_same_in_other_sizes() -> None:
    digits = zoo.held_out().digits[:20]
    small, large = (
        zoo.draw(digits, torch.Generator().manual_seed(0), "digits", side).float()
        for side in (32, 64)
    )
    assert small.shape == (20, 1, 32, 32) and large.shape == (20, 1, 64, 64)
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 4


@torch.no_grad()
def segmented(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> float:
    answers = torch.cat([model(part).argmax(1) for part in images.split(8)])
    return mean_iou(answers, targets, zoo.SCENE_CLASSES)


@every_segmenter
def test_segments_held_out_scenes_as_well_as_its_card_says(name: str) -> None:
    held_out = zoo.held_out(name)
    assert held_out.images.shape == (80, 1, 112, 112) and held_out.images.dtype == torch.uint8
    assert held_out.labels.shape == (80, 112, 112)
    measured = segmented(zoo.load(name), zoo.normalise(held_out.images), held_out.labels)
    assert measured * 100 == pytest.approx(said(name, "Held-out mIoU"), abs=0.1)


@every_segmenter
def test_segments_other_scenes_as_well(name: str) -> None:
    held_out = zoo.held_out(name)
    generator = torch.Generator().manual_seed(5)
    images, targets = zoo.draw_scenes(held_out.digits, held_out.classes, 24, generator)
    expected = said(name, "Held-out mIoU") / 100
    assert segmented(zoo.load(name), zoo.normalise(images), targets) >= expected - 0.05


def test_the_digits_that_are_held_out_are_the_same_everywhere() -> None:
    first, *others = (zoo.held_out(name) for name in zoo.names())
    assert first.digits.shape == (397, 8, 8)
    for other in others:
        assert torch.equal(other.digits, first.digits)
        assert torch.equal(other.classes, first.classes)


def test_scenes_follow_from_the_generator_and_hold_what_they_promise() -> None:
    held_out = zoo.held_out("digits_scenes")
    drawn = [
        zoo.draw_scenes(held_out.digits, held_out.classes, 12, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    images, targets = drawn[0]
    assert images.shape == (12, 1, 112, 112) and targets.shape == (12, 112, 112)
    ink = images[:, 0].float()
    for scene, target in zip(ink, targets, strict=True):
        there = target.unique().tolist()
        assert there[0] == 0 and 3 <= len(there) - 1 <= 6 and there[-1] <= 10
        assert scene[target > 0].mean() > 1.5 * scene[target == 0].mean()


def test_scenes_need_a_digit_of_each_class() -> None:
    held_out = zoo.held_out("digits_scenes")
    few = held_out.classes < 9
    with pytest.raises(ValueError, match="classes must hold each of 0 to 9"):
        generator = torch.Generator().manual_seed(0)
        zoo.draw_scenes(held_out.digits[few], held_out.classes[few], 2, generator)
    with pytest.raises(ValueError, match="draw_scenes draws for it"):
        zoo.draw(held_out.digits, torch.Generator(), "digits_scenes")


@every_segmenter
def test_segmenters_have_784_tokens_and_take_other_sizes(name: str) -> None:
    model = zoo.load(name)
    assert model.encoder.patch_embed.grid_size == (28, 28)
    assert model(torch.zeros(1, 1, 56, 84)).shape == (1, 11, 56, 84)


def test_the_swin_shifts_its_windows_in_the_long_stage() -> None:
    stage = zoo.load("digits_swin").encoder.layers[0]
    assert stage.output_resolution == (28, 28) and len(stage.blocks) == 10
    assert [tuple(block.window_size) for block in stage.blocks] == [(14, 14)] * 10
    assert [tuple(block.shift_size) for block in stage.blocks] == [(0, 0), (7, 7)] * 5


def test_an_unknown_checkpoint_names_the_known_ones() -> None:
    for call in (zoo.load, zoo.held_out):
        with pytest.raises(ValueError, match="'letters'; bundled checkpoints: digits, digits_clu"):
            call("letters")
