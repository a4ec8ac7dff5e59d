"""The ViTs of transformers whose attention takes no mask: YOLOS, VideoMAE, ViTPose, DPT.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokred.engine import Layout, Step
from tokred.host import Host

from . import _transformers as common
from ._transformers import attend_without_mask as attend


def forward(layer: Any, step: Step, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """`transformers.models.dpt.modeling_dpt.DPTViTLayer.forward` (transformers 5.9 to 5.23), with
    the seam; those of VideoMAE and YOLOS are the same."""
    attention = layer.attention(layer.layernorm_before(hidden_states), **kwargs)
    hidden_states = attention + hidden_states
    hidden_states = step.reduce(hidden_states)
    # The output layer adds the residual itself.
    inside = layer.intermediate(layer.layernorm_after(hidden_states))
    return layer.output(inside, hidden_states)


def has_positions(layer: Any) -> bool:
    """Whether the encoder adds position embeddings of the full grid to what leaves a layer. On the
    full grid, a merged token then gets the mean of those of its members."""
    config = layer.attention.attention.config
    return config.model_type == "yolos" and config.use_mid_position_embeddings


forward_yolos = forward  # models that were pickled with version 0.7 look for it


def forward_vitpose(
    layer: Any, step: Step, hidden_states: Tensor, dataset_index: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`transformers.models.vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneLayer.forward`
    (transformers 5.9 to 5.23), with the seam."""
    if layer.num_experts > 1 and dataset_index is None:
        raise ValueError(f"dataset_index must be given: there are {layer.num_experts} experts")
    attention = layer.attention(layer.layernorm_before(hidden_states), **kwargs)
    hidden_states = attention + hidden_states
    hidden_states = step.reduce(hidden_states)
    inside = layer.layernorm_after(hidden_states)
    # Experts are chosen by image, not by token.
    inside = layer.mlp(inside) if layer.num_experts == 1 else layer.mlp(inside, dataset_index)
    return inside + hidden_states


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    config = model.config
    rows, columns = common.grid(config, image_size)
    if config.model_type == "videomae":
        rows *= config.num_frames // config.tubelet_size
    prefix = 1 if config.model_type in ("yolos", "dpt") else 0
    return Layout(
        prefix=prefix,
        layers=len(model.encoder.layer),
        grid=(rows, columns),
        class_token=prefix > 0,
        suffix=config.num_detection_tokens if config.model_type == "yolos" else 0,
    )


# This one averages the patch tokens outside of the tower, or takes the first.
_AVERAGES = ("transformers.models.videomae.modeling_videomae.VideoMAEForVideoClassification",)


def averages_output(root: Any, model: Any) -> bool:
    return common.contains(root, _AVERAGES) and bool(model.config.use_mean_pooling)


def merges_only(root: Any, model: Any) -> str | None:
    if common.contains(root, _AVERAGES) and not model.config.use_mean_pooling:
        return (
            "it takes its first patch for the whole video, which may be dropped: use a method that "
            "merges, such as 'tome'"
        )
    return None


HOST = Host(
    models=(
        "transformers.models.yolos.modeling_yolos.YolosModel",
        "transformers.models.videomae.modeling_videomae.VideoMAEModel",
        "transformers.models.vitpose_backbone.modeling_vitpose_backbone.VitPoseBackbone",
        "transformers.models.dpt.modeling_dpt.DPTModel",
    ),
    forwards={
        "transformers.models.yolos.modeling_yolos.YolosLayer": forward,
        "transformers.models.videomae.modeling_videomae.VideoMAELayer": forward,
        "transformers.models.vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneLayer": (
            forward_vitpose
        ),
        "transformers.models.dpt.modeling_dpt.DPTViTLayer": forward,
    },
    blocks=lambda model: list(model.encoder.layer),
    layout=layout,
    scale=lambda layer: float(layer.attention.attention.scaling),
    attention=lambda layer: layer.attention.attention,
    attend=attend,
    shows=frozenset({"key", "query", "value"}),
    always_full=has_positions,
    tapped=common.tapped,
    checkpoint=common.checkpoint,
    averages_output=averages_output,
    merges_only=merges_only,
    refuse=common.refuse,
    summary="YOLOS, VideoMAE, ViTPose, DPT",
)
