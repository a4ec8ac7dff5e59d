"""How a model lays out its sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a model lays out its sequence: prefix tokens, a grid of patch tokens, suffix tokens.

    Attributes:
        prefix: how many tokens stand in front (class, distillation, register tokens).
        layers: how many blocks there are.
        grid: (height, width) of the patch tokens, for the model's own image size. Of a video,
            the frames are stacked: (frames * height, width).
        class_token: whether the first token is a class token.
        suffix: how many tokens stand at the end (detection tokens).
        by_position: whether blocks are given anything by position (rotary tables, relative
            position biases), so that the engine has to know where tokens stand.
        raster: whether patch tokens run row by row; not where the model shuffles them.
        declared: whether the caller has said how many prefix tokens there are.
    """

    prefix: int
    layers: int
    grid: tuple[int, int]
    class_token: bool
    suffix: int = 0
    by_position: bool = False
    raster: bool = True
    declared: bool = False

    @property
    def patches(self) -> int:
        """Patch tokens, for the model's own image size."""
        return self.grid[0] * self.grid[1]

    @property
    def others(self) -> int:
        """Tokens that are never touched."""
        return self.prefix + self.suffix

    def patch_tokens(self, x: Tensor, dim: int = 1) -> Tensor:
        """The patch tokens of a sequence, whose tokens run along `dim`."""
        return x.narrow(dim, self.prefix, x.shape[dim] - self.others)
