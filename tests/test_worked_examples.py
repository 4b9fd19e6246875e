"""Runs the code blocks of docs/worked-examples.md and holds the reference and `Buffer` to their literal values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support import (
    DEVICE,
    ON_CUDA,
    TIMEOUT_S,
    Verdict,
    needs_low_latency,
    promptly,
    to_device,
    together,
)

from hpc_moe import fp8
from hpc_moe.testing import logfmt
from hpc_moe.testing import reference as ref

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpc_moe import Buffer, LowLatencyHandle

PAGE = Path(__file__).resolve().parent.parent / "docs" / "worked-examples.md"
NUM_RANKS = 2


class Page:
    """The names that the page's code blocks define, as attributes."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
            exec(compile(block, PAGE.name, "exec"), self.names)

    def __getattr__(self, name: str) -> Any:
        return self.names[name]

    def tensors(self, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """The value called `name`, a tensor for each rank."""
        return [torch.tensor(each, dtype=dtype) for each in self.names[name]]

    def bf16(self, name: str) -> list[torch.Tensor]:
        """Tokens of each rank; every literal must be a bf16 number."""
        exact = self.tensors(name, torch.float64)
        rounded = [each.bfloat16() for each in exact]
        assert all(torch.equal(a, b.double()) for a, b in zip(exact, rounded, strict=True)), name
        return rounded

    def spread(self, name: str, num_max: int) -> list[torch.Tensor]:
        """Rows listed by expert, as `[L, M*R, H] bf16` of each rank; NaN in the rows that are not listed."""
        result = []
        for rank in range(NUM_RANKS):
            experts = self.names[name][rank]
            rows = torch.full((len(experts), num_max * NUM_RANKS, len(experts[0][0])), torch.nan)
            for expert, listed in enumerate(experts):
                rows[expert, : len(listed)] = torch.tensor(listed)
            result.append(rows.bfloat16())
        return result


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


def routing_of(page: Page) -> ref.Routing:
    return ref.Routing.from_topk(page.tensors("topk_idx", torch.int64), page.num_experts)


def fp8_tokens(page: Page) -> list[torch.Tensor]:
    token = torch.tensor(page.fp8_groups).flatten().unsqueeze(0)
    assert torch.equal(token.bfloat16().float(), token)
    return [token.bfloat16(), -token.bfloat16()]


def test_page_has_no_stray_block(page: Page) -> None:
    assert PAGE.read_text().count("```python\n") * 2 == PAGE.read_text().count("```")
    assert len(page.names) > 50


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def test_reference_layout(page: Page) -> None:
    for rank, topk_idx in enumerate(page.tensors("topk_idx", torch.int64)):
        one_node = ref.layout(topk_idx, page.num_experts, NUM_RANKS)
        two_nodes = ref.layout(topk_idx, page.num_experts, NUM_RANKS, node_of_rank=[0, 1])
        assert one_node.is_token_in_rank.tolist() == page.is_token_in_rank[rank]
        assert one_node.num_tokens_per_rank.tolist() == page.num_tokens_per_rank[rank]
        assert one_node.num_tokens_per_expert.tolist() == page.num_tokens_per_expert[rank]
        assert one_node.num_tokens_per_rdma_rank is None
        assert two_nodes.num_tokens_per_rdma_rank is not None
        assert two_nodes.num_tokens_per_rdma_rank.tolist() == page.num_tokens_per_rdma_rank_two_nodes[rank]


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_reference_dispatch(page: Page, rank: int) -> None:
    routing, weights = routing_of(page), page.tensors("topk_weights", torch.float32)
    verdict = Verdict()
    x, scales = page.bf16("x"), page.tensors("scales", torch.float32)
    out = ref.dispatch(routing, list(zip(x, scales, strict=True)), weights, rank)
    assert isinstance(out.recv_x, tuple)
    verdict.same("recv_x", out.recv_x[0], page.bf16("recv_x")[rank])
    verdict.same("recv_scales", out.recv_x[1], page.tensors("recv_scales", torch.float32)[rank])
    verdict.same("recv_topk_idx", out.recv_topk_idx, page.tensors("recv_topk_idx", torch.int64)[rank])
    verdict.same("recv_topk_weights", out.recv_topk_weights, page.tensors("recv_topk_weights", torch.float32)[rank])
    assert out.num_recv_tokens_per_expert_list == page.num_recv_tokens_per_expert_list[rank]
    aligned = ref.dispatch(routing, x, weights, rank, expert_alignment=2)
    assert aligned.num_recv_tokens_per_expert_list == page.num_recv_tokens_per_expert_list_aligned_to_2[rank]
    assert out.rank_prefix_matrix.tolist() == page.rank_prefix_matrix
    assert out.recv_rank_prefix_sum.tolist() == page.recv_rank_prefix_sum[rank]
    assert out.recv_src_idx.tolist() == page.recv_src_idx[rank]

    cached = ref.dispatch(routing, page.bf16("cached_x"), None, rank).recv_x
    assert isinstance(cached, torch.Tensor)
    verdict.same("cached_recv_x", cached, page.bf16("cached_recv_x")[rank])

    worst = ref.dispatch(routing, x, weights, rank, num_worst_tokens=page.num_worst_tokens)
    verdict.same("worst", worst.recv_topk_idx, page.tensors("worst_recv_topk_idx", torch.int64)[rank])
    assert worst.num_recv_tokens_per_expert_list == []
    assert ref.num_recv_rows(routing, 1) > page.num_worst_tokens_too_small >= ref.num_recv_rows(routing, 0)

    grouped = ref.dispatch(routing, x, weights, rank, expert_alignment=page.grouped_alignment, expert_layout="grouped")
    assert isinstance(grouped.recv_x, torch.Tensor)
    verdict.same("grouped_recv_x", grouped.recv_x, page.bf16("grouped_recv_x")[rank])
    verdict.same("idx", grouped.recv_topk_idx, page.tensors("grouped_recv_topk_idx", torch.int64)[rank])
    verdict.same("weights", grouped.recv_topk_weights, page.tensors("grouped_recv_topk_weights", torch.float32)[rank])
    verdict.same("grouped_rows", grouped.grouped_rows, page.tensors("grouped_rows", torch.int32)[rank])
    assert verdict.complaints == []


@pytest.mark.parametrize("rank", range(NUM_RANKS))
@pytest.mark.parametrize("node_of_rank", [(0, 0), (0, 1)])
def test_reference_combine(page: Page, rank: int, node_of_rank: tuple[int, ...]) -> None:
    routing, bias = routing_of(page), page.bf16("bias")
    weights = page.tensors("y_topk_weights", torch.float32)
    plain = ref.combine(routing, page.bf16("y"), rank, node_of_rank=node_of_rank)
    assert torch.equal(plain.x.value.bfloat16(), page.bf16("combined_x_without_bias")[rank])
    out = ref.combine(
        routing, page.bf16("y"), rank, topk_weights=weights, biases=[bias[rank]], node_of_rank=node_of_rank
    )
    assert torch.equal(out.x.value, page.bf16("combined_x")[rank].double())
    assert out.topk_weights is not None
    assert out.topk_weights.value.tolist() == page.combined_topk_weights[rank]

    grouped = ref.combine(
        routing,
        page.bf16("grouped_y"),
        rank,
        topk_weights=page.tensors("grouped_y_topk_weights", torch.float32),
        expert_alignment=page.grouped_alignment,
        expert_layout="grouped",
        node_of_rank=node_of_rank,
    )
    assert torch.equal(grouped.x.value, page.bf16("grouped_combined_x")[rank].double())
    assert grouped.topk_weights is not None
    assert grouped.topk_weights.value.tolist() == page.grouped_combined_topk_weights[rank]


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_reference_low_latency(page: Page, rank: int) -> None:
    num_max = page.num_max_dispatch_tokens_per_rank
    topk_idx = page.tensors("topk_idx", torch.int64)
    out = ref.low_latency_dispatch(page.bf16("x"), topk_idx, num_max, page.num_experts, rank, use_fp8=False)
    assert isinstance(out.recv_x, torch.Tensor)
    assert out.recv_count.tolist() == page.low_latency_recv_count[rank]
    for expert, count in enumerate(out.recv_count.tolist()):
        assert out.recv_x[expert, :count].tolist() == page.low_latency_recv_x[rank][expert]
        assert out.recv_src_idx[expert, :count].tolist() == page.low_latency_src_idx[rank][expert]
        for src, (begin, num_rows) in enumerate(page.low_latency_begin_and_count[rank][expert]):
            assert int(out.recv_layout_range[expert, src]) == begin << 32 | num_rows

    for at_dispatch in (False, True):
        combined = ref.low_latency_combine(
            page.spread("low_latency_y", num_max),
            topk_idx,
            page.tensors("topk_weights", torch.float32)[rank],
            page.num_experts,
            rank,
            weights_at_dispatch=at_dispatch,
        )
        assert torch.equal(combined.value, page.bf16("low_latency_combined_x")[rank].double())


def test_reference_fp8(page: Page) -> None:
    tokens, topk_idx = fp8_tokens(page), page.tensors("fp8_topk_idx", torch.int64)
    num_max = page.fp8_num_max_dispatch_tokens_per_rank
    for round_scale, prefix in ((False, ""), (True, "rounded_")):
        values = torch.tensor(page.names[f"{prefix}fp8_values"]).flatten()
        out = ref.low_latency_dispatch(
            tokens, topk_idx, num_max, page.fp8_num_experts, 1, use_fp8=True, round_scale=round_scale
        )
        assert isinstance(out.recv_x, tuple)
        assert out.recv_count.tolist() == [2]
        assert torch.equal(out.recv_x[0][0, :2].float(), torch.stack([values, -values]))
        assert torch.equal(out.recv_x[1][0, 0], torch.tensor(page.names[f"{prefix}fp8_scales"]))
        assert torch.equal(out.recv_x[1][0, 1], torch.tensor(page.names[f"{prefix}fp8_scales"]))
    packed = fp8.pack_ue8m0(torch.tensor(page.rounded_fp8_scales))
    assert packed.tolist() == [page.ue8m0_word]
    assert list(page.ue8m0_word.to_bytes(4, "little")) == page.ue8m0_bytes


def test_reference_logfmt(page: Page) -> None:
    rows = page.spread("logfmt_y", page.logfmt_num_max_dispatch_tokens_per_rank)
    encoded = logfmt.encode(rows[1][0, 0])
    assert (float(encoded.log_min), float(encoded.step)) == pytest.approx(page.logfmt_log_min_and_step, rel=1e-7)
    assert encoded.codes.flatten().tolist() == page.logfmt_codes
    expected = page.bf16("logfmt_combined_x")
    for rank in range(NUM_RANKS):  # tokens 0 and 1 of this rank came back from rank 1 and from rank 0
        for token in (0, 1):
            decoded = logfmt.encode(rows[1 - token][0, rank]).decode()
            assert torch.equal(decoded.bfloat16(), expected[rank][token])
        bounded = ref.low_latency_combine(
            rows,
            page.tensors("logfmt_topk_idx", torch.int64),
            page.tensors("logfmt_topk_weights", torch.float32)[rank],
            page.logfmt_num_experts,
            rank,
            use_logfmt=True,
        )
        assert bounded.worst_excess(expected[rank]) <= 0


# ---------------------------------------------------------------------------------------------------------------------
# Buffer, on two ranks (with more, the first two of them)


@pytest.fixture(scope="module")
def pair() -> Iterator[MPI.Intracomm]:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    sub = world.Split(world.Get_rank() // NUM_RANKS, world.Get_rank())
    assert isinstance(sub, MPI.Intracomm)
    yield sub
    sub.Free()


def make_buffer(comm: MPI.Intracomm, **arguments: Any) -> Buffer:
    from hpc_moe import Buffer

    return Buffer(comm, device=str(DEVICE), timeout=TIMEOUT_S, **arguments)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_buffer_normal(page: Page, pair: MPI.Intracomm, ranks_per_node: int) -> None:
    if pair.Get_size() != NUM_RANKS:
        return
    if ON_CUDA and ranks_per_node == 1:
        pytest.skip("not on CUDA yet: normal calls between nodes")
    from hpc_moe import ArgumentError

    rank = pair.Get_rank()
    with make_buffer(pair, num_nvl_bytes=1 << 22, ranks_per_node=ranks_per_node) as buffer, together(pair) as verdict:
        topk_idx = to_device(page.tensors("topk_idx", torch.int64)[rank])
        weights = to_device(page.tensors("topk_weights", torch.float32)[rank])
        x, bias = to_device(page.bf16("x")[rank]), to_device(page.bf16("bias")[rank])

        def expect(name: str, actual: torch.Tensor | None, dtype: torch.dtype) -> None:
            verdict.same(name, actual, torch.tensor(page.names[name][rank], dtype=dtype))

        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, page.num_experts)
        expect("num_tokens_per_rank", per_rank, torch.int32)
        expect("num_tokens_per_expert", per_expert, torch.int32)
        expect("is_token_in_rank", in_rank, torch.bool)
        if ranks_per_node == 1:
            expect("num_tokens_per_rdma_rank_two_nodes", per_node, torch.int32)
        else:
            verdict.true("num_tokens_per_rdma_rank is None on one node", per_node is None)

        arguments = {"topk_idx": topk_idx, "topk_weights": weights, "num_experts": page.num_experts}
        recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(x, **arguments)
        expect("recv_x", recv_x, torch.bfloat16)
        expect("recv_topk_idx", recv_idx, torch.int64)
        expect("recv_topk_weights", recv_weights, torch.float32)
        verdict.true("counts", counts == page.num_recv_tokens_per_expert_list[rank], counts)
        verdict.same("rank_prefix_matrix", handle[0], torch.tensor(page.rank_prefix_matrix, dtype=torch.int32))
        expect("recv_rank_prefix_sum", handle.recv_rank_prefix_sum, torch.int32)
        expect("recv_src_idx", handle.recv_src_idx, torch.int32)
        expect("is_token_in_rank", handle.is_token_in_rank, torch.bool)
        counts = buffer.dispatch(x, expert_alignment=2, **arguments)[3]
        verdict.true("aligned counts", counts == page.num_recv_tokens_per_expert_list_aligned_to_2[rank], counts)

        values = torch.arange(3 * 128).reshape(3, 128).remainder(100).to(torch.uint8).view(torch.float8_e4m3fn)
        pairs = buffer.dispatch(to_device((values, page.tensors("scales", torch.float32)[rank])), **arguments)[0]
        expect("recv_scales", pairs[1], torch.float32)
        verdict.true("recv fp8", pairs[0].dtype == torch.float8_e4m3fn and pairs[0].shape == recv_x.shape)

        cached = buffer.dispatch(to_device(page.bf16("cached_x")[rank]), handle=handle)
        expect("cached_recv_x", cached[0], torch.bfloat16)
        verdict.true("cached dispatch returns nothing else", cached[1:5] == (None, None, None, None))

        worst = buffer.dispatch(x, num_worst_tokens=page.num_worst_tokens, **arguments)
        expect("worst_recv_topk_idx", worst[1], torch.int64)
        verdict.true("worst counts", worst[3] == [], worst[3])
        verdict.same("worst recv_x", worst[0][: recv_x.shape[0]], recv_x)
        too_few = {**arguments, "num_worst_tokens": page.num_worst_tokens_too_small}
        message = promptly(lambda: buffer.dispatch(x, **too_few), ArgumentError, pending_in=buffer)
        verdict.true("the error names rank 1", "rank 1" in message, message)

        y = to_device(page.bf16("y")[rank])
        expect("combined_x_without_bias", buffer.combine(y, handle)[0], torch.bfloat16)
        y_weights = to_device(page.tensors("y_topk_weights", torch.float32)[rank])
        combined, combined_weights, _ = buffer.combine(y, handle, topk_weights=y_weights, bias=bias)
        expect("combined_x", combined, torch.bfloat16)
        expect("combined_topk_weights", combined_weights, torch.float32)

        recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            x, expert_alignment=page.grouped_alignment, expert_layout="grouped", **arguments
        )
        expect("grouped_recv_x", recv_x, torch.bfloat16)
        expect("grouped_recv_topk_idx", recv_idx, torch.int64)
        expect("grouped_recv_topk_weights", recv_weights, torch.float32)
        expect("grouped_rows", handle.grouped_rows, torch.int32)
        y_weights = to_device(page.tensors("grouped_y_topk_weights", torch.float32)[rank])
        combined, combined_weights, _ = buffer.combine(
            to_device(page.bf16("grouped_y")[rank]), handle, topk_weights=y_weights
        )
        expect("grouped_combined_x", combined, torch.bfloat16)
        expect("grouped_combined_topk_weights", combined_weights, torch.float32)


