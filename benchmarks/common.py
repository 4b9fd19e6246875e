"""What the benchmarks share: timing over ranks, peak memory, and results as JSON with the machine and versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import hpc_moe


def machine() -> dict[str, Any]:
    """The machine and the versions that a result was measured with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mpi": MPI.Get_library_version().split(",")[0].strip("\0 \n"),
        "hpc_moe": hpc_moe.__version__,
    }


def time_calls(comm: MPI.Intracomm, call: Callable[[], Any], iterations: int, warmup: int = 5) -> list[float]:
    """Seconds of each call on the slowest rank, from a barrier to the end of the call."""
    seconds = []
    for iteration in range(warmup + iterations):
        comm.Barrier()
        begin = time.perf_counter()
        call()
        elapsed = time.perf_counter() - begin
        if iteration >= warmup:
            seconds.append(elapsed)
    slowest = np.empty(iterations)
    comm.Allreduce(np.array(seconds), slowest, op=MPI.MAX)
    return [float(s) for s in slowest]


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and spread, in milliseconds."""
    ms = sorted(1e3 * s for s in seconds)
    return {"median_ms": statistics.median(ms), "p10_ms": ms[len(ms) // 10], "p90_ms": ms[len(ms) * 9 // 10]}


def reset_peak_memory() -> dict[str, int]:
    """Make the kernel forget the process's peak; returns the bytes now, in the form of `peak_memory`."""
    Path("/proc/self/clear_refs").write_text("5")
    return {"resident": _status("VmRSS"), "shared": _status("RssShmem")}


def peak_memory() -> dict[str, int]:
    """Bytes: largest resident size since the last reset, and shared memory mapped now."""
    return {"resident": _status("VmHWM"), "shared": _status("RssShmem")}


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results, with the machine, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
