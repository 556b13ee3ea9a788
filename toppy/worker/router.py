"""From HTTP requests to tunnels: what a gateway worker decides between its two sides.

No sockets here: the shell gives a clock reading with every call, asks the control plane and opens
target sockets when told to, so that tests drive the router with plain values.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator

from toppy import __version__
from toppy.errors import PeerError, ResourceLimitError, TargetError
from toppy.model.client_certificate import ClientCertificate
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial, Grant
from toppy.model.target import Target
from toppy.protocol.udp_tunnel import (
    Buffer,
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
from toppy.quic.engine import Address, ConnectionAccepted, ConnectionClosed, StreamWritable
from toppy.quic.gate import ConnectionGate
from toppy.quic.h3 import H3_CONNECT_ERROR, H3_EXCESSIVE_LOAD, H3_NO_ERROR, H3_REQUEST_CANCELLED
from toppy.wire.capsule import (
    encode_tunnel_closed,
    encode_wrap_up,
)
from toppy.wire.connect_udp import RequestError, host_of
from toppy.wire.gateway_facts import date_field, diagnostic_fields
from toppy.wire.ipc_message import (
    AdmissionRequest,
    Admitted,
    LiveConnection,
    LiveTunnel,
    TokenAnswer,
)
from toppy.wire.proxy_status import encode_proxy_status
from toppy.wire.tunnel_request import (
    TunnelKind,
    TunnelRequest,
    continue_headers,
    response_headers,
    validate_tunnel_request,
)
from toppy.worker.guesses import Guesses
from toppy.worker.metering import Metering
from toppy.worker.pings import Pings
from toppy.worker.questions import Asked, Questions
from toppy.worker.tcp_relay import TcpTunnels
from toppy.worker.tunnel import Peer, Ping, Renewal, RouterLimits, RouterShell, Tunnel
from toppy.worker.udp_relay import UdpFlow, UdpRelay

ECHO_PORTS = (7, 9)
"""The built-in echo answers for the gateway's own name on echo's and discard's port (T-066)."""

_OVERFLOW_INTERVAL_S = 5.0
"""Only a tunnel that was busy so recently can have lost something; a few ticks fit in."""
_GOAWAY_GRACE_S = 1.0
"""A client that was told to go elsewhere leaves by itself; one without tunnels is sent away."""

