"""What images depend on, written beside them, so that a folder holds the images of one sweep."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from tokred.data.code import version_of
from tokred.data.digest import NoFingerprintError, digest_of
from tokred.data.fingerprint import fingerprint, in_former_format
from tokred.data.writing import read_mapping, write_text
from tokred.engine.denoising import Around
from tokred.host import module_of
from tokred.measure.conditions import switches, versions_of
from tokred.measure.fid.sweep import Sweep
from tokred.patching import reduction_of
from tokred.patching.denoisers import NAMED
from tokred.reducers import parse
from tokred.version import __version__

_PLAIN = (bool, int, float, str)
UNTOLD = "cannot be told: "
"""What stands in place of a fingerprint that something does not have, in front of the reason."""


def pins(pipe: Any, sweep: Sweep, model: str = "") -> dict[str, Any]:
    """What images depend on, besides method, keep rate, seed and number, in types of JSON.

    Raises:
        ValueError: the pipeline is reduced already.
    """
    denoiser = module_of(pipe)
    if isinstance(denoiser, nn.Module) and reduction_of(denoiser) is not None:
        raise ValueError("the pipeline is reduced already: call tokred.remove(pipe) first")
    parts = {
        name: part
        for name, part in getattr(pipe, "components", {"denoiser": denoiser}).items()
        if part is not None
    }
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    scheduler = getattr(pipe, "scheduler", None)
    config = {
        key: value
        for key, value in dict(getattr(scheduler, "config", {})).items()
        if not key.startswith("_")
    }
    found = {
        "model": model,
        "pipeline": type(pipe).__name__,
        "weights": {name: _told(fingerprint, part) for name, part in modules.items()},
        "parts": {
            name: _told(digest_of, part)
            for name, part in parts.items()
            if name not in modules and part is not scheduler
        },
        "configuration": {
            key: value
            for key, value in dict(getattr(pipe, "config", {})).items()
            if key not in parts and not key.startswith("_") and isinstance(value, _PLAIN)
        },
        "scheduler": {"class": type(scheduler).__name__, **config},
        # Schedulers change as they are used; their code and their noise levels do not.
        "code": _told(digest_of, (type(pipe), type(scheduler), _noise_of(scheduler))),
        "methods": {method: _told(digest_of, parse(method, NAMED)) for method in sweep.methods},
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
            **{name: version_of(name) for name in ("torch", "diffusers")},
            **{name: v for part in modules.values() for name, v in versions_of(part).items()},
        },
        "switches": switches(),
    }
    as_read: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return as_read


def _noise_of(scheduler: Any) -> list[Any]:
    return [getattr(scheduler, name, None) for name in ("betas", "alphas_cumprod")]


def _told(how: Callable[[Any], str], thing: Any) -> str:
    """The fingerprint of a thing; if it has none, why."""
    try:
        return how(thing)
    except NoFingerprintError as error:
        return f"{UNTOLD}{error}"


def read(out: Path) -> dict[str, Any]:
    """What `out/sweep.json` says.

    Raises:
        ValueError: the file is broken.
    """
    return read_mapping(
        out / "sweep.json",
        f"what the images in {out} depend on. Put a copy of it back, or give another folder",
    )


def pin(out: Path, pinned: Mapping[str, Any]) -> None:
    """Writes what images depend on to `out/sweep.json`; if that is there, compares both. Methods
    that are new are added to it.

    Raises:
        ValueError: something differs, the file is broken, or there are images and no file.
    """
    file = out / "sweep.json"
    untold = [value for _, value in _leaves(pinned) if str(value).startswith(UNTOLD)]
    if not file.exists():
        if any(out.glob("*-seed*/*.png")):
            raise ValueError(
                f"{out} holds images, and no sweep.json that says what they depend on. Put a copy "
                "of it back, or give another folder"
            )
        if untold:
            why = untold[0].removeprefix(UNTOLD)
            warnings.warn(f"the sweep cannot go on if it is stopped: {why}", stacklevel=2)
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(pinned, indent=1))
        return
    former = read(out)
    methods = {**former.get("methods", {}), **pinned["methods"]}
    before, now = (dict(_leaves(tree)) for tree in (former, {**pinned, "methods": methods}))
    newer = before.get("versions.tokred") != now.get("versions.tokred")
    differences = [
        _difference(key, before.get(key), now.get(key))
        for key in [*before, *(key for key in now if key not in before)]
        if (before.get(key) != now.get(key) or str(now.get(key)).startswith(UNTOLD))
        and not (key.startswith("methods.") and key not in before)
        # What another version has written differently, or not at all, cannot be compared.
        and not (newer and key not in before)
        and not (newer and key.startswith("weights.") and in_former_format(before.get(key)))
    ]
    if not differences and methods != former.get("methods"):
        write_text(file, json.dumps({**pinned, "methods": methods}, indent=1))
    if differences:
        raise ValueError(
            f"{out} holds images of another sweep: {'; '.join(differences)}. Give another folder, "
            "or the values from before"
        )


def _difference(key: str, before: object, now: object) -> str:
    if str(now).startswith(UNTOLD):
        return str(now).removeprefix(UNTOLD)
    return f"{key} was {_short(before)}, and is {_short(now)}"


def _leaves(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
