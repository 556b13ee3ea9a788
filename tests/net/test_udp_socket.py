from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.net import udp_socket
from toppy.net.udp_socket import SendResult, UdpSocket, bind_udp, connect_udp

BUFFER_BYTES = 200_000  # what Linux grants to everybody
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
Datagrams = list[bytes]


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def host(request: pytest.FixtureRequest) -> str:
    return LOOPBACK[request.param]


@pytest.fixture
def bound(host: str) -> Iterator[UdpSocket]:
    sock = UdpSocket(bind_udp(host, 0, buffer_bytes=BUFFER_BYTES, may_fragment=True))
    yield sock
    sock.close()


@pytest.fixture
def connected(bound: UdpSocket) -> Iterator[UdpSocket]:
    sock = UdpSocket(connect_udp(*bound.local_address, buffer_bytes=BUFFER_BYTES))
    yield sock
    sock.close()


def wait_readable(sock: UdpSocket) -> None:
    assert select.select([sock.fileno()], [], [], 5.0)[0], "nothing came"


def split(payloads: memoryview, segment_size: int) -> Datagrams:
    if not segment_size:
        return [bytes(payloads)]
    return [
        bytes(payloads[start : start + segment_size])
        for start in range(0, len(payloads), segment_size)
    ]


def receive_datagrams(sock: UdpSocket, count: int) -> Datagrams:
    got: Datagrams = []
    while len(got) < count:
        wait_readable(sock)
        while (batch := sock.receive()) is not None:
            got += split(batch[0], batch[1])
    return got


def payloads_of(count: int, size: int, last: int | None = None) -> bytes:
    sizes = [size] * (count - 1) + [size if last is None else last]
    return b"".join(index.to_bytes(2, "big") * (n // 2 + 1) for index, n in enumerate(sizes))[
        : sum(sizes)
    ]


class Obstructed(socket.socket):
    """Fails chosen calls with an error number; the rest reaches the kernel."""

    batch_error: Callable[[int], int] = staticmethod(lambda _: 0)
    single_errors: list[int]
    mtu = 0

    @classmethod
    def of(cls, sock: socket.socket) -> Obstructed:
        made = cls(fileno=sock.detach())
        made.single_errors = []
        made.batches = 0
        made.singles = 0
        return made

    batches: int
    singles: int

    def sendmsg(self, *args: Any) -> int:
        self.batches += 1
        if number := self.batch_error(self.batches):
            raise OSError(number, os.strerror(number))
        return super().sendmsg(*args)

    def _single(self) -> None:
        self.singles += 1
        if self.single_errors and (number := self.single_errors.pop(0)):
            raise OSError(number, os.strerror(number))

    def send(self, *args: Any) -> int:
        self._single()
        return super().send(*args)

    def sendto(self, *args: Any) -> int:
        self._single()
        return super().sendto(*args)

    def getsockopt(self, *args: Any) -> Any:
        if self.mtu and args in {(socket.IPPROTO_IP, 14), (socket.IPPROTO_IPV6, 24)}:
            return self.mtu
        return super().getsockopt(*args)


@pytest.fixture
def obstructed(bound: UdpSocket) -> Iterator[tuple[UdpSocket, Obstructed]]:
    raw = Obstructed.of(connect_udp(*bound.local_address, buffer_bytes=BUFFER_BYTES))
    sock = UdpSocket(raw)
    yield sock, raw
    sock.close()


def fails_with(number: int) -> Callable[[int], int]:
    return lambda _: number


# receiving


def test_nothing_waiting_is_none(bound: UdpSocket) -> None:
    assert bound.receive() is None


def test_a_datagram_comes_with_its_source(bound: UdpSocket, connected: UdpSocket) -> None:
    assert connected.send(b"hello", 0) is SendResult.SENT
    wait_readable(bound)
    batch = bound.receive()
    assert batch is not None
    assert (bytes(batch[0]), batch[1], batch[2]) == (b"hello", 0, connected.local_address)


def test_an_empty_datagram_is_not_nothing(bound: UdpSocket, connected: UdpSocket) -> None:
    assert connected.send(b"", 0) is SendResult.SENT
    wait_readable(bound)
    batch = bound.receive()
    assert batch is not None
    assert (bytes(batch[0]), batch[1]) == (b"", 0)


def test_the_answer_reaches_the_source(bound: UdpSocket, connected: UdpSocket) -> None:
    connected.send(b"ping", 0)
    wait_readable(bound)
    batch = bound.receive()
    assert batch is not None
    assert bound.send(b"pong", 0, batch[2]) is SendResult.SENT
    assert receive_datagrams(connected, 1) == [b"pong"]


def test_a_link_local_source_keeps_its_zone_and_can_be_answered() -> None:
    address = _link_local_address()
    if address is None:
        pytest.skip("this host has no link-local address")
    one = UdpSocket(bind_udp(address, 0, buffer_bytes=BUFFER_BYTES))
    other = UdpSocket(connect_udp(address, one.local_address[1], buffer_bytes=BUFFER_BYTES))
    try:
        assert other.send(b"ping", 0) is SendResult.SENT
        wait_readable(one)
        batch = one.receive()
        assert batch is not None
        source = batch[2]
        assert source == other.local_address
        assert "%" in source[0]
        assert one.send(b"pong", 0, source) is SendResult.SENT
        assert receive_datagrams(other, 1) == [b"pong"]
    finally:
        one.close()
        other.close()


def _link_local_address() -> str | None:
    """One of this host's own: packets to it stay on the host."""
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as table:  # noqa: PTH123
            lines = [line.split() for line in table]
    except OSError:
        return None
    for address, _, _, scope, flags, interface in lines:
        if scope == "20" and not int(flags, 16) & 0x40:  # tentative addresses cannot be bound
            text = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))
            return f"{text}%{interface}"
    return None


