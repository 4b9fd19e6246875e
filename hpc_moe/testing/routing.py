"""Generators of routings: `topk_idx` and `topk_weights` as a router would produce them, in easy and in nasty shapes.

For tests and benchmarks. They are not routers: they look at no token.
"""

from __future__ import annotations

import torch

ROUTING_KINDS: tuple[str, ...] = ("balanced", "skewed", "one_rank", "one_expert", "none", "masked")


def make_topk_idx(
    kind: str, num_tokens: int, top_k: int, num_experts: int, num_ranks: int, generator: torch.Generator
) -> torch.Tensor:
    """Return `topk_idx [num_tokens, top_k] int64`: distinct experts per token, -1 where a token selects none.

    Args:
        kind: one of `ROUTING_KINDS`:
            `"balanced"`: `top_k` experts drawn uniformly;
            `"skewed"`: low expert indices are much more likely (weight `1 / (1 + e)^2`);
            `"one_rank"`: every token chooses among the experts of one rank (drawn once), -1 where it has too few;
            `"one_expert"`: every token selects one expert (drawn once) in a random column, and nothing else;
            `"none"`: -1 everywhere;
            `"masked"`: balanced, then each entry becomes -1 with probability 0.4.
        num_tokens: T, 0 or more.
        top_k: K, at least 1; more than `num_experts` leaves -1 in the columns beyond.
        num_experts: E, a multiple of `num_ranks`.
        num_ranks: R.
        generator: source of randomness; a CPU generator.

    Raises:
        ValueError: unknown kind, or sizes out of range.
    """
    if kind not in ROUTING_KINDS:
        raise ValueError(f"make_topk_idx: kind must be one of {ROUTING_KINDS}; got {kind!r}")
    if num_tokens < 0 or top_k < 1 or num_ranks < 1 or num_experts < 1 or num_experts % num_ranks:
        raise ValueError(
            "make_topk_idx: needs num_tokens >= 0, top_k >= 1 and num_experts a positive multiple of num_ranks; got "
            f"num_tokens={num_tokens}, top_k={top_k}, num_experts={num_experts}, num_ranks={num_ranks}"
        )
    result = torch.full((num_tokens, top_k), -1, dtype=torch.int64)
    if kind == "none":
        return result
    if kind == "one_expert":
        expert = int(torch.randint(num_experts, (1,), generator=generator))
        column = torch.randint(top_k, (num_tokens, 1), generator=generator)
        return result.scatter_(1, column, expert)

    likelihood = torch.ones(num_experts)
    if kind == "skewed":
        likelihood = 1.0 / (1.0 + torch.arange(num_experts)) ** 2
    if kind == "one_rank":
        num_local = num_experts // num_ranks
        first = int(torch.randint(num_ranks, (1,), generator=generator)) * num_local
        likelihood = torch.zeros(num_experts)
        likelihood[first : first + num_local] = 1.0
    # The k largest of likelihood / exponential noise are a weighted sample without replacement.
    noise = torch.rand(num_tokens, num_experts, generator=generator).clamp_min(1e-12).log().neg()
    num_selected = min(top_k, int((likelihood > 0).sum()))
    columns = torch.randperm(top_k, generator=generator)[:num_selected]
    result[:, columns] = (likelihood / noise).topk(num_selected, dim=1).indices
    if kind == "masked":
        result[torch.rand(num_tokens, top_k, generator=generator) < 0.4] = -1
    return result


def make_topk_weights(topk_idx: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return `topk_weights [T, K] float32`: positive, summing to 1 over a token's experts, 0 where `topk_idx` is -1."""
    weights = torch.rand(topk_idx.shape, generator=generator) + 0.05
    weights = weights * (topk_idx >= 0)
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)
