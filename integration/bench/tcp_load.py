"""TCP load: a sink, which is every target, and clients of it, each a process.

``python -m integration.bench.tcp_load KIND JSON`` prints one JSON object on standard output; sinks
and idle clients print ``ready`` on standard error and run until they are ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import uvloop

from toppy.system.descriptors import raise_descriptor_limit

_CHUNK = 1 << 20
_DEADLINE_S = 60.0
_BACKLOG = 4096
_ECHO = b"e"
_BULK = b"b"
_EXCHANGE = b"x"
_UPLOAD = b"u"
_TOLD_BYTES: Final = 128 << 10
"""Of an upload, for which the sink sends back a byte."""
_CONTROLS: Final = {"": b"d", "cubic": b"C", "bbr": b"B"}
"""A download, with the congestion control that is usual here or another of the kernel's."""
_AT_ONCE = 32
"""Idle connections that are opened together."""
_zeros: Final = bytes(_CHUNK)


class _Sink(asyncio.BufferedProtocol):
    """One connection. Its first byte says what it wants: to have that byte back, or all that
    follows; to send as much as it can, and to hear how many bytes that were, at the end or all
    the time; or to be sent to.
    """

    buffer: Final = memoryview(bytearray(_CHUNK))

    def __init__(self) -> None:
        self.kind = b""
        self.size = 0
        self._may_send = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self.kind:
            self._begin(bytes(self.buffer[:1]))
            if self.kind == _EXCHANGE:
                self.transport.write(bytes(self.buffer[1:nbytes]))
            nbytes -= 1
        elif self.kind == _EXCHANGE:
            self.transport.write(bytes(self.buffer[:nbytes]))
        before, self.size = self.size, self.size + nbytes
        if self.kind == _UPLOAD:
            more = self.size // _TOLD_BYTES - before // _TOLD_BYTES
            self.transport.write(bytes(more))

    def _begin(self, kind: bytes) -> None:
        self.kind = kind
        if kind == _ECHO:
            self.transport.write(kind)
        for control, wanted in _CONTROLS.items():
            if kind == wanted:
                if control:
                    sock = self.transport.get_extra_info("socket")
                    name = control.encode()
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
                self._send()

    def _send(self) -> None:
        if self._may_send and not self.transport.is_closing():
            self.transport.write(_zeros)
            asyncio.get_running_loop().call_soon(self._send)

    def pause_writing(self) -> None:
        self._may_send = False

    def resume_writing(self) -> None:
        self._may_send = True
        self._send()

    def eof_received(self) -> bool:
        if self.kind == _BULK:
            self.transport.write(self.size.to_bytes(8))
        return False


async def _sink(host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Sink, host, port, backlog=_BACKLOG)
    print("ready", file=sys.stderr, flush=True)
    await server.serve_forever()


def sink(*, host: str, port: int) -> dict[str, float]:
    """Serve until ended."""
    raise_descriptor_limit()
    uvloop.run(_sink(host, port))
    return {}


def generate(*, host: str, port: int, connections: int, seconds: float) -> dict[str, float]:
    """Bytes per second that arrived, over ``connections`` at once, each as fast as it can."""
    arrived = [0] * connections
    data = bytes(_CHUNK)

    def run(index: int) -> None:
        with socket.create_connection((host, port), timeout=_DEADLINE_S) as sock:
            sock.sendall(_BULK)
            while time.perf_counter() - begin < seconds:
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            arrived[index] = int.from_bytes(sock.recv(8, socket.MSG_WAITALL))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(connections)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"bytes": sum(arrived), "seconds": time.perf_counter() - begin}


def connect(*, host: str, port: int, at_once: int, seconds: float) -> dict[str, float]:
    """Connections one after the other, ``at_once`` chains of them: a byte to and fro on each."""
    return uvloop.run(_connect(host, port, at_once, seconds))


