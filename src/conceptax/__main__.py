"""`python -m conceptax`: the same as the `conceptax` command."""

import sys

from conceptax.cli import main

if __name__ == "__main__":
    sys.exit(main())
