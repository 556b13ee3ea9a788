"""PROXY protocol headers, read by a parser of the tests' own."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.wire.proxy_protocol import SIGNATURE, Address, encode_proxy_header

ADDRESSES = st.tuples(st.ip_addresses().map(str), st.integers(0, 65535))


def parse(header: bytes) -> tuple[Address, Address] | None:
    """(source, destination) of a whole header; None for LOCAL."""
    signature, version, family, size = struct.unpack_from("!12sBBH", header)
    assert signature == SIGNATURE
    assert len(header) == 16 + size
    if version == 0x20:
        assert (family, size) == (0, 0)
        return None
    assert version == 0x21
    width = {0x11: 4, 0x21: 16}[family]
    assert size == 2 * width + 4
    source, destination = header[16 : 16 + width], header[16 + width : 16 + 2 * width]
    ports = struct.unpack_from("!HH", header, 16 + 2 * width)
    return (
        (str(ipaddress.ip_address(source)), ports[0]),
        (str(ipaddress.ip_address(destination)), ports[1]),
    )


def test_the_bytes_are_those_of_the_specification() -> None:
    header = encode_proxy_header(("192.0.2.1", 50000), ("198.51.100.7", 443))
    assert header.hex() == "0d0a0d0a000d0a515549540a2111000cc0000201c6336407c35001bb"


@pytest.mark.parametrize(
    ("client", "target", "written"),
    [
        ("2001:db8::1", "2001:db8::2", ("2001:db8::1", "2001:db8::2")),
        ("192.0.2.1", "2001:db8::2", ("::ffff:192.0.2.1", "2001:db8::2")),
        ("2001:db8::1", "192.0.2.1", ("2001:db8::1", "::ffff:192.0.2.1")),
        ("::ffff:192.0.2.1", "192.0.2.2", ("192.0.2.1", "192.0.2.2")),
        ("fe80::1%eth0", "fe80::2", ("fe80::1", "fe80::2")),
    ],
)
def test_both_addresses_have_one_family(client: str, target: str, written: tuple[str, str]) -> None:
    found = parse(encode_proxy_header((client, 1), (target, 2)))
    assert found is not None
    assert tuple(map(ipaddress.ip_address, (found[0][0], found[1][0]))) == tuple(
        map(ipaddress.ip_address, written)
    )


def test_without_a_client_it_says_local() -> None:
    assert parse(encode_proxy_header(None, ("192.0.2.1", 80))) is None


@given(ADDRESSES, ADDRESSES)
def test_what_is_written_can_be_read(client: Address, target: Address) -> None:
    found = parse(encode_proxy_header(client, target))
    assert found is not None
    for (host, port), (expected, expected_port) in zip(found, (client, target), strict=True):
        assert port == expected_port
        expected_address = ipaddress.ip_address(expected)
        mapped = getattr(expected_address, "ipv4_mapped", None)
        forms = {expected_address.packed, getattr(mapped, "packed", b"")}
        if expected_address.version == 4:
            forms.add(b"\0" * 10 + b"\xff\xff" + expected_address.packed)
        assert ipaddress.ip_address(host).packed in forms
