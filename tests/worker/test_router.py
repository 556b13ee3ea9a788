"""The router: requests, admission, payloads both ways, and every way in which a tunnel ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.quic.certificates import SERVER_NAME
from tests.quic.link import CLIENT, NOBODY, SERVER
from tests.worker.bench import DENIAL, ECHO, GRANT, LIMITS, UNIX_NOW, Bench, ClientNode
from toppy.errors import TargetError
from toppy.model.grant import Denial
from toppy.net.udp_socket import SendResult
from toppy.quic.endpoint import PING_ALPN
from toppy.wire.capsule import DATAGRAM, encode_capsule
from toppy.wire.ipc_message import AdmissionRequest, Admitted, TokenAnswer, TokenRequest
from toppy.wire.proxy_status import ProxyStatus, parse_proxy_status
from toppy.wire.varint import encode_varint

H3_CONNECT_ERROR = 0x10F
H3_DATAGRAM_ERROR = 0x33


@pytest.fixture(params=["native", "aioquic"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


@pytest.fixture(params=["native", "aioquic"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def capsule(payload: bytes, context_id: int = 0) -> bytes:
    return encode_capsule(DATAGRAM, encode_varint(context_id) + payload)


def proxy_status(bench: Bench, stream_id: int) -> ProxyStatus:
    found = parse_proxy_status(bench.fields(stream_id)["proxy-status"])
    assert found is not None
    return found


# admission


def test_the_control_plane_is_asked_once_for_each_tunnel(bench: Bench) -> None:
    bench.request("/.well-known/masque/udp/Dns.Example/53/", token="secret")
    assert bench.shell.asked == [
        AdmissionRequest(
            request=1,
            authorization="Bearer secret",
            host="dns.example",
            port=53,
            protocol="udp",
            is_echo=False,
            source=CLIENT[0],
            connection=next(iter(bench.router.live_connections())).connection,
            quarter_stream_id=0,
        )
    ]


def test_a_grant_opens_the_target_and_answers_200(bench: Bench) -> None:
    stream_id = bench.request()
    assert bench.status(stream_id) is None
    bench.answer(GRANT)
    assert bench.fields(stream_id) == {
        ":status": "200",
        "capsule-protocol": "?1",
        "toppy-barrier": "?1",
        "toppy-renewal": "?1",
        "proxy-status": 'toppy-gw; next-hop="192.0.2.53"',
    }
    assert bench.target.grant is GRANT
    counters = bench.router.snapshot()
    assert (counters.tunnels_open, counters.tunnels_total) == (1, 1)
    assert counters.admissions == {"granted": 1}


def test_a_denial_is_answered_with_its_status_reason_and_rule(bench: Bench) -> None:
    stream_id = bench.request()
    bench.answer(DENIAL)
    assert bench.status(stream_id) == 403
    assert bench.has_ended(stream_id)
    word = proxy_status(bench, stream_id)
    assert word == ProxyStatus("toppy-gw", "http_request_denied", "not allowed", "default")
    assert bench.router.tunnels == 0
    assert bench.router.snapshot().admissions == {"403": 1}


def test_401_says_how_to_authenticate(bench: Bench) -> None:
    stream_id = bench.request(token=None)
    bench.answer(Denial(401, "http_request_denied", "a bearer token is required"))
    assert bench.fields(stream_id)["www-authenticate"] == 'Bearer realm="toppy"'


def test_too_many_refused_credentials_close_the_connection(bench: Bench) -> None:
    for _ in range(LIMITS.max_failed_auth_per_connection):
        assert bench.client.closed is None
        bench.request()
        bench.answer(Denial(401, "http_request_denied", "the token is wrong"))
    assert bench.client.closed is not None
    assert bench.client.closed.reason == "too many failed authentications"


def test_other_denials_close_no_connection(bench: Bench) -> None:
    for _ in range(3 * LIMITS.max_failed_auth_per_connection):
        bench.request()
        bench.answer(DENIAL)
    assert bench.client.closed is None


def test_a_bad_request_is_refused_without_asking(bench: Bench) -> None:
    assert bench.status(bench.request("/.well-known/masque/udp/dns.example/0/")) == 400
    assert bench.status(bench.request("/elsewhere")) == 404
    assert not bench.shell.asked
    assert bench.router.snapshot().admissions == {"400": 1, "404": 1}


def test_an_answer_that_never_comes_is_504(bench: Bench) -> None:
    stream_id = bench.request()
    bench.wait(LIMITS.admission_timeout_s + 1)
    assert bench.status(stream_id) == 504
    assert bench.router.tunnels == 0


def test_an_answer_that_comes_too_late_opens_nothing(bench: Bench) -> None:
    bench.request()
    bench.wait(LIMITS.admission_timeout_s + 1)
    bench.answer(GRANT)
    assert not bench.shell.targets


def test_an_answer_without_a_decision_is_502(bench: Bench) -> None:
    stream_id = bench.request()
    bench.router.receive_answer(Admitted(bench.shell.asked[0].request, None, None), bench.link.now)
    bench.settle()
    assert bench.status(stream_id) == 502


def test_answers_to_questions_that_nobody_asked_are_ignored(bench: Bench) -> None:
    stream_id = bench.request()
    bench.router.receive_answer(Admitted(999, GRANT, None), bench.link.now)
    bench.router.receive_answer(TokenAnswer(999, True), bench.link.now)
    # an answer of the wrong kind
    bench.router.receive_answer(TokenAnswer(bench.shell.asked[0].request, True), bench.link.now)
    bench.settle()
    assert bench.status(stream_id) is None
    assert not bench.shell.targets


def test_a_control_plane_that_cannot_be_asked_is_429(bench: Bench) -> None:
    bench.shell.can_ask = False
    stream_id = bench.request()
    assert bench.status(stream_id) == 429
    assert bench.router.tunnels == 0


def test_too_many_tunnels_on_a_connection_are_429(bench: Bench) -> None:
    tunnels = [bench.open() for _ in range(LIMITS.max_tunnels_per_connection)]
    refused = bench.request()
    assert bench.status(refused) == 429
    assert proxy_status(bench, refused).error == "connection_limit_reached"
    bench.send_body(tunnels[0], b"", end=True)
    bench.open()


def test_too_many_requests_that_wait_are_429(engine: str) -> None:
    limits = replace(LIMITS, max_pending_admissions=2)
    bench = Bench(engine, limits=limits)
    waiting = [bench.request(), bench.request()]
    assert bench.status(bench.request()) == 429
    bench.answer(GRANT, question=0)
    assert bench.status(waiting[0]) == 200
    assert bench.status(bench.request()) is None


def test_a_target_that_cannot_be_opened_is_answered_with_its_error(bench: Bench) -> None:
    bench.shell.failure = TargetError(
        "no way to the target", status=502, proxy_status="destination_ip_unroutable"
    )
    stream_id = bench.request()
    bench.answer(GRANT)
    assert bench.status(stream_id) == 502
    assert proxy_status(bench, stream_id).error == "destination_ip_unroutable"
    assert bench.router.tunnels == 0


@pytest.mark.parametrize(
    ("path", "is_echo"),
    [
        ("udp/localhost/7/", True),
        ("udp/LOCALHOST/9/", True),
        ("udp/127.0.0.1/9/", True),
        ("udp/127.8.8.8/7/", True),
        ("udp/%3A%3A1/9/", True),
        (f"udp/{SERVER_NAME}/9/", True),
        ("udp/localhost/8/", False),
        ("udp/localhost/10/", False),
        ("udp/192.0.2.1/9/", False),
        ("udp/dns.example/9/", False),
        ("udp-forward/localhost/9/", False),
        ("udp-forward/127.0.0.1/7/", False),
    ],
)
def test_the_echo_is_for_the_gateways_own_names_on_two_ports_of_one_template(
    path: str, is_echo: bool
) -> None:
    bench = Bench("aioquic")
    bench.request(f"/.well-known/masque/{path}")
    (question,) = bench.shell.asked
    assert isinstance(question, AdmissionRequest)
    assert question.is_echo is is_echo


# datagrams before the tunnel is open


def test_datagram_before_headers_is_held_then_delivered(bench: Bench) -> None:
    bench.send(0, b"overtook its request")
    assert bench.request() == 0
    assert bench.drops() == {}
    bench.answer(GRANT)
    assert bench.target.sent == [b"overtook its request"]


def test_datagrams_before_the_answer_are_held_then_delivered_in_order(bench: Bench) -> None:
    stream_id = bench.request()
    bench.send(stream_id, b"one", b"", b"three")
    bench.answer(GRANT)
    bench.send(stream_id, b"four")
    assert bench.target.sent == [b"one", b"", b"three", b"four"]
    assert bench.router.snapshot().datagrams_to_target == 4


def test_early_datagrams_beyond_the_bound_are_dropped_and_counted(bench: Bench) -> None:
    stream_id = bench.request()
    for number in range(6):
        bench.send(stream_id, b"%d" % number)
    bench.answer(GRANT)
    assert bench.target.sent == [b"0", b"1", b"2", b"3"]
    assert bench.drops() == {"early_queue_full": 2}


def test_early_bytes_beyond_the_bound_are_dropped_and_counted(bench: Bench) -> None:
    stream_id = bench.request()
    bench.send_body(stream_id, capsule(bytes(4000)))
    bench.send_body(stream_id, capsule(bytes(4000)))
    bench.send_body(stream_id, capsule(bytes(1000)))
    bench.answer(GRANT)
    assert [len(payload) for payload in bench.target.sent] == [4000, 1000]
    assert bench.drops() == {"early_queue_full": 1}


def test_what_was_held_for_a_refused_tunnel_is_counted(bench: Bench) -> None:
    stream_id = bench.request()
    bench.send(stream_id, b"one")
    bench.send(stream_id, b"two")
    bench.answer(DENIAL)
    assert bench.drops() == {"tunnel_refused": 2}


def test_datagrams_whose_request_never_comes_are_dropped_and_counted(bench: Bench) -> None:
    bench.send(0, b"one")
    bench.send(0, b"two")
    assert bench.drops() == {}
    bench.tick()
    assert bench.drops() == {"unknown_stream": 2}


def test_datagrams_for_a_tunnel_that_is_over_are_counted(bench: Bench) -> None:
    stream_id = bench.request()
    bench.answer(DENIAL)
    bench.send(stream_id, b"too late")
    assert bench.drops() == {"unknown_stream": 1}


# payloads


def test_datagrams_reach_the_target(bench: Bench) -> None:
    stream_id = bench.open()
    bench.send(stream_id, b"query", b"", bytes(1000))
    assert bench.target.sent == [b"query", b"", bytes(1000)]
    counters = bench.router.snapshot()
    assert (counters.datagrams_to_target, counters.bytes_to_target) == (3, 1005)
    assert counters.capsules_received == 0


def test_capsules_reach_the_target(bench: Bench) -> None:
    stream_id = bench.open()
    bench.send_body(stream_id, capsule(bytes(9000)) + capsule(b"") + capsule(b"last")[:3])
    bench.send_body(stream_id, capsule(b"last")[3:])
    assert bench.target.sent == [bytes(9000), b"", b"last"]
    counters = bench.router.snapshot()
    assert (counters.datagrams_to_target, counters.capsules_received) == (3, 3)


def test_what_the_target_sends_reaches_the_client(bench: Bench) -> None:
    stream_id = bench.open()
    bench.from_target(b"answer", b"", bytes(1000))
    assert bench.payloads(stream_id) == [b"answer", b"", bytes(1000)]
    counters = bench.router.snapshot()
    assert (counters.datagrams_to_client, counters.bytes_to_client) == (3, 1006)


def test_what_fits_no_packet_goes_to_the_client_in_capsules(bench: Bench) -> None:
    stream_id = bench.open()
    bench.from_target(bytes(9000), b"small")
    assert bench.capsules(stream_id) == [bytes(9000)]
    assert bench.payloads(stream_id) == [b"small"]
    assert bench.router.snapshot().capsules_sent == 1


def test_capsules_beyond_the_streams_bound_are_dropped_and_counted(bench: Bench) -> None:
    bench.open()
    target = bench.target
    bench.link.is_cut = True
    for _ in range(100):
        bench.router.receive_from_target(target.tunnel, bytes(30_000), 30_000, bench.link.now)
    counters = bench.router.snapshot()
    # the engine may hold a send window besides
    assert 3 <= counters.capsules_sent < 50
    assert counters.datagrams_to_client == counters.capsules_sent
    assert counters.drops == {"capsule_queue_full": 100 - counters.capsules_sent}


def test_capsules_of_all_tunnels_together_have_a_bound(bench: Bench) -> None:
    tunnels = []
    for _ in range(3):
        bench.open()
        tunnels.append(bench.target.tunnel)
    bench.link.is_cut = True
    for _ in range(20):
        for tunnel in tunnels:
            bench.router.receive_from_target(tunnel, bytes(30_000), 30_000, bench.link.now)
    waiting = bench.router._udp._capsule_backlog(tunnels[0].connection)
    assert 200_000 < waiting <= LIMITS.connection_capsule_queue_bytes + 1000
    assert bench.router.snapshot().drops["capsule_queue_full"] > 10


def test_unknown_contexts_in_capsules_are_dropped_and_counted(bench: Bench) -> None:
    stream_id = bench.open()
    bench.send_body(stream_id, capsule(b"?", context_id=2) + capsule(b"!"))
    assert bench.target.sent == [b"!"]
    assert bench.drops() == {"unknown_context": 1}


def test_capsules_of_unknown_types_are_skipped(bench: Bench) -> None:
    stream_id = bench.open()
    bench.send_body(stream_id, encode_capsule(0x1234, bytes(5000)) + capsule(b"!"))
    assert bench.target.sent == [b"!"]
    assert bench.drops() == {}


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (SendResult.WOULD_BLOCK, "target_buffer_full"),
        (SendResult.TOO_LARGE, "too_large_for_target"),
        (SendResult.FAILED, "target_unreachable"),
    ],
)
def test_what_the_kernel_does_not_send_is_counted(result: SendResult, reason: str) -> None:
    bench = Bench("aioquic")
    stream_id = bench.open()
    bench.target.results.append((result, 0))
    bench.send(stream_id, b"lost")
    bench.send(stream_id, b"sent")
    assert bench.target.sent == [b"sent"]
    assert bench.drops() == {reason: 1}
    assert bench.router.snapshot().datagrams_to_target == 1


def test_of_a_batch_that_was_sent_in_part_the_rest_is_counted() -> None:
    bench = Bench("native")
    stream_id = bench.open()
    bench.target.results.append((SendResult.WOULD_BLOCK, 200))
    client = bench.client
    client.engine.send_datagrams(client.connection, stream_id // 4, bytes(500), 100)
    bench.settle()
    assert bench.target.sent == [bytes(100)] * 2
    assert bench.drops() == {"target_buffer_full": 3}
    counters = bench.router.snapshot()
    assert (counters.datagrams_to_target, counters.bytes_to_target) == (2, 200)


def test_an_error_of_an_earlier_datagram_does_not_cost_the_next_one(bench: Bench) -> None:
    stream_id = bench.open()
    bench.target.results.append((SendResult.UNREACHABLE, 0))
    bench.send(stream_id, b"sent at the second try")
    assert bench.target.sent == [b"sent at the second try"]
    assert bench.drops() == {}


def test_a_target_that_stays_unreachable_is_counted(bench: Bench) -> None:
    stream_id = bench.open()
    bench.target.results.extend([(SendResult.UNREACHABLE, 0)] * 2)
    bench.send(stream_id, b"lost")
    assert bench.drops() == {"target_unreachable": 1}
    assert not bench.has_ended(stream_id)


def test_what_the_kernel_lost_at_a_target_socket_is_counted_once(bench: Bench) -> None:
    stream_id = bench.open()
    bench.target.overflow = 7
    bench.tick()
    assert bench.drops() == {"target_overflow": 7}
    bench.tick()
    bench.target.overflow = 9
    bench.send_body(stream_id, b"", end=True)
    assert bench.drops() == {"target_overflow": 9}


def test_an_echo_tunnel_answers_by_itself(bench: Bench) -> None:
    stream_id = bench.open(ECHO)
    assert not bench.shell.targets
    bench.send(stream_id, b"hello", b"", bytes(1000))
    bench.send_body(stream_id, capsule(bytes(9000)))
    assert bench.payloads(stream_id) == [b"hello", b"", bytes(1000)]
    assert bench.capsules(stream_id) == [bytes(9000)]
    counters = bench.router.snapshot()
    assert counters.datagrams_to_target == counters.datagrams_to_client == 4


def test_echo_datagrams_that_came_early_are_answered_too(bench: Bench) -> None:
    stream_id = bench.request()
    bench.send(stream_id, b"early")
    bench.answer(ECHO)
    assert bench.payloads(stream_id) == [b"early"]


def test_tunnels_are_kept_apart(bench: Bench) -> None:
    first, second = bench.open(), bench.open()
    bench.send(first, b"to the first")
    bench.send(second, b"to the second")
    assert [target.sent for target in bench.shell.targets] == [
        [b"to the first"],
        [b"to the second"],
    ]
    bench.from_target(b"from the second")
    assert bench.payloads(first) == []
    assert bench.payloads(second) == [b"from the second"]


# the end of a tunnel


def test_a_client_that_ends_its_side_ends_the_tunnel(bench: Bench) -> None:
    stream_id = bench.open()
    bench.send_body(stream_id, b"", end=True)
    assert bench.has_ended(stream_id)
    assert bench.target.is_closed
    assert bench.router.tunnels == 0


def test_a_capsule_that_arrives_with_the_end_is_delivered(bench: Bench) -> None:
    stream_id = bench.open()
    bench.send_body(stream_id, capsule(b"last words"), end=True)
    assert bench.target.sent == [b"last words"]
    assert bench.router.tunnels == 0


def test_a_client_that_resets_its_stream_ends_the_tunnel(bench: Bench) -> None:
    stream_id = bench.open()
    bench.client.endpoint.abort_stream(bench.client.connection, stream_id, 0x10C)
    bench.settle()
    assert bench.target.is_closed
    assert bench.router.tunnels == 0


@pytest.mark.parametrize("how", ["end", "reset", "close"])
def test_a_request_that_was_given_up_opens_nothing(bench: Bench, how: str) -> None:
    stream_id = bench.request()
    endpoint, connection = bench.client.endpoint, bench.client.connection
    match how:
        case "end":
            bench.send_body(stream_id, b"", end=True)
        case "reset":
            endpoint.abort_stream(connection, stream_id, 0x10C)
        case "close":
            endpoint.close(connection, 0x100, "", bench.link.now)
    bench.settle()
    bench.answer(GRANT)
    assert not bench.shell.targets
    assert bench.router.tunnels == 0
    assert bench.status(stream_id) == (400 if how == "end" else None)


def test_trailers_end_the_tunnel_with_an_error(bench: Bench) -> None:
    stream_id = bench.open()
    bench.client.endpoint.send_headers(bench.client.connection, stream_id, [(b"x", b"y")])
    bench.settle()
    assert bench.aborts(stream_id) == {H3_CONNECT_ERROR}
    assert bench.target.is_closed


def test_a_capsule_with_a_lying_length_ends_the_tunnel_with_an_error(bench: Bench) -> None:
    stream_id, other = bench.open(), bench.open()
    lie = encode_varint(DATAGRAM) + encode_varint(1 << 30)
    bench.send_body(stream_id, lie)
    assert bench.aborts(stream_id) == {H3_DATAGRAM_ERROR}
    assert bench.shell.targets[0].is_closed
    bench.send(other, b"not disturbed")
    assert bench.target.sent == [b"not disturbed"]


def test_a_capsule_that_is_cut_off_by_the_end_is_an_error(bench: Bench) -> None:
    stream_id = bench.open()
    bench.send_body(stream_id, capsule(bytes(100))[:-1], end=True)
    assert bench.router.tunnels == 0
    assert bench.target.is_closed
    assert bench.target.sent == []


def test_a_silent_tunnel_is_closed_after_its_idle_time(bench: Bench) -> None:
    stream_id = bench.open()
    bench.wait(LIMITS.tunnel_idle_timeout_s + 6)
    assert bench.has_ended(stream_id)
    assert bench.target.is_closed
    assert bench.client.closed is None


@pytest.mark.parametrize("direction", ["to_target", "to_client"])
def test_a_datagram_in_either_direction_keeps_a_tunnel_open(bench: Bench, direction: str) -> None:
    stream_id = bench.open()
    for _ in range(3):
        bench.wait(LIMITS.tunnel_idle_timeout_s / 2)
        if direction == "to_target":
            bench.send(stream_id, b"still there")
        else:
            bench.from_target(b"still there")
    assert not bench.has_ended(stream_id)
    assert bench.router.tunnels == 1


def test_a_tunnel_ends_with_its_credential(bench: Bench) -> None:
    stream_id = bench.open(replace(GRANT, expires_at=UNIX_NOW + 30))
    other = bench.open()
    bench.wait(20)
    assert not bench.has_ended(stream_id)
    bench.wait(20)
    assert bench.has_ended(stream_id)
    assert not bench.has_ended(other)


def test_a_lost_connection_closes_its_targets(bench: Bench) -> None:
    bench.open()
    bench.request()
    bench.client.endpoint.close(bench.client.connection, 0x100, "", bench.link.now)
    bench.settle()
    assert bench.target.is_closed
    assert bench.router.tunnels == 0
    bench.answer(GRANT)
    assert len(bench.shell.targets) == 1
    bench.wait(10)  # draining
    assert bench.router.snapshot().connections_open == 0


def test_stopping_tells_every_client_and_closes_every_target(bench: Bench) -> None:
    bench.open()
    bench.router.close(bench.link.now)
    bench.settle()
    assert bench.client.closed is not None
    assert bench.client.closed.reason == "the gateway is stopping"
    assert bench.target.is_closed


def test_a_handshake_that_takes_too_long_is_ended_and_counted(bench: Bench) -> None:
    before = bench.router.snapshot()
    assert (before.handshakes_completed, before.handshakes_failed) == (1, 0)
    newcomer = ClientNode(bench.client.name, bench.link, "h3")
    newcomer.endpoint.connect(SERVER, SERVER_NAME, bench.link.now)
    ((first_packet, _, _),) = newcomer.poll_transmits(bench.link.now)
    bench.link.send(NOBODY, SERVER, first_packet)
    bench.settle()
    assert bench.router.snapshot().connections_open == 2
    bench.wait(15)
    after = bench.router.snapshot()
    assert (after.connections_open, after.handshakes_failed) == (1, 1)


# toppy-ping


def said(bench: Bench, *pieces: bytes) -> int:
    """Say something on a new stream, in pieces; its stream ID."""
    client = bench.client
    stream_id = client.engine.open_stream(client.connection)
    assert stream_id is not None
    for number, piece in enumerate(pieces, 1):
        is_last = number == len(pieces)
        client.engine.send_stream(client.connection, stream_id, piece, end=is_last)
        bench.settle()
    return stream_id


@pytest.mark.parametrize(("is_valid", "answer"), [(True, b"pong"), (False, b"unauthorized")])
def test_a_ping_is_answered_as_the_control_plane_says(
    engine: str, is_valid: bool, answer: bytes
) -> None:
    bench = Bench(engine, alpn=PING_ALPN)
    stream_id = said(bench, b"pi", b"ng tok", b"en")
    (question,) = bench.shell.asked
    assert question == TokenRequest(request=1, authorization="token", source=CLIENT[0])
    assert bench.raw(stream_id) == b""
    bench.answer_token(is_valid=is_valid)
    assert bench.raw(stream_id) == answer
    assert bench.router.snapshot().pings == 1


def test_a_ping_without_a_token_is_asked_about_too(engine: str) -> None:
    bench = Bench(engine, alpn=PING_ALPN)
    said(bench, b"ping")
    assert bench.shell.asked == [TokenRequest(request=1, authorization=None, source=CLIENT[0])]


@pytest.mark.parametrize("word", [b"", b"pong token", b"PING token", b"\xff\xfe", b"token"])
def test_anything_else_than_a_ping_is_unauthorized(engine: str, word: bytes) -> None:
    bench = Bench(engine, alpn=PING_ALPN)
    stream_id = said(bench, word)
    assert bench.raw(stream_id) == b"unauthorized"
    assert not bench.shell.asked


def test_a_ping_that_nobody_can_be_asked_about_is_unauthorized(engine: str) -> None:
    bench = Bench(engine, alpn=PING_ALPN)
    bench.shell.can_ask = False
    assert bench.raw(said(bench, b"ping token")) == b"unauthorized"


def test_a_ping_that_is_too_long_closes_the_connection(engine: str) -> None:
    bench = Bench(engine, alpn=PING_ALPN)
    said(bench, b"ping " + bytes(5000), bytes(5000))
    assert bench.client.closed is not None
    assert bench.client.closed.reason == "the ping is too long"


def test_pings_that_are_given_up_make_room_for_others(engine: str) -> None:
    bench = Bench(engine, alpn=PING_ALPN)
    client = bench.client
    for _ in range(300):  # more than streams may be open at once
        stream_id = client.engine.open_stream(client.connection)
        assert stream_id is not None
        client.engine.send_stream(client.connection, stream_id, b"ping t")
        bench.settle(0.05)
        client.engine.reset_stream(client.connection, stream_id, 0)
        bench.settle(0.05)
    stream_id = said(bench, b"ping token")
    bench.answer_token(is_valid=True)
    assert bench.raw(stream_id) == b"pong"


def test_a_token_answer_for_a_connection_that_is_gone_is_ignored(engine: str) -> None:
    bench = Bench(engine, alpn=PING_ALPN)
    stream_id = said(bench, b"ping token")
    bench.client.endpoint.close(bench.client.connection, 0x100, "", bench.link.now)
    bench.settle()
    bench.tick()
    bench.answer_token(is_valid=True)
    assert bench.raw(stream_id) == b""


def test_wrong_pings_close_the_connection_like_wrong_requests(engine: str) -> None:
    bench = Bench(engine, alpn=PING_ALPN)
    for _ in range(LIMITS.max_failed_auth_per_connection):
        assert bench.client.closed is None
        said(bench, b"ping wrong")
        bench.answer_token(is_valid=False)
        bench.settle()
    assert bench.client.closed is not None
    assert bench.client.closed.reason == "too many failed authentications"
