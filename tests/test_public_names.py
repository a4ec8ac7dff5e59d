"""Names of version 0.7.1 go on working: tests/recorded/names-0.7.1.txt has them, and
tests/recorded_names.py says where they come from."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import tokred

FILE = Path(__file__).parent / "recorded" / "names-0.7.1.txt"
NAMES: dict[str, list[str]] = defaultdict(list)
for line in FILE.read_text().splitlines():
    kind, path = line.split(" ", 1)
    NAMES[kind].append(path)

# What was taken away on purpose, with the reason: no document mentioned it, and nothing refers to
# it in files. `public`, `documented` and `pickled` names are never taken away.
GONE: dict[str, str] = {
    f"tokred.profiling.{name}": "overrode what was private in the engine; the clock observes it now"
    for name in ("Timed", "TimedCall", "TimedStep", "timed")
} | {
    "tokred.kernels.agglomerative_numba.workspace": "the kernel makes its distances itself",
}


def found(path: str) -> Any:
    """What a dotted path leads to: through as many modules as can be imported, which need not be
    attributes of each other, and then by attributes."""
    parts = path.split(".")
    module, deep = import_module(parts[0]), 1
    for deep in range(2, len(parts) + 1):
        name = ".".join(parts[:deep])
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # it is there, and lacks something itself
                raise
            deep -= 1
            break
    thing: Any = module
    for part in parts[deep:]:
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("kind", ["public", "documented", "module", "defined"])
def test_every_name_can_be_imported(kind: str) -> None:
    missing = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in NAMES[kind]:
            if path in GONE:
                continue
            try:
                assert found(path) is not None
            except Exception as error:
                if not str(error).startswith("this needs"):  # a library that is not installed
                    missing.append(f"{path}: {error}")
    assert not missing, "\n".join(["these names of 0.7.1 are gone:", *missing])


def test_public_names_are_public() -> None:
    assert {path.removeprefix("tokred.") for path in NAMES["public"]} <= set(tokred.__all__)
    missing = [path for path in NAMES["public"] if not hasattr(tokred, path.split(".")[1])]
    assert not missing


def test_what_pickles_refer_to_is_found() -> None:
    """In the words of a pickle: a module to be imported, and a name in it."""
    missing = []
    for path in NAMES["pickled"]:
        module, _, name = path.rpartition(".")
        try:
            assert pickle.loads(f"c{module}\n{name}\n.".encode()) is not None
        except Exception as error:
            missing.append(f"{path}: {error}")
    assert not missing, "\n".join(["models that 0.7.1 saved refer to:", *missing])


def test_what_is_public_is_the_same_in_its_former_place() -> None:
    """Not a copy, of which no value would be an instance."""
    for line in NAMES["home"]:
        public, home = line.split(" ")
        assert found(home) is getattr(tokred, public.removeprefix("tokred.")), line


PROGRAM = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
import tokred
for path in sys.stdin.read().split():
    parts = path.split(".")
    try:
        for deep in range(2, len(parts) + 1):
            name = ".".join(parts[:deep])
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
                break
        thing = tokred
        for part in parts[1:]:
            thing = getattr(thing, part)
    except Exception as error:
        if not str(error).startswith("this needs"):
            print(f"{path}: {error}")
"""


def test_documented_names_are_attributes_too() -> None:
    """As one writes them down: `import tokred`, `import tokred.fid`, `tokred.fid.score`."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="\n".join(NAMES["documented"]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not run.stdout, f"not reached by attributes:\n{run.stdout}"


def test_import_tokred_is_enough_where_it_was() -> None:
    lines = [path.split(".")[1:] for path in NAMES["bare"]]
    program = (
        f"import tokred, functools\nfor path in {lines}: functools.reduce(getattr, path, tokred)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_nothing_is_taken_away_that_was_promised() -> None:
    promised = {path for kind in ("public", "documented", "pickled") for path in NAMES[kind]}
    assert not promised & GONE.keys()
    assert GONE.keys() <= {*NAMES["defined"], *NAMES["module"]}
    kinds = {"public", "home", "documented", "bare", "module", "defined", "pickled"}
    assert NAMES.keys() == kinds
