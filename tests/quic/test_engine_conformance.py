"""What every pair of engines promises, in virtual time: handshakes, streams, ends, paths."""

from __future__ import annotations

import random

import pytest

from tests.quic.certificates import SERVER_NAME, other_ca_pem
from tests.quic.link import (
    CLIENT,
    SERVER,
    START,
    Gatekeeper,
    Link,
    Pair,
    attempt,
    client_config,
    connect_pair,
    make_engine,
    server_config,
)
from toppy.quic.engine import (
    Admission,
    ConnectionAccepted,
    ConnectionClosed,
    Engine,
    HandshakeCompleted,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
    StreamsAvailable,
)
from toppy.wire.connection_id import CONNECTION_ID_BYTES, destination_connection_id, encode_prefix


class TestHandshake:
    def test_both_ends_learn_the_protocol(self, pair: Pair) -> None:
        assert pair.client.of(HandshakeCompleted) == [HandshakeCompleted(pair.connection, "h3")]
        assert pair.server.events == [
            ConnectionAccepted(pair.accepted, CLIENT),
            HandshakeCompleted(pair.accepted, "h3"),
        ]

    def test_the_server_chooses_the_protocol_that_both_know(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(
            *engines,
            client=client_config(alpn_protocols=("toppy-ping",)),
            server=server_config(alpn_protocols=("h3", "toppy-ping")),
        )
        assert pair.server.of(HandshakeCompleted)[0].alpn_protocol == "toppy-ping"
        assert pair.client.of(HandshakeCompleted)[0].alpn_protocol == "toppy-ping"

    def test_no_common_protocol_closes_the_connection(self, engines: tuple[str, str]) -> None:
        link, client, server = attempt(engines, client=client_config(alpn_protocols=("other",)))
        link.run_until(lambda: client.closed and server.closed)
        assert client.closed is not None
        assert client.closed.by_peer
        assert client.closed.error_code == 0x178
        assert not client.is_ready

    @pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
    def test_names_and_addresses_of_the_certificate_are_accepted(
        self, engines: tuple[str, str], name: str
    ) -> None:
        link, client, _ = attempt(engines, server_name=name)
        link.run_until(lambda: client.is_ready)

    @pytest.mark.parametrize("name", ["other.test", "127.0.0.2", "::2"])
    def test_a_certificate_for_another_name_is_refused_with_a_reason(
        self, engines: tuple[str, str], name: str
    ) -> None:
        link, client, server = attempt(engines, server_name=name)
        link.run_until(lambda: client.closed and server.closed)
        assert client.closed is not None
        assert "certificate" in client.closed.reason
        assert not client.closed.by_peer
        assert not client.is_ready

    def test_a_certificate_of_an_unknown_root_is_refused_with_a_reason(
        self, engines: tuple[str, str]
    ) -> None:
        link, client, server = attempt(
            engines, client=client_config(ca_certificates_pem=other_ca_pem())
        )
        link.run_until(lambda: client.closed and server.closed)
        assert client.closed is not None
        assert "certificate" in client.closed.reason
        assert server.closed is not None
        assert server.closed.by_peer

    def test_a_server_that_does_not_answer_ends_in_an_idle_timeout(
        self, engines: tuple[str, str]
    ) -> None:
        link = Link()
        client = link.attach(make_engine(engines[0], client_config(idle_timeout_s=10.0)), CLIENT)
        number = client.engine.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: client.closed, limit_s=40.0)
        assert client.events == [ConnectionClosed(number, 0, "idle timeout", False)]

    def test_many_clients_are_served_at_once(self, engines: tuple[str, str]) -> None:
        link = Link()
        server = link.attach(make_engine(engines[1], server_config()), SERVER)
        clients = []
        for index in range(5):
            address = ("198.51.100.7", 40000 + index)
            client = link.attach(make_engine(engines[0], client_config()), address)
            for _ in range(2):
                client.engine.connect(SERVER, SERVER_NAME, link.now)
            clients.append(client)
        link.run_until(lambda: all(len(c.of(HandshakeCompleted)) == 2 for c in clients))
        accepted = server.of(ConnectionAccepted)
        assert len({event.connection for event in accepted}) == 10
        assert {event.source for event in accepted} == {client.address for client in clients}

    def test_it_survives_loss_reordering_and_duplicates(self, engines: tuple[str, str]) -> None:
        for seed in range(4):
            link = Link(loss=0.2, jitter_s=0.02, duplicate=0.2, seed=seed)
            connect_pair(*engines, link=link)


