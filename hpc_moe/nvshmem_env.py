"""The environment that NVSHMEM starts with: what is set, to what, where each value came from, and why.

NVSHMEM reads its options once, when the root asks for the unique ID, from environment variables. `plan` decides their
values as a pure function of (arguments, environment, devices), so that a test and `hpc_moe doctor` can call it where
there is neither a GPU nor NVSHMEM. `apply` then sets them. A value that the user has set stays, unless it breaks
correctness: then a warning says what was changed and why.

Not for: starting NVSHMEM, or exchanging anything between ranks. `Plan.encode` gives fixed-size bytes for the caller to
allgather, and `differences` reads them. Imports neither torch nor mpi4py nor NVSHMEM.

Facts about NVSHMEM used here come from the headers in the wheels `nvidia-nvshmem-cu12` 3.1.7 to 3.8.0 and from its
environment variable reference (https://docs.nvidia.com/nvshmem/api/gen/env.html); each is stated where it is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import textwrap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from hpc_moe.errors import ArgumentError

Version = tuple[int, int, int]
Source = Literal["library", "user", "changed", "unset"]

VARIABLES = (
    "NVSHMEM_REMOTE_TRANSPORT",
    "NVSHMEM_IB_ENABLE_IBGDA",
    "NVSHMEM_IBGDA_NIC_HANDLER",
    "NVSHMEM_IBGDA_NUM_RC_PER_PE",
    "NVSHMEM_QP_DEPTH",
    "NVSHMEM_DISABLE_P2P",
    "NVSHMEM_CUMEM_GRANULARITY",
    "NVSHMEM_MAX_TEAMS",
    "NVSHMEM_DISABLE_NVLS",
    "NVSHMEM_DISABLE_MNNVL",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME",
)
"""Every variable of a plan, in the order of its settings and of its encoding."""

# Network interfaces are named by each host, so this one may differ between ranks.
_PER_HOST = "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"

QP_DEPTH = 1024
CUMEM_GRANULARITY = 2**29
_CUMEM_GRANULARITY_MIN = 2**28  # NVSHMEM's initialisation allocates 256 MiB in one piece

# NVSHMEMI_IBGDA_{MIN,MAX}_QP_DEPTH in device_host_transport/nvshmem_common_ibgda.h, the same from 3.1.7 to 3.8.0. IBGDA
# rounds the depth up to a power of two first, and refuses to start outside of these.
_QP_DEPTH_MIN, _QP_DEPTH_MAX = 128, 32768

# Teams that NVSHMEM makes for itself: NVSHMEM_TEAMS_MIN in device_host/nvshmem_common.cuh is 6 in 3.1.7, 3.4.5, 3.5.19
# and 3.6.5 (world, shared, node, same_mype_node, same_gpu, gpu_leaders) and 7 in 3.7.0, 3.7.2 and 3.8.0 (mc_shared).
_DEFAULT_TEAMS: tuple[tuple[Version, int], ...] = (((3, 7, 0), 7), ((0, 0, 0), 6))

# What the reference lists for NVSHMEM_REMOTE_TRANSPORT. `ibrc` is NVSHMEM's default and serves the CPU's own transfers
# beside IBGDA, so naming it is not a wish for another transport.
_DEFAULT_TRANSPORT = "ibrc"
_TRANSPORTS = ("ibrc", "ibdevx", "gpunetio", "ucx", "libfabric", "none")

_NIC_HANDLERS = ("auto", "gpu", "cpu", "cpu_host_memory")  # what the IBGDA transport of 3.4.5 to 3.8.0 accepts

# NVSHMEM takes any value of a boolean as true unless it begins with 0, n or f: "off" and the empty string mean true.
# Only words that mean the same to a reader and to NVSHMEM are let through.
_TRUE_WORDS, _FALSE_WORDS = ("1", "y", "yes", "t", "true", "on"), ("0", "n", "no", "f", "false")

_CONFIG_FILES_SINCE: Version = (3, 6, 5)  # release notes of 3.6.5: /etc/nvshmem.conf and others, preferred to variables


@dataclass(frozen=True)
class Fabric:
    """What a plan needs to know about a host's devices. `detect_fabric` fills one in.

    Attributes:
        has_mlx5: whether NVSHMEM can see an mlx5 network device here.
        peer_mapping_override: the GPU driver's `PeerMappingOverride`, without which a GPU cannot ring a network
            card's doorbell; None where that is unknown (no driver).
        nvshmem_version: e.g. `(3, 4, 5)`; None where it is unknown.
        notes: what else was seen and may break NVSHMEM, as sentences; a plan repeats them as warnings.
    """

    has_mlx5: bool = False
    peer_mapping_override: bool | None = None
    nvshmem_version: Version | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One variable of a plan.

    Attributes:
        name: the variable.
        value: its final value; None leaves it unset.
        source: `"library"` (set here), `"user"` (kept), `"changed"` (the user's value broke correctness) or `"unset"`.
        why: what the value is for, or why the user's could not stay.
        user_value: what the environment held, None if nothing.
    """

    name: str
    value: str | None
    source: Source
    why: str
    user_value: str | None = None


