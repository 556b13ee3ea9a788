"""The Capsule Protocol (RFC 9297 section 3): types, lengths and values on a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toppy.errors import DatagramError, PeerError
from toppy.wire.varint import MAX_VARINT, encode_varint, read_varint

DATAGRAM = 0x00
"""RFC 9297 section 3.5."""
WRAP_UP = 0x272DDA5E
"""Empty, gateway to client, at most once (draft-ietf-httpbis-wrap-up, provisional number): the
gateway intends to end this stream."""
TUNNEL_CLOSED = 0x1A709941
"""Ours, gateway to client, the last capsule of its stream: a Proxy-Status (RFC 9209) that says why
the gateway ends an open tunnel. Others skip it (RFC 9297 section 3.2)."""
MAX_TUNNEL_CLOSED_BYTES = 1024
BARRIER = 0x1A70996A
"""Ours, empty: the gateway sends it back when everything before it has gone to the target. A client
that moves a tunnel to another connection learns from a first one when to go on there without
overtaking anything, and from a second one that the answers to all that have come."""
MOST_BARRIERS = 2
"""A gateway answers so many per tunnel."""
BARRIER_FIELD = (b"toppy-barrier", b"?1")
"""In a response: this gateway answers BARRIER."""
AUTHORIZATION = 0x1A709A93
"""Ours, client to gateway: a newer bearer token for a tunnel that is open. The gateway lets the
tunnel live as long as that token does, if it would grant the tunnel to it; otherwise nothing
changes. Others skip it."""
MAX_AUTHORIZATION_BYTES = 8192
RENEWAL_FIELD = (b"toppy-renewal", b"?1")
"""In a response: this gateway takes AUTHORIZATION."""
_HEADER_BYTES = 16


@dataclass(frozen=True, slots=True)
class Capsule:
    """A whole capsule of a known type."""

    capsule_type: int
    value: bytes


def encode_capsule(capsule_type: int, value: bytes) -> bytes:
    """One capsule."""
    return encode_varint(capsule_type) + encode_varint(len(value)) + value


def encode_wrap_up() -> bytes:
    """A WRAP_UP capsule."""
    return encode_capsule(WRAP_UP, b"")


def encode_barrier() -> bytes:
    """A BARRIER capsule."""
    return encode_capsule(BARRIER, b"")


def encode_authorization(token: str) -> bytes:
    """An AUTHORIZATION capsule; ``token`` is printable ASCII."""
    return encode_capsule(AUTHORIZATION, token.encode("ascii"))


def encode_tunnel_closed(proxy_status: str) -> bytes:
    """A TUNNEL_CLOSED capsule; a Proxy-Status beyond 1,024 bytes is cut."""
    value = proxy_status.encode("ascii", "replace")[:MAX_TUNNEL_CLOSED_BYTES]
    return encode_capsule(TUNNEL_CLOSED, value)


class _HeaderReader:
    """Reads types and lengths, whatever the chunks, and keeps at most one unfinished header.

    A type of ``bounds`` whose declared length exceeds its bound is refused before a byte of its
    value is taken, and so is everything after it.
    """

    _refusal_class: type[PeerError] = PeerError

    def __init__(self, bounds: Mapping[int, int]) -> None:
        self._bounds = bounds
        self._header = b""
        self._type: int | None = None
        self._remaining = 0
        self._value = bytearray()
        self._refusal = ""
        self.skipped = 0
        """Capsules of unknown types so far."""

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
        bound = self._bounds.get(self._type)
        if bound is None:
            self.skipped += 1
        elif self._remaining > bound:
            self._refusal = (
                f"a capsule of {self._remaining} bytes is too large, at most {bound} are taken"
            )
            raise self._refusal_class(self._refusal)
        return offset + length[1] - pending

    def receive_end(self) -> None:
        """The stream ended. Raises ``PeerError`` when that was in the middle of a capsule."""
        if self._type is not None or self._header:
            raise PeerError("the stream ended in the middle of a capsule")


class CapsuleParser(_HeaderReader):
    """Cuts a stream into capsules, whatever its chunks.

    A known type whose declared length exceeds ``max_value_bytes`` is refused before a byte of it
    is buffered, and so is everything after it; unknown types are skipped without being buffered,
    whatever their length (RFC 9297 section 3.2). Keeps at most one unfinished value.
    """

    _refusal_class = DatagramError

    def __init__(
        self, max_value_bytes: int, known_types: frozenset[int] = frozenset({DATAGRAM})
    ) -> None:
        super().__init__(dict.fromkeys(known_types, max_value_bytes))

    def receive(self, data: bytes) -> list[Capsule]:
        """Capsules that ``data`` completes. Raises ``DatagramError`` for one that is too large."""
        if self._refusal:
            raise DatagramError(self._refusal)
        capsules: list[Capsule] = []
        offset = 0
        while True:
            if self._type is None:
                found = self._read_header(data, offset)
                if found is None:
                    return capsules
                offset = found
            assert self._type is not None
            taken = data[offset : offset + self._remaining]
            offset += len(taken)
            self._remaining -= len(taken)
            if self._type in self._bounds:
                if self._remaining or self._value:
                    self._value += taken
                if not self._remaining:
                    capsules.append(Capsule(self._type, bytes(self._value) or taken))
                    self._value = bytearray()
            if self._remaining:
                return capsules
            self._type = None


CapsulePiece = tuple[int, bytes | memoryview, bool]
"""(type, value or the next part of it, whether the capsule ends with it)."""


class StreamCapsuleParser(_HeaderReader):
    """Cuts a stream whose payload travels in capsules of any length.

    Values of ``streamed_types`` are handed on as they come, without a copy and without waiting for
    their end. Those of the types in ``bounds`` come whole, and may have so many bytes at most;
    all others are skipped (RFC 9297 section 3.2).
    """

    def __init__(self, streamed_types: frozenset[int], bounds: Mapping[int, int]) -> None:
        super().__init__({**bounds, **dict.fromkeys(streamed_types, MAX_VARINT)})
        self._streamed_types = streamed_types

    def receive(self, data: bytes) -> list[CapsulePiece]:
        """What ``data`` brings, as views of it. Raises ``PeerError`` for a capsule too large."""
        if self._refusal:
            raise PeerError(self._refusal)
        pieces: list[CapsulePiece] = []
        size = len(data)
        offset = 0
        while True:
            if self._type is None:
                found = self._read_header(data, offset)
                if found is None:
                    return pieces
                offset = found
            assert self._type is not None
            end = min(offset + self._remaining, size)
            self._remaining -= end - offset
            is_whole = not self._remaining
            if self._type in self._streamed_types:
                if end > offset or is_whole:
                    part = memoryview(data)[offset:end] if end - offset < size else data
                    pieces.append((self._type, part, is_whole))
            elif self._type in self._bounds:
                self._value += data[offset:end]
                if is_whole:
                    pieces.append((self._type, bytes(self._value), True))
                    self._value = bytearray()
            offset = end
            if not is_whole:
                return pieces
            self._type = None
