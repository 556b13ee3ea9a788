"""What the gateway is for: UDP payloads reach their target and come back, whoever the client is."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from integration.conftest import ENGINES, Peer, each_engine, name_server, wait_for_metric
from integration.masque_client import (
    CLIENTS,
    Client,
    Tunnel,
    ask,
    connected,
    connected_engine,
    connected_stranger,
    open_tunnel,
    run,
)
from integration.processes import Gateway, running_gateway
from tests.net.dns_server import DnsServer
from toppy.quic.choose import has_native_engine

SIZES = (0, 1, 1200, 1350, 1500, 9000, 65507)
NAME = "echo.example.test"


@pytest.fixture(scope="module")
def dns() -> Iterator[DnsServer]:
    records = {(NAME, "A"): ["127.0.0.1"], ("six.example.test", "AAAA"): ["::1"]}
    with name_server(DnsServer(records=records)) as server:
        yield server


@pytest.fixture(scope="module", params=each_engine("relay"))
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dns: DnsServer
) -> Iterator[Gateway]:
    with running_gateway(
        tmp_path_factory.mktemp("gw"),
        engine=request.param,
        extra=f'[resolver]\nnameservers = ["{dns.address}"]',
    ) as running:
        yield running


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_the_native_engine_is_among_those_that_are_tested() -> None:
    if not has_native_engine():
        pytest.skip("the native engine is not built here (no Rust toolchain): aioquic alone runs")
    assert "native" in ENGINES


def pattern(size: int) -> bytes:
    """Bytes that are wrong when cut, moved or mixed."""
    return (b"%d:" % size + bytes(range(256)) * (size // 256 + 1))[:size]


def test_payloads_of_every_size_arrive_in_both_directions(
    gateway: Gateway, kind: str, echo: Peer
) -> None:
    async def scenario() -> None:
        async with connected(gateway, kind) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            for size in SIZES:
                await tunnel.echo(pattern(size))

    run(scenario())


def test_payloads_too_large_for_a_packet_travel_in_capsules(gateway: Gateway, echo: Peer) -> None:
    name = "toppy_gw_capsules_total"
    before = {d: gateway.metric(name, direction=d) for d in ("to_target", "to_client")}

    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            await tunnel.echo(pattern(9000))
            assert tunnel.capsules_received == 1

    run(scenario())
    for direction, count in before.items():
        wait_for_metric(gateway, count + 1, "capsules_total", direction=direction)


def test_an_answer_says_that_it_speaks_the_capsule_protocol(gateway: Gateway, kind: str) -> None:
    async def scenario() -> None:
        async with connected(gateway, kind) as client:
            tunnel = await open_tunnel(client, "127.0.0.1", 9999)
            assert (await tunnel.answer()).fields["capsule-protocol"] == "?1"

    run(scenario())


async def stream_numbers(tunnel: Tunnel, count: int, size: int, window: int) -> list[int]:
    """Send numbered payloads, at most ``window`` on their way; the numbers as they came back."""
    back: list[int] = []
    for first in range(0, count, window):
        numbers = range(first, min(first + window, count))
        tunnel.send_many([number.to_bytes(4) + bytes(size - 4) for number in numbers])
        back += [int.from_bytes((await tunnel.receive())[:4]) for _ in numbers]
    return back


def test_two_thousand_datagrams_come_back_in_order_and_none_is_lost(
    gateway: Gateway, kind: str, echo: Peer
) -> None:
    async def scenario() -> None:
        async with connected(gateway, kind) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            assert await stream_numbers(tunnel, 2000, 1100, 40) == list(range(2000))

    run(scenario())


def test_tunnels_of_one_connection_are_never_mixed_up(
    gateway: Gateway, kind: str, echo: Peer
) -> None:
    async def talk(client: Client, name: bytes) -> None:
        tunnel = await open_tunnel(client, echo.host, echo.port)
        for number in range(100):
            payload = name + number.to_bytes(4) + bytes(200)
            tunnel.send(payload)
            assert await tunnel.receive() == payload

    async def scenario() -> None:
        async with connected(gateway, kind) as client, asyncio.TaskGroup() as group:
            for name in (b"alice", b"bob", b"carol"):
                group.create_task(talk(client, name))

    run(scenario())


def test_a_tunnel_hears_its_own_target_and_nobody_else(gateway: Gateway) -> None:
    async def scenario() -> None:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as intruder,
        ):
            target.bind(("127.0.0.1", 0))
            target.settimeout(10)
            async with connected(gateway) as client:
                tunnel = await open_tunnel(client, *target.getsockname())
                tunnel.send(b"hello")
                _, source = await asyncio.to_thread(target.recvfrom, 100)
                intruder.sendto(b"intruder", source)
                target.sendto(b"target", source)
                assert await tunnel.receive() == b"target"
                assert tunnel.payloads.empty()

    run(scenario())


def test_a_target_may_speak_first_and_often(gateway: Gateway, kind: str) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.bind(("127.0.0.1", 0))
            target.settimeout(10)
            async with connected(gateway, kind) as client:
                tunnel = await open_tunnel(client, *target.getsockname())
                tunnel.send(b"?")
                _, source = await asyncio.to_thread(target.recvfrom, 100)
                for number in range(200):
                    target.sendto(number.to_bytes(2) + bytes(500), source)
                seen = [int.from_bytes((await tunnel.receive())[:2]) for _ in range(200)]
                assert seen == list(range(200))

    run(scenario())


def test_datagrams_sent_together_with_the_request_are_not_lost(
    gateway: Gateway, kind: str, echo: Peer
) -> None:
    async def scenario() -> None:
        async with connected(gateway, kind) as client:
            tunnel = ask(client, echo.host, echo.port)
            tunnel.send(b"early bird")
            assert (await tunnel.answer()).status == 200
            assert await tunnel.receive() == b"early bird"

    run(scenario())


def test_a_name_is_resolved_by_the_gateway(gateway: Gateway, kind: str, echo: Peer) -> None:
    async def scenario() -> None:
        async with connected(gateway, kind) as client:
            tunnel = await open_tunnel(client, NAME, echo.port)
            await tunnel.echo(b"by name")
            forwarded = await open_tunnel(client, NAME, echo.port, forward=True)
            await forwarded.echo(b"by name, on udp-forward")

    run(scenario())


def test_a_name_may_lead_to_ipv6(gateway: Gateway, echo_ipv6: Peer) -> None:
    async def scenario() -> None:
        async with connected(gateway) as client:
            tunnel = await open_tunnel(client, "six.example.test", echo_ipv6.port)
            await tunnel.echo(b"over IPv6")

    run(scenario())


@pytest.mark.parametrize("engine", ENGINES)
def test_gateway_and_target_may_speak_ipv6(
    tmp_path_factory: pytest.TempPathFactory, engine: str, echo_ipv6: Peer
) -> None:
    async def scenario(gateway: Gateway) -> None:
        for kind in CLIENTS:
            async with connected(gateway, kind) as client:
                tunnel = await open_tunnel(client, echo_ipv6.host, echo_ipv6.port)
                for size in (0, 1200, 9000):
                    await tunnel.echo(pattern(size))

    with running_gateway(tmp_path_factory.mktemp("gw6"), host="::1", engine=engine) as gateway:
        assert gateway.status()["listen"] == [f"[::1]:{gateway.port}"]
        run(scenario(gateway))


def test_unknown_contexts_are_dropped_and_counted(gateway: Gateway, echo: Peer) -> None:
    before = gateway.metric("toppy_gw_datagrams_dropped_total", reason="unknown_context")

    async def scenario() -> None:
        async with connected_stranger(gateway) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            client.send_frame(tunnel.stream_id, 2, b"of another extension")
            await tunnel.echo(b"of UDP")
            assert tunnel.payloads.empty()

    run(scenario())
    wait_for_metric(gateway, before + 1, "datagrams_dropped_total", reason="unknown_context")


@pytest.mark.parametrize("id_bytes", [0, 4, 8, 20])
def test_clients_with_connection_ids_of_any_length_are_served(
    gateway: Gateway, echo: Peer, id_bytes: int
) -> None:
    async def scenario() -> None:
        async with connected_stranger(gateway, connection_id_length=id_bytes) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            await tunnel.echo(b"an odd ID")

    run(scenario())


def test_a_tunnel_that_its_client_ends_is_ended_by_the_gateway_too(
    gateway: Gateway, kind: str, echo: Peer
) -> None:
    async def scenario() -> None:
        async with connected(gateway, kind) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            await tunnel.echo(b"still there")
            tunnel.end()
            async with asyncio.timeout(10):
                await tunnel.has_ended.wait()

    run(scenario())
