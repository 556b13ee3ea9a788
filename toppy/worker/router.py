"""From HTTP requests to tunnels: what a gateway worker decides between its two sides.

No sockets here: the shell gives a clock reading with every call, asks the control plane and opens
target sockets when told to, so that tests drive the router with plain values.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from toppy.errors import PeerError, TargetError
from toppy.model.counters import WorkerCounters
from toppy.model.drop_reason import DropReason
from toppy.model.grant import Denial, Grant
from toppy.net.udp_socket import SendResult
from toppy.protocol.udp_tunnel import (
    Buffer,
    UdpTunnel,
    count_payloads,
    encode_datagram_capsules,
)
from toppy.quic.endpoint import (
    H3_ALPN,
    PING_ALPN,
    BodyReceived,
    ConnectionOpened,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    RawStreamReceived,
    StreamAborted,
)
from toppy.quic.engine import Address, ConnectionAccepted, ConnectionClosed
from toppy.quic.gate import ConnectionGate
from toppy.quic.h3 import H3_CONNECT_ERROR, H3_EXCESSIVE_LOAD, H3_NO_ERROR, H3_REQUEST_CANCELLED
from toppy.wire.capsule import (
    BARRIER_FIELD,
    MOST_BARRIERS,
    RENEWAL_FIELD,
    encode_barrier,
    encode_tunnel_closed,
    encode_wrap_up,
)
from toppy.wire.connect_udp import RequestError, host_of, response_headers, validate_request
from toppy.wire.ipc_message import (
    AdmissionRequest,
    Admitted,
    LiveConnection,
    LiveTunnel,
    TokenAnswer,
    TokenRequest,
)
from toppy.wire.proxy_status import encode_proxy_status
from toppy.worker.tunnel import Ping, Renewal, RouterLimits, RouterShell, Tunnel

ECHO_PORTS = (7, 9)
"""The built-in echo answers for the gateway's own name on echo's and discard's port (T-066)."""

_PING_BYTES = 8192 + 5
_OVERFLOW_INTERVAL_S = 5.0
"""Only a tunnel that was busy so recently can have lost something; a few ticks fit in."""
_PINGS_AT_ONCE = 8
"""Of one connection, that the control plane has not answered yet."""
_GOAWAY_GRACE_S = 1.0
"""A client that was told to go elsewhere leaves by itself; one without tunnels is sent away."""
_EARLY_STREAMS = 16
"""Of how many requests that are still on their way one connection's datagrams are held."""

_ENDED_EARLY = Denial(400, "http_request_error", "the request ended before the tunnel began")

_DROP_REASON = {
    SendResult.WOULD_BLOCK: DropReason.TARGET_BUFFER_FULL,
    SendResult.UNREACHABLE: DropReason.TARGET_UNREACHABLE,
    SendResult.TOO_LARGE: DropReason.TOO_LARGE_FOR_TARGET,
    SendResult.FAILED: DropReason.TARGET_UNREACHABLE,
}


@dataclass(slots=True)
class _Peer:
    """One connection."""

    tunnels: set[Tunnel]
    failed_auth: int = 0
    newest_request: int = -1
    """Quarter stream ID of the newest request."""
    early: dict[int, UdpTunnel] = field(default_factory=dict)
    """Datagrams that overtook their request, by quarter stream ID."""
    pings: dict[int, bytes] | None = None
    """Connections that speak ``toppy-ping``: what each stream has said so far."""
    pings_asked: int = 0
    """Pings of this connection that the control plane has not answered yet."""
    opened_at: float = 0.0
    """Unix time."""


