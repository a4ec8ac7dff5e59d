"""Traces tell what happened, and pictures show it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import images_for, small
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import tokred
from tokred import reducers
from tokred.show import drawing


@pytest.mark.filterwarnings("ignore:the gates of")  # random ones will do
@pytest.mark.parametrize(
    "method",
    [
        name
        for name in reducers.names()
        if not hasattr(reducers.make(name), "schedule")
        and reducers.place(reducers.make(name)) != "around"
    ],
)
def test_a_trace_follows_every_patch(method: str, images: torch.Tensor, plain: nn.Module) -> None:
    tokred.apply(plain, method, keep_rate=0.5)
    trace = tokred.inspect(plain, images)
    assert [(s.layer, s.before, s.after) for s in trace.stages] == [
        (1, 16, 8),
        (2, 8, 4),
        (3, 4, 2),
    ]
    label = torch.arange(16).expand(2, 16)
    for stage in trace.stages:
        onward = stage.map.labels()
        for b in range(2):
            expected = [-1 if n < 0 else int(onward[b, n]) for n in label[b].tolist()]
            assert stage.labels[b].flatten().tolist() == expected
        label = stage.labels.flatten(1)


def test_a_trace_reads_like_a_table(images: torch.Tensor, plain: nn.Module) -> None:
    tokred.apply(plain, "tome", keep_rate=0.5)
    lines = str(tokred.inspect(plain, images)).split("\n")
    assert lines[0] == "ToMe(threshold=None) on a 4x4 grid, 1 prefix tokens"
    assert lines[2].split()[:2] == ["0", "16"]
    assert "16 -> 8, the largest stands for" in lines[3]
    tokred.apply(plain, "topk", keep_rate=0.5)
    assert "8 -> 4, 4 dropped" in str(tokred.inspect(plain, images))


def test_inspecting_changes_nothing(images: torch.Tensor, plain: nn.Module) -> None:
    tokred.apply(plain, "tome", keep_rate=0.5)
    before = plain(images)
    tokred.inspect(plain, images)
    assert torch.equal(plain(images), before)


def test_any_image_size_has_its_own_grid() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=4, dynamic_img_size=True).eval()
    tokred.apply(model, "atc", keep_rate=0.5)
    trace = tokred.inspect(model, torch.randn(1, 3, 64, 96))
    assert trace.grid == (4, 6)
    assert trace.stages[0].after == 12


@pytest.mark.parametrize("name", ["vit", "rectangular", "dinov2, registers"])
def test_pictures_show_every_stage(name: str) -> None:
    model = small(name)
    images = images_for(model)
    tokred.apply(model, "topk", keep_rate=0.5)
    trace = tokred.inspect(model, images)
    strips = tokred.visualise(trace, images, cell=8)
    rows, columns = trace.grid
    assert len(strips) == 2
    width = 4 * (columns * 8 + drawing._GAP) + drawing._GAP
    assert strips[0].size == (width, rows * 8 + drawing._caption(rows * 8) + drawing._GAP)
    assert drawing.stack(strips).size == (width, 2 * strips[0].height)


def test_a_picture_shows_what_was_merged() -> None:
    """Left half merged into one token, right half kept: the left is one colour, the right is the
    image."""
    model = small("vit")
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[..., 32:] = torch.arange(32, dtype=torch.uint8) * 7
    labels = torch.arange(16).view(1, 4, 4).clone()
    labels[:, :, :2] = 0
    labels[:, 3, 3] = -1
    tokred.apply(model, "tome", keep_rate=0.5)
    trace = tokred.inspect(model, image.float())
    import dataclasses

    stage = dataclasses.replace(trace.stages[0], labels=labels)
    drawn = tokred.visualise(dataclasses.replace(trace, stages=(stage,)), image, cell=16)[0]
    left = drawing._GAP + 64 + drawing._GAP
    above = drawing._caption(64)
    box = (left, above, left + 64, above + 64)
    pixels = torch.tensor(list(drawn.crop(box).convert("RGB").tobytes())).view(64, 64, 3)
    merged = pixels[:, :31].reshape(-1, 3)
    assert (merged == merged[0]).all(), "one token, one colour, no line inside"
    assert (pixels[:48, 31] == 255).all(), "a line where it ends"
    assert torch.equal(pixels[0:15, 32:47], image[0, :, 0:15, 32:47].permute(1, 2, 0).long())
    assert (pixels[50:62, 50:62] == torch.tensor(drawing._GREY)).all(), "dropped tokens are dark"


def test_pictures_may_be_pictures(plain: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(plain, "tome", keep_rate=0.5)
    trace = tokred.inspect(plain, images)
    photos = [Image.new("RGB", (120, 90), colour) for colour in ("red", "blue")]
    strip = tokred.visualise(trace, photos)[0]
    assert strip.getpixel((drawing._GAP + 5, drawing._caption(0) + 5)) == (255, 0, 0)


def test_the_trace_says_which_backend_was_used(plain: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(plain, "atc", keep_rate=0.5)
    chosen = tokred.reducers.atc.choose(images.device)
    assert chosen != "auto"
    assert f"backend='{chosen}'" in str(tokred.inspect(plain, images))


def test_the_wrong_pictures_are_noticed(plain: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(plain, "tome", keep_rate=0.5)
    trace = tokred.inspect(plain, images)
    with pytest.raises(ValueError, match="images must be the 2 that were traced, not 1"):
        tokred.visualise(trace, images[:1])
    with pytest.warns(UserWarning, match="nothing is reduced"):
        tokred.apply(plain, "tome", keep_rate=1.0)
    with pytest.raises(ValueError, match="no reductions to draw"):
        tokred.visualise(tokred.inspect(plain, images), images)


def test_citations_are_those_of_the_method(plain: nn.Module) -> None:
    tokred.apply(plain, "atc", keep_rate=0.5)
    assert tokred.cite(plain) == tokred.cite("atc") == tokred.cite(tokred.ATC("single"))
    assert "Agglomerative Token Clustering" in tokred.cite(plain)
    assert "baseline" in tokred.cite("random")


def test_rises_are_told_and_undo_what_was_merged(plain: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(plain, "tome", tokred.Exactly((10, 16, 8, 8)))
    trace = tokred.inspect(plain, images)
    assert trace.rises == ((1, 16),)
    assert [stage.before for stage in trace.stages] == [16, 16]
    # The second reduction is of the full grid, not of what the first one had left.
    assert torch.equal(trace.stages[1].labels.flatten(1), trace.stages[1].map.labels())
    assert "10 -> 16 again" in str(trace)


@pytest.mark.filterwarnings("ignore:the gates of")
def test_heat_is_brighter_where_more_layers_were_used(
    images: torch.Tensor, plain: nn.Module
) -> None:
    tokred.apply(plain, "topk", tokred.Exactly((16, 8, 8, 4)))
    trace = tokred.inspect(plain, images)
    usage = trace.usage()
    strips = drawing.heat(trace, images, cell=10)
    assert len(strips) == 2
    for used, strip in zip(usage, strips, strict=True):
        pixels = torch.from_numpy(np.array(strip)).float().sum(-1)
        brightness = {}
        for row in range(4):
            for column in range(4):
                y, x = drawing._caption(0) + row * 10 + 5, 2 * drawing._GAP + 40 + column * 10 + 5
                brightness[int(used[row, column])] = float(pixels[y, x])
        assert sorted(brightness, key=lambda layers: brightness[layers]) == sorted(brightness)
    with pytest.raises(ValueError, match="images must be the 2 that were traced, not 1"):
        drawing.heat(trace, images[:1])


@pytest.mark.filterwarnings("ignore:the gates of")
def test_the_plot_of_usage_has_the_shares_of_the_trace(
    images: torch.Tensor, plain: nn.Module
) -> None:
    axes = Figure().add_subplot()
    tokred.apply(plain, "svit", tokred.Exactly((16, 8, 8, 8)))
    trace = tokred.inspect(plain, images)
    drawing.plot_usage(axes, trace)
    heights = [bar.get_height() for bar in axes.patches]
    counts = {stage.layer: sum(stage.counts) / 2 / 16 * 100 for stage in trace.stages}
    assert heights[:4] == pytest.approx([100.0] + [counts[layer] for layer in (1, 2, 3)])
    back = trace.reactivated()
    assert heights[5:] == pytest.approx([counts[layer] * back[layer] for layer in (1, 2, 3)])
