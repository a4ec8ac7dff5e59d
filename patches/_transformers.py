"""What the layers of all of transformers' models have in common. (No patch itself.)"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.output_capturing import _active_collector

from tokred.engine import Layout, Step, attention_without_mask
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
    return grid_of(config.patch_size, config.image_size, image_size)


def grid_of(patch_size: Any, own_size: Any, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """The same from the size of a patch, and of the model's own images or other ones."""
    height, width = image_size or sides(own_size)
    rows, columns = sides(patch_size)
    return height // rows, width // columns


def layout_of_map(model: Any, image_size: tuple[int, int] | None) -> Layout:
    """The patches of an image, in a model whose layers attend in windows."""
    full = grid(model.config, image_size)
    return Layout(prefix=0, layers=1, grid=full, class_token=False)


def window(layer: Any) -> tuple[int, int] | None:
    """Rows and columns of a layer's windows; None if it attends to the whole feature map."""
    return (layer.window_size, layer.window_size) if layer.window_size > 0 else None


def contains(root: nn.Module, names: Sequence[str]) -> bool:
    """Whether a model is, or wraps, an instance of one of the named classes."""
    return any(is_a(module, names) for module in root.modules())


# Attention by functions that take no mask (flash attention)

WEIGHED = "tokred_weighed"


def attend_without_mask(
    attention: Any, step: Step, hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """`transformers.models.dpt.modeling_dpt.DPTSelfAttention.forward` (transformers 5.9 to 5.23),
    with a mask where it has None; the others of this file are the same."""
    key = heads_of(attention, attention.key(hidden_states))
    value = heads_of(attention, attention.value(hidden_states))
    query = heads_of(attention, attention.query(hidden_states))
    step.see(key=key, query=query, value=value)
    mask = step.bias(query)
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    module, function = function_for(attention, mask, eager)
    context, weights = function(
        module,
        query,
        key,
        value,
        mask,
        is_causal=attention.is_causal,
        scaling=attention.scaling,
        dropout=attention.dropout_prob if attention.training else 0.0,
        **kwargs,
    )
    return context.reshape(*context.shape[:-2], attention.all_head_size), weights


def heads_of(attention: Any, output: Tensor) -> Tensor:
    """[batch, tokens, dim] of a projection, by heads."""
    return output.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)


def attend(attention: Any, step: Step, *args: Any, **kwargs: Any) -> Any:
    """An attention's own forward. Where the model is set up for a function that takes no mask, what
    merged tokens stand for goes in with the values instead, see `weighed`."""
    few = not step.untouched and step.mask is not None
    if not few or not takes_no_mask(attention.config):
        return type(attention).forward(attention, *args, **kwargs)
    return type(attention).forward(weighing(attention), *args, **kwargs)


def function_for(attention: Any, mask: Tensor | None, eager: Any) -> tuple[Any, Any]:
    """For an attention that is restated: what to call, and with which module, given our mask."""
    if mask is not None and takes_no_mask(attention.config):
        return weighing(attention), weighed
    implementation = attention.config._attn_implementation
    return attention, ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def weighing(attention: Any) -> Any:
    """The same attention (weights, submodules and hooks are shared), set up to be weighed."""
    twin = copy.copy(attention)
    twin.config = SetUp(attention.config, attention)
    return twin


def takes_no_mask(config: Any) -> bool:
    """Whether the function that computes attention takes no mask.

    Raises:
        ValueError: it takes masks that we cannot make.
    """
    if config._attn_implementation == "flex_attention":
        raise ValueError(
            "flex_attention takes no bias by key, which merged tokens need: call "
            "model.set_attn_implementation('sdpa')"
        )
    return is_flash_attention_requested(config)


class SetUp:
    """A configuration that says that attention is to be weighed, and everything else as before."""

    _attn_implementation = WEIGHED

    def __init__(self, config: Any, attention: nn.Module) -> None:
        self.original, self.attention = config, attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def weighed(
    module: Any,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    attention_mask: Float[Tensor, "batch 1 1 tokens"],
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in which key j counts exp(mask_j) times, by a function that takes no mask (see
    `attention_without_mask`)."""
    if attention_mask.shape[1:3] != (1, 1):
        raise ValueError(
            f"{module.config.original._attn_implementation} takes no mask that differs by head or "
            "query: call model.set_attn_implementation('sdpa')"
        )
    attention = module.config.attention
    function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # In the order that all functions return: [batch, queries, heads, head_dim].
        output: Tensor = function(attention, query, key, value, None, scaling=scaling, **kwargs)[0]
        return output

    return attention_without_mask(attend, query, key, value, attention_mask), None


AttentionInterface.register(WEIGHED, weighed)


def refuse(model: Any, signals: frozenset[str]) -> str | None:
    implementation = model.config._attn_implementation
    if implementation == "flex_attention":
        return (
            "flex_attention takes its masks compiled, for the full grid alone: call "
            "model.set_attn_implementation('sdpa')"
        )
    return None