class Router:
    """Owns the tunnels of one worker."""

    def __init__(
        self,
        endpoint: Endpoint,
        gate: ConnectionGate,
        shell: RouterShell,
        limits: RouterLimits,
        *,
        proxy_name: str,
        own_names: frozenset[str],
        unix_now: float = 0.0,
    ) -> None:
        self._endpoint = endpoint
        self._engine = endpoint.engine
        self._gate = gate
        self._shell = shell
        self._limits = limits
        self._proxy_name = proxy_name
        self._own_names = own_names
        self._peers: dict[int, _Peer] = {}
        self._tunnels: dict[tuple[int, int], Tunnel] = {}
        self._questions: dict[int, Tunnel | Ping | Renewal] = {}
        self._next_question = 1
        self._early_peers: set[int] = set()
        self._drained_since: float | None = None
        self._unanswered_barriers: list[Tunnel] = []
        self._unix_now = unix_now
        self.counters = WorkerCounters()

    # events from the network

    def pump(self, now: float) -> None:
        """Take everything that the endpoint has."""
        for event in self._endpoint.poll_events(now):
            self._handle(event, now)
        for (
            connection,
            quarter_stream_id,
            payloads,
            segment_size,
        ) in self._endpoint.poll_datagrams():
            tunnel = self._tunnels.get((connection, quarter_stream_id))
            if tunnel is None:
                self._hold_early(connection, quarter_stream_id, payloads, segment_size)
            elif tunnel.target is None and tunnel.grant is None:
                dropped = tunnel.protocol.hold(payloads, segment_size)
                self._drop(DropReason.EARLY_QUEUE_FULL, dropped)
            else:
                self._send_to_target(tunnel, payloads, segment_size, now)
        if self._unanswered_barriers:
            self._answer_barriers()

    def _answer_barriers(self) -> None:
        """What came before them, in the same packets too, has gone to the targets by now."""
        for tunnel in self._unanswered_barriers:
            if tunnel.grant is not None:
                self._endpoint.send_body(tunnel.connection, tunnel.stream_id, encode_barrier())
        self._unanswered_barriers.clear()

    def _hold_early(
        self, connection: int, quarter_stream_id: int, payloads: bytes, segment_size: int
    ) -> None:
        """Datagrams without a tunnel: their request may be on its way (RFC 9297 section 2.1)."""
        peer = self._peers.get(connection)
        if peer is None or quarter_stream_id <= peer.newest_request:
            count = count_payloads(len(payloads), segment_size)
            self._drop(DropReason.UNKNOWN_STREAM, count)
            return
        held = peer.early.get(quarter_stream_id)
        if held is None:
            if len(peer.early) >= _EARLY_STREAMS:
                count = count_payloads(len(payloads), segment_size)
                self._drop(DropReason.EARLY_QUEUE_FULL, count)
                return
            held = peer.early[quarter_stream_id] = self._new_protocol()
            self._early_peers.add(connection)
        self._drop(DropReason.EARLY_QUEUE_FULL, held.hold(payloads, segment_size))

    def _new_protocol(self) -> UdpTunnel:
        return UdpTunnel(
            hold_datagrams=self._limits.early_datagrams_per_tunnel,
            hold_bytes=self._limits.early_bytes_per_tunnel,
        )

    def _drop_early(self, peer: _Peer) -> None:
        for held in peer.early.values():
            for payloads, segment_size in held.discard_held():
                self._drop(DropReason.UNKNOWN_STREAM, count_payloads(len(payloads), segment_size))
        peer.early.clear()

    def _handle(self, event: EndpointEvent, now: float) -> None:
        match event:
            case HeadersReceived():
                self._receive_request(event, now)
            case BodyReceived():
                self._receive_body(event, now)
            case StreamAborted(connection=connection, stream_id=stream_id):
                self._receive_abort(connection, stream_id)
            case ConnectionAccepted(connection=connection, source=source):
                self._gate.accepted(connection, source, now)
                self.counters.connections_total += 1
            case ConnectionOpened(connection=connection, alpn_protocol=alpn):
                self._gate.completed(connection)
                self.counters.handshakes_completed += 1
                self._peers[connection] = _Peer(
                    tunnels=set(),
                    pings={} if alpn == PING_ALPN else None,
                    opened_at=self._unix_now,
                )
                if self._drained_since is not None:  # its handshake was under way
                    self._endpoint.send_goaway(connection)
            case ConnectionClosed(connection=connection):
                if not self._gate.closed(connection):
                    self.counters.handshakes_failed += 1
                peer = self._peers.pop(connection, None)
                if peer is not None:
                    self._drop_early(peer)
                    for tunnel in list(peer.tunnels):
                        self._forget(tunnel, "its connection ended", from_peer=False)
            case RawStreamReceived():
                self._receive_ping(event, now)

    def _receive_abort(self, connection: int, stream_id: int) -> None:
        tunnel = self._tunnels.get((connection, stream_id // 4))
        if tunnel is not None:
            self._endpoint.abort_stream(connection, stream_id, H3_REQUEST_CANCELLED)
            self._forget(tunnel, "the client gave it up")
            return
        peer = self._peers.get(connection)
        if peer is not None and peer.pings is not None:
            peer.pings.pop(stream_id, None)
            self._engine.reset_stream(connection, stream_id, H3_REQUEST_CANCELLED)

    # requests

    def _receive_request(self, event: HeadersReceived, now: float) -> None:
        connection, stream_id = event.connection, event.stream_id
        peer = self._peers.get(connection)
        if peer is None:
            return
        existing = self._tunnels.get((connection, stream_id // 4))
        if existing is not None:  # trailers: the capsule protocol has none
            self._close_tunnel(existing, H3_CONNECT_ERROR)
            return
        peer.newest_request = max(peer.newest_request, stream_id // 4)
        try:
            request = validate_request(event.headers)
        except RequestError as error:
            self._refuse(
                connection, stream_id, Denial(error.status, "http_request_error", str(error))
            )
            return
        if event.ended:
            self._refuse(connection, stream_id, _ENDED_EARLY)
            return
        if len(peer.tunnels) >= self._limits.max_tunnels_per_connection:
            denial = Denial(429, "connection_limit_reached", "too many tunnels on this connection")
            self._refuse(connection, stream_id, denial)
            return
        protocol = peer.early.pop(stream_id // 4, None) or self._new_protocol()
        target = request.target
        is_echo = (
            not request.is_forward
            and target.port in ECHO_PORTS
            and self._is_own_name(target.host, request.authority)
        )
        source = self._engine.peer_address(connection)
        question = AdmissionRequest(
            request=self._next_question,
            authorization=request.authorization,
            host=target.host,
            port=target.port,
            protocol=target.protocol,
            is_echo=is_echo,
            source=source[0] if source is not None else "",
            connection=connection,
            quarter_stream_id=stream_id // 4,
        )
        tunnel = Tunnel(connection, stream_id, protocol, question, now=now)
        if len(self._questions) >= self._limits.max_pending_admissions or not self._shell.ask(
            question
        ):
            denial = Denial(429, "connection_limit_reached", "too many tunnels are being opened")
            self._refuse(connection, stream_id, denial)
            return
        self._next_question += 1
        self._questions[question.request] = tunnel
        peer.tunnels.add(tunnel)
        self._tunnels[tunnel.key] = tunnel

    def _is_own_name(self, host: str, authority: str) -> bool:
        if host in self._own_names or host == host_of(authority):
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def receive_answer(self, answer: Admitted | TokenAnswer, now: float) -> None:
        """The control plane decided. Answers to questions that timed out are ignored."""
        asked = self._questions.pop(answer.request, None)
        if isinstance(answer, TokenAnswer):
            if isinstance(asked, Ping):
                peer = self._peers.get(asked.connection)
                if peer is not None:
                    peer.pings_asked -= 1
                self._answer_ping(asked.connection, asked.stream_id, is_valid=answer.is_valid)
                if not answer.is_valid:
                    self._count_failed_auth(asked.connection, now)
            return
        if isinstance(asked, Renewal):
            asked.tunnel.renew(asked, answer.grant)
            if answer.denial is not None and answer.denial.status == 401:
                self._count_failed_auth(asked.connection, now)
            return
        if not isinstance(asked, Tunnel):
            return
        if asked.key not in self._tunnels:
            if answer.grant is not None:
                self._tell_closed(asked, answer.grant, "the client had gone before it opened")
            return
        if answer.grant is None:
            denial = answer.denial or Denial(502, "proxy_internal_error", "no decision was made")
            self._deny(asked, denial, now)
            return
        self._open(asked, answer.grant, now)

    def _open(self, tunnel: Tunnel, grant: Grant, now: float) -> None:
        if not grant.is_echo:
            try:
                tunnel.target = self._shell.open_target(tunnel, grant)
            except TargetError as error:
                self._deny(tunnel, Denial(error.status, error.proxy_status, str(error)), now)
                self._tell_closed(tunnel, grant, str(error))
                return
        tunnel.grant = grant
        tunnel.opened_at = self._unix_now
        tunnel.last_active = now
        tunnel.capsules_only = not self._endpoint.may_send_datagrams(tunnel.connection)
        self.counters.tunnels_total += 1
        self.counters.count_admission("granted")
        self._endpoint.send_headers(
            tunnel.connection,
            tunnel.stream_id,
            [*response_headers(200), BARRIER_FIELD, RENEWAL_FIELD],
        )
        for payloads, segment_size in tunnel.protocol.open():
            self._send_to_target(tunnel, payloads, segment_size, now)
        if self._drained_since is not None:
            self._tell_to_wrap_up(tunnel)

    def _deny(self, tunnel: Tunnel, denial: Denial, now: float) -> None:
        for payloads, segment_size in tunnel.protocol.discard_held():
            self._drop(DropReason.TUNNEL_REFUSED, count_payloads(len(payloads), segment_size))
        self._forget(tunnel, denial.details)
        self._refuse(tunnel.connection, tunnel.stream_id, denial)
        if denial.status == 401:
            self._count_failed_auth(tunnel.connection, now)

    def _count_failed_auth(self, connection: int, now: float) -> None:
        peer = self._peers.get(connection)
        if peer is None:
            return
        peer.failed_auth += 1
        if peer.failed_auth >= self._limits.max_failed_auth_per_connection:
            self._endpoint.close(
                connection, H3_EXCESSIVE_LOAD, "too many failed authentications", now
            )

    def _refuse(self, connection: int, stream_id: int, denial: Denial) -> None:
        self.counters.count_admission(str(denial.status))
        headers = response_headers(
            denial.status,
            proxy_status=encode_proxy_status(
                self._proxy_name,
                error=denial.proxy_status,
                details=denial.details,
                rule=denial.rule,
            ),
            www_authenticate=denial.status == 401,
        )
        self._endpoint.send_headers(connection, stream_id, headers, end=True)
        # what the client still sends on this stream is of no use to anybody
        self._endpoint.stop_reading(connection, stream_id)

    # payloads

    def _receive_body(self, event: BodyReceived, now: float) -> None:
        tunnel = self._tunnels.get((event.connection, event.stream_id // 4))
        if tunnel is None:
            return
        protocol = tunnel.protocol
        unknown_before = protocol.unknown_contexts
        try:
            payloads = protocol.receive_body(event.data, ended=event.ended)
        except PeerError as error:
            self._close_tunnel(tunnel, error.h3_error_code)
            return
        self._drop(DropReason.UNKNOWN_CONTEXT, protocol.unknown_contexts - unknown_before)
        self.counters.capsules_received += len(payloads)
        for payload in payloads:
            if tunnel.grant is None:
                self._drop(DropReason.EARLY_QUEUE_FULL, protocol.hold(payload, len(payload)))
            else:
                self._send_to_target(tunnel, payload, len(payload), now)
        if tunnel.barriers_answered < min(protocol.barriers, MOST_BARRIERS):
            tunnel.barriers_answered += 1
            self._unanswered_barriers.append(tunnel)
        if event.ended and tunnel.grant is None:
            self._deny(tunnel, _ENDED_EARLY, now)
        elif event.ended:
            self._endpoint.send_body(event.connection, event.stream_id, b"", end=True)
            self._forget(tunnel, "the client ended it")

    def _send_to_target(
        self, tunnel: Tunnel, payloads: Buffer, segment_size: int, now: float
    ) -> None:
        counters = self.counters
        count = count_payloads(len(payloads), segment_size)
        tunnel.last_active = now
        if tunnel.target is None:  # echo
            counters.datagrams_to_target += count
            counters.bytes_to_target += len(payloads)
            self.receive_from_target(tunnel, payloads, segment_size, now)
            return
        target = tunnel.target
        result = target.send(payloads, segment_size)
        sent = len(payloads)
        if result is SendResult.UNREACHABLE and not target.sent_bytes:
            # the error belongs to an earlier datagram (ICMP); this one was not sent yet
            result = target.send(payloads, segment_size)
        if result is not SendResult.SENT:
            sent = target.sent_bytes
            unsent = count - (sent // segment_size if segment_size else 0)
            self._drop(_DROP_REASON[result], unsent)
            tunnel.drops += unsent
            count -= unsent
        counters.datagrams_to_target += count
        counters.bytes_to_target += sent
        tunnel.datagrams_to_target += count
        tunnel.bytes_to_target += sent

    def receive_from_target(
        self, tunnel: Tunnel, payloads: Buffer, segment_size: int, now: float
    ) -> None:
        """What a target socket received: on to the client."""
        count = count_payloads(len(payloads), segment_size)
        tunnel.last_active = now
        connection, quarter_stream_id = tunnel.connection, tunnel.stream_id // 4
        largest = segment_size or len(payloads)
        if not tunnel.capsules_only and largest <= self._engine.max_payload_bytes(
            connection, quarter_stream_id
        ):
            self._engine.send_datagrams(connection, quarter_stream_id, payloads, segment_size)
        else:
            backlog = self._engine.stream_backlog_bytes(connection, tunnel.stream_id)
            if (
                backlog + len(payloads) > self._limits.capsule_queue_bytes
                or self._capsule_backlog(connection) + len(payloads)
                > self._limits.connection_capsule_queue_bytes
            ):
                self._drop(DropReason.CAPSULE_QUEUE_FULL, count)
                tunnel.drops += count
                return
            capsules = encode_datagram_capsules(payloads, segment_size)
            self._endpoint.send_body(connection, tunnel.stream_id, capsules)
            self.counters.capsules_sent += count
        self.counters.datagrams_to_client += count
        self.counters.bytes_to_client += len(payloads)
        tunnel.datagrams_to_client += count
        tunnel.bytes_to_client += len(payloads)

    def _capsule_backlog(self, connection: int) -> int:
        """What waits on all tunnels' streams of a connection, in bytes."""
        return sum(
            self._engine.stream_backlog_bytes(connection, tunnel.stream_id)
            for tunnel in self._peers[connection].tunnels
        )

    def _drop(self, reason: DropReason, count: int) -> None:
        if count:
            self.counters.count_drop(reason, count)

    def _count_overflow(self, tunnel: Tunnel) -> None:
        if tunnel.target is not None:
            overflow = tunnel.target.overflow
            self._drop(DropReason.TARGET_OVERFLOW, overflow - tunnel.overflow)
            tunnel.drops += overflow - tunnel.overflow
            tunnel.overflow = overflow

    # the end of things

    def _close_tunnel(self, tunnel: Tunnel, error_code: int) -> None:
        self._endpoint.abort_stream(tunnel.connection, tunnel.stream_id, error_code)
        self._forget(tunnel, "the client broke the protocol")

    def _tell_closed(self, tunnel: Tunnel, grant: Grant, reason: str) -> None:
        self._shell.tunnel_closed(tunnel.closed(grant, reason, self._unix_now))

    def _forget(self, tunnel: Tunnel, reason: str, *, from_peer: bool = True) -> None:
        if self._tunnels.pop(tunnel.key, None) is None:
            return
        if from_peer:
            self._peers[tunnel.connection].tunnels.discard(tunnel)
        if tunnel.target is not None:
            self._count_overflow(tunnel)
            tunnel.target.close()
        if tunnel.grant is not None:
            self._tell_closed(tunnel, tunnel.grant, reason)

    def drain(self, now: float) -> None:
        """Take nothing new; tell every client, so that it can go elsewhere."""
        if self._drained_since is not None:
            return
        self._drained_since = now
        self._gate.is_draining = True
        for connection in self._peers:
            self._endpoint.send_goaway(connection)
        for tunnel in self._tunnels.values():
            self._tell_to_wrap_up(tunnel)

    def _tell_to_wrap_up(self, tunnel: Tunnel) -> None:
        if tunnel.grant is not None:
            self._endpoint.send_body(tunnel.connection, tunnel.stream_id, encode_wrap_up())

    def _close_idle_drained(self, now: float) -> None:
        assert self._drained_since is not None
        if now - self._drained_since < _GOAWAY_GRACE_S:
            return
        for connection, peer in list(self._peers.items()):
            if not peer.tunnels and not peer.pings_asked:
                self._endpoint.close(connection, H3_NO_ERROR, "the gateway moves on", now)

    @property
    def is_drained(self) -> bool:
        """Nothing is left of what there was when ``drain`` was called."""
        return self._drained_since is not None and not self._gate.connections

    def close_tunnels(self, tunnels: Iterable[tuple[int, int]], denial: Denial) -> int:
        """End live tunnels and say why; how many of them there were."""
        reason = encode_proxy_status(
            self._proxy_name,
            error=denial.proxy_status,
            details=denial.details,
            rule=denial.rule,
        )
        closed = 0
        for key in tunnels:
            tunnel = self._tunnels.get(key)
            if tunnel is None or tunnel.grant is None:
                continue
            closed += 1
            said = encode_tunnel_closed(reason)
            self._endpoint.send_body(tunnel.connection, tunnel.stream_id, said, end=True)
            self._endpoint.stop_reading(tunnel.connection, tunnel.stream_id)
            self.counters.tunnels_cut += 1
            self._forget(tunnel, denial.details)
        return closed

    def ask_again(self) -> None:
        """There is a new control plane: put every open question to it."""
        for asked in self._questions.values():
            self._shell.ask(asked.request)

    def live_tunnels(self, *, with_authorization: bool) -> Iterator[LiveTunnel]:
        """Every open tunnel."""
        for tunnel in self._tunnels.values():
            if tunnel.grant is not None:
                source = _source_text(self._engine.peer_address(tunnel.connection))
                yield tunnel.live(tunnel.grant, source, with_authorization=with_authorization)

    def live_connections(self) -> Iterator[LiveConnection]:
        """Every open connection."""
        for connection, peer in self._peers.items():
            yield LiveConnection(
                connection=connection,
                source=_source_text(self._engine.peer_address(connection)),
                alpn=PING_ALPN if peer.pings is not None else H3_ALPN,
                tunnels=len(peer.tunnels),
                opened_at=peer.opened_at,
                round_trip_s=self._engine.round_trip_s(connection),
            )

    def tick(self, now: float, unix_now: float) -> None:
        """Once a second or so: end what took too long."""
        self._unix_now = unix_now
        if self._drained_since is not None:
            self._close_idle_drained(now)
        for connection in self._gate.overdue(now):
            self._endpoint.close(connection, H3_NO_ERROR, "the handshake took too long", now)
        for connection in self._early_peers:
            peer = self._peers.get(connection)
            if peer is not None:
                self._drop_early(peer)
        self._early_peers.clear()
        limits = self._limits
        for request, asked in list(self._questions.items()):
            if isinstance(asked, Tunnel):
                if asked.key not in self._tunnels:
                    del self._questions[request]
                elif now - asked.asked_at >= limits.admission_timeout_s:
                    del self._questions[request]
                    denial = Denial(
                        504, "proxy_internal_error", "the gateway took too long to decide"
                    )
                    self._deny(asked, denial, now)
            elif asked.connection not in self._peers:
                del self._questions[request]
        for tunnel in list(self._tunnels.values()):
            grant = tunnel.grant
            if grant is None:
                continue
            self._ask_about_renewal(tunnel)
            if now - tunnel.last_active < _OVERFLOW_INTERVAL_S:
                self._count_overflow(tunnel)
            is_expired = grant.expires_at is not None and unix_now >= grant.expires_at
            if is_expired or now - tunnel.last_active >= limits.tunnel_idle_timeout_s:
                self._endpoint.send_body(tunnel.connection, tunnel.stream_id, b"", end=True)
                self._endpoint.stop_reading(tunnel.connection, tunnel.stream_id)
                self._forget(tunnel, "its credential expired" if is_expired else "it was idle")

    def _ask_about_renewal(self, tunnel: Tunnel) -> None:
        """Once per tick at most: a client's newer token costs the control plane a decision."""
        if len(self._questions) >= self._limits.max_pending_admissions:
            return
        renewal = tunnel.take_renewal(self._next_question)
        if renewal is not None and self._shell.ask(renewal.request):
            self._next_question += 1
            tunnel.renewal = self._questions[renewal.request.request] = renewal

    def close(self, now: float) -> None:
        """The gateway stops: say so on every connection."""
        for connection in list(self._peers):
            self._endpoint.close(connection, H3_NO_ERROR, "the gateway is stopping", now)
        for tunnel in list(self._tunnels.values()):
            self.counters.tunnels_cut += tunnel.grant is not None
            self._forget(tunnel, "its worker ended")

    # toppy-ping (T-064)

    def _receive_ping(self, event: RawStreamReceived, now: float) -> None:
        peer = self._peers.get(event.connection)
        if peer is None or peer.pings is None:
            return
        said = peer.pings.pop(event.stream_id, b"") + event.data
        if len(said) > _PING_BYTES:
            self._endpoint.close(event.connection, H3_EXCESSIVE_LOAD, "the ping is too long", now)
            return
        if not event.ended:
            peer.pings[event.stream_id] = said
            return
        self.counters.pings += 1
        word, _, token = said.decode("utf-8", "replace").strip().partition(" ")
        question = TokenRequest(request=self._next_question, authorization=token.strip() or None)
        if (
            word != "ping"
            or peer.pings_asked >= _PINGS_AT_ONCE
            or not self._ask_about_ping(question)
        ):
            self._answer_ping(event.connection, event.stream_id, is_valid=False)
            self._count_failed_auth(event.connection, now)
            return
        self._next_question += 1
        peer.pings_asked += 1
        self._questions[question.request] = Ping(event.connection, event.stream_id, question)

    def _ask_about_ping(self, question: TokenRequest) -> bool:
        return len(self._questions) < self._limits.max_pending_admissions and self._shell.ask(
            question
        )

    def _answer_ping(self, connection: int, stream_id: int, *, is_valid: bool) -> None:
        answer = b"pong" if is_valid else b"unauthorized"
        self._engine.send_stream(connection, stream_id, answer, end=True)

    # what is there

    @property
    def tunnels(self) -> int:
        """Tunnels that exist, those being opened included."""
        return len(self._tunnels)

    def snapshot(self) -> WorkerCounters:
        """The counters, brought up to date."""
        counters = self.counters
        for reason, count in self._endpoint.take_drops().items():
            counters.count_drop(reason, count)
        counters.connections_open = self._gate.connections
        counters.tunnels_open = len(self._tunnels)
        counters.handshakes_retried = self._gate.retried
        counters.handshakes_refused = self._gate.refused
        return counters


def _source_text(address: Address | None) -> str:
    if address is None:
        return ""
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
