"""Local ports that lead to targets, started together: policy, then ports, then the gateway."""

from __future__ import annotations

import asyncio
import ipaddress
import sys
import time
from collections.abc import Mapping, Sequence

import uvloop
from rich.console import Console
from rich.live import Live
from rich.text import Text

from toppy.cli.forward_entries import TcpEntry, UdpEntry, Wanted, bind
from toppy.cli.login import ask_passphrase
from toppy.cli.output import (
    TcpTraffic,
    Traffic,
    add_tcp_traffic,
    add_traffic,
    describe,
    describe_tcp,
)
from toppy.cli.session_shell import (
    EXIT_DENIED,
    EXIT_FAILURE,
    STARTUP_ERRORS,
    GatewayAccess,
    Notices,
    always_rate,
    load_access,
    stop_on_signals,
    warn,
)
from toppy.client.audit import ClientAudit
from toppy.client.gateway_far_side import GatewayFarSide
from toppy.client.policy import check_policy, own_denial, own_ruleset, parse_target
from toppy.client.session import GatewaySession, SessionState
from toppy.client.settings import LoadedClientConfig, load_client_config
from toppy.client.tcp_forward import DirectFarSide, FarSide
from toppy.client.tokens import own_identity
from toppy.config.address import parse_host_port, parse_listen_address
from toppy.config.client import ClientConfig
from toppy.errors import ConfigError, DeniedError, ToppyError
from toppy.model.audit_event import AuditAction
from toppy.model.identity import Identity
from toppy.model.target import Protocol
from toppy.net.tcp_relay import Rate
from toppy.observe.log import configure_logging, get_logger
from toppy.system.descriptors import raise_descriptor_limit
from toppy.system.process_title import set_process_title

_LIVE_INTERVAL_S = 0.5
_SUMMARY_INTERVAL_S = 60.0

_log = get_logger("forward")


def wanted_by_options(
    protocol: Protocol, listen: str, target: str, *, is_direct: bool = False
) -> Wanted:
    """``--listen`` and ``--target``. Raises ``ConfigError``."""
    try:
        address = parse_listen_address(listen)
    except ValueError as error:
        raise ConfigError(f"--listen: {error}") from None
    wanted = Wanted(address, parse_target("--target", target, protocol), is_direct)
    _check_loop("--target", wanted)
    return wanted


def _check_loop(option: str, wanted: Wanted) -> None:
    if wanted.is_direct and wanted.listen == (wanted.target.host, wanted.target.port):
        raise ConfigError(f"{option}: {wanted.target} is where this listens; name another port")


def wanted_by_file(config: ClientConfig, protocols: Sequence[Protocol]) -> list[Wanted]:
    """The ``[[forward]]`` entries. Raises ``ConfigError`` where there are none."""
    found = [
        Wanted(
            parse_host_port(entry.listen),
            parse_target("forward.target", entry.target, entry.protocol),
            entry.direct,
        )
        for entry in config.forward
        if entry.protocol in protocols
    ]
    for wanted in found:
        _check_loop("forward.target", wanted)
    if not found:
        kind = "" if len(protocols) > 1 else f' with protocol = "{protocols[0]}"'
        raise ConfigError(
            f"give --listen and --target; or write [[forward]] tables{kind} into the "
            "configuration, which are started without arguments"
        )
    return found


