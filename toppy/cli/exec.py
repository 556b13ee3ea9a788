"""``toppy exec -- COMMAND``: a program with the proxy variables set, and a proxy for it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import uvloop

from toppy.cli.login import ask_passphrase
from toppy.cli.proxy import bind, check_has_policy, make_proxy, options_of, record_end
from toppy.cli.session_shell import STARTUP_ERRORS, GatewayAccess, Notices, load_access, warn
from toppy.client.audit import ClientAudit
from toppy.client.settings import LoadedClientConfig, load_client_config
from toppy.client.tokens import own_identity
from toppy.errors import ConfigError
from toppy.model.audit_event import AuditAction
from toppy.model.identity import Identity
from toppy.observe.log import configure_logging
from toppy.protocol.local_proxy import Credentials
from toppy.system.descriptors import raise_descriptor_limit
from toppy.system.process_title import set_process_title

EXIT_OWN_FAILURE: Final = 125
"""toppy failed, not the program; as env(1), timeout(1) and docker-run(1) have it."""
_EXIT_NOT_EXECUTABLE: Final = 126
_EXIT_NOT_FOUND: Final = 127
_EXIT_BY_SIGNAL: Final = 128
_HOST: Final = "127.0.0.1"
_USER: Final = "toppy"
_NOT_PROXIED: Final = "localhost,127.0.0.1,::1"
_PASSED_ON: Final = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
    signal.SIGWINCH,
)
_FROM_THE_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH)
"""A terminal sends these to everybody in its foreground, the program included."""


def proxy_variables(port: int, password: str) -> dict[str, str]:
    """What programs read, in both cases: each looks for another one. Names are resolved at the
    gateway (``socks5h``).
    """
    where = f"{_USER}:{password}@{_HOST}:{port}"
    variables = {
        "http_proxy": f"http://{where}",
        "https_proxy": f"http://{where}",
        "all_proxy": f"socks5h://{where}",
        "no_proxy": _NOT_PROXIED,
    }
    return variables | {name.upper(): value for name, value in variables.items()}


def run_exec(command: Sequence[str], config: str | None, environ: Mapping[str, str]) -> int:
    """Run ``command`` to its end; returns its exit code: 128 and the signal's number when one ended
    it, 127 when it is not there, 126 when it cannot be run, 125 when toppy failed.
    """
    configure_logging("warning", "auto", process="exec")
    try:
        loaded = load_client_config(config, environ)
        audit = ClientAudit.of(loaded.config, loaded.path, environ)
        identity = own_identity(loaded, environ, ask_passphrase)
        check_has_policy(loaded.config)
        access = load_access(loaded, environ)
        local = bind(_HOST, 0)
    except STARTUP_ERRORS as error:
        print(f"toppy exec: {error}", file=sys.stderr)
        return EXIT_OWN_FAILURE
    warn(loaded, access)
    running = _ExecCommand(command, local, loaded, identity, audit)
    try:
        return uvloop.run(running.run(access, environ))
    except ConfigError as error:
        print(f"toppy exec: {error}", file=sys.stderr)
        return EXIT_OWN_FAILURE
    finally:
        local.close()


class _ExecCommand:
    """One run of a program."""

    def __init__(
        self,
        command: Sequence[str],
        local: socket.socket,
        loaded: LoadedClientConfig,
        identity: Identity,
        audit: ClientAudit,
    ) -> None:
        self._command = command
        self._name = Path(command[0]).name
        """All that is shown of it: arguments may be secret."""
        self._local = local
        self._loaded = loaded
        self._identity = identity
        self._audit = audit
        self._notices = Notices(audit, is_quiet=False)
        self._program: subprocess.Popen[bytes] | None = None

    async def run(self, access: GatewayAccess, environ: Mapping[str, str]) -> int:
        """Until the program ends; the exit code. Raises ``ConfigError``."""
        loop = asyncio.get_running_loop()
        password = secrets.token_urlsafe(18)
        session = self._notices.make_session(access.settings)
        options = options_of(self._loaded.config, Credentials(_USER, password))
        proxy = make_proxy(
            self._local,
            session,
            self._loaded,
            self._identity,
            options=options,
            notices=self._notices,
        )
        serving = loop.create_task(proxy.run())
        keeping = self._notices.keep(session, access.login)
        began = time.monotonic()
        try:
            exit_code = await self._run_program(
                {**environ, **proxy_variables(self._local.getsockname()[1], password)}
            )
        finally:
            # programs first: they end their tunnels on the connection that the session then closes
            for task in (serving, *keeping):
                task.cancel()
                await asyncio.wait({task})
        record_end(
            self._audit,
            AuditAction.EXEC_CLOSED,
            self._name,
            f"exit code {exit_code}",
            proxy=proxy,
            elapsed_s=time.monotonic() - began,
        )
        await self._audit.ship()
        return exit_code

    async def _run_program(self, environ: Mapping[str, str]) -> int:
        loop = asyncio.get_running_loop()
        for number in _PASSED_ON:  # before there is a program that would be left behind
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup: the program inherits that
                loop.add_signal_handler(number, self._pass_on, number)
        try:
            program = self._program = subprocess.Popen(self._command, env=environ)  # noqa: ASYNC220, S603
        except OSError as error:
            print(f"toppy exec: {self._command[0]}: {error.strerror or error}", file=sys.stderr)
            is_missing = isinstance(error, FileNotFoundError)
            return _EXIT_NOT_FOUND if is_missing else _EXIT_NOT_EXECUTABLE
        # after the start: a program that uses select(2) wants no more than it was given
        raise_descriptor_limit()
        set_process_title(f"toppy exec: {self._name}")
        self._audit.record(AuditAction.EXEC, self._name, allowed=True)
        status = await asyncio.to_thread(program.wait)
        return status if status >= 0 else _EXIT_BY_SIGNAL - status

    def _pass_on(self, number: signal.Signals) -> None:
        if self._program is None:
            return
        if number not in _FROM_THE_TERMINAL or not _is_in_foreground():
            self._program.send_signal(number)  # to nobody, once it has ended


def _is_in_foreground() -> bool:
    """Whether the terminal sends its signals to this process group, the program included."""
    try:
        with Path("/dev/tty").open("rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