_ENDED_EARLY = Denial(400, "http_request_error", "the request ended before the tunnel began")


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
        read_certificate: Callable[[int], ClientCertificate | None] = lambda _: None,
    ) -> None:
        """``read_certificate``: what a connection's client has shown, verified."""
        self._endpoint = endpoint
        self._engine = endpoint.engine
        self._gate = gate
        self._shell = shell
        self._limits = limits
        self._proxy_name = proxy_name
        self._own_names = own_names
        self._peers: dict[int, Peer] = {}
        self._tunnels: dict[tuple[int, int], Tunnel] = {}
        self._drained_since: float | None = None
        self._ended: list[tuple[int, int]] = []
        """(connection, stream ID) of tunnels that the gateway has ended since the last tick."""
        self._ended_before: list[tuple[int, int]] = []
        self._unix_now = unix_now
        self._read_certificate = read_certificate
        self.counters = WorkerCounters()
        self._questions = Questions(shell, limits.max_pending_admissions)
        self._udp = UdpRelay(
            endpoint, shell, limits, self.counters, tunnels=self._tunnels, peers=self._peers
        )
        self._tcp = TcpTunnels(
            endpoint,
            shell,
            limits,
            self.counters,
            connected=self.connected,
            not_connected=self.not_connected,
            finished=self._forget,
        )
        self._guesses = Guesses(limits.max_failed_auth_per_source_per_min)
        self._pings = Pings(endpoint, self._questions, self._guesses, self.counters, self._peers)
        self.metering = Metering(self._tunnels)

    # events from the network

    def pump(self, now: float) -> None:
        """Take everything that the endpoint has."""
        for event in self._endpoint.poll_events(now):
            self._handle(event, now)
        self._udp.pump(now)

    def _handle(self, event: EndpointEvent, now: float) -> None:
        match event:
            case HeadersReceived():
                self._receive_request(event, now)
            case BodyReceived():
                self._receive_body(event, now)
            case StreamAborted():
                self._receive_abort(event)
            case StreamWritable(connection=connection, stream_id=stream_id):
                tunnel = self._tunnels.get((connection, stream_id // 4))
                if tunnel is not None:
                    tunnel.receive_writable()
            case ConnectionAccepted(connection=connection, source=source):
                self._gate.accepted(connection, source, now)
                self.counters.connections_total += 1
            case ConnectionOpened(connection=connection, alpn_protocol=alpn):
                self._gate.completed(connection)
                self.counters.handshakes_completed += 1
                self._peers[connection] = Peer(
                    tunnels=set(),
                    pings={} if alpn == PING_ALPN else None,
                    opened_at=self._unix_now,
                    certificate=self._read_certificate(connection),
                )
                if self._drained_since is not None:  # its handshake was under way
                    self._endpoint.send_goaway(connection)
            case ConnectionClosed(connection=connection):
                if not self._gate.closed(connection):
                    self.counters.handshakes_failed += 1
                peer = self._peers.pop(connection, None)
                if peer is not None:
                    self._udp.drop_early(peer)
                    for tunnel in list(peer.tunnels):
                        self._forget(tunnel, "its connection ended", from_peer=False)
            case RawStreamReceived():
                if not self._pings.receive(event, now):
                    self._count_failed_auth(event.connection, now)

    def _receive_abort(self, event: StreamAborted) -> None:
        connection, stream_id = event.connection, event.stream_id
        tunnel = self._tunnels.get((connection, stream_id // 4))
        if tunnel is not None:
            if not tunnel.is_ended_by(event):
                return
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
            request = validate_tunnel_request(event.headers)
        except RequestError as error:
            denial = Denial(error.status, "http_request_error", str(error))
            self._refuse_unasked(connection, stream_id, denial)
            return
        if event.ended:
            self._refuse_unasked(connection, stream_id, _ENDED_EARLY, request)
            return
        if len(peer.tunnels) >= self._limits.max_tunnels_per_connection:
            denial = Denial(429, "connection_limit_reached", "too many tunnels on this connection")
            self._refuse_unasked(connection, stream_id, denial, request)
            return
        target = request.target
        is_echo = (
            request.kind is TunnelKind.UDP
            and not request.is_forward
            and target.port in ECHO_PORTS
            and self._is_own_name(target.host, request.authority)
        )
        source = self._engine.peer_address(connection)
        question = AdmissionRequest(
            request=self._questions.next_number,
            authorization=request.authorization,
            host=target.host,
            port=target.port,
            protocol=target.protocol,
            is_echo=is_echo,
            source=source[0] if source is not None else "",
            connection=connection,
            quarter_stream_id=stream_id // 4,
            certificate=peer.certificate,
        )
        guessed = self._guesses.denial(question, now)
        if guessed is not None:
            self._refuse_unasked(connection, stream_id, guessed, request)
            self._count_failed_auth(connection, now)
            return
        tunnel: Tunnel
        if request.kind is TunnelKind.UDP:
            tunnel = self._udp.new_flow(peer, connection, stream_id, question, now)
        else:
            tunnel = self._tcp.new_flow(connection, stream_id, request.kind, question, now)
        if not self._questions.ask(tunnel):
            denial = Denial(429, "connection_limit_reached", "too many tunnels are being opened")
            self._refuse_unasked(connection, stream_id, denial, request)
            return
        if request.expects_continue:
            self._endpoint.send_headers(connection, stream_id, continue_headers())
        peer.tunnels.add(tunnel)
        self._tunnels[tunnel.key] = tunnel
        self.counters.tcp_tunnels_open += tunnel.kind is not TunnelKind.UDP

    def _is_own_name(self, host: str, authority: str) -> bool:
        if host in self._own_names or host == host_of(authority):
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def receive_answer(self, answer: Admitted | TokenAnswer, now: float) -> None:
        """The control plane decided. Answers to questions that timed out are ignored."""
        asked = self._questions.take(answer.request)
        if isinstance(answer, Admitted) and answer.grant is not None:
            self.metering.count_grant()
        if asked is not None:
            self._learn(asked, answer, now)
        if isinstance(answer, TokenAnswer):
            if isinstance(asked, Ping):
                self._pings.receive_answer(asked, is_valid=answer.is_valid)
                if not answer.is_valid:
                    self._count_failed_auth(asked.connection, now)
            return
        if isinstance(asked, Renewal):
            asked.tunnel.renew(asked, answer.grant)
            if asked.tunnel.key in self._tunnels:
                self.metering.attach(asked.tunnel, now)
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

    def _learn(self, asked: Asked, answer: Admitted | TokenAnswer, now: float) -> None:
        """Whether the credential was good, whatever else is to be said."""
        if isinstance(answer, TokenAnswer):
            is_good, is_bad = answer.is_valid, not answer.is_valid
        else:
            is_good = answer.grant is not None
            is_bad = answer.denial is not None and answer.denial.status == 401
        if is_good:
            self._guesses.succeeded(asked.request)
        elif is_bad:
            self._guesses.failed(asked.request, now)

    def _open(self, tunnel: Tunnel, grant: Grant, now: float) -> None:
        tunnel.grant = grant
        self.metering.attach(tunnel, now)
        try:
            is_connected = tunnel.connect(grant, now)
        except TargetError as error:
            self.not_connected(tunnel, error, now)
            return
        if is_connected:
            self.connected(tunnel, now)

    def not_connected(self, tunnel: Tunnel, error: TargetError, now: float) -> None:
        """The target of a granted tunnel was not reached."""
        self._deny(tunnel, Denial(error.status, error.proxy_status, str(error)), now)

    def connected(self, tunnel: Tunnel, now: float) -> None:
        """The target of a granted tunnel was reached: the tunnel is open."""
        tunnel.is_open = True
        tunnel.opened_at = self._unix_now
        tunnel.last_active = now
        self.counters.tunnels_total += 1
        self.counters.tcp_tunnels_total += tunnel.kind is not TunnelKind.UDP
        self.counters.count_admission("granted")
        headers = response_headers(tunnel.kind, 200, proxy_status=self._next_hop(tunnel.address))
        headers += tunnel.offers
        if tunnel.grant is not None and tunnel.grant.is_echo:
            source = self._engine.peer_address(tunnel.connection)
            headers.append(date_field(self._unix_now))
            headers += diagnostic_fields(__version__, self._engine.name, source)
        self._endpoint.send_headers(tunnel.connection, tunnel.stream_id, headers)
        tunnel.begin(now)
        if self._drained_since is not None:
            self._tell_to_wrap_up(tunnel)

    def _next_hop(self, address: str) -> str | None:
        return encode_proxy_status(self._proxy_name, next_hop=address) if address else None

    def _deny(self, tunnel: Tunnel, denial: Denial, now: float) -> None:
        tunnel.discard_held()
        self._forget(tunnel, denial.details)
        self._refuse(tunnel.connection, tunnel.stream_id, denial, tunnel.kind)
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

    def _refuse_unasked(
        self,
        connection: int,
        stream_id: int,
        denial: Denial,
        request: TunnelRequest | None = None,
    ) -> None:
        """The control plane was not asked, or has not answered: it is told for the audit log."""
        kind, target = TunnelKind.UDP, ""
        if request is not None:
            kind, target = request.kind, str(request.target)
        self._tell_refused(connection, target, denial)
        self._refuse(connection, stream_id, denial, kind)

    def _tell_refused(self, connection: int, target: str, denial: Denial) -> None:
        source = self._engine.peer_address(connection)
        self._shell.refused(source[0] if source is not None else "", target, denial)

    def _refuse(
        self, connection: int, stream_id: int, denial: Denial, kind: TunnelKind = TunnelKind.UDP
    ) -> None:
        self.counters.count_admission(str(denial.status))
        headers = response_headers(
            kind,
            denial.status,
            proxy_status=encode_proxy_status(
                self._proxy_name,
                error=denial.proxy_status,
                details=denial.details,
                rule=denial.rule,
            ),
            needs_credentials=denial.status == 401,
        )
        headers.append(date_field(self._unix_now))
        if denial.retry_after_s:
            headers.append((b"retry-after", str(denial.retry_after_s).encode()))
        self._endpoint.send_headers(connection, stream_id, headers, end=True)
        # what the client still sends on this stream is of no use to anybody
        self._endpoint.stop_reading(connection, stream_id)

    # payloads

    def _receive_body(self, event: BodyReceived, now: float) -> None:
        tunnel = self._tunnels.get((event.connection, event.stream_id // 4))
        if tunnel is None:
            return
        try:
            is_over = tunnel.receive_body(event, now)
        except PeerError as error:
            self._close_tunnel(tunnel, error.h3_error_code)
            return
        except ResourceLimitError as error:
            self._deny(tunnel, Denial(429, "connection_limit_reached", str(error)), now)
            return
        if is_over and not tunnel.is_open:
            self._deny(tunnel, _ENDED_EARLY, now)
        elif is_over:
            self._endpoint.send_body(event.connection, event.stream_id, b"", end=True)
            self._forget(tunnel, "the client ended it")

    @property
    def receive_from_target(self) -> Callable[[UdpFlow, Buffer, int, float], None]:
        """What a UDP target's socket received: on to the client."""
        return self._udp.receive_from_target

    # the end of things

    def _end(self, tunnel: Tunnel, said: bytes) -> None:
        """The gateway ends an open tunnel, with a last capsule where there are capsules."""
        connection, stream_id = tunnel.connection, tunnel.stream_id
        if tunnel.has_capsules:
            self._endpoint.send_body(connection, stream_id, said, end=True)
            self._endpoint.stop_reading(connection, stream_id)
            self._ended.append((connection, stream_id))
        else:
            self._endpoint.abort_stream(connection, stream_id, H3_CONNECT_ERROR)

    def _cut_ended(self) -> None:
        """Last words wait behind payload that a slow client has not taken: where they have not got
        through by the second tick, a reset ends the stream without them.
        """
        for connection, stream_id in self._ended_before:
            self._engine.reset_stream(connection, stream_id, H3_CONNECT_ERROR)
        self._ended_before, self._ended = self._ended, []

    def _close_tunnel(self, tunnel: Tunnel, error_code: int) -> None:
        self.counters.protocol_errors += 1
        self._endpoint.abort_stream(tunnel.connection, tunnel.stream_id, error_code)
        self._forget(tunnel, "the client broke the protocol")

    def _tell_closed(self, tunnel: Tunnel, grant: Grant, reason: str) -> None:
        self._shell.tunnel_closed(tunnel.closed(grant, reason, self._unix_now))

    def _forget(self, tunnel: Tunnel, reason: str, *, from_peer: bool = True) -> None:
        if self._tunnels.pop(tunnel.key, None) is None:
            return
        self.counters.tcp_tunnels_open -= tunnel.kind is not TunnelKind.UDP
        if from_peer:
            peer = self._peers[tunnel.connection]
            peer.tunnels.discard(tunnel)
            peer.tails.add(tunnel.stream_id)
            self._forget_sent_tails(tunnel.connection, peer)
        tunnel.release()
        self.metering.detach(tunnel)
        if tunnel.grant is not None:
            self._tell_closed(tunnel, tunnel.grant, reason)

    def drain(self, now: float) -> None:
        """Take nothing new; tell every client, so that it can go elsewhere."""
        if self._drained_since is not None:
            return
        self._drained_since = now
        self._gate.is_draining = True
        for connection, peer in self._peers.items():
            self._endpoint.send_goaway(connection)
            peer.idle_since = now
        for tunnel in self._tunnels.values():
            self._tell_to_wrap_up(tunnel)

    def _tell_to_wrap_up(self, tunnel: Tunnel) -> None:
        if tunnel.is_open and tunnel.has_capsules:
            self._endpoint.send_body(tunnel.connection, tunnel.stream_id, encode_wrap_up())

    def _close_idle_drained(self, now: float) -> None:
        for connection, peer in list(self._peers.items()):
            if self._is_busy(connection, peer):
                peer.idle_since = None
            elif peer.idle_since is None:
                peer.idle_since = now
            elif now - peer.idle_since >= _GOAWAY_GRACE_S:
                self._endpoint.close(connection, H3_NO_ERROR, "the gateway moves on", now)

    def _is_busy(self, connection: int, peer: Peer) -> bool:
        # what has left the engine may have to be sent again: the grace is for that
        self._forget_sent_tails(connection, peer)
        return bool(peer.tunnels or peer.pings_asked or peer.tails)

    def _forget_sent_tails(self, connection: int, peer: Peer) -> None:
        peer.tails = {
            stream_id
            for stream_id in peer.tails
            if self._endpoint.stream_backlog_bytes(connection, stream_id)
        }

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
            if not tunnel.is_open:
                self._deny(tunnel, denial, tunnel.asked_at)
                continue
            self._end(tunnel, encode_tunnel_closed(reason))
            self.counters.tunnels_cut += 1
            self._forget(tunnel, denial.details)
        return closed

    def ask_again(self) -> None:
        """There is a new control plane: put every open question to it."""
        self._questions.ask_again()

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
        self._cut_ended()
        if self._drained_since is not None:
            self._close_idle_drained(now)
        for connection in self._gate.overdue(now):
            self._endpoint.close(connection, H3_NO_ERROR, "the handshake took too long", now)
        self._udp.forget_early()
        limits = self._limits
        for number, asked in self._questions:
            if isinstance(asked, Tunnel):
                if asked.key not in self._tunnels:
                    self._questions.take(number)
                elif now - asked.asked_at >= limits.admission_timeout_s:
                    self._questions.take(number)
                    denial = Denial(
                        504, "proxy_internal_error", "the gateway took too long to decide"
                    )
                    self._tell_refused(asked.connection, asked.target_name, denial)
                    self._deny(asked, denial, now)
            elif asked.connection not in self._peers:
                self._questions.take(number)
        for tunnel in list(self._tunnels.values()):
            grant = tunnel.grant
            if grant is None or not tunnel.is_open:
                continue
            self._ask_about_renewal(tunnel)
            if now - tunnel.last_active < _OVERFLOW_INTERVAL_S:
                tunnel.count_losses()
            is_expired = grant.expires_at is not None and unix_now >= grant.expires_at
            if is_expired and grant.ends_with_rule:
                self.close_tunnels([tunnel.key], _time_is_over(tunnel.request, grant.rule))
            elif is_expired or now - tunnel.last_active >= tunnel.idle_timeout_s(limits):
                reason = "its credential expired" if is_expired else "it was idle"
                self._end(tunnel, self._last_words(tunnel, reason, is_idle=not is_expired))
                self._forget(tunnel, reason)

    def _last_words(self, tunnel: Tunnel, reason: str, *, is_idle: bool) -> bytes:
        """A UDP tunnel is asked for again when it is needed; a TCP one is lost, and says why."""
        if tunnel.kind is TunnelKind.UDP:
            return b""
        error = "connection_read_timeout" if is_idle else "http_request_denied"
        details = f"the tunnel ended: {reason}"
        return encode_tunnel_closed(
            encode_proxy_status(self._proxy_name, error=error, details=details)
        )

    def _ask_about_renewal(self, tunnel: Tunnel) -> None:
        """Once per tick at most: a client's newer token costs the control plane a decision."""
        if self._questions.is_full:
            return
        renewal = tunnel.take_renewal(self._questions.next_number)
        if renewal is not None and self._questions.ask(renewal):
            tunnel.renewal = renewal

    def close(self, now: float) -> None:
        """The gateway stops: say so on every connection."""
        for connection in list(self._peers):
            self._endpoint.close(connection, H3_NO_ERROR, "the gateway is stopping", now)
        for tunnel in list(self._tunnels.values()):
            self.counters.tunnels_cut += tunnel.grant is not None
            self._forget(tunnel, "its worker ended")

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


def _time_is_over(request: AdmissionRequest, rule: str) -> Denial:
    target = Target(request.host, request.port)
    details = f"target {target} is not allowed any more: the time of {rule!r} is over"
    return Denial(403, "http_request_denied", details, rule)


def _source_text(address: Address | None) -> str:
    if address is None:
        return ""
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
