"""torchvision's SwinTransformer, versions 1 and 2.

Tokens are reduced before a block, in every window by itself, as in Liang et al., "Expediting
Large-Scale Vision Transformer for Dense Prediction without Fine-tuning" (section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tokred.engine.run import Layout, Step
from tokred.engine.windows import Seen, coordinates, few_of, relative_positions, resized, shifts
from tokred.host.host import Host, is_a


def forward(block: Any, step: Step, x: Tensor) -> Tensor:
    """The forward of `torchvision.models.swin_transformer.SwinTransformerBlock` and
    `SwinTransformerBlockV2` (torchvision 0.21 to 0.30): windows are a matter of their attention."""
    return type(block).forward(block, x)


def attend(attention: Any, step: Step, x: Tensor) -> Tensor:
    """The forward of `ShiftedWindowAttention` and `ShiftedWindowAttentionV2`, of tokens [batch,
    rows, columns, dim], in windows of their size."""
    few, seen = few_of(step), attention
    if few is not None:
        own = window(attention)
        if is_a(attention, (V2_ATTENTION,)):
            like = attention.relative_coords_table
            replaced = {"relative_coords_table": coordinates(own, few, (0, 0), like)}
        else:
            table = resized(attention.relative_position_bias_table, own, few)
            replaced = {"relative_position_bias_table": table}
        seen = Seen(
            attention,
            window_size=list(few),
            shift_size=list(shifts(attention.shift_size, few)),
            relative_position_index=relative_positions(few, x.device).flatten(),
            **replaced,
        )
    return type(attention).forward(seen, x)


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
V2_ATTENTION = f"{MODULE}.ShiftedWindowAttentionV2"
BLOCKS = (f"{MODULE}.SwinTransformerBlock", f"{MODULE}.SwinTransformerBlockV2")

HOST = Host(
    models=(f"{MODULE}.SwinTransformer",),
    forwards=dict.fromkeys(BLOCKS, forward),
    blocks=lambda model: [],
    stages=stages,
    window=lambda block: window(block.attn),
    grid=grid,
    layout=layout,
    scale=lambda block: 1.0,
    attention=lambda block: block.attn,
    attend=attend,
    summary="Swin, SwinV2",
)
