"""Programs that ask a local proxy for a target: what they say, and what they are answered."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.errors import ConfigError, LocalError
from toppy.model.target import Target
from toppy.protocol.local_proxy import (
    Action,
    AssociateUdp,
    Close,
    Credentials,
    LocalProxyHandshake,
    Open,
    OpenFailure,
    ProxyKind,
    Reply,
    ServePac,
    failure_of,
)
from toppy.wire.proxy_status import ProxyStatus, parse_proxy_status

TARGET = Target("db.example", 5432, "tcp")
REQUEST = b"\x05\x01\x00\x03\x0adb.example\x15\x38"
ASSOCIATE = b"\x05\x03\x00\x01" + bytes(6)
SOCKS5 = b"\x05\x01\x00" + REQUEST
SOCKS4A = b"\x04\x01\x15\x38\x00\x00\x00\x01me\x00db.example\x00"
CONNECT = b"CONNECT db.example:5432 HTTP/1.1\r\nHost: db.example:5432\r\n\r\n"
FORWARD = b"GET http://db.example:5432/x HTTP/1.1\r\nHost: db.example:5432\r\n\r\n"
FORWARDED = (
    b"GET /x HTTP/1.1\r\nHost: db.example:5432\r\nVia: 1.1 toppy\r\nConnection: close\r\n\r\n"
)
PAC = b"GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:1080\r\n\r\n"
LOGIN = b"\x01\x02me\x06secret"
BASIC = b"Proxy-Authorization: Basic " + base64.b64encode(b"me:secret") + b"\r\n\r\n"
CREDENTIALS = Credentials("me", "secret")
WAYS = {
    ProxyKind.SOCKS5: SOCKS5,
    ProxyKind.SOCKS4: SOCKS4A,
    ProxyKind.HTTP_CONNECT: CONNECT,
    ProxyKind.HTTP_FORWARD: FORWARD,
}


def asked(kind: ProxyKind) -> LocalProxyHandshake:
    """A handshake that has asked the shell to open a tunnel."""
    handshake = LocalProxyHandshake()
    assert isinstance(handshake.receive(WAYS[kind])[-1], Open)
    return handshake


def written(actions: list[Action]) -> bytes:
    return b"".join(action.data for action in actions if isinstance(action, Reply))


def closes(actions: list[Action]) -> str:
    """Why the handshake ends."""
    assert isinstance(actions[-1], Close)
    return actions[-1].reason


class TestAskingForATunnel:
    def test_socks5(self) -> None:
        handshake = LocalProxyHandshake()
        assert handshake.receive(b"\x05\x02\x00\x02") == [Reply(b"\x05\x00")]
        assert handshake.receive(REQUEST) == [Open(TARGET, ProxyKind.SOCKS5, b"")]
        assert handshake.opened() == b"\x05\x00\x00\x01" + bytes(6)

    def test_socks5_tells_the_address_that_was_bound(self) -> None:
        answer = asked(ProxyKind.SOCKS5).opened(("192.0.2.1", 5432))
        assert answer == b"\x05\x00\x00\x01\xc0\x00\x02\x01\x15\x38"

    def test_socks4a(self) -> None:
        handshake = LocalProxyHandshake()
        assert handshake.receive(SOCKS4A) == [Open(TARGET, ProxyKind.SOCKS4, b"")]
        assert handshake.opened() == b"\x00\x5a" + bytes(6)

    def test_http_connect(self) -> None:
        handshake = LocalProxyHandshake()
        assert handshake.receive(CONNECT) == [Open(TARGET, ProxyKind.HTTP_CONNECT, b"")]
        assert handshake.opened() == b"HTTP/1.1 200 Connection established\r\n\r\n"

    def test_an_absolute_uri_is_passed_on(self) -> None:
        handshake = LocalProxyHandshake()
        [action] = handshake.receive(FORWARD)
        assert isinstance(action, Open)
        assert (action.target, action.kind) == (TARGET, ProxyKind.HTTP_FORWARD)
        assert action.remaining == FORWARDED
        assert action.body is not None
        assert action.body.is_complete
        assert handshake.opened() == b""

    def test_a_body_passes_and_the_next_request_does_not(self) -> None:
        post = FORWARD.replace(b"GET", b"POST").replace(
            b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\n"
        )
        [action] = LocalProxyHandshake().receive(post + b"1234")
        assert isinstance(action, Open)
        assert action.remaining.endswith(b"\r\n\r\n1234")
        assert action.body is not None
        assert action.body.receive(b"56789" + FORWARD) == b"56789"

    @pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.value)
    def test_what_comes_early_is_for_the_target(self, kind: ProxyKind) -> None:
        [*_, action] = LocalProxyHandshake().receive(WAYS[kind] + b"\x16early")
        assert isinstance(action, Open)
        assert action.remaining == (FORWARDED if kind is ProxyKind.HTTP_FORWARD else b"\x16early")

    @pytest.mark.parametrize(
        "said",
        [*WAYS.values(), PAC, SOCKS5[:3] + ASSOCIATE],
        ids=[*(kind.value for kind in WAYS), "pac", "udp associate"],
    )
    @settings(deadline=None)
    @given(data=st.data())
    def test_any_split_leads_to_the_same(self, said: bytes, data: st.DataObject) -> None:
        whole = LocalProxyHandshake().receive(said)
        handshake, actions, rest = LocalProxyHandshake(), [], said
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            actions += handshake.receive(rest[:size])
            rest = rest[size:]
        assert written(actions) == written(whole)
        assert len(actions) == len(whole)
        if isinstance(actions[-1], Open) and isinstance(whole[-1], Open):
            assert actions[-1].remaining == whole[-1].remaining
        else:
            assert actions[-1] == whole[-1]

    @pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.value)
    def test_after_that_the_program_is_not_heard_here(self, kind: ProxyKind) -> None:
        handshake = asked(kind)
        assert not handshake.is_waiting
        with pytest.raises(LocalError):
            handshake.receive(b"x")
        with pytest.raises(LocalError):
            handshake.receive_end()
        handshake.opened()
        with pytest.raises(LocalError):
            handshake.failed(OpenFailure.REFUSED)

    def test_nothing_is_decided_before_something_was_asked(self) -> None:
        handshake = LocalProxyHandshake()
        with pytest.raises(LocalError):
            handshake.opened()
        with pytest.raises(LocalError):
            handshake.failed(OpenFailure.GENERAL)


class TestUdp:
    def test_datagrams_are_relayed_at_an_address_of_the_shells(self) -> None:
        handshake = LocalProxyHandshake()
        actions = handshake.receive(SOCKS5[:3] + ASSOCIATE)
        assert actions[-1] == AssociateUdp("0.0.0.0", 0)
        assert handshake.associated("127.0.0.1", 5432) == (
            b"\x05\x00\x00\x01\x7f\x00\x00\x01\x15\x38"
        )

    def test_it_may_be_refused(self) -> None:
        handshake = LocalProxyHandshake()
        handshake.receive(SOCKS5[:3] + ASSOCIATE)
        assert handshake.failed(OpenFailure.BUSY)[:2] == b"\x05\x01"

    def test_where_it_is_not_offered_the_command_is_not_supported(self) -> None:
        handshake = LocalProxyHandshake(offers_udp=False)
        actions = handshake.receive(SOCKS5[:3] + ASSOCIATE)
        assert written(actions)[2:4] == b"\x05\x07"
        assert "not offered" in closes(actions)


class TestCredentials:
    def test_socks5_takes_the_right_ones(self) -> None:
        handshake = LocalProxyHandshake(credentials=CREDENTIALS)
        assert handshake.receive(b"\x05\x02\x00\x02") == [Reply(b"\x05\x02")]
        assert handshake.receive(LOGIN) == [Reply(b"\x01\x00")]
        assert handshake.receive(REQUEST) == [Open(TARGET, ProxyKind.SOCKS5, b"")]

    @pytest.mark.parametrize(
        "login", [b"\x01\x02me\x05wrong", b"\x01\x02ME\x06secret", b"\x01\x00\x00"]
    )
    def test_socks5_refuses_others(self, login: bytes) -> None:
        handshake = LocalProxyHandshake(credentials=CREDENTIALS)
        actions = handshake.receive(b"\x05\x01\x02" + login + REQUEST)
        assert written(actions) == b"\x05\x02\x01\x01"
        assert closes(actions) == "a wrong user or password"

    def test_socks5_without_a_login_is_refused(self) -> None:
        actions = LocalProxyHandshake(credentials=CREDENTIALS).receive(SOCKS5)
        assert written(actions) == b"\x05\xff"
        assert "offers no user and password" in closes(actions)

    def test_a_program_that_insists_on_a_login_that_nobody_set_up_is_told_so(self) -> None:
        actions = LocalProxyHandshake().receive(b"\x05\x01\x02")
        assert written(actions) == b"\x05\xff"
        assert "not set up" in closes(actions)

    def test_socks4_has_none_and_is_refused(self) -> None:
        actions = LocalProxyHandshake(credentials=CREDENTIALS).receive(SOCKS4A)
        assert written(actions) == b"\x00\x5b" + bytes(6)
        assert "no password" in closes(actions)

    @pytest.mark.parametrize("said", [CONNECT, FORWARD], ids=["connect", "forward"])
    def test_http_takes_the_right_ones(self, said: bytes) -> None:
        handshake = LocalProxyHandshake(credentials=CREDENTIALS)
        [action] = handshake.receive(said[:-2] + BASIC)
        assert isinstance(action, Open)
        assert b"Basic" not in action.remaining

    @pytest.mark.parametrize(
        "said",
        [CONNECT, FORWARD, b"GET /else HTTP/1.0\r\n\r\n"],
        ids=["connect", "forward", "elsewhere"],
    )
    @pytest.mark.parametrize("login", [b"", b"me:wrong", b"you:secret"])
    def test_http_asks_for_others(self, said: bytes, login: bytes) -> None:
        if login:
            said = said[:-2] + BASIC.replace(
                base64.b64encode(b"me:secret"), base64.b64encode(login)
            )
        actions = LocalProxyHandshake(credentials=CREDENTIALS).receive(said)
        assert written(actions).startswith(b"HTTP/1.1 407 ")
        assert b"\r\nProxy-Authenticate: Basic realm=" in written(actions)
        assert "user and a password" in closes(actions)

    def test_they_are_not_shown(self) -> None:
        assert repr(CREDENTIALS) == "Credentials(…)"

    @pytest.mark.parametrize(
        ("user", "password"),
        [("", "x"), ("x", ""), ("a:b", "x"), ("x" * 256, "x"), ("x", "ü" * 128), ("x", "a\n")],
    )
    def test_what_a_program_could_not_send_is_refused(self, user: str, password: str) -> None:
        with pytest.raises(ConfigError, match="the proxy's") as refused:
            Credentials(user, password)
        assert not password or len(password) == 1 or password not in str(refused.value)


class TestThePacFile:
    def test_it_is_served_to_everybody(self) -> None:
        handshake = LocalProxyHandshake(credentials=CREDENTIALS)
        assert handshake.receive(PAC) == [ServePac()]
        answer = handshake.serve_pac("function …")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Content-Type: application/x-ns-proxy-autoconfig\r\n" in answer
        assert answer.endswith("\r\n\r\nfunction …".encode())

    def test_head_has_no_body(self) -> None:
        handshake = LocalProxyHandshake()
        assert handshake.receive(PAC.replace(b"GET", b"HEAD")) == [ServePac()]
        assert handshake.serve_pac("function …").endswith(b"\r\n\r\n")

    def test_where_there_is_none_it_is_not_found(self) -> None:
        actions = LocalProxyHandshake(offers_pac=False).receive(PAC)
        assert written(actions).startswith(b"HTTP/1.1 404 ")

    def test_it_is_only_read(self) -> None:
        actions = LocalProxyHandshake().receive(PAC.replace(b"GET", b"PUT"))
        assert written(actions).startswith(b"HTTP/1.1 405 ")


class TestBadInput:
    @pytest.mark.parametrize(
        ("said", "reason"),
        [
            (b"\x16\x03\x01\x02\x00", "TLS was spoken"),
            (b"\x00", "neither SOCKS nor HTTP"),
            (b"get / HTTP/1.1\r\n", "neither SOCKS nor HTTP"),
            (b"\xff" * 1000, "neither SOCKS nor HTTP"),
            (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "no request line"),
        ],
    )
    def test_another_protocol_ends_at_once(self, said: bytes, reason: str) -> None:
        handshake = LocalProxyHandshake()
        assert reason in closes(handshake.receive(said))
        with pytest.raises(LocalError):
            handshake.receive(b"more")

    @pytest.mark.parametrize(
        ("said", "status"),
        [
            (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
            (b"CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
            (b"CONNECT a:1 HTTP/1.1\nHost: a\n\n", b"400"),
            (b"GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\nx: " + bytes(9000), b"431"),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
        ],
    )
    def test_http_is_told_the_status(self, said: bytes, status: bytes) -> None:
        actions = LocalProxyHandshake().receive(said)
        assert written(actions).startswith(b"HTTP/1.1 " + status + b" ")
        assert closes(actions)

    @pytest.mark.parametrize(
        ("request_", "reply"),
        [
            (b"\x05\x02\x00\x01", 7),
            (b"\x05\x01\x00\x09", 8),
            (b"\x05\x01\x00\x03\x01.\x00\x01", 1),
            (b"\x04", 1),
        ],
    )
    def test_socks5_is_told_the_reply(self, request_: bytes, reply: int) -> None:
        actions = LocalProxyHandshake().receive(SOCKS5[:3] + request_)
        assert written(actions)[2:4] == bytes((5, reply))
        assert closes(actions)

    def test_socks4_is_told_no(self) -> None:
        actions = LocalProxyHandshake().receive(b"\x04\x02\x15\x38")
        assert written(actions) == b"\x00\x5b" + bytes(6)

    def test_a_greeting_without_methods_ends_without_an_answer(self) -> None:
        actions = LocalProxyHandshake().receive(b"\x05\x00")
        assert written(actions) == b""
        assert closes(actions)

    @pytest.mark.parametrize("said", [b"", b"\x05", SOCKS4A[:-1], CONNECT[:-1]])
    def test_a_program_that_leaves_is_let_go(self, said: bytes) -> None:
        handshake = LocalProxyHandshake()
        assert handshake.receive(said) == []
        assert "left" in closes(handshake.receive_end())
        assert not handshake.is_waiting

    def test_no_reason_shows_what_was_sent(self) -> None:
        secret = b"CONNECT hunter2 HTTP/1.1\r\nHost: hunter2\r\n\r\n"
        assert "hunter2" not in closes(LocalProxyHandshake().receive(secret))

    @settings(deadline=None)
    @given(
        st.sampled_from(
            [b"", b"\x05\x01\x00", b"\x05\x01\x02", b"\x04\x01", CONNECT[:40], b"GET "]
        ),
        st.lists(st.binary(min_size=1, max_size=300), max_size=40),
        st.booleans(),
    )
    def test_any_bytes_end_in_an_action_or_wait_for_more(
        self, begin: bytes, parts: list[bytes], has_credentials: bool
    ) -> None:
        handshake = LocalProxyHandshake(credentials=CREDENTIALS if has_credentials else None)
        heard = 0
        for part in (begin, *parts):
            if not handshake.is_waiting:
                break
            actions = handshake.receive(part)
            heard += len(part)
            is_last = bool(actions) and not isinstance(actions[-1], Reply)
            assert is_last is not handshake.is_waiting
        assert not handshake.is_waiting or heard < 8192


class TestFailures:
    @pytest.mark.parametrize(
        ("failure", "reply", "status"),
        [
            (OpenFailure.GENERAL, 1, b"502"),
            (OpenFailure.NOT_ALLOWED, 2, b"403"),
            (OpenFailure.NETWORK_UNREACHABLE, 3, b"502"),
            (OpenFailure.HOST_UNREACHABLE, 4, b"502"),
            (OpenFailure.NAME_UNKNOWN, 4, b"502"),
            (OpenFailure.REFUSED, 5, b"502"),
            (OpenFailure.TIMED_OUT, 6, b"504"),
            (OpenFailure.BUSY, 1, b"503"),
            (OpenFailure.LOOP, 2, b"508"),
        ],
        ids=lambda value: value.name if isinstance(value, OpenFailure) else str(value),
    )
    def test_each_protocol_says_what_it_can(
        self, failure: OpenFailure, reply: int, status: bytes
    ) -> None:
        assert asked(ProxyKind.SOCKS5).failed(failure)[1] == reply
        assert asked(ProxyKind.SOCKS4).failed(failure)[1] == 0x5B
        for kind in (ProxyKind.HTTP_CONNECT, ProxyKind.HTTP_FORWARD):
            answer = asked(kind).failed(failure, "because of a rule")
            assert answer.startswith(b"HTTP/1.1 " + status + b" ")
            assert answer.endswith(b"\r\n\r\nbecause of a rule\n")
            assert f"Proxy-Status: toppy; error={failure.error}; details=".encode() in answer

    def test_every_failure_is_in_the_table(self) -> None:
        assert len({failure.value for failure in OpenFailure}) == len(OpenFailure) == 9

    def test_what_the_gateway_said_is_passed_on(self) -> None:
        answer = asked(ProxyKind.HTTP_CONNECT).failed(
            OpenFailure.REFUSED, proxy_status="gw; error=connection_refused"
        )
        assert b"\r\nProxy-Status: gw; error=connection_refused\r\n" in answer

    @pytest.mark.parametrize("said", ["gw\r\nSet-Cookie: x", "gw\0", "gä"])
    def test_an_answer_cannot_be_split_by_what_the_gateway_said(self, said: str) -> None:
        answer = asked(ProxyKind.HTTP_CONNECT).failed(OpenFailure.REFUSED, proxy_status=said)
        assert b"\r\nProxy-Status: toppy; error=connection_refused\r\n" in answer

    def test_an_answer_cannot_be_split_by_its_explanation(self) -> None:
        answer = asked(ProxyKind.HTTP_CONNECT).failed(OpenFailure.REFUSED, "a\r\nSet-Cookie: x")
        assert b"\nSet-Cookie" not in answer.partition(b"\r\n\r\n")[0]

    @pytest.mark.parametrize(
        ("status", "said", "failure"),
        [
            (403, "gw; error=http_request_denied", OpenFailure.NOT_ALLOWED),
            (403, "", OpenFailure.NOT_ALLOWED),
            (502, "gw; error=destination_ip_prohibited", OpenFailure.NOT_ALLOWED),
            (502, "gw; error=connection_refused", OpenFailure.REFUSED),
            (504, "gw; error=connection_timeout", OpenFailure.TIMED_OUT),
            (504, "gw; error=dns_timeout", OpenFailure.TIMED_OUT),
            (504, "", OpenFailure.TIMED_OUT),
            (502, "gw; error=dns_error", OpenFailure.NAME_UNKNOWN),
            (502, "gw; error=destination_ip_unroutable", OpenFailure.NETWORK_UNREACHABLE),
            (503, "gw; error=destination_unavailable", OpenFailure.HOST_UNREACHABLE),
            (429, "gw; error=connection_limit_reached", OpenFailure.BUSY),
            (503, "", OpenFailure.BUSY),
            (508, "gw; error=proxy_loop_detected", OpenFailure.LOOP),
            (401, "gw; error=connection_refused", OpenFailure.GENERAL),
            (404, "", OpenFailure.GENERAL),
            (502, "gw; error=else", OpenFailure.GENERAL),
        ],
    )
    def test_a_gateways_refusal_is_understood(
        self, status: int, said: str, failure: OpenFailure
    ) -> None:
        parsed: ProxyStatus | None = parse_proxy_status(said) if said else None
        assert failure_of(status, parsed) is failure
