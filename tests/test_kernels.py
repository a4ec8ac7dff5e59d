"""Every clustering backend against SciPy, and against a slow loop where distances are tied.

SciPy knows single, complete and average linkage; which of equal heights it merges first is its own
affair. So it is the reference where no two heights are closer than float32 can tell, and the loop,
which is written from the rule in `tokred.reducers.atc.cluster`, where they are equal.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
from references import cut, renumber
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from tokred.data import zoo
from tokred.reducers import atc

Cluster = Callable[[Tensor, int, str], Tensor]
every_linkage = pytest.mark.parametrize("linkage", atc.LINKAGES)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=[
        "numba",
        "torch",
        pytest.param(
            "torch on CUDA",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(
                not (torch.cuda.is_available() or INTERPRETED),
                reason="needs a GPU, or TRITON_INTERPRET=1 and ten minutes or more",
            ),
        ),
    ]
)
def cluster(request: pytest.FixtureRequest) -> Cluster:
    backend, *on = request.param.split(" on ")
    if backend != "torch" and not atc._installed(backend):
        pytest.skip(f"needs {backend}")
    kernel = import_module(f"tokred.kernels.agglomerative_{backend}").cluster
    if not on and (backend != "triton" or INTERPRETED):
        return kernel  # type: ignore[no-any-return]

    def there(distance: Tensor, num_clusters: int, linkage: str) -> Tensor:
        labels: Tensor = kernel(distance.to("cuda"), num_clusters, linkage)
        return labels.cpu()

    return there


def gaussian(num: int, random: np.random.Generator) -> np.ndarray:
    return random.normal(size=(num, 16))


def clustered(num: int, random: np.random.Generator) -> np.ndarray:
    centres = random.normal(size=(1 + num // 8, 16))
    return centres[random.integers(len(centres), size=num)] + 0.1 * gaussian(num, random)


def smooth(num: int, random: np.random.Generator) -> np.ndarray:
    """A field over a square grid that changes slowly, as images do."""
    side = int(np.ceil(np.sqrt(num)))
    y, x = np.mgrid[:side, :side].reshape(2, -1, 1)[:, :num] / side
    waves = random.normal(size=(3, 16))
    return np.sin(6 * (y * waves[0] + x * waves[1]) + waves[2]) + 0.05 * gaussian(num, random)


def hubs(num: int, random: np.random.Generator) -> np.ndarray:
    """Few tokens that are nearest to very many."""
    tokens = gaussian(num, random)
    centres = random.normal(size=(3, 16))
    tokens += centres[np.arange(num) % 3] * (1 + random.random((num, 1)))
    tokens[:3] = centres[: min(3, num)]
    return tokens


def cosine(tokens: np.ndarray) -> Tensor:
    """1 - cos, [tokens, tokens], rounded to float32."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    return torch.from_numpy(1 - (unit @ unit.T).astype(np.float32)).clamp(0, 2)


def chain(num: int, random: np.random.Generator) -> Tensor:
    """Tokens on a line, each further from the last than that from the one before: every token is
    nearest to the one before it, so that most merges wait for another."""
    gaps = np.linspace(1, 8, num) + 3 * random.random(num) / num
    places = (2 * np.cumsum(gaps) / gaps.sum())[random.permutation(num)]
    places = np.round(places * 2**23) / 2**23
    return torch.from_numpy(np.abs(places[:, None] - places).astype(np.float32))


FIELDS = [gaussian, clustered, smooth, hubs, chain]


def problem(kind: int, num: int, random: np.random.Generator) -> Tensor:
    """Distances [tokens, tokens], float32, multiples of 2**-24."""
    field = FIELDS[kind % len(FIELDS)](num, random)
    return field if isinstance(field, Tensor) else cosine(field)


def compare_with_scipy(cluster: Cluster, distance: Tensor, keep: int, linkage: str) -> bool:
    """Whether the partition is SciPy's. It must be, unless equal distances allow of several: then
    SciPy itself finds others when distances change by less than any two of them differ."""

    def cut_by_scipy(upper: np.ndarray) -> list[int]:
        return cut(hierarchy.linkage(squareform(upper + upper.T), linkage), keep)

    upper = np.triu(distance.double().numpy(), 1)
    expected, found = cut_by_scipy(upper), cluster(distance[None], keep, linkage)[0].tolist()
    if found != expected:
        noise = np.random.default_rng(0).random((16, *upper.shape)) * 1e-12
        others = [cut_by_scipy(upper + np.triu(one, 1)) for one in noise]
        assert any(other != expected for other in others), f"{len(distance)} tokens, keep {keep}"
    return bool(found == expected)


