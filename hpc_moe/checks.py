"""Checks of what users pass: a helper for each kind of check, then a function for each call that makes a request.

Nothing here communicates. Messages start with the argument; `Buffer` puts the call's name in front.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from mpi4py import MPI

from . import _C
from ._backends.requests import (
    CombineRequest,
    DispatchRequest,
    Layout,
    LowLatencyCombineForm,
    LowLatencyCombineRequest,
    LowLatencyDispatchForm,
    LowLatencyDispatchRequest,
)
from .config import HIDDEN_MULTIPLE, MAX_HIDDEN, low_latency_region_bytes, minimum_nvl_bytes, minimum_rdma_bytes
from .errors import ArgumentError, UnavailableError
from .events import EventOverlap
from .handles import DispatchHandle, LowLatencyHandle

# --- kinds of checks ---------------------------------------------------------------------------------------------


def integer(name: str, value: Any, *, minimum: int, maximum: int = 2**31 - 1, unit: str = "") -> int:
    """An int (or what acts as one, but no bool) from `minimum` to `maximum`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum:
        raise ArgumentError(f"{name} must be an integer of at least {minimum}{unit}; got {_shown(value)}")
    if number > maximum:
        raise ArgumentError(f"{name} must be at most {maximum}{unit}; got {_shown(value)}")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False; got {value!r}")
    return value


