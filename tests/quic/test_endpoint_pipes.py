"""Request streams as byte pipes, through HTTP/3, on every pair of engines."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import pytest

from tests.quic.certificates import SERVER_NAME
from tests.quic.link import CLIENT, SERVER, Link, client_config, make_engine, server_config
from toppy.quic.endpoint import (
    BodyReceived,
    ConnectionOpened,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    StreamAborted,
)
from toppy.quic.engine import READ_TURN_BYTES, Engine, StreamWritable
from toppy.quic.h3 import H3_CONNECT_ERROR, H3_NO_ERROR, H3_REQUEST_CANCELLED

WINDOW = 256 * 1024
REQUEST = [
    (b":method", b"CONNECT"),
    (b":authority", b"target.test:80"),
]
ANSWER = [(b":status", b"200")]
E = TypeVar("E")


class OnLink:
    """An endpoint where a link expects an engine: its events are the endpoint's."""

    def __init__(self, endpoint: Endpoint, link: Link) -> None:
        self._endpoint = endpoint
        self._link = link
        self.events: list[EndpointEvent] = []

    def poll_events(self) -> list[Any]:
        self.events += self._endpoint.poll_events(self._link.now)
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._endpoint, name)


@dataclass(slots=True)
class Side:
    """One end of the tunnel."""

    endpoint: Endpoint
    connection: int
    events: list[EndpointEvent] = field(default_factory=list)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def body(self, stream: int) -> bytes:
        return b"".join(e.data for e in self.of(BodyReceived) if e.stream_id == stream)

    def has_ended(self, stream: int) -> bool:
        return any(e.ended for e in self.of(BodyReceived) if e.stream_id == stream)


@dataclass(slots=True)
class Tunnel:
    """A request stream that was answered with 200."""

    link: Link
    client: Side
    gateway: Side
    stream: int

    def send(self, side: Side, data: bytes, *, end: bool = False) -> None:
        side.endpoint.send_body(side.connection, self.stream, data, end=end)

    def run_until(self, condition: Any, limit_s: float = 10.0) -> None:
        self.link.run_until(condition, limit_s)


@pytest.fixture
def tunnel(engines: tuple[str, str]) -> Tunnel:
    link = Link()
    windows = {"stream_window_bytes": WINDOW, "connection_window_bytes": 2 * WINDOW}
    gateway = Endpoint(make_engine(engines[1], server_config(**windows)), is_client=False)
    client = Endpoint(make_engine(engines[0], client_config(**windows)), is_client=True)
    at_gateway, at_client = OnLink(gateway, link), OnLink(client, link)
    link.attach(cast(Engine, at_gateway), SERVER)
    link.attach(cast(Engine, at_client), CLIENT)
    connection = client.connect(SERVER, SERVER_NAME, link.now)

    def opened(events: list[EndpointEvent]) -> list[int]:
        return [e.connection for e in events if isinstance(e, ConnectionOpened)]

    link.run_until(lambda: opened(at_client.events) and opened(at_gateway.events))
    clients = Side(client, connection, at_client.events)
    gateways = Side(gateway, opened(at_gateway.events)[0], at_gateway.events)
    stream = client.send_request(connection, REQUEST)
    assert stream is not None
    link.run_until(lambda: gateways.of(HeadersReceived))
    gateway.send_headers(gateways.connection, stream, ANSWER)
    link.run_until(lambda: clients.of(HeadersReceived))
    return Tunnel(link, clients, gateways, stream)


def data_of(size: int) -> bytes:
    return random.Random(3).randbytes(size)


def test_much_data_passes_both_ways_at_once(tunnel: Tunnel) -> None:
    there, back = data_of(1 << 20), data_of(1 << 20)[::-1]
    for start in range(0, 1 << 20, 64 * 1024):
        tunnel.send(tunnel.client, there[start : start + 64 * 1024])
        tunnel.send(tunnel.gateway, back[start : start + 64 * 1024])
    for side in (tunnel.client, tunnel.gateway):
        tunnel.send(side, b"", end=True)
    for side, expected in ((tunnel.gateway, there), (tunnel.client, back)):
        tunnel.run_until(lambda side=side: side.has_ended(tunnel.stream))
        assert side.body(tunnel.stream) == expected
        assert all(len(e.data) <= READ_TURN_BYTES for e in side.of(BodyReceived))
        assert [e.ended for e in side.of(BodyReceived)].count(True) == 1


@pytest.mark.parametrize("first", ["client", "gateway"])
def test_one_direction_ends_and_the_other_goes_on(tunnel: Tunnel, first: str) -> None:
    ending, other = tunnel.client, tunnel.gateway
    if first == "gateway":
        ending, other = other, ending
    tunnel.send(ending, b"that was all", end=True)
    tunnel.run_until(lambda: other.has_ended(tunnel.stream))
    tunnel.link.run_for(5.0)
    for _ in range(3):
        tunnel.send(other, bytes(100_000))
        tunnel.link.run_for(1.0)
    tunnel.send(other, b"bye", end=True)
    tunnel.run_until(lambda: ending.has_ended(tunnel.stream))
    assert other.body(tunnel.stream) == b"that was all"
    assert ending.body(tunnel.stream) == bytes(300_000) + b"bye"
    assert not ending.of(StreamAborted)
    assert not other.of(StreamAborted)


