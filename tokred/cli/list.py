"""`tokred list`."""

from __future__ import annotations

import argparse

from tokred import reducers
from tokred.cli.shared import Commands, command
from tokred.host import library_of, patch_names, summary_of
from tokred.optional import installed


def add(commands: Commands) -> None:
    """Adds the command."""
    command(commands, "list", run, "the methods and the models they work on")


def run(options: argparse.Namespace) -> None:
    """Prints what there is, with the first sentence on each."""
    print("methods")
    for name in reducers.names():
        print(f"  {name:12s}{_first_line(reducers.make(name))}")
    print("hosts")
    for name in patch_names():
        library, extra = library_of(name), name.split("_")[0]
        if installed(library):
            print(f"  {name:22s}{summary_of(name)}")
        else:
            print(f'  {name:22s}(needs {library}: pip install "tokred[{extra}]")')


def _first_line(reducer: reducers.Reducer) -> str:
    return (type(reducer).__doc__ or "").strip().split("\n")[0]
