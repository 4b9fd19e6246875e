"""How the GPU benchmark measures: inputs and what they send over the links, stream time over ranks, records, failures.

Stream time: before each call a barrier kernel holds the current stream of every rank until all are there, and a while
longer, so that the CPU has enqueued the call before the GPU begins it; then an event, the call, an event. The slowest
rank counts, call by call. Inputs rotate over so much memory that nothing is found in L2.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from common import summary
from gpu_kernels import Windows, warps_per_sm
from mpi4py import MPI

import hpc_moe
from hpc_moe.testing import make_topk_idx, make_topk_weights

Call = Callable[[int], Any]  # takes the number of the iteration, so as to choose among inputs; returns the results

# The inputs of a case take at least this much memory (several times L2, 50 MB on H100 and H200) and are this many.
ROTATED_BYTES = 256 * 2**20
MIN_COPIES = 4

PEER_TIMEOUT = 20.0  # seconds, of the library's waits


@dataclass(frozen=True)
class Shape:
    """What a rank dispatches.

    Attributes:
        tokens: T.
        hidden: H.
        routing: a kind of `hpc_moe.testing.make_topk_idx`.
        top_k: K.
        experts: E.
    """

    tokens: int = 4096
    hidden: int = 7168
    routing: str = "balanced"
    top_k: int = 8
    experts: int = 256

    def row_bytes(self, fp8: bool) -> int:
        """Bytes of a token, without scales."""
        return self.hidden if fp8 else 2 * self.hidden

    def scale_bytes(self, fp8: bool) -> int:
        """Bytes of a token's scales."""
        return 4 * (self.hidden // 128) if fp8 else 0


class Inputs:
    """A rank's tokens and routing.

    Attributes:
        shape: T, H, K, E and the kind of routing.
        topk_idx: `[T, K] int64`.
        topk_weights: `[T, K] float32`.
        rows: `[R, R]`; rows[i, r] tokens go from rank i to rank r.
        num_recv: N_recv of this rank.
    """

    def __init__(self, comm: MPI.Intracomm, device: torch.device, shape: Shape) -> None:
        """Draw a routing. Collective."""
        self.shape, self.device, self.num_ranks = shape, device, comm.size
        generator = torch.Generator().manual_seed(comm.rank)
        topk_idx = make_topk_idx(shape.routing, shape.tokens, shape.top_k, shape.experts, comm.size, generator)
        self.topk_idx = topk_idx.to(device)
        self.topk_weights = make_topk_weights(topk_idx, generator).to(device)
        owners = topk_idx // (shape.experts // comm.size)
        counts = [int((owners == rank).any(dim=1).sum()) for rank in range(comm.size)]
        self.rows = np.array(comm.allgather(counts))
        self.num_recv = int(self.rows[:, comm.rank].sum())

    @property
    def mean_rows_leaving(self) -> float:
        """Rows that a rank sends to others, over all ranks."""
        return float(self.rows.sum() - np.trace(self.rows)) / self.num_ranks

    @property
    def busiest_rows(self) -> int:
        """The most rows that leave or reach one rank, its own not counted."""
        between = self.rows - np.diag(np.diag(self.rows))
        return int(max(between.sum(axis=0).max(), between.sum(axis=1).max()))

    def rotated(self, num_rows: int, row_bytes: int) -> int:
        """How many tensors of this size to rotate over."""
        return max(MIN_COPIES, -(-ROTATED_BYTES // max(1, num_rows * row_bytes)))

    @cached_property
    def bf16(self) -> list[torch.Tensor]:
        """Tokens to dispatch, `[T, H] bf16` each."""
        return self.random_rows(self.shape.tokens)

    @cached_property
    def fp8(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens to dispatch with their scales: `[T, H] e4m3` and, row-major, `[T, H/128] float32` each."""
        shape = self.shape
        copies = self.rotated(shape.tokens, shape.row_bytes(fp8=True))
        size = [shape.tokens, shape.hidden]
        values = (torch.randint(0, 127, size, dtype=torch.uint8, device=self.device) for _ in range(copies))
        scales = (torch.rand(shape.tokens, shape.hidden // 128, device=self.device) for _ in range(copies))
        return [(value.view(torch.float8_e4m3fn), scale) for value, scale in zip(values, scales, strict=True)]

    def random_rows(self, num_rows: int) -> list[torch.Tensor]:
        """Tensors to rotate over, `[num_rows, H] bf16` each."""
        copies, hidden = self.rotated(num_rows, 2 * self.shape.hidden), self.shape.hidden
        return [torch.randn(num_rows, hidden, dtype=torch.bfloat16, device=self.device) for _ in range(copies)]


class PartFailed(Exception):
    """Some rank failed, which is recorded; all ranks leave the part."""


class Bench:
    """Times calls over the ranks, and keeps what was found, failures too.

    Attributes:
        comm: all ranks.
        device: this rank's GPU.
        options: of the command line.
        results: a record per measurement; equal on all ranks.
        ceilings: bytes per second that leave a GPU at the best SM count, by bytes of a row.
        failed: whether any measurement failed.
    """

    def __init__(self, comm: MPI.Intracomm, device: torch.device, options: argparse.Namespace) -> None:
        """Make the windows of the benchmark's own kernels. Collective."""
        self.comm, self.device, self.options = comm, device, options
        self.results: list[dict[str, Any]] = []
        self.ceilings: dict[int, float] = {}
        self.failed = False
        self.part = ""
        self._num_timeouts = 0
        shape = Shape(tokens=options.tokens)
        self.main = Inputs(comm, device, shape)
        self.rows_per_peer = round(self.main.mean_rows_leaving / (comm.size - 1))
        self.windows = Windows(comm, device.index or 0, self.rows_per_peer * shape.row_bytes(fp8=False))

    def buffer(self, hidden: int = Shape.hidden, size_hints: float = 1.0) -> hpc_moe.Buffer:
        """A buffer of the size hint, times a factor. Collective."""
        hint = hpc_moe.Config().get_nvl_buffer_size_hint(2 * hidden, self.comm.size)
        return hpc_moe.Buffer(self.comm, int(hint * size_hints), device=str(self.device), timeout=PEER_TIMEOUT)

    # --- failures ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Run a part: if any rank fails, all of them leave it, and the failure is recorded."""
        self.part = part
        self.comm.Barrier()  # ranks that left a failed part did not do so at the same time
        try:
            yield
        except PartFailed:
            return
        except Exception as error:
            with contextlib.suppress(PartFailed):
                self._agree("(preparing)", error)
            return
        with contextlib.suppress(PartFailed):
            self._agree("(preparing)", None)

    def _agree(self, name: str, error: Exception | None) -> None:
        """Every rank comes here once for each measurement, and at the end of a part unless it has left it before."""
        text = None
        if error is not None:
            text = f"{type(error).__name__}: {error}"
            print(f"rank {self.comm.rank}, {self.part}, {name}:", file=sys.stderr)
            traceback.print_exception(error, file=sys.stderr)
        errors = {f"rank {rank}": text for rank, text in enumerate(self.comm.allgather(text)) if text}
        num_timeouts = self.windows.catch_up()
        if num_timeouts > self._num_timeouts:
            errors["barrier kernel"] = f"{num_timeouts - self._num_timeouts} waits for a rank ran into their limit"
            self._num_timeouts = num_timeouts
        if errors:
            self.failed = True
            self.results.append({"part": self.part, "name": name, "error": errors})
            raise PartFailed

    def measure(self, name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Keep what a measurement returns, or how it failed. Collective.

        Raises:
            PartFailed: it failed on some rank.
        """
        record, error = {}, None
        try:
            record = action()
        except Exception as caught:
            error = caught
        self._agree(name, error)
        record = {"part": self.part, "name": name, **record}
        self.results.append(record)
        return record

    # --- time --------------------------------------------------------------------------------------------------------

    def time(
        self, call: Call, launch_ahead: bool = True, after_warmup: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Stream time of a call in microseconds: median, p10, p90 over iterations of the slowest rank. Collective.

        Also `host_us`, the median time that the call took of the CPU, and `late_launches`, in how many iterations the
        GPU got to the call before some rank's CPU had enqueued all of it.

        Args:
            call: run once per iteration; what it returns is dropped before the next one.
            launch_ahead: hold the streams until the CPU has (most likely) enqueued the call.
            after_warmup: run once before the iterations that count.
        """
        delay = self.options.launch_ahead if launch_ahead else 0.0
        for iteration in range(self.options.warmup):
            self._time_once(call, iteration, delay)
        after_warmup()
        timed = [
            self._time_once(call, self.options.warmup + iteration, delay)
            for iteration in range(self.options.iterations)
        ]
        slowest = np.empty((len(timed), 3))
        self.comm.Allreduce(np.array(timed), slowest, op=MPI.MAX)
        on_stream, on_host, late = slowest.T
        return {
            **summary([float(seconds) for seconds in on_stream], "us"),
            "host_us": summary([float(seconds) for seconds in on_host], "us")["median_us"],
            "late_launches": int(late.sum()),
        }

    def _time_once(self, call: Call, iteration: int, delay: float) -> tuple[float, float, float]:
        """Seconds on the stream, seconds on the CPU, and whether the CPU was late."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self.windows.align(delay)
        start.record()
        begin = time.perf_counter()
        results = call(iteration)
        host_seconds = time.perf_counter() - begin
        end.record()
        was_late = start.query()
        torch.cuda.synchronize()
        del results
        return 1e-3 * start.elapsed_time(end), host_seconds, float(was_late)

    def time_library(
        self,
        name: str,
        buffer: hpc_moe.Buffer,
        call: Call,
        inputs: Inputs,
        *,
        operation: str = "dispatch",
        fp8: bool = False,
        num_sms: int = 24,
        launch_ahead: bool = True,
        **facts: Any,
    ) -> dict[str, Any]:
        """Time a call of the library; record it with what it sends, its share of the ceiling, passes, pool. Collective.

        Args:
            name: of the record.
            buffer: that the call is of.
            call: see `time`.
            inputs: whose rows travel.
            operation: whose statistics to read.
            fp8: whether the rows are fp8 with scales.
            num_sms: as the call was configured.
            launch_ahead: see `time`.
            facts: more to record.
        """

        def action() -> dict[str, Any]:
            before: dict[str, Any] = {}
            times = self.time(call, launch_ahead, lambda: before.update(buffer.stats()[operation]))
            after = buffer.stats()[operation]
            calls = after["calls"] - before["calls"]
            most_passes = self.comm.allreduce(after["passes"] - before["passes"], op=MPI.MAX)
            waited = self.comm.allreduce(after["wait_seconds"] - before["wait_seconds"], op=MPI.MAX)
            record = {
                **asdict(inputs.shape),
                "dtype": "fp8" if fp8 else "bf16",
                "num_sms": num_sms,
                "num_nvl_bytes": buffer.num_nvl_bytes,
                "passes": most_passes / calls,
                "launch_ahead": launch_ahead,
                **times,
                **self.shares(inputs, fp8, times["median_us"]),
                **facts,
            }
            if operation == "dispatch":
                pooled = self.comm.allreduce(after["pooled"] - before["pooled"], op=MPI.MIN)
                record["pooled"] = pooled / calls  # share of the calls, of the rank with the least
            if not launch_ahead:
                record["wait_us"] = 1e6 * waited / calls  # of the CPU, a call
            return record

        return self.measure(name, action)

    def shares(self, inputs: Inputs, fp8: bool, median_us: float) -> dict[str, Any]:
        """What leaves a GPU, how fast, and what share of the push ceiling that is.

        Bytes and GB/s are of rows that go to other ranks, without scales. The share is the time that the same traffic
        takes at the ceiling over the time that it took: with scales, which must travel too, and of the rows alone. The
        busiest GPU's share is of the most that leaves or reaches one GPU, scales included.
        """
        row, scales = inputs.shape.row_bytes(fp8), inputs.shape.scale_bytes(fp8)
        leaving = inputs.mean_rows_leaving * row
        seconds = 1e-6 * median_us
        facts: dict[str, Any] = {"bytes_leaving": round(leaving), "gb_per_s": leaving / seconds / 1e9}
        ceiling = self.ceilings.get(Shape().row_bytes(fp8))
        if ceiling:
            facts["share_of_ceiling"] = inputs.mean_rows_leaving * (row + scales) / ceiling / seconds
            facts["share_rows_only"] = leaving / ceiling / seconds
            facts["share_of_busiest_gpu"] = inputs.busiest_rows * (row + scales) / ceiling / seconds
        return facts

    # --- the push ceiling --------------------------------------------------------------------------------------------

    def measure_ceiling(self, row_bytes: int, sm_counts: list[int]) -> None:
        """Push as many rows to every peer as the main figures' dispatch does on average, at each SM count."""
        num_rows = -(-ROTATED_BYTES // row_bytes)
        source = torch.randint(0, 255, (num_rows, row_bytes), dtype=torch.uint8, device=self.device)
        rows_leaving = self.rows_per_peer * (self.comm.size - 1)
        available = torch.cuda.get_device_properties(self.device).multi_processor_count
        for num_sms in sm_counts:
            if num_sms > available:
                continue

            def push(iteration: int, num_sms: int = num_sms) -> None:
                self.windows.push(source, iteration * rows_leaving % num_rows, self.rows_per_peer, num_sms)

            def action(push: Call = push, num_sms: int = num_sms) -> dict[str, Any]:
                times = self.time(push)
                return {
                    "row_bytes": row_bytes,
                    "rows_per_peer": self.rows_per_peer,
                    "num_sms": num_sms,
                    "warps_per_sm": warps_per_sm(row_bytes),
                    **times,
                    "gb_per_s": 1e-3 * rows_leaving * row_bytes / times["median_us"],
                }

            record = self.measure(f"push, rows of {row_bytes} bytes", action)
            self.ceilings[row_bytes] = max(self.ceilings.get(row_bytes, 0.0), 1e9 * record["gb_per_s"])
