"""What the commands share that use a gateway: how they reach it, what they tell, how they stop."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from toppy.auth.oidc import OidcError
from toppy.auth.token_cache import TokenCacheError
from toppy.cli.login import ask_passphrase
from toppy.client.audit import ClientAudit
from toppy.client.session import (
    ConnectFailure,
    GatewaySession,
    GatewaySettings,
    SessionState,
)
from toppy.client.settings import LoadedClientConfig, gateway_settings
from toppy.client.tokens import Login, LoginRequiredError, token_source
from toppy.config.client import ClientConfig
from toppy.errors import ConfigError
from toppy.model.audit_event import AuditAction
from toppy.model.rate import UNLIMITED, DirectionLimits, Rate
from toppy.observe.log import get_logger
from toppy.quic.choose import SLOW_ENGINE_NOTICE, choose_engine
from toppy.wire.audit_entry import AuditError

EXIT_FAILURE: Final = 1
EXIT_DENIED: Final = 2
_EXIT_SECOND_SIGNAL: Final = 130
_PROBLEM_INTERVAL_S: Final = 1.0
"""Between two lines of the log about the same target and reason."""
_MOST_PROBLEMS: Final = 64
"""Targets with a reason that have an interval of their own; further ones share one."""
_MOST_RECORDED: Final = 100
"""Entries of the audit log of one kind, of one command."""
_RECORD_TIMEOUT_S: Final = 0.1
"""For the audit log's lock, while others wait."""

STARTUP_ERRORS: Final = (AuditError, ConfigError, OidcError, TokenCacheError, LoginRequiredError)
"""What keeps a command from starting."""

_log = get_logger("gateway")


@dataclass(frozen=True, slots=True)
class GatewayAccess:
    """How to reach the gateway, and the login that has to be kept fresh."""

    settings: GatewaySettings
    login: Login | None = field(repr=False)
    is_slow: bool = False
    """Nobody asked for the slow engine, and there is no other."""


def load_access(loaded: LoadedClientConfig, environ: Mapping[str, str]) -> GatewayAccess:
    """Read what a connection needs; a token that is too old is renewed. Raises one of
    ``STARTUP_ERRORS``. Not to be called on an event loop.
    """
    source = asyncio.run(token_source(loaded, environ, ask_passphrase))
    settings = gateway_settings(loaded, source.authorization)
    is_slow = choose_engine(settings.engine) == "aioquic" and settings.engine == "auto"
    return GatewayAccess(settings, source.login, is_slow)


def warn(loaded: LoadedClientConfig, access: GatewayAccess | None) -> None:
    """Say what is odd about the configuration."""
    for warning in loaded.warnings:
        _log.warning("configuration", warning=warning)
    if access is not None and access.is_slow:
        _log.warning(SLOW_ENGINE_NOTICE)


def written_rate(config: ClientConfig) -> DirectionLimits:
    """What each connection is held to where ``[rate]`` is written; otherwise to nothing."""
    return DirectionLimits(bytes=config.udp_rate)


def always_rate(config: ClientConfig) -> DirectionLimits:
    """What each connection of `toppy up` is held to: its default counts, too (T-050)."""
    rate = config.rate
    if rate.bytes_per_sec == 0:
        return DirectionLimits(bytes=UNLIMITED)
    return DirectionLimits(bytes=Rate(rate.bytes_per_sec, rate.burst_bytes or rate.bytes_per_sec))


def stop_on_signals(numbers: Iterable[int] = (signal.SIGINT, signal.SIGTERM)) -> asyncio.Event:
    """Is set by the first of these signals; a second one ends the process at once."""
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(_EXIT_SECOND_SIGNAL)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, stop)
    return stopping


