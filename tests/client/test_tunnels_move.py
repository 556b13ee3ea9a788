"""Tunnels that move to a new connection: nothing lost, doubled or out of order."""

from __future__ import annotations

import pytest

from tests.client.world import Local, World
from toppy.client.tunnels import (
    ANSWERS_MOST_S,
    ANSWERS_QUIET_S,
    HOLD_DATAGRAMS,
    LINGER_MOST_S,
    LINGER_QUIET_S,
    MOVE_HOLD_BYTES,
    MOVE_HOLD_DATAGRAMS,
    MOVE_HOLD_LEAST_S,
    MOVE_HOLD_MOST_S,
)
from toppy.model.drop_reason import DropReason
from toppy.protocol.udp_tunnel import encode_datagram_capsules
from toppy.quic.endpoint import BodyReceived, HeadersReceived, StreamAborted
from toppy.quic.engine import ConnectionClosed
from toppy.quic.h3 import H3_NO_ERROR, H3_REQUEST_CANCELLED, H3_REQUEST_REJECTED
from toppy.wire.capsule import (
    BARRIER_FIELD,
    encode_barrier,
    encode_tunnel_closed,
    encode_wrap_up,
)
from toppy.wire.connect_udp import response_headers
from toppy.wire.proxy_status import encode_proxy_status

REFUSED = encode_proxy_status("gw", error="http_request_denied", details="not any more", rule="r")


