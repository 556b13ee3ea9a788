"""A context ID and a payload; no payload that no UDP datagram could carry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.errors import DatagramError
from toppy.wire.http_datagram import (
    MAX_UDP_PAYLOAD_BYTES,
    UDP_CONTEXT_ID,
    encode_udp_payload,
    parse_http_datagram,
)
from toppy.wire.varint import MAX_VARINT, encode_varint


@given(st.binary(max_size=100), st.sampled_from([bytes, bytearray, memoryview]))
def test_a_payload_comes_back_with_context_zero(payload: bytes, kind: type) -> None:
    context_id, parsed = parse_http_datagram(encode_udp_payload(kind(payload)))
    assert (context_id, bytes(parsed)) == (UDP_CONTEXT_ID, payload)


@given(st.integers(0, MAX_VARINT), st.binary(max_size=100))
def test_any_context_id_is_read(context_id: int, payload: bytes) -> None:
    found = parse_http_datagram(encode_varint(context_id) + payload)
    assert (found[0], bytes(found[1])) == (context_id, payload)


@pytest.mark.parametrize("zero", [b"\x00", b"\x40\x00", b"\x80\x00\x00\x00", b"\xc0" + bytes(7)])
def test_a_longer_zero_is_zero(zero: bytes) -> None:
    context_id, payload = parse_http_datagram(zero + b"x")
    assert (context_id, bytes(payload)) == (UDP_CONTEXT_ID, b"x")


@pytest.mark.parametrize("data", [b"", b"\x40", b"\x80\x00", b"\xc0" + bytes(6)])
def test_a_context_id_that_is_cut_off_is_an_error(data: bytes) -> None:
    with pytest.raises(DatagramError):
        parse_http_datagram(data)


def test_the_largest_payload_passes_and_one_byte_more_is_an_error() -> None:
    largest = bytes(MAX_UDP_PAYLOAD_BYTES)
    assert len(parse_http_datagram(encode_udp_payload(largest))[1]) == MAX_UDP_PAYLOAD_BYTES
    with pytest.raises(DatagramError, match="65528 bytes"):
        parse_http_datagram(encode_udp_payload(largest + b"x"))


def test_other_contexts_have_no_such_bound() -> None:
    assert parse_http_datagram(b"\x02" + bytes(70_000))[0] == 2


@given(st.binary(max_size=20))
def test_any_bytes_are_a_datagram_or_the_documented_error(data: bytes) -> None:
    try:
        context_id, payload = parse_http_datagram(data)
    except DatagramError:
        return
    assert data.endswith(payload)
    assert 0 <= context_id <= MAX_VARINT
