"""How a call that moves any number of tokens is cut into passes that fit the buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import _C
from ...errors import ArgumentError
from ..requests import CombineRequest, DispatchRequest

if TYPE_CHECKING:
    from .backend import CpuBackend


@dataclass(frozen=True)
class Passes:
    """Pass p carries tokens [p * tokens_per_pass, (p + 1) * tokens_per_pass) of every rank.

    Cutting by token index, not by row, lets every rank compute what every other sends in a pass without asking.
    """

    tokens_per_pass: int

    def count(self, num_tokens: int) -> int:
        """Passes that carry `num_tokens` tokens."""
        return -(-num_tokens // self.tokens_per_pass)

    def tokens(self, number: int, num_tokens: int) -> tuple[int, int]:
        """First token of a pass, and the one behind its last, on a rank that has `num_tokens`."""
        first = min(number * self.tokens_per_pass, num_tokens)
        return first, min(first + self.tokens_per_pass, num_tokens)


def packet_shapes(
    backend: CpuBackend, request: DispatchRequest | CombineRequest
) -> tuple[_C.PacketShape, _C.PacketShape]:
    """What a row of the call consists of, in packets inside a node and in packets between nodes."""
    shapes = []
    for between_nodes in (False, True):
        shape = _C.PacketShape()
        if isinstance(request, DispatchRequest):
            shape.row_bytes = request.x.shape[1] * request.x.element_size()
            shape.scale_bytes = 0 if request.scales is None else 4 * request.scales.shape[1]
            shape.num_topk = 0 if request.topk_idx is None else request.topk_idx.shape[1]
            shape.mask_bytes = -(-len(backend.topology.local_ranks) // 8) if between_nodes else 0
            shape.has_source_index = request.handle is None
            shape.has_topk_index = request.topk_idx is not None
        else:  # a grouped combine's rows inside a node are float32 sums of a token's copies
            grouped = request.handle.expert_layout == "grouped"
            shape.row_bytes = request.x.shape[1] * (4 if grouped and not between_nodes else 2)
            shape.num_topk = request.handle.top_k
        shape.has_weights = request.topk_weights is not None
        shapes.append(shape)
    return shapes[0], shapes[1]


def plan_passes(backend: CpuBackend, node_shape: _C.PacketShape, rail_shape: _C.PacketShape, num_tokens: int) -> Passes:
    """As many tokens a pass as the buffers hold, in packets of these shapes inside a node and between nodes.

    Where neither limits, `num_tokens`. Equal on all ranks, but for that.

    Raises:
        ArgumentError: not even one token fits.
    """
    limits = []
    if len(backend.topology.local_ranks) > 1:
        limits.append(("num_nvl_bytes", node_shape.capacity(backend.runtime.slot_bytes)))
    if backend.topology.num_nodes > 1:  # for every node, a packet to it and one from it
        bytes_per_packet = backend.num_rdma_bytes // (2 * backend.topology.num_nodes)
        limits.append(("num_rdma_bytes", rail_shape.capacity(bytes_per_packet)))
    for argument, capacity in limits:
        if capacity < 1:
            raise ArgumentError(f"{argument} is too small for one token of this hidden size and top_k")
    return Passes(max(1, min((capacity for _, capacity in limits), default=num_tokens)))
