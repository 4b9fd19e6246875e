"""Stream time of dispatch and combine on the GPUs of one node, against what the links can carry, in one run.

    mpirun -n 4 python benchmarks/gpu.py --out benchmarks/results/gpu_4_ranks.json
    mpirun -n 4 python benchmarks/gpu.py --quick                # the main figures only
    mpirun -n 4 python benchmarks/gpu.py --part sms --part nccl  # these parts, and the push ceiling

One rank a GPU; gpu_measure.py says how time is taken, gpu_kernels.cu what the push ceiling is. Every run begins with a
check of what the calls return. What fails is recorded, the other parts go on, and the exit status is 1.

torch.distributed is used here, in the part `nccl` alone, to compare with.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import socket
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from unittest import mock

os.environ["NCCL_NVLS_ENABLE"] = "0"  # read when NCCL starts

# ruff: isort: split
import torch
from gpu_kernels import sent_row
from gpu_measure import Bench, Inputs, Shape
from gpu_program import Column, choose_device, make_parser, must_equal, run, run_parts, show
from mpi4py import MPI

import hpc_moe

MAIN_SMS = 24
CEILING_SMS = [8, 16, 24, 32, 64, 132]


def config(num_sms: int = MAIN_SMS) -> hpc_moe.Config:
    """The configuration of a measured call."""
    return hpc_moe.Config(num_sms=num_sms)


# --- what is measured -------------------------------------------------------------------------------------------------


def route(buffer: hpc_moe.Buffer, x: Any, inputs: Inputs, expert_layout: str = "token") -> hpc_moe.DispatchHandle:
    """The handle of a dispatch of these tokens."""
    handle: hpc_moe.DispatchHandle = buffer.dispatch(
        x, topk_idx=inputs.topk_idx, num_experts=inputs.shape.experts, expert_layout=expert_layout
    )[4]
    return handle


def cached_dispatch(
    bench: Bench, buffer: hpc_moe.Buffer, inputs: Inputs, fp8: bool, num_sms: int = MAIN_SMS, **facts: Any
) -> dict[str, Any]:
    """Dispatch with a handle: the routing is known."""
    tokens: list[Any] = inputs.fp8 if fp8 else inputs.bf16
    handle = route(buffer, tokens[0], inputs)

    def call(iteration: int) -> Any:
        return buffer.dispatch(tokens[iteration % len(tokens)], handle=handle, config=config(num_sms))

    name = f"dispatch {'fp8' if fp8 else 'bf16'}, cached"
    return bench.time_library(name, buffer, call, inputs, fp8=fp8, num_sms=num_sms, **facts)


def uncached_dispatch(
    bench: Bench, buffer: hpc_moe.Buffer, inputs: Inputs, fp8: bool, num_sms: int = MAIN_SMS, **facts: Any
) -> dict[str, Any]:
    """Dispatch with top-k data: layout, exchange of counts, the CPU's wait, and the tokens."""
    tokens: list[Any] = inputs.fp8 if fp8 else inputs.bf16

    def call(iteration: int) -> Any:
        return buffer.dispatch(
            tokens[iteration % len(tokens)],
            topk_idx=inputs.topk_idx,
            topk_weights=inputs.topk_weights,
            num_experts=inputs.shape.experts,
            config=config(num_sms),
        )

    name = f"dispatch {'fp8' if fp8 else 'bf16'}, uncached"
    return bench.time_library(name, buffer, call, inputs, fp8=fp8, num_sms=num_sms, **facts)


def combine(
    bench: Bench,
    buffer: hpc_moe.Buffer,
    inputs: Inputs,
    num_sms: int = MAIN_SMS,
    name: str = "combine bf16",
    arguments: Mapping[str, Any] = MappingProxyType({}),
    **facts: Any,
) -> dict[str, Any]:
    """Combine; `arguments` are more of its own."""
    handle = route(buffer, inputs.bf16[0], inputs)
    rows = inputs.random_rows(inputs.num_recv)

    def call(iteration: int) -> Any:
        return buffer.combine(rows[iteration % len(rows)], handle, config=config(num_sms), **arguments)

    return bench.time_library(name, buffer, call, inputs, operation="combine", num_sms=num_sms, **facts)


