"""`Config` and the arithmetic of buffer sizes: how many bytes make a call fit in one pass.

What a size means to the kernels is the backends' business; here are only the numbers that a user asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

# Largest hidden size, in channels, and the number that every hidden size must be a multiple of.
MAX_HIDDEN = 16384
HIDDEN_MULTIPLE = 128

# The size hints make one pass of this many tokens a rank fit, with up to this many experts a token.
HINT_TOKENS = 4096
HINT_TOP_K = 16

# On CPU a window starts with a page of its own; then come two slots (one per parity of the pass counter) for every
# rank. On CUDA half of it is one slot for every rank, and half the pool; the control data come on top.
_WINDOW_HEADER_BYTES = 4096
# A low-latency region on CUDA (csrc/cuda/low_latency.h): what a token has in front of its row; a row's chunk, in the
# row and on the wire; and the most experts that a token selects there.
_LOW_LATENCY_DETAILS_BYTES = 256
_LOW_LATENCY_CHUNK_BYTES, _LOW_LATENCY_WIRE_CHUNK_BYTES = 1024, 1664
_LOW_LATENCY_TOP_K = 16
_MOST_RANKS_OF_NODE = 8
# One row of the largest hidden size in float32 (a grouped combine), its top-k data, and the alignment of its arrays.
_MINIMUM_SLOT_BYTES = 80 * 1024


def minimum_nvl_bytes(num_ranks: int) -> int:
    """The smallest window, in bytes, with which every call works (in several passes)."""
    return _WINDOW_HEADER_BYTES + 2 * num_ranks * _MINIMUM_SLOT_BYTES


def minimum_rdma_bytes(num_nodes: int) -> int:
    """The smallest `num_rdma_bytes`, in bytes, with which every normal call between nodes works."""
    return 2 * num_nodes * _MINIMUM_SLOT_BYTES


def low_latency_staging_bytes(num_tokens: int, hidden: int, num_experts: int) -> int:
    """Bytes of one combine staging buffer `[L, M*R, H]` bf16 (L*R = num_experts)."""
    return -(-num_experts * num_tokens * hidden * 2 // 4096) * 4096


def low_latency_region_bytes(num_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes that low-latency calls of these sizes need: what travels (twice), and two staging buffers.

    With more ranks than a node has, outboxes are among them (see `low_latency_outbox_bytes`).
    """
    row = -(-2 * hidden // _LOW_LATENCY_CHUNK_BYTES) * _LOW_LATENCY_WIRE_CHUNK_BYTES
    packets = num_ranks * (_LOW_LATENCY_DETAILS_BYTES + row)
    travelling = num_tokens * (packets + max(num_ranks, _LOW_LATENCY_TOP_K) * row) + 3 * 4096
    if num_ranks > _MOST_RANKS_OF_NODE:
        outbox = num_tokens * (_LOW_LATENCY_DETAILS_BYTES + (1 + _LOW_LATENCY_TOP_K) * row) + 2 * 4096
        travelling += (num_ranks - 1) * outbox
    return 2 * (travelling + low_latency_staging_bytes(num_tokens, hidden, num_experts))


def low_latency_outbox_bytes(num_rdma_bytes: int, num_ranks: int) -> int:
    """Bytes that come on top for each rank that is reached by puts: enough for all calls that fit `num_rdma_bytes`.

    What is put to a rank lies in its outbox first: M packets, and M rows for each of up to 16 columns, all twice. That
    is 2 M (17 row + 256) bytes, with `row` those of a row. The calls need at least 2 M (16 row + R (row + 256)), as
    `low_latency_region_bytes` has it for the ranks of a node; of that, the outbox is no more than 17 / (16 + R). (Its
    two parts end at pages: for these, the pages there are enough.) The staging buffers, which may be much larger, are
    left out: how many experts there will be is not known here. So for more ranks, which are on several nodes in any
    case, outboxes are part of the size hint, and nothing comes on top.
    """
    if num_ranks > _MOST_RANKS_OF_NODE:
        return 0
    most = _LOW_LATENCY_TOP_K
    return -(-num_rdma_bytes * (most + 1) // (most + num_ranks))


def _slot_bytes(hidden_bytes: int) -> int:
    # A row, its scales (4 bytes for 128 channels), index, weight and position for each expert, its token, alignment.
    bytes_per_row = hidden_bytes + hidden_bytes // 32 + 16 * HINT_TOP_K + 4 + 128
    return -(-(HINT_TOKENS * bytes_per_row + 8 * 64) // 64) * 64


@dataclass(frozen=True)
class Config:
    """Tuning of `dispatch` and `combine`. CUDA uses `num_sms`; all other values are accepted, and need not be set.

    Attributes:
        num_sms: the most streaming multiprocessors that a CUDA call takes. On CPU it means nothing.
        num_max_nvl_chunked_send_tokens: tokens sent at a time inside a node.
        num_max_nvl_chunked_recv_tokens: tokens a receiver has room for inside a node.
        num_max_rdma_chunked_send_tokens: the same between nodes.
        num_max_rdma_chunked_recv_tokens: the same between nodes.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """`num_nvl_bytes`, in bytes, with which 4096 tokens a rank fit in one pass.

        A combine in the grouped layout takes two: there, the sums of a token's copies travel as float32.

        Args:
            hidden_bytes: bytes of one token (2 * hidden for bf16).
            num_ranks: R.
        """
        return _WINDOW_HEADER_BYTES + 2 * num_ranks * max(_slot_bytes(hidden_bytes), _MINIMUM_SLOT_BYTES)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """`num_rdma_bytes`, in bytes, with which 4096 tokens a rank fit in one pass, if every rank is a node."""
        return 2 * num_ranks * max(_slot_bytes(hidden_bytes), _MINIMUM_SLOT_BYTES)
