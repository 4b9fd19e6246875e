"""Random calls of layout, dispatch and combine against the reference, on as many ranks as there are.

Every rank draws the same examples (hypothesis, derandomised); `normal_calls.py` says what is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from normal_calls import (
    AMPLE_WINDOW_BYTES,
    Case,
    Tensors,
    buffer_for,
    cases,
    check_all_calls,
    check_rows,
    combine_and_check,
    dispatch_arguments,
    expected_dispatch,
)
from support import DEVICE, ON_CUDA, Buffers, placements, same_on_all_ranks, to_device, together

from hpc_moe.testing import make_topk_idx
from hpc_moe.testing import reference as ref

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def buffers() -> Iterator[Buffers]:
    from mpi4py import MPI

    made = Buffers(MPI.COMM_WORLD)
    yield made
    made.destroy()


@given(case=cases())
@same_on_all_ranks(max_examples=120)
def test_layout_dispatch_combine(comm: MPI.Intracomm, buffers: Buffers, case: Case) -> None:
    with together(comm, str(case)) as verdict:
        check_all_calls(verdict, buffer_for(buffers, case), case)


@given(first=cases(max_tokens=20), second=cases(max_tokens=20))
@same_on_all_ranks(max_examples=25)
def test_handles_outlive_other_calls(comm: MPI.Intracomm, buffers: Buffers, first: Case, second: Case) -> None:
    """Two dispatches, then their combines, crosswise; both on the first case's buffer."""
    buffer, rank = buffer_for(buffers, first), comm.Get_rank()
    with together(comm, f"{first}\n{second}") as verdict:
        under_way = []
        for case in (first, second):
            case = Case(**{**vars(case), "node_of_rank": first.node_of_rank})
            tensors = Tensors(case)
            x = tensors.tokens()
            sent = [expected_dispatch(case, tensors, x, peer) for peer in range(case.num_ranks)]
            recv_x, *_, handle, event = buffer.dispatch(to_device(x[rank]), **dispatch_arguments(buffer, case, tensors))
            event.current_stream_wait()
            under_way.append((case, tensors, sent, recv_x, handle))
        for i in (1, 0, 1):
            case, tensors, sent, recv_x, handle = under_way[i]
            combine_and_check(verdict, buffer, case, tensors, handle, sent, name=f"combine of dispatch {i}")
        for _, _, sent, recv_x, _ in under_way:
            check_rows(verdict, "recv_x, later", recv_x, sent[rank].recv_x, sent[rank].num_used_rows)


@pytest.mark.parametrize("kind", ["balanced", "one_rank"])
@pytest.mark.parametrize("expert_layout", ["token", "grouped"])
def test_small_windows_take_several_passes(
    comm: MPI.Intracomm, buffers: Buffers, kind: str, expert_layout: str
) -> None:
    """Rows of 16 KiB and more do not all fit in the smallest window: same results, in several passes."""
    num_ranks, rank = comm.Get_size(), comm.Get_rank()
    for hidden, node_of_rank in zip((16384, 8192), (placements(num_ranks)[0], placements(num_ranks)[-1]), strict=True):
        case = Case(
            seed=hidden,
            num_tokens=tuple(11 + 3 * peer for peer in range(num_ranks)),
            hidden=hidden,
            num_local_experts=2,
            top_k=2,
            kind=kind,
            payload="bf16",
            top_k_mode="weights",
            expert_layout=expert_layout,
            expert_alignment=1,
            spare_rows=-1,
            num_biases=1,
            node_of_rank=node_of_rank,
            is_window_small=True,
            is_strided=False,
            async_finish=False,
        )
        tensors = Tensors(case)
        outputs = []
        for is_window_small in (True, False):
            buffer = buffer_for(buffers, Case(**{**vars(case), "is_window_small": is_window_small}))
            tensors = Tensors(case)
            with together(comm, f"{case} small={is_window_small}") as verdict:
                x = tensors.tokens()
                sent = [expected_dispatch(case, tensors, x, peer) for peer in range(num_ranks)]
                arguments = dispatch_arguments(buffer, case, tensors)
                recv_x, *_, handle, _ = buffer.dispatch(to_device(x[rank]), **arguments)
                check_rows(verdict, "recv_x", recv_x, sent[rank].recv_x, sent[rank].num_used_rows)
                y, _ = tensors.results(sent)
                combined, _, _ = buffer.combine(to_device(y[rank]), handle)
                outputs.append(combined)
                passes = {name: buffer.stats()[name]["last_passes"] for name in ("dispatch", "combine")}
                if num_ranks > 1:
                    # On CUDA rows of one rank's own tokens, and those that fit into the pool, need no second pass.
                    if ON_CUDA and kind == "one_rank":
                        del passes["dispatch"]
                    verdict.true("passes", all((n > 1) == is_window_small for n in passes.values()), passes)
                reference = ref.combine(
                    tensors.routing, y, rank, expert_layout=expert_layout, node_of_rank=node_of_rank
                )
                verdict.within("combined_x", combined, reference.x)
        with together(comm, str(case)) as verdict:
            verdict.same("combined_x of both windows", outputs[0], outputs[1])


