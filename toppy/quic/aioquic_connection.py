"""aioquic's connection with what a gateway needs of it: our connection IDs, and bounds.

This module overrides private parts of aioquic 1.7; ``tests/quic/test_aioquic_engine.py`` fails when
one of them changed its shape. Nothing else in toppy reaches into aioquic's connection.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Final, cast

from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    QuicConnection,
    QuicConnectionAdapter,
    QuicConnectionError,
    QuicConnectionId,
    QuicConnectionState,
    QuicReceiveContext,
)
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicErrorCode, pull_quic_transport_parameters
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream
from aioquic.tls import AlertDescription

from toppy.quic.aioquic_client_certificates import ask_client, shown_by_peer
from toppy.quic.aioquic_datagrams import MAX_SEGMENTS, MAX_SEND_BYTES, DatagramQueue
from toppy.quic.aioquic_reading import StreamReaders
from toppy.quic.aioquic_stateless import ConnectionIdIssuer
from toppy.quic.engine import Address, Transmit

_MAX_HANDSHAKE_BYTES: Final = 32 * 1024
"""What a peer may have us hold of an incomplete handshake message: a long certificate chain."""
_AEAD_TAG_BYTES: Final = 16
_SHORT_HEADER_BYTES: Final = 3
"""Without the connection ID: the first byte and aioquic's two-byte packet numbers."""
_ACTIVE_CONNECTION_IDS: Final = 8
_MAX_REASON_BYTES: Final = 200
"""Of a reason phrase on the wire: the closing frame must fit a packet, up to thrice in one."""

_CERTIFICATE_ALERTS: Final = frozenset(
    int(QuicErrorCode.CRYPTO_ERROR) + alert
    for alert in (
        AlertDescription.bad_certificate,
        AlertDescription.unsupported_certificate,
        AlertDescription.certificate_revoked,
        AlertDescription.certificate_expired,
        AlertDescription.certificate_unknown,
        AlertDescription.unknown_ca,
    )
)
_CERTIFICATE_REQUIRED: Final = (
    int(QuicErrorCode.CRYPTO_ERROR) + AlertDescription.certificate_required
)

# aioquic logs every packet, and its warnings are for any peer to cause; events say what matters
_SILENT: Final = QuicConnectionAdapter(
    logging.Logger("aioquic connection", level=logging.CRITICAL + 1), {"id": ""}
)


