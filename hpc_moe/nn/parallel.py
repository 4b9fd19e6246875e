"""What a training step and a checkpoint need when experts are sharded: gradients, their norm, and full state dicts.

For models that hold `ExpertParallelMoE` layers and are otherwise replicated on all ranks of one communicator. Not for
pipeline or tensor parallelism, nor for optimizer states sharded by other schemes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from mpi4py import MPI

from hpc_moe.bootstrap import keep_forever, wait_until
from hpc_moe.errors import ArgumentError, PeerTimeoutError


def all_reduce_sum(
    comm: MPI.Intracomm, array: np.ndarray, *, timeout: float = 100.0, operation: str = "all_reduce_sum"
) -> None:
    """Sum `array` (contiguous, any MPI-able dtype) over the ranks, in place. Collective.

    It waits with a limit and yields the core meanwhile: good manners where ranks share cores.

    Raises:
        PeerTimeoutError: after `timeout` seconds. It cannot tell which rank is missing.
    """
    request = comm.Iallreduce(MPI.IN_PLACE, array)
    if not wait_until(request.Test, timeout):
        keep_forever(request, array)
        rank = comm.Get_rank()
        raise PeerTimeoutError(
            f"{operation} on rank {rank} waited {timeout:g} s for the other ranks", operation=operation, rank=rank
        )


def expert_parameter_names(model: torch.nn.Module) -> set[str]:
    """Names, as in `model.named_parameters()`, of the parameters that hold only this rank's experts (`[L, ...]`)."""
    from hpc_moe.nn.moe import ExpertParallelMoE

    names: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, ExpertParallelMoE):
            inside = f"{prefix}.experts." if prefix else "experts."
            names.update(inside + name for name, _ in module.experts.named_parameters())
    return names


def synchronize_gradients(model: torch.nn.Module, comm: MPI.Intracomm) -> None:
    """Make the gradients those of the mean of the ranks' losses. Collective; one flat allreduce in float32.

    Replicated parameters: the mean over the ranks. Experts: their gradient already holds the contributions of all
    ranks' tokens (the backward of dispatch and combine brought them), so it is only divided by the number of ranks.
    Call it between `backward()` and the optimizer's step.
    """
    experts = expert_parameter_names(model)
    scale = 1.0 / comm.Get_size()
    replicated = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # as on a rank whose tokens did not use it: others may have
            parameter.grad = torch.zeros_like(parameter)
        if name in experts:
            parameter.grad.mul_(scale)
        else:
            replicated.append(parameter.grad)
    if comm.Get_size() == 1 or not replicated:
        return
    flat = torch.cat([grad.detach().reshape(-1).float() for grad in replicated]).cpu()
    all_reduce_sum(comm, flat.numpy(), operation="synchronize_gradients")
    means = torch.split(flat.mul_(scale), [grad.numel() for grad in replicated])
    for grad, mean in zip(replicated, means, strict=True):
        grad.copy_(mean.view_as(grad))


def clip_gradients(model: torch.nn.Module, comm: MPI.Intracomm, max_norm: float) -> float:
    """Scale all gradients so that their norm over the whole model, all experts included, is at most `max_norm`.

    Collective; to be called after `synchronize_gradients`. Returns the norm before clipping, equal on every rank.
    """
    experts = expert_parameter_names(model)
    of_experts = np.zeros(1)
    replicated = 0.0
    gradients = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradients.append(parameter.grad)
        square = float(parameter.grad.detach().float().norm()) ** 2
        if name in experts:
            of_experts[0] += square
        else:
            replicated += square
    all_reduce_sum(comm, of_experts, operation="clip_gradients")
    norm = math.sqrt(replicated + float(of_experts[0]))
    if norm > max_norm:
        for grad in gradients:
            grad.mul_(max_norm / norm)
    return norm


def gather_experts(tensor: torch.Tensor, comm: MPI.Intracomm, root: int = 0) -> torch.Tensor | None:
    """Join the ranks' `[L, ...]` along the first dimension into `[E, ...]` on the root; None elsewhere. Collective."""
    local = tensor.detach().cpu().contiguous()
    if comm.Get_rank() != root:
        comm.Gather([_bytes(local), MPI.BYTE], None, root)
        return None
    full = torch.empty(comm.Get_size() * local.shape[0], *local.shape[1:], dtype=local.dtype)
    comm.Gather([_bytes(local), MPI.BYTE], [_bytes(full), MPI.BYTE], root)
    return full


def local_experts(full: torch.Tensor, like: torch.Tensor, comm: MPI.Intracomm) -> torch.Tensor:
    """This rank's part `[L, ...]`, shaped as `like`, of `full [E, ...]`. Local: every rank has `full`."""
    num_local = like.shape[0]
    if full.shape[0] != num_local * comm.Get_size() or full.shape[1:] != like.shape[1:]:
        raise ArgumentError(
            f"local_experts: full must be [{num_local * comm.Get_size()}, ...] with the shape {list(like.shape)} per "
            f"rank; got {list(full.shape)}"
        )
    begin = comm.Get_rank() * num_local
    return full[begin : begin + num_local]


def full_state_dict(model: torch.nn.Module, comm: MPI.Intracomm, root: int = 0) -> dict[str, torch.Tensor] | None:
    """The state dict with all E experts, on the root (None elsewhere). Collective.

    It does not depend on the number of ranks, has the names and shapes of the same model with `MoE` in place of
    `ExpertParallelMoE`, and loads into that too.
    """
    experts = expert_parameter_names(model)
    full: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        gathered = gather_experts(value, comm, root) if name in experts else value.detach().cpu().clone()
        if gathered is not None:
            full[name] = gathered
    return full if comm.Get_rank() == root else None


def load_full_state_dict(model: torch.nn.Module, state: Mapping[str, torch.Tensor], comm: MPI.Intracomm) -> None:
    """Load what `full_state_dict` returned, on any number of ranks. Local: every rank passes the full state dict.

    `torch.load(path, mmap=True)` reads only what is used from the file.
    """
    experts = expert_parameter_names(model)
    own = model.state_dict()
    local = {}
    for name, value in state.items():
        local[name] = local_experts(value, own[name], comm) if name in experts else value
    model.load_state_dict(local)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()
