"""Tokens that are renewed in time: by a command that starts, and by one that goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.control.virtual_time import run_in_virtual_time
from tests.net.oidc_provider import ISSUER, NOW, FakeProvider
from toppy.auth.oidc import Client, ProviderUnreachableError
from toppy.auth.token_cache import CachedTokens, Protection, TokenCacheError, encode_plain
from toppy.client.settings import LoadedClientConfig
from toppy.client.token_store import TokenStore
from toppy.client.tokens import (
    Login,
    LoginRequiredError,
    LoginSettings,
    login_settings,
    token_source,
)
from toppy.config.client import parse_client_config
from toppy.errors import ConfigError

T = TypeVar("T")


async def at_once(call: Callable[[], T], /) -> T:
    return call()


@dataclass
class World:
    """One login with a provider in memory; tokens live for ten minutes."""

    folder: Path
    provider: FakeProvider = field(default_factory=FakeProvider)
    now: float = NOW
    count: int = 0
    refusal: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self.provider.tokens = self._refresh
        self.settings = LoginSettings(
            "device",
            ISSUER,
            Client("toppy", "openid offline_access"),
            self.folder / "token.json",
            self.folder / "key",
            "device",
        )

    def _refresh(self, form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        assert form["grant_type"] == "refresh_token"
        if self.refusal is not None:
            return 400, self.refusal
        if form["refresh_token"] != f"refresh-{self.count}":
            return 400, {"error": "invalid_grant"}  # each works once
        self.count += 1
        return 200, {
            "access_token": f"access-{self.count}",
            "refresh_token": f"refresh-{self.count}",
            "token_type": "Bearer",
            "expires_in": 600,
        }

    def store(self) -> TokenStore:
        return TokenStore(self.settings.path, key_path=self.settings.key_path, keyring=lambda: None)

    def login(self) -> Login:
        return Login(
            self.settings,
            self.store(),
            clock=lambda: self.now,
            connect=self.provider.connect,
            offload=at_once,
        )

    def tokens(self, **changes: Any) -> CachedTokens:
        fields = {
            "issuer": ISSUER,
            "client_id": "toppy",
            "audience": None,
            "access_token": "access-0",
            "refresh_token": "refresh-0",
            "token_type": "Bearer",
            "scope": None,
            "issued_at": NOW,
            "expires_at": NOW + 600,
        }
        return CachedTokens(**(fields | changes))

    def keep(self, **changes: Any) -> None:
        self.store().save(self.tokens(**changes), Protection.DEVICE)

    def current(self) -> str:
        return asyncio.run(self.login().current()).access_token


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_fresh_token_is_used_without_asking_anybody(world: World) -> None:
    world.keep()
    assert world.current() == "access-0"
    assert not world.provider.asked


def test_a_token_that_ends_soon_is_renewed_and_kept(world: World) -> None:
    world.keep()
    world.now = NOW + 545
    assert world.current() == "access-1"
    kept = world.store().load()
    assert kept is not None
    assert (kept.refresh_token, kept.expires_at) == ("refresh-1", NOW + 1145)
    assert world.current() == "access-1"
    assert world.provider.paths().count("/token") == 1


def test_of_many_programs_at_once_one_renews(world: World) -> None:
    world.keep()
    world.now = NOW + 545

    async def run() -> list[CachedTokens]:
        return await asyncio.gather(*(world.login().current() for _ in range(5)))

    assert {tokens.access_token for tokens in asyncio.run(run())} == {"access-1"}
    assert world.provider.paths().count("/token") == 1


def test_nobody_logged_in_is_said(world: World) -> None:
    with pytest.raises(LoginRequiredError, match="toppy login"):
        world.current()
    world.keep(client_id="another")
    with pytest.raises(LoginRequiredError, match="toppy login"):
        world.current()


def test_a_login_that_the_provider_ended_is_said(world: World) -> None:
    world.keep()
    world.now = NOW + 601
    world.refusal = {"error": "invalid_grant"}
    with pytest.raises(LoginRequiredError, match="does not renew"):
        world.current()
    world.keep(refresh_token=None)
    with pytest.raises(LoginRequiredError, match="offline_access"):
        world.current()


def test_while_the_provider_is_down_a_token_serves_to_its_end(world: World) -> None:
    world.keep()
    world.provider.is_down = True
    world.now = NOW + 599
    assert world.current() == "access-0"
    world.now = NOW + 600
    with pytest.raises(ProviderUnreachableError):
        world.current()
    world.provider.is_down = False
    assert world.current() == "access-1"


def test_a_plain_cache_is_read_once_and_encrypted(world: World) -> None:
    world.settings.path.write_bytes(encode_plain(world.tokens()))
    assert world.current() == "access-0"
    assert b"access-0" not in world.settings.path.read_bytes()
    assert world.current() == "access-0"
    assert not world.provider.asked


def test_a_renewal_keeps_the_protection_that_the_file_has(world: World) -> None:
    world.keep()
    world.now = NOW + 545
    login = world.login()
    asyncio.run(login.current())
    store = world.store()
    store.load()
    assert store.protection is Protection.DEVICE


def test_who_is_interrupted_while_renewing_keeps_what_the_provider_gave(world: World) -> None:
    world.keep()
    world.now = NOW + 545

    async def run() -> None:
        task = asyncio.ensure_future(world.login().current())
        while "/token" not in world.provider.paths():  # noqa: ASYNC110  # it sets no event
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    kept = world.store().load()
    assert kept is not None
    assert kept.refresh_token == "refresh-1"


# a command that goes on


class Watch:
    """Runs ``keep_fresh`` while the clock of the world is that of the loop."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.renewed: list[tuple[float, str]] = []
        self.problems: list[tuple[float, str]] = []

    def run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def both() -> None:
            loop = asyncio.get_running_loop()
            login = Login(
                self.world.settings,
                self.world.store(),
                clock=lambda: NOW + loop.time(),
                connect=self.world.provider.connect,
                offload=at_once,
            )
            await login.current()
            task = loop.create_task(
                login.keep_fresh(
                    lambda t: self.renewed.append((loop.time(), t.access_token)),
                    lambda problem: self.problems.append((loop.time(), problem)),
                )
            )
            await main()
            task.cancel()
            await asyncio.wait({task})

        run_in_virtual_time(both())


