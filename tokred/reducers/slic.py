"""Clusters of neighbours on the grid of tokens, and the full grid made of them again.

Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
NeurIPS 2022, https://arxiv.org/abs/2210.01035, section 3: token clustering (equations 2 and 3),
which is that of superpixels, with soft assignments; token reconstruction (equation 4). Differs from
the published code in that the weights of a reconstruction add up to 1 (there their squares do, by
which tokens grow), in that tau means the same in both steps, and in that tokens are compared with
their candidates alone (there with all centres, of which most are masked then).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tokred.maps import blend, take
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register
from tokred.schedule import Hourglass


@register("slic")
@dataclass(frozen=True)
class SLIC:
    """Clusters neighbours on the grid, softly; the clusters are on a grid again.

    Stands before the block and compares the tokens themselves. With `iterations=0`, and
    `reconstruction="bilinear"` in `tokred.apply`, it is the baseline of the paper's tables 4 and 5.

    Args:
        grid: rows and columns of the clusters. If not given, those nearest to the number of tokens
            to keep, in the aspect of the tokens' grid.
        neighbourhood: the candidates of a token are the clusters in so many rows and columns
            around it; odd.
        iterations: how often the clusters are refined; 0 is average pooling.
        tau: squared distances are divided by it before the softmax, in both steps. It goes with the
            scale of the features (50 is for those of a ViT-L, 3 for some of width 64), by itself if
            it is not given: see `cluster` and `nearest`.
        k: of how many clusters every token is made again.
    """

    grid: tuple[int, int] | None = None
    neighbourhood: int = 5
    iterations: int = 5
    tau: float | None = None
    k: int = 20

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

    def __post_init__(self) -> None:
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid must be rows and columns, at least 1 of each, not {self.grid}")
        _check_clustering(self.neighbourhood, self.iterations, self.tau)
        _check_reconstruction(self.k, self.tau)

    @property
    def reconstruction(self) -> Nearest:
        """What the full grid is made of."""
        return Nearest(self.k, self.tau)

    def schedule(self, keep_rate: float) -> Hourglass:
        """What a bare keep rate means."""
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
            _check_grid(grid, fine, self.neighbourhood)
            return Pooled(fine, grid, _homes(fine, grid, x.device).expand(x.shape[0], -1))
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
        x: the tokens on their grid, in any floating-point dtype. Centres have it, too; all that
            lies between is at least float32.
        grid: rows and columns of the clusters, at most those of the tokens.
        neighbourhood: the candidates of a token are the centres in so many rows and columns: of
            the cell that it falls into, which is in the middle, and of those around; odd.
        iterations: rounds of assignment and averaging. They begin with adaptive average pooling,
            which is what 0 returns.
        tau: a token goes into a candidate in proportion to exp(-squared distance / tau). If None,
            it is a quarter of the mean squared distance, in each image, of tokens from the average
            of the cell that they fall into: so results do not depend on the scale of features.

    Raises:
        ValueError: an argument is out of range.
    """
    fine = (x.shape[1], x.shape[2])
    _check_clustering(neighbourhood, iterations, tau)
    _check_grid(grid, fine, neighbourhood)
    if iterations == 0:
        return _pool(_wide(x.flatten(1, 2)), fine, grid).to(x.dtype)
    tiles = _tiles(fine, grid, neighbourhood, x.device, x.shape[3], iterations)
    z, mean = _centred(_wide(x.flatten(1, 2)))
    with torch.autocast(x.device.type, enabled=False):  # which would multiply in half precision
        log_parts = _rounds(*_scaled(z, fine, grid, tau), tiles, iterations)
        return (_means(z, log_parts, tiles) + mean).to(x.dtype)


def assign(
    x: Float[Tensor, "batch rows columns dim"],
    grid: tuple[int, int],
    neighbourhood: int = 5,
    iterations: int = 5,
    tau: float | None = 50.0,
) -> Float[Tensor, "batch tokens candidates"]:
    """The last assignment that `cluster` makes of the same arguments, with 1 iteration at least.

    Returns:
        The logarithm of the part of each token that goes into each of its candidates, at least
        float32. See `Superpixels` for which these are.
    """
    fine = (x.shape[1], x.shape[2])
    _check_clustering(neighbourhood, iterations, tau, least=1)
    _check_grid(grid, fine, neighbourhood)
    tiles = _tiles(fine, grid, neighbourhood, x.device, x.shape[3], iterations)
    z, _ = _centred(_wide(x.flatten(1, 2)))
    with torch.autocast(x.device.type, enabled=False):
        return _rounds(*_scaled(z, fine, grid, tau), tiles, iterations)


