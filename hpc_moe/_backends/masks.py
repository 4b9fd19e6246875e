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

import numpy as np

from ..bootstrap import difference
from ..errors import ArgumentError
from ..messenger import Bytes, Messenger, PeersMissing, Purpose, wait_until


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


@dataclass
class Agreement:
    """What the ranks have agreed on.

    Attributes:
        masked: who is masked, as a rank of them sees it: itself it does not mask.
        ballots: what each of them said.
        missing: ranks that did not come, and are masked; then `masked` holds them, and nothing else was agreed on.
    """

    masked: set[int]
    ballots: dict[int, Ballot]
    missing: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """The largest of all."""
        return max(ballot.epoch for ballot in self.ballots.values())

    def compare(self, rank: int) -> None:
        """Raise what the ranks' arguments are an error for, on `rank`.

        Raises:
            ArgumentError: they differ, or another rank rejected its own.
        """
        ballots = dict(sorted(self.ballots.items()))
        if ballots[rank].rejection:
            return  # this rank raises what it has to say itself
        rejections = [f"rank {r} rejected its arguments: {b.rejection}" for r, b in ballots.items() if b.rejection]
        if rejections:
            raise ArgumentError("; ".join(rejections))
        for name in ballots[rank].agreed:
            values = {r: ballot.agreed[name] for r, ballot in ballots.items()}
            if len(set(values.values())) > 1:
                raise ArgumentError(difference(name, values))


def agree_on_masks(
    messenger: Messenger,
    rank: int,
    num_ranks: int,
    limit: float,
    *,
    masked: set[int],
    epoch: int,
    agreed: dict[str, int],
    rejection: str = "",
) -> Agreement:
    """Agree with all ranks that are not `masked` on masks (their union) and epoch (the largest).

    Args:
        messenger: to the ranks.
        rank: this one, of `num_ranks`.
        limit: seconds to wait for the others.
        masked: whom this rank masks, but for those whose return was asked for.
        epoch: of this rank's last call.
        agreed: arguments that must be equal on all ranks.
        rejection: why this rank rejects its own arguments, if it does.
    """
    messenger.reap()
    voters = [r for r in range(num_ranks) if r != rank and r not in masked]
    number = secrets.randbits(62) | 1
    own = Ballot(number, epoch, sorted(masked), [0] * num_ranks, agreed, rejection)
    ballots: dict[int, Ballot] = {}
    for peer in voters:
        messenger.send(peer, Purpose.CLEAN, 0, own.message())

    def missing() -> list[int]:
        return [r for r in voters if r not in ballots or ballots[r].seen[rank] != number]

    def done() -> bool:
        for peer in missing():  # of the others, the next message may be of their next agreement
            try:
                message = messenger.poll(peer, Purpose.CLEAN, 0, limit)
            except PeersMissing:  # it began to come and never ended
                continue
            if message is None:
                continue
            ballots[peer] = Ballot.read(message)
            if own.seen[peer] != ballots[peer].number:
                own.seen[peer] = ballots[peer].number
                messenger.send(peer, Purpose.CLEAN, 0, own.message())
        return not missing()

    if not wait_until(done, limit):
        late = tuple(missing())
        return Agreement(masked | set(late), {rank: own}, late)
    ballots[rank] = own
    return Agreement({r for ballot in ballots.values() for r in ballot.masked} - {rank}, ballots, ())