@needs_low_latency
@pytest.mark.usefixtures("low_latency_world")
@pytest.mark.mpi(min_size=2)
def test_buffer_low_latency(page: Page, pair: MPI.Intracomm) -> None:
    skip_where_nvshmem_runs_on_more_ranks()
    if pair.Get_size() != NUM_RANKS:
        return
    rank = pair.Get_rank()
    with (
        make_buffer(pair, num_rdma_bytes=1 << 23, low_latency_mode=True) as buffer,
        together(pair) as verdict,
    ):
        num_max = page.num_max_dispatch_tokens_per_rank
        topk_idx = to_device(page.tensors("topk_idx", torch.int64)[rank])
        weights = to_device(page.tensors("topk_weights", torch.float32)[rank])
        x, y = to_device(page.bf16("x")[rank]), to_device(page.spread("low_latency_y", num_max)[rank])

        def expect_rows(name: str, actual: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype) -> None:
            for expert, count in enumerate(counts.tolist()):
                expected = torch.tensor(page.names[name][rank][expert], dtype=dtype)
                verdict.same(f"{name} of local expert {expert}", actual[expert, :count], expected)

        handle: LowLatencyHandle
        for at_dispatch in (None, weights):
            recv_x, count, handle, _, _ = buffer.low_latency_dispatch(
                x, topk_idx, num_max, page.num_experts, use_fp8=False, topk_weights=at_dispatch
            )
            verdict.same("count", count, torch.tensor(page.low_latency_recv_count[rank], dtype=torch.int32))
            expect_rows("low_latency_recv_x", recv_x, count, torch.bfloat16)
            expect_rows("low_latency_src_idx", handle[0], count, torch.int32)
            ranges = [[b << 32 | n for b, n in expert] for expert in page.low_latency_begin_and_count[rank]]
            verdict.same("ranges", handle[1], torch.tensor(ranges))
            combined = buffer.low_latency_combine(y, topk_idx, weights, handle)[0]
            verdict.same("low_latency_combined_x", combined, page.bf16("low_latency_combined_x")[rank])

        fp8_x, fp8_idx = to_device((fp8_tokens(page)[rank], page.tensors("fp8_topk_idx", torch.int64)[rank]))
        for round_scale, prefix in ((False, ""), (True, "rounded_")):
            values = torch.tensor(page.names[f"{prefix}fp8_values"]).flatten()
            scales = torch.tensor(page.names[f"{prefix}fp8_scales"])
            (q, s), count, *_ = buffer.low_latency_dispatch(
                fp8_x,
                fp8_idx,
                page.fp8_num_max_dispatch_tokens_per_rank,
                page.fp8_num_experts,
                round_scale=round_scale,
            )
            verdict.true("fp8 count", count.tolist() == [0, 2][rank : rank + 1], count)
            if rank == 1:
                expected = torch.stack([values, -values]).to(torch.float8_e4m3fn)
                verdict.same(f"{prefix}fp8_values", (q[0, :2].float() + 0.0), expected.float() + 0.0)
                verdict.same(f"{prefix}fp8_scales", s[0, :2], torch.stack([scales, scales]))
        (q, s), *_ = buffer.low_latency_dispatch(
            fp8_x,
            fp8_idx,
            page.fp8_num_max_dispatch_tokens_per_rank,
            page.fp8_num_experts,
            round_scale=True,
            use_ue8m0=True,
        )
        if rank == 1:
            verdict.same("ue8m0_word", s[0, :2], torch.tensor([[page.ue8m0_word]] * 2, dtype=torch.int32))


