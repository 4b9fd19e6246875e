"""Low-latency calls between nodes on CUDA: who is reached how, what memory that takes, and what is refused.

Stand-ins take the place of NVSHMEM and of the runtime, so that all of this runs without a GPU: the calls themselves are
in test_cuda_low_latency.py and test_properties_low_latency.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpc_moe import _C, ArgumentError, BootstrapError, Buffer, Error, PeerTimeoutError, UnavailableError
from hpc_moe.bootstrap import Group, Topology, connect, number_nodes
from hpc_moe.config import low_latency_outbox_bytes, minimum_nvl_bytes

if hasattr(_C, "CudaRuntime"):
    from hpc_moe._backends.cuda import backend as backends
    from hpc_moe._backends.cuda import region as regions
    from hpc_moe._backends.cuda.device import find_what_is_missing
    from hpc_moe._backends.cuda.dispatch import count_by_node

pytestmark = pytest.mark.skipif(not hasattr(_C, "CudaRuntime"), reason="this build has no CUDA runtime")

HERE, ELSEWHERE = 1 << 20, 1 << 40  # addresses of a region: of this rank's, and, plus its PE, of a peer's


def lay_out(rank: int, nodes: Sequence[int]) -> Topology:
    return Topology(rank, *number_nodes(nodes), ("host",) * len(nodes), 1)


# --- who is reached by puts ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def without_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(_C, "CudaRuntime"):
        monkeypatch.delenv(regions.FORCE_PUTS_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("rank", "nodes", "far"),
    [
        (0, [0], set()),
        (1, [0, 0, 0, 0], set()),
        (1, [0, 0, 1, 1], {2, 3}),
        (1, [0, 1, 0, 1], {0, 2}),
        (2, [0, 1, 2, 3], {0, 1, 3}),
    ],
)
def test_ranks_of_other_nodes_are_far(rank: int, nodes: list[int], far: set[int]) -> None:
    assert regions.find_far_ranks(lay_out(rank, nodes), allow_nvlink=True) == far


def test_without_nvlink_all_others_are_far(monkeypatch: pytest.MonkeyPatch) -> None:
    assert regions.find_far_ranks(lay_out(1, [0, 0, 1, 1]), allow_nvlink=False) == {0, 2, 3}
    monkeypatch.setenv(regions.FORCE_PUTS_VARIABLE, "1")
    assert regions.find_far_ranks(lay_out(1, [0, 0, 1, 1]), allow_nvlink=True) == {0, 2, 3}


class FakeLibrary:
    """Gives pointers to all PEs but some, and memory that is nobody's."""

    def __init__(self, rank: int, unreachable: Collection[int] = ()) -> None:
        self.rank, self.unreachable = rank, unreachable
        self.broken = -1  # a PE

    def ptr(self, address: int, pe: int) -> int:
        assert address == HERE
        if pe == self.broken:
            raise Error("no such PE")
        return 0 if pe in self.unreachable else HERE if pe == self.rank else ELSEWHERE + pe


