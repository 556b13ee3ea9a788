"""SOCKS5 datagrams: who may send, what is dropped, what is bounded."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from tests.client.tcp_gateway import TcpLoopbackGateway, connected, until
from toppy.client.session import GatewaySession
from toppy.client.socks_udp import SocksUdpRelay
from toppy.model.drop_reason import DropReason
from toppy.model.rate import UNLIMITED, Rate
from toppy.model.target import Target
from toppy.net.udp_socket import UdpSocket, bind_udp
from toppy.policy.ruleset import Decision
from toppy.wire.socks import encode_udp_header

DEADLINE_S = 20.0
PORT = 5432


class Stage:
    """A relay, and a program that sends to it."""

    def __init__(
        self,
        gateway: TcpLoopbackGateway,
        session: GatewaySession,
        rate: Rate,
        *,
        program_port: int | None,
        decides: bool,
    ) -> None:
        self.gateway = gateway
        self.session = session
        self.local = UdpSocket(bind_udp("127.0.0.1", 0, buffer_bytes=1 << 20))
        self.program = self._socket()
        port = self.program.getsockname()[1] if program_port is None else program_port
        self.now = 1000.0
        self.decided = asyncio.Event()
        if decides:
            self.decided.set()
        self.relay = SocksUdpRelay(
            session,
            self.local,
            ("127.0.0.1", port),
            self.decide,
            max_targets=2,
            idle_timeout_s=60.0,
            rate=rate,
            clock=lambda: self.now,
        )

    def _socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        return sock

    async def decide(self, target: Target) -> Decision:
        await self.decided.wait()
        return Decision(True, (), "all", "")

    def send(self, data: bytes, sock: socket.socket | None = None) -> None:
        (sock or self.program).sendto(data, self.local.local_address)

    async def read(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.program, 70_000)

    async def dropped(self, reason: DropReason, count: int = 1) -> None:
        await until(lambda: self.relay.drops.get(reason) == count)


def run(
    test: Callable[[Stage], Awaitable[None]],
    *,
    rate: Rate = UNLIMITED,
    program_port: int | None = None,
    decides: bool = True,
) -> None:
    async def with_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S), connected() as (gateway, session):
            on = Stage(gateway, session, rate, program_port=program_port, decides=decides)
            running = asyncio.create_task(on.relay.run())
            try:
                await test(on)
            finally:
                running.cancel()
                await asyncio.wait({running})
                on.local.close()
                on.program.close()

    asyncio.run(with_deadline())


def to(host: str, payload: bytes = b"x") -> bytes:
    return encode_udp_header(host, PORT) + payload


def test_large_payloads_come_back_whole() -> None:
    async def test(on: Stage) -> None:
        for size in (0, 1, 1200, 9000, 60_000):
            on.send(to("a.example", bytes(size)))
            assert await on.read() == to("a.example", bytes(size))

    run(test)


def test_only_the_program_is_heard() -> None:
    async def test(on: Stage) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            on.send(to("a.example"), stranger)
            await on.dropped(DropReason.TOO_MANY_PEERS)
        on.send(to("a.example"))
        assert await on.read() == to("a.example")

    run(test)


def test_the_first_datagram_says_the_port_of_a_program_that_did_not() -> None:
    async def test(on: Stage) -> None:
        on.send(to("a.example"))
        assert await on.read() == to("a.example")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            on.send(to("a.example"), stranger)
            await on.dropped(DropReason.TOO_MANY_PEERS)

    run(test, program_port=0)


def test_what_cannot_be_read_is_dropped_and_says_no_port() -> None:
    async def test(on: Stage) -> None:
        for number, bad in enumerate(
            (b"", b"\x00\x00\x01\x01" + bytes(6), b"\x00\x00\x00\x09x"), 1
        ):
            on.send(bad)
            await on.dropped(DropReason.MALFORMED, number)
        assert on.relay.targets == 0

    run(test)


def test_beyond_the_most_targets_datagrams_are_dropped_until_one_is_idle() -> None:
    async def test(on: Stage) -> None:
        for host in ("a.example", "b.example"):
            on.send(to(host))
            await on.read()
        on.send(to("c.example"))
        await on.dropped(DropReason.TOO_MANY_PEERS)
        on.now += 30
        on.send(to("b.example"))
        await on.read()
        on.now += 31
        on.relay.reap()
        assert on.relay.targets == 1  # the first was silent for a minute
        on.send(to("c.example"))
        assert await on.read() == to("c.example")

    run(test)


def test_while_the_policy_is_asked_some_are_held_and_go_in_order() -> None:
    async def test(on: Stage) -> None:
        for number in range(20):
            on.send(to("a.example", bytes([number])))
        await on.dropped(DropReason.NO_CONNECTION, 4)
        on.decided.set()
        for number in range(16):
            assert await on.read() == to("a.example", bytes([number]))

    run(test, decides=False)


def test_what_is_over_the_rate_is_dropped_in_each_direction() -> None:
    async def test(on: Stage) -> None:
        on.send(to("a.example", bytes(1000)))
        assert await on.read() == to("a.example", bytes(1000))
        on.send(to("a.example", bytes(1000)))
        await on.dropped(DropReason.RATE_LIMITED)
        on.now += 1.0
        on.send(to("a.example", bytes(1000)))
        assert await on.read() == to("a.example", bytes(1000))

    run(test, rate=Rate(1000, 1500))


def test_an_empty_payload_comes_back_under_a_rate_too() -> None:
    async def test(on: Stage) -> None:
        on.send(to("a.example", b""))
        assert await on.read() == to("a.example", b"")
        assert on.relay.drops == {}

    run(test, rate=Rate(1000, 1500))


def test_the_end_ends_its_tunnels() -> None:
    async def test(on: Stage) -> None:
        on.send(to("a.example"))
        await on.read()
        assert on.relay.targets == 1

    run(test)
