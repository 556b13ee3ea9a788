"""``toppy up`` and ``toppy proxy`` as processes, and what talks through them."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import threading
from collections.abc import Callable, Iterator

from integration.processes import (
    BIN,
    UNLIMITED,
    Gateway,
    Running,
    free_tcp_port,
    start,
    write_client_config,
)
from integration.test_up import DEADLINE_S, connect

CHUNK = 1 << 20


@contextlib.contextmanager
def running_up(
    gateway: Gateway,
    target: str,
    *options: str,
    engine: str = "auto",
    extra: str = UNLIMITED,
    name: str = "up",
) -> Iterator[tuple[int, Running]]:
    """``toppy up`` to a target behind the gateway: its local port, and the process."""
    config = write_client_config(
        gateway, gateway.directory / f"{name}.toml", engine=engine, extra=extra
    )
    port = free_tcp_port()
    running = start(
        [
            *(BIN / "toppy", "up", "--config", config),
            *("--listen", f"127.0.0.1:{port}", "--target", target, *options),
        ],
        gateway.directory / f"{name}.log",
    )
    try:
        running.wait_for_output("toppy up listening on")
        yield port, running
    finally:
        running.stop()


@contextlib.contextmanager
def running_proxy(
    gateway: Gateway,
    *,
    engine: str = "auto",
    extra: str = "",
    environ: dict[str, str] | None = None,
    name: str = "proxy",
) -> Iterator[tuple[int, Running]]:
    """``toppy proxy``: its local port, and the process. ``extra`` is TOML of its configuration."""
    config = write_client_config(
        gateway, gateway.directory / f"{name}.toml", engine=engine, extra=extra
    )
    port = free_tcp_port()
    running = start(
        [BIN / "toppy", "proxy", "--config", config, "--listen", f"127.0.0.1:{port}"],
        gateway.directory / f"{name}.log",
        environ,
    )
    try:
        running.wait_for_output("toppy proxy listening on")
        yield port, running
    finally:
        running.stop()


class Pieces:
    """Random bytes that both ends know by their seed; the sender waits in the middle."""

    def __init__(self, seed: int, chunks: int) -> None:
        self._seed = seed
        self._chunks = chunks
        self.size = chunks * CHUNK
        self.is_half_sent = threading.Event()
        self.may_go_on = threading.Event()

    def send(self, sock: socket.socket) -> None:
        """Send all, and end."""
        generator = random.Random(self._seed)
        for number in range(self._chunks):
            if number == self._chunks // 2:
                self.is_half_sent.set()
                assert self.may_go_on.wait(DEADLINE_S)
            sock.sendall(generator.randbytes(CHUNK))
        sock.shutdown(socket.SHUT_WR)

    @property
    def digest(self) -> str:
        generator, digest = random.Random(self._seed), hashlib.sha256()
        for _ in range(self._chunks):
            digest.update(generator.randbytes(CHUNK))
        return digest.hexdigest()


def in_thread(action: Callable[[], None]) -> threading.Thread:
    """Start it; ``join`` waits for its end."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def ask(port: int, text: bytes) -> bytes:
    """Say something, end, and read to the end."""
    with connect(port) as sock:
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while data := sock.recv(CHUNK):
            answer += data
        return answer
