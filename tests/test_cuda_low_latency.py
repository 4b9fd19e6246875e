"""What low-latency calls have only on CUDA: graphs, streams, errors that come later, wrong values, GPU memory.

What both backends share is in test_properties_low_latency.py, test_bad_input.py and test_worked_examples.py.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from mpi4py import MPI
from support import (
    DEVICE,
    IS_SHARING,
    PROMPT_S,
    Verdict,
    capturing,
    cuda_only,
    needs_low_latency,
    promptly,
    sleep,
    to_cpu,
    to_device,
    together,
)

from hpc_moe import _C, ArgumentError, Buffer, LowLatencyHandle, PeerTimeoutError, UnavailableError
from hpc_moe.testing import ROUTING_KINDS, make_topk_idx
from hpc_moe.testing import reference as ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mpi,
    pytest.mark.usefixtures("low_latency_world"),
    cuda_only,
    needs_low_latency,
]

M, HIDDEN, TOP_K, LOCAL_EXPERTS = 24, 512, 4, 4
WINDOW_BYTES = 1 << 24
SHORT_TIMEOUT = 2.0  # seconds
# Ranks of other nodes are reached by puts, also on one host.
on_nodes = pytest.mark.parametrize("ranks_per_node", [None, 1], ids=["one node", "a node a rank"])
weighted_or_not = pytest.mark.parametrize("weighted", [False, True], ids=["row per expert", "weights at dispatch"])


@dataclass(frozen=True)
class Inputs:
    """Of all ranks, on the CPU. What a rank passes for itself are the three at its place."""

    x: list[torch.Tensor]
    topk_idx: list[torch.Tensor]
    weights: list[torch.Tensor]

    def of(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """On this rank's GPU."""
        return to_device((self.x[rank], self.topk_idx[rank], self.weights[rank]))


@dataclass
class Received:
    """What a dispatch returned; `recv_x` is a pair with fp8."""

    recv_x: Any
    count: torch.Tensor
    handle: LowLatencyHandle
    hook: Any


