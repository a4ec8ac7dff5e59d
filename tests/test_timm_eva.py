"""What is special about timm's Eva: rotations by position, two kinds of attention, its pooling."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
import torch
from families.timm_eva import ROPE, SMALL, images, make
from timm.layers import GlobalResponseNormMlp
from torch import Tensor, nn

import tokred
from tokred import ATS, Exactly
from tokred.reducers import Tokens

ROTARY = [name for name in SMALL if name != "eva"]


def table(model: nn.Module, x: Tensor, layer: int) -> Tensor:
    """The rotations of a layer, [1 or heads, positions, dim]."""
    _, rope = model._pos_embed(model.patch_embed(x))
    return rope[layer] if getattr(model, "rope_mixed", False) else rope[None]


@torch.no_grad()
@pytest.mark.parametrize("method", ["topk", "tome"])
@pytest.mark.parametrize("name", ROTARY)
def test_every_token_is_rotated_by_its_own_position(name: str, method: str) -> None:
    """A block behind a reduction is the host's own block on fewer tokens with their rotations;
    merged ones have that of their first member, and count as often as they stand for."""
    model, x = SMALL[name].build(), images(2)
    reduction = tokred.apply(model, method, Exactly((16, 9, 9, 9)))
    seen: dict[str, Tensor] = {}
    block = model.blocks[2]
    block.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with reduction.recording() as records:
        model(x)
    labels = records[0].map.labels()
    position = torch.arange(16)
    mine, sizes = [], []
    for row in labels:
        groups = [position[row == group] for group in range(9)]
        mine.append(torch.stack([group[0] for group in groups]))
        sizes.append(torch.tensor([float(len(group)) for group in groups]))
    rope = torch.stack([table(model, x, 2)[:, at] for at in mine])
    bias = nn.functional.pad(torch.stack(sizes).log(), (model.num_prefix_tokens, 0))
    mask = bias[:, None, None] if method == "tome" else None
    expected = type(block).forward(block, seen["x"], rope=rope, attn_mask=mask)
    torch.testing.assert_close(seen["y"], expected)
    wrong = type(block).forward(block, seen["x"], rope=rope.flip(2), attn_mask=mask)
    assert not torch.allclose(seen["y"], wrong, atol=1e-3)


class Spy(ATS):
    """Keeps what it was shown."""

    def __call__(self, tokens: Tokens, keep: int) -> Any:
        SEEN.append(tokens)
        return super().__call__(tokens, keep)


SEEN: list[Tokens] = []


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"attn_type": "eva", "qkv_bias": True},
        {"attn_type": "eva", "qkv_bias": False, "rope_rotate_half": True},
        {"attn_type": "eva", "qkv_fused": False},
        {"attn_type": "rope", "qk_norm": True},
        {"attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False, "rope_rotate_half": True},
        {"attn_type": "rope", "rope_type": "mixed"},
    ],
    ids=str,
)
def test_methods_see_the_attention_that_the_model_pays(options: dict[str, Any]) -> None:
    """With a class token its attention; with none, that of all tokens, and the values."""
    SEEN.clear()
    for class_token in (True, False):
        model, x = make(**ROPE, class_token=class_token, **options), images(2)
        tokred.apply(model, Spy(), Exactly((16, 9, 9, 9)))
        attn, paid, mixed = model.blocks[1].attn, [], []
        attn.fused_attn = False
        attn.attn_drop.register_forward_hook(lambda *a, paid=paid: paid.append(a[-1]))
        attn.norm.register_forward_pre_hook(lambda _, args, mixed=mixed: mixed.append(args[0]))
        model(x)
        attention = SEEN[-1].class_attention
        if class_token:
            torch.testing.assert_close(attention, paid[0][:, :, 0, 1:])
            continue
        torch.testing.assert_close(attention, paid[0].mean(2))
        together = (paid[0] @ SEEN[-1].value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(together, mixed[0])


@torch.no_grad()
@pytest.mark.parametrize("method", ["topk", "tome", "ats"])
@pytest.mark.parametrize("pooling", ["avg", "avgmax", "max", "map", "token", ""])
def test_pooling_sees_no_dropped_token_and_merged_ones_as_often(method: str, pooling: str) -> None:
    model, x = make(use_rot_pos_emb=True, global_pool=pooling, class_token=True), images(3)
    tokred.apply(model, method, 0.5)
    answer, features = model(x), model.forward_features(x)
    if pooling == "":
        assert features.shape[1] == 17
        torch.testing.assert_close(answer, model.head(model.fc_norm(features)))
        return
    tokred.apply(model, method, 0.5, full_grid=False)
    torch.testing.assert_close(model(x), answer)
    few = model.forward_features(x)
    tokred.remove(model)
    if method == "tome":
        torch.testing.assert_close(answer, model.forward_head(features))
        return
    counts = (few != 0).any(-1).sum(1).tolist()
    left = [model.forward_head(row[None, :count]) for row, count in zip(few, counts, strict=True)]
    torch.testing.assert_close(answer, torch.cat(left))
    if pooling != "token":
        assert not torch.allclose(answer, model.forward_head(features), atol=1e-4)


@pytest.mark.parametrize("rope_type", ["cat", "mixed"])
def test_patches_may_be_dropped_in_training(rope_type: str) -> None:
    """timm's own patch dropout shuffles tokens, and gives each its rotation."""
    model, x = make(**ROPE, rope_type=rope_type, patch_drop_rate=0.25), images(2)
    model.train()
    torch.manual_seed(3)
    dense = model(x)
    with pytest.warns(UserWarning, match="keeps all"):
        tokred.apply(model, "tome", 1.0)
    torch.manual_seed(3)
    assert torch.equal(model(x), dense)
    tokred.apply(model, "tome", 0.5)
    counts: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    model(x).sum().backward()
    assert counts == [1 + count for count in tokred.Stages(0.5)(12, 4)]


