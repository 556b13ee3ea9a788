from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.quic.link import split
from toppy.model.drop_reason import DropReason
from toppy.quic.aioquic_datagrams import (
    MAX_SEGMENTS,
    MAX_SEND_BYTES,
    DatagramGroups,
    DatagramQueue,
    parse_datagram_frame,
    tunnel_prefix,
)

QUARTERS = st.integers(0, (1 << 60) - 1)


@given(QUARTERS, st.binary(max_size=20))
def test_a_datagram_is_parsed_as_it_was_made(quarter: int, payload: bytes) -> None:
    data = tunnel_prefix(quarter) + payload
    parsed = parse_datagram_frame(data)
    assert parsed == (quarter, 0, len(data) - len(payload))


@given(st.binary(max_size=24))
def test_any_bytes_are_parsed_or_called_malformed(data: bytes) -> None:
    parsed = parse_datagram_frame(data)
    if parsed is not None:
        quarter, context, offset = parsed
        assert 0 <= quarter < 1 << 60
        assert 0 <= context < 1 << 62
        assert 2 <= offset <= len(data)


@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(0, 1), st.sampled_from([0, 1, 5, 5, 5, 9, 2000])),
        max_size=200,
    )
)
def test_groups_keep_order_and_fit_one_send_each(arrived: list[tuple[int, int, int]]) -> None:
    groups = DatagramGroups()
    expected: dict[tuple[int, int], list[bytes]] = {}
    for index, (connection, quarter, size) in enumerate(arrived):
        payload = bytes((index % 256,)) * size
        groups.add(connection, quarter, payload)
        expected.setdefault((connection, quarter), []).append(payload)
    found: dict[tuple[int, int], list[bytes]] = {}
    for connection, quarter, data, size in groups.take():
        segments = split(data, size)
        assert len(segments) <= MAX_SEGMENTS
        assert len(data) <= MAX_SEND_BYTES
        assert bool(size) == bool(data)
        found.setdefault((connection, quarter), []).extend(segments)
    assert found == expected
    assert groups.take() == []


class Harness:
    """A queue with a limit that the test can change."""

    def __init__(self, tunnel_bytes: int = 10_000, connection_bytes: int = 30_000) -> None:
        self.limit = 1400
        self.drops: Counter[DropReason] = Counter()
        self.queue = DatagramQueue(
            tunnel_bytes=tunnel_bytes,
            connection_bytes=connection_bytes,
            max_frame_bytes=lambda: self.limit,
            drops=self.drops,
        )

    def take_all(self) -> list[bytes]:
        """As aioquic does: is there one, look at it, take it."""
        frames = []
        while self.queue:
            first = self.queue[0]
            assert self.queue.popleft() == first
            frames.append(first)
        return frames


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 3), st.integers(0, 1500), st.integers(1, 12)),
            st.integers(0, 5),
        ),
        max_size=60,
    )
)
def test_a_queue_is_bounded_ordered_and_exact(
    steps: list[tuple[int, int, int] | int],
) -> None:
    harness = Harness()
    pushed = 0
    frames: list[bytes] = []
    for step in steps:
        if isinstance(step, int):
            for _ in range(step):
                if harness.queue:
                    frames.append(harness.queue[0])
                    harness.queue.popleft()
            continue
        quarter, size, count = step
        for _ in range(count):
            harness.queue.push(quarter, pushed.to_bytes(4, "big") + bytes(size), 0)
            pushed += 1
        assert harness.queue._waiting_bytes <= 30_000
        assert all(tunnel.bytes <= 10_000 for tunnel in harness.queue._tunnels.values())
    frames += harness.take_all()
    assert len(frames) + sum(harness.drops.values()) == pushed
    for quarter in range(4):
        mine = [frame[2:6] for frame in frames if frame[0] == quarter]
        assert mine == sorted(mine)
    assert harness.queue._waiting_bytes == 0
    assert not harness.queue._tunnels
    assert not harness.queue._turns


def test_tunnels_take_turns_by_bytes() -> None:
    harness = Harness()
    harness.queue.push(0, bytes(1000) * 8, 1000)
    harness.queue.push(1, bytes(100) * 50, 100)
    order = [frame[0] for frame in harness.take_all()]
    assert order[:2] == [0, 0]
    assert order[2:14] == [1] * 12
    assert sorted(order) == [0] * 8 + [1] * 50


def test_many_empty_payloads_are_bounded_too() -> None:
    harness = Harness(tunnel_bytes=6400)
    for _ in range(1000):
        harness.queue.push(0, b"", 0)
    assert harness.drops == {DropReason.QUEUE_FULL: 900}
    assert harness.take_all() == [b"\0\0"] * 100


def test_a_payload_larger_than_the_queue_is_dropped() -> None:
    harness = Harness(tunnel_bytes=500)
    harness.queue.push(0, b"kept", 0)
    harness.queue.push(0, bytes(600), 0)
    assert harness.drops == {DropReason.QUEUE_FULL: 1}
    assert harness.take_all() == [b"\0\0kept"]


def test_frames_that_fit_no_packet_any_more_are_dropped_when_their_turn_comes() -> None:
    harness = Harness()
    harness.queue.push(0, bytes(1398), 0)
    harness.queue.push(0, b"small", 0)
    assert harness.queue
    harness.limit = 1399
    assert harness.take_all() == [b"\0\0small"]
    assert harness.drops == {DropReason.TOO_LARGE: 1}


def test_what_waits_when_a_connection_ends_is_counted() -> None:
    harness = Harness()
    harness.queue.push(0, bytes(5000), 1000)
    harness.queue.push(1, b"", 0)
    harness.queue.discard()
    assert harness.drops == {DropReason.UNKNOWN_STREAM: 6}
    assert not harness.queue