def test_no_tokens_anywhere(comm: MPI.Intracomm, buffers: Buffers) -> None:
    buffer = buffers.normal((0,) * comm.Get_size(), AMPLE_WINDOW_BYTES)
    with together(comm) as verdict:
        x = torch.empty(0, 256, dtype=torch.bfloat16, device=DEVICE)
        topk_idx = torch.empty(0, 3, dtype=torch.int64, device=DEVICE)
        for expert_layout in ("token", "grouped"):
            recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=torch.empty(0, 3, device=DEVICE),
                num_experts=2 * comm.Get_size(),
                expert_layout=expert_layout,
            )
            verdict.same("recv_x", recv_x, x)
            shape = (0,) if expert_layout == "grouped" else (0, 3)
            verdict.same("recv_topk_idx", recv_idx, torch.empty(shape, dtype=torch.int64))
            verdict.same("recv_topk_weights", recv_weights, torch.empty(shape))
            verdict.true("counts", counts == [0, 0], counts)
            verdict.same("combined_x", buffer.combine(recv_x, handle)[0], x)


@pytest.mark.mpi(min_size=2)
def test_sub_communicators(comm: MPI.Intracomm) -> None:
    """Buffers on halves of the world at once, with ranks in reverse order."""
    from mpi4py import MPI

    from hpc_moe import Buffer

    sub = comm.Split(comm.Get_rank() % 2, -comm.Get_rank())
    assert isinstance(sub, MPI.Intracomm)
    with together(comm) as verdict:
        rank, num_ranks = sub.Get_rank(), sub.Get_size()
        with Buffer(sub, num_nvl_bytes=AMPLE_WINDOW_BYTES, device=str(DEVICE), timeout=30.0) as buffer:
            verdict.true("rank", (buffer.rank, buffer.group_size) == (rank, num_ranks))
            generator = torch.Generator().manual_seed(7)
            topk_idx = [make_topk_idx("balanced", 9, 2, 2 * num_ranks, num_ranks, generator) for _ in range(num_ranks)]
            x: list[ref.Rows] = [torch.randn(9, 128, generator=generator).bfloat16() for _ in range(num_ranks)]
            recv_x, *_ = buffer.dispatch(
                to_device(x[rank]), topk_idx=to_device(topk_idx[rank]), num_experts=2 * num_ranks
            )
            routing = ref.Routing.from_topk(topk_idx, 2 * num_ranks)
            expected = ref.dispatch(routing, x, None, rank)
            check_rows(verdict, "recv_x", recv_x, expected.recv_x, expected.num_used_rows)
    sub.Free()
