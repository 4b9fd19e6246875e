"""Errors that kernels report, as the exceptions that users see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...bootstrap import difference
from ...errors import ArgumentError, Error, PeerTimeoutError
from ..requests import OPERATIONS

if TYPE_CHECKING:
    from .backend import CudaBackend

_MISSING = {
    "entry": "it did not make the call",
    "row": "a row from it did not come",
    "arrival": "not all of its rows came",
    "drain": "it did not make room for the next pass",
}
_BAD_VALUES = {
    1: "topk_idx: token {} selects an expert that does not exist",
    2: "topk_idx: token {} selects an expert a second time",
    3: "is_token_in_rank contradicts topk_idx at token {}",
    4: "num_tokens_per_rank must count the tokens of is_token_in_rank; it does not for rank {}",
    5: "num_tokens_per_expert contradicts topk_idx at expert {}",
    6: "num_tokens_per_expert must not be negative; it is for expert {}",
}


def to_error(backend: CudaBackend, record: Mapping[str, Any], agreed_names: Mapping[str, list[str]]) -> Error:
    """The exception for a report of `CudaRuntime.take_error`.

    Args:
        backend: whose it is.
        record: what was reported.
        agreed_names: for each operation, what its ranks must agree on, in the order of the report's values.
    """
    operation, peer, numbers = OPERATIONS[record["operation"]], record["peer"], record["numbers"]
    kind = record["kind"]
    if kind == "timeout":
        return PeerTimeoutError(
            f"{operation} on rank {backend.rank} waited {backend.timeout:g} s for {backend.topology.describe(peer)}: "
            f"{_MISSING[record['missing']]}",
            operation=operation,
            rank=backend.rank,
            peers=(peer,),
        )
    if kind == "rejected":
        return ArgumentError(f"{operation}: rank {peer} rejected its arguments: {record['text']}")
    if kind == "bad value":
        text = _BAD_VALUES[numbers[0] >> 48].format(numbers[0] & (2**48 - 1))
        if peer == -1:
            return ArgumentError(f"get_dispatch_layout: {text}")
        whose = "" if peer == backend.rank else f"rank {peer} rejected its arguments: "
        return ArgumentError(f"{operation}: {whose}{text}")
    if kind == "capacity":
        return ArgumentError(
            f"{operation}: num_worst_tokens={numbers[1]} is too small on rank {peer}, which would receive {numbers[0]} "
            "rows"
        )
    if kind == "operations":
        first, other = OPERATIONS[record["operations"][0]], next(iter(_others(record["operations"])))
        return ArgumentError(
            f"all ranks must make the same call; rank 0 called {first}, rank {other} called "
            f"{OPERATIONS[record['operations'][other]]}"
        )
    for index, name in enumerate(agreed_names[operation]):
        values = {rank: fields[index] for rank, fields in enumerate(record["fields"])}
        if len(set(values.values())) > 1:
            return ArgumentError(f"{operation}: {difference(name, values)}")
    return Error(f"{operation}: a kernel reported {dict(record)}")


def _others(operations: list[int]) -> list[int]:
    """Ranks whose operation is not that of rank 0."""
    return [rank for rank, operation in enumerate(operations) if operation != operations[0]]
