"""Tokens that are clusters of cells; from tokens to maps, and from maps to tokens.

Zeng et al., "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering
Transformer", CVPR 2022, https://arxiv.org/abs/2204.08680, section 3. The image is a grid of cells,
one for each token of the first stage; every token of a later stage is a cluster of them, anywhere
in the image. Convolutions need maps: a pixel of a map is the mean of the tokens of the cells under
it; back from a map, a token is the mean of the pixels over its cells.

Differs from published code in that these means are sums over bags of rows, in one pass over the
cells, instead of products with sparse matrices; and in that no epsilon is added to denominators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tokred.maps import Clusters, take

Grid = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Bags:
    """Groups ("bags") of rows that are added up.

    Attributes:
        index: the rows, those of the first bag first.
        starts: where each bag begins in `index`.
        members: for every entry of `index`, the number of entries of its bag.
    """

    index: Int[Tensor, " entries"]
    starts: Int[Tensor, " bags"]
    members: Int[Tensor, " entries"]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one stage lie.

    Attributes:
        cells: the map from the cells of the grid, row by row, to the tokens. The share of a cell is
            its weight in its token: the product of the shares of all merges so far. The shares of
            a token's cells add up to 1.
        grid: rows and columns of the cells.
        size: rows and columns of the maps of this stage.
        raster: whether every cell is a token, in the order of the cells.
        by_token: the cells of all samples, end to end, token by token.
        from_map: bags of pixels (of all samples, end to end) for the tokens.
        to_map: bags of tokens for the pixels.
    """

    cells: Clusters
    grid: Grid
    size: Grid
    raster: bool
    by_token: Bags
    from_map: Bags
    to_map: Bags

    @property
    def num_tokens(self) -> int:
        return self.cells.num_coarse


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one stage, and where they lie."""

    x: Float[Tensor, "batch tokens dim"]
    layout: Layout

    def map(self) -> Float[Tensor, "batch dim height width"]:
        """The map of the stage: `to_map`."""
        return to_map(self.x, self.layout)


def raster(batch: int, grid: Grid, device: torch.device) -> Layout:
    """The layout of the first stage: every cell is a token."""
    cells = torch.arange(grid[0] * grid[1], device=device)
    index = cells.expand(batch, -1)
    share = torch.ones_like(index, dtype=torch.float32)
    every = torch.arange(batch * len(cells), device=device)
    alone = Bags(every, every, torch.ones_like(every))
    clusters = Clusters(index, len(cells), share)
    return Layout(clusters, grid, grid, True, by_token=alone, from_map=alone, to_map=alone)


def resized(layout: Layout, size: Grid) -> Layout:
    """The same tokens, with maps of another size."""
    from_map, to_map = _on_map(layout.cells, layout.grid, size, layout.by_token)
    return replace(layout, size=size, from_map=from_map, to_map=to_map)


def merged(layout: Layout, clusters: Clusters, size: Grid) -> Layout:
    """The layout of the next stage.

    Args:
        layout: the layout of this stage.
        clusters: the map from its tokens to those of the next stage, with shares.
        size: rows and columns of the next stage's maps.
    """
    assert clusters.share is not None and layout.cells.share is not None
    index = clusters.index.gather(1, layout.cells.index)
    share = layout.cells.share * clusters.share.gather(1, layout.cells.index)
    cells = Clusters(index, clusters.num_coarse, share)
    by_token = bags(_end_to_end(index, cells.num_coarse), len(index) * cells.num_coarse)
    from_map, to_map = _on_map(cells, layout.grid, size, by_token)
    return Layout(cells, layout.grid, size, False, by_token, from_map, to_map)


def _on_map(cells: Clusters, grid: Grid, size: Grid, by_token: Bags) -> tuple[Bags, Bags]:
    batch, pixels = len(cells.index), size[0] * size[1]
    pixel = pixel_of_cell(grid, size, cells.index.device).expand(batch, -1)
    pixel = _end_to_end(pixel, pixels)
    by_pixel = bags(pixel, batch * pixels)
    token = _end_to_end(cells.index, cells.num_coarse)
    return (
        Bags(pixel[by_token.index], by_token.starts, by_token.members),
        Bags(token[by_pixel.index], by_pixel.starts, by_pixel.members),
    )


def _end_to_end(index: Int[Tensor, "batch entries"], num: int) -> Int[Tensor, " all_entries"]:
    """Row numbers when samples of `num` rows each are laid end to end."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * num).flatten()


