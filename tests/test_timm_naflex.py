"""What is special about timm's NaFlexVit: batches of images of different shapes, padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.timm_naflex import SMALL, images, make
from torch import Tensor, nn

import tokred
from tokred import Exactly

METHODS = ["tome", "atc", "topk"]
GRIDS = [(4, 4), (2, 5), (3, 4), (2, 3)]


def padded(grids: list[tuple[int, int]], length: int | None = None) -> dict[str, Tensor]:
    """A batch of images of these grids, as timm's collator gives it."""
    counts = [rows * columns for rows, columns in grids]
    length = max(counts) if length is None else length
    patches = torch.randn(len(grids), length, 16 * 16 * 3)
    coord = torch.zeros(len(grids), length, 2, dtype=torch.long)
    valid = torch.arange(length) < torch.tensor(counts)[:, None]
    for place, (rows, columns), count in zip(coord, grids, counts, strict=True):
        place[:count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    patches[~valid] = 7.0
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def alone(batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One of its images without padding."""
    valid = batch["patch_valid"][number]
    return {name: tensor[number : number + 1, valid] for name, tensor in batch.items()}


def one_by_one(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return torch.cat([model(alone(batch, number)) for number in range(len(batch["patches"]))])


@torch.no_grad()
@pytest.mark.parametrize("full_grid", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("length", [16, 24, 40])
def test_a_padded_batch_gives_for_every_image_what_it_gives_alone(
    name: str, method: str, full_grid: bool, length: int
) -> None:
    model, batch = SMALL[name].build(), padded(GRIDS, length)
    dense = model(batch)
    torch.testing.assert_close(dense, one_by_one(model, batch), rtol=1e-4, atol=1e-4)
    tokred.apply(model, method, 0.5, full_grid=full_grid)
    together = model(batch)
    torch.testing.assert_close(together, one_by_one(model, batch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, dense, atol=1e-3), method


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, "ats", tokred.ToMe(threshold=0.3)])
def test_an_image_is_reduced_where_its_own_number_falls(method: Any) -> None:
    """Of 11 tokens, 9, 8 and 8 are kept; but of 10, 9, 8 and 7."""
    model = make(class_token=True, rope_type="mixed").double()
    batch = padded([(1, 11), (2, 5)])
    batch["patches"] = batch["patches"].double()
    tokred.apply(model, method, tokred.Stages(0.9, layers=(1, 2, 3)))
    torch.testing.assert_close(model(batch), one_by_one(model, batch), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_an_image_of_padding_alone_takes_no_other_with_it(method: str) -> None:
    model, batch = make(class_token=True, rope_type="mixed"), padded(GRIDS)
    batch["patch_valid"][1] = False
    tokred.apply(model, method, 0.5)
    others = torch.tensor([0, 2, 3])
    alone = one_by_one(model, {name: tensor[others] for name, tensor in batch.items()})
    torch.testing.assert_close(model(batch)[others], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_keeping_everything_changes_no_bit_of_a_padded_batch(name: str) -> None:
    model, batch = SMALL[name].build(), padded(GRIDS)
    dense = model(batch)
    for method in METHODS:
        with pytest.warns(UserWarning, match="keeps all"):
            tokred.apply(model, method, 1.0)
        assert torch.equal(model(batch), dense), method


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key_only", [False, True])
def test_padding_is_never_merged_with_tokens(method: str, key_only: bool) -> None:
    model = make(class_token=True, rope_type="axial", use_key_only_attn_mask=key_only)
    batch = padded(GRIDS)
    reduction = tokred.apply(model, method, 0.5)
    with reduction.recording() as records:
        answer = model(batch)
    for labels, valid in zip(records[0].map.labels(), batch["patch_valid"], strict=True):
        count = int(valid.sum())
        asked = min(count, tokred.Stages(0.5)(count, 4)[records[0].layer])
        assert len(set(labels[:count].tolist()) - {-1}) == asked
    # Whatever stands in the padding.
    batch["patches"] = torch.where(batch["patch_valid"][..., None], batch["patches"], -3.0)
    torch.testing.assert_close(model(batch), answer)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_features_of_a_padded_batch_lie_where_the_patches_lay(method: str) -> None:
    model, batch = make(class_token=True, rope_type="mixed"), padded(GRIDS)
    tokred.apply(model, method, 0.5)
    whole = model.forward_features(**batch)
    options = {"output_fmt": "NLC", "output_dict": True, "return_prefix_tokens": True}
    between = model.forward_intermediates(batch, **options)["image_intermediates"]
    assert torch.equal(whole["patch_valid"], batch["patch_valid"])
    for number, valid in enumerate(batch["patch_valid"]):
        one = alone(batch, number)
        expected = model.forward_features(**one)["patches"]
        got = whole["patches"][number : number + 1]
        together = torch.cat([got[:, :1], got[:, 1:][:, valid]], 1)
        torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
        layers = model.forward_intermediates(one, **options)["image_intermediates"]
        for taken, layer in zip(between, layers, strict=True):
            mine = taken[number : number + 1, valid]
            torch.testing.assert_close(mine, layer, rtol=1e-4, atol=1e-4)
    tokred.apply(model, method, 0.5, full_grid=False)
    few = model.forward_features(**batch)
    assert few["patches"].shape[1] == 1 + few["patch_valid"].shape[1] < 17
    counts = [tokred.Stages(0.5)(int(valid.sum()), 4)[-1] for valid in batch["patch_valid"]]
    assert few["patch_valid"].sum(1).tolist() == counts


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "topk"])
@pytest.mark.parametrize("options", [{"class_token": True, "rope_type": "axial"}, {}], ids=str)
def test_a_compiled_model_gives_the_same_for_padded_batches(
    method: str, options: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    model, batch = make(**options, global_pool="avg"), padded(GRIDS)
    tokred.apply(model, method, 0.5)
    expected = model(batch)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(batch), expected)
    torch.testing.assert_close(compiled(images(2)), model(images(2)), rtol=9, atol=9)
    torch.testing.assert_close(compiled(batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["avg", "avgmax", "max", "map", "token", ""])
@pytest.mark.parametrize("method", ["topk", "tome", "ats"])
def test_pooling_sees_no_dropped_token_and_merged_ones_as_often(method: str, pooling: str) -> None:
    model, x = make(class_token=True, global_pool=pooling), images(3)
    tokred.apply(model, method, 0.5)
    answer, features = model(x), model.forward_features(x)
    if pooling == "":
        assert features.shape[1] == 17
        torch.testing.assert_close(answer, model.head(model.fc_norm(features)))
        return
    tokred.apply(model, method, 0.5, full_grid=False)
    torch.testing.assert_close(model(x), answer)
    few = model.forward_features(x)
    tokred.remove(model)
    if method == "tome":
        torch.testing.assert_close(answer, model.forward_head(features))
        return
    counts = (few != 0).any(-1).sum(1).tolist()
    left = [model.forward_head(row[None, :count]) for row, count in zip(few, counts, strict=True)]
    torch.testing.assert_close(answer, torch.cat(left))


def test_a_padded_batch_can_be_trained_on() -> None:
    model, batch = make(class_token=True, rope_type="mixed", global_pool="avg"), padded(GRIDS)
    tokred.apply(model, "tome", Exactly((6, 5, 5, 3)))
    model.train()
    model(batch).square().mean().backward()
    plain = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(batch).square().mean().backward()
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected)