def three_figures(bench: Bench, buffer: hpc_moe.Buffer, inputs: Inputs, num_sms: int = MAIN_SMS, **facts: Any) -> None:
    """The three figures that the library is judged by."""
    cached_dispatch(bench, buffer, inputs, fp8=False, num_sms=num_sms, **facts)
    cached_dispatch(bench, buffer, inputs, fp8=True, num_sms=num_sms, **facts)
    combine(bench, buffer, inputs, num_sms, **facts)


# --- parts ------------------------------------------------------------------------------------------------------------


def quick(bench: Bench) -> None:
    """The three figures at the size hint."""
    with bench.buffer() as buffer:
        three_figures(bench, buffer, bench.main)


def main_figures(bench: Bench) -> None:
    """The three figures, and uncached dispatch, at two SM counts; the figures with a larger buffer, too."""
    for size_hints in (1, 2):
        with bench.buffer(size_hints=size_hints) as buffer:
            for num_sms in (MAIN_SMS, 16):
                three_figures(bench, buffer, bench.main, num_sms)
                if size_hints == 1:
                    uncached_dispatch(bench, buffer, bench.main, fp8=False, num_sms=num_sms)
                    uncached_dispatch(bench, buffer, bench.main, fp8=True, num_sms=num_sms)


def sms(bench: Bench) -> None:
    """Over SM counts."""
    with bench.buffer() as buffer:
        for num_sms in (8, 12, 16, 20, 24, 32, 64):
            three_figures(bench, buffer, bench.main, num_sms)


def rate(bench: Bench) -> None:
    """Over the rate to which sending is held, in GB/s; 0: to none."""
    for gb_per_s in (0, 330, 345, 355, 365, 375, 385):
        variables = {"HPC_MOE_NVLINK_GB_PER_S": str(gb_per_s)}  # read when a buffer is made
        with mock.patch.dict(os.environ, variables), bench.buffer() as buffer:
            three_figures(bench, buffer, bench.main, rate=gb_per_s)


def tokens(bench: Bench) -> None:
    """Over the number of tokens."""
    for num_tokens in (512, 1024, 2048, 8192):
        with bench.buffer() as buffer:
            three_figures(bench, buffer, Inputs(bench.comm, bench.device, Shape(tokens=num_tokens)))


def hidden(bench: Bench) -> None:
    """Over the hidden size."""
    for size in (2048, 4096):
        with bench.buffer(hidden=size) as buffer:
            three_figures(bench, buffer, Inputs(bench.comm, bench.device, Shape(bench.options.tokens, size)))


def skewed(bench: Bench) -> None:
    """A routing in which most tokens go to a few experts, of one rank."""
    with bench.buffer() as buffer:
        inputs = Inputs(bench.comm, bench.device, Shape(bench.options.tokens, routing="skewed"))
        three_figures(bench, buffer, inputs)


