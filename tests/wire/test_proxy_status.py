"""Proxy-Status survives any text, and explains itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.wire.proxy_status import ProxyStatus, encode_proxy_status, explain, parse_proxy_status

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
