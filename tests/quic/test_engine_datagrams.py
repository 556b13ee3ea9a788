"""What every pair of engines promises of datagrams, in virtual time."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.quic.certificates import SERVER_NAME
from tests.quic.link import (
    CLIENT,
    SERVER,
    End,
    Link,
    Pair,
    client_config,
    connect_pair,
    make_engine,
    numbered,
    numbers,
    server_config,
    split,
)
from tests.quic.stranger import Stranger
from toppy.model.drop_reason import DropReason
from toppy.quic.engine import (
    HandshakeCompleted,
)


class TestDatagrams:
    def test_payloads_of_every_size_arrive(self, pair: Pair) -> None:
        assert pair.client.engine.supports_datagrams(pair.connection)
        assert pair.server.engine.supports_datagrams(pair.accepted)
        largest = pair.client.engine.max_payload_bytes(pair.connection, 0)
        assert largest >= 1200, "an inner QUIC Initial must fit"
        sizes = [0, 1, 63, 64, 1200, largest]
        for size in sizes:
            pair.client.engine.send_datagrams(pair.connection, 0, bytes(size), 0)
        pair.link.run_until(lambda: len(pair.server.payloads()) == len(sizes))
        assert [len(payload) for payload in pair.server.payloads()] == sizes
        assert pair.client.drops == pair.server.drops == {}

    def test_the_largest_payload_arrives_for_every_tunnel_and_one_byte_more_is_dropped(
        self, pair: Pair
    ) -> None:
        for end, other, connection in (
            (pair.client, pair.server, pair.connection),
            (pair.server, pair.client, pair.accepted),
        ):
            for quarter in (0, 63, 64, 16_384, 1 << 30):
                largest = end.engine.max_payload_bytes(connection, quarter)
                payload = random.Random(quarter).randbytes(largest)
                end.engine.send_datagrams(connection, quarter, payload, 0)
                pair.link.run_until(lambda q=quarter, o=other: o.payloads(q))  # type: ignore[misc]
                assert other.payloads(quarter) == [payload]
            before = sum(end.drops.values())
            too_long = end.engine.max_payload_bytes(connection, 0) + 1
            end.engine.send_datagrams(connection, 0, bytes(too_long), 0)
            pair.link.run_for(1.0)
            assert sum(end.drops.values()) == before + 1
            assert end.drops[DropReason.TOO_LARGE] == 1
            assert len(other.payloads(0)) == 1

    def test_a_payload_that_fits_no_packet_does_not_hold_up_the_next(self, pair: Pair) -> None:
        largest = pair.client.engine.max_payload_bytes(pair.connection, 0)
        pair.client.engine.send_datagrams(pair.connection, 0, bytes(largest + 400), 0)
        pair.client.engine.send_datagrams(pair.connection, 0, b"next", 0)
        pair.link.run_until(pair.server.payloads)
        assert pair.server.payloads() == [b"next"]

    def test_the_backlog_of_a_tunnel_is_what_waits_for_it_alone(self, pair: Pair) -> None:
        engine, connection = pair.client.engine, pair.connection
        engine.send_datagrams(connection, 3, bytes(400_000), 1000)
        assert 300_000 < engine.datagram_backlog_bytes(connection, 3) <= 410_000
        assert engine.datagram_backlog_bytes(connection, 4) == 0
        assert engine.datagram_backlog_bytes(connection + 100, 3) == 0
        pair.link.run_until(lambda: len(pair.server.payloads(3)) == 400)
        assert engine.datagram_backlog_bytes(connection, 3) == 0

    def test_a_batch_arrives_in_order_and_grouped(self, pair: Pair) -> None:
        payloads = numbered(40, 1000)
        batch = b"".join(payloads) + b"short tail"
        pair.client.engine.send_datagrams(pair.connection, 5, batch, 1000)
        pair.link.run_until(lambda: len(pair.server.payloads(5)) == 41)
        assert pair.server.payloads(5) == [*payloads, b"short tail"]
        for connection, quarter, data, size in pair.server.groups:
            assert (connection, quarter) == (pair.accepted, 5)
            assert size
            assert len(split(data, size)) <= 64
            assert len(data) <= 65_507
        assert len(pair.server.groups) < 41

    def test_a_burst_leaves_in_few_sends(self, pair: Pair) -> None:
        pair.link.transmits.clear()
        batch = b"".join(numbered(10, 1000))
        pair.client.engine.send_datagrams(pair.connection, 0, batch, 1000)
        pair.link.run_until(lambda: len(pair.server.payloads()) == 10)
        assert max(len(split(data, size)) for _, data, size in pair.link.transmits) >= 2

    def test_empty_payloads_keep_their_place(self, pair: Pair) -> None:
        for payload in (b"one", b"", b"two", b"", b""):
            pair.client.engine.send_datagrams(pair.connection, 0, payload, 0)
        pair.link.run_until(lambda: len(pair.server.payloads()) == 5)
        assert pair.server.payloads() == [b"one", b"", b"two", b"", b""]
        for _, _, data, size in pair.server.groups:
            assert bool(data) == bool(size)

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        sends=st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, 400), st.integers(1, 9)), max_size=25
        )
    )
    def test_each_tunnel_gets_its_payloads_in_order(
        self, engines: tuple[str, str], sends: list[tuple[int, int, int]]
    ) -> None:
        pair = connect_pair(*engines)
        expected: dict[int, list[bytes]] = {quarter: [] for quarter in range(4)}
        for index, (quarter, size, count) in enumerate(sends):
            data = bytes((index,)) * (size * count)
            pair.client.engine.send_datagrams(pair.connection, quarter, data, size)
            expected[quarter] += split(data, size)
        pair.link.run_for(5.0)
        assert {quarter: pair.server.payloads(quarter) for quarter in range(4)} == expected
        assert pair.client.drops == {}

    def test_a_full_tunnel_loses_its_oldest_and_counts_them(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines, client=client_config(tunnel_queue_bytes=30_000))
        payloads = numbered(300, 1000)
        pair.client.engine.send_datagrams(pair.connection, 0, b"".join(payloads), 1000)
        pair.link.run_for(5.0)
        arrived = numbers(pair.server.payloads())
        assert arrived == sorted(set(arrived))
        assert arrived[-20:] == list(range(280, 300))
        assert len(arrived) < 300
        assert pair.client.drops == {DropReason.QUEUE_FULL: 300 - len(arrived)}

    def test_a_full_connection_takes_from_the_longest_tunnel(
        self, engines: tuple[str, str]
    ) -> None:
        pair = connect_pair(*engines, client=client_config(connection_queue_bytes=60_000))
        greedy = numbered(400, 1000)
        modest = numbered(5, 1000)
        pair.client.engine.send_datagrams(pair.connection, 0, b"".join(greedy), 1000)
        pair.client.engine.send_datagrams(pair.connection, 1, b"".join(modest), 1000)
        pair.link.run_for(5.0)
        assert pair.server.payloads(1) == modest
        arrived = len(pair.server.payloads(0))
        assert arrived < 400
        assert pair.client.drops == {DropReason.QUEUE_FULL: 400 - arrived}

    def test_a_greedy_tunnel_does_not_starve_another(self, pair: Pair) -> None:
        greedy = numbered(600, 1000)
        pair.client.engine.send_datagrams(pair.connection, 0, b"".join(greedy), 1000)
        pair.client.engine.send_datagrams(pair.connection, 1, b"me too", 0)
        pair.link.run_until(lambda: pair.server.payloads(1))
        assert len(pair.server.payloads(0)) < 300

    def test_everything_sent_is_delivered_or_counted(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(
            *engines,
            client=client_config(tunnel_queue_bytes=20_000, connection_queue_bytes=50_000),
        )
        sent = 0
        for round_ in range(20):
            for quarter in range(4):
                count = 5 + (round_ * quarter) % 20
                pair.client.engine.send_datagrams(pair.connection, quarter, bytes(700 * count), 700)
                sent += count
            pair.link.run_for(0.01)
        pair.link.run_for(5.0)
        delivered = sum(len(pair.server.payloads(quarter)) for quarter in range(4))
        assert delivered + sum(pair.client.drops.values()) == sent
        assert pair.server.drops == {}

    def test_datagrams_and_a_stream_share_a_connection(self, pair: Pair) -> None:
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        data = bytes(300_000)
        pair.client.engine.send_stream(pair.connection, stream, data, end=True)
        pair.client.engine.send_datagrams(pair.connection, 0, b"".join(numbered(200, 1000)), 1000)
        pair.link.run_until(lambda: pair.server.has_ended(stream), limit_s=30)
        pair.link.run_until(lambda: len(pair.server.payloads()) == 200)
        assert pair.server.stream(stream) == data


class TestForeignDatagrams:
    @pytest.fixture
    def link(self) -> Link:
        return Link()

    @pytest.fixture
    def stranger(self) -> Stranger:
        return Stranger()

    @pytest.fixture
    def server(self, link: Link, stranger: Stranger, server_engine: str) -> End:
        end = link.attach(make_engine(server_engine, server_config()), SERVER)
        stranger.join(link, CLIENT)
        stranger.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: stranger.is_ready and end.is_ready)
        return end

    def test_unknown_contexts_are_dropped_and_counted(
        self, link: Link, stranger: Stranger, server: End
    ) -> None:
        stranger.quic.send_datagram_frame(b"\x00\x02unknown")
        stranger.quic.send_datagram_frame(b"\x00\x40\x00known, though it could be shorter")
        link.run_for(1.0)
        assert server.payloads() == [b"known, though it could be shorter"]
        assert server.drops == {DropReason.UNKNOWN_CONTEXT: 1}
        assert server.closed is None

    @pytest.mark.parametrize(
        "frame", [b"", b"\x40", b"\xc0\0\0", b"\x00", b"\x00\x40", b"\xd0" + bytes(7) + b"\x00x"]
    )
    def test_a_malformed_http_datagram_closes_the_connection(
        self, link: Link, stranger: Stranger, server: End, frame: bytes
    ) -> None:
        stranger.quic.send_datagram_frame(frame)
        link.run_until(lambda: stranger.termination)
        assert stranger.termination is not None
        assert stranger.termination.error_code == 0x33
        assert server.drops == {DropReason.MALFORMED: 1}
        assert server.closed is not None
        assert server.closed.error_code == 0x33
        assert not server.closed.by_peer

    def test_our_datagrams_carry_the_quarter_stream_id_and_context_zero(
        self, link: Link, stranger: Stranger, server: End
    ) -> None:
        number = server.of(HandshakeCompleted)[0].connection
        server.engine.send_datagrams(number, 3, b"abcdef", 4)
        server.engine.send_datagrams(number, 100, b"", 0)
        link.run_until(lambda: len(stranger.frames) == 3)
        assert stranger.frames == [b"\x03\x00abcd", b"\x03\x00ef", b"\x40\x64\x00"]

    @pytest.mark.parametrize("size", [60, 64, 66, 70, 500, 1000])
    def test_the_peers_frame_limit_is_kept(self, link: Link, server_engine: str, size: int) -> None:
        stranger = Stranger(max_datagram_frame_size=size)
        server = link.attach(make_engine(server_engine, server_config()), SERVER)
        stranger.join(link, CLIENT)
        stranger.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: stranger.is_ready and server.is_ready)
        number = server.of(HandshakeCompleted)[0].connection
        largest = server.engine.max_payload_bytes(number, 0)
        assert size - 12 <= largest + 2 < size
        server.engine.send_datagrams(number, 0, bytes(largest), 0)
        server.engine.send_datagrams(number, 0, bytes(largest + 1), 0)
        link.run_for(1.0)
        assert [len(frame) for frame in stranger.frames] == [largest + 2]
        assert stranger.termination is None
        assert server.drops == {DropReason.TOO_LARGE: 1}

    def test_a_peer_without_datagrams_gets_none(self, link: Link, server_engine: str) -> None:
        stranger = Stranger(max_datagram_frame_size=None)
        server = link.attach(make_engine(server_engine, server_config()), SERVER)
        stranger.join(link, CLIENT)
        stranger.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: stranger.is_ready and server.is_ready)
        number = server.of(HandshakeCompleted)[0].connection
        assert not server.engine.supports_datagrams(number)
        assert server.engine.max_payload_bytes(number, 0) == -1
        server.engine.send_datagrams(number, 0, bytes(1000), 100)
        link.run_for(1.0)
        assert server.drops == {DropReason.TOO_LARGE: 10}
        assert server.closed is None
