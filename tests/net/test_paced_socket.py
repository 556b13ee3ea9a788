"""A socket behind a limit, in virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.net.fake_socket import FakeSocket
from toppy.model.rate import Budget, DirectionLimits, Rate, TunnelLimits
from toppy.net.paced_socket import LEAST_BYTES, PacedSocket
from toppy.net.stream_socket import READ_BYTES, SocketReader
from toppy.policy.meter import Meter, Meters, single_meter
from toppy.protocol.stream_tunnel import Buffer
from toppy.wire.connect_tcp import HEADROOM_BYTES

MIB = 1 << 20
_KEPT_BYTES = 64 << 10
_PIECE = bytes(READ_BYTES)
_BUFFER = memoryview(bytes(HEADROOM_BYTES + READ_BYTES))


class Clock:
    """Virtual time and its timers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()
        self._count = 0

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        assert delay_s > 0  # otherwise it would spin
        self._count += 1
        # a timer of an event loop fires a little late
        heapq.heappush(self._timers, (self.now + delay_s + 0.0005, self._count, action))
        return Timer(self, self._count)

    def cancel(self, number: int) -> None:
        self._cancelled.add(number)

    @property
    def timers(self) -> int:
        return sum(number not in self._cancelled for _, number, _ in self._timers)

    def run_until(self, until: float) -> None:
        while self._timers and self._timers[0][0] <= until:
            due, number, action = heapq.heappop(self._timers)
            self.now = max(self.now, due)
            if number not in self._cancelled:
                action()
        self.now = until


class Timer:
    def __init__(self, clock: Clock, number: int) -> None:
        self._clock = clock
        self._number = number

    def cancel(self) -> None:
        self._clock.cancel(self._number)


class Socket(FakeSocket):
    """Has as much to read as the test says; keeps the first of what is written."""

    def __init__(self, reader: SocketReader) -> None:
        super().__init__()
        self.reader = reader
        self.read_limit = READ_BYTES
        self.written_bytes = 0

    def write(self, pieces: Sequence[Buffer]) -> None:
        self.written_bytes += sum(map(len, pieces))
        if self.written_bytes <= _KEPT_BYTES:
            super().write(pieces)

    def bring(self, available: int) -> int:
        """Read as long as it is read; how much is left."""
        while self.is_reading and available:
            size = min(available, self.read_limit)
            assert size
            self.reader.receive(_BUFFER, size)
            available -= size
        return available


class Relay:
    """The reader behind a paced socket."""

    def __init__(self) -> None:
        self.received = 0
        self.events: list[str] = []

    def receive(self, buffer: memoryview, payload_bytes: int) -> None:
        self.received += payload_bytes

    def receive_end(self) -> None:
        self.events.append("end")

    def receive_failure(self, reason: str) -> None:
        self.events.append(reason)

    def drained(self) -> None:
        self.events.append("drained")


class Stage:
    def __init__(self, rate: Rate | None, beside: Stage | None = None) -> None:
        """``beside``: with the same meter."""
        self.clock: Clock = beside.clock if beside is not None else Clock()
        self.relay = Relay()
        self.meter: Meter | None = None
        if beside is not None:
            self.meter = beside.meter
        else:
            self.limit(rate)
        self.paced = PacedSocket(
            self._make,
            self.relay,
            lambda: (self.meter.to_target, self.meter.to_client) if self.meter else (None, None),
            call_later=self.clock.call_later,
            clock=lambda: self.clock.now,
        )

    def _make(self, reader: SocketReader) -> Socket:
        self.socket = Socket(reader)
        return self.socket

    def is_read(self) -> bool:
        """A call, so that mypy does not take what it has seen for what will be."""
        return self.socket.is_reading

    def limit(self, rate: Rate | None) -> None:
        limits = DirectionLimits(bytes=rate) if rate is not None else DirectionLimits()
        self.meter = single_meter(limits, self.clock.now)


