"""`EventOverlap`: the event that asynchronous calls return, and that they accept as `previous_event`."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch


class EventOverlap:
    """An event that a stream can wait for; also a context manager that waits when the block ends.

    On CUDA it holds a `torch.Event`. On CPU there are no streams: a call has finished when it returns, the event is
    already reached, and waiting for it does nothing.

    Example:
        recv_x, *_, event = buffer.dispatch(x, handle=handle, async_finish=True)
        with event:
            y = other_work()      # runs while tokens travel
        use(recv_x)               # the current stream has waited
    """

    def __init__(self, event: torch.Event | None = None, check: Callable[[], None] | None = None) -> None:
        self.event = event
        self._check = check  # raises what is already known to have gone wrong with the call

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the event. Does not block the CPU.

        Raises:
            PeerTimeoutError: the call is already known to have waited too long for a peer.
        """
        if self._check is not None:
            self._check()
        if isinstance(self.event, torch.cuda.Event):  # of the buffer's GPU, which need not be the current one
            self.event.wait(torch.cuda.current_stream(self.event.device))
        elif self.event is not None:
            self.event.wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.current_stream_wait()
