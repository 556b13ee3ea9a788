"""TCP tunnels in the router, without sockets."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from tests.quic.certificates import SERVER_NAME
from tests.worker.bench import DENIAL, GRANT, LIMITS, UNIX_NOW, Bench, FakeTcpTarget
from toppy.errors import DatagramError, TargetError
from toppy.model.drop_reason import DropReason
from toppy.model.grant import Grant
from toppy.model.target import Target
from toppy.net.stream_relay import HIGH_WATER_BYTES
from toppy.protocol.stream_tunnel import RESET_CODE, StreamTunnel, TruncatedStreamError
from toppy.quic.endpoint import BodyReceived, HeadersReceived
from toppy.quic.h3 import H3_MESSAGE_ERROR
from toppy.wire.capsule import DATAGRAM, encode_authorization, encode_capsule, encode_wrap_up
from toppy.wire.connect_tcp import (
    HEADROOM_BYTES,
    StreamFraming,
    classic_request_headers,
    encode_data_header,
    encode_final_data,
)
from toppy.wire.connect_tcp import request_headers as tcp_request_headers
from toppy.wire.ipc_message import AdmissionRequest
from toppy.worker.tcp_relay import TcpFlow

PATH = "/.well-known/masque/tcp/db.example/5432/"
TCP_GRANT = replace(GRANT, addresses=("192.0.2.53", "2001:db8::53"), port=5432)


class TcpBench:
    """One TCP tunnel of a bench, with the client's end of the protocol."""

    def __init__(self, bench: Bench, framing: StreamFraming) -> None:
        self.bench = bench
        self.framing = framing
        self.client = StreamTunnel(framing, is_client=True, hold_bytes=0)
        self.client.open()
        self.stream_id = -1
        self._seen = 0
        self.received = bytearray()

    def request(self, *, expects_continue: bool = False) -> None:
        endpoint, connection = self.bench.client.endpoint, self.bench.client.connection
        if self.framing is StreamFraming.CAPSULES:
            headers = tcp_request_headers(
                f"{SERVER_NAME}:4433", PATH, "secret", expects_continue=expects_continue
            )
        else:
            headers = classic_request_headers(Target("db.example", 5432, "tcp"), "secret")
        stream_id = endpoint.send_request(connection, headers)
        assert stream_id is not None
        self.stream_id = stream_id
        self.bench.settle()

    def connect(self, room: int = 1 << 30) -> FakeTcpTarget:
        """The target answers."""
        attempt = self.bench.shell.connecting[-1]
        target = FakeTcpTarget(attempt.flow, room)
        attempt.flow.connected(target, "192.0.2.53", self.bench.link.now)
        self.bench.settle()
        return target

    def fail(self, error: TargetError) -> None:
        attempt = self.bench.shell.connecting[-1]
        attempt.flow.not_connected(error, self.bench.link.now)
        self.bench.settle()

    def open(self, grant: Grant = TCP_GRANT, room: int = 1 << 30) -> FakeTcpTarget:
        self.request()
        self.bench.answer(grant)
        target = self.connect(room)
        assert self.bench.status(self.stream_id) == 200
        return target

    def send(self, payload: bytes) -> None:
        self.bench.send_body(self.stream_id, bytes(self.client.send(payload)))

    def finish(self) -> None:
        data = self.client.finish()
        self.bench.send_body(self.stream_id, data, end=self.client.take_end())

    def end(self) -> None:
        """The client's socket is closed: in capsules its side of the stream ends now."""
        if self.client.take_end():
            self.bench.send_body(self.stream_id, b"", end=True)

    def from_target(self, target: FakeTcpTarget, payload: bytes, *, settle: bool = True) -> None:
        buffer = memoryview(bytearray(HEADROOM_BYTES) + payload)
        target.flow.relay.receive(buffer, len(payload))
        if settle:
            self.bench.settle()

    def send_from(self, flow: TcpFlow, payload: bytes) -> None:
        """The target sends."""
        flow.relay.receive(memoryview(bytearray(HEADROOM_BYTES) + payload), len(payload))

    def from_target_end(self, flow: TcpFlow) -> None:
        """The target has sent everything."""
        flow.relay.receive_end()
        self.bench.settle()

    @staticmethod
    def is_target_read(target: FakeTcpTarget) -> bool:
        return target.is_reading

    def read(self) -> bytes:
        """What has come from the gateway so far."""
        events = [e for e in self.bench.client.of(BodyReceived) if e.stream_id == self.stream_id]
        for event in events[self._seen :]:
            for piece in self.client.receive_body(event.data, ended=event.ended):
                self.received += piece
        self._seen = len(events)
        return bytes(self.received)

    def closed_because(self) -> str:
        return self.bench.shell.closed[-1].reason


