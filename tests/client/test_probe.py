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
from toppy.wire.connect_udp import DEFAULT_TEMPLATE_PATH, response_headers
from toppy.wire.gateway_facts import GatewayFacts, date_field, diagnostic_fields
from toppy.wire.proxy_status import encode_proxy_status
from toppy.wire.tunnel_request import validate_tunnel_request

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
                tunnel = await probe.open_echo(TEMPLATE)
                assert await probe.echo(tunnel) > 0
                assert probe.local_port == gateway.sources[0][1]
                assert probe.largest_payload_bytes > 1200
            (asked,) = gateway.of(HeadersReceived)
            assert isinstance(asked, HeadersReceived)
            request = validate_tunnel_request(asked.headers)
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
                await probe.echo(await probe.open_echo(TEMPLATE))
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


def test_several_tunnels_are_told_apart() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], H3_ALPN) as probe:
                await probe.connect()
                first, second = await asyncio.gather(
                    probe.open_echo(TEMPLATE), probe.open_echo(TEMPLATE)
                )
                second.send(b"two")
                first.send(b"one")
                assert await first.receive() == (b"one", False)
                assert await second.receive() == (b"two", False)

    run(scenario)


def test_a_payload_in_a_capsule_comes_back_as_the_gateway_sends_it() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], H3_ALPN) as probe:
                await probe.connect()
                tunnel = await probe.open_echo(TEMPLATE)
                for size in (10, 1200, 1400):
                    tunnel.send_in_capsule(bytes(size))
                found = {
                    len(p): in_capsule for p, in_capsule in [await tunnel.receive() for _ in "123"]
                }
                assert found == {10: False, 1200: False, 1400: True}

    run(scenario)


def test_what_the_gateway_says_about_itself_is_read() -> None:
    def respond(_: HeadersReceived) -> tuple[Headers, bool]:
        facts = diagnostic_fields("9.8.7", "native", ("192.0.2.1", 5))
        return [*response_headers(200), date_field(1e9), *facts], False

    async def scenario() -> None:
        async with LoopbackGateway(respond=respond) as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], H3_ALPN) as probe:
                await probe.connect()
                tunnel = await probe.open_echo(TEMPLATE)
                assert tunnel.facts == GatewayFacts(1e9, "9.8.7", "native", ("192.0.2.1", 5))

    run(scenario)


def test_a_connection_that_ends_ends_every_question() -> None:
    async def scenario() -> None:
        async with LoopbackGateway(respond=lambda _: (response_headers(403), True)) as gateway:
            settings = settings_for(gateway.address)
            async with Probe(settings, [gateway.address], H3_ALPN) as probe:
                await probe.connect()
                (connection,) = gateway.connections
                gateway.close_connection(connection, "enough")
                with pytest.raises(ProbeError, match="enough"):
                    await probe.open_echo(TEMPLATE)
                with pytest.raises(ProbeError):
                    await probe.open_echo(TEMPLATE)

    run(scenario)
