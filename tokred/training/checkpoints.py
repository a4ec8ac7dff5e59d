"""The files of a training: checkpoints, what they depend on, and what is left at the end."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokred.data.code import OURS
from tokred.data.digest import NoFingerprintError, digest_of
from tokred.data.fingerprint import dense_fingerprint, is_of
from tokred.data.writing import PART, clear_parts, read_mapping, whole, write_text
from tokred.measure.conditions import versions_of
from tokred.optional import require
from tokred.training.curve import plot
from tokred.training.recipe import Recipe
from tokred.training.steps import Run
from tokred.training.trained import Trained
from tokred.version import __version__

KEPT_CHECKPOINTS = 2
"""How many checkpoints a folder holds at a time."""


_NOTICED = ("data", "versions")
"""Pins whose change is told, and does not end a training: data may be moved, libraries updated."""
_OF_CODE = ("structure", "code", "task", "collate", "data")
"""Pins that may differ between versions of Python and of libraries, though nothing has changed."""


def pins(
    model: nn.Module,
    reduction: Any,
    recipe: Recipe,
    data: Any,
    task: Any = None,
    collate: Any = None,
) -> dict[str, Any]:
    """What a training must have in common with its beginning when it goes on, in types of JSON.
    None stands for what cannot be told.

    Args:
        model: the model before it is trained.
        reduction: what is applied to it.
        recipe: how it is trained.
        data, task, collate: see `tokred.training.fit`.
    """
    still = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    found: dict[str, Any] = {
        "recipe": asdict(recipe),
        "model": type(model).__qualname__,
        "method": "none" if reduction is None else str(reduction),
        "samples": len(data),
        "structure": _told(model, still, weights=False, mode=False),
        "code": _told(_method_of(reduction), weights=False),
        "task": _told(task),
        "collate": _told(collate),
        "data": _told(data, contents=False),
        "versions": {
            OURS: __version__,
            "python": ".".join(map(str, sys.version_info[:2])),
            **versions_of(model),
        },
    }
    if recipe.frozen or recipe.teaches:  # no checkpoint holds the weights of the dense model
        try:
            found["weights"] = dense_fingerprint(model)
        except NoFingerprintError as error:
            found["weights"] = None
            warnings.warn(
                "if this training goes on later, nobody will notice whether the weights of the "
                f"model are those of now: {error}",
                stacklevel=3,
            )
    as_read: dict[str, Any] = json.loads(json.dumps(found))
    return as_read


def _told(*things: Any, **how: bool) -> str | None:
    try:
        return digest_of(*things, **how)
    except NoFingerprintError:
        return None


def _method_of(reduction: Any) -> Any:
    """The method of a reduction, without its gates, which a checkpoint holds."""
    method = getattr(reduction, "reducer", None)
    if not is_dataclass(method) or isinstance(method, type):
        return method
    values = {x.name: getattr(method, x.name) for x in fields(method) if x.name != "gates"}
    return type(method), values, getattr(reduction, "schedule", None)


def compare(out: Path, pinned: Mapping[str, Any], model: nn.Module) -> None:
    """Refuses to go on with the checkpoint of another training. Warns if data or versions are not
    those of its beginning.

    Args:
        out: the folder of the checkpoint.
        pinned: what this training is, from `pins`.
        model: its model.

    Raises:
        ValueError: something differs; the message says what. Or `recipe.json` is broken.
    """
    before = _before(out)
    if "weights" in pinned and is_of(before.get("weights"), model):
        before["weights"] = pinned["weights"]  # which may have been written in a former format
    former = before.get("versions")
    updated = former != pinned["versions"]
    differences, noticed = [], []
    for name, now in pinned.items():
        was = before.get(name)
        if name in (*_OF_CODE, "versions") and (was is None or now is None):
            continue  # a former version has not written it, or it cannot be told
        if name == "recipe" and isinstance(was, dict):
            names = [*now, *(field for field in was if field not in now)]
            differences += [
                f"{field} was {was.get(field)!r}, and is {now.get(field)!r}"
                for field in names
                if was.get(field) != now.get(field)
            ]
        elif was != now:
            told = f"{name} was {was!r}, and is {now!r}"
            if name == "versions":
                noticed.append(told)
            elif name in _NOTICED or (name in _OF_CODE and updated):
                noticed.append(f"{name}: {_WHAT[name]}")
            else:
                differences.append(f"{told} ({_WHAT[name]})" if name in _WHAT else told)
    if differences:
        raise ValueError(
            f"{out} holds a checkpoint of another training: {'; '.join(differences)}. Give another "
            "folder, the values from before, or fresh (--fresh), which starts anew"
        )
    untold = [name for name in _OF_CODE if pinned[name] is None]
    if untold:
        noticed.append(f"whether {', '.join(untold)} are what they were cannot be told")
    if noticed:
        warnings.warn(
            f"the training in {out} goes on, though not all is as it was: {'; '.join(noticed)}",
            stacklevel=3,
        )


_WHAT = {
    "structure": "the model's code, attributes, shapes or dtypes, or which parameters are trained",
    "code": "the method, its options or its code",
    "task": "the code of the loss, or what it refers to",
    "collate": "the code of collate, or what it refers to",
    "data": "the samples, their files, or the code that makes them",
}
"""What may have changed if a pin differs."""


def _before(out: Path) -> dict[str, Any]:
    file = out / "recipe.json"
    if not file.exists():
        return {}
    return read_mapping(
        file,
        f"what the checkpoints in {out} depend on. Put a copy of it back, or give another folder, "
        "or fresh (--fresh), which starts anew",
    )


def latest(out: Path) -> Path | None:
    """The last checkpoint in a folder; None if there is none."""
    return max((out / "checkpoint").glob("step-*.pt"), default=None)


def last_state(out: Path) -> dict[str, Any] | None:
    """What the last checkpoint in a folder holds; None if there is none. If it is broken, it is
    passed over: the steps since the one before are made again.

    Raises:
        ValueError: all checkpoints are broken.
    """
    files = sorted((out / "checkpoint").glob("step-*.pt"), reverse=True)
    for file in files:
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            if {"step", "weights", "optimizer", "scaler"} <= state.keys():
                return state
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
            pass
        warnings.warn(
            f"{file} is broken: the steps since the checkpoint before it are made again",
            stacklevel=3,
        )
    if files:
        raise ValueError(
            f"all checkpoints in {out / 'checkpoint'} are broken: put a copy of one back, or give "
            "fresh (--fresh), which starts anew"
        )
    return None


def begin(out: Path, pinned: Mapping[str, Any], first: int) -> None:
    """Removes checkpoints of steps after `first` and unfinished files, and writes `recipe.json`."""
    folder = out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("step-*"):
        if file.suffix == PART or int(file.stem.removeprefix("step-")) > first:
            file.unlink()
    clear_parts(out)
    write_text(out / "recipe.json", json.dumps(pinned, indent=1))


def save(out: Path, step: int, run: Run) -> None:
    """Writes a checkpoint, whole or not at all, and removes all but the last `KEPT_CHECKPOINTS`.

    Not with `Accelerator.save_state`: if there are several processes, that writes the names of
    DistributedDataParallel, and training could not go on with another number of processes.
    """
    scaler = run.accelerator.scaler
    state = {
        "step": step,
        "weights": _kept(run.trained).state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    file = out / "checkpoint" / f"step-{step:08d}.pt"
    with whole(file) as part:
        torch.save(state, part)
    for old in sorted(file.parent.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
        old.unlink()


def load(state: Mapping[str, Any], run: Run) -> int:
    """Takes up a checkpoint, and returns after how many steps it was written."""
    _kept(run.trained).load_state_dict(state["weights"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.accelerator.scaler is not None and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _kept(trained: Trained) -> nn.Module:
    """What a checkpoint holds: without the model if that is frozen, and so always the same."""
    if trained.frozen:
        assert trained.gates is not None
        return trained.gates
    return trained


def finish(out: Path, model: nn.Module, reduction: Any, recipe: Recipe) -> None:
    """Writes what a training leaves: gates, weights and a plot."""
    if getattr(reduction, "gates", None) is not None:
        with whole(out / "gates.safetensors") as part:
            reduction.save(part)
    if not recipe.frozen:
        with whole(out / "model.safetensors") as part:
            require("safetensors.torch", "train").save_model(model, str(part))
    try:
        require("matplotlib", "plots")
    except ModuleNotFoundError:
        return
    plot(out)
