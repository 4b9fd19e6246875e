"""Starts NVSHMEM as a low-latency buffer does, on one rank: `python nvshmem_environment.py FILE ARGUMENTS`.

For tests/test_nvshmem_readback.py. ARGUMENTS, a JSON object, are more of `Buffer`'s. Before NVSHMEM starts, FILE gets a
JSON object: the version of the NVSHMEM that is loaded, and the environment that C code sees by then. NVSHMEM may end
the process.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from mpi4py import MPI

from hpc_moe import Buffer, nvshmem_env
from hpc_moe._backends.cuda import region
from hpc_moe._backends.cuda.nvshmem import join, load_library


class Recorder:
    """`hpc_moe._nvshmem`, which writes the file just before it starts NVSHMEM."""

    def __init__(self, file: Path) -> None:
        self._library: Any = load_library()
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def init(self, *arguments: Any) -> None:
        seen = self._library.environment(nvshmem_env.VARIABLES)
        self._file.write_text(json.dumps({"version": self._library.loaded_version(), "environment": seen}))
        self._library.init(*arguments)


def main() -> None:
    file, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    with mock.patch.object(region, "join", functools.partial(join, load=lambda: Recorder(file))):
        buffer = Buffer(MPI.COMM_WORLD, device="cuda", low_latency_mode=True, timeout=60.0, **arguments)
    buffer.destroy()


main()
