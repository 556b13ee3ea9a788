"""The Capsule Protocol (RFC 9297 section 3): types, lengths and values on a stream."""

from __future__ import annotations

from dataclasses import dataclass

from toppy.errors import DatagramError, PeerError
from toppy.wire.varint import encode_varint, read_varint

DATAGRAM = 0x00
"""RFC 9297 section 3.5."""
_HEADER_BYTES = 16


@dataclass(frozen=True, slots=True)
class Capsule:
    """A whole capsule of a known type."""

    capsule_type: int
    value: bytes


def encode_capsule(capsule_type: int, value: bytes) -> bytes:
    """One capsule."""
    return encode_varint(capsule_type) + encode_varint(len(value)) + value


class CapsuleParser:
    """Cuts a stream into capsules, whatever its chunks.

    A known type whose declared length exceeds ``max_value_bytes`` is refused before a byte of it
    is buffered; unknown types are skipped without being buffered (RFC 9297 section 3.2).
    """

    def __init__(
        self, max_value_bytes: int, known_types: frozenset[int] = frozenset({DATAGRAM})
    ) -> None:
        self._max_value_bytes = max_value_bytes
        self._known_types = known_types
        self._header = b""
        self._type: int | None = None
        self._remaining = 0
        self._chunks: list[bytes] = []
        self.skipped = 0
        """Capsules of unknown types so far."""

    def receive(self, data: bytes) -> list[Capsule]:
        """Capsules that ``data`` completes. Raises ``DatagramError`` for one that is too large."""
        capsules: list[Capsule] = []
        offset = 0
        while True:
            if self._type is None:
                found = self._read_header(data, offset)
                if found is None:
                    return capsules
                offset = found
            taken = min(self._remaining, len(data) - offset)
            if self._type in self._known_types and taken:
                self._chunks.append(data[offset : offset + taken])
            offset += taken
            self._remaining -= taken
            if self._remaining:
                return capsules
            if self._type in self._known_types:
                assert self._type is not None
                capsules.append(Capsule(self._type, b"".join(self._chunks)))
                self._chunks.clear()
            self._type = None

    def _read_header(self, data: bytes, offset: int) -> int | None:
        """Read type and length; the offset behind them in ``data``, or None when it ends before."""
        pending = len(self._header)
        head = self._header + data[offset : offset + _HEADER_BYTES - pending]
        kind = read_varint(head)
        length = read_varint(head, kind[1]) if kind is not None else None
        if kind is None or length is None:
            self._header = head
            return None
        self._header = b""
        self._type, self._remaining = kind[0], length[0]
        if self._type not in self._known_types:
            self.skipped += 1
        elif self._remaining > self._max_value_bytes:
            raise DatagramError(
                f"a capsule of {self._remaining} bytes is too large, "
                f"at most {self._max_value_bytes} are taken"
            )
        return offset + length[1] - pending

    def receive_end(self) -> None:
        """The stream ended. Raises ``PeerError`` when that was in the middle of a capsule."""
        if self._type is not None or self._header:
            raise PeerError("the stream ended in the middle of a capsule")
