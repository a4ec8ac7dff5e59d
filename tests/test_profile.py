"""A profile finds time where it was spent, and says where it was wasted."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tokred
from tokred.maps import Clusters, TokenMap
from tokred.measure.profile.clock import Clock, clock_for
from tokred.measure.profile.values import PARTS, LayerTimes
from tokred.measure.race import Arm
from tokred.patching import hang, host_of, reduction_of
from tokred.reducers import Tokens

NAP = 0.02


class Nights:
    """Time that passes only where somebody sleeps, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def nights(monkeypatch: pytest.MonkeyPatch) -> Nights:
    nights = Nights()
    clock = Clock(lambda: nights.now, lambda start, end: end - start)
    monkeypatch.setattr("tokred.measure.profile.measuring.clock_for", lambda device: clock)
    monkeypatch.setattr("test_profile.time.sleep", nights.sleep)
    return nights


@dataclass(frozen=True)
class Napping:
    """Merges what is next to each other, and sleeps at one layer, in one of its parts."""

    needs: ClassVar[frozenset[str]] = frozenset()
    bibtex: ClassVar[str] = ""

    where: str
    layer: int = 2

    def __call__(self, tokens: Tokens, keep: int) -> TokenMap:
        batch, num, _ = tokens.x.shape
        index = (torch.arange(num) * keep // num).expand(batch, -1)
        if tokens.layer != self.layer:
            return Clusters(index, keep)
        if self.where == "matching":
            time.sleep(NAP)
        if self.where == "too many":
            return Clusters(index.clamp(max=keep - 2), keep - 1)
        return NappingMap(index, keep, where=self.where)


@dataclass(frozen=True)
class NappingMap(Clusters):
    where: str = ""

    def down(self, x: Tensor, size: Tensor) -> Tensor:
        if self.where == "merging":
            time.sleep(NAP)
        return super().down(x, size)

    def up(self, y: Tensor, stale: Tensor | None = None) -> Tensor:
        if self.where == "back":
            time.sleep(NAP)
        return super().up(y, stale)


def of(model: nn.Module, *arguments: Any, rounds: int = 3, **options: Any) -> tokred.Profile:
    images = torch.randn(2, 3, 64, 64)
    return tokred.profile(model, images, *arguments, rounds=rounds, warmup=1, **options)


def test_inner_parts_are_not_counted_twice() -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0, 255.0])
    clock = Clock(lambda: next(now), lambda start, end: end - start)
    clock.begin("side")
    clock.enter(4)
    with clock.part("merging"), clock.part("matching"):
        pass
    clock.leave()
    with clock.part("back"):  # behind the block
        pass
    assert clock.spent("side") == [
        {
            (4, "rest"): 1.0 + 16.0,
            (4, "merging"): 2.0 + 8.0,
            (4, "matching"): 4.0,
            (None, "back"): 64.0,
        }
    ]


