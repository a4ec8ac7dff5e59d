"""What denoisers of diffusers that are made of `BasicTransformerBlock`s have in common. (No patch
itself.)"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokred.engine import tensors_in

BLOCK = "diffusers.models.attention.BasicTransformerBlock"

_PROMPT = (
    "encoder_hidden_states",
    "class_labels",
    "added_cond_kwargs",
    "cross_attention_kwargs",
    "added_time_ids",
    "image_embeddings",
)


def modules_of(block: Any) -> dict[str, str]:
    """What a block has to merge tokens around."""
    found = {"mlp": "ff"}
    if not block.only_cross_attention:
        found["attention"] = "attn1"
    if block.attn2 is not None and not block.double_self_attention:
        found["cross_attention"] = "attn2"
    return found


def timestep(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The time step that the model is called with: a number, or a tensor of any shape."""
    return _given(model, args, kwargs).get("timestep")


def prompt(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What tells the calls of a step apart: texts, classes, pictures to resemble."""
    given = _given(model, args, kwargs)
    return tensors_in([given.get(name) for name in _PROMPT])


def _given(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments


def progress(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Not used any more: models that were pickled up to version 0.8 name it."""
    return 1 - float(timestep(model, args, kwargs)) / 1000
