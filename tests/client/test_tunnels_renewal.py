"""A newer token, while tunnels are open: they go on with it."""

from __future__ import annotations

from tests.client.world import TARGET, Local, World
from toppy.model.target import Target
from toppy.protocol.udp_tunnel import UdpTunnel
from toppy.quic.endpoint import BodyReceived
from toppy.wire.capsule import RENEWAL_FIELD
from toppy.wire.connect_udp import response_headers


def accept(world: World, *, takes_renewal: bool = True) -> None:
    request = world.requests[-1]
    fields = [RENEWAL_FIELD] if takes_renewal else []
    world.gateway.send_headers(
        request.connection, request.stream_id, [*response_headers(200), *fields]
    )
    world.run()


def shown(world: World) -> list[str]:
    """Tokens that open tunnels were given, in order."""
    found = []
    for event in world.of(BodyReceived):
        assert isinstance(event, BodyReceived)
        gateway = UdpTunnel(hold_datagrams=0, hold_bytes=0)
        gateway.receive_body(event.data, ended=False)
        if gateway.authorization is not None:
            found.append(gateway.authorization)
    return found


def begin() -> tuple[World, Local]:
    world, local = World(), Local()
    world.connect()
    world.tunnels.add(local.tunnel)
    world.run()
    return world, local


def renew(world: World, token: str) -> None:
    world.tunnels.set_authorization(token)
    world.run()


def test_an_open_tunnel_is_given_each_newer_token_once() -> None:
    world, local = begin()
    accept(world)
    renew(world, "newer")
    renew(world, "newer")
    renew(world, "newest")
    assert shown(world) == ["newer", "newest"]
    assert local.tunnel.is_open
    assert not local.ends
    assert len(world.requests) == 1


def test_requests_from_then_on_have_the_newer_token() -> None:
    world, _ = begin()
    accept(world)
    renew(world, "newer")
    world.tunnels.add(Local(Target(TARGET.host, 54)).tunnel)
    world.run()
    tokens = [dict(request.headers)[b"authorization"] for request in world.requests]
    assert tokens == [b"Bearer secret", b"Bearer newer"]


def test_a_tunnel_that_was_being_opened_is_given_it_when_it_is_open() -> None:
    world, _ = begin()
    renew(world, "newer")
    assert shown(world) == []
    accept(world)
    assert shown(world) == ["newer"]


def test_another_gateway_is_sent_nothing_that_it_does_not_take() -> None:
    world, local = begin()
    accept(world, takes_renewal=False)
    renew(world, "newer")
    assert shown(world) == []
    assert local.tunnel.is_open
