"""The command line: one file here for each command, put together."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import tokred
from tokred.cli import (
    advise,
    bench,
    cite,
    demo,
    evaluate,
    fid,
    fidelity,
    inspect,
    list,
    profile,
    show,
    train,
)

COMMANDS = (
    demo,
    list,
    bench,
    profile,
    fidelity,
    inspect,
    show,
    evaluate,
    advise,
    fid,
    train,
    cite,
)
"""In the order in which `tokred --help` names them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors that a user can cure are one line."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError) as error:
        print(f"tokred: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokred", description=tokred.__doc__)
    parser.add_argument("--version", action="version", version=f"tokred {tokred.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
