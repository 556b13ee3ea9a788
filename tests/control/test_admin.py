"""What operators ask through the unix socket, and how they are answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toppy.control import admin as admin_module
from toppy.control import health as health_module
from toppy.control.admin import AdminError, admin_app
from toppy.control.health import serve_http
from toppy.control.rollouts import ReloadError
from toppy.control.upgrade import UpgradeError
from toppy.errors import ConfigError, ToppyError


class FakeOperations:
    """Notes what is asked; raises ``failure`` where there is one."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.failure: ToppyError | None = None

    def _answer(self, *asked: object) -> dict[str, Any]:
        self.asked.append(asked)
        if self.failure is not None:
            raise self.failure
        return {"asked": asked[0]}

    def status(self) -> dict[str, Any]:
        return self._answer("status")

    async def reload(self, *, policy_only: bool) -> dict[str, Any]:
        return self._answer("reload", policy_only)

    async def upgrade(self) -> dict[str, Any]:
        return self._answer("upgrade")

    def drain(self, what: str, timeout_s: float | None) -> dict[str, Any]:
        return self._answer("drain", what, timeout_s)

    async def connections(self) -> dict[str, Any]:
        return self._answer("connections")

    async def tunnels(self) -> dict[str, Any]:
        return self._answer("tunnels")

    async def kick(self, what: str) -> dict[str, Any]:
        return self._answer("kick", what)

    def stop(self) -> dict[str, Any]:
        return self._answer("stop")


@pytest.fixture
def operations() -> FakeOperations:
    return FakeOperations()


def ask(
    operations: FakeOperations, method: str, path: str, content: bytes | None = None
) -> httpx.Response:
    async def whole() -> httpx.Response:
        transport = httpx.ASGITransport(app=admin_app(operations))
        async with httpx.AsyncClient(transport=transport, base_url="http://toppy-gw") as client:
            return await client.request(method, path, content=content)

    return asyncio.run(whole())