def test_a_running_command_renews_in_time_again_and_again(world: World) -> None:
    world.keep()
    watch = Watch(world)
    watch.run(lambda: asyncio.sleep(1500))
    assert [token for _, token in watch.renewed] == ["access-1", "access-2", "access-3"]
    times = [at for at, _ in watch.renewed]
    assert times == pytest.approx([480, 960, 1440], abs=11)
    assert not watch.problems


def test_a_running_command_says_once_that_the_provider_is_down_and_goes_on(world: World) -> None:
    world.keep()

    async def main() -> None:
        await asyncio.sleep(470)
        world.provider.is_down = True
        await asyncio.sleep(400)
        world.provider.is_down = False
        await asyncio.sleep(100)

    watch = Watch(world)
    watch.run(main)
    assert len(watch.problems) == 1
    assert "cannot be reached" in watch.problems[0][1]
    assert [token for _, token in watch.renewed] == ["access-1"]
    assert 870 <= watch.renewed[0][0] <= 940
    assert world.provider.paths().count("/.well-known/openid-configuration") < 30


def test_a_running_command_takes_up_a_login_that_is_done_elsewhere(world: World) -> None:
    world.keep()

    async def main() -> None:
        world.refusal = {"error": "invalid_grant"}
        await asyncio.sleep(700)
        world.keep(access_token="new", issued_at=NOW + 700, expires_at=NOW + 1300)
        await asyncio.sleep(10)

    watch = Watch(world)
    watch.run(main)
    assert [text for _, text in watch.problems] == [
        "the login has ended: the provider does not renew it any more; run toppy login"
    ]
    assert [token for _, token in watch.renewed] == ["new"]


def test_a_running_command_says_when_somebody_logs_out(world: World) -> None:
    world.keep()

    async def main() -> None:
        await asyncio.sleep(20)
        world.store().remove()
        await asyncio.sleep(20)

    watch = Watch(world)
    watch.run(main)
    assert [text for _, text in watch.problems] == ["nobody is logged in any more: run toppy login"]


# from the configuration


def loaded(auth: str, folder: Path) -> LoadedClientConfig:
    config = parse_client_config(f'gateway = "gw.example"\n{auth}', "config.toml", {})
    return LoadedClientConfig(config, folder / "config.toml", ())


