"""Proxy-Status survives any text, and explains itself."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.errors import LocalError
from toppy.wire.proxy_status import (
    ProxyStatus,
    encode_proxy_status,
    explain,
    failure_of_errno,
    parse_proxy_status,
    recommended_status,
)

printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=100)


@given(printable, printable, printable)
def test_what_was_encoded_is_read_back(details: str, rule: str, hop: str) -> None:
    value = encode_proxy_status(
        "toppy-gw", error="dns_error", details=details, rule=rule, next_hop=hop
    )
    assert parse_proxy_status(value) == ProxyStatus("toppy-gw", "dns_error", details, rule, hop)


@given(st.text(), st.text())
def test_no_text_breaks_out_of_the_field(details: str, rule: str) -> None:
    value = encode_proxy_status("gw", error="dns_error", details=details, rule=rule)
    assert value.isascii()
    assert value.isprintable()


def test_the_last_proxy_of_a_chain_is_read() -> None:
    value = 'far; error=connection_refused; details="a, b; c", near; error=dns_timeout'
    assert parse_proxy_status(value) == ProxyStatus("near", "dns_timeout")


@given(st.text(max_size=200))
def test_any_text_is_a_status_or_none(value: str) -> None:
    found = parse_proxy_status(value)
    assert found is None or isinstance(found.proxy, str)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 502, 503, 504, 418])
def test_every_refusal_has_a_sentence(status: int) -> None:
    assert str(status) in explain(status, None)


def test_an_explanation_names_reason_rule_and_advice() -> None:
    said = explain(
        403, ProxyStatus("gw", "http_request_denied", "target x:1 is not allowed", "no games")
    )
    assert "target x:1 is not allowed" in said
    assert "'no games'" in said
    assert "operator" in said


def test_an_entry_with_an_error_says_more_than_a_nearer_one_without() -> None:
    value = 'far; error=dns_error; details="no such name", near'
    assert parse_proxy_status(value) == ProxyStatus("far", "dns_error", "no such name")
    assert parse_proxy_status("far, near") == ProxyStatus("near")


@pytest.mark.parametrize("value", ["", " ", ",", ";", "; error=x", '"', '"unfinished', ", ,"])
def test_nonsense_is_none(value: str) -> None:
    assert parse_proxy_status(value) is None


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ('"a b";error=dns_error', ProxyStatus("a b", "dns_error")),
        ("gw;error=x;received-status=502;flag", ProxyStatus("gw", "x")),
        (r'gw; details="a \"b\" \\ c"', ProxyStatus("gw", "", r'a "b" \ c')),
        (
            "gw; next-hop=target.example:53; error=x",
            ProxyStatus("gw", "x", "", "", "target.example:53"),
        ),
        ('gw; details="; error=fake"', ProxyStatus("gw", "", "; error=fake")),
        ("gw; error=a; error=b", ProxyStatus("gw", "b")),
    ],
)
def test_fields_of_other_proxies_are_read(value: str, status: ProxyStatus) -> None:
    assert parse_proxy_status(value) == status


@given(st.text(max_size=60), st.text(max_size=60))
def test_what_is_read_is_fit_for_a_terminal(details: str, rule: str) -> None:
    found = parse_proxy_status(f'gw; error=x; toppy-rule="{rule}"; details="{details}"')
    assert explain(403, found).isprintable()


def test_no_sender_makes_a_text_long_or_parsing_slow() -> None:
    found = parse_proxy_status('gw; details="' + "x" * 5000 + '"')
    assert found is not None
    assert len(found.details) == 400
    assert parse_proxy_status('gw; details="' + "\\" * 1_000_000) == ProxyStatus("gw")


def test_without_an_error_the_proxy_stands_alone() -> None:
    assert encode_proxy_status("gw") == "gw"


@pytest.mark.parametrize("error", ["a b", "a;b", "a\r\nb", '"a"', "1a"])
def test_an_error_type_that_is_no_token_is_our_mistake(error: str) -> None:
    with pytest.raises(LocalError):
        encode_proxy_status("gw", error=error)


@pytest.mark.parametrize("proxy", ["", "my gateway", "gw;error=x", "gw\r\n", "bücher", "1gw"])
def test_a_proxy_name_that_is_no_token_becomes_a_string(proxy: str) -> None:
    value = encode_proxy_status(proxy, error="dns_error")
    assert value.startswith('"')
    assert value.isascii()
    found = parse_proxy_status(value)
    assert found is not None
    assert found.error == "dns_error"


ERROR_TYPES = [
    "dns_timeout",
    "dns_error",
    "destination_not_found",
    "destination_unavailable",
    "destination_ip_prohibited",
    "destination_ip_unroutable",
    "connection_refused",
    "connection_timeout",
    "proxy_internal_error",
    "http_request_denied",
    "http_request_error",
    "proxy_configuration_error",
    "connection_limit_reached",
]


@pytest.mark.parametrize("error", ERROR_TYPES)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 502, 503, 504])
def test_every_error_type_is_explained_with_what_to_do(status: int, error: str) -> None:
    said = explain(status, ProxyStatus("gw", error))
    assert said.startswith(f"{status}: {error.replace('_', ' ')}; ")
    assert any(word in said for word in ("check", "try again", "ask", "get a new"))


def test_a_tunnel_that_was_ended_on_purpose_is_forbidden_and_the_reason_is_said_once() -> None:
    said = ProxyStatus("gw", "connection_terminated", "an operator of the gateway ended the tunnel")
    assert explain(recommended_status(said.error), said) == (
        "403: an operator of the gateway ended the tunnel; if that goes on, ask the gateway's "
        "operator"
    )


def test_the_error_type_gives_better_advice_than_the_status() -> None:
    assert "resolve" in explain(502, ProxyStatus("gw", "dns_error"))
    assert "names it" in explain(403, ProxyStatus("gw", "destination_ip_prohibited"))
    assert "token" in explain(401, ProxyStatus("gw", "http_request_denied"))
    assert explain(403, ProxyStatus("gw", rule="r")).startswith("403: (rule 'r'); ")


@pytest.mark.parametrize(
    ("number", "failure"),
    [
        (errno.ECONNREFUSED, (502, "connection_refused")),
        (errno.ETIMEDOUT, (504, "connection_timeout")),
        (errno.ENETUNREACH, (502, "destination_ip_unroutable")),
        (errno.EHOSTUNREACH, (502, "destination_ip_unroutable")),
        (errno.EMFILE, (503, "connection_limit_reached")),
        (errno.EINVAL, (502, "destination_unavailable")),
        (None, (502, "destination_unavailable")),
    ],
)
def test_a_connect_that_fails_has_its_reason(number: int | None, failure: tuple[int, str]) -> None:
    assert failure_of_errno(number) == failure


@pytest.mark.parametrize("status", [425, 501, 508])
def test_a_status_of_tcp_tunnels_says_what_to_do(status: int) -> None:
    said = explain(status, None)
    assert any(word in said for word in ("try again", "ask", "older version"))


@pytest.mark.parametrize(
    "details", ["it refused; does anything listen there?", "is it up?", "it is off; start it"]
)
def test_details_that_say_what_to_do_are_left_alone(details: str) -> None:
    status = ProxyStatus("gw", "connection_refused", details)
    assert explain(502, status) == f"502: {details}"


def test_what_the_details_say_is_not_said_again() -> None:
    assert explain(401, ProxyStatus("gw", "http_request_denied", "the token is wrong")) == (
        "401: the token is wrong; get a new token (auth_token, or `toppy login`)"
    )
    assert explain(403, ProxyStatus("gw", "http_request_denied", "not allowed", "r")) == (
        "403: not allowed (rule 'r'); ask the gateway's operator for a rule"
    )