@pytest.mark.parametrize(
    ("method", "path", "body", "asked"),
    [
        ("GET", "/status", None, ("status",)),
        ("POST", "/reload", b'{"policy_only": true}', ("reload", True)),
        ("POST", "/reload", b"{}", ("reload", False)),
        ("POST", "/reload", None, ("reload", False)),
        ("POST", "/upgrade", b"{}", ("upgrade",)),
        ("POST", "/drain", b'{"what": "s3"}', ("drain", "s3", None)),
        ("POST", "/drain", b'{"what": "g2", "timeout_s": 0}', ("drain", "g2", 0.0)),
        ("GET", "/connections", None, ("connections",)),
        ("GET", "/tunnels", None, ("tunnels",)),
        ("POST", "/kick", b'{"what": "alice"}', ("kick", "alice")),
        ("POST", "/stop", b"{}", ("stop",)),
    ],
)
def test_a_wish_is_handed_on_and_its_answer_is_json(
    operations: FakeOperations,
    method: str,
    path: str,
    body: bytes | None,
    asked: tuple[object, ...],
) -> None:
    answer = ask(operations, method, path, body)
    assert operations.asked == [asked]
    assert (answer.status_code, answer.json()) == (200, {"asked": asked[0]})
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "refusal",
    [
        (AdminError("there is no worker s9", status=404), 404),
        (AdminError("a timeout is not negative", status=400), 400),
        (AdminError("a reload is under way"), 409),
        (ReloadError("2 slots are needed and 0 are free"), 409),
        (UpgradeError("the new code does not come up"), 409),
        (ConfigError("gateway.toml: workers = 0: must be 1 or more", key="workers"), 409),
    ],
)
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/status", None),
        ("POST", "/reload", b"{}"),
        ("POST", "/upgrade", b"{}"),
        ("POST", "/drain", b'{"what": "s9"}'),
        ("GET", "/connections", None),
        ("GET", "/tunnels", None),
        ("POST", "/kick", b'{"what": "alice"}'),
        ("POST", "/stop", b"{}"),
    ],
)
def test_a_refusal_has_a_status_and_says_why(
    refusal: tuple[ToppyError, int], method: str, path: str, body: bytes | None
) -> None:
    operations = FakeOperations()
    operations.failure, status = refusal
    answer = ask(operations, method, path, body)
    assert (answer.status_code, answer.json()) == (status, {"error": str(refusal[0])})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/drain", b"{}"),
        ("/drain", b'{"what": 3}'),
        ("/drain", b'{"what": "s3", "timeout_s": "soon"}'),
        ("/drain", b'{"what": "s3", "timeout_s": NaN}'),
        ("/drain", b'{"what": "s3", "timeout": 3}'),
        ("/kick", b'["alice"]'),
        ("/kick", b'{"what": null}'),
        ("/kick", b'{"what": "\xff"}'),
        ("/kick", b"[" * 4000),
        ("/kick", b'{"what":'),
        ("/reload", b'{"policy_only": 1}'),
        ("/reload", b'{"policy": true}'),
        ("/kick", b'{"what": "%s"}' % (b"a" * 5000)),
    ],
)
def test_a_request_that_is_not_understood_is_400_and_does_nothing(
    operations: FakeOperations, path: str, body: bytes
) -> None:
    answer = ask(operations, "POST", path, body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("the request is")
    assert operations.asked == []


@given(path=st.sampled_from(["/reload", "/drain", "/kick"]), body=st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_body_is_a_wish_or_400(path: str, body: bytes) -> None:
    assert ask(FakeOperations(), "POST", path, body).status_code in (200, 400)


@pytest.mark.parametrize("path", ["/", "/status/more", "/metrics", "/admin"])
def test_anything_else_is_404(operations: FakeOperations, path: str) -> None:
    answer = ask(operations, "GET", path)
    assert answer.status_code == 404
    assert answer.json()["error"].startswith(f"there is no {path} here")


@pytest.mark.parametrize("path", ["/reload", "/upgrade", "/drain", "/kick", "/stop"])
def test_reading_changes_nothing(operations: FakeOperations, path: str) -> None:
    answer = ask(operations, "GET", path)
    assert answer.status_code == 405
    assert answer.json() == {"error": f"{path} is asked for with POST, not with GET"}
    assert operations.asked == []


def test_what_is_only_read_is_not_to_be_written(operations: FakeOperations) -> None:
    answer = ask(operations, "POST", "/status")
    assert answer.json() == {"error": "/status is asked for with GET, not with POST"}


def test_a_long_request_is_refused_before_it_has_come(operations: FakeOperations) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield bytes(1000)

    async def whole() -> httpx.Response:
        transport = httpx.ASGITransport(app=admin_app(operations))
        async with httpx.AsyncClient(transport=transport, base_url="http://toppy-gw") as client:
            return await client.post("/drain", content=endless())

    answer = asyncio.run(whole())
    assert (answer.status_code, answer.json()) == (400, {"error": "the request is too long"})
    assert sent <= 6000
    assert operations.asked == []


def test_a_request_that_does_not_go_on_is_given_up(
    operations: FakeOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_module, "_BODY_DEADLINE_S", 0.01)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def whole() -> httpx.Response:
        transport = httpx.ASGITransport(app=admin_app(operations))
        async with httpx.AsyncClient(transport=transport, base_url="http://toppy-gw") as client:
            return await client.post("/kick", content=stalled())

    answer = asyncio.run(whole())
    assert answer.status_code == 400
    assert "not complete" in answer.json()["error"]
    assert operations.asked == []


def on_a_socket(
    operations: FakeOperations,
    directory: Path,
    scenario: Callable[[httpx.AsyncClient], Coroutine[None, None, None]],
) -> None:
    async def whole() -> None:
        path = directory / "admin.sock"
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        serving = asyncio.create_task(serve_http(admin_app(operations), sock, is_public=False))
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        try:
            async with (
                asyncio.timeout(10),
                httpx.AsyncClient(transport=transport, base_url="http://toppy-gw") as client,
            ):
                while True:
                    with contextlib.suppress(httpx.ConnectError):
                        await client.get("/none")
                        break
                    await asyncio.sleep(0.01)
                await scenario(client)
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    asyncio.run(whole())


def test_it_is_served_on_a_unix_socket(operations: FakeOperations, tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.get("/status")).json() == {"asked": "status"}
        assert "server" not in (await client.get("/status")).headers

    on_a_socket(operations, tmp_path, scenario)


def test_who_connects_and_asks_nothing_is_let_go_and_who_waits_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "_CONNECTION_LIFETIME_S", 0.05)
    may_end = asyncio.Event()

    class Slow(FakeOperations):
        async def reload(self, *, policy_only: bool) -> dict[str, Any]:
            await may_end.wait()
            return await super().reload(policy_only=policy_only)

    async def scenario(client: httpx.AsyncClient) -> None:
        reloading = asyncio.create_task(client.post("/reload", json={}))
        await client.get("/status")
        with contextlib.suppress(ConnectionResetError):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "admin.sock")
            writer.write(b"GET /status HTTP/1.1\r\nHost: ")
            assert await reader.read() == b""
            writer.close()
        assert not reloading.done()
        may_end.set()
        assert (await reloading).json() == {"asked": "reload"}

    on_a_socket(Slow(), tmp_path, scenario)


def test_a_wish_that_takes_its_time_holds_no_other_up(tmp_path: Path) -> None:
    may_end = asyncio.Event()

    class Slow(FakeOperations):
        async def reload(self, *, policy_only: bool) -> dict[str, Any]:
            await may_end.wait()
            return await super().reload(policy_only=policy_only)

    async def scenario(client: httpx.AsyncClient) -> None:
        reloading = asyncio.create_task(client.post("/reload", json={}))
        assert (await client.get("/status")).status_code == 200
        assert not reloading.done()
        may_end.set()
        assert (await reloading).json() == {"asked": "reload"}

    on_a_socket(Slow(), tmp_path, scenario)
