"""Packets that reached the wrong worker: told apart, handed over, taken in."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quic.certificates import SERVER_NAME
from tests.quic.link import START, client_config, make_engine, server_config
from toppy.net.steering import choose_active
from toppy.net.udp_socket import UdpSocket, bind_udp
from toppy.quic.engine import Address, Admission, Buffer
from toppy.quic.gate import ConnectionGate, GateLimits
from toppy.wire.connection_id import WorkerAddress, encode_prefix
from toppy.worker.strays import Strays

SOURCE: Address = ("198.51.100.7", 50000)
NOW = 5.0


def make_gate() -> ConnectionGate:
    return ConnectionGate(GateLimits(100, 100, 100, 10.0))


@dataclass
class Worker:
    """A worker's strays, and what its engine was given."""

    strays: Strays
    gate: ConnectionGate
    sockets: list[UdpSocket]
    received: list[tuple[UdpSocket, bytes, int, Address]] = field(default_factory=list)
    answer: Callable[[bytes], None] = lambda _: None
    """What the engine does with a stretch."""

    def sort(self, *packets: bytes, source: Address = SOURCE, row: int = 0) -> None:
        """One batch; all packets but the last have the length of the first."""
        size = len(packets[0]) if len(packets) > 1 else 0
        assert all(len(packet) == size for packet in packets[:-1])
        self.strays.sort(self.sockets[row], b"".join(packets), size, source, NOW)

    def take_in(self) -> None:
        """Everything that others handed over."""
        while self.strays.receive(NOW):
            pass

    @property
    def packets(self) -> list[bytes]:
        """Whatever the engine was given, one by one."""
        return [packet for _, data, size, _ in self.received for packet in split(data, size)]

    @property
    def stretches(self) -> list[list[bytes]]:
        return [split(data, size) for _, data, size, _ in self.received]


def split(data: bytes, size: int) -> list[bytes]:
    step = size or len(data)
    return [data[at : at + step] for at in range(0, len(data), step)]


@dataclass
class Site:
    """Workers that find each other."""

    directory: Path
    host: str = "127.0.0.1"
    workers: list[Worker] = field(default_factory=list)

    def worker(self, slot: int, generation: int = 1) -> Worker:
        rows = [UdpSocket(bind_udp(self.host, 0, buffer_bytes=65536)) for _ in range(2)]
        gate = make_gate()
        received: list[tuple[UdpSocket, bytes, int, Address]] = []
        made: list[Worker] = []

        def receive(
            sock: UdpSocket, buffer: Buffer, segment_size: int, source: Address, now: float
        ) -> None:
            assert now == NOW
            received.append((sock, bytes(buffer), segment_size, source))
            made[0].answer(bytes(buffer))

        own = WorkerAddress(slot, generation % 256)
        strays = Strays(str(self.directory), own, [[row] for row in rows], gate, receive)
        made.append(Worker(strays, gate, rows, received))
        self.workers += made
        return made[0]

    def close(self) -> None:
        for worker in self.workers:
            worker.strays.close()
            for sock in worker.sockets:
                sock.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """Its directory has a short name: unix socket paths are limited to 107 bytes."""
    made = Site(Path(tempfile.mkdtemp(prefix="stray-")))
    yield made
    made.close()
    shutil.rmtree(made.directory)


def short(slot: int, generation: int = 1, number: int = 0) -> bytes:
    """A packet of a connection of that worker."""
    return b"\x40" + encode_prefix(slot, generation) + bytes((number,)) * 6 + bytes(20)


def long(slot: int, generation: int = 1, number: int = 0) -> bytes:
    """The same with a long header, of the same size."""
    connection_id = encode_prefix(slot, generation) + bytes((number,)) * 6
    return b"\xe0\x00\x00\x00\x01\x0a" + connection_id + bytes(15)


def attempt(connection_id: bytes = b"a client") -> bytes:
    """A first packet of a new connection."""
    return b"\xc0\x00\x00\x00\x01" + bytes((len(connection_id),)) + connection_id + bytes(20)


# whose a packet is


