"""`ExpertParallelMoE` and `MoE` in use: checks of what they are given, and what torch does around them.

Autocast, activation checkpointing, frozen layers, a retained graph, copies. Runs under mpirun on any number of ranks,
through a ReferenceBuffer where that works: on the CPU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mpi4py import MPI
from support import DEVICE, ON_CUDA
from torch.utils.checkpoint import checkpoint

import hpc_moe
from hpc_moe import nn
from hpc_moe.errors import ArgumentError, PeerTimeoutError, UnavailableError
from hpc_moe.testing import ReferenceBuffer

pytestmark = [pytest.mark.mpi]

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
E, H, F, K = 2 * SIZE, 128, 32, 2
ABSENCE_S = 3.0 if ON_CUDA else 1.0  # how long the others wait for a rank that does not come


_shared: list[Any] = []  # the buffer of the layers that are not given one


@pytest.fixture(scope="module", autouse=True)
def _destroy_shared() -> Iterator[None]:
    yield
    for buffer in _shared:
        if ON_CUDA:
            buffer.destroy()
    _shared.clear()


def _buffer() -> Any:
    if not _shared:
        _shared.append(hpc_moe.Buffer(COMM, 1 << 24, device=str(DEVICE)) if ON_CUDA else ReferenceBuffer(COMM))
    return _shared[0]


def _parallel(buffer: Any = None, **options: Any) -> nn.ExpertParallelMoE:
    return nn.ExpertParallelMoE(COMM, H, F, E, K, buffer=buffer or _buffer(), device=DEVICE, **options)


def _single(**options: Any) -> nn.MoE:
    return nn.MoE(H, F, E, K, device=DEVICE, **options)


def _router(**options: Any) -> nn.TopKRouter:
    return nn.TopKRouter(H, E, K, device=DEVICE, **options)


def _tokens(num_tokens: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(seed + 100 * RANK)).to(DEVICE)


# ---- checks


@pytest.mark.parametrize("make, name", [(_parallel, "ExpertParallelMoE"), (_single, "MoE")])
@pytest.mark.parametrize(
    "sizes, message",
    [
        ((H, E, 1), "router.top_k must be 2; got 1"),
        ((H, 2 * E, K), f"router.num_experts must be {E}; got {2 * E}"),
        ((2 * H, E, K), f"router.hidden must be {H}; got {2 * H}"),
    ],
)
def test_router_of_other_sizes(make: Callable[..., Any], name: str, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: {message}$"):
        make(router=nn.TopKRouter(*sizes))


@pytest.mark.mpi(min_size=2)
def test_buffer_and_router_of_other_ranks() -> None:
    with pytest.raises(ArgumentError, match="buffer must be one on the ranks of comm"):
        _parallel(ReferenceBuffer(MPI.COMM_SELF))
    with pytest.raises(ArgumentError, match=r"router\.comm must have the ranks of comm"):
        _parallel(router=nn.TopKRouter(H, E, K, comm=MPI.COMM_SELF))


def test_single_process_tokens_of_another_size() -> None:
    with pytest.raises(ArgumentError, match=rf"^MoE: x must be \[\.\.\., 128\]; got \[4, {2 * H}\]$"):
        _single()(torch.zeros(4, 2 * H))
    with pytest.raises(ArgumentError, match=r"got \[\]"):
        _single()(torch.zeros(()))


@pytest.mark.parametrize("counts_over_ranks", [True, False])
@pytest.mark.parametrize("bad", [torch.zeros(4, 2 * H), torch.zeros(3, 5, H // 2), torch.zeros(()), None])
def test_tokens_that_one_rank_has_wrong(bad: Any, counts_over_ranks: bool) -> None:
    """All ranks raise at once, and the layer goes on working."""
    wrong = SIZE - 1
    with hpc_moe.Buffer(COMM, 1 << 24, device=str(DEVICE), timeout=20.0) as buffer:
        layer = _parallel(buffer, router=_router(comm=COMM if counts_over_ranks else None, timeout=20.0))
        expected = r"^ExpertParallelMoE: x must be \[\.\.\., 128\]; got" if wrong == RANK else f"on rank {wrong}"
        if not counts_over_ranks and wrong != RANK:
            expected = f"rank {wrong}.*ExpertParallelMoE: x must be"  # the buffer carries the reason along
        with pytest.raises(ArgumentError, match=expected):
            layer(bad if wrong == RANK else _tokens())
        assert layer(_tokens())[0].shape == (6, H)


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_does_not_come() -> None:
    """The others wait for the buffer's timeout only, and the user's communicator still works."""
    comm = COMM.Dup()
    buffer = hpc_moe.Buffer(comm, 1 << 24, device=str(DEVICE), timeout=ABSENCE_S)
    layer = nn.ExpertParallelMoE(comm, H, F, E, K, buffer=buffer, device=DEVICE)
    assert layer.router.timeout == ABSENCE_S
    if RANK != 0:
        begin = time.monotonic()
        with pytest.raises(PeerTimeoutError, match="counting the load"):
            layer(_tokens())
        assert time.monotonic() - begin < 10
        with pytest.raises(UnavailableError, match="gave up before"):
            layer(_tokens())
    assert comm.allreduce(1) == SIZE
    buffer.destroy()
    comm.Free()


def test_the_communicator_is_duplicated_once() -> None:
    comm = COMM.Dup()
    routers = [nn.TopKRouter(H, E, K, comm=comm) for _ in range(2)]
    assert routers[0]._collectives is routers[1]._collectives
    duplicate = routers[0]._collectives
    assert duplicate is not None and duplicate._comm != comm
    comm.Free()
    assert duplicate._comm == MPI.COMM_NULL


# ---- weights


def test_experts_and_seeds_differ() -> None:
    experts = nn.Experts(H, F, 0, 4, seed=1)
    others = nn.Experts(H, F, 0, 4, seed=2)
    for weight, other in ((experts.w_in, others.w_in), (experts.w_out, others.w_out)):
        for e in range(4):
            assert not torch.equal(weight[e], other[e])
            assert not any(torch.equal(weight[e], weight[f]) for f in range(e))
    assert torch.equal(nn.Experts(H, F, 2, 2, seed=1).w_in, experts.w_in[2:])


@pytest.mark.parametrize("make", [_parallel, _single])
def test_copies(make: Callable[..., Any]) -> None:
    layer = make()
    layer(_tokens())
    copied = copy.deepcopy(layer)
    x = _tokens(seed=1)
    assert torch.equal(copied(x)[0], layer(x)[0])
    assert copied.statistics.num_calls == layer.statistics.num_calls == 2
    with torch.no_grad():
        copied.experts.w_in.zero_()
    assert not copied(x)[0].any() and layer(x)[0].any()
    assert layer.statistics.num_calls == 3


def test_a_copy_does_not_own_the_buffer() -> None:
    layer = nn.ExpertParallelMoE(COMM, H, F, E, K, device=str(DEVICE))
    copied = copy.deepcopy(layer)
    assert copied.buffer is layer.buffer and copied.comm is layer.comm
    copied.destroy()
    assert layer(_tokens())[0].shape == (6, H)
    assert copied.statistics.dispatch_seconds == 0 < layer.statistics.dispatch_seconds
    layer.destroy()


# ---- dtypes


@pytest.mark.parametrize("make", [_parallel, _single])
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes(make: Callable[..., Any], tokens: torch.dtype, weights: torch.dtype, autocast: bool) -> None:
    """The result has the dtype of the tokens, and is near that of float32; so are the gradients."""
    results = []
    for exact in (True, False):
        layer = make(dtype=torch.float32 if exact else weights, router=_router(seed=3))
        if exact:
            layer.experts.to(weights).float()  # the same values
        x = _tokens(9).to(tokens).to(torch.float32 if exact else tokens).requires_grad_()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast and not exact):
            out, _ = layer(x)
        assert out.dtype == x.dtype
        (out.float() * _tokens(9, seed=1)).sum().backward()
        results.append((out, x.grad, layer.experts.w_in.grad, layer.router.weight.grad))
    for reference, actual in zip(*results, strict=True):
        error = (actual.float() - reference).abs().max() / reference.abs().max().clamp_min(1e-9)
        assert error < 0.05


# ---- what torch does around a layer


def _gradients(layer: nn.ExpertParallelMoE, x: torch.Tensor) -> list[torch.Tensor]:
    tensors = [x, *layer.parameters()]
    found = [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]
    assert len(found) == len(tensors)
    for tensor in tensors:
        tensor.grad = None
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    """Two layers, recomputed in the backward: the same gradients; statistics count the second forward as well."""
    first, second = _parallel(seed=1), _parallel(seed=2)
    x = _tokens(0 if RANK == SIZE - 1 and SIZE > 1 else 5).requires_grad_()

    def run(wrap: Callable[..., Any]) -> list[torch.Tensor]:
        middle, loss = wrap(first, x)
        out, other_loss = wrap(second, middle)
        torch.autograd.backward(out.square().sum() + loss + other_loss)
        return _gradients(first, x) + [p.grad.clone() for p in second.parameters() if p.grad is not None]

    plain = run(lambda layer, tokens: layer(tokens))
    for parameter in second.parameters():
        parameter.grad = None
    again = run(lambda layer, tokens: checkpoint(layer, tokens, use_reentrant=reentrant))
    for expected, actual in zip(plain, again, strict=True):
        torch.testing.assert_close(actual, expected)
    assert first.statistics.num_calls == second.statistics.num_calls == 3


def test_frozen_layer() -> None:
    """Gradients pass through a layer whose weights are frozen, to the tokens of the ranks that want them."""
    layer = _parallel().requires_grad_(False)
    x = _tokens().requires_grad_(RANK == 0)
    out, _ = layer(x)
    out.sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert (x.grad is not None) == (RANK == 0)
    if x.grad is not None:
        assert x.grad.abs().sum() > 0


def test_nothing_requires_a_gradient() -> None:
    """All frozen, and a rank without tokens: a backward still runs on all ranks."""
    layer = _parallel().requires_grad_(False)
    out, _ = layer(_tokens(0 if RANK == 0 else 4))
    assert out.requires_grad
    before = layer.statistics.dispatch_seconds
    out.sum().backward()
    assert layer.statistics.dispatch_seconds > before
    with torch.no_grad():
        assert not layer(_tokens())[0].requires_grad


def test_retained_graph() -> None:
    """A second backward through the same graph gives the same gradients."""
    layer = _parallel()
    x = _tokens().requires_grad_()
    out, loss = layer(x)
    total = out.square().sum() + loss
    total.backward(retain_graph=True)
    once = _gradients(layer, x)
    total.backward()
    for expected, actual in zip(once, _gradients(layer, x), strict=True):
        torch.testing.assert_close(actual, expected)