def describe(value: Any) -> str:
    """A tensor's dtype, shape and device, or another value's type."""
    if not isinstance(value, torch.Tensor):
        return f"{value!r}" if value is None or isinstance(value, (int, float, str)) else type(value).__name__
    return f"{_dtype_name(value.dtype)} {list(value.shape)} on {value.device}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(
    name: str,
    value: Any,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device,
    *,
    contiguous: str = "",
) -> torch.Tensor:
    """A tensor of one of these dtypes, of this shape and on this device.

    In `shape` a number is a size that the dimension must have, and a word a name for one that it may choose.
    `contiguous` is `"all"`, `"rows"` (the last dimension only) or empty.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    fits = isinstance(value, torch.Tensor) and value.dtype in allowed and value.device == device
    sizes = value.shape if fits else ()
    fits = fits and len(sizes) == len(shape)
    if fits:
        for want, size in zip(shape, sizes):  # noqa: B905  (of the same length)
            fits = fits and (want == size or isinstance(want, str))
    if not fits:
        wanted = " or ".join(_dtype_name(dtype) for dtype in allowed)
        dims = ", ".join(str(size) for size in shape)
        raise ArgumentError(f"{name} must be {wanted} [{dims}] on {device}; got {describe(value)}")
    if value.numel() > 0 and (
        (contiguous == "all" and not value.is_contiguous()) or (contiguous == "rows" and value.stride(-1) != 1)
    ):
        what = "contiguous" if contiguous == "all" else "contiguous in its last dimension"
        raise ArgumentError(f"{name} must be {what}; got strides {list(value.stride())} for shape {list(value.shape)}")
    checked: torch.Tensor = value
    return checked


def hidden_size(name: str, hidden: int, multiple: int = HIDDEN_MULTIPLE) -> None:
    """A hidden size that the kernels take."""
    if hidden < 1 or hidden % multiple or hidden > MAX_HIDDEN:
        raise ArgumentError(
            f"{name}: the hidden size must be a multiple of {multiple}, up to {MAX_HIDDEN}; got {hidden}"
        )


def expert_count(name: str, num_experts: Any, num_ranks: int) -> int:
    """A positive multiple of the number of ranks."""
    number = integer(name, num_experts, minimum=1)
    if number % num_ranks:
        raise ArgumentError(f"{name} must be a multiple of the number of ranks, {num_ranks}; got {number}")
    return number


def stream_arguments(
    previous_event: Any, async_finish: Any, allocate_on_comm_stream: Any, return_recv_hook: Any = False
) -> None:
    """The arguments about streams, which most calls have."""
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise ArgumentError(f"previous_event must be an EventOverlap or None; got {describe(previous_event)}")
    flag("async_finish", async_finish)
    if flag("allocate_on_comm_stream", allocate_on_comm_stream) and not (previous_event and async_finish):
        raise ArgumentError("allocate_on_comm_stream needs previous_event and async_finish")
    if flag("return_recv_hook", return_recv_hook) and async_finish:
        raise ArgumentError("async_finish and return_recv_hook exclude each other; got both")


# --- construction ------------------------------------------------------------------------------------------------


def communicator(comm: Any) -> None:
    """What can be said of a communicator without using it; the others could not be told anyway."""
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise ArgumentError("Buffer: comm cannot be used: MPI is not initialised, or finalised already")
    if isinstance(comm, MPI.Comm) and comm == MPI.COMM_NULL:
        raise ArgumentError("Buffer: comm is a null communicator (freed, or of a rank that is in none)")
    if not isinstance(comm, MPI.Comm) or comm.Is_inter():
        kind = "an inter-communicator" if isinstance(comm, MPI.Comm) else type(comm).__name__
        raise ArgumentError(f"Buffer: comm must be an mpi4py intra-communicator; got {kind}")


def buffer_arguments(arguments: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """The arguments in the form in which ranks compare them."""
    checked = dict(arguments)
    for name in ("num_nvl_bytes", "num_rdma_bytes"):
        checked[name] = integer(name, arguments[name], minimum=0, maximum=2**62)
    checked["num_qps_per_rank"] = integer("num_qps_per_rank", arguments["num_qps_per_rank"], minimum=1)
    smallest = minimum_nvl_bytes(num_ranks)
    if 0 < checked["num_nvl_bytes"] < smallest:
        raise ArgumentError(
            f"num_nvl_bytes must be 0 or at least {smallest} for {num_ranks} ranks; got {checked['num_nvl_bytes']}"
        )
    for name in ("low_latency_mode", "allow_nvlink_for_low_latency_mode", "allow_mnnvl"):
        flag(name, arguments[name])
    for name in ("enable_shrink", "explicitly_destroy"):
        flag(name, arguments[name])
    if arguments["ranks_per_node"] is not None:
        checked["ranks_per_node"] = integer("ranks_per_node", arguments["ranks_per_node"], minimum=1)
    if not is_timeout(arguments["timeout"]):
        raise ArgumentError(f"timeout must be a positive number of seconds; got {arguments['timeout']!r}")
    checked["timeout"] = float(arguments["timeout"])
    checked["device"] = _device_kind(arguments["device"])
    return checked


def is_timeout(value: Any) -> bool:
    """Whether this is a positive, finite number of seconds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def rdma_bytes(num_nvl_bytes: int, num_rdma_bytes: int, num_nodes: int) -> int:
    """What normal calls between nodes get: what was asked for, or the library's choice."""
    if num_nodes == 1 or num_nvl_bytes == 0:
        return num_rdma_bytes
    smallest = minimum_rdma_bytes(num_nodes)
    if 0 < num_rdma_bytes < smallest:
        raise ArgumentError(
            f"Buffer: num_rdma_bytes must be 0 or at least {smallest} for {num_nodes} nodes; got {num_rdma_bytes}"
        )
    return num_rdma_bytes or max(num_nvl_bytes, smallest)


def _device_kind(device: Any) -> str:
    """`"cpu"`, `"cuda"`, or `""` where the library chooses; ranks must agree on the kind, not on the index."""
    if device is None:
        return ""
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = "none"
    if kind not in ("cpu", "cuda"):
        raise ArgumentError(f"device must be 'cpu', 'cuda', 'cuda:<index>' or None; got {device!r}")
    if kind == "cuda" and not hasattr(_C, "CudaRuntime"):
        raise UnavailableError(
            "device='cuda': this build of hpc_moe has no CUDA runtime; build it where nvcc is, or use device='cpu'"
        )
    return kind


