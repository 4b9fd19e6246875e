"""Types of the C++ core. Addresses are of memory that the caller keeps alive; 0 stands for null."""

from collections.abc import Sequence
from typing import Any

__version__: str
cuda_archs: str  # what the CUDA kernels were compiled for, e.g. "80;90"; "" without CUDA
nvshmem_build_version: str  # of the headers, e.g. "3.4.5"; "" without NVSHMEM

class PacketShape:
    row_bytes: int
    scale_bytes: int
    num_topk: int
    mask_bytes: int
    has_source_index: bool
    has_topk_index: bool
    has_weights: bool
    def __init__(self) -> None: ...
    def bytes(self, num_rows: int) -> int: ...
    def capacity(self, bytes: int) -> int: ...

class Packet:
    @staticmethod
    def at(shape: PacketShape, base: int) -> Packet: ...
    @staticmethod
    def begin(shape: PacketShape, num_rows: int, base: int) -> Packet: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def masks(self) -> int: ...
    @property
    def source_index(self) -> int: ...
    @property
    def topk_weights(self) -> int: ...

class RowView:
    num_rows: int
    selection: int
    rows: int
    row_stride: int
    scales: int
    scale_row_stride: int
    scale_column_stride: int
    source_index: int
    topk_index: int
    topk_weights: int
    def __init__(self) -> None: ...
    @staticmethod
    def of_packet(shape: PacketShape, packet: Packet) -> RowView: ...

class DispatchOutput:
    rows: int
    scales: int
    scale_block_rows: int
    scale_block_stride: int
    scale_row_stride: int
    scale_column_stride: int
    first_expert: int
    num_local_experts: int
    num_topk: int
    grouped: bool
    know_grouped_rows: bool
    token_source: int
    topk_index: int
    topk_weights: int
    grouped_rows: int
    token_topk_weights: int
    row_source: int
    def __init__(self) -> None: ...

class Contribution:
    def __init__(self, rows: int = 0, row_stride: int = 0, is_float32: bool = False, topk_weights: int = 0) -> None: ...

class CombineOutput:
    rows: int
    topk_weights: int
    num_topk: int
    hidden: int
    is_float32: bool
    def __init__(self) -> None: ...
    def add_bias(self, address: int) -> None: ...

def combine_by_flags(
    contributions: Sequence[Contribution],
    flags: int,
    flags_stride: int,
    num_tokens: int,
    output: CombineOutput,
    num_threads: int,
) -> None: ...
def combine_by_expert(
    contributions: Sequence[Contribution],
    skip: Sequence[bool],
    topk_index: int,
    topk_weights: int,
    num_tokens: int,
    num_topk: int,
    experts_per_rank: int,
    output: CombineOutput,
    num_threads: int,
) -> None: ...
def combine_grouped(
    x: int,
    x_row_stride: int,
    grouped_rows: int,
    token_weights: int,
    begin: int,
    num_tokens: int,
    num_topk: int,
    output: CombineOutput,
    num_threads: int,
) -> None: ...
def cast_to_fp8(
    x: int,
    x_row_stride: int,
    num_rows: int,
    hidden: int,
    round_scale: bool,
    use_ue8m0: bool,
    q: int,
    scales: int,
    num_threads: int,
) -> None: ...
def encode_logfmt(x: int, x_row_stride: int, selection: int, num_rows: int, hidden: int, target: int) -> int: ...
def logfmt_row_bytes_limit(hidden: int) -> int: ...
def decode_logfmt(encoded: int, num_rows: int, hidden: int, rows: int) -> None: ...
def count_local_experts(
    view: RowView, num_topk: int, first_expert: int, num_local_experts: int, counts: int
) -> None: ...