class Event:
    """An event of a device, whose clock has gone 2 ms further at every one."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        Event.count += 1
        self.at = 2.0 * Event.count

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_on_a_device_borders_are_events_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = clock_for(torch.device("cuda:1"))
    clock.begin("side")
    clock.enter(0)
    with clock.part("bias"):
        pass
    clock.leave()
    assert clock.spent("side") == [{(0, "rest"): 0.004, (0, "bias"): 0.002}]


@pytest.mark.usefixtures("nights")
@pytest.mark.parametrize(("part", "layer"), [("matching", 2), ("merging", 2), ("back", 3)])
def test_time_is_found_where_it_was_spent(plain: nn.Module, part: str, layer: int) -> None:
    result = of(plain, Napping(part), 0.5)
    found = {
        (times.layer, name): seconds
        for times in result.layers
        for name in ("rest", *PARTS, "dense", "limit")
        if (seconds := getattr(times, name)) != 0
    }
    assert found == {(layer, part): pytest.approx(NAP)}
    assert result.total("block") == result.total("added") == pytest.approx(NAP)


@pytest.mark.usefixtures("nights")
def test_what_costs_more_than_it_saves_is_named(plain: nn.Module) -> None:
    result = of(plain, Napping("matching"), 0.5)
    (loss,) = result.losses()
    assert loss.startswith("layer 2, 8 -> 4 tokens: matching and merging cost 20.00 ms and all ")
    assert "save nothing by it" in loss
    assert loss in str(result) and loss.replace(">", "&gt;") in result._repr_html_()


def test_the_whole_is_warned_of_in_words() -> None:
    def warned(reduced: float, limit: float, profiled: float, *seconds: float) -> list[str]:
        layers = [times(0, 16, 8, 0.3, limit=0.3), times(1, 8, 8, 0.2, limit=0.1, bias=0.1)]
        arms = {"reduced": reduced, "limit": limit, "profiled": profiled}
        made = {name: Arm((each,), None) for name, each in arms.items()}
        dense = Arm(seconds or (1.0,), None)
        return dataclasses.replace(bare(layers), dense=dense, **made).warnings()

    slower, biased, _ = warned(1.5, 0.5, 2.0)
    assert slower == "SLOWER than the dense model: what the method adds takes 100.00 ms."
    assert "2.00 times as long as with tokens cut off" in biased
    assert "would gain next to nothing" in warned(1.5, 0.99, 1.5)[0]
    assert "slowed the model down by 33%" in warned(1.5, 0.5, 2.0)[2]
    assert len(warned(0.9, 0.5, 0.9)) == 1
    (busy,) = warned(0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 3.0)
    assert busy.startswith("Rounds differ by +-"), "and nothing that could be due to it"


def test_numbers_are_those_of_the_model(plain: nn.Module) -> None:
    rounds = []
    result = of(plain, "tome", 0.5, on_round=lambda done, of: rounds.append((done, of)))
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    assert result.tokens == 16 and result.counts == (16, 8, 4, 2)
    assert [times.before for times in result.layers] == [16, 16, 8, 4]
    assert (result.batch, result.image_size, result.place) == (2, (64, 64), "between")
    for times in result.layers:
        reduces = times.layer > 0
        assert (times.matching > 0) == (times.merging > 0) == reduces
        assert (times.back > 0) == (times.layer == 3), "features leave on the full grid"
        assert (times.bias > 0) == (times.layer > 1), "sizes count from the next block on"
        assert times.seamed is not None
        assert min(times.rest, times.dense, times.limit, times.seamed) > 0
    assert result.seamed is not None and len(result.seamed.seconds) == 3
    share = result.seamed.median / result.limit.median - 1
    assert result.bookkeeping == pytest.approx(share) and f"bookkeeping {share:.2f}" in str(result)
    assert len(result.reduced.seconds) == len(result.limit.seconds) == 3
    stored = json.loads(json.dumps(result.as_dict()))
    assert stored["layers"][2]["block"] == result.layers[2].block
    assert stored["losses"] == result.losses()
    once = of(plain, "tome", 0.5, rounds=1)
    assert 0 < once.total("added") < once.total("block") < once.profiled.seconds[0]


def bare(layers: list[LayerTimes], place: str = "between") -> tokred.Profile:
    arm = Arm((1.0,), None)
    return tokred.Profile(
        "ViT", "Method()", place, True, 16, tuple(layers), 0.0, 1, (64, 64), "cpu", "float32", 1,
        {}, arm, arm, arm, arm,
    )  # fmt: skip


def times(layer: int, before: int, after: int, rest: float, **others: float) -> LayerTimes:
    none = dict.fromkeys((*PARTS, "dense", "limit"), 0.0)
    return LayerTimes(layer, before, after, rest, **{**none, **others})


def test_savings_are_shared_by_who_took_tokens_away() -> None:
    result = bare(
        [
            times(0, 16, 8, 0.010, dense=0.012, limit=0.009, matching=0.004),
            times(1, 8, 4, 0.004, dense=0.012, limit=0.004, matching=0.001, bias=0.001),
            times(2, 4, 4, 0.003, dense=0.012, limit=0.003),
            times(3, 16, 16, 0.012, dense=0.012, limit=0.012, back=0.002),
        ]
    )
    saved = result.saved()
    # In layer 1, the first one has 8 tokens less to show, the second 4 in half of the block.
    assert saved[0] == pytest.approx(0.002 + 0.007 * 8 / 10 + 0.009 * 8 / 12 - 0.002 * 8 / 12)
    assert saved[1] == pytest.approx(0.007 * 2 / 10 + 0.009 * 4 / 12 - 0.002 * 4 / 12)
    assert sum(saved.values()) == pytest.approx(0.002 + 0.007 + 0.009 - 0.002)
    assert result.losses() == []
    dear = dataclasses.replace(result.layers[1], matching=0.005)
    (loss,) = bare([result.layers[0], dear, *result.layers[2:]]).losses()
    assert "cost 5.00 ms and all layers from it on save 3.73 ms by it" in loss
    assert "cut off at no cost would save 4.60 ms" in loss


def test_around_a_block_a_reduction_saves_there_alone() -> None:
    layers = [
        times(n, 16, 8, 0.008, dense=0.012, limit=0.007, matching=0.001 + 0.004 * n, back=0.001)
        for n in range(2)
    ]
    result = bare(layers, "around")
    assert result.saved() == pytest.approx({0: 0.003, 1: 0.003})
    assert [loss[:8] for loss in result.losses()] == ["layer 1,"]


def test_gated_blocks_are_profiled(plain: nn.Module) -> None:
    with pytest.warns(UserWarning, match="random"):
        result = of(plain, tokred.SViT(), 0.25)
    assert result.place == "around" and {times.before for times in result.layers} == {16}
    gated = [times for times in result.layers if times.matching > 0]
    assert [times.layer for times in gated] == [1, 2, 3]
    assert all(times.back > 0 for times in gated if times.after < 16)
    assert min(result.counts) < 16


def test_the_applied_reduction_is_profiled_and_stays(plain: nn.Module) -> None:
    former = tokred.apply(plain, tokred.ATC(linkage="single"), keep_rate=0.5)
    assert of(plain, rounds=1).method == "ATC(linkage='single', backend='auto')"
    assert reduction_of(plain) is former
    with pytest.raises(ValueError, match="returned 3 tokens of 8 at layer 2"):
        of(plain, Napping("too many"), 0.5)
    assert reduction_of(plain) is former
    assert all(not hook for block in plain.blocks for hook in hooks(block))


@torch.no_grad()
@pytest.mark.parametrize("method", ["atc", "evit", "svit", "slic"])
def test_what_is_observed_is_computed_as_ever(plain: nn.Module, method: str) -> None:
    images = torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random gates will do
        reduction = tokred.apply(plain, method, 0.5)
    expected = plain.forward_intermediates(images)
    clock = clock_for(torch.device("cpu"))
    clock.begin("side")
    reduction.observer = clock
    hang(plain, host_of(plain), reduction)
    found = plain.forward_intermediates(images)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    (spent,) = clock.spent("side")
    assert {"matching", "merging", "back"} <= {part for _, part in spent}


def test_a_model_without_one_is_left_without(plain: nn.Module) -> None:
    before = {name: dict(vars(module)) for name, module in plain.named_modules()}
    of(plain, "tome", 0.5, rounds=1)
    with pytest.raises(ValueError, match="method must be given: no reduction is applied"):
        of(plain)
    with pytest.raises(ValueError, match="rounds must be at least 1 and warmup 0, not 0"):
        of(plain, "tome", rounds=0)
    after = {name: dict(vars(module)) for name, module in plain.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[name].keys() == after[name].keys() for name in before)
    assert not any(hooks(module)[0] or hooks(module)[1] for module in plain.modules())


def hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return dict(module._forward_hooks), dict(module._forward_pre_hooks)


class Direct(nn.Sequential):
    """Calls its modules past their hooks."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block.forward(x)
        return x


