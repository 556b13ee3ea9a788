"""The connection to the gateway, against gateways of the test's own on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from tests.client.gateway import DEADLINE_S, LoopbackGateway, settings_for
from tests.client.world import Local
from tests.quic.certificates import other_ca_pem
from toppy.client import session as session_module
from toppy.client.lookup import NameLookupError
from toppy.client.session import (
    ConnectFailure,
    GatewaySession,
    GatewaySettings,
    SessionState,
    make_client_engine,
)
from toppy.errors import ConfigError
from toppy.protocol.udp_tunnel import Buffer
from toppy.quic.choose import has_native_engine
from toppy.quic.endpoint import H3_ALPN, BodyReceived, HeadersReceived
from toppy.quic.engine import Address, ConnectionClosed
from toppy.wire.connect_udp import response_headers

ENGINES = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            not has_native_engine(), reason="the native engine is not built here"
        ),
    ),
    "aioquic",
]
SILENT: Address = ("127.0.0.1", 9)
"""Nobody answers QUIC there."""


class Watched:
    """A running session, and what it says."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.states: asyncio.Queue[SessionState] = asyncio.Queue()
        self.failures: asyncio.Queue[ConnectFailure] = asyncio.Queue()
        self.session = GatewaySession(
            settings, on_state=self.states.put_nowait, on_failure=self.failures.put_nowait
        )
        self.task = asyncio.create_task(self.session.run())

    async def until(self, state: SessionState) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while await self.states.get() is not state:
                pass

    async def failure(self) -> ConnectFailure:
        async with asyncio.timeout(DEADLINE_S):
            return await self.failures.get()

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
        assert self.task.cancelled()


class Listening(Local):
    """A tunnel's local side that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._heard = asyncio.Event()

    def deliver(self, payloads: Buffer, size: int) -> None:
        super().deliver(payloads, size)
        self._heard.set()

    async def until_received(self, payloads: list[bytes]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.received != payloads:
                self._heard.clear()
                await self._heard.wait()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(4 * DEADLINE_S):
            await scenario()

    asyncio.run(bounded())


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: Address) -> None:
    """The gateway's name has these addresses."""

    async def look_up(host: str, port: int) -> list[Address]:
        return list(addresses)

    monkeypatch.setattr(session_module, "look_up", look_up)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_session_connects_and_its_tunnels_carry_datagrams(engine: str) -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched = Watched(settings_for(gateway.address, engine=engine))
            await watched.until(SessionState.CONNECTED)
            local = Listening()
            watched.session.tunnels.add(local.tunnel)
            watched.session.tunnels.send(local.tunnel, b"aabbc", 2)
            watched.session.flush_soon()
            await gateway.until(lambda: gateway.payloads == [b"aa", b"bb", b"c"])
            await local.until_received([b"aa", b"bb", b"c"])
            assert watched.session.engine_name == engine
            assert watched.session.round_trip_s > 0
            await watched.stop()

    run(scenario)


def test_stopping_closes_the_connection_without_an_error() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched = Watched(settings_for(gateway.address))
            await watched.until(SessionState.CONNECTED)
            await watched.stop()
            await gateway.until(lambda: gateway.of(ConnectionClosed))
            (closed,) = gateway.of(ConnectionClosed)
            assert isinstance(closed, ConnectionClosed)
            assert closed.by_peer
            assert closed.error_code == 0x100

    run(scenario)


def test_a_lost_connection_is_told_and_dialled_again_with_its_tunnels() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched = Watched(settings_for(gateway.address))
            await watched.until(SessionState.CONNECTED)
            local = Local()
            watched.session.tunnels.add(local.tunnel)
            watched.session.flush_soon()
            await gateway.until(lambda: gateway.of(HeadersReceived))
            gateway.close_connection(gateway.connections[0], "going down")
            failure = await watched.failure()
            assert "lost: going down" in failure.reason
            watched.session.tunnels.send(local.tunnel, b"meanwhile", 0)
            await watched.until(SessionState.CONNECTED)
            await gateway.until(lambda: b"meanwhile" in gateway.payloads)
            assert len(gateway.of(HeadersReceived)) == 2
            assert local.ends == []
            await watched.stop()

    run(scenario)


