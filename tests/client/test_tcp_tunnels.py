"""The client's TCP tunnels against a gateway that a test plays."""

from __future__ import annotations

import pytest

from tests.client.world import Local, World
from tests.net.fake_socket import FakeSocket
from tests.quic.certificates import SERVER_NAME
from toppy.client.tcp_tunnels import TcpTunnel, TcpTunnels
from toppy.client.tunnel import Refusal
from toppy.model.target import Target
from toppy.protocol.stream_tunnel import RESET_CODE, Buffer, StreamTunnel
from toppy.quic.endpoint import BodyReceived, EndpointEvent, HeadersReceived, StreamAborted
from toppy.quic.h3 import H3_NO_ERROR
from toppy.wire.capsule import (
    RENEWAL_FIELD,
    encode_authorization,
    encode_tunnel_closed,
    encode_wrap_up,
)
from toppy.wire.connect_tcp import HEADROOM_BYTES, TCP_TEMPLATE_PATH, StreamFraming
from toppy.wire.proxy_status import encode_proxy_status
from toppy.wire.tunnel_request import TunnelKind, response_headers, validate_tunnel_request

TARGET = Target("db.example", 5432, "tcp")


class TcpWorld(World):
    """A ``World`` whose client has TCP tunnels, too."""

    def __init__(self, *, streams: int = 10) -> None:
        super().__init__(streams=streams)
        self.streams = TcpTunnels(
            self.client,
            self.tunnels,
            template=f"https://{SERVER_NAME}:4433{TCP_TEMPLATE_PATH}",
            authorization="secret",
            flush=lambda: None,
        )

    def handle_client(self, event: EndpointEvent) -> None:
        self.streams.handle(event)

    def connected_client(self) -> None:
        self.streams.connected()

    def disconnected_client(self, connection: int) -> None:
        self.streams.disconnected(connection)

    def say(self, index: int, status: int, *, end: bool = False, **said: str) -> None:
        """Answer a request."""
        request = self.requests[index]
        proxy_status = encode_proxy_status("gw", **said) if said else None
        headers = response_headers(TunnelKind.TCP, status, proxy_status=proxy_status)
        if 200 <= status < 300:
            headers.append(RENEWAL_FIELD)
        self.gateway.send_headers(request.connection, request.stream_id, headers, end=end)
        self.run()

    def send(self, index: int, data: Buffer, *, end: bool = False) -> None:
        """From the gateway, on a request's stream."""
        request = self.requests[index]
        self.gateway.send_body(request.connection, request.stream_id, data, end=end)
        self.run()

    def body(self, index: int) -> bytes:
        """What the gateway got on a request's stream."""
        request = self.requests[index]
        return b"".join(
            event.data
            for event in self.events
            if isinstance(event, BodyReceived)
            and (event.connection, event.stream_id) == (request.connection, request.stream_id)
        )

    def has_ended(self, index: int) -> bool:
        """Whether the client ended its side of a request's stream."""
        request = self.requests[index]
        return any(
            isinstance(event, BodyReceived)
            and event.ended
            and (event.connection, event.stream_id) == (request.connection, request.stream_id)
            for event in self.events
        )

    def aborts(self, index: int) -> set[int]:
        """Error codes with which the client gave a stream up."""
        request = self.requests[index]
        return {
            event.error_code
            for event in self.events
            if isinstance(event, StreamAborted)
            and (event.connection, event.stream_id) == (request.connection, request.stream_id)
        }


class Near(FakeSocket):
    """A local program's socket, and the tunnel's user."""

    def __init__(self, world: TcpWorld) -> None:
        super().__init__()
        self.world = world
        self.refusals: list[Refusal] = []
        self.overs: list[tuple[str, bool]] = []
        self.gateway = StreamTunnel(StreamFraming.CAPSULES, is_client=False, hold_bytes=0)
        self.gateway.open()
        self.tunnel: TcpTunnel = world.streams.open(TARGET, self)
        world.run()

    def opened(self) -> None:
        self.events.append("opened")

    def refused(self, refusal: Refusal) -> None:
        self.refusals.append(refusal)

    def over(self, reason: str, *, in_order: bool) -> None:
        self.overs.append((reason, in_order))

    def moved(self, to_socket: int, to_stream: int) -> None:
        pass

    def begin(self) -> None:
        assert self.tunnel.relay is not None
        self.tunnel.relay.begin(self)
        self.world.run()

    def say(self, payload: bytes) -> None:
        assert self.tunnel.relay is not None
        self.tunnel.relay.receive(memoryview(bytearray(HEADROOM_BYTES) + payload), len(payload))
        self.world.run()

    def end(self) -> None:
        assert self.tunnel.relay is not None
        self.tunnel.relay.receive_end()
        self.world.run()


@pytest.fixture
def world() -> TcpWorld:
    world = TcpWorld()
    world.connect()
    return world


def opened(world: TcpWorld) -> Near:
    """One more tunnel that is open and relays."""
    near = Near(world)
    world.say(len(world.requests) - 1, 200)
    near.begin()
    return near


