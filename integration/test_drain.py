"""Draining: who stays, who is moved on, and who is closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from integration.conftest import ENGINES, Peer, wait_for_metric
from integration.masque_client import (
    CLIENTS,
    Client,
    ClosedError,
    Stranger,
    Tunnel,
    ask,
    connected,
    connected_engine,
    open_tunnel,
    run,
)
from integration.operation import (
    change_config,
    echo_on_new_connection,
    gateway_log,
    generations,
    operate,
    operate_meanwhile,
    try_operation,
    wait_for_generations,
    worker_pids,
)
from integration.processes import (
    Gateway,
    running_gateway,
    running_udp_client,
    wait_until,
)

TUNNELS = 100
PER_CONNECTION = 25


class LocalPeers:
    """Applications behind ``toppy udp``, each with a tunnel of its own."""

    def __init__(self, port: int, count: int) -> None:
        self._sockets = []
        for _ in range(count):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.connect(("127.0.0.1", port))
            sock.settimeout(2.0)
            self._sockets.append(sock)

    def echo(self, payload: bytes) -> None:
        """Every one gets its own answer; like any UDP application, asks again."""
        for sock in self._sockets:
            sock.send(payload)
        for sock in self._sockets:
            for _ in range(5):
                try:
                    while sock.recv(65535) != payload:
                        pass  # a late answer
                    break
                except TimeoutError:
                    sock.send(payload)
            else:
                raise AssertionError(f"no echo of {payload!r}")

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


@contextlib.asynccontextmanager
async def strangers(gateway: Gateway, echo: Peer, count: int) -> AsyncIterator[list[Tunnel]]:
    """Tunnels of clients that know nothing of GOAWAY and stay where they are."""
    async with contextlib.AsyncExitStack() as stack:
        tunnels: list[Tunnel] = []
        for _ in range(count // PER_CONNECTION):
            client = await stack.enter_async_context(connected(gateway, "stranger"))
            tunnels += [
                await open_tunnel(client, echo.host, echo.port) for _ in range(PER_CONNECTION)
            ]
        yield tunnels


async def all_echo(tunnels: Sequence[Tunnel], payload: bytes) -> None:
    async with asyncio.TaskGroup() as group:
        for tunnel in tunnels:
            group.create_task(tunnel.echo(payload))


def tunnels_by_generation(gateway: Gateway) -> dict[int, int]:
    """How many each generation has open."""
    found: dict[int, int] = {}
    for tunnel in gateway.ask("GET", "/tunnels")["tunnels"]:
        generation = int(tunnel["name"].partition("c")[0].partition("g")[2])
        found[generation] = found.get(generation, 0) + 1
    return found


def test_two_hundred_tunnels_live_through_reloads_as_long_as_they_may(
    directory: Path, echo: Peer
) -> None:
    extra = "[reload]\ndrain_timeout_s = 0\n"
    with (
        running_gateway(directory, workers=2, extra=extra) as gateway,
        running_udp_client(gateway, f"{echo.host}:{echo.port}") as (port, _),
    ):
        local = LocalPeers(port, TUNNELS)

        async def scenario() -> None:
            async with strangers(gateway, echo, TUNNELS) as oldest:
                await asyncio.to_thread(local.echo, b"before")
                assert tunnels_by_generation(gateway) == {1: 2 * TUNNELS}
                # without a timeout: ours move, the strangers stay
                await operate_meanwhile(gateway, "reload")
                await all_echo(oldest, b"in the first generation")
                await asyncio.to_thread(local.echo, b"in the second generation")
                await asyncio.to_thread(
                    wait_until,
                    "our client's move",
                    lambda: tunnels_by_generation(gateway) == {1: TUNNELS, 2: TUNNELS},
                )
                async with strangers(gateway, echo, TUNNELS) as newer:
                    # with one: those that stay are closed after it, and only those
                    change_config(gateway, "drain_timeout_s = 0", "drain_timeout_s = 2")
                    began = time.monotonic()
                    await operate_meanwhile(gateway, "reload")
                    async with asyncio.timeout(30):
                        for tunnel in newer:
                            await tunnel.has_ended.wait()
                    assert time.monotonic() - began >= 2
                    await all_echo(oldest, b"still in the first generation")
                    await asyncio.to_thread(local.echo, b"in the third generation")
                await asyncio.to_thread(wait_for_generations, gateway, {1: "draining", 3: "active"})
                assert tunnels_by_generation(gateway) == {1: TUNNELS, 3: TUNNELS}

        try:
            run(scenario(), 110)
        finally:
            local.close()
        log = gateway_log(gateway)
        closed = sum(
            line["tunnels"]
            for line in log
            if line["event"] == "worker is drained" and line["generation"] == 2
        )
        assert closed == TUNNELS
        wait_for_generations(gateway, {3: "active"})
        wait_for_metric(gateway, TUNNELS, "tunnels_cut_total")
        assert gateway.metric("toppy_gw_tunnels_cut_total") == TUNNELS
        assert gateway.status()["worker_deaths"] == 0


# clients whose address changes


class Nat:
    """A home router on the event loop: forwards one client's packets from a port of its own."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = (gateway.host, gateway.port)
        self._loop = asyncio.get_running_loop()
        self._client: tuple[str, int] | None = None
        self._inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._inside.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._inside.getsockname()
        self._loop.add_reader(self._inside, self._pass_outward)
        self._outside = self._open_outside()

    def _open_outside(self) -> socket.socket:
        outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        outside.connect(self._gateway)
        self._loop.add_reader(outside, self._pass_homeward)
        return outside

    def rebind(self) -> None:
        """Forget the binding: from now on the gateway sees the client at another port."""
        former, self._outside = self._outside, self._open_outside()
        self._close(former)

    def close(self) -> None:
        """The client's last words pass."""
        self._inside.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._pass_outward()
        self._close(self._inside)
        self._close(self._outside)

    def _close(self, sock: socket.socket) -> None:
        self._loop.remove_reader(sock)
        sock.close()

    def _pass_outward(self) -> None:
        data, self._client = self._inside.recvfrom(65535)
        with contextlib.suppress(ConnectionError):
            self._outside.send(data)

    def _pass_homeward(self) -> None:
        with contextlib.suppress(ConnectionError):
            data = self._outside.recv(65535)
            if self._client is not None:
                self._inside.sendto(data, self._client)


