"""`python -m linattn` is the `linattn` command."""

from __future__ import annotations

import sys

from linattn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
