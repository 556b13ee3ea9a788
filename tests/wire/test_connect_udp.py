"""Requests for tunnels: strict targets, strict fields, templates of other proxies."""

from __future__ import annotations

import ipaddress
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.errors import ConfigError
from toppy.model.target import Target
from toppy.wire.connect_udp import (
    DEFAULT_TEMPLATE_PATH,
    FORWARD_TEMPLATE_PATH,
    RequestError,
    expand_template,
    host_of,
    parse_host,
    parse_request_path,
    request_headers,
    response_headers,
    validate_template,
)
from toppy.wire.tunnel_request import TunnelKind, validate_tunnel_request

UDP = "/.well-known/masque/udp/"


def parse(host: str, port: str = "53") -> Target:
    return parse_request_path(f"{UDP}{host}/{port}/").target


def good_headers(**changes: str | None) -> list[tuple[bytes, bytes]]:
    fields: dict[str, str | None] = {
        ":method": "CONNECT",
        ":protocol": "connect-udp",
        ":scheme": "https",
        ":authority": "gw.example:4433",
        ":path": f"{UDP}192.0.2.1/53/",
        "authorization": "Bearer abc",
    }
    fields |= {name.replace("_", ":", 1): value for name, value in changes.items()}
    return [(k.encode(), v.encode()) for k, v in fields.items() if v is not None]


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001%3adb8%3A%3A1", "2001:db8::1"),
        ("2001:DB8::0:1", "2001:db8::1"),
        ("%3A%3Affff%3A192.0.2.1", "::ffff:192.0.2.1"),
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("_dns.example", "_dns.example"),
        ("ex%61mple.com", "example.com"),
        ("localhost", "localhost"),
        ("1e100.net", "1e100.net"),
    ],
)
def test_a_host_is_read_in_one_way(written: str, means: str) -> None:
    assert parse(written).host == str(
        ipaddress.ip_address(means) if means[0] in ":0123456789" and "net" not in means else means
    )


@pytest.mark.parametrize(
    "host",
    [
        "",
        ".",
        "127.1",
        "0x7f.0.0.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
        "192.0.2.256",
        "192.0.2",
        "1.2.3.4.5",
        "fe80%3A%3A1%25eth0",
        "%5B2001%3Adb8%3A%3A1%5D",
        "2001%3Adb8",
        "a..b",
        "-a.example",
        "a-.example",
        "b%C3%BCcher.example",
        "a%00.example",
        "a%0d%0a.example",
        "a b.example",
        "%2561.example",
        "%zz.example",
        "100%",
        "a" * 64 + ".example",
        ".".join(["a" * 60] * 5),
        "example.0x10",
        "user@host",
    ],
)
def test_a_host_that_could_be_read_in_two_ways_is_refused(host: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(host)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "port", ["0", "00053", "053", "65536", "-1", "+53", "5 3", "", "0x35", "53a", "1" * 9, "٥"]
)
def test_a_port_out_of_range_or_not_digits_is_refused(port: str) -> None:
    with pytest.raises(RequestError):
        parse("192.0.2.1", port)


@pytest.mark.parametrize("path", ["/", "", "/.well-known/masque/", "/.well-known/masque/tcp/a/1/"])
def test_another_path_is_not_found(path: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_request_path(path)
    assert refused.value.status == 404


@pytest.mark.parametrize("path", [UDP, UDP + "a", UDP + "a/1/2/", UDP + "a//"])
def test_a_path_that_names_no_target_is_malformed(path: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_request_path(path)
    assert refused.value.status == 400


def test_both_templates_are_served_and_told_apart() -> None:
    assert not parse_request_path(f"{UDP}a.example/1/").is_forward
    assert parse_request_path("/.well-known/masque/udp-forward/a.example/1/").is_forward
    assert parse_request_path("/.well-known/masque/udp-forward/a.example/1").is_forward


def test_a_good_request_is_read() -> None:
    request = validate_tunnel_request(good_headers())
    assert request.kind is TunnelKind.UDP
    assert request.target == Target("192.0.2.1", 53)
    assert not request.is_forward
    assert request.authority == "gw.example:4433"
    assert request.authorization == "Bearer abc"
    assert "abc" not in repr(request)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"_method": "GET"}, 404),
        ({"_protocol": "connect-ip"}, 501),
        ({"_protocol": None}, 400),
        ({"_scheme": "http"}, 400),
        ({"_authority": ""}, 400),
        ({"_authority": None}, 400),
        ({"_path": None}, 400),
        ({"_path": ""}, 400),
        ({"_path": "gw/1"}, 400),
        ({"_path": "/"}, 404),
        ({"_authority": "user@gw.example"}, 400),
        ({"_authority": "gw.example/x"}, 400),
        ({"content-type": "text/plain"}, 400),
        ({"transfer-encoding": "chunked"}, 400),
        ({"content-length": "0"}, 400),
    ],
)
def test_a_request_that_is_not_connect_udp_is_refused(
    changes: dict[str, str | None], status: int
) -> None:
    with pytest.raises(RequestError) as refused:
        validate_tunnel_request(good_headers(**changes))
    assert refused.value.status == status


