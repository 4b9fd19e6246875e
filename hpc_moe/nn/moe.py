"""Mixture-of-experts feed-forward layers: `ExpertParallelMoE` over the ranks of a communicator, `MoE` in one process.

Both are the same function of the same full weights, and share router and experts. Not for capacity limits or dropped
tokens: every selected expert sees every token that selected it.

Letters: T tokens of this rank, H hidden, F width of an expert, K top-k, E experts, R ranks, L = E / R local experts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mpi4py import MPI

from hpc_moe.errors import ArgumentError
from hpc_moe.nn.collectives import check_same_ranks
from hpc_moe.nn.copying import copy_sharing
from hpc_moe.nn.functional import combine, dispatch
from hpc_moe.nn.router import RouterOutput, TopKRouter


class Experts(torch.nn.Module):
    """Some of the experts of a layer: gated feed-forward networks `(silu(x A) * (x B)) C`.

    Each expert's weights are drawn from `seed` and its global index: the full set is the same however it is split.

    Args:
        hidden: H.
        ffn_hidden: F.
        first_expert: global index of the first one held here.
        num_local_experts: how many.
        seed: of the initial weights; give every layer another one, or their experts are identical.
        dtype: of the weights. Rows of another one are converted on the way in and on the way out.
        device: of the weights.

    Attributes:
        w_in: `[L, H, 2 F]`, A and B side by side.
        w_out: `[L, F, H]`, C.
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        first_expert: int,
        num_local_experts: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        w_in = torch.empty(num_local_experts, hidden, 2 * ffn_hidden)
        w_out = torch.empty(num_local_experts, ffn_hidden, hidden)
        for local in range(num_local_experts):
            generator = torch.Generator().manual_seed((seed << 20) + first_expert + local + 1)
            w_in[local].normal_(0.0, hidden**-0.5, generator=generator)
            w_out[local].normal_(0.0, ffn_hidden**-0.5, generator=generator)
        self.w_in = torch.nn.Parameter(w_in.to(device=device, dtype=dtype))
        self.w_out = torch.nn.Parameter(w_out.to(device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, num_rows_per_expert: Sequence[int]) -> torch.Tensor:
        """Apply each expert to its rows.

        Args:
            x: `[sum of the counts, H]`, the rows of the first expert first.
            num_rows_per_expert: L counts; any may be 0.

        Returns:
            As `x`.
        """
        results = []
        for local, rows in enumerate(torch.split(x.to(self.w_in.dtype), list(num_rows_per_expert))):
            gate, up = (rows @ self.w_in[local]).chunk(2, dim=-1)
            results.append((F.silu(gate) * up) @ self.w_out[local])
        return torch.cat(results).to(x.dtype)  # under autocast, products have another dtype


@dataclass
class MoEStatistics:
    """Sums since the last `reset`, for progress displays.

    The seconds are wall-clock time inside the calls on this rank, forward and backward, waiting for slower ranks
    included. On CUDA they are the time to enqueue, where the CPU does not wait. Under activation checkpointing the
    forward runs twice, and everything is counted twice but the backward's own calls.

    Attributes:
        dispatch_seconds: time in `Buffer.dispatch`.
        combine_seconds: time in `Buffer.combine`.
        num_calls: forward calls.
        expert_load: `[E] int64`, tokens per expert (of all ranks if the router has a `comm`).
    """

    dispatch_seconds: float
    combine_seconds: float
    num_calls: int
    expert_load: torch.Tensor

    def reset(self) -> None:
        """Start all sums from zero."""
        self.dispatch_seconds = self.combine_seconds = 0.0
        self.num_calls = 0
        self.expert_load.zero_()

    def _count(self, routed: RouterOutput) -> None:
        self.num_calls += 1
        self.expert_load += routed.expert_load.cpu()


class MoE(torch.nn.Module):
    """The layer in one process, without communication: for small models, and to compare with.

    Args:
        hidden: H.
        ffn_hidden: F.
        num_experts: E.
        top_k: K.
        router: default `TopKRouter(hidden, num_experts, top_k, seed=seed)`.
        travel_dtype: round tokens, results and their gradients to this dtype where they would travel between ranks;
            with bfloat16 the layer has the numerics of `ExpertParallelMoE`, up to the order of sums. None: do not.
        seed: of the initial weights; give every layer another one, or they are identical.
        dtype: of the experts' weights.
        device: of the weights.

    Attributes:
        router, experts: the submodules.
        statistics: `MoEStatistics`; its seconds stay 0.

    Raises:
        ArgumentError: the router is one for other sizes.
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        num_experts: int,
        top_k: int,
        *,
        router: TopKRouter | None = None,
        travel_dtype: torch.dtype | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if router is not None:
            _check_router("MoE", router, hidden=hidden, num_experts=num_experts, top_k=top_k)
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.travel_dtype = travel_dtype
        self.router = router or TopKRouter(hidden, num_experts, top_k, seed=seed, device=device)
        self.experts = Experts(hidden, ffn_hidden, 0, num_experts, seed=seed, dtype=dtype, device=device)
        self.statistics = MoEStatistics(0.0, 0.0, 0, torch.zeros(num_experts, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output for `x [..., H]`, alike, and the router's loss (a scalar, see `RouterOutput`).

        Raises:
            ArgumentError: `x` has another hidden size.
        """
        wrong = _wrong_tokens("MoE", x, self.hidden)
        if wrong:
            raise ArgumentError(wrong)
        tokens = x.reshape(-1, self.hidden)
        routed = self.router(tokens)
        self.statistics._count(routed)
        expert_of_row, order = routed.topk_idx.flatten().sort(stable=True)
        token_of_row = order // self.top_k
        counts = torch.bincount(expert_of_row, minlength=self.num_experts).tolist()
        rows = self.experts(self._travel(self._travel(tokens)[token_of_row]), counts)
        rows = rows * routed.topk_weights.flatten()[order].to(rows.dtype).unsqueeze(1)
        combined = rows.new_zeros(tokens.shape).index_add(0, token_of_row, self._travel(rows))
        return self._travel(combined).view_as(x), routed.loss

    def _travel(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, and in the backward its gradient, rounded to `travel_dtype`."""
        return tensor if self.travel_dtype is None else tensor.to(self.travel_dtype).to(tensor.dtype)


class ExpertParallelMoE(torch.nn.Module):
    """The layer with its experts spread over the ranks of a communicator: expert e lives on rank `e // L`.

    Each rank passes its own tokens, any number of them, 0 included. Construction, forward and backward are collective:
    all ranks call them, in the same order, and in the same grad mode. Tokens that one rank's layer rejects are an
    `ArgumentError` on all ranks, and the layer stays usable. The router's weight is replicated (average its gradient
    over the ranks), the experts' gradient holds the contributions of all ranks' tokens (divide it by R where losses are
    averaged): `hpc_moe.nn.synchronize_gradients` does both.

    Args:
        comm: any mpi4py intracommunicator; not to be freed before the layer's last use.
        hidden: H, a multiple of 128.
        ffn_hidden: F.
        num_experts: E, a multiple of R.
        top_k: K.
        router: default `TopKRouter(hidden, num_experts, top_k, comm=comm, seed=seed)` with the buffer's timeout. Equal
            on all ranks.
        buffer: a `hpc_moe.Buffer` on the same ranks, which several layers can share; None makes one of the hinted size,
            which the layer owns (`destroy()`).
        seed: of the initial weights; give every layer another one, or they are identical. The full model is the same
            for any number of ranks.
        dtype: of the experts' weights. Tokens travel as bfloat16 whatever it is.
        device: of the weights, and of the buffer made here.

    Attributes:
        router, experts: the submodules; `experts` has this rank's only.
        comm: the communicator.
        buffer: the buffer in use.
        statistics: `MoEStatistics`.

    `copy.deepcopy` copies weights and statistics, and shares communicator and buffer; if the layer owns the buffer, the
    copy does not.

    Raises:
        ArgumentError: `num_experts` is not a multiple of the number of ranks, the router is one for other sizes, or the
            router or the buffer is one for other ranks.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        hidden: int,
        ffn_hidden: int,
        num_experts: int,
        top_k: int,
        *,
        router: TopKRouter | None = None,
        buffer: Any = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = "ExpertParallelMoE"
        num_ranks = comm.Get_size()
        if num_experts < 1 or num_experts % num_ranks:
            raise ArgumentError(
                f"ExpertParallelMoE: num_experts must be a multiple of the {num_ranks} ranks; got {num_experts}"
            )
        if router is not None:
            _check_router(name, router, hidden=hidden, num_experts=num_experts, top_k=top_k)
            if router.comm is not None:
                check_same_ranks(comm, router.comm, f"{name}: router.comm must have the ranks of comm")
        if buffer is not None:
            check_same_ranks(comm, buffer.group, f"{name}: buffer must be one on the ranks of comm")
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.comm = comm
        self._owns_buffer = buffer is None
        self.buffer = _make_buffer(comm, hidden, device) if buffer is None else buffer
        self.router = router or TopKRouter(
            hidden, num_experts, top_k, comm=comm, timeout=_timeout(self.buffer), seed=seed, device=device
        )
        num_local = num_experts // num_ranks
        self.experts = Experts(
            hidden, ffn_hidden, comm.Get_rank() * num_local, num_local, seed=seed, dtype=dtype, device=device
        )
        self.statistics = MoEStatistics(0.0, 0.0, 0, torch.zeros(num_experts, dtype=torch.int64))
        self._timed_buffer = _TimedBuffer(self.buffer, self.statistics)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output for `x [..., H]`, alike, and the router's loss (a scalar, see `RouterOutput`).

        Raises:
            ArgumentError: `x` is wrong here or on another rank.
            PeerTimeoutError: a rank did not come.
        """
        routed = self._route(x)
        tokens = x.reshape(-1, self.hidden)
        self.statistics._count(routed)
        received = dispatch(
            self._timed_buffer,
            tokens,
            routed.topk_idx,
            routed.topk_weights,
            self.num_experts,
            expert_layout="grouped",
        )
        assert received.topk_weights is not None
        rows = self.experts(received.x, received.num_tokens_per_expert)
        rows = rows * received.topk_weights.to(rows.dtype).unsqueeze(1)
        combined = combine(self._timed_buffer, rows, received.handle)
        return combined.view_as(x), routed.loss

    def _route(self, x: torch.Tensor) -> RouterOutput:
        """Route the tokens; if they are rejected here, the other ranks hear of it in the call that they wait in."""
        wrong = _wrong_tokens("ExpertParallelMoE", x, self.hidden)
        try:
            routed: RouterOutput = self.router(x if wrong else x.reshape(-1, self.hidden))  # which rejects them, too
        except Exception as error:
            if self.router.comm is None:  # else it has told them
                with contextlib.suppress(ArgumentError):
                    self.buffer.dispatch(wrong or str(error))  # no tensor, but a text that the others are shown
            if wrong:
                raise ArgumentError(wrong) from None
            raise
        return routed

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallelMoE:
        copied = copy_sharing(self, memo, self.comm, self.buffer)
        copied._owns_buffer = False
        return copied

    def destroy(self) -> None:
        """Destroy the buffer if the layer made it. Collective, idempotent."""
        if self._owns_buffer:
            self.buffer.destroy()


def _check_router(layer: str, router: TopKRouter, **sizes: int) -> None:
    """The router must be one for these sizes of the layer."""
    for name, size in sizes.items():
        if getattr(router, name) != size:
            raise ArgumentError(f"{layer}: router.{name} must be {size}; got {getattr(router, name)}")


def _wrong_tokens(layer: str, x: Any, hidden: int) -> str:
    """What is wrong with the layer's input, if anything."""
    if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == hidden:
        return ""
    got = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    return f"{layer}: x must be [..., {hidden}]; got {got}"


def _timeout(buffer: Any) -> float:
    """Seconds that the buffer's waits may last."""
    return float(getattr(buffer, "timeout", 100.0))  # hpc_moe.testing.ReferenceBuffer has none


def _make_buffer(comm: MPI.Intracomm, hidden: int, device: torch.device | str | None) -> Any:
    import hpc_moe

    num_bytes = hpc_moe.Config().get_nvl_buffer_size_hint(hidden * 2, comm.Get_size())
    return hpc_moe.Buffer(comm, num_bytes, device=None if device is None else str(device))


class _TimedBuffer:
    """A buffer whose dispatch and combine, those of the backward too, add their time to the statistics."""

    def __init__(self, buffer: Any, statistics: MoEStatistics) -> None:
        self._buffer = buffer
        self._statistics = statistics
        self.supports_any_dtype = bool(getattr(buffer, "supports_any_dtype", False))

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = self._buffer.dispatch(*args, **kwargs)
        self._statistics.dispatch_seconds += time.perf_counter() - begin
        return result

    def combine(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = self._buffer.combine(*args, **kwargs)
        self._statistics.combine_seconds += time.perf_counter() - begin
        return result