def run_forwards(
    command: str,
    config: str | None,
    environ: Mapping[str, str],
    *,
    options: tuple[str, str] | None = None,
    protocols: Sequence[Protocol],
    is_direct: bool = False,
    is_once: bool = False,
) -> int:
    """Forward until a signal, or one connection; returns the exit code (T-014, T-018).

    ``options`` are ``--listen`` and ``--target``; without them the configuration's entries of
    ``protocols`` are started. One that the policy denies keeps all from starting.
    """
    entries: list[TcpEntry | UdpEntry] = []
    wanted: Wanted | None = None
    try:
        loaded = load_client_config(config, environ)
        audit = ClientAudit.of(loaded.config, loaded.path, environ)
        if options is not None:
            all_wanted = [wanted_by_options(protocols[0], *options, is_direct=is_direct)]
        else:
            all_wanted = wanted_by_file(loaded.config, protocols)
        if is_once and (len(all_wanted) > 1 or all_wanted[0].protocol != "tcp"):
            raise ConfigError("--once: needs one TCP port; give --listen and --target")
        identity = own_identity(loaded, environ, ask_passphrase)
        for wanted in all_wanted:
            check_policy(loaded.config, wanted.target, identity)
        access = None
        if not all(each.is_direct for each in all_wanted):
            access = load_access(loaded, environ)
        entries += map(bind, all_wanted)
    except DeniedError as error:
        assert wanted is not None
        print(f"Policy denied: {own_denial(error, loaded.path)}", file=sys.stderr)
        configure_logging("warning", "auto", process=command)
        action = AuditAction.UP if wanted.protocol == "tcp" else AuditAction.UDP
        audit.record_and_ship(action, str(wanted.target), allowed=False, reason=str(error))
        return EXIT_DENIED
    except STARTUP_ERRORS as error:
        for entry in entries:
            entry.close()
        return _fail(command, error)
    is_terminal = sys.stderr.isatty()
    configure_logging("warning" if is_terminal else "info", "auto", process=command)
    warn(loaded, access)
    _warn_of_exposure(entries)
    raise_descriptor_limit()
    ways = [f"{entry.listen} -> {entry.target}" for entry in entries]
    set_process_title(f"toppy {command}: {', '.join(ways)}")
    for entry in entries:
        audit.record(entry.action, entry.target, allowed=True, listen=entry.listen)
    running = _Forwards(entries, loaded, audit, identity, is_terminal=is_terminal)
    try:
        return uvloop.run(running.run(access, is_once=is_once))
    except ConfigError as error:
        return _fail(command, error)
    finally:
        for entry in entries:
            entry.close()


def _warn_of_exposure(entries: Sequence[TcpEntry | UdpEntry]) -> None:
    for entry in entries:
        host, _ = parse_host_port(entry.listen)  # the address that the socket has
        if not ipaddress.ip_address(host).is_loopback:
            _log.warning(
                "everybody who reaches this port uses your credential; listen on 127.0.0.1 unless "
                "that is meant",
                listen=entry.listen,
                target=entry.target,
            )


def _fail(command: str, error: ToppyError) -> int:
    print(f"toppy {command}: {error}", file=sys.stderr)
    return EXIT_FAILURE


