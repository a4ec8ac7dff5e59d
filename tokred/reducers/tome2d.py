"""Token merging on the grid of a diffusion model.

Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023,
https://arxiv.org/abs/2303.17604, section 4. The grid is cut into cells; one token of each cell is a
destination, all others propose their most similar destination, and the most similar proposals
merge. Differs from the published code in that equal similarities are decided for the lower index
(there by an unstable sort), and in that tokens keep the order of their clusters' first members.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tokred.graphs import recorded
from tokred.maps import Clusters, in_order_of_first_member, ranked
from tokred.optional import installed
from tokred.reducers.protocol import Tokens
from tokred.reducers.tome import best

# So many multiply-adds in an image take about as long by the kernel as by operators.
_WORTH = 2**25

# Cosines of float64 are decided by in float32, but computed in float64.
_HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ToMe2d:
    """Merges tokens into the most similar of few destinations, which are spread over the grid.

    For the modules of a denoiser, where "tome" is short for it. Tokens are compared by the cosine
    of what enters the block.

    Args:
        cell: rows and columns of a cell. One token of each cell is a destination and stays, so the
            keep rate must be at least 1 / (rows * columns).
        generator: draws the destinations, anew at every matching, and the same for all images of a
            batch. If not given, they are the cells' upper left tokens. (The global random stream
            is never touched.)
    """

    cell: tuple[int, int] = (2, 2)
    generator: torch.Generator | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    place: ClassVar[str] = "before"
    proportional: ClassVar[bool] = False
    bibtex: ClassVar[str] = """@inproceedings{bolya2023tomesd,
  title     = {Token Merging for Fast {Stable Diffusion}},
  author    = {Bolya, Daniel and Hoffman, Judy},
  booktitle = {CVPR Workshop on Efficient Deep Learning for Computer Vision},
  year      = {2023}
}"""

    def __post_init__(self) -> None:
        if len(self.cell) != 2 or min(self.cell) < 1 or math.prod(self.cell) < 2:
            raise ValueError(
                f"cell must be rows and columns of at least two tokens, not {self.cell}"
            )

    @property
    def least(self) -> float:
        """The lowest keep rate that it can reach on every grid."""
        return 1 / math.prod(self.cell)

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        if tokens.grid is None:
            raise ValueError("grid must be known: destinations are spread over it")
        merges = tokens.x.shape[1] - keep
        labels = match(tokens.x.detach(), tokens.grid, merges, self.cell, self.generator)
        return Clusters(labels, keep)


def match(
    metric: Float[Tensor, "batch tokens dim"],
    grid: tuple[int, int],
    merges: int,
    cell: tuple[int, int] = (2, 2),
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Merges the `merges` strongest proposals; returns the group of every token.

    Groups are numbered in the order of their first tokens. Ties go to the lower index. Rows and
    columns at the edges that fill no whole cell have no destinations.

    Args:
        metric: what tokens are compared by; need not be normalised.
        grid: rows and columns of the tokens.
        merges: how many tokens to remove, at most all that are no destinations.
        cell: rows and columns of a cell.
        generator: what destinations are drawn from; the cells' upper left tokens if not given.

    Raises:
        ValueError: `grid` does not have as many cells as there are tokens, or `merges` is out of
            range.
    """
    num = metric.shape[1]
    if grid[0] * grid[1] != num:
        raise ValueError(f"grid must have as many cells as there are tokens, {num}, not {grid}")
    at = destinations(grid, cell, metric.device, generator)
    if not 0 <= merges <= num - len(at):
        raise ValueError(
            f"merges must be in [0, {num - len(at)}], as {len(at)} of {num} tokens are "
            f"destinations (one in every {cell[0]}x{cell[1]}), not {merges}"
        )
    position = torch.arange(num, device=metric.device)
    if merges == 0:
        return position.repeat(metric.shape[0], 1)
    # All tokens that are no destinations, in order. (By sorting: `nonzero` would wait for the
    # device. No two of the keys that count are equal, because ONNX has no stable sort.)
    sources = position.index_fill(0, at, num).argsort()[: num - len(at)]
    similarity, partner = most_similar(metric, sources, at)
    strongest = ranked(similarity)[:, :merges]
    joined = at[partner.gather(1, strongest)]
    label = position.repeat(metric.shape[0], 1).scatter(1, sources[strongest], joined)
    return in_order_of_first_member(label)


def most_similar(
    metric: Float[Tensor, "batch tokens dim"],
    sources: Int[Tensor, " sources"],
    at: Int[Tensor, " destinations"],
) -> tuple[Float[Tensor, "batch sources"], Int[Tensor, "batch sources"]]:
    """For every source, its highest cosine with a destination, in float32, and the number of that
    destination in `at`. Of equals it is the first."""
    if _by_numba(metric, len(sources) * len(at)):
        from tokred.kernels import nearest_numba

        return nearest_numba.most_similar(metric, sources, at)
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    return best(unit.index_select(1, sources), unit.index_select(1, at))


def _by_numba(metric: Float[Tensor, "batch tokens dim"], pairs: int) -> bool:
    """Whether the numba kernel can be used here, is available, and is worth it. (What other images
    there are makes no difference.)"""
    if recorded(metric):
        return False
    if metric.device.type != "cpu" or metric.dtype not in _HALF_OR_SINGLE:
        return False
    if pairs * metric.shape[2] < _WORTH or not installed("numba"):
        return False
    from tokred.kernels import nearest_numba

    return nearest_numba.fast()


def destinations(
    grid: tuple[int, int],
    cell: tuple[int, int],
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " cells"]:
    """The token of each cell that is a destination, row by row.

    Raises:
        ValueError: not one cell fits into the grid.
    """
    down, across = grid[0] // cell[0], grid[1] // cell[1]
    if down * across == 0:
        raise ValueError(f"cell must fit into the grid of {grid[0]}x{grid[1]} tokens, not {cell}")
    row = torch.arange(down, device=device)[:, None] * cell[0]
    column = torch.arange(across, device=device) * cell[1]
    if generator is not None:
        drawn = torch.randint(
            cell[0] * cell[1], (down, across), generator=generator, device=generator.device
        ).to(device)
        row, column = row + drawn // cell[1], column + drawn % cell[1]
    return (row * grid[1] + column).flatten()
