"""The exceptions of hpc_moe.

All derive from `Error`, so that one `except hpc_moe.Error` catches whatever the library raises on purpose. What MPI
itself raises (`mpi4py.MPI.Exception`) is wrapped where the library can say more than MPI does.
"""

from __future__ import annotations


class Error(RuntimeError):
    """Base class of every error that hpc_moe raises."""


class ArgumentError(Error, ValueError):
    """An argument is wrong. The message names the call, the argument, what it got and what it needs.

    Collective calls raise it on every rank: on the rank with the bad argument at once, on the others (naming that
    rank) as soon as they wait for it. The buffer stays usable.
    """


class BootstrapError(Error):
    """A step of `Buffer` construction failed on some rank; every rank raises it with that rank's message."""


class PeerTimeoutError(Error):
    """A peer did not answer within `timeout` seconds.

    Attributes:
        operation: the call that waited, e.g. `"dispatch"`.
        rank: the rank that waited.
        peers: the ranks that did not answer.
    """

    def __init__(self, message: str, *, operation: str = "", rank: int = -1, peers: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.operation = operation
        self.rank = rank
        self.peers = peers


class UnavailableError(Error):
    """What was asked for cannot be had: a destroyed or broken buffer, a backend that this build lacks."""
