"""What the CUDA backend launches for low-latency calls, on which streams, and in which order.

Stand-ins take the place of torch's streams and of the runtime, and tensors lie on the CPU, so that all of this runs
without a GPU: what kernels compute is the business of test_cuda_low_latency.py.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hpc_moe import _C, ArgumentError, UnavailableError
from hpc_moe._backends.requests import (
    OPERATIONS,
    LowLatencyCombineForm,
    LowLatencyCombineRequest,
    LowLatencyDispatchForm,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    StreamArguments,
)
from hpc_moe.handles import LowLatencyHandle

if hasattr(_C, "CudaRuntime"):
    from hpc_moe._backends.cuda import backend as backends
    from hpc_moe._backends.cuda import low_latency
    from hpc_moe._backends.cuda.backend import CudaBackend
    from hpc_moe._backends.cuda.low_latency import LowLatency

pytestmark = pytest.mark.skipif(not hasattr(_C, "CudaRuntime"), reason="this build has no CUDA runtime")

RANKS, M, HIDDEN, TOP_K, EXPERTS = 2, 4, 128, 2, 4
SEND, RECEIVE, BOTH = 1, 2, 3


@dataclass(eq=False)
class Stream:
    """Notes what it is made to wait for."""

    name: str
    cuda_stream: int
    waited_for: list[object] = field(default_factory=list)

    def wait_event(self, event: object) -> None:
        self.waited_for.append(event)

    def wait_stream(self, stream: object) -> None:
        self.waited_for.append(stream)


class Event:
    """Remembers where it was recorded last, and how often it was."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.times = 0

    def record(self, stream: Stream) -> None:
        self.stream = stream
        self.times += 1


class Runtime:
    """Notes launches as (call, halves, stream); a rejection has no halves."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, int]] = []
        self.addresses: list[tuple[int, ...]] = []  # that they were given
        self.indices: list[list[int]] = []  # that dispatches were given

    def launch_low_latency_dispatch(
        self, params: Any, scale_bytes: int, agreed: list[int], x: int, x_stride: int, topk_index: int, *more: int
    ) -> None:
        *addresses, halves, stream = more
        self.launches.append(("dispatch", halves, stream))
        self.addresses.append((x, x_stride, topk_index, *addresses))
        count = params.num_tokens * params.top_k
        self.indices.append(list((ctypes.c_int64 * count).from_address(topk_index)))

    def launch_low_latency_combine(self, params: Any, agreed: list[int], *more: int) -> None:
        *addresses, halves, stream = more
        self.launches.append(("combine", halves, stream))
        self.addresses.append(tuple(addresses))

    def launch_low_latency_reject(self, operation: int, text: str, stream: int) -> None:
        self.launches.append((("", "", "reject dispatch", "reject combine")[operation], 0, stream))

    def has_timeout(self) -> bool:
        return False

    def has_error(self) -> bool:
        return False


class Region:
    """Memory of an odd number of bytes."""

    num_bytes = (1 << 20) + 77
    put_ranks: frozenset[int] = frozenset()

    def memory(self) -> torch.Tensor:
        return torch.empty(self.num_bytes, dtype=torch.uint8)


class World:
    """A backend among stand-ins, and what torch says of streams."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, has_low_latency: bool = True, ranks: int = RANKS) -> None:
        self.streams = [Stream("first", 1), Stream("second", 2)]
        self.current, self.is_capturing = self.streams[0], False
        self.lent: list[tuple[torch.Tensor, Stream]] = []
        self.forms: list[LowLatencyDispatchForm] = []  # of dispatches
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(low_latency, "current_stream_number", lambda device: self.current.cuda_stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.lent.append((tensor, stream)))
        monkeypatch.setattr(backends, "Lane", lambda *arguments: None)
        self.runtime, self.comm_stream = Runtime(), Stream("communication", 3)
        made = CudaBackend.__new__(CudaBackend)
        vars(made).update(
            device=torch.device("cpu"), num_ranks=ranks, rank=0, num_nvl_bytes=0, epoch=0, runtime=self.runtime,
            comm_stream=self.comm_stream, counters={name: backends.Counter() for name in OPERATIONS[:4]},
            _comm_stream_is_ahead=False, _last_caller=None, _agreed_names={}, _told=False, broken="", low_latency=None,
            _pending=None,
        )  # fmt: skip
        self.backend = made
        if has_low_latency:
            made.low_latency = LowLatency(made, cast(Any, Region()))

    @property
    def low_latency(self) -> LowLatency:
        assert self.backend.low_latency is not None
        return self.backend.low_latency

    @property
    def launches(self) -> list[tuple[str, int, int]]:
        return self.runtime.launches

    def dispatch(
        self, later: bool = True, hidden: int = HIDDEN, form: LowLatencyDispatchForm | None = None, **changes: Any
    ) -> LowLatencyDispatchResult:
        """Through the checks that `Buffer` makes. `form`: of an earlier call; `changes`: of a new one, or of inputs."""
        arguments: dict[str, Any] = {
            "num_tokens": M,
            "hidden": hidden,
            "top_k": TOP_K,
            "num_max_tokens": M,
            "num_experts": EXPERTS,
            "weighted": True,
            "use_fp8": False,
            "round_scale": False,
            "use_ue8m0": False,
            "return_recv_hook": later,
            "x": torch.zeros(M, hidden, dtype=torch.bfloat16),
            "topk_idx": torch.arange(TOP_K).repeat(M, 1),
            "topk_weights": torch.ones(M, TOP_K),
            "recv_stats": None,
            "wait_stats": None,
            **changes,
        }
        tensors = {name: arguments.pop(name) for name in ("x", "topk_idx", "topk_weights", "recv_stats", "wait_stats")}
        self.backend.check_unreceived(later)
        form = form or LowLatencyDispatchForm(**arguments)
        self.forms.append(form)
        return self.backend.low_latency_dispatch(LowLatencyDispatchRequest(form, **tensors))

    def combine(self, handle: LowLatencyHandle, later: bool = True, **changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "form": LowLatencyCombineForm(False, later),
            "x": torch.zeros(handle.shape(RANKS), dtype=torch.bfloat16),
            "topk_idx": torch.arange(TOP_K).repeat(M, 1),
            "topk_weights": torch.ones(M, TOP_K),
            "handle": handle,
            "out": None,
            "wait_stats": None,
        }
        request = LowLatencyCombineRequest(**{**arguments, **changes})
        self.backend.check_routing(request)
        self.backend.check_unreceived(later)
        return self.backend.low_latency_combine(request)[1]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_a_call_without_a_hook_is_one_launch(world: World) -> None:
    sent = world.dispatch(later=False)
    assert sent.receive is None
    assert world.combine(sent.handle, later=False) is None
    assert world.launches == [("dispatch", BOTH, 1), ("combine", BOTH, 1)]


