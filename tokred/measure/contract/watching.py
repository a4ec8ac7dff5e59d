"""Watches from outside what the blocks of a model are given, put out, and pay attention to.

Nothing here asks the engine or a patch: forward hooks on the blocks see the tokens, and a
`TorchFunctionMode` sees the calls of torch that compute attention, whoever makes them. The same two
ways may also change a run: hide keys from attention, or replace the tokens behind a block.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Paid:
    """What one attention has computed.

    Attributes:
        weights: the attention that each query pays to each key, after softmax, float32.
        key: the keys as they were compared: behind norms and rotation. None if they were not seen.
        value: the values. None if they were not seen.
    """

    weights: Float[Tensor, "batch heads tokens tokens"]
    key: Float[Tensor, "batch key_heads tokens head_dim"] | None
    value: Float[Tensor, "batch key_heads tokens head_dim"] | None


@dataclass(frozen=True)
class Trace:
    """What was seen of the blocks in one run, by layer; a list, because a model may run its tower
    several times.

    Attributes:
        entered: the tokens that a block was given.
        left: the tokens that it put out.
        paid: what its attentions computed.
    """

    entered: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    left: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    paid: dict[int, list[Paid]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Changes:
    """What to change in a run.

    Attributes:
        bias: `bias(layer, batch)`: what to add to the logits of attention, [batch, tokens], by key;
            None for nothing.
        behind: `behind(layer, x, y)`: the tokens that take the place of `y`, which a block has made
            of `x`.
        masks: `masks(layer, x)`: a mask over queries and keys, [1, 1, tokens, tokens], given to
            every block that takes one.
    """

    bias: Callable[[int, int], Tensor | None] | None = None
    behind: Callable[[int, Tensor, Tensor], Tensor] | None = None
    masks: Callable[[int, Tensor], Tensor] | None = None


@contextmanager
def watching(blocks: Sequence[nn.Module], changes: Changes | None = None) -> Iterator[Trace]:
    """Watches the blocks, and changes what they do, until the end of the `with` block."""
    changes = changes or Changes()
    trace = Trace()
    attention = _Attention(trace, changes)
    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            for handle in _hooks(layer, block, trace, changes, attention):
                stack.callback(handle.remove)
        stack.enter_context(attention)
        yield trace


def _hooks(
    layer: int, block: nn.Module, trace: Trace, changes: Changes, attention: _Attention
) -> Iterator[Any]:
    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        trace.entered[layer].append(x)
        attention.layer = layer
        name = mask_of(module)
        if changes.masks is None or name is None:
            return None
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        bound.arguments[name] = changes.masks(layer, x)
        return bound.args[1:], bound.kwargs

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        attention.layer = None
        y = output[0] if isinstance(output, tuple) else output
        if changes.behind is not None:
            y = changes.behind(layer, trace.entered[layer][-1], y)
            output = (y, *output[1:]) if isinstance(output, tuple) else y
        trace.left[layer].append(y)
        return output

    yield block.register_forward_pre_hook(enter, with_kwargs=True)
    # The host's own hooks shall see what takes the place of the output.
    yield block.register_forward_hook(leave, prepend=True)


def mask_of(block: nn.Module) -> str | None:
    """The name of the attention mask that a block takes; None if it takes none."""
    parameters = inspect.signature(type(block).forward).parameters
    return next((name for name in ("attn_mask", "attention_mask") if name in parameters), None)


_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_PRODUCT = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


class _Attention(TorchFunctionMode):
    """Sees attention: fused, made of two products and a softmax, or `nn.MultiheadAttention`'s."""

    def __init__(self, trace: Trace, changes: Changes) -> None:
        super().__init__()
        self.trace, self.changes = trace, changes
        self.layer: int | None = None  # the block that is running
        self.compared: Tensor | None = None  # keys of the last product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch instead of any of its functions. Inside of it, the mode is off."""
        kwargs = kwargs or {}
        if self.layer is not None:
            if func is F.scaled_dot_product_attention:
                return self._fused(func, *args, **kwargs)
            if func is F.multi_head_attention_forward:
                return self._multi_head(func, args, kwargs)
            if func in _SOFTMAX and _square(args[0]):
                return self._softmax(func, *args, **kwargs)
            if func in _PRODUCT and len(args) == 2:
                return self._product(func, *args)
        return func(*args, **kwargs)

    def _fused(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if query.shape[-2] != key.shape[-2]:
            return func(query, key, value, attn_mask, *args, **kwargs)
        if args[1:2] == (True,) or kwargs.get("is_causal"):
            raise NotImplementedError("causal attention in a block cannot be watched")
        bias = self._bias(len(query), key.shape[-2], query)
        mask = attn_mask if bias is None else _added(bias[:, None, None], attn_mask)
        scale = kwargs.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = query.float() @ _every_head(key, query).float().transpose(-2, -1) * scale
        weights = (logits if mask is None else _added(logits, mask)).softmax(-1)
        self._keep(weights, key, value)
        return func(query, key, value, mask, *args, **kwargs)

    def _softmax(self, func: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        bias = self._bias(len(logits), logits.shape[-1], logits)
        if bias is not None:
            logits = logits + bias[:, None, None]
        weights = func(logits, *args, **kwargs)
        self._keep(weights, self.compared, None)
        return weights

    def _product(self, func: Any, first: Tensor, second: Tensor) -> Any:
        product = func(first, second)
        paid = self.trace.paid[self.layer] if self.layer is not None else []
        if paid and paid[-1].value is None and _square(first) and _square(paid[-1].weights):
            if first.shape == paid[-1].weights.shape:
                paid[-1] = replace(paid[-1], value=second)
        elif _square(product):
            self.compared = second.transpose(-2, -1)
        return product

    def _multi_head(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`nn.MultiheadAttention`: [tokens, batch, dim]."""
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        named = given.arguments
        query, key, heads = named["query"], named["key"], named["num_heads"]
        if named["use_separate_proj_weight"] or query is not key or key is not named["value"]:
            return func(*args, **kwargs)
        tokens, batch, _ = query.shape
        bias = self._bias(batch, tokens, query)
        if bias is not None:
            named["key_padding_mask"] = _added(bias, named["key_padding_mask"])
        projected = F.linear(query, named["in_proj_weight"], named["in_proj_bias"])
        parts = projected.view(tokens, batch, 3, heads, -1).permute(2, 1, 3, 0, 4)
        logits = parts[0] @ parts[1].transpose(-2, -1) * parts.shape[-1] ** -0.5
        if named["attn_mask"] is not None:
            mask = named["attn_mask"]
            mask = mask.view(batch, heads, tokens, tokens) if mask.ndim == 3 else mask
            logits = _added(logits, mask)
        if named["key_padding_mask"] is not None:
            padding = named["key_padding_mask"][:, None, None]
            # Here, True says that a key is hidden.
            logits = _added(logits, ~padding if padding.dtype == torch.bool else padding)
        self._keep(logits.float().softmax(-1), parts[1], parts[2])
        return func(*given.args, **given.kwargs)

    def _bias(self, batch: int, tokens: int, like: Tensor) -> Tensor | None:
        if self.changes.bias is None or self.layer is None:
            return None
        bias = self.changes.bias(self.layer, batch)
        if bias is None or bias.shape[1] != tokens:
            return None
        return bias.to(like)

    def _keep(self, weights: Tensor, key: Tensor | None, value: Tensor | None) -> None:
        assert self.layer is not None
        self.trace.paid[self.layer].append(Paid(weights.float(), key, value))
        self.compared = None


def _square(x: Tensor) -> bool:
    """Whether a tensor may be attention between tokens: [batch, heads, tokens, tokens]."""
    return x.ndim == 4 and x.shape[-1] == x.shape[-2]


def _every_head(key: Tensor, query: Tensor) -> Tensor:
    """The keys, as often as there are queries that share them."""
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1) if key.ndim == 4 else key


def _added(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits under a mask: bool (True: may be seen), or added to them."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return torch.where(mask, logits, -torch.inf)
    return logits + mask
