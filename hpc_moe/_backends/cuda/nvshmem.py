"""`World`: NVSHMEM as the buffers of this process share it, and its collective start.

NVSHMEM exists once in a process: it starts on certain ranks, in a certain order, and all buffers on these ranks use it
together. `join` starts it, or takes part in what an earlier buffer started; `World.release` lets go of it. Ranks vote
before NVSHMEM starts, since it blocks, or ends the process, where a rank is missing or a call fails.

Not for: deciding on the environment (hpc_moe/nvshmem_env.py), or what is done with symmetric memory. `hpc_moe._nvshmem`
is imported by `load_library` only, where NVSHMEM is needed, because it may be missing or not load.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from mpi4py import MPI

from ... import _C, nvshmem_env
from ...bootstrap import Group
from ...errors import BootstrapError, Error, UnavailableError
from ...messenger import keep_forever

__all__ = ["Library", "World", "check_versions", "join", "load_library"]

OLDEST = (3, 4)
"""The oldest version whose start and device functions are known to be what csrc/nvshmem/ relies on."""

# Test-only: "1" lets NVSHMEM start again on the ranks that it ended on. See `_refuse`.
RESTART_VARIABLE = "HPC_MOE_TEST_NVSHMEM_RESTART"

_UNIQUE_ID_BYTES = 128
_SHOWN_CHARACTERS = 400  # of what NVSHMEM wrote; a vote carries 1000 bytes of an error
# Of the group's limit: the ranks that failed wait in the vote for those that NVSHMEM holds up.
_SHARE_OF_LIMIT = 0.75


class Library(Protocol):
    """What is needed of `hpc_moe._nvshmem`; tests put others in its place."""

    def built_version(self) -> tuple[int, int, int]: ...
    def built_path(self) -> str: ...
    def loaded_version(self) -> tuple[int, int, int]: ...
    def loaded_path(self) -> str: ...
    def get_unique_id(self) -> bytes: ...
    def init(self, unique_id: bytes, pe: int, num_pes: int, device: int) -> None: ...
    def is_running(self) -> bool: ...
    def finalize(self, device: int) -> None: ...
    def malloc(self, num_bytes: int, device: int) -> int: ...
    def free(self, address: int, device: int) -> None: ...
    def create_queue_pairs(self, count: int, device: int) -> list[int]: ...
    def ptr(self, address: int, pe: int) -> int: ...
    def low_latency_launchers(self) -> int: ...


T = TypeVar("T")
PlanMaker = Callable[[nvshmem_env.Version, Mapping[str, str]], nvshmem_env.Plan]


@dataclass
class World:
    """NVSHMEM running on some ranks.

    Attributes:
        library: to call it with.
        ranks: the rank in MPI.COMM_WORLD of every PE.
        pe: this rank's place among them.
        device: the index of this rank's GPU.
        plan: the environment that NVSHMEM started with.
        references: how many buffers use it.
        queue_pairs: handles of all that were created.
    """

    library: Library
    ranks: tuple[int, ...]
    pe: int
    device: int
    plan: nvshmem_env.Plan
    references: int = 1
    queue_pairs: list[int] = field(default_factory=list)
    _sizes: dict[int, int] = field(default_factory=dict)  # in bytes, of what was allocated, by address
    _given_back: list[int] = field(default_factory=list)  # sizes

    def malloc(self, group: Group, num_bytes: int, get_free_bytes: Callable[[], int]) -> int:
        """The address of symmetric memory. Collective over the group that joined, with the same size.

        Args:
            group: the ranks.
            num_bytes: of each rank.
            get_free_bytes: how much of this rank's GPU memory nobody has.

        Raises:
            BootstrapError: a rank has no room, and a smaller piece may be asked for; or, with NVSHMEM, something
                failed, and then the world is abandoned.
            PeerTimeoutError: a rank did not come. Abandon the world.
        """

        def allocate() -> int:
            address = self.library.malloc(num_bytes, self.device)
            if address == 0:
                raise Error(f"NVSHMEM's symmetric heap has no room for {num_bytes} bytes")
            return address

        name = "allocating symmetric memory"
        with group.step(name):
            self._require_room(num_bytes, get_free_bytes())
        address = self._together(group, name, allocate)
        if self._has_piece(num_bytes):
            self._given_back.remove(max(self._given_back))  # it is the largest that NVSHMEM has taken, at worst
        self._sizes[address] = num_bytes
        return address

    def _has_piece(self, num_bytes: int) -> bool:
        """Whether something was given back from which NVSHMEM can take as much."""
        return max(self._given_back, default=0) >= num_bytes

    def _require_room(self, num_bytes: int, free_bytes: int) -> None:
        """Raise `Error` if NVSHMEM's heap cannot grow by as much: NVSHMEM 3.4.5 would end the process.

        It grows by all of what it is asked for, in units of NVSHMEM_CUMEM_GRANULARITY bytes, if it has that in no one
        piece, and keeps what it has. Without CUDA's virtual memory it has its size from the start, and says no itself.
        """
        variable = "NVSHMEM_DISABLE_CUDA_VMM"
        if nvshmem_env.parse_bool(variable, os.environ.get(variable, "0")):
            return
        granularity = self.plan["NVSHMEM_CUMEM_GRANULARITY"]
        unit = nvshmem_env.parse_size(granularity.name, granularity.value or "")
        needed = 0 if self._has_piece(num_bytes) else -(-num_bytes // unit) * unit
        if needed > free_bytes:
            raise Error(
                f"the GPU has no room for {num_bytes} bytes of symmetric memory (num_rdma_bytes, and some more for the "
                f"library): {free_bytes} bytes are free, and NVSHMEM would take {needed}. torch keeps memory that it "
                "does not use (torch.cuda.empty_cache())"
            )

    def free(self, group: Group, address: int) -> None:
        """Give symmetric memory back. Collective over the group that joined; no kernel may use it any more.

        That of an abandoned world stays allocated.

        Raises:
            BootstrapError, PeerTimeoutError: as for `malloc`.
        """
        if _process.alive is self:
            self._together(group, "freeing symmetric memory", lambda: self.library.free(address, self.device))
            self._given_back.append(self._sizes.pop(address))

    def share_queue_pairs(self, group: Group, count: int) -> list[int]:
        """Handles of queue pairs for kernels that put; none with a version in which NVSHMEM chooses them itself.

        Collective over the group that joined, with the same count. Buffers share them, for they cannot be given back
        before NVSHMEM ends.

        Raises:
            BootstrapError, PeerTimeoutError: as for `malloc`.
        """
        more = count - len(self.queue_pairs)
        if more > 0:
            self.queue_pairs += self._together(
                group, "creating NVSHMEM queue pairs", lambda: self.library.create_queue_pairs(more, self.device)
            )
        return self.queue_pairs[:count]

    def _together(self, group: Group, name: str, function: Callable[[], T]) -> T:
        """Call a function of NVSHMEM that waits for all PEs, and vote on it.

        Where it fails, on this rank or on another, the world is abandoned: some ranks have what others have not, and
        some may be waiting in it still.
        """
        try:
            with group.step(name):
                return _call(function, _SHARE_OF_LIMIT * group.limit)
        except Exception:
            self.abandon(f"{name} failed on some rank")
            raise

    def release(self, group: Group) -> None:
        """Let go of it; the last one ends NVSHMEM. Collective over the group that joined.

        All symmetric memory must have been freed, and no kernel may use it any more.

        Raises:
            PeerTimeoutError: a rank did not come. NVSHMEM goes on; call `abandon`.
            Error: NVSHMEM did not end.
        """
        if self.references < 1:
            raise Error("this NVSHMEM world has been released as often as it was joined")
        with group.step("letting go of NVSHMEM"):  # all are here: NVSHMEM's own wait for them has no limit
            pass
        self.references -= 1
        if self.references > 0 or _process.alive is not self:  # another buffer may have abandoned it
            return
        _process.alive = None
        _process.ended = _Ended(self.ranks, "it ended with the last buffer that used it", may_restart=True)
        try:
            _call(lambda: self.library.finalize(self.device), group.limit)
        except Exception as error:
            _process.ended = _Ended(self.ranks, "it failed to end")
            keep_forever(self)
            raise Error(f"NVSHMEM did not end: {error}") from error

    def leave(self) -> None:
        """Let go of it in place of `release`, but do not end NVSHMEM: it could not be started again. Local.

        For a buffer that could not be made: its user may try again, with less memory.
        """
        self.references -= 1

    def abandon(self, why: str = "a rank was lost") -> None:
        """Never end NVSHMEM, nor start it again: all that it does would wait for a rank that does not come. Local.

        In place of `release`; other buffers that share the world may still release it, to no effect.
        """
        if _process.alive is self:
            _process.alive = None
            _process.ended = _Ended(self.ranks, why)
        keep_forever(self)


@dataclass(frozen=True)
class _Ended:
    ranks: tuple[int, ...]
    why: str
    may_restart: bool = False


@dataclass
class _Process:
    """What this process knows of its NVSHMEM.

    Attributes:
        alive: the world that buffers share, if there is one.
        ended: how the last one ended, or failed to start.
        set_here: the environment variables that were set here, in place of the user's.
    """

    alive: World | None = None
    ended: _Ended | None = None
    set_here: dict[str, nvshmem_env.Setting] = field(default_factory=dict)


_process = _Process()


def load_library() -> Library:
    """`hpc_moe._nvshmem`. Raises `UnavailableError` where it was not built, or cannot be loaded."""
    built = _C.nvshmem_build_version
    if not built:
        raise UnavailableError(
            "this build of hpc_moe has no NVSHMEM: pip install nvidia-nvshmem-cu13 (or -cu12), or set NVSHMEM_DIR, and "
            "build hpc_moe again (python tools/cuda_build.py shows what it finds)"
        )
    try:
        from ... import _nvshmem
    except ImportError as error:
        raise UnavailableError(
            f"hpc_moe was built with NVSHMEM {built}, but hpc_moe._nvshmem cannot be loaded: {error}"
            f"{_loaded_before()}. Install nvidia-nvshmem-cu13 (or -cu12) {built} again, name the folder of its "
            "libnvshmem_host.so.3 in LD_LIBRARY_PATH, or build hpc_moe again"
        ) from error
    if _show(_nvshmem.built_version()) != built:
        raise UnavailableError(
            f"hpc_moe._nvshmem ({_nvshmem.__file__}) was built with NVSHMEM {_show(_nvshmem.built_version())}, and "
            f"hpc_moe._C with {built}: build hpc_moe again, so that both are of one build"
        )
    return _nvshmem


def _loaded_before() -> str:
    """Says which libnvshmem_host this process had already, if any: the loader takes no second one."""
    with contextlib.suppress(OSError), open("/proc/self/maps", errors="replace") as maps:
        for line in maps:
            if "/libnvshmem_host.so" in line:
                return f" (this process has loaded {line[line.index('/') :].strip()} already, for torch, say)"
    return ""


def check_versions(library: Library) -> None:
    """Raise `UnavailableError` if the library that was loaded is too old, or not of the build's major.minor version.

    The loader takes any libnvshmem_host.so.3 that the process has already, such as the one of torch's environment. Its
    device code is linked into hpc_moe, though, and reads structures that the host library writes.
    """
    built, loaded = library.built_version(), library.loaded_version()
    if loaded[:2] == built[:2] and loaded >= OLDEST:
        return
    oldest = ".".join(map(str, OLDEST))
    raise UnavailableError(
        f"hpc_moe was built with NVSHMEM {_show(built)} ({library.built_path()}), and this process has loaded "
        f"{_show(loaded)} ({library.loaded_path()}); both must be of the same version x.y, {oldest} or newer. Build "
        f"hpc_moe again with the one that is loaded (NVSHMEM_DIR), or install {_show(built)} there. torch "
        "loads that of its own environment, and LD_LIBRARY_PATH goes before what hpc_moe was built with"
    )


def join(
    group: Group,
    members: Sequence[int],
    *,
    device: int,
    make_plan: PlanMaker,
    load: Callable[[], Library] = load_library,
) -> World:
    """Start NVSHMEM on `members`, or take part in what an earlier buffer started on the same. Collective over `group`.

    Args:
        group: the buffer's ranks. They may form several worlds, one for each rail, say.
        members: the ranks of this rank's world, in the order of their PEs; equal on all of them.
        device: the index of this rank's GPU.
        make_plan: the environment to start with, from the version that is loaded and from the user's environment.
        load: where the library comes from.

    Raises:
        UnavailableError: there is no NVSHMEM, or not the right one; or it runs, or has run, in a way that this buffer
            cannot use.
        BootstrapError: it did not start; carries what it said.
        ArgumentError: a variable of its environment is malformed.
        PeerTimeoutError: a rank did not come.
    """
    with group.step("loading NVSHMEM"):
        library = load()
        check_versions(library)
        ranks = _ranks_in_world(group, members)
        pe = tuple(members).index(group.rank)

    def look() -> bytes:
        _refuse(library, ranks)
        return b"\1" if _process.alive else b"\0"

    is_shared = group.exchange("looking for an NVSHMEM that runs", 1, look)
    plan = _agree_on_plan(group, library, members, [shared == b"\1" for shared in is_shared], make_plan)
    world = _process.alive

    def make_unique_id() -> bytes:
        if world is not None:
            return b""
        _set_environment(plan)
        if pe != 0:
            return b""
        with _caught_stderr() as said:
            try:
                return library.get_unique_id()
            except RuntimeError as error:
                failed = error
        raise BootstrapError(f"{failed}. {_advice(said)}")

    unique_ids = group.exchange("making the NVSHMEM unique IDs", _UNIQUE_ID_BYTES, make_unique_id)
    try:
        with group.step("starting NVSHMEM"):
            if world is None:
                _start(library, unique_ids[members[0]], pe, len(ranks), device, group.limit)
    except Exception:
        # Where it did start, it is left alone: to end it would wait for those that failed.
        if world is None:
            _process.ended = _Ended(ranks, "its start failed on some rank")
        raise
    if world is None:
        for text in plan.warnings:
            warnings.warn(f"NVSHMEM: {text}", RuntimeWarning, stacklevel=2)
        world = _process.alive = World(library, ranks, pe, device, plan)
    else:
        world.references += 1
    return world


def _ranks_in_world(group: Group, members: Sequence[int]) -> tuple[int, ...]:
    """Ranks of MPI.COMM_WORLD, by which worlds of different communicators can be compared."""
    mine, world = group.comm.Get_group(), MPI.COMM_WORLD.Get_group()
    try:
        return tuple(MPI.Group.Translate_ranks(mine, list(members), world))
    finally:
        mine.Free()
        world.Free()


def _refuse(library: Library, ranks: tuple[int, ...]) -> None:
    """Raise `UnavailableError` if this process cannot have NVSHMEM on these ranks.

    Whether NVSHMEM may start again after its end: its headers (3.4.5 to 3.8.0) say nothing, and its reference calls a
    second start undefined behaviour (https://docs.nvidia.com/nvshmem/api/gen/api/setup.html). It is known to keep what
    it knows of its peers beyond its end, and would silently come back on the old ranks, whatever it is asked for
    (https://github.com/NVIDIA/nvshmem/issues/68); after a start that failed half-way, too. So it starts once.
    """
    alive, ended = _process.alive, _process.ended
    if alive is not None:
        if alive.ranks != ranks:
            raise UnavailableError(
                f"NVSHMEM runs on ranks {_list(alive.ranks)} of MPI_COMM_WORLD for another buffer, and a process has "
                f"it only once; this buffer needs it on ranks {_list(ranks)}. Create all buffers that use NVSHMEM on "
                "the same ranks, in the same order"
            )
        return
    if ended is not None:
        restarts = os.environ.get(RESTART_VARIABLE) == "1" and ended.may_restart and ended.ranks == ranks
        if not restarts:
            raise UnavailableError(
                f"NVSHMEM cannot start a second time in a process, and here {ended.why} (ranks {_list(ended.ranks)} of "
                "MPI_COMM_WORLD). Start a new process; keep a buffer that uses NVSHMEM until no other is needed"
            )
    if library.is_running():
        raise UnavailableError(
            "another library of this process has started NVSHMEM already (torch's symmetric memory, say), and a "
            "process has it only once: use one of the two"
        )


def _agree_on_plan(
    group: Group, library: Library, members: Sequence[int], is_shared: Sequence[bool], make_plan: PlanMaker
) -> nvshmem_env.Plan:
    """The environment to start NVSHMEM with, or that it has been started with, equal on all ranks."""
    plans: list[nvshmem_env.Plan] = []

    def produce() -> bytes:
        if len({is_shared[member] for member in members}) > 1:
            having = [member for member in members if is_shared[member]]
            raise BootstrapError(
                f"NVSHMEM still runs on ranks {_list(having)} of the communicator, but not on the others: destroy "
                "buffers on all of their ranks"
            )
        plan = make_plan(library.loaded_version(), _user_environment())
        if _process.alive is not None:
            _refuse_other_plan(_process.alive.plan, plan)
        plans.append(plan)
        return plan.encode()

    encoded = group.exchange("choosing the NVSHMEM environment", nvshmem_env.ENCODED_BYTES, produce)
    lines = nvshmem_env.differences(encoded)
    if lines:
        raise BootstrapError(
            f"Buffer: NVSHMEM would start differently: {'; '.join(lines)}. Set these variables alike on all ranks, or "
            "on none (hpc_moe doctor shows where each value comes from)"
        )
    return plans[0]


def _refuse_other_plan(started: nvshmem_env.Plan, wanted: nvshmem_env.Plan) -> None:
    for before, now in zip(started, wanted, strict=True):
        if before.value != now.value:
            raise UnavailableError(
                f"NVSHMEM has been started with {before.name}={before.value} for another buffer, and this buffer needs "
                f"{now.value}: {now.why}. Create all buffers that use NVSHMEM with the same arguments"
            )


def _user_environment() -> dict[str, str]:
    """The environment without what was set here, so that a second plan can tell a user's wish from the first plan."""
    environ = dict(os.environ)
    for setting in _process.set_here.values():
        if environ.get(setting.name) == setting.value:
            del environ[setting.name]
            if setting.user_value is not None:
                environ[setting.name] = setting.user_value
    return environ


def _set_environment(plan: nvshmem_env.Plan) -> None:
    _process.set_here = {setting.name: setting for setting in plan if setting.source in ("library", "changed")}
    nvshmem_env.apply(plan)


def _start(library: Library, unique_id: bytes, pe: int, num_pes: int, device: int, limit: float) -> None:
    failed: Exception | None = None
    with _caught_stderr() as said:
        try:
            _call(lambda: library.init(unique_id, pe, num_pes, device), _SHARE_OF_LIMIT * limit)
        except Exception as error:
            failed = error
    if failed is not None:
        version = _show(library.loaded_version())
        raise BootstrapError(f"NVSHMEM {version} as PE {pe} of {num_pes}: {failed}. {_advice(said)}") from failed


def _advice(said: list[str]) -> str:
    text = said[0].strip()
    shown = text if len(text) <= _SHOWN_CHARACTERS else "... " + text[-_SHOWN_CHARACTERS:]
    return (
        "NVSHMEM_DEBUG=INFO makes it say more, on stdout; NVSHMEM_REMOTE_TRANSPORT and NVSHMEM_IB_ENABLE_IBGDA choose "
        "the network path, NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME the interface to start over. "
        + (f"It wrote: {shown}" if shown else "It wrote nothing to stderr")
    )


def _call(function: Callable[[], T], limit: float) -> T:
    """What it returns, called in a thread of its own; raise if it has not returned within `limit` seconds.

    Much of NVSHMEM waits for all PEs and knows no limit. A call that is given up stays where it is.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="hpc_moe-nvshmem", daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        raise Error(f"it did not return within {limit:g} s; a rank may have failed, or cannot be reached")
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def _caught_stderr() -> Iterator[list[str]]:
    """Catch what the process writes to stderr, C code included; behind the block it lies in the list, and is written.

    What other threads write meanwhile is caught with it, and is late.
    """
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            data = file.read()
            said.append(data.decode(errors="replace"))
            with contextlib.suppress(OSError):
                os.write(2, data)


def _show(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