async def _connect(host: str, port: int, at_once: int, seconds: float) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    times_us: list[float] = []

    async def run() -> None:
        while (start := time.perf_counter()) - begin < seconds:
            with socket.socket() as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, (host, port))
                await loop.sock_sendall(sock, _ECHO)
                if await loop.sock_recv(sock, 1) != _ECHO:
                    raise ConnectionError("no echo")
            times_us.append((time.perf_counter() - start) * 1e6)

    begin = time.perf_counter()
    async with asyncio.timeout(seconds + _DEADLINE_S):
        await asyncio.gather(*(run() for _ in range(at_once)))
    took_s = time.perf_counter() - begin
    times_us.sort()
    return {
        "connections": len(times_us),
        "seconds": took_s,
        "p50_us": times_us[len(times_us) // 2],
        "p99_us": times_us[len(times_us) * 99 // 100],
    }


def download(
    *, flows: Sequence[tuple[str, int, str]], seconds: float, bin_s: float
) -> dict[str, Any]:
    """What arrives on each flow, to (host, port, congestion control of the sink, or nothing), for
    ``seconds``: bytes per second, for each ``bin_s``. Counted from when all flows are under way.
    """
    buffer = bytearray(_CHUNK)

    def move(sock: socket.socket, mask: int) -> int:
        del mask
        size = sock.recv_into(buffer)
        if not size:
            raise ConnectionError("a download ended before its time")
        return size

    starts = [(host, port, _CONTROLS[control]) for host, port, control in flows]
    return _move(starts, selectors.EVENT_READ, move, seconds, bin_s)


def upload(
    *, flows: Sequence[tuple[str, int, str]], seconds: float, bin_s: float
) -> dict[str, Any]:
    """The same the other way; it counts when the sink has told of it."""

    def move(sock: socket.socket, mask: int) -> int:
        if mask & selectors.EVENT_WRITE:
            with contextlib.suppress(BlockingIOError):
                sock.send(_zeros)
        if not mask & selectors.EVENT_READ:
            return 0
        told = sock.recv(_CHUNK)
        if not told:
            raise ConnectionError("an upload ended before its time")
        return len(told) * _TOLD_BYTES

    starts = [(host, port, _UPLOAD) for host, port, _ in flows]
    both = selectors.EVENT_READ | selectors.EVENT_WRITE
    return _move(starts, both, move, seconds, bin_s)


def _move(
    starts: Sequence[tuple[str, int, bytes]],
    events: int,
    move: Callable[[socket.socket, int], int],
    seconds: float,
    bin_s: float,
) -> dict[str, Any]:
    """Connect to each (host, port), say what is wanted there, and ``move`` bytes: how many each
    moved per second, for each bin, once all have moved some; and how many they moved altogether.
    """
    bins = [[0.0] * round(seconds / bin_s) for _ in starts]
    length_s = len(bins[0]) * bin_s
    waiting = set(range(len(starts)))
    total = 0
    begin, end = float("inf"), time.perf_counter() + _DEADLINE_S
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for index, (host, port, kind) in enumerate(starts):
            sock = socket.create_connection((host, port), timeout=_DEADLINE_S)
            stack.callback(sock.close)
            sock.sendall(kind)
            sock.setblocking(False)
            selector.register(sock, events, index)
        while (now := time.perf_counter()) < end:
            for key, mask in selector.select(end - now):
                size = move(cast(socket.socket, key.fileobj), mask)
                total += size
                if waiting:
                    if size:
                        waiting.discard(key.data)
                    if not waiting:
                        begin = time.perf_counter()
                        end = begin + length_s
                    continue
                place = int((time.perf_counter() - begin) / bin_s)
                if place < len(bins[key.data]):
                    bins[key.data][place] += size / bin_s
    if waiting:
        raise TimeoutError(f"{len(waiting)} flows moved nothing")
    return {"bytes_per_s": bins, "bytes": total}


def exchange(*, host: str, port: int, at_once: int, size: int, seconds: float) -> dict[str, float]:
    """``size`` bytes there and back, again and again, on ``at_once`` connections."""
    return uvloop.run(_exchange(host, port, at_once, size, seconds))


async def _exchange(
    host: str, port: int, at_once: int, size: int, seconds: float
) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    payload = bytes(size)
    times_us: list[float] = []

    async def connected() -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, (host, port))
        await loop.sock_sendall(sock, _EXCHANGE)
        await once(sock)
        return sock

    async def once(sock: socket.socket) -> None:
        await loop.sock_sendall(sock, payload)
        missing = size
        while missing:
            data = await loop.sock_recv(sock, missing)
            if not data:
                raise ConnectionError("an exchange ended before its time")
            missing -= len(data)

    async def run(sock: socket.socket) -> None:
        while (start := time.perf_counter()) - begin < seconds:
            await once(sock)
            times_us.append((time.perf_counter() - start) * 1e6)

    async with asyncio.timeout(seconds + _DEADLINE_S):
        socks = await asyncio.gather(*(connected() for _ in range(at_once)))
        begin = time.perf_counter()
        await asyncio.gather(*map(run, socks))
        took_s = time.perf_counter() - begin
    for sock in socks:
        sock.close()
    times_us.sort()
    return {
        "exchanges": len(times_us),
        "seconds": took_s,
        "p50_us": times_us[len(times_us) // 2],
        "p99_us": times_us[len(times_us) * 99 // 100],
    }


def idle(*, host: str, port: int, connections: int) -> dict[str, float]:
    """Open connections that carry one byte to and fro each, and keep them until ended."""
    raise_descriptor_limit()
    socks: list[socket.socket] = []
    while len(socks) < connections:
        new = [
            socket.create_connection((host, port), timeout=_DEADLINE_S)
            for _ in range(min(_AT_ONCE, connections - len(socks)))
        ]
        for sock in new:
            sock.sendall(_ECHO)
        for sock in new:
            if sock.recv(1) != _ECHO:
                raise ConnectionError("no echo")
        socks += new
    print("ready", file=sys.stderr, flush=True)
    signal.pause()
    return {"connections": len(socks)}


def pace(*, host: str, port: int, target_port: int, skip: int, seconds: float) -> dict[str, float]:
    """The rate at which bytes arrive over ``seconds``, once ``skip`` bytes, the burst, have. It is
    sender and target at once.
    """
    with socket.create_server((host, target_port)) as listener:
        near = socket.create_connection((host, port), timeout=_DEADLINE_S)
        far, _ = listener.accept()
    stopping = threading.Event()

    def send() -> None:
        data = bytes(64 << 10)
        try:
            while not stopping.is_set():
                near.sendall(data)
        except OSError:
            return

    sending = threading.Thread(target=send)
    sending.start()
    buffer, size = bytearray(_CHUNK), 0
    while size <= skip:
        size += far.recv_into(buffer)
    first, begin = size, time.perf_counter()
    while (now := time.perf_counter()) - begin < seconds:
        last = (size, now)
        size += far.recv_into(buffer)
    stopping.set()
    far.close()
    near.close()
    sending.join()
    return {"bytes": last[0] - first, "seconds": last[1] - begin}


_KINDS: Mapping[str, Callable[..., Mapping[str, Any]]] = {
    "sink": sink,
    "generate": generate,
    "download": download,
    "upload": upload,
    "connect": connect,
    "exchange": exchange,
    "idle": idle,
    "pace": pace,
}


def start_tcp_load(
    kind: str, *, prefix: Sequence[str] = (), **options: Any
) -> subprocess.Popen[str]:
    """A load process. Its result is one JSON object on standard output. ``prefix``: a command that
    runs it, in another namespace maybe.
    """
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", __name__, kind, json.dumps(options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    print(json.dumps(_KINDS[sys.argv[1]](**json.loads(sys.argv[2]))))
