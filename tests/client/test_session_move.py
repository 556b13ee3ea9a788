"""A session that leaves a gateway which sends it away, on loopback."""

from __future__ import annotations

import pytest

from tests.client.gateway import LoopbackGateway, settings_for
from tests.client.test_session import ENGINES, Listening, Watched, resolve_to, run
from toppy.client import session as session_module
from toppy.client import tunnels as tunnels_module
from toppy.client.lookup import NameLookupError
from toppy.client.session import SessionState
from toppy.quic.endpoint import HeadersReceived
from toppy.quic.engine import Address, ConnectionClosed
from toppy.quic.h3 import H3_NO_ERROR
from toppy.wire.capsule import encode_tunnel_closed, encode_wrap_up


@pytest.fixture(autouse=True)
def brief_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels_module, "LINGER_QUIET_S", 0.05)
    monkeypatch.setattr(session_module, "STABLE_S", 0.0)


async def open_tunnel(gateway: LoopbackGateway) -> tuple[Watched, Listening]:
    """A session with a tunnel that carries datagrams."""
    watched = Watched(settings_for(gateway.address))
    await watched.until(SessionState.CONNECTED)
    local = Listening()
    watched.session.tunnels.add(local.tunnel)
    say(watched, local, b"begin")
    await local.until_received([b"begin"])
    return watched, local


def say(watched: Watched, local: Listening, payload: bytes) -> None:
    watched.session.tunnels.send(local.tunnel, payload, 0)
    watched.session.flush_soon()


async def until_asked(gateway: LoopbackGateway, times: int) -> None:
    await gateway.until(lambda: len(gateway.of(HeadersReceived)) >= times)


def closed_without_error(gateway: LoopbackGateway) -> list[int]:
    return sorted(
        e.connection
        for e in gateway.events
        if isinstance(e, ConnectionClosed) and e.by_peer and e.error_code == H3_NO_ERROR
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_goaway_moves_the_tunnels_and_then_closes_the_old_connection(engine: str) -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched = Watched(settings_for(gateway.address, engine=engine))
            await watched.until(SessionState.CONNECTED)
            local = Listening()
            watched.session.tunnels.add(local.tunnel)
            said = []
            for index in range(200):
                said.append(b"%d" % index)
                say(watched, local, said[-1])
                if index == 50:
                    await local.until_received(said)
                    gateway.send_goaway(gateway.connections[0])
                if index % 10 == 0:
                    await gateway.until(lambda: len(gateway.payloads) > len(said) - 10)
            await gateway.until(lambda: closed_without_error(gateway) == gateway.connections[:1])
            await local.until_received(said)
            assert gateway.payloads == said
            assert len(gateway.connections) == 2
            assert watched.failures.empty()
            assert watched.session.drops == {}
            await watched.stop()

    run(scenario)


def test_wrap_up_alone_moves_too() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched, local = await open_tunnel(gateway)
            (request,) = gateway.of(HeadersReceived)
            assert isinstance(request, HeadersReceived)
            gateway.send_body(request, encode_wrap_up())
            await gateway.until(lambda: closed_without_error(gateway) == gateway.connections[:1])
            say(watched, local, b"moved")
            await local.until_received([b"begin", b"moved"])
            await watched.stop()

    run(scenario)


@pytest.mark.parametrize("waits_for_requests", [False, True])
def test_goaways_back_to_back_end_on_the_last_connection(waits_for_requests: bool) -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched, local = await open_tunnel(gateway)
            said = [b"begin"]
            for move in range(4):
                gateway.send_goaway(gateway.connections[-1])
                while len(gateway.connections) < move + 2:
                    said.append(b"%d" % len(said))
                    say(watched, local, said[-1])
                    await gateway.until(lambda: len(gateway.payloads) == len(said))
                if waits_for_requests:
                    await until_asked(gateway, move + 2)
            await gateway.until(lambda: closed_without_error(gateway) == gateway.connections[:-1])
            await local.until_received(said)
            assert gateway.payloads == said
            assert local.ends == []
            assert watched.failures.empty()
            await watched.stop()

    run(scenario)


def test_while_the_new_gateway_cannot_be_reached_the_old_one_relays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(host: str, port: int) -> list[Address]:
        raise NameLookupError("no such name")

    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched, local = await open_tunnel(gateway)
            with monkeypatch.context() as patch:
                patch.setattr(session_module, "look_up", fail)
                gateway.send_goaway(gateway.connections[0])
                for _ in range(2):
                    failure = await watched.failure()
                    assert failure.is_relaying
                    assert "no such name" in failure.reason
                assert watched.session.state is SessionState.CONNECTED
                say(watched, local, b"still")
                await local.until_received([b"begin", b"still"])
            await gateway.until(lambda: closed_without_error(gateway) == gateway.connections[:1])
            say(watched, local, b"moved")
            await local.until_received([b"begin", b"still", b"moved"])
            await watched.stop()

    run(scenario)


def test_when_the_old_connection_is_lost_before_the_new_one_is_there_it_is_dialled_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(host: str, port: int) -> list[Address]:
        raise NameLookupError("no such name")

    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched, local = await open_tunnel(gateway)
            with monkeypatch.context() as patch:
                patch.setattr(session_module, "look_up", fail)
                gateway.send_goaway(gateway.connections[0])
                assert (await watched.failure()).is_relaying
            say(watched, local, b"waiting")
            gateway.close_connection(gateway.connections[0], "gone")
            await watched.until(SessionState.CONNECTED)
            await gateway.until(lambda: len(gateway.connections) == 2)
            say(watched, local, b"back")
            await gateway.until(lambda: b"back" in gateway.payloads)
            assert local.ends == []
            await watched.stop()

    run(scenario)


def test_the_move_may_end_at_another_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as first, LoopbackGateway() as second:
            watched, local = await open_tunnel(first)
            resolve_to(monkeypatch, second.address)
            first.send_goaway(first.connections[0])
            await second.until(lambda: second.of(HeadersReceived))
            await first.until(lambda: closed_without_error(first))
            say(watched, local, b"moved")
            await local.until_received([b"begin", b"moved"])
            assert second.payloads == [b"moved"]
            await watched.stop()

    run(scenario)


def test_after_a_good_connection_the_first_attempt_comes_at_once() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched, local = await open_tunnel(gateway)
            gateway.close_connection(gateway.connections[0], "killed")
            failure = await watched.failure()
            assert failure.retry_in_s == 0.0
            assert not failure.is_relaying
            await watched.until(SessionState.CONNECTED)
            say(watched, local, b"again")
            await gateway.until(lambda: b"again" in gateway.payloads)
            await watched.stop()

    run(scenario)


def test_stopping_during_a_move_closes_every_connection() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched, _ = await open_tunnel(gateway)
            gateway.send_goaway(gateway.connections[0])
            await gateway.until(lambda: len(gateway.of(HeadersReceived)) == 2)
            await watched.stop()
            await gateway.until(lambda: len(closed_without_error(gateway)) == 2)

    run(scenario)


def test_a_tunnel_that_is_cut_says_why() -> None:
    async def scenario() -> None:
        async with LoopbackGateway() as gateway:
            watched, local = await open_tunnel(gateway)
            (request,) = gateway.of(HeadersReceived)
            assert isinstance(request, HeadersReceived)
            said = encode_tunnel_closed('gw; error=http_request_denied; details="not any more"')
            gateway.send_body(request, said, end=True)
            await gateway.until(lambda: local.ends)
            (refusal,) = local.ends
            assert refusal is not None
            assert refusal.explanation.startswith("403: not any more; ")
            await watched.stop()

    run(scenario)