def test_hooks_launch_what_comes_before_them_too_and_once(world: World) -> None:
    first, second = world.dispatch(), world.dispatch()
    with pytest.raises(ArgumentError, match="2 earlier sends are unreceived"):
        world.dispatch()
    assert [halves for _, halves, _ in world.launches] == [SEND, SEND]
    second.receive()
    assert [halves for _, halves, _ in world.launches] == [SEND, SEND, RECEIVE, RECEIVE]
    assert world.runtime.addresses[2:] == world.runtime.addresses[:2]
    first.receive()
    second.receive()
    assert len(world.launches) == 4


def test_a_call_that_receives_at_once_receives_what_is_due_first(world: World) -> None:
    world.dispatch()
    sent = world.dispatch(later=False, hidden=2 * HIDDEN)  # of another size, which is no matter then
    assert [halves for _, halves, _ in world.launches] == [SEND, RECEIVE, BOTH]
    world.combine(sent.handle)
    with pytest.raises(ArgumentError, match="other sizes are unreceived"):
        world.dispatch()
    # Which is told to the peers, behind what is due.
    assert [call for call, _, _ in world.launches[3:]] == ["combine", "combine", "reject dispatch"]
    world.low_latency.check_nothing_unreceived()


def test_a_combine_needs_its_dispatch_received(world: World) -> None:
    sent = world.dispatch()
    with pytest.raises(ArgumentError, match="has not been received"):
        world.combine(sent.handle)
    with pytest.raises(ArgumentError, match="1 sends are unreceived"):
        world.low_latency.check_nothing_unreceived()
    sent.receive()
    world.combine(sent.handle)()


def test_the_hook_that_an_earlier_error_takes_away_is_run(world: World) -> None:
    world.backend._pending = ArgumentError("of another call")
    with pytest.raises(ArgumentError, match="of another call"):
        world.dispatch()
    assert [halves for _, halves, _ in world.launches] == [SEND, RECEIVE]
    world.low_latency.check_nothing_unreceived()


def test_a_rejected_call_comes_behind_what_is_due(world: World) -> None:
    sent = world.dispatch()
    world.backend.reject("low_latency_combine", ArgumentError("wrong"))
    assert world.launches == [("dispatch", SEND, 1), ("dispatch", RECEIVE, 1), ("reject combine", 0, 1)]
    sent.receive()
    assert len(world.launches) == 3 and world.backend.epoch == 2


