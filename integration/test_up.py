"""``toppy up --direct`` in front of real sockets."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from integration.processes import (
    free_tcp_port,
    run_command,
    running_direct_up,
    wait_until,
)
from toppy.net.tcp import reset_tcp

DEADLINE_S = 30.0
CHUNK = 1 << 20
MEGABYTES = 64

Serve = Callable[[socket.socket], None]


@contextlib.contextmanager
def target(serve: Serve) -> Iterator[int]:
    """Serves every connection in a thread of its own; its port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)

    def one(sock: socket.socket) -> None:
        with sock, contextlib.suppress(ConnectionError, TimeoutError):
            sock.settimeout(DEADLINE_S)
            serve(sock)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=one, args=(sock,), daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join(DEADLINE_S)


def echo(sock: socket.socket) -> None:
    while data := sock.recv(CHUNK):
        sock.sendall(data)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)


def send_random(sock: socket.socket, seed: int) -> str:
    """Send ``MEGABYTES`` and end; their checksum."""
    generator, digest = random.Random(seed), hashlib.sha256()
    for _ in range(MEGABYTES):
        data = generator.randbytes(CHUNK)
        digest.update(data)
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def read_digest(sock: socket.socket) -> tuple[int, str]:
    """Read to the end; how much that was, and its checksum."""
    size, digest = 0, hashlib.sha256()
    while data := sock.recv(CHUNK):
        size += len(data)
        digest.update(data)
    return size, digest.hexdigest()


class Both:
    """Sends and reads at once, as a thread per direction."""

    def __init__(self, sock: socket.socket, seed: int) -> None:
        self.sent = ""
        self.received = (0, "")

        def send() -> None:
            self.sent = send_random(sock, seed)

        sending = threading.Thread(target=send)
        sending.start()
        self.received = read_digest(sock)
        sending.join(DEADLINE_S)


def test_64_mib_go_each_way_at_once_and_arrive_unchanged(tmp_path: Path) -> None:
    at_target: list[Both] = []
    with (
        target(lambda sock: at_target.append(Both(sock, seed=2))) as port,
        running_direct_up(tmp_path, f"127.0.0.1:{port}") as (local, up),
        connect(local) as app,
    ):
        at_app = Both(app, seed=1)
        wait_until("the target's end", lambda: len(at_target) == 1)
        assert at_app.received == (MEGABYTES * CHUNK, at_target[0].sent)
        assert at_target[0].received == (MEGABYTES * CHUNK, at_app.sent)
        app.close()
        up.stop()
        total = MEGABYTES * CHUNK
        assert f"1 connections, {total} bytes out, {total} bytes in\n" in up.output()


def test_an_answer_may_follow_the_end_of_the_question(tmp_path: Path) -> None:
    def answer(sock: socket.socket) -> None:
        size, digest = read_digest(sock)
        sock.sendall(f"{size} {digest}".encode())

    with (
        target(answer) as port,
        running_direct_up(tmp_path, f"127.0.0.1:{port}") as (local, _),
        connect(local) as app,
    ):
        digest = send_random(app, seed=3)
        assert app.recv(100).decode() == f"{MEGABYTES * CHUNK} {digest}"
        assert app.recv(100) == b""


def test_resets_are_passed_on_in_both_directions(tmp_path: Path) -> None:
    seen: list[str] = []

    def serve(sock: socket.socket) -> None:
        if sock.recv(5) == b"reset":
            reset_tcp(sock)
            return
        try:
            sock.recv(5)
        except ConnectionResetError:
            seen.append("reset")

    with (
        target(serve) as port,
        running_direct_up(tmp_path, f"127.0.0.1:{port}") as (local, up),
    ):
        with connect(local) as app:
            app.sendall(b"reset")
            with pytest.raises(ConnectionResetError):
                app.recv(5)
        app = connect(local)
        app.sendall(b"hello")
        reset_tcp(app)
        wait_until("the target's reset", lambda: seen == ["reset"])
        up.wait_for_output("a connection was reset")


def test_once_is_one_connection_and_its_outcome(tmp_path: Path) -> None:
    with (
        target(echo) as port,
        running_direct_up(tmp_path, f"127.0.0.1:{port}", "--once") as (local, up),
    ):
        with connect(local) as app:
            app.sendall(b"hello")
            assert app.recv(5) == b"hello"
        assert up.process.wait(DEADLINE_S) == 0
        with pytest.raises(ConnectionRefusedError):
            connect(local)
    with running_direct_up(tmp_path, f"127.0.0.1:{port}", "--once", name="gone") as (local, up):
        with connect(local) as app, pytest.raises(ConnectionResetError):
            app.recv(5)
        assert up.process.wait(DEADLINE_S) == 1
        assert "the target refused the connection" in up.output()


