"""`TopKRouter`: chooses the experts of each token, and the losses that keep the choice balanced.

The variants that published models use, as options of one module: softmax or sigmoid scores, renormalised weights, a
scaling factor, group-limited selection, the load-balancing loss and the z-loss. Not for expert-choice routing, capacity
limits or dropped tokens.

Letters: T tokens of this rank, H hidden, K top-k, E experts, G groups of experts, R ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mpi4py import MPI

from hpc_moe.errors import ArgumentError
from hpc_moe.nn.collectives import Collectives
from hpc_moe.nn.copying import copy_sharing


class RouterOutput(NamedTuple):
    """What a router decides.

    Attributes:
        topk_idx: `[T, K] int64`, distinct expert indices, best first.
        topk_weights: `[T, K]`, float32 (float64 for float64 tokens); differentiable.
        loss: scalar, `balance_coef * balance_loss + z_coef * z_loss`: add it to the training loss.
        balance_loss: scalar, without its coefficient and its gradient, for display; 1 when balanced.
        z_loss: scalar, without its coefficient and its gradient, for display.
        expert_load: `[E] int64`, tokens per expert: of all ranks if the router has a `comm`, else of this rank.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    loss: torch.Tensor
    balance_loss: torch.Tensor
    z_loss: torch.Tensor
    expert_load: torch.Tensor


