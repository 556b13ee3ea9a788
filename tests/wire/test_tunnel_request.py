"""Which kind of tunnel a request asks for: three kinds, one strictness."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.errors import ConfigError
from toppy.model.target import Target
from toppy.wire import connect_tcp
from toppy.wire.connect_tcp import INTEROP_TOKEN, TCP_TEMPLATE_PATH, UPGRADE_TOKEN
from toppy.wire.connect_udp import RequestError, expand_template
from toppy.wire.tunnel_request import (
    TunnelKind,
    TunnelRequest,
    continue_headers,
    response_headers,
    validate_tunnel_request,
)

TCP = "/.well-known/masque/tcp/"

Changes = dict[str, str | None]
HeaderList = list[tuple[bytes, bytes]]


def capsule_request(changes: Changes | None = None) -> HeaderList:
    fields: Changes = {
        ":method": "CONNECT",
        ":protocol": "connect-tcp",
        ":scheme": "https",
        ":authority": "gw.example:4433",
        ":path": f"{TCP}db.example/5432/",
        "capsule-protocol": "?1",
        "authorization": "Bearer abc",
    }
    return encode(fields | (changes or {}))


def classic_request(changes: Changes | None = None) -> HeaderList:
    fields: Changes = {":method": "CONNECT", ":authority": "db.example:5432"}
    return encode(fields | (changes or {}))


def encode(fields: Changes) -> HeaderList:
    return [(k.encode(), v.encode("latin-1")) for k, v in fields.items() if v is not None]


def refusal(headers: HeaderList) -> int:
    with pytest.raises(RequestError) as refused:
        validate_tunnel_request(headers)
    return refused.value.status


def test_connect_tcp_is_a_tunnel_of_capsules() -> None:
    assert validate_tunnel_request(capsule_request()) == TunnelRequest(
        TunnelKind.TCP,
        Target("db.example", 5432, "tcp"),
        authority="gw.example:4433",
        authorization="Bearer abc",
    )


@pytest.mark.parametrize("token", [UPGRADE_TOKEN, INTEROP_TOKEN], ids=lambda token: token.decode())
def test_the_token_and_that_of_interoperability_tests_mean_the_same(token: bytes) -> None:
    request = validate_tunnel_request(capsule_request({":protocol": token.decode()}))
    assert request.kind is TunnelKind.TCP


def test_connect_without_protocol_is_a_tunnel_of_bare_payload() -> None:
    assert validate_tunnel_request(classic_request()) == TunnelRequest(
        TunnelKind.TCP_CLASSIC, Target("db.example", 5432, "tcp")
    )


def test_connect_udp_is_what_it_was() -> None:
    changes: Changes = {":protocol": "connect-udp", ":path": "/.well-known/masque/udp/::1/53/"}
    request = validate_tunnel_request(capsule_request(changes))
    assert request == TunnelRequest(
        TunnelKind.UDP, Target("::1", 53), False, "gw.example:4433", "Bearer abc"
    )


def test_a_token_is_not_shown() -> None:
    assert "abc" not in repr(validate_tunnel_request(capsule_request()))


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({":method": "GET"}, 404),
        ({":method": None}, 404),
        ({":protocol": "connect-ip"}, 501),
        ({":protocol": "websocket"}, 501),
        ({":protocol": "connect-tcp-11"}, 501),
        ({":protocol": "Connect-TCP"}, 501),
        ({":protocol": ""}, 501),
        ({":scheme": "http"}, 400),
        ({":scheme": None}, 400),
        ({":authority": ""}, 400),
        ({":authority": "user@gw.example"}, 400),
        ({":path": None}, 400),
        ({":path": "gw/1"}, 400),
        ({":path": "/.well-known/masque/udp/db.example/5432/"}, 404),
        ({":path": "/.well-known/masque/tcp-forward/db.example/5432/"}, 404),
        ({":path": TCP}, 400),
        ({":path": f"{TCP}db.example/"}, 400),
        ({":path": f"{TCP}db.example/5432/more/"}, 400),
        ({":path": f"{TCP}db.example/0/"}, 400),
        ({":path": f"{TCP}db.example/65536/"}, 400),
        ({":path": f"{TCP}%2564b.example/5432/"}, 400),
        ({":path": f"{TCP}fe80%3A%3A1%25eth0/5432/"}, 400),
        ({":path": f"{TCP}user@db.example/5432/"}, 400),
        ({":path": f"{TCP}0x7f.1/5432/"}, 400),
        ({"content-length": "5"}, 400),
        ({"content-type": "text/plain"}, 400),
        ({"transfer-encoding": "chunked"}, 400),
        ({"expect": "200-maybe"}, 417),
        ({"early-data": "1"}, 425),
        ({"authorization": "\xff"}, 400),
    ],
)
def test_a_request_for_capsules_that_is_not_clean_is_refused(changes: Changes, status: int) -> None:
    assert refusal(capsule_request(changes)) == status


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({":scheme": "https"}, 400),
        ({":path": "/"}, 400),
        ({":authority": None}, 400),
        ({":authority": ""}, 400),
        ({":authority": "db.example"}, 400),
        ({":authority": "db.example:"}, 400),
        ({":authority": "db.example:0"}, 400),
        ({":authority": "db.example:65536"}, 400),
        ({":authority": "db.example:05432"}, 400),
        ({":authority": "db.example:5432/"}, 400),
        ({":authority": "db.example:5432 "}, 400),
        ({":authority": "db.example:5432\n"}, 400),
        ({":authority": "user@db.example:5432"}, 400),
        ({":authority": "user:pw@db.example:5432"}, 400),
        ({":authority": "https://db.example:5432"}, 400),
        ({":authority": "%64b.example:5432"}, 400),
        ({":authority": "2001:db8::1:5432"}, 400),
        ({":authority": "[2001:db8::1]"}, 400),
        ({":authority": "[2001:db8::1%25eth0]:5432"}, 400),
        ({":authority": "[192.0.2.1]:5432"}, 400),
        ({":authority": "[db.example]:5432"}, 400),
        ({":authority": "[v1.x]:5432"}, 400),
        ({":authority": "127.1:5432"}, 400),
        ({":authority": "2130706433:5432"}, 400),
        ({":authority": "b\xfccher.example:5432"}, 400),
        ({"content-length": "0"}, 400),
        ({"transfer-encoding": "chunked"}, 400),
        ({"expect": "100-continue, 100-continue"}, 417),
        ({"early-data": "1"}, 425),
        ({"authorization": "Bearer a", "proxy-authorization": "Bearer a"}, 400),
        ({"proxy-authorization": "\xff"}, 400),
    ],
)
def test_a_classic_request_that_is_not_clean_is_refused(changes: Changes, status: int) -> None:
    assert refusal(classic_request(changes)) == status


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        ("192.0.2.1:443", "192.0.2.1"),
        ("[2001:DB8::0:1]:443", "2001:db8::1"),
        ("Example.COM.:443", "example.com"),
    ],
)
def test_a_classic_target_is_read_in_one_way(authority: str, host: str) -> None:
    request = validate_tunnel_request(classic_request({":authority": authority}))
    assert request.target == Target(host, 443, "tcp")


@pytest.mark.parametrize("name", ["authorization", "proxy-authorization"])
def test_classic_credentials_come_in_either_field(name: str) -> None:
    request = validate_tunnel_request(classic_request({name: "Bearer abc"}))
    assert request.authorization == "Bearer abc"


def test_the_proxys_credentials_are_not_those_of_a_tunnel_of_capsules() -> None:
    changes: Changes = {"authorization": None, "proxy-authorization": "Bearer abc"}
    assert validate_tunnel_request(capsule_request(changes)).authorization is None


@pytest.mark.parametrize("name", ["authorization", "proxy-authorization", "expect", "early-data"])
def test_a_field_that_decides_is_not_there_twice(name: str) -> None:
    twice = [(name.encode(), b"100-continue")] * 2
    assert refusal([*classic_request(), *twice]) == 400


@pytest.mark.parametrize("request_of", [capsule_request, classic_request])
@pytest.mark.parametrize("written", ["100-continue", "100-Continue"])
def test_an_expectation_of_100_is_met(request_of: object, written: str) -> None:
    assert callable(request_of)
    assert validate_tunnel_request(request_of({"expect": written})).expects_continue
    assert continue_headers() == [(b":status", b"100")]


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=60)), max_size=8))
def test_any_fields_are_a_request_or_refused(headers: HeaderList) -> None:
    try:
        validate_tunnel_request([(b":method", b"CONNECT"), *headers])
    except RequestError as error:
        assert error.status in (400, 404, 417, 425, 501)


@settings(deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=0x7F), max_size=60))
def test_any_authority_is_a_target_or_refused_and_a_target_stays_itself(text: str) -> None:
    try:
        target = connect_tcp.parse_authority(text)
    except RequestError:
        return
    assert connect_tcp.parse_authority(str(target)) == target


targets = st.builds(
    Target,
    st.one_of(
        st.ip_addresses().map(str),
        st.from_regex(r"[a-z][a-z0-9-]{0,10}[a-z](\.[a-z]{2,5}){1,3}", fullmatch=True),
    ),
    st.integers(1, 65535),
    st.just("tcp"),
)


@settings(deadline=None)
@given(targets, st.booleans())
def test_what_our_client_asks_for_is_what_our_gateway_reads(
    target: Target, expects_continue: bool
) -> None:
    authority, path = expand_template(f"https://gw.example:4433{TCP_TEMPLATE_PATH}", target)
    headers = connect_tcp.request_headers(
        authority, path, "secret", expects_continue=expects_continue
    )
    assert validate_tunnel_request(headers) == TunnelRequest(
        TunnelKind.TCP,
        target,
        authority="gw.example:4433",
        authorization="Bearer secret",
        expects_continue=expects_continue,
    )


@settings(deadline=None)
@given(targets)
def test_what_our_client_asks_for_in_the_classic_way_is_what_our_gateway_reads(
    target: Target,
) -> None:
    headers = connect_tcp.classic_request_headers(target, "secret")
    request = validate_tunnel_request(headers)
    assert (request.kind, request.target) == (TunnelKind.TCP_CLASSIC, target)
    assert request.authorization == "Bearer secret"


@pytest.mark.parametrize("token", ["a\r\nx: y", "\xfc", "", " "])
def test_a_token_cannot_break_out_of_its_field(token: str) -> None:
    target = Target("db.example", 5432, "tcp")
    with pytest.raises(ConfigError, match="the token must be"):
        connect_tcp.classic_request_headers(target, token)
    with pytest.raises(ConfigError, match="the token must be"):
        connect_tcp.request_headers("gw", "/", token)


@pytest.mark.parametrize("kind", [TunnelKind.UDP, TunnelKind.TCP])
def test_a_success_says_that_capsules_follow(kind: TunnelKind) -> None:
    headers = response_headers(kind, 200, proxy_status='gw; next-hop="192.0.2.1"')
    assert headers == [
        (b":status", b"200"),
        (b"capsule-protocol", b"?1"),
        (b"proxy-status", b'gw; next-hop="192.0.2.1"'),
    ]


def test_a_classic_success_has_no_capsules() -> None:
    assert response_headers(TunnelKind.TCP_CLASSIC, 200) == [(b":status", b"200")]


@pytest.mark.parametrize("kind", [TunnelKind.UDP, TunnelKind.TCP])
def test_missing_credentials_are_the_gateways(kind: TunnelKind) -> None:
    headers = dict(response_headers(kind, 401, needs_credentials=True))
    assert headers[b":status"] == b"401"
    assert headers[b"www-authenticate"].startswith(b"Bearer")


def test_missing_credentials_are_the_proxys_in_classic_connect() -> None:
    headers = dict(response_headers(TunnelKind.TCP_CLASSIC, 401, needs_credentials=True))
    assert headers[b":status"] == b"407"
    assert headers[b"proxy-authenticate"].startswith(b"Bearer")


def test_an_answer_cannot_be_split() -> None:
    with pytest.raises(ConfigError):
        response_headers(TunnelKind.TCP, 502, proxy_status="gw\r\nset-cookie: x")
