"""timm's SwinTransformer and SwinTransformerV2, classifiers and feature extractors.

Tokens are reduced before a block, in every window by itself, as in Liang et al., "Expediting
Large-Scale Vision Transformer for Dense Prediction without Fine-tuning" (section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tokred.engine import Reduction, Seen, Step, biased, shifts
from tokred.host import WindowedHost, is_a

from . import _timm as common
from ._timm import grid


def forward(block: Any, step: Step, x: Tensor) -> Tensor:
    """The forward of `timm.models.swin_transformer.SwinTransformerBlock` and
    `timm.models.swin_transformer_v2.SwinTransformerV2Block` (timm 1.0.16 to 1.0.31), of tokens
    [batch, rows, columns, dim], in windows of their size."""
    few, seen = step.window, block
    if few is not None:
        seen = Seen(
            block,
            window_size=few,
            window_area=few[0] * few[1],
            shift_size=shifts(block.shift_size, few),
            dynamic_mask=True,  # the stored one is for the block's own windows
        )
    return type(block).forward(seen, x)


def attend(attention: Any, step: Step, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The forward of the two `WindowAttention`, with the biases of windows of their size."""
    return type(attention).forward(biased(attention, step), x, mask)


def stages(model: Any) -> list[Sequence[nn.Module]]:
    """Blocks of every stage; in a feature extractor, stages are parts like any others."""
    return [list(part.blocks) for part in model.modules() if is_a(part, STAGES)]


def has_stages(model: Any) -> bool:
    return bool(stages(model))


def set_input_size(
    reduction: Reduction, original: Callable[..., None], model: Any, *args: Any, **kwargs: Any
) -> None:
    """Refused: windows would be of another size."""
    raise RuntimeError(
        "the input size cannot be set while a reduction is applied, because that may change the "
        "size of the windows: call tokred.remove(model) first, and tokred.apply again afterwards"
    )


STAGES = (
    "timm.models.swin_transformer.SwinTransformerStage",
    "timm.models.swin_transformer_v2.SwinTransformerV2Stage",
)

HOST = WindowedHost(
    models=(
        "timm.models.swin_transformer.SwinTransformer",
        "timm.models.swin_transformer_v2.SwinTransformerV2",
        "timm.models._features.FeatureListNet",
        "timm.models._features.FeatureDictNet",
    ),
    means=has_stages,
    forwards={
        "timm.models.swin_transformer.SwinTransformerBlock": forward,
        "timm.models.swin_transformer_v2.SwinTransformerV2Block": forward,
    },
    stages=stages,
    window=lambda block: (int(block.window_size[0]), int(block.window_size[1])),
    grid=grid,
    layout=common.layout_of_map,
    attention=lambda block: block.attn,
    attend=attend,
    methods={"set_input_size": set_input_size},
    summary="Swin, SwinV2, and feature extractors made of them",
)