def test_blocks_that_cannot_be_watched_are_named(plain: nn.Module) -> None:
    blocks = plain.blocks
    plain.blocks = Direct(*blocks)
    with pytest.raises(RuntimeError, match="block 0 was not seen to run"):
        of(plain, "tome", 0.5, rounds=1)
    plain.blocks = blocks
    blocks[1].compile()
    with pytest.raises(RuntimeError, match=r"blocks\.1 was compiled in place"):
        of(plain, "tome", 0.5, rounds=1)


def test_other_hosts_and_their_shapes() -> None:
    config = transformers.ViTConfig(
        image_size=64, num_hidden_layers=4, hidden_size=48, num_attention_heads=3,
        intermediate_size=96,
    )  # fmt: skip
    vit = transformers.ViTModel(config).eval()
    images = {"pixel_values": torch.randn(2, 3, 64, 64)}
    result = tokred.profile(vit, images, "tome", 0.5, rounds=1, warmup=0)
    assert result.counts == (16, 8, 4, 2) and result.layers[1].matching > 0

    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2, 6, 2), img_size=224
    ).eval()
    result = tokred.profile(swin, torch.randn(1, 3, 224, 224), "slic", rounds=1, warmup=0)
    assert len(result.layers) == 6 and result.tokens == 14 * 14
    assert any(times.matching > 0 for times in result.layers)


