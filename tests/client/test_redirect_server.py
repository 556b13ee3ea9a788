"""The page that the browser comes back to."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from toppy.auth.login_flow import Redirect, Reply
from toppy.client.redirect_server import RedirectServer


async def ask(data: bytes, text: str = "hello") -> bytes:
    async with RedirectServer(Redirect("127.0.0.1", 0, "/callback")) as server:
        server.serve(lambda method, target: Reply(200, f"{text} {method} {target}"))
        port = urlsplit(server.uri).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        if not data:
            writer.write_eof()
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        await server.drain()
        return answer


def test_a_request_is_answered_and_the_connection_ends() -> None:
    answer = asyncio.run(ask(b"GET /callback?x=1 HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"hello GET /callback?x=1" in answer
    assert b"Cache-Control: no-store" in answer


def test_nothing_that_comes_back_is_markup() -> None:
    answer = asyncio.run(ask(b"GET /<script>alert(1)</script> HTTP/1.1\r\n\r\n", "<b>"))
    assert b"<script>" not in answer
    assert b"<b>" not in answer


@pytest.mark.parametrize(
    "data", [b"", b"\r\n\r\n", b"GET /\r\n\r\n", b"\xff" * 40_000, b"A B C D\r\n\r\n"]
)
def test_what_is_no_request_is_400(data: bytes) -> None:
    assert asyncio.run(ask(data)).startswith(b"HTTP/1.1 400 ")


def test_the_address_has_the_port_that_was_taken() -> None:
    async def run() -> str:
        async with RedirectServer(Redirect("::1", 0, "/cb")) as server:
            return server.uri

    assert asyncio.run(run()).startswith("http://[::1]:")
