"""`tome.merge`: the matching without a model, for code that merges tokens by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tokred.maps import take
from tokred.reducers import tome2d
from tokred.reducers.tome import best, match


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
    """Matches tokens, and merges the `r` most similar pairs. A merged token stands where the first
    of its members stood.

    Args:
        metric: what tokens are compared by.
        r: how many tokens to remove, at most half of the patch tokens.
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


def kth_bipartite_soft_matching(
    metric: Float[Tensor, "batch tokens dim"], k: int
) -> tuple[Merge, Unmerge]:
    """Keeps every `k`-th token (tokens // k of them), and merges each of the others into the most
    similar one of those. Merged tokens stand in the order of the tokens that are kept.

    Args:
        metric: what tokens are compared by.
        k: one token in `k` stays, the last of each `k`; 1 merges nothing.

    Returns:
        Two functions: `merge(x, mode="mean")` and `unmerge(x)`.

    Raises:
        ValueError: `k` is not in [1, tokens].
    """
    batch, num = metric.shape[:2]
    if not 1 <= k <= num:
        raise ValueError(f"k must be in [1, {num}] for {num} tokens, not {k}")
    stay = torch.arange(k - 1, num, k, device=metric.device)
    return _into(metric, stay.expand(batch, -1))


def random_bipartite_soft_matching(
    metric: Float[Tensor, "batch tokens dim"], r: int
) -> tuple[Merge, Unmerge]:
    """Draws `r` tokens of every image from the global random state, and merges each into the most
    similar of the other tokens. Merged tokens stand in the order of those others.

    Args:
        metric: what tokens are compared by.
        r: how many tokens to remove; none if below 1.

    Returns:
        Two functions: `merge(x, mode="mean")` and `unmerge(x)`.

    Raises:
        ValueError: `r` leaves no token.
    """
    batch, num = metric.shape[:2]
    if r >= num:
        raise ValueError(f"r must leave one of {num} tokens at least, not be {r}")
    drawn = torch.rand(batch, num, device=metric.device).argsort(1)
    return _into(metric, drawn[:, max(0, r) :].sort(1).values)


def bipartite_soft_matching_random2d(
    metric: Float[Tensor, "batch tokens dim"],
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Merge, Unmerge]:
    """One token of each cell of a grid is a destination; the `r` other tokens that are most similar
    to one of the destinations merge into it, as in `tomesd.merge`. A merged token stands where the
    first of its members stood.

    Args:
        metric: what tokens are compared by, row by row.
        w: columns of the grid.
        h: rows of the grid.
        sx: columns of a cell.
        sy: rows of a cell.
        r: how many tokens to remove; one token of each cell always stays.
        no_rand: whether the destination of a cell is its upper left token, rather than drawn.
        generator: what destinations are drawn from; the CPU's global random state, if not given.

    Returns:
        Two functions: `merge(x, mode="mean")` and `unmerge(x)`.

    Raises:
        ValueError: there are not `w * h` tokens, or no cell fits into the grid.
    """
    if no_rand:
        generator = None
    elif generator is None:
        generator = torch.default_generator
    merges = max(0, min(r, w * h - (w // sx) * (h // sy)))
    with torch.no_grad():
        index = tome2d.match(metric, (h, w), merges, (sy, sx), generator)
    return Merge(index, w * h - merges), Unmerge(index)


def merge_wavg(
    merge: Callable[..., Tensor],
    x: Float[Tensor, "batch fine dim"],
    size: Float[Tensor, "batch fine 1"] | None = None,
) -> tuple[Float[Tensor, "batch coarse dim"], Float[Tensor, "batch coarse 1"]]:
    """Merges tokens to their mean, in which a token counts as often as the tokens it stands for.

    Args:
        merge: the first function that `bipartite_soft_matching` returned.
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
        merge: the first function that `bipartite_soft_matching` returned.
        x: the tokens; looked at only if there is no `source` yet.
        source: which of the first tokens each one is made of, before; each of itself, if not given.
    """
    if source is None:
        source = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)
    return merge(source, mode="amax")


def _into(
    metric: Float[Tensor, "batch tokens dim"], stay: Int[Tensor, "batch coarse"]
) -> tuple[Merge, Unmerge]:
    """Every token into the most similar of those that stay."""
    with torch.no_grad():
        unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
        _, partner = best(unit, take(unit, stay))
        # Into itself, and not into one that equals it.
        itself = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
        index = partner.scatter(1, stay, itself)
    return Merge(index, stay.shape[1]), Unmerge(index)
