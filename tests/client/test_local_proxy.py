"""A local proxy in front of a gateway on loopback: what programs say, and what they get."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.client.tcp_gateway import (
    DENIED_PORT,
    NAMELESS_PORT,
    REFUSED_PORT,
    RESET_PORT,
    SINK_PORT,
    TIMEOUT_PORT,
    TcpLoopbackGateway,
    connected,
    until,
)
from toppy.client.local_proxy import LocalProxy, ProxyEvents, ProxyOptions
from toppy.client.session import GatewaySession
from toppy.client.tunnel import Refusal
from toppy.model.rate import DirectionLimits, Rate
from toppy.model.target import Target
from toppy.net.tcp import listen_tcp, reset_tcp
from toppy.policy.ruleset import Decision
from toppy.protocol.local_proxy import Credentials
from toppy.wire.socks import encode_udp_header

DEADLINE_S = 20.0
ECHO_PORT = 5432
FORBIDDEN_HOST = "forbidden.example"


class Heard(ProxyEvents):
    """Everything, as words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def opened(self, target: Target) -> None:
        self.words.append(f"opened {target.protocol} {target}")

    def denied(self, peer: str, target: Target, reason: str) -> None:
        self.words.append(f"denied {target}: {reason}")

    def refused(self, peer: str, target: Target, refusal: Refusal) -> None:
        self.words.append(f"refused {target}: {refusal.status}")

    def failed(self, peer: str, target: str, reason: str) -> None:
        self.words.append(f"failed {target}: {reason}".replace("failed : ", "failed: "))


async def decide(target: Target) -> Decision:
    """The client's own policy."""
    await asyncio.sleep(0)
    if target.host == FORBIDDEN_HOST:
        return Decision(False, (), "default", f"target {target} is not allowed")
    return Decision(True, (), "all", "")


class Stage:
    """A proxy, its gateway, and programs."""

    def __init__(
        self, gateway: TcpLoopbackGateway, session: GatewaySession, options: ProxyOptions
    ) -> None:
        self.gateway = gateway
        self.session = session
        self.listener = listen_tcp("127.0.0.1", 0)
        self.heard = Heard()
        self.proxy = LocalProxy(self.listener, session, decide, options, self.heard)
        self.programs: list[Program] = []
        self.running: asyncio.Task[None] | None = None

    def program(self) -> Program:
        self.programs.append(Program(self.listener.getsockname()))
        return self.programs[-1]


class Program:
    """Somebody who uses the proxy."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address)
        self.sock.setblocking(False)

    async def read(self, size: int) -> bytes:
        """Exactly so much, or what there is before the end."""
        data = b""
        while len(data) < size:
            more = await asyncio.get_running_loop().sock_recv(self.sock, size - len(data))
            if not more:
                break
            data += more
        return data

    async def ask(self, said: bytes, size: int) -> bytes:
        self.sock.send(said)
        return await self.read(size)

    async def connect(self, host: str, port: int) -> int:
        """SOCKS5 without a password; the reply's code."""
        assert await self.ask(b"\x05\x01\x00", 2) == b"\x05\x00"
        request = b"\x05\x01\x00\x03" + bytes([len(host)]) + host.encode() + port.to_bytes(2)
        return (await self.ask(request, 10))[1]

    async def associate(self) -> tuple[str, int]:
        """UDP ASSOCIATE; where datagrams go."""
        assert await self.ask(b"\x05\x01\x00", 2) == b"\x05\x00"
        reply = await self.ask(b"\x05\x03\x00\x01" + bytes(6), 10)
        assert reply[:4] == b"\x05\x00\x00\x01"
        return socket.inet_ntoa(reply[4:8]), int.from_bytes(reply[8:])


@asynccontextmanager
async def stage(options: ProxyOptions) -> AsyncIterator[Stage]:
    async with connected() as (gateway, session):
        on = Stage(gateway, session, options)
        running = on.running = asyncio.create_task(on.proxy.run())
        try:
            yield on
        finally:
            running.cancel()
            await asyncio.wait({running})
            on.listener.close()
            for program in on.programs:
                program.sock.close()


