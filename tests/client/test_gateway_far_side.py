"""Local connections through the gateway, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from tests.client.tcp_gateway import (
    CLOSED_PORT,
    DENIED_PORT,
    NAMELESS_PORT,
    REFUSED_PORT,
    RESET_PORT,
    SILENT_PORT,
    SINK_PORT,
    TIMEOUT_PORT,
    TcpLoopbackGateway,
    connected,
    until,
)
from tests.net.test_tcp_relay import pair
from toppy.client.gateway_far_side import GatewayFarSide, ask_for_stream, open_stream
from toppy.client.session import GatewaySession
from toppy.client.tunnel import Refusal
from toppy.errors import DeniedError, TargetError
from toppy.model.rate import DirectionLimits, Rate
from toppy.model.target import Target
from toppy.net.stream_socket import SocketReader, StreamSocket
from toppy.net.tcp import reset_tcp
from toppy.net.tcp_relay import ByteCounters
from toppy.wire.http_proxy import RequestBody
from toppy.wire.proxy_status import parse_proxy_status

DEADLINE_S = 20.0
ECHO_PORT = 5432

Test = Callable[[TcpLoopbackGateway, GatewaySession], Awaitable[None]]


_opened: list[socket.socket] = []


def run(test: Test) -> None:
    async def with_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S), connected() as (gateway, session):
            await test(gateway, session)

    try:
        asyncio.run(with_deadline())
    finally:
        while _opened:
            _opened.pop().close()


def connection() -> tuple[socket.socket, socket.socket]:
    """A program's socket and the other end, closed after the test."""
    both = pair()
    _opened.extend(both)
    return both


def target(port: int = ECHO_PORT) -> Target:
    return Target("db.example", port, "tcp")


class App:
    """A local program with a connection through the gateway."""

    def __init__(self, session: GatewaySession, port: int, limits: DirectionLimits) -> None:
        self.sock, self._near = connection()
        self.counters = ByteCounters()
        self._far = GatewayFarSide(session, target(port), limits=limits)

    async def start(self) -> asyncio.Task[str]:
        stream = await self._far.open()
        return asyncio.create_task(stream.relay(self._near, self.counters))

    async def read(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)


async def open_app(
    session: GatewaySession, port: int = ECHO_PORT, limits: DirectionLimits | None = None
) -> tuple[App, asyncio.Task[str]]:
    app = App(session, port, limits or DirectionLimits())
    return app, await app.start()


@pytest.mark.parametrize("limits", [DirectionLimits(), DirectionLimits(Rate(1 << 30, 1 << 30))])
def test_bytes_go_there_and_back_and_end_in_order(limits: DirectionLimits) -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        app, relaying = await open_app(session, limits=limits)
        app.sock.send(b"hello")
        assert await app.read() == b"hello"
        app.sock.shutdown(socket.SHUT_WR)
        assert await app.read() == b""
        assert await relaying == ""
        assert (app.counters.to_target, app.counters.to_client) == (5, 5)
        assert len(session.streams) == 0

    run(test)


def test_a_megabyte_comes_back_unchanged_through_a_limit() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        loop = asyncio.get_running_loop()
        app, relaying = await open_app(session, limits=DirectionLimits(Rate(50 << 20, 1 << 16)))
        sent = bytes(range(256)) * 4096
        sending = asyncio.create_task(loop.sock_sendall(app.sock, sent))
        received = bytearray()
        while len(received) < len(sent):
            received += await app.read()
        await sending
        assert received == sent
        app.sock.shutdown(socket.SHUT_WR)
        assert await relaying == ""

    run(test)


def test_a_reset_of_the_target_resets_the_program() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        app, relaying = await open_app(session, RESET_PORT)
        app.sock.send(b"x")
        with pytest.raises(ConnectionResetError):
            await app.read()
        assert await relaying == "the target or the gateway broke it off"

    run(test)


def test_a_reset_of_the_program_resets_the_tunnel() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        app, relaying = await open_app(session)
        reset_tcp(app.sock)
        assert await relaying == "Connection reset by peer"
        assert len(session.streams) == 0

    run(test)


def test_why_the_gateway_ended_it_is_told() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        app, relaying = await open_app(session, CLOSED_PORT)
        app.sock.send(b"x")
        assert (await relaying).startswith("403: enough; ")

    run(test)


def test_a_denial_is_a_denied_error() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        with pytest.raises(DeniedError, match="so it is"):
            await open_stream(session, target(DENIED_PORT))

    run(test)


