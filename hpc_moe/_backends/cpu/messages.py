"""Messages between ranks: what the CPU backend says over MPI, and how it waits.

Every message is matched by source and by a tag made of its purpose and a counter that all ranks advance alike, so that
a late message can never be taken for one of a later call. Waits poll and yield, and end at the buffer's timeout.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from mpi4py import MPI

from ...bootstrap import Group, keep_forever, wait_until

Bytes = np.ndarray  # uint8, one-dimensional


class Purpose(IntEnum):
    """What a message is for; together with a counter it makes the tag."""

    CALL = 0  # a rank's announcement of a call, counted by epoch
    PASS = 1  # "my rows of this pass are in your window", counted by pass
    NETWORK = 2  # rows on their way between nodes, counted by pass
    CLEAN = 3  # the agreement that ends a time with masked ranks; not counted


_TEXT_BYTES = 384
_FIELDS = 16
_HEADER = struct.Struct(f"<hhi{_FIELDS}q{_TEXT_BYTES}s")
# Payloads follow the header at this offset, aligned for the vector loads of the packet that they may be.
HEADER_BYTES = -(-_HEADER.size // 64) * 64


@dataclass
class Announcement:
    """The head of every call's first message: who calls what with which arguments, or why it refuses to.

    Attributes:
        operation: number of the operation, as in `_backends.cpu.OPERATIONS`.
        fields: values that the operation compares or uses.
        rejection: empty, or why the rank rejected its own arguments.
    """

    operation: int
    fields: tuple[int, ...] = ()
    rejection: str = ""

    def write(self, message: Bytes) -> None:
        """Write the header into the first `HEADER_BYTES` of a message."""
        fields = self.fields + (0,) * (_FIELDS - len(self.fields))
        text = self.rejection.encode()[:_TEXT_BYTES]
        _HEADER.pack_into(message.data, 0, self.operation, 0, len(self.fields), *fields, text)

    @staticmethod
    def read(message: Bytes) -> Announcement:
        """The announcement at the start of a message."""
        operation, _, count, *rest = _HEADER.unpack_from(message.data, 0)
        return Announcement(operation, tuple(rest[:count]), rest[-1].rstrip(b"\0").decode(errors="replace"))


class PeersMissing(Exception):
    """The limit passed and the messages of `ranks` had not come; those of the others had."""

    def __init__(self, ranks: tuple[int, ...], arrived: dict[int, Bytes]) -> None:
        super().__init__(ranks)
        self.ranks = ranks
        self.arrived = arrived


class Messenger:
    """Sends and receives byte messages on the buffer's communicator."""

    def __init__(self, group: Group) -> None:
        self._comm = group.comm
        self._tag_period = (int(group.comm.Get_attr(MPI.TAG_UB) or 32767) + 1) // len(Purpose)
        self._sending: list[tuple[MPI.Request, Bytes]] = []
        self._unwanted: set[tuple[int, int]] = set()
        self._status = MPI.Status()

    def _tag(self, purpose: Purpose, count: int) -> int:
        return (count % self._tag_period) * len(Purpose) + purpose

    def send(self, rank: int, purpose: Purpose, count: int, message: Bytes) -> None:
        """Start sending. The message must not be changed afterwards; it is kept until MPI is done with it."""
        self._sending = [item for item in self._sending if not item[0].Test()]
        request = self._comm.Isend([message, MPI.BYTE], rank, self._tag(purpose, count))
        self._sending.append((request, message))

    def poll(self, rank: int, purpose: Purpose, count: int, limit: float) -> Bytes | None:
        """A message that has begun to come, or None."""
        if self._comm.Iprobe(rank, self._tag(purpose, count)):
            return self.receive([rank], purpose, count, limit)[rank]
        return None

    def receive(
        self,
        ranks: Iterable[int],
        purpose: Purpose,
        count: int,
        limit: float,
        on_arrival: Callable[[int], None] | None = None,
    ) -> dict[int, Bytes]:
        """Wait for one message from each rank.

        Raises:
            PeersMissing: `limit` seconds passed.
        """
        missing = list(ranks)
        arriving: list[tuple[int, MPI.Request]] = []
        messages: dict[int, Bytes] = {}

        def poll() -> bool:
            for rank in tuple(missing):
                started = self._start_receive(rank, self._tag(purpose, count))
                if started is not None:
                    missing.remove(rank)
                    messages[rank] = started[1]
                    arriving.append((rank, started[0]))
            for item in tuple(arriving):
                if item[1].Test():
                    arriving.remove(item)
                    if on_arrival is not None:
                        on_arrival(item[0])
            return not missing and not arriving

        if not wait_until(poll, limit):
            keep_forever(arriving, messages)
            late = {*missing, *(rank for rank, _ in arriving)}
            arrived = {rank: message for rank, message in messages.items() if rank not in late}
            raise PeersMissing(tuple(sorted(late)), arrived)
        self._drop_unwanted()
        return messages

    def _start_receive(self, rank: int, tag: int) -> tuple[MPI.Request, Bytes] | None:
        """If a message has come: the request that receives it, and the memory that it fills."""
        matched = self._comm.Improbe(rank, tag, self._status)
        if matched is None:
            return None
        message = np.empty(self._status.Get_count(MPI.BYTE), np.uint8)
        return matched.Irecv([message, MPI.BYTE]), message

    def forget(self, ranks: Iterable[int], purpose: Purpose, count: int) -> None:
        """These messages will come and nobody wants them: drop them when they do."""
        self._unwanted.update((rank, self._tag(purpose, count)) for rank in ranks)

    def _drop_unwanted(self) -> None:
        for rank, tag in tuple(self._unwanted):
            started = self._start_receive(rank, tag)
            if started is not None:
                self._sending.append(started)  # kept, like a send, until MPI is done with it
                self._unwanted.remove((rank, tag))

    def finish(self, limit: float) -> bool:
        """Wait until MPI is done with every message, the unwanted ones included; returns whether it is."""

        def done() -> bool:
            self._drop_unwanted()
            self._sending = [item for item in self._sending if not item[0].Test()]
            return not self._sending and not self._unwanted

        return wait_until(done, limit)

    def abandon(self) -> None:
        """Keep the memory of unfinished messages for ever: a peer is gone, and MPI may still use it."""
        keep_forever(self._sending)
        self._sending = []
