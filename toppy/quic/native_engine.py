"""The native QUIC engine: ``toppy.quic.engine.Engine`` over quinn-proto (Rust, in ``native/``).

The work is done in ``_native``; here events become dataclasses and counters get their names. The
calls of the hot path go straight through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from toppy.model.drop_reason import DropReason
from toppy.quic._native import Endpoint
from toppy.quic.engine import (
    Address,
    Buffer,
    ConnectionAccepted,
    ConnectionClosed,
    DatagramGroup,
    EngineConfig,
    Event,
    Gate,
    HandshakeCompleted,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
    StreamsAvailable,
    StreamWritable,
    Transmit,
)


def _connection_closed(
    connection: int, error_code: int, reason: str, by_peer: bool
) -> ConnectionClosed:
    # the peer chose the reason, and it goes to a terminal
    shown = "".join(each if each.isprintable() else "?" for each in reason)
    return ConnectionClosed(connection, error_code, shown, by_peer)


# in the order of `event_tuple` in native/src/python.rs
_EVENTS: Final[tuple[Callable[..., Event], ...]] = (
    ConnectionAccepted,
    HandshakeCompleted,
    StreamDataReceived,
    StreamReset,
    StopSendingReceived,
    _connection_closed,
    StreamsAvailable,
    StreamWritable,
)


class NativeEngine:
    """``toppy.quic.engine.Engine`` on quinn-proto. Raises ``ValueError`` for unusable settings.

    ``gate`` decides on new connections (None: accept all) and must not call the engine. Not for
    use by two threads at once.
    """

    name = "native"

    def __init__(self, config: EngineConfig, *, gate: Gate | None = None, now: float = 0.0) -> None:
        def answer(source: Address, is_validated: bool) -> str:
            assert gate is not None
            return gate(source, is_validated).value

        self._endpoint = Endpoint(config, answer if gate is not None else None, now)

    def connect(self, address: Address, server_name: str, now: float) -> int:
        return self._endpoint.connect(address, server_name, now)

    def receive(self, buffer: Buffer, segment_size: int, source: Address, now: float) -> None:
        self._endpoint.receive(buffer, segment_size, source, now)

    def handle_timeout(self, now: float) -> None:
        self._endpoint.handle_timeout(now)

    def next_timeout(self) -> float | None:
        return self._endpoint.next_timeout()

    def poll_events(self) -> list[Event]:
        return [_event(kind, fields) for kind, fields in self._endpoint.poll_events()]

    def poll_datagrams(self) -> list[DatagramGroup]:
        return self._endpoint.poll_datagrams()

    def poll_transmits(self, now: float) -> list[Transmit]:
        return self._endpoint.poll_transmits(now)

    def open_stream(self, connection: int, *, is_unidirectional: bool = False) -> int | None:
        return self._endpoint.open_stream(connection, is_unidirectional)

    def send_stream(
        self, connection: int, stream_id: int, data: Buffer, *, end: bool = False
    ) -> None:
        self._endpoint.send_stream(connection, stream_id, data, end)

    def stream_backlog_bytes(self, connection: int, stream_id: int) -> int:
        return self._endpoint.stream_backlog_bytes(connection, stream_id)

    def notify_writable(self, connection: int, stream_id: int, below_bytes: int) -> None:
        self._endpoint.notify_writable(connection, stream_id, below_bytes)

    def pause_reading(self, connection: int, stream_id: int) -> None:
        self._endpoint.pause_reading(connection, stream_id)

    def resume_reading(self, connection: int, stream_id: int) -> None:
        self._endpoint.resume_reading(connection, stream_id)

    def widen_connection(self, connection: int, window_bytes: int) -> None:
        self._endpoint.widen_connection(connection, window_bytes)

    def datagram_backlog_bytes(self, connection: int, quarter_stream_id: int) -> int:
        return self._endpoint.datagram_backlog_bytes(connection, quarter_stream_id)

    def reset_stream(self, connection: int, stream_id: int, error_code: int) -> None:
        self._endpoint.reset_stream(connection, stream_id, error_code)

    def stop_stream(self, connection: int, stream_id: int, error_code: int) -> None:
        """As the interface says; nothing more is reported of what the peer sends on the stream."""
        self._endpoint.stop_stream(connection, stream_id, error_code)

    def max_payload_bytes(self, connection: int, quarter_stream_id: int) -> int:
        return self._endpoint.max_payload_bytes(connection, quarter_stream_id)

    def send_datagrams(
        self, connection: int, quarter_stream_id: int, payloads: Buffer, segment_size: int
    ) -> None:
        self._endpoint.send_datagrams(connection, quarter_stream_id, payloads, segment_size)

    def close(self, connection: int, error_code: int, reason: str, now: float) -> None:
        self._endpoint.close(connection, error_code, reason, now)

    def peer_address(self, connection: int) -> Address | None:
        return self._endpoint.peer_address(connection)

    def peer_certificates(self, connection: int) -> tuple[bytes, ...]:
        return tuple(self._endpoint.peer_certificates(connection))

    def supports_datagrams(self, connection: int) -> bool:
        return self._endpoint.supports_datagrams(connection)

    def round_trip_s(self, connection: int) -> float:
        return self._endpoint.round_trip_s(connection)

    def take_drops(self) -> dict[DropReason, int]:
        return {DropReason(reason): count for reason, count in self._endpoint.take_drops()}


def _event(kind: int, fields: tuple[Any, ...]) -> Event:
    return _EVENTS[kind](*fields)
