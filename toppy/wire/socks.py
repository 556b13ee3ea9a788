"""SOCKS as bytes: version 5 (RFC 1928, RFC 1929) and version 4 with its 4a extension.

Each ``read_…`` takes what has come so far and returns (what it says, bytes that it took), or None
when more must come. All raise ``SocksError`` as soon as it can be none of the messages.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from toppy.errors import PeerError
from toppy.model.target import Target
from toppy.wire.connect_udp import RequestError, parse_host

VERSION_4: Final = 4
VERSION_5: Final = 5
NO_AUTHENTICATION: Final = 0x00
USER_PASSWORD: Final = 0x02
_NO_ACCEPTABLE_METHOD: Final = 0xFF
_MAX_TEXT_BYTES: Final = 255
_IPV4, _NAME, _IPV6 = 1, 3, 4
_UNSPECIFIED: Final = str(ipaddress.IPv4Address(0))


class Reply(IntEnum):
    """Of RFC 1928 section 6."""

    SUCCEEDED = 0
    GENERAL_FAILURE = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    REFUSED = 5
    TTL_EXPIRED = 6
    """There is none for a target that does not answer in time: this one is what others use."""
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


class Command(IntEnum):
    """What a request asks for; BIND is not served."""

    CONNECT = 1
    UDP_ASSOCIATE = 3


class SocksError(PeerError):
    """Not SOCKS, or not what is served of it; ``reply`` is the answer, where there is one."""

    def __init__(self, message: str, *, reply: Reply = Reply.GENERAL_FAILURE) -> None:
        super().__init__(message)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class SocksRequest:
    """What a program wants."""

    command: Command
    host: str
    """As in ``Target``; in UDP ASSOCIATE the address that the program sends from."""
    port: int
    """0 only in UDP ASSOCIATE: not known yet."""


@dataclass(frozen=True, slots=True)
class Login:
    """A user and a password (RFC 1929), or a user alone (version 4)."""

    user: bytes = field(repr=False)
    password: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class SocksDatagram:
    """A UDP datagram with its header taken off."""

    target: Target
    payload: memoryview


def read_methods(data: bytes) -> tuple[frozenset[int], int] | None:
    """Version 5: the methods of authentication that a program offers (RFC 1928 section 3)."""
    if len(data) < 2 or len(data) < 2 + data[1]:
        return None
    if not data[1]:
        raise SocksError("a SOCKS5 greeting offers no method of authentication")
    end = 2 + data[1]
    return frozenset(data[2:end]), end


def encode_method(method: int | None) -> bytes:
    """Version 5: the method that is chosen; None: no offered one will do."""
    return bytes((VERSION_5, _NO_ACCEPTABLE_METHOD if method is None else method))


def read_login(data: bytes) -> tuple[Login, int] | None:
    """User and password (RFC 1929 section 2)."""
    if data and data[0] != 1:
        raise SocksError("the login has a version that is not 1 (RFC 1929)")
    if len(data) < 2:
        return None
    user_end = 2 + data[1]
    if len(data) <= user_end:
        return None
    end = user_end + 1 + data[user_end]
    if len(data) < end:
        return None
    return Login(data[2:user_end], data[user_end + 1 : end]), end


def encode_login_answer(*, is_accepted: bool) -> bytes:
    """RFC 1929 section 2; after a refusal the connection must be closed."""
    return b"\x01\x00" if is_accepted else b"\x01\x01"


def read_request(data: bytes) -> tuple[SocksRequest, int] | None:
    """Version 5: what a program wants (RFC 1928 section 4)."""
    if data and data[0] != VERSION_5:
        raise SocksError("a SOCKS5 request begins with another version")
    if len(data) < 4:
        return None
    if data[1] not in (Command.CONNECT, Command.UDP_ASSOCIATE):
        raise SocksError(
            f"SOCKS5 command {data[1]} is not served, only CONNECT and UDP ASSOCIATE are",
            reply=Reply.COMMAND_NOT_SUPPORTED,
        )
    if data[2]:
        raise SocksError("the reserved byte of a SOCKS5 request is not 0")
    found = _read_address(data, 3)
    if found is None:
        return None
    host, port, end = found
    command = Command(data[1])
    if not port and command is Command.CONNECT:
        raise SocksError("the target port must be a number from 1 to 65535")
    return SocksRequest(command, host, port), end


def encode_reply(reply: Reply, host: str = _UNSPECIFIED, port: int = 0) -> bytes:
    """Version 5: the answer to a request, with the address that was bound (RFC 1928 section 6)."""
    return bytes((VERSION_5, reply, 0)) + _encode_address(host, port)


def read_request_4(data: bytes) -> tuple[Login, SocksRequest, int] | None:
    """Version 4 and 4a: what a program wants, and who it says that its user is."""
    if len(data) >= 2 and data[1] != Command.CONNECT:
        raise SocksError(f"SOCKS4 command {data[1]} is not served, only CONNECT is")
    if len(data) >= 4 and data[2:4] == b"\x00\x00":
        raise SocksError("the target port must be a number from 1 to 65535")
    user_end = _find_end(data, 8)
    if user_end is None:
        return None
    port = int.from_bytes(data[2:4])
    login = Login(data[8:user_end])
    # 4a: 0.0.0.x, x not 0, says that a name follows
    if data[4:7] != b"\x00\x00\x00" or data[7] == 0:
        host = str(ipaddress.IPv4Address(data[4:8]))
        return login, SocksRequest(Command.CONNECT, host, port), user_end + 1
    name_end = _find_end(data, user_end + 1)
    if name_end is None:
        return None
    host = _parse_name(data[user_end + 1 : name_end])
    return login, SocksRequest(Command.CONNECT, host, port), name_end + 1


def encode_reply_4(*, is_granted: bool) -> bytes:
    """Version 4: the answer to a request. It knows no reasons; its address means nothing."""
    return bytes((0, 0x5A if is_granted else 0x5B)) + bytes(6)


def parse_udp_datagram(data: bytes | bytearray | memoryview) -> SocksDatagram:
    """A datagram from a program (RFC 1928 section 7); the payload is a view of ``data``.

    Raises ``SocksError`` for fragments, which are not put together, and for everything else that
    leads to no target.
    """
    view = memoryview(data)
    if len(view) < 4:
        raise SocksError("the header of a SOCKS5 datagram is cut off")
    if view[0] or view[1]:
        raise SocksError("the reserved bytes of a SOCKS5 datagram are not 0")
    if view[2]:
        raise SocksError("fragments of SOCKS5 datagrams are not served")
    # the longest header: a name of 255 bytes
    found = _read_address(bytes(view[: 7 + _MAX_TEXT_BYTES]), 3)
    if found is None:
        raise SocksError("the header of a SOCKS5 datagram is cut off")
    host, port, end = found
    if not port:
        raise SocksError("the target port must be a number from 1 to 65535")
    return SocksDatagram(Target(host, port), view[end:])


def encode_udp_header(host: str, port: int) -> bytes:
    """What stands before the payload of a datagram to a program; who it is from."""
    return b"\x00\x00\x00" + _encode_address(host, port)


def _read_address(data: bytes, offset: int) -> tuple[str, int, int] | None:
    """(host, port, the offset behind them)."""
    kind = data[offset]
    start = offset + 1
    if kind == _NAME:
        if len(data) <= start:
            return None
        start += 1
        end = start + data[start - 1]
    elif kind in (_IPV4, _IPV6):
        end = start + (4 if kind == _IPV4 else 16)
    else:
        raise SocksError(
            f"address type {kind} is none of SOCKS5", reply=Reply.ADDRESS_TYPE_NOT_SUPPORTED
        )
    if len(data) < end + 2:
        return None
    written = data[start:end]
    host = _parse_name(written) if kind == _NAME else str(ipaddress.ip_address(written))
    return host, int.from_bytes(data[end : end + 2]), end + 2


def _encode_address(host: str, port: int) -> bytes:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.encode("ascii")
        return bytes((_NAME, len(name))) + name + port.to_bytes(2)
    kind = _IPV4 if address.version == 4 else _IPV6
    return bytes((kind,)) + address.packed + port.to_bytes(2)


def _parse_name(written: bytes) -> str:
    try:
        return parse_host(written.decode("ascii"))
    except UnicodeDecodeError:
        raise SocksError("the target must be ASCII (write names as A-labels)") from None
    except RequestError as error:
        raise SocksError(str(error)) from None


def _find_end(data: bytes, start: int) -> int | None:
    """Where the NUL is that ends a text of version 4."""
    end = data.find(b"\x00", start, start + _MAX_TEXT_BYTES + 1)
    if end >= 0:
        return end
    if len(data) > start + _MAX_TEXT_BYTES:
        raise SocksError(f"a text of a SOCKS4 request has more than {_MAX_TEXT_BYTES} bytes")
    return None
