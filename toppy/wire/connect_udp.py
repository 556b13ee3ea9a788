"""CONNECT-UDP requests and answers (RFC 9298 sections 3.4 and 3.5), and its URI templates.

Targets are parsed once and strictly: what is not clearly a name, an IPv4 dotted quad or an IPv6
address is refused, because resolvers and system calls disagree about the rest.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from toppy.errors import ConfigError, PeerError
from toppy.model.target import Target

ECHO_PATH_PREFIX: Final = "/.well-known/masque/udp/"
FORWARD_PATH_PREFIX: Final = "/.well-known/masque/udp-forward/"
DEFAULT_TEMPLATE_PATH: Final = "/.well-known/masque/udp/{target_host}/{target_port}/"
CHALLENGE: Final = b'Bearer realm="toppy"'
FORWARD_TEMPLATE_PATH: Final = "/.well-known/masque/udp-forward/{target_host}/{target_port}/"

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)\Z")
_DOTTED_QUAD = re.compile(r"(?:0|[1-9][0-9]{0,2})(?:\.(?:0|[1-9][0-9]{0,2})){3}\Z")
_NUMERIC = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)\Z")
_PERCENT_ENCODED = re.compile(r"(?:[^%]|%[0-9A-Fa-f]{2})*\Z")
_PORT = re.compile(r"[1-9][0-9]{0,4}\Z")
_AUTHORITY = re.compile(r"[!$&-.0-;=A-\[\]_a-z~]+\Z")
# of RFC 6570: levels 1 to 3, only the operators that RFC 9298 section 2 leaves
_VARIABLE = r"[A-Za-z0-9_](?:\.?[A-Za-z0-9_])*"
_EXPRESSION = re.compile(rf"\{{([?&]?)({_VARIABLE}(?:,{_VARIABLE})*)\}}")
_PLAIN = re.compile(r"[!$-;=?-\[\]_a-z~]*\Z")
_NOT_OF_A_TUNNEL = (b"content-length", b"content-type", b"transfer-encoding")
_SINGLE = frozenset({b"authorization", b"proxy-authorization", b"expect", b"early-data"})
_VARIABLES = frozenset({"target_host", "target_port"})
_MAX_NAME_BYTES = 253


class RequestError(PeerError):
    """The request is not one that this gateway takes; ``status`` is the answer."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ConnectUdpPath:
    """What the path of a request for a UDP tunnel says."""

    target: Target
    is_forward: bool
    """Asked for on ``udp-forward``, which never echoes."""


def parse_request_path(path: str) -> ConnectUdpPath:
    """The target of ``/.well-known/masque/udp[-forward]/HOST/PORT/``.

    Percent-decodes once. Raises ``RequestError`` with status 404 for another path, 400 for a bad
    target.
    """
    for prefix, is_forward in ((ECHO_PATH_PREFIX, False), (FORWARD_PATH_PREFIX, True)):
        if path.startswith(prefix):
            host, port = parse_path_target(path.removeprefix(prefix))
            return ConnectUdpPath(Target(host, port), is_forward)
    raise RequestError("there is nothing at this path", status=404)


def parse_path_target(tail: str) -> tuple[str, int]:
    """The target of ``HOST/PORT/``, percent-decoded once. Raises ``RequestError``."""
    host, slash, port = tail.removesuffix("/").partition("/")
    if not slash or "/" in port:
        raise RequestError("the path must end in HOST/PORT/")
    return parse_host(_percent_decode(host)), parse_port(_percent_decode(port))


def _percent_decode(text: str) -> str:
    if not _PERCENT_ENCODED.match(text):
        raise RequestError("a percent sign that encodes nothing")
    try:
        return unquote_to_bytes(text).decode("ascii")
    except UnicodeDecodeError:
        raise RequestError("the target must be ASCII (write names as A-labels)") from None


def parse_host(text: str) -> str:
    """A name in lower case without its last dot, or an address in canonical form.

    Raises ``RequestError``.
    """
    if not text.isascii():  # lower() would make ASCII of some letters that are not
        raise RequestError("the target must be ASCII (write names as A-labels)")
    host = text.lower()
    if ":" in host:
        if "%" in host:
            raise RequestError("a target address has no zone")
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise RequestError("the target is not an IPv6 address") from None
    if _DOTTED_QUAD.match(host):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise RequestError("the target is not an IPv4 address") from None
    name = host.removesuffix(".")
    labels = name.split(".")
    if len(name) > _MAX_NAME_BYTES or not all(_LABEL.match(label) for label in labels):
        raise RequestError("the target is no host name")
    if _NUMERIC.match(labels[-1]):
        raise RequestError("the target looks like a number: write IPv4 as four decimal numbers")
    return name


def parse_port(text: str) -> int:
    """1 to 65535: decimal digits only, the first one no zero. Raises ``RequestError``."""
    if not _PORT.match(text) or int(text) > 65535:
        raise RequestError("the target port must be a number from 1 to 65535")
    return int(text)


