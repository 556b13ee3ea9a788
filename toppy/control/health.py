"""What the control plane answers over HTTP: health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

_NO_STORE = {"cache-control": "no-store"}
_MAX_CONNECTIONS = 512
"""More are answered 503."""
_CONNECTION_LIFETIME_S = 10.0
"""Longer than any answer takes; a client that stays connects again."""


def health_app(
    is_healthy: Callable[[], bool],
    metrics: Callable[[], bytes],
    details: Callable[[], dict[str, Any]] = dict,
) -> Starlette:
    """``/healthz`` (T-061) and ``/metrics``; everything else is 404. ``/healthz?verbose`` has
    ``details`` beside the status.
    """

    async def healthz(request: Request) -> Response:
        more = details() if "verbose" in request.query_params else {}
        if is_healthy():
            return JSONResponse({"status": "ok", **more}, headers=_NO_STORE)
        return JSONResponse({"status": "starting", **more}, status_code=503, headers=_NO_STORE)

    async def render(_: Request) -> Response:
        return Response(
            metrics(),
            headers=_NO_STORE,
            media_type="text/plain; version=0.0.4; charset=utf-8",
        )

    return Starlette(routes=[Route("/healthz", healthz), Route("/metrics", render)])


class _BriefProtocol(H11Protocol):
    """Ends every connection after a while, so that those who never ask cannot take all places."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_CONNECTION_LIFETIME_S, transport.abort)


class _PatientProtocol(H11Protocol):
    """The same for those who ask for what takes its time: they have it until they are answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_CONNECTION_LIFETIME_S, self._end_unless_busy)

    def _end_unless_busy(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:
            self.loop.call_later(_CONNECTION_LIFETIME_S, self._end_unless_busy)


class _Server(uvicorn.Server):
    """Leaves signals to the control plane."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_http(app: Starlette, sock: socket.socket, *, is_public: bool = True) -> None:
    """Serve ``app`` on a bound socket until cancelled; ``is_public``: to whoever comes."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        http=_BriefProtocol if is_public else _PatientProtocol,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=5,
        h11_max_incomplete_event_size=8192,
    )
    server = _Server(config)
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        server.should_exit = True
        server.force_exit = True
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(task, 1.0)
        raise
