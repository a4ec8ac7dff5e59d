"""The PyTorch and Triton clustering kernels against SciPy and against a loop that knows ties."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from references import cut, renumber
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from tokred.kernels import agglomerative_torch
from tokred.reducers import atc

LINKAGES = ("single", "complete", "average")
KINDS = ("gaussian", "clustered", "smooth", "chain", "hubs")
TIES = ("grid", "duplicates", "equal", "zeros", "two values")


def features(kind: str, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens [tokens, dim] of one image, float64."""
    if kind == "gaussian":
        return rng.normal(size=(tokens, 8))
    if kind == "clustered":
        centres = rng.normal(size=(max(2, tokens // 12), 8))
        return centres[rng.integers(len(centres), size=tokens)] + 0.1 * rng.normal(size=(tokens, 8))
    if kind == "smooth":  # a random walk: neighbours in the sequence are alike
        return rng.normal(size=(tokens, 8)).cumsum(0) + 0.01 * rng.normal(size=(tokens, 8))
    if kind == "chain":  # every gap wider than the one before: nearest neighbours form one path
        angle = np.linspace(0.1, 1, tokens) ** 2 * 2.5
        return np.stack([np.cos(angle), np.sin(angle)], 1)[rng.permutation(tokens)]
    if kind == "hubs":  # few tokens are nearest to very many
        hubs = rng.normal(size=(2, 8))
        tilt = np.geomspace(0.01, 1, tokens)[:, None] * rng.normal(size=(tokens, 8))
        return hubs[rng.integers(2, size=tokens)] + tilt
    if kind == "grid":
        return rng.integers(-1, 2, size=(tokens, 3)).astype(float)
    if kind == "duplicates":
        return rng.normal(size=(max(1, tokens // 4), 4))[
            rng.integers(max(1, tokens // 4), size=tokens)
        ]
    if kind == "equal":
        return np.ones((tokens, 4))
    if kind == "zeros":
        return rng.normal(size=(tokens, 4)) * (rng.random((tokens, 1)) < 0.5)
    return rng.normal(size=(tokens, 1)) * np.ones((tokens, 4))


def distance(x: np.ndarray) -> Tensor:
    """One minus cosine as the kernels get it: [1, tokens, tokens], float32, on a grid of 2^-24."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / np.where(length == 0, 1, length)
    far = np.round(np.clip(1 - unit @ unit.T, 0, 2) * 2**24) / 2**24
    return torch.tensor(far, dtype=torch.float32)[None]


def few_values(tokens: int, rng: np.random.Generator) -> Tensor:
    """Distances [1, tokens, tokens] that are tied everywhere, drawn without regard to geometry."""
    return torch.tensor(rng.integers(1, 5, size=(1, tokens, tokens)) / 4, dtype=torch.float32)


def by_scipy(far: Tensor, num_clusters: int, linkage: str) -> list[int] | None:
    """SciPy's dendrogram cut at K, if no two heights are so close that rounding decides."""
    upper = np.triu(far.double().numpy(), 1)
    merges = hierarchy.linkage(squareform(upper + upper.T), linkage)
    if np.diff(np.sort(merges[:, 2])).min(initial=1) < 1e-12:
        return None
    return cut(merges, num_clusters)


def by_order(far: Tensor, linkage: str) -> list[list[int]]:
    """The clusters after every number of merges, one merge at a time, ties by name.

    Single linkage makes the least pair of tokens in different clusters one cluster, in the order
    (distance, smaller token, larger token); the others merge the least pair of clusters, in the
    order (height, smaller name, larger name), a cluster's name being its smallest token."""
    upper = np.triu(far.double().numpy(), 1)
    far = upper + upper.T
    tokens = len(far)
    members = {token: [token] for token in range(tokens)}
    steps = [list(range(tokens))]

    def height(one: int, other: int) -> tuple[float, int, int]:
        block = far[np.ix_(members[one], members[other])]
        if linkage == "complete":
            return block.max(), one, other
        return float(block.sum()) / block.size, one, other

    def edge(one: int, other: int) -> tuple[float, int, int, int, int]:
        pairs = itertools.product(members[one], members[other])
        return (*min((far[a, b], min(a, b), max(a, b)) for a, b in pairs), one, other)

    while len(members) > 1:
        pairs = itertools.combinations(sorted(members), 2)
        *_, one, other = min((edge if linkage == "single" else height)(*pair) for pair in pairs)
        members[one] += members.pop(other)
        label = dict.fromkeys(range(tokens), 0)
        label.update({token: name for name, group in members.items() for token in group})
        steps.append(renumber([label[token] for token in range(tokens)]))
    return steps


def problems(kind: str, most: int, count: int, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Distances and numbers of clusters."""
    rng = np.random.default_rng([seed, len(kind)])
    for _ in range(count):
        tokens = int(rng.integers(2, most + 1))
        yield distance(features(kind, tokens, rng)), int(rng.integers(1, tokens + 1))


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_scipy_cut_at_k(kind: str, linkage: str) -> None:
    compared = 0
    small, large = problems(kind, 40, 20, seed=0), problems(kind, 300, 5, seed=1)
    for far, num_clusters in [*small, *large]:
        expected = by_scipy(far[0], num_clusters, linkage)
        if expected is not None:
            ours = agglomerative_torch.cluster(far, num_clusters, linkage)
            assert ours.tolist() == [expected]
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("kind", (*TIES, "few values"))
def test_decides_ties_by_name(kind: str, linkage: str) -> None:
    rng = np.random.default_rng(len(kind))
    for tokens in (1, 2, 3, 5, 8, 13, 16):
        few = kind == "few values"
        far = few_values(tokens, rng) if few else distance(features(kind, tokens, rng))
        for num_clusters, expected in zip(
            range(tokens, 0, -1), by_order(far[0], linkage), strict=True
        ):
            ours = agglomerative_torch.cluster(far, num_clusters, linkage)
            assert ours.tolist() == [expected]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("kind", (*KINDS, *TIES))
def test_looking_seldom_changes_nothing(
    kind: str, linkage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for far, num_clusters in problems(kind, 60, 3, seed=2):
        often = agglomerative_torch.cluster(far, num_clusters, linkage)
        with monkeypatch.context() as patch:  # as on a device that the host would wait for
            patch.setattr(agglomerative_torch, "_rounds_per_look", lambda device: 4)
            seldom = agglomerative_torch.cluster(far, num_clusters, linkage)
        assert torch.equal(often, seldom)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_treats_samples_apart(linkage: str) -> None:
    rng = np.random.default_rng(0)
    far = torch.cat([distance(features(kind, 30, rng)) for kind in (*KINDS, *TIES)])
    for num_clusters in (1, 9, 15, 29):
        together = agglomerative_torch.cluster(far, num_clusters, linkage)
        alone = [agglomerative_torch.cluster(one, num_clusters, linkage) for one in far.split(1)]
        assert torch.equal(together, torch.cat(alone))
        assert (together.max(1).values == num_clusters - 1).all()


@pytest.mark.parametrize("linkage", LINKAGES)
def test_looks_only_above_the_diagonal_and_changes_nothing(linkage: str) -> None:
    far = torch.cat([distance(features("gaussian", 30, np.random.default_rng(s))) for s in (0, 1)])
    clean = agglomerative_torch.cluster(far, 12, linkage)
    noisy = far.triu(1) + torch.rand(2, 30, 30).tril()
    noisy.mul_(torch.where(noisy == 0, -1, 1))  # zeros of either sign
    before = noisy.clone()
    assert torch.equal(agglomerative_torch.cluster(noisy, 12, linkage), clean)
    assert torch.equal(agglomerative_torch.cluster(noisy.mT.contiguous().mT, 12, linkage), clean)
    assert torch.equal(noisy, before)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_zeros_of_either_sign_are_equal(linkage: str) -> None:
    far = distance(features("duplicates", 16, np.random.default_rng(0)))
    signed = far * torch.where((far == 0) & (torch.rand(16, 16) < 0.5), -1, 1)
    for num_clusters in range(1, 17):
        assert torch.equal(
            agglomerative_torch.cluster(signed, num_clusters, linkage),
            agglomerative_torch.cluster(far, num_clusters, linkage),
        )


@pytest.mark.parametrize("linkage", LINKAGES)
def test_takes_no_samples_and_single_tokens(linkage: str) -> None:
    assert agglomerative_torch.cluster(torch.zeros(0, 5, 5), 2, linkage).shape == (0, 5)
    assert agglomerative_torch.cluster(torch.zeros(3, 1, 1), 1, linkage).tolist() == [[0]] * 3


def test_refuses_more_tokens_than_an_edge_has_bits_for() -> None:
    many = 2**16 + 1
    with pytest.raises(ValueError, match="at most 65536 tokens can be clustered, not 65537"):
        agglomerative_torch.cluster(torch.zeros(1, 1, 1).expand(1, many, many), 2, "single")


def test_triton_equals_torch_and_numba() -> None:
    """In a process of its own: Triton reads whether to interpret when it is first imported."""
    if not atc._installed("triton"):
        pytest.skip("needs triton >= 3.3")
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "117 problems solved alike\n"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("linkage", LINKAGES)
def test_triton_compiles_for_a_device_that_is_not_there(linkage: str) -> None:
    if not atc._installed("triton"):
        pytest.skip("needs triton >= 3.3")
    import triton
    from triton.backends.compiler import GPUTarget

    from tokred.kernels import agglomerative_triton

    kernels = {
        "single": ("_start", "_tree", "_hook", "_leave", "_forest"),
        "complete": ("_start", "_rounds", "_pairs", "_join"),
    }
    exact = "*fp64" if linkage == "average" else "*fp32"
    types = {
        **dict.fromkeys(("linked", "symmetric", "far", "size", "height", "bound"), exact),
        **dict.fromkeys(("least", "edges", "longest"), "*i64"),
        **dict.fromkeys(("apart", "tokens", "merges"), "i32"),
        "distance": "*fp32",
    }
    fixed = {"average": linkage == "average", "block": 256, "rows": 16, "columns": 64, "jumps": 8}
    for name in kernels.get(linkage, kernels["complete"]):
        kernel = getattr(agglomerative_triton, f"{name}_kernel")
        constants = {key: value for key, value in fixed.items() if key in kernel.arg_names}
        others = {key: types.get(key, "*i32") for key in kernel.arg_names if key not in constants}
        signature = {**others, **dict.fromkeys(constants, "constexpr")}
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature={key: signature[key] for key in kernel.arg_names},
            constexprs=constants,
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert "cubin" in compiled.asm


def compare_triton_with_torch() -> None:
    """Triton's interpreter against the other backends, on small problems."""
    from tokred.kernels import agglomerative_triton

    references = [agglomerative_torch.cluster]
    if atc._installed("numba"):
        from tokred.kernels import agglomerative_numba

        references.append(agglomerative_numba.cluster)
    rng = np.random.default_rng(3)
    solved = 0

    def compare(far: Tensor, num_clusters: int, linkage: str) -> None:
        nonlocal solved
        ours = agglomerative_triton.cluster(far, num_clusters, linkage)
        for reference in references:
            assert torch.equal(ours, reference(far.clone(), num_clusters, linkage))
        solved += 1

    for kind in (*KINDS, *TIES):
        # More tokens than a tile has columns where there are ties, which a seam could upset.
        tokens = 37 if kind in KINDS else 70
        far = distance(features(kind, tokens, rng))
        far = far.triu(1) + torch.rand(far.shape).tril()
        for linkage, small in itertools.product(LINKAGES, (1, 256)):
            # One program a sample, or rounds that are spread over the device.
            agglomerative_triton._SMALL = small
            # Equal tokens take one round a merge, and the interpreter's rounds are slow.
            compare(far, tokens - int(rng.integers(1, 37 if kind in KINDS else 20)), linkage)
    far = torch.cat([few_values(12, rng) for _ in range(3)])
    for linkage, num_clusters in itertools.product(LINKAGES, range(1, 12)):
        compare(far, num_clusters, linkage)
    # Tokens that are zero or not finite; one cluster, and as many as tokens.
    x = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    x[0, ::2], x[1, 4, 0], x[1, 5, 0], x[2] = 0, torch.nan, torch.inf, torch.nan
    far = atc.cosine_distance(x)
    for linkage, num_clusters, small in itertools.product(LINKAGES, (1, 4, 8, 9), (1, 256)):
        agglomerative_triton._SMALL = small
        compare(far, num_clusters, linkage)
    print(f"{solved} problems solved alike")


if __name__ == "__main__":
    compare_triton_with_torch()
