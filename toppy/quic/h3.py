"""HTTP/3 for one connection of either engine: aioquic's ``H3Connection`` over our engine interface.

Bounds what aioquic leaves open: the size of a header section before it is buffered, QPACK's
dynamic table (not offered: a small table lets one byte on the wire stand for kilobytes), and
streams that were given up on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pylsqpack
from aioquic.h3.connection import FrameType, H3Connection, H3Stream, HeadersState
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic import events as quic_events

from toppy.errors import PeerError
from toppy.quic.data_frames import encode_data_header, split_data_frames
from toppy.quic.engine import (
    Buffer,
    Engine,
    Event,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)
from toppy.quic.goaway import GoawayReader, encode_goaway

Headers = Sequence[tuple[bytes, bytes]]

H3_NO_ERROR: Final = 0x100
H3_GENERAL_PROTOCOL_ERROR: Final = 0x101
H3_INTERNAL_ERROR: Final = 0x102
H3_EXCESSIVE_LOAD: Final = 0x107
H3_REQUEST_REJECTED: Final = 0x10B
H3_REQUEST_CANCELLED: Final = 0x10C
H3_MESSAGE_ERROR: Final = 0x10E
H3_CONNECT_ERROR: Final = 0x10F

_SETTINGS_ENABLE_CONNECT_PROTOCOL: Final = 0x8  # RFC 9220 section 5
_SETTINGS_H3_DATAGRAM: Final = 0x33  # RFC 9297 section 5.1
_SETTINGS_MAX_FIELD_SECTION_SIZE: Final = 0x6  # RFC 9114 section 7.2.4.1
_BUFFERED_FRAMES: Final = (0x1, 0x4, 0x5, 0xD)
"""HEADERS, SETTINGS, PUSH_PROMISE, MAX_PUSH_ID: aioquic buffers these whole."""
_CONTROL_BUFFER_BYTES: Final = 4096
"""What the control and QPACK streams may hold unparsed; a SETTINGS frame is far smaller."""
_FRUITLESS_BYTES: Final = 256 * 1024
"""Stream bytes that lead to no event (settings, ignored frames, parts of header sections) that a
connection may send in its life: a flood of empty frames costs the receiver more than the sender."""
_SMALL_BODY_BYTES: Final = 4096
"""Up to this, copying the content behind its frame header is cheaper than a call for each."""


@dataclass(frozen=True, slots=True)
class _Configuration:
    is_client: bool


class _QuicFacade:
    """The few calls of aioquic's ``QuicConnection`` that its ``H3Connection`` makes."""

    def __init__(self, engine: Engine, connection: int, *, is_client: bool) -> None:
        self.configuration = _Configuration(is_client)
        self._quic_logger = None
        self._engine = engine
        self._connection = connection
        self.closing: tuple[int, str] | None = None

    @property
    def _remote_max_datagram_frame_size(self) -> int | None:
        return 65535 if self._engine.supports_datagrams(self._connection) else None

    def get_next_available_stream_id(self, is_unidirectional: bool = False) -> int:
        stream_id = self._engine.open_stream(self._connection, is_unidirectional=is_unidirectional)
        if stream_id is None:
            raise PeerError("the peer allows too few streams for HTTP/3")
        return stream_id

    def send_stream_data(self, stream_id: int, data: bytes, end_stream: bool = False) -> None:
        if data or end_stream:
            self._engine.send_stream(self._connection, stream_id, data, end=end_stream)

    def reset_stream(self, stream_id: int, error_code: int) -> None:
        self._engine.reset_stream(self._connection, stream_id, error_code)

    def stop_stream(self, stream_id: int, error_code: int) -> None:
        self._engine.stop_stream(self._connection, stream_id, error_code)

    def close(self, error_code: int = H3_NO_ERROR, reason_phrase: str = "") -> None:
        self.closing = (int(error_code), reason_phrase)


class _BoundedH3Connection(H3Connection):
    """``H3Connection`` with our settings."""

    def __init__(self, quic: _QuicFacade, max_header_bytes: int) -> None:
        self._max_header_bytes = max_header_bytes
        super().__init__(quic)  # type: ignore[arg-type]  # the facade has all that is called
        self._decoder = pylsqpack.Decoder(0, 0)

    def _get_local_settings(self) -> dict[int, int]:
        settings = {
            _SETTINGS_MAX_FIELD_SECTION_SIZE: self._max_header_bytes,
            _SETTINGS_H3_DATAGRAM: 1,
        }
        if not self._is_client:
            settings[_SETTINGS_ENABLE_CONNECT_PROTOCOL] = 1
        return settings


