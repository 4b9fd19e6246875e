"""NVSHMEM starts with the values that hpc_moe.nvshmem_env decided on: read back from NVSHMEM itself, on a GPU.

The options of its host library are in what it prints with NVSHMEM_INFO=1; what its transports and its bootstrap read
for themselves is read by `getenv`, just before the start; and debug lines show whether it tried IBGDA. Each test starts
tests/programs/nvshmem_environment.py on one rank, because NVSHMEM starts only once in a process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import cuda_only, needs_low_latency

from hpc_moe import nvshmem_env
from hpc_moe.nvshmem_env import Plan

PROGRAM = Path(__file__).parent / "programs" / "nvshmem_environment.py"
# Variables that the host library does not know, and so does not print.
NOT_PRINTED = {
    "NVSHMEM_IBGDA_NIC_HANDLER",
    "NVSHMEM_IBGDA_NUM_RC_PER_PE",
    "NVSHMEM_QP_DEPTH",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME",
}
# Of what NVSHMEM says with NVSHMEM_DEBUG=INFO, or in any case. The file is named where it cannot be opened, because the
# network driver's library is missing, say.
IBGDA_WAS_TRIED = ("initialized the transport: IBGDA", "init failed for transport: IBGDA", "nvshmem_transport_ibgda.so")
IBGDA_WAS_NOT_TRIED = "IBGDA Disabled by the environment"

gpu_test = [pytest.mark.gpu, pytest.mark.launcher, cuda_only, needs_low_latency]


@dataclass(frozen=True)
class Option:
    """A variable as NVSHMEM prints it: its value, its type (bool, int, long, size, string), and its default."""

    value: str
    kind: str
    default: str

    def is_equal(self, text: str) -> bool:
        """Whether the variable has this value if the environment says `text`."""
        if self.kind == "string":
            return self.value == text
        if self.kind == "bool":
            return self.value == ("true" if nvshmem_env.parse_bool("", text) else "false")
        if self.kind == "size":
            return int(self.value) == nvshmem_env.parse_size("", text)
        return int(self.value) == nvshmem_env.parse_int("", text)


def printed_options(text: str) -> dict[str, Option]:
    """The options in what NVSHMEM printed with NVSHMEM_INFO=1, by the names of their variables."""
    found = {}
    pattern = r"^\s*(NVSHMEM_\w+)[\s=]+(.*?) \(type: (\w+), default: (.*)\)\s*$"
    for name, value, kind, default in re.findall(pattern, text, re.MULTILINE):
        found[name] = Option(value.strip('"'), kind, default.strip('"'))
    return found


@dataclass
class Start:
    """What is known of a start of NVSHMEM.

    Attributes:
        plan: what should have been decided.
        environment: what C code saw before it.
        text: stdout and stderr of the process.
        succeeded: whether the process did.
    """

    plan: Plan
    environment: dict[str, str | None]
    text: str
    succeeded: bool

    def check_environment(self) -> None:
        assert self.environment == {setting.name: setting.value for setting in self.plan}, self.text

    def check_printed(self) -> None:
        printed = printed_options(self.text)
        assert set(nvshmem_env.VARIABLES) - set(printed) <= NOT_PRINTED, self.text
        for setting in self.plan:
            option = printed.get(setting.name)
            if option is None:
                continue
            if setting.value is None:
                assert option.value == option.default, (setting, option, self.text)
            else:
                assert option.is_equal(setting.value), (setting, option, self.text)

    def check_ibgda(self) -> None:
        wanted = self.plan["NVSHMEM_IB_ENABLE_IBGDA"].value == "1"
        assert any(line in self.text for line in IBGDA_WAS_TRIED) == wanted, self.text
        assert (IBGDA_WAS_NOT_TRIED in self.text) != wanted, self.text


Run = Callable[..., Start]


@pytest.fixture
def run(
    mpirun: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """`run(environ, **arguments)`: start NVSHMEM with these variables set by the user, for a buffer's arguments."""

    def start(environ: dict[str, str], **arguments: Any) -> Start:
        for name in nvshmem_env.VARIABLES:
            if name != "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME":  # this machine may need it
                monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        shows = {
            "NVSHMEM_INFO": "1",
            "NVSHMEM_INFO_HIDDEN": "1",
            "NVSHMEM_DEBUG": "INFO",
            "NVSHMEM_DEBUG_SUBSYS": "INIT",
        }
        file = tmp_path / "seen.json"
        done = mpirun(1, PROGRAM, file, json.dumps(arguments), env=shows)
        text = done.stdout + done.stderr
        assert file.exists(), text
        seen = json.loads(file.read_text())
        fabric = nvshmem_env.detect_fabric(nvshmem_version=tuple(seen["version"]))
        plan = nvshmem_env.plan(environ=os.environ, fabric=fabric, low_latency_mode=True, **arguments)
        return Start(plan, seen["environment"], text, done.returncode == 0)

    return start


