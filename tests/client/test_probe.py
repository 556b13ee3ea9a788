"""Questions to a gateway, each on a connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.client.gateway import DEADLINE_S, LoopbackGateway, settings_for
from tests.quic.certificates import other_ca_pem
from toppy.client import probe as probe_module
from toppy.client.probe import ECHO_PAYLOAD, Probe, ProbeError, ProbeRefusedError
from toppy.quic.endpoint import H3_ALPN, PING_ALPN, HeadersReceived
from toppy.quic.engine import Address, ConnectionClosed
from toppy.quic.h3 import Headers
from toppy.wire.connect_udp import DEFAULT_TEMPLATE_PATH, response_headers, validate_request
from toppy.wire.proxy_status import encode_proxy_status

TEMPLATE = f"https://gateway.test{DEFAULT_TEMPLATE_PATH}"
SILENT: Address = ("127.0.0.1", 9)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * DEADLINE_S):
            await scenario()

    asyncio.run(bounded())


@pytest.mark.parametrize("token", ["the-token", None])
def test_a_ping_has_the_token_and_gets_the_answer(token: str | None) -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            settings = settings_for(gateway.address, authorization=token)
            async with Probe(settings, [gateway.address], PING_ALPN) as probe:
                address, took_s = await probe.connect()
                assert address == gateway.address
                assert took_s > 0
                assert await probe.ping() == "pong"
            assert gateway.pings == [b"ping the-token" if token else b"ping"]

    run(scenario)


def test_a_refused_token_is_told_as_the_gateway_says_it() -> None:
    async def scenario() -> None:
        async with LoopbackGateway(pong=b"unauthorized") as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], PING_ALPN) as probe:
                await probe.connect()
                assert await probe.ping() == "unauthorized"

    run(scenario)


def test_an_answer_without_end_is_not_read_for_ever() -> None:
    async def scenario() -> None:
        async with LoopbackGateway(pong=bytes(100_000)) as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], PING_ALPN) as probe:
                await probe.connect()
                with pytest.raises(ProbeError, match="too long"):
                    await probe.ping()

    run(scenario)


def test_the_echo_comes_back_through_a_tunnel() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], H3_ALPN) as probe:
                await probe.connect()
                await probe.open_echo(TEMPLATE)
                assert await probe.echo() > 0
            (asked,) = gateway.of(HeadersReceived)
            assert isinstance(asked, HeadersReceived)
            request = validate_request(asked.headers)
            assert str(request.target) == "127.0.0.1:9"
            assert not request.is_forward
            assert request.authorization == "Bearer the-token"
            assert gateway.payloads == [ECHO_PAYLOAD]

    run(scenario)


def test_a_lost_echo_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "ECHO_AGAIN_S", 0.02)

    async def scenario() -> None:
        async with LoopbackGateway(lose=2) as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], H3_ALPN) as probe:
                await probe.connect()
                await probe.open_echo(TEMPLATE)
                await probe.echo()
            assert len(gateway.payloads) >= 3

    run(scenario)


def test_a_refused_tunnel_is_explained() -> None:
    def refuse(_: HeadersReceived) -> tuple[Headers, bool]:
        said = encode_proxy_status("gw", error="http_request_denied", details="no", rule="r1")
        return response_headers(403, proxy_status=said), True

    async def scenario() -> None:
        async with LoopbackGateway(respond=refuse) as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], H3_ALPN) as probe:
                await probe.connect()
                with pytest.raises(ProbeRefusedError, match=r"403: no \(rule 'r1'\)"):
                    await probe.open_echo(TEMPLATE)

    run(scenario)


def test_the_first_address_that_answers_is_used() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [SILENT, gateway.address], PING_ALPN) as probe:
                address, _ = await probe.connect()
                assert address == gateway.address
                assert await probe.ping() == "pong"

    run(scenario)


def test_an_address_that_refuses_makes_way_for_the_next_at_once() -> None:
    async def scenario() -> None:
        async with LoopbackGateway(alpn_protocols=("other",)) as wrong, LoopbackGateway() as right:
            settings = settings_for(right.address)
            async with Probe(settings, [wrong.address, right.address], PING_ALPN) as probe:
                address, _ = await probe.connect()
                assert address == right.address

    run(scenario)


def test_a_certificate_that_does_not_verify_is_told() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            settings = settings_for(gateway.address, ca_certificates_pem=other_ca_pem())
            async with Probe(settings, [gateway.address], PING_ALPN) as probe:
                with pytest.raises(ProbeError, match="certificate"):
                    await probe.connect()

    run(scenario)


def test_without_an_address_of_a_family_here_the_probe_says_so() -> None:
    async def scenario() -> None:
        async with Probe(settings_for(SILENT), [], PING_ALPN) as probe:
            with pytest.raises(ProbeError, match="address family"):
                await probe.connect()

    run(scenario)


def test_leaving_closes_the_connection() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], PING_ALPN) as probe:
                await probe.connect()
            await gateway.until(lambda: gateway.of(ConnectionClosed))

    run(scenario)
