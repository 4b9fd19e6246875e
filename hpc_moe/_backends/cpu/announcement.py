"""`Announcement`: the head of every call's first message."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ...messenger import Bytes

_TEXT_BYTES = 384
_FIELDS = 16
_HEADER = struct.Struct(f"<hhi{_FIELDS}q{_TEXT_BYTES}s")
# Payloads follow the header at this offset, aligned for the vector loads of the packet that they may be.
HEADER_BYTES = -(-_HEADER.size // 64) * 64


@dataclass
class Announcement:
    """Who calls what with which arguments, or why it refuses to.

    Attributes:
        operation: index in `OPERATIONS`.
        fields: values that the operation compares or uses.
        rejection: empty, or why the rank rejected its own arguments.
    """

    operation: int
    fields: tuple[int, ...] = ()
    rejection: str = ""

    def write(self, message: Bytes) -> None:
        """Write the header into the first `HEADER_BYTES` of a message."""
        fields = self.fields + (0,) * (_FIELDS - len(self.fields))
        text = self.rejection.encode()[:_TEXT_BYTES]
        _HEADER.pack_into(message.data, 0, self.operation, 0, len(self.fields), *fields, text)

    @staticmethod
    def read(message: Bytes) -> Announcement:
        """The announcement at the start of a message."""
        operation, _, count, *rest = _HEADER.unpack_from(message.data, 0)
        return Announcement(operation, tuple(rest[:count]), rest[-1].rstrip(b"\0").decode(errors="replace"))
