"""A client's tunnels and a gateway that a test plays, over two real endpoints in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.quic.certificates import SERVER_NAME
from tests.quic.link import CLIENT, SERVER, START, client_config, make_engine, server_config, split
from toppy.client.tunnel import ClientTunnel, Refusal
from toppy.client.tunnels import Tunnels
from toppy.model.target import Target
from toppy.protocol.udp_tunnel import Buffer
from toppy.quic.endpoint import ConnectionOpened, Endpoint, EndpointEvent, HeadersReceived
from toppy.quic.engine import ConnectionClosed
from toppy.quic.h3 import H3_NO_ERROR
from toppy.wire.connect_udp import FORWARD_TEMPLATE_PATH, response_headers

TEMPLATE = f"https://{SERVER_NAME}:4433{FORWARD_TEMPLATE_PATH}"
TARGET = Target("192.0.2.9", 53)


class World:
    """A client with tunnels, and a gateway whose every word the test chooses."""

    def __init__(self, *, streams: int = 10) -> None:
        self.now = START
        config = replace(server_config(), max_bidirectional_streams=streams)
        self.gateway = Endpoint(make_engine("aioquic", config, now=START), is_client=False)
        engine = make_engine("aioquic", client_config(), now=START)
        self.client = Endpoint(engine, is_client=True)
        self.tunnels = Tunnels(
            self.client, template=TEMPLATE, authorization="secret", on_leave=self._leave
        )
        self.requests: list[HeadersReceived] = []
        self.events: list[EndpointEvent] = []
        self.arrived: list[bytes] = []
        self.lost: list[str] = []
        self.deserted: list[int] = []
        """Connections that the last tunnel has left."""
        self.leaves = 0
        """How often the gateway wanted its client to go elsewhere."""
        self.client_connection = -1

    def _leave(self) -> None:
        self.leaves += 1

    def pass_time(self, seconds: float) -> None:
        """Let time pass while nothing but timers happens."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.05)
            self.run()

    def connect(self) -> None:
        self.client_connection = self.client.connect(SERVER, SERVER_NAME, self.now)
        self.run()

    def run(self) -> None:
        """Carry packets until nothing moves and no timer (pacing, acknowledgements) is near."""
        for _ in range(2000):
            moved = self.step()
            timers = [t for e in self._sources if (t := e.next_timeout()) is not None]
            if not moved and min(timers, default=self.now + 1) > self.now + 0.2:
                return
        pytest.fail("the endpoints never come to rest")

    @property
    def _sources(self) -> tuple[Endpoint, Endpoint, Tunnels]:
        return self.client, self.gateway, self.tunnels

    def step(self) -> bool:
        """One millisecond: carry what there is, then the timers; whether anything moved."""
        self.now += 0.001
        moved = False
        for data, size, _ in self.client.poll_transmits(self.now):
            self.gateway.receive(data, size, CLIENT, self.now)
            moved = True
        self._pump_gateway()
        for data, size, _ in self.gateway.poll_transmits(self.now):
            self.client.receive(data, size, SERVER, self.now)
            moved = True
        self._pump_client()
        for source in self._sources:
            due = source.next_timeout()
            if due is not None and due <= self.now:
                source.handle_timeout(self.now)
                moved = moved or source is self.tunnels
        return moved

    def _pump_gateway(self) -> None:
        for event in self.gateway.poll_events(self.now):
            if isinstance(event, HeadersReceived):
                self.requests.append(event)
            self.events.append(event)
        for _, _, payloads, size in self.gateway.poll_datagrams():
            self.arrived += split(payloads, size)

    def _pump_client(self) -> None:
        for event in self.client.poll_events(self.now):
            if isinstance(event, ConnectionOpened):
                self.tunnels.connected(event.connection)
                self.connected_client()
            elif isinstance(event, ConnectionClosed):
                self.lost.append(event.reason)
                self.tunnels.disconnected(event.connection)
                self.disconnected_client(event.connection)
            else:
                self.tunnels.handle(event, self.now)
                self.handle_client(event)
        for connection, quarter, payloads, size in self.client.poll_datagrams():
            self.tunnels.receive_datagrams(connection, quarter, payloads, size, self.now)
        for connection in self.tunnels.take_deserted():
            self.deserted.append(connection)
            self.client.close(connection, H3_NO_ERROR, "", self.now)

    # for whatever else the client has than UDP tunnels

    def connected_client(self) -> None:
        """The client has a connection."""

    def disconnected_client(self, connection: int) -> None:
        """The client has lost one."""

    def handle_client(self, event: EndpointEvent) -> None:
        """Something else has happened at the client."""

    def accept(self, index: int = -1) -> HeadersReceived:
        request = self.requests[index]
        self.gateway.send_headers(request.connection, request.stream_id, response_headers(200))
        self.run()
        return request

    def of(self, kind: type[EndpointEvent]) -> list[EndpointEvent]:
        return [event for event in self.events if isinstance(event, kind)]


class Local:
    """A tunnel's local side: what it was given."""

    def __init__(self, target: Target = TARGET) -> None:
        self.received: list[bytes] = []
        self.ends: list[Refusal | None] = []
        self.tunnel = ClientTunnel(target, self.deliver, self.ends.append)

    def deliver(self, payloads: Buffer, size: int) -> None:
        self.received += split(bytes(payloads), size)
