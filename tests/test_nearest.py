"""The most similar destination of every source, by a product of 8-bit integers: against cosines in
float64, and against the operators that are used elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.measure.counting import count
from tokred.reducers import tome2d

nearest_numba = pytest.importorskip("tokred.kernels.nearest_numba", exc_type=ImportError)
pytestmark = pytest.mark.skipif(
    not nearest_numba.fast(), reason="this processor has no products of 8-bit integers"
)

GRID = (24, 20)
AT = tome2d.destinations(GRID, (2, 2), torch.device("cpu"), None)
SOURCES = torch.tensor([n for n in range(480) if n not in set(AT.tolist())])


def smooth(batch: int, dim: int) -> Tensor:
    """Neighbours are alike, and all tokens have much in common."""
    coarse = torch.randn(batch, dim, 6, 5)
    x = F.interpolate(coarse, GRID, mode="bilinear") + 0.3 * torch.randn(batch, dim, *GRID) + 2
    return x.flatten(2).transpose(1, 2)


def noise(batch: int, dim: int) -> Tensor:
    return torch.randn(batch, 480, dim) * torch.logspace(-3, 3, dim)


def two_colours(batch: int, dim: int) -> Tensor:
    """Most cosines are equal."""
    return torch.randn(batch, 2, dim)[:, torch.arange(480) % 7 % 2]


def of_few_values(batch: int, dim: int) -> Tensor:
    """Many cosines are equal, and some tokens are zeros."""
    x = torch.randint(-1, 2, (batch, 480, dim)).float()
    x[:, ::50] = 0
    return x


KINDS = (smooth, noise, two_colours, of_few_values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [3, 70, 320])
def test_it_is_the_highest_cosine(
    kind: Callable[[int, int], Tensor], dtype: torch.dtype, dim: int
) -> None:
    x = kind(2, dim).to(dtype)
    found, partner = nearest_numba.most_similar(x, SOURCES, AT)
    unit = F.normalize(x.double(), dim=-1)
    cosine = unit[:, SOURCES] @ unit[:, AT].transpose(1, 2)
    highest = cosine.amax(-1)
    torch.testing.assert_close(found.double(), highest, rtol=0, atol=2e-6)
    chosen = cosine.gather(2, partner[..., None])[..., 0]
    torch.testing.assert_close(chosen, highest, rtol=0, atol=2e-6)


def test_of_equals_the_first_is_taken() -> None:
    x = two_colours(2, 64)
    _, partner = nearest_numba.most_similar(x, SOURCES, AT)
    colour = torch.arange(480) % 7 % 2
    first = torch.stack([(colour[AT] == c).int().argmax() for c in (0, 1)])
    assert torch.equal(partner, first[colour[SOURCES]].expand(2, -1))


@pytest.mark.parametrize("threads", [1, 3])
def test_images_of_a_batch_make_no_difference_nor_do_threads(threads: int) -> None:
    x = torch.cat([smooth(2, 96), two_colours(1, 96), noise(1, 96)])
    alone = [nearest_numba.most_similar(x[n : n + 1], SOURCES, AT) for n in range(4)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for bad in (None, math.nan, math.inf):
            if bad is not None:
                x[1, 5, 3] = bad  # a source
                x[1, AT[7], 2] = bad
            found, partner = nearest_numba.most_similar(x, SOURCES, AT)
            assert partner.min() >= 0 and partner.max() < len(AT)
            for n in (0, 2, 3):
                assert torch.equal(found[n], alone[n][0][0])
                assert torch.equal(partner[n], alone[n][1][0])
    finally:
        torch.set_num_threads(before)


class Matching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tome2d.match(x, GRID, 240)


def test_operators_and_the_kernel_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """In value and in what is counted; and in compiled code, where there are only operators."""
    torch._dynamo.reset()
    x = smooth(2, 96)
    found, counted = [], []
    for worth in (math.inf, 0):
        monkeypatch.setattr(tome2d, "_WORTH", worth)
        found.append(Matching()(x))
        counted.append(count(Matching(), x))
    assert torch.equal(found[0], found[1])
    # The kernel takes a whole number of blocks of destinations.
    assert counted == [len(SOURCES) * len(AT) * 96, len(SOURCES) * 128 * 96]
    compiled = torch.compile(Matching(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), found[0])
    x.requires_grad_()
    assert torch.equal(Matching()(x), found[0])


def test_the_kernel_is_used_from_some_size_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(x: Tensor, *indices: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x.dtype)
        found: tuple[Tensor, Tensor] = real(x, *indices)
        return found

    real = nearest_numba.most_similar
    monkeypatch.setattr(nearest_numba, "most_similar", spy)
    x = smooth(1, 320)
    matched = Matching()
    matched(x)
    few = list(calls)
    large = F.interpolate(x.view(1, *GRID, 320).permute(0, 3, 1, 2), (64, 64)).flatten(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tome2d.match(large.transpose(1, 2).to(dtype), (64, 64), 2048)
    assert few == [] and calls == [torch.float32, torch.bfloat16]
