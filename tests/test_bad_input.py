"""Bad input to every call of `Buffer`: a clear error on every rank, no hang, and the next correct call works.

Run under mpirun on two or more ranks. `CASES` lists, call by call, one way to spoil its arguments each; every case runs
twice: with all ranks wrong, and with the last rank alone wrong, when the others must name it.

On CUDA, calls in which the CPU does not wait return on the ranks that have nothing wrong, and `check()` raises there.
Low-latency calls do not compare values there; what they do with wrong ones is in test_cuda_low_latency.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support import DEVICE, HAS_LOW_LATENCY, ON_CUDA, needs_low_latency, promptly, waits

from hpc_moe import ArgumentError, BootstrapError, Buffer, Error, UnavailableError

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.usefixtures("low_latency_world")]
compares_values = pytest.mark.skipif(ON_CUDA, reason="on CUDA low-latency calls compare no values")

TOKENS, HIDDEN, TOP_K, LOCAL_EXPERTS, MAX_TOKENS = 5, 256, 2, 2, 8
TIMEOUT = 20.0
WINDOW_BYTES = 2**23 if ON_CUDA else 2**21

Arguments = dict[str, Any]


def make_buffer(comm: MPI.Intracomm, **changes: Any) -> Buffer:
    arguments: Arguments = {"num_nvl_bytes": WINDOW_BYTES, "device": str(DEVICE), "timeout": TIMEOUT}
    if HAS_LOW_LATENCY:
        rdma = Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, comm.size, 2 * LOCAL_EXPERTS * comm.size)
        rdma = max(rdma, 2**21)  # enough for every number of nodes
        arguments |= {"num_rdma_bytes": rdma, "low_latency_mode": True}
    return Buffer(comm, **{**arguments, **changes})


@pytest.fixture(scope="module", params=[None, 1], ids=["one node", "a node a rank"])
def nodes(request: pytest.FixtureRequest) -> int | None:
    """`ranks_per_node` of the shared buffer."""
    if ON_CUDA and request.param is not None:
        pytest.skip("not on CUDA yet: normal calls between nodes")
    value: int | None = request.param
    return value


@pytest.fixture(scope="module")
def buffers(nodes: int | None) -> Iterator[list[Buffer]]:
    """Holds the buffer that the tests share, so that it is destroyed in the end."""
    made: list[Buffer] = []
    yield made
    for buffer in made:
        buffer.destroy()


@pytest.fixture
def buffer(comm: MPI.Intracomm, nodes: int | None, buffers: list[Buffer]) -> Buffer:
    """One for all tests of this file: it has to survive every kind of bad input. Only a failed test gets a new one."""
    usable = bool(buffers)
    try:
        for one in buffers:
            one.check()
    except UnavailableError:
        usable = False
    if not all(comm.allgather(usable)):
        for one in buffers:
            one.destroy()
        buffers[:] = [make_buffer(comm, ranks_per_node=nodes)]
    return buffers[0]


# --- correct calls, with results that simple arithmetic gives ---------------------------------------------------------


def routing(rank: int, size: int, tokens: int = TOKENS) -> torch.Tensor:
    """`[tokens, TOP_K] int64`: each token goes to its own rank and to the next one."""
    token = torch.arange(tokens)
    experts = [((rank + k) % size) * LOCAL_EXPERTS + token % LOCAL_EXPERTS for k in range(TOP_K)]
    return torch.stack(experts, dim=1).contiguous().to(DEVICE)


def rows(rank: int, tokens: int = TOKENS) -> torch.Tensor:
    """`[tokens, HIDDEN] bf16`, whole numbers: 16 * rank + token."""
    return (16 * rank + torch.arange(tokens, device=DEVICE)).to(torch.bfloat16)[:, None].repeat(1, HIDDEN)


def ones(*shape: int) -> torch.Tensor:
    """`shape` float32."""
    return torch.ones(*shape, device=DEVICE)


def check_works(buffer: Buffer, tokens_of: Callable[[int], int] = lambda rank: TOKENS) -> None:
    """A dispatch, a combine, and their low-latency kin, compared with what must come out."""
    rank, size = buffer.rank, buffer.group_size
    tokens = tokens_of(rank)
    x, topk_idx = rows(rank, tokens), routing(rank, size, tokens)
    topk_weights = ones(tokens, TOP_K)
    sources = sorted({rank, (rank - 1) % size})
    expected = torch.cat([rows(source, tokens_of(source)) for source in sources])

    recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=topk_weights, num_experts=LOCAL_EXPERTS * size
    )
    assert torch.equal(recv_x, expected)
    assert recv_idx.shape == (len(expected), TOP_K) and int((recv_idx >= 0).sum()) == len(expected)
    combined, weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    assert torch.equal(combined, 2 * x)
    assert weights is not None and torch.equal(weights, topk_weights)
    if not HAS_LOW_LATENCY:
        return

    low_x, count, low_handle, _, _ = buffer.low_latency_dispatch(
        x, topk_idx, MAX_TOKENS, LOCAL_EXPERTS * size, use_fp8=False
    )
    assert int(count.sum()) == len(expected)
    combined, _, _ = buffer.low_latency_combine(low_x, topk_idx, topk_weights, low_handle)
    assert torch.equal(combined, 2 * x)


def valid_get_dispatch_layout(buffer: Buffer) -> Arguments:
    return {"topk_idx": routing(buffer.rank, buffer.group_size), "num_experts": LOCAL_EXPERTS * buffer.group_size}


def valid_dispatch(buffer: Buffer) -> Arguments:
    return {
        "x": rows(buffer.rank),
        "topk_idx": routing(buffer.rank, buffer.group_size),
        "topk_weights": ones(TOKENS, TOP_K),
        "num_experts": LOCAL_EXPERTS * buffer.group_size,
    }


def valid_dispatch_fp8(buffer: Buffer) -> Arguments:
    x = rows(buffer.rank).to(torch.float8_e4m3fn), ones(TOKENS, HIDDEN // 128)
    return {**valid_dispatch(buffer), "x": x}


def valid_dispatch_layout(buffer: Buffer) -> Arguments:
    """With the four layout tensors in place of `num_experts`."""
    arguments = valid_dispatch(buffer)
    del arguments["num_experts"]
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(**valid_get_dispatch_layout(buffer))
    return {
        **arguments,
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_node,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }


def valid_dispatch_handle(buffer: Buffer) -> Arguments:
    return {"x": rows(buffer.rank), "handle": buffer.dispatch(**valid_dispatch(buffer))[4]}


def valid_combine(buffer: Buffer) -> Arguments:
    recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(**valid_dispatch(buffer))
    return {"x": recv_x, "handle": handle, "topk_weights": recv_weights, "bias": rows(buffer.rank)}


def valid_low_latency_dispatch(buffer: Buffer) -> Arguments:
    return {
        "x": rows(buffer.rank),
        "topk_idx": routing(buffer.rank, buffer.group_size),
        "num_max_dispatch_tokens_per_rank": MAX_TOKENS,
        "num_experts": LOCAL_EXPERTS * buffer.group_size,
        "cumulative_local_expert_recv_stats": torch.zeros(LOCAL_EXPERTS, dtype=torch.int32, device=DEVICE),
        "dispatch_wait_recv_cost_stats": torch.zeros(buffer.group_size, dtype=torch.int64, device=DEVICE),
        "use_fp8": False,
        "topk_weights": ones(TOKENS, TOP_K),
    }


def valid_low_latency_combine(buffer: Buffer) -> Arguments:
    sent = valid_low_latency_dispatch(buffer)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(**sent)
    return {
        "x": recv_x,
        "topk_idx": sent["topk_idx"],
        "topk_weights": sent["topk_weights"],
        "handle": handle,
        "out": torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device=DEVICE),
        "combine_wait_recv_cost_stats": torch.zeros(buffer.group_size, dtype=torch.int64, device=DEVICE),
    }


def valid_clean_low_latency_buffer(buffer: Buffer) -> Arguments:
    return {
        "num_max_dispatch_tokens_per_rank": MAX_TOKENS,
        "hidden": HIDDEN,
        "num_experts": LOCAL_EXPERTS * buffer.group_size,
    }


# --- ways to spoil them ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One argument, spoilt in one way.

    Attributes:
        call: the method.
        argument: what the message must name.
        name: what is wrong.
        spoil: replaces arguments in the dictionary.
        variant: which of the call's correct argument sets to start from, e.g. `"fp8"`.
        marks: when to skip it, besides where there are no such calls.
    """

    call: str
    argument: str
    name: str
    spoil: Callable[[Arguments], object]
    variant: str = ""
    marks: tuple[pytest.MarkDecorator, ...] = ()

    def __str__(self) -> str:
        return "-".join(filter(None, [self.call, self.variant, self.argument, self.name.replace(" ", "_")]))