def test_what_is_ours_is_given_to_the_engine_as_it_came(site: Site) -> None:
    worker = site.worker(0)
    worker.strays.learn((0,), {0: 1})
    batch = [short(0, number=1), short(0, number=2), short(0)[:20]]
    worker.sort(*batch)
    assert worker.received == [(worker.sockets[0], b"".join(batch), len(batch[0]), SOURCE)]
    assert (worker.strays.handed_over, worker.strays.lost) == (0, 0)


@pytest.mark.parametrize("make", [short, long])
def test_what_is_another_workers_is_handed_over(site: Site, make: Callable[[int], bytes]) -> None:
    worker, other = site.worker(0), site.worker(1)
    worker.strays.learn((0, 1), {0: 1, 1: 1})
    worker.sort(make(1))
    assert worker.received == []
    other.take_in()
    assert other.received == [(other.sockets[0], make(1), 0, SOURCE)]
    assert (worker.strays.handed_over, worker.strays.lost) == (1, 0)


def test_stretches_of_a_batch_go_their_ways_and_keep_their_order(site: Site) -> None:
    worker, second, third = site.worker(0), site.worker(1), site.worker(2)
    worker.strays.learn((0,), {0: 1, 1: 1, 2: 1})
    slots = [0, 0, 1, 1, 1, 0, 2, 1, 0]
    packets = [short(slot, number=number) for number, slot in enumerate(slots)]
    worker.sort(*packets)
    for other in (second, third):
        other.take_in()
    assert worker.stretches == [packets[0:2], packets[5:6], packets[8:9]]
    assert second.stretches == [packets[2:5], packets[7:8]]
    assert third.stretches == [packets[6:7]]
    assert worker.strays.handed_over == 5


@given(st.lists(st.sampled_from([0, 1, 2, 9]), min_size=1, max_size=40), st.integers(1, 31))
@settings(deadline=None)
def test_every_packet_reaches_its_worker_once_and_in_order(slots: list[int], last: int) -> None:
    site = Site(Path(tempfile.mkdtemp(prefix="stray-")))
    workers = [site.worker(slot) for slot in range(3)]
    try:
        workers[0].strays.learn((0,), dict.fromkeys(range(3), 1))
        packets = [short(slot, number=number) for number, slot in enumerate(slots)]
        packets[-1] = packets[-1][:last]  # the last one of a batch may be shorter
        workers[0].sort(*packets)
        for other in workers[1:]:
            other.take_in()
        where = [*slots[:-1], slots[-1] if last >= 11 else 0]
        for slot, worker in enumerate(workers):
            wanted = [p for p, at in zip(packets, where, strict=True) if at == slot or not slot]
            if slot == 0:  # a slot without a worker, and what names none
                wanted = [p for p, at in zip(packets, where, strict=True) if at in (0, 9)]
            assert worker.packets == wanted
    finally:
        site.close()
        shutil.rmtree(site.directory)


@pytest.mark.parametrize(
    "packet",
    [
        short(1, generation=2),  # its worker has been replaced
        short(5),  # a slot without a worker
        short(0, generation=9),  # our slot's earlier worker
        attempt(),
        attempt(b""),
        b"\x40",
        b"\xc0\x00",
        b"\x40" + bytes(30),
    ],
    ids=["earlier", "no worker", "ours earlier", "attempt", "no id", "short", "long", "random"],
)
def test_what_nobody_else_knows_is_left_to_our_engine(site: Site, packet: bytes) -> None:
    worker, other = site.worker(0), site.worker(1)
    worker.strays.learn((0, 1), {0: 1, 1: 1})
    worker.sort(packet)
    other.take_in()
    assert worker.packets == [packet]
    assert other.packets == []


def test_generations_are_told_apart_modulo_256(site: Site) -> None:
    worker, other = site.worker(0, 300), site.worker(1, 300)
    worker.strays.learn((0, 1), {0: 300, 1: 300})
    worker.sort(short(1, 300))
    worker.sort(short(0, 300))
    other.take_in()
    assert other.packets == [short(1, 300)]
    assert worker.packets == [short(0, 300)]


def test_a_worker_that_has_not_learned_of_others_keeps_everything(site: Site) -> None:
    worker = site.worker(0)
    worker.sort(short(1))
    assert worker.packets == [short(1)]


def test_an_empty_datagram_disturbs_nobody(site: Site) -> None:
    worker = site.worker(0)
    worker.sort(b"")
    assert worker.packets == []


# what arrives


