"""What all tests share: markers, fixtures, and the guard that keeps the ranks of an MPI run in step.

Two kinds of process run tests. A plain pytest process runs what needs no MPI and the tests marked `launcher`. Under
`mpirun ... pytest --with-mpi`, every rank runs the same tests in the same order, and two things hold:

- Rank 0 alone reports. After each test the ranks tell each other how it ended; a test that failed on any rank counts
  as failed on all, and rank 0 prints the failing ranks' messages. So all ranks end with the same exit status.
- Nothing waits for ever. A rank that has finished a test and waits longer than STEP_LIMIT seconds for another one
  prints which test and which ranks, and aborts the job; the ranks that hang print their stacks as they are ended.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

import launch
import pytest

if TYPE_CHECKING:
    from mpi4py import MPI

STEP_LIMIT = float(os.environ.get("HPC_MOE_TEST_STEP_LIMIT", "60"))  # seconds
MAX_TEXT = 20_000  # characters of a failure that travel to the other ranks


# ---- fixtures


@pytest.fixture(scope="session")
def comm() -> MPI.Intracomm:
    """`MPI.COMM_WORLD`. A test that uses it counts as marked `mpi`."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture(scope="session")
def low_latency_world(comm: MPI.Intracomm) -> Iterator[None]:
    """On CUDA, a low-latency buffer that lives as long as the tests: NVSHMEM does not start twice in a process.

    It is on all ranks of the world, and so must the others be. Collective where it is first used.
    """
    from support import DEVICE, HAS_LOW_LATENCY, ON_CUDA, TIMEOUT_S

    from hpc_moe import Buffer

    if not (ON_CUDA and HAS_LOW_LATENCY):
        yield
        return
    with Buffer(comm, low_latency_mode=True, device=str(DEVICE), timeout=TIMEOUT_S):
        yield


Mpirun = Callable[..., "subprocess.CompletedProcess[str]"]


def on_cuda() -> bool:
    """Whether this run of the tests is about CUDA; see support.py."""
    return os.environ.get("HPC_MOE_TEST_DEVICE", "cpu") == "cuda"


def gpu_environment(ranks: int) -> dict[str, str]:
    """What programs that tests start need: no GPU, or leave to share the GPUs if these are fewer than the ranks."""
    if not on_cuda():
        return {"CUDA_VISIBLE_DEVICES": ""}
    import torch

    return {"HPC_MOE_TEST_SHARE_GPUS": "1"} if ranks > torch.cuda.device_count() else {}


