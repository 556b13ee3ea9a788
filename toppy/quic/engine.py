"""The interface of a QUIC engine: many connections behind one UDP port, sans-I/O, in batches.

Two engines implement it: ``native_engine`` (quinn-proto) and ``aioquic_engine``. Bytes and a
clock go in, bytes and events come out; nothing here opens a socket, sleeps or reads a clock.

After any call that may have changed something (``receive``, ``handle_timeout``, ``send_…``,
``close``) the caller drains ``poll_events``, ``poll_datagrams`` and ``poll_transmits``.

Connections are named by small integers that the engine never uses twice. Times are seconds on
the caller's monotonic clock. Addresses are ``(host, port)`` with a numeric host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, Protocol

from toppy.model.drop_reason import DropReason

Buffer = bytes | bytearray | memoryview
Address = tuple[str, int]
CongestionControl = Literal["cubic", "bbr", "newreno"]
READ_TURN_BYTES: Final = 256 * 1024
"""What one stream reports between two calls of ``poll_events``, and the most of one event."""


class Admission(Enum):
    """What to do with a connection attempt (the first Initial packet of a client)."""

    ACCEPT = "accept"
    RETRY = "retry"
    """Answer with a Retry packet: the client must prove its address (RFC 9000 section 8.1.2)."""
    REFUSE = "refuse"
    """Close with CONNECTION_REFUSED."""
    IGNORE = "ignore"


Gate = Callable[[Address, bool], Admission]
"""Decides on each new connection from (source, whether a Retry token proved that address)."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine is told at birth. Bytes unless the name says otherwise."""

    is_client: bool
    alpn_protocols: tuple[str, ...]
    certificate_chain_pem: bytes = b""
    """The leaf first. On a client: what it shows to a server that asks; empty: nothing."""
    private_key_pem: bytes = field(default=b"", repr=False)
    """Not encrypted."""
    ca_certificates_pem: bytes | None = None
    """Client only: the roots to trust; None means the roots of the system."""
    idle_timeout_s: float = 30.0
    keep_alive_s: float | None = None
    """Client only: send a PING when nothing was sent for so long. None: never."""
    congestion_control: CongestionControl = "bbr"
    """aioquic has no BBR: it uses CUBIC instead."""
    initial_packet_bytes: int = 1350
    """UDP payload of the first packets; 1,350 lets an inner QUIC Initial (1,200 B) pass."""
    max_packet_bytes: int = 1452
    """Upper bound of path MTU discovery (native only)."""
    max_bidirectional_streams: int = 128
    """How many request streams the other end may have open at once."""
    max_unidirectional_streams: int = 16
    stream_window_bytes: int = 8 << 20
    """What the other end may have under way or unread on one stream: its throughput is this much
    per round trip, and some third of it where 1 % is lost. Nothing is allocated before it comes."""
    connection_window_bytes: int = 32 << 20
    """The same for all streams of a connection together; ``widen_connection`` makes it larger."""
    paused_window_bytes: int = 128 << 20
    """What the latter grows by, at most, for paused streams with unread data: one stream window
    each, so that they take nothing from the others. More paused streams than this has room for
    hold up the others of their connection once all of them are full."""
    tunnel_queue_bytes: int = 1 << 20
    """Outgoing datagrams waiting, per tunnel; beyond it the oldest is dropped and counted."""
    connection_queue_bytes: int = 8 << 20
    """Outgoing datagrams waiting, per connection."""
    connection_id_prefix: bytes = b""
    reset_prefix: bytes = b""
    """Packets of unknown connections whose ID begins so are answered with a stateless reset: all
    workers share the key, and a generation resets what an earlier one left behind."""
    connection_id_bytes: int = 8
    """Length of the connection IDs we issue: the prefix, then random bytes."""
    reset_key: bytes = field(default=b"", repr=False)
    """64 bytes; a stateless reset token is HMAC-SHA256(reset_key, connection ID)[:16] on both
    engines. Empty: a random key."""
    token_key: bytes = field(default=b"", repr=False)
    """64 bytes, the key of Retry tokens and session tickets. Empty: a random key. Server only."""
    resumes_sessions: bool = True
    """A client that comes back skips the certificate (RFC 8446 section 2.2), at any server with the
    same token key, certificate and CA of clients. Never 0-RTT. Native only."""
    client_ca_pem: bytes = b""
    """Server only: the CAs whose client certificates are accepted; empty: none is asked for."""
    requires_client_certificate: bool = False
    """Server only: a client without one is refused with the alert certificate_required."""
    cipher_suites: tuple[str, ...] = ()
    """Of TLS 1.3, by their names in RFC 8446, in order of preference; empty: the engine's own."""


