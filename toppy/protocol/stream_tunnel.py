"""What one TCP tunnel keeps between reads, on either end and in either framing: pure.

TCP's FIN and RST are told apart on the way: a FINAL_DATA capsule (``connect-tcp``) or the end of
the stream (classic CONNECT) is a FIN, everything else that ends a stream is a RST.
"""

from __future__ import annotations

from typing import Final

from toppy.errors import DatagramError, LocalError, PeerError, ResourceLimitError
from toppy.wire.capsule import (
    AUTHORIZATION,
    DATAGRAM,
    MAX_AUTHORIZATION_BYTES,
    MAX_TUNNEL_CLOSED_BYTES,
    TUNNEL_CLOSED,
    WRAP_UP,
    StreamCapsuleParser,
)
from toppy.wire.connect_tcp import (
    DATA,
    FINAL_DATA,
    HEADROOM_BYTES,
    StreamFraming,
    encode_data_header,
    encode_final_data,
)

Buffer = bytes | bytearray | memoryview
Piece = bytes | memoryview

RESET_CODE: Final = 0x010F
"""H3_CONNECT_ERROR (RFC 9114 section 8.1): the TCP connection was reset, or broke."""

_STREAMED: Final = frozenset({DATA, FINAL_DATA, DATAGRAM})
_GATEWAY_BOUNDS: Final = {WRAP_UP: 0, AUTHORIZATION: MAX_AUTHORIZATION_BYTES}
_CLIENT_BOUNDS: Final = {WRAP_UP: 0, TUNNEL_CLOSED: MAX_TUNNEL_CLOSED_BYTES}


class TruncatedStreamError(PeerError):
    """The stream ended without FINAL_DATA: what has come is not all that was to come."""

    h3_error_code = RESET_CODE


