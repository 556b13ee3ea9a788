"""TCP through HTTP: ``connect-tcp`` and classic CONNECT, as requests and as names for them.

``connect-tcp`` is draft-ietf-httpbis-connect-tcp, an Extended CONNECT whose body is DATA and
FINAL_DATA capsules; classic CONNECT is RFC 9114 section 4.4, whose body is the TCP payload itself.
Everything that the draft may still renumber stands at the top of this file.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

from toppy.model.target import Target
from toppy.wire.connect_udp import (
    RequestError,
    encode_bearer,
    encode_field,
    parse_host,
    parse_path_target,
    parse_port,
)
from toppy.wire.connect_udp import request_headers as extended_connect_headers
from toppy.wire.varint import encode_varint

UPGRADE_TOKEN: Final = b"connect-tcp"
INTEROP_TOKEN: Final = b"connect-tcp-12"
"""What implementations of the draft's version 12 ask for until it is an RFC."""
TOKENS: Final = frozenset({UPGRADE_TOKEN, INTEROP_TOKEN})
DATA: Final = 0x2028D7F2
"""Capsule: TCP payload. The number is version 12's, for tests of interoperability; the RFC will
have another one."""
FINAL_DATA: Final = 0x2028D7F3
"""Capsule: the last TCP payload, then FIN."""

TCP_PATH_PREFIX: Final = "/.well-known/masque/tcp/"
TCP_TEMPLATE_PATH: Final = "/.well-known/masque/tcp/{target_host}/{target_port}/"

HEADROOM_BYTES: Final = len(encode_varint(DATA)) + 4
"""Room that the header of a DATA capsule needs at most, for payloads of less than 1 GiB."""
_DATA_TYPE: Final = encode_varint(DATA)
_HOST_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@/?#]+)):([0-9]+)\Z")


class StreamFraming(Enum):
    """How TCP payload travels on a request stream."""

    CAPSULES = "capsules"
    """``connect-tcp``."""
    RAW = "raw"
    """Classic CONNECT: the body is the payload, its end is FIN."""


def encode_data_header(payload_bytes: int) -> bytes:
    """What stands before so much payload in a DATA capsule."""
    return _DATA_TYPE + encode_varint(payload_bytes)


def encode_final_data() -> bytes:
    """A FINAL_DATA capsule without payload: FIN."""
    return encode_varint(FINAL_DATA) + b"\x00"


def parse_tcp_path(path: str) -> Target:
    """The target of ``/.well-known/masque/tcp/HOST/PORT/``.

    Raises ``RequestError`` with status 404 for another path, 400 for a bad target.
    """
    if not path.startswith(TCP_PATH_PREFIX):
        raise RequestError("there is nothing at this path", status=404)
    host, port = parse_path_target(path.removeprefix(TCP_PATH_PREFIX))
    return Target(host, port, "tcp")


def parse_authority(text: str) -> Target:
    """The TCP target of ``HOST:PORT`` or ``[ADDRESS]:PORT`` (RFC 9110 section 9.3.6).

    Nothing is percent-decoded; without a port there is no target. Raises ``RequestError``.
    """
    match = _HOST_PORT.match(text)
    if match is None:
        raise RequestError("the target must be HOST:PORT, an IPv6 address in brackets")
    address, name, port = match.groups()
    if address is not None and ":" not in address:
        raise RequestError("only an IPv6 address stands in brackets")
    return Target(parse_host(address or name), parse_port(port), "tcp")


def request_headers(
    authority: str, path: str, authorization: str | None, *, expects_continue: bool = False
) -> list[tuple[bytes, bytes]]:
    """A ``connect-tcp`` request. ``authorization`` is a bearer token.

    ``expects_continue`` asks for a 100 as soon as the gateway begins to connect. Raises
    ``ConfigError`` for what a field cannot carry.
    """
    headers = extended_connect_headers(authority, path, authorization, protocol=UPGRADE_TOKEN)
    if expects_continue:
        headers.append((b"expect", b"100-continue"))
    return headers


def classic_request_headers(target: Target, authorization: str | None) -> list[tuple[bytes, bytes]]:
    """A classic CONNECT request (RFC 9114 section 4.4). ``authorization`` is a bearer token.

    Raises ``ConfigError`` for what a field cannot carry.
    """
    headers = [(b":method", b"CONNECT"), (b":authority", encode_field("the target", str(target)))]
    if authorization is not None:
        headers.append((b"proxy-authorization", encode_bearer(authorization)))
    return headers
