"""What timm's Eva and NaFlexVit have in common. (No patch itself.)"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GlobalResponseNormMlp
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import ConvMlp
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor

from tokred.engine.run import Step


def forward_eva(
    block: Any,
    step: Step,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`timm.models.eva.EvaBlock.forward` (timm 1.0.16 to 1.0.31), with the seam."""
    mask = bias(step, x, attn_mask, is_causal)
    y = rotary(block.attn, step, block.norm1(x), rope, mask)
    if block.gamma_1 is not None:
        y = block.gamma_1 * y
    x = x + block.drop_path1(y)
    x = step.reduce(x)
    y = block.mlp(block.norm2(x))
    if block.gamma_2 is not None:
        y = block.gamma_2 * y
    return x + block.drop_path2(y)


def bias(step: Step, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """What to add to the logits of a block's attention."""
    if is_causal:
        raise ValueError("is_causal=True is not supported: merged tokens have no place in an order")
    return step.bias(x, attn_mask)


def rotary(
    attention: Any, step: Step, x: Tensor, rope: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The host's own attention, `EvaAttention` or `AttentionRope`, with the rotations of those
    tokens that are left."""
    if rope is not None:
        rope = step.rows(rope)
        if step.wants_signals:
            turn = rope
            step.rotate = lambda heads: rotated(attention, heads, turn)
    show_value(attention, step, x)
    return step.attend(attention, x, attention.num_heads)(x, rope=rope, attn_mask=mask)


def rotated(attention: Any, heads: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys as attention rotates them: all but those of the prefix tokens."""
    prefix = attention.num_prefix_tokens
    # Older versions know only one layout, and no word for it.
    half = {"half": True} if getattr(attention, "rotate_half", False) else {}
    turned = apply_rot_embed_cat(heads[:, :, prefix:], rope, **half)
    return torch.cat([heads[:, :, :prefix], turned], 2)


def show_value(attention: Any, step: Step, x: Tensor) -> None:
    """Shows the values, if the method wants them: projected once more, because `EvaAttention` uses
    the weights of its projection without calling it."""
    if not step.wants_signals or "value" not in step.reduction.reducer.needs:
        return
    if attention.qkv is None:
        value = attention.v_proj(x)
    elif getattr(attention, "v_bias", None) is None:
        value = attention.qkv(x).chunk(3, -1)[2]
    else:
        value = F.linear(x, attention.qkv.weight.chunk(3)[2], attention.v_bias)
    heads = getattr(attention, "num_kv_heads", attention.num_heads)
    step.see(value=_every_head(attention, value.unflatten(-1, (heads, -1)).transpose(1, 2)))


def key(block: Any, output: Tensor) -> Tensor:
    """The keys, from the output of their norm."""
    return _every_head(block.attn, output)


def _every_head(attention: Any, heads: Tensor) -> Tensor:
    """Where several heads of queries share one of keys and values: that one as often."""
    groups = getattr(attention, "num_kv_groups", 1)
    return heads if groups == 1 else heads.repeat_interleave(groups, 1)


def refuse(model: Any, signals: frozenset[str]) -> str | None:
    """Why the blocks of a model cannot be patched; None if they can."""
    for layer, block in enumerate(model.blocks):
        attention = type(block.attn)
        if "attn_mask" not in inspect.signature(attention.forward).parameters or not hasattr(
            block.attn, "k_norm"
        ):
            return f"block {layer} has {attention.__qualname__}, which takes no attn_mask"
        known = (Attention.forward, EvaAttention.forward, AttentionRope.forward)
        if signals - {"key"} and inspect.unwrap(attention.forward) not in known:
            return f"the attention that {attention.__qualname__} pays is not known (block {layer})"
        if isinstance(block.mlp, GlobalResponseNormMlp | ConvMlp):
            return f"the MLP of block {layer} mixes tokens ({type(block.mlp).__qualname__})"
    return None
