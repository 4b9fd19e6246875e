"""The GPU benchmark's own kernels (gpu_kernels.cu), compiled when first used, and the windows that they write.

`python benchmarks/gpu_kernels.py` compiles them for this machine's GPU, or for those named (`90 100`), and prints where
they are. Nothing here goes through the library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).with_suffix(".cu")
CACHE = ROOT / "build" / "benchmarks"

# What a block of the push kernel may use of shared memory, and for what besides rows; and the most warps it needs.
SHARED_BYTES = 216 * 1024
BARRIER_BYTES = 1024
MAX_WARPS = 12

MAX_RANKS = 8
IPC_HANDLE_BYTES = 64


class KernelError(RuntimeError):
    """A function of gpu_kernels.cu failed, or could not be compiled; the message says why."""


def compile_kernels(arch: str) -> Path:
    """The compiled kernels for this architecture (`"90"`); not compiled again unless the source or nvcc changed."""
    sys.path.append(str(ROOT / "tools"))
    from cuda_build import find_nvcc

    nvcc = find_nvcc(os.environ)
    command = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{arch}", "-shared", "-cudart=static", "-Xcompiler=-fPIC"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + version + " ".join(command).encode()).hexdigest()[:12]
    library = CACHE / f"gpu_kernels_sm{arch}_{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}.so")
        done = subprocess.run([*command, "-o", str(unfinished), str(SOURCE)], capture_output=True, text=True)
        if done.returncode != 0:
            raise KernelError(f"{' '.join(done.args)} failed:\n{done.stdout}{done.stderr}")
        unfinished.replace(library)
    return library


def load_kernels(library: Path) -> ctypes.CDLL:
    """The library's functions, with the types of their arguments."""
    kernels = ctypes.CDLL(str(library))
    pointer, integer, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
    windows = ctypes.POINTER(pointer)
    kernels.error_text.restype = ctypes.c_char_p
    kernels.header_bytes.restype = ctypes.c_size_t
    for name, argtypes in {
        "use_device": [integer],
        "allocate_window": [ctypes.c_size_t, windows],
        "free_window": [pointer],
        "export_window": [pointer, pointer],
        "import_window": [pointer, windows],
        "close_window": [pointer],
        "read_num_timeouts": [pointer, ctypes.POINTER(ctypes.c_uint32)],
        "launch_align": [windows, integer, integer, wide, wide, wide, pointer],
        "launch_push": [windows, integer, integer, ctypes.c_size_t, pointer]
        + [ctypes.c_int64, ctypes.c_int64, integer, integer, integer, integer, pointer],
    }.items():
        getattr(kernels, name).argtypes = argtypes
    return kernels


