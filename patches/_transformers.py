"""What the layers of all of transformers' models have in common. (No patch itself.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _active_collector

from tokred.host import is_a

# Since transformers 5.23 a layer is checkpointed in its forward, which a stand-in replaces, and
# not in its `__call__` any more.
IN_FORWARD = "__init_subclass__" in vars(GradientCheckpointingLayer)


def checkpoint(layer: Any) -> Callable[..., Any] | None:
    """What the layer's own forward would call itself through, now."""
    if IN_FORWARD and layer.gradient_checkpointing and layer.training:
        through: Callable[..., Any] = layer._gradient_checkpointing_func
        return through
    return None


def tapped(layers: int) -> frozenset[int]:
    """The layers whose output is collected by the call that runs: of all hidden states, the first
    is what enters the first layer."""
    collected = _active_collector.get()
    if collected is None or "hidden_states" not in collected:
        return frozenset()
    selected = collected.get("_hidden_states_layers")
    if selected is None:
        return frozenset(range(layers))
    return frozenset(index - 1 for index in selected)


def heads(attention: Any, output: Tensor) -> Tensor:
    """[batch, tokens, dim] of a projection, by heads."""
    return output.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def sides(size: Any) -> tuple[int, int]:
    """(height, width) of what configurations give as one number or two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def grid(config: Any, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Patches by rows and columns."""
    height, width = image_size or sides(config.image_size)
    rows, columns = sides(config.patch_size)
    return height // rows, width // columns


def contains(root: nn.Module, names: Sequence[str]) -> bool:
    """Whether a model is, or wraps, an instance of one of the named classes."""
    return any(is_a(module, names) for module in root.modules())
