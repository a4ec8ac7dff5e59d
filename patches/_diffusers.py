"""What denoisers of diffusers that are made of `BasicTransformerBlock`s have in common. (No patch
itself.)"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

BLOCK = "diffusers.models.attention.BasicTransformerBlock"


def modules_of(block: Any) -> dict[str, str]:
    """What a block has to merge tokens around."""
    found = {"mlp": "ff"}
    if not block.only_cross_attention:
        found["attention"] = "attn1"
    if block.attn2 is not None and not block.double_self_attention:
        found["cross_attention"] = "attn2"
    return found


def progress(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """By the time step, of which there are 1,000, the first one being the last."""
    given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
    now = given["timestep"]
    if isinstance(now, Tensor):
        now = now.flatten()[0].item()
    return 1 - float(now) / 1000
