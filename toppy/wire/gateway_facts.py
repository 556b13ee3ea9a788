"""What a gateway says about itself in its answers, for `toppy doctor`.

Every answer may have a ``date`` (RFC 9110 section 6.6.1). Program, engine and the client's address
as the gateway sees it are only in the answer that opens the built-in echo: whoever reads it has
shown a credential.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from typing import Final

_PROGRAM: Final = "toppy-gw"
_CLIENT_ADDRESS: Final = b"toppy-client-address"
_SERVER = re.compile(r"toppy-gw/([0-9A-Za-z.+_-]{1,40})(?: \(([a-z]{1,20})\))?\Z")
_ADDRESS = re.compile(r'"(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9.]{7,15})):([0-9]{1,5})"\Z')

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class GatewayFacts:
    """None, or empty, where the gateway does not say it."""

    unix_time: float | None = None
    """The gateway's clock, in whole seconds."""
    version: str = ""
    engine: str = ""
    client_address: Address | None = None
    """Where the client's packets come from, seen from the gateway."""


def date_field(unix_now: float) -> tuple[bytes, bytes]:
    """The time, for any answer."""
    return b"date", formatdate(unix_now, usegmt=True).encode()


def diagnostic_fields(
    version: str, engine: str, client_address: Address | None
) -> list[tuple[bytes, bytes]]:
    """For the answer that opens an echo: what an authenticated client may know."""
    fields = [(b"server", f"{_PROGRAM}/{version} ({engine})".encode())]
    if client_address is not None:
        host, port = client_address
        shown = f"[{host}]" if ":" in host else host
        fields.append((_CLIENT_ADDRESS, f'"{shown}:{port}"'.encode()))
    return fields


def parse_gateway_facts(headers: Iterable[tuple[bytes, bytes]]) -> GatewayFacts:
    """What an answer's fields say; what cannot be read is left out, whatever it is."""
    found = {name: value.decode("ascii", "replace")[:200] for name, value in headers}
    server = _SERVER.match(found.get(b"server", ""))
    return GatewayFacts(
        unix_time=_parse_date(found.get(b"date", "")),
        version=server.group(1) if server else "",
        engine=(server.group(2) or "") if server else "",
        client_address=_parse_address(found.get(_CLIENT_ADDRESS, "")),
    )


def _parse_date(text: str) -> float | None:
    if not text.endswith(" GMT"):
        return None
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _parse_address(text: str) -> Address | None:
    match = _ADDRESS.match(text)
    if match is None or not 0 < int(match.group(3)) < 65536:
        return None
    return match.group(1) or match.group(2), int(match.group(3))