# --- calls -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BufferFacts:
    """What the checks need to know of a buffer.

    Attributes:
        owner: the buffer; handles must be its own.
        num_ranks: R.
        ranks_of_node: the ranks of every node.
        device: where tensors must lie.
        layout: computes a `Layout` from `topk_idx` and `num_experts`; only where tensors lie on the CPU.
        low_latency_mode: whether there may be low-latency calls.
        num_rdma_bytes: for them.
        passed: low-latency calls that have passed the checks.
    """

    owner: object
    num_ranks: int
    ranks_of_node: tuple[tuple[int, ...], ...]
    device: torch.device
    layout: Any  # Callable[[torch.Tensor, int], Layout]
    low_latency_mode: bool = False
    num_rdma_bytes: int = 0
    passed: Passed = field(default_factory=lambda: Passed())


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor; on CUDA as it is, for a copy must be made on the stream that the call runs on."""
    return tensor if tensor.is_cuda else tensor.contiguous()


def topk_indices(facts: BufferFacts, topk_idx: Any, num_tokens: int | str = "num_tokens") -> torch.Tensor:
    """`topk_idx`, contiguous on CPU."""
    checked = tensor("topk_idx", topk_idx, torch.int64, [num_tokens, "top_k"], facts.device)
    if checked.shape[1] < 1:
        raise ArgumentError(f"topk_idx must select at least one expert a token; got shape {list(checked.shape)}")
    return _contiguous(checked)


def weights_like(facts: BufferFacts, topk_weights: Any, topk_idx: torch.Tensor) -> torch.Tensor:
    """`topk_weights` of the shape of `topk_idx`, contiguous on CPU."""
    checked = tensor("topk_weights", topk_weights, torch.float32, list(topk_idx.shape), facts.device)
    return _contiguous(checked.detach())


def tokens_and_scales(facts: BufferFacts, x: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The `x` of a dispatch: bf16, or e4m3 with scales."""
    if isinstance(x, (tuple, list)):
        if len(x) != 2:
            raise ArgumentError(f"x must be a tensor, or a pair (e4m3 tensor, scales); got {len(x)} elements")
        tokens = tensor("x[0]", x[0], torch.float8_e4m3fn, ["num_tokens", "hidden"], facts.device, contiguous="rows")
        num_tokens, hidden = tokens.shape
        hidden_size("x[0]", hidden)
        if isinstance(x[1], torch.Tensor) and x[1].dtype == torch.int32:
            hidden_size("x[0] with int32 (UE8M0) scales", hidden, 512)
            return tokens, tensor("x[1]", x[1], torch.int32, [num_tokens, hidden // 512], facts.device)
        dtypes = (torch.float32, torch.int32)
        return tokens, tensor("x[1]", x[1], dtypes, [num_tokens, hidden // 128], facts.device)
    if isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn:
        raise ArgumentError("x in float8_e4m3fn needs scales: pass the pair (x, scales)")
    tokens = tensor("x", x, torch.bfloat16, ["num_tokens", "hidden"], facts.device, contiguous="rows")
    hidden_size("x", tokens.shape[1])
    return tokens, None


def own_handle(facts: BufferFacts, handle: Any, kind: type) -> Any:
    """A handle of this kind that this buffer made."""
    if not isinstance(handle, kind):
        raise ArgumentError(f"handle must be a {kind.__name__}; got {describe(handle)}")
    if handle._owner is not facts.owner:  # type: ignore[attr-defined]
        raise ArgumentError("handle must come from this buffer; got one of another buffer")
    return handle


def dispatch_request(
    facts: BufferFacts,
    x: Any,
    handle: Any,
    given_layout: dict[str, Any],
    topk_idx: Any,
    topk_weights: Any,
    expert_alignment: Any,
    num_worst_tokens: Any,
    num_experts: Any,
    expert_layout: Any,
) -> DispatchRequest:
    """Check a dispatch."""
    tokens, scales = tokens_and_scales(facts, x)
    alignment = integer("expert_alignment", expert_alignment, minimum=1)
    worst = integer("num_worst_tokens", num_worst_tokens, minimum=0)
    if expert_layout not in ("token", "grouped"):
        raise ArgumentError(f"expert_layout must be 'token' or 'grouped'; got {expert_layout!r}")
    if handle is not None:
        others = {"topk_idx": topk_idx, "topk_weights": topk_weights, **given_layout}
        return _cached_dispatch(facts, tokens, scales, handle, others, alignment, worst, num_experts, expert_layout)
    num_tokens = tokens.shape[0]
    idx = None if topk_idx is None else topk_indices(facts, topk_idx, num_tokens)
    if idx is None and (topk_weights is not None or expert_layout == "grouped"):
        what = "topk_weights" if topk_weights is not None else "expert_layout='grouped'"
        raise ArgumentError(f"{what} needs topk_idx")
    weights = None if topk_weights is None or idx is None else weights_like(facts, topk_weights, idx)
    layout = _layout(facts, idx, given_layout, num_tokens, num_experts)
    if layout is None:
        experts = expert_count("num_experts", num_experts, facts.num_ranks)
    else:
        experts = len(layout.num_tokens_per_expert)
    grouped = expert_layout == "grouped"
    return DispatchRequest(tokens, scales, idx, weights, layout, None, alignment, worst, grouped, experts)


def _cached_dispatch(
    facts: BufferFacts,
    tokens: torch.Tensor,
    scales: torch.Tensor | None,
    handle: Any,
    others: dict[str, Any],
    alignment: int,
    worst: int,
    num_experts: Any,
    expert_layout: str,
) -> DispatchRequest:
    own_handle(facts, handle, DispatchHandle)
    for name, value in others.items():
        if value is not None:
            raise ArgumentError(f"{name} must be None with a handle, whose routing is reused; got {describe(value)}")
    if tokens.shape[0] != handle.num_tokens:
        raise ArgumentError(
            f"x must have the {handle.num_tokens} tokens of the handle's routing; got {tokens.shape[0]}"
        )
    for name, value, allowed in (
        ("expert_alignment", alignment, (1, handle.expert_alignment)),
        ("num_worst_tokens", worst, (0, handle.num_rows)),
        ("num_experts", num_experts, (None, handle.num_experts)),
        ("expert_layout", expert_layout, ("token", handle.expert_layout)),
    ):
        if value not in allowed:
            raise ArgumentError(f"{name} must be the handle's, {allowed[1]!r}, or left out; got {value!r}")
    grouped = handle.expert_layout == "grouped"
    return DispatchRequest(tokens, scales, None, None, None, handle, 1, handle.num_rows, grouped, handle.num_experts)


def _layout(
    facts: BufferFacts, idx: torch.Tensor | None, given: dict[str, Any], num_tokens: int, num_experts: Any
) -> Layout | None:
    """The layout that the caller gave, checked, or else one computed from the indices (None where a GPU does that)."""
    if all(value is None for value in given.values()):
        if idx is None:
            raise ArgumentError("topk_idx and num_experts, or the layout, or a handle must be given; got none of them")
        if num_experts is None:
            raise ArgumentError("num_experts must be given where the layout arguments are omitted")
        if facts.device.type == "cuda":
            return None
        computed: Layout = facts.layout(idx, expert_count("num_experts", num_experts, facts.num_ranks))
        return computed
    num_nodes = len(facts.ranks_of_node)
    optional = {"num_tokens_per_rdma_rank"} if num_nodes == 1 else set()
    for name, value in given.items():
        if value is None and name not in optional:
            raise ArgumentError(
                f"{name} is missing: give all layout arguments that get_dispatch_layout returns, or none"
            )
    ranks, device = facts.num_ranks, facts.device
    per_rank = tensor("num_tokens_per_rank", given["num_tokens_per_rank"], torch.int32, [ranks], device)
    per_node = given["num_tokens_per_rdma_rank"]
    if per_node is not None:
        per_node = tensor("num_tokens_per_rdma_rank", per_node, torch.int32, [num_nodes], device)
    per_expert = tensor("num_tokens_per_expert", given["num_tokens_per_expert"], torch.int32, ["num_experts"], device)
    in_rank = tensor("is_token_in_rank", given["is_token_in_rank"], torch.bool, [num_tokens, ranks], device)
    experts = expert_count("num_tokens_per_expert: num_experts", len(per_expert), ranks)
    if num_experts not in (None, experts):
        raise ArgumentError(f"num_experts must be the length of num_tokens_per_expert, {experts}; got {num_experts!r}")
    if facts.device.type == "cuda":  # values are compared there
        return Layout(per_rank, per_node, per_expert, in_rank)
    # A copy of the flags, because the handle keeps them: the caller may change its own.
    layout = Layout(per_rank.contiguous(), per_node, per_expert.contiguous(), in_rank.clone().contiguous())
    _compare_layout(facts, layout, None if idx is None else facts.layout(idx, experts))
    return layout


def _compare_layout(facts: BufferFacts, given: Layout, computed: Layout | None) -> None:
    """The given layout must fit the indices, and without indices, itself."""
    sums = given.is_token_in_rank.sum(dim=0, dtype=torch.int32)
    in_node = [given.is_token_in_rank[:, list(ranks)].any(dim=1) for ranks in facts.ranks_of_node]
    nodes = torch.stack(in_node).sum(dim=1, dtype=torch.int32)
    if given.num_tokens_per_rdma_rank is not None and not torch.equal(given.num_tokens_per_rdma_rank, nodes):
        raise ArgumentError(
            "num_tokens_per_rdma_rank must count the tokens of is_token_in_rank by node, "
            f"{nodes.tolist()}; got {given.num_tokens_per_rdma_rank.tolist()}"
        )
    if not torch.equal(given.num_tokens_per_rank, sums):
        raise ArgumentError(
            "num_tokens_per_rank must count the tokens of is_token_in_rank, "
            f"{sums.tolist()}; got {given.num_tokens_per_rank.tolist()}"
        )
    if (given.num_tokens_per_expert < 0).any():
        raise ArgumentError("num_tokens_per_expert must not be negative")
    if computed is None:
        return
    for name, value in vars(computed).items():
        other = getattr(given, name)
        if other is not None and value is not None and not torch.equal(value, other):
            raise ArgumentError(f"{name} contradicts topk_idx")


def combine_request(facts: BufferFacts, x: Any, handle: Any, topk_weights: Any, bias: Any) -> CombineRequest:
    """Check a combine."""
    own_handle(facts, handle, DispatchHandle)
    tokens = tensor("x", x, torch.bfloat16, [handle.num_rows, "hidden"], facts.device, contiguous="rows")
    hidden = tokens.shape[1]
    hidden_size("x", hidden)
    weights = None
    if topk_weights is not None:
        if handle.top_k == 0:
            raise ArgumentError("topk_weights must be None: the dispatch had no topk_idx")
        columns = [] if handle.expert_layout == "grouped" else [handle.top_k]
        shape = [handle.num_rows, *columns]
        weights = _contiguous(tensor("topk_weights", topk_weights, torch.float32, shape, facts.device).detach())
    biases = list(bias) if isinstance(bias, (tuple, list)) else [] if bias is None else [bias]
    if len(biases) > 2:
        raise ArgumentError(f"bias must be None, a tensor or up to two; got {len(biases)}")
    checked = [
        _contiguous(tensor("bias", one, torch.bfloat16, [handle.num_tokens, hidden], facts.device))
        for one in biases
        if one is not None
    ]
    return CombineRequest(tokens, handle, weights, checked)


# --- low-latency calls -------------------------------------------------------------------------------------------


class Passed:
    """Forms of low-latency calls that have passed the checks.

    A call like an earlier one is not looked at again: that would take as long as to launch it.
    """

    _MOST = 1000  # that are remembered

    def __init__(self) -> None:
        self._forms: dict[Any, Any] = {}

    def find(
        self, x: Any, topk_idx: Any, topk_weights: Any, optional: tuple[Any, Any], others: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        """What the checks look at, equal for calls that are alike, and their form; each is None where there is none.

        `optional`: more tensors. Written out, for loops take half as much again.
        """
        try:
            key = (
                x.shape,
                x.stride(),
                x.dtype,
                x.device,
                topk_idx.shape,
                topk_idx.stride(),
                topk_idx.dtype,
                topk_idx.device,
                None if topk_weights is None else _shape_of(topk_weights),
                None if optional[0] is None else _shape_of(optional[0]),
                None if optional[1] is None else _shape_of(optional[1]),
                others,
                *map(type, others),  # for True == 1 == 1.0
            )
            return key, self._forms.get(key)
        except (AttributeError, RuntimeError, TypeError):  # no tensor, or a sparse one; or what has no hash
            return None, None

    def add(self, key: Any, form: Any, integers: Sequence[Any] = ()) -> None:
        """Remember the form of calls of this key, unless one of its `integers` only acts as one: that may change."""
        if key is None or not all(isinstance(value, Integral) for value in integers):
            return
        if len(self._forms) >= self._MOST:
            self._forms.clear()
        self._forms[key] = form


def _shape_of(tensor: Any) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def low_latency_mode(facts: BufferFacts) -> None:
    """The buffer has low-latency calls."""
    if not facts.low_latency_mode:
        raise ArgumentError("the buffer must have been constructed with low_latency_mode=True")


def low_latency_size(facts: BufferFacts, num_tokens: int, hidden: int, num_experts: int) -> None:
    """The buffer has room for calls of these sizes."""
    hint = low_latency_region_bytes(num_tokens, hidden, facts.num_ranks, num_experts)
    if facts.num_rdma_bytes < hint:
        raise ArgumentError(
            f"num_rdma_bytes={facts.num_rdma_bytes} of the buffer is too small: M={num_tokens}, hidden={hidden}, "
            f"{num_experts} experts need {hint} (get_low_latency_rdma_size_hint)"
        )


def low_latency_dispatch_request(
    facts: BufferFacts,
    x: Any,
    topk_idx: Any,
    num_max_tokens: Any,
    num_experts: Any,
    recv_stats: Any,
    wait_stats: Any,
    use_fp8: Any,
    round_scale: Any,
    use_ue8m0: Any,
    async_finish: Any,
    return_recv_hook: Any,
    topk_weights: Any,
) -> LowLatencyDispatchRequest:
    """Check a low-latency dispatch."""
    key, form = facts.passed.find(
        x,
        topk_idx,
        topk_weights,
        (recv_stats, wait_stats),
        (num_max_tokens, num_experts, use_fp8, round_scale, use_ue8m0, async_finish, return_recv_hook),
    )
    if form is None:
        stream_arguments(None, async_finish, False, return_recv_hook)
        low_latency_mode(facts)
        tokens = tensor("x", x, torch.bfloat16, ["num_tokens", "hidden"], facts.device, contiguous="rows")
        most = integer("num_max_dispatch_tokens_per_rank", num_max_tokens, minimum=1)
        experts = expert_count("num_experts", num_experts, facts.num_ranks)
        num_tokens, hidden = tokens.shape
        if num_tokens > most:
            raise ArgumentError(f"x must have at most num_max_dispatch_tokens_per_rank={most} tokens; got {num_tokens}")
        for name, value in (("use_fp8", use_fp8), ("round_scale", round_scale), ("use_ue8m0", use_ue8m0)):
            flag(name, value)
        if use_ue8m0 and not (use_fp8 and round_scale):
            raise ArgumentError("use_ue8m0 needs use_fp8 and round_scale")
        hidden_size("x with use_ue8m0" if use_ue8m0 else "x", hidden, 512 if use_ue8m0 else HIDDEN_MULTIPLE)
        topk_indices(facts, topk_idx, num_tokens)
        if topk_weights is not None:
            weights_like(facts, topk_weights, topk_idx)
        if recv_stats is not None:
            shape = [experts // facts.num_ranks]
            tensor("cumulative_local_expert_recv_stats", recv_stats, torch.int32, shape, facts.device, contiguous="all")
        wait_statistics(facts, "dispatch_wait_recv_cost_stats", wait_stats)
        low_latency_size(facts, most, hidden, experts)
        form = LowLatencyDispatchForm(
            num_tokens,
            hidden,
            topk_idx.shape[1],
            most,
            experts,
            topk_weights is not None,
            use_fp8,
            round_scale,
            use_ue8m0,
            return_recv_hook,
        )
        facts.passed.add(key, form, (num_max_tokens, num_experts))
    request = LowLatencyDispatchRequest(form, x, topk_idx, topk_weights, recv_stats, wait_stats)
    if not topk_idx.is_cuda:
        request.topk_idx = topk_idx.contiguous()
        request.topk_weights = None if topk_weights is None else topk_weights.detach().contiguous()
        request.layout = facts.layout(request.topk_idx, form.num_experts)
    return request


def low_latency_combine_request(
    facts: BufferFacts,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    handle: Any,
    use_logfmt: Any,
    zero_copy: Any,
    async_finish: Any,
    return_recv_hook: Any,
    out: Any,
    wait_stats: Any,
) -> LowLatencyCombineRequest:
    """Check a low-latency combine."""
    low_latency_mode(facts)
    own_handle(facts, handle, LowLatencyHandle)
    key, form = facts.passed.find(
        x,
        topk_idx,
        topk_weights,
        (out, wait_stats),
        (handle._form, use_logfmt, zero_copy, async_finish, return_recv_hook),
    )
    if form is None:
        stream_arguments(None, async_finish, False, return_recv_hook)
        shape = handle.shape(facts.num_ranks)
        tensor("x", x, torch.bfloat16, shape, facts.device)
        tensor("topk_idx", topk_idx, torch.int64, [handle.num_tokens, handle.top_k], facts.device)
        weights_like(facts, topk_weights, topk_idx)
        flag("use_logfmt", use_logfmt)
        if flag("zero_copy", zero_copy) and use_logfmt:
            raise ArgumentError("zero_copy and use_logfmt exclude each other; got both")
        if not zero_copy:
            tensor("x", x, torch.bfloat16, shape, facts.device, contiguous="all")
        if out is not None:
            tensor("out", out, torch.bfloat16, [handle.num_tokens, handle.hidden], facts.device, contiguous="all")
        wait_statistics(facts, "combine_wait_recv_cost_stats", wait_stats)
        form = LowLatencyCombineForm(use_logfmt, return_recv_hook)
        facts.passed.add(key, form)
    if not topk_idx.is_cuda:
        topk_idx, topk_weights = topk_idx.contiguous(), topk_weights.detach().contiguous()
    elif out is not None and out.data_ptr() % 16:
        raise ArgumentError("out must begin at a multiple of 16 bytes on CUDA; this view begins between two")
    return LowLatencyCombineRequest(form, x, topk_idx, topk_weights, handle, out, wait_stats)


def wait_statistics(facts: BufferFacts, name: str, stats: Any) -> None:
    """`[R] int64` or None."""
    if stats is not None:
        tensor(name, stats, torch.int64, [facts.num_ranks], facts.device, contiguous="all")
