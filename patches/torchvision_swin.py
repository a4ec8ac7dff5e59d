"""torchvision's SwinTransformer, versions 1 and 2.

Tokens are reduced before a block, in every window by itself, as in Liang et al., "Expediting
Large-Scale Vision Transformer for Dense Prediction without Fine-tuning" (section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tokred.engine import Layout, Step, biased, shifts
from tokred.host import WindowedHost, is_a


def forward(block: Any, step: Step, x: Tensor) -> Tensor:
    """The forward of `torchvision.models.swin_transformer.SwinTransformerBlock` and
    `SwinTransformerBlockV2` (torchvision 0.21 to 0.30): windows are a matter of their attention."""
    return type(block).forward(block, x)


def attend(attention: Any, step: Step, x: Tensor) -> Tensor:
    """The forward of `ShiftedWindowAttention` and `ShiftedWindowAttentionV2`, of tokens [batch,
    rows, columns, dim], in windows of their size."""
    few = step.window
    replaced = {} if few is None else {"shift_size": list(shifts(attention.shift_size, few))}
    return type(attention).forward(biased(attention, step, **replaced), x)


def stages(model: Any) -> list[Sequence[nn.Module]]:
    """Blocks of every stage: of patches and of what merges them, none is one."""
    parts = [part for part in model.features if isinstance(part, nn.Sequential)]
    return [list(part) for part in parts if is_a(part[0], BLOCKS)]


def window(attention: Any) -> tuple[int, int]:
    rows, columns = attention.window_size
    return int(rows), int(columns)


def grid(block: Any, x: Tensor) -> tuple[int, int]:
    return int(x.shape[1]), int(x.shape[2])


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    """The patches of an image."""
    rows, columns = image_size or (224, 224)
    wide = model.features[0][0].stride
    return Layout(prefix=0, layers=1, grid=(rows // wide[0], columns // wide[1]), class_token=False)


MODULE = "torchvision.models.swin_transformer"
BLOCKS = (f"{MODULE}.SwinTransformerBlock", f"{MODULE}.SwinTransformerBlockV2")

HOST = WindowedHost(
    models=(f"{MODULE}.SwinTransformer",),
    forwards=dict.fromkeys(BLOCKS, forward),
    stages=stages,
    window=lambda block: window(block.attn),
    grid=grid,
    layout=layout,
    attention=lambda block: block.attn,
    attend=attend,
    summary="Swin, SwinV2",
)
