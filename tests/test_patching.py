"""What patching promises, on every kind of host."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import re
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from conftest import HOSTS, Digits, images_for, small
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tokred
from tokred import reducers
from tokred.maps import Kept
from tokred.patching import reduction_of

every_method = pytest.mark.parametrize("method", reducers.names())
# Methods for dense prediction have a schedule of their own: see test_hourglass.py.
every_staged_method = pytest.mark.parametrize(
    "method", [name for name in reducers.names() if not hasattr(reducers.make(name), "schedule")]
)
# SViT has all tokens again behind every block, see test_svit.py.
every_lasting_method = pytest.mark.parametrize(
    "method",
    [
        name
        for name in reducers.names()
        if not hasattr(reducers.make(name), "schedule")
        and reducers.place(reducers.make(name)) != "around"
    ],
)


@torch.no_grad()
def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(images)
    return result


def traces(model: nn.Module) -> list[tuple[str, type, list[str], int]]:
    """Everything that a patch could leave behind on a module."""
    return [
        (name, type(m), sorted(vars(m)), len(m._forward_hooks) + len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


def keep_all(model: nn.Module, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tokred.apply(model, method, keep_rate=1.0)


@every_method
def test_keeping_everything_changes_no_bit(
    vit: nn.Module, images: torch.Tensor, method: str
) -> None:
    before = outputs(vit, images)
    features = vit.forward_features(images)
    keep_all(vit, method)
    assert torch.equal(outputs(vit, images), before)
    assert torch.equal(vit.forward_features(images), features)


@every_method
def test_keeping_less_changes_the_answer(vit: nn.Module, images: torch.Tensor, method: str) -> None:
    before = outputs(vit, images)
    tokred.apply(vit, method, keep_rate=0.5)
    after = outputs(vit, images)
    assert after.shape == before.shape and after.isfinite().all()
    assert not torch.allclose(after, before, rtol=1e-5, atol=1e-6)


def gains(model: nn.Module, *args: Any, **options: Any) -> list[str]:
    """What `apply` says of what can be gained."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", tokred.NoGainWarning)
        tokred.apply(model, *args, **options)
    assert all(Path(one.filename) == Path(__file__) for one in said)
    return [str(one.message) for one in said if one.category is tokred.NoGainWarning]


def test_apply_says_where_nothing_can_be_gained() -> None:
    small, tiny, base = (
        timm.create_model(f"vit_{size}_patch16_224", img_size=pixels)
        for size, pixels in (("small", 224), ("tiny", 64), ("base", 64))
    )
    assert gains(small, "tome", 0.7) == gains(base, "tome", 0.7) == []
    (said,) = gains(tiny, "tome", 0.7)
    assert said.startswith("16 tokens of width 192 are so few that ToMe(threshold=None) takes")
    number = re.search(r"from about (\d+) tokens on", said)
    assert number is not None
    side = int(int(number[1]) ** 0.5)
    for more, fewer in ((0, False), (-1, True)):
        other = timm.create_model("vit_tiny_patch16_224", img_size=16 * (side + more))
        assert bool(gains(other, "tome", 0.7)) is fewer
    # One decision only; gates in nine layers; a schedule for this number of tokens alone.
    assert gains(tiny, "tome", tokred.Hourglass(0.5, down=4)) == []
    assert gains(tiny, "svit", 0.9) and gains(tiny, "tome", tokred.Exactly((15,) * 12))
    assert gains(tiny, "tome", tokred.Exactly((16,) * 6 + (1,) * 6)) == []
    assert gains(tiny, "tome", 1.0) == []  # which is said otherwise


def test_apply_says_at_which_level_of_a_denoiser_nothing_can_be_gained() -> None:
    diffusers = pytest.importorskip("diffusers")
    build = {
        "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (64, 128), "attention_head_dim": 8,
    }  # fmt: skip
    with torch.device("meta"):
        large, small = (
            diffusers.UNet2DConditionModel(sample_size=size, **build) for size in (24, 12)
        )
    assert gains(large, "tome", 0.5) == []
    (said,) = gains(small, "tome", 0.5)
    assert said.startswith("144 tokens of level 0 are so few that ToMe2d(")
    (said,) = gains(large, "tome", tokred.Around(0.5, levels=(0, 1)))
    assert said.startswith("144 tokens of level 1 are so few")
    assert gains(small, "todo", 0.5) == []  # it chooses nothing


