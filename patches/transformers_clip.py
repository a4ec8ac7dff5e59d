"""The vision towers of transformers that are built like CLIP's: CLIP, SigLIP and those after them.

Tokens are reduced between attention and MLP, as in ToMe (figure 1) and ATC (section 3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokred.engine import Layout, Step
from tokred.host import Host, is_a

from . import _transformers as common


def forward(
    layer: Any, step: Step, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """`transformers.models.clip.modeling_clip.CLIPEncoderLayer.forward` (transformers 5.9 to
    5.23), with the seam; the other layers of this file have the same."""
    mask = step.bias(hidden_states, attention_mask)
    attention, _ = layer.self_attn(
        hidden_states=layer.layer_norm1(hidden_states), attention_mask=mask, **kwargs
    )
    hidden_states = hidden_states + attention
    hidden_states = step.reduce(hidden_states)
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))


def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    class_token = hasattr(model.embeddings, "class_embedding")
    if hasattr(model.config, "image_size"):
        grid = common.grid(model.config, image_size)
    elif image_size is not None:
        grid = (image_size[0] // model.config.patch_size, image_size[1] // model.config.patch_size)
    else:
        # SigLIP 2 takes images of any shape; its position embeddings are a square.
        side = model.embeddings.position_embedding_size
        grid = (side, side)
    return Layout(
        prefix=int(class_token),
        layers=len(model.encoder.layers),
        grid=grid,
        class_token=class_token,
    )


def heads(layer: Any, output: Tensor) -> Tensor:
    return common.heads(layer.self_attn, output)


def _head(model: Any) -> list[nn.Module]:
    """What pools the patch tokens by attention, in the models that have no class token."""
    return [model.head] if isinstance(getattr(model, "head", None), nn.Module) else []


def _norm(model: Any) -> list[nn.Module]:
    """What stands between the last layer and that."""
    return [model.post_layernorm] if _head(model) else []


def refuse(model: Any, signals: frozenset[str]) -> str | None:
    for layer, block in enumerate(model.encoder.layers):
        norm = getattr(block.self_attn, "k_norm", None)  # Janus
        if norm is not None and not isinstance(norm, nn.Identity):
            return f"layer {layer} norms its keys, so that what it compares is not what can be read"
    return common.refuse(model, signals)


def merges_only(root: Any, model: Any) -> str | None:
    if common.contains(root, (_SIGLIP2,)):
        return (
            "its tokens are averaged by a mask of all patches, in which dropped ones would count: "
            "use a method that merges, such as 'tome'"
        )
    if is_a(root, ("transformers.models.janus.modeling_janus.JanusVisionModel",)):
        # (Janus itself takes all of them.)
        return (
            "it takes its first patch for the whole image, which may be dropped: use a method that "
            "merges, such as 'tome'"
        )
    return None


def full_grid_only(root: Any, model: Any) -> str | None:
    if common.contains(root, _DETECTORS):
        return "its heads lay the features out as a grid"
    return None


_DETECTORS = (
    "transformers.models.owlvit.modeling_owlvit.OwlViTForObjectDetection",
    "transformers.models.owlv2.modeling_owlv2.Owlv2ForObjectDetection",
)
_SIGLIP2 = "transformers.models.siglip2.modeling_siglip2.Siglip2ForImageClassification"

# These average the patch tokens outside of the tower.
_AVERAGES = (
    "transformers.models.clip.modeling_clip.CLIPForImageClassification",
    "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2ForImageClassification",
    "transformers.models.siglip.modeling_siglip.SiglipForImageClassification",
    _SIGLIP2,
)

HOST = Host(
    models=(
        "transformers.models.altclip.modeling_altclip.AltCLIPVisionModel",
        "transformers.models.chinese_clip.modeling_chinese_clip.ChineseCLIPVisionModel",
        "transformers.models.clip.modeling_clip.CLIPVisionModel",
        "transformers.models.clipseg.modeling_clipseg.CLIPSegVisionModel",
        "transformers.models.git.modeling_git.GitVisionTransformer",
        "transformers.models.idefics2.modeling_idefics2.Idefics2VisionTransformer",
        "transformers.models.idefics3.modeling_idefics3.Idefics3VisionTransformer",
        "transformers.models.janus.modeling_janus.JanusVisionModel",
        "transformers.models.kosmos2.modeling_kosmos2.Kosmos2VisionTransformer",
        "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2VisionModel",
        "transformers.models.owlv2.modeling_owlv2.Owlv2VisionTransformer",
        "transformers.models.owlvit.modeling_owlvit.OwlViTVisionTransformer",
        "transformers.models.siglip.modeling_siglip.SiglipVisionModel",
        "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel",
        "transformers.models.smolvlm.modeling_smolvlm.SmolVLMVisionTransformer",
    ),
    forwards={
        "transformers.models.altclip.modeling_altclip.AltCLIPEncoderLayer": forward,
        "transformers.models.chinese_clip.modeling_chinese_clip.ChineseCLIPVisionLayer": forward,
        "transformers.models.clip.modeling_clip.CLIPEncoderLayer": forward,
        "transformers.models.clipseg.modeling_clipseg.CLIPSegEncoderLayer": forward,
        "transformers.models.git.modeling_git.GitVisionEncoderLayer": forward,
        "transformers.models.idefics2.modeling_idefics2.Idefics2EncoderLayer": forward,
        "transformers.models.idefics3.modeling_idefics3.Idefics3EncoderLayer": forward,
        "transformers.models.janus.modeling_janus.JanusVisionEncoderLayer": forward,
        "transformers.models.kosmos2.modeling_kosmos2.Kosmos2VisionEncoderLayer": forward,
        "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2EncoderLayer": forward,
        "transformers.models.owlv2.modeling_owlv2.Owlv2EncoderLayer": forward,
        "transformers.models.owlvit.modeling_owlvit.OwlViTEncoderLayer": forward,
        "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": forward,
        "transformers.models.siglip2.modeling_siglip2.Siglip2EncoderLayer": forward,
        "transformers.models.smolvlm.modeling_smolvlm.SmolVLMEncoderLayer": forward,
    },
    blocks=lambda model: list(model.encoder.layers),
    layout=layout,
    scale=lambda layer: float(layer.self_attn.scale),
    taps={
        "key": "self_attn.k_proj",
        "query": "self_attn.q_proj",
        "value": "self_attn.v_proj",
    },
    reads={"key": heads, "query": heads, "value": heads},
    attention=lambda layer: layer.self_attn,
    attend=common.attend,
    tapped=common.tapped,
    checkpoint=common.checkpoint,
    passes=_norm,
    pools=_head,
    averages_output=lambda root, model: common.contains(root, _AVERAGES),
    merges_only=merges_only,
    full_grid_only=full_grid_only,
    pads=True,
    refuse=refuse,
    summary="CLIP, SigLIP (1 and 2), MetaCLIP 2, CLIPSeg, OWL-ViT and OWLv2, GIT, Idefics, Janus",
)
