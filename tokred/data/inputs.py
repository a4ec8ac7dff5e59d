"""What a model is called with: images alone, or several inputs by name, as processors give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = Tensor | Mapping[str, Any]
"""[batch, channels, height, width], or a mapping with such a tensor and what else there is."""


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Runs the model on them."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def pixels(inputs: Inputs) -> Tensor:
    """The images among them: [batch, (frames,) channels, height, width], or patches.

    Raises:
        ValueError: there are none.
    """
    if isinstance(inputs, Tensor):
        return inputs
    for name in ("pixel_values", "images", "pixel_values_videos"):
        found = inputs.get(name)
        if isinstance(found, Tensor):
            return found
    images = [x for x in inputs.values() if isinstance(x, Tensor) and x.ndim >= 4]
    if not images:
        raise ValueError(f"there are no images among the inputs {sorted(inputs)}")
    return images[0]


def device_of(inputs: Inputs) -> torch.device:
    """Where they are: where their first tensor is.

    Raises:
        ValueError: there is no tensor.
    """
    if isinstance(inputs, Tensor):
        return inputs.device
    for x in inputs.values():
        if isinstance(x, Tensor):
            return x.device
    raise ValueError(f"there is no tensor among the inputs {sorted(inputs)}")
