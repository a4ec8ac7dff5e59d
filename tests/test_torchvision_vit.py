"""Of nn.MultiheadAttention alone: what it hides, and an adapter around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from families.torchvision_vit import SMALL
from torch import Tensor, nn

import tokred
from tokred.maps import TokenMap
from tokred.reducers import Tokens


@dataclass(frozen=True)
class Watching:
    """ToMe that keeps what it was shown."""

    needs: ClassVar[frozenset[str]] = frozenset({"key", "value", "class_attention"})
    seen: list[Tokens] = field(default_factory=list)

    def __call__(self, tokens: Tokens, keep: int) -> TokenMap:
        self.seen.append(tokens)
        return tokred.ToMe()(tokens, keep)


@pytest.mark.parametrize("name", ["vit", "vit, odd heads"])
@torch.no_grad()
def test_class_attention_and_keys_are_those_that_the_attention_has_inside(name: str) -> None:
    model = SMALL[name].build()
    normed: list[Tensor] = []
    for block in model.encoder.layers:
        block.ln_1.register_forward_hook(lambda _, args, output: normed.append(output))
    method = Watching()
    tokred.apply(model, method, keep_rate=0.5)
    model(SMALL[name].inputs(2))
    assert [tokens.layer for tokens in method.seen] == [1, 2, 3]
    for tokens in method.seen:
        x, attention = normed[tokens.layer], model.encoder.layers[tokens.layer].self_attention
        tokred.remove(model)
        _, weights = attention(
            x, x, x, average_attn_weights=False, key_padding_mask=F.pad(tokens.size.log(), (1, 0))
        )
        torch.testing.assert_close(tokens.class_attention, weights[:, :, 0, 1:])
        inside = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        _, key, value = inside.chunk(3, -1)
        torch.testing.assert_close(tokens.key.transpose(1, 2).flatten(2), key[:, 1:])
        torch.testing.assert_close(tokens.value.transpose(1, 2).flatten(2), value[:, 1:])


class Adapter(nn.Module):
    """Something around the attention, such as LoRA."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.head_dim = base_layer.head_dim

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)


@torch.no_grad()
def test_keys_are_not_read_off_an_adapter() -> None:
    """It may change the weights during its forward, where keys could not follow."""
    model = SMALL["vit"].build()
    images = SMALL["vit"].inputs(2)
    tokred.apply(model, "tome", keep_rate=0.5)
    block = model.encoder.layers[1]
    block.self_attention = Adapter(block.self_attention)
    with pytest.raises(ValueError, match="merge adapters"):
        model(images)
    with pytest.raises(tokred.UnsupportedModelError, match="merge adapters"):
        tokred.apply(model, "tome", keep_rate=0.5)
    tokred.apply(model, "random", keep_rate=0.5)
    assert model(images).isfinite().all()
