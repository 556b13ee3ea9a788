"""Waits on a loopback address for the browser to come back from the provider (RFC 8252)."""

from __future__ import annotations

import asyncio
import contextlib
import html
from collections.abc import Callable
from types import TracebackType

from toppy.auth.login_flow import Redirect, Reply
from toppy.errors import ConfigError
from toppy.model.target import Target

_MAX_REQUEST_BYTES = 16 * 1024
_REQUEST_TIMEOUT_S = 5.0
_MAX_CONNECTIONS = 16
_DRAIN_S = 1.0
_PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    410: "Gone",
    503: "Service Unavailable",
}


class RedirectServer:
    """An HTTP server with one page. An async context manager.

    ``answer(method, target)`` decides about each request; connections end after one.
    """

    def __init__(self, redirect: Redirect) -> None:
        self._redirect = redirect
        self._answer: Callable[[str, str], Reply] = lambda method, target: Reply(503, "Not ready.")
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> RedirectServer:
        """Raises ``ConfigError`` when the address is taken."""
        host, port = self._redirect.host, self._redirect.port
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, limit=_MAX_REQUEST_BYTES
            )
        except OSError as error:
            raise ConfigError(
                f"auth.redirect_uri: cannot listen on {Target(host, port)}: "
                f"{error.strerror or error}; choose a free port",
                key="auth.redirect_uri",
            ) from None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()

    @property
    def uri(self) -> str:
        """Where the browser is to come, with the port that was taken."""
        port = self._server.sockets[0].getsockname()[1]
        return f"http://{Target(self._redirect.host, port)}{self._redirect.path}"

    def serve(self, answer: Callable[[str, str], Reply]) -> None:
        """Let ``answer`` decide from now on."""
        self._answer = answer

    async def drain(self) -> None:
        """Until the answers under way are sent, so that the browser shows how it ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await self._idle.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        self._idle.clear()
        try:
            if self._open > _MAX_CONNECTIONS:
                reply = Reply(503, "Too many connections.")
            else:
                reply = await self._receive(reader)
            writer.write(_encode(reply))
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                await writer.drain()
        except (OSError, TimeoutError):
            pass  # the browser went away
        finally:
            writer.close()
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _receive(self, reader: asyncio.StreamReader) -> Reply:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            return Reply(400, "This is no HTTP request.")
        words = head.split(b"\r\n", 1)[0].decode("ascii", "replace").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return Reply(400, "This is no HTTP request.")
        return self._answer(words[0], words[1])


def _encode(reply: Reply) -> bytes:
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>toppy</title>'
        f"<p>{html.escape(reply.text)}</p></html>\n"
    ).encode()
    head = (
        f"HTTP/1.1 {reply.status} {_PHRASES[reply.status]}\r\n"
        "Content-Type: text/html; charset=utf-8\r\n"
        f"Content-Length: {len(page)}\r\n"
        "Cache-Control: no-store\r\n"
        "Referrer-Policy: no-referrer\r\n"
        "Content-Security-Policy: default-src 'none'\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + page
