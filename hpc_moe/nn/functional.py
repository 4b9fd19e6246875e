"""Differentiable `dispatch` and `combine`: the backward of each is the other.

For code that routes tokens by hand between its own router and experts; `hpc_moe.nn.ExpertParallelMoE` is built of them.
Not for inference with low-latency calls, which have no backward.

Both calls, and their backwards, are collective. Every rank must make the same ones in the same order, and three things
here see to it:

- With grad mode on, the outputs require a gradient on every rank, whether or not this rank's inputs do, so the backward
  runs everywhere. (Where no rank needs it, that is one exchange for nothing: use `torch.no_grad()`.)
- The handle carries an empty tensor from dispatch to combine, so that the backward of a combine always leads to that of
  its dispatch, on a rank that received no token too.
- Autograd runs the nodes of a graph in the reverse order of their creation (a node's consumers are younger than it is,
  so the youngest one left is always ready). Equal calls in the forward are equal calls in the backward.

Letters: T tokens of this rank, H hidden, K top-k, E experts, L local experts, N_rows rows of `recv_x`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from hpc_moe.handles import DispatchHandle


@dataclass(frozen=True)
class RoutingHandle:
    """What `combine` and a cached `dispatch` need to know of a dispatch.

    Attributes:
        routing: the buffer's own handle, with the counts and the row order.
        link: an empty tensor that ties the backward of a combine to that of the dispatch.
    """

    routing: DispatchHandle
    link: torch.Tensor


class Dispatched(NamedTuple):
    """What `dispatch` returns. The three in the middle are None (the list empty) if a handle was given.

    Attributes:
        x: `[N_rows, H]` in the dtype of the input.
        topk_idx: `[N_rows, K] int64` (`[N_rows]` in the grouped layout); local expert indices, -1 for elsewhere.
        topk_weights: alike, in the dtype of the weights given; 0 for elsewhere. None if no weights were given.
        num_tokens_per_expert: L counts of tokens, rounded up to the alignment.
        handle: for `combine` and for dispatching more tensors the same way.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_tokens_per_expert: list[int]
    handle: RoutingHandle


def dispatch(
    buffer: Any,
    x: torch.Tensor,
    topk_idx: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    num_experts: int | None = None,
    expert_layout: str = "token",
    handle: RoutingHandle | None = None,
    expert_alignment: int = 1,
) -> Dispatched:
    """Send every token to the ranks that hold its experts. Collective, differentiable in `x` and `topk_weights`.

    Args:
        buffer: a `hpc_moe.Buffer`, which moves bfloat16 (other dtypes are rounded to it on the way, gradients too, and
            come out in their own dtype), or a `hpc_moe.testing.ReferenceBuffer`, which keeps any dtype.
        x: `[T, H]`, floating.
        topk_idx: `[T, K] int64`, global expert indices, -1 for none. Required without `handle`, None with it.
        topk_weights: `[T, K]`, floating, or None on all ranks.
        num_experts: E. Required without `handle`.
        expert_layout: `"token"` (a row per token) or `"grouped"` (a row per token and local expert, expert by expert).
        handle: of an earlier dispatch: reuse its routing and layout. Use the handle returned here for what follows.
        expert_alignment: rows per expert are rounded up to a multiple of it.

    Raises:
        ArgumentError: what the buffer finds wrong with the arguments of any rank; on every rank.
    """
    # Nothing is checked here: what a rank rejects by itself, the others would wait for. The buffer tells them.
    anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
    others = {
        "topk_idx": topk_idx,
        "num_experts": num_experts,
        "expert_layout": expert_layout,
        "expert_alignment": expert_alignment,
    }
    if handle is not None:
        link, routing = _parts(handle)
        others["topk_weights"] = topk_weights
        recv_x, link = _apply_cached_dispatch(anchor, link, x, buffer, routing, others)
        return Dispatched(recv_x, None, None, [], RoutingHandle(routing, link))
    recv_x, recv_topk_weights, link, recv_topk_idx, counts, routing = _apply_dispatch(
        anchor, x, topk_weights, buffer, others
    )
    return Dispatched(recv_x, recv_topk_idx, recv_topk_weights, counts, RoutingHandle(routing, link))


