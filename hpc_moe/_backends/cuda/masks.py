"""`Masks`: ranks that low-latency calls go on without, which the GPU keeps, for kernels mask those that do not come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ...errors import PeerTimeoutError
from ..addresses import address
from ..masks import agree_on_masks

if TYPE_CHECKING:
    from .backend import CudaBackend


def _bits(ranks: Iterable[int]) -> int:
    return sum(1 << rank for rank in ranks)


class Masks:
    """Who is masked."""

    def __init__(self, backend: CudaBackend) -> None:
        self._backend = backend
        self._unmasking: set[int] = set()

    def now(self) -> set[int]:
        """Who is masked when all calls have ended. Waits for the GPU."""
        return self._state()[1]

    def _state(self) -> tuple[int, set[int]]:
        """The number of the last low-latency call, and who is masked."""
        number, bits = self._backend.runtime.low_latency_state()
        return number, {rank for rank in range(self._backend.num_ranks) if bits >> rank & 1}

    def write(self, mask_status: torch.Tensor) -> None:
        """Fill `[R] int32`, behind the current stream's earlier work."""
        stream = torch.cuda.current_stream(self._backend.device)
        whole = mask_status if mask_status.is_contiguous() else torch.empty_like(mask_status).contiguous()
        self._backend.runtime.query_masks(address(whole), stream.cuda_stream)
        if whole is not mask_status:
            mask_status.copy_(whole)

    def set(self, rank: int, mask: bool) -> None:
        """Mask a rank, for calls after this on the current stream, or unmask it in the next `agree`."""
        if not mask:
            self._unmasking.add(rank)
            return
        self._unmasking.discard(rank)
        self._backend.runtime.mask_ranks(1 << rank, torch.cuda.current_stream(self._backend.device).cuda_stream)

    def agree(self, agreed: dict[str, int], rejection: str = "") -> None:
        """Agree with the ranks that are not masked on who is, and on where to go on counting calls. Waits for the GPU.

        Raises:
            ArgumentError: the ranks' arguments differ, or another rank rejected its own; what is agreed on holds all
                the same.
            PeerTimeoutError: a rank that is not masked did not come; it is masked now.
        """
        backend, name = self._backend, "clean_low_latency_buffer"
        number, masked = self._state()
        agreement = agree_on_masks(
            backend.group.messenger,
            backend.rank,
            backend.num_ranks,
            backend.timeout,
            masked=masked - self._unmasking,
            epoch=max(number, backend.epoch),  # also of handles, which ranks that were masked have fewer of
            agreed=agreed,
            rejection=rejection,
        )
        self._unmasking.clear()
        if agreement.missing:
            stream = torch.cuda.current_stream(backend.device)
            backend.runtime.mask_ranks(_bits(agreement.missing), stream.cuda_stream)
            peers = ", ".join(backend.topology.describe(rank) for rank in agreement.missing)
            raise PeerTimeoutError(
                f"{name} on rank {backend.rank} waited {backend.timeout:g} s for {peers}: an agreement on the masks "
                "did not come",
                operation=name,
                rank=backend.rank,
                peers=agreement.missing,
            )
        backend.epoch = agreement.epoch
        backend.runtime.restart_low_latency(agreement.epoch, _bits(agreement.masked))
        agreement.compare(backend.rank)
