"""`CpuBackend`: construction, the beginning of every call, and what happens when a rank rejects one or does not come.

Counters that all ranks advance alike: the *epoch* counts calls, also rejected ones; the *pass* counts fills of the
windows. Flow control is implicit: the slots of pass p are those of pass p - 2, and a rank starts pass p only after
every rank of its node has said that pass p - 1 is in its window, which each says after it has emptied pass p - 2.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ... import _C
from ...bootstrap import (
    Group,
    SharedWindows,
    Topology,
    allocate_windows,
    connect,
    difference,
    physical_memory,
)
from ...errors import ArgumentError, PeerTimeoutError, UnavailableError
from ...events import EventOverlap
from ...handles import LowLatencyHandle
from ...messenger import Bytes, PeersMissing, Purpose, keep_forever
from ..addresses import address
from ..base import Backend
from ..masks import agree_on_masks
from ..requests import (
    OPERATIONS,
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    Layout,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    StreamArguments,
)
from .announcement import HEADER_BYTES, Announcement
from .combine import combine
from .dispatch import dispatch
from .low_latency import LowLatency
from .passes import packet_shapes, plan_passes


@dataclass
class Counter:
    """Statistics of one operation: calls, passes (of all calls and of the last), seconds in it and in its waits."""

    calls: int = 0
    passes: int = 0
    last_passes: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0


@dataclass
class Call:
    """A call under way.

    Attributes:
        name: the operation.
        epoch: its number.
        agreed: what must be equal on all ranks.
        peers: the ranks that it was sent to.
        first_message: number of the messenger's first message of the call.
        counter: where its statistics go.
    """

    name: str
    epoch: int
    agreed: dict[str, int]
    peers: tuple[int, ...]
    first_message: int
    counter: Counter = field(repr=False)

    def end_passes(self, passes: int, seconds: float) -> None:
        """Count the passes and the time of the call."""
        self.counter.passes += passes
        self.counter.last_passes = passes
        self.counter.seconds += seconds


class CpuBackend(Backend):
    """The runtime on CPU tensors. Construction is collective and fails on all ranks or on none."""

    device = torch.device("cpu")
    comm_stream = torch.cpu.current_stream()

    def __init__(
        self,
        group: Group,
        topology: Topology,
        *,
        num_nvl_bytes: int,
        num_rdma_bytes: int,
        low_latency_mode: bool,
        enable_shrink: bool,
        timeout: float,
    ) -> None:
        self.group = group
        self.topology = topology
        self.num_rdma_bytes = num_rdma_bytes
        self.enable_shrink = enable_shrink
        self.timeout = timeout
        self.rank, self.num_ranks = group.rank, group.size
        with group.step("checking num_rdma_bytes"):
            if num_rdma_bytes > physical_memory():
                raise ArgumentError(
                    f"num_rdma_bytes={num_rdma_bytes} is more than the machine has: {physical_memory()}"
                )
            # Normal calls only stay within this size: their packets are allocated as they go. Untouched pages are free.
            self.rdma_buffer = torch.empty(num_rdma_bytes, dtype=torch.uint8)
        self.windows: SharedWindows = allocate_windows(group, topology, num_nvl_bytes)
        try:
            with group.step("creating the runtime"):
                self.runtime = _C.CpuRuntime(
                    self.rank,
                    list(topology.node_of_rank),
                    self.windows.addresses,
                    num_nvl_bytes,
                    low_latency_mode,
                    topology.num_threads,
                )
            connect(group, topology, self.runtime, topology.num_nodes > 1 or low_latency_mode)
        except PeerTimeoutError:
            keep_forever(self.windows)
            raise
        except Exception:
            self.windows.free()  # all ranks are here: a step fails on all or on none
            raise
        self.messenger = group.messenger
        self.epoch = 0
        self.passes = 0
        self._masked: set[int] = set()
        self.unmasking: set[int] = set()
        # Rank and epoch of calls that went on without a masked rank. Limited: a rank may never come back.
        self.skipped: deque[tuple[int, int]] = deque(maxlen=10_000)
        self.broken = ""
        self.counters = {name: Counter() for name in OPERATIONS}
        self.low_latency = LowLatency(self)

    # --- calls ---------------------------------------------------------------------------------------------------

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> Layout:
        """Counts and flags of this rank's tokens; no communication.

        Raises:
            ArgumentError: an index is out of range, or a token selects an expert twice.
        """
        num_tokens, top_k = topk_idx.shape
        nodes = self.topology.num_nodes
        layout = Layout(
            torch.empty(self.num_ranks, dtype=torch.int32),
            torch.empty(nodes, dtype=torch.int32) if nodes > 1 else None,
            torch.empty(num_experts, dtype=torch.int32),
            torch.empty(num_tokens, self.num_ranks, dtype=torch.bool),
        )
        problem = self.runtime.layout(
            address(topk_idx),
            num_tokens,
            top_k,
            num_experts,
            address(layout.num_tokens_per_rank),
            address(layout.num_tokens_per_rdma_rank),
            address(layout.num_tokens_per_expert),
            address(layout.is_token_in_rank),
        )
        if problem:
            raise ArgumentError(f"topk_idx: {problem}")
        return layout

    def get_layout(
        self, topk_idx: torch.Tensor, num_experts: int, streams: StreamArguments
    ) -> tuple[Layout, EventOverlap]:
        """The layout, and an event that is already reached."""
        return self.layout(topk_idx, num_experts), EventOverlap()

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Run a dispatch."""
        return dispatch(self, request)

    def combine(self, request: CombineRequest) -> CombineResult:
        """Run a combine."""
        return combine(self, request)

    def check_normal(self, request: DispatchRequest | CombineRequest) -> None:
        """Refuse, before anything is announced, a normal call that this rank could not see through.

        Raises:
            ArgumentError: a token does not fit into a pass, or the outputs do not fit into memory.
            UnavailableError: ranks are masked.
        """
        if self.masked:
            raise UnavailableError(f"ranks {sorted(self.masked)} are masked; only low-latency calls go on without them")
        node_shape, rail_shape = packet_shapes(self, request)
        plan_passes(self, node_shape, rail_shape, 1)
        rows, memory = getattr(request, "num_worst_tokens", 0), physical_memory()
        if rows * request.x.shape[1] * request.x.element_size() > memory:
            raise ArgumentError(f"num_worst_tokens={rows} rows are more than the machine's memory, {memory} bytes")

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        return self.low_latency.dispatch(request)

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> tuple[torch.Tensor, Callable[[], None]]:
        return self.low_latency.combine(request)

    # --- low-latency state ---------------------------------------------------------------------------------------

    def receive_now(self, receive: Callable[[], None]) -> None:
        """Run the receive half of the low-latency call that was made last."""
        self.low_latency.receive_now(receive)

    def staging_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """The staging buffer of this handle's combine, `[L, M*R, H]` bf16."""
        return self.low_latency.staging_buffer(handle._backend_state.staging, handle.shape(self.num_ranks))

    def check_routing(self, request: LowLatencyCombineRequest) -> None:
        """Compare the routing that a combine was given with its dispatch's.

        Raises:
            ArgumentError: they differ, or the dispatch has not been received.
        """
        self.low_latency.check_routing(request)

    def check_unreceived(self, later: bool) -> None:
        """Refuse a send that is to be received later, if two such are under way.

        Raises:
            ArgumentError: they are.
        """
        if later:
            self.low_latency.check_unreceived()

    def check_nothing_unreceived(self) -> None:
        """Refuse what needs all sends received.

        Raises:
            ArgumentError: some are not.
        """
        if len(self.low_latency.pending):
            raise ArgumentError(f"{len(self.low_latency.pending)} sends are unreceived; call their hooks first")

    @property
    def masked(self) -> set[int]:
        """Ranks that low-latency calls go on without."""
        return self._masked

    def set_mask(self, rank: int, mask: bool) -> None:
        """Mask a rank at once, or unmask it in the next `clean_low_latency`."""
        if mask:
            self.masked.add(rank)
            self.unmasking.discard(rank)
        elif rank in self.masked:
            self.unmasking.add(rank)

    def clean_low_latency(self, agreed: dict[str, int]) -> None:
        """Agree on masks and on the epoch, among the ranks that are not masked or about to be unmasked."""
        if self.enable_shrink:
            self._agree_on_masks(agreed)
            return
        call = self.start("clean_low_latency_buffer", agreed)
        self.send_call(call, {rank: self.message(call, (), 0) for rank in self.peers})
        self.receive_call(call)

    def reject_cleaning(self, error: Exception) -> None:
        """Take part in a `clean_low_latency` whose arguments this rank rejects."""
        if self.enable_shrink:
            self._agree_on_masks({}, str(error) or type(error).__name__)
        else:
            self.reject("clean_low_latency_buffer", error)

    def _agree_on_masks(self, agreed: dict[str, int], rejection: str = "") -> None:
        agreement = agree_on_masks(
            self.messenger,
            self.rank,
            self.num_ranks,
            self.timeout,
            masked=self.masked - self.unmasking,
            epoch=self.epoch,
            agreed=agreed,
            rejection=rejection,
        )
        self.unmasking.clear()
        self._masked = agreement.masked
        if agreement.missing:
            name = "clean_low_latency_buffer"
            raise self.time_out(name, agreement.missing, "an agreement on the masks", breaks=False)
        self.epoch = agreement.epoch
        self._drop_skipped({rank: ballot.epoch for rank, ballot in agreement.ballots.items()})
        agreement.compare(self.rank)

    def _drop_skipped(self, epochs: dict[int, int]) -> None:
        """Drop what ranks that are back sent while they were masked: nobody received it, and it came before they voted.

        `epochs`: of the last call of every rank that voted.
        """
        for rank, last in epochs.items():
            dropped = [epoch for skipped, epoch in self.skipped if skipped == rank and epoch <= last]
            self.messenger.drop_now(rank, Purpose.CALL, dropped)
        still_masked = [item for item in self.skipped if item[0] in self.masked]
        self.skipped.clear()
        self.skipped.extend(still_masked)

    def local_memory(self, use_rdma_buffer: bool) -> torch.Tensor:
        """All bytes of this rank's window, or of its network buffer."""
        if use_rdma_buffer:
            return self.rdma_buffer
        memory = self.windows.memory(self.topology.local_rank)
        return torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else torch.empty(0, dtype=torch.uint8)

    # --- the beginning of a call ---------------------------------------------------------------------------------

    @property
    def peers(self) -> list[int]:
        """All other ranks that are not masked."""
        return [rank for rank in range(self.num_ranks) if rank != self.rank and rank not in self.masked]

    def start(self, name: str, agreed: dict[str, int]) -> Call:
        """Give the call its number."""
        self.epoch += 1
        counter = self.counters[name]
        counter.calls += 1
        self.messenger.reap()
        return Call(name, self.epoch, agreed, tuple(self.peers), self.messenger.sent, counter)

    def message(self, call: Call, extra: tuple[int, ...], num_payload_bytes: int) -> Bytes:
        """A message of this call: its announcement, and room for a payload behind it."""
        message = np.empty(HEADER_BYTES + num_payload_bytes, np.uint8)
        Announcement(OPERATIONS.index(call.name), (*call.agreed.values(), *extra)).write(message)
        return message

    def send_call(self, call: Call, messages: dict[int, Bytes]) -> None:
        """Send this rank's first message of the call to every peer."""
        for rank, message in messages.items():
            self.messenger.send(rank, Purpose.CALL, call.epoch, message)

    def receive_call(
        self, call: Call, on_arrival: Callable[[int], None] | None = None
    ) -> tuple[dict[int, Bytes], dict[int, tuple[int, ...]]]:
        """Wait for every peer's first message of the call.

        Returns:
            The messages, and the values behind the agreed ones in each announcement.

        Raises:
            ArgumentError: a rank rejected its arguments, or the ranks' arguments differ; the same on every rank that
                did not reject its own.
            PeerTimeoutError: a peer did not come (unless it can be masked).
        """
        peers = [rank for rank in call.peers if rank not in self.masked]
        messages = self.receive(call, Purpose.CALL, call.epoch, peers, "the call", on_arrival)
        self.skipped.extend((rank, call.epoch) for rank in range(self.num_ranks) if rank not in messages)
        announcements = {rank: Announcement.read(message) for rank, message in messages.items()}
        own = Announcement(OPERATIONS.index(call.name), tuple(call.agreed.values()))
        everyones = dict(sorted({**announcements, self.rank: own}.items()))
        rejections = [f"rank {r} rejected its arguments: {a.rejection}" for r, a in everyones.items() if a.rejection]
        if rejections:
            raise ArgumentError("; ".join(rejections))
        first = next(iter(everyones))
        for rank, announcement in everyones.items():
            if announcement.operation != everyones[first].operation:
                raise ArgumentError(
                    f"all ranks must make the same call; rank {first} called "
                    f"{OPERATIONS[everyones[first].operation]}, rank {rank} called {OPERATIONS[announcement.operation]}"
                )
        for index, name in enumerate(call.agreed):
            values = {rank: announcement.fields[index] for rank, announcement in everyones.items()}
            if len(set(values.values())) > 1:
                raise ArgumentError(difference(name, values))
        return messages, {rank: a.fields[len(call.agreed) :] for rank, a in announcements.items()}

    def reject(self, name: str, error: Exception) -> None:
        """Take part in a call whose arguments this rank rejects: tell the others why, so that they raise too."""
        call = self.start(name, {})
        message = np.zeros(HEADER_BYTES, np.uint8)
        Announcement(OPERATIONS.index(name), (), str(error) or type(error).__name__).write(message)
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]  # a masked one may be waiting, too
        self.send_call(call, dict.fromkeys(others, message))
        self.messenger.forget(self.peers, Purpose.CALL, call.epoch)
        self.skipped.extend((rank, call.epoch) for rank in self.masked)

    def receive(
        self,
        call: Call,
        purpose: Purpose,
        count: int,
        ranks: Iterable[int],
        what: str,
        on_arrival: Callable[[int], None] | None = None,
    ) -> dict[int, Bytes]:
        """Wait for a message of the call from each of `ranks`; counts the time.

        Raises:
            PeerTimeoutError: the timeout passed. The buffer is broken then, unless it is a low-latency call and ranks
                may be masked: then the missing ones are, and the others' messages are returned.
        """
        begin = time.perf_counter()
        try:
            return self.messenger.receive(ranks, purpose, count, self.timeout, on_arrival)
        except PeersMissing as missing:
            if self._may_mask(call):
                self.masked.update(missing.ranks)
                return missing.arrived
            raise self.time_out(call.name, missing.ranks, what) from None
        finally:
            call.counter.wait_seconds += time.perf_counter() - begin

    def _may_mask(self, call: Call) -> bool:
        return self.enable_shrink and call.name.startswith("low_latency")

    def finish_sends(self, call: Call) -> None:
        """Wait until MPI is done with this rank's messages: some MPIs deliver only while the sender is calling them.

        Every peer receives them within the same call, so this cannot deadlock.

        Raises:
            PeerTimeoutError: a peer did not take its messages (where ranks may be masked, it has masked this one).
        """
        begin = time.perf_counter()
        peers = [rank for rank in call.peers if rank not in self.masked]
        late = self.messenger.finish(self.timeout, peers, call.first_message)
        call.counter.wait_seconds += time.perf_counter() - begin
        if late and not self._may_mask(call):
            raise self.time_out(call.name, late, "the end of this rank's messages to them")

    def time_out(self, operation: str, ranks: tuple[int, ...], what: str, breaks: bool = True) -> PeerTimeoutError:
        """The error that says for whom a call waited; `breaks`: the buffer cannot be used from now on."""
        peers = ", ".join(self.topology.describe(rank) for rank in ranks)
        error = PeerTimeoutError(
            f"{operation} on rank {self.rank} waited {self.timeout:g} s for {peers}: {what} did not come",
            operation=operation,
            rank=self.rank,
            peers=ranks,
        )
        if breaks:
            self.broken = str(error)
        return error

    # --- passes --------------------------------------------------------------------------------------------------

    def notify_node(self) -> None:
        """Tell the ranks of this node that this rank's rows of the current pass are in their windows."""
        self.windows.fence()
        for rank in self.topology.local_ranks:
            if rank != self.rank:
                self.messenger.send(rank, Purpose.PASS, self.passes, _NOTHING)

    def wait_for_node(self, call: Call, number: int, total: int) -> None:
        """Wait until every rank of this node has said so."""
        others = [rank for rank in self.topology.local_ranks if rank != self.rank]
        self.receive(call, Purpose.PASS, self.passes, others, f"pass {number + 1} of {total}")
        self.windows.fence()

    @property
    def parity(self) -> int:
        """Which half of the windows the current pass uses."""
        return self.passes & 1

    # --- the end -------------------------------------------------------------------------------------------------

    def check(self, wait: bool = False) -> None:
        """Raise what is known to be wrong. (There is nothing to wait for: calls end when they return.)

        Raises:
            UnavailableError: the buffer is broken.
        """
        if self.broken:
            raise UnavailableError(f"the buffer is broken since: {self.broken}")

    def limit_waits(self, seconds: float) -> None:
        """From now on wait for peers no longer than this."""
        self.timeout = min(self.timeout, seconds)
        self.group.limit = self.timeout

    def destroy(self) -> bool:
        """Release everything, if all peers take part; else keep what they may still use. Returns whether released."""
        self.runtime.destroy()
        if self.broken or self.masked:
            self.abandon()
            return False
        for entry in self.low_latency.pending:
            self.messenger.forget(self.peers, Purpose.CALL, entry.call.epoch)
        try:
            with self.group.step("Buffer.destroy"):
                if self.messenger.finish(self.timeout, self.peers):
                    raise UnavailableError("messages to a peer were never received")
        except (PeerTimeoutError, UnavailableError):
            self.abandon()
            return False
        self.windows.free()
        self.group.comm.Free()
        return True

    def abandon(self) -> None:
        """Keep memory that peers may have open until the process exits."""
        self.messenger.abandon()
        keep_forever(self.windows, self.group, self.rdma_buffer)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Calls, passes and seconds per operation."""
        return {name: dict(vars(counter)) for name, counter in self.counters.items()}


_NOTHING = np.empty(0, np.uint8)