def read_fields(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """A request's fields by name. Raises ``RequestError`` where one must be single and is not."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in found and (name.startswith(b":") or name in _SINGLE):
            raise RequestError("a field that must be single is there twice")
        found[name] = value
    return found


def read_text(found: dict[bytes, bytes], name: bytes) -> str | None:
    """One field, None when it is not there. Raises ``RequestError`` for what is not ASCII."""
    try:
        return found[name].decode("ascii") if name in found else None
    except UnicodeDecodeError:
        raise RequestError("a field must be ASCII") from None


def check_tunnel_fields(found: dict[bytes, bytes]) -> None:
    """Raise ``RequestError`` for fields that speak of a content (RFC 9297 section 3.2, RFC 9110
    section 9.3.6).
    """
    if any(name in found for name in _NOT_OF_A_TUNNEL):
        raise RequestError("a tunnel has no content-length, content-type or transfer-encoding")


def read_extended_connect(found: dict[bytes, bytes]) -> tuple[str, str]:
    """(authority, path) of an Extended CONNECT request (RFC 9220). Raises ``RequestError``."""
    if found.get(b":scheme") != b"https":
        raise RequestError("the scheme must be https")
    check_tunnel_fields(found)
    path = read_text(found, b":path") or ""
    authority = read_text(found, b":authority") or ""
    if not _AUTHORITY.match(authority):
        raise RequestError("the authority must be HOST:PORT")
    if not path.startswith("/"):
        raise RequestError("the path must begin with a slash")
    return authority, path


def request_headers(
    authority: str, path: str, authorization: str | None, *, protocol: bytes = b"connect-udp"
) -> list[tuple[bytes, bytes]]:
    """An Extended CONNECT request (RFC 9298 section 3.4). ``authorization`` is a bearer token.

    Raises ``ConfigError`` for what a field cannot carry.
    """
    headers = [
        (b":method", b"CONNECT"),
        (b":protocol", protocol),
        (b":scheme", b"https"),
        (b":authority", encode_field("the gateway's authority", authority)),
        (b":path", encode_field("the path", path)),
        (b"capsule-protocol", b"?1"),
    ]
    if authorization is not None:
        headers.append((b"authorization", encode_bearer(authorization)))
    return headers


def response_headers(
    status: int, *, proxy_status: str | None = None, www_authenticate: bool = False
) -> list[tuple[bytes, bytes]]:
    """An answer; 2xx opens the tunnel and says so (RFC 9297 section 3.4)."""
    headers = [(b":status", str(status).encode())]
    if 200 <= status < 300:
        headers.append((b"capsule-protocol", b"?1"))
    if proxy_status:
        headers.append((b"proxy-status", encode_field("proxy-status", proxy_status)))
    if www_authenticate:
        headers.append((b"www-authenticate", CHALLENGE))
    return headers


def encode_bearer(token: str) -> bytes:
    """The value of an Authorization field. Raises ``ConfigError`` for what it cannot carry."""
    return b"Bearer " + encode_field("the token", token)


def encode_field(what: str, text: str) -> bytes:
    """A field's value. Raises ``ConfigError``, which calls it ``what``, for what none can carry."""
    value = text.strip()
    if not value or not value.isascii() or not value.isprintable():
        # the value is not shown: it may be a secret
        raise ConfigError(f"{what} must be printable ASCII and not empty, to go into a request")
    return value.encode("ascii")


def validate_template(template: str) -> None:
    """Raise ``ConfigError`` unless ``template`` is one of RFC 9298 section 2.

    Variables besides ``target_host`` and ``target_port`` may be there; they expand to nothing.
    """
    if not template.isascii() or not template.isprintable() or not template.startswith("https://"):
        raise ConfigError(
            "gateway_template must be an ASCII URI template that begins with https://",
            key="gateway_template",
        )
    _, _, rest = template.partition("https://")
    authority, slash, path = rest.partition("/")
    if not _AUTHORITY.match(authority) or not slash:
        raise ConfigError(
            "gateway_template needs a fixed authority and a path", key="gateway_template"
        )
    names = [name for _, group in _EXPRESSION.findall(path) for name in group.split(",")]
    known = [name for name in names if name in _VARIABLES]
    if sorted(known) != sorted(_VARIABLES):
        raise ConfigError(
            "gateway_template must have {target_host} and {target_port}, each once",
            key="gateway_template",
        )
    if not _PLAIN.match(_EXPRESSION.sub("", path)):
        raise ConfigError(
            "gateway_template must have no expression but {name}, {?name} and {&name}, no fragment "
            "and no space",
            key="gateway_template",
        )


def expand_template(template: str, target: Target) -> tuple[str, str]:
    """(authority, path) for a target; the colons of IPv6 are percent-encoded.

    ``template`` has passed ``validate_template``.
    """
    values = {"target_host": quote(target.host, safe=""), "target_port": str(target.port)}

    def expand(match: re.Match[str]) -> str:
        operator = match.group(1)
        names = [name for name in match.group(2).split(",") if name in values]
        if not operator or not names:
            return ",".join(values[name] for name in names)
        return operator + "&".join(f"{name}={values[name]}" for name in names)

    authority, _, path = template.removeprefix("https://").partition("/")
    return authority, "/" + _EXPRESSION.sub(expand, path)


def host_of(authority: str) -> str:
    """The host of ``host:port`` or ``[address]:port``, in lower case."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].lower()
