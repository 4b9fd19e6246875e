"""Time of the CPU backend's calls, against the same done by hand, in one run.

    mpirun -n 2 python benchmarks/cpu.py --out benchmarks/results/cpu_2_ranks.json

Each rank uses one thread. A round of the normal calls is layout + dispatch + combine with the identity for experts;
rounds of the two sides alternate. Peak memory is what the process's resident size grew by, at its largest, over a few
rounds of one side only. A page that two ranks share (a window's slot: its owner and its writer) is counted on both.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, and by the library

# ruff: isort: split
import torch
from by_hand import ByHand
from common import peak_memory, reset_peak_memory, summary, time_calls, write_results
from mpi4py import MPI

import hpc_moe
from hpc_moe.testing import make_topk_idx, make_topk_weights


def library_round(
    buffer: hpc_moe.Buffer, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Layout, dispatch and combine with the library."""
    recv_x, _, _, _, handle, _ = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=topk_weights, num_experts=num_experts
    )
    return buffer.combine(recv_x, handle)[0]


def hand_round(by_hand: ByHand, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The same by hand."""
    recv_x, _, _, routing = by_hand.dispatch(x, topk_idx, topk_weights)
    return by_hand.combine(recv_x, routing, len(x))


def measure_memory(comm: MPI.Intracomm, call: Callable[[], Any]) -> dict[str, int]:
    """Bytes that the resident size of the worst rank grows by, at its largest, over a few calls; those shared, too."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier side has freed would hide growth
    comm.Barrier()
    before = reset_peak_memory()
    for _ in range(3):
        call()
    after = peak_memory()
    return {kind: int(comm.allreduce(after[kind] - before[kind], op=MPI.MAX)) for kind in before}


def normal_calls(comm: MPI.Intracomm, options: argparse.Namespace) -> dict[str, Any]:
    """Layout + dispatch + combine, both sides."""
    generator = torch.Generator().manual_seed(comm.rank)
    x = torch.randn(options.tokens, options.hidden, generator=generator).bfloat16()
    topk_idx = make_topk_idx("balanced", options.tokens, options.top_k, options.experts, comm.size, generator)
    topk_weights = make_topk_weights(topk_idx, generator)
    by_hand = ByHand(comm, options.experts)

    def theirs() -> torch.Tensor:
        return hand_round(by_hand, x, topk_idx, topk_weights)

    hand_memory = measure_memory(comm, theirs)
    num_bytes = hpc_moe.Config().get_nvl_buffer_size_hint(2 * options.hidden, comm.size)
    with hpc_moe.Buffer(comm, num_bytes, device="cpu") as buffer:

        def ours() -> torch.Tensor:
            return library_round(buffer, x, topk_idx, topk_weights, options.experts)

        library_memory = measure_memory(comm, ours)
        torch.testing.assert_close(ours(), theirs(), rtol=2**-7, atol=0)
        rounds: dict[str, list[float]] = {"hpc_moe": [], "by_hand": []}
        for _ in range(options.rounds):
            rounds["hpc_moe"] += time_calls(comm, ours, 10, warmup=2)
            rounds["by_hand"] += time_calls(comm, theirs, 10, warmup=2)
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=topk_weights, num_experts=options.experts
        )
        assert buffer.runtime.num_threads == torch.get_num_threads() == 1
        parts = {
            "layout": time_calls(comm, lambda: buffer.get_dispatch_layout(topk_idx, options.experts), 30),
            "cached dispatch": time_calls(comm, lambda: buffer.dispatch(x, handle=handle), 30),
            "combine": time_calls(comm, lambda: buffer.combine(recv_x, handle), 30),
        }
        passes = buffer.stats()["dispatch"]["last_passes"]
    result = {name: summary(seconds) for name, seconds in {**rounds, **parts}.items()}
    return {
        "times": result,
        "speedup": result["by_hand"]["median_ms"] / result["hpc_moe"]["median_ms"],
        "peak_memory_bytes": {"hpc_moe": library_memory, "by_hand": hand_memory},
        "num_nvl_bytes": num_bytes,
        "passes": passes,
    }


def low_latency_calls(comm: MPI.Intracomm, options: argparse.Namespace) -> dict[str, Any]:
    """Low-latency dispatch and combine."""
    generator = torch.Generator().manual_seed(comm.rank)
    most = options.low_latency_tokens
    x = torch.randn(most, options.hidden, generator=generator).bfloat16()
    topk_idx = make_topk_idx("balanced", most, options.top_k, options.experts, comm.size, generator)
    topk_weights = make_topk_weights(topk_idx, generator)
    num_bytes = hpc_moe.Buffer.get_low_latency_rdma_size_hint(most, options.hidden, comm.size, options.experts)
    results: dict[str, Any] = {"tokens": most}
    with hpc_moe.Buffer(comm, 0, num_bytes, low_latency_mode=True, device="cpu") as buffer:
        for name, weights in (("row per expert", None), ("weights at dispatch", topk_weights)):
            for use_fp8 in (True, False):

                def send(weights: torch.Tensor | None = weights, use_fp8: bool = use_fp8) -> Any:
                    return buffer.low_latency_dispatch(
                        x, topk_idx, most, options.experts, use_fp8=use_fp8, topk_weights=weights
                    )

                if use_fp8 or weights is None:
                    label = f"dispatch {'fp8' if use_fp8 else 'bf16'}, {name}"
                    results[label] = summary(time_calls(comm, send, 50))
            recv_x, _, handle, _, _ = send()
            results[f"combine, {name}"] = summary(
                time_calls(
                    comm,
                    functools.partial(buffer.low_latency_combine, recv_x, topk_idx, topk_weights, handle),
                    50,
                )
            )
    return results


def main() -> None:
    """Parse the options, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--low-latency-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="times that the two sides alternate")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    results = {"benchmark": "cpu", "ranks": comm.size, "threads_per_rank": 1, "settings": settings}
    results["normal"] = normal_calls(comm, options)
    results["low_latency"] = low_latency_calls(comm, options)
    if comm.rank == 0:
        show(results)
        if options.out:
            write_results(options.out, results)


def show(results: dict[str, Any]) -> None:
    """Print a table."""
    print(f"{results['ranks']} ranks, {results['settings']['tokens']} tokens a rank, {results['settings']}")
    for name, times in results["normal"]["times"].items():
        print(f"  {name:36} {times['median_ms']:9.3f} ms")
    memory = results["normal"]["peak_memory_bytes"]
    print(f"  speed-up over by hand {results['normal']['speedup']:.2f}; peak memory {memory}")
    for name, times in results["low_latency"].items():
        if isinstance(times, dict):
            print(f"  low latency: {name:36} {1e3 * times['median_ms']:9.1f} us")


if __name__ == "__main__":
    main()