def grouped(bench: Bench) -> None:
    """Rows by expert: as the library lays them out, and by torch after a plain dispatch; and the way back."""
    inputs = bench.main
    with bench.buffer() as buffer:
        recv_x, recv_topk_idx, _, _, plain, _ = buffer.dispatch(
            inputs.bf16[0], topk_idx=inputs.topk_idx, num_experts=inputs.shape.experts
        )
        # Which row of recv_x lies where when rows lie by expert, and then in their order: the index is not timed.
        by_row = (recv_topk_idx >= 0).nonzero()
        experts = recv_topk_idx[by_row[:, 0], by_row[:, 1]]
        order = by_row[torch.argsort(experts, stable=True), 0]
        by_expert, _, _, _, handle, _ = buffer.dispatch(
            inputs.bf16[0], topk_idx=inputs.topk_idx, num_experts=inputs.shape.experts, expert_layout="grouped"
        )
        if not torch.equal(by_expert, recv_x.index_select(0, order)):
            raise RuntimeError("the grouped layout is not the plain one, permuted")
        num_recv = len(recv_x)
        del recv_x, recv_topk_idx, by_expert, by_row, experts
        tokens = inputs.bf16

        def library_dispatch(iteration: int) -> Any:
            return buffer.dispatch(tokens[iteration % len(tokens)], handle=handle, config=config())

        def torch_dispatch(iteration: int) -> Any:
            received = buffer.dispatch(tokens[iteration % len(tokens)], handle=plain, config=config())[0]
            return received.index_select(0, order)

        rows = inputs.random_rows(len(order))

        def library_combine(iteration: int) -> Any:
            return buffer.combine(rows[iteration % len(rows)], handle, config=config())

        def torch_combine(iteration: int) -> Any:
            sums = torch.zeros(num_recv, inputs.shape.hidden, dtype=torch.bfloat16, device=bench.device)
            sums.index_add_(0, order, rows[iteration % len(rows)])
            return buffer.combine(sums, plain, config=config())

        bench.time_library("dispatch bf16, grouped", buffer, library_dispatch, inputs)
        bench.time_library("dispatch bf16, plain + index_select", buffer, torch_dispatch, inputs)
        bench.time_library("combine bf16, grouped", buffer, library_combine, inputs, operation="combine")
        bench.time_library("combine bf16, index_add_ + plain", buffer, torch_combine, inputs, operation="combine")


def pool(bench: Bench) -> None:
    """Results in the registered pool, and copied to where they go because the pool is full; and a small window."""
    inputs = bench.main
    with bench.buffer() as buffer:
        for fp8 in (False, True):
            cached_dispatch(bench, buffer, inputs, fp8, pool="free")
            kept = fill_pool(bench, buffer, inputs, fp8)
            cached_dispatch(bench, buffer, inputs, fp8, pool=f"full: {len(kept)} earlier results are alive")
            del kept
    with bench.buffer(size_hints=0.25) as buffer:
        three_figures(bench, buffer, inputs)


def fill_pool(bench: Bench, buffer: hpc_moe.Buffer, inputs: Inputs, fp8: bool) -> list[Any]:
    """Results that leave no rank's pool room for another one."""
    tokens: list[Any] = inputs.fp8 if fp8 else inputs.bf16
    handle = route(buffer, tokens[0], inputs)
    torch.cuda.synchronize()  # what earlier results had is free again
    kept = []
    for _ in range(16):
        pooled_before = buffer.stats()["dispatch"]["pooled"]
        kept.append(buffer.dispatch(tokens[0], handle=handle)[0])
        is_pooled = buffer.stats()["dispatch"]["pooled"] > pooled_before
        if not bench.comm.allreduce(is_pooled, op=MPI.LOR):
            break
    return kept


def idle(bench: Bench) -> None:
    """The CPU is not ahead of the GPU: what launches and the uncached dispatch's wait cost then."""
    with bench.buffer() as buffer:
        for fp8 in (False, True):
            uncached_dispatch(bench, buffer, bench.main, fp8, launch_ahead=False)
            cached_dispatch(bench, buffer, bench.main, fp8, launch_ahead=False)


def extras(bench: Bench) -> None:
    """Combine with biases and with weights."""
    inputs = bench.main
    biases = torch.randn(2, inputs.shape.tokens, inputs.shape.hidden, dtype=torch.bfloat16, device=bench.device)
    with bench.buffer() as buffer:
        combine(bench, buffer, inputs, name="combine bf16, 2 biases", arguments={"bias": (biases[0], biases[1])})
        weights = torch.rand(inputs.num_recv, inputs.shape.top_k, device=bench.device)
        combine(bench, buffer, inputs, name="combine bf16, topk_weights", arguments={"topk_weights": weights})