def test_a_tunnel_asks_for_its_target_with_the_token(world: TcpWorld) -> None:
    Near(world)
    request = validate_tunnel_request(world.requests[0].headers)
    assert (request.kind, request.target) == (TunnelKind.TCP, TARGET)
    assert request.authorization == "Bearer secret"


def test_a_tunnel_may_be_asked_for_before_there_is_a_connection() -> None:
    world = TcpWorld()
    near = Near(world)
    assert world.requests == []
    world.connect()
    world.say(0, 200)
    assert near.events == ["opened"]


def test_payload_goes_both_ways(world: TcpWorld) -> None:
    near = opened(world)
    near.say(b"question")
    assert b"".join(near.gateway.receive_body(world.body(0), ended=False)) == b"question"
    world.send(0, near.gateway.send(b"answer"))
    assert near.written == b"answer"


def test_what_comes_before_the_local_side_is_ready_is_held(world: TcpWorld) -> None:
    near = Near(world)
    world.say(0, 200)
    world.send(0, near.gateway.send(b"banner"))
    assert near.written == b""
    near.begin()
    assert near.written == b"banner"


def test_it_is_over_when_the_gateway_has_ended_the_stream(world: TcpWorld) -> None:
    near = opened(world)
    near.end()
    world.send(0, near.gateway.send(b"last"))
    world.send(0, near.gateway.finish())
    assert near.events == ["opened", "finish", "close"]
    assert world.has_ended(0)
    assert near.overs == []
    near.gateway.receive_body(world.body(0), ended=True)
    assert near.gateway.take_end()
    world.send(0, b"", end=True)
    assert near.overs == [("both sides ended it", True)]


def test_a_connection_that_is_lost_before_that_may_have_lost_the_end(world: TcpWorld) -> None:
    near = opened(world)
    near.end()
    world.send(0, near.gateway.finish())
    world.gateway.close(world.requests[0].connection, H3_NO_ERROR, "", world.now)
    world.run()
    assert near.overs == [("the connection to the gateway was lost", False)]


@pytest.mark.parametrize("ended", [True, False])
def test_a_refusal_is_explained_and_frees_the_stream(ended: bool) -> None:
    world = TcpWorld(streams=1)
    world.connect()
    near, waiting = Near(world), Near(world)
    assert len(world.requests) == 1
    world.say(0, 403, end=ended, error="http_request_denied", rule="r 1")
    assert [refusal.status for refusal in near.refusals] == [403]
    assert "'r 1'" in near.refusals[0].explanation
    assert near.refusals[0].proxy_status == 'gw; error=http_request_denied; toppy-rule="r 1"'
    if not ended:
        world.gateway.send_body(
            world.requests[0].connection, world.requests[0].stream_id, b"", end=True
        )
        world.run()
    world.say(1, 200)
    assert waiting.events == ["opened"]


@pytest.mark.parametrize("status", [204, 205, 206, 302, 404])
def test_an_answer_that_opens_nothing_is_a_refusal(world: TcpWorld, status: int) -> None:
    near = Near(world)
    world.say(0, status, end=True)
    assert [refusal.status for refusal in near.refusals] == [status]
    assert near.events == []


def test_a_stream_that_is_reset_resets_the_local_side(world: TcpWorld) -> None:
    near = opened(world)
    request = world.requests[0]
    world.gateway.abort_stream(request.connection, request.stream_id, RESET_CODE)
    world.run()
    assert near.events[-1] == "reset"
    assert near.overs == [("the target or the gateway broke it off", False)]


def test_a_local_reset_resets_the_stream(world: TcpWorld) -> None:
    near = opened(world)
    assert near.tunnel.relay is not None
    near.tunnel.relay.receive_failure("Connection reset by peer")
    world.run()
    assert world.aborts(0) == {RESET_CODE}
    assert near.overs == [("Connection reset by peer", False)]


def test_given_up_it_is_reset_and_nothing_is_called_back(world: TcpWorld) -> None:
    near = opened(world)
    near.tunnel.close()
    near.tunnel.close()
    world.run()
    assert world.aborts(0) == {RESET_CODE}
    assert near.overs == []
    assert near.events[-1] == "reset"


def test_given_up_while_it_waits_it_is_never_asked_for() -> None:
    world = TcpWorld()
    near = Near(world)
    near.tunnel.close()
    world.connect()
    assert world.requests == []


@pytest.mark.parametrize("data", [b"\x00\x01x", b"\xff" * 20])
def test_a_gateway_that_breaks_the_protocol_ends_the_tunnel_alone(
    world: TcpWorld, data: bytes
) -> None:
    bad, good = opened(world), opened(world)
    world.send(0, data, end=True)
    assert [in_order for _, in_order in bad.overs] == [False]
    assert bad.events[-1] == "reset"
    assert good.overs == []
    assert world.lost == []


