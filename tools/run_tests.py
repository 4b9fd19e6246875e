"""Runs the test suite: one plain process, then under mpirun on 1, 2, 3 and 4 ranks. `make test` calls it.

The plain process runs what uses no MPI, and the tests marked `launcher`, which start mpirun themselves. Under mpirun
the tests marked `mpi` run. The first part that fails ends the run. The last line is the sum over all parts, counted
once per part (not once per rank):

    412 passed, 0 failed, 3 skipped
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import launch

NO_TESTS_COLLECTED = 5


def run_part(ranks: int, pytest_args: list[str], env: dict[str, str], limit: float) -> int:
    """Run one part, `ranks` = 0 meaning the plain process; return its exit status."""
    colour = "yes" if sys.stdout.isatty() else "no"  # the launcher may give the ranks a terminal of its own
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--color={colour}", "--durations=5"]
    if ranks:
        return launch.run(ranks, [*pytest, "--with-mpi", "-m", "mpi and not launcher", *pytest_args], limit, env)
    line = ["timeout", "--foreground", "-s", "INT", "-k", "30", str(limit), *pytest, "-m", "not mpi", *pytest_args]
    return subprocess.run(line, env=env, stdin=subprocess.DEVNULL, check=False).returncode


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="0 stands for the plain process")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="time limit of each part")
    parser.add_argument("--summary", type=Path, help="file that gets the last line, too")
    args, pytest_args = parser.parse_known_args()

    total = {"passed": 0, "failed": 0, "skipped": 0}
    status = 0
    with tempfile.TemporaryDirectory(prefix="hpc_moe-tests-") as folder:
        for ranks in args.ranks:
            name = f"{ranks} rank{'s' if ranks > 1 else ''} under mpirun" if ranks else "plain process"
            print(f"\n===== {name} =====", flush=True)
            summary = Path(folder) / f"{ranks}.json"
            env = {**os.environ, "OMP_NUM_THREADS": "1", "HPC_MOE_TEST_SUMMARY": str(summary)}
            begin = time.monotonic()
            status = run_part(ranks, pytest_args, env, args.limit)
            counts = json.loads(summary.read_text()) if summary.exists() else {}
            if status == NO_TESTS_COLLECTED:
                status = 0
            if status and not counts.get("failed"):
                counts["failed"] = 1  # it crashed, ran out of time, or could not start
            for key in total:
                total[key] += counts.get(key, 0)
            print(f"===== {name}: exit status {status}, {time.monotonic() - begin:.0f} s =====", flush=True)
            if status:
                break
    if not status and not total["passed"]:
        print("no test ran", flush=True)
        status = NO_TESTS_COLLECTED
    line = f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped"
    if args.summary:
        args.summary.parent.mkdir(parents=True, exist_ok=True)
        args.summary.write_text(line + "\n")
    print(line, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
