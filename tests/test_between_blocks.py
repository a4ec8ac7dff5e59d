"""What happens to tokens, blocks and features behind our back: right, or an error; never silent."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import small
from families._swin import FEW, SWIN, stage_of
from families._swin import images as windowed_images
from test_hosts import SMALL, answered
from test_threads import unet
from torch import Tensor, nn

import tokred
from tokred.engine.following import images_of, same_images
from tokred.patching import reduction_of
from tokred.schedule import Hourglass

METHODS = (
    "tome",
    "atc",
    "pitome",
    "dpc_knn",
    "kmedoids",
    "topk",
    "evit",
    "divprune",
    "ats",
    "slic",
)
ORDERS = ([7, 6, 5, 4, 3, 2, 1, 0], [5], [1, 4, 6], [0, 1, 2, 3], [2, 2, 0])


def images(num: int = 8) -> Tensor:
    return torch.randn(num, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def looped(model: nn.Module, x: Tensor, at: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The model, one block after the other, with something in front of one of them."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for layer, block in enumerate(model.blocks):
        x = block(change(x) if layer == at else x)
    found: Tensor = model.forward_head(model.norm(x))
    return found


# Batches that change between two blocks


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_images_that_leave_or_change_places_take_their_state_along(
    method: str, order: list[int]
) -> None:
    model, x = small("vit").double(), images().double()
    tokred.apply(model, method, 0.5)
    found = looped(model, x, 3, lambda tokens: tokens[order])
    assert torch.allclose(found, model(x)[order], atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_tokens_that_are_changed_in_place_of_others_are_followed(method: str) -> None:
    """Steering vectors, adapters between blocks, casts there and back."""
    model, x = small("vit").double(), images().double()
    tokred.apply(model, method, 0.5)
    shift = torch.randn(192, dtype=torch.float64)
    seen = looped(model, x, 3, lambda tokens: tokens + 5 * shift)
    alone = [looped(model, image, 3, lambda tokens: tokens + 5 * shift) for image in x.split(1)]
    assert torch.allclose(seen, torch.cat(alone), atol=1e-9)


@torch.no_grad()
def test_images_that_cannot_be_followed_are_an_error() -> None:
    model, x = small("vit"), images()
    tokred.apply(model, "tome", 0.5)
    with pytest.raises(RuntimeError, match="8 images became 8, and which ones cannot be told"):
        looped(model, x, 3, lambda tokens: 1.5 * tokens.flip(0))
    with pytest.raises(RuntimeError, match="8 images became 3, and which ones cannot be told"):
        looped(model, x, 3, lambda tokens: tokens[:3] + 1)
    with pytest.raises(RuntimeError, match="8 images became 16"):
        looped(model, x, 3, lambda tokens: torch.cat([tokens, tokens + 1]))
    # Nothing is known of single images before the first reduction.
    model = small("vit")
    tokred.apply(model, "tome", tokred.Exactly((16, 16, 16, 8)))
    assert looped(model, x, 2, lambda tokens: 1.5 * tokens.flip(0)).isfinite().all()


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_images_are_found_by_their_tokens(order: list[int]) -> None:
    x = images().flatten(2).transpose(1, 2)[:, :50]
    found = same_images(x, x[order])
    assert found is not None and found.tolist() == order
    x = torch.cat([x[:1], x[:1], x])  # of repeated images, any will do, but each its own if it can
    found = same_images(x, x)
    assert found is not None and found.tolist() == list(range(10))
    x[4] = torch.nan
    found = same_images(x, x.clone())
    assert found is not None and found.tolist() == list(range(10))


def test_a_map_that_keeps_images_together_is_not_cut() -> None:
    with pytest.raises(TypeError, match="is not known"):
        tokens = torch.randn(2, 16, 8)
        model = small("vit")
        reduction = tokred.apply(model, "tome", 0.5)
        with torch.no_grad(), reduction.recording() as records:
            model(images(2))
        from tokred.engine.state import Reduced, State

        reduced = Reduced(records[0].map, 8, None, None, None, None, tokens, None)
        images_of(State(ahead=None, full=16, trail=reduced), torch.tensor([0]), 3)


@pytest.mark.parametrize("parts", ["whole", "by block"])
@torch.no_grad()
def test_compiled_code_follows_them_too(parts: str) -> None:
    torch._dynamo.reset()
    model, x, order = small("vit"), images(4), [3, 1, 0, 2]
    tokred.apply(model, "tome", 0.5)
    expected = model(x)[order]
    run: Any = looped
    if parts == "whole":
        run = torch.compile(looped, backend="eager")
    else:
        for block in model.blocks:
            block.compile(backend="eager")
    found = run(model, x, 3, lambda tokens: tokens[order])
    assert torch.allclose(found, expected, atol=1e-5)


# Blocks that are cut off or replaced

CUTTABLE = sorted(name for name in SMALL if name.split("-")[0] not in ("timm_adapter",))


def blocks_of(model: nn.Module) -> tuple[nn.Module, str, Any]:
    """The module that holds the container of a model's patched blocks, its name there, and it."""
    from tokred.host import find_host

    host, tower = find_host(model)
    blocks = list(host.blocks(tower))
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and any(
                part is blocks[-1] for part in child
            ):
                return module, name, child
    raise AssertionError("no container")