def overlap(bench: Bench) -> None:
    """Matrix products on the current stream while a call with `async_finish` runs: each alone, and both.

    Each product has fewer tiles than there are SMs left: a kernel that wants all of them is as slow as its last tile.
    """
    inputs = bench.main
    a = torch.randn(768, 7168, dtype=torch.bfloat16, device=bench.device)
    b = torch.randn(7168, 2048, dtype=torch.bfloat16, device=bench.device)
    products = torch.empty(768, 2048, dtype=torch.bfloat16, device=bench.device)
    with bench.buffer() as buffer:
        tokens = inputs.bf16
        handle = route(buffer, tokens[0], inputs)
        rows = inputs.random_rows(inputs.num_recv)

        def dispatch(iteration: int, async_finish: bool) -> Any:
            x = tokens[iteration % len(tokens)]
            return buffer.dispatch(x, handle=handle, config=config(), async_finish=async_finish)

        def combine(iteration: int, async_finish: bool) -> Any:
            x = rows[iteration % len(rows)]
            return buffer.combine(x, handle, config=config(), async_finish=async_finish)

        for name, call in (("dispatch bf16, cached", dispatch), ("combine bf16", combine)):
            together = functools.partial(overlapped, bench, call, a, b, products)
            bench.measure(f"{name}, with matrix products", together)


def overlapped(
    bench: Bench, call: Callable[[int, bool], Any], a: torch.Tensor, b: torch.Tensor, products: torch.Tensor
) -> dict[str, Any]:
    """Times alone and together, of about as much computation as communication."""

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(a, b, out=products)

    alone = bench.time(lambda iteration: call(iteration, False))
    once = bench.time(lambda _: multiply(1))["median_us"]
    repeats = max(1, round(alone["median_us"] / once))

    def both(iteration: int) -> Any:
        results = call(iteration, True)
        multiply(repeats)
        results[-1].current_stream_wait()
        return results

    matmul_us = bench.time(lambda _: multiply(repeats))["median_us"]
    together = bench.time(both)
    saved = alone["median_us"] + matmul_us - together["median_us"]
    return {
        "num_sms": MAIN_SMS,
        "matmuls": repeats,
        "call_alone_us": alone["median_us"],
        "matmul_alone_us": matmul_us,
        **together,
        "hidden_share": saved / min(alone["median_us"], matmul_us),  # of the shorter one
    }


def nccl(bench: Bench) -> None:
    """NCCL's all-to-all of the same rows, packed before and left packed: nothing but the transfer."""
    import torch.distributed as dist

    comm, inputs = bench.comm, bench.main

    def start() -> dict[str, Any]:
        dist.init_process_group(
            "nccl",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=comm.rank,
            world_size=comm.size,
            timeout=datetime.timedelta(seconds=60),
            device_id=bench.device,
        )
        return {"ok": True}

    port = comm.bcast(free_port() if comm.rank == 0 else None)
    bench.measure("NCCL starts", start)
    for fp8 in (False, True):
        time_nccl(bench, dist.all_to_all_single, inputs, fp8)
    dist.destroy_process_group()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def time_nccl(bench: Bench, all_to_all: Callable[..., Any], inputs: Inputs, fp8: bool) -> None:
    """One dtype; fp8 as bytes, without scales."""
    send_rows = [int(count) for count in inputs.rows[bench.comm.rank]]
    recv_rows = [int(count) for count in inputs.rows[:, bench.comm.rank]]
    row_bytes = inputs.shape.row_bytes(fp8)
    size = (sum(send_rows), row_bytes)
    packed = [torch.randint(0, 127, size, dtype=torch.uint8, device=bench.device) for _ in range(inputs.rotated(*size))]

    def call(iteration: int) -> torch.Tensor:
        received = torch.empty(sum(recv_rows), row_bytes, dtype=torch.uint8, device=bench.device)
        all_to_all(received, packed[iteration % len(packed)], recv_rows, send_rows)
        return received

    def action() -> dict[str, Any]:
        times = bench.time(call)
        return {"dtype": "fp8" if fp8 else "bf16", **times, **bench.shares(inputs, fp8, times["median_us"])}

    bench.measure(f"NCCL all-to-all, rows of {row_bytes} bytes", action)


