"""`tokred cite`."""

from __future__ import annotations

import argparse

import tokred
from tokred.cli.shared import Commands, command


def add(commands: Commands) -> None:
    """Adds the command and its arguments."""
    cited = command(commands, "cite", run, "the BibTeX entry of a method")
    cited.add_argument("method")


def run(options: argparse.Namespace) -> None:
    """Prints the entry."""
    print(tokred.cite(options.method))