@pytest.mark.parametrize("name", CUTTABLE)
@torch.no_grad()
def test_a_model_whose_last_block_is_cut_off_hands_out_the_full_grid(name: str) -> None:
    """On every family: the block in front of it is the last one now, and its output is as long as
    that of the dense model without the last block."""
    made = SMALL[name]
    torch.manual_seed(0)
    model, inputs = made.build(), made.inputs(2)
    container, attribute, blocks = blocks_of(model)
    if len(blocks) < 3:
        pytest.skip("two blocks are too few")
    seen: list[Tensor] = []

    def shape(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    blocks[-2].register_forward_hook(shape)

    def cut_off() -> Any:
        seen.clear()
        setattr(container, attribute, blocks[:-1])
        try:
            answered(made, model, inputs)
        finally:
            setattr(container, attribute, blocks)
        return tuple(seen[-1].shape)

    try:
        dense = cut_off()
    except (ValueError, TypeError) as error:
        pytest.skip(f"the dense model cannot go on without it: {error}")
    method = "slic" if hasattr(tokred.host.find_host(model)[0], "number") else "tome"
    try:
        tokred.apply(model, method, 0.5)
    except tokred.UnsupportedModelError:
        pytest.skip("not with this method")
    assert cut_off() == dense


@torch.no_grad()
def test_blocks_behind_the_last_patched_one_get_the_full_grid() -> None:
    model, x = small("vit"), images(2)
    tokred.apply(model, "topk", 0.5)
    model.blocks[-1] = nn.Identity()
    assert model.forward_features(x).shape[1] == 17
    model = small("vit")
    tokred.apply(model, "topk", 0.5)
    model.blocks = model.blocks[1:]  # blocks in front may be cut off, too
    assert model.forward_features(x).shape[1] == 17


@torch.no_grad()
def test_a_block_that_was_replaced_is_an_error() -> None:
    model, x = small("vit"), images(2)
    tokred.apply(model, "tome", 0.5)
    model.blocks[2] = small("vit").blocks[2]
    with pytest.raises(RuntimeError, match=r"block 2 of VisionTransformer is another one"):
        model(x)
    model = small("vit")
    tokred.apply(model, "tome", 0.5)
    model.blocks[1], model.blocks[2] = model.blocks[2], model.blocks[1]
    with pytest.raises(RuntimeError, match=r"block 2 of VisionTransformer is another one"):
        model(x)
    tokred.apply(model, "tome", 0.5)  # as the error says
    assert model(x).isfinite().all()


@torch.no_grad()
def test_copies_and_saved_models_know_where_they_end() -> None:
    model, x = small("vit"), images(2)
    tokred.apply(model, "tome", 0.5)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
        other.blocks = other.blocks[:-1]
        assert other.forward_features(x).shape[1] == 17
    assert model.forward_features(x).shape[1] == 17


# Wrappers around what stands in for a forward


def wrap(module: nn.Module, name: str = "forward") -> None:
    """A timer, a profiler's range, a cache: something around a method of one instance."""
    inner = getattr(module, name)
    setattr(module, name, lambda *args, inner=inner, **kwargs: inner(*args, **kwargs))


@pytest.mark.parametrize("method", ["tome", "topk", "svit"])
@pytest.mark.filterwarnings("ignore:the gates of:UserWarning")
@torch.no_grad()
def test_remove_takes_away_what_was_wrapped_later(method: str) -> None:
    model, x = small("mae, average pooling" if method == "topk" else "vit"), images(2)
    dense = model(x)
    tokred.apply(model, method, 0.5)
    for block in model.blocks:
        wrap(block)
    wrap(model, "pool")
    fewer = model(x)
    assert not torch.equal(fewer, dense)
    assert reduction_of(model) is not None
    tokred.remove(model)
    assert torch.equal(model(x), dense)
    assert reduction_of(model) is None
    # Whatever is wrapped around a forward before tokred is named.
    with pytest.raises(
        tokred.UnsupportedModelError, match="its forward was replaced, by <function"
    ):
        tokred.apply(model, method, 0.5)
    for block in model.blocks:
        del block.forward
    del model.pool
    tokred.apply(model, method, 0.5)
    if method != "svit":  # whose gates are random anew
        assert torch.equal(model(x), fewer)
    tokred.remove(model)
    assert all(
        "forward" not in vars(block) and "_tokred" not in vars(block) for block in model.blocks
    )


@torch.no_grad()
def test_applied_ends_behind_a_wrapper_too() -> None:
    model, x = small("vit"), images(2)
    dense = model(x)
    with tokred.applied(model, "tome", 0.5):
        wrap(model.blocks[2])
        assert not torch.equal(model(x), dense)
    assert torch.equal(model(x), dense)


def test_a_denoiser_is_as_it_was_behind_a_wrapper_too() -> None:
    model = unet()
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 16)
    with torch.no_grad():
        dense = model(x, 500, text).sample
        tokred.apply(model, "tome", 0.5)
        for module in model.modules():
            if type(module).__name__ == "Attention":
                wrap(module)
        assert not torch.equal(model(x, 500, text).sample, dense)
        tokred.remove(model)
        assert torch.equal(model(x, 500, text).sample, dense)