def test_keeping_everything_warns(plain: nn.Module) -> None:
    with pytest.warns(UserWarning, match="keeps all 16 tokens: nothing is reduced"):
        tokred.apply(plain, keep_rate=1.0)


@every_method
def test_removing_leaves_no_trace(vit: nn.Module, images: torch.Tensor, method: str) -> None:
    before, was, keys = outputs(vit, images), traces(vit), list(vit.state_dict())
    tokred.apply(vit, method, keep_rate=0.5)
    outputs(vit, images)
    assert [type(m) for m in vit.modules()] == [entry[1] for entry in was]
    assert list(vit.state_dict()) == keys
    tokred.remove(vit)
    assert traces(vit) == was
    assert list(vit.state_dict()) == keys
    assert torch.equal(outputs(vit, images), before)
    tokred.remove(vit)  # and once more does nothing


def test_applying_again_replaces(vit: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(vit, "topk", keep_rate=0.9)
    tokred.apply(vit, "tome", keep_rate=0.5)
    twice, left = outputs(vit, images), traces(vit)
    tokred.remove(vit)
    tokred.apply(vit, "tome", keep_rate=0.5)
    assert traces(vit) == left
    assert torch.equal(outputs(vit, images), twice)


def test_applied_ends_with_its_block(plain: nn.Module, images: torch.Tensor) -> None:
    dense = outputs(plain, images)
    outer = tokred.apply(plain, "tome", keep_rate=0.5)
    with tokred.applied(plain, "topk", keep_rate=0.25) as reduction:
        assert reduction_of(plain) is reduction
    assert reduction_of(plain) is outer
    tokred.remove(plain)
    with pytest.raises(KeyError), tokred.applied(plain, "topk", keep_rate=0.25):
        raise KeyError
    assert torch.equal(outputs(plain, images), dense)


@every_lasting_method
@pytest.mark.parametrize("keep_rate", [0.25, 0.5, 0.7, 0.9])
def test_exactly_the_asked_number_stays(
    vit: nn.Module, images: torch.Tensor, method: str, keep_rate: float
) -> None:
    reduction = tokred.apply(vit, method, keep_rate)
    rows, columns = reduction.layout.grid
    seen = []
    for block in vit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    outputs(vit, images)
    counts = tokred.Stages(keep_rate)(rows * columns, 4)
    asked = [count + vit.num_prefix_tokens for count in counts]
    if reducers.varies(reduction.reducer):  # at most that, see test_ragged.py
        assert all(there <= most for there, most in zip(seen, asked, strict=True))
    else:
        assert seen == asked


@every_lasting_method
def test_prefix_tokens_are_never_touched(vit: nn.Module, images: torch.Tensor, method: str) -> None:
    """They enter the MLP as attention left them, in front, in their order; or the block as the one
    before has left them."""
    prefix = vit.num_prefix_tokens
    if reducers.place(reducers.make(method)) == "before":
        tokred.apply(vit, method, tokred.Exactly((vit.patch_embed.num_patches, 3, 3, 3)))
        seen = {}
        vit.blocks[0].register_forward_hook(lambda _, args, out: seen.update(x=out))
        vit.blocks[1].norm1.register_forward_pre_hook(lambda _, args: seen.update(reduced=args[0]))
        outputs(vit, images)
        assert seen["reduced"].shape[1] == prefix + 3
        assert torch.equal(seen["reduced"][:, :prefix], seen["x"][:, :prefix])
        return
    tokred.apply(vit, method, tokred.Exactly((3, 3, 3, 3)))
    block, captured = vit.blocks[0], {}
    block.register_forward_pre_hook(lambda _, args: captured.update(x=args[0]))
    block.attn.register_forward_hook(lambda _, args, out: captured.update(attention=out))
    block.norm2.register_forward_pre_hook(lambda _, args: captured.update(reduced=args[0]))
    outputs(vit, images)
    expected = captured["x"] + block.ls1(captured["attention"])
    assert captured["reduced"].shape[1] == prefix + 3
    assert torch.equal(captured["reduced"][:, :prefix], expected[:, :prefix])


def test_any_entry_point_starts_afresh(vit: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(vit, "tome", keep_rate=0.5)
    with torch.no_grad():
        first = vit.forward_features(images)
        outputs(vit, images[:1])
        vit.blocks[0](torch.randn(1, 1 + 3 + vit.num_prefix_tokens, vit.embed_dim))  # broken off
        assert torch.equal(vit.forward_features(images), first)
        vit.forward_intermediates(images, indices=[0, 1], stop_early=True)
        assert torch.equal(vit.forward_features(images), first)


def test_a_loop_of_the_users_own_works(vit: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(vit, "tome", keep_rate=0.5)
    with torch.no_grad():
        expected = vit.forward_features(images)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block in vit.blocks:
            x = block(x)
        assert torch.equal(vit.norm(x), expected)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block in vit.blocks:
            x = block(x).clone()  # the state cannot ride on this tensor
        assert torch.equal(vit.norm(x), expected)


def test_tokens_that_vanish_between_blocks_are_noticed(
    plain: nn.Module, images: torch.Tensor
) -> None:
    tokred.apply(plain, "tome", keep_rate=0.5)
    x = plain._pos_embed(plain.patch_embed(images))
    x = plain.blocks[1](plain.blocks[0](x))
    with pytest.raises(RuntimeError, match="got 8 tokens, but the one before it has put out 9"):
        plain.blocks[2](x[:, 1:])


def test_a_full_grid_may_enter_in_the_middle_and_nothing_else(plain: nn.Module) -> None:
    tokred.apply(plain, "tome", keep_rate=0.5)
    with torch.no_grad():
        assert plain.blocks[2](torch.randn(1, 17, 192)).shape == (1, 5, 192)
        plain.blocks[3](torch.randn(1, 5, 192))  # fits the state of the pass that was broken off
        with pytest.raises(RuntimeError, match="block 2 got 9 tokens of which nothing is known"):
            plain.blocks[2](torch.randn(1, 9, 192))


def test_reentrant_checkpointing_is_refused_rather_than_wrong(
    plain: nn.Module, images: torch.Tensor
) -> None:
    tokred.apply(plain, "topk", keep_rate=0.5)
    x = plain._pos_embed(plain.patch_embed(images))
    for block in plain.blocks:
        x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use use_reentrant=False"):
        x.sum().backward()


@pytest.mark.parametrize("method", ["tome", "pitome", "mutual", "atc", "random"])
@pytest.mark.parametrize("tapped", [False, True])
def test_reentrant_checkpointing_of_methods_that_merge(
    plain: nn.Module, images: torch.Tensor, method: str, tapped: bool
) -> None:
    """Also where a block hands out the full grid: that it can be reduced again is not to be seen
    of the grid alone."""
    tokred.apply(plain, method, keep_rate=0.5)
    if tapped:
        plain.blocks[2].forward.always_full = True

    def gradients(reentrant: bool) -> list[torch.Tensor]:
        plain.zero_grad()
        x = plain._pos_embed(plain.patch_embed(images))
        for block in plain.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        x.square().sum().backward()
        return [p.grad.clone() for p in plain.blocks.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-3, atol=1e-2)


def test_reentrant_checkpointing_on_a_part_of_the_patches(
    plain: nn.Module, images: torch.Tensor
) -> None:
    """As masked autoencoders are pretrained. Nothing is reduced."""

    def gradients() -> list[torch.Tensor]:
        plain.zero_grad()
        x = plain._pos_embed(plain.patch_embed(images))[:, :6]
        for block in plain.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
        x.square().sum().backward()
        return [p.grad.clone() for p in plain.blocks.parameters()]

    expected = gradients()
    keep_all(plain, "topk")
    for mine, theirs in zip(gradients(), expected, strict=True):
        assert torch.equal(mine, theirs)


@every_lasting_method
@pytest.mark.parametrize("norm", [False, True])
def test_intermediate_features_are_full_grids_in_order(
    vit: nn.Module, images: torch.Tensor, method: str, norm: bool
) -> None:
    def features() -> list[torch.Tensor]:
        with torch.no_grad():
            taken = vit.forward_intermediates(
                images, [0, 1, 2, 3], norm=norm, intermediates_only=True
            )
        assert isinstance(taken, list)
        return taken

    dense = features()
    tokred.apply(vit, method, tokred.Exactly((dense[0][0, 0].numel(), 6, 6, 3)))
    reduced = features()
    assert [f.shape for f in reduced] == [f.shape for f in dense]
    assert torch.equal(reduced[0], dense[0])  # before the first reduction
    trace = tokred.inspect(vit, images)
    for depth, labels in ((1, trace.stages[0].labels), (3, trace.stages[1].labels)):
        grid = reduced[depth].permute(0, 2, 3, 1)
        for b in range(len(images)):
            kept = labels[b] >= 0
            values = grid[b][kept]
            groups = labels[b][kept]
            for group in groups.unique():  # merged tokens are copies, and lie where they belong
                member = values[groups == group]
                assert torch.equal(member, member[:1].expand_as(member))
            assert len(values.unique(dim=0)) == trace.stages[(depth + 1) // 2 - 1].after


@every_method
def test_tapping_does_not_change_the_answer(
    vit: nn.Module, images: torch.Tensor, method: str
) -> None:
    """Expanded at a tapped block and compressed again, tokens are what they were."""
    tokred.apply(vit, method, keep_rate=0.5)
    with torch.no_grad():
        plain_features = vit.forward_features(images)
        tapped, _ = vit.forward_intermediates(images, [0, 1, 2, 3])
        torch.testing.assert_close(tapped, plain_features)
        taken = vit.get_intermediate_layers(images, n=2, reshape=True)
        assert [f.shape[-2:] for f in taken] == [vit.patch_embed.grid_size] * 2


def test_features_only_models_give_full_grids(images: torch.Tensor) -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=4, features_only=True, out_indices=(1, 3)
    ).eval()
    tokred.apply(model.model, "tome", keep_rate=0.5)
    assert [tuple(f.shape) for f in model(images)] == [(2, 192, 4, 4)] * 2


@pytest.mark.parametrize("method", [name for name in reducers.names() if name != "svit"])
def test_reduced_features_on_request(vit: nn.Module, images: torch.Tensor, method: str) -> None:
    torch.manual_seed(1)  # of random predictors
    tokred.apply(vit, method, keep_rate=0.5)
    expected, full = outputs(vit, images), vit.forward_features(images)
    torch.manual_seed(1)
    tokred.apply(vit, method, keep_rate=0.5, full_grid=False)
    features = vit.forward_features(images)
    assert features.shape[1] < full.shape[1]
    # Heads that pool see what slic makes again of tokens behind the norm, not in front of it.
    loose = {"rtol": 0.1, "atol": 0.01} if method == "slic" else {}
    torch.testing.assert_close(outputs(vit, images), expected, **loose)


@every_method
def test_nothing_of_a_pass_is_kept(plain: nn.Module, images: torch.Tensor, method: str) -> None:
    """Neither on the features, which can be saved as any others, nor on the reduction."""
    reduction = tokred.apply(plain, method, keep_rate=0.5)
    with torch.no_grad():
        features = plain.forward_features(images)
    file = io.BytesIO()
    torch.save(features, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), features)
    assert not vars(features)
    del features
    gc.collect()
    assert reduction.memory.empty


@pytest.mark.parametrize("name", ["vit", "no class token", "distilled", "QK-norm"])
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_the_way_up_again_is_a_schedule(name: str, method: str) -> None:
    """A schedule that rises: later layers run on the full grid, without a bias."""
    model = small(name)
    images = images_for(model)
    tokred.apply(model, method, tokred.Exactly((16, 6, 6, 16)))
    lengths, masks = [], []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        block.attn.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attn_mask"] is not None), with_kwargs=True
        )
    outputs(model, images)
    outputs(model, images)
    prefix = model.num_prefix_tokens
    assert lengths == [16 + prefix, 6 + prefix, 6 + prefix, 16 + prefix] * 2
    assert masks == ([False, False, True, False] if method == "tome" else [False] * 4) * 2


def test_a_rise_goes_back_to_the_stage_it_names(plain: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(plain, "tome", tokred.Exactly((10, 4, 10, 16)))
    lengths = []
    for block in plain.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    outputs(plain, images)
    assert lengths == [11, 5, 11, 17]


@pytest.mark.parametrize("name", HOSTS)
def test_merging_equal_tokens_is_exact(name: str) -> None:
    """Every patch appears several times and positions are blank, so that merging loses nothing:
    with proportional attention and weighted pooling the dense model's answer must come out."""
    model = small(name)
    if model.pos_embed is not None:
        nn.init.zeros_(model.pos_embed)
    images = images_for(model)
    size, patch = images.shape[-2:], model.patch_embed.patch_size[0]
    if name == "hybrid":
        pytest.skip("its convolutions see the border, so that equal patches differ")
    first = images[..., :patch, :patch].repeat(1, 1, size[0] // patch, size[1] // patch)
    second = images[..., -patch:, -patch:].repeat(1, 1, size[0] // patch, size[1] // patch)
    images = torch.where(torch.arange(size[1]) < size[1] // patch // 3 * patch, first, second)
    dense = outputs(model, images)
    tokred.apply(model, tokred.ATC(), tokred.Exactly((9, 5, 5, 2)))
    torch.testing.assert_close(outputs(model, images), dense, rtol=1e-4, atol=1e-5)
    if "distilled" in name or name in ("vit", "deit", "augreg", "QK-norm"):
        tokred.apply(
            model, tokred.ATC(), tokred.Exactly((9, 5, 5, 2)), proportional_attention=False
        )
        assert (outputs(model, images) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["tome", "topk", "evit", "ats"])
@pytest.mark.parametrize("counts", [(16, 9, 9, 2), (12, 8, 6, 5), (3, 3, 2, 1)])
def test_a_vit_equals_the_slow_loop(
    plain: nn.Module, images: torch.Tensor, method: str, counts: tuple[int, ...]
) -> None:
    from references import vit_logits

    expected = [vit_logits(copy.deepcopy(plain), image, list(counts), method) for image in images]
    plain = plain.double()
    tokred.apply(plain, method, tokred.Exactly(counts))
    ours = outputs(plain, images.double())
    torch.testing.assert_close(ours, torch.tensor(np.array(expected)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "distilled", "no class token", "QK-norm",
                                  "registers, average pooling"])  # fmt: skip
def test_topk_reads_the_attention_that_the_model_pays(name: str) -> None:
    model = small(name)
    images = images_for(model)
    scores, maps = [], []

    class Spy(tokred.TopK):
        def __call__(self, tokens: reducers.Tokens, keep: int):  # type: ignore[no-untyped-def]
            scores.append(tokens.class_attention)
            return super().__call__(tokens, keep)

    tokred.apply(model, Spy(), tokred.Exactly((16, 10, 10, 5)))
    for block in model.blocks:
        block.attn.fused_attn = False  # so that the map exists, and passes through this module
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: maps.append(out))
    outputs(model, images)
    prefix = model.num_prefix_tokens
    for score, full in zip(scores, (maps[1], maps[3]), strict=True):
        rows = full[:, :, :1] if model.has_class_token else full
        torch.testing.assert_close(score, rows.mean(2)[:, :, prefix:])


@pytest.mark.parametrize("name", ["mae, average pooling", "siglip, attention pooling",
                                  "registers, average pooling"])  # fmt: skip
def test_dropped_tokens_are_not_pooled(name: str) -> None:
    model = small(name)
    images = images_for(model)
    tokred.apply(model, "topk", tokred.Exactly((16, 6, 6, 3)), full_grid=False)
    features = model.forward_features(images)
    assert features.shape[1] == 3 + model.num_prefix_tokens
    tokred.remove(model)
    expected = model.forward_head(features.detach().clone())
    tokred.apply(model, "topk", tokred.Exactly((16, 6, 6, 3)))
    torch.testing.assert_close(outputs(model, images), expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_method
def test_half_precision_runs(
    vit: nn.Module, images: torch.Tensor, method: str, dtype: torch.dtype
) -> None:
    vit, images = vit.to(dtype), images.to(dtype)
    tokred.apply(vit, method, keep_rate=0.5)
    result = outputs(vit, images)
    assert result.dtype == dtype and result.isfinite().all()


@every_method
def test_a_batch_may_be_empty(vit: nn.Module, images: torch.Tensor, method: str) -> None:
    expected = outputs(vit, images[:0])
    tokred.apply(vit, method, 0.5)
    assert outputs(vit, images[:0]).shape == expected.shape


@every_method
def test_autocast_runs(vit: nn.Module, images: torch.Tensor, method: str) -> None:
    tokred.apply(vit, method, keep_rate=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = outputs(vit, images)
    assert result.isfinite().all()
    if method == "random":  # the others may decide otherwise about nearly equal tokens
        torch.testing.assert_close(result.float(), outputs(vit, images), rtol=0.1, atol=0.1)


@every_method
def test_a_copy_stands_on_its_own(plain: nn.Module, images: torch.Tensor, method: str) -> None:
    tokred.apply(plain, method, keep_rate=0.5)
    plain(images).sum().backward()
    before, twin = outputs(plain, images), copy.deepcopy(plain)
    for parameter in plain.parameters():
        parameter.data.zero_()
    assert torch.equal(outputs(twin, images), before)
    tokred.remove(twin)
    assert not any(m._forward_hooks or "forward" in vars(m) for m in twin.modules())
    assert reduction_of(plain) is not None


def test_a_saved_model_comes_back(plain: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(plain, "tome", keep_rate=0.5)
    before, file = outputs(plain, images), io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert torch.equal(outputs(back, images), before)
    tokred.remove(back)
    assert reduction_of(back) is None


def test_a_saved_model_comes_back_elsewhere(plain: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64)
    tokred.apply(plain, "atc", keep_rate=0.5)
    torch.save((plain, images, outputs(plain, images)), tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model, images, before = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): assert torch.allclose(model(images), before, atol=1e-6)\n"
        "import tokred; tokred.remove(model)\n"
        "with torch.no_grad(): assert not torch.allclose(model(images), before, atol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], check=True)


def test_threads_do_not_disturb_each_other() -> None:
    model = small("registers, average pooling")
    tokred.apply(model, "tome", keep_rate=0.5)
    batches = [images_for(model, batch) for batch in (1, 2, 3, 4)]
    expected = [outputs(model, images) for images in batches]
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            for _ in range(15):
                torch.testing.assert_close(outputs(model, batches[number]), expected[number])
        except Exception as error:
            wrong.append(f"thread {number}: {error!r}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong


def gradients(model: nn.Module, *batches: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    sum(model(images).square().sum() for images in batches).backward()  # type: ignore[union-attr]
    return [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


@every_method
def test_gradient_checkpointing_gives_the_same_gradients(
    plain: nn.Module, images: torch.Tensor, method: str
) -> None:
    tokred.apply(plain, method, keep_rate=0.5)
    other = torch.randn(3, 3, 64, 64)
    expected = gradients(plain, images, other)  # two forward passes before one backward
    plain.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(plain, images, other), expected)


STATIC = [name for name in reducers.names() if not reducers.varies(reducers.make(name))]


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, "vit") for method in STATIC]
    + [("tome", "siglip, attention pooling"), ("topk", "siglip, attention pooling")]
    + [("atc", "dinov2, registers"), ("evit", "dinov2, registers")],
)
def test_compiles_in_one_graph_without_recompiling(method: str, name: str) -> None:
    torch._dynamo.reset()
    model = small(name)
    tokred.apply(model, method, keep_rate=0.5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        images = images_for(model)
        torch.testing.assert_close(outputs(compiled, images), outputs(model, images))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["vit", "dinov2, registers", "QK-norm"])
def test_the_fastest_attention_is_the_same_attention(name: str) -> None:
    model = small(name).bfloat16()
    size = 8 * model.patch_embed.patch_size[0]  # long enough to make a difference
    model.set_input_size((size, size))
    images = torch.randn(2, 3, size, size).bfloat16()
    before = traces(model)
    tokred.apply(model, "tome", keep_rate=0.8)
    fused = outputs(model, images)
    tokred.apply(model, "tome", keep_rate=0.8, attention="fastest")
    calls = []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda *_: calls.append(1))  # explicit only
    explicit = outputs(model, images)
    assert calls
    torch.testing.assert_close(explicit, fused, rtol=0.05, atol=0.05)
    for block in model.blocks:
        block.attn.attn_drop._forward_hooks.clear()
    twin = copy.deepcopy(model)
    assert twin.blocks[0].forward.explicit.qkv is twin.blocks[0].attn.qkv
    assert torch.equal(outputs(twin, images), explicit)
    tokred.remove(model)
    assert traces(model) == before


def test_what_varies_by_image_computes_the_same_in_a_compiled_model(digits: Digits) -> None:
    torch._dynamo.reset()
    model, images, _ = digits()
    tokred.apply(model, "ats", keep_rate=0.25)
    compiled = torch.compile(model, backend="aot_eager")
    for some in (images[:3], images[3:6]):
        torch.testing.assert_close(outputs(compiled, some), outputs(model, some))


def test_compiles_with_the_default_backend(plain: nn.Module, images: torch.Tensor) -> None:
    torch._dynamo.reset()
    tokred.apply(plain, "tome", keep_rate=0.5)
    compiled = torch.compile(plain, fullgraph=True)
    torch.testing.assert_close(outputs(compiled, images), outputs(plain, images))


def test_applies_inside_a_compiled_model(plain: nn.Module, images: torch.Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="aot_eager")
    dense = outputs(compiled, images)
    tokred.apply(compiled, "tome", keep_rate=0.5)
    torch.testing.assert_close(outputs(compiled, images), outputs(plain, images))
    assert not torch.allclose(outputs(compiled, images), dense)
    tokred.remove(compiled)
    torch.testing.assert_close(outputs(compiled, images), dense)


def test_forward_still_has_the_hosts_signature(plain: nn.Module) -> None:
    before = inspect.signature(plain.blocks[0].forward)
    tokred.apply(plain)
    assert inspect.signature(plain.blocks[0].forward) == before


def test_a_method_of_ones_own_needs_no_registration(plain: nn.Module, images: torch.Tensor) -> None:
    @dataclass(frozen=True)
    class EveryOther:
        bibtex: ClassVar[str] = ""
        needs: ClassVar[frozenset[str]] = frozenset()
        prunes: ClassVar[bool] = True

        def __call__(self, tokens: reducers.Tokens, keep: int) -> Kept:
            num = tokens.x.shape[1]
            index = torch.linspace(0, num - 1, keep).long()
            return Kept(index.expand(len(tokens.x), keep), num)

    tokred.apply(plain, EveryOther(), keep_rate=0.5)
    assert outputs(plain, images).shape == (2, 10)
    assert [stage.after for stage in tokred.inspect(plain, images).stages] == [8, 4, 2]


def test_a_method_that_drops_tokens_and_does_not_say_so_is_caught(
    plain: nn.Module, images: torch.Tensor
) -> None:
    @dataclass(frozen=True)
    class First:
        bibtex: ClassVar[str] = ""
        needs: ClassVar[frozenset[str]] = frozenset()

        def __call__(self, tokens: reducers.Tokens, keep: int) -> Kept:
            return Kept(torch.arange(keep).expand(len(tokens.x), -1), tokens.x.shape[1])

    tokred.apply(plain, First(), keep_rate=0.5)
    with pytest.raises(ValueError, match="add the line `prunes: ClassVar"):
        outputs(plain, images)


def test_a_method_that_returns_the_wrong_number_is_caught(
    plain: nn.Module, images: torch.Tensor
) -> None:
    class Wrong(tokred.ToMe):
        def __call__(self, tokens: reducers.Tokens, keep: int):  # type: ignore[no-untyped-def]
            return super().__call__(tokens, keep + 1)

    tokred.apply(plain, Wrong(), keep_rate=0.5)
    with pytest.raises(ValueError, match="returned 9 tokens of 16 at layer 1, but was asked for 8"):
        outputs(plain, images)