def test_a_closed_port_is_counted_and_does_not_raise(host: str) -> None:
    port = _closed_port(host)
    sock = UdpSocket(connect_udp(host, port, buffer_bytes=BUFFER_BYTES))
    try:
        assert sock.send(b"anybody there?", 0) is SendResult.SENT
        wait_readable(sock)
        assert sock.receive() is None
        assert sock.unreachable == 1
    finally:
        sock.close()


def test_a_closed_port_is_reported_by_the_next_send_which_may_be_repeated(host: str) -> None:
    sock = UdpSocket(connect_udp(host, _closed_port(host), buffer_bytes=BUFFER_BYTES))
    try:
        assert sock.send(b"anybody there?", 0) is SendResult.SENT
        wait_readable(sock)
        assert sock.send(b"hello?", 0) is SendResult.UNREACHABLE
        assert sock.unreachable == 1
        assert sock.send(b"hello?", 0) is SendResult.SENT
    finally:
        sock.close()


def _closed_port(host: str) -> int:
    probe = bind_udp(host, 0, buffer_bytes=4096)
    port = int(probe.getsockname()[1])
    probe.close()
    return port


def test_a_batch_that_was_refused_is_reported_as_unreachable(host: str) -> None:
    sock = UdpSocket(connect_udp(host, _closed_port(host), buffer_bytes=BUFFER_BYTES))
    try:
        sock.send(b"anybody there?", 0)
        wait_readable(sock)
        assert sock.send(bytes(3000), 1000) is SendResult.UNREACHABLE
        assert sock.sent_bytes == 0
        assert sock.uses_gso
    finally:
        sock.close()