@pytest.mark.mpi(min_size=2)
def test_buffer_logfmt(page: Page, pair: MPI.Intracomm) -> None:
    if pair.Get_size() != NUM_RANKS:
        return
    rank = pair.Get_rank()
    with (
        make_buffer(pair, num_rdma_bytes=1 << 23, low_latency_mode=True) as buffer,
        together(pair) as verdict,
    ):
        num_max = page.logfmt_num_max_dispatch_tokens_per_rank
        topk_idx = to_device(page.tensors("logfmt_topk_idx", torch.int64)[rank])
        weights = to_device(page.tensors("logfmt_topk_weights", torch.float32)[rank])
        handle: LowLatencyHandle
        _, _, handle, _, _ = buffer.low_latency_dispatch(
            to_device(torch.zeros(2, 128).bfloat16()), topk_idx, num_max, page.logfmt_num_experts, use_fp8=False
        )
        combined = buffer.low_latency_combine(
            to_device(page.spread("logfmt_y", num_max)[rank]), topk_idx, weights, handle, use_logfmt=True
        )[0]
        verdict.same("logfmt_combined_x", combined + 0.0, page.bf16("logfmt_combined_x")[rank] + 0.0)


def skip_where_nvshmem_runs_on_more_ranks() -> None:
    from mpi4py import MPI

    if ON_CUDA and MPI.COMM_WORLD.Get_size() > NUM_RANKS:
        pytest.skip("on CUDA, low-latency buffers of a process are all on the same ranks: here, on those of the world")