def test_without_low_latency_mode_nothing_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, has_low_latency=False)
    for name in ("low_latency_dispatch", "low_latency_combine"):
        world.backend.reject(name, ArgumentError("wrong"))
    world.backend.reject_cleaning(ArgumentError("wrong"))
    assert world.launches == [] and world.backend.epoch == 0


def test_without_a_window_normal_calls_are_rejected_by_themselves(world: World) -> None:
    """All ranks reject them, and the windows of other nodes are not open."""
    for name in ("dispatch", "combine"):
        world.backend.reject(name, ArgumentError("num_nvl_bytes=0"))
    assert world.launches == [] and world.backend.epoch == 0


def test_a_normal_call_that_is_refused_for_a_masked_rank_tells_nobody(world: World) -> None:
    """To tell the others is to wait for all of them; no rank that knows of the mask makes the call."""
    world.backend.num_nvl_bytes, world.backend.masks = 1 << 20, cast(Any, SimpleNamespace(now=lambda: {1}))
    for name in ("dispatch", "combine"):
        world.backend.reject(name, UnavailableError("ranks [1] are masked"))
    assert world.launches == [] and world.backend.epoch == 0
    world.backend.reject("low_latency_dispatch", ArgumentError("wrong"))
    assert world.launches == [("reject dispatch", 0, 1)]


def test_results_go_with_their_last_reference(world: World) -> None:
    gc.disable()
    try:
        sent = world.dispatch()
        recv_x, receive = weakref.ref(sent.recv_x), sent.receive
        del sent
        assert recv_x() is not None  # the receive half is to write it
        receive()
        assert recv_x() is None
    finally:
        gc.enable()


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_copies_of_what_is_not_contiguous_live_until_they_have_been_read(world: World) -> None:
    topk_idx = torch.arange(TOP_K * M).view(TOP_K, M).t()
    topk_weights = torch.rand(TOP_K, M).t()
    x = torch.zeros(M * (HIDDEN + 3) + 1, dtype=torch.bfloat16)[1:].view(M, HIDDEN + 3)[:, :HIDDEN]
    sent = world.dispatch(topk_idx=topk_idx, topk_weights=topk_weights, x=x)
    x_at, x_stride, *others = world.runtime.addresses[0]
    assert world.runtime.indices == [topk_idx.flatten().tolist()]
    assert x_at % 16 == 0 and x_stride == 2 * HIDDEN
    kept = {tensor.data_ptr() for tensor in world.low_latency._unreceived[0].used if tensor is not None}
    assert set(others) == kept | {0}  # there are no scales and no statistics
    sent.receive()

    y = torch.zeros(M * EXPERTS * HIDDEN + 1, dtype=torch.bfloat16)[1:].view(sent.handle.shape(RANKS))
    receive = world.combine(sent.handle, x=y, topk_idx=topk_idx, topk_weights=topk_weights)
    x_at, *others = world.runtime.addresses[-1]
    assert x_at % 16 == 0
    kept = {tensor.data_ptr() for tensor in world.low_latency._unreceived[0].used if tensor is not None}
    assert set(others) == kept | {0}
    receive()


def test_a_call_like_an_earlier_one_reads_and_writes_what_it_is_given(world: World) -> None:
    first = world.dispatch(later=False)
    form = world.forms[-1]
    inputs: dict[str, Any] = {
        "x": torch.ones(M, HIDDEN, dtype=torch.bfloat16),
        "topk_idx": torch.zeros(M, TOP_K, dtype=torch.int64),
    }
    second = world.dispatch(later=False, form=form, **inputs)
    x_at, _, index_at, _, rows_at, _, memory_at, *_ = world.runtime.addresses[-1]
    assert (x_at, index_at) == (inputs["x"].data_ptr(), inputs["topk_idx"].data_ptr())
    assert (rows_at, memory_at) == (second.recv_x.data_ptr(), second.handle._backend_state.memory.data_ptr())
    assert not {rows_at, memory_at} & set(world.runtime.addresses[0])
    assert first.recv_count.data_ptr() != second.recv_count.data_ptr()


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_results_besides_rows_do_not_overlap(monkeypatch: pytest.MonkeyPatch, ranks: int, use_ue8m0: bool) -> None:
    """Of sizes that are all odd, with which nothing is aligned by chance."""
    world = World(monkeypatch, ranks=ranks)
    hidden = 512 if use_ue8m0 else 128
    sizes: dict[str, Any] = {"num_max_tokens": 5, "num_tokens": M, "num_experts": ranks, "hidden": hidden}
    sent = world.dispatch(later=False, use_fp8=True, round_scale=True, use_ue8m0=use_ue8m0, **sizes)
    scales = sent.recv_scales
    assert scales is not None and scales.shape == (1, 5 * ranks, 1) and scales.data_ptr() % 16 == 0
    assert scales.dtype == (torch.int32 if use_ue8m0 else torch.float32)
    handle = sent.handle
    assert handle[0].shape == (1, 5 * ranks) and handle[1].shape == (1, ranks)
    results = [sent.recv_count, handle[0], handle[1], scales]
    for number, result in enumerate(results):
        result.fill_(number + 1)
    for number, result in enumerate(results):
        assert bool((result == number + 1).all())


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("num_max_dispatch_tokens_per_rank", {"num_max_tokens": 1 << 20}),
        ("topk_idx", {"top_k": 40}),
        ("num_experts", {"num_experts": 1 << 20}),
    ],
)
def test_what_the_kernels_do_not_take_is_named(world: World, argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=argument):
        world.dispatch(**changes)
    assert world.launches == [("reject dispatch", 0, 1)]


