"""Backends: what runs the calls. `requests.py` says what they get, `base.py` what they do; each is a package.

`make_backend` chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..bootstrap import Group, Topology
from .base import Backend

__all__ = ["Backend", "make_backend"]


def make_backend(
    group: Group,
    topology: Topology,
    *,
    kind: str,
    device: str | None,
    network: Mapping[str, Any],
    **arguments: Any,
) -> Backend:
    """Construct the backend for this kind of device. Collective.

    Args:
        group: the buffer's ranks.
        topology: where they are.
        kind: `"cpu"`, `"cuda"`, or empty: CUDA if all ranks can have it, else CPU. Equal on all ranks.
        device: as `Buffer` was given it; its index may differ between ranks.
        network: what `Buffer` was told of the network between GPUs.
        arguments: of the backend.
    """
    if kind == "":
        from .cuda.device import can_all_use_cuda

        calls = {name: arguments[name] for name in ("num_nvl_bytes", "low_latency_mode")}
        kind = "cuda" if can_all_use_cuda(group, topology, **calls) else "cpu"
    if kind == "cuda":
        from .cuda import CudaBackend

        return CudaBackend(group, topology, device=device, network=network, **arguments)
    from .cpu import CpuBackend

    return CpuBackend(group, topology, **arguments)
