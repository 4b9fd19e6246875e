"""What the tests share: the device, verdicts that all ranks reach together, buffers that are kept.

HPC_MOE_TEST_DEVICE, `cpu` (the default) or `cuda`, says where the tensors of the tests lie that use a `Buffer`. The
reference stays on the CPU: tests make their inputs there, move them with `to_device`, and compare there. Not for tests
that need neither `Buffer` nor the reference.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from mpi4py import MPI

from hpc_moe import _C
from hpc_moe.testing.reference import Bounded

if TYPE_CHECKING:
    from hpc_moe import Buffer

NODE_OF_RANK = "HPC_MOE_TEST_NODE_OF_RANK"
SHARE_GPUS = "HPC_MOE_TEST_SHARE_GPUS"
TIMEOUT_S = 30.0
PROMPT_S = 10.0  # an error must come well before the buffer's timeout

T = TypeVar("T")

# --- the device ------------------------------------------------------------------------------------------------------


def _choose_device() -> torch.device:
    """The device of this rank; on CUDA also torch's current one. More ranks than GPUs share them."""
    kind = os.environ.get("HPC_MOE_TEST_DEVICE", "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if kind == "cuda" else 0
    if num_gpus == 0:
        raise RuntimeError(f"HPC_MOE_TEST_DEVICE={kind}: must be cpu, or cuda where torch sees a GPU")
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    index = node.Get_rank() % num_gpus
    if node.Get_size() > num_gpus:
        os.environ[SHARE_GPUS] = "1"
    node.Free()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


DEVICE = _choose_device()
ON_CUDA = DEVICE.type == "cuda"
IS_SHARING = ON_CUDA and os.environ.get(SHARE_GPUS) == "1"

# On CUDA, what has low-latency buffers uses the fixture `low_latency_world` (conftest.py), too.
HAS_LOW_LATENCY = not ON_CUDA or bool(_C.nvshmem_build_version)

needs_low_latency = pytest.mark.skipif(
    not HAS_LOW_LATENCY, reason="low-latency calls on CUDA need a build with NVSHMEM"
)
needs_nodes = pytest.mark.skipif(ON_CUDA, reason="not on CUDA yet: normal calls between nodes")
cpu_runtime_only = pytest.mark.skipif(ON_CUDA, reason="about the CPU runtime, or a ReferenceBuffer")
cuda_only = pytest.mark.skipif(not ON_CUDA, reason="needs HPC_MOE_TEST_DEVICE=cuda")


def to_device(value: T) -> T:
    """Tensors, also in tuples and lists, on `DEVICE`, with the strides that they have; anything else as it is.

    The memory that a tensor is a view of moves as a whole, so that rows lie as far apart, and as badly aligned, there.
    """
    if isinstance(value, (tuple, list)):
        return cast(T, type(value)(to_device(each) for each in value))
    if not ON_CUDA or not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    whole = value.as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
    return cast(T, whole.to(DEVICE).as_strided(value.shape, value.stride(), value.storage_offset()))


def to_cpu(value: T) -> T:
    """Tensors, also in tuples and lists, on the CPU; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return cast(T, type(value)(to_cpu(each) for each in value))
    return cast(T, value.cpu()) if isinstance(value, torch.Tensor) else value


def promptly(call: Callable[[], object], kind: type[Exception], pending_in: Buffer | None = None) -> str:
    """Call it; returns the message of the error, which must be of this kind and come soon.

    `pending_in`: the buffer of a call that need not wait for the other ranks on CUDA (see `waits`). There the error may
    come from its `check()` instead. On CPU, every call raises its own errors.
    """
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        call()
        if ON_CUDA and pending_in is not None:
            pending_in.check()
    assert time.monotonic() - start < PROMPT_S
    return str(caught.value)


def waits(call: str, arguments: dict[str, Any]) -> bool:
    """Whether the CPU waits in this call for the other ranks, and so learns of their errors at once."""
    if not ON_CUDA or call == "clean_low_latency_buffer":
        return True
    return call == "dispatch" and arguments.get("handle") is None and not arguments.get("num_worst_tokens")


def sleep() -> None:
    """Keep the current CUDA stream busy for some 20 ms."""
    torch.cuda._sleep(40_000_000)  # clock cycles


@contextmanager
def capturing(**options: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures a graph. If Python's collector found the graph of an earlier test meanwhile, that would fail."""
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        yield graph


# --- comparisons -----------------------------------------------------------------------------------------------------


def same_on_all_ranks(max_examples: int) -> settings:
    """Settings with which hypothesis draws the same examples on every rank.

    HPC_MOE_TEST_EXAMPLES, a factor, asks for more. Ranks that share a GPU take turns, which is slow: they draw fewer.
    There is no shrinking: it is bounded by time, which passes differently on each rank.
    """
    factor = float(os.environ.get("HPC_MOE_TEST_EXAMPLES", "1")) * (0.2 if IS_SHARING else 1.0)
    return settings(
        max_examples=max(1, int(max_examples * factor)),
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
        """Same dtype, shape and bits, wherever they lie."""
        actual, expected = to_cpu(actual), to_cpu(expected)
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
        actual = actual.cpu()
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
    except (Exception, pytest.fail.Exception):
        verdict.complaints.append(traceback.format_exc())
    verdict.settle(comm, label)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of its size: equal where NaNs are, too, and telling -0 from 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize]) if tensor.is_floating_point() else tensor


def _show(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


# --- buffers ---------------------------------------------------------------------------------------------------------


def placements(num_ranks: int, low_latency: bool = False) -> list[tuple[int, ...]]:
    """The node of each rank in all the ways that are tried: one node, 1 and 2 ranks a node, blocks and cyclic.

    On CUDA one node only, so far, but for low-latency calls.
    """
    if ON_CUDA and not low_latency:
        return [(0,) * num_ranks]
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
            return Buffer(self.comm, device=str(DEVICE), ranks_per_node=ranks_per_node, timeout=TIMEOUT_S, **arguments)
        finally:
            os.environ.pop(NODE_OF_RANK, None)