async def rebind(tunnel: Tunnel, nat: Nat, word: bytes) -> None:
    """The client's router forgets: another source port, and nobody at the client knows."""
    for number in range(3):
        nat.rebind()
        await tunnel.echo(b"%s %d after a new port" % (word, number))


async def migrate(tunnel: Tunnel, client: Client, nat: Nat, word: bytes) -> None:
    """The client moves on purpose: another port and another connection ID."""
    if not isinstance(client, Stranger):
        return
    for number in range(3):
        before = client._quic._peer_cid.cid
        client._quic.change_connection_id()
        assert client._quic._peer_cid.cid != before
        nat.rebind()
        await tunnel.echo(b"%s %d after a migration" % (word, number))


@pytest.mark.parametrize("is_steered", [True, False], ids=["steered", "unsteered"])
@pytest.mark.parametrize("engine", ENGINES)
def test_clients_that_move_keep_their_tunnels_before_during_and_after_a_drain(
    directory: Path, echo: Peer, engine: str, is_steered: bool
) -> None:
    with running_gateway(directory, workers=2, engine=engine, is_steered=is_steered) as gateway:

        async def move(kind: str, steps: asyncio.Barrier) -> None:
            nat = Nat(gateway)
            try:
                async with connected(gateway, kind, address=nat.address) as client:
                    tunnel = await open_tunnel(client, echo.host, echo.port)
                    for word in (b"before", b"during"):
                        await rebind(tunnel, nat, word)
                        await migrate(tunnel, client, nat, word)
                        await steps.wait()
                        await steps.wait()
                    assert not client.closed.done()
                # its goodbye passes the router too
                await asyncio.sleep(0.2)
            finally:
                nat.close()

        async def scenario() -> None:
            kinds = [*CLIENTS, "stranger", "stranger"]
            steps = asyncio.Barrier(len(kinds) + 1)
            async with asyncio.TaskGroup() as group:
                for kind in kinds:  # some on each worker
                    group.create_task(move(kind, steps))
                await steps.wait()
                await operate_meanwhile(gateway, "reload")
                await steps.wait()
                await steps.wait()
                # they were where they had been all the time
                assert tunnels_by_generation(gateway) == {1: len(kinds)}
                await steps.wait()
            await asyncio.to_thread(wait_for_generations, gateway, {2: "active"})
            after = asyncio.Barrier(len(kinds))
            async with asyncio.TaskGroup() as group:
                for kind in kinds:
                    group.create_task(move(kind, after))

        run(scenario(), 100)
        assert gateway.status()["worker_deaths"] == 0
        assert gateway.status()["steered"] is is_steered
        if not is_steered:
            gateway.running.wait_for_output("no BPF steering here")


# what operators do


