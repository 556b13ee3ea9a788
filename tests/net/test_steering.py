from __future__ import annotations

import random
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.net.bpf import check_program, run_program, steer
from toppy.errors import LocalError
from toppy.net.steering import attach, build_program, is_supported
from toppy.net.udp_socket import bind_udp
from toppy.wire.connection_id import encode_prefix, parse_connection_id

needs_steering = pytest.mark.skipif(not is_supported(), reason="this system cannot steer packets")


class Setup(NamedTuple):
    slot_count: int
    active_slots: tuple[int, ...]
    server_id: int
    live_slots: tuple[int, ...] | None


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    slot_count = draw(st.integers(1, 256))
    slot = st.integers(0, slot_count - 1)
    active = draw(st.lists(slot, unique=True, min_size=1))
    live = draw(st.none() | st.lists(slot, unique=True))
    return Setup(
        slot_count,
        tuple(active),
        draw(st.integers(0, 255)),
        None if live is None else tuple(live),
    )


def short_packet(connection_id: bytes, rest: bytes = bytes(20)) -> bytes:
    return b"\x40" + connection_id + rest


def long_packet(connection_id: bytes, rest: bytes = bytes(20)) -> bytes:
    header = b"\xc0\x00\x00\x00\x01" + bytes([len(connection_id)])
    return header + connection_id + rest


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    ours = st.builds(
        lambda slot, server_id, tail: encode_prefix(slot, 1, server_id=server_id) + tail,
        st.integers(0, 255),
        st.integers(0, 255),
        st.binary(min_size=6, max_size=6),
    )
    connection_id = draw(ours | st.binary(max_size=20))
    whole = draw(st.sampled_from([short_packet, long_packet]))(connection_id)
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole


@given(setups(), packets() | st.binary(max_size=60))
@example(Setup(256, tuple(range(256)), 0, tuple(range(0, 255, 2))), short_packet(bytes(10)))
def test_the_program_does_what_the_reference_does(setup: Setup, packet: bytes) -> None:
    program = build_program(**setup._asdict())
    check_program(program)
    result = run_program(program, packet)
    assert result == steer(packet, **setup._asdict())
    live = range(setup.slot_count) if setup.live_slots is None else setup.live_slots
    assert result in {*setup.active_slots, *live}


@given(st.integers(0, 7), st.integers(0, 300), st.binary(min_size=6, max_size=6))
def test_a_packet_with_our_id_goes_to_the_slot_that_the_id_names(
    slot: int, generation: int, tail: bytes
) -> None:
    program = build_program(slot_count=8, active_slots=(0, 1))
    connection_id = encode_prefix(slot, generation) + tail
    named = parse_connection_id(connection_id)
    assert named is not None
    for packet in (short_packet(connection_id, b""), long_packet(connection_id, b"")):
        assert run_program(program, packet) == named.slot == slot


@given(st.binary(min_size=8, max_size=20), st.binary(max_size=40), st.binary(max_size=40))
def test_all_packets_of_an_attempt_meet(connection_id: bytes, one: bytes, other: bytes) -> None:
    program = build_program(slot_count=8, active_slots=(1, 2, 5), server_id=200)
    first = run_program(program, long_packet(connection_id, one))
    assert run_program(program, long_packet(connection_id, other)) == first
    assert first in {1, 2, 5}


def test_a_slot_that_is_not_live_gets_nothing() -> None:
    program = build_program(slot_count=4, active_slots=(2, 3), live_slots=(0, 2, 3))
    dead = short_packet(encode_prefix(1, 1) + bytes(6))
    assert run_program(program, dead) in {2, 3}
    draining = short_packet(encode_prefix(0, 1) + bytes(6))
    assert run_program(program, draining) == 0


def test_another_servers_id_is_a_strangers() -> None:
    program = build_program(slot_count=4, active_slots=(2,), server_id=1)
    assert run_program(program, short_packet(encode_prefix(0, 1, server_id=2) + bytes(6))) == 2
    assert run_program(program, short_packet(encode_prefix(0, 1, server_id=1) + bytes(6))) == 0


@pytest.mark.parametrize("id_bytes", [8, 20])
def test_new_connections_are_spread_evenly(id_bytes: int) -> None:
    chance = random.Random(7)
    active = (1, 3, 4)
    program = build_program(slot_count=6, active_slots=active)
    got = Counter(
        run_program(program, long_packet(chance.randbytes(id_bytes))) for _ in range(6000)
    )
    assert set(got) == set(active)
    assert all(1800 < count < 2200 for count in got.values())


def test_ids_that_count_upwards_are_spread_too() -> None:
    program = build_program(slot_count=4, active_slots=(0, 1, 2, 3))
    got = Counter(
        run_program(program, long_packet(number.to_bytes(8, "big"))) for number in range(4000)
    )
    assert all(800 < got[slot] < 1200 for slot in range(4))


@pytest.mark.parametrize(
    ("slot_count", "active_slots", "server_id", "live_slots"),
    [
        (0, (0,), 0, None),
        (257, (0,), 0, None),
        (4, (), 0, None),
        (4, (4,), 0, None),
        (4, (-1,), 0, None),
        (4, (0,), 256, None),
        (4, (0,), 0, (4,)),
    ],
)
def test_what_does_not_exist_is_refused(
    slot_count: int,
    active_slots: tuple[int, ...],
    server_id: int,
    live_slots: tuple[int, ...] | None,
) -> None:
    with pytest.raises(LocalError):
        build_program(
            slot_count=slot_count,
            active_slots=active_slots,
            server_id=server_id,
            live_slots=live_slots,
        )


