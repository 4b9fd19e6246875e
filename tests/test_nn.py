"""`hpc_moe.nn`: gradients against finite differences, the expert-parallel layer against the single-process one, router.

Runs under mpirun on any number of ranks that divides 8. What uses a ReferenceBuffer stays on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from support import DEVICE

import hpc_moe
from hpc_moe import nn
from hpc_moe.errors import ArgumentError
from hpc_moe.testing import ReferenceBuffer

pytestmark = [pytest.mark.mpi]

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
NUM_EXPERTS = 8 if 8 % SIZE == 0 else 2 * SIZE
HIDDEN = 128


class _Spread(torch.autograd.Function):
    """Replicated `[T_all, ...]` to this rank's rows; backward: the sum over ranks of the rows' gradients."""

    @staticmethod
    def forward(ctx: Any, full: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        ctx.shape, ctx.rows = full.shape, slice(begin, end)
        return full[begin:end].clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        full = grad.new_zeros(ctx.shape)
        full[ctx.rows] = grad
        nn.all_reduce_sum(COMM, full.numpy())
        return full, None, None


class _Collect(torch.autograd.Function):
    """This rank's rows to the replicated `[T_all, ...]`; backward: the rank's part of the gradient."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, begin: int, num_all: int) -> torch.Tensor:
        ctx.rows = slice(begin, begin + rows.shape[0])
        full = rows.new_zeros(num_all, *rows.shape[1:])
        full[ctx.rows] = rows
        nn.all_reduce_sum(COMM, full.numpy())
        return full

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad[ctx.rows].clone(), None, None


_spread: Callable[..., torch.Tensor] = _Spread.apply
_collect: Callable[..., torch.Tensor] = _Collect.apply


def _token_ranges(tokens_per_rank: list[int]) -> tuple[int, int, int]:
    """Begin and end of this rank's tokens, and the number of all."""
    return sum(tokens_per_rank[:RANK]), sum(tokens_per_rank[: RANK + 1]), sum(tokens_per_rank)


def _uneven_tokens(base: int) -> list[int]:
    """Different on every rank, 0 on the last (where there are several)."""
    counts = [base + rank for rank in range(SIZE)]
    if SIZE > 1:
        counts[-1] = 0
    return counts


def _routing(num_tokens: int, top_k: int, seed: int) -> torch.Tensor:
    """Distinct experts, with a few -1; equal on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(top_k, dim=1).indices
    idx[torch.rand(num_tokens, top_k, generator=generator) < 0.2] = -1
    return idx


@pytest.mark.parametrize("layout", ["token", "grouped"])
def test_gradcheck(layout: str) -> None:
    """Finite differences with respect to all ranks' tokens, through two dispatches and two combines of one handle."""
    counts = _uneven_tokens(2)
    begin, end, total = _token_ranges(counts)
    top_k, hidden = 2, 3
    topk_idx = _routing(total, top_k, seed=1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(total, hidden, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(total, top_k, dtype=torch.float64, generator=generator, requires_grad=True)
    buffer = ReferenceBuffer(COMM)

    def layer(full_x: torch.Tensor, full_weights: torch.Tensor) -> torch.Tensor:
        own_x = _spread(full_x, begin, end)
        own_weights = _spread(full_weights, begin, end)
        first = nn.dispatch(buffer, own_x, topk_idx[begin:end], own_weights, NUM_EXPERTS, expert_layout=layout)
        second = nn.dispatch(buffer, own_x.square(), handle=first.handle)
        assert first.topk_weights is not None and second.topk_weights is None
        scale = first.topk_weights if layout == "grouped" else (first.topk_weights + 0.5).square().sum(dim=1)
        sums = nn.combine(buffer, first.x.sin() * scale.unsqueeze(1), second.handle)
        products = nn.combine(buffer, second.x * first.x, second.handle)
        return _collect(sums.exp() + products * own_x, begin, total)

    assert torch.autograd.gradcheck(layer, (x, weights))


@pytest.mark.parametrize("real", [False, True])
def test_backward_of_ranks_that_differ(real: bool) -> None:
    """Ranks without tokens, without a gradient to compute or with a cut-off graph take part in the backward."""
    counts = [0 if rank == 0 and SIZE > 1 else 5 for rank in range(SIZE)]
    device = DEVICE if real else torch.device("cpu")
    topk_idx = torch.full((counts[RANK], 1), NUM_EXPERTS - 1, device=device)  # all on the last rank
    x = torch.randn(counts[RANK], HIDDEN, device=device)
    x.requires_grad_(RANK % 2 == 1 or SIZE == 1)
    buffer: Any = hpc_moe.Buffer(COMM, 1 << 24, device=str(DEVICE)) if real else ReferenceBuffer(COMM)
    sent = nn.dispatch(buffer, x, topk_idx, None, NUM_EXPERTS, expert_layout="grouped")
    # Cuts the graph where nothing arrived.
    rows = 2 * sent.x if sent.x.shape[0] else torch.zeros(0, HIDDEN, device=device)
    out = nn.combine(buffer, rows, sent.handle)
    torch.autograd.backward(out.sum())
    if x.requires_grad:
        torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))
    with torch.no_grad():
        sent = nn.dispatch(buffer, x, topk_idx, None, NUM_EXPERTS)
        assert not nn.combine(buffer, sent.x, sent.handle).requires_grad
    if real:
        buffer.destroy()


