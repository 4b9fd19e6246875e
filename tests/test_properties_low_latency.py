"""Random low-latency calls against the reference, on as many ranks as there are.

As in `test_properties_normal.py`, every rank draws the same examples and makes all ranks' inputs from the same seed, on
the CPU; results are compared there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    DEVICE,
    ON_CUDA,
    Buffers,
    Verdict,
    needs_low_latency,
    placements,
    same_on_all_ranks,
    to_cpu,
    to_device,
    together,
)

from hpc_moe.testing import ROUTING_KINDS, make_topk_idx, make_topk_weights
from hpc_moe.testing import reference as ref

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpc_moe import Buffer, LowLatencyHandle

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("low_latency_world"), needs_low_latency]

spread_or_not = pytest.mark.parametrize("spread", [False, True], ids=["one node", "a node a rank"])
TRANSPORTS = ("plain", "zero_copy", "logfmt")
MOST_TOKENS, MOST_HIDDEN, MOST_LOCAL_EXPERTS = 24, 2048, 6


@dataclass(frozen=True)
class Case:
    """One random dispatch and its combines."""

    seed: int
    num_tokens: tuple[int, ...]  # of each rank
    num_max: int
    hidden: int
    num_local_experts: int
    top_k: int
    kind: str
    cast: str  # "bf16", "fp8", "round_scale" or "ue8m0"
    weights_at_dispatch: bool
    transport: str  # of combine: "plain", "zero_copy" or "logfmt"
    use_hooks: bool
    give_out: bool
    give_stats: bool
    is_strided: bool  # tensors are views into larger ones

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_experts(self) -> int:
        return self.num_local_experts * self.num_ranks

    @property
    def cast_arguments(self) -> dict[str, bool]:
        return {
            "use_fp8": self.cast != "bf16",
            "round_scale": self.cast in ("round_scale", "ue8m0"),
            "use_ue8m0": self.cast == "ue8m0",
        }


@st.composite
def cases(draw: st.DrawFn, transports: Sequence[str] = TRANSPORTS) -> Case:
    from mpi4py import MPI

    num_ranks = MPI.COMM_WORLD.Get_size()
    num_max = draw(st.integers(1, MOST_TOKENS))
    num_local_experts = draw(st.integers(1, MOST_LOCAL_EXPERTS))
    cast = draw(st.sampled_from(["bf16", "bf16", "fp8", "round_scale", "ue8m0"]))
    hidden = st.sampled_from([512, 1024, 2048]) if cast == "ue8m0" else st.sampled_from([128, 256, 640, 1024, 2048])
    return Case(
        seed=draw(st.integers(0, 2**31)),
        num_tokens=tuple(draw(st.one_of(st.just(0), st.integers(0, num_max))) for _ in range(num_ranks)),
        num_max=num_max,
        hidden=draw(hidden),
        num_local_experts=num_local_experts,
        top_k=draw(st.integers(1, min(8, num_local_experts * num_ranks))),
        kind=draw(st.sampled_from(ROUTING_KINDS)),
        cast=cast,
        weights_at_dispatch=draw(st.booleans()),
        transport=draw(st.sampled_from(transports)),
        use_hooks=draw(st.booleans()),
        give_out=draw(st.booleans()),
        give_stats=draw(st.booleans()),
        is_strided=draw(st.booleans()),
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
        self.x = [self._rows(n, case.hidden).bfloat16() for n in case.num_tokens]
        if case.is_strided:
            self.x = [strided(x) for x in self.x]
            self.topk_idx = [strided(idx) for idx in self.topk_idx]
            self.topk_weights = [strided(weights) for weights in self.topk_weights]

    def results(self, masked_ranks: Collection[int] = ()) -> list[torch.Tensor]:
        """What the experts return, `[L, M*R, H] bf16` of each rank; NaN in rows that must not be read."""
        case = self.case
        made = []
        for rank in range(case.num_ranks):
            shape = (case.num_local_experts, case.num_max * case.num_ranks)
            y = self._rows(shape[0] * shape[1], case.hidden).reshape(*shape, case.hidden)
            sent = ref.low_latency_dispatch(
                self.x, self.topk_idx, case.num_max, case.num_experts, rank, use_fp8=False, masked_ranks=masked_ranks
            )
            y[~sent.is_row_used] = torch.nan
            made.append(off_the_alignment(y.bfloat16()) if case.is_strided else y.bfloat16())
        return made

    def _rows(self, num_rows: int, hidden: int) -> torch.Tensor:
        """Normal values; the magnitude differs by group, so that some groups fit the logarithmic format, some not."""
        groups = torch.randn(num_rows, hidden // 128, 128, generator=self.generator)
        choice = torch.randint(5, (num_rows, hidden // 128, 1), generator=self.generator)
        return (groups * torch.tensor([0.0, 1e-6, 0.02, 0.1, 20.0])[choice]).reshape(num_rows, hidden)


def strided(rows: torch.Tensor) -> torch.Tensor:
    """The same values in rows that lie apart and start off the alignment."""
    return torch.nn.functional.pad(rows, (3, 2))[:, 3:-2]


def off_the_alignment(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, but not from a multiple of 16 bytes on."""
    return torch.nn.functional.pad(tensor.flatten(), (3, 0))[3:].view(tensor.shape)


