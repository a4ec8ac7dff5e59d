"""timm's VisionTransformerSAM (`samvit_*`), classifiers and feature extractors.

Most of its blocks attend in windows, a few to the whole feature map. Tokens are reduced before a
block, in every window by itself, as in Liang et al., "Expediting Large-Scale Vision Transformer for
Dense Prediction without Fine-tuning" (section 3); blocks in between attend in windows of the
reduced size, or to the whole of the reduced map. Tables of relative positions are resized to either
by the host itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tokred.engine import Seen, Step
from tokred.host import WindowedHost

from . import _timm as common


def forward(block: Any, step: Step, x: Tensor) -> Tensor:
    """`timm.models.vision_transformer_sam.Block.forward` (timm 1.0.16 to 1.0.31), of tokens [batch,
    rows, columns, dim], in windows of their size."""
    few, seen = step.window, block
    if few is not None and block.window_size > 0:
        seen = Seen(block, window_size=few[0])
    return type(block).forward(seen, x)


def stages(model: Any) -> list[Sequence[nn.Module]]:
    return [list(model.blocks)]


def window(block: Any) -> tuple[int, int] | None:
    return (block.window_size, block.window_size) if block.window_size > 0 else None


def refuse(model: Any, signals: frozenset[str]) -> str | None:
    for number, block in enumerate(model.blocks):
        if block.attn.rope is not None:
            return f"the rotary positions of block {number} are made for windows of its own size"
    return None


HOST = WindowedHost(
    models=("timm.models.vision_transformer_sam.VisionTransformerSAM",),
    forwards={"timm.models.vision_transformer_sam.Block": forward},
    stages=stages,
    window=window,
    grid=common.grid,
    layout=common.layout_of_map,
    methods={"forward_intermediates": common.forward_intermediates},
    refuse=refuse,
    summary="SAM's vision transformer (`samvit_*`)",
)
