"""What every server engine promises to, and against, clients that are not ours."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.quic.certificates import SERVER_NAME
from tests.quic.link import (
    CLIENT,
    NOBODY,
    SERVER,
    End,
    Gatekeeper,
    Link,
    Pair,
    client_config,
    connect_pair,
    make_engine,
    server_config,
)
from tests.quic.stranger import Stranger
from toppy.quic.engine import (
    Admission,
    ConnectionAccepted,
    ConnectionClosed,
    HandshakeCompleted,
)
from toppy.wire.varint import encode_varint


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Bytes that begin like a QUIC frame: a type, then numbers, then anything."""
    kind = draw(st.one_of(st.integers(0, 0x31), st.integers(0, 0x3FFF)))
    values = st.one_of(st.integers(0, 20), st.integers(0, (1 << 62) - 1))
    numbers_ = draw(st.lists(values, max_size=5))
    tail = draw(st.binary(max_size=40))
    return b"".join(encode_varint(number) for number in (kind, *numbers_)) + tail


class TestTheGate:
    def attempt(self, engines: tuple[str, str], gate: Gatekeeper) -> tuple[Link, End, End]:
        link = Link()
        server = link.attach(make_engine(engines[1], server_config(), gate=gate), SERVER)
        client = link.attach(make_engine(engines[0], client_config(idle_timeout_s=5.0)), CLIENT)
        client.engine.connect(SERVER, SERVER_NAME, link.now)
        return link, client, server

    def test_accept_is_asked_once(self, engines: tuple[str, str]) -> None:
        gate = Gatekeeper(Admission.ACCEPT)
        link, client, server = self.attempt(engines, gate)
        link.run_until(lambda: client.is_ready and server.is_ready)
        link.run_for(1.0)
        assert gate.asked == [(CLIENT, False)]

    def test_retry_makes_the_client_prove_its_address(self, engines: tuple[str, str]) -> None:
        gate = Gatekeeper(Admission.RETRY)
        link, client, server = self.attempt(engines, gate)
        link.run_until(lambda: client.is_ready and server.is_ready)
        assert gate.asked == [(CLIENT, False), (CLIENT, True)]
        assert len(server.of(ConnectionAccepted)) == 1

    def test_another_worker_with_the_same_key_takes_up_a_retry(
        self, engines: tuple[str, str]
    ) -> None:
        link, client, first = self.attempt(engines, Gatekeeper(Admission.RETRY))
        link.run_until(lambda: any(source == SERVER for source, _, _ in link.packets))
        gate = Gatekeeper(Admission.ACCEPT)
        second = link.attach(
            make_engine(engines[1], server_config(), gate=gate, now=link.now), SERVER
        )
        link.run_until(lambda: client.is_ready and second.is_ready)
        assert gate.asked == [(CLIENT, True)]
        assert first.events == []

    def test_refuse_tells_the_client(self, engines: tuple[str, str]) -> None:
        link, client, server = self.attempt(engines, Gatekeeper(Admission.REFUSE))
        link.run_until(lambda: client.closed, limit_s=1.0)
        assert client.closed is not None
        assert client.closed.error_code == 2
        assert client.closed.by_peer
        assert client.closed.reason
        assert server.events == []

    def test_ignore_leaves_the_client_without_an_answer(self, engines: tuple[str, str]) -> None:
        link, client, server = self.attempt(engines, Gatekeeper(Admission.IGNORE))
        link.run_until(lambda: client.closed, limit_s=20.0)
        assert client.closed is not None
        assert client.closed.reason == "idle timeout"
        assert server.events == []
        assert all(source == CLIENT for source, _, _ in link.packets)


