"""Addresses that no tunnel may reach unless a rule names them (RFC 9298 section 7).

The table is ours, not ``ipaddress.is_private``: that one changed between Python versions.
Sources: the IANA special-purpose registries (RFC 6890), RFC 6598, RFC 6052, RFC 8215, RFC 3056,
RFC 4380; metadata services by their providers' documentation.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

METADATA: Final = "metadata service"
LOOPBACK: Final = "loopback"
OWN: Final = "the gateway itself"

# first match wins: the narrow ones stand before the wide ones
_TABLE: Final[tuple[tuple[str, Network], ...]] = tuple(
    (category, ipaddress.ip_network(network))
    for category, network in (
        (METADATA, "169.254.169.254/32"),
        (METADATA, "169.254.170.2/32"),
        (METADATA, "169.254.170.23/32"),
        (METADATA, "169.254.0.23/32"),
        (METADATA, "169.254.42.42/32"),
        (METADATA, "100.100.100.200/32"),
        (METADATA, "192.0.0.192/32"),
        (METADATA, "168.63.129.16/32"),
        (METADATA, "fd00:ec2::/32"),
        (METADATA, "fd00:c1::a9fe:a9fe/128"),
        (METADATA, "fd00:42::42/128"),
        (METADATA, "fd20:ce::254/128"),
        (METADATA, "fe80::a9fe:a9fe/128"),
        ("unspecified", "0.0.0.0/8"),
        (LOOPBACK, "127.0.0.0/8"),
        ("private", "10.0.0.0/8"),
        ("private", "172.16.0.0/12"),
        ("private", "192.168.0.0/16"),
        ("link-local", "169.254.0.0/16"),
        ("carrier-grade NAT", "100.64.0.0/10"),
        ("reserved", "192.0.0.0/24"),
        ("documentation", "192.0.2.0/24"),
        ("documentation", "198.51.100.0/24"),
        ("documentation", "203.0.113.0/24"),
        ("reserved", "192.88.99.0/24"),
        ("benchmarking", "198.18.0.0/15"),
        ("broadcast", "255.255.255.255/32"),
        ("multicast", "224.0.0.0/4"),
        ("reserved", "240.0.0.0/4"),
        ("unspecified", "::/128"),
        (LOOPBACK, "::1/128"),
        ("IPv4-compatible", "::/96"),
        ("local NAT64", "64:ff9b:1::/48"),
        ("discard-only", "100::/64"),
        ("benchmarking", "2001:2::/48"),
        ("documentation", "2001:db8::/32"),
        ("documentation", "3fff::/20"),
        ("reserved", "2001::/23"),
        ("segment routing", "5f00::/16"),
        ("unique-local", "fc00::/7"),
        ("link-local", "fe80::/10"),
        ("site-local", "fec0::/10"),
        ("multicast", "ff00::/8"),
        # only 2000::/3 is given out as global unicast (RFC 4291 section 2.4)
        ("reserved", "::/3"),
        ("reserved", "4000::/2"),
        ("reserved", "8000::/1"),
    )
)

_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")
_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_LOCAL: Final = ipaddress.IPv6Network("64:ff9b:1::/48")
_NAT64_LOCAL_PLAIN: Final = ipaddress.IPv6Network("64:ff9b:1::/96")
_TRANSLATED: Final = ipaddress.IPv6Network("::ffff:0:0:0/96")
_6TO4: Final = ipaddress.IPv6Network("2002::/16")
_TEREDO: Final = ipaddress.IPv6Network("2001::/32")
_ISATAP_IDS: Final = (0x00005EFE, 0x02005EFE)

_LAST_32_BITS: Final = (_MAPPED, _COMPATIBLE, _NAT64, _NAT64_LOCAL_PLAIN, _TRANSLATED)
# leading to a public IPv4 address by these is leading to the public
_AS_GOOD_AS_INNER: Final = (_MAPPED, _NAT64, _TRANSLATED, _6TO4, _TEREDO)


@dataclass(frozen=True, slots=True)
class Special:
    """Why an address is special, and the range that a rule must lie in to name it."""

    category: str
    network: Network


def embedded_address(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to, for every form that embeds one."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    bits = int(address)
    if address in _TEREDO:
        return ipaddress.IPv4Address(~bits & 0xFFFF_FFFF)
    if address in _6TO4:
        return ipaddress.IPv4Address(bits >> 80 & 0xFFFF_FFFF)
    if bits > 1 and any(address in network for network in _LAST_32_BITS):
        return ipaddress.IPv4Address(bits & 0xFFFF_FFFF)
    if _is_isatap(address) and address not in _NAT64_LOCAL:
        return ipaddress.IPv4Address(bits & 0xFFFF_FFFF)
    return None


def destination(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to ``address`` go to, or through: ``embedded_address`` where
    the prefix says so. An ISATAP identifier says nothing outside the one network that uses it:
    anybody may give his host one that embeds an address of somebody else.
    """
    return None if _is_isatap(address) else embedded_address(address)