@pytest.fixture(scope="module")
def buffers() -> Iterator[Buffers]:
    from mpi4py import MPI

    made = Buffers(MPI.COMM_WORLD)
    yield made
    made.destroy()


def make_buffer(buffers: Buffers, node_of_rank: Sequence[int] = (), **arguments: Any) -> Buffer:
    from hpc_moe import Buffer

    num_ranks = buffers.comm.Get_size()
    num_bytes = Buffer.get_low_latency_rdma_size_hint(
        MOST_TOKENS, MOST_HIDDEN, num_ranks, MOST_LOCAL_EXPERTS * num_ranks
    )
    return buffers.low_latency(node_of_rank or (0,) * num_ranks, num_bytes, **arguments)


class Exchange:
    """One low-latency dispatch and its combines, in halves that a test can interleave, each checked when it is done."""

    def __init__(
        self, verdict: Verdict, buffer: Buffer, case: Case, masked_ranks: Collection[int] = (), name: str = ""
    ) -> None:
        self.verdict, self.buffer, self.case, self.masked_ranks, self.name = verdict, buffer, case, masked_ranks, name
        self.tensors = Tensors(case)
        self.rank = buffer.rank
        self.handle: LowLatencyHandle
        self.y: list[torch.Tensor] = []

    def send_dispatch(self) -> None:
        case, rank = self.case, self.rank
        self.recv_stats = self.wait_stats = None
        if case.give_stats:
            self.recv_stats = torch.full((case.num_local_experts,), 5, dtype=torch.int32, device=DEVICE)
            self.wait_stats = torch.full((case.num_ranks,), 7, dtype=torch.int64, device=DEVICE)
        self.recv_x, self.recv_count, self.handle, self.event, self.hook = self.buffer.low_latency_dispatch(
            to_device(self.tensors.x[rank]),
            to_device(self.tensors.topk_idx[rank]),
            case.num_max,
            case.num_experts,
            cumulative_local_expert_recv_stats=self.recv_stats,
            dispatch_wait_recv_cost_stats=self.wait_stats,
            return_recv_hook=case.use_hooks,
            topk_weights=to_device(self.tensors.topk_weights[rank]) if case.weights_at_dispatch else None,
            **case.cast_arguments,
        )

    def receive_dispatch(self) -> None:
        case, verdict, name = self.case, self.verdict, self.name
        self._receive("dispatch")
        expected = ref.low_latency_dispatch(
            self.tensors.x,
            self.tensors.topk_idx,
            case.num_max,
            case.num_experts,
            self.rank,
            masked_ranks=self.masked_ranks,
            **case.cast_arguments,
        )
        verdict.same(f"{name}recv_count", self.recv_count, expected.recv_count)
        verdict.same(f"{name}layout_range", self.handle[1], expected.recv_layout_range)
        used = expected.is_row_used
        self._check_used(f"{name}src_idx", self.handle[0], expected.recv_src_idx, used)
        if isinstance(expected.recv_x, tuple):
            verdict.true(f"{name}recv_x is a pair", isinstance(self.recv_x, tuple))
            for part, actual, wanted in zip(("values", "scales"), self.recv_x, expected.recv_x, strict=True):
                self._check_used(f"{name}{part}", actual, wanted, used)
            strides = self.recv_x[1].stride()
            verdict.true(f"{name}scales are column-major", strides[1] == 1, f"strides {strides}")
        else:
            self._check_used(f"{name}recv_x", self.recv_x, expected.recv_x, used)
        if self.recv_stats is not None and self.wait_stats is not None:
            verdict.same(f"{name}recv stats", self.recv_stats, expected.recv_count + 5)
            verdict.true(f"{name}wait stats only grow", bool((self.wait_stats >= 7).all()), self.wait_stats)

    def send_combine(self) -> None:
        case, rank = self.case, self.rank
        self.y = self.y or self.tensors.results(self.masked_ranks)
        y = to_device(self.y[rank])
        if case.transport == "zero_copy":
            staging = self.buffer.get_next_low_latency_combine_buffer(self.handle)
            self.verdict.true(
                f"{self.name}staging buffer",
                staging.shape == y.shape and staging.dtype == torch.bfloat16,
                f"{staging.dtype} {staging.shape}",
            )
            staging.copy_(y)
            y = staging
        shape = (case.num_tokens[rank], case.hidden)
        self.out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=DEVICE) if case.give_out else None
        self.combined, self.event, self.hook = self.buffer.low_latency_combine(
            y,
            to_device(self.tensors.topk_idx[rank]),
            to_device(self.tensors.topk_weights[rank]),
            self.handle,
            use_logfmt=case.transport == "logfmt",
            zero_copy=case.transport == "zero_copy",
            return_recv_hook=case.use_hooks,
            out=self.out,
        )

    def receive_combine(self) -> torch.Tensor:
        self._receive("combine")
        if self.out is not None:
            self.verdict.true(f"{self.name}combined_x is out", self.combined.data_ptr() == self.out.data_ptr())
        expected = ref.low_latency_combine(
            self.y,
            self.tensors.topk_idx,
            self.tensors.topk_weights[self.rank],
            self.case.num_experts,
            self.rank,
            weights_at_dispatch=self.case.weights_at_dispatch,
            use_logfmt=self.case.transport == "logfmt",
            masked_ranks=self.masked_ranks,
        )
        self.verdict.within(f"{self.name}combined_x", self.combined, expected)
        return self.combined

    def run(self) -> None:
        """Dispatch, combine, combine again: the second time to the bit."""
        self.send_dispatch()
        self.receive_dispatch()
        self.send_combine()
        first = self.receive_combine().clone()
        self.send_combine()
        self.verdict.same(f"{self.name}combined_x a second time", self.receive_combine(), first)

    def _receive(self, what: str) -> None:
        self.event.current_stream_wait()
        self.verdict.true(f"{self.name}hook of {what}", (self.hook is not None) == self.case.use_hooks)
        if self.hook is not None:
            self.hook()

    def _check_used(self, name: str, actual: torch.Tensor, expected: torch.Tensor, used: torch.Tensor) -> None:
        actual = to_cpu(actual)
        if actual.shape != expected.shape:
            self.verdict.true(name, False, f"shape {list(actual.shape)}, expected {list(expected.shape)}")
            return
        # fp8 has no boolean indexing everywhere: compare bytes.
        if actual.dtype == expected.dtype == torch.float8_e4m3fn:
            actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
        self.verdict.same(name, actual[used], expected[used])


