"""``toppy login``, ``logout`` and ``whoami``."""

from __future__ import annotations

import asyncio
import getpass
import json
import sys
import time
import webbrowser
from collections.abc import Callable, Mapping
from typing import Any

import segno

from toppy.auth.oidc import DeviceAuthorization, OidcError
from toppy.auth.token_cache import CachedTokens, TokenCacheError
from toppy.client.audit import record_command
from toppy.client.login import Outcome, log_in, log_out, peek
from toppy.client.settings import LoadedClientConfig, load_client_config
from toppy.client.tokens import (
    Login,
    LoginRequiredError,
    LoginSettings,
    login_settings,
    open_store,
    passphrase_of,
)
from toppy.errors import ConfigError, ToppyError
from toppy.model.audit_event import AuditAction

EXIT_FAILURE = 1
EXIT_NO_TOKEN = 2
EXIT_PROVIDER = 3
_EXIT_INTERRUPTED = 130


class Terminal:
    """A ``Desk``: everything on standard error, so that only a token is on standard output."""

    def __init__(self, *, opens_browser: bool) -> None:
        self._opens_browser = opens_browser

    def show_code(self, authorization: DeviceAuthorization) -> None:
        """See ``Desk``."""
        complete = authorization.verification_uri_complete
        _say(f"Open {authorization.verification_uri}")
        _say(f"and enter the code {authorization.user_code}")
        if complete is not None and sys.stderr.isatty():
            _say("or scan:")
            segno.make(complete, error="l", micro=False).terminal(out=sys.stderr, compact=True)
            _say(f"or open {complete}")
        _say(f"The code is good for {_show_duration(authorization.lifetime_s)}.")

    def open_browser(self, url: str) -> None:
        """See ``Desk``."""
        if self._opens_browser and webbrowser.open(url):
            _say("Log in with the browser that was opened; if none was, open this address:")
        else:
            _say("Open this address on this machine:")
        _say(url)

    def warn(self, text: str) -> None:
        """See ``Desk``."""
        _say(f"toppy login: {text}")


def run_login(
    config: str | None, environ: Mapping[str, str], *, prints_token: bool, opens_browser: bool
) -> int:
    """Log in as the configuration says; returns the exit code (T-018)."""
    return _run("login", lambda: _login(config, environ, prints_token, opens_browser))


def run_logout(config: str | None, environ: Mapping[str, str]) -> int:
    """Forget the login; returns the exit code."""
    return _run("logout", lambda: _logout(config, environ))


def run_whoami(config: str | None, environ: Mapping[str, str], *, as_json: bool) -> int:
    """Say whose token it is; returns the exit code."""
    return _run("whoami", lambda: _whoami(config, environ, as_json))


def ask_passphrase(environ: Mapping[str, str], *, is_new: bool = False) -> str | None:
    """The token cache's passphrase: from the environment, or from whoever is at the terminal."""
    given = passphrase_of(environ)
    if given is not None or not sys.stdin.isatty():
        return given
    first = getpass.getpass("Passphrase of the token cache: ")
    if is_new and getpass.getpass("Once more: ") != first:
        raise TokenCacheError("the two passphrases differ; nothing was kept")
    return first or None


def _run(command: str, action: Callable[[], int]) -> int:
    try:
        return action()
    except LoginRequiredError as error:
        code, problem = EXIT_NO_TOKEN, str(error)
    except OidcError as error:
        code, problem = EXIT_PROVIDER, str(error)
    except ToppyError as error:
        code, problem = EXIT_FAILURE, str(error)
    except KeyboardInterrupt:
        code, problem = _EXIT_INTERRUPTED, "interrupted"
    _say(f"toppy {command}: {problem}")
    return code


def _record(
    config: str | None,
    environ: Mapping[str, str],
    settings: LoginSettings,
    *,
    allowed: bool,
    reason: str,
) -> None:
    record_command(
        config, environ, AuditAction.LOGIN, settings.issuer, allowed=allowed, reason=reason
    )


def _load(config: str | None, environ: Mapping[str, str]) -> LoadedClientConfig:
    loaded = load_client_config(config, environ)
    for warning in loaded.warnings:
        _say(f"warning: {warning}")
    return loaded


def _login(
    config: str | None, environ: Mapping[str, str], prints_token: bool, opens_browser: bool
) -> int:
    loaded = _load(config, environ)
    settings = login_settings(loaded, environ)
    if settings is None:
        token = loaded.config.token
        if token is None:
            _say("toppy login: there is no token: set auth_token, or [auth] with a mode")
            return EXIT_NO_TOKEN
        _say("The configuration has a token; there is nothing to log in to.")
        if prints_token:
            print(token.get_secret_value())
        return 0
    if settings.identity_provider:
        _say(f"Logging in with {settings.identity_provider} through {settings.issuer}")
    store = open_store(settings, lambda: ask_passphrase(environ, is_new=True))
    desk = Terminal(opens_browser=opens_browser)
    if settings.protection == "passphrase":
        store.unlock()  # before the user goes to the provider
    try:
        outcome = asyncio.run(log_in(settings, store, desk))
    except ToppyError as error:
        _record(config, environ, settings, allowed=False, reason=str(error))
        raise
    _record(config, environ, settings, allowed=True, reason="logged in")
    _say(_describe(outcome, settings))
    if prints_token:
        print(outcome.tokens.access_token)
    return 0


