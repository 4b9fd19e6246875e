"""What every call of `hpc_moe.Buffer` must return, computed with plain torch from the inputs of all ranks.

For tests: slow, readable, on the CPU, without communication. Every function takes lists with one entry per rank (the
*gathered* inputs; `gather_tensors` collects them) and the rank whose result is wanted. What is only moved is returned
as it must arrive, to the bit; what is summed is returned in float64 with the error that is allowed (`Bounded`).

Letters: T tokens of a rank, H hidden, K top-k, R ranks, N nodes, E experts, L = E / R local experts,
M the most tokens a rank may send in a low-latency call, N_recv rows received.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from hpc_moe.fp8 import cast_to_fp8
from hpc_moe.testing.logfmt import LOGFMT_CODES, LOGFMT_MAX_RANGE, encode, split_groups

# Rows as Buffer takes them: one tensor [T, H], or (values [T, H], scales [T, S]).
Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Bounded:
    """A sum in float64 and the largest error allowed, element by element (both float64, same shape)."""

    value: torch.Tensor
    bound: torch.Tensor

    def worst_excess(self, actual: torch.Tensor) -> float:
        """Return the largest `|actual - value| - bound`: 0 or less is right; NaN anywhere gives infinity."""
        if actual.shape != self.value.shape:
            raise ValueError(f"worst_excess: actual is {list(actual.shape)}, the reference {list(self.value.shape)}")
        if not actual.numel():
            return 0.0
        excess = (actual.double() - self.value).abs() - self.bound
        return float(torch.where(excess.isnan(), torch.inf, excess).max())


# ---------------------------------------------------------------------------------------------------------------------
# Layout


@dataclass(frozen=True)
class Layout:
    """The result of `get_dispatch_layout` on one rank.

    Attributes:
        num_tokens_per_rank: `[R] int32`; tokens that go to each rank.
        num_tokens_per_rdma_rank: `[N] int32`; tokens that go to each node (its own too), or None on one node.
        num_tokens_per_expert: `[E] int32`.
        is_token_in_rank: `[T, R] bool`.
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


def layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int, node_of_rank: Sequence[int] = ()) -> Layout:
    """Compute the layout of one rank's `topk_idx [T, K] int64`.

    Args:
        topk_idx: selected experts, -1 for none.
        num_experts: E.
        num_ranks: R.
        node_of_rank: node of each rank, numbered by their lowest rank; empty means one node.
    """
    num_tokens = topk_idx.shape[0]
    is_token_in_expert = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool)
    is_token_in_expert.scatter_(1, torch.where(topk_idx < 0, num_experts, topk_idx), True)
    is_token_in_expert = is_token_in_expert[:, :num_experts]
    is_token_in_rank = is_token_in_expert.reshape(num_tokens, num_ranks, num_experts // num_ranks).any(dim=2)
    per_node = None
    if len(set(node_of_rank)) > 1:
        nodes = torch.tensor(node_of_rank)
        per_node = torch.stack(
            [is_token_in_rank[:, nodes == node].any(dim=1).sum() for node in range(len(set(node_of_rank)))]
        ).int()
    return Layout(is_token_in_rank.sum(dim=0).int(), per_node, is_token_in_expert.sum(dim=0).int(), is_token_in_rank)


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


@dataclass(frozen=True)
class Routing:
    """Where the tokens of all ranks go: what a dispatch, and everything that reuses its handle, is about.

    Attributes:
        is_token_in_rank: R tensors `[T, R] bool`.
        num_tokens_per_expert: R tensors `[E] int32`.
        topk_idx: R tensors `[T, K] int64`, or None for a dispatch without top-k.
        num_experts: E.
    """

    is_token_in_rank: list[torch.Tensor]
    num_tokens_per_expert: list[torch.Tensor]
    topk_idx: list[torch.Tensor] | None
    num_experts: int

    @classmethod
    def from_topk(cls, topk_idx: Sequence[torch.Tensor], num_experts: int) -> Routing:
        """Make it from the `topk_idx` of all ranks."""
        layouts = [layout(idx, num_experts, len(topk_idx)) for idx in topk_idx]
        return cls(
            [each.is_token_in_rank for each in layouts],
            [each.num_tokens_per_expert for each in layouts],
            list(topk_idx),
            num_experts,
        )

    def without_topk(self) -> Routing:
        """The same routing as a dispatch sees it that is given the layout, but no top-k."""
        return Routing(self.is_token_in_rank, self.num_tokens_per_expert, None, self.num_experts)

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.is_token_in_rank)

    @property
    def num_local_experts(self) -> int:
        """L."""
        return self.num_experts // self.num_ranks

    def sources(self, rank: int) -> list[tuple[int, torch.Tensor]]:
        """What `rank` receives, in order: for each source rank, the indices of its tokens."""
        return [(src, mask[:, rank].nonzero().flatten()) for src, mask in enumerate(self.is_token_in_rank)]

    def num_recv_tokens(self, rank: int) -> int:
        """N_recv of `rank`."""
        return sum(tokens.numel() for _, tokens in self.sources(rank))

    def rank_prefix_matrix(self) -> torch.Tensor:
        """`[R, R] int32`; `[i][r]` is the end row, in rank r's `recv_x`, of what rank i sent."""
        sent = torch.stack([mask.sum(dim=0) for mask in self.is_token_in_rank])
        return sent.cumsum(dim=0).int()

    def local_topk_idx(self, rank: int) -> torch.Tensor:
        """`[N_recv, K] int64`; local experts of the received tokens, -1 where the expert is elsewhere."""
        if self.topk_idx is None:
            raise ValueError("Routing.local_topk_idx: this routing has no topk_idx")
        received = torch.cat([self.topk_idx[src][tokens] for src, tokens in self.sources(rank)])
        local = received - rank * self.num_local_experts
        return torch.where((local >= 0) & (local < self.num_local_experts), local, -1)

    def aligned_counts(self, rank: int, expert_alignment: int) -> list[int]:
        """Tokens for each local expert of `rank`, rounded up to `expert_alignment`."""
        first = rank * self.num_local_experts
        total = torch.stack(self.num_tokens_per_expert).sum(dim=0)[first : first + self.num_local_experts]
        return [-(-int(count) // expert_alignment) * expert_alignment for count in total]

    def grouped_rows(self, rank: int, expert_alignment: int) -> torch.Tensor:
        """`[N_recv, K] int32`; row, in a grouped `recv_x`, of each received token's copy for its k-th expert, or -1."""
        local = self.local_topk_idx(rank)
        rows = torch.full(local.shape, -1, dtype=torch.int32)
        begin = 0
        for expert, count in enumerate(self.aligned_counts(rank, expert_alignment)):
            token, column = (local == expert).nonzero(as_tuple=True)  # in order of source rank, then token
            rows[token, column] = torch.arange(begin, begin + token.numel(), dtype=torch.int32)
            begin += count
        return rows


@dataclass(frozen=True)
class Dispatched:
    """The result of `dispatch` on one rank, and the fields of its handle.

    Attributes:
        recv_x: `[num_rows, H]`, or (values, scales). Rows left unused by `num_worst_tokens` are zero here; `Buffer`
            may leave anything in them.
        recv_topk_idx: token layout `[num_rows, K] int64`, grouped layout `[num_rows] int64`; -1 for none; None
            without top-k.
        recv_topk_weights: the same shape, float32, 0 where `recv_topk_idx` is -1; None without top-k weights.
        num_recv_tokens_per_expert_list: L ints, rounded up; empty with `num_worst_tokens`.
        num_recv_tokens: N_recv.
        num_rows: rows of `recv_x`.
        num_used_rows: rows before those that `num_worst_tokens` leaves unused.
        recv_src_idx: `[N_recv] int32`.
        rank_prefix_matrix: `[R, R] int32`.
        recv_rank_prefix_sum: `[R] int32`.
        grouped_rows: `[N_recv, K] int32` in the grouped layout, else None.
    """

    recv_x: Rows
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    num_recv_tokens_per_expert_list: list[int]
    num_recv_tokens: int
    num_rows: int
    num_used_rows: int
    recv_src_idx: torch.Tensor
    rank_prefix_matrix: torch.Tensor
    recv_rank_prefix_sum: torch.Tensor
    grouped_rows: torch.Tensor | None


def num_recv_rows(routing: Routing, rank: int, expert_alignment: int = 1, expert_layout: str = "token") -> int:
    """Rows of `recv_x` that a dispatch fills on `rank`, padding of the grouped layout included."""
    if expert_layout == "grouped":
        return sum(routing.aligned_counts(rank, expert_alignment))
    return routing.num_recv_tokens(rank)


def dispatch(
    routing: Routing,
    x: Sequence[Rows],
    topk_weights: Sequence[torch.Tensor] | None,
    rank: int,
    *,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
    expert_layout: str = "token",
) -> Dispatched:
    """Compute what `dispatch` returns on `rank`.

    Args:
        routing: where the tokens of all ranks go.
        x: of each rank, `[T, H]` or (values `[T, H]`, scales `[T, S]`), any dtype; moved, never converted.
        topk_weights: of each rank `[T, K] float32`, or None.
        rank: whose result.
        expert_alignment, num_worst_tokens, expert_layout: as in `Buffer.dispatch`.

    Raises:
        ValueError: `num_worst_tokens` is too small, the layout is unknown, or grouped without top-k.
    """
    if expert_layout not in ("token", "grouped"):
        raise ValueError(f"dispatch: expert_layout must be 'token' or 'grouped'; got {expert_layout!r}")
    sources = routing.sources(rank)
    prefix = routing.rank_prefix_matrix()
    num_recv_tokens = routing.num_recv_tokens(rank)
    counts = routing.aligned_counts(rank, expert_alignment)
    values = [each[0] if isinstance(each, tuple) else each for each in x]
    scales = [each[1] for each in x if isinstance(each, tuple)]

    local = routing.local_topk_idx(rank) if routing.topk_idx is not None else None
    weights = None
    if topk_weights is not None and local is not None:
        weights = torch.cat([topk_weights[src][tokens] for src, tokens in sources])
        weights = torch.where(local >= 0, weights, 0.0)

    # `picked[row]` is the received token that the row holds, -1 in padding.
    picked = torch.arange(num_recv_tokens)
    grouped_rows = None
    if expert_layout == "grouped":
        if local is None:
            raise ValueError("dispatch: expert_layout='grouped' needs topk_idx")
        grouped_rows = routing.grouped_rows(rank, expert_alignment)
        token, column = (grouped_rows >= 0).nonzero(as_tuple=True)
        row = grouped_rows[token, column].long()
        picked = torch.full((sum(counts),), -1).index_put((row,), token)
        flat_idx = torch.full((sum(counts),), -1).index_put((row,), local[token, column])
        if weights is not None:
            weights = torch.zeros(sum(counts), dtype=weights.dtype).index_put((row,), weights[token, column])
        local = flat_idx

    num_used_rows = picked.numel()
    num_rows = num_worst_tokens or num_used_rows
    if num_rows < num_used_rows:
        raise ValueError(f"dispatch: rank {rank} receives {num_used_rows} rows; num_worst_tokens={num_worst_tokens}")

    def received(per_rank: Sequence[torch.Tensor]) -> torch.Tensor:
        arrived = torch.cat([per_rank[src][tokens] for src, tokens in sources])
        result = torch.zeros((num_rows, *arrived.shape[1:]), dtype=arrived.dtype)
        used = (picked >= 0).nonzero().flatten()
        if arrived.numel():
            _as_bytes(result)[used] = _as_bytes(arrived)[picked[used]]
        return result

    return Dispatched(
        recv_x=(received(values), received(scales)) if scales else received(values),
        recv_topk_idx=None if local is None else _with_rows(local, num_rows, -1),
        recv_topk_weights=None if weights is None else _with_rows(weights, num_rows, 0),
        num_recv_tokens_per_expert_list=[] if num_worst_tokens else counts,
        num_recv_tokens=num_recv_tokens,
        num_rows=num_rows,
        num_used_rows=num_used_rows,
        recv_src_idx=torch.cat([tokens for _, tokens in sources]).int(),
        rank_prefix_matrix=prefix,
        recv_rank_prefix_sum=prefix[:, rank].clone(),
        grouped_rows=grouped_rows,
    )


def _with_rows(tensor: torch.Tensor, num_rows: int, fill: float) -> torch.Tensor:
    result = torch.full((num_rows, *tensor.shape[1:]), fill, dtype=tensor.dtype)
    result[: tensor.shape[0]] = tensor
    return result


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A view as `[rows, bytes] uint8`: fp8 has no indexing of its own everywhere, and bytes keep every NaN."""
    return tensor.view(torch.uint8).reshape(tensor.shape[0], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Combine


@dataclass(frozen=True)
class Combined:
    """The result of `combine` on one rank: `x [T, H]`, and `topk_weights [T, K]` or None."""

    x: Bounded
    topk_weights: Bounded | None


def combine(
    routing: Routing,
    x: Sequence[torch.Tensor],
    rank: int,
    *,
    topk_weights: Sequence[torch.Tensor] | None = None,
    biases: Sequence[torch.Tensor] = (),
    expert_alignment: int = 1,
    expert_layout: str = "token",
    node_of_rank: Sequence[int] = (),
) -> Combined:
    """Compute what `combine` returns on `rank`.

    Args:
        routing: that of the dispatch.
        x: of each rank `[rows, H]`, any floating dtype; at least the rows that the dispatch filled.
        rank: whose result.
        topk_weights: of each rank `[rows, K]`, in the grouped layout `[rows]`; or None.
        biases: 0, 1 or 2 tensors `[T, H]` of `rank`.
        expert_alignment, expert_layout: those of the dispatch.
        node_of_rank: node of each rank; with more than one node, a bf16 partial sum per node is allowed for.
    """
    num_tokens = routing.is_token_in_rank[rank].shape[0]
    nodes = list(node_of_rank) or [0] * routing.num_ranks
    hidden = x[rank].shape[1]
    node_sums = torch.zeros(max(nodes) + 1, num_tokens, hidden, dtype=torch.float64)
    magnitudes = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    num_terms = torch.zeros(num_tokens, 1, dtype=torch.int64)
    weight_sums = weight_magnitudes = None

    for peer in range(routing.num_ranks):
        received, tokens = _rows_back_to(routing, peer, rank)
        if expert_layout == "grouped":
            rows = routing.grouped_rows(peer, expert_alignment)[received]
        else:
            rows = received.unsqueeze(1)
        for column in range(rows.shape[1]):
            used = rows[:, column] >= 0
            token, row = tokens[used], rows[used, column].long()
            term = x[peer][row].double()
            node_sums[nodes[peer], token] += term
            magnitudes[token] += term.abs()
            num_terms[token] += 1
        if topk_weights is None:
            continue
        returned = topk_weights[peer].double()
        if expert_layout == "grouped":
            returned = torch.where(rows >= 0, returned[rows.clamp_min(0).long()] if returned.numel() else 0.0, 0.0)
        else:
            returned = returned[received]
        if weight_sums is None or weight_magnitudes is None:
            weight_sums = torch.zeros(num_tokens, returned.shape[1], dtype=torch.float64)
            weight_magnitudes = torch.zeros_like(weight_sums)
        weight_sums[tokens] += returned
        weight_magnitudes[tokens] += returned.abs()

    value = node_sums.sum(dim=0)
    for bias in biases:
        value = value + bias.double()
        magnitudes = magnitudes + bias.double().abs()
    bound = 2.0**-8 * value.abs() + 2.0**-20 * magnitudes
    if max(nodes) > 0:
        bound = bound + 2.0**-8 * node_sums.abs().sum(dim=0)
    is_exact = (num_terms + len(biases)) <= 1
    combined_weights = None
    if weight_sums is not None and weight_magnitudes is not None:
        combined_weights = Bounded(weight_sums, 2.0**-20 * weight_magnitudes)
    return Combined(Bounded(value, torch.where(is_exact, 0.0, bound)), combined_weights)


def _rows_back_to(routing: Routing, peer: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what `peer` received: the indices of the tokens that `rank` sent, and their indices on `rank`."""
    begin = 0
    for src, tokens in routing.sources(peer):
        if src == rank:
            return torch.arange(begin, begin + tokens.numel()), tokens
        begin += tokens.numel()
    raise ValueError(f"combine: rank {rank} is not among the {routing.num_ranks} ranks")


# ---------------------------------------------------------------------------------------------------------------------
# Low latency


@dataclass(frozen=True)
class LowLatencyDispatched:
    """The result of `low_latency_dispatch` on one rank. Rows from `recv_count` on are zero here, undefined in `Buffer`.

    Attributes:
        recv_x: `[L, M*R, H] bfloat16`, or (e4m3 `[L, M*R, H]`, scales `[L, M*R, H/128] float32` or, with UE8M0,
            `[L, M*R, H/512] int32`).
        recv_count: `[L] int32`.
        recv_src_idx: `[L, M*R] int32`.
        recv_layout_range: `[L, R] int64`; `begin << 32 | count`.
    """

    recv_x: Rows
    recv_count: torch.Tensor
    recv_src_idx: torch.Tensor
    recv_layout_range: torch.Tensor

    @property
    def is_row_used(self) -> torch.Tensor:
        """`[L, M*R] bool`; the rows that hold a token."""
        return torch.arange(self.recv_src_idx.shape[1]) < self.recv_count.unsqueeze(1)


def low_latency_dispatch(
    x: Sequence[torch.Tensor],
    topk_idx: Sequence[torch.Tensor],
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    rank: int,
    *,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
    masked_ranks: Collection[int] = (),
) -> LowLatencyDispatched:
    """Compute what `low_latency_dispatch` returns on `rank`.

    Args:
        x: of each rank `[T, H] bfloat16`.
        topk_idx: of each rank `[T, K] int64`.
        num_max_dispatch_tokens_per_rank: M.
        num_experts: E.
        rank: whose result.
        use_fp8, round_scale, use_ue8m0: as in `Buffer.low_latency_dispatch`.
        masked_ranks: ranks that `rank` has masked; nothing arrives from them.
    """
    num_ranks, hidden = len(x), x[rank].shape[1]
    num_local = num_experts // num_ranks
    num_rows = num_max_dispatch_tokens_per_rank * num_ranks
    recv = torch.zeros(num_local, num_rows, hidden, dtype=torch.bfloat16)
    src_idx = torch.zeros(num_local, num_rows, dtype=torch.int32)
    layout_range = torch.zeros(num_local, num_ranks, dtype=torch.int64)
    count = torch.zeros(num_local, dtype=torch.int32)
    for expert in range(num_local):
        begin = 0
        for src in range(num_ranks):
            selected = (topk_idx[src] == rank * num_local + expert).any(dim=1)
            tokens = selected.nonzero().flatten() if src not in masked_ranks else torch.empty(0, dtype=torch.int64)
            end = begin + tokens.numel()
            recv[expert, begin:end] = x[src][tokens]
            src_idx[expert, begin:end] = tokens.int()
            layout_range[expert, src] = begin << 32 | tokens.numel()
            begin = end
        count[expert] = begin
    recv_x: Rows = recv
    if use_fp8:
        recv_x = cast_to_fp8(recv, round_scale, use_ue8m0)
    return LowLatencyDispatched(recv_x, count, src_idx, layout_range)


def low_latency_combine(
    x: Sequence[torch.Tensor],
    topk_idx: Sequence[torch.Tensor],
    topk_weights: torch.Tensor,
    num_experts: int,
    rank: int,
    *,
    weights_at_dispatch: bool = False,
    use_logfmt: bool = False,
    masked_ranks: Collection[int] = (),
) -> Bounded:
    """Compute what `low_latency_combine` returns on `rank`: `[T, H]`.

    Args:
        x: of each rank `[L, M*R, H] bfloat16`, rows as the dispatch placed them.
        topk_idx: of each rank `[T, K] int64`.
        topk_weights: of `rank`, `[T, K] float32`.
        num_experts: E.
        rank: whose result.
        weights_at_dispatch: whether `topk_weights` travelled with the dispatch, so that the ranks may sum first.
        use_logfmt: whether rows may travel in the logarithmic format; its error is added to the bound.
        masked_ranks: ranks that take no part, as all others have it; they send and receive nothing.
    """
    num_ranks = len(topk_idx)
    num_local = num_experts // num_ranks
    num_tokens, top_k = topk_idx[rank].shape
    hidden = x[rank].shape[2]
    partial_sums = torch.zeros(num_ranks, num_tokens, hidden, dtype=torch.float64)
    magnitudes = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    format_error = torch.zeros(num_tokens, hidden, dtype=torch.float64)

    rows = _low_latency_rows(topk_idx, num_experts, rank, masked_ranks)
    for column in range(top_k):
        tokens = (rows[:, column] >= 0).nonzero().flatten()
        experts = topk_idx[rank][tokens, column]
        peers = experts // num_local
        sent = _take_rows(x, peers, experts % num_local, rows[tokens, column])
        weights = topk_weights[tokens, column].double().unsqueeze(1)
        partial_sums[peers, tokens] += sent.double() * weights
        magnitudes[tokens] += (sent.double() * weights).abs()
        if use_logfmt and not weights_at_dispatch:
            format_error[tokens] += encode(sent).error_bound() * weights.abs()

    value = partial_sums.sum(dim=0)
    bound = 2.0**-8 * value.abs() + 2.0**-20 * magnitudes + format_error
    if weights_at_dispatch:
        bound = bound + 2.0**-8 * partial_sums.abs().sum(dim=0)
        if use_logfmt:
            bound = bound + _worst_logfmt_error(partial_sums).sum(dim=0)
    return Bounded(value, bound)


def _low_latency_rows(
    topk_idx: Sequence[torch.Tensor], num_experts: int, rank: int, masked_ranks: Collection[int]
) -> torch.Tensor:
    """`[T, K] int64`; the row, among its expert's, of each copy of the tokens of `rank`; -1 where there is none."""
    num_local = num_experts // len(topk_idx)
    rows = torch.full(topk_idx[rank].shape, -1)
    for expert in range(num_experts):
        if expert // num_local in masked_ranks:
            continue
        before = sum(int((topk_idx[src] == expert).sum()) for src in range(rank) if src not in masked_ranks)
        token, column = (topk_idx[rank] == expert).nonzero(as_tuple=True)
        rows[token, column] = before + torch.arange(token.numel())
    return rows


def _take_rows(
    x: Sequence[torch.Tensor], peers: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """`[n, H]`; row `rows[i]` of local expert `experts[i]` of `x[peers[i]]`."""
    taken = torch.empty(peers.numel(), x[0].shape[2], dtype=x[0].dtype)
    for peer in sorted(set(peers.tolist())):
        mine = peers == peer
        taken[mine] = x[peer][experts[mine], rows[mine]]
    return taken


def _worst_logfmt_error(partial_sums: torch.Tensor) -> torch.Tensor:
    """The most that the logarithmic format may lose on sums `[..., H]` that are known but for their rounding.

    Rounding decides what a cancelled sum's smallest magnitude is, hence the range: the widest one is assumed.
    """
    groups = split_groups(partial_sums.abs())
    half_gap: float = (2.0 ** (LOGFMT_MAX_RANGE / (LOGFMT_CODES - 1)) - 1) / 2
    largest = groups.amax(dim=-1, keepdim=True)
    error: torch.Tensor = groups * half_gap * 1.05 + largest * 2.0 ** -(LOGFMT_MAX_RANGE + 0.9)
    return error.flatten(-2)
