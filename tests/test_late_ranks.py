"""Ranks that come late, or change their minds: what the others see, and that nobody waits for ever.

Each test would hang, crash or leave the ranks out of step if the library took a vote that a rank gave up on for one
that all ranks won. Waits are short here on purpose; no test measures time.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from support import DEVICE, ON_CUDA, cpu_runtime_only, needs_low_latency, to_device

from hpc_moe import ArgumentError, Buffer, PeerTimeoutError, UnavailableError, bootstrap
from hpc_moe.config import minimum_nvl_bytes

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.usefixtures("low_latency_world")]

HIDDEN = 256
SHORT = 2.0 if ON_CUDA else 0.5  # seconds: what ranks wait
LATE = 4.5 if ON_CUDA else 1.5  # seconds: how late a late rank is


def normal_buffer(comm: MPI.Intracomm, timeout: float = 30.0, **arguments: Any) -> Buffer:
    return Buffer(comm, minimum_nvl_bytes(comm.size), device=str(DEVICE), timeout=timeout, **arguments)


def low_latency_buffer(comm: MPI.Intracomm, num_tokens: int, hidden: int, timeout: float, **arguments: Any) -> Buffer:
    num_bytes = Buffer.get_low_latency_rdma_size_hint(num_tokens, hidden, comm.size, comm.size)
    return Buffer(comm, 0, num_bytes, low_latency_mode=True, device=str(DEVICE), timeout=timeout, **arguments)


def to_the_next_rank(comm: MPI.Intracomm, num_tokens: int, hidden: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that all go to the next rank, whose only expert has its number."""
    x = torch.full((num_tokens, hidden), float(comm.rank), dtype=torch.bfloat16)
    return to_device((x, torch.full((num_tokens, 1), (comm.rank + 1) % comm.size)))


def works(buffer: Buffer, comm: MPI.Intracomm) -> bool:
    """Whether a dispatch gives what it should."""
    x, topk_idx = to_the_next_rank(comm, 3)
    recv_x, *_ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=comm.size)
    return bool((recv_x == (comm.rank - 1) % comm.size).all()) and len(recv_x) == 3


def test_a_late_rank_does_not_destroy_alone(comm: MPI.Intracomm) -> None:
    buffer = normal_buffer(comm, SHORT)
    comm.Barrier()
    if comm.rank == 1:
        time.sleep(LATE)
    with pytest.warns(RuntimeWarning, match="a peer is gone"):
        buffer.destroy()


def test_a_late_rank_does_not_construct_alone(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = bootstrap.Group.exchange

    def late(self: bootstrap.Group, name: str, num_bytes: int, produce: Any) -> list[bytes]:
        if comm.rank == 1 and name == "checking the arguments":
            time.sleep(LATE)
        return exchange(self, name, num_bytes, produce)

    monkeypatch.setattr(bootstrap.Group, "exchange", late)
    with pytest.raises(PeerTimeoutError) as caught:
        normal_buffer(comm, SHORT)
    if comm.rank != 1:
        assert caught.value.peers == (1,)


def test_leaving_a_block_with_an_error_on_one_rank(comm: MPI.Intracomm) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            with normal_buffer(comm, SHORT):
                if comm.rank == 0:
                    raise KeyError("of the user")
                time.sleep(LATE)
        except KeyError:
            assert comm.rank == 0


def test_flags_that_the_caller_changes_do_not_change_the_handle(comm: MPI.Intracomm) -> None:
    x, topk_idx = to_the_next_rank(comm, 4)
    with normal_buffer(comm) as buffer:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, comm.size)
        recv_x, _, _, _, handle, _ = buffer.dispatch(x, None, per_rank, per_node, in_rank, per_expert, topk_idx)
        in_rank.fill_(True)
        again, *_ = buffer.dispatch(x, handle)
        assert torch.equal(again, recv_x)


@cpu_runtime_only
def test_more_rows_than_announced_are_refused_before_a_byte_is_written(comm: MPI.Intracomm) -> None:
    """Who changes the handle's own flags gets an error, not another rank's memory."""
    x, topk_idx = to_the_next_rank(comm, 4)
    buffer = normal_buffer(comm)
    _, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=comm.size)
    handle.is_token_in_rank.fill_(True)
    with pytest.raises(RuntimeError, match="more rows arrived than were announced"):
        buffer.dispatch(x, handle)
    with pytest.raises(UnavailableError, match="broken since"):
        buffer.dispatch(x, handle)
    with pytest.warns(RuntimeWarning):
        buffer.destroy()


