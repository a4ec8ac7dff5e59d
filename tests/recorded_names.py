"""Under which names things could be imported in a version of tokred.

    python tests/recorded_names.py       # writes tests/recorded/names-VERSION.txt

A line is a kind and a dotted path:

- `public`: in `tokred.__all__`; `home`: where that is defined, behind it.
- `documented`: mentioned or imported by the README, docs, examples or docstrings.
- `bare`: those of them that `import tokred` is enough for.
- `module`: a module; `defined`: a class or function of that module, without an underscore. Those of
  patches are left out: nobody imports them, but for pickles.
- `pickled`: what a pickle of a patched small model refers to.

tests/test_public_names.py asks for those of version 0.7.1.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import pickletools
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import recorded
import torch

import tokred

ROOT = Path(tokred.__file__).parent.parent
PATH = re.compile(r"\btokred(?:\.[A-Za-z_]\w*)+")
FENCED = re.compile(r"^```(?:python|\{code-cell\}[^\n]*)\n(.*?)^```", re.M | re.S)


def modules() -> Iterator[str]:
    yield "tokred"
    for found in pkgutil.walk_packages(tokred.__path__, "tokred."):
        if found.name != "tokred.__main__":
            yield found.name


def resolved(path: str) -> str | None:
    """The longest part of a dotted path that there is, beyond `tokred` itself; None if nothing."""
    parts = path.split(".")
    found: Any = tokred
    for number, part in enumerate(parts[1:], 1):
        name = ".".join(parts[: number + 1])
        inside = None
        if isinstance(found, ModuleType):
            try:
                inside = import_module(name)
            except ModuleNotFoundError:
                inside = None
            # The function `tokred.fidelity` hides a module that has what is asked for next.
            own = getattr(found, part, inside)
            follows = parts[number + 1] if number + 1 < len(parts) else None
            hidden = follows is not None and not hasattr(own, follows) and hasattr(inside, follows)
            inside = inside if hidden else own
        elif isinstance(found, type):
            inside = vars(found).get(part)
        if inside is None:
            return ".".join(parts[:number]) if number > 1 else None
        found = inside
    return path


# What is documented


def sources() -> Iterator[tuple[str, list[str]]]:
    """Texts, and the Python in them."""
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = file.read_text()
        yield text, FENCED.findall(text)
    for file in sorted((ROOT / "examples").rglob("*.py")):
        yield file.read_text(), [file.read_text()]
    for file in sorted((ROOT / "examples").rglob("*.ipynb")):
        cells = json.loads(file.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        yield "\n".join("".join(cell["source"]) for cell in cells), ["\n".join(code)]
    for folder in ("tokred", "patches"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text())
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
            yield "\n".join(ast.get_docstring(node) or "" for node in nodes), []


def used(code: str) -> Iterator[str]:
    """Dotted paths that a piece of Python imports, and what it takes out of them."""
    lines = [line for line in code.split("\n") if not line.lstrip().startswith(("%", "!", ">>>"))]
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:  # a part of a program
        return
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "tokred":
                    yield alias.name
                    bound[alias.asname or "tokred"] = alias.name if alias.asname else "tokred"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokred":
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in bound:
            yield ".".join([bound[inner.id], *parts])


def documented() -> set[str]:
    paths: set[str] = set()
    for text, code in sources():
        paths.update(PATH.findall(text))
        for piece in code:
            paths.update(used(piece))
    found = {path: resolved(path) for path in paths}
    for path, part in sorted(found.items()):
        if part != path:
            print(f"{path}: {part}", file=sys.stderr)
    return {part for part in found.values() if part is not None and "._" not in part}


# What is pickled


def referred(thing: Any) -> set[str]:
    """The names in tokred that a pickle refers to."""
    stream = io.BytesIO()
    pickle.Pickler(stream, protocol=2).dump(thing)
    return {
        str(argument).replace(" ", ".")
        for code, argument, _ in pickletools.genops(stream.getvalue())
        if code.name == "GLOBAL" and str(argument).startswith("tokred.")
    }


def pickled() -> set[str]:
    import recorded_files

    made = [(one.build, change) for one in recorded.models().values() for change in
            one.settings.values()]  # fmt: skip
    made += [(build, change) for _, (build, _, change) in recorded_files.MODELS.values()]
    found: set[str] = set()
    for build, change in made:
        torch.manual_seed(0)
        model = build()
        try:
            change(model)
        except tokred.UnsupportedModelError:
            continue
        try:
            found |= referred(model)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            print(f"{type(model).__qualname__}: {error}", file=sys.stderr)
    return found


BARE = """
import sys
import tokred
for path in sys.stdin.read().split():
    thing = tokred
    for part in path.split(".")[1:]:
        thing = getattr(thing, part, None)
    if thing is not None:
        print(path)
"""


def bare(paths: set[str]) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", BARE], input="\n".join(paths), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return run.stdout.split()


def lines() -> Iterator[str]:
    for name in tokred.__all__:
        yield f"public tokred.{name}"
        value = getattr(tokred, name)
        if not isinstance(value, ModuleType) and hasattr(value, "__qualname__"):
            yield f"home tokred.{name} {value.__module__}.{value.__qualname__}"
    paths = documented()
    for path in paths:
        yield f"documented {path}"
    for path in bare(paths):
        yield f"bare {path}"
    for name in modules():
        yield f"module {name}"
        if name.startswith("tokred.patches."):
            continue
        for own, value in vars(import_module(name)).items():
            kind = isinstance(value, type) or callable(value)
            if kind and getattr(value, "__module__", None) == name and not own.startswith("_"):
                yield f"defined {name}.{own}"
    for path in pickled():
        yield f"pickled {path}"


def main() -> None:
    warnings.simplefilter("ignore")
    text = "\n".join(sorted(set(lines())))
    (Path(__file__).parent / "recorded" / f"names-{tokred.__version__}.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
