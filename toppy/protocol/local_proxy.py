"""What a local program says to a proxy before its bytes are relayed: SOCKS5, SOCKS4(a) or HTTP.

Told apart by the first byte. Pure: bytes go in, actions come out; the shell dials, and tells how
that went. Nothing is buffered beyond 8 KiB; a deadline is the shell's.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, assert_never

from toppy.errors import ConfigError, LocalError
from toppy.model.target import Target
from toppy.wire.http_proxy import (
    MAX_HEAD_BYTES,
    TUNNEL_OPENED,
    HttpRequestError,
    RequestBody,
    encode_response,
    find_head,
    parse_head,
)
from toppy.wire.pac import PAC_MEDIA_TYPE, PAC_PATH
from toppy.wire.proxy_status import ProxyStatus, encode_proxy_status
from toppy.wire.socks import (
    NO_AUTHENTICATION,
    USER_PASSWORD,
    VERSION_4,
    VERSION_5,
    Command,
    Login,
    SocksError,
    encode_login_answer,
    encode_method,
    encode_reply,
    encode_reply_4,
    read_login,
    read_methods,
    read_request,
    read_request_4,
)
from toppy.wire.socks import (
    Reply as SocksReply,
)

_TLS_HANDSHAKE: Final = 22
_PROXY_NAME: Final = "toppy"
_BASIC_CHALLENGE: Final = ("Proxy-Authenticate", 'Basic realm="toppy", charset="UTF-8"')


class Credentials:
    """What a local program must know to use the proxy. Shows neither part of it."""

    __slots__ = ("_password", "_user")

    def __init__(self, user: str, password: str) -> None:
        """Raises ``ConfigError`` for what SOCKS5 or HTTP could not carry."""
        for what, text in (("user", user), ("password", password)):
            if not 1 <= len(text.encode()) <= 255 or not text.isprintable():
                raise ConfigError(f"the proxy's {what} must be printable, 1 to 255 bytes long")
        if ":" in user:  # RFC 7617 section 2
            raise ConfigError("the proxy's user must have no colon")
        self._user = _digest(user.encode())
        self._password = _digest(password.encode())

    def __repr__(self) -> str:
        return "Credentials(…)"

    def matches(self, login: Login | None) -> bool:
        """Whether it is this user with this password; takes as long whatever the answer is."""
        user, password = (login.user, login.password) if login is not None else (b"", b"")
        is_user = hmac.compare_digest(self._user, _digest(user))
        return hmac.compare_digest(self._password, _digest(password)) and is_user


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


class ProxyKind(Enum):
    """Which protocol a program speaks, and so how it is answered."""

    SOCKS5 = "socks5"
    SOCKS4 = "socks4"
    HTTP_CONNECT = "http-connect"
    HTTP_FORWARD = "http-forward"
    """A request with an absolute-form target: passed on, one to a connection."""


class OpenFailure(Enum):
    """Why there is no tunnel, in the words that SOCKS and HTTP have for it."""

    GENERAL = (SocksReply.GENERAL_FAILURE, 502, "proxy_internal_error")
    NOT_ALLOWED = (SocksReply.NOT_ALLOWED, 403, "http_request_denied")
    NETWORK_UNREACHABLE = (SocksReply.NETWORK_UNREACHABLE, 502, "destination_ip_unroutable")
    HOST_UNREACHABLE = (SocksReply.HOST_UNREACHABLE, 502, "destination_unavailable")
    NAME_UNKNOWN = (SocksReply.HOST_UNREACHABLE, 502, "dns_error")
    REFUSED = (SocksReply.REFUSED, 502, "connection_refused")
    TIMED_OUT = (SocksReply.TTL_EXPIRED, 504, "connection_timeout")
    BUSY = (SocksReply.GENERAL_FAILURE, 503, "connection_limit_reached")
    LOOP = (SocksReply.NOT_ALLOWED, 508, "proxy_loop_detected")

    def __init__(self, reply: SocksReply, status: int, error: str) -> None:
        self.reply = reply
        self.status = status
        self.error = error


_FAILURE_BY_ERROR: Final = {
    "dns_timeout": OpenFailure.TIMED_OUT,
    "dns_error": OpenFailure.NAME_UNKNOWN,
    "destination_not_found": OpenFailure.NAME_UNKNOWN,
    "destination_unavailable": OpenFailure.HOST_UNREACHABLE,
    "destination_ip_prohibited": OpenFailure.NOT_ALLOWED,
    "destination_ip_unroutable": OpenFailure.NETWORK_UNREACHABLE,
    "connection_refused": OpenFailure.REFUSED,
    "connection_timeout": OpenFailure.TIMED_OUT,
    "connection_limit_reached": OpenFailure.BUSY,
    "proxy_loop_detected": OpenFailure.LOOP,
}
_FAILURE_BY_STATUS: Final = {
    403: OpenFailure.NOT_ALLOWED,
    429: OpenFailure.BUSY,
    503: OpenFailure.BUSY,
    504: OpenFailure.TIMED_OUT,
    508: OpenFailure.LOOP,
}


def failure_of(status: int, proxy_status: ProxyStatus | None) -> OpenFailure:
    """What a gateway's refusal is to the program: by its reason, otherwise by its status."""
    error = proxy_status.error if proxy_status is not None else ""
    # a missing token or a wrong path is what the status says, whatever the error type
    if status not in (400, 401, 404, 407) and error in _FAILURE_BY_ERROR:
        return _FAILURE_BY_ERROR[error]
    return _FAILURE_BY_STATUS.get(status, OpenFailure.GENERAL)


