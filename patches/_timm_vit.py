"""The blocks of timm's VisionTransformer, alone and inside of other models. (No patch itself.)"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock
from torch import Tensor, nn

from tokred.engine import Step

from . import _timm as common


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
    mask = common.bias(step, x, attn_mask, is_causal)
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
    mask = common.bias(step, x, attn_mask, is_causal)
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
    mask = common.bias(step, x, attn_mask, is_causal)
    return step.reduce(type(block).forward(block, x, attn_mask=mask))


def attention_of(block: Any) -> Any:
    """Where a block keeps its heads and its scale: a parallel one computes attention by itself."""
    return block if isinstance(block, ParallelScalingBlock) else block.attn


def explicit(block: Any) -> nn.Module | None:
    return None if isinstance(block, ParallelScalingBlock) else common.explicit(block)


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


BLOCKS: dict[str, Any] = {
    "forwards": {
        "timm.models.vision_transformer.Block": forward,
        "timm.models.vision_transformer.ResPostBlock": forward_post_norm,
        "timm.models.vision_transformer.ParallelScalingBlock": forward_parallel,
    },
    "taps": {
        "key": ("attn.k_norm", "k_norm"),
        "query": ("attn.q_norm", "q_norm"),
        "value": ("attn.qkv", "in_proj"),
    },
    "reads": {"key": normed, "query": normed, "value": value},
    "explicit": explicit,
    "scale": lambda block: float(attention_of(block).scale),
}
"""The fields of `Host` that are about blocks."""
