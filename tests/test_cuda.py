"""What only the CUDA backend has: graphs, streams, the pool, errors that come later, GPU memory, kernel variants.

The tests that both backends share are in the other files; HPC_MOE_TEST_DEVICE=cuda runs them, and these, on GPUs:

    HPC_MOE_TEST_DEVICE=cuda mpirun -n 2 python -m pytest --with-mpi -m "mpi and not launcher" tests

With more ranks than GPUs, the ranks share them: slow, right all the same. The library has to work with each of torch's
allocators. A short run for another one than the default (the second is `backend:cudaMallocAsync`):

    PYTORCH_ALLOC_CONF=expandable_segments:True HPC_MOE_TEST_EXAMPLES=0.2 HPC_MOE_TEST_DEVICE=cuda \\
        mpirun -n 2 python -m pytest --with-mpi tests/test_cuda.py tests/test_properties_normal.py
"""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from mpi4py import MPI
from normal_calls import Case, buffer_for, cases, check_all_calls
from support import (
    DEVICE,
    IS_SHARING,
    PROMPT_S,
    SHARE_GPUS,
    Buffers,
    Verdict,
    capturing,
    cuda_only,
    promptly,
    same_on_all_ranks,
    sleep,
    to_device,
    together,
)

from hpc_moe import ArgumentError, Buffer, Config, Error, PeerTimeoutError, UnavailableError
from hpc_moe.config import minimum_nvl_bytes
from hpc_moe.testing import ROUTING_KINDS, make_topk_idx, make_topk_weights
from hpc_moe.testing import reference as ref

pytestmark = [pytest.mark.gpu, pytest.mark.mpi, cuda_only]

HIDDEN, TOP_K, LOCAL_EXPERTS = 512, 4, 4
WINDOW_BYTES = 1 << 24
SHORT_TIMEOUT = 2.0  # seconds
BAD_INDEX = 10**6


def make_buffer(comm: MPI.Intracomm, num_nvl_bytes: int = WINDOW_BYTES, **arguments: Any) -> Buffer:
    return Buffer(comm, num_nvl_bytes, **{"device": str(DEVICE), "timeout": 30.0, **arguments})