@dataclass(frozen=True)
class Plan:
    """The environment to start NVSHMEM with: one setting per name in `VARIABLES`, in that order, and warnings."""

    settings: tuple[Setting, ...]
    warnings: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Setting:
        for setting in self.settings:
            if setting.name == name:
                return setting
        raise KeyError(name)

    def __iter__(self) -> Iterator[Setting]:
        return iter(self.settings)

    def environment(self) -> dict[str, str]:
        """The variables to set, with their values."""
        return {setting.name: setting.value for setting in self.settings if setting.value is not None}

    def encode(self) -> bytes:
        """`ENCODED_BYTES` bytes that are equal on two ranks exactly if their plans agree.

        Agreement is about values, not where they came from. The name of the bootstrap's network interface is left out,
        since hosts name their interfaces differently.
        """
        return b"".join(_encode_value(setting.value) for setting in self.settings if setting.name != _PER_HOST)

    def digest(self) -> bytes:
        """32 bytes (SHA-256 of the encoding); shorter to compare, but cannot say what differs."""
        return hashlib.sha256(self.encode()).digest()


# One variable: 8 bytes of hash of the whole value, then up to 24 bytes of its text, padded with zeros.
_RECORD = struct.Struct("8s24s")
_ENCODED_VARIABLES = tuple(name for name in VARIABLES if name != _PER_HOST)
ENCODED_BYTES = _RECORD.size * len(_ENCODED_VARIABLES)
"""Length of `Plan.encode()`, in bytes."""


def plan(
    *,
    low_latency_mode: bool = False,
    num_qps_per_rank: int = 12,
    allow_nvlink_for_low_latency_mode: bool = True,
    allow_mnnvl: bool = False,
    environ: Mapping[str, str],
    fabric: Fabric,
) -> Plan:
    """Decide the environment that NVSHMEM starts with.

    Args:
        low_latency_mode, num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl: as given to `Buffer`.
        environ: the current environment; only read.
        fabric: this host's devices.

    Raises:
        ArgumentError: `num_qps_per_rank` is not at least 1, or a variable that the user has set is malformed; the
            message names it.
    """
    if isinstance(num_qps_per_rank, bool) or not isinstance(num_qps_per_rank, int) or num_qps_per_rank < 1:
        raise ArgumentError(f"num_qps_per_rank must be an integer of at least 1; got {num_qps_per_rank!r}")
    warnings = list(fabric.notes)
    transport = _transport(environ, warnings)
    ibgda = _ibgda(environ, fabric, transport.value, warnings)
    uses_ibgda = ibgda.value is not None and parse_bool(ibgda.name, ibgda.value)
    unused = "" if uses_ibgda else "; not used without IBGDA"
    settings = (
        transport,
        ibgda,
        _nic_handler(environ, fabric, uses_ibgda, unused, warnings),
        _num_rc_per_pe(environ, num_qps_per_rank, unused),
        _qp_depth(environ, uses_ibgda, warnings),
        _disable_p2p(environ, low_latency_mode and not allow_nvlink_for_low_latency_mode, warnings),
        _cumem_granularity(environ, warnings),
        _max_teams(environ, fabric.nvshmem_version, warnings),
        _disable_nvls(environ),
        _disable_mnnvl(environ, allow_mnnvl, warnings),
        _sock_ifname(environ),
    )
    return Plan(settings, tuple(warnings))


def apply(plan: Plan, environ: MutableMapping[str, str] | None = None) -> None:
    """Set the variables of `plan` in `environ` (None: `os.environ`), and nothing else."""
    (os.environ if environ is None else environ).update(plan.environment())


