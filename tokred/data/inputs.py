"""What a model is called with: images alone, or several inputs by name, as processors give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = Tensor | Mapping[str, Any]
"""A tensor [batch, channels, height, width], or a mapping with such a tensor and other inputs."""


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Runs a model on its inputs."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def pixels(inputs: Inputs) -> Tensor:
    """The images among the inputs: [batch, (frames,) channels, height, width], or patches.

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
    """The device of the inputs, which is that of their first tensor.

    Raises:
        ValueError: there is no tensor.
    """
    if isinstance(inputs, Tensor):
        return inputs.device
    for x in inputs.values():
        if isinstance(x, Tensor):
            return x.device
    raise ValueError(f"there is no tensor among the inputs {sorted(inputs)}")
