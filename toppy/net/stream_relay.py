"""One TCP connection's payload, between its socket and a request stream, on either end of a tunnel.

Both ways go at the pace of the slower side: what one side cannot take now, the other is not asked
for. Nothing waits here but what one read or one event brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from toppy.protocol.stream_tunnel import RESET_CODE, Buffer, StreamTunnel
from toppy.quic.endpoint import BodyReceived, Endpoint, StreamAborted
from toppy.wire.connect_tcp import StreamFraming

HIGH_WATER_BYTES: Final = 1 << 20
"""Of what waits on a stream: then its socket is not read until half of it is left."""
_LOW_WATER_BYTES: Final = HIGH_WATER_BYTES // 2


class ByteSocket(Protocol):
    """See ``StreamSocket``, which it is outside of tests."""

    @property
    def unsent_bytes(self) -> int: ...
    def write(self, pieces: Sequence[Buffer]) -> None: ...
    def finish(self) -> bool: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...
    def reset(self) -> None: ...


class RelayOwner(Protocol):
    """Whose tunnel it is."""

    def moved(self, to_socket: int, to_stream: int) -> None:
        """So many bytes of payload were handed on."""
        ...

    def over(self, reason: str, *, in_order: bool) -> None:
        """Both directions have ended, and the other end of the tunnel knows; or the socket broke,
        and the stream was told. ``release`` is to be called.
        """
        ...

    def flush(self) -> None:
        """The stream was given something outside of the handling of its events."""
        ...


class StreamRelay:
    """Starts with ``begin``; it is the ``SocketReader`` of its socket.

    The socket is closed as soon as both directions have ended. In capsules the tunnel is over only
    when the other end has ended the stream, too: it does so when it has closed its own socket, and
    until then the last bytes may be on their way, and need this connection.
    """

    __slots__ = (
        "_endpoint",
        "_has_body_ended",
        "_has_shut_down",
        "_is_stream_paused",
        "_owner",
        "_socket",
        "connection",
        "protocol",
        "stream_id",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        connection: int,
        stream_id: int,
        protocol: StreamTunnel,
        owner: RelayOwner,
    ) -> None:
        """The stream must be paused by now, or carry nothing yet."""
        self._endpoint = endpoint
        self.connection = connection
        self.stream_id = stream_id
        self.protocol = protocol
        self._owner = owner
        self._socket: ByteSocket | None = None
        self._is_stream_paused = True
        self._has_body_ended = False
        """The other end has ended the stream."""
        self._has_shut_down = False
        """The socket was told that the stream has brought everything."""

    def begin(self, socket: ByteSocket) -> None:
        """The tunnel is open at both ends."""
        self._socket = socket
        self._write(socket, self.protocol.open())
        socket.resume()

    def send(self, payload: Buffer) -> None:
        """Send payload that was read from the socket before ``begin``."""
        if payload:
            body = self.protocol.send(payload)
            self._endpoint.send_body(self.connection, self.stream_id, body)
            self._owner.moved(0, len(payload))

    # from the stream

    def receive_body(self, event: BodyReceived) -> None:
        """Bytes of the request stream. Raises ``PeerError``."""
        pieces = self.protocol.receive_body(event.data, ended=event.ended)
        self._has_body_ended = event.ended
        if self._socket is not None:
            self._write(self._socket, pieces)
        elif self._has_shut_down:
            self._settle()

    def is_over_with(self, event: StreamAborted) -> bool:
        """Whether the tunnel ends because the peer gave up one direction of the stream: not when
        that one has brought everything.
        """
        return not (event.is_sending and self.protocol.has_finished)

    def receive_writable(self) -> None:
        """The stream has room again."""
        if self._socket is not None:
            self._socket.resume()

    def _write(self, socket: ByteSocket, pieces: Sequence[Buffer]) -> None:
        if pieces:
            socket.write(pieces)
            self._owner.moved(sum(map(len, pieces)), 0)
        self._after_write(socket)

    def _after_write(self, socket: ByteSocket) -> None:
        if socket.unsent_bytes:
            if not self._is_stream_paused:
                self._is_stream_paused = True
                self._endpoint.pause_reading(self.connection, self.stream_id)
            return
        if self._is_stream_paused:  # behind the payload there are capsules, and the end
            self._is_stream_paused = False
            self._endpoint.resume_reading(self.connection, self.stream_id)
        if self.protocol.has_peer_finished and not self._has_shut_down:
            # a peer that has said all and gone answers the last bytes by a reset: with TCP alone
            # whoever sent them has closed by then, and does not hear of it either
            self._has_shut_down = socket.finish() or self.protocol.has_finished
            self._settle()

    # from the socket

    def receive(self, buffer: memoryview, payload_bytes: int) -> None:
        """See ``SocketReader``."""
        assert self._socket is not None
        body = self.protocol.send_placed(buffer, payload_bytes)
        self._endpoint.send_body(self.connection, self.stream_id, body)
        backlog = self._endpoint.stream_backlog_bytes(self.connection, self.stream_id)
        if backlog >= HIGH_WATER_BYTES:
            self._socket.pause()
            self._endpoint.notify_writable(self.connection, self.stream_id, _LOW_WATER_BYTES)
        self._owner.moved(0, payload_bytes)
        self._owner.flush()

    def receive_end(self) -> None:
        """See ``SocketReader``."""
        self._settle(self.protocol.finish())
        self._owner.flush()

    def receive_failure(self, reason: str) -> None:
        """See ``SocketReader``."""
        self._endpoint.abort_stream(self.connection, self.stream_id, RESET_CODE)
        self._owner.over(reason, in_order=False)
        self._owner.flush()

    def drained(self) -> None:
        """See ``SocketReader``."""
        if self._socket is not None:
            self._after_write(self._socket)
        self._owner.flush()

    def _settle(self, last: bytes = b"") -> None:
        """One direction has ended: send ``last``, and end what is to end by now."""
        # in capsules the stream's end says that the socket is closed: it has taken everything
        may_end = self._has_shut_down or self.protocol.framing is StreamFraming.RAW
        ends = may_end and self.protocol.take_end()
        if last or ends:
            self._endpoint.send_body(self.connection, self.stream_id, last, end=ends)
        if not (self.protocol.has_finished and self._has_shut_down):
            return
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._has_body_ended:
            self._owner.over("both sides ended it", in_order=True)

    def release(self) -> None:
        """Give up: a socket that is still open is reset."""
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.reset()