class Exchange:
    """Dispatches and combines of one size, and what must come of them on this rank.

    Tokens are small whole numbers, and weights 1, 2 or 4, so that every sum is exact, in whatever form it travels. The
    experts return what they get, so that a combine gives every token as often as its weights say. Inputs are made from
    a number, `step`, the same on every rank; so are routings, of all kinds in turn.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        *,
        num_tokens: Sequence[int] = (),
        num_max: int = M,
        hidden: int = HIDDEN,
        local_experts: int = LOCAL_EXPERTS,
        top_k: int = TOP_K,
        weighted: bool = False,
        kind: str = "",
    ) -> None:
        self.comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()
        self.num_tokens = list(num_tokens) or [max(min(4, num_max), num_max - 3 * rank) for rank in range(self.size)]
        self.num_max, self.hidden, self.top_k = num_max, hidden, top_k
        self.num_experts, self.weighted, self.kind = local_experts * self.size, weighted, kind

    def num_bytes(self) -> int:
        """`num_rdma_bytes` that these sizes need."""
        return Buffer.get_low_latency_rdma_size_hint(self.num_max, self.hidden, self.size, self.num_experts)

    def inputs(self, step: int) -> Inputs:
        generator = torch.Generator().manual_seed(step)
        kind = self.kind or ROUTING_KINDS[step % len(ROUTING_KINDS)]
        made = Inputs([], [], [])
        for count in self.num_tokens:
            made.x.append(torch.randint(-8, 9, (count, self.hidden), generator=generator).bfloat16())
            idx = make_topk_idx(kind, count, self.top_k, self.num_experts, self.size, generator)
            made.topk_idx.append(idx)
            made.weights.append(2.0 ** torch.randint(3, idx.shape, generator=generator))
        return made

    def send(self, buffer: Buffer, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **options: Any) -> Received:
        """A dispatch of tensors that lie on the GPU."""
        x, topk_idx, weights = given
        recv_x, count, handle, _, hook = buffer.low_latency_dispatch(
            x,
            topk_idx,
            self.num_max,
            self.num_experts,
            **{"use_fp8": False, "topk_weights": weights if self.weighted else None, **options},
        )
        return Received(recv_x, count, handle, hook)

    def dispatch(self, buffer: Buffer, step: int, **options: Any) -> Received:
        return self.send(buffer, self.inputs(step).of(self.rank), **options)

    def combine(self, buffer: Buffer, step: int, received: Received, **options: Any) -> tuple[torch.Tensor, Any]:
        """The result, and the hook."""
        _, topk_idx, weights = self.inputs(step).of(self.rank)
        combined, _, hook = buffer.low_latency_combine(received.recv_x, topk_idx, weights, received.handle, **options)
        return combined, hook

    def check_received(self, verdict: Verdict, inputs: Inputs, received: Received, name: str = "") -> None:
        expected = ref.low_latency_dispatch(
            inputs.x, inputs.topk_idx, self.num_max, self.num_experts, self.rank, use_fp8=False
        )
        assert isinstance(expected.recv_x, torch.Tensor)
        used = expected.is_row_used
        verdict.same(f"{name}recv_count", received.count, expected.recv_count)
        verdict.same(f"{name}layout_range", received.handle[1], expected.recv_layout_range)
        verdict.same(f"{name}src_idx", to_cpu(received.handle[0])[used], expected.recv_src_idx[used])
        verdict.same(f"{name}recv_x", to_cpu(received.recv_x)[used], expected.recv_x[used])

    def check_combined(self, verdict: Verdict, inputs: Inputs, combined: torch.Tensor, name: str = "") -> None:
        verdict.same(f"{name}combined_x", combined, self.expected_sums(inputs))

    def expected_sums(self, inputs: Inputs) -> torch.Tensor:
        is_selected = inputs.topk_idx[self.rank] >= 0
        times = (inputs.weights[self.rank] * is_selected).sum(dim=1, keepdim=True)
        return (inputs.x[self.rank].float() * times + 0.0).bfloat16()

    def run(self, verdict: Verdict, buffer: Buffer, step: int, **options: Any) -> None:
        """A dispatch and a combine."""
        inputs = self.inputs(step)
        received = self.dispatch(buffer, step, **options)
        if received.hook is not None:
            received.hook()
        self.check_received(verdict, inputs, received, f"step {step}: ")
        combined, hook = self.combine(buffer, step, received, **options)
        if hook is not None:
            hook()
        self.check_combined(verdict, inputs, combined, f"step {step}: ")

    def check_works(self, buffer: Buffer, step: int = 77) -> None:
        """A dispatch and a combine, after which nothing is pending. Collective."""
        with together(self.comm, "the next calls") as verdict:
            self.run(verdict, buffer, step)
            buffer.check()


def make_buffer(comm: MPI.Intracomm, *exchanges: Exchange, **arguments: Any) -> Buffer:
    """For the sizes of these exchanges."""
    num_bytes = max(exchange.num_bytes() for exchange in exchanges)
    options = {"num_rdma_bytes": num_bytes, "low_latency_mode": True, "device": str(DEVICE), "timeout": 30.0}
    return Buffer(comm, **{**options, **arguments})


def complaint(call: Callable[[], object]) -> str:
    """What it says, if it raises an `ArgumentError`."""
    try:
        call()
    except ArgumentError as error:
        return str(error)
    return ""


# --- graphs ----------------------------------------------------------------------------------------------------------


class Captured:
    """A graph of dispatches and combines, whose inputs may be changed between replays.

    `in_flight`: sends before their hooks are called, 0: no hooks.
    """

    def __init__(self, buffer: Buffer, exchange: Exchange, num_calls: int, in_flight: int = 0, **options: Any) -> None:
        self.exchange, self.num_calls = exchange, num_calls
        self.given = [exchange.inputs(0).of(exchange.rank) for _ in range(num_calls)]
        self.received: list[Received] = []
        self.combined: list[torch.Tensor] = []
        has_hooks, at_once = in_flight > 0, max(1, in_flight)
        with capturing(**options) as self.graph:
            for first in range(0, num_calls, at_once):
                given = self.given[first : first + at_once]
                sent = [exchange.send(buffer, one, return_recv_hook=has_hooks) for one in given]
                for each in sent:
                    if has_hooks:
                        each.hook()
                hooks = []
                for each, (_, topk_idx, weights) in zip(sent, given, strict=True):
                    combined, _, hook = buffer.low_latency_combine(
                        each.recv_x, topk_idx, weights, each.handle, return_recv_hook=has_hooks
                    )
                    hooks.append(hook)
                    self.combined.append(combined)
                for hook in hooks:
                    if has_hooks:
                        hook()
                self.received += sent

    def replay(self, first_step: int) -> None:
        """With the inputs of this step in the first call, and of those behind it in the others."""
        for call, given in enumerate(self.given):
            for tensor, other in zip(
                given, self.exchange.inputs(first_step + call).of(self.exchange.rank), strict=True
            ):
                tensor.copy_(other)
        self.graph.replay()

    def check(self, verdict: Verdict, first_step: int) -> None:
        for call, (received, combined) in enumerate(zip(self.received, self.combined, strict=True)):
            inputs = self.exchange.inputs(first_step + call)
            self.exchange.check_received(verdict, inputs, received, f"call {call}: ")
            self.exchange.check_combined(verdict, inputs, combined, f"call {call}: ")


@weighted_or_not
@pytest.mark.parametrize(("num_calls", "in_flight"), [(1, 0), (2, 0), (3, 0), (1, 1), (3, 1), (2, 2), (4, 2)], ids=str)
@on_nodes
def test_calls_in_a_graph(
    comm: MPI.Intracomm, ranks_per_node: int | None, num_calls: int, in_flight: int, weighted: bool
) -> None:
    """An odd and an even number of them, with ordinary calls between replays: other inputs in every replay."""
    exchange = Exchange(comm, weighted=weighted)
    with make_buffer(comm, exchange, ranks_per_node=ranks_per_node) as buffer:
        exchange.check_works(buffer)
        captured = Captured(buffer, exchange, num_calls, in_flight)
        for replay in range(12):
            step = 10 + replay * num_calls
            with together(comm, f"replay {replay}") as verdict:
                captured.replay(step)
                captured.check(verdict, step)
            if replay % 4 == 3:
                exchange.check_works(buffer, replay)


@weighted_or_not
@on_nodes
def test_replays_without_a_pause(comm: MPI.Intracomm, ranks_per_node: int | None, weighted: bool) -> None:
    """The ranks drift apart as far as they can; the last results tell."""
    exchange = Exchange(comm, weighted=weighted)
    with make_buffer(comm, exchange, ranks_per_node=ranks_per_node) as buffer:
        captured = Captured(buffer, exchange, 3)
        captured.replay(5)
        for replay in range(20 if IS_SHARING else 300):
            if replay % 50 == exchange.rank:
                sleep()
            captured.graph.replay()
        with together(comm) as verdict:
            captured.check(verdict, 5)
            buffer.check()
        exchange.check_works(buffer)


def test_graphs_of_other_sizes_in_turn(comm: MPI.Intracomm) -> None:
    """Of one and of two calls, in one memory pool."""
    exchange = Exchange(comm)
    other = Exchange(comm, num_max=9, hidden=1024, local_experts=2, top_k=3, weighted=True)
    with make_buffer(comm, exchange, other) as buffer:
        first = Captured(buffer, exchange, 1)
        second = Captured(buffer, other, 2, pool=first.graph.pool())
        for step in range(8):
            with together(comm, f"step {step}") as verdict:
                for captured in (first, second) if step % 3 else (second, first):
                    captured.replay(step)
                    captured.check(verdict, step)
        exchange.check_works(buffer)


@weighted_or_not
def test_a_graph_replayed_10_000_times(comm: MPI.Intracomm, weighted: bool) -> None:
    """With other inputs each time, of a few that it takes in turn; it compares what comes of them itself."""
    exchange = Exchange(comm, weighted=weighted)
    steps = [exchange.inputs(step) for step in range(11)]
    given = [torch.stack(tensors) for tensors in zip(*(step.of(exchange.rank) for step in steps), strict=True)]
    counts, sums = [], []
    for inputs in steps:
        received = ref.low_latency_dispatch(
            inputs.x, inputs.topk_idx, exchange.num_max, exchange.num_experts, exchange.rank, use_fp8=False
        )
        counts.append(received.recv_count)
        sums.append(exchange.expected_sums(inputs))
    expected = to_device(torch.stack(counts)), to_device(torch.stack(sums))
    turn = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    wrong = torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def step(buffer: Buffer) -> None:
        x, topk_idx, weights = (table.index_select(0, turn)[0] for table in given)
        received = exchange.send(buffer, (x, topk_idx, weights))
        combined = buffer.low_latency_combine(received.recv_x, topk_idx, weights, received.handle)[0]
        for i, found in enumerate((received.count, combined)):
            wrong[i] += (found != expected[i].index_select(0, turn)[0]).any()
        turn.add_(1).remainder_(len(steps))

    with make_buffer(comm, exchange) as buffer:
        step(buffer)
        with capturing() as graph:
            step(buffer)
        for _ in range(500 if IS_SHARING else 10_000):
            graph.replay()
        with together(comm) as verdict:
            verdict.true("counts and sums", not wrong.any(), wrong.tolist())
        exchange.check_works(buffer)


def test_zero_copy_in_a_graph(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm)
    with make_buffer(comm, exchange) as buffer:
        given = exchange.inputs(0).of(exchange.rank)
        with capturing() as graph:
            received = exchange.send(buffer, given)
            staging = buffer.get_next_low_latency_combine_buffer(received.handle)
            staging.copy_(received.recv_x)
            combined = buffer.low_latency_combine(staging, given[1], given[2], received.handle, zero_copy=True)[0]
        for step in range(7):
            with together(comm, f"step {step}") as verdict:
                inputs = exchange.inputs(step)
                for tensor, other in zip(given, inputs.of(exchange.rank), strict=True):
                    tensor.copy_(other)
                graph.replay()
                exchange.check_received(verdict, inputs, received)
                exchange.check_combined(verdict, inputs, combined)


def test_strided_inputs_in_a_graph(comm: MPI.Intracomm) -> None:
    """Copies that a call makes are made anew in every replay, and live as long as it needs them."""
    exchange = Exchange(comm, weighted=True, kind="balanced")

    def spread(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(rows, (3, 2))[:, 3:-2]

    with make_buffer(comm, exchange) as buffer:
        x, topk_idx, weights = given = tuple(spread(tensor) for tensor in exchange.inputs(0).of(exchange.rank))
        with capturing() as graph:
            received = exchange.send(buffer, (x, topk_idx, weights), return_recv_hook=True)
            received.hook()
            combined, _, hook = buffer.low_latency_combine(
                received.recv_x, topk_idx, weights, received.handle, return_recv_hook=True
            )
            # These would lie where a copy has gone too early.
            scratch = [torch.full(topk_idx.shape, -1, device=DEVICE) for _ in range(32)]
            scratch += [torch.full(weights.shape, torch.nan, device=DEVICE) for _ in range(32)]
            hook()
        for step in range(4):
            with together(comm, f"step {step}") as verdict:
                inputs = exchange.inputs(step)
                for tensor, other in zip(given, inputs.of(exchange.rank), strict=True):
                    tensor.copy_(other)
                graph.replay()
                exchange.check_received(verdict, inputs, received)
                exchange.check_combined(verdict, inputs, combined)
        del scratch


def test_hooks_and_captures_do_not_mix(comm: MPI.Intracomm) -> None:
    """A send from before a capture must be received before it; a hook belongs to the capture that its call was in."""
    exchange = Exchange(comm)
    with make_buffer(comm, exchange) as buffer:
        given, inputs = exchange.inputs(1).of(exchange.rank), exchange.inputs(1)
        sent = exchange.send(buffer, given, return_recv_hook=True)
        torch.cuda.synchronize()
        with together(comm, "capture with a send under way") as verdict:
            with pytest.raises(ArgumentError, match="hook"), capturing():
                exchange.send(buffer, given)
            with pytest.raises(ArgumentError, match="hook"), capturing():
                sent.hook()
            sent.hook()
            exchange.check_received(verdict, inputs, sent)
        with together(comm, "hook behind the capture"):
            with capturing():
                captured = exchange.send(buffer, given, return_recv_hook=True)
            with pytest.raises(ArgumentError, match="in the same capture"):
                captured.hook()
        exchange.check_works(buffer)


# --- hooks -----------------------------------------------------------------------------------------------------------


@weighted_or_not
def test_two_sends_in_flight_and_a_third_that_raises(comm: MPI.Intracomm, weighted: bool) -> None:
    exchange = Exchange(comm, weighted=weighted)
    with make_buffer(comm, exchange) as buffer:
        for first in range(0, 6, 2):
            with together(comm, f"steps {first} and {first + 1}") as verdict:
                steps = (first, first + 1)
                sent = [exchange.dispatch(buffer, step, return_recv_hook=True) for step in steps]
                if first == 2:
                    message = promptly(lambda: exchange.dispatch(buffer, 9, return_recv_hook=True), ArgumentError)
                    verdict.true("the message", "return_recv_hook: 2 earlier sends" in message, message)
                for each in sent[::-1] if first else sent:  # the second one runs the first one, too
                    each.hook()
                sent[0].hook()  # once more
                for step, each in zip(steps, sent, strict=True):
                    exchange.check_received(verdict, exchange.inputs(step), each)
                combines = [
                    exchange.combine(buffer, step, each, return_recv_hook=True)
                    for step, each in zip(steps, sent, strict=True)
                ]
                for _, hook in combines:
                    hook()
                for step, (combined, _) in zip(steps, combines, strict=True):
                    exchange.check_combined(verdict, exchange.inputs(step), combined)
        exchange.check_works(buffer)


def test_a_dispatch_and_a_combine_in_flight(comm: MPI.Intracomm) -> None:
    """As two micro-batches make them: each sends while the other one computes."""
    exchange = Exchange(comm, weighted=True)
    with make_buffer(comm, exchange) as buffer:
        before = exchange.dispatch(buffer, 0)
        for step in range(1, 9):
            with together(comm, f"step {step}") as verdict:
                sent = exchange.dispatch(buffer, step, return_recv_hook=True)
                combined, hook = exchange.combine(buffer, step - 1, before, return_recv_hook=True)
                sent.hook()
                hook()
                exchange.check_received(verdict, exchange.inputs(step), sent)
                exchange.check_combined(verdict, exchange.inputs(step - 1), combined)
                before = sent


def test_a_send_of_another_size_while_one_is_unreceived(comm: MPI.Intracomm) -> None:
    exchange, other = Exchange(comm), Exchange(comm, hidden=2 * HIDDEN)
    with make_buffer(comm, exchange, other) as buffer:
        with together(comm) as verdict:
            sent = exchange.dispatch(buffer, 1, return_recv_hook=True)
            message = promptly(lambda: other.dispatch(buffer, 2, return_recv_hook=True), ArgumentError)
            verdict.true("the message", "other sizes" in message, message)
            sent.hook()
            exchange.check_received(verdict, exchange.inputs(1), sent)
            sent = exchange.dispatch(buffer, 3, return_recv_hook=True)
            other.run(verdict, buffer, 4)  # receives what is due first, and so may have any size
            sent.hook()
            exchange.check_received(verdict, exchange.inputs(3), sent)
        other.check_works(buffer)


def test_hooks_let_go_of_memory(comm: MPI.Intracomm) -> None:
    """Without the help of Python's garbage collector."""
    exchange = Exchange(comm)

    def run() -> None:
        received = exchange.dispatch(buffer, 1, return_recv_hook=True)
        received.hook()
        exchange.combine(buffer, 1, received, return_recv_hook=True)[1]()

    with make_buffer(comm, exchange) as buffer:
        run()
        gc.collect()
        gc.disable()
        try:
            before = torch.cuda.memory_allocated()
            for _ in range(10):
                run()
            with together(comm) as verdict:
                lost = torch.cuda.memory_allocated() - before
                verdict.true("bytes that are still allocated", lost == 0, lost)
        finally:
            gc.enable()


