"""The token that a client shows to its gateway: from the file, or from a login that is renewed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from toppy.auth.oidc import (
    Client,
    OidcError,
    Provider,
    ProviderRefusedError,
    parse_tokens,
    refresh_request,
)
from toppy.auth.token_cache import CachedTokens, TokenCacheError
from toppy.client.own_identity import NOBODY, identity_of_login, identity_of_token
from toppy.client.settings import LoadedClientConfig
from toppy.client.token_store import TokenStore
from toppy.config.client import OidcAuthCodePkceAuth, OidcDeviceCodeAuth, SamlAuth
from toppy.errors import ToppyError
from toppy.model.identity import Identity
from toppy.net.oidc_http import ProviderConnection
from toppy.protocol.backoff import Backoff

_DEVICE_FILE = "oidc-token.json"
_CODE_FILE = "oidc-auth-code-token.json"
_KEY_FILE = "device-key"
RENEWAL_TIMEOUT_S = 10.0
"""For each request, where a command waits that wants to go on."""
_LOOK_INTERVAL_S = 5.0
"""Between two looks at the clock and the file: a host that slept, or a login elsewhere."""
_LAST_WORDS_S = 2.0
_FIRST_RETRY_S = 2.0
_MOST_RETRY_S = 60.0


class LoginRequiredError(ToppyError):
    """There is no login, or it has ended: ``toppy login`` is to be run."""


@dataclass(frozen=True, slots=True)
class LoginSettings:
    """How to log in, and where the tokens are kept."""

    flow: Literal["device", "code"]
    issuer: str
    client: Client
    path: Path
    key_path: Path
    protection: str
    redirect_uri: str = ""
    identity_provider: str = ""
    """Behind the broker, for SAML."""


def login_settings(loaded: LoadedClientConfig, environ: Mapping[str, str]) -> LoginSettings | None:
    """The configuration's login; None where it has a token, or nothing."""
    auth = loaded.config.auth
    home = environ.get("HOME", "")
    folder = Path(environ.get("XDG_CONFIG_HOME") or Path(home, ".config"), "toppy")
    state = Path(environ.get("XDG_STATE_HOME") or Path(home, ".local", "state"), "toppy")
    match auth:
        case OidcDeviceCodeAuth() | OidcAuthCodePkceAuth():
            is_code = isinstance(auth, OidcAuthCodePkceAuth)
            found = LoginSettings(
                flow="code" if is_code else "device",
                issuer=auth.issuer,
                client=Client(auth.client_id, auth.scope, auth.audience),
                path=folder / (_CODE_FILE if is_code else _DEVICE_FILE),
                key_path=state / _KEY_FILE,
                protection=auth.token_protection,
                redirect_uri=auth.redirect_uri if isinstance(auth, OidcAuthCodePkceAuth) else "",
            )
        case SamlAuth():
            hints = {auth.broker_hint_parameter: auth.idp_entity_id}
            if auth.broker_sp_parameter is not None and auth.sp_entity_id is not None:
                hints[auth.broker_sp_parameter] = auth.sp_entity_id
            found = LoginSettings(
                flow="device",
                issuer=auth.broker_issuer,
                client=Client(
                    auth.broker_client_id, auth.broker_scope, auth.broker_audience, hints
                ),
                path=folder / _DEVICE_FILE,
                key_path=state / _KEY_FILE,
                protection=auth.token_protection,
                identity_provider=auth.idp_entity_id,
            )
        case _:
            return None
    if auth.token_cache_path is not None:
        written = Path(auth.token_cache_path)
        if written.parts[:1] == ("~",):
            written = Path(home, *written.parts[1:])
        return replace(found, path=loaded.path.absolute().parent / written)
    return found


def open_store(
    settings: LoginSettings, passphrase: Callable[[], str | None] = lambda: None
) -> TokenStore:
    """Where the tokens of this login are."""
    return TokenStore(settings.path, key_path=settings.key_path, passphrase=passphrase)


Connect = Callable[[str], ProviderConnection]
T = TypeVar("T")


class Offload(Protocol):
    """Runs a blocking call beside the event loop."""

    def __call__(self, call: Callable[[], T], /) -> Coroutine[Any, Any, T]: ...


def connect_to(issuer: str) -> ProviderConnection:
    """With the patience of a command that waits. Raises ``OidcError``."""
    return ProviderConnection(issuer, timeout_s=RENEWAL_TIMEOUT_S)


