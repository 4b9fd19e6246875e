"""`hpc_moe.nn.parallel`: gradients and state dicts of models that are partly sharded, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from mpi4py import MPI
from support import DEVICE, cpu_runtime_only

from hpc_moe import nn
from hpc_moe.errors import ArgumentError, PeerTimeoutError, UnavailableError
from hpc_moe.testing import ReferenceBuffer

pytestmark = [pytest.mark.mpi]

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
E, H, F, K = 2 * SIZE, 128, 32, 2


class _Model(torch.nn.Module):
    """A linear layer before a sharded one. (It can compute on the CPU only, as ReferenceBuffer does.)"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(H, H)
        self.moe = nn.ExpertParallelMoE(COMM, H, F, E, K, buffer=ReferenceBuffer(COMM))
        self.to(DEVICE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.moe(self.linear(x))[0]
        return out


def _tokens(num_tokens: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(seed + 100 * RANK))


def test_gradients_that_some_ranks_have() -> None:
    """A parameter that one rank used gets the mean everywhere; one that none used stays without."""
    model = _Model()
    model.linear.bias.grad = torch.full((H,), 6.0, device=DEVICE) if RANK == SIZE - 1 else None
    model.moe.experts.w_in.grad = torch.ones_like(model.moe.experts.w_in) if RANK == 0 else None
    nn.synchronize_gradients(model, COMM)
    assert model.linear.bias.grad is not None and model.moe.experts.w_in.grad is not None
    torch.testing.assert_close(model.linear.bias.grad.cpu(), torch.full((H,), 6.0 / SIZE))
    expected = torch.full_like(model.moe.experts.w_in, (1.0 if RANK == 0 else 0.0) / SIZE)
    torch.testing.assert_close(model.moe.experts.w_in.grad, expected)
    unused = (model.linear.weight, model.moe.experts.w_out, model.moe.router.weight)
    assert all(parameter.grad is None for parameter in unused)


def test_frozen_parameters() -> None:
    """They take no part, even with a gradient left from before."""
    model = _Model()
    model.linear.weight.requires_grad_(False).grad = torch.full((H, H), 5.0, device=DEVICE)
    model.moe.experts.w_in.requires_grad_(False).grad = torch.full_like(model.moe.experts.w_in, 5.0)
    model.linear.bias.grad = torch.full((H,), float(RANK), device=DEVICE)
    nn.synchronize_gradients(model, COMM)
    assert model.linear.weight.grad is not None and model.linear.weight.grad.eq(5).all()
    assert model.moe.experts.w_in.grad is not None and (model.moe.experts.w_in.grad == 5).all()
    torch.testing.assert_close(model.linear.bias.grad.cpu(), torch.full((H,), (SIZE - 1) / 2))
    nn.synchronize_gradients(model.requires_grad_(False), COMM)
    assert model.linear.weight.grad.eq(5).all()


@cpu_runtime_only
def test_gradient_accumulation() -> None:
    """Two micro-batches and one synchronisation give the gradients of both together."""
    parts = [_tokens(4, seed=1), _tokens(3, seed=2)]
    whole, accumulated = _Model(), _Model()
    whole(torch.cat(parts)).square().sum().backward()
    for part in parts:
        accumulated(part).square().sum().backward()
    for model in (whole, accumulated):
        nn.synchronize_gradients(model, COMM)
    expected = dict(whole.named_parameters())
    for name, parameter in accumulated.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "call",
    [
        nn.synchronize_gradients,
        nn.full_state_dict,
        lambda model, comm: nn.clip_gradients(model, comm, 1.0),
        lambda model, comm: nn.load_full_state_dict(model, {}, comm),
    ],
)
def test_another_communicator(call: Callable[[torch.nn.Module, MPI.Intracomm], object]) -> None:
    with pytest.raises(ArgumentError, match="comm must have the ranks of the layer 'moe'"):
        call(_Model(), MPI.COMM_SELF)


def test_a_congruent_communicator() -> None:
    comm = COMM.Dup()
    model = _Model()
    nn.synchronize_gradients(model, comm)
    assert (nn.full_state_dict(model, comm, root=SIZE - 1) is not None) == (RANK == SIZE - 1)
    comm.Free()


def test_a_layer_with_two_names() -> None:
    """Both names hold sharded experts: a full state dict has both, and loads."""
    model = _Model()
    model.again = model.moe
    names = {f"{layer}.experts.{weight}" for layer in ("moe", "again") for weight in ("w_in", "w_out")}
    assert nn.expert_parameter_names(model) == names
    full = nn.full_state_dict(model, COMM)
    if full is not None:
        assert all(full[name].shape[0] == E for name in names)
    nn.load_full_state_dict(model, COMM.bcast(full), COMM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_gather_experts(dtype: torch.dtype) -> None:
    local = (torch.arange(2 * 3 * 5) + 30 * RANK).view(2, 3, 5).to(DEVICE, dtype)
    full = nn.gather_experts(local.transpose(1, 2), COMM)
    if full is not None:
        assert torch.equal(full, torch.arange(SIZE * 30).view(2 * SIZE, 3, 5).to(dtype).transpose(1, 2))
    assert (full is None) == (RANK != 0)


def test_infinite_gradients() -> None:
    """What the documentation says of a norm that is no number."""
    model = _Model()
    model.linear.bias.grad = torch.ones(H, device=DEVICE)
    model.linear.weight.grad = torch.full((H, H), torch.nan, device=DEVICE)
    assert np.isnan(nn.clip_gradients(model, COMM, 1.0))
    assert (model.linear.bias.grad == 1).all()
    model.linear.weight.grad.fill_(torch.inf)
    assert np.isinf(nn.clip_gradients(model, COMM, 1.0))
    assert (model.linear.bias.grad == 0).all() and model.linear.weight.grad.isnan().all()


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_does_not_come() -> None:
    """The others give up after the limit, and the user's communicator still works."""
    comm = COMM.Dup()
    nn.all_reduce_sum(comm, np.zeros(1))
    if RANK != 0:
        with pytest.raises(PeerTimeoutError, match=r"all_reduce_sum on rank . waited 0\.5 s"):
            nn.all_reduce_sum(comm, np.zeros(1), timeout=0.5)
        with pytest.raises(UnavailableError, match=r"gave up before: all_reduce_sum"):
            nn.gather_experts(torch.zeros(1, 1), comm)
    assert comm.allreduce(1) == SIZE


@pytest.mark.mpi(min_size=2)
def test_gathering_has_a_limit() -> None:
    comm = COMM.Dup()
    nn.all_reduce_sum(comm, np.zeros(1))
    if RANK == 0:
        with pytest.raises(PeerTimeoutError, match=r"gather_experts on rank 0 waited 0\.5 s"):
            nn.gather_experts(torch.zeros(2, 1), comm, timeout=0.5)
    assert comm.allreduce(1) == SIZE