@dataclass(frozen=True, slots=True)
class Reply:
    """Write this to the program."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Open:
    """Open a tunnel; then call ``opened`` or ``failed``."""

    target: Target
    kind: ProxyKind
    remaining: bytes = field(repr=False)
    """For the target, before anything else that the program says."""
    body: RequestBody | None = None
    """With ``HTTP_FORWARD``: what the program says from now on passes through this."""


@dataclass(frozen=True, slots=True)
class AssociateUdp:
    """Relay SOCKS5 datagrams as long as this connection lives; then call ``associated`` or
    ``failed``.
    """

    host: str
    """Where the program says that its datagrams will come from; unspecified: it does not know."""
    port: int
    """0: it does not know."""


@dataclass(frozen=True, slots=True)
class ServePac:
    """Call ``serve_pac``."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection when all replies are written."""

    reason: str
    """A sentence for the log, without what the program sent."""


Action = Reply | Open | AssociateUdp | ServePac | Close


class _State(Enum):
    FIRST_BYTE = "first byte"
    METHODS = "methods"
    LOGIN = "login"
    REQUEST = "request"
    REQUEST_4 = "request 4"
    HEAD = "head"
    DECIDING = "deciding"
    """The shell's turn."""
    DONE = "done"


_MAX_BYTES: Final = {
    _State.FIRST_BYTE: 1,
    _State.METHODS: 257,
    _State.LOGIN: 513,
    _State.REQUEST: 262,
    _State.REQUEST_4: 520,
    _State.HEAD: MAX_HEAD_BYTES,
}
"""What each message has at most: no state waits for more."""