# --- in any process --------------------------------------------------------------------------------------------------

# By the formats in the host libraries of 3.4.5 and 3.8.0.
PRINTED = """\
NVSHMEM v3.4.5

Standard options:
  NVSHMEM_SYMMETRIC_SIZE       1073741824 (type: size, default: 1073741824)
\tSpecifies the size (in bytes) of the symmetric heap memory per PE. (The default is
\tlarge.)
  NVSHMEM_DEBUG                "INFO" (type: string, default: "")
\tSet to enable debugging messages.
host:1:2 [0] NVSHMEM INFO NVSHMEM_DISABLE_P2P is unset (type: unknown)

Transport options:
  NVSHMEM_IB_ENABLE_IBGDA      true (type: bool, default: false)
\tSet to enable GPU-initiated communication transport.
  NVSHMEM_ENABLE_NIC_PE_MAPPING false (type: bool, default: false)
  NVSHMEM_MAX_TEAMS            7 (type: long, default: 32)
"""


def test_printed_options() -> None:
    assert printed_options(PRINTED) == {
        "NVSHMEM_SYMMETRIC_SIZE": Option("1073741824", "size", "1073741824"),
        "NVSHMEM_DEBUG": Option("INFO", "string", ""),
        "NVSHMEM_IB_ENABLE_IBGDA": Option("true", "bool", "false"),
        "NVSHMEM_ENABLE_NIC_PE_MAPPING": Option("false", "bool", "false"),
        "NVSHMEM_MAX_TEAMS": Option("7", "long", "32"),
    }


@pytest.mark.parametrize(
    ("value", "kind", "same", "other"),
    [
        ("true", "bool", "1", "0"),
        ("false", "bool", "no", "yes"),
        ("1073741824", "size", "1G", "1M"),
        ("7", "long", "0x7", "8"),
        ("ibrc", "string", "ibrc", "ucx"),
    ],
)
def test_equal_options(value: str, kind: str, same: str, other: str) -> None:
    option = Option(value, kind, "")
    assert option.is_equal(same) and not option.is_equal(other)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(*cases: tuple[dict[str, str], dict[str, Any]]) -> list[Any]:
    return [pytest.param(*case, id=" ".join([*case[0], *case[1]]) or "nothing", marks=gpu_test) for case in cases]


@pytest.mark.parametrize(
    ("environ", "arguments"),
    on_gpu(
        ({}, {}),
        ({}, {"num_qps_per_rank": 20, "allow_mnnvl": True}),
        ({"NVSHMEM_QP_DEPTH": "2048", "NVSHMEM_CUMEM_GRANULARITY": "1G", "NVSHMEM_DISABLE_NVLS": "0"}, {}),
        ({"NVSHMEM_MAX_TEAMS": "2", "NVSHMEM_DISABLE_P2P": "1"}, {}),  # changed, both of them
        ({"NVSHMEM_IB_ENABLE_IBGDA": "0"}, {}),
    ),
)
def test_it_starts_with_what_was_decided(run: Run, environ: dict[str, str], arguments: dict[str, Any]) -> None:
    start = run(environ, **arguments)
    assert start.succeeded, start.text
    start.check_environment()
    start.check_printed()
    start.check_ibgda()


@pytest.mark.parametrize(
    ("environ", "arguments"),
    on_gpu(
        ({"NVSHMEM_IB_ENABLE_IBGDA": "1"}, {}),
        ({"NVSHMEM_IB_ENABLE_IBGDA": "1"}, {"allow_nvlink_for_low_latency_mode": False}),  # pure RDMA
    ),
)
def test_it_tries_ibgda_if_told_to(run: Run, environ: dict[str, str], arguments: dict[str, Any]) -> None:
    """Where there is no such network, NVSHMEM may not start."""
    start = run(environ, **arguments)
    start.check_environment()
    start.check_ibgda()
    if start.succeeded:
        start.check_printed()
