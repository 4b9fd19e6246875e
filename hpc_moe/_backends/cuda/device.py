"""Which GPU a rank uses, and whether all ranks can use one."""

from __future__ import annotations

import os

import torch

from ... import _C
from ...bootstrap import Group, Topology
from ...errors import ArgumentError, UnavailableError

# Test-only: ranks may share a GPU. Kernels that wait for each other then take turns on it, which is slow.
SHARE_VARIABLE = "HPC_MOE_TEST_SHARE_GPUS"


_made_current: int | None = None  # the device that a buffer of this process has made the current one


def make_current(index: int) -> None:
    """Make this device torch's current one, and remember that it was not the caller's wish."""
    global _made_current
    if torch.cuda.current_device() != index:
        torch.cuda.set_device(index)
        _made_current = index


def shares_gpus() -> bool:
    """Whether ranks may share a GPU."""
    return os.environ.get(SHARE_VARIABLE) == "1"


def choose_device(device: str | None, topology: Topology) -> int:
    """The index of this rank's GPU.

    `"cuda:i"` is that one. Otherwise the caller's current device, if it is not the first one; else the GPU with the
    number of the local rank, or the only one, where the launcher shows each rank one GPU.

    Raises:
        ArgumentError: there is no such GPU.
        UnavailableError: there is none at all, or too few.
    """
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"device={device!r}: torch {torch.__version__} finds no usable GPU on {topology.describe(topology.rank)}"
        )
    count = torch.cuda.device_count()
    named: int | None = torch.device(device or "cuda").index
    index = 0 if named is None else named
    if named is None:
        index = torch.cuda.current_device()
        if index in (0, _made_current) and count > 1:  # the caller has not chosen one
            index = topology.local_rank % count if shares_gpus() else topology.local_rank
            if index >= count:
                who = topology.describe(topology.rank)
                raise UnavailableError(
                    f"device={device!r}: {who} is local rank {index} and sees {count} GPUs; start as many ranks per "
                    "node as there are GPUs, or name one with device='cuda:<index>'"
                )
    if index >= count:
        raise ArgumentError(f"device={device!r}: there is no such GPU; this process sees {count}")
    return index


def find_what_is_missing(topology: Topology, num_nvl_bytes: int, low_latency_mode: bool) -> str:
    """What a buffer needs that the CUDA runtime does not have in any build; empty: nothing."""
    num_ranks, num_nodes = len(topology.node_of_rank), topology.num_nodes
    if num_ranks > _C.MAX_LOW_LATENCY_RANKS:
        return f"at most {_C.MAX_LOW_LATENCY_RANKS} ranks, so far; got {num_ranks}"
    if num_nodes > 1 and (num_nvl_bytes > 0 or not low_latency_mode):
        return (
            f"{num_nodes} nodes; normal calls between nodes are not there yet on CUDA. Low-latency calls are, with "
            "low_latency_mode=True and num_nvl_bytes=0, and device='cpu' has both; got "
            f"low_latency_mode={low_latency_mode} and num_nvl_bytes={num_nvl_bytes}"
        )
    if num_ranks > _C.CUDA_MAX_RANKS and (num_nvl_bytes > 0 or not low_latency_mode):
        return (
            f"at most {_C.CUDA_MAX_RANKS} ranks of a node have normal calls on CUDA; got {num_ranks}, with "
            f"low_latency_mode={low_latency_mode} and num_nvl_bytes={num_nvl_bytes}"
        )
    return ""


def can_all_use_cuda(group: Group, topology: Topology, num_nvl_bytes: int, low_latency_mode: bool) -> bool:
    """Whether every rank has a GPU of its own and the CUDA runtime can serve this buffer. Collective."""

    def describe() -> bytes:
        has_calls = not low_latency_mode or bool(_C.nvshmem_build_version)
        if not (hasattr(_C, "CudaRuntime") and has_calls and torch.cuda.is_available()):
            return b""
        if find_what_is_missing(topology, num_nvl_bytes, low_latency_mode):
            return b""
        try:
            index = choose_device(None, topology)
        except (ArgumentError, UnavailableError):
            return b""
        properties = torch.cuda.get_device_properties(index)
        name = f"{getattr(properties, 'uuid', index)}"
        return (f"{group.rank} {name}" if shares_gpus() else name).encode()[:64]

    gpus = group.exchange("looking for GPUs", 64, describe)
    return all(gpu.strip(b"\0") for gpu in gpus) and len(set(gpus)) == len(gpus)