DEVICE = f'[auth]\nmode = "oidc_device_code"\nissuer = "{ISSUER}"\nclient_id = "c"\n'
CODE = f'[auth]\nmode = "oidc_auth_code_pkce"\nissuer = "{ISSUER}"\nclient_id = "c"\n'
SAML = (
    f'[auth]\nmode = "saml"\nidp_entity_id = "urn:idp"\nbroker_issuer = "{ISSUER}"\n'
    'broker_client_id = "c"\nbroker_audience = "gw"\n'
)


def settings_of(auth: str, folder: Path, **environ: str) -> LoginSettings:
    found = login_settings(loaded(auth, folder), {"HOME": "/home/u", **environ})
    assert found is not None
    return found


def test_each_mode_has_its_file_and_its_flow(tmp_path: Path) -> None:
    device, code = settings_of(DEVICE, tmp_path), settings_of(CODE, tmp_path)
    assert str(device.path) == "/home/u/.config/toppy/oidc-token.json"
    assert str(code.path) == "/home/u/.config/toppy/oidc-auth-code-token.json"
    assert str(device.key_path) == "/home/u/.local/state/toppy/device-key"
    assert (device.flow, code.flow) == ("device", "code")
    assert device.client.scope == "openid offline_access"
    assert code.redirect_uri == "http://127.0.0.1:8080/callback"


def test_saml_is_a_device_login_at_the_broker_with_a_hint(tmp_path: Path) -> None:
    saml = settings_of(SAML, tmp_path)
    assert (saml.flow, saml.issuer) == ("device", ISSUER)
    assert saml.client == Client("c", "openid offline_access", "gw", {"aarc_idp_hint": "urn:idp"})
    keycloak = settings_of(SAML + 'broker_hint_parameter = "kc_idp_hint"\n', tmp_path)
    assert keycloak.client.hints == {"kc_idp_hint": "urn:idp"}


def test_the_service_provider_is_sent_to_a_broker_that_asks_for_it_and_to_no_other(
    tmp_path: Path,
) -> None:
    provider = SAML + 'sp_entity_id = "urn:sp"\n'
    assert settings_of(provider, tmp_path).client.hints == {"aarc_idp_hint": "urn:idp"}
    asked = settings_of(provider + 'broker_sp_parameter = "sp"\n', tmp_path)
    assert asked.client.hints == {"aarc_idp_hint": "urn:idp", "sp": "urn:sp"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('broker_sp_parameter = "sp"\n', "needs sp_entity_id"),
        ('sp_entity_id = "s"\nbroker_sp_parameter = "aarc_idp_hint"\n', "must differ"),
    ],
)
def test_a_parameter_for_the_service_provider_must_make_sense(
    tmp_path: Path, text: str, part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        settings_of(SAML + text, tmp_path)


def test_the_file_can_be_chosen(tmp_path: Path) -> None:
    for written, path in (
        ("tokens/t.json", tmp_path / "tokens" / "t.json"),
        ("~/t.json", Path("/home/u/t.json")),
        ("/var/t.json", Path("/var/t.json")),
    ):
        auth = f'{DEVICE}token_cache_path = "{written}"\n'
        assert settings_of(auth, tmp_path).path == path
    found = settings_of(DEVICE, tmp_path, XDG_CONFIG_HOME="/c", XDG_STATE_HOME="/s")
    assert str(found.path) == "/c/toppy/oidc-token.json"
    assert str(found.key_path) == "/s/toppy/device-key"


def test_a_token_of_the_configuration_needs_no_login(tmp_path: Path) -> None:
    for text, token in (
        ('auth_token = "abc"', "abc"),
        ('[auth]\nmode = "token"\ntoken = "def"', "def"),
        ("", None),
    ):
        source = asyncio.run(token_source(loaded(text, tmp_path), {}))
        assert (source.authorization, source.login) == (token, None)


def test_a_cache_that_a_passphrase_protects_asks_the_environment(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = tmp_path / "token.json"
    store = TokenStore(path, key_path=tmp_path / "key", passphrase=lambda: "horse")
    kept = world.tokens(client_id="c", issued_at=NOW, expires_at=None)
    store.save(kept, Protection.PASSPHRASE)
    configuration = loaded(f'{DEVICE}token_cache_path = "token.json"\n', tmp_path)
    source = asyncio.run(token_source(configuration, {"TOPPY_TOKEN_PASSPHRASE": "horse"}))
    assert source.authorization == "access-0"
    with pytest.raises(TokenCacheError, match="TOPPY_TOKEN_PASSPHRASE"):
        asyncio.run(token_source(configuration, {}))
