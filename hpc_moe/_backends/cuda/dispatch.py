"""Dispatch on CUDA: what is allocated where, and which kernels run. `csrc/cuda/` says what they do.

An uncached dispatch is a layout, an exchange of counts, and the dispatch kernel; the CPU waits for the counts, to
allocate the results, unless `num_worst_tokens` says how large they are. A cached one is the dispatch kernel alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import torch

from ... import _C
from ...handles import DispatchHandle
from ..addresses import address
from ..requests import DispatchRequest, DispatchResult, Layout
from .streams import Lane

if TYPE_CHECKING:
    from .backend import CudaBackend


class Entered(Enum):
    """What a call under way has launched that the peers wait for."""

    NOTHING = 0
    EXCHANGE = 1  # and what follows is still to be launched
    ALL = 2
    ALL_AND_WAITED = 3  # and the CPU has waited for the exchange


@dataclass
class Counted:
    """What the layout kernels make.

    Attributes:
        layout: counts and flags.
        send_position: `[T, R] int32`, a token's index among those for a rank; None if not for an exchange.
        expert_position: `[T, K] int32`, its index among those for an expert; None but for the grouped layout.
    """

    layout: Layout
    send_position: torch.Tensor | None
    expert_position: torch.Tensor | None


@dataclass
class HandleState:
    """What a handle keeps for the kernels.

    Attributes:
        send_position: see `Counted`.
        expert_ranges: `[L, 2] int32`, grouped layout: end of an expert's rows without padding and with it.
        source_begin: `[R, L] int32`, grouped layout: first row of a source's tokens for an expert.
    """

    send_position: torch.Tensor
    expert_ranges: torch.Tensor
    source_begin: torch.Tensor


@dataclass
class Results:
    """Outputs of a dispatch; `landing` are the addresses that peers may write, or empty."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    src_idx: torch.Tensor | None
    landing: list[int]


def launch_layout(
    backend: CudaBackend,
    lane: Lane,
    topk_idx: torch.Tensor | None,
    given: Layout | None,
    num_experts: int,
    *,
    for_exchange: bool,
    grouped: bool,
) -> Counted:
    """Count tokens per rank and expert. Wrong values go to the exchange, or else to the host at once."""
    ranks, device = backend.num_ranks, backend.device
    source = topk_idx if topk_idx is not None else given.is_token_in_rank  # type: ignore[union-attr]
    num_tokens, top_k = source.shape[0], 0 if topk_idx is None else topk_idx.shape[1]
    empty = lane.own if for_exchange else lane.empty  # a handle's, or the caller's
    in_rank = empty(num_tokens, ranks, dtype=torch.bool)
    per_rank, per_expert = empty(ranks, dtype=torch.int32), empty(num_experts, dtype=torch.int32)
    positions = empty(num_tokens, ranks, dtype=torch.int32) if for_exchange else None
    expert_positions = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device) if grouped else None
    chunks = _C.layout_num_chunks(num_tokens)
    scratch = torch.empty(chunks, ranks + num_experts, dtype=torch.int32, device=device)
    params = _C.LayoutParams()
    params.num_tokens, params.num_experts, params.top_k = num_tokens, num_experts, top_k
    params.report = not for_exchange
    params.topk_idx = address(topk_idx)
    if given is not None:
        params.given_in_rank = address(given.is_token_in_rank)
        params.given_per_rank = address(given.num_tokens_per_rank)
        params.given_per_expert = address(given.num_tokens_per_expert)
    params.in_rank, params.per_rank, params.per_expert = address(in_rank), address(per_rank), address(per_expert)
    params.send_position, params.expert_position = address(positions), address(expert_positions)
    params.chunk_counts = address(scratch)
    backend.runtime.launch_layout(params, lane.stream.cuda_stream)
    per_node, nodes = None, backend.topology.ranks_of_node
    if len(nodes) > 1:
        per_node = count_by_node(in_rank, nodes, empty(len(nodes), dtype=torch.int32))
    return Counted(Layout(per_rank, per_node, per_expert, in_rank), positions, expert_positions)


