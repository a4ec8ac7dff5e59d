"""`python -m tokred`."""

import sys

from tokred.cli.main import _parser, main

__all__ = ["_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
