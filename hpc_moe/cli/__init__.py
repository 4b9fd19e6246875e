"""The command line: `hpc_moe doctor`, also as `python -m hpc_moe.cli doctor`.

For people at a terminal or in a job script; nothing in the library calls it. One sub-command a module.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hpc_moe._version import __version__
from hpc_moe.cli import doctor


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's arguments) and return its exit status."""
    parser = argparse.ArgumentParser(prog="hpc_moe", description="Expert-parallel communication for MPI programs.")
    parser.add_argument("--version", action="version", version=f"hpc_moe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor.add_parser(commands)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
