"""Health and metrics over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine

import httpx
import pytest

from toppy.control import health
from toppy.control.health import health_app, serve_http


def serve(
    scenario: Callable[[int], Coroutine[None, None, None]], *, is_healthy: bool = True
) -> None:
    """Run a scenario, given the port of a health server."""

    async def whole() -> None:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        app = health_app(
            lambda: is_healthy,
            lambda: b"toppy_gw_pings_total 1.0\n",
            lambda: {"certificate_days_left": 12},
        )
        serving = asyncio.create_task(serve_http(app, sock))
        try:
            async with asyncio.timeout(10):
                await scenario(sock.getsockname()[1])
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    asyncio.run(whole())


async def get(port: int, path: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"http://127.0.0.1:{port}{path}")


def test_a_healthy_gateway_says_ok() -> None:
    async def scenario(port: int) -> None:
        answer = await get(port, "/healthz")
        assert answer.status_code == 200
        assert answer.json() == {"status": "ok"}
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers

    serve(scenario)


def test_who_asks_for_more_is_told_how_long_the_certificate_lasts() -> None:
    async def scenario(port: int) -> None:
        answer = await get(port, "/healthz?verbose")
        assert answer.json() == {"status": "ok", "certificate_days_left": 12}

    serve(scenario)


def test_a_gateway_that_does_not_serve_yet_says_so() -> None:
    async def scenario(port: int) -> None:
        assert (await get(port, "/healthz")).status_code == 503

    serve(scenario, is_healthy=False)


def test_metrics_are_prometheus_text() -> None:
    async def scenario(port: int) -> None:
        answer = await get(port, "/metrics")
        assert answer.text == "toppy_gw_pings_total 1.0\n"
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"

    serve(scenario)


@pytest.mark.parametrize("path", ["/", "/status", "/healthz/more", "/metrics.json"])
def test_anything_else_is_404(path: str) -> None:
    async def scenario(port: int) -> None:
        assert (await get(port, path)).status_code == 404

    serve(scenario)


def test_a_connection_that_never_asks_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_CONNECTION_LIFETIME_S", 0.05)

    async def scenario(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert (await get(port, "/healthz")).status_code == 200

    serve(scenario)


def test_garbage_is_answered_as_such() -> None:
    async def scenario(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01" + bytes(100) + b"\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()
        await writer.wait_closed()

    serve(scenario)
