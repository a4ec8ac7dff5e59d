"""Swin, SwinV2 and MaskFormer's Swin of transformers: models, classifiers and backbones, and what
is built on them (Mask2Former, MaskFormer, UperNet).

Tokens are reduced before a layer, in every window by itself, as in Liang et al., "Expediting
Large-Scale Vision Transformer for Dense Prediction without Fine-tuning" (section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tokred.engine import Layout, Seen, Step, biased
from tokred.host import WindowedHost, is_a

from . import _transformers as common


def forward(
    layer: Any, step: Step, hidden_states: Tensor, input_dimensions: tuple[int, int],
    always_partition: bool = False, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`transformers.models.swin.modeling_swin.SwinLayer.forward` (transformers 5.9 to 5.23), in
    windows of the size of its tokens."""
    few = step.window
    # Whoever checkpoints it has called us.
    seen, dimensions = Seen(layer) if checkpoint(layer) else layer, input_dimensions
    if few is not None:
        # What the layer does to itself when it sees a map that is not larger than its windows.
        whole = not always_partition and min(input_dimensions) <= layer.window_size
        shift = 0 if whole or layer.shift_size == 0 else few[0] // 2
        seen = Seen(layer, window_size=few[0], shift_size=shift)
        dimensions, always_partition = step.grid_of(hidden_states), True
    return type(layer).forward(
        seen, hidden_states, dimensions, always_partition=always_partition, **kwargs
    )


def forward_maskformer(
    layer: Any, step: Step, hidden_states: Tensor, input_dimensions: tuple[int, int],
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`transformers.models.maskformer.modeling_maskformer_swin.MaskFormerSwinLayer.forward`
    (transformers 5.9 to 5.23), in windows of the size of its tokens."""
    few = step.window
    seen, dimensions = layer, input_dimensions
    if few is not None:
        shift = 0 if layer.shift_size == 0 else few[0] // 2
        seen = Seen(layer, window_size=few[0], shift_size=shift)
        dimensions = step.grid_of(hidden_states)
    return type(layer).forward(seen, hidden_states, dimensions, output_attentions)


def forward_v2(
    layer: Any, step: Step, hidden_states: Tensor, input_dimensions: tuple[int, int],
    output_attentions: bool | None = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`transformers.models.swinv2.modeling_swinv2.Swinv2Layer.forward` (transformers 5.9 to 5.23),
    in windows of the size of its tokens."""
    return forward_maskformer(layer, step, hidden_states, input_dimensions, bool(output_attentions))


def attend(attention: Any, step: Step, *args: Any, **kwargs: Any) -> Any:
    """The forward of the part that makes biases by relative position: of the whole attention, where
    it is no part of its own."""
    return type(attention).forward(biased(attention, step), *args, **kwargs)


def part_with_biases(layer: Any) -> Any:
    """The part of a layer that makes biases."""
    own = getattr(layer.attention, "relative_position_bias", None)
    return layer.attention.self if own is None else own


def stages(model: Any) -> list[Sequence[nn.Module]]:
    return [list(stage.blocks) for stage in model.layers]


def window(layer: Any) -> tuple[int, int]:
    return int(layer.window_size), int(layer.window_size)


def grid(
    layer: Any, x: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any
) -> tuple[int, int]:
    return int(input_dimensions[0]), int(input_dimensions[1])


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    """The patches of an image, which is padded to a whole number of them."""
    height, width = image_size or common.sides(model.config.image_size)
    rows, columns = common.sides(model.config.patch_size)
    full = (-(-height // rows), -(-width // columns))
    return Layout(prefix=0, layers=1, grid=full, class_token=False)


def handed_out(encoder: Any, args: Any, kwargs: Any) -> frozenset[int]:
    """The layers of the reduced stage whose output a call hands out: MaskFormer's encoder hands out
    all, if hidden states are asked for, and the others none inside of a stage."""
    if not is_a(encoder, (f"{MASKFORMER}.MaskFormerSwinEncoder",)):
        return frozenset()
    asked = kwargs.get("output_hidden_states", args[3] if len(args) > 3 else False)
    return frozenset(range(max(map(len, stages(encoder))))) if asked else frozenset()


def checkpoint(layer: Any) -> Callable[..., Any] | None:
    """What the layer would call itself through: only those of Swin do; of the others, the stage."""
    return common.checkpoint(layer) if hasattr(layer, "gradient_checkpointing") else None


SWIN = "transformers.models.swin.modeling_swin"
V2 = "transformers.models.swinv2.modeling_swinv2"
MASKFORMER = "transformers.models.maskformer.modeling_maskformer_swin"

HOST = WindowedHost(
    models=(f"{SWIN}.SwinEncoder", f"{V2}.Swinv2Encoder", f"{MASKFORMER}.MaskFormerSwinEncoder"),
    forwards={
        f"{SWIN}.SwinLayer": forward,
        f"{V2}.Swinv2Layer": forward_v2,
        f"{MASKFORMER}.MaskFormerSwinLayer": forward_maskformer,
    },
    stages=stages,
    window=window,
    grid=grid,
    layout=layout,
    attention=part_with_biases,
    attend=attend,
    handed_out=handed_out,
    checkpoint=checkpoint,
    summary="Swin, SwinV2, and Mask2Former, MaskFormer, UperNet on Swin",
)
