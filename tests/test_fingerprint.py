"""Fingerprints tell models apart, are the same in every process, and those of 0.7 are known."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tokred.data.fingerprint import dense_fingerprint, fingerprint, is_of
from tokred.data.writing import whole, write_text


def counted(model: nn.Module) -> nn.Module:
    """A model with weights that anybody can write down."""
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(torch.arange(weight.numel()).reshape(weight.shape) * 0.25 + number)
    return model


def last_weight(model: nn.Sequential) -> None:
    model[0].weight.data[-1, -1] += 1e-7  # type: ignore[index, operator, union-attr]


def buffer(model: nn.Sequential) -> None:
    model[1].running_var += 1  # type: ignore[operator]


def option(model: nn.Sequential) -> None:
    model[1].eps = 1e-3


def dtype(model: nn.Sequential) -> None:
    model.bfloat16()


@pytest.mark.parametrize("change", [last_weight, buffer, option, dtype])
def test_a_fingerprint_sees_every_change(change: Callable[[nn.Module], None]) -> None:
    model = nn.Sequential(nn.Linear(100, 3), nn.BatchNorm1d(3))
    before = fingerprint(model)
    trained = dense_fingerprint(model)
    assert before == fingerprint(model) and is_of(trained, model)
    change(model)
    assert before != fingerprint(model) and not is_of(trained, model)


class Addressed(nn.Module):
    """Prints an address, which is another one in every process."""

    def extra_repr(self) -> str:
        return f"activation={object()}"


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    program = (
        "from test_fingerprint import Addressed, counted, nn, fingerprint\n"
        "print(fingerprint(counted(nn.Sequential(nn.Linear(3, 2), Addressed()))))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == fingerprint(counted(nn.Sequential(nn.Linear(3, 2), Addressed())))


def test_what_has_no_values_to_read_has_a_fingerprint() -> None:
    on_meta = nn.Linear(3, 2, device="meta")
    assert fingerprint(on_meta) == fingerprint(nn.Linear(3, 2, device="meta"))
    assert fingerprint(on_meta) != fingerprint(nn.Linear(3, 3, device="meta"))


def test_fingerprints_of_version_0_7_are_known() -> None:
    # As version 0.7.1 has written them to recipe.json.
    small = counted(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    wide = counted(nn.Linear(100, 2))
    assert is_of("82852b57ebd4f154", small) and is_of("3ef183cedcec7749", wide)
    assert not is_of("82852b57ebd4f154", wide) and not is_of(None, small)


def test_a_file_that_is_there_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    write_text(file, "old")
    with pytest.raises(KeyboardInterrupt), whole(file) as part:
        part.write_text("hal")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    write_text(file, "new")
    assert file.read_text() == "new" and [*tmp_path.iterdir()] == [file]
