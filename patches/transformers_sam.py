"""SAM's vision encoder of transformers, alone and in what is built on it: SAM, SAM-HQ, GOT-OCR 2,
DeepSeek-OCR 2, Unlimited-OCR, SLANeXt, PP-FormulaNet.

Most of its layers attend in windows, a few to the whole feature map. Tokens are reduced before a
layer, in every window by itself, as in Liang et al., "Expediting Large-Scale Vision Transformer for
Dense Prediction without Fine-tuning" (section 3); layers in between attend in windows of the
reduced size, or to the whole of the reduced map. Tables of relative positions are resized to either
by the host itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tokred.engine import Seen, Step
from tokred.host import WindowedHost, is_a

from . import _transformers as common


def forward(layer: Any, step: Step, hidden_states: Tensor) -> Tensor:
    """`transformers.models.sam.modeling_sam.SamVisionLayer.forward` (transformers 5.9 to 5.23), in
    windows of the size of its tokens; the others of this file are the same."""
    few = step.window
    # Whoever checkpoints it has called us.
    seen = Seen(layer) if common.checkpoint(layer) else layer
    if few is not None and layer.window_size > 0:
        seen = Seen(layer, window_size=few[0])
    return type(layer).forward(seen, hidden_states)


def is_read(layer: Any) -> bool:
    """Whether the decoder reads what leaves a layer: SAM-HQ's those that attend to the whole
    map."""
    return is_a(layer, (f"{_SAM_HQ}Layer",)) and layer.window_size == 0


def stages(model: Any) -> list[Sequence[nn.Module]]:
    return [list(model.layers)]


def grid(layer: Any, x: Tensor) -> tuple[int, int]:
    return int(x.shape[1]), int(x.shape[2])


_MODELS = "transformers.models"
_SAM_HQ = f"{_MODELS}.sam_hq.modeling_sam_hq.SamHQVision"
_PREFIXES = (
    f"{_MODELS}.sam.modeling_sam.SamVision",
    _SAM_HQ,
    f"{_MODELS}.got_ocr2.modeling_got_ocr2.GotOcr2Vision",
    f"{_MODELS}.deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVision",
    f"{_MODELS}.unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVision",
    f"{_MODELS}.slanext.modeling_slanext.SLANeXtVision",
    f"{_MODELS}.pp_formulanet.modeling_pp_formulanet.PPFormulaNetVision",
)

forward_hq = forward  # models that were pickled with version 0.7 look for it

HOST = WindowedHost(
    models=tuple(
        prefix + ("Model" if "PPFormulaNet" in prefix else "Encoder") for prefix in _PREFIXES
    ),
    forwards={f"{prefix}Layer": forward for prefix in _PREFIXES},
    stages=stages,
    window=common.window,
    grid=grid,
    layout=common.layout_of_map,
    always_full=is_read,
    tapped=common.tapped,
    checkpoint=common.checkpoint,
    summary="SAM, SAM-HQ, and others on SAM's vision encoder (GOT-OCR 2, DeepSeek-OCR 2, SLANeXt)",
)