@pytest.fixture(params=["native", "aioquic"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


@pytest.fixture(params=list(StreamFraming), ids=lambda framing: framing.name.lower())
def tcp(bench: Bench, request: pytest.FixtureRequest) -> TcpBench:
    return TcpBench(bench, request.param)


def test_a_grant_is_answered_once_the_target_is_reached(tcp: TcpBench) -> None:
    tcp.request()
    assert [question.protocol for question in tcp.bench.shell.asked] == ["tcp"]  # type: ignore[union-attr]
    tcp.bench.answer(TCP_GRANT)
    assert tcp.bench.status(tcp.stream_id) is None
    target = tcp.connect()
    fields = tcp.bench.fields(tcp.stream_id)
    assert fields[":status"] == "200"
    assert fields["proxy-status"] == 'toppy-gw; next-hop="192.0.2.53"'
    assert ("capsule-protocol" in fields) == (tcp.framing is StreamFraming.CAPSULES)
    assert ("toppy-renewal" in fields) == (tcp.framing is StreamFraming.CAPSULES)
    assert "toppy-barrier" not in fields
    assert target.is_reading


def test_payload_goes_both_ways(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.send(b"question")
    assert target.written == b"question"
    tcp.from_target(target, b"answer")
    assert tcp.read() == b"answer"
    live = next(tcp.bench.router.live_tunnels(with_authorization=False))
    assert (live.protocol, live.address) == ("tcp", "192.0.2.53")


def test_what_came_before_the_target_was_reached_is_written_first(tcp: TcpBench) -> None:
    tcp.request()
    tcp.send(b"early ")
    tcp.bench.answer(TCP_GRANT)
    tcp.send(b"bird")
    target = tcp.connect()
    tcp.send(b"!")
    assert target.written == b"early bird!"


def test_each_direction_ends_by_itself(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.finish()
    assert target.events == ["finish"]
    tcp.from_target(target, b"still here")
    assert tcp.read() == b"still here"
    assert tcp.bench.router.tunnels == 1
    target.flow.relay.receive_end()
    tcp.bench.settle()
    tcp.read()
    assert tcp.client.has_peer_finished
    assert tcp.bench.has_ended(tcp.stream_id)
    assert target.events == ["finish", "close"]
    tcp.end()
    assert tcp.bench.router.tunnels == 0
    assert tcp.closed_because() == "both sides ended it"


def test_the_target_may_finish_first(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.from_target(target, b"bye")
    target.flow.relay.receive_end()
    tcp.bench.settle()
    assert tcp.read() == b"bye"
    assert tcp.client.has_peer_finished
    tcp.send(b"one more thing")
    assert target.written == b"one more thing"
    tcp.finish()
    assert target.events == ["finish", "close"]
    assert tcp.bench.router.tunnels == 0


def test_a_target_that_takes_no_more_holds_back_the_client(tcp: TcpBench) -> None:
    target = tcp.open(room=1000)
    size = 6 << 20
    for _ in range(size >> 16):
        tcp.send(bytes(1 << 16))
    tcp.bench.settle(2.0)
    assert len(target.written) < 1 << 20
    target.drain()
    target.flow.relay.drained()
    tcp.bench.settle(2.0)
    assert len(target.written) == size


def test_the_end_waits_until_the_target_has_taken_everything(tcp: TcpBench) -> None:
    target = tcp.open(room=10)
    tcp.send(bytes(100))
    tcp.finish()
    assert target.events == []
    target.drain()
    target.flow.relay.drained()
    tcp.bench.settle()
    assert target.events == ["finish"]


def test_a_client_that_takes_no_more_holds_back_the_target(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.bench.client.endpoint.pause_reading(tcp.bench.client.connection, tcp.stream_id)
    sent = 0
    while tcp.is_target_read(target):
        tcp.from_target(target, bytes(1 << 18), settle=sent % (1 << 20) == 0)
        sent += 1 << 18
        assert sent < 32 << 20
    assert sent >= HIGH_WATER_BYTES
    tcp.bench.client.endpoint.resume_reading(tcp.bench.client.connection, tcp.stream_id)
    tcp.bench.settle(2.0)
    assert target.is_reading
    assert len(tcp.read()) == sent


def test_a_target_that_breaks_off_resets_the_stream(tcp: TcpBench) -> None:
    target = tcp.open()
    target.flow.relay.receive_failure("Connection reset by peer")
    tcp.bench.settle()
    assert tcp.bench.aborts(tcp.stream_id) == {RESET_CODE}
    assert target.events == ["reset"]
    assert tcp.closed_because() == "the target broke it off: Connection reset by peer"


def test_a_client_that_resets_its_stream_resets_the_target(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.bench.client.endpoint.abort_stream(tcp.bench.client.connection, tcp.stream_id, RESET_CODE)
    tcp.bench.settle()
    assert target.events == ["reset"]
    assert tcp.bench.router.tunnels == 0


@pytest.mark.parametrize(
    ("status", "kind"),
    [(502, "connection_refused"), (504, "connection_timeout"), (502, "destination_ip_unroutable")],
)
def test_a_target_that_is_not_reached_is_said(tcp: TcpBench, status: int, kind: str) -> None:
    tcp.request()
    tcp.bench.answer(TCP_GRANT)
    tcp.fail(TargetError("no luck", status=status, proxy_status=kind))
    fields = tcp.bench.fields(tcp.stream_id)
    assert fields[":status"] == str(status)
    assert f"error={kind}" in fields["proxy-status"]
    assert tcp.bench.router.tunnels == 0
    assert tcp.closed_because() == "no luck"


def test_a_denial_is_answered_at_once(tcp: TcpBench) -> None:
    tcp.request()
    tcp.bench.answer(DENIAL)
    assert tcp.bench.status(tcp.stream_id) == 403
    assert tcp.bench.shell.connecting == []


def test_a_client_that_goes_away_ends_the_attempt(tcp: TcpBench) -> None:
    tcp.request()
    tcp.bench.answer(TCP_GRANT)
    tcp.bench.client.endpoint.abort_stream(tcp.bench.client.connection, tcp.stream_id, RESET_CODE)
    tcp.bench.settle()
    assert tcp.bench.shell.connecting[-1].is_cancelled
    assert tcp.bench.router.tunnels == 0


def test_revocation_ends_a_tunnel_and_one_that_is_being_opened(tcp: TcpBench) -> None:
    target = tcp.open()
    first = tcp.stream_id
    tcp.request()
    tcp.bench.answer(TCP_GRANT)
    keys = [
        (live.connection, live.quarter_stream_id)
        for live in tcp.bench.router.live_tunnels(with_authorization=False)
    ]
    assert tcp.bench.router.close_tunnels(keys, DENIAL) == 2
    tcp.bench.settle()
    assert target.events == ["reset"]
    assert tcp.bench.status(tcp.stream_id) == 403
    assert tcp.bench.shell.connecting[-1].is_cancelled
    if tcp.framing is StreamFraming.RAW:
        assert tcp.bench.aborts(first) == {RESET_CODE}
    else:
        assert tcp.bench.has_ended(first)


def test_an_idle_tunnel_is_ended(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.bench.router.tick(tcp.bench.link.now + LIMITS.tcp_idle_timeout_s - 1, 0.0)
    assert target.events == []
    tcp.bench.router.tick(tcp.bench.link.now + LIMITS.tcp_idle_timeout_s + 1, 0.0)
    assert target.events == ["reset"]
    assert tcp.closed_because() == "it was idle"


def test_who_expects_it_is_told_to_continue(bench: Bench) -> None:
    tcp = TcpBench(bench, StreamFraming.CAPSULES)
    tcp.request(expects_continue=True)
    tcp.bench.answer(TCP_GRANT)
    tcp.connect()
    statuses = [e for e in bench.client.of(HeadersReceived) if e.stream_id == tcp.stream_id]
    assert len(statuses) == 1  # interim ones are not handed on
    assert bench.status(tcp.stream_id) == 200
    # the final answer is no trailer: payload may follow it
    target = bench.shell.connecting[-1].flow
    tcp.from_target(FakeTcpTarget(target), b"payload")
    assert tcp.read() == b"payload"


def test_targets_that_do_not_answer_are_waited_for_up_to_a_bound(tcp: TcpBench) -> None:
    bench = tcp.bench
    streams = []
    for _ in range(3):
        tcp.request()
        bench.answer(TCP_GRANT)
        streams.append(tcp.stream_id)
    assert [bench.status(stream_id) for stream_id in streams] == [None, None, 429]
    assert "connection_limit_reached" in bench.fields(streams[2])["proxy-status"]
    assert len(bench.shell.connecting) == LIMITS.tcp_max_connecting_per_connection
    tcp.fail(TargetError("no luck", status=504, proxy_status="connection_timeout"))
    tcp.request()
    bench.answer(TCP_GRANT)
    bench.client.endpoint.abort_stream(bench.client.connection, streams[0], RESET_CODE)
    bench.settle()
    tcp.connect()
    tcp.request()
    bench.answer(TCP_GRANT)
    tcp.connect()  # there is room for as many as before
    assert bench.status(tcp.stream_id) == 200
    assert bench.router.snapshot().admissions == {"429": 1, "504": 1, "granted": 2}


def test_every_address_that_is_tried_is_known_until_one_has_answered(tcp: TcpBench) -> None:
    tcp.request()
    assert not list(tcp.bench.router.live_tunnels(with_authorization=False))
    tcp.bench.answer(TCP_GRANT)
    (live,) = tcp.bench.router.live_tunnels(with_authorization=False)
    assert live.candidates == TCP_GRANT.addresses
    tcp.connect()
    (live,) = tcp.bench.router.live_tunnels(with_authorization=False)
    assert (live.candidates, live.address) == ((), "192.0.2.53")


def test_payload_is_counted_apart_from_that_of_datagrams(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.send(b"12345")
    tcp.from_target(target, b"123")
    counters = tcp.bench.router.snapshot()
    assert (counters.tcp_bytes_to_target, counters.tcp_bytes_to_client) == (5, 3)
    assert (counters.bytes_to_target, counters.bytes_to_client) == (0, 0)
    assert (counters.tcp_tunnels_open, counters.tcp_tunnels_total) == (1, 1)
    (live,) = tcp.bench.router.live_tunnels(with_authorization=False)
    assert (live.bytes_to_target, live.bytes_to_client) == (5, 3)
    tcp.bench.client.endpoint.abort_stream(tcp.bench.client.connection, tcp.stream_id, RESET_CODE)
    tcp.bench.settle()
    closed = tcp.bench.shell.closed[-1]
    assert (closed.protocol, closed.bytes_to_target, closed.bytes_to_client) == ("tcp", 5, 3)
    assert tcp.bench.router.snapshot().tcp_tunnels_open == 0


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (encode_final_data() + encode_final_data(), H3_MESSAGE_ERROR),
        (encode_final_data() + encode_data_header(1) + b"x", H3_MESSAGE_ERROR),
        (encode_wrap_up(), H3_MESSAGE_ERROR),
        (encode_capsule(DATAGRAM, b"\0x"), DatagramError.h3_error_code),
    ],
    ids=["final-twice", "data-behind", "wrap-up", "datagram"],
)
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "connecting"])
def test_what_breaks_the_protocol_resets_both_sides_and_is_counted(
    bench: Bench, sent: bytes, code: int, is_open: bool
) -> None:
    tcp = TcpBench(bench, StreamFraming.CAPSULES)
    tcp.request()
    bench.answer(TCP_GRANT)
    target = tcp.connect() if is_open else None
    bench.send_body(tcp.stream_id, sent)
    if target is None:  # the stream is not read before there is somewhere to write to
        assert not bench.aborts(tcp.stream_id)
        target = tcp.connect()
    assert bench.aborts(tcp.stream_id) == {code}
    assert target.events[-1] == "reset"
    assert bench.router.snapshot().protocol_errors == 1
    assert tcp.closed_because() == "the client broke the protocol"
    assert bench.router.tunnels == 0


def test_unknown_capsules_are_skipped_and_counted(bench: Bench) -> None:
    tcp = TcpBench(bench, StreamFraming.CAPSULES)
    target = tcp.open()
    bench.send_body(tcp.stream_id, encode_capsule(0x17, bytes(5000)))
    tcp.send(b"behind")
    assert target.written == b"behind"
    assert bench.router.snapshot().capsules_skipped == 1


def test_datagrams_for_a_tcp_tunnel_are_dropped_and_counted(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.bench.send(tcp.stream_id, b"a datagram")
    assert target.written == b""
    assert tcp.bench.drops() == {DropReason.UNKNOWN_STREAM.value: 1}


def test_a_tcp_tunnel_that_waits_takes_no_room_from_udp_capsules(bench: Bench) -> None:
    tcp = TcpBench(bench, StreamFraming.RAW)
    target = tcp.open()
    bench.client.endpoint.pause_reading(bench.client.connection, tcp.stream_id)
    while tcp.is_target_read(target):
        tcp.from_target(target, bytes(1 << 18))
    stream_id = bench.open()
    bench.from_target(bytes(40_000))
    bench.settle(1.0)
    assert bench.capsules(stream_id) == [bytes(40_000)]


def test_a_newer_token_lengthens_a_tcp_tunnel(bench: Bench) -> None:
    tcp = TcpBench(bench, StreamFraming.CAPSULES)
    now = UNIX_NOW + bench.link.now - 1000.0
    target = tcp.open(replace(TCP_GRANT, expires_at=now + 20))
    bench.send_body(tcp.stream_id, encode_authorization("newer"))
    bench.wait(1.1)
    question = bench.shell.asked[-1]
    assert isinstance(question, AdmissionRequest)
    assert (question.authorization, question.address) == ("newer", "192.0.2.53")
    bench.answer(replace(TCP_GRANT, expires_at=now + 60))
    bench.wait(30)
    assert target.events == []
    bench.wait(40)
    assert target.events == ["reset"]
    assert tcp.closed_because() == "its credential expired"


def test_when_the_worker_drains_tunnels_go_on_and_are_told_to_wrap_up(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.bench.router.drain(tcp.bench.link.now)
    tcp.bench.wait(10)
    tcp.send(b"still")
    tcp.from_target(target, b"here")
    assert (bytes(target.written), tcp.read()) == (b"still", b"here")
    assert tcp.client.is_wrapping_up == (tcp.framing is StreamFraming.CAPSULES)
    assert not tcp.bench.router.is_drained
    tcp.finish()
    target.flow.relay.receive_end()
    tcp.bench.settle()
    tcp.read()
    if tcp.client.take_end():
        tcp.bench.send_body(tcp.stream_id, b"", end=True)
    tcp.bench.wait(10)
    assert tcp.bench.router.is_drained


def test_a_target_that_answers_while_the_worker_drains_is_served(tcp: TcpBench) -> None:
    tcp.request()
    tcp.bench.answer(TCP_GRANT)
    tcp.bench.router.drain(tcp.bench.link.now)
    tcp.bench.wait(5)
    target = tcp.connect()
    tcp.send(b"late")
    assert target.written == b"late"


def test_when_the_worker_ends_targets_are_reset_and_recorded(tcp: TcpBench) -> None:
    target = tcp.open()
    tcp.request()
    tcp.bench.answer(TCP_GRANT)
    tcp.bench.router.close(tcp.bench.link.now)
    assert target.events == ["reset"]
    assert tcp.bench.shell.connecting[-1].is_cancelled
    assert [each.reason for each in tcp.bench.shell.closed] == ["its worker ended"] * 2


def test_a_client_that_does_not_read_is_cut_off_all_the_same(bench: Bench) -> None:
    tcp = TcpBench(bench, StreamFraming.CAPSULES)
    target = tcp.open()
    bench.client.endpoint.pause_reading(bench.client.connection, tcp.stream_id)
    while tcp.is_target_read(target):
        tcp.from_target(target, bytes(1 << 18))
    key = (target.flow.connection, target.flow.stream_id // 4)
    assert bench.router.close_tunnels([key], DENIAL) == 1
    bench.settle()
    assert bench.aborts(tcp.stream_id) == set()
    bench.tick()
    bench.tick()
    bench.settle()
    assert RESET_CODE in bench.aborts(tcp.stream_id)


def test_a_client_that_reads_learns_why_and_is_not_cut_off(bench: Bench) -> None:
    tcp = TcpBench(bench, StreamFraming.CAPSULES)
    target = tcp.open()
    key = (target.flow.connection, target.flow.stream_id // 4)
    assert bench.router.close_tunnels([key], DENIAL) == 1
    bench.settle()
    with contextlib.suppress(TruncatedStreamError):
        tcp.read()
    assert "not allowed" in (tcp.client.closed_because or "")
    bench.tick()
    bench.tick()
    bench.settle()
    assert RESET_CODE not in bench.aborts(tcp.stream_id)
