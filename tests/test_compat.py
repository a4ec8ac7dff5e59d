"""`tokred.compat`: what other packages' calls do here, and every difference that docs/migrating.md
names and that can be tried."""

from __future__ import annotations

import copy
import io
import os
import threading
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import images_for, make_visible, small
from PIL import Image
from test_diffusers import SD, SDXL, sd_inputs, sdxl_inputs, unet
from test_patching import traces
from torch import Tensor, nn

import tokred
import tokred.compat.tome as tome
import tokred.compat.tomesd as tomesd
from tokred.compat.tomesd import InPairs
from tokred.data import zoo
from tokred.schedule import Schedule


@torch.no_grad()
def answer(model: nn.Module, images: Tensor) -> Tensor:
    out: Tensor = model(images)
    return out


# tome


@pytest.mark.parametrize(
    ("r", "schedule"),
    [
        (3, tokred.Constant(3)),
        ((3, -1.0), tokred.Linear(3)),
        ((3, 0.5), tokred.Linear(3, 0.5)),
        ([2, 0, 5], tokred.Exactly((14, 14, 9, 9))),
        ((5, 4, 0, 1), tokred.Exactly((11, 7, 7, 6))),
        (10**6, tokred.Exactly((8, 4, 2, 1))),
    ],
)
@pytest.mark.parametrize("name", ["vit", "distilled", "no class token"])
def test_r_is_a_schedule_of_ours_to_the_bit(name: str, r: Any, schedule: Schedule) -> None:
    model, twin = small(name), small(name)
    images = images_for(model)
    tome.patch.timm(model)
    model.r = r
    for full_grid in (True, False):
        tokred.apply(twin, "tome", schedule, full_grid=full_grid)
        assert torch.equal(answer(model, images), answer(twin, images))
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.equal(features, twin.forward_features(images))
    others = tokred.patching.reduction_of(model).layout.others
    assert features.shape[1] == schedule(16, 4)[-1] + others


def test_every_way_of_patching_is_the_same() -> None:
    for patch in (tome.patch.timm, tome.patch.swag, tome.patch.mae):
        for prop_attn in (True, False):
            model, twin = small("mae, average pooling"), small("mae, average pooling")
            images = images_for(model)
            patch(model, prop_attn=prop_attn)
            model.r = 2
            tokred.apply(
                twin, "tome", tokred.Constant(2), full_grid=False, proportional_attention=prop_attn
            )
            found = answer(model, images)
            assert torch.equal(found, answer(twin, images))
            tokred.apply(
                twin,
                "tome",
                tokred.Constant(2),
                full_grid=False,
                proportional_attention=not prop_attn,
            )
            assert not torch.equal(found, answer(twin, images))


class MaskedAutoencoder(timm.models.VisionTransformer):  # type: ignore[misc]
    """What MAE's repository makes of timm's class, for classification."""

    def __init__(self, global_pool: bool) -> None:
        super().__init__(64, embed_dim=48, depth=2, num_heads=3, num_classes=5)
        self.averages = global_pool
        if global_pool:
            self.fc_norm = nn.LayerNorm(48, eps=1e-6)
            del self.norm

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.blocks(self._pos_embed(self.patch_embed(x)))
        return self.fc_norm(x[:, 1:].mean(1)) if self.averages else self.norm(x)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.forward_features(x))
        return out


def test_models_of_maes_repository() -> None:
    images = torch.randn(2, 3, 64, 64)
    averaging = MaskedAutoencoder(global_pool=True).eval()
    was = traces(averaging)
    with pytest.raises(tokred.UnsupportedModelError, match=r"load its weights into timm's"):
        tome.patch.mae(averaging)
    assert traces(averaging) == was
    model = timm.models.VisionTransformer(
        64, embed_dim=48, depth=2, num_heads=3, num_classes=5, global_pool="avg"
    ).eval()
    model.load_state_dict(averaging.state_dict())
    dense = answer(averaging, images)
    torch.testing.assert_close(answer(model, images), dense)
    tome.patch.mae(model)
    model.r = 4
    assert not torch.allclose(answer(model, images), dense, rtol=1e-3, atol=1e-3)

    other = MaskedAutoencoder(global_pool=False).eval()
    plain = timm.models.VisionTransformer(
        64, embed_dim=48, depth=2, num_heads=3, num_classes=5
    ).eval()
    plain.load_state_dict(other.state_dict())
    for one in (other, plain):
        tome.patch.mae(one)
        one.r = 4
    torch.testing.assert_close(answer(other, images), answer(plain, images))


