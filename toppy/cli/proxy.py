"""``toppy proxy``: one local port that speaks SOCKS5, SOCKS4a and HTTP."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import uvloop
from rich.console import Console
from rich.live import Live
from rich.text import Text

from toppy.cli.login import ask_passphrase
from toppy.cli.output import TcpTraffic, describe_tcp, summarize_tcp
from toppy.cli.session_shell import (
    EXIT_FAILURE,
    STARTUP_ERRORS,
    GatewayAccess,
    Notices,
    load_access,
    stop_on_signals,
    warn,
    written_rate,
)
from toppy.client.audit import ClientAudit
from toppy.client.local_proxy import LocalProxy, ProxyEvents, ProxyOptions
from toppy.client.policy import decide_on_loop
from toppy.client.session import GatewaySession
from toppy.client.settings import LoadedClientConfig, load_client_config
from toppy.client.tokens import own_identity
from toppy.client.tunnel import Refusal
from toppy.config.address import parse_listen_address
from toppy.config.client import ClientConfig
from toppy.errors import ConfigError, ToppyError
from toppy.model.audit_event import AuditAction
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.net.tcp import listen_tcp
from toppy.observe.log import configure_logging, get_logger
from toppy.policy.ruleset import Decision
from toppy.protocol.local_proxy import Credentials
from toppy.system.descriptors import raise_descriptor_limit
from toppy.system.files import read_file
from toppy.system.process_title import set_process_title

_LIVE_INTERVAL_S = 0.5
_SUMMARY_INTERVAL_S = 60.0

_log = get_logger("proxy")


def run_proxy(listen: str | None, config: str | None, environ: Mapping[str, str]) -> int:
    """Serve programs until a signal; returns the exit code (T-018)."""
    try:
        loaded = load_client_config(config, environ)
        audit = ClientAudit.of(loaded.config, loaded.path, environ)
        host, port = _parse(listen if listen is not None else loaded.config.proxy.listen)
        credentials = credentials_of(loaded)
        check_exposure(host, credentials)
        identity = own_identity(loaded, environ, ask_passphrase)
        check_has_policy(loaded.config)
        access = load_access(loaded, environ)
        local = bind(host, port)
    except STARTUP_ERRORS as error:
        return _fail(error)
    is_terminal = sys.stderr.isatty()
    configure_logging("warning" if is_terminal else "info", "auto", process="proxy")
    warn(loaded, access)
    raise_descriptor_limit()
    address = str(Target(*local.getsockname()[:2]))
    set_process_title(f"toppy proxy: {address}")
    audit.record(AuditAction.PROXY, address, allowed=True, has_password=credentials is not None)
    options = options_of(loaded.config, credentials)
    running = _ProxyCommand(local, loaded, identity, options, audit, is_terminal=is_terminal)
    try:
        uvloop.run(running.run(access, address))
    except ConfigError as error:
        return _fail(error)
    finally:
        local.close()
    return 0


def _fail(error: ToppyError) -> int:
    print(f"toppy proxy: {error}", file=sys.stderr)
    return EXIT_FAILURE


def _parse(listen: str) -> tuple[str, int]:
    try:
        return parse_listen_address(listen)
    except ValueError as error:
        raise ConfigError(f"--listen: {error}") from None


def credentials_of(loaded: LoadedClientConfig) -> Credentials | None:
    """Of the configuration. Raises ``ConfigError``."""
    proxy = loaded.config.proxy
    if proxy.user is None:
        return None
    if proxy.password is not None:
        return Credentials(proxy.user, proxy.password.get_secret_value())
    assert proxy.password_file is not None
    where = loaded.path.absolute().parent / Path(proxy.password_file).expanduser()
    password = read_file(where, "proxy.password_file").decode("utf-8", "replace").rstrip("\r\n")
    return Credentials(proxy.user, password)


def check_exposure(host: str, credentials: Credentials | None) -> None:
    """Raise ``ConfigError`` for a port that strangers could use."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(
            f"--listen: {host!r} is no IP address; write 127.0.0.1 or [::1]"
        ) from None
    if credentials is None and not address.is_loopback:
        raise ConfigError(
            f"--listen: everybody who reaches {host} could use your access; listen on 127.0.0.1, "
            "or set proxy.user and proxy.password_file (TOPPY_PROXY_USER, TOPPY_PROXY_PASSWORD)"
        )


def check_has_policy(config: ClientConfig) -> None:
    """Raise ``ConfigError`` where no target at all would be allowed."""
    if config.policy is None or not config.policy.allow:
        raise ConfigError(
            "the configuration allows no target, and what is not allowed is denied; write "
            "[[policy.allow]] rules"
        )


def bind(host: str, port: int) -> socket.socket:
    """Take the local port. Raises ``ConfigError``."""
    try:
        return listen_tcp(host, port)
    except OSError as error:
        raise ConfigError(
            f"--listen: cannot listen on {Target(host, port)}: {error.strerror or error}; choose "
            "an address of this host and a free port"
        ) from None


def options_of(config: ClientConfig, credentials: Credentials | None) -> ProxyOptions:
    """How the proxy behaves."""
    proxy = config.proxy
    return ProxyOptions(
        credentials=credentials,
        max_connections=proxy.max_connections,
        handshake_timeout_s=proxy.handshake_timeout_s,
        limits=written_rate(config),
        udp_max_targets=config.udp_max_peers,
        udp_idle_s=config.udp_idle_s,
        pac_through=proxy.pac_through,
        pac_direct=proxy.pac_direct,
    )


