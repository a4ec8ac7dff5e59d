"""Shifted windows: every window of a stage is reduced by itself, and the blocks in between run with
windows of the reduced size.

Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
NeurIPS 2022, https://arxiv.org/abs/2210.01035, section 3, for Swin Transformers (Liu et al., ICCV
2021, https://arxiv.org/abs/2103.14030; version 2: CVPR 2022, https://arxiv.org/abs/2111.09883).
The published code leaves the attention mask of shifted windows as it was; here it is made for the
windows that there are. Windows that a feature map does not fill are filled up by one of two rules,
`Filling`; the published one is "zeros".

To the engine, the image is the feature map of the stage, and what is done to it is one method:
`InWindows`. With the rule "border", what is padding to the host is padding to the smaller windows
too: it is never among the reduced tokens, but added by the host's own forward, to which the block
is shown with another window (`Seen`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tokred.engine.reduction import Reduction, fitted
from tokred.engine.step import Step
from tokred.maps import TokenMap, take
from tokred.reducers.protocol import Filling, Reconstruction, Reducer, Tokens, traits
from tokred.schedule import Schedule, plan


@dataclass(frozen=True)
class InWindows:
    """A method, applied to every window of a feature map by itself.

    Windows begin at the upper left corner, without any shift. Those at the lower and the right edge
    that are not full are filled up. With copies of the border ("border"), no reduced token is a
    mean of something and nothing, and reduced tokens that have no part in the image are left out.
    With zeros ("zeros"), all reduced windows are full ones, whose tokens may be means of zeros.

    Attributes:
        reducer: the method, whose trait `filling` is "border" or "zeros".
        window: rows and columns of a window.
        few: rows and columns of a reduced window.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    place: ClassVar[str] = "before"
    proportional: ClassVar[bool] = False
    bibtex: ClassVar[str] = ""  # that of the method

    reducer: Reducer
    window: tuple[int, int]
    few: tuple[int, int]

    def __str__(self) -> str:
        (rows, columns), (fewer_rows, fewer_columns) = self.window, self.few
        return f"{self.reducer} in windows, {rows}x{columns} -> {fewer_rows}x{fewer_columns}"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bibtex", self.reducer.bibtex)

    @property
    def filling(self) -> Filling:
        """What windows are filled up with."""
        return traits(self.reducer).filling

    def fit(self, keep: int, grid: tuple[int, int]) -> int:
        """The number of tokens that are left of a feature map, whatever `keep` is."""
        return math.prod(reduced(grid, self.window, self.few, self.filling))

    def __call__(self, tokens: Tokens, keep: int) -> TokenMap:
        if tokens.grid is None:
            raise ValueError("grid must be known: tokens that stand on none have no windows")
        x = split(tokens.x, tokens.grid, self.window, self.filling)
        view = Tokens(
            x=x,
            size=x.new_ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32)),
            grid=self.window,
            layer=tokens.layer,
            layers=tokens.layers,
        )
        parts = self.reducer(view, math.prod(self.few))
        return Windowed(parts, tokens.grid, self.window, self.few, self.filling)


