"""Low-latency dispatch and combine on CPU.

Each rank sends every other one message: the announcement of the call, and behind it a packet with the rows for that
rank. Messages go directly from source to destination, also between nodes, and lie with MPI until the receive half of
the call takes them; so the receive half may run much later. It always runs in the order of the calls: asking for a
later one runs the earlier ones first. A token travels once per rank, not once per expert, and is spread over the
experts there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ... import _C
from ...errors import ArgumentError, Error
from ...handles import LowLatencyHandle
from ...messenger import Bytes
from ..addresses import address
from ..requests import LowLatencyCombineRequest, LowLatencyDispatchRequest, LowLatencyDispatchResult
from .announcement import HEADER_BYTES

if TYPE_CHECKING:
    from .backend import Call, CpuBackend

# Sends of a buffer whose receive half has not run.
MAX_UNRECEIVED = 2


@dataclass(eq=False)
class Routing:
    """What a dispatch keeps for its combine.

    Attributes:
        src_idx: `recv_src_idx` of the handle.
        layout_range: `recv_layout_range` of the handle.
        topk_idx: `[T, K] int64`, a copy.
        topk_weights: `[T, K] float32`, a copy, if they travelled.
        is_token_in_rank: `[T, R] bool`.
        staging: which of the two staging buffers is this handle's.
        source_begin: `[R + 1]`, received tokens of each source.
        grouped_rows: `[received tokens, K] int32`, row of `recv_x` of each token's k-th expert, -1 where elsewhere.
        token_weights: `[received tokens, K] float32`, if weights travelled.
    """

    src_idx: torch.Tensor
    layout_range: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    is_token_in_rank: torch.Tensor
    staging: int
    source_begin: list[int]
    grouped_rows: np.ndarray
    token_weights: np.ndarray | None

    def handle_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`recv_src_idx` and `recv_layout_range`."""
        return self.src_idx, self.layout_range


class Pending:
    """A call that has sent and not received.

    Attributes:
        call: the call.
        receive: its receive half.
        error: why that failed, if another call's turn ran it: its own hook raises it.
    """

    def __init__(self, call: Call, receive: Callable[[], None]) -> None:
        self.call, self.receive = call, receive
        self.error: ArgumentError | None = None


