"""What denoisers of diffusers that are made of `BasicTransformerBlock`s have in common. (No patch
itself.)"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor

from tokred.engine import tensors_in
from tokred.host import class_name

BLOCK = "diffusers.models.attention.BasicTransformerBlock"

_PROCESSORS = "diffusers.models.attention_processor"

# They make keys and values of `encoder_hidden_states`, whatever those are. Others may take them for
# a text (and look there for what belongs to a text), or not look at them at all.
_TAKE_KEYS = frozenset(
    f"{_PROCESSORS}.{name}"
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    )
)

_FUSED = f"{_PROCESSORS}.FusedAttnProcessor2_0"

_IP_ADAPTERS = frozenset(
    f"{_PROCESSORS}.IPAdapter{name}"
    for name in ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor")
)

_PROMPT = (
    "encoder_hidden_states",
    "class_labels",
    "added_cond_kwargs",
    "cross_attention_kwargs",
    "added_time_ids",
    "image_embeddings",
)

# What attention is called with that does not go by its tokens.
_NOT_BY_TOKENS = frozenset({"encoder_hidden_states", "attention_mask", "temb", "scale"})


def modules_of(block: Any) -> dict[str, str]:
    """What a block has to merge tokens around."""
    found = {"mlp": "ff"}
    if not block.only_cross_attention:
        found["attention"] = "attn1"
    if block.attn2 is not None and not block.double_self_attention:
        found["cross_attention"] = "attn2"
    return found


def timestep(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The time step that the model is called with: a number, or a tensor of any shape."""
    return _given(model, args, kwargs).get("timestep")


def prompt(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What tells the calls of a step apart: texts, classes, pictures to resemble."""
    given = _given(model, args, kwargs)
    return tensors_in([given.get(name) for name in _PROMPT])


def _given(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments


def keys(attention: Any) -> str | None:
    """Why self-attention cannot be given other tokens for its keys and values."""
    processor = class_name(type(getattr(attention, "processor", None)))
    if processor in _TAKE_KEYS:
        return None
    if processor == _FUSED:
        return (
            "'todo' has queries of all tokens, and keys and values of few, which fused projections "
            "cannot make: call unfuse_qkv_projections()"
        )
    return (
        "'todo' gives attention few tokens for its keys and values, which the attention processor "
        f"{processor} is not known to use: take another processor, or another method ('tome' works "
        "with any)"
    )


def beside(
    attention: Any, x: Tensor, kwargs: Mapping[str, Any], down: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """What attention is called with beside its tokens, made for few of them.

    The mask of an IP-adapter goes by positions: it becomes the mean over what a token stands for,
    as the token itself does.

    Raises:
        ValueError: a processor takes another tensor, which may go by positions, too.
    """
    given = dict(kwargs)
    processor = getattr(attention, "processor", None)
    masks = given.get("ip_adapter_masks")
    if masks is not None and class_name(type(processor)) in _IP_ADAPTERS:
        # A tensor is the older form: the masks of all adapters, each [1, height, width].
        masks = masks if isinstance(masks, list) else [mask[None] for mask in masks]
        given["ip_adapter_masks"] = [_mask_of_few(mask, x, down) for mask in masks]
        return given
    for name, value in given.items():
        if name not in _NOT_BY_TOKENS and tensors_in(value) and _takes(processor, name):
            raise ValueError(
                f"{name} of cross_attention_kwargs may go by all tokens, which the attention "
                f"processor {class_name(type(processor))} would compare with few: leave this kind "
                "of attention out of modules"
            )
    return given


def _mask_of_few(mask: Any, x: Tensor, down: Callable[[Tensor], Tensor]) -> Any:
    """The mask of an adapter, [1 or batch, pictures, height, width], so that the processor finds
    one value for each of few tokens: [batch, pictures, 1, tokens]."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return mask  # about which the processor has its own word
    batch, tokens = x.shape[:2]
    # On all tokens, as the processor would see it.
    seen = [
        IPAdapterMaskProcessor.downsample(picture, batch, tokens, 1)[..., 0]
        for picture in mask.unbind(1)
    ]
    full = torch.stack(seen, -1).to(x.device, torch.float32)
    return down(full).transpose(1, 2)[:, :, None]


def _takes(processor: Any, name: str) -> bool:
    """Whether attention passes that argument on to its processor: only such as it names."""
    return name in inspect.signature(type(processor).__call__).parameters


def progress(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Not used any more: models that were pickled up to version 0.8 name it."""
    return 1 - float(timestep(model, args, kwargs)) / 1000
