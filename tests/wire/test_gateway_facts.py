"""What a gateway says about itself: written, read, and never trusted."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.wire.gateway_facts import (
    GatewayFacts,
    date_field,
    diagnostic_fields,
    parse_gateway_facts,
)

NOW = 1_700_000_000.0


@given(st.ip_addresses(), st.integers(1, 65535))
def test_what_is_written_is_read(
    host: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    address = (str(host), port)
    fields = [date_field(NOW), *diagnostic_fields("1.2.3", "native", address)]
    expected = GatewayFacts(NOW, "1.2.3", "native", address)
    if host.version == 6 and host.scope_id is not None:
        expected = GatewayFacts(NOW, "1.2.3", "native", None)
    assert parse_gateway_facts(fields) == expected


def test_the_date_is_that_of_http() -> None:
    assert date_field(NOW) == (b"date", b"Tue, 14 Nov 2023 22:13:20 GMT")


def test_without_an_address_there_is_no_field_for_it() -> None:
    assert [name for name, _ in diagnostic_fields("1.2.3", "native", None)] == [b"server"]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"date", b"yesterday")],
        [(b"date", b"Tue, 99 Nov 2023 22:13:20 GMT")],
        [(b"server", b"nginx/1.2")],
        [(b"server", b"toppy-gw/1.2.3\x1b[31m (native)")],
        [(b"toppy-client-address", b'"192.0.2.1:0"')],
        [(b"toppy-client-address", b'"192.0.2.1:65536"')],
        [(b"toppy-client-address", b"192.0.2.1:53")],
    ],
)
def test_what_cannot_be_read_is_left_out(headers: list[tuple[bytes, bytes]]) -> None:
    assert parse_gateway_facts(headers) == GatewayFacts()


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"date", b"server", b"toppy-client-address"]), st.binary(max_size=80)
        )
    )
)
def test_any_fields_can_be_read(headers: list[tuple[bytes, bytes]]) -> None:
    facts = parse_gateway_facts(headers)
    assert facts.version.isprintable()
    assert facts.engine.isprintable()
