"""How a call that moves any number of tokens is cut into passes that fit the buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import _C
from ...errors import ArgumentError

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