def test_staging_buffers_begin_at_pages(world: World) -> None:
    first, second = (world.dispatch(later=False).handle for _ in range(2))
    offsets = [world.backend.staging_buffer(handle).storage_offset() * 2 for handle in (first, second)]
    assert offsets[0] % 4096 == offsets[1] % 4096 == 0 and offsets[0] != offsets[1]


# --- streams ---------------------------------------------------------------------------------------------------------


def test_calls_come_behind_those_on_other_streams(world: World) -> None:
    first, second = world.streams
    sent = world.dispatch(later=False)
    world.combine(sent.handle, later=False)
    assert first.waited_for == []
    world.current = second
    world.combine(sent.handle, later=False)
    event = second.waited_for[0]
    assert isinstance(event, Event) and len(second.waited_for) == 1 and event.stream is second
    assert event.times == 2  # behind all that came before, and behind this
    world.combine(sent.handle, later=False)
    assert len(second.waited_for) == 1 and event.times == 3
    world.current = first
    world.backend.reject("low_latency_combine", ArgumentError("wrong"))
    assert first.waited_for == [event]


def test_normal_calls_and_low_latency_calls_come_behind_each_other(world: World) -> None:
    first, second = world.streams
    world.backend.lane(StreamArguments())
    assert world.comm_stream.waited_for == []
    world.dispatch(later=False)
    assert first.waited_for == []  # it has waited for the communication stream, as every caller
    world.backend.lane(StreamArguments())
    assert len(world.comm_stream.waited_for) == 1
    world.backend.lane(StreamArguments(async_finish=True))
    world.dispatch(later=False)
    assert first.waited_for == [world.comm_stream]
    world.current = second
    world.dispatch(later=False)
    assert second.waited_for[0] is world.comm_stream
    world.backend.lane(StreamArguments(async_finish=True))
    world.dispatch(later=False)
    assert second.waited_for[-1] is world.comm_stream


def test_memory_of_another_stream_is_lent(world: World) -> None:
    sent = world.dispatch(use_fp8=True)
    world.current = world.streams[1]
    sent.receive()
    lent = {tensor.data_ptr() for tensor, _ in world.lent}
    results = [sent.recv_x, sent.recv_scales, sent.handle._backend_state.memory]
    assert {tensor.data_ptr() for tensor in results if tensor is not None} <= lent and sent.recv_scales is not None
    assert all(stream is world.streams[1] for _, stream in world.lent)
    world.lent.clear()
    world.combine(sent.handle, later=False)
    assert {tensor.data_ptr() for tensor, _ in world.lent} >= {sent.handle._backend_state.memory.data_ptr()}
    world.lent.clear()
    world.current = world.streams[0]
    world.combine(sent.handle)()
    assert world.lent == []


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def test_a_capture_waits_for_no_event_and_leaves_none(world: World) -> None:
    world.dispatch(later=False)
    world.backend.lane(StreamArguments(async_finish=True))
    world.current, world.is_capturing = world.streams[1], True
    sent = world.dispatch()
    sent.receive()
    world.combine(sent.handle, later=False)
    assert world.current.waited_for == [] and cast(Any, world.low_latency._last_stream) is world.streams[0]
    assert [halves for _, halves, _ in world.launches] == [BOTH, SEND, RECEIVE, BOTH]


def test_a_hook_belongs_where_its_call_was(world: World) -> None:
    sent = world.dispatch()
    world.is_capturing = True
    for call in (sent.receive, world.dispatch, lambda: world.dispatch(later=False)):
        with pytest.raises(ArgumentError, match="return_recv_hook"):
            call()
    world.is_capturing = False
    sent.receive()
    world.is_capturing = True
    captured = world.dispatch()
    world.is_capturing = False
    with pytest.raises(ArgumentError, match="in the same capture"):
        captured.receive()
    world.dispatch(later=False)  # and the buffer works on
    assert [halves for _, halves, _ in world.launches] == [SEND, RECEIVE, SEND, BOTH]