def test_overflow_counts_what_the_kernel_dropped(host: str) -> None:
    receiver = UdpSocket(bind_udp(host, 0, buffer_bytes=4096))
    sender = UdpSocket(connect_udp(*receiver.local_address, buffer_bytes=BUFFER_BYTES))
    try:
        sent = 100
        for _ in range(sent):
            assert sender.send(bytes(1000), 0) is SendResult.SENT
        received = 0
        while (batch := receiver.receive()) is not None:
            received += len(split(batch[0], batch[1]))
        assert 0 < received < sent
        assert receiver.overflow == sent - received
    finally:
        receiver.close()
        sender.close()


def test_overflow_begins_at_zero_on_a_socket_that_has_dropped_before(host: str) -> None:
    raw = bind_udp(host, 0, buffer_bytes=4096)
    sender = UdpSocket(connect_udp(*raw.getsockname()[:2], buffer_bytes=BUFFER_BYTES))
    for _ in range(100):
        sender.send(bytes(1000), 0)
    receiver = UdpSocket(raw)
    try:
        assert receiver.overflow == 0
        sender.send(bytes(1000), 0)
        assert receiver.overflow == 1
    finally:
        receiver.close()
        sender.close()


# sending batches


@pytest.mark.parametrize(
    ("count", "size", "last"),
    [
        (2, 1, None),
        (3, 1000, 1),
        (64, 1000, None),
        (65, 1000, None),
        (130, 1200, 7),
        (64, 1, None),
        (300, 3, 2),
        (2, 32_500, None),
        (2, 40_000, 5),
        (2, 65_000, 65_000),
        (3, 65_400, 65_400),
    ],
)
@pytest.mark.parametrize("gso", [True, False], ids=["gso", "no gso"])
def test_every_datagram_of_a_batch_arrives_whole_and_in_order(
    bound: UdpSocket, count: int, size: int, last: int | None, gso: bool
) -> None:
    payloads = payloads_of(count, size, last)
    raw = connect_udp(*bound.local_address, buffer_bytes=BUFFER_BYTES)
    sender = UdpSocket(raw, gso=gso)
    try:
        assert sender.send(payloads, size) is SendResult.SENT
        got = receive_datagrams(bound, count)
        assert got == split(memoryview(payloads), size)
        assert sender.uses_gso is gso
    finally:
        sender.close()


def test_a_batch_is_received_as_a_batch(bound: UdpSocket, connected: UdpSocket) -> None:
    payloads = payloads_of(20, 1200, 77)
    connected.send(payloads, 1200)
    wait_readable(bound)
    batch = bound.receive()
    assert batch is not None
    assert (bytes(batch[0]), batch[1]) == (payloads, 1200)


def test_without_gro_datagrams_come_one_by_one(host: str) -> None:
    receiver = UdpSocket(bind_udp(host, 0, buffer_bytes=BUFFER_BYTES), gro=False)
    sender = UdpSocket(connect_udp(*receiver.local_address, buffer_bytes=BUFFER_BYTES))
    try:
        sender.send(payloads_of(3, 1200), 1200)
        wait_readable(receiver)
        batch = receiver.receive()
        assert batch is not None
        assert (len(batch[0]), batch[1]) == (1200, 0)
    finally:
        receiver.close()
        sender.close()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_batch_arrives_as_it_was_sent(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 1500))
    count = data.draw(st.integers(1, 130))
    last = data.draw(st.integers(1, size))
    gso = data.draw(st.booleans())
    payloads = payloads_of(count, size, last)
    receiver = UdpSocket(bind_udp("127.0.0.1", 0, buffer_bytes=BUFFER_BYTES))
    sender = UdpSocket(bind_udp("127.0.0.1", 0, buffer_bytes=BUFFER_BYTES), gso=gso)
    try:
        assert sender.send(payloads, size, receiver.local_address) is SendResult.SENT
        assert receive_datagrams(receiver, count) == split(memoryview(payloads), size)
    finally:
        receiver.close()
        sender.close()


