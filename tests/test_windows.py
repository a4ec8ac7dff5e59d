"""Windows: cutting feature maps up, and what is promised of every Swin Transformer."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families._swin import (
    FEW,
    GRID,
    REDUCED,
    SWIN,
    WINDOW,
    Swin,
    images,
    resized,
    stage_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_patching import traces
from torch import Tensor, nn

import tokred
from tokred.engine import passing, windows
from tokred.host import find_host
from tokred.patching import hang, reduction_of
from tokred.reducers import Tokens
from tokred.reducers.slic import SLIC, Bilinear, Nearest
from tokred.schedule import Exactly, Hourglass

sides = st.integers(1, 9)
grids = st.tuples(st.integers(1, 20), st.integers(1, 20))

# Block 0 runs as it is, blocks 1 and 2 in windows of 4x4, block 3 as it is.
MIDDLE = Hourglass(grid=FEW, down=1, up=3)


@pytest.fixture(params=SWIN)
def host(request: pytest.FixtureRequest) -> Swin:
    return SWIN[request.param]


@torch.no_grad()
def answered(host: Swin, model: nn.Module, x: Tensor) -> Tensor:
    return host.answer(model(x))


# Feature maps and windows


@settings(max_examples=40, deadline=None)
@given(grids, st.tuples(sides, sides))
def test_windows_are_cut_out_row_by_row_and_put_back(
    grid: tuple[int, int], window: tuple[int, int]
) -> None:
    x = torch.arange(2 * grid[0] * grid[1] * 3.0).view(2, -1, 3)
    cut = windows.split(x, grid, window)
    maps = x.view(2, *grid, 3).numpy()
    wanted = []
    for image in maps:
        for top in range(0, grid[0], window[0]):
            for left in range(0, grid[1], window[1]):
                wanted.append(
                    [
                        image[min(row, grid[0] - 1), min(column, grid[1] - 1)]
                        for row in range(top, top + window[0])
                        for column in range(left, left + window[1])
                    ]
                )
    np.testing.assert_array_equal(cut.numpy(), np.array(wanted))
    assert torch.equal(windows.join(cut, grid, window), x)


@settings(max_examples=60, deadline=None)
@given(grids, st.tuples(sides, sides), st.data())
def test_reduced_maps_are_what_lies_in_the_image(
    grid: tuple[int, int], window: tuple[int, int], data: st.DataObject
) -> None:
    few = tuple(data.draw(st.integers(1, side)) for side in window)
    counts = []
    for side, wide, narrow in zip(grid, window, few, strict=True):
        count = 0
        for cell in range(-(-side // wide) * narrow):
            # The first row that has a part in this cell of adaptive average pooling.
            first = cell // narrow * wide + (cell % narrow) * wide // narrow
            count += first < side
        counts.append(count)
    assert windows.reduced(grid, window, few) == tuple(counts)


@settings(max_examples=10, deadline=None)
@given(grids, st.tuples(sides, sides), st.sampled_from(["border", "zeros"]), st.data())
def test_a_feature_map_is_mapped_window_by_window(
    grid: tuple[int, int], window: tuple[int, int], filling: Any, data: st.DataObject
) -> None:
    few = tuple(data.draw(st.integers(1, side)) for side in window)
    x = torch.randn(2, grid[0] * grid[1], 4)
    reducer = windows.InWindows(SLIC(few, iterations=2, filling=filling), window, few)
    rows, columns = windows.reduced(grid, window, few, filling)
    if filling == "zeros":  # all windows are full ones
        assert rows == -(-grid[0] // window[0]) * few[0]
        assert columns == -(-grid[1] // window[1]) * few[1]
    token_map = reducer(Tokens(x, torch.ones(x.shape[:2]), grid=grid), rows * columns)
    assert token_map.grid == (rows, columns)
    assert token_map.num_coarse == rows * columns == reducer.fit(1, grid)
    ones = torch.ones(x.shape[:2])
    coarse = token_map.down(x, ones)
    assert coarse.shape == (2, rows * columns, 4)
    assert coarse.isfinite().all()
    # Each window as if it were an image, cut out by hand and filled up.
    labels, middles = token_map.labels(), token_map.representatives()
    for image in range(2):
        padded = F.pad(
            x[image].view(1, *grid, 4).permute(0, 3, 1, 2),
            (0, -grid[1] % window[1], 0, -grid[0] % window[0]),
            mode="replicate" if filling == "border" else "constant",
        )[0].permute(1, 2, 0)
        for top in range(0, grid[0], window[0]):
            for left in range(0, grid[1], window[1]):
                one = padded[top : top + window[0], left : left + window[1]].reshape(1, -1, 4)
                size = torch.ones(one.shape[:2])
                part = SLIC(few, iterations=2)(Tokens(one, size, grid=window), math.prod(few))
                centres = part.down(one, size)[0].view(*few, 4)
                at = (top // window[0] * few[0], left // window[1] * few[1])
                mine = coarse[image].view(rows, columns, 4)[
                    at[0] : at[0] + few[0], at[1] : at[1] + few[1]
                ]
                torch.testing.assert_close(mine, centres[: mine.shape[0], : mine.shape[1]])
                own = part.labels()[0].view(window)
                here = labels[image].view(grid)[top : top + window[0], left : left + window[1]]
                own = own[: here.shape[0], : here.shape[1]]
                row = (at[0] + own // few[1]).clamp(max=rows - 1)
                column = (at[1] + own % few[1]).clamp(max=columns - 1)
                assert torch.equal(here, row * columns + column)
    assert ((middles >= 0) & (middles < x.shape[1])).all()
    total = token_map.total(ones)
    assert (total >= 0).all() and (total.sum(1) <= x.shape[1] * (1 + 1e-5)).all()
    if grid[0] % window[0] == grid[1] % window[1] == 0:
        torch.testing.assert_close(total.sum(1), ones.sum(1))


@pytest.mark.parametrize("grid", [(12, 18), (10, 9), (3, 7)])
def test_baselines_are_pooling_and_interpolation_in_each_window(grid: tuple[int, int]) -> None:
    x = torch.randn(2, grid[0] * grid[1], 5)
    reducer = windows.InWindows(SLIC(FEW, iterations=0), WINDOW, FEW)
    token_map = reducer(Tokens(x, torch.ones(x.shape[:2]), grid=grid), reducer.fit(1, grid))
    coarse = token_map.down(x, torch.ones(x.shape[:2]))
    rebuilt = windows.ReconstructedInWindows(Bilinear(), WINDOW, FEW)
    index, weight = rebuilt(x, coarse, grid, token_map.grid)
    up = torch.stack([coarse[image][index[0]] for image in range(2)])
    up = (up * weight[:, :, :, None]).sum(2)
    padded = F.pad(
        x.view(2, *grid, 5).permute(0, 3, 1, 2),
        (0, -grid[1] % 6, 0, -grid[0] % 6),
        mode="replicate",
    )
    full = coarse.view(2, *token_map.grid, 5).permute(0, 3, 1, 2)
    whole = [side // 6 * 4 for side in padded.shape[2:]]
    full = F.pad(full, (0, whole[1] - full.shape[3], 0, whole[0] - full.shape[2]), mode="replicate")
    pooled, wanted = torch.zeros_like(full), torch.zeros_like(padded)
    for row in range(padded.shape[2] // 6):
        for column in range(padded.shape[3] // 6):
            fine = (..., slice(6 * row, 6 * row + 6), slice(6 * column, 6 * column + 6))
            few = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            pooled[few] = F.adaptive_avg_pool2d(padded[fine], FEW)
            wanted[fine] = F.interpolate(full[few], size=WINDOW, mode="bilinear")
    rows, columns = token_map.grid
    torch.testing.assert_close(full[..., :rows, :columns], pooled[..., :rows, :columns])
    wanted = wanted[..., : grid[0], : grid[1]].permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(up, wanted)


@settings(max_examples=30, deadline=None)
@given(grids)
def test_reconstruction_stays_in_the_window(grid: tuple[int, int]) -> None:
    x = torch.randn(2, grid[0] * grid[1], 4)
    rows, columns = windows.reduced(grid, WINDOW, FEW)
    coarse = torch.randn(2, rows * columns, 4)
    rebuilt = windows.ReconstructedInWindows(Nearest(k=3, tau=2.0), WINDOW, FEW)
    index, weight = rebuilt(x, coarse, grid, (rows, columns))
    assert index.shape == weight.shape == (2, grid[0] * grid[1], 3)
    torch.testing.assert_close(weight.sum(2), torch.ones(2, grid[0] * grid[1]))
    place = torch.arange(grid[0] * grid[1])
    own_row, own_column = place // grid[1] // 6, place % grid[1] // 6
    assert torch.equal(index // columns // 4, own_row[:, None].expand_as(index[0]).expand_as(index))
    assert torch.equal(
        index % columns // 4, own_column[:, None].expand_as(index[0]).expand_as(index)
    )


def test_a_schedule_counts_the_tokens_of_one_window() -> None:
    schedule = windows.PerWindow(Exactly((36, 16, 16, 36)), WINDOW)
    assert schedule(tokens=144, layers=4) == [144, 64, 64, 144]
    assert schedule(tokens=90, layers=4) == [90, 40, 40, 90]


# Relative positions


@pytest.mark.parametrize("window", [(4, 4), (3, 5), (1, 1)])
def test_relative_positions_are_those_of_the_table(window: tuple[int, int]) -> None:
    got = windows.relative_positions(window, torch.device("cpu"))
    cells = [(row, column) for row in range(window[0]) for column in range(window[1])]
    for query, (row, column) in enumerate(cells):
        for key, (other_row, other_column) in enumerate(cells):
            down, across = row - other_row + window[0] - 1, column - other_column + window[1] - 1
            assert got[query, key] == down * (2 * window[1] - 1) + across


def test_tables_are_resized_as_images_are() -> None:
    table = torch.randn(121, 3)
    torch.testing.assert_close(windows.resized(table, (6, 6), (4, 4)), resized(table))
    assert torch.equal(windows.resized(table, (6, 6), (6, 6)), table)
    ramp = torch.arange(7.0)[:, None].expand(7, 11).reshape(77, 1)  # windows of 4x6
    small = windows.resized(ramp, (4, 6), (2, 3)).view(3, 5)
    # Pixel centres: 7 rows become 3, the middle one stays in the middle.
    torch.testing.assert_close(small[:, 0], torch.tensor([2 / 3, 3.0, 16 / 3]))
    assert windows.resized(table.bfloat16(), (6, 6), (4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("pretrained", [0, 8])
def test_coordinates_cover_what_the_host_s_own_do(pretrained: int) -> None:
    few = windows.coordinates((12, 12), (8, 8), (pretrained, pretrained), torch.zeros(()))
    norm = (pretrained or 12) - 1
    for row in range(15):
        for column in range(15):
            for value, step in zip(few[0, row, column], (row - 7, column - 7), strict=True):
                scaled = 8 * step * (11 / 7) / norm
                wanted = math.copysign(math.log2(abs(scaled) + 1) / 3, scaled)
                assert float(value) == pytest.approx(wanted, abs=1e-6)


# What is promised of every host


def keep_all(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tokred.apply(model, "slic", Hourglass(grid=WINDOW))


def test_windows_of_the_own_size_change_no_bit(host: Swin) -> None:
    model, x = host.build(), images()
    dense = answered(host, model, x)
    with pytest.warns(UserWarning, match="keeps all 36 tokens: nothing is reduced"):
        tokred.apply(model, "slic", Hourglass(grid=WINDOW))
    assert torch.equal(answered(host, model, x), dense)


def test_removing_leaves_no_trace(host: Swin) -> None:
    model, x = host.build(), images()
    dense = answered(host, model, x)
    was, weights = traces(model), copy.deepcopy(model.state_dict())
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    sizes = [getattr(part, "window_size", None) for part in model.modules()]
    tokred.apply(model, "slic", MIDDLE)
    answered(host, model, x)
    assert [type(module) for module in model.modules()] == [entry[1] for entry in was]
    assert [getattr(part, "window_size", None) for part in model.modules()] == sizes
    assert model.state_dict().keys() == weights.keys()
    tokred.remove(model)
    assert traces(model) == was
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])
    assert torch.equal(answered(host, model, x), dense)


def test_the_answer_has_its_shape_and_is_always_the_same(host: Swin) -> None:
    model, x = host.build(), images()
    dense = answered(host, model, x)
    for up in (3, 4):  # before the last block, and behind it
        tokred.apply(model, "slic", Hourglass(grid=FEW, down=1, up=up))
        after = answered(host, model, x)
        assert after.shape == dense.shape and after.isfinite().all()
        assert not torch.allclose(after, dense, rtol=1e-4, atol=1e-5)
        assert torch.equal(answered(host, model, x), after)
        for image in range(2):  # images do not mix
            alone = answered(host, model, x[image : image + 1])
            torch.testing.assert_close(alone, after[image : image + 1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_full_maps_are_made_as_is_asked_for() -> None:
    host = SWIN["torchvision"]
    model, x = host.build(), images()
    answers = {}
    for name in ("nearest", "bilinear", "copy"):
        tokred.apply(model, tokred.SLIC(copies="assigned"), MIDDLE, reconstruction=name)
        seen = Watched(host, model, x)
        answers[name] = seen.behind[3]
    labels = tokred.inspect(model, x).stages[0].labels
    tokred.remove(model)
    few = seen.behind[2].flatten(1, 2)
    full = torch.stack([tokens[label] for tokens, label in zip(few, labels, strict=True)])
    torch.testing.assert_close(stage_of(model)[3](full), answers["copy"])
    assert not torch.allclose(answers["copy"], answers["nearest"])
    assert not torch.allclose(answers["nearest"], answers["bilinear"])


@torch.no_grad()
def test_windows_are_filled_up_with_zeros_if_that_is_asked_for(host: Swin) -> None:
    """As in the published code: the reduced map is one of full windows, whose tokens go through the
    blocks, and what they were filled up with is cut off at the end."""
    model, x = host.build(), images()
    dense = answered(host, model, x)
    answers, maps = {}, {}
    for filling in ("border", "zeros"):
        tokred.apply(model, SLIC(filling=filling), MIDDLE)
        seen = Watched(host, model, x)
        answers[filling] = answered(host, model, x)
        maps[filling] = host.tokens(seen.behind[1]).shape[1]
        alone = answered(host, model, x[1:])
        torch.testing.assert_close(alone, answers[filling][1:], rtol=1e-4, atol=1e-4)
    assert maps == {"border": math.prod(REDUCED), "zeros": 8 * 8}
    assert answers["zeros"].shape == dense.shape and answers["zeros"].isfinite().all()
    assert not torch.allclose(answers["zeros"], answers["border"], rtol=1e-4, atol=1e-5)
    if host is SWIN["timm-static"]:  # which takes images of one size
        return
    # Where the windows divide the map, both are the same.
    even = images(size=(48, 48))
    for filling in ("border", "zeros"):
        tokred.apply(model, SLIC(filling=filling), MIDDLE)
        answers[filling] = answered(host, model, even)
    assert torch.equal(answers["zeros"], answers["border"])


def test_what_windows_are_filled_up_with_is_named() -> None:
    with pytest.raises(ValueError, match="filling must be 'border' or 'zeros', not 'mirror'"):
        SLIC(filling="mirror")  # type: ignore[arg-type]


class Watched:
    """What the blocks of a stage are given and what they put out during one pass."""

    def __init__(self, host: Swin, model: nn.Module, x: Tensor) -> None:
        self.before: list[Tensor] = []
        self.behind: list[Tensor] = []
        self.states: list[Any] = []
        self.reduction = reduction_of(model)
        handles = []
        for block in stage_of(model):
            handles.append(block.register_forward_pre_hook(self._see))
            handles.append(block.register_forward_hook(self._take))
        with torch.no_grad():
            host.inside(model)(x)
        for handle in handles:
            handle.remove()

    def _see(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.before.append(args[0])
        if self.reduction is not None:
            self.states.append(self.reduction.memory.ridden(args[0]))

    def _take(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.behind.append(output[0] if isinstance(output, tuple) else output)


def test_blocks_in_between_run_on_few_tokens(host: Swin) -> None:
    model = host.build()
    tokred.apply(model, "slic", MIDDLE)
    seen = Watched(host, model, images())
    counts = [host.tokens(y).shape[1] for y in seen.behind]
    assert counts == [90, 42, 42, 90]
    if seen.behind[1].ndim == 4 and not host.channels_first:
        assert [tuple(y.shape[1:3]) for y in seen.behind] == [GRID, REDUCED, REDUCED, GRID]


@torch.no_grad()
def test_they_are_the_host_s_blocks_of_smaller_windows(host: Swin) -> None:
    """Masks, shifts, padding and biases: a block in between computes what the host's own block
    computes that was built for windows of 4x4 and has the same weights, its table resized."""
    model = host.build()
    tokred.apply(model, "slic", Hourglass(grid=FEW, down=0, up=4))
    seen = Watched(host, model, images())
    for layer, block in list(enumerate(stage_of(model)))[1:3]:
        small = host.small(block, layer % 2 == 1)
        wanted = host.run(small, seen.before[layer], REDUCED)
        torch.testing.assert_close(seen.behind[layer], wanted, rtol=1e-4, atol=1e-5)
        if host.shifts:
            other = host.run(host.small(block, layer % 2 == 0), seen.before[layer], REDUCED)
            assert not torch.allclose(other, wanted, rtol=1e-3, atol=1e-3)


def sees(rolls_first: bool, shift: int) -> np.ndarray:
    """Whether a token of the reduced map sees another, by brute force: they must be in the same
    window of the shifted map, and neither may have come there around the border."""

    def place(row: int, column: int) -> tuple[int, int, bool, bool]:
        # Shifted before it is padded to 8x8, or after.
        height, width = REDUCED if rolls_first else (8, 8)
        row, column = (row - shift) % height, (column - shift) % width
        return row // 4, column // 4, row >= 8 - shift, column >= 8 - shift

    cells = [place(row, column) for row in range(REDUCED[0]) for column in range(REDUCED[1])]
    return np.array([[one == other for other in cells] for one in cells])


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_masks_are_those_of_the_smaller_windows(host: Swin, shifted: bool) -> None:
    """Entry by entry: of as many copies of a map as it has tokens, each has another one changed."""
    model = host.build().double()  # so that no attention is too little to be seen
    reduction = tokred.apply(model, "slic", Hourglass(grid=FEW, down=0, up=4))
    seen = Watched(host, model, images(1).double())
    layer = 1 if shifted else 2
    x, block = seen.before[layer], stage_of(model)[layer]
    tokens = host.tokens(x).expand(43, -1, -1).clone()
    tokens[torch.arange(42), torch.arange(42)] += torch.randn(42, tokens.shape[-1]).double()
    copies = host.like(tokens, x)
    passing.carry(reduction, copies, seen.states[layer])
    y = host.tokens(host.run(block, copies, GRID))
    # By the token that sees, and the one that is seen; less is a matter of rounding.
    changed = ((y[:42] - y[42:]).abs() > 1e-12).any(2).T
    wanted = sees(host.rolls_first, 2 if shifted else 0)
    if shifted and not host.shifts:
        wanted = np.ones_like(wanted)  # attends to the whole map instead
    np.testing.assert_array_equal(changed.numpy(), wanted)


@torch.no_grad()
def test_any_image_size_and_any_batch(host: Swin, request: pytest.FixtureRequest) -> None:
    if "static" in request.node.name:
        pytest.skip("takes images of one size only")
    model = host.build()
    for size, batch in [((40, 36), 3), ((48, 48), 1), ((36, 72), 1), ((52, 28), 1)]:
        x = images(batch, size)
        tokred.remove(model)
        dense = answered(host, model, x)
        tokred.apply(model, "slic", MIDDLE)
        after = answered(host, model, x)
        assert after.shape == dense.shape and after.isfinite().all()
        assert not torch.allclose(after, dense, rtol=1e-4, atol=1e-5)
        assert torch.equal(after, answered(host, model, x))


def test_copies_and_saved_models_stand_on_their_own(host: Swin) -> None:
    model, x = host.build(), images()
    tokred.apply(model, "slic", MIDDLE)
    file = io.BytesIO()
    try:
        torch.save(host.build(), io.BytesIO())
    except AttributeError as error:  # hooks that transformers installs at once
        assert "output_capturing_hook" in str(error)
        pytest.skip("the dense model cannot be pickled either")
    torch.save(model, file)  # before it has run: what transformers hooks on cannot be pickled
    few = answered(host, model, x)
    twin = copy.deepcopy(model)
    tokred.remove(model)
    assert torch.equal(answered(host, twin, x), few)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert torch.equal(answered(host, back, x), few)
    # Blocks in windows of another size look at the copy's own weights.
    other = host.build()
    back.load_state_dict(other.state_dict())
    tokred.apply(other, "slic", MIDDLE)
    loaded = answered(host, other, x)
    assert torch.equal(answered(host, back, x), loaded)
    assert not torch.allclose(loaded, few)


def test_the_model_may_change_its_dtype_afterwards(host: Swin) -> None:
    model, x = host.build(), images().double()
    tokred.apply(model, "slic", MIDDLE)
    single = answered(host, model, x.float())
    model.double()
    after = answered(host, model, x)
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), single, rtol=1e-3, atol=1e-3)
    tokred.apply(model, "slic", MIDDLE)
    assert torch.equal(answered(host, model, x), after)


def test_gradients_reach_all_weights_and_are_the_same_when_checkpointed(host: Swin) -> None:
    model, x = host.build(), images()
    if host.answer is not SWIN["timm"].answer:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
    tokred.apply(model, "slic", MIDDLE)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        host.answer(model(x)).square().mean().backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    expected = gradients()
    stage = {id(p) for block in stage_of(model) for p in block.parameters()}
    unreached = [
        name for name, p in model.named_parameters() if id(p) in stage and name not in expected
    ]
    assert not unreached
    enable = getattr(model, "gradient_checkpointing_enable", None) or getattr(
        model, "set_grad_checkpointing", None
    )
    if enable is None:
        return
    runs: list[int] = []
    norm = next(part for part in stage_of(model)[1].modules() if isinstance(part, nn.LayerNorm))
    norm.register_forward_pre_hook(lambda *_: runs.append(1))
    enable()
    if blocks_checkpoint_themselves(model):
        with pytest.raises(RuntimeError, match="nothing is known"):
            gradients()
        return
    again = gradients()
    assert len(runs) >= 2, "once more in the backward pass"
    for name, gradient in expected.items():
        torch.testing.assert_close(again[name], gradient)


def blocks_checkpoint_themselves(model: nn.Module) -> bool:
    """Whether whole stages are checkpointed, and their blocks once more, in a `__call__` that we
    have no part in: in transformers before 5.23."""
    from tokred.patches import _transformers as common

    block = stage_of(model)[0]
    return hasattr(block, "gradient_checkpointing") and not common.IN_FORWARD


@pytest.mark.parametrize(
    "name",
    [name if name == "timm" else pytest.param(name, marks=pytest.mark.slow) for name in SWIN],
)
def test_compiles_in_one_graph_without_recompiling(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    host = SWIN[name]
    model, x = host.build(), images()
    tokred.apply(model, SLIC(FEW), MIDDLE)
    expected = answered(host, model, x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(answered(host, compiled, x), expected)
    answered(host, compiled, images())
    assert counter.frame_count == 1


def test_clusters_are_laid_out_over_the_image_inside_of_their_windows(host: Swin) -> None:
    model, x = host.build(), images()
    tokred.apply(model, "slic", MIDDLE)
    trace = tokred.inspect(model, x)
    assert trace.grid == GRID and trace.layers == 4
    (stage,) = trace.stages
    assert (stage.layer, stage.before, stage.after) == (1, 90, 42)
    assert stage.labels.shape == (2, *GRID)
    row, column = torch.arange(10)[:, None] // 6, torch.arange(9) // 6
    assert torch.equal(stage.labels // 6 // 4, row.expand(2, 10, 9))
    assert torch.equal(stage.labels % 6 // 4, column.expand(2, 10, 9))


def test_the_limit_has_as_many_tokens_in_the_same_blocks() -> None:
    host = SWIN["timm"]
    model = host.build()
    reduction = tokred.apply(model, "slic", MIDDLE)
    own = Watched(host, model, images())
    hang(model, find_host(model)[0], windows.limit(reduction))
    free = Watched(host, model, images())
    assert [y.shape for y in free.behind] == [y.shape for y in own.behind]
    x = torch.randn(2, 12, 5)
    corner = windows.Corner((3, 4), (2, 3))
    assert corner.labels().tolist() == [[0, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1, -1]]
    few = corner.down(x, torch.ones(2, 12))
    back = corner.up(few).view(2, 3, 4, 5)
    assert torch.equal(back[:, :2, :3], x.view(2, 3, 4, 5)[:, :2, :3])
    assert not back[:, 2].any() and not back[:, :, 3].any()
    assert torch.equal(few, torch.stack([x[:, n] for n in corner.representatives()[0]], 1))
    longer = windows.Corner((3, 4), (4, 2))
    assert longer.down(x, torch.ones(2, 12)).shape == (2, 8, 5)
    assert torch.equal(longer.up(longer.down(x, torch.ones(2, 12))).view(2, 3, 4, 5)[:, :, :2],
                       x.view(2, 3, 4, 5)[:, :, :2])  # fmt: skip
    assert longer.labels().tolist() == [[0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1]]


# Options and refusals


def test_the_longest_stage_is_taken_unless_another_is_chosen() -> None:
    host = SWIN["timm"]
    model, x = host.build(), images()
    first, second = (list(stage.blocks) for stage in model.layers)
    assert stage_of(model) == second
    reduction = tokred.apply(model, "slic", Hourglass(grid=FEW, down=0, up=1), stage=0)
    assert reduction.layout.layers == 1 and stage_of(model) == first
    chosen = answered(host, model, x)
    assert tokred.inspect(model, x).grid == (20, 18)
    with tokred.applied(model, "slic", MIDDLE):
        assert stage_of(model) == second
        assert not torch.equal(answered(host, model, x), chosen)
    assert stage_of(model) == first
    assert torch.equal(answered(host, model, x), chosen)
    # Applying again replaces, and takes the longest one again.
    tokred.apply(model, "slic", MIDDLE)
    assert stage_of(model) == second
    tokred.remove(model)
    assert "forward" not in vars(first[0]) and "forward" not in vars(second[0])


def test_a_bare_keep_rate_is_that_of_every_window() -> None:
    model = SWIN["timm"].build()
    reduction = tokred.apply(model, "slic", 0.5)
    # Of 36 tokens, 16 in a square of 4x4 are nearest to 18; from a third of the blocks on.
    assert reduction.counts(36, (6, 6)) == (36, 16, 16, 16)
    assert "6x6 -> 4x4" in str(reduction)


METHODS = [name for name in tokred.methods() if name != "slic"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_leave_no_grid_are_refused(method: str) -> None:
    model = SWIN["timm"].build()
    was = traces(model)
    with pytest.raises(tokred.UnsupportedModelError, match=r"is on no grid.*use 'slic'"):
        tokred.apply(model, method, Hourglass(keep_rate=0.5))
    assert traces(model) == was


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stage": ({"stage": 2}, r"stage must be in \[0, 1\], not 2"),
    "sizes": ({"schedule": Exactly((36, 25, 16, 9))}, r"leaves \[9, 16, 25\] of the 36 tokens"),
    "too large": ({"schedule": Hourglass(grid=(8, 8))}, "grid must have at most 36 cells"),
}


@pytest.mark.parametrize("option", ["full_grid", "proportional_attention"])
def test_what_windows_cannot_give_is_refused(option: str) -> None:
    model = SWIN["timm"].build()
    was = traces(model)
    given = {option: option != "full_grid"}
    with pytest.raises(tokred.UnsupportedModelError, match=f"SwinTransformer: .*{option}="):
        tokred.apply(model, "slic", MIDDLE, **given)
    assert traces(model) == was


@pytest.mark.parametrize("options", REFUSED)
def test_options_without_a_meaning_are_refused(options: str) -> None:
    given, reason = REFUSED[options]
    model = SWIN["timm"].build()
    was = traces(model)
    with pytest.raises(ValueError, match=reason):
        tokred.apply(model, "slic", **{"schedule": MIDDLE, **given})
    assert traces(model) == was


def test_models_without_stages_have_none_to_choose(plain: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"stage must be None: .* is not reduced by stages"):
        tokred.apply(plain, "tome", 0.5, stage=1)


def test_one_pass_may_be_interleaved_with_another() -> None:
    """Two forward passes, of different sizes, before a backward pass through both."""
    host = SWIN["transformers"]
    model = host.build()
    tokred.apply(model, "slic", MIDDLE)
    first, second = images(1, (40, 36)), images(2, (36, 50))

    def alone(x: Tensor) -> list[Tensor]:
        model.zero_grad()
        host.answer(model(x)).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    apart = [alone(first), alone(second)]
    model.zero_grad()
    one, two = host.answer(model(first)), host.answer(model(second))
    (one.square().sum() + two.square().sum()).backward()
    both = [p.grad for p in model.parameters() if p.grad is not None]
    for got, a, b in zip(both, *apart, strict=True):
        torch.testing.assert_close(got, a + b, rtol=1e-3, atol=1e-4)