def pixel_of_cell(grid: Grid, size: Grid, device: torch.device) -> Int[Tensor, " cells"]:
    """The pixel of a map that each cell lies over, row by row: in either direction, pixel
    floor(float32(i) * (float32(pixels) / float32(cells))) for cell i."""
    rows, columns = (
        # The quotient is rounded to float32 before it is multiplied, as it is in interpolation to
        # the nearest; for some sizes other formulas choose a neighbour.
        (torch.arange(cells, dtype=torch.float32, device=device) * (pixels / cells))
        .floor()
        .long()
        .clamp(max=pixels - 1)
        for cells, pixels in zip(grid, size, strict=True)
    )
    return (rows[:, None] * size[1] + columns).flatten()


def bags(bag: Int[Tensor, " entries"], num: int) -> Bags:
    """The entries, bag by bag, in their order within each: `index` counts entries.

    Args:
        bag: the bag of each entry.
        num: the number of bags; none may be empty.
    """
    order, index = bag.sort(stable=True)
    every = torch.arange(num, device=bag.device)
    # Not bincount: compilers do not know the length of its result.
    starts = torch.searchsorted(order, every)
    ends = torch.searchsorted(order, every, right=True)
    return Bags(index, starts, (ends - starts)[order])


def total(
    x: Float[Tensor, "rows dim"], which: Bags, weight: Float[Tensor, " entries"] | None = None
) -> Float[Tensor, "bags dim"]:
    """For every bag the weighted sum of its rows, in at least float32; the mean if there are no
    weights. Always added up in the same order."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is None:
        weight = which.members.to(wide.dtype).reciprocal()
    sums: Tensor = F.embedding_bag(
        which.index, wide, which.starts, mode="sum", per_sample_weights=weight.to(wide.dtype)
    )
    return sums


def to_map(
    x: Float[Tensor, "batch tokens dim"], layout: Layout
) -> Float[Tensor, "batch dim height width"]:
    """Every pixel is the mean of the tokens of the cells under it."""
    height, width = layout.size
    if not (layout.raster and layout.size == layout.grid):
        found = total(x.flatten(0, 1), layout.to_map).to(x.dtype)
        x = found.view(x.shape[0], height * width, x.shape[2])
    # Channels last, and said so: of a single image, transposed tokens would not be seen to be.
    pixels: Tensor = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return pixels


def from_map(
    pixels: Float[Tensor, "batch dim height width"], layout: Layout
) -> Float[Tensor, "batch tokens dim"]:
    """Every token is the mean of the pixels over its cells.

    Raises:
        ValueError: the map is not of this layout's size.
    """
    batch, dim, *size = pixels.shape
    if tuple(size) != layout.size:
        raise ValueError(f"the map must have the size {layout.size}, not {tuple(size)}")
    rows = pixels.permute(0, 2, 3, 1).flatten(1, 2)
    if layout.raster and layout.size == layout.grid:
        return rows
    found = total(rows.flatten(0, 1), layout.from_map).to(pixels.dtype)
    return found.view(batch, layout.num_tokens, dim)


def interpolate(
    x: Float[Tensor, "batch source dim"], source: Layout, target: Layout
) -> Float[Tensor, "batch target dim"]:
    """Tokens of one stage as tokens of another, coarser or finer: each of these is the sum over its
    cells of its share in them and the source's token there: what
    `target.cells.down(source.cells.up(x))` does in two steps."""
    if target.raster:
        return take(x, source.cells.index)
    assert target.cells.share is not None
    batch, _, dim = x.shape
    token = _end_to_end(source.cells.index, source.num_tokens)
    cell = target.by_token.index
    which = Bags(token[cell], target.by_token.starts, target.by_token.members)
    found = total(x.flatten(0, 1), which, target.cells.share.flatten()[cell])
    return found.to(x.dtype).view(batch, target.num_tokens, dim)


def merge(
    x: Float[Tensor, "batch fine dim"],
    score: Float[Tensor, "batch fine"],
    labels: Int[Tensor, "batch fine"],
    num: int,
) -> tuple[Float[Tensor, "batch num dim"], Clusters]:
    """Clusters become means of their members, weighted by exp(score) (equation 3).

    Args:
        x: the tokens.
        score: how important the tokens are; higher = more.
        labels: the cluster of each token.
        num: the number of clusters; none may be empty.

    Returns:
        The merged tokens, and the map with which they were merged.
    """
    batch, _, dim = x.shape
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    # The highest score of a cluster is subtracted first, because exp(score) could overflow.
    highest = score.new_zeros(batch, num).scatter_reduce(
        1, labels, score.detach(), "amax", include_self=False
    )
    weight = (score - highest.gather(1, labels)).exp()
    which = bags(_end_to_end(labels, num), batch * num)
    ones = torch.ones_like(which.index, dtype=weight.dtype)
    sums = total(weight.view(-1, 1), which, ones).view(batch, num)
    share = weight / sums.gather(1, labels)
    out = total(x.flatten(0, 1), which, share.flatten()[which.index]).to(x.dtype)
    return out.view(batch, num, dim), Clusters(labels, num, share)