@torch.no_grad()
def test_a_feature_extractor_hands_out_full_grids() -> None:
    options = {"img_size": 56, "depth": 4, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("eva02_tiny_patch14_224", features_only=True, **options).eval()
    x = torch.randn(2, 3, 56, 56)
    assert len(model(x)) == 3
    tokred.apply(model, "tome", 0.5)
    assert [tuple(one.shape) for one in model(x)] == [(2, 32, 4, 4)] * 3


@torch.no_grad()
def test_images_may_have_any_size_where_the_model_allows_it() -> None:
    model = SMALL["dinov3"].build()
    reduction = tokred.apply(model, "tome", 0.5)
    assert model.forward_features(torch.randn(2, 3, 96, 48)).shape[1] == 5 + 18
    with reduction.recording() as records:
        model(torch.randn(1, 3, 96, 48))
    assert [record.map.num_coarse for record in records] == [9, 4, 2]


def test_blocks_cannot_be_taken_away_under_a_reduction() -> None:
    model = SMALL["eva"].build()
    tokred.apply(model, "tome", 0.5)
    with pytest.raises(RuntimeError, match=r"tokred.remove\(model\) first"):
        model.prune_intermediate_layers([0, 1])
    tokred.remove(model)
    model.prune_intermediate_layers([0, 1])
    assert tokred.apply(model, "tome", 0.5).layout.layers == 2


def test_what_mixes_tokens_or_orders_them_is_refused() -> None:
    model = SMALL["eva"].build()
    tokred.apply(model, "tome", 0.5)
    if "is_causal" in inspect.signature(model.forward).parameters:
        with pytest.raises(ValueError, match="is_causal=True is not supported"):
            model(images(1), is_causal=True)
    model.blocks[1].mlp = GlobalResponseNormMlp(32)
    with pytest.raises(tokred.UnsupportedModelError, match="MLP of block 1 mixes tokens"):
        tokred.apply(model, "tome", 0.5)


def test_attention_of_another_kind_is_refused_where_it_must_be_known() -> None:
    class Other(type(SMALL["eva"].build().blocks[0].attn)):  # type: ignore[misc]
        def forward(self, x: Tensor, rope: Any = None, attn_mask: Any = None) -> Tensor:
            return super().forward(x, rope, attn_mask)

    model = SMALL["eva"].build()
    model.blocks[1].attn.__class__ = Other
    tokred.apply(model, "tome", 0.5)
    with pytest.raises(tokred.UnsupportedModelError, match=r"attention that .*Other pays"):
        tokred.apply(model, "topk", 0.5)
