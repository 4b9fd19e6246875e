"""NVSHMEM's start as a buffer asks for it: who shares it, who is refused, votes, and reference counts.

A stand-in takes the place of `hpc_moe._nvshmem`, so that all of this runs without NVSHMEM and without GPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
from mpi4py import MPI

from hpc_moe import _C, ArgumentError, BootstrapError, PeerTimeoutError, UnavailableError, nvshmem_env
from hpc_moe._backends.cuda import nvshmem
from hpc_moe._backends.cuda.nvshmem import World, check_versions, join
from hpc_moe.bootstrap import Group
from hpc_moe.errors import Error
from hpc_moe.nvshmem_env import Fabric, Version


class FakeLibrary:
    """Does nothing, and notes what it is asked for."""

    def __init__(self) -> None:
        self.built: Version = (3, 4, 5)
        self.loaded: Version = (3, 4, 5)
        self.calls: list[tuple[Any, ...]] = []
        self.running = False
        self.num_queue_pairs = 0
        self.address = 4096  # of the next piece of symmetric memory
        self.seen: dict[str, str] = {}
        self.on_init: Callable[[], None] = lambda: None
        self.on_memory: Callable[[], None] = lambda: None

    def built_version(self) -> Version:
        return self.built

    def built_path(self) -> str:
        return "/built"

    def loaded_version(self) -> Version:
        return self.loaded

    def loaded_path(self) -> str:
        return "/loaded/libnvshmem_host.so.3"

    def get_unique_id(self) -> bytes:
        self.seen = dict(os.environ)
        self.calls.append(("get_unique_id",))
        return b"the ID of rank %d" % MPI.COMM_WORLD.rank

    def init(self, unique_id: bytes, pe: int, num_pes: int, device: int) -> None:
        self.seen = dict(os.environ)
        self.calls.append(("init", unique_id.rstrip(b"\0"), pe, num_pes, device))
        self.on_init()
        self.running = True

    def is_running(self) -> bool:
        return self.running

    def finalize(self, device: int) -> None:
        self.calls.append(("finalize", device))
        self.running = False

    def malloc(self, num_bytes: int, device: int) -> int:
        self.calls.append(("malloc", num_bytes, device))
        self.on_memory()
        return self.address

    def free(self, address: int, device: int) -> None:
        self.calls.append(("free", address, device))
        self.on_memory()

    def ptr(self, address: int, pe: int) -> int:
        return address

    def low_latency_launchers(self) -> int:
        return 0

    def create_queue_pairs(self, count: int, device: int) -> list[int]:
        self.calls.append(("create_queue_pairs", count, device))
        self.on_memory()
        self.num_queue_pairs += count
        return list(range(100 + self.num_queue_pairs - count, 100 + self.num_queue_pairs))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """A stand-in, in a process that has not started NVSHMEM, and whose user has set none of its variables."""
    monkeypatch.setattr(nvshmem, "_process", nvshmem._Process())
    monkeypatch.delenv(nvshmem.RESTART_VARIABLE, raising=False)
    for name in nvshmem_env.VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a start sets is taken back
        monkeypatch.delenv(name)
    return FakeLibrary()


def join_all(group: Group, library: FakeLibrary, members: list[int] | None = None, **arguments: Any) -> World:
    """Join with all ranks of the group, or with these."""

    def make_plan(version: Version, environ: Mapping[str, str]) -> nvshmem_env.Plan:
        return nvshmem_env.plan(environ=environ, fabric=Fabric(nvshmem_version=version), **arguments)

    everyone = list(range(group.size))
    return join(group, members or everyone, device=3, make_plan=make_plan, load=lambda: library)


def refused(kind: type[Exception], call: Callable[[], object]) -> str:
    """The message of the error, which must be of this kind."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def split(comm: MPI.Intracomm, color: int, key: int) -> MPI.Intracomm:
    return cast(MPI.Intracomm, comm.Split(color, key))


# --- in a plain process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "loaded"),
    [((3, 4, 5), (3, 4, 5)), ((3, 4, 5), (3, 4, 9)), ((3, 8, 0), (3, 8, 1))],
)
def test_versions_that_go_together(built: Version, loaded: Version, library: FakeLibrary) -> None:
    library.built, library.loaded = built, loaded
    check_versions(library)