class Moving(World):
    """A client with open tunnels."""

    def __init__(self, tunnels: int = 1, *, streams: int = 10) -> None:
        super().__init__(streams=streams)
        self.connect()
        self.locals = [Local() for _ in range(tunnels)]
        for local in self.locals:
            self.tunnels.add(local.tunnel)
            self.run()
            self.accept()

    @property
    def local(self) -> Local:
        return self.locals[0]

    def goaway(self, request: HeadersReceived | None = None) -> None:
        self.gateway.send_goaway((request or self.requests[-1]).connection)
        self.run()

    def say(self, payload: bytes) -> None:
        self.tunnels.send(self.local.tunnel, payload, 0)

    def reply(self, request: HeadersReceived, payload: bytes) -> None:
        self.gateway.engine.send_datagrams(request.connection, request.stream_id // 4, payload, 0)

    def answer(self, request: HeadersReceived) -> None:
        """Open a tunnel up to the point where the client has the answer."""
        self.gateway.send_headers(request.connection, request.stream_id, response_headers(200))
        for data, size, _ in self.gateway.poll_transmits(self.now):
            self.client.receive(data, size, ("192.0.2.1", 4433), self.now)
        self._pump_client()

    def refuse(self, request: HeadersReceived, status: int) -> None:
        self.gateway.send_headers(
            request.connection,
            request.stream_id,
            response_headers(status, proxy_status=REFUSED),
            end=True,
        )
        self.run()

    def ended(self, request: HeadersReceived) -> bool:
        """Whether the client has sent FIN on a request."""
        return any(
            isinstance(e, BodyReceived)
            and e.ended
            and (e.connection, e.stream_id) == (request.connection, request.stream_id)
            for e in self.events
        )


@pytest.fixture
def world() -> Moving:
    return Moving()


def test_goaway_asks_for_a_new_connection_once_while_the_old_one_relays(world: Moving) -> None:
    world.goaway()
    world.goaway()
    assert world.leaves == 1
    world.say(b"still here")
    world.run()
    assert world.arrived == [b"still here"]


def test_wrap_up_alone_asks_for_a_new_connection(world: Moving) -> None:
    request = world.requests[0]
    world.gateway.send_body(request.connection, request.stream_id, encode_wrap_up())
    world.run()
    assert world.leaves == 1
    world.connect()
    world.accept()
    world.say(b"moved")
    world.run()
    assert world.arrived == [b"moved"]
    assert world.leaves == 1


def test_until_the_new_connection_answers_the_old_one_carries_everything(world: Moving) -> None:
    world.goaway()
    world.connect()
    assert len(world.requests) == 2
    world.say(b"by the old way")
    world.run()
    assert world.arrived == [b"by the old way"]
    world.reply(world.requests[0], b"back by the old way")
    world.run()
    assert world.local.received == [b"back by the old way"]


def test_payloads_wait_for_those_under_way_and_then_follow_in_order(world: Moving) -> None:
    world.goaway()
    world.connect()
    world.say(b"1")
    world.answer(world.requests[1])
    world.say(b"2")
    world.say(b"3")
    world.now += MOVE_HOLD_LEAST_S / 2
    world.tunnels.handle_timeout(world.now)
    assert world.local.tunnel.datagrams_to_gateway == 1
    world.run()
    world.say(b"4")
    world.run()
    assert world.arrived == [b"1", b"2", b"3", b"4"]
    assert world.local.tunnel.datagrams_to_gateway == 4
    assert world.tunnels.drops == {}


def test_the_wait_is_two_round_trips_of_the_old_connection(
    world: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.goaway()
    world.connect()
    monkeypatch.setattr(world.client.engine, "round_trip_s", lambda connection: 0.25)
    world.answer(world.requests[1])
    world.say(b"x")
    world.tunnels.handle_timeout(world.now + 0.49)
    assert world.local.tunnel.datagrams_to_gateway == 0
    world.tunnels.handle_timeout(world.now + 0.51)
    assert world.local.tunnel.datagrams_to_gateway == 1


def test_replies_are_taken_from_both_ways_until_the_old_one_is_quiet(world: Moving) -> None:
    old = world.requests[0]
    world.goaway()
    world.connect()
    world.accept()
    for _ in range(3):
        world.pass_time(LINGER_QUIET_S - 0.3)
        world.reply(old, b"old")
        world.reply(world.requests[1], b"new")
        world.run()
    assert world.local.received == [b"old", b"new"] * 3
    assert not world.ended(old)
    world.pass_time(LINGER_QUIET_S + 0.1)
    assert world.ended(old)


def test_capsules_of_the_old_way_are_delivered_too(world: Moving) -> None:
    old = world.requests[0]
    world.goaway()
    world.connect()
    world.accept()
    capsule = encode_datagram_capsules(bytes(20_000), 0)
    world.gateway.send_body(old.connection, old.stream_id, capsule)
    world.run()
    assert world.local.received == [bytes(20_000)]


def test_an_old_way_that_never_falls_quiet_is_ended_all_the_same(world: Moving) -> None:
    old = world.requests[0]
    world.goaway()
    world.connect()
    world.accept()
    for _ in range(int(LINGER_MOST_S / 0.5)):
        assert not world.ended(old)
        world.reply(old, b"chatter")
        world.pass_time(0.5)
    world.pass_time(0.1)
    assert world.ended(old)
    assert world.local.ends == []


def test_the_old_connection_is_closed_without_an_error_once_the_last_tunnel_has_left() -> None:
    world = Moving(tunnels=2)
    first = world.requests[0].connection
    world.goaway()
    world.connect()
    world.accept(2)
    world.pass_time(LINGER_QUIET_S + 0.2)
    assert world.deserted == []
    world.accept(3)
    world.pass_time(LINGER_QUIET_S + 0.2)
    (closed,) = world.of(ConnectionClosed)
    assert isinstance(closed, ConnectionClosed)
    assert (closed.connection, closed.error_code) == (first, H3_NO_ERROR)
    assert len(world.deserted) == 1


def test_a_connection_without_tunnels_is_left_at_once() -> None:
    world = Moving(tunnels=0)
    connection = world.client_connection
    world.gateway.send_goaway(next(iter(world.gateway._sessions)))
    world.run()
    world.connect()
    world.pass_time(0.2)
    assert world.deserted == [connection]


def test_moves_that_overlap_keep_order_and_lose_nothing(world: Moving) -> None:
    said = []
    for move in range(3):
        for index in range(20):
            said.append(b"%d-%d" % (move, index))
            world.say(said[-1])
        world.goaway()
        world.connect()
        for index in range(20, 30):
            said.append(b"%d-%d" % (move, index))
            world.say(said[-1])
        world.answer(world.requests[-1])
    said.append(b"last")
    world.say(b"last")
    world.run()
    assert world.arrived == said
    assert len(world.local.tunnel.leaving) == 3
    for index, request in enumerate(world.requests):
        world.reply(request, b"%d" % index)
    world.run()
    assert sorted(world.local.received) == [b"0", b"1", b"2", b"3"]
    world.pass_time(2 * LINGER_QUIET_S)
    assert len(world.deserted) == 3
    assert world.tunnels.drops == {}
    assert world.local.ends == []


def test_a_request_that_the_next_move_overtakes_is_abandoned_and_asked_again(
    world: Moving,
) -> None:
    world.goaway()
    world.connect()
    world.goaway()
    assert world.leaves == 2
    world.connect()
    assert len(world.requests) == 3
    aborted = world.of(StreamAborted)
    assert {(e.connection, e.error_code) for e in aborted if isinstance(e, StreamAborted)} == {
        (world.requests[1].connection, H3_REQUEST_CANCELLED)
    }
    world.say(b"first way")
    world.run()
    world.accept()
    world.say(b"third way")
    world.run()
    assert world.arrived == [b"first way", b"third way"]
    assert len(world.deserted) == 1


def test_a_tunnel_that_was_not_answered_yet_is_asked_for_on_the_new_connection() -> None:
    world, local = World(), Local()
    world.connect()
    world.tunnels.add(local.tunnel)
    world.tunnels.send(local.tunnel, b"patient", 0)
    world.run()
    world.gateway.send_goaway(world.requests[0].connection)
    world.run()
    world.connect()
    assert len(world.requests) == 2
    world.accept()
    assert world.arrived == [b"patient"]
    assert local.ends == []


def test_a_tunnel_opened_during_a_move_goes_to_the_new_connection_at_once(world: Moving) -> None:
    world.goaway()
    late = Local()
    world.tunnels.add(late.tunnel)
    world.tunnels.send(late.tunnel, b"late", 0)
    world.run()
    assert len(world.requests) == 1
    world.connect()
    assert len(world.requests) == 3
    world.accept(2)
    assert world.arrived == [b"late"]


def test_a_rejected_request_is_asked_again_on_the_new_connection(world: Moving) -> None:
    late = Local()
    world.tunnels.add(late.tunnel)
    world.gateway.send_goaway(world.requests[0].connection)
    world.run()
    assert len(world.requests) == 1
    assert late.ends == []
    assert world.leaves == 1
    world.connect()
    world.accept(2)
    world.tunnels.send(late.tunnel, b"late", 0)
    world.run()
    assert world.arrived == [b"late"]


def test_a_rejection_without_goaway_asks_for_a_new_connection_too(world: Moving) -> None:
    late = Local()
    world.tunnels.add(late.tunnel)
    world.run()
    request = world.requests[1]
    world.gateway.abort_stream(request.connection, request.stream_id, H3_REQUEST_REJECTED)
    world.run()
    assert world.leaves == 1
    assert len(world.requests) == 2
    world.connect()
    assert len(world.requests) == 4
    assert late.ends == []


def test_a_tunnel_refused_on_the_new_connection_ends_with_the_refusal(world: Moving) -> None:
    world.goaway()
    world.connect()
    world.refuse(world.requests[1], 403)
    (refusal,) = world.local.ends
    assert refusal is not None
    assert refusal.status == 403
    assert "not any more" in refusal.explanation
    assert world.ended(world.requests[0])
    world.run()
    assert len(world.deserted) == 1


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_new_gateway_that_is_not_ready_does_not_take_away_what_works(
    world: Moving, status: int
) -> None:
    world.goaway()
    world.connect()
    world.refuse(world.requests[1], status)
    world.say(b"by the old way")
    world.run()
    assert world.local.ends == []
    world.tunnels.retry_waiting()
    world.run()
    world.accept()
    world.say(b"by the new way")
    world.run()
    assert world.arrived == [b"by the old way", b"by the new way"]


def test_when_the_old_connection_is_lost_first_payloads_wait_for_the_new_one(
    world: Moving,
) -> None:
    world.goaway()
    world.connect()
    world.gateway.close(world.requests[0].connection, H3_NO_ERROR, "gone", world.now)
    world.run()
    assert world.lost == ["gone"]
    world.say(b"waiting")
    world.run()
    assert world.arrived == []
    world.accept()
    assert world.arrived == [b"waiting"]
    assert world.local.ends == []


def test_when_the_new_connection_is_lost_what_was_held_goes_to_the_next(world: Moving) -> None:
    world.goaway()
    world.connect()
    world.answer(world.requests[1])
    world.say(b"held")
    world.tunnels.disconnected(world.client_connection)
    world.say(b"after")
    world.connect()
    world.accept()
    assert world.arrived == [b"held", b"after"]


def test_when_the_gateway_ends_the_old_way_during_a_move_the_tunnel_lives_on(
    world: Moving,
) -> None:
    old = world.requests[0]
    world.goaway()
    world.gateway.send_body(old.connection, old.stream_id, b"", end=True)
    world.run()
    world.say(b"waiting")
    world.connect()
    world.accept()
    assert world.arrived == [b"waiting"]
    assert world.local.ends == []


def test_when_the_gateway_ends_a_way_that_was_left_nothing_happens(world: Moving) -> None:
    old = world.requests[0]
    world.goaway()
    world.connect()
    world.accept()
    world.gateway.abort_stream(old.connection, old.stream_id, 0x10C)
    world.run()
    world.say(b"x")
    world.run()
    assert world.arrived == [b"x"]
    assert world.local.ends == []
    assert len(world.deserted) == 1


def test_beyond_the_new_connections_stream_limit_tunnels_stay_where_they_are() -> None:
    world = Moving(tunnels=2, streams=2)
    world.goaway()
    blocker = [Local(), Local()]
    world.tunnels._tunnels = {
        **{local.tunnel: None for local in blocker},
        **world.tunnels._tunnels,
    }
    world.connect()
    assert len(world.requests) == 4
    world.say(b"by the old way")
    world.run()
    assert world.arrived == [b"by the old way"]
    world.tunnels.remove(blocker[0].tunnel)
    world.run()
    world.tunnels.retry_waiting()
    world.run()
    assert len(world.requests) == 5


def test_what_is_held_while_moving_is_bounded_and_counted(world: Moving) -> None:
    world.goaway()
    world.connect()
    world.answer(world.requests[1])
    for _ in range(MOVE_HOLD_DATAGRAMS + 5):
        world.say(b"x")
    assert world.tunnels.drops == {DropReason.NO_CONNECTION: 5}
    world.run()
    assert len(world.arrived) == MOVE_HOLD_DATAGRAMS > HOLD_DATAGRAMS


def test_bytes_held_while_moving_are_bounded(world: Moving) -> None:
    world.goaway()
    world.connect()
    world.answer(world.requests[1])
    for _ in range(MOVE_HOLD_BYTES // 10_000 + 2):
        world.say(bytes(10_000))
    assert world.tunnels.drops == {DropReason.NO_CONNECTION: 2}


def test_what_a_new_connections_queue_has_no_room_for_waits_in_order(world: Moving) -> None:
    world.goaway()
    world.connect()
    world.answer(world.requests[1])
    said = [b"%06d" % number + bytes(994) for number in range(4000)]
    for payload in said:
        world.say(payload)
    world.run()
    assert world.arrived == said
    assert world.client.take_drops() == world.tunnels.drops == {}
    world.say(b"direct")
    assert world.local.tunnel.datagrams_to_gateway == len(said) + 1


def test_nothing_overtakes_what_the_old_way_has_not_even_sent(
    world: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = world.local.tunnel.current
    assert old is not None
    waiting = {old.connection: 1000}
    monkeypatch.setattr(
        world.client.engine,
        "datagram_backlog_bytes",
        lambda connection, quarter: waiting.get(connection, 0),
    )
    world.goaway()
    world.connect()
    world.answer(world.requests[1])
    world.say(b"x")
    for _ in range(20):
        world.now += MOVE_HOLD_LEAST_S
        world.tunnels.handle_timeout(world.now)
    assert world.local.tunnel.datagrams_to_gateway == 0
    waiting.clear()
    world.now += MOVE_HOLD_LEAST_S / 2
    world.tunnels.handle_timeout(world.now)
    assert world.local.tunnel.datagrams_to_gateway == 0, "it has just been sent"
    world.now += MOVE_HOLD_LEAST_S
    world.tunnels.handle_timeout(world.now)
    assert world.local.tunnel.datagrams_to_gateway == 1


def test_the_barrier_is_asked_for_once_everything_before_it_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, local = World(), Local()
    world.connect()
    world.tunnels.add(local.tunnel)
    world.run()
    first = world.requests[0]
    with_barrier = [*response_headers(200), BARRIER_FIELD]
    world.gateway.send_headers(first.connection, first.stream_id, with_barrier)
    world.run()
    old = local.tunnel.current
    assert old is not None
    waiting = {old.connection: 1000}
    monkeypatch.setattr(
        world.client.engine,
        "datagram_backlog_bytes",
        lambda connection, quarter: waiting.get(connection, 0),
    )
    world.gateway.send_goaway(first.connection)
    world.run()
    world.connect()
    second = world.requests[1]
    world.gateway.send_headers(second.connection, second.stream_id, with_barrier)
    for _ in range(20):
        world.step()
    world.tunnels.send(local.tunnel, b"x", 0)
    assert encode_barrier() not in bodies(world)
    waiting.clear()
    for _ in range(20):
        world.step()
    assert encode_barrier() in bodies(world)
    assert world.arrived == []
    world.gateway.send_body(first.connection, first.stream_id, encode_barrier())
    world.run()
    assert world.arrived == [b"x"]


def moved_with_barriers(questions: int) -> tuple[Moving, Local, list[HeadersReceived]]:
    """A tunnel that has asked so often, has moved, and has both barriers back."""
    world, local = Moving(0), Local()
    world.tunnels.add(local.tunnel)
    world.run()
    requests = world.requests
    with_barrier = [*response_headers(200), BARRIER_FIELD]
    world.gateway.send_headers(requests[0].connection, requests[0].stream_id, with_barrier)
    world.run()
    for _ in range(questions):
        world.tunnels.send(local.tunnel, b"?", 0)
    world.run()
    world.gateway.send_goaway(requests[0].connection)
    world.run()
    world.connect()
    world.gateway.send_headers(requests[1].connection, requests[1].stream_id, with_barrier)
    world.run()
    barriers = encode_barrier() + encode_barrier()
    world.gateway.send_body(requests[0].connection, requests[0].stream_id, barriers)
    return world, local, requests


def test_answers_by_the_new_way_wait_for_those_that_the_target_owes() -> None:
    world, local, (old, new) = moved_with_barriers(questions=2)
    world.reply(old, b"first")
    world.reply(new, b"third")
    world.step()
    assert local.received == [b"first"]
    world.reply(old, b"second")
    world.step()
    assert local.received == [b"first", b"second", b"third"]


def test_a_target_that_owes_nothing_is_not_waited_for() -> None:
    world, local, (old, new) = moved_with_barriers(questions=1)
    world.reply(old, b"first")
    world.step()
    world.reply(new, b"second")
    world.step()
    assert local.received == [b"first", b"second"]


def test_a_target_that_never_answers_is_waited_for_until_the_old_way_is_quiet() -> None:
    world, local, (_, new) = moved_with_barriers(questions=1)
    world.step()
    world.reply(new, b"by itself")
    world.step()
    assert local.received == []
    world.now += ANSWERS_QUIET_S
    world.step()
    assert local.received == [b"by itself"]


def test_a_target_that_never_falls_quiet_is_waited_for_a_moment() -> None:
    world, local, (old, new) = moved_with_barriers(questions=100)
    world.step()
    world.reply(new, b"new")
    for _ in range(int(ANSWERS_MOST_S / 0.01) - 2):
        world.now += 0.01
        world.reply(old, b"old")
        world.step()
        assert b"new" not in local.received
    for _ in range(4):
        world.now += 0.01
        world.reply(old, b"old")
        world.step()
    assert b"new" in local.received


def bodies(world: World) -> bytes:
    """What has arrived at the gateway on all streams."""
    return b"".join(e.data for e in world.events if isinstance(e, BodyReceived))


def test_an_old_way_that_never_sends_what_it_was_given_is_not_waited_for(
    world: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = world.local.tunnel.current
    assert old is not None
    monkeypatch.setattr(
        world.client.engine,
        "datagram_backlog_bytes",
        lambda connection, quarter: 1000 if connection == old.connection else 0,
    )
    world.goaway()
    world.connect()
    world.accept()
    world.say(b"x")
    world.pass_time(MOVE_HOLD_MOST_S + 0.1)
    assert world.arrived == [b"x"]


def test_an_old_connection_lost_while_it_is_waited_for_holds_nothing_up(
    world: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = world.local.tunnel.current
    assert old is not None
    monkeypatch.setattr(
        world.client.engine,
        "datagram_backlog_bytes",
        lambda connection, quarter: 1000 if connection == old.connection else 0,
    )
    world.goaway()
    world.connect()
    world.answer(world.requests[1])
    world.say(b"x")
    world.tunnels.disconnected(old.connection)
    world.run()
    assert world.arrived == [b"x"]


def test_a_tunnel_removed_during_its_move_is_ended_on_both_ways(world: Moving) -> None:
    world.goaway()
    world.connect()
    world.accept()
    world.tunnels.remove(world.local.tunnel)
    world.run()
    assert world.ended(world.requests[0])
    assert world.ended(world.requests[1])
    assert len(world.deserted) == 1
    assert world.local.ends == []


def test_a_tunnel_that_the_gateway_cuts_ends_with_the_reason(world: Moving) -> None:
    request = world.requests[0]
    world.gateway.send_body(
        request.connection, request.stream_id, encode_tunnel_closed(REFUSED), end=True
    )
    world.run()
    (refusal,) = world.local.ends
    assert refusal is not None
    assert refusal.status == 403
    assert "not any more (rule 'r')" in refusal.explanation
    assert world.ended(request)


@pytest.mark.parametrize(
    ("said", "status"),
    [("gw; error=connection_limit_reached", 503), ("gw; error=unheard_of", 403), ("", 403)],
)
def test_the_status_of_a_cut_is_that_of_its_error_type(
    world: Moving, said: str, status: int
) -> None:
    request = world.requests[0]
    world.gateway.send_body(request.connection, request.stream_id, encode_tunnel_closed(said))
    world.run()
    (refusal,) = world.local.ends
    assert refusal is not None
    assert refusal.status == status


def test_a_cut_during_a_move_ends_the_tunnel_on_both_connections(world: Moving) -> None:
    old = world.requests[0]
    world.goaway()
    world.connect()
    world.gateway.send_body(old.connection, old.stream_id, encode_tunnel_closed(REFUSED), end=True)
    world.run()
    assert len(world.local.ends) == 1
    assert any(
        isinstance(e, StreamAborted) and e.connection == world.requests[1].connection
        for e in world.events
    )