class EngineConnection(QuicConnection):
    """One connection of the engine.

    ``max_streams`` is (bidirectional, unidirectional). Connection IDs come from ``issuer``;
    ``new_ids`` holds those that are not routed yet, for the engine to take.
    """

    def __init__(
        self,
        configuration: QuicConfiguration,
        issuer: ConnectionIdIssuer,
        max_streams: tuple[int, int],
        *,
        original_destination_connection_id: bytes | None = None,
        retry_source_connection_id: bytes | None = None,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self._issuer = issuer
        self._reason = ""
        self._window = configuration.max_data
        self._readers = StreamReaders(0, 0)
        self._logger = _SILENT
        self._loss._logger = None
        first = issuer.new()
        self._host_cids = [
            QuicConnectionId(
                cid=first,
                sequence_number=0,
                # a client may not send this one in its transport parameters
                stateless_reset_token=cast(
                    bytes, None if configuration.is_client else issuer.reset_token(first)
                ),
                was_sent=True,
            )
        ]
        self.host_cid = first
        self._local_initial_source_connection_id = first
        self.new_ids = [first]
        self._lacks_stream = False
        for limit, count in (
            (self._local_max_streams_bidi, max_streams[0]),
            (self._local_max_streams_uni, max_streams[1]),
        ):
            limit.value = limit.sent = count

    # What the engine asks

    def use_datagram_queue(self, queue: DatagramQueue) -> None:
        """Take DATAGRAM frames from ``queue`` from now on."""
        self._datagrams_pending = cast(Any, queue)

    def use_readers(self, readers: StreamReaders) -> None:
        """Give the peer credit for what was taken from ``readers``, from now on."""
        self._readers = readers

    def widen(self, window_bytes: int) -> None:
        """Let the peer have so much unread of all streams together; it only grows."""
        self._window = max(self._window, window_bytes)

    @property
    def has_begun(self) -> bool:
        """Whether an authentic packet arrived."""
        return self._state is not QuicConnectionState.FIRSTFLIGHT

    @property
    def is_draining(self) -> bool:
        """Whether the peer has closed the connection."""
        return self._state is QuicConnectionState.DRAINING

    @property
    def is_terminated(self) -> bool:
        """Whether the connection ended by time, without a word on the wire."""
        return self._state is QuicConnectionState.TERMINATED

    @property
    def termination(self) -> ConnectionTerminated | None:
        """Why the connection ends, once it does."""
        return self._close_event

    def end_reason(self) -> str:
        """``termination`` as a sentence for people."""
        assert self._close_event is not None
        server_name = self._configuration.server_name or "the peer"
        phrase = self._reason or self._close_event.reason_phrase
        return _describe(self._close_event, phrase, server_name, by_peer=self.is_draining)

    @property
    def closing_period_s(self) -> float:
        """How long late packets of a closed connection may come (RFC 9000 section 10.2)."""
        return 3 * self._loss.get_probe_timeout()

    @property
    def round_trip_s(self) -> float:
        """Smoothed round-trip time, 0.0 before the first sample."""
        return self._loss._rtt_smoothed

    @property
    def takes_datagrams(self) -> bool:
        """Whether the peer announced max_datagram_frame_size (RFC 9221 section 3)."""
        return bool(self._remote_max_datagram_frame_size)

    def max_frame_bytes(self) -> int:
        """How many bytes one DATAGRAM frame can carry now; -1 when none can be sent."""
        remote = self._remote_max_datagram_frame_size
        if not remote:
            return -1
        space = self._max_datagram_size - _SHORT_HEADER_BYTES - len(self._peer_cid.cid)
        frame = min(space - _AEAD_TAG_BYTES, remote)
        # one byte of type, and one or two of length (RFC 9221 section 4)
        return frame - 3 if frame - 3 >= 64 else min(frame - 2, 63)

    def may_have_more(self) -> bool:
        """Whether ``datagrams_to_send`` may have left something behind.

        It ends early when a frame does not fit its packet. Asking again is dear, and mostly in
        vain once the handshake is done.
        """
        return (
            not self._handshake_confirmed
            or bool(self._datagrams_pending)
            or bool(self._retire_connection_ids)
            or any(not each.was_sent for each in self._host_cids)
            or any(
                not stream.sender.buffer_is_empty
                or stream.sender.reset_pending
                or stream.receiver.stop_pending
                or stream.max_stream_data_local_sent != stream.max_stream_data_local
                for stream in self._streams_queue
            )
        )

    def validate_address(self) -> None:
        """A Retry token proved the client's address: lift the limit of three times what came."""
        self._network_paths[0].is_validated = True

    def peer_reset_tokens(self) -> list[bytes]:
        """Stateless reset tokens of the connection IDs that we send to."""
        ids = [self._peer_cid, *(p.peer_cid for p in self._network_paths if p.peer_cid)]
        return [each.stateless_reset_token for each in ids if each.stateless_reset_token]

    def live_stream(self, stream_id: int) -> QuicStream | None:
        """The stream, while at least one of its sides is in use."""
        return self._streams.get(stream_id)

    def may_open(self, *, is_unidirectional: bool) -> bool:
        """Whether the peer's stream limit leaves room for one more stream of ours."""
        following = self.get_next_available_stream_id(is_unidirectional)
        if is_unidirectional:
            return following // 4 < self._remote_max_streams_uni
        may_open = following // 4 < self._remote_max_streams_bidi
        self._lacks_stream |= not may_open
        return may_open

    def take_available(self) -> bool:
        """Whether there is room for a bidirectional stream after ``may_open`` found none; once."""
        if not self._lacks_stream:
            return False
        self._lacks_stream = False
        return self.may_open(is_unidirectional=False)

    def may_pause(self, stream_id: int) -> bool:
        """Whether more can arrive on the stream, or waits."""
        return self._readers.is_holding(stream_id) or self.may_stop(stream_id)

    def may_send_on(self, stream_id: int) -> bool:
        """Whether bytes can be written on a stream: it is live, and neither ended nor reset."""
        stream = self._streams.get(stream_id)
        if stream is None or not self._stream_can_send(stream_id):
            return False
        sender = stream.sender
        return (
            not sender.is_finished
            and sender._buffer_fin is None
            and sender._reset_error_code is None
        )

    def is_sending(self, stream_id: int) -> bool:
        """Whether the stream has a sending side of ours that was not reset and is not done."""
        return self.may_reset(stream_id) and (
            self._streams[stream_id].sender._reset_error_code is None
        )

    def may_reset(self, stream_id: int) -> bool:
        """Whether the stream has a sending side of ours that is not done."""
        stream = self._streams.get(stream_id)
        return stream is not None and self._stream_can_send(stream_id)

    def may_stop(self, stream_id: int) -> bool:
        """Whether the stream has a receiving side of ours that is not done."""
        stream = self._streams.get(stream_id)
        return (
            stream is not None
            and self._stream_can_receive(stream_id)
            and not stream.receiver.is_finished
        )

    def backlog_bytes(self, stream_id: int) -> int:
        """Bytes of a stream that were not sent even once."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.sender._reset_error_code is not None:
            return 0
        return stream.sender._buffer_stop - stream.sender.highest_offset

    def close(
        self,
        error_code: int = QuicErrorCode.NO_ERROR,
        frame_type: int | None = None,
        reason_phrase: str = "",
    ) -> None:
        """Close the connection; a long reason is cut on the wire, where aioquic would raise."""
        if self._close_event is None:
            self._reason = reason_phrase
        phrase = reason_phrase.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
        super().close(error_code, frame_type, phrase)

    def release(self) -> None:
        """Give back all memory at once; the connection must not be used after this.

        aioquic's objects refer to each other in circles, and would wait for the collector.
        """
        for space in self._spaces.values():
            space.sent_packets.clear()
        self.__dict__.clear()

    def peer_certificates(self) -> tuple[bytes, ...]:
        """The chain that the peer has shown, DER; empty before the end of the handshake."""
        return shown_by_peer(self.tls) if self._handshake_complete else ()

    # What aioquic does otherwise

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        configuration = self._configuration
        if not self._is_client and configuration.verify_mode is not None:
            assert configuration.cadata is not None
            ask_client(self.tls, configuration.cadata, configuration.verify_mode)

    def _replenish_connection_ids(self) -> None:
        limit = min(_ACTIVE_CONNECTION_IDS, self._remote_active_connection_id_limit)
        while len(self._host_cids) < limit:
            connection_id = self._issuer.new()
            self._host_cids.append(
                QuicConnectionId(
                    cid=connection_id,
                    sequence_number=self._host_cid_seq,
                    stateless_reset_token=self._issuer.reset_token(connection_id),
                )
            )
            self._host_cid_seq += 1
            self.new_ids.append(connection_id)

    def _parse_transport_parameters(self, data: bytes, from_session_ticket: bool = False) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        parameters = pull_quic_transport_parameters(Buffer(data=data))
        # aioquic does not look at the first and forgets the third; 0 means no idle timeout
        # (RFC 9000 section 18.2), and aioquic takes it for a very short one
        if parameters.max_udp_payload_size is not None:
            self._max_datagram_size = min(self._max_datagram_size, parameters.max_udp_payload_size)
        if not parameters.max_idle_timeout:
            self._remote_max_idle_timeout = None
        if parameters.ack_delay_exponent is not None:
            self._remote_ack_delay_exponent = parameters.ack_delay_exponent

    def _handle_crypto_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        start = buf.tell()
        end = buf.pull_uint_var() + buf.pull_uint_var()
        buf.seek(start)
        delivered = self._crypto_streams[context.epoch].receiver.starting_offset()
        if end - delivered <= _MAX_HANDSHAKE_BYTES:
            super()._handle_crypto_frame(context, frame_type, buf)
            if len(self.tls._receive_buffer) <= _MAX_HANDSHAKE_BYTES:
                return
        raise QuicConnectionError(
            error_code=QuicErrorCode.CRYPTO_BUFFER_EXCEEDED,
            frame_type=frame_type,
            reason_phrase="the handshake message is too long",
        )

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        # aioquic doubles the window each time, so that a long-lived connection could in the end
        # hold gigabytes; ours slides. ``used`` counts what arrived, not what was taken.
        limit = self._local_max_data
        window = self._window + self._readers.extension_bytes
        used = limit.used
        if limit.value - used < window // 2:
            held = self._readers.held_bytes + sum(
                stream.receiver.highest_offset - stream.receiver.starting_offset()
                for stream in self._streams.values()
                if not stream.receiver.is_finished
            )
            limit.value = max(limit.value, used - held + window)
        limit.used = 0
        try:
            super()._write_connection_limits(builder, space)
        finally:
            limit.used = used

    def _write_stream_limits(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream
    ) -> None:
        receiver = stream.receiver
        if receiver.is_finished or not stream.max_stream_data_local:
            return
        window = self._configuration.max_stream_data
        taken = receiver.starting_offset() - self._readers.held_of(cast(int, stream.stream_id))
        if stream.max_stream_data_local - taken < window // 2:
            stream.max_stream_data_local = taken + window
        if stream.max_stream_data_local_sent == stream.max_stream_data_local:
            return
        highest, receiver.highest_offset = receiver.highest_offset, 0
        try:
            super()._write_stream_limits(builder, space, stream)
        finally:
            receiver.highest_offset = highest


def join_segments(datagrams: list[tuple[bytes, Address]]) -> list[Transmit]:
    """Runs of equal length to one destination, each ready for one GSO send."""
    transmits: list[Transmit] = []
    run: list[bytes] = []
    total = 0
    to: Address | None = None
    for data, destination in datagrams:
        size = len(data)
        if run and (
            destination != to
            or size > len(run[0])
            or len(run[-1]) < len(run[0])
            or len(run) >= MAX_SEGMENTS
            or total + size > MAX_SEND_BYTES
        ):
            transmits.append(_transmit(run, to))
            run, total = [], 0
        run.append(data)
        total += size
        to = destination
    if run:
        transmits.append(_transmit(run, to))
    return transmits


def _transmit(run: list[bytes], destination: Address | None) -> Transmit:
    assert destination is not None
    if len(run) == 1:
        return run[0], 0, destination
    return b"".join(run), len(run[0]), destination


def _describe(
    termination: ConnectionTerminated, phrase: str, server_name: str, *, by_peer: bool
) -> str:
    """Why a connection ended, as a sentence for people."""
    code = int(termination.error_code)
    phrase = "".join(each if each.isprintable() else "?" for each in phrase)
    if phrase == "Idle timeout" and not by_peer:
        return "idle timeout"
    if code in _CERTIFICATE_ALERTS and not by_peer:
        why = _other_names(phrase) or phrase or "no reason given"
        return f"the certificate of {server_name} does not verify: {why}"
    is_tls = termination.frame_type is not None and 0x100 <= code < 0x200
    if is_tls:
        try:
            alert = AlertDescription(code - 0x100).name.replace("_", " ")
        except ValueError:
            alert = f"number {code - 0x100}"
        if code == _CERTIFICATE_REQUIRED:
            alert += ": the peer asks for a client certificate"
        if code in _CERTIFICATE_ALERTS:
            alert += ": the peer does not accept the certificate"
        return f"TLS alert {alert}" + (f" ({phrase})" if phrase else "")
    if phrase:
        return phrase
    if termination.frame_type is not None and code in QuicErrorCode.__members__.values():
        return QuicErrorCode(code).name.replace("_", " ").lower()
    return f"closed with error code 0x{code:x}"


def _other_names(phrase: str) -> str:
    """Which names a certificate has, out of aioquic's message; empty for other faults."""
    _, found, patterns = phrase.partition(" doesn't match ")
    names = re.findall(r"(?:b'|Address\(')([^']*)'", patterns)
    return f"it is for {', '.join(names)}" if found and names else ""
