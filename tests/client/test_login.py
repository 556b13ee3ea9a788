"""Logging in and out: the whole conversation, against a provider in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest

from tests.net.oidc_provider import ISSUER, NOW, FakeProvider, sign
from toppy.auth.login_flow import challenge_of
from toppy.auth.oidc import Client, DeviceAuthorization, OidcError
from toppy.client import login as login_module
from toppy.client.login import Outcome, log_in, log_out
from toppy.client.token_store import TokenStore
from toppy.client.tokens import LoginSettings
from toppy.errors import ConfigError

T = TypeVar("T")
GOOD = {"token_type": "Bearer", "expires_in": 600, "refresh_token": "refresh"}


class FakeDesk:
    def __init__(self) -> None:
        self.codes: list[str] = []
        self.urls: list[str] = []
        self.warnings: list[str] = []
        self.opened = asyncio.Event()

    def show_code(self, authorization: DeviceAuthorization) -> None:
        self.codes.append(authorization.user_code)

    def open_browser(self, url: str) -> None:
        self.urls.append(url)
        self.opened.set()

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Scene:
    def __init__(self, folder: Path, flow: Any = "device", **settings: Any) -> None:
        self.provider = FakeProvider()
        self.provider.device["interval"] = 1
        self.desk = FakeDesk()
        self.settings = LoginSettings(
            flow,
            ISSUER,
            settings.pop("client", Client("toppy", "openid offline_access", "urn:gw")),
            folder / "token.json",
            folder / "key",
            "device",
            **settings,
        )
        self.store = TokenStore(self.settings.path, key_path=self.settings.key_path)

    def log_in(self) -> Coroutine[Any, Any, Outcome]:
        return log_in(
            self.settings,
            self.store,
            self.desk,
            connect=self.provider.connect,
            clock=lambda: NOW,
        )


def answer(**changes: Any) -> dict[str, Any]:
    claims = {"iss": ISSUER, "aud": "toppy", "sub": "alice", "exp": NOW + 600, "iat": NOW}
    found = {
        **GOOD,
        "access_token": sign(iss=ISSUER, aud="urn:gw", sub="alice", exp=NOW + 600),
        "id_token": sign(**claims),
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def always(found: dict[str, Any], form: dict[str, str]) -> tuple[int, dict[str, Any]]:
    return 200, found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between polls take no time; how long they would have been."""
    waits: list[float] = []
    clock = [0.0]

    async def sleep(seconds: float) -> None:
        waits.append(round(seconds, 3))
        clock[0] += max(seconds, 0.0)

    class Loop:
        def time(self) -> float:
            return clock[0]

    class Asyncio:
        Event, timeout, to_thread = asyncio.Event, asyncio.timeout, asyncio.to_thread
        get_running_loop = staticmethod(Loop)

    Asyncio.sleep = staticmethod(sleep)  # type: ignore[attr-defined]
    monkeypatch.setattr(login_module, "asyncio", Asyncio)
    return waits


def test_a_device_login_polls_slows_down_and_keeps_the_tokens(
    tmp_path: Path, quick: list[float]
) -> None:
    scene = Scene(tmp_path)
    answers = [
        (400, {"error": "authorization_pending"}),
        (400, {"error": "slow_down"}),
        (503, {}),
        (200, answer()),
    ]
    scene.provider.tokens = lambda form: answers.pop(0)
    outcome = asyncio.run(scene.log_in())
    assert scene.desk.codes == ["ABCD-EFGH"]
    assert quick == [1, 1, 6, 12]
    assert (outcome.tokens.subject, outcome.protection) == ("alice", "device")
    assert outcome.tokens.expires_at == NOW + 600
    assert scene.store.load() == outcome.tokens
    assert scene.desk.warnings == []
    form = scene.provider.asked[-2][1]
    assert (form["device_code"], form["client_id"]) == ("the-device-code", "toppy")
    assert form["resource"] == "urn:gw"


@pytest.mark.parametrize(
    ("code", "why"),
    [("access_denied", "denied"), ("expired_token", "in time"), ("invalid_client", "invalid_c")],
)
def test_a_device_login_that_ends_says_why(
    tmp_path: Path, quick: list[float], code: str, why: str
) -> None:
    scene = Scene(tmp_path)
    scene.provider.tokens = lambda form: (400, {"error": code})
    with pytest.raises(OidcError, match=why):
        asyncio.run(scene.log_in())
    assert scene.store.load() is None


def test_a_device_code_that_nobody_uses_expires(tmp_path: Path, quick: list[float]) -> None:
    scene = Scene(tmp_path)
    scene.provider.tokens = lambda form: (400, {"error": "authorization_pending"})
    with pytest.raises(OidcError, match="in time"):
        asyncio.run(scene.log_in())
    assert sum(quick) == 60


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"id_token": None}, "no ID token"),
        ({"id_token": sign(iss=ISSUER, aud="x", sub="a", exp=NOW + 600)}, "aud"),
        ({"id_token": sign(iss="https://x", aud="toppy", sub="a", exp=NOW + 600)}, "iss"),
        ({"id_token": sign(iss=ISSUER, aud="toppy", sub="a", exp=NOW - 61)}, "expired"),
        ({"access_token": "a b"}, "access token"),
    ],
)
def test_tokens_that_are_not_good_are_not_kept(
    tmp_path: Path, quick: list[float], changes: dict[str, Any], why: str
) -> None:
    scene = Scene(tmp_path)
    scene.provider.tokens = lambda form: (200, answer(**changes))
    with pytest.raises(OidcError, match=why):
        asyncio.run(scene.log_in())
    assert scene.store.load() is None


