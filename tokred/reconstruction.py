"""The full grid, made of fewer tokens again: what stands in for copies.

Without any of these, a token of the full grid is a copy of the one that it was merged into. They
say for every token of the full grid which reduced tokens it is made of, and with which weights,
see `tokred.reducers.Reconstruction`.

`nearest` is the reconstruction of Liang et al., "Expediting Large-Scale Vision Transformer for
Dense Prediction without Fine-tuning", NeurIPS 2022, https://arxiv.org/abs/2210.01035, section 3,
equation 4. Differs from the published code in that the weights of a token add up to 1. (There, the
sum of their squares is 1, so that tokens grow.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokred.grids import between, crossed
from tokred.maps import blend, deciding, wide


@dataclass(frozen=True)
class Nearest:
    """Makes every token of the clusters that it was nearest to, weighted by its distances from
    them.

    Args:
        k: how many clusters a token is made of; all, if there are fewer.
        tau: squared distances are divided by it before the softmax. If not given, it is chosen by
            the scale of the features, see `nearest`.
    """

    k: int = 20
    tau: float | None = None

    def __post_init__(self) -> None:
        check_reconstruction(self.k, self.tau)

    def __call__(
        self,
        before: Float[Tensor, "batch fine dim"],
        coarse: Float[Tensor, "batch coarse dim"],
        grid: tuple[int, int] | None = None,
        coarse_grid: tuple[int, int] | None = None,
    ) -> tuple[Int[Tensor, "batch fine k"], Float[Tensor, "batch fine k"]]:
        return nearest(before.detach(), coarse.detach(), self.k, self.tau)


@dataclass(frozen=True)
class Bilinear:
    """Interpolates between the clusters on their grid, as images are enlarged (half-pixel centres,
    corners not aligned)."""

    def __call__(
        self,
        before: Float[Tensor, "batch fine dim"],
        coarse: Float[Tensor, "batch coarse dim"],
        grid: tuple[int, int] | None,
        coarse_grid: tuple[int, int] | None,
    ) -> tuple[Int[Tensor, "1 fine 4"], Float[Tensor, "1 fine 4"]]:
        if grid is None or coarse_grid is None:
            which, missing = ("tokens", "grid") if grid is None else ("clusters", "coarse_grid")
            raise ValueError(
                f"{missing} is None, but bilinear reconstruction interpolates from grid to grid: "
                f"the {which} stand on none. Methods that leave a grid: 'slic'"
            )
        rows, of_rows = between(grid[0], coarse_grid[0], coarse)
        columns, of_columns = between(grid[1], coarse_grid[1], coarse)
        index = crossed(torch.add, rows * coarse_grid[1], columns)
        return index[None], crossed(torch.mul, of_rows, of_columns)[None]


def reconstruct(
    before: Float[Tensor, "batch tokens dim"],
    centres_before: Float[Tensor, "batch clusters dim"],
    centres_after: Float[Tensor, "batch clusters dim_after"],
    k: int = 20,
    tau: float | None = 50.0,
) -> Float[Tensor, "batch tokens dim_after"]:
    """Every token as a weighted mean of clusters after some layers, namely those that were nearest
    to it before these layers (equation 4).

    Args:
        before: the tokens before they were clustered.
        centres_before: the clusters as they were formed.
        centres_after: the clusters after some layers. The result has their dtype.
        k: see `nearest`.
        tau: see `nearest`.

    Raises:
        ValueError: `k` or `tau` is out of range.
    """
    index, weight = nearest(before, centres_before, k, tau)
    return blend(centres_after, index, weight)


def nearest(
    before: Float[Tensor, "batch tokens dim"],
    centres: Float[Tensor, "batch clusters dim"],
    k: int = 20,
    tau: float | None = 50.0,
) -> tuple[Int[Tensor, "batch tokens k"], Float[Tensor, "batch tokens k"]]:
    """The clusters that each token will be made of, and their weights (equation 4).

    Args:
        before: the tokens before they were clustered.
        centres: the clusters as they were formed.
        k: how many clusters, at least 1; all of them if there are fewer. If several are equally
            near, any of them may be taken (the first, if k is 1).
        tau: the weight of a cluster is proportional to exp(-squared distance / tau). If None, it is
            chosen for each image: a quarter of the mean squared distance of a token from its
            nearest cluster.

    Returns:
        The clusters of each token, the nearest first, and their weights, which add up to 1 and are
        at least float32.

    Raises:
        ValueError: `k` or `tau` is out of range.
    """
    check_reconstruction(k, tau)
    s, mean = centred(wide(centres))
    z = wide(before) - mean
    with torch.autocast(z.device.type, enabled=False):
        # |z|^2 is the same for all clusters, and cancels in the softmax.
        length = s.square().sum(-1)[:, None, :]
        near = torch.baddbmm(length, z, s.transpose(1, 2), beta=-1, alpha=2)
        if k == 1:  # copies
            index = deciding(near).argmax(-1, keepdim=True)
            return index, torch.ones_like(index, dtype=near.dtype)
        closest = deciding(near).topk(min(k, s.shape[1]), dim=-1).indices
        logits = near.gather(-1, closest)
        scale: Tensor | float
        if tau is None:
            apart = z.square().sum(-1) - logits[..., 0]
            scale = temperature(apart, z)
        else:
            scale = tau
        return closest, (logits / scale).softmax(-1)


def temperature(
    apart: Float[Tensor, "batch fine"], z: Float[Tensor, "batch fine dim"]
) -> Float[Tensor, "batch 1 1"]:
    """A temperature for each image: a quarter of the mean squared distance of tokens from clusters.
    On the bundled models, this is as good as the best fixed number. If tokens equal their clusters,
    it is just large enough that rounding errors of the distances do not count.

    Args:
        apart: the squared distance of each token from one cluster.
        z: the tokens, without their mean.
    """
    least = z.square().sum(-1).mean(1) * 1e-5 + torch.finfo(z.dtype).tiny
    return torch.maximum(apart.mean(1) / 4, least)[:, None, None]


def centred(
    x: Float[Tensor, "batch tokens dim"],
) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch 1 dim"]]:
    """The tokens without their mean, and their mean.

    Distances do not depend on the origin. But they are computed as differences of products, which
    lose digits to whatever all tokens have in common.
    """
    mean = x.mean(1, keepdim=True)
    return x - mean, mean


def check_reconstruction(k: int, tau: float | None) -> None:
    """Raises a ValueError if an option of `nearest` is out of range."""
    if k < 1:
        raise ValueError(f"k must be at least 1 cluster, not {k}")
    check_tau(tau)


def check_tau(tau: float | None) -> None:
    """Raises a ValueError unless a temperature is above 0, or None."""
    if tau is not None and not tau > 0:
        raise ValueError(f"tau must be above 0, not {tau}")
