"""The client's tunnels against a gateway that a test plays."""

from __future__ import annotations

import pytest

from tests.client.world import TARGET, Local, World
from toppy.client.tunnels import HOLD_DATAGRAMS
from toppy.model.drop_reason import DropReason
from toppy.protocol.udp_tunnel import encode_datagram_capsules
from toppy.quic.endpoint import BodyReceived, StreamAborted
from toppy.quic.h3 import H3_NO_ERROR
from toppy.wire.capsule import CapsuleParser
from toppy.wire.connect_udp import response_headers
from toppy.wire.proxy_status import encode_proxy_status
from toppy.wire.tunnel_request import validate_tunnel_request


@pytest.fixture
def world() -> World:
    world = World()
    world.connect()
    return world


def test_a_tunnel_asks_for_its_target_with_the_token(world: World) -> None:
    world.tunnels.add(Local().tunnel)
    world.run()
    request = validate_tunnel_request(world.requests[0].headers)
    assert request.target == TARGET
    assert request.is_forward
    assert request.authorization == "Bearer secret"


def test_what_comes_before_the_answer_is_held_then_sent_in_order(world: World) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    world.tunnels.send(local.tunnel, b"aabbc", 2)
    world.tunnels.send(local.tunnel, b"", 0)
    world.run()
    assert world.arrived == []
    world.accept()
    assert world.arrived == [b"aa", b"bb", b"c", b""]


def test_a_tunnel_may_be_opened_before_there_is_a_connection() -> None:
    world, local = World(), Local()
    world.tunnels.add(local.tunnel)
    world.tunnels.send(local.tunnel, b"early", 0)
    world.connect()
    world.accept()
    assert world.arrived == [b"early"]


def test_more_than_may_be_held_is_dropped_and_counted(world: World) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    for _ in range(HOLD_DATAGRAMS + 3):
        world.tunnels.send(local.tunnel, b"x", 0)
    assert world.tunnels.drops == {DropReason.NO_CONNECTION: 3}