class CpuRuntime:
    def __init__(
        self,
        rank: int,
        node_of_rank: Sequence[int],
        local_windows: Sequence[int],
        window_bytes: int,
        low_latency_mode: bool,
        num_threads: int,
    ) -> None: ...
    def get_local_device_id(self) -> int: ...
    def get_local_device_uuid(self) -> bytes: ...
    def get_local_ipc_handle(self) -> bytes: ...
    def get_num_rdma_ranks(self) -> int: ...
    def get_rdma_rank(self) -> int: ...
    def get_root_rdma_rank(self) -> int: ...
    def check_peers(self, uuids: Sequence[bytes]) -> None: ...
    def get_local_nvshmem_unique_id(self) -> bytes: ...
    def sync(self, device_ids: Sequence[int], ipc_handles: Sequence[bytes], root_unique_id: bytes) -> None: ...
    def is_available(self) -> bool: ...
    def destroy(self) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    def slot(self, owner: int, parity: int, slot: int) -> int: ...
    def layout(
        self,
        topk_index: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        per_rank: int,
        per_node: int,
        per_expert: int,
        is_token_in_rank: int,
    ) -> str: ...
    def pack_tokens(
        self,
        shape: PacketShape,
        tokens: RowView,
        is_token_in_rank: int,
        ranks: Sequence[int],
        first: int,
        last: int,
        base: int,
    ) -> int: ...
    def deliver_own(
        self,
        shape: PacketShape,
        tokens: RowView,
        is_token_in_rank: int,
        first: int,
        last: int,
        output: DispatchOutput,
        begin: int,
        end: int,
        next_row: int,
    ) -> int: ...
    def deliver_packet(
        self, shape: PacketShape, base: int, bit: int, output: DispatchOutput, begin: int, end: int, next_row: int
    ) -> int: ...
    def forward_packet(
        self, shape: PacketShape, base: int, bit: int, target_shape: PacketShape, target: int
    ) -> None: ...
    def write_rows(self, shape: PacketShape, view: RowView, base: int) -> int: ...

# --- only in builds with CUDA

CUDA_MAX_RANKS: int
CUDA_MAX_TOP_K: int
CUDA_MAX_LOCAL_EXPERTS: int
LOW_LATENCY_FIXED_BYTES: int

def low_latency_bytes(num_max_tokens: int, hidden: int, top_k: int, num_ranks: int, num_put_ranks: int = 0) -> int: ...

MAX_LOW_LATENCY_RANKS: int
MAX_LOW_LATENCY_TOKENS: int
MAX_COMING_TOKENS: int
MAX_LOW_LATENCY_EXPERTS: int
MAX_LOW_LATENCY_TOP_K: int
is_stress_build: bool

def layout_num_chunks(num_tokens: int) -> int: ...

class LayoutParams:
    num_tokens: int
    num_experts: int
    top_k: int
    report: bool
    topk_idx: int
    given_in_rank: int
    given_per_rank: int
    given_per_expert: int
    in_rank: int
    send_position: int
    expert_position: int
    per_rank: int
    per_expert: int
    chunk_counts: int
    def __init__(self) -> None: ...

class ExchangeParams:
    num_local_experts: int
    expert_alignment: int
    grouped: bool
    values_matter: bool
    per_rank: int
    per_expert: int
    rank_prefix_matrix: int
    recv_rank_prefix_sum: int
    aligned_per_expert: int
    expert_ranges: int
    source_begin: int
    def __init__(self) -> None: ...

class DispatchParams:
    num_tokens: int
    row_bytes: int
    num_scales: int
    top_k: int
    experts_per_rank: int
    num_rows: int
    has_topk_index: bool
    has_topk_weights: bool
    grouped: bool
    cached: bool
    marks_unused: bool
    x: int
    x_stride: int
    scales: int
    scale_token_stride: int
    scale_channel_stride: int
    topk_index: int
    topk_weights: int
    send_position: int
    expert_position: int
    rank_prefix_matrix: int
    source_begin: int
    expert_ranges: int
    recv_rows: int
    recv_scales: int
    recv_topk_index: int
    recv_topk_weights: int
    recv_source_index: int
    grouped_rows: int
    def __init__(self) -> None: ...

class CombineParams:
    num_tokens: int
    row_bytes: int
    top_k: int
    has_weights: bool
    grouped: bool
    x: int
    x_stride: int
    topk_weights: int
    recv_source_index: int
    grouped_rows: int
    rank_prefix_matrix: int
    send_position: int
    combined: int
    combined_weights: int
    def __init__(self) -> None: ...
    def set_bias(self, index: int, address: int) -> None: ...

class LowLatencyDispatchParams:
    num_tokens: int
    num_max_tokens: int
    hidden: int
    top_k: int
    num_local_experts: int
    weighted: bool
    round_scale: bool
    use_ue8m0: bool

class LowLatencyCombineParams:
    num_tokens: int
    num_max_tokens: int
    hidden: int
    top_k: int
    num_local_experts: int
    weighted: bool
    use_logfmt: bool

