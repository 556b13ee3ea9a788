"""Which kind of tunnel a request asks for, and the answers that fit the kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from toppy.model.target import Target
from toppy.wire import connect_udp
from toppy.wire.connect_tcp import TOKENS, parse_authority, parse_tcp_path
from toppy.wire.connect_udp import (
    CHALLENGE,
    RequestError,
    check_tunnel_fields,
    encode_field,
    parse_request_path,
    read_extended_connect,
    read_fields,
    read_text,
)


class TunnelKind(Enum):
    """How a tunnel is asked for, and so what its stream carries."""

    UDP = "connect-udp"
    """RFC 9298."""
    TCP = "connect-tcp"
    """draft-ietf-httpbis-connect-tcp: DATA capsules."""
    TCP_CLASSIC = "connect"
    """RFC 9114 section 4.4: bare payload."""


@dataclass(frozen=True, slots=True)
class TunnelRequest:
    """A request for a tunnel of any kind."""

    kind: TunnelKind
    target: Target
    is_forward: bool = True
    """False: asked for on ``udp``, where the gateway's own echo may answer."""
    authority: str = ""
    """The gateway's, as the client calls it; empty in classic CONNECT, which does not name it."""
    authorization: str | None = field(default=None, repr=False)
    expects_continue: bool = False
    """Wants a 100 before the answer (RFC 9110 section 10.1.1)."""


def validate_tunnel_request(headers: Iterable[tuple[bytes, bytes]]) -> TunnelRequest:
    """The tunnel that a request asks for. Raises ``RequestError``, whose status is

    400 when it is malformed, 404 when it is no CONNECT or its path leads nowhere, 417 for another
    expectation than 100-continue, 425 when an intermediary took it from early data (RFC 8470), and
    501 for a ``:protocol`` that is not known (RFC 9220 section 3).
    """
    found = read_fields(headers)
    if found.get(b":method") != b"CONNECT":
        raise RequestError("only CONNECT is served here", status=404)
    protocol = found.get(b":protocol")
    is_tcp = protocol in TOKENS
    if protocol is not None and not is_tcp and protocol != b"connect-udp":
        raise RequestError(
            "this :protocol is not known here, only connect-udp and connect-tcp are", status=501
        )
    if b"early-data" in found:
        raise RequestError("a tunnel is not opened by early data: ask again", status=425)
    expectation = found.get(b"expect")
    if expectation is not None and expectation.lower() != b"100-continue":
        raise RequestError("the only expectation that is met here is 100-continue", status=417)
    expects_continue = expectation is not None
    if protocol is None:
        return _validate_classic(found, expects_continue=expects_continue)
    authority, path = read_extended_connect(found)
    authorization = read_text(found, b"authorization")
    if is_tcp:
        return TunnelRequest(
            TunnelKind.TCP,
            parse_tcp_path(path),
            authority=authority,
            authorization=authorization,
            expects_continue=expects_continue,
        )
    udp = parse_request_path(path)
    return TunnelRequest(
        TunnelKind.UDP, udp.target, udp.is_forward, authority, authorization, expects_continue
    )


def _validate_classic(found: dict[bytes, bytes], *, expects_continue: bool) -> TunnelRequest:
    if b":scheme" in found or b":path" in found:
        raise RequestError("CONNECT without :protocol has neither :scheme nor :path")
    check_tunnel_fields(found)
    if b"authorization" in found and b"proxy-authorization" in found:
        raise RequestError("authorization and proxy-authorization are both there")
    field_name = b"proxy-authorization" if b"proxy-authorization" in found else b"authorization"
    return TunnelRequest(
        TunnelKind.TCP_CLASSIC,
        parse_authority(read_text(found, b":authority") or ""),
        authorization=read_text(found, field_name),
        expects_continue=expects_continue,
    )


def continue_headers() -> list[tuple[bytes, bytes]]:
    """The interim answer to a request that expects it (RFC 9110 section 15.2.1)."""
    return [(b":status", b"100")]


def response_headers(
    kind: TunnelKind,
    status: int,
    *,
    proxy_status: str | None = None,
    needs_credentials: bool = False,
) -> list[tuple[bytes, bytes]]:
    """An answer; 2xx opens the tunnel. Raises ``ConfigError`` for what a field cannot carry.

    A 401 is sent as such, with its challenge, but for classic CONNECT: there credentials are the
    proxy's, and it is a 407 (RFC 9110 section 15.5.8).
    """
    if kind is not TunnelKind.TCP_CLASSIC:
        return connect_udp.response_headers(
            status, proxy_status=proxy_status, www_authenticate=needs_credentials
        )
    if needs_credentials and status == 401:
        status = 407
    headers = [(b":status", str(status).encode())]
    if proxy_status:
        headers.append((b"proxy-status", encode_field("proxy-status", proxy_status)))
    if needs_credentials:
        headers.append((b"proxy-authenticate", CHALLENGE))
    return headers
