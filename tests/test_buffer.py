"""What a buffer is, besides its calls' results: its life, sizes, statistics, events, and the order of hooks."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mpi4py import MPI
from support import DEVICE, HAS_LOW_LATENCY, ON_CUDA, needs_low_latency, needs_nodes, to_device

import hpc_moe
from hpc_moe import _C, ArgumentError, Buffer, Config, EventOverlap, UnavailableError
from hpc_moe.config import low_latency_outbox_bytes, low_latency_staging_bytes, minimum_nvl_bytes
from hpc_moe.testing import make_topk_idx, make_topk_weights

HIDDEN = 256
M = 16


def make_buffer(comm: MPI.Intracomm, num_nvl_bytes: int = 0, **arguments: Any) -> Buffer:
    """For normal calls, with the smallest window unless another one is asked for."""
    return Buffer(comm, num_nvl_bytes or minimum_nvl_bytes(comm.size), device=str(DEVICE), timeout=30, **arguments)


@pytest.fixture
def both_modes(comm: MPI.Intracomm, low_latency_world: None) -> Iterator[Buffer]:
    """A buffer for normal and, where there are any, for low-latency calls, of 4 experts a rank."""
    num_bytes = Buffer.get_low_latency_rdma_size_hint(M, HIDDEN, comm.size, 4 * comm.size)
    low_latency = {"num_rdma_bytes": num_bytes, "low_latency_mode": True} if HAS_LOW_LATENCY else {}
    with make_buffer(comm, **low_latency) as buffer:
        yield buffer


def tokens(buffer: Buffer, count: int = M, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx and topk_weights of this rank: 3 of 4 experts a rank."""
    generator = torch.Generator().manual_seed(100 * seed + buffer.rank)
    x = torch.randn(count, HIDDEN, generator=generator).bfloat16()
    topk_idx = make_topk_idx("balanced", count, 3, 4 * buffer.group_size, buffer.group_size, generator)
    return to_device((x, topk_idx, make_topk_weights(topk_idx, generator)))


# --- life ------------------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_attributes(comm: MPI.Intracomm) -> None:
    num_bytes = minimum_nvl_bytes(comm.size)
    with make_buffer(comm) as buffer:
        assert (buffer.rank, buffer.group_size, buffer.group) == (comm.rank, comm.size, comm)
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes, buffer.low_latency_mode) == (num_bytes, 0, False)
        assert buffer.num_sms == Buffer.num_sms


@pytest.mark.mpi
def test_destroying_twice_does_nothing(comm: MPI.Intracomm) -> None:
    buffer = make_buffer(comm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.destroy()
        buffer.destroy()
    with pytest.raises(UnavailableError, match=r"Buffer.dispatch: the buffer was destroyed"):
        buffer.dispatch(torch.zeros(1, 128, dtype=torch.bfloat16, device=DEVICE))


@pytest.mark.mpi
def test_the_communicator_of_the_caller_is_left_alone(comm: MPI.Intracomm) -> None:
    own = comm.Dup()
    with make_buffer(own):
        assert own.allreduce(1) == own.size
    assert own.allreduce(1) == own.size
    own.Free()


@pytest.mark.mpi
def test_several_buffers_live_side_by_side(comm: MPI.Intracomm) -> None:
    with make_buffer(comm) as first, make_buffer(comm) as second:
        for seed in range(3):
            x, topk_idx, _ = tokens(first, seed=seed)
            for buffer in (first, second):
                recv_x, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=4 * comm.size)
                combined, _, _ = buffer.combine(recv_x, handle)
                ranks = handle.is_token_in_rank.sum(dim=1, keepdim=True)
                torch.testing.assert_close(combined.float(), x.float() * ranks, rtol=2**-8, atol=0)


@pytest.mark.mpi
def test_many_buffers_leave_nothing_behind(comm: MPI.Intracomm) -> None:
    """Communicators are a small supply (a few thousand in some MPIs): they must be given back."""
    for _ in range(10 if ON_CUDA else 50):  # test_cuda.py makes more, and looks at the GPU's memory
        make_buffer(comm).destroy()