def tensor_cases(
    call: str, argument: str, variant: str = "", *, item: int | None = None, blamed: str = ""
) -> list[Case]:
    """Wrong type, dtype, number of dimensions, shape and device of one tensor (`item`: of a tuple).

    With another number of tokens in `x`, it is the next argument, `blamed`, that no longer fits.
    """

    def changed(change: Callable[[torch.Tensor], object]) -> Callable[[Arguments], None]:
        def spoil(arguments: Arguments) -> None:
            if item is None:
                arguments[argument] = change(arguments[argument])
            else:
                pair = list(arguments[argument])
                pair[item] = change(pair[item])
                arguments[argument] = tuple(pair)

        return spoil

    def other_dtype(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.float64 if tensor.is_floating_point() else torch.int16)

    changes: dict[str, Callable[[torch.Tensor], object]] = {
        "type": lambda tensor: tensor.tolist(),
        "dtype": other_dtype,
        "dimensions": lambda tensor: tensor.unsqueeze(0),
        "shape": lambda tensor: torch.cat([tensor, tensor[:1]]),
        "device": lambda tensor: tensor.to("meta"),
    }
    if ON_CUDA:
        changes["on the CPU"] = torch.Tensor.cpu
    part = "" if item is None else f" {'values' if item == 0 else 'scales'}"
    return [
        Case(call, blamed if blamed and name == "shape" else argument, name + part, changed(change), variant)
        for name, change in changes.items()
    ]


def value_case(call: str, argument: str, value: object, name: str = "", variant: str = "") -> Case:
    return Case(call, argument, name or repr(value), lambda arguments: arguments.update({argument: value}), variant)