def default_teams(version: Version | None) -> int:
    """The number of teams that NVSHMEM `version` makes for itself; the largest known one if None."""
    if version is None:
        return max(teams for _, teams in _DEFAULT_TEAMS)
    return next(teams for since, teams in _DEFAULT_TEAMS if version >= since)


def differences(encoded: Sequence[bytes]) -> list[str]:
    """What differs between the ranks' plans, a line a variable; empty if they agree.

    Args:
        encoded: `Plan.encode()` of every rank, in rank order.

    Returns:
        Lines such as `NVSHMEM_QP_DEPTH is "1024" on rank 0 but "2048" on ranks 2, 3`.
    """
    for rank, data in enumerate(encoded):
        if len(data) != ENCODED_BYTES:
            raise ArgumentError(f"encoded plan of rank {rank} must have {ENCODED_BYTES} bytes; got {len(data)}")
    lines = []
    for index, name in enumerate(_ENCODED_VARIABLES):
        records = [data[index * _RECORD.size : (index + 1) * _RECORD.size] for data in encoded]
        ranks_of: dict[bytes, list[int]] = {}
        for rank, record in enumerate(records):
            ranks_of.setdefault(record, []).append(rank)
        if len(ranks_of) > 1:
            parts = [f"{_decode_value(record)} on {_rank_list(ranks)}" for record, ranks in ranks_of.items()]
            lines.append(f"{name} is " + " but ".join([parts[0], ", ".join(parts[1:])]))
    return lines


def detect_fabric(
    *,
    nvshmem_version: Version | None = None,
    environ: Mapping[str, str] | None = None,
    sys_root: str | Path = "/sys",
    proc_root: str | Path = "/proc",
    etc_root: str | Path = "/etc",
) -> Fabric:
    """Look at this host's devices.

    Args:
        nvshmem_version: of the library that is loaded; None asks the installed NVSHMEM wheel, without importing it.
        environ: where `NVSHMEM_HCA_PREFIX`, `NVSHMEM_CONF_FILE` and `HOME` are looked up; None: `os.environ`.
        sys_root, proc_root, etc_root: other roots than `/sys`, `/proc` and `/etc`, for tests.

    Missing files are no error: they mean that the device is not there, or that the answer is unknown.
    """
    env = os.environ if environ is None else environ
    version = nvshmem_version or installed_nvshmem_version()
    # NVSHMEM looks for devices by name; this prefix changes which (release notes of 3.4.5).
    prefix = env.get("NVSHMEM_HCA_PREFIX", "mlx5")
    devices = _mlx5_devices(Path(sys_root))
    visible = [name for name in devices if name.startswith(prefix)]
    notes = []
    if devices and not visible:
        notes.append(
            f"the mlx5 network devices are named {', '.join(devices)} here, and NVSHMEM only takes those whose names "
            f'begin with "{prefix}": set NVSHMEM_HCA_PREFIX to the start of their names'
        )
    if version is None or version >= _CONFIG_FILES_SINCE:
        notes.extend(_config_file_notes(env, Path(etc_root)))
    return Fabric(
        has_mlx5=bool(visible),
        peer_mapping_override=_peer_mapping_override(Path(proc_root)),
        nvshmem_version=version,
        notes=tuple(notes),
    )


