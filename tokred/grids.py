"""Grids of tokens and coarser grids of cells: arithmetic, pooling, and soft clusters on them.

Token i of n, along one side of a grid, falls into cell floor(i * m / n) of m.

`Pooled` and `Superpixels` are maps from a grid of tokens to a grid of clusters. How `Superpixels`
compares tokens with clusters without forming all pairs:

Clusters are worked on in tiles. A tile is a few rows and columns of clusters; its window is the
rectangle of all tokens that have one of these clusters among their candidates. A centre s is a mean
of tokens of that window, and is only compared with tokens of that window. So inner products <z, z'>
of tokens within each window are all that a comparison needs: if P is the share that each token has
in s, then <s, z> = P <z, z'> and |s|^2 = P <z, s>. The inner products are formed once, in matrix
products that are large enough to be fast. The sums run over the tokens of a window, which are fewer
than the dimensions of a vector. The centres themselves are only formed at the end.
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

from tokred.graphs import in_a_graph
from tokred.maps import deciding, take, wide


def nearest_grid(num: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a coarser grid that has about `num` cells, and about the aspect ratio of
    the given grid.

    Of all grids whose rows (or columns) are a whole number and whose columns (or rows) are rounded
    to the aspect ratio, the one with the number of cells nearest to `num`.
    """

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


@dataclass(frozen=True)
class Pooled:
    """Adaptive average pooling as a map.

    Attributes:
        fine: rows and columns of the tokens.
        grid: rows and columns of the clusters.
        home: the cell that each token falls into. A cluster is the mean of all tokens that overlap
            its cell; a token on a border goes into several clusters, in equal parts.
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
        """The means of tokens, weighted by their sizes; in float32."""
        counted = pool(wide(x) * size[..., None], self.fine, self.grid)
        return (counted / pool(size[..., None], self.fine, self.grid)).to(x.dtype)

    def up(
        self,
        y: Float[Tensor, "batch coarse dim"],
        stale: Float[Tensor, "batch fine dim"] | None = None,
    ) -> Float[Tensor, "batch fine dim"]:
        """Every token gets a copy of the cluster whose cell it falls into."""
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


@dataclass(frozen=True)
class Superpixels:
    """Soft merging on a grid: every token goes into several clusters near it, in parts.

    Attributes:
        fine: rows and columns of the tokens.
        grid: rows and columns of the clusters.
        neighbourhood: see `tokred.reducers.slic.cluster`.
        log_parts: the logarithm of the part of each token that goes into each of its candidates.
            The candidates are min(neighbourhood, rows) x min(neighbourhood, columns) cells around
            the cell that the token falls into, row by row. At an edge of the grid, this rectangle
            is shifted into the grid; cells that are too far away because of the shift get part 0.
            Logarithms do not underflow: a cluster that every token is far from is still a mean of
            tokens, not 0 / 0.
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
        """The means of tokens, weighted by their parts and their sizes; in float32."""
        counted = self.log_parts + size.to(self.log_parts.dtype).log()[..., None]
        with torch.autocast(x.device.type, enabled=False):
            return means(wide(x), counted, self._tiles(x.shape[2])).to(x.dtype)

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
        most = deciding(self.log_parts).argmax(-1, keepdim=True)
        return candidate.gather(2, most).squeeze(2)

    def representatives(self) -> Int[Tensor, "batch coarse"]:
        """The tokens in the middle of the clusters' cells."""
        middle = _middles(self.fine, self.grid, self.log_parts.device)
        return middle.expand(self.log_parts.shape[0], -1)

    def _tiles(self, dim: int = 1) -> Tiles:
        return tiles_of(self.fine, self.grid, self.neighbourhood, self.log_parts.device, dim, 0)


