"""`python -m hpc_moe.cli`: the command line, where the `hpc_moe` script is not on the path."""

from __future__ import annotations

import sys

from hpc_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
