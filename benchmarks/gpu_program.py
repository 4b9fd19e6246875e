"""What the GPU benchmarks share as programs: options, the rank's GPU, parts, the report, the table, the exit status.

How they measure is in gpu_measure.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import write_results
from gpu_measure import Bench
from mpi4py import MPI

LABEL_WIDTH = 62


class Column(NamedTuple):
    """A column of the table: its heading, what of a record, in which format, times what, how wide."""

    heading: str
    key: str
    form: str
    scale: float
    width: int


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the options that all of them have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--launch-ahead", type=float, default=1000.0, help="microseconds that the CPU gets to enqueue a call"
    )
    return parser


def run(measure_all: Callable[[MPI.Intracomm, argparse.Namespace], int], options: argparse.Namespace) -> None:
    """Measure, and exit with what it returns; a rank that fails outside the parts ends all ranks."""
    comm = MPI.COMM_WORLD
    try:
        status = measure_all(comm, options)
    except BaseException:
        print(f"rank {comm.rank}:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)
        raise
    sys.exit(status)


def choose_device(comm: MPI.Intracomm) -> torch.device:
    """The GPU of this rank; made the current one."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, num_local = node.rank, node.size
    node.Free()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_local != comm.size:
        raise RuntimeError("the GPU benchmark works on one node")
    if count == 1 or os.environ.get("HPC_MOE_TEST_SHARE_GPUS") == "1":
        local_rank %= max(1, count)
    if local_rank >= count:
        raise RuntimeError(
            f"rank {comm.rank} finds {count} GPUs, and needs one of its own for each of {num_local} ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def run_parts(
    bench: Bench, options: argparse.Namespace, parts: Mapping[str, Callable[[Bench], None]], benchmark: str
) -> None:
    """Run them in their order, and write what there is after each."""
    parts_run: list[str] = []
    for name, part in parts.items():
        report(bench, options, parts_run, benchmark)
        with bench.running(name):
            part(bench)
        torch.cuda.empty_cache()
        parts_run.append(name)
    report(bench, options, parts_run, benchmark)


def report(bench: Bench, options: argparse.Namespace, parts_run: list[str], benchmark: str) -> None:
    """Write what there is so far."""
    if bench.comm.rank != 0 or not options.out:
        return
    prefixes = ("HPC_MOE_", "NCCL_", "NVSHMEM_", "PYTORCH_", "CUDA_VISIBLE_DEVICES")
    results = {
        "benchmark": benchmark,
        "ranks": bench.comm.size,
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "shape": asdict(bench.main.shape),  # where a record has no other
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)},
        "parts_run": parts_run,
        "failed": bench.failed,
        "push_ceiling_gb_per_s": {str(size): rate / 1e9 for size, rate in bench.ceilings.items()},
        "results": bench.results,
    }
    write_results(options.out, results, gpu=True)


def show(bench: Bench, legend: str, columns: Sequence[Column]) -> None:
    """Print a table, on the first rank."""
    if bench.comm.rank != 0:
        return
    print(f"{bench.comm.size} ranks on {torch.cuda.get_device_name()}; {legend}")
    print(" " * LABEL_WIDTH + "".join(column.heading.rjust(column.width) for column in columns))
    for record in bench.results:
        print(line_of(record, columns))


def line_of(record: dict[str, Any], columns: Sequence[Column]) -> str:
    """A record's line of the table."""
    label = f"{record['part']}: {record['name']}".ljust(LABEL_WIDTH)
    if "error" in record:
        return f"{label} FAILED: {record['error']}"
    if "skipped" in record:
        return f"{label} skipped: {record['skipped']}"
    cells = (
        (f"{record[column.key] * column.scale:{column.form}}" if column.key in record else "").rjust(column.width)
        for column in columns
    )
    return label + "".join(cells) + "".join(f"  {note}" for note in notes(record))


def notes(record: dict[str, Any]) -> list[str]:
    """What there is to say of a record beyond the table's columns."""
    said = ["ok"] if "ok" in record else []
    for key in ("wait_us", "call_alone_us", "matmul_alone_us", "matmul_us"):
        said += [f"{key} {record[key]:.1f}"] if key in record else []
    said += [f"{record['hidden_share']:.0%} of the shorter hidden"] if "hidden_share" in record else []
    said += [f"pool {record['pool']}"] if "pool" in record else []
    said += [f"sent at {record['rate'] or 'any'} GB/s"] if "rate" in record else []
    if record.get("routing", "balanced") != "balanced" and "share_of_busiest_gpu" in record:
        said.append(f"of the busiest GPU {record['share_of_busiest_gpu']:.1%}")
    waits = "uncached" in record["name"] or not record.get("launch_ahead", True)
    if record.get("late_launches") and not waits:
        said.append(f"{record['late_launches']} late launches")
    return said


def must_equal(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raises where they differ."""
    if got.shape != want.shape:
        raise RuntimeError(f"{name}: shape {list(got.shape)}, not {list(want.shape)}")
    if not torch.equal(got, want):
        where = (got != want).nonzero()
        raise RuntimeError(f"{name}: {len(where)} of {got.numel()} elements differ, the first at {where[0].tolist()}")
