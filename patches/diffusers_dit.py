"""Diffusion transformers of diffusers that are made of `BasicTransformerBlock`s: DiT, PixArt-alpha
and -sigma, and `Transformer2DModel` as a denoiser of its own.

Tokens are merged around modules of every block, as in Bolya & Hoffman, "Token Merging for Fast
Stable Diffusion" (section 4). Modulation by time step (adaptive norms) is outside of these modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokred.host import Denoiser, Place, is_a

from ._diffusers import BLOCK, beside, keys, modules_of, prompt, timestep


def places(model: Any) -> list[Place]:
    """All blocks: their tokens are the patches of the latents."""
    return [
        Place(f"transformer_blocks.{number}", "", 0, modules_of(block))
        for number, block in enumerate(model.transformer_blocks)
        if is_a(block, (BLOCK,))
    ]


def grid(owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the patches of latents, [batch, channels, height, width]."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    side = owner.config.patch_size or 1
    return x.shape[-2] // side, x.shape[-1] // side


_MODELS = "diffusers.models.transformers"

HOST = Denoiser(
    models=(
        f"{_MODELS}.dit_transformer_2d.DiTTransformer2DModel",
        f"{_MODELS}.pixart_transformer_2d.PixArtTransformer2DModel",
        f"{_MODELS}.transformer_2d.Transformer2DModel",
    ),
    places=places,
    grid=grid,
    timestep=timestep,
    prompt=prompt,
    beside=beside,
    keys=keys,
    summary="DiT, PixArt-alpha and -sigma",
)