class Login:
    """The tokens of one login, renewed before they end."""

    def __init__(
        self,
        settings: LoginSettings,
        store: TokenStore,
        *,
        clock: Callable[[], float] = time.time,
        connect: Connect = connect_to,
        offload: Offload = asyncio.to_thread,
    ) -> None:
        """``offload`` runs what takes its time (a passphrase's key, the desktop's keyring)."""
        self._offload = offload
        self._settings = settings
        self._store = store
        self._clock = clock
        self._connect = connect
        self._used = ""
        """The access token that ``current`` gave out."""

    def read(self) -> CachedTokens | None:
        """What the cache has for this login, however old. Raises ``TokenCacheError``."""
        settings = self._settings
        tokens = self._store.load()
        if tokens is None or not tokens.is_for(
            settings.issuer, settings.client.client_id, settings.client.audience
        ):
            return None
        return tokens

    async def current(self) -> CachedTokens:
        """Tokens that can be used now, renewed if need be.

        A cache in the clear is encrypted on this occasion. Raises ``LoginRequiredError``,
        ``TokenCacheError``, ``OidcError``.
        """
        tokens = await self._offload(self.read)
        is_plain = self._store.protection is None
        if tokens is None or is_plain or not tokens.is_fresh(self._clock()):
            tokens = await self._current_locked(
                lambda found: found.is_fresh(self._clock()), may_be_old=True
            )
        self._used = tokens.access_token
        return tokens

    async def _current_locked(
        self, is_good: Callable[[CachedTokens], bool], *, may_be_old: bool = False
    ) -> CachedTokens:
        """As the only program: what another one has renewed meanwhile, or our own renewal.

        ``may_be_old``: where renewal fails, what can still be used will do.
        """
        async with self._store.locked():
            tokens = await self._offload(self.read)
            if tokens is None:
                raise LoginRequiredError("nobody is logged in: run toppy login")
            if is_good(tokens):
                if self._store.protection is None:
                    await self._save(tokens)
                return tokens
            try:
                return await self._finish(self._renew(tokens))
            except (OidcError, LoginRequiredError):
                if may_be_old and tokens.is_valid(self._clock()):
                    return tokens  # perhaps it is good for longer than the trouble lasts
                raise

    @staticmethod
    async def _finish(renewal: Coroutine[Any, Any, CachedTokens]) -> CachedTokens:
        """Whoever interrupts waits a little: a refresh token that the provider has used up, and
        whose successor was not kept, would end the login.
        """
        task = asyncio.ensure_future(renewal)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task}, timeout=_LAST_WORDS_S)
            task.cancel()
            await asyncio.wait({task})
            raise

    async def _save(self, tokens: CachedTokens) -> None:
        protection = self._store.protection or self._store.choose(self._settings.protection)
        await self._offload(lambda: self._store.save(tokens, protection))

    async def _renew(self, tokens: CachedTokens) -> CachedTokens:
        if tokens.refresh_token is None:
            raise LoginRequiredError(
                "the login has ended, and the provider gave no refresh token (ask for the scope "
                "offline_access): run toppy login"
            )
        async with self._connect(self._settings.issuer) as connection:
            provider: Provider = await connection.discover()
            form = refresh_request(self._settings.client, tokens.refresh_token)
            try:
                answer = parse_tokens(await connection.post(provider.token_endpoint, form))
            except ProviderRefusedError as error:
                if error.code == "invalid_grant":
                    raise LoginRequiredError(
                        "the login has ended: the provider does not renew it any more; run toppy "
                        "login"
                    ) from None
                raise
        renewed = tokens.renewed(answer, self._clock())
        await self._save(renewed)
        return renewed

    async def keep_fresh(
        self,
        on_renewed: Callable[[CachedTokens], None],
        on_problem: Callable[[str], None],
    ) -> None:
        """Until cancelled: renew in time, and tell what the tokens are now.

        ``on_problem`` hears why a renewal failed; it is tried again, and a login that somebody
        does elsewhere is taken up.
        """
        backoff = Backoff(random.random, first_s=_FIRST_RETRY_S, most_s=_MOST_RETRY_S)
        used, problem = self._used, ""
        retry_at = 0.0
        tokens: CachedTokens | None = None
        seen: object = None
        while True:
            try:
                if (there := self._store.signature()) != seen:
                    tokens = await self._offload(self.read)
                    seen, retry_at = there, 0.0
                if tokens is None:
                    raise LoginRequiredError("nobody is logged in any more: run toppy login")
                if self._is_due(tokens) and self._clock() >= retry_at:
                    retry_at = self._clock() + backoff.next_delay_s()
                    tokens = await self._current_locked(lambda found: not self._is_due(found))
                if tokens.access_token != used:
                    used = tokens.access_token
                    on_renewed(tokens)
                if not self._is_due(tokens):
                    backoff.reset()
                    problem = ""
            except (OidcError, LoginRequiredError, TokenCacheError) as error:
                if str(error) != problem:
                    problem = str(error)
                    on_problem(problem)
            await asyncio.sleep(_LOOK_INTERVAL_S)

    def _is_due(self, tokens: CachedTokens) -> bool:
        renew_at = tokens.renew_at()
        return renew_at is not None and self._clock() >= renew_at


def passphrase_of(environ: Mapping[str, str]) -> str | None:
    """The token cache's passphrase, where the environment has it."""
    return environ.get("TOPPY_TOKEN_PASSPHRASE") or None


@dataclass(frozen=True, slots=True)
class TokenSource:
    """What a command shows to its gateway."""

    authorization: str | None
    login: Login | None = None
    """Where the token comes from a login: it has to be kept fresh."""


async def token_source(
    loaded: LoadedClientConfig,
    environ: Mapping[str, str],
    ask_passphrase: Callable[[Mapping[str, str]], str | None] = passphrase_of,
) -> TokenSource:
    """The configuration's token, or the login's, renewed where it is too old.

    Raises ``LoginRequiredError``, ``TokenCacheError``, ``OidcError``.
    """
    settings = login_settings(loaded, environ)
    if settings is None:
        token = loaded.config.token
        return TokenSource(token.get_secret_value() if token is not None else None)
    login = Login(settings, open_store(settings, lambda: ask_passphrase(environ)))
    return TokenSource((await login.current()).access_token, login)


def own_identity(
    loaded: LoadedClientConfig,
    environ: Mapping[str, str],
    ask_passphrase: Callable[[Mapping[str, str]], str | None] = passphrase_of,
) -> Identity:
    """Who the client's own policy takes it for: by the kept login, or the configuration's token.

    Nothing is renewed or sent, and a passphrase is asked for only where a rule names people.
    Raises ``TokenCacheError``.
    """
    policy = loaded.config.policy
    settings = login_settings(loaded, environ)
    if settings is None:
        return identity_of_token(loaded.config)
    if policy is None or not any(rule.names_people for rule in policy.rules):
        return NOBODY
    tokens = Login(settings, open_store(settings, lambda: ask_passphrase(environ))).read()
    return identity_of_login(tokens) if tokens is not None else NOBODY