@pytest.mark.parametrize(
    ("built", "loaded"),
    [((3, 4, 5), (3, 5, 19)), ((3, 5, 19), (3, 4, 5)), ((3, 3, 9), (3, 3, 9)), ((3, 4, 5), (4, 4, 5))],
)
def test_versions_that_do_not_go_together(built: Version, loaded: Version, library: FakeLibrary) -> None:
    library.built, library.loaded = built, loaded
    message = refused(UnavailableError, lambda: check_versions(library))
    for version, path in ((built, "/built"), (loaded, "/loaded/libnvshmem_host.so.3")):
        assert ".".join(map(str, version)) + f" ({path})" in message
    assert "3.4 or newer" in message and "NVSHMEM_DIR" in message


def test_a_build_without_nvshmem_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "nvshmem_build_version", "")
    message = refused(UnavailableError, nvshmem.load_library)
    assert "has no NVSHMEM" in message and "NVSHMEM_DIR" in message


def test_a_module_that_is_missing_or_of_another_build_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "nvshmem_build_version", "1.2.3")
    message = refused(UnavailableError, nvshmem.load_library)
    assert "1.2.3" in message and "build hpc_moe again" in message


def test_a_call_that_does_not_return_is_given_up() -> None:
    start = time.monotonic()
    message = refused(Error, lambda: nvshmem._call(lambda: time.sleep(5), 0.2))
    assert "did not return within 0.2 s" in message and time.monotonic() - start < 3