@pytest.mark.parametrize(
    "spoilt", [{"expert_alignment": 2**63}, {"num_worst_tokens": 2**45}, {"num_worst_tokens": 2**31 - 1}]
)
def test_a_number_that_is_too_large_on_one_rank(comm: MPI.Intracomm, spoilt: dict[str, int]) -> None:
    x, topk_idx = to_the_next_rank(comm, 4, 16384)
    with normal_buffer(comm) as buffer:
        with pytest.raises(ArgumentError, match=next(iter(spoilt))):
            buffer.dispatch(x, topk_idx=topk_idx, num_experts=comm.size, **(spoilt if comm.rank == 0 else {}))  # type: ignore[arg-type]
        assert works(buffer, comm)


@cpu_runtime_only
def test_an_error_of_a_deferred_call_is_its_own(comm: MPI.Intracomm) -> None:
    """Rank 0 rejects a send whose receive half the others run within the next call: that one must not suffer."""
    x, topk_idx = to_the_next_rank(comm, 4)
    with low_latency_buffer(comm, 4, HIDDEN, 30.0) as buffer:
        hook = None
        bad = topk_idx if comm.rank else torch.full_like(topk_idx, 99)
        try:
            *_, hook = buffer.low_latency_dispatch(x, bad, 4, comm.size, use_fp8=False, return_recv_hook=True)
        except ArgumentError:
            assert comm.rank == 0
        recv_x, count, _, _, _ = buffer.low_latency_dispatch(x, topk_idx, 4, comm.size, use_fp8=False)
        assert count.tolist() == [4] and (recv_x[0, :4] == (comm.rank - 1) % comm.size).all()
        if hook is not None:
            with pytest.raises(ArgumentError, match=r"low_latency_dispatch: rank 0 rejected its arguments: topk_idx"):
                hook()
        buffer.clean_low_latency_buffer(4, HIDDEN, comm.size)  # nothing is left unreceived


@cpu_runtime_only
def test_hooks_let_go_of_messages(comm: MPI.Intracomm) -> None:
    x, topk_idx = to_the_next_rank(comm, 4)
    with low_latency_buffer(comm, 4, HIDDEN, 30.0) as buffer:
        for _ in range(50):
            *_, hook = buffer.low_latency_dispatch(x, topk_idx, 4, comm.size, return_recv_hook=True)
            hook()
        backend: Any = buffer._backend
        assert len(backend.messenger._under_way) < 10 * comm.size


@needs_low_latency
def test_hooks_on_some_ranks_only_are_an_error(comm: MPI.Intracomm) -> None:
    x, topk_idx = to_the_next_rank(comm, 128, 7168)
    with low_latency_buffer(comm, 128, 7168, 30.0) as buffer:
        with pytest.raises(ArgumentError, match="return_recv_hook must be the same on all ranks"):
            *_, hook = buffer.low_latency_dispatch(
                x, topk_idx, 128, comm.size, use_fp8=False, return_recv_hook=comm.rank == 1
            )
            if hook is not None:
                hook()
            buffer.check()  # raises what the CPU has not waited for
        assert buffer.low_latency_dispatch(x, topk_idx, 128, comm.size)[1].tolist() == [128]


@cpu_runtime_only
def test_a_failed_dispatch_takes_no_staging_buffer(comm: MPI.Intracomm) -> None:
    x, topk_idx = to_the_next_rank(comm, 4)
    with low_latency_buffer(comm, 4, HIDDEN, 30.0) as buffer:
        _, _, first, _, _ = buffer.low_latency_dispatch(x, topk_idx, 4, comm.size)
        with pytest.raises(ArgumentError):
            buffer.low_latency_dispatch(x, topk_idx if comm.rank else topk_idx + 99, 4, comm.size)
        _, _, second, _, _ = buffer.low_latency_dispatch(x, topk_idx, 4, comm.size)
        staging = [buffer.get_next_low_latency_combine_buffer(handle).data_ptr() for handle in (first, second)]
        assert staging[0] != staging[1]


def test_weights_that_require_gradients(comm: MPI.Intracomm) -> None:
    x, topk_idx = to_the_next_rank(comm, 4)
    with normal_buffer(comm) as buffer:
        rows, _, weights, _, handle, _ = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=torch.ones(4, 1, device=DEVICE, requires_grad=True),
            num_experts=comm.size,
            expert_layout="grouped",
        )
        _, summed, _ = buffer.combine(rows, handle, weights.requires_grad_())
        assert summed is not None and torch.equal(summed.cpu(), torch.ones(4, 1))


