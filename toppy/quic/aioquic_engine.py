"""The pure Python QUIC engine: ``toppy.quic.engine.Engine`` over aioquic's connections.

aioquic knows one connection at a time. Here is what makes many of them one endpoint: routing by
connection ID, admission, timers, stateless resets, datagram queues, batches.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, cast

from aioquic.quic import events as quic_events
from aioquic.quic.packet import QuicErrorCode

from toppy.model.drop_reason import DropReason
from toppy.quic.aioquic_connection import EngineConnection, join_segments
from toppy.quic.aioquic_datagrams import (
    DatagramGroups,
    DatagramQueue,
    parse_datagram_frame,
    tunnel_prefix,
)
from toppy.quic.aioquic_reading import StreamReaders
from toppy.quic.aioquic_record import Record
from toppy.quic.aioquic_settings import KEY_BYTES, check, quic_configuration
from toppy.quic.aioquic_stateless import (
    MIN_RESET_BYTES,
    QUIC_V1,
    RESET_TOKEN_BYTES,
    ConnectionIdIssuer,
    Entropy,
    FirstPacket,
    InvalidRetryTokenError,
    RateLimit,
    RetryTokens,
    initial_close,
    parse_first_packet,
    system_entropy,
    version_negotiation,
)
from toppy.quic.aioquic_timers import Deadlines
from toppy.quic.engine import (
    Address,
    Admission,
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

_H3_DATAGRAM_ERROR: Final = 0x33
_MAX_RETIRED_IDS: Final = 8
"""Retired IDs that stay routed: packets that were under way do not deserve a stateless reset."""
_MIN_WAIT_S: Final = 0.001
"""A timer that is due and brings nothing about is asked again so much later, not at once."""
_RESETS_PER_S: Final = 1000.0
_RESET_BURST: Final = 100


class AioquicEngine:
    """``toppy.quic.engine.Engine`` in pure Python. Raises ``ValueError`` for unusable settings.

    ``gate`` decides on new connections (None: accept all). ``entropy`` gives the random part of
    connection IDs; aioquic takes the rest from the system itself.
    """

    name = "aioquic"

    def __init__(
        self,
        config: EngineConfig,
        *,
        gate: Gate | None = None,
        now: float = 0.0,
        entropy: Entropy = system_entropy,
    ) -> None:
        check(config)
        self._config = config
        self._gate = gate
        self._now = now
        self._quic_configuration = quic_configuration(config)
        self._issuer = ConnectionIdIssuer(
            config.connection_id_prefix,
            config.connection_id_bytes,
            config.reset_key or entropy(KEY_BYTES),
            entropy,
            config.reset_prefix,
        )
        self._retry = RetryTokens(config.token_key or entropy(KEY_BYTES), self._issuer)
        self._resets = RateLimit(_RESETS_PER_S, _RESET_BURST, now)
        self._records: dict[int, Record] = {}
        self._routes: dict[bytes, Record] = {}
        self._by_peer: dict[Address, set[int]] = {}
        self._next_number = 1
        self._touched: dict[int, Record] = {}
        self._unread: dict[int, Record] = {}
        self._turn = 0
        self._deadlines = Deadlines()
        self._events: list[Event] = []
        self._groups = DatagramGroups()
        self._answers: list[Transmit] = []
        self._drops: Counter[DropReason] = Counter()

    # Packets

    def connect(self, address: Address, server_name: str, now: float) -> int:
        if not server_name.isascii():
            raise ValueError("server_name must be ASCII; write an international name in punycode")
        self._now = now
        configuration = replace(self._quic_configuration, server_name=server_name)
        quic = EngineConnection(configuration, self._issuer, self._max_streams)
        record = self._add(quic)
        record.peer = address
        self._by_peer.setdefault(address, set()).add(record.number)
        self._call(record, quic.connect, address, now)
        self._touched[record.number] = record
        return record.number

    def receive(self, buffer: Buffer, segment_size: int, source: Address, now: float) -> None:
        self._now = now
        reached: dict[int, Record] = {}
        view = memoryview(buffer)
        step = segment_size or max(len(view), 1)
        id_end = 1 + self._config.connection_id_bytes
        for start in range(0, len(view), step):
            data = bytes(view[start : start + step])
            record: Record | None
            if data[0] & 0x80:
                destination_end = 6 + data[5] if len(data) > 5 else 0
                if destination_end == 0 or destination_end >= len(data):
                    continue
                record = self._routes.get(data[6:destination_end])
                if record is None:
                    record = self._receive_first(data, source, now)
                    if record is not None:
                        reached[record.number] = record
                    continue
            else:
                record = self._routes.get(data[1:id_end])
                if record is None:
                    self._receive_stray(data, source, now)
                    continue
            if record.quic is None:
                self._answer_closed(record)
                continue
            self._call(record, record.quic.receive_datagram, data, source, now)
            reached[record.number] = record
        for number, record in reached.items():
            self._collect(record)
            self._touched[number] = record

    def handle_timeout(self, now: float) -> None:
        self._now = now
        for number in self._deadlines.take_due(now):
            record = self._records[number]
            quic = record.quic
            if quic is None:
                self._forget(record)
                continue
            # handle_timer goes by what get_timer found last
            timer = self._call(record, quic.get_timer)
            if timer is not None and timer <= now:
                self._call(record, quic.handle_timer, now)
            if record.keep_alive_at is not None and record.keep_alive_at <= now:
                self._move_keep_alive(record, now)
                if record.quic is not None:
                    quic.send_ping(0)
            self._collect(record)
            self._touched[number] = record

    def next_timeout(self) -> float | None:
        if self._events or self._unread or self._touched or self._answers:
            return self._now
        return self._deadlines.next()

    # Polls

    def poll_events(self) -> list[Event]:
        unread, self._unread = self._unread, {}
        for number, record in unread.items():
            for stream_id in record.readers.readable():
                self._read(record, stream_id)
            self._touched[number] = record  # the peer gets credit for what was read
        self._turn += 1
        events, self._events = self._events, []
        return events

    def poll_datagrams(self) -> list[DatagramGroup]:
        return self._groups.take()

    def poll_transmits(self, now: float) -> list[Transmit]:
        self._now = now
        touched, self._touched = self._touched, {}
        transmits, self._answers = self._answers, []
        for record in touched.values():
            self._flush(record, now, transmits)
        return transmits

    def take_drops(self) -> dict[DropReason, int]:
        drops = dict(self._drops)
        self._drops.clear()
        return drops

    # Streams

    def open_stream(self, connection: int, *, is_unidirectional: bool = False) -> int | None:
        quic = self._quic(connection)
        if quic is None or not quic.may_open(is_unidirectional=is_unidirectional):
            return None
        stream_id = quic.get_next_available_stream_id(is_unidirectional)
        quic.send_stream_data(stream_id, b"")
        return stream_id

    def send_stream(
        self, connection: int, stream_id: int, data: Buffer, *, end: bool = False
    ) -> None:
        quic = self._quic(connection)
        if quic is not None and quic.may_send_on(stream_id):
            quic.send_stream_data(stream_id, cast(bytes, data), end)
            self._touch(connection)

    def stream_backlog_bytes(self, connection: int, stream_id: int) -> int:
        quic = self._quic(connection)
        return 0 if quic is None else quic.backlog_bytes(stream_id)

    def notify_writable(self, connection: int, stream_id: int, below_bytes: int) -> None:
        quic = self._quic(connection)
        if quic is not None and quic.is_sending(stream_id):
            record = self._records[connection]
            record.watched[stream_id] = below_bytes
            self._check_watched(record, quic)

    def pause_reading(self, connection: int, stream_id: int) -> None:
        quic = self._quic(connection)
        if quic is not None and quic.may_pause(stream_id):
            record = self._records[connection]
            if stream_id not in record.stopped:
                record.readers.pause(stream_id)
                self._touch(connection)

    def resume_reading(self, connection: int, stream_id: int) -> None:
        if self._quic(connection) is not None:
            record = self._records[connection]
            record.readers.resume(stream_id)
            self._read(record, stream_id)
            self._touch(connection)

    def widen_connection(self, connection: int, window_bytes: int) -> None:
        quic = self._quic(connection)
        if quic is not None:
            quic.widen(window_bytes)
            self._touch(connection)

    def datagram_backlog_bytes(self, connection: int, quarter_stream_id: int) -> int:
        record = self._records.get(connection)
        return 0 if record is None else record.queue.backlog_bytes(quarter_stream_id)

    def reset_stream(self, connection: int, stream_id: int, error_code: int) -> None:
        quic = self._quic(connection)
        if quic is not None and quic.may_reset(stream_id):
            quic.reset_stream(stream_id, error_code)
            self._records[connection].watched.pop(stream_id, None)
            self._touch(connection)

    def stop_stream(self, connection: int, stream_id: int, error_code: int) -> None:
        """As the interface says; nothing more is reported of what the peer sends on the stream."""
        quic = self._quic(connection)
        if quic is None:
            return
        self._records[connection].readers.forget(stream_id)
        if quic.may_stop(stream_id):
            quic.stop_stream(stream_id, error_code)
            _remember(self._records[connection].stopped, stream_id, quic)
            self._touch(connection)

    # Datagrams

    def supports_datagrams(self, connection: int) -> bool:
        quic = self._quic(connection)
        return quic is not None and quic.takes_datagrams

    def max_payload_bytes(self, connection: int, quarter_stream_id: int) -> int:
        quic = self._quic(connection)
        if quic is None:
            return -1
        return max(-1, quic.max_frame_bytes() - len(tunnel_prefix(quarter_stream_id)))

    def send_datagrams(
        self, connection: int, quarter_stream_id: int, payloads: Buffer, segment_size: int
    ) -> None:
        if self._quic(connection) is None:
            count = -(-len(payloads) // segment_size) if segment_size else 1
            self._drops[DropReason.UNKNOWN_STREAM] += count
            return
        self._records[connection].queue.push(quarter_stream_id, payloads, segment_size)
        self._touch(connection)

    # Connections

    def close(self, connection: int, error_code: int, reason: str, now: float) -> None:
        self._now = now
        quic = self._quic(connection)
        if quic is not None:
            quic.close(error_code=error_code, reason_phrase=reason)
            self._report_closed(self._records[connection], error_code, reason or "closed")
            self._touch(connection)

    def peer_address(self, connection: int) -> Address | None:
        quic = self._quic(connection)
        return None if quic is None else quic.get_peer_address()

    def peer_certificates(self, connection: int) -> tuple[bytes, ...]:
        quic = self._quic(connection)
        return () if quic is None else quic.peer_certificates()

    def round_trip_s(self, connection: int) -> float:
        quic = self._quic(connection)
        return 0.0 if quic is None else quic.round_trip_s

    # Packets that belong to no connection

    def _receive_first(self, data: bytes, source: Address, now: float) -> Record | None:
        """A long-header packet of no connection that we know: maybe a new one."""
        if self._config.is_client:
            return None
        if int.from_bytes(data[1:5], "big") != QUIC_V1:
            answer = version_negotiation(data)
            if answer is not None:
                self._answers.append((answer, 0, source))
            return None
        first = parse_first_packet(data)
        if first is None:
            return None
        try:
            original_id = self._retry.original_destination_id(first, source, now)
        except InvalidRetryTokenError:
            self._answer_initial(first, QuicErrorCode.INVALID_TOKEN, source)
            return None
        is_validated = original_id is not None
        decision = self._gate(source, is_validated) if self._gate else Admission.ACCEPT
        if decision is Admission.REFUSE:
            self._answer_initial(first, QuicErrorCode.CONNECTION_REFUSED, source)
        elif decision is Admission.RETRY and not is_validated:
            self._answers.append((self._retry.retry_packet(first, source, now), 0, source))
        elif decision is not Admission.IGNORE:
            return self._accept(first, original_id, data, source, now)
        return None

    def _accept(
        self,
        first: FirstPacket,
        original_id: bytes | None,
        data: bytes,
        source: Address,
        now: float,
    ) -> Record | None:
        quic = EngineConnection(
            self._quic_configuration,
            self._issuer,
            self._max_streams,
            original_destination_connection_id=original_id or first.destination_id,
            retry_source_connection_id=first.destination_id if original_id else None,
        )
        record = self._add(quic)
        self._route(record, first.destination_id)
        self._events.append(ConnectionAccepted(record.number, source))
        self._call(record, quic.receive_datagram, data, source, now)
        if record.quic is not None and not quic.has_begun:
            # not authentic: anybody can send such a packet, and it must leave nothing behind
            self._events.pop()
            self._forget(record)
            return None
        if record.quic is not None and original_id is not None:
            quic.validate_address()
        return record

    def _answer_initial(self, first: FirstPacket, error_code: int, source: Address) -> None:
        self._answers.append((initial_close(first, error_code), 0, source))

    def _receive_stray(self, data: bytes, source: Address, now: float) -> None:
        """A short-header packet of no connection that we know: theirs or ours is gone."""
        if not self._config.is_client:
            answer = self._issuer.stateless_reset(data)
            if answer is not None and self._resets.may_pass(now):
                self._answers.append((answer, 0, source))
            return
        if len(data) < MIN_RESET_BYTES:
            return
        token = data[-RESET_TOKEN_BYTES:]
        for number in list(self._by_peer.get(source, ())):
            record = self._records[number]
            quic = record.quic
            if quic is not None and any(
                hmac.compare_digest(token, each) for each in quic.peer_reset_tokens()
            ):
                self._report_closed(record, 0, "stateless reset", by_peer=True)
                self._forget(record)
                return

    # A connection's life

    @property
    def _max_streams(self) -> tuple[int, int]:
        return self._config.max_bidirectional_streams, self._config.max_unidirectional_streams

    def _quic(self, connection: int) -> EngineConnection | None:
        record = self._records.get(connection)
        return None if record is None or record.is_closed else record.quic

    def _touch(self, connection: int) -> None:
        self._touched[connection] = self._records[connection]

    def _add(self, quic: EngineConnection) -> Record:
        queue = DatagramQueue(
            tunnel_bytes=self._config.tunnel_queue_bytes,
            connection_bytes=self._config.connection_queue_bytes,
            max_frame_bytes=quic.max_frame_bytes,
            drops=self._drops,
        )
        readers = StreamReaders(self._config.stream_window_bytes, self._config.paused_window_bytes)
        record = Record(self._next_number, quic, queue, readers)
        quic.use_datagram_queue(queue)
        quic.use_readers(readers)
        self._next_number += 1
        self._records[record.number] = record
        self._route_new_ids(record, quic)
        return record

    def _route(self, record: Record, connection_id: bytes) -> None:
        self._routes[connection_id] = record
        record.ids.append(connection_id)

    def _route_new_ids(self, record: Record, quic: EngineConnection) -> None:
        while quic.new_ids:
            self._route(record, quic.new_ids.pop())

    def _retire_id(self, record: Record, connection_id: bytes) -> None:
        record.retired_ids.append(connection_id)
        if len(record.retired_ids) > _MAX_RETIRED_IDS:
            oldest = record.retired_ids.pop(0)
            self._routes.pop(oldest, None)
            record.ids.remove(oldest)

    def _call(self, record: Record, call: Callable[..., Any], *arguments: Any) -> Any:
        """Let aioquic do something; if it fails, only this connection ends.

        The one place where any exception is caught: aioquic is a state machine of others that is
        fed by anybody on the Internet, and it raises much more than it documents when a peer does
        the unexpected. One peer must not take down all the others.
        """
        try:
            return call(*arguments)
        except Exception as error:  # noqa: BLE001
            self._fail(record, error)
            return None

    def _fail(self, record: Record, error: Exception) -> None:
        if record.quic is None:
            return
        reason = f"internal error ({type(error).__name__})"
        self._report_closed(record, QuicErrorCode.INTERNAL_ERROR, reason)
        packets: list[Transmit] = []
        try:
            record.quic.close(QuicErrorCode.INTERNAL_ERROR, 0, "internal error")
            packets = [(data, 0, to) for data, to in record.quic.datagrams_to_send(self._now)]
        except Exception:  # noqa: BLE001, S110 - as above; the peer's idle timeout does the rest
            pass
        self._answers += packets
        self._begin_closing(record, packets)

    def _collect(self, record: Record) -> None:
        """Turn aioquic's events of a connection into ours."""
        quic = record.quic
        if quic is None:
            return
        self._route_new_ids(record, quic)
        arrived: dict[int, None] = {}
        while (event := quic.next_event()) is not None:
            if isinstance(event, quic_events.DatagramFrameReceived):
                if not self._receive_datagram_frame(record, event.data):
                    break
            elif isinstance(event, quic_events.StreamDataReceived):
                stream_id = event.stream_id
                if stream_id not in record.stopped and (event.data or event.end_stream):
                    record.readers.add(stream_id, event.data, ended=event.end_stream)
                    arrived[stream_id] = None
            else:
                self._read_each(record, arrived)
                self._translate(record, quic, event)
        self._read_each(record, arrived)
        if quic.take_available():
            self._events.append(StreamsAvailable(record.number))
        termination = quic.termination
        if termination is not None and not record.is_closed:
            for stream_id in record.readers.readable():
                self._read(record, stream_id, everything=True)
            code = 0 if quic.is_terminated else termination.error_code
            self._report_closed(record, code, quic.end_reason(), by_peer=quic.is_draining)
        if quic.is_terminated:
            self._forget(record)
        elif quic.is_draining:
            self._begin_closing(record, [])

    def _translate(
        self, record: Record, quic: EngineConnection, event: quic_events.QuicEvent
    ) -> None:
        number = record.number
        match event:
            case quic_events.HandshakeCompleted(alpn_protocol=protocol):
                record.is_ready = True
                record.has_datagrams = protocol == "h3"
                self._move_keep_alive(record, self._now)
                self._events.append(HandshakeCompleted(number, protocol or ""))
            case quic_events.StreamReset(error_code=code, stream_id=stream_id):
                record.readers.forget(stream_id)
                if stream_id not in record.stopped:
                    self._events.append(StreamReset(number, stream_id, code))
            case quic_events.StopSendingReceived(error_code=code, stream_id=stream_id):
                record.watched.pop(stream_id, None)
                if stream_id not in record.send_stopped:
                    _remember(record.send_stopped, stream_id, quic)
                    self._events.append(StopSendingReceived(number, stream_id, code))
            case quic_events.ConnectionIdRetired(connection_id=connection_id):
                self._retire_id(record, connection_id)
            case _:
                pass

    def _read_each(self, record: Record, stream_ids: dict[int, None]) -> None:
        for stream_id in stream_ids:
            self._read(record, stream_id)
        stream_ids.clear()

    def _read(self, record: Record, stream_id: int, *, everything: bool = False) -> None:
        """Report what may be reported of a stream now."""
        taken = record.readers.take(stream_id, None if everything else self._turn)
        if taken is not None:
            data, ended = taken
            self._events.append(StreamDataReceived(record.number, stream_id, data, ended))
        if record.readers.has_unread():
            self._unread[record.number] = record

    def _check_watched(self, record: Record, quic: EngineConnection) -> None:
        for stream_id, below_bytes in list(record.watched.items()):
            if quic.backlog_bytes(stream_id) < below_bytes:
                del record.watched[stream_id]
                self._events.append(StreamWritable(record.number, stream_id))

    def _receive_datagram_frame(self, record: Record, data: bytes) -> bool:
        """Returns False when the connection was closed for it."""
        if not record.has_datagrams:
            self._drops[DropReason.UNKNOWN_STREAM] += 1
            return True
        parsed = parse_datagram_frame(data)
        if parsed is None:
            self._drops[DropReason.MALFORMED] += 1
            self.close(record.number, _H3_DATAGRAM_ERROR, "malformed HTTP Datagram", self._now)
            return False
        quarter_stream_id, context_id, offset = parsed
        if context_id:
            self._drops[DropReason.UNKNOWN_CONTEXT] += 1
        else:
            self._groups.add(record.number, quarter_stream_id, data[offset:])
        return True

    def _flush(self, record: Record, now: float, transmits: list[Transmit]) -> None:
        """Everything that a connection has to send now, then its next deadline."""
        datagrams: list[tuple[bytes, Address]] = []
        while record.quic is not None:
            more = self._call(record, record.quic.datagrams_to_send, now)
            if not more:
                break
            datagrams += more
            if record.is_closed or not record.quic.may_have_more():
                break
        if datagrams:
            transmits += join_segments(datagrams)
            self._move_keep_alive(record, now)
        quic = record.quic
        if quic is None:
            return
        if record.watched and not record.is_closed:
            self._check_watched(record, quic)
        self._collect(record)
        if record.is_closed and record.quic is not None:
            self._begin_closing(record, join_segments(datagrams))
        elif record.quic is not None:
            self._set_timer(record, quic, now)

    def _move_keep_alive(self, record: Record, now: float) -> None:
        if self._config.keep_alive_s is not None and self._config.is_client and record.is_ready:
            record.keep_alive_at = now + self._config.keep_alive_s

    # The end of a connection

    def _report_closed(
        self, record: Record, error_code: int, reason: str, *, by_peer: bool = False
    ) -> None:
        if not record.is_closed:
            record.is_closed = True
            record.queue.discard()
            record.readers.clear()
            record.watched.clear()
            self._unread.pop(record.number, None)
            self._events.append(ConnectionClosed(record.number, int(error_code), reason, by_peer))

    def _begin_closing(self, record: Record, packets: list[Transmit]) -> None:
        """Keep the routes for a while, so that late packets meet their connection's end."""
        assert record.quic is not None
        record.closing_packets = packets
        self._deadlines.set(record.number, self._now + record.quic.closing_period_s)
        record.quic.release()
        record.quic = None

    def _answer_closed(self, record: Record) -> None:
        """The peer still sends: it may have missed our CONNECTION_CLOSE (RFC 9000 section 10.2.1).

        Answers the first, second, fourth, eighth … packet.
        """
        record.closes_answered += 1
        if record.closes_answered & (record.closes_answered - 1) == 0:
            self._answers += record.closing_packets

    def _forget(self, record: Record) -> None:
        del self._records[record.number]
        self._touched.pop(record.number, None)
        self._deadlines.remove(record.number)
        for connection_id in record.ids:
            if self._routes.get(connection_id) is record:
                del self._routes[connection_id]
        if record.peer is not None:
            numbers = self._by_peer[record.peer]
            numbers.discard(record.number)
            if not numbers:
                del self._by_peer[record.peer]
        if record.quic is not None:
            record.quic.release()
            record.quic = None

    def _set_timer(self, record: Record, quic: EngineConnection, now: float) -> None:
        deadline: float | None = self._call(record, quic.get_timer)
        if record.keep_alive_at is not None:
            at = record.keep_alive_at
            deadline = at if deadline is None else min(deadline, at)
        if deadline is not None and deadline <= now:
            deadline = now + _MIN_WAIT_S
        if record.quic is not None:
            self._deadlines.set(record.number, deadline)


def _remember(stream_ids: set[int], stream_id: int, quic: EngineConnection) -> None:
    """Add to a set of streams; forget those that are gone, so that it stays small."""
    if len(stream_ids) >= 64:
        stream_ids.intersection_update([i for i in stream_ids if quic.live_stream(i) is not None])
    stream_ids.add(stream_id)
