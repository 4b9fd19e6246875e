"""`Buffer`: the library's interface. It checks arguments, hands requests to a backend, and shapes what comes back.

Letters: T tokens of this rank, H hidden, K top-k, R ranks, N nodes, E experts, L = E / R local experts (expert e lives
on rank e // L), M = `num_max_dispatch_tokens_per_rank`, N_recv the rows this rank received.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar

import torch
from mpi4py import MPI

from . import _C, checks
from ._backends import Backend, make_backend
from ._backends.requests import StreamArguments
from .bootstrap import Group, agree, find_topology
from .config import Config, low_latency_region_bytes
from .errors import ArgumentError, Error, PeerTimeoutError, UnavailableError
from .events import EventOverlap
from .handles import DispatchHandle, LowLatencyHandle

topk_idx_t = torch.int64
_REACHED = EventOverlap()  # of calls that run on the current stream

Tensors = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


# Written out, for generators take several times as long, and a low-latency call is short.
class _Call:
    """A collective call. Whatever its checks raise is told to the peers, which raise too; what goes wrong behind them,
    but for what all ranks agree on, leaves it half done, and breaks the buffer.

    Attributes:
        backend: of the buffer.
        is_checked: set to True when its arguments have passed, or where it has none.
    """

    __slots__ = ("_buffer", "_cleaning", "_name", "backend", "is_checked")

    def __init__(self, buffer: Buffer, name: str, is_checked: bool, cleaning: bool) -> None:
        self._buffer, self._name, self.is_checked, self._cleaning = buffer, name, is_checked, cleaning

    def __enter__(self) -> _Call:
        self.backend = self._buffer._usable(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if self.is_checked:
            self._fail(error)
        elif isinstance(error, Exception):
            self._reject(error)

    def _reject(self, error: Exception) -> None:
        late = None
        try:
            if self._cleaning:
                self.backend.reject_cleaning(error)
            else:
                self.backend.reject(self._name, error)
        except PeerTimeoutError as caught:
            late = caught  # worth a mention, but the arguments are what is wrong
        if isinstance(error, (ArgumentError, UnavailableError)):
            raise type(error)(f"Buffer.{self._name}: {error}") from late

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, ArgumentError):
            raise ArgumentError(f"Buffer.{self._name}: {error}") from None
        if not self.backend.is_in_step(error):
            self.backend.broken = self.backend.broken or f"{self._name}: {type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and not isinstance(error, Error):
            raise Error(f"Buffer.{self._name}: {error}") from error


class Buffer:
    """Communication buffers of one rank, and the calls that use them.

    Construction and every call that moves tokens are collective: all ranks of `comm` make the same calls in the same
    order. Bad input raises `ArgumentError` on every rank (on the others, naming the rank that has it) and leaves the
    buffer usable. A peer that does not come raises `PeerTimeoutError` and leaves it broken: later calls raise
    `UnavailableError`. On CUDA, a call that does not wait for the GPU (`dispatch` with a handle or `num_worst_tokens`,
    `combine`, `get_dispatch_layout`, low-latency calls) leaves what it cannot know yet to the next call, or to `check`.

    Use it as a context manager, or call `destroy()` on all ranks.

    Attributes:
        rank: this rank in `group`.
        group_size: R.
        group: the communicator that was passed.
        num_nvl_bytes: bytes of this rank's window for its node.
        num_rdma_bytes: bytes for traffic between nodes and for the low-latency mode.
        low_latency_mode: whether low-latency calls are possible.
        num_sms: the most streaming multiprocessors that a CUDA call takes; see `set_num_sms`.
        timeout: seconds that any wait for a peer may last.
        topology: which ranks are on which node.
        runtime: the C++ runtime.
    """

    num_sms: ClassVar[int] = 24  # docs/gpu.md says why

    def __init__(
        self,
        comm: MPI.Intracomm,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 12,
        *,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        enable_shrink: bool = False,
        explicitly_destroy: bool = False,
        device: str | None = None,
        ranks_per_node: int | None = None,
        timeout: float = 100.0,
    ) -> None:
        """Connect the ranks of a communicator. Collective.

        Args:
            comm: any intra-communicator; the buffer works on a duplicate of it.
            num_nvl_bytes: bytes of the window that this rank's node peers write; 0: no `dispatch` and `combine` (with
                more than one rank). `Config.get_nvl_buffer_size_hint` says what makes 4096 tokens fit in one pass;
                anything from `hpc_moe.config.minimum_nvl_bytes(R)` works, in more passes. On CUDA half of it is the
                pool, in which results of `dispatch` lie while there is room.
            num_rdma_bytes: bytes for traffic between nodes and for the low-latency mode
                (`get_low_latency_rdma_size_hint`); 0 on several nodes: the library chooses what normal calls get. On
                CUDA more memory comes on top for each rank of another node, if there are at most 8 ranks.
            low_latency_mode: make low-latency calls possible.
            num_qps_per_rank: NVSHMEM queue pairs per rank.
            allow_nvlink_for_low_latency_mode: let low-latency calls use NVLink inside a node.
            allow_mnnvl: let NVSHMEM use NVLink between nodes.
            enable_shrink: a low-latency call masks a rank that times out, and goes on, in place of raising.
            explicitly_destroy: accepted for compatibility; a buffer should always be destroyed, and is never destroyed
                behind your back, for that is collective.
            device: `"cpu"`, `"cuda"` or `"cuda:i"`; None: CUDA where every rank has a GPU of its own and CUDA has what
                the buffer needs, else CPU. Without an index the rank's GPU becomes torch's current device: the one that
                is current if that is not the first, else the one of the local rank.
            ranks_per_node: lay out nodes of this many consecutive ranks, in place of those that share memory.
            timeout: seconds that any wait for a peer may last.

        Raises:
            ArgumentError: an argument is wrong, or differs between ranks; on every rank.
            BootstrapError: a step failed on some rank; every rank raises it with that rank's message.
            PeerTimeoutError: a rank did not take part within `timeout`.
            UnavailableError: `device` is CUDA, and this build has no CUDA runtime, there are too few GPUs, or the
                buffer needs what CUDA does not have yet (normal calls between nodes, more than 32 ranks).
        """
        self._backend: Backend | None = None
        checks.communicator(comm)
        # Of a wrong timeout the others must still be told.
        group = Group(comm, timeout if checks.is_timeout(timeout) else 100.0)
        arguments = {
            "num_nvl_bytes": num_nvl_bytes,
            "num_rdma_bytes": num_rdma_bytes,
            "low_latency_mode": low_latency_mode,
            "num_qps_per_rank": num_qps_per_rank,
            "allow_nvlink_for_low_latency_mode": allow_nvlink_for_low_latency_mode,
            "allow_mnnvl": allow_mnnvl,
            "enable_shrink": enable_shrink,
            "explicitly_destroy": explicitly_destroy,
            "device": device,
            "ranks_per_node": ranks_per_node,
            "timeout": timeout,
        }
        self.group = comm
        self.rank, self.group_size = group.rank, group.size
        with group.freed_on_error():
            checked = agree(group, arguments, lambda: checks.buffer_arguments(arguments, group.size))
            topology = find_topology(group, checked["ranks_per_node"])
            num_nvl_bytes = checked["num_nvl_bytes"]
            num_rdma_bytes = checks.rdma_bytes(num_nvl_bytes, checked["num_rdma_bytes"], topology.num_nodes)
            self._backend = make_backend(
                group,
                topology,
                kind=checked["device"],
                device=device,
                num_nvl_bytes=num_nvl_bytes,
                num_rdma_bytes=num_rdma_bytes,
                low_latency_mode=low_latency_mode,
                enable_shrink=enable_shrink,
                network={
                    name: arguments[name]
                    for name in ("num_qps_per_rank", "allow_nvlink_for_low_latency_mode", "allow_mnnvl")
                },
                timeout=float(checked["timeout"]),
            )
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.timeout = float(checked["timeout"])
        self.topology = topology
        self._enable_shrink = enable_shrink
        self.runtime = self._backend.runtime
        self._facts = checks.BufferFacts(
            self,
            self.group_size,
            topology.ranks_of_node,
            self._backend.device,
            self._backend.layout,
            low_latency_mode,
            num_rdma_bytes,
        )

    # --- life --------------------------------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Release the buffer's memory. Collective; a second call does nothing.

        If a peer does not take part (or was lost before), or NVSHMEM fails, the memory that peers may still use stays
        allocated until the process ends, and a `RuntimeWarning` says so.
        """
        if self._backend is None:
            return
        backend, self._backend = self._backend, None
        if not backend.destroy():
            warnings.warn(
                f"Buffer.destroy on rank {self.rank}: a peer is gone or masked, or NVSHMEM failed; memory that peers "
                "may use stays allocated until this process ends",
                RuntimeWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self._backend is not None:
            # The others may not be leaving too: the error should show soon.
            self._backend.limit_waits(5.0)
        self.destroy()

    def __del__(self) -> None:
        backend = getattr(self, "_backend", None)
        if backend is not None and not MPI.Is_finalized():
            backend.abandon()
            warnings.warn(
                f"a Buffer on rank {self.rank} was dropped without destroy(); memory that peers may use stays "
                "allocated until this process ends",
                RuntimeWarning,
                stacklevel=2,
            )

    def check(self) -> None:
        """Raise what is wrong with the buffer. On CUDA this waits for the GPU.

        Raises:
            ArgumentError: in an earlier call that did not wait for the GPU, a rank (this one or another) passed
                something wrong. The buffer works on.
            PeerTimeoutError: an earlier call waited too long for a peer.
            UnavailableError: the buffer was destroyed, or is broken since a timeout.
        """
        with self._running("check") as call:
            call.backend.check(wait=True)

    def stats(self) -> dict[str, dict[str, Any]]:
        """What the buffer did so far, per operation: `calls`, `passes`, `last_passes`, `seconds`, `wait_seconds`.

        On CUDA, where this waits for the GPU, seconds are those of the CPU, and `pooled` counts the calls whose results
        lie in the window's pool.
        """
        return self._usable("stats").stats()

    def _usable(self, name: str) -> Backend:
        if self._backend is None:
            raise UnavailableError(f"Buffer.{name}: the buffer was destroyed")
        try:
            self._backend.check()
        except UnavailableError as error:
            raise UnavailableError(f"Buffer.{name}: {error}") from None
        return self._backend

    def _checking(self, name: str, cleaning: bool = False) -> _Call:
        """A collective call whose arguments are to be checked."""
        return _Call(self, name, False, cleaning)

    def _running(self, name: str) -> _Call:
        """A collective call, or a part of one, behind the checks."""
        return _Call(self, name, True, False)

    # --- normal calls ------------------------------------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count where this rank's tokens go. Not collective.

        Args:
            topk_idx: `[T, K] int64`, the experts that each token selected, -1 for none; distinct within a token.
            num_experts: E, a multiple of R.
            previous_event: run after this event.
            async_finish: do not make the current stream wait.
            allocate_on_comm_stream: allocate the results on the communication stream.

        Returns:
            `(num_tokens_per_rank [R] int32, num_tokens_per_rdma_rank [N] int32 or None on one node,
            num_tokens_per_expert [E] int32, is_token_in_rank [T, R] bool, event)`.

        Raises:
            ArgumentError: an argument is wrong. (What is wrong with indices on a GPU is raised by the next call or by
                `check`; such an index counts as -1.)
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "get_dispatch_layout"
        backend = self._usable(name)
        with _naming(name):
            checks.stream_arguments(previous_event, async_finish, allocate_on_comm_stream)
            idx = checks.topk_indices(self._facts, topk_idx)
            experts = checks.expert_count("num_experts", num_experts, self.group_size)
            streams = StreamArguments(previous_event, async_finish, allocate_on_comm_stream)
            layout, event = backend.get_layout(idx, experts, streams)
        return (
            layout.num_tokens_per_rank,
            layout.num_tokens_per_rdma_rank,
            layout.num_tokens_per_expert,
            layout.is_token_in_rank,
            event,
        )

    def dispatch(
        self,
        x: Tensors,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        num_experts: int | None = None,
        expert_layout: str = "token",
    ) -> tuple[Any, Any, Any, Any, Any, EventOverlap]:  # which are None depends on the arguments: see Returns
        """Send every token once to each rank that holds one of its experts. Collective.

        What is received is ordered by source rank, then by source token index.

        Args:
            x: `[T, H] bfloat16`, or `(e4m3 [T, H], scales)` with scales `[T, H/128] float32` or `[T, H/512] int32`
                (UE8M0, four to an int32) of any strides. H is a multiple of 128 up to 16384.
            handle: of an earlier dispatch, whose routing is used again; then the layout and top-k arguments are None.
            num_tokens_per_rank: `[R] int32`. This and the next three are what `get_dispatch_layout` returns; give all
                of them, or none and `num_experts`.
            num_tokens_per_rdma_rank: `[N] int32`; None on one node.
            is_token_in_rank: `[T, R] bool`.
            num_tokens_per_expert: `[E] int32`.
            topk_idx: `[T, K] int64`, -1 for none; distinct within a token.
            topk_weights: `[T, K] float32`.
            expert_alignment: round the tokens of each expert up to a multiple of this.
            num_worst_tokens: if positive, return this many rows, whatever arrives. Too few is an error on every rank,
                and no row is sent.
            config: tuning; see `Config`.
            previous_event: run after this event.
            async_finish: do not make the current stream wait.
            allocate_on_comm_stream: allocate the results on the communication stream.
            num_experts: E, where the layout arguments are omitted.
            expert_layout: `"token"`: a received token is one row. `"grouped"`: it is one row per local expert that it
                selected, rows lie by expert (within one, by source rank and token), and each expert's rows are padded
                with zeros to `expert_alignment`.

        Returns:
            `(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event)`: recv_x like
            x; `recv_topk_idx [N_recv, K] int64` of local experts, -1 where elsewhere; `recv_topk_weights [N_recv, K]
            float32`, 0 there (both one value per row in the grouped layout, and None where not given); the aligned
            count of each local expert (empty with `num_worst_tokens`). With a handle: `(recv_x, None, None, None,
            None, event)`.

        Raises:
            ArgumentError: an argument is wrong here or on another rank, or differs between ranks.
            PeerTimeoutError: a peer did not come.
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "dispatch"
        with self._checking(name) as call:
            self._check_normal_call(config, previous_event, async_finish, allocate_on_comm_stream)
            request = checks.dispatch_request(
                self._facts,
                x,
                handle,
                {
                    "num_tokens_per_rank": num_tokens_per_rank,
                    "num_tokens_per_rdma_rank": num_tokens_per_rdma_rank,
                    "is_token_in_rank": is_token_in_rank,
                    "num_tokens_per_expert": num_tokens_per_expert,
                },
                topk_idx,
                topk_weights,
                expert_alignment,
                num_worst_tokens,
                num_experts,
                expert_layout,
            )
            request.streams = self._stream_arguments(config, previous_event, async_finish, allocate_on_comm_stream)
            call.backend.check_normal(request)
            call.is_checked = True
            result = call.backend.dispatch(request)
        recv_x = result.recv_x if result.recv_scales is None else (result.recv_x, result.recv_scales)
        if result.handle is None:
            return recv_x, None, None, None, None, result.event
        result.handle._owner = self
        return (
            recv_x,
            result.recv_topk_idx,
            result.recv_topk_weights,
            result.num_recv_tokens_per_expert,
            result.handle,
            result.event,
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Send rows back to where their tokens came from, and sum them there, without weights. Collective.

        The rows of a token are added in the order of the ranks it went to, then the biases; accumulation is float32.
        With several nodes, each node's sum travels as bf16.

        Args:
            x: `[N_recv, H] bfloat16`, rows in the order of the dispatch's `recv_x` (either layout).
            handle: of the dispatch.
            topk_weights: float32, `[N_recv, K]`, or one value per row in the grouped layout; summed alike.
            bias: none, one or two `[T, H] bfloat16`, added to the result.
            config: tuning; see `Config`.
            previous_event: run after this event.
            async_finish: do not make the current stream wait.
            allocate_on_comm_stream: allocate the results on the communication stream.

        Returns:
            `(combined_x [T, H] bfloat16, combined_topk_weights [T, K] float32 or None, event)`.

        Raises:
            ArgumentError: an argument is wrong here or on another rank, or differs between ranks.
            PeerTimeoutError: a peer did not come.
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "combine"
        with self._checking(name) as call:
            self._check_normal_call(config, previous_event, async_finish, allocate_on_comm_stream)
            request = checks.combine_request(self._facts, x, handle, topk_weights, bias)
            request.streams = self._stream_arguments(config, previous_event, async_finish, allocate_on_comm_stream)
            call.backend.check_normal(request)
            call.is_checked = True
            result = call.backend.combine(request)
        return result.combined_x, result.combined_topk_weights, result.event

    @staticmethod
    def _stream_arguments(
        config: Config | None,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> StreamArguments:
        num_sms = Buffer.num_sms if config is None else config.num_sms
        return StreamArguments(previous_event, async_finish, allocate_on_comm_stream, num_sms)

    def _check_normal_call(
        self, config: Any, previous_event: Any, async_finish: Any, allocate_on_comm_stream: Any
    ) -> None:
        if self.num_nvl_bytes == 0 and self.group_size > 1:
            raise ArgumentError(
                "the buffer was constructed with num_nvl_bytes=0, for low-latency calls only; pass, for example, "
                f"num_nvl_bytes=Buffer.get_dispatch_config({self.group_size}).get_nvl_buffer_size_hint(2 * hidden, "
                f"{self.group_size})"
            )
        if config is not None and not isinstance(config, Config):
            raise ArgumentError(f"config must be a Config or None; got {checks.describe(config)}")
        checks.stream_arguments(previous_event, async_finish, allocate_on_comm_stream)

    # --- low-latency calls -------------------------------------------------------------------------------------------

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: torch.Tensor | None = None,
    ) -> tuple[Any, torch.Tensor, LowLatencyHandle, EventOverlap, Any]:  # a pair and a hook, or not: see Returns
        """Send up to M tokens to the ranks that hold their experts, and lay them out by expert. Collective.

        The rows of an expert are the first `recv_count[e]` of `recv_x[e]`, ordered by source rank, then token; the
        others are undefined.

        Args:
            x: `[T, H] bfloat16`, T at most M; H a multiple of 128 (512 with `use_ue8m0`).
            topk_idx: `[T, K] int64`, -1 for none; distinct within a token.
            num_max_dispatch_tokens_per_rank: M, the same on all ranks.
            num_experts: E, a multiple of R.
            cumulative_local_expert_recv_stats: `[L] int32`; the tokens of each local expert are added.
            dispatch_wait_recv_cost_stats: `[R] int64`; the wait for each rank is added, in GPU clock cycles (on CPU,
                nanoseconds).
            use_fp8: cast to e4m3, with one scale per 128 channels: `amax / 448`, amax at least 1e-4.
            round_scale: with `use_fp8`, round scales up to powers of two.
            use_ue8m0: with both, store scales as exponent bytes, four to an int32.
            async_finish: do not make the current stream wait; excludes `return_recv_hook`.
            return_recv_hook: only send; the returned hook receives, and fills the returned tensors. The same on all
                ranks. At most two sends may be unreceived, on CUDA of the same M, H and K. Hooks run in the order of
                the calls: one runs those before it, too. (An MPI that needs the sender's help for large messages
                delivers them while the sender is in a later call.)
            topk_weights: `[T, K] float32`: they travel along, and `low_latency_combine` sums a rank's experts before
                sending; it must then be given the same weights.

        Returns:
            `(recv_x, recv_count [L] int32, handle, event, hook)`: recv_x `[L, M*R, H] bfloat16`, or with fp8 `(e4m3,
            scales)`, scales `[L, M*R, H/128] float32` or `[L, M*R, H/512] int32`, their last two dimensions
            column-major. hook is None without `return_recv_hook`.

        Raises:
            ArgumentError: an argument is wrong here or on another rank, or differs between ranks. (What is wrong with
                indices on a GPU is raised by the next call or by `check`; such an index counts as -1.)
            PeerTimeoutError: a peer did not come (with `enable_shrink` it is masked instead).
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "low_latency_dispatch"
        with self._checking(name) as call:
            request = checks.low_latency_dispatch_request(
                self._facts,
                x,
                topk_idx,
                num_max_dispatch_tokens_per_rank,
                num_experts,
                cumulative_local_expert_recv_stats,
                dispatch_wait_recv_cost_stats,
                use_fp8,
                round_scale,
                use_ue8m0,
                async_finish,
                return_recv_hook,
                topk_weights,
            )
            call.backend.check_unreceived(return_recv_hook)
            call.is_checked = True
            result = call.backend.low_latency_dispatch(request)
        result.handle._owner, result.handle._form = self, request.form
        recv_x = result.recv_x if result.recv_scales is None else (result.recv_x, result.recv_scales)
        hook = self._receive(name, result.receive, return_recv_hook)
        return recv_x, result.recv_count, result.handle, _REACHED, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Any]:
        """Send the experts' rows back, and sum each token's with its weights. Collective.

        Sums are in the order of `topk_idx`'s columns; if weights travelled with the dispatch, each rank sums its own
        experts first (that sum travels as bf16), and ranks are added in their order. Accumulation is float32.

        Args:
            x: `[L, M*R, H] bfloat16`, rows in the order of the dispatch's `recv_x`.
            topk_idx: `[T, K] int64`, as given to the dispatch. (On CUDA it is not compared with that.)
            topk_weights: `[T, K] float32`; the same values as at the dispatch, if they were given there.
            handle: of the dispatch.
            use_logfmt: send rows in a logarithmic format of 10 bits a channel.
            zero_copy: read the rows from `get_next_low_latency_combine_buffer(handle)`, not from x; excludes
                `use_logfmt`.
            async_finish: do not make the current stream wait; excludes `return_recv_hook`.
            return_recv_hook: only send; the returned hook receives, and fills the result. See `low_latency_dispatch`.
            out: `[T, H] bfloat16` to write the result to, contiguous, on CUDA from a multiple of 16 bytes on.
            combine_wait_recv_cost_stats: `[R] int64`; see `low_latency_dispatch`.

        Returns:
            `(combined_x [T, H] bfloat16, event, hook)`; hook is None without `return_recv_hook`.

        Raises:
            ArgumentError: an argument is wrong here or on another rank, or differs between ranks.
            PeerTimeoutError: a peer did not come (with `enable_shrink` it is masked instead).
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "low_latency_combine"
        with self._checking(name) as call:
            backend = call.backend
            request = checks.low_latency_combine_request(
                self._facts,
                x,
                topk_idx,
                topk_weights,
                handle,
                use_logfmt,
                zero_copy,
                async_finish,
                return_recv_hook,
                out,
                combine_wait_recv_cost_stats,
            )
            if zero_copy:
                request.x = backend.staging_buffer(handle)
            backend.check_routing(request)
            backend.check_unreceived(return_recv_hook)
            call.is_checked = True
            combined, receive = backend.low_latency_combine(request)
        return combined, _REACHED, self._receive(name, receive, return_recv_hook)

    def _receive(self, name: str, receive: Callable[[], None] | None, later: bool) -> Callable[[], None] | None:
        """Run the receive half of a call now, if there is one left, or return what runs it later."""
        if receive is None:
            return None

        def hook() -> None:
            with self._running(name):
                receive()

        if later:
            return hook
        with self._running(name) as call:
            call.backend.receive_now(receive)
        return None

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """The staging buffer, `[L, M*R, H] bfloat16`, that a `zero_copy` combine of this handle reads.

        There are two: the next dispatch uses the other one, and the one after it this one again. On CUDA, calls of
        other sizes may write there.

        Raises:
            ArgumentError: the handle is not of a low-latency dispatch of this buffer.
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "get_next_low_latency_combine_buffer"
        backend = self._usable(name)
        with _naming(name):
            checks.own_handle(self._facts, handle, LowLatencyHandle)
        return backend.staging_buffer(handle)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Start afresh: agree, among the ranks that are not masked, on who is masked. Collective among them.

        Needed after `low_latency_update_mask_buffer(rank, False)` or `low_latency_clean_mask_buffer()`, which take
        effect here; harmless otherwise. Handles from before must not be used with a rank that was masked.

        Args:
            num_max_dispatch_tokens_per_rank: M, of the calls to come.
            hidden: H.
            num_experts: E.

        Raises:
            ArgumentError: an argument is wrong, or a send is unreceived.
            PeerTimeoutError: a rank that is not masked did not come (with `enable_shrink` it is masked, too).
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "clean_low_latency_buffer"
        with self._checking(name, cleaning=True) as call:
            checks.low_latency_mode(self._facts)
            most = checks.integer("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, minimum=1)
            checks.hidden_size("hidden", checks.integer("hidden", hidden, minimum=1))
            experts = checks.expert_count("num_experts", num_experts, self.group_size)
            checks.low_latency_size(self._facts, most, hidden, experts)
            call.backend.check_nothing_unreceived()
        with _naming(name):
            call.backend.clean_low_latency({"M": most, "hidden": hidden, "num_experts": experts})

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank, so that low-latency calls skip it, or ask for its return. Not collective.

        Masking takes effect at once, unmasking in `clean_low_latency_buffer`.

        Args:
            rank_to_mask: another rank.
            mask: True to mask it, False to unmask it.

        Raises:
            ArgumentError: an argument is wrong, or the buffer was constructed without `enable_shrink`.
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "low_latency_update_mask_buffer"
        backend = self._shrinkable(name)
        with _naming(name):
            rank = checks.integer("rank_to_mask", rank_to_mask, minimum=0)
            if rank >= self.group_size or rank == self.rank:
                raise ArgumentError(f"rank_to_mask must be another rank below {self.group_size}; got {rank}")
            backend.set_mask(rank, checks.flag("mask", mask))

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write which ranks are masked.

        Args:
            mask_status: `[R] int32`, filled with 1 for masked ranks and 0 for others.

        Raises:
            ArgumentError: the tensor does not fit, or the buffer was constructed without `enable_shrink`.
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "low_latency_query_mask_buffer"
        backend = self._shrinkable(name)
        with _naming(name):
            checks.tensor("mask_status", mask_status, torch.int32, [self.group_size], self._facts.device)
        backend.write_masks(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Ask for the return of all masked ranks; takes effect in `clean_low_latency_buffer`.

        Raises:
            ArgumentError: the buffer was constructed without `enable_shrink`.
            UnavailableError: the buffer is destroyed or broken.
        """
        backend = self._shrinkable("low_latency_clean_mask_buffer")
        for rank in tuple(backend.masked):
            backend.set_mask(rank, False)

    def _shrinkable(self, name: str) -> Backend:
        backend = self._usable(name)
        with _naming(name):
            checks.low_latency_mode(self._facts)
            if not self._enable_shrink:
                raise ArgumentError("the buffer must have been constructed with enable_shrink=True")
        return backend

    # --- the rest ----------------------------------------------------------------------------------------------------

    def get_comm_stream(self) -> Any:
        """The `torch.cuda.Stream` that communication runs on (on CPU, torch's only stream)."""
        return self._usable("get_comm_stream").comm_stream

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: Sequence[int] | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> torch.Tensor:
        """A view of this rank's buffer; it must not be used after `destroy()`, nor written during a call.

        On CUDA its second half is the pool: it must not be written while results of a dispatch are alive.

        Args:
            dtype: of the view.
            size: its shape; None: one dimension, as long as fits.
            offset: where it begins, in bytes.
            use_rdma_buffer: view the `num_rdma_bytes`, not the window.

        Raises:
            ArgumentError: the view does not fit into the buffer.
            UnavailableError: the buffer is destroyed or broken.
        """
        name = "get_local_buffer_tensor"
        backend = self._usable(name)
        with _naming(name):
            raw = backend.local_memory(checks.flag("use_rdma_buffer", use_rdma_buffer))
            begin = checks.integer("offset", offset, minimum=0, unit=" bytes")
            if not isinstance(dtype, torch.dtype):
                raise ArgumentError(f"dtype must be a torch.dtype; got {checks.describe(dtype)}")
            if not isinstance(size, (Sequence, type(None))) or isinstance(size, str):
                raise ArgumentError(f"size must be a shape or None; got {checks.describe(size)}")
            room = max(0, raw.numel() - begin) // dtype.itemsize
            shape = [room] if size is None else [checks.integer("size", one, minimum=0) for one in size]
            count = int(torch.Size(shape).numel())
            if begin % dtype.itemsize or begin > raw.numel() or count > room:
                raise ArgumentError(
                    f"size and offset must fit into {raw.numel()} bytes, aligned to {dtype.itemsize}; got size {shape} "
                    f"of {dtype} at offset {begin}"
                )
        return raw[begin : begin + count * dtype.itemsize].view(dtype).view(shape)

    @staticmethod
    def capture() -> EventOverlap:
        """An event that is reached when the current stream has done what it was given so far."""
        if not torch.cuda.is_initialized():
            return EventOverlap()
        event = torch.cuda.Event()
        event.record()
        return EventOverlap(event)

    @staticmethod
    def set_num_sms(num_sms: int) -> None:
        """Set how many streaming multiprocessors a CUDA call may take, for calls of all buffers without a `config`.

        Raises:
            ArgumentError: not a positive number.
        """
        with _naming("set_num_sms"):
            Buffer.num_sms = checks.integer("num_sms", num_sms, minimum=1)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The default tuning of `dispatch` on this many ranks."""
        return _default_config("get_dispatch_config", num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The default tuning of `combine` on this many ranks."""
        return _default_config("get_combine_config", num_ranks)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """`num_rdma_bytes`, in bytes, that low-latency calls of M tokens, H channels, R ranks and E experts need.

        Raises:
            ArgumentError: a number is wrong.
        """
        with _naming("get_low_latency_rdma_size_hint"):
            most = checks.integer("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, minimum=1)
            checks.hidden_size("hidden", checks.integer("hidden", hidden, minimum=1))
            ranks = checks.integer("num_ranks", num_ranks, minimum=1)
            experts = checks.expert_count("num_experts", num_experts, ranks)
        return low_latency_region_bytes(most, hidden, ranks, experts)

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether this build has CUDA kernels for sm_90."""
        return "90" in getattr(_C, "cuda_archs", "").split(";")


def _default_config(name: str, num_ranks: int) -> Config:
    with _naming(name):
        checks.integer("num_ranks", num_ranks, minimum=1)
    return Config(num_sms=Buffer.num_sms)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the call's name in front of what the checks raise."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"Buffer.{name}: {error}") from None