@given(case=cases())
@same_on_all_ranks(max_examples=120)
def test_dispatch_combine(comm: MPI.Intracomm, buffers: Buffers, case: Case) -> None:
    """One exchange, the ranks laid out on nodes in any of the ways that are tried."""
    layouts = placements(case.num_ranks, low_latency=True)
    buffer = make_buffer(buffers, layouts[case.seed % len(layouts)])
    with together(comm, str(case)) as verdict:
        Exchange(verdict, buffer, case).run()


@given(case=cases(("logfmt",)))
@same_on_all_ranks(max_examples=20)
def test_logarithmic_format(comm: MPI.Intracomm, buffers: Buffers, case: Case) -> None:
    with together(comm, str(case)) as verdict:
        Exchange(verdict, make_buffer(buffers), case).run()


def of_sizes_for_two_sends(second: Case, first: Case) -> Case:
    """On CUDA, sends that are unreceived at the same time must have the same M, H and K."""
    if not ON_CUDA:
        return second
    return replace(
        second,
        num_tokens=first.num_tokens,
        num_max=first.num_max,
        hidden=first.hidden,
        top_k=first.top_k,
        cast="round_scale" if second.cast == "ue8m0" and first.hidden % 512 else second.cast,
    )


@given(first=cases(), second=cases(), spread=st.booleans())
@same_on_all_ranks(max_examples=30)
def test_two_sends_in_flight(comm: MPI.Intracomm, buffers: Buffers, first: Case, second: Case, spread: bool) -> None:
    """With hooks two sends may wait for their receives; a third is an error, and the first two still arrive."""
    from hpc_moe import Error

    buffer = make_buffer(buffers, range(first.num_ranks) if spread else ())
    with together(comm, f"{first}\n{second}\n{spread=}") as verdict:
        both = [
            Exchange(verdict, buffer, replace(case, use_hooks=True), name=f"exchange {i}: ")
            for i, case in enumerate((first, of_sizes_for_two_sends(second, first)))
        ]
        for each in both:
            each.send_dispatch()
        try:
            Exchange(verdict, buffer, both[0].case).send_dispatch()
            verdict.true("a third send is an error", False)
        except Error:
            pass
        for each in both:
            each.receive_dispatch()
        for each in both:
            each.send_combine()
        for each in both:
            each.receive_combine()


