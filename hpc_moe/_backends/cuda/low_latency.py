"""Low-latency dispatch and combine on CUDA: what is allocated, the launches, and halves that run later.

`csrc/cuda/low_latency_dispatch.cu` and `low_latency_combine.cu` say what the kernels do. They run on the stream that is
current, not on the communication stream: waiting for another stream takes as long as a small call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ... import _C
from ...config import low_latency_staging_bytes
from ...errors import ArgumentError, Error
from ...handles import LowLatencyHandle
from ..addresses import address
from ..requests import LowLatencyCombineRequest, LowLatencyDispatchRequest, LowLatencyDispatchResult
from .dispatch import aligned_rows
from .pool import lies_in_a_window

if TYPE_CHECKING:
    from .backend import CudaBackend
    from .region import Region

# Sends of a buffer whose receive half has not run.
MAX_UNRECEIVED = 2
_SEND, _RECEIVE = 1, 2
# Words in front of a routing's lists.
_ARRIVALS = 4


@dataclass(eq=False)
class Routing:
    """What a dispatch keeps for its combine.

    Attributes:
        staging: which of the two staging buffers is this handle's.
        made_on: the stream that `memory` is of.
        memory: int32, for the kernels: `[4]`, how much arrived; `[R * M]`, the tokens that did; `[R * M, K]`, the rows
            of `recv_x` that they have, -1 where there is none; and if weights travelled, `[R * M, K]` float32.
        most: R * M.
        top_k: K.
        weighted: whether weights travelled.
        is_received: whether the receive half has been launched.
    """

    staging: int
    made_on: torch.cuda.Stream
    memory: torch.Tensor
    most: int
    top_k: int
    weighted: bool
    is_received: bool = False

    def fill(self, params: _C.LowLatencyDispatchParams | _C.LowLatencyCombineParams) -> None:
        """Tell a kernel where its parts are."""
        begin = self.memory.data_ptr()
        params.arrivals, params.tokens = begin, begin + 4 * _ARRIVALS
        params.token_rows = params.tokens + 4 * self.most
        params.token_weights = params.token_rows + 4 * self.most * self.top_k if self.weighted else 0


def _launch_nothing(halves: int) -> None:
    """In place of what has been launched."""


@dataclass(eq=False)
class Unreceived:
    """A call whose send half has been launched, and whose receive half has not.

    Attributes:
        launch: launches halves of it.
        used: what the receive half reads and writes; kept alive here.
        made_on: the stream that it was sent on, and that `used` is memory of, as far as the library made it.
        is_captured: whether the send half is part of a CUDA graph.
        is_received: whether the receive half has been launched meanwhile.
    """

    launch: Callable[[int], None]
    used: tuple[torch.Tensor | None, ...]
    made_on: torch.cuda.Stream
    is_captured: bool
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
        self._last_stream: torch.cuda.Stream | None = None  # of the last launch, but for captured ones
        self._launched = torch.cuda.Event()  # behind it

    # --- streams -------------------------------------------------------------------------------------------------

    def join(self, stream: torch.cuda.Stream) -> None:
        """Make a stream wait for the last launch, if that was on another one.

        Not under capture: a graph's own order counts there, and an event from outside cannot be waited for.
        """
        if self._last_stream is None or self._last_stream == stream or _is_capturing():
            return
        stream.wait_event(self._launched)

    def _launch(self, on: Callable[[int], None]) -> None:
        """Launch something on the current stream, behind the buffer's earlier calls and before the later ones."""
        current = self._current_stream()
        self._backend.join_comm_stream(current)
        self.join(current)
        on(current.cuda_stream)
        if not _is_capturing():
            self._launched.record(current)
            self._last_stream = current

    def _current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._backend.device)

    def _lend(self, tensors: Iterable[torch.Tensor | None], made_on: torch.cuda.Stream) -> None:
        """Keep torch from giving this memory away before the current stream is done with what it was given."""
        current = self._current_stream()
        if current == made_on or _is_capturing():  # torch keeps a graph's memory
            return
        for tensor in tensors:
            if tensor is not None and not lies_in_a_window(tensor):
                tensor.record_stream(current)

    # --- halves that run later -----------------------------------------------------------------------------------

    def check_unreceived(self, later: bool) -> None:
        """Refuse a send that is to be received later, if two such are under way."""
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
        call.launch(_RECEIVE)
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

    def _run(
        self, launch: Callable[[int], None], later: bool, used: tuple[torch.Tensor | None, ...]
    ) -> Callable[[], None] | None:
        """Launch both halves at once, or the first; returns what launches the second, if there is one left."""
        if not later:
            launch(_SEND | _RECEIVE)
            return None
        launch(_SEND)
        call = Unreceived(launch, used, self._current_stream(), _is_capturing())
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
        self._launch(lambda stream: self._backend.runtime.launch_low_latency_reject(operation, text, stream))

    # --- dispatch ------------------------------------------------------------------------------------------------

    def dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """Send the tokens, and receive those of the peers unless that is to be later."""
        begin = time.perf_counter()
        backend, later = self._backend, request.return_recv_hook
        self._check_limits(request)
        self._begin((request.num_max_tokens, request.x.shape[1], request.topk_idx.shape[1]), later)
        request.x, request.topk_idx = aligned_rows(request.x), request.topk_idx.contiguous()
        if request.topk_weights is not None:
            request.topk_weights = request.topk_weights.contiguous()
        result = self._allocate(request)
        handle = result.handle
        routing: Routing = handle._backend_state
        params, scale_bytes = self._dispatch_params(request, result), _scale_bytes(request)
        agreed = list(request.agreed().values())

        def launch(halves: int) -> None:
            run = backend.runtime.launch_low_latency_dispatch
            self._launch(lambda stream: run(params, scale_bytes, agreed, halves, stream))
            routing.is_received |= bool(halves & _RECEIVE)

        # Not the result itself, which refers to what is returned here: only the garbage collector would free that.
        results = (result.recv_x, result.recv_scales, result.recv_count, handle.recv_src_idx, handle.recv_layout_range)
        given = (request.topk_idx, request.topk_weights, request.recv_stats, request.wait_stats)
        result.receive = self._run(launch, later, (*results, routing.memory, *given))
        backend.counters["low_latency_dispatch"].seconds += time.perf_counter() - begin
        return result

    def _check_limits(self, request: LowLatencyDispatchRequest) -> None:
        for name, got, most in (
            ("num_max_dispatch_tokens_per_rank", request.num_max_tokens, _C.MAX_LOW_LATENCY_TOKENS),
            ("the experts that topk_idx selects a token", request.topk_idx.shape[1], _C.MAX_LOW_LATENCY_TOP_K),
            ("num_experts", request.num_experts, _C.CUDA_MAX_LOCAL_EXPERTS * self._backend.num_ranks),
        ):
            if got > most:
                raise ArgumentError(f"{name} may be at most {most} in low-latency calls on CUDA; got {got}")
        if self.region.put_ranks:
            self._check_room_for_puts(request)

    def _check_room_for_puts(self, request: LowLatencyDispatchRequest) -> None:
        """What is put to a peer is put together first, for which the size hint has no room."""
        sizes = request.num_max_tokens, request.x.shape[1]
        top_k, num_ranks = request.topk_idx.shape[1], self._backend.num_ranks
        staging = low_latency_staging_bytes(*sizes, request.num_experts) + 4096
        needed = _C.low_latency_bytes(*sizes, top_k, num_ranks, len(self.region.put_ranks)) + 2 * staging
        got = self.region.num_bytes - _C.LOW_LATENCY_FIXED_BYTES
        if got < needed:
            raise ArgumentError(
                f"num_rdma_bytes={got} of the buffer is too small: ranks {sorted(self.region.put_ranks)} are reached "
                f"through the network, which takes {needed} for calls of these sizes"
            )

    def _allocate(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        num_ranks, device = self._backend.num_ranks, self._backend.device
        (num_tokens, hidden), top_k = request.x.shape, request.topk_idx.shape[1]
        most, weighted = request.num_max_tokens, request.topk_weights is not None
        local, rows = request.num_experts // num_ranks, most * num_ranks

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        recv_x = empty(local, rows, hidden, dtype=torch.float8_e4m3fn if request.use_fp8 else torch.bfloat16)
        scales = None
        if request.use_fp8:
            dtype = torch.int32 if request.use_ue8m0 else torch.float32
            scales = empty(local, hidden * _scale_bytes(request) // 512, rows, dtype=dtype).transpose(1, 2)
        routing = Routing(
            staging=self._num_dispatches % 2,
            made_on=self._current_stream(),
            # One piece of memory, for four take longer to get.
            memory=empty(_ARRIVALS + rows * (1 + top_k * (2 if weighted else 1)), dtype=torch.int32),
            most=rows,
            top_k=top_k,
            weighted=weighted,
        )
        handle = LowLatencyHandle(
            recv_src_idx=empty(local, rows, dtype=torch.int32),
            recv_layout_range=empty(local, num_ranks, dtype=torch.int64),
            num_max_dispatch_tokens_per_rank=most,
            hidden=hidden,
            num_experts=request.num_experts,
            num_tokens=num_tokens,
            top_k=top_k,
            weighted=weighted,
            _epoch=self._backend.epoch,
            _backend_state=routing,
        )
        self._num_dispatches += 1
        return LowLatencyDispatchResult(recv_x, scales, empty(local, dtype=torch.int32), handle, None)

    def _dispatch_params(
        self, request: LowLatencyDispatchRequest, result: LowLatencyDispatchResult
    ) -> _C.LowLatencyDispatchParams:
        handle, params = result.handle, _C.LowLatencyDispatchParams()
        routing: Routing = handle._backend_state
        params.num_tokens, params.num_max_tokens = handle.num_tokens, handle.num_max_dispatch_tokens_per_rank
        params.hidden, params.top_k, params.weighted = handle.hidden, handle.top_k, handle.weighted
        params.num_local_experts = handle.num_experts // self._backend.num_ranks
        params.round_scale, params.use_ue8m0 = request.round_scale, request.use_ue8m0
        params.x, params.x_stride = request.x.data_ptr(), 2 * request.x.stride(0)
        params.topk_index, params.topk_weights = request.topk_idx.data_ptr(), address(request.topk_weights)
        params.recv_rows, params.recv_scales = result.recv_x.data_ptr(), address(result.recv_scales)
        params.recv_count, params.recv_src_idx = result.recv_count.data_ptr(), handle.recv_src_idx.data_ptr()
        params.layout_range = handle.recv_layout_range.data_ptr()
        params.recv_stats, params.wait_stats = address(request.recv_stats), address(request.wait_stats)
        routing.fill(params)
        return params

    # --- combine -------------------------------------------------------------------------------------------------

    def check_routing(self, request: LowLatencyCombineRequest) -> None:
        """The combine must be of a dispatch that has been received. Values on the GPU are not compared."""
        routing: Routing = request.handle._backend_state
        if not routing.is_received:
            raise ArgumentError("handle: its dispatch has not been received; call its hook first (or it failed)")

    def combine(self, request: LowLatencyCombineRequest) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """Send the experts' results, and receive those of the peers unless that is to be later."""
        begin = time.perf_counter()
        backend, handle, later = self._backend, request.handle, request.return_recv_hook
        routing: Routing = handle._backend_state
        self._begin((handle.num_max_dispatch_tokens_per_rank, handle.hidden, handle.top_k), later)
        out = request.out
        if out is None:
            out = torch.empty(handle.num_tokens, handle.hidden, dtype=torch.bfloat16, device=backend.device)
        request.x = aligned_rows(request.x.view(-1, handle.hidden))
        request.topk_idx, request.topk_weights = request.topk_idx.contiguous(), request.topk_weights.contiguous()
        self._lend((routing.memory,), routing.made_on)
        params, agreed = self._combine_params(request, out), list(request.agreed().values())

        def launch(halves: int) -> None:
            run = backend.runtime.launch_low_latency_combine
            self._launch(lambda stream: run(params, agreed, halves, stream))

        used = (out, request.topk_idx, request.topk_weights, request.wait_stats, routing.memory)
        receive = self._run(launch, later, used)
        backend.counters["low_latency_combine"].seconds += time.perf_counter() - begin
        return out, receive

    def _combine_params(self, request: LowLatencyCombineRequest, out: torch.Tensor) -> _C.LowLatencyCombineParams:
        handle, params = request.handle, _C.LowLatencyCombineParams()
        routing: Routing = handle._backend_state
        params.num_tokens, params.num_max_tokens = handle.num_tokens, handle.num_max_dispatch_tokens_per_rank
        params.hidden, params.top_k, params.weighted = handle.hidden, handle.top_k, handle.weighted
        params.num_local_experts = handle.num_experts // self._backend.num_ranks
        params.use_logfmt = request.use_logfmt
        params.x = address(request.x)
        routing.fill(params)
        params.topk_index, params.topk_weights = address(request.topk_idx), address(request.topk_weights)
        params.combined, params.wait_stats = address(out), address(request.wait_stats)
        return params

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


def _scale_bytes(request: LowLatencyDispatchRequest) -> int:
    """Of each 128 channels; 0 for bf16."""
    return 0 if not request.use_fp8 else 1 if request.use_ue8m0 else 4
