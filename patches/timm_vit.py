"""timm's VisionTransformer: ViT, DeiT, AugReg, MAE, CLIP, SigLIP, DINOv2 (with registers).

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from timm.layers import GlobalResponseNormMlp
from timm.layers.mlp import ConvMlp
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from tokred.engine.run import Layout, Reduction, Step, needed_for_pooling
from tokred.host.host import Host


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


def forward_post_norm(
    block: ResPostBlock,
    step: Step,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`timm.models.vision_transformer.ResPostBlock.forward` (timm 1.0.16 to 1.0.31), with the
    seam: norms stand behind attention and MLP."""
    if is_causal:
        raise ValueError("is_causal=True is not supported: merged tokens have no place in an order")
    mask = step.bias(x, attn_mask)
    attention = step.attend(block.attn, x, block.attn.num_heads)
    x = x + block.drop_path1(block.norm1(attention(x, attn_mask=mask)))
    x = step.reduce(x)
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def forward_parallel(
    block: ParallelScalingBlock,
    step: Step,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`timm.models.vision_transformer.ParallelScalingBlock.forward` (timm 1.0.16 to 1.0.31):
    attention and MLP run side by side, so that tokens are reduced behind both."""
    if is_causal:
        raise ValueError("is_causal=True is not supported: merged tokens have no place in an order")
    mask = step.bias(x, attn_mask)
    return step.reduce(type(block).forward(block, x, attn_mask=mask))


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
    pool_type: str | None = None,
) -> Tensor:
    """What the head pools, see `pooled`."""
    chosen = model.global_pool if pool_type is None else pool_type
    patches = model.attn_pool is not None or chosen not in ("", "token")
    state = reduction.carried(x)
    if (
        state is not None
        and state.prunes
        and getattr(model.attn_pool, "pos_embed", None) is not None
    ):
        raise ValueError(
            "this model's attention pooling has position embeddings, which would shift when "
            "tokens are dropped: use a method that merges, such as 'tome'"
        )
    return pooled(reduction, lambda y: original(model, y, pool_type), x, patches)


def pooled(
    reduction: Reduction, call: Callable[[Tensor], Tensor], x: Tensor, patches: bool
) -> Tensor:
    """A head that pools patch tokens: merged ones as often as the tokens they stand for (the full
    grid of copies gives just that), dropped ones not at all.

    Args:
        reduction: what is applied.
        call: the head.
        x: the features.
        patches: whether it pools patch tokens at all, now.
    """
    state = reduction.carried(x)
    reduction.forget()
    if patches and state is not None:
        reduction.check_pooling(state)
    if not patches or state is None or not needed_for_pooling(state):
        return call(x)
    if not state.prunes:
        return call(reduction.expand(x, state))
    x = reduction.compress(x, state)
    if state.size is not None and bool((state.size == 0).any()):
        # Padding has no part in an average, and no pooling module can be told of it.
        counts = (reduction.layout.prefix + (state.size > 0).sum(1)).tolist()
        return torch.cat([call(y[:, :n]) for y, n in zip(x.split(1), counts, strict=True)])
    return call(x)


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


def attention_of(block: Any) -> Any:
    """Where a block keeps its heads and its scale: a parallel one computes attention by itself."""
    return block if isinstance(block, ParallelScalingBlock) else block.attn


def explicit(block: Any) -> nn.Module | None:
    """timm's own attention with its switch turned; weights, submodules and hooks are shared."""
    if isinstance(block, ParallelScalingBlock) or not getattr(block.attn, "fused_attn", False):
        return None
    twin = copy.copy(block.attn)
    twin.fused_attn = False
    return cast(nn.Module, twin)


def normed(block: Any, output: Tensor) -> Tensor:
    """Queries or keys, from the output of their norm."""
    return output.transpose(1, 2) if isinstance(block, ParallelScalingBlock) else output


def value(block: Any, output: Tensor) -> Tensor:
    """The values, from the output of the one projection that makes queries, keys and values, and
    in a parallel block what goes into the MLP."""
    attention = attention_of(block)
    if block is attention:
        output = output[..., -3 * attention.num_heads * attention.head_dim :]
    return output.unflatten(-1, (3, attention.num_heads, -1))[:, :, 2].transpose(1, 2)


def refuse(model: VisionTransformer, signals: frozenset[str]) -> str | None:
    if not hasattr(model, "norm"):
        return "it has no norm behind its blocks, and pools tokens by itself"
    for layer, block in enumerate(model.blocks):
        if isinstance(block, ParallelScalingBlock):
            continue
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
    forwards={
        "timm.models.vision_transformer.Block": forward,
        "timm.models.vision_transformer.ResPostBlock": forward_post_norm,
        "timm.models.vision_transformer.ParallelScalingBlock": forward_parallel,
    },
    blocks=lambda model: list(model.blocks),
    layout=layout,
    taps={
        "key": ("attn.k_norm", "k_norm"),
        "query": ("attn.q_norm", "q_norm"),
        "value": ("attn.qkv", "in_proj"),
    },
    reads={"key": normed, "query": normed, "value": value},
    explicit=explicit,
    scale=lambda block: float(attention_of(block).scale),
    passes=_passes,
    methods={
        "forward_intermediates": forward_intermediates,
        "pool": pool,
        "set_input_size": set_input_size,
        "prune_intermediate_layers": prune_intermediate_layers,
    },
    refuse=refuse,
    summary="ViT, DeiT (I, III, distilled), AugReg, MAE, CLIP, SigLIP, DINOv2 (with registers)",
)