def test_swag_models_are_those_of_torchvision() -> None:
    import torchvision

    model = torchvision.models.VisionTransformer(64, 16, 2, 3, 48, 96, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)  # zeros, else
    images = torch.randn(2, 3, 64, 64)
    dense = answer(model, images)
    tome.patch.swag(model)
    assert torch.equal(answer(model, images), dense)
    model.r = 4
    few = answer(model, images)
    tokred.apply(model, "tome", tokred.Constant(4))
    assert torch.equal(answer(model, images), few) and not torch.equal(few, dense)
    with pytest.raises(tokred.UnsupportedModelError, match=r"Linear.*torchvision has the same"):
        tome.patch.swag(nn.Linear(2, 2))


def test_r_counts_from_the_next_pass_on(plain: nn.Module, images: Tensor) -> None:
    was, dense = traces(plain), answer(plain, images)
    tome.patch.timm(plain)
    assert plain.r == 0 and torch.equal(answer(plain, images), dense)
    answers = {}
    for r in (4, 1, 4, 0):
        plain.r = r
        assert plain._tome_info["r"] == [r] * 4
        found = answer(plain, images)
        assert torch.equal(answers.setdefault(r, found), found)
        assert len(tokred.inspect(plain, images).stages) == (4 if r else 0)
    assert torch.equal(answers[0], dense) and not torch.equal(answers[4], answers[1])
    tome.patch.timm(plain)
    assert plain.r == 0, "patched again, nothing is merged until r is set"
    plain.r = 4
    tokred.remove(plain)
    assert traces(plain) == was and torch.equal(answer(plain, images), dense)


def test_whatever_takes_a_reduction_away_for_a_while_puts_r_back(
    plain: nn.Module, images: Tensor
) -> None:
    tome.patch.timm(plain)
    plain.r = 4
    few = answer(plain, images)
    with tokred.applied(plain, "atc", 0.5):
        assert not hasattr(plain, "r") and not hasattr(plain, "_tome_info")
    assert tokred.flops(plain, images).ratio > 1
    tokred.bench(plain, images, rounds=1, warmup=0)
    assert plain.r == 4 and torch.equal(answer(plain, images), few)
    tokred.apply(plain, "atc", 0.5)
    assert not hasattr(plain, "r"), "set, it would do nothing"


def test_what_a_model_had_by_these_names_comes_back(plain: nn.Module, images: Tensor) -> None:
    plain.r, plain._tome_info = 7, "its own"
    was, dense = traces(plain), answer(plain, images)
    for _ in range(2):
        tome.patch.timm(plain)
        assert plain.r == 0
    plain.r = 4
    few = answer(plain, images)
    with tokred.applied(plain, "atc", 0.5):
        assert plain.r == 7
    assert plain.r == 4 and torch.equal(answer(plain, images), few)
    twin = copy.deepcopy(plain)
    for one in (plain, twin):
        tokred.remove(one)
        assert one.r == 7 and one._tome_info == "its own" and traces(one) == was
        assert torch.equal(answer(one, images), dense) and not torch.equal(few, dense)


def test_copies_have_an_r_of_their_own(plain: nn.Module, images: Tensor) -> None:
    dense = answer(plain, images)
    tome.patch.timm(plain, trace_source=True)
    plain.r = 4
    few = answer(plain, images)
    assert plain.state_dict().keys() == small("vit").state_dict().keys()
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    for twin in (copy.deepcopy(plain), torch.load(file, weights_only=False)):
        assert torch.equal(answer(twin, images), few)
        assert twin._tome_info["source"].shape == (2, 3, 17)
        twin.r = 0
        assert torch.equal(answer(twin, images), dense)
        assert torch.equal(answer(plain, images), few)
        assert plain._tome_info["size"].shape == (2, 3, 1)
        tokred.remove(twin)
        assert not hasattr(twin, "r") and hasattr(plain, "r")