@pytest.mark.parametrize(
    ("port", "status", "error"),
    [
        (REFUSED_PORT, 502, "connection_refused"),
        (TIMEOUT_PORT, 504, "connection_timeout"),
        (NAMELESS_PORT, 502, "dns_error"),
    ],
)
def test_a_target_that_is_not_reached_is_a_target_error(port: int, status: int, error: str) -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        with pytest.raises(TargetError, match="so it is") as raised:
            await open_stream(session, target(port))
        assert (raised.value.status, raised.value.proxy_status) == (status, error)

    run(test)


def test_no_answer_is_a_timeout_with_advice_and_leaves_nothing() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        answer = await ask_for_stream(session, target(SILENT_PORT), timeout_s=0.05)
        assert isinstance(answer, Refusal)
        assert answer.status == 504
        assert "toppy doctor" in answer.explanation
        said = parse_proxy_status(answer.proxy_status)
        assert said is not None
        assert said.error == "connection_timeout"
        assert len(session.streams) == 0

    run(test)


def test_whoever_gives_up_waiting_leaves_nothing() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        asking = asyncio.create_task(ask_for_stream(session, target(SILENT_PORT)))
        await until(lambda: gateway.requests)
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()
        assert len(session.streams) == 0

    run(test)


def test_cancelled_it_resets_both_sides() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        app, relaying = await open_app(session, SINK_PORT)
        app.sock.send(b"x")
        await until(lambda: gateway.received)
        relaying.cancel()
        await asyncio.wait({relaying})
        with pytest.raises(ConnectionResetError):
            await app.read()
        assert len(session.streams) == 0

    run(test)


def test_a_reply_comes_first_and_early_bytes_go_first() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        sock, near = connection()
        stream = await open_stream(session, target())

        def make(reader: SocketReader) -> StreamSocket:
            return StreamSocket(near, reader)

        sock.send(b"late")
        relaying = asyncio.create_task(
            stream.carry(make, ByteCounters(), reply=b"welcome ", early=b"early ")
        )
        received = b""
        while len(received) < 18:
            received += await asyncio.get_running_loop().sock_recv(sock, 100)
        assert received == b"welcome early late"
        sock.close()
        assert await relaying == ""

    run(test)


def test_behind_an_http_request_nothing_passes() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        sock, near = connection()
        stream = await open_stream(session, target(SINK_PORT))

        def make(reader: SocketReader) -> StreamSocket:
            return StreamSocket(near, reader)

        relaying = asyncio.create_task(
            stream.carry(make, ByteCounters(), early=b"HEAD", body=RequestBody(4))
        )
        sock.send(b"bodyGET / HTTP/1.1\r\n")
        sock.send(b"more")
        await until(lambda: bytes(gateway.received.get(SINK_PORT, b"")) == b"HEADbody")
        relaying.cancel()
        await asyncio.wait({relaying})
        sock.close()
        assert gateway.received[SINK_PORT] == b"HEADbody"

    run(test)


def test_a_malformed_chunk_breaks_both_sides_off() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        sock, near = connection()
        stream = await open_stream(session, target(SINK_PORT))

        def make(reader: SocketReader) -> StreamSocket:
            return StreamSocket(near, reader)

        relaying = asyncio.create_task(stream.carry(make, ByteCounters(), body=RequestBody(None)))
        sock.send(b"no size\r\n")
        assert "malformed" in await relaying
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(sock, 1)
        sock.close()

    run(test)


def test_a_tunnel_that_broke_before_the_program_was_ready_resets_it() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        sock, near = connection()
        stream = await open_stream(session, target())
        gateway.close_connection(gateway.connections[0], "gone")
        await until(lambda: not len(session.streams))
        reason = await stream.relay(near, ByteCounters())
        assert reason == "the connection to the gateway was lost"
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(sock, 1)
        sock.close()

    run(test)


def test_after_a_loss_new_streams_use_the_next_connection() -> None:
    async def test(gateway: TcpLoopbackGateway, session: GatewaySession) -> None:
        app, relaying = await open_app(session)
        gateway.close_connection(gateway.connections[0], "gone")
        assert await relaying == "the connection to the gateway was lost"
        again, relaying = await open_app(session)
        again.sock.send(b"hello")
        assert await again.read() == b"hello"
        assert len(gateway.connections) == 2
        again.sock.close()
        assert await relaying == ""
        app.sock.close()

    run(test)