def count_by_node(in_rank: torch.Tensor, ranks_of_node: Sequence[Sequence[int]], out: torch.Tensor) -> torch.Tensor:
    """Into `out`, `[N] int32`: how many tokens go to each node, by `in_rank`, `[T, R] bool`.

    By columns, for an index made of lists would come from the CPU, which a captured call must not read.
    """
    columns = in_rank.unbind(dim=1)
    to_nodes = [torch.stack([columns[rank] for rank in ranks]).any(dim=0) for ranks in ranks_of_node]
    return torch.sum(torch.stack(to_nodes), dim=1, dtype=torch.int32, out=out)


def dispatch(backend: CudaBackend, request: DispatchRequest) -> DispatchResult:
    """Launch a dispatch; wait on the CPU for the counts if it needs them. Collective."""
    begin = time.perf_counter()
    with backend.lane(request.streams) as lane:
        lane.uses(request.x, request.scales, request.topk_idx, request.topk_weights)
        request = _contiguous(request)
        result = (_cached if request.handle is not None else _uncached)(backend, lane, request)
    result.event = backend.known_event(lane.event)
    backend.counters["dispatch"].seconds += time.perf_counter() - begin
    return result


def _contiguous(request: DispatchRequest) -> DispatchRequest:
    """The request with contiguous routing. Copies are made on the lane's stream, behind what makes the originals."""
    layout = request.layout
    if layout is not None:
        layout = Layout(
            layout.num_tokens_per_rank.contiguous(),
            layout.num_tokens_per_rdma_rank,
            layout.num_tokens_per_expert.contiguous(),
            layout.is_token_in_rank.contiguous(),
        )
    idx, weights = request.topk_idx, request.topk_weights
    return replace(
        request,
        topk_idx=None if idx is None else idx.contiguous(),
        topk_weights=None if weights is None else weights.contiguous(),
        layout=layout,
    )


def _uncached(backend: CudaBackend, lane: Lane, request: DispatchRequest) -> DispatchResult:
    given = request.layout
    if given is not None:
        lane.uses(given.num_tokens_per_rank, given.num_tokens_per_expert, given.is_token_in_rank)
    counted = launch_layout(
        backend, lane, request.topk_idx, given, request.num_experts, for_exchange=True, grouped=request.grouped
    )
    handle = _make_handle(backend, lane, request, counted)
    number = _launch_exchange(backend, lane, request, counted, handle)
    per_expert: list[int] = []
    if request.num_worst_tokens == 0:
        backend.enter(Entered.ALL)  # if the wait fails, nothing can be said to the peers
        waiting = time.perf_counter()
        rows = backend.runtime.wait_for_exchange(number, lane.stream.cuda_stream)
        backend.counters["dispatch"].wait_seconds += time.perf_counter() - waiting
        if rows < 0:
            raise backend.failure()
        handle.num_rows = rows
        handle._num_recv_tokens, per_expert = backend.runtime.exchanged_counts(len(handle.num_recv_tokens_per_expert))
    backend.enter(Entered.EXCHANGE)
    num_received = request.num_worst_tokens or handle.num_recv_tokens
    results = _allocate(backend, lane, request, handle, num_received)
    assert results.src_idx is not None
    handle.recv_src_idx = results.src_idx
    if request.grouped:
        handle.grouped_rows = lane.own(num_received, handle.top_k, dtype=torch.int32)
    _launch(backend, lane, request, handle, results, counted.expert_position)
    return DispatchResult(results.x, results.scales, results.topk_idx, results.topk_weights, per_expert, handle)