class Tiles(NamedTuple):
    """The tiles of a grid of clusters, and indices from tiles to tokens and back.

    Attributes:
        number: the number of tiles.
        cells: the number of clusters in a tile.
        window: the number of tokens in a window.
        token: the tokens of each window.
        place: the position of each cluster when the clusters of all tiles are laid end to end (the
            first one, if tiles overlap).
        candidate: the candidates of each token, see `Superpixels.log_parts`.
        near: False for candidates that are too far away, and only listed because of the shift.
        to_tokens: the position in a flat [tiles, cells, window] of each token and candidate.
        to_tiles: the position in a flat [tokens, candidates] of each cluster of a tile and token of
            its window; one past the end, if the cluster is no candidate of the token.
        pooled: whether adaptive average pooling takes a token of the window into the cluster.
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


def tiles_of(
    fine: tuple[int, int],
    grid: tuple[int, int],
    neighbourhood: int,
    device: torch.device,
    dim: int,
    iterations: int,
) -> Tiles:
    """The tiles for a grid of tokens and one of clusters. (Indices are computed on the device from
    a few whole numbers, so that nothing has to wait for a copy.)

    Args:
        fine: rows and columns of the tokens.
        grid: rows and columns of the clusters.
        neighbourhood: see `tokred.reducers.slic.cluster`.
        device: where the indices go.
        dim: dimensions of a token. With `iterations`, it only decides how large tiles are.
        iterations: rounds of assignment that the tiles are for; 0 for a mean of tokens alone.
    """
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
    return Tiles(
        number=tiles_y * tiles_x,
        cells=cells,
        window=window,
        token=crossed(torch.add, y.token * fine[1], x.token),
        place=crossed(torch.add, first_y, first_x).flatten(),
        candidate=crossed(torch.add, y.candidate * grid[1], x.candidate),
        near=crossed(torch.logical_and, y.near, x.near),
        to_tokens=crossed(torch.add, of_y, of_x).flatten(),
        to_tiles=to_tiles.clamp(max=nowhere).flatten(),
        pooled=pooled.reshape(-1, cells, window),
    )


class _Axis(NamedTuple):
    """The same along one side of the grid.

    Attributes:
        cell: the clusters of each tile. All tiles are of one size, so the last two may overlap.
        token: the tokens of each window. Windows are of one size, too.
        candidate: the candidates of each token.
        near: False for candidates that are only listed because of the shift into the grid.
        tile: the tile that this candidate is in (the first one, if it is in two).
        slot: the position of the candidate among the clusters of that tile.
        position: the position of the token among the tokens of that tile's window.
        number: the position of this cluster in the window token's list of candidates.
        has: whether the cluster is in that list.
        pooled: whether adaptive average pooling takes the window's token into the cluster.
        first: the tile of each cluster (the first one, if it is in two), and its position there.
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
    """For `fine` tokens and `coarse` clusters, `side` of which make a tile; candidates of a token
    are at most `radius` clusters away."""

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
    """How many tokens a window needs along one side of the grid: the most, over all tiles, that
    have a cluster of the tile as a candidate or are pooled into one."""
    most, reach = 0, max(radius, 1)
    for tile in range(-(-coarse // side)):
        start = min(tile * side, coarse - side)
        begin = -(-max(start - reach, 0) * fine // coarse)
        end = -(-min(start + side + reach, coarse) * fine // coarse)
        most = max(most, end - begin)
    return most


def _best_side(
    fine: tuple[int, int], grid: tuple[int, int], radius: int, dim: int, iterations: int
) -> tuple[int, int]:
    """How many rows and columns of clusters a tile should have to take the least time.

    The unit of time is one inner product of two tokens. Measured on a CPU with 1024 dimensions,
    fetching a token (twice) costs 40 of these, and moving a part to another place a quarter of
    one. Without iterations, only a mean has to be formed.
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


def windows(
    z: Float[Tensor, "batch fine dim"], tiles: Tiles
) -> Iterator[Float[Tensor, "batch some_tiles window dim"]]:
    """The tokens of all windows, some windows at a time: all windows together hold several times as
    many vectors as there are tokens."""
    if tiles.number == 1:  # all tokens, in their order
        yield z[:, None]
        return
    for some in tiles.token.split(_at_once(z, tiles)):
        taken = take(z, some.flatten().expand(z.shape[0], -1))
        yield taken.view(z.shape[0], -1, tiles.window, z.shape[2])


def _at_once(z: Float[Tensor, "batch fine dim"], tiles: Tiles) -> int:
    """How many windows to work on at a time; on the CPU, as many as fit into the cache."""
    if in_a_graph(z):  # there the batch may be a symbol, not a number
        return tiles.number
    elements = 2**20 if z.device.type == "cpu" else 2**28
    return max(1, elements // max(1, z.shape[0] * tiles.window * z.shape[2]))


def joined(
    parts: Sequence[Float[Tensor, "batch some_tiles *shape"]],
) -> Float[Tensor, "batch tiles *shape"]:
    """The parts of all windows as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def averaging(
    log_parts: Float[Tensor, "batch fine candidates"], tiles: Tiles
) -> Float[Tensor, "batch tiles cells window"]:
    """The share of each token in each centre: q divided by the sum of q over all tokens (equation 3
    of Liang et al., with the denominator of listing 1)."""
    return _in_tiles(log_parts, tiles).softmax(-1)


def _in_tiles(
    log_parts: Float[Tensor, "batch fine candidates"], tiles: Tiles
) -> Float[Tensor, "batch tiles cells window"]:
    """Log-parts, by tile; -inf where a cluster is no candidate of a token."""
    parts = F.pad(log_parts.flatten(1), (0, 1), value=-torch.inf)
    parts = parts.gather(1, tiles.to_tiles.expand(parts.shape[0], -1))
    return parts.view(-1, tiles.number, tiles.cells, tiles.window)


def means(
    z: Float[Tensor, "batch fine dim"],
    log_parts: Float[Tensor, "batch fine candidates"],
    tiles: Tiles,
) -> Float[Tensor, "batch coarse dim"]:
    """The centres of all clusters, in their order (equation 3)."""
    parts = averaging(log_parts, tiles).split(_at_once(z, tiles), 1)
    s = joined([p @ window for p, window in zip(parts, windows(z, tiles), strict=True)])
    return take(s.flatten(1, 2), tiles.place.expand(s.shape[0], -1))


def homes(
    fine: tuple[int, int], grid: tuple[int, int], device: torch.device
) -> Int[Tensor, " fine"]:
    """The cell that each token falls into."""
    rows = _home(fine[0], grid[0], device) * grid[1]
    return crossed(torch.add, rows[:, None], _home(fine[1], grid[1], device)[:, None]).flatten()


def _middles(
    fine: tuple[int, int], grid: tuple[int, int], device: torch.device
) -> Int[Tensor, " coarse"]:
    """The token in the middle of each cell; if two are, the first of them."""

    def middle(n: int, m: int) -> Tensor:
        cell = torch.arange(m, device=device)
        return (_ceil(cell * n, m) + _ceil((cell + 1) * n, m) - 1) // 2

    rows, columns = middle(fine[0], grid[0]) * fine[1], middle(fine[1], grid[1])
    return crossed(torch.add, rows[:, None], columns[:, None]).flatten()


def pool(
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


def between(
    fine: int, coarse: int, like: Float[Tensor, "*shape"]
) -> tuple[Int[Tensor, "fine 2"], Float[Tensor, "fine 2"]]:
    """For bilinear interpolation along one side of a grid: the two cells whose middles are around
    the middle of each token, and their weights."""
    token = torch.arange(fine, device=like.device)
    # From the middle of the first cell, in cells of 2 * fine units.
    from_first = ((2 * token + 1) * coarse - fine).clamp(0, (coarse - 1) * 2 * fine)
    low = from_first // (2 * fine)
    high = (low + 1).clamp(max=coarse - 1)
    part = (from_first - low * 2 * fine).to(wide(like[:0]).dtype) / (2 * fine)
    return torch.stack([low, high], 1), torch.stack([1 - part, part], 1)


def crossed(
    combined: Callable[[Tensor, Tensor], Tensor],
    a: Shaped[Tensor, "rows of_row"],
    b: Shaped[Tensor, "columns of_column"],
) -> Shaped[Tensor, "rows_columns of_row_column"]:
    """Values of rows and values of columns, combined for every place on the grid, row by row."""
    both = combined(a[:, None, :, None], b[None, :, None, :])
    return both.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def _home(fine: int, coarse: int, device: torch.device) -> Int[Tensor, " fine"]:
    return torch.arange(fine, device=device) * coarse // fine


def _ceil(over: Int[Tensor, "*shape"], under: int) -> Int[Tensor, "*shape"]:
    return (over + under - 1) // under


def check_grid(grid: tuple[int, int], fine: tuple[int, int], neighbourhood: int) -> None:
    """Raises a ValueError unless tokens of a grid can form such a grid of clusters."""
    # If a side has more clusters than tokens, each must still be a candidate of some token.
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