class Notices:
    """What goes wrong while a command runs: the newest for a live line, the rest for the log and
    the audit log, bounded.
    """

    def __init__(self, audit: ClientAudit, *, is_quiet: bool) -> None:
        """``is_quiet``: somebody watches a live line, and there is no log."""
        self._audit = audit
        self._is_quiet = is_quiet
        self._recorded: dict[AuditAction, set[tuple[str, str]]] = {}
        self._next_lines: dict[tuple[str, str], float] = {}
        self._next_of_others = 0.0
        self.problem = ""

    def make_session(self, settings: GatewaySettings) -> GatewaySession:
        """A session that tells of itself. Raises ``ConfigError``."""
        return GatewaySession(settings, on_state=self.on_state, on_failure=self.on_failure)

    def keep(self, session: GatewaySession, login: Login | None) -> list[asyncio.Task[None]]:
        """Run a session, and keep its login fresh."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(session.run())]
        if login is not None:
            renewing = login.keep_fresh(
                lambda tokens: session.set_authorization(tokens.access_token),
                self.on_login_problem,
            )
            tasks.append(loop.create_task(renewing))
        return tasks

    def on_state(self, state: SessionState) -> None:
        """See ``GatewaySession``."""
        if state is SessionState.CONNECTED:
            self.problem = ""
            if not self._is_quiet:
                _log.info("connected to the gateway")

    def on_failure(self, failure: ConnectFailure) -> None:
        """See ``GatewaySession``."""
        self.problem = failure.reason
        if self._is_quiet:
            return
        retry_in_s = round(failure.retry_in_s, 1)
        if failure.is_relaying:
            _log.warning(
                "no new connection to the gateway, which is about to end the old one",
                reason=failure.reason,
                retry_in_s=retry_in_s,
            )
        else:
            _log.warning(
                "no connection to the gateway", reason=failure.reason, retry_in_s=retry_in_s
            )

    def on_login_problem(self, problem: str) -> None:
        """See ``Login.keep_fresh``."""
        self.problem = f"the login is not renewed: {problem}"
        if not self._is_quiet:
            _log.warning("the login is not renewed", reason=problem)

    def on_refused(self, target: str, reason: str, *, peer: str = "", status: int = 0) -> None:
        """There is no way to a target for a connection or local peer. ``status`` is the gateway's
        answer; 0: it gave none.
        """
        if self._may_log(target, reason):
            log = _log_of(target=target, address=peer, status=status)
            log.warning("no way to the target", reason=reason)

    def on_reset(self, target: str, reason: str, *, peer: str = "") -> None:
        """A connection did not end in order."""
        if self._may_log(target, reason):
            log = _log_of(target=target, address=peer)
            log.warning("a connection was reset", reason=reason)

    def _may_log(self, target: str, reason: str) -> bool:
        self.problem = reason
        if self._is_quiet:
            return False
        now, key = time.monotonic(), (target, reason)
        if key not in self._next_lines and len(self._next_lines) >= _MOST_PROBLEMS:
            self._next_lines = {k: due for k, due in self._next_lines.items() if due > now}
            if len(self._next_lines) >= _MOST_PROBLEMS:
                if now < self._next_of_others:
                    return False
                self._next_of_others = now + _PROBLEM_INTERVAL_S
                return True
        if now < self._next_lines.get(key, 0.0):
            return False
        self._next_lines[key] = now + _PROBLEM_INTERVAL_S
        return True

    def record_once(
        self, action: AuditAction, target: str, *, allowed: bool, reason: str = "", status: int = 0
    ) -> None:
        """Into the audit log, while others wait; what is recorded already is not again. ``status``
        is the gateway's answer; 0: there was none.
        """
        recorded = self._recorded.setdefault(action, set())
        if len(recorded) >= _MOST_RECORDED or (target, reason) in recorded:
            return
        recorded.add((target, reason))
        facts: dict[str, Any] = {"status": status} if status else {}
        self._audit.record(
            action,
            target,
            allowed=allowed,
            reason=reason,
            lock_timeout_s=_RECORD_TIMEOUT_S,
            **facts,
        )


def _log_of(*, target: str, address: str, status: int = 0) -> FilteringBoundLogger:
    """The log with these fields; what is empty or 0 is not known, and has none."""
    fields = {"target": target, "address": address, "status": status}
    return _log.bind(**{name: value for name, value in fields.items() if value})
