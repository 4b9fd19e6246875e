"""Byte messages between the ranks of a buffer, and how the library waits.

Every message is matched by source and by a tag made of its purpose and a counter that all ranks advance alike, so that
a late message can never be taken for one of a later call. Waits poll and yield, and have a limit. What the bytes mean
is the business of whoever sends them.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

import numpy as np
from mpi4py import MPI

Bytes = np.ndarray  # uint8, one-dimensional


def wait_until(done: Callable[[], bool], limit: float) -> bool:
    """Poll `done` until it is true or `limit` seconds have passed; returns whether it became true.

    Between polls the core is yielded: with more ranks than cores, spinning would take the time of the rank waited for.
    """
    if done():
        return True
    start = time.monotonic()
    while not done():
        waited = time.monotonic() - start
        if waited > limit:
            return False
        if waited < 1.0:
            os.sched_yield()
        else:
            time.sleep(0.001)  # a long wait is not about microseconds
    return True


def keep_forever(*things: Any) -> None:
    """Never free these: MPI or a peer may still use them, after a peer was lost.

    MPI finishes after the interpreter has torn its modules down, and may still write then; so the references are never
    given back, not even at exit.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(things))


class Purpose(IntEnum):
    """What a message is for; together with a counter it makes the tag."""

    STEP = 0  # "I have come to this step of construction or destruction", counted by step
    CALL = 1  # a rank's first message of a call, counted by epoch
    PASS = 2  # "my rows of this pass are in your window", counted by pass
    NETWORK = 3  # rows on their way between nodes, counted by pass
    CLEAN = 4  # the agreement that ends a time with masked ranks; not counted


class PeersMissing(Exception):
    """The limit passed and the messages of `ranks` had not come; those of the others had."""

    def __init__(self, ranks: tuple[int, ...], arrived: dict[int, Bytes]) -> None:
        super().__init__(ranks)
        self.ranks = ranks
        self.arrived = arrived


class Messenger:
    """Sends and receives byte messages on the buffer's communicator."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        # Only MPI_COMM_WORLD is sure to have the attribute; the standard's minimum is 32767.
        self._tag_period = (int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767) + 1) // len(Purpose)
        self.sent = 0  # messages so far
        self._under_way: list[tuple[int, int, MPI.Request, Bytes]] = []  # rank, number, and what MPI works with
        self._unwanted: set[tuple[int, int]] = set()  # rank and tag
        self._status = MPI.Status()

    def _tag(self, purpose: Purpose, count: int) -> int:
        return (count % self._tag_period) * len(Purpose) + purpose

    def send(self, rank: int, purpose: Purpose, count: int, message: Bytes) -> None:
        """Start sending. The message must not be changed afterwards; it is kept until MPI is done with it."""
        request = self._comm.Isend([message, MPI.BYTE], rank, self._tag(purpose, count))
        self._under_way.append((rank, self.sent, request, message))
        self.sent += 1

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
            self._drop_unwanted()  # its sender may be waiting for that
            return not missing and not arriving

        if not wait_until(poll, limit):
            keep_forever(arriving, messages)
            late = {*missing, *(rank for rank, _ in arriving)}
            arrived = {rank: message for rank, message in messages.items() if rank not in late}
            raise PeersMissing(tuple(sorted(late)), arrived)
        return messages

    def _start_receive(self, rank: int, tag: int) -> tuple[MPI.Request, Bytes] | None:
        """If a message has come: the request that receives it, and the memory that it fills."""
        matched = self._comm.Improbe(rank, tag, self._status)
        if matched is None:
            return None
        message = np.empty(self._status.Get_count(MPI.BYTE), np.uint8)
        return matched.Irecv([message, MPI.BYTE]), message

    def forget(self, ranks: Iterable[int], purpose: Purpose, count: int) -> None:
        """Nobody wants these messages: drop them if they come."""
        self._unwanted.update((rank, self._tag(purpose, count)) for rank in ranks)

    def drop_now(self, rank: int, purpose: Purpose, counts: Iterable[int]) -> None:
        """Drop those of these messages that have come."""
        for count in counts:
            self._drop(rank, self._tag(purpose, count))

    def _drop(self, rank: int, tag: int) -> bool:
        """Receive a message for nobody; returns whether it had come."""
        started = self._start_receive(rank, tag)
        if started is not None:
            self._under_way.append((rank, self.sent, *started))
        return started is not None

    def reap(self) -> None:
        """Let go of messages that MPI is done with."""
        self._under_way = [item for item in self._under_way if not item[2].Test()]

    def _drop_unwanted(self) -> None:
        for item in tuple(self._unwanted):
            if self._drop(*item):
                self._unwanted.remove(item)

    def finish(self, limit: float, ranks: Iterable[int], since: int = 0) -> tuple[int, ...]:
        """Wait until MPI is done with the messages to and from `ranks`, from message number `since` on.

        Returns:
            The ranks with whose messages it is not.
        """
        wanted = set(ranks)

        def late() -> set[int]:
            return {rank for rank, number, _, _ in self._under_way if number >= since} & wanted

        def done() -> bool:
            self._drop_unwanted()
            self.reap()
            return not late()

        wait_until(done, limit)
        return tuple(sorted(late()))

    def abandon(self) -> None:
        """Keep the memory of unfinished messages for ever: a peer is gone, and MPI may still use it."""
        keep_forever(self._under_way)
        self._under_way = []
