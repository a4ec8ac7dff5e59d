"""The calls of the `tomesd` package (Bolya & Hoffman, "Token Merging for Fast Stable Diffusion",
CVPR Workshops 2023, https://arxiv.org/abs/2303.17604), over `tokred.apply`.

    import tokred.compat.tomesd as tomesd

    tomesd.apply_patch(pipe, ratio=0.5)

What differs: docs/migrating.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import torch

from tokred.compat.tome import merge
from tokred.engine.denoising import Around
from tokred.host import UnsupportedModelError, find_denoiser, module_of
from tokred.maps import Clusters
from tokred.patching import apply, remove, uncompiled
from tokred.reducers import Tokens
from tokred.reducers.tome2d import ToMe2d

__all__ = ["apply_patch", "merge", "remove_patch"]


def apply_patch(
    model: Any,
    ratio: float = 0.5,
    max_downsample: int = 1,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
) -> Any:
    """Makes a denoiser merge tokens around modules of its blocks. In place; applying again
    replaces what was there.

    Args:
        model: a pipeline of diffusers, its UNet, or any other denoiser of `tokred.hosts`.
        ratio: the share of the tokens that is merged away, at most 1 - 1 / (sx * sy).
        max_downsample: 1, 2, 4 or 8: merge at every resolution down to 1/max_downsample of the
            latents'.
        sx: columns of a cell. One token of every cell is a destination for others.
        sy: rows of a cell.
        use_rand: whether destinations are drawn at random, if the batch is even (from a copy of
            the global random state, which itself does not change). If not, they are the upper left
            tokens of the cells.
        merge_attn: around self-attention.
        merge_crossattn: around cross-attention.
        merge_mlp: around the MLP.

    Returns:
        The model.

    Raises:
        ValueError: an option is out of range, or asks for something that the model does not have.
        TypeError: `ratio` is not a number, or `sx` or `sy` not a whole number.
        UnsupportedModelError: there is no patch for the model.
    """
    _check_cells(ratio, sx, sy)
    chosen = {"attention": merge_attn, "cross_attention": merge_crossattn, "mlp": merge_mlp}
    modules = tuple(name for name, merged in chosen.items() if merged)
    levels = _levels(model, modules, max_downsample)
    reducer = ToMe2d(cell=(sy, sx))
    if use_rand:
        fork = torch.Generator()
        fork.set_state(torch.get_rng_state())
        reducer = InPairs(cell=(sy, sx), generator=fork)
    keep_rate = float(1 - Decimal(str(ratio)))
    apply(model, reducer, Around(keep_rate, modules, levels))
    return model


def remove_patch(model: Any) -> Any:
    """Takes merging away; does nothing if there is none. Returns the model."""
    remove(model)
    return model


@dataclass(frozen=True)
class InPairs(ToMe2d):
    """ToMe2d that draws its destinations only if the batch is even. An image is in the batch twice,
    with the prompt and without it, and both need the same destinations; in an odd batch images are
    there once."""

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        if len(tokens.x) % 2:
            return ToMe2d(self.cell)(tokens, keep)
        return super().__call__(tokens, keep)


def _check_cells(ratio: float, sx: int, sy: int) -> None:
    """Raises unless that share of the tokens can be merged in cells of this size.

    Raises:
        TypeError: `ratio` is not a number, or `sx` or `sy` not a whole number.
        ValueError: they are out of range.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise TypeError(f"ratio must be a number, not {ratio!r}")
    for name, side in {"sx": sx, "sy": sy}.items():
        if isinstance(side, bool) or not isinstance(side, Integral):
            raise TypeError(f"{name} must be a whole number of tokens, not {side!r}")
    if min(sx, sy) < 1 or sx * sy < 2:
        raise ValueError(f"sx and sy must make cells of at least two tokens, not {sx} x {sy}")
    most = 1 - 1 / (sx * sy)
    if not 0 <= ratio <= most:
        raise ValueError(
            f"ratio must be in [0, {most:g}] for cells of {sx} x {sy}, of which one token stays, "
            f"not {ratio!r}; larger sx and sy allow more"
        )


def _levels(model: Any, modules: tuple[str, ...], max_downsample: int) -> tuple[int, ...]:
    """The levels of the model, down to that resolution, at which there are such modules.

    Raises:
        ValueError: there are none, or no modules were chosen.
        UnsupportedModelError: the model has none at any level.
    """
    finest = {1: (0,), 2: (0, 1), 4: (0, 1, 2), 8: (0, 1, 2, 3)}
    if max_downsample not in finest:
        raise ValueError(f"max_downsample must be one of {list(finest)}, not {max_downsample!r}")
    if not modules:
        raise ValueError(
            "one of merge_attn, merge_crossattn and merge_mlp must be True; tomesd.remove_patch "
            "takes merging away"
        )
    there = _levels_with(model, modules)
    levels = tuple(level for level in finest[max_downsample] if level in there)
    if not levels:
        raise ValueError(
            f"max_downsample must be at least {2 ** min(there)} for this model, which has no "
            f"{' or '.join(modules)} above that, not {max_downsample}: nothing would be merged"
        )
    return levels


def _levels_with(model: Any, modules: tuple[str, ...]) -> set[int]:
    """The levels at which a denoiser has any of these modules."""
    inner = uncompiled(module_of(model))
    host = find_denoiser(inner)
    if host is None:
        raise UnsupportedModelError(
            f"{type(inner).__qualname__} is not a denoiser of diffusers; of other vision "
            "transformers, tokred.apply or tokred.compat.tome reduces the tokens"
        )
    levels = {p.level for p in host.places(inner) if any(name in p.modules for name in modules)}
    if not levels:
        raise UnsupportedModelError(
            f"{type(inner).__qualname__} has no block with {' or '.join(modules)}"
        )
    return levels