def topk_cases(call: str, *marks: pytest.MarkDecorator) -> list[Case]:
    """Expert indices that no routing may hold."""

    def spoil(index: int, column: int = 0) -> Callable[[Arguments], None]:
        def put(arguments: Arguments) -> None:
            arguments["topk_idx"] = arguments["topk_idx"].clone()
            arguments["topk_idx"][2, column] = index

        return put

    def repeat(arguments: Arguments) -> None:
        arguments["topk_idx"] = arguments["topk_idx"].clone()
        arguments["topk_idx"][2, 1] = arguments["topk_idx"][2, 0]

    return [
        Case(call, "topk_idx", "too large", spoil(10**6), marks=marks),
        Case(call, "topk_idx", "far too large", spoil(2**62, 1), marks=marks),
        Case(call, "topk_idx", "negative", spoil(-2), marks=marks),
        Case(call, "topk_idx", "twice the same", repeat, marks=marks),
    ]


def more_experts(arguments: Arguments) -> None:
    arguments["num_experts"] += 1


def wider(arguments: Arguments) -> None:
    arguments["x"] = torch.zeros(TOKENS, 200, dtype=torch.bfloat16, device=DEVICE)


def too_wide(arguments: Arguments) -> None:
    arguments["x"] = torch.zeros(TOKENS, 16384 + 128, dtype=torch.bfloat16, device=DEVICE)


def more_in_layout(name: str) -> Callable[[Arguments], None]:
    def spoil(arguments: Arguments) -> None:
        arguments[name] = arguments[name].clone()
        arguments[name].flatten()[0] += 1

    return spoil


def other_in_rank(arguments: Arguments) -> None:
    arguments["is_token_in_rank"] = torch.zeros_like(arguments["is_token_in_rank"])


def too_many_tokens(arguments: Arguments) -> None:
    arguments["x"] = arguments["x"].repeat(2, 1)[: MAX_TOKENS + 1]
    for name in ("topk_idx", "topk_weights"):
        arguments[name] = arguments[name].repeat(2, 1)[: MAX_TOKENS + 1]


def other_weights(arguments: Arguments) -> None:
    arguments["topk_weights"] = 3 * arguments["topk_weights"]


def other_topk_idx(arguments: Arguments) -> None:
    arguments["topk_idx"] = arguments["topk_idx"].flip(0).contiguous().flip(1).contiguous()


def transposed(argument: str) -> Callable[[Arguments], None]:
    """The same values with other strides."""

    def spoil(arguments: Arguments) -> None:
        arguments[argument] = arguments[argument].t().contiguous().t()

    return spoil


HUGE = {"num_max_dispatch_tokens_per_rank": 10**9}
COUNTS = [0, -1, 2.0, "4", True]