def test_trailers_end_the_tunnel(world: TcpWorld) -> None:
    near = opened(world)
    request = world.requests[0]
    world.gateway.send_headers(request.connection, request.stream_id, [(b"x-trailer", b"1")])
    world.run()
    assert near.overs == [("the gateway broke the protocol", False)]


def test_why_the_gateway_ends_a_tunnel_is_told(world: TcpWorld) -> None:
    near = opened(world)
    said = encode_proxy_status("gw", error="http_request_denied", details="no more", rule="r")
    world.send(0, encode_tunnel_closed(said), end=True)
    ((reason, in_order),) = near.overs
    assert reason.startswith("403: no more (rule 'r'); ")
    assert not in_order
    assert near.events[-1] == "reset"


def test_a_newer_token_is_sent_on_open_tunnels_and_used_for_new_ones(world: TcpWorld) -> None:
    near = opened(world)
    asked = Near(world)
    world.streams.set_authorization("newer")
    world.run()
    assert encode_authorization("newer") in world.body(0)
    assert world.body(1) == b""  # it is not open yet
    world.say(1, 200)
    assert encode_authorization("newer") in world.body(1)
    world.streams.set_authorization("newer")
    Near(world)
    assert world.body(0).count(b"newer") == 1
    assert validate_tunnel_request(world.requests[2].headers).authorization == "Bearer newer"
    assert (near.overs, asked.overs) == ([], [])


def test_a_newer_token_is_sent_also_when_only_the_answer_is_still_to_come(world: TcpWorld) -> None:
    near = opened(world)
    near.say(b"question")
    near.end()
    world.streams.set_authorization("newer")
    world.run()
    assert encode_authorization("newer") in world.body(0)
    pieces = near.gateway.receive_body(world.body(0), ended=False)
    assert (b"".join(pieces), near.gateway.authorization) == (b"question", "newer")


def test_new_tunnels_go_to_the_new_connection_and_open_ones_stay(world: TcpWorld) -> None:
    old = opened(world)
    world.send(0, encode_wrap_up())
    assert world.leaves == 1
    waiting = Near(world)
    assert len(world.requests) == 1
    world.connect()
    world.say(1, 200)
    assert world.requests[1].connection != world.requests[0].connection
    assert waiting.events == ["opened"]
    world.pass_time(10)
    assert world.deserted == []
    world.send(0, old.gateway.send(b"still here"))
    assert old.written == b"still here"


def test_an_old_connection_is_left_when_the_gateway_has_ended_the_last_stream(
    world: TcpWorld,
) -> None:
    near = opened(world)
    world.connect()
    near.end()
    world.send(0, near.gateway.finish())
    assert near.events[-1] == "close"
    world.pass_time(10)
    assert world.deserted == []  # the last bytes may still be on their way
    world.send(0, b"", end=True)
    world.pass_time(1)
    assert len(world.deserted) == 1
    assert near.overs == [("both sides ended it", True)]


def test_a_request_that_the_gateway_rejects_unread_goes_to_the_next_connection(
    world: TcpWorld,
) -> None:
    world.gateway.send_goaway(
        next(e.connection for e in world.events if not isinstance(e, HeadersReceived))
    )
    near = Near(world)
    world.run()
    assert near.refusals == []
    assert world.leaves == 1
    world.connect()
    world.say(0, 200)
    assert near.events == ["opened"]


def test_a_lost_connection_ends_open_tunnels_and_asks_again_for_the_others(
    world: TcpWorld,
) -> None:
    near, asked = opened(world), Near(world)
    world.gateway.close(world.requests[0].connection, H3_NO_ERROR, "gone", world.now)
    world.run()
    assert near.overs == [("the connection to the gateway was lost", False)]
    assert near.events[-1] == "reset"
    world.connect()
    world.say(2, 200)
    assert asked.events == ["opened"]


def test_one_that_was_just_opened_is_not_asked_for_again(world: TcpWorld) -> None:
    near = Near(world)
    world.say(0, 200)
    world.gateway.close(world.requests[0].connection, H3_NO_ERROR, "gone", world.now)
    world.run()
    assert near.overs == [("the connection to the gateway was lost", False)]
    world.connect()
    assert len(world.requests) == 1


def test_udp_and_tcp_share_the_connection_and_its_streams() -> None:
    world = TcpWorld(streams=1)
    world.connect()
    local = Local()
    world.tunnels.add(local.tunnel)
    world.run()
    near = Near(world)
    assert len(world.requests) == 1
    world.tunnels.remove(local.tunnel)
    world.run()
    request = world.requests[0]
    world.gateway.abort_stream(request.connection, request.stream_id, H3_NO_ERROR)
    world.run()
    world.say(1, 200)
    assert near.events == ["opened"]


def test_a_thousand_tunnels_leave_nothing_behind(world: TcpWorld) -> None:
    for number in range(1000):
        near = opened(world)
        near.end()
        world.send(number, near.gateway.finish())
        world.send(number, b"", end=True)
        assert near.overs == [("both sides ended it", True)]
        world.events.clear()
    assert len(world.streams) == 0
