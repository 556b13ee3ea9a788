"""Relays between two TCP sockets: what goes in comes out, ends and resets are passed on."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from toppy.net.copy import CopyRelay
from toppy.net.splice import SpliceRelay
from toppy.net.tcp import prepare_tcp, reset_tcp
from toppy.net.tcp_relay import ByteCounters, Rate, TcpRelay

DEADLINE_S = 30.0
RELAYS = [SpliceRelay, CopyRelay]
MakeRelay = Callable[..., TcpRelay]


@pytest.fixture(params=RELAYS, ids=["splice", "copy"])
def make(request: pytest.FixtureRequest) -> MakeRelay:
    found: MakeRelay = request.param
    return found


BUFFER_BYTES = 128 << 10
"""Of each socket; without it the kernel's largest decides, which may be tens of megabytes."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one connection on loopback, prepared."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        one.connect(listener.getsockname())
        other, _ = listener.accept()
    for sock in (one, other):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        prepare_tcp(sock)
    return one, other


@dataclass
class Stage:
    """A relay between an application and a target, which the test plays."""

    app: socket.socket
    target: socket.socket
    counters: ByteCounters
    relaying: asyncio.Task[str]

    async def end(self) -> str:
        """Why it ended."""
        return await asyncio.wait_for(self.relaying, DEADLINE_S)


@asynccontextmanager
async def stage(
    make: MakeRelay,
    rate: Rate | None = None,
    counters: ByteCounters | None = None,
    **options: Any,
) -> AsyncIterator[Stage]:
    app, near = pair()
    far, target = pair()
    relay = make(**options)
    counters = counters or ByteCounters()
    relaying = asyncio.create_task(relay.relay(near, far, rate, counters))
    try:
        yield Stage(app, target, counters, relaying)
    finally:
        relaying.cancel()
        await asyncio.wait({relaying})
        relay.close()
        app.close()
        target.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def with_deadline() -> None:
        await asyncio.wait_for(test(), 2 * DEADLINE_S)

    asyncio.run(with_deadline())


