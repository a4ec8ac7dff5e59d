"""The kernels that do matching and merging on the CPU in one pass, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tokred
from tokred.graphs import is_native
from tokred.reducers import Tokens
from tokred.reducers.tome import ToMe

pytest.importorskip("numba")

from tokred.kernels import matching_numba, merging_numba

DTYPES = (torch.float32, torch.bfloat16)


def labels_of(batch: int, fine: int, coarse: int, generator: torch.Generator) -> Tensor:
    """Random groups, none of them empty."""
    rows = []
    for _ in range(batch):
        label = torch.randint(coarse, (fine,), generator=generator)
        label[torch.randperm(fine, generator=generator)[:coarse]] = torch.arange(coarse)
        rows.append(label)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    batch=st.integers(1, 4),
    fine=st.integers(1, 40),
    dim=st.integers(1, 40),
    prefix=st.integers(0, 3),
    suffix=st.integers(0, 2),
    kind=st.sampled_from(("ones", "sizes", "shares")),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_merging_is_the_weighted_mean(
    dtype: torch.dtype,
    batch: int,
    fine: int,
    dim: int,
    prefix: int,
    suffix: int,
    kind: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    coarse = int(torch.randint(1, fine + 1, (), generator=generator))
    x = torch.randn(batch, prefix + fine + suffix, dim, generator=generator).to(dtype)
    label = labels_of(batch, fine, coarse, generator)
    size = torch.randint(1, 5, (batch, fine), generator=generator).float()
    share = torch.rand(batch, fine, generator=generator) if kind == "shares" else None
    out, total, log = merging_numba.merge(
        x, label, coarse, None if kind == "ones" else size, share, prefix
    )
    counts = np.ones((batch, fine)) if kind == "ones" else size.double().numpy()
    for b in range(batch):
        for k in range(coarse):
            members = [n for n in range(fine) if label[b, n] == k]
            whole = sum(counts[b, n] for n in members)
            parts = [counts[b, n] / whole if share is None else float(share[b, n]) for n in members]
            mean = sum(
                part * x[b, prefix + n].double().numpy()
                for part, n in zip(parts, members, strict=True)
            )
            off = np.abs(out[b, prefix + k].double().numpy() - mean)
            assert off.max() <= (2**-7 if dtype == torch.bfloat16 else 2**-20) * 4
            assert float(total[b, k]) == whole
            assert float(log[b, 0, 0, prefix + k]) == pytest.approx(np.log(whole), abs=1e-6)
            if len(members) == 1 and share is None:
                assert torch.equal(out[b, prefix + k], x[b, prefix + members[0]])
    end = prefix + fine
    log = log[:, 0, 0]
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    assert torch.equal(out[:, prefix + coarse :], x[:, end:])
    assert not log[:, :prefix].any() and not log[:, prefix + coarse :].any()
    picked = merging_numba.pick(out, label, coarse, prefix)
    assert torch.equal(
        picked[:, prefix:end], torch.stack([o[prefix:][n] for o, n in zip(out, label, strict=True)])
    )
    assert torch.equal(picked[:, :prefix], x[:, :prefix])
    assert torch.equal(picked[:, end:], x[:, end:])


def matched(key: Tensor, keep: int, before: int, size: Tensor) -> Tensor:
    """Bipartite soft matching as the paper has it, in float64, token by token."""
    groups = [[n] for n in range(key.shape[1])]
    metric = key.double().sum(0).numpy()
    counts = size.double().numpy()
    while len(groups) > keep:
        unit = metric / np.maximum(np.linalg.norm(metric, axis=1, keepdims=True), 1e-12)
        num = len(groups)
        a = [n for n in range(num) if n % 2 == before % 2]
        b = [n for n in range(num) if n % 2 != before % 2]
        edges = []
        for i in a:
            cosines = np.array([np.dot(unit[i], unit[j]) for j in b])
            edges.append((-cosines.max(), i, b[int(cosines.argmax())]))
        into = {i: j for _, i, j in sorted(edges)[: min(num - keep, num // 2)]}
        joined = [[n] for n in range(num)]
        for i, j in into.items():
            joined[j].append(i)
        new = sorted(sorted(group) for n, group in enumerate(joined) if n not in into)
        metric = np.stack(
            [np.average(metric[group], axis=0, weights=counts[group]) for group in new]
        )
        counts = np.array([counts[group].sum() for group in new])
        groups = [[n for old in group for n in groups[old]] for group in new]
    label = torch.empty(key.shape[1], dtype=torch.long)
    for k, group in enumerate(groups):
        label[group] = k
    return label


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    num=st.integers(2, 40),
    dim=st.integers(2, 40),
    before=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_matching_is_that_of_the_paper(
    dtype: torch.dtype, batch: int, heads: int, num: int, dim: int, before: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # As attention has them: a strided view of queries, keys and values.
    qkv = torch.randn(batch, num + before, 3, heads, dim, generator=generator).to(dtype)
    key = qkv.permute(2, 0, 3, 1, 4)[1][:, :, before:]
    size = torch.randint(1, 4, (batch, num), generator=generator).float()
    for keep in {max(1, num // 5), (num + 1) // 2, num - 1, num}:
        label = matching_numba.match(key, keep, before, size)
        for b in range(batch):
            assert torch.equal(label[b], matched(key[b], keep, before, size[b]))
            alone = matching_numba.match(key[b : b + 1], keep, before, size[b : b + 1])
            assert torch.equal(label[b], alone[0])


def test_of_equal_cosines_the_lower_index_wins() -> None:
    # Unit vectors, so that cosines are exactly 0, 1 or -1.
    axis = torch.randint(3, (5, 30), generator=torch.Generator().manual_seed(0))
    sign = torch.randint(2, (5, 30, 1), generator=torch.Generator().manual_seed(1)) * 2 - 1
    key = (torch.eye(3)[axis] * sign)[:, None]
    for keep in (25, 15, 7, 1):
        label = matching_numba.match(key, keep, 1)
        for b in range(5):
            if keep >= 15:  # means of merged tokens are no unit vectors
                assert torch.equal(label[b], matched(key[b], keep, 1, torch.ones(30)))
            assert label[b].unique().tolist() == list(range(keep))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_stay_in_their_image(broken: float, dtype: torch.dtype) -> None:
    key = torch.randn(4, 2, 30, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = matching_numba.match(key, 11, 1)
    key[2, :, ::3] = broken
    label = matching_numba.match(key, 11, 1)
    for b in (0, 1, 3):
        assert torch.equal(label[b], want[b])
    assert int(label[2].min()) >= 0 and label[2].unique().tolist() == list(range(11))


def test_any_number_of_threads_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(9, 3, 196, 64, generator=generator)
    x = torch.randn(9, 197, 384, generator=generator)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            label = matching_numba.match(key, 60, 1)
            found.append((label, *merging_numba.merge(x, label, 60, prefix=1)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


def test_who_follows_operators_sees_them() -> None:
    """Kernels are not used where gradients, graphs, transforms or modes need every operator."""
    x = torch.randn(2, 5, 4)
    assert is_native(x) and is_native(x.bfloat16())
    assert not is_native(x.double()) and not is_native(x.half())
    assert not is_native(x.transpose(1, 2))
    assert not is_native(x.clone().requires_grad_())
    with FlopCounterMode(display=False):
        assert not is_native(x)
    seen: list[bool] = []
    torch.func.vmap(lambda y: seen.append(is_native(y)) or y)(x)
    torch.func.jvp(lambda y: seen.append(is_native(y)) or y, (x,), (x,))
    torch.jit.trace(lambda y: seen.append(is_native(y)) or y, x, check_trace=False)
    torch.compile(lambda y: y + is_native(y), backend="eager", fullgraph=True)(x)
    assert seen == [False] * 3
    with torch.autograd.forward_ad.dual_level():
        assert not is_native(x)


@pytest.mark.parametrize("keep", [40, 25, 12])
def test_the_kernel_and_the_operators_agree(keep: int) -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(3, 2, 49, 16, generator=generator)
    tokens = Tokens(
        x=torch.randn(3, 49, 8, generator=generator),
        size=torch.randint(1, 4, (3, 49), generator=generator).float(),
        key=key,
        before=1,
    )
    label = ToMe()(tokens, keep).index
    with FlopCounterMode(display=False) as counter:
        want = ToMe()(tokens, keep).index
    assert counter.get_total_flops() > 0 and torch.equal(label, want)


def test_a_model_gives_the_same_with_and_without_the_kernels() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=7).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad(), tokred.applied(model, "tome", 0.5):
        answer = model(images)
    with tokred.applied(model, "tome", 0.5):
        assert torch.allclose(model(images), answer, atol=1e-5)  # with gradients: no kernel
