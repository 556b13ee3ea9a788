"""What tunnels leave behind, and whether every datagram is accounted for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

import psutil
import pytest

from integration.attackers import worker_pids, worker_rss
from integration.conftest import Peer, each_engine, wait_until_left
from integration.masque_client import (
    DEADLINE_S,
    Tunnel,
    connected,
    connected_engine,
    open_tunnel,
    run,
)
from integration.processes import Gateway, running_gateway

IDLE_TIMEOUT_S = 5
COUNT = 5000


@pytest.fixture(scope="module", params=each_engine("resources"))
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with running_gateway(
        tmp_path_factory.mktemp("gw"),
        engine=request.param,
        extra=f"""
idle_timeout_s = {IDLE_TIMEOUT_S}
[limits]
tunnel_queue_bytes = 65536
""",
    ) as running:
        yield running


def descriptors(gateway: Gateway) -> int:
    return sum(psutil.Process(pid).num_fds() for pid in worker_pids(gateway))


async def come_and_go(gateway: Gateway, echo: Peer, count: int) -> None:
    """Connections with two tunnels each, used and closed, a few at once."""

    async def visit() -> None:
        async with connected(gateway) as client:
            tunnels = [await open_tunnel(client, echo.host, echo.port) for _ in range(2)]
            for tunnel in tunnels:
                await tunnel.echo(bytes(1000))
            tunnels[0].end()

    for _ in range(count // 10):
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(visit())


def test_two_hundred_connections_leave_no_descriptor_and_no_memory_behind(
    gateway: Gateway, echo: Peer
) -> None:
    before = gateway.metric("toppy_gw_connections_total")
    run(come_and_go(gateway, echo, 50))
    wait_until_left(gateway, before + 50)
    fds, rss = descriptors(gateway), worker_rss(gateway)
    run(come_and_go(gateway, echo, 200))
    wait_until_left(gateway, before + 250)
    assert descriptors(gateway) <= fds
    assert worker_rss(gateway) - rss < 16 << 20


def test_clients_that_vanish_are_forgotten_with_their_tunnels(gateway: Gateway, echo: Peer) -> None:
    fds, before = descriptors(gateway), gateway.metric("toppy_gw_connections_total")

    async def vanish() -> None:
        for _ in range(20):
            async with connected_engine(gateway) as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                await tunnel.echo(b"and gone")
                client.close = _nothing  # type: ignore[method-assign]
                client.driver.close()
                client.socket.close()

    run(vanish())
    wait_until_left(gateway, before + 20)
    assert descriptors(gateway) <= fds


def _nothing() -> None:
    pass


class Counts:
    """How metrics change."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._before = gateway.metrics()
        self._connections = gateway.metric("toppy_gw_connections_total")

    def wait_until_left(self, connections: int) -> None:
        """Until so many connections have come and gone."""
        wait_until_left(self._gateway, self._connections + connections)

    def change(self, name: str, **labels: str) -> int:
        """By how much a metric's samples with these labels grew."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return int(
            sum(
                value - self._before.get(sample, 0)
                for sample, value in self._gateway.metrics().items()
                if sample.partition("{")[0] == f"toppy_gw_{name}_total"
                and all(w in sample for w in wanted)
            )
        )


def test_counters_are_exact_when_everything_arrives(gateway: Gateway, echo: Peer) -> None:
    counts = Counts(gateway)

    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            for _ in range(COUNT // 50):
                tunnel.send_many([bytes(1000)] * 50)
                for _ in range(50):
                    await tunnel.receive()

    run(scenario())
    counts.wait_until_left(1)
    for direction in ("to_target", "to_client"):
        assert counts.change("datagrams", direction=direction) == COUNT
        assert counts.change("bytes", direction=direction) == COUNT * 1000
    assert counts.change("datagrams_dropped") == 0
    assert counts.change("tunnels") == counts.change("admissions", outcome="granted") == 1
    assert counts.change("connections") == counts.change("handshakes", outcome="completed") == 1


def test_every_datagram_to_a_target_is_delivered_or_counted_as_dropped(gateway: Gateway) -> None:
    counts = Counts(gateway)

    async def scenario() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
            target.bind(("127.0.0.1", 0))
            target.setblocking(False)
            async with connected_engine(gateway) as client:
                tunnel = await open_tunnel(client, *target.getsockname())
                received = 0
                for _ in range(COUNT // 50):
                    tunnel.send_many([bytes(1100)] * 50)
                    await asyncio.sleep(0.002)
                    received += drain(target)
                end = time.monotonic() + 5.0
                while received < COUNT and time.monotonic() < end:
                    await asyncio.sleep(0.05)
                    received += drain(target)
                return received + sum(client.engine.take_drops().values())

    # QUIC over loopback loses nothing; what is missing was dropped by somebody who counts
    delivered = run(scenario())
    counts.wait_until_left(1)
    assert delivered + counts.change("datagrams_dropped") == COUNT


def drain(sock: socket.socket) -> int:
    """Take what waits; how many datagrams that were."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.recv(65535)
            count += 1
    return count


def test_every_datagram_to_a_client_is_delivered_or_counted_as_dropped(gateway: Gateway) -> None:
    counts = Counts(gateway)

    async def scenario() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.bind(("127.0.0.1", 0))
            target.settimeout(DEADLINE_S)
            async with connected_engine(gateway) as client:
                tunnel = await open_tunnel(client, *target.getsockname())
                tunnel.send(b"?")
                _, source = await asyncio.to_thread(target.recvfrom, 100)
                for _ in range(COUNT // 250):
                    for _ in range(250):  # four times what the tunnel's queue may hold
                        target.sendto(bytes(1100), source)
                    await asyncio.sleep(0.02)
                return await collect(tunnel, 1.0)

    delivered = run(scenario())
    counts.wait_until_left(1)
    # on a busy machine the worker may read too slowly as well
    lost_by_kernel = counts.change("datagrams_dropped", reason="target_overflow")
    dropped = counts.change("datagrams_dropped", reason="queue_full")
    assert counts.change("datagrams_dropped") == dropped + lost_by_kernel
    assert counts.change("datagrams", direction="to_client") == COUNT - lost_by_kernel
    assert delivered + dropped == COUNT - lost_by_kernel


async def collect(tunnel: Tunnel, quiet_s: float) -> int:
    """Count payloads until none comes for a while."""
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            await tunnel.receive(quiet_s)
            count += 1
    return count