def test_the_table_and_the_plot_show_every_layer(plain: nn.Module) -> None:
    result = of(plain, "tome", 0.5, rounds=1)
    lines = str(result).split("\n")
    (start,) = [number for number, line in enumerate(lines) if line.startswith("layer  ")]
    rows = lines[start + 1 : start + 5]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    assert all("|" in row for row in rows) and "16 -> 8" in rows[1]
    assert f"{1e3 * result.layers[1].matching:.3f}" in rows[1]
    (axes,) = result.plot().axes
    heights = {bar.get_label(): [patch.get_height() for patch in bar] for bar in axes.containers}
    assert heights["dense"] == [1e3 * times.dense for times in result.layers]
    assert heights["matching"] == [1e3 * times.matching for times in result.layers]


def test_what_cannot_be_profiled_is_refused_in_words(plain: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"method must be given with keep_rate=0\.3 and schedule"):
        tokred.profile(plain, images, keep_rate=0.3)
    with pytest.raises(ValueError, match="images must hold one image at least, not 0"):
        tokred.profile(plain, images[:0], "tome", 0.5)
    with pytest.raises(TypeError, match=r"images must be one batch, .* not a list"):
        tokred.profile(plain, [images[0]], "tome", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"evaluation mode: call model\.eval\(\)"):
        tokred.profile(plain.train(), images, "svit", 0.5)


@pytest.mark.parametrize("applied", [False, True])
def test_a_profile_that_is_interrupted_leaves_no_trace(plain: nn.Module, applied: bool) -> None:
    former = tokred.apply(plain, "atc", keep_rate=0.5) if applied else None

    def seen() -> list[tuple[set[str], int, int]]:
        return [
            (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in plain.modules()
        ]

    before = seen()

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of(plain, "tome", 0.5, on_round=stop)
    assert reduction_of(plain) is former and seen() == before


def test_only_what_was_reduced_has_a_way_back() -> None:
    config = transformers.DPTConfig(
        image_size=64, num_hidden_layers=4, hidden_size=48, num_attention_heads=3,
        intermediate_size=96, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )  # fmt: skip
    dpt = transformers.DPTForDepthEstimation(config).eval()
    result = of(dpt, "slic", tokred.Hourglass(0.5, down=2), rounds=1)
    assert [times.layer for times in result.layers if times.after < times.before] == [2]
    assert [times.layer for times in result.layers if times.back > 0] == [2, 3]
    assert "the whole model " in str(result)