def run(test: Callable[[Stage], Awaitable[None]], options: ProxyOptions | None = None) -> None:
    async def with_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S), stage(options or ProxyOptions()) as on:
            await test(on)

    asyncio.run(with_deadline())


# TCP


def test_socks5_reaches_a_name_that_the_gateway_resolves() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        assert await program.connect("db.example", ECHO_PORT) == 0
        assert await program.ask(b"hello", 5) == b"hello"
        program.sock.shutdown(socket.SHUT_WR)
        assert await program.read(1) == b""
        assert on.gateway.requests == [Target("db.example", ECHO_PORT, "tcp")]
        await until(lambda: on.proxy.connections == 0)
        assert on.heard.words == ["opened tcp db.example:5432"]
        assert (on.proxy.counters.to_target, on.proxy.counters.to_client) == (5, 5)
        assert on.proxy.counters.failures == 0

    run(test)


def test_socks4a_reaches_a_name() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        request = b"\x04\x01" + ECHO_PORT.to_bytes(2) + b"\x00\x00\x00\x01me\x00db.example\x00"
        assert (await program.ask(request, 8))[:2] == b"\x00\x5a"
        assert await program.ask(b"hello", 5) == b"hello"

    run(test)


def test_http_connect_reaches_a_name_also_with_early_bytes() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        program.sock.send(b"CONNECT db.example:5432 HTTP/1.1\r\nHost: db.example\r\n\r\nearly")
        answer = b""
        while not answer.endswith(b"early"):
            answer += await program.read(1)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert await program.ask(b" late", 5) == b" late"

    run(test)


def test_an_absolute_request_is_passed_on_alone() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        program.sock.send(
            b"POST http://web.example/a HTTP/1.1\r\nHost: web.example\r\nContent-Length: 4\r\n\r\n"
        )
        program.sock.send(b"bodyGET http://other.example/ HTTP/1.1\r\n\r\n")
        await until(lambda: on.gateway.received.get(80, b"").endswith(b"body"))
        assert on.gateway.received[80].startswith(b"POST /a HTTP/1.1\r\n")
        assert b"other" not in on.gateway.received[80]
        assert on.gateway.requests == [Target("web.example", 80, "tcp")]

    run(test)


@pytest.mark.parametrize(
    ("port", "code", "status"),
    [
        (REFUSED_PORT, 5, b"502"),
        (TIMEOUT_PORT, 6, b"504"),
        (NAMELESS_PORT, 4, b"502"),
        (DENIED_PORT, 2, b"403"),
    ],
)
def test_the_gateways_answer_is_said_in_the_programs_words(
    port: int, code: int, status: bytes
) -> None:
    async def test(on: Stage) -> None:
        assert await on.program().connect("db.example", port) == code
        program = on.program()
        answer = await program.ask(
            b"CONNECT db.example:%d HTTP/1.1\r\nHost: db.example\r\n\r\n" % port, 10_000
        )
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert b"so it is" in answer
        assert b"Proxy-Status: gw; error=" in answer  # the gateway's own
        assert on.proxy.counters.failures == 2
        await until(lambda: len(on.session.streams) == 0)

    run(test)


def test_the_clients_own_policy_is_asked_first() -> None:
    async def test(on: Stage) -> None:
        assert await on.program().connect(FORBIDDEN_HOST, 80) == 2
        answer = await on.program().ask(
            b"CONNECT forbidden.example:80 HTTP/1.1\r\nHost: x.example\r\n\r\n", 10_000
        )
        assert answer.startswith(b"HTTP/1.1 403 ")
        assert b"target forbidden.example:80 is not allowed" in answer
        assert on.gateway.requests == []
        assert on.heard.words[0].startswith("denied forbidden.example:80: ")

    run(test)


