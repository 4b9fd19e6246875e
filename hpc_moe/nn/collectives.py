"""The collectives that `hpc_moe.nn` needs beside a buffer's: sums and gathers of small arrays, with a limit.

They run on a duplicate of the user's communicator, so that a rank that does not come leaves the user's one as it was.
Not a general wrapper of MPI.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from hpc_moe.errors import ArgumentError, PeerTimeoutError, UnavailableError
from hpc_moe.messenger import keep_forever, wait_until


class Collectives:
    """A duplicate of a communicator, and limited waits on it. `of(comm)` makes it, or finds it again.

    After a timeout it is broken, because its ranks no longer agree on which call comes next.
    """

    def __init__(self, comm: MPI.Intracomm, timeout: float) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._broken = ""
        self._comm, request = comm.Idup()
        self._wait(request, "the duplicate of comm", timeout, self._comm)

    @staticmethod
    def of(comm: MPI.Intracomm, timeout: float = 100.0) -> Collectives:
        """The one of this communicator, which lives as long as it does. The first call for it is collective."""
        found: Any = comm.Get_attr(_KEY)
        if isinstance(found, Collectives):
            return found
        made = Collectives(comm, timeout)
        comm.Set_attr(_KEY, made)
        return made

    def all_reduce_sum(self, array: np.ndarray, operation: str, timeout: float) -> None:
        """Sum the contiguous array over the ranks, in place."""
        self._check(operation)
        self._wait(self._comm.Iallreduce(MPI.IN_PLACE, array), operation, timeout, array)

    def gather(self, part: np.ndarray, root: int, operation: str, timeout: float) -> np.ndarray | None:
        """The ranks' parts (contiguous, `[n] uint8`) on the root as `[R, n]`, None elsewhere."""
        self._check(operation)
        whole = np.empty((self.size, part.size), np.uint8) if self.rank == root else None
        received = None if whole is None else [whole, MPI.BYTE]
        self._wait(self._comm.Igather([part, MPI.BYTE], received, root), operation, timeout, part, whole)
        return whole

    def free(self) -> None:
        """Free the duplicate, unless a call on it never ended. Collective."""
        if not self._broken:
            self._comm.Free()

    def _check(self, operation: str) -> None:
        if self._broken:
            raise UnavailableError(f"{operation} on rank {self.rank}: hpc_moe.nn gave up before: {self._broken}")

    def _wait(self, request: MPI.Request, operation: str, timeout: float, *used: object) -> None:
        if wait_until(request.Test, timeout):
            return
        keep_forever(request, *used)
        self._broken = f"{operation} on rank {self.rank} waited {timeout:g} s for the other ranks"
        raise PeerTimeoutError(self._broken, operation=operation, rank=self.rank)


def check_same_ranks(comm: MPI.Intracomm, other: MPI.Intracomm, message: str) -> None:
    """Raise `message` unless the communicators have the same ranks in the same order. Local."""
    if MPI.COMM_NULL in (comm, other) or MPI.Comm.Compare(comm, other) not in (MPI.IDENT, MPI.CONGRUENT):
        raise ArgumentError(message)


def _forget(comm: MPI.Comm, _key: int, collectives: Collectives) -> None:
    """Called when a communicator is freed, which is collective; those of MPI itself go only when MPI ends."""
    if comm not in (MPI.COMM_WORLD, MPI.COMM_SELF):
        collectives.free()


_KEY = MPI.Comm.Create_keyval(delete_fn=_forget)
