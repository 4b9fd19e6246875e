"""`hpc_moe.nvshmem_env`: every row of the plan, every override, malformed values, detection, agreement of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_moe import nvshmem_env
from hpc_moe.errors import ArgumentError
from hpc_moe.nvshmem_env import Fabric, Plan

MELLANOX = Fabric(has_mlx5=True, peer_mapping_override=True, nvshmem_version=(3, 4, 5))


def make_plan(environ: dict[str, str] | None = None, fabric: Fabric = MELLANOX, **arguments: Any) -> Plan:
    return nvshmem_env.plan(environ=environ or {}, fabric=fabric, **arguments)


def check(plan: Plan, name: str, value: str | None, source: str) -> None:
    setting = plan["NVSHMEM_" + name]
    assert (setting.value, setting.source) == (value, source), setting
    assert setting.why


# --- nothing set by the user -----------------------------------------------------------------------------------------


def test_every_row_of_an_empty_environment() -> None:
    plan = make_plan()
    assert plan.environment() == {
        "NVSHMEM_IB_ENABLE_IBGDA": "1",
        "NVSHMEM_IBGDA_NIC_HANDLER": "gpu",
        "NVSHMEM_IBGDA_NUM_RC_PER_PE": "12",
        "NVSHMEM_QP_DEPTH": "1024",
        "NVSHMEM_DISABLE_P2P": "0",
        "NVSHMEM_CUMEM_GRANULARITY": str(2**29),
        "NVSHMEM_MAX_TEAMS": "7",
        "NVSHMEM_DISABLE_NVLS": "1",
        "NVSHMEM_DISABLE_MNNVL": "1",
    }
    assert plan.warnings == ()
    assert tuple(setting.name for setting in plan) == nvshmem_env.VARIABLES
    assert all(setting.source == ("library" if setting.value else "unset") for setting in plan)


def test_num_qps_per_rank_is_the_number_of_queue_pairs() -> None:
    check(make_plan(num_qps_per_rank=24), "IBGDA_NUM_RC_PER_PE", "24", "library")


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "8"])
def test_num_qps_per_rank_must_be_a_positive_integer(bad: object) -> None:
    with pytest.raises(ArgumentError, match="num_qps_per_rank"):
        make_plan(num_qps_per_rank=bad)


@pytest.mark.parametrize(
    ("low_latency_mode", "allow_nvlink", "value"),
    [(False, True, "0"), (False, False, "0"), (True, True, "0"), (True, False, "1")],
)
def test_p2p_is_disabled_only_in_pure_rdma_mode(low_latency_mode: bool, allow_nvlink: bool, value: str) -> None:
    plan = make_plan(low_latency_mode=low_latency_mode, allow_nvlink_for_low_latency_mode=allow_nvlink)
    check(plan, "DISABLE_P2P", value, "library")


def test_allow_mnnvl_enables_it() -> None:
    check(make_plan(allow_mnnvl=True), "DISABLE_MNNVL", "0", "library")


def test_without_mlx5_there_is_no_ibgda() -> None:
    plan = make_plan(fabric=Fabric())
    check(plan, "IB_ENABLE_IBGDA", "0", "library")
    assert "not used without IBGDA" in plan["NVSHMEM_IBGDA_NUM_RC_PER_PE"].why


@pytest.mark.parametrize(("override", "handler"), [(True, "gpu"), (None, "gpu"), (False, "auto")])
def test_nic_handler_follows_the_driver(override: bool | None, handler: str) -> None:
    plan = make_plan(fabric=Fabric(has_mlx5=True, peer_mapping_override=override))
    check(plan, "IBGDA_NIC_HANDLER", handler, "library")
    assert ("PeerMappingOverride=1" in plan["NVSHMEM_IBGDA_NIC_HANDLER"].why) == (override is False)


@pytest.mark.parametrize(
    ("version", "teams"),
    [
        ((3, 1, 7), "7"),
        ((3, 4, 5), "7"),
        ((3, 5, 19), "7"),
        ((3, 6, 5), "7"),
        ((3, 7, 0), "8"),
        ((3, 7, 2), "8"),
        ((3, 8, 0), "8"),
        ((4, 0, 0), "8"),
        (None, "8"),
    ],
)
def test_max_teams_is_one_more_than_the_version_makes(version: tuple[int, int, int] | None, teams: str) -> None:
    check(make_plan(fabric=Fabric(nvshmem_version=version)), "MAX_TEAMS", teams, "library")


# --- user values that stay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REMOTE_TRANSPORT", "ibrc"),
        ("IB_ENABLE_IBGDA", "0"),
        ("IB_ENABLE_IBGDA", "no"),
        ("IB_ENABLE_IBGDA", "true"),
        ("IBGDA_NIC_HANDLER", "cpu"),
        ("IBGDA_NIC_HANDLER", "auto"),
        ("IBGDA_NIC_HANDLER", "cpu_host_memory"),
        ("IBGDA_NUM_RC_PER_PE", "3"),
        ("IBGDA_NUM_RC_PER_PE", "0"),
        ("QP_DEPTH", "2048"),
        ("QP_DEPTH", "0x800"),
        ("QP_DEPTH", "100"),  # rounded up to 128 by IBGDA
        ("QP_DEPTH", "32768"),
        ("DISABLE_P2P", "0"),
        ("DISABLE_P2P", "false"),
        ("CUMEM_GRANULARITY", str(2**28)),
        ("CUMEM_GRANULARITY", "1g"),
        ("CUMEM_GRANULARITY", "0.5G"),
        ("MAX_TEAMS", "7"),
        ("MAX_TEAMS", "128"),
        ("DISABLE_NVLS", "0"),
        ("DISABLE_MNNVL", "0"),
        ("BOOTSTRAP_UID_SOCK_IFNAME", "hsn0"),
    ],
)
def test_a_user_value_stays(name: str, value: str) -> None:
    plan = make_plan({"NVSHMEM_" + name: value})
    check(plan, name, value, "user")
    assert plan.warnings == ()
    assert plan["NVSHMEM_" + name].user_value == value


def test_user_asks_for_ibgda_without_mlx5_and_is_warned() -> None:
    plan = make_plan({"NVSHMEM_IB_ENABLE_IBGDA": "1"}, fabric=Fabric())
    check(plan, "IB_ENABLE_IBGDA", "1", "user")
    assert len(plan.warnings) == 1 and "mlx5" in plan.warnings[0]


def test_user_disables_mnnvl_against_the_argument_and_is_warned() -> None:
    plan = make_plan({"NVSHMEM_DISABLE_MNNVL": "1"}, allow_mnnvl=True)
    check(plan, "DISABLE_MNNVL", "1", "user")
    assert "allow_mnnvl" in plan.warnings[0]


def test_pure_rdma_agrees_with_the_user() -> None:
    plan = make_plan({"NVSHMEM_DISABLE_P2P": "1"}, low_latency_mode=True, allow_nvlink_for_low_latency_mode=False)
    check(plan, "DISABLE_P2P", "1", "user")
    assert plan.warnings == ()


def test_qp_depth_is_the_users_where_ibgda_is_off() -> None:
    check(make_plan({"NVSHMEM_QP_DEPTH": "16"}, fabric=Fabric()), "QP_DEPTH", "16", "user")


# --- user values that break correctness ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "changed_to"),
    [
        ("QP_DEPTH", "64", "1024"),
        ("QP_DEPTH", "40000", "32768"),
        ("DISABLE_P2P", "1", "0"),
        ("CUMEM_GRANULARITY", "2m", str(2**29)),
        ("CUMEM_GRANULARITY", str(2**28 - 1), str(2**29)),
        ("CUMEM_GRANULARITY", "300M", str(2**29)),
        ("MAX_TEAMS", "6", "7"),
    ],
)
def test_a_value_that_breaks_correctness_is_changed_with_a_warning(name: str, value: str, changed_to: str) -> None:
    plan = make_plan({"NVSHMEM_" + name: value})
    check(plan, name, changed_to, "changed")
    assert plan["NVSHMEM_" + name].user_value == value
    assert len(plan.warnings) == 1
    for part in ("NVSHMEM_" + name, repr(value), repr(changed_to), plan["NVSHMEM_" + name].why):
        assert part in plan.warnings[0]


def test_p2p_in_pure_rdma_mode_is_changed() -> None:
    plan = make_plan({"NVSHMEM_DISABLE_P2P": "0"}, low_latency_mode=True, allow_nvlink_for_low_latency_mode=False)
    check(plan, "DISABLE_P2P", "1", "changed")
    assert "allow_nvlink_for_low_latency_mode" in plan.warnings[0]


def test_gpu_handler_that_the_driver_forbids_is_changed() -> None:
    fabric = Fabric(has_mlx5=True, peer_mapping_override=False, nvshmem_version=(3, 4, 5))
    plan = make_plan({"NVSHMEM_IBGDA_NIC_HANDLER": "gpu"}, fabric)
    check(plan, "IBGDA_NIC_HANDLER", "auto", "changed")
    assert "PeerMappingOverride" in plan.warnings[0]


def test_max_teams_that_suffice_for_an_older_version_are_changed() -> None:
    plan = make_plan({"NVSHMEM_MAX_TEAMS": "7"}, Fabric(nvshmem_version=(3, 8, 0)))
    check(plan, "MAX_TEAMS", "8", "changed")
    assert "3.8.0" in plan.warnings[0]


# --- another transport -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["libfabric", "UCX", "ibdevx", "gpunetio", "none"])
def test_another_transport_is_respected_without_ibgda(transport: str) -> None:
    plan = make_plan({"NVSHMEM_REMOTE_TRANSPORT": transport})
    check(plan, "REMOTE_TRANSPORT", transport, "user")
    check(plan, "IB_ENABLE_IBGDA", "0", "library")
    assert transport in plan["NVSHMEM_IB_ENABLE_IBGDA"].why
    assert plan.warnings == ()


def test_ibgda_together_with_another_transport_is_changed() -> None:
    plan = make_plan({"NVSHMEM_REMOTE_TRANSPORT": "libfabric", "NVSHMEM_IB_ENABLE_IBGDA": "1"})
    check(plan, "IB_ENABLE_IBGDA", "0", "changed")
    assert "libfabric" in plan.warnings[0]


def test_ibgda_turned_off_with_another_transport_stays_the_users() -> None:
    plan = make_plan({"NVSHMEM_REMOTE_TRANSPORT": "libfabric", "NVSHMEM_IB_ENABLE_IBGDA": "0"})
    check(plan, "IB_ENABLE_IBGDA", "0", "user")


def test_an_unknown_transport_is_kept_with_a_warning() -> None:
    plan = make_plan({"NVSHMEM_REMOTE_TRANSPORT": "ibgda"})
    check(plan, "REMOTE_TRANSPORT", "ibgda", "user")
    assert "ibgda" in plan.warnings[0]


# --- malformed values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REMOTE_TRANSPORT", ""),
        ("IB_ENABLE_IBGDA", ""),
        ("IB_ENABLE_IBGDA", "off"),  # true to NVSHMEM
        ("IB_ENABLE_IBGDA", "2"),
        ("IBGDA_NIC_HANDLER", "gpus"),
        ("IBGDA_NUM_RC_PER_PE", "many"),
        ("IBGDA_NUM_RC_PER_PE", "-1"),
        ("IBGDA_NUM_RC_PER_PE", "4.5"),
        ("QP_DEPTH", ""),
        ("QP_DEPTH", "1k"),
        ("QP_DEPTH", "0"),
        ("DISABLE_P2P", "maybe"),
        ("CUMEM_GRANULARITY", "512MB"),
        ("CUMEM_GRANULARITY", "-1"),
        ("MAX_TEAMS", "seven"),
        ("DISABLE_NVLS", "off"),
        ("DISABLE_MNNVL", "x"),
    ],
)
def test_a_malformed_value_is_an_error_that_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make_plan({"NVSHMEM_" + name: value})
    assert "NVSHMEM_" + name in str(caught.value)
    if value:
        assert repr(value) in str(caught.value)


# --- purity and application ------------------------------------------------------------------------------------------


def test_a_plan_reads_its_arguments_only(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"NVSHMEM_QP_DEPTH": "64", "OTHER": "1"}
    monkeypatch.setenv("NVSHMEM_MAX_TEAMS", "99")
    before = dict(os.environ)
    first = make_plan(environ)
    assert environ == {"NVSHMEM_QP_DEPTH": "64", "OTHER": "1"}
    assert dict(os.environ) == before
    assert first == make_plan(environ)
    check(first, "MAX_TEAMS", "7", "library")


def test_apply_sets_the_plan_and_nothing_else() -> None:
    environ = {"NVSHMEM_QP_DEPTH": "64", "OTHER": "1", "NVSHMEM_DEBUG": "WARN"}
    plan = make_plan(environ)
    nvshmem_env.apply(plan, environ)
    assert environ == {"OTHER": "1", "NVSHMEM_DEBUG": "WARN", **plan.environment()}
    assert "NVSHMEM_REMOTE_TRANSPORT" not in environ


def test_apply_reaches_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in nvshmem_env.VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    nvshmem_env.apply(make_plan())
    assert os.environ["NVSHMEM_DISABLE_NVLS"] == "1"
    for name in make_plan().environment():
        monkeypatch.delenv(name)


def test_a_plan_of_an_applied_plan_is_the_same() -> None:
    environ = {"NVSHMEM_DISABLE_P2P": "1"}
    nvshmem_env.apply(make_plan(environ), environ)
    again = make_plan(environ)
    assert again.environment() == make_plan({"NVSHMEM_DISABLE_P2P": "1"}).environment()
    assert again.warnings == ()


def test_the_module_needs_neither_torch_nor_mpi4py() -> None:
    package = Path(nvshmem_env.__file__).parent
    code = (
        "import sys, types\n"
        "package = sys.modules['hpc_moe'] = types.ModuleType('hpc_moe')\n"
        f"package.__path__ = [{str(package)!r}]\n"
        "import hpc_moe.nvshmem_env as module\n"
        "module.plan(environ={}, fabric=module.detect_fabric())\n"
        "print(sorted({'torch', 'mpi4py', 'numpy', 'nvshmem'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# --- agreement of ranks ----------------------------------------------------------------------------------------------


def test_equal_plans_have_equal_encodings_whatever_the_source() -> None:
    library, user = make_plan(), make_plan({"NVSHMEM_QP_DEPTH": "1024"})
    assert library.encode() == user.encode()
    assert library.digest() == user.digest()
    assert len(library.encode()) == nvshmem_env.ENCODED_BYTES
    assert nvshmem_env.differences([library.encode(), user.encode()]) == []


def test_the_network_interface_may_differ() -> None:
    assert make_plan({"NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "ib0"}).digest() == make_plan().digest()


def test_differences_name_the_variable_the_values_and_the_ranks() -> None:
    plans = [make_plan(), make_plan({"NVSHMEM_QP_DEPTH": "2048"}), make_plan(), make_plan(fabric=Fabric())]
    lines = nvshmem_env.differences([plan.encode() for plan in plans])
    assert lines == [
        'NVSHMEM_IB_ENABLE_IBGDA is "1" on ranks 0, 1, 2 but "0" on rank 3',
        'NVSHMEM_QP_DEPTH is "1024" on ranks 0, 2, 3 but "2048" on rank 1',
        'NVSHMEM_MAX_TEAMS is "7" on ranks 0, 1, 2 but "8" on rank 3',
    ]


def test_long_and_unset_values_differ_too() -> None:
    plans = [make_plan({"NVSHMEM_REMOTE_TRANSPORT": "x" * 40 + end}) for end in "ab"]
    assert plans[0].digest() != plans[1].digest()
    lines = nvshmem_env.differences([plans[0].encode(), make_plan().encode()])
    assert any("NVSHMEM_REMOTE_TRANSPORT" in line and "unset on rank 1" in line for line in lines)


def test_differences_reject_other_lengths() -> None:
    with pytest.raises(ArgumentError, match="rank 1"):
        nvshmem_env.differences([make_plan().encode(), b"short"])


# --- detection -------------------------------------------------------------------------------------------------------


def fake_host(
    root: Path, devices: dict[str, str] | None = None, params: str | None = None, conf: str | None = None
) -> Fabric:
    """A host with `devices` (name -> driver), driver parameters and a configuration file, under `root`."""
    (root / "etc").mkdir()
    for name, driver in (devices or {}).items():
        target = root / "sys" / "bus" / "pci" / "drivers" / driver
        target.mkdir(parents=True, exist_ok=True)
        device = root / "sys" / "class" / "infiniband" / name / "device"
        device.mkdir(parents=True)
        (device / "driver").symlink_to(target)
    if params is not None:
        (root / "proc" / "driver" / "nvidia").mkdir(parents=True)
        (root / "proc" / "driver" / "nvidia" / "params").write_text(params)
    if conf is not None:
        (root / "etc" / "nvshmem.conf").write_text(conf)
    return detect(root)


def detect(root: Path, environ: dict[str, str] | None = None, version: tuple[int, int, int] = (3, 8, 0)) -> Fabric:
    return nvshmem_env.detect_fabric(
        nvshmem_version=version,
        environ=environ or {},
        sys_root=root / "sys",
        proc_root=root / "proc",
        etc_root=root / "etc",
    )


def test_a_laptop_has_nothing(tmp_path: Path) -> None:
    assert fake_host(tmp_path) == Fabric(nvshmem_version=(3, 8, 0))


def test_mlx5_devices_are_found_by_name(tmp_path: Path) -> None:
    assert fake_host(tmp_path, {"mlx5_0": "mlx5_core", "mlx5_1": "mlx5_core"}).has_mlx5


def test_other_networks_are_not_mlx5(tmp_path: Path) -> None:
    fabric = fake_host(tmp_path, {"cxi0": "cxi_ss1", "efa_0": "efa", "hfi1_0": "hfi1", "bnxt_re0": "bnxt_re"})
    assert fabric == Fabric(nvshmem_version=(3, 8, 0))


def test_renamed_mlx5_devices_need_the_prefix(tmp_path: Path) -> None:
    fabric = fake_host(tmp_path, {"ibp12s0": "mlx5_core"})
    assert not fabric.has_mlx5
    assert "ibp12s0" in fabric.notes[0] and "NVSHMEM_HCA_PREFIX" in fabric.notes[0]
    assert make_plan(fabric=fabric).warnings == fabric.notes
    assert detect(tmp_path, {"NVSHMEM_HCA_PREFIX": "ibp"}) == Fabric(has_mlx5=True, nvshmem_version=(3, 8, 0))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, None),
        ('EnableMSI: 1\nRegistryDwords: ""\n', False),
        ('EnableMSI: 1\nRegistryDwords: "PeerMappingOverride=1;"\n', True),
        ('RegistryDwords: "RMForceX=3;PeerMappingOverride=0x1"\n', True),
        ('RegistryDwords: "PeerMappingOverride=0;"\n', False),
        ("PeerMappingOverride: 1\n", True),
    ],
)
def test_peer_mapping_override(tmp_path: Path, params: str | None, expected: bool | None) -> None:
    assert fake_host(tmp_path, params=params).peer_mapping_override is expected


def test_configuration_files_of_nvshmem_are_pointed_out(tmp_path: Path) -> None:
    fabric = fake_host(tmp_path, conf="# site\nNVSHMEM_QP_DEPTH = 16\nNVSHMEM_DEBUG=WARN\nnonsense\n")
    assert len(fabric.notes) == 1 and "NVSHMEM_QP_DEPTH=16" in fabric.notes[0]
    assert detect(tmp_path, version=(3, 4, 5)).notes == ()  # read from 3.6.5 on
    (tmp_path / ".nvshmem.conf").write_text("NVSHMEM_MAX_TEAMS=3\n")
    (tmp_path / "mine").write_text("NVSHMEM_DISABLE_P2P=1\n")
    notes = detect(tmp_path, {"HOME": str(tmp_path), "NVSHMEM_CONF_FILE": str(tmp_path / "mine")}).notes
    assert [note.split(" sets ")[1].split("=")[0] for note in notes] == [
        "NVSHMEM_QP_DEPTH",
        "NVSHMEM_MAX_TEAMS",
        "NVSHMEM_DISABLE_P2P",
    ]


def test_this_machine_can_be_detected() -> None:
    make_plan(fabric=nvshmem_env.detect_fabric())


@pytest.mark.parametrize(("text", "version"), [("3.4.5", (3, 4, 5)), ("3.5", (3, 5, 0)), ("3.8.0rc1", (3, 8, 0))])
def test_versions_are_parsed(text: str, version: tuple[int, int, int]) -> None:
    assert nvshmem_env.parse_version(text) == version


def test_a_version_without_numbers_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="unknown"):
        nvshmem_env.parse_version("unknown")


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_table_shows_every_setting_and_warning_within_the_width(width: int) -> None:
    plan = make_plan({"NVSHMEM_DISABLE_P2P": "1", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "hsn0"})
    text = nvshmem_env.render(plan, width)
    for setting in plan:
        assert setting.name in text
        assert setting.value is None or setting.value in text
    assert "warning: NVSHMEM_DISABLE_P2P was '1', now '0'" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= max(width, 72)
