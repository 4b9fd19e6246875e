"""Ranks that fail on purpose, for tests/test_faults.py: `mpirun -n 3 python faults.py SCENARIO DIRECTORY [VALUE]`.

Every rank writes what it saw into DIRECTORY/RANK.json; the ranks that are expected to then wait for each other's files,
so that the launcher ends nobody early, and leave without MPI_Finalize, which would wait for a dead rank.

VICTIM is the rank that fails. How (VALUE): `silent` (lives, but does not call), `stopped` (SIGSTOP), `killed` (SIGKILL;
under `mpirun --continuous`, which leaves the others alone).

With HPC_MOE_TEST_DEVICE=cuda the tensors lie on GPUs, and the buffers have no low-latency mode: there, a process that
has lost a rank gets no other buffer of that kind (test_cuda_low_latency.py).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from mpi4py import MPI

from hpc_moe import Buffer
from hpc_moe.errors import Error

VICTIM = 1
TIMEOUT = 3.0  # of the buffers, seconds
WAIT = 30.0  # for the other ranks' files, seconds
TOKENS, HIDDEN, LOCAL_EXPERTS, MAX_TOKENS = 4, 128, 2, 8

comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
ON_CUDA = os.environ.get("HPC_MOE_TEST_DEVICE") == "cuda"
DEVICE = torch.device("cuda", rank % torch.cuda.device_count()) if ON_CUDA else torch.device("cpu")
EXPERTS = LOCAL_EXPERTS * size
Results = dict[str, Any]
LOW_LATENCY: Results = {"num_rdma_bytes": 2**23, "low_latency_mode": True}


def make_buffer(**changes: Any) -> Buffer:
    arguments: Results = {"num_nvl_bytes": 2**23 if ON_CUDA else 2**21, "device": str(DEVICE)}
    if not ON_CUDA:
        arguments |= LOW_LATENCY
    if "RANKS_PER_NODE" in os.environ:
        arguments["ranks_per_node"] = int(os.environ["RANKS_PER_NODE"])
    return Buffer(comm, **{**arguments, "timeout": TIMEOUT, **changes})


def rows() -> torch.Tensor:
    return (16 * rank + torch.arange(TOKENS, device=DEVICE)).to(torch.bfloat16)[:, None].repeat(1, HIDDEN)


def everywhere() -> torch.Tensor:
    """`[TOKENS, R]`: every token selects the first expert of every rank."""
    return (LOCAL_EXPERTS * torch.arange(size, device=DEVICE)).repeat(TOKENS, 1)


ONES = torch.ones(TOKENS, size, device=DEVICE)
survivors = [other for other in range(size) if other != VICTIM]


class Calls:
    """Each kind of call, ready to be made; what it needs beforehand is made with all ranks alive."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.recv_x, _, _, _, self.handle, _ = buffer.dispatch(rows(), topk_idx=everywhere(), num_experts=EXPERTS)
        if buffer.low_latency_mode:
            self.low_x, _, self.low_handle, _, _ = self._low_latency_dispatch()
        buffer.check()  # a GPU has sent all of it

    def dispatch(self) -> object:
        return self.buffer.dispatch(rows(), topk_idx=everywhere(), num_experts=EXPERTS)

    def cached_dispatch(self) -> object:
        return self.buffer.dispatch(rows(), handle=self.handle)

    def combine(self) -> object:
        return self.buffer.combine(self.recv_x, self.handle)

    def low_latency_dispatch(self) -> object:
        return self._low_latency_dispatch()

    def low_latency_combine(self) -> object:
        return self.buffer.low_latency_combine(self.low_x, everywhere(), ONES, self.low_handle)

    def recv_hook(self) -> object:
        return self._low_latency_dispatch(return_recv_hook=True)[4]()

    def clean_low_latency_buffer(self) -> object:
        self.buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, EXPERTS)
        return None

    def check(self) -> object:
        self.buffer.check()
        return None

    def _low_latency_dispatch(self, **flags: Any) -> Any:
        return self.buffer.low_latency_dispatch(rows(), everywhere(), MAX_TOKENS, EXPERTS, use_fp8=False, **flags)


def timed(call: Callable[[], object]) -> Results:
    """What a call raised, with the attributes of `PeerTimeoutError`, and how long it took."""
    start = time.monotonic()
    result: Results = {"error": "", "text": "", "peers": [], "operation": "", "rank": -1}
    try:
        call()
    except Error as error:
        result.update(error=type(error).__name__, text=str(error))
        for name in ("operation", "rank"):
            result[name] = getattr(error, name, result[name])
        result["peers"] = list(getattr(error, "peers", ()))
    result["seconds"] = time.monotonic() - start
    return result


def fail(how: str) -> None:
    """What the victim does in place of its call."""
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)  # whoever stops waiting first lets it go on
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


def write(results: Results, name: str = "") -> None:
    path = directory / f"{name or rank}.json"
    path.with_suffix(".part").write_text(json.dumps(results))
    path.with_suffix(".part").rename(path)


def wait_for(*names: object) -> None:
    deadline = time.monotonic() + WAIT
    while not all((directory / f"{name}.json").exists() for name in names):
        if time.monotonic() > deadline:
            sys.exit(f"rank {rank} waited for {names}")
        time.sleep(0.01)


def leave(results: Results, *others: int) -> NoReturn:
    """Write the results, wait for those of the other ranks, and end without MPI_Finalize."""
    write(results)
    wait_for(*others)
    os._exit(0)


