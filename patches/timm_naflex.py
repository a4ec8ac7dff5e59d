"""timm's NaFlexVit: images of any size and shape, alone or padded to one length.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3). Of a padded
batch every image is reduced as if it came alone; padding is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tokred.engine import (
    Layout,
    Reduction,
    Step,
    in_a_graph,
    outside_of_the_graph,
    pooled_with_mask,
    tokens_there,
)
from tokred.host import Host

from . import _timm as common


def forward(
    block: Any,
    step: Step,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`timm.models.vision_transformer.Block.forward` (timm 1.0.16 to 1.0.31), with the seam."""
    mask = common.bias(step, x, attn_mask, is_causal)
    y = block.norm1(x)
    common.show_value(block.attn, step, y)
    attention = step.attend(block.attn, x, block.attn.num_heads)
    x = x + block.drop_path1(block.ls1(attention(y, attn_mask=mask)))
    x = step.reduce(x)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


# Where a model says nothing of the size of its images.
_ANY = (16, 16)


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    grid = model.embeds.pos_embed_grid_size or _ANY
    if image_size is not None:
        grid = model.embeds.dynamic_feat_size(image_size)
    return Layout(
        prefix=model.num_prefix_tokens,
        layers=len(model.blocks),
        grid=(int(grid[0]), int(grid[1])),
        class_token=model.has_class_token,
        by_position=getattr(model, "rope", None) is not None,  # not in timm 1.0.16
    )


PADDED = "images of a padded batch have different numbers of tokens"


def forward_features(
    reduction: Reduction,
    original: Callable[..., Any],
    model: Any,
    patches: Tensor,
    patch_coord: Tensor | None = None,
    patch_valid: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Any:
    """The features, and which of them are not padding."""
    if in_a_graph(patches) and patch_coord is not None:
        again = (reduction, original, model, patches, patch_coord, patch_valid, attn_mask)
        return outside_of_the_graph(PADDED, forward_features, *again)
    features = original(model, patches, patch_coord, patch_valid, attn_mask)
    if isinstance(features, dict):
        there = tokens_there(reduction, features["patches"])
        if there is not None:
            features["patch_valid"] = there
    return features


def forward_intermediates(
    reduction: Reduction,
    original: Callable[..., Any],
    model: Any,
    x: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Full grids at the layers that are asked for."""
    call: Callable[..., Any] = common.forward_intermediates
    if (isinstance(x, dict) or "patch_coord" in kwargs) and in_a_graph(
        x["patches"] if isinstance(x, dict) else x
    ):
        return outside_of_the_graph(PADDED, call, reduction, original, model, x, *args, **kwargs)
    return call(reduction, original, model, x, *args, **kwargs)


def pool(
    reduction: Reduction,
    original: Callable[..., Tensor],
    model: Any,
    x: Tensor,
    pool_type: str | None = None,
    patch_valid: Tensor | None = None,
) -> Tensor:
    """What the head pools, which is told of padding."""
    if in_a_graph(x) and patch_valid is not None:
        again = (reduction, original, model, x, pool_type, patch_valid)
        return outside_of_the_graph(PADDED, pool, *again)
    return pooled_with_mask(
        reduction,
        x,
        lambda seen, there: original(model, seen, pool_type, there),
        patch_valid,
        patches=common.pools_patches(model, pool_type),
    )


HOST = Host(
    models=("timm.models.naflexvit.NaFlexVit",),
    forwards={
        "timm.models.vision_transformer.Block": forward,
        "timm.models.eva.EvaBlock": common.forward_eva,
    },
    blocks=common.blocks,
    layout=layout,
    taps={"key": "attn.k_norm", "query": "attn.q_norm"},
    reads={"key": common.key},
    shows=frozenset({"value"}),
    explicit=common.explicit,
    scale=common.scale,
    passes=common.norm,
    methods={
        "forward_features": forward_features,
        "forward_intermediates": forward_intermediates,
        "_pool": pool,
        "prune_intermediate_layers": common.prune_intermediate_layers,
    },
    pads=True,
    refuse=common.refuse,
    summary="NaFlexVit (SigLIP 2, SO150M2, RADIO), images of any shape, padded or not",
)
