"""`hpc_moe._nvshmem` here: what can be known of it without a GPU. What it is for is in tests/test_nvshmem_world.py.

Each test runs a process of its own: a wrong call of NVSHMEM ends the process that makes it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpc_moe import _C
from hpc_moe.nvshmem_env import parse_version

pytestmark = pytest.mark.skipif(
    not _C.nvshmem_build_version, reason="hpc_moe._nvshmem is not built: no NVSHMEM was found, or no CUDA"
)


def run(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the script, with the module as `n`, in a process that sees no GPU."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("NVSHMEM_")}
    env.update({"CUDA_VISIBLE_DEVICES": "", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo"}, **environ)
    line = [sys.executable, "-c", f"from hpc_moe import _nvshmem as n\n{script}"]
    return subprocess.run(line, env=env, capture_output=True, text=True, check=False, timeout=60)


def output(script: str, **environ: str) -> str:
    done = run(script, **environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_can_be_imported_without_a_driver_and_is_not_running() -> None:
    assert output("print(n.is_running())") == "False"


def test_it_was_built_with_what_the_core_says() -> None:
    assert output("print(n.built_version())") == str(parse_version(_C.nvshmem_build_version))
    assert output("import os; print(os.path.isabs(n.built_path()))") == "True"


def test_the_version_and_the_file_that_are_loaded() -> None:
    version, path = output("print(n.loaded_version(), n.loaded_path(), sep='\\n')").splitlines()
    assert version.startswith("(3, ")
    assert os.path.basename(path) == "libnvshmem_host.so.3" and os.path.isfile(path)


def test_variables_set_in_python_reach_c() -> None:
    script = "import os; os.environ['NVSHMEM_QP_DEPTH'] = '77'; del os.environ['NVSHMEM_OWN']; "
    script += "print(n.environment(['NVSHMEM_QP_DEPTH', 'NVSHMEM_OWN', 'HOME']))"
    assert output(script, NVSHMEM_OWN="1", HOME="/h") == str(
        {"HOME": "/h", "NVSHMEM_OWN": None, "NVSHMEM_QP_DEPTH": "77"}
    )


def test_a_unique_id_needs_no_gpu() -> None:
    assert output("a, b = n.get_unique_id(), n.get_unique_id(); print(len(a), len(b))") == "128 128"


@pytest.mark.parametrize(
    "call",
    ["my_pe()", "n_pes()", "malloc(8, -1)", "free(0, -1)", "create_queue_pairs(1, -1)", "ptr(0, 0)", "finalize(-1)"],
)
def test_what_would_end_the_process_before_the_start_is_an_exception(call: str) -> None:
    script = f"try:\n n.{call}\nexcept RuntimeError as error:\n print(error)"
    assert "NVSHMEM is not running in this process" in output(script)


def test_a_wrong_unique_id_is_an_exception() -> None:
    script = "try:\n n.init(b'short', 0, 1, -1)\nexcept ValueError as error:\n print(error)"
    assert output(script) == "unique_id must have 128 bytes; got 5"


@pytest.mark.parametrize(("device", "reason"), [(0, "choosing the device failed"), (-1, "starting NVSHMEM failed")])
def test_a_start_without_a_gpu_is_an_exception(device: int, reason: str) -> None:
    """With -1 NVSHMEM itself fails, and versions differ in whether they return that."""
    script = f"try:\n n.init(n.get_unique_id(), 0, 1, {device})\nexcept RuntimeError as error:\n print(error)\n"
    script += "print(n.is_running())"
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(reason) and done.stdout.endswith("False\n")


def test_what_it_wrote_is_part_of_the_error_of_a_world() -> None:
    script = """
from hpc_moe._backends.cuda import nvshmem
from hpc_moe.errors import BootstrapError
try:
    nvshmem._start(n, n.get_unique_id(), 0, 1, -1, 60.0)
except BootstrapError as error:
    print(error)
"""
    done = run(script)
    assert done.returncode == 0, done.stderr
    for part in ("as PE 0 of 1: starting NVSHMEM failed", "NVSHMEM_DEBUG=INFO", "NVSHMEM_REMOTE_TRANSPORT"):
        assert part in done.stdout
    wrote = done.stderr.strip()  # 3.4.5 writes nothing, 3.8.0 does
    assert (wrote[-200:] if wrote else "It wrote nothing") in done.stdout