def warps_per_sm(row_bytes: int) -> int:
    """Warps of a block of the push kernel: each holds two rows in shared memory."""
    return min(MAX_WARPS, (SHARED_BYTES - BARRIER_BYTES) // (2 * row_bytes))


class _Memory:
    """Memory that torch may view (the CUDA array interface); the window that it is of must outlive the view."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


class Windows:
    """A window of every rank of a node, open on all of them; the ranks' streams are aligned through it. Collective.

    Attributes:
        region_bytes: bytes that each rank may send to each other rank.
    """

    def __init__(self, comm: MPI.Intracomm, device: int, region_bytes: int) -> None:
        """Allocate a window on this GPU and open the others'; waits for a peer are limited to 10 s."""
        if comm.size > MAX_RANKS:
            raise KernelError(f"gpu_kernels.cu works for up to {MAX_RANKS} ranks; got {comm.size}")
        self._comm, self._device = comm, device
        major, minor = torch.cuda.get_device_capability(device)
        library = compile_kernels(f"{major}{minor}") if comm.rank == 0 else None
        self._kernels = load_kernels(comm.bcast(library))
        self.region_bytes = -(-region_bytes // 256) * 256
        self._epoch = 0
        self._call("use_device", device)
        self._own = ctypes.c_void_p()
        self._call("allocate_window", comm.size * self.region_bytes, ctypes.byref(self._own))
        torch.cuda.synchronize(device)  # the window is clear before anyone can write it
        handle = np.zeros(IPC_HANDLE_BYTES, np.uint8)
        self._call("export_window", self._own, handle.ctypes.data)
        handles = np.empty((comm.size, IPC_HANDLE_BYTES), np.uint8)
        comm.Allgather(handle, handles)
        self._all = (ctypes.c_void_p * comm.size)()
        for rank in range(comm.size):
            opened = ctypes.c_void_p(self._own.value)
            if rank != comm.rank:
                self._call("import_window", handles[rank].ctypes.data, ctypes.byref(opened))
            self._all[rank] = opened.value
        comm.Barrier()

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._kernels, name)(*arguments)
        if error != 0:
            text = self._kernels.error_text(error).decode()
            raise KernelError(f"{name} of gpu_kernels.cu, rank {self._comm.rank}, GPU {self._device}: {text}")

    def align(self, delay_us: float = 0.0, limit_s: float = 10.0) -> None:
        """Hold the current stream for `delay_us`, then until all ranks' streams are here."""
        self._epoch += 1
        stream = torch.cuda.current_stream(self._device).cuda_stream
        delay, limit = int(1e3 * delay_us), int(1e9 * limit_s)
        self._call("launch_align", self._all, self._comm.rank, self._comm.size, self._epoch, delay, limit, stream)

    def push(self, source: torch.Tensor, first_row: int, rows_per_peer: int, num_sms: int) -> None:
        """Send rows of `source [rows, bytes] uint8`, from `first_row` on and around its end, to every other rank."""
        num_rows, row_bytes = source.shape
        if rows_per_peer * row_bytes > self.region_bytes:
            raise KernelError(f"{rows_per_peer} rows of {row_bytes} bytes exceed a region of {self.region_bytes} bytes")
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._call(
            "launch_push",
            *(self._all, self._comm.rank, self._comm.size, self.region_bytes),
            *(source.data_ptr(), num_rows, first_row, rows_per_peer, row_bytes),
            *(num_sms, warps_per_sm(row_bytes), stream),
        )

    def received(self, source_rank: int, num_rows: int, row_bytes: int) -> torch.Tensor:
        """A view, `[num_rows, row_bytes] uint8`, of what `source_rank` has sent here."""
        begin = int(self._own.value or 0) + self._kernels.header_bytes() + source_rank * self.region_bytes
        memory = _Memory(begin, num_rows * row_bytes)
        return torch.as_tensor(memory, device=f"cuda:{self._device}").view(num_rows, row_bytes)

    def catch_up(self) -> int:
        """After a failure: agree on an epoch again. Returns how many waits of all ranks ran into their limit so far."""
        torch.cuda.synchronize(self._device)
        count = ctypes.c_uint32()
        self._call("read_num_timeouts", self._own, ctypes.byref(count))
        self._epoch = self._comm.allreduce(self._epoch, op=MPI.MAX)
        return int(self._comm.allreduce(count.value))

    def close(self) -> None:
        """Close the others' windows, then free the own one. Collective."""
        torch.cuda.synchronize(self._device)
        for rank in range(self._comm.size):
            if rank != self._comm.rank:
                self._call("close_window", self._all[rank])
        self._comm.Barrier()
        self._call("free_window", self._own)


def sent_row(rank: int, peer: int, num_ranks: int, rows_per_peer: int) -> torch.Tensor:
    """Which of its rows `rank` sends to `peer`, `[rows_per_peer] int64`: the inverse of peer_of in gpu_kernels.cu."""
    num_peers = num_ranks - 1
    turn = torch.arange(rows_per_peer)
    shift = ((turn * 2654435761 & 0xFFFFFFFF) >> 16) % num_peers
    place = (peer - rank - 1) % num_ranks
    return turn * num_peers + (place - shift) % num_peers


def main() -> None:
    """Compile."""
    archs = sys.argv[1:] or ["{}{}".format(*torch.cuda.get_device_capability())]
    for arch in archs:
        print(compile_kernels(arch))


if __name__ == "__main__":
    main()
