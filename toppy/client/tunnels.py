"""The client's tunnels: asked for on the newest connection to the gateway, moved there without a
gap when the gateway sends its clients away, asked for again when a connection is lost.

No sockets and no clock here; the session gives it endpoint events and the time, and it calls back.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable

from toppy.client.tunnel import ClientTunnel, Leg, Refusal
from toppy.errors import PeerError
from toppy.model.drop_reason import DropReason
from toppy.protocol.udp_tunnel import Buffer, count_payloads, encode_datagram_capsules
from toppy.quic.endpoint import (
    BodyReceived,
    Endpoint,
    EndpointEvent,
    GoawayReceived,
    HeadersReceived,
    StreamAborted,
)
from toppy.quic.engine import StreamsAvailable
from toppy.quic.h3 import H3_CONNECT_ERROR, H3_REQUEST_CANCELLED, H3_REQUEST_REJECTED
from toppy.wire.capsule import (
    BARRIER_FIELD,
    MOST_BARRIERS,
    RENEWAL_FIELD,
    encode_authorization,
    encode_barrier,
)
from toppy.wire.connect_udp import expand_template, request_headers
from toppy.wire.proxy_status import explain, parse_proxy_status, recommended_status

HOLD_DATAGRAMS = 256
"""Payloads that wait per tunnel until the gateway has answered, or is back."""
HOLD_BYTES = 1 << 20
MOVE_HOLD_DATAGRAMS = 16_384
"""Payloads that wait per tunnel while it moves: 20,000 a second for most of a second; as many of
the smallest as the engine's queue takes."""
MOVE_HOLD_BYTES = 16 << 20
MOVE_HOLD_LEAST_S = 0.005
MOVE_HOLD_MOST_S = 1.0
"""However long the old way takes to empty."""
ANSWERS_QUIET_S = 0.02
"""A target that has not given one answer for each question may be about to: so long after the last
thing that came by the old way, answers by the new one wait for it."""
ANSWERS_MOST_S = 0.1
"""However much still comes by the old way."""
LINGER_QUIET_S = 1.0
"""A leg that was left is ended when nothing arrived for so long: longer than any reply takes."""
LINGER_MOST_S = 5.0
DESERTED_GRACE_S = 0.1
"""Before a connection that the last tunnel has left is closed: its last words get out first."""
_QUEUE_BYTES = 1 << 19
"""Up to here the engine's queue of a tunnel is filled with held payloads: half of what it takes."""
_LOOK_INTERVAL_S = 0.002
"""Between two looks at how far the engine has got."""
_CAPSULE_QUEUE_BYTES = 1 << 20
NO_CAPSULES = (204, 205, 206)
"""With the Capsule Protocol these are malformed (RFC 9297 section 3.2)."""