def test_payloads_reach_the_tunnel_that_they_are_for(world: World) -> None:
    first, second = Local(), Local()
    for local in (first, second):
        world.tunnels.add(local.tunnel)
        world.run()
        world.accept()
    for index, text in ((1, b"for the second"), (0, b"for the first")):
        request = world.requests[index]
        world.gateway.engine.send_datagrams(request.connection, request.stream_id // 4, text, 0)
    world.run()
    assert first.received == [b"for the first"]
    assert second.received == [b"for the second"]


@pytest.mark.parametrize("size", [1500, 9000, 65507])
def test_a_payload_that_fits_no_packet_travels_as_a_capsule(world: World, size: int) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    world.run()
    request = world.accept()
    world.tunnels.send(local.tunnel, bytes(size), 0)
    world.run()
    body = b"".join(e.data for e in world.of(BodyReceived) if isinstance(e, BodyReceived))
    (capsule,) = CapsuleParser(70_000).receive(body)
    assert capsule.value == b"\x00" + bytes(size)
    world.gateway.send_body(
        request.connection, request.stream_id, encode_datagram_capsules(bytes(size), 0)
    )
    world.run()
    assert local.received == [bytes(size)]


def test_a_refusal_is_explained_once_and_frees_the_stream(world: World) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    world.tunnels.send(local.tunnel, b"ab", 1)
    world.run()
    said = encode_proxy_status("gw", error="http_request_denied", details="no", rule="r 1")
    request = world.requests[0]
    world.gateway.send_headers(
        request.connection,
        request.stream_id,
        response_headers(403, proxy_status=said),
        end=True,
    )
    world.run()
    assert len(local.ends) == 1
    refusal = local.ends[0]
    assert refusal is not None
    assert refusal.status == 403
    assert "'r 1'" in refusal.explanation
    assert world.tunnels.drops == {DropReason.TUNNEL_REFUSED: 2}
    assert any(isinstance(e, BodyReceived) and e.ended for e in world.events)


def test_a_tunnel_that_the_gateway_ends_is_over_for_the_client(world: World) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    world.run()
    request = world.accept()
    world.gateway.send_body(request.connection, request.stream_id, b"", end=True)
    world.run()
    assert local.ends == [None]


def test_a_tunnel_whose_stream_is_reset_is_over_for_the_client(world: World) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    world.run()
    request = world.accept()
    world.gateway.abort_stream(request.connection, request.stream_id, 0x10C)
    world.run()
    assert local.ends == [None]


def test_a_capsule_that_lies_ends_the_tunnel_alone(world: World) -> None:
    bad, good = Local(), Local()
    for local in (bad, good):
        world.tunnels.add(local.tunnel)
        world.run()
        world.accept()
    request = world.requests[0]
    world.gateway.send_body(request.connection, request.stream_id, b"\x00\x80\x20\x00\x00")
    world.run()
    assert bad.ends == [None]
    assert good.ends == []
    assert world.lost == []


def test_removing_a_tunnel_tells_the_gateway_and_calls_nobody_back(world: World) -> None:
    open_one, waiting_one = Local(), Local()
    world.tunnels.add(open_one.tunnel)
    world.run()
    world.accept()
    world.tunnels.add(waiting_one.tunnel)
    world.run()
    world.tunnels.remove(open_one.tunnel)
    world.tunnels.remove(waiting_one.tunnel)
    world.run()
    assert any(isinstance(e, BodyReceived) and e.ended for e in world.events)
    assert world.of(StreamAborted)
    assert open_one.ends == waiting_one.ends == []


def test_tunnels_are_asked_for_again_on_the_next_connection(world: World) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    world.run()
    request = world.accept()
    world.gateway.close(request.connection, H3_NO_ERROR, "bye", world.now)
    world.run()
    assert world.lost == ["bye"]
    world.tunnels.send(local.tunnel, b"meanwhile", 0)
    world.connect()
    assert len(world.requests) == 2
    world.accept()
    assert world.arrived == [b"meanwhile"]
    assert local.ends == []


def test_beyond_the_gateways_stream_limit_tunnels_wait_their_turn() -> None:
    world = World(streams=1)
    world.connect()
    first, second = Local(), Local()
    world.tunnels.add(first.tunnel)
    world.tunnels.add(second.tunnel)
    world.run()
    assert len(world.requests) == 1
    world.accept()
    world.tunnels.remove(first.tunnel)
    request = world.requests[0]
    world.run()
    world.gateway.send_body(request.connection, request.stream_id, b"", end=True)
    world.run()
    world.tunnels.retry_waiting()
    world.run()
    assert len(world.requests) == 2


def test_datagrams_of_a_stream_that_is_no_tunnel_are_counted(world: World) -> None:
    world.tunnels.receive_datagrams(world.client_connection, 77, b"abc", 1, world.now)
    assert world.tunnels.drops == {DropReason.UNKNOWN_STREAM: 3}


@pytest.mark.parametrize("ended", [False, True])
def test_trailers_end_the_tunnel_alone(world: World, ended: bool) -> None:
    bad, good = Local(), Local()
    for local in (bad, good):
        world.tunnels.add(local.tunnel)
        world.run()
        world.accept()
    request = world.requests[0]
    world.gateway.send_headers(
        request.connection, request.stream_id, [(b"x-trailer", b"1")], end=ended
    )
    world.run()
    assert bad.ends == [None]
    assert good.ends == []
    assert world.lost == []


def test_an_interim_response_says_nothing_about_the_tunnel(world: World) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    world.run()
    request = world.requests[0]
    world.gateway.send_headers(request.connection, request.stream_id, [(b":status", b"103")])
    world.run()
    assert not local.tunnel.is_open
    world.accept()
    assert local.tunnel.is_open


@pytest.mark.parametrize("status", [204, 205, 206, 301])
def test_a_status_that_cannot_carry_capsules_opens_no_tunnel(world: World, status: int) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    world.run()
    request = world.requests[0]
    headers = [(b":status", b"%d" % status)]
    world.gateway.send_headers(request.connection, request.stream_id, headers)
    world.run()
    (refusal,) = local.ends
    assert refusal is not None
    assert refusal.status == status


def test_capsules_beyond_the_streams_backlog_are_dropped_and_counted(world: World) -> None:
    local = Local()
    world.tunnels.add(local.tunnel)
    world.run()
    world.accept()
    for _ in range(40):  # nothing moves between: they wait in the stream
        world.tunnels.send(local.tunnel, bytes(60_000), 0)
    (dropped,) = world.tunnels.drops.items()
    assert dropped[0] is DropReason.CAPSULE_QUEUE_FULL
    assert 0 < dropped[1] < 40
