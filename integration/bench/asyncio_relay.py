"""A UDP relay as one writes it with plain asyncio: a datagram endpoint per client, a Python call
per datagram, default socket buffers. No encryption, no policy: it is there to be compared with.

``python -m integration.bench.asyncio_relay LISTEN_HOST LISTEN_PORT TARGET_HOST TARGET_PORT``
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import Any, cast

READY = "asyncio relay ready"
MOST_CLIENTS = 4096
"""One more, and the oldest is forgotten."""


class _Upstream(asyncio.DatagramProtocol):
    """The socket that one client's datagrams leave from; answers go back to that client."""

    def __init__(self, listening: asyncio.DatagramTransport, client: tuple[Any, ...]) -> None:
        self._listening = listening
        self._client = client

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        del addr  # the socket is connected: it is the target's
        self._listening.sendto(data, self._client)

    def error_received(self, exc: Exception) -> None:
        """The target is not there (yet)."""


class _Listening(asyncio.DatagramProtocol):
    """The socket that the clients send to."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._upstreams: dict[tuple[Any, ...], asyncio.DatagramTransport] = {}
        self._held: dict[tuple[Any, ...], list[bytes]] = {}
        """What came while the client's upstream socket was being made."""
        self._making: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # no isinstance: asyncio's own are no DatagramTransport in Python 3.11
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        upstream = self._upstreams.get(addr)
        if upstream is not None:
            upstream.sendto(data)
        elif addr in self._held:
            if len(self._held[addr]) < 64:
                self._held[addr].append(data)
        else:
            self._held[addr] = [data]
            task = asyncio.get_running_loop().create_task(self._make_upstream(addr))
            self._making.add(task)
            task.add_done_callback(self._making.discard)

    async def _make_upstream(self, client: tuple[Any, ...]) -> None:
        try:
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Upstream(self._transport, client), remote_addr=self._target
            )
        finally:
            held = self._held.pop(client)
        while len(self._upstreams) >= MOST_CLIENTS:
            self._upstreams.pop(next(iter(self._upstreams))).close()
        self._upstreams[client] = transport
        for data in held:
            transport.sendto(data)


async def run(listen: tuple[str, int], target: tuple[str, int]) -> None:
    """Relay until cancelled."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET
    await loop.create_datagram_endpoint(
        lambda: _Listening(target), local_addr=listen, family=family
    )
    print(READY, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Entry point of the relay's process."""
    listen_host, listen_port, target_host, target_port = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run((listen_host, int(listen_port)), (target_host, int(target_port))))


if __name__ == "__main__":
    main()
