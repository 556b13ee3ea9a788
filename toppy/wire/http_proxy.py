"""Requests of HTTP/1.1 to a proxy (RFC 9112): CONNECT, absolute-form, and the proxy's own pages.

Read strictly: whatever two readers could read in two ways is refused, because the next reader may
be another one (RFC 9112 section 11.2).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from toppy.errors import PeerError
from toppy.model.target import Target
from toppy.wire.connect_tcp import parse_authority
from toppy.wire.connect_udp import RequestError
from toppy.wire.socks import Login

MAX_HEAD_BYTES: Final = 8192
_MAX_CHUNK_LINE_BYTES: Final = 256
_PSEUDONYM: Final = "toppy"
_DEFAULT_PORT: Final = 80

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105  # RFC 9110 section 5.6.2, no secret
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])\Z")
_FIELD_NAME = re.compile(rf"{_TOKEN}\Z")
_FIELD_VALUE = re.compile(r"[\t -~\x80-\xff]*\Z")
_ABSOLUTE = re.compile(r"(?i:http)://([^/?#]*)([^#]*)\Z")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LENGTH = re.compile(r"[0-9]{1,18}\Z")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~]*)?\Z")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_BARE_CR = re.compile(rb"\r(?!\n)")
_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "upgrade",
    }
)
"""RFC 9110 section 7.6.1, but for those that frame the body, which goes on as it is."""
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    407: "Proxy Authentication Required",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
    508: "Loop Detected",
}


class HttpRequestError(PeerError):
    """The request is not one that this proxy takes; ``status`` is the answer."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """The head of a request: a tunnel, a request to pass on, or a page of the proxy's own."""

    method: str
    target: Target | None
    """None: the request is to the proxy itself, for ``path``."""
    path: str = ""
    login: Login | None = None
    head: bytes = field(default=b"", repr=False)
    """To pass on: the head for the target; a tunnel has none."""
    body: RequestBody | None = None
    """To pass on: what follows the head."""


def find_head(data: bytes | bytearray) -> int | None:
    """Where the head ends, its empty line included; None when more must come.

    Raises ``HttpRequestError`` for a line end that is not CRLF, and beyond ``MAX_HEAD_BYTES``.
    """
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
    head = data[: end + 4] if end >= 0 else data
    if _BARE_LF.search(head):
        raise HttpRequestError("a line of the request does not end with CRLF")
    if end >= 0:
        return end + 4
    if len(data) >= MAX_HEAD_BYTES:
        raise HttpRequestError(
            f"the head of the request has more than {MAX_HEAD_BYTES} bytes", status=431
        )
    return None


def parse_head(head: bytes) -> HttpRequest:
    """The request with this head, which ends with its empty line. Raises ``HttpRequestError``."""
    if _BARE_CR.search(head):
        raise HttpRequestError("a carriage return stands alone in the request")
    request_line, *lines = head[:-4].decode("latin-1").split("\r\n")
    match = _REQUEST_LINE.match(request_line)
    if match is None:
        raise HttpRequestError("the first line is no request line of HTTP/1.1")
    method, written, major, minor = match.groups()
    if major != "1":
        raise HttpRequestError("only HTTP/1.1 and HTTP/1.0 are spoken here", status=505)
    fields = [_parse_field(line) for line in lines]
    hosts = _values(fields, "host")
    if len(hosts) > 1 or (not hosts and minor != "0"):
        raise HttpRequestError("a request must have one Host field")
    login = _parse_login(_values(fields, "proxy-authorization"))
    if method == "CONNECT":
        if _values(fields, "content-length") or _values(fields, "transfer-encoding"):
            raise HttpRequestError("CONNECT has no content-length and no transfer-encoding")
        return HttpRequest(method, _parse_target(written), login=login)
    absolute = _ABSOLUTE.match(written)
    if absolute is None:
        if written.startswith("/"):
            return HttpRequest(method, None, written.partition("?")[0], login)
        if _SCHEME.match(written):
            raise HttpRequestError("only http:// is passed on; ask for other schemes with CONNECT")
        raise HttpRequestError("the request's target must be an http:// URI")
    authority, rest = absolute.groups()
    target = _parse_target(_with_port(authority))
    if not rest.startswith("/"):
        rest = "*" if method == "OPTIONS" and not rest else f"/{rest}"
    body = _parse_framing(fields, is_1_0=minor == "0")
    version = f"1.{0 if minor == '0' else 1}"
    return HttpRequest(
        method, target, rest, login, _origin_head(method, rest, version, target, fields), body
    )


def _parse_field(line: str) -> tuple[str, str]:
    if line[:1] in (" ", "\t"):
        raise HttpRequestError("a field is folded over lines")
    name, _, value = line.partition(":")
    if not _FIELD_NAME.match(name) or not _FIELD_VALUE.match(value) or len(name) == len(line):
        raise HttpRequestError("a line of the head is no field")
    return name, value.strip(" \t")


def _values(fields: Sequence[tuple[str, str]], wanted: str) -> list[str]:
    return [value for name, value in fields if name.lower() == wanted]


def _parse_target(authority: str) -> Target:
    try:
        return parse_authority(authority)
    except RequestError as error:
        raise HttpRequestError(str(error)) from None


def _with_port(authority: str) -> str:
    """With the port that ``http`` implies where there is none (RFC 9110 section 4.2.1)."""
    authority = authority.removesuffix(":")
    has_port = ":" in authority.rpartition("]")[2]
    return authority if has_port else f"{authority}:{_DEFAULT_PORT}"


