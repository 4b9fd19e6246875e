"""Handles: what a dispatch remembers, and the matching combine (or a cached dispatch) needs.

They are ordinary dataclasses; every public field is documented and may be read. Letters: T tokens of this rank,
K top-k, R ranks, E experts, L = E / R local experts, M the most tokens a rank may send in a low-latency call,
N_recv the rows this rank received.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch


@dataclass(eq=False)
class DispatchHandle:
    """The routing of one `Buffer.dispatch`. `handle[0]` is `rank_prefix_matrix`.

    Attributes:
        rank_prefix_matrix: `[R, R] int32`; `[i][r]` is the end row, in rank r's `recv_x` (token layout), of what rank
            i sent.
        recv_rank_prefix_sum: `[R] int32`; this rank's column of it: the end row of each source rank.
        recv_src_idx: `[N_recv] int32`; the token's index on its source rank (-1 in rows left unused by
            `num_worst_tokens`).
        is_token_in_rank: `[T, R] bool`; where this rank's tokens went.
        num_tokens: T.
        top_k: K, 0 if the dispatch had no `topk_idx`.
        num_experts: E.
        expert_layout: `"token"` or `"grouped"`.
        num_recv_tokens_per_expert: `[L] int32`, rounded up to the alignment: rows of each expert in a grouped
            `recv_x`.
        grouped_rows: `[N_recv, K] int32`, in the grouped layout only: row of `recv_x` that holds the copy of received
            token i for its k-th expert; -1 where that expert is elsewhere.
        num_rows: rows of `recv_x`, padding included: what `combine` expects of its `x`.
        expert_alignment: as the dispatch was given it.
    """

    rank_prefix_matrix: torch.Tensor
    recv_rank_prefix_sum: torch.Tensor
    recv_src_idx: torch.Tensor
    is_token_in_rank: torch.Tensor
    num_tokens: int
    top_k: int
    num_experts: int
    expert_layout: str
    num_recv_tokens_per_expert: torch.Tensor
    grouped_rows: torch.Tensor | None
    num_rows: int
    expert_alignment: int
    _owner: object = field(repr=False, default=None)  # the buffer that made it
    _epoch: int = field(repr=False, default=0)  # equal on all ranks of one dispatch
    _num_recv_tokens: int | None = field(repr=False, default=None)  # None: not known on the CPU
    _group_sizes: list[int] = field(repr=False, default_factory=list)  # [L], rows without padding
    _backend_state: Any = field(repr=False, default=None)

    @property
    def num_recv_tokens(self) -> int:
        """N_recv, tokens received (without the padding of either layout).

        On CUDA, after a dispatch with `num_worst_tokens`, the first reading waits for the GPU.
        """
        if self._num_recv_tokens is None:
            if self.recv_rank_prefix_sum.is_cuda:  # it may be on its way on another stream than the current one
                torch.cuda.synchronize(self.recv_rank_prefix_sum.device)
            self._num_recv_tokens = int(self.recv_rank_prefix_sum[-1])
        return self._num_recv_tokens

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 0:
            return self.rank_prefix_matrix
        raise IndexError("DispatchHandle: only handle[0] (rank_prefix_matrix) is indexable; use the named fields")


@dataclass(eq=False)
class LowLatencyHandle:
    """The routing of one `Buffer.low_latency_dispatch`. `handle[0]` and `handle[1]` are its two tensors.

    With `return_recv_hook` the tensors are filled by the hook.

    Attributes:
        num_max_dispatch_tokens_per_rank: M.
        hidden: H.
        num_experts: E.
        num_tokens: T.
        top_k: K.
        weighted: whether `topk_weights` travelled along, so that combine sums a rank's experts before sending.
    """

    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    num_tokens: int
    top_k: int
    weighted: bool
    _owner: object = field(repr=False, default=None)
    _form: object = field(repr=False, default=None)  # shared by handles of calls that are alike
    _epoch: int = field(repr=False, default=0)
    _backend_state: Any = field(repr=False, default=None)

    @cached_property
    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        tensors: tuple[torch.Tensor, torch.Tensor] = self._backend_state.handle_tensors()  # views, which take time
        return tensors

    @property
    def recv_src_idx(self) -> torch.Tensor:
        """`[L, M*R] int32`; the token's index on its source rank, row by row of `recv_x`."""
        return self._tensors[0]

    @property
    def recv_layout_range(self) -> torch.Tensor:
        """`[L, R] int64`; `begin << 32 | count` of each source rank's rows."""
        return self._tensors[1]

    def shape(self, num_ranks: int) -> tuple[int, int, int]:
        """`(L, M*R, H)`: the shape of what the dispatch received, and of what combine takes."""
        return self.num_experts // num_ranks, self.num_max_dispatch_tokens_per_rank * num_ranks, self.hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in (0, 1):
            return self._tensors[index]
        raise IndexError("LowLatencyHandle: handle[0] is recv_src_idx, handle[1] is recv_layout_range")
