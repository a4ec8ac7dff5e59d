"""Bad input is named, the cure is told, and the model stays as it was."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import timm
import torch
from conftest import small
from test_patching import outputs, traces
from timm.layers import GlobalResponseNormMlp
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from torch import nn

import tokred
from tokred import Stages


@pytest.mark.parametrize(
    ("keep_rate", "error", "message"),
    [
        (0, ValueError, "keep_rate must be in (0, 1], the share of tokens kept, not 0"),
        (-1, ValueError, "keep_rate must be in (0, 1], the share of tokens kept, not -1"),
        (1.5, ValueError, "keep_rate must be in (0, 1], the share of tokens kept, not 1.5"),
        (
            float("nan"),
            ValueError,
            "keep_rate must be in (0, 1], the share of tokens kept, not nan",
        ),
        ("0.5", TypeError, "keep_rate must be a number in (0, 1] or a schedule, not '0.5' (str)"),
        (True, TypeError, "keep_rate must be a number in (0, 1] or a schedule, not True (bool)"),
    ],
)
@pytest.mark.parametrize("patched", [False, True])
def test_bad_keep_rates(
    plain: nn.Module, images: torch.Tensor, keep_rate: object, error: type[Exception],
    message: str, patched: bool,
) -> None:  # fmt: skip
    if patched:
        tokred.apply(plain, "tome", keep_rate=0.5)
    was, before = traces(plain), outputs(plain, images)
    with pytest.raises(error, match=re.escape(message)):
        tokred.apply(plain, "tome", keep_rate=keep_rate)  # type: ignore[arg-type]
    assert traces(plain) == was
    assert torch.equal(outputs(plain, images), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "tomme"}, ValueError, "unknown method 'tomme' (did you mean 'tome'?)"),
        ({"method": 3}, TypeError, "method must be a name or a reducer"),
        ({"schedule": 0.5}, TypeError, "schedule must be one of tokred's schedules, not 0.5"),
        ({"schedule": tokred.Exactly((8, 4))}, ValueError, "the model has 4 layers"),
        ({"schedule": tokred.Exactly((17, 8, 8, 8))}, ValueError, "possible are 1 to 16"),
        ({"schedule": Stages(0.5, (1, 9))}, ValueError, "layers must be in [0, 3]"),
    ],
)
def test_bad_options(
    plain: nn.Module, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    was = traces(plain)
    with pytest.raises(error, match=re.escape(message)):
        tokred.apply(plain, **arguments)  # type: ignore[arg-type]
    assert traces(plain) == was


def with_a_replaced_block() -> nn.Module:
    model = small("vit")
    model.blocks[2] = nn.Identity()
    return model


def with_a_forward_of_its_own() -> nn.Module:
    model = small("vit")
    model.blocks[1].forward = lambda x: x
    return model


def with_a_shared_block() -> nn.Module:
    model = small("vit")
    model.blocks[1] = model.blocks[0]
    return model


def with_an_mlp_that_mixes_tokens() -> nn.Module:
    model = small("vit")
    model.blocks[3].mlp = GlobalResponseNormMlp(192, 192, use_conv=False)
    return model


def with_attention_without_a_mask() -> nn.Module:
    model = small("vit")
    model.blocks[0].attn = nn.Identity()
    return model


def tiny(**options: object) -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, **options)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "no patch for torch.nn.modules.linear.Linear; supported: ",
        ),
        (
            lambda: timm.create_model("resnet18"),
            "no patch for timm.models.resnet.ResNet; supported",
        ),
        (with_a_replaced_block, "block 2 is a torch.nn.modules.linear.Identity, but only timm"),
        (with_a_forward_of_its_own, "block 1: its forward was replaced, by <function"),
        (with_a_shared_block, "some blocks are one and the same module"),
        (with_an_mlp_that_mixes_tokens, "the MLP of block 3 mixes tokens (GlobalResponseNormMlp)"),
        (with_attention_without_a_mask, "block 0 has no attn.k_norm or k_norm, where its key"),
        (lambda: tiny(block_fn=ParallelThingsBlock), "block 0 is a timm"),
    ],
)
def test_unsupported_models(make: object, message: str) -> None:
    model = make()  # type: ignore[operator]
    was = traces(model)
    with pytest.raises(tokred.UnsupportedModelError, match=re.escape(message)) as error:
        tokred.apply(model, "tome", keep_rate=0.5)
    assert traces(model) == was
    assert "Linear" not in message or "docs/adding-a-host.md" in str(error.value)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=re.escape("model must be a torch.nn.Module, not 'vit'")):
        tokred.apply("vit")  # type: ignore[arg-type]


@pytest.mark.skipif(
    "attn_layer" not in inspect.signature(VisionTransformer).parameters,
    reason="this version of timm has no choice of attention",
)
def test_a_host_that_cannot_be_read_refuses_the_method() -> None:
    model = tiny(attn_layer="diff")
    tokred.apply(model, "tome", keep_rate=0.5)
    with pytest.raises(tokred.UnsupportedModelError, match="attention that DiffAttention pays"):
        tokred.apply(model, "topk", keep_rate=0.5)


def test_an_unknown_attention_is_named(plain: nn.Module) -> None:
    with pytest.raises(ValueError, match="attention must be 'host' or 'fastest', not 'flash'"):
        tokred.apply(plain, attention="flash")


def test_masks_that_cannot_be_meant_are_refused(plain: nn.Module, images: torch.Tensor) -> None:
    tokred.apply(plain, "tome", keep_rate=0.5)
    with pytest.raises(ValueError, match="cannot be used while tokens are reduced"):
        plain(images, attn_mask=torch.zeros(2, 1, 12, 17))
    if "is_causal" in inspect.signature(plain.forward).parameters:
        with pytest.raises(ValueError, match="is_causal=True is not supported"):
            plain(images, is_causal=True)


def test_nothing_to_look_at(plain: nn.Module, images: torch.Tensor) -> None:
    for verb in (lambda: tokred.inspect(plain, images), lambda: tokred.cite(plain)):
        with pytest.raises(ValueError, match=re.escape("call tokred.apply(model, ...) first")):
            verb()
    with pytest.raises(ValueError, match="method must be given"):
        tokred.bench(plain, images)


def test_a_library_that_is_too_old_does_not_stand_in_the_way_of_another(
    plain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokred.host import find

    def import_module(name: str) -> object:
        if name.endswith(".timm_beit"):
            raise ImportError("no module named timm.models.beit")
        return importlib.import_module(name)

    monkeypatch.setattr(find, "import_module", import_module)
    assert "timm_vit" in tokred.hosts() and "timm_beit" not in tokred.hosts()
    tokred.apply(plain)
    with pytest.raises(tokred.UnsupportedModelError, match="timm_beit needs another version"):
        tokred.apply(nn.Linear(2, 2))


def test_shuffled_patches_cannot_be_laid_out() -> None:
    from families.transformers_vit import SMALL

    small = SMALL["vit-mae"]
    model = small.build()
    tokred.apply(model)
    with pytest.raises(ValueError, match="shuffles its patches"):
        tokred.inspect(model, small.inputs(1))