async def send_all(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def read_to_end(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    parts = []
    while data := await loop.sock_recv(sock, 1 << 20):
        parts.append(data)
    return b"".join(parts)


async def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        assert more, "ended early"
        data += more
    return data


async def wait_for_reset(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(ConnectionResetError):
        while await loop.sock_recv(sock, 1 << 20):
            pass


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def no_descriptor_is_left() -> Iterator[None]:
    before = len(descriptors())
    yield
    assert len(descriptors()) <= before


pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


def test_megabytes_go_both_ways_at_once(make: MakeRelay) -> None:
    up, down = os.urandom(5_000_001), os.urandom(7_000_003)

    async def test() -> None:
        async with stage(make) as on:

            async def say(sock: socket.socket, data: bytes) -> None:
                await send_all(sock, data)
                sock.shutdown(socket.SHUT_WR)

            _, _, at_target, at_app = await asyncio.gather(
                say(on.app, up), say(on.target, down), read_to_end(on.target), read_to_end(on.app)
            )
            assert at_target == up
            assert at_app == down
            assert await on.end() == ""
            assert on.counters == ByteCounters(len(up), len(down))

    run(test)


def test_small_messages_go_to_and_fro(make: MakeRelay) -> None:
    async def test() -> None:
        async with stage(make) as on:
            for number in range(100):
                await send_all(on.app, b"ask%4d" % number)
                assert await read_exactly(on.target, 7) == b"ask%4d" % number
                await send_all(on.target, b"answer%4d" % number)
                assert await read_exactly(on.app, 10) == b"answer%4d" % number

    run(test)


@pytest.mark.parametrize("first", ["app", "target"])
def test_one_direction_ends_and_the_other_goes_on(make: MakeRelay, first: str) -> None:
    async def test() -> None:
        async with stage(make) as on:
            one, other = (on.app, on.target) if first == "app" else (on.target, on.app)
            await send_all(one, b"all I have")
            one.shutdown(socket.SHUT_WR)
            assert await read_to_end(other) == b"all I have"
            for _ in range(3):
                await send_all(other, b"more")
                assert await read_exactly(one, 4) == b"more"
            other.shutdown(socket.SHUT_WR)
            assert await read_to_end(one) == b""
            assert await on.end() == ""

    run(test)


@pytest.mark.parametrize("first", ["app", "target"])
def test_a_reset_is_passed_on(make: MakeRelay, first: str) -> None:
    async def test() -> None:
        async with stage(make) as on:
            one, other = (on.app, on.target) if first == "app" else (on.target, on.app)
            await send_all(one, b"hello")
            assert await read_exactly(other, 5) == b"hello"
            reset_tcp(one)
            await wait_for_reset(other)
            assert "reset" in await on.end()

    run(test)


@pytest.mark.parametrize("first", ["app", "target"])
def test_what_came_before_a_reset_is_delivered_to_who_reads(make: MakeRelay, first: str) -> None:
    """A target that answers and closes without having read all that it was sent."""

    async def test() -> None:
        async with stage(make) as on:
            one, other = (on.app, on.target) if first == "app" else (on.target, on.app)
            await send_all(other, b"not read by the other")
            await send_all(one, b"answer")
            assert await read_exactly(other, 6) == b"answer"
            assert await asyncio.get_running_loop().sock_recv(one, 1) == b"n"
            one.close()  # with the rest unread: a reset
            await wait_for_reset(other)
            assert await on.end() != ""

    run(test)


def test_a_reset_is_passed_on_though_the_target_does_not_read() -> None:
    async def test() -> None:
        async with stage(SpliceRelay) as on:
            await fill(on.app)
            reset_tcp(on.app)
            assert "reset" in await on.end()
            await wait_for_reset(on.target)

    run(test)


async def fill(sock: socket.socket) -> int:
    """Send until nothing has gone for a while: the relay does not take more."""
    sent = idle = 0
    data = bytes(1 << 20)
    while idle < 20:
        try:
            sent += sock.send(data)
            idle = 0
        except BlockingIOError:
            idle += 1
            await asyncio.sleep(0.01)
    return sent


def test_who_sends_waits_for_who_reads(make: MakeRelay) -> None:
    """What is under way is bounded: by the sockets' buffers and what a relay holds."""

    async def test() -> None:
        async with stage(make) as on:
            sent = await fill(on.app)
            # the pipe, and four sockets' buffers, which the kernel makes twice as large
            assert sent <= (1 << 20) + 4 * 2 * BUFFER_BYTES
            on.app.shutdown(socket.SHUT_WR)
            assert len(await read_to_end(on.target)) == sent

    run(test)


def test_a_direction_that_is_stuck_does_not_stop_the_other(make: MakeRelay) -> None:
    async def test() -> None:
        async with stage(make) as on:
            await fill(on.app)
            await send_all(on.target, b"still here")
            assert await read_exactly(on.app, 10) == b"still here"

    run(test)


def test_a_cancelled_relay_resets_both_sides(make: MakeRelay) -> None:
    async def test() -> None:
        async with stage(make) as on:
            await send_all(on.app, b"hello")
            assert await read_exactly(on.target, 5) == b"hello"
            on.relaying.cancel()
            await wait_for_reset(on.app)
            await wait_for_reset(on.target)

    run(test)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_no_more_than_the_rate_goes_and_nothing_is_lost(make: MakeRelay) -> None:
    clock = Clock()

    async def test() -> None:
        async with stage(make, Rate(100_000, 10_000), clock=clock) as on:
            data = os.urandom(35_000)
            await send_all(on.app, data)
            on.app.shutdown(socket.SHUT_WR)
            got = await read_exactly(on.target, 10_000)
            for _ in range(2):
                for _ in range(30):
                    await asyncio.sleep(0.001)
                assert on.counters.to_target == len(got)
                clock.now += 0.1
                got += await read_exactly(on.target, 10_000)
            clock.now += 0.1
            got += await read_to_end(on.target)
            assert got == data

    run(test)


def test_the_directions_have_a_bucket_each(make: MakeRelay) -> None:
    clock = Clock()

    async def test() -> None:
        async with stage(make, Rate(1000, 5000), clock=clock) as on:
            await send_all(on.app, bytes(9000))
            await send_all(on.target, bytes(9000))
            await read_exactly(on.target, 5000)
            await read_exactly(on.app, 5000)
            assert on.counters == ByteCounters(5000, 5000)

    run(test)


def test_an_end_that_waits_for_the_bucket_comes_after_the_bytes(make: MakeRelay) -> None:
    async def test() -> None:
        async with stage(make, Rate(1 << 20, 4096)) as on:
            data = os.urandom(100_000)
            await send_all(on.app, data)
            on.app.shutdown(socket.SHUT_WR)
            assert await read_to_end(on.target) == data
            on.target.shutdown(socket.SHUT_WR)
            assert await on.end() == ""

    run(test)


def test_many_connections_share_a_relay_and_leave_nothing(make: MakeRelay) -> None:
    async def test() -> None:
        relay = make()

        async def one(number: int) -> None:
            app, near = pair()
            far, target = pair()
            relaying = asyncio.create_task(relay.relay(near, far, None, ByteCounters()))
            text = b"%d" % number
            await send_all(app, text)
            assert await read_exactly(target, len(text)) == text
            app.close()
            target.close()
            assert await relaying == ""

        for start in range(0, 200, 50):
            await asyncio.gather(*(one(start + index) for index in range(50)))
        relay.close()

    run(test)


def test_busy_connections_take_turns() -> None:
    """A connection that always has more does not keep a small message of another waiting."""

    async def test() -> None:
        relay = SpliceRelay()
        busy, near = pair()
        far, busy_target = pair()
        quiet, near2 = pair()
        far2, quiet_target = pair()
        relaying = [
            asyncio.create_task(relay.relay(near, far, None, ByteCounters())),
            asyncio.create_task(relay.relay(near2, far2, None, ByteCounters())),
        ]
        reading = asyncio.create_task(read_to_end(busy_target))
        sending = asyncio.create_task(send_all(busy, bytes(64 << 20)))
        for _ in range(20):
            await send_all(quiet, b"ping")
            assert await read_exactly(quiet_target, 4) == b"ping"
        await sending
        busy.close()
        assert len(await reading) == 64 << 20
        for task in relaying:
            task.cancel()
        await asyncio.wait(relaying)
        relay.close()
        for sock in (quiet, busy_target, quiet_target):
            sock.close()

    run(test)


def test_without_leave_for_a_large_pipe_a_small_one_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(fd: int, command: int, value: int) -> int:
        assert command == fcntl.F_SETPIPE_SZ
        raise PermissionError

    monkeypatch.setattr("toppy.net.splice.fcntl.fcntl", refuse)
    test_megabytes_go_both_ways_at_once(SpliceRelay)


def test_without_descriptors_a_connection_is_reset_and_the_relay_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(flags: int) -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    async def test() -> None:
        async with stage(SpliceRelay) as on:
            with monkeypatch.context() as patched:
                patched.setattr("toppy.net.splice.os.pipe2", refuse)
                await send_all(on.app, b"hello")
                assert await on.end() == "Too many open files"
            await wait_for_reset(on.app)
            await wait_for_reset(on.target)

    run(test)


def test_a_bucket_is_waited_for_until_a_timers_worth_is_in_it() -> None:
    assert Rate(100 << 20, 100 << 20).least == (100 << 20) // 100
    assert Rate(100_000, 1 << 20).least == 4096
    assert Rate(1000, 1000).least == 500
    assert Rate(1, 1).least == 1


class Steps(ByteCounters):
    """What each piece on its way to the target was."""

    def __init__(self) -> None:
        self.pieces: list[int] = []
        super().__init__()

    def __setattr__(self, name: str, value: int | list[int]) -> None:
        if name == "to_target" and isinstance(value, int) and value:
            self.pieces.append(value - self.to_target)
        object.__setattr__(self, name, value)


def test_what_a_bucket_gains_meanwhile_is_not_moved_byte_by_byte(make: MakeRelay) -> None:
    clock, steps = Clock(), Steps()

    def ticking() -> float:
        clock.now += 0.0005  # 500 bytes
        return clock.now

    async def test() -> None:
        rate = Rate(1_000_000, 100_000)
        async with stage(make, rate, counters=steps, clock=ticking) as on:
            await send_all(on.app, bytes(110_000))
            await read_exactly(on.target, 110_000)

    run(test)
    assert sum(steps.pieces) == 110_000
    assert [size for size in steps.pieces if size <= 500] == []
