"""Asks a gateway a few questions on a connection of their own: for doctor.

Nothing here has a deadline; whoever asks sets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from types import TracebackType

from toppy.client.session import (
    ATTEMPT_DELAY_S,
    GatewaySettings,
    make_client_engine,
    open_sockets,
    reachable,
    why_closed,
)
from toppy.errors import PeerError
from toppy.model.target import Target
from toppy.net.quic_driver import QuicDriver
from toppy.protocol.udp_tunnel import UdpTunnel, encode_datagram_capsules, split_payloads
from toppy.quic.endpoint import (
    BodyReceived,
    ConnectionOpened,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    RawStreamReceived,
    StreamAborted,
)
from toppy.quic.engine import Address, ConnectionClosed
from toppy.quic.h3 import H3_NO_ERROR, H3_REQUEST_CANCELLED, Headers
from toppy.wire.connect_udp import expand_template, request_headers
from toppy.wire.gateway_facts import GatewayFacts, parse_gateway_facts
from toppy.wire.proxy_status import ProxyStatus, explain, parse_proxy_status

ECHO_TARGET = Target("127.0.0.1", 9)
"""Where the gateway's built-in echo answers (T-085)."""
ECHO_PAYLOAD = b"toppy-connect-udp-echo"
ECHO_AGAIN_S = 0.3
"""One lost datagram says nothing about the path."""
_MAX_ANSWER_BYTES = 256
_NONE = -1
_MAX_WAITING = 1024
"""Events and payloads; a gateway that says more is not listened to."""


class ProbeError(Exception):
    """The answer was not the one hoped for; the text says what came instead."""


class ProbeRefusedError(ProbeError):
    """The gateway gave a reason."""


class ProbeTunnel:
    """One request, its answer, and what comes through the tunnel that it opened."""

    def __init__(self, probe: Probe, stream_id: int, headers: Headers) -> None:
        self._probe = probe
        self._protocol = UdpTunnel(hold_datagrams=0, hold_bytes=0, is_client=True)
        self._payloads: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue(_MAX_WAITING)
        self.stream_id = stream_id
        fields = dict(headers)
        status = fields.get(b":status", b"")
        self.status = int(status) if status.isdigit() else 0
        self.proxy_status: ProxyStatus | None = parse_proxy_status(
            fields.get(b"proxy-status", b"").decode("ascii", "replace")
        )
        self.facts: GatewayFacts = parse_gateway_facts(headers)

    @property
    def is_open(self) -> bool:
        """Whether the gateway opened it."""
        return 200 <= self.status < 300

    @property
    def explanation(self) -> str:
        """Why it is not open, and what to do about that."""
        return explain(self.status, self.proxy_status)

    def send(self, payload: bytes) -> None:
        """In an HTTP Datagram; one that fits no packet is dropped."""
        self._probe.send_datagram(self.stream_id, payload)

    def send_in_capsule(self, payload: bytes) -> None:
        """On the stream, whatever its size; the answer may come either way."""
        self._probe.send_body(self.stream_id, encode_datagram_capsules(payload, len(payload)))

    async def receive(self) -> tuple[bytes, bool]:
        """The next payload, and whether it came in a capsule instead of an HTTP Datagram."""
        return await self._payloads.get()

    def deliver(self, payload: bytes, *, in_capsule: bool) -> None:
        """The probe's: a payload has come."""
        with contextlib.suppress(asyncio.QueueFull):
            self._payloads.put_nowait((payload, in_capsule))

    def deliver_body(self, data: bytes, *, ended: bool) -> None:
        """The probe's: bytes of the stream have come."""
        with contextlib.suppress(PeerError):  # a gateway that talks nonsense is as good as silent
            for payload in self._protocol.receive_body(data, ended=ended):
                self.deliver(payload, in_capsule=True)