# Heads behind features that were copied

POOLED = (
    "mae, average pooling", "registers, average pooling", "no class token",
    "siglip, attention pooling",
)  # fmt: skip


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("copied", ["clone", "cast", "save", "dense"])
@torch.no_grad()
def test_a_head_behind_features_of_which_nothing_is_known(name: str, copied: str) -> None:
    model, x = small(name), images(2)
    dense = model.forward_features(x)
    for method, options in (("topk", {}), ("tome", {"full_grid": False})):
        tokred.apply(model, method, 0.5, **options)
        features = model.forward_features(x)
        expected = model.forward_head(features)
        assert torch.allclose(expected, model(x), atol=1e-5)
        file = io.BytesIO()
        torch.save(features, file)
        file.seek(0)
        copies = {
            "clone": features.clone(),
            "cast": features.double().float(),
            "save": torch.load(file),
            "dense": dense,
        }
        with pytest.raises(RuntimeError, match="features of which nothing is known"):
            model.forward_head(copies[copied])
    # Copies of merged tokens on the full grid count as they should, whatever they come from.
    tokred.apply(model, "tome", 0.5)
    features = model.forward_features(x)
    assert torch.allclose(model.forward_head(features.clone()), model(x), atol=1e-5)


# Layers that hand out the full grid for hooks and loops


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_named_layers_hand_out_the_full_grid(method: str) -> None:
    model, x, seen = small("vit").double(), images(2).double(), {}
    tokred.apply(model, method, 0.5)
    expected = model(x)
    tokred.apply(model, method, 0.5, hand_out=(1, -2))
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, i, o, layer=layer: seen.update({layer: o}))
    # The tokens between go on as they were: what is seen costs no accuracy.
    assert torch.allclose(model(x), expected, atol=1e-9)
    assert seen[1].shape[1] == seen[2].shape[1] == seen[3].shape[1] == 17
    inside = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True, norm=False)
    for layer, features in zip((1, 2), inside, strict=True):
        assert torch.equal(seen[layer][:, 1:].transpose(1, 2), features.flatten(2))
    for hooks in (block._forward_hooks for block in model.blocks):
        hooks.clear()
    shapes: list[int] = []
    looped_x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        looped_x = block(looped_x)
        shapes.append(looped_x.shape[1])
    assert shapes[1:] == [17, 17, 17]


