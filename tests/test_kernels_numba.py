"""What the clustering backend "numba" stands on: loops on vectors, and distances as integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tokred.kernels import agglomerative_torch
from tokred.reducers import atc

pytest.importorskip("numba")

from tokred.kernels import agglomerative_numba, cosine_numba, vectors_numba
from tokred.kernels.compiling import compiled


@compiled
def _three(row, kind, far, num):  # type: ignore[no-untyped-def]
    return vectors_numba.least_three(row, kind, far, num)


@compiled
def _up_to(row, kind, which, start, limit):  # type: ignore[no-untyped-def]
    return vectors_numba.up_to(row, kind, which, start, limit)


@compiled
def _among_and_lowest(row, start, one, other):  # type: ignore[no-untyped-def]
    bits = vectors_numba.among(row, start, one, other)
    return bits, vectors_numba.lowest(bits) if bits != 0 else -1


@pytest.mark.parametrize("number", [np.int32, np.int64])
def test_loops_on_vectors_against_numpy(number: type) -> None:
    random = np.random.default_rng(0)
    far = number(1000)
    for trial in range(100):
        row = random.integers(0, 100, 192).astype(number)
        kind = random.integers(0, 3, 192).astype(np.int32)
        if trial < 3:
            kind[:] = trial  # all of one kind
        if trial == 3:
            kind[1:] = 2
        first = [*sorted(row[kind == 0]), far, far][:2]
        other = min([*row[kind == 1], far])
        assert _three(row, kind, far, 192) == (*first, other)
        bits = _up_to(row, kind, 1, 64, number(50))
        wanted = (row[64:128] <= 50) & (kind[64:128] == 1)
        assert [(int(bits) >> k) & 1 for k in range(64)] == wanted.tolist()
        if number == np.int32:
            bits, lowest = _among_and_lowest(row, 128, np.int32(7), np.int32(90))
            wanted = np.isin(row[128:], [7, 90])
            assert [(int(bits) >> k) & 1 for k in range(64)] == wanted.tolist()
            assert lowest == (int(wanted.argmax()) if wanted.any() else -1)


@pytest.mark.parametrize("num, dim", [(1, 4), (31, 1), (33, 7), (64, 64), (100, 48), (200, 130)])
def test_distances_against_float64(num: int, dim: int) -> None:
    x = torch.randn(3, num, dim, generator=torch.Generator().manual_seed(num))
    distance = cosine_numba.distances(x)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    expected = (1 - unit @ unit.mT).clamp(0, 2)
    expected.diagonal(dim1=1, dim2=2).zero_()
    torch.testing.assert_close(distance.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(distance, distance.mT)
    # The same of two tokens alone, wherever they stand, and in multiples of 2^-24.
    assert torch.equal(cosine_numba.distances(x[1:2].flip(1)), distance[1:2].flip(1, 2))
    if num > 40:
        pair = x[:, [5, 40]].contiguous()
        assert torch.equal(cosine_numba.distances(pair)[:, 0, 1], distance[:, 5, 40])
    assert torch.equal(distance * 2**24, (distance * 2**24).round())


def test_distances_of_zeros_duplicates_extremes_and_what_is_not_finite() -> None:
    x = torch.randn(1, 70, 24)
    x[0, 50] = x[0, 3]
    usual = cosine_numba.distances(x)
    assert torch.equal(
        usual[0, 50, :50], torch.where(torch.arange(50) == 3, usual[0, 3, 50], usual[0, 3, :50])
    )
    for size in (2.0**-140, 2.0**-100, 2.0**100, 2.0**120):
        scaled = x.clone()
        scaled[0, 9] *= size
        if size > 2.0**-126:
            assert torch.equal(cosine_numba.distances(scaled), usual)
        else:  # some bits are lost
            torch.testing.assert_close(cosine_numba.distances(scaled), usual, atol=1e-2, rtol=0)
    others = torch.arange(70) != 20
    for bad, far in ((0.0, 1), (float("nan"), 2), (float("inf"), 2), (-float("inf"), 2)):
        changed = x.clone()
        changed[0, 20, 0] = bad
        if bad == 0:
            changed[0, 20] = 0
        distance = cosine_numba.distances(changed)[0]
        assert (distance[20, others] == far).all() and (distance[others, 20] == far).all()
        assert torch.equal(distance[others][:, others], usual[0][others][:, others])


@pytest.mark.parametrize("linkage", atc.LINKAGES)
@pytest.mark.parametrize("num", [1, 2, 33, 130, 300])
def test_features_are_clustered_as_their_distances_are(num: int, linkage: str) -> None:
    x = torch.randn(5, num, 20, generator=torch.Generator().manual_seed(num))
    x[1] = x[1].round()  # with ties
    distance = cosine_numba.distances(x)
    keep, threads = max(1, num // 3), torch.get_num_threads()
    expected = agglomerative_torch.cluster(distance, keep, linkage)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            # Odd batches leave an image that the threads share.
            for batch in (5, 3, 1):
                found = agglomerative_numba.cluster_features(x[:batch], keep, linkage)
                assert torch.equal(found, expected[:batch])
            assert torch.equal(agglomerative_numba.cluster(distance, keep, linkage), expected)
    finally:
        torch.set_num_threads(threads)
    for backend in ("numba", "torch"):
        assert torch.equal(atc.cluster(x, keep, linkage, backend), expected)


@pytest.mark.parametrize("linkage", ["average", "complete"])
@pytest.mark.parametrize("keep", [1, 3, 40])
def test_very_large_clusters_in_every_order(linkage: str, keep: int) -> None:
    """Sums over many tokens are kept elsewhere, and go along when a large cluster is absorbed."""
    random = torch.Generator().manual_seed(keep)
    near = torch.randn(1, 1, 16, generator=random) + 0.3 * torch.randn(2, 260, 16, generator=random)
    grows = torch.linspace(0.1, 3, 260)[:, None] * torch.randn(2, 260, 16, generator=random) + 1

    def same(x: Tensor) -> None:
        distance = cosine_numba.distances(x.contiguous())
        expected = agglomerative_torch.cluster(distance, keep, linkage)
        assert torch.equal(agglomerative_numba.cluster(distance, keep, linkage), expected)

    for x in (near, grows, grows.flip(1), torch.cat([near, grows], 1), torch.cat([grows, near], 1)):
        same(x)


def test_nobody_who_watches_misses_the_operator() -> None:
    """Called as a function where that is quicker; as an operator where somebody records."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 12, 8)
    expected = atc.cluster(x, 5)
    with Watch():
        found = atc.cluster(x, 5)
    assert torch.equal(found, expected)
    assert seen == ["tokred.cluster.default"]
    traced = torch.jit.trace(lambda y: atc.cluster(y, 5), (x,), check_trace=False)
    other = torch.randn(2, 12, 8)
    assert torch.equal(traced(other), atc.cluster(other, 5))
