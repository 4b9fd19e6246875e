"""What a training step and a checkpoint need when experts are sharded: gradients, their norm, and full state dicts.

For models that hold `ExpertParallelMoE` layers and are otherwise replicated on all ranks of one communicator. Not for
pipeline or tensor parallelism, nor for optimizer states sharded by other schemes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from mpi4py import MPI

from hpc_moe.errors import ArgumentError
from hpc_moe.nn.collectives import Collectives, check_same_ranks

if TYPE_CHECKING:
    from hpc_moe.nn.moe import ExpertParallelMoE


def all_reduce_sum(
    comm: MPI.Intracomm, array: np.ndarray, *, timeout: float = 100.0, operation: str = "all_reduce_sum"
) -> None:
    """Sum `array` (contiguous, any MPI-able dtype) over the ranks, in place. Collective.

    It works on a duplicate of `comm`, which the first call makes, and waits with a limit, yielding the core meanwhile:
    good manners where ranks share cores.

    Raises:
        PeerTimeoutError: after `timeout` seconds. It cannot tell which rank is missing. Later calls of `hpc_moe.nn` on
            this communicator raise `UnavailableError`.
    """
    Collectives.of(comm, timeout).all_reduce_sum(array, operation, timeout)


def expert_parameter_names(model: torch.nn.Module) -> set[str]:
    """Names, as in `model.named_parameters()`, of the parameters that hold only this rank's experts (`[L, ...]`)."""
    names: set[str] = set()
    for prefix, layer in _layers(model):
        inside = f"{prefix}.experts." if prefix else "experts."
        names.update(inside + name for name, _ in layer.experts.named_parameters())
    return names


def _layers(model: torch.nn.Module) -> list[tuple[str, ExpertParallelMoE]]:
    """The layers with sharded experts, by every name that they have."""
    from hpc_moe.nn.moe import ExpertParallelMoE

    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if isinstance(module, ExpertParallelMoE)]


def _check_comm(operation: str, model: torch.nn.Module, comm: MPI.Intracomm) -> None:
    for name, layer in _layers(model):
        check_same_ranks(layer.comm, comm, f"{operation}: comm must have the ranks of the layer {name or 'itself'!r}'s")


def synchronize_gradients(model: torch.nn.Module, comm: MPI.Intracomm, *, timeout: float = 100.0) -> None:
    """Make the gradients those of the mean of the ranks' losses. Collective; one flat allreduce in float32.

    Replicated parameters: the mean over the ranks. Experts: their gradient already holds the contributions of all
    ranks' tokens (the backward of dispatch and combine brought them), so it is only divided by the number of ranks. A
    parameter that no rank used keeps no gradient (None), so that optimizers leave it alone; one that some rank used has
    one on every rank.

    Call it exactly once per step, between the last `backward()` (of the last micro-batch, where gradients are
    accumulated) and the optimizer's step: every call averages again.

    Raises:
        ArgumentError: `comm` is not the communicator of the model's layers.
        PeerTimeoutError: a rank did not come within `timeout` seconds.
    """
    _check_comm("synchronize_gradients", model, comm)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if comm.Get_size() == 1 or not trained:
        return
    experts = expert_parameter_names(model)
    scale = 1.0 / comm.Get_size()
    has_gradient = torch.tensor([float(parameter.grad is not None) for _, parameter in trained])
    replicated = [parameter for name, parameter in trained if name not in experts]
    parts = [_gradient_or_zeros(parameter).detach().reshape(-1).float().cpu() for parameter in replicated]
    flat = torch.cat([has_gradient, *parts])
    all_reduce_sum(comm, flat.numpy(), timeout=timeout, operation="synchronize_gradients")
    ranks_with_gradient, *sums = torch.split(flat, [len(trained), *(part.numel() for part in parts)])
    means = {id(parameter): total * scale for parameter, total in zip(replicated, sums, strict=True)}
    for (_, parameter), num_ranks in zip(trained, ranks_with_gradient.tolist(), strict=True):
        if not num_ranks:
            continue
        parameter.grad = _gradient_or_zeros(parameter)
        if id(parameter) in means:
            parameter.grad.copy_(means[id(parameter)].view_as(parameter))
        else:
            parameter.grad.mul_(scale)


