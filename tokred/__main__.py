"""`python -m tokred`."""

import sys

from tokred.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
