"""Streams as byte pipes on every pair of engines: back-pressure, half-close, resets, fairness."""

from __future__ import annotations

import random

import pytest

from tests.quic.link import End, Link, Pair, client_config, connect_pair, server_config
from toppy.quic.engine import (
    READ_TURN_BYTES,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
    StreamWritable,
)

KIB = 1024
WINDOW = 256 * KIB
WINDOWS = {
    "stream_window_bytes": WINDOW,
    "connection_window_bytes": 2 * WINDOW,
    "paused_window_bytes": 8 * WINDOW,
}


def narrow_pair(engines: tuple[str, str], **changes: int) -> Pair:
    """A pair whose server has small windows."""
    return connect_pair(*engines, server=server_config(**{**WINDOWS, **changes}))


def open_stream(pair: Pair, data: bytes = b"x", *, end: bool = False) -> int:
    """A stream of the client on which ``data`` was sent."""
    stream = pair.client.engine.open_stream(pair.connection)
    assert stream is not None
    pair.client.engine.send_stream(pair.connection, stream, data, end=end)
    return stream


def paused_stream(pair: Pair) -> int:
    """A stream of the client that the server has seen, and paused."""
    stream = open_stream(pair)
    pair.link.run_until(lambda: pair.server.stream(stream))
    pair.server.engine.pause_reading(pair.accepted, stream)
    return stream


def stream_bytes(end: End, stream: int) -> int:
    return sum(len(e.data) for e in end.of(StreamDataReceived) if e.stream_id == stream)