def _gradient_or_zeros(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def clip_gradients(model: torch.nn.Module, comm: MPI.Intracomm, max_norm: float, *, timeout: float = 100.0) -> float:
    """Scale all gradients so that their norm over the whole model, all experts included, is at most `max_norm`.

    Collective; to be called after `synchronize_gradients`. Returns the norm before clipping, equal on every rank. If it
    is infinite or not a number, look at it before the optimizer's step: with NaN the gradients stay as they are, and
    with infinity they become 0, or NaN where they were infinite.

    Raises:
        ArgumentError: `comm` is not the communicator of the model's layers.
        PeerTimeoutError: a rank did not come within `timeout` seconds.
    """
    _check_comm("clip_gradients", model, comm)
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
    all_reduce_sum(comm, of_experts, timeout=timeout, operation="clip_gradients")
    norm = math.sqrt(replicated + float(of_experts[0]))
    if norm > max_norm:
        for grad in gradients:
            grad.mul_(max_norm / norm)
    return norm


def gather_experts(
    tensor: torch.Tensor, comm: MPI.Intracomm, root: int = 0, *, timeout: float = 100.0
) -> torch.Tensor | None:
    """Join the ranks' `[L, ...]` along the first dimension into `[E, ...]` on the root; None elsewhere. Collective.

    Experts travel one by one, so that no message is larger than one expert of each rank.

    Raises:
        PeerTimeoutError: an expert took longer than `timeout` seconds.
    """
    collectives = Collectives.of(comm, timeout)
    local = tensor.detach().cpu().contiguous()
    full = None
    if collectives.rank == root:
        full = torch.empty(collectives.size, *local.shape, dtype=local.dtype)
    for index, expert in enumerate(local):
        data = expert.reshape(-1).view(torch.uint8).numpy()
        gathered = collectives.gather(data, root, "gather_experts", timeout)
        if full is not None and gathered is not None:
            full[:, index] = torch.from_numpy(gathered).view(local.dtype).view(full[:, index].shape)
    return None if full is None else full.flatten(0, 1)


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


def full_state_dict(
    model: torch.nn.Module, comm: MPI.Intracomm, root: int = 0, *, timeout: float = 100.0
) -> dict[str, torch.Tensor] | None:
    """The state dict with all E experts, on the root (None elsewhere). Collective.

    It does not depend on the number of ranks, has the names and shapes of the same model with `MoE` in place of
    `ExpertParallelMoE`, and loads into that too.

    Raises:
        ArgumentError: `comm` is not the communicator of the model's layers.
        PeerTimeoutError: a rank did not come within `timeout` seconds.
    """
    _check_comm("full_state_dict", model, comm)
    experts = expert_parameter_names(model)
    is_root = comm.Get_rank() == root
    full: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name in experts:
            gathered = gather_experts(value, comm, root, timeout=timeout)
            if gathered is not None:
                full[name] = gathered
        elif is_root:
            full[name] = value.detach().cpu().clone()
    return full if is_root else None


def load_full_state_dict(model: torch.nn.Module, state: Mapping[str, torch.Tensor], comm: MPI.Intracomm) -> None:
    """Load what `full_state_dict` returned, on any number of ranks. Local: every rank passes the full state dict.

    `torch.load(path, mmap=True)` reads only what is used from the file.

    Raises:
        ArgumentError: `comm` is not the communicator of the model's layers, or a tensor of experts has another shape.
    """
    _check_comm("load_full_state_dict", model, comm)
    experts = expert_parameter_names(model)
    own = model.state_dict()
    local = {}
    for name, value in state.items():
        local[name] = local_experts(value, own[name], comm) if name in experts else value
    model.load_state_dict(local)