class Tunnels:
    """All tunnels of one client.

    ``deliver(payloads, segment_size)`` of a tunnel is called with what its target sent; ``ended``
    once, with the refusal, or None when an open tunnel was ended by the gateway. ``on_leave`` is
    called once per connection when the gateway wants its client to go elsewhere: then a new
    connection is to be made, and told with ``connected``, while the old one goes on.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        template: str,
        authorization: str | None,
        on_leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._endpoint = endpoint
        self._engine = endpoint.engine
        self._template = template
        self._authorization = authorization
        self._on_leave = on_leave
        self._connection: int | None = None
        self._is_departing = False
        """The current connection takes no new requests."""
        self._old: set[int] = set()
        """Earlier connections that are still there."""
        self._deserted: list[int] = []
        self._capsules_only: set[int] = set()
        self._tunnels: dict[ClientTunnel, None] = {}
        self._legs: dict[tuple[int, int], Leg] = {}
        """By connection and stream ID."""
        self._legs_of: Counter[int] = Counter()
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._timer_count = 0
        self.drops: dict[DropReason, int] = {}

    def add(self, tunnel: ClientTunnel) -> None:
        """Open ``tunnel`` now, or as soon as there is a connection."""
        self._tunnels[tunnel] = None
        self._ask(tunnel)

    def remove(self, tunnel: ClientTunnel) -> None:
        """Close ``tunnel``; nothing is called back."""
        if tunnel not in self._tunnels:
            return
        self._close(tunnel)
        self.retry_waiting()

    @property
    def connection(self) -> int | None:
        """The one that takes requests now; None: the next will be told to ``connected``."""
        return None if self._is_departing else self._connection

    def keep(self, connection: int) -> None:
        """Something else than these tunnels needs a connection, until ``unkeep``."""
        self._legs_of[connection] += 1

    def unkeep(self, connection: int) -> None:
        """It does no more."""
        if connection in self._legs_of:
            self._legs_of[connection] -= 1
            self._watch_deserted(connection)

    def leave(self, connection: int) -> None:
        """The gateway wants this connection to be left."""
        self._leave(connection)

    def set_authorization(self, token: str) -> None:
        """Use a newer token: for requests from now on, and for the tunnels that are open, which
        then live as long as it does.
        """
        self._authorization = token
        for leg in self._legs.values():
            self._renew(leg)

    def _renew(self, leg: Leg) -> None:
        token = self._authorization
        if token is None or not leg.takes_renewal or leg.authorization == token:
            return
        if leg in leg.tunnel.leaving:
            return
        leg.authorization = token
        capsule = encode_authorization(token)
        self._endpoint.send_body(leg.connection, leg.stream_id, capsule)

    def connected(self, connection: int) -> None:
        """A connection is ready: ask for every tunnel on it. Those that are open on an earlier one
        move when the answer is there.
        """
        if self._connection is not None:
            self._old.add(self._connection)
            self._watch_deserted(self._connection)
        self._connection = connection
        self._is_departing = False
        if not self._endpoint.may_send_datagrams(connection):
            self._capsules_only.add(connection)
        for tunnel in self._tunnels:
            for leg in (tunnel.next, tunnel.current):
                if leg is not None and not leg.is_open:
                    self._say_goodbye(leg)
        self.retry_waiting()

    def disconnected(self, connection: int) -> None:
        """A connection is gone: tunnels that have no other wait for the next one, and hold what
        they are given.
        """
        if connection == self._connection:
            self._connection = None
        self._old.discard(connection)
        self._capsules_only.discard(connection)
        for leg in [leg for leg in self._legs.values() if leg.connection == connection]:
            self._forget(leg)
        del self._legs_of[connection]
        self.retry_waiting()

    def take_deserted(self) -> list[int]:
        """Earlier connections that the last tunnel has left: close them."""
        deserted, self._deserted = self._deserted, []
        return deserted

    def _watch_deserted(self, connection: int) -> None:
        """Have an earlier connection closed when the last tunnel has left it."""

        def look(now: float) -> None:
            if connection in self._old and not self._legs_of[connection]:
                self._old.discard(connection)
                self._deserted.append(connection)

        if connection in self._old and not self._legs_of[connection]:
            self._call_at(0.0, lambda now: self._call_at(now + DESERTED_GRACE_S, look))

    def next_timeout(self) -> float | None:
        """When ``handle_timeout`` is to be called next."""
        return self._timers[0][0] if self._timers else None

    def handle_timeout(self, now: float) -> None:
        """Do what was due by ``now``."""
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2](now)

    def send(self, tunnel: ClientTunnel, payloads: Buffer, segment_size: int) -> None:
        """Payloads of the local peer, on their way to the target."""
        leg = tunnel.current
        if leg is not None and leg.is_open and tunnel.hold_until is None:
            self._send(leg, payloads, segment_size)
            return
        is_moving = tunnel.hold_until is not None
        dropped = tunnel.held.hold(
            payloads,
            segment_size,
            max_datagrams=MOVE_HOLD_DATAGRAMS if is_moving else HOLD_DATAGRAMS,
            max_bytes=MOVE_HOLD_BYTES if is_moving else HOLD_BYTES,
        )
        self._drop(DropReason.NO_CONNECTION, dropped)

    def _send(self, leg: Leg, payloads: Buffer, segment_size: int) -> None:
        connection, stream_id = leg.connection, leg.stream_id
        count = count_payloads(len(payloads), segment_size)
        largest = segment_size or len(payloads)
        if connection not in self._capsules_only and largest <= self._engine.max_payload_bytes(
            connection, stream_id // 4
        ):
            self._engine.send_datagrams(connection, stream_id // 4, payloads, segment_size)
        else:
            backlog = self._engine.stream_backlog_bytes(connection, stream_id)
            if backlog + len(payloads) > _CAPSULE_QUEUE_BYTES:
                self._drop(DropReason.CAPSULE_QUEUE_FULL, count)
                return
            capsules = encode_datagram_capsules(payloads, segment_size)
            self._endpoint.send_body(connection, stream_id, capsules)
        leg.sent += count
        leg.tunnel.datagrams_to_gateway += count

    def handle(self, event: EndpointEvent, now: float) -> None:
        """An event of a connection that was told with ``connected``."""
        match event:
            case HeadersReceived(connection=connection, stream_id=stream_id):
                leg = self._legs.get((connection, stream_id))
                if leg is not None and leg.is_open:  # trailers: there are none
                    self._endpoint.abort_stream(connection, stream_id, H3_CONNECT_ERROR)
                    self._lose(leg)
                elif leg is not None:
                    self._receive_response(leg, event, now)
            case BodyReceived(connection=connection, stream_id=stream_id):
                leg = self._legs.get((connection, stream_id))
                if leg is not None:
                    self._receive_body(leg, event, now)
            case StreamAborted(connection=connection, stream_id=stream_id, error_code=error_code):
                leg = self._legs.get((connection, stream_id))
                if leg is not None:
                    self._endpoint.abort_stream(connection, stream_id, H3_REQUEST_CANCELLED)
                    if error_code == H3_REQUEST_REJECTED and not leg.is_open:
                        self._leave(connection)
                    self._lose(leg)
            case GoawayReceived(connection=connection):
                self._leave(connection)
            case StreamsAvailable():
                self.retry_waiting()
            case _:
                pass

    def receive_datagrams(
        self,
        connection: int,
        quarter_stream_id: int,
        payloads: bytes,
        segment_size: int,
        now: float,
    ) -> None:
        """Payloads that arrived in DATAGRAM frames."""
        leg = self._legs.get((connection, quarter_stream_id * 4))
        count = count_payloads(len(payloads), segment_size)
        if leg is None:
            self._drop(DropReason.UNKNOWN_STREAM, count)
            return
        leg.last_heard = now
        leg.received += count
        leg.tunnel.datagrams_from_gateway += count
        self._deliver(leg, payloads, segment_size)
        if leg.answers_due is not None and leg.received >= leg.sent:
            self._hear_all(leg)

    def _deliver(self, leg: Leg, payloads: bytes, segment_size: int) -> None:
        tunnel = leg.tunnel
        if tunnel.leaving and tunnel.is_early(leg):
            dropped = tunnel.arrived.hold(
                payloads,
                segment_size,
                max_datagrams=MOVE_HOLD_DATAGRAMS,
                max_bytes=MOVE_HOLD_BYTES,
            )
            if not dropped:
                return
            self._deliver_arrived(tunnel)  # order is worth less than they are
        tunnel.deliver(payloads, segment_size)

    @staticmethod
    def _deliver_arrived(tunnel: ClientTunnel) -> None:
        for payloads, segment_size in tunnel.arrived.take():
            tunnel.deliver(payloads, segment_size)

    def retry_waiting(self) -> None:
        """Ask for tunnels that found no free stream; call it now and then."""
        for tunnel in self._tunnels:
            self._ask(tunnel)

    def _ask(self, tunnel: ClientTunnel) -> None:
        """Request the tunnel on the current connection, unless it is there already."""
        connection, current = self._connection, tunnel.current
        if connection is None or self._is_departing or tunnel.next is not None:
            return
        if current is not None and current.connection == connection:
            return
        authority, path = expand_template(self._template, tunnel.target)
        headers = request_headers(authority, path, self._authorization)
        stream_id = self._endpoint.send_request(connection, headers)
        if stream_id is None:  # it waits until another tunnel ends
            return
        leg = Leg(tunnel, connection, stream_id, self._authorization)
        self._legs[connection, stream_id] = leg
        self._legs_of[connection] += 1
        if current is None:
            tunnel.current = leg
        else:
            tunnel.next = leg

    def _leave(self, connection: int) -> None:
        if connection == self._connection and not self._is_departing:
            self._is_departing = True
            self._on_leave()

    def _receive_response(self, leg: Leg, event: HeadersReceived, now: float) -> None:
        headers = dict(event.headers)
        status = int(headers[b":status"])
        if 200 <= status < 300 and status not in NO_CAPSULES and not event.ended:
            leg.answers_barrier = headers.get(BARRIER_FIELD[0]) == BARRIER_FIELD[1]
            leg.takes_renewal = headers.get(RENEWAL_FIELD[0]) == RENEWAL_FIELD[1]
            self._renew(leg)
            self._open(leg, now)
            return
        proxy_status = headers.get(b"proxy-status")
        said = parse_proxy_status(proxy_status.decode("ascii", "replace")) if proxy_status else None
        if event.ended:
            self._endpoint.send_body(event.connection, event.stream_id, b"", end=True)
        else:
            self._endpoint.abort_stream(event.connection, event.stream_id, H3_REQUEST_CANCELLED)
        tunnel = leg.tunnel
        is_spare = leg is tunnel.next
        self._forget(leg)
        # a new gateway that is not ready yet does not take away what works
        if not (is_spare and (status == 429 or status >= 500)):
            self._end(tunnel, Refusal(status, explain(status, said)))

    def _open(self, leg: Leg, now: float) -> None:
        tunnel, old = leg.tunnel, leg.tunnel.current
        leg.protocol.open()
        if leg is not tunnel.next or old is None:
            tunnel.hold_until = now
            self._release(tunnel, now)
            return
        tunnel.current, tunnel.next = leg, None
        tunnel.leaving.append(old)
        old.left_at = old.last_heard = now
        old.is_unsent = True
        tunnel.hold_until = max(now, tunnel.hold_until or 0.0)
        self._await_old(old, now)
        self._call_at(now + LINGER_QUIET_S, lambda now: self._end_if_quiet(old, now))

    def _await_old(self, old: Leg, now: float) -> None:
        """Wait until what a leg that was left was given is sent, and then until it is there."""
        tunnel = old.tunnel
        if tunnel.hold_until is None:
            return
        if old not in tunnel.leaving:
            self._hold(tunnel, max(now, tunnel.hold_until))
            return
        if self._backlog_bytes(old) and now - old.left_at < MOVE_HOLD_MOST_S:
            tunnel.hold_until = max(now + 2 * _LOOK_INTERVAL_S, tunnel.hold_until)
            self._call_at(now + _LOOK_INTERVAL_S, lambda now: self._await_old(old, now))
            return
        old.is_unsent = False
        wait_s = max(2 * self._engine.round_trip_s(old.connection), MOVE_HOLD_LEAST_S)
        if old.answers_barrier:
            # not before: on a stream it would overtake datagrams that wait
            self._endpoint.send_body(old.connection, old.stream_id, encode_barrier())
            old.awaits_barrier = old.awaits_answers = True
            wait_s = MOVE_HOLD_MOST_S
            self._call_at(now + 2 * wait_s, lambda now: self._hear_all(old))
        self._hold(tunnel, max(now + wait_s, tunnel.hold_until))

    def _hold(self, tunnel: ClientTunnel, until: float) -> None:
        tunnel.hold_until = until
        self._call_at(until, lambda now: self._release(tunnel, now))

    def _pass_barrier(self, leg: Leg, now: float) -> None:
        """Nothing is on its way by a leg that was left, or nobody will tell."""
        leg.awaits_barrier = False
        tunnel = leg.tunnel
        if leg.protocol.barriers and leg in tunnel.leaving:
            self._endpoint.send_body(leg.connection, leg.stream_id, encode_barrier())
        if tunnel.hold_until is not None and not any(
            other.awaits_barrier or other.is_unsent for other in tunnel.leaving
        ):
            tunnel.hold_until = now
            self._release(tunnel, now)

    def _await_answers(self, leg: Leg, now: float) -> None:
        """What the target had said when it was asked last is there; wait for what it says late."""
        if leg.answers_due is None:
            return
        due = min(leg.last_heard + ANSWERS_QUIET_S, leg.answers_due)
        if leg.received >= leg.sent or now >= due:
            self._hear_all(leg)
        else:
            self._call_at(due, lambda now: self._await_answers(leg, now))

    def _hear_all(self, leg: Leg) -> None:
        """The answers that a leg that was left would bring are there, or late."""
        leg.answers_due = None
        if leg.awaits_answers:
            leg.awaits_answers = False
            if not any(other.awaits_answers for other in leg.tunnel.leaving):
                self._deliver_arrived(leg.tunnel)

    def _release(self, tunnel: ClientTunnel, now: float) -> None:
        """What the old way had is there by now: go on by the new one."""
        leg = tunnel.current
        if tunnel.hold_until is None or leg is None or now < tunnel.hold_until:
            return
        # a new connection is slow at first: what its queue has no room for waits here
        room = _QUEUE_BYTES - self._backlog_bytes(leg)
        for payloads, segment_size in tunnel.held.take(max(room, 0)):
            self._send(leg, payloads, segment_size)
        if tunnel.held:
            self._hold(tunnel, now + _LOOK_INTERVAL_S)
        else:
            tunnel.hold_until = None

    def _backlog_bytes(self, leg: Leg) -> int:
        """What a leg was given and has not sent yet."""
        connection, stream_id = leg.connection, leg.stream_id
        return self._engine.datagram_backlog_bytes(
            connection, stream_id // 4
        ) + self._engine.stream_backlog_bytes(connection, stream_id)

    def _end_if_quiet(self, leg: Leg, now: float) -> None:
        if self._legs.get((leg.connection, leg.stream_id)) is not leg:
            return
        due = min(leg.last_heard + LINGER_QUIET_S, leg.left_at + LINGER_MOST_S)
        if now < due:
            self._call_at(due, lambda now: self._end_if_quiet(leg, now))
        else:
            self._say_goodbye(leg)

    def _receive_body(self, leg: Leg, event: BodyReceived, now: float) -> None:
        tunnel, protocol = leg.tunnel, leg.protocol
        unknown_before = protocol.unknown_contexts
        try:
            payloads = protocol.receive_body(event.data, ended=event.ended)
        except PeerError as error:
            self._endpoint.abort_stream(event.connection, event.stream_id, error.h3_error_code)
            self._lose(leg)
            return
        leg.last_heard = now
        if leg.awaits_barrier and protocol.barriers:
            self._pass_barrier(leg, now)
        if leg.awaits_answers and protocol.barriers >= MOST_BARRIERS:
            # behind the datagrams that came in the same packets
            leg.answers_due = now + ANSWERS_MOST_S
            self._call_at(now, lambda now: self._await_answers(leg, now))
        self._drop(DropReason.UNKNOWN_CONTEXT, protocol.unknown_contexts - unknown_before)
        for payload in payloads:
            leg.received += 1
            tunnel.datagrams_from_gateway += 1
            self._deliver(leg, payload, len(payload))
        if protocol.is_wrapping_up:
            self._leave(leg.connection)
        if event.ended or protocol.closed_because is not None:
            self._endpoint.send_body(event.connection, event.stream_id, b"", end=True)
            self._lose(leg)

    def _lose(self, leg: Leg) -> None:
        """The gateway has ended a leg: with it the tunnel, unless it has another, or the whole
        connection is about to be left.
        """
        tunnel = leg.tunnel
        was_current = leg is tunnel.current
        self._forget(leg)
        if leg.protocol.closed_because is not None:
            if was_current:
                said = parse_proxy_status(leg.protocol.closed_because)
                status = recommended_status(said.error if said is not None else "")
                self._end(tunnel, Refusal(status, explain(status, said)))
        elif was_current and tunnel.current is None:
            if leg.connection == self._connection and not self._is_departing:
                self._end(tunnel, None)
            else:
                self._ask(tunnel)

    def _end(self, tunnel: ClientTunnel, refusal: Refusal | None) -> None:
        for payloads, segment_size in tunnel.held.take():
            self._drop(DropReason.TUNNEL_REFUSED, count_payloads(len(payloads), segment_size))
        self._close(tunnel)
        tunnel.ended(refusal)
        self.retry_waiting()

    def _close(self, tunnel: ClientTunnel) -> None:
        del self._tunnels[tunnel]
        for leg in tunnel.legs():
            self._say_goodbye(leg)

    def _say_goodbye(self, leg: Leg) -> None:
        """End a leg from our side."""
        if leg.is_open:
            self._endpoint.send_body(leg.connection, leg.stream_id, b"", end=True)
        else:
            self._endpoint.abort_stream(leg.connection, leg.stream_id, H3_REQUEST_CANCELLED)
        self._forget(leg)

    def _forget(self, leg: Leg) -> None:
        del self._legs[leg.connection, leg.stream_id]
        self._legs_of[leg.connection] -= 1
        leg.tunnel.forget(leg)
        if leg.awaits_barrier:
            self._call_at(0.0, lambda now: self._pass_barrier(leg, now))
        self._hear_all(leg)
        self._watch_deserted(leg.connection)

    def _call_at(self, due: float, action: Callable[[float], None]) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (due, self._timer_count, action))

    def _drop(self, reason: DropReason, count: int) -> None:
        if count:
            self.drops[reason] = self.drops.get(reason, 0) + count