class StreamTunnel:
    """Payload out of a request stream's body, and into it; and when each direction ends.

    The caller moves the bytes, resets streams and sockets, and holds back whoever is too fast.
    """

    __slots__ = (
        "_has_body_ended",
        "_has_peer_finished",
        "_has_taken_end",
        "_held",
        "_hold_bytes",
        "_is_client",
        "_parser",
        "authorization",
        "closed_because",
        "framing",
        "has_finished",
        "is_open",
        "is_wrapping_up",
    )

    def __init__(self, framing: StreamFraming, *, is_client: bool, hold_bytes: int) -> None:
        """``hold_bytes``: how much payload may wait until the tunnel is open."""
        self.framing = framing
        self.is_open = False
        self.has_finished = False
        """Our TCP side has said FIN."""
        self.is_wrapping_up = False
        """Client: the gateway intends to end this stream."""
        self.closed_because: str | None = None
        """Client: the Proxy-Status with which the gateway ends the tunnel."""
        self.authorization: str | None = None
        """Gateway: a newer token for this tunnel, until the caller takes it from here."""
        self._is_client = is_client
        self._hold_bytes = hold_bytes
        self._held = bytearray()
        self._has_peer_finished = False
        self._has_body_ended = False
        self._has_taken_end = False
        self._parser = (
            StreamCapsuleParser(_STREAMED, _CLIENT_BOUNDS if is_client else _GATEWAY_BOUNDS)
            if framing is StreamFraming.CAPSULES
            else None
        )

    @property
    def has_peer_finished(self) -> bool:
        """Nothing more comes after what ``receive_body`` and ``open`` have returned: FIN."""
        return self._has_peer_finished and self.is_open

    @property
    def held_bytes(self) -> int:
        """Payload that waits until the tunnel is open."""
        return len(self._held)

    @property
    def skipped(self) -> int:
        """Capsules of unknown types so far."""
        return self._parser.skipped if self._parser is not None else 0

    def open(self) -> list[Piece]:
        """The tunnel is open; returns what was held, in order."""
        self.is_open = True
        held, self._held = bytes(self._held), bytearray()
        return [held] if held else []

    def receive_body(self, data: bytes, *, ended: bool) -> list[Piece]:
        """Payload to write to TCP, in order: views of ``data``. None while it is held.

        Raises ``TruncatedStreamError`` when the stream ends before FINAL_DATA, ``DatagramError``
        for an HTTP Datagram, which has no meaning here (RFC 9297 section 2), ``ResourceLimitError``
        beyond ``hold_bytes``, and ``PeerError`` for capsules that may not be: payload after
        FINAL_DATA, one cut off by the end, WRAP_UP where it may not be.
        """
        if self._has_body_ended:
            raise LocalError("the body of this stream has ended")
        self._has_body_ended = ended
        if self._parser is None:
            pieces: list[Piece] = [data] if data else []
            self._has_peer_finished = ended
        else:
            pieces = self._receive_capsules(self._parser, data)
            if ended:
                self._parser.receive_end()
                if not self._has_peer_finished:
                    raise TruncatedStreamError("the stream ended without FINAL_DATA")
        if self.is_open:
            return pieces
        for piece in pieces:  # copied: a small view would keep all that it came with
            self._held += piece
        if len(self._held) > self._hold_bytes:
            raise ResourceLimitError(
                f"{len(self._held)} bytes came before the tunnel was open, at most "
                f"{self._hold_bytes} wait"
            )
        return []

    def _receive_capsules(self, parser: StreamCapsuleParser, data: bytes) -> list[Piece]:
        pieces: list[Piece] = []
        for capsule_type, value, is_whole in parser.receive(data):
            if capsule_type in (DATA, FINAL_DATA):
                if self._has_peer_finished:
                    raise PeerError("nothing may follow FINAL_DATA")
                if value:
                    pieces.append(value)
                if is_whole and capsule_type == FINAL_DATA:
                    self._has_peer_finished = True
            elif capsule_type == DATAGRAM:
                raise DatagramError("a TCP tunnel has no datagrams")
            else:
                self._receive_notice(capsule_type, value)
        return pieces

    def _receive_notice(self, capsule_type: int, value: Piece) -> None:
        if capsule_type == WRAP_UP:
            if not self._is_client:
                raise PeerError("a client may not send WRAP_UP")
            if self.is_wrapping_up:
                raise PeerError("WRAP_UP comes once")
            self.is_wrapping_up = True
            return
        # what is not ASCII is neither a token that anybody would take nor a Proxy-Status
        text = bytes(value).decode("ascii", "replace")
        if capsule_type == AUTHORIZATION:
            self.authorization = text
        else:
            self.closed_because = text

    def send(self, payload: Buffer) -> Buffer:
        """Body bytes that carry ``payload``; copied in capsules, the same object otherwise."""
        self._check_sending()
        if self._parser is None or not payload:
            return payload
        return b"".join((encode_data_header(len(payload)), payload))

    def send_placed(self, buffer: memoryview, payload_bytes: int) -> memoryview:
        """Body bytes that carry the payload at ``buffer[HEADROOM_BYTES:]``, without a copy.

        ``buffer`` is writable bytes, 1 GiB at most; what stands before the payload is overwritten.
        The view that is returned is good until the buffer is used again.
        """
        self._check_sending()
        end = HEADROOM_BYTES + payload_bytes
        if self._parser is None or not payload_bytes:
            return buffer[HEADROOM_BYTES:end]
        header = encode_data_header(payload_bytes)
        start = HEADROOM_BYTES - len(header)
        buffer[start:HEADROOM_BYTES] = header
        return buffer[start:end]

    def finish(self) -> bytes:
        """TCP said FIN: the body bytes that say so. ``take_end`` tells whether the stream ends."""
        self._check_sending()
        self.has_finished = True
        return encode_final_data() if self._parser is not None else b""

    def _check_sending(self) -> None:
        if self.has_finished:
            raise LocalError("this direction has finished")

    def take_end(self) -> bool:
        """Whether to end our side of the stream now; true once.

        In capsules that is when both directions have finished: until then TCP may still break, and
        a stream that has ended could not tell (draft, "Closing Connections").
        """
        if self._has_taken_end or not self.has_finished:
            return False
        self._has_taken_end = self._parser is None or self.has_peer_finished
        return self._has_taken_end
