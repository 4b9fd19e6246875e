"""What the tests that compare with the reference share: verdicts that all ranks reach together, buffers that are kept.

Not for tests that need neither `Buffer` nor the reference.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, Phase, settings
from mpi4py import MPI

from hpc_moe.testing.reference import Bounded

if TYPE_CHECKING:
    from hpc_moe import Buffer

NODE_OF_RANK = "HPC_MOE_TEST_NODE_OF_RANK"
TIMEOUT_S = 30.0


def same_on_all_ranks(max_examples: int) -> settings:
    """Settings with which hypothesis draws the same examples on every rank.

    HPC_MOE_TEST_EXAMPLES, a factor, asks for more. There is no shrinking: it is bounded by time, which passes
    differently on each rank.
    """
    return settings(
        max_examples=max(1, int(max_examples * float(os.environ.get("HPC_MOE_TEST_EXAMPLES", "1")))),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class Verdict:
    """Collects what is wrong on this rank; `settle` makes all ranks fail if one does.

    A comparison that raised at once on one rank would leave the others in the next collective call. So comparisons
    only take notes, and the ranks exchange them at the end of each example, where all of them arrive.
    """

    def __init__(self) -> None:
        self.complaints: list[str] = []

    def true(self, name: str, condition: bool, detail: object = "") -> None:
        """Note a complaint unless `condition` holds."""
        if not condition:
            self.complaints.append(f"{name}: {detail}" if detail != "" else name)

    def same(self, name: str, actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
        """Same dtype, shape and bits."""
        if actual is None or expected is None:
            self.true(name, actual is expected, f"got {_show(actual)}, expected {_show(expected)}")
            return
        if actual.dtype != expected.dtype or actual.shape != expected.shape:
            self.complaints.append(f"{name}: got {_show(actual)}, expected {_show(expected)}")
            return
        different = bits(actual) != bits(expected)
        if different.any():
            where = different.nonzero()[0].tolist()
            at = f"first at {where}: got {actual[tuple(where)]}, expected {expected[tuple(where)]}"
            self.complaints.append(f"{name}: {int(different.sum())} of {different.numel()} differ, {at}")

    def within(self, name: str, actual: torch.Tensor, expected: Bounded, dtype: torch.dtype = torch.bfloat16) -> None:
        """Same shape, the given dtype, and every element within its bound."""
        if actual.dtype != dtype or actual.shape != expected.value.shape:
            self.complaints.append(f"{name}: got {_show(actual)}, expected {dtype} {list(expected.value.shape)}")
            return
        excess = expected.worst_excess(actual)
        if excess > 0:
            over = (actual.double() - expected.value).abs() - expected.bound
            where = torch.unravel_index(over.nan_to_num(torch.inf).flatten().argmax(), over.shape)
            self.complaints.append(
                f"{name}: {excess:.3g} beyond the bound at {[int(i) for i in where]}: got {float(actual[where])}, "
                f"expected {float(expected.value[where])} +- {float(expected.bound[where]):.3g}"
            )

    def settle(self, comm: MPI.Intracomm, label: str = "") -> None:
        """Raise AssertionError on every rank if any rank has a complaint. Collective."""
        everybody = comm.allgather(self.complaints)
        if any(everybody):
            lines = [f"rank {rank}: {line}" for rank, lines in enumerate(everybody) for line in lines[:5]]
            raise AssertionError("\n".join([label, *lines]))


@contextmanager
def together(comm: MPI.Intracomm, label: str = "") -> Iterator[Verdict]:
    """A `Verdict` that is settled at the end of the block; an exception in the block is a complaint too."""
    verdict = Verdict()
    try:
        yield verdict
    except Exception:
        verdict.complaints.append(traceback.format_exc())
    verdict.settle(comm, label)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of its size: equal where NaNs are, too, and telling -0 from 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize]) if tensor.is_floating_point() else tensor


def _show(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def placements(num_ranks: int) -> list[tuple[int, ...]]:
    """The node of each rank in all the ways that are tried: one node, 1 and 2 ranks a node, blocks and cyclic."""
    found = {(0,) * num_ranks, tuple(range(num_ranks))}
    if num_ranks == 4:
        found |= {(0, 0, 1, 1), (0, 1, 0, 1)}
    return sorted(found)


class Buffers:
    """Buffers by configuration, made when first asked for, destroyed at the end: making one costs more than a call."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        self.made: dict[tuple[Any, ...], Buffer] = {}

    def normal(self, node_of_rank: Sequence[int], num_nvl_bytes: int) -> Buffer:
        """A buffer for normal calls. `node_of_rank` as from `placements`."""
        key = (tuple(node_of_rank), num_nvl_bytes)
        if key not in self.made:
            self.made[key] = self._make(node_of_rank, num_nvl_bytes=num_nvl_bytes)
        return self.made[key]

    def low_latency(self, node_of_rank: Sequence[int], num_rdma_bytes: int, **arguments: Any) -> Buffer:
        """A buffer for low-latency calls; `arguments` are more of `Buffer`'s."""
        key = ("low latency", tuple(node_of_rank), num_rdma_bytes, *sorted(arguments.items()))
        if key not in self.made:
            self.made[key] = self._make(node_of_rank, num_rdma_bytes=num_rdma_bytes, low_latency_mode=True, **arguments)
        return self.made[key]

    def destroy(self) -> None:
        """Destroy all. Collective."""
        for buffer in self.made.values():
            buffer.destroy()
        self.made.clear()

    def _make(self, node_of_rank: Sequence[int], **arguments: Any) -> Buffer:
        from hpc_moe import Buffer

        ranks_per_node = None
        num_ranks = self.comm.Get_size()
        if node_of_rank:
            ranks_per_node = num_ranks // len(set(node_of_rank))
            blocks = [rank // ranks_per_node for rank in range(num_ranks)]
            if list(node_of_rank) != blocks:  # not contiguous: only the test switch can lay that out
                os.environ[NODE_OF_RANK] = ",".join(map(str, node_of_rank))
                ranks_per_node = None
        try:
            return Buffer(self.comm, device="cpu", ranks_per_node=ranks_per_node, timeout=TIMEOUT_S, **arguments)
        finally:
            os.environ.pop(NODE_OF_RANK, None)
