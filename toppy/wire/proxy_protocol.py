"""The PROXY protocol, version 2: tells a TCP target for whom a connection was made.

The format is haproxy's (proxy-protocol.txt, section 2.2). Only the header is written here; nothing
of a client's own is in it, so no client can forge one.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_LOCAL: Final = 0x20
_PROXY: Final = 0x21
"""Version 2 in the upper half; the command in the lower one."""
_UNSPECIFIED: Final = 0x00
_TCP_OVER_IPV4: Final = 0x11
_TCP_OVER_IPV6: Final = 0x21
_PREFIX = struct.Struct("!12sBBH")
_PORTS = struct.Struct("!HH")

Address = tuple[str, int]
"""A numeric address and a port."""


def encode_proxy_header(client: Address | None, target: Address) -> bytes:
    """The header of a connection to ``target`` for ``client``.

    Where the one has IPv4 and the other IPv6, both are written as IPv6, an IPv4 address as
    ``::ffff:a.b.c.d``. Without a client (it has just gone) the header says LOCAL: the receiver then
    sees the gateway as the source. Raises ``ValueError`` for an address that is not numeric.
    """
    if client is None:
        return _PREFIX.pack(SIGNATURE, _LOCAL, _UNSPECIFIED, 0)
    source, destination = _parse(client[0]), _parse(target[0])
    if source.version != destination.version:
        source, destination = _as_ipv6(source), _as_ipv6(destination)
    family = _TCP_OVER_IPV4 if source.version == 4 else _TCP_OVER_IPV6
    body = source.packed + destination.packed + _PORTS.pack(client[1], target[1])
    return _PREFIX.pack(SIGNATURE, _PROXY, family, len(body)) + body


def _parse(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _as_ipv6(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv6Address:
    if isinstance(address, ipaddress.IPv6Address):
        return address
    return ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + address.packed)
