"""timm's VisionTransformer: ViT, DeiT, AugReg, MAE, CLIP, SigLIP, DINOv2 (with registers).

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers import GlobalResponseNormMlp
from timm.layers.mlp import ConvMlp
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from tokred.host import Host
from tokred.run import Layout, Reduction, Step, needed_for_pooling


def forward(
    block: Block,
    step: Step,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`timm.models.vision_transformer.Block.forward` (timm 1.0.16 to 1.0.31), with the seam.

    Everything that a block may have (LayerScale, DropPath, QK-norm, fused attention) is called
    through its own submodules.
    """
    if is_causal:
        raise ValueError("is_causal=True is not supported: merged tokens have no place in an order")
    mask = step.bias(x, attn_mask)
    attention = step.attend(block.attn, x, block.attn.num_heads)
    x = x + block.drop_path1(block.ls1(attention(block.norm1(x), attn_mask=mask)))
    x = step.reduce(x)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def layout(model: VisionTransformer, image_size: tuple[int, int] | None) -> Layout:
    grid = model.patch_embed.grid_size
    if image_size is not None:
        grid = model.patch_embed.dynamic_feat_size(image_size)
    return Layout(
        prefix=model.num_prefix_tokens,
        layers=len(model.blocks),
        grid=(int(grid[0]), int(grid[1])),
        class_token=model.has_class_token,
    )


def forward_intermediates(
    reduction: Reduction,
    original: Callable[..., Any],
    model: VisionTransformer,
    x: Tensor,
    indices: int | list[int] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Full grids at the layers that are asked for. Also serves `get_intermediate_layers` and
    `features_only` models, which call it."""
    layers, _ = feature_take_indices(reduction.layout.layers, indices)
    reduction.set_tapped(frozenset(layers))
    try:
        return original(model, x, indices, *args, **kwargs)
    finally:
        reduction.set_tapped(frozenset())


def pool(
    reduction: Reduction,
    original: Callable[..., Tensor],
    model: VisionTransformer,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """What the head pools: merged tokens as often as the tokens they stand for (the full grid of
    copies gives just that), dropped tokens not at all."""
    state = reduction.carried(x)
    reduction.forget()
    takes_class_token = model.attn_pool is None and model.global_pool == "token"
    if state is not None and needed_for_pooling(state) and not takes_class_token:
        if state.prunes and getattr(model.attn_pool, "pos_embed", None) is not None:
            raise ValueError(
                "this model's attention pooling has position embeddings, which would shift when "
                "tokens are dropped: use a method that merges, such as 'tome'"
            )
        x = reduction.compress(x, state) if state.prunes else reduction.expand(x, state)
        if state.prunes and state.size is not None and bool((state.size == 0).any()):
            # Padding has no part in an average, and no pooling module can be told of it.
            counts = (reduction.layout.prefix + (state.size > 0).sum(1)).tolist()
            alone = zip(x.split(1), counts, strict=True)
            return torch.cat([original(model, y[:, :n], *args, **kwargs) for y, n in alone])
    return original(model, x, *args, **kwargs)


def explicit(block: Block) -> nn.Module | None:
    """timm's own attention with its switch turned; weights, submodules and hooks are shared."""
    if not getattr(block.attn, "fused_attn", False):
        return None
    twin = copy.copy(block.attn)
    twin.fused_attn = False
    return cast(nn.Module, twin)


def value(block: Block, qkv: Tensor) -> Tensor:
    """The values, from the output of the one projection that makes queries, keys and values."""
    return qkv.unflatten(-1, (3, block.attn.num_heads, block.attn.head_dim))[:, :, 2].transpose(
        1, 2
    )


def refuse(model: VisionTransformer, signals: frozenset[str]) -> str | None:
    for layer, block in enumerate(model.blocks):
        attention = type(block.attn)
        if "attn_mask" not in inspect.signature(attention.forward).parameters or not hasattr(
            block.attn, "k_norm"
        ):
            return f"block {layer} has {attention.__qualname__}, which takes no attn_mask"
        if signals - {"key"} and attention.forward is not Attention.forward:
            return f"the attention that {attention.__qualname__} pays is not known (block {layer})"
        if isinstance(block.mlp, GlobalResponseNormMlp | ConvMlp):
            return f"the MLP of block {layer} mixes tokens ({type(block.mlp).__qualname__})"
    return None


def _passes(model: VisionTransformer) -> list[nn.Module]:
    return [model.norm]


HOST = Host(
    models=("timm.models.vision_transformer.VisionTransformer",),
    forwards={"timm.models.vision_transformer.Block": forward},
    blocks=lambda model: list(model.blocks),
    layout=layout,
    taps={"key": "attn.k_norm", "query": "attn.q_norm", "value": "attn.qkv"},
    reads={"value": value},
    explicit=explicit,
    scale=lambda block: float(block.attn.scale),
    passes=_passes,
    methods={"forward_intermediates": forward_intermediates, "pool": pool},
    refuse=refuse,
    summary="ViT, DeiT (I, III, distilled), AugReg, MAE, CLIP, SigLIP, DINOv2 (with registers)",
)
