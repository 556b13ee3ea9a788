"""A TCP socket of a relay: reads, writes, ends and resets, on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop

from toppy.net.stream_socket import READ_BYTES, StreamSocket
from toppy.net.tcp import prepare_tcp, reset_tcp
from toppy.wire.connect_tcp import HEADROOM_BYTES

DEADLINE_S = 20.0
BUFFER_BYTES = 64 << 10


class Reader:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.largest = 0
        self.events: list[str] = []

    def receive(self, buffer: memoryview, payload_bytes: int) -> None:
        self.largest = max(self.largest, payload_bytes)
        self.received += buffer[HEADROOM_BYTES : HEADROOM_BYTES + payload_bytes]

    def receive_end(self) -> None:
        self.events.append("end")

    def receive_failure(self, reason: str) -> None:
        self.events.append(reason)

    def drained(self) -> None:
        self.events.append("drained")


class Stage:
    """A stream socket, and the other end of its connection."""

    def __init__(self, look_interval_s: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            near = socket.socket()
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            near.connect(listener.getsockname())
            self.peer, _ = listener.accept()
        for sock in (near, self.peer):
            prepare_tcp(sock)
        self.reader = Reader()
        self.raw = near
        self.socket = StreamSocket(near, self.reader, look_interval_s=look_interval_s)

    def has_heard(self) -> bool:
        """Of an end, a failure or a drain."""
        return bool(self.reader.events)

    async def read(self, size: int) -> bytes:
        """Exactly so much, at the other end."""
        data = bytearray()
        while len(data) < size:
            more = await asyncio.get_running_loop().sock_recv(self.peer, size - len(data))
            if not more:
                break
            data += more
        return bytes(data)


@asynccontextmanager
async def stage(look_interval_s: float = 60.0) -> AsyncIterator[Stage]:
    on = Stage(look_interval_s)
    try:
        yield on
    finally:
        on.socket.close()
        on.peer.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def with_deadline() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(with_deadline())


async def until(condition: Callable[[], object]) -> None:
    """Whatever it waits for happens on this loop, or in the kernel, which tells nobody."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def test_nothing_is_read_before_resume_nor_after_pause() -> None:
    async def test() -> None:
        async with stage() as on:
            on.peer.send(b"early")
            await asyncio.sleep(0)
            assert on.reader.received == b""
            on.socket.resume()
            await until(lambda: on.reader.received == b"early")
            on.socket.pause()
            on.peer.send(b" late")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert on.reader.received == b"early"
            on.socket.resume()
            await until(lambda: on.reader.received == b"early late")

    run(test)


def test_what_the_socket_does_not_take_waits_and_goes_in_order() -> None:
    async def test() -> None:
        async with stage() as on:
            pieces = [bytes([number]) * 50_000 for number in range(100)]
            for piece in pieces:
                on.socket.write([piece[:1000], piece[1000:]])
            assert on.socket.unsent_bytes > 0
            assert await on.read(5_000_000) == b"".join(pieces)
            await until(lambda: on.reader.events == ["drained"])
            assert on.socket.unsent_bytes == 0

    run(test)


def test_what_the_socket_takes_at_once_is_not_told() -> None:
    async def test() -> None:
        async with stage() as on:
            on.socket.write([b"one", memoryview(b"two"), b""])
            assert await on.read(6) == b"onetwo"
            assert on.reader.events == []

    run(test)


def test_one_read_takes_no_more_than_its_limit() -> None:
    async def test() -> None:
        async with stage() as on:
            on.socket.read_limit = 10
            on.socket.resume()
            on.peer.send(bytes(1000))
            await until(lambda: len(on.reader.received) == 1000)
            assert on.reader.largest == 10
            on.socket.read_limit = READ_BYTES

    run(test)


def test_the_peers_end_is_told_once_and_writing_goes_on() -> None:
    async def test() -> None:
        async with stage() as on:
            on.socket.resume()
            on.peer.send(b"last words")
            on.peer.shutdown(socket.SHUT_WR)
            await until(lambda: on.reader.events == ["end"])
            assert on.reader.received == b"last words"
            on.socket.resume()  # to no effect
            on.socket.write([b"answer"])
            assert on.socket.finish()
            assert await on.read(100) == b"answer"
            assert on.reader.events == ["end"]

    run(test)