def test_a_reset_of_the_target_resets_the_program() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        assert await program.connect("db.example", RESET_PORT) == 0
        with pytest.raises(ConnectionResetError):
            await program.ask(b"x", 1)
        await until(lambda: on.proxy.connections == 0)
        assert on.heard.words[-1].startswith("failed db.example:3: ")

    run(test)


def test_a_limit_slows_and_loses_nothing() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        assert await program.connect("db.example", ECHO_PORT) == 0
        sent = bytes(range(256)) * 400
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(program.sock, sent))
        assert await program.read(len(sent)) == sent
        await sending

    run(test, ProxyOptions(limits=DirectionLimits(Rate(4 << 20, 1 << 14))))


# who may use it


def test_without_the_password_nobody_gets_through() -> None:
    async def test(on: Stage) -> None:
        assert await on.program().ask(b"\x05\x01\x00", 2) == b"\x05\xff"
        wrong = on.program()
        assert await wrong.ask(b"\x05\x01\x02", 2) == b"\x05\x02"
        assert await wrong.ask(b"\x01\x02me\x05wrong", 2) == b"\x01\x01"
        assert await wrong.read(1) == b""
        answer = await on.program().ask(
            b"CONNECT db.example:80 HTTP/1.1\r\nHost: db.example\r\n\r\n", 10_000
        )
        assert answer.startswith(b"HTTP/1.1 407 ")
        assert on.gateway.requests == []
        assert on.proxy.counters.failures == 3

    run(test, ProxyOptions(credentials=Credentials("me", "s3cret")))


def test_with_the_password_both_protocols_get_through() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        assert await program.ask(b"\x05\x01\x02", 2) == b"\x05\x02"
        assert await program.ask(b"\x01\x02me\x06s3cret", 2) == b"\x01\x00"
        request = b"\x05\x01\x00\x01" + socket.inet_aton("192.0.2.1") + ECHO_PORT.to_bytes(2)
        assert (await program.ask(request, 10))[1] == 0
        login = base64.b64encode(b"me:s3cret")
        answer = await on.program().ask(
            b"CONNECT db.example:80 HTTP/1.1\r\nHost: db.example\r\n"
            b"Proxy-Authorization: Basic %s\r\n\r\n" % login,
            15,
        )
        assert answer.startswith(b"HTTP/1.1 200 ")

    run(test, ProxyOptions(credentials=Credentials("me", "s3cret")))


# what is no use