class FakeWorld:
    """Notes what becomes of it."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        self.calls: list[str] = []

    def malloc(self, group: Group, num_bytes: int, get_free_bytes: Callable[[], int]) -> int:
        return HERE

    def free(self, group: Group, address: int) -> None:
        assert address == HERE
        self.calls.append("free")

    def share_queue_pairs(self, group: Group, count: int) -> list[int]:
        return list(range(count))

    def leave(self) -> None:
        self.calls.append("leave")

    def release(self, group: Group) -> None:
        self.calls.append("release")

    def abandon(self) -> None:
        self.calls.append("abandon")


def make_region(
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    far: Collection[int],
    unreachable: Collection[int] = (),
    world: FakeWorld | None = None,
) -> regions.Region:
    world = world or FakeWorld(FakeLibrary(comm.rank, unreachable))
    monkeypatch.setattr(regions, "join", lambda *arguments, **options: world)
    monkeypatch.setattr(regions, "_Memory", lambda address, num_bytes: np.zeros(num_bytes, np.uint8))
    return regions.Region(Group(comm, 30), torch.device("cpu"), 4096, far, num_qps_per_rank=3)


@pytest.mark.mpi
@pytest.mark.parametrize("cyclic", [False, True])
def test_far_ranks_are_put_to_although_there_are_pointers(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, cyclic: bool
) -> None:
    if comm.size % 2:
        pytest.skip("laid out for an even number of ranks")
    nodes = [rank % 2 if cyclic else 2 * rank // comm.size for rank in range(comm.size)]
    far = {rank for rank, node in enumerate(nodes) if node != nodes[comm.rank]}
    region = make_region(comm, monkeypatch, far)
    assert region.put_ranks == far
    near = [ELSEWHERE + rank for rank in range(comm.size)]
    near[comm.rank] = HERE
    assert region.addresses == [HERE if rank in far else near[rank] for rank in range(comm.size)]


@pytest.mark.mpi(min_size=2)
def test_two_ranks_use_puts_where_one_has_no_pointer(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    region = make_region(comm, monkeypatch, (), {1} if comm.rank == 0 else ())
    assert region.put_ranks == {0: {1}, 1: {0}}.get(comm.rank, set())
    assert region.queue_pairs == [0, 1, 2]  # also of the others: all ranks create them together


@pytest.mark.mpi
def test_without_puts_there_are_no_queue_pairs(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_region(comm, monkeypatch, ()).queue_pairs == []


@pytest.mark.mpi(min_size=2)
def test_a_region_that_fails_on_a_rank_gives_its_memory_back(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = FakeWorld(FakeLibrary(comm.rank))
    if comm.rank == 1:
        world.library.broken = 0
    with pytest.raises(Error, match=r"on rank 1: no such PE"):
        make_region(comm, monkeypatch, (), world=world)
    assert world.calls == ["free", "leave"]


@pytest.mark.mpi
def test_a_region_ends_with_its_world_and_stays_where_a_rank_is_missed(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = FakeWorld(FakeLibrary(comm.rank))
    region = make_region(comm, monkeypatch, (), world=world)
    region.free()
    assert world.calls == ["free", "release"]
    with pytest.raises(PeerTimeoutError), region.freed_on_error():
        raise PeerTimeoutError("nobody came")
    assert world.calls[2:] == ["abandon"]


# --- what memory that takes ------------------------------------------------------------------------------------------


class Makes:
    """A backend that makes a region, and what it asks of stand-ins for that, and for the runtime."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: Sequence[int]) -> None:
        self.asked: list[tuple[int, set[int]]] = []
        self.puts: list[int] = []
        self.freed = 0
        self.on_set_regions: Callable[[], None] = lambda: None
        monkeypatch.setattr(backends, "Region", self._make_region)
        self.backend = backends.CudaBackend.__new__(backends.CudaBackend)
        vars(self.backend).update(
            group=SimpleNamespace(step=lambda name: contextlib.nullcontext()),
            topology=lay_out(1, nodes),
            device=torch.device("cpu"),
            num_ranks=len(nodes),
            num_rdma_bytes=10**6,
            runtime=SimpleNamespace(
                set_regions=lambda *arguments: self.on_set_regions(),
                set_puts=lambda ranks, *others: self.puts.append(ranks),
            ),
        )

    def _make_region(self, group: Any, device: Any, num_bytes: int, far_ranks: set[int], **network: Any) -> Any:
        self.asked.append((num_bytes, far_ranks))
        world = SimpleNamespace(library=SimpleNamespace(low_latency_launchers=lambda: 0))
        return SimpleNamespace(
            addresses=[0] * 4, num_bytes=num_bytes, put_ranks=far_ranks, queue_pairs=[], world=world,
            freed_on_error=self._note_errors,
        )  # fmt: skip

    @contextlib.contextmanager
    def _note_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.freed += 1
            raise


@pytest.mark.parametrize(
    ("nodes", "allow_nvlink", "far"),
    [([0, 0, 0, 0], True, set()), ([0, 1, 0, 1], True, {0, 2}), ([0, 0, 0, 0], False, {0, 2, 3})],
)
def test_room_for_outboxes_comes_on_top(
    monkeypatch: pytest.MonkeyPatch, nodes: list[int], allow_nvlink: bool, far: set[int]
) -> None:
    makes = Makes(monkeypatch, nodes)
    makes.backend._make_region(False, {"allow_nvlink_for_low_latency_mode": allow_nvlink})
    outboxes = len(far) * low_latency_outbox_bytes(10**6, 4)
    assert makes.asked == [(_C.LOW_LATENCY_FIXED_BYTES + 10**6 + outboxes, far)]
    assert makes.puts == [sum(1 << rank for rank in far)] * bool(far) and makes.freed == 0


