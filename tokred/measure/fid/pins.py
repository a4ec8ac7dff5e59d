"""What images depend on, written beside them, so that a folder holds the images of one sweep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from tokred.data.fingerprint import fingerprint, in_former_format
from tokred.data.writing import write_text
from tokred.engine.denoising import Around
from tokred.host import module_of
from tokred.measure.fid.sweep import Sweep
from tokred.patching import reduction_of
from tokred.version import __version__


def pins(pipe: Any, sweep: Sweep, model: str = "") -> dict[str, Any]:
    """What images depend on, besides method, keep rate, seed and number, in types of JSON.

    Raises:
        ValueError: the pipeline is reduced already.
    """
    denoiser = module_of(pipe)
    if isinstance(denoiser, nn.Module) and reduction_of(denoiser) is not None:
        raise ValueError("the pipeline is reduced already: call tokred.remove(pipe) first")
    parts = getattr(pipe, "components", {"denoiser": denoiser})
    scheduler = getattr(pipe, "scheduler", None)
    config = {
        key: value
        for key, value in dict(getattr(scheduler, "config", {})).items()
        if not key.startswith("_")
    }
    found = {
        "model": model,
        "pipeline": type(pipe).__name__,
        "weights": {
            name: fingerprint(part) for name, part in parts.items() if isinstance(part, nn.Module)
        },
        "scheduler": {"class": type(scheduler).__name__, **config},
        "dtype": str(getattr(denoiser, "dtype", None)).removeprefix("torch."),
        "prompts": sweep.prompts,
        "steps": sweep.steps,
        "guidance": sweep.guidance,
        "size": sweep.size,
        "around": {  # without default values
            key: value
            for key, value in asdict(sweep.around).items()
            if key not in ("keep_rate", "_ratio") and value != getattr(Around(), key)
        },
        "versions": {
            "tokred": __version__,
            **{name: _version(name) for name in ("torch", "diffusers")},
        },
    }
    as_read: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return as_read


def pin(out: Path, pinned: Mapping[str, Any]) -> None:
    """Writes what images depend on to `out/sweep.json`; if that is there, compares both.

    Raises:
        ValueError: something differs.
    """
    file = out / "sweep.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(pinned, indent=1))
        return
    before, now = (dict(_leaves(tree)) for tree in (json.loads(file.read_text()), pinned))
    differences = [
        f"{key} was {_short(before.get(key))}, and is {_short(now.get(key))}"
        for key in [*before, *(key for key in now if key not in before)]
        if before.get(key) != now.get(key)
        # A fingerprint in a former format comes with a former version, which differs, too.
        and not (key.startswith("weights.") and in_former_format(before.get(key)))
    ]
    if differences:
        raise ValueError(
            f"{out} holds images of another sweep: {'; '.join(differences)}. Give another folder, "
            "or the values from before"
        )


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _leaves(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
