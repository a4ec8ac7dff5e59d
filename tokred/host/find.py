"""How the patch for a model is found, and the part of the model that it is for."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import nn

from tokred.host.check import ADDING_A_HOST, class_name, is_a, is_patched, unwrapped
from tokred.host.host import Denoiser, Host, Stage, UnsupportedModelError, WindowedHost


def module_of(model: Any) -> Any:
    """The model that is meant: of a diffusers pipeline, its denoiser; of one of transformers, its
    model."""
    if isinstance(model, nn.Module):
        return model
    inside = (getattr(model, name, None) for name in ("unet", "transformer", "model"))
    return next((found for found in inside if isinstance(found, nn.Module)), model)


def scheduler_of(model: Any) -> Any:
    """The scheduler of a diffusers pipeline, which knows its time steps; None of anything else."""
    scheduler = None if isinstance(model, nn.Module) else getattr(model, "scheduler", None)
    return scheduler if hasattr(scheduler, "timesteps") else None


def find_denoiser(model: Any) -> Denoiser | None:
    """The patch for a model, if it is a denoiser that one knows."""
    if not isinstance(model, nn.Module):
        return None
    known = (found for found in _loaded().values() if isinstance(found, Denoiser))
    return next((denoiser for denoiser in known if is_a(model, denoiser.models)), None)


def hosts() -> dict[str, Host | WindowedHost | Denoiser]:
    """The patches of all libraries that are imported already, by file name.

    The first word of a patch's file name is its library (`timm_vit`: timm). Patches that cannot be
    loaded with the installed version of their library are left out.
    """
    return {name: found for name, found in _loaded().items() if not isinstance(found, Exception)}


def _loaded() -> dict[str, Host | WindowedHost | Denoiser | Exception]:
    """The patches of all libraries that are imported already, or why they cannot be loaded: one
    file that fails, for whatever reason, is no reason to refuse the models of another."""
    found: dict[str, Host | WindowedHost | Denoiser | Exception] = {}
    for name in patch_names():
        if library_of(name) in sys.modules:
            try:
                found[name] = import_module(f"tokred.patches.{name}").HOST
            except Exception as error:
                found[name] = error
    return found


def library_of(patch: str) -> str:
    """The library that a patch is for, as it is imported."""
    return {"openclip": "open_clip"}.get(patch.split("_")[0], patch.split("_")[0])


def patch_names() -> list[str]:
    """The names of all patches, whether their library is installed or not."""
    try:
        patches = import_module("tokred.patches")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tokred.patches is missing: this is a source tree that is not installed; "
            "run `pip install -e .` in it"
        ) from error
    names = (module.name for module in iter_modules(patches.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def summary_of(patch: str) -> str:
    """One clause on the models that a patch is for, read from its source: importing the libraries
    of all patches takes several times as long as importing torch.

    Args:
        patch: the name of a patch, see `patch_names`.

    Returns:
        the text behind `summary=` in the file; empty if there is none, or none that can be read.
    """
    spec = find_spec(f"tokred.patches.{patch}")
    try:
        tree = ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):  # such a patch cannot be loaded, either
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "summary":
            said = node.value
            return str(said.value) if isinstance(said, ast.Constant) else ""
    return ""


def find_host(
    model: nn.Module, host: Host | WindowedHost | Stage | None = None
) -> tuple[Host | Stage, nn.Module]:
    """The host of a model, and the part of the model that it is for: the model itself, or the one
    vision tower somewhere inside. Of a model whose blocks attend in windows, the host is one stage:
    that in which a reduction hangs, or else the one with most blocks.

    Args:
        model: the model.
        host: the host to look for; any, if not given.

    Raises:
        UnsupportedModelError: no patch knows the model's class, or there are several towers.
        TypeError: it is no model at all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    if isinstance(model, torch.fx.GraphModule | torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{class_name(type(model))} is a graph that was exported or traced already: tokens "
            "cannot be reduced in it any more. Apply tokred to the model that it was made from, "
            "and export that"
        )
    given = host.family if isinstance(host, Stage) else host
    known = hosts() if given is None else {"given": given}
    families = [found for found in known.values() if isinstance(found, Host | WindowedHost)]
    towers = _towers(model, families)
    if len(towers) == 1:
        _, found, tower = towers[0]
        if isinstance(host, Stage):
            return host, tower
        return found.at(tower, stage_of(found, tower)), tower
    if towers:
        paths = ", ".join(f"{path} ({class_name(type(tower))})" for path, _, tower in towers)
        raise UnsupportedModelError(
            f"{class_name(type(model))} has {len(towers)} vision towers: {paths}; apply tokred to "
            "each one that you mean"
        )
    if host is not None:
        raise UnsupportedModelError(
            f"{class_name(type(model))} is not a {' or a '.join(families[0].models)}, which was "
            "expected"
        )
    raise UnsupportedModelError(
        f"no patch for {class_name(type(model))}; supported: "
        f"{', '.join(known) or 'none of the imported libraries'} (docs/hosts.md lists their "
        f"models){_failures()}; {ADDING_A_HOST}"
    )


def stage_of(host: Host | WindowedHost, model: nn.Module) -> int | None:
    """The stage of a model in which a reduction hangs; None if in none."""
    if isinstance(host, Host):
        return None
    stages = host.stages(model)
    at = (
        n
        for n, blocks in enumerate(stages)
        if any(is_patched(unwrapped(block)) for block in blocks)
    )
    return next(at, None)


def _failures() -> str:
    """What to say of patches that cannot be loaded."""
    told = ""
    for name, why in _loaded().items():
        if isinstance(why, ImportError):
            told += f"; {name} needs another version of its library: {why}"
        elif isinstance(why, Exception):
            told += f"; {name} cannot be loaded: {type(why).__name__}: {why}"
    return told


def _towers(
    model: nn.Module, known: list[Host | WindowedHost]
) -> list[tuple[str, Host | WindowedHost, nn.Module]]:
    """The outermost modules that a host is for, and their paths."""
    found: list[tuple[str, Host | WindowedHost, nn.Module]] = []
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        for host in known:
            if is_a(module, host.models) and host.means(module):
                found.append((path, host, module))
                inside.update(id(part) for part in module.modules())
                break
    return found