def lost_in_calls(what: str) -> None:
    """The victim is lost while the others are in a call; `what` is `HOW:CALL[,CALL...]`, each with its own buffer."""
    how, _, names = what.partition(":")
    results: Results = {}
    kept = []
    for name in names.split(","):
        comm.Barrier()  # all are alive here; the buffer's short timeout is not for how late they are
        buffer = make_buffer()
        kept.append(buffer)
        calls = Calls(buffer)
        write({}, f"ready-{name}-{rank}")
        if rank == VICTIM:
            fail(how)
        else:
            wait_for(*(f"ready-{name}-{other}" for other in range(size)))
            results[name] = seen_by_a_survivor(buffer, calls, name)
            write({}, f"done-{name}-{rank}")
        wait_for(*(f"done-{name}-{other}" for other in survivors))
    leave(results, *survivors)


def seen_by_a_survivor(buffer: Buffer, calls: Calls, name: str) -> Results:
    def call() -> None:
        getattr(calls, name)()
        buffer.check()  # where the error of a call shows in which the CPU does not wait

    results: Results = {"call": timed(call)}
    others = ("dispatch", "combine" if ON_CUDA else "low_latency_dispatch", "check")
    results["later"] = {other: timed(getattr(calls, other)) for other in others}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        results["destroy"] = timed(buffer.destroy)
        results["again"] = timed(buffer.destroy)
    return results


def shrink(how: str) -> None:
    """With enable_shrink the others go on without the victim, which then comes back."""
    buffer = make_buffer(enable_shrink=True, **LOW_LATENCY)
    calls = Calls(buffer)

    def exchange() -> Results:
        """Dispatch and combine; how many rows came from each rank, the mask, and how often each token came back."""
        start = time.monotonic()
        low_x, count, handle, _, _ = buffer.low_latency_dispatch(
            rows(), everywhere(), MAX_TOKENS, EXPERTS, use_fp8=False
        )
        combined, _, _ = buffer.low_latency_combine(low_x, everywhere(), ONES, handle)
        mask = torch.full((size,), -1, dtype=torch.int32, device=DEVICE)
        buffer.low_latency_query_mask_buffer(mask)
        seen: Results = {
            "rows": [int(ranges) & 0xFFFFFFFF for ranges in handle.recv_layout_range[0]],
            "values": sorted({float(value) for value in low_x[0, : int(count[0]), 0]}),
            "times": [factor for factor in range(size + 1) if torch.equal(combined, factor * rows())],
            "mask": mask.tolist(),
        }
        return {"seconds": time.monotonic() - start, **seen}  # on a GPU the calls were only launched above

    results: Results = {"before": exchange()}
    write({"pid": os.getpid()}, f"ready-{rank}")
    wait_for(*(f"ready-{other}" for other in range(size)))
    if rank == VICTIM:
        fail(how)
        wait_for(*(f"without-{other}" for other in survivors))
    else:
        results["first"] = exchange()  # waits for the victim once
        results["second"] = exchange()  # not again
        results["normal"] = timed(calls.dispatch)
        write({}, f"without-{rank}")
        wait_for(*(f"without-{other}" for other in survivors))
        if how == "stopped" and rank == survivors[0]:
            os.kill(json.loads((directory / f"ready-{VICTIM}.json").read_text())["pid"], signal.SIGCONT)
        buffer.low_latency_update_mask_buffer(VICTIM, False)
    results["clean"] = timed(calls.clean_low_latency_buffer)
    results["after"] = exchange()
    results["destroy"] = timed(buffer.destroy)
    leave(results, *range(size))


def absent_in_construction(how: str) -> None:
    """The victim never constructs a buffer."""
    if rank == VICTIM:
        fail(how)
        leave({}, *survivors)
    leave({"construct": timed(make_buffer)}, *survivors)


def absent_in_destroy(how: str) -> None:
    """The victim never destroys its buffer."""
    buffer = make_buffer()
    Calls(buffer)
    if rank == VICTIM:
        fail(how)
        leave({}, *survivors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = {"destroy": timed(buffer.destroy), "again": timed(buffer.destroy)}
    leave({**results, "warnings": [str(one.message) for one in caught]}, *survivors)


def dropped(how: str) -> None:
    """A buffer that goes out of scope, with and without `destroy` before; then another one on the same ranks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        buffer = make_buffer(timeout=WAIT)
        Calls(buffer)
        buffer.destroy()
        del buffer
        gc.collect()
        results: Results = {"destroyed": [str(one.message) for one in caught]}
        buffer = make_buffer(timeout=WAIT)
        buffer.dispatch(rows(), topk_idx=everywhere(), num_experts=EXPERTS)
        start = time.monotonic()
        del buffer
        gc.collect()
        results["dropped"] = [str(one.message) for one in caught]
        results["seconds"] = time.monotonic() - start
    with make_buffer(timeout=WAIT) as buffer:
        recv_x, _, _, _, handle, _ = buffer.dispatch(rows(), topk_idx=everywhere(), num_experts=EXPERTS)
        results["works"] = bool(torch.equal(buffer.combine(recv_x, handle)[0], size * rows()))
    write(results)


if __name__ == "__main__":
    if ON_CUDA:
        torch.cuda.set_device(DEVICE)
        torch.zeros(1, device=DEVICE)
    comm.Barrier()  # starting up takes each rank as long as it takes
    scenario, directory = sys.argv[1], Path(sys.argv[2])
    globals()[scenario](sys.argv[3] if len(sys.argv) > 3 else "silent")