@pytest.mark.mpi
def test_an_error_in_the_block_is_what_the_block_raises(comm: MPI.Intracomm) -> None:
    with pytest.raises(KeyError), make_buffer(comm):
        raise KeyError("of the user")


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_size_hint_makes_4096_tokens_one_pass(comm: MPI.Intracomm, dtype: str) -> None:
    config = Buffer.get_dispatch_config(comm.size)
    with make_buffer(comm, config.get_nvl_buffer_size_hint(2 * HIDDEN, comm.size)) as buffer:
        x, topk_idx, weights = tokens(buffer, 4096)
        sent = x if dtype == "bf16" else hpc_moe.fp8.cast_to_fp8(x)
        _, _, _, _, handle, _ = buffer.dispatch(
            sent, topk_idx=topk_idx, topk_weights=weights, num_experts=4 * comm.size
        )
        assert buffer.stats()["dispatch"]["last_passes"] == 1
        rows = torch.zeros(handle.num_rows, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
        buffer.combine(rows, handle)
        assert buffer.stats()["combine"]["last_passes"] == 1


@pytest.mark.mpi(min_size=2)
def test_a_small_window_takes_more_passes(comm: MPI.Intracomm) -> None:
    with make_buffer(comm) as buffer:
        x, topk_idx, _ = tokens(buffer, 1000)
        buffer.dispatch(x, topk_idx=topk_idx, num_experts=4 * comm.size)
        assert buffer.stats()["dispatch"]["last_passes"] >= (2 if ON_CUDA else 6)
        assert buffer.stats()["dispatch"]["calls"] == 1


def test_size_hints_grow_with_what_they_depend_on() -> None:
    config = Config()
    assert config.get_nvl_buffer_size_hint(4096, 8) > 8 * 4096 * 4096
    assert config.get_nvl_buffer_size_hint(8192, 8) > config.get_nvl_buffer_size_hint(4096, 8)
    assert config.get_rdma_buffer_size_hint(4096, 8) > config.get_rdma_buffer_size_hint(4096, 4)
    # Two staging buffers [E / R, M * R, H] bf16.
    staging, row = 256 * 128 * 7168 * 2, 14 * 1664  # a row of 14336 bytes travels in 14 chunks
    packets, rows = 8 * 128 * (256 + row), 16 * 128 * row
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    assert hint == 2 * (staging + packets + rows + 3 * 4096)


@pytest.mark.skipif(not _C.cuda_archs, reason="this build has no CUDA")
def test_a_low_latency_hint_has_room() -> None:
    """For what travels on CUDA, and two staging buffers behind it, each from a page on; with outboxes on top."""
    for most, hidden, ranks, local, top_k in itertools.product(
        (1, 33, 1024), (128, 896, 7168), (1, 2, 3, 8, 16, 32), (1, 5, 32), (1, 8, 16)
    ):
        hint = Buffer.get_low_latency_rdma_size_hint(most, hidden, ranks, ranks * local)
        staging = low_latency_staging_bytes(most, hidden, ranks * local)
        for puts in range(ranks):
            needed = _C.low_latency_bytes(most, hidden, top_k, ranks, puts) + 2 * staging + 4096
            assert needed <= hint + puts * low_latency_outbox_bytes(hint, ranks)


def test_bad_numbers_for_hints_are_named() -> None:
    with pytest.raises(ArgumentError, match="hidden"):
        Buffer.get_low_latency_rdma_size_hint(128, 100, 8, 256)
    with pytest.raises(ArgumentError, match="num_experts"):
        Buffer.get_low_latency_rdma_size_hint(128, 128, 8, 3)
    with pytest.raises(ArgumentError, match="num_ranks"):
        Buffer.get_combine_config(0)


def test_set_num_sms() -> None:
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(12)
        assert Buffer.get_dispatch_config(4).num_sms == 12
        with pytest.raises(ArgumentError, match="num_sms"):
            Buffer.set_num_sms(0)
        assert Buffer.num_sms == 12
    finally:
        Buffer.num_sms = before


@pytest.mark.mpi
def test_views_of_the_buffer_show_its_memory(both_modes: Buffer) -> None:
    for use_rdma in (False, True) if HAS_LOW_LATENCY else (False,):
        whole = both_modes.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=use_rdma)
        assert whole.numel() == (both_modes.num_rdma_bytes if use_rdma else both_modes.num_nvl_bytes)
        offset = whole.numel() // 2
        part = both_modes.get_local_buffer_tensor(torch.int32, (2, 3), offset, use_rdma)
        part.copy_(torch.arange(6).view(2, 3))
        assert whole[offset : offset + 24].view(torch.int32).tolist() == list(range(6))


