"""Holds `hpc_moe.testing.reference` to identities and to brute-force loops that are written another way.

Runs on one rank; `test_worked_examples.py` holds it to literal arrays, the property tests hold `Buffer` to it.
"""

from __future__ import annotations

import math
import struct

import pytest
import torch
from support import Verdict

from hpc_moe import fp8
from hpc_moe.errors import ArgumentError
from hpc_moe.testing import ROUTING_KINDS, ReferenceBuffer, gather_tensors, logfmt, make_topk_idx, make_topk_weights
from hpc_moe.testing import reference as ref

HIDDEN = 128


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_case(
    kind: str, num_ranks: int, seed: int = 0, num_local: int = 3, top_k: int = 4
) -> tuple[ref.Routing, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """A routing with its `topk_idx`, `topk_weights` and bf16 tokens of every rank."""
    gen = generator(seed)
    num_experts = num_local * num_ranks
    num_tokens = torch.randint(0, 9, (num_ranks,), generator=gen).tolist()
    top_k = min(top_k, num_experts)
    topk_idx = [make_topk_idx(kind, n, top_k, num_experts, num_ranks, gen) for n in num_tokens]
    weights = [make_topk_weights(idx, gen) for idx in topk_idx]
    x = [torch.randn(n, HIDDEN, generator=gen).bfloat16() for n in num_tokens]
    return ref.Routing.from_topk(topk_idx, num_experts), topk_idx, weights, x


@pytest.mark.parametrize("kind", ROUTING_KINDS)
def test_routings_are_valid(kind: str) -> None:
    topk_idx = make_topk_idx(kind, 200, 4, 12, 3, generator())
    weights = make_topk_weights(topk_idx, generator())
    assert topk_idx.dtype == torch.int64 and topk_idx.shape == (200, 4)
    assert ((topk_idx >= -1) & (topk_idx < 12)).all()
    for row in topk_idx.tolist():
        selected = [expert for expert in row if expert >= 0]
        assert len(set(selected)) == len(selected)
    selects_any = (topk_idx >= 0).any(dim=1)
    assert torch.allclose(weights.sum(dim=1), selects_any.float())
    assert ((weights > 0) == (topk_idx >= 0)).all()

    experts = set(topk_idx[topk_idx >= 0].tolist())
    if kind == "none":
        assert not experts
    if kind == "one_expert":
        assert len(experts) == 1
    if kind == "one_rank":
        assert len({expert // 4 for expert in experts}) == 1 and len(experts) == 4
    if kind == "masked":
        assert 0.2 < (topk_idx < 0).float().mean() < 0.6
    if kind == "skewed":
        assert (topk_idx == 0).sum() > 3 * (topk_idx == 11).sum()


def test_routing_rejects_nonsense() -> None:
    with pytest.raises(ValueError, match="kind"):
        make_topk_idx("elsewhere", 4, 2, 8, 2, generator())
    with pytest.raises(ValueError, match="num_experts"):
        make_topk_idx("balanced", 4, 2, 9, 2, generator())


@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("node_of_rank", [(), (0, 1, 0, 1), (0, 0, 1, 1), (0, 1, 2, 3)])
def test_layout_against_loops(kind: str, node_of_rank: tuple[int, ...]) -> None:
    _, topk_idx, _, _ = random_case(kind, 4, seed=1)
    for idx in topk_idx:
        result = ref.layout(idx, 12, 4, node_of_rank)
        per_rank, per_node, per_expert = [0] * 4, [0] * 4, [0] * 12
        for token, row in enumerate(idx.tolist()):
            ranks = {expert // 3 for expert in row if expert >= 0}
            for rank in range(4):
                assert bool(result.is_token_in_rank[token, rank]) == (rank in ranks)
                per_rank[rank] += rank in ranks
            for node in {node_of_rank[rank] for rank in ranks} if node_of_rank else ():
                per_node[node] += 1
            for expert in row:
                if expert >= 0:
                    per_expert[expert] += 1
        assert result.num_tokens_per_rank.tolist() == per_rank
        assert result.num_tokens_per_expert.tolist() == per_expert
        if node_of_rank:
            assert result.num_tokens_per_rdma_rank is not None
            assert result.num_tokens_per_rdma_rank.tolist() == per_node[: len(set(node_of_rank))]
        else:
            assert result.num_tokens_per_rdma_rank is None


@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_dispatch_against_loops(kind: str, num_ranks: int) -> None:
    routing, topk_idx, weights, x = random_case(kind, num_ranks, seed=2)
    for rank in range(num_ranks):
        rows = []  # (source, token, local experts, weights)
        ends = []
        for src in range(num_ranks):
            for token, experts in enumerate(topk_idx[src].tolist()):
                local = [e - 3 * rank if e >= 0 and e // 3 == rank else -1 for e in experts]
                if max(local) >= 0:
                    kept = [w if e >= 0 else 0.0 for e, w in zip(local, weights[src][token].tolist(), strict=True)]
                    rows.append((src, token, local, kept))
            ends.append(len(rows))

        out = ref.dispatch(routing, x, weights, rank)
        assert isinstance(out.recv_x, torch.Tensor)
        assert out.recv_topk_idx is not None and out.recv_topk_weights is not None
        assert out.num_recv_tokens == out.num_rows == len(rows)
        assert out.recv_topk_idx.tolist() == [row[2] for row in rows]
        assert out.recv_topk_weights.tolist() == [row[3] for row in rows]
        assert out.recv_src_idx.tolist() == [row[1] for row in rows]
        assert out.recv_rank_prefix_sum.tolist() == ends
        assert out.rank_prefix_matrix[:, rank].tolist() == ends
        for row, (src, token, _, _) in zip(out.recv_x, rows, strict=True):
            assert torch.equal(row, x[src][token])
        counts = [sum(e in row[2] for row in rows) for e in range(3)]
        assert out.num_recv_tokens_per_expert_list == counts
        assert ref.dispatch(routing, x, weights, rank, expert_alignment=4).num_recv_tokens_per_expert_list == [
            4 * math.ceil(count / 4) for count in counts
        ]

        grouped = ref.dispatch(routing, x, weights, rank, expert_alignment=4, expert_layout="grouped")
        assert isinstance(grouped.recv_x, torch.Tensor) and grouped.grouped_rows is not None
        assert grouped.recv_topk_idx is not None and grouped.recv_topk_weights is not None
        seen = 0
        begin = 0
        for expert in range(3):
            mine = [row for row in rows if expert in row[2]]
            for i, (src, token, local, kept) in enumerate(mine):
                assert torch.equal(grouped.recv_x[begin + i], x[src][token])
                assert int(grouped.recv_topk_idx[begin + i]) == expert
                assert float(grouped.recv_topk_weights[begin + i]) == kept[local.index(expert)]
                where = rows.index((src, token, local, kept)), local.index(expert)
                assert int(grouped.grouped_rows[where]) == begin + i
                seen += 1
            end = begin + 4 * math.ceil(len(mine) / 4)
            assert not grouped.recv_x[begin + len(mine) : end].any()
            assert (grouped.recv_topk_idx[begin + len(mine) : end] == -1).all()
            begin = end
        assert grouped.num_rows == begin
        assert int((grouped.grouped_rows >= 0).sum()) == seen


def test_dispatch_moves_bits() -> None:
    routing, _, _, x = random_case("balanced", 2, seed=3)
    bits = [torch.randint(0, 256, each.shape, generator=generator(i), dtype=torch.uint8) for i, each in enumerate(x)]
    scales = [torch.randn(each.shape[0], 1, generator=generator(i)) for i, each in enumerate(x)]
    plain = ref.dispatch(routing, bits, None, 1, num_worst_tokens=40)
    pair = ref.dispatch(
        routing,
        [(b.view(torch.float8_e4m3fn), s) for b, s in zip(bits, scales, strict=True)],
        None,
        1,
        num_worst_tokens=40,
    )
    assert isinstance(plain.recv_x, torch.Tensor) and isinstance(pair.recv_x, tuple)
    assert pair.recv_x[0].shape == (40, HIDDEN) and pair.recv_x[1].shape == (40, 1)
    assert torch.equal(pair.recv_x[0].view(torch.uint8), plain.recv_x)
    assert pair.num_recv_tokens_per_expert_list == []
    with pytest.raises(ValueError, match="num_worst_tokens"):
        ref.dispatch(routing, bits, None, 1, num_worst_tokens=1)
    with pytest.raises(ValueError, match="topk_idx"):
        ref.dispatch(routing.without_topk(), bits, None, 1, expert_layout="grouped")


@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("expert_layout", ["token", "grouped"])
def test_combine_of_dispatch_counts_copies(kind: str, expert_layout: str) -> None:
    """Combining untouched what was dispatched gives each token times its copies, and its weights back."""
    num_ranks = 3
    routing, topk_idx, weights, x = random_case(kind, num_ranks, seed=4)
    sent = [ref.dispatch(routing, x, weights, r, expert_alignment=2, expert_layout=expert_layout) for r in range(3)]
    for rank in range(num_ranks):
        bias = torch.randn(x[rank].shape, generator=generator(rank)).bfloat16()
        out = ref.combine(
            routing,
            [each.recv_x for each in sent if isinstance(each.recv_x, torch.Tensor)],
            rank,
            topk_weights=[each.recv_topk_weights for each in sent if each.recv_topk_weights is not None],
            biases=[bias],
            expert_alignment=2,
            expert_layout=expert_layout,
        )
        if expert_layout == "grouped":
            copies = (topk_idx[rank] >= 0).sum(dim=1, keepdim=True)
        else:
            copies = routing.is_token_in_rank[rank].sum(dim=1, keepdim=True)
        assert torch.allclose(out.x.value, x[rank].double() * copies + bias.double(), rtol=1e-12, atol=1e-12)
        assert out.topk_weights is not None
        assert torch.equal(out.topk_weights.value, weights[rank].double())
        assert ((out.x.bound > 0) | (copies == 0) | (out.x.value == 0)).all()
        assert out.x.worst_excess(out.x.value.bfloat16()) <= 0


def test_combine_bounds() -> None:
    routing = ref.Routing.from_topk([torch.tensor([[0, 2], [1, 0], [-1, -1]]), torch.empty(0, 2, dtype=torch.int64)], 4)
    x = [torch.full((2, HIDDEN), 3.0).bfloat16(), torch.full((1, HIDDEN), -2.0).bfloat16()]
    one_node = ref.combine(routing, x, 0).x
    assert one_node.value[:, 0].tolist() == [1.0, 3.0, 0.0]
    assert one_node.bound[:, 0].tolist() == [2.0**-8 + 5 * 2.0**-20, 0.0, 0.0]
    two_nodes = ref.combine(routing, x, 0, node_of_rank=[0, 1]).x
    assert two_nodes.bound[:, 0].tolist() == [2.0**-8 + 5 * 2.0**-20 + 5 * 2.0**-8, 0.0, 0.0]
    assert one_node.worst_excess(one_node.value + 0.01) > 0
    assert one_node.worst_excess(torch.full_like(one_node.value, math.nan)) == math.inf
    with pytest.raises(ValueError, match="worst_excess"):
        one_node.worst_excess(one_node.value[:, :5])


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def e4m3_values() -> list[float]:
    """All finite non-negative e4m3 values in order, from the definition of the format."""
    values = []
    for bits in range(0x7F):  # 0x7f is NaN
        exponent, mantissa = bits >> 3, bits & 7
        values.append(mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
    return values


def as_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


@pytest.mark.parametrize("round_scale", [False, True])
def test_fp8_cast_against_loops(round_scale: bool) -> None:
    table = e4m3_values()
    assert table[-1] == fp8.FP8_MAX
    magnitudes = torch.logspace(-7, 4, 24).unsqueeze(1)
    x = (torch.randn(24, HIDDEN, generator=generator(5)) * magnitudes).bfloat16()
    x[3] = 0
    x[4] = 448.0
    x[5, 0] = 0.875 * 2.0**5  # amax / 448 is a power of two
    x[5, 1:] = 1.0
    q, scales = fp8.cast_to_fp8(x, round_scale)
    assert q.dtype == torch.float8_e4m3fn and scales.shape == (24, 1) and scales.dtype == torch.float32
    for row in range(24):
        amax = max(max(abs(v) for v in x[row].tolist()), as_float32(1e-4))
        # Float64 division of two float32 rounds to the same float32 as IEEE float32 division does.
        scale = as_float32(amax / 448)
        if round_scale:
            power = -30
            while 2.0**power < scale:
                power += 1
            scale = 2.0**power
        assert float(scales[row]) == scale
        for value, got in zip(x[row].tolist(), q[row].float().tolist(), strict=True):
            wanted = as_float32(value / scale) if round_scale else as_float32(value * as_float32(448 / amax))
            wanted = min(abs(wanted), 448.0)
            nearest = min(range(len(table)), key=lambda i: (abs(table[i] - wanted), i % 2))  # ties to even
            assert abs(got) == table[nearest]
            assert got == 0 or (got < 0) == (value < 0)
    uncast = fp8.dequantize(q, scales)
    assert ((uncast - x.float()).abs() <= x.float().abs() * 2.0**-3 + scales * 2.0**-10).all()


def test_fp8_division_is_ieee() -> None:
    """`448.0 / tensor` has other bits for some values; the cast must not use it."""
    amax = torch.rand(4096, generator=generator(6)).clamp_min(1e-3)
    exact = torch.full_like(amax, 448.0) / amax
    by_hand = torch.tensor([as_float32(448.0 / value) for value in amax.tolist()])
    assert torch.equal(exact, by_hand)
    assert torch.equal(amax / torch.full_like(amax, 448.0), (amax.double() / 448).float())


def test_ue8m0_round_trip() -> None:
    powers = torch.arange(-126, 126, dtype=torch.float64).exp2().float().reshape(3, 84)
    words = fp8.pack_ue8m0(powers)
    assert words.dtype == torch.int32 and words.shape == (3, 21)
    assert torch.equal(fp8.unpack_ue8m0(words), powers)
    raw = struct.pack("<21i", *words[0].tolist())
    assert list(raw) == list(range(1, 85))  # exponent -126 has bits 1; lowest byte first


def test_logfmt_takes_the_nearest_code() -> None:
    gen = generator(7)
    x = torch.randn(6, HIDDEN, generator=gen) * torch.tensor([0.2, 0.01, 1e-6, 0.2, 1e-3, 0.1]).unsqueeze(1)
    x = x.clamp(-0.99, 0.99)
    x[3, :60] *= torch.logspace(0, -14, 60)
    x[4, 7] = 0.0
    x = x.bfloat16()
    encoded = logfmt.encode(x)
    assert encoded.encoded.all()
    decoded = encoded.decode()
    for row in range(6):
        start, step = float(encoded.log_min[row, 0]), float(encoded.step[row, 0])
        codes = [0.0] + [2.0 ** (start + i * step) for i in range(511)]
        largest = max(abs(v) for v in x[row].tolist())
        assert codes[-1] == pytest.approx(largest, rel=1e-4)
        assert step <= 32 / 510 * 1.0001
        for value, got in zip(x[row].tolist(), decoded[row].tolist(), strict=True):
            best = min(abs(code - abs(value)) for code in codes)
            assert abs(abs(got) - abs(value)) <= best * 1.001 + 1e-7 * abs(value)
            assert got == 0 or (got < 0) == (value < 0)
    error = (decoded.double() - x.double()).abs()
    assert (error <= encoded.error_bound()).all()
    assert encoded.error_bound()[4, 7] == 0


def test_logfmt_special_groups() -> None:
    x = torch.zeros(5, HIDDEN)
    x[1] = torch.where(torch.arange(HIDDEN) % 2 == 0, 0.25, -0.25)  # one magnitude: step 0
    x[2, 5] = 1.0  # too large
    x[3, 5] = math.inf
    x[4, 5] = math.nan
    encoded = logfmt.encode(x.bfloat16())
    assert encoded.encoded.flatten().tolist() == [True, True, False, False, False]
    assert not encoded.codes[0].any() and (encoded.codes[1] == 1).all()
    assert torch.equal(encoded.decode()[:4], x[:4])
    assert encoded.decode()[4, 5].isnan()


# ---------------------------------------------------------------------------------------------------------------------
# Low latency


@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_low_latency_dispatch_against_loops(kind: str, num_ranks: int) -> None:
    _, topk_idx, _, x = random_case(kind, num_ranks, seed=8)
    num_experts, num_max = 3 * num_ranks, 9
    for rank in range(num_ranks):
        out = ref.low_latency_dispatch(x, topk_idx, num_max, num_experts, rank, use_fp8=False)
        cast = ref.low_latency_dispatch(x, topk_idx, num_max, num_experts, rank)
        assert isinstance(out.recv_x, torch.Tensor) and isinstance(cast.recv_x, tuple)
        assert out.recv_x.shape == (3, num_max * num_ranks, HIDDEN)
        assert out.is_row_used.sum() == out.recv_count.sum()
        for expert in range(3):
            row = 0
            for src in range(num_ranks):
                begin = row
                for token, experts in enumerate(topk_idx[src].tolist()):
                    if rank * 3 + expert in experts:
                        assert torch.equal(out.recv_x[expert, row], x[src][token])
                        assert int(out.recv_src_idx[expert, row]) == token
                        q, scale = fp8.cast_to_fp8(x[src][token])
                        assert torch.equal(cast.recv_x[0][expert, row].view(torch.uint8), q.view(torch.uint8))
                        assert torch.equal(cast.recv_x[1][expert, row], scale)
                        row += 1
                packed = int(out.recv_layout_range[expert, src])
                assert (packed >> 32, packed & 0xFFFFFFFF) == (begin, row - begin)
            assert int(out.recv_count[expert]) == row


@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("masked", [(), (1,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_low_latency_combine_of_dispatch(kind: str, masked: tuple[int, ...], weighted: bool) -> None:
    """Combining untouched rows gives each token times the weights of its reachable experts."""
    _, topk_idx, weights, x = random_case(kind, 3, seed=9)
    sent = [ref.low_latency_dispatch(x, topk_idx, 9, 9, r, use_fp8=False, masked_ranks=masked).recv_x for r in range(3)]
    rows = [each for each in sent if isinstance(each, torch.Tensor)]
    for rank in (0, 2):
        reachable = torch.ones_like(topk_idx[rank], dtype=torch.bool)
        for peer in masked:
            reachable &= topk_idx[rank] // 3 != peer
        total = (weights[rank].double() * reachable).sum(dim=1, keepdim=True)
        for use_logfmt in (False, True):
            out = ref.low_latency_combine(
                rows,
                topk_idx,
                weights[rank],
                9,
                rank,
                weights_at_dispatch=weighted,
                use_logfmt=use_logfmt,
                masked_ranks=masked,
            )
            assert torch.allclose(out.value, x[rank].double() * total, rtol=1e-12, atol=1e-12)
            assert out.worst_excess(out.value.bfloat16()) <= 0
            if kind == "balanced" and x[rank].shape[0]:
                assert out.worst_excess(out.value * 1.2) > 0


def test_low_latency_ue8m0() -> None:
    topk_idx = [torch.tensor([[1], [0]])]
    x = [torch.randn(2, 512, generator=generator(10)).bfloat16()]
    plain = ref.low_latency_dispatch(x, topk_idx, 4, 2, 0, round_scale=True)
    packed = ref.low_latency_dispatch(x, topk_idx, 4, 2, 0, round_scale=True, use_ue8m0=True)
    assert isinstance(plain.recv_x, tuple) and isinstance(packed.recv_x, tuple)
    assert packed.recv_x[1].shape == (2, 4, 1) and packed.recv_x[1].dtype == torch.int32
    assert torch.equal(fp8.unpack_ue8m0(packed.recv_x[1]), plain.recv_x[1])


# ---------------------------------------------------------------------------------------------------------------------
# The comparisons themselves


def test_verdicts_notice_what_is_wrong() -> None:
    """A comparison that cannot fail proves nothing."""
    good = torch.tensor([[1.0, -0.0], [math.nan, 2.0]]).bfloat16()
    bounded = ref.Bounded(torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.full((1, 2), 0.1, dtype=torch.float64))
    verdict = Verdict()
    verdict.same("equal", good.clone(), good)
    verdict.same("both None", None, None)
    verdict.within("within", torch.tensor([[1.0625, 1.9375]]).bfloat16(), bounded)
    verdict.true("true", True)
    assert verdict.complaints == []

    one_bit = good.clone()
    one_bit.view(torch.int16)[1, 0] ^= 1  # still a NaN
    wrong: list[torch.Tensor | None] = [None, one_bit, good.abs(), good.float(), good[:1], good.flip(0)]
    for i, tensor in enumerate(wrong):
        verdict.same("same", tensor, good)
        assert len(verdict.complaints) == i + 1
    verdict = Verdict()
    for i, value in enumerate([1.25, math.nan, math.inf]):
        verdict.within("within", torch.tensor([[value, 2.0]]).bfloat16(), bounded)
        assert len(verdict.complaints) == i + 1
    verdict.within("dtype", torch.tensor([[1.0, 2.0]]), bounded)
    verdict.within("shape", torch.tensor([1.0, 2.0]).bfloat16(), bounded)
    verdict.true("false", False)
    assert len(verdict.complaints) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Over a communicator


@pytest.mark.mpi
def test_gather_tensors() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn):
        mine = torch.arange(rank * 6).reshape(rank, 6).to(dtype).t()  # other shape on every rank, not contiguous
        gathered = gather_tensors(comm, mine)
        for peer in range(size):
            expected = torch.arange(peer * 6).reshape(peer, 6).to(dtype).t()
            assert gathered[peer].shape == expected.shape and gathered[peer].dtype == dtype
            assert torch.equal(gathered[peer].float(), expected.float())
    assert gather_tensors(comm, torch.tensor(rank + 0.5))[size - 1] == size - 0.5
    with pytest.raises(ValueError, match=f"ranks \\[{size - 1}\\]"):
        gather_tensors(comm, torch.zeros(1, dtype=torch.complex64 if rank == size - 1 else torch.float32))


@pytest.mark.mpi
@pytest.mark.parametrize("expert_layout", ["token", "grouped"])
def test_reference_buffer(expert_layout: str) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    _, all_idx, all_weights, all_x = random_case("masked", size, seed=11)
    topk_idx, weights, x = all_idx[rank], all_weights[rank], all_x[rank].double()
    buffer = ReferenceBuffer(comm)
    recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=weights,
        num_experts=3 * size,
        expert_alignment=2,
        expert_layout=expert_layout,
    )
    assert isinstance(recv_x, torch.Tensor) and handle is not None and counts is not None
    assert recv_x.dtype == torch.float64 and recv_x.shape[0] == handle.num_rows
    assert counts == handle.num_recv_tokens_per_expert.tolist()
    assert recv_idx is not None and recv_weights is not None and recv_idx.shape == recv_weights.shape
    cached = buffer.dispatch(x, handle=handle)
    assert isinstance(cached[0], torch.Tensor) and torch.equal(cached[0], recv_x) and cached[1:5] == (None,) * 4
    combined, combined_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights, bias=(x, x))
    if expert_layout == "grouped":
        copies = (topk_idx >= 0).sum(dim=1, keepdim=True)
    else:
        copies = handle.is_token_in_rank.sum(dim=1, keepdim=True)
    assert torch.allclose(combined, x * (copies + 2), rtol=1e-12)
    assert combined_weights is not None and torch.equal(combined_weights, weights)
    with pytest.raises(ArgumentError, match="num_worst_tokens"):
        buffer.dispatch(
            torch.zeros(3, HIDDEN),
            topk_idx=torch.zeros(3, 1, dtype=torch.int64),
            num_experts=3 * size,
            num_worst_tokens=1,
        )
