"""Low-latency rounds of stress.py, on the buffers that normal calls use, too; stress_calls.py has what both share.

A round is one routing, some dispatches with it, and some combines of these, in any order. Sends may be unreceived, one
or two at a time: with two, a rank sends while a slow peer has yet to receive the call two before, into the same memory
if nothing held it back. A normal round may come in between. Inputs are ready before the first call starts.

Contents are those of normal calls: what is moved must be the same to the bit, and sums of small integers, times small
weights, are exact in bf16, those that ranks send too. In the logarithmic format they travel as bf16, since groups of
128 channels that reach 1 are not encoded.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from stress_contents import Named, contents

from hpc_moe import Buffer
from hpc_moe.fp8 import GROUP_CHANNELS, cast_to_fp8
from hpc_moe.testing import ROUTING_KINDS, make_topk_idx

if TYPE_CHECKING:
    from stress_calls import Ranks

MOST_TOKENS, MOST_HIDDEN, MOST_EXPERTS = 96, 2048, 32  # M, H, and experts of a rank
TOKEN_BITS = 9  # of a token's channels: integers from -256 to 255
TERM_BITS = 5  # of what experts return: -16 to 15; 8 of them, times 2, are at most 256, exact in bf16
LONG_DELAY_S = 1e-3  # so that two sends of one rank may be between two receives of another


def num_bytes(num_ranks: int) -> int:
    """`num_rdma_bytes` with which every round fits."""
    hint: int = Buffer.get_low_latency_rdma_size_hint(MOST_TOKENS, MOST_HIDDEN, num_ranks, MOST_EXPERTS * num_ranks)
    return hint


@dataclass(frozen=True)
class LowLatencyRound:
    """One routing, and the calls made with it: a dispatch, then `later` ones."""

    seed: int
    window: str  # whose buffer
    num_max_tokens: int
    num_tokens: tuple[int, ...]  # of each rank
    hidden: int
    num_local_experts: int
    top_k: int
    kind: str
    payload: str  # "bf16", "fp8" or "ue8m0"
    is_weighted: bool
    transport: str  # of combines: "plain", "zero_copy" or "logfmt"
    later: tuple[int, ...]  # -1: a dispatch; else a combine of the dispatch of this number, one of the last two
    most_unreceived: int  # 0: calls send and receive at once; else so many sends at most are unreceived
    normal_behind: int  # a round of normal calls comes behind the call of this number, if there is one
    checks_at_once: bool  # each call when it has been received; else all at the end

    @property
    def num_experts(self) -> int:
        return self.num_local_experts * len(self.num_tokens)


def draw_round(random: Random, num_ranks: int, windows: tuple[str, ...]) -> LowLatencyRound:
    payload = random.choice(("bf16", "fp8", "ue8m0"))
    step = 512 if payload == "ue8m0" else 128
    num_local_experts = random.choice((1, 2, 3, 6, MOST_EXPERTS))
    most = random.choice((1, 4, 32, 33, MOST_TOKENS))
    return LowLatencyRound(
        seed=random.randrange(2**31),
        window=random.choice(windows),
        num_max_tokens=most,
        num_tokens=tuple(random.choice((0, most, *(random.randint(1, most),) * 6)) for _ in range(num_ranks)),
        hidden=step * random.randint(1, MOST_HIDDEN // step),
        num_local_experts=num_local_experts,
        top_k=random.randint(1, min(8, num_local_experts * num_ranks)),
        kind=random.choice(ROUTING_KINDS),
        payload=payload,
        is_weighted=random.random() < 0.5,
        transport=random.choice(("plain", "plain", "zero_copy", "logfmt")),
        later=draw_later(random),
        most_unreceived=random.choice((0, 1, 2, 2)),
        normal_behind=random.choice((-1, -1, -1, 0, 2)),
        checks_at_once=random.random() < 0.6,
    )


def draw_later(random: Random) -> tuple[int, ...]:
    """Runs of dispatches, and runs of combines: only calls of one kind use the same memory again."""
    later: list[int] = []
    num_dispatches = 1
    for _ in range(random.randint(1, 4)):
        is_dispatch = random.random() < 0.5
        for _ in range(random.randint(1, 3)):
            later.append(-1 if is_dispatch else random.randrange(max(0, num_dispatches - 2), num_dispatches))
            num_dispatches += is_dispatch
    return tuple(later)


class LowLatencyRouted:
    """What the routing of a round says, for this rank. On the device. Nothing in it comes from a call.

    Attributes:
        topk_idx: of this rank's tokens.
        topk_weights: 1 or 2.
        own_keys: `[T]`, of this rank's tokens.
        term_keys: `[T, K]`, of the rows that combine adds up for a token; 0 for none.
        used: indices, in `[L * M * R]`, of the rows that are received.
        row_keys, row_term_keys: of these rows: as `own_keys` of their tokens, and as `term_keys`.
        received: what dispatch returns, and its handle's tensors; all but the rows.
    """

    def __init__(self, round: LowLatencyRound, rank: int, device: torch.device) -> None:
        num_ranks, local = len(round.num_tokens), round.num_local_experts
        generator = torch.Generator().manual_seed(round.seed)
        idx = [
            make_topk_idx(round.kind, n, round.top_k, round.num_experts, num_ranks, generator) for n in round.num_tokens
        ]
        weights = [torch.randint(1, 3, each.shape, generator=generator).float() for each in idx]
        sources = torch.repeat_interleave(torch.arange(num_ranks), torch.tensor(round.num_tokens))
        tokens = torch.cat([torch.arange(n) for n in round.num_tokens])
        keys, all_idx = 1 + (sources << 12) + tokens, torch.cat(idx)
        own_keys = keys[sources == rank]
        # Rows lie by expert, then source, then token.
        at, column = (all_idx // local == rank).nonzero(as_tuple=True)
        expert, order = (all_idx[at, column] - rank * local).sort(stable=True)
        at = at[order]
        per_source = torch.bincount(expert * num_ranks + sources[at], minlength=local * num_ranks)
        per_source = per_source.view(local, num_ranks)
        counts = per_source.sum(dim=1)
        begins = counts.cumsum(dim=0) - counts  # of the experts, if there were no gaps
        used = expert * round.num_max_tokens * num_ranks + torch.arange(len(at)) - begins[expert]
        self.topk_idx, self.topk_weights = idx[rank].to(device), weights[rank].to(device)
        self.own_keys, self.used = own_keys.to(device), used.to(device)
        self.row_keys = keys[at].to(device)
        self.row_term_keys = (keys[at] + (expert + rank * local + 1 << 16)).to(device)
        self.term_keys = torch.where(idx[rank] >= 0, own_keys[:, None] + (idx[rank] + 1 << 16), 0).to(device)
        self.received: Named = {
            "recv_count": counts.int().to(device),
            "recv_layout_range": (per_source.cumsum(dim=1) - per_source << 32 | per_source).to(device),
            "recv_src_idx": tokens[at].int().to(device),
        }


# --- what a cast makes of tokens -------------------------------------------------------------------------------------


@functools.cache
def cast_tables(is_packed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What `cast_to_fp8` makes of groups of integers: computed on the CPU, so that nothing on the GPU is trusted.

    Returns:
        `[257, 513] uint8`: e4m3 of the integers from -256 on, for each largest magnitude of a group (only those that
        such a group can have mean something). `[257] int32`: the bits of its float32 scale.
    """
    most = 1 << TOKEN_BITS - 1
    largest = torch.arange(most + 1.0)[:, None, None]
    per_group = GROUP_CHANNELS - 1  # and the largest magnitude
    num_groups = -(-(2 * most + 1) // per_group)
    numbers = torch.arange(num_groups * per_group).view(1, num_groups, per_group) - float(most)
    groups = torch.cat([largest.expand(-1, num_groups, 1), numbers.clamp(-largest, largest)], dim=2)
    x, scales = cast_to_fp8(groups.flatten(1), round_scale=is_packed)
    q = x.view(torch.uint8).view(groups.shape)[:, :, 1:].flatten(1)[:, : 2 * most + 1]
    return q.contiguous().to(device), scales[:, 0].contiguous().view(torch.int32).to(device)


def cast(x: torch.Tensor, is_packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `cast_to_fp8` does, of `[rows, H] int64` tokens; packed: with UE8M0 scales."""
    table, scale_bits = cast_tables(is_packed, x.device)
    groups = x.view(len(x), x.shape[1] // GROUP_CHANNELS, GROUP_CHANNELS)
    largest = groups.abs().amax(dim=2)
    at = largest[:, :, None] * table.shape[1] + groups + (1 << TOKEN_BITS - 1)
    q = table.flatten()[at].view(torch.float8_e4m3fn).flatten(1)
    bits = scale_bits[largest]
    if not is_packed:
        return q, bits.view(torch.float32)
    exponents = (bits >> 23).view(len(x), bits.shape[1] // 4, 4)
    return q, sum(exponents[:, :, i] << 8 * i for i in range(1, 4)) + exponents[:, :, 0]


# --- calls -----------------------------------------------------------------------------------------------------------


@dataclass
class LowLatencyCall:
    """A call whose inputs and results-to-be are ready.

    Attributes:
        number: of the call.
        label: what it is called.
        start: makes it; returns its hook, and what gives its results once they have been received.
        expected: results.
        dispatch: which one of the round it is, or combines.
        is_dispatch: whether it is one.
    """

    number: int
    label: str
    start: Callable[[], tuple[Callable[[], None] | None, Callable[[], Named]]]
    expected: Named
    dispatch: int
    is_dispatch: bool


Sent = tuple[LowLatencyCall, Callable[[], None] | None, Callable[[], Named]]


class LowLatencyCalls:
    """The calls of a round."""

    def __init__(self, ranks: Ranks, round: LowLatencyRound) -> None:
        self.ranks, self.round = ranks, round
        self.buffer = ranks.buffers[round.window]
        self.routed = LowLatencyRouted(round, ranks.rank, ranks.device)
        self.handles: list[Any] = []
        self.num_received = 0  # dispatches
        self.unreceived: deque[Sent] = deque()
        self.unchecked: list[Sent] = []

    def run(self) -> None:
        """Make them, and compare what comes."""
        calls = [self.dispatch(0)]
        for of in self.round.later:
            calls.append(self.dispatch(sum(call.is_dispatch for call in calls)) if of < 0 else self.combine(of))
        for position, call in enumerate(calls):
            self.make_room(call)
            self.delay()
            self.ranks.num_started = call.number
            self.unreceived.append((call, *call.start()))
            if self.round.most_unreceived == 0:
                self.receive()
            if position == self.round.normal_behind:
                self.ranks.run_normal_round((self.round.window,))
        while self.unreceived:
            self.receive()
        self.check()

    def make_room(self, call: LowLatencyCall) -> None:
        """Receive what must be received before this call."""
        while len(self.unreceived) >= max(1, self.round.most_unreceived):
            self.receive()
        while not call.is_dispatch and self.num_received <= call.dispatch:
            self.receive()

    def receive(self) -> None:
        """The earliest call that is unreceived."""
        sent = self.unreceived.popleft()
        call, hook, _ = sent
        if hook is not None:
            self.delay()
            hook()
        self.num_received += call.is_dispatch
        self.unchecked.append(sent)
        if self.round.checks_at_once:
            self.check()

    def check(self) -> None:
        """Compare what has been received since."""
        for call, _, results in self.unchecked:
            found = results()
            for name, expected in call.expected.items():
                self.ranks.comparisons.same(call.number, f"{call.label}: {name}", found[name], expected)
        self.unchecked = []

    def delay(self) -> None:
        if self.round.most_unreceived > 1:
            self.ranks.delay(LONG_DELAY_S)
        else:
            self.ranks.delay()

    def next_call(self, name: str) -> tuple[int, str]:
        """The call's number, and what it is called."""
        ranks, round = self.ranks, self.round
        ranks.num_prepared += 1
        label = (
            f"low-latency {name} {ranks.num_prepared} ({round.window} window, {round.payload}, hidden {round.hidden}"
        )
        how = f"{'weighted' if round.is_weighted else 'row per expert'}, {round.most_unreceived} unreceived"
        return ranks.num_prepared, f"{label}, M {round.num_max_tokens}, tokens {round.num_tokens}, {how})"

    def dispatch(self, which: int) -> LowLatencyCall:
        round, routed = self.round, self.routed
        number, label = self.next_call("dispatch")
        is_packed = round.payload == "ue8m0"
        x = contents(routed.own_keys, round.hidden, TOKEN_BITS, 4 * number).bfloat16()

        def start() -> tuple[Callable[[], None] | None, Callable[[], Named]]:
            recv_x, recv_count, handle, _, hook = self.buffer.low_latency_dispatch(
                x,
                routed.topk_idx,
                round.num_max_tokens,
                round.num_experts,
                use_fp8=round.payload != "bf16",
                round_scale=is_packed,
                use_ue8m0=is_packed,
                return_recv_hook=round.most_unreceived > 0,
                topk_weights=routed.topk_weights if round.is_weighted else None,
            )
            self.handles.append(handle)
            return hook, lambda: self.received(recv_x, recv_count, handle)

        return LowLatencyCall(number, label, start, {**self.expected_rows(number), **routed.received}, which, True)

    def expected_rows(self, number: int) -> Named:
        round = self.round
        x = contents(self.routed.row_keys, round.hidden, TOKEN_BITS, 4 * number)
        if round.payload == "bf16":
            return {"recv_x": x.bfloat16(), "scales": None}
        q, scales = cast(x, round.payload == "ue8m0")
        return {"recv_x": q, "scales": scales}

    def received(self, recv_x: Any, recv_count: torch.Tensor, handle: Any) -> Named:
        """What a dispatch gave; the rows that count are known from the routing."""
        x, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
        return {
            "recv_x": self.used_rows(x),
            "scales": None if scales is None else self.used_rows(scales),
            "recv_count": recv_count,
            "recv_layout_range": handle.recv_layout_range,
            "recv_src_idx": handle.recv_src_idx.flatten()[self.routed.used],
        }

    def used_rows(self, rows: torch.Tensor) -> torch.Tensor:
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[rows.dtype.itemsize]
        return rows.view(kind).flatten(0, 1)[self.routed.used].view(rows.dtype)

    def combine(self, of: int) -> LowLatencyCall:
        """Sums of at most 8 terms, times 1 or 2."""
        round, routed, ranks = self.round, self.routed, self.ranks
        number, label = self.next_call(f"combine of its dispatch {of}, {round.transport},")
        terms = contents(routed.term_keys.flatten(), round.hidden, TERM_BITS, 4 * number)
        terms = terms.view(*routed.term_keys.shape, round.hidden)
        expected = (terms * routed.topk_weights.long()[..., None]).sum(dim=1).bfloat16()
        shape = (round.num_local_experts, round.num_max_tokens * ranks.num_ranks, round.hidden)
        y = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=ranks.device)  # where nothing may be read
        rows = contents(routed.row_term_keys, round.hidden, TERM_BITS, 4 * number)
        y.view(-1, round.hidden)[routed.used] = rows.bfloat16()

        def start() -> tuple[Callable[[], None] | None, Callable[[], Named]]:
            given, handle = y, self.handles[of]
            if round.transport == "zero_copy":
                given = self.buffer.get_next_low_latency_combine_buffer(handle)
                given.copy_(y)
            combined, _, hook = self.buffer.low_latency_combine(
                given,
                routed.topk_idx,
                routed.topk_weights,
                handle,
                use_logfmt=round.transport == "logfmt",
                zero_copy=round.transport == "zero_copy",
                return_recv_hook=round.most_unreceived > 0,
            )
            return hook, lambda: {"combined_x": combined}

        return LowLatencyCall(number, label, start, {"combined_x": expected}, of, False)
