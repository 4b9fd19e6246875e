"""Dispatch on CPU.

In each pass
1. a rank writes its rows for the ranks of its node into their windows, and sends its rows for another node, once per
   node, to the rank with its own local rank there (its rail peer);
2. that rank forwards them into the windows of the ranks of its node that want them;
3. the ranks of a node tell each other that the pass is complete, and each moves what is in its window to its outputs.
A rank's own rows go straight from `x` to the outputs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ... import _C
from ...errors import ArgumentError, Error
from ...handles import DispatchHandle
from ...messenger import Bytes, Purpose
from ..addresses import address, array_at
from ..requests import DispatchRequest, DispatchResult
from .announcement import HEADER_BYTES
from .passes import packet_shapes, plan_passes

if TYPE_CHECKING:
    from .backend import CpuBackend


@dataclass
class Forwarded:
    """What this rank forwarded for its rail peer on another node; combine goes back the same way.

    Attributes:
        source_index: `[n] int32`, the tokens' indices on the peer, ascending.
        flags: `[n, ranks per node] bool`, which ranks of this node got each.
    """

    source_index: np.ndarray
    flags: np.ndarray


@dataclass
class Counts:
    """What all ranks know after the announcements.

    Attributes:
        tokens: tokens of every rank.
        capacity: rows that every rank's outputs are limited to, -1 for no limit.
        per_rank: `[R, R]`, tokens that rank i sends to rank r; None in a cached dispatch, as is
        per_expert: `[R, E]`, tokens of rank i that selected expert e.
    """

    tokens: list[int]
    capacity: list[int]
    per_rank: np.ndarray | None
    per_expert: np.ndarray | None


def dispatch(backend: CpuBackend, request: DispatchRequest) -> DispatchResult:
    """Move every token once to each rank that holds one of its experts. Collective."""
    return _Dispatch(backend, request).run()


class _Dispatch:
    """One call."""

    def __init__(self, backend: CpuBackend, request: DispatchRequest) -> None:
        self.backend, self.request = backend, request
        self.runtime, self.topology = backend.runtime, backend.topology
        self.rank, self.num_ranks = backend.rank, backend.num_ranks
        self.num_tokens, self.hidden = request.x.shape
        self.top_k = 0 if request.topk_idx is None else request.topk_idx.shape[1]
        self.flags = address(request.is_token_in_rank)
        self.shape, self.rail_shape = packet_shapes(backend, request)
        self.tokens = self._token_view()
        self.arrived = [0] * self.num_ranks  # rows of every source that are in the outputs
        self.forwarded: dict[int, list[Forwarded]] = {rank: [] for rank in self._rail_peers()}

    def run(self) -> DispatchResult:
        begin = time.perf_counter()
        self.call = self.backend.start("dispatch", self.request.agreed())
        passes = plan_passes(self.backend, self.shape, self.rail_shape, self.num_tokens)
        self._announce()
        self._write_to_node(*passes.tokens(0, self.num_tokens))  # overlaps with the exchange of the counts
        counts = self._receive_counts()
        handle = self.request.handle or self._make_handle(counts)
        result = self._allocate(handle, counts)
        num_passes = passes.count(max(counts.tokens))
        for number in range(num_passes):
            first, last = passes.tokens(number, self.num_tokens)
            if number > 0:
                self._write_to_node(first, last)
            self._run_pass(number, num_passes, first, last)
        self._check_arrived()
        self.backend.finish_sends(self.call)
        if self.request.handle is None:
            handle._backend_state = {rank: _join(parts) for rank, parts in self.forwarded.items()}
        self.call.end_passes(num_passes, time.perf_counter() - begin)
        return result

    # --- before the passes ---------------------------------------------------------------------------------------

    def _token_view(self) -> _C.RowView:
        request, view = self.request, _C.RowView()
        view.rows = address(request.x)
        view.row_stride = request.x.stride(0) * request.x.element_size()
        view.scales = address(request.scales)
        if request.scales is not None:
            view.scale_row_stride, view.scale_column_stride = (4 * stride for stride in request.scales.stride())
        view.topk_index = address(request.topk_idx)
        view.topk_weights = address(request.topk_weights)
        return view

    def _rail_peers(self) -> list[int]:
        return [rank for rank in self.topology.rail if rank != self.rank]

    def _announce(self) -> None:
        """Tell everybody how many tokens go where (in an uncached dispatch), and what fits here."""
        layout = self.request.layout
        payload = np.empty(0, np.uint8)
        if layout is not None:
            numbers = (layout.num_tokens_per_rank, layout.num_tokens_per_expert)
            payload = torch.cat(numbers).numpy().view(np.uint8)
        message = self.backend.message(self.call, self._extra(), len(payload))
        message[HEADER_BYTES:] = payload
        self.own_counts = message
        self.backend.send_call(self.call, dict.fromkeys(self.backend.peers, message))

    def _extra(self) -> tuple[int, int]:
        return self.num_tokens, self.request.num_worst_tokens or -1

    def _receive_counts(self) -> Counts:
        messages, extra = self.backend.receive_call(self.call)
        messages[self.rank], extra[self.rank] = self.own_counts, self._extra()
        tokens, capacity = zip(*(extra[rank] for rank in range(self.num_ranks)), strict=True)
        if self.request.layout is None:
            return Counts(list(tokens), list(capacity), None, None)
        numbers = np.stack([messages[rank][HEADER_BYTES:].view(np.int32) for rank in range(self.num_ranks)])
        counts = Counts(list(tokens), list(capacity), numbers[:, : self.num_ranks], numbers[:, self.num_ranks :])
        self._check_capacity(counts)
        return counts

    def _check_capacity(self, counts: Counts) -> None:
        """Every rank knows what every rank will receive: all raise the same error, and nothing was written."""
        assert counts.per_rank is not None and counts.per_expert is not None
        rows = counts.per_rank.sum(axis=0)
        if self.request.grouped:
            rows = self._aligned(counts.per_expert.sum(axis=0)).reshape(self.num_ranks, -1).sum(axis=1)
        for rank, capacity in enumerate(counts.capacity):
            if 0 <= capacity < rows[rank]:
                raise ArgumentError(
                    f"num_worst_tokens={capacity} is too small on rank {rank}, which receives {rows[rank]} rows"
                )

    def _aligned(self, counts: np.ndarray) -> np.ndarray:
        return -(-counts // self.request.expert_alignment) * self.request.expert_alignment

    def _make_handle(self, counts: Counts) -> DispatchHandle:
        assert counts.per_rank is not None and counts.per_expert is not None
        assert self.request.layout is not None
        matrix = torch.from_numpy(counts.per_rank.cumsum(axis=0, dtype=np.int32))
        experts = self._local_experts(counts.per_expert.shape[1])
        per_expert = self._aligned(counts.per_expert[:, experts].sum(axis=0, dtype=np.int32))
        num_recv = int(matrix[-1, self.rank])
        num_rows = int(per_expert.sum()) if self.request.grouped else num_recv
        return DispatchHandle(
            rank_prefix_matrix=matrix,
            recv_rank_prefix_sum=matrix[:, self.rank].contiguous(),
            recv_src_idx=torch.empty(
                max(num_recv, 0 if self.request.grouped else self.request.num_worst_tokens), dtype=torch.int32
            ),
            is_token_in_rank=self.request.layout.is_token_in_rank,
            num_tokens=self.num_tokens,
            top_k=self.top_k,
            num_experts=counts.per_expert.shape[1],
            expert_layout="grouped" if self.request.grouped else "token",
            num_recv_tokens_per_expert=torch.from_numpy(per_expert),
            grouped_rows=torch.empty(num_recv, self.top_k, dtype=torch.int32) if self.request.grouped else None,
            num_rows=self.request.num_worst_tokens or num_rows,
            expert_alignment=self.request.expert_alignment,
            _epoch=self.call.epoch,
            _num_recv_tokens=num_recv,
        )

    def _local_experts(self, num_experts: int) -> slice:
        per_rank = num_experts // self.num_ranks
        return slice(self.rank * per_rank, (self.rank + 1) * per_rank)

    def _allocate(self, handle: DispatchHandle, counts: Counts) -> DispatchResult:
        """Allocate what the call returns, and say to the core where everything goes."""
        request, rows, cached = self.request, handle.num_rows, self.request.handle is not None
        recv_x = torch.empty(rows, self.hidden, dtype=request.x.dtype)
        scales = (
            None if request.scales is None else torch.empty(rows, request.scales.shape[1], dtype=request.scales.dtype)
        )
        idx = weights = None
        if request.topk_idx is not None:
            columns = () if request.grouped else (self.top_k,)
            idx = torch.empty(rows, *columns, dtype=torch.int64)
            weights = None if request.topk_weights is None else torch.empty(rows, *columns, dtype=torch.float32)
        self.ends: list[int] = handle.recv_rank_prefix_sum.tolist()
        self.starts = [0, *self.ends[:-1]]
        self.next_row = np.zeros((self.num_ranks, 1), np.int64)
        if not cached and not request.grouped:
            _mark_unused(handle.num_recv_tokens, idx, weights, handle.recv_src_idx)
        if request.grouped:
            self._lay_out_groups(handle, counts, recv_x, scales, idx, weights)
        experts = self._local_experts(handle.num_experts)
        output = self.output = _C.DispatchOutput()
        output.rows, output.scales = address(recv_x), address(scales)
        output.scale_row_stride = self.shape.scale_bytes
        output.first_expert, output.num_local_experts = experts.start, experts.stop - experts.start
        output.num_topk = handle.top_k
        output.grouped, output.know_grouped_rows = request.grouped, cached
        output.token_source = 0 if cached else address(handle.recv_src_idx)
        output.topk_index, output.topk_weights = address(idx), address(weights)
        output.grouped_rows = address(handle.grouped_rows)
        per_expert = [] if cached or request.num_worst_tokens else handle.num_recv_tokens_per_expert.tolist()
        return DispatchResult(recv_x, scales, idx, weights, per_expert, None if cached else handle)

    def _lay_out_groups(
        self,
        handle: DispatchHandle,
        counts: Counts,
        recv_x: torch.Tensor,
        scales: torch.Tensor | None,
        idx: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> None:
        """Find the rows of every (source, expert), and clear the rows of padding."""
        ends = handle.num_recv_tokens_per_expert.cumsum(0).tolist()
        begins = [0, *ends[:-1]]
        if counts.per_expert is not None:
            local = counts.per_expert[:, self._local_experts(handle.num_experts)].astype(np.int64)
            handle._group_sizes = local.sum(axis=0).tolist()
            self.next_row = np.asarray(begins) + local.cumsum(axis=0) - local
        for begin, end, size in zip(begins, ends, handle._group_sizes, strict=True):
            for tensor, value in ((recv_x.view(torch.uint8), 0), (scales, 0), (idx, -1), (weights, 0)):
                if tensor is not None:
                    tensor[begin + size : end] = value
        _mark_unused(ends[-1], idx, weights)

    # --- a pass --------------------------------------------------------------------------------------------------

    def _write_to_node(self, first: int, last: int) -> None:
        for peer in self.topology.local_ranks:
            if peer != self.rank:
                slot = self.runtime.slot(peer, self.backend.parity, self.rank)
                self.runtime.pack_tokens(self.shape, self.tokens, self.flags, [peer], first, last, slot)

    def _run_pass(self, number: int, total: int, first: int, last: int) -> None:
        self._send_over_rails(first, last)
        from_rails = self._forward(number, total)
        self.backend.notify_node()
        self.arrived[self.rank] += self.runtime.deliver_own(
            self.shape,
            self.tokens,
            self.flags,
            first,
            last,
            self.output,
            *self._room(self.rank),
            self._groups(self.rank),
        )
        self.backend.wait_for_node(self.call, number, total)
        for source in range(self.num_ranks):
            if source in from_rails:
                self._deliver(source, self.rail_shape, address(from_rails[source]), self.topology.local_rank)
            elif source != self.rank:
                self._deliver(source, self.shape, self.runtime.slot(self.rank, self.backend.parity, source), -1)
        self.backend.passes += 1

    def _send_over_rails(self, first: int, last: int) -> None:
        for peer in self._rail_peers():
            ranks = self.topology.ranks_of_node[self.topology.node_of_rank[peer]]
            message = np.empty(self.rail_shape.bytes(last - first), np.uint8)
            num_bytes = self.runtime.pack_tokens(
                self.rail_shape, self.tokens, self.flags, list(ranks), first, last, address(message)
            )
            self.backend.messenger.send(peer, Purpose.NETWORK, self.backend.passes, message[:num_bytes])

    def _forward(self, number: int, total: int) -> dict[int, Bytes]:
        """Receive what came over the rails and put it into this node's windows. Returns the packets."""
        what = f"pass {number + 1} of {total}, over the network,"
        packets = self.backend.receive(self.call, Purpose.NETWORK, self.backend.passes, self._rail_peers(), what)
        for source, packet in packets.items():
            for local_rank, peer in enumerate(self.topology.local_ranks):
                if peer != self.rank:
                    slot = self.runtime.slot(peer, self.backend.parity, source)
                    self.runtime.forward_packet(self.rail_shape, address(packet), local_rank, self.shape, slot)
            if self.request.handle is None:
                self.forwarded[source].append(self._remember(packet))
        return packets

    def _remember(self, message: Bytes) -> Forwarded:
        packet = _C.Packet.at(self.rail_shape, address(message))
        bits = array_at(packet.masks, np.uint8, (packet.num_rows, self.rail_shape.mask_bytes))
        ranks = len(self.topology.local_ranks)
        return Forwarded(
            array_at(packet.source_index, np.int32, (packet.num_rows,)).copy(),
            np.unpackbits(bits, axis=1, count=ranks, bitorder="little").astype(bool),
        )

    def _room(self, source: int) -> tuple[int, int]:
        """The received tokens that the next rows of a source become: the first, and the one behind the last."""
        return self.starts[source] + self.arrived[source], self.ends[source]

    def _groups(self, source: int) -> int:
        return address(self.next_row[source])

    def _deliver(self, source: int, shape: _C.PacketShape, packet: int, bit: int) -> None:
        self.arrived[source] += self.runtime.deliver_packet(
            shape, packet, bit, self.output, *self._room(source), self._groups(source)
        )

    def _check_arrived(self) -> None:
        expected = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        if self.arrived != expected:
            raise Error(f"dispatch: rows that arrived, {self.arrived}, are not those that were announced, {expected}")


def _mark_unused(
    begin: int, idx: torch.Tensor | None, weights: torch.Tensor | None, source_index: torch.Tensor | None = None
) -> None:
    """Mark the output rows from `begin` on, which `num_worst_tokens` left unused."""
    for tensor, value in ((idx, -1), (weights, 0), (source_index, -1)):
        if tensor is not None:
            tensor[begin:] = value


def _join(parts: list[Forwarded]) -> Forwarded:
    if not parts:
        return Forwarded(np.empty(0, np.int32), np.empty((0, 0), bool))
    return Forwarded(
        np.concatenate([part.source_index for part in parts]), np.concatenate([part.flags for part in parts])
    )
