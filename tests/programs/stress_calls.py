"""What the ranks of stress.py do: random calls, several on their way at once, and what must come of them.

All ranks draw the same rounds from the seed. A round is one routing and the calls that use it. What a rank must receive
follows from the routing alone: `hpc_moe.testing.reference` says which token lies in which row, and a token's contents
are a function of its key (rank and index), the channel and the number of the call, computed where it is compared, on
the GPU. What is moved must be the same to the bit; combine adds small integers, so its sums are exact, whatever their
order.

Nothing here waits for the GPU but the uncached dispatch: comparisons run behind the calls, and their results are read
every few rounds. So checks come right behind the calls, where a race would show.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import stress_low_latency as low_latency
import torch
from mpi4py import MPI
from stress_contents import Named, contents

from hpc_moe import _C, Buffer, Config, DispatchHandle, EventOverlap
from hpc_moe.config import minimum_nvl_bytes
from hpc_moe.testing import ROUTING_KINDS, make_topk_idx, make_topk_weights
from hpc_moe.testing import reference as ref

TIMEOUT_S, MUTATED_TIMEOUT_S = 10.0, 3.0
# Results lie in the pool; in the pool while there is room, which kept results take; never, and rows come in passes.
WINDOWS = ("ample", "tight", "minimum")
KEPT_ROUNDS = 12  # whose results are kept and looked at again, with the tight window
ROUNDS_IN_FLIGHT = 4  # before the comparisons are read
ROUNDS_BEFORE_AGREEING = 24  # on going on: that brings the ranks into step, and so must be rare
SHOWN = 5  # complaints of a rank

# --- rounds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One routing, and the calls made with it: an uncached dispatch, then `later` ones."""

    seed: int
    window: str
    num_tokens: tuple[int, ...]  # of each rank
    hidden: int
    num_local_experts: int
    top_k: int
    kind: str
    payload: str  # "bf16", "fp8" or "ue8m0"
    expert_layout: str
    expert_alignment: int
    spare_rows: int  # -1: no num_worst_tokens; else so many more than needed
    with_weights: bool
    num_biases: int
    async_finish: bool
    num_sms: int
    later: tuple[str, ...]  # "cached" or "combine"
    checks_at_once: bool  # each call before the next one; else all at the end

    @property
    def num_experts(self) -> int:
        return self.num_local_experts * len(self.num_tokens)


