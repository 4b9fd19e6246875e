"""Combine on CUDA: what is allocated, and the launch. `csrc/cuda/combine.cu` says what the kernel does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from ... import _C
from ..addresses import address
from ..requests import CombineRequest, CombineResult
from .dispatch import Entered, aligned_rows

if TYPE_CHECKING:
    from .backend import CudaBackend


def combine(backend: CudaBackend, request: CombineRequest) -> CombineResult:
    """Launch a combine. Collective."""
    begin = time.perf_counter()
    handle = request.handle
    with backend.lane(request.streams) as lane:
        lane.uses(request.x, request.topk_weights, *request.biases)
        x = aligned_rows(request.x)
        biases = [aligned_rows(bias.contiguous()) for bias in request.biases]
        given_weights = None if request.topk_weights is None else request.topk_weights.contiguous()
        combined = lane.empty(handle.num_tokens, x.shape[1], dtype=torch.bfloat16)
        weights = None
        if request.topk_weights is not None:
            weights = lane.empty(handle.num_tokens, handle.top_k, dtype=torch.float32)
        params = _C.CombineParams()
        params.num_tokens, params.row_bytes, params.top_k = handle.num_tokens, 2 * x.shape[1], handle.top_k
        params.has_weights = request.topk_weights is not None
        params.grouped = handle.expert_layout == "grouped"
        params.x, params.x_stride = address(x), 2 * x.stride(0)
        params.topk_weights = address(given_weights)
        params.recv_source_index, params.grouped_rows = address(handle.recv_src_idx), address(handle.grouped_rows)
        params.rank_prefix_matrix = address(handle.rank_prefix_matrix)
        params.send_position = address(handle._backend_state.send_position)
        for index, bias in enumerate(biases):
            params.set_bias(index, address(bias))
        params.combined, params.combined_weights = address(combined), address(weights)
        agreed = list(request.agreed().values())
        backend.enter(Entered.ALL)
        backend.runtime.launch_combine(params, agreed, request.streams.num_sms, lane.stream.cuda_stream)
    backend.counters["combine"].seconds += time.perf_counter() - begin
    return CombineResult(combined, weights, backend.known_event(lane.event))