def test_compiled_code_follows_r(images: Tensor) -> None:
    torch._dynamo.reset()
    plain = timm.models.VisionTransformer(64, embed_dim=48, depth=2, num_heads=3).eval()
    tome.patch.timm(plain)
    # torch 2.6 leaves the graph to read what was written as a decimal.
    whole = os.environ.get("TOKRED_VERSIONS") != "oldest"
    compiled = torch.compile(plain, backend="eager", fullgraph=whole)
    for r in (2, (3, -1.0), 2):
        compiled.r = r
        assert plain.r == r
        torch.testing.assert_close(answer(compiled, images), answer(plain, images))
    answer(compiled, images)
    with pytest.raises(RuntimeError, match=r"keeps no record .* run the model itself"):
        plain._tome_info["size"]


@pytest.mark.parametrize("name", ["distilled", "no class token"])
def test_what_tokens_are_made_of_describes_those_that_come_out(name: str) -> None:
    model = small(name)
    images, others = images_for(model), {"distilled": 2, "no class token": 0}[name]
    tome.patch.timm(model, trace_source=True)
    told = model._tome_info
    assert told["source"] is None and told["size"] is None
    model.r = 3
    with torch.no_grad():
        features = model.forward_features(images)
    source, size = told["source"], told["size"]
    assert source.shape == (2, features.shape[1], 16 + others) and size.shape == (
        *source.shape[:2],
        1,
    )
    assert set(source.unique().tolist()) == {0, 1}
    assert (source.sum(1) == 1).all(), "every token of the full grid is in one"
    first = source.argmax(2)
    assert (first.diff() > 0).all(), "tokens stand where their first members stood"
    assert torch.equal(size, source.sum(2, keepdim=True))
    assert torch.equal(source[:, :others, :others], torch.eye(others).expand(2, -1, -1))
    labels = tokred.inspect(model, images).stages[-1].labels.flatten(1)
    assert torch.equal(source[:, others:, others:].argmax(1), labels)
    full = copy.deepcopy(model)
    tokred.apply(full, "tome", tokred.Constant(3))
    with torch.no_grad():
        copied = source.transpose(1, 2) @ features
        torch.testing.assert_close(copied, full.forward_features(images))
    assert told["class_token"] == (others > 0) and told["distill_token"] == (others == 2)
    assert told["trace_source"] and told["prop_attn"] and set(dict(told)) == set(told)
    assert repr(told) == f"TomeInfo(trace_source=True, distill_token={others == 2})"
    model.r = 0
    answer(model, images)
    assert told["source"] is None


def test_sources_are_asked_for(plain: nn.Module, images: Tensor) -> None:
    tome.patch.timm(plain)
    plain.r = 4
    answer(plain, images)
    assert plain._tome_info["source"] is None and plain._tome_info["size"].sum() == 2 * 17


def test_layers_that_are_handed_out_are_on_the_full_grid(plain: nn.Module, images: Tensor) -> None:
    tome.patch.timm(plain)
    plain.r = 4
    with torch.no_grad():
        last, between = plain.forward_intermediates(images, indices=[1, 2])
    assert last.shape[1] == 3 and [one.shape for one in between] == [(2, 192, 4, 4)] * 2


def test_every_thread_is_told_of_its_own_pass(plain: nn.Module) -> None:
    tome.patch.timm(plain, trace_source=True)
    plain.r = 4
    answer(plain, torch.randn(1, 3, 64, 64))
    told: list[Any] = []

    def run() -> None:
        told.append(plain._tome_info["source"])
        answer(plain, torch.randn(2, 3, 64, 64))
        told.append(plain._tome_info["source"].shape)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert told == [None, (2, 3, 17)] and plain._tome_info["source"].shape == (1, 3, 17)


def test_r_is_where_the_patch_was_put(plain: nn.Module, images: Tensor) -> None:
    dense = answer(plain, images)
    wrapped = nn.DataParallel(plain)
    tome.patch.timm(wrapped)
    wrapped.r = 4
    assert not torch.equal(answer(wrapped, images), dense) and not hasattr(plain, "r")
    tokred.remove(wrapped)
    assert torch.equal(answer(wrapped, images), dense) and not hasattr(wrapped, "r")


def test_a_pass_that_is_broken_off_is_not_told(plain: nn.Module, images: Tensor) -> None:
    tome.patch.timm(plain, trace_source=True)
    plain.r = 4
    answer(plain, images)
    with torch.no_grad():
        plain.forward_intermediates(images, indices=[1], stop_early=True)
    assert plain._tome_info["source"] is None


