"""TCP tunnels for tests, on any of ``masque_client``'s clients, in both framings.

Written apart from toppy's own client: capsules are made and read by hand here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum

from aioquic._buffer import Buffer, BufferReadError
from aioquic.buffer import encode_uint_var

from integration.masque_client import DEADLINE_S, Client, ClosedError, Tunnel

DATA = 0x2028D7F2
FINAL_DATA = 0x2028D7F3
WRAP_UP = 0x272DDA5E
TUNNEL_CLOSED = 0x1A709941
H3_CONNECT_ERROR = 0x10F


class Way(Enum):
    """How a tunnel is asked for."""

    CAPSULES = "connect-tcp"
    CLASSIC = "connect"


def capsule(capsule_type: int, value: bytes = b"", *, length: int | None = None) -> bytes:
    """One capsule; ``length`` is what it says of itself."""
    size = len(value) if length is None else length
    return encode_uint_var(capsule_type) + encode_uint_var(size) + value


class TcpTunnel(Tunnel):
    """What came through, and how it ended."""

    def __init__(self, client: Client, stream_id: int, way: Way) -> None:
        super().__init__(client, stream_id)
        self.way = way
        self.received = bytearray()
        self.has_finished = False
        """The target has sent everything (FIN)."""
        self.notices: dict[int, bytes] = {}
        """Other capsules, by type."""
        self.ended_because = ""
        self._has_sent_all = False
        self._unread = b""
        self._news = asyncio.Event()

    @property
    def is_answered(self) -> bool:
        """Whether the gateway has said something."""
        return self._answer.done()

    def send(self, payload: bytes) -> None:
        """Payload to the target."""
        body = payload if self.way is Way.CLASSIC else capsule(DATA, payload)
        self.client.send_body(self.stream_id, body)

    def finish(self) -> None:
        """FIN to the target."""
        if self.way is Way.CLASSIC:
            self.client.send_body(self.stream_id, b"", end=True)
        else:
            self._has_sent_all = True
            self.client.send_body(self.stream_id, capsule(FINAL_DATA), end=self.has_finished)

    def reset(self) -> None:
        """RST to the target."""
        self.client.abort(self.stream_id, H3_CONNECT_ERROR)

    def raw(self, *parts: bytes, end: bool = False) -> None:
        """Any bytes on the stream."""
        self.client.send_body(self.stream_id, b"".join(parts), end=end)

    async def read(self, size: int) -> bytes:
        """The next ``size`` bytes; ``ClosedError`` when the tunnel ends before."""
        await self._until(lambda: len(self.received) >= size)
        taken = bytes(self.received[:size])
        del self.received[:size]
        return taken

    async def read_to_end(self) -> bytes:
        """Everything up to the target's FIN; ``ClosedError`` when the tunnel ends otherwise."""
        await self._until(lambda: self.has_finished)
        return bytes(self.received)

    async def ending(self) -> str:
        """How the stream ended."""
        async with asyncio.timeout(DEADLINE_S):
            await self.has_ended.wait()
        return self.ended_because

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                if self.has_ended.is_set():
                    raise ClosedError(f"the tunnel ended: {self.ended_because}")
                self._news.clear()
                await self._news.wait()

    # called by the client

    def received_headers(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Interim answers come to strangers, too."""
        status = dict(headers)[b":status"]
        if not status.startswith(b"1"):
            super().received_headers(headers)
        else:
            self.notices[int(status)] = b""

    def received_body(self, data: bytes) -> None:
        """Bytes of the stream."""
        if self.way is Way.CLASSIC:
            self.received += data
        else:
            had_finished = self.has_finished
            self._read_capsules(self._unread + data)
            if self._has_sent_all and self.has_finished and not had_finished:
                self.client.send_body(self.stream_id, b"", end=True)
        self._news.set()

    def _read_capsules(self, data: bytes) -> None:
        buffer = Buffer(data=data)
        start = 0
        try:
            while not buffer.eof():
                kind = buffer.pull_uint_var()
                value = buffer.pull_bytes(buffer.pull_uint_var())
                start = buffer.tell()
                if kind in (DATA, FINAL_DATA):
                    assert not self.has_finished
                    self.received += value
                    self.has_finished = kind == FINAL_DATA
                else:
                    self.notices[kind] = value
        except BufferReadError:
            pass  # the rest is on its way
        self._unread = data[start:]

    def ended(self, reason: str) -> None:
        """The stream is over."""
        self.ended_because = self.ended_because or reason
        if self.way is Way.CLASSIC and reason == "the response ended":
            self.has_finished = True
        super().ended(reason)
        self._news.set()


def tcp_headers(
    client: Client, way: Way, host: str, port: int, *, token: str | None, expects: bool = False
) -> list[tuple[bytes, bytes]]:
    """A request for a tunnel to ``host`` and ``port``."""
    shown = f"[{host}]" if ":" in host else host
    if way is Way.CLASSIC:
        headers = [(b":method", b"CONNECT"), (b":authority", f"{shown}:{port}".encode())]
        name = b"proxy-authorization"
    else:
        escaped = host.replace(":", "%3A")
        headers = [
            (b":method", b"CONNECT"),
            (b":protocol", b"connect-tcp"),
            (b":scheme", b"https"),
            (b":authority", client.authority.encode()),
            (b":path", f"/.well-known/masque/tcp/{escaped}/{port}/".encode()),
            (b"capsule-protocol", b"?1"),
        ]
        name = b"authorization"
    if token is not None:
        headers.append((name, f"Bearer {token}".encode()))
    if expects:
        headers.append((b"expect", b"100-continue"))
    return headers


def ask_tcp(
    client: Client,
    way: Way,
    host: str,
    port: int,
    *,
    token: str | None = "",
    expects: bool = False,
) -> TcpTunnel:
    """Request a tunnel without waiting; ``token`` "" means the good one, None sends none."""
    credential = client.token if token == "" else token
    headers = tcp_headers(client, way, host, port, token=credential, expects=expects)
    plain = client.request(headers)
    tunnel = TcpTunnel(client, plain.stream_id, way)
    client.tunnels[plain.stream_id] = tunnel
    if plain.has_ended.is_set():
        tunnel.ended("the connection is gone")
    return tunnel


async def open_tcp(client: Client, way: Way, host: str, port: int) -> TcpTunnel:
    """A tunnel that the gateway granted, and whose target it has reached."""
    tunnel = ask_tcp(client, way, host, port)
    answer = await tunnel.answer()
    assert answer.status == 200, answer
    return tunnel
