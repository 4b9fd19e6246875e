"""`CudaBackend`: construction, the runtime, streams, and errors that kernels report.

A call that does not wait for the GPU cannot raise what a peer did wrong. The kernels write it to host memory; the next
call takes part as usual, so that the ranks stay in step, and then raises it in place of returning. `check` waits for
it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ... import _C
from ...bootstrap import Group, Topology, connect, difference
from ...config import low_latency_outbox_bytes
from ...errors import ArgumentError, BootstrapError, Error, PeerTimeoutError, UnavailableError
from ...events import EventOverlap
from ...handles import LowLatencyHandle
from ...messenger import keep_forever
from ..base import Backend
from ..requests import (
    OPERATIONS,
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    Layout,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    StreamArguments,
)
from .combine import combine
from .device import choose_device, find_what_is_missing, make_current, shares_gpus
from .dispatch import Entered, dispatch, launch_layout
from .low_latency import LowLatency
from .masks import Masks
from .pool import Pool, WindowMemory
from .region import Region, find_far_ranks
from .reports import to_error
from .streams import Lane

# GB/s that leave a GPU through its links; 0: send without caring. Unset: what GPUs of this kind have.
LINK_RATE_VARIABLE = "HPC_MOE_NVLINK_GB_PER_S"
# Test-only: the kernels that GPUs without bulk copies (before sm_90) run.
NO_BULK_VARIABLE = "HPC_MOE_TEST_NO_BULK_COPIES"
# Test-only: up to how many bytes low-latency rows are tagged; 0: never.
_TAGGED_BYTES_VARIABLE = "HPC_MOE_TEST_TAGGED_BYTES"
# Stress builds only: a seed for random delays, and a rule of the protocol to break.
_SEED_VARIABLE, _MUTATION_VARIABLE = "HPC_MOE_TEST_STRESS_SEED", "HPC_MOE_TEST_MUTATION"
_LOW_LATENCY_OPERATIONS = OPERATIONS[2:4]

T = TypeVar("T")
Request = TypeVar("Request", DispatchRequest, CombineRequest, LowLatencyDispatchRequest, LowLatencyCombineRequest)


def _link_rate() -> int:
    wish = os.environ.get(LINK_RATE_VARIABLE, "")
    if not wish:
        return -1
    if not (wish.isdecimal() and int(wish) <= 1_000_000):
        raise ArgumentError(f"{LINK_RATE_VARIABLE} must be a whole number of GB/s, 0 for no limit; got {wish!r}")
    return int(wish)


def _short_text(error: Exception) -> str:
    """What an error says, as far as a kernel's text has room for it: some 380 bytes."""
    return (str(error) or type(error).__name__).encode()[:380].decode(errors="ignore")


@dataclass
class Counter:
    """What the CPU counts of one operation: calls, results in the pool, seconds in calls and in their waits."""

    calls: int = 0
    pooled: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0