@pytest.mark.parametrize("size", [65_507, 65_000, 9_000])
def test_the_largest_datagram_goes_through_both_ways(
    bound: UdpSocket, connected: UdpSocket, size: int
) -> None:
    payload = os.urandom(size)
    assert connected.send(payload, 0) is SendResult.SENT
    assert receive_datagrams(bound, 1) == [payload]
    assert bound.send(payload, size, connected.local_address) is SendResult.SENT
    assert receive_datagrams(connected, 1) == [payload]


def test_what_no_datagram_can_hold_is_too_large(connected: UdpSocket) -> None:
    assert connected.send(bytes(65_536), 0) is SendResult.TOO_LARGE


def test_a_full_socket_would_block_and_says_how_much_went_out(host: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender = UdpSocket(ours, gso=False, gro=False)
    try:
        payloads = payloads_of(3000, 100)
        assert sender.send(payloads, 100) is SendResult.WOULD_BLOCK
        sent = sender.sent_bytes
        assert 0 < sent < len(payloads)
        assert sent % 100 == 0
        for start in range(0, sent, 100):
            assert theirs.recv(200) == payloads[start : start + 100]
        assert sender.send(payloads[sent : sent + 100], 0) is SendResult.SENT
        assert theirs.recv(200) == payloads[sent : sent + 100]
    finally:
        sender.close()
        theirs.close()


# what the kernel refuses


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.EOPNOTSUPP])
def test_where_gso_is_refused_datagrams_go_one_by_one_from_then_on(
    bound: UdpSocket, obstructed: tuple[UdpSocket, Obstructed], number: int
) -> None:
    sock, raw = obstructed
    raw.batch_error = fails_with(number)
    payloads = payloads_of(5, 1000, 10)
    before = sock.uses_gso
    assert sock.send(payloads, 1000) is SendResult.SENT
    assert (before, sock.uses_gso) == (True, False)
    assert sock.send(payloads, 1000) is SendResult.SENT
    assert receive_datagrams(bound, 10) == 2 * split(memoryview(payloads), 1000)
    assert (raw.batches, raw.singles) == (1, 10)


def test_a_long_batch_falls_back_in_its_middle(
    bound: UdpSocket, obstructed: tuple[UdpSocket, Obstructed]
) -> None:
    sock, raw = obstructed
    raw.batch_error = lambda attempt: errno.EIO if attempt == 2 else 0
    payloads = payloads_of(150, 1000)
    assert sock.send(payloads, 1000) is SendResult.SENT
    assert receive_datagrams(bound, 150) == split(memoryview(payloads), 1000)
    assert (raw.batches, raw.singles) == (2, 86)


@pytest.mark.parametrize("number", [errno.EMSGSIZE, errno.EINVAL])
def test_segments_above_the_path_mtu_go_as_fragments_and_smaller_ones_in_batches(
    bound: UdpSocket, obstructed: tuple[UdpSocket, Obstructed], number: int
) -> None:
    sock, raw = obstructed
    raw.mtu = 1500
    raw.batch_error = fails_with(number)
    assert sock.send(payloads_of(3, 4000), 4000) is SendResult.SENT
    assert sock.send(payloads_of(3, 4000), 4000) is SendResult.SENT
    assert (raw.batches, raw.singles) == (1, 6)
    assert sock.uses_gso
    raw.batch_error = fails_with(0)
    assert sock.send(payloads_of(3, 1200), 1200) is SendResult.SENT
    assert (raw.batches, raw.singles) == (2, 6)
    assert len(receive_datagrams(bound, 9)) == 9


def test_one_small_path_does_not_end_batches_for_the_others(bound: UdpSocket, host: str) -> None:
    raw = Obstructed.of(bind_udp(host, 0, buffer_bytes=BUFFER_BYTES))
    sock = UdpSocket(raw)
    try:
        raw.batch_error = lambda attempt: errno.EMSGSIZE if attempt == 1 else 0
        for _ in range(2):
            assert sock.send(payloads_of(3, 1452), 1452, bound.local_address) is SendResult.SENT
        assert (raw.batches, raw.singles) == (2, 3)
    finally:
        sock.close()