class LowLatency:
    """The calls that move at most M tokens a rank."""

    def __init__(self, backend: CpuBackend) -> None:
        self._backend = backend
        self.pending: deque[Pending] = deque()  # in the order of the calls
        self._staged: list[
            Routing
        ] = []  # of the latest dispatches, but for failed ones: their staging buffers are taken

    def check_unreceived(self) -> None:
        """Refuse a call that would leave too many sends unreceived.

        Raises:
            ArgumentError: two are unreceived already.
        """
        if len(self.pending) >= MAX_UNRECEIVED:
            raise ArgumentError(
                f"return_recv_hook: {len(self.pending)} earlier sends are unreceived; call their hooks first"
            )

    def _defer(self, call: Call, receive: Callable[[], None]) -> Callable[[], None]:
        """Queue a receive half; returns what runs it, after all earlier ones. Running it again does nothing."""
        entry = Pending(call, receive)
        self.pending.append(entry)

        def run() -> None:
            while entry in self.pending:
                first = self.pending.popleft()
                try:
                    first.receive()
                except ArgumentError as error:  # concerns that call alone; anything else breaks the buffer
                    first.error = error
            if entry.error is not None:
                raise entry.error

        return run

    def receive_now(self, receive: Callable[[], None]) -> None:
        """Run the receive half of the call that was made last, and see its own messages off."""
        call = self.pending[-1].call
        receive()
        self._backend.finish_sends(call)

    def staging_buffer(self, index: int, shape: tuple[int, int, int]) -> torch.Tensor:
        """Staging buffer 0 or 1 of combine: `[L, M*R, H]` bf16 in one half of the buffer of `num_rdma_bytes`."""
        experts, rows, hidden = shape
        begin = index * (self._backend.num_rdma_bytes // 2 // 64 * 64)
        flat = self._backend.rdma_buffer[begin : begin + 2 * experts * rows * hidden]
        return flat.view(torch.bfloat16).view(shape)

    # --- dispatch ------------------------------------------------------------------------------------------------

    def dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """Send the tokens; the result's `receive` fills its tensors."""
        assert request.layout is not None
        begin = time.perf_counter()
        backend = self._backend
        call = backend.start("low_latency_dispatch", request.agreed())
        shape, tokens, _kept_alive = self._cast(request)
        in_rank = request.layout.is_token_in_rank
        counts = request.layout.num_tokens_per_rank.tolist()
        messages = {}
        for rank in [*backend.peers, backend.rank]:  # its own rows too: x may change before the receive half runs
            message = backend.message(call, (), shape.bytes(counts[rank]))
            backend.runtime.pack_tokens(
                shape, tokens, address(in_rank), [rank], 0, len(in_rank), address(message) + HEADER_BYTES
            )
            messages[rank] = message
        own = messages.pop(backend.rank)
        backend.send_call(call, messages)
        result = self._allocate(call, request, shape)
        result.receive = self._defer(call, lambda: self._receive_dispatch(call, request, shape, own, result))
        self._staged = [*self._staged[-MAX_UNRECEIVED:], result.handle._backend_state]
        call.counter.seconds += time.perf_counter() - begin
        return result

    def _cast(self, request: LowLatencyDispatchRequest) -> tuple[_C.PacketShape, _C.RowView, list[torch.Tensor]]:
        """What a packet's rows are, and this rank's tokens in that form."""
        x = request.x
        num_tokens, hidden = x.shape
        shape, view = _C.PacketShape(), _C.RowView()
        shape.num_topk = request.topk_idx.shape[1]
        shape.has_source_index = shape.has_topk_index = True
        shape.has_weights = request.topk_weights is not None
        view.topk_index, view.topk_weights = address(request.topk_idx), address(request.topk_weights)
        if not request.form.use_fp8:
            shape.row_bytes = 2 * hidden
            view.rows, view.row_stride = address(x), 2 * x.stride(0)
            return shape, view, []
        q = torch.empty(num_tokens, hidden, dtype=torch.uint8)
        groups = hidden // 128
        scales = torch.empty(num_tokens, groups, dtype=torch.uint8 if request.form.use_ue8m0 else torch.float32)
        _C.cast_to_fp8(
            address(x), x.stride(0), num_tokens, hidden, request.form.round_scale, request.form.use_ue8m0, address(q),
            address(scales), self._backend.runtime.num_threads,
        )  # fmt: skip
        shape.row_bytes, shape.scale_bytes = hidden, groups * scales.element_size()
        view.rows, view.row_stride = address(q), hidden
        view.scales, view.scale_row_stride, view.scale_column_stride = address(scales), shape.scale_bytes, 4
        return shape, view, [q, scales]

    def _allocate(
        self, call: Call, request: LowLatencyDispatchRequest, shape: _C.PacketShape
    ) -> LowLatencyDispatchResult:
        assert request.layout is not None
        num_ranks = self._backend.num_ranks
        num_tokens, hidden = request.x.shape
        local, rows = request.form.num_experts // num_ranks, request.form.num_max_tokens * num_ranks
        scales = None
        if request.form.use_fp8:
            dtype = torch.int32 if request.form.use_ue8m0 else torch.float32
            scales = torch.empty(local, shape.scale_bytes // 4, rows, dtype=dtype).transpose(1, 2)
        handle = LowLatencyHandle(
            num_max_dispatch_tokens_per_rank=request.form.num_max_tokens,
            hidden=hidden,
            num_experts=request.form.num_experts,
            num_tokens=num_tokens,
            top_k=request.topk_idx.shape[1],
            weighted=request.topk_weights is not None,
            _epoch=call.epoch,
        )
        handle._backend_state = Routing(
            src_idx=torch.empty(local, rows, dtype=torch.int32),
            layout_range=torch.empty(local, num_ranks, dtype=torch.int64),
            topk_idx=request.topk_idx.clone(),
            topk_weights=None if request.topk_weights is None else request.topk_weights.clone(),
            is_token_in_rank=request.layout.is_token_in_rank,
            staging=1 - self._staged[-1].staging if self._staged else 0,
            source_begin=[],
            grouped_rows=np.empty((0, 0), np.int32),
            token_weights=None,
        )
        dtype = torch.float8_e4m3fn if request.form.use_fp8 else torch.bfloat16
        recv_x = torch.empty(local, rows, hidden, dtype=dtype)
        return LowLatencyDispatchResult(recv_x, scales, torch.empty(local, dtype=torch.int32), handle, None)

    def _receive_dispatch(
        self,
        call: Call,
        request: LowLatencyDispatchRequest,
        shape: _C.PacketShape,
        own: Bytes,
        result: LowLatencyDispatchResult,
    ) -> None:
        begin = time.perf_counter()
        backend, handle = self._backend, result.handle
        routing: Routing = handle._backend_state
        try:
            messages = self._receive_messages(call, request.wait_stats)
        except ArgumentError:
            self._staged = [other for other in self._staged if other is not routing]
            raise
        messages[backend.rank] = own
        packets = {rank: address(message) + HEADER_BYTES for rank, message in messages.items()}
        views = {rank: _C.RowView.of_packet(shape, _C.Packet.at(shape, base)) for rank, base in packets.items()}
        local, rows = result.recv_x.shape[:2]
        counts = np.zeros((backend.num_ranks, local), np.int64)
        for rank, view in views.items():
            _C.count_local_experts(view, shape.num_topk, backend.rank * local, local, address(counts[rank]))
        begins = counts.cumsum(axis=0) - counts
        next_row = begins + np.arange(local) * rows
        received = [views[rank].num_rows if rank in views else 0 for rank in range(backend.num_ranks)]
        routing.source_begin = [0, *np.cumsum(received).tolist()]
        routing.grouped_rows = np.empty((routing.source_begin[-1], shape.num_topk), np.int32)
        routing.token_weights = np.empty(routing.grouped_rows.shape, np.float32) if shape.has_weights else None
        output = self._output(shape, result, routing)
        for rank in sorted(packets):
            backend.runtime.deliver_packet(
                shape,
                packets[rank],
                -1,
                output,
                routing.source_begin[rank],
                routing.source_begin[rank + 1],
                address(next_row[rank]),
            )
        total = torch.from_numpy(counts.sum(axis=0).astype(np.int32))
        result.recv_count.copy_(total)
        handle.recv_layout_range.copy_(torch.from_numpy((begins << 32 | counts).T))
        if request.recv_stats is not None:
            request.recv_stats += total
        call.end_passes(1, time.perf_counter() - begin)

    def _output(self, shape: _C.PacketShape, result: LowLatencyDispatchResult, routing: Routing) -> _C.DispatchOutput:
        local, rows = result.recv_x.shape[:2]
        output = _C.DispatchOutput()
        output.rows, output.scales = address(result.recv_x), address(result.recv_scales)
        output.scale_block_rows, output.scale_block_stride = rows, rows * shape.scale_bytes
        output.scale_row_stride, output.scale_column_stride = 4, 4 * rows
        output.first_expert, output.num_local_experts = self._backend.rank * local, local
        output.num_topk, output.grouped = shape.num_topk, True
        output.grouped_rows = address(routing.grouped_rows)
        output.token_topk_weights = address(routing.token_weights)
        output.row_source = address(result.handle.recv_src_idx)
        return output

    def _receive_messages(self, call: Call, wait_stats: torch.Tensor | None) -> dict[int, Bytes]:
        """Wait for the call's messages; adds up, per rank, the nanoseconds until its message was there."""
        begin = time.perf_counter_ns()
        waits: dict[int, int] = {}
        messages, _ = self._backend.receive_call(
            call, lambda rank: waits.update({rank: time.perf_counter_ns() - begin})
        )
        if wait_stats is not None:
            for rank, nanoseconds in waits.items():
                wait_stats[rank] += nanoseconds
        return messages

    # --- combine -------------------------------------------------------------------------------------------------

    def check_routing(self, request: LowLatencyCombineRequest) -> None:
        """The combine must be of the routing that its handle's dispatch had, and that must have been received."""
        routing: Routing = request.handle._backend_state
        if not torch.equal(request.topk_idx, routing.topk_idx):
            raise ArgumentError("topk_idx must be what the handle's dispatch was given; it differs")
        if routing.topk_weights is not None and not _same_bits(request.topk_weights, routing.topk_weights):
            raise ArgumentError("topk_weights must be what the handle's dispatch was given; they differ")
        if not routing.source_begin:
            raise ArgumentError("handle: its dispatch has not been received; call its hook first (or it failed)")

    def combine(self, request: LowLatencyCombineRequest) -> tuple[torch.Tensor, Callable[[], None]]:
        """Send the experts' results; returns the result, and what fills it."""
        begin = time.perf_counter()
        backend, routing = self._backend, request.handle._backend_state
        call = backend.start("low_latency_combine", request.agreed())
        messages = {rank: self._results_for(call, request, routing, rank) for rank in [*backend.peers, backend.rank]}
        own = messages.pop(backend.rank)
        backend.send_call(call, messages)
        out = request.out
        if out is None:
            out = torch.empty(request.handle.num_tokens, request.handle.hidden, dtype=torch.bfloat16)
        combined = out
        request.topk_weights = request.topk_weights.clone()  # the caller's may change before the receive half runs
        receive = self._defer(call, lambda: self._receive_combine(call, request, routing, own, combined))
        call.counter.seconds += time.perf_counter() - begin
        return combined, receive

    def _results_for(self, call: Call, request: LowLatencyCombineRequest, routing: Routing, rank: int) -> Bytes:
        """The message with a source's rows: one per token where weights travelled, else one per selected expert."""
        begin, end = routing.source_begin[rank], routing.source_begin[rank + 1]
        hidden, x = request.handle.hidden, request.x
        if routing.token_weights is not None:
            sums = torch.empty(end - begin, hidden, dtype=torch.bfloat16)
            output = _C.CombineOutput()
            output.rows, output.hidden = address(sums), hidden
            _C.combine_grouped(
                address(x), hidden, address(routing.grouped_rows), address(routing.token_weights), begin, end - begin,
                request.handle.top_k, output, self._backend.runtime.num_threads,
            )  # fmt: skip
            return self._encode(call, request.form.use_logfmt, address(sums), None, end - begin, hidden)
        rows = routing.grouped_rows[begin:end].ravel()
        rows = np.ascontiguousarray(rows[rows >= 0])
        return self._encode(call, request.form.use_logfmt, address(x), rows, len(rows), hidden)

    def _encode(
        self, call: Call, use_logfmt: bool, x: int, selection: np.ndarray | None, num_rows: int, hidden: int
    ) -> Bytes:
        shape = _row_shape(hidden, use_logfmt)
        message = self._backend.message(call, (), shape.bytes(num_rows))
        base = address(message) + HEADER_BYTES
        if use_logfmt:
            packet = _C.Packet.begin(shape, num_rows, base)
            num_bytes = _C.encode_logfmt(x, hidden, address(selection), num_rows, hidden, packet.rows)
            return message[: packet.rows - address(message) + num_bytes]
        view = _C.RowView()
        view.num_rows, view.rows, view.row_stride, view.selection = num_rows, x, 2 * hidden, address(selection)
        self._backend.runtime.write_rows(shape, view, base)
        return message

    def _receive_combine(
        self, call: Call, request: LowLatencyCombineRequest, routing: Routing, own: Bytes, out: torch.Tensor
    ) -> None:
        begin = time.perf_counter()
        backend, handle = self._backend, request.handle
        messages = self._receive_messages(call, request.wait_stats)
        messages[backend.rank] = own
        contributions, missing = [], []
        decoded = []  # kept alive
        shape = _row_shape(handle.hidden, request.form.use_logfmt)
        for rank, num_rows in enumerate(self._rows_expected(handle, routing)):
            packet = _C.Packet.at(shape, address(messages[rank]) + HEADER_BYTES) if rank in messages else None
            # A rank that was masked during the dispatch never got the tokens.
            missing.append(packet is None or packet.num_rows != num_rows)
            if packet is None or missing[-1]:
                contributions.append(_C.Contribution())
            elif request.form.use_logfmt:
                rows = np.empty((packet.num_rows, handle.hidden), np.float32)
                _C.decode_logfmt(packet.rows, packet.num_rows, handle.hidden, address(rows))
                decoded.append(rows)
                contributions.append(_C.Contribution(address(rows), 4 * handle.hidden, True))
            else:
                contributions.append(_C.Contribution(packet.rows, shape.row_bytes))
        if any(missing) and not backend.enable_shrink:
            raise Error(f"low_latency_combine: ranks sent other rows than expected: {missing}")
        self._sum(request, routing, contributions, missing, out)
        call.end_passes(1, time.perf_counter() - begin)

    def _rows_expected(self, handle: LowLatencyHandle, routing: Routing) -> list[int]:
        """Rows that each rank sends back for this rank's tokens."""
        if handle.weighted:
            return routing.is_token_in_rank.sum(dim=0).tolist()
        local = handle.num_experts // self._backend.num_ranks
        ranks = routing.topk_idx[routing.topk_idx >= 0] // local
        return torch.bincount(ranks, minlength=self._backend.num_ranks).tolist()

    def _sum(
        self,
        request: LowLatencyCombineRequest,
        routing: Routing,
        contributions: list[_C.Contribution],
        missing: list[bool],
        out: torch.Tensor,
    ) -> None:
        num_tokens, threads = request.handle.num_tokens, self._backend.runtime.num_threads
        output = _C.CombineOutput()
        output.rows, output.hidden = address(out), request.handle.hidden
        if request.handle.weighted:
            flags = routing.is_token_in_rank & ~torch.tensor(missing)
            _C.combine_by_flags(contributions, address(flags), flags.stride(0), num_tokens, output, threads)
            return
        _C.combine_by_expert(
            contributions, missing, address(routing.topk_idx), address(request.topk_weights), num_tokens,
            request.handle.top_k, request.handle.num_experts // self._backend.num_ranks, output, threads,
        )  # fmt: skip


def _row_shape(hidden: int, use_logfmt: bool) -> _C.PacketShape:
    shape = _C.PacketShape()
    shape.row_bytes = _C.logfmt_row_bytes_limit(hidden) if use_logfmt else 2 * hidden
    return shape


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, NaN included."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