CASES: list[Case] = [
    *tensor_cases("dispatch", "x", blamed="topk_idx"),
    *tensor_cases("dispatch", "topk_idx"),
    *tensor_cases("dispatch", "topk_weights"),
    *tensor_cases("dispatch", "x", "fp8", item=1),
    *tensor_cases("dispatch", "num_tokens_per_rank", "layout"),
    *tensor_cases("dispatch", "num_tokens_per_expert", "layout"),
    *tensor_cases("dispatch", "is_token_in_rank", "layout"),
    *topk_cases("dispatch"),
    *(value_case("dispatch", "num_experts", value) for value in COUNTS),
    Case("dispatch", "num_experts", "not a multiple of R", more_experts),
    Case("dispatch", "x", "hidden not a multiple of 128", wider),
    Case("dispatch", "x", "hidden too large", too_wide),
    Case("dispatch", "num_experts", "missing", lambda a: a.pop("num_experts")),
    Case("dispatch", "topk_idx", "missing", lambda a: a.pop("topk_idx")),
    *(
        value_case("dispatch", name, None, "missing", "layout")
        for name in ("num_tokens_per_rank", "num_tokens_per_expert", "is_token_in_rank")
    ),
    Case("dispatch", "num_tokens_per_rank", "contradicts", more_in_layout("num_tokens_per_rank"), "layout"),
    Case("dispatch", "num_tokens_per_expert", "contradicts", more_in_layout("num_tokens_per_expert"), "layout"),
    Case("dispatch", "is_token_in_rank", "contradicts", other_in_rank, "layout"),
    *(value_case("dispatch", "expert_alignment", value) for value in (0, -8, 1.5)),
    *(value_case("dispatch", "num_worst_tokens", value) for value in (-1, 1.5)),
    value_case("dispatch", "num_worst_tokens", 1, "too few"),
    value_case("dispatch", "expert_layout", "sorted"),
    value_case("dispatch", "config", "fast"),
    value_case("dispatch", "handle", "nonsense", variant="handle"),
    Case("dispatch", "topk_idx", "with a handle", lambda a: a.update(topk_idx=routing(0, 2)), "handle"),
    Case("dispatch", "x", "rows of another routing", lambda a: a.update(x=a["x"][:-1]), "handle"),
    *tensor_cases("combine", "x"),
    *tensor_cases("combine", "topk_weights"),
    *tensor_cases("combine", "bias"),
    value_case("combine", "handle", None),
    value_case("combine", "handle", "nonsense"),
    Case("combine", "bias", "three", lambda a: a.update(bias=(a["bias"],) * 3)),
    Case("combine", "x", "hidden not a multiple of 128", lambda a: a.update(x=a["x"][:, :200].contiguous())),
    *tensor_cases("low_latency_dispatch", "x", blamed="topk_idx"),
    *tensor_cases("low_latency_dispatch", "topk_idx"),
    *tensor_cases("low_latency_dispatch", "topk_weights"),
    *tensor_cases("low_latency_dispatch", "cumulative_local_expert_recv_stats"),
    *tensor_cases("low_latency_dispatch", "dispatch_wait_recv_cost_stats"),
    *topk_cases("low_latency_dispatch", compares_values),
    *(value_case("low_latency_dispatch", "num_experts", value) for value in COUNTS),
    *(value_case("low_latency_dispatch", "num_max_dispatch_tokens_per_rank", value) for value in COUNTS),
    # Equal to what has passed, and of another type.
    value_case("low_latency_dispatch", "num_max_dispatch_tokens_per_rank", float(MAX_TOKENS), "of another type"),
    *(value_case("low_latency_dispatch", name, 0) for name in ("use_fp8", "round_scale", "use_ue8m0", "async_finish")),
    *(value_case("low_latency_combine", name, 0) for name in ("use_logfmt", "zero_copy", "return_recv_hook")),
    Case("low_latency_dispatch", "num_experts", "not a multiple of R", more_experts),
    Case("low_latency_dispatch", "num_max_dispatch_tokens_per_rank", "more tokens than M", too_many_tokens),
    Case("low_latency_dispatch", "num_rdma_bytes", "too few for M", lambda a: a.update(HUGE)),
    Case("low_latency_dispatch", "x", "hidden not a multiple of 128", wider),
    Case("low_latency_dispatch", "round_scale", "ue8m0 without", lambda a: a.update(use_fp8=True, use_ue8m0=True)),
    Case(
        *("low_latency_dispatch", "x", "hidden of ue8m0 not a multiple of 512"),
        lambda a: a.update(use_fp8=True, round_scale=True, use_ue8m0=True),
    ),
    Case(
        *("low_latency_dispatch", "return_recv_hook", "with async_finish"),
        lambda a: a.update(async_finish=True, return_recv_hook=True),
    ),
    *tensor_cases("low_latency_combine", "x"),
    *tensor_cases("low_latency_combine", "topk_idx"),
    *tensor_cases("low_latency_combine", "topk_weights"),
    *tensor_cases("low_latency_combine", "out"),
    *tensor_cases("low_latency_combine", "combine_wait_recv_cost_stats"),
    value_case("low_latency_combine", "handle", None),
    value_case("low_latency_combine", "handle", (1, 2)),
    Case("low_latency_combine", "topk_weights", "not those of the dispatch", other_weights, marks=(compares_values,)),
    Case("low_latency_combine", "topk_idx", "not those of the dispatch", other_topk_idx, marks=(compares_values,)),
    Case("low_latency_combine", "use_logfmt", "with zero_copy", lambda a: a.update(use_logfmt=True, zero_copy=True)),
    Case("low_latency_combine", "out", "stride", transposed("out")),
    Case(
        *("low_latency_combine", "return_recv_hook", "with async_finish"),
        lambda a: a.update(async_finish=True, return_recv_hook=True),
    ),
    *(value_case("clean_low_latency_buffer", "num_max_dispatch_tokens_per_rank", value) for value in (0, -1)),
    Case("clean_low_latency_buffer", "num_rdma_bytes", "too few for M", lambda a: a.update(HUGE)),
    *(value_case("clean_low_latency_buffer", "hidden", value) for value in (0, -128, 200)),
    *(value_case("clean_low_latency_buffer", "num_experts", value) for value in (0, -1)),
]


def arguments_of(case: Case, buffer: Buffer) -> Arguments:
    made: Arguments = globals()["_".join(filter(None, ["valid", case.call, case.variant]))](buffer)
    return made


def mentions(message: str, name: str) -> bool:
    """Whether the message has this word: `x`, but not the one in `topk_idx`."""
    return re.search(rf"\b{name}\b", message) is not None


def parameters(cases: list[Case]) -> list[Any]:
    """For pytest; skips what is not on CUDA yet."""

    def marks(case: Case) -> list[pytest.MarkDecorator]:
        return [*case.marks, *([needs_low_latency] if "low_latency" in case.call else [])]

    return [pytest.param(case, marks=marks(case), id=str(case)) for case in cases]


@pytest.mark.parametrize("alone", [False, True], ids=["all ranks", "one rank"])
@pytest.mark.parametrize("case", parameters(CASES))
def test_a_spoilt_argument_is_named_and_the_next_call_works(
    buffer: Buffer, comm: MPI.Intracomm, case: Case, alone: bool
) -> None:
    arguments = arguments_of(case, buffer)
    if case.call.startswith("low_latency"):  # a call that is like one that has passed is looked at less
        getattr(buffer, case.call)(**arguments)
    culprit = comm.size - 1
    if not alone or comm.rank == culprit:
        case.spoil(arguments)
    pending_in = None if waits(case.call, arguments) else buffer
    message = promptly(lambda: getattr(buffer, case.call)(**arguments), ArgumentError, pending_in)
    assert case.call in message
    if not alone or comm.rank == culprit:
        assert mentions(message, case.argument)
    else:
        assert f"rank {culprit}" in message
    check_works(buffer)


# The layout of this rank's own tokens needs no other rank, so only the rank with bad input raises.
LAYOUT_CASES = [
    *tensor_cases("get_dispatch_layout", "topk_idx")[:3],  # of any number of tokens
    tensor_cases("get_dispatch_layout", "topk_idx")[4],
    *topk_cases("get_dispatch_layout"),
    *(value_case("get_dispatch_layout", "num_experts", value) for value in COUNTS),
    Case("get_dispatch_layout", "num_experts", "not a multiple of R", more_experts),
]


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_a_bad_layout_argument_is_named(buffer: Buffer, case: Case) -> None:
    arguments = arguments_of(case, buffer)
    case.spoil(arguments)
    message = promptly(lambda: buffer.get_dispatch_layout(**arguments), ArgumentError, pending_in=buffer)
    assert (ON_CUDA or case.call in message) and mentions(message, case.argument)
    check_works(buffer)


