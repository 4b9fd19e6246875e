"""Everything collective about construction: agreement, topology, windows, and the exchange that connects the runtimes.

All of MPI that is not the traffic of a call is here. Every step ends in a vote: if it fails on one rank, all ranks
raise the same kind of error, with that rank's message, and nobody is left waiting. Votes have a limit. MPI's own
collectives that have no non-blocking form (splitting a communicator, allocating and freeing windows) come right after a
vote, when all ranks are known to be there; only a rank that stops in that very moment could hold the others up.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from mpi4py import MPI

from .errors import ArgumentError, BootstrapError, Error, PeerTimeoutError, UnavailableError
from .messenger import Messenger, PeersMissing, Purpose, keep_forever, wait_until

_ERROR_BYTES = 1000  # of an error message that travels
_ARGUMENTS_BYTES = 1024
_HOST_BYTES = 64
# The kinds of error that a vote can carry; whatever else goes wrong on a rank becomes a BootstrapError.
_KINDS: tuple[type[Error], ...] = (BootstrapError, ArgumentError, UnavailableError)

# Test-only: the node of each rank, e.g. "0,1,0,1", in place of what MPI finds and of `ranks_per_node`.
_NODES_VARIABLE = "HPC_MOE_TEST_NODE_OF_RANK"


class Group:
    """The buffer's own duplicate of the user's communicator, with steps that all ranks take together or not at all."""

    def __init__(self, comm: MPI.Intracomm, limit: float) -> None:
        self.limit = limit
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.comm, request = comm.Idup()
        if not wait_until(request.Test, limit):
            keep_forever(self.comm, request)
            raise PeerTimeoutError(
                f"Buffer on rank {self.rank} waited {limit:g} s for the other ranks of comm to construct theirs",
                operation="Buffer",
                rank=self.rank,
            )
        self.messenger = Messenger(self.comm)
        self._steps = 0

    def exchange(self, name: str, num_bytes: int, produce: Callable[[], bytes]) -> list[bytes]:
        """Gather what `produce` returns on every rank; if it raises on any, every rank raises that rank's error.

        First the ranks tell each other that they are here, and only then gather. So a rank that gave up waiting is
        missed by a late one, which would otherwise go on alone, into a call of MPI that waits for ever.

        Args:
            name: of the step, for messages.
            num_bytes: of what `produce` returns (less is padded with zeros).
            produce: must not communicate.

        Raises:
            PeerTimeoutError: a rank did not come within the limit.
        """
        error: Exception | None = None
        try:
            data = produce()
            if len(data) > num_bytes:
                raise ValueError(f"{len(data)} bytes do not fit in {num_bytes}")
            ballot = b"\0\0" + data
        except Exception as caught:
            error = caught
            kind = next((i for i, k in enumerate(_KINDS) if isinstance(caught, k)), 0)
            text = str(caught) if isinstance(caught, Error) else f"{type(caught).__name__}: {caught}"
            ballot = bytes([1, kind]) + text.encode()[:_ERROR_BYTES]
        self._arrive(name)
        ballots = self._gather(name, ballot, 2 + max(num_bytes, _ERROR_BYTES))
        for rank, vote in enumerate(ballots):
            if vote[0]:
                text = vote[2:].rstrip(b"\0").decode(errors="replace")
                raise _KINDS[vote[1]](f"Buffer: {name} failed on rank {rank}: {text}") from error
        return [vote[2 : 2 + num_bytes] for vote in ballots]

    def _arrive(self, name: str) -> None:
        self._steps += 1
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            self.messenger.send(rank, Purpose.STEP, self._steps, np.empty(0, np.uint8))
        try:
            self.messenger.receive(others, Purpose.STEP, self._steps, self.limit)
        except PeersMissing as missing:
            raise self._timeout(name, missing.ranks) from None

    def _gather(self, name: str, data: bytes, num_bytes: int) -> list[bytes]:
        send = np.zeros(num_bytes, np.uint8)
        send[: len(data)] = np.frombuffer(data, np.uint8)
        receive = np.empty(self.size * num_bytes, np.uint8)
        request = self.comm.Iallgather(send, receive)
        if not wait_until(request.Test, self.limit):
            keep_forever(request, send, receive)
            raise self._timeout(name, ())
        return [receive[r * num_bytes : (r + 1) * num_bytes].tobytes() for r in range(self.size)]

    def _timeout(self, name: str, ranks: tuple[int, ...]) -> PeerTimeoutError:
        whom = f"rank {', '.join(map(str, ranks))}" if ranks else "ranks that gave up before"
        return PeerTimeoutError(
            f"Buffer on rank {self.rank} waited {self.limit:g} s for {whom} in the step '{name}'",
            operation="Buffer",
            rank=self.rank,
            peers=ranks,
        )

    @contextlib.contextmanager
    def freed_on_error(self) -> Iterator[None]:
        """Free the duplicate if the block raises, unless it was for a rank that did not come."""
        try:
            yield
        except PeerTimeoutError:
            raise
        except Exception:
            self.comm.Free()  # steps fail on all ranks or on none, so all are here
            raise

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run a step and vote on it: if it raised on any rank, every rank raises that rank's error.

        The step must not use this group's collectives: a rank that failed would not take part in them.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught

        def outcome() -> bytes:
            if error is not None:
                raise error
            return b""

        self.exchange(name, 0, outcome)


@dataclass(frozen=True)
class Topology:
    """Where the ranks are. Nodes are numbered by their lowest rank; a node's ranks need not be contiguous.

    Attributes:
        rank: this rank.
        node_of_rank: the node of every rank.
        ranks_of_node: the ranks of every node, ascending; all nodes have equally many.
        hosts: the host name of every rank.
        num_threads: OpenMP threads for this rank.
    """

    rank: int
    node_of_rank: tuple[int, ...]
    ranks_of_node: tuple[tuple[int, ...], ...]
    hosts: tuple[str, ...]
    num_threads: int

    @property
    def num_nodes(self) -> int:
        return len(self.ranks_of_node)

    @property
    def node(self) -> int:
        return self.node_of_rank[self.rank]

    @property
    def local_rank(self) -> int:
        return self.ranks_of_node[self.node].index(self.rank)

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks of this node, this one included."""
        return self.ranks_of_node[self.node]

    @property
    def rail(self) -> tuple[int, ...]:
        """The rank with this local rank on every node, in the order of nodes."""
        return tuple(ranks[self.local_rank] for ranks in self.ranks_of_node)

    def describe(self, rank: int) -> str:
        return f"rank {rank} (node {self.node_of_rank[rank]}, host {self.hosts[rank]})"