def _describe(outcome: Outcome, settings: LoginSettings) -> str:
    tokens = outcome.tokens
    text = f"Logged in{f' as {tokens.subject}' if tokens.subject else ''}"
    if tokens.expires_at is not None:
        text += f"; the token lives for {_show_duration(tokens.expires_at - tokens.issued_at)}"
        text += " and is renewed by itself" if tokens.refresh_token is not None else ""
    return f"{text}. Kept at {settings.path}, encrypted ({outcome.protection})."


def _logout(config: str | None, environ: Mapping[str, str]) -> int:
    settings = login_settings(_load(config, environ), environ)
    if settings is None:
        raise ConfigError("the configuration has no login; remove its token to stop using it")
    store = open_store(settings, lambda: ask_passphrase(environ))
    desk = Terminal(opens_browser=False)
    tokens = None
    try:
        tokens = Login(settings, store).read()
    except TokenCacheError as error:
        desk.warn(f"the provider was not told: {error}")
    was_there = asyncio.run(log_out(settings, store, desk, tokens=tokens))
    _say("Logged out." if was_there else "Nobody was logged in.")
    return 0


def _whoami(config: str | None, environ: Mapping[str, str], as_json: bool) -> int:
    loaded = _load(config, environ)
    settings = login_settings(loaded, environ)
    if settings is None:
        secret = loaded.config.token
        if secret is None:
            raise LoginRequiredError("there is no token: set auth_token, or [auth] with a mode")
        facts = _facts_of_token(secret.get_secret_value())
    else:
        store = open_store(settings, lambda: ask_passphrase(environ))
        tokens = Login(settings, store).read()
        if tokens is None:
            raise LoginRequiredError("nobody is logged in: run toppy login")
        protection = store.protection.value if store.protection is not None else "none"
        facts = _facts_of_login(tokens, settings, protection, time.time())
    print(json.dumps(facts, indent=2) if as_json else _as_text(facts))
    return 0


def _facts_of_token(token: str) -> dict[str, Any]:
    claims = peek(token)
    facts: dict[str, Any] = {"mode": "token", "subject": None}
    if claims is not None:
        facts |= {"subject": claims.get("sub"), "issuer": claims.get("iss")}
        expires_at = claims.get("exp")
        if isinstance(expires_at, int | float):
            facts |= {"expires_at": expires_at, "expires_in_s": round(expires_at - time.time())}
    return facts


def _facts_of_login(
    tokens: CachedTokens, settings: LoginSettings, protection: str, now: float
) -> dict[str, Any]:
    claims = peek(tokens.access_token) or {}
    expires_in_s = round(tokens.expires_at - now) if tokens.expires_at is not None else None
    return {
        "mode": settings.flow,
        "subject": tokens.subject or claims.get("sub"),
        "issuer": tokens.issuer,
        "client_id": tokens.client_id,
        "audience": tokens.audience,
        "scope": tokens.scope,
        "expires_at": tokens.expires_at,
        "expires_in_s": expires_in_s,
        "is_renewable": tokens.refresh_token is not None,
        "kept_at": str(settings.path),
        "protection": protection,
    }


def _as_text(facts: Mapping[str, Any]) -> str:
    lines = [str(facts["subject"] or "a token that does not say whose it is")]
    for name, label in (
        ("issuer", "issuer"),
        ("client_id", "client"),
        ("audience", "audience"),
        ("scope", "scope"),
    ):
        if facts.get(name):
            lines.append(f"{label}: {facts[name]}")
    expires_in_s = facts.get("expires_in_s")
    if expires_in_s is not None:
        renews = ", is renewed by itself" if facts.get("is_renewable") else ""
        when = (
            f"ends in {_show_duration(expires_in_s)}"
            if expires_in_s > 0
            else f"ended {_show_duration(-expires_in_s)} ago"
        )
        lines.append(f"token: {when}{renews}")
    if facts.get("kept_at"):
        lines.append(f"kept at: {facts['kept_at']}, encrypted ({facts['protection']})")
    return "\n".join(lines)


def _show_duration(seconds: float) -> str:
    """``45 s``, ``10 min``, ``3 h``, ``2 days``: rounded down."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= (2 * length if unit == "days" else length):
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