# --- strides: rejected by name, or taken as what they mean ------------------------------------------------------------

LOW_LATENCY_INPUTS = ("x", "topk_idx", "topk_weights")
STRIDED: list[Any] = [
    *(("dispatch", "", name) for name in ("x", "topk_idx", "topk_weights")),
    ("dispatch", "layout", "is_token_in_rank"),
    *(("combine", "", name) for name in ("x", "topk_weights", "bias")),
    *(pytest.param("low_latency_dispatch", "", name, marks=needs_low_latency) for name in LOW_LATENCY_INPUTS),
    *(pytest.param("low_latency_combine", "", name, marks=needs_low_latency) for name in LOW_LATENCY_INPUTS[1:]),
]


def used_rows(results: tuple[Any, ...]) -> torch.Tensor:
    """A copy of the rows that a call returned, without those that a low-latency dispatch leaves unwritten."""
    rows: torch.Tensor = results[0]
    count: torch.Tensor = results[1]
    if rows.dim() == 2:
        return rows.clone()
    return torch.cat([expert[:used] for expert, used in zip(rows, count.tolist(), strict=True)])


@pytest.mark.parametrize(("call", "variant", "argument"), STRIDED)
def test_other_strides_are_rejected_by_name_or_give_the_same(
    buffer: Buffer, call: str, variant: str, argument: str
) -> None:
    case = Case(call, argument, "stride", transposed(argument), variant)
    arguments = arguments_of(case, buffer)
    right = used_rows(getattr(buffer, call)(**arguments))
    arguments = arguments_of(case, buffer)
    case.spoil(arguments)
    assert not arguments[argument].is_contiguous()
    try:
        got = used_rows(getattr(buffer, call)(**arguments))
    except ArgumentError as error:
        assert call in str(error) and argument in str(error)
    else:
        assert torch.equal(got, right)
    check_works(buffer)


def test_scales_may_have_any_strides(buffer: Buffer) -> None:
    arguments = valid_dispatch_fp8(buffer)
    values, scales = arguments["x"]
    scales += torch.arange(TOKENS, device=DEVICE)[:, None]
    right = buffer.dispatch(**arguments)[0]
    got = buffer.dispatch(**{**arguments, "x": (values, scales.t().contiguous().t())})[0]
    assert torch.equal(got[0].view(torch.uint8), right[0].view(torch.uint8)) and torch.equal(got[1], right[1])


# --- ranks that disagree ---------------------------------------------------------------------------------------------


def one_column_less(arguments: Arguments) -> None:
    for name in ("topk_idx", "topk_weights"):
        arguments[name] = arguments[name][:, :1].contiguous()


def narrower(arguments: Arguments) -> None:
    arguments["x"] = arguments["x"][:, :128].contiguous()