def test_garbage_is_answered_by_the_end() -> None:
    async def test(on: Stage) -> None:
        for garbage in (b"\x16\x03\x01\x02\x00", b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n"):
            program = on.program()
            program.sock.send(garbage)
            while await program.read(1000):
                pass
        await until(lambda: on.proxy.connections == 0)
        assert on.proxy.counters.failures == 3
        assert on.gateway.requests == []

    run(test)


def test_a_program_that_says_nothing_is_sent_away() -> None:
    async def test(on: Stage) -> None:
        with pytest.raises(ConnectionResetError):
            await on.program().read(1)
        assert on.heard.words == ["failed: the program did not say in time what it wants"]

    run(test, ProxyOptions(handshake_timeout_s=0.05))


def test_silent_programs_make_room_for_those_that_speak() -> None:
    async def test(on: Stage) -> None:
        silent = []
        for _ in range(3):
            silent.append(on.program())
            await until(lambda: on.proxy.counters.connections == len(silent))
        with pytest.raises(ConnectionResetError):
            await silent[0].read(1)
        speaking = on.program()
        assert await speaking.connect("db.example", ECHO_PORT) == 0
        with pytest.raises(ConnectionResetError):
            await silent[1].read(1)
        assert "had to make room" in on.heard.words[0]

    run(test, ProxyOptions(max_connections=4))


def test_programs_that_leave_or_break_off_early_leave_nothing() -> None:
    async def test(on: Stage) -> None:
        silent = on.program()
        await until(lambda: on.proxy.connections == 1)
        silent.sock.close()
        await until(lambda: on.proxy.connections == 0)
        assert on.heard.words == ["failed: the program left before it had asked for anything"]
        broken = on.program()
        broken.sock.send(b"\x05\x01")
        await until(lambda: on.proxy.connections == 1)
        reset_tcp(broken.sock)
        await until(lambda: on.proxy.connections == 0)
        assert on.heard.words[1:] == ["failed: Connection reset by peer"]
        assert len(on.session.streams) == 0

    run(test)


def test_beyond_the_most_further_ones_wait() -> None:
    async def test(on: Stage) -> None:
        first, second = on.program(), on.program()
        assert await first.connect("db.example", ECHO_PORT) == 0
        second.sock.send(b"\x05\x01\x00")
        await asyncio.sleep(0)
        assert on.proxy.connections == 1
        first.sock.close()
        assert await second.read(2) == b"\x05\x00"

    run(test, ProxyOptions(max_connections=1))


def test_stopped_it_resets_what_is_open() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        assert await program.connect("db.example", SINK_PORT) == 0
        assert on.running is not None
        on.running.cancel()
        await asyncio.wait({on.running})
        with pytest.raises(ConnectionResetError):
            await program.read(1)
        assert len(on.session.streams) == 0

    run(test)


# the PAC file


def test_the_pac_file_names_the_address_that_was_asked() -> None:
    async def test(on: Stage) -> None:
        answer = await on.program().ask(b"GET /proxy.pac HTTP/1.1\r\nHost: x\r\n\r\n", 100_000)
        port = on.listener.getsockname()[1]
        assert b"application/x-ns-proxy-autoconfig" in answer
        assert b"PROXY 127.0.0.1:%d" % port in answer
        assert b'isBelow(".corp.example")' in answer
        assert on.proxy.counters.failures == 0

    run(test, ProxyOptions(pac_through=("*.corp.example",)))


# UDP


def test_datagrams_go_to_their_targets_and_say_where_answers_are_from() -> None:
    async def test(on: Stage) -> None:
        loop = asyncio.get_running_loop()
        program = on.program()
        where = await program.associate()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            for host, text in (("a.example", b"one"), ("192.0.2.7", b"two"), ("a.example", b"")):
                header = encode_udp_header(host, ECHO_PORT)
                sock.sendto(header + text, where)
                assert await loop.sock_recv(sock, 2000) == header + text
        assert on.gateway.requests == [
            Target("a.example", ECHO_PORT, "udp"),
            Target("192.0.2.7", ECHO_PORT, "udp"),
        ]
        datagrams = on.proxy.counters.datagrams
        assert (datagrams.from_peers, datagrams.to_peers) == (3, 3)
        assert (datagrams.from_peers_bytes, datagrams.to_peers_bytes) == (6, 6)
        program.sock.close()
        await until(lambda: on.proxy.connections == 0)
        assert on.proxy.counters.failures == 0

    run(test)


def test_an_association_ends_with_its_connection() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        where = await program.associate()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(where)
            sock.send(encode_udp_header("a.example", ECHO_PORT) + b"x")
            await asyncio.get_running_loop().sock_recv(sock, 2000)
            program.sock.close()
            await until(lambda: on.proxy.connections == 0)
            sock.send(b"late")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(1)

    run(test)


def test_a_denied_target_of_datagrams_is_told() -> None:
    async def test(on: Stage) -> None:
        program = on.program()
        where = await program.associate()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(encode_udp_header(FORBIDDEN_HOST, 53) + b"x", where)
            sock.sendto(encode_udp_header("db.example", DENIED_PORT) + b"x", where)
            await until(lambda: len(on.heard.words) == 3)
        assert on.heard.words[0].startswith("denied forbidden.example:53: ")
        assert sorted(on.heard.words[1:]) == [
            "opened udp db.example:7",
            "refused db.example:7: 403",
        ]

    run(test)