class _Forwards:
    """One run: shows what happens, and stops on the first signal."""

    def __init__(
        self,
        entries: Sequence[TcpEntry | UdpEntry],
        loaded: LoadedClientConfig,
        audit: ClientAudit,
        identity: Identity,
        *,
        is_terminal: bool,
    ) -> None:
        self._entries = entries
        self._config = loaded.config
        self._audit = audit
        self._identity = identity
        self._is_terminal = is_terminal
        self._notices = Notices(audit, is_quiet=is_terminal)
        self._session: GatewaySession | None = None

    async def run(self, access: GatewayAccess | None, *, is_once: bool) -> int:
        """Forward until SIGINT or SIGTERM; a second one ends the process at once. Returns the exit
        code. Raises ``ConfigError`` for settings that no engine can work with.
        """
        loop = asyncio.get_running_loop()
        if access is not None:
            self._session = self._notices.make_session(access.settings)
        self._start()
        stopping = stop_on_signals()
        # whoever reads these lines may connect, send, and send signals
        for entry in self._entries:
            print(
                f"toppy {entry.action.value} listening on {entry.listen} -> {entry.target}",
                flush=True,
            )
        serving = [loop.create_task(entry.serve(is_once=is_once)) for entry in self._entries]
        show = self._show_live if self._is_terminal else self._log_summaries
        others = [loop.create_task(show()), loop.create_task(self._wait(stopping))]
        keeping: list[asyncio.Task[None]] = []
        if self._session is not None and access is not None:
            keeping = self._notices.keep(self._session, access.login)
        began = time.monotonic()
        shipping = loop.create_task(self._audit.ship())
        tasks: list[asyncio.Task[None] | asyncio.Task[bool]] = [*serving, *others, *keeping]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        is_over = is_once and serving[0].done()
        failed = [task for task in (*serving, *keeping) if task.done() and not is_over]
        # the ports first: they end their tunnels on the connection that the session then closes
        for some in ([*serving, *others], keeping):
            for task in some:
                task.cancel()
            if some:
                await asyncio.wait(some)
        self._tell_end(began, is_over=is_over, has_failed=bool(failed))
        await asyncio.wait({shipping})
        await self._audit.ship()
        for task in failed:
            task.result()
        return EXIT_FAILURE if is_over and not serving[0].result() else 0

    @staticmethod
    async def _wait(stopping: asyncio.Event) -> None:
        await stopping.wait()

    def _start(self) -> None:
        udp = [entry for entry in self._entries if isinstance(entry, UdpEntry)]
        for entry in self._entries:
            if isinstance(entry, TcpEntry):
                entry.start(self._far_side(entry.wanted), self._config, self._notices)
            else:
                assert self._session is not None
                entry.start(
                    self._session, self._config, self._notices, counts_session=len(udp) == 1
                )

    def _far_side(self, wanted: Wanted) -> FarSide:
        config = self._config
        if not wanted.is_direct:
            assert self._session is not None
            return GatewayFarSide(self._session, wanted.target, limits=always_rate(config))
        ruleset = own_ruleset(config)
        rate = always_rate(config).bytes
        return DirectFarSide(
            wanted.target,
            lambda addresses, now: ruleset.decide(
                self._identity, wanted.target, addresses, now=now
            ),
            rate=Rate(rate.per_s, rate.burst) if rate.is_limited else None,
            connect_timeout_s=config.tcp_connect_timeout_s,
        )

    def _tell_end(self, began: float, *, is_over: bool, has_failed: bool) -> None:
        reason = "one connection" if is_over else "failed" if has_failed else "told to stop"
        for line in self._summaries():
            print(line, file=sys.stderr)
        duration_s = round(time.monotonic() - began, 3)
        for entry in self._entries:
            entry.record_end(self._audit, reason, duration_s)

    def _summaries(self) -> list[str]:
        if len(self._entries) == 1:
            return [self._entries[0].summary()]
        return [f"{each.listen} -> {each.target}: {each.summary()}" for each in self._entries]

    def _traffic(self) -> tuple[TcpTraffic, Traffic]:
        return (
            add_tcp_traffic(e.traffic for e in self._entries if isinstance(e, TcpEntry)),
            add_traffic(e.traffic for e in self._entries if isinstance(e, UdpEntry)),
        )

    def _describe(
        self, now: tuple[TcpTraffic, Traffic], before: tuple[TcpTraffic, Traffic], elapsed_s: float
    ) -> str:
        state = (self._session.state if self._session is not None else SessionState.CONNECTED).value
        problem = self._notices.problem
        kinds = {entry.wanted.protocol for entry in self._entries}
        if kinds == {"udp"}:
            return describe(state, now[1], before[1], elapsed_s, problem)
        line = describe_tcp(now[0], before[0], elapsed_s)
        if kinds == {"tcp"}:
            shown = line if self._session is None else f"{state}, {line}"
        else:
            shown = f"{describe(state, now[1], before[1], elapsed_s)} · TCP: {line}"
        return f"{shown} · {problem}" if problem else shown

    async def _show_live(self) -> None:
        before, at = self._traffic(), time.monotonic()
        with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(_LIVE_INTERVAL_S)
                traffic, now = self._traffic(), time.monotonic()
                line = self._describe(traffic, before, now - at)
                before, at = traffic, now
                live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    async def _log_summaries(self) -> None:
        while True:
            await asyncio.sleep(_SUMMARY_INTERVAL_S)
            state = self._session.state.value if self._session is not None else "direct"
            for line in self._summaries():
                _log.info("forwarding", state=state, details=line)