# on real sockets


class Group:
    """Sockets of one SO_REUSEPORT group and somebody who sends to it."""

    def __init__(self, host: str, slot_count: int) -> None:
        first = bind_udp(host, 0, reuse_port=True, buffer_bytes=200_000)
        self.sockets = [first]
        for _ in range(slot_count - 1):
            port = first.getsockname()[1]
            self.sockets.append(bind_udp(host, port, reuse_port=True, buffer_bytes=200_000))
        self.address = first.getsockname()
        self.sender = socket.socket(first.family, socket.SOCK_DGRAM)

    def send(self, packet: bytes) -> None:
        self.sender.sendto(packet, self.address)

    def take(self) -> dict[int, list[bytes]]:
        """What each slot's socket has; loopback delivers before ``sendto`` returns."""
        got: dict[int, list[bytes]] = {}
        for slot, sock in enumerate(self.sockets):
            while select.select([sock], [], [], 0)[0]:
                got.setdefault(slot, []).append(sock.recv(2048))
        return got

    def close(self) -> None:
        for sock in (*self.sockets, self.sender):
            sock.close()


@pytest.fixture(params=[("127.0.0.1", 2), ("127.0.0.1", 4), ("::1", 3)], ids=str)
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    made = Group(*request.param)
    yield made
    made.close()


def expect(packets: Sequence[bytes], setup: Setup) -> dict[int, list[bytes]]:
    wanted: dict[int, list[bytes]] = {}
    for packet in packets:
        wanted.setdefault(steer(packet, **setup._asdict()), []).append(packet)
    return wanted


def sample_packets(slot_count: int, count: int) -> list[bytes]:
    chance = random.Random(slot_count)
    made = [b"", b"\x40", b"\xc0", long_packet(b""), long_packet(bytes(8))[:13]]
    for _ in range(count):
        ours = encode_prefix(chance.randrange(slot_count + 2), 1) + chance.randbytes(6)
        strangers = chance.randbytes(chance.randrange(21))
        for connection_id in (ours, strangers):
            packet = chance.choice([short_packet, long_packet])(connection_id)
            made.append(packet[: chance.randrange(len(packet))] if not len(made) % 5 else packet)
    return made


@needs_steering
def test_the_kernel_does_what_the_reference_does(group: Group) -> None:
    slot_count = len(group.sockets)
    for live in (None, (0,)):
        setup = Setup(slot_count, tuple(range(1, slot_count)), 0, live)
        attach(group.sockets[0], build_program(**setup._asdict()))
        packets = sample_packets(slot_count, 300)
        for start in range(0, len(packets), 50):
            some = packets[start : start + 50]
            for packet in some:
                group.send(packet)
            assert group.take() == expect(some, setup)


@needs_steering
def test_any_member_replaces_the_program_of_the_whole_group(group: Group) -> None:
    last = len(group.sockets) - 1
    packet = long_packet(bytes(8))
    for sock, active in ((group.sockets[0], last), (group.sockets[last], 0)):
        attach(sock, build_program(slot_count=last + 1, active_slots=(active,)))
        group.send(packet)
        assert group.take() == {active: [packet]}


@needs_steering
def test_swapping_the_active_set_under_load_misleads_nothing() -> None:
    group = Group("127.0.0.1", 4)
    count = 4000
    room = threading.Semaphore(100)  # so that no receive buffer overflows
    ours = [short_packet(encode_prefix(n % 4, 1) + n.to_bytes(6, "big")) for n in range(count)]
    new = [long_packet(n.to_bytes(8, "big")) for n in range(count)]
    attach(group.sockets[0], build_program(slot_count=4, active_slots=(0, 1)))

    def send() -> None:
        for pair in zip(ours, new, strict=True):
            for packet in pair:
                if not room.acquire(timeout=30):
                    return
                group.send(packet)

    sender = threading.Thread(target=send)
    sender.start()
    got: dict[int, list[bytes]] = {slot: [] for slot in range(4)}
    turn = 0
    while sender.is_alive():  # at most 100 packets a turn: the set changes 80 times or more
        select.select(group.sockets, [], [], 0.05)
        turn += 1
        active = (0, 1) if turn % 2 else (2, 3)
        attach(group.sockets[turn % 4], build_program(slot_count=4, active_slots=active))
        for slot, received in group.take().items():
            got[slot] += received
            room.release(len(received))
    sender.join()
    for slot, received in group.take().items():
        got[slot] += received
    group.close()
    assert sum(map(len, got.values())) == 2 * count
    for slot, received in got.items():
        named = [packet[3] for packet in received if packet[0] == 0x40]
        assert set(named) == {slot}
        assert len(named) == count // 4
        strangers = [packet for packet in received if packet[0] != 0x40]
        for packet in strangers:
            assert slot in {
                steer(packet, slot_count=4, active_slots=active) for active in ((0, 1), (2, 3))
            }


@needs_steering
def test_the_largest_program_is_accepted_by_the_kernel() -> None:
    program = build_program(
        slot_count=256, active_slots=tuple(range(256)), live_slots=tuple(range(255))
    )
    check_program(program)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        attach(sock, program)


def test_support_is_found_out_without_a_port() -> None:
    assert is_supported() in {True, False}
