"""What timm's models have in common. (No patch itself.)"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import GlobalResponseNormMlp
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import ConvMlp
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models._features import feature_take_indices
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from tokred.engine import Layout, Reduction, Step, pooled


def layout_of(
    model: Any, image_size: tuple[int, int] | None, class_token: bool, by_position: bool = False
) -> Layout:
    """The layout of a model with prefix tokens and `patch_embed`."""
    rows, columns = model.patch_embed.grid_size
    if image_size is not None:
        rows, columns = model.patch_embed.dynamic_feat_size(image_size)
    return Layout(
        prefix=model.num_prefix_tokens,
        layers=len(model.blocks),
        grid=(int(rows), int(columns)),
        class_token=class_token,
        by_position=by_position,
    )


def layout_of_map(model: Any, image_size: tuple[int, int] | None) -> Layout:
    """The patches of an image, in a model whose blocks attend in windows."""
    rows, columns = model.patch_embed.grid_size
    if image_size is not None:
        rows, columns = model.patch_embed.dynamic_feat_size(image_size)
    return Layout(prefix=0, layers=1, grid=(int(rows), int(columns)), class_token=False)


def grid(block: Any, x: Tensor) -> tuple[int, int]:
    """Rows and columns of tokens [batch, rows, columns, dim]."""
    return int(x.shape[1]), int(x.shape[2])


def blocks(model: Any) -> list[nn.Module]:
    return list(model.blocks)


def norm(model: Any) -> list[nn.Module]:
    """What tokens pass behind the last block."""
    return [model.norm]


def scale(block: Any) -> float:
    return float(block.attn.scale)


# Methods of models


def forward_intermediates(
    reduction: Reduction,
    original: Callable[..., Any],
    model: Any,
    x: Any,
    indices: int | list[int] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Full grids at the layers that are asked for. Also serves `get_intermediate_layers` and
    `features_only` models, which call it."""
    layers, _ = feature_take_indices(reduction.layout.layers, indices)
    tapped = frozenset(layers)
    return reduction.handing_out(tapped, original, model, x, indices, *args, **kwargs)


def pool(
    reduction: Reduction,
    original: Callable[..., Tensor],
    model: Any,
    x: Tensor,
    pool_type: str | None = None,
) -> Tensor:
    """What the head pools."""
    return pooled(
        reduction,
        x,
        lambda seen: original(model, seen, pool_type),
        patches=pools_patches(model, pool_type),
        positions=getattr(model.attn_pool, "pos_embed", None) is not None,
    )


def pools_patches(model: Any, pool_type: str | None) -> bool:
    """Whether a model pools its patch tokens, rather than take a prefix token."""
    chosen = model.global_pool if pool_type is None else pool_type
    return model.attn_pool is not None or chosen not in ("", "token")


def forward_head(
    reduction: Reduction,
    original: Callable[..., Tensor],
    model: Any,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The head of a model that pools inside of it."""
    return pooled(
        reduction,
        x,
        lambda seen: original(model, seen, *args, **kwargs),
        patches=model.global_pool == "avg",
    )


def set_input_size(
    reduction: Reduction, original: Callable[..., None], model: Any, *args: Any, **kwargs: Any
) -> None:
    """The reduction goes on, on the new grid."""
    original(model, *args, **kwargs)
    rows, columns = model.patch_embed.grid_size
    reduction.layout = replace(reduction.layout, grid=(int(rows), int(columns)))


def prune_intermediate_layers(
    reduction: Reduction, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any
) -> None:
    """Refused: another block would be the last one."""
    raise RuntimeError(
        "blocks cannot be cut off while a reduction is applied, which is laid out for "
        f"{reduction.layout.layers} of them: call tokred.remove(model) first, and tokred.apply "
        "again afterwards"
    )


# Blocks and attention


def explicit(block: Any) -> nn.Module | None:
    """timm's own attention with its switch turned; weights, submodules and hooks are shared."""
    if not getattr(block.attn, "fused_attn", False):
        return None
    twin = copy.copy(block.attn)
    twin.fused_attn = False
    return cast(nn.Module, twin)


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
        (rope,) = step.rotary(partial(rotated, attention), rope)
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
    if not step.wants("value"):
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
        if not hasattr(block, "attn"):  # a parallel block computes attention by itself
            continue
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