def installed_nvshmem_version() -> Version | None:
    """The version of the NVSHMEM wheel in this Python environment, None without one. Does not import or load it."""
    for package in ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"):
        try:
            return parse_version(metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    return None


def parse_version(text: str) -> Version:
    """`"3.4.5"` as `(3, 4, 5)`; missing parts are 0."""
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", text)
    if match is None:
        raise ArgumentError(f'a version looks like "3.4.5"; got {text!r}')
    major, minor, patch = (int(part or 0) for part in match.groups())
    return (major, minor, patch)


def render(plan: Plan, width: int | None = None) -> str:
    """A table of the plan for people, then its warnings; `width` columns (None: the terminal's)."""
    columns = max(72, width or shutil.get_terminal_size((100, 24)).columns)
    head = ("variable", "value", "from", "why")
    rows = [
        (setting.name, "-" if setting.value is None else setting.value, setting.source, setting.why) for setting in plan
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
    widths[1] = min(widths[1], 24)
    indent = sum(widths) + 6
    why_width = columns - indent
    if why_width < 36:  # too narrow for four columns: the reasons go below
        indent, why_width = 4, columns - 4
    lines = []
    for number, (name, value, source, why) in enumerate([head, *rows]):
        start = f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source:<{widths[2]}}"
        reasons = textwrap.wrap(why, why_width)
        if indent == 4:
            lines.append(start.rstrip())
        else:
            lines.append(f"{start}  {reasons[0] if reasons else ''}".rstrip())
            reasons = reasons[1:]
        lines.extend(" " * indent + reason for reason in reasons if number)
        if number == 0:
            lines.append("-" * min(columns, indent + why_width))
    for warning in plan.warnings:
        lines.extend(textwrap.wrap(f"warning: {warning}", columns, subsequent_indent=" " * 9))
    return "\n".join(lines)


# --- one function per row of the table -------------------------------------------------------------------------------


def _transport(environ: Mapping[str, str], warnings: list[str]) -> Setting:
    name = "NVSHMEM_REMOTE_TRANSPORT"
    value = environ.get(name)
    if value is None:
        return Setting(name, None, "unset", f"NVSHMEM's default, {_DEFAULT_TRANSPORT}")
    if not value.strip():
        raise ArgumentError(f"{name} is empty; unset it or name one of {', '.join(_TRANSPORTS)}")
    if value.lower() not in _TRANSPORTS:
        warnings.append(f"{name}={value} is none of {', '.join(_TRANSPORTS)}: NVSHMEM may not know it")
    return Setting(name, value, "user", "the network path that you named", value)


def _ibgda(environ: Mapping[str, str], fabric: Fabric, transport: str | None, warnings: list[str]) -> Setting:
    name = "NVSHMEM_IB_ENABLE_IBGDA"
    user = environ.get(name)
    wanted = user is not None and parse_bool(name, user)
    if transport is not None and transport.lower() != _DEFAULT_TRANSPORT:
        why = f"NVSHMEM_REMOTE_TRANSPORT={transport} was asked for, and IBGDA would replace it"
        return _forced(name, "0", user, why, warnings) if wanted else _chosen(name, "0", user, why)
    if user is not None:
        if wanted and not fabric.has_mlx5:
            warnings.append(f"{name}={user} was kept, but this host shows no mlx5 network device")
        return Setting(name, user, "user", "GPU-initiated RDMA" if wanted else "GPU-initiated RDMA, turned off", user)
    if fabric.has_mlx5:
        return Setting(name, "1", "library", "GPU-initiated RDMA")
    return Setting(name, "0", "library", "GPU-initiated RDMA needs an mlx5 network device, and there is none")


def _nic_handler(
    environ: Mapping[str, str], fabric: Fabric, uses_ibgda: bool, unused: str, warnings: list[str]
) -> Setting:
    name = "NVSHMEM_IBGDA_NIC_HANDLER"
    user = environ.get(name)
    if user is not None and user.lower() not in _NIC_HANDLERS:
        raise ArgumentError(f"{name} must be one of {', '.join(_NIC_HANDLERS)}; got {user!r}")
    cannot = (
        "the driver was loaded without PeerMappingOverride=1, so NVSHMEM must be free to let the CPU ring the network "
        'card\'s doorbell (cure: options nvidia NVreg_RegistryDwords="PeerMappingOverride=1;" in /etc/modprobe.d)'
    )
    if fabric.peer_mapping_override is False:
        if user is not None and user.lower() == "gpu" and uses_ibgda:
            return _forced(name, "auto", user, cannot, warnings)
        return _chosen(name, "auto", user, cannot + unused)
    return _chosen(name, "gpu", user, "the GPU rings the network card's doorbell" + unused)


def _num_rc_per_pe(environ: Mapping[str, str], num_qps_per_rank: int, unused: str) -> Setting:
    name = "NVSHMEM_IBGDA_NUM_RC_PER_PE"
    user = environ.get(name)
    if user is not None and parse_int(name, user) < 0:
        raise ArgumentError(f"{name} must not be negative; got {user!r}")
    why = "queue pairs per peer (num_qps_per_rank): parallel sends"
    return _chosen(name, str(num_qps_per_rank), user, why + unused)


def _qp_depth(environ: Mapping[str, str], uses_ibgda: bool, warnings: list[str]) -> Setting:
    name = "NVSHMEM_QP_DEPTH"
    user = environ.get(name)
    why = "slots for requests in flight"
    if user is not None:
        depth = parse_int(name, user)
        if depth < 1:
            raise ArgumentError(f"{name} must be positive; got {user!r}")
        rounded = 1 << (depth - 1).bit_length()
        if uses_ibgda and rounded < _QP_DEPTH_MIN:
            broken = f"IBGDA does not start with fewer than {_QP_DEPTH_MIN} slots"
            return _forced(name, str(QP_DEPTH), user, broken, warnings)
        if uses_ibgda and rounded > _QP_DEPTH_MAX:
            broken = f"IBGDA does not start with more than {_QP_DEPTH_MAX} slots"
            return _forced(name, str(_QP_DEPTH_MAX), user, broken, warnings)
    return _chosen(name, str(QP_DEPTH), user, why)


def _disable_p2p(environ: Mapping[str, str], pure_rdma: bool, warnings: list[str]) -> Setting:
    name = "NVSHMEM_DISABLE_P2P"
    user = environ.get(name)
    value, why = ("1", "pure RDMA: allow_nvlink_for_low_latency_mode=False") if pure_rdma else ("0", "NVLink is used")
    if user is not None and parse_bool(name, user) != pure_rdma:
        broken = (
            "allow_nvlink_for_low_latency_mode=False asks for pure RDMA; pass True to use NVLink"
            if pure_rdma
            else "the kernels reach the peers of a node through NVLink; for pure RDMA create the buffer with "
            "low_latency_mode=True, allow_nvlink_for_low_latency_mode=False"
        )
        return _forced(name, value, user, broken, warnings)
    return _chosen(name, value, user, why)


def _cumem_granularity(environ: Mapping[str, str], warnings: list[str]) -> Setting:
    name = "NVSHMEM_CUMEM_GRANULARITY"
    user = environ.get(name)
    if user is not None:
        size = parse_size(name, user)
        if size < _CUMEM_GRANULARITY_MIN:
            broken = "NVSHMEM's own start needs at least 256 MiB in one piece"
            return _forced(name, str(CUMEM_GRANULARITY), user, broken, warnings)
        if size & (size - 1):
            broken = "NVSHMEM needs a power of two"
            return _forced(name, str(CUMEM_GRANULARITY), user, broken, warnings)
    return _chosen(name, str(CUMEM_GRANULARITY), user, "bytes of one piece of heap; NVSHMEM needs at least 256 MiB")


def _max_teams(environ: Mapping[str, str], version: Version | None, warnings: list[str]) -> Setting:
    name = "NVSHMEM_MAX_TEAMS"
    user = environ.get(name)
    own = default_teams(version)
    shown = "(of unknown version)" if version is None else ".".join(map(str, version))
    if user is not None and parse_int(name, user) < own + 1:
        broken = f"NVSHMEM {shown} makes {own} teams for itself, and one more is needed"
        return _forced(name, str(own + 1), user, broken, warnings)
    return _chosen(name, str(own + 1), user, f"the {own} teams of NVSHMEM {shown} and one more: less GPU memory")


def _disable_nvls(environ: Mapping[str, str]) -> Setting:
    name = "NVSHMEM_DISABLE_NVLS"
    user = environ.get(name)
    if user is not None:
        parse_bool(name, user)
    return _chosen(name, "1", user, "NVLink multicast is not used here")


def _disable_mnnvl(environ: Mapping[str, str], allow_mnnvl: bool, warnings: list[str]) -> Setting:
    name = "NVSHMEM_DISABLE_MNNVL"
    user = environ.get(name)
    if user is not None and parse_bool(name, user) and allow_mnnvl:
        warnings.append(f"{name}={user} was kept, so allow_mnnvl=True has no effect")
    return _chosen(name, "0" if allow_mnnvl else "1", user, f"NVLink between nodes: allow_mnnvl={allow_mnnvl}")


def _sock_ifname(environ: Mapping[str, str]) -> Setting:
    name = _PER_HOST
    user = environ.get(name)
    why = "network interface of NVSHMEM's start-up"
    return Setting(name, None, "unset", why + ": NVSHMEM picks one") if user is None else _chosen(name, "", user, why)


def _chosen(name: str, value: str, user: str | None, why: str) -> Setting:
    """The user's value where there is one, else ours."""
    return Setting(name, value, "library", why) if user is None else Setting(name, user, "user", why, user)


def _forced(name: str, value: str, user: str | None, why: str, warnings: list[str]) -> Setting:
    """Ours in place of the user's, with a warning."""
    warnings.append(f"{name} was {user!r}, now {value!r}: {why}")
    return Setting(name, value, "changed", why, user)


# --- values ----------------------------------------------------------------------------------------------------------


def parse_bool(name: str, text: str) -> bool:
    """A variable's value as NVSHMEM takes it. Raises `ArgumentError` for a word that it would take in another sense."""
    word = text.strip().lower()
    if word in _FALSE_WORDS:
        return False
    if word in _TRUE_WORDS:
        return True
    raise ArgumentError(
        f"{name} must be 0 or 1; got {text!r} (NVSHMEM would read it as "
        f"{'false' if text[:1].lower() in ('0', 'n', 'f') and text else 'true'})"
    )


def parse_int(name: str, text: str) -> int:
    """A variable's value as NVSHMEM takes it. Raises `ArgumentError` if it is no integer."""
    # NVSHMEM reads these with strtol(..., 0): decimal, 0x hexadecimal or 0 octal, and ignores what follows; we don't.
    word = text.strip()
    try:
        return int(word, 8) if re.fullmatch(r"0[0-7]+", word) else int(word, 0)
    except ValueError:
        raise ArgumentError(f"{name} must be an integer; got {text!r}") from None


def parse_size(name: str, text: str) -> int:
    """A variable's value, in bytes, as NVSHMEM takes it. Raises `ArgumentError` if it is none."""
    # NVSHMEM's sizes: a number, and at most one letter k, m, g or t for a power of 1024.
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kmgtKMGT]?)", text.strip())
    if match is None:
        raise ArgumentError(f"{name} must be a number of bytes such as 536870912 or 512M; got {text!r}")
    number, suffix = match.groups()
    scale = 1 << (10 * " kmgt".index(suffix.lower())) if suffix else 1
    return -int(-float(number) * scale // 1) if "." in number else int(number) * scale


def _encode_value(value: str | None) -> bytes:
    text = b"\x00" if value is None else b"=" + value.encode()
    return _RECORD.pack(hashlib.sha256(text).digest()[:8], text[:24])


def _decode_value(record: bytes) -> str:
    text = _RECORD.unpack(record)[1].rstrip(b"\x00")
    if not text:
        return "unset"
    value = text[1:].decode(errors="replace")
    return f'"{value}{"..." if len(text) == 24 else ""}"'


def _rank_list(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return ("rank " if len(ranks) == 1 else "ranks ") + shown


# --- detection -------------------------------------------------------------------------------------------------------


def _mlx5_devices(sys_root: Path) -> list[str]:
    """RDMA devices of the mlx5 driver. By driver where that can be read: systems may rename devices (`ibp12s0`)."""
    try:
        entries = sorted((sys_root / "class" / "infiniband").iterdir())
    except OSError:
        return []
    found = []
    for entry in entries:
        driver = (entry / "device" / "driver").resolve().name
        if entry.name.startswith("mlx5") or driver.startswith("mlx5"):
            found.append(entry.name)
    return found


def _peer_mapping_override(proc_root: Path) -> bool | None:
    """`PeerMappingOverride` from the NVIDIA driver's parameters, where it is off unless it is named."""
    try:
        text = (proc_root / "driver" / "nvidia" / "params").read_text()
    except OSError:
        return None
    match = re.search(r"PeerMappingOverride\s*[=:]\s*(0[xX][0-9a-fA-F]+|\d+)", text)
    return match is not None and int(match.group(1), 0) != 0


def _config_file_notes(environ: Mapping[str, str], etc_root: Path) -> list[str]:
    """A sentence for each variable of ours that one of NVSHMEM's configuration files sets."""
    files = [etc_root / "nvshmem.conf"]
    if environ.get("HOME"):
        files.append(Path(environ["HOME"]) / ".nvshmem.conf")
    if environ.get("NVSHMEM_CONF_FILE"):
        files.append(Path(environ["NVSHMEM_CONF_FILE"]))
    notes = []
    for file in files:
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            name, separator, value = line.partition("=")
            if separator and name.strip() in VARIABLES:
                notes.append(
                    f"{file} sets {name.strip()}={value.strip()}, which NVSHMEM (3.6.5 and newer) prefers to the "
                    "environment set here: move it to an environment variable, so that it is checked"
                )
    return notes
