"""What the benchmarks share: timing over ranks, peak memory, and results as JSON with the machine and versions."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import hpc_moe


def machine(gpu: bool = False) -> dict[str, Any]:
    """The machine and the versions that a result was measured with; with `gpu`, of its GPUs too."""
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
        **(_gpu_facts() if gpu else {}),
    }


@functools.cache
def _gpu_facts() -> dict[str, Any]:
    current = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": current.name,
        "gpu_count": torch.cuda.device_count(),
        "gpu_memory_gib": round(current.total_memory / 2**30, 1),
        "gpu_sms": current.multi_processor_count,
        "compute_capability": f"{current.major}.{current.minor}",
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _driver_version() -> str:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "unknown"
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    return lines[0].strip() if lines else "unknown"


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


def summary(seconds: list[float], unit: str = "ms") -> dict[str, float]:
    """Median and spread, in milliseconds (`"ms"`) or microseconds (`"us"`)."""
    values = sorted({"ms": 1e3, "us": 1e6}[unit] * s for s in seconds)
    return {
        f"median_{unit}": statistics.median(values),
        f"p10_{unit}": values[len(values) // 10],
        f"p90_{unit}": values[len(values) * 9 // 10],
    }


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


def write_results(path: Path, results: dict[str, Any], gpu: bool = False) -> None:
    """Write results, with the machine (and its GPUs), as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(gpu), **results}, indent=2) + "\n")
