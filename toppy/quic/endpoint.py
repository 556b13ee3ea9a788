"""One UDP port's QUIC connections as HTTP/3: an engine below, an ``Http3Session`` per connection.

Sans-I/O, for gateway and client alike. Feed ``receive`` and ``handle_timeout``; then drain
``poll_events``, ``poll_datagrams`` and ``poll_transmits``. A connection whose ALPN is not ``h3``
(``toppy-ping``) hands its stream bytes through as ``RawStreamReceived``.
"""

from __future__ import annotations

from dataclasses import dataclass

from aioquic.h3.events import HeadersReceived as H3HeadersReceived

from toppy.errors import PeerError
from toppy.model.drop_reason import DropReason
from toppy.quic.engine import (
    Address,
    Buffer,
    ConnectionAccepted,
    ConnectionClosed,
    DatagramGroup,
    Engine,
    Event,
    HandshakeCompleted,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
    StreamsAvailable,
    StreamWritable,
    Transmit,
)
from toppy.quic.h3 import (
    H3_EXCESSIVE_LOAD,
    H3_GENERAL_PROTOCOL_ERROR,
    H3_NO_ERROR,
    Headers,
    Http3Session,
)

H3_ALPN = "h3"
PING_ALPN = "toppy-ping"

_FIELD_OVERHEAD_BYTES = 32  # RFC 9114 section 4.2.2


@dataclass(frozen=True, slots=True)
class ConnectionOpened:
    """The handshake is done; on a client with ALPN ``h3``, the gateway's SETTINGS are here too."""

    connection: int
    alpn_protocol: str


@dataclass(frozen=True, slots=True)
class HeadersReceived:
    connection: int
    stream_id: int
    headers: Headers
    ended: bool


@dataclass(frozen=True, slots=True)
class BodyReceived:
    """Bytes of DATA frames, ``READ_TURN_BYTES`` at most: on a tunnel, a stretch of capsules."""

    connection: int
    stream_id: int
    data: bytes
    ended: bool


@dataclass(frozen=True, slots=True)
class StreamAborted:
    """The peer gave the stream up in one direction; for both there are two events."""

    connection: int
    stream_id: int
    error_code: int
    is_sending: bool = False
    """False: it reset what it sends, and nothing more comes (RESET_STREAM). True: it reads no more
    of what we send, and our side was reset (STOP_SENDING). The other direction may go on."""


@dataclass(frozen=True, slots=True)
class GoawayReceived:
    """Client: the gateway takes no new requests on this connection (RFC 9114 section 5.2)."""

    connection: int
    first_rejected: int
    """Requests on this stream and above were not, and will not be, served."""


@dataclass(frozen=True, slots=True)
class RawStreamReceived:
    """Stream bytes of a connection that does not speak HTTP/3."""

    connection: int
    stream_id: int
    data: bytes
    ended: bool


EndpointEvent = (
    ConnectionAccepted
    | ConnectionOpened
    | HeadersReceived
    | BodyReceived
    | StreamAborted
    | GoawayReceived
    | RawStreamReceived
    | StreamWritable
    | StreamsAvailable
    | ConnectionClosed
)


