"""`Lane`: where a call runs, and who waits for whom.

Calls run on the communication stream, so that all calls of a buffer have one order, whichever stream is current. If the
current stream is being captured, they run on it: a graph has its own order.
"""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch

from ...events import EventOverlap
from ..requests import StreamArguments
from .pool import lies_in_a_window

# torch.cuda.current_stream takes thirty times as long. Builds without CUDA do not have this.
_number_of_current = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream_number(device: torch.device) -> int:
    """The current stream, as CUDA knows it."""
    if _number_of_current is None:
        return torch.cuda.current_stream(device).cuda_stream
    number: int = _number_of_current(device.index)
    return number


class Lane:
    """The streams of one call; a context manager around its launches.

    Attributes:
        stream: that the kernels run on. Inside the block it is the current one.
        is_capturing: whether it is being captured.
        event: after the block, what `Buffer` returns.
    """

    def __init__(self, comm_stream: torch.cuda.Stream, arguments: StreamArguments) -> None:
        self._caller = torch.cuda.current_stream(comm_stream.device)
        self._arguments = arguments
        self.is_capturing = torch.cuda.is_current_stream_capturing()
        self.stream = self._caller if self.is_capturing else comm_stream
        # Memory from the caller's stream is only safe to write when that stream has been waited for altogether.
        waits_for_all = arguments.previous_event is None or arguments.previous_event.event is None
        self._allocates_on_caller = self.is_capturing or (waits_for_all and not arguments.allocate_on_comm_stream)
        self._results: list[torch.Tensor] = []
        self._owned: list[torch.Tensor] = []
        self._inputs: list[torch.Tensor] = []
        self._context = contextlib.ExitStack()
        self.event = EventOverlap()

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a result: of the caller's stream, unless it asked for the communication stream's."""
        if self._allocates_on_caller and not self.is_capturing:
            with torch.cuda.stream(self._caller):
                result = torch.empty(shape, dtype=dtype, device=self.stream.device)
        else:
            result = torch.empty(shape, dtype=dtype, device=self.stream.device)
        self._results.append(result)
        return result

    def own(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that later calls use, too: of the communication stream, on which they run."""
        result = torch.empty(shape, dtype=dtype, device=self.stream.device)
        self._owned.append(result)
        return result

    def uses(self, *inputs: torch.Tensor | None) -> None:
        """These tensors of the caller are read by the call."""
        self._inputs.extend(t for t in inputs if t is not None and not lies_in_a_window(t))

    def __enter__(self) -> Lane:
        if self._arguments.previous_event is not None and self._arguments.previous_event.event is not None:
            self.stream.wait_event(self._arguments.previous_event.event)
        elif self.stream != self._caller:
            self.stream.wait_stream(self._caller)
        self._context.enter_context(torch.cuda.stream(self.stream))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.close()
        if self._arguments.async_finish:
            event = torch.cuda.Event()
            event.record(self.stream)
            self.event = EventOverlap(event)
        elif self.stream != self._caller:
            self._caller.wait_stream(self.stream)
        if self.is_capturing:
            return  # one stream, and torch keeps a graph's memory
        # Memory goes back to the stream that it is of, when the last reference is gone: the other one may not be done.
        for tensor in self._owned:
            tensor.record_stream(self._caller)  # where the user may read it
        if not self._allocates_on_caller:
            for tensor in self._results:
                tensor.record_stream(self._caller)
        elif self._arguments.async_finish:
            for tensor in self._results:
                tensor.record_stream(self.stream)
        if self._arguments.async_finish or not self._allocates_on_caller:
            for tensor in self._inputs:
                tensor.record_stream(self.stream)
