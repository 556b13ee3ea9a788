"""``toppy udp``: policy, then the local socket, then the gateway."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping

import uvloop
from rich.console import Console
from rich.live import Live
from rich.text import Text

from toppy.auth.oidc import OidcError
from toppy.auth.token_cache import TokenCacheError
from toppy.cli.login import ask_passphrase
from toppy.cli.output import Traffic, describe, summarize
from toppy.client.audit import ClientAudit
from toppy.client.policy import check_policy, parse_target
from toppy.client.session import (
    ConnectFailure,
    GatewaySession,
    GatewaySettings,
    SessionState,
)
from toppy.client.settings import LoadedClientConfig, gateway_settings, load_client_config
from toppy.client.tokens import Login, LoginRequiredError, token_source
from toppy.client.tunnel import Refusal
from toppy.client.udp_forward import UdpForward
from toppy.config.address import parse_host_port
from toppy.errors import ConfigError, DeniedError, ToppyError
from toppy.model.audit_event import AuditAction
from toppy.model.target import Target
from toppy.net.udp_socket import UdpSocket, bind_udp
from toppy.observe.log import configure_logging, get_logger
from toppy.quic.choose import SLOW_ENGINE_NOTICE, choose_engine
from toppy.system.process_title import set_process_title
from toppy.wire.audit_entry import AuditError

EXIT_FAILURE = 1
EXIT_DENIED = 2
_EXIT_SECOND_SIGNAL = 130
_BUFFER_BYTES = 8 << 20
_LIVE_INTERVAL_S = 0.5
_SUMMARY_INTERVAL_S = 60.0
_REFUSAL_INTERVAL_S = 1.0
_MOST_REFUSALS = 100
_RECORD_TIMEOUT_S = 0.1
"""For the audit log's lock, while datagrams wait."""

_log = get_logger("udp")


def run_udp(listen: str, target: str, config: str | None, environ: Mapping[str, str]) -> int:
    """Forward until a signal; returns the exit code (T-018)."""
    try:
        loaded = load_client_config(config, environ)
        audit = ClientAudit.of(loaded.config, loaded.path, environ)
        host, port = _parse("--listen", listen)
        where = parse_target("--target", target)
        check_policy(loaded.config, where)
        source = asyncio.run(token_source(loaded, environ, ask_passphrase))
        settings = gateway_settings(loaded, source.authorization)
        engine = choose_engine(settings.engine)
        local = _bind(host, port)
    except DeniedError as error:
        print(f"Policy denied: {error}", file=sys.stderr)
        configure_logging("warning", "auto", process="udp")
        audit.record_and_ship(AuditAction.UDP, str(where), allowed=False, reason=str(error))
        return EXIT_DENIED
    except (AuditError, ConfigError, OidcError, TokenCacheError, LoginRequiredError) as error:
        return _fail(error)
    is_terminal = sys.stderr.isatty()
    configure_logging("warning" if is_terminal else "info", "auto", process="udp")
    for warning in loaded.warnings:
        _log.warning("configuration", warning=warning)
    if engine == "aioquic" and settings.engine == "auto":
        _log.warning(SLOW_ENGINE_NOTICE)
    set_process_title(f"toppy udp: {_show(local)} -> {where}")
    command = _UdpCommand(local, where, audit, is_terminal=is_terminal)
    audit.record(AuditAction.UDP, str(where), allowed=True, listen=_show(local))
    try:
        uvloop.run(command.run(settings, loaded, source.login))
    except ConfigError as error:
        return _fail(error)
    finally:
        local.close()
    return 0


def _fail(error: ToppyError) -> int:
    print(f"toppy udp: {error}", file=sys.stderr)
    return EXIT_FAILURE