def nearest(
    before: Float[Tensor, "batch tokens dim"],
    centres: Float[Tensor, "batch clusters dim"],
    k: int = 20,
    tau: float | None = 50.0,
) -> tuple[Int[Tensor, "batch tokens k"], Float[Tensor, "batch tokens k"]]:
    """The clusters that each token is made of again, and how much of each (equation 4).

    Args:
        before: the tokens before they were clustered.
        centres: the clusters before they were refined.
        k: how many clusters, at least 1; all of them if there are fewer. Of equally near ones, it
            is not said which are taken.
        tau: clusters count in proportion to exp(-squared distance / tau). If None, it is a
            quarter of the mean squared distance, in each image, of tokens from their nearest
            clusters.

    Returns:
        Which clusters, the nearest first, and their weights, at least float32, which add up to 1.

    Raises:
        ValueError: `k` or `tau` is out of range.
    """
    _check_reconstruction(k, tau)
    s, mean = _centred(_wide(centres))
    z = _wide(before) - mean
    with torch.autocast(z.device.type, enabled=False):
        # |z|^2 is the same for all clusters, and cancels in the softmax.
        length = s.square().sum(-1)[:, None, :]
        near = torch.baddbmm(length, z, s.transpose(1, 2), beta=-1, alpha=2)
        closest = near.topk(min(k, s.shape[1]), dim=-1)
        logits = closest.values
        scale: Tensor | float
        if tau is None:
            apart = z.square().sum(-1) - logits[..., 0]
            scale = _temperature(apart, z)
        else:
            scale = tau
        return closest.indices, (logits / scale).softmax(-1)


def reconstruct(
    before: Float[Tensor, "batch tokens dim"],
    centres_before: Float[Tensor, "batch clusters dim"],
    centres_after: Float[Tensor, "batch clusters dim_after"],
    k: int = 20,
    tau: float | None = 50.0,
) -> Float[Tensor, "batch tokens dim_after"]:
    """Every token as a weighted mean of refined clusters, of those that were nearest to it before
    they were refined (equation 4).

    Args:
        before: the tokens before they were clustered.
        centres_before: the clusters before they were refined.
        centres_after: the clusters after that. The result has their dtype.
        k: see `nearest`.
        tau: see `nearest`.

    Raises:
        ValueError: `k` or `tau` is out of range.
    """
    index, weight = nearest(before, centres_before, k, tau)
    return blend(centres_after, index, weight)


@dataclass(frozen=True)
class Nearest:
    """Makes every token again of the clusters that it was nearest to, by its distances from them.

    Args:
        k: of how many; of all if there are fewer.
        tau: squared distances are divided by it before the softmax. If not given, it goes with
            the features, see `nearest`.
    """

    k: int = 20
    tau: float | None = None

    def __post_init__(self) -> None:
        _check_reconstruction(self.k, self.tau)

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
        rows, of_rows = _between(grid[0], coarse_grid[0], coarse)
        columns, of_columns = _between(grid[1], coarse_grid[1], coarse)
        index = _crossed(torch.add, rows * coarse_grid[1], columns)
        return index[None], _crossed(torch.mul, of_rows, of_columns)[None]


