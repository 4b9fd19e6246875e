"""Random normal calls: what is drawn, the inputs of all ranks made of it, and how results are held to the reference.

Every rank draws the same cases and makes the inputs of all ranks from the same seed, so the reference needs no
communication. What is moved must be the same to the bit, what is summed within its bound. On CUDA the inputs are moved
to the GPU with their strides, and everything is compared on the CPU. Not for low-latency calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from support import Buffers, Verdict, placements, to_device

from hpc_moe.testing import ROUTING_KINDS, make_topk_idx, make_topk_weights
from hpc_moe.testing import reference as ref

if TYPE_CHECKING:
    from hpc_moe import Buffer, DispatchHandle

AMPLE_WINDOW_BYTES = 1 << 24


@dataclass(frozen=True)
class Case:
    """One random call; see `tensors` for what is made from it."""

    seed: int
    num_tokens: tuple[int, ...]  # of each rank
    hidden: int
    num_local_experts: int
    top_k: int
    kind: str
    payload: str  # "bf16", "fp8" or "ue8m0"
    top_k_mode: str  # "weights", "no weights", "layout given" or "no top-k"
    expert_layout: str
    expert_alignment: int
    spare_rows: int  # -1: no num_worst_tokens; else so many more than needed
    num_biases: int
    node_of_rank: tuple[int, ...]
    is_window_small: bool
    is_strided: bool  # tensors are views into larger ones
    async_finish: bool

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_experts(self) -> int:
        return self.num_local_experts * self.num_ranks

    @property
    def num_worst_tokens(self) -> int:
        if self.spare_rows < 0:
            return 0
        routing = Tensors(self).routing
        rows = [
            ref.num_recv_rows(routing, rank, self.expert_alignment, self.expert_layout)
            for rank in range(self.num_ranks)
        ]
        return max(1, max(rows) + self.spare_rows)


def world_size() -> int:
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_size()


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 40) -> Case:
    num_ranks = world_size()
    tokens = st.one_of(st.just(0), st.integers(1, 3), st.integers(1, max_tokens), st.integers(1, max_tokens))
    num_local_experts = draw(st.integers(1, 6))
    payload = draw(st.sampled_from(["bf16", "bf16", "fp8", "ue8m0"]))
    hidden = [512, 1024, 1536, 4096] if payload == "ue8m0" else [128, 256, 384, 512, 1024, 1536, 4096]
    top_k_mode = draw(st.sampled_from(["weights", "weights", "weights", "no weights", "layout given", "no top-k"]))
    return Case(
        seed=draw(st.integers(0, 2**31)),
        num_tokens=tuple(draw(tokens) for _ in range(num_ranks)),
        hidden=draw(st.sampled_from(hidden)),
        num_local_experts=num_local_experts,
        top_k=draw(st.integers(1, min(8, num_local_experts * num_ranks))),
        kind=draw(st.sampled_from(ROUTING_KINDS)),
        payload=payload,
        top_k_mode=top_k_mode,
        expert_layout="token" if top_k_mode == "no top-k" else draw(st.sampled_from(["token", "grouped"])),
        expert_alignment=draw(st.sampled_from([1, 1, 2, 5, 8, 128])),
        spare_rows=draw(st.sampled_from([-1, -1, 0, 7])),
        num_biases=draw(st.integers(0, 2)),
        node_of_rank=draw(st.sampled_from(placements(num_ranks))),
        is_window_small=draw(st.booleans()),
        is_strided=draw(st.booleans()),
        async_finish=draw(st.booleans()),
    )


class Tensors:
    """The inputs of all ranks, made from the case's seed: the same on every rank."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        self.topk_idx = [
            make_topk_idx(case.kind, n, case.top_k, case.num_experts, case.num_ranks, self.generator)
            for n in case.num_tokens
        ]
        self.topk_weights = [make_topk_weights(idx, self.generator) for idx in self.topk_idx]
        self.routing = ref.Routing.from_topk(self.topk_idx, case.num_experts)
        if case.top_k_mode == "no top-k":
            self.routing = self.routing.without_topk()

    def tokens(self) -> list[ref.Rows]:
        """Random bits (NaN among them), as the payload says; scales with all kinds of strides."""
        made: list[ref.Rows] = []
        for n in self.case.num_tokens:
            bytes_per_channel = 2 if self.case.payload == "bf16" else 1
            raw = self._random_bytes(n, self.case.hidden * bytes_per_channel)
            if self.case.payload == "bf16":
                made.append(_view(raw, torch.bfloat16))
                continue
            dtype = torch.float32 if self.case.payload == "fp8" else torch.int32
            num_scales = self.case.hidden // (128 if self.case.payload == "fp8" else 512)
            scales = _view(self._random_bytes(n, num_scales * 4), dtype)
            stride = int(torch.randint(3, (1,), generator=self.generator))
            if stride == 1:
                scales = scales.t().contiguous().t()  # column-major
            elif stride == 2:
                scales = torch.stack([scales, scales], dim=2)[:, :, 0]  # every other value
            made.append((_view(raw, torch.float8_e4m3fn), scales))
        return made

    def results(self, sent: Sequence[ref.Dispatched]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the experts return, bf16 rows and float32 weights; NaN in rows that must not be read."""
        rows, weights = [], []
        for each in sent:
            scale = torch.tensor([1e-3, 1.0, 1.0, 50.0])[torch.randint(4, (each.num_rows, 1), generator=self.generator)]
            y = torch.randn(each.num_rows, self.case.hidden, generator=self.generator) * scale
            width = () if self.case.expert_layout == "grouped" else (self.case.top_k,)
            w = torch.randn(each.num_rows, *width, generator=self.generator)
            is_unused = torch.arange(each.num_rows) >= each.num_used_rows
            if self.case.expert_layout == "grouped" and each.recv_topk_idx is not None:
                is_unused = each.recv_topk_idx < 0
            y[is_unused] = torch.nan
            w[is_unused] = torch.nan
            rows.append(y.bfloat16())
            weights.append(w)
        return rows, weights

    def biases(self) -> list[list[torch.Tensor]]:
        return [
            [torch.randn(n, self.case.hidden, generator=self.generator).bfloat16() for _ in range(self.case.num_biases)]
            for n in self.case.num_tokens
        ]

    def _random_bytes(self, rows: int, width: int) -> torch.Tensor:
        return torch.randint(0, 256, (rows, width), generator=self.generator, dtype=torch.uint8)


def strided(case: Case, tensor: Any) -> Any:
    """The same values on the device, in rows that lie apart and start off the alignment if the case wants that."""
    if isinstance(tensor, tuple):
        return strided(case, tensor[0]), to_device(tensor[1])
    if not case.is_strided or tensor.dim() != 2:
        return to_device(tensor)
    wide = torch.zeros(tensor.shape[0], tensor.shape[1] + 5, dtype=tensor.dtype)
    wide[:, 3:-2] = tensor
    return to_device(wide[:, 3:-2])


def _view(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if raw.numel():
        return raw.view(dtype)
    return torch.empty(raw.shape[0], raw.shape[1] // dtype.itemsize, dtype=dtype)


def buffer_for(buffers: Buffers, case: Case) -> Buffer:
    from hpc_moe.config import minimum_nvl_bytes

    small = minimum_nvl_bytes(case.num_ranks)
    return buffers.normal(case.node_of_rank, small if case.is_window_small else AMPLE_WINDOW_BYTES)


def dispatch_arguments(buffer: Buffer, case: Case, tensors: Tensors) -> dict[str, Any]:
    """Everything but `x`, in the way that the case wants it."""
    rank = buffer.rank
    arguments: dict[str, Any] = {
        "expert_alignment": case.expert_alignment,
        "num_worst_tokens": case.num_worst_tokens,
        "async_finish": case.async_finish,
        "expert_layout": case.expert_layout,
    }
    if case.top_k_mode != "no top-k":
        arguments["topk_idx"] = strided(case, tensors.topk_idx[rank])
    if case.top_k_mode in ("weights", "layout given"):
        arguments["topk_weights"] = strided(case, tensors.topk_weights[rank])
    if case.top_k_mode in ("weights", "no weights"):
        return {**arguments, "num_experts": case.num_experts}
    topk_idx = to_device(tensors.topk_idx[rank])
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, case.num_experts)
    return {
        **arguments,
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_node,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }


def expected_dispatch(case: Case, tensors: Tensors, x: Sequence[ref.Rows], rank: int) -> ref.Dispatched:
    return ref.dispatch(
        tensors.routing,
        x,
        tensors.topk_weights if case.top_k_mode in ("weights", "layout given") else None,
        rank,
        expert_alignment=case.expert_alignment,
        num_worst_tokens=case.num_worst_tokens,
        expert_layout=case.expert_layout,
    )


def check_rows(verdict: Verdict, name: str, actual: ref.Rows, expected: ref.Rows, num_used_rows: int) -> None:
    """Same rows in the part that is used, and as many unused ones."""
    if isinstance(expected, tuple):
        verdict.true(f"{name} is a pair", isinstance(actual, tuple))
        if isinstance(actual, tuple):
            check_rows(verdict, f"{name} values", actual[0], expected[0], num_used_rows)
            check_rows(verdict, f"{name} scales", actual[1], expected[1], num_used_rows)
        return
    if not isinstance(actual, torch.Tensor):
        verdict.true(name, False, f"got {type(actual)}")
        return
    verdict.true(f"{name} rows", actual.shape[0] == expected.shape[0], f"{actual.shape} for {expected.shape}")
    verdict.same(name, actual[:num_used_rows], expected[:num_used_rows])


def check_handle(verdict: Verdict, handle: DispatchHandle, expected: ref.Dispatched, case: Case, rank: int) -> None:
    verdict.same("rank_prefix_matrix", handle[0], expected.rank_prefix_matrix)
    verdict.same("recv_rank_prefix_sum", handle.recv_rank_prefix_sum, expected.recv_rank_prefix_sum)
    verdict.same("recv_src_idx", handle.recv_src_idx[: expected.num_recv_tokens], expected.recv_src_idx)
    verdict.true("unused recv_src_idx", bool((handle.recv_src_idx[expected.num_recv_tokens :] == -1).all()))
    if expected.grouped_rows is None:
        verdict.true("grouped_rows is None", handle.grouped_rows is None)
    elif handle.grouped_rows is None:
        verdict.true("grouped_rows is there", False)
    else:
        verdict.same("grouped_rows", handle.grouped_rows[: expected.num_recv_tokens], expected.grouped_rows)
    actual = (handle.num_tokens, handle.num_recv_tokens, handle.num_rows, handle.num_experts, handle.expert_layout)
    wanted = (case.num_tokens[rank], expected.num_recv_tokens, expected.num_rows, case.num_experts, case.expert_layout)
    verdict.true("handle's numbers", actual == wanted, f"got {actual}, expected {wanted}")


def combine_and_check(
    verdict: Verdict,
    buffer: Buffer,
    case: Case,
    tensors: Tensors,
    handle: DispatchHandle,
    sent: Sequence[ref.Dispatched],
    name: str = "combine",
) -> None:
    """Combine random rows, twice: within the bounds, and the same bits again."""
    rank = buffer.rank
    y, y_weights = tensors.results(sent)
    biases = tensors.biases()
    with_weights = case.top_k_mode in ("weights", "layout given")
    given = [strided(case, bias) for bias in biases[rank]]
    bias = tuple(given) if case.num_biases == 2 else given[0] if case.num_biases else None
    arguments: dict[str, Any] = {
        "topk_weights": strided(case, y_weights[rank]) if with_weights else None,
        "bias": bias,
        "async_finish": case.async_finish,
    }
    combined, combined_weights, event = buffer.combine(strided(case, y[rank]), handle, **arguments)
    event.current_stream_wait()
    again, weights_again, event = buffer.combine(to_device(y[rank]), handle, **arguments)
    event.current_stream_wait()
    expected = ref.combine(
        tensors.routing,
        y,
        rank,
        topk_weights=y_weights if with_weights else None,
        biases=biases[rank],
        expert_alignment=case.expert_alignment,
        expert_layout=case.expert_layout,
        node_of_rank=case.node_of_rank,
    )
    verdict.within(f"{name}: combined_x", combined, expected.x)
    verdict.same(f"{name}: combined_x a second time", again, combined)
    if expected.topk_weights is None:
        verdict.true(f"{name}: combined_topk_weights is None", combined_weights is None)
    elif combined_weights is None:
        verdict.true(f"{name}: combined_topk_weights is there", False)
    else:
        verdict.within(f"{name}: combined_topk_weights", combined_weights, expected.topk_weights, torch.float32)
        verdict.same(f"{name}: combined_topk_weights a second time", weights_again, combined_weights)


def check_all_calls(verdict: Verdict, buffer: Buffer, case: Case) -> None:
    """One routing through all normal calls: layout, dispatch, cached dispatch, combine."""
    tensors, rank = Tensors(case), buffer.rank
    layout = ref.layout(tensors.topk_idx[rank], case.num_experts, case.num_ranks, case.node_of_rank)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(
        to_device(tensors.topk_idx[rank]), case.num_experts
    )
    verdict.same("num_tokens_per_rank", per_rank, layout.num_tokens_per_rank)
    verdict.same("num_tokens_per_rdma_rank", per_node, layout.num_tokens_per_rdma_rank)
    verdict.same("num_tokens_per_expert", per_expert, layout.num_tokens_per_expert)
    verdict.same("is_token_in_rank", in_rank, layout.is_token_in_rank)

    x = tensors.tokens()
    sent = [expected_dispatch(case, tensors, x, peer) for peer in range(case.num_ranks)]
    expected = sent[rank]
    arguments = dispatch_arguments(buffer, case, tensors)
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(strided(case, x[rank]), **arguments)
    event.current_stream_wait()
    check_rows(verdict, "recv_x", recv_x, expected.recv_x, expected.num_used_rows)
    verdict.same("recv_topk_idx", recv_idx, expected.recv_topk_idx)
    verdict.same("recv_topk_weights", recv_weights, expected.recv_topk_weights)
    verdict.true("counts", counts == expected.num_recv_tokens_per_expert_list, f"got {counts}")
    check_handle(verdict, handle, expected, case, rank)

    x = tensors.tokens()
    cached = buffer.dispatch(strided(case, x[rank]), handle=handle)
    expected_x = expected_dispatch(case, tensors, x, rank).recv_x
    check_rows(verdict, "cached recv_x", cached[0], expected_x, expected.num_used_rows)
    verdict.true("a cached dispatch returns only recv_x", cached[1:5] == (None, None, None, None))

    combine_and_check(verdict, buffer, case, tensors, handle, sent)
