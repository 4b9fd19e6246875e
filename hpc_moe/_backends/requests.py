"""What `Buffer` hands to a backend: calls whose arguments on this rank have been checked.

Letters: T tokens of this rank, H hidden, K top-k, R ranks, N nodes, E experts, L = E / R local experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..events import EventOverlap
from ..handles import DispatchHandle, LowLatencyHandle

# Order matters: what ranks tell each other carries the index.
OPERATIONS = ("dispatch", "combine", "low_latency_dispatch", "low_latency_combine", "clean_low_latency_buffer")


@dataclass(frozen=True)
class StreamArguments:
    """When a call runs, and who waits for it. Without streams (on CPU) all of it means nothing.

    Attributes:
        previous_event: run after this event; None: after the work that the current stream has been given.
        async_finish: do not make the current stream wait.
        allocate_on_comm_stream: allocate the results on the communication stream.
        num_sms: streaming multiprocessors that the call may use.
    """

    previous_event: EventOverlap | None = None
    async_finish: bool = False
    allocate_on_comm_stream: bool = False
    num_sms: int = 20


@dataclass
class Layout:
    """Counts and flags that say which token goes where, of this rank's tokens.

    Where values lie on a GPU, a request's layout is what the caller gave, still to be compared with the indices.

    Attributes:
        num_tokens_per_rank: `[R] int32`.
        num_tokens_per_rdma_rank: `[N] int32`, None on one node.
        num_tokens_per_expert: `[E] int32`.
        is_token_in_rank: `[T, R] bool`.
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


@dataclass
class DispatchRequest:
    """A `dispatch`; `layout` and the top-k tensors are None in a cached one, which has a `handle`.

    On CUDA `layout` is None, too, where the caller gave none: it is computed in the call.
    """

    x: torch.Tensor  # [T, H] bf16 or e4m3
    scales: torch.Tensor | None  # [T, H/128] float32 or [T, H/512] int32
    topk_idx: torch.Tensor | None  # [T, K] int64, contiguous
    topk_weights: torch.Tensor | None  # [T, K] float32, contiguous
    layout: Layout | None
    handle: DispatchHandle | None
    expert_alignment: int
    num_worst_tokens: int
    grouped: bool
    num_experts: int
    streams: StreamArguments = StreamArguments()

    @property
    def is_token_in_rank(self) -> torch.Tensor:
        """`[T, R] bool`, from the layout or the handle."""
        if self.handle is not None:
            return self.handle.is_token_in_rank
        assert self.layout is not None
        return self.layout.is_token_in_rank

    def agreed(self) -> dict[str, int]:
        """What must be equal on all ranks."""
        cached = self.handle is not None
        top_k = self.handle.top_k if self.handle else (0 if self.topk_idx is None else self.topk_idx.shape[1])
        return {
            "handle": self.handle._epoch if self.handle else 0,
            "hidden": self.x.shape[1],
            "bytes per channel of x": self.x.element_size(),
            "scales per token": 0 if self.scales is None else self.scales.shape[1],
            "top_k": top_k,
            "num_experts": self.num_experts,
            "whether topk_weights are given": int(self.topk_weights is not None),
            "whether expert_layout is grouped": int(self.grouped),
            "expert_alignment": 1 if cached else self.expert_alignment,
            "whether num_worst_tokens is given": int(self.num_worst_tokens > 0 and not cached),
        }


@dataclass
class CombineRequest:
    """A `combine`."""

    x: torch.Tensor  # [handle.num_rows, H] bf16
    handle: DispatchHandle
    topk_weights: torch.Tensor | None  # [N_recv, K] float32, or one per row in the grouped layout; contiguous
    biases: list[torch.Tensor]  # each [T, H] bf16, contiguous
    streams: StreamArguments = StreamArguments()

    def agreed(self) -> dict[str, int]:
        """What must be equal on all ranks."""
        return {
            "handle": self.handle._epoch,
            "hidden": self.x.shape[1],
            "whether topk_weights are given": int(self.topk_weights is not None),
        }


