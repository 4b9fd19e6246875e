"""The stress test: random calls on kernels that pause at random, and kernels with a broken rule, which it must notice.

    python stress.py --all-mutations                           all of it; starts mpirun itself
    mpirun -n 4 python stress.py --calls 20000                 the kernels as they are: nothing may be wrong
    mpirun -n 4 python stress.py --mutation kRowsWithoutFlag   one rule broken: something must be wrong

On 2 to 8 ranks, with a GPU each (fewer GPUs are shared, which is slow). `hpc_moe` must be a stress build, which
`make gpu-stress` makes: its kernels sleep at random, overwrite what they have drained with 0xfd, and can break a rule.
What the calls are and how they are checked is in stress_calls.py and stress_low_latency.py; `--device cpu` tries that
part without a GPU.

What a breaking needs, to be noticed:
- kFlagBeforeStoresAreDone: that a flag overtakes the row it is about, between two GPUs. A row that is merely under way
  is nearly always faster, so the row's last copies sleep before they start.
- kCountsWithoutEntries, kSendWithoutEntries: that a rank enters late. Besides the sleeps in the kernels, every rank
  delays some of its calls on its own stream.
- kEndWithoutArrivals, kArrivalBeforeAllWarps: results in the pool, and a check right behind the call.
- kPassWithoutDrain: several passes.
- kSendWithoutPermission: that a rank sends while a peer has yet to receive the call two before. For that two sends
  must be unreceived, and the peer be late: its calls and hooks are delayed longer.
- kRowBeforeFlag, kWordWithoutTag: buffers whose low-latency rows are plain, and tagged. Each window's buffer has a
  choice of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

NO_BULK_COPIES = {"HPC_MOE_TEST_NO_BULK_COPIES": "1"}
RESULT = "stress: "  # begins the line in which rank 0 says how it ended


class Mutation(NamedTuple):
    """A rule that a stress build can break. Its place in `MUTATIONS`, from 1, is what HPC_MOE_TEST_MUTATION holds."""

    name: str
    broken: str
    noticed: str
    variables: dict[str, str] = {}  # noqa: RUF012  (of the environment, with which its code is reached most)
    is_low_latency: bool = False  # only low-latency calls reach it


# In the order of enum Mutation in csrc/cuda/device/stress.cuh, without kNone.
MUTATIONS = [
    Mutation(
        "kFlagBeforeStoresAreDone",
        "a row's flag is handed over, to be raised, before the last bulk copies of the row have started",
        "the receiver drains or sums a row of which a part was not sent: 0xfd, or an earlier call's values",
    ),
    Mutation(
        "kRowsWithoutFlag",
        "draining and summing warps do not wait for the flags of rows",
        "they read slots before the rows are there: 0xfd, or an earlier call's values",
    ),
    Mutation(
        "kEndWithoutArrivals",
        "a dispatch ends without waiting until all peers say that their rows have landed",
        "rows that peers write straight into the result are missing when the check behind the call reads it",
    ),
    Mutation(
        "kPassWithoutDrain",
        "the rows of a pass are sent before the receiver has drained the one before",
        "a slot holds the next pass's row, or half of it, when it is drained",
    ),
    Mutation(
        "kSendWithoutEntries",
        "rows are sent before the peers have entered the call",
        "the stale entry of a late peer says where rows go and how many passes there are: wrong rows, or endless waits",
    ),
    Mutation(
        "kArrivalBeforeAllWarps",
        "a block says that its rows have been sent while some of its warps still send",
        "as kEndWithoutArrivals: the receiver's dispatch ends too early",
    ),
    Mutation(
        "kCountsWithoutEntries",
        "the exchange reads the peers' counts without waiting for them to enter",
        "counts, arguments and kinds of call of an earlier epoch: results of wrong sizes, or calls said to differ",
    ),
    Mutation(
        "kFlagBeforeRow",
        "where rows pass through registers, the flag is raised before the row is written",
        "the receiver drains or sums a slot before the row is there; the sender sleeps in between",
        NO_BULK_COPIES,
    ),
    Mutation(
        "kSendWithoutPermission",
        "a low-latency call sends rows before its peers have ended the calls before",
        "rows of an earlier call are overwritten while they are read: a later call's, or 0xfd",
        is_low_latency=True,
    ),
    Mutation(
        "kRowBeforeFlag",
        "low-latency rows that a flag stands for are read without waiting for it",
        "they are read before they have come: 0xfd, or an earlier call's values",
        is_low_latency=True,
    ),
    Mutation(
        "kWordWithoutTag",
        "words of low-latency rows are taken whatever their tag",
        "they are taken before they have come: 0xfd, or an earlier call's values",
        is_low_latency=True,
    ),
]


def number_of(name: str) -> int:
    """The number of a mutation; 0 for none."""
    return [mutation.name for mutation in MUTATIONS].index(name) + 1 if name else 0


# --- all of it -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A line of the table."""

    label: str
    options: list[str]
    variables: dict[str, str]
    limit: float  # seconds


