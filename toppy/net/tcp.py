"""TCP sockets: listening, connecting to whichever address answers first, and ending by a reset.

All are non-blocking. Both ends of a relay send at once (TCP_NODELAY): whoever wrote the bytes has
already decided how to group them. Dead peers are found by keep-alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from toppy.errors import TargetError
from toppy.model.target import Target

ATTEMPT_DELAY_S: Final = 0.25
"""Between the beginnings of two connection attempts (RFC 8305 section 5)."""
KEEP_ALIVE_IDLE_S: Final = 60
KEEP_ALIVE_INTERVAL_S: Final = 15
KEEP_ALIVE_PROBES: Final = 4
"""A peer that is gone is noticed after two minutes."""
_BACKLOG = 1024
"""Connections that wait to be accepted; the kernel caps it at net.core.somaxconn."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds

_UNROUTABLE = frozenset(
    {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
)


def listen_tcp(host: str, port: int) -> socket.socket:
    """A socket that listens on a numeric address; IPv6 ones are IPv6 only. Raises ``OSError``."""
    found = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST
    )
    family, _, _, _, address = found[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        # a restart must not wait for connections of the last run that are in TIME_WAIT
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def prepare_tcp(sock: socket.socket) -> None:
    """Options of every relayed connection: no waiting for more to send, and keep-alive."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEP_ALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEP_ALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEP_ALIVE_PROBES),
    ):
        option = getattr(socket, name, None)  # not everywhere
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def reset_tcp(sock: socket.socket) -> None:
    """Close with a reset: the peer learns that this is no ordinary end."""
    with contextlib.suppress(OSError):  # it is not connected (any more)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    sock.close()


def in_turns(addresses: Iterable[str]) -> list[str]:
    """Numeric addresses in the order of attempts: families take turns, the first one's begins (RFC
    8305 section 4).
    """
    by_version: dict[int, list[str]] = {}
    for address in dict.fromkeys(addresses):
        by_version.setdefault(ipaddress.ip_address(address).version, []).append(address)
    lists = list(by_version.values())
    longest = max(map(len, lists), default=0)
    return [found[index] for index in range(longest) for found in lists if index < len(found)]


async def connect_tcp(
    addresses: Sequence[str],
    port: int,
    *,
    timeout_s: float,
    attempt_delay_s: float = ATTEMPT_DELAY_S,
) -> socket.socket:
    """Connect to the first of the numeric ``addresses`` that answers (Happy Eyeballs, RFC 8305).

    An attempt that fails, or does not answer within ``attempt_delay_s``, is joined by the next.
    ``timeout_s`` is for all together. Raises ``TargetError`` with the status and Proxy-Status that
    fit the most telling failure.
    """
    failures: list[OSError] = []
    attempts: set[asyncio.Task[socket.socket]] = set()
    waiting = in_turns(addresses)[::-1]
    try:
        async with asyncio.timeout(timeout_s):
            while waiting or attempts:
                if waiting:
                    attempts.add(asyncio.create_task(_connect(waiting.pop(), port)))
                done, attempts = await asyncio.wait(
                    attempts,
                    timeout=attempt_delay_s if waiting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for attempt in done:
                    error = attempt.exception()
                    if error is None:
                        attempts |= done - {attempt}
                        return attempt.result()
                    if not isinstance(error, OSError):
                        raise error
                    failures.append(error)
    except TimeoutError:
        raise TargetError(
            f"port {port} of the target did not answer within {timeout_s:g} s; is it up, and does "
            "a firewall drop the packets?",
            status=504,
            proxy_status="connection_timeout",
        ) from None
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_late)
    raise connect_error(failures)


def _close_late(attempt: asyncio.Task[socket.socket]) -> None:
    """Another attempt was faster."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


async def _connect(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        prepare_tcp(sock)
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def connect_error(failures: Sequence[OSError]) -> TargetError:
    """What to tell when every attempt failed: a refusal before a timeout before no route."""

    def matches(*numbers: int) -> OSError | None:
        return next((error for error in failures if error.errno in numbers), None)

    if matches(errno.ECONNREFUSED, errno.ECONNRESET):
        return TargetError(
            "the target refused the connection; does anything listen there?",
            status=502,
            proxy_status="connection_refused",
        )
    if matches(errno.ETIMEDOUT):
        return TargetError(
            "the target did not answer; is it up, and does a firewall drop the packets?",
            status=504,
            proxy_status="connection_timeout",
        )
    unroutable = matches(*_UNROUTABLE)
    if unroutable or not failures:
        why = unroutable.strerror if unroutable else "it has no address"
        return TargetError(
            f"no way to the target: {why}", status=502, proxy_status="destination_ip_unroutable"
        )
    return TargetError(
        f"no connection to the target: {failures[0].strerror or failures[0]}",
        status=502,
        proxy_status="destination_unavailable",
    )


def peer_of(sock: socket.socket) -> str:
    """``HOST:PORT`` of the other end, for logs; empty when it has gone."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return ""
    return str(Target(host, port))