class CudaBackend(Backend):
    """The runtime on CUDA tensors. Between nodes it has low-latency calls only.

    Construction is collective: all fail, or none.
    """

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
        network: Mapping[str, Any],
        timeout: float,
    ) -> None:
        self.group, self.topology = group, topology
        self.rank, self.num_ranks = group.rank, group.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.timeout = timeout
        self.broken = ""
        with group.step("choosing the GPU"):
            missing = find_what_is_missing(topology, num_nvl_bytes, low_latency_mode)
            if missing:
                raise UnavailableError(f"device='cuda': {missing}")
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
        self.low_latency: LowLatency | None = None
        self.masks: Masks | None = None  # with enable_shrink
        try:
            connect(group, topology, self.runtime, False)
            if low_latency_mode:
                self.low_latency = LowLatency(self, self._make_region(enable_shrink, network))
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
        self.counters = {name: Counter() for name in OPERATIONS[:4]}
        self._comm_stream_is_ahead = False
        # Has waited for the communication stream, but for what is ahead; only known where there are low-latency calls.
        self._last_caller: torch.cuda.Stream | None = None
        self._agreed_names: dict[str, list[str]] = {}
        self._pending: Error | None = None
        self.entered = Entered.NOTHING
        self._told = False  # whether the peers were told that the last call failed here

    def _make_runtime(self, num_nvl_bytes: int) -> _C.CudaRuntime:
        """The runtime, whose GPU memory is its own (cudaMalloc): torch's may not be opened by peers."""
        try:
            return _C.CudaRuntime(
                self.rank,
                self.topology.node_of_rank,
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

    def _make_region(self, enable_shrink: bool, network: Mapping[str, Any]) -> Region:
        """The region: `num_rdma_bytes`; in front of them what users must not write: flags, numbers, tagged rows.

        On top comes room for the outboxes of ranks that are known to be reached by puts, unless it is among the
        `num_rdma_bytes` (see `low_latency_outbox_bytes`). A rank of this node that NVSHMEM gives no pointer for is not;
        that is rare, and calls that need more `num_rdma_bytes` then say so.
        """
        far = find_far_ranks(self.topology, network["allow_nvlink_for_low_latency_mode"])
        outboxes = len(far) * low_latency_outbox_bytes(self.num_rdma_bytes, self.num_ranks)
        num_bytes = _C.LOW_LATENCY_FIXED_BYTES + self.num_rdma_bytes + outboxes
        region = Region(self.group, self.device, num_bytes, far, **network)
        most_tagged_bytes = int(os.environ.get(_TAGGED_BYTES_VARIABLE, "-1"))
        # All ranks have cleared theirs when this ends.
        with region.freed_on_error(), self.group.step("preparing low-latency calls"):
            self.runtime.set_regions(region.addresses, region.num_bytes, most_tagged_bytes, enable_shrink)
            if region.put_ranks or self.num_ranks > _C.CUDA_MAX_RANKS:  # whose kernels serve more ranks
                bits = sum(1 << r for r in region.put_ranks)
                pes = list(range(self.num_ranks))
                self.runtime.set_puts(bits, pes, region.queue_pairs, region.world.library.low_latency_launchers())
        if enable_shrink:
            self.masks = Masks(self)
        return region

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
        masked = self._masked_unless_capturing()
        if masked:
            raise UnavailableError(f"ranks {sorted(masked)} are masked; only low-latency calls go on without them")
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
        most = _C.CUDA_MAX_LOCAL_EXPERTS * min(self.num_ranks, _C.CUDA_MAX_RANKS)
        if num_experts > most:
            raise ArgumentError(
                f"num_experts must be at most {most} on CUDA with {self.num_ranks} ranks; got {num_experts}"
            )

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        return self._call("dispatch", request, functools.partial(dispatch, self))

    def combine(self, request: CombineRequest) -> CombineResult:
        return self._call("combine", request, functools.partial(combine, self))

    # --- low-latency calls ---------------------------------------------------------------------------------------

    def _low_latency(self) -> LowLatency:
        if self.low_latency is None:
            raise self._no_low_latency()
        return self.low_latency

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        return self._call("low_latency_dispatch", request, self._low_latency().dispatch)

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> tuple[torch.Tensor, Callable[[], None] | None]:
        return self._call("low_latency_combine", request, self._low_latency().combine)

    def receive_now(self, receive: Callable[[], None]) -> None:
        receive()

    def staging_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        return self._low_latency().staging_buffer(handle)

    def check_routing(self, request: LowLatencyCombineRequest) -> None:
        self._low_latency().check_routing(request)

    def check_unreceived(self, later: bool) -> None:
        self._low_latency().check_unreceived(later)

    def check_nothing_unreceived(self) -> None:
        self._low_latency().check_nothing_unreceived()

    def clean_low_latency(self, agreed: dict[str, int]) -> None:
        """Agree on masks, or compare the arguments: there is nothing to clean."""
        if self.masks is not None:
            self.masks.agree(agreed)
        else:
            self._compare_cleaning({"agreed": agreed})

    def reject_cleaning(self, error: Exception) -> None:
        if self.low_latency is None:  # all ranks reject it alike
            return
        with contextlib.suppress(ArgumentError):  # this rank has its own to raise
            if self.masks is not None:
                self.low_latency.receive_all()  # calls are counted anew behind it
                self.masks.agree({}, _short_text(error))
            else:
                self._compare_cleaning({"rejection": _short_text(error)})

    @property
    def masked(self) -> set[int]:
        """Ranks that low-latency calls go on without. Waits for the GPU, which masks them."""
        return set() if self.masks is None else self.masks.now()

    def _masked_unless_capturing(self) -> set[int]:
        """The same for normal calls, which may be part of a graph."""
        return set() if torch.cuda.is_current_stream_capturing() else self.masked

    def write_masks(self, mask_status: torch.Tensor) -> None:
        if self.masks is not None:
            self.masks.write(mask_status)

    def set_mask(self, rank: int, mask: bool) -> None:
        if self.masks is not None:
            self.masks.set(rank, mask)

    def _compare_cleaning(self, own: dict[str, Any]) -> None:
        name = "clean_low_latency_buffer"
        try:
            said = [
                json.loads(data.rstrip(b"\0"))
                for data in self.group.exchange(name, 1000, lambda: json.dumps(own, ensure_ascii=False).encode())
            ]
        except PeerTimeoutError as error:
            self.broken = f"{name}: {error}"
            raise PeerTimeoutError(self.broken, operation=name, rank=self.rank, peers=error.peers) from None
        rejections = [
            f"rank {r} rejected its arguments: {o['rejection']}" for r, o in enumerate(said) if "rejection" in o
        ]
        if rejections:
            raise ArgumentError("; ".join(rejections))
        for key in said[0]["agreed"]:
            values = {rank: other["agreed"][key] for rank, other in enumerate(said)}
            if len(set(values.values())) > 1:
                raise ArgumentError(difference(key, values))

    def join_comm_stream(self, stream: torch.cuda.Stream) -> None:
        """Make a stream wait for calls on the communication stream, unless it has done so. Not under capture.

        Two calls at once could wait for ever: each for SMs that the other one holds, on different ranks in other order.
        """
        if self._comm_stream_is_ahead or self._last_caller not in (None, stream):
            stream.wait_stream(self.comm_stream)
            self._comm_stream_is_ahead, self._last_caller = False, stream

    def _call(
        self,
        name: str,
        request: Request,
        make: Callable[[Request], T],
    ) -> T:
        """Count the call and make it; when it has taken part, raise what an earlier one is known to have run into."""
        self.epoch += 1
        if name not in self._agreed_names:
            self._agreed_names[name] = list(request.agreed())
        self.counters[name].calls += 1
        pending, self._pending = self._pending, None  # Buffer has just looked, and what is here is no timeout
        self.entered, self._told = Entered.NOTHING, False
        try:
            result = make(request)
        except Exception as error:  # no memory for the results, say
            self._pending = self._pending or pending
            if self.entered in (Entered.NOTHING, Entered.EXCHANGE):
                self._tell(name, error, self.entered is Entered.EXCHANGE)
                self._told = True
            raise
        if self.entered is Entered.ALL_AND_WAITED:  # what earlier calls ran into is known now, on all ranks alike
            pending = pending or self._take_pending()
        if pending is not None:
            if name in _LOW_LATENCY_OPERATIONS:
                self._low_latency().receive_all()  # the caller does not get the hook of this call
            raise pending
        return result

    def is_in_step(self, error: BaseException) -> bool:
        told, self._told = self._told, False
        return told or super().is_in_step(error)

    def reject(self, name: str, error: Exception) -> None:
        if name in _LOW_LATENCY_OPERATIONS:
            has_calls = self.low_latency is not None
        else:
            has_calls = self.num_nvl_bytes > 0 or self.num_ranks == 1
            # To tell the others is to wait for all of them, and masked ones do not come.
            has_calls = has_calls and not self._masked_unless_capturing()
        if not has_calls:
            return  # all ranks reject it alike, and there is nothing to tell them through
        self.epoch += 1
        self._tell(name, error, False)

    def _tell(self, name: str, error: Exception, behind_exchange: bool) -> None:
        """Take this rank's part in a call, or in what is left of it, by telling the others that it cannot."""
        text, index = _short_text(error), OPERATIONS.index(name)
        if name in _LOW_LATENCY_OPERATIONS:
            self._low_latency().reject(index, text)
            return
        with self.lane(StreamArguments()) as lane:
            self.runtime.launch_reject(index, text, behind_exchange, lane.stream.cuda_stream)

    def known_event(self, event: EventOverlap) -> EventOverlap:
        """The event, made to raise what is known of a timeout when it is waited for."""
        return EventOverlap(event.event, self._raise_timeout) if event.event is not None else event

    def enter(self, entered: Entered) -> None:
        """Note how far the call under way has come."""
        self.entered = entered

    def lane(self, streams: StreamArguments) -> Lane:
        """The streams of a normal call, which comes behind the low-latency ones before it."""
        self._comm_stream_is_ahead |= streams.async_finish
        if self.low_latency is not None and not torch.cuda.is_current_stream_capturing():
            self._last_caller = torch.cuda.current_stream(self.device)
            self.low_latency.join(self.comm_stream)
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
        if self.runtime.has_error() and (self._pending is None or self.runtime.has_timeout()):
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
        if use_rdma_buffer and self.low_latency is not None:
            return self.low_latency.region.memory()[_C.LOW_LATENCY_FIXED_BYTES :][: self.num_rdma_bytes]
        if use_rdma_buffer or self.num_nvl_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        memory = WindowMemory(self.runtime.window, self.runtime.control_bytes, self.num_nvl_bytes)
        return torch.as_tensor(memory, device=self.device)

    def stats(self) -> dict[str, dict[str, Any]]:
        torch.cuda.synchronize(self.device)
        found = {}
        for index, (name, counter) in enumerate(self.counters.items()):
            passes, last = self.runtime.passes(index) if index < 2 else (counter.calls, 1)
            found[name] = {**vars(counter), "passes": passes, "last_passes": last}
        return found

    def destroy(self) -> bool:
        if self.broken:
            self.abandon()
            return False
        try:
            torch.cuda.synchronize(self.device)  # kernels end within their own limits
            self._raise_timeout()
            if self.masked:
                raise UnavailableError("ranks are masked")
            with self.group.step("Buffer.destroy"):
                pass
            self.runtime.close_peers()
            with self.group.step("Buffer.destroy: closing windows"):
                pass
        except (PeerTimeoutError, UnavailableError):
            self.abandon()
            return False
        pending = self._take_pending()
        if self.low_latency is not None:
            try:
                self.low_latency.region.free()
            except Error as error:  # a rank went meanwhile, or NVSHMEM failed
                self.abandon()
                self._warn(f"{error}" + (f"; and nobody has been told that {pending}" if pending else ""))
                return False
        self.runtime.free()
        self.pool = None  # its tensors keep the window, as long as they live
        self.group.comm.Free()
        if pending is not None:
            self._warn(f"nobody has been told that {pending}")
        return True

    def _warn(self, text: str) -> None:
        warnings.warn(f"Buffer.destroy on rank {self.rank}: {text}", RuntimeWarning, 4)

    def abandon(self) -> None:
        self.runtime.abandon()
        if self.low_latency is not None:
            self.low_latency.region.abandon()
        keep_forever(self.runtime, self.group)