def _bad_calls(sent: nn.Dispatched) -> list[tuple[str, str, dict[str, Any]]]:
    """Name of a call, what its error says, and arguments that replace good ones."""
    return [
        ("dispatch", "topk_idx and num_experts", {"topk_idx": None, "num_experts": None}),
        ("dispatch", "num_experts must be given", {"num_experts": None}),
        ("dispatch", "must be None with a handle", {"handle": sent.handle}),
        ("dispatch", "x must be bfloat16", {"x": torch.ones(3, HIDDEN, dtype=torch.int64, device=DEVICE)}),
        ("dispatch", "x must be bfloat16", {"x": None}),
        ("dispatch", "expert_layout must be", {"expert_layout": "other"}),
        (
            "dispatch",
            "topk_weights must be float32",
            {"topk_weights": torch.ones(3, 1, dtype=torch.int64, device=DEVICE)},
        ),
        ("dispatch", "handle must be a DispatchHandle", {"handle": sent.handle.routing, "topk_idx": None}),
        ("combine", "handle must be a DispatchHandle", {"handle": None}),
        ("combine", "x must be bfloat16", {"x": torch.ones(5, HIDDEN, 1, device=DEVICE)}),
    ]


def test_arguments_that_one_rank_has_wrong() -> None:
    """All ranks raise, the others naming the rank, and the buffer goes on working."""
    wrong = SIZE - 1
    x = torch.randn(3, HIDDEN, device=DEVICE)
    idx = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    with hpc_moe.Buffer(COMM, 1 << 24, device=str(DEVICE), timeout=20.0) as buffer:
        sent = nn.dispatch(buffer, x, idx, None, NUM_EXPERTS)
        assert sent.topk_weights is None and sent.topk_idx is not None
        for call, message, bad in _bad_calls(sent):
            good: dict[str, Any] = {"x": x, "topk_idx": idx, "num_experts": NUM_EXPERTS}
            if call == "combine":
                good = {"x": sent.x, "handle": sent.handle}
            elif "topk_weights" in bad:
                good["topk_weights"] = torch.ones(3, 1, device=DEVICE)
            arguments = {**good, **bad} if wrong == RANK else good
            with pytest.raises(ArgumentError, match=message if wrong == RANK else f"rank {wrong}.*{message}"):
                getattr(nn, call)(buffer, **arguments)
                buffer.check()  # on CUDA, a combine does not wait for the others' errors
        torch.testing.assert_close(nn.combine(buffer, sent.x, sent.handle), x, rtol=0.02, atol=0.02)


def _compare_layers(dtype: torch.dtype, counts: list[int], real: bool, tolerance: float, balance: float) -> None:
    """Output, loss and gradients of the expert-parallel layer equal those of the single-process one on all tokens.

    Differences are measured against the largest magnitude of what is compared.
    """
    begin, end, total = _token_ranges(counts)
    top_k, width = 3, 48
    device = DEVICE if real else torch.device("cpu")
    generator = torch.Generator().manual_seed(5)
    full_x = torch.randn(total, HIDDEN, generator=generator).to(device, dtype)
    target = torch.randn(total, HIDDEN, generator=generator).to(device, dtype)
    options: dict[str, Any] = {
        "norm_topk_prob": True,
        "balance_coef": balance,
        "z_coef": balance / 10,
        "seed": 3,
        "device": device,
    }

    router = nn.TopKRouter(HIDDEN, NUM_EXPERTS, top_k, **options)
    single = nn.MoE(HIDDEN, width, NUM_EXPERTS, top_k, router=router, dtype=dtype, device=device)
    x = full_x.clone().requires_grad_()
    out, loss = single(x)
    ((out * target).sum() / max(total, 1) + loss).backward()

    buffer = None if real else ReferenceBuffer(COMM)
    router = nn.TopKRouter(HIDDEN, NUM_EXPERTS, top_k, comm=COMM, **options)
    layer = nn.ExpertParallelMoE(
        COMM, HIDDEN, width, NUM_EXPERTS, top_k, router=router, buffer=buffer, dtype=dtype, device=str(device)
    )
    own_x = full_x[begin:end].clone().requires_grad_()
    own_out, own_loss = layer(own_x)
    (SIZE * (own_out * target[begin:end]).sum() / max(total, 1) + own_loss).backward()  # its mean over ranks: as above
    nn.synchronize_gradients(layer, COMM)

    mean_loss = np.array([float(own_loss.detach()) / SIZE])
    nn.all_reduce_sum(COMM, mean_loss)
    assert mean_loss[0] == pytest.approx(float(loss.detach()), rel=max(tolerance, 1e-5))
    torch.testing.assert_close(layer.statistics.expert_load, single.statistics.expert_load)

    assert x.grad is not None and own_x.grad is not None
    _assert_near(own_out, out[begin:end], tolerance, "output")
    _assert_near(own_x.grad / SIZE, x.grad[begin:end], tolerance, "gradient of x")
    experts = nn.expert_parameter_names(layer)
    assert experts == {"experts.w_in", "experts.w_out"}
    full = dict(single.named_parameters())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        expected = full[name].grad
        assert expected is not None
        if name in experts:
            expected = nn.local_experts(expected, parameter, COMM)
        _assert_near(parameter.grad, expected, tolerance, f"gradient of {name}")
    layer.destroy()