class TestStrangers:
    def serve(self, server_engine: str, stranger: Stranger) -> tuple[Link, End]:
        link = Link()
        server = link.attach(make_engine(server_engine, server_config()), SERVER)
        stranger.join(link, CLIENT)
        stranger.connect(SERVER, SERVER_NAME, link.now)
        return link, server

    def converse(self, server_engine: str, stranger: Stranger) -> Link:
        link, server = self.serve(server_engine, stranger)
        link.run_until(lambda: stranger.is_ready and server.is_ready)
        stranger.quic.send_stream_data(0, b"hello", end_stream=True)
        stranger.quic.send_datagram_frame(b"\x00\x00payload")
        link.run_until(lambda: server.has_ended(0) and server.payloads())
        number = server.of(HandshakeCompleted)[0].connection
        server.engine.send_datagrams(number, 0, b"back", 0)
        link.run_until(lambda: stranger.frames)
        assert server.stream(0) == b"hello"
        assert server.payloads() == [b"payload"]
        assert stranger.frames == [b"\x00\x00back"]
        link.run_for(3.0)
        assert server.closed is None
        return link

    @pytest.mark.parametrize("id_bytes", [0, 1, 8, 20])
    def test_clients_with_ids_of_any_length_are_served(
        self, server_engine: str, id_bytes: int
    ) -> None:
        self.converse(server_engine, Stranger(id_bytes=id_bytes))

    def test_two_clients_without_ids_are_kept_apart(self, server_engine: str) -> None:
        link = Link()
        server = link.attach(make_engine(server_engine, server_config()), SERVER)
        strangers = [Stranger(id_bytes=0), Stranger(id_bytes=0)]
        for index, stranger in enumerate(strangers):
            stranger.join(link, (CLIENT[0], CLIENT[1] + index))
            stranger.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: len(server.of(HandshakeCompleted)) == 2)
        for event in server.of(HandshakeCompleted):
            server.engine.send_datagrams(event.connection, 0, b"%d" % event.connection, 0)
        link.run_until(lambda: all(stranger.frames for stranger in strangers))
        assert len({stranger.frames[0] for stranger in strangers}) == 2

    @pytest.mark.parametrize("padding", [b"\0", b"\x40", b"\xff"])
    def test_bytes_behind_the_initial_packet_do_no_harm(
        self, server_engine: str, padding: bytes
    ) -> None:
        def pad(data: bytes) -> bytes:
            is_initial = data[0] & 0xF0 == 0xC0
            return data + padding * 100 if is_initial else data

        self.converse(server_engine, Stranger(mangle=pad))

    def test_a_client_hello_in_two_packets_is_put_together(self, server_engine: str) -> None:
        stranger = Stranger(quantum_readiness_test=True)
        link = self.converse(server_engine, stranger)
        initials = [packet for _, to, packet in link.packets if to == SERVER][:2]
        assert all(packet[0] & 0xF0 == 0xC0 for packet in initials)

    def test_a_client_hello_in_two_packets_may_be_reordered(self, server_engine: str) -> None:
        stranger = Stranger(quantum_readiness_test=True)
        link, server = self.serve(server_engine, stranger)
        packets = stranger.quic.datagrams_to_send(link.now)
        assert len(packets) >= 2
        for data, _ in reversed(packets):
            link.send(CLIENT, SERVER, data)
        link.run_until(lambda: stranger.is_ready and server.is_ready)
        assert len(server.of(ConnectionAccepted)) == 1

    @pytest.mark.parametrize("version", [0x6B3343CF, 0x0A0A0A0A, 0xFF00001D, 2])
    def test_other_versions_are_answered_with_version_negotiation(
        self, server_engine: str, version: int
    ) -> None:
        link = Link()
        server = link.attach(make_engine(server_engine, server_config()), SERVER)
        header = b"\xc3" + version.to_bytes(4, "big") + b"\x08DESTINAT\x05SOURC"
        link.send(NOBODY, SERVER, header + bytes(1200 - len(header)))
        link.run_for(0.1)
        assert server.events == []
        assert len(link.packets) == 1
        _, to, answer = link.packets[0]
        assert to == NOBODY
        assert answer[0] & 0x80
        assert answer[1:20] == bytes(4) + b"\x05SOURC\x08DESTINAT"[:15]
        assert answer[5:20] == b"\x05SOURC\x08DESTINAT"
        versions = [answer[i : i + 4] for i in range(20, len(answer), 4)]
        assert b"\0\0\0\x01" in versions
        known = [v for v in versions if v[0] & 0xF != 0xA]  # the rest is grease
        assert known == [b"\0\0\0\x01"]

    def test_small_or_strange_first_packets_are_not_answered(self, server_engine: str) -> None:
        link = Link()
        server = link.attach(make_engine(server_engine, server_config()), SERVER)
        small = b"\xc3" + b"\x0a" * 4 + b"\x08DESTINAT\x05SOURC" + bytes(1000)
        negotiation = b"\xc3" + bytes(4) + b"\x08DESTINAT\x05SOURC" + bytes(1200)
        for data in (small, negotiation, b"", b"\0", b"\x40", b"\xc0", b"\xc0\0\0\0\x01\xff"):
            link.send(NOBODY, SERVER, data)
        link.run_for(5.0)
        assert link.packets == []
        assert server.events == []

    def test_a_client_that_sends_one_packet_gets_three_times_as_much_at_most(
        self, server_engine: str
    ) -> None:
        link = Link()
        server = link.attach(make_engine(server_engine, server_config()), SERVER)
        stranger = Stranger()
        stranger.connect(SERVER, SERVER_NAME, link.now)
        data, _ = stranger.quic.datagrams_to_send(link.now)[0]
        link.send(CLIENT, SERVER, data)
        link.run_until(lambda: server.closed, limit_s=60.0)
        assert 0 < sum(len(packet) for _, _, packet in link.packets) <= 3 * len(data)

    def test_an_initial_in_a_small_datagram_is_ignored(self, server_engine: str) -> None:
        stranger = Stranger(mangle=lambda data: data[:1199])
        link, server = self.serve(server_engine, stranger)
        link.run_for(3.0)
        assert server.events == []
        assert all(source == CLIENT for source, _, _ in link.packets)

    def test_an_initial_that_is_not_authentic_leaves_nothing(self, server_engine: str) -> None:
        stranger = Stranger(mangle=lambda data: data[:100] + bytes((data[100] ^ 1,)) + data[101:])
        link, server = self.serve(server_engine, stranger)
        link.run_for(2.0)
        assert server.of(HandshakeCompleted) == []
        assert len(server.of(ConnectionAccepted)) == len(server.of(ConnectionClosed))