class RecordedEvents(ProxyEvents):
    """Tells the log and the audit log."""

    def __init__(self, notices: Notices) -> None:
        self._notices = notices

    def opened(self, target: Target) -> None:
        """See ``ProxyEvents``."""
        self._notices.record_once(
            AuditAction.PROXY_OPENED, str(target), allowed=True, reason=target.protocol
        )

    def denied(self, peer: str, target: Target, reason: str) -> None:
        """See ``ProxyEvents``."""
        self._notices.record_once(
            AuditAction.PROXY_REFUSED, str(target), allowed=False, reason=reason
        )
        self._notices.on_refused(str(target), reason, peer=peer)

    def refused(self, peer: str, target: Target, refusal: Refusal) -> None:
        """See ``ProxyEvents``."""
        self._notices.on_refused(str(target), refusal.explanation, peer=peer, status=refusal.status)

    def failed(self, peer: str, target: str, reason: str) -> None:
        """See ``ProxyEvents``."""
        self._notices.on_reset(target, reason, peer=peer)


def make_proxy(
    local: socket.socket,
    session: GatewaySession,
    loaded: LoadedClientConfig,
    identity: Identity,
    *,
    options: ProxyOptions,
    notices: Notices,
) -> LocalProxy:
    """On the event loop."""

    async def decide(target: Target) -> Decision:
        return (await decide_on_loop(loaded.config, target, identity, time.time())).decision

    return LocalProxy(local, session, decide, options, RecordedEvents(notices))


def traffic_of(proxy: LocalProxy) -> TcpTraffic:
    """Until now; datagrams count in bytes alone."""
    counters = proxy.counters
    return TcpTraffic(
        open=proxy.connections,
        connections=counters.connections,
        failures=counters.failures,
        out_bytes=counters.to_target + counters.datagrams.from_peers_bytes,
        back_bytes=counters.to_client + counters.datagrams.to_peers_bytes,
    )


def record_end(
    audit: ClientAudit,
    action: AuditAction,
    target: str,
    reason: str,
    *,
    proxy: LocalProxy,
    elapsed_s: float,
) -> None:
    """What went through, into the audit log."""
    traffic, datagrams = traffic_of(proxy), proxy.counters.datagrams
    audit.record(
        action,
        target,
        allowed=True,
        reason=reason,
        duration_s=round(elapsed_s, 3),
        connections=traffic.connections,
        failures=traffic.failures,
        bytes_out=traffic.out_bytes,
        bytes_in=traffic.back_bytes,
        datagrams_out=datagrams.from_peers,
        datagrams_in=datagrams.to_peers,
    )


class _ProxyCommand:
    """One run: shows what happens, and stops on the first signal."""

    def __init__(
        self,
        local: socket.socket,
        loaded: LoadedClientConfig,
        identity: Identity,
        options: ProxyOptions,
        audit: ClientAudit,
        *,
        is_terminal: bool,
    ) -> None:
        self._local = local
        self._loaded = loaded
        self._identity = identity
        self._options = options
        self._audit = audit
        self._is_terminal = is_terminal
        self._notices = Notices(audit, is_quiet=is_terminal)

    async def run(self, access: GatewayAccess, address: str) -> None:
        """Serve until SIGINT or SIGTERM; a second one ends the process at once."""
        loop = asyncio.get_running_loop()
        session = self._notices.make_session(access.settings)
        proxy = make_proxy(
            self._local,
            session,
            self._loaded,
            self._identity,
            options=self._options,
            notices=self._notices,
        )
        stopping = stop_on_signals()
        print(f"toppy proxy listening on {address}", flush=True)
        serving = loop.create_task(proxy.run())
        show = self._show_live if self._is_terminal else self._log_summaries
        showing = loop.create_task(show(session, proxy))
        waiting = loop.create_task(stopping.wait())
        keeping = self._notices.keep(session, access.login)
        began = time.monotonic()
        shipping = loop.create_task(self._audit.ship())
        await asyncio.wait(
            {serving, showing, waiting, *keeping}, return_when=asyncio.FIRST_COMPLETED
        )
        failed = [task for task in (serving, showing, *keeping) if task.done()]
        # programs first: they end their tunnels on the connection that the session then closes
        for task in (serving, showing, waiting, *keeping):
            task.cancel()
            await asyncio.wait({task})
        print(summarize_tcp(traffic_of(proxy)), file=sys.stderr)
        reason = "failed" if failed else "told to stop"
        record_end(
            self._audit,
            AuditAction.PROXY_CLOSED,
            address,
            reason,
            proxy=proxy,
            elapsed_s=time.monotonic() - began,
        )
        await asyncio.wait({shipping})
        await self._audit.ship()
        for task in failed:
            task.result()

    async def _show_live(self, session: GatewaySession, proxy: LocalProxy) -> None:
        before, at = traffic_of(proxy), time.monotonic()
        with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(_LIVE_INTERVAL_S)
                traffic, now = traffic_of(proxy), time.monotonic()
                line = describe_tcp(traffic, before, now - at, self._notices.problem)
                before, at = traffic, now
                text = Text(f"{session.state.value}, {line}", no_wrap=True, overflow="ellipsis")
                live.update(text, refresh=True)

    async def _log_summaries(self, session: GatewaySession, proxy: LocalProxy) -> None:
        while True:
            await asyncio.sleep(_SUMMARY_INTERVAL_S)
            _log.info(
                "serving", state=session.state.value, details=summarize_tcp(traffic_of(proxy))
            )
