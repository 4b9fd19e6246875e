"""`ReferenceBuffer`: `dispatch` and `combine` with the signatures of `hpc_moe.Buffer`, for any floating dtype.

For comparisons and for `torch.autograd.gradcheck`, which needs float64. Every call gathers all ranks' inputs on every
rank and computes with `hpc_moe.testing.reference`: slow, no time limit, CPU only, one node. Not for production.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from hpc_moe.errors import ArgumentError
from hpc_moe.events import EventOverlap
from hpc_moe.handles import DispatchHandle
from hpc_moe.testing import reference
from hpc_moe.testing.comm import gather_tensors
from hpc_moe.testing.reference import Routing, Rows


@dataclass(frozen=True)
class _State:
    routing: Routing
    expert_alignment: int
    num_worst_tokens: int


class ReferenceBuffer:
    """A slow stand-in for `hpc_moe.Buffer` that keeps the dtype of what it is given.

    Attributes:
        rank: of this process in `group`.
        group_size: R.
        group: the communicator (the one passed in, not a copy).
        num_sms: 0; there for code that reads it.
        supports_any_dtype: True; `dispatch` and `combine` take any floating dtype, float64 included.
    """

    supports_any_dtype = True

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.group = comm
        self.rank: int = comm.Get_rank()
        self.group_size: int = comm.Get_size()
        self.num_sms = 0

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """As `Buffer.get_dispatch_layout` on one node."""
        result = reference.layout(topk_idx, num_experts, self.group_size)
        return (
            result.num_tokens_per_rank,
            result.num_tokens_per_rdma_rank,
            result.num_tokens_per_expert,
            result.is_token_in_rank,
            EventOverlap(),
        )

    def dispatch(
        self,
        x: Rows,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Any = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        num_experts: int | None = None,
        expert_layout: str = "token",
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, DispatchHandle | None, EventOverlap]:
        """As `Buffer.dispatch`, with `x` of any dtype. Collective.

        Needs one of: `handle`; `topk_idx` with `num_experts` or the layout; the layout alone.

        Raises:
            ArgumentError: none of these is complete, or `num_worst_tokens` is too small on some rank.
        """
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ArgumentError("ReferenceBuffer.dispatch: topk_idx and topk_weights must be None with a handle")
            recv_x = self._dispatch(handle._backend_state, x, None, handle.expert_layout).recv_x
            return recv_x, None, None, None, None, EventOverlap()

        state = _State(
            self._gather_routing(is_token_in_rank, num_tokens_per_expert, topk_idx, num_experts),
            expert_alignment,
            num_worst_tokens,
        )
        result = self._dispatch(state, x, topk_weights, expert_layout)
        routing = state.routing
        new_handle = DispatchHandle(
            rank_prefix_matrix=result.rank_prefix_matrix,
            recv_rank_prefix_sum=result.recv_rank_prefix_sum,
            recv_src_idx=result.recv_src_idx,
            is_token_in_rank=routing.is_token_in_rank[self.rank],
            num_tokens=routing.is_token_in_rank[self.rank].shape[0],
            _num_recv_tokens=result.num_recv_tokens,
            top_k=0 if topk_idx is None else topk_idx.shape[1],
            num_experts=routing.num_experts,
            expert_layout=expert_layout,
            num_recv_tokens_per_expert=torch.tensor(
                routing.aligned_counts(self.rank, expert_alignment), dtype=torch.int32
            ),
            grouped_rows=result.grouped_rows,
            num_rows=result.num_rows,
            expert_alignment=expert_alignment,
            _owner=self,
            _backend_state=state,
        )
        return (
            result.recv_x,
            result.recv_topk_idx,
            result.recv_topk_weights,
            result.num_recv_tokens_per_expert_list,
            new_handle,
            EventOverlap(),
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Any = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """As `Buffer.combine`; the results have the dtypes of `x` and `topk_weights`, sums are made in float64.

        Collective.

        Raises:
            ArgumentError: `x` has not as many rows as the dispatch returned.
        """
        if x.shape[0] != handle.num_rows:
            raise ArgumentError(
                f"ReferenceBuffer.combine: x must have {handle.num_rows} rows, as recv_x had; got {x.shape[0]}"
            )
        state: _State = handle._backend_state
        biases = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
        result = reference.combine(
            state.routing,
            gather_tensors(self.group, x),
            self.rank,
            topk_weights=None if topk_weights is None else gather_tensors(self.group, topk_weights),
            biases=[each.detach() for each in biases],
            expert_alignment=state.expert_alignment,
            expert_layout=handle.expert_layout,
        )
        weights = None
        if topk_weights is not None and result.topk_weights is not None:
            weights = result.topk_weights.value.to(topk_weights.dtype)
        return result.x.value.to(x.dtype), weights, EventOverlap()

    def _gather_routing(
        self,
        is_token_in_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        num_experts: int | None,
    ) -> Routing:
        if num_experts is None and num_tokens_per_expert is not None:
            num_experts = num_tokens_per_expert.numel()
        if num_experts is None:
            raise ArgumentError("ReferenceBuffer.dispatch: needs num_experts, the layout or a handle")
        if topk_idx is not None:
            return Routing.from_topk(gather_tensors(self.group, topk_idx), num_experts)
        if is_token_in_rank is None or num_tokens_per_expert is None:
            raise ArgumentError(
                "ReferenceBuffer.dispatch: without topk_idx it needs is_token_in_rank and num_tokens_per_expert"
            )
        masks = gather_tensors(self.group, is_token_in_rank)
        return Routing(masks, gather_tensors(self.group, num_tokens_per_expert), None, num_experts)

    def _dispatch(
        self, state: _State, x: Rows, topk_weights: torch.Tensor | None, expert_layout: str
    ) -> reference.Dispatched:
        if state.num_worst_tokens:
            for peer in range(self.group_size):
                needed = reference.num_recv_rows(state.routing, peer, state.expert_alignment, expert_layout)
                if needed > state.num_worst_tokens:
                    raise ArgumentError(
                        f"ReferenceBuffer.dispatch: num_worst_tokens={state.num_worst_tokens}, but rank {peer} "
                        f"receives {needed} rows"
                    )
        gathered: list[Rows]
        if isinstance(x, tuple):
            gathered = list(zip(gather_tensors(self.group, x[0]), gather_tensors(self.group, x[1]), strict=True))
        else:
            gathered = list(gather_tensors(self.group, x))
        return reference.dispatch(
            state.routing,
            gathered,
            None if topk_weights is None else gather_tensors(self.group, topk_weights),
            self.rank,
            expert_alignment=state.expert_alignment,
            num_worst_tokens=state.num_worst_tokens,
            expert_layout=expert_layout,
        )