@every_linkage
def test_equals_scipy_on_many_problems(cluster: Cluster, linkage: str) -> None:
    random = np.random.default_rng(0)
    same = 0
    for trial in range(400):
        num = int(random.integers(2, 40)) if trial % 4 else int(random.integers(40, 120))
        keep = int(random.integers(1, num + 1))
        distance = problem(trial, num, random)
        same += compare_with_scipy(cluster, distance, keep, linkage)
    assert same >= 396  # the others are excused, by ties


@every_linkage
@pytest.mark.parametrize("num", [196, 577, 1024])
def test_equals_scipy_on_large_problems(cluster: Cluster, linkage: str, num: int) -> None:
    random = np.random.default_rng(num)
    for kind, field in enumerate(FIELDS):
        distance = problem(kind, num, random)
        same = [
            compare_with_scipy(cluster, distance, keep, linkage)
            for keep in (1, num // 4, num // 2, num * 9 // 10, num)
        ]
        assert sum(same) >= 4, field.__name__


@every_linkage
def test_equals_scipy_on_keys_of_a_trained_model(cluster: Cluster, linkage: str) -> None:
    model, images = zoo.load(), zoo.normalise(zoo.held_out().images[:12])
    keys: list[Tensor] = []
    for block in model.blocks:
        block.attn.k_norm.register_forward_hook(lambda module, inputs, key: keys.append(key))
    with torch.no_grad():
        model(images)
    same = []
    for key in keys:
        for sample in key.mean(1)[:, 1:]:
            distance = cosine(sample.double().numpy())
            keep = len(distance) // 2
            same.append(compare_with_scipy(cluster, distance, keep, linkage))
    assert len(same) == 12 * len(model.blocks) and np.mean(same) > 0.95


def slow(distance: np.ndarray, keep: int, linkage: str) -> list[int]:
    """The rule for ties, word for word: the least (height, first token, first token) is next."""
    num = len(distance)
    if linkage == "single":
        label = list(range(num))
        pairs = [(distance[i, j], i, j) for i in range(num) for j in range(i + 1, num)]
        for _, i, j in sorted(pairs):
            if len(set(label)) > keep:
                label = [label[i] if other == label[j] else other for other in label]
        return renumber(label)
    members = {token: [token] for token in range(num)}
    while len(members) > keep:
        candidates = []
        for i in members:
            for j in members:
                if i < j:
                    a, b = sorted(members[i]), sorted(members[j])
                    pairs = [distance[min(p, q), max(p, q)] for p in a for q in b]
                    height = max(pairs) if linkage == "complete" else sum(pairs) / len(pairs)
                    candidates.append((height, i, j))
        _, i, j = min(candidates)
        members[i] += members.pop(j)
    label = [0] * num
    for i, tokens in members.items():
        for token in tokens:
            label[token] = i
    return renumber(label)


def grid(num: int, random: np.random.Generator) -> np.ndarray:
    return random.integers(0, 4, size=(num, num)) / 2


def one_distance(num: int, random: np.random.Generator) -> np.ndarray:
    return np.full((num, num), random.integers(0, 3) / 2)


def duplicates(num: int, random: np.random.Generator) -> np.ndarray:
    tokens = gaussian(num, random)[random.integers(0, 1 + num // 3, size=num)]
    return cosine(tokens).double().numpy()


def integers(num: int, random: np.random.Generator) -> np.ndarray:
    tokens = random.integers(-1, 2, size=(num, 3)) + 1e-9  # near to, but not, zero
    return cosine(tokens).double().numpy()


@every_linkage
@pytest.mark.parametrize(
    "tied", [grid, one_distance, duplicates, integers], ids=lambda f: f.__name__
)
def test_ties_go_to_the_least_tokens(
    cluster: Cluster, linkage: str, tied: Callable[[int, np.random.Generator], np.ndarray]
) -> None:
    random = np.random.default_rng(1)
    for _ in range(40):
        num = int(random.integers(1, 16))
        distance = tied(num, random)
        keep = int(random.integers(1, num + 1))
        labels = cluster(torch.tensor(distance[None], dtype=torch.float32), keep, linkage)
        assert labels.tolist() == [slow(distance, keep, linkage)]


@every_linkage
def test_reads_only_what_is_above_the_diagonal(cluster: Cluster, linkage: str) -> None:
    distance = torch.rand(3, 50, 50)
    garbage = distance.triu(1) + torch.full((50, 50), -7.0).tril()
    before = garbage.clone()
    assert torch.equal(cluster(garbage, 20, linkage), cluster(distance, 20, linkage))
    assert torch.equal(garbage, before)


@every_linkage
def test_negative_zero_is_zero(cluster: Cluster, linkage: str) -> None:
    distance = torch.zeros(1, 6, 6)
    distance[0, 3, 4] = -0.0
    assert cluster(distance, 4, linkage).tolist() == [[0, 0, 0, 1, 2, 3]]


@every_linkage
def test_one_token_no_samples_and_any_layout(cluster: Cluster, linkage: str) -> None:
    assert cluster(torch.rand(2, 1, 1), 1, linkage).tolist() == [[0], [0]]
    assert cluster(torch.rand(0, 5, 5), 2, linkage).shape == (0, 5)
    distance = torch.rand(9, 30, 30)
    turned = distance.mT.contiguous().mT
    assert torch.equal(cluster(turned, 9, linkage), cluster(distance, 9, linkage))
    assert torch.equal(cluster(distance[::2], 9, linkage), cluster(distance, 9, linkage)[::2])


@every_linkage
def test_samples_and_threads_do_not_mix(cluster: Cluster, linkage: str) -> None:
    distance = torch.rand(16, 100, 100)
    alone = torch.cat([cluster(sample[None], 40, linkage) for sample in distance])
    found: list[Tensor] = []
    callers = [
        threading.Thread(target=lambda: found.append(cluster(distance, 40, linkage)))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4 and all(torch.equal(labels, alone) for labels in found)


def test_numba_takes_no_more_threads_than_torch_and_gives_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numba = pytest.importorskip("numba")
    from tokred.kernels import agglomerative_numba

    parallel = agglomerative_numba._cluster_shares
    seen = []

    def count(shares, *rest):  # type: ignore[no-untyped-def]
        seen.append((numba.get_num_threads(), shares))
        parallel(shares, *rest)

    monkeypatch.setattr(agglomerative_numba, "_cluster_shares", count)
    distance, before = torch.rand(8, 200, 200), torch.get_num_threads()
    threads = numba.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = agglomerative_numba.cluster(distance, 50, "average")
        assert not seen
        torch.set_num_threads(2)
        two = agglomerative_numba.cluster(distance, 50, "average")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
    assert seen == ([(2, 2)] if threads > 1 else [])
    assert numba.get_num_threads() == threads


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_keeps_its_threads(threads: int) -> None:
    """numba starts its own the first time they are asked for, which must not change how many
    PyTorch uses: other work would be ten times slower on a busy machine."""
    pytest.importorskip("numba")
    program = (
        f"import torch; torch.set_num_threads({threads})\n"
        "from tokred.kernels import agglomerative_numba as kernel\n"
        "kernel.cluster(torch.rand(8, 200, 200), 50, 'average')\n"
        "print(torch.get_num_threads())"
    )
    environment = {**os.environ, "NUMBA_NUM_THREADS": "3"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert run.stdout.strip() == str(threads), run.stderr


def test_scratch_is_kept_up_to_a_limit_and_by_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokred.kernels import scratch

    monkeypatch.setattr(scratch, "_MOST", 4000)
    scratch.release()
    first = scratch.scratch("a", (10, 10), np.float64)
    first[:] = 7
    smaller = scratch.scratch("a", (5, 20), np.float32)
    assert smaller.shape == (5, 20) and smaller.dtype == np.float32
    assert np.shares_memory(first, smaller) and smaller.ctypes.data % 64 == 0
    assert not np.shares_memory(first, scratch.scratch("b", (10, 10), np.float64))
    # What is larger than the limit is fresh, and what was kept stays.
    large = scratch.scratch("a", (1001,), np.float32)
    assert not np.shares_memory(large, scratch.scratch("a", (1001,), np.float32))
    assert np.shares_memory(first, scratch.scratch("a", (10, 10), np.float64))
    elsewhere: list[np.ndarray] = []
    caller = threading.Thread(
        target=lambda: elsewhere.append(scratch.scratch("a", (10, 10), np.float64))
    )
    caller.start()
    caller.join()
    assert not np.shares_memory(first, elsewhere[0])
    scratch.release()
    assert not np.shares_memory(first, scratch.scratch("a", (10, 10), np.float64))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_numba_works_after_a_fork() -> None:
    pytest.importorskip("numba")
    program = (
        "import os, sys, torch\n"
        "from tokred.kernels.agglomerative_numba import cluster\n"
        "distance = torch.rand(8, 200, 200)\n"
        "labels = cluster(distance, 50, 'average')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    same = (cluster(distance, 50, 'average') == labels).numpy().all()\n"
        "    os._exit(0 if same else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cosine_distance_is_that_of_float64(dtype: torch.dtype) -> None:
    x = torch.randn(2, 60, 48).to(dtype)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    distance = atc.cosine_distance(x)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), 1 - unit @ unit.mT, atol=5e-7, rtol=0)
    assert torch.equal(distance * 2**24, (distance * 2**24).round())


def test_a_token_does_not_depend_on_the_others_of_its_batch() -> None:
    x = torch.randn(4, 300, 24, generator=torch.Generator().manual_seed(0))
    distance = atc.cosine_distance(x)
    # Lengths that float32 cannot square are scaled first, in the whole batch.
    for extreme in (0.0, 1e-30, 1e30):
        y = torch.cat([x, x[:1]])
        y[4, 7] *= extreme
        assert torch.equal(atc.cosine_distance(y)[:4], distance)
        assert torch.equal(atc.cluster(y, 100)[:4], atc.cluster(x, 100))


def test_what_is_not_finite_is_as_far_as_can_be() -> None:
    x = torch.randn(2, 9, 8)
    expected = atc.cosine_distance(x)
    others = torch.arange(9) != 3
    for bad in (float("nan"), float("inf")):
        x[1, 3, 2] = bad
        distance = atc.cosine_distance(x)
        assert (distance[1, 3, others] == 2).all() and (distance[1, others, 3] == 2).all()
        kept = distance[:, others][:, :, others]
        assert torch.equal(kept, expected[:, others][:, :, others])


def test_cosine_distance_of_zeros_duplicates_and_extremes() -> None:
    x = torch.randn(1, 50, 64)
    x[0, 7] = 0
    x[0, 20:40] = x[0, 3]
    distance = atc.cosine_distance(x)
    others = torch.arange(50) != 7
    assert (distance[0, 7, others] == 1).all() and (distance[0, others, 7] == 1).all()
    assert (distance >= 0).all() and (distance <= 2).all()
    assert (distance[0, 20:40] == distance[0, 20]).all()
    scale = torch.tensor([1e-37, 1e37]).repeat(25)[:, None]
    torch.testing.assert_close(atc.cosine_distance(x * scale), distance, atol=5e-7, rtol=0)


def test_distances_are_the_same_under_autocast() -> None:
    x = torch.randn(1, 30, 16)
    distance, labels = atc.cosine_distance(x), atc.cluster(x, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(atc.cosine_distance(x), distance)
        assert torch.equal(atc.cluster(x, 9), labels)


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[str] = set()
    monkeypatch.setattr(atc, "_installed", lambda name: name in found)
    assert atc.choose("cpu") == "scipy"
    assert atc.choose("cuda") == atc.choose("mps") == "torch"
    found |= {"numba", "triton"}
    assert atc.choose("cpu") == "numba"
    assert atc.choose("cuda:1") == "triton"
    assert atc.choose("mps") == "torch"
    assert atc.choose("cuda", "scipy") == "scipy"


def test_a_missing_backend_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'needs numba: run `pip install "tokred\[cpu\]"`'
    ):
        atc.cluster(torch.randn(1, 5, 3), 2, backend="numba")
    monkeypatch.setattr(atc, "_installed", lambda name: False)
    with pytest.raises(ModuleNotFoundError, match=r"needs triton >= 3[.]3, which comes with torch"):
        atc.cluster(torch.randn(1, 5, 3), 2, backend="triton")


def test_triton_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(atc, "_installed", lambda name: True)
    with pytest.raises(ValueError, match="needs features on a CUDA device, not on cpu"):
        atc.cluster(torch.randn(1, 5, 3), 2, backend="triton")


@pytest.mark.parametrize("backend", ["scipy", "torch", "numba"])
def test_one_operator_in_compiled_and_exported_programs(backend: str) -> None:
    if backend not in ("scipy", "torch"):
        pytest.importorskip(backend)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return atc.cluster(x * 2, 5, "average", backend)

    x = torch.randn(2, 12, 8)
    expected = Model()(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(Model(), fullgraph=True, backend="aot_eager")(x), expected)
    program = torch.export.export(Model(), (x,))
    assert torch.equal(program.module()(x), expected)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "tokred.cluster.default" in called
    torch.library.opcheck(atc._cluster, (x, 5, "average", backend), test_utils="test_schema")