# --- streams ---------------------------------------------------------------------------------------------------------


def test_inputs_that_come_late_are_waited_for(comm: MPI.Intracomm) -> None:
    """What the current stream has still to write; and it may write again what the call has read."""
    exchange = Exchange(comm, kind="balanced")
    with make_buffer(comm, exchange) as buffer:
        x, topk_idx, weights = exchange.inputs(0).of(exchange.rank)
        for step in (1, 2, 3):
            inputs = exchange.inputs(step)
            source = inputs.of(exchange.rank)
            x.fill_(torch.nan)
            topk_idx.fill_(-1)
            torch.cuda.synchronize()
            with together(comm, f"step {step}") as verdict:
                sleep()
                x.copy_(source[0])
                topk_idx.copy_(source[1])
                received = exchange.send(buffer, (x, topk_idx, weights), return_recv_hook=True)
                x.fill_(torch.nan)
                received.hook()
                combined, _, hook = buffer.low_latency_combine(
                    received.recv_x, topk_idx, source[2], received.handle, return_recv_hook=True
                )
                copy = replace(received, recv_x=received.recv_x.clone())
                received.recv_x.fill_(torch.nan)
                hook()
                topk_idx.fill_(-1)
                exchange.check_received(verdict, inputs, copy)
                exchange.check_combined(verdict, inputs, combined)