def test_a_late_icmp_answer_does_not_end_batches(
    bound: UdpSocket, obstructed: tuple[UdpSocket, Obstructed]
) -> None:
    sock, raw = obstructed
    raw.batch_error = lambda attempt: errno.EMSGSIZE if attempt == 1 else 0
    for _ in range(2):
        assert sock.send(payloads_of(3, 1200), 1200) is SendResult.SENT
    assert (raw.batches, raw.singles) == (2, 3)
    assert len(receive_datagrams(bound, 6)) == 6


def test_an_earlier_datagrams_size_error_is_not_this_ones(
    bound: UdpSocket, obstructed: tuple[UdpSocket, Obstructed]
) -> None:
    sock, raw = obstructed
    raw.single_errors = [errno.EMSGSIZE]
    assert sock.send(b"small", 0) is SendResult.SENT
    assert receive_datagrams(bound, 1) == [b"small"]


@pytest.mark.parametrize(
    ("number", "result"),
    [
        (errno.ECONNREFUSED, SendResult.UNREACHABLE),
        (errno.EHOSTUNREACH, SendResult.UNREACHABLE),
        (errno.ENETUNREACH, SendResult.UNREACHABLE),
        (errno.EPERM, SendResult.FAILED),
        (errno.ENOBUFS, SendResult.FAILED),
        (errno.EAGAIN, SendResult.WOULD_BLOCK),
    ],
)
def test_each_error_has_its_result(
    obstructed: tuple[UdpSocket, Obstructed], number: int, result: SendResult
) -> None:
    sock, raw = obstructed
    raw.single_errors = [number]
    assert sock.send(b"x", 0) is result
    assert sock.sent_bytes == 0
    raw.batch_error = fails_with(number)
    assert sock.send(bytes(20), 10) is result
    assert sock.sent_bytes == 0