def test_without_a_token_no_authorization_is_sent_or_read() -> None:
    headers = request_headers("gw.example", f"{UDP}192.0.2.1/53/", None)
    assert b"authorization" not in dict(headers)
    assert dict(headers)[b"capsule-protocol"] == b"?1"
    assert validate_tunnel_request(headers).authorization is None


def test_two_authorizations_are_refused() -> None:
    with pytest.raises(RequestError):
        validate_tunnel_request([*good_headers(), (b"authorization", b"Bearer other")])


def test_a_field_that_is_not_ascii_is_refused() -> None:
    with pytest.raises(RequestError):
        validate_tunnel_request([*good_headers(authorization=None), (b"authorization", b"\xff")])


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=60)), max_size=8))
def test_any_fields_are_a_request_or_refused(headers: list[tuple[bytes, bytes]]) -> None:
    try:
        validate_tunnel_request(headers)
    except RequestError as error:
        assert error.status in (400, 404, 417, 425, 501)


@given(st.text(max_size=60))
def test_any_path_is_a_target_or_refused(tail: str) -> None:
    try:
        target = parse_request_path(UDP + tail).target
    except RequestError:
        return
    assert 1 <= target.port <= 65535
    assert target.host == target.host.lower()
    assert target.host.isascii()


targets = st.builds(
    Target,
    st.one_of(
        st.ip_addresses().map(str),
        st.from_regex(r"[a-z][a-z0-9-]{0,10}[a-z](\.[a-z]{2,5}){1,3}", fullmatch=True),
    ),
    st.integers(1, 65535),
)


@given(targets, st.sampled_from([DEFAULT_TEMPLATE_PATH, FORWARD_TEMPLATE_PATH]))
def test_what_our_client_asks_for_is_what_our_gateway_reads(target: Target, path: str) -> None:
    authority, expanded = expand_template(f"https://gw.example:4433{path}", target)
    request = validate_tunnel_request(request_headers(authority, expanded, "secret"))
    assert request.kind is TunnelKind.UDP
    assert request.target == target
    assert request.is_forward == (path == FORWARD_TEMPLATE_PATH)
    assert request.authority == "gw.example:4433"
    assert request.authorization == "Bearer secret"


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("https://p.example/masque?h={target_host}&p={target_port}", "/masque?h=%3A%3A1&p=53"),
        (
            "https://p.example/masque{?target_host,target_port}",
            "/masque?target_host=%3A%3A1&target_port=53",
        ),
        ("https://p.example/{target_host},{target_port}", "/%3A%3A1,53"),
        ("https://p.example/m/{target_host}/{target_port}/", "/m/%3A%3A1/53/"),
        ("https://p.example/{target_host,target_port}", "/%3A%3A1,53"),
        (
            "https://p.example/m?a=1{&target_host,target_port}",
            "/m?a=1&target_host=%3A%3A1&target_port=53",
        ),
        (
            "https://p.example/{tenant}{?target_host,ecn,target_port}{&x.y}",
            "/?target_host=%3A%3A1&target_port=53",
        ),
    ],
)
def test_templates_of_other_proxies_expand(template: str, path: str) -> None:
    validate_template(template)
    assert expand_template(template, Target("::1", 53)) == ("p.example", path)