class RoutingParts:
    @property
    def layout_range(self) -> int: ...
    @property
    def recv_count(self) -> int: ...
    @property
    def recv_src_idx(self) -> int: ...
    @property
    def end(self) -> int: ...

def lay_out_routing(params: LowLatencyDispatchParams, num_ranks: int) -> RoutingParts: ...

class Window:
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class CudaRuntime:
    def __init__(
        self,
        rank: int,
        node_of_rank: Sequence[int],
        device: int,
        window_bytes: int,
        timeout: float,
        shares_gpu: bool,
        bulk_copies: bool,
        link_rate: int = -1,
        stress_seed: int = 0,
        mutation: int = 0,
    ) -> None: ...
    def get_local_device_id(self) -> int: ...
    def get_local_device_uuid(self) -> bytes: ...
    def get_local_ipc_handle(self) -> bytes: ...
    def get_num_rdma_ranks(self) -> int: ...
    def get_rdma_rank(self) -> int: ...
    def get_root_rdma_rank(self) -> int: ...
    def check_peers(self, uuids: Sequence[bytes]) -> None: ...
    def get_local_nvshmem_unique_id(self) -> bytes: ...
    def sync(self, device_ids: Sequence[int], ipc_handles: Sequence[bytes], root_unique_id: bytes) -> None: ...
    def is_available(self) -> bool: ...
    def close_peers(self) -> None: ...
    def free(self) -> None: ...
    def destroy(self) -> None: ...
    def abandon(self) -> None: ...
    @property
    def window(self) -> Window: ...
    @property
    def control_bytes(self) -> int: ...
    @property
    def pool_offset(self) -> int: ...
    @property
    def pool_bytes(self) -> int: ...
    def num_slots(self, row_bytes: int, num_scales: int, top_k: int) -> int: ...
    def launch_layout(self, params: LayoutParams, stream: int) -> None: ...
    def launch_exchange(
        self, params: ExchangeParams, agreed: Sequence[int], num_tokens: int, capacity: int, stream: int
    ) -> int: ...
    def wait_for_exchange(self, number: int, stream: int) -> int: ...
    def launch_dispatch(
        self,
        params: DispatchParams,
        agreed: Sequence[int],
        landing: Sequence[int],
        behind_exchange: bool,
        num_blocks: int,
        stream: int,
    ) -> None: ...
    def launch_combine(self, params: CombineParams, agreed: Sequence[int], num_blocks: int, stream: int) -> None: ...
    def launch_reject(self, operation: int, text: str, behind_exchange: bool, stream: int) -> None: ...
    def set_regions(self, regions: Sequence[int], num_bytes: int, most_tagged_bytes: int, may_mask: bool) -> None: ...
    def set_puts(self, ranks: int, pes: Sequence[int], queue_pairs: Sequence[int], launchers: int) -> None: ...
    def mask_ranks(self, ranks: int, stream: int) -> None: ...
    def query_masks(self, masked: int, stream: int) -> None: ...
    def low_latency_state(self) -> tuple[int, int]: ...
    def restart_low_latency(self, epoch: int, masked: int) -> None: ...
    def launch_low_latency_dispatch(
        self,
        params: LowLatencyDispatchParams,
        scale_bytes: int,
        agreed: Sequence[int],
        x: int,
        x_stride: int,
        topk_index: int,
        topk_weights: int,
        recv_rows: int,
        recv_scales: int,
        routing: int,
        recv_stats: int,
        wait_stats: int,
        halves: int,
        stream: int,
    ) -> None: ...
    def launch_low_latency_combine(
        self,
        params: LowLatencyCombineParams,
        agreed: Sequence[int],
        x: int,
        topk_index: int,
        topk_weights: int,
        routing: int,
        combined: int,
        wait_stats: int,
        halves: int,
        stream: int,
    ) -> None: ...
    def launch_low_latency_reject(self, operation: int, text: str, stream: int) -> None: ...
    def has_error(self) -> bool: ...
    def has_timeout(self) -> bool: ...
    def take_error(self, num_ranks: int) -> dict[str, Any] | None: ...
    def exchanged_counts(self, num_local_experts: int) -> tuple[int, list[int]]: ...
    def passes(self, operation: int) -> tuple[int, int]: ...
