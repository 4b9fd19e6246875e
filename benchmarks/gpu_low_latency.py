"""Stream time of low-latency calls on the GPUs of one node, and what they take of the CPU.

    mpirun -n 4 python benchmarks/gpu_low_latency.py --out benchmarks/results/gpu_low_latency_4_ranks.json
    mpirun -n 4 python benchmarks/gpu_low_latency.py --quick             # the main figures only
    mpirun -n 4 python benchmarks/gpu_low_latency.py --part tokens       # these parts

One rank a GPU; gpu_measure.py says how time is taken. A graph has GRAPH_CALLS calls (or pairs of them) and its time is
divided by their number, or it has a single one; the time of a loop is divided in the same way. The rows that experts
return rotate over MIN_COPIES tensors: those of a few tokens are found in L2, as they would be behind the experts. Every
run begins with a check of what the calls return.
What fails is recorded, the other parts go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from common import summary
from gpu_measure import MIN_COPIES, PEER_TIMEOUT, Bench, Inputs, Shape
from gpu_program import Column, choose_device, make_parser, must_equal, run, run_parts, show
from mpi4py import MPI

import hpc_moe
from hpc_moe import _C
from hpc_moe.fp8 import cast_to_fp8, dequantize

GRAPH_CALLS, LOOP_CALLS = 20, 50
HOST_CALLS, HOST_CALLS_AT_ONCE = 200, 10
TIMES = {"median_us", "p10_us", "p90_us", "host_us"}  # what is divided by a number of calls
TAGGED_BYTES = "HPC_MOE_TEST_TAGGED_BYTES"  # up to how many bytes that a rank sends its rows are tagged
PLAIN, TAGGED = 0, 2**40  # for it: never; wherever there is room

Call = Callable[[int], Any]


@dataclass(frozen=True)
class Case:
    """What a rank dispatches and combines.

    Attributes:
        tokens: T.
        hidden: H.
        num_max: M; 0: T.
        weighted: whether weights are given at dispatch, so that each rank sends one row back for a token; else there is
            one for each expert.
        fp8: whether a dispatch casts.
        use_logfmt: of combine.
        most_tagged_bytes: see TAGGED_BYTES; -1: as the library does.
    """

    tokens: int = 128
    hidden: int = 7168
    num_max: int = 0
    weighted: bool = True
    fp8: bool = True
    use_logfmt: bool = False
    most_tagged_bytes: int = -1

    @property
    def shape(self) -> Shape:
        """Without what only low-latency calls know."""
        return Shape(tokens=self.tokens, hidden=self.hidden)


MAIN = Case()


class Calls:
    """Low-latency calls of a case on inputs that rotate, with a buffer for them.

    Attributes:
        inputs: routing and tokens.
        num_max: M.
        num_bytes: of the buffer.
    """

    def __init__(self, bench: Bench, case: Case) -> None:
        """Draw inputs, and make a buffer. Collective."""
        self.bench, self.case = bench, case
        self.inputs = Inputs(bench.comm, bench.device, case.shape)
        self.num_max = case.num_max or case.tokens
        self.num_bytes: int = hpc_moe.Buffer.get_low_latency_rdma_size_hint(
            self.num_max, case.hidden, bench.comm.size, case.shape.experts
        )
        # Read when a buffer is made.
        variables = {} if case.most_tagged_bytes < 0 else {TAGGED_BYTES: str(case.most_tagged_bytes)}
        with mock.patch.dict(os.environ, variables):
            self.buffer = hpc_moe.Buffer(
                bench.comm,
                num_rdma_bytes=self.num_bytes,
                low_latency_mode=True,
                device=str(bench.device),
                timeout=PEER_TIMEOUT,
            )

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error: Any) -> None:
        self.buffer.__exit__(*error)

    def dispatch(self, iteration: int, return_recv_hook: bool = False) -> Any:
        """`recv_x, recv_count, handle, event, hook`."""
        inputs = self.inputs
        return self.buffer.low_latency_dispatch(
            inputs.bf16[iteration % len(inputs.bf16)],
            inputs.topk_idx,
            self.num_max,
            inputs.shape.experts,
            use_fp8=self.case.fp8,
            return_recv_hook=return_recv_hook,
            topk_weights=inputs.topk_weights if self.case.weighted else None,
        )

    @cached_property
    def results(self) -> list[torch.Tensor]:
        """What experts made of the rows, `[L, M*R, H] bf16` each; the same whichever tokens were dispatched."""
        num_ranks, case = self.bench.comm.size, self.case
        size = (case.shape.experts // num_ranks, self.num_max * num_ranks, case.hidden)
        return [torch.randn(size, dtype=torch.bfloat16, device=self.bench.device) for _ in range(MIN_COPIES)]

    def combine(self, iteration: int, handle: Any) -> Any:
        """`combined_x, event, hook`."""
        return self.combine_rows(self.results[iteration % MIN_COPIES], handle)

    def combine_rows(self, y: torch.Tensor, handle: Any) -> Any:
        """The same of these rows."""
        inputs = self.inputs
        return self.buffer.low_latency_combine(
            y, inputs.topk_idx, inputs.topk_weights, handle, use_logfmt=self.case.use_logfmt
        )

    def both(self, iteration: int) -> Any:
        """Both, back to back."""
        received = self.dispatch(iteration)
        return received, self.combine(iteration, received[2])

    @cached_property
    def rows_leaving(self) -> tuple[float, float]:
        """Rows that a rank sends to others, mean over ranks: one for each rank of a token, one for each expert."""
        comm, inputs = self.bench.comm, self.inputs
        owners = inputs.topk_idx // (inputs.shape.experts // comm.size)
        elsewhere = comm.allreduce(int((owners != comm.rank).sum()))
        return inputs.mean_rows_leaving, elsewhere / comm.size

    def bytes_leaving(self, operation: str, weighted: bool | None = None) -> int:
        """What a rank sends to others, mean over ranks: rows, and the scales of fp8 ones.

        Args:
            operation: "dispatch", "combine", or both with a plus.
            weighted: None: as the case is. (In a dispatch it changes nothing: a token goes once to a rank.)
        """
        shape, (per_rank, per_expert) = self.inputs.shape, self.rows_leaving
        one_a_rank = self.case.weighted if weighted is None else weighted
        there = per_rank * (shape.row_bytes(self.case.fp8) + shape.scale_bytes(self.case.fp8))
        back = (per_rank if one_a_rank else per_expert) * shape.row_bytes(fp8=False)
        return round((there if "dispatch" in operation else 0) + (back if "combine" in operation else 0))

    def facts(self) -> dict[str, Any]:
        """What a record says of them."""
        case, shape = self.case, self.inputs.shape
        form = {PLAIN: {"form": "plain"}, TAGGED: {"form": "tagged"}}.get(case.most_tagged_bytes, {})
        return {
            "tokens": shape.tokens,
            "hidden": shape.hidden,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "num_max_tokens": self.num_max,
            "dispatch": "fp8" if case.fp8 else "bf16",
            "weights_at_dispatch": case.weighted,
            "use_logfmt": case.use_logfmt,
            "num_rdma_bytes": self.num_bytes,
            **form,
        }

    def traffic(self, operation: str, median_us: float) -> dict[str, Any]:
        """What of it leaves a GPU, and how fast. (In the logarithmic format: what it would be in bf16.)"""
        leaving = self.bytes_leaving(operation)
        return {"bytes_leaving": leaving, "gb_per_s": 1e-3 * leaving / median_us}


def label(name: str, more: str) -> str:
    """The name of a record."""
    return f"{name}, {more}" if more else name


def measure(calls: Calls, more: str = "", graph: bool = True, every_way: bool = False) -> None:
    """Times of dispatch, combine and both.

    Args:
        calls: what to measure.
        more: of the records' names.
        graph: also in a graph of GRAPH_CALLS.
        every_way: also where the CPU has no lead, so that launches count: one after a pause, and one of many in a loop;
            and a graph with a single one.
    """
    handle = calls.dispatch(0)[2]
    calls.combine(0, handle)  # now there is what it sends
    steps: dict[str, Call] = {
        "dispatch": calls.dispatch,
        "combine": lambda iteration: calls.combine(iteration, handle),
        "dispatch + combine": calls.both,
    }
    bench = calls.bench
    for operation, call in steps.items():
        name = label(operation, more)
        bench.measure(name, functools.partial(eager, calls, operation, call))
        if every_way:
            no_lead = functools.partial(eager, calls, operation, call, launch_ahead=False)
            bench.measure(f"{name}, launches included", no_lead)
            bench.measure(f"{name}, launches included, in a loop", functools.partial(looped, calls, operation, call))
        for count in ([GRAPH_CALLS] if graph else []) + ([1] if every_way else []):
            in_graph = functools.partial(replayed, calls, operation, call, count)
            bench.measure(f"{name}, graph of {count}", in_graph)


def record(calls: Calls, operation: str, times: dict[str, Any], **how: Any) -> dict[str, Any]:
    """What was measured, in which way, and how long it took."""
    return {**calls.facts(), **how, **times, **calls.traffic(operation, times["median_us"])}


def per_call(times: dict[str, Any], count: int) -> dict[str, Any]:
    """Times of so many calls as those of one."""
    return {key: value / count if key in TIMES else value for key, value in times.items()}


def eager(calls: Calls, operation: str, call: Call, launch_ahead: bool = True) -> dict[str, Any]:
    """The record of a call that the CPU launches."""
    return record(calls, operation, calls.bench.time(call, launch_ahead), launch_ahead=launch_ahead)


def looped(calls: Calls, operation: str, call: Call) -> dict[str, Any]:
    """The record of one of LOOP_CALLS calls that the CPU launches one after the other, without a lead."""

    def loop(_: int) -> None:
        for iteration in range(LOOP_CALLS):
            call(iteration)

    times = per_call(calls.bench.time(loop, launch_ahead=False), LOOP_CALLS)
    return record(calls, operation, times, loop_calls=LOOP_CALLS, launch_ahead=False)


def replayed(calls: Calls, operation: str, call: Call, count: int) -> dict[str, Any]:
    """The record of a call in a replayed graph of so many."""
    graph, _ = captured(call, count)
    times = calls.bench.time(lambda _: graph.replay())
    times["replay_host_us"] = times.pop("host_us")  # of the whole graph
    return record(calls, operation, per_call(times, count), graph_calls=count)


def captured(call: Call, count: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of so many calls, and what the last one returned. Collective."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    gc.collect()  # a graph that the collector finds during a capture ends it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for iteration in range(count):
            results = call(iteration)
    return graph, results


# --- what is measured -------------------------------------------------------------------------------------------------


def main_figures(bench: Bench) -> None:
    """128 tokens, fp8 dispatch, bf16 combine; weights given at dispatch, and not: then a row comes for each expert."""
    for weighted in (True, False):
        with Calls(bench, replace(MAIN, weighted=weighted)) as calls:
            if weighted:
                bench.measure("rows of a token", functools.partial(copies, calls))
            measure(calls, "" if weighted else "row per expert", every_way=True)


def copies(calls: Calls) -> dict[str, Any]:
    """Computed: what one row for each rank of a token saves, where there could be one for each expert."""
    shape, comm = calls.inputs.shape, calls.bench.comm
    per_rank, per_expert = calls.rows_leaving
    row = shape.row_bytes(calls.case.fp8) + shape.scale_bytes(calls.case.fp8)
    return {
        **calls.facts(),
        "ranks_per_token": float(calls.inputs.rows.sum()) / (shape.tokens * comm.size),
        "experts_per_token": shape.top_k,
        "rows_leaving_per_rank": per_rank,
        "rows_leaving_per_expert": per_expert,
        "dispatch_bytes_per_rank": round(per_rank * row),
        "dispatch_bytes_per_expert": round(per_expert * row),
        "combine_bytes_per_rank": calls.bytes_leaving("combine", weighted=True),
        "combine_bytes_per_expert": calls.bytes_leaving("combine", weighted=False),
    }


def tokens(bench: Bench) -> None:
    """More and fewer tokens; the last one with room for more."""
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        with Calls(bench, replace(MAIN, tokens=count)) as calls:
            measure(calls)
    with Calls(bench, replace(MAIN, tokens=1, num_max=MAIN.tokens)) as calls:
        measure(calls, f"M = {MAIN.tokens}")


def formats(bench: Bench) -> None:
    """A dispatch that does not cast, and a combine in the logarithmic format."""
    with Calls(bench, replace(MAIN, fp8=False)) as calls:
        measure(calls, "bf16")
    for weighted in (True, False):
        more = "logfmt" if weighted else "logfmt, row per expert"
        with Calls(bench, replace(MAIN, weighted=weighted, use_logfmt=True)) as calls:
            try:
                calls.both(0)
            except hpc_moe.UnavailableError as error:  # on all ranks alike
                bench.measure(label("combine", more), functools.partial(dict, skipped=str(error)))
                continue
            measure(calls, more)


def hidden(bench: Bench) -> None:
    """Narrower models."""
    for channels in (2048, 4096):
        with Calls(bench, replace(MAIN, hidden=channels)) as calls:
            measure(calls)


def forms(bench: Bench) -> None:
    """Rows that are all plain, or all tagged, as far as there is room for tagged ones."""
    for name, most in (("plain", PLAIN), ("tagged", TAGGED)):
        for count in (1, 8, 32, 128):
            with Calls(bench, replace(MAIN, tokens=count, most_tagged_bytes=most)) as calls:
                measure(calls, name)
        with Calls(bench, replace(MAIN, weighted=False, most_tagged_bytes=most)) as calls:
            measure(calls, f"row per expert, {name}")


def hooks(bench: Bench) -> None:
    """A matrix product between a send and its hook: no SM is busy with the call then. Beside it, one behind a call."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=bench.device)
    product = torch.empty_like(a)
    around: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # each product

    def multiply() -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.mm(a, a, out=product)
        end.record()
        around.append((begin, end))

    def product_us() -> float:
        """The median of the slowest rank's, but for the warm-up."""
        alone = [1e-3 * begin.elapsed_time(end) for begin, end in around[bench.options.warmup :]]
        around.clear()
        slowest = [bench.comm.allreduce(seconds, op=MPI.MAX) for seconds in alone]
        return float(summary(slowest, "us")["median_us"])

    with Calls(bench, MAIN) as calls:

        def between(iteration: int) -> Any:
            received = calls.dispatch(iteration, return_recv_hook=True)
            multiply()
            received[4]()
            return received

        def behind(iteration: int) -> Any:
            received = calls.dispatch(iteration)
            multiply()
            return received

        def action(call: Call) -> dict[str, Any]:
            return {**calls.facts(), **bench.time(call), "matmul_us": product_us()}

        bench.measure("matrix product between a send and its hook", functools.partial(action, between))
        bench.measure("matrix product behind a dispatch", functools.partial(action, behind))


