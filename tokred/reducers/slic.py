"""Soft clusters of neighbours on the grid of tokens.

Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
NeurIPS 2022, https://arxiv.org/abs/2210.01035, section 3: token clustering (equations 2 and 3),
which is the clustering of superpixels with soft assignments. Their token reconstruction (equation
4) is `tokred.reconstruction`. Differs from the published code in that tau means the same in both,
and in that tokens are only compared with their candidates (there with all centres, most of which
are masked afterwards).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tokred.grids import (
    Pooled,
    Superpixels,
    Tiles,
    averaging,
    check_grid,
    homes,
    joined,
    means,
    nearest_grid,
    pool,
    tiles_of,
    windows,
)
from tokred.maps import take, wide
from tokred.reconstruction import (
    Bilinear,
    Nearest,
    centred,
    check_reconstruction,
    check_tau,
    nearest,
    reconstruct,
    temperature,
)
from tokred.reducers.protocol import ADDED, Filling, Tokens, brief
from tokred.reducers.registry import register
from tokred.schedule import Hourglass

__all__ = [
    "SLIC",
    "Bilinear",
    "Nearest",
    "Pooled",
    "Superpixels",
    "assign",
    "cluster",
    "nearest",
    "nearest_grid",
    "reconstruct",
]


@register("slic")
@dataclass(frozen=True)
class SLIC:
    """Clusters neighbours on the grid, softly; the clusters are on a grid again.

    Stands before the block and compares the tokens themselves. With `iterations=0`, and
    `reconstruction="bilinear"` in `tokred.apply`, it is the baseline of the paper's tables 4 and 5.

    Args:
        grid: rows and columns of the clusters. If not given, the grid with the aspect ratio of the
            tokens' grid that comes nearest to the number of tokens to keep.
        neighbourhood: a token is compared with the clusters in this many rows and columns around
            it; odd.
        iterations: how often tokens are assigned to clusters; 0 is average pooling.
        tau: squared distances are divided by it before the softmax, both for clustering and for
            reconstruction. It depends on the scale of the features: 50 suits a ViT-L, 3 a model
            of width 64. If not given, it is chosen by the features, see `cluster` and
            `tokred.reconstruction.nearest`.
        k: how many clusters a token is made of in the reconstruction.
        copies: which cluster a token is a copy of, with `reconstruction="copy"` in `tokred.apply`:
            "nearest", the one whose centre is nearest to it, as in the published code, or
            "assigned", the one that most of it went into in the last round, whose centre may have
            moved away from it since. (Without rounds, the one whose cell it falls into.)
        filling: where blocks attend in windows, what the windows at the edges of a feature map that
            are not full are filled up with before they are clustered: copies of the "border", or
            "zeros", as in the published code.
    """

    grid: tuple[int, int] | None = None
    neighbourhood: int = 5
    iterations: int = 5
    tau: float | None = None
    k: int = 20
    copies: str = field(default="nearest", metadata=ADDED)
    filling: Filling = field(default="border", metadata=ADDED)

    place: ClassVar[str] = "before"
    proportional: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    bibtex: ClassVar[str] = """@inproceedings{liang2022expediting,
  title     = {Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning},
  author    = {Liang, Weicong and Yuan, Yuhui and Ding, Henghui and Luo, Xiao and Lin, Weihong and
               Jia, Ding and Zhang, Zheng and Zhang, Chao and Hu, Han},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}"""

    __repr__ = brief

    def __post_init__(self) -> None:
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid must be rows and columns, at least 1 of each, not {self.grid}")
        _check_clustering(self.neighbourhood, self.iterations, self.tau)
        check_reconstruction(self.k, self.tau)
        if self.copies not in ("nearest", "assigned"):
            raise ValueError(f"copies must be 'nearest' or 'assigned', not {self.copies!r}")
        if self.filling not in ("border", "zeros"):
            raise ValueError(f"filling must be 'border' or 'zeros', not {self.filling!r}")

    @property
    def reconstruction(self) -> Nearest:
        """What the full grid is made of: the nearest clusters."""
        return Nearest(self.k, self.tau)

    @property
    def copying(self) -> Nearest | None:
        """What the full grid is made of, if it is to be made of copies."""
        return Nearest(k=1) if self.copies == "nearest" and self.iterations > 0 else None

    def schedule(self, keep_rate: float) -> Hourglass:
        """What a bare keep rate means: few tokens in the middle of the model."""
        return Hourglass(keep_rate)

    def fit(self, keep: int, grid: tuple[int, int]) -> int:
        """The number of clusters nearest to `keep` that it can make on such a grid."""
        rows, columns = self._clusters(keep, grid)
        return rows * columns

    def _clusters(self, keep: int, grid: tuple[int, int]) -> tuple[int, int]:
        return nearest_grid(keep, grid) if self.grid is None else self.grid

    def __call__(self, tokens: Tokens, keep: int) -> Superpixels | Pooled:
        fine = tokens.grid
        if fine is None:
            raise ValueError(
                "grid is None, but SLIC clusters neighbours on a grid: these tokens stand on none, "
                "because of an earlier reduction, of padding, or of how the model lays them out"
            )
        grid = self._clusters(keep, fine)
        if grid[0] * grid[1] != keep:
            raise ValueError(
                f"keep must be the size of a grid, not {keep}; nearest to that, for {fine[0]} x "
                f"{fine[1]} tokens, is {grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
                + (", which was asked for as `grid`" if self.grid else "")
            )
        x = tokens.x.detach().unflatten(1, fine)
        if self.iterations == 0:
            check_grid(grid, fine, self.neighbourhood)
            return Pooled(fine, grid, homes(fine, grid, x.device).expand(x.shape[0], -1))
        log_parts = assign(x, grid, self.neighbourhood, self.iterations, self.tau)
        return Superpixels(fine, grid, self.neighbourhood, log_parts)


def cluster(
    x: Float[Tensor, "batch rows columns dim"],
    grid: tuple[int, int],
    neighbourhood: int = 5,
    iterations: int = 5,
    tau: float | None = 50.0,
) -> Float[Tensor, "batch clusters dim"]:
    """The centres of a grid of clusters, row by row.

    Args:
        x: the tokens on their grid, in any floating-point dtype. Centres have the same dtype; they
            are computed in float32 at least.
        grid: rows and columns of the clusters, at most those of the tokens.
        neighbourhood: the candidates of a token are the centres in this many rows and columns, with
            the cell that it falls into in the middle; odd.
        iterations: rounds of assignment and averaging. They start from adaptive average pooling,
            which 0 returns.
        tau: the part of a token that goes into a candidate is proportional to
            exp(-squared distance / tau). If None, it is chosen for each image, so that results do
            not depend on the scale of features: a quarter of the mean squared distance of a token
            from the average of the cell that it falls into.

    Raises:
        ValueError: an argument is out of range.
    """
    fine = (x.shape[1], x.shape[2])
    _check_clustering(neighbourhood, iterations, tau)
    check_grid(grid, fine, neighbourhood)
    if iterations == 0:
        return pool(wide(x.flatten(1, 2)), fine, grid).to(x.dtype)
    tiles = tiles_of(fine, grid, neighbourhood, x.device, x.shape[3], iterations)
    z, mean = centred(wide(x.flatten(1, 2)))
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in half precision
        log_parts = _rounds(*_scaled(z, fine, grid, tau), tiles, iterations)
        return (means(z, log_parts, tiles) + mean).to(x.dtype)


def assign(
    x: Float[Tensor, "batch rows columns dim"],
    grid: tuple[int, int],
    neighbourhood: int = 5,
    iterations: int = 5,
    tau: float | None = 50.0,
) -> Float[Tensor, "batch tokens candidates"]:
    """The last assignment that `cluster` makes for the same arguments; `iterations` must be at
    least 1.

    Returns:
        The logarithm of the part of each token that goes into each of its candidates, at least
        float32. `Superpixels.log_parts` says which clusters are candidates.
    """
    fine = (x.shape[1], x.shape[2])
    _check_clustering(neighbourhood, iterations, tau, least=1)
    check_grid(grid, fine, neighbourhood)
    tiles = tiles_of(fine, grid, neighbourhood, x.device, x.shape[3], iterations)
    z, _ = centred(wide(x.flatten(1, 2)))
    with torch.autocast(x.device.type, enabled=False):
        return _rounds(*_scaled(z, fine, grid, tau), tiles, iterations)


def _rounds(
    z: Float[Tensor, "batch fine dim"], tau: float, tiles: Tiles, iterations: int
) -> Float[Tensor, "batch fine candidates"]:
    """Equations 2 and 3 in turn; returns the logarithms of the parts of the last assignment."""
    pooled = tiles.pooled.to(z.dtype)
    parts = (pooled / pooled.sum(-1, keepdim=True)).expand(z.shape[0], -1, -1, -1)
    inner = joined([window @ window.mT for window in windows(z, tiles)])
    log_parts = _assigned(inner, parts, tiles, tau)
    for _ in range(iterations - 1):
        log_parts = _assigned(inner, averaging(log_parts, tiles), tiles, tau)
    return log_parts


def _assigned(
    inner: Float[Tensor, "batch tiles window window"],
    parts: Float[Tensor, "batch tiles cells window"],
    tiles: Tiles,
    tau: float,
) -> Float[Tensor, "batch fine candidates"]:
    """Equation 2: the softmax of -|z - s|^2 / tau over the candidates of each token."""
    products = parts @ inner
    lengths = (products * parts).sum(-1, keepdim=True)
    # |z|^2 is the same for all candidates, and cancels in the softmax.
    logits = ((2 * products - lengths) / tau).flatten(1)
    logits = logits.gather(1, tiles.to_tokens.expand(logits.shape[0], -1))
    logits = logits.view(-1, *tiles.near.shape)
    return logits.masked_fill(~tiles.near, -torch.inf).log_softmax(-1)


def _scaled(
    z: Float[Tensor, "batch fine dim"],
    fine: tuple[int, int],
    grid: tuple[int, int],
    tau: float | None,
) -> tuple[Float[Tensor, "batch fine dim"], float]:
    """The tokens and their temperature. If `tau` is None, tokens scaled to temperature 1."""
    if tau is not None:
        return z, tau
    middles = take(pool(z, fine, grid), homes(fine, grid, z.device).expand(z.shape[0], -1))
    return z * temperature((z - middles).square().sum(-1), z).rsqrt(), 1.0


def _check_clustering(
    neighbourhood: int, iterations: int, tau: float | None, least: int = 0
) -> None:
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        raise ValueError(
            f"neighbourhood must be odd, at least 1, so that one cell is in its middle, not "
            f"{neighbourhood}"
        )
    if iterations < least:
        raise ValueError(f"iterations must be at least {least}, not {iterations}")
    check_tau(tau)
