"""Names to addresses by this host's own resolver, with a deadline that also holds at exit.

The event loop's executor would keep a process that stops waiting for a silent name server; a
daemon thread does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Callable

from toppy.quic.engine import Address

LOOKUP_TIMEOUT_S = 3.0
MAX_ADDRESSES = 8
"""Of one name; further ones are not tried."""


class NameLookupError(Exception):
    """The name has no address here; the text says why."""


_Answer = list[Address] | NameLookupError


async def look_up(host: str, port: int, timeout_s: float = LOOKUP_TIMEOUT_S) -> list[Address]:
    """Addresses of ``host`` in the order to try, at most ``MAX_ADDRESSES``.

    Raises ``NameLookupError``.
    """
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[_Answer] = loop.create_future()

    def settle(answer: _Answer) -> None:
        if not answered.done():
            answered.set_result(answer)

    def report(answer: _Answer) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, answer)

    _start(host, port, report)
    try:
        async with asyncio.timeout(timeout_s):
            return _addresses(await answered)
    except TimeoutError:
        raise NameLookupError("no answer in time") from None


def look_up_now(host: str, port: int, timeout_s: float = LOOKUP_TIMEOUT_S) -> list[Address]:
    """The same where there is no event loop. Raises ``NameLookupError``."""
    answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
    _start(host, port, answers.put)
    try:
        return _addresses(answers.get(timeout=timeout_s))
    except queue.Empty:
        raise NameLookupError("no answer in time") from None


def _addresses(answer: _Answer) -> list[Address]:
    if isinstance(answer, NameLookupError):
        raise answer
    return answer


def _start(host: str, port: int, report: Callable[[_Answer], None]) -> None:
    def work() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except OSError as error:
            report(NameLookupError(error.strerror or str(error)))
        except UnicodeError:  # a label that no DNS message can carry
            report(NameLookupError("it is no host name"))
        else:
            addresses = dict.fromkeys((str(info[4][0]), int(info[4][1])) for info in found)
            report(list(addresses)[:MAX_ADDRESSES])

    threading.Thread(target=work, name="name lookup", daemon=True).start()