def test_a_denied_target_exits_with_2_and_opens_no_listener(tmp_path: Path) -> None:
    config = tmp_path / "up.toml"
    config.write_text(
        'gateway = "localhost"\n'
        '[[policy.allow]]\ncidr = "127.0.0.0/8"\nports = [1]\nprotocol = "tcp"\n'
    )
    port = free_tcp_port()
    done = run_command(
        *("toppy", "up", "--config", str(config), "--direct"),
        *("--listen", f"127.0.0.1:{port}", "--target", "127.0.0.1:2"),
        env={**os.environ, "TOPPY_AUDIT_LOG": str(tmp_path / "audit.jsonl")},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Policy denied: target 127.0.0.1:2 is not allowed")
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_a_thousand_connections_leave_no_descriptor_behind(tmp_path: Path) -> None:
    with (
        target(echo) as port,
        running_direct_up(tmp_path, f"127.0.0.1:{port}") as (local, up),
    ):
        process = psutil.Process(up.pid)

        def talk(number: int) -> None:
            with connect(local) as app:
                text = b"%4d" % number
                app.sendall(text)
                assert app.recv(4) == text
                if number % 10 == 0:
                    reset_tcp(app)

        talk(1)
        wait_until("the end of the first", lambda: _sockets(process) == 1)
        before = process.num_fds(), process.num_threads()
        for first in range(0, 1000, 100):
            with contextlib.ExitStack() as opened:  # a hundred at once, some half open
                for _ in range(10):
                    opened.enter_context(connect(local))
                for number in range(first, first + 90):
                    talk(number)
        wait_until("the end of all", lambda: _sockets(process) == 1)
        assert process.num_fds() <= before[0]
        assert process.num_threads() == before[1]
        up.stop()
        assert "1001 connections" in up.output()


def _sockets(process: psutil.Process) -> int:
    return len(process.net_connections("tcp"))


def test_a_target_that_does_not_read_stops_the_sender_and_takes_no_memory(tmp_path: Path) -> None:
    may_read = threading.Event()

    def serve(sock: socket.socket) -> None:
        may_read.wait(DEADLINE_S)
        sock.sendall(b"%d" % read_digest(sock)[0])

    with (
        target(serve) as port,
        running_direct_up(tmp_path, f"127.0.0.1:{port}") as (local, up),
    ):
        process = psutil.Process(up.pid)
        with connect(local) as app:
            before = process.memory_info().rss
            sent = _send_until_nothing_goes(app)
            assert process.memory_info().rss < before + (8 << 20)
            # another connection is served meanwhile
            with connect(local) as other:
                other.shutdown(socket.SHUT_WR)
                may_read.set()
                assert other.recv(10) == b"0"
            app.shutdown(socket.SHUT_WR)
            app.setblocking(True)
            assert app.recv(20) == b"%d" % sent


def _send_until_nothing_goes(sock: socket.socket) -> int:
    sock.setblocking(False)
    sent = idle = 0
    while idle < 20:
        try:
            sent += sock.send(bytes(CHUNK))
            idle = 0
        except BlockingIOError:
            idle += 1
            time.sleep(0.01)
    return sent


RATE = 1 << 20
BURST = 64 << 10


def test_no_more_than_rate_and_burst_goes_through(tmp_path: Path) -> None:
    arrived: list[tuple[int, float]] = []

    def serve(sock: socket.socket) -> None:
        size = 0
        while data := sock.recv(CHUNK):
            size += len(data)
            arrived.append((size, time.monotonic()))

    with (
        target(serve) as port,
        running_direct_up(
            tmp_path,
            f"127.0.0.1:{port}",
            extra=f"[rate]\nbytes_per_sec = {RATE}\nburst_bytes = {BURST}\n",
        ) as (local, _),
        connect(local) as app,
    ):
        began = time.monotonic()
        app.sendall(bytes(RATE // 2))
        app.shutdown(socket.SHUT_WR)
        assert app.recv(1) == b""
    assert arrived[-1][0] == RATE // 2
    for size, at in arrived:
        assert size <= BURST + RATE * (at - began)