@dataclass(frozen=True)
class Windowed:
    """The map of a feature map, from the maps of its windows.

    Attributes:
        parts: the map of the windows of all images, image by image, row by row.
        fine: rows and columns of the feature map before it.
        window: rows and columns of a window before it.
        few: rows and columns of a reduced window.
        filling: what windows are filled up with, see `InWindows`.
    """

    merges: ClassVar[bool] = True
    ragged: ClassVar[bool] = False

    parts: TokenMap
    fine: tuple[int, int]
    window: tuple[int, int]
    few: tuple[int, int]
    filling: Filling = "border"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the reduced feature map."""
        return reduced(self.fine, self.window, self.few, self.filling)

    @property
    def num_coarse(self) -> int:
        return math.prod(self.grid)

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        windows = split(x, self.fine, self.window, self.filling)
        sizes = split(size[..., None], self.fine, self.window)[..., 0]
        return join(self.parts.down(windows, sizes), self.grid, self.few)

    def up(
        self,
        y: Float[Tensor, "batch coarse dim"],
        stale: Float[Tensor, "batch fine dim"] | None = None,
    ) -> Float[Tensor, "batch fine dim"]:
        """Every fine token gets a copy of the coarse one that it is counted to."""
        return take(y, self.labels())

    def total(self, size: Float[Tensor, "batch fine"]) -> Float[Tensor, "batch coarse"]:
        sizes = split(size[..., None], self.fine, self.window)[..., 0]
        # What a window was filled up with stands for nothing.
        inside = _inside(self.fine, self.window, size.device).repeat(len(size), 1)
        return join(self.parts.total(sizes * inside)[..., None], self.grid, self.few)[..., 0]

    def labels(self) -> Int[Tensor, "batch fine"]:
        index = whole(self.parts.labels()[..., None], self.grid, self.few)
        return join(index, self.fine, self.window)[..., 0]

    def representatives(self) -> Int[Tensor, "batch coarse"]:
        index = whole(self.parts.representatives()[..., None], self.fine, self.window)
        return join(index, self.grid, self.few)[..., 0]


@dataclass(frozen=True)
class ReconstructedInWindows:
    """A reconstruction in which every token is made of tokens of its own window."""

    reconstruction: Reconstruction
    window: tuple[int, int]
    few: tuple[int, int]
    filling: Filling = "border"

    def __call__(
        self,
        before: Float[Tensor, "batch fine dim"],
        coarse: Float[Tensor, "batch coarse dim"],
        grid: tuple[int, int] | None,
        coarse_grid: tuple[int, int] | None,
    ) -> tuple[Int[Tensor, "batch fine nearest"], Float[Tensor, "batch fine nearest"]]:
        assert grid is not None and coarse_grid is not None
        fine = split(before, grid, self.window, self.filling)
        index, weight = self.reconstruction(
            fine, split(coarse, coarse_grid, self.few), self.window, self.few
        )
        index = whole(index.expand(len(fine), -1, -1), coarse_grid, self.few)
        weight = weight.expand(len(fine), -1, -1)
        return join(index, grid, self.window), join(weight, grid, self.window)


@dataclass(frozen=True)
class Cut(InWindows):
    """Cuts feature maps off, to as many tokens. Not a method: the ceiling that methods in windows
    are measured against."""

    def __call__(self, tokens: Tokens, keep: int) -> TokenMap:
        assert tokens.grid is not None
        return Corner(tokens.grid, reduced(tokens.grid, self.window, self.few, self.filling))


@dataclass(frozen=True)
class Corner:
    """The upper left corner of a feature map; beyond it, `up` has zeros.

    Attributes:
        fine: rows and columns of the feature map.
        grid: those of the corner.
    """

    merges: ClassVar[bool] = True
    ragged: ClassVar[bool] = False

    fine: tuple[int, int]
    grid: tuple[int, int]

    @property
    def num_coarse(self) -> int:
        return math.prod(self.grid)

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        rows, columns = self.grid
        cells: Tensor = x.unflatten(1, self.fine)[:, :rows, :columns]
        more = (rows - cells.shape[1], columns - cells.shape[2])
        if any(more):  # windows that were filled up may be longer than the map along one side
            cells = F.pad(cells, (0, 0, 0, more[1], 0, more[0]))
        return cells.flatten(1, 2)

    def up(
        self,
        y: Float[Tensor, "batch coarse dim"],
        stale: Float[Tensor, "batch fine dim"] | None = None,
    ) -> Float[Tensor, "batch fine dim"]:
        right, below = self.fine[1] - self.grid[1], self.fine[0] - self.grid[0]
        wide: Tensor = F.pad(y.unflatten(1, self.grid), (0, 0, 0, right, 0, below))
        return wide.flatten(1, 2)

    def total(self, size: Float[Tensor, "batch fine"]) -> Float[Tensor, "batch coarse"]:
        return self.down(size[..., None], size)[..., 0]

    def labels(self) -> Int[Tensor, "batch fine"]:
        rows, columns = (min(pair) for pair in zip(self.fine, self.grid, strict=True))
        cells = torch.full((1, *self.fine), -1)
        few = torch.arange(self.num_coarse).view(self.grid)
        cells[0, :rows, :columns] = few[:rows, :columns]
        return cells.flatten(1)

    def representatives(self) -> Int[Tensor, "batch coarse"]:
        cells = torch.arange(math.prod(self.fine))[None, :, None]
        return self.down(cells, cells)[..., 0]


@dataclass(frozen=True)
class PerWindow:
    """A schedule that counts the tokens of one window, for all tokens of a feature map.

    The numbers are nearest ones only: `InWindows.fit` knows the right ones, by the grid.
    """

    schedule: Schedule
    window: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.schedule} per window"

    def __call__(self, tokens: int, layers: int) -> list[int]:
        area = math.prod(self.window)
        counts = plan(self.schedule, area, layers)
        return [tokens if count == area else max(1, tokens * count // area) for count in counts]


def in_windows(reduction: Reduction, window: tuple[int, int]) -> Reduction:
    """A reduction of the tokens of one window, as one of all windows of a feature map.

    Args:
        reduction: laid out for one window.
        window: its rows and columns.

    Raises:
        ValueError: the schedule leaves windows of different sizes, or one that cannot be had.
    """
    reducer, layers = reduction.reducer, reduction.layout.layers
    area = math.prod(window)
    counts = plan(reduction.schedule, area, layers)
    sizes = {fitted(reduction.traits, count, area, window) for count in counts} - {area}
    if len(sizes) > 1:
        raise ValueError(
            f"{reduction.schedule} leaves {sorted(sizes)} of the {area} tokens of a window; they "
            "can be of one reduced size only, as in Hourglass(grid=(8, 8))"
        )
    few = window
    if sizes:
        blank = Tokens(torch.zeros(1, area, 2), torch.ones(1, area), grid=window, layers=layers)
        grid = getattr(reducer(blank, sizes.pop()), "grid", None)
        if grid is None:
            raise ValueError(f"{reducer} has `fit`, but what it returns has no `grid`")
        few = (int(grid[0]), int(grid[1]))
    rebuilt = reduction.reconstruction
    return Reduction(
        InWindows(reducer, window, few),
        PerWindow(reduction.schedule, window),
        reduction.layout,
        proportional_attention=False,
        tapped_by=reduction.tapped_by,
        reconstruction=rebuilt
        and ReconstructedInWindows(rebuilt, window, few, reduction.traits.filling),
        windows=few,
    )


def too_small(reduction: Reduction, grid: tuple[int, int]) -> bool:
    """Whether a feature map has so few rows and columns that a reduction, which is to reduce
    windows, leaves all of them."""
    own = reduction.reducer
    return (
        isinstance(own, InWindows) and own.few != own.window and own.fit(0, grid) >= math.prod(grid)
    )


def limit(reduction: Reduction) -> Reduction:
    """What a reduction in windows is measured against: the same numbers of tokens for nothing."""
    own = reduction.reducer
    assert isinstance(own, InWindows)
    return Reduction(
        Cut(own.reducer, own.window, own.few),
        reduction.schedule,
        reduction.layout,
        proportional_attention=False,
        windows=own.few,
    )


def why_not(reducer: Reducer, proportional_attention: bool | None, full_grid: bool) -> str | None:
    """Why a method, with these options of `tokred.apply`, cannot be used in windows; None if it
    can."""
    found = traits(reducer)
    on_a_grid = found.fit is not None and not found.needs - {"grid"}
    if not on_a_grid or found.prunes or found.varies:
        return (
            f"what {reducer} leaves is on no grid, but this model attends in windows, which need "
            "one: use 'slic', in which a window of few tokens is a window again"
        )
    if proportional_attention:
        return "attention in windows takes no bias by key, as proportional_attention=True needs it"
    if not full_grid:
        return "the next stage takes full feature maps, not those of full_grid=False"
    return None


# Feature maps and windows


def reduced(
    grid: tuple[int, int],
    window: tuple[int, int],
    few: tuple[int, int],
    filling: Filling = "border",
) -> tuple[int, int]:
    """Rows and columns that are left of a feature map: of every window that is not full, those
    cells of the reduced one that some of its rows and columns fall into; or, filled up with zeros,
    all cells."""
    if filling == "zeros":
        down, across = (-(-side // wide) for side, wide in zip(grid, window, strict=True))
        return down * few[0], across * few[1]
    rows, columns = (
        side // wide * narrow + -(-(side % wide) * narrow // wide)
        for side, wide, narrow in zip(grid, window, few, strict=True)
    )
    return rows, columns


def split(
    x: Shaped[Tensor, "batch tokens dim"],
    grid: tuple[int, int],
    window: tuple[int, int],
    filling: Filling = "border",
) -> Shaped[Tensor, "windows area dim"]:
    """The windows of all images, image by image, row by row; filled up with copies of the border,
    or with zeros."""
    cells = _cells(grid, window, x.device)
    cut = x.index_select(1, cells.flatten())
    if filling == "zeros" and any(side % wide for side, wide in zip(grid, window, strict=True)):
        inside = _inside(grid, window, x.device).flatten()
        cut = cut * inside.to(cut.dtype)[:, None]
    return cut.view(-1, cells.shape[1], x.shape[2])


def join(
    windows: Shaped[Tensor, "windows area dim"], grid: tuple[int, int], window: tuple[int, int]
) -> Shaped[Tensor, "batch tokens dim"]:
    """Undoes `split`: the feature maps, without what the windows were filled up with."""
    across = -(-grid[1] // window[1])
    row = torch.arange(grid[0], device=windows.device)[:, None]
    column = torch.arange(grid[1], device=windows.device)
    number = row // window[0] * across + column // window[1]
    within = row % window[0] * window[1] + column % window[1]
    at = number * (window[0] * window[1]) + within
    each = -(-grid[0] // window[0]) * across * window[0] * window[1]
    return windows.reshape(-1, each, windows.shape[2]).index_select(1, at.flatten())


def whole(
    index: Int[Tensor, "windows tokens chosen"], grid: tuple[int, int], window: tuple[int, int]
) -> Int[Tensor, "windows tokens chosen"]:
    """Cells of windows as cells of the feature map that they are windows of; beyond the border,
    the nearest cell of it."""
    cells = _cells(grid, window, index.device)
    by_image = index.reshape(-1, len(cells), index.shape[1] * index.shape[2])
    return cells.expand(len(by_image), -1, -1).gather(2, by_image).view_as(index)


def _cells(
    grid: tuple[int, int], window: tuple[int, int], device: torch.device
) -> Int[Tensor, "windows area"]:
    """The cell of a feature map that each cell of its windows is, or the border nearest to it."""
    down, across = (-(-side // wide) for side, wide in zip(grid, window, strict=True))
    row = torch.arange(down * window[0], device=device).clamp(max=grid[0] - 1)
    column = torch.arange(across * window[1], device=device).clamp(max=grid[1] - 1)
    cells = row.view(down, 1, window[0], 1) * grid[1] + column.view(1, across, 1, window[1])
    return cells.reshape(down * across, window[0] * window[1])


def _inside(
    grid: tuple[int, int], window: tuple[int, int], device: torch.device
) -> Float[Tensor, "windows area"]:
    """1 for cells of windows that are in the feature map, 0 for those beyond its border."""
    down, across = (-(-side // wide) for side, wide in zip(grid, window, strict=True))
    row = torch.arange(down * window[0], device=device) < grid[0]
    column = torch.arange(across * window[1], device=device) < grid[1]
    inside = row.view(down, 1, window[0], 1) & column.view(1, across, 1, window[1])
    return inside.reshape(down * across, window[0] * window[1]).float()


# What blocks with smaller windows are made of


class Seen:
    """A module as its own forward is to see it: with some attributes replaced.

    `type(block).forward(Seen(block, window_size=8), x)` runs the host's code, on the module's own
    weights, submodules and hooks, in windows of 8; the module is left as it is.
    """

    # A class whose forward was wrapped (for gradient checkpointing, by transformers) asks whether
    # this is the forward that was wrapped last. It is not: the block is wrapped by our caller.
    forward: ClassVar[None] = None

    def __init__(self, module: nn.Module, **replaced: Any) -> None:
        self._module, self._replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        own = getattr(type(self._module), name, None)
        if isinstance(own, FunctionType):  # so that methods see what is replaced, too
            return partial(own, self)
        return getattr(self._module, name)


def biased(attention: Any, step: Step, **replaced: Any) -> Any:
    """Attention in windows as its own forward is to see it: itself in windows of its own size,
    else with the biases by relative position of windows of the reduced size.

    Args:
        attention: has `window_size`, `relative_position_index`, and a table of biases
            (`relative_position_bias_table`) or of coordinates that biases are made of
            (`relative_coords_table`, version 2).
        step: the block that runs.
        replaced: further attributes that it is to see, where windows are of the reduced size.
    """
    few = step.window
    if few is None:
        return attention
    own = attention.window_size
    if hasattr(attention, "relative_coords_table"):
        like = attention.relative_coords_table
        pretrained = getattr(attention, "pretrained_window_size", (0, 0))
        replaced["relative_coords_table"] = coordinates(own, few, pretrained, like)
    else:
        like = attention.relative_position_bias_table
        replaced["relative_position_bias_table"] = resized(like, own, few)
    index = relative_positions(few, like.device)
    if attention.relative_position_index.ndim == 1:
        index = index.flatten()
    return Seen(
        attention,
        window_size=type(own)(few),
        window_area=few[0] * few[1],
        relative_position_index=index,
        **replaced,
    )


def relative_positions(
    window: tuple[int, int], device: torch.device
) -> Int[Tensor, "queries keys"]:
    """Which row of a table of relative positions a query and a key of a window take."""
    row = torch.arange(window[0], device=device).repeat_interleave(window[1])
    column = torch.arange(window[1], device=device).repeat(window[0])
    down = row[:, None] - row + window[0] - 1
    across = column[:, None] - column + window[1] - 1
    return down * (2 * window[1] - 1) + across


def resized(
    table: Float[Tensor, "positions heads"], window: tuple[int, int], few: tuple[int, int]
) -> Float[Tensor, "fewer_positions heads"]:
    """A table of biases by relative position, (2K - 1)^2 of them, for windows of another size,
    (2k - 1)^2: bilinearly, pixel centres at one half. In float32 at least."""
    rows, columns = (2 * side - 1 for side in window)
    image = table.t().reshape(1, -1, rows, columns)
    image = image.to(torch.promote_types(table.dtype, torch.float32))
    small = F.interpolate(
        image, size=(2 * few[0] - 1, 2 * few[1] - 1), mode="bilinear", align_corners=False
    )
    return small.flatten(2)[0].t().to(table.dtype)


def coordinates(
    window: tuple[int, int],
    few: tuple[int, int],
    pretrained: tuple[int, int],
    like: Tensor,
) -> Float[Tensor, "1 rows columns 2"]:
    """The log-spaced coordinates that version 2 makes its biases of (equation 4), for windows of
    another size that cover the same part of the image.

    Args:
        window: rows and columns of the host's windows.
        few: those of the windows that the coordinates are for.
        pretrained: those that the weights were trained for at first; 0 for the host's own.
        like: what is returned has its dtype and device.
    """
    sides = []
    for wide, narrow, own in zip(window, few, pretrained, strict=True):
        farthest = max(wide - 1, 1) / max((own or wide) - 1, 1)
        # float32, as hosts have them: in bfloat16 they would differ before they are rounded.
        steps = torch.arange(1 - narrow, narrow, device=like.device, dtype=torch.float32)
        sides.append(steps / max(narrow - 1, 1) * farthest)
    table = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)[None] * 8
    return (table.sign() * (table.abs() + 1).log2() / math.log2(8)).to(like.dtype)


def shifts(own: tuple[int, int], few: tuple[int, int]) -> tuple[int, int]:
    """How far windows of another size are shifted: by half of them, where the host shifts."""
    rows, columns = (side // 2 if shift else 0 for shift, side in zip(own, few, strict=True))
    return rows, columns
