"""Docstrings, as they have to be for the API reference.

Types stand in signatures, never in the text: what Napoleon takes for one ("Of a learned method: the
share ...") is the beginning of a sentence, and becomes that again. A name in backticks that a
docstring's own module knows leads to its entry, wherever in the package that stands.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parents[1] / "api"
_ENTRY = re.compile(r"^\.\. [\w:]+:: ([\w.]+)", re.MULTILINE)
_NAME = re.compile(r"(?<![`:\w])`([A-Za-z]\w*)`(?![`\w])")


def sentences(lines: list[str]) -> list[str]:
    """Lines that Napoleon has made, without the types that it has found in them."""
    made: list[str] = []
    begins = 0  # where what is returned, or what an attribute is, is said
    for line in lines:
        if line.startswith(":returns:"):
            begins = len(made)
        field = re.match(r":r?type: (.*)$", line)
        if field is None:
            made.append(line)
        elif made:
            label = re.match(r"(:returns: )?", made[begins])
            assert label is not None
            made[begins] = f"{label[0]}{field[1]}: {made[begins][label.end() :]}"
    return made


def linked(lines: list[str], obj: Any) -> list[str]:
    """Lines of a docstring whose names lead to their entries."""
    bare = getattr(obj, "fget", obj)  # of a property
    module = sys.modules.get(str(getattr(bare, "__module__", "")))
    if module is None or not module.__name__.startswith("tokred"):
        return lines
    try:
        own = {*inspect.signature(bare).parameters}
    except (TypeError, ValueError):
        own = set()

    def link(found: re.Match[str]) -> str:
        entry = None if found[1] in own else entries().get(id(vars(module).get(found[1])))
        return f":py:obj:`{found[1]} <{entry}>`" if entry else found[0]

    return [_NAME.sub(link, line) for line in lines]


@cache
def entries() -> dict[int, str]:
    """The names that the reference has, by the `id` of what they name."""
    named = {}
    for page in sorted(REFERENCE.glob("*.md")):
        for name in _ENTRY.findall(page.read_text()):
            module, attribute = name.rsplit(".", 1)
            named[id(getattr(import_module(module), attribute))] = name
    return named


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = linked(sentences(lines), obj)


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=900)  # Napoleon's is 500
    return {"parallel_read_safe": True}