def number_nodes(colors: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Node of each rank and ranks of each node, from any value that is equal for the ranks of one node.

    Raises:
        UnavailableError: the nodes have different numbers of ranks.
    """
    order = list(dict.fromkeys(colors))
    node_of_rank = tuple(order.index(color) for color in colors)
    ranks_of_node = tuple(tuple(rank for rank, node in enumerate(node_of_rank) if node == n) for n in range(len(order)))
    if len({len(ranks) for ranks in ranks_of_node}) > 1:
        counts = ", ".join(f"node {n}: {len(ranks)}" for n, ranks in enumerate(ranks_of_node))
        raise UnavailableError(
            f"every node must have the same number of ranks; got {counts}. Start the job with as many ranks on every "
            "node, Split the communicator, or pass ranks_per_node"
        )
    return node_of_rank, ranks_of_node


def _num_threads(cores: set[int], ranks_on_these_cores: int) -> int:
    """OpenMP threads of a rank: what OMP_NUM_THREADS says, else its share of the cores that it may run on."""
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wish.isdigit() and int(wish) > 0:
        return int(wish)
    return max(1, len(cores) // ranks_on_these_cores)


def find_topology(group: Group, ranks_per_node: int | None) -> Topology:
    """Find out which ranks share memory, and lay out nodes. Collective.

    Raises:
        ArgumentError: `ranks_per_node` does not divide R, or puts ranks into a node that share no memory.
        UnavailableError: the nodes have different numbers of ranks.
    """
    shared = group.comm.Split_type(MPI.COMM_TYPE_SHARED, group.rank)
    first = np.array([group.rank], np.int64)
    shared.Bcast(first, 0)  # every rank arrived in Split_type a moment ago
    shared.Free()
    cores = os.sched_getaffinity(0)

    def describe_place() -> bytes:
        same_cores = zlib.crc32(repr(sorted(cores)).encode())
        return struct.pack("<qI", int(first[0]), same_cores) + MPI.Get_processor_name().encode()[:_HOST_BYTES]

    records = [
        (*struct.unpack_from("<qI", data), data[12:].rstrip(b"\0").decode(errors="replace"))
        for data in group.exchange("saying where ranks run", 12 + _HOST_BYTES, describe_place)
    ]
    with group.step("finding the nodes"):
        memory = [shared_color for shared_color, _, _ in records]
        colors = memory
        if os.environ.get(_NODES_VARIABLE):
            colors = [int(node) for node in os.environ[_NODES_VARIABLE].split(",")]
            if len(colors) != group.size:
                raise ArgumentError(f"{_NODES_VARIABLE} must name a node for each of {group.size} ranks; got {colors}")
        elif ranks_per_node is not None:
            if group.size % ranks_per_node:
                raise ArgumentError(
                    f"ranks_per_node must divide the number of ranks, {group.size}; got {ranks_per_node}"
                )
            colors = [rank // ranks_per_node for rank in range(group.size)]
        node_of_rank, ranks_of_node = number_nodes(colors)
        for ranks in ranks_of_node:
            if len({memory[rank] for rank in ranks}) > 1:
                raise ArgumentError(
                    f"ranks_per_node={ranks_per_node} puts ranks {list(ranks)} into one node, but they share no memory"
                    f" (hosts {', '.join(sorted({records[rank][2] for rank in ranks}))})"
                )
        mine = records[group.rank][:2]
        num_threads = _num_threads(cores, sum(record[:2] == mine for record in records))
    return Topology(group.rank, node_of_rank, ranks_of_node, tuple(record[2] for record in records), num_threads)


def agree(group: Group, names: Iterable[str], check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Check the arguments on every rank, and that all ranks passed the same. Collective.

    Args:
        group: the ranks.
        names: of the arguments, in the order in which differences are reported.
        check: returns this rank's arguments, as JSON can hold them, or raises what is wrong with them.

    Returns:
        The arguments.

    Raises:
        ArgumentError: an argument is wrong on some rank, or differs between ranks; the same on every rank.
    """
    gathered = group.exchange(
        "checking the arguments", _ARGUMENTS_BYTES, lambda: json.dumps(check(), sort_keys=True).encode()
    )
    everyones = [json.loads(data.rstrip(b"\0")) for data in gathered]
    for name in names:
        values = {rank: other[name] for rank, other in enumerate(everyones)}
        if any(value != values[0] for value in values.values()):
            raise ArgumentError(f"Buffer: {difference(name, values)}")
    own: dict[str, Any] = everyones[group.rank]
    return own


def difference(name: str, values: Mapping[int, Any]) -> str:
    """Says that a value differs between ranks: that of the first rank, and of the first rank with another."""
    first = next(iter(values))
    other = next(rank for rank, value in values.items() if value != values[first])
    got = f"{values[first]!r} on rank {first} and {values[other]!r} on rank {other}"
    return f"{name} must be the same on all ranks; got {got}"


class Runtime(Protocol):
    """What a backend's C++ runtime offers to the bootstrap. `csrc/` says what each means on its backend."""

    def get_local_device_id(self) -> int: ...
    def get_local_device_uuid(self) -> bytes: ...
    def get_local_ipc_handle(self) -> bytes: ...
    def get_num_rdma_ranks(self) -> int: ...
    def get_rdma_rank(self) -> int: ...
    def get_root_rdma_rank(self) -> int: ...
    def check_peers(self, uuids: list[bytes]) -> None: ...
    def get_local_nvshmem_unique_id(self) -> bytes: ...
    def sync(self, device_ids: list[int], ipc_handles: list[bytes], root_unique_id: bytes) -> None: ...
    def is_available(self) -> bool: ...
    def destroy(self) -> None: ...


_UUID_BYTES = 16
_IPC_HANDLE_BYTES = 64
_UNIQUE_ID_BYTES = 128


def connect(group: Group, topology: Topology, runtime: Runtime, needs_unique_id: bool) -> None:
    """Exchange device IDs, IPC handles and unique IDs, and bring the runtime up with them. Collective.

    Args:
        group: the ranks.
        topology: where they are.
        runtime: this rank's.
        needs_unique_id: whether `runtime` forms worlds, too. (That of CUDA leaves this to `nvshmem.join`.)

    Raises:
        BootstrapError, ArgumentError or UnavailableError: a step failed on some rank; the same on every rank.
    """
    records = group.exchange(
        "reading the device IDs",
        4 + _UUID_BYTES,
        lambda: struct.pack("<i", runtime.get_local_device_id()) + runtime.get_local_device_uuid(),
    )
    uuids = [data[4:] for data in records]
    _refuse_shared_devices(topology, uuids)
    with group.step("checking that devices reach each other"):
        runtime.check_peers(uuids)
    ipc_handles = group.exchange("making the IPC handles", _IPC_HANDLE_BYTES, runtime.get_local_ipc_handle)
    root_unique_id = b""
    if needs_unique_id:
        root = runtime.get_root_rdma_rank()
        unique_ids = group.exchange(
            "making the NVSHMEM unique IDs",
            _UNIQUE_ID_BYTES,
            lambda: runtime.get_local_nvshmem_unique_id() if root == group.rank else b"",
        )
        root_unique_id = unique_ids[root]
    with group.step("connecting the runtimes"):
        runtime.sync([struct.unpack_from("<i", data)[0] for data in records], ipc_handles, root_unique_id)
        if not runtime.is_available():
            raise BootstrapError("the runtime is not available after sync")


def _refuse_shared_devices(topology: Topology, uuids: list[bytes]) -> None:
    """Two ranks on one device are an error. An all-zero UUID means that sharing is fine (CPU cores)."""
    for rank, uuid in enumerate(uuids):
        other = uuids.index(uuid)
        if any(uuid) and other != rank:
            raise ArgumentError(
                f"Buffer: {topology.describe(other)} and {topology.describe(rank)} share a device; each needs its own"
            )


@dataclass
class SharedWindows:
    """MPI shared memory of a node: one window per rank, mapped by all ranks of the node.

    Attributes:
        win: the MPI window, or None where no bytes were asked for.
        addresses: where each rank's window lies in this process, in the order of the node's ranks.
    """

    win: MPI.Win | None = None
    comm: MPI.Intracomm | None = None
    addresses: list[int] = field(default_factory=list)

    def memory(self, local_rank: int) -> memoryview:
        """This process's mapping of the window of one rank of the node."""
        if self.win is None:
            return memoryview(b"")
        memory: Any = self.win.Shared_query(local_rank)[0]
        return memoryview(memory).cast("B")

    def fence(self) -> None:
        """Order this process's loads and stores in the windows with those of its peers (MPI_Win_sync)."""
        if self.win is not None:
            self.win.Sync()

    def free(self) -> None:
        """Collective over the node."""
        if self.win is not None:
            self.win.Unlock_all()
            self.win.Free()
            self.win = None
        if self.comm is not None:
            self.comm.Free()
            self.comm = None


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def allocate_windows(group: Group, topology: Topology, num_bytes: int) -> SharedWindows:
    """Allocate a window of `num_bytes` bytes on every rank, shared by the ranks of a node. Collective.

    Raises:
        ArgumentError: the node has less memory than its ranks ask for.
        BootstrapError: MPI could not allocate shared memory; carries MPI's words.
    """
    with group.step("checking num_nvl_bytes"):
        wanted = num_bytes * len(topology.local_ranks)
        if wanted > physical_memory():
            raise ArgumentError(
                f"num_nvl_bytes={num_bytes} is more than the machine has: {len(topology.local_ranks)} ranks on this "
                f"node need {wanted} bytes of {physical_memory()}"
            )
    windows = SharedWindows()
    if num_bytes == 0:
        return windows
    try:
        with group.step("allocating shared windows"):
            comm = windows.comm = cast(MPI.Intracomm, group.comm.Split(topology.node, group.rank))
            info = MPI.Info.Create()
            info.Set("alloc_shared_noncontig", "true")  # every window on pages of its own
            windows.win = MPI.Win.Allocate_shared(num_bytes, 1, info, comm)
            info.Free()
            windows.win.Lock_all(MPI.MODE_NOCHECK)
            locals_ = range(len(topology.local_ranks))
            windows.addresses = [windows.win.Shared_query(local)[0].address for local in locals_]
    except Exception:
        keep_forever(windows)  # freeing is collective, and not every rank may have got one
        raise
    return windows