@pytest.mark.parametrize("name", sorted(SWIN))
@torch.no_grad()
def test_named_layers_of_a_windowed_model_hand_out_the_full_map(name: str) -> None:
    model, x, seen = SWIN[name].build(), windowed_images(), []
    few = Hourglass(grid=FEW, down=1)
    for block in stage_of(model):
        block.register_forward_hook(
            lambda module, args, output: seen.append(
                (output[0] if isinstance(output, tuple) else output).numel()
            )
        )

    def sizes() -> list[int]:
        seen.clear()
        model(x)
        return list(seen)

    dense = sizes()
    tokred.apply(model, "slic", few)
    reduced = sizes()
    # (MaskFormer's look at every layer anyway.)
    named = next((layer for layer, now in enumerate(reduced) if now < dense[layer]), 0)
    tokred.apply(model, "slic", few, hand_out=(named,))
    assert sizes() == [*reduced[:named], dense[named], *reduced[named + 1 :]]


def test_layers_that_are_not_there_are_refused() -> None:
    for wrong in ((4,), (-5,), (1.0,)):
        with pytest.raises(ValueError, match=r"hand_out must be layers in \[0, 3\]"):
            tokred.apply(small("vit"), "tome", 0.5, hand_out=wrong)


# Tokens that are no patches


class PromptTuned(torch.nn.Module):
    """Learned tokens among the others, by a class of somebody's own."""

    def __new__(cls, prompts: int = 10, **options: Any) -> Any:
        from timm.models.vision_transformer import VisionTransformer

        class Prompted(VisionTransformer):
            def __init__(self) -> None:
                super().__init__(
                    img_size=64, depth=4, embed_dim=64, num_heads=2, num_classes=10, **options
                )
                self.prompts = nn.Parameter(torch.randn(1, prompts, 64))

            def _pos_embed(self, x: Tensor) -> Tensor:
                x = super()._pos_embed(x)
                return torch.cat([x[:, :1], self.prompts.expand(len(x), -1, -1), x[:, 1:]], 1)

        return Prompted().eval()


@pytest.mark.parametrize("prompts", [1, 10, 16, 32])
@torch.no_grad()
def test_tokens_that_a_subclass_adds_are_refused_or_declared(prompts: int) -> None:
    model, x = PromptTuned(prompts), images(2)
    dense = model(x)
    tokred.apply(model, "tome", 0.5)
    with pytest.raises(RuntimeError, match=rf"{17 + prompts} tokens.*prefix={1 + prompts}"):
        model(x)
    for method in ("tome", "topk", "slic"):
        tokred.apply(model, method, 0.5, prefix=1 + prompts)
        assert model.forward_features(x).shape[1] == 17 + prompts
        trace = tokred.inspect(model, x)
        assert trace.grid == (4, 4) and trace.prefix == 1 + prompts
        assert {stage.before for stage in trace.stages} <= set(range(17))
    tokred.remove(model)
    assert torch.equal(model(x), dense)
    tokred.apply(model, "tome", 0.5, prefix=2 + prompts)
    with pytest.raises(RuntimeError, match=rf"prefix={1 + prompts}"):
        model(x)


def test_a_prefix_must_have_room_for_the_models_own() -> None:
    with pytest.raises(ValueError, match="prefix must be an integer from 1 on"):
        tokred.apply(small("vit"), "tome", 0.5, prefix=0)
    with pytest.raises(ValueError, match="prefix must be an integer from 5 on"):
        tokred.apply(small("dinov2, registers"), "tome", 0.5, prefix=2)