def test_without_a_limit_nothing_waits() -> None:
    on = Stage(None)
    on.paced.resume()
    assert on.socket.bring(10 * MIB) == 0
    on.paced.write([bytes(10 * MIB)])
    assert on.socket.written_bytes == 10 * MIB
    assert on.paced.unsent_bytes == 0
    assert on.clock.timers == 0


@pytest.mark.parametrize("mib_per_s", [1, 10, 100])
def test_the_rate_is_kept_within_two_percent_in_both_directions(mib_per_s: int) -> None:
    rate = Rate(mib_per_s * MIB, mib_per_s * MIB)
    on = Stage(rate)
    on.paced.resume()
    began, left = on.clock.now, 1 << 50
    for step in range(1, 2001):  # five milliseconds each: ten seconds
        left = on.socket.bring(left)
        while not on.paced.unsent_bytes:
            on.paced.write([_PIECE])
        on.clock.run_until(began + step / 200)
    expected = rate.burst + 10 * rate.per_s
    for moved in (on.relay.received, on.socket.written_bytes):
        assert moved <= expected
        assert moved >= 0.98 * expected


def test_sockets_that_share_a_budget_read_no_more_than_it_has() -> None:
    rate = Rate(4 * MIB, MIB)
    first = Stage(rate)
    both = (first, Stage(None, beside=first))
    for on in both:
        on.paced.resume()
    began = first.clock.now
    for step in range(1, 401):  # five milliseconds each: two seconds
        for on in both:
            on.socket.bring(1 << 50)
        first.clock.run_until(began + step / 200)
    received = sum(on.relay.received for on in both)
    assert 0.98 * (rate.burst + 2 * rate.per_s) <= received
    # the last read of each is paid for by the next
    assert received <= rate.burst + 2 * rate.per_s + 2 * LEAST_BYTES


def test_what_waits_is_written_in_order_and_then_it_has_drained() -> None:
    on = Stage(Rate(1000, 1000))
    sent = bytes(range(250)) * 20
    on.paced.write([sent[:700], sent[700:900]])
    assert on.relay.events == []
    on.paced.write([sent[900:]])
    assert len(on.socket.written) == 1000
    assert on.paced.unsent_bytes == 4000
    on.clock.run_until(on.clock.now + 10)
    assert on.socket.written == sent
    assert on.relay.events == ["drained"]
    assert on.clock.timers == 0


def test_what_the_socket_itself_holds_back_counts_and_its_drain_is_passed_on() -> None:
    on = Stage(Rate(1000, 1000))
    on.socket.room = 1
    on.paced.write([b"abc"])
    assert on.paced.unsent_bytes == 2
    on.socket.room = 3
    on.socket.reader.drained()
    assert on.relay.events == ["drained"]


def test_a_drain_of_the_socket_is_none_while_something_waits_for_its_turn() -> None:
    on = Stage(Rate(1000, 1000))
    on.paced.write([bytes(2000)])
    on.socket.reader.drained()
    assert on.relay.events == []


def test_no_more_is_read_than_the_limit_has() -> None:
    on = Stage(Rate(MIB, 100_000))
    on.paced.resume()
    left = on.socket.bring(MIB)
    assert MIB - left <= 100_000
    assert not on.is_read()
    on.clock.run_until(on.clock.now + 0.05)
    assert on.is_read()


def test_a_relay_that_pauses_is_not_read_for_by_a_timer() -> None:
    on = Stage(Rate(MIB, LEAST_BYTES))
    on.paced.resume()
    on.socket.bring(MIB)
    on.paced.pause()
    on.clock.run_until(on.clock.now + 10)
    assert not on.is_read()
    on.paced.resume()
    assert on.is_read()


def test_resuming_does_not_cut_the_wait_short() -> None:
    on = Stage(Rate(MIB, LEAST_BYTES))
    on.paced.resume()
    on.socket.bring(MIB)
    on.paced.pause()
    on.paced.resume()
    assert not on.is_read()
    assert on.clock.timers == 1


