"""What is particular to the aioquic engine: the private parts it leans on, bounds, cleaning up."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import aioquic
import pytest
from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import Limit, QuicConnection, QuicNetworkPath
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.stream import QuicStream

from tests.quic.certificates import SERVER_NAME, other_key_pem
from tests.quic.link import (
    CLIENT,
    SERVER,
    START,
    End,
    Link,
    Pair,
    client_config,
    connect_pair,
    server_config,
)
from tests.quic.stranger import Stranger
from toppy.model.drop_reason import DropReason
from toppy.quic.aioquic_connection import EngineConnection, join_segments
from toppy.quic.aioquic_engine import AioquicEngine
from toppy.quic.engine import (
    Address,
    ConnectionAccepted,
    ConnectionClosed,
    HandshakeCompleted,
    StreamDataReceived,
)


def engine_of(end: End) -> AioquicEngine:
    assert isinstance(end.engine, AioquicEngine)
    return end.engine


def quic_of(end: End, connection: int) -> EngineConnection:
    quic = engine_of(end)._records[connection].quic
    assert quic is not None
    return quic


@pytest.fixture
def pair() -> Pair:
    return connect_pair("aioquic", "aioquic")


class TestTheShapeOfAioquic:
    """Fails when a new aioquic moves what ``aioquic_connection`` overrides or reads."""

    def test_the_version_is_the_one_that_was_read(self) -> None:
        assert aioquic.__version__.startswith("1.7.")

    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("_replenish_connection_ids", ["self"]),
            ("_parse_transport_parameters", ["self", "data", "from_session_ticket"]),
            ("_handle_crypto_frame", ["self", "context", "frame_type", "buf"]),
            ("_write_connection_limits", ["self", "builder", "space"]),
            ("_write_stream_limits", ["self", "builder", "space", "stream"]),
            ("close", ["self", "error_code", "frame_type", "reason_phrase"]),
            ("_stream_can_send", ["self", "stream_id"]),
            ("_stream_can_receive", ["self", "stream_id"]),
        ],
    )
    def test_methods_have_the_same_parameters(self, name: str, parameters: list[str]) -> None:
        assert list(inspect.signature(getattr(QuicConnection, name)).parameters) == parameters

    def test_attributes_are_where_they_were(self) -> None:
        quic = QuicConnection(configuration=QuicConfiguration(max_datagram_size=1300))
        assert quic._host_cids[0].cid == quic.host_cid
        assert quic._local_initial_source_connection_id == quic.host_cid
        assert quic._host_cid_seq == 1
        assert quic._max_datagram_size == 1300
        assert not quic._datagrams_pending
        assert quic._remote_max_datagram_frame_size is None
        assert quic._peer_cid.stateless_reset_token == b""
        assert quic._network_paths == []
        assert QuicNetworkPath(CLIENT).peer_cid is None
        assert quic._close_event is None
        for limit in (quic._local_max_streams_bidi, quic._local_max_streams_uni):
            assert isinstance(limit, Limit)
            assert limit.value == limit.sent == 128
        assert quic._remote_max_streams_bidi == quic._remote_max_streams_uni == 0
        assert not quic._streams
        assert not quic._spaces
        assert not quic._streams_queue
        assert not quic._retire_connection_ids
        assert quic._host_cids[0].was_sent
        assert not quic._handshake_confirmed
        assert quic._loss._rtt_smoothed == 0.0
        assert hasattr(quic._loss, "_logger")
        stream = QuicStream(0)
        assert (stream.sender._buffer_stop, stream.sender._buffer_fin) == (0, None)
        assert stream.sender._reset_error_code is None

    def test_the_tls_buffer_is_where_it_was(self, pair: Pair) -> None:
        assert quic_of(pair.client, pair.connection).tls._receive_buffer == b""

    def test_every_issued_id_is_ours_and_has_its_reset_token(self, pair: Pair) -> None:
        pair.link.run_for(1.0)
        server = engine_of(pair.server)
        quic = quic_of(pair.client, pair.connection)
        known = [quic._peer_cid, *quic._peer_cid_available]
        assert len(known) == 8
        for each in known:
            assert server._routes[each.cid].number == pair.accepted
            assert each.stateless_reset_token == server._issuer.reset_token(each.cid)

    def test_datagrams_leave_from_our_queue(self, pair: Pair) -> None:
        record = engine_of(pair.client)._records[pair.connection]
        pending: object = quic_of(pair.client, pair.connection)._datagrams_pending
        assert pending is record.queue


class TestBounds:
    def test_the_receive_window_slides_and_does_not_grow(self) -> None:
        window = 64 * 1024
        pair = connect_pair(
            "aioquic",
            "aioquic",
            server=server_config(stream_window_bytes=window, connection_window_bytes=2 * window),
        )
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        pair.client.engine.send_stream(pair.connection, stream, bytes(1 << 20))
        quic = quic_of(pair.server, pair.accepted)
        for _ in range(200):
            pair.link.run_for(0.01)
            live = quic.live_stream(stream)
            if live is not None:
                delivered = live.receiver.starting_offset()
                assert live.max_stream_data_local <= delivered + window
            assert quic._local_max_data.value <= quic._local_max_data.used + 2 * window
        assert len(pair.server.stream(stream)) == 1 << 20

    def crypto_packet(self, offset: int, data: bytes) -> bytes:
        crypto = CryptoPair()
        crypto.setup_initial(cid=b"destination", is_client=True, version=1)
        builder = QuicPacketBuilder(
            host_cid=b"source",
            peer_cid=b"destination",
            version=1,
            is_client=True,
            max_datagram_size=1200,
        )
        builder.start_packet(QuicPacketType.INITIAL, crypto)
        frame: Buffer = builder.start_frame(QuicFrameType.CRYPTO, capacity=20 + len(data))
        frame.push_uint_var(offset)
        frame.push_uint_var(len(data))
        frame.push_bytes(data)
        return builder.flush()[0][0]

    @pytest.mark.parametrize("offset", [40_000, 500_000, (1 << 62) - 100])
    def test_a_handshake_message_far_ahead_is_not_buffered(self, offset: int) -> None:
        link = Link()
        server = link.attach(AioquicEngine(server_config()), SERVER)
        link.send(CLIENT, SERVER, self.crypto_packet(offset, b"x"))
        link.run_for(0.1)
        assert server.closed is not None
        assert server.closed.error_code in (0xD, 0x7)

    def test_a_handshake_message_of_megabytes_is_not_collected(self) -> None:
        engine = AioquicEngine(server_config(), now=START)
        hello = b"\x01\xff\xff\xff" + bytes(996)
        quic = None
        for offset in range(0, 60_000, 1000):
            data = hello if offset == 0 else bytes(1000)
            engine.receive(self.crypto_packet(offset, data), 0, CLIENT, START)
            engine.poll_transmits(START)
            quic = quic or engine._records[1].quic
        closed = [e for e in engine.poll_events() if isinstance(e, ConnectionClosed)]
        # every packet has number 0 here, so that only the first was taken
        assert not closed
        assert quic is not None
        assert len(quic.tls._receive_buffer) <= 33 * 1024

    def test_resets_are_limited(self) -> None:
        engine = AioquicEngine(server_config(), now=START)
        for _ in range(1000):
            engine.receive(b"\x41" + bytes(50), 0, CLIENT, START)
        assert len(engine.poll_transmits(START)) == 100

    def test_retired_ids_are_routed_for_a_while_only(self, pair: Pair) -> None:
        quic = quic_of(pair.client, pair.connection)
        pair.link.run_for(0.5)
        for _ in range(40):
            quic.change_connection_id()
            pair.client.engine.send_datagrams(pair.connection, 0, b"x", 0)
            pair.link.run_for(0.2)
        record = engine_of(pair.server)._records[pair.accepted]
        assert len(record.ids) <= 1 + 8 + 8
        assert len(pair.server.payloads()) == 40
        routed = {cid for cid, each in engine_of(pair.server)._routes.items() if each is record}
        assert routed == set(record.ids)

    def test_the_peers_packet_limit_is_kept(self) -> None:
        stranger = Stranger()
        serialize = stranger.quic._serialize_transport_parameters
        stranger.quic._serialize_transport_parameters = (  # type: ignore[method-assign]
            lambda: serialize() + b"\x03\x02" + (0x4000 | 1250).to_bytes(2, "big")
        )
        link = Link()
        server = link.attach(AioquicEngine(server_config(), now=START), SERVER)
        stranger.join(link, CLIENT)
        stranger.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: stranger.is_ready and server.is_ready)
        number = server.of(HandshakeCompleted)[0].connection
        size = server.engine.max_payload_bytes(number, 0)
        assert 1200 <= size < 1250
        link.packets.clear()
        server.engine.send_datagrams(number, 0, bytes(size), 0)
        link.run_until(lambda: stranger.frames)
        assert max(len(packet) for source, _, packet in link.packets if source == SERVER) == 1250

    def test_a_peer_may_disable_its_idle_timeout(self) -> None:
        link = Link()
        server = link.attach(AioquicEngine(server_config(idle_timeout_s=20.0), now=START), SERVER)
        stranger = Stranger(idle_timeout=0.0)
        stranger.join(link, CLIENT)
        stranger.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: server.is_ready)
        link.ends.pop(CLIENT)
        link.run_for(15.0)
        assert server.closed is None
        link.run_until(lambda: server.closed)


class TestCleaningUp:
    def is_empty(self, engine: AioquicEngine) -> bool:
        return not (
            engine._records
            or engine._routes
            or engine._by_peer
            or engine._touched
            or engine._deadlines._deadlines
            or engine._deadlines._entries
        )

    def test_nothing_is_left_after_a_close(self, pair: Pair) -> None:
        quics = [
            weakref.ref(quic_of(pair.client, pair.connection)),
            weakref.ref(quic_of(pair.server, pair.accepted)),
        ]
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        pair.client.engine.send_stream(pair.connection, stream, bytes(100_000))
        pair.client.engine.send_datagrams(pair.connection, 0, bytes(5000), 500)
        gc.collect()
        gc.disable()
        try:
            pair.client.engine.close(pair.connection, 0, "", pair.link.now)
            pair.link.run_until(lambda: pair.server.closed)
            assert [quic() for quic in quics] == [None, None], "freed without the collector"
        finally:
            gc.enable()
        pair.link.run_for(5.0)
        assert self.is_empty(engine_of(pair.client))
        assert self.is_empty(engine_of(pair.server))

    def test_nothing_is_left_after_an_idle_timeout(self, pair: Pair) -> None:
        pair.link.run_for(40.0)
        assert self.is_empty(engine_of(pair.client))
        assert self.is_empty(engine_of(pair.server))

    def test_nothing_is_left_after_a_stateless_reset(self, pair: Pair) -> None:
        pair.link.attach(AioquicEngine(server_config(), now=pair.link.now), SERVER)
        pair.client.engine.send_datagrams(pair.connection, 0, bytes(100), 0)
        pair.link.run_until(lambda: pair.client.closed)
        assert self.is_empty(engine_of(pair.client))

    def test_nothing_is_left_of_an_attempt_that_is_not_authentic(self) -> None:
        engine = AioquicEngine(server_config(), now=START)
        for index in range(50):
            packet = b"\xc3\0\0\0\x01\x08" + index.to_bytes(8, "big") + b"\x00\x00\x44\x00"
            engine.receive(packet + bytes(1200 - len(packet)), 0, CLIENT, START)
        assert self.is_empty(engine)
        assert engine.poll_events() == []
        assert engine.poll_transmits(START) == []

    def test_a_lost_close_is_repeated_when_the_peer_goes_on(self, pair: Pair) -> None:
        pair.server.engine.close(pair.accepted, 0x107, "enough", pair.link.now)
        pair.link.is_cut = True
        pair.link.drain(pair.server)
        pair.link.is_cut = False
        assert pair.client.of(ConnectionClosed) == []
        pair.client.engine.send_datagrams(pair.connection, 0, b"hello?", 0)
        pair.link.run_until(lambda: pair.client.closed, limit_s=1.0)
        assert pair.client.of(ConnectionClosed)[0].reason == "enough"

    def test_what_waits_at_the_end_is_counted(self, pair: Pair) -> None:
        pair.client.engine.send_datagrams(pair.connection, 0, bytes(10_000), 1000)
        pair.client.engine.close(pair.connection, 0, "", pair.link.now)
        pair.client.engine.send_datagrams(pair.connection, 0, bytes(3000), 1000)
        pair.link.run_for(1.0)
        assert pair.client.drops == {DropReason.UNKNOWN_STREAM: 13}

    @pytest.mark.parametrize("method", ["receive_datagram", "datagrams_to_send", "get_timer"])
    def test_a_failure_of_aioquic_ends_one_connection_only(
        self, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        link = Link()
        server = link.attach(AioquicEngine(server_config(), now=START), SERVER)
        clients = [
            link.attach(AioquicEngine(client_config(), now=START), (CLIENT[0], 40000 + index))
            for index in range(2)
        ]
        for client in clients:
            client.engine.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: all(client.is_ready for client in clients))
        link.run_for(0.5)
        victim = quic_of(server, 1)
        real = getattr(EngineConnection, method)

        def fail(self: EngineConnection, *arguments: Any) -> Any:
            if self is victim and not self._close_pending:
                raise IndexError("pop from empty list")
            return real(self, *arguments)

        monkeypatch.setattr(EngineConnection, method, fail)
        source = server.of(ConnectionAccepted)[0].source
        for client in clients:
            client.engine.send_datagrams(1, 0, b"x", 0)
        link.run_until(lambda: server.closed and len(server.payloads()) >= 1)
        closed = server.of(ConnectionClosed)
        assert closed == [ConnectionClosed(1, 1, "internal error (IndexError)", False)]
        link.run_for(1.0)
        for client in clients:
            if client.address == source:
                assert client.closed is not None
                assert client.closed.by_peer
            else:
                assert client.closed is None
        link.run_for(60.0)
        assert self.is_empty(engine_of(server))


class TestManyConnections:
    def test_idle_connections_cost_nothing_per_packet(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link = Link()
        server = link.attach(AioquicEngine(server_config(), now=START), SERVER)
        client = link.attach(AioquicEngine(client_config(), now=START), CLIENT)
        for _ in range(30):
            client.engine.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: len(client.of(HandshakeCompleted)) == 30)
        link.run_for(1.0)
        asked: set[int] = set()
        real = EngineConnection.get_timer

        def count(self: EngineConnection) -> float | None:
            asked.add(id(self))
            return real(self)

        monkeypatch.setattr(EngineConnection, "get_timer", count)
        for index in range(20):
            client.engine.send_datagrams(7, 0, b"%d" % index, 0)
            link.run_for(0.05)
        assert len(server.payloads()) == 20
        assert len(asked) == 2, "one connection at each end"

    def test_stream_bytes_of_one_batch_come_in_one_event(self, pair: Pair) -> None:
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        pair.client.engine.send_stream(pair.connection, stream, bytes(10_000), end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        batches = [data for source, data, _ in pair.link.transmits if source == CLIENT]
        packets = [data for source, _, data in pair.link.packets if source == CLIENT]
        assert len(pair.server.of(StreamDataReceived)) <= len(batches) < len(packets)


class TestSettings:
    def test_a_key_of_another_certificate_is_refused(self) -> None:
        with pytest.raises(ValueError, match="does not belong"):
            AioquicEngine(server_config(private_key_pem=other_key_pem()))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"connection_id_bytes": 7}, "connection_id_bytes"),
            ({"connection_id_bytes": 21}, "connection_id_bytes"),
            ({"connection_id_prefix": b"1234567"}, "prefix"),
            ({"reset_key": b"short"}, "reset_key"),
            ({"token_key": b"short"}, "token_key"),
            ({"initial_packet_bytes": 1199}, "initial_packet_bytes"),
            ({"alpn_protocols": ()}, "alpn_protocols"),
        ],
    )
    def test_settings_that_make_no_sense_are_refused(
        self, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            AioquicEngine(server_config(**changes))

    def test_a_name_outside_ascii_is_refused(self) -> None:
        with pytest.raises(ValueError, match="punycode"):
            AioquicEngine(client_config()).connect(SERVER, "tür.example", START)

    def test_the_roots_of_the_system_are_the_default(self) -> None:
        link = Link()
        link.attach(AioquicEngine(server_config(), now=START), SERVER)
        client = link.attach(
            AioquicEngine(client_config(ca_certificates_pem=None), now=START), CLIENT
        )
        client.engine.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: client.closed)
        assert client.closed is not None
        assert "certificate" in client.closed.reason

    def test_a_bundle_of_roots_may_hold_comments(self) -> None:
        pem = client_config().ca_certificates_pem
        assert pem is not None
        bundle = b"# a bundle\n" + pem + b"\n\n# the same again\n" + pem + b"\n"
        connect_pair("aioquic", "aioquic", client=client_config(ca_certificates_pem=bundle))

    def test_a_wrong_name_is_explained_in_plain_words(self) -> None:
        link = Link()
        link.attach(AioquicEngine(server_config(), now=START), SERVER)
        client = link.attach(AioquicEngine(client_config(), now=START), CLIENT)
        client.engine.connect(SERVER, "other.test", link.now)
        link.run_until(lambda: client.closed)
        assert client.closed is not None
        assert client.closed.reason == (
            "the certificate of other.test does not verify: "
            "it is for gateway.test, localhost, 127.0.0.1, ::1"
        )

    def test_keys_do_not_show_in_a_representation(self) -> None:
        text = repr(server_config())
        assert "rrrr" not in text
        assert "tttt" not in text
        assert "PRIVATE KEY" not in text


def test_runs_of_equal_length_are_joined_for_one_send() -> None:
    here, there = ("192.0.2.1", 1), ("192.0.2.2", 2)
    sizes: list[tuple[int, Address]] = [
        (100, here), (100, here), (40, here), (40, here), (50, here), (50, there), (50, there),
    ]  # fmt: skip
    joined = join_segments([(bytes(size), to) for size, to in sizes])
    assert [(len(data), segment, to) for data, segment, to in joined] == [
        (240, 100, here),
        (40, 0, here),
        (50, 0, here),
        (100, 50, there),
    ]


def test_a_send_has_sixty_segments_and_65000_bytes_at_most() -> None:
    here = ("192.0.2.1", 1)
    many = join_segments([(bytes(10), here)] * 130)
    assert [len(data) // 10 for data, _, _ in many] == [60, 60, 10]
    large = join_segments([(bytes(1400), here)] * 60)
    assert [len(data) // 1400 for data, _, _ in large] == [46, 14]