def test_a_drained_worker_takes_nothing_new_and_its_tunnels_go_on(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory, workers=2) as gateway:

        async def scenario() -> None:
            async with contextlib.AsyncExitStack() as stack:
                stayers = []
                for _ in range(12):  # some on each worker
                    client = await stack.enter_async_context(connected(gateway, "stranger"))
                    stayers.append(await open_tunnel(client, echo.host, echo.port))
                assert await operate_meanwhile(gateway, "drain", "s0") == {"draining": ["s0"]}
                for _ in range(8):
                    async with connected_engine(gateway) as client:
                        await open_tunnel(client, echo.host, echo.port)
                        names = gateway.ask("GET", "/connections")["connections"]
                        source = f"127.0.0.1:{client.socket.local_address[1]}"
                        (name,) = [c["name"] for c in names if c["source"] == source]
                        assert name.startswith("s1g1")
                await all_echo(stayers, b"on both workers")
                # a connection that is drained opens no tunnel any more
                for tunnel in stayers:
                    another = ask(tunnel.client, echo.host, echo.port)
                    try:
                        assert (await another.answer()).status == 200
                    except ClosedError as error:
                        assert "0x10b" in str(error)  # H3_REQUEST_REJECTED

        run(scenario())
        wait_until("the worker's end", lambda: set(worker_pids(gateway)) == {"s1"})
        refused = try_operation(gateway, "drain", "s1")
        assert refused.returncode == 1
        assert "toppy-gw reload" in refused.stderr
        assert operate(gateway, "reload")["generation"] == 2
        wait_for_generations(gateway, {2: "active"})
        assert len(worker_pids(gateway)) == 2


def test_an_earlier_generation_can_be_given_less_time(directory: Path, echo: Peer) -> None:
    with running_gateway(directory) as gateway:

        async def scenario() -> None:
            async with strangers(gateway, echo, PER_CONNECTION) as tunnels:
                await operate_meanwhile(gateway, "reload")
                assert generations(gateway) == {1: "draining", 2: "active"}
                assert (await operate_meanwhile(gateway, "drain", "g1", "--timeout", "0.5"))[
                    "draining"
                ] == ["s0"]
                async with asyncio.timeout(15):
                    for tunnel in tunnels:
                        await tunnel.has_ended.wait()

        run(scenario())
        wait_for_generations(gateway, {2: "active"})
        for wrong, code in (("g2", 1), ("g1", 1), ("s7", 1), ("worker", 2)):
            assert try_operation(gateway, "drain", wrong).returncode == code


def test_kicked_tunnels_end_and_their_clients_hear_why(directory: Path, echo: Peer) -> None:
    with (
        running_gateway(directory, workers=2) as gateway,
        running_udp_client(gateway, f"{echo.host}:{echo.port}") as (port, client),
    ):
        local = LocalPeers(port, 1)
        try:
            local.echo(b"before")
            (tunnel,) = operate(gateway, "tunnels")["tunnels"]
            assert tunnel["target"] == f"{echo.host}:{echo.port}"
            assert tunnel["rule"] == "loopback"
            assert tunnel["datagrams_to_target"] >= 1
            assert operate(gateway, "kick", tunnel["name"])["closed"] == 1
            client.wait_for_output("an operator of the gateway ended the tunnel")
            # it may come again
            local.echo(b"after")
            subjects = [tunnel["subject"] for tunnel in operate(gateway, "tunnels")["tunnels"]]
            assert len(subjects) == 1
            assert operate(gateway, "kick", subjects[0])["closed"] == 1
        finally:
            local.close()
        for nobody in (tunnel["name"], "nobody"):
            refused = try_operation(gateway, "kick", nobody)
            assert refused.returncode == 1
            assert "no open tunnel has the name or subject" in refused.stderr


def test_stop_returns_when_everything_has_ended(directory: Path, echo: Peer) -> None:
    with running_gateway(directory, workers=2) as gateway:

        async def scenario() -> None:
            async with connected_engine(gateway) as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                await tunnel.echo(b"before")
                stopped = await asyncio.to_thread(try_operation, gateway, "stop")
                assert stopped.returncode == 0, stopped.stderr
                assert gateway.running.process.poll() == 0
                async with asyncio.timeout(15):
                    assert "stopping" in await client.closed

        run(scenario())
        again = try_operation(gateway, "stop")
        assert again.returncode == 1
        assert "no gateway answers" in again.stderr


def test_new_connections_come_to_the_next_generation_while_the_first_drains(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory, workers=2, is_steered=False) as gateway:

        async def scenario() -> None:
            async with strangers(gateway, echo, PER_CONNECTION) as tunnels:
                await operate_meanwhile(gateway, "reload")
                for _ in range(6):
                    assert await echo_on_new_connection(gateway, echo) == 2
                await all_echo(tunnels, b"with strays handed over")

        run(scenario())
