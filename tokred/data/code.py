"""What functions and classes do, as far as it can be told: which of them are somebody's own code,
and what such code refers to.

The code of an installed library is told by its name, and by the library's version. Code of one's
own (a script, a notebook, a package that is being worked on) is told by its bytecode: that is what
runs, whatever has become of the file since it was imported.
"""

from __future__ import annotations

import dis
import hashlib
import site
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

OURS = "tokred"
_LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}


@cache
def _where_libraries_are() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(Path(folder).resolve() for folder in folders)


@cache
def installed(module: str | None) -> bool:
    """Whether a module belongs to Python, to tokred or to an installed library."""
    if module is None or module == "__main__":
        return False
    library = module.partition(".")[0]
    if library == OURS or library in sys.stdlib_module_names:
        return True
    for name in (module, library):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            path = Path(file).resolve()
            return any(path.is_relative_to(folder) for folder in _where_libraries_are())
    # Without a file: what comes with a compiled library, unless it was made by hand.
    return library not in sys.modules


def of_python(library: str) -> bool:
    """Whether a library comes with Python."""
    return library in sys.stdlib_module_names


def version_of(library: str) -> str | None:
    """The version of a library; None if it does not say."""
    said = getattr(sys.modules.get(library), "__version__", None)
    if said is not None:
        return str(said)
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


@cache
def sources() -> str:
    """A text that tells the code of tokred from that of the same version, if it is not installed
    but worked on; else empty."""
    folder = Path(__file__).resolve().parent.parent
    if any(folder.is_relative_to(place) for place in _where_libraries_are()):
        return ""
    sha = hashlib.sha256()
    for root in (folder, folder / "patches"):  # which may be a link
        for file in sorted(root.rglob("*.py")):
            sha.update(file.read_bytes())
    return f"+{sha.hexdigest()[:12]}"


def parts_of(code: CodeType) -> Iterator[Any]:
    """What is run, without names of files and numbers of lines."""
    yield code.co_name
    yield code.co_code
    yield code.co_flags
    yield (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    yield (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    yield getattr(code, "co_exceptiontable", b"")
    yield code.co_consts


def used_by(function: FunctionType) -> dict[str, Any]:
    """The global things that a function refers to, by name. Of modules of one's own, the things
    that it takes from them."""
    attributes = set(_attributes(function.__code__))
    found: dict[str, Any] = {}
    for name in sorted(set(_globals(function.__code__))):
        if name in function.__globals__:
            found |= _taken(name, function.__globals__[name], attributes)
    return found


def _taken(name: str, thing: Any, attributes: set[str]) -> dict[str, Any]:
    if not isinstance(thing, ModuleType) or installed(thing.__name__):
        return {name: thing}
    found: dict[str, Any] = {}
    for attribute in sorted(attributes & vars(thing).keys()):
        # Each once: modules may refer to each other in circles.
        found |= _taken(f"{name}.{attribute}", vars(thing)[attribute], attributes - {attribute})
    return found


def _globals(code: CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname in _LOADS:
            yield str(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)


def _attributes(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attributes(constant)
