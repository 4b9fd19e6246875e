"""`Region`: the symmetric memory of a buffer's low-latency calls, and where every rank's lies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import Any

import torch

from ... import nvshmem_env
from ...bootstrap import Group, Topology
from ...errors import PeerTimeoutError
from .nvshmem import World, join

# Test-only: "1" has all peers reached by puts, also over NVLink.
FORCE_PUTS_VARIABLE = "HPC_MOE_TEST_FORCE_PUTS"


def find_far_ranks(topology: Topology, allow_nvlink: bool) -> set[int]:
    """Ranks that are reached by puts, whatever NVSHMEM gives pointers for. As many on every rank.

    They are those of other nodes, also where nodes are laid out on one host: so what is tested there is what runs on
    several. Without NVLink they are all.
    """
    is_pure = not allow_nvlink or os.environ.get(FORCE_PUTS_VARIABLE) == "1"
    near = {topology.rank} if is_pure else set(topology.local_ranks)
    return set(range(len(topology.node_of_rank))) - near


class _Memory:
    """Bytes as torch takes them (the CUDA array interface)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


class Region:
    """`num_bytes` of symmetric memory on each rank of a group. Construction is collective: all fail, or none.

    Args:
        group: the ranks.
        device: this rank's GPU.
        num_bytes: of each rank; the same on all.
        far_ranks: see `find_far_ranks`.
        plan_arguments: of `nvshmem_env.plan`.

    Attributes:
        num_bytes: of each rank.
        addresses: of every rank's, as this process sees it; this rank's own for those in `put_ranks`.
        put_ranks: ranks that are reached through NVSHMEM's puts, not by stores.
        queue_pairs: handles of those that the puts are spread over; none if NVSHMEM chooses.
    """

    def __init__(
        self, group: Group, device: torch.device, num_bytes: int, far_ranks: Collection[int], **plan_arguments: Any
    ) -> None:
        def make_plan(version: nvshmem_env.Version, environ: Any) -> nvshmem_env.Plan:
            fabric = nvshmem_env.detect_fabric(nvshmem_version=version, environ=environ)
            return nvshmem_env.plan(environ=environ, fabric=fabric, low_latency_mode=True, **plan_arguments)

        self._group, self.num_bytes = group, num_bytes
        self._address = 0
        self._memory: torch.Tensor | None = None
        self.queue_pairs: list[int] = []
        self.world: World = join(group, range(group.size), device=device.index, make_plan=make_plan)
        with self.freed_on_error():
            self._address = self.world.malloc(group, num_bytes, lambda: torch.cuda.mem_get_info(device)[0])
            with group.step("looking for the peers' symmetric memory"):
                self.addresses = [self.world.library.ptr(self._address, pe) for pe in range(group.size)]
                # Now, not when it is first asked for: that may be under graph capture.
                self._memory = torch.as_tensor(_Memory(self._address, num_bytes), device=device)
            puts = self._find_puts(far_ranks)
            if any(puts):  # all ranks take part, also those that put nothing
                self.queue_pairs = self.world.share_queue_pairs(group, plan_arguments["num_qps_per_rank"])
        self.put_ranks = puts[group.rank]
        # Nobody writes to these addresses; but what lies where is computed from them.
        self.addresses = [self._address if r in self.put_ranks else a for r, a in enumerate(self.addresses)]

    def _find_puts(self, far_ranks: Collection[int]) -> list[set[int]]:
        """Of each rank, its far ranks, and those that it cannot write to, or that cannot write to it. Collective."""
        rank, size = self._group.rank, self._group.size
        own = bytes(int(r != rank and (r in far_ranks or address == 0)) for r, address in enumerate(self.addresses))
        everybody = self._group.exchange("agreeing on who is reached how", len(own), lambda: own)
        return [{r for r in range(size) if everybody[of][r] or everybody[r][of]} for of in range(size)]

    def memory(self) -> torch.Tensor:
        """This rank's bytes, `[num_bytes] uint8`. Not to be used once they are freed."""
        assert self._memory is not None, "the region was freed"
        return self._memory

    def free(self) -> None:
        """Let go of it. Collective; no kernel may use it any more.

        Raises:
            Error: NVSHMEM did not free it, or did not end.
            PeerTimeoutError: a rank did not come.
        """
        self._give_back()
        self.world.release(self._group)

    def _give_back(self) -> None:
        self._memory = None
        if self._address:
            self.world.free(self._group, self._address)

    @contextlib.contextmanager
    def freed_on_error(self) -> Iterator[None]:
        """Free it if the block raises, which it does on all ranks or on none, but where a rank did not come."""
        try:
            yield
        except PeerTimeoutError:
            self.abandon()
            raise
        except Exception:
            self._give_back()
            self.world.leave()
            raise

    def abandon(self) -> None:
        """Never free it: a peer was lost. Local."""
        self.world.abandon()
