"""The path emulator: what it says of itself is true."""

from __future__ import annotations

import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.bench.paths import jain, max_min_shares
from integration.lossy_path import (
    IP_AND_UDP_BYTES,
    TICK_S,
    Link,
    PathSettings,
    running_path,
)
from integration.processes import free_udp_port
from toppy.net.udp_socket import SendResult, UdpSocket, bind_udp, connect_udp

SIZE = 1000
WIRE_BITS = (SIZE + IP_AND_UDP_BYTES) * 8
FAR = 1e9
"""A time when everything is through."""


def link(
    *, rate_bits: float = 1e9, delay_s: float = 0.1, loss: float = 0.0, queue_bytes: int = 1 << 20
) -> Link:
    return Link(PathSettings(rate_bits, delay_s, loss, queue_bytes), seed=7)


def arrivals(path: Link, end: float, step: float = 0.001) -> list[tuple[float, int]]:
    """When something came through, and how many bytes."""
    found = []
    for tick in range(int(end / step) + 1):
        size = sum(len(payloads) for _, payloads, _ in path.release(tick * step))
        if size:
            found.append((tick * step, size))
    return found


def test_a_packet_arrives_after_its_delay_and_its_time_on_the_line() -> None:
    path = link(rate_bits=WIRE_BITS * 100, delay_s=0.1)
    path.take(0, bytes(SIZE), 0, now=0.0)
    assert path.next_due() == pytest.approx(0.11)
    assert list(path.release(0.1099)) == []
    assert list(path.release(0.1101)) == [(0, bytes(SIZE), 0)]
    assert path.next_due() is None


def test_a_burst_leaves_at_the_rate_of_the_line() -> None:
    path = link(rate_bits=WIRE_BITS * 100, delay_s=0.1)
    path.take(0, bytes(10 * SIZE), SIZE, now=0.0)
    times = [when for when, _ in arrivals(path, 0.3)]
    assert times == pytest.approx([0.1 + 0.01 * (1 + index) for index in range(10)], abs=0.0011)


def test_a_full_queue_drops_what_comes_last() -> None:
    path = link(queue_bytes=5 * (SIZE + IP_AND_UDP_BYTES))
    path.take(0, b"".join(bytes([index]) * SIZE for index in range(8)), SIZE, now=0.0)
    carried = b"".join(payloads for _, payloads, _ in path.release(FAR))
    assert [carried[start] for start in range(0, len(carried), SIZE)] == [0, 1, 2, 3, 4]
    counts = path.take_counts()
    assert (counts.arrived, counts.carried, counts.queue_full) == (8, 5, 3)


def test_a_queue_that_has_emptied_takes_packets_again() -> None:
    path = link(rate_bits=WIRE_BITS * 100, queue_bytes=2 * (SIZE + IP_AND_UDP_BYTES))
    for turn in range(5):
        path.take(0, bytes(2 * SIZE), SIZE, now=turn * 0.021)
    assert path.take_counts().queue_full == 0


def test_without_a_size_the_queue_is_one_round_trip_long() -> None:
    assert PathSettings(100e6, 0.025).largest_queue_bytes == 625_000


def test_loss_is_seeded_and_takes_its_share() -> None:
    paths = [link(rate_bits=1e12, loss=0.01, queue_bytes=1 << 30) for _ in range(2)]
    for path in paths:
        path.take(0, bytes(20_000), 1, now=0.0)
        list(path.release(FAR))
    first, second = (path.take_counts() for path in paths)
    assert first == second
    assert 120 < first.lost < 280  # 200, by more than five standard deviations


def test_what_is_lost_has_taken_its_time_on_the_line() -> None:
    path = link(rate_bits=WIRE_BITS * 100, loss=1.0)
    path.take(0, bytes(3 * SIZE), SIZE, now=0.0)
    path._loss = 0.0
    path.take(0, bytes(SIZE), 0, now=0.0)
    assert path.next_due() == pytest.approx(0.1 + 0.04)


def test_flows_keep_their_order_and_stay_apart() -> None:
    path = link()
    for number in range(20):
        path.take(number % 2, bytes([number]) * 10, 0, now=number * 0.001)
    by_flow: dict[int, list[int]] = {0: [], 1: []}
    for flow, payloads, _ in path.release(FAR):
        by_flow[flow] += payloads[::10]
    assert by_flow == {0: list(range(0, 20, 2)), 1: list(range(1, 20, 2))}