def draw_round(random: Random, num_ranks: int, windows: tuple[str, ...]) -> Round:
    window = random.choice(windows)
    payload = random.choice(("bf16", "bf16", "fp8", "ue8m0"))
    step = 512 if payload == "ue8m0" else 128
    num_local_experts = random.choice((1, 2, 3, 6, 32))
    # Large rows keep the links busy. With the minimum window they would take hundreds of passes.
    is_large = window != "minimum" and random.random() < 1 / 16
    most = 300 if is_large else random.choice((4, 32, 96))
    return Round(
        seed=random.randrange(2**31),
        window=window,
        num_tokens=tuple(random.choice((0, most, *(random.randint(1, most),) * 6)) for _ in range(num_ranks)),
        hidden=7168 if is_large else step * random.randint(1, 2048 // step),
        num_local_experts=num_local_experts,
        top_k=random.randint(1, min(8, num_local_experts * num_ranks)),
        kind=random.choice(ROUTING_KINDS),
        payload=payload,
        expert_layout=random.choice(("token", "token", "grouped")),
        expert_alignment=random.choice((1, 1, 4, 16)),
        spare_rows=random.choice((-1, -1, 0, 7)),
        with_weights=random.random() < 0.7,
        num_biases=random.randint(0, 2),
        async_finish=random.random() < 0.5,
        num_sms=random.choice((2, 8, 20, 24, 40)),
        later=tuple(random.choice(("cached", "combine", "combine")) for _ in range(random.randint(0, 6))),
        checks_at_once=random.random() < 0.6,
    )


def rows(round: Round, keys: torch.Tensor, salt: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens with these keys, of any bits, and their scales."""
    if round.payload == "bf16":
        return contents(keys, round.hidden, 16, salt).to(torch.int16).view(torch.bfloat16), None
    x = contents(keys, round.hidden, 8, salt).to(torch.int8).view(torch.float8_e4m3fn)
    is_packed = round.payload == "ue8m0"
    scales = contents(keys, round.hidden // (512 if is_packed else 128), 31, salt + 1).to(torch.int32)
    return x, scales if is_packed else scales.view(torch.float32)


class Routed:
    """What the routing of a round says, for this rank: its inputs, and which row holds what. On the device.

    Attributes:
        topk_idx, topk_weights: of this rank's tokens.
        own_keys: `[T]`, of this rank's tokens.
        copy_keys: `[T, C]`, of the rows that combine sums for a token; 0 for none.
        num_rows, num_used_rows: of what is received.
        num_received: tokens.
        row_keys: `[num_rows]`, of the tokens received; 0 in padding and in unused rows.
        row_copy_keys: the same, as `copy_keys`.
        received: what dispatch returns, and its handle's tensors; all but the rows.
        counts: of the local experts.
    """

    def __init__(self, round: Round, rank: int, device: torch.device) -> None:
        num_ranks = len(round.num_tokens)
        generator = torch.Generator().manual_seed(round.seed)
        idx = [
            make_topk_idx(round.kind, n, round.top_k, round.num_experts, num_ranks, generator) for n in round.num_tokens
        ]
        weights = [make_topk_weights(each, generator) for each in idx]
        keys = [1 + (source << 12) + torch.arange(n) for source, n in enumerate(round.num_tokens)]
        routing = ref.Routing.from_topk(idx, round.num_experts)
        self.num_worst_tokens = 0
        if round.spare_rows >= 0:
            needed = [
                ref.num_recv_rows(routing, each, round.expert_alignment, round.expert_layout)
                for each in range(num_ranks)
            ]
            self.num_worst_tokens = max(1, max(needed) + round.spare_rows)
        sent = ref.dispatch(
            routing,
            [each[:, None] for each in keys],
            weights if round.with_weights else None,
            rank,
            expert_alignment=round.expert_alignment,
            num_worst_tokens=self.num_worst_tokens,
            expert_layout=round.expert_layout,
        )
        assert isinstance(sent.recv_x, torch.Tensor) and sent.recv_topk_idx is not None
        row_keys = sent.recv_x[:, 0]
        if round.expert_layout == "grouped":  # a copy for each expert
            row_copies = sent.recv_topk_idx + rank * round.num_local_experts
            copies = idx[rank]
        else:  # a copy for each rank
            row_copies = torch.full_like(row_keys, rank)
            copies = torch.where(routing.is_token_in_rank[rank], torch.arange(num_ranks), -1)
        self.num_rows, self.num_used_rows = sent.num_rows, sent.num_used_rows
        self.counts = sent.num_recv_tokens_per_expert_list
        self.topk_idx, self.topk_weights = idx[rank].to(device), weights[rank].to(device)
        self.own_keys, self.row_keys = keys[rank].to(device), row_keys.to(device)
        self.copy_keys = torch.where(copies >= 0, keys[rank][:, None] + (copies + 1 << 16), 0).to(device)
        self.row_copy_keys = torch.where(row_keys > 0, row_keys + (row_copies + 1 << 16), 0).to(device)
        self.num_received = sent.num_recv_tokens
        found: Named = {
            "recv_topk_idx": sent.recv_topk_idx,
            "recv_topk_weights": sent.recv_topk_weights,
            "rank_prefix_matrix": sent.rank_prefix_matrix,
            "recv_src_idx": sent.recv_src_idx,
            "grouped_rows": sent.grouped_rows,
        }
        self.received: Named = {name: None if each is None else each.to(device) for name, each in found.items()}


# --- comparisons -----------------------------------------------------------------------------------------------------


class Comparisons:
    """Comparisons on the device, which are read later; and what was found wrong."""

    def __init__(self) -> None:
        self.num_wrong = 0
        self.complaints: list[tuple[int, str]] = []  # the call's number, and what is wrong: the first few
        self._labels: list[tuple[int, str, int]] = []
        self._records: list[torch.Tensor] = []

    def complain(self, number: int, text: str) -> None:
        self.num_wrong += 1
        if len(self.complaints) < SHOWN:
            self.complaints.append((number, text))

    def same(self, number: int, label: str, actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
        """Same dtype, shape and bits."""
        if actual is None or expected is None:
            if actual is not expected:
                self.complain(number, f"{label}: got {_show(actual)}, expected {_show(expected)}")
            return
        if actual.dtype != expected.dtype or actual.shape != expected.shape:
            self.complain(number, f"{label}: got {_show(actual)}, expected {_show(expected)}")
            return
        if actual.numel() == 0:
            return
        got, wanted = _bits(actual), _bits(expected)
        differ = got != wanted
        where = differ.view(torch.uint8).argmax()
        self._records.append(torch.stack([differ.sum(), where, got.take(where).long(), wanted.take(where).long()]))
        self._labels.append((number, label, actual[0].numel()))

    def read(self) -> None:
        """Wait for the comparisons made so far."""
        if not self._records:
            return
        found = torch.stack(self._records).tolist()
        for (number, label, width), (count, where, got, wanted) in zip(self._labels, found, strict=True):
            if count:
                at = f"row {where // width}, column {where % width}"
                self.complain(number, f"{label}: {count} values differ; at {at}: bits {got:#x} for {wanted:#x}")
        self._records, self._labels = [], []


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def _show(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


# --- calls -----------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call whose inputs and results-to-be are ready."""

    number: int
    label: str
    start: Callable[[], tuple[Named, EventOverlap]]
    expected: Named


class Ranks:
    """This rank: its buffers, the calls it makes, and how it agrees with the others on going on."""

    def __init__(self, seed: int, mutation: int, device: torch.device, has_low_latency: bool) -> None:
        self.comm, self.device = MPI.COMM_WORLD, device
        self.rank, self.num_ranks = self.comm.Get_rank(), self.comm.Get_size()
        self.mutation = mutation
        self.has_low_latency = has_low_latency
        self.random = Random(seed)
        self.own_random = Random(f"{seed} {self.rank}")
        self.comparisons = Comparisons()
        self.is_stuck = False
        self.num_prepared = 0  # calls
        self.num_started = 0
        self.kept: deque[list[tuple[Call, Named]]] = deque()
        smallest = minimum_nvl_bytes(self.num_ranks)
        sizes = {"ample": 1 << 26, "tight": smallest + (1 << 22), "minimum": smallest}
        timeout = MUTATED_TIMEOUT_S if mutation else TIMEOUT_S
        more: dict[str, Any] = {"device": str(device), "timeout": timeout}
        if self.has_low_latency:
            more.update(low_latency_mode=True, num_rdma_bytes=low_latency.num_bytes(self.num_ranks))
        self.buffers: dict[str, Buffer] = {}
        for name in WINDOWS:
            # Read when a buffer is made. In one, low-latency rows are never tagged; in one, where there is room.
            os.environ["HPC_MOE_TEST_TAGGED_BYTES"] = {"ample": "-1", "tight": "0", "minimum": str(2**40)}[name]
            self.buffers[name] = Buffer(self.comm, sizes[name], **more)

    def run(self, num_calls: int, seconds: float) -> None:
        """Make calls until there are enough, or the ranks agree that it must end."""
        end = time.monotonic() + seconds
        while self.num_prepared < num_calls:
            try:
                for number in range(ROUNDS_BEFORE_AGREEING):
                    if self.num_prepared < num_calls:
                        self.run_some_round()
                    if number % ROUNDS_IN_FLIGHT == 0:
                        self.comparisons.read()
                self.comparisons.read()
                for buffer in self.buffers.values():
                    buffer.check()
            except Exception as error:  # the buffer's, or torch's of CUDA; of broken kernels, any
                self.is_stuck = True
                self.comparisons.complain(self.num_started, f"{type(error).__name__}: {error}")
                if not self.mutation:
                    traceback.print_exc()
            has_noticed = bool(self.mutation) and self.comparisons.num_wrong > 0
            if self.comm.allreduce(self.is_stuck or has_noticed or time.monotonic() > end, MPI.LOR):
                break

    def run_some_round(self) -> None:
        """Of normal calls, or of low-latency ones."""
        if self.has_low_latency and self.random.random() < 0.5:
            round = low_latency.draw_round(self.random, self.num_ranks, WINDOWS)
            low_latency.LowLatencyCalls(self, round).run()
        else:
            self.run_normal_round(WINDOWS)

    def run_normal_round(self, windows: tuple[str, ...]) -> None:
        """On the buffer of one of these windows."""
        self.run_round(draw_round(self.random, self.num_ranks, windows))

    def run_round(self, round: Round) -> None:
        """Make the calls of a round. What must come of them is ready before the first one starts."""
        routed = Routed(round, self.rank, self.device)
        handles: list[DispatchHandle] = []
        calls = [self.dispatch(round, routed, handles)]
        for kind in round.later:
            prepare = self.cached_dispatch if kind == "cached" else self.combine
            calls.append(prepare(round, routed, handles))
        under_way: list[tuple[Call, Named, EventOverlap]] = []
        for call in calls:
            self.delay()
            self.num_started = call.number
            under_way.append((call, *call.start()))
            if round.checks_at_once or call is calls[-1]:
                for started, found, event in under_way:
                    event.current_stream_wait()
                    self.check(started, found)
                if round.window == "tight":
                    self.kept.append([(started, found) for started, found, _ in under_way])
                under_way.clear()
        while len(self.kept) > KEPT_ROUNDS:
            for old, found in self.kept.popleft():
                self.check(old, found, " some rounds later")

    def check(self, call: Call, found: Named, when: str = "") -> None:
        for name, expected in call.expected.items():
            self.comparisons.same(call.number, f"{call.label}: {name}{when}", found[name], expected)

    def delay(self, most_seconds: float = 300e-6) -> None:
        """Make this rank enter its next call late, now and then."""
        if self.own_random.random() > 0.25:
            return
        seconds = most_seconds * self.own_random.random()
        if self.device.type == "cuda":
            torch.cuda._sleep(int(1.7e9 * seconds))  # clock cycles
        else:
            time.sleep(seconds)

    # Each of these takes a number and makes the call's inputs, with contents of their own.

    def dispatch(self, round: Round, routed: Routed, handles: list[DispatchHandle]) -> Call:
        number, label = self.next_call(round, "dispatch")
        x = self.input_rows(round, routed, number)
        arguments: dict[str, Any] = {
            "topk_weights": routed.topk_weights if round.with_weights else None,
            "num_worst_tokens": routed.num_worst_tokens,
            **self.stream_arguments(round),
        }

        def start() -> tuple[Named, EventOverlap]:
            recv_x, idx, weights, counts, handle, event = self.buffers[round.window].dispatch(
                x,
                topk_idx=routed.topk_idx,
                num_experts=round.num_experts,
                expert_alignment=round.expert_alignment,
                expert_layout=round.expert_layout,
                **arguments,
            )
            handles.append(handle)
            self.check_sizes(number, label, recv_x, routed, counts)
            found: Named = {
                "recv_topk_idx": idx,
                "recv_topk_weights": weights,
                "rank_prefix_matrix": handle.rank_prefix_matrix,
                "recv_src_idx": handle.recv_src_idx[: routed.num_received],
                "grouped_rows": None if handle.grouped_rows is None else handle.grouped_rows[: routed.num_received],
            }
            return {**self.used_rows(recv_x, routed), **found}, event

        return Call(number, label, start, {**self.expected_rows(round, routed, number), **routed.received})

    def cached_dispatch(self, round: Round, routed: Routed, handles: list[DispatchHandle]) -> Call:
        number, label = self.next_call(round, "cached dispatch")
        x = self.input_rows(round, routed, number)

        def start() -> tuple[Named, EventOverlap]:
            buffer = self.buffers[round.window]
            recv_x, *_, event = buffer.dispatch(x, handle=handles[0], **self.stream_arguments(round))
            self.check_sizes(number, label, recv_x, routed, routed.counts)
            return self.used_rows(recv_x, routed), event

        return Call(number, label, start, self.expected_rows(round, routed, number))

    def combine(self, round: Round, routed: Routed, handles: list[DispatchHandle]) -> Call:
        """Sums of at most 8 copies and 2 biases, integers from -16 to 15: exact in bf16."""
        number, label = self.next_call(round, "combine")
        is_grouped = round.expert_layout == "grouped"
        num_weights = 1 if is_grouped else round.top_k
        is_unused = (routed.row_copy_keys == 0)[:, None]
        salt, num_tokens = 4 * number, len(routed.own_keys)

        def expected_sum(width: int, salt: int) -> torch.Tensor:
            terms = contents(routed.copy_keys.flatten(), width, 5, salt)
            return terms.view(num_tokens, routed.copy_keys.shape[1], width)

        # NaN, where nothing may be read.
        y = contents(routed.row_copy_keys, round.hidden, 5, salt).bfloat16().masked_fill(is_unused, torch.nan)
        biases = [contents(routed.own_keys, round.hidden, 5, salt + 2 + i) for i in range(round.num_biases)]
        combined = expected_sum(round.hidden, salt).sum(dim=1) + sum(biases)
        weights = combined_weights = None
        if round.with_weights:
            weights = contents(routed.row_copy_keys, num_weights, 5, salt + 1).float().masked_fill(is_unused, torch.nan)
            weights = weights[:, 0] if is_grouped else weights
            combined_weights = expected_sum(num_weights, salt + 1).sum(dim=2 if is_grouped else 1).float()
        bias = tuple(each.bfloat16() for each in biases)

        def start() -> tuple[Named, EventOverlap]:
            found_x, found_weights, event = self.buffers[round.window].combine(
                y, handles[0], topk_weights=weights, bias=bias or None, **self.stream_arguments(round)
            )
            return {"combined_x": found_x, "combined_topk_weights": found_weights}, event

        expected: Named = {"combined_x": combined.bfloat16(), "combined_topk_weights": combined_weights}
        return Call(number, label, start, expected)

    def next_call(self, round: Round, name: str) -> tuple[int, str]:
        self.num_prepared += 1
        label = f"{name} {self.num_prepared} ({round.window} window, {round.expert_layout}, {round.payload}, hidden "
        return self.num_prepared, f"{label}{round.hidden}, tokens {round.num_tokens})"

    @staticmethod
    def stream_arguments(round: Round) -> dict[str, Any]:
        return {"async_finish": round.async_finish, "config": Config(num_sms=round.num_sms)}

    @staticmethod
    def input_rows(round: Round, routed: Routed, number: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x, scales = rows(round, routed.own_keys, 4 * number)
        if scales is None:
            return x
        return x, scales if number % 2 else scales.t().contiguous().t()

    @staticmethod
    def expected_rows(round: Round, routed: Routed, number: int) -> Named:
        x, scales = rows(round, routed.row_keys[: routed.num_used_rows], 4 * number)
        return {"recv_x": x, "scales": scales}

    @staticmethod
    def used_rows(recv_x: Any, routed: Routed) -> Named:
        x, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
        used = slice(routed.num_used_rows)
        return {"recv_x": x[used], "scales": None if scales is None else scales[used]}

    def check_sizes(self, number: int, label: str, recv_x: Any, routed: Routed, counts: list[int]) -> None:
        num_rows = (recv_x[0] if isinstance(recv_x, tuple) else recv_x).shape[0]
        if (num_rows, counts) != (routed.num_rows, routed.counts):
            wanted = f"expected {routed.num_rows} and {routed.counts}"
            self.comparisons.complain(number, f"{label}: rows and counts: got {num_rows} and {counts}, {wanted}")

    # --- the end

    def conclude(self, begin: float, result: str) -> int:
        """Gather what all ranks found, and say it; returns the exit status, the same on all."""
        everybody = self.comm.allgather((self.comparisons.num_wrong, self.comparisons.complaints, self.is_stuck))
        num_wrong = sum(each[0] for each in everybody)
        first = sorted((number, rank, text) for rank, each in enumerate(everybody) for number, text in each[1])
        if self.mutation:
            said = f"noticed after {first[0][0]} calls" if first else f"NOT noticed in {self.num_prepared} calls"
        else:
            said = f"{self.num_prepared} calls in {time.monotonic() - begin:.0f} s, {num_wrong or 'nothing'} wrong"
            if not num_wrong:
                said += f" ({self.describe_windows()})"
        if self.rank == 0:
            for _, rank, text in first[0 if self.mutation else 1 :]:
                print(f"rank {rank}: {text}", flush=True)
            if first:
                said += f"; rank {first[0][1]}: {first[0][2]}"
            print(result + said, flush=True)
        is_as_wanted = bool(num_wrong) == bool(self.mutation)
        if num_wrong:
            self.leave(0 if is_as_wanted else 1)
        for buffer in self.buffers.values():
            buffer.destroy()
        return 0 if is_as_wanted else 1

    def describe_windows(self) -> str:
        told = []
        for name, buffer in self.buffers.items():
            dispatches, combines = buffer.stats()["dispatch"], buffer.stats()["combine"]
            calls, passes = (dispatches[key] + combines[key] for key in ("calls", "passes"))
            pooled = f", {dispatches['pooled']} in the pool" if "pooled" in dispatches else ""
            low = sum(buffer.stats()[f"low_latency_{kind}"]["calls"] for kind in ("dispatch", "combine"))
            told.append(f"{name} window: {calls} calls, {passes} passes{pooled}, {low} low-latency calls")
        return "; ".join(told)

    def leave(self, status: int) -> None:
        """End the process without destroying anything: buffers may be broken, and CUDA too."""
        self.comm.Barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.Finalize()
        os._exit(status)


def choose_device(kind: str) -> torch.device:
    """The CPU, or this rank's GPU. Ends the process if there is no stress build."""
    if kind == "cpu":
        return torch.device("cpu")
    if not getattr(_C, "is_stress_build", False):
        raise SystemExit(f"{_C.__file__} is not a stress build (CMake's -DHPC_MOE_STRESS=ON); use make gpu-stress")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise SystemExit("torch sees no GPU")
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    index = node.Get_rank() % num_gpus
    if node.Get_size() > num_gpus:
        os.environ["HPC_MOE_TEST_SHARE_GPUS"] = "1"
    node.Free()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def main(
    *,
    num_calls: int,
    seconds: float,
    seed: int,
    mutation: int,
    limit: float,
    device: str,
    has_low_latency: bool,
    result: str,
) -> int:
    """What each rank does; returns its exit status. `result` begins the line in which rank 0 says how it ended."""
    if MPI.COMM_WORLD.Get_size() < 2:
        raise SystemExit("start it under mpirun, on 2 ranks or more, or with --all-mutations")
    if mutation and device == "cpu":
        raise SystemExit("--mutation is about the CUDA kernels")
    chosen = choose_device(device)
    os.environ["HPC_MOE_TEST_STRESS_SEED"] = str(1 + seed % 2**20)
    os.environ["HPC_MOE_TEST_MUTATION"] = str(mutation)
    faulthandler.dump_traceback_later(limit, exit=True)
    begin = time.monotonic()
    try:
        ranks = Ranks(seed, mutation, chosen, has_low_latency)
        ranks.run(num_calls, seconds)
        status = ranks.conclude(begin, result)
    except BaseException:  # of this program itself: the others would wait for this rank
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(2)
        raise
    faulthandler.cancel_dump_traceback_later()
    return status
