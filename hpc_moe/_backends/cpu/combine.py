"""Combine on CPU: dispatch backwards.

In each pass
1. a rank writes its rows for every source into the window of the rank of its own node that forwarded them (on one
   node: the source itself), and the ranks of the node tell each other that they are there;
2. with several nodes, that rank sums, per token, the rows of its node's ranks, in rank order, and sends the sums as
   bf16 over its rail to the source;
3. the source sums what it got, in the order of ranks (of nodes), adds the biases, and rounds once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from ... import _C
from ...messenger import Bytes, Purpose
from ..addresses import address, array_at
from ..requests import CombineRequest, CombineResult
from .dispatch import Forwarded
from .passes import packet_shapes, plan_passes

if TYPE_CHECKING:
    from .backend import CpuBackend


def combine(backend: CpuBackend, request: CombineRequest) -> CombineResult:
    """Sum every token's rows over the ranks it went to. Collective."""
    return _Combine(backend, request).run()


class _Combine:
    """One call."""

    def __init__(self, backend: CpuBackend, request: CombineRequest) -> None:
        self.backend, self.request, self.handle = backend, request, request.handle
        self.runtime, self.topology = backend.runtime, backend.topology
        self.rank, self.num_ranks = backend.rank, backend.num_ranks
        self.hidden, self.top_k = request.x.shape[1], request.handle.top_k
        self.grouped = request.handle.expert_layout == "grouped"
        self.has_weights = request.topk_weights is not None
        self.shape, self.rail_shape = packet_shapes(backend, request)
        self.token_weights = self._weights_per_token()
        ends = self.handle.recv_rank_prefix_sum.tolist()
        self.starts = [0, *ends[:-1]]
        source_index = self.handle.recv_src_idx.numpy()
        self.source_index = [source_index[start:end] for start, end in zip(self.starts, ends, strict=True)]
        num_tokens = self.handle.num_tokens
        self.combined = torch.empty(num_tokens, self.hidden, dtype=torch.bfloat16)
        self.combined_weights = torch.empty(num_tokens, self.top_k) if self.has_weights else None

    def run(self) -> CombineResult:
        begin = time.perf_counter()
        self.call = self.backend.start("combine", self.request.agreed())
        num_tokens = self.handle.num_tokens
        passes = plan_passes(self.backend, self.shape, self.rail_shape, num_tokens)
        message = self.backend.message(self.call, (num_tokens,), 0)
        self.backend.send_call(self.call, dict.fromkeys(self.backend.peers, message))
        self._write_to_node(*self._all_tokens(passes.tokens_per_pass, 0))
        _, extra = self.backend.receive_call(self.call)
        num_passes = passes.count(max([num_tokens, *(tokens for (tokens,) in extra.values())]))
        for number in range(num_passes):
            self.range = self._all_tokens(passes.tokens_per_pass, number)
            if number > 0:
                self._write_to_node(*self.range)
            self.backend.notify_node()
            self.backend.wait_for_node(self.call, number, num_passes)
            first, last = passes.tokens(number, num_tokens)
            if self.topology.num_nodes == 1:
                flags = self.handle.is_token_in_rank[first:last]
                self._sum(self._contributions(0, self.rank), flags, first, last)
            else:
                self._sum_over_nodes(number, num_passes, first, last)
            self.backend.passes += 1
        self.backend.finish_sends(self.call)
        self.call.end_passes(num_passes, time.perf_counter() - begin)
        return CombineResult(self.combined, self.combined_weights)

    def _weights_per_token(self) -> torch.Tensor | None:
        """`[N_recv, K]`: in the grouped layout, the rows' weights are put back into the columns that they came from."""
        weights, rows = self.request.topk_weights, self.handle.grouped_rows
        if weights is None or rows is None:
            return weights
        padded = torch.cat([weights, weights.new_zeros(1)])  # the last one stands for "expert elsewhere", -1
        return padded[rows.long()]

    @staticmethod
    def _all_tokens(tokens_per_pass: int, number: int) -> tuple[int, int]:
        """Token indices of a pass, on whichever rank: it ends where the rank's tokens do."""
        return number * tokens_per_pass, (number + 1) * tokens_per_pass

    def _rows(self, source: int, first: int, last: int) -> tuple[int, int]:
        """This rank's rows that came from tokens [first, last) of a source."""
        begin, end = np.searchsorted(self.source_index[source], (first, last))
        return self.starts[source] + int(begin), self.starts[source] + int(end)

    # --- 1: rows to the ranks that sum them ----------------------------------------------------------------------

    def _write_to_node(self, first: int, last: int) -> None:
        """The slot says whose rows they are: it is that of the rank at (source's node, writer's local rank)."""
        for ranks in self.topology.ranks_of_node:
            for local_rank, source in enumerate(ranks):
                target = self.topology.local_ranks[local_rank]
                if target != self.rank:
                    slot = self.runtime.slot(target, self.backend.parity, ranks[self.topology.local_rank])
                    self._write_rows(*self._rows(source, first, last), slot)

    def _write_rows(self, begin: int, end: int, slot: int) -> None:
        if self.grouped:
            packet = _C.Packet.begin(self.shape, end - begin, slot)
            self._sum_copies(begin, end, packet.rows)
            if self.token_weights is not None:
                shape = (end - begin, self.top_k)
                array_at(packet.topk_weights, np.float32, shape)[:] = self.token_weights[begin:end].numpy()
            return
        view = _C.RowView()
        view.num_rows = end - begin
        view.row_stride = 2 * self.request.x.stride(0)
        view.rows = address(self.request.x) + begin * view.row_stride
        view.topk_weights = self._weights_address(begin)
        self.runtime.write_rows(self.shape, view, slot)

    def _sum_copies(self, begin: int, end: int, target: int) -> None:
        """Sum the copies of received tokens [begin, end) that the experts of this rank gave back, to float32."""
        output = _C.CombineOutput()
        output.rows, output.hidden, output.is_float32 = target, self.hidden, True
        _C.combine_grouped(
            address(self.request.x),
            self.request.x.stride(0),
            address(self.handle.grouped_rows),
            0,
            begin,
            end - begin,
            self.top_k,
            output,
            self.runtime.num_threads,
        )

    def _weights_address(self, row: int) -> int:
        return 0 if self.token_weights is None else address(self.token_weights) + 4 * row * self.top_k

    # --- 2 and 3: sums -------------------------------------------------------------------------------------------

    def _contributions(self, node: int, source: int) -> list[_C.Contribution]:
        """What the ranks of this node have for `source`, the rank of `node` whose rows this rank sums."""
        contributions = []
        for local_rank, rank in enumerate(self.topology.local_ranks):
            if rank == self.rank:
                contributions.append(self._own_contribution(*self._rows(source, *self.range)))
                continue
            slot = self.topology.ranks_of_node[node][local_rank]
            packet = _C.Packet.at(self.shape, self.runtime.slot(self.rank, self.backend.parity, slot))
            contributions.append(self._contribution(packet, self.shape, self.grouped))
        return contributions

    def _own_contribution(self, begin: int, end: int) -> _C.Contribution:
        if not self.grouped:
            stride = 2 * self.request.x.stride(0)
            return _C.Contribution(
                address(self.request.x) + begin * stride, stride, False, self._weights_address(begin)
            )
        self.own_sums = np.empty((end - begin, self.hidden), np.float32)
        self._sum_copies(begin, end, address(self.own_sums))
        return _C.Contribution(address(self.own_sums), 4 * self.hidden, True, self._weights_address(begin))

    @staticmethod
    def _contribution(packet: _C.Packet, shape: _C.PacketShape, is_float32: bool) -> _C.Contribution:
        weights = packet.topk_weights if shape.has_weights else 0
        return _C.Contribution(packet.rows, shape.row_bytes, is_float32, weights)

    def _sum(self, contributions: list[_C.Contribution], flags: torch.Tensor, first: int, last: int) -> None:
        """Sum contributions into tokens [first, last) of the result."""
        output = _C.CombineOutput()
        output.rows, output.hidden = address(self.combined) + 2 * first * self.hidden, self.hidden
        if self.combined_weights is not None:
            output.topk_weights = address(self.combined_weights) + 4 * first * self.top_k
            output.num_topk = self.top_k
        for bias in self.request.biases:
            output.add_bias(address(bias) + 2 * first * self.hidden)
        _C.combine_by_flags(
            contributions, address(flags), flags.stride(0), last - first, output, self.runtime.num_threads
        )

    def _sum_over_nodes(self, number: int, total: int, first: int, last: int) -> None:
        forwarded: dict[int, Forwarded] = self.handle._backend_state
        packets: dict[int, Bytes] = {}
        for node, source in enumerate(self.topology.rail):
            if source == self.rank:
                flags = self.handle.is_token_in_rank[first:last, list(self.topology.local_ranks)].numpy()
                flags = flags[flags.any(axis=1)]
            else:
                part = forwarded[source]
                begin, end = np.searchsorted(part.source_index, self.range)
                flags = part.flags[begin:end]
            packets[source] = self._partial_sums(self._contributions(node, source), np.ascontiguousarray(flags))
        for source, packet in packets.items():
            if source != self.rank:
                self.backend.messenger.send(source, Purpose.NETWORK, self.backend.passes, packet)
        others = [rank for rank in self.topology.rail if rank != self.rank]
        what = f"pass {number + 1} of {total}, over the network,"
        sums = self.backend.receive(self.call, Purpose.NETWORK, self.backend.passes, others, what)
        sums[self.rank] = packets[self.rank]
        contributions = [
            self._contribution(_C.Packet.at(self.rail_shape, address(sums[rank])), self.rail_shape, False)
            for rank in self.topology.rail
        ]
        in_rank = self.handle.is_token_in_rank[first:last]
        in_node = [in_rank[:, list(ranks)].any(dim=1) for ranks in self.topology.ranks_of_node]
        self._sum(contributions, torch.stack(in_node, dim=1).contiguous(), first, last)

    def _partial_sums(self, contributions: list[_C.Contribution], flags: np.ndarray) -> Bytes:
        """A packet with one bf16 row for each row of `flags`: the sum of the contributions that it names."""
        message = np.empty(self.rail_shape.bytes(len(flags)), np.uint8)
        packet = _C.Packet.begin(self.rail_shape, len(flags), address(message))
        output = _C.CombineOutput()
        output.rows, output.hidden, output.num_topk = packet.rows, self.hidden, self.top_k
        output.topk_weights = packet.topk_weights if self.has_weights else 0
        _C.combine_by_flags(contributions, address(flags), flags.shape[1], len(flags), output, self.runtime.num_threads)
        return message
