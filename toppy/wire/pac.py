"""The PAC file: which of a browser's connections go through the proxy."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from typing import Final

from toppy.errors import ConfigError
from toppy.wire.connect_tcp import parse_authority
from toppy.wire.connect_udp import RequestError, parse_host

PAC_PATH: Final = "/proxy.pac"
PAC_MEDIA_TYPE: Final = "application/x-ns-proxy-autoconfig"

_LOCAL: Final = ("localhost", "*.localhost", "127.0.0.0/8", "::1")

# isInNet would resolve a name, here and not at the gateway: networks are asked only about addresses
_FUNCTION: Final = """\
function FindProxyForURL(url, host) {
  host = host.toLowerCase().replace(/\\.$/, "").replace(/^\\[(.*)\\]$/, "$1");
  var isIPv4 = /^[0-9]+\\.[0-9]+\\.[0-9]+\\.[0-9]+$/.test(host);
  function isName(name) {
    return host === name;
  }
  function isBelow(suffix) {
    return host.length > suffix.length && host.slice(-suffix.length) === suffix;
  }
  function isIn(network, mask) {
    return isIPv4 && isInNet(host, network, mask);
  }
  if (%(direct)s) return "DIRECT";
  if (%(through)s) return %(proxy)s;
  return "DIRECT";
}
"""


def encode_pac(proxy: str, *, through: Sequence[str] = (), direct: Sequence[str] = ()) -> str:
    """A PAC file that sends what ``through`` names, but not what ``direct`` names, to ``proxy``.

    ``proxy`` is HOST:PORT. Patterns are names, ``*.names`` (all below, not the name itself), IP
    addresses and IPv4 networks; networks are compared with addresses only, never with what a name
    resolves to. Without ``through`` everything goes there. This machine's own names and addresses
    never do. There is no way around the proxy when it does not answer: what is private stays so.

    Raises ``ConfigError`` for anything else.
    """
    try:
        address = parse_authority(proxy)
    except RequestError as error:
        raise ConfigError(f"the proxy's address {proxy!r} must be HOST:PORT: {error}") from None
    return _FUNCTION % {
        "direct": " || ".join(_condition(pattern) for pattern in (*_LOCAL, *direct)),
        "through": " || ".join(_condition(pattern) for pattern in through) or "true",
        "proxy": json.dumps(f"PROXY {address}"),
    }


def _condition(pattern: str) -> str:
    """The JavaScript that says whether ``host`` fits."""
    if "/" in pattern:
        try:
            network = ipaddress.IPv4Network(pattern)
        except ValueError:
            raise _error(pattern) from None
        return f'isIn("{network.network_address}", "{network.netmask}")'
    is_suffix = pattern.startswith("*.")
    try:
        host = parse_host(pattern.removeprefix("*."))
    except RequestError:
        raise _error(pattern) from None
    if is_suffix:
        if re.fullmatch(r"[0-9.]+", host) or ":" in host:
            raise _error(pattern)
        return f"isBelow({json.dumps('.' + host)})"
    return f"isName({json.dumps(host)})"


def _error(pattern: str) -> ConfigError:
    return ConfigError(
        f"{pattern!r} must be a name, *.NAME, an IP address or an IPv4 network with no host bits"
    )
