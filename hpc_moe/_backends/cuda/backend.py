"""`CudaBackend`: construction, the runtime, streams, and errors that kernels report.

A call that does not wait for the GPU cannot raise what a peer did wrong. The kernels write it to host memory; the next
call takes part as usual, so that the ranks stay in step, and then raises it in place of returning. `check` waits for
it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ... import _C
from ...bootstrap import Group, Topology, connect
from ...errors import ArgumentError, BootstrapError, Error, PeerTimeoutError, UnavailableError
from ...events import EventOverlap
from ...messenger import keep_forever
from ..base import Backend
from ..requests import (
    OPERATIONS,
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    Layout,
    StreamArguments,
)
from .combine import combine
from .device import choose_device, make_current, shares_gpus
from .dispatch import Entered, dispatch, launch_layout
from .pool import Pool, WindowMemory
from .reports import to_error
from .streams import Lane

# GB/s that leave a GPU through its links; 0: send without caring. Unset: what GPUs of this kind have.
LINK_RATE_VARIABLE = "HPC_MOE_NVLINK_GB_PER_S"
# Test-only: the kernels that GPUs without bulk copies (before sm_90) run.
NO_BULK_VARIABLE = "HPC_MOE_TEST_NO_BULK_COPIES"
# Stress builds only: a seed for random delays, and a rule of the protocol to break.
_SEED_VARIABLE, _MUTATION_VARIABLE = "HPC_MOE_TEST_STRESS_SEED", "HPC_MOE_TEST_MUTATION"


def _link_rate() -> int:
    wish = os.environ.get(LINK_RATE_VARIABLE, "")
    if not wish:
        return -1
    if not (wish.isdecimal() and int(wish) <= 1_000_000):
        raise ArgumentError(f"{LINK_RATE_VARIABLE} must be a whole number of GB/s, 0 for no limit; got {wish!r}")
    return int(wish)


@dataclass
class Counter:
    """What the CPU counts of one operation: calls, results in the pool, seconds in calls and in their waits."""

    calls: int = 0
    pooled: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0


class CudaBackend(Backend):
    """The runtime on CUDA tensors, for the ranks of one node. Construction is collective: all fail, or none."""

    def __init__(
        self,
        group: Group,
        topology: Topology,
        *,
        device: str | None,
        num_nvl_bytes: int,
        num_rdma_bytes: int,
        low_latency_mode: bool,
        enable_shrink: bool,
        timeout: float,
    ) -> None:
        self.group, self.topology = group, topology
        self.rank, self.num_ranks = group.rank, group.size
        self.num_nvl_bytes = num_nvl_bytes
        self.timeout = timeout
        self.masked: set[int] = set()
        self.broken = ""
        with group.step("choosing the GPU"):
            self._refuse_what_is_missing(low_latency_mode)
            self.device = torch.device("cuda", choose_device(device, topology))
            torch.cuda.init()
            self.memory = torch.cuda.get_device_properties(self.device).total_memory
            if num_rdma_bytes > self.memory:
                raise ArgumentError(f"num_rdma_bytes={num_rdma_bytes} is more than the GPU has: {self.memory} bytes")
            if device is None or torch.device(device).index is None:
                make_current(self.device.index)  # so that the caller's "cuda" is this one, too
        try:
            with group.step("creating the runtime"):
                self.runtime = self._make_runtime(num_nvl_bytes)
        except (ArgumentError, BootstrapError):
            if hasattr(self, "runtime"):  # another rank failed; nobody has been given a handle to this memory
                self.runtime.free()
            raise
        try:
            connect(group, topology, self.runtime, low_latency_mode)
        except (ArgumentError, BootstrapError, UnavailableError):
            self.runtime.close_peers()  # all ranks are here: a step fails on all or on none
            with group.step("closing windows"):
                pass
            self.runtime.free()
            raise
        self.pool: Pool | None = Pool(
            self.runtime.window, self.runtime.pool_offset, self.runtime.pool_bytes, self.device
        )
        self.comm_stream = torch.cuda.Stream(self.device, priority=-1)
        self.epoch = 0
        self.counters = {name: Counter() for name in OPERATIONS[:2]}
        self._agreed_names: dict[str, list[str]] = {}
        self._pending: Error | None = None
        self.entered = Entered.NOTHING
        self._told = False  # whether the peers were told that the last call failed here

    def _make_runtime(self, num_nvl_bytes: int) -> _C.CudaRuntime:
        """The runtime, whose GPU memory is its own (cudaMalloc): torch's may not be opened by peers."""
        try:
            return _C.CudaRuntime(
                self.rank,
                self.num_ranks,
                self.device.index,
                num_nvl_bytes,
                self.timeout,
                shares_gpus(),
                os.environ.get(NO_BULK_VARIABLE) != "1",
                _link_rate(),
                int(os.environ.get(_SEED_VARIABLE, "0")) * (self.rank + 1),
                int(os.environ.get(_MUTATION_VARIABLE, "0")),
            )
        except ValueError as error:
            raise ArgumentError(str(error)) from None

    def _refuse_what_is_missing(self, low_latency_mode: bool) -> None:
        if low_latency_mode:
            raise UnavailableError(
                "low_latency_mode: low-latency calls run on CPU tensors only, so far; use device='cpu'"
            )
        if self.topology.num_nodes > 1:
            raise UnavailableError(
                f"device='cuda': {self.topology.num_nodes} nodes; on CUDA all ranks must be on one node, so far"
            )
        if self.num_ranks > _C.CUDA_MAX_RANKS:
            raise UnavailableError(f"device='cuda': at most {_C.CUDA_MAX_RANKS} ranks on a node; got {self.num_ranks}")

    # --- calls ---------------------------------------------------------------------------------------------------

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> Layout:
        raise UnavailableError("a layout on CUDA is computed in the call that needs it")

    def get_layout(
        self, topk_idx: torch.Tensor, num_experts: int, streams: StreamArguments
    ) -> tuple[Layout, EventOverlap]:
        self._check_sizes(topk_idx.shape[1], num_experts)
        pending = self._take_pending()
        with self.lane(streams) as lane:
            lane.uses(topk_idx)
            counted = launch_layout(
                self, lane, topk_idx.contiguous(), None, num_experts, for_exchange=False, grouped=False
            )
        if pending is not None:
            raise pending
        return counted.layout, self.known_event(lane.event)

    def check_normal(self, request: DispatchRequest | CombineRequest) -> None:
        if isinstance(request, DispatchRequest):
            top_k = request.handle.top_k if request.handle else 0
            top_k = top_k if request.topk_idx is None else request.topk_idx.shape[1]
            num_scales = 0 if request.scales is None else request.scales.shape[1]
            row_bytes = request.x.shape[1] * request.x.element_size()
            self._check_sizes(top_k, request.num_experts)
            if request.num_worst_tokens * row_bytes > self.memory:
                raise ArgumentError(
                    f"num_worst_tokens={request.num_worst_tokens} rows are more than the GPU's memory, {self.memory} "
                    "bytes"
                )
            if torch.cuda.is_current_stream_capturing() and request.handle is None and request.num_worst_tokens == 0:
                raise ArgumentError(
                    "num_worst_tokens (or a handle) is needed under CUDA graph capture: the CPU cannot wait"
                )
        else:
            top_k, num_scales = request.handle.top_k, 0
            row_bytes = request.x.shape[1] * (4 if request.handle.expert_layout == "grouped" else 2)
        if isinstance(request, DispatchRequest) and request.handle is None:
            local = request.num_experts // self.num_ranks
            if request.expert_alignment * local > 2**30:
                raise ArgumentError(
                    f"expert_alignment must be at most {2**30 // local} with {local} local experts; got "
                    f"{request.expert_alignment}"
                )
        if self.num_ranks > 1 and self.runtime.num_slots(row_bytes, num_scales, top_k) < 1:
            raise ArgumentError("num_nvl_bytes is too small for one token of this hidden size and top_k")

    def _check_sizes(self, top_k: int, num_experts: int) -> None:
        if top_k > _C.CUDA_MAX_TOP_K:
            raise ArgumentError(f"topk_idx may select at most {_C.CUDA_MAX_TOP_K} experts a token on CUDA; got {top_k}")
        most = _C.CUDA_MAX_LOCAL_EXPERTS * self.num_ranks
        if num_experts > most:
            raise ArgumentError(
                f"num_experts must be at most {most} on CUDA with {self.num_ranks} ranks; got {num_experts}"
            )

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        with self._call("dispatch", request):
            result = dispatch(self, request)
        return result

    def combine(self, request: CombineRequest) -> CombineResult:
        with self._call("combine", request):
            result = combine(self, request)
        return result

    @contextlib.contextmanager
    def _call(self, name: str, request: DispatchRequest | CombineRequest) -> Iterator[None]:
        """Count the call; when it has taken part, raise what an earlier one is known to have run into."""
        self.epoch += 1
        if name not in self._agreed_names:
            self._agreed_names[name] = list(request.agreed())
        self.counters[name].calls += 1
        pending = self._take_pending()
        self.entered, self._told = Entered.NOTHING, False
        try:
            yield
        except Exception as error:  # no memory for the results, say
            self._pending = self._pending or pending
            if self.entered in (Entered.NOTHING, Entered.EXCHANGE):
                self._tell(name, error, self.entered is Entered.EXCHANGE)
                self._told = True
            raise
        if self.entered is Entered.ALL_AND_WAITED:  # what earlier calls ran into is known now, on all ranks alike
            pending = pending or self._take_pending()
        if pending is not None:
            raise pending

    def is_in_step(self, error: BaseException) -> bool:
        told, self._told = self._told, False
        return told or super().is_in_step(error)

    def reject(self, name: str, error: Exception) -> None:
        if name in OPERATIONS[:2]:
            self.epoch += 1
            self._tell(name, error, False)

    def _tell(self, name: str, error: Exception, behind_exchange: bool) -> None:
        """Take this rank's part in a call, or in what is left of it, by telling the others that it cannot."""
        text = str(error) or type(error).__name__
        with self.lane(StreamArguments()) as lane:
            # A kernel's text has room for some 380 bytes.
            text = text.encode()[:380].decode(errors="ignore")
            index = OPERATIONS.index(name)
            self.runtime.launch_reject(index, text, behind_exchange, lane.stream.cuda_stream)

    def known_event(self, event: EventOverlap) -> EventOverlap:
        """The event, made to raise what is known of a timeout when it is waited for."""
        return EventOverlap(event.event, self._raise_timeout) if event.event is not None else event

    def enter(self, entered: Entered) -> None:
        """Note how far the call under way has come."""
        self.entered = entered

    def lane(self, streams: StreamArguments) -> Lane:
        """The streams of a call."""
        return Lane(self.comm_stream, streams)

    # --- errors --------------------------------------------------------------------------------------------------

    def check(self, wait: bool = False) -> None:
        if self.broken:
            raise UnavailableError(f"the buffer is broken since: {self.broken}")
        if wait:
            torch.cuda.synchronize(self.device)
        self._raise_timeout()
        if wait:
            pending = self._take_pending()
            if pending is not None:
                raise pending

    def failure(self) -> Error:
        """What the call under way ran into, which is known to have failed."""
        return self._take_pending() or Error("the call failed, and an error of an earlier call hides why")

    def _look(self) -> None:
        """Take the error that kernels reported, if there is one, and if no other is pending; a timeout in any case."""
        if self.runtime.has_timeout() or (self._pending is None and self.runtime.has_error()):
            record = self.runtime.take_error(self.num_ranks)
            if record is not None:
                self._pending = to_error(self, record, self._agreed_names)

    def _take_pending(self) -> Error | None:
        self._look()
        error, self._pending = self._pending, None
        if isinstance(error, PeerTimeoutError):
            self.broken = str(error)
            raise error
        return error

    def _raise_timeout(self) -> None:
        self._look()
        if isinstance(self._pending, PeerTimeoutError):
            self._take_pending()

    # --- the rest ------------------------------------------------------------------------------------------------

    def limit_waits(self, seconds: float) -> None:
        self.timeout = min(self.timeout, seconds)
        self.group.limit = self.timeout

    def local_memory(self, use_rdma_buffer: bool) -> torch.Tensor:
        if use_rdma_buffer or self.num_nvl_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        memory = WindowMemory(self.runtime.window, self.runtime.control_bytes, self.num_nvl_bytes)
        return torch.as_tensor(memory, device=self.device)

    def stats(self) -> dict[str, dict[str, Any]]:
        torch.cuda.synchronize(self.device)
        found = {}
        for index, (name, counter) in enumerate(self.counters.items()):
            passes, last = self.runtime.passes(index)
            found[name] = {**vars(counter), "passes": passes, "last_passes": last}
        return found

    def destroy(self) -> bool:
        if self.broken:
            self.abandon()
            return False
        try:
            torch.cuda.synchronize(self.device)  # kernels end within their own limits
            self._raise_timeout()
            with self.group.step("Buffer.destroy"):
                pass
            self.runtime.close_peers()
            with self.group.step("Buffer.destroy: closing windows"):
                pass
        except (PeerTimeoutError, UnavailableError):
            self.abandon()
            return False
        pending = self._take_pending()
        self.runtime.free()
        self.pool = None  # its tensors keep the window, as long as they live
        self.group.comm.Free()
        if pending is not None:
            warnings.warn(f"Buffer.destroy on rank {self.rank}: nobody has been told that {pending}", RuntimeWarning, 3)
        return True

    def abandon(self) -> None:
        self.runtime.abandon()
        keep_forever(self.runtime, self.group)