@dataclass(eq=False)
class LowLatencyDispatchForm:
    """All that has been checked of a low-latency dispatch: calls that are alike share one, and are not checked again.

    Attributes:
        num_tokens: T.
        hidden: H.
        top_k: K.
        num_max_tokens: M.
        num_experts: E.
        weighted: whether `topk_weights` are given.
        use_fp8: cast to e4m3.
        round_scale: round its scales up to powers of two.
        use_ue8m0: and store them as exponents.
        return_recv_hook: receive later.
        plan: what the backend has prepared for such calls.
    """

    num_tokens: int
    hidden: int
    top_k: int
    num_max_tokens: int
    num_experts: int
    weighted: bool
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool
    return_recv_hook: bool
    plan: Any = None

    def agreed(self) -> dict[str, int]:
        """What must be equal on all ranks."""
        return {
            "hidden": self.hidden,
            "top_k": self.top_k,
            "num_experts": self.num_experts,
            "num_max_dispatch_tokens_per_rank": self.num_max_tokens,
            "whether topk_weights are given": int(self.weighted),
            "use_fp8": int(self.use_fp8),
            "round_scale": int(self.round_scale),
            "use_ue8m0": int(self.use_ue8m0),
            "return_recv_hook": int(self.return_recv_hook),
        }


@dataclass
class LowLatencyDispatchRequest:
    """A `low_latency_dispatch`. Tensors that are contiguous here need not be on CUDA, where a copy is part of the call.

    `layout` is None on CUDA: the kernels look at the indices.
    """

    form: LowLatencyDispatchForm
    x: torch.Tensor  # [T, H] bf16
    topk_idx: torch.Tensor  # [T, K] int64, contiguous
    topk_weights: torch.Tensor | None  # [T, K] float32, contiguous
    recv_stats: torch.Tensor | None  # [L] int32
    wait_stats: torch.Tensor | None  # [R] int64
    layout: Layout | None = None

    def agreed(self) -> dict[str, int]:
        """What must be equal on all ranks."""
        return self.form.agreed()


@dataclass(eq=False)
class LowLatencyCombineForm:
    """All that has been checked of a low-latency combine, but for its handle; shared as that of a dispatch.

    Attributes:
        use_logfmt: send rows in the logarithmic format.
        return_recv_hook: receive later.
        plan: what the backend has prepared for such calls.
    """

    use_logfmt: bool
    return_recv_hook: bool
    plan: Any = None


@dataclass
class LowLatencyCombineRequest:
    """A `low_latency_combine`; `x` is the handle's staging buffer in a zero-copy one."""

    form: LowLatencyCombineForm
    x: torch.Tensor  # [L, M*R, H] bf16, contiguous
    topk_idx: torch.Tensor  # [T, K] int64, contiguous (as in a dispatch)
    topk_weights: torch.Tensor  # [T, K] float32, contiguous (as in a dispatch)
    handle: LowLatencyHandle
    out: torch.Tensor | None  # [T, H] bf16, contiguous
    wait_stats: torch.Tensor | None  # [R] int64

    def agreed(self) -> dict[str, int]:
        """What must be equal on all ranks."""
        return {
            "handle": self.handle._epoch,
            "use_logfmt": int(self.form.use_logfmt),
            "return_recv_hook": int(self.form.return_recv_hook),
        }


@dataclass
class DispatchResult:
    """What a dispatch returns; the handle is None in a cached one."""

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    num_recv_tokens_per_expert: list[int]
    handle: DispatchHandle | None
    event: EventOverlap = field(default_factory=EventOverlap)


@dataclass
class CombineResult:
    """What a combine returns."""

    combined_x: torch.Tensor
    combined_topk_weights: torch.Tensor | None
    event: EventOverlap = field(default_factory=EventOverlap)


@dataclass
class LowLatencyDispatchResult:
    """What a low-latency dispatch returns: tensors that are filled when its receive half has run."""

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    recv_count: torch.Tensor
    handle: LowLatencyHandle
    receive: Any  # Callable[[], None]; None: nothing is left to be done