def embedded_network(network: Network) -> ipaddress.IPv4Network | None:
    """The IPv4 network that an IPv6 network embeds, where it lies within one of the forms."""
    if isinstance(network, ipaddress.IPv4Network):
        return None
    position = 16 if network.network_address in _6TO4 else 96
    inner = embedded_address(network.network_address)
    if inner is None or network.prefixlen < position:
        return None
    return ipaddress.IPv4Network((inner, min(network.prefixlen - position, 32)), strict=False)


def unmapped(address: Address) -> Address:
    """An IPv4-mapped address as the IPv4 address that it is to the kernel; others as they are."""
    inner = embedded_address(address)
    return inner if inner is not None and address in _MAPPED else address


def unmapped_network(network: Network) -> Network:
    """Like ``unmapped``, for a network."""
    inner = embedded_network(network)
    return inner if inner is not None and network.network_address in _MAPPED else network


def special(address: Address, own_addresses: frozenset[str] = frozenset()) -> Special | None:
    """Why ``address`` may be reached only by a rule that names it; None for a public one.

    ``own_addresses`` are the gateway's; an embedded IPv4 address is judged instead of the form
    that carries it. Loopback stays loopback, though it is the gateway's own as well.
    """
    own = frozenset(_innermost(ipaddress.ip_address(text)) for text in own_addresses)
    return _special(address, own)


def _innermost(address: Address) -> Address:
    return embedded_address(address) or address


def _special(address: Address, own: frozenset[Address]) -> Special | None:
    inner = embedded_address(address)
    is_isatap = _is_isatap(address)
    if inner is not None and not is_isatap:
        found = _special(inner, own)
        if found is not None or any(address in network for network in _AS_GOOD_AS_INNER):
            return found
    found = _tabled(address)
    if address in own and (found is None or found.category not in (LOOPBACK, METADATA)):
        return Special(OWN, ipaddress.ip_network(address))
    if found is None and inner is not None and is_isatap:
        return _special(inner, own)
    return found


def _tabled(address: Address) -> Special | None:
    if address in _NAT64_LOCAL and address not in _NAT64_LOCAL_PLAIN:
        # where the IPv4 address stands depends on a prefix length that only the translator knows
        # (RFC 6052 section 2.2): nothing but a rule for this one address can mean it
        return Special("local NAT64", ipaddress.ip_network(address))
    for category, network in _TABLE:
        if address.version == network.version and address in network:
            return Special(category, network)
    return None


def _is_isatap(address: Address) -> bool:
    """RFC 5214 section 6.1, by the interface identifier; forms with a prefix of their own are no
    ISATAP.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return False
    has_own_prefix = any(address in network for network in (*_LAST_32_BITS, _6TO4, _TEREDO))
    return int(address) >> 32 & 0xFFFF_FFFF in _ISATAP_IDS and not has_own_prefix