class TestStreams:
    def test_bytes_and_the_end_arrive_in_both_directions(self, pair: Pair) -> None:
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream == 0
        pair.client.engine.send_stream(pair.connection, stream, b"question", end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        assert pair.server.stream(stream) == b"question"
        pair.server.engine.send_stream(pair.accepted, stream, b"answer")
        pair.server.engine.send_stream(pair.accepted, stream, b"", end=True)
        pair.link.run_until(lambda: pair.client.has_ended(stream))
        assert pair.client.stream(stream) == b"answer"

    def test_stream_ids_are_numbered_by_kind(self, pair: Pair) -> None:
        client, server = pair.client.engine, pair.server.engine
        assert [client.open_stream(pair.connection) for _ in range(2)] == [0, 4]
        assert [client.open_stream(pair.connection, is_unidirectional=True) for _ in range(2)] == [
            2,
            6,
        ]
        assert server.open_stream(pair.accepted) == 1
        assert server.open_stream(pair.accepted, is_unidirectional=True) == 3

    def test_a_server_can_open_streams(self, pair: Pair) -> None:
        for is_unidirectional in (False, True):
            stream = pair.server.engine.open_stream(
                pair.accepted, is_unidirectional=is_unidirectional
            )
            assert stream is not None
            pair.server.engine.send_stream(pair.accepted, stream, b"hello", end=True)
            pair.link.run_until(lambda stream=stream: pair.client.has_ended(stream))  # type: ignore[misc]
            assert pair.client.stream(stream) == b"hello"

    def test_much_data_passes_small_windows_in_both_directions(
        self, engines: tuple[str, str]
    ) -> None:
        small = {"stream_window_bytes": 64 * 1024, "connection_window_bytes": 96 * 1024}
        pair = connect_pair(*engines, client=client_config(**small), server=server_config(**small))
        data = random.Random(5).randbytes(1 << 20)
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        pair.client.engine.send_stream(pair.connection, stream, data, end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream), limit_s=60)
        assert pair.server.stream(stream) == data
        pair.server.engine.send_stream(pair.accepted, stream, data[::-1], end=True)
        pair.link.run_until(lambda: pair.client.has_ended(stream), limit_s=60)
        assert pair.client.stream(stream) == data[::-1]

    def test_the_backlog_says_what_waits(self, pair: Pair) -> None:
        engine = pair.client.engine
        stream = engine.open_stream(pair.connection)
        assert stream is not None
        assert engine.stream_backlog_bytes(pair.connection, stream) == 0
        engine.send_stream(pair.connection, stream, bytes(4 << 20), end=True)
        pair.link.drain(pair.client)
        backlog = engine.stream_backlog_bytes(pair.connection, stream)
        assert 3 << 20 < backlog <= 4 << 20
        pair.link.run_until(lambda: pair.server.has_ended(stream), limit_s=60)
        assert engine.stream_backlog_bytes(pair.connection, stream) == 0

    def test_streams_survive_loss_reordering_and_duplicates(self, engines: tuple[str, str]) -> None:
        link = Link(loss=0.05, jitter_s=0.01, duplicate=0.05, seed=3)
        pair = connect_pair(*engines, link=link)
        data = random.Random(6).randbytes(200_000)
        streams = [pair.client.engine.open_stream(pair.connection) for _ in range(3)]
        for stream in streams:
            assert stream is not None
            pair.client.engine.send_stream(pair.connection, stream, data, end=True)
        for stream in streams:
            assert stream is not None
            link.run_until(lambda stream=stream: pair.server.has_ended(stream), limit_s=120)  # type: ignore[misc]
            assert pair.server.stream(stream) == data

    def test_the_stream_limit_holds_and_ended_streams_make_room(
        self, engines: tuple[str, str]
    ) -> None:
        pair = connect_pair(
            *engines,
            server=server_config(max_bidirectional_streams=3, max_unidirectional_streams=2),
        )
        client, server = pair.client.engine, pair.server.engine
        assert [client.open_stream(pair.connection) for _ in range(4)] == [0, 4, 8, None]
        for expected in (2, 6, None):
            found = client.open_stream(pair.connection, is_unidirectional=True)
            assert found == expected
        for stream in (0, 4, 8):
            client.send_stream(pair.connection, stream, b"x", end=True)
        pair.link.run_until(lambda: all(pair.server.has_ended(stream) for stream in (0, 4, 8)))
        for stream in (0, 4, 8):
            server.send_stream(pair.accepted, stream, b"y", end=True)
        pair.link.run_until(lambda: pair.client.of(StreamsAvailable))
        assert client.open_stream(pair.connection) == 12

    def test_a_client_comes_to_open_as_many_streams_as_the_server_allows(
        self, engines: tuple[str, str]
    ) -> None:
        pair = connect_pair(*engines, server=server_config(max_bidirectional_streams=300))
        client = pair.client.engine

        def open_all() -> list[int]:
            found = []
            while (stream := client.open_stream(pair.connection)) is not None:
                client.send_stream(pair.connection, stream, b"x")
                found.append(stream)
            return found

        opened = open_all()
        while len(opened) < 300:
            told = len(pair.client.of(StreamsAvailable))
            pair.link.run_until(lambda told=told: len(pair.client.of(StreamsAvailable)) > told)  # type: ignore[misc]
            opened += open_all()
        assert opened == list(range(0, 1200, 4))
        pair.link.run_for(1.0)
        assert client.open_stream(pair.connection) is None

    def test_a_reset_is_reported_with_its_code(self, pair: Pair) -> None:
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        pair.client.engine.send_stream(pair.connection, stream, b"begun")
        pair.link.run_until(lambda: pair.server.stream(stream))
        pair.client.engine.reset_stream(pair.connection, stream, 0x10C)
        pair.link.run_until(lambda: pair.server.of(StreamReset))
        assert pair.server.of(StreamReset) == [StreamReset(pair.accepted, stream, 0x10C)]
        pair.client.engine.send_stream(pair.connection, stream, b"too late", end=True)
        pair.link.run_for(1.0)
        assert pair.server.stream(stream) == b"begun"

    def test_stop_sending_is_reported_and_resets_the_sending_side(self, pair: Pair) -> None:
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        pair.client.engine.send_stream(pair.connection, stream, b"begun")
        pair.link.run_until(lambda: pair.server.stream(stream))
        pair.server.engine.stop_stream(pair.accepted, stream, 0x10B)
        pair.link.run_until(lambda: pair.client.of(StopSendingReceived))
        assert pair.client.of(StopSendingReceived) == [
            StopSendingReceived(pair.connection, stream, 0x10B)
        ]
        pair.client.engine.send_stream(pair.connection, stream, b"ignored", end=True)
        pair.link.run_for(1.0)
        assert pair.server.stream(stream) == b"begun"
        pair.server.engine.send_stream(pair.accepted, stream, b"other way", end=True)
        pair.link.run_until(lambda: pair.client.has_ended(stream))
        assert pair.client.stream(stream) == b"other way"

    def test_calls_on_streams_that_do_not_exist_are_ignored(self, pair: Pair) -> None:
        for end, connection in ((pair.client, pair.connection), (pair.server, pair.accepted)):
            for stream in (0, 1, 2, 3, 400, 401, 402, 403, (1 << 62) - 1):
                end.engine.send_stream(connection, stream, b"x", end=True)
                end.engine.reset_stream(connection, stream, 1)
                end.engine.stop_stream(connection, stream, 1)
                assert end.engine.stream_backlog_bytes(connection, stream) == 0
        pair.link.run_for(1.0)
        assert not pair.client.of(ConnectionClosed)
        assert not pair.server.of(StreamDataReceived)

    def test_calls_on_the_wrong_side_of_a_stream_are_ignored(self, pair: Pair) -> None:
        stream = pair.client.engine.open_stream(pair.connection, is_unidirectional=True)
        assert stream is not None
        pair.client.engine.stop_stream(pair.connection, stream, 1)
        pair.client.engine.send_stream(pair.connection, stream, b"x")
        pair.link.run_until(lambda: pair.server.stream(stream))
        pair.server.engine.send_stream(pair.accepted, stream, b"y")
        pair.server.engine.reset_stream(pair.accepted, stream, 1)
        pair.link.run_for(1.0)
        assert not pair.client.of(StreamDataReceived)
        assert pair.client.closed is None

    def test_nothing_is_sent_after_the_end_of_a_stream(self, pair: Pair) -> None:
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        pair.client.engine.send_stream(pair.connection, stream, b"all", end=True)
        pair.client.engine.send_stream(pair.connection, stream, b"more")
        pair.client.engine.send_stream(pair.connection, stream, b"", end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        pair.link.run_for(1.0)
        assert pair.server.stream(stream) == b"all"


class TestTheEnd:
    def test_a_client_closes_with_code_and_reason(self, pair: Pair) -> None:
        pair.client.engine.close(pair.connection, 0x100, "done here", pair.link.now)
        pair.link.run_until(lambda: pair.server.closed)
        assert pair.server.of(ConnectionClosed) == [
            ConnectionClosed(pair.accepted, 0x100, "done here", True)
        ]
        assert pair.client.of(ConnectionClosed) == [
            ConnectionClosed(pair.connection, 0x100, "done here", False)
        ]

    def test_a_server_closes_with_code_and_reason(self, pair: Pair) -> None:
        pair.server.engine.close(pair.accepted, 0x107, "too much", pair.link.now)
        pair.link.run_until(lambda: pair.client.closed)
        assert pair.client.closed == ConnectionClosed(pair.connection, 0x107, "too much", True)
        assert pair.server.closed == ConnectionClosed(pair.accepted, 0x107, "too much", False)

    def test_both_ends_may_close_at_once(self, pair: Pair) -> None:
        pair.client.engine.close(pair.connection, 1, "client", pair.link.now)
        pair.server.engine.close(pair.accepted, 2, "server", pair.link.now)
        pair.link.run_for(60.0)
        assert len(pair.client.of(ConnectionClosed)) == len(pair.server.of(ConnectionClosed)) == 1

    def test_a_reason_cannot_steer_a_terminal(self, pair: Pair) -> None:
        reason = "\x1b[31mred\nline"
        pair.server.engine.close(pair.accepted, 0x100, reason, pair.link.now)
        pair.link.run_until(lambda: pair.client.closed)
        assert pair.client.closed is not None
        assert pair.client.closed.reason == "?[31mred?line"

    def test_a_reason_may_be_long_or_empty(self, engines: tuple[str, str]) -> None:
        for reason in ("", "lang " * 100, "ü" * 333):
            pair = connect_pair(*engines)
            pair.client.engine.close(pair.connection, 0x100, reason, pair.link.now)
            pair.link.run_until(lambda pair=pair: pair.server.closed, limit_s=2)  # type: ignore[misc]
            assert pair.server.closed is not None
            assert pair.server.closed.error_code == 0x100
            assert pair.server.closed.reason

    def test_a_client_may_give_up_during_the_handshake(self, engines: tuple[str, str]) -> None:
        for steps in (0.0, 0.011, 0.021):
            link, client, server = attempt(engines)
            link.run_for(steps)
            client.engine.close(1, 0x100, "never mind", link.now)
            link.run_for(60.0)
            assert len(client.of(ConnectionClosed)) == 1
            assert len(server.of(ConnectionClosed)) == len(server.of(ConnectionAccepted))

    def test_calls_on_a_connection_that_is_gone_are_ignored(self, pair: Pair) -> None:
        pair.client.engine.close(pair.connection, 0, "", pair.link.now)
        pair.link.run_until(lambda: pair.server.closed)
        for wait in (0.0, 60.0):
            pair.link.run_for(wait)
            for end, numbers_ in (
                (pair.client, (pair.connection, 77)),
                (pair.server, (pair.accepted, 77)),
            ):
                for number in numbers_:
                    engine = end.engine
                    assert engine.open_stream(number) is None
                    engine.send_stream(number, 0, b"x")
                    assert engine.stream_backlog_bytes(number, 0) == 0
                    engine.reset_stream(number, 0, 1)
                    engine.stop_stream(number, 0, 1)
                    assert engine.max_payload_bytes(number, 0) == -1
                    engine.send_datagrams(number, 0, b"x", 0)
                    engine.close(number, 1, "again", pair.link.now)
                    assert engine.peer_address(number) is None
                    assert not engine.supports_datagrams(number)
                    assert engine.round_trip_s(number) == 0.0
        pair.link.run_for(1.0)
        assert len(pair.client.of(ConnectionClosed)) == len(pair.server.of(ConnectionClosed)) == 1

    def test_a_silent_connection_ends_at_both_ends(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines, client=client_config(idle_timeout_s=8.0))
        pair.link.run_until(lambda: pair.client.closed and pair.server.closed, limit_s=12.0)
        assert pair.client.closed == ConnectionClosed(pair.connection, 0, "idle timeout", False)
        assert pair.server.closed == ConnectionClosed(pair.accepted, 0, "idle timeout", False)

    def test_keep_alive_keeps_a_silent_connection(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines, client=client_config(keep_alive_s=3.0, idle_timeout_s=8.0))
        pair.link.packets.clear()
        pair.link.run_for(120.0)
        assert pair.client.closed is None
        assert pair.server.closed is None
        sent = [packet for packet in pair.link.packets if packet[0] == CLIENT]
        assert 30 <= len(sent) <= 90

    def test_keep_alive_does_not_hide_a_dead_peer(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines, client=client_config(keep_alive_s=3.0, idle_timeout_s=8.0))
        pair.link.is_cut = True
        pair.link.run_until(lambda: pair.client.closed and pair.server.closed, limit_s=30.0)
        assert pair.client.closed == ConnectionClosed(pair.connection, 0, "idle timeout", False)

    def test_a_restarted_server_resets_the_connection_at_once(
        self, engines: tuple[str, str]
    ) -> None:
        pair = connect_pair(*engines)
        pair.link.run_for(1.0)
        pair.link.attach(make_engine(engines[1], server_config(), now=pair.link.now), SERVER)
        before = pair.link.now
        pair.client.engine.send_datagrams(pair.connection, 0, bytes(100), 0)
        pair.link.run_until(lambda: pair.client.closed, limit_s=1.0)
        assert pair.client.closed == ConnectionClosed(pair.connection, 0, "stateless reset", True)
        assert pair.link.now - before < 0.1

    def test_a_reset_with_another_key_is_ignored(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines)
        pair.link.run_for(1.0)
        other = server_config(reset_key=b"z" * 64)
        pair.link.attach(make_engine(engines[1], other, now=pair.link.now), SERVER)
        pair.client.engine.send_datagrams(pair.connection, 0, bytes(100), 0)
        pair.link.run_for(3.0)
        assert pair.client.closed is None

    def test_a_new_connection_follows_an_old_one(self, pair: Pair) -> None:
        pair.client.engine.close(pair.connection, 0, "", pair.link.now)
        again = pair.client.engine.connect(SERVER, SERVER_NAME, pair.link.now)
        assert again != pair.connection
        pair.link.run_until(lambda: len(pair.server.of(HandshakeCompleted)) == 2)
        pair.link.run_for(20.0)
        assert len(pair.server.of(ConnectionClosed)) == 1


class TestPaths:
    def test_a_nat_rebinding_is_followed(self, pair: Pair) -> None:
        moved = ("198.51.100.7", 61000)
        pair.link.rebind(pair.client, moved)
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        pair.client.engine.send_stream(pair.connection, stream, b"still here", end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream))
        assert pair.server.engine.peer_address(pair.accepted) == moved
        pair.server.engine.send_stream(pair.accepted, stream, bytes(100_000), end=True)
        pair.server.engine.send_datagrams(pair.accepted, 0, b"welcome", 0)
        pair.link.run_until(lambda: pair.client.has_ended(stream))
        assert pair.client.payloads() == [b"welcome"]
        assert pair.client.closed is None

    def test_the_peers_address_and_round_trip_are_known(self, pair: Pair) -> None:
        assert pair.client.engine.peer_address(pair.connection) == SERVER
        assert pair.server.engine.peer_address(pair.accepted) == CLIENT
        assert 0.015 < pair.client.engine.round_trip_s(pair.connection) < 0.1

    def test_connection_ids_carry_the_prefix(self, engines: tuple[str, str]) -> None:
        prefix = encode_prefix(3, 7)
        pair = connect_pair(
            *engines,
            server=server_config(
                connection_id_prefix=prefix, connection_id_bytes=CONNECTION_ID_BYTES
            ),
        )
        pair.client.engine.send_datagrams(pair.connection, 0, b"x", 0)
        pair.link.run_until(pair.server.payloads)
        pair.link.rebind(pair.client, ("198.51.100.7", 61000))
        pair.client.engine.send_datagrams(pair.connection, 0, b"y", 0)
        pair.link.run_for(1.0)
        ids = {
            destination_connection_id(packet)
            for _, to, packet in pair.link.packets
            if to == SERVER and not packet[0] & 0x80
        }
        assert ids
        assert all(each is not None and each.startswith(prefix) for each in ids)

    def test_a_retry_keeps_the_prefix(self, engines: tuple[str, str]) -> None:
        prefix = encode_prefix(3, 7)
        gate = Gatekeeper(Admission.RETRY)
        pair = connect_pair(
            *engines,
            server=server_config(
                connection_id_prefix=prefix, connection_id_bytes=CONNECTION_ID_BYTES
            ),
            gate=gate,
        )
        to_server = [packet for _, to, packet in pair.link.packets if to == SERVER]
        assert not (destination_connection_id(to_server[0]) or b"").startswith(prefix)
        for packet in to_server[1:]:
            assert (destination_connection_id(packet) or b"").startswith(prefix)


