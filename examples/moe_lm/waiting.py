"""Waiting for other ranks: with a limit, and leaving the core to those that work."""

from __future__ import annotations

from mpi4py import MPI

from hpc_moe.messenger import wait_until


def wait(request: MPI.Request, what: str, limit: float = 300.0) -> None:
    """Wait for a request, `limit` seconds at most.

    Raises:
        RuntimeError: the limit passed. The caller should end the job.
    """
    if not wait_until(request.Test, limit):
        raise RuntimeError(f"waited {limit:g} s for {what}")