def to_fp8(arguments: Arguments) -> None:
    arguments["x"] = arguments["x"].to(torch.float8_e4m3fn), ones(TOKENS, HIDDEN // 128)


def more_experts_everywhere(arguments: Arguments) -> None:
    arguments["num_experts"] *= 2
    arguments.pop("cumulative_local_expert_recv_stats", None)  # of as many experts


def without_topk(arguments: Arguments) -> None:
    del arguments["topk_idx"], arguments["topk_weights"]


MORE = {"num_max_dispatch_tokens_per_rank": MAX_TOKENS - 1}

DISAGREEMENTS = [
    Case("dispatch", "num_experts", "", more_experts_everywhere),
    Case("dispatch", "hidden", "", narrower),
    Case("dispatch", "top_k", "", one_column_less),
    Case("dispatch", "x", "kind", to_fp8),
    Case("dispatch", "expert_layout", "", lambda a: a.update(expert_layout="grouped")),
    Case("dispatch", "", "topk or not", without_topk, "layout"),
    Case("low_latency_dispatch", "num_experts", "", more_experts_everywhere),
    Case("low_latency_dispatch", "hidden", "", narrower),
    Case("low_latency_dispatch", "top_k", "", one_column_less),
    Case("low_latency_dispatch", "num_max_dispatch_tokens_per_rank", "", lambda a: a.update(MORE)),
    Case("low_latency_dispatch", "use_fp8", "", lambda a: a.update(use_fp8=True)),
    Case("low_latency_dispatch", "topk_weights", "", lambda a: a.pop("topk_weights")),
    Case("low_latency_combine", "use_logfmt", "", lambda a: a.update(use_logfmt=True)),
]


@pytest.mark.parametrize("case", parameters(DISAGREEMENTS))
def test_what_must_be_equal_on_all_ranks_is_compared(buffer: Buffer, comm: MPI.Intracomm, case: Case) -> None:
    arguments = arguments_of(case, buffer)
    if comm.rank == comm.size - 1:
        case.spoil(arguments)
    pending_in = None if waits(case.call, arguments) else buffer
    message = promptly(lambda: getattr(buffer, case.call)(**arguments), ArgumentError, pending_in)
    assert case.call in message and mentions(message, case.argument)
    assert comm.allgather(message) == [message] * comm.size
    check_works(buffer)


@pytest.mark.skipif(ON_CUDA, reason="on CUDA normal and low-latency calls wait for each other until the timeout")
def test_different_calls_at_the_same_time_are_an_error(buffer: Buffer, comm: MPI.Intracomm) -> None:
    normal, low_latency = valid_dispatch(buffer), valid_low_latency_dispatch(buffer)
    call = (
        (lambda: buffer.low_latency_dispatch(**low_latency)) if comm.rank == 0 else (lambda: buffer.dispatch(**normal))
    )
    promptly(call, ArgumentError)
    check_works(buffer)


# --- calls that are like one that has passed --------------------------------------------------------------------------


@needs_low_latency
def test_a_handle_of_another_routing_is_looked_at(buffer: Buffer) -> None:
    arguments = valid_low_latency_combine(buffer)
    buffer.low_latency_combine(**arguments)
    sent = valid_low_latency_dispatch(buffer)
    sent |= {name: sent[name][:, :1].contiguous() for name in ("topk_idx", "topk_weights")}
    arguments["handle"] = buffer.low_latency_dispatch(**sent)[2]
    message = promptly(lambda: buffer.low_latency_combine(**arguments), ArgumentError, pending_in=buffer)
    assert f"topk_idx must be int64 [{TOKENS}, 1]" in message
    check_works(buffer)


@needs_low_latency
@pytest.mark.parametrize(("name", "wrong"), [("num_max_dispatch_tokens_per_rank", TOKENS - 1), ("num_experts", 1)])
def test_a_number_that_changes_in_place_is_looked_at(buffer: Buffer, name: str, wrong: int) -> None:
    arguments = valid_low_latency_dispatch(buffer)
    number = torch.tensor(arguments[name])
    buffer.low_latency_dispatch(**{**arguments, name: number})
    number.fill_(wrong)
    call = partial(buffer.low_latency_dispatch, **{**arguments, name: number})
    assert mentions(promptly(call, ArgumentError, pending_in=buffer), name)
    check_works(buffer)


# --- hooks -----------------------------------------------------------------------------------------------------------


@needs_low_latency
def test_a_bad_call_between_a_send_and_its_hook(buffer: Buffer, comm: MPI.Intracomm) -> None:
    """The send that came before it arrives all the same."""
    sent = valid_low_latency_dispatch(buffer)
    recv_x, count, handle, _, hook = buffer.low_latency_dispatch(**sent, return_recv_hook=True)
    bad = valid_dispatch(buffer)
    if comm.rank == 0:
        bad["topk_idx"] = bad["topk_idx"].clone().fill_(-7)
    promptly(lambda: buffer.dispatch(**bad), ArgumentError)
    assert hook is not None
    hook()
    assert int(count.sum()) == TOP_K * TOKENS
    combined, _, _ = buffer.low_latency_combine(recv_x, sent["topk_idx"], sent["topk_weights"], handle)
    assert torch.equal(combined, 2 * rows(buffer.rank))
    check_works(buffer)


@needs_low_latency
def test_a_rank_rejects_while_the_others_have_only_sent(buffer: Buffer, comm: MPI.Intracomm) -> None:
    """They learn of it from their hooks."""
    arguments = {**valid_low_latency_dispatch(buffer), "return_recv_hook": True}
    if comm.rank == comm.size - 1:
        arguments["num_max_dispatch_tokens_per_rank"] = TOKENS - 1
        promptly(lambda: buffer.low_latency_dispatch(**arguments), ArgumentError)
    else:
        hook = buffer.low_latency_dispatch(**arguments)[4]
        assert hook is not None
        assert f"rank {comm.size - 1}" in promptly(hook, ArgumentError, pending_in=buffer)
    check_works(buffer)


@needs_low_latency
def test_a_third_send_before_the_first_hook_is_rejected(buffer: Buffer) -> None:
    arguments = {**valid_low_latency_dispatch(buffer), "return_recv_hook": True}
    hooks = [buffer.low_latency_dispatch(**arguments)[4] for _ in range(2)]
    message = promptly(lambda: buffer.low_latency_dispatch(**arguments), ArgumentError)
    assert "low_latency_dispatch" in message and "hook" in message
    for hook in hooks:
        assert hook is not None
        hook()
    check_works(buffer)


# --- handles and buffers that do not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["combine", pytest.param("low_latency_combine", marks=needs_low_latency), "dispatch"])
def test_a_handle_of_another_buffer_is_rejected(buffer: Buffer, comm: MPI.Intracomm, call: str) -> None:
    valid = {
        "combine": valid_combine,
        "dispatch": valid_dispatch_handle,
        "low_latency_combine": valid_low_latency_combine,
    }
    with make_buffer(comm) as other:
        arguments = valid[call](other)
        message = promptly(lambda: getattr(buffer, call)(**arguments), ArgumentError)
        assert call in message and "handle" in message
        check_works(other)
    check_works(buffer)


@pytest.mark.parametrize("alone", [False, True])
def test_a_handle_of_another_routing_is_rejected(buffer: Buffer, comm: MPI.Intracomm, alone: bool) -> None:
    """Ranks that combine with handles of different dispatches; or rows of one dispatch with the handle of another."""
    first, second = valid_combine(buffer), valid_combine(buffer)
    if alone:
        arguments = first if comm.rank == 0 else second
        assert "handle" in promptly(lambda: buffer.combine(**arguments), ArgumentError, pending_in=buffer)
    else:
        x = torch.cat([first["x"], first["x"]])
        assert "x" in promptly(lambda: buffer.combine(x, first["handle"]), ArgumentError)
    check_works(buffer)


@needs_low_latency
def test_the_wrong_kind_of_handle_is_rejected(buffer: Buffer) -> None:
    normal, low_latency = valid_combine(buffer), valid_low_latency_combine(buffer)
    swapped = {**normal, "handle": low_latency["handle"]}
    assert "handle" in promptly(lambda: buffer.combine(**swapped), ArgumentError)
    swapped = {**low_latency, "handle": normal["handle"]}
    assert "handle" in promptly(lambda: buffer.low_latency_combine(**swapped), ArgumentError)
    promptly(lambda: buffer.get_next_low_latency_combine_buffer(normal["handle"]), ArgumentError)
    check_works(buffer)


CALLS = ["get_dispatch_layout", "dispatch", "combine"]
LOW_LATENCY_CALLS = ["low_latency_dispatch", "low_latency_combine", "clean_low_latency_buffer"]


def test_a_destroyed_buffer_is_unavailable(comm: MPI.Intracomm) -> None:
    buffer = make_buffer(comm)
    arguments = {
        call: globals()["valid_" + call](buffer) for call in [*CALLS, *(LOW_LATENCY_CALLS if HAS_LOW_LATENCY else [])]
    }
    buffer.destroy()
    for call, values in arguments.items():
        message = promptly(partial(getattr(buffer, call), **values), UnavailableError)
        assert "destroy" in message
    promptly(lambda: buffer.get_local_buffer_tensor(torch.uint8), UnavailableError)
    buffer.destroy()  # idempotent
    with make_buffer(comm) as again:
        check_works(again)


@needs_low_latency
def test_low_latency_calls_need_that_mode(buffer: Buffer, comm: MPI.Intracomm) -> None:
    low_latency = {call: globals()["valid_" + call](buffer) for call in LOW_LATENCY_CALLS}
    with make_buffer(comm, low_latency_mode=False, num_rdma_bytes=0) as normal:
        for call, values in low_latency.items():
            assert "low_latency_mode" in promptly(partial(getattr(normal, call), **values), Error)
        arguments = valid_combine(normal)
        normal.combine(**arguments)


def test_normal_calls_need_a_window(comm: MPI.Intracomm) -> None:
    with make_buffer(comm, num_nvl_bytes=0) as buffer:
        with pytest.raises((ArgumentError, UnavailableError), match="num_nvl_bytes"):
            buffer.dispatch(**valid_dispatch(buffer))
        if not HAS_LOW_LATENCY:
            return
        arguments = valid_low_latency_combine(buffer)
        buffer.low_latency_combine(**arguments)


@needs_low_latency
def test_masks_need_enable_shrink(buffer: Buffer, comm: MPI.Intracomm) -> None:
    status = torch.zeros(comm.size, dtype=torch.int32, device=DEVICE)
    for call, values in (
        ("low_latency_update_mask_buffer", (0, True)),
        ("low_latency_query_mask_buffer", (status,)),
        ("low_latency_clean_mask_buffer", ()),
    ):
        with pytest.raises((ArgumentError, UnavailableError), match="enable_shrink"):
            getattr(buffer, call)(*values)
    check_works(buffer)


def test_bad_masks_are_rejected(comm: MPI.Intracomm) -> None:
    with make_buffer(comm, enable_shrink=True) as buffer:
        ranks: tuple[Any, ...] = (-1, comm.size, "0", comm.rank)  # a rank cannot mask itself
        for rank in ranks:
            message = promptly(partial(buffer.low_latency_update_mask_buffer, rank, True), ArgumentError)
            assert "rank_to_mask" in message
        masks: list[Any] = [[0] * comm.size, torch.zeros(comm.size), torch.zeros(comm.size + 1, dtype=torch.int32)]
        for status in masks:
            message = promptly(partial(buffer.low_latency_query_mask_buffer, status), ArgumentError)
            assert "mask_status" in message
        check_works(buffer)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("dtype", {"dtype": "bf16"}),
        ("size", {"dtype": torch.uint8, "size": (2**62,)}),
        ("size", {"dtype": torch.uint8, "size": (2, -1)}),
        ("size", {"dtype": torch.uint8, "size": 8}),
        ("size", {"dtype": torch.uint8, "size": ("8",)}),
        ("offset", {"dtype": torch.uint8, "offset": -1}),
        ("offset", {"dtype": torch.uint8, "offset": 2**62}),
        ("offset", {"dtype": torch.int64, "offset": 3}),
    ],
)
def test_bad_views_of_the_buffer_are_rejected(buffer: Buffer, argument: str, values: Arguments) -> None:
    message = promptly(lambda: buffer.get_local_buffer_tensor(**values), ArgumentError)
    assert "get_local_buffer_tensor" in message and argument in message


