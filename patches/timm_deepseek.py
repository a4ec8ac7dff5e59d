"""timm's DeepSeek vision transformers (V4, V4.1): the encoder, alone and in its classifier.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3). A merged
token has the rotary position of its first member.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokred.engine import Layout, Step
from tokred.host import Host, is_a

from . import _timm as common


def forward(block: Any, step: Step, x: Tensor, rope: Tensor | None = None) -> Tensor:
    """`timm.models.deepseek_vit.DeepseekVitBlock.forward` (timm 1.0.31), with the seam."""
    attention = common.rotary(block.attn, step, block.norm1(x), rope, step.bias(x))
    x = x + block.drop_path1(attention)
    x = step.reduce(x)
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    return common.layout_of(model, image_size, class_token=False, by_position=True)


def merges_only(root: Any, model: Any) -> str | None:
    """The classifier, and an encoder that is set up for it, average the tokens on their grid."""
    if model.global_pool == "avg" or is_a(root, (f"{_MODULE}.DeepseekVitClassifier",)):
        return (
            "its tokens are averaged on their grid, where dropped ones would count: use a method "
            "that merges, such as 'tome'"
        )
    return None


_MODULE = "timm.models.deepseek_vit"

HOST = Host(
    models=(f"{_MODULE}.DeepseekVitEncoder",),
    forwards={f"{_MODULE}.DeepseekVitBlock": forward},
    blocks=common.blocks,
    layout=layout,
    scale=common.scale,
    taps={"key": "attn.k_norm", "query": "attn.q_norm"},
    reads={"key": common.key},
    shows=frozenset({"value"}),
    explicit=common.explicit,
    passes=common.norm,
    merges_only=merges_only,
    full_grid_only=lambda root, model: "it lays its features out as [batch, rows, columns, dim]",
    methods={
        "forward_intermediates": common.forward_intermediates,
        "prune_intermediate_layers": common.prune_intermediate_layers,
    },
    refuse=common.refuse,
    summary="DeepSeek-V4's vision encoder, and classifiers on it",
)