def nearest_grid(num: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns in the aspect of a grid, as nearly as whole numbers have it, that make
    nearly `num` cells."""

    def scaled(side: int, over: int, under: int) -> int:
        return max(1, (2 * side * over + under) // (2 * under))

    rows, columns = grid
    grids = [(row, scaled(row, columns, rows)) for row in range(1, rows + 1)]
    grids += [(scaled(column, rows, columns), column) for column in range(1, columns + 1)]
    best = grids[0]
    for few in grids[1:]:  # older versions of torch.compile know no `min` by a key
        if abs(few[0] * few[1] - num) < abs(best[0] * best[1] - num):
            best = few
    return best


# Maps


@dataclass(frozen=True)
class Superpixels:
    """Soft merging on a grid: every token goes into several clusters near it, in parts.

    Attributes:
        fine: rows and columns of the tokens.
        grid: rows and columns of the clusters.
        neighbourhood: as in `cluster`.
        log_parts: the logarithm of the part of each token that goes into each candidate. These are
            min(neighbourhood, rows) x min(neighbourhood, columns) cells around the token's own,
            row by row, all shifted into the grid where they would reach over its edge; a cell that
            is too far away because of that has part 0. Logarithms, because those cannot vanish:
            also of a cluster that no token would choose, equation 3 is a mean, not 0 / 0.
    """

    merges: ClassVar[bool] = True
    ragged: ClassVar[bool] = False

    fine: tuple[int, int]
    grid: tuple[int, int]
    neighbourhood: int
    log_parts: Float[Tensor, "batch fine candidates"]

    @property
    def num_coarse(self) -> int:
        return self.grid[0] * self.grid[1]

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        """The means of tokens, each counted by its part and by what it stands for; in float32."""
        counted = self.log_parts + size.to(self.log_parts.dtype).log()[..., None]
        with torch.autocast(x.device.type, enabled=False):
            return _means(_wide(x), counted, self._tiles(x.shape[2])).to(x.dtype)

    def up(
        self,
        y: Float[Tensor, "batch coarse dim"],
        stale: Float[Tensor, "batch fine dim"] | None = None,
    ) -> Float[Tensor, "batch fine dim"]:
        """Every token gets a copy of the cluster that most of it went into."""
        return take(y, self.labels())

    def total(self, size: Float[Tensor, "batch fine"]) -> Float[Tensor, "batch coarse"]:
        tiles = self._tiles()
        sizes = size[:, tiles.token][:, :, None]
        totals = (_in_tiles(self.log_parts, tiles).exp() * sizes).sum(-1)
        return totals.flatten(1)[:, tiles.place].to(size.dtype)

    def labels(self) -> Int[Tensor, "batch fine"]:
        candidate = self._tiles().candidate.expand(self.log_parts.shape[0], -1, -1)
        return candidate.gather(2, self.log_parts.argmax(-1, keepdim=True)).squeeze(2)

    def representatives(self) -> Int[Tensor, "batch coarse"]:
        """The tokens in the middle of the clusters' cells."""
        middle = _middles(self.fine, self.grid, self.log_parts.device)
        return middle.expand(self.log_parts.shape[0], -1)

    def _tiles(self, dim: int = 1) -> _Tiles:
        return _tiles(self.fine, self.grid, self.neighbourhood, self.log_parts.device, dim, 0)


@dataclass(frozen=True)
class Pooled:
    """Adaptive average pooling as a map.

    Attributes:
        fine: rows and columns of the tokens.
        grid: rows and columns of the clusters.
        home: the cell that each token falls into. What is pooled are the tokens of a cell and
            those across which its border runs, which so go into several clusters, in equal parts.
    """

    merges: ClassVar[bool] = True
    ragged: ClassVar[bool] = False

    fine: tuple[int, int]
    grid: tuple[int, int]
    home: Int[Tensor, "batch fine"]

    @property
    def num_coarse(self) -> int:
        return self.grid[0] * self.grid[1]

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        """The means of tokens, each counted by how many it stands for; in float32."""
        counted = _pool(_wide(x) * size[..., None], self.fine, self.grid)
        return (counted / _pool(size[..., None], self.fine, self.grid)).to(x.dtype)

    def up(
        self,
        y: Float[Tensor, "batch coarse dim"],
        stale: Float[Tensor, "batch fine dim"] | None = None,
    ) -> Float[Tensor, "batch fine dim"]:
        """Every token gets a copy of the cluster in whose cell it is."""
        return take(y, self.home)

    def total(self, size: Float[Tensor, "batch fine"]) -> Float[Tensor, "batch coarse"]:
        sides = []
        for fine, coarse in zip(self.fine, self.grid, strict=True):
            cell = torch.arange(coarse, device=size.device)[:, None]
            inside = _pooled(fine, coarse, cell, torch.arange(fine, device=size.device))
            sides.append(inside.to(size.dtype) / inside.sum(0))
        sizes = size.view(-1, *self.fine)
        return (sides[0] @ sizes @ sides[1].T).flatten(1)

    def labels(self) -> Int[Tensor, "batch fine"]:
        return self.home

    def representatives(self) -> Int[Tensor, "batch coarse"]:
        """The tokens in the middle of the clusters' cells."""
        middle = _middles(self.fine, self.grid, self.home.device)
        return middle.expand(self.home.shape[0], -1)


# Rounds, tile by tile. A tile is a few rows and columns of clusters; its window is the rectangle of
# all tokens that have one of these among their candidates. A centre s is a mean of tokens of that
# window, and is compared with these alone. So all that the rounds have to know of the tokens are
# the inner products <z, z'> inside each window, which are formed once, in matrix products large
# enough to be fast: if P is what each token has in s, then <s, z> = P <z, z'>, |s|^2 = P <z, s>.
# That sums over a window's tokens, which are fewer than the dimensions of a vector. The centres
# themselves are only formed at the end.


class _Axis(NamedTuple):
    """What goes where, along one side of the grid.

    Attributes:
        cell: the clusters of each tile. Tiles may overlap, so as to be of one size.
        token: the tokens of each window; likewise.
        candidate: of each token. Shifted into the grid; see `Superpixels.log_parts`.
        near: whether it is one, or was just shifted.
        tile: the (first) tile that has this candidate.
        slot: as which of its clusters.
        position: as which of its window's tokens the token itself is there.
        number: as which of its candidates a token of the window has a cluster of the tile.
        has: whether it has.
        pooled: whether adaptive average pooling takes it into that cluster.
        first: the tile and the slot of each cluster.
    """

    cell: Int[Tensor, "tiles cells"]
    token: Int[Tensor, "tiles window"]
    candidate: Int[Tensor, "fine candidates"]
    near: Bool[Tensor, "fine candidates"]
    tile: Int[Tensor, "fine candidates"]
    slot: Int[Tensor, "fine candidates"]
    position: Int[Tensor, "fine candidates"]
    number: Int[Tensor, "tiles cells window"]
    has: Bool[Tensor, "tiles cells window"]
    pooled: Bool[Tensor, "tiles cells window"]
    first: tuple[Int[Tensor, "coarse 1"], Int[Tensor, "coarse 1"]]


def _axis(fine: int, coarse: int, side: int, radius: int, device: torch.device) -> _Axis:
    def count(number: int) -> Tensor:
        return torch.arange(number, device=device)

    reach, window = max(radius, 1), _window(fine, coarse, side, radius)
    cells_from = (count(-(-coarse // side)) * side).clamp(max=coarse - side)
    tokens_from = _ceil((cells_from - reach).clamp(min=0) * fine, coarse).clamp(max=fine - window)
    cell = cells_from[:, None] + count(side)
    token = tokens_from[:, None] + count(window)

    candidates = min(2 * radius + 1, coarse)
    home = _home(fine, coarse, device)
    candidate_from = (home - radius).clamp(0, coarse - candidates)
    candidate = candidate_from[:, None] + count(candidates)
    tile = candidate // side
    every = count(coarse)[:, None]
    return _Axis(
        cell=cell,
        token=token,
        candidate=candidate,
        near=(candidate - home[:, None]).abs() <= radius,
        tile=tile,
        slot=candidate - cells_from[tile],
        position=(count(fine)[:, None] - tokens_from[tile]).clamp(0, window - 1),
        number=cell[:, :, None] - candidate_from[token][:, None, :],
        has=(cell[:, :, None] - home[token][:, None, :]).abs() <= radius,
        pooled=_pooled(fine, coarse, cell[:, :, None], token[:, None, :]),
        first=(every // side, every - cells_from[every // side]),
    )


def _window(fine: int, coarse: int, side: int, radius: int) -> int:
    """The most tokens, along one side of the grid, that have one of `side` clusters in a row as a
    candidate, or are pooled into one."""
    most, reach = 0, max(radius, 1)
    for tile in range(-(-coarse // side)):
        start = min(tile * side, coarse - side)
        begin = -(-max(start - reach, 0) * fine // coarse)
        end = -(-min(start + side + reach, coarse) * fine // coarse)
        most = max(most, end - begin)
    return most


class _Tiles(NamedTuple):
    """What goes where, on the grid.

    Attributes:
        number: how many tiles there are.
        cells: how many clusters are in a tile.
        window: how many tokens are in its window.
        cell: the clusters of all tiles.
        token: the tokens of all windows.
        place: where in `cell` each cluster is (for the first time).
        candidate: of each token.
        near: whether it is one, or was just shifted into the grid.
        to_tokens: where in [tiles, cells, window] each token has its candidates.
        to_tiles: where in [tokens, candidates] those are; behind its end, if they are none.
        pooled: whether adaptive average pooling takes a token of the window into a cluster.
    """

    number: int
    cells: int
    window: int
    token: Int[Tensor, "tiles window"]
    place: Int[Tensor, " coarse"]
    candidate: Int[Tensor, "fine candidates"]
    near: Bool[Tensor, "fine candidates"]
    to_tokens: Int[Tensor, " fine_candidates"]
    to_tiles: Int[Tensor, " tiles_cells_window"]
    pooled: Bool[Tensor, "tiles cells window"]


def _tiles(
    fine: tuple[int, int],
    grid: tuple[int, int],
    neighbourhood: int,
    device: torch.device,
    dim: int,
    iterations: int,
) -> _Tiles:
    """All of it from a few whole numbers, on the device, which nothing here waits for. The last
    two only make it fast for them."""
    radius = neighbourhood // 2
    side = _best_side(fine, grid, radius, dim, iterations)
    y = _axis(fine[0], grid[0], side[0], radius, device)
    x = _axis(fine[1], grid[1], side[1], radius, device)
    (tiles_y, window_y), (tiles_x, window_x) = y.token.shape, x.token.shape
    cells, window = side[0] * side[1], window_y * window_x
    candidates_x = x.candidate.shape[1]
    candidates = y.candidate.shape[1] * candidates_x

    first_y = y.first[0] * (tiles_x * cells) + y.first[1] * side[1]
    first_x = x.first[0] * cells + x.first[1]
    of_y = (y.tile * (tiles_x * cells) + y.slot * side[1]) * window + y.position * window_x
    of_x = (x.tile * cells + x.slot) * window + x.position

    nowhere = fine[0] * fine[1] * candidates
    to_y = y.token[:, None, :] * (fine[1] * candidates) + y.number * candidates_x
    to_x = x.token[:, None, :] * candidates + x.number
    to_y, to_x = torch.where(y.has, to_y, nowhere), torch.where(x.has, to_x, nowhere)
    to_tiles = to_y[:, None, :, None, :, None] + to_x[None, :, None, :, None, :]
    pooled = y.pooled[:, None, :, None, :, None] & x.pooled[None, :, None, :, None, :]
    return _Tiles(
        number=tiles_y * tiles_x,
        cells=cells,
        window=window,
        token=_crossed(torch.add, y.token * fine[1], x.token),
        place=_crossed(torch.add, first_y, first_x).flatten(),
        candidate=_crossed(torch.add, y.candidate * grid[1], x.candidate),
        near=_crossed(torch.logical_and, y.near, x.near),
        to_tokens=_crossed(torch.add, of_y, of_x).flatten(),
        to_tiles=to_tiles.clamp(max=nowhere).flatten(),
        pooled=pooled.reshape(-1, cells, window),
    )


def _best_side(
    fine: tuple[int, int], grid: tuple[int, int], radius: int, dim: int, iterations: int
) -> tuple[int, int]:
    """Rows and columns of clusters in a tile: what takes the least time.

    That is counted in inner products of two tokens. To fetch a token (twice) takes as long as 40
    of them, and to put a part into another order as a quarter of one (on a CPU, with 1024
    dimensions).
    Without iterations, there is an average to be taken.
    """
    best, least = grid, math.inf
    for side in (2, 3, 4, 5, 6, 7, 8, 10, 12, max(grid)):
        sides = (min(side, grid[0]), min(side, grid[1]))
        cells = sides[0] * sides[1]
        tiles = -(-grid[0] // sides[0]) * -(-grid[1] // sides[1])
        window = _window(fine[0], grid[0], sides[0], radius)
        window *= _window(fine[1], grid[1], sides[1], radius)
        per_token = cells + iterations * cells * (window / dim + 0.25)
        per_token += window if iterations else 0
        cost = tiles * window * (per_token + (40 if tiles > 1 else 0))
        if cost < least:
            best, least = sides, cost
    return best


def _scaled(
    z: Float[Tensor, "batch fine dim"],
    fine: tuple[int, int],
    grid: tuple[int, int],
    tau: float | None,
) -> tuple[Float[Tensor, "batch fine dim"], float]:
    """Tokens and their temperature; if that has to be found, tokens for which it is 1."""
    if tau is not None:
        return z, tau
    middles = take(_pool(z, fine, grid), _homes(fine, grid, z.device).expand(z.shape[0], -1))
    return z * _temperature((z - middles).square().sum(-1), z).rsqrt(), 1.0


def _temperature(
    apart: Float[Tensor, "batch fine"], z: Float[Tensor, "batch fine dim"]
) -> Float[Tensor, "batch 1 1"]:
    """A quarter of the mean of squared distances from clusters, which on the bundled models is as
    good as the best number that was found by trying. Where tokens do not differ from clusters, as
    little as leaves the rounding of those distances behind."""
    least = z.square().sum(-1).mean(1) * 1e-5 + torch.finfo(z.dtype).tiny
    return torch.maximum(apart.mean(1) / 4, least)[:, None, None]


def _rounds(
    z: Float[Tensor, "batch fine dim"], tau: float, tiles: _Tiles, iterations: int
) -> Float[Tensor, "batch fine candidates"]:
    """Equations 2 and 3 in turn, up to the last assignment: the logarithms of its parts."""
    pooled = tiles.pooled.to(z.dtype)
    parts = (pooled / pooled.sum(-1, keepdim=True)).expand(z.shape[0], -1, -1, -1)
    inner = _joined([windows @ windows.mT for windows in _windows(z, tiles)])
    log_parts = _assigned(inner, parts, tiles, tau)
    for _ in range(iterations - 1):
        log_parts = _assigned(inner, _averaging(log_parts, tiles), tiles, tau)
    return log_parts


def _windows(
    z: Float[Tensor, "batch fine dim"], tiles: _Tiles
) -> Iterator[Float[Tensor, "batch some_tiles window dim"]]:
    """The tokens of all windows, some windows at a time: all of them together would be several
    times as large as the map itself."""
    if tiles.number == 1:  # all tokens in their order
        yield z[:, None]
        return
    for some in tiles.token.split(_at_once(z, tiles)):
        windows = take(z, some.flatten().expand(z.shape[0], -1))
        yield windows.view(z.shape[0], -1, tiles.window, z.shape[2])


def _at_once(z: Float[Tensor, "batch fine dim"], tiles: _Tiles) -> int:
    """How many windows to have at a time. On the CPU, they stay in the cache."""
    if torch.compiler.is_compiling():  # there the batch may have no number
        return tiles.number
    elements = 2**20 if z.device.type == "cpu" else 2**28
    return max(1, elements // max(1, z.shape[0] * tiles.window * z.shape[2]))


def _joined(
    parts: Sequence[Float[Tensor, "batch some_tiles *shape"]],
) -> Float[Tensor, "batch tiles *shape"]:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _assigned(
    inner: Float[Tensor, "batch tiles window window"],
    parts: Float[Tensor, "batch tiles cells window"],
    tiles: _Tiles,
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


def _averaging(
    log_parts: Float[Tensor, "batch fine candidates"], tiles: _Tiles
) -> Float[Tensor, "batch tiles cells window"]:
    """Equation 3, with the denominator of listing 1: what each token has in a centre, q / sum of q
    over the tokens."""
    return _in_tiles(log_parts, tiles).softmax(-1)


def _in_tiles(
    log_parts: Float[Tensor, "batch fine candidates"], tiles: _Tiles
) -> Float[Tensor, "batch tiles cells window"]:
    """The parts that go into the clusters of each tile; -inf where there is none."""
    parts = F.pad(log_parts.flatten(1), (0, 1), value=-torch.inf)
    parts = parts.gather(1, tiles.to_tiles.expand(parts.shape[0], -1))
    return parts.view(-1, tiles.number, tiles.cells, tiles.window)


def _means(
    z: Float[Tensor, "batch fine dim"],
    log_parts: Float[Tensor, "batch fine candidates"],
    tiles: _Tiles,
) -> Float[Tensor, "batch coarse dim"]:
    """The centres by equation 3, in their order."""
    parts = _averaging(log_parts, tiles).split(_at_once(z, tiles), 1)
    s = _joined([p @ windows for p, windows in zip(parts, _windows(z, tiles), strict=True)])
    return take(s.flatten(1, 2), tiles.place.expand(s.shape[0], -1))


def _wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """At least float32: squares of float16 overflow, and its sums lose what they are made of."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(
    x: Float[Tensor, "batch tokens dim"],
) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch 1 dim"]]:
    """Without the mean, and that. Distances are the same from any origin; what all tokens have in
    common costs digits, where they are differences of products."""
    mean = x.mean(1, keepdim=True)
    return x - mean, mean


# Grids: token i of n falls into cell floor(i * m / n) of m.


def _home(fine: int, coarse: int, device: torch.device) -> Int[Tensor, " fine"]:
    return torch.arange(fine, device=device) * coarse // fine


def _homes(
    fine: tuple[int, int], grid: tuple[int, int], device: torch.device
) -> Int[Tensor, " fine"]:
    rows = _home(fine[0], grid[0], device) * grid[1]
    return _crossed(torch.add, rows[:, None], _home(fine[1], grid[1], device)[:, None]).flatten()


def _middles(
    fine: tuple[int, int], grid: tuple[int, int], device: torch.device
) -> Int[Tensor, " coarse"]:
    """The token in the middle of each cell, or the one before that."""

    def middle(n: int, m: int) -> Tensor:
        cell = torch.arange(m, device=device)
        return (_ceil(cell * n, m) + _ceil((cell + 1) * n, m) - 1) // 2

    rows, columns = middle(fine[0], grid[0]) * fine[1], middle(fine[1], grid[1])
    return _crossed(torch.add, rows[:, None], columns[:, None]).flatten()


def _pool(
    x: Float[Tensor, "batch fine dim"], fine: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "batch coarse dim"]:
    """Adaptive average pooling: cell i of m is the mean of floor(i * n / m) to
    ceil((i + 1) * n / m)."""
    image = x.unflatten(1, fine).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(image, grid).flatten(2).transpose(1, 2)


def _pooled(
    fine: int, coarse: int, cell: Int[Tensor, "*cells"], token: Int[Tensor, "*tokens"]
) -> Bool[Tensor, "*both"]:
    """Whether adaptive average pooling takes a token into a cell; along one side of the grid."""
    return (token >= cell * fine // coarse) & (token < _ceil((cell + 1) * fine, coarse))


def _between(
    fine: int, coarse: int, like: Float[Tensor, "*shape"]
) -> tuple[Int[Tensor, "fine 2"], Float[Tensor, "fine 2"]]:
    """The two cells between whose middles the middle of each token lies, and their weights."""
    token = torch.arange(fine, device=like.device)
    # From the middle of the first cell, in cells of 2 * fine units.
    from_first = ((2 * token + 1) * coarse - fine).clamp(0, (coarse - 1) * 2 * fine)
    low = from_first // (2 * fine)
    high = (low + 1).clamp(max=coarse - 1)
    part = (from_first - low * 2 * fine).to(_wide(like[:0]).dtype) / (2 * fine)
    return torch.stack([low, high], 1), torch.stack([1 - part, part], 1)


def _crossed(
    combined: Callable[[Tensor, Tensor], Tensor],
    a: Shaped[Tensor, "rows of_row"],
    b: Shaped[Tensor, "columns of_column"],
) -> Shaped[Tensor, "rows_columns of_row_column"]:
    """What rows and columns have, combined for every place on the grid, row by row."""
    both = combined(a[:, None, :, None], b[None, :, None, :])
    return both.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def _ceil(over: Int[Tensor, "*shape"], under: int) -> Int[Tensor, "*shape"]:
    return (over + under - 1) // under


def _check_grid(grid: tuple[int, int], fine: tuple[int, int], neighbourhood: int) -> None:
    # Where a side has more clusters than tokens, each must still be a candidate of one.
    reach = 1 + neighbourhood // 2
    if (
        len(grid) != 2
        or not all(1 <= few <= reach * many for few, many in zip(grid, fine, strict=True))
        or grid[0] * grid[1] > fine[0] * fine[1]
    ):
        raise ValueError(
            f"grid must be between 1 x 1 and the {fine[0]} x {fine[1]} of the tokens (one side may "
            f"have up to {reach} times as many, if all have no more than the tokens), not {grid}"
        )


def _check_clustering(
    neighbourhood: int, iterations: int, tau: float | None, least: int = 0
) -> None:
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        raise ValueError(
            f"neighbourhood must be odd, at least 1, as there is a cell in its middle, not "
            f"{neighbourhood}"
        )
    if iterations < least:
        raise ValueError(f"iterations must be at least {least}, not {iterations}")
    _check_tau(tau)


def _check_reconstruction(k: int, tau: float | None) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1 cluster, not {k}")
    _check_tau(tau)


def _check_tau(tau: float | None) -> None:
    if tau is not None and not tau > 0:
        raise ValueError(f"tau must be above 0, not {tau}")
