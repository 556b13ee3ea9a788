"""What is special, in every form that leads there."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.policy.address_guard import (
    LOOPBACK,
    METADATA,
    OWN,
    embedded_address,
    embedded_network,
    special,
    unmapped,
    unmapped_network,
)

IPv4 = ipaddress.IPv4Address
IPv6 = ipaddress.IPv6Address

v4 = st.ip_addresses(v=4)
v6 = st.ip_addresses(v=6)


def category(text: str, own: frozenset[str] = frozenset()) -> str | None:
    found = special(ipaddress.ip_address(text), own)
    return found.category if found is not None else None


def last_32_bits(prefix: str) -> int:
    return int(IPv6(prefix))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("169.254.169.254", METADATA),
        ("::ffff:169.254.169.254", METADATA),
        ("64:ff9b::a9fe:a9fe", METADATA),
        ("2002:a9fe:a9fe::1", METADATA),
        ("fd00:ec2::254", METADATA),
        ("fe80::a9fe:a9fe", METADATA),
        ("169.254.170.23", METADATA),
        ("169.254.1.1", "link-local"),
        ("127.0.0.53", LOOPBACK),
        ("::1", LOOPBACK),
        ("::ffff:127.0.0.1", LOOPBACK),
        ("::", "unspecified"),
        ("0.0.0.0", "unspecified"),
        ("100.64.0.1", "carrier-grade NAT"),
        ("::8.8.8.8", "IPv4-compatible"),
        ("64:ff9b:1::808:808", "local NAT64"),
        ("64:ff9b:1::a00:1", "private"),
        ("255.255.255.255", "broadcast"),
        ("fd00::1", "unique-local"),
        ("fe80::5efe:8.8.8.8", "link-local"),
        ("2606:4700::5efe:10.0.0.1", "private"),
        ("2001:0:0:0:0:0:f5ff:fffe", "private"),
        ("200::1", "reserved"),
        ("9.255.255.255", None),
        ("11.0.0.0", None),
        ("172.15.255.255", None),
        ("172.32.0.0", None),
        ("100.63.255.255", None),
        ("100.128.0.0", None),
        ("223.255.255.255", None),
        ("2606:4700::1111", None),
        ("2606:4700::5efe:8.8.8.8", None),
        ("64:ff9b::808:808", None),
    ],
)
def test_an_address_has_its_category(address: str, expected: str | None) -> None:
    assert category(address) == expected


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "2600::5efe:808:808"],
)
@pytest.mark.parametrize("own", ["8.8.8.8", "::ffff:8.8.8.8"])
def test_the_gateways_own_address_is_known_in_every_form(address: str, own: str) -> None:
    assert category(address, frozenset({own})) == OWN


def test_an_own_private_address_is_the_gateway_before_it_is_private() -> None:
    found = special(IPv4("10.0.0.5"), frozenset({"10.0.0.5"}))
    assert found is not None
    assert found.category == OWN
    assert str(found.network) == "10.0.0.5/32"
    assert category("10.0.0.6", frozenset({"10.0.0.5"})) == "private"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_loopback_stays_loopback_though_it_is_the_gateways_own(address: str) -> None:
    assert category(address, frozenset({address})) == LOOPBACK


@given(v4)
def test_forms_that_only_carry_are_judged_like_what_they_carry(address: IPv4) -> None:
    bits = int(address)
    forms = [
        last_32_bits("::ffff:0:0") | bits,
        last_32_bits("::ffff:0:0:0") | bits,
        last_32_bits("64:ff9b::") | bits,
        last_32_bits("2002::") | bits << 80 | 1,
        last_32_bits("2001::") | (bits ^ 0xFFFF_FFFF),
    ]
    for form in map(IPv6, forms):
        assert embedded_address(form) == address
        assert special(form) == special(address)


@given(v4, st.sampled_from(["::", "64:ff9b:1::"]))
def test_forms_of_the_hosts_choosing_are_special_whatever_they_carry(
    address: IPv4, prefix: str
) -> None:
    assert special(IPv6(last_32_bits(prefix) | int(address))) is not None


@given(v4, v6, st.sampled_from([0x00005EFE, 0x02005EFE]))
def test_an_isatap_address_is_special_when_either_half_is(
    address: IPv4, prefix: IPv6, identifier: int
) -> None:
    form = IPv6((int(prefix) >> 64 << 64) | identifier << 32 | int(address))
    plain = IPv6((int(prefix) >> 64 << 64) | 0x1234_5678_9ABC_DEF0)
    if embedded_address(plain) is None and (special(address) or special(plain)):
        assert special(form) is not None


@given(st.integers(1 << 32, (1 << 80) - 1))
def test_a_local_nat64_address_of_unknown_layout_is_meant_only_by_itself(tail: int) -> None:
    address = IPv6(last_32_bits("64:ff9b:1::") | tail)
    found = special(address)
    assert found is not None
    assert found.network == ipaddress.ip_network(address)


@given(st.ip_addresses())
def test_what_python_does_not_call_global_is_special(address: IPv4 | IPv6) -> None:
    if embedded_address(address) is None and (
        not address.is_global or address.is_multicast or address.is_reserved
    ):
        assert special(address) is not None


@given(st.ip_addresses())
def test_the_special_range_has_the_address_or_what_it_embeds(address: IPv4 | IPv6) -> None:
    found = special(address)
    if found is not None:
        inner = embedded_address(address)
        assert address in found.network or (inner is not None and inner in found.network)


@given(v4, st.integers(0, 32))
def test_a_network_of_an_embedding_form_embeds_a_network(address: IPv4, length: int) -> None:
    inner = ipaddress.IPv4Network((address, length), strict=False)
    forms = [
        ipaddress.IPv6Network((last_32_bits("::ffff:0:0") | int(address), 96 + length), False),
        ipaddress.IPv6Network((last_32_bits("64:ff9b::") | int(address), 96 + length), False),
        ipaddress.IPv6Network((last_32_bits("2002::") | int(address) << 80, 16 + length), False),
        ipaddress.IPv6Network((last_32_bits("2001::") | ~int(address) % 2**32, 96 + length), False),
    ]
    assert [embedded_network(form) for form in forms] == [inner] * len(forms)
    assert unmapped_network(forms[0]) == inner
    assert unmapped_network(forms[1]) == forms[1]


@pytest.mark.parametrize("network", ["10.0.0.0/8", "::/0", "2000::/3", "2002::/15", "64:ff9b::/64"])
def test_a_network_wider_than_the_form_embeds_none(network: str) -> None:
    assert embedded_network(ipaddress.ip_network(network)) is None
    assert unmapped_network(ipaddress.ip_network(network)) == ipaddress.ip_network(network)


@given(v4)
def test_a_mapped_address_is_the_ipv4_address(address: IPv4) -> None:
    assert unmapped(address) == address
    assert unmapped(IPv6(last_32_bits("::ffff:0:0") | int(address))) == address


@given(v6)
def test_no_other_address_is_taken_for_ipv4(address: IPv6) -> None:
    if address.ipv4_mapped is None:
        assert unmapped(address) == address