def _parse(option: str, text: str) -> tuple[str, int]:
    try:
        return parse_host_port(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _bind(host: str, port: int) -> UdpSocket:
    try:
        return UdpSocket(bind_udp(host, port, buffer_bytes=_BUFFER_BYTES, may_fragment=True))
    except OSError as error:
        raise ConfigError(
            f"--listen: cannot listen on {Target(host, port)}: {error.strerror or error}; choose "
            "an address of this host and a free port"
        ) from None


def _show(sock: UdpSocket) -> str:
    return str(Target(*sock.local_address))


class _UdpCommand:
    """One run: shows what happens, and stops on the first signal."""

    def __init__(
        self, local: UdpSocket, target: Target, audit: ClientAudit, *, is_terminal: bool
    ) -> None:
        self._local = local
        self._target = target
        self._audit = audit
        self._refusals: set[str] = set()
        """Recorded once each."""
        self._is_terminal = is_terminal
        self._problem = ""
        self._next_refusal = 0.0

    def on_state(self, state: SessionState) -> None:
        if state is SessionState.CONNECTED:
            self._problem = ""
            _log.info("connected to the gateway")

    def on_failure(self, failure: ConnectFailure) -> None:
        self._problem = failure.reason
        if not self._is_terminal:
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

    def on_refused(self, refusal: Refusal) -> None:
        self._problem = f"refused: {refusal.explanation}"
        if len(self._refusals) < _MOST_REFUSALS and refusal.explanation not in self._refusals:
            self._refusals.add(refusal.explanation)
            self._audit.record(
                AuditAction.UDP_REFUSED,
                str(self._target),
                allowed=False,
                reason=refusal.explanation,
                lock_timeout_s=_RECORD_TIMEOUT_S,
                status=refusal.status,
            )
        now = time.monotonic()
        if not self._is_terminal and now >= self._next_refusal:
            self._next_refusal = now + _REFUSAL_INTERVAL_S
            _log.warning(
                "the gateway refused the tunnel",
                status=refusal.status,
                reason=refusal.explanation,
            )

    def on_login_problem(self, problem: str) -> None:
        self._problem = f"the login is not renewed: {problem}"
        if not self._is_terminal:
            _log.warning("the login is not renewed", reason=problem)

    async def run(
        self, settings: GatewaySettings, loaded: LoadedClientConfig, login: Login | None = None
    ) -> None:
        """Forward until SIGINT or SIGTERM; a second one ends the process at once.

        Raises ``ConfigError`` for settings that no engine can work with.
        """
        session = GatewaySession(settings, on_state=self.on_state, on_failure=self.on_failure)
        forward = UdpForward(
            session,
            self._local,
            self._target,
            max_peers=loaded.config.udp_max_peers,
            idle_timeout_s=loaded.config.udp_idle_s,
            on_refused=self.on_refused,
        )
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if stopping.is_set():
                os._exit(_EXIT_SECOND_SIGNAL)
            stopping.set()

        for signal_number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signal_number, stop)
        # whoever reads this line may send datagrams, and signals
        print(f"toppy udp listening on {_show(self._local)} -> {self._target}", flush=True)
        show = self._show_live if self._is_terminal else self._log_summaries
        tasks = [
            loop.create_task(forward.run()),
            loop.create_task(session.run()),
            loop.create_task(show(session, forward)),
        ]
        if login is not None:
            renewing = login.keep_fresh(
                lambda tokens: session.set_authorization(tokens.access_token),
                self.on_login_problem,
            )
            tasks.append(loop.create_task(renewing))
        began = time.monotonic()
        shipping = loop.create_task(self._audit.ship())
        waiting = loop.create_task(stopping.wait())
        await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        failed = next((task for task in tasks if task.done()), None)
        for task in (*tasks, waiting):
            task.cancel()
        # the forward first: it ends its tunnels on the connection that the session then closes
        for task in (*tasks, waiting):
            await asyncio.wait({task})
        traffic = _traffic(session, forward)
        print(summarize(traffic), file=sys.stderr)
        self._audit.record(
            AuditAction.UDP_CLOSED,
            str(self._target),
            allowed=True,
            reason="told to stop" if failed is None else "failed",
            duration_s=round(time.monotonic() - began, 3),
            peers=traffic.peers_total,
            datagrams_out=traffic.out,
            bytes_out=traffic.out_bytes,
            datagrams_in=traffic.back,
            bytes_in=traffic.back_bytes,
            drops=traffic.dropped,
        )
        await asyncio.wait({shipping})
        await self._audit.ship()
        if failed is not None:
            failed.result()

    async def _show_live(self, session: GatewaySession, forward: UdpForward) -> None:
        before, at = _traffic(session, forward), time.monotonic()
        with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(_LIVE_INTERVAL_S)
                traffic, now = _traffic(session, forward), time.monotonic()
                line = describe(session.state.value, traffic, before, now - at, self._problem)
                before, at = traffic, now
                live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    async def _log_summaries(self, session: GatewaySession, forward: UdpForward) -> None:
        while True:
            await asyncio.sleep(_SUMMARY_INTERVAL_S)
            _log.info(
                "forwarding",
                state=session.state.value,
                details=summarize(_traffic(session, forward)),
            )


def _traffic(session: GatewaySession, forward: UdpForward) -> Traffic:
    drops: dict[str, int] = {}
    for source in (forward.drops, session.drops):
        for reason, count in source.items():
            drops[reason.value] = drops.get(reason.value, 0) + count
    counters = forward.counters
    return Traffic(
        peers=forward.peers,
        peers_total=counters.peers_total,
        out=counters.from_peers,
        out_bytes=counters.from_peers_bytes,
        back=counters.to_peers,
        back_bytes=counters.to_peers_bytes,
        drops=drops,
    )
