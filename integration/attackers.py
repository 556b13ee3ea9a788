"""Hostile clients, and the honest one beside them that must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import psutil
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from integration.conftest import Peer
from integration.masque_client import Tunnel, connected_engine, open_tunnel
from integration.processes import Gateway
from toppy.wire.connection_id import encode_prefix

MAX_GROWTH_BYTES = 96 << 20
"""How much larger a worker may become under any attack: its queues and windows, not more."""


def worker_pids(gateway: Gateway) -> list[int]:
    return [worker["pid"] for worker in gateway.status()["workers"]]


def worker_rss(gateway: Gateway) -> int:
    """Resident memory of the largest worker, in bytes."""
    return max(psutil.Process(pid).memory_info().rss for pid in worker_pids(gateway))


@dataclass
class Witness:
    """What the honest client saw."""

    echoes: int = 0
    peak_rss: int = 0
    tunnel: Tunnel | None = field(default=None, repr=False)


@contextlib.asynccontextmanager
async def witness(gateway: Gateway, echo: Peer) -> AsyncIterator[Witness]:
    """An honest client that gets its echoes before, while and after the block runs; and a gateway
    that stays whole, healthy and small.
    """
    workers, rss = worker_pids(gateway), worker_rss(gateway)
    seen = Witness(peak_rss=rss)
    done = asyncio.Event()

    async def watch(tunnel: Tunnel) -> None:
        while not done.is_set():
            await tunnel.echo(b"echo %d" % seen.echoes)
            seen.echoes += 1
            seen.peak_rss = max(seen.peak_rss, await asyncio.to_thread(worker_rss, gateway))
            await asyncio.sleep(0.05)

    async with connected_engine(gateway) as client:
        seen.tunnel = await open_tunnel(client, echo.host, echo.port)
        await seen.tunnel.echo(b"before")
        watching = asyncio.create_task(watch(seen.tunnel))
        try:
            yield seen
        finally:
            done.set()
            await watching
        await seen.tunnel.echo(b"after")
    async with connected_engine(gateway) as newcomer:
        await (await open_tunnel(newcomer, echo.host, echo.port)).echo(b"a new connection")
    assert seen.echoes
    assert await asyncio.to_thread(worker_pids, gateway) == workers, "a worker died"
    assert (await asyncio.to_thread(gateway.healthz)).status_code == 200
    grown = seen.peak_rss - rss
    assert grown < MAX_GROWTH_BYTES, f"a worker grew by {grown >> 20} MiB"


def initial_packet() -> bytes:
    """A client's first packet, well made."""
    quic = QuicConnection(
        configuration=QuicConfiguration(
            is_client=True, alpn_protocols=["h3"], server_name="localhost"
        )
    )
    quic.connect(("127.0.0.1", 1), 0.0)
    return quic.datagrams_to_send(0.0)[0][0]


def garbage(count: int, seed: int = 1) -> Iterator[bytes]:
    """Datagrams of many kinds: noise, headers of QUIC followed by noise, packets with errors."""
    chance = random.Random(seed)
    initials = [initial_packet() for _ in range(8)]
    version_1 = (1).to_bytes(4)
    for number in range(count):
        noise = chance.randbytes(chance.choice((0, 1, 20, 60, 300, 1200, 1400)))
        kind = number % 8
        if kind == 0:  # a short header for one of our connection IDs
            slot = chance.randrange(4)
            yield bytes((0x40 | chance.randrange(64),)) + encode_prefix(slot, 1) + noise
        elif kind == 1:  # a long header of version 1 with connection IDs of any length
            first = bytes((0xC0 | chance.randrange(64),))
            yield first + version_1 + bytes((chance.randrange(256),)) + noise
        elif kind == 2:  # a version that nobody speaks
            yield bytes((0xC0 | chance.randrange(64),)) + chance.randbytes(4) + b"\x08" + noise
        elif kind == 3:  # an Initial packet with wrong bytes
            broken = bytearray(chance.choice(initials))
            for _ in range(chance.randrange(1, 8)):
                broken[chance.randrange(len(broken))] = chance.randrange(256)
            yield bytes(broken)
        elif kind == 4:  # cut
            whole = chance.choice(initials)
            yield whole[: chance.randrange(len(whole))]
        else:
            yield noise


def send_garbage(gateway: Gateway, count: int) -> None:
    """``count`` datagrams of ``garbage``, from a few source ports, as fast as they go."""
    family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(8)]
        for sock in sockets:
            sock.connect((gateway.host, gateway.port))
        for number, datagram in enumerate(garbage(count)):
            with contextlib.suppress(ConnectionError, BlockingIOError):
                sockets[number % 8].send(datagram)
            if number % 512 == 511:
                time.sleep(0.001)  # the machine's other half belongs to the gateway


@dataclass
class HalfOpen:
    """Handshakes that were begun and never continued."""

    sent_bytes: int = 0
    received_bytes: int = 0


async def half_open(gateway: Gateway, count: int, linger_s: float) -> HalfOpen:
    """Begin ``count`` handshakes, then only listen for ``linger_s`` seconds."""
    counts = HalfOpen()
    loop = asyncio.get_running_loop()

    class Listener(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
            counts.received_bytes += len(data)

    transport, _ = await loop.create_datagram_endpoint(
        Listener, remote_addr=(gateway.host, gateway.port)
    )
    try:
        for number in range(count):
            packet = initial_packet()
            transport.sendto(packet)
            counts.sent_bytes += len(packet)
            if number % 10 == 9:
                await asyncio.sleep(0.005)
        await asyncio.sleep(linger_s)
    finally:
        transport.close()
    return counts
