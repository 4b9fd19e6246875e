"""Dispatch and combine the way one writes them without a library: torch indexing and mpi4py's Alltoallv.

It is a fair opponent, not a straw man: a token is sent once per rank, not once per expert, and the sum is one
`index_add_` in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI


@dataclass
class Routing:
    """Where this rank's tokens went: their indices in the order sent, and rows per rank sent and received."""

    sent_tokens: torch.Tensor
    num_sent: np.ndarray
    num_received: np.ndarray


class ByHand:
    """The two calls, on one communicator."""

    def __init__(self, comm: MPI.Intracomm, num_experts: int) -> None:
        self.comm = comm
        self.local_experts = num_experts // comm.size
        self.num_received = np.empty(comm.size, np.int64)

    def _exchange(self, rows: torch.Tensor, num_sent: np.ndarray, num_received: np.ndarray) -> torch.Tensor:
        row_bytes = (
            rows[0:1].numel() * rows.element_size() if len(rows) else rows.shape[1:].numel() * rows.element_size()
        )
        received = torch.empty(int(num_received.sum()), *rows.shape[1:], dtype=rows.dtype)
        self.comm.Alltoallv(
            [rows.view(torch.uint8).numpy(), (num_sent * row_bytes).tolist(), MPI.BYTE],
            [received.view(torch.uint8).numpy(), (num_received * row_bytes).tolist(), MPI.BYTE],
        )
        return received

    def dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Routing]:
        """Layout and dispatch: received rows, their local experts (-1 elsewhere) and weights, and the routing."""
        in_rank = torch.zeros(len(x), self.comm.size, dtype=torch.bool)
        in_rank.scatter_(1, topk_idx // self.local_experts, True)
        ranks, tokens = in_rank.t().nonzero(as_tuple=True)
        num_sent = torch.bincount(ranks, minlength=self.comm.size).numpy()
        self.comm.Alltoall(num_sent, self.num_received)
        routing = Routing(tokens, num_sent, self.num_received.copy())
        recv_x = self._exchange(x[tokens], num_sent, routing.num_received)
        recv_idx = self._exchange(topk_idx[tokens], num_sent, routing.num_received)
        recv_weights = self._exchange(topk_weights[tokens], num_sent, routing.num_received)
        local = recv_idx - self.comm.rank * self.local_experts
        here = (local >= 0) & (local < self.local_experts)
        return recv_x, torch.where(here, local, -1), torch.where(here, recv_weights, 0), routing

    def combine(self, x: torch.Tensor, routing: Routing, num_tokens: int) -> torch.Tensor:
        """Send the rows back, and sum each token's in float32."""
        back = self._exchange(x, routing.num_received, routing.num_sent)
        combined = torch.zeros(num_tokens, x.shape[1], dtype=torch.float32)
        combined.index_add_(0, routing.sent_tokens, back.float())
        return combined.bfloat16()