def data_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class TestPausedReader:
    def test_nothing_is_reported_and_the_sender_is_held_back(
        self, engines: tuple[str, str]
    ) -> None:
        pair = narrow_pair(engines)
        stream = paused_stream(pair)
        size = 8 * WINDOW
        pair.client.engine.send_stream(pair.connection, stream, data_of(size))
        pair.link.run_for(5.0)
        assert pair.server.stream(stream) == b"x"
        sent = sum(len(p) for source, _, p in pair.link.packets if source == pair.client.address)
        assert sent < 2 * WINDOW
        # native engines hand on a few congestion windows, aioquic counts what was not sent
        assert pair.client.engine.stream_backlog_bytes(pair.connection, stream) > size - 2 * WINDOW

    def test_everything_comes_in_order_after_resuming(self, engines: tuple[str, str]) -> None:
        pair = narrow_pair(engines)
        stream = paused_stream(pair)
        data = data_of(8 * WINDOW)
        pair.client.engine.send_stream(pair.connection, stream, data, end=True)
        pair.link.run_for(2.0)
        pair.server.engine.resume_reading(pair.accepted, stream)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        assert pair.server.stream(stream) == b"x" + data

    def test_a_reader_that_pauses_after_each_turn_takes_one_turn_at_a_time(
        self, engines: tuple[str, str]
    ) -> None:
        windows = {"stream_window_bytes": 1 << 20, "connection_window_bytes": 2 << 20}
        pair = narrow_pair(engines, **windows)
        stream = paused_stream(pair)
        data = data_of(3 << 20)
        pair.client.engine.send_stream(pair.connection, stream, data, end=True)
        pair.link.run_for(2.0)
        engine = pair.server.engine
        for _ in range(40):
            if pair.server.has_ended(stream):
                break
            engine.resume_reading(pair.accepted, stream)
            found = engine.poll_events()
            engine.pause_reading(pair.accepted, stream)
            taken = sum(len(e.data) for e in found if isinstance(e, StreamDataReceived))
            assert taken <= READ_TURN_BYTES
            pair.server.events += found
            pair.link.run_for(0.5)
        assert pair.server.stream(stream) == b"x" + data

    def test_the_bound_holds_while_a_reader_pauses_and_resumes(
        self, engines: tuple[str, str]
    ) -> None:
        pair = narrow_pair(engines)
        stream = paused_stream(pair)
        pair.client.engine.send_stream(pair.connection, stream, data_of(8 * WINDOW))
        for _ in range(5):
            pair.link.run_for(1.0)
            taken = stream_bytes(pair.server, stream)
            backlog = pair.client.engine.stream_backlog_bytes(pair.connection, stream)
            assert 8 * WINDOW - backlog <= taken + 2 * WINDOW
            pair.server.engine.resume_reading(pair.accepted, stream)
            pair.link.drain(pair.server)
            pair.server.engine.pause_reading(pair.accepted, stream)

    def test_other_streams_go_on(self, engines: tuple[str, str]) -> None:
        pair = narrow_pair(engines)
        stuck = [paused_stream(pair) for _ in range(6)]
        for stream in stuck:
            pair.client.engine.send_stream(pair.connection, stream, bytes(2 * WINDOW))
        pair.link.run_for(3.0)
        data = data_of(4 * WINDOW)
        other = open_stream(pair, data, end=True)
        pair.link.run_until(lambda: pair.server.has_ended(other))
        assert pair.server.stream(other) == data
        assert [stream_bytes(pair.server, stream) for stream in stuck] == [1] * 6

    def test_what_a_connection_holds_is_bounded(self, engines: tuple[str, str]) -> None:
        pair = narrow_pair(engines, paused_window_bytes=2 * WINDOW)
        for stream in [paused_stream(pair) for _ in range(10)]:
            pair.client.engine.send_stream(pair.connection, stream, bytes(2 * WINDOW))
        pair.link.packets.clear()
        pair.link.run_for(5.0)
        sent = sum(len(p) for source, _, p in pair.link.packets if source == pair.client.address)
        assert sent < 5 * WINDOW  # 4 windows and what is around them

    def test_streams_that_were_full_leave_room_when_they_are_given_up(
        self, engines: tuple[str, str]
    ) -> None:
        pair = narrow_pair(engines, paused_window_bytes=0)
        stuck = [paused_stream(pair) for _ in range(3)]
        for stream in stuck:
            pair.client.engine.send_stream(pair.connection, stream, bytes(2 * WINDOW))
        pair.link.run_for(3.0)
        for stream in stuck:
            pair.server.engine.stop_stream(pair.accepted, stream, 1)
        other = open_stream(pair, bytes(4 * WINDOW), end=True)
        pair.link.run_until(lambda: pair.server.has_ended(other))
        assert [stream_bytes(pair.server, stream) for stream in stuck] == [1] * 3

    def test_the_end_comes_behind_the_data_after_resuming(self, engines: tuple[str, str]) -> None:
        pair = narrow_pair(engines)
        stream = paused_stream(pair)
        pair.client.engine.send_stream(pair.connection, stream, b"last words", end=True)
        pair.link.run_for(1.0)
        assert not pair.server.has_ended(stream)
        pair.server.engine.resume_reading(pair.accepted, stream)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        assert pair.server.stream(stream) == b"xlast words"

    def test_an_end_without_data_is_held_too(self, engines: tuple[str, str]) -> None:
        pair = narrow_pair(engines)
        stream = paused_stream(pair)
        pair.client.engine.send_stream(pair.connection, stream, b"", end=True)
        pair.link.run_for(1.0)
        assert not pair.server.has_ended(stream)
        pair.server.engine.resume_reading(pair.accepted, stream)
        pair.link.run_until(lambda: pair.server.has_ended(stream))

    def test_a_reset_is_told_at_once_and_discards_what_was_held(
        self, engines: tuple[str, str]
    ) -> None:
        pair = narrow_pair(engines)
        stream = paused_stream(pair)
        pair.client.engine.send_stream(pair.connection, stream, b"held")
        pair.link.run_for(1.0)
        pair.client.engine.reset_stream(pair.connection, stream, 0x10C)
        pair.link.run_until(lambda: pair.server.of(StreamReset))
        assert pair.server.of(StreamReset) == [StreamReset(pair.accepted, stream, 0x10C)]
        pair.server.engine.resume_reading(pair.accepted, stream)
        pair.link.run_for(1.0)
        assert pair.server.stream(stream) == b"x"
        assert len(pair.server.of(StreamReset)) == 1

    def test_the_way_back_goes_on(self, engines: tuple[str, str]) -> None:
        pair = narrow_pair(engines)
        stream = paused_stream(pair)
        pair.client.engine.send_stream(pair.connection, stream, bytes(4 * WINDOW))
        data = data_of(1 << 20)
        pair.server.engine.send_stream(pair.accepted, stream, data, end=True)
        pair.link.run_until(lambda: pair.client.has_ended(stream))
        assert pair.client.stream(stream) == data

    def test_pausing_and_resuming_twice_is_like_once(self, pair: Pair) -> None:
        stream = paused_stream(pair)
        pair.server.engine.pause_reading(pair.accepted, stream)
        pair.client.engine.send_stream(pair.connection, stream, b"y")
        pair.link.run_for(1.0)
        pair.server.engine.resume_reading(pair.accepted, stream)
        pair.server.engine.resume_reading(pair.accepted, stream)
        pair.link.run_for(1.0)
        assert pair.server.stream(stream) == b"xy"

    def test_a_client_can_pause_too(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines, client=client_config(**WINDOWS))
        stream = open_stream(pair)
        pair.link.run_until(lambda: pair.server.stream(stream))
        pair.client.engine.pause_reading(pair.connection, stream)
        data = data_of(4 * WINDOW)
        pair.server.engine.send_stream(pair.accepted, stream, data, end=True)
        pair.link.run_for(2.0)
        assert not pair.client.of(StreamDataReceived)
        pair.client.engine.resume_reading(pair.connection, stream)
        pair.link.run_until(lambda: pair.client.has_ended(stream))
        assert pair.client.stream(stream) == data

    def test_loss_and_reordering_change_nothing(self, engines: tuple[str, str]) -> None:
        link = Link(loss=0.02, jitter_s=0.005, seed=4)
        pair = connect_pair(*engines, server=server_config(**WINDOWS), link=link)
        stream = paused_stream(pair)
        data = data_of(2 * WINDOW)
        pair.client.engine.send_stream(pair.connection, stream, data, end=True)
        for _ in range(200):
            if pair.server.has_ended(stream):
                break
            link.run_for(0.1)
            pair.server.engine.resume_reading(pair.accepted, stream)
            link.run_for(0.05)
            pair.server.engine.pause_reading(pair.accepted, stream)
        assert pair.server.stream(stream) == b"x" + data

    def test_a_paused_stream_ends_with_its_connection(self, pair: Pair) -> None:
        stream = paused_stream(pair)
        pair.client.engine.send_stream(pair.connection, stream, b"held")
        pair.link.run_for(1.0)
        pair.client.engine.close(pair.connection, 0x100, "bye", pair.link.now)
        pair.link.run_until(lambda: pair.server.closed)
        pair.server.engine.resume_reading(pair.accepted, stream)
        pair.link.run_for(60.0)
        assert pair.server.stream(stream) == b"x"
        assert pair.server.events[-1] == pair.server.closed

    def test_calls_on_streams_that_do_not_exist_are_ignored(self, pair: Pair) -> None:
        for end, connection in ((pair.client, pair.connection), (pair.server, pair.accepted)):
            for number in (connection, 77):
                for stream in (0, 1, 2, 3, 400, (1 << 62) - 1):
                    end.engine.pause_reading(number, stream)
                    end.engine.resume_reading(number, stream)
                    end.engine.notify_writable(number, stream, 1)
        pair.client.engine.widen_connection(77, 1 << 20)
        pair.link.run_for(1.0)
        stream = open_stream(pair, b"fine", end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        assert not pair.server.of(StreamWritable)
        assert pair.client.closed is None

    def test_many_streams_with_more_than_a_turn_are_read_to_their_ends(
        self, engines: tuple[str, str]
    ) -> None:
        windows = {"stream_window_bytes": 2 << 20, "connection_window_bytes": 8 << 20}
        pair = narrow_pair(engines, **windows)
        streams = [paused_stream(pair) for _ in range(4)]
        for stream in streams:
            data = data_of(3 * READ_TURN_BYTES, stream)
            pair.client.engine.send_stream(pair.connection, stream, data, end=True)
        pair.link.run_for(3.0)
        for stream in streams:
            pair.server.engine.resume_reading(pair.accepted, stream)
        pair.link.run_until(lambda: all(map(pair.server.has_ended, streams)))
        for stream in streams:
            assert pair.server.stream(stream) == b"x" + data_of(3 * READ_TURN_BYTES, stream)
        late = open_stream(pair, b"late", end=True)
        pair.link.run_until(lambda: pair.server.has_ended(late))


class TestWindows:
    def test_a_widened_connection_takes_more(self, engines: tuple[str, str]) -> None:
        pair = narrow_pair(engines, connection_window_bytes=WINDOW, stream_window_bytes=8 * WINDOW)
        pair.server.engine.widen_connection(pair.accepted, 4 * WINDOW)
        pair.server.engine.widen_connection(pair.accepted, WINDOW)  # never narrower
        stream = paused_stream(pair)
        size = 16 * WINDOW
        pair.client.engine.send_stream(pair.connection, stream, bytes(size))
        pair.link.run_for(0.1)
        pair.link.run_for(5.0)
        assert pair.server.engine.poll_events() == []
        pair.server.engine.resume_reading(pair.accepted, stream)
        held = 0
        while found := pair.server.engine.poll_events():
            held += sum(len(e.data) for e in found if isinstance(e, StreamDataReceived))
        # the paused stream's own extension (8 windows at most) is on top of the 4
        assert 4 * WINDOW - 10 < held <= 12 * WINDOW

    def test_events_are_large_when_much_is_there(self, engines: tuple[str, str]) -> None:
        windows = {"stream_window_bytes": 1 << 20, "connection_window_bytes": 2 << 20}
        pair = narrow_pair(engines, **windows)
        stream = paused_stream(pair)
        pair.client.engine.send_stream(pair.connection, stream, bytes(1 << 20))
        pair.link.run_for(5.0)
        pair.server.engine.resume_reading(pair.accepted, stream)
        sizes = [
            len(e.data)
            for e in pair.server.engine.poll_events()
            if isinstance(e, StreamDataReceived)
        ]
        assert sizes == [READ_TURN_BYTES]


class TestWritable:
    def test_it_is_said_once_when_the_backlog_falls_below_the_bound(
        self, engines: tuple[str, str]
    ) -> None:
        pair = narrow_pair(engines)
        stream = open_stream(pair, bytes(4 << 20))
        engine = pair.client.engine
        engine.notify_writable(pair.connection, stream, 1 << 20)
        assert not pair.client.of(StreamWritable)
        pair.link.run_until(lambda: pair.client.of(StreamWritable))
        assert engine.stream_backlog_bytes(pair.connection, stream) < 1 << 20
        engine.send_stream(pair.connection, stream, bytes(2 << 20), end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        assert pair.client.of(StreamWritable) == [StreamWritable(pair.connection, stream)]

    def test_it_is_said_at_once_when_little_waits(self, pair: Pair) -> None:
        stream = open_stream(pair, b"x")
        pair.client.engine.notify_writable(pair.connection, stream, 64 * KIB)
        assert pair.client.engine.poll_events() == [StreamWritable(pair.connection, stream)]
        pair.link.run_for(1.0)
        assert not pair.client.of(StreamWritable)

    def test_a_paused_reader_keeps_the_writer_waiting(self, engines: tuple[str, str]) -> None:
        pair = narrow_pair(engines)
        stream = paused_stream(pair)
        pair.client.engine.send_stream(pair.connection, stream, bytes(4 << 20))
        pair.client.engine.notify_writable(pair.connection, stream, 64 * KIB)
        pair.link.run_for(5.0)
        assert not pair.client.of(StreamWritable)
        pair.server.engine.resume_reading(pair.accepted, stream)
        pair.link.run_until(lambda: pair.client.of(StreamWritable))

    def test_asking_again_replaces_the_bound(self, engines: tuple[str, str]) -> None:
        pair = narrow_pair(engines)
        stream = open_stream(pair, bytes(4 << 20))
        pair.client.engine.notify_writable(pair.connection, stream, 3 << 20)
        pair.client.engine.notify_writable(pair.connection, stream, 1 << 20)
        pair.link.run_until(lambda: pair.client.of(StreamWritable))
        assert pair.client.engine.stream_backlog_bytes(pair.connection, stream) < 1 << 20
        pair.link.run_for(5.0)
        assert len(pair.client.of(StreamWritable)) == 1

    def test_a_stream_that_ends_otherwise_does_not_become_writable(
        self, engines: tuple[str, str]
    ) -> None:
        pair = narrow_pair(engines)
        ours, theirs = paused_stream(pair), paused_stream(pair)
        for stream in (ours, theirs):
            pair.client.engine.send_stream(pair.connection, stream, bytes(4 << 20))
            pair.client.engine.notify_writable(pair.connection, stream, 1)
        pair.client.engine.reset_stream(pair.connection, ours, 1)
        pair.server.engine.stop_stream(pair.accepted, theirs, 1)
        pair.link.run_until(lambda: pair.client.of(StopSendingReceived))
        pair.client.engine.notify_writable(pair.connection, theirs, 1)
        pair.link.run_for(5.0)
        assert not pair.client.of(StreamWritable)

    def test_any_buffer_can_be_sent(self, pair: Pair) -> None:
        stream = open_stream(pair, b"1")
        source = bytearray(b"-23-")
        for piece in (memoryview(source)[1:2], source[2:3], memoryview(b"4")):
            pair.client.engine.send_stream(pair.connection, stream, piece)
        source[:] = b"????"
        pair.client.engine.send_stream(pair.connection, stream, memoryview(b""), end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        assert pair.server.stream(stream) == b"1234"


class TestEnds:
    def test_each_direction_ends_on_its_own(self, pair: Pair) -> None:
        stream = open_stream(pair, b"all I have to say", end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        pair.link.run_for(3.0)
        data = data_of(300_000)
        pair.server.engine.send_stream(pair.accepted, stream, data)
        pair.link.run_until(lambda: stream_bytes(pair.client, stream) == len(data))
        assert not pair.client.has_ended(stream)
        pair.server.engine.send_stream(pair.accepted, stream, b"", end=True)
        pair.link.run_until(lambda: pair.client.has_ended(stream))
        assert pair.client.stream(stream) == data

    def test_a_reset_leaves_the_other_direction(self, pair: Pair) -> None:
        stream = open_stream(pair)
        pair.link.run_until(lambda: pair.server.stream(stream))
        pair.client.engine.reset_stream(pair.connection, stream, 7)
        pair.link.run_until(lambda: pair.server.of(StreamReset))
        assert not pair.server.of(StopSendingReceived)
        pair.server.engine.send_stream(pair.accepted, stream, b"still here", end=True)
        pair.link.run_until(lambda: pair.client.has_ended(stream))
        assert pair.client.stream(stream) == b"still here"

    def test_data_before_the_end_comes_first_on_a_lossy_path(
        self, engines: tuple[str, str]
    ) -> None:
        pair = connect_pair(*engines, link=Link(loss=0.1, jitter_s=0.01, seed=9))
        data = data_of(100_000)
        stream = open_stream(pair, data, end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream), limit_s=60)
        assert pair.server.stream(stream) == data
        ends = [e.ended for e in pair.server.of(StreamDataReceived)]
        assert ends.index(True) == len(ends) - 1


class TestFairness:
    @pytest.fixture
    def busy(self, engines: tuple[str, str]) -> tuple[Pair, int]:
        """A pair over a narrow path, and a stream of the client that fills it."""
        pair = connect_pair(*engines, link=Link(bytes_per_s=2e6))
        bulk = open_stream(pair, bytes(16 << 20))
        pair.link.run_for(1.0)
        return pair, bulk

    def test_a_bulk_stream_does_not_starve_a_small_one(self, busy: tuple[Pair, int]) -> None:
        pair, bulk = busy
        before = pair.link.now
        small = open_stream(pair, bytes(20_000), end=True)
        pair.link.run_until(lambda: pair.server.has_ended(small))
        assert pair.link.now - before < 0.5  # virtual: the path alone takes 0.07 s
        assert pair.client.engine.stream_backlog_bytes(pair.connection, bulk) > 0

    @pytest.mark.parametrize("bytes_per_s", [2e6, 15e6])
    def test_greedy_streams_share_alike(self, engines: tuple[str, str], bytes_per_s: float) -> None:
        pair = connect_pair(*engines, link=Link(bytes_per_s=bytes_per_s))
        streams = []
        for _ in range(3):  # one after the other: the first has filled the path by then
            streams.append(open_stream(pair, bytes(12 << 20)))
            pair.link.run_for(0.2)
        before = [stream_bytes(pair.server, stream) for stream in streams]
        pair.link.run_for(0.5)
        got = [stream_bytes(pair.server, s) - b for s, b in zip(streams, before, strict=True)]
        assert min(got) > 0.25 * max(got)

    def test_a_message_on_an_old_stream_passes_greedy_ones(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines, link=Link(bytes_per_s=5e6))
        talk = open_stream(pair)
        for _ in range(8):
            open_stream(pair, bytes(1 << 20))
        pair.link.run_for(0.3)
        for count in range(1, 6):
            before = pair.link.now
            pair.client.engine.send_stream(pair.connection, talk, bytes(1000))
            pair.link.run_until(
                lambda count=count: stream_bytes(pair.server, talk) == 1 + 1000 * count  # type: ignore[misc]
            )
            assert pair.link.now - before < 0.2  # virtual
            pair.link.run_for(0.05)

    def test_ever_more_messages_leave_a_greedy_stream_its_share(
        self, busy: tuple[Pair, int]
    ) -> None:
        pair, bulk = busy
        talk = open_stream(pair)
        before = stream_bytes(pair.server, bulk)
        for _ in range(100):
            if pair.client.engine.stream_backlog_bytes(pair.connection, talk) < 64 * KIB:
                pair.client.engine.send_stream(pair.connection, talk, bytes(64 * KIB))
            pair.link.run_for(0.02)
        assert stream_bytes(pair.server, bulk) - before > 1e6  # of 4 that the path carries
        assert stream_bytes(pair.server, talk) > 0.5e6

    def test_a_stream_without_credit_sends_what_it_had_credit_for(
        self, engines: tuple[str, str]
    ) -> None:
        server = server_config(stream_window_bytes=64 * KIB, connection_window_bytes=8 << 20)
        pair = connect_pair(*engines, server=server, link=Link(bytes_per_s=2e6))
        stuck = paused_stream(pair)
        for _ in range(3):
            open_stream(pair, bytes(8 << 20))
        pair.link.run_for(0.5)
        pair.client.engine.send_stream(pair.connection, stuck, bytes(1 << 20))
        pair.link.run_for(2.0)
        pair.server.engine.resume_reading(pair.accepted, stuck)
        pair.link.run_for(0.1)
        assert stream_bytes(pair.server, stuck) >= 64 * KIB

    def test_streams_that_are_reset_leave_the_others_going(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines, link=Link(bytes_per_s=2e6))
        for turn in range(3):
            streams = [open_stream(pair, bytes(1 << 20)) for _ in range(8)]
            pair.link.run_for(0.3)
            for stream in streams[:4]:
                pair.client.engine.reset_stream(pair.connection, stream, 1)
            for stream in streams[4:]:
                pair.server.engine.stop_stream(pair.accepted, stream, 1)
            small = open_stream(pair, b"still here", end=True)
            pair.link.run_until(lambda small=small: pair.server.has_ended(small), limit_s=5)  # type: ignore[misc]
            assert pair.server.stream(small) == b"still here", turn

    def test_a_bulk_stream_does_not_starve_datagrams(self, busy: tuple[Pair, int]) -> None:
        pair, bulk = busy
        for index in range(20):
            pair.client.engine.send_datagrams(pair.connection, 5, bytes([index]) * 100, 0)
        pair.link.run_for(0.3)
        arrived = pair.server.payloads(5)
        assert len(arrived) >= 5  # the path's queue is full: some are lost there
        assert pair.client.engine.stream_backlog_bytes(pair.connection, bulk) > 0

    def test_two_bulk_streams_share(self, busy: tuple[Pair, int]) -> None:
        pair, bulk = busy
        second = open_stream(pair, bytes(8 << 20))
        start = stream_bytes(pair.server, bulk)
        pair.link.run_until(lambda: stream_bytes(pair.server, second) > 1 << 20)
        assert stream_bytes(pair.server, bulk) - start < 2 << 20


class TestAnything:
    """Random calls on several streams over a bad path: what arrives is what was sent, in order."""

    @pytest.mark.parametrize("seed", range(3))
    def test_streams_keep_their_bytes_whatever_is_paused_and_given_up(
        self, engines: tuple[str, str], seed: int
    ) -> None:
        chance = random.Random(seed)
        link = Link(loss=0.02, jitter_s=0.004, duplicate=0.01, seed=seed)
        pair = connect_pair(*engines, server=server_config(**WINDOWS), link=link)
        client, server = pair.client.engine, pair.server.engine
        streams = [open_stream(pair) for _ in range(4)]
        sent = dict.fromkeys(streams, b"x")
        given_up: set[int] = set()
        link.run_for(0.2)
        for _ in range(60):
            stream = chance.choice(streams)
            match chance.randrange(12):
                case 0 if len(given_up) < 2:
                    given_up.add(stream)
                    client.reset_stream(pair.connection, stream, 1)
                case 1 if len(given_up) < 2:
                    given_up.add(stream)
                    server.stop_stream(pair.accepted, stream, 1)
                case 2 | 3 | 4:
                    server.pause_reading(pair.accepted, stream)
                case 5 | 6 | 7:
                    server.resume_reading(pair.accepted, stream)
                case 8:
                    client.notify_writable(pair.connection, stream, chance.randrange(1, WINDOW))
                case _ if stream not in given_up:
                    data = chance.randbytes(chance.randrange(1, WINDOW // 2))
                    sent[stream] += data
                    client.send_stream(pair.connection, stream, data)
            link.run_for(chance.choice((0.0, 0.01, 0.1)))
        for stream in streams:
            client.send_stream(pair.connection, stream, b"", end=True)
            server.resume_reading(pair.accepted, stream)
        whole = [stream for stream in streams if stream not in given_up]
        link.run_until(lambda: all(pair.server.has_ended(stream) for stream in whole), limit_s=60)
        for stream in streams:
            arrived = pair.server.stream(stream)
            assert sent[stream].startswith(arrived)
            assert stream in given_up or arrived == sent[stream]
        assert pair.server.closed is None
        assert pair.client.closed is None