def _assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    scale = float(expected.detach().double().abs().max()) or 1.0
    worst = float((actual.detach().double() - expected.detach().double()).abs().max()) / scale
    assert worst <= tolerance, f"{what}: off by {worst:.2e} of the largest magnitude"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_layer_equals_single_process_exactly(dtype: torch.dtype, tolerance: float) -> None:
    _compare_layers(dtype, _uneven_tokens(20), real=False, tolerance=tolerance, balance=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", ["even", "uneven", "none"])
def test_layer_equals_single_process(dtype: torch.dtype, tokens: str) -> None:
    counts = {"even": [33] * SIZE, "uneven": _uneven_tokens(30), "none": [0] * SIZE}[tokens]
    _compare_layers(dtype, counts, real=True, tolerance=0.02 if dtype == torch.float32 else 0.04, balance=0.1)


def test_layers_share_a_buffer() -> None:
    with hpc_moe.Buffer(COMM, 1 << 24, device=str(DEVICE)) as buffer:
        layers = [
            nn.ExpertParallelMoE(COMM, HIDDEN, 32, NUM_EXPERTS, 2, buffer=buffer, seed=seed, device=DEVICE)
            for seed in range(2)
        ]
        x = torch.randn(2, 7, HIDDEN, device=DEVICE)
        middle, _ = layers[0](x)
        out, _ = layers[1](x + middle)
        assert out.shape == x.shape
        out.sum().backward()
        for layer in layers:
            assert layer.statistics.num_calls == 1
            assert layer.statistics.dispatch_seconds > 0 and layer.statistics.combine_seconds > 0
            assert int(layer.statistics.expert_load.sum()) == 2 * 14 * SIZE
            layer.statistics.reset()
            assert layer.statistics.num_calls == 0 and int(layer.statistics.expert_load.sum()) == 0
            layer.destroy()  # not its own: nothing happens
        assert layers[0](x)[0].shape == x.shape


@pytest.mark.mpi(min_size=2)
def test_experts_must_be_a_multiple_of_the_ranks() -> None:
    with pytest.raises(ArgumentError, match="multiple of the"):
        nn.ExpertParallelMoE(COMM, HIDDEN, 32, SIZE + 1, 1)


def test_full_state_dict() -> None:
    """What every rank holds together is the single-process model, and goes back into either."""
    layer = nn.ExpertParallelMoE(COMM, HIDDEN, 32, NUM_EXPERTS, 2, buffer=ReferenceBuffer(COMM), seed=9)
    single = nn.MoE(HIDDEN, 32, NUM_EXPERTS, 2, seed=9)
    full = nn.full_state_dict(layer, COMM)
    assert (full is None) == (RANK != 0)
    if full is not None:
        assert full.keys() == single.state_dict().keys()
        for name, value in single.state_dict().items():
            assert torch.equal(full[name], value), name

    other = nn.MoE(HIDDEN, 32, NUM_EXPERTS, 2, seed=10).state_dict()
    nn.load_full_state_dict(layer, other, COMM)
    again = nn.full_state_dict(layer, COMM)
    if again is not None:
        assert all(torch.equal(again[name], other[name]) for name in other)
    with pytest.raises(ArgumentError, match="local_experts"):
        nn.load_full_state_dict(layer, {**other, "experts.w_in": other["experts.w_in"][:1, :1]}, COMM)


def test_clip_gradients() -> None:
    layer = nn.ExpertParallelMoE(COMM, HIDDEN, 32, NUM_EXPERTS, 2, buffer=ReferenceBuffer(COMM))
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    number = NUM_EXPERTS * (HIDDEN + 3 * 32 * HIDDEN)
    assert nn.clip_gradients(layer, COMM, 1.0) == pytest.approx(number**0.5, rel=1e-5)
    assert nn.clip_gradients(layer, COMM, 2.0) == pytest.approx(1.0, rel=1e-4)