def _cached(backend: CudaBackend, lane: Lane, request: DispatchRequest) -> DispatchResult:
    assert request.handle is not None
    results = _allocate(backend, lane, request, request.handle, 0)
    _launch(backend, lane, request, request.handle, results, None)
    return DispatchResult(results.x, results.scales, None, None, [], None)


def _make_handle(backend: CudaBackend, lane: Lane, request: DispatchRequest, counted: Counted) -> DispatchHandle:
    """The handle, whose tensors the exchange fills."""
    ranks, local = backend.num_ranks, request.num_experts // backend.num_ranks
    sizes = (ranks * ranks, ranks, local, 2 * local, ranks * local)
    matrix, sums, per_expert, ranges, begins = lane.own(sum(sizes), dtype=torch.int32).split(sizes)
    assert counted.send_position is not None
    return DispatchHandle(
        rank_prefix_matrix=matrix.view(ranks, ranks),
        recv_rank_prefix_sum=sums,
        recv_src_idx=sums,  # until the results are allocated
        is_token_in_rank=counted.layout.is_token_in_rank,
        num_tokens=request.x.shape[0],
        top_k=0 if request.topk_idx is None else request.topk_idx.shape[1],
        num_experts=request.num_experts,
        expert_layout="grouped" if request.grouped else "token",
        num_recv_tokens_per_expert=per_expert,
        grouped_rows=None,
        num_rows=request.num_worst_tokens,
        expert_alignment=request.expert_alignment,
        _epoch=backend.epoch,
        _backend_state=HandleState(counted.send_position, ranges, begins),
    )


def _launch_exchange(
    backend: CudaBackend, lane: Lane, request: DispatchRequest, counted: Counted, handle: DispatchHandle
) -> int:
    params = _C.ExchangeParams()
    params.num_local_experts = request.num_experts // backend.num_ranks
    params.expert_alignment = request.expert_alignment
    params.grouped = request.grouped
    params.values_matter = request.num_worst_tokens == 0
    params.per_rank = address(counted.layout.num_tokens_per_rank)
    params.per_expert = address(counted.layout.num_tokens_per_expert)
    params.rank_prefix_matrix = address(handle.rank_prefix_matrix)
    params.recv_rank_prefix_sum = address(handle.recv_rank_prefix_sum)
    params.aligned_per_expert = address(handle.num_recv_tokens_per_expert)
    state: HandleState = handle._backend_state
    params.expert_ranges, params.source_begin = address(state.expert_ranges), address(state.source_begin)
    capacity = request.num_worst_tokens or -1
    agreed = list(request.agreed().values())
    number: int = backend.runtime.launch_exchange(params, agreed, handle.num_tokens, capacity, lane.stream.cuda_stream)
    return number


def _allocate(
    backend: CudaBackend, lane: Lane, request: DispatchRequest, handle: DispatchHandle, num_received: int
) -> Results:
    """The results: in the pool if that is possible, so that peers write them where they stay."""
    rows, hidden, cached = handle.num_rows, request.x.shape[1], request.handle is not None
    shapes: list[tuple[tuple[int, ...], torch.dtype] | None] = [
        ((rows, hidden), request.x.dtype),
        None,
        None,
        None,
        None,
    ]
    if request.scales is not None:
        shapes[1] = ((rows, request.scales.shape[1]), request.scales.dtype)
    if not cached:
        columns = () if request.grouped else (handle.top_k,)
        if request.topk_idx is not None:
            shapes[2] = ((rows, *columns), torch.int64)
        if request.topk_weights is not None:
            shapes[3] = ((rows, *columns), torch.float32)
        shapes[4] = ((num_received,), torch.int32)
    if not (lane.is_capturing or request.grouped or rows == 0 or backend.num_ranks == 1):
        # Two blocks: the small tensors often outlive the rows.
        pooled = _in_pool(backend, lane, shapes[:2], False), _in_pool(backend, lane, shapes[2:], True)
        if pooled[0] is not None and pooled[1] is not None:
            backend.counters["dispatch"].pooled += 1
            x, scales, idx, weights, source = *pooled[0], *pooled[1]
            assert x is not None
            return Results(x, scales, idx, weights, source, [address(t) for t in (x, scales, idx, weights, source)])
    x, scales, idx, weights = (None if s is None else lane.empty(*s[0], dtype=s[1]) for s in shapes[:4])
    source = None if shapes[4] is None else lane.own(*shapes[4][0], dtype=shapes[4][1])  # the handle's
    assert x is not None
    return Results(x, scales, idx, weights, source, [])