@pytest.mark.parametrize("later", [False, True], ids=["at once", "hooks"])
def test_calls_from_different_streams_stay_in_order(comm: MPI.Intracomm, later: bool) -> None:
    """Streams that nobody has joined but the library."""
    exchange = Exchange(comm)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with make_buffer(comm, exchange) as buffer:
        given = [exchange.inputs(step).of(exchange.rank) for step in range(8)]
        torch.cuda.synchronize()
        results = []
        for step, one in enumerate(given):
            with torch.cuda.stream(streams[step % 2]):
                if (step + exchange.rank) % 3 == 0:
                    sleep()
                received = exchange.send(buffer, one, return_recv_hook=later)
            with torch.cuda.stream(streams[step // 2 % 2]):
                if later:
                    received.hook()
                combined, _, hook = buffer.low_latency_combine(
                    received.recv_x, one[1], one[2], received.handle, return_recv_hook=later
                )
            with torch.cuda.stream(streams[step // 4 % 2]):
                if later:
                    hook()
            results.append((received, combined))
        torch.cuda.synchronize()
        with together(comm) as verdict:
            for step, (received, combined) in enumerate(results):
                exchange.check_received(verdict, exchange.inputs(step), received, f"step {step}: ")
                exchange.check_combined(verdict, exchange.inputs(step), combined, f"step {step}: ")


def test_memory_that_a_hook_writes_on_another_stream_is_not_given_away(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm, kind="balanced")
    side = torch.cuda.Stream()
    with make_buffer(comm, exchange) as buffer:
        for step in range(4):
            received = exchange.dispatch(buffer, step, return_recv_hook=True)
            shape = received.recv_x.shape
            with torch.cuda.stream(side):
                sleep()
                received.hook()
            del received
            garbage = [torch.full(shape, 7.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(8)]
            torch.cuda.synchronize()
            with together(comm, f"step {step}") as verdict:
                for tensor in garbage:
                    verdict.true("memory of a dropped result is written later", bool((tensor == 7.0).all()))


class NormalCalls:
    """Normal dispatches and combines of the same inputs."""

    def __init__(self, exchange: Exchange, buffer: Buffer, step: int) -> None:
        self.exchange, self.buffer, self.inputs = exchange, buffer, exchange.inputs(step)
        self.routing = ref.Routing.from_topk(self.inputs.topk_idx, exchange.num_experts)

    def dispatch(self, **options: Any) -> tuple[torch.Tensor, Any, Any]:
        """Rows, handle and event."""
        x, topk_idx, _ = self.inputs.of(self.exchange.rank)
        recv_x, *_, handle, event = self.buffer.dispatch(
            x, topk_idx=topk_idx, num_experts=self.exchange.num_experts, **options
        )
        return recv_x, handle, event

    def check_received(self, verdict: Verdict, recv_x: torch.Tensor) -> None:
        sources = self.routing.sources(self.exchange.rank)
        expected = torch.cat([self.inputs.x[rank][tokens] for rank, tokens in sources])
        verdict.same("recv_x of a normal call", recv_x, expected)

    def check_combined(self, verdict: Verdict, combined: torch.Tensor) -> None:
        times = self.routing.is_token_in_rank[self.exchange.rank].sum(dim=1, keepdim=True)
        expected = (self.inputs.x[self.exchange.rank].float() * times + 0.0).bfloat16()
        verdict.same("combined_x of a normal call", combined, expected)


@pytest.mark.parametrize("async_finish", [False, True])
def test_normal_and_low_latency_calls_mix(comm: MPI.Intracomm, async_finish: bool) -> None:
    """On one buffer, from two streams, some of them between the halves of others."""
    exchange = Exchange(comm)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    with make_buffer(comm, exchange, num_nvl_bytes=WINDOW_BYTES) as buffer:
        for step in range(8):
            with together(comm, f"step {step}") as verdict, torch.cuda.stream(streams[step % 2]):
                normal = NormalCalls(exchange, buffer, step)
                received = exchange.dispatch(buffer, step, return_recv_hook=True)
                recv_x, handle, event = normal.dispatch(async_finish=async_finish)
                received.hook()
                event.current_stream_wait()
                combined, hook = exchange.combine(buffer, step, received, return_recv_hook=True)
                normal_combined, _, event = buffer.combine(recv_x, handle, async_finish=async_finish)
                exchange.run(verdict, buffer, step + 100)
                hook()
                event.current_stream_wait()
                normal.check_received(verdict, recv_x)
                normal.check_combined(verdict, normal_combined)
                exchange.check_received(verdict, exchange.inputs(step), received)
                exchange.check_combined(verdict, exchange.inputs(step), combined)
                torch.cuda.current_stream().synchronize()


def test_both_kinds_of_calls_in_a_graph(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm, kind="balanced")
    with make_buffer(comm, exchange, num_nvl_bytes=WINDOW_BYTES) as buffer:
        normal = NormalCalls(exchange, buffer, 1)
        _, handle, _ = normal.dispatch()
        x, topk_idx, weights = exchange.inputs(1).of(exchange.rank)
        with capturing() as graph:
            received = exchange.send(buffer, (x, topk_idx, weights))
            recv_x = buffer.dispatch(x, handle=handle)[0]
            combined = buffer.low_latency_combine(received.recv_x, topk_idx, weights, received.handle)[0]
            normal_combined = buffer.combine(recv_x, handle)[0]
        for step in range(5):
            tokens = exchange.inputs(step + 10).x
            with together(comm, f"step {step}") as verdict:
                x.copy_(to_device(tokens[exchange.rank]))
                graph.replay()
                inputs = normal.inputs = replace(exchange.inputs(1), x=tokens)
                exchange.check_received(verdict, inputs, received)
                exchange.check_combined(verdict, inputs, combined)
                normal.check_received(verdict, recv_x)
                normal.check_combined(verdict, normal_combined)
        exchange.check_works(buffer)


# --- errors that come later ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen_by", ["check", "the next call"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "hooks"])
@pytest.mark.parametrize("call", ["low_latency_dispatch", "low_latency_combine"])
@on_nodes
def test_bad_input_on_one_rank(
    comm: MPI.Intracomm, ranks_per_node: int | None, call: str, later: bool, seen_by: str
) -> None:
    """All ranks raise; the next call works. (The hook of a call that raises for an earlier one is run by itself.)"""
    exchange, culprit = Exchange(comm), comm.Get_size() - 1
    bad = exchange.rank == culprit

    def make(received: Received) -> None:
        x, topk_idx, weights = exchange.inputs(2).of(exchange.rank)
        if call == "low_latency_dispatch":
            hook = exchange.send(buffer, (x.float() if bad else x, topk_idx, weights), return_recv_hook=later).hook
        else:
            spoilt = replace(received, recv_x=received.recv_x.float() if bad else received.recv_x)
            _, hook = exchange.combine(buffer, 1, spoilt, return_recv_hook=later)
        if hook is not None:
            hook()
        torch.cuda.synchronize()  # the next call raises what is known by then

    def make_next() -> None:
        hook = exchange.dispatch(buffer, 3, return_recv_hook=later).hook
        if hook is not None:
            hook()

    with make_buffer(comm, exchange, ranks_per_node=ranks_per_node) as buffer:
        with together(comm) as verdict:
            received = exchange.dispatch(buffer, 1)
            if bad:
                message = promptly(lambda: make(received), ArgumentError)
                verdict.true("the message names the call", call in message, message)
                if seen_by == "the next call":
                    make_next()
            else:
                make(received)
                message = promptly(buffer.check if seen_by == "check" else make_next, ArgumentError)
                verdict.true("the message names the rank", f"rank {culprit}" in message, message)
                verdict.true("and the call", call in message, message)
        exchange.check_works(buffer)


def with_indices(inputs: Inputs, rank: int, changes: dict[tuple[int, int], int]) -> Inputs:
    """The same with other experts at these places of this rank's `topk_idx`."""
    changed = inputs.topk_idx[rank].clone()
    for place, expert in changes.items():
        changed[place] = expert
    return replace(inputs, topk_idx=[changed if r == rank else idx for r, idx in enumerate(inputs.topk_idx)])


@weighted_or_not
@pytest.mark.parametrize("seen_by", ["check", "the next call"])
def test_a_bad_expert_index_counts_as_none(comm: MPI.Intracomm, seen_by: str, weighted: bool) -> None:
    """The call goes on, and the rank that has it hears of it (others may, too)."""
    exchange, culprit = Exchange(comm, weighted=weighted, kind="balanced"), comm.Get_size() - 1
    inputs = exchange.inputs(1)
    places = [(0, 0), (1, 1), (2, 0), (min(3, exchange.num_tokens[culprit] - 1), TOP_K - 1)]
    wrong = dict(zip(places, (10**6, 2**62, -2, exchange.num_experts), strict=True))
    given, expected = with_indices(inputs, culprit, wrong), with_indices(inputs, culprit, dict.fromkeys(wrong, -1))
    with make_buffer(comm, exchange) as buffer:
        exchange.check_works(buffer)
        with together(comm) as verdict:
            x, topk_idx, weights = given.of(exchange.rank)
            received = exchange.send(buffer, (x, topk_idx, weights))
            arguments = (received.recv_x, topk_idx, weights, received.handle)
            heard = []

            def combine() -> None:
                exchange.check_combined(verdict, expected, buffer.low_latency_combine(*arguments)[0])

            if seen_by == "check":
                heard.append(complaint(buffer.check))
                combine()
            else:
                torch.cuda.synchronize()
                heard.append(complaint(combine))  # takes part, and raises in place of returning
            heard.append(complaint(buffer.check))
            exchange.check_received(verdict, expected, received)
            said = " ".join(heard)
            if exchange.rank == culprit:
                verdict.true("it hears of it", "topk_idx" in heard[0], heard)
            else:
                verdict.true(
                    "others are told the rank, if anything", not said.strip() or f"rank {culprit}" in said, said
                )
        exchange.check_works(buffer)


@weighted_or_not
@pytest.mark.parametrize("expert", ["first", "last"])
def test_an_expert_selected_twice_does_no_harm(comm: MPI.Intracomm, expert: str, weighted: bool) -> None:
    """More rows than there is room for: whatever they give, nothing is written beside them, and nothing hangs."""
    size = comm.Get_size()
    exchange = Exchange(comm, num_tokens=[M] * size, weighted=weighted)
    guarded: list[tuple[Sequence[int], torch.dtype]] = [
        ((LOCAL_EXPERTS, M * size, HIDDEN), torch.bfloat16),
        ((LOCAL_EXPERTS, M * size), torch.int32),
        ((M, HIDDEN), torch.bfloat16),
        ((size, M, TOP_K), torch.int32),
    ]
    with make_buffer(comm, exchange) as buffer:
        exchange.check_works(buffer)
        with together(comm) as verdict:
            x, topk_idx, weights = exchange.inputs(1).of(exchange.rank)
            topk_idx.fill_(0 if expert == "first" else exchange.num_experts - 1)
            # Results shall lie in gaps between these.
            guards = [torch.full(shape, 5, dtype=dtype, device=DEVICE) for shape, dtype in guarded for _ in range(9)]
            del guards[1::2]
            torch.cuda.synchronize()
            start = time.monotonic()
            received = exchange.send(buffer, (x, topk_idx, weights))
            said = complaint(lambda: buffer.low_latency_combine(received.recv_x, topk_idx, weights, received.handle))
            said += complaint(buffer.check)
            seconds = time.monotonic() - start
            verdict.true("in time", seconds < PROMPT_S, seconds)
            verdict.true("if anything is said, what is wrong", not said or "topk_idx" in said, said)
            for tensor in guards:
                verdict.true("memory beside the results", bool((tensor == 5).all()))
        exchange.check_works(buffer)


@pytest.mark.parametrize("argument", ["num_max_dispatch_tokens_per_rank", "topk_idx"])
def test_what_the_kernels_do_not_take(comm: MPI.Intracomm, argument: str) -> None:
    exchange = Exchange(comm, hidden=128)
    large = Exchange(comm, num_tokens=[1] * comm.Get_size(), hidden=128, num_max=_C.MAX_LOW_LATENCY_TOKENS + 1, top_k=1)
    wide = Exchange(comm, hidden=128, top_k=_C.MAX_LOW_LATENCY_TOP_K + 1)
    with make_buffer(comm, exchange, large, wide) as buffer:
        with together(comm) as verdict:
            spoilt = large if argument == "num_max_dispatch_tokens_per_rank" else wide
            message = promptly(lambda: spoilt.dispatch(buffer, 0), ArgumentError)
            verdict.true("the message names it", argument in message, message)
        exchange.check_works(buffer)


def test_out_must_begin_at_16_bytes(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm)
    shape = (exchange.num_tokens[exchange.rank], HIDDEN)
    memory = torch.zeros(shape[0] * shape[1] + 8, dtype=torch.bfloat16, device=DEVICE)
    with make_buffer(comm, exchange) as buffer:
        with together(comm) as verdict:
            received = exchange.dispatch(buffer, 1)
            for offset in (1, 7):
                out = memory[offset : offset + shape[0] * shape[1]].view(shape)
                message = promptly(lambda out=out: exchange.combine(buffer, 1, received, out=out), ArgumentError)  # type: ignore[misc]
                verdict.true("the message names it", "out must begin" in message, message)
            out = memory[8:].view(shape)
            combined, _ = exchange.combine(buffer, 1, received, out=out)
            verdict.true("combined_x is out", combined.data_ptr() == out.data_ptr())
            exchange.check_combined(verdict, exchange.inputs(1), out)
        exchange.check_works(buffer)


# --- sizes and memory ------------------------------------------------------------------------------------------------


@on_nodes
def test_sizes_that_change_from_call_to_call(comm: MPI.Intracomm, ranks_per_node: int | None) -> None:
    """M, hidden, number of experts and top_k; with hooks, and without."""
    sizes = [(1, 128, 1, 1), (24, 512, 4, 4), (64, 7168, 4, 8), (33, 2048, 8, 6), (500, 256, 3, 2), (40, 640, 2, 3)]
    sizes += [(12, 8192, 4, 8), (3, 16384, 2, 4)]  # rows with more chunks than a block has warps
    exchanges = [
        Exchange(comm, num_max=most, hidden=hidden, local_experts=experts, top_k=top_k, weighted=weighted)
        for most, hidden, experts, top_k in sizes
        for weighted in (False, True)
    ]
    same_everywhere = random.Random(7)
    with make_buffer(comm, *exchanges, ranks_per_node=ranks_per_node) as buffer:
        for step in range(40):
            exchange = same_everywhere.choice(exchanges)
            later = same_everywhere.random() < 0.5
            with together(comm, f"step {step}: {vars(exchange)}") as verdict:
                exchange.run(verdict, buffer, step, return_recv_hook=later)
        buffer.check()


def test_no_tokens_on_some_ranks(comm: MPI.Intracomm) -> None:
    """On each rank in turn, on all but one, and on all."""
    size = comm.Get_size()
    counts = [[0 if rank == idle else M for rank in range(size)] for idle in range(size)]
    counts += [[M if rank == busy else 0 for rank in range(size)] for busy in range(size)]
    exchanges = [Exchange(comm, num_tokens=each, weighted=weighted) for each in counts for weighted in (False, True)]
    with make_buffer(comm, *exchanges) as buffer:
        for step, exchange in enumerate(exchanges):
            with together(comm, f"{exchange.num_tokens}") as verdict:
                exchange.run(verdict, buffer, step, return_recv_hook=step % 3 == 0)
        none = Exchange(comm, num_tokens=[0] * size)
        none.check_works(buffer)
        exchanges[0].check_works(buffer)


@on_nodes
def test_the_users_view_holds_nothing_of_the_library(comm: MPI.Intracomm, ranks_per_node: int | None) -> None:
    """Between calls, it may be written from end to end."""
    exchange = Exchange(comm)
    with make_buffer(comm, exchange, ranks_per_node=ranks_per_node) as buffer:
        exchange.check_works(buffer, 1)
        torch.cuda.synchronize()
        comm.Barrier()
        whole = buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
        whole.fill_(255)
        torch.cuda.synchronize()
        comm.Barrier()
        with together(comm) as verdict:
            verdict.true("its size", whole.numel() == buffer.num_rdma_bytes, whole.numel())
        for step in range(3):
            exchange.check_works(buffer, step)


def test_statistics_are_added_up(comm: MPI.Intracomm) -> None:
    exchange = Exchange(comm)
    recv_stats = torch.zeros(LOCAL_EXPERTS, dtype=torch.int32, device=DEVICE)
    waits = torch.zeros(exchange.size, dtype=torch.int64, device=DEVICE)
    with make_buffer(comm, exchange) as buffer:
        total = torch.zeros(LOCAL_EXPERTS, dtype=torch.int32)
        for step in range(5):
            with together(comm, f"step {step}") as verdict:
                before = waits.clone()
                if step % exchange.size == exchange.rank:
                    sleep()
                received = exchange.dispatch(
                    buffer, step, cumulative_local_expert_recv_stats=recv_stats, dispatch_wait_recv_cost_stats=waits
                )
                exchange.combine(buffer, step, received, combine_wait_recv_cost_stats=waits)
                total += received.count.cpu()
                verdict.same("recv stats", recv_stats, total)
                verdict.true("waits only grow", bool((waits >= before).all()), waits)
        with together(comm) as verdict:
            verdict.true("nobody waits for itself", int(waits[exchange.rank]) == 0, waits)


@weighted_or_not
@pytest.mark.parametrize("use_fp8", [False, True])
def test_runs_give_the_same_bits(comm: MPI.Intracomm, use_fp8: bool, weighted: bool) -> None:
    """Whichever rank comes first."""
    size, rank = comm.Get_size(), comm.Get_rank()
    exchange = Exchange(comm, num_max=64, hidden=2048, top_k=6, weighted=weighted, kind="balanced")
    generator = torch.Generator().manual_seed(rank)
    _, topk_idx, _ = exchange.inputs(0).of(rank)
    shape = (exchange.num_tokens[rank], exchange.hidden)
    x = to_device(torch.randn(shape, generator=generator).bfloat16())
    weights = to_device(torch.rand(topk_idx.shape, generator=generator))
    y = to_device(torch.randn(LOCAL_EXPERTS, 64 * size, exchange.hidden, generator=generator).bfloat16())
    runs = []
    with make_buffer(comm, exchange) as buffer:
        for run in range(6):
            if run % size == rank:
                sleep()
            received = exchange.send(buffer, (x, topk_idx, weights), use_fp8=use_fp8)
            combined = buffer.low_latency_combine(y, topk_idx, weights, received.handle)[0]
            used = torch.arange(64 * size) < received.count.cpu().unsqueeze(1)
            parts = received.recv_x if isinstance(received.recv_x, tuple) else (received.recv_x,)
            # fp8 has no boolean indexing everywhere: take bytes.
            rows = [part.cpu().contiguous().view(torch.uint8)[used] for part in parts]
            runs.append([received.count.cpu(), received.handle[0].cpu()[used], *rows, combined.cpu()])
    with together(comm) as verdict:
        for run, tensors in enumerate(runs):
            for number, tensor in enumerate(tensors):
                verdict.same(f"tensor {number} of run {run}", tensor, runs[0][number])


# --- several nodes ---------------------------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_what_a_buffer_on_several_nodes_has(comm: MPI.Intracomm) -> None:
    """The size hint has room for the largest calls; there are layouts, but no normal calls, which leave no trace."""
    size, rank = comm.Get_size(), comm.Get_rank()
    exchange = Exchange(comm, num_tokens=[M] * size, local_experts=16, top_k=_C.MAX_LOW_LATENCY_TOP_K)
    with make_buffer(comm, exchange, ranks_per_node=1) as buffer:
        with together(comm) as verdict:
            runtime = buffer.runtime
            nodes = runtime.get_num_rdma_ranks(), runtime.get_rdma_rank(), runtime.get_root_rdma_rank()
            verdict.true("nodes", nodes == (size, rank, 0), nodes)
            x, topk_idx, _ = exchange.inputs(1).of(rank)
            per_rank, per_node, *_ = buffer.get_dispatch_layout(topk_idx, exchange.num_experts)
            verdict.same("num_tokens_per_rdma_rank", per_node, per_rank.cpu())
            with capturing() as graph:
                _, per_node, *_ = buffer.get_dispatch_layout(topk_idx, exchange.num_experts)
            graph.replay()
            verdict.same("the same in a graph", per_node, per_rank.cpu())
            message = promptly(
                lambda: buffer.dispatch(x, topk_idx=topk_idx, num_experts=exchange.num_experts), ArgumentError
            )
            verdict.true("the message names it", "num_nvl_bytes=0" in message, message)
            buffer.check()
            for step in range(3):
                exchange.run(verdict, buffer, step, return_recv_hook=step == 1)
        exchange.check_works(buffer)


# --- a rank that does not come ---------------------------------------------------------------------------------------


def see_a_rank_missing(verdict: Verdict, buffer: Buffer, attempt: Callable[[], None], call: str, absent: int) -> None:
    """What a rank sees that calls."""
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError) as caught:
        attempt()
    seconds = time.monotonic() - start
    verdict.true("in time", 0.9 * SHORT_TIMEOUT < seconds < SHORT_TIMEOUT + PROMPT_S, seconds)
    verdict.true("peers", caught.value.peers == (absent,), caught.value)
    verdict.true("operation", caught.value.operation == call, caught.value.operation)
    verdict.true("the message names the rank", f"rank {absent}" in str(caught.value), caught.value)
    later = promptly(attempt, UnavailableError)
    verdict.true("later calls say why", call in later, later)


@pytest.mark.last  # no low-latency buffer can be made behind it
@pytest.mark.mpi(min_size=2)
def test_a_rank_that_does_not_call(comm: MPI.Intracomm) -> None:
    """The others raise, naming it, and use the GPU for something else. The late rank hears of it too."""
    exchange, absent = Exchange(comm), 1
    buffers = {}
    for name, ranks_per_node in product(("dispatch", "combine", "hook"), (None, 1)):
        comm.Barrier()  # the short timeout is not for the time that ranks take to get here
        buffers[name, ranks_per_node] = make_buffer(
            comm, exchange, timeout=SHORT_TIMEOUT, ranks_per_node=ranks_per_node
        )
    for (name, _), buffer in buffers.items():
        received = exchange.dispatch(buffer, 1)
        torch.cuda.synchronize()
        comm.Barrier()

        def attempt(name: str = name, buffer: Buffer = buffer, received: Received = received) -> None:
            if name == "combine":
                exchange.combine(buffer, 1, received)
            else:
                hook = exchange.dispatch(buffer, 2, return_recv_hook=name == "hook").hook
                if hook is not None:
                    hook()
            buffer.check()

        call = "low_latency_combine" if name == "combine" else "low_latency_dispatch"
        ones = torch.ones(256, 256, device=DEVICE)
        with together(comm, f"{name}: the ranks that call") as verdict:
            if exchange.rank != absent:
                see_a_rank_missing(verdict, buffer, attempt, call, absent)
                verdict.true("the GPU works", bool(((ones @ ones) == 256.0).all()))
        with together(comm, f"{name}: the late rank") as verdict:
            if exchange.rank == absent:
                # The others' rows may all be there, but the others will not come to the call after.
                with pytest.raises((PeerTimeoutError, UnavailableError)):
                    for _ in range(2):
                        attempt()
                verdict.true("the GPU works", bool(((ones @ ones) == 256.0).all()))
        with together(comm, f"{name}: destruction"), pytest.warns(RuntimeWarning):
            buffer.destroy()