@dataclass(frozen=True, slots=True)
class ConnectionAccepted:
    """Server: a connection attempt passed the gate; its handshake has begun."""

    connection: int
    source: Address


@dataclass(frozen=True, slots=True)
class HandshakeCompleted:
    connection: int
    alpn_protocol: str


@dataclass(frozen=True, slots=True)
class StreamDataReceived:
    connection: int
    stream_id: int
    data: bytes
    ended: bool


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The peer reset its sending side (RESET_STREAM)."""

    connection: int
    stream_id: int
    error_code: int


@dataclass(frozen=True, slots=True)
class StopSendingReceived:
    """The peer will read no more (STOP_SENDING); the engine has reset our sending side."""

    connection: int
    stream_id: int
    error_code: int


@dataclass(frozen=True, slots=True)
class StreamWritable:
    """As asked by ``notify_writable``: less than the bound waits on the stream."""

    connection: int
    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamsAvailable:
    """The peer allows more bidirectional streams, after ``open_stream`` found none."""

    connection: int


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The connection is gone, by either end or by time; the last event of a connection."""

    connection: int
    error_code: int
    reason: str
    """A sentence for people; ``idle timeout``, ``stateless reset``, the peer's reason phrase …"""
    by_peer: bool


Event = (
    ConnectionAccepted
    | HandshakeCompleted
    | StreamDataReceived
    | StreamReset
    | StopSendingReceived
    | StreamWritable
    | StreamsAvailable
    | ConnectionClosed
)

DatagramGroup = tuple[int, int, bytes, int]
"""(connection, quarter stream ID, payloads, segment size): UDP payloads of context ID 0 that
arrived for one tunnel, back to back, each ``segment size`` long, only the last may be shorter:
ready for one GSO send. An empty payload is a group of its own with segment size 0."""

Transmit = tuple[bytes, int, Address]
"""(UDP payloads, segment size, destination); segment size 0 means one datagram."""


