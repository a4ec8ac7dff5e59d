"""What pip is told to bring for a feature is what the feature imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
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


TREES = {
    file: ast.parse(file.read_text())
    for folder in ("tokred", "patches")
    for file in sorted((ROOT / folder).rglob("*.py"))
}


@dataclass
class Asker:
    """A function that asks for libraries in the name of an extra that its caller names.

    Attributes:
        at: where among its parameters `extra` is.
        default: the extra if the caller names none; None if it must.
        modules: what it asks for.
    """

    at: int
    default: ast.expr | None
    modules: set[str]


def askers() -> dict[str, Asker]:
    """All of them, by name. They have a parameter `extra`, and hand it on."""
    found: dict[str, Asker] = {}
    for _ in range(3):  # one may call another
        for tree in TREES.values():
            for node in ast.walk(tree):
                if not isinstance(node, ast.FunctionDef) or node.name == "require":
                    continue
                names = [argument.arg for argument in node.args.args]
                asked = {module for _, module, extra in calls_in(node, found) if handed_on(extra)}
                if "extra" in names and asked:
                    at = names.index("extra")
                    default = [
                        *[None] * (len(names) - len(node.args.defaults)),
                        *node.args.defaults,
                    ]
                    found[node.name] = Asker(at, default[at], asked)
    return found


def calls_in(tree: ast.AST, known: dict[str, Asker]) -> Iterator[tuple[int, str, ast.expr | None]]:
    """Where a part of a file asks for a library: the line, the module, and the extra."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        asker = known.get(call.func.id)
        if call.func.id == "require":
            module = ast.unparse(call.args[0]).strip("f'\"").split(".")[0]
            asker = Asker(1, None, {module})
        if asker is not None:
            named = [keyword.value for keyword in call.keywords if keyword.arg == "extra"]
            extra = [*named, *call.args[asker.at : asker.at + 1], asker.default][0]
            for module in sorted(asker.modules):
                yield call.lineno, module, extra


def handed_on(extra: ast.expr | None) -> bool:
    return isinstance(extra, ast.Name) and extra.id == "extra"


def asked_for() -> list[tuple[str, str, str]]:
    """Where a library is asked for, its module, and which extra the message says to install."""
    calls, known = [], askers()
    for file, tree in TREES.items():
        for line, module, extra in calls_in(tree, known):
            where = f"{file.name}, line {line}"
            if not handed_on(extra):
                assert isinstance(extra, ast.Constant), where
                calls.append((where, module, extra.value))
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