# --- extremes that are right -----------------------------------------------------------------------------------------


def test_no_tokens_on_one_rank(buffer: Buffer) -> None:
    check_works(buffer, lambda rank: 0 if rank == 0 else TOKENS)


def test_no_tokens_at_all(buffer: Buffer) -> None:
    check_works(buffer, lambda rank: 0)
    check_works(buffer)


def test_no_token_selects_an_expert(buffer: Buffer) -> None:
    x, nothing = rows(buffer.rank), torch.full((TOKENS, TOP_K), -1, device=DEVICE)
    experts = LOCAL_EXPERTS * buffer.group_size
    recv_x, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=nothing, num_experts=experts)
    assert recv_x.shape == (0, HIDDEN)
    assert torch.equal(buffer.combine(recv_x, handle)[0], torch.zeros_like(x))
    check_works(buffer)
    if not HAS_LOW_LATENCY:
        return
    recv_x, count, low_handle, _, _ = buffer.low_latency_dispatch(x, nothing, MAX_TOKENS, experts, use_fp8=False)
    assert not count.any()
    combined = buffer.low_latency_combine(recv_x, nothing, ones(TOKENS, TOP_K), low_handle)[0]
    assert torch.equal(combined, torch.zeros_like(x))
    check_works(buffer)


def test_all_tokens_to_one_expert(buffer: Buffer) -> None:
    size, x = buffer.group_size, rows(buffer.rank)
    one = torch.full((TOKENS, 1), LOCAL_EXPERTS * size - 1, device=DEVICE)
    everything = torch.cat([rows(rank) for rank in range(size)])
    last = buffer.rank == size - 1
    recv_x, _, _, counts, handle, _ = buffer.dispatch(x, topk_idx=one, num_experts=LOCAL_EXPERTS * size)
    assert counts == [0, size * TOKENS if last else 0]
    assert torch.equal(recv_x, everything if last else everything[:0])
    assert torch.equal(buffer.combine(recv_x, handle)[0], x)
    check_works(buffer)
    if not HAS_LOW_LATENCY:
        return
    low_x, count, low_handle, _, _ = buffer.low_latency_dispatch(
        x, one, MAX_TOKENS, LOCAL_EXPERTS * size, use_fp8=False
    )
    assert count.tolist() == [0, size * TOKENS if last else 0]
    if last:
        assert torch.equal(low_x[1, : size * TOKENS], everything)
    combined = buffer.low_latency_combine(low_x, one, ones(TOKENS, 1), low_handle)[0]
    assert torch.equal(combined, x)
    check_works(buffer)


