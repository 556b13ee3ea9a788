"""Standard input and output as one end of a tunnel; other descriptors play them."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path

import pytest

from tests.client.tcp_gateway import RESET_PORT, connected
from toppy.client.gateway_far_side import open_stream
from toppy.client.stdio_tunnel import StdioConnection, carry_stdio, watchable
from toppy.model.target import Target
from toppy.net.tcp import reset_tcp
from toppy.net.tcp_relay import ByteCounters

DEADLINE_S = 20.0
ECHO_PORT = 5432


def carry(read_fd: int, write_fd: int, port: int = ECHO_PORT) -> tuple[str, ByteCounters]:
    """Why it ended, and what went through."""
    counters = ByteCounters()

    async def run() -> str:
        async with asyncio.timeout(DEADLINE_S), connected() as (_, session):
            stream = await open_stream(session, Target("db.example", port, "tcp"))
            return await carry_stdio(stream, counters, read_fd=read_fd, write_fd=write_fd)

    return asyncio.run(run()), counters


def read_all(fd: int) -> bytes:
    data = b""
    while more := os.read(fd, 65536):
        data += more
    return data


def test_what_is_piped_in_comes_out_and_ends_in_order() -> None:
    into, from_us = os.pipe(), os.pipe()
    os.write(into[1], b"hello")
    os.close(into[1])
    assert carry(into[0], from_us[1]) == ("", ByteCounters(5, 5))
    os.close(from_us[1])
    assert read_all(from_us[0]) == b"hello"
    os.close(into[0])
    os.close(from_us[0])


def test_one_socket_may_be_both() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(b"hello")
        ours.shutdown(socket.SHUT_WR)
        other = os.dup(theirs.fileno())
        theirs_in = theirs.detach()
        assert carry(theirs_in, other)[0] == ""
        assert ours.recv(100) == b"hello"
        for fd in (theirs_in, other):
            os.close(fd)


def test_an_end_is_told_although_the_same_socket_is_still_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = StdioConnection(theirs.fileno(), other := os.dup(theirs.fileno()))
        connection.shutdown(socket.SHUT_WR)
        assert ours.recv(100) == b""
        ours.send(b"late")
        buffer = bytearray(100)
        assert connection.recv_into(memoryview(buffer), 100) == 4
        connection.close()
        os.close(other)


def test_a_reset_of_what_is_read_is_seen_behind_unread_data() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    sink = os.open(os.devnull, os.O_WRONLY)
    with theirs:
        connection = StdioConnection(theirs.fileno(), sink)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        ours.send(b"data")
        reset_tcp(ours)
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert error == errno.ECONNRESET
        connection.close()
    os.close(sink)


def test_a_pipe_has_no_error() -> None:
    into, from_us = os.pipe(), os.pipe()
    connection = StdioConnection(into[0], from_us[1])
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    connection.close()
    for fd in (*into, *from_us):
        os.close(fd)


def test_a_file_can_be_read_and_written(tmp_path: Path) -> None:
    sent = os.urandom(300_000)
    (tmp_path / "in").write_bytes(sent)
    source = os.open(tmp_path / "in", os.O_RDONLY)
    sink = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    assert carry(source, sink)[0] == ""
    os.close(source)
    os.close(sink)
    assert (tmp_path / "out").read_bytes() == sent


def test_nothing_to_read_ends_in_order(tmp_path: Path) -> None:
    source, sink = os.open(os.devnull, os.O_RDONLY), os.open(tmp_path / "out", os.O_CREAT)
    assert carry(source, sink) == ("", ByteCounters())
    os.close(source)
    os.close(sink)


def test_a_reset_is_said() -> None:
    into, from_us = os.pipe(), os.pipe()
    os.write(into[1], b"x")
    reason, _ = carry(into[0], from_us[1], RESET_PORT)
    assert reason == "the target or the gateway broke it off"
    for fd in (*into, *from_us):
        os.close(fd)


def test_a_reader_that_has_gone_breaks_it_off() -> None:
    into, from_us = os.pipe(), os.pipe()
    os.close(from_us[0])
    os.write(into[1], b"hello")
    reason, _ = carry(into[0], from_us[1])
    assert reason == "Connection reset by peer"
    for fd in (*into, from_us[1]):
        os.close(fd)


def test_descriptors_are_as_blocking_afterwards_as_they_were() -> None:
    ends = os.pipe()
    os.set_blocking(ends[1], False)
    copies = [os.dup(fd) for fd in ends]
    connection = StdioConnection(*ends)
    assert [os.get_blocking(fd) for fd in copies] == [False, False]
    connection.close()
    connection.close()
    assert [os.get_blocking(fd) for fd in copies] == [True, False]
    assert connection.fileno() == -1
    # their numbers stay taken: no later file becomes standard output
    assert all(os.fstat(fd).st_rdev == Path(os.devnull).stat().st_rdev for fd in ends)
    for fd in (*ends, *copies):
        os.close(fd)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_a_loop_can_watch_is_used_as_it_is(kind: str) -> None:
    first, second = os.pipe() if kind == "pipe" else [s.detach() for s in socket.socketpair()]
    assert watchable(first) == first
    os.close(first)
    os.close(second)