def host(bench: Bench) -> None:
    """What a call takes of the CPU, which is not waiting for the GPU."""
    with Calls(bench, MAIN) as calls:
        handle = calls.dispatch(0)[2]
        calls.combine(0, handle)
        bench.measure("dispatch, CPU", functools.partial(host_time, calls, lambda: calls.dispatch(0)))
        bench.measure("combine, CPU", functools.partial(host_time, calls, lambda: calls.combine(0, handle)))
        bench.measure("dispatch + combine, CPU", functools.partial(host_time, calls, lambda: calls.both(0)))


def host_time(calls: Calls, call: Callable[[], Any]) -> dict[str, Any]:
    """The median of many calls, a few at a time so that the GPU's queue is never full; of the slowest rank."""
    bench, seconds = calls.bench, []
    for _ in range(HOST_CALLS // HOST_CALLS_AT_ONCE):
        torch.cuda.synchronize()
        bench.windows.align(bench.options.launch_ahead)
        for _ in range(HOST_CALLS_AT_ONCE):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    times = {f"host_{key.removesuffix('_us')}_us": value for key, value in summary(seconds, "us").items()}
    slowest = {key: bench.comm.allreduce(value, op=MPI.MAX) for key, value in times.items()}
    return {**calls.facts(), "host_us": slowest.pop("host_median_us"), **slowest}


PARTS = {
    "main": main_figures,
    "tokens": tokens,
    "formats": formats,
    "hidden": hidden,
    "forms": forms,
    "hooks": hooks,
    "host": host,
}


# --- is it right? -----------------------------------------------------------------------------------------------------


def check(bench: Bench) -> None:
    """What the measured calls return: rows by index arithmetic, sums against float64; and graphs the same bits."""
    for fp8, weighted, most in (
        *((fp8, weighted, -1) for fp8 in (True, False) for weighted in (True, False)),
        *((True, weighted, most) for most in (PLAIN, TAGGED) for weighted in (True, False)),
    ):
        case = replace(MAIN, fp8=fp8, weighted=weighted, most_tagged_bytes=most)
        form = {PLAIN: ", plain", TAGGED: ", tagged"}.get(most, "")
        name = f"rows and sums, {'fp8' if fp8 else 'bf16'}{'' if weighted else ', row per expert'}{form}"
        with Calls(bench, case) as calls:
            bench.measure(name, functools.partial(checked, calls))
            if fp8 and most == -1:
                name = f"a graph gives the same{'' if weighted else ', row per expert'}"
                bench.measure(name, functools.partial(replays, calls))


def checked(calls: Calls) -> dict[str, Any]:
    """One dispatch, with experts that multiply by their number, and its combine."""
    comm, shape = calls.bench.comm, calls.inputs.shape
    local, first = shape.experts // comm.size, comm.rank * (shape.experts // comm.size)
    recv_x, recv_count, handle, _, _ = calls.dispatch(0)
    everybody = comm.allgather((calls.inputs.topk_idx.cpu(), calls.inputs.bf16[0].cpu()))
    for expert in range(local):
        rows = torch.cat([x[(idx == first + expert).any(dim=1)] for idx, x in everybody])
        must_equal(f"recv_count of local expert {expert}", recv_count[expert].cpu(), torch.tensor(len(rows)).int())
        wanted = as_sent(calls.case, rows)
        for part, got, want in zip(("rows", "scales"), parts(recv_x), parts(wanted), strict=False):
            must_equal(f"its {part}", as_bytes(got[expert, : len(rows)].cpu()), as_bytes(want))
    numbers = (torch.arange(local, device=calls.bench.device) + first + 1)[:, None, None] / shape.experts
    combined = calls.combine_rows((values(recv_x) * numbers).bfloat16(), handle)[0].double().cpu()
    idx, x = everybody[comm.rank]
    factors = (idx + 1).float() / shape.experts
    terms = (values(as_sent(calls.case, x))[:, None] * factors[..., None]).bfloat16().double()
    terms *= calls.inputs.topk_weights.double().cpu()[..., None]
    error, size = (combined - terms.sum(dim=1)).abs(), terms.abs().sum(dim=1)
    # The result is rounded to bf16; if weights came with the dispatch, so are the sums that ranks send.
    bound = 2**-8 * terms.sum(dim=1).abs() + 2**-20 * size + (2**-8 * size if calls.case.weighted else 0)
    if not bool((error <= bound).all()):
        raise RuntimeError(
            f"combine: {int((error > bound).sum())} of {error.numel()} sums are off by more than allowed"
        )
    return {**calls.facts(), "ok": True}


def as_sent(case: Case, x: torch.Tensor) -> Any:
    """What a dispatch makes of tokens: themselves, or e4m3 and scales."""
    return cast_to_fp8(x) if case.fp8 else x


def parts(rows: Any) -> tuple[torch.Tensor, ...]:
    """Rows, and scales if they have some."""
    return rows if isinstance(rows, tuple) else (rows,)


def values(rows: Any) -> torch.Tensor:
    """In float32."""
    return dequantize(*rows) if isinstance(rows, tuple) else rows.float()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    return tensor.contiguous().view(torch.uint8)


def replays(calls: Calls) -> dict[str, Any]:
    """A pair of calls in a graph, replayed twice, gives the bits that it gives without."""
    wanted, (combined, *_) = calls.both(0)
    wanted_count, wanted_sums = wanted[1].clone(), combined.clone()
    graph, (received, (sums, *_)) = captured(calls.both, 1)
    for _ in range(2):
        sums.fill_(torch.nan)
        graph.replay()
        must_equal("recv_count", received[1], wanted_count)
        must_equal("combined_x", sums.view(torch.int16), wanted_sums.view(torch.int16))
    return {**calls.facts(), "ok": True}


# --- the program ------------------------------------------------------------------------------------------------------

COLUMNS = (
    Column("tokens", "tokens", ".0f", 1.0, 7),
    Column("M", "num_max_tokens", ".0f", 1.0, 5),
    Column("hidden", "hidden", ".0f", 1.0, 7),
    Column("MiB", "num_rdma_bytes", ".0f", 2**-20, 6),
    Column("us", "median_us", ".1f", 1.0, 9),
    Column("p10", "p10_us", ".1f", 1.0, 9),
    Column("p90", "p90_us", ".1f", 1.0, 9),
    Column("CPU us", "host_us", ".1f", 1.0, 8),
    Column("KiB", "bytes_leaving", ".0f", 2**-10, 8),
    Column("GB/s", "gb_per_s", ".0f", 1.0, 6),
    Column("ranks", "ranks_per_token", ".2f", 1.0, 7),
)


def measure_all(comm: MPI.Intracomm, options: argparse.Namespace) -> int:
    """Run the parts. Returns the exit status."""
    if comm.size < 2:
        raise RuntimeError("start two ranks or more: with one, nothing crosses a link")
    device = choose_device(comm)
    if not _C.nvshmem_build_version:
        if comm.rank == 0:
            print("skipped: this build of hpc_moe has no NVSHMEM, which low-latency calls on CUDA need")
        return 0
    bench = Bench(comm, device, options)
    selected = {name: PARTS[name] for name in (["main"] if options.quick else options.part)}
    # NVSHMEM ends with the last buffer that uses it, and does not start again in a process.
    with hpc_moe.Buffer(comm, low_latency_mode=True, device=str(device), timeout=PEER_TIMEOUT):
        with bench.running("check"):
            check(bench)
        run_parts(bench, options, selected, benchmark="gpu_low_latency")
    legend = "MiB: num_rdma_bytes; KiB: leave a GPU; ranks: that a token goes to; a graph's times are those of one call"
    show(bench, legend, COLUMNS)
    bench.windows.close()
    return int(bench.failed)


def main() -> None:
    """Parse the options and measure."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the main figures")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given again")
    options = parser.parse_args()
    if options.quick and options.part:
        parser.error("--quick is a part of its own")
    if not options.quick:
        options.part = options.part or list(PARTS)
    options.tokens = MAIN.tokens  # of a rank, where a part does not vary them
    run(measure_all, options)


if __name__ == "__main__":
    main()