class TestSettings:
    @pytest.mark.parametrize(
        "changes",
        [
            {"certificate_chain_pem": b""},
            {"certificate_chain_pem": b"garbage"},
            {"private_key_pem": b""},
            {"private_key_pem": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"},
        ],
    )
    def test_a_bad_certificate_or_key_is_refused_at_birth(
        self, server_engine: str, changes: dict[str, object]
    ) -> None:
        with pytest.raises(ValueError, match=r"\w"):
            make_engine(server_engine, server_config(**changes))

    def test_bad_roots_are_refused_at_birth(self, server_engine: str) -> None:
        with pytest.raises(ValueError, match=r"\w"):
            make_engine(server_engine, client_config(ca_certificates_pem=b"nothing"))

    @pytest.mark.parametrize("congestion_control", ["cubic", "bbr", "newreno"])
    def test_every_congestion_control_works(
        self, server_engine: str, congestion_control: str
    ) -> None:
        pair = connect_pair(
            server_engine,
            server_engine,
            client=client_config(congestion_control=congestion_control),
            server=server_config(congestion_control=congestion_control),
        )
        stream = pair.client.engine.open_stream(pair.connection)
        assert stream is not None
        pair.client.engine.send_stream(pair.connection, stream, bytes(300_000), end=True)
        pair.link.run_until(lambda: pair.server.has_ended(stream))

    def test_the_engine_says_its_name_and_rests_when_idle(self, server_engine: str) -> None:
        engine: Engine = make_engine(server_engine, server_config())
        assert engine.name == server_engine
        assert engine.next_timeout() is None
        engine.handle_timeout(START + 100)
        assert engine.poll_events() == []
        assert engine.poll_datagrams() == []
        assert engine.poll_transmits(START + 100) == []
        assert engine.take_drops() == {}