class TestBadInput:
    def test_random_datagrams_change_nothing(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines)
        chance = random.Random(11)
        before = len(pair.server.events)
        for index in range(10_000):
            data = bytearray(chance.randbytes(chance.choice((1, 20, 40, 100, 1200, 1350))))
            if index % 3 == 0:
                data[0] |= 0xC0
                data[1:6] = b"\0\0\0\x01\x08"[: len(data) - 1]
            source = CLIENT if index % 2 else NOBODY
            pair.server.engine.receive(bytes(data), 0, source, pair.link.now)
            pair.client.engine.receive(bytes(data), 0, SERVER, pair.link.now)
            if index % 100 == 0:
                pair.server.engine.poll_transmits(pair.link.now)
        pair.server.engine.poll_transmits(pair.link.now)
        pair.link.run_for(1.0)
        assert len(pair.server.of(HandshakeCompleted)) == 1
        opened = pair.server.of(ConnectionAccepted)
        assert len(opened) - 1 == len(pair.server.of(ConnectionClosed))
        assert len(pair.server.events) - before == 2 * (len(opened) - 1)
        pair.client.engine.send_datagrams(pair.connection, 0, b"still fine", 0)
        pair.link.run_until(pair.server.payloads)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_damaged_packets_do_no_harm(
        self, engines: tuple[str, str], data: st.DataObject
    ) -> None:
        pair = connect_pair(*engines)
        pair.client.engine.send_datagrams(pair.connection, 0, bytes(300), 0)
        pair.link.run_until(pair.server.payloads)
        packets = list(pair.link.packets)
        for _ in range(8):
            # packets and their lengths differ from run to run, so what is drawn must not depend on
            # them
            _, to, packet = packets[data.draw(st.integers(0, 99)) % len(packets)]
            changed = bytearray(packet)
            for _ in range(data.draw(st.integers(0, 3))):
                position = data.draw(st.integers(0, 60)) % len(changed)
                changed[position] ^= 1 << data.draw(st.integers(0, 7))
            cut = data.draw(st.integers(1, 1500))
            size = data.draw(st.sampled_from([0, 0, 1, 7, 100]))
            end = pair.server if to == SERVER else pair.client
            source = CLIENT if to == SERVER else SERVER
            end.engine.receive(bytes(changed[:cut]), size, source, pair.link.now)
        pair.link.run_for(0.5)
        pair.client.engine.send_datagrams(pair.connection, 0, b"still fine", 0)
        pair.link.run_until(lambda: b"still fine" in pair.server.payloads())

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(packets=st.lists(st.lists(frames(), min_size=1, max_size=6), min_size=1, max_size=6))
    def test_a_client_that_sends_any_frames_harms_itself_only(
        self, server_engine: str, packets: list[list[bytes]]
    ) -> None:
        link = Link(delay_s=0.001)
        server = link.attach(make_engine(server_engine, server_config()), SERVER)
        hostile, honest = Stranger(), Stranger()
        hostile.join(link, CLIENT)
        honest.join(link, NOBODY)
        hostile.connect(SERVER, SERVER_NAME, link.now)
        honest.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: len(server.of(HandshakeCompleted)) == 2)
        link.run_for(0.1)
        del link.ends[CLIENT]  # it does not listen
        for packet in packets:
            link.send(CLIENT, SERVER, hostile.raw_packet(b"".join(packet)[:1100]))
            link.run_for(0.01)
        honest.quic.send_datagram_frame(b"\x05\x00still fine")
        link.run_until(lambda: b"still fine" in server.payloads(5))
        assert len(server.of(ConnectionClosed)) <= 1

    def test_replayed_packets_change_nothing(self, pair: Pair) -> None:
        pair.client.engine.send_datagrams(pair.connection, 0, b"once", 0)
        pair.link.run_until(pair.server.payloads)
        for source, to, packet in list(pair.link.packets):
            pair.link.send(source, to, packet)
        pair.link.run_for(2.0)
        assert pair.server.payloads() == [b"once"]
        assert pair.client.closed is None
        assert pair.server.closed is None