class Exchange:
    """A routing of all ranks' tokens, the same on every rank, and what must come of it here.

    Tokens are made from a number, `step`. The experts return what they get, so that a combine gives every token as
    often as there are ranks that it went to: exactly, for these are small numbers.
    """

    def __init__(
        self, comm: MPI.Intracomm, num_tokens: int = 96, hidden: int = HIDDEN, kind: str = "balanced", seed: int = 0
    ) -> None:
        self.comm, self.rank, self.size, self.hidden = comm, comm.Get_rank(), comm.Get_size(), hidden
        self.num_experts = LOCAL_EXPERTS * self.size
        generator = torch.Generator().manual_seed(seed)
        self.num_tokens = [num_tokens + 7 * rank for rank in range(self.size)]
        idx = [make_topk_idx(kind, n, TOP_K, self.num_experts, self.size, generator) for n in self.num_tokens]
        self.all_weights = [make_topk_weights(each, generator) for each in idx]
        self.routing = ref.Routing.from_topk(idx, self.num_experts)
        self.topk_idx = to_device(idx[self.rank])
        self.topk_weights = to_device(self.all_weights[self.rank])

    def tokens_of(self, rank: int, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        return torch.randn(self.num_tokens[rank], self.hidden, generator=generator).bfloat16()

    def x(self, step: int) -> torch.Tensor:
        return to_device(self.tokens_of(self.rank, step))

    def num_rows(self) -> int:
        """Rows that the rank with the most receives."""
        return max(self.routing.num_recv_tokens(rank) for rank in range(self.size))

    def dispatch(self, buffer: Buffer, step: int = 0, **options: Any) -> tuple[Any, ...]:
        """An uncached dispatch."""
        arguments = {"topk_idx": self.topk_idx, "topk_weights": self.topk_weights, "num_experts": self.num_experts}
        return buffer.dispatch(self.x(step), **{**arguments, **options})

    def expected(self, step: int, **options: Any) -> ref.Dispatched:
        x: list[ref.Rows] = [self.tokens_of(rank, step) for rank in range(self.size)]
        return ref.dispatch(self.routing, x, self.all_weights, self.rank, **options)

    def check_received(self, verdict: Verdict, step: int, recv_x: torch.Tensor) -> None:
        sources = self.routing.sources(self.rank)
        expected = torch.cat([self.tokens_of(rank, step)[tokens] for rank, tokens in sources])
        verdict.same(f"recv_x of step {step}", recv_x[: len(expected)], expected)

    def check_combined(self, verdict: Verdict, step: int, combined: torch.Tensor) -> None:
        times = self.routing.is_token_in_rank[self.rank].sum(dim=1, keepdim=True)
        expected = (self.tokens_of(self.rank, step).float() * times + 0.0).bfloat16()
        verdict.same(f"combined_x of step {step}", combined, expected)

    def check_works(self, buffer: Buffer, step: int = 77) -> None:
        """Uncached dispatch, cached dispatch and combine. Collective."""
        with together(self.comm, "the next calls") as verdict:
            recv_x, _, _, _, handle, _ = self.dispatch(buffer, step)
            self.check_received(verdict, step, recv_x)
            recv_x = buffer.dispatch(self.x(step + 1), handle=handle)[0]
            self.check_received(verdict, step + 1, recv_x)
            self.check_combined(verdict, step + 1, buffer.combine(recv_x, handle)[0])
            buffer.check()


def pooled(buffer: Buffer) -> int:
    """How many results lay in the pool so far."""
    return int(buffer.stats()["dispatch"]["pooled"])


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_calls", [1, 2, 3])
def test_cached_calls_in_a_graph(comm: MPI.Intracomm, num_calls: int) -> None:
    """An odd and an even number of dispatches and combines, with ordinary calls between replays."""
    exchange = Exchange(comm)
    with make_buffer(comm) as buffer:
        handle = exchange.dispatch(buffer)[4]
        x = [exchange.x(0) for _ in range(num_calls)]
        before = pooled(buffer)
        results = []
        with capturing() as graph:
            for one in x:
                recv_x = buffer.dispatch(one, handle=handle)[0]
                results.append((recv_x, buffer.combine(recv_x, handle)[0]))
        with together(comm) as verdict:
            verdict.true("no result under capture is from the pool", pooled(buffer) == before)
        for replay in range(9):
            with together(comm, f"replay {replay}") as verdict:
                for call, one in enumerate(x):
                    one.copy_(exchange.x(replay * num_calls + call))
                graph.replay()
                for call, (recv_x, combined) in enumerate(results):
                    exchange.check_received(verdict, replay * num_calls + call, recv_x)
                    exchange.check_combined(verdict, replay * num_calls + call, combined)
            if replay % 4 == 3:
                exchange.check_works(buffer)
        buffer.check()


def test_replays_without_a_pause(comm: MPI.Intracomm) -> None:
    """The ranks drift apart as far as they can; the last result tells."""
    exchange = Exchange(comm)
    with make_buffer(comm) as buffer:
        handle = exchange.dispatch(buffer)[4]
        x = exchange.x(5)
        with capturing() as graph:
            recv_x = buffer.dispatch(x, handle=handle)[0]
            combined = buffer.combine(recv_x, handle)[0]
        for replay in range(20 if IS_SHARING else 300):
            if replay % 50 == exchange.rank:
                sleep()
            graph.replay()
        with together(comm) as verdict:
            exchange.check_received(verdict, 5, recv_x)
            exchange.check_combined(verdict, 5, combined)
            buffer.check()


def test_graphs_that_share_memory(comm: MPI.Intracomm) -> None:
    """Two graphs of one memory pool, of another number of calls each, replayed in turn."""
    exchange = Exchange(comm)
    with make_buffer(comm) as buffer:
        handle = exchange.dispatch(buffer)[4]
        x = exchange.x(0)
        with capturing() as first:
            once = buffer.dispatch(x, handle=handle)[0]
        with capturing(pool=first.pool()) as second:
            twice = buffer.dispatch(x, handle=handle)[0]
            combined = buffer.combine(twice, handle)[0]
            combined = buffer.combine(twice, handle)[0]
        for step in range(6):
            with together(comm, f"step {step}") as verdict:
                x.copy_(exchange.x(step))
                first.replay()
                exchange.check_received(verdict, step, once)
                second.replay()
                exchange.check_received(verdict, step, twice)
                exchange.check_combined(verdict, step, combined)


class CapturedDispatch:
    """A graph of a `num_worst_tokens` dispatch and a combine, whose inputs may be changed between replays."""

    def __init__(self, buffer: Buffer, exchange: Exchange) -> None:
        self.num_rows = sum(exchange.num_tokens)  # as many as can come
        self.x, self.topk_idx = exchange.x(0), exchange.topk_idx.clone()
        self.topk_weights = exchange.topk_weights.clone()
        with capturing() as self.graph:
            self.recv_x, self.recv_idx, self.recv_weights, self.counts, self.handle, _ = buffer.dispatch(
                self.x,
                topk_idx=self.topk_idx,
                topk_weights=self.topk_weights,
                num_experts=exchange.num_experts,
                num_worst_tokens=self.num_rows,
            )
            self.combined = buffer.combine(self.recv_x, self.handle)[0]

    def replay(self, exchange: Exchange, step: int) -> None:
        self.x.copy_(exchange.x(step))
        self.topk_idx.copy_(exchange.topk_idx)
        self.topk_weights.copy_(exchange.topk_weights)
        self.graph.replay()

    def check(self, verdict: Verdict, exchange: Exchange, step: int) -> None:
        expected = exchange.expected(step, num_worst_tokens=self.num_rows)
        exchange.check_received(verdict, step, self.recv_x)
        exchange.check_combined(verdict, step, self.combined)
        verdict.same("recv_topk_idx", self.recv_idx, expected.recv_topk_idx)
        verdict.same("recv_topk_weights", self.recv_weights, expected.recv_topk_weights)
        verdict.same("recv_rank_prefix_sum", self.handle.recv_rank_prefix_sum, expected.recv_rank_prefix_sum)
        verdict.true("no counts", self.counts == [], self.counts)


def test_a_dispatch_in_a_graph_with_other_routings(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm)
    with make_buffer(comm) as buffer:
        exchange.dispatch(buffer)
        captured = CapturedDispatch(buffer, exchange)
        for step in range(2 * len(ROUTING_KINDS)):
            kind = ROUTING_KINDS[step % len(ROUTING_KINDS)]
            other = Exchange(comm, kind=kind, seed=step)
            with together(comm, f"replay {step}: {kind}") as verdict:
                captured.replay(other, step)
                captured.check(verdict, other, step)
        exchange.check_works(buffer)


@pytest.mark.parametrize("seen_by", ["check", "the next call"])
def test_a_bad_expert_index_in_a_replayed_call(comm: MPI.Intracomm, seen_by: str) -> None:
    """It counts as -1, and all ranks hear of it."""
    exchange, culprit = Exchange(comm), comm.Get_size() - 1
    with make_buffer(comm) as buffer:
        captured = CapturedDispatch(buffer, exchange)
        captured.replay(exchange, 1)
        if exchange.rank == culprit:
            captured.topk_idx[0, 0] = BAD_INDEX
        captured.graph.replay()
        torch.cuda.synchronize()  # the next call raises what is known by then
        call = buffer.check if seen_by == "check" else lambda: exchange.dispatch(buffer)
        message = promptly(call, ArgumentError)
        with together(comm) as verdict:
            verdict.true("the message names topk_idx", "topk_idx" in message, message)
            verdict.true("and the rank", exchange.rank == culprit or f"rank {culprit}" in message, message)
            buffer.check()  # raised once
        with together(comm, "the next replay") as verdict:
            captured.replay(exchange, 2)
            captured.check(verdict, exchange, 2)
        exchange.check_works(buffer)


def test_an_uncached_dispatch_cannot_be_captured(comm: MPI.Intracomm) -> None:
    """Its CPU waits. The error is on every rank, and the buffer works on."""
    exchange = Exchange(comm)
    with make_buffer(comm) as buffer:
        x = exchange.x(0)
        torch.cuda.synchronize()
        with pytest.raises(ArgumentError, match="num_worst_tokens"), capturing():
            buffer.dispatch(x, topk_idx=exchange.topk_idx, num_experts=exchange.num_experts)
        exchange.check_works(buffer)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_inputs_that_come_late_are_waited_for(comm: MPI.Intracomm) -> None:
    """What the current stream has still to write, indices too; and it may write again what the call has read."""
    exchange = Exchange(comm)
    with make_buffer(comm) as buffer:
        handle = exchange.dispatch(buffer)[4]
        x, topk_idx = exchange.x(0), exchange.topk_idx.clone()
        for step in (1, 2, 3):
            source = exchange.x(step)
            x.fill_(torch.nan)
            topk_idx.fill_(-1)
            torch.cuda.synchronize()
            with together(comm, f"step {step}") as verdict:
                sleep()
                x.copy_(source)
                recv_x = buffer.dispatch(x, handle=handle)[0]
                x.fill_(torch.nan)
                combined = buffer.combine(recv_x, handle)[0]
                exchange.check_received(verdict, step, recv_x)
                recv_x.fill_(torch.nan)
                exchange.check_combined(verdict, step, combined)
                sleep()
                topk_idx.copy_(exchange.topk_idx)
                recv_x, *_ = buffer.dispatch(source, topk_idx=topk_idx, num_experts=exchange.num_experts)
                topk_idx.fill_(BAD_INDEX)
                exchange.check_received(verdict, step, recv_x)


@pytest.mark.parametrize("in_pool", [True, False])
@pytest.mark.parametrize("allocate_on_comm_stream", [False, True])
def test_memory_dropped_early_is_not_used_again(
    comm: MPI.Intracomm, allocate_on_comm_stream: bool, in_pool: bool
) -> None:
    """Inputs and outputs that the caller drops while the communication stream is far behind."""
    exchange = Exchange(comm, num_tokens=300)

    def late(buffer: Buffer) -> dict[str, Any]:
        with torch.cuda.stream(buffer.get_comm_stream()):
            sleep()
        return {
            "previous_event": Buffer.capture(),
            "async_finish": True,
            "allocate_on_comm_stream": allocate_on_comm_stream,
        }

    def fill(rows: int, value: float) -> list[torch.Tensor]:
        return [torch.full((rows, HIDDEN), value, dtype=torch.bfloat16, device=DEVICE) for _ in range(8)]

    with make_buffer(comm, WINDOW_BYTES if in_pool else minimum_nvl_bytes(exchange.size)) as buffer:
        handle = exchange.dispatch(buffer)[4]
        for step in range(4):
            with together(comm, f"step {step}") as verdict:
                x = exchange.x(step)
                recv_x, *_, event = buffer.dispatch(x, handle=handle, **late(buffer))
                del x
                garbage = fill(exchange.num_tokens[exchange.rank], torch.nan)
                event.current_stream_wait()
                exchange.check_received(verdict, step, recv_x)
                del garbage

                x = exchange.x(step + 50)
                combined, _, event = buffer.combine(recv_x, handle, **late(buffer))
                buffer.dispatch(x, handle=handle, **late(buffer))
                last_event = buffer.combine(recv_x, handle, **late(buffer))[-1]
                del recv_x, x
                garbage = fill(exchange.num_tokens[exchange.rank], 7.0) + fill(handle.num_rows, 7.0)
                event.current_stream_wait()
                last_event.current_stream_wait()
                exchange.check_combined(verdict, step, combined)
                for tensor in garbage:
                    verdict.true("memory of a dropped result is written later", bool((tensor == 7.0).all()))


def test_previous_event(comm: MPI.Intracomm) -> None:
    """A call waits for the event of another stream, which the current one has not joined."""
    exchange = Exchange(comm)
    side = torch.cuda.Stream()
    with make_buffer(comm) as buffer:
        handle = exchange.dispatch(buffer)[4]
        x = exchange.x(0)
        for step in (1, 2, 3):
            source = exchange.x(step)
            x.fill_(torch.nan)
            torch.cuda.synchronize()
            with together(comm, f"step {step}") as verdict:
                with torch.cuda.stream(side):
                    sleep()
                    x.copy_(source)
                    written = Buffer.capture()
                recv_x, *_, event = buffer.dispatch(x, handle=handle, previous_event=written, async_finish=True)
                combined, _, event = buffer.combine(recv_x, handle, previous_event=event, async_finish=True)
                with event:
                    pass
                exchange.check_received(verdict, step, recv_x)
                exchange.check_combined(verdict, step, combined)
            torch.cuda.synchronize()


def test_calls_from_different_streams_stay_in_order(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with make_buffer(comm) as buffer:
        handle = exchange.dispatch(buffer)[4]
        sources = [exchange.x(step) for step in range(8)]
        torch.cuda.synchronize()
        results = []
        for step, source in enumerate(sources):
            with torch.cuda.stream(streams[step % 2]):
                if (step + exchange.rank) % 3 == 0:
                    sleep()
                recv_x = buffer.dispatch(source, handle=handle)[0]
                results.append((recv_x, buffer.combine(recv_x, handle)[0]))
        torch.cuda.synchronize()
        with together(comm) as verdict:
            for step, (recv_x, combined) in enumerate(results):
                exchange.check_received(verdict, step, recv_x)
                exchange.check_combined(verdict, step, combined)


# --- the pool (a rank alone needs none) -------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_results_stay_while_later_calls_run(comm: MPI.Intracomm) -> None:
    """More live results than the pool has room for: the others are copies, and all have the right bits."""
    exchange = Exchange(comm, num_tokens=256, hidden=2048)  # of 1 MiB and more each, in a window of 16 MiB
    with make_buffer(comm) as buffer:
        handle = exchange.dispatch(buffer)[4]
        results, counts = [], []
        for step in range(24):
            results.append(buffer.dispatch(exchange.x(step), handle=handle)[0])
            counts.append(pooled(buffer))
        with together(comm) as verdict:
            verdict.true("results come from the pool", counts[1] > counts[0], counts)
            verdict.true("until it is full", counts[-1] == counts[-2], counts)
            for step, recv_x in enumerate(results):
                exchange.check_received(verdict, step, recv_x)
        results.clear()
        before = pooled(buffer)
        exchange.check_works(buffer)
        with together(comm) as verdict:
            verdict.true("dropped results make room", pooled(buffer) > before)


def window_of_one_result(exchange: Exchange) -> int:
    """Bytes of a window whose pool has room for one result, not for two."""
    return max(3 * exchange.num_rows() * exchange.hidden * 2, minimum_nvl_bytes(exchange.size))


@pytest.mark.mpi(min_size=2)
def test_a_dropped_result_is_not_overwritten_while_it_is_read(comm: MPI.Intracomm) -> None:
    """The next result may take its place once the stream, current when it was dropped, has done its work."""
    exchange = Exchange(comm, num_tokens=1000, hidden=1024)
    with make_buffer(comm, window_of_one_result(exchange)) as buffer:
        handle = exchange.dispatch(buffer)[4]
        for step in range(4):
            with together(comm, f"step {step}") as verdict:
                other = exchange.x(100 + step)
                recv_x = buffer.dispatch(exchange.x(step), handle=handle)[0]
                event = Buffer.capture()
                sleep()
                copy = recv_x.clone()  # when the stream gets there
                del recv_x
                later = [
                    buffer.dispatch(other, handle=handle, previous_event=event, async_finish=True) for _ in range(3)
                ]
                for recv_x, *_, done in later:
                    done.current_stream_wait()
                    exchange.check_received(verdict, 100 + step, recv_x)
                exchange.check_received(verdict, step, copy)
                del later, recv_x


@pytest.mark.mpi(min_size=2)
def test_a_view_keeps_its_result(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm, num_tokens=1000, hidden=1024)
    with make_buffer(comm, window_of_one_result(exchange)) as buffer:
        recv_x, _, _, _, handle, _ = exchange.dispatch(buffer, 1)
        expected = recv_x[3:5].cpu()
        view = recv_x.view(-1)[3 * 1024 : 5 * 1024]
        del recv_x
        for step in range(5):
            buffer.dispatch(exchange.x(step), handle=handle)
        with together(comm) as verdict:
            verdict.same("the view", view.view(2, 1024), expected)


@pytest.mark.mpi(min_size=2)
def test_live_results_outlive_the_buffer(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm)
    buffer = make_buffer(comm)
    recv_x = exchange.dispatch(buffer, 1)[0]
    count = pooled(buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.destroy()
    with together(comm) as verdict:
        verdict.true("the result was in the pool", count == 1, count)
        exchange.check_received(verdict, 1, recv_x)
    with make_buffer(comm) as other:
        exchange.check_works(other)
        with together(comm) as verdict:
            exchange.check_received(verdict, 1, recv_x)
            recv_x.fill_(3.0)
            verdict.true("it can be written", bool((recv_x == 3.0).all()))
        exchange.check_works(other)
    del recv_x, buffer
    gc.collect()


# --- errors that come later ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_pool", [True, False])
def test_one_row_too_few(comm: MPI.Intracomm, in_pool: bool) -> None:
    """An error on all ranks, and what lies around the tensors is as it was. With just enough rows it works."""
    exchange = Exchange(comm, num_tokens=400)
    needed = exchange.num_rows()
    with make_buffer(comm, WINDOW_BYTES if in_pool else minimum_nvl_bytes(exchange.size)) as buffer:
        # The outputs shall lie in gaps between these.
        in_window = [exchange.dispatch(buffer, step)[0] for step in range(5)]
        in_window[1] = in_window[3] = None
        outside = [torch.full((needed - 1, HIDDEN), 5.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(9)]
        del outside[1::2]
        torch.cuda.synchronize()
        message = promptly(
            lambda: exchange.dispatch(buffer, 9, num_worst_tokens=needed - 1), ArgumentError, pending_in=buffer
        )
        with together(comm) as verdict:
            verdict.true("the message names the argument", "num_worst_tokens" in message, message)
            for step in (0, 2, 4):
                exchange.check_received(verdict, step, in_window[step])
            for tensor in outside:
                verdict.true("memory around the outputs", bool((tensor == 5.0).all()))
        with together(comm, "just enough") as verdict:
            recv_x, recv_idx, *_, handle, _ = exchange.dispatch(buffer, 10, num_worst_tokens=needed)
            exchange.check_received(verdict, 10, recv_x)
            verdict.same("recv_topk_idx", recv_idx, exchange.expected(10, num_worst_tokens=needed).recv_topk_idx)
            exchange.check_combined(verdict, 10, buffer.combine(recv_x, handle)[0])
            own = exchange.routing.num_recv_tokens(exchange.rank)
            verdict.true("num_recv_tokens", handle.num_recv_tokens == own, handle.num_recv_tokens)
        exchange.check_works(buffer)


@pytest.mark.parametrize("call", ["combine", "cached dispatch"])
def test_an_error_of_another_rank_is_raised_by_the_next_call(comm: MPI.Intracomm, call: str) -> None:
    """The call itself returns on the others; the next one takes part, so that it works where nothing is pending."""
    exchange, culprit = Exchange(comm), comm.Get_size() - 1
    with make_buffer(comm) as buffer:
        recv_x, _, _, _, handle, _ = exchange.dispatch(buffer, 1)
        bad = exchange.rank == culprit

        def spoilt() -> None:
            if call == "combine":
                buffer.combine(recv_x.float() if bad else recv_x, handle)
            else:
                buffer.dispatch(exchange.x(2).float() if bad else exchange.x(2), handle=handle)
            torch.cuda.synchronize()  # the next call raises what is known by then

        if bad:
            promptly(spoilt, ArgumentError)
            exchange.dispatch(buffer, 3)
        else:
            spoilt()
            message = promptly(lambda: exchange.dispatch(buffer, 3), ArgumentError)
            assert f"rank {culprit}" in message
        exchange.check_works(buffer)


@pytest.mark.parametrize(
    ("argument", "experts_a_rank", "top_k"), [("topk_idx", 64, 33), ("num_experts", 4097, 2)], ids=["top_k", "experts"]
)
def test_what_the_kernels_do_not_take(comm: MPI.Intracomm, argument: str, experts_a_rank: int, top_k: int) -> None:
    exchange = Exchange(comm)
    topk_idx = torch.arange(top_k, device=DEVICE).repeat(exchange.num_tokens[exchange.rank], 1)
    with make_buffer(comm) as buffer:
        num_experts = experts_a_rank * exchange.size
        options: dict[str, Any] = {"topk_idx": topk_idx, "topk_weights": None, "num_experts": num_experts}
        message = promptly(lambda: exchange.dispatch(buffer, **options), Error)
        assert argument in message
        exchange.check_works(buffer)


def test_what_is_not_there_yet(comm: MPI.Intracomm) -> None:
    if comm.Get_size() > 1:
        with pytest.raises(UnavailableError, match="normal calls between nodes"):
            make_buffer(comm, ranks_per_node=1)


# --- a rank that does not come ---------------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("call", ["dispatch", "cached dispatch", "combine"])
def test_a_rank_that_does_not_call(comm: MPI.Intracomm, call: str) -> None:
    """The others raise, naming it, and use the GPU for something else. The late rank hears of it too."""
    exchange, absent = Exchange(comm), 1
    comm.Barrier()  # the short timeout is not for the time that ranks take to get here
    buffer = make_buffer(comm, timeout=SHORT_TIMEOUT)
    recv_x, _, _, _, handle, _ = exchange.dispatch(buffer, 1)
    torch.cuda.synchronize()
    comm.Barrier()

    def attempt() -> None:
        if call == "dispatch":
            exchange.dispatch(buffer, 2)
        elif call == "combine":
            event = buffer.combine(recv_x, handle, async_finish=True)[-1]
            torch.cuda.synchronize()
            event.current_stream_wait()  # raises what is known by now
        else:
            buffer.dispatch(exchange.x(2), handle=handle)
            buffer.check()

    with together(comm, "the ranks that call") as verdict:
        if exchange.rank != absent:
            start = time.monotonic()
            with pytest.raises(PeerTimeoutError) as caught:
                attempt()
            seconds = time.monotonic() - start
            verdict.true("in time", 0.9 * SHORT_TIMEOUT < seconds < SHORT_TIMEOUT + PROMPT_S, seconds)
            verdict.true("peers", caught.value.peers == (absent,), caught.value)
            operation = "combine" if call == "combine" else "dispatch"
            verdict.true("operation", caught.value.operation == operation, caught.value.operation)
            verdict.true("the message names the rank", f"rank {absent}" in str(caught.value), caught.value)
            later = promptly(lambda: exchange.dispatch(buffer), UnavailableError)
            verdict.true("later calls say why", operation in later, later)
            ones = torch.ones(256, 256, device=DEVICE)
            verdict.true("the GPU works", bool(((ones @ ones) == 256.0).all()))
    with together(comm, "the late rank") as verdict:
        if exchange.rank == absent:
            # The others' rows may all be there, but the others will not come to the call after.
            with pytest.raises((PeerTimeoutError, UnavailableError)):
                for _ in range(2):
                    attempt()
                    buffer.check()
            ones = torch.ones(256, 256, device=DEVICE)
            verdict.true("the GPU works", bool(((ones @ ones) == 256.0).all()))
    with pytest.warns(RuntimeWarning):
        buffer.destroy()
    comm.Barrier()
    with make_buffer(comm) as again:
        exchange.check_works(again)


# --- construction and memory -----------------------------------------------------------------------------------------


def test_buffers_leave_no_memory_behind(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm)

    def free_bytes() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        comm.Barrier()
        free = int(torch.cuda.mem_get_info()[0])
        comm.Barrier()
        return free

    def use(calls: bool) -> None:
        with make_buffer(comm) as buffer:
            if calls:
                exchange.check_works(buffer)

    for _ in range(2):  # what is only needed once
        use(calls=True)
    before = free_bytes()
    for turn in range(20 if IS_SHARING else 98):
        use(calls=turn % 10 == 0)
    with together(comm) as verdict:
        lost = before - free_bytes()
        verdict.true("bytes that are gone", lost <= 1 << 22, lost)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_buffers_side_by_side_go_in_any_order(comm: MPI.Intracomm, order: tuple[int, ...]) -> None:
    exchanges = [Exchange(comm, seed=seed) for seed in range(3)]
    buffers = [make_buffer(comm) for _ in range(3)]
    handles = [exchange.dispatch(buffer)[4] for exchange, buffer in zip(exchanges, buffers, strict=True)]
    with together(comm) as verdict:
        results = []
        for step in range(4):
            for exchange, buffer, handle in zip(exchanges, buffers, handles, strict=True):
                recv_x, *_, event = buffer.dispatch(exchange.x(step), handle=handle, async_finish=True)
                combined, _, event = buffer.combine(recv_x, handle, previous_event=event, async_finish=True)
                results.append((exchange, step, recv_x, combined, event))
        for exchange, step, recv_x, combined, event in results:
            event.current_stream_wait()
            exchange.check_received(verdict, step, recv_x)
            exchange.check_combined(verdict, step, combined)
    for number in order:
        buffers[number].destroy()
        for other in order[order.index(number) + 1 :]:
            exchanges[other].check_works(buffers[other])


@pytest.mark.parametrize("device", ["cuda", "cuda:index", None])
def test_ways_to_name_the_device(comm: MPI.Intracomm, device: str | None) -> None:
    """Plain "cuda", and None, are the current device, or where that is the first one, the local rank's."""
    if IS_SHARING and device != "cuda:index":
        pytest.skip("there is not a GPU for each local rank")
    exchange = Exchange(comm)
    with make_buffer(comm, device=str(DEVICE) if device == "cuda:index" else device) as buffer:
        with together(comm) as verdict:
            recv_x, recv_idx, _, _, handle, _ = exchange.dispatch(buffer, 1)
            for tensor in (recv_x, recv_idx, handle[0], handle.recv_src_idx, handle.num_recv_tokens_per_expert):
                verdict.true("device", tensor.device == DEVICE, tensor.device)
            exchange.check_received(verdict, 1, recv_x)
        exchange.check_works(buffer)


@pytest.mark.mpi(min_size=2)
def test_ranks_on_one_gpu_are_an_error(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARE_GPUS, raising=False)
    half = comm.Split(comm.Get_rank() // 2, comm.Get_rank())
    assert isinstance(half, MPI.Intracomm)
    if half.Get_size() == 2:
        message = promptly(lambda: make_buffer(half, device="cuda:0"), Error)
        assert re.search(r"\b0\b", message) and re.search(r"\b1\b", message), message
    half.Free()
    comm.Barrier()


# --- kernel variants, sizes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def buffers() -> Iterator[Buffers]:
    made = Buffers(MPI.COMM_WORLD)
    yield made
    made.destroy()


@pytest.fixture(scope="module")
def buffers_without_bulk_copies() -> Iterator[Buffers]:
    """Made while HPC_MOE_TEST_NO_BULK_COPIES is set: these use the kernels for GPUs older than sm_90."""
    made = Buffers(MPI.COMM_WORLD)
    yield made
    made.destroy()


def plain_case(comm: MPI.Intracomm, **changes: Any) -> Case:
    size = comm.Get_size()
    case = Case(
        seed=1,
        num_tokens=tuple(40 + 3 * rank for rank in range(size)),
        hidden=HIDDEN,
        num_local_experts=LOCAL_EXPERTS,
        top_k=TOP_K,
        kind="balanced",
        payload="bf16",
        top_k_mode="weights",
        expert_layout="token",
        expert_alignment=1,
        spare_rows=-1,
        num_biases=1,
        node_of_rank=(0,) * size,
        is_window_small=False,
        is_strided=False,
        async_finish=False,
    )
    return replace(case, **changes)


@pytest.mark.parametrize("payload", ["bf16", "fp8", "ue8m0"])
@pytest.mark.parametrize("hidden", [128, 384, 1152, 2944, 4608, 7168, 16256, 16384])
def test_hidden_sizes(comm: MPI.Intracomm, buffers: Buffers, hidden: int, payload: str) -> None:
    if payload == "ue8m0" and hidden % 512:
        pytest.skip("packed scales need a multiple of 512")
    for seed, (is_window_small, is_strided, expert_layout) in enumerate(
        [(False, False, "token"), (False, True, "grouped"), (True, True, "token"), (True, False, "grouped")]
    ):
        case = plain_case(
            comm,
            seed=seed,
            hidden=hidden,
            payload=payload,
            is_window_small=is_window_small,
            is_strided=is_strided,
            expert_layout=expert_layout,
            expert_alignment=8,
            num_biases=seed % 3,
        )
        with together(comm, str(case)) as verdict:
            check_all_calls(verdict, buffer_for(buffers, case), case)


@pytest.mark.parametrize("num_tokens", [(0,), (1,), (0, 1), (5000,), (0, 5000), (1, 5000)])
@pytest.mark.parametrize("is_window_small", [False, True])
def test_numbers_of_tokens(
    comm: MPI.Intracomm, buffers: Buffers, num_tokens: tuple[int, ...], is_window_small: bool
) -> None:
    counts = tuple(num_tokens[rank % len(num_tokens)] for rank in range(comm.Get_size()))
    for payload in ("bf16", "fp8"):
        case = plain_case(comm, num_tokens=counts, hidden=256, payload=payload, is_window_small=is_window_small)
        with together(comm, str(case)) as verdict:
            check_all_calls(verdict, buffer_for(buffers, case), case)


def test_sizes_of_the_window(comm: MPI.Intracomm) -> None:
    """From the smallest one, of odd numbers of bytes too."""
    smallest = minimum_nvl_bytes(comm.Get_size())
    case = plain_case(comm, num_tokens=(150,) * comm.Get_size(), hidden=2048)
    for num_bytes in (smallest, smallest + 1, smallest + 12345, 2 * smallest + 4096, 3 * smallest + 777):
        with make_buffer(comm, num_bytes) as buffer:
            for expert_layout in ("token", "grouped"):
                with together(comm, f"{num_bytes} bytes, {expert_layout}") as verdict:
                    check_all_calls(verdict, buffer, replace(case, expert_layout=expert_layout))


@pytest.mark.parametrize("expert_layout", ["token", "grouped"])
def test_every_number_of_sms_gives_the_same_bits(comm: MPI.Intracomm, expert_layout: str) -> None:
    exchange = Exchange(comm, num_tokens=500, hidden=1024)
    before = Buffer.num_sms
    outputs = []
    try:
        with make_buffer(comm) as buffer:
            for num_sms in (1, 4, 16, 32, 64):
                Buffer.set_num_sms(num_sms)
                outputs.append(all_outputs(buffer, exchange, expert_layout, None))
            Buffer.set_num_sms(before)
            outputs.append(all_outputs(buffer, exchange, expert_layout, Config(num_sms=8)))
    finally:
        Buffer.set_num_sms(before)
    with together(comm) as verdict:
        for number, output in enumerate(outputs):
            for name, tensor in output.items():
                verdict.same(f"{name}, choice {number}", tensor, outputs[0][name])
        expected = exchange.expected(1, expert_layout=expert_layout).recv_x
        assert isinstance(expected, torch.Tensor)
        verdict.same("recv_x", outputs[0]["recv_x"], expected)


def all_outputs(
    buffer: Buffer, exchange: Exchange, expert_layout: str, config: Config | None
) -> dict[str, torch.Tensor | None]:
    """On the CPU, what a dispatch and a combine with uneven numbers give."""
    recv_x, recv_idx, recv_weights, _, handle, _ = exchange.dispatch(
        buffer, 1, expert_layout=expert_layout, config=config
    )
    y = (recv_x.float() * 1.7 + exchange.rank).bfloat16()
    combined, weights, _ = buffer.combine(y, handle, topk_weights=recv_weights, bias=exchange.x(2), config=config)
    named = {"recv_x": recv_x, "recv_topk_idx": recv_idx, "recv_topk_weights": recv_weights, "combined_x": combined}
    return {name: each.cpu() for name, each in named.items()} | {"weights": None if weights is None else weights.cpu()}


@pytest.mark.parametrize("rate", ["0", "1", "1000"])
def test_every_rate_gives_the_same_rows(comm: MPI.Intracomm, rate: str) -> None:
    """Few SMs, so that every sending warp has rows enough to be held back."""
    exchange = Exchange(comm, num_tokens=500, hidden=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_MOE_NVLINK_GB_PER_S", rate)
        with make_buffer(comm) as buffer:
            output = all_outputs(buffer, exchange, "token", Config(num_sms=2))
    with make_buffer(comm) as buffer:
        expected = all_outputs(buffer, exchange, "token", None)
    with together(comm) as verdict:
        for name, tensor in output.items():
            verdict.same(name, tensor, expected[name])


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
@pytest.mark.parametrize("num_nvl_bytes", [1 << 22, 1 << 25])
def test_large_rows_at_a_low_rate(comm: MPI.Intracomm, payload: str, num_nvl_bytes: int) -> None:
    """Pieces, scales and (in the small window) passes that are held back."""
    case = plain_case(comm, num_tokens=(300,) * comm.Get_size(), hidden=7168, payload=payload)
    before = Buffer.num_sms
    with together(comm, str(case)) as verdict, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_MOE_NVLINK_GB_PER_S", "20")
        try:
            Buffer.set_num_sms(3)
            with make_buffer(comm, num_nvl_bytes) as buffer:
                check_all_calls(verdict, buffer, case)
        finally:
            Buffer.set_num_sms(before)


def test_a_bad_rate(comm: MPI.Intracomm) -> None:
    """On one rank; all raise."""
    with pytest.MonkeyPatch.context() as patch:
        if comm.Get_rank() == 0:
            patch.setenv("HPC_MOE_NVLINK_GB_PER_S", "fast")
        with pytest.raises(ArgumentError, match="HPC_MOE_NVLINK_GB_PER_S must be a whole number of GB/s"):
            make_buffer(comm)
    make_buffer(comm).destroy()


@pytest.mark.parametrize("expert_layout", ["token", "grouped"])
def test_runs_give_the_same_bits(comm: MPI.Intracomm, expert_layout: str) -> None:
    """Whichever rank comes first."""
    exchange = Exchange(comm, num_tokens=500, hidden=1024)
    with make_buffer(comm) as buffer:
        outputs = []
        for run in range(6):
            if run % exchange.size == exchange.rank:
                sleep()
            outputs.append(all_outputs(buffer, exchange, expert_layout, None))
    with together(comm) as verdict:
        for run, output in enumerate(outputs):
            for name, tensor in output.items():
                verdict.same(f"{name}, run {run}", tensor, outputs[0][name])


@given(case=cases())
@same_on_all_ranks(max_examples=40)
def test_without_bulk_copies(comm: MPI.Intracomm, buffers_without_bulk_copies: Buffers, case: Case) -> None:
    with together(comm, str(case)) as verdict, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_MOE_TEST_NO_BULK_COPIES", "1")
        check_all_calls(verdict, buffer_for(buffers_without_bulk_copies, case), case)


def test_large_rows_without_bulk_copies(comm: MPI.Intracomm, buffers_without_bulk_copies: Buffers) -> None:
    for payload in ("bf16", "fp8"):
        case = plain_case(comm, num_tokens=(300,) * comm.Get_size(), hidden=7168, payload=payload)
        with together(comm, str(case)) as verdict, pytest.MonkeyPatch.context() as patch:
            patch.setenv("HPC_MOE_TEST_NO_BULK_COPIES", "1")
            check_all_calls(verdict, buffer_for(buffers_without_bulk_copies, case), case)
