"""Types of the C++ core. Addresses are of memory that the caller keeps alive; 0 stands for null."""

from collections.abc import Sequence

__version__: str

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