class Http3Session:
    """HTTP/3 on one connection. Feed it the engine's stream events; it answers with HTTP events.

    Raises ``PeerError`` at birth when the peer allows too few streams. Later, ``closing`` says that
    the connection must be closed, and why.
    """

    def __init__(
        self,
        engine: Engine,
        connection: int,
        given_up: set[tuple[int, int]],
        *,
        is_client: bool,
        max_header_bytes: int,
    ) -> None:
        """``given_up`` collects (connection, stream ID) of streams that are read no more."""
        self._engine = engine
        self._connection = connection
        self._max_header_bytes = max_header_bytes
        self._quic = _QuicFacade(engine, connection, is_client=is_client)
        self._h3 = _BoundedH3Connection(self._quic, max_header_bytes)
        self._given_up = given_up
        self._fruitless_bytes = 0
        self._is_client = is_client
        self._control = GoawayReader(is_client=is_client)
        self._next_request = 0
        """Server: above every request stream that the client has used."""
        self.first_rejected: int | None = None
        """Requests on this stream and above are not served: a GOAWAY was sent, or received."""

    @property
    def closing(self) -> tuple[int, str] | None:
        """(HTTP/3 error code, reason) once the peer broke a rule of the connection."""
        return self._quic.closing

    @property
    def has_settings(self) -> bool:
        """Whether the peer's SETTINGS have arrived."""
        return self._h3.received_settings is not None

    @property
    def may_connect(self) -> bool:
        """Whether the peer takes Extended CONNECT requests (RFC 9220 section 3)."""
        return (self._h3.received_settings or {}).get(_SETTINGS_ENABLE_CONNECT_PROTOCOL) == 1

    @property
    def may_send_datagrams(self) -> bool:
        """Whether HTTP Datagrams may travel in DATAGRAM frames (RFC 9297 section 2.1.1)."""
        return (self._h3.received_settings or {}).get(
            _SETTINGS_H3_DATAGRAM
        ) == 1 and self._engine.supports_datagrams(self._connection)

    def receive(self, event: Event) -> list[HeadersReceived | DataReceived]:
        """HTTP events (aioquic's ``HeadersReceived`` and ``DataReceived``) that ``event`` makes."""
        match event:
            case StreamDataReceived(stream_id=stream_id, data=data, ended=ended):
                if self.is_rejected(stream_id):
                    self.abort(stream_id, H3_REQUEST_REJECTED)
                    self._count_fruitless(len(data))
                    return []
                stream = self._h3._stream.get(stream_id)
                if stream is not None and _is_in_body(stream):
                    happened = self._receive_body(stream, data, ended=ended)
                else:
                    happened = self._receive_frames(stream_id, data, ended=ended)
                if not happened:
                    self._count_fruitless(len(data))
                return happened
            case StreamReset(stream_id=stream_id) | StopSendingReceived(stream_id=stream_id) if (
                self.is_rejected(stream_id)
            ):
                pass
            case StreamReset(stream_id=stream_id, error_code=code):
                self._h3.handle_event(quic_events.StreamReset(error_code=code, stream_id=stream_id))
            case StopSendingReceived(stream_id=stream_id, error_code=code):
                self._h3.handle_event(
                    quic_events.StopSendingReceived(error_code=code, stream_id=stream_id)
                )
            case _:
                pass
        return []

    def _receive_body(
        self, stream: H3Stream, data: bytes, *, ended: bool
    ) -> list[HeadersReceived | DataReceived]:
        """Bytes behind a header section: mostly DATA frames, and the rest is for aioquic."""
        if stream.buffer:
            data = stream.buffer + data
            stream.buffer = b""
        content, left, used = split_data_frames(data, stream.frame_size or 0)
        stream.content_length += len(content)
        stream.frame_size = left or None
        stream.frame_type = FrameType.DATA if left else None
        happened: list[HeadersReceived | DataReceived] = []
        if used < len(data) or ended:
            happened = self._receive_frames(stream.stream_id, data[used:], ended=ended)
        if not content:
            return happened
        if happened and isinstance(happened[0], DataReceived):
            happened[0].data = content + happened[0].data
            return happened
        return [
            DataReceived(data=content, stream_id=stream.stream_id, stream_ended=False),
            *happened,
        ]

    def _receive_frames(
        self, stream_id: int, data: bytes, *, ended: bool
    ) -> list[HeadersReceived | DataReceived]:
        unread = self._unread_of_new_stream(stream_id)
        happened = self._h3.handle_event(
            quic_events.StreamDataReceived(data=data, end_stream=ended, stream_id=stream_id)
        )
        self._check_buffer(stream_id)
        if stream_id == self._h3._peer_control_stream_id and self._quic.closing is None:
            self._receive_control(unread + data)
        return [e for e in happened if isinstance(e, HeadersReceived | DataReceived)]

    def _count_fruitless(self, size: int) -> None:
        self._fruitless_bytes += size
        if self._fruitless_bytes > _FRUITLESS_BYTES:
            self._quic.closing = (H3_EXCESSIVE_LOAD, "too many bytes without use")

    def _unread_of_new_stream(self, stream_id: int) -> bytes:
        """What aioquic holds of a stream whose type it does not know yet."""
        if self._h3._peer_control_stream_id is not None or stream_id % 4 < 2:
            return b""
        stream = self._h3._stream.get(stream_id)
        return stream.buffer if stream is not None and stream.stream_type is None else b""

    def _receive_control(self, data: bytes) -> None:
        try:
            found = self._control.receive(data)
        except PeerError as error:
            self._quic.closing = (error.h3_error_code, str(error))
            return
        if found and self._is_client:  # a client's GOAWAY is about pushes: there are none
            self.first_rejected = found[-1]

    def is_rejected(self, stream_id: int) -> bool:
        """Server: whether a GOAWAY has ruled this request out."""
        if self._is_client or stream_id % 4:
            return False
        if self.first_rejected is not None:
            return stream_id >= self.first_rejected
        self._next_request = max(self._next_request, stream_id + 4)
        return False

    def send_goaway(self) -> None:
        """Serve no request that has not begun to arrive (server, RFC 9114 section 5.2). Those that
        come nevertheless are reset with H3_REQUEST_REJECTED.
        """
        control = self._h3._local_control_stream_id
        if self.first_rejected is not None or control is None:
            return
        self.first_rejected = self._next_request
        self._quic.send_stream_data(control, encode_goaway(self.first_rejected))

    def open_request(self, headers: Headers) -> int | None:
        """Send request headers on a new stream; its ID, or None while no stream may be opened, and
        after a GOAWAY.
        """
        if self.first_rejected is not None:
            return None
        stream_id = self._engine.open_stream(self._connection)
        if stream_id is not None:
            self._h3.send_headers(stream_id, list(headers))
        return stream_id

    def send_headers(self, stream_id: int, headers: Headers, *, end: bool) -> None:
        """Answer a request. A stream that is no longer open is left alone."""
        if not self._is_sendable(stream_id):
            return
        self._h3.send_headers(stream_id, list(headers), end)

    def send_data(self, stream_id: int, data: Buffer, *, end: bool) -> None:
        """Send body bytes in a DATA frame. A stream no longer open is left alone, and one whose
        header section was not sent.
        """
        stream = self._h3._stream.get(stream_id)
        if (
            stream is None
            or stream.sending_ended
            or stream.headers_send_state != HeadersState.AFTER_HEADERS
        ):
            return
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        if size:
            header = encode_data_header(size)
            if size <= _SMALL_BODY_BYTES:
                data = header + data
            else:
                self._engine.send_stream(self._connection, stream_id, header)
        if size or end:
            self._engine.send_stream(self._connection, stream_id, data, end=end)
        if end:
            self._end_sending(stream)

    def _is_sendable(self, stream_id: int) -> bool:
        # aioquic forgets a stream when both directions have ended, and would make a new one
        stream = self._h3._stream.get(stream_id)
        return stream is not None and not stream.sending_ended

    def _end_sending(self, stream: H3Stream) -> None:
        stream.sending_ended = True
        if stream.is_ended():
            del self._h3._stream[stream.stream_id]

    def reset_sending(self, stream_id: int, error_code: int) -> None:
        """Abandon what we send on a request stream; what the peer sends still arrives."""
        self._engine.reset_stream(self._connection, stream_id, error_code)
        stream = self._h3._stream.get(stream_id)
        if stream is not None:
            self._end_sending(stream)

    def stop_reading(self, stream_id: int, error_code: int) -> None:
        """Read no more of a request stream; what was sent on it still arrives."""
        stream = self._h3._stream.get(stream_id)
        if stream is None or stream.receiving_ended:
            return
        self._engine.stop_stream(self._connection, stream_id, error_code)
        self._given_up.add((self._connection, stream_id))
        stream.receiving_ended = True
        stream.buffer = b""
        if stream.is_ended():
            del self._h3._stream[stream_id]

    def abort(self, stream_id: int, error_code: int) -> None:
        """Reset both directions of a request stream and forget it."""
        stream = self._h3._stream.pop(stream_id, None)
        self._engine.reset_stream(self._connection, stream_id, error_code)
        if stream is None or not stream.receiving_ended:
            self._engine.stop_stream(self._connection, stream_id, error_code)
            self._given_up.add((self._connection, stream_id))

    def _check_buffer(self, stream_id: int) -> None:
        """Refuse a header section by its declared length, before it is buffered."""
        stream = self._h3._stream.get(stream_id)
        if stream is None:
            return
        is_request = stream_id % 4 == 0
        bound = self._max_header_bytes if is_request else _CONTROL_BUFFER_BYTES
        declared = 0
        if stream.frame_size is not None and stream.frame_type in _BUFFERED_FRAMES:
            declared = stream.frame_size
        if len(stream.buffer) > bound or declared > bound:
            if is_request:
                self.abort(stream_id, H3_EXCESSIVE_LOAD)
            else:
                self._quic.closing = (H3_EXCESSIVE_LOAD, "a control frame is too large")


def _is_in_body(stream: H3Stream) -> bool:
    """Whether aioquic holds nothing of a request stream but the beginning of a frame header, behind
    its header section: the next bytes are content, or begin a frame.
    """
    return (
        stream.headers_recv_state == HeadersState.AFTER_HEADERS
        and not stream.blocked
        and (stream.frame_type is None or stream.frame_type == FrameType.DATA)
        and not (stream.buffer and stream.frame_size is not None)
    )
