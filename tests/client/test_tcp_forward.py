"""``toppy up``: connections are accepted, bounded, carried to the far side, and told of."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from toppy.client import tcp_forward
from toppy.client.lookup import NameLookupError
from toppy.client.tcp_forward import DirectFarSide, FarStream, TcpForward, tcp_relay
from toppy.config.policy import PolicyRule
from toppy.errors import DeniedError, TargetError, ToppyError
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.net import acceptor
from toppy.net.copy import CopyRelay
from toppy.net.splice import SpliceRelay
from toppy.net.tcp import listen_tcp, reset_tcp
from toppy.net.tcp_relay import ByteCounters, TcpRelay
from toppy.policy.ruleset import Decision, Ruleset
from toppy.quic.engine import Address

DEADLINE_S = 20.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def with_deadline() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(with_deadline())


async def until(condition: Callable[[], bool]) -> None:
    """Whatever it waits for happens on this loop, or in the kernel, which tells nobody."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Held:
    """A stream that ends when the test says."""

    def __init__(self) -> None:
        self.client: socket.socket | None = None
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def relay(self, client: socket.socket, counters: ByteCounters) -> str:
        self.client = client
        counters.to_target += 3
        counters.to_client += 5
        try:
            return await self.ended
        finally:
            reset_tcp(client)


