"""``toppy login`` and ``logout``: the conversation with the provider and the user."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jwt

from toppy.auth.login_flow import (
    NONCE_BYTES,
    STATE_BYTES,
    VERIFIER_BYTES,
    AuthorizationCodeFlow,
    CodeState,
    DeviceFlow,
    DeviceState,
    Reply,
    parse_redirect_uri,
)
from toppy.auth.oidc import (
    DeviceAuthorization,
    OidcError,
    Provider,
    ProviderRefusedError,
    ProviderUnreachableError,
    TokenAnswer,
    check_id_token,
    device_request,
    device_token_request,
    parse_device_authorization,
    parse_tokens,
    revocation_request,
)
from toppy.auth.token_cache import CachedTokens
from toppy.client.redirect_server import RedirectServer
from toppy.client.token_store import TokenStore
from toppy.client.tokens import Connect, LoginSettings
from toppy.net.oidc_http import ProviderConnection

CODE_TIMEOUT_S = 300.0
"""For the user to log in with the browser."""


class Desk(Protocol):
    """Shows the user what to do."""

    def show_code(self, authorization: DeviceAuthorization) -> None:
        """Where to go, and which code to enter there."""
        ...

    def open_browser(self, url: str) -> None:
        """Have the user visit ``url`` on this machine."""
        ...

    def warn(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """A login that was kept."""

    tokens: CachedTokens
    protection: str


async def log_in(
    settings: LoginSettings,
    store: TokenStore,
    desk: Desk,
    *,
    connect: Connect = ProviderConnection,
    clock: Callable[[], float] = time.time,
) -> Outcome:
    """Log in and keep the tokens.

    Raises ``OidcError``, ``TokenCacheError``, ``ConfigError``.
    """
    protection = store.choose(settings.protection)
    async with connect(settings.issuer) as connection:
        provider = await connection.discover()
        if settings.flow == "code":
            answer, nonce = await _by_code(settings, provider, connection, desk)
        else:
            answer, nonce = await _by_device(settings, provider, connection, desk), None
        now = clock()
        subject = None
        if answer.id_token is not None:
            keys = await connection.fetch_keys()
            who = check_id_token(answer.id_token, keys, provider, settings.client, now, nonce=nonce)
            subject = who.subject
        elif "openid" in settings.client.scope.split():
            raise OidcError("the provider gave no ID token, though the scope openid was asked for")
    tokens = CachedTokens(
        issuer=settings.issuer,
        client_id=settings.client.client_id,
        audience=settings.client.audience,
        access_token=answer.access_token,
        refresh_token=answer.refresh_token,
        token_type=answer.token_type,
        scope=answer.scope or settings.client.scope,
        issued_at=now,
        expires_at=now + answer.lifetime_s if answer.lifetime_s is not None else None,
        subject=subject,
    )
    async with store.locked():
        await asyncio.to_thread(store.save, tokens, protection)
    for warning in doubts(tokens):
        desk.warn(warning)
    return Outcome(tokens, protection.value)


def doubts(tokens: CachedTokens) -> list[str]:
    """What will probably not work with these tokens, and what to do about it."""
    found = []
    claims = peek(tokens.access_token)
    if claims is None:
        found.append(
            "the access token is no JWT: a gateway cannot check it; set audience to the gateway's"
        )
    elif tokens.audience is not None:
        audience = claims.get("aud")
        if tokens.audience not in (audience if isinstance(audience, list) else [audience]):
            found.append(
                f"the access token is not for {tokens.audience!r} (audience), and the gateway "
                "will refuse it; allow this audience for the client at the provider"
            )
    if tokens.refresh_token is None:
        found.append(
            "the provider gave no refresh token: the login ends with the access token; ask for "
            "the scope offline_access, and allow it there"
        )
    return found


def peek(token: str) -> dict[str, object] | None:
    """A JWT's claims, without checking anything: to show them. None: it is no JWT."""
    try:
        claims: dict[str, object] = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError):
        return None
    return claims


async def _by_device(
    settings: LoginSettings, provider: Provider, connection: ProviderConnection, desk: Desk
) -> TokenAnswer:
    if provider.device_authorization_endpoint is None:
        raise OidcError(
            "the provider has no device_authorization_endpoint: use mode oidc_auth_code_pkce"
        )
    loop = asyncio.get_running_loop()
    client = settings.client
    answer = await connection.post(provider.device_authorization_endpoint, device_request(client))
    authorization = parse_device_authorization(answer, client)
    flow = DeviceFlow(authorization, loop.time())
    desk.show_code(authorization)
    form = device_token_request(client, authorization.device_code)
    while (due := flow.next_timeout()) is not None:
        await asyncio.sleep(due - loop.time())
        if not flow.handle_timeout(loop.time()):
            continue
        try:
            tokens = parse_tokens(await connection.post(provider.token_endpoint, form))
        except ProviderRefusedError as error:
            flow.receive_refusal(error, loop.time())
        except ProviderUnreachableError:
            flow.receive_silence(loop.time())
        else:
            flow.receive_tokens()
            return tokens
    assert flow.state is not DeviceState.APPROVED
    raise OidcError(flow.problem)


async def _by_code(
    settings: LoginSettings, provider: Provider, connection: ProviderConnection, desk: Desk
) -> tuple[TokenAnswer, str]:
    over = asyncio.Event()
    redirect = parse_redirect_uri(settings.redirect_uri)
    async with RedirectServer(redirect) as server:
        flow = AuthorizationCodeFlow(
            provider,
            settings.client,
            settings.redirect_uri if redirect.port else server.uri,
            verifier=secrets.token_bytes(VERIFIER_BYTES),
            state=secrets.token_bytes(STATE_BYTES),
            nonce=secrets.token_bytes(NONCE_BYTES),
        )

        def answer(method: str, target: str) -> Reply:
            reply = flow.receive_request(method, target)
            if flow.state is not CodeState.WAITING:
                over.set()
            return reply

        server.serve(answer)
        desk.open_browser(flow.authorization_url)
        try:
            async with asyncio.timeout(CODE_TIMEOUT_S):
                await over.wait()
        except TimeoutError:
            raise OidcError(
                f"nobody logged in within {CODE_TIMEOUT_S:g} s; run toppy login again"
            ) from None
        if flow.state is CodeState.FAILED:
            await server.drain()
            raise OidcError(flow.problem)
        tokens = parse_tokens(await connection.post(provider.token_endpoint, flow.token_request()))
        await server.drain()
    return tokens, flow.nonce


async def log_out(
    settings: LoginSettings,
    store: TokenStore,
    desk: Desk,
    *,
    tokens: CachedTokens | None,
    connect: Connect = ProviderConnection,
) -> bool:
    """Forget the login here, and end it at the provider where that can be done.

    Whether there was one. Raises ``TokenCacheError``.
    """
    async with store.locked():
        was_there = store.remove()
    if tokens is None:
        return was_there
    try:
        async with connect(settings.issuer) as connection:
            provider = await connection.discover()
            if provider.revocation_endpoint is None:
                desk.warn("the provider cannot be told: its tokens live until they expire")
                return was_there
            token, kind = tokens.access_token, "access_token"
            if tokens.refresh_token is not None:
                token, kind = tokens.refresh_token, "refresh_token"
            form = revocation_request(settings.client, token, kind)
            await connection.post(provider.revocation_endpoint, form)
    except OidcError as error:
        desk.warn(f"the provider was not told, its tokens live until they expire: {error}")
    return was_there
