"""Keys and values of a coarser grid.

Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images", IJCAI
2024, https://arxiv.org/abs/2402.13573, section 3: in self-attention, only tokens that lie evenly on
the grid have keys and values (nearest-neighbour downsampling). All tokens have queries, so that
nothing has to be undone afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.grids import nearest_grid
from tokred.maps import Kept
from tokred.reducers.protocol import Tokens


@dataclass(frozen=True)
class ToDo:
    """Lets all tokens attend to few, which lie evenly on the grid.

    For self-attention in denoisers. The few tokens make a grid of about the same aspect ratio, with
    about the number of tokens that was asked for.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    keys_only: ClassVar[bool] = True
    proportional: ClassVar[bool] = False
    bibtex: ClassVar[str] = """@inproceedings{smith2024todo,
  title     = {{ToDo}: Token Downsampling for Efficient Generation of High-Resolution Images},
  author    = {Smith, Ethan and Saxena, Nayan and Saha, Aninda},
  booktitle = {International Joint Conference on Artificial Intelligence},
  year      = {2024}
}"""

    def fit(self, keep: int, grid: tuple[int, int]) -> int:
        """The number of tokens nearest to `keep` that it can take from such a grid."""
        rows, columns = nearest_grid(keep, grid)
        return rows * columns

    def __call__(self, tokens: Tokens, keep: int) -> Kept:
        if tokens.grid is None:
            raise ValueError("grid must be known: tokens are taken evenly from it")
        few = nearest_grid(keep, tokens.grid)
        if few[0] * few[1] != keep:
            raise ValueError(
                f"keep must be the size of a grid, not {keep}; nearest to that, for "
                f"{tokens.grid[0]} x {tokens.grid[1]} tokens, is {few[0]} x {few[1]}"
            )
        row, column = (
            _nearest(fine, coarse, tokens.x.device)
            for fine, coarse in zip(tokens.grid, few, strict=True)
        )
        index = (row[:, None] * tokens.grid[1] + column).flatten()
        return Kept(index.expand(len(tokens.x), -1), tokens.x.shape[1])


def _nearest(fine: int, coarse: int, device: torch.device) -> Tensor:
    """Which of `fine` tokens nearest-neighbour resampling to `coarse` tokens takes."""
    return torch.arange(coarse, device=device) * fine // coarse
