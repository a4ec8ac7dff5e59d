"""The plain ViTs of transformers: ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA, ViViT.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _transformers as common


def forward(
    layer: Any, step: Step, hidden_states: Tensor, attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`transformers.models.vit.modeling_vit.ViTLayer.forward` (transformers 5.9 to 5.23), with the
    seam; the other layers of this file have the same."""
    mask = step.bias(hidden_states, attention_mask)
    attention, _ = layer.attention(layer.layernorm_before(hidden_states), mask, **kwargs)
    hidden_states = layer.dropout(attention) + hidden_states
    hidden_states = step.reduce(hidden_states)
    return layer.dropout(layer.mlp(layer.layernorm_after(hidden_states))) + hidden_states


# What stands in front of the patch tokens, and whether the model shuffles these.
_PREFIX = {"vit": 1, "deit": 2, "vit_mae": 1, "vit_msn": 1, "ijepa": 0, "vivit": 1}


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    prefix = _PREFIX[model.config.model_type]
    if model.config.model_type == "vivit":
        frames, *patch = model.config.tubelet_size
        rows, columns = common.grid_of(patch, model.config.image_size, image_size)
        grid = model.config.num_frames // frames * rows, columns
    else:
        grid = common.grid(model.config, image_size)
    return Layout(
        prefix=prefix,
        layers=len(model.layers),
        grid=grid,
        class_token=prefix > 0,
        raster=model.config.model_type != "vit_mae",
    )


def heads(layer: Any, output: Tensor) -> Tensor:
    return common.heads(layer.attention, output)


# These average the patch tokens outside of the tower.
_AVERAGES = ("transformers.models.ijepa.modeling_ijepa.IJepaForImageClassification",)

HOST = Host(
    models=(
        "transformers.models.vit.modeling_vit.ViTModel",
        "transformers.models.deit.modeling_deit.DeiTModel",
        "transformers.models.vit_mae.modeling_vit_mae.ViTMAEModel",
        "transformers.models.vit_msn.modeling_vit_msn.ViTMSNModel",
        "transformers.models.ijepa.modeling_ijepa.IJepaModel",
        "transformers.models.vivit.modeling_vivit.VivitModel",
    ),
    forwards={
        "transformers.models.vit.modeling_vit.ViTLayer": forward,
        "transformers.models.deit.modeling_deit.DeiTLayer": forward,
        "transformers.models.vit_mae.modeling_vit_mae.ViTMAELayer": forward,
        "transformers.models.vit_msn.modeling_vit_msn.ViTMSNLayer": forward,
        "transformers.models.ijepa.modeling_ijepa.IJepaLayer": forward,
        "transformers.models.vivit.modeling_vivit.VivitLayer": forward,
    },
    blocks=lambda model: list(model.layers),
    layout=layout,
    scale=lambda layer: float(layer.attention.scaling),
    taps={
        "key": "attention.k_proj",
        "query": "attention.q_proj",
        "value": "attention.v_proj",
    },
    reads={"key": heads, "query": heads, "value": heads},
    attention=lambda layer: layer.attention,
    attend=common.attend,
    tapped=common.tapped,
    checkpoint=common.checkpoint,
    refuse=common.refuse,
    averages_output=lambda root, model: common.contains(root, _AVERAGES),
    summary="ViT, DeiT (distilled), ViT-MAE, ViT-MSN, I-JEPA, ViViT",
)