def test_recomputed_blocks_are_not_told_for_a_pass() -> None:
    """A backward pass under gradient checkpointing runs the first block once more, alone."""
    model = small("vit")
    images = images_for(model)
    tome.patch.timm(model, trace_source=True)
    model.r = 4
    model.set_grad_checkpointing()
    model.train()
    out = model(images)
    assert model._tome_info["source"].shape == (2, 3, 17)
    out.sum().backward()
    assert model._tome_info["source"] is None


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a share": (0.9, TypeError, r"r must be whole numbers .* keep_rate="),
    "below nothing": (-1, ValueError, "r must be at least 0 tokens, not -1"),
    "more than layers": ([1] * 5, ValueError, "r has 5 numbers, but the model has 4 layers"),
    "inflected too much": ((8, 2.0), ValueError, r"inflection must be in \[-1, 1\], not 2.0"),
    "a word": ("8", TypeError, "r must be whole numbers"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_an_r_that_means_nothing_is_an_error(plain: nn.Module, images: Tensor, reason: str) -> None:
    r, error, words = REFUSED[reason]
    tome.patch.timm(plain)
    plain.r = r
    with pytest.raises(error, match=words):
        answer(plain, images)


def test_misuse_of_patches_is_an_error(plain: nn.Module) -> None:
    was = traces(plain)
    with pytest.raises(TypeError, match="trace_source must be True or False, not 'tome'"):
        tome.patch.timm(plain, "tome")  # type: ignore[arg-type]
    with pytest.raises(tokred.UnsupportedModelError):
        tome.patch.timm(nn.Linear(2, 2))
    plain.add_module("r", nn.Identity())
    with pytest.raises(ValueError, match=r"has an r of its own: use tokred\.apply"):
        tome.patch.timm(plain)
    del plain.r
    assert traces(plain) == was
    tome.patch.timm(plain)
    with pytest.raises(TypeError, match=r"_tome_info\['r'\] cannot be set: set model.r"):
        plain._tome_info["r"] = [1]
    with pytest.raises(KeyError, match="_tome_info has r, size"):
        plain._tome_info["hooks"]


def test_parse_r() -> None:
    assert tome.parse_r(4, 8) == [8] * 4
    assert tome.parse_r(4, torch.tensor(8)) == [8] * 4
    assert tome.parse_r(4, (8, 0.0)) == [8] * 4
    assert tome.utils.parse_r(12, (16, -1.0)) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert tome.parse_r(3, (8, 1.0)) == [0, 8, 16]
    assert tome.parse_r(4, [8, 4]) == [8, 4, 0, 0]


def test_registers_are_left_alone() -> None:
    """The published code leaves the first token alone."""
    model = small("dinov2, registers")
    tome.patch.timm(model, trace_source=True)
    model.r = 100
    answer(model, images_for(model))
    assert model._tome_info["size"][:, :5].eq(1).all()


def test_layer_scale_is_kept() -> None:
    """The published code drops it: with copies of one patch, merging changes nothing."""
    model = small("deit3, LayerScale")
    make_visible(model)
    nn.init.zeros_(model.pos_embed)
    images = torch.randn(1, 3, 1, 1).expand(1, 3, 64, 64).contiguous()
    dense = answer(model, images)
    tome.patch.timm(model)
    model.r = 4
    torch.testing.assert_close(answer(model, images), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_matching_by_hand_is_that_of_the_model(prefix: int) -> None:
    """One layer of what people's own blocks do with it, against the method."""
    x = torch.randn(2, 12 + prefix, 6)
    merge, unmerge = tome.merge.bipartite_soft_matching(
        x, 4, class_token=prefix > 0, distill_token=prefix > 1
    )
    few, size = tome.merge.merge_wavg(merge, x)
    source = tome.merge.merge_source(merge, x)
    tokens = tokred.reducers.Tokens(
        x=x[:, prefix:], size=torch.ones(2, 12), key=x[:, None, prefix:], before=prefix
    )
    clusters = tokred.ToMe()(tokens, 8)
    expected = torch.cat([x[:, :prefix], clusters.down(tokens.x, tokens.size)], 1)
    torch.testing.assert_close(few, expected)
    assert torch.equal(size[..., 0], source.sum(2)) and size.sum() == 2 * (12 + prefix)
    torch.testing.assert_close(source @ x / size, few)
    assert torch.equal(unmerge(few), (source.transpose(1, 2) @ few).to(few))
    before = 1.0 + torch.arange(12 + prefix).expand(2, -1)[..., None]
    again, sizes = tome.merge.merge_wavg(merge, x, before)
    assert torch.equal(sizes, source @ before)
    torch.testing.assert_close(again, source @ (x * before) / sizes)
    twice, _ = tome.merge.bipartite_soft_matching(few, 100, prefix > 0, prefix > 1)
    assert tome.merge.merge_source(twice, few, source).sum(2).sum() == 2 * (12 + prefix)
    assert twice(few).shape[1] == 4 + prefix, "half of them at most"


def most_similar(metric: np.ndarray, stay: list[int]) -> list[int]:
    """The one of those that stay which each token goes into, one token at a time."""
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    into = []
    for token in range(len(unit)):
        by = [float(unit[token] @ unit[other]) for other in stay]
        into.append(stay.index(token) if token in stay else by.index(max(by)))
    return into


def members(merge: Any, num: int) -> list[list[int]]:
    """The token that each one goes into, for two images, told by merging."""
    source = tome.merge.merge_source(merge, torch.zeros(2, num, 1))
    assert (source.sum(1) == 1).all()
    return source.argmax(1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 11])
def test_every_kth_token_takes_the_others(k: int) -> None:
    x = torch.randn(2, 11, 6)
    x[:, 9] = x[:, 5]  # equals, of which both stay at k = 2
    merge, unmerge = tome.merge.kth_bipartite_soft_matching(x, k)
    stay = list(range(k - 1, 11, k))
    assert members(merge, 11) == [most_similar(one, stay) for one in x.numpy()]
    few, size = tome.merge.merge_wavg(merge, x)
    assert few.shape == (2, 11 // k, 6) and size.sum() == 2 * 11
    for b in range(2):
        assert torch.equal(unmerge(few)[b], few[b, members(merge, 11)[b]])


def test_tokens_drawn_at_random_go_into_the_others() -> None:
    x = torch.randn(2, 11, 6)
    torch.manual_seed(1)
    merge, _ = tome.merge.random_bipartite_soft_matching(x, 4)
    assert merge(x).shape == (2, 7, 6)
    torch.manual_seed(1)
    gone = torch.rand(2, 11).argsort(1)[:, :4].tolist()
    assert set(gone[0]) != set(gone[1])
    stay = [[token for token in range(11) if token not in some] for some in gone]
    expected = [most_similar(one, left) for one, left in zip(x.numpy(), stay, strict=True)]
    assert members(merge, 11) == expected
    merge, _ = tome.merge.random_bipartite_soft_matching(x, 0)
    assert torch.equal(merge(x), x)


def test_matching_on_a_grid_by_hand_is_that_of_the_denoiser() -> None:
    x, w, h = torch.randn(2, 24, 6), 6, 4
    assert tomesd.merge is tome.merge
    matching = tomesd.merge.bipartite_soft_matching_random2d
    tokens = tokred.reducers.Tokens(x=x, size=torch.ones(2, 24), grid=(h, w))
    for most in (7, 20, 100):
        keep = 24 - min(most, 20)
        merge, unmerge = matching(x, w, h, 3, 2, most, no_rand=True)
        clusters = tokred.ToMe2d(cell=(2, 3))(tokens, keep)
        assert members(merge, 24) == clusters.labels().tolist()
        torch.testing.assert_close(merge(x), clusters.down(x, tokens.size))
        assert torch.equal(unmerge(merge(x)), clusters.up(merge(x), x))
        generator = torch.Generator().manual_seed(1)
        drawn = tokred.ToMe2d((2, 3), torch.Generator().manual_seed(1))(tokens, keep).labels()
        merge, _ = matching(x, w, h, 3, 2, most, generator=generator)
        assert members(merge, 24) == drawn.tolist() != clusters.labels().tolist()
        torch.manual_seed(1)
        merge, _ = matching(x, w, h, 3, 2, most)
        assert members(merge, 24) == drawn.tolist()
    merge, _ = matching(x, w, h, 3, 2, 0)
    assert torch.equal(merge(x), x)
    with pytest.raises(ValueError, match="grid must have as many cells as there are tokens, 24"):
        matching(x, 5, 4, 2, 2, 4)


def test_matchings_that_leave_nothing_are_errors() -> None:
    x = torch.randn(1, 5, 2)
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 5\] for 5 tokens, not {k}"):
            tome.merge.kth_bipartite_soft_matching(x, k)
    with pytest.raises(ValueError, match="r must leave one of 5 tokens at least, not be 5"):
        tome.merge.random_bipartite_soft_matching(x, 5)


def test_merging_by_hand_takes_modes_and_refuses_others() -> None:
    x = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [5, 5]]])
    merge, _ = tome.merge.bipartite_soft_matching(x, 1)
    assert merge(x, mode="sum").sum() == x.sum()
    assert merge(x, mode="amax").shape == merge(x).shape == (1, 3, 2)
    nothing, back = tome.merge.bipartite_soft_matching(x, 0)
    assert torch.equal(nothing(x), x) and torch.equal(back(x), x)
    with pytest.raises(ValueError, match="mode must be one of"):
        merge(x, mode="prod")
    with pytest.raises(ValueError, match="distill_token must come with class_token"):
        tome.merge.bipartite_soft_matching(x, 1, distill_token=True)