PARTS = {
    "main": main_figures,
    "sms": sms,
    "rate": rate,
    "tokens": tokens,
    "hidden": hidden,
    "skewed": skewed,
    "grouped": grouped,
    "pool": pool,
    "idle": idle,
    "extras": extras,
    "overlap": overlap,
    "nccl": nccl,  # last: a rank on which NCCL fails to start may take the others down
}


# --- is it right? -----------------------------------------------------------------------------------------------------


def pattern(rank: int, token: torch.Tensor, hidden: int) -> torch.Tensor:
    """Rows that tell where they come from, `[tokens, hidden] int16`: finite as bf16, and as pairs of fp8."""
    channel = torch.arange(hidden, device=token.device)
    return ((rank * 7919 + token[:, None]) * 31 + channel * 17).bitwise_and(0x3E7E).short()


def check(bench: Bench) -> None:
    """What the measured calls return, compared with what index arithmetic and float64 sums say."""
    comm, inputs, shape = bench.comm, bench.main, bench.main.shape
    first = comm.rank * (shape.experts // comm.size)
    mine = range(first, first + shape.experts // comm.size)
    source_ranks, source_tokens, local_experts = [], [], []
    for rank, idx in enumerate(comm.allgather(inputs.topk_idx.cpu())):
        is_here = (idx >= mine.start) & (idx < mine.stop)
        token = is_here.any(dim=1).nonzero().flatten()
        source_ranks.append(torch.full_like(token, rank))
        source_tokens.append(token)
        local_experts.append(torch.where(is_here, idx - first, -1)[token])
    sources = torch.cat(source_ranks).to(bench.device), torch.cat(source_tokens).to(bench.device)

    def expected(hidden: int, offset: int) -> torch.Tensor:
        rank, token = sources
        return pattern(0, token + 7919 * (rank + offset), hidden)

    def sent(hidden: int, offset: int) -> torch.Tensor:
        return pattern(comm.rank + offset, torch.arange(shape.tokens, device=bench.device), hidden)

    def moves() -> dict[str, Any]:
        x, again = sent(shape.hidden, 0).view(torch.bfloat16), sent(shape.hidden, 1).view(torch.bfloat16)
        recv_x, recv_topk_idx, _, _, handle, _ = buffer.dispatch(x, topk_idx=inputs.topk_idx, num_experts=shape.experts)
        must_equal("recv_x of an uncached dispatch", recv_x.view(torch.int16), expected(shape.hidden, 0))
        must_equal("recv_src_idx", handle.recv_src_idx, sources[1].int())
        must_equal("recv_topk_idx", recv_topk_idx, torch.cat(local_experts).to(bench.device))
        recv_x = buffer.dispatch(again, handle=handle, config=config())[0]
        must_equal("recv_x of a cached dispatch", recv_x.view(torch.int16), expected(shape.hidden, 1))
        q = sent(shape.hidden // 2, 2).view(torch.float8_e4m3fn)
        scales = sent(shape.hidden // 128, 3).float()
        recv_q, recv_scales = buffer.dispatch((q, scales), handle=handle, config=config())[0]
        must_equal("recv_x of an fp8 dispatch", recv_q.view(torch.int16), expected(shape.hidden // 2, 2))
        must_equal("its scales", recv_scales, expected(shape.hidden // 128, 3).float())
        return {"ok": True}

    def sums() -> dict[str, Any]:
        x = inputs.bf16[0]
        handle = route(buffer, x, inputs)
        recv_x = buffer.dispatch(x, handle=handle, config=config())[0]
        combined = buffer.combine(recv_x * factor(comm.rank), handle, config=config())[0]
        step = max(1, shape.tokens // 256)
        sample = x[::step]
        went_to = handle.is_token_in_rank[::step, :, None]
        terms = torch.stack([(sample * factor(rank)).double() for rank in range(comm.size)], dim=1) * went_to
        error = (combined[::step].double() - terms.sum(dim=1)).abs()
        bound = 2**-8 * terms.sum(dim=1).abs() + 2**-20 * terms.abs().sum(dim=1)
        if not bool((error <= bound).all()):
            raise RuntimeError(
                f"combine: {int((error > bound).sum())} of {error.numel()} sums are off by more than allowed"
            )
        return {"ok": True}

    with bench.buffer() as buffer:
        bench.measure("dispatch moves rows to their places", moves)
        bench.measure("combine sums them", sums)
    if bench.comm.size > 1:
        bench.measure("the push kernel's rows arrive", lambda: pushed(bench))


def factor(rank: int) -> float:
    """What a rank multiplies its rows with, so that every term of a sum is another one."""
    return (rank + 1) / 8


def pushed(bench: Bench) -> dict[str, Any]:
    """The push kernel moves what it claims to move."""
    comm, hidden = bench.comm, Shape.hidden
    num_rows, first = 3 * bench.rows_per_peer + 1, bench.rows_per_peer

    def rows(rank: int, row: torch.Tensor) -> torch.Tensor:
        return pattern(rank, (first + row.to(bench.device)) % num_rows, hidden)

    source = rows(comm.rank, torch.arange(num_rows) - first).view(torch.uint8)
    bench.windows.push(source, first, bench.rows_per_peer, MAIN_SMS)
    bench.windows.align()
    for rank in range(comm.size):
        if rank != comm.rank:
            row = sent_row(rank, comm.rank, comm.size, bench.rows_per_peer)
            received = bench.windows.received(rank, bench.rows_per_peer, source.shape[1]).view(torch.int16)
            must_equal(f"what rank {rank} pushed", received, rows(rank, row))
    torch.cuda.synchronize()
    return {"ok": True}


# --- the program ------------------------------------------------------------------------------------------------------


COLUMNS = (
    Column("tokens", "tokens", ".0f", 1.0, 7),
    Column("hidden", "hidden", ".0f", 1.0, 7),
    Column("SMs", "num_sms", ".0f", 1.0, 5),
    Column("MiB", "num_nvl_bytes", ".0f", 2**-20, 6),
    Column("passes", "passes", ".3g", 1.0, 7),
    Column("pooled", "pooled", ".0%", 1.0, 7),
    Column("us", "median_us", ".1f", 1.0, 9),
    Column("p10", "p10_us", ".1f", 1.0, 9),
    Column("p90", "p90_us", ".1f", 1.0, 9),
    Column("GB/s", "gb_per_s", ".0f", 1.0, 6),
    Column("share", "share_of_ceiling", ".1%", 1.0, 8),
)


def measure_all(comm: MPI.Intracomm, options: argparse.Namespace) -> int:
    """Run the parts. Returns the exit status."""
    if comm.size < 2:
        raise RuntimeError("start two ranks or more: with one, nothing crosses a link")
    bench = Bench(comm, choose_device(comm), options)
    parts = {"quick": quick} if options.quick else {name: PARTS[name] for name in options.part}
    with bench.running("check"):
        check(bench)
    with bench.running("ceiling"):
        for fp8 in (False, True):
            bench.measure_ceiling(Shape().row_bytes(fp8), CEILING_SMS)
    run_parts(bench, options, parts, benchmark="gpu")
    show(bench, "MiB: num_nvl_bytes; share: of the push ceiling", COLUMNS)
    bench.windows.close()
    return int(bench.failed)


def main() -> None:
    """Parse the options and measure."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the three main figures and the push ceiling")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given again")
    parser.add_argument("--overlap", action="append_const", dest="part", const="overlap", help="as --part overlap")
    parser.add_argument(
        "--tokens", type=int, default=Shape.tokens, help="tokens a rank, where a part does not vary them"
    )
    options = parser.parse_args()
    if options.quick and options.part:
        parser.error("--quick is a part of its own")
    if not options.quick:
        options.part = options.part or list(PARTS)
    run(measure_all, options)


if __name__ == "__main__":
    main()
