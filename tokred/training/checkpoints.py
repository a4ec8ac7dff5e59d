"""Checkpoints, what a training must have in common with them, and the files that are left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.optional import require
from tokred.training.curve import plot
from tokred.training.recipe import Recipe
from tokred.training.trained import Trained

KEPT_CHECKPOINTS = 2
"""How many there are at a time."""


def pins(model: nn.Module, reduction: Any, recipe: Recipe, samples: int) -> dict[str, Any]:
    """What a training that goes on has to have in common with its beginning, as JSON has it."""
    found: dict[str, Any] = {
        "recipe": asdict(recipe),
        "model": type(model).__qualname__,
        "method": "none" if reduction is None else str(reduction),
        "samples": samples,
    }
    if recipe.frozen or recipe.teaches:  # weights that no checkpoint holds
        found["weights"] = _fingerprint(model)
    as_read: dict[str, Any] = json.loads(json.dumps(found))
    return as_read


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def compare(out: Path, pinned: Mapping[str, Any]) -> None:
    """Raises where a checkpoint is of another training.

    Raises:
        ValueError: naming what differs.
    """
    file = out / "recipe.json"
    before = json.loads(file.read_text()) if file.exists() else {}
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
    """Takes away what is of a later step than the one that is gone on from, or of none."""
    folder = out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("step-*"):
        if file.suffix == ".part" or int(file.stem.removeprefix("step-")) > first:
            file.unlink()
    _write(out / "recipe.json", json.dumps(pinned, indent=1))


def save(out: Path, step: int, trained: Trained, optimizer: Any, accelerator: Any) -> None:
    """Writes a checkpoint, under another name first: one that is there is whole.

    Not by `Accelerator.save_state`: of several processes that writes the names of
    DistributedDataParallel, with which no other number of processes could go on.
    """
    state = {
        "step": step,
        "weights": _kept(trained).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }
    file = out / "checkpoint" / f"step-{step:08d}.pt"
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)
    for old in sorted(file.parent.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
        old.unlink()


def load(file: Path, trained: Trained, optimizer: Any, accelerator: Any) -> int:
    """Reads a checkpoint, and returns how many steps it has behind it."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    _kept(trained).load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _kept(trained: Trained) -> nn.Module:
    """What a checkpoint holds: a frozen model would be the same in all of them."""
    if trained.frozen:
        assert trained.gates is not None
        return trained.gates
    return trained


def finish(out: Path, model: nn.Module, reduction: Any, recipe: Recipe) -> None:
    """Writes what a training leaves: gates, weights and a plot."""
    if getattr(reduction, "gates", None) is not None:
        part = out / "gates.part"
        reduction.save(part)
        part.replace(out / "gates.safetensors")
    if not recipe.frozen:
        part = out / "model.part"
        require("safetensors.torch", "train").save_model(model, str(part))
        part.replace(out / "model.safetensors")
    try:
        require("matplotlib", "plots")
    except ModuleNotFoundError:
        return
    plot(out)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