class Engine(Protocol):
    """Many QUIC connections behind one UDP port."""

    name: str
    """``native`` or ``aioquic``."""

    def connect(self, address: Address, server_name: str, now: float) -> int:
        """Begin a connection to ``address``; the certificate must be valid for ``server_name``."""
        ...

    def receive(self, buffer: Buffer, segment_size: int, source: Address, now: float) -> None:
        """Take what one receive call returned: UDP payloads of ``segment_size`` bytes each, the
        last may be shorter (0: one datagram). The engine copies what it keeps.
        """
        ...

    def handle_timeout(self, now: float) -> None:
        """Do what was due by ``now``."""
        ...

    def next_timeout(self) -> float | None:
        """When ``handle_timeout`` is to be called next, on the caller's clock."""
        ...

    def poll_events(self) -> list[Event]:
        """What happened since the last call, in order per connection."""
        ...

    def poll_datagrams(self) -> list[DatagramGroup]:
        """Payloads that arrived since the last call. Unknown contexts and malformed HTTP Datagrams
        are dropped and counted in ``take_drops`` (a malformed one also closes its connection
        with H3_DATAGRAM_ERROR, RFC 9297 section 2.1).
        """
        ...

    def poll_transmits(self, now: float) -> list[Transmit]:
        """UDP datagrams to send now."""
        ...

    def open_stream(self, connection: int, *, is_unidirectional: bool = False) -> int | None:
        """A new stream's ID, or None while the peer's stream limit is reached."""
        ...

    def send_stream(
        self, connection: int, stream_id: int, data: Buffer, *, end: bool = False
    ) -> None:
        """Queue a copy of bytes on a stream. The caller bounds them with ``stream_backlog_bytes``.
        Ignored on a stream or connection that is gone (its event is on the way).
        """
        ...

    def stream_backlog_bytes(self, connection: int, stream_id: int) -> int:
        """Bytes given to ``send_stream`` that flow and congestion control still hold back."""
        ...

    def notify_writable(self, connection: int, stream_id: int, below_bytes: int) -> None:
        """Ask for one ``StreamWritable`` once less than ``below_bytes`` wait on a stream, which may
        be now. Asking again replaces the bound. Nothing comes when the stream is reset, the peer
        stops it or the connection ends first.
        """
        ...

    def pause_reading(self, connection: int, stream_id: int) -> None:
        """Report nothing more of what arrives on a stream: the peer gets no more credit for it, so
        that at most ``stream_window_bytes`` are held. Events that were made already still come,
        ``READ_TURN_BYTES`` at most. A reset is reported at once, and what was held is discarded;
        so it is when the connection ends.
        """
        ...

    def resume_reading(self, connection: int, stream_id: int) -> None:
        """Report what was held, and what arrives from now on; ``READ_TURN_BYTES`` between two calls
        of ``poll_events``, so that the caller may pause again.
        """
        ...

    def widen_connection(self, connection: int, window_bytes: int) -> None:
        """Make a connection's ``connection_window_bytes`` larger; it never shrinks."""
        ...

    def reset_stream(self, connection: int, stream_id: int, error_code: int) -> None:
        """Abandon our sending side (RESET_STREAM)."""
        ...

    def stop_stream(self, connection: int, stream_id: int, error_code: int) -> None:
        """Tell the peer that we read no more (STOP_SENDING)."""
        ...

    def max_payload_bytes(self, connection: int, quarter_stream_id: int) -> int:
        """The largest UDP payload that fits one DATAGRAM frame now, context ID 0 included in the
        overhead; -1 when the peer takes no DATAGRAM frames.
        """
        ...

    def send_datagrams(
        self, connection: int, quarter_stream_id: int, payloads: Buffer, segment_size: int
    ) -> None:
        """Queue UDP payloads (``segment_size`` each, the last may be shorter; 0: one payload, maybe
        empty) as HTTP Datagrams of context ID 0. Full queue: the tunnel's oldest are dropped and
        counted. Payloads above ``max_payload_bytes`` are dropped and counted.
        """
        ...

    def datagram_backlog_bytes(self, connection: int, quarter_stream_id: int) -> int:
        """Bytes given to ``send_datagrams`` for one tunnel that congestion control holds back."""
        ...

    def close(self, connection: int, error_code: int, reason: str, now: float) -> None:
        """Close with an application error code (CONNECTION_CLOSE)."""
        ...

    def peer_address(self, connection: int) -> Address | None:
        """Where the peer is now (it may migrate)."""
        ...

    def peer_certificates(self, connection: int) -> tuple[bytes, ...]:
        """The chain that the peer has shown and that was verified, DER, the leaf first; empty
        before the end of the handshake, and where it showed none.
        """
        ...

    def supports_datagrams(self, connection: int) -> bool:
        """Whether the peer announced max_datagram_frame_size (RFC 9221)."""
        ...

    def round_trip_s(self, connection: int) -> float:
        """Smoothed round-trip time; 0.0 when unknown."""
        ...

    def take_drops(self) -> dict[DropReason, int]:
        """Datagrams dropped inside the engine since the last call, by reason."""
        ...
