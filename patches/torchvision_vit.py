"""torchvision's VisionTransformer: ViT, SWAG.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _multihead as common


def forward(block: Any, step: Step, input: Tensor) -> Tensor:
    """`torchvision.models.vision_transformer.EncoderBlock.forward` (torchvision 0.21 to 0.29),
    with the seam."""
    x = common.attend(block.self_attention, step, block.ln_1(input))
    x = block.dropout(x) + input
    x = step.reduce(x)
    return x + block.mlp(block.ln_2(x))


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    height, width = image_size or (model.image_size, model.image_size)
    return Layout(
        prefix=1,
        layers=len(model.encoder.layers),
        grid=(height // model.patch_size, width // model.patch_size),
        class_token=True,
    )


def refuse(model: Any, signals: frozenset[str]) -> str | None:
    reasons = (common.refuse(block.self_attention, signals) for block in model.encoder.layers)
    return next((reason for reason in reasons if reason), None)


HOST = Host(
    models=("torchvision.models.vision_transformer.VisionTransformer",),
    forwards={"torchvision.models.vision_transformer.EncoderBlock": forward},
    blocks=lambda model: list(model.encoder.layers),
    layout=layout,
    scale=lambda block: common.scale(block.self_attention),
    shows=frozenset({"key", "query", "value"}),
    refuse=refuse,
    summary="ViT, SWAG",
)
