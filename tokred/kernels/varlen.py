"""Attention in a batch whose images have different numbers of tokens, laid end to end.

Norms, projections and MLPs treat tokens one by one, so that a block can be called on all tokens of
a batch as one sequence; only its attention has to know where an image ends. `PerImage` makes the
fused attention that the block calls attend image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NotPerImageError(Exception):
    """A block cannot be run on images that are laid end to end; it needs padded images."""


class PerImage(TorchFunctionMode):
    """While it is entered, fused attention over one long sequence stays within its images.

    Args:
        lengths: how many tokens each image has.

    Attributes:
        calls: how often fused attention was called. If never, the block has attention of another
            kind, which has mixed the images: its output is wrong.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self.lengths = [length for length in lengths if length > 0]
        self.total = sum(self.lengths)
        self.calls = 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        fits = all(x.ndim == 4 and x.shape[0] == 1 for x in (query, key, value))
        fits = fits and query.shape[2] == key.shape[2] == self.total
        if attn_mask is not None or is_causal or not fits:
            raise NotPerImageError
        self.calls += 1
        grouped = {"enable_gqa": True} if enable_gqa else {}
        return attend(query, key, value, self.lengths, dropout_p, scale, **grouped)


def attend(
    query: Float[Tensor, "1 heads total head_dim"],
    key: Float[Tensor, "1 key_heads total head_dim"],
    value: Float[Tensor, "1 key_heads total value_dim"],
    lengths: Sequence[int],
    dropout_p: float = 0.0,
    scale: float | None = None,
    **options: Any,
) -> Float[Tensor, "1 heads total value_dim"]:
    """Softmax attention of every image to itself.

    On CPUs, image by image. On GPUs, by the variable-length flash kernel if there is one for the
    dtype, otherwise padded to the longest image.

    Args:
        query, key, value: of all images, end to end.
        lengths: how many tokens each image has, in that order, at least 1.
        dropout_p, scale, options: as for `scaled_dot_product_attention`.

    Returns:
        A transposed view: hosts transpose it back, and then nothing has to be copied.
    """
    if query.device.type == "cuda":
        if dropout_p == 0 and not options and _flash_fits(query):
            return _by_flash(query, key, value, lengths, scale)
        return _padded(query, key, value, lengths, dropout_p, scale, **options)
    shape = (1, query.shape[2], query.shape[1], value.shape[3])
    out = torch.empty(shape, dtype=value.dtype, device=value.device)
    start = 0
    parts = []
    for length in lengths:
        at = slice(start, start + length)
        one = F.scaled_dot_product_attention(
            query[:, :, at], key[:, :, at], value[:, :, at],
            dropout_p=dropout_p, scale=scale, **options,
        ).transpose(1, 2)  # fmt: skip
        if one.requires_grad:
            parts.append(one)
        else:
            out[:, at] = one
        start += length
    return (torch.cat(parts, 1) if parts else out).transpose(1, 2)


def _flash_fits(query: Tensor) -> bool:
    """Whether the variable-length flash kernel is available, and takes the dtype."""
    if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[3] % 8:
        return False
    if find_spec("torch.nn.attention.varlen") is None:  # older torch
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _by_flash(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32, non_blocking=True)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = max(lengths)
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale)
    whole: Tensor = out[None].transpose(1, 2)
    return whole


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    dropout_p: float,
    scale: float | None,
    **options: Any,
) -> Tensor:
    """The same attention, with images padded to the longest."""
    there, mask = _places(lengths, query.device)
    index = there.flatten()

    def apart(x: Tensor) -> Tensor:
        chosen = x[0].index_select(1, index)
        return chosen.unflatten(1, there.shape).transpose(0, 1)

    out = F.scaled_dot_product_attention(
        apart(query), apart(key), apart(value), mask[:, None, None],
        dropout_p=dropout_p, scale=scale, **options,
    )  # fmt: skip
    rows = out.transpose(1, 2).flatten(0, 1)[mask.flatten()]
    return rows[None].transpose(1, 2)


def _places(
    lengths: Sequence[int], device: torch.device
) -> tuple[Int[Tensor, "images longest"], Bool[Tensor, "images longest"]]:
    """The positions of the tokens of each image in the long sequence, and which of them are not
    padding. Padding is the image's own first token: no weight is so small that NaN, were it in
    another image, would not come through."""
    counts = torch.tensor(lengths, device=device)[:, None]
    column = torch.arange(max(lengths), device=device)
    start = counts.cumsum(0) - counts
    mask = column < counts
    return torch.where(mask, start + column, start), mask