class TopKRouter(torch.nn.Module):
    """A linear router.

    Scores are `softmax(x W^T)` or `sigmoid(x W^T)`, computed in float32 at least. The K best experts are selected. With
    `num_groups > 1`, groups are selected before: a group scores the sum of its best `group_score_top` experts, and only
    experts of the best `top_groups` groups can be selected. That is the device-limited routing of DeepSeek-V2
    (arXiv:2405.04434) with `group_score_top=1`, and the node-limited routing of DeepSeek-V3 (arXiv:2412.19437) with
    `group_score_top = top_k // top_groups`, the default.

    Losses: `balance_loss = E * sum_e f_e P_e`, where `f_e` is the share of the T * K selections that went to expert e
    and `P_e` the mean score (scores normalised to a sum of 1), which is equation 4 of the Switch Transformer
    (arXiv:2101.03961) for any K; and `z_loss = mean_t logsumexp(logits_t)^2`, equation 5 of ST-MoE (arXiv:2202.08906).

    With `comm`, `f_e` and the token count are those of all its ranks (one small allreduce per call, so construction and
    calls are collective), and the mean over the ranks of `loss`, and of its gradient, is exactly the loss of all tokens
    together, however they are spread. Without, both are those of this rank's tokens.

    The weight is drawn from `seed`, equal on every rank. `copy.deepcopy` copies the weight and shares `comm`.

    Args:
        hidden: H.
        num_experts: E.
        top_k: K.
        score: `"softmax"` or `"sigmoid"`.
        norm_topk_prob: divide the selected weights by their sum.
        scaling_factor: multiplies the weights, after normalisation.
        num_groups: G, a divisor of E; 1 for no groups.
        top_groups: groups that may be selected; default: all.
        group_score_top: experts that count for a group's score; default `max(1, top_k // top_groups)`.
        balance_coef: factor of the load-balancing loss.
        z_coef: factor of the z-loss.
        comm: ranks over which the load is counted, or None. Not to be freed before the last call.
        timeout: seconds to wait for the other ranks of `comm`.
        seed: of the weight `[E, H]`, drawn with standard deviation `H ** -0.5`; give every layer another one, or their
            routers are identical.
        dtype: of the weight.
        device: of the weight.

    Raises:
        ArgumentError: sizes that do not fit together, or an unknown score.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        norm_topk_prob: bool = False,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        top_groups: int | None = None,
        group_score_top: int | None = None,
        balance_coef: float = 0.0,
        z_coef: float = 0.0,
        comm: MPI.Intracomm | None = None,
        timeout: float = 100.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        top_groups = num_groups if top_groups is None else top_groups
        _check_sizes(num_experts, top_k, score, num_groups, top_groups)
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.score, self.norm_topk_prob, self.scaling_factor = score, norm_topk_prob, scaling_factor
        self.num_groups, self.top_groups = num_groups, top_groups
        self.group_score_top = max(1, top_k // top_groups) if group_score_top is None else group_score_top
        if not 1 <= self.group_score_top <= num_experts // num_groups:
            raise ArgumentError(
                f"TopKRouter: group_score_top must be 1 to {num_experts // num_groups} (experts in a group); "
                f"got {self.group_score_top}"
            )
        self.balance_coef, self.z_coef = balance_coef, z_coef
        self.comm, self.timeout = comm, timeout
        self._collectives = None if comm is None else Collectives.of(comm, timeout)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(num_experts, hidden, generator=generator) * hidden**-0.5
        self.weight = torch.nn.Parameter(weight.to(device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> RouterOutput:
        """Route the tokens `x [T, H]`. T may be 0. Collective if the router has a `comm`.

        Raises:
            ArgumentError: `x` is wrong here, or was rejected by another rank of `comm`.
            PeerTimeoutError: a rank of `comm` did not come.
        """
        try:
            logits, scores, topk_idx = self._score(x)
        except Exception:
            self._count(None)
            raise
        topk_weights = scores.gather(1, topk_idx)
        if self.norm_topk_prob:
            topk_weights = topk_weights / topk_weights.sum(dim=1, keepdim=True).clamp_min(1e-20)
        topk_weights = topk_weights * self.scaling_factor

        expert_load, tokens_per_rank = self._count(topk_idx)
        balance_loss = self._balance_loss(scores, expert_load, tokens_per_rank)
        z_loss = logits.logsumexp(dim=-1).square().sum() / tokens_per_rank
        loss = self.balance_coef * balance_loss + self.z_coef * z_loss
        return RouterOutput(topk_idx, topk_weights, loss, balance_loss.detach(), z_loss.detach(), expert_load)

    def _score(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits and scores `[T, E]`, and the experts selected `[T, K]`."""
        if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.shape[1] != self.hidden:
            got = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ArgumentError(f"TopKRouter: x must be [num_tokens, {self.hidden}]; got {got}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
        scores = logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()
        return logits, scores, self._select(scores.detach())

    def _select(self, scores: torch.Tensor) -> torch.Tensor:
        if self.top_groups < self.num_groups:
            by_group = scores.reshape(-1, self.num_groups, self.num_experts // self.num_groups)
            group_scores = by_group.topk(self.group_score_top, dim=2).values.sum(dim=2)
            chosen = group_scores.topk(self.top_groups, dim=1).indices
            allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
            scores = by_group.masked_fill(~allowed.unsqueeze(2), -torch.inf).flatten(1)
        return scores.topk(self.top_k, dim=1).indices

    def _count(self, topk_idx: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        """Tokens per expert, and the mean number of tokens per rank (1 where there are none).

        None if this rank rejects its tokens: it takes part all the same, to tell the others.
        """
        chosen = torch.empty(0, dtype=torch.int64) if topk_idx is None else topk_idx
        load = torch.bincount(chosen.flatten(), minlength=self.num_experts)
        num_tokens, num_ranks = chosen.shape[0], 1
        if self._collectives is not None:
            rank, num_ranks = self._collectives.rank, self._collectives.size
            counts = np.zeros(self.num_experts + 1 + num_ranks, np.int64)  # the last R: whether a rank rejects
            counts[: self.num_experts] = load.cpu().numpy()
            counts[self.num_experts] = num_tokens
            counts[self.num_experts + 1 + rank] = topk_idx is None
            self._collectives.all_reduce_sum(counts, "TopKRouter (counting the load)", self.timeout)
            rejecting = np.flatnonzero(counts[self.num_experts + 1 :]).tolist()
            if rejecting and topk_idx is not None:
                names = ", ".join(map(str, rejecting))
                raise ArgumentError(f"TopKRouter: the tokens were rejected on rank {names}, which says why")
            load = torch.from_numpy(counts[: self.num_experts].copy()).to(chosen.device)
            num_tokens = int(counts[self.num_experts])
        return load, max(num_tokens, 1) / num_ranks

    def _balance_loss(self, scores: torch.Tensor, load: torch.Tensor, tokens_per_rank: float) -> torch.Tensor:
        shares = load.to(scores.dtype) / load.sum().clamp_min(1)
        if self.score != "softmax":
            scores = scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-20)
        return self.num_experts * torch.dot(shares, scores.sum(dim=0) / tokens_per_rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> TopKRouter:
        return copy_sharing(self, memo, self.comm, self._collectives)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}"


def _check_sizes(num_experts: int, top_k: int, score: str, num_groups: int, top_groups: int) -> None:
    if score not in ("softmax", "sigmoid"):
        raise ArgumentError(f"TopKRouter: score must be 'softmax' or 'sigmoid'; got {score!r}")
    if num_groups < 1 or num_experts % num_groups:
        raise ArgumentError(f"TopKRouter: num_groups must divide num_experts={num_experts}; got {num_groups}")
    if not 1 <= top_groups <= num_groups:
        raise ArgumentError(f"TopKRouter: top_groups must be 1 to {num_groups} (num_groups); got {top_groups}")
    selectable = num_experts // num_groups * top_groups
    if not 1 <= top_k <= selectable:
        raise ArgumentError(f"TopKRouter: top_k must be 1 to {selectable} (experts that can be selected); got {top_k}")