class FarEnd:
    """A far side that the test plays."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.streams: list[Held] = []

    async def open(self) -> FarStream:
        if self.error is not None:
            raise self.error
        self.streams.append(Held())
        return self.streams[-1]

    def close(self) -> None:
        pass


class Stage:
    """A forward on loopback."""

    def __init__(self, far: FarEnd, max_connections: int) -> None:
        self.listener = listen_tcp("127.0.0.1", 0)
        self.far = far
        self.refused: list[ToppyError] = []
        self.problems: list[str] = []
        self.forward = TcpForward(
            self.listener,
            far,
            max_connections=max_connections,
            on_refused=lambda _, error: self.refused.append(error),
            on_problem=lambda _, problem: self.problems.append(problem),
        )
        self.apps: list[socket.socket] = []

    def connect(self) -> socket.socket:
        app = socket.create_connection(self.listener.getsockname())
        app.setblocking(False)
        self.apps.append(app)
        return app


@asynccontextmanager
async def stage(
    error: Exception | None = None, *, max_connections: int = 10, runs: bool = True
) -> AsyncIterator[Stage]:
    on = Stage(FarEnd(error), max_connections)
    running = asyncio.create_task(on.forward.run()) if runs else None
    try:
        yield on
    finally:
        if running is not None:
            running.cancel()
            await asyncio.wait({running})
        on.listener.close()
        for app in on.apps:
            app.close()


async def read(sock: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(sock, 100)


def test_each_connection_gets_a_way_of_its_own_and_is_counted() -> None:
    async def test() -> None:
        async with stage() as on:
            for _ in range(3):
                on.connect()
            await until(lambda: len(on.far.streams) == 3)
            assert on.forward.connections == 3
            on.far.streams[0].ended.set_result("")
            await until(lambda: on.forward.connections == 2)
            assert on.forward.counters.connections == 3
            assert on.forward.counters.failures == 0
            assert (on.forward.counters.to_target, on.forward.counters.to_client) == (9, 15)
            assert on.problems == []

    run(test)


def test_beyond_the_bound_connections_wait_for_their_turn() -> None:
    async def test() -> None:
        async with stage(max_connections=2) as on:
            for _ in range(4):
                on.connect()
            await until(lambda: len(on.far.streams) == 2)
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert len(on.far.streams) == 2
            on.far.streams[0].ended.set_result("")
            await until(lambda: len(on.far.streams) == 3)
            on.far.streams[1].ended.set_result("")
            await until(lambda: len(on.far.streams) == 4)
            assert on.forward.connections == 2

    run(test)


def test_without_a_way_the_application_is_reset_and_the_next_is_served() -> None:
    async def test() -> None:
        async with stage(TargetError("nobody is there")) as on:
            for number in (1, 2):
                with pytest.raises(ConnectionResetError):
                    await read(on.connect())
                assert [str(error) for error in on.refused] == ["nobody is there"] * number
            assert on.forward.counters.failures == 2

    run(test)


def test_a_reset_is_told_and_counted() -> None:
    async def test() -> None:
        async with stage() as on:
            on.connect()
            await until(lambda: len(on.far.streams) == 1)
            on.far.streams[0].ended.set_result("Connection reset by peer")
            await until(lambda: on.problems == ["Connection reset by peer"])
            assert on.forward.counters.failures == 1

    run(test)


def test_when_it_is_stopped_every_connection_is_reset() -> None:
    async def test() -> None:
        async with stage() as on:
            apps = [on.connect(), on.connect()]
            await until(lambda: len(on.far.streams) == 2)
        for app in apps:
            assert app.fileno() < 0
        for stream in on.far.streams:
            assert stream.client is not None
            assert stream.client.fileno() < 0

    run(test)


@pytest.mark.parametrize(("problem", "went_well"), [("", True), ("reset", False)])
def test_once_is_one_connection_and_nobody_else_gets_in(problem: str, went_well: bool) -> None:
    async def test() -> None:
        async with stage(runs=False) as on:
            address = on.listener.getsockname()
            serving = asyncio.create_task(on.forward.run_once())
            on.connect()
            await until(lambda: len(on.far.streams) == 1)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
            on.far.streams[0].ended.set_result(problem)
            assert await serving is went_well

    run(test)


def test_once_fails_when_there_is_no_way() -> None:
    async def test() -> None:
        async with stage(DeniedError("no"), runs=False) as on:
            on.connect()
            assert await on.forward.run_once() is False

    run(test)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOBUFS])
def test_without_descriptors_or_memory_it_waits_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(acceptor, "ACCEPT_PAUSE_S", 0.001)

    async def test() -> None:
        loop = asyncio.get_running_loop()
        accept, errors = loop.sock_accept, [OSError(number, "enough"), OSError(errno.EPROTO, "")]

        async def sock_accept(sock: socket.socket) -> tuple[socket.socket, object]:
            if errors:
                raise errors.pop(0)
            return await accept(sock)

        monkeypatch.setattr(loop, "sock_accept", sock_accept)
        async with stage() as on:
            on.connect()
            await until(lambda: len(on.far.streams) == 1)
            assert on.problems == ["enough"]

    run(test)


# the direct far side

NAMED = Target("db.example", 1, "tcp")
LOOPBACK = PolicyRule.model_validate({"name": "here", "action": "allow", "cidr": "127.0.0.0/8"})
RULES = Ruleset((LOOPBACK,), guards_special=False)


def direct(
    target: Target,
    names: dict[str, list[str]] | None = None,
    until_s: float | None = None,
    relay: TcpRelay | None = None,
) -> DirectFarSide:
    async def resolve(host: str, port: int) -> Sequence[Address]:
        if names is None or host not in names:
            raise NameLookupError("no such name")
        return [(address, port) for address in names[host]]

    def decide(addresses: Sequence[str], now: float) -> Decision:
        decision = RULES.decide(Identity("", "none"), target, addresses, now=now)
        return Decision(
            decision.is_allowed,
            decision.addresses,
            decision.rule,
            decision.reason,
            until=None if until_s is None else now + until_s,
        )

    return DirectFarSide(
        target,
        decide,
        rate=None,
        connect_timeout_s=5.0,
        relay=relay or CopyRelay(),
        resolve=resolve,
    )


def test_an_address_is_connected_to() -> None:
    async def test() -> None:
        with listen_tcp("127.0.0.1", 0) as target:
            far = direct(Target("127.0.0.1", target.getsockname()[1], "tcp"))
            stream = await far.open()
            at_target, _ = await asyncio.get_running_loop().sock_accept(target)
            near, app = socket.socketpair()
            near.setblocking(False)
            with at_target, app:
                relaying = asyncio.create_task(stream.relay(near, ByteCounters()))
                app.sendall(b"hello")
                assert await read(at_target) == b"hello"
                app.shutdown(socket.SHUT_WR)
                at_target.shutdown(socket.SHUT_WR)
                assert await relaying == ""
            far.close()

    run(test)


def test_a_thousand_connections_leave_no_task_and_no_descriptor() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        writer.close()
        await writer.wait_closed()

    async def talk(address: Address, number: int) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"%d" % number)
        assert await reader.read(100) == b"%d" % number
        writer.close()
        await writer.wait_closed()

    async def test() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        local = listen_tcp("127.0.0.1", 0)
        target = Target("127.0.0.1", server.sockets[0].getsockname()[1], "tcp")
        far = direct(target, relay=tcp_relay())
        forward = TcpForward(local, far, max_connections=64)
        running = asyncio.create_task(forward.run())
        await talk(local.getsockname(), 0)
        await until(lambda: forward.connections == 0)
        before = len(asyncio.all_tasks()), descriptors()
        for first in range(0, 1000, 100):
            numbers = range(first, first + 100)
            await asyncio.gather(*(talk(local.getsockname(), number) for number in numbers))
        await until(lambda: forward.connections == 0)
        await until(lambda: len(asyncio.all_tasks()) <= before[0])
        # a relay keeps some pipes for the next connections
        assert descriptors() <= before[1] + 2 * 16
        assert forward.counters.connections == 1001
        running.cancel()
        await asyncio.wait({running})
        far.close()
        local.close()
        server.close()
        await server.wait_closed()

    run(test)


def test_of_a_names_addresses_only_allowed_ones_are_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Sequence[str]] = []

    async def connect_tcp(addresses: Sequence[str], port: int, *, timeout_s: float) -> None:
        del port, timeout_s
        asked.append(addresses)
        raise TargetError("nobody is there")

    monkeypatch.setattr(tcp_forward, "connect_tcp", connect_tcp)
    names = {NAMED.host: ["192.0.2.1", "127.0.0.1", "2001:db8::1", "127.0.0.2"]}

    async def test() -> None:
        with pytest.raises(TargetError):
            await direct(NAMED, names).open()

    run(test)
    assert asked == [("127.0.0.1", "127.0.0.2")]


def test_a_name_that_now_leads_elsewhere_is_refused() -> None:
    async def test() -> None:
        names = {NAMED.host: ["127.0.0.1"]}
        far = direct(NAMED, names)
        with pytest.raises(TargetError, match="refused"):
            await far.open()
        names[NAMED.host] = ["192.0.2.1"]
        with pytest.raises(DeniedError, match="not allowed"):
            await far.open()

    run(test)


def test_a_name_that_does_not_resolve_is_told() -> None:
    async def test() -> None:
        with pytest.raises(TargetError, match="cannot be resolved here: no such name") as raised:
            await direct(NAMED).open()
        assert raised.value.proxy_status == "dns_error"

    run(test)


def test_a_connection_ends_with_the_time_of_its_rule() -> None:
    async def test() -> None:
        with listen_tcp("127.0.0.1", 0) as target:
            far = direct(Target("127.0.0.1", target.getsockname()[1], "tcp"), until_s=0.05)
            stream = await far.open()
            near, app = socket.socketpair()
            near.setblocking(False)
            with app:
                assert "is over" in await stream.relay(near, ByteCounters())

    run(test)


def test_the_kernel_carries_the_bytes_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        relay = tcp_relay()
        assert isinstance(relay, SpliceRelay)
        relay.close()
        monkeypatch.delattr("os.splice")
        assert isinstance(tcp_relay(), CopyRelay)

    run(test)