def test_joined_packets_can_be_cut_apart_again() -> None:
    path = link()
    sizes = [10, 10, 4, 10, 0, 0, 12, 12, 3, 3]
    for number, size in enumerate(sizes):
        path.take(0, bytes([number]) * size, 0, now=0.0)
    cut: list[bytes] = []
    for _, payloads, segment_size in path.release(FAR):
        step = segment_size or max(1, len(payloads))
        cut += [payloads[at : at + step] for at in range(0, max(1, len(payloads)), step)]
    assert cut == [bytes([number]) * size for number, size in enumerate(sizes)]


@given(
    bursts=st.lists(
        st.tuples(
            st.floats(0, 0.05), st.integers(0, 5000), st.integers(0, 1500), st.integers(0, 2)
        ),
        max_size=30,
    ),
    loss=st.sampled_from([0.0, 0.1, 1.0]),
    queue_bytes=st.integers(1, 20_000),
)
def test_every_packet_is_accounted_for(
    bursts: list[tuple[float, int, int, int]], loss: float, queue_bytes: int
) -> None:
    path = link(rate_bits=2e6, delay_s=0.02, loss=loss, queue_bytes=queue_bytes)
    now, offered, out, carried = 0.0, 0, 0, 0
    for pause_s, size, segment_size, flow in bursts:
        now += pause_s
        path.take(flow, bytes(size), segment_size, now)
        offered += -(-size // segment_size) if segment_size and size else 1
        for _, payloads, step in path.release(now):
            out += -(-len(payloads) // step) if step else 1
    before = path.take_counts()
    assert before.arrived == offered
    assert before.carried == out == sum(before.sizes.values())
    assert offered == before.queue_full + before.lost + before.carried + before.waiting
    carried = sum(-(-len(p) // step) if step else 1 for _, p, step in path.release(FAR))
    after = path.take_counts()
    assert (after.carried, after.waiting) == (carried, 0)
    assert carried == before.waiting


def _exchange(sock: UdpSocket, seconds: float) -> list[tuple[bytes, tuple[str, int]]]:
    """What arrives within ``seconds``, datagram by datagram."""
    found = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        while (batch := sock.receive()) is not None:
            payloads, step = bytes(batch[0]), batch[1] or max(1, len(batch[0]))
            found += [(payloads[at : at + step], batch[2]) for at in range(0, len(payloads), step)]
        time.sleep(0.001)
    return found


def test_flows_cross_the_path_and_answers_find_back() -> None:
    port, target_port = free_udp_port(), free_udp_port()
    target = UdpSocket(bind_udp("127.0.0.1", target_port, buffer_bytes=1 << 20))
    senders = [UdpSocket(connect_udp("127.0.0.1", port, buffer_bytes=1 << 20)) for _ in range(3)]
    settings = PathSettings(rate_bits=100e6, delay_s=0.02)
    try:
        with running_path(port, ("127.0.0.1", target_port), settings) as path:
            begin = time.monotonic()
            for number, sender in enumerate(senders):
                assert sender.send(bytes([number]) * 300, 100) is SendResult.SENT
            arrived = _exchange(target, 0.3)
            assert sorted(payload[0] for payload, _ in arrived) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
            assert len({address for _, address in arrived}) == len(senders)
            for payload, address in arrived:
                target.send(payload + b"!", 0, address)
            for number, sender in enumerate(senders):
                answers = [payload for payload, _ in _exchange(sender, 0.2)]
                assert answers == [bytes([number]) * 100 + b"!"] * 3
            assert time.monotonic() - begin > settings.round_trip_s
            report = path.report()
            for direction in (report.to_target, report.to_sender):
                assert (direction.arrived, direction.carried, direction.waiting) == (9, 9, 0)
            assert (report.failures, report.flows) == (0, 3)
            assert path.report().to_target.arrived == 0  # since the last question
    finally:
        for sock in (target, *senders):
            sock.close()


def test_a_path_that_nobody_asks_any_more_ends() -> None:
    with running_path(free_udp_port(), ("127.0.0.1", 9), PathSettings(1e6, TICK_S)) as path:
        pass
    assert path.process.exit_code == 0


def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError), running_path(port, ("127.0.0.1", 9), PathSettings(1, 1)):
            pass


def test_jain_says_how_many_have_it_all() -> None:
    assert jain([3.0] * 7) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([0.0, 0.0]) == 0.0


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=12), st.floats(0, 1))
def test_max_min_shares_give_all_away_and_nobody_more_than_asked(
    demands: list[float], part: float
) -> None:
    total = sum(demands) * part
    shares = max_min_shares(demands, total)
    assert sum(shares) == pytest.approx(total, abs=1e-3)
    most = max(shares)
    for share, demand in zip(shares, demands, strict=True):
        assert share <= demand
        assert share == demand or share == pytest.approx(most, abs=1e-3)
