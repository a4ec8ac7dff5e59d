"""The bundled checkpoints are real: they read digits they have not seen, and reducing their tokens
costs what the methods are known to cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tokred
from tokred import zoo

every_checkpoint = pytest.mark.parametrize("name", zoo.names())


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    answers = torch.cat([model(part).argmax(1) for part in images.split(40)])
    return float((answers == labels).float().mean())


@every_checkpoint
def test_reads_as_many_held_out_digits_as_its_card_says(name: str) -> None:
    card = (Path(zoo.__file__).parent / "zoo" / f"{name}.md").read_text()
    said = re.search(r"Held-out accuracy: ([\d.]+) %", card)
    assert said is not None
    held_out = zoo.held_out(name)
    assert held_out.images.shape == (397, 1, 56, 56) and held_out.images.dtype == torch.uint8
    measured = accuracy(zoo.load(name), zoo.normalise(held_out.images), held_out.labels)
    assert measured * 100 == pytest.approx(float(said[1]), abs=0.26)  # one image, in other sums


@every_checkpoint
def test_reads_other_drawings_of_them_as_well(name: str) -> None:
    held_out = zoo.held_out(name)
    drawn = zoo.draw(held_out.digits, torch.Generator().manual_seed(5), name)
    least = {"digits": 0.95, "digits_cluttered": 0.90}[name]
    assert accuracy(zoo.load(name), zoo.normalise(drawn), held_out.labels) >= least


@every_checkpoint
def test_every_method_beats_random_merging_by_far(name: str) -> None:
    held_out = zoo.held_out(name)
    images, model = zoo.normalise(held_out.images), zoo.load(name)
    reached = {}
    for method in tokred.methods():
        with tokred.applied(model, method, keep_rate=0.5):
            reached[method] = accuracy(model, images, held_out.labels)
    baseline = reached.pop("random")
    assert min(reached.values()) > baseline + 0.05, (reached, baseline)


def test_drawings_follow_from_the_generator() -> None:
    digits = zoo.held_out().digits[:20]
    first, again, other = (
        zoo.draw(digits, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_unknown_checkpoint_names_the_known_ones() -> None:
    for call in (zoo.load, zoo.held_out):
        with pytest.raises(ValueError, match="'letters'; bundled checkpoints: digits, digits_clu"):
            call("letters")
