"""ViTDet of transformers, model and backbone (of ViTMatte, for example).

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


def forward(
    layer: Any, step: Step, hidden_states: Tensor, output_attentions: bool = False
) -> tuple[Tensor, ...]:
    """`transformers.models.vitdet.modeling_vitdet.VitDetLayer.forward` (transformers 5.9 to 5.23),
    in windows of the size of its tokens."""
    few = step.window
    # Whoever checkpoints it has called us.
    seen = Seen(layer) if common.checkpoint(layer) else layer
    if few is not None and layer.window_size > 0:
        seen = Seen(layer, window_size=few[0])
    return type(layer).forward(seen, hidden_states, output_attentions)


def handed_out(model: Any, args: Any, kwargs: Any) -> frozenset[int]:
    """The layers whose output a call hands out: of a backbone, those that it was built for. Of all
    hidden states, the first is what enters the first layer."""
    asked = kwargs.get("output_hidden_states", args[1] if len(args) > 1 else None)
    if asked is None:
        asked = model.config.output_hidden_states
    if asked:
        return frozenset(range(len(model.encoder.layer)))
    if not is_a(model, (BACKBONE,)):
        return frozenset()
    return frozenset(model.stage_names.index(name) - 1 for name in model.out_features)


def stages(model: Any) -> list[Sequence[nn.Module]]:
    return [list(model.encoder.layer)]


def grid(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
    return int(x.shape[2]), int(x.shape[3])


def refuse(model: Any, signals: frozenset[str]) -> str | None:
    for number, layer in enumerate(model.encoder.layer):
        if layer.use_residual_block:
            return (
                f"layer {number} convolves over the feature map (residual_block_indices), which "
                "cannot be told that the cells of a reduced one are larger"
            )
    return None


BACKBONE = "transformers.models.vitdet.modeling_vitdet.VitDetBackbone"

HOST = WindowedHost(
    models=("transformers.models.vitdet.modeling_vitdet.VitDetModel", BACKBONE),
    forwards={"transformers.models.vitdet.modeling_vitdet.VitDetLayer": forward},
    stages=stages,
    window=common.window,
    grid=grid,
    channels_first=True,
    layout=common.layout_of_map,
    handed_out=handed_out,
    checkpoint=common.checkpoint,
    refuse=refuse,
    summary="ViTDet, model and backbone (ViTMatte)",
)
