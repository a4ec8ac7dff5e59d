"""Values that are not finite stay with the image that has them, and are not lost on the way; a
training in half precision skips such a step. (tests/test_alone.py has images of NaN.)"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.timm_naflex import make
from recorded import keeping
from test_alone import BROKEN, HOSTS, made, off
from test_timm_naflex import padded
from torch import Tensor, nn

import tokred
from tokred.data.inputs import call
from tokred.kernels import varlen
from tokred.models.tcformer import clusterings
from tokred.reducers import atc, ats, divprune

BAD = (math.nan, math.inf, -math.inf)


@torch.no_grad()
@pytest.mark.parametrize("method", tokred.methods())
def test_what_overflows_in_a_block_is_seen_in_the_answer_of_its_image_alone(method: str) -> None:
    host = HOSTS["timm_vit"]
    model, _ = made(host)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    keeping(method, 0.5)(model).padded = True  # so that the third image is there to be found
    expected = host.answer(call(model, images))

    varies = tokred.reducers.traits(tokred.reducers.make(method)).varies
    at = [(layer, last) for layer in (0, 1, 2) for last in (False, True)]
    for (layer, last), bad in zip(at, 2 * BAD, strict=True):
        place = 1 if varies or not last else -1  # the last one of those may be padding
        if varies and layer == 2:
            place = 0  # and so may all patch tokens be, where a gate has left out every one

        def overflow(
            module: nn.Module, inputs: Any, out: Tensor, place: int = place, bad: float = bad
        ) -> None:
            out[BROKEN, place, 3] = bad

        with model.blocks[layer].mlp.register_forward_hook(overflow):
            answer = host.answer(call(model, images))
        assert not answer[BROKEN].isfinite().any(), (layer, place, bad)
        assert not off(answer, expected), (layer, place, bad)


@pytest.mark.parametrize("method", [None, *tokred.methods()])
def test_a_training_in_half_precision_goes_on_after_an_overflow(method: str | None) -> None:
    model, _ = made(HOSTS["timm_vit"])
    model.float().train()
    if method:
        keeping(method, 0.5)(model)
    weight = model.blocks[0].mlp.fc2.weight
    scaler, sgd = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), 1e-3)

    def step(large: float) -> bool:
        """Whether a step was made, with one layer so much larger."""
        before, scale = copy.deepcopy(model.state_dict()), scaler.get_scale()
        sgd.zero_grad()
        with torch.no_grad():
            weight.mul_(large)
        with torch.autocast("cpu", torch.float16):
            loss = model(torch.randn(2, 3, 64, 64)).float().square().mean()
        scaler.scale(loss).backward()
        with torch.no_grad():
            weight.div_(large)
        scaler.step(sgd)
        scaler.update()
        same = all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert same == (scaler.get_scale() < scale)
        return not same

    assert not step(2.0**20)
    assert step(1.0)
    assert all(p.isfinite().all() for p in model.parameters())


# The parts


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("linkage", atc.LINKAGES)
def test_every_backend_puts_what_is_not_finite_farthest_away(linkage: str, bad: float) -> None:
    x = torch.randn(3, 40, 8)
    x[1] = bad
    x[2, [3, 17]] = bad
    distance = atc.cosine_distance(x)
    others = torch.arange(40) != 17
    assert (distance[2, 17, others] == 2).all() and (distance[2, others, 17] == 2).all()
    backends = [name for name in ("numba", "scipy", "torch") if atc._installed(name)]
    found = {name: atc.cluster(x, 12, linkage, name) for name in backends}
    for name, labels in found.items():
        assert labels.amax(1).tolist() == [11] * 3 and labels.min() == 0, name
        assert torch.equal(labels[:1], atc.cluster(x[:1], 12, linkage, name)), name
        alone = [sum(labels[2] == labels[2, token]) for token in (3, 17)]
        assert alone == [1, 1], name
        if name != "scipy":  # which has its own way with ties
            assert torch.equal(labels, found["torch"]), name


@pytest.mark.parametrize("bad", BAD)
def test_ats_draws_some_token_of_a_sample_that_is_not_finite(bad: float) -> None:
    significance = torch.rand(4, 10)
    significance[1] = bad
    significance[2, 4] = bad
    drawn = ats.sample(significance, 5)
    assert (drawn.sum(1) >= 1).all() and (drawn.sum(1) <= 5).all()
    assert torch.equal(drawn[::3], ats.sample(significance[::3], 5))


@pytest.mark.parametrize("bad", BAD)
def test_divprune_takes_what_is_not_finite(bad: float) -> None:
    x = torch.randn(2, 30, 5)
    x[0, [7, 20], 2] = bad
    chosen = divprune.select(x, 4).tolist()
    assert {7, 20} <= set(chosen[0])
    assert chosen[1:] == divprune.select(x[1:], 4).tolist()


@pytest.mark.parametrize("clustering", [clusterings.DPCKNN(), clusterings.KMeans(),
                                        clusterings.Bipartite()], ids=str)  # fmt: skip
@pytest.mark.parametrize("bad", BAD)
def test_clusterings_of_tcformer_fill_all_clusters(
    clustering: clusterings.Clustering, bad: float
) -> None:
    x = torch.randn(3, 20, 6)
    x[1] = bad
    x[2, 5, 1] = bad
    labels = clustering(x, 6)
    assert all(sorted(set(row)) == list(range(6)) for row in labels.tolist())
    assert torch.equal(labels[:1], clustering(x[:1], 6))


def padded_attention(*given: Any) -> Tensor:
    return varlen._padded(*given, dropout_p=0.0, scale=None)


@pytest.mark.parametrize("attend", [varlen.attend, padded_attention])
def test_attention_of_images_end_to_end_keeps_nan_to_its_image(
    attend: Callable[..., Tensor],
) -> None:
    lengths = [5, 2, 7]
    query, key, value = torch.randn(3, 1, 2, 14, 4)
    expected = attend(query, key, value, lengths)
    for x in (query, key, value):
        x[:, :, :5] = math.nan
    answer = attend(query, key, value, lengths)
    assert answer[:, :, :5].isnan().all()
    torch.testing.assert_close(answer[:, :, 5:], expected[:, :, 5:])


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "atc", "topk", "ats"])
def test_a_padded_batch_keeps_nan_to_its_image(method: str) -> None:
    model, batch = make(class_token=True, rope_type="mixed"), padded([(4, 4), (2, 5), (3, 4)])
    tokred.apply(model, method, 0.5)
    expected = model(batch)
    batch["patches"][1] = math.nan
    answer = model(batch)
    assert not answer[1].isfinite().any()
    torch.testing.assert_close(answer[::2], expected[::2])