class Endpoint:
    """HTTP/3 over one engine. Unknown connections and streams are left alone, never an error."""

    def __init__(self, engine: Engine, *, is_client: bool, max_header_bytes: int = 16384) -> None:
        self.engine = engine
        self._is_client = is_client
        self._max_header_bytes = max_header_bytes
        self._sessions: dict[int, Http3Session] = {}
        self._awaiting_settings: set[int] = set()
        self._raw_connections: set[int] = set()
        self._events: list[EndpointEvent] = []
        # engines report nothing of a stream once it is stopped, but for what they have already
        self._given_up: set[tuple[int, int]] = set()

    def connect(self, address: Address, server_name: str, now: float) -> int:
        """Begin a connection (client)."""
        return self.engine.connect(address, server_name, now)

    def receive(self, buffer: Buffer, segment_size: int, source: Address, now: float) -> None:
        """See ``Engine.receive``."""
        self.engine.receive(buffer, segment_size, source, now)

    def handle_timeout(self, now: float) -> None:
        """See ``Engine.handle_timeout``."""
        self.engine.handle_timeout(now)

    def next_timeout(self) -> float | None:
        """See ``Engine.next_timeout``."""
        return self.engine.next_timeout()

    def poll_events(self, now: float) -> list[EndpointEvent]:
        """What happened since the last call, in order per connection."""
        for event in self.engine.poll_events():
            self._handle(event, now)
        self._given_up.clear()
        events, self._events = self._events, []
        return events

    def poll_datagrams(self) -> list[DatagramGroup]:
        """See ``Engine.poll_datagrams``. Call it after ``poll_events``: a request's headers and its
        first datagrams may share a packet.
        """
        return self.engine.poll_datagrams()

    def poll_transmits(self, now: float) -> list[Transmit]:
        """See ``Engine.poll_transmits``."""
        return self.engine.poll_transmits(now)

    def take_drops(self) -> dict[DropReason, int]:
        """See ``Engine.take_drops``."""
        return self.engine.take_drops()

    def send_request(self, connection: int, headers: Headers) -> int | None:
        """Open a request stream; None while the connection cannot take one."""
        session = self._sessions.get(connection)
        return session.open_request(headers) if session is not None else None

    def send_headers(
        self, connection: int, stream_id: int, headers: Headers, *, end: bool = False
    ) -> None:
        """Answer a request."""
        session = self._sessions.get(connection)
        if session is not None:
            session.send_headers(stream_id, headers, end=end)

    def send_body(
        self, connection: int, stream_id: int, data: Buffer, *, end: bool = False
    ) -> None:
        """Send a copy of bytes in a DATA frame; ``end`` says that they are the last. Nothing limits
        what waits but the caller, by ``stream_backlog_bytes`` and ``notify_writable``.
        """
        session = self._sessions.get(connection)
        if session is not None:
            session.send_data(stream_id, data, end=end)

    def abort_stream(self, connection: int, stream_id: int, error_code: int) -> None:
        """Reset a request stream in both directions."""
        session = self._sessions.get(connection)
        if session is not None:
            session.abort(stream_id, error_code)

    def reset_sending(self, connection: int, stream_id: int, error_code: int) -> None:
        """Abandon what we send on a request stream (RESET_STREAM); reading goes on."""
        session = self._sessions.get(connection)
        if session is not None:
            session.reset_sending(stream_id, error_code)

    def stop_reading(self, connection: int, stream_id: int, error_code: int = H3_NO_ERROR) -> None:
        """Read no more of a request stream (STOP_SENDING); what was sent on it still arrives. A
        client is not told of H3_NO_ERROR: it says that the answer is complete all the same.
        """
        session = self._sessions.get(connection)
        if session is not None:
            session.stop_reading(stream_id, error_code)

    def stream_backlog_bytes(self, connection: int, stream_id: int) -> int:
        """See ``Engine.stream_backlog_bytes``."""
        return self.engine.stream_backlog_bytes(connection, stream_id)

    def notify_writable(self, connection: int, stream_id: int, below_bytes: int) -> None:
        """See ``Engine.notify_writable``."""
        self.engine.notify_writable(connection, stream_id, below_bytes)

    def pause_reading(self, connection: int, stream_id: int) -> None:
        """See ``Engine.pause_reading``."""
        self.engine.pause_reading(connection, stream_id)

    def resume_reading(self, connection: int, stream_id: int) -> None:
        """See ``Engine.resume_reading``."""
        self.engine.resume_reading(connection, stream_id)

    def widen_connection(self, connection: int, window_bytes: int) -> None:
        """See ``Engine.widen_connection``."""
        self.engine.widen_connection(connection, window_bytes)

    def send_goaway(self, connection: int) -> None:
        """Take no more requests on a connection (gateway): those whose first byte has not arrived
        yet are reset with H3_REQUEST_REJECTED and never become events.
        """
        session = self._sessions.get(connection)
        if session is not None:
            session.send_goaway()

    def may_send_datagrams(self, connection: int) -> bool:
        """Whether the peer takes HTTP Datagrams in DATAGRAM frames; otherwise only capsules."""
        session = self._sessions.get(connection)
        return session is not None and session.may_send_datagrams

    def may_connect(self, connection: int) -> bool:
        """Whether the gateway takes Extended CONNECT."""
        session = self._sessions.get(connection)
        return session is not None and session.may_connect

    def close(self, connection: int, error_code: int, reason: str, now: float) -> None:
        """Close a connection with an HTTP/3 error code; its ``ConnectionClosed`` follows."""
        self.engine.close(connection, error_code, reason, now)

    def _handle(self, event: Event, now: float) -> None:
        match event:
            case ConnectionAccepted() | StreamsAvailable() | StreamWritable():
                self._events.append(event)
            case HandshakeCompleted():
                self._open(event, now)
            case ConnectionClosed(connection=connection):
                self._sessions.pop(connection, None)
                self._awaiting_settings.discard(connection)
                self._raw_connections.discard(connection)
                self._events.append(event)
            case StreamDataReceived() | StreamReset() | StopSendingReceived():
                session = self._sessions.get(event.connection)
                if session is not None:
                    if (event.connection, event.stream_id) not in self._given_up:
                        self._handle_stream(session, event, now)
                elif event.connection in self._raw_connections:
                    self._handle_raw_stream(event)

    def _handle_raw_stream(
        self, event: StreamDataReceived | StreamReset | StopSendingReceived
    ) -> None:
        connection, stream_id = event.connection, event.stream_id
        if isinstance(event, StreamDataReceived):
            self._events.append(RawStreamReceived(connection, stream_id, event.data, event.ended))
        else:
            self._events.append(
                StreamAborted(connection, stream_id, event.error_code, _is_sending(event))
            )

    def _open(self, event: HandshakeCompleted, now: float) -> None:
        connection = event.connection
        if event.alpn_protocol == H3_ALPN:
            try:
                self._sessions[connection] = Http3Session(
                    self.engine,
                    connection,
                    self._given_up,
                    is_client=self._is_client,
                    max_header_bytes=self._max_header_bytes,
                )
            except PeerError as error:
                self.engine.close(connection, H3_GENERAL_PROTOCOL_ERROR, str(error), now)
                return
            if self._is_client:
                self._awaiting_settings.add(connection)
                return
        else:
            self._raw_connections.add(connection)
        self._events.append(ConnectionOpened(connection, event.alpn_protocol))

    def _handle_stream(
        self,
        session: Http3Session,
        event: StreamDataReceived | StreamReset | StopSendingReceived,
        now: float,
    ) -> None:
        connection = event.connection
        first_rejected = session.first_rejected
        for happened in session.receive(event):
            if isinstance(happened, H3HeadersReceived):
                self._receive_headers(session, connection, happened)
            else:
                self._events.append(
                    BodyReceived(
                        connection, happened.stream_id, happened.data, happened.stream_ended
                    )
                )
        if (
            not isinstance(event, StreamDataReceived)
            and event.stream_id % 4 == 0
            and not self._is_early_answer(event)
            and not session.is_rejected(event.stream_id)
        ):
            self._events.append(
                StreamAborted(connection, event.stream_id, event.error_code, _is_sending(event))
            )
        if session.closing is not None:
            error_code, reason = session.closing
            self.engine.close(connection, error_code, reason, now)
            del self._sessions[connection]
        elif connection in self._awaiting_settings and session.has_settings:
            self._awaiting_settings.discard(connection)
            self._events.append(ConnectionOpened(connection, H3_ALPN))
        if self._is_client and session.first_rejected not in (None, first_rejected):
            self._events.append(GoawayReceived(connection, session.first_rejected))

    def _is_early_answer(self, event: StreamReset | StopSendingReceived) -> bool:
        """Whether the gateway only says that it needs no more of the request: its answer, which
        may come behind, is complete and counts (RFC 9114 section 4.1).
        """
        return (
            self._is_client
            and isinstance(event, StopSendingReceived)
            and event.error_code == H3_NO_ERROR
        )

    def _receive_headers(
        self, session: Http3Session, connection: int, event: H3HeadersReceived
    ) -> None:
        size = sum(len(name) + len(value) + _FIELD_OVERHEAD_BYTES for name, value in event.headers)
        if size > self._max_header_bytes:
            session.abort(event.stream_id, H3_EXCESSIVE_LOAD)
            return
        if self._is_client and dict(event.headers).get(b":status", b"").startswith(b"1"):
            return  # an interim response (RFC 9114 section 4.1) says nothing about the tunnel
        self._events.append(
            HeadersReceived(connection, event.stream_id, event.headers, event.stream_ended)
        )


def _is_sending(event: StreamReset | StopSendingReceived) -> bool:
    return isinstance(event, StopSendingReceived)
