"""Agreement of the ranks that are not masked, on who is and on where to go on counting.

A rank that was masked has missed calls, and messages of earlier agreements may still be under way. So every agreement
of a rank has a random number, and each message carries the newest numbers that its sender has seen from everybody: a
rank is done with a peer when the peer has seen its number and it has seen the peer's. Stale messages carry stale
numbers.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...bootstrap import difference
from ...errors import ArgumentError
from ...messenger import Bytes, PeersMissing, Purpose, wait_until

if TYPE_CHECKING:
    from .backend import CpuBackend


@dataclass
class Ballot:
    """What a rank says.

    Attributes:
        number: of this agreement of the rank.
        epoch: its last call.
        masked: whom it masks.
        seen: the newest number that it has seen of each rank, 0 for none.
        agreed: arguments that must be equal on all ranks.
        rejection: empty, or why the rank rejected its own arguments.
    """

    number: int
    epoch: int
    masked: list[int]
    seen: list[int]
    agreed: dict[str, int]
    rejection: str

    def message(self) -> Bytes:
        """As bytes."""
        return np.frombuffer(json.dumps(asdict(self)).encode(), np.uint8)

    @staticmethod
    def read(message: Bytes) -> Ballot:
        """The ballot in a message."""
        return Ballot(**json.loads(message.tobytes()))


def agree_on_masks(backend: CpuBackend, agreed: dict[str, int], rejection: str = "") -> None:
    """Unmask the ranks whose return was asked for, and agree on masks (their union) and epoch (the largest).

    Raises:
        ArgumentError: the ranks' arguments differ, or another rank rejected its own; what is agreed on holds all the
            same.
        PeerTimeoutError: a rank that is not masked did not come; it is masked now.
    """
    backend.messenger.reap()
    masked = backend.masked - backend.unmasking
    voters = [rank for rank in range(backend.num_ranks) if rank != backend.rank and rank not in masked]
    number = secrets.randbits(62) | 1
    own = Ballot(number, backend.epoch, sorted(masked), [0] * backend.num_ranks, agreed, rejection)
    ballots: dict[int, Ballot] = {}
    for rank in voters:
        backend.messenger.send(rank, Purpose.CLEAN, 0, own.message())

    def missing() -> list[int]:
        return [rank for rank in voters if rank not in ballots or ballots[rank].seen[backend.rank] != number]

    def done() -> bool:
        for rank in missing():  # of the others, the next message may be of their next agreement
            try:
                message = backend.messenger.poll(rank, Purpose.CLEAN, 0, backend.timeout)
            except PeersMissing:  # it began to come and never ended
                continue
            if message is None:
                continue
            ballots[rank] = Ballot.read(message)
            if own.seen[rank] != ballots[rank].number:
                own.seen[rank] = ballots[rank].number
                backend.messenger.send(rank, Purpose.CLEAN, 0, own.message())
        return not missing()

    finished = wait_until(done, backend.timeout)
    backend.unmasking.clear()
    if not finished:
        backend.masked = masked | set(missing())
        raise backend.time_out("clean_low_latency_buffer", tuple(missing()), "an agreement on the masks", breaks=False)
    ballots[backend.rank] = own
    backend.masked = {rank for ballot in ballots.values() for rank in ballot.masked} - {backend.rank}
    backend.epoch = max(ballot.epoch for ballot in ballots.values())
    _drop_skipped(backend, ballots)
    _compare(dict(sorted(ballots.items())), backend.rank)


def _drop_skipped(backend: CpuBackend, ballots: dict[int, Ballot]) -> None:
    """Drop what ranks that are back sent while they were masked: nobody received it, and it came before the ballot."""
    for rank in ballots:
        epochs = [epoch for skipped, epoch in backend.skipped if skipped == rank and epoch <= ballots[rank].epoch]
        backend.messenger.drop_now(rank, Purpose.CALL, epochs)
    still_masked = [item for item in backend.skipped if item[0] in backend.masked]
    backend.skipped.clear()
    backend.skipped.extend(still_masked)


def _compare(ballots: dict[int, Ballot], own_rank: int) -> None:
    if ballots[own_rank].rejection:
        return  # this rank raises what it has to say itself
    rejections = [f"rank {rank} rejected its arguments: {b.rejection}" for rank, b in ballots.items() if b.rejection]
    if rejections:
        raise ArgumentError("; ".join(rejections))
    for name in ballots[own_rank].agreed:
        values = {rank: ballot.agreed[name] for rank, ballot in ballots.items()}
        if len(set(values.values())) > 1:
            raise ArgumentError(difference(name, values))
