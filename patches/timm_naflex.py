"""timm's NaFlexVit: images of any size and shape, alone or padded to one length.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3). Of a padded
batch every image is reduced as if it came alone; padding is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokred.engine.run import Layout, Reduction, State, Step, needed_for_pooling
from tokred.host.host import Host

from . import _timm as common
from . import timm_vit


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
    if torch.compiler.is_compiling() and patch_coord is not None:
        again = (reduction, original, model, patches, patch_coord, patch_valid, attn_mask)
        return _eagerly(forward_features, *again)
    features = original(model, patches, patch_coord, patch_valid, attn_mask)
    if isinstance(features, dict):
        x = features["patches"]
        state = reduction.carried(x)
        if state is not None and state.trail is not None and not state.expanded:
            few = x.shape[0], x.shape[1] - model.num_prefix_tokens
            valid = torch.ones(few, dtype=torch.bool, device=x.device)
            features["patch_valid"] = valid if state.size is None else state.size > 0
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
    if torch.compiler.is_compiling() and (isinstance(x, dict) or "patch_coord" in kwargs):
        return _eagerly(forward_intermediates, reduction, original, model, x, *args, **kwargs)
    return timm_vit.forward_intermediates(reduction, original, model, x, *args, **kwargs)


def pool(
    reduction: Reduction,
    original: Callable[..., Tensor],
    model: Any,
    x: Tensor,
    pool_type: str | None = None,
    patch_valid: Tensor | None = None,
) -> Tensor:
    """What the head pools: merged tokens as often as the tokens they stand for (the full grid of
    copies gives just that), dropped tokens and padding not at all."""
    if torch.compiler.is_compiling() and patch_valid is not None:
        return _eagerly(pool, reduction, original, model, x, pool_type, patch_valid)
    chosen = model.global_pool if pool_type is None else pool_type
    patches = model.attn_pool is not None or chosen not in ("", "token")
    state = reduction.carried(x)
    reduction.forget()
    if not patches or state is None or not needed_for_pooling(state):
        return original(model, x, pool_type, patch_valid)
    if state.prunes:
        x, size = reduction.compress(x, state), state.size
    else:
        x, size = reduction.expand(x, state), _first_size(state)
    return original(model, x, pool_type, None if size is None else size > 0)


def _first_size(state: State) -> Tensor | None:
    """How many original tokens each patch token of the full grid stood for: 1, or 0 for padding."""
    first = state.trail
    assert first is not None
    while first.former is not None:
        first = first.former
    return first.size


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eagerly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Leaves the graph that is being compiled: how many tokens there are depends on the images."""
    return call(*args, **kwargs)


def _passes(model: Any) -> list[nn.Module]:
    return [model.norm]


HOST = Host(
    models=("timm.models.naflexvit.NaFlexVit",),
    forwards={
        "timm.models.vision_transformer.Block": forward,
        "timm.models.eva.EvaBlock": common.forward_eva,
    },
    blocks=lambda model: list(model.blocks),
    layout=layout,
    taps={"key": "attn.k_norm", "query": "attn.q_norm"},
    reads={"key": common.key},
    shows=frozenset({"value"}),
    explicit=timm_vit.explicit,
    scale=lambda block: float(block.attn.scale),
    passes=_passes,
    methods={
        "forward_features": forward_features,
        "forward_intermediates": forward_intermediates,
        "_pool": pool,
        "prune_intermediate_layers": timm_vit.prune_intermediate_layers,
    },
    pads=True,
    refuse=common.refuse,
    summary="NaFlexVit (SigLIP 2, SO150M2, RADIO), images of any shape, padded or not",
)