def _parse_login(values: list[str]) -> Login | None:
    """The user and the password of Basic (RFC 7617); None for other schemes and for what is none.

    Raises ``HttpRequestError`` when there are two.
    """
    if len(values) > 1:
        raise HttpRequestError("proxy-authorization is there twice")
    scheme, _, encoded = values[0].partition(" ") if values else ("", "", "")
    if scheme.lower() != "basic":
        return None
    try:
        decoded = base64.b64decode(encoded.strip(" "), validate=True)
    except (binascii.Error, ValueError):
        return None
    user, _, password = decoded.partition(b":")
    return Login(user, password)


def _parse_framing(fields: Sequence[tuple[str, str]], *, is_1_0: bool) -> RequestBody:
    """How the request's body ends (RFC 9112 section 6.3)."""
    lengths = _values(fields, "content-length")
    codings = _values(fields, "transfer-encoding")
    if codings:
        if lengths:
            raise HttpRequestError("content-length and transfer-encoding are both there")
        if is_1_0 or len(codings) > 1 or codings[0].lower() != "chunked":
            raise HttpRequestError("the only transfer-encoding is chunked", status=501)
        return RequestBody(None)
    if len(lengths) > 1 or (lengths and not _LENGTH.match(lengths[0])):
        raise HttpRequestError("content-length must be there once, and a number")
    return RequestBody(int(lengths[0]) if lengths else 0)


def _origin_head(
    method: str, path: str, version: str, target: Target, fields: Sequence[tuple[str, str]]
) -> bytes:
    """The head in origin-form, with the target's name and without what was for this hop."""
    hop_by_hop = set(_HOP_BY_HOP)
    for value in _values(fields, "connection"):
        hop_by_hop |= {option.strip().lower() for option in value.split(",")}
    # these frame the body, or say whose it is: a client cannot have them taken away
    hop_by_hop -= {"content-length", "transfer-encoding"}
    host = str(target).removesuffix(f":{_DEFAULT_PORT}") if target.port == _DEFAULT_PORT else target
    lines = [f"{method} {path} HTTP/{version}", f"Host: {host}"]
    lines += [
        f"{name}: {value}"
        for name, value in fields
        if name.lower() not in hop_by_hop and name.lower() != "host"
    ]
    lines += [f"Via: {version} {_PSEUDONYM}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")


class _Stage(Enum):
    """What a chunked body goes on with."""

    SIZE = "size"
    DATA = "data"
    DATA_END = "data end"
    TRAILERS = "trailers"
    END = "end"


class RequestBody:
    """Lets the body of one request pass, and nothing behind it.

    The target has been told to close, so that what a client sends behind it would be answered by
    nobody, or by the wrong one.
    """

    __slots__ = ("_is_chunked", "_line", "_remaining", "_stage", "_trailer_bytes")

    def __init__(self, length: int | None) -> None:
        """``length`` in bytes; None: chunks (RFC 9112 section 7.1)."""
        self._is_chunked = length is None
        self._remaining = length or 0
        self._line = bytearray()
        self._stage = _Stage.SIZE
        self._trailer_bytes = 0

    @property
    def is_complete(self) -> bool:
        """Nothing more passes."""
        return self._stage is _Stage.END if self._is_chunked else not self._remaining

    def receive(self, data: bytes) -> bytes:
        """What of ``data`` belongs to the request. Raises ``HttpRequestError`` for bad chunks."""
        if not self._is_chunked:
            passed = data[: self._remaining]
            self._remaining -= len(passed)
            return passed
        offset = 0
        while offset < len(data) and self._stage is not _Stage.END:
            if self._stage is _Stage.DATA:
                taken = min(self._remaining, len(data) - offset)
                offset += taken
                self._remaining -= taken
                if not self._remaining:
                    self._stage = _Stage.DATA_END
            else:
                offset = self._receive_line(data, offset)
        return data[:offset]

    def _receive_line(self, data: bytes, offset: int) -> int:
        """Read on in a line; the offset behind what belongs to it."""
        found = data.find(b"\n", offset)
        end = len(data) if found < 0 else found + 1
        self._line += data[offset:end]
        if len(self._line) > _MAX_CHUNK_LINE_BYTES:
            raise HttpRequestError(f"a line of the chunks has over {_MAX_CHUNK_LINE_BYTES} bytes")
        if found < 0:
            return end
        if not self._line.endswith(b"\r\n"):
            raise HttpRequestError("a line of the chunks does not end with CRLF")
        line = bytes(self._line[:-2])
        self._line.clear()
        self._handle_line(line)
        return end

    def _handle_line(self, line: bytes) -> None:
        if self._stage is _Stage.DATA_END:
            if line:
                raise HttpRequestError("a chunk is longer than it says")
            self._stage = _Stage.SIZE
        elif self._stage is _Stage.SIZE:
            match = _CHUNK_LINE.match(line)
            if match is None:
                raise HttpRequestError("a chunk does not begin with its size")
            self._remaining = int(match.group(1), 16)
            self._stage = _Stage.DATA if self._remaining else _Stage.TRAILERS
        elif line:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > MAX_HEAD_BYTES:
                raise HttpRequestError("the trailers are too long", status=431)
            if _BARE_CR.search(line):
                raise HttpRequestError("a carriage return stands alone in the trailers")
            _parse_field(line.decode("latin-1"))
        else:
            self._stage = _Stage.END


TUNNEL_OPENED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"
"""The answer to CONNECT; it has no fields that could frame a content (RFC 9110 section 9.3.6)."""


def encode_response(
    status: int,
    text: str,
    *,
    fields: Sequence[tuple[str, str]] = (),
    media_type: str = "text/plain; charset=utf-8",
    with_body: bool = True,
) -> bytes:
    """An answer of the proxy's own, after which it closes. ``fields`` are clean ASCII."""
    body = text.encode()
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}",
        f"Content-Type: {media_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *(f"{name}: {value}" for name, value in fields),
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1") + (body if with_body else b"")
