"""A router with a real endpoint in virtual time: a client over a ``Link``, a control plane and
targets that do as the test says.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

from tests.net.fake_socket import FakeSocket
from tests.quic.certificates import SERVER_NAME
from tests.quic.link import CLIENT, SERVER, Link, client_config, make_engine, server_config, split
from toppy.errors import TargetError
from toppy.model.drop_reason import DropReason
from toppy.model.grant import Denial, Grant
from toppy.net.udp_socket import SendResult
from toppy.protocol.udp_tunnel import Buffer
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
from toppy.quic.engine import Address, ConnectionClosed, DatagramGroup, Engine, Event, Transmit
from toppy.quic.gate import ConnectionGate, GateLimits
from toppy.wire.capsule import DATAGRAM, CapsuleParser
from toppy.wire.connect_udp import request_headers
from toppy.wire.ipc_message import (
    AdmissionRequest,
    Admitted,
    ClosedTunnel,
    TokenAnswer,
    TokenRequest,
)
from toppy.worker.router import Router
from toppy.worker.tcp_relay import TcpFlow
from toppy.worker.tunnel import RouterLimits
from toppy.worker.udp_relay import UdpFlow

E = TypeVar("E")
UNIX_NOW = 1_700_000_000.0
LIMITS = RouterLimits(
    max_tunnels_per_connection=3,
    max_failed_auth_per_connection=3,
    max_failed_auth_per_source_per_min=60,
    max_pending_admissions=5,
    admission_timeout_s=10.0,
    tunnel_idle_timeout_s=120.0,
    tcp_idle_timeout_s=7200.0,
    tcp_connect_timeout_s=10.0,
    tcp_max_connecting=3,
    tcp_max_connecting_per_connection=2,
    early_datagrams_per_tunnel=4,
    early_bytes_per_tunnel=5000,
    capsule_queue_bytes=100_000,
    connection_capsule_queue_bytes=250_000,
)
GRANT = Grant(addresses=("192.0.2.53",), port=53, subject="token", rule="dns", revision=1)
ECHO = replace(GRANT, addresses=(), is_echo=True)
DENIAL = Denial(403, "http_request_denied", "not allowed", "default")


class FakeTarget:
    """Keeps what is sent; ``results`` are its next answers, then SENT."""

    def __init__(self, tunnel: UdpFlow, grant: Grant) -> None:
        self.tunnel = tunnel
        self.grant = grant
        self.sent: list[bytes] = []
        self.results: deque[tuple[SendResult, int]] = deque()
        self.sent_bytes = 0
        self.overflow = 0
        self.is_closed = False
        self.address = grant.addresses[0] if grant.addresses else ""

    def send(self, payloads: Buffer, segment_size: int) -> SendResult:
        assert not self.is_closed
        result, self.sent_bytes = (
            self.results.popleft() if self.results else (SendResult.SENT, len(payloads))
        )
        if self.sent_bytes or result is SendResult.SENT:
            self.sent += split(bytes(payloads)[: self.sent_bytes], segment_size)
        return result

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


@dataclass
class FakeConnecting:
    """An attempt to reach a TCP target."""

    flow: TcpFlow
    grant: Grant
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeTcpTarget(FakeSocket):
    """The socket to a TCP target."""

    def __init__(self, flow: TcpFlow, room: int = 1 << 30) -> None:
        super().__init__(room)
        self.flow = flow

    def drain(self) -> None:
        """The target reads everything."""
        self.room = 1 << 30


@dataclass
class FakeShell:
    """The control plane and the network behind the worker."""

    asked: list[AdmissionRequest | TokenRequest] = field(default_factory=list)
    can_ask: bool = True
    time: float = 0.0
    targets: list[FakeTarget] = field(default_factory=list)
    failure: TargetError | None = None
    connecting: list[FakeConnecting] = field(default_factory=list)
    closed: list[ClosedTunnel] = field(default_factory=list)
    refusals: list[tuple[str, str, int, str]] = field(default_factory=list)

    def tunnel_closed(self, tunnel: ClosedTunnel) -> None:
        self.closed.append(tunnel)

    def refused(self, source: str, target: str, denial: Denial) -> None:
        self.refusals.append((source, target, denial.status, denial.details))

    def ask(self, message: AdmissionRequest | TokenRequest) -> bool:
        if self.can_ask:
            self.asked.append(message)
        return self.can_ask

    def open_udp(self, tunnel: UdpFlow, grant: Grant) -> FakeTarget:
        if self.failure is not None:
            raise self.failure
        self.targets.append(FakeTarget(tunnel, grant))
        return self.targets[-1]

    def flush(self) -> None:
        pass

    def now(self) -> float:
        return self.time

    def connect_tcp(self, flow: TcpFlow, grant: Grant, timeout_s: float) -> FakeConnecting:
        assert timeout_s == LIMITS.tcp_connect_timeout_s
        self.connecting.append(FakeConnecting(flow, grant))
        return self.connecting[-1]


class _Node:
    """Looks like an engine to ``Link``: passes packets to an endpoint."""

    def __init__(self, endpoint: Endpoint, link: Link) -> None:
        self.endpoint = endpoint
        self.engine = endpoint.engine
        self.link = link
        self.name = self.engine.name

    def receive(self, buffer: Buffer, segment_size: int, source: Address, now: float) -> None:
        self.endpoint.receive(buffer, segment_size, source, now)

    def handle_timeout(self, now: float) -> None:
        self.endpoint.handle_timeout(now)

    def next_timeout(self) -> float | None:
        return self.endpoint.next_timeout()

    def poll_events(self) -> list[Event]:
        self.pump()
        return []

    def pump(self) -> None:
        raise NotImplementedError

    def poll_datagrams(self) -> list[DatagramGroup]:
        return []

    def poll_transmits(self, now: float) -> list[Transmit]:
        return self.endpoint.poll_transmits(now)

    def take_drops(self) -> dict[DropReason, int]:
        return {}


class GatewayNode(_Node):
    """The router under test."""

    def __init__(self, engine: str, link: Link, limits: RouterLimits) -> None:
        self.gate = ConnectionGate(
            GateLimits(
                max_connections=10,
                max_connections_per_source=10,
                retry_threshold=10,
                handshake_timeout_s=5.0,
            )
        )
        config = server_config(alpn_protocols=(H3_ALPN, PING_ALPN))
        made = make_engine(engine, config, gate=self.gate.decide)
        super().__init__(Endpoint(made, is_client=False), link)
        self.shell = FakeShell()
        self.router = Router(
            self.endpoint,
            self.gate,
            self.shell,
            limits,
            proxy_name="toppy-gw",
            own_names=frozenset({"localhost", SERVER_NAME}),
        )

    def pump(self) -> None:
        self.router.pump(self.link.now)


class ClientNode(_Node):
    """A client that collects what it sees."""

    def __init__(self, engine: str, link: Link, alpn: str) -> None:
        made = make_engine(engine, client_config(alpn_protocols=(alpn,), keep_alive_s=5.0))
        super().__init__(Endpoint(made, is_client=True), link)
        self.events: list[EndpointEvent] = []
        self.datagrams: dict[int, list[bytes]] = {}
        self.connection = -1

    def pump(self) -> None:
        self.events += self.endpoint.poll_events(self.link.now)
        for _, quarter_stream_id, payloads, segment_size in self.endpoint.poll_datagrams():
            self.datagrams.setdefault(quarter_stream_id, []).extend(split(payloads, segment_size))

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def closed(self) -> ConnectionClosed | None:
        found = self.of(ConnectionClosed)
        return found[0] if found else None


class Bench:
    """A client with a connection to the gateway, and every way to poke at both."""

    def __init__(self, engine: str, *, alpn: str = H3_ALPN, limits: RouterLimits = LIMITS) -> None:
        self.link = Link()
        self.gateway = GatewayNode(engine, self.link, limits)
        self.router = self.gateway.router
        self.shell = self.gateway.shell
        self.client = ClientNode(engine, self.link, alpn)
        self.link.attach(cast(Engine, self.gateway), SERVER)
        self.link.attach(cast(Engine, self.client), CLIENT)
        now = self.link.now
        self.client.connection = self.client.endpoint.connect(SERVER, SERVER_NAME, now)
        self.link.run_until(lambda: self.client.of(ConnectionOpened))
        self.settle()

    def settle(self, duration_s: float = 0.2) -> None:
        """Let everything that is on its way arrive."""
        self.link.run_for(duration_s)

    def wait(self, duration_s: float) -> None:
        """Let time pass; the gateway's shell ticks now and then."""
        end = self.link.now + duration_s
        while self.link.now < end:
            self.settle(min(5.0, end - self.link.now))
            self.tick()

    def tick(self) -> None:
        self.router.tick(self.link.now, UNIX_NOW + self.link.now - 1000.0)
        self.settle()

    # the client's side

    def request(
        self,
        path: str = "/.well-known/masque/udp/dns.example/53/",
        *,
        token: str | None = "secret",
    ) -> int:
        """Send a request and let it arrive; its stream ID."""
        headers = request_headers(f"{SERVER_NAME}:4433", path, token)
        stream_id = self.client.endpoint.send_request(self.client.connection, headers)
        assert stream_id is not None
        self.settle()
        return stream_id

    def open(
        self, grant: Grant = GRANT, path: str = "/.well-known/masque/udp/a.example/53/"
    ) -> int:
        """A granted tunnel; its stream ID."""
        stream_id = self.request(path)
        self.answer(grant)
        assert self.status(stream_id) == 200
        return stream_id

    def send(self, stream_id: int, *payloads: bytes) -> None:
        """DATAGRAM frames from the client."""
        for payload in payloads:
            self.client.engine.send_datagrams(
                self.client.connection, stream_id // 4, payload, len(payload)
            )
        self.settle()

    def send_body(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.client.endpoint.send_body(self.client.connection, stream_id, data, end=end)
        self.settle()

    def status(self, stream_id: int) -> int | None:
        """Of the answer, if it came."""
        fields = self.fields(stream_id)
        return int(fields[":status"]) if fields else None

    def fields(self, stream_id: int) -> dict[str, str]:
        for event in self.client.of(HeadersReceived):
            if event.stream_id == stream_id:
                return {name.decode(): value.decode() for name, value in event.headers}
        return {}

    def payloads(self, stream_id: int) -> list[bytes]:
        """What came in DATAGRAM frames."""
        return self.client.datagrams.get(stream_id // 4, [])

    def capsules(self, stream_id: int) -> list[bytes]:
        """Payloads that came in DATAGRAM capsules."""
        parser = CapsuleParser(1 << 20)
        data = b"".join(e.data for e in self.client.of(BodyReceived) if e.stream_id == stream_id)
        found = parser.receive(data)
        assert all(capsule.capsule_type == DATAGRAM for capsule in found)
        return [capsule.value[1:] for capsule in found]

    def has_ended(self, stream_id: int) -> bool:
        """Whether the gateway ended its side in order."""
        ends: list[BodyReceived | HeadersReceived] = [
            *self.client.of(BodyReceived),
            *self.client.of(HeadersReceived),
        ]
        return any(event.ended for event in ends if event.stream_id == stream_id)

    def aborts(self, stream_id: int) -> set[int]:
        """Error codes with which the gateway gave the stream up."""
        return {e.error_code for e in self.client.of(StreamAborted) if e.stream_id == stream_id}

    def raw(self, stream_id: int) -> bytes:
        return b"".join(
            e.data for e in self.client.of(RawStreamReceived) if e.stream_id == stream_id
        )

    # the control plane's side

    def answer(self, decision: Grant | Denial, question: int = -1) -> None:
        """Answer a tunnel's question, by default the newest."""
        request = self.shell.asked[question].request
        grant = decision if isinstance(decision, Grant) else None
        denial = decision if isinstance(decision, Denial) else None
        self.router.receive_answer(Admitted(request, grant, denial), self.link.now)
        self.settle()

    def answer_token(self, *, is_valid: bool) -> None:
        request = self.shell.asked[-1].request
        self.router.receive_answer(TokenAnswer(request, is_valid), self.link.now)
        self.settle()

    # the target's side

    @property
    def target(self) -> FakeTarget:
        """Of the newest tunnel."""
        return self.shell.targets[-1]

    def from_target(self, *payloads: bytes) -> None:
        """The newest tunnel's target sends these."""
        for payload in payloads:
            self.router.receive_from_target(
                self.target.tunnel, payload, len(payload), self.link.now
            )
        self.settle()

    # what was counted

    def drops(self) -> dict[str, int]:
        return self.router.snapshot().drops