def _in_pool(
    backend: CudaBackend,
    lane: Lane,
    shapes: list[tuple[tuple[int, ...], torch.dtype] | None],
    from_end: bool,
) -> list[torch.Tensor | None] | None:
    """Tensors of these shapes in one block of the pool; None if there is no room."""
    sizes = [0 if s is None else -(-torch.Size(s[0]).numel() * s[1].itemsize // 128) * 128 for s in shapes]
    if sum(sizes) == 0:
        return [None] * len(shapes)
    assert backend.pool is not None
    block = backend.pool.allocate(sum(sizes), lane.stream, from_end)
    if block is None:
        return None
    tensors: list[torch.Tensor | None] = []
    begin = 0
    for shape, size in zip(shapes, sizes, strict=True):
        if shape is None:
            tensors.append(None)
            continue
        count = torch.Size(shape[0]).numel() * shape[1].itemsize
        tensors.append(block[begin : begin + count].view(shape[1]).view(shape[0]))
        begin += size
    return tensors


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """The same rows where 16-byte copies can read them: begins and strides are multiples of 16 bytes."""
    size = x.element_size()
    if x.data_ptr() % 16 == 0 and (x.shape[0] < 2 or x.stride(0) * size % 16 == 0) and x.stride(1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _launch(
    backend: CudaBackend,
    lane: Lane,
    request: DispatchRequest,
    handle: DispatchHandle,
    results: Results,
    expert_position: torch.Tensor | None,
) -> None:
    x, cached, state = aligned_rows(request.x), request.handle is not None, handle._backend_state
    params = _C.DispatchParams()
    params.num_tokens, params.num_rows = handle.num_tokens, handle.num_rows
    params.row_bytes = x.shape[1] * x.element_size()
    params.top_k, params.experts_per_rank = handle.top_k, handle.num_experts // backend.num_ranks
    params.has_topk_index = request.topk_idx is not None
    params.has_topk_weights = request.topk_weights is not None
    params.grouped, params.cached = request.grouped, cached
    params.marks_unused = not cached and request.num_worst_tokens > 0
    params.x, params.x_stride = address(x), x.stride(0) * x.element_size()
    if request.scales is not None:
        params.num_scales = request.scales.shape[1]
        params.scales = address(request.scales)
        params.scale_token_stride, params.scale_channel_stride = request.scales.stride()
    params.topk_index, params.topk_weights = address(request.topk_idx), address(request.topk_weights)
    params.send_position, params.expert_position = address(state.send_position), address(expert_position)
    params.rank_prefix_matrix = address(handle.rank_prefix_matrix)
    params.source_begin, params.expert_ranges = address(state.source_begin), address(state.expert_ranges)
    params.recv_rows, params.recv_scales = address(results.x), address(results.scales)
    params.recv_topk_index, params.recv_topk_weights = address(results.topk_idx), address(results.topk_weights)
    params.recv_source_index = address(results.src_idx)
    params.grouped_rows = address(handle.grouped_rows)
    waited = not cached and request.num_worst_tokens == 0
    backend.enter(Entered.ALL_AND_WAITED if waited else Entered.ALL)
    backend.runtime.launch_dispatch(
        params,
        list(request.agreed().values()),
        results.landing,
        not cached,
        request.streams.num_sms,
        lane.stream.cuda_stream,
    )