def combine(buffer: Any, x: torch.Tensor, handle: RoutingHandle) -> torch.Tensor:
    """Bring the rows back to their tokens and sum them, without weights. Collective, differentiable in `x`.

    Args:
        buffer: the one that dispatched.
        x: `[N_rows, H]`, floating, rows as `dispatch` returned them. Multiply by the weights before.
        handle: what `dispatch` returned.

    Returns:
        `[T, H]` in the dtype of `x`; zero for a token that selected no expert.

    Raises:
        ArgumentError: what the buffer finds.
    """
    anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
    link, routing = _parts(handle)
    combined: torch.Tensor = _apply_combine(anchor, link, x, buffer, routing)
    return combined


def _parts(handle: Any) -> tuple[Any, Any]:
    """Link and routing; of something else, what the buffer will reject."""
    if isinstance(handle, RoutingHandle):
        return handle.link, handle.routing
    return None, f"{type(handle).__name__} in place of a RoutingHandle"


def _to_wire(buffer: Any, value: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The tensor in the dtype that the buffer moves; anything but a floating tensor is left for it to reject."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    if not getattr(buffer, "supports_any_dtype", False):
        value = value.to(dtype)
    return value.contiguous()


def _weights_to_wire(buffer: Any, weights: Any) -> Any:
    return _to_wire(buffer, weights, torch.float32)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        buffer: Any,
        others: dict[str, Any],
    ) -> tuple[Any, ...]:
        recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = buffer.dispatch(
            _to_wire(buffer, x), topk_weights=_weights_to_wire(buffer, topk_weights), **others
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.x_dtype = x.dtype
        ctx.weights_dtype = None if topk_weights is None else topk_weights.dtype
        ctx.has_expert = recv_topk_idx >= 0
        ctx.mark_non_differentiable(recv_topk_idx)
        if topk_weights is not None:
            recv_topk_weights = recv_topk_weights.to(topk_weights.dtype)
        return recv_x.to(x.dtype), recv_topk_weights, x.new_empty(0), recv_topk_idx, counts, handle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_recv_x: torch.Tensor, grad_recv_weights: torch.Tensor | None, *_: Any) -> Any:
        weights = None
        if ctx.weights_dtype is not None:
            # Entries without an expert here are the constant 0: whatever the caller did with them, no gradient flows.
            assert grad_recv_weights is not None
            weights = _weights_to_wire(ctx.buffer, torch.where(ctx.has_expert, grad_recv_weights, 0))
        grad_x, grad_weights, _event = ctx.buffer.combine(
            _to_wire(ctx.buffer, grad_recv_x), ctx.handle, topk_weights=weights
        )
        if ctx.weights_dtype is not None:
            grad_weights = grad_weights.to(ctx.weights_dtype)
        return None, grad_x.to(ctx.x_dtype), grad_weights, None, None


class _CachedDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        link: torch.Tensor,
        x: torch.Tensor,
        buffer: Any,
        handle: DispatchHandle,
        others: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        recv_x = buffer.dispatch(_to_wire(buffer, x), handle=handle, **others)[0]
        ctx.buffer, ctx.handle, ctx.x_dtype = buffer, handle, x.dtype
        return recv_x.to(x.dtype), x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_recv_x: torch.Tensor, _grad_link: torch.Tensor) -> Any:
        grad_x = ctx.buffer.combine(_to_wire(ctx.buffer, grad_recv_x), ctx.handle)[0]
        return None, None, grad_x.to(ctx.x_dtype), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, link: torch.Tensor, x: torch.Tensor, buffer: Any, handle: DispatchHandle
    ) -> torch.Tensor:
        combined: torch.Tensor = buffer.combine(_to_wire(buffer, x), handle)[0]
        ctx.buffer, ctx.handle, ctx.x_dtype = buffer, handle, x.dtype
        return combined.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_combined: torch.Tensor) -> Any:
        grad_x = ctx.buffer.dispatch(_to_wire(ctx.buffer, grad_combined), handle=ctx.handle)[0]
        return None, None, grad_x.to(ctx.x_dtype), None, None


# torch leaves `apply` untyped.
_apply_dispatch: Callable[..., Any] = _Dispatch.apply
_apply_cached_dispatch: Callable[..., Any] = _CachedDispatch.apply
_apply_combine: Callable[..., Any] = _Combine.apply
