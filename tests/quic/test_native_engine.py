"""What only the native engine does: its settings, its buffers, its addresses, its bounds."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.quic.certificates import SERVER_NAME, other_key_pem
from tests.quic.link import (
    CLIENT,
    SERVER,
    START,
    Link,
    client_config,
    connect_pair,
    make_engine,
    server_config,
)
from tests.quic.stranger import Stranger
from toppy.model.drop_reason import DropReason
from toppy.quic.aioquic_datagrams import parse_datagram_frame
from toppy.quic.engine import (
    Address,
    Admission,
    Buffer,
    ConnectionAccepted,
    ConnectionClosed,
    Engine,
    HandshakeCompleted,
)

pytest.importorskip("toppy.quic._native", reason="the native engine is not built here")


def first_packet(engine: Engine, destination: Address = SERVER) -> bytes:
    """The first UDP datagram of a new connection."""
    engine.connect(destination, SERVER_NAME, START)
    return engine.poll_transmits(START)[0][0]


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("alpn_protocols", ()),
            ("certificate_chain_pem", b"nothing"),
            pytest.param("private_key_pem", other_key_pem(), id="private_key_pem-of another"),
            ("idle_timeout_s", 0.0),
            ("idle_timeout_s", float("nan")),
            ("keep_alive_s", -1.0),
            ("congestion_control", "vegas"),
            ("initial_packet_bytes", 1199),
            ("max_packet_bytes", 70_000),
            ("max_bidirectional_streams", -1),
            ("max_unidirectional_streams", 1 << 70),
            ("stream_window_bytes", 0),
            ("connection_window_bytes", 1 << 62),
            ("tunnel_queue_bytes", -1),
            ("connection_id_bytes", 21),
            ("connection_id_bytes", 4),
            ("connection_id_prefix", bytes(8)),
            ("reset_key", b"short"),
            ("token_key", bytes(65)),
        ],
    )
    def test_a_bad_setting_is_named_at_birth(self, name: str, value: object) -> None:
        word = "prefix" if name == "connection_id_prefix" else name
        with pytest.raises(ValueError, match=word):
            make_engine("native", server_config(**{name: value}))

    def test_a_key_never_shows_in_an_error(self) -> None:
        config = server_config()
        secret = config.private_key_pem.splitlines()[1].decode()
        broken = config.private_key_pem.replace(b"PRIVATE KEY-----\n", b"PRIVATE KEY-----\nAAAA", 1)
        for key in (broken, other_key_pem()):
            with pytest.raises(ValueError, match="private_key_pem") as caught:
                make_engine("native", replace(config, private_key_pem=key))
            assert secret not in str(caught.value)

    def test_a_client_may_trust_the_roots_of_the_system(self) -> None:
        try:
            engine = make_engine("native", client_config(ca_certificates_pem=None))
        except ValueError as error:
            assert "certificate store" in str(error)  # a machine without roots
        else:
            assert first_packet(engine)


class TestConnecting:
    def test_a_server_opens_no_connections(self) -> None:
        with pytest.raises(ValueError, match="server"):
            make_engine("native", server_config()).connect(SERVER, SERVER_NAME, START)

    @pytest.mark.parametrize("host", ["", "gateway.test", "1.2.3", "1.2.3.4%eth0", "::1%"])
    def test_a_host_must_be_a_numeric_address(self, host: str) -> None:
        engine = make_engine("native", client_config())
        if host == "::1%":  # an empty zone is odd, but harmless
            engine.connect((host, 443), SERVER_NAME, START)
            return
        with pytest.raises(ValueError, match="numeric"):
            engine.connect((host, 443), SERVER_NAME, START)

    def test_a_port_of_0_or_a_bad_name_is_refused(self) -> None:
        engine = make_engine("native", client_config())
        with pytest.raises(ValueError, match="address"):
            engine.connect(("192.0.2.1", 0), SERVER_NAME, START)
        with pytest.raises(ValueError, match="name"):
            engine.connect(SERVER, "not a name", START)
        assert engine.poll_transmits(START) == []

    @pytest.mark.parametrize(
        "address",
        [("192.0.2.1", 4433), ("2001:db8::1", 4433), ("::ffff:192.0.2.1", 4433), ("fe80::1%e0", 9)],
    )
    def test_addresses_come_back_as_they_were_given(self, address: Address) -> None:
        client = make_engine("native", client_config())
        server = make_engine("native", server_config())
        connection = client.connect(address, SERVER_NAME, START)
        [(data, _, destination)] = client.poll_transmits(START)
        assert destination == address
        assert client.peer_address(connection) == address
        server.receive(data, 0, address, START)
        [accepted] = server.poll_events()
        assert accepted == ConnectionAccepted(1, address)
        assert all(to == address for _, _, to in server.poll_transmits(START))

    def test_zones_are_bounded(self) -> None:
        engine = make_engine("native", client_config())
        for zone in range(64):
            engine.receive(b"x", 0, (f"fe80::1%eth{zone}", 1), START)
        engine.receive(b"x", 0, ("fe80::1%eth7", 1), START)
        with pytest.raises(ValueError, match="fe80::1%more"):
            engine.receive(b"x", 0, ("fe80::1%more", 1), START)

    def test_error_codes_out_of_range_are_refused(self) -> None:
        engine = make_engine("native", client_config())
        with pytest.raises(ValueError, match="error_code"):
            engine.close(1, 1 << 62, "", START)
        with pytest.raises(ValueError, match="error_code"):
            engine.reset_stream(1, 0, 1 << 62)
        with pytest.raises(ValueError, match="error_code"):
            engine.stop_stream(1, 0, 1 << 62)


class TestBuffers:
    @pytest.mark.parametrize(
        "wrap",
        [
            bytes,
            bytearray,
            memoryview,
            lambda data: memoryview(bytearray(b"<" + data + b">"))[1:-1],
        ],
    )
    def test_every_kind_of_buffer_is_taken(self, wrap: type[bytes]) -> None:
        client = make_engine("native", client_config())
        server = make_engine("native", server_config())
        server.receive(wrap(first_packet(client)), 0, CLIENT, START)
        assert server.poll_events() == [ConnectionAccepted(1, CLIENT)]
        pair = connect_pair("native", "native")
        payloads: Buffer = wrap(b"one two ")
        pair.client.engine.send_datagrams(pair.connection, 0, payloads, 4)
        pair.link.run_until(lambda: len(pair.server.payloads()) == 2)
        assert pair.server.payloads() == [b"one ", b"two "]

    def test_a_received_buffer_may_be_used_again_at_once(self) -> None:
        client = make_engine("native", client_config())
        server = make_engine("native", server_config(), gate=lambda _a, _v: Admission.ACCEPT)
        buffer = bytearray(first_packet(client))
        server.receive(memoryview(buffer), 0, CLIENT, START)
        buffer[:] = bytes(len(buffer))
        for data, segment_size, _ in server.poll_transmits(START):
            client.receive(data, segment_size, SERVER, START)
        assert [type(event) for event in client.poll_events()] == [HandshakeCompleted]

    def test_what_is_no_buffer_is_refused(self) -> None:
        engine = make_engine("native", client_config())
        with pytest.raises(TypeError):
            engine.receive("text", 0, SERVER, START)  # type: ignore[arg-type]

    @settings(max_examples=200, deadline=None)
    @given(
        data=st.binary(max_size=3000), segment_size=st.integers(0, 4000), is_client=st.booleans()
    )
    def test_any_buffer_is_accepted_or_ignored(
        self, data: bytes, segment_size: int, is_client: bool
    ) -> None:
        config = client_config() if is_client else server_config()
        engine = make_engine("native", config)
        engine.receive(data, segment_size, CLIENT, START)
        engine.poll_transmits(START)
        assert engine.poll_events() == []


class TestTheGate:
    def test_an_error_in_the_gate_reaches_the_caller_and_nobody_is_accepted(self) -> None:
        answers: list[Exception | Admission] = [RuntimeError("broken gate"), Admission.ACCEPT]

        def gate(source: Address, is_validated: bool) -> Admission:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        client = make_engine("native", client_config())
        server = make_engine("native", server_config(), gate=gate)
        packets = [first_packet(client) for _ in range(3)]
        size = len(packets[0])
        with pytest.raises(RuntimeError, match="broken gate"):
            server.receive(packets[0] + packets[1], size, CLIENT, START)
        assert server.poll_events() == []
        server.receive(packets[2], 0, CLIENT, START)
        assert server.poll_events() == [ConnectionAccepted(1, CLIENT)]

    def test_the_gate_must_not_call_the_engine(self) -> None:
        engines: list[Engine] = []

        def gate(source: Address, is_validated: bool) -> Admission:
            engines[0].poll_events()
            return Admission.ACCEPT

        server = make_engine("native", server_config(), gate=gate)
        engines.append(server)
        with pytest.raises(RuntimeError, match="borrowed"):
            server.receive(first_packet(make_engine("native", client_config())), 0, CLIENT, START)
        assert server.poll_events() == []

    def test_a_retry_token_does_not_live_for_ever(self) -> None:
        link = Link(delay_s=8.0)
        server = link.attach(
            make_engine("native", server_config(), gate=lambda _source, _ok: Admission.RETRY),
            SERVER,
        )
        client = link.attach(make_engine("native", client_config(idle_timeout_s=90.0)), CLIENT)
        client.engine.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: client.closed, limit_s=80.0)
        assert client.closed is not None
        assert client.closed.by_peer
        assert client.closed.error_code == 0xB
        assert "token" in client.closed.reason
        assert server.of(ConnectionAccepted) == []


class TestHttpDatagrams:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(frame=st.binary(max_size=24))
    def test_both_engines_read_them_alike(self, frame: bytes) -> None:
        link = Link()
        server = link.attach(make_engine("native", server_config()), SERVER)
        stranger = Stranger()
        stranger.join(link, CLIENT)
        stranger.connect(SERVER, SERVER_NAME, link.now)
        link.run_until(lambda: stranger.is_ready and server.is_ready)
        stranger.quic.send_datagram_frame(frame)
        link.run_for(0.1)
        parsed = parse_datagram_frame(frame)
        if parsed is None:
            assert server.drops == {DropReason.MALFORMED: 1}
            assert server.closed == ConnectionClosed(1, 0x33, "malformed HTTP Datagram", False)
            return
        quarter_stream_id, context_id, offset = parsed
        if context_id:
            assert server.drops == {DropReason.UNKNOWN_CONTEXT: 1}
            assert server.groups == []
        else:
            assert server.payloads(quarter_stream_id) == [frame[offset:]]

    def test_other_protocols_have_none(self) -> None:
        pair = connect_pair(
            "native",
            "native",
            client=client_config(alpn_protocols=("toppy-ping",)),
            server=server_config(alpn_protocols=("toppy-ping",)),
        )
        pair.client.engine.send_datagrams(pair.connection, 0, b"x", 0)
        pair.link.run_for(0.5)
        assert pair.server.groups == []
        assert pair.server.drops == {DropReason.UNKNOWN_STREAM: 1}
        assert pair.server.closed is None

    def test_a_quarter_stream_id_out_of_range_is_dropped(self) -> None:
        pair = connect_pair("native", "native")
        assert pair.client.engine.max_payload_bytes(pair.connection, 1 << 60) == -1
        pair.client.engine.send_datagrams(pair.connection, 1 << 60, bytes(30), 10)
        assert pair.client.engine.take_drops() == {DropReason.TOO_LARGE: 3}


class TestBounds:
    def test_nothing_stays_of_connections_that_ended(self) -> None:
        link = Link(delay_s=0.001)
        server = link.attach(make_engine("native", server_config()), SERVER)
        client = link.attach(make_engine("native", client_config()), CLIENT)
        for _ in range(5):
            numbers = [client.engine.connect(SERVER, SERVER_NAME, link.now) for _ in range(40)]
            link.run_for(0.5)
            for number in numbers:
                client.engine.close(number, 0, "", link.now)
            link.run_for(10.0)
        assert len(server.of(ConnectionAccepted)) == 200
        assert len(server.of(ConnectionClosed)) == 200
        assert len(client.of(ConnectionClosed)) == 200
        assert client.engine.next_timeout() is None
        assert server.engine.next_timeout() is None

    def test_answers_to_strangers_are_bounded(self) -> None:
        server = make_engine("native", server_config())
        packet = b"\xc3\0\0\0\x02\x08DESTINAT\x05SOURC" + bytes(1200)
        for _ in range(5000):
            server.receive(packet, 0, CLIENT, START)
        assert len(server.poll_transmits(START)) == 1024

    def test_stateless_resets_are_limited_in_rate(self) -> None:
        server = make_engine("native", server_config())
        for index in range(5000):
            stray = b"\x40" + index.to_bytes(10, "big") + bytes(100)
            server.receive(stray, 0, CLIENT, START + index * 1e-5)
        assert 40 <= len(server.poll_transmits(START + 1)) <= 60

    def test_the_engine_can_be_collected(self) -> None:
        pair = connect_pair("native", "native", gate=lambda _source, _ok: Admission.ACCEPT)
        del pair
        gc.collect()


def handshake_bytes(client: Engine, server: Engine) -> int:
    """What a server sends until a new connection is ready; the peers go on for a moment, so that
    a session ticket arrives.
    """
    now, said = START, 0
    client.connect(SERVER, SERVER_NAME, now)
    ready: int | None = None
    for _ in range(60):
        now += 0.01
        for engine in (client, server):
            due = engine.next_timeout()
            if due is not None and due <= now:
                engine.handle_timeout(now)
        for data, size, _ in client.poll_transmits(now):
            server.receive(data, size, CLIENT, now)
        for data, size, _ in server.poll_transmits(now):
            said += len(data)
            client.receive(data, size, SERVER, now)
        server.poll_events()
        if any(isinstance(event, HandshakeCompleted) for event in client.poll_events()):
            ready = said
    assert ready is not None
    return ready


class TestSessionResumption:
    KEY = bytes(range(64))

    def server(self, **changes: object) -> Engine:
        config = replace(server_config(), token_key=self.KEY)
        return make_engine("native", replace(config, **changes))  # type: ignore[arg-type]

    def test_a_client_that_comes_back_is_sent_no_certificate_by_any_worker(self) -> None:
        client = make_engine("native", client_config())
        first = handshake_bytes(client, self.server())
        again = [handshake_bytes(client, self.server()) for _ in range(2)]
        assert max(again) < first - 150, (first, again)

    @pytest.mark.parametrize("changes", [{"token_key": bytes(64)}, {"resumes_sessions": False}])
    def test_where_the_ticket_is_not_taken_the_handshake_is_a_full_one(
        self, changes: dict[str, object]
    ) -> None:
        client = make_engine("native", client_config())
        first = handshake_bytes(client, self.server())
        assert handshake_bytes(client, self.server(**changes)) > first - 100

    def test_a_client_may_forgo_it(self) -> None:
        client = make_engine("native", replace(client_config(), resumes_sessions=False))
        first = handshake_bytes(client, self.server())
        assert handshake_bytes(client, self.server()) > first - 100


def test_bursts_of_losses_are_not_taken_for_a_path_that_drops_large_packets() -> None:
    """A buffer that overflows must not send an inner QUIC handshake's packets as capsules."""
    link = Link()
    pair = connect_pair("native", "native", link=link)
    link.run_for(3.0)  # path MTU discovery
    engine = pair.client.engine
    assert engine.max_payload_bytes(pair.connection, 0) > 1400
    link.loss = 0.5
    for _ in range(20):
        engine.send_datagrams(pair.connection, 0, bytes(1200 * 40), 1200)
        link.run_for(0.2)
        assert engine.max_payload_bytes(pair.connection, 0) >= 1200
    link.loss = 0.0
    link.run_for(10.0)
    engine.send_datagrams(pair.connection, 0, bytes(1200), 0)
    link.run_for(5.0)
    assert engine.max_payload_bytes(pair.connection, 0) > 1400
