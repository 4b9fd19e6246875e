"""Construction: topology, what the runtime says of itself, threads, and votes."""

from __future__ import annotations

import ast
import os
import struct
from pathlib import Path
from typing import Any, TypeGuard

import pytest
from mpi4py import MPI
from support import DEVICE, cpu_runtime_only, needs_low_latency, needs_nodes

import hpc_moe
from hpc_moe import ArgumentError, BootstrapError, Buffer, UnavailableError
from hpc_moe.bootstrap import Group, _num_threads, agree, find_topology, number_nodes
from hpc_moe.config import minimum_nvl_bytes


def test_nodes_are_numbered_by_their_lowest_rank() -> None:
    assert number_nodes([7, 7, 3, 3]) == ((0, 0, 1, 1), ((0, 1), (2, 3)))
    assert number_nodes([5, 2, 5, 2]) == ((0, 1, 0, 1), ((0, 2), (1, 3)))


def test_nodes_of_different_sizes_are_an_error_that_says_so() -> None:
    with pytest.raises(UnavailableError, match="node 0: 2, node 1: 1"):
        number_nodes([0, 0, 1])


def test_threads_are_the_rank_s_share_of_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _num_threads(set(range(8)), 2) == 4
    assert _num_threads({3}, 1) == 1
    assert _num_threads({0, 1}, 4) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert _num_threads(set(range(8)), 2) == 3


def test_torch_distributed_is_never_imported() -> None:
    """torch imports it by itself, so only the sources can tell."""
    package = Path(hpc_moe.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [f"{node.value.id}.{node.attr}"] if _is_attribute_of_name(node) else []
            assert not any(name.startswith("torch.distributed") for name in names), path


def _is_attribute_of_name(node: ast.AST) -> TypeGuard[Any]:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


@pytest.mark.mpi
def test_topology_of_one_host_is_one_node(comm: MPI.Intracomm) -> None:
    topology = find_topology(Group(comm, 30), None)
    assert topology.num_nodes == 1
    assert topology.local_ranks == tuple(range(comm.size))
    assert topology.local_rank == comm.rank
    assert topology.rail == (comm.rank,)


@needs_nodes
@pytest.mark.mpi(min_size=4)
def test_cyclic_placement(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    if comm.size != 4:
        pytest.skip("laid out for 4 ranks")
    monkeypatch.setenv("HPC_MOE_TEST_NODE_OF_RANK", "0,1,0,1")
    topology = find_topology(Group(comm, 30), None)
    assert topology.ranks_of_node == ((0, 2), (1, 3))
    assert topology.rail == ((0, 1), (0, 1), (2, 3), (2, 3))[comm.rank]
    with Buffer(comm, minimum_nvl_bytes(4), device=str(DEVICE), timeout=30) as buffer:
        assert buffer.runtime.get_num_rdma_ranks() == 2
        assert buffer.runtime.get_rdma_rank() == comm.rank % 2
        assert buffer.runtime.get_root_rdma_rank() == (0, 0, 2, 2)[comm.rank]


@needs_low_latency
@pytest.mark.mpi
@pytest.mark.usefixtures("low_latency_world")
def test_the_root_of_a_low_latency_world_is_rank_0(comm: MPI.Intracomm) -> None:
    with Buffer(comm, 0, 4096, low_latency_mode=True, ranks_per_node=1, device=str(DEVICE), timeout=30) as buffer:
        assert buffer.runtime.get_root_rdma_rank() == 0
        assert buffer.runtime.get_num_rdma_ranks() == comm.size
        assert buffer.runtime.get_rdma_rank() == comm.rank
        assert buffer.runtime.is_available()
        runtime = buffer.runtime
    assert not runtime.is_available()


@cpu_runtime_only
@pytest.mark.mpi
def test_what_the_runtime_announces(comm: MPI.Intracomm) -> None:
    num_bytes = minimum_nvl_bytes(comm.size)
    with Buffer(comm, num_bytes, device=str(DEVICE), timeout=30) as buffer:
        runtime = buffer.runtime
        assert runtime.get_local_device_id() == min(os.sched_getaffinity(0))
        handle = runtime.get_local_ipc_handle()
        cookie, announced = struct.unpack_from("<QQ", handle)
        assert len(handle) == 64 and announced == num_bytes
        cookies = comm.allgather(cookie)
        assert len(set(cookies)) == comm.size
        ids = comm.allgather(runtime.get_local_nvshmem_unique_id())
        assert {len(one) for one in ids} == {128} and len(set(ids)) == comm.size


@cpu_runtime_only
@pytest.mark.mpi(min_size=2)
def test_a_window_that_is_not_the_announced_one_is_found(comm: MPI.Intracomm) -> None:
    with Buffer(comm, minimum_nvl_bytes(comm.size), device=str(DEVICE), timeout=30) as buffer:
        handles = comm.allgather(buffer.runtime.get_local_ipc_handle())
        swapped = [handles[1], handles[0], *handles[2:]]
        with pytest.raises(RuntimeError, match="not the window of rank 0"):
            buffer.runtime.sync([0] * comm.size, swapped, b"")
        buffer.runtime.sync([0] * comm.size, handles, b"")


@pytest.mark.mpi
def test_exchange_gathers_what_every_rank_produced(comm: MPI.Intracomm) -> None:
    group = Group(comm, 30)
    gathered = group.exchange("testing", 4, lambda: struct.pack("<i", 7 * comm.rank))
    assert [struct.unpack("<i", data)[0] for data in gathered] == [7 * rank for rank in range(comm.size)]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("raised", "expected"),
    [(ArgumentError("no"), ArgumentError), (UnavailableError("no"), UnavailableError), (OSError("no"), BootstrapError)],
)
def test_a_failing_rank_makes_all_raise_alike(
    comm: MPI.Intracomm, raised: Exception, expected: type[Exception]
) -> None:
    group = Group(comm, 30)
    failing = comm.size - 1
    with pytest.raises(expected, match=f"testing failed on rank {failing}: .*no"), group.step("testing"):
        if comm.rank == failing:
            raise raised
    with group.step("testing again"):  # nobody is left behind in the first vote
        pass


@pytest.mark.mpi(min_size=2)
def test_arguments_that_differ_are_named_with_their_values(comm: MPI.Intracomm) -> None:
    group = Group(comm, 30)
    with pytest.raises(ArgumentError, match="size must be the same on all ranks; got 1 on rank 0 and 2 on rank 1"):
        agree(group, ["name", "size"], lambda: {"name": "a", "size": 1 + (comm.rank == 1)})


@pytest.mark.mpi(min_size=2)
def test_ranks_per_node_must_divide_the_ranks(comm: MPI.Intracomm) -> None:
    with pytest.raises(ArgumentError, match="ranks_per_node must divide"):
        Buffer(comm, ranks_per_node=comm.size + 1, device=str(DEVICE), timeout=30)
