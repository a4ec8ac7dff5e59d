"""Blocks that were wrapped, compiled or changed before `tokred.apply`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import images_for, small
from test_hosts import SMALL, answered
from test_patching import traces
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tokred
from tokred.patching import reduction_of


def compiled(block: nn.Module) -> Any:
    return torch.compile(block, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "checkpointed": checkpoint_wrapper,
    "both": lambda block: compiled(checkpoint_wrapper(block)),
}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_blocks_wrapped_before_are_reduced_inside(wrapper: str, ran: bool) -> None:
    torch._dynamo.reset()
    model = small("vit")
    images = images_for(model)
    dense = model(images)
    tokred.apply(model, "tome", keep_rate=0.5)
    reduced = model(images)
    tokred.remove(model)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = WRAPPERS[wrapper](block)
    before = traces(model)
    if ran:
        torch.testing.assert_close(model(images), dense)
        before = traces(model)
    tokred.apply(model, "tome", keep_rate=0.5)
    torch.testing.assert_close(model(images), reduced)
    with pytest.warns(UserWarning, match="nothing is reduced"):
        tokred.apply(model, "tome", keep_rate=1)  # in place of the other
    torch.testing.assert_close(model(images), dense)
    tokred.remove(model)
    torch.testing.assert_close(model(images), dense)
    assert [(name, kind, hooks) for name, kind, _, hooks in traces(model)] == [
        (name, kind, hooks) for name, kind, _, hooks in before
    ]
    assert reduction_of(model) is None


@pytest.mark.parametrize("ran", [False, True])
def test_blocks_compiled_in_place_before(ran: bool) -> None:
    torch._dynamo.reset()
    model = small("vit")
    images = images_for(model)
    dense = model(images)
    for block in model.blocks:
        block.compile(backend="eager")
    if ran:
        model(images)
    tokred.apply(model, "tome", keep_rate=0.5)
    found = model(images)
    assert not torch.allclose(found, dense)
    tokred.remove(model)
    torch.testing.assert_close(model(images), dense)
    plain = small("vit")
    plain.load_state_dict(model.state_dict())
    tokred.apply(plain, "tome", keep_rate=0.5)
    torch.testing.assert_close(found, plain(images))


class Around(nn.Module):
    """Somebody's own wrapper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_another_wrapper_is_refused_with_advice() -> None:
    model = small("vit")
    for number, block in enumerate(model.blocks):
        model.blocks[number] = Around(block)
    before = traces(model)
    with pytest.raises(tokred.UnsupportedModelError, match=r"Block inside of a .*Around: call tok"):
        tokred.apply(model, "tome", keep_rate=0.5)
    assert traces(model) == before


def test_attention_replaced_on_an_instance_is_refused() -> None:
    model = small("vit")
    model.blocks[1].attn.forward = lambda x, attn_mask=None: x
    with pytest.raises(tokred.UnsupportedModelError, match=r"attn of block 1: its forward was rep"):
        tokred.apply(model, "tome", keep_rate=0.5)


def test_attention_of_another_class_is_refused_where_it_is_restated() -> None:
    """It would not be called at all."""
    host = SMALL["transformers_vit-vit"]
    model = host.build()
    found, tower = tokred.host.find_host(model)
    block = found.blocks(tower)[1]

    class Mine(type(block.attention)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
            return hidden_states, None

    block.attention.__class__ = Mine
    with pytest.raises(tokred.UnsupportedModelError, match=r"attention of block 1 is a .*Mine"):
        tokred.apply(model, "tome", keep_rate=0.5)
    tokred.remove(model)
    assert answered(host, model, host.inputs(2)) is not None
