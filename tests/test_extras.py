"""What pip is told to bring for a feature is what the feature imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"PIL": "pillow", "torch_fidelity": "torch-fidelity"}
"""Modules that are not called what their packages are."""
COMES_WITH = {
    ("safetensors", "diffusers"): "diffusers needs it itself",
    ("IPython", "evaluate"): "asked for where there is a notebook only, which runs in it",
}


def extras() -> dict[str, list[str]]:
    _, part = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
    found = re.findall(r"^(\w+) = (\[.*?\])$", part.split("\n[")[0], re.MULTILINE | re.DOTALL)
    return {name: ast.literal_eval(packages) for name, packages in found}


def packages(extra: str) -> set[str]:
    """The packages that an extra names, itself or through others."""
    found: set[str] = set()
    for package in extras()[extra]:
        if package.startswith("tokred["):
            for other in re.findall(r"\w+", package.removeprefix("tokred")):
                found |= packages(other)
        else:
            found |= set(re.findall(r"^[\w-]+", package))
    return found


def asked_for() -> list[tuple[str, str, str]]:
    """Where `require` is called, for which module, and which extra it says to install."""
    calls = []
    for folder in ("tokred", "patches"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                    module, extra = node.args
                    assert isinstance(extra, ast.Constant), f"{file.name}, line {node.lineno}"
                    named = ast.unparse(module).strip("f'\"").split(".")[0]
                    calls.append((f"{file.name}, line {node.lineno}", named, extra.value))
    return calls


def test_an_extra_brings_what_is_asked_for_in_its_name() -> None:
    calls = asked_for()
    assert len(calls) > 50
    for where, module, extra in calls:
        known = PACKAGES.get(module, module) in packages(extra)
        assert known or (module, extra) in COMES_WITH, f"{where}: {extra} does not bring {module}"


def test_all_is_everything_that_is_not_for_developers() -> None:
    rest = set().union(*(packages(name) for name in extras() if name not in ("docs", "test")))
    assert rest == packages("all")
