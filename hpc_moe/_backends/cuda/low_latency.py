"""Low-latency dispatch and combine on CUDA: what is allocated, the launches, and halves that run later.

`csrc/cuda/low_latency_dispatch.cu` and `low_latency_combine.cu` say what the kernels do. They run on the stream that is
current, not on the communication stream: waiting for another stream takes as long as a small call.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ... import _C
from ...config import low_latency_staging_bytes
from ...errors import ArgumentError, Error
from ...handles import LowLatencyHandle
from ..addresses import address
from ..requests import (
    LowLatencyCombineRequest,
    LowLatencyDispatchForm,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
)
from .dispatch import aligned_rows
from .pool import lies_in_a_window
from .streams import current_stream_number
from .tensors import TensorKind, view_of

if TYPE_CHECKING:
    from .backend import CudaBackend
    from .region import Region

# Sends of a buffer whose receive half has not run.
MAX_UNRECEIVED = 2
_SEND, _RECEIVE = 1, 2


@dataclass(eq=False)
class DispatchPlan:
    """What dispatches that are alike have in common; to work it out takes longer than a launch.

    Attributes:
        params: for the kernels, but for addresses.
        scale_bytes: of each 128 channels; 0 for bf16.
        agreed: what must be equal on all ranks.
        copies: whether tensors have strides that kernels do not take.
        sizes: M, H and K.
        rows: what `recv_x` is.
        scales: what its scales are; None for bf16.
        num_ranks: R.
        memory: what a routing's memory is.
        parts: of it, in bytes.
    """

    params: _C.LowLatencyDispatchParams
    scale_bytes: int
    agreed: list[int]
    copies: bool
    sizes: tuple[int, int, int]
    rows: TensorKind
    scales: TensorKind | None
    num_ranks: int
    memory: TensorKind
    parts: _C.RoutingParts


@dataclass(eq=False)
class CombinePlan:
    """The same of combines.

    Attributes:
        params: for the kernels, but for addresses.
        agreed: what must be equal on all ranks, but for the handle's number.
        copies: whether tensors have strides that kernels do not take.
        combined: what the result is.
    """

    params: _C.LowLatencyCombineParams
    agreed: list[int]
    copies: bool
    combined: TensorKind


@dataclass(eq=False)
class Routing:
    """What a dispatch keeps for its combine.

    Attributes:
        staging: which of the two staging buffers is this handle's.
        made_on: the stream that `memory` is of, as CUDA knows it.
        memory: int32; what came, for the combine's kernel, and small results. `RoutingParts` of csrc/cuda/low_latency.h
            says what lies where.
        plan: of the dispatch.
        is_received: whether the receive half has been launched.
    """

    staging: int
    made_on: int
    memory: torch.Tensor
    plan: DispatchPlan
    is_received: bool = False

    def handle_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`recv_src_idx` and `recv_layout_range` of the handle, in `memory`."""
        (local, rows, _), num_ranks, parts = self.plan.rows.shape, self.plan.num_ranks, self.plan.parts
        pairs = self.memory.view(torch.int64)
        return (
            self.memory.as_strided((local, rows), (rows, 1), parts.recv_src_idx // 4),
            pairs.as_strided((local, num_ranks), (num_ranks, 1), parts.layout_range // 8),
        )


def _launch_nothing() -> None:
    """In place of what has been launched."""


@dataclass(eq=False)
class Unreceived:
    """A call whose send half has been launched, and whose receive half has not.

    Attributes:
        launch: launches that.
        used: what the receive half reads and writes; kept alive here.
        made_on: the stream that it was sent on, and that `used` is memory of, as far as the library made it; as CUDA
            knows it.
        is_captured: whether the send half is part of a CUDA graph.
        routing: that a dispatch fills.
        is_received: whether the receive half has been launched meanwhile.
    """

    launch: Callable[[], None]
    used: tuple[torch.Tensor | None, ...]
    made_on: int
    is_captured: bool
    routing: Routing | None
    is_received: bool = False


class LowLatency:
    """The calls that move at most M tokens a rank.

    Attributes:
        region: the symmetric memory that they use.
    """

    def __init__(self, backend: CudaBackend, region: Region) -> None:
        self._backend, self.region = backend, region
        self._unreceived: deque[Unreceived] = deque()  # in the order of the calls
        self._sizes: tuple[int, int, int] | None = None  # M, H and K of the last send
        self._num_dispatches = 0
        self._current: tuple[int, torch.cuda.Stream] | None = None  # when last asked for
        self._last_stream: torch.cuda.Stream | None = None  # of the last launch, but for captured ones
        self._launched: torch.cuda.Event | None = None  # behind it, once there have been launches on several streams
        self._settled: int | None = None  # the stream on which the next launch has nothing to wait for or to note

    # --- streams -------------------------------------------------------------------------------------------------

    def join(self, stream: torch.cuda.Stream) -> None:
        """Make a stream, which is not being captured, wait for the last launch, if that was on another one.

        The first time it waits for whatever came behind the launch, too: to record an event behind each launch takes
        time, which is in vain where all are on one stream.
        """
        self._settled = None
        if self._last_stream in (None, stream):
            return
        if self._launched is None:
            self._launched = torch.cuda.Event()
            self._launched.record(self._last_stream)
        stream.wait_event(self._launched)

    def _launch(self, run: Callable[..., None], arguments: tuple[Any, ...], *more: Any) -> None:
        """Launch something on the current stream, behind the buffer's earlier calls and before the later ones.

        Under capture there is nothing to join: a graph's own order counts there, and an event from outside cannot be
        waited for.
        """
        number = current_stream_number(self._backend.device)
        if number == self._settled:  # nor has anything been on the communication stream since
            run(*arguments, *more, number)
            return
        current, is_capturing = self._current_stream(), _is_capturing()
        if not is_capturing:
            self._backend.join_comm_stream(current)
            self.join(current)
        run(*arguments, *more, number)
        if not is_capturing:
            self._last_stream = current
            if self._launched is None:
                self._settled = number
            else:
                self._launched.record(current)

    def _current_stream(self) -> torch.cuda.Stream:
        number = current_stream_number(self._backend.device)
        if self._current is None or self._current[0] != number:
            self._current = number, torch.cuda.current_stream(self._backend.device)
        return self._current[1]

    def _lend(self, tensors: Iterable[torch.Tensor | None], made_on: int) -> None:
        """Keep torch from giving this memory away before the current stream is done with what it was given."""
        if current_stream_number(self._backend.device) == made_on or _is_capturing():  # torch keeps a graph's memory
            return
        current = self._current_stream()
        for tensor in tensors:
            if tensor is not None and not lies_in_a_window(tensor):
                tensor.record_stream(current)

    # --- halves that run later -----------------------------------------------------------------------------------

    def check_unreceived(self, later: bool) -> None:
        """Refuse a send that is to be received later, if two such are under way."""
        if not self._unreceived:
            return
        self._forget_captured()
        if _is_capturing() and any(not call.is_captured for call in self._unreceived):
            raise ArgumentError(
                "return_recv_hook: an earlier send is unreceived; call its hook before the capture of a graph begins"
            )
        if later and len(self._unreceived) >= MAX_UNRECEIVED:
            raise ArgumentError(
                f"return_recv_hook: {len(self._unreceived)} earlier sends are unreceived; call their hooks first"
            )

    def check_nothing_unreceived(self) -> None:
        """Refuse what needs all sends received."""
        self._forget_captured()
        if self._unreceived:
            raise ArgumentError(f"{len(self._unreceived)} sends are unreceived; call their hooks first")

    def receive_all(self) -> None:
        """Launch all receive halves that are due. (A send from before a capture has no place in the graph.)"""
        if not self._unreceived:
            return
        self._forget_captured()
        while self._unreceived and self._unreceived[0].is_captured == _is_capturing():
            self._receive_first()

    def _forget_captured(self) -> None:
        """Forget what was sent in a capture that has ended: it runs in replays, or never."""
        if self._unreceived and not _is_capturing():
            self._unreceived = deque(call for call in self._unreceived if not call.is_captured)

    def _receive_first(self) -> None:
        call = self._unreceived.popleft()
        self._lend(call.used, call.made_on)
        call.launch()
        if call.routing is not None:
            call.routing.is_received = True
        call.launch, call.used, call.is_received = _launch_nothing, (), True

    def _receive_up_to(self, call: Unreceived) -> None:
        """Launch this receive half and all earlier ones. Doing it again does nothing."""
        if call.is_received:
            return
        if call.is_captured != _is_capturing():
            raise ArgumentError(
                "return_recv_hook: a hook must be called where its call was made, in the same capture of a CUDA graph "
                "or in none"
            )
        while call in self._unreceived:
            self._receive_first()

    def _send(
        self,
        launch: Callable[..., None],
        arguments: tuple[Any, ...],
        used: tuple[torch.Tensor | None, ...],
        routing: Routing | None = None,
    ) -> Callable[[], None]:
        """Launch the send half; returns what launches the other one. `routing`: that it fills."""
        self._launch(launch, arguments, _SEND)
        receive = functools.partial(self._launch, launch, arguments, _RECEIVE)
        call = Unreceived(receive, used, current_stream_number(self._backend.device), _is_capturing(), routing)
        self._unreceived.append(call)
        return lambda: self._receive_up_to(call)

    def _begin(self, sizes: tuple[int, int, int], later: bool) -> None:
        """Receive what is due, if the call receives at once.

        Raises:
            ArgumentError: the region is laid out by sizes, and another layout would reach into what is unreceived.
        """
        if not later:
            self.receive_all()
        if self._unreceived and sizes != self._sizes:
            raise ArgumentError(
                f"return_recv_hook: earlier sends of other sizes are unreceived (M, H and K were {self._sizes}, now "
                f"{sizes}); call their hooks first"
            )
        self._sizes = sizes

    def reject(self, operation: int, text: str) -> None:
        """Take this rank's part, both halves of it, in a call that it rejects."""
        self.receive_all()
        self._launch(self._backend.runtime.launch_low_latency_reject, (operation, text))

    # --- dispatch ------------------------------------------------------------------------------------------------

    def dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """Send the tokens, and receive those of the peers unless that is to be later."""
        begin = time.perf_counter()
        form = request.form
        plan: DispatchPlan = form.plan or self._plan_dispatch(request)
        self._begin(plan.sizes, form.return_recv_hook)
        x, topk_idx, topk_weights = request.x, request.topk_idx, request.topk_weights
        if plan.copies or x.data_ptr() % 16:
            x, topk_idx = aligned_rows(x), topk_idx.contiguous()
            topk_weights = None if topk_weights is None else topk_weights.detach().contiguous()
        result = self._allocate(form, plan)
        routing: Routing = result.handle._backend_state
        arguments = (
            plan.params,
            plan.scale_bytes,
            plan.agreed,
            x.data_ptr(),
            2 * x.stride(0),
            topk_idx.data_ptr(),
            address(topk_weights),
            result.recv_x.data_ptr(),
            address(result.recv_scales),
            routing.memory.data_ptr(),
            address(request.recv_stats),
            address(request.wait_stats),
        )
        launch = self._backend.runtime.launch_low_latency_dispatch
        if form.return_recv_hook:
            # Not the result itself, which refers to what is returned here: only the garbage collector would free that.
            results = (result.recv_x, result.recv_scales, routing.memory)
            given = (topk_idx, topk_weights, request.recv_stats, request.wait_stats)
            result.receive = self._send(launch, arguments, (*results, *given), routing)
        else:
            self._launch(launch, arguments, _SEND | _RECEIVE)
            routing.is_received = True
        self._backend.counters["low_latency_dispatch"].seconds += time.perf_counter() - begin
        return result

    def _plan_dispatch(self, request: LowLatencyDispatchRequest) -> DispatchPlan:
        form, x = request.form, request.x
        self._check_limits(form)
        num_ranks, scale_bytes = self._backend.num_ranks, _scale_bytes(form)
        local, rows = form.num_experts // num_ranks, form.num_max_tokens * num_ranks
        params = _C.LowLatencyDispatchParams()
        params.num_tokens, params.num_max_tokens = form.num_tokens, form.num_max_tokens
        params.hidden, params.top_k, params.weighted = form.hidden, form.top_k, form.weighted
        params.num_local_experts = local
        params.round_scale, params.use_ue8m0 = form.round_scale, form.use_ue8m0
        columns = form.hidden * scale_bytes // 512
        scales_dtype = torch.int32 if form.use_ue8m0 else torch.float32
        parts = _C.lay_out_routing(params, num_ranks)
        plan = form.plan = DispatchPlan(
            params=params,
            scale_bytes=scale_bytes,
            agreed=list(form.agreed().values()),
            copies=(form.num_tokens > 1 and 2 * x.stride(0) % 16 != 0)
            or not request.topk_idx.is_contiguous()
            or not (request.topk_weights is None or request.topk_weights.is_contiguous()),
            sizes=(form.num_max_tokens, form.hidden, form.top_k),
            rows=TensorKind(
                (local, rows, form.hidden),
                (rows * form.hidden, form.hidden, 1),
                torch.float8_e4m3fn if form.use_fp8 else torch.bfloat16,
                x.device,
            ),
            scales=TensorKind((local, rows, columns), (columns * rows, 1, rows), scales_dtype, x.device)
            if form.use_fp8
            else None,
            num_ranks=num_ranks,
            memory=TensorKind((parts.end // 4,), (1,), torch.int32, x.device),
            parts=parts,
        )
        return plan

    def _allocate(self, form: LowLatencyDispatchForm, plan: DispatchPlan) -> LowLatencyDispatchResult:
        # Each of these takes longer than it looks, a view not much less than memory of its own: so few of both. (Rows
        # and scales are their own because they may go while the handle stays, too.)
        recv_x = plan.rows.empty()
        scales = None if plan.scales is None else plan.scales.empty()
        memory = plan.memory.empty()
        recv_count = view_of(memory, plan.rows.shape[:1], (1,), plan.parts.recv_count // 4)
        handle = LowLatencyHandle(
            form.num_max_tokens,
            form.hidden,
            form.num_experts,
            form.num_tokens,
            form.top_k,
            form.weighted,
            _epoch=self._backend.epoch,
            _backend_state=Routing(self._num_dispatches % 2, current_stream_number(self._backend.device), memory, plan),
        )
        self._num_dispatches += 1
        return LowLatencyDispatchResult(recv_x, scales, recv_count, handle, None)

    def _check_limits(self, form: LowLatencyDispatchForm) -> None:
        num_ranks = self._backend.num_ranks
        most_tokens = min(_C.MAX_LOW_LATENCY_TOKENS, _C.MAX_COMING_TOKENS // num_ranks // 32 * 32)
        most_experts = min(_C.CUDA_MAX_LOCAL_EXPERTS * num_ranks, _C.MAX_LOW_LATENCY_EXPERTS)
        for name, got, most in (
            ("num_max_dispatch_tokens_per_rank", form.num_max_tokens, most_tokens),
            ("the experts that topk_idx selects a token", form.top_k, _C.MAX_LOW_LATENCY_TOP_K),
            ("num_experts", form.num_experts, most_experts),
        ):
            if got > most:
                raise ArgumentError(
                    f"{name} may be at most {most} in low-latency calls on CUDA with {num_ranks} ranks; got {got}"
                )
        if self.region.put_ranks:
            self._check_room_for_puts(form)

    def _check_room_for_puts(self, form: LowLatencyDispatchForm) -> None:
        """What is put to a peer is put together first, which needs room of its own."""
        sizes, num_ranks = (form.num_max_tokens, form.hidden), self._backend.num_ranks
        staging = low_latency_staging_bytes(*sizes, form.num_experts) + 4096
        needed = _C.low_latency_bytes(*sizes, form.top_k, num_ranks, len(self.region.put_ranks)) + 2 * staging
        got = self.region.num_bytes - _C.LOW_LATENCY_FIXED_BYTES
        if got < needed:
            raise ArgumentError(
                f"num_rdma_bytes of the buffer is too small: ranks {sorted(self.region.put_ranks)} are reached through "
                f"the network, and of {needed} bytes that this takes for calls of these sizes there are {got}"
            )

    # --- combine -------------------------------------------------------------------------------------------------

    def check_routing(self, request: LowLatencyCombineRequest) -> None:
        """The combine must be of a dispatch that has been received. Values on the GPU are not compared."""
        routing: Routing = request.handle._backend_state
        if not routing.is_received:
            raise ArgumentError("handle: its dispatch has not been received; call its hook first (or it failed)")

    def combine(self, request: LowLatencyCombineRequest) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """Send the experts' results, and receive those of the peers unless that is to be later."""
        begin = time.perf_counter()
        form, handle, out = request.form, request.handle, request.out
        routing: Routing = handle._backend_state
        plan: CombinePlan = form.plan or self._plan_combine(request)
        self._begin(routing.plan.sizes, form.return_recv_hook)
        x, topk_idx, topk_weights = request.x, request.topk_idx, request.topk_weights
        if plan.copies or x.data_ptr() % 16:
            x = aligned_rows(x.view(-1, handle.hidden))
            topk_idx, topk_weights = topk_idx.contiguous(), topk_weights.detach().contiguous()
        if out is None:
            out = plan.combined.empty()
        self._lend((routing.memory,), routing.made_on)
        arguments = (
            plan.params,
            [handle._epoch, *plan.agreed],
            x.data_ptr(),
            topk_idx.data_ptr(),
            topk_weights.data_ptr(),
            routing.memory.data_ptr(),
            out.data_ptr(),
            address(request.wait_stats),
        )
        launch, receive = self._backend.runtime.launch_low_latency_combine, None
        if form.return_recv_hook:
            used = (out, topk_idx, topk_weights, request.wait_stats, routing.memory)
            receive = self._send(launch, arguments, used)
        else:
            self._launch(launch, arguments, _SEND | _RECEIVE)
        self._backend.counters["low_latency_combine"].seconds += time.perf_counter() - begin
        return out, receive

    def _plan_combine(self, request: LowLatencyCombineRequest) -> CombinePlan:
        handle, params = request.handle, _C.LowLatencyCombineParams()
        params.num_tokens, params.num_max_tokens = handle.num_tokens, handle.num_max_dispatch_tokens_per_rank
        params.hidden, params.top_k, params.weighted = handle.hidden, handle.top_k, handle.weighted
        params.num_local_experts = handle.num_experts // self._backend.num_ranks
        params.use_logfmt = request.form.use_logfmt
        agreed = request.agreed()
        del agreed["handle"]
        copies = not (request.topk_idx.is_contiguous() and request.topk_weights.is_contiguous())
        shape = (handle.num_tokens, handle.hidden)
        combined = TensorKind(shape, (handle.hidden, 1), torch.bfloat16, request.x.device)
        plan = request.form.plan = CombinePlan(params, list(agreed.values()), copies, combined)
        return plan

    def staging_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """This handle's staging buffer, `[L, M*R, H]` bf16, at the end of the region."""
        routing: Routing = handle._backend_state
        shape = handle.shape(self._backend.num_ranks)
        size = low_latency_staging_bytes(handle.num_max_dispatch_tokens_per_rank, handle.hidden, handle.num_experts)
        # Down to a page: what travels ends at one, so this does not reach into it.
        begin = (self.region.num_bytes - (routing.staging + 1) * size) // 4096 * 4096
        if begin < 0:
            raise Error("the region is too small for a staging buffer")
        num_bytes = 2 * shape[0] * shape[1] * shape[2]
        return self.region.memory()[begin : begin + num_bytes].view(torch.bfloat16).view(shape)


def _is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


def _scale_bytes(form: LowLatencyDispatchForm) -> int:
    """Of each 128 channels; 0 for bf16."""
    return 0 if not form.use_fp8 else 1 if form.use_ue8m0 else 4