def test_a_rank_that_comes_back_while_a_send_is_unreceived(comm: MPI.Intracomm) -> None:
    """The cleaning is refused, but the mask is gone: the unreceived call must not wait for the rank it left out."""
    if comm.size < 3:
        pytest.skip("needs two ranks beside the masked one")
    x, topk_idx = to_the_next_rank(comm, 4)
    with low_latency_buffer(comm, 4, HIDDEN, 3.0, enable_shrink=True) as buffer:
        masked, hook = 2, None
        if comm.rank != masked:
            buffer.low_latency_update_mask_buffer(masked, True)
            *_, hook = buffer.low_latency_dispatch(x, topk_idx, 4, comm.size, return_recv_hook=True)
            buffer.low_latency_clean_mask_buffer()
        with pytest.raises(ArgumentError, match=r"unreceived|rejected"):
            buffer.clean_low_latency_buffer(4, HIDDEN, comm.size)
        if hook is not None:
            hook()
        status = torch.empty(comm.size, dtype=torch.int32, device=DEVICE)
        buffer.low_latency_query_mask_buffer(status)
        assert not status.any()
        buffer.clean_low_latency_buffer(4, HIDDEN, comm.size)
        assert buffer.low_latency_dispatch(x, topk_idx, 4, comm.size)[1].tolist() == [4]


@needs_low_latency
def test_destroying_with_unreceived_sends(comm: MPI.Intracomm) -> None:
    x, topk_idx = to_the_next_rank(comm, 128, 7168)
    buffer = low_latency_buffer(comm, 128, 7168, 30.0)
    buffer.low_latency_dispatch(x, topk_idx, 128, comm.size, use_fp8=False, return_recv_hook=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.destroy()


def test_destroying_after_a_masked_rank_came_back(comm: MPI.Intracomm) -> None:
    x, topk_idx = to_the_next_rank(comm, 128, 7168)
    buffer = low_latency_buffer(comm, 128, 7168, LATE, enable_shrink=True)
    comm.Barrier()
    if comm.rank == 1:
        time.sleep(2 * LATE)
    buffer.low_latency_dispatch(x, topk_idx, 128, comm.size, use_fp8=False)
    status = torch.empty(comm.size, dtype=torch.int32, device=DEVICE)
    buffer.low_latency_query_mask_buffer(status)
    if comm.rank != 1:
        assert status[1] == 1
    comm.Barrier()
    buffer.low_latency_clean_mask_buffer()
    buffer.clean_low_latency_buffer(128, 7168, comm.size)
    recv_x, count, _, _, _ = buffer.low_latency_dispatch(x, topk_idx, 128, comm.size, use_fp8=False)
    assert count.tolist() == [128] and (recv_x[0, :128] == (comm.rank - 1) % comm.size).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.destroy()


@needs_low_latency
@pytest.mark.parametrize("enable_shrink", [False, True])
def test_cleaning_with_bad_arguments_on_one_rank(comm: MPI.Intracomm, enable_shrink: bool) -> None:
    with low_latency_buffer(comm, 4, HIDDEN, 30.0, enable_shrink=enable_shrink) as buffer:
        with pytest.raises(ArgumentError, match="hidden" if comm.rank == 0 else "rank 0 rejected its arguments"):
            buffer.clean_low_latency_buffer(4, HIDDEN if comm.rank else 100, comm.size)
        with pytest.raises(ArgumentError, match="must be the same on all ranks"):
            buffer.clean_low_latency_buffer(4, HIDDEN if comm.rank else 128, comm.size)
        x, topk_idx = to_the_next_rank(comm, 4)
        assert buffer.low_latency_dispatch(x, topk_idx, 4, comm.size)[1].tolist() == [4]


def test_a_normal_call_while_a_rank_is_masked_on_one_rank_only(comm: MPI.Intracomm) -> None:
    num_bytes = Buffer.get_low_latency_rdma_size_hint(4, HIDDEN, comm.size, comm.size)
    with normal_buffer(comm, num_rdma_bytes=num_bytes, low_latency_mode=True, enable_shrink=True) as buffer:
        if comm.rank == 0:
            buffer.low_latency_update_mask_buffer(1, True)
            with pytest.raises(UnavailableError, match=r"ranks \[1\] are masked"):
                works(buffer, comm)
        else:
            with pytest.raises(ArgumentError, match="rank 0 rejected its arguments"):
                works(buffer, comm)
        buffer.low_latency_clean_mask_buffer()
        buffer.clean_low_latency_buffer(4, HIDDEN, comm.size)
        assert works(buffer, comm)


@needs_low_latency
def test_weights_that_are_not_numbers_are_the_same_weights(comm: MPI.Intracomm) -> None:
    x, topk_idx = to_the_next_rank(comm, 4)
    weights = torch.full((4, 1), np.nan, device=DEVICE)
    with low_latency_buffer(comm, 4, HIDDEN, 30.0) as buffer:
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
            x, topk_idx, 4, comm.size, use_fp8=False, topk_weights=weights
        )
        combined, _, _ = buffer.low_latency_combine(recv_x, topk_idx, weights, handle)
        assert combined.isnan().all()