def test_what_will_not_work_at_the_gateway_is_warned_of(tmp_path: Path, quick: list[float]) -> None:
    for changes, why in (
        ({"access_token": "opaque"}, "no JWT"),
        ({"access_token": sign(aud="other")}, "not for 'urn:gw'"),
        ({"refresh_token": None}, "no refresh token"),
    ):
        scene = Scene(tmp_path)
        found = answer(**changes)
        scene.provider.tokens = partial(always, found)
        asyncio.run(scene.log_in())
        (warning,) = scene.desk.warnings
        assert why in warning


def test_a_provider_without_device_login_is_told_so(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.provider.lacks = ("device_authorization_endpoint",)
    with pytest.raises(OidcError, match="oidc_auth_code_pkce"):
        asyncio.run(scene.log_in())


# by browser, with a real loopback listener


async def by_browser(scene: Scene, *visits: dict[str, Any]) -> tuple[Outcome, list[int]]:
    """Log in; the browser comes to the redirect address with each of ``visits``."""
    task = asyncio.create_task(scene.log_in())
    await asyncio.wait(
        {task, asyncio.create_task(scene.desk.opened.wait())}, return_when="FIRST_COMPLETED"
    )
    statuses = []
    if scene.desk.urls:
        asked = parse_qs(urlsplit(scene.desk.urls[0]).query)
        uri = asked["redirect_uri"][0]
        async with httpx.AsyncClient(trust_env=False) as browser:
            for visit in visits:
                found = {"state": asked["state"][0], "iss": ISSUER, **visit}
                path = found.pop("path", "")
                page = await browser.get(f"{uri}{path}?{urlencode(found)}")
                statuses.append(page.status_code)
    return await task, statuses


def browser_scene(folder: Path, uri: str = "http://127.0.0.1:0/callback") -> Scene:
    scene = Scene(folder, "code", redirect_uri=uri)

    def tokens(form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        asked = parse_qs(urlsplit(scene.desk.urls[0]).query)
        assert challenge_of(form["code_verifier"]) == asked["code_challenge"][0]
        assert form["redirect_uri"] == asked["redirect_uri"][0]
        if form["code"] != "good":
            return 400, {"error": "invalid_grant"}
        claims = {"iss": ISSUER, "aud": "toppy", "sub": "alice", "exp": NOW + 600}
        return 200, answer(id_token=sign(**claims, nonce=asked["nonce"][0]))

    scene.provider.tokens = tokens
    return scene


def test_a_browser_login_brings_tokens_whatever_else_the_browser_asks_for(tmp_path: Path) -> None:
    scene = browser_scene(tmp_path)
    outcome, statuses = asyncio.run(
        by_browser(scene, {"path": "/x", "code": "good"}, {"code": "good"})
    )
    assert statuses == [404, 200]
    assert outcome.tokens.subject == "alice"
    assert scene.store.load() == outcome.tokens


@pytest.mark.parametrize(
    ("visit", "why"),
    [
        ({"code": "good", "state": "forged"}, "state"),
        ({"code": "good", "iss": "https://x"}, "iss"),
        ({"error": "access_denied"}, "access_denied"),
        ({"code": "bad"}, "invalid_grant"),
    ],
)
def test_a_browser_login_that_fails_keeps_nothing(
    tmp_path: Path, visit: dict[str, Any], why: str
) -> None:
    scene = browser_scene(tmp_path)
    with pytest.raises(OidcError, match=why):
        asyncio.run(by_browser(scene, visit))
    assert scene.store.load() is None


def test_a_browser_that_never_comes_ends_the_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login_module, "CODE_TIMEOUT_S", 0.01)
    with pytest.raises(OidcError, match="nobody logged in"):
        asyncio.run(by_browser(browser_scene(tmp_path)))


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    async def run() -> None:
        taken = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = taken.sockets[0].getsockname()[1]
        async with taken:
            await browser_scene(tmp_path, f"http://127.0.0.1:{port}/callback").log_in()

    with pytest.raises(ConfigError, match=r"redirect_uri.*choose a free port"):
        asyncio.run(run())


# logging out


def test_logging_out_forgets_the_tokens_and_ends_them_at_the_provider(
    tmp_path: Path, quick: list[float]
) -> None:
    scene = Scene(tmp_path)
    scene.provider.tokens = lambda form: (200, answer())
    outcome = asyncio.run(scene.log_in())

    def out() -> bool:
        return asyncio.run(
            log_out(
                scene.settings,
                scene.store,
                scene.desk,
                tokens=outcome.tokens,
                connect=scene.provider.connect,
            )
        )

    assert out()
    assert scene.store.load() is None
    assert scene.provider.asked[-1] == (
        "/revoke",
        {"token": "refresh", "token_type_hint": "refresh_token", "client_id": "toppy"},
    )
    scene.provider.is_down = True
    assert not out()
    assert "was not told" in scene.desk.warnings[0]
