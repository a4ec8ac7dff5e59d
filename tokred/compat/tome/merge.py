"""`tome.merge`: the matching by itself, for code that merges on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokred.maps import take
from tokred.reducers.tome import match


@dataclass(frozen=True)
class Merge:
    """Few tokens from many.

    Attributes:
        index: the token that each one goes into, prefix tokens included.
        tokens: how many there are afterwards.
    """

    index: Int[Tensor, "batch fine"]
    tokens: int

    def __call__(
        self, x: Float[Tensor, "batch fine dim"], mode: str = "mean"
    ) -> Float[Tensor, "batch coarse dim"]:
        """Merges; `mode` is how: "mean" (each member counts once), "sum", "amax", "amin"."""
        modes = ("mean", "sum", "amax", "amin")
        if mode not in modes:
            raise ValueError(f"mode must be one of {modes}, not {mode!r}")
        out = x.new_zeros(len(x), self.tokens, x.shape[2])
        index = self.index[..., None].expand_as(x)
        return out.scatter_reduce(1, index, x, mode, include_self=False)


@dataclass(frozen=True)
class Unmerge:
    """Many tokens from few: every member gets a copy.

    Attributes:
        index: the token that each one went into, prefix tokens included.
    """

    index: Int[Tensor, "batch fine"]

    def __call__(self, x: Float[Tensor, "batch coarse dim"]) -> Float[Tensor, "batch fine dim"]:
        return take(x, self.index)


def bipartite_soft_matching(
    metric: Float[Tensor, "batch tokens dim"],
    r: int,
    class_token: bool = False,
    distill_token: bool = False,
) -> tuple[Merge, Unmerge]:
    """Matches tokens, and merges the `r` most similar pairs. Merged tokens stand where the first
    of them stood.

    Args:
        metric: what tokens are compared by.
        r: how many tokens to remove; half of the patch tokens at most are.
        class_token: whether the first token is one, which is left alone.
        distill_token: whether the second one is a distillation token, which is left alone.

    Returns:
        Two functions: `merge(x, mode="mean")` and `unmerge(x)`.

    Raises:
        ValueError: there is a distillation token, but no class token in front of it.
    """
    if distill_token and not class_token:
        raise ValueError("distill_token must come with class_token: it is the second token")
    prefix = class_token + distill_token
    patches = metric.shape[1] - prefix
    merges = max(0, min(r, patches // 2))
    with torch.no_grad():
        labels = match(metric[:, prefix:], merges, prefix) + prefix
    before = torch.arange(prefix, device=metric.device).expand(len(metric), -1)
    index = torch.cat([before, labels], 1)
    return Merge(index, prefix + patches - merges), Unmerge(index)


def merge_wavg(
    merge: Callable[..., Tensor],
    x: Float[Tensor, "batch fine dim"],
    size: Float[Tensor, "batch fine 1"] | None = None,
) -> tuple[Float[Tensor, "batch coarse dim"], Float[Tensor, "batch coarse 1"]]:
    """Merges tokens to their mean, each counted as often as the tokens it stands for.

    Args:
        merge: what `bipartite_soft_matching` has returned.
        x: the tokens.
        size: how many tokens each one stands for; one each, if not given.

    Returns:
        The merged tokens, and their sizes.
    """
    if size is None:
        size = torch.ones_like(x[..., :1])
    total = merge(size, mode="sum")
    return merge(x * size, mode="sum") / total, total


def merge_source(
    merge: Callable[..., Tensor],
    x: Float[Tensor, "batch fine dim"],
    source: Float[Tensor, "batch fine all"] | None = None,
) -> Float[Tensor, "batch coarse all"]:
    """Which of the first tokens each merged one is made of, 1 or 0.

    Args:
        merge: what `bipartite_soft_matching` has returned.
        x: the tokens; looked at only if there is no `source` yet.
        source: which of the first tokens each one is made of, before; each of itself, if not given.
    """
    if source is None:
        source = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)
    return merge(source, mode="amax")
