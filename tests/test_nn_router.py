"""`TopKRouter`: each option against its definition, written out with loops. No communication but the counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mpi4py import MPI
from support import DEVICE

from hpc_moe.errors import ArgumentError
from hpc_moe.nn import TopKRouter

pytestmark = [pytest.mark.mpi]

T, H, E, K = 37, 16, 12, 3


def _tokens(num_tokens: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _router(*sizes: int, **options: Any) -> TopKRouter:
    return TopKRouter(*(sizes or (H, E, K)), device=DEVICE, **options)


def _scores(router: TopKRouter, x: torch.Tensor) -> torch.Tensor:
    logits = x @ router.weight.detach().T
    return logits.exp() / logits.exp().sum(1, keepdim=True) if router.score == "softmax" else 1 / (1 + (-logits).exp())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_weights(score: str, normalize: bool, scaling: float) -> None:
    router = _router(score=score, norm_topk_prob=normalize, scaling_factor=scaling)
    x = _tokens()
    out = router(x)
    assert out.topk_idx.dtype == torch.int64 and out.topk_weights.dtype == torch.float32
    for scores, idx, weights in zip(_scores(router, x), out.topk_idx, out.topk_weights, strict=True):
        best = sorted(range(E), key=lambda e: -float(scores[e]))[:K]
        assert idx.tolist() == best
        expected = scores[best] / scores[best].sum() if normalize else scores[best]
        torch.testing.assert_close(weights.detach(), scaling * expected)


@pytest.mark.parametrize("num_groups, top_groups, group_top", [(4, 2, None), (4, 2, 2), (6, 3, 1), (3, 1, None)])
def test_groups(num_groups: int, top_groups: int, group_top: int | None) -> None:
    router = _router(score="sigmoid", num_groups=num_groups, top_groups=top_groups, group_score_top=group_top)
    x = _tokens(seed=1)
    per_group = E // num_groups
    counted = group_top if group_top is not None else max(1, K // top_groups)
    for scores, idx in zip(_scores(router, x).tolist(), router(x).topk_idx.tolist(), strict=True):
        groups = [scores[g * per_group : (g + 1) * per_group] for g in range(num_groups)]
        ranking = sorted(range(num_groups), key=lambda g: -sum(sorted(groups[g], reverse=True)[:counted]))
        allowed = [e for g in ranking[:top_groups] for e in range(g * per_group, (g + 1) * per_group)]
        assert idx == sorted(allowed, key=lambda e: -scores[e])[:K]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses(score: str) -> None:
    router = _router(score=score, balance_coef=0.3, z_coef=0.7)
    x = _tokens(seed=2)
    out = router(x)
    scores = _scores(router, x)
    probabilities = scores / scores.sum(1, keepdim=True)
    balance = 0.0
    for expert in range(E):
        share = float((out.topk_idx == expert).sum()) / (T * K)
        balance += E * share * float(probabilities[:, expert].mean())
    z = float((x @ router.weight.detach().T).exp().sum(1).log().square().mean())
    assert float(out.balance_loss) == pytest.approx(balance, rel=1e-4)
    assert float(out.z_loss) == pytest.approx(z, rel=1e-4)
    assert float(out.loss.detach()) == pytest.approx(0.3 * balance + 0.7 * z, rel=1e-4)
    out.loss.backward()
    assert router.weight.grad is not None and float(router.weight.grad.abs().sum()) > 0
    assert out.expert_load.tolist() == [int((out.topk_idx == expert).sum()) for expert in range(E)]


def test_balanced_routing_has_balance_loss_one() -> None:
    router = _router(H, H, 1)
    router.weight.data = 20 * torch.eye(H, device=DEVICE)
    assert float(router(torch.eye(H, device=DEVICE)).balance_loss) == pytest.approx(1.0, rel=1e-3)


def test_losses_over_ranks() -> None:
    """With a communicator, the mean over the ranks of loss and gradient is that of all tokens, however spread."""
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    options: dict[str, Any] = {"balance_coef": 0.5, "z_coef": 0.1}
    counts = [0 if r == size - 1 and size > 1 else 5 + 3 * r for r in range(size)]
    x = _tokens(sum(counts), seed=3)
    whole = _router(**options)
    expected = whole(x)
    expected.loss.backward()
    part = _router(comm=comm, **options)
    begin = sum(counts[:rank])
    out = part(x[begin : begin + counts[rank]])
    out.loss.backward()
    assert out.expert_load.tolist() == expected.expert_load.tolist()
    assert comm.allreduce(float(out.loss.detach())) / size == pytest.approx(float(expected.loss.detach()), rel=1e-4)
    assert whole.weight.grad is not None and part.weight.grad is not None
    mean_grad = torch.from_numpy(comm.allreduce(part.weight.grad.cpu().numpy())) / size
    torch.testing.assert_close(mean_grad, whole.weight.grad.cpu(), rtol=1e-4, atol=1e-6)


def test_no_tokens() -> None:
    out = _router(num_groups=4, top_groups=2, balance_coef=1.0, z_coef=1.0)(_tokens(0))
    assert out.topk_idx.shape == out.topk_weights.shape == (0, K)
    assert float(out.loss.detach()) == 0.0 and int(out.expert_load.sum()) == 0


@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert _router()(_tokens().to(dtype)).topk_weights.dtype == expected


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_are_float32_under_autocast(score: str) -> None:
    router = _router(score=score, norm_topk_prob=True, z_coef=1.0)
    plain = router(_tokens())
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = router(_tokens())
    assert out.topk_weights.dtype == torch.float32
    assert torch.equal(out.topk_idx, plain.topk_idx) and torch.equal(out.topk_weights, plain.topk_weights)
    assert torch.equal(out.loss, plain.loss)


def test_tokens_that_one_rank_has_wrong() -> None:
    """With a communicator all ranks raise; the next call counts as if nothing had been."""
    comm = MPI.COMM_WORLD
    wrong = comm.Get_size() - 1
    router = _router(comm=comm, timeout=20.0)
    is_wrong = comm.Get_rank() == wrong
    message = r"x must be \[num_tokens, 16\]; got \[3, 17\]" if is_wrong else f"rejected on rank {wrong},"
    with pytest.raises(ArgumentError, match=message):
        router(torch.zeros(3, 17 if is_wrong else H, device=DEVICE))
    assert int(router(_tokens()).expert_load.sum()) == T * K * comm.Get_size()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score": "tanh"}, "score must be"),
        ({"num_groups": 5}, "num_groups must divide"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups must be"),
        ({"num_groups": 6, "top_groups": 1}, "top_k must be 1 to 2"),
        ({"top_k": 0}, "top_k must be"),
        ({"num_groups": 4, "group_score_top": 4}, "group_score_top must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TopKRouter(H, E, **{"top_k": K, **options})


def test_bad_tokens() -> None:
    with pytest.raises(ArgumentError, match=r"x must be \[num_tokens, 16\]; got \[3, 17\]"):
        _router()(torch.zeros(3, 17))
