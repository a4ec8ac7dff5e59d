"""What blocks around torch's own `nn.MultiheadAttention` have in common. (No patch itself.)"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tokred.engine import Step


def attend(attention: Any, step: Step, x: Tensor) -> Tensor:
    """Self-attention of `nn.MultiheadAttention` (torch 2.6 to 2.15), batch first.

    Its keys are made inside, and by a fused kernel where there is no mask, so that they have to be
    made once more for a method that wants to see them.
    """
    bias = step.bias(x)
    if step.wants_signals:
        if not isinstance(attention, nn.MultiheadAttention):
            raise ValueError(_HIDDEN.format(type(attention).__qualname__))
        projections = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        parts = projections.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()
        step.see(query=query, key=key, value=value)
    if bias is None:
        # As the host calls it: only without a mask does it take its fused kernel.
        return attention(x, x, x, need_weights=False)[0]
    # One number by key: [batch, 1, 1, tokens] to [batch, tokens], which is never made larger.
    return attention(x, x, x, need_weights=False, key_padding_mask=bias[:, 0, 0])[0]


def scale(attention: Any) -> float:
    return float(attention.head_dim**-0.5)


def refuse(attention: Any, signals: frozenset[str]) -> str | None:
    if signals and not isinstance(attention, nn.MultiheadAttention):
        return _HIDDEN.format(type(attention).__qualname__)
    return None


_HIDDEN = (
    "keys cannot be read off {}: merge adapters into the attention first, or use a method that "
    "needs no keys"
)
