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

# first match wins: the narrow ones stand before the wide ones
_TABLE: Final[tuple[tuple[str, Network], ...]] = tuple(
    (category, ipaddress.ip_network(network))
    for category, network in (
        (METADATA, "169.254.169.254/32"),
        (METADATA, "169.254.170.2/32"),
        (METADATA, "100.100.100.200/32"),
        (METADATA, "192.0.0.192/32"),
        (METADATA, "168.63.129.16/32"),
        (METADATA, "fd00:ec2::/32"),
        (METADATA, "fd20:ce::254/128"),
        ("unspecified", "0.0.0.0/8"),
        ("loopback", "127.0.0.0/8"),
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
        ("loopback", "::1/128"),
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
    )
)

_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")
_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_LOCAL: Final = ipaddress.IPv6Network("64:ff9b:1::/48")
_TRANSLATED: Final = ipaddress.IPv6Network("::ffff:0:0:0/96")
_6TO4: Final = ipaddress.IPv6Network("2002::/16")
_TEREDO: Final = ipaddress.IPv6Network("2001::/32")
_ISATAP_IDS: Final = (0x00005EFE, 0x02005EFE)


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
    is_low = any(address in n for n in (_MAPPED, _COMPATIBLE, _NAT64, _NAT64_LOCAL, _TRANSLATED))
    if is_low and bits > 1:
        return ipaddress.IPv4Address(bits & 0xFFFF_FFFF)
    if bits >> 32 & 0xFFFF_FFFF in _ISATAP_IDS:
        return ipaddress.IPv4Address(bits & 0xFFFF_FFFF)
    return None


def special(address: Address, own_addresses: frozenset[str] = frozenset()) -> Special | None:
    """Why ``address`` may be reached only by a rule that names it; None for a public one.

    ``own_addresses`` are the gateway's, in canonical text. An embedded IPv4 address is judged
    instead of the form that carries it.
    """
    inner = embedded_address(address)
    if inner is not None:
        found = special(inner, own_addresses)
        if found is not None:
            return found
        # NAT64's local prefix and IPv4-compatible addresses lead to places of the host's choosing
        if address in _NAT64_LOCAL or address in _COMPATIBLE:
            return Special("translated", _NAT64_LOCAL if address in _NAT64_LOCAL else _COMPATIBLE)
        return None
    for category, network in _TABLE:
        if address.version == network.version and address in network:
            return Special(category, network)
    if str(address) in own_addresses:
        return Special("the gateway itself", ipaddress.ip_network(address))
    return None