def test_stderr_is_caught_and_written(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(2, b"before ")
    with nvshmem._caught_stderr() as said:
        os.system("echo from C >&2")
        assert capfd.readouterr().err == "before "
    assert said == ["from C\n"]
    assert capfd.readouterr().err == "from C\n"


# --- on all ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_it_starts_once_and_ends_with_the_last_buffer(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    group, other = Group(comm, 30), Group(comm, 30)
    first = join_all(group, library)
    assert (first.ranks, first.pe) == (tuple(range(comm.size)), comm.rank)
    second = join_all(other, library)
    assert second is first and first.references == 2
    first.release(group)
    assert library.calls[-1][0] == "init"
    second.release(other)
    started = [("get_unique_id",)] * (comm.rank == 0) + [("init", b"the ID of rank 0", comm.rank, comm.size, 3)]
    assert library.calls == [*started, ("finalize", 3)]
    assert "released as often" in refused(Error, lambda: second.release(other))


@pytest.mark.mpi
def test_buffers_share_queue_pairs(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    group = Group(comm, 30)
    world = join_all(group, library)
    assert [world.share_queue_pairs(group, count) for count in (2, 1, 3)] == [[100, 101], [100], [100, 101, 102]]
    assert library.calls[-2:] == [("create_queue_pairs", 2, 3), ("create_queue_pairs", 1, 3)]


@pytest.mark.mpi
def test_where_a_rank_has_no_room_a_smaller_buffer_can_have_the_world(
    comm: MPI.Intracomm, library: FakeLibrary
) -> None:
    """NVSHMEM is not asked: it would end the process."""
    group = Group(comm, 30)
    world = join_all(group, library)
    last = comm.size - 1
    free = 2**30 if comm.rank == last else 2**40
    message = refused(BootstrapError, lambda: world.malloc(group, 2**31, lambda: free))
    assert f"on rank {last}" in message and f"no room for {2**31} bytes" in message
    assert "num_rdma_bytes" in message and "empty_cache" in message
    world.leave()
    assert library.calls[-1][0] == "init" and join_all(group, library) is world and world.references == 1
    assert world.malloc(group, 1000, lambda: free) == 4096
    world.free(group, 4096)
    world.release(group)
    assert library.calls[-2:] == [("free", 4096, 3), ("finalize", 3)]


@pytest.mark.mpi
def test_what_the_heap_has_left_counts_as_room(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    """It grows by whole units, and keeps what buffers give back; but not to put pieces together."""
    group = Group(comm, 30)
    world = join_all(group, library)
    unit = nvshmem_env.CUMEM_GRANULARITY
    message = refused(BootstrapError, lambda: world.malloc(group, unit + 1, lambda: 2 * unit - 1))
    assert f"would take {2 * unit}" in message
    address = world.malloc(group, unit + 1, lambda: 2 * unit)
    assert "would take" in refused(BootstrapError, lambda: world.malloc(group, 1, lambda: 0))
    library.address = other = address + 2 * unit
    world.malloc(group, unit, lambda: unit)
    world.free(group, address)
    world.free(group, other)
    message = refused(BootstrapError, lambda: world.malloc(group, 2 * unit, lambda: 2 * unit - 1))
    assert f"would take {2 * unit}" in message
    library.address = address
    assert world.malloc(group, unit + 1, lambda: 0) == address
    assert "would take" in refused(BootstrapError, lambda: world.malloc(group, unit + 1, lambda: unit))
    library.address = other
    assert world.malloc(group, unit, lambda: 0) == other


@pytest.mark.mpi
def test_a_heap_of_fixed_size_takes_no_free_memory(
    comm: MPI.Intracomm, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVSHMEM_DISABLE_CUDA_VMM", "1")
    group = Group(comm, 30)
    world = join_all(group, library)
    assert world.malloc(group, 8, lambda: 0) == 4096
    library.address = 0
    assert "heap has no room for 8 bytes" in refused(BootstrapError, lambda: world.malloc(group, 8, lambda: 0))
    assert "failed on some rank" in refused(UnavailableError, lambda: join_all(group, library))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("call", ["malloc", "free", "share_queue_pairs"])
def test_what_a_rank_fails_in_holds_nobody_up_for_ever(comm: MPI.Intracomm, library: FakeLibrary, call: str) -> None:
    """As in NVSHMEM, where the others wait for it; and they are given up together."""
    group = Group(comm, 4)
    world = join_all(group, library)

    def fail() -> None:
        if comm.rank > 0:
            time.sleep(20)
        raise RuntimeError("no driver")

    library.on_memory = fail
    start = time.monotonic()
    calls: dict[str, Callable[[], object]] = {
        "malloc": lambda: world.malloc(group, 8, lambda: 2**40),
        "free": lambda: world.free(group, 4096),
        "share_queue_pairs": lambda: world.share_queue_pairs(group, 8),
    }
    message = refused(BootstrapError, calls[call])
    assert "on rank 0" in message and "no driver" in message and time.monotonic() - start < 10
    assert "failed on some rank" in refused(UnavailableError, lambda: join_all(group, library))


@pytest.mark.mpi
def test_the_environment_is_set_before_it_starts(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    world = join_all(Group(comm, 30), library, num_qps_per_rank=7)
    assert library.seen["NVSHMEM_IBGDA_NUM_RC_PER_PE"] == "7"
    assert all(library.seen[name] == value for name, value in world.plan.environment().items())


@pytest.mark.mpi
def test_the_order_of_pes_is_that_of_the_members(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    backwards = list(reversed(range(comm.size)))
    world = join_all(Group(comm, 30), library, backwards)
    assert world.ranks == tuple(backwards) and world.pe == comm.size - 1 - comm.rank
    assert library.calls[-1][1] == b"the ID of rank %d" % (comm.size - 1)
    if comm.size > 1:
        message = refused(UnavailableError, lambda: join_all(Group(comm, 30), library))
        assert "in the same order" in message
        turned = split(comm, 0, -comm.rank)  # the same ranks in the same order, by other numbers
        assert join_all(Group(turned, 30), library) is world


@pytest.mark.mpi(min_size=2)
def test_each_rail_is_a_world_of_its_own(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    if comm.size % 2:
        pytest.skip("laid out for an even number of ranks")
    members = list(range(comm.rank % 2, comm.size, 2))
    world = join_all(Group(comm, 30), library, members)
    assert world.ranks == tuple(members) and world.pe == comm.rank // 2
    assert library.calls[-1][1:4] == (b"the ID of rank %d" % (comm.rank % 2), comm.rank // 2, comm.size // 2)


@pytest.mark.mpi(min_size=2)
def test_other_ranks_are_refused_while_it_runs(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    world = join_all(Group(comm, 30), library)
    part = split(comm, comm.rank > 0, comm.rank)
    message = refused(UnavailableError, lambda: join_all(Group(part, 30), library))
    assert "a process has it only once" in message and "on the same ranks" in message
    assert world.references == 1 and library.running


@pytest.mark.mpi
def test_after_its_end_it_does_not_start_again(
    comm: MPI.Intracomm, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(comm, 30)
    join_all(group, library).release(group)
    message = refused(UnavailableError, lambda: join_all(group, library))
    assert "cannot start a second time" in message and "ended with the last buffer" in message
    monkeypatch.setenv(nvshmem.RESTART_VARIABLE, "1")
    assert join_all(group, library).references == 1


@pytest.mark.mpi
def test_a_buffer_that_needs_another_environment_is_refused(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    group = Group(comm, 30)
    world = join_all(group, library, num_qps_per_rank=12)
    message = refused(UnavailableError, lambda: join_all(group, library, num_qps_per_rank=24))
    assert "NVSHMEM_IBGDA_NUM_RC_PER_PE=12 for another buffer" in message and "needs 24" in message
    assert join_all(group, library, num_qps_per_rank=12) is world


@pytest.mark.mpi
def test_a_user_s_value_stays_the_user_s(
    comm: MPI.Intracomm, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "2048")
    monkeypatch.setenv("NVSHMEM_MAX_TEAMS", "2")  # too few: changed, with a warning
    group = Group(comm, 30)
    with pytest.warns(RuntimeWarning, match="NVSHMEM_MAX_TEAMS was '2'"):
        world = join_all(group, library)
    assert library.seen["NVSHMEM_QP_DEPTH"] == "2048" and library.seen["NVSHMEM_MAX_TEAMS"] == "7"
    assert nvshmem._user_environment()["NVSHMEM_MAX_TEAMS"] == "2"
    assert join_all(group, library) is world


@pytest.mark.mpi(min_size=2)
def test_a_rank_with_another_version_fails_all_before_the_start(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    if comm.rank == 1:
        library.loaded = (3, 3, 9)
    message = refused(UnavailableError, lambda: join_all(Group(comm, 30), library))
    assert "loading NVSHMEM failed on rank 1" in message and "3.3.9" in message
    assert library.calls == []


@pytest.mark.mpi(min_size=2)
def test_a_rank_with_another_environment_fails_all_before_the_start(
    comm: MPI.Intracomm, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.rank == 1:
        monkeypatch.setenv("NVSHMEM_QP_DEPTH", "2048")
    message = refused(BootstrapError, lambda: join_all(Group(comm, 30), library))
    assert 'NVSHMEM_QP_DEPTH is "1024"' in message and '"2048" on rank 1' in message
    assert library.calls == []


@pytest.mark.mpi
def test_a_malformed_variable_fails_all_before_the_start(
    comm: MPI.Intracomm, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.rank == comm.size - 1:
        monkeypatch.setenv("NVSHMEM_QP_DEPTH", "deep")
    message = refused(ArgumentError, lambda: join_all(Group(comm, 30), library))
    assert f"failed on rank {comm.size - 1}" in message and "NVSHMEM_QP_DEPTH" in message
    assert library.calls == []


@pytest.mark.mpi
def test_a_rank_that_does_not_start_fails_all(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    """All ranks get its message, with what NVSHMEM wrote, and none of them tries again, nor ends what it started."""
    last = comm.size - 1

    def fail() -> None:
        os.write(2, b"no route to heaven\n")
        raise RuntimeError("starting NVSHMEM failed: it stopped at init status 1")

    if comm.rank == last:
        library.on_init = fail
    group = Group(comm, 30)
    message = refused(BootstrapError, lambda: join_all(group, library))
    for part in (f"rank {last}", f"PE {last} of {comm.size}", "init status 1", "no route to heaven", "NVSHMEM_DEBUG"):
        assert part in message
    assert "its start failed on some rank" in refused(UnavailableError, lambda: join_all(group, library))
    assert ("finalize", 3) not in library.calls


@pytest.mark.mpi(min_size=2)
def test_ranks_that_nvshmem_holds_up_hear_of_the_one_that_failed(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    if comm.rank == 0:
        library.on_init = lambda: (_ for _ in ()).throw(RuntimeError("no GPU"))
    else:
        library.on_init = lambda: time.sleep(20)
    message = refused(BootstrapError, lambda: join_all(Group(comm, 4), library))
    assert "rank 0" in message and "no GPU" in message


@pytest.mark.mpi
def test_an_nvshmem_that_another_library_started_is_refused(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    library.running = comm.rank == 0
    message = refused(UnavailableError, lambda: join_all(Group(comm, 30), library))
    assert "rank 0" in message and "another library" in message


@pytest.mark.mpi
def test_a_world_that_was_abandoned_is_never_ended(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    group = Group(comm, 30)
    world = join_all(group, library)
    world.abandon()
    world.release(group)  # by another buffer, say
    assert "a rank was lost" in refused(UnavailableError, lambda: join_all(group, library))
    assert ("finalize", 3) not in library.calls


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_does_not_come_is_missed(comm: MPI.Intracomm, library: FakeLibrary) -> None:
    group = Group(comm, 2)
    world = join_all(group, library)
    comm.Barrier()
    if comm.rank > 0:
        assert "rank 0" in refused(PeerTimeoutError, lambda: world.release(group))
        world.abandon()
    comm.Barrier()
    assert library.running
