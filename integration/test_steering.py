"""Two workers behind one port: every packet reaches the worker that owns its connection."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator

import pytest

from integration.conftest import Peer, each_engine
from integration.masque_client import CLIENTS, connected, open_tunnel, run
from integration.processes import Gateway, running_gateway, wait_until

CONNECTIONS = 16


@pytest.fixture(scope="module", params=each_engine("steering"))
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gw"), workers=2, engine=request.param) as running:
        if not running.status()["steered"]:
            pytest.skip("this kernel does not steer packets (no SO_ATTACH_REUSEPORT_CBPF)")
        yield running


class Nat:
    """A home router: forwards one client's packets from a port of its own, until it forgets."""

    def __init__(self, gateway: Gateway) -> None:
        self._inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._inside.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._inside.getsockname()
        self._gateway = (gateway.host, gateway.port)
        self._client: tuple[str, int] | None = None
        self._bindings: list[socket.socket] = []
        self._outside = self._open_outside()
        self._is_closing = False
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def _open_outside(self) -> socket.socket:
        outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        outside.connect(self._gateway)
        self._bindings.append(outside)
        return outside

    def rebind(self) -> None:
        """Forget the binding: the gateway sees the client at a new port from now on."""
        self._outside = self._open_outside()

    def close(self) -> None:
        self._is_closing = True
        self._thread.join(5)
        for sock in (self._inside, *self._bindings):
            sock.close()

    def _forward(self) -> None:
        outside = self._outside
        with selectors.DefaultSelector() as ready:
            ready.register(self._inside, selectors.EVENT_READ)
            ready.register(outside, selectors.EVENT_READ)
            while not self._is_closing:
                if outside is not self._outside:
                    ready.unregister(outside)
                    outside = self._outside
                    ready.register(outside, selectors.EVENT_READ)
                for key, _ in ready.select(0.02):
                    with contextlib.suppress(ConnectionError):
                        self._pass_on(key.fileobj is self._inside, outside)

    def _pass_on(self, is_outward: bool, outside: socket.socket) -> None:
        if is_outward:
            data, self._client = self._inside.recvfrom(65535)
            outside.send(data)
        elif self._client is not None:
            self._inside.sendto(outside.recv(65535), self._client)


def test_both_workers_get_connections_and_serve_them(gateway: Gateway, echo: Peer) -> None:
    async def talk(all_talk: asyncio.Barrier) -> None:
        async with connected(gateway) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            await all_talk.wait()
            for number in range(20):
                await tunnel.echo(b"%d" % number)
            await all_talk.wait()

    def is_counted() -> bool:
        counts: list[int] = [worker["connections"] for worker in gateway.status()["workers"]]
        return sum(counts) >= CONNECTIONS and min(counts) > 0

    async def scenario() -> None:
        all_talk = asyncio.Barrier(CONNECTIONS + 1)
        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(talk(all_talk))
            await all_talk.wait()
            await asyncio.to_thread(wait_until, "both workers busy", is_counted)
            await all_talk.wait()

    run(scenario())


@pytest.mark.parametrize("kind", CLIENTS)
def test_connections_survive_a_nat_that_gives_them_new_ports(
    gateway: Gateway, kind: str, echo: Peer
) -> None:
    async def talk() -> None:
        nat = Nat(gateway)
        try:
            async with connected(gateway, kind, address=nat.address) as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                for number in range(6):
                    await tunnel.echo(b"from port number %d" % number)
                    nat.rebind()
                    await asyncio.sleep(0.05)
                assert not client.closed.done()
        finally:
            await asyncio.to_thread(nat.close)

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(6):  # some on each worker
                group.create_task(talk())

    before = gateway.status()["worker_deaths"]
    run(scenario())
    assert gateway.status()["worker_deaths"] == before == 0
