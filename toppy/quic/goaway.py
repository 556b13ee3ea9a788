"""GOAWAY on a control stream (RFC 9114 sections 5.2 and 7.2.6), which aioquic's HTTP/3 skips."""

from __future__ import annotations

from typing import ClassVar, Final

from toppy.errors import PeerError
from toppy.wire.varint import encode_varint, read_varint

_GOAWAY: Final = 0x07
_HEADER_BYTES: Final = 16
_MAX_ID_BYTES: Final = 8


class GoawayFrameError(PeerError):
    """A GOAWAY frame that is not exactly one integer."""

    h3_error_code: ClassVar[int] = 0x106  # H3_FRAME_ERROR


class GoawayIdError(PeerError):
    """A GOAWAY frame whose ID is no request stream, or larger than the one before."""

    h3_error_code: ClassVar[int] = 0x108  # H3_ID_ERROR


def encode_goaway(identifier: int) -> bytes:
    """A GOAWAY frame; from a gateway, ``identifier`` is the first request stream not served."""
    value = encode_varint(identifier)
    return encode_varint(_GOAWAY) + encode_varint(len(value)) + value


class GoawayReader:
    """Finds the GOAWAY frames of the peer's control stream, whatever its chunks.

    Feed it the stream from its first byte, the stream type. Every other frame is skipped by its
    length: whether it may be there is somebody else's question. Keeps at most one unfinished
    frame header or ID. After an error it reads no more.
    """

    def __init__(self, *, is_client: bool) -> None:
        self._is_client = is_client
        self._has_type = False
        self._pending = b""
        self._to_skip = 0
        self._id_bytes: int | None = None
        self._last: int | None = None

    def receive(self, data: bytes) -> list[int]:
        """The IDs of GOAWAY frames that ``data`` completes. Raises ``GoawayFrameError`` and
        ``GoawayIdError``.
        """
        found: list[int] = []
        offset = 0
        while True:
            skipped = min(self._to_skip, len(data) - offset)
            self._to_skip -= skipped
            offset += skipped
            if offset == len(data):
                return found
            kept = len(self._pending)
            head = self._pending + data[offset : offset + _HEADER_BYTES - kept]
            used = self._read(head, found)
            if used is None:
                self._pending = head
                return found
            self._pending = b""
            offset += used - kept

    def _read(self, head: bytes, found: list[int]) -> int | None:
        """Read the next element: how long it was, or None while it is not complete."""
        if not self._has_type:
            stream_type = read_varint(head)
            if stream_type is None:
                return None
            self._has_type = True
            return stream_type[1]
        if self._id_bytes is not None:
            if len(head) < self._id_bytes:
                return None
            identifier = read_varint(head[: self._id_bytes])
            if identifier is None or identifier[1] != self._id_bytes:
                raise GoawayFrameError("a GOAWAY frame is not exactly one integer")
            self._id_bytes = None
            found.append(self._check(identifier[0]))
            return identifier[1]
        kind = read_varint(head)
        length = read_varint(head, kind[1]) if kind is not None else None
        if kind is None or length is None:
            return None
        if kind[0] != _GOAWAY:
            self._to_skip = length[0]
        elif not 0 < length[0] <= _MAX_ID_BYTES:
            raise GoawayFrameError(f"a GOAWAY frame has {length[0]} bytes")
        else:
            self._id_bytes = length[0]
        return length[1]

    def _check(self, identifier: int) -> int:
        if self._is_client and identifier % 4:
            raise GoawayIdError(f"GOAWAY names stream {identifier}, which is no request")
        if self._last is not None and identifier > self._last:
            raise GoawayIdError(f"GOAWAY names {identifier} after {self._last}")
        self._last = identifier
        return identifier
