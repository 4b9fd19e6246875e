"""Agreement of the ranks that are not masked, on who is and on where to go on counting.

A rank that was masked has missed calls, and messages of earlier agreements may still be under way. So every agreement
of a rank has a random number, and each message carries the newest numbers that its sender has seen from everybody: a
rank is done with a peer when the peer has seen its number and it has seen the peer's. Stale messages carry stale
numbers.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...bootstrap import wait_until
from .messages import Bytes, Purpose

if TYPE_CHECKING:
    from .backend import CpuBackend


@dataclass
class Ballot:
    """What a rank says: its agreement's number, its epoch, whom it masks, and the numbers that it has seen."""

    number: int
    epoch: int
    masked: np.ndarray  # [R] int64, 1 for masked
    seen: np.ndarray  # [R] int64

    def message(self) -> Bytes:
        """As bytes."""
        return np.concatenate([[self.number, self.epoch], self.masked, self.seen]).astype(np.int64).view(np.uint8)

    @staticmethod
    def read(message: Bytes, num_ranks: int) -> Ballot:
        """The ballot in a message."""
        values = message.view(np.int64)
        return Ballot(int(values[0]), int(values[1]), values[2 : 2 + num_ranks], values[2 + num_ranks :])


def agree_on_masks(backend: CpuBackend) -> None:
    """Unmask the ranks whose return was asked for, and agree on masks (their union) and epoch (the largest).

    Raises:
        PeerTimeoutError: a rank that is not masked did not come; it is masked now.
    """
    size = backend.num_ranks
    masked = backend.masked - backend.unmasking
    voters = [rank for rank in range(size) if rank != backend.rank and rank not in masked]
    own = Ballot(
        secrets.randbits(62) | 1,
        backend.epoch,
        np.array([rank in masked for rank in range(size)], np.int64),
        np.zeros(size, np.int64),
    )
    ballots: dict[int, Ballot] = {}
    for rank in voters:
        backend.messenger.send(rank, Purpose.CLEAN, 0, own.message())

    def done() -> bool:
        for rank in voters:
            message = backend.messenger.poll(rank, Purpose.CLEAN, 0, backend.timeout)
            if message is None:
                continue
            ballots[rank] = Ballot.read(message, size)
            if own.seen[rank] != ballots[rank].number:
                own.seen[rank] = ballots[rank].number
                backend.messenger.send(rank, Purpose.CLEAN, 0, own.message())
        return all(rank in ballots and ballots[rank].seen[backend.rank] == own.number for rank in voters)

    finished = wait_until(done, backend.timeout)
    backend.unmasking.clear()
    if not finished:
        missing = tuple(r for r in voters if r not in ballots or ballots[r].seen[backend.rank] != own.number)
        backend.masked = masked | set(missing)
        raise backend.time_out("clean_low_latency_buffer", missing, "an agreement on the masks", breaks=False)
    union = own.masked + sum(ballot.masked for ballot in ballots.values())
    backend.masked = {rank for rank in range(size) if union[rank] and rank != backend.rank}
    backend.epoch = max([own.epoch, *(ballot.epoch for ballot in ballots.values())])
