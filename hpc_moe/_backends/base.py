"""`Backend`: what `Buffer` asks of a backend. Requests come checked; errors are those that `Buffer` documents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ArgumentError, UnavailableError
from ..events import EventOverlap
from ..handles import LowLatencyHandle
from .requests import (
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


class Backend(ABC):
    """Runs the calls of one buffer.

    Attributes:
        device: where tensors must lie.
        comm_stream: the stream that communication runs on.
        runtime: the C++ runtime.
        broken: empty, or why the buffer cannot be used any more.
    """

    device: torch.device
    comm_stream: Any
    runtime: Any
    broken: str

    @property
    def masked(self) -> set[int]:
        """Ranks that low-latency calls go on without."""
        return set()

    @abstractmethod
    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> Layout:
        """Counts and flags of this rank's tokens, computed and checked at once. Only where tensors lie on the CPU."""

    @abstractmethod
    def get_layout(
        self, topk_idx: torch.Tensor, num_experts: int, streams: StreamArguments
    ) -> tuple[Layout, EventOverlap]:
        """Counts and flags of this rank's tokens."""

    @abstractmethod
    def check_normal(self, request: DispatchRequest | CombineRequest) -> None:
        """Refuse, before anything is announced, a normal call that this rank could not see through.

        Raises:
            ArgumentError: it does not fit.
            UnavailableError: ranks are masked.
        """

    @abstractmethod
    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Run a dispatch."""

    @abstractmethod
    def combine(self, request: CombineRequest) -> CombineResult:
        """Run a combine."""

    @abstractmethod
    def reject(self, name: str, error: Exception) -> None:
        """Take part in a call whose arguments this rank rejects: tell the others why, so that they raise too."""

    def is_in_step(self, error: BaseException) -> bool:
        """Whether all ranks know of an error that ended a call under way here, so that the next call works."""
        return isinstance(error, ArgumentError)

    @abstractmethod
    def check(self, wait: bool = False) -> None:
        """Raise what is known to be wrong; with `wait`, what is wrong once all calls have ended."""

    @abstractmethod
    def limit_waits(self, seconds: float) -> None:
        """From now on wait for peers no longer than this."""

    @abstractmethod
    def local_memory(self, use_rdma_buffer: bool) -> torch.Tensor:
        """All bytes of this rank's window, or of its network buffer."""

    @abstractmethod
    def stats(self) -> dict[str, dict[str, Any]]:
        """Calls, passes and seconds per operation."""

    @abstractmethod
    def destroy(self) -> bool:
        """Release everything, if all peers take part; else keep what they may still use. Returns whether released."""

    @abstractmethod
    def abandon(self) -> None:
        """Keep memory that peers may have open until the process exits."""

    # --- low-latency calls: a backend without them refuses to be constructed for them ---------------------------------

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """Send the tokens; the result's `receive` gets those of the peers."""
        raise self._no_low_latency()

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """Send rows back; returns the sums, and what receives them; None: nothing is left to be done."""
        raise self._no_low_latency()

    def receive_now(self, receive: Callable[[], None]) -> None:
        """Run the receive half of the low-latency call that was made last."""
        raise self._no_low_latency()

    def staging_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """The staging buffer of this handle's combine, `[L, M*R, H]` bf16."""
        raise self._no_low_latency()

    def check_routing(self, request: LowLatencyCombineRequest) -> None:
        """Compare the routing that a combine was given with its dispatch's."""
        raise self._no_low_latency()

    def check_unreceived(self, later: bool) -> None:
        """Refuse a send that is to be received later, if two such are under way."""
        raise self._no_low_latency()

    def check_nothing_unreceived(self) -> None:
        """Refuse what needs all sends received."""
        raise self._no_low_latency()

    def write_masks(self, mask_status: torch.Tensor) -> None:
        """Fill `mask_status`, `[R] int32`, with 1 for masked ranks and 0 for others."""
        mask_status.copy_(torch.tensor([int(rank in self.masked) for rank in range(len(mask_status))]))

    def set_mask(self, rank: int, mask: bool) -> None:
        """Mask a rank at once, or unmask it in the next `clean_low_latency`."""
        raise self._no_low_latency()

    def clean_low_latency(self, agreed: dict[str, int]) -> None:
        """Agree on masks and on the epoch, among the ranks that are not masked or about to be unmasked."""
        raise self._no_low_latency()

    def reject_cleaning(self, error: Exception) -> None:
        """Take part in a `clean_low_latency` whose arguments this rank rejects."""
        raise self._no_low_latency()

    def _no_low_latency(self) -> UnavailableError:
        return UnavailableError(f"low-latency calls are not available on {self.device.type}")
