"""What passes below QUIC's connections, over real sockets of this host."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
from cryptography import x509

from tests.client.gateway import DEADLINE_S, LoopbackGateway
from tests.quic.certificates import certificates, dated_pair
from toppy.client import path_probe as path_probe_module
from toppy.client.path_probe import (
    AddressFindings,
    TcpAnswer,
    fetch_certificate,
    probe_path,
    probe_tcp,
)
from toppy.client.probe import ProbeError
from toppy.quic.engine import Address


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * DEADLINE_S):
            await scenario()

    asyncio.run(bounded())


def test_every_size_that_passes_is_found() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            found: list[AddressFindings] = []
            await probe_path([gateway.address], [1200, 1350, 1472], found)
            (one,) = found
            assert set(one.round_trips_s) == {1200, 1350, 1472}
            assert one.local_host == "127.0.0.1"
            assert not one.is_refused
            assert not gateway.connections

    run(scenario)


def test_a_size_that_this_host_cannot_send_is_told_apart() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            found: list[AddressFindings] = []
            await probe_path([gateway.address], [1200, 65_530], found)
            assert set(found[0].round_trips_s) == {1200}
            assert found[0].too_large == {65_530}

    run(scenario)


def test_a_port_where_nothing_listens_is_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        address: Address = free.getsockname()

    async def scenario() -> None:
        found: list[AddressFindings] = []
        await probe_path([address], [1200], found)
        assert found[0].is_refused

    run(scenario)


def test_a_silent_host_is_asked_again_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_probe_module, "_AGAIN_S", 0.01)

    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            silent.setblocking(False)
            found: list[AddressFindings] = []
            await probe_path([silent.getsockname()], [1200], found)
            assert not found[0].round_trips_s
            assert not found[0].is_refused
            for _ in range(3):
                assert len(silent.recv(2000)) == 1200
            with pytest.raises(BlockingIOError):
                silent.recv(2000)

    run(scenario)


def test_an_address_that_cannot_be_sent_to_says_why() -> None:
    async def scenario() -> None:
        found: list[AddressFindings] = []
        await probe_path([("255.255.255.255", 4433)], [1200], found)
        assert found[0].error

    run(scenario)


def test_a_tcp_port_counts_as_answered_accepted_or_refused() -> None:
    async def scenario() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address: Address = listener.getsockname()
            assert await probe_tcp(address) is TcpAnswer.ANSWERED
            listener.listen()
            assert await probe_tcp(address) is TcpAnswer.ANSWERED
        assert await probe_tcp(("255.255.255.255", 1)) is TcpAnswer.UNREACHABLE

    run(scenario)


def test_the_chain_is_fetched_whatever_it_is_worth() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            chain = await fetch_certificate([gateway.address], "gateway.test")
            assert list(chain) == x509.load_pem_x509_certificates(certificates().chain_pem)
        async with LoopbackGateway(pair=dated_pair(-9, -2)) as gateway:
            (expired,) = await fetch_certificate([gateway.address], "gateway.test")
            await gateway.until(lambda: not gateway.pings)
            assert expired.subject == expired.issuer

    run(scenario)


def test_a_port_without_a_gateway_has_no_chain() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        address: Address = free.getsockname()

    async def scenario() -> None:
        with pytest.raises(ProbeError):
            await fetch_certificate([address], "gateway.test")

    run(scenario)


def test_a_gateway_of_another_protocol_has_no_chain() -> None:
    async def scenario() -> None:
        async with LoopbackGateway(alpn_protocols=("other",)) as gateway:
            with pytest.raises(ProbeError):
                await fetch_certificate([gateway.address], "gateway.test")

    run(scenario)