def test_speed_is_measured(plain: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    runs: list[int] = []
    plain.register_forward_pre_hook(lambda _, args: runs.append(args[0].shape[0]))
    plain.train()
    speed = tome.benchmark(plain, "cpu", (3, 64, 64), batch_size=2, runs=4, verbose=True)
    assert runs == [2] * 4 and not plain.training
    assert 1 < speed < 1e6 and capsys.readouterr().out == f"Throughput: {speed:.2f} im/s\n"
    half = tome.utils.benchmark(
        plain, "cpu", (3, 64, 64), batch_size=1, runs=1, throw_out=0, use_fp16=True
    )
    assert half > 1
    with pytest.raises(ValueError, match="throw_out must leave some of 4 runs"):
        tome.benchmark(plain, "cpu", runs=4, throw_out=1.0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 0 is a GPU, and there is none"):
            tome.benchmark(plain)


def test_a_picture_shows_which_patches_went_together(plain: nn.Module) -> None:
    tome.patch.timm(plain, trace_source=True)
    plain.r = 4
    answer(plain, torch.randn(2, 3, 64, 64))
    source = plain._tome_info["source"]
    grey = Image.new("RGB", (70, 64), (128, 128, 128))
    drawn = tome.make_visualization(grey, source[:1], patch_size=16, class_token=True)
    assert drawn.size == (64, 64) and drawn.mode == "RGB"
    # Of a grey picture, a patch has the colour of its token: grey, or that of a merged one.
    labels = source[0, 1:, 1:].argmax(0)
    members = source[0, 1:, 1:].sum(1)
    colours = [drawn.getpixel((16 * (n % 4) + 8, 16 * (n // 4) + 8)) for n in range(16)]
    for n in range(16):
        alone = members[labels[n]] == 1
        assert (colours[n] == (128, 128, 128)) == bool(alone)
        assert all((colours[n] == colours[m]) == bool(labels[n] == labels[m])
                   for m in range(16) if not alone)  # fmt: skip
    with pytest.raises(ValueError, match=r"source must be that of one picture.*not \(2, 3, 17\)"):
        tome.make_visualization(grey, source)
    with pytest.raises(ValueError, match=r"not None: patch with trace_source=True, set model.r"):
        tome.make_visualization(grey, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"source is of 17 tokens; .* and no class token"):
        tome.make_visualization(grey, source[:1], class_token=False)


# tomesd


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "around"),
    [
        ({}, tokred.Around(0.5, levels=(0,))),
        ({"ratio": 0.3}, tokred.Around(0.7, levels=(0,))),
        ({"max_downsample": 2, "merge_mlp": True},
         tokred.Around(0.5, ("attention", "mlp"), levels=(0, 1))),
        ({"max_downsample": 8, "merge_attn": False, "merge_crossattn": True},
         tokred.Around(0.5, ("cross_attention",), levels=(0, 1, 2))),
        ({"ratio": 0.8, "sx": 4}, tokred.Around(0.2, levels=(0,))),
        ({"ratio": 0.9, "sx": 4, "sy": 3}, tokred.Around(0.1, levels=(0,))),
    ],
)  # fmt: skip
def test_a_denoiser_gives_what_ours_gives(options: dict[str, Any], around: tokred.Around) -> None:
    model = unet(**SD)
    inputs = {rand: sd_inputs(2, (8, 16)) for rand in (False, True)}
    for rand in (False, True):
        tomesd.remove_patch(model)
        dense = model(**inputs[rand]).sample
        torch.manual_seed(3)
        assert tomesd.apply_patch(model, **options, use_rand=rand) is model
        state = torch.random.get_rng_state()
        found = model(**inputs[rand]).sample
        assert torch.equal(torch.random.get_rng_state(), state), "only a fork is drawn from"
        assert not torch.equal(found, dense)
        generator = torch.Generator().manual_seed(3) if rand else None
        method = tokred.ToMe2d((options.get("sy", 2), options.get("sx", 2)), generator)
        tokred.apply(model, method, around)
        assert torch.equal(model(**inputs[rand]).sample, found)


@torch.no_grad()
def test_nothing_is_drawn_for_an_odd_batch() -> None:
    model, inputs = unet(**SD), sd_inputs(3)
    tomesd.apply_patch(model)
    found = model(**inputs).sample
    assert torch.equal(model(**inputs).sample, found)
    tokred.apply(model, tokred.ToMe2d(), 0.5)
    assert torch.equal(model(**inputs).sample, found)


@torch.no_grad()
def test_a_pipeline_is_patched_and_cleaned() -> None:
    pipe = zoo.diffusion()
    pipe.set_progress_bar_config(disable=True)
    was = traces(pipe.unet)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(
            pipe("7", num_inference_steps=2, generator=generator, output_type="np").images
        )

    dense = draw()
    assert tomesd.remove_patch(pipe) is pipe, "there is nothing to remove"
    assert tomesd.apply_patch(pipe, ratio=0.5, use_rand=False) is pipe
    few = draw()
    tokred.apply(pipe, "tome", 0.5)
    assert torch.equal(draw(), few) and not torch.equal(few, dense)
    tomesd.apply_patch(pipe.unet, ratio=0.25, use_rand=False)  # in place of the other
    assert not torch.equal(draw(), few)
    assert tomesd.remove_patch(pipe) is pipe
    assert traces(pipe.unet) == was and torch.equal(draw(), dense)


@torch.no_grad()
def test_patched_denoisers_are_copied_and_saved() -> None:
    model, inputs = unet(**SD), sd_inputs(2)
    tomesd.apply_patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    few = model(**inputs).sample
    for twin in twins:
        assert torch.equal(twin(**inputs).sample, few), "the fork is copied as it stood"


def test_what_would_do_nothing_is_an_error() -> None:
    model, xl = unet(**SD), unet(**SDXL)
    was = traces(model)
    refused: list[tuple[nn.Module, dict[str, Any], str]] = [
        (model, {"ratio": 0.8}, r"ratio must be in \[0, 0.75\] for cells of 2 x 2"),
        (model, {"ratio": -0.1}, "ratio must be in"),
        (model, {"sx": 0}, "sx and sy must make cells of at least two tokens, not 0 x 2"),
        (model, {"sx": 1, "sy": 1, "ratio": 0}, "cells of at least two tokens, not 1 x 1"),
        (model, {"max_downsample": 3}, r"max_downsample must be one of \[1, 2, 4, 8\], not 3"),
        (model, {"merge_attn": False}, "one of merge_attn, merge_crossattn and merge_mlp"),
        (xl, {}, "max_downsample must be at least 2 for this model"),
    ]
    for which, options, words in refused:
        with pytest.raises(ValueError, match=words):
            tomesd.apply_patch(which, **options)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ratio": "0.5"}, "ratio must be a number, not '0.5'"),
        ({"ratio": True}, "ratio must be a number, not True"),
        ({"sx": 2.0}, "sx must be a whole number of tokens, not 2.0"),
        ({"sy": "2"}, "sy must be a whole number of tokens, not '2'"),
    ]
    for options, words in wrong:
        with pytest.raises(TypeError, match=words):
            tomesd.apply_patch(model, **options)
    with pytest.raises(tokred.UnsupportedModelError, match=r"Linear is not a denoiser"):
        tomesd.apply_patch(nn.Linear(2, 2))
    assert traces(model) == was
    tomesd.apply_patch(xl, max_downsample=4)
    with torch.no_grad():
        trace = tokred.inspect(xl, sdxl_inputs(2))
    assert {block.level for block in trace.blocks} == {1, 2}
    assert isinstance(tokred.patching.reduction_of(xl).reducer, InPairs)
    with pytest.warns(UserWarning, match="nothing is reduced"):
        tomesd.apply_patch(model, ratio=0)