def test_a_reset_is_told_while_it_is_read() -> None:
    async def test() -> None:
        async with stage() as on:
            on.socket.resume()
            reset_tcp(on.peer)
            await until(lambda: on.reader.events == ["Connection reset by peer"])

    run(test)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_reset_behind_unread_data_is_told(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def test() -> None:
        for _ in range(20):
            async with stage() as on:
                on.socket.read_limit = 100
                on.peer.send(bytes(10_000))
                reset_tcp(on.peer)
                on.socket.resume()
                await until(on.has_heard)
                assert on.reader.events == ["Connection reset by peer"]

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(test(), DEADLINE_S))


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_reset_that_a_write_meets_first_is_no_end(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def test() -> None:
        async with stage() as on:
            before, beside = socket.socketpair()

            def write() -> None:
                asyncio.get_running_loop().remove_reader(before.fileno())
                on.socket.write([b"late"])
                on.socket.resume()

            with before, beside:
                asyncio.get_running_loop().add_reader(before.fileno(), write)
                on.socket.resume()
                await asyncio.sleep(0.01)
                # both in one turn of the loop, in this order
                beside.send(b"x")
                reset_tcp(on.peer)
                await until(on.has_heard)
            await asyncio.sleep(0)
            assert on.reader.events == ["Connection reset by peer"]

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(test(), DEADLINE_S))


def test_a_reset_is_noticed_while_it_is_not_read() -> None:
    async def test() -> None:
        async with stage(look_interval_s=0.001) as on:
            on.socket.resume()
            on.socket.pause()
            reset_tcp(on.peer)
            await until(lambda: on.reader.events == ["Connection reset by peer"])

    run(test)


def test_a_reset_is_noticed_after_the_peers_end() -> None:
    async def test() -> None:
        async with stage(look_interval_s=0.001) as on:
            on.socket.resume()
            on.peer.shutdown(socket.SHUT_WR)
            await until(lambda: on.reader.events == ["end"])
            on.raw.send(b"unread")
            reset_tcp(on.peer)
            await until(lambda: len(on.reader.events) == 2)
            assert on.reader.events[1] == "Connection reset by peer"

    run(test)


def test_writing_to_a_peer_that_has_reset_is_told_later_and_once() -> None:
    async def test() -> None:
        async with stage() as on:
            reset_tcp(on.peer)
            on.socket.write([b"one"])
            on.socket.write([b"two"])
            assert on.reader.events == []  # whoever writes is in the midst of something
            assert on.socket.unsent_bytes == 0
            assert not on.socket.finish()
            await until(lambda: on.reader.events)
            await asyncio.sleep(0)
            assert on.reader.events == ["Connection reset by peer"]

    run(test)


def test_a_reset_while_bytes_wait_is_a_failure_and_no_drain() -> None:
    async def test() -> None:
        async with stage() as on:
            on.socket.write([bytes(5_000_000)])
            assert on.socket.unsent_bytes > 0
            reset_tcp(on.peer)
            await until(lambda: on.reader.events)
            assert on.reader.events == ["Connection reset by peer"]

    run(test)


def test_close_says_end_and_reset_says_reset() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with stage() as on:
            on.socket.write([b"bye"])
            on.socket.close()
            assert on.socket.is_closed
            assert await on.read(100) == b"bye"
        async with stage() as on:
            on.socket.resume()
            on.socket.reset()
            try:
                await loop.sock_recv(on.peer, 1)
            except ConnectionResetError:
                pass
            else:
                raise AssertionError("no reset")

    run(test)


def test_a_closed_socket_takes_every_call_and_does_nothing() -> None:
    async def test() -> None:
        async with stage() as on:
            on.socket.resume()
            on.socket.write([bytes(5_000_000)])
            on.socket.close()
            on.socket.write([b"more"])
            on.socket.resume()
            on.socket.pause()
            on.socket.close()
            on.socket.reset()
            await asyncio.sleep(0)
            assert on.reader.events == []
            assert on.socket.unsent_bytes == 0

    run(test)