def test_the_source_and_the_listen_address_travel_along(site: Site) -> None:
    site.host = "::1" if has_ipv6() else "127.0.0.1"
    source: Address = ("fe80::1:2:3%3", 65535)
    worker, other = site.worker(0), site.worker(1)
    worker.strays.learn((0,), {0: 1, 1: 1})
    worker.sort(short(1), source=source, row=1)
    other.take_in()
    assert other.received == [(other.sockets[1], short(1), 0, source)]


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


def test_the_peer_is_answered_from_the_address_that_it_talks_to(site: Site) -> None:
    site.host = "0.0.0.0"

    def wildcard() -> UdpSocket:
        sock = bind_udp("0.0.0.0", 0, buffer_bytes=65536)
        return UdpSocket(sock, answers_from_same_address=True)

    worker, other = site.worker(0), site.worker(1)
    for each in (worker, other):
        for sock in each.sockets:
            sock.close()
        each.sockets[:] = [wildcard()]
        each.strays._rows = ([each.sockets[0]],)
        each.strays._row_of = {id(each.sockets[0]): 0}
    worker.strays.learn((0,), {0: 1, 1: 1})
    port = worker.sockets[0].local_address[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(10)
        peer.sendto(short(1), ("127.0.0.9", port))
        batch = None
        while batch is None:
            batch = worker.sockets[0].receive()
        worker.strays.sort(worker.sockets[0], batch[0], batch[1], batch[2], NOW)
        other.take_in()
        other.sockets[0].send(b"answer", 0, batch[2])
        data, source = peer.recvfrom(100)
    assert (data, source[0]) == (b"answer", "127.0.0.9")


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_garbage_from_another_worker_disturbs_nobody(data: bytes) -> None:
    site = Site(Path(tempfile.mkdtemp(prefix="stray-")))
    try:
        worker = site.worker(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(data, str(site.directory / "stray-0.sock"))
        assert worker.strays.receive(NOW)
        assert not worker.strays.receive(NOW)
    finally:
        site.close()
        shutil.rmtree(site.directory)


def test_a_whole_gro_buffer_can_be_handed_over(site: Site) -> None:
    worker, other = site.worker(0), site.worker(1)
    worker.strays.learn((0,), {0: 1, 1: 1})
    packets = [short(1, number=n % 256) + bytes(1169) for n in range(54)]
    worker.sort(*packets)
    other.take_in()
    assert other.stretches == [packets]


# what cannot be handed over


def test_what_is_for_a_worker_that_is_gone_is_counted_as_lost(site: Site) -> None:
    worker, other = site.worker(0), site.worker(1)
    worker.strays.learn((0,), {0: 1, 1: 1, 2: 1})
    other.strays.close()
    worker.sort(short(1), short(1), short(0))
    worker.sort(short(2))
    assert (worker.strays.handed_over, worker.strays.lost) == (0, 3)
    assert worker.packets == [short(0)]


def test_what_a_full_queue_does_not_take_is_counted_as_lost(site: Site) -> None:
    worker, other = site.worker(0), site.worker(1)
    worker.strays.learn((0,), {0: 1, 1: 1})
    sent = 0
    while not worker.strays.lost:  # whatever net.unix.max_dgram_qlen is
        worker.sort(short(1, number=sent % 256))
        sent += 1
        assert sent < 100_000
    other.take_in()
    assert len(other.packets) == worker.strays.handed_over == sent - 1
    worker.sort(short(1))  # there is room again
    assert worker.strays.handed_over == sent


# while it drains


def turn_away(worker: Worker) -> None:
    """The engine asks the gate about every packet, and knows no connection."""
    worker.answer = lambda _: _ignore(worker.gate.decide(SOURCE, False))


def _ignore(decision: Admission) -> None:
    assert decision is Admission.IGNORE


def test_a_new_attempt_is_handed_to_the_active_worker_that_the_kernel_would_choose(
    site: Site,
) -> None:
    worker, *active = [site.worker(slot) for slot in range(4)]
    worker.gate.is_draining = True
    turn_away(worker)
    worker.strays.learn((1, 2, 3), {0: 1, 1: 2, 2: 2, 3: 2})
    ids = [number.to_bytes(8, "big") for number in range(60)]
    for connection_id in ids:
        worker.sort(attempt(connection_id))
        for other in active:  # a unix socket's queue is short
            other.take_in()
    for slot, other in enumerate(active, 1):
        assert other.packets == [
            attempt(each) for each in ids if choose_active(each, (1, 2, 3)) == slot
        ]
        assert other.packets


def test_a_packet_of_a_handshake_under_way_stays(site: Site) -> None:
    worker, active = site.worker(0), site.worker(1)
    worker.gate.is_draining = True
    worker.strays.learn((1,), {0: 1, 1: 2})
    worker.sort(attempt(), short(0) + bytes(3))  # the engine asks nobody: it knows the connection
    active.take_in()
    assert worker.packets == [attempt(), short(0) + bytes(3)]
    assert active.packets == []


def test_attempts_among_other_packets_keep_their_order(site: Site) -> None:
    worker, active = site.worker(0), site.worker(1)
    worker.gate.is_draining = True
    worker.strays.learn((1,), {0: 1, 1: 2})
    first = attempt(b"attempt 1")[:31]
    second = attempt(b"attempt 2")[:31]
    ours = short(0)[:31]
    theirs = short(1, 2)[:31]

    def answer(data: bytes) -> None:
        if data in (first, second):
            worker.gate.decide(SOURCE, False)

    worker.answer = answer
    worker.sort(ours, first, theirs, theirs, second, ours)
    active.take_in()
    assert active.packets == [first, theirs, theirs, second]
    assert worker.packets == [ours, first, second, ours], "the engine is asked about attempts"


@pytest.mark.parametrize(
    ("packet", "active"),
    [(attempt(b"short"), (1,)), (attempt(), ()), (attempt(), (0,)), (b"\xc0", (1,))],
    ids=["ID too short", "nobody active", "ourselves", "cut off"],
)
def test_an_attempt_that_nobody_else_can_take_is_not_handed_over(
    site: Site, packet: bytes, active: tuple[int, ...]
) -> None:
    worker, other = site.worker(0), site.worker(1)
    worker.gate.is_draining = True
    turn_away(worker)
    worker.strays.learn(active, {0: 1, 1: 2})
    worker.sort(packet)
    other.take_in()
    assert other.packets == []
    assert (worker.strays.handed_over, worker.strays.lost) == (0, 0)


def test_what_was_handed_over_once_is_not_handed_on(site: Site) -> None:
    worker, other = site.worker(0), site.worker(1)
    other.gate.is_draining = True
    turn_away(other)
    worker.strays.learn((1,), {0: 1, 1: 2})
    other.strays.learn((0,), {0: 1, 1: 2})
    worker.sort(short(1, 2))
    other.take_in()
    worker.take_in()
    assert other.packets == [short(1, 2)]
    assert worker.packets == []


@pytest.mark.parametrize("engine", ["native", "aioquic"])
def test_an_attempt_that_met_a_draining_worker_succeeds_at_the_active_one(
    site: Site, engine: str
) -> None:
    """With real engines: the draining one turns the attempt away, the other one accepts it."""
    client = make_engine(engine, client_config())
    client.connect(("127.0.0.1", 1), SERVER_NAME, START)
    first = [data for data, _, _ in client.poll_transmits(START)]
    draining, active = site.worker(0, 1), site.worker(1, 2)
    draining.gate.is_draining = True
    draining.strays.learn((1,), {0: 1, 1: 2})
    for worker in (draining, active):
        prefix = encode_prefix(worker.strays._own.slot, worker.strays._own.generation)
        server = make_engine(
            engine, server_config(connection_id_prefix=prefix), gate=worker.gate.decide
        )
        worker.answer = lambda data, server=server: server.receive(data, 0, SOURCE, START)  # type: ignore[misc]
        if worker is active:
            accepting = server
    for packet in first:
        draining.sort(packet)
    active.take_in()
    assert draining.gate.turned_away == draining.strays.handed_over >= 1
    assert accepting.poll_events()
    assert accepting.poll_transmits(START)


# its socket


def test_the_socket_file_is_gone_when_the_worker_is(site: Site) -> None:
    (site.directory / "stray-3.sock").touch()  # left by one that was killed
    worker = site.worker(3)
    assert (site.directory / "stray-3.sock").is_socket()
    worker.strays.close()
    assert not list(site.directory.iterdir())