def test_normal_calls_between_the_halves(comm: MPI.Intracomm, buffers: Buffers) -> None:
    """A buffer with both kinds of window: normal calls while low-latency sends wait for their receive."""
    num_ranks, rank = comm.Get_size(), comm.Get_rank()
    buffer = make_buffer(buffers, num_nvl_bytes=1 << 22)
    with together(comm) as verdict:
        for seed in range(3):
            exchange = Exchange(verdict, buffer, example_case(num_ranks, seed=seed, weights_at_dispatch=seed == 1))
            topk_idx = exchange.tensors.topk_idx
            routing = ref.Routing.from_topk(topk_idx, exchange.case.num_experts)
            received = [ref.dispatch(routing, exchange.tensors.x, None, peer).recv_x for peer in range(num_ranks)]
            rows = [each for each in received if isinstance(each, torch.Tensor)]

            def dispatch(exchange: Exchange = exchange) -> tuple[torch.Tensor, Any]:
                case, tensors = exchange.case, exchange.tensors
                recv_x, *_, handle, _ = buffer.dispatch(
                    to_device(tensors.x[rank]),
                    topk_idx=to_device(tensors.topk_idx[rank]),
                    num_experts=case.num_experts,
                )
                return recv_x, handle

            exchange.send_dispatch()
            recv_x, handle = dispatch()
            verdict.same("recv_x", recv_x, rows[rank])
            exchange.receive_dispatch()
            exchange.send_combine()
            combined, _, _ = buffer.combine(recv_x, handle)
            verdict.within("combined_x", combined, ref.combine(routing, rows, rank).x)
            exchange.receive_combine()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("weights_at_dispatch", [False, True])
def test_sends_do_not_wait(comm: MPI.Intracomm, buffers: Buffers, weights_at_dispatch: bool) -> None:
    """The send half returns before any peer has called: each rank waits for the one before to have sent."""
    num_ranks, rank = comm.Get_size(), comm.Get_rank()
    case = example_case(num_ranks, weights_at_dispatch=weights_at_dispatch)
    buffer = make_buffer(buffers)
    with together(comm, str(case)) as verdict:
        exchange = Exchange(verdict, buffer, case)
        for send, receive in (
            (exchange.send_dispatch, exchange.receive_dispatch),
            (exchange.send_combine, exchange.receive_combine),
        ):
            if rank > 0:
                comm.recv(source=rank - 1, tag=1)
            send()
            if rank + 1 < num_ranks:
                comm.send(None, dest=rank + 1, tag=1)
            comm.Barrier()
            receive()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("weights_at_dispatch", [False, True])
@pytest.mark.parametrize("transport", ["plain", "zero_copy", "logfmt"])
@spread_or_not
def test_masked_rank(
    comm: MPI.Intracomm, buffers: Buffers, spread: bool, weights_at_dispatch: bool, transport: str
) -> None:
    """The others go on without a masked rank, and with it again after unmasking."""
    num_ranks, rank = comm.Get_size(), comm.Get_rank()
    victim = num_ranks - 1
    case = example_case(num_ranks, weights_at_dispatch=weights_at_dispatch, transport=transport, use_hooks=False)
    buffer = make_buffer(buffers, range(num_ranks) if spread else (), enable_shrink=True)
    with together(comm, str(case)) as verdict:
        Exchange(verdict, buffer, case, name="before: ").run()
        comm.Barrier()
        status = torch.full((num_ranks,), 9, dtype=torch.int32, device=DEVICE)
        if rank != victim:
            buffer.low_latency_update_mask_buffer(victim, True)
            buffer.low_latency_query_mask_buffer(status)
            verdict.true("mask status", status.tolist() == [0] * victim + [1], status)
            Exchange(verdict, buffer, case, masked_ranks=[victim], name="masked: ").run()
        comm.Barrier()
        if rank != victim:
            buffer.low_latency_update_mask_buffer(victim, False)
        buffer.clean_low_latency_buffer(case.num_max, case.hidden, case.num_experts)
        buffer.low_latency_query_mask_buffer(status)
        verdict.true("mask status after cleaning", status.tolist() == [0] * num_ranks, status)
        Exchange(verdict, buffer, case, name="after: ").run()


def example_case(num_ranks: int, **changes: Any) -> Case:
    case = Case(
        seed=5,
        num_tokens=tuple(max(0, 8 - rank) for rank in range(num_ranks)),
        num_max=8,
        hidden=256,
        num_local_experts=2,
        top_k=2,
        kind="balanced",
        cast="bf16",
        weights_at_dispatch=False,
        transport="plain",
        use_hooks=True,
        give_out=False,
        give_stats=False,
        is_strided=False,
    )
    return Case(**{**vars(case), **changes})