class LocalProxyHandshake:
    """One program's connection until its bytes are relayed, or refused."""

    __slots__ = (
        "_credentials",
        "_data",
        "_has_body",
        "_kind",
        "_offers_pac",
        "_offers_udp",
        "_state",
    )

    def __init__(
        self,
        *,
        credentials: Credentials | None = None,
        offers_udp: bool = True,
        offers_pac: bool = True,
    ) -> None:
        """With ``credentials`` SOCKS4 is refused: it has no password. The PAC file is for all."""
        self._credentials = credentials
        self._offers_udp = offers_udp
        self._offers_pac = offers_pac
        self._state = _State.FIRST_BYTE
        self._kind = ProxyKind.HTTP_CONNECT
        self._has_body = True
        self._data = bytearray()

    @property
    def is_waiting(self) -> bool:
        """Whether the program is to speak; otherwise it is the shell's turn, or all is done."""
        return self._state not in (_State.DECIDING, _State.DONE)

    def receive(self, data: bytes) -> list[Action]:
        """What to do about bytes from the program, in order.

        After ``Open``, ``AssociateUdp``, ``ServePac`` and ``Close`` the program is not heard here
        any more; ``LocalError`` if it is.
        """
        if not self.is_waiting:
            raise LocalError("the handshake takes no more input")
        self._data += data
        actions: list[Action] = []
        try:
            while self.is_waiting:
                before = self._state
                actions += self._step()
                if self._state is before:
                    break
        except SocksError as error:
            return [*actions, *self._refuse_socks(error)]
        except HttpRequestError as error:
            return [*actions, *self._refuse_http(error.status, str(error))]
        return actions

    def receive_end(self) -> list[Action]:
        """The program closed its side."""
        if not self.is_waiting:
            raise LocalError("the handshake takes no more input")
        self._state = _State.DONE
        return [Close("the program left before it had asked for anything")]

    def _step(self) -> list[Action]:
        """Go on by one message, if it is all there."""
        match self._state:
            case _State.FIRST_BYTE:
                return self._read_first_byte()
            case _State.METHODS:
                return self._read_methods()
            case _State.LOGIN:
                return self._read_login()
            case _State.REQUEST:
                return self._read_request()
            case _State.REQUEST_4:
                return self._read_request_4()
            case _State.HEAD:
                return self._read_head()
            case _State.DECIDING | _State.DONE:
                raise LocalError("the handshake takes no more input")
            case _:
                assert_never(self._state)

    def _peek(self) -> bytes:
        return bytes(self._data[: _MAX_BYTES[self._state]])

    def _read_first_byte(self) -> list[Action]:
        if not self._data:
            return []
        first = self._data[0]
        if first == VERSION_5:
            self._kind, self._state = ProxyKind.SOCKS5, _State.METHODS
        elif first == VERSION_4:
            self._kind, self._state = ProxyKind.SOCKS4, _State.REQUEST_4
        elif ord("A") <= first <= ord("Z"):  # methods of HTTP in use are upper-case
            self._state = _State.HEAD
        else:
            self._state = _State.DONE
            if first == _TLS_HANDSHAKE:
                return [Close("TLS was spoken to the proxy: write http:// or socks5h:// for it")]
            return [Close("neither SOCKS nor HTTP was spoken")]
        return []

    def _read_methods(self) -> list[Action]:
        found = read_methods(self._peek())
        if found is None:
            return []
        offered, size = found
        del self._data[:size]
        wanted = NO_AUTHENTICATION if self._credentials is None else USER_PASSWORD
        if wanted not in offered:
            self._state = _State.DONE
            return [
                Reply(encode_method(None)),
                Close(
                    "the program offers no user and password"
                    if self._credentials is not None
                    else "the program insists on an authentication that is not set up"
                ),
            ]
        self._state = _State.REQUEST if self._credentials is None else _State.LOGIN
        return [Reply(encode_method(wanted))]

    def _read_login(self) -> list[Action]:
        found = read_login(self._peek())
        if found is None:
            return []
        login, size = found
        del self._data[:size]
        is_accepted = self._credentials is None or self._credentials.matches(login)
        answer = Reply(encode_login_answer(is_accepted=is_accepted))
        if not is_accepted:
            self._state = _State.DONE
            return [answer, Close("a wrong user or password")]
        self._state = _State.REQUEST
        return [answer]

    def _read_request(self) -> list[Action]:
        found = read_request(self._peek())
        if found is None:
            return []
        request, size = found
        del self._data[:size]
        if request.command is Command.CONNECT:
            return [self._open(Target(request.host, request.port, "tcp"))]
        if not self._offers_udp:
            raise SocksError(
                "UDP ASSOCIATE is not offered here", reply=SocksReply.COMMAND_NOT_SUPPORTED
            )
        self._state = _State.DECIDING
        return [AssociateUdp(request.host, request.port)]

    def _read_request_4(self) -> list[Action]:
        found = read_request_4(self._peek())
        if found is None:
            return []
        _, request, size = found
        del self._data[:size]
        if self._credentials is not None:
            raise SocksError("SOCKS4 has no password, and this proxy asks for one")
        return [self._open(Target(request.host, request.port, "tcp"))]

    def _read_head(self) -> list[Action]:
        end = find_head(self._data)
        if end is None:
            return []
        request = parse_head(bytes(self._data[:end]))
        del self._data[:end]
        self._has_body = request.method != "HEAD"
        is_for_pac = request.target is None and request.path == PAC_PATH and self._offers_pac
        if is_for_pac and request.method in ("GET", "HEAD"):
            self._state = _State.DECIDING
            return [ServePac()]
        if self._credentials is not None and not self._credentials.matches(request.login):
            return self._refuse_http(407, "this proxy asks for a user and a password")
        if request.target is None:
            return self._refuse_http(
                405 if is_for_pac else 404, "this is a proxy: set it as such in your program"
            )
        if request.body is None:
            return [self._open(request.target)]
        self._kind = ProxyKind.HTTP_FORWARD
        opened = self._open(request.target, request.body)
        return [
            Open(opened.target, opened.kind, request.head + opened.remaining, body=request.body)
        ]

    def _open(self, target: Target, body: RequestBody | None = None) -> Open:
        # never read as another request: whoever is refused is closed (RFC 9112 section 11.2)
        early = bytes(self._data)
        self._data.clear()
        self._state = _State.DECIDING
        return Open(target, self._kind, body.receive(early) if body is not None else early)

    def _refuse_socks(self, error: SocksError) -> list[Action]:
        actions: list[Action] = []
        if self._state is _State.REQUEST:
            actions.append(Reply(encode_reply(error.reply)))
        elif self._state is _State.REQUEST_4:
            actions.append(Reply(encode_reply_4(is_granted=False)))
        self._state = _State.DONE
        return [*actions, Close(str(error))]

    def _refuse_http(self, status: int, text: str) -> list[Action]:
        self._state = _State.DONE
        challenge = [_BASIC_CHALLENGE] if status == 407 else []
        answer = encode_response(status, f"{text}\n", fields=challenge, with_body=self._has_body)
        return [Reply(answer), Close(text)]

    # what became of it

    def opened(self, bound: tuple[str, int] | None = None) -> bytes:
        """The tunnel is open: what to write to the program before the target's bytes.

        ``bound``: the IP address and port from which the target is reached, if they are known.
        """
        self._decide()
        match self._kind:
            case ProxyKind.SOCKS5:
                return encode_reply(SocksReply.SUCCEEDED, *(bound or ()))
            case ProxyKind.SOCKS4:
                return encode_reply_4(is_granted=True)
            case ProxyKind.HTTP_CONNECT:
                return TUNNEL_OPENED
            case ProxyKind.HTTP_FORWARD:
                return b""
            case _:
                assert_never(self._kind)

    def associated(self, host: str, port: int) -> bytes:
        """Datagrams are relayed at ``host`` and ``port``: what to write to the program."""
        self._decide()
        return encode_reply(SocksReply.SUCCEEDED, host, port)

    def serve_pac(self, text: str) -> bytes:
        """What to write to the program before closing."""
        self._decide()
        return encode_response(200, text, media_type=PAC_MEDIA_TYPE, with_body=self._has_body)

    def failed(
        self, failure: OpenFailure, explanation: str = "", *, proxy_status: str = ""
    ) -> bytes:
        """It did not work: what to write to the program before closing.

        ``explanation`` is for the person who uses it; ``proxy_status`` what the gateway said,
        otherwise one of our own is made. Only HTTP can tell either.
        """
        self._decide()
        match self._kind:
            case ProxyKind.SOCKS5:
                return encode_reply(failure.reply)
            case ProxyKind.SOCKS4:
                return encode_reply_4(is_granted=False)
            case ProxyKind.HTTP_CONNECT | ProxyKind.HTTP_FORWARD:
                ours = encode_proxy_status(_PROXY_NAME, error=failure.error, details=explanation)
                is_clean = proxy_status.isascii() and proxy_status.isprintable()
                told = proxy_status if proxy_status and is_clean else ours
                text = explanation or failure.error.replace("_", " ")
                return encode_response(
                    failure.status,
                    f"{text}\n",
                    fields=[("Proxy-Status", told)],
                    with_body=self._has_body,
                )
            case _:
                assert_never(self._kind)

    def _decide(self) -> None:
        if self._state is not _State.DECIDING:
            raise LocalError("there is nothing to decide")
        self._state = _State.DONE