def test_a_gateway_that_closes_every_connection_is_dialled_more_and_more_slowly() -> None:
    def refuse(request: HeadersReceived) -> tuple[list[tuple[bytes, bytes]], bool]:
        gateway.close_connection(request.connection, "go away")
        return response_headers(500), True

    gateway = LoopbackGateway(respond=refuse)

    async def scenario() -> None:
        async with gateway:
            watched = Watched(settings_for(gateway.address))
            watched.session.tunnels.add(Local().tunnel)
            delays = []
            for _ in range(3):
                failure = await watched.failure()
                assert "go away" in failure.reason
                delays.append(failure.retry_in_s)
                watched.session.tunnels.add(Local().tunnel)
            assert delays[0] <= 0.1 <= delays[1] <= 0.2 <= delays[2]
            await watched.stop()

    run(scenario)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_certificate_of_an_unknown_authority_is_refused_and_told(engine: str) -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            settings = settings_for(
                gateway.address, engine=engine, ca_certificates_pem=other_ca_pem()
            )
            watched = Watched(settings)
            assert "certificate" in (await watched.failure()).reason
            assert watched.session.state is SessionState.WAITING
            await watched.stop()
            assert gateway.of(HeadersReceived) == []

    run(scenario)


def test_a_name_that_does_not_resolve_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(host: str, port: int) -> list[Address]:
        raise NameLookupError("no such name")

    monkeypatch.setattr(session_module, "look_up", look_up)

    async def scenario() -> None:
        watched = Watched(settings_for(("gw.example", 4433)))
        assert (await watched.failure()).reason == "cannot resolve gw.example: no such name"
        await watched.stop()

    run(scenario)


@pytest.mark.parametrize("dial_timeout_s", [0.05, 3600.0])
def test_a_port_where_nothing_listens_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, dial_timeout_s: float
) -> None:
    monkeypatch.setattr(session_module, "DIAL_TIMEOUT_S", dial_timeout_s)

    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            address = closed.getsockname()
        watched = Watched(settings_for(address))
        told = f"nothing listens at UDP port {address[1]}: start the gateway"
        assert told in (await watched.failure()).reason
        await watched.stop()

    run(scenario)


def test_no_answer_is_told_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "DIAL_TIMEOUT_S", 0.05)

    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            watched = Watched(settings_for(silent.getsockname()))
            assert "no answer" in (await watched.failure()).reason
            await watched.stop()

    run(scenario)


def test_the_address_that_answers_is_used_when_the_first_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "ATTEMPT_DELAY_S", 0.01)

    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            resolve_to(monkeypatch, SILENT, gateway.address)
            watched = Watched(settings_for(("gw.example", 4433)))
            await watched.until(SessionState.CONNECTED)
            await watched.stop()
            assert watched.failures.empty()

    run(scenario)


def test_an_address_that_refuses_does_not_end_the_attempt_while_another_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with LoopbackGateway(alpn_protocols=("other",)) as wrong, LoopbackGateway() as right:
            resolve_to(monkeypatch, wrong.address, right.address)
            watched = Watched(settings_for(("gw.example", 4433)))
            await watched.until(SessionState.CONNECTED)
            await watched.stop()
            assert watched.failures.empty()
            assert len(right.connections) == 1

    run(scenario)


def test_an_address_that_is_nobodys_is_not_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        watched = Watched(settings_for(("gw.example", 9)))
        failure = await watched.failure()
        assert "no address that this host can reach" in failure.reason
        await watched.stop()

    resolve_to(monkeypatch, ("0.0.0.0", 9), ("::", 9))
    run(scenario)


def test_stopping_while_dialling_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        watched = Watched(settings_for(SILENT))
        await watched.until(SessionState.CONNECTING)
        await asyncio.sleep(0)
        await watched.stop()

    run(scenario)


def test_large_payloads_travel_as_capsules_through_a_session() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched = Watched(settings_for(gateway.address))
            await watched.until(SessionState.CONNECTED)
            local = Local()
            watched.session.tunnels.add(local.tunnel)
            watched.session.tunnels.send(local.tunnel, bytes(60_000), 0)
            watched.session.flush_soon()

            def body_bytes() -> int:
                return sum(len(e.data) for e in gateway.events if isinstance(e, BodyReceived))

            await gateway.until(lambda: body_bytes() > 60_000)
            await watched.stop()

    run(scenario)


@pytest.mark.parametrize("engine", ENGINES)
def test_roots_that_are_none_are_a_configuration_error(engine: str) -> None:
    settings = settings_for(SILENT, engine=engine, ca_certificates_pem=b"nothing")
    with pytest.raises(ConfigError, match="ca_cert_path") as refused:
        make_client_engine(settings, H3_ALPN, 0.0)
    assert refused.value.key == "ca_cert_path"


def test_the_token_is_not_in_the_settings_text() -> None:
    assert "the-token" not in repr(settings_for(SILENT))
