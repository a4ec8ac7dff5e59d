"""open_clip's vision towers: CLIP, CLIPA, MetaCLIP, CoCa.

(Those of its towers that are timm's are found by timm's patches.)
Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from open_clip.utils import feature_take_indices
from torch import Tensor

from tokred.engine import Layout, Reduction, Step, pooled
from tokred.host import Host

from . import _multihead as common


def forward(
    block: Any,
    step: Step,
    q_x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """`open_clip.transformer.ResidualAttentionBlock.forward` (open_clip 2.32 to 3.3), with the
    seam."""
    if k_x is not None or v_x is not None or attn_mask is not None:
        raise ValueError("a vision tower has neither cross-attention nor an attention mask")
    x = q_x + block.ls_1(common.attend(block.attn, step, block.ln_1(q_x)))
    x = step.reduce(x)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def forward_custom(block: Any, step: Step, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """`open_clip.transformer.CustomResidualAttentionBlock.forward` (open_clip 2.32 to 3.3), with
    the seam."""
    if attn_mask is not None:
        raise ValueError("a vision tower has no attention mask")
    normed = block.ln_1(x)
    if step.wants_signals:
        query, key, value = projected(block.attn, normed)
        step.see(query=query, key=key, value=value)
    bias = step.bias(x)
    x = x + block.ls_1(block.ln_attn(block.attn(normed, attn_mask=bias)))
    x = step.reduce(x)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def projected(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as `open_clip.transformer.Attention.forward` compares them."""
    projections = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    parts = projections.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind()
    return attention.ln_q(query), attention.ln_k(key), value


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    height, width = image_size or model.image_size
    rows, columns = model.patch_size
    return Layout(
        prefix=1,
        layers=len(model.transformer.resblocks),
        grid=(height // rows, width // columns),
        class_token=True,
    )


def forward_intermediates(
    reduction: Reduction,
    original: Callable[..., Any],
    model: Any,
    x: Tensor,
    indices: int | list[int] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Full grids at the layers that are asked for."""
    layers, _ = feature_take_indices(reduction.layout.layers, indices)
    tapped = frozenset(layers)
    return reduction.handing_out(tapped, original, model, x, indices, *args, **kwargs)


def pool(
    reduction: Reduction, original: Callable[..., Any], model: Any, x: Tensor
) -> tuple[Tensor, Tensor]:
    """What is pooled, and the tokens that are handed out beside it, which stay what they are."""
    if model.attn_pool is None and model.pool_type == "avg":
        # Images may have different numbers of tokens, which cannot be handed out as they are.
        mean = pooled(reduction, x, lambda seen: original(model, seen)[0])
        return mean, original(model, x)[1] if model.output_tokens else x
    pools = model.attn_pool is not None
    return pooled(reduction, x, lambda seen: original(model, seen), patches=pools)


def refuse(model: Any, signals: frozenset[str]) -> str | None:
    if not hasattr(model, "_pool"):
        return "open_clip 2.32 or newer is needed: older ones pool inside of their forward"
    if not model.transformer.batch_first:
        return "its blocks run with tokens first and the batch second (batch_first=False)"
    for block in model.transformer.resblocks:
        custom = hasattr(block, "ln_attn")
        if custom and not hasattr(block.attn, "ln_k"):
            return "open_clip 3.0 or newer is needed for its custom blocks"
        if custom and block.attn.scaled_cosine:
            return "open_clip's own scaled cosine attention fails on batches"
        reason = None if custom else common.refuse(block.attn, signals)
        if reason:
            return reason
    return None


HOST = Host(
    models=("open_clip.transformer.VisionTransformer",),
    forwards={
        "open_clip.transformer.ResidualAttentionBlock": forward,
        "open_clip.transformer.CustomResidualAttentionBlock": forward_custom,
    },
    blocks=lambda model: list(model.transformer.resblocks),
    layout=layout,
    scale=lambda block: common.scale(block.attn),
    shows=frozenset({"key", "query", "value"}),
    methods={"forward_intermediates": forward_intermediates, "_pool": pool},
    refuse=refuse,
    summary="CLIP, CLIPA, MetaCLIP, CoCa",
)
