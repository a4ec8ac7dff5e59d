"""The files of a training: checkpoints, what they depend on, and what is left at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokred.data.fingerprint import fingerprint, is_of
from tokred.data.writing import whole, write_text
from tokred.optional import require
from tokred.training.curve import plot
from tokred.training.recipe import Recipe
from tokred.training.steps import Run
from tokred.training.trained import Trained

KEPT_CHECKPOINTS = 2
"""How many checkpoints a folder holds at a time."""


def pins(model: nn.Module, reduction: Any, recipe: Recipe, samples: int) -> dict[str, Any]:
    """What a training must have in common with its beginning when it goes on, in types of JSON.

    Args:
        model: the model before it is trained.
        reduction: what is applied to it.
        recipe: how it is trained.
        samples: how many samples there are.
    """
    found: dict[str, Any] = {
        "recipe": asdict(recipe),
        "model": type(model).__qualname__,
        "method": "none" if reduction is None else str(reduction),
        "samples": samples,
    }
    if recipe.frozen or recipe.teaches:  # no checkpoint holds the weights of the dense model
        found["weights"] = fingerprint(model)
    as_read: dict[str, Any] = json.loads(json.dumps(found))
    return as_read


def compare(out: Path, pinned: Mapping[str, Any], model: nn.Module) -> None:
    """Refuses to go on with the checkpoint of another training.

    Args:
        out: the folder of the checkpoint.
        pinned: what this training is, from `pins`.
        model: its model.

    Raises:
        ValueError: something differs; the message says what.
    """
    file = out / "recipe.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    if "weights" in pinned and is_of(before.get("weights"), model):
        before["weights"] = pinned["weights"]  # which may have been written in a former format
    differences = []
    for name, now in pinned.items():
        was = before.get(name)
        if name == "recipe" and isinstance(was, dict):
            fields = [*now, *(field for field in was if field not in now)]
            differences += [
                f"{field} was {was.get(field)!r}, and is {now.get(field)!r}"
                for field in fields
                if was.get(field) != now.get(field)
            ]
        elif was != now:
            differences.append(f"{name} was {was!r}, and is {now!r}")
    if differences:
        raise ValueError(
            f"{out} holds a checkpoint of another training: {'; '.join(differences)}. Give another "
            "folder, the values from before, or fresh (--fresh), which starts anew"
        )


def latest(out: Path) -> Path | None:
    """The last checkpoint in a folder; None if there is none."""
    return max((out / "checkpoint").glob("step-*.pt"), default=None)


def begin(out: Path, pinned: Mapping[str, Any], first: int) -> None:
    """Removes checkpoints of steps after `first` and unfinished files, and writes `recipe.json`."""
    folder = out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("step-*"):
        if file.suffix == ".part" or int(file.stem.removeprefix("step-")) > first:
            file.unlink()
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


def load(file: Path, run: Run) -> int:
    """Reads a checkpoint, and returns after how many steps it was written."""
    state = torch.load(file, map_location="cpu", weights_only=True)
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