def runs(args: argparse.Namespace) -> list[Run]:
    """The kernels as they are, with and without bulk copies; then each mutation."""
    options = ["--seed", str(args.seed), "--device", args.device, *(["--normal"] if args.normal else [])]
    correct = [*options, "--calls", str(args.calls)]
    found = [Run("correct", correct, {}, args.limit)]
    if args.device == "cpu":
        return found
    found.append(Run("correct, without bulk copies", correct, NO_BULK_COPIES, args.limit))
    for mutation in MUTATIONS:
        if args.normal and mutation.is_low_latency:
            continue
        mutated = [*correct, "--mutation", mutation.name, "--seconds", str(args.seconds or 15.0)]
        found.append(Run(mutation.name, mutated, mutation.variables, 60.0))
    return found


def run_all(args: argparse.Namespace) -> int:
    """Start every run under mpirun, and print a table; returns the exit status."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    import launch

    ranks = args.ranks or number_of_ranks(args.device)
    outputs = []
    print(f"{'on ' + str(ranks) + ' ranks':<30} {'seconds':>7}  result", flush=True)
    for run in runs(args):
        argv = [sys.executable, __file__, *run.options, "--limit", str(run.limit)]
        base = {**os.environ, "OMP_NUM_THREADS": "1", **run.variables}
        begin = time.monotonic()
        done = subprocess.run(
            launch.command(ranks, argv, run.limit + 30),
            env=launch.environment(ranks, base=base),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        lines = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
        result = lines[-1] if lines else "no result"
        if done.returncode != 0:
            result = f"FAILED (exit status {done.returncode}): {result}"
            outputs.append(f"----- {run.label}\n{done.stdout}")
        print(f"{run.label:<30} {time.monotonic() - begin:7.1f}  {result}", flush=True)
    print("", *outputs, sep="\n", end="")
    return 1 if outputs else 0


def number_of_ranks(device: str) -> int:
    """As many as there are GPUs, if that is possible."""
    if device == "cpu":
        return 2
    import torch

    return min(max(torch.cuda.device_count(), 2), 8)


# --- the command line ------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Random calls on a stress build; see the top of this file.")
    parser.add_argument("--calls", type=int, default=20_000, help="dispatches and combines, in all (default: 20000)")
    parser.add_argument("--seconds", type=float, default=0.0, help="end after so long, if that is sooner")
    parser.add_argument("--seed", type=int, default=1, help="another one draws other calls")
    parser.add_argument("--mutation", default="", metavar="NAME", choices=["", *(one.name for one in MUTATIONS)])
    parser.add_argument("--all-mutations", action="store_true", help="everything, in runs of mpirun of its own")
    parser.add_argument("--ranks", type=int, default=0, help="with --all-mutations: how many (default: one per GPU)")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a run is ended as hanging")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--normal", action="store_true", help="no low-latency calls, for which CUDA needs NVSHMEM")
    args = parser.parse_args()
    if args.normal and any(one.is_low_latency for one in MUTATIONS if one.name == args.mutation):
        parser.error(f"--normal: only low-latency calls reach {args.mutation}")
    return args


def main() -> int:
    args = parse()
    if args.all_mutations:
        return run_all(args)
    import stress_calls  # not before: it starts MPI

    return stress_calls.main(
        num_calls=args.calls,
        seconds=args.seconds or float("inf"),
        seed=args.seed,
        mutation=number_of(args.mutation),
        limit=args.limit,
        device=args.device,
        has_low_latency=not args.normal,
        result=RESULT,
    )


if __name__ == "__main__":
    sys.exit(main())
