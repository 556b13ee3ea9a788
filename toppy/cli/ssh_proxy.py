"""``toppy ssh-proxy HOST PORT``: what OpenSSH's ProxyCommand wants: a connection on standard input
and output, and nothing else there.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Mapping

import uvloop

from toppy.cli.login import ask_passphrase
from toppy.cli.session_shell import (
    EXIT_DENIED,
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
from toppy.client.gateway_far_side import open_stream
from toppy.client.policy import check_policy, own_denial, parse_target
from toppy.client.session import GatewaySession
from toppy.client.settings import load_client_config
from toppy.client.stdio_tunnel import carry_stdio
from toppy.client.tokens import own_identity
from toppy.errors import ConfigError, DeniedError, TargetError
from toppy.model.audit_event import AuditAction
from toppy.model.rate import DirectionLimits
from toppy.model.target import Target
from toppy.net.tcp_relay import ByteCounters
from toppy.observe.log import configure_logging
from toppy.system.process_title import set_process_title


def run_ssh_proxy(host: str, port: int, config: str | None, environ: Mapping[str, str]) -> int:
    """Carry one connection; returns the exit code: 0 when it ended in order, 1 when it could not be
    made or broke, 2 when a policy denies it.
    """
    configure_logging("warning", "auto", process="ssh-proxy")
    try:
        loaded = load_client_config(config, environ)
        audit = ClientAudit.of(loaded.config, loaded.path, environ)
        target = parse_target("HOST PORT", str(Target(host, port)), "tcp")
        check_policy(loaded.config, target, own_identity(loaded, environ, ask_passphrase))
        access = load_access(loaded, environ)
    except DeniedError as error:
        _say(f"policy denied: {own_denial(error, loaded.path)}")
        audit.record_and_ship(AuditAction.SSH_PROXY, str(target), allowed=False, reason=str(error))
        return EXIT_DENIED
    except STARTUP_ERRORS as error:
        _say(str(error))
        return EXIT_FAILURE
    warn(loaded, access)
    set_process_title(f"toppy ssh-proxy: {target}")
    audit.record(AuditAction.SSH_PROXY, str(target), allowed=True)
    try:
        return uvloop.run(_carry(target, access, audit, written_rate(loaded.config)))
    except ConfigError as error:
        _say(str(error))
        return EXIT_FAILURE


def _say(text: str) -> None:
    print(f"toppy ssh-proxy: {text}", file=sys.stderr)


async def _carry(
    target: Target, access: GatewayAccess, audit: ClientAudit, limits: DirectionLimits
) -> int:
    loop = asyncio.get_running_loop()
    notices = Notices(audit, is_quiet=False)
    session = notices.make_session(access.settings)
    # ssh ends its ProxyCommand with SIGHUP
    stopping = stop_on_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    counters = ByteCounters()
    began = time.monotonic()
    carrying = loop.create_task(_connect_and_carry(session, target, limits, counters, audit))
    waiting = loop.create_task(stopping.wait())
    keeping = notices.keep(session, access.login)
    await asyncio.wait({carrying, waiting, *keeping}, return_when=asyncio.FIRST_COMPLETED)
    is_over = carrying.done()
    failed = [task for task in keeping if task.done()]
    # the tunnel first: it ends on the connection that the session then closes
    for task in (carrying, waiting, *keeping):
        task.cancel()
        await asyncio.wait({task})
    exit_code, reason = carrying.result() if is_over else (EXIT_FAILURE, "told to stop")
    audit.record(
        AuditAction.SSH_PROXY_CLOSED,
        str(target),
        allowed=True,
        reason=reason,
        duration_s=round(time.monotonic() - began, 3),
        bytes_out=counters.to_target,
        bytes_in=counters.to_client,
    )
    await audit.ship()
    for task in failed:
        task.result()
    return exit_code


async def _connect_and_carry(
    session: GatewaySession,
    target: Target,
    limits: DirectionLimits,
    counters: ByteCounters,
    audit: ClientAudit,
) -> tuple[int, str]:
    """The exit code, and why it ended."""
    try:
        stream = await open_stream(session, target, limits=limits)
    except DeniedError as error:
        _say(f"policy denied: {error}")
        audit.record(AuditAction.SSH_PROXY_REFUSED, str(target), allowed=False, reason=str(error))
        return EXIT_DENIED, "the gateway refused it"
    except TargetError as error:
        _say(str(error))
        return EXIT_FAILURE, str(error)
    problem = await carry_stdio(stream, counters)
    if problem:
        _say(f"the connection broke: {problem}")
        return EXIT_FAILURE, problem
    return 0, "both sides ended it"