def test_a_mistake_of_our_own_is_raised(connected: UdpSocket) -> None:
    raw = Obstructed.of(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock = UdpSocket(raw)
    try:
        raw.single_errors = [errno.EBADF]
        with pytest.raises(OSError, match="Bad file"):
            sock.send(b"x", 0, ("127.0.0.1", 9))
    finally:
        sock.close()


def test_an_error_in_the_middle_of_a_run_is_an_earlier_ones_and_nothing_is_sent_twice(
    bound: UdpSocket, obstructed: tuple[UdpSocket, Obstructed]
) -> None:
    sock, raw = obstructed
    raw.batch_error = fails_with(errno.EIO)
    raw.single_errors = [0, errno.ECONNREFUSED]
    payloads = payloads_of(4, 100)
    assert sock.send(payloads, 100) is SendResult.SENT
    assert receive_datagrams(bound, 4) == split(memoryview(payloads), 100)
    assert sock.unreachable == 1


def test_a_blocked_run_is_continued_from_where_it_stopped(
    bound: UdpSocket, obstructed: tuple[UdpSocket, Obstructed]
) -> None:
    sock, raw = obstructed
    raw.batch_error = lambda attempt: errno.EAGAIN if attempt == 2 else 0
    payloads = payloads_of(150, 1000)
    assert sock.send(payloads, 1000) is SendResult.WOULD_BLOCK
    assert sock.sent_bytes == 64_000
    assert sock.send(payloads[64_000:], 1000) is SendResult.SENT
    assert receive_datagrams(bound, 150) == split(memoryview(payloads), 1000)


# opening


def test_a_taken_port_is_an_os_error(bound: UdpSocket) -> None:
    with pytest.raises(OSError, match="in use") as caught:
        bind_udp(*bound.local_address, buffer_bytes=4096)
    assert caught.value.errno == errno.EADDRINUSE


def test_sockets_with_reuse_port_share_one(host: str) -> None:
    one = bind_udp(host, 0, reuse_port=True, buffer_bytes=4096)
    other = bind_udp(host, one.getsockname()[1], reuse_port=True, buffer_bytes=4096)
    assert one.getsockname() == other.getsockname()
    one.close()
    other.close()


@pytest.mark.parametrize("name", ["localhost", "example.com", "127.0.0.1x"])
def test_names_are_not_resolved(name: str) -> None:
    with pytest.raises(OSError):  # socket.gaierror
        bind_udp(name, 0, buffer_bytes=4096)
    with pytest.raises(OSError):
        connect_udp(name, 9, buffer_bytes=4096)


def test_an_ipv6_wildcard_leaves_ipv4_alone() -> None:
    six = bind_udp("::", 0, buffer_bytes=4096)
    four = bind_udp("0.0.0.0", six.getsockname()[1], buffer_bytes=4096)
    six.close()
    four.close()


def test_quic_packets_are_never_fragmented(host: str) -> None:
    level, option = (41, 23) if ":" in host else (0, 10)
    with bind_udp(host, 0, buffer_bytes=4096) as quic:
        assert quic.getsockopt(level, option) == 3  # PMTUDISC_PROBE
    with bind_udp(host, 0, buffer_bytes=4096, may_fragment=True) as local:
        assert local.getsockopt(level, option) == 1  # PMTUDISC_WANT


def test_the_buffers_are_as_large_as_the_kernel_allows(host: str) -> None:
    with bind_udp(host, 0, buffer_bytes=100_000) as sock:
        assert not sock.getblocking()
        # the kernel doubles what it is asked for
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 200_000
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 200_000


def wait_for(sock: UdpSocket) -> tuple[memoryview, int, tuple[str, int]]:
    wait_readable(sock)
    batch = sock.receive()
    assert batch is not None
    return batch


@pytest.mark.parametrize("asked_on", ["127.0.0.1", "127.0.0.7"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_wildcard_server_answers_from_the_address_that_it_was_asked_on(
    asked_on: str, count: int
) -> None:
    server = UdpSocket(bind_udp("0.0.0.0", 0, buffer_bytes=1 << 16), answers_from_same_address=True)
    client = UdpSocket(bind_udp("127.0.0.2", 0, buffer_bytes=1 << 16))
    port = server.local_address[1]
    assert client.send(b"asked", 0, (asked_on, port)) is SendResult.SENT
    question = wait_for(server)
    assert question[2] == client.local_address
    assert server.send(b"x" * count, 1, question[2]) is SendResult.SENT
    assert wait_for(client)[2] == (asked_on, port)
    server.close()
    client.close()


def test_an_ipv6_wildcard_server_answers_its_peers_too() -> None:
    server = UdpSocket(bind_udp("::", 0, buffer_bytes=1 << 16), answers_from_same_address=True)
    client = UdpSocket(bind_udp("::1", 0, buffer_bytes=1 << 16))
    client.send(b"asked", 0, ("::1", server.local_address[1]))
    question = wait_for(server)
    assert server.send(b"answer", 2, question[2]) is SendResult.SENT
    assert wait_for(client)[2] == ("::1", server.local_address[1])
    server.close()
    client.close()


def test_the_peers_remembered_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp_socket, "MAX_REMEMBERED_PEERS", 2)
    server = UdpSocket(bind_udp("0.0.0.0", 0, buffer_bytes=1 << 16), answers_from_same_address=True)
    clients = [UdpSocket(bind_udp("127.0.0.1", 0, buffer_bytes=1 << 16)) for _ in range(3)]
    for client in clients:
        client.send(b"asked", 0, ("127.0.0.9", server.local_address[1]))
        wait_for(server)
    remembered = server._reached_at
    assert remembered is not None
    assert list(remembered) == [client.local_address for client in clients[1:]]
    for sock in (server, *clients):
        sock.close()