@pytest.mark.parametrize(
    "template",
    [
        "http://p.example/{target_host}/{target_port}/",
        "https://p.example/{target_host}/",
        "https://{target_host}/{target_port}/",
        "https://p.example",
        "https://p.example/{target_host}/{target_port}/{+path}",
        "https://p.example/{/target_host}/{;target_port}/",
        "https://p.example/{target_host*}/{target_port}/",
        "https://p.example/{target_host:3}/{target_port}/",
        "https://p.example/{target_host}/{target_port}/#x",
        "https://p.example/{#target_host}/{target_port}/",
        "https://p.example/{target_host}/{target_port}/}",
        "https://p.example/{target_host}/{target_port}/{",
        "https://p.example/{target_host}/{target_port}/{}",
        "https://p.example/{target_host} /{target_port}/",
        "https://p.example/{target_host}/{target_port}/\n",
        "https://user@p.example/{target_host}/{target_port}/",
        "https://p .example/{target_host}/{target_port}/",
        "https:///{target_host}/{target_port}/",
        "https://p.example?h={target_host}&p={target_port}",
        "https://p.example/{target_host}/{target_host}/{target_port}/",
        "https://bücher.example/{target_host}/{target_port}/",
    ],
)
def test_a_template_without_both_variables_or_with_others_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="gateway_template"):
        validate_template(template)


def test_a_success_says_that_capsules_follow() -> None:
    assert response_headers(200) == [(b":status", b"200"), (b"capsule-protocol", b"?1")]


def test_a_refusal_says_why_and_asks_for_a_token() -> None:
    headers = dict(response_headers(401, proxy_status="gw; error=x", www_authenticate=True))
    assert headers[b"proxy-status"] == b"gw; error=x"
    assert headers[b"www-authenticate"].startswith(b"Bearer")
    assert b"capsule-protocol" not in headers


@pytest.mark.parametrize("token", ["a\r\nx: y", "a\nb", "ü", "a\x00", "", " "])
def test_a_token_cannot_break_out_of_its_field(token: str) -> None:
    with pytest.raises(ConfigError, match="the token must be") as refused:
        request_headers("gw", quote("/"), token)
    assert not token.strip() or token not in str(refused.value)


@pytest.mark.parametrize(("authority", "path"), [("gw\r\nx", "/"), ("", "/"), ("gw", "/\na")])
def test_a_request_cannot_be_split(authority: str, path: str) -> None:
    with pytest.raises(ConfigError):
        request_headers(authority, path, None)


def test_an_answer_cannot_be_split() -> None:
    with pytest.raises(ConfigError):
        response_headers(403, proxy_status="gw\r\nset-cookie: x")


@pytest.mark.parametrize("host", ["\u212aelvin.example", "ｅxample", "a\u3002b", "١٢٧.0.0.1"])
def test_a_letter_that_only_looks_like_ascii_makes_no_name(host: str) -> None:
    with pytest.raises(RequestError, match="ASCII"):
        parse_host(host)


@given(st.text(max_size=80))
def test_any_text_is_a_host_or_refused_and_a_host_stays_itself(text: str) -> None:
    try:
        host = parse_host(text)
    except RequestError as error:
        assert error.status == 400
        return
    assert parse_host(host) == host


@given(st.text(alphabet="https:/p{}?&,#_.target_hosport% \n", max_size=60))
def test_any_template_is_accepted_or_refused(tail: str) -> None:
    template = "https://p.example/{target_host}/{target_port}/" + tail
    try:
        validate_template(template)
    except ConfigError:
        return
    authority, path = expand_template(template, Target("::1", 53))
    assert authority == "p.example"
    assert path.startswith("/%3A%3A1/53/")
    assert not set(path) & set("{}# \n")


@pytest.mark.parametrize(
    ("authority", "host"),
    [("GW.example:4433", "gw.example"), ("[::1]:4433", "::1"), ("gw", "gw"), ("[::1]", "::1")],
)
def test_the_host_of_an_authority(authority: str, host: str) -> None:
    assert host_of(authority) == host