def test_another_limit_counts_at_once() -> None:
    on = Stage(None)
    on.paced.resume()
    on.limit(Rate(1000, 1000))
    on.socket.bring(READ_BYTES)  # what was under way
    assert not on.is_read()
    on.paced.write([bytes(5000)])
    assert len(on.socket.written) == 1000
    on.limit(None)
    on.clock.run_until(on.clock.now + 2)
    assert on.is_read()
    assert len(on.socket.written) == 5000


def test_who_is_held_back_asks_for_more_than_it_gets() -> None:
    """Otherwise a budget that several workers share would never give it more."""
    budget = Budget("rule", DirectionLimits(bytes=Rate(MIB, MIB)), DirectionLimits(Rate(MIB, MIB)))
    meters = Meters()
    on = Stage(None)
    on.meter = meters.attach("tunnel", TunnelLimits(budgets=(budget,)), on.clock.now)
    on.paced.resume()
    on.paced.write([bytes(3 * MIB)])
    for _ in range(200):
        on.socket.bring(READ_BYTES)
        on.clock.run_until(on.clock.now + 0.01)
    (demand,) = meters.take_demands()
    assert demand.to_target_bytes > 2 * on.socket.written_bytes
    assert demand.to_client_bytes > 2 * on.relay.received


def test_who_is_not_held_back_asks_for_what_it_moves() -> None:
    budget = Budget("rule", DirectionLimits(bytes=Rate(MIB, MIB)), DirectionLimits(Rate(MIB, MIB)))
    meters = Meters()
    on = Stage(None)
    on.meter = meters.attach("tunnel", TunnelLimits(budgets=(budget,)), on.clock.now)
    on.paced.resume()
    for _ in range(10):
        on.paced.write([bytes(1000)])
        on.socket.bring(2000)
        on.clock.run_until(on.clock.now + 0.01)
    (demand,) = meters.take_demands()
    assert (demand.to_target_bytes, demand.to_client_bytes) == (10_000, 20_000)


def test_without_its_limit_a_tunnel_is_read_in_large_pieces_again() -> None:
    on = Stage(Rate(MIB, LEAST_BYTES))
    on.paced.resume()
    assert on.socket.read_limit == LEAST_BYTES
    on.limit(None)
    on.socket.bring(LEAST_BYTES)
    assert on.socket.read_limit == READ_BYTES


def test_ends_and_failures_are_passed_on() -> None:
    on = Stage(Rate(1000, 1000))
    on.paced.resume()
    on.socket.bring(2000)
    on.socket.reader.receive_end()
    assert on.paced.finish()
    on.clock.run_until(on.clock.now + 10)
    assert not on.is_read()
    on.socket.reader.receive_failure("broken")
    assert on.relay.events == ["end", "broken"]
    assert on.socket.events == ["finish"]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_closed_no_timer_is_left(how: str) -> None:
    on = Stage(Rate(1000, 1000))
    on.paced.resume()
    on.socket.bring(2000)
    on.paced.write([bytes(5000)])
    assert on.clock.timers == 2
    getattr(on.paced, how)()
    assert on.clock.timers == 0
    assert on.paced.unsent_bytes == 0
    assert on.socket.events == [how]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1000, 10_000_000),
    st.integers(100, 1_000_000),
    st.lists(st.binary(max_size=2000), max_size=20),
)
def test_any_rate_delivers_everything_in_order(per_s: int, burst: int, pieces: list[bytes]) -> None:
    on = Stage(Rate(per_s, burst))
    for piece in pieces:
        on.paced.write([piece])
    for _ in range(1000):  # seconds
        if not on.paced.unsent_bytes:
            break
        on.clock.run_until(on.clock.now + 1.0)
    assert on.socket.written == b"".join(pieces)