def test_more_ranks_than_a_node_has_need_the_kernels_that_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all can be reached by stores. There is room for outboxes in `num_rdma_bytes` then."""
    for nodes, far in (([0] * 9, set()), ([0] * 8 + [1] * 8, set(range(8, 16)))):
        makes = Makes(monkeypatch, nodes)
        makes.backend._make_region(False, {"allow_nvlink_for_low_latency_mode": True})
        assert makes.asked == [(_C.LOW_LATENCY_FIXED_BYTES + 10**6, far)]
        assert makes.puts == [sum(1 << rank for rank in far)]


def test_a_region_that_the_runtime_does_not_take_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    makes = Makes(monkeypatch, [0, 0])

    def fail() -> None:
        raise BootstrapError("no memory for the state")

    makes.on_set_regions = fail
    with pytest.raises(BootstrapError, match="for the state"):
        makes.backend._make_region(False, {"allow_nvlink_for_low_latency_mode": True})
    assert makes.freed == 1


@pytest.mark.parametrize("pending", [None, ArgumentError("rows went nowhere")])
def test_a_region_that_cannot_be_freed_is_abandoned(
    monkeypatch: pytest.MonkeyPatch, pending: ArgumentError | None
) -> None:
    """Also where the warning is an error."""
    done: list[str] = []

    def fail() -> None:
        raise Error("NVSHMEM did not end")

    backend = Makes(monkeypatch, [0]).backend
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    vars(backend).update(
        rank=0,
        broken="",
        masks=None,
        _pending=pending,
        runtime=SimpleNamespace(
            has_error=lambda: False, close_peers=lambda: None, abandon=lambda: done.append("runtime")
        ),
        low_latency=SimpleNamespace(
            region=SimpleNamespace(free=fail, abandon=lambda: done.append("region")),
        ),
    )
    monkeypatch.setattr(backends, "keep_forever", lambda *objects: done.append("kept"))
    with warnings.catch_warnings(), pytest.raises(RuntimeWarning, match="NVSHMEM did not end") as caught:
        warnings.simplefilter("error")
        backend.destroy()
    assert done == ["runtime", "region", "kept"]
    assert ("rows went nowhere" in str(caught.value)) == (pending is not None)


# --- what is refused, and what is not --------------------------------------------------------------------------------


def test_what_a_buffer_may_need() -> None:
    several = lay_out(0, [0, 1])
    assert find_what_is_missing(several, 0, True) == ""
    for num_nvl_bytes, low_latency_mode in ((4096, True), (4096, False), (0, False)):
        assert find_what_is_missing(lay_out(0, [0, 0]), num_nvl_bytes, low_latency_mode) == ""
        message = find_what_is_missing(several, num_nvl_bytes, low_latency_mode)
        for part in (
            "2 nodes; normal calls between nodes",
            "low_latency_mode=True and num_nvl_bytes=0",
            "device='cpu'",
        ):
            assert part in message
    most_normal, most = _C.CUDA_MAX_RANKS, _C.MAX_LOW_LATENCY_RANKS
    assert find_what_is_missing(lay_out(0, list(range(most))), 0, True) == ""
    assert f"at most {most} ranks" in find_what_is_missing(lay_out(0, list(range(most + 1))), 0, True)
    assert find_what_is_missing(lay_out(0, [0] * most_normal), 4096, True) == ""
    assert find_what_is_missing(lay_out(0, [0] * (most_normal + 1)), 0, True) == ""
    for num_nvl_bytes, low_latency_mode in ((4096, True), (0, False)):
        message = find_what_is_missing(lay_out(0, [0] * (most_normal + 1)), num_nvl_bytes, low_latency_mode)
        assert f"at most {most_normal} ranks of a node have normal calls" in message


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("low_latency_mode", [False, True])
def test_a_window_between_nodes_is_refused_on_all_ranks(comm: MPI.Intracomm, low_latency_mode: bool) -> None:
    with pytest.raises(UnavailableError, match="normal calls between nodes are not there yet on CUDA"):
        Buffer(
            comm,
            minimum_nvl_bytes(comm.size),
            low_latency_mode=low_latency_mode,
            ranks_per_node=1,
            device="cuda",
            timeout=30,
        )


class FakeRuntime:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked = [""]

    def get_local_device_id(self) -> int:
        return 0

    def get_local_device_uuid(self) -> bytes:
        return bytes(16)

    def get_local_ipc_handle(self) -> bytes:
        return bytes(64)

    def check_peers(self, uuids: list[bytes]) -> None: ...

    def get_local_nvshmem_unique_id(self) -> bytes:
        raise AssertionError("NVSHMEM is started elsewhere")

    def sync(self, device_ids: list[int], ipc_handles: list[bytes], root_unique_id: bytes) -> None:
        self.asked.append("sync")

    def is_available(self) -> bool:
        return self.asked[-1] == "sync"


@pytest.mark.mpi
def test_the_bootstrap_asks_for_no_unique_id(comm: MPI.Intracomm) -> None:
    runtime = FakeRuntime()
    connect(Group(comm, 30), lay_out(comm.rank, range(comm.size)), cast(Any, runtime), needs_unique_id=False)
    assert runtime.is_available()


def test_tokens_are_counted_by_node() -> None:
    in_rank = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
    for ranks_of_node, counts in (
        (((0, 1), (2, 3)), [3, 2]),
        (((0, 2), (1, 3)), [2, 2]),
        (((0,), (1,), (2,), (3,)), [2, 2, 1, 1]),
    ):
        for num_tokens, expected in ((4, counts), (0, [0] * len(counts))):
            out = torch.full((len(counts),), -1, dtype=torch.int32)
            assert count_by_node(in_rank[:num_tokens], ranks_of_node, out).tolist() == expected == out.tolist()
