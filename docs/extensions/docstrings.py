"""Prepares docstrings for the API reference.

Types stand in signatures, never in the text. What Napoleon takes for a type ("Of a learned method:
the share ...") is the beginning of a sentence, and becomes one again. A name in backticks that the
docstring's module knows becomes a link to its entry in the reference.
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
    """The lines that Napoleon has made, with the types it has found put back into sentences."""
    made: list[str] = []
    begins = 0  # the line that describes what is returned, or what an attribute is
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
    """The lines of a docstring, with names as links to their entries."""
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
    """The names in the reference, by the `id` of the object that each of them names."""
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