def test_as_many_tokens_as_allowed(buffer: Buffer) -> None:
    check_works(buffer, lambda rank: MAX_TOKENS)


# --- construction ----------------------------------------------------------------------------------------------------

BAD_CONSTRUCTION = [
    ("num_nvl_bytes", -1),
    ("num_nvl_bytes", 2**60),
    ("num_nvl_bytes", "1G"),
    ("num_rdma_bytes", -1),
    ("num_rdma_bytes", 2**60),
    ("num_qps_per_rank", 0),
    ("device", "tpu"),
    ("device", 7),
    ("ranks_per_node", 0),
    ("ranks_per_node", -2),
    ("ranks_per_node", 1000),
    ("timeout", 0.0),
    ("timeout", -1.0),
    ("timeout", "soon"),
    ("timeout", float("nan")),
]


@pytest.mark.parametrize("alone", [False, True], ids=["all ranks", "one rank"])
@pytest.mark.parametrize(("argument", "value"), BAD_CONSTRUCTION)
def test_bad_construction_fails_on_every_rank(comm: MPI.Intracomm, argument: str, value: object, alone: bool) -> None:
    changes = {argument: value} if not alone or comm.rank == comm.size - 1 else {}
    message = promptly(lambda: make_buffer(comm, **changes), Error)
    assert argument in message
    with make_buffer(comm) as buffer:
        check_works(buffer)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_nvl_bytes", 2**24),
        ("num_qps_per_rank", 24),
        ("enable_shrink", True),
        ("allow_nvlink_for_low_latency_mode", False),
        ("allow_mnnvl", True),
        ("timeout", 30.0),
    ],
)
def test_arguments_of_construction_must_agree(comm: MPI.Intracomm, argument: str, value: object) -> None:
    changes = {argument: value} if comm.rank == 0 else {}
    message = promptly(lambda: make_buffer(comm, **changes), ArgumentError)
    assert argument in message and repr(value) in message
    assert comm.allgather(message) == [message] * comm.size


@pytest.mark.parametrize("step", ["get_local_device_id", "get_local_ipc_handle", "sync"])
def test_a_rank_that_raises_in_construction(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A runtime that fails at one step of the sequence on one rank."""
    from hpc_moe import _C

    culprit = comm.size - 1
    name = "CudaRuntime" if ON_CUDA else "CpuRuntime"
    runtime: Any = getattr(_C, name)

    class Failing(runtime):  # type: ignore[misc]
        pass

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    setattr(Failing, step, fail)
    if comm.rank == culprit:
        monkeypatch.setattr(_C, name, Failing)
    message = promptly(lambda: make_buffer(comm), BootstrapError)
    assert f"rank {culprit}" in message and "out of luck" in message
    monkeypatch.undo()
    with make_buffer(comm) as buffer:
        check_works(buffer)


def test_communicators_that_cannot_be_used(comm: MPI.Intracomm) -> None:
    from mpi4py import MPI

    freed = comm.Dup()
    freed.Free()
    unusable: tuple[Any, ...] = (MPI.COMM_NULL, freed, None, 7, "world")
    for bad in unusable:
        assert mentions(promptly(partial(Buffer, bad, device="cpu"), ArgumentError), "comm")
    half = comm.Split(comm.rank % 2, comm.rank)
    assert isinstance(half, MPI.Intracomm)
    between = half.Create_intercomm(0, comm, 1 - comm.rank % 2, tag=1)
    wrong: Any = between
    message = promptly(partial(Buffer, wrong, device="cpu"), ArgumentError)
    assert mentions(message, "comm")
    between.Free()
    half.Free()
    with make_buffer(comm) as buffer:
        check_works(buffer)