@needs_nodes
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("spoilt", ["dtype", "shape", "missing", "counts"])
def test_counts_per_node_are_checked(comm: MPI.Intracomm, spoilt: str) -> None:
    with make_buffer(comm, ranks_per_node=1) as buffer:
        x, topk_idx, _ = tokens(buffer)
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4 * comm.size)
        assert per_node is not None and torch.equal(per_node, per_rank)  # every rank is a node
        bad = {"dtype": per_node.long(), "shape": per_node[1:], "missing": None, "counts": per_node + 1}[spoilt]
        for indices in (topk_idx, None):
            with pytest.raises(ArgumentError, match="num_tokens_per_rdma_rank"):
                buffer.dispatch(x, None, per_rank, bad, in_rank, per_expert, indices)
        recv_x, *_ = buffer.dispatch(x, None, per_rank, per_node, in_rank, per_expert)
        assert len(recv_x) == comm.allreduce(per_rank.numpy().astype(int))[comm.rank]


# --- events and hooks ------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_asynchronous_calls_return_events(both_modes: Buffer) -> None:
    x, topk_idx, _ = tokens(both_modes)
    experts = 4 * both_modes.group_size
    *layout, event = both_modes.get_dispatch_layout(topk_idx, experts, async_finish=True)
    recv_x, _, _, _, handle, event = both_modes.dispatch(
        x,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        num_tokens_per_expert=layout[2],
        is_token_in_rank=layout[3],
        topk_idx=topk_idx,
        previous_event=event,
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    with event:
        pass
    event.current_stream_wait()
    assert isinstance(Buffer.capture(), EventOverlap)
    assert len(recv_x) == handle.num_recv_tokens


@needs_low_latency
@pytest.mark.mpi
def test_a_hook_defers_the_receive(both_modes: Buffer) -> None:
    x, topk_idx, weights = tokens(both_modes)
    experts = 4 * both_modes.group_size
    _, expected, _, _, _ = both_modes.low_latency_dispatch(x, topk_idx, M, experts)
    stats = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    _, count, handle, _, hook = both_modes.low_latency_dispatch(
        x, topk_idx, M, experts, cumulative_local_expert_recv_stats=stats, return_recv_hook=True
    )
    count.fill_(-1)
    assert stats.sum() == 0 and (count == -1).all()
    with pytest.raises(ArgumentError, match="has not been received"):
        rows = torch.zeros(handle.shape(both_modes.group_size), dtype=torch.bfloat16, device=DEVICE)
        both_modes.low_latency_combine(rows, topk_idx, weights, handle)
    if not ON_CUDA:  # there, a call that is rejected receives what is due before it
        assert stats.sum() == 0 and (count == -1).all()
    hook()
    assert torch.equal(count, expected) and torch.equal(stats, expected)
    hook()  # once received, it does nothing
    assert torch.equal(stats, expected)


@needs_low_latency
@pytest.mark.mpi
def test_hooks_run_in_the_order_of_the_sends(both_modes: Buffer) -> None:
    experts = 4 * both_modes.group_size
    sends = []
    for seed in (1, 2):
        x, topk_idx, _ = tokens(both_modes, seed=seed)
        sends.append(both_modes.low_latency_dispatch(x, topk_idx, M, experts, use_fp8=False, return_recv_hook=True))
    third = tokens(both_modes, seed=3)
    with pytest.raises(ArgumentError, match="2 earlier sends are unreceived"):
        both_modes.low_latency_dispatch(third[0], third[1], M, experts, return_recv_hook=True)
    sends[1][4]()  # runs the first one, too
    sends[0][4]()
    for seed, send in zip((1, 2), sends, strict=True):
        x, topk_idx, _ = tokens(both_modes, seed=seed)
        expected, count, _, _, _ = both_modes.low_latency_dispatch(x, topk_idx, M, experts, use_fp8=False)
        assert torch.equal(send[1], count)
        for expert, rows in enumerate(count.tolist()):
            assert torch.equal(send[0][expert, :rows], expected[expert, :rows])


@needs_low_latency
@pytest.mark.mpi
def test_a_send_keeps_its_tokens(both_modes: Buffer) -> None:
    """The caller may reuse x as soon as the send has returned."""
    x, topk_idx, _ = tokens(both_modes)
    experts = 4 * both_modes.group_size
    expected, count, _, _, _ = both_modes.low_latency_dispatch(x, topk_idx, M, experts, use_fp8=False)
    recv_x, _, _, _, hook = both_modes.low_latency_dispatch(
        x, topk_idx, M, experts, use_fp8=False, return_recv_hook=True
    )
    x.fill_(-1)
    hook()
    for expert, rows in enumerate(count.tolist()):
        assert torch.equal(recv_x[expert, :rows], expected[expert, :rows])


@needs_low_latency
@pytest.mark.mpi
def test_normal_and_low_latency_calls_mix(both_modes: Buffer) -> None:
    experts = 4 * both_modes.group_size
    for seed in range(4):
        x, topk_idx, weights = tokens(both_modes, seed=seed)
        low, _, low_handle, _, hook = both_modes.low_latency_dispatch(
            x, topk_idx, M, experts, use_fp8=False, return_recv_hook=True, topk_weights=weights
        )
        recv_x, _, _, _, handle, _ = both_modes.dispatch(x, topk_idx=topk_idx, num_experts=experts)
        combined, _, _ = both_modes.combine(recv_x, handle)
        hook()
        result, _, _ = both_modes.low_latency_combine(low, topk_idx, weights, low_handle)
        ranks = handle.is_token_in_rank.sum(dim=1, keepdim=True)
        torch.testing.assert_close(combined.float(), x.float() * ranks, rtol=2**-8, atol=0)
        expected = x.float() * weights.sum(dim=1, keepdim=True)
        torch.testing.assert_close(result.float(), expected, rtol=2**-6, atol=1e-6)


@needs_low_latency
@pytest.mark.mpi
def test_staging_buffers_alternate(both_modes: Buffer) -> None:
    x, topk_idx, weights = tokens(both_modes)
    experts = 4 * both_modes.group_size
    staged = []
    for _ in range(2):
        recv_x, _, handle, _, _ = both_modes.low_latency_dispatch(x, topk_idx, M, experts, use_fp8=False)
        buffer = both_modes.get_next_low_latency_combine_buffer(handle)
        assert buffer.shape == recv_x.shape and buffer.dtype == torch.bfloat16
        buffer.copy_(recv_x)
        staged.append((buffer, handle))
    for buffer, _ in staged:
        _, _, smaller, _, _ = both_modes.low_latency_dispatch(x[:2], topk_idx[:2], M // 4, experts, use_fp8=False)
        again = both_modes.get_next_low_latency_combine_buffer(smaller)
        assert ON_CUDA or again.data_ptr() == buffer.data_ptr()  # on CUDA, they lie at the end of the memory
    ignored = torch.zeros_like(staged[0][0])
    results = [
        both_modes.low_latency_combine(ignored, topk_idx, weights, handle, zero_copy=True)[0] for _, handle in staged
    ]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0].float(), x.float() * weights.sum(dim=1, keepdim=True), rtol=2**-6, atol=1e-6)