@pytest.fixture(scope="session")
def mpirun() -> Mpirun:
    """`mpirun(ranks, *python_args, limit=100.0, env={})`: run Python on that many ranks; returns the finished process.

    For tests marked `launcher`. Output is captured as text; exit status 124 means that the limit (seconds) ended it.
    Unless HPC_MOE_TEST_DEVICE=cuda the ranks see no GPU. More ranks than GPUs share them.
    """

    def run(
        ranks: int, *args: str | Path, limit: float = 100.0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        line = launch.command(ranks, [sys.executable, *map(str, args)], limit)
        base = {**os.environ, "OMP_NUM_THREADS": "1", **gpu_environment(ranks), **(env or {})}
        environment = launch.environment(ranks, base=base)
        return subprocess.run(
            line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    return run


# ---- the ranks in step


class Verdict(NamedTuple):
    """How a test ended on one rank."""

    nodeid: str
    phase: str  # "run" (set-up and call) or "teardown"
    outcome: str  # "passed", "failed" or "skipped"
    brief: str  # one line saying why it failed
    text: str  # all that pytest would report about the failure


T = TypeVar("T")


class RanksInStep:
    """A pytest plugin that makes all ranks agree on how each test ended, within a time limit."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD.Dup()
        self.rank = self.comm.rank
        self.others = [rank for rank in range(self.comm.size) if rank != self.rank]
        self.step = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All ranks must have collected the same tests."""
        names = "\n".join(item.nodeid for item in session.items)
        digest = hashlib.sha256(names.encode()).hexdigest()
        seen = self.exchange("collection", (len(session.items), digest, session.testsfailed))
        if len(set(seen.values())) > 1:
            counts = ", ".join(f"rank {rank}: {seen[rank][0]}" for rank in sorted(seen))
            pytest.exit(f"the ranks collected different tests ({counts})", returncode=3)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Agree twice per test: once it has run (or its set-up ended otherwise), and after its teardown."""
        report = yield
        if report.when != "setup" or not report.passed:
            self.agree(item.nodeid, report)
        return report

    def agree(self, nodeid: str, report: pytest.TestReport) -> None:
        """Turn `report` into a failure if any rank failed."""
        phase = "teardown" if report.when == "teardown" else "run"
        text = brief = ""
        if report.failed:
            text = f"{report.longreprtext}\n{report.capstdout}{report.capstderr}"[-MAX_TEXT:]
            crash = getattr(report.longrepr, "reprcrash", None)
            brief = (crash.message if crash else report.longreprtext).strip().partition("\n")[0]
        mine = Verdict(nodeid, phase, report.outcome, brief, text)
        seen = self.exchange(f"{nodeid} ({phase})", mine, text)
        if len({(verdict.nodeid, verdict.phase) for verdict in seen.values()}) > 1:
            where = ", ".join(f"rank {rank}: {v.nodeid} ({v.phase})" for rank, v in sorted(seen.items()))
            self.abort(f"the ranks are at different tests: {where}")
        failed = {rank: verdict for rank, verdict in sorted(seen.items()) if verdict.outcome == "failed"}
        if report.failed:
            for rank, verdict in failed.items():
                if rank != self.rank:
                    report.sections.append(
                        (f"failed on rank {rank} too", "alike" if verdict.brief == brief else verdict.text)
                    )
        elif failed:
            report.outcome = "failed"
            report.longrepr = "\n".join(f"failed on rank {rank}: {v.brief}\n{v.text}" for rank, v in failed.items())
            if hasattr(report, "wasxfail"):
                del report.wasxfail

    def exchange(self, where: str, value: T, text: str = "") -> dict[int, T]:
        """Send `value` to all ranks and return theirs, by rank; abort the job if one does not send within the limit."""
        from mpi4py import MPI

        self.step += 1
        tag = self.step % 32_000
        sends = [self.comm.isend(value, dest=rank, tag=tag) for rank in self.others]
        seen = {self.rank: value}
        deadline = time.monotonic() + STEP_LIMIT
        while True:
            for rank in self.others:
                if rank not in seen:
                    message = self.comm.improbe(source=rank, tag=tag)
                    if message is not None:
                        seen[rank] = message.recv()
            if len(seen) > len(self.others) and MPI.Request.Testall(sends):
                return seen
            if time.monotonic() > deadline:
                missing = sorted(set(self.others) - set(seen))
                self.abort(f"{where}: waited {STEP_LIMIT:g} s for rank(s) {missing or 'unknown'}, which hang\n{text}")
            time.sleep(0.0002)

    def abort(self, reason: str) -> NoReturn:
        """Say why on the real standard error, and end all ranks."""
        os.write(REAL_STDERR, f"\n[rank {self.rank}] {reason}\n[rank {self.rank}] aborting all ranks\n".encode())
        time.sleep(0.2)  # lets the launcher forward the message
        self.comm.Abort(1)
        raise SystemExit(1)


class QuietUnlessTimedOut(io.TextIOBase):
    """Swallows a rank's report, except what the thread of the per-test time limit writes (the stacks)."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if threading.current_thread() is not threading.main_thread():
            os.write(REAL_STDERR, text.encode())
        return len(text)


# ---- hooks

REAL_STDERR = 2  # replaced by a copy of it in pytest_configure, before tests' output is captured


@pytest.hookimpl(trylast=True)  # after the terminal reporter is there
def pytest_configure(config: pytest.Config) -> None:
    """Under MPI: register the guard, silence all ranks but 0, and show stacks when the launcher ends a rank."""
    global REAL_STDERR
    if not under_mpi(config):
        return
    if on_cuda():
        import support  # noqa: F401  (chooses this rank's GPU before anything uses one)
    REAL_STDERR = os.dup(2)
    faulthandler.register(signal.SIGTERM, file=REAL_STDERR, all_threads=True, chain=True)
    guard = RanksInStep()
    config.pluginmanager.register(guard, "ranks-in-step")
    if guard.rank != 0:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter._tw._file = QuietUnlessTimedOut()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that uses `comm` is an MPI test; one that starts mpirun itself cannot run under mpirun.

    Those marked `last` come last.
    """
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
    for item in items:
        if "comm" in getattr(item, "fixturenames", ()) and item.get_closest_marker("mpi") is None:
            item.add_marker(pytest.mark.mpi)
        if under_mpi(config) and item.get_closest_marker("launcher") is not None:
            item.add_marker(pytest.mark.skip(reason="starts mpirun itself: run it in a plain pytest process"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the counts where tools/run_tests.py wants them."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    guard = session.config.pluginmanager.get_plugin("ranks-in-step")
    path = os.environ.get("HPC_MOE_TEST_SUMMARY")
    if path and reporter is not None and (guard is None or guard.rank == 0):
        stats = {key: len(reports) for key, reports in reporter.stats.items()}
        counts = {
            "passed": sum(stats.get(key, 0) for key in ("passed", "xfailed", "xpassed")),
            "failed": stats.get("failed", 0) + stats.get("error", 0),
            "skipped": stats.get("skipped", 0),
        }
        Path(path).write_text(json.dumps(counts))


def pytest_unconfigure(config: pytest.Config) -> None:
    """MPI_Finalize, which comes next, may wait for a rank that a failed test left behind: bound it."""
    if under_mpi(config):
        faulthandler.dump_traceback_later(STEP_LIMIT, exit=True, file=REAL_STDERR)


def under_mpi(config: pytest.Config) -> bool:
    """Whether this is one rank of an MPI run of the tests."""
    return bool(config.getoption("--with-mpi") or config.getoption("--only-mpi"))