@pytest.mark.parametrize("first", ["client", "gateway"])
def test_a_reset_says_which_direction_and_leaves_the_other(tunnel: Tunnel, first: str) -> None:
    resetting, other = tunnel.client, tunnel.gateway
    if first == "gateway":
        resetting, other = other, resetting
    resetting.endpoint.reset_sending(resetting.connection, tunnel.stream, H3_CONNECT_ERROR)
    tunnel.run_until(lambda: other.of(StreamAborted))
    assert other.of(StreamAborted) == [
        StreamAborted(other.connection, tunnel.stream, H3_CONNECT_ERROR, is_sending=False)
    ]
    tunnel.send(resetting, b"ignored")
    tunnel.send(other, b"still here", end=True)
    tunnel.run_until(lambda: resetting.has_ended(tunnel.stream))
    assert resetting.body(tunnel.stream) == b"still here"
    assert not resetting.of(StreamAborted)
    assert other.body(tunnel.stream) == b""


@pytest.mark.parametrize("first", ["client", "gateway"])
def test_a_stop_says_which_direction_and_leaves_the_other(tunnel: Tunnel, first: str) -> None:
    stopping, other = tunnel.client, tunnel.gateway
    if first == "gateway":
        stopping, other = other, stopping
    stopping.endpoint.stop_reading(stopping.connection, tunnel.stream, H3_REQUEST_CANCELLED)
    tunnel.run_until(lambda: other.of(StreamAborted))
    assert other.of(StreamAborted) == [
        StreamAborted(other.connection, tunnel.stream, H3_REQUEST_CANCELLED, is_sending=True)
    ]
    tunnel.send(other, b"ignored", end=True)
    tunnel.send(stopping, b"still talking", end=True)
    tunnel.run_until(lambda: other.has_ended(tunnel.stream))
    assert other.body(tunnel.stream) == b"still talking"
    tunnel.link.run_for(1.0)
    assert stopping.body(tunnel.stream) == b""


def test_an_abort_is_told_for_each_direction(tunnel: Tunnel) -> None:
    client, gateway = tunnel.client, tunnel.gateway
    client.endpoint.abort_stream(client.connection, tunnel.stream, H3_REQUEST_CANCELLED)
    tunnel.run_until(lambda: len(gateway.of(StreamAborted)) == 2)
    assert {e.is_sending for e in gateway.of(StreamAborted)} == {True, False}


def test_a_client_is_not_told_of_an_early_answer(tunnel: Tunnel) -> None:
    client, gateway = tunnel.client, tunnel.gateway
    gateway.endpoint.stop_reading(gateway.connection, tunnel.stream, H3_NO_ERROR)
    tunnel.send(gateway, b"the whole answer", end=True)
    tunnel.run_until(lambda: client.has_ended(tunnel.stream))
    assert not client.of(StreamAborted)


def test_a_paused_reader_holds_back_the_sender_until_it_resumes(tunnel: Tunnel) -> None:
    client, gateway = tunnel.client, tunnel.gateway
    gateway.endpoint.pause_reading(gateway.connection, tunnel.stream)
    data = data_of(4 * WINDOW)
    for start in range(0, len(data), 64 * 1024):
        tunnel.send(client, data[start : start + 64 * 1024])
    tunnel.send(client, b"", end=True)
    client.endpoint.notify_writable(client.connection, tunnel.stream, WINDOW)
    tunnel.link.run_for(3.0)
    assert not gateway.of(BodyReceived)
    backlog = client.endpoint.stream_backlog_bytes(client.connection, tunnel.stream)
    assert backlog > 2 * WINDOW
    assert not client.of(StreamWritable)
    gateway.endpoint.resume_reading(gateway.connection, tunnel.stream)
    tunnel.run_until(lambda: client.of(StreamWritable))
    assert client.of(StreamWritable) == [StreamWritable(client.connection, tunnel.stream)]
    tunnel.run_until(lambda: gateway.has_ended(tunnel.stream))
    assert gateway.body(tunnel.stream) == data


def test_a_paused_tunnel_does_not_stop_the_next(tunnel: Tunnel) -> None:
    client, gateway = tunnel.client, tunnel.gateway
    gateway.endpoint.pause_reading(gateway.connection, tunnel.stream)
    tunnel.send(client, bytes(2 * WINDOW))
    tunnel.link.run_for(2.0)
    other = client.endpoint.send_request(client.connection, REQUEST)
    assert other is not None
    client.endpoint.send_body(client.connection, other, bytes(4 * WINDOW), end=True)
    tunnel.run_until(lambda: gateway.has_ended(other))
    assert len(gateway.body(other)) == 4 * WINDOW
    assert gateway.body(tunnel.stream) == b""


def test_a_widened_connection_lets_more_through_per_round_trip(tunnel: Tunnel) -> None:
    client, gateway = tunnel.client, tunnel.gateway
    gateway.endpoint.widen_connection(gateway.connection, 16 * WINDOW)
    data = data_of(4 * WINDOW)
    tunnel.send(client, data, end=True)
    tunnel.run_until(lambda: gateway.has_ended(tunnel.stream))
    assert gateway.body(tunnel.stream) == data


def test_calls_on_tunnels_that_are_gone_are_ignored(tunnel: Tunnel) -> None:
    client = tunnel.client
    client.endpoint.abort_stream(client.connection, tunnel.stream, H3_REQUEST_CANCELLED)
    tunnel.link.run_for(1.0)
    for connection in (client.connection, 99):
        for stream in (tunnel.stream, 400):
            endpoint = client.endpoint
            endpoint.reset_sending(connection, stream, 1)
            endpoint.stop_reading(connection, stream, 1)
            endpoint.pause_reading(connection, stream)
            endpoint.resume_reading(connection, stream)
            endpoint.send_body(connection, stream, b"x", end=True)
            assert endpoint.stream_backlog_bytes(connection, stream) == 0
        client.endpoint.widen_connection(connection, 1 << 20)
    tunnel.link.run_for(1.0)
    other = client.endpoint.send_request(client.connection, REQUEST)
    assert other is not None
    tunnel.run_until(lambda: any(e.stream_id == other for e in tunnel.gateway.of(HeadersReceived)))