class Probe:
    """One connection to a gateway. An async context manager.

    Raises ``ConfigError`` for settings that no engine can work with.
    """

    def __init__(
        self, settings: GatewaySettings, addresses: Sequence[Address], alpn_protocol: str
    ) -> None:
        """``addresses`` of the gateway, in the order to try."""
        self._settings = settings
        self._addresses = list(addresses)
        self._engine = make_client_engine(settings, alpn_protocol, time.monotonic())
        self._endpoint = Endpoint(self._engine, is_client=True)
        self._attempt_events: asyncio.Queue[ConnectionOpened | ConnectionClosed]
        self._attempt_events = asyncio.Queue(_MAX_WAITING)
        self._attempts: dict[int, Address] = {}
        self._connection = _NONE
        self._closed_because: str | None = None
        self._streams: dict[int, asyncio.Queue[EndpointEvent]] = {}
        self._tunnels: dict[int, ProbeTunnel] = {}

    async def __aenter__(self) -> Probe:
        self._sockets = open_sockets(1 << 20)
        self._driver = QuicDriver(self._endpoint, self._sockets, self._pump)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        opened = () if self._connection == _NONE else (self._connection,)
        for connection in (*self._attempts, *opened):
            self._endpoint.close(connection, H3_NO_ERROR, "", time.monotonic())
        self._driver.flush_now()
        self._driver.close()
        for sock in self._sockets:
            sock.close()

    # what comes

    def _pump(self, now: float) -> None:
        for event in self._endpoint.poll_events(now):
            self._handle(event)
        for connection, quarter, payloads, segment_size in self._endpoint.poll_datagrams():
            tunnel = self._tunnels.get(4 * quarter)
            if tunnel is not None and connection == self._connection:
                for payload in split_payloads(payloads, segment_size):
                    tunnel.deliver(bytes(payload), in_capsule=False)

    def _handle(self, event: EndpointEvent) -> None:
        connection = getattr(event, "connection", None)
        if isinstance(event, ConnectionOpened | ConnectionClosed) and connection in self._attempts:
            if isinstance(event, ConnectionOpened) and self._connection == _NONE:
                self._connection = event.connection
            with contextlib.suppress(asyncio.QueueFull):
                self._attempt_events.put_nowait(event)
        if connection != self._connection:
            return  # of an attempt that another one overtook
        if isinstance(event, ConnectionClosed):
            self._closed_because = why_closed(event) or "the gateway closed the connection"
            for waiting in self._streams.values():
                with contextlib.suppress(asyncio.QueueFull):
                    waiting.put_nowait(event)
        elif isinstance(event, HeadersReceived | RawStreamReceived | StreamAborted):
            if (queue := self._streams.get(event.stream_id)) is not None:
                with contextlib.suppress(asyncio.QueueFull):
                    queue.put_nowait(event)
        elif isinstance(event, BodyReceived) and event.stream_id in self._tunnels:
            self._tunnels[event.stream_id].deliver_body(event.data, ended=event.ended)

    async def _next(self, stream_id: int) -> EndpointEvent:
        if self._closed_because is not None and self._streams[stream_id].empty():
            raise ProbeError(self._closed_because)
        event = await self._streams[stream_id].get()
        if isinstance(event, ConnectionClosed):
            raise ProbeError(why_closed(event) or "the gateway closed the connection")
        return event

    # the connection

    async def connect(self) -> tuple[Address, float]:
        """Do the handshake with the address that answers first (RFC 8305), each tried a little
        after the one before; which one, and how long its handshake took in seconds.
        """
        untried = reachable(self._addresses, self._sockets)
        if not untried:
            raise ProbeError("this host has no network of the gateway's address family")
        began: dict[int, float] = {}
        while True:
            if untried:
                now = time.monotonic()
                address = untried.pop(0)
                connection = self._endpoint.connect(address, self._settings.server_name, now)
                self._attempts[connection] = address
                began[connection] = now
                self._driver.flush_soon()
            event = await self._next_of_attempts(ATTEMPT_DELAY_S if untried else None)
            if isinstance(event, ConnectionOpened) and event.connection == self._connection:
                took_s = time.monotonic() - began[event.connection]
                return self._attempts.pop(event.connection), took_s
            if isinstance(event, ConnectionClosed):
                del self._attempts[event.connection]
                if not self._attempts and not untried:
                    raise ProbeError(why_closed(event) or "the gateway closed the connection")

    async def _next_of_attempts(
        self, timeout_s: float | None
    ) -> ConnectionOpened | ConnectionClosed | None:
        """How an attempt ended; None when none did in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._attempt_events.get()
        return None

    @property
    def local_port(self) -> int:
        """Of the socket that talks to the gateway; 0 before there is a connection."""
        peer = self._engine.peer_address(self._connection)
        if peer is None:
            return 0
        is_ipv6 = ":" in peer[0]
        ports = [sock.local_address[1] for sock in self._sockets if sock.is_ipv6 == is_ipv6]
        return ports[0] if ports else 0

    @property
    def largest_payload_bytes(self) -> int:
        """What fits one HTTP Datagram to the gateway now, as the engine has found out."""
        return self._engine.max_payload_bytes(self._connection, 0)

    # questions

    async def ping(self) -> str:
        """Ask ``ping <token>`` (T-064); the gateway's answer."""
        stream_id = self._engine.open_stream(self._connection)
        if stream_id is None:
            raise ProbeError("the gateway allows no stream")
        self._streams[stream_id] = asyncio.Queue(_MAX_WAITING)
        token = self._settings.authorization
        question = f"ping {token}" if token is not None else "ping"
        self._engine.send_stream(self._connection, stream_id, question.encode(), end=True)
        self._driver.flush_soon()
        answer = b""
        while True:
            event = await self._next(stream_id)
            if not isinstance(event, RawStreamReceived):
                raise ProbeError("the gateway reset the ping")
            answer += event.data
            if len(answer) > _MAX_ANSWER_BYTES:
                raise ProbeError("the answer to the ping is too long: this is no toppy gateway")
            if event.ended:
                return answer.decode("ascii", "replace")

    async def request_udp(self, template: str, target: Target) -> ProbeTunnel:
        """Ask for a UDP tunnel; what the gateway answers."""
        authority, path = expand_template(template, target)
        return await self.request(request_headers(authority, path, self._settings.authorization))

    async def request(self, headers: Headers) -> ProbeTunnel:
        """Ask for a tunnel of any kind; what the gateway answers."""
        if not self._endpoint.may_connect(self._connection):
            raise ProbeError("it speaks HTTP/3, but takes no MASQUE requests")
        stream_id = self._endpoint.send_request(self._connection, headers)
        if stream_id is None:
            raise ProbeError("the gateway allows no stream")
        self._streams[stream_id] = asyncio.Queue(_MAX_WAITING)
        self._driver.flush_soon()
        event = await self._next(stream_id)
        if not isinstance(event, HeadersReceived):
            raise ProbeError("the gateway reset the request")
        tunnel = ProbeTunnel(self, stream_id, event.headers)
        if tunnel.is_open:
            self._tunnels[stream_id] = tunnel
        return tunnel

    async def open_echo(self, template: str) -> ProbeTunnel:
        """Open a tunnel to the gateway's echo. Raises ``ProbeRefusedError`` when it refuses."""
        tunnel = await self.request_udp(template, ECHO_TARGET)
        if not tunnel.is_open:
            raise ProbeRefusedError(f"refused with {tunnel.explanation}")
        return tunnel

    async def echo(self, tunnel: ProbeTunnel) -> float:
        """Send a payload through the tunnel until it comes back; its round trip in seconds."""
        if not self._endpoint.may_send_datagrams(self._connection):
            raise ProbeError("the gateway takes no HTTP Datagrams")
        while True:
            began = time.monotonic()
            tunnel.send(ECHO_PAYLOAD)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ECHO_AGAIN_S):
                    while await tunnel.receive() != (ECHO_PAYLOAD, False):
                        pass
                    return time.monotonic() - began

    def end(self, tunnel: ProbeTunnel) -> None:
        """Give a tunnel up."""
        self._tunnels.pop(tunnel.stream_id, None)
        self._endpoint.abort_stream(self._connection, tunnel.stream_id, H3_REQUEST_CANCELLED)
        self._driver.flush_soon()

    def send_datagram(self, stream_id: int, payload: bytes) -> None:
        """A tunnel's: in one HTTP Datagram."""
        self._engine.send_datagrams(self._connection, stream_id // 4, payload, len(payload))
        self._driver.flush_soon()

    def send_body(self, stream_id: int, data: bytes) -> None:
        """A tunnel's: on its stream."""
        self._endpoint.send_body(self._connection, stream_id, data)
        self._driver.flush_soon()
